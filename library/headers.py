"""Safetensors headers, read without torch and without trust.

A file is hostile until proved otherwise: header length, offsets, dtypes and sizes are checked against each other and
against the file before a byte of a tensor is touched. Every fault is one sentence that names the file.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.errors import ConfigError

MAX_HEADER = 100 * 1024**2  # bytes; safetensors' own limit
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    start: int  # bytes from the end of the header
    end: int


@dataclass(frozen=True)
class Header:
    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {key: info.dtype for key, info in self.tensors.items()}


def read_header(path: Path | str) -> Header:
    """Header of one safetensors file. Raises ConfigError for anything that is not a whole, consistent file."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
            if not 2 <= length <= MAX_HEADER or first[:2] == b"PK":
                raise ConfigError(f"{path} is not a safetensors file ({_guess(first)}")
            if 8 + length > size:
                raise ConfigError(
                    f"{path} is truncated: its header alone has {length} bytes, the file {size}; load it anew"
                )
            raw = file.read(length)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is not a safetensors file: its header is not JSON; load it anew") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a safetensors file: its header is no table")
    metadata = content.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConfigError(f"{path}: the metadata in its header is not a table of texts")
    tensors = {key: _tensor(path, key, value) for key, value in content.items()}
    _check_offsets(path, tensors, size - 8 - length)
    return Header(path, tensors, metadata, 8 + length)


def _guess(first: bytes) -> str:
    """What a file is by its first bytes, and what to do."""
    convert, again = "); convert it to safetensors", "); load it anew"
    if first[:2] == b"PK" or first[:1] == b"\x80":
        return f"it looks like a pickle, which is only read from a file named .pt or .pth{convert}"
    known = {b"GGUF": f"it is GGUF, which is not read{convert}", b"vers": f"it looks like a pointer of Git LFS{again}"}
    known |= dict.fromkeys((b"<!DO", b"<!do", b"<htm"), f"it is a web page{again}")
    return known.get(first[:4], f"its first bytes are no header length{convert}")


def _tensor(path: Path, key: str, value: object) -> TensorInfo:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]  # type: ignore[index]
        numbers = [*shape, start, end]
        if not isinstance(value["shape"], list) or not isinstance(value["data_offsets"], list):  # type: ignore[index]
            raise ValueError
        if dtype not in BITS or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError
        if end - start != (math.prod(shape) * BITS[dtype] + 7) // 8:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} is damaged: the header's entry for {key[:80]!r} is not consistent") from None
    return TensorInfo(dtype, shape, start, end)


def _check_offsets(path: Path, tensors: Mapping[str, TensorInfo], data: int) -> None:
    position = 0
    for key, info in sorted(tensors.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        if info.start < position:
            raise ConfigError(f"{path} is damaged: {key[:80]!r} overlaps another tensor")
        if info.start > position:
            raise ConfigError(f"{path} is damaged: bytes that belong to no tensor come before {key[:80]!r}")
        position = max(position, info.end)
    if position > data:
        raise ConfigError(f"{path} is truncated: {position} bytes of weights expected, {data} there; load it anew")
    if position < data:
        raise ConfigError(f"{path} is damaged: {data - position} bytes follow its last tensor; load it anew")


def inner_folders(folder: Path) -> str:
    """The end of a sentence: which folders in this one hold weights, "" if none does."""
    inner = sorted({path.parent.name for path in folder.glob("*/*.safetensors")})
    return f"; name one of the folders in it that have some: {', '.join(inner[:6])}" if inner else ""
