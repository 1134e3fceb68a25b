"""Safetensors files read by their header alone: which tensors they hold, whether they are whole. No torch here."""

import json
import struct
from pathlib import Path
from typing import Any

from loraport.clients.errors import Refused


def read_safetensors_shapes(path: Path, error_kind: type[Refused]) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor name; `error_kind` when the file is missing, damaged or cut off.

    Format: 8 bytes little-endian header length, JSON header, then the data that its offsets cover exactly
    (https://github.com/huggingface/safetensors, "Format").
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header: dict[str, Any] = json.loads(handle.read(min(length, size)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except FileNotFoundError as error:
        raise error_kind(
            f"{path.parent} has no {path.name}.", "the folder is incomplete: make or copy it again"
        ) from error
    except (OSError, struct.error, ValueError, AttributeError, KeyError, TypeError) as error:
        raise error_kind(f"{path} is not a whole safetensors file.", "copy, download or train it again") from error
    if size != 8 + length + end:
        raise error_kind(
            f"{path} is cut off: {size:,} bytes of {8 + length + end:,}.", "copy, download or train it again"
        )
    return shapes
