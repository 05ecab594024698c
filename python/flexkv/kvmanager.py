"""KVManager: the scheduler's view of the cache, under the reference's name and signatures.

Tasks, masks and slot mappings are explained in docs/python_api.md. This class only chooses where
the node is (in this process, or in a daemon that several replicas or engines share) and hands
everything on.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexkv.common.config import GLOBAL_CONFIG_FROM_ENV, CacheConfig, ModelConfig
from flexkv.common.request import KVResponse
from flexkv.kvtask import KVTaskEngine, node_address
from flexkv.server.client import KVDPClient
from flexkv.server.server import KVServer

if TYPE_CHECKING:
    import numpy as np

    from flexkv.integration.dynamo.collector import KVEventCollector

_Namespace = Sequence[str] | None


class KVManager:
    def __init__(self, model_config: ModelConfig, cache_config: CacheConfig,
                 dp_client_id: int = 0, server_recv_port: str = "", gpu_register_port: str = "",
                 event_collector: KVEventCollector | None = None) -> None:
        self.model_config = model_config
        self.cache_config = cache_config
        self.server_recv_port = server_recv_port or GLOBAL_CONFIG_FROM_ENV.server_recv_port
        self.gpu_register_port = gpu_register_port or self.server_recv_port + "_gpu_register"
        self.server_launch_mode = GLOBAL_CONFIG_FROM_ENV.server_launch_mode
        self.server_client_mode = bool(
            model_config.dp_size > 1 or model_config.instance_num > 1
            or GLOBAL_CONFIG_FROM_ENV.server_client_mode)
        self.owns_mps = False               # no second process uses the GPU
        self.server_handle: Any = None
        self._check_modes()
        self.event_collector = event_collector
        if self.server_client_mode:
            self._connect_to_daemon(dp_client_id)
        else:
            self.kv_task_engine = KVTaskEngine(model_config, cache_config, self.gpu_register_port,
                                               event_collector=event_collector)

    def _check_modes(self) -> None:
        if self.server_launch_mode not in ("embedded", "external"):
            raise ValueError(f"FLEXKV_SERVER_LAUNCH_MODE must be embedded or external, "
                             f"not {self.server_launch_mode!r}")
        if self.server_launch_mode == "external" and not self.server_client_mode:
            raise ValueError("FLEXKV_SERVER_LAUNCH_MODE=external requires server-client mode: "
                             "set FLEXKV_SERVER_CLIENT_MODE=1 too")
        if self.server_client_mode and \
                node_address(self.gpu_register_port) != self.server_recv_port:
            raise ValueError(
                f"gpu_register_port {self.gpu_register_port} is not at the daemon's address "
                f"{self.server_recv_port}: workers and schedulers meet at one; leave it out")

    def _connect_to_daemon(self, dp_client_id: int) -> None:
        daemon = None
        if self.server_launch_mode == "embedded" and dp_client_id == 0:
            self.server_handle = KVServer.create_server(
                model_config=self.model_config, cache_config=self.cache_config,
                gpu_register_port=self.gpu_register_port, server_recv_port=self.server_recv_port,
                child_env={"FLEXKV_ENABLE_KV_EVENTS": "1"} if self.event_collector else None)
            daemon = self.server_handle.process
        self.dp_client = KVDPClient(self.server_recv_port, model_config=self.model_config,
                                    dp_client_id=dp_client_id, cache_config=self.cache_config,
                                    daemon=daemon)
        self.dp_client.event_collector = self.event_collector

    @property
    def _backend(self) -> Any:
        return self.dp_client if self.server_client_mode else self.kv_task_engine

    def start(self) -> None:
        if self.server_client_mode:
            self.dp_client.start_server_and_register()
        else:
            self.kv_task_engine.start()

    def is_ready(self) -> bool:
        """True once every worker has registered; raises what stands in the way for good."""
        return self._backend.is_ready()

    def shutdown(self) -> None:
        if not self.server_client_mode:
            self.kv_task_engine.shutdown()
        elif self.server_launch_mode == "external":
            self.dp_client.unregister()
        else:
            self.dp_client.shutdown()
            if self.server_handle is not None:
                self.server_handle.shutdown()
                self.server_handle = None

    def get_match(self, token_ids: Any, token_mask: Any = None, cpu_only: bool = False,
                  namespace: _Namespace = None,
                  swa_aware: bool = False) -> tuple[int, np.ndarray]:
        """A task, and a mask over the tokens: True will be loaded."""
        return self._backend.get_match(token_ids, token_mask=token_mask, cpu_only=cpu_only,
                                       namespace=namespace, swa_aware=swa_aware)

    def put_match(self, token_ids: Any, token_mask: Any = None,
                  namespace: _Namespace = None) -> tuple[int, np.ndarray]:
        """A task, and a mask over the tokens: True will be stored, the others are known."""
        return self._backend.put_match(token_ids, token_mask=token_mask, namespace=namespace)

    def get_async(self, token_ids: Any, slot_mapping: Any, token_mask: Any = None,
                  namespace: _Namespace = None) -> int:
        return self._backend.get_async(token_ids, slot_mapping, token_mask=token_mask,
                                       namespace=namespace)[0]

    def put_async(self, token_ids: Any, slot_mapping: Any, token_mask: Any = None,
                  namespace: _Namespace = None) -> int:
        return self._backend.put_async(token_ids, slot_mapping, token_mask=token_mask,
                                       namespace=namespace)[0]

    def prefetch_async(self, token_ids: Any, namespace: _Namespace = None,
                       swa_aware: bool = False) -> int:
        """The response's mask marks what is in the CPU tier when the prefetch has ended."""
        return self._backend.prefetch_async(token_ids, namespace=namespace, swa_aware=swa_aware)

    def launch(self, task_ids: int | list[int], slot_mappings: Any,
               swa_slot_mappings: Any = None, as_batch: bool = False,
               layerwise_transfer: bool = False, counter_id: int = 0) -> list[int]:
        """Starts matched tasks: one slot mapping each."""
        if isinstance(task_ids, int):
            task_ids = [task_ids]
        if not _is_list_of_mappings(slot_mappings):
            slot_mappings = [slot_mappings]
        if swa_slot_mappings is not None and not isinstance(swa_slot_mappings, (list, tuple)):
            swa_slot_mappings = [swa_slot_mappings]
        return self._backend.launch_tasks(
            task_ids, slot_mappings, swa_slot_mappings=swa_slot_mappings, as_batch=as_batch,
            layerwise_transfer=layerwise_transfer, counter_id=counter_id)

    def operation_of(self, task_id: int) -> int:
        return self._backend.operation_of(task_id)

    def cancel(self, task_ids: int | list[int]) -> None:
        self._backend.cancel_tasks([task_ids] if isinstance(task_ids, int) else task_ids)

    def wait(self, task_ids: int | list[int], timeout: float = 20.0,
             completely: bool = False) -> dict[int, KVResponse]:
        if isinstance(task_ids, int):
            task_ids = [task_ids]
        return self._backend.wait(task_ids, timeout, completely)

    def try_wait(self, task_ids: int | list[int]) -> dict[int, KVResponse]:
        return self._backend.try_wait([task_ids] if isinstance(task_ids, int) else task_ids)

    def reset(self) -> None:
        """Drops everything in every tier: after a change of the model's weights."""
        if self.server_client_mode:
            self.dp_client.reset()
        else:
            self.kv_task_engine.reset_cache()


def _is_list_of_mappings(value: Any) -> bool:
    """A list of numbers is one mapping."""
    return isinstance(value, (list, tuple)) and (not value or not isinstance(value[0], int))
