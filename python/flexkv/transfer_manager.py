"""The helper of a replica's ranks on further machines, which this build does not have."""
from __future__ import annotations

from typing import Any, NoReturn


class TransferManagerOnRemote:
    @classmethod
    def create_process(cls, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "ranks of one replica on several machines (nnodes > 1, FLEXKV_MASTER_HOST) are not "
            "supported by this build")
