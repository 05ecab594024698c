"""A worker's side of both connectors: registers its KV pages with an agent for each group, stops
agents when the engine is about to use pages again, and reports failed loads.

The agent is a thread of the library's. It copies when the node says so; nothing here is on its way.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from flexkv._flexkv import Agent

from . import identity, versions
from .geometry import Region, group_regions, layer_order
from .groups import Group, groups_of
from .layers import LayerLoads, not_loaded, stream_of
from .protocol import FailedLoad, StepMetadata, StepStats
from .settings import Settings

logger = logging.getLogger("vllm.flexkv")

FENCE_MS = 5000
FENCE_TRIES = 4


class WorkerSide:
    def __init__(self, vllm_config: Any, kv_cache_config: Any | None, settings: Settings) -> None:
        self._config = vllm_config
        self._settings = settings
        self._groups = groups_of(vllm_config, kv_cache_config)
        self._identity = identity.engine_identity(vllm_config)
        self._agents: list[Agent] = []
        self._layers: LayerLoads | None = None
        self._stream: Callable[[], int] = lambda: 0
        self._fenced = 0                        # the step that was last
        self._failed: list[FailedLoad] = []     # not yet reported
        self._bad_blocks: set[int] = set()

    def register(self, kv_caches: dict[str, Any], num_blocks: int) -> None:
        self.shutdown()
        for group in self._groups:
            layers = {n: kv_caches[n] for n in group.layers or kv_caches if n in kv_caches}
            if not layers:
                raise RuntimeError(f"FlexKV: this worker has no layer of KV cache group "
                                   f"{group.index}; with pipeline parallelism each stage must "
                                   "have some")
            regions, counts = group_regions(layers, num_blocks)
            self._agents.append(self._agent(group, regions, counts))
            names = layer_order(layers)
            self._stream = stream_of(layers[names[0]])
            # With several groups there are no such loads.
            if self._settings.layerwise and len(self._groups) == 1:
                self._layers = LayerLoads(self._agents[0], names, self._stream,
                                          self._settings.op_timeout)

    def _agent(self, group: Group, regions: list[Region], counts: list[int]) -> Agent:
        """counts: regions of each layer."""
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group
        tp, pp = get_tp_group(), get_pp_group()
        replicas = identity.kv_replicas(self._config)
        of = len(self._groups)
        name = identity.space_name(self._config, group, of,
                                   identity.group_identity(self._identity, group, of))
        worker = pp.rank_in_group * tp.world_size + tp.rank_in_group
        logger.info("FlexKV: space %s: worker %d registers %d regions, %d bytes in a block, at %s",
                    name, worker, len(regions), sum(r[2] for r in regions),
                    self._settings.address)
        layers = {"layers": counts} if self._settings.layerwise else {}
        return Agent(
            self._settings.address, regions, space=name, **layers,
            instance=str(self._config.kv_transfer_config.engine_id), worker=worker,
            slice=pp.rank_in_group * (tp.world_size // replicas) + tp.rank_in_group // replicas,
            replica=tp.rank_in_group % replicas, replicas=replicas)

    # ---- steps ---------------------------------------------------------------------------------

    def fence(self, metadata: StepMetadata | None) -> None:
        """Before the step writes anything: what was preempted must not be read any more, and what
        is still being loaded is there first."""
        if metadata is None:
            return
        self._fenced = metadata.step
        self._await(metadata)
        if metadata.fence:
            self._stop(metadata.fence)

    def begin_step(self, metadata: StepMetadata | None, forward_context: Any) -> None:
        """Before the step computes, or after it if it has no loads of its own."""
        if self._layers is not None and metadata is not None and metadata.loads:
            self._layers.begin(metadata.loads, versions.calls_layer_hooks(forward_context))

    def _await(self, metadata: StepMetadata | None) -> None:
        """What is computed from now on comes after the loads that are on their way. The host does
        not wait. What fails here has failed for the engine too: its device."""
        if metadata is not None and metadata.arriving:
            ops, metadata.arriving = metadata.arriving, []
            for agent in self._agents:
                agent.wait_loaded(ops, self._stream())

    def wait_layer(self, name: str) -> None:
        if self._layers is not None and self._layers.active:
            self._layers.wait(name)

    def finish_step(self, metadata: StepMetadata | None) -> tuple[set[str], set[str]]:
        """Requests whose loads have failed, and among these those that failed as a whole. Blocks
        without their bytes are to be had from take_bad_blocks in the same step."""
        self._await(metadata)           # of a step that was not fenced, and computed nothing
        waiting, self._failed = self._failed, []
        if metadata is not None:
            waiting += metadata.failed
            if metadata.loads:
                waiting += (self._layers.finish() if self._layers is not None
                            else map(not_loaded, metadata.loads))
        ended: set[str] = set()
        whole: set[str] = set()
        for load in waiting:
            if not load.waiting:
                self._stop(load.ops)        # computed on already: the engine must hear of it now
            elif self._revoke(load.ops):
                ended.add(load.request_id)
            else:
                self._failed.append(load)       # the engine must not use the blocks yet
                continue
            if load.whole:
                whole.add(load.request_id)
            else:
                self._bad_blocks.update(load.blocks)
        return ended, whole

    def _stop(self, ops: list[int]) -> None:
        for _ in range(FENCE_TRIES):
            if self._revoke(ops):
                return
        # Without agents the node takes their copies for failed, so nothing wrong is stored.
        logger.error("FlexKV: a copy did not stop in %d s; this worker's agents are closed, "
                     "nothing is cached any more", FENCE_TRIES * FENCE_MS // 1000)
        self.shutdown()

    def _revoke(self, ops: Iterable[int]) -> bool:
        ops = list(ops)
        return all([agent.revoke(ops, FENCE_MS) for agent in self._agents])

    def take_bad_blocks(self) -> set[int]:
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def stats(self, metadata: StepMetadata | None) -> StepStats:
        step = metadata.step if metadata is not None else 0
        return StepStats(step=step, fenced=step == self._fenced)

    def shutdown(self) -> None:
        agents, self._agents, self._layers = self._agents, [], None
        for agent in agents:
            agent.close()
