"""One rank decides, the others of its replica follow.

SGLang runs the same scheduler in every rank, and all must take the same turns. What the leader
learns from the node is therefore told to the others: along the pipeline stages, then the context
ranks, then the tensor ranks of each.

Ranks do not come to the same point at the same time, nor all questions in one order, so each kind of
message (Channel) has a tag of its own, and the leader does not wait for the receivers.
"""
from __future__ import annotations

import collections
import pickle
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from flexkv.common.model import RankInfo

if TYPE_CHECKING:
    import torch

_FIRST_TAG = int.from_bytes(b"fkv\0", "big")    # SGLang sends with small tags over the same group
_MAX_SENDS = 1024                               # kept until they are known to have arrived


class Channel(IntEnum):
    READY = 0
    LOOKUP = 1
    LOAD = 2
    STORE = 3
    STORES_DONE = 4
    WAIT_STORE = 5
    PREFETCH = 6
    PREFETCH_DONE = 7
    RESET = 8
    READY_STORES = 9


def _ranks(group: Any) -> list[int]:
    """The group's members as ranks of the world; of a ProcessGroup or an engine's wrapper."""
    import torch.distributed as dist
    process_group = getattr(group, "cpu_group", group)
    return dist.get_process_group_ranks(process_group)


def _world_group() -> Any:
    """SGLang's own group for CPU tensors; without SGLang the default one."""
    try:
        from sglang.srt.distributed.parallel_state import get_world_group
    except ImportError:
        return None
    return get_world_group().cpu_group


class RankSync:
    def __init__(self, rank_info: RankInfo, pp_group: Any = None, attn_tp_group: Any = None,
                 attn_cp_group: Any = None) -> None:
        model = rank_info.model_config
        first_tp, first_cp = rank_info.tp_rank == 0, rank_info.cp_rank == 0
        self.is_leader = first_tp and first_cp and rank_info.pp_rank == 0
        # In this order: (size, group, whether this rank takes part in the hop)
        axes = ((model.pp_size, pp_group, first_tp and first_cp, "pp_group"),
                (model.cp_size, attn_cp_group, first_tp, "attn_cp_group"),
                (model.tp_size, attn_tp_group, True, "attn_tp_group"))
        self._hops: list[list[int]] = []
        for size, group, takes_part, name in axes:
            if size <= 1 or not takes_part:
                continue
            if group is None:
                raise ValueError(f"{name} is missing: {size} ranks must act alike, and there is "
                                 "no way to tell the others")
            self._hops.append(_ranks(group))
        self._world = _world_group() if self._hops else None
        self._sends: collections.deque[tuple[Any, torch.Tensor]] = collections.deque()

    def share(self, channel: Channel, value: Any) -> Any:
        """The leader's value, on every rank. The others' own is not looked at."""
        for number, ranks in enumerate(self._hops):
            tag = _FIRST_TAG + 4 * int(channel) + number
            value = self._hop(ranks, tag, value)
        return value

    def _hop(self, ranks: list[int], tag: int, value: Any) -> Any:
        import torch
        import torch.distributed as dist
        if dist.get_rank() != ranks[0]:
            size = torch.empty(1, dtype=torch.int64)
            dist.recv(size, src=ranks[0], group=self._world, tag=tag)
            payload = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(payload, src=ranks[0], group=self._world, tag=tag)
            return pickle.loads(payload.numpy().tobytes())
        payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = torch.tensor([payload.numel()], dtype=torch.int64)
        for rank in ranks[1:]:
            for tensor in (size, payload):
                work = dist.isend(tensor, dst=rank, group=self._world, tag=tag)
                self._sends.append((work, tensor))
        while len(self._sends) > _MAX_SENDS:
            self._sends.popleft()[0].wait()
        return value
