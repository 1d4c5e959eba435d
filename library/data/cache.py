"""Caches by content: an entry is found by what it was made from, never because a file of that name exists.

The identity of an entry is a text (picture's content hash, preprocessing, encoder's content hash, recipe); its file is
named after the hash of that text and holds the text itself and a checksum of its tensors, their names and shapes. A
file that is truncated, damaged or of another identity is as good as absent: it is counted and made anew. Files are
complete before they get their name; there is no fsync, since a file that a power cut spoils is noticed when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import DiskError

if TYPE_CHECKING:
    from torch import Tensor

HASHES = "hashes.json"


class Store:
    """Entries of tensors in a folder; `damaged` are the identities whose file was there but not good."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.damaged = folder, set[str]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"cache folder {folder} cannot be made ({error.strerror or error}); give another --cache_dir"
            ) from None

    def path(self, identity: str) -> Path:
        name = file_name(identity)
        return self.folder / name[:2] / name

    def listed(self) -> dict[str, str]:
        """Names of all finished entries -> their paths, of whatever run."""
        folders = [entry.path for entry in os.scandir(self.folder) if len(entry.name) == 2 and entry.is_dir()]
        files = (entry for folder in folders for entry in os.scandir(folder))
        return {e.name: e.path for e in files if e.name.endswith(".safetensors") and not e.name.startswith(".")}

    def get(self, identity: str) -> dict[str, Tensor] | None:
        """The tensors of an entry if they are there, whole, and of this identity."""
        from safetensors.torch import load

        path = self.path(identity)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        metadata = sealed(data)
        if metadata is not None and metadata.get("identity") == identity:
            return load(data)
        self.damaged.add(identity)
        return None

    def put(self, identity: str, tensors: dict[str, Tensor]) -> None:
        """Write an entry whole or not at all. Raises DiskError where that is not possible."""
        from safetensors.torch import save

        bare = save(tensors)
        start = 8 + int.from_bytes(bare[:8], "little")
        told = checksum(json.loads(bare[8:start]), bare[start:])
        data = save(tensors, {"identity": identity, "checksum": told})
        path = self.path(identity)
        partial = path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise DiskError(
                f"cache {path.parent} cannot be written ({error.strerror or error}); make room or give --cache_dir"
            ) from None


def file_name(identity: str) -> str:
    return f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"


def sealed(data: bytes) -> dict[str, str] | None:
    """The metadata of an entry that is as it was written; None for any other file."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = header.pop("__metadata__")
        return metadata if metadata["checksum"] == checksum(header, data[8 + size :]) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def checksum(header: Mapping[str, Any], data: bytes) -> str:
    """Of the values of an entry and of what its header, without metadata, says about them."""
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    digest.update(data)
    return digest.hexdigest()


class ContentHashes:
    """blake2b of files, remembered by name, size and modification time in `folder` (None = only in memory)."""

    def __init__(self, folder: Path | None) -> None:
        self.file = folder / HASHES if folder else None
        self.lock, self.changed = threading.Lock(), False
        try:
            self.known = json.loads(self.file.read_text(encoding="utf-8")) if self.file else {}
            if not isinstance(self.known, dict):
                self.known = {}
        except (OSError, ValueError):
            self.known = {}

    def of(self, path: Path) -> str:
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in self.known:
            digest = hashlib.blake2b(digest_size=20)
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            with self.lock:
                self.known[key] = digest.hexdigest()
                self.changed = True
        return self.known[key]

    def of_tree(self, path: Path) -> str:
        """One hash of a file, or of the weight and tokenizer files of a folder."""
        if path.is_file():
            return self.of(path)
        if not path.exists():
            return f"hub:{path}"
        names = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model"))
        return hashlib.blake2b("".join(self.of(p) for p in names).encode(), digest_size=20).hexdigest()

    def write(self) -> None:
        if not (self.file and self.changed):
            return
        partial = self.file.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self.known), encoding="utf-8")
            os.replace(partial, self.file)
        except OSError:  # without it the next start hashes again
            partial.unlink(missing_ok=True)
