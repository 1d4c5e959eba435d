"""Renaming the tensors of a safetensors file without loading it: a new header, and the bytes copied as they are.

Needs no torch. A file of 1 GB takes little longer than copying it, and a few MB of memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from library.errors import ConfigError, DiskError
from library.headers import Header, TensorInfo, read_header

# safetensors lays tensors out by number format, the last of these first, then by name (its Rust library, `Dtype`).
ORDER = "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64".split()
CHUNK = 4 * 1024**2  # bytes read at once
WINDOW = (0x100000, 0x110000)  # of the file, which sd-scripts' legacy hash is made of
HASHES = {"sshs_model_hash": 64, "sshs_legacy_hash": 8}  # sd-scripts', and how many hex digits they have


def layout(tensors: Mapping[str, TensorInfo]) -> list[tuple[str, TensorInfo]]:
    """The tensors as safetensors would order them."""
    return sorted(tensors.items(), key=lambda entry: (-ORDER.index(entry[1].dtype), entry[0]))


def header_bytes(order: list[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON as they stand at the beginning of a file, offsets in the given order."""
    content: dict = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in order:
        size = info.end - info.start
        content[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def rename(source: Path, target: Path, names: Mapping[str, str]) -> Header:
    """Write `source` to `target` with its tensors called `names[old]`; metadata kept, sd-scripts' hashes made anew.

    Raises ConfigError if the source is no whole safetensors file, DiskError if the target cannot be written. The
    target has its name only once it is whole; it is not forced to the disk, which would take as long as the copy,
    because the source is still there.
    """
    header = read_header(source)
    order = layout({names[old]: info for old, info in header.tensors.items()})
    spans = [(header.data_start + info.start, info.end - info.start) for _, info in order]
    metadata = dict(header.metadata)
    hashes = {key: "0" * digits for key, digits in HASHES.items() if key in metadata}  # as long as the real ones
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with ThreadPoolExecutor(1) as pool, open(source, "rb") as read, open(partial, "xb") as write:
            made = pool.submit(_hashes, source, spans, order, metadata) if hashes else None
            write.write(header_bytes(order, metadata | hashes))
            for start, size in _joined(spans):
                _copy(read, write, start, size)
            if made:
                write.seek(0)
                fresh = {key: value for key, value in made.result().items() if key in hashes}
                write.write(header_bytes(order, metadata | fresh))
        written = read_header(partial)
        os.replace(partial, target)
        return written
    except OSError as error:
        reason = error.strerror or error
        raise DiskError(f"{target} could not be written ({reason}); make room or choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, size) of what lies side by side in the source."""
    out: list[tuple[int, int]] = []
    for start, size in spans:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + size)
        else:
            out.append((start, size))
    return out


def _copy(read: BinaryIO, write: BinaryIO, start: int, size: int) -> None:
    """Bytes of one file to the end of another, inside of the system where it can."""
    write.flush()
    read.seek(start)
    if hasattr(os, "copy_file_range"):  # Linux
        with contextlib.suppress(OSError):  # between some file systems it does not work
            while size and (done := os.copy_file_range(read.fileno(), write.fileno(), size)):
                size -= done
        write.seek(0, os.SEEK_END)
        read.seek(os.lseek(read.fileno(), 0, os.SEEK_CUR))
    while size:
        piece = read.read(min(CHUNK, size))
        if not piece:
            raise OSError("the source ended before its last tensor")
        size -= write.write(piece)


def _hashes(
    source: Path, spans: list[tuple[int, int]], order: list[tuple[str, TensorInfo]], metadata: Mapping[str, str]
) -> dict[str, str]:
    """sd-scripts' hashes of the new file (see networks.formats.model_hashes), while its bytes are copied."""
    head = header_bytes(order, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    model, window, position = hashlib.sha256(), bytearray(head[slice(*WINDOW)]), len(head)
    buffer = memoryview(bytearray(CHUNK))
    with open(source, "rb", buffering=0) as file:
        for start, size in _joined(spans):
            file.seek(start)
            while size and (count := file.readinto(buffer[: min(CHUNK, size)])):
                piece = buffer[:count]
                model.update(piece)
                first, last = max(WINDOW[0] - position, 0), min(WINDOW[1] - position, count)
                window += piece[first:last] if first < last else b""
                position, size = position + count, size - count
    return {"sshs_model_hash": model.hexdigest(), "sshs_legacy_hash": hashlib.sha256(window).hexdigest()[:8]}


def refuse(source: Path, target: Path) -> None:
    """Raises ConfigError for a target that is the source or that is no safetensors file."""
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: the file to write has to end in .safetensors")
    if source.exists() and target.exists() and os.path.samefile(source, target):
        raise ConfigError(f"{target} is the source itself; name another file")
