"""What a task's end looks like to the caller."""
from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


class KVRequestType(Enum):
    GET = "get"
    PUT = "put"
    SHUTDOWN = "shutdown"


class KVResponseStatus(Enum):
    SUCCESS = "success"
    NOTFOUND = "not_found"      # no such task, or its response was taken already
    UNREADY = "unready"         # matched, but not launched
    TIMEOUT = "timeout"         # not finished within the wait; it goes on
    CANCELLED = "cancelled"
    FAILED = "failed"           # the mask marks what arrived nevertheless


@dataclass
class KVResponse:
    status: KVResponseStatus
    task_id: int
    return_mask: np.ndarray | list[np.ndarray] | None   # a list for tasks launched as a batch

    def get_mask(self, idx: int) -> torch.Tensor:
        """The mask of one task of a batch, as a tensor."""
        if not isinstance(self.return_mask, list):
            raise TypeError(f"task {self.task_id} is not a batch: it has one mask, return_mask")
        import torch
        return torch.from_numpy(self.return_mask[idx])
