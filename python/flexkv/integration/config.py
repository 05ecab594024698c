"""FlexKVConfig: everything an adapter needs, from the engine's own configuration objects."""
from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from flexkv.common.config import (
    GLOBAL_CONFIG_FROM_ENV,
    CacheConfig,
    ModelConfig,
    RankInfo,
    UserConfig,
    load_user_config_from_env,
    load_user_config_from_file,
    update_default_config_from_user_config,
)
from flexkv.common.debug import flexkv_logger
from flexkv.common.dtypes import dtype_bytes, dtype_name, named_dtype
from flexkv.common.env import env_value, parse_bool
from flexkv.common.rank import note_rank


@dataclass
class FlexKVConfig:
    enable_flexkv: bool = True
    server_recv_port: str = ""
    gpu_register_port: str = ""
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    model_config: ModelConfig = field(default_factory=ModelConfig)
    user_config: UserConfig = field(default_factory=UserConfig)

    def __post_init__(self) -> None:
        self.server_recv_port = self.server_recv_port or GLOBAL_CONFIG_FROM_ENV.server_recv_port
        self.gpu_register_port = self.gpu_register_port or self.server_recv_port + "_gpu_register"

    @classmethod
    def from_env(cls) -> FlexKVConfig:
        """From the file that FLEXKV_CONFIG_PATH names, else from the environment."""
        path = os.environ.get("FLEXKV_CONFIG_PATH")
        user_config = load_user_config_from_file(path) if path else load_user_config_from_env()
        return cls(enable_flexkv=env_value("ENABLE_FLEXKV", parse_bool, True),
                   user_config=user_config)

    def _resolve_dtype(self, engine_dtype: Any, model_dtype: Any) -> None:
        """kv_cache_dtype of the user, else the engine's unless it is "auto", else the model's."""
        given = (self.user_config.kv_cache_dtype, engine_dtype, model_dtype)
        name = dtype_name(next(d for d in given if d is not None and d != "auto"))
        # Engines have more kinds of 8-bit caches than torch has types. The kind as it is called
        # tells their blocks apart.
        self.model_config.model_id += f" kv={name}"
        self.model_config.dtype = named_dtype("fp8" if name.startswith("fp8") else name)

    def _common_model_config(self) -> None:
        model = self.model_config
        model.instance_num = int(GLOBAL_CONFIG_FROM_ENV.instance_num)
        model.master_host = os.environ.get("FLEXKV_MASTER_HOST", "localhost")
        ports = os.environ.get("FLEXKV_MASTER_PORTS", "5556,5557,5558").split(",")
        model.master_ports = tuple(ports)       # type: ignore[assignment]

    def _finish(self, rank_info: RankInfo) -> RankInfo:
        update_default_config_from_user_config(rank_info, self.cache_config, self.user_config)
        # The file may have named another address.
        self.server_recv_port = GLOBAL_CONFIG_FROM_ENV.server_recv_port
        self.gpu_register_port = self.server_recv_port + "_gpu_register"
        self.model_config.freeze()
        note_rank(rank_info)
        flexkv_logger.info("%s, %s", self.model_config, rank_info)
        return rank_info

    # ---- vLLM ----

    def post_init_from_vllm_config(self, vllm_config: Any) -> RankInfo:
        parallel, engine_model = vllm_config.parallel_config, vllm_config.model_config
        model = self.model_config
        self.cache_config.tokens_per_block = vllm_config.cache_config.block_size
        model.model_id = str(getattr(engine_model, "model", "") or "")
        model.num_layers = engine_model.get_num_layers(parallel)
        engine_dtype = getattr(vllm_config.cache_config, "cache_dtype", "auto")
        self._resolve_dtype(engine_dtype if isinstance(engine_dtype, str) else None,
                            getattr(engine_model, "dtype", "bfloat16"))
        model.tp_size = int(parallel.tensor_parallel_size)
        model.pp_size = int(parallel.pipeline_parallel_size)
        model.dp_size = int(parallel.data_parallel_size)
        model.cp_size = model.attn_cp_size = max(
            1, int(getattr(parallel, "context_parallel_size", 1)))
        model.nnodes = max(1, int(getattr(parallel, "nnodes", 1)))
        self._vllm_cache_shape(vllm_config, engine_dtype)
        self._common_model_config()
        pp_rank = int(getattr(parallel, "pipeline_parallel_rank", 0))
        start, end = 0, model.num_layers
        if model.pp_size > 1:
            from vllm.distributed.utils import get_pp_indices
            start, end = get_pp_indices(model.num_layers, pp_rank, model.pp_size)
        return self._finish(RankInfo(
            model_config=model, pp_rank=pp_rank, pp_start_layer=start, pp_end_layer=end,
            tp_rank=int(getattr(parallel, "tensor_parallel_rank", 0)),
            dp_rank=int(getattr(parallel, "data_parallel_rank", 0)),
            node_rank=int(getattr(parallel, "node_rank", 0)),
            instance_id=int(GLOBAL_CONFIG_FROM_ENV.instance_id),
            local_rank=int(os.environ.get("LOCAL_RANK", -1))))

    def _vllm_cache_shape(self, vllm_config: Any, engine_dtype: str) -> None:
        """kv_dim, heads and head size as the attention backend lays out one rank's cache."""
        from vllm.config import set_current_vllm_config
        from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backend
        engine_model, parallel = vllm_config.model_config, vllm_config.parallel_config
        with set_current_vllm_config(vllm_config):
            shape = get_current_attn_backend(vllm_config).get_kv_cache_shape(
                1, self.cache_config.tokens_per_block, engine_model.get_num_kv_heads(parallel),
                engine_model.get_head_size(), engine_dtype)
        model = self.model_config
        if len(shape) == 3:             # B T D: one latent, the same on all ranks
            model.kv_dim, model.num_kv_heads, model.head_size = 1, 1, shape[2]
        elif len(shape) == 4:           # B H T 2D: K and V of a head side by side
            model.kv_dim, model.num_kv_heads, model.head_size = 1, shape[1], shape[3]
        elif len(shape) == 5 and 2 in shape[:2]:
            model.kv_dim, model.num_kv_heads, model.head_size = 2, shape[3], shape[4]
        else:
            raise ValueError(f"the attention backend's KV cache shape {tuple(shape)} is not one "
                             "of B T D, B H T 2D, 2 B T H D, B 2 T H D")
        if len(shape) > 3:
            model.num_kv_heads *= model.tp_size

    # ---- SGLang ----

    def post_init_from_sglang_config(self, sglang_config: Any, server_args: Any,
                                     page_size: int = 64, tp_rank: int = 0, pp_rank: int = 0,
                                     dp_rank: int | None = 0,
                                     attn_cp_rank: int | None = 0) -> RankInfo:
        model = self.model_config
        self.cache_config.tokens_per_block = page_size
        model.model_id = str(getattr(server_args, "model_path", "") or "")
        model.num_layers = int(sglang_config.num_hidden_layers)
        model.enable_dp_attention = bool(server_args.enable_dp_attention)
        model.dp_size = int(server_args.dp_size or 1)
        model.cp_size = model.attn_cp_size = int(getattr(server_args, "attn_cp_size", 1) or 1)
        # SGLang's tp_size counts all ranks of a stage; data and context parallel ranks share it.
        model.tp_size = max(1, int(server_args.tp_size) // (model.attn_dp_size * model.cp_size))
        model.pp_size = int(server_args.pp_size)
        model.nnodes = max(1, int(server_args.nnodes))
        self._resolve_dtype(getattr(server_args, "kv_cache_dtype", None),
                            getattr(sglang_config, "dtype", "bfloat16"))
        self._sglang_cache_shape(sglang_config, int(server_args.tp_size))
        self._common_model_config()
        master = getattr(server_args, "dist_init_addr", None)
        if master and model.nnodes > 1:
            model.master_host = master.split(":")[0]
        start, end = 0, model.num_layers
        if model.pp_size > 1:
            from sglang.srt.distributed.utils import get_pp_indices
            start, end = get_pp_indices(model.num_layers, pp_rank, model.pp_size)
        return self._finish(RankInfo(
            model_config=model, tp_rank=int(tp_rank) % model.tp_size, pp_rank=pp_rank,
            dp_rank=int(dp_rank or 0), cp_rank=int(attn_cp_rank or 0),
            node_rank=int(server_args.node_rank),
            instance_id=int(GLOBAL_CONFIG_FROM_ENV.instance_id),
            pp_start_layer=start, pp_end_layer=end, local_rank=_current_device()))

    def _sglang_cache_shape(self, config: Any, tp_size: int) -> None:
        model = self.model_config
        if hasattr(config, "qk_nope_head_dim"):     # one latent buffer, the same on all ranks
            latent = int(getattr(config, "kv_lora_rank", 0) or 0)
            rope = int(getattr(config, "qk_rope_head_dim", 0) or 0)
            model.kv_dim, model.num_kv_heads = 1, 1
            model.head_size = (latent or int(config.qk_nope_head_dim)) + rope
            indexed = getattr(config, "index_head_dim", None) is not None
            if indexed and dtype_name(model.dtype) == "float8_e4m3fn":
                if latent % 128:
                    raise ValueError(f"kv_lora_rank {latent} is not a multiple of 128, which "
                                     "the fp8 layout of sparse attention needs")
                # Each 128 values carry a 4-byte scale; the rotary part stays in bfloat16.
                model.head_size = latent + latent // 128 * 4 + rope * dtype_bytes("bfloat16")
            return
        model.kv_dim = 2
        model.head_size = int(config.head_dim)
        if hasattr(config, "get_total_num_kv_heads"):
            model.num_kv_heads = int(config.get_total_num_kv_heads())
        elif hasattr(config, "get_num_kv_heads"):
            model.num_kv_heads = int(config.get_num_kv_heads(tp_size)) * tp_size
        else:
            model.num_kv_heads = int(config.num_key_value_heads)


def _current_device() -> int:
    """The GPU that the engine has chosen for this process; -1 without one."""
    import torch
    return torch.cuda.current_device() if torch.cuda.is_available() else -1
