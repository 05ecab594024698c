"""Where the block tables of scheduled requests come from: newer engines resolve them on demand;
for older ones they are kept here, as each step tells what it adds."""
from __future__ import annotations

from typing import Any

Tables = tuple[list[int], ...]


class BlockTables:
    def __init__(self) -> None:
        self._own: dict[str, Tables] = {}
        self._state: Any = None

    def step(self, scheduler_output: Any) -> None:
        self._state = getattr(scheduler_output, "kv_connector_block_state", None)
        if self._state is None:
            self._follow(scheduler_output)

    def _follow(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            self._own[new.req_id] = tuple(list(ids) for ids in new.block_ids)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, added in zip(cached.req_ids, cached.new_block_ids):
            if request_id in cached.resumed_req_ids:
                self._own[request_id] = tuple(list(ids) for ids in added or ())
            elif added is not None and request_id in self._own:
                for ids, more in zip(self._own[request_id], added):
                    ids.extend(more)

    def of(self, request_id: str) -> Tables | None:
        if self._state is not None:
            return self._state.get_block_ids(request_id)
        own = self._own.get(request_id)
        return None if own is None else tuple(list(ids) for ids in own)

    def drop(self, request_id: str) -> None:
        self._own.pop(request_id, None)
