"""FlexKVConnector: what SGLang's FlexKV radix cache calls.

Every rank has one. The leader (first rank of the replica) has the KVManager; every rank registers
its own pages. A request id (rid) holds a matched task from lookup_kv to retrieve_kv or
release_pending, and a store from store_kv until check_completed_stores or wait_store reports it.
"""
from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flexkv.common.config import LayerGroupSpec
from flexkv.common.debug import flexkv_logger
from flexkv.common.env import GLOBAL_CONFIG_FROM_ENV
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.common.storage import KVCacheLayout, KVCacheLayoutType
from flexkv.integration.config import FlexKVConfig
from flexkv.integration.sglang.comm import Channel, RankSync
from flexkv.integration.sglang.layers import LayerCounter
from flexkv.kvmanager import KVManager
from flexkv.server.client import KVTPClient

if TYPE_CHECKING:
    import torch

_READY_TIMEOUT_S = 600.0
_LOAD_TIMEOUT_S = 30.0
_NONE = -1


class FlexKVHostReleaseShim:
    """Stands where SGLang looks for a pinned host pool that it must release at its end."""

    def __init__(self, connector: FlexKVConnector) -> None:
        self._connector = connector

    def destroy(self) -> None:
        self._connector.shutdown()


class FlexKVConnector:
    supports_async_store_slot_mapping = False
    supports_cache_namespace = True

    def __init__(self, *, sgl_model_config: Any, server_args: Any, page_size: int, kvcache: Any,
                 tp_rank: int, dp_rank: int | None, pp_rank: int, attn_cp_rank: int,
                 pp_group: Any = None, attn_tp_group: Any = None,
                 attn_cp_group: Any = None) -> None:
        self.page_size = int(page_size)
        self.flexkv_config = FlexKVConfig.from_env()
        self.rank_info = self.flexkv_config.post_init_from_sglang_config(
            sglang_config=sgl_model_config, server_args=server_args, page_size=self.page_size,
            tp_rank=tp_rank, pp_rank=pp_rank, dp_rank=dp_rank, attn_cp_rank=attn_cp_rank)
        self.model_config = self.flexkv_config.model_config
        self.cache_config = self.flexkv_config.cache_config
        self._sync = RankSync(self.rank_info, pp_group, attn_tp_group, attn_cp_group)
        self._prefetching = self.cache_config.enable_ssd or self.cache_config.enable_remote
        self._lookups: dict[Any, int] = {}
        self._stores: dict[Any, int] = {}
        self._prefetches: dict[Any, int] = {}
        self._launched: list[int] = []      # loads in layers whose end nobody has seen, the leader's
        self.enable_layerwise = bool(GLOBAL_CONFIG_FROM_ENV.enable_layerwise_transfer)
        self.kv_manager: KVManager | None = None
        self.tp_client = KVTPClient(
            self.flexkv_config.gpu_register_port, dp_client_id=self.rank_info.dp_client_id,
            pp_rank=pp_rank, device_id=self.rank_info.local_rank,
            intra_client_id=self.rank_info.intra_client_id)
        self._register(kvcache)
        self._counter = LayerCounter(self.tp_client, int(_LOAD_TIMEOUT_S * 1000))
        self._lead(Channel.READY, self._start)
        atexit.register(self.shutdown)

    # ---- start ----

    def _register(self, kvcache: Any) -> None:
        if hasattr(kvcache, "c4_kv_pool"):
            raise NotImplementedError("KV caches of several compression rates (DeepSeek V4) are "
                                      "not supported by this build")
        if hasattr(kvcache, "kv_buffer"):
            tensors = list(kvcache.kv_buffer)
        elif hasattr(kvcache, "k_buffer"):
            tensors = [*kvcache.k_buffer, *kvcache.v_buffer]
        else:
            raise TypeError(f"a KV cache of type {type(kvcache).__name__} has neither kv_buffer "
                            "nor k_buffer and v_buffer")
        slots, heads, head_size = tensors[0].shape
        layout = KVCacheLayout(
            KVCacheLayoutType.LAYERFIRST, num_layer=self.rank_info.num_layers_per_pp_stage,
            num_block=slots // self.page_size, tokens_per_block=self.page_size, num_head=heads,
            head_size=head_size, kv_dim=self.model_config.kv_dim, num_kv_heads=heads)
        indexer = list(getattr(kvcache, "index_k_with_scale_buffer", None) or [])
        if not indexer:
            self.tp_client.register_to_server(tensors, layout)
            return
        self._note_indexer(indexer[0])
        pages, page_bytes = indexer[0].shape
        self.tp_client.register_to_server(
            tensors, layout, indexer_buffers=indexer,
            indexer_layout=KVCacheLayout(
                KVCacheLayoutType.LAYERFIRST, num_layer=len(indexer), num_block=pages,
                tokens_per_block=1, num_head=1, head_size=page_bytes, kv_dim=1))

    def _note_indexer(self, buffer: torch.Tensor) -> None:
        """Sparse attention keeps a second cache per layer: blocks with it are of another kind."""
        model, layers = self.model_config, list(range(self.model_config.num_layers))
        model.layer_groups = [
            LayerGroupSpec(len(layers), model.num_kv_heads, model.head_size, layers, model.dtype),
            LayerGroupSpec(len(layers), 1, buffer.shape[1] // self.page_size, layers,
                           buffer.dtype)]

    def _start(self) -> None:
        manager = KVManager(self.model_config, self.cache_config, self.rank_info.dp_client_id,
                            self.flexkv_config.server_recv_port,
                            self.flexkv_config.gpu_register_port)
        self.kv_manager = manager
        manager.start()
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not manager.is_ready():
            if time.monotonic() >= deadline:
                manager.shutdown()
                raise TimeoutError(f"not all of {self.model_config.workers_per_client} workers "
                                   f"have registered within {_READY_TIMEOUT_S:g} s")
            time.sleep(0.05)

    def _lead(self, channel: Channel, action: Callable[[], Any]) -> Any:
        """What the action returns on the leader, on every rank; so with what it raises."""
        outcome: tuple[bool, Any] = (True, None)
        if self._sync.is_leader:
            try:
                outcome = (True, action())
            except Exception as error:      # the others must not wait for ever
                flexkv_logger.error("%s: %s", channel.name.lower(), error)
                outcome = (False, f"{type(error).__name__}: {error}")
        succeeded, value = self._sync.share(channel, outcome)
        if not succeeded:
            raise RuntimeError(f"FlexKV, {channel.name.lower()}: {value}")
        return value

    @property
    def _manager(self) -> KVManager:
        assert self.kv_manager is not None      # only the leader comes here
        return self.kv_manager

    # ---- loading ----

    def lookup_kv(self, token_ids: Sequence[int], token_mask: Any, rid: Any = None,
                  sglang_req_id: Any = None, *, namespace: Sequence[str] | str | None = None
                  ) -> tuple[int, int]:
        """(task, tokens that can be loaded of those that the mask marks). With a rid the task
        is kept for retrieve_kv; one that it held before is let go."""
        def match() -> tuple[int, int]:
            task, mask = self._manager.get_match(np.asarray(token_ids, dtype=np.int64),
                                                 token_mask, namespace=namespace)
            return task, int(np.count_nonzero(mask))

        task, hit = self._lead(Channel.LOOKUP, match)
        if rid is not None:
            self.release_pending(rid)
        if hit and rid is not None:
            self._lookups[rid] = task
        elif self._sync.is_leader:
            self._manager.cancel(task)
        return task, hit

    def release_pending(self, rid: Any) -> None:
        task = self._lookups.pop(rid, _NONE)
        if task != _NONE and self._sync.is_leader:
            self._manager.cancel(task)

    def retrieve_kv(self, rid: Any, slot_mapping: torch.Tensor) -> int:
        """Loads what lookup_kv found. Returns how many leading slots hold it now."""
        task = self._lookups.pop(rid, _NONE)
        if task == _NONE:
            return 0

        def load() -> int:
            self._manager.launch(task, slot_mapping)
            response = self._manager.wait(task, timeout=_LOAD_TIMEOUT_S)[task]
            if response.status is KVResponseStatus.TIMEOUT:
                self._manager.cancel(task)
            mask = response.return_mask
            return 0 if mask is None else int(np.count_nonzero(mask))

        return self._lead(Channel.LOAD, load)

    def start_load_kv_layerwise(self, rid: Any, slot_mapping: torch.Tensor) -> tuple[int, int]:
        """(slots, number): begins the load; each layer of the forward pass waits for its own part, and
        raises if it does not come. What lookup_kv finds for it is in the CPU tier already."""
        if not self.enable_layerwise:
            return self.retrieve_kv(rid, slot_mapping), _NONE
        task = self._lookups.pop(rid, _NONE)
        if task == _NONE:
            return 0, _NONE

        def launch() -> int:
            try:
                self._manager.launch(task, slot_mapping, layerwise_transfer=True, counter_id=_NONE)
            except RuntimeError as error:       # nothing has begun: the engine computes it
                flexkv_logger.warning("a load in layers did not begin: %s", error)
                return 0
            self._launched.append(task)
            return self._manager.operation_of(task)

        operation = self._lead(Channel.LOAD, launch)
        if not operation:
            return 0, _NONE
        return len(slot_mapping), self._counter.begin(operation)

    def drain_launched_loads(self, threshold: int = 100) -> None:
        """Forgets loads in layers that have ended."""
        if len(self._launched) < threshold or not self._sync.is_leader:
            return
        ended = self._manager.try_wait(self._launched)
        self._launched = [task for task in self._launched if task not in ended]

    def register_layer_transfer_counter(self, kvcache: Any) -> None:
        """SGLang's pool asks it before each layer of a forward pass."""
        if self.enable_layerwise and hasattr(kvcache, "register_layer_transfer_counter"):
            kvcache.register_layer_transfer_counter(self._counter)

    # ---- storing ----

    def store_kv(self, rid: Any, token_ids: Sequence[int], kv_indices: torch.Tensor,
                 sglang_req_id: Any = None, *, namespace: Sequence[str] | str | None = None
                 ) -> int:
        """The task of a store under way, whose slots must stay until it is reported; -1: all is
        stored already."""
        if len(token_ids) != len(kv_indices):
            raise ValueError(f"store_kv: {len(token_ids)} tokens and {len(kv_indices)} slots")

        def store() -> int:
            task, mask = self._manager.put_match(np.asarray(token_ids, dtype=np.int64),
                                                 namespace=namespace)
            marked = np.flatnonzero(mask)
            if marked.size == 0:
                self._manager.cancel(task)
                return _NONE
            first = int(marked[0])
            self._manager.launch(task, kv_indices[first:first + marked.size])
            return task

        task = self._lead(Channel.STORE, store)
        if task != _NONE:
            self._stores[rid] = task
        return task

    def check_completed_stores(self) -> list[Any]:
        """The rids whose stores have ended since the last call."""
        if not self._stores:
            return []

        def ended() -> list[Any]:
            responses = self._manager.try_wait(list(self._stores.values()))
            return [rid for rid, task in self._stores.items() if task in responses]

        rids = self._lead(Channel.STORES_DONE, ended)
        for rid in rids:
            del self._stores[rid]
        return rids

    def wait_store(self, rid: Any, timeout: float = 30.0) -> bool:
        """Whether the store succeeded. On every rank it has ended when this returns."""
        task = self._stores.pop(rid, _NONE)
        if task == _NONE:
            return True

        def wait() -> bool:
            response = self._manager.wait(task, timeout=timeout)[task]
            if response.status is KVResponseStatus.TIMEOUT:
                self._manager.cancel(task)
            return response.status is KVResponseStatus.SUCCESS

        return self._lead(Channel.WAIT_STORE, wait)

    def sync_ready_store_rids(self, rids: Sequence[Any]) -> list[Any]:
        """The leader's list, on every rank."""
        return self._sync.share(Channel.READY_STORES, list(rids))

    # ---- prefetching ----

    def prefetch_async(self, rid: Any, token_ids: Sequence[int], sglang_req_id: Any = None, *,
                       candidate_start_token: int = 0,
                       namespace: Sequence[str] | str | None = None) -> int:
        """Brings known blocks from SSD to the CPU tier; -1: there is nothing to bring."""
        if not self._prefetching or not rid:
            return _NONE
        task = self._lead(Channel.PREFETCH, lambda: self._manager.prefetch_async(
            np.asarray(token_ids, dtype=np.int64), namespace=namespace))
        self.cancel_prefetch(rid)
        self._prefetches[rid] = task
        return task

    def check_prefetch_progress(self, rid: Any) -> bool:
        """Whether it has ended, or there was none."""
        task = self._prefetches.get(rid, _NONE)
        if task == _NONE:
            return True
        done = self._lead(Channel.PREFETCH_DONE, lambda: task in self._manager.try_wait(task))
        if done:
            del self._prefetches[rid]
        return done

    def cancel_prefetch(self, rid: Any) -> None:
        task = self._prefetches.pop(rid, _NONE)
        if task != _NONE and self._sync.is_leader:
            self._manager.cancel(task)

    # ---- ending ----

    def _end_everything(self) -> None:
        tasks = [*self._lookups.values(), *self._prefetches.values()]
        self._manager.cancel(tasks)
        self._manager.wait(self._launched, timeout=_LOAD_TIMEOUT_S)
        self._launched.clear()
        stores = list(self._stores.values())
        responses: dict[int, KVResponse] = self._manager.wait(stores, timeout=_LOAD_TIMEOUT_S)
        self._manager.cancel([task for task, response in responses.items()
                              if response.status is KVResponseStatus.TIMEOUT])
        self._manager.reset()

    def reset(self) -> None:
        """SGLang flushes its cache, among others when the model's weights change: nothing stored
        so far may be used again, in any tier."""
        self._lead(Channel.RESET, self._end_everything)
        self._lookups.clear()
        self._stores.clear()
        self._prefetches.clear()
        self._counter.reset()

    def shutdown(self) -> None:
        """Any number of times."""
        atexit.unregister(self.shutdown)
        self.tp_client.close()
        manager, self.kv_manager = self.kv_manager, None
        if manager is not None:
            manager.shutdown()
