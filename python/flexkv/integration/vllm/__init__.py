"""FlexKV for vLLM: the parts behind its KV connectors. Nothing is imported here, as both the
engine's processes and its front end load modules of this package.

    vllm_v1_adapter   what the connector that comes with vLLM (FlexKVConnectorV1) loads
    connector         our own connector class, named by kv_connector_module_path
    scheduler         what both do in the scheduler's process; loads.py and stores.py are its parts
    worker            what both do in a worker process
"""
