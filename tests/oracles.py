"""Where the outside oracles lie: what is small in tests/data, the rest in ../shared, without which its tests skip.

`golden/` holds toy weights, inputs and outputs of an independent implementation; `layouts/` key -> shape of the real
full-size files; `lora_keys/` the adapter keys that ComfyUI takes.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).resolve().parents[2] / "shared"


def path_of(name: str) -> Path:
    """`golden/x.safetensors`, `layouts/x.json`, ... wherever it is; the test skips if it is nowhere."""
    for folder in (DATA, SHARED):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    pytest.skip(f"the outside oracle {name} is not in tests/data and there is no ../shared")


@functools.lru_cache(maxsize=4)
def golden(name: str) -> dict[str, Any]:
    """All tensors of one golden file."""
    return load_file(path_of(f"golden/{name}.safetensors"))


def golden_metadata(name: str) -> dict[str, str]:
    with safe_open(path_of(f"golden/{name}.safetensors"), "pt") as file:
        return file.metadata()


def read_json(name: str) -> Any:
    """A JSON oracle, compressed or not."""
    path = path_of(f"{name}.json")
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def weights_of(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load(part: Any, weights: dict[str, Any], folder: Path, dtype: Any = None, **metadata: str) -> Any:
    """A part of a family with these weights, read from a file as any other."""
    from library import checkpoints

    path = folder / "part.safetensors"
    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata=metadata)
    return checkpoints.load_part(part, path, dtype=dtype)


def relative(a: Any, b: Any) -> float:
    """|a - b| / |b| in the Euclidean norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def accepted_stems(name: str) -> set[str]:
    """The names, prefix included and `.lora_...` cut off, that ComfyUI accepts in LoRA files of a family."""
    return {stem for style in read_json(f"lora_keys/{name}")["styles"].values() for stem in style["keys"]}
