"""Tensors inside safetensors files, read and written piece by piece with numpy: no torch, never a whole file in memory.

Format: 8 bytes little-endian header length, JSON header, then the data that its offsets cover
(https://github.com/huggingface/safetensors, "Format").

    >>> tensors, data_start = read_tensors(Path("model.safetensors"), BaseModelError)
    >>> tensors["lm_head.weight"].read().shape
    (151936, 4096)
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraport.clients.errors import Refused
from loraport.train.weights import read_safetensors_shapes

Floats = npt.NDArray[np.float32]
BYTES_EACH = {"F32": 4, "BF16": 2, "F16": 2}  # the types that can be added to
LARGEST = {"F32": 3.4028235e38, "BF16": 3.3895314e38, "F16": 65504.0}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes `start` to `start + size` of `file`. `dtype` in safetensors' words: BF16, F32, …"""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Floats:
        """All of it in float32."""
        with self.file.open("rb") as handle:
            handle.seek(self.start)
            return to_float32(handle.read(self.size), self.dtype).reshape(self.shape)


def read_tensors(path: Path, error_kind: type[Refused]) -> tuple[dict[str, Tensor], int]:
    """(tensors by name, in the order of their bytes; where these begin). `error_kind` when the file is not whole."""
    read_safetensors_shapes(path, error_kind)
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    found = [
        Tensor(name, path, entry["dtype"], tuple(entry["shape"]), 8 + length + first, end - first)
        for name, entry in entries.items()
        for first, end in [entry["data_offsets"]]
    ]
    return {tensor.name: tensor for tensor in sorted(found, key=lambda tensor: tensor.start)}, 8 + length


def to_float32(raw: bytes, dtype: str) -> Floats:
    """Bytes of a tensor as a new array of float32, which holds every value of the three types exactly."""
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(raw, "<u2").astype(np.uint32)
        np.left_shift(bits, 16, out=bits)
        return bits.view(np.float32)
    return np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def from_float32(values: Floats, dtype: str) -> memoryview:
    """Finite float32 values as bytes of a tensor, each rounded to the nearest, halves to even. Overwrites `values`."""
    if dtype != "BF16":
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).data.cast("B")
    bits = values.view(np.uint32)
    up = np.right_shift(bits, 16)  # 0x7FFF more, or 0x8000 where the last bit that stays is odd, carries into it
    np.bitwise_and(up, 1, out=up)
    np.add(up, 0x7FFF, out=up)
    np.add(bits, up, out=bits)
    np.right_shift(bits, 16, out=bits)
    return bits.astype("<u2").data.cast("B")
