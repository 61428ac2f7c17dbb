"""Which NVIDIA GPU is here, asked of the driver itself: no CUDA package is needed to find that there is none."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from typing import Any

MAJOR, MINOR = 75, 76  # CUdevice_attribute: compute capability


@dataclass(frozen=True)
class Gpu:
    """`capability` is major * 10 + minor, 90 for Hopper; `driver` the CUDA version that the driver supports, 13000."""

    name: str
    capability: int
    driver: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def find_gpu(index: int = 0) -> Gpu | None:
    """The GPU of that index, or None where there is no driver or no such device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDriverGetVersion(ctypes.byref(version))
        or cuda.cuDeviceGet(ctypes.byref(device), index)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device)
    )
    if failed:
        return None
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value, version.value)
