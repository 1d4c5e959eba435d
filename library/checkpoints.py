"""The only reader and writer of weights.

Reads single files, sharded files, diffusers folders, parts inside all-in-one containers, quantised companions; what
it returns are views of the memory map wherever the stored number format is the wanted one. Writes under a temporary
name, verifies, renames. torch is imported only where a tensor is touched, so that headers can be checked in no time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import torch_files
from library.errors import ConfigError, DiskError
from library.headers import BITS, Header, TensorInfo, inner_folders, read_header
from library.layout import Layout, Row, Shape, shapes_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from library.families.family import Part
    from library.memory.loading import Loading

TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip

BLOCK = 16 * 1024**2  # bytes that are compared at a time
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)


@dataclass
class Binding:
    """What a loaded part remembers of its file, so that a save can write it back."""

    part: Part
    layout: Layout
    extras: dict[str, Tensor]  # keys of the file that no module reads, without prefix
    metadata: dict[str, str]
    prefix: str
    source: Path
    adapted: tuple[str, ...] = ()  # what a network trains of it, see `networks.lora.is_adapted`
    adapted_with_convs: tuple[str, ...] = ()  # and what besides with conv_dim
    lora_key: str = ""  # of a text encoder that a network may train: "te1"


@dataclass
class Checkpoint:
    """One model's files as one table of tensors. `prefix` is stripped from the keys once a part is chosen."""

    path: Path
    headers: tuple[Header, ...]
    prefix: str = ""
    folder: bool = False  # a diffusers folder
    configuration: Mapping[str, Any] = field(default_factory=dict)  # a folder's config.json
    files: dict[str, Header] = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.prefix)
        self.files = {key[n:]: h for h in self.headers for key in h.tensors if key.startswith(self.prefix)}

    @classmethod
    def open(cls, path: Path | str, subfolder: str = "") -> Checkpoint:
        """Open a file, a folder or a sharded set by its headers. Raises ConfigError naming what is wrong."""
        path = Path(path)
        if path.is_dir():
            inner = path / subfolder if subfolder and (path / subfolder).is_dir() else path
            headers = tuple(read_header(p) for p in _files_of(inner))
            return cls(path, headers, folder=True, configuration=_configuration_of(inner))
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        if path.name.endswith(".index.json"):
            return cls(path, tuple(read_header(p) for p in _shards(path)))
        return cls(path, (torch_files.header_of(path) if torch_files.is_torch_file(path) else read_header(path),))

    @property
    def metadata(self) -> dict[str, str]:
        return {k: v for h in self.headers for k, v in h.metadata.items()}

    def info(self, key: str) -> TensorInfo:
        return self.files[key].tensors[self.prefix + key]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes once dequantised, without quantisation companions."""
        from library import quantised

        raw = {key: self.info(key).shape for key in self.files}
        return {key: quantised.stored_shape(key, raw) for key in raw if not quantised.is_companion(key)}

    @property
    def dtypes(self) -> dict[str, str]:
        return {key: self.info(key).dtype for key in self.files}

    @property
    def stored_bytes(self) -> int:
        return sum(self.info(key).end - self.info(key).start for key in self.files)

    def with_prefix(self, prefix: str) -> Checkpoint:
        return replace(self, prefix=prefix)

    @contextlib.contextmanager
    def reader(self) -> Iterator[Reader]:
        with contextlib.ExitStack() as stack:
            yield Reader(self, stack)


class Reader:
    """Tensors of an open checkpoint: views of the memory map, dequantised where they are quantised."""

    def __init__(self, checkpoint: Checkpoint, stack: contextlib.ExitStack) -> None:
        self.checkpoint = checkpoint
        self.open = {h.path: stack.enter_context(torch_files.opened(h.path)) for h in checkpoint.headers}

    def raw(self, key: str) -> Tensor | None:
        header = self.checkpoint.files.get(key)
        return self.open[header.path].get_tensor(self.checkpoint.prefix + key) if header else None

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor in `dtype` (None = as stored, quantised ones in bfloat16); a view if nothing has to change."""
        import torch

        from library import quantised

        value = self.raw(key)
        packed = value.dtype == torch.uint8 and key.endswith(".weight")
        if packed or value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):  # some files hold even biases in fp8
            return quantised.dequantise(key, value, self.raw, dtype or torch.bfloat16)
        if dtype is None or not value.is_floating_point() or value.dtype == dtype:
            return value
        return value.to(dtype)


def _configuration_of(folder: Path) -> dict[str, Any]:
    return _json_of(folder / "config.json")


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        raise ConfigError(f"{path} is no readable JSON; load it anew") from None
    return content if isinstance(content, dict) else {}


def pipeline_facts(path: Path | str) -> dict[str, Any]:
    """What a diffusers folder's model_index.json says, also of the folder around one of its parts; {} of a file."""
    for folder in (Path(path), Path(path).parent):
        if Path(path).is_dir() and (folder / "model_index.json").is_file():
            return _json_of(folder / "model_index.json")
    return {}


def pipeline_class(path: Path | str) -> str:
    """The class of a diffusers folder's pipeline; or ""."""
    return str(pipeline_facts(path).get("_class_name", ""))


def _files_of(folder: Path) -> list[Path]:
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        return _shards(index[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder}: no safetensors file in this folder{inner_folders(folder)}")
    if len(files) > 1:
        names = ", ".join(p.name for p in files[:3])
        raise ConfigError(f"{folder}: {len(files)} safetensors files and no index ({names}); name one of them")
    return files


def _shards(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise ValueError
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{index} is not an index of shards (no 'weight_map'); load it anew") from None
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{index} points outside of its folder ({name!r}); it is not used")
        if not (index.parent / name).is_file():
            raise ConfigError(f"{index.parent / name} is missing; the index {index.name} names it")
    return [index.parent / name for name in sorted(names)]


# ---------------------------------------------------------------- a part of a family


def rows_of(part: Part, name: str, shapes: Mapping[str, Shape]) -> list[Row]:
    """A layout's rows; a table that depends on the model's size is a function of our shapes."""
    rows = part.layouts[name]
    return list(rows(shapes) if callable(rows) else rows)


def layout_of(part: Part, name: str, shapes: Mapping[str, Shape]) -> Layout:
    """A part's layout for a model with these parameters."""
    others = (part.kohya, *part.also) if name == next(iter(part.layouts)) else ("",)
    kohya, *also = [Layout(other, rows_of(part, other, shapes), shapes) if other else None for other in others]
    return Layout(name, rows_of(part, name, shapes), shapes, kohya, tuple(also))


def identity_rows(shapes: Mapping[str, Shape]) -> list[Row]:
    """The layout of a file that already has our names."""
    return [Row(key, (key,)) for key in shapes]


def find_part(part: Part, path: Path | str) -> tuple[Checkpoint, str]:
    """The checkpoint, its prefix stripped, and the layout's name. Raises ConfigError saying what the file is."""
    checkpoint = Checkpoint.open(path, part.diffusers_folder)
    for prefix in part.prefixes:
        chosen = checkpoint.with_prefix(prefix) if prefix else checkpoint
        layout = part.layout_in(chosen.shapes)
        if layout:
            return chosen, layout
    raise ConfigError(f"{path} is not {part.title}: it is {describe(checkpoint)}")


def path_of(part: Part, options: Any) -> str | None:
    """Where a part is: its own option, else inside of --pretrained_model_name_or_path, else None.

    An all-in-one file holds a part under one of its container prefixes, a diffusers folder in a sub-folder.
    """
    given, base = getattr(options, part.option), options.pretrained_model_name_or_path
    if given or not base or not Path(base).exists():
        return given
    if Path(base).is_dir():
        return base if part.diffusers_folder and (Path(base) / part.diffusers_folder).is_dir() else None
    checkpoint = Checkpoint.open(base)
    held = (checkpoint.with_prefix(prefix) for prefix in part.prefixes if prefix)
    return base if any(part.layout_in(one.shapes) for one in held) else None


def describe(checkpoint: Checkpoint) -> str:
    from library.fingerprints import identify

    found = identify(checkpoint)
    return found.sentence


def load_part(
    part: Part,
    path: Path | str,
    *,
    dtype: torch.dtype | None,
    device: Any = "cpu",
    config: dict | None = None,
    loading: Loading | None = None,
) -> torch.nn.Module:
    """A part's model with the file's weights, in `dtype` (None = as stored), with a `.binding`.

    The size is read from the file. Weights that are stored in `dtype` are views of the memory map on the CPU.
    `loading` (library.memory) decides instead how each tensor is held and where: quantised, on the host.
    Raises ConfigError once, naming all that is missing, extra or of the wrong shape.
    """
    checkpoint, layout_name = find_part(part, path)
    return load_from(part, checkpoint, layout_name, dtype=dtype, device=device, config=config, loading=loading)


def load_from(
    part: Part,
    checkpoint: Checkpoint,
    layout_name: str,
    *,
    dtype: torch.dtype | None,
    device: Any = "cpu",
    config: dict | None = None,
    loading: Loading | None = None,
) -> torch.nn.Module:
    """`load_part` from a checkpoint whose layout is known."""
    import torch

    path, shapes = checkpoint.path, checkpoint.shapes
    config = configuration(part, path, shapes, facts(part, checkpoint), layout_name) if config is None else config
    try:
        with torch.device("meta"):
            model = part.build(config)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ConfigError(f"{path} does not fit {part.title}: there is no model of its sizes ({reason})") from error
    layout = layout_of(part, layout_name, shapes_of(model))
    extras = _check(part, path, layout, shapes)
    if loading is not None:
        loading.prepare(model, layout)
    with checkpoint.reader() as reader:
        state = {}
        for entry in layout.entries:
            if loading is not None:
                state.update(loading.take(entry, reader, layout.our_shape(entry)))
                continue
            pieces = entry.split(reader.tensor(entry.theirs, dtype), layout.our_shape(entry))
            state.update((name, _place(piece, device)) for name, piece in zip(entry.ours, pieces, strict=True))
        model.load_state_dict(state, strict=True, assign=True)
        kept = part.markers(model) | {key: reader.raw(key) for key in extras}
    part.finish(model, device)
    said = {name: json.dumps(config[name]) for name in part.stated if name in config}  # which a save would not tell
    model.binding = Binding(part, layout, kept, checkpoint.metadata | said, checkpoint.prefix, path)
    return model


def facts(part: Part, checkpoint: Checkpoint) -> dict[str, str]:
    """What is said of a model besides its shapes: the header metadata, and what the part reads of a config.json."""
    own = {name: checkpoint.configuration[name] for name in part.stated if name in checkpoint.configuration}
    return checkpoint.metadata | {name: json.dumps(value) for name, value in own.items()}


def configuration(
    part: Part, path: Path | str, shapes: Mapping[str, Shape], metadata: Mapping[str, str], layout: str
) -> dict[str, Any]:
    """The model's configuration from a file. Raises ConfigError if a tensor that tells the size lacks or is odd."""
    if far := next((key for key in shapes if any(len(n) > 3 and n.isdigit() for n in key.split("."))), None):
        raise ConfigError(f"{path} does not fit {part.title}: it names {far[:80]!r}, and no model has so many blocks")
    try:
        return part.config(shapes, metadata, layout)
    except KeyError as error:
        raise ConfigError(f"{path} does not fit {part.title}: {error.args[0]} is missing; load it anew") from None
    except (IndexError, ValueError, ZeroDivisionError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ConfigError(f"{path} does not fit {part.title}: its tensors do not have the shapes of one") from None


def configuration_of(part: Part, path: Path | str) -> dict[str, Any]:
    """The configuration of the model in a file, from its header alone."""
    checkpoint, layout = find_part(part, path)
    return configuration(part, path, checkpoint.shapes, facts(part, checkpoint), layout)


def _place(tensor: Tensor, device: Any) -> Tensor:
    return tensor if str(device) == "cpu" else tensor.to(device)


def _check(part: Part, path: Path | str, layout: Layout, shapes: Mapping[str, Shape]) -> list[str]:
    """Compare a file with the layout; returns the extras that are kept. One error for everything."""
    wanted = layout.their_shapes
    unknown = [key for key in shapes if key not in wanted]
    extras = [key for key in unknown if part.may_carry(key, shapes[key])]
    wrong = {
        "missing": [key for key in wanted if key not in shapes],
        "not known": [key for key in unknown if key not in extras],
        "of another shape": [
            f"{key} {list(shapes[key])} instead of {list(shape)}"
            for key, shape in wanted.items()
            if key in shapes and tuple(shapes[key]) != tuple(shape)
        ],
    }
    faults = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])})" for what, keys in wrong.items() if keys]
    if faults:
        raise ConfigError(f"{path} does not fit {part.title}: {'; '.join(faults)}")
    return extras


def check_part(part: Part, path: str | None, option: str) -> str:
    """From the headers alone: is this file that part? Returns a line about it for the plan."""
    if not path:
        raise ConfigError(f"{option} is missing: give {part.title} (a file as ComfyUI uses it, or a diffusers folder)")
    if not Path(path).exists():
        raise ConfigError(f"{option} {path}: no such file or folder")
    checkpoint, layout = find_part(part, path)
    kinds = sorted({checkpoint.info(key).dtype for key in checkpoint.shapes})
    count = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    return f"{path}: {part.title}, {layout} names, {count / 1e6:,.1f} M parameters, {'/'.join(kinds)}"


def save_part(
    model: torch.nn.Module, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> None:
    """Write a whole part under its original names, with the extras, prefix and header metadata that it came with.

    What came from a diffusers folder is written as one file in the part's first layout, the one that ComfyUI loads.
    """
    binding: Binding = model.binding
    layout = binding.layout
    if binding.source.is_dir():
        layout = layout_of(binding.part, next(iter(binding.part.layouts)), layout.shapes)
    state = {k: (v.to(dtype) if dtype and v.is_floating_point() else v) for k, v in model.state_dict().items()}
    theirs = layout.to_theirs(state) | binding.extras
    tensors = {binding.prefix + key: value for key, value in theirs.items()}
    from library import quantised

    own = {key: value for key, value in binding.metadata.items() if key != quantised.METADATA}
    save(tensors, path, {**own, **metadata})


# ---------------------------------------------------------------- writing


def save(tensors: Mapping[str, Tensor], path: Path | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: temporary file, fsync, re-read and compared byte by byte, then renamed.

    Raises DiskError when the disk is too small (found before writing) or cannot be written; nothing that has
    the final name is ever incomplete, and an older file of that name stays until the new one is whole.
    """
    from safetensors.torch import save_file

    path = Path(path)
    check_writable(path.parent, sum(t.numel() * t.element_size() for t in tensors.values()))
    with publishing(path) as partial:
        ready = {key: t.detach().to("cpu").contiguous() for key, t in tensors.items()}
        save_file(ready, partial, metadata={str(k): str(v) for k, v in (metadata or {}).items()})
        flush(partial)
        _verify(partial, ready)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A temporary place (`.x.partial/<final name>`) that becomes `path` when the block ends without an error.

    Whoever writes a weight file, a foreign network module too, writes it in here: on the disk before it gets its
    name, and only if its header is whole. Raises DiskError for whatever the disk refuses.
    """
    from safetensors import SafetensorError  # what its writer raises when the disk is full

    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder / path.name
        flush(folder / path.name)
        _whole(folder / path.name)
        os.chmod(folder / path.name, 0o666 & ~UMASK)  # safetensors writes files that only their owner can read
        os.replace(folder / path.name, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiskError(f"{path} could not be written ({reason}); make room or change the folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _whole(path: Path) -> None:
    try:
        read_header(path)
    except ConfigError as error:
        raise DiskError(f"what was written is not whole: {error}") from None


def flush(path: Path) -> None:
    """Onto the disk, and out of the system's memory, so that reading it back reads the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _verify(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare a file with what was written into it; plain reads, because a failing disk kills a memory map's reader."""
    import numpy as np
    import torch

    header = read_header(path)
    if header.shapes != {key: tuple(t.shape) for key, t in tensors.items()}:
        raise DiskError(f"{path} was written but reads back differently; the disk may be failing")
    with open(path, "rb") as file:
        for key, info in header.tensors.items():
            file.seek(header.data_start + info.start)
            data = tensors[key].reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), BLOCK):
                wanted = data[start : start + BLOCK]
                if not np.array_equal(np.frombuffer(file.read(len(wanted)), np.uint8), wanted):
                    raise DiskError(f"{path}: {key} was written but reads back differently; the disk may be failing")


def sync_folder(folder: Path) -> None:
    """Make a rename durable where the system has directory handles (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):  # absent on Windows, where the rename itself is durable enough
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(folder: Path | str, bytes_needed: int) -> None:
    """Raises DiskError if the folder cannot be written or the disk has less room than that."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}.probe"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DiskError(f"{folder} cannot be written ({error.strerror or error}); choose another folder") from None
    if free < bytes_needed:
        raise DiskError(f"{folder}: {bytes_needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free; make room")


def dtype_bytes(dtype: str) -> float:
    """Bytes of one value of a safetensors dtype."""
    return BITS[dtype] / 8
