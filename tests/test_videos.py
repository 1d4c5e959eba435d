"""Videos: which frames are trained, by the written rules of musubi-tuner's keys; and that exactly these are decoded."""

import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image
from test_data import options, picture
from video_support import number_of, pattern, write_video

from library.batches import Loader
from library.data import clips, images, videos
from library.data.config import SubsetSpec
from library.data.dataset import prepare
from library.errors import ConfigError, DatasetError
from library.families.family import FrameRule

RULE = FrameRule(multiple=4, offset=1, fps=16.0)
VIDEO = SimpleNamespace(
    title="Video",
    max_controls=0,
    least_controls=0,
    control_size=None,
    text_pictures=None,
    text_frame=None,
    frames=RULE,
    sizes=(),
)


# ---------------------------------------------------------------- arithmetic

FORTY = [  # the diagrams of musubi-tuner's documentation, 40 frames
    ("head", [1, 13, 25], {}, [(0, 1), (0, 13), (0, 25)]),
    ("chunk", [13, 25], {}, [(0, 13), (13, 13), (26, 13), (0, 25)]),
    ("slide", [1, 13, 25], {"frame_stride": 10},
     [(0, 1), (10, 1), (20, 1), (30, 1), (0, 13), (10, 13), (20, 13), (0, 25), (10, 25)]),
    ("uniform", [1, 13, 25], {"frame_sample": 4},
     [(0, 1), (13, 1), (26, 1), (39, 1), (0, 13), (9, 13), (18, 13), (27, 13), (0, 25), (5, 25), (10, 25), (15, 25)]),
    ("uniform", [13], {}, [(0, 13)]),
    ("full", [], {}, [(0, 37)]),
    ("full", [], {"max_frames": 31}, [(0, 29)]),
    ("head", [41], {}, []),
]  # fmt: skip


@pytest.mark.parametrize(("how", "target", "keys", "expected"), FORTY)
def test_clips_of_forty_frames_are_those_of_the_diagrams(how, target, keys, expected):
    subset = SubsetSpec(frame_extraction=how, target_frames=tuple(target), **keys)
    assert clips.windows(40, subset, RULE) == expected


def test_every_extraction_stays_inside_the_video_and_takes_lengths_that_the_model_takes():
    generator = random.Random(0)
    for rule in (RULE, FrameRule(8, 1, 25.0), FrameRule(1, 0, 24.0)):
        for _ in range(200):
            subset = SubsetSpec(
                frame_extraction=generator.choice(clips.EXTRACTIONS), frame_stride=generator.randint(1, 9),
                frame_sample=generator.randint(1, 6), max_frames=generator.randint(1, 60),
                target_frames=tuple(generator.randint(1, 50) for _ in range(2)),
            )  # fmt: skip
            count = generator.randint(1, 80)
            for start, frames in clips.windows(count, subset, rule):
                assert start >= 0 and start + frames <= count
                assert (frames - rule.offset) % rule.multiple == 0 and frames >= 1
                limit = subset.max_frames if subset.frame_extraction == "full" else max(subset.target_frames)
                assert frames <= limit


@pytest.mark.parametrize(
    ("source", "target"), [("30", "16"), ("25", "16"), ("23.976", "16"), ("60", "24"), ("29.97", "25")]
)
def test_frames_are_dropped_to_the_models_rate_as_musubi_counts_them(source, target):
    source, target = Fraction(source), Fraction(target)
    kept, before = [], -1
    for frame in range(500):  # a frame stays when its number on the model's clock is a new one
        now = int(frame * target / source)
        if now != before:
            kept.append(frame)
        before = now
    assert list(clips.dropped_to(500, source, target)) == kept
    assert list(clips.dropped_to(500, target, source)) == list(range(500))


def test_timestamps_give_the_nearest_frame_of_every_target_time():
    times = [Fraction(n * n, 1000) for n in range(60)]  # slower and slower
    order = clips.by_timestamps(times, Fraction(16))
    end = times[-1] + times[-1] / 59
    assert len(order) == -(-(end * 16) // 1)
    for k, chosen in enumerate(order):
        best = min(abs(time - Fraction(k, 16)) for time in times)
        assert abs(times[chosen] - Fraction(k, 16)) == best
        assert all(abs(time - Fraction(k, 16)) > best for time in times[:chosen])  # of equals the earlier
    constant = [Fraction(n, 32) for n in range(64)]
    assert clips.by_timestamps(constant, Fraction(16)) == list(range(0, 64, 2))


# ---------------------------------------------------------------- files

CODECS = {
    "a.mp4": {}, "b.mkv": {}, "c.avi": {"codec": "mpeg4"}, "d.mov": {"codec": "prores_ks", "pixels": "yuv422p10le"},
    "e.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8"}, "f.ts": {}, "g.flv": {},
    "h.mpg": {"codec": "mpeg2video"}, "i.wmv": {"codec": "wmv2"}, "j.mp4": {"codec": "libx265"},
    "k.gif": {"codec": "gif", "pixels": "rgb8", "rate": 25}, "l.mkv": {"codec": "ffv1", "pixels": "bgr0"},
}  # fmt: skip


@pytest.mark.parametrize("name", CODECS)
def test_every_container_gives_its_frames_by_number(tmp_path, name):
    path = write_video(tmp_path / name, 50, **CODECS[name])
    video = videos.probe(str(path))
    assert (video.frames, video.size, video.fps) == (50, (64, 64), CODECS[name].get("rate", 30))
    assert [number_of(frame) for frame in videos.read(video, range(50))] == list(range(50))
    wanted = sorted(random.Random(0).sample(range(50), 12) + [30, 30])
    assert [number_of(frame) for frame in videos.read(video, wanted)] == wanted


def test_pixels_and_count_are_those_of_opencv(tmp_path):
    generator = np.random.default_rng(0)
    frames = [cv2.resize(generator.integers(0, 255, (6, 8, 3), np.uint8), (96, 64)) for _ in range(20)]
    path = write_video(tmp_path / "a.mp4", frames, crf="1")
    ours = list(videos.read(videos.probe(str(path)), range(20)))
    capture = cv2.VideoCapture(str(path))
    for frame in ours:
        good, other = capture.read()
        assert good and np.abs(frame.astype(int) - other[..., ::-1].astype(int)).mean() < 1.5
    assert not capture.read()[0]


@pytest.mark.parametrize("gop", ["open", "closed"])
def test_a_jump_into_a_long_video_gives_the_very_frames_of_reading_it_through(tmp_path, gop):
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(20)]
    frames = [noise[n % 20] // 2 + pattern(n, (64, 48)) // 2 for n in range(300)]
    extra = {"x264-params": f"open-gop={int(gop == 'open')}:bframes=4:b-pyramid=normal:keyint=50"}
    video = videos.probe(str(write_video(tmp_path / "a.mp4", frames, **extra)))
    whole = list(videos.read(video, range(300)))
    for first in range(0, 298, 3):
        two = list(videos.read(video, [first, first + 2]))
        assert (two[0] == whole[first]).all() and (two[1] == whole[first + 2]).all()


def test_a_variable_rate_is_seen_and_resampled_by_its_own_times(tmp_path):
    times = [n * n for n in range(60)]
    for name in ("a.mp4", "b.mkv"):
        video = videos.probe(str(write_video(tmp_path / name, 60, times=times)))
        assert "variable rate" in video.remarks and abs(float(video.fps) - 59 / 3.481) < 0.01
        cut = clips.cut(video, SubsetSpec(fps_resample_mode="timestamps", frame_extraction="full"), RULE)
        clip = clips.Clip(video, cut.order, 0, cut.windows[0][1], cut.fps)
        shown = [number_of(frame) for frame in videos.read(video, clip.sources)]
        assert shown == [min(range(60), key=lambda n: (abs(times[n] - 1000 * k / 16), n)) for k in range(len(shown))]
        assert len(shown) == 53 and shown != sorted(set(shown)) or shown[1] == 8
    constant = videos.probe(str(write_video(tmp_path / "c.mkv", 30, rate=Fraction(30000, 1001))))
    assert constant.fps == Fraction(30000, 1001) and not constant.remarks


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotation_and_mirroring_of_the_file_are_applied(tmp_path, degrees, mirrored):
    corner = np.zeros((64, 96, 3), np.uint8)
    corner[:20, :30] = (255, 0, 0)
    corner[:20, 60:] = (0, 255, 0)
    path = write_video(tmp_path / "a.mp4", [corner] * 3, turn=(degrees, mirrored))
    video = videos.probe(str(path))
    expected = np.rot90(corner, degrees // 90)
    expected = expected[:, ::-1] if mirrored else expected
    frame = next(videos.read(video, [1]))
    assert frame.shape == expected.shape == (*video.size[::-1], 3)
    assert np.abs(frame.astype(int) - expected.astype(int)).mean() < 12
    if not mirrored:  # OpenCV turns, but does not mirror
        other = cv2.VideoCapture(str(path)).read()[1][..., ::-1]
        assert np.abs(frame.astype(int) - other.astype(int)).mean() < 3


def test_odd_sizes_deep_colours_and_pixels_that_are_not_square(tmp_path):
    odd = videos.probe(str(write_video(tmp_path / "a.mp4", 5, size=(67, 45), pixels="yuv444p")))
    assert odd.size == (67, 45) and [number_of(f) for f in videos.read(odd, range(5))] == list(range(5))
    wide = videos.probe(str(write_video(tmp_path / "b.mp4", 5, size=(48, 64), aspect=Fraction(4, 3))))
    assert wide.size == (64, 64) and "pixels not square" in wide.remarks
    turned = videos.probe(str(write_video(tmp_path / "c.mp4", 5, size=(48, 64), aspect=Fraction(2), turn=(90, False))))
    assert turned.size == (64, 96)
    deep = write_video(tmp_path / "d.mkv", 5, codec="libx265", pixels="yuv420p10le")
    assert [number_of(f) for f in videos.read(videos.probe(str(deep)), range(5))] == list(range(5))


@pytest.mark.parametrize(("matrix", "tag"), [("ITU709", 1), ("ITU601", 6)])
def test_colours_are_those_that_the_file_says(tmp_path, matrix, tag):
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width = stream.height = 64
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, 1
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (200, 30, 60), np.uint8), format="rgb24")
            into = {"dst_colorspace": Colorspace[matrix], "dst_color_range": ColorRange.MPEG}
            frame = frame.reformat(format="yuv420p", **into)
            frame.colorspace, frame.color_range = tag, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    seen = next(videos.read(videos.probe(str(tmp_path / "a.mp4")), [1]))
    assert np.abs(seen.astype(int) - (200, 30, 60)).max() <= 3
    videos.write(tmp_path / "b.mp4", np.full((2, 64, 64, 3), (200, 30, 60), np.uint8), 10)
    again = next(videos.read(videos.probe(str(tmp_path / "b.mp4")), [1]))
    assert np.abs(again.astype(int) - (200, 30, 60)).max() <= 3


def test_what_is_worth_knowing_of_a_file_is_remarked(tmp_path):
    params = "log-level=0:transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"
    hdr = write_video(tmp_path / "a.mp4", 3, codec="libx265", pixels="yuv420p10le", **{"x265-params": params})
    assert videos.probe(str(hdr)).remarks == ("PQ colours as they are",)
    laced = write_video(tmp_path / "b.mp4", 4, **{"x264-params": "interlaced=1"})
    assert videos.probe(str(laced)).remarks == ("interlaced",)


ALPHA = {
    "a.mov": {"codec": "prores_ks", "pixels": "yuva444p10le"}, "b.mov": {"codec": "qtrle", "pixels": "argb"},
    "c.mkv": {"codec": "ffv1", "pixels": "bgra"}, "d.webm": {"codec": "libvpx-vp9", "pixels": "yuva420p"},
}  # fmt: skip


@pytest.mark.parametrize("name", ALPHA)
def test_alpha_is_composed_on_white(tmp_path, name):
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:32] = (10, 200, 30, 255)
    video = videos.probe(str(write_video(tmp_path / name, [rgba] * 4, **ALPHA[name])))
    for frame in videos.read(video, range(4)):
        assert np.abs(frame[:30].astype(int) - (10, 200, 30)).max() < 12 and frame[34:].min() > 245


# ---------------------------------------------------------------- faults


def cut_off(path: Path, part: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 10 : len(data) * 7 // 10] = bytes(len(data) * 7 // 10 - len(data) * 3 // 10)
    path.write_bytes(data)


def noisy(path: Path, **options) -> Path:
    generator = np.random.default_rng(0)
    return write_video(path, [generator.integers(0, 255, (64, 64, 3), np.uint8) for _ in range(60)], **options)


def test_all_broken_and_truncated_videos_are_named_at_once(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    good = write_video(folder / "good.mp4", 20)
    cut_off(noisy(folder / "cut.mp4"), 0.6)
    cut_off(noisy(folder / "cut.mkv"), 0.6)
    cut_off(noisy(folder / "cut.avi", codec="mpeg4"), 0.6)
    overwritten(noisy(folder / "bad.mp4"))
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mp4").write_bytes(b"")
    for path in folder.iterdir():
        path.with_suffix(".txt").write_text("a caption", encoding="utf-8")
    from library.data.scan_videos import scan_folder

    found = {Path(one.path).name: one for one in scan_folder(folder, ".txt", None)[0]}
    assert {name for name, one in found.items() if one.problem} == set(found) - {good.name}
    assert found["good.mp4"].video.frames == 20 and "cut off" in found["cut.mkv"].problem
    with pytest.raises(DatasetError, match=r"6 videos cannot be used: .*bad\.mp4: .*cut\.avi: ") as error:
        prepared(tmp_path, folder)
    assert "empty.mp4" in str(error.value) and "text.mp4" not in str(error.value)  # five names in a message


def test_a_file_that_changed_after_it_was_looked_at_is_named(tmp_path):
    video = videos.probe(str(write_video(tmp_path / "a.mp4", 60)))
    write_video(tmp_path / "a.mp4", 20)
    with pytest.raises(DatasetError, match=r"a\.mp4: its frame 40 cannot be decoded"):
        list(videos.read(video, [10, 40]))
    cut_off(tmp_path / "a.mp4", 0.5)
    with pytest.raises(DatasetError, match=r"a\.mp4 cannot be decoded"):
        list(videos.read(video, [1]))


# ---------------------------------------------------------------- datasets


def prepared(tmp_path, folder, extra="", head="resolution = 64\nbatch_size = 2\n", family=VIDEO, **changes):
    text = f"[[datasets]]\n{head}[[datasets.subsets]]\nvideo_directory = {json.dumps(str(folder))}\n"
    (tmp_path / "data.toml").write_text(f"{text}caption_extension = '.txt'\n{extra}", encoding="utf-8")
    return prepare(options(dataset_config=str(tmp_path / "data.toml"), **changes), family, 16)


@pytest.fixture
def folder(tmp_path):
    """long.mp4 of 40 frames at 30, short.mkv of 14 at 16, and the frame folder `still` of 6."""
    target = tmp_path / "clips"
    (target / "still").mkdir(parents=True)
    write_video(target / "long.mp4", 40)
    write_video(target / "short.mkv", 14, rate=16)
    for n in range(6):
        Image.fromarray(pattern(n)).save(target / "still" / f"frame_{n + 5}.png")  # frame_5 ... frame_10
    for name in ("long", "short", "still"):
        (target / f"{name}.txt").write_text(f"a video of {name}", encoding="utf-8")
    return target


def shown(item):
    """The numbers that the pixels of an item show."""
    return [number_of(frame) for frame in images.load(item, random.Random(0), flip=False).pixels]


def test_the_pixels_of_every_clip_are_exactly_the_frames_of_the_rules(tmp_path, folder):
    data = prepared(tmp_path, folder, "target_frames = [5, 13]\nframe_extraction = 'chunk'\n")
    found = [(i.path.name, i.clip.start, shown(i)) for i in data.items]
    expected = [("long.mp4", s, list(range(s, s + 5))) for s in range(0, 40, 5)]
    expected += [("long.mp4", s, list(range(s, s + 13))) for s in (0, 13, 26)]
    expected += [("short.mkv", 0, [0, 1, 2, 3, 4]), ("short.mkv", 5, [5, 6, 7, 8, 9])]
    expected += [("short.mkv", 0, list(range(13))), ("still", 0, [0, 1, 2, 3, 4])]
    assert found == expected
    assert {i.caption for i in data.items} == {"a video of long", "a video of short", "a video of still"}
    resampled = prepared(tmp_path, folder, "target_frames = 9\nsource_fps = 30.0\n")
    kept = [n for n in range(40) if int(n * 16 / 30) != int((n - 1) * 16 / 30) or n == 0]
    assert [shown(i) for i in resampled.items if i.path.name == "long.mp4"] == [kept[:9]]
    assert resampled.items[0].clip.fps == 16


def test_clips_are_batched_by_size_and_frames_and_pictures_are_clips_of_one_frame(tmp_path, folder):
    write_video(folder / "wide.mp4", 20, size=(128, 64))
    (folder / "wide.txt").write_text("wide", encoding="utf-8")
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        picture(tmp_path / "pictures" / f"{n}.png")
    head = "resolution = 64\nbatch_size = 2\nenable_bucket = true\nbucket_reso_steps = 16\nmin_bucket_reso = 32\n"
    extra = "target_frames = [1, 5, 9]\n[[datasets.subsets]]\nimage_dir = 'pictures'\nclass_tokens = 'thing'\n"
    data = prepared(tmp_path, folder, extra, head)
    small = min((w, h) for w, h, _ in {i.bucket for i in data.items} if w > h)
    assert {plan.bucket for plan in data.batches(0)} == {
        *((64, 64, frames) for frames in (1, 5, 9)), *((*small, frames) for frames in (1, 5, 9))
    }  # fmt: skip

    def load(item, rng):
        return SimpleNamespace(tensor=images.to_tensor(images.load(item, rng).pixels), mask=None, extra=None)

    loader = Loader(data, load, seed=1, accumulation=1, max_steps=len(data.batches(0)))
    for step in loader(0):
        (batch,) = step.batches
        width, height, frames = batch.items[0].bucket
        assert batch.pictures.shape == (len(batch.items), 3, frames, height, width)
        for item, pixels in zip(batch.items, batch.pictures, strict=True):
            if item.clip and item.path.name != "wide.mp4":
                numbers = [number_of((frame.movedim(0, -1).numpy() + 1) * 127.5) for frame in pixels.movedim(1, 0)]
                assert numbers == list(range(item.clip.start, item.clip.start + frames))


def test_flips_crops_and_colours_are_the_same_for_all_frames_of_a_clip(tmp_path, folder):
    (item, *_) = prepared(tmp_path, folder, "target_frames = 9\nflip_aug = true\n").items
    straight, mirrored = (images.load(item, random.Random(0), flip=f).pixels for f in (False, True))
    assert (mirrored == straight[:, :, ::-1]).all()
    write_video(tmp_path / "grey.mp4", [np.full((64, 160, 3), 100, np.uint8)] * 9)
    lines = [{"video_path": "grey.mp4", "caption": "grey"}]
    moving = from_lines(tmp_path, lines, "target_frames = 9\nrandom_crop = true\ncolor_aug = true\n")
    for seed in range(6):
        pixels = images.load(moving.items[0], random.Random(seed)).pixels
        assert (pixels == pixels[:1]).all() and pixels.shape == (9, 64, 64, 3)


def from_lines(tmp_path, lines, extra="", suffix="jsonl", family=VIDEO):
    path = tmp_path / f"meta.{suffix}"
    path.write_text("\n".join(map(json.dumps, lines)) if suffix == "jsonl" else json.dumps(lines), encoding="utf-8")
    key = "video_jsonl_file" if suffix == "jsonl" else "metadata_file"
    text = f"[[datasets]]\nresolution = 64\n{key} = {json.dumps(str(path))}\n{extra}"  # musubi's form
    (tmp_path / "m.toml").write_text(text, encoding="utf-8")
    return prepare(options(dataset_config=str(tmp_path / "m.toml")), family, 16)


def test_metadata_files_hold_videos_frame_folders_and_pictures_together(tmp_path, folder):
    picture(tmp_path / "p.png")
    lines = [{"video_path": "clips/long.mp4", "caption": "one"}, {"video_path": "clips/still", "caption": "two"}]
    lines += [{"image_path": "p.png", "caption": "three"}]
    data = from_lines(tmp_path, lines, "target_frames = [5]\n")
    assert [(i.caption, i.frames, i.clip is not None) for i in data.items] == [
        ("one", 5, True), ("two", 5, True), ("three", 1, False)
    ]  # fmt: skip
    table = {line.get("video_path") or line["image_path"]: line["caption"] for line in lines}
    assert [i.caption for i in from_lines(tmp_path, table, "target_frames = 5\n", "json").items] == [
        "one",
        "two",
        "three",
    ]
    with pytest.raises(DatasetError, match=r"clips/gone\.mp4 is not found"):
        from_lines(tmp_path, [{"video_path": "clips/gone.mp4", "caption": "x"}])
    with pytest.raises(DatasetError, match="a video has no control pictures"):
        from_lines(tmp_path, [{"video_path": "clips/long.mp4", "caption": "x", "control_path": "p.png"}])


def test_frame_folders_are_in_natural_order_and_of_one_size(tmp_path, folder):
    (item,) = (i for i in prepared(tmp_path, folder, "target_frames = 5\n").items if i.path.name == "still")
    assert shown(item) == [0, 1, 2, 3, 4] and item.clip.fps is None
    Image.fromarray(pattern(9, (32, 64))).save(folder / "still" / "frame_11.png")
    with pytest.raises(DatasetError, match=r"still: its frames are not of one size: frame_11\.png is 32x64, not 64x64"):
        prepared(tmp_path, folder, "target_frames = 5\n")
    (folder / "still" / "frame_11.png").unlink()
    with pytest.raises(DatasetError, match=r"still: it has no usable timestamps"):
        prepared(tmp_path, folder, "target_frames = 5\nfps_resample_mode = 'timestamps'\n")


def test_the_table_says_of_every_video_what_is_used_what_not_and_why(tmp_path, folder):
    extra = "target_frames = [9, 13]\nframe_extraction = 'chunk'\nsource_fps = 30.0\n"
    data = prepared(tmp_path, folder, extra)
    lines = data.print_table().splitlines()
    assert lines[0] == "videos: found 3 = trained 1 + held out 0 + dropped 2"
    assert lines[1] == "  dropped 2: videos that are shorter than every clip that was asked for"
    rows = {line.split()[0]: line.split(maxsplit=0)[0] for line in lines if line.startswith("  ")}
    assert rows["long.mp4"].split() == "long.mp4 30 x 40 16 x 21 2 of 9 + 1 of 13 3 64x64".split()
    assert rows["short.mkv"].split()[:11] == "short.mkv 16 x 14 16 x 7 none 7 - source_fps".split()[:11]
    assert "left out: 9, 13 frames of 7" in rows["short.mkv"] and "? x 6" in rows["still"]
    plain = prepared(tmp_path, folder, "target_frames = [8, 21]\n").print_table()
    assert "target_frames 8 become 5, which the model takes" in plain
    assert "2 videos are not at the model's 16 fps and trained frame by frame" in plain
    assert "no clip of 21 frames of 14" in plain
    assert "one frame of each video is trained" in prepared(tmp_path, folder).print_table()


def test_a_held_out_video_is_held_out_with_all_of_its_clips(tmp_path, folder):
    head = "resolution = 64\nvalidation_split = 0.34\n"
    data = prepared(tmp_path, folder, "target_frames = 5\nframe_extraction = 'slide'\n", head)
    assert not {i.file for i in data.items} & {i.file for i in data.validation} and data.validation
    r = data.report
    assert (r.found, r.trained, r.held_out, sum(r.dropped.values())) == (3, 2, 1, 0)
    assert "held out" in data.print_table()


def test_a_second_start_decodes_nothing_and_a_changed_video_is_noticed(tmp_path, folder, monkeypatch):
    first = prepared(tmp_path, folder, "target_frames = 5\n")
    with monkeypatch.context() as patch:
        patch.setattr(videos, "probe", lambda path: pytest.fail(f"{path} was decoded"))
        second = prepared(tmp_path, folder, "target_frames = 5\n")
    assert [i.clip.video for i in first.items] == [i.clip.video for i in second.items]
    write_video(folder / "short.mkv", 30, rate=16)
    third = prepared(tmp_path, folder, "target_frames = 5\n")
    assert [a.video.frames for a in third.report.videos] == [40, 30, 6]


MISTAKES = {
    "frame_extraction = 'chunks'\n": "did you mean 'chunk'",
    "target_frame = [5]\n": "did you mean 'target_frames'",
    "target_frames = [0]\n": "is not a whole number or a list of them",
    "frame_stride = 0\n": "frame_stride 0 is below 1",
    "source_fps = 0\n": "source_fps 0 is not above 0",
    "source_fps = 30.0\nfps_resample_mode = 'timestamps'\n": "source_fps is not read with",
    "fps_resample_mode = 'nearest'\n": "is not known",
    "image_dir = 'x'\n": "are two subsets",
    "control_directory = 'x'\n": "belongs to pictures",
    "alpha_mask = true\n": "belongs to pictures",
}


@pytest.mark.parametrize("extra", MISTAKES)
def test_mistakes_in_the_description_are_named(tmp_path, folder, extra):
    with pytest.raises(ConfigError, match=MISTAKES[extra]):
        prepared(tmp_path, folder, extra)


def test_a_model_of_pictures_refuses_videos(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"long\.mp4 is a video, and this model makes pictures"):
        prepared(
            tmp_path,
            folder,
            family=SimpleNamespace(**vars(VIDEO) | {"title": "P", "frames": None}),
        )


def test_a_model_that_needs_motion_refuses_pictures_and_single_frames_by_name(tmp_path, folder):
    family = SimpleNamespace(**vars(VIDEO) | {"frames": FrameRule(4, 1, 16.0, least=5)})
    (tmp_path / "pictures").mkdir()
    assert prepared(tmp_path, folder, "target_frames = 5\n", family=family).items
    picture(tmp_path / "pictures" / "p.png")
    extra = "[[datasets.subsets]]\nimage_dir = 'pictures'\nclass_tokens = 'x'\n"
    with pytest.raises(DatasetError, match=r"at least 5 frames; p\.png: pictures"):
        prepared(tmp_path, folder, f"target_frames = 5\n{extra}", family=family)
    with pytest.raises(DatasetError, match=r"at least 5 frames; long\.mp4, short\.mkv, still"):
        prepared(tmp_path, folder, "target_frames = [1, 5]\n", family=family)


# ---------------------------------------------------------------- preview, memory


def test_the_preview_holds_exactly_the_frames_that_are_trained(tmp_path, folder):
    from library.data.preview import write_preview

    picture(tmp_path / "p.png")
    (tmp_path / "l.jsonl").write_text(json.dumps({"image_path": str(tmp_path / "p.png"), "caption": "p"}))
    extra = "target_frames = 9\nframe_extraction = 'chunk'\nsource_fps = 30\n"
    extra += f"[[datasets.subsets]]\nmetadata_file = {json.dumps(str(tmp_path / 'l.jsonl'))}\n"
    data = prepared(tmp_path, folder, extra, "resolution = 64\n")
    assert write_preview(data, tmp_path / "preview") == 3
    for item in data.items:
        pixels = images.load(item, random.Random(0), flip=False).pixels
        if item.clip is None:
            (path,) = (tmp_path / "preview").glob("*_p.png")
            assert (np.asarray(Image.open(path)) == pixels[0]).all()
            continue
        stem = tmp_path / "preview" / f"{item.index:04d}_long_{item.clip.start:05d}-009"
        frames = sorted(stem.iterdir())
        assert all((np.asarray(Image.open(p)) == one).all() for p, one in zip(frames, pixels, strict=True))
        playing = videos.probe(str(stem.with_suffix(".mp4")))
        assert playing.fps == 16 and [number_of(f) for f in videos.read(playing, range(9))] == shown(item)
        assert stem.with_suffix(".txt").read_text() == "a video of long"


PEAK = """
import sys
sys.path.insert(0, "tests")
from library.data import clips, images, videos
from library.data.config import SubsetSpec
from library.families.family import FrameRule
from video_support import number_of
def peak():  # not ru_maxrss, which a process inherits
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
list(videos.read(videos.probe(sys.argv[2]), [500]))  # what the library itself takes
before = peak()
video = videos.probe(sys.argv[1])
cut = clips.cut(video, SubsetSpec(frame_extraction="chunk", target_frames=(81,), source_fps=30), FrameRule(4, 1, 16.0))
seen = 0
for start, frames in cut.windows[:: len(cut.windows) // 3]:
    for number, frame in zip(cut.order[start : start + frames], videos.read(video, list(cut.order[start : start + frames]))):
        assert number_of(frame) == number % 600, (number, number_of(frame))
        seen += 1
print(video.frames, len(cut.windows), seen, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_stays_bounded_on_a_video_of_ten_minutes(tmp_path):
    import av

    short, path = write_video(tmp_path / "s.mp4", 600, size=(160, 90), preset="ultrafast", bf="0"), tmp_path / "l.mp4"
    with av.open(str(short)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        step = packets[1].pts - packets[0].pts
        data = [(bytes(packet), packet.is_keyframe, packet.time_base) for packet in packets]
        for n in range(18000):  # ten minutes at 30 a second; all frames as RGB would be 780 MB
            packet = av.Packet(data[n % 600][0])
            packet.stream, packet.time_base, packet.is_keyframe = stream, data[n % 600][2], data[n % 600][1]
            packet.pts = packet.dts = n * step
            packet.duration = step
            target.mux(packet)
    command = [sys.executable, "-c", PEAK, str(path), str(short)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr[-2000:]
    frames, windows, seen, kilobytes = map(int, run.stdout.split())
    assert (frames, windows) == (18000, 9600 // 81) and seen >= 3 * 81
    assert kilobytes < 64 * 1024, f"{kilobytes / 1024:.0f} MiB"
