"""What a dataset is made of: items, each a picture or a clip with all that belongs to it; the account of all files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.data.buckets import Placement

if TYPE_CHECKING:
    from library.data.clips import Clip, Cut
    from library.data.config import SubsetSpec
    from library.data.videos import Video

SHOWN, NAMED = 5, 20  # file names in one message: with what is wrong, without
BLANK = Placement((0, 0), (0, 0), 0, 0)  # before an item is placed


@dataclass(slots=True)
class Item:
    index: int
    file: str
    caption: str
    size: tuple[int, int]
    stat: tuple[int, int]
    subset: SubsetSpec
    dataset: int
    placement: Placement
    repeats: int
    is_reg: bool
    weight: float
    mask_path: Path | None = None
    controls: tuple[Path, ...] = ()  # control pictures, in their order
    control_sizes: tuple[tuple[int, int], ...] = ()  # as their files show them
    control_placements: tuple[Placement, ...] = ()  # how each becomes what the model sees
    clip: Clip | None = None  # of a video: which frames
    frames: int = 0  # of what is trained; 0 = a picture of a model that knows no time
    row: int = 0  # one number for all items of one file

    @property
    def path(self) -> Path:
        """Made when it is asked for: 20,000 Path objects cost more than listing their folder."""
        return Path(self.file)

    @property
    def bucket(self) -> tuple[int, ...]:
        """Sides of what is trained: items of one batch have equal ones."""
        return (*self.placement.bucket, self.frames) if self.frames else self.placement.bucket

    @property
    def control_buckets(self) -> tuple[tuple[int, int], ...]:
        """Sides of the control pictures; equal ones in a batch, too."""
        return tuple([placement.bucket for placement in self.control_placements]) if self.control_placements else ()


@dataclass
class Account:
    """What became of one video."""

    row: int
    dataset: int
    video: Video
    cut: Cut


@dataclass(frozen=True)
class Fault:
    """A file that cannot be trained on, and why."""

    file: str
    what: str  # "picture", "video", "folder": what it is
    reason: str  # "its caption 1.txt is empty"
    shared: str = ""  # where many files have the same fault: "have no control picture in before"
    hint: str = ""  # what to do about a shared one
    counted: bool = True  # among the files that were found; a folder that holds none is not


@dataclass
class Report:
    """In files: a video counts once, however many clips it gives."""

    found: int = 0
    trained: int = 0
    held_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> files
    notes: list[str] = field(default_factory=list)
    videos: list[Account] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)  # one for each file that cannot be used
    bad: Mapping[str, str] = field(default_factory=dict)  # file -> reason, of files whose header is good

    def drop(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count


def sentence(faults: Iterable[Fault]) -> str:
    """All faults in one sentence; the first of each kind by name."""
    faults = list(dict.fromkeys(faults))  # a file may belong to several datasets
    single, shared = [f for f in faults if not f.shared], [f for f in faults if f.shared]
    parts = []
    if single:
        kinds = {f.what for f in single}
        more = f"; and {len(single) - SHOWN} more" if len(single) > SHOWN else ""
        what = f"{kinds.pop()}s" if len(kinds) == 1 else "files"
        shown = "; ".join(f"{f.file}: {f.reason}" for f in single[:SHOWN])
        parts.append(f"{len(single)} {what} cannot be used: {shown}{more}")
    for text in dict.fromkeys(f.shared for f in shared):
        own = [f for f in shared if f.shared == text]
        hint = own[0].hint and f" ({own[0].hint})"
        parts.append(f"{len(own)} {own[0].what}s {text}: {names([Path(f.file).name for f in own], NAMED)}{hint}")
    return "; ".join(parts)


def names(paths: list[str], shown: int = SHOWN) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(paths) - shown} more" if len(paths) > shown else ""
    return ", ".join(paths[:shown]) + more
