"""Weights in torch's own files (.pt, .pth), which some models are only published in.

Such a file is a pickle. It is read by torch's `weights_only` reader, which makes tensors and plain containers and calls
nothing else, and only where a user names the file itself: a folder is never searched for one.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ConfigError
from library.headers import Header, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth")
WRAPPERS = ("model", "module", "state_dict")  # under which published files keep their weights, one in the other
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def is_torch_file(path: Path | str) -> bool:
    return Path(path).suffix.lower() in SUFFIXES


class TorchFile:
    """The tensors of a file behind the two calls of safetensors' reader; they are views of its memory map."""

    def __init__(self, path: Path) -> None:
        self.tensors = tensors_of(path)

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, key: str) -> Tensor:
        return self.tensors[key]


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[Any]:
    """A weight file of either kind for reading tensors."""
    if is_torch_file(path):
        yield TorchFile(Path(path))
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        yield file


def header_of(path: Path) -> Header:
    """What `headers.read_header` gives of a safetensors file; the offsets only say how large each tensor is."""
    infos, start = {}, 0
    for key, value in tensors_of(path).items():
        size = value.numel() * value.element_size()
        infos[key] = TensorInfo(
            DTYPES[str(value.dtype).removeprefix("torch.")], tuple(value.shape), start, start + size
        )
        start += size
    return Header(path, infos, {}, 0)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Name -> tensor. Raises ConfigError for what is no file of plain tensors."""
    import torch

    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ConfigError(
            f"{path} holds more than plain tensors, which is not loaded because it can run code; "
            "convert it to safetensors where you trust it"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch's reader raises many kinds for damaged files
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a torch file ({reason}); load it anew") from None
    found = _weights(content)
    if not found:
        raise ConfigError(f"{path} holds no table of tensors; it is not a checkpoint")
    odd = sorted({str(value.dtype) for value in found.values()} - {f"torch.{name}" for name in DTYPES})
    if odd:
        raise ConfigError(f"{path}: tensors of {odd[0]} are not read; convert it to safetensors")
    return found


def _check_archive(path: Path) -> None:
    """Raise ConfigError unless the file is an archive as torch writes it, in which nothing is compressed.

    What is compressed could be a thousand times larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # zipfile raises many kinds for damaged files
        raise ConfigError(
            f"{path} is not a file of torch 1.6 or later, or it is truncated; load it anew or convert it"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ConfigError(f"{path} is compressed, which torch's own files are not; convert it to safetensors")


def _weights(content: Any) -> dict[str, Tensor]:
    """The tensors of the table itself, else of the one inside of it."""
    import torch

    while isinstance(content, dict):
        found = {key: value for key, value in content.items() if isinstance(value, torch.Tensor) and key == str(key)}
        if found:
            return {key: value.detach() for key, value in found.items() if value.layout == torch.strided}
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), None)
    return {}
