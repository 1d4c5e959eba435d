"""What a run was made from, in a few bytes: marks of its model files and of its data, and the versions of everything.

A training state keeps them, so that a resumed run notices another base model under the same name, an edited caption or
a picture more, and so that a moved file is no change. No torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.data.dataset import Dataset

SAMPLES, BLOCK = 64, 65536  # blocks of a file that are read for its mark, and their bytes
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "bitsandbytes", "numpy", "pillow")


def file_mark(path: Path | str) -> str:
    """Size and a hash of 64 evenly spaced blocks of a file, or of the weight files of a folder; `hub:...` if neither.

    Reads 4 MiB of a file of any size. Two files of one size that differ only between the blocks have one mark.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".json", ".model", ".txt"))
        return _hash("".join(file_mark(p) for p in files).encode())
    if not path.is_file():
        return f"hub:{path}"
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        for k in range(SAMPLES if size > SAMPLES * BLOCK else 1):
            file.seek(k * (size - BLOCK) // (SAMPLES - 1) if k else 0)
            digest.update(file.read(BLOCK if size > SAMPLES * BLOCK else size))
    return digest.hexdigest()


def data_mark(dataset: Dataset) -> dict[str, Any]:
    """Hashes of everything about the data that decides a loss, and the number of pictures; paths and times do not.

    Keys: `pictures`, `items` (names, bytes, repeats, crops, weights, in their order), `captions`, `rules` (what the
    description says).
    """
    items = [
        (i.path.name, i.stat[0], i.repeats, i.weight, asdict(i.placement), i.mask_path and i.mask_path.name)
        for i in dataset.items
    ]
    captions = [(item.path.name, item.caption) for item in dataset.items]
    rules = [{k: v for k, v in asdict(spec).items() if k != "subsets"} for spec in dataset.specs]
    rules += [_rules(asdict(subset)) for spec in dataset.specs for subset in spec.subsets]
    return {
        "pictures": len(items),
        "items": _hash(repr(items).encode()),
        "captions": _hash(repr(captions).encode()),
        "rules": _hash(repr(rules).encode()),
    }


def _rules(subset: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in subset.items() if k not in ("image_dir", "metadata_file", "conditioning_data_dir")}


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Python, the platform, the packages that compute, and the commit of a checkout."""
    found = {"python": sys.version.split()[0], "platform": platform.platform(), "lorasmith": _version("lorasmith")}
    return found | {name: _version(name) for name in PACKAGES if _version(name)} | _commit()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> dict[str, str]:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def named_inputs(paths: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Option name -> mark of the file that it names, for those that name one."""
    return {name: file_mark(path) for name, path in paths if path}
