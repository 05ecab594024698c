"""KVTPClient: a worker's memory. KVDPClient: a scheduler at a daemon.

A KVTPClient makes an agent: a thread of the library in the worker's process that finds the node,
registers the KV cache tensors' pages there, and copies when the node says so.
"""
from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flexkv
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.debug import flexkv_logger
from flexkv.common.env import GLOBAL_CONFIG_FROM_ENV
from flexkv.common.memory_handle import hold_storage, release_storage, share_before_registration
from flexkv.common.node_config import node_config
from flexkv.common.rank import noted_rank, replicas
from flexkv.common.storage import KVCacheLayout
from flexkv.kvtask import TaskEngine, instance_name, node_address
from flexkv.server.regions import group_regions, layered_regions
from flexkv.transfer.layerwise import forget_socket_path, worker_socket_path

_TASK_IDS_PER_CLIENT = 10_000_000
_CONNECT_RETRY_S = 0.05
_ADDRESS_IN_USE = 3             # exit status of `flexkv serve`: another daemon answers there


_registered: set[KVTPClient] = set()    # they live until close(), whoever lets go of them


class KVTPClient:
    """One worker of a replica. The memory must stay valid until close(), or the process's end."""

    def __init__(self, gpu_register_port: str, dp_client_id: int = 0,
                 device_id: int | None = None, pp_rank: int = 0,
                 intra_client_id: int | None = None) -> None:
        self.gpu_register_port = gpu_register_port
        self.address = node_address(gpu_register_port)
        self.dp_client_id = dp_client_id
        self.pp_rank = pp_rank
        self.device_id = 0 if device_id is None else device_id
        self._rank = noted_rank(dp_client_id)
        self.intra_client_id = self._worker(intra_client_id)
        self.agent: flexkv.Agent | None = None
        self._held: list[int] = []
        self._tensors: list[Any] = []

    def _worker(self, intra_client_id: int | None) -> int:
        """The worker's number within its replica. Older callers give only the device."""
        if intra_client_id is not None:
            return intra_client_id
        if self._rank is not None:
            return self._rank.intra_client_id
        if self.dp_client_id and self.device_id:
            raise ValueError(
                f"intra_client_id is missing: device {self.device_id} alone does not tell which "
                f"worker of replica {self.dp_client_id} this is")
        return self.device_id

    def _slice(self) -> dict[str, int]:
        """Which part of a block this worker holds; see replicas(). Where nobody has told this
        process, the node goes by what the scheduler says."""
        if self._rank is None:
            return {"replicas": 0}
        shared_by = replicas(self._rank.model_config, self._rank)
        return {"slice": self.intra_client_id // shared_by,
                "replica": self.intra_client_id % shared_by, "replicas": shared_by}

    def register_to_server(self, kv_caches: Sequence[Any] | Mapping[str, Any],
                           kv_layout: KVCacheLayout, override_device_id: int | None = None,
                           layer_groups: Sequence[Any] | None = None,
                           gpu_layouts: Sequence[KVCacheLayout] | None = None,
                           handles_per_group: Sequence[Sequence[Any]] | None = None,
                           swa_caches: Sequence[Any] | None = None,
                           swa_layout: KVCacheLayout | None = None,
                           swa_layer_groups: Sequence[Any] | None = None,
                           swa_gpu_layouts: Sequence[KVCacheLayout] | None = None,
                           swa_handles_per_group: Sequence[Sequence[Any]] | None = None,
                           resume: bool = False, *,
                           indexer_buffers: Sequence[Any] | None = None,
                           indexer_layout: KVCacheLayout | None = None) -> None:
        """Returns at once; the node may start later, go and come back. Registering again takes the
        place of what was registered before."""
        if swa_caches or swa_handles_per_group:
            raise NotImplementedError("swa_caches: sliding-window side pools are not supported by "
                                      "this build")
        groups = self._groups(kv_caches, kv_layout, gpu_layouts, handles_per_group,
                              indexer_buffers, indexer_layout)
        tensors = [tensor for group, _ in groups for tensor in group]
        for tensor in tensors:
            if tensor.device.type == "cpu":
                share_before_registration(tensor)
            elif tensor.device.type != "cuda":
                raise NotImplementedError(
                    f"the KV cache is on {tensor.device}: host memory and CUDA devices can be copied")
        layers: dict[str, Any] = {}
        if GLOBAL_CONFIG_FROM_ENV.enable_layerwise_transfer:
            regions, layers["layers"] = layered_regions(groups)
        else:
            regions = group_regions(groups)
        self.close()
        self._tensors = tensors
        self._held = [hold_storage(tensor) for tensor in tensors]
        self.agent = flexkv.Agent(self.address, regions,
                                  instance=instance_name(self.dp_client_id),
                                  worker=self.intra_client_id, **self._slice(), **layers)
        if layers:
            self.agent.serve_layers("ipc://" + worker_socket_path(
                self.dp_client_id, self.pp_rank, self.intra_client_id))
        _registered.add(self)
        flexkv_logger.info(
            "worker %d of replica %d: %d tensors, %d pages of %d bytes, node at %s",
            self.intra_client_id, self.dp_client_id, len(tensors), regions[0][3],
            sum(region[2] for region in regions), self.address)

    @staticmethod
    def _groups(kv_caches: Sequence[Any] | Mapping[str, Any], kv_layout: KVCacheLayout,
                gpu_layouts: Sequence[KVCacheLayout] | None,
                handles_per_group: Sequence[Sequence[Any]] | None,
                indexer_buffers: Sequence[Any] | None,
                indexer_layout: KVCacheLayout | None) -> list[tuple[list[Any], KVCacheLayout]]:
        """Tensors with their layouts, in the order of the layer groups."""
        if handles_per_group is not None:
            if gpu_layouts is None or len(gpu_layouts) != len(handles_per_group):
                raise ValueError(f"{len(handles_per_group)} handles_per_group need as many "
                                 f"gpu_layouts, not {len(gpu_layouts or ())}")
            return [(list(tensors), layout)
                    for tensors, layout in zip(handles_per_group, gpu_layouts)]
        if isinstance(kv_caches, Mapping):
            kv_caches = list(kv_caches.values())
        if not isinstance(kv_caches, Sequence):
            kv_caches = [kv_caches]
        groups = [(list(kv_caches), kv_layout)]
        if indexer_buffers:
            if indexer_layout is None:
                raise ValueError("indexer_buffers need an indexer_layout")
            groups.append((list(indexer_buffers), indexer_layout))
        return groups

    def suspend_gpu_mappings(self) -> int:
        """Before the engine gives its memory back for a while: no copy touches it afterwards.
        register_to_server(resume=True) follows. Returns how many tensors were registered."""
        suspended = len(self._held)
        self.close()
        return suspended

    def wait_layer(self, operations: Sequence[int], layer: int, timeout_ms: int) -> int:
        """For gets in layers: what the caller's CUDA stream does from now on sees the layer's pages of
        these operations; of pages in host memory, the caller. 0 or -errno."""
        agent = self.agent
        if agent is None:
            return -errno.ENOTCONN
        stream = 0
        if self._tensors[0].device.type == "cuda":
            import torch
            stream = torch.cuda.current_stream(self._tensors[0].device).cuda_stream
        return agent.wait_layer(operations, layer, stream, timeout_ms)

    def set_slot_mapping(self, task_id: int, slot_mapping: Any) -> None:
        raise NotImplementedError("set_slot_mapping: pipeline stages on several machines are not "
                                  "supported by this build")

    def close(self) -> None:
        """Ends the agent; waits for a copy under way to stop."""
        _registered.discard(self)
        agent, self.agent = self.agent, None
        if agent is not None:
            forget_socket_path(self.dp_client_id, self.pp_rank)
            agent.close()
        for address in self._held:
            release_storage(address)
        self._held, self._tensors = [], []


class KVDPClient(TaskEngine):
    """A scheduler whose node is served by a daemon, shared with other replicas and engines."""

    def __init__(self, server_recv_port: str, model_config: ModelConfig, dp_client_id: int,
                 cache_config: CacheConfig | None = None,
                 daemon: subprocess.Popen[bytes] | None = None) -> None:
        super().__init__(model_config, cache_config or CacheConfig(), dp_client_id,
                         dp_client_id * _TASK_IDS_PER_CLIENT)
        self.address = server_recv_port
        self._daemon = daemon           # that this process started, if it did
        self._daemon_is_ours = False

    def start_server_and_register(self) -> None:
        self.start()

    def _open_node(self) -> Any:
        """The daemon may be about to start, by another process too."""
        config = node_config({})
        timeout_ms = int(config.get("worker_timeout_ms"))
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            try:
                node = flexkv.Node.connect(self.address, config)
                break
            except flexkv.Error as error:
                if error.errno not in (errno.ECONNREFUSED, errno.ENOENT, errno.ETIMEDOUT):
                    raise
                self._check_daemon()
                if time.monotonic() >= deadline:
                    raise TimeoutError(
                        f"no daemon answers at {self.address} (option server_recv_port) for "
                        f"{timeout_ms / 1000:g} s (worker_timeout_ms): {error}") from error
            time.sleep(_CONNECT_RETRY_S)
        self._daemon_is_ours = self._daemon is not None and self._daemon.poll() is None
        return node

    def _check_daemon(self) -> None:
        status = self._daemon.poll() if self._daemon is not None else None
        if status not in (None, _ADDRESS_IN_USE):
            raise RuntimeError(f"the daemon for {self.address} ended at its start with status "
                               f"{status}; the log above says why")

    def _starts_cold(self) -> bool:
        if not self._daemon_is_ours or not self.cache_config.enable_ssd:
            return False
        return not self.model_config.model_id

    def reset(self) -> None:
        self.reset_cache()

    def unregister(self) -> None:
        """Leaves the daemon to the others."""
        self.shutdown()
