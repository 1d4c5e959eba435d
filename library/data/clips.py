"""Which frames of a video are trained: resampled to the model's rate, then cut into clips of lengths that it takes.

Pure arithmetic on frame numbers, by musubi-tuner's rules: `target_frames`, `frame_extraction` (head, chunk, slide,
uniform, full), `frame_stride`, `frame_sample`, `max_frames`, `source_fps`, `fps_resample_mode`; and `longest`, the
rule of diffusion-pipe: the first frames, as many as the greatest of `target_frames` that the video fills.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.data.config import SubsetSpec
    from library.data.videos import Video
    from library.families.family import FrameRule

EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full", "longest")
TIMESTAMPS = "timestamps"
Window = tuple[int, int]  # first frame of the resampled video, number of frames


@dataclass(frozen=True, slots=True)
class Clip:
    """Consecutive frames of a resampled video."""

    video: Video
    order: Sequence[int]  # the file's frame of every frame of the resampled video
    start: int
    frames: int
    fps: float | None  # at which the frames follow each other; None: unknown, a folder of frames

    @property
    def sources(self) -> list[int]:
        """The file's frames, ascending; one is there twice where the file is slower than the model."""
        return list(self.order[self.start : self.start + self.frames])


@dataclass
class Cut:
    """What a video gives: its clips, and what is not used of it and why."""

    order: Sequence[int]
    fps: float | None
    windows: list[Window]
    remarks: list[str] = field(default_factory=list)

    @property
    def unused(self) -> int:
        """Frames of the resampled video that are in no clip."""
        return len(self.order) - len({k for start, frames in self.windows for k in range(start, start + frames)})


def cut(video: Video, subset: SubsetSpec, rule: FrameRule) -> Cut:
    """The clips of a video. Raises ValueError where its timestamps are asked for and cannot be used."""
    order, fps = _resampled(video, subset, rule)
    found = windows(len(order), subset, rule)
    clips = Cut(order, fps, found, list(video.remarks))
    if subset.source_fps and video.fps and abs(float(video.fps) / subset.source_fps - 1) > 0.02:
        clips.remarks.append(f"source_fps {subset.source_fps:g} is not the file's rate")
    if subset.frame_extraction == "full":
        if not found:
            clips.remarks.append(f"left out: {len(order)} frames are fewer than the model takes")
        return clips
    lost = [frames for frames in targets(subset, rule) if frames > len(order)]
    if lost and not (subset.frame_extraction == "longest" and found):
        which = "left out: " if len(lost) == len(targets(subset, rule)) else "no clip of "
        clips.remarks.append(f"{which}{', '.join(map(str, lost))} frames of {len(order)}")
    return clips


def notes(videos: Sequence[Video], subset: SubsetSpec, rule: FrameRule) -> list[str]:
    """What a user may not expect of a subset's videos, one sentence each."""
    said, given, where = [], subset.target_frames, subset.source
    if not videos:
        return said
    if subset.frame_extraction != "full":
        if not given:
            said.append(f"{where}: target_frames is not given, so one frame of each video is trained")
        if rounded := [frames for frames in given if rule.fit(frames) != frames]:
            fitted = ", ".join(str(rule.fit(frames)) for frames in rounded)
            said.append(f"{where}: target_frames {', '.join(map(str, rounded))} become {fitted}, which the model takes")
        if subset.frame_extraction == "chunk" and 1 in targets(subset, rule):
            said.append(f"{where}: 1 in target_frames with frame_extraction chunk makes a picture of every frame")
    if subset.source_fps is not None and subset.source_fps < rule.fps:
        said.append(f"{where}: source_fps {subset.source_fps:g} is below the model's {rule.fps:g}: all frames stay")
    if subset.source_fps is None and subset.fps_resample_mode is None:
        others = [video for video in videos if video.fps is None or abs(float(video.fps) / rule.fps - 1) > 0.02]
        if others:
            said.append(
                f"{where}: {len(others)} videos are not at the model's {rule.fps:g} fps and trained frame by frame, "
                'which changes their speed; fps_resample_mode = "timestamps" or source_fps keeps it'
            )
    return said


def _resampled(video: Video, subset: SubsetSpec, rule: FrameRule) -> tuple[Sequence[int], float | None]:
    target = Fraction(str(rule.fps))
    if subset.fps_resample_mode == TIMESTAMPS:
        return by_timestamps(video.times(), target), rule.fps
    if subset.source_fps is None:
        return range(video.frames), None if video.fps is None else float(video.fps)
    source = Fraction(str(subset.source_fps))
    return dropped_to(video.frames, source, target), float(min(source, target))


def dropped_to(count: int, source: Fraction, target: Fraction) -> Sequence[int]:
    """The frames that stay when `source` a second become `target`: the first one at or after every target time.

    None is ever repeated: a source that is slower than the target stays as it is.
    """
    if source <= target:
        return range(count)
    return [math.ceil(k * source / target) for k in range(math.floor((count - 1) * target / source) + 1)]


def by_timestamps(times: Sequence[Fraction], target: Fraction) -> list[int]:
    """The frame nearest to every target time from the first frame to the end of the last; of equals the earlier.

    Times are in seconds from the first frame, ascending. The last frame lasts as long as the frames do on average.
    """
    last = times[-1] / (len(times) - 1) if len(times) > 1 else Fraction(1) / target
    out = []
    for k in range(max(1, math.ceil((times[-1] + last) * target))):
        right = bisect_left(times, k / target)
        near = [n for n in (right - 1, right) if 0 <= n < len(times)]
        out.append(min(near, key=lambda n: abs(times[n] - k / target)))
    return out


def targets(subset: SubsetSpec, rule: FrameRule) -> list[int]:
    """target_frames, each rounded down to what the model takes, ascending."""
    return sorted({rule.fit(frames) for frames in subset.target_frames or (1,)} - {0})


def windows(count: int, subset: SubsetSpec, rule: FrameRule) -> list[Window]:
    """The clips of a video of `count` frames, as (first frame, frames)."""
    if subset.frame_extraction == "full":
        frames = rule.fit(min(count, subset.max_frames))
        return [(0, frames)] if frames else []
    possible = [frames for frames in targets(subset, rule) if frames <= count]
    return [
        (start, frames)
        for frames in (possible[-1:] if subset.frame_extraction == "longest" else possible)
        for start in _starts(count - frames, frames, subset)
    ]


def _starts(room: int, frames: int, subset: SubsetSpec) -> list[int]:
    """First frames of the clips of one length; the last possible one is `room`."""
    if subset.frame_extraction == "chunk":
        return list(range(0, room + 1, frames))
    if subset.frame_extraction == "slide":
        return list(range(0, room + 1, subset.frame_stride))
    if subset.frame_extraction == "uniform" and subset.frame_sample > 1:
        count = min(subset.frame_sample, room + 1)  # more are not different ones
        return sorted({k * room // max(1, count - 1) for k in range(count)})
    return [0]
