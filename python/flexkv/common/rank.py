"""Which worker this process is, as far as the engine's adapter has said so.

KVTPClient and KVManager are given no sizes and no ranks of the other side. Where an adapter has
made the RankInfo in this process, both know more: then ranks that hold the same KV store it once.
"""
from __future__ import annotations

from flexkv.common.model import ModelConfig, RankInfo

_noted: RankInfo | None = None


def note_rank(rank_info: RankInfo) -> None:
    global _noted
    _noted = rank_info


def noted_rank(dp_client_id: int) -> RankInfo | None:
    """The noted rank, if it belongs to that replica."""
    if _noted is not None and _noted.dp_client_id == dp_client_id:
        return _noted
    return None


def replicas(model_config: ModelConfig, rank_info: RankInfo | None) -> int:
    """How many workers hold the same slice. That ranks share their KV is known only if an adapter
    has told this process; else each rank stores its own."""
    if rank_info is None or model_config.num_kv_heads != 1:
        return 1
    return model_config.effective_tp_size
