"""What KV bytes depend on, as text that is hashed: two engines share blocks only if all of it is
equal, and a store on disk is bound to it.

The scheduler's and the workers' processes each compute this and must agree, since the workers
look for a space by a name that is made of it. So it uses nothing that only one of them knows, or
that loading the model changes.
"""
from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import secrets
from importlib import metadata
from pathlib import Path
from typing import Any

from .groups import Group
from .versions import vllm_version

REGION_ORDER = 1        # raised when geometry.py puts the bytes of a block in another order
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
HEAD_BYTES, TAIL_BYTES, PROBES, PROBE_BYTES = 1 << 20, 64 << 10, 64, 4 << 10


def engine_identity(vllm_config: Any) -> dict[str, Any]:
    model, cache, parallel = (vllm_config.model_config, vllm_config.cache_config,
                              vllm_config.parallel_config)
    return {
        "regions": REGION_ORDER,
        "model": _model(model, vllm_config.load_config),
        "draft": _draft(getattr(vllm_config, "speculative_config", None), vllm_config.load_config),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_dtype": str(cache.cache_dtype),
        "kv_skip_layers": sorted(map(str, getattr(cache, "kv_cache_dtype_skip_layers", ()))),
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "pp_layers": os.environ.get("VLLM_PP_LAYER_PARTITION", ""),
        "replicas": kv_replicas(vllm_config),
        "layout": _layout(vllm_config),
        "hashes": hash_scheme(vllm_config)[0],
    }


def group_identity(engine: dict[str, Any], group: Group, of: int) -> bytes:
    """The fingerprint of a group's space."""
    parts = dict(engine, group=[group.index, of, group.kind, group.block_size, group.reach])
    return json.dumps(parts, sort_keys=True, default=str, separators=(",", ":")).encode()


def space_name(vllm_config: Any, group: Group, of: int, fingerprint: bytes) -> str:
    """At most 63 characters: the model's name, as far as it fits, and what tells spaces apart."""
    end = "-" + hashlib.sha256(fingerprint).hexdigest()[:12]
    if of > 1:
        end += f"-g{group.index}"
    model = Path(str(vllm_config.model_config.model)).name or "model"
    model = re.sub(r"[^A-Za-z0-9_.-]", "_", model).lstrip(".-") or "model"
    return model[:63 - len(end)] + end


# ---- the model ---------------------------------------------------------------------------------

def _model(model: Any, load: Any) -> dict[str, Any]:
    path = str(model.model)
    parts = {
        "architectures": [str(a) for a in getattr(model, "architectures", None) or ()],
        "overrides": _overrides(getattr(model, "hf_overrides", None)),
        "load_format": str(getattr(load, "load_format", "")),
    }
    content = content_sample(Path(path))
    if content:
        parts["content"] = content
    else:
        parts["name"] = path
        parts["revision"] = str(getattr(model, "revision", None))
        parts["commit"] = str(getattr(getattr(model, "hf_config", None), "_commit_hash", None))
    if parts["load_format"].endswith("dummy"):
        parts["seed"] = str(getattr(model, "seed", None))
    return parts


def _overrides(overrides: Any) -> str:
    if callable(overrides):
        return f"{overrides.__module__}.{overrides.__qualname__}"
    return json.dumps(overrides or {}, sort_keys=True, default=str)


def _draft(speculative: Any, load: Any) -> dict[str, Any] | None:
    """A draft model's layers may be in the same blocks."""
    if speculative is None:
        return None
    draft = getattr(speculative, "draft_model_config", None)
    return {
        "method": str(getattr(speculative, "method", None)),
        "model": _model(draft, load) if draft is not None else None,
        "tp": getattr(speculative, "draft_tensor_parallel_size", None),
    }


def content_sample(path: Path) -> str:
    """A digest over names, sizes and samples of a model's files; "" if path is no file or
    directory here. It finds another model in the old one's place at once, and a change of a
    few percent of the weights all but surely."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and (
            f.suffix in WEIGHTS or f.name.endswith("config.json")
            or f.name.endswith(".index.json")))
    else:
        return ""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as f:
            for at, length in _samples(size):
                f.seek(at)
                digest.update(f.read(length))
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    whole = HEAD_BYTES + TAIL_BYTES + PROBES * PROBE_BYTES
    if size <= whole:
        return [(0, size)]
    middle = size - HEAD_BYTES - TAIL_BYTES
    probes = [(HEAD_BYTES + middle * i // PROBES, PROBE_BYTES) for i in range(PROBES)]
    return [(0, HEAD_BYTES), *probes, (size - TAIL_BYTES, TAIL_BYTES)]


# ---- the layout --------------------------------------------------------------------------------

def _layout(vllm_config: Any) -> dict[str, Any]:
    """What decides how a block's bytes are laid out and what they mean: attention backends
    choose by version, device and environment, so these stand for the choice."""
    attention = getattr(vllm_config, "attention_config", None)
    return {
        "vllm": vllm_version(),
        "torch": _version("torch"),
        "kernels": [_version("flashinfer-python"), _version("flash-attn")],
        "device": _device(),
        "backend": str(getattr(attention, "backend", None)),
        "environment": {name: os.environ[name] for name in sorted(os.environ)
                        if name in ("VLLM_KV_CACHE_LAYOUT", "VLLM_ATTENTION_BACKEND",
                                    "VLLM_USE_V2_MODEL_RUNNER", "VLLM_MLA_DISABLE",
                                    "VLLM_CPU_ATTN_SPLIT_KV", "VLLM_CPU_SGL_KERNEL")},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _device() -> str:
    platform = importlib.import_module("vllm.platforms").current_platform
    if platform.is_cpu():
        return "cpu " + _cpu()
    return f"{platform.get_device_name()} {platform.get_device_capability()}"


def _cpu() -> str:
    """Attention on a CPU lays K out for the instructions it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            return " ".join(sorted(f for f in flags if f.startswith(
                ("avx", "amx", "asimd", "sve", "bf16", "i8mm"))))
    return ""


# ---- ranks -------------------------------------------------------------------------------------

def kv_replicas(vllm_config: Any) -> int:
    """How many tensor-parallel ranks hold the same KV: all of them with a latent KV vector, or
    several where there are fewer KV heads than ranks. 1 is always safe: it costs memory only."""
    model = vllm_config.model_config
    tp = int(vllm_config.parallel_config.tensor_parallel_size)
    draft = getattr(getattr(vllm_config, "speculative_config", None), "draft_model_config", None)
    if model.use_mla:
        return tp if draft is None or getattr(draft, "use_mla", False) else 1
    if draft is not None:
        return 1
    text = getattr(model, "hf_text_config", None)
    uniform = isinstance(getattr(text, "num_key_value_heads", None), int) and not getattr(
        text, "num_global_key_value_heads", None) and not getattr(text, "block_configs", None)
    heads = int(model.get_total_num_kv_heads()) if uniform else tp
    return tp // heads if 0 < heads < tp and tp % heads == 0 else 1


# ---- block hashes ------------------------------------------------------------------------------

def hash_scheme(vllm_config: Any) -> tuple[dict[str, str], bool]:
    """How the engine makes its block hashes, and whether another process makes the same ones."""
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    scheme = {"vllm": vllm_version(), "algorithm": algorithm}
    seed = os.environ.get("PYTHONHASHSEED")
    strong = algorithm.startswith("sha256")
    if seed is None and strong:
        seed = _fixed_seed() or OUR_SEED
    scheme["seed"] = seed or "random"
    return scheme, seed is not None


OUR_SEED = "0"


def _fixed_seed() -> str | None:
    """Newer versions start sha256 hashes from a constant."""
    utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
    return getattr(utils, "DEFAULT_NONE_HASH_SEED", None)


def fix_hash_seed(vllm_config: Any) -> bool:
    """Older versions start from random bytes unless PYTHONHASHSEED is set: then no restart and no
    other engine would ever find a block. The scheduler's process reads it after its connector is
    made, so it can still be given. True if it was."""
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if "PYTHONHASHSEED" in os.environ or not algorithm.startswith("sha256") or _fixed_seed():
        return False
    os.environ["PYTHONHASHSEED"] = OUR_SEED
    return True


def private_part(vllm_config: Any) -> tuple[str, ...]:
    """A part of every namespace that no other process has, where equal hashes of two processes
    would not mean equal KV."""
    if not hash_scheme(vllm_config)[1]:
        return ("process " + secrets.token_hex(16),)
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return ("scales " + secrets.token_hex(16),)     # each process measures its own
    return ()


# ---- requests ----------------------------------------------------------------------------------

class Adapters:
    """LoRA adapters by content: the engine's hashes hold their names only, and a name may stand
    for other weights tomorrow. Taken when an adapter is first seen, which is when the engine
    loads it."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str, str], str] = {}

    def parts(self, lora: Any) -> tuple[str, ...]:
        path = str(lora.lora_path)
        key = (lora.lora_int_id, lora.lora_name, path)
        if key not in self._known or getattr(lora, "load_inplace", False):
            self._known[key] = content_sample(Path(path)) or path
        return (lora.lora_name, self._known[key])


def requested_parts(request: Any) -> tuple[str, ...]:
    """The namespace a request names itself."""
    info = getattr(request, "namespace_info", None)
    if not info:
        return ()
    return (info,) if isinstance(info, str) else tuple(str(part) for part in info)
