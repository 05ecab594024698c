"""Tensors that another process can map.

A CPU tensor moves when torch puts it in shared memory, and an agent that knows it by address must
not be left behind. So KVTPClient shares tensors before it registers them, and a registered tensor
that could not be shared then is refused here.
"""
from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from flexkv.common.debug import flexkv_logger

if TYPE_CHECKING:
    import torch

_SHM = "/dev/shm"
_registered: dict[int, int] = {}     # storage address -> registrations that rely on it


def _may_move(tensor: torch.Tensor) -> bool:
    """Whether sharing would move the tensor, and may: torch marks storage that others see, such
    as numpy arrays and mapped files, as not resizable."""
    return (tensor.device.type == "cpu" and not tensor.is_shared()
            and tensor.untyped_storage().resizable())


def share_before_registration(tensor: torch.Tensor) -> None:
    """Puts a CPU tensor in shared memory in place, if that can be done without harm."""
    if not _may_move(tensor):
        return
    size = tensor.untyped_storage().nbytes()
    room = os.statvfs(_SHM)
    if size > room.f_bavail * room.f_frsize:
        flexkv_logger.warning(
            "a KV cache tensor of %d MiB stays in private memory: %s has too little room. It must "
            "not be sent to another process while it is registered", size >> 20, _SHM)
        return
    tensor.share_memory_()


def hold_storage(tensor: torch.Tensor) -> int:
    """While held, the tensor's memory must not move. Returns what release_storage wants."""
    address = tensor.untyped_storage().data_ptr()
    _registered[address] = _registered.get(address, 0) + 1
    return address


def release_storage(address: int) -> None:
    _registered[address] -= 1
    if not _registered[address]:
        del _registered[address]


class TensorSharedHandle:
    """Goes through a pipe or queue of multiprocessing; get_tensor() there is the same memory."""

    def __init__(self, data: torch.Tensor, device_id: int = -1, **unsupported: Any) -> None:
        import torch
        import torch.multiprocessing  # noqa: F401  teaches pickle to pass memory, not copies
        if unsupported or not isinstance(data, torch.Tensor):
            raise ValueError("a TensorSharedHandle is made from a tensor; raw device handles are "
                             "not supported by this build")
        if _may_move(data):
            if data.untyped_storage().data_ptr() in _registered:
                raise ValueError("this tensor is registered with FlexKV and not in shared memory; "
                                 "call share_memory_() before register_to_server()")
            data.share_memory_()
        self._tensor = data
        self.device = data.device
        self.tensor_shape = tuple(data.shape)
        self.tensor_dtype = data.dtype

    def get_tensor(self) -> torch.Tensor:
        return self._tensor
