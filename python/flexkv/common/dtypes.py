"""Element types: torch's own where torch is loaded, else their names.

Nothing here imports torch: whoever hands over a torch.dtype has imported it.
"""
from __future__ import annotations

import sys
from typing import Any

_BYTES = {
    "float64": 8, "int64": 8, "uint64": 8,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1, "uint8": 1, "bool": 1,
}

# The spellings that FLEXKV_KV_CACHE_DTYPE and the engines' --kv-cache-dtype use. Packed 4-bit
# caches are tensors of bytes.
_ALIASES = {
    "half": "float16", "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32", "fp32": "float32",
    "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "e4m3": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "e5m2": "float8_e5m2",
    "nvfp4": "uint8", "fp4": "uint8", "e2m1": "uint8", "fp4_e2m1": "uint8",
}


def dtype_name(dtype: Any) -> str:
    """"bfloat16" for torch.bfloat16, numpy's or a name in any of its spellings."""
    if isinstance(dtype, str):
        name = dtype.strip().lower()
    else:
        name = getattr(dtype, "name", None) or str(dtype)
    name = name.removeprefix("torch.")
    return _ALIASES.get(name, name)


def dtype_bytes(dtype: Any) -> int:
    """Bytes of one element."""
    size = getattr(dtype, "itemsize", None)
    if isinstance(size, int):
        return size
    name = dtype_name(dtype)
    if name not in _BYTES:
        raise ValueError(f"dtype {dtype!r} is not known; known are {', '.join(sorted(_BYTES))}")
    return _BYTES[name]


def named_dtype(name: str) -> Any:
    """The torch.dtype of that name if torch is loaded and has it, else the name itself."""
    name = dtype_name(name)
    if name not in _BYTES:
        raise ValueError(f"dtype {name!r} is not known; known are {', '.join(sorted(_BYTES))}")
    return getattr(sys.modules.get("torch"), name, name)
