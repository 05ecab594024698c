"""A worker of NVIDIA Dynamo with FlexKV: python -m flexkv.dynamo, see docs/dynamo.md."""
