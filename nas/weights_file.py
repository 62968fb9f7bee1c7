"""Weights of an exported network, read with torch alone: for machines where safetensors is not installed.

Format (safetensors, https://github.com/huggingface/safetensors): uint64 little-endian length of the header; the header, JSON that
gives type, shape and place of every tensor; the tensors' bytes. Start with `load_weights`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

__all__ = ["WeightsFileError", "load_weights", "read_tensors"]

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightsFileError(ValueError):
    """A weights file that is damaged or does not belong to the network."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, in memory of its own, by name.

    Raises:
        WeightsFileError: the file is cut short or is none.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        return {name: _tensor(content[start:], **entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsFileError(
            f"expected a safetensors file, found something else or a part of one: {path} ({type(error).__name__}: {error}); "
            "export the network again"
        ) from error


def _tensor(content: bytes, dtype: str, shape: list[int], data_offsets: list[int]) -> torch.Tensor:
    first, last = data_offsets
    piece = bytearray(content[first:last])
    if len(piece) != last - first:
        raise ValueError(f"{last - first} bytes of a tensor expected, {len(piece)} found")
    flat = torch.frombuffer(piece, dtype=_TYPES[dtype]) if piece else torch.empty(0, dtype=_TYPES[dtype])
    return flat.reshape(shape)


def load_weights(network: nn.Module, path: Path) -> None:
    """Put the tensors of a file into a network; of tensors with several names, one name is enough.

    Raises:
        WeightsFileError: the file is damaged, a tensor is missing, or one has no place.
    """
    missing, unexpected = network.load_state_dict(read_tensors(path), strict=False)
    places = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    filled = {place for name, place in places.items() if name not in missing}
    lost = [name for name in missing if places[name] not in filled]
    if lost or unexpected:
        raise WeightsFileError(
            f"{path} does not belong to the network beside it: missing {lost}, without a place {list(unexpected)}; export the "
            "network again"
        )
