"""The model's geometry and the place of a process in it."""
from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from flexkv.common.dtypes import dtype_bytes, named_dtype


@dataclass
class LayerGroupSpec:
    """Layers whose KV has one shape. A layer may be in several groups: one per cache it has."""
    num_layers: int
    num_kv_heads: int            # on one rank
    head_size: int
    layer_indices: list[int]     # which of the model's layers these are
    dtype: Any = None            # None: the model's
    compress_ratio: int = 1      # tokens_per_block / compress_ratio entries are kept per block


def _default_dtype() -> Any:
    return named_dtype("bfloat16")


@dataclass
class ModelConfig:
    num_layers: int = 1
    num_kv_heads: int = 1        # of the whole model; 1: all ranks hold the same KV
    head_size: int = 1
    kv_dim: int = 2              # 2: K and V; 1: one combined buffer (MLA, packed)
    dtype: Any = field(default_factory=_default_dtype)

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    enable_dp_attention: bool = False
    attn_cp_size: int = 1        # the same as cp_size; engines name either
    cp_size: int = 1

    nnodes: int = 1
    master_host: str = "localhost"
    master_ports: tuple[str, str, str] = ("5556", "5557", "5558")
    use_trtllm_subprocess: bool = False
    trtllm_subprocess_host: str = "localhost"
    trtllm_subprocess_ports: tuple[str, str, str] = ("6667", "6668", "6669")

    instance_num: int = 1
    layer_groups: list[LayerGroupSpec] | None = None

    # Names the weights. Blocks on SSD outlive a restart only if it is given: geometry alone
    # does not tell two models apart.
    model_id: str = ""

    _frozen: bool = field(default=False, init=False, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        # Groups may be found late, when the engine has made its pools.
        if getattr(self, "_frozen", False) and name != "layer_groups":
            raise AttributeError(f"ModelConfig is frozen: {name} can't be changed any more, "
                                 "set it before freeze()")
        object.__setattr__(self, name, value)

    def freeze(self) -> None:
        """Checks the topology; no field but layer_groups can be changed afterwards."""
        if self.cp_size == 1:
            self.cp_size = self.attn_cp_size
        elif self.attn_cp_size == 1:
            self.attn_cp_size = self.cp_size
        if self.cp_size != self.attn_cp_size:
            raise ValueError(f"cp_size {self.cp_size} and attn_cp_size {self.attn_cp_size} "
                             "disagree; they are two names of one thing")
        if self.total_gpus % self.nnodes:
            raise ValueError(f"{self.total_gpus} ranks can't be divided among "
                             f"nnodes {self.nnodes}")
        if self.instance_num < 1:
            raise ValueError(f"instance_num must be at least 1, not {self.instance_num}")
        self._check_layer_groups()
        object.__setattr__(self, "_frozen", True)

    def _check_layer_groups(self) -> None:
        for i, group in enumerate(self.layer_groups or ()):
            where = f"layer_groups[{i}]"
            if group.num_layers != len(group.layer_indices):
                raise ValueError(f"{where}: num_layers is {group.num_layers}, but there are "
                                 f"{len(group.layer_indices)} layer_indices")
            if len(set(group.layer_indices)) != len(group.layer_indices):
                raise ValueError(f"{where}.layer_indices has duplicates: {group.layer_indices}")
            if group.compress_ratio < 1:
                raise ValueError(f"{where}.compress_ratio must be at least 1, "
                                 f"not {group.compress_ratio}")
            for layer in group.layer_indices:
                if not 0 <= layer < self.num_layers:
                    raise ValueError(f"{where}: layer index {layer} is out of range, the model "
                                     f"has {self.num_layers} layers")

    @property
    def use_mla(self) -> bool:
        return self.kv_dim == 1

    @property
    def total_gpus(self) -> int:
        """Workers of one instance, all its data-parallel replicas together."""
        return self.dp_size * self.tp_size * self.cp_size * self.pp_size

    @property
    def total_clients(self) -> int:
        return self.instance_num * self.dp_size

    @property
    def gpus_per_node(self) -> int:
        return self.total_gpus // self.nnodes

    @property
    def nnodes_per_pp_rank(self) -> int:
        return max(self.nnodes // self.pp_size, 1)

    @property
    def nnodes_per_tp_group(self) -> int:
        return self.nnodes_per_pp_rank

    @property
    def tp_size_per_node(self) -> int:
        return max(1, self.tp_size // self.nnodes_per_pp_rank)

    @property
    def cp_size_per_node(self) -> int:
        return max(1, self.cp_size // self.nnodes_per_pp_rank)

    @property
    def attn_dp_size(self) -> int:
        return max(1, self.dp_size) if self.enable_dp_attention else 1

    @property
    def attn_tp_size(self) -> int:
        return max(1, self.tp_size)

    @property
    def attn_tp_size_per_node(self) -> int:
        return self.tp_size_per_node

    @property
    def attn_cp_size_per_node(self) -> int:
        return self.cp_size_per_node

    @property
    def effective_tp_size(self) -> int:
        """Workers of one pipeline stage of one replica."""
        return max(1, self.tp_size) * max(1, self.cp_size)

    @property
    def effective_tp_size_per_node(self) -> int:
        return self.tp_size_per_node * self.cp_size_per_node

    @property
    def workers_per_client(self) -> int:
        """Workers of one replica: those that hold a share of each of its blocks."""
        return self.effective_tp_size * max(1, self.pp_size)

    @property
    def num_kv_heads_per_node(self) -> int:
        if self.num_kv_heads == 1:
            return 1
        return self.num_kv_heads * self.tp_size_per_node // max(1, self.tp_size)

    @property
    def bytes_per_token_per_layer(self) -> int:
        return self.num_kv_heads * self.head_size * self.kv_dim * dtype_bytes(self.dtype)

    @property
    def token_size_in_bytes(self) -> int:
        """A token's KV, all layers and ranks."""
        if not self.layer_groups:
            return self.num_layers * self.bytes_per_token_per_layer
        return self.tp_size * sum(
            group.num_layers * group.num_kv_heads * group.head_size * self.kv_dim
            * dtype_bytes(group.dtype or self.dtype) // group.compress_ratio
            for group in self.layer_groups)

    def __str__(self) -> str:
        groups = f", layer_groups={len(self.layer_groups)}" if self.layer_groups else ""
        return (f"ModelConfig(num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, "
                f"head_size={self.head_size}, kv_dim={self.kv_dim}, dtype={self.dtype}, "
                f"tp_size={self.tp_size}, pp_size={self.pp_size}, dp_size={self.dp_size}, "
                f"cp_size={self.cp_size}, nnodes={self.nnodes}, "
                f"instance_num={self.instance_num}{groups})")


def _accept_use_mla(cls: type) -> type:
    """Older callers construct with use_mla=; it is only another way to say kv_dim."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, use_mla: bool | None = None, **kwargs: Any) -> None:
        if use_mla is not None:
            if kwargs.setdefault("kv_dim", 1 if use_mla else 2) != (1 if use_mla else 2):
                raise ValueError(f"use_mla={use_mla} and kv_dim={kwargs['kv_dim']} "
                                 "contradict each other")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


_accept_use_mla(ModelConfig)


@dataclass(frozen=True)
class RankInfo:
    """Which worker this process is."""
    model_config: ModelConfig
    tp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    cp_rank: int = 0
    attn_cp_rank: int = 0        # the same as cp_rank
    node_rank: int = 0
    instance_id: int = 0
    pp_start_layer: int = 0
    pp_end_layer: int = -1       # -1: the model's last
    local_rank: int = -1         # the device; -1: follows from the other ranks

    def __post_init__(self) -> None:
        cp_rank = self.cp_rank or self.attn_cp_rank
        if self.attn_cp_rank not in (0, cp_rank):
            raise ValueError(f"cp_rank {self.cp_rank} and attn_cp_rank {self.attn_cp_rank} "
                             "disagree; they are two names of one thing")
        object.__setattr__(self, "cp_rank", cp_rank)
        object.__setattr__(self, "attn_cp_rank", cp_rank)
        if self.local_rank < 0:
            object.__setattr__(self, "local_rank", self._device_on_node())

    def _device_on_node(self) -> int:
        model = self.model_config
        stage = self.pp_rank_per_node
        if not model.enable_dp_attention:
            stage += self.dp_rank_per_node * self.pp_size_per_node
        return (stage * model.effective_tp_size_per_node
                + self.cp_rank * model.tp_size_per_node + self.tp_rank_per_node)

    @property
    def tp_rank_per_node(self) -> int:
        return self.tp_rank % self.model_config.tp_size_per_node

    @property
    def dp_client_id(self) -> int:
        """The replica's number among those of all instances."""
        return self.instance_id * self.model_config.dp_size + self.dp_rank

    @property
    def attn_tp_rank(self) -> int:
        return self.tp_rank

    @property
    def effective_tp_rank(self) -> int:
        return self.cp_rank * max(1, self.model_config.tp_size) + self.tp_rank

    @property
    def intra_client_id(self) -> int:
        """The worker's number within its replica."""
        return self.pp_rank * self.model_config.effective_tp_size + self.effective_tp_rank

    @property
    def pp_size_per_node(self) -> int:
        return max(self.model_config.pp_size // self.model_config.nnodes, 1)

    @property
    def pp_rank_per_node(self) -> int:
        return self.pp_rank % self.pp_size_per_node

    @property
    def dp_size_per_node(self) -> int:
        model = self.model_config
        return max(1, model.gpus_per_node
                   // (self.pp_size_per_node * model.effective_tp_size_per_node))

    @property
    def dp_rank_per_node(self) -> int:
        return self.dp_rank % self.dp_size_per_node

    @property
    def num_layers_per_pp_stage(self) -> int:
        end = self.pp_end_layer if self.pp_end_layer >= 0 else self.model_config.num_layers
        return end - self.pp_start_layer

    @property
    def token_size_in_bytes_per_pp_stage(self) -> int:
        return self.num_layers_per_pp_stage * self.model_config.bytes_per_token_per_layer

    def __str__(self) -> str:
        return (f"RankInfo(tp_rank={self.tp_rank}, pp_rank={self.pp_rank}, "
                f"dp_rank={self.dp_rank}, cp_rank={self.cp_rank}, node_rank={self.node_rank}, "
                f"instance_id={self.instance_id}, local_rank={self.local_rank}, "
                f"worker={self.intra_client_id})")
