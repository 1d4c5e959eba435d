"""What lies in a cache folder, without torch: entries counted, checked, explained, and those that a run lacks.

An entry says itself what it was made from (library/data/cache.py), so that nothing here has to guess: an identity is
taken apart into its fields, and an entry that a run lacks is compared with those that are there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from library.data.cache import HASHES, sealed
from library.data.items import names
from library.errors import ConfigError
from library.headers import read_header

KINDS = ("latents", "text")
OLD = 3600  # seconds after which a file that was never finished belongs to no live run
IDENTITIES = {
    "latents": re.compile(
        r"latents (?P<recipe>\S+ \S+)(?P<how>.*?) vae (?P<encoder>.*?) picture (?P<picture>.*?) "
        r"flip (?P<flip>True|False) (?P<placement>.*)",
        re.DOTALL,
    ),
    "text": re.compile(
        r"text (?P<recipe>\S+ \S+)(?P<how>.*?)(?P<encoder>(?: (?:[0-9a-f]{40}|hub:\S+))+)"
        r"(?P<picture>(?: picture \S+)*) caption (?P<caption>.*)",
        re.DOTALL,
    ),
}
DIFFERENCES = {  # field -> what it means that this one differs
    "recipe": "made for another model, or by an older version",
    "how": "other options of the model or of its encoders",
    "encoder": "another VAE or text encoder",
    "picture": "the picture was changed",
    "placement": "another size, crop, resize or control picture",
    "flip": "only mirrored the other way",
}


@dataclass(frozen=True)
class Entry:
    """One file of a cache; `problem` says why it is as good as absent."""

    path: Path
    kind: str
    bytes: int
    identity: str = ""
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # name -> (dtype, shape)
    problem: str = ""

    @property
    def fields(self) -> dict[str, str]:
        return fields_of(self.identity)


@dataclass(frozen=True)
class Need:
    """One entry that a run asks for."""

    kind: str
    identity: str
    file: str  # of the picture; "" for a prompt


def fields_of(identity: str) -> dict[str, str]:
    """The parts of an identity by name; {} if it is none."""
    pattern = IDENTITIES.get(identity.partition(" ")[0])
    found = pattern.fullmatch(identity) if pattern else None
    return {name: value.strip() for name, value in found.groupdict().items()} if found else {}


def look(path: Path, kind: str, *, whole: bool = False) -> Entry:
    """One file, from its header; `whole` reads all of it and compares the checksum, too."""
    try:
        size = path.stat().st_size
        header = read_header(path)
        identity = header.metadata.get("identity", "")
        tensors = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        if hashlib.sha256(identity.encode()).hexdigest() != path.stem:
            return Entry(path, kind, size, identity, tensors, "it is not what its name says")
        if whole and sealed(path.read_bytes()) is None:
            return Entry(path, kind, size, identity, tensors, "its bytes are not those that were written")
    except ConfigError as error:
        return Entry(path, kind, size, problem=str(error).replace(f"{path} ", "").replace(f"{path}: ", ""))
    except OSError as error:
        return Entry(path, kind, 0, problem=f"it cannot be read ({error.strerror or error})")
    return Entry(path, kind, size, identity, tensors)


def files_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every finished entry below a cache folder with its kind."""
    for kind in KINDS:
        for path in sorted((folder / kind).glob("??/*.safetensors")):
            if not path.name.startswith("."):
                yield path, kind


def entries_of(folder: Path, *, whole: bool = False) -> list[Entry]:
    """All entries of a cache. Raises ConfigError where there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such cache folder")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda found: look(*found, whole=whole), files_of(folder)))


def unfinished(folder: Path) -> list[Path]:
    """Files that a killed run left behind."""
    before = time.time() - OLD
    found = [path for kind in KINDS for path in (folder / kind).glob("??/.*.partial")]
    return sorted(path for path in found if path.stat().st_mtime < before)


class Files:
    """Which files had which content, as the cache remembers it: of earlier versions of a file, too."""

    def __init__(self, folder: Path) -> None:
        self.of_hash: dict[str, str] = {}
        self.of_file: dict[str, set[str]] = defaultdict(set)
        try:
            known = json.loads((folder / HASHES).read_text(encoding="utf-8"))
            pairs = [(key.rsplit("|", 2)[0], digest) for key, digest in known.items()]
        except (OSError, ValueError, AttributeError):
            pairs = []
        for file, digest in pairs:
            self.of_hash[digest] = file
            self.of_file[file].add(digest)

    def name(self, digest: str) -> str:
        return self.of_hash.get(digest, "a file that is no longer known")


@dataclass
class Comparison:
    """What a run needs of one kind against what is there."""

    valid: list[Entry] = field(default_factory=list)
    lacking: dict[str, list[Need]] = field(default_factory=lambda: defaultdict(list))  # reason -> needs
    unused: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))  # made by -> entries


def compare(kind: str, needs: Iterable[Need], entries: Iterable[Entry], files: Files) -> Comparison:
    """Entries of one kind that a run finds, lacks and does not read."""
    there = {entry.identity: entry for entry in entries if entry.kind == kind and not entry.problem}
    explain, out = reasons(kind, list(there.values()), files), Comparison()
    wanted = {}
    for need in needs:
        if need.kind == kind:
            wanted[need.identity] = need
    for identity, need in wanted.items():
        if identity in there:
            out.valid.append(there[identity])
        else:
            out.lacking[explain(need)].append(need)
    for identity, entry in there.items():
        if identity not in wanted:
            out.unused[(entry.fields.get("recipe") or "? of an older version").split()[1]].append(entry)
    return out


def reasons(kind: str, entries: list[Entry], files: Files) -> Callable[[Need], str]:
    """A function that says why an entry is not there: what differs from the nearest one that is."""
    key = "picture" if kind == "latents" else "caption"
    by_key: dict[str, list[dict[str, str]]] = defaultdict(list)
    for entry in entries:
        by_key[entry.fields.get(key, "")].append(entry.fields)

    def why(need: Need) -> str:
        fields = fields_of(need.identity)
        if near := by_key.get(fields.get(key, "")):
            changes = [[name for name in DIFFERENCES if one.get(name) != fields.get(name)] for one in near]
            return ", ".join(DIFFERENCES[name] for name in min(changes, key=len))
        if kind == "text":
            return "a new or edited caption" if need.file else "a new prompt"
        earlier = files.of_file[os.path.realpath(need.file)] - {fields.get(key, "")}
        return DIFFERENCES["picture"] if any(digest in by_key for digest in earlier) else "a new picture"

    return why


def named(files: list[str], shown: int = 3) -> str:
    """The first of some files by name, and how many more there are; "" is a prompt."""
    return names([Path(file).name if file else "a prompt" for file in files], shown)


def described(entry: Entry, files: Files) -> list[str]:
    """What an entry was made from, in words."""
    lines = [f"{entry.path}: {entry.kind}, {entry.bytes:,} bytes"]
    if entry.problem:
        lines.append(f"  as good as absent: {entry.problem}")
    for name, (dtype, shape) in entry.tensors.items():
        lines.append(f"  {name}: {dtype} {list(shape)}")
    fields = entry.fields
    if not fields:
        return [*lines, f"  identity: {entry.identity or 'none'}"]
    version, family = fields["recipe"].split()
    lines.append(f"  model: {family} (recipe {version}) {fields['how']}".rstrip())
    lines += [f"  encoder: {files.name(digest)} ({digest})" for digest in fields["encoder"].split()]
    if entry.kind == "text":
        lines.append(f"  caption: {fields['caption']!r}")
    else:
        lines.append(f"  mirrored: {fields['flip'] == 'True'}; {fields['placement']}")
    pictures = fields["picture"].removeprefix("picture ").replace(" picture ", " ")
    return lines + [f"  picture: {files.name(digest)} ({digest})" for digest in pictures.split()[:1] if digest]
