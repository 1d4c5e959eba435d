"""The data doctor: each fault planted and found by name, nothing found in sound data, nothing decoded twice."""

import base64
import html
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_data import options
from training_support import ROOT, arguments, pictures, toy, train  # noqa: F401
from video_support import write_video

from library.data import decoded, doctor, findings, images, scan, videos
from library.errors import DatasetError
from tools import check_dataset

HEAD = "[[datasets]]\nresolution = 256\nbatch_size = 1\n"


def scene(seed: int, size=(256, 256)) -> Image.Image:
    """A smooth picture that is unlike any of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Three sound pictures with captions."""
    target = tmp_path / "own"
    target.mkdir()
    for k in range(3):
        put(target / f"{k}.png", scene(k))
    return target


def put(path: Path, picture: Image.Image, caption: str | None = None, **save) -> Path:
    picture.save(path, **save)
    path.with_suffix(".txt").write_text(caption or f"a scene {path.stem}", encoding="utf-8")
    return path


def examined(folder: Path, subset="", head=HEAD, collect=True, **changes):
    place = folder.parent / "data.toml"
    text = f"{head}[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\ncaption_extension = '.txt'\n{subset}"
    place.write_text(text, encoding="utf-8")
    return doctor.examine(options(dataset_config=str(place), **changes), None, 8, collect=collect)


def faults(folder: Path, *extra, **changes) -> dict[str, str]:
    report = examined(folder, *extra, **changes).dataset.report
    return {Path(fault.file).name: fault.reason for fault in report.faults}


def found(folder: Path, *extra, **changes) -> dict[str, list[tuple[str, str]]]:
    out = {}
    for one in examined(folder, *extra, **changes).findings:
        out.setdefault(one.kind, []).append((Path(one.file).name, one.text))
    return out


# ---------------------------------------------------------------- what cannot be used


def damaged(folder: Path) -> dict[str, str]:
    """One file of every kind of damage -> a part of what is to be said of it."""
    whole = (folder / "0.png").read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 0xFF
    contents = {
        "cut.png": whole[: len(whole) // 2], "flipped.png": bytes(middle), "empty.jpg": b"", "text.webp": b"what",
        "page.png": b"<!DOCTYPE html><html>not found", "lfs.png": b"version https://git-lfs.github.com/spec/v1\n",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    put(folder / "latin.png", scene(7)).with_suffix(".txt").write_bytes("café".encode("latin-1"))
    put(folder / "long.png", scene(11)).with_suffix(".txt").write_bytes(b"a" * (scan.LONGEST + 1))
    put(folder / "silent.png", scene(8)).with_suffix(".txt").write_text(" \n", encoding="utf-8")
    put(folder / "mute.png", scene(9)).with_suffix(".txt").unlink()
    put(folder / "other.png", scene(10)).with_suffix(".txt").rename(folder / "other.caption")
    return {
        "cut.png": "cannot be decoded", "flipped.png": "cannot be decoded", "empty.jpg": "it is empty",
        "text.webp": "header cannot be read", "page.png": "a web page", "lfs.png": "Git LFS",
        "script.png": "header cannot be read", "folder.png": "no regular file", "pipe.png": "no regular file",
        "link.png": "cannot be read", "latin.png": "not UTF-8", "long.png": "which is no caption", "silent.png": "is empty", "mute.png": "is missing",
        "other.png": "set caption_extension = '.caption'",
    }  # fmt: skip


def test_every_damaged_file_is_named_at_once_and_the_others_are_trained_with_skip_bad(folder):
    expected = damaged(folder)
    said = faults(folder)
    assert set(said) == set(expected)
    for name, part in expected.items():
        assert part in said[name], (name, said[name])
    with pytest.raises(DatasetError, match=f"{len(expected)} pictures cannot be used: .*--skip_bad"):
        examined(folder, collect=False)
    data = examined(folder, collect=False, skip_bad=True).dataset
    assert {item.path.name for item in data.items} == {"0.png", "1.png", "2.png"}
    report = data.report
    assert report.found == report.trained + sum(report.dropped.values()) == 3 + len(expected)
    assert all(any(name in note for note in report.notes) for name in expected)


def test_missing_and_empty_folders_and_lost_files_of_metadata_are_named_with_all_others(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (folder / "2.png").write_bytes(b"no")
    lines = ({"image_path": str(folder / "0.png"), "caption": "here"}, {"image_path": "gone.png", "caption": "lost"})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "broken.json").write_text("{")
    others = [f"image_dir = '{tmp_path / name}'" for name in ("nowhere", "empty")]
    others += [f"metadata_file = '{tmp_path / name}'" for name in ("list.jsonl", "broken.json", "none.json")]
    more = "".join(f"[[datasets.subsets]]\n{one}\ncaption_extension = '.txt'\n" for one in others)
    parts = {
        "2.png": "header cannot be read", "nowhere": "no such folder", "empty": "there is no picture in it",
        "gone.png": "gone.png is not found", "broken.json": "is not valid", "none.json": "No such file",
    }  # fmt: skip
    said = faults(folder, more)
    assert set(said) == set(parts) and all(part in said[name] for name, part in parts.items()), said
    with pytest.raises(DatasetError) as error:
        examined(folder, more, collect=False)
    assert str(error.value).startswith("6 files cannot be used") and error.value.exit_code == 3
    report = examined(folder, more, collect=False, skip_bad=True).dataset.report
    assert (report.found, report.trained, report.dropped) == (5, 3, {"cannot be used": 2})
    assert all(any(name in note for note in report.notes) for name in parts)


def test_of_a_metadata_file_only_the_lines_that_are_wrong_are_left_out(folder, tmp_path):
    good = [{"image_path": str(folder / f"{k}.png"), "caption": f"a dog\u2028and {k}"} for k in (0, 1)]
    wrong = {
        "line 2": '{"image_path": "a.png",', "line 3": "[1]", "line 4": '{"caption": "no path"}', "7": '{"image_path": 7}',
        "line 6": "[" * 100_000, "2.png": json.dumps({"image_path": str(folder / "2.png"), "caption": ["a"]}),
    }  # fmt: skip
    first, second = (json.dumps(one, ensure_ascii=False) for one in good)
    place = tmp_path / "list.jsonl"
    place.write_text("\n".join((first, *wrong.values(), "", second)), encoding="utf-8")
    (tmp_path / "data.toml").write_text(f"{HEAD}[[datasets.subsets]]\nmetadata_file = '{place}'\n", encoding="utf-8")
    given = options(dataset_config=str(tmp_path / "data.toml"))
    report = doctor.examine(given, None, 8, collect=True).dataset.report
    said = {fault.file.rpartition("/")[2].removeprefix("list.jsonl, "): fault.reason for fault in report.faults}
    assert set(said) == set(wrong) and "list.jsonl" in said["2.png"] and "needs an image_path" in said["line 4"]
    given = options(dataset_config=str(tmp_path / "data.toml"), skip_bad=True)
    data = doctor.examine(given, None, 8).dataset
    assert [item.caption for item in data.items] == ["a dog\u2028and 0", "a dog\u2028and 1"]
    assert data.report.found == 8 == data.report.trained + data.report.dropped["cannot be used"]


@pytest.mark.parametrize(("name", "text"), [("nowhere", "no such folder"), ("empty", "10_cat for instance")])
def test_a_folder_of_the_command_line_that_gives_nothing_joins_all_other_faults(folder, tmp_path, name, text):
    (tmp_path / "parent").mkdir()
    (tmp_path / "empty").mkdir()
    folder.rename(tmp_path / "parent" / "2_scene")
    (tmp_path / "parent" / "2_scene" / "1.png").write_bytes(b"no")
    given = {"resolution": (256, 256), "train_batch_size": 1, "caption_extension": ".txt"}
    places = {"train_data_dir": str(tmp_path / "parent"), "reg_data_dir": str(tmp_path / name)}
    report = doctor.examine(options(**given, **places), None, 8, collect=True).dataset.report
    said = {Path(fault.file).name: fault.reason for fault in report.faults}
    assert len(said) == 2 and "header cannot be read" in said.pop("1.png") and text in said.popitem()[1]
    data = doctor.examine(options(**given, **places, skip_bad=True), None, 8).dataset
    assert {item.path.name for item in data.items} == {"0.png", "2.png"}
    with pytest.raises(DatasetError, match=text):
        doctor.examine(options(**given, train_data_dir=places["reg_data_dir"]), None, 8)


def test_where_nothing_remains_skip_bad_refuses_too(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(DatasetError, match="there is nothing to train on: found 3 files"):
        examined(folder, collect=False, skip_bad=True)


def test_masks_and_controls_that_are_damaged_missing_or_of_the_wrong_size(folder, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    scene(0).save(beside / "0.png")
    scene(1, (128, 128)).save(beside / "1.png")
    said = faults(folder, "conditioning_data_dir = 'beside'\n", masked_loss=True)
    assert said["1.png"].endswith("1.png: it is 128x128, its picture 256x256; make them equal")
    assert "there is no mask 2.*" in said["2.png"] and "0.png" not in said
    (beside / "2.png").write_bytes((beside / "1.png").read_bytes()[:300])
    said = faults(folder, "control_directory = 'beside'\n")
    assert list(said) == ["2.png"] and "its control picture" in said["2.png"] and "decoded" in said["2.png"]


def test_a_size_that_changes_after_the_header_is_a_fault(folder, monkeypatch):
    turned = Image.Exif()
    turned[0x0112] = 6
    put(folder / "late.png", scene(5, (256, 128)))
    data = bytearray((folder / "late.png").read_bytes())
    other = io.BytesIO()
    scene(5, (256, 128)).save(other, "PNG", exif=turned)
    start = other.getvalue().index(b"eXIf") - 4
    chunk = other.getvalue()[start : start + 12 + int.from_bytes(other.getvalue()[start : start + 4], "big")]
    (folder / "late.png").write_bytes(bytes(data[:-12]) + chunk + bytes(data[-12:]))  # after the pixels
    assert faults(folder) == {"late.png": "it is 128x256, its header says 256x128; make them equal"}


def test_a_damaged_frame_is_a_fault_of_its_video(folder, tmp_path):
    from test_videos import VIDEO

    frames = tmp_path / "videos" / "dance"
    frames.mkdir(parents=True)
    for k in range(5):
        scene(k).save(frames / f"{k}.png")
    (tmp_path / "videos" / "dance.txt").write_text("dance")
    (frames / "3.png").write_bytes((frames / "3.png").read_bytes()[:-40])
    place = tmp_path / "videos.toml"
    place.write_text(f"{HEAD}[[datasets.subsets]]\nvideo_directory = 'videos'\ncaption_extension = '.txt'\n")
    report = doctor.examine(options(dataset_config=str(place)), VIDEO, 16, collect=True).dataset.report
    assert [(Path(f.file).name, f.reason[:17]) for f in report.faults] == [("dance", "its frame 3.png: ")]


# ---------------------------------------------------------------- what is worth knowing


def test_sound_data_gives_no_findings(folder):
    assert found(folder) == {}


def turned_to(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def glass() -> Image.Image:
    picture = scene(5).convert("RGBA")
    picture.putalpha(Image.new("L", picture.size, 128))
    return picture


ODD = [  # what is put, kind, a part of the text
    (lambda f: put(f / "x.png", scene(5), format="JPEG"), "name", "a JPEG, named .png"),
    (lambda f: put(f / "x.jpg", scene(5), exif=turned_to(3)), "turned", "orientation 3"),
    (lambda f: put(f / "x.png", glass()), "transparent", "in part"),
    (lambda f: put(f / "x.png", scene(5, (100, 100))), "tiny", "100x100"),
    (lambda f: put(f / "x.png", scene(5, (100, 100))), "enlarged much", "2.56 times, from 100x100 to 256x256"),
    (lambda f: put(f / "x.png", scene(5, (200, 200))), "enlarged", "1.28 times"),
    (lambda f: put(f / "x.png", scene(5, (320, 256))), "cropped", "20% lost, 320x256 cut to 256x256"),
    (lambda f: put(f / "x.png", scene(5, (512, 256))), "cropped much", "50% lost, 512x256 cut to 256x256"),
    (lambda f: put(f / "x.png", Image.new("RGB", (256, 256), "red").convert("L")), "plain", "every value is 76"),
    (lambda f: put(f / "x.webp", scene(5), save_all=True, append_images=[scene(6)]), "moves", "an animated WEBP"),
    (lambda f: put(f / "x.png", scene(5), caption="caf\u00c3\u00a9"), "caption text", "another encoding"),
    (lambda f: put(f / "x.png", scene(5), caption="a\x00b \ufffd"), "caption text", "U+0000, U+FFFD"),
    (lambda f: put(f / "x.png", scene(5), caption="one\ntwo"), "caption lines", "not used: 'two'"),
    (lambda f: put(f / "x.bmp", scene(0)), "same", "0.png, with another caption"),
    (lambda f: put(f / "x.jpg", scene(0), quality=40), "alike", "0.png (correlation 0.99"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "text"), ODD, ids=lambda value: value if isinstance(value, str) else "")
def test_each_oddity_is_found_and_only_there(folder, make, kind, text):
    make(folder)
    out = found(folder)
    assert [name.split(".")[0] for name, _ in out[kind]] == ["x"] and text in out[kind][0][1]
    assert all(name.startswith("x") for own in out.values() for name, _ in own)


def test_good_captions_in_other_scripts_are_not_odd(folder):
    for k, text in enumerate(("café à côté, naïve Ünïcödé", "一只猫在草地上", "👩‍👩‍👧 кошка, γάτα ½ £5 © ±")):
        (folder / f"{k}.txt").write_text(text, encoding="utf-8")
    assert found(folder) == {}


def test_masks_controls_alpha_and_class_tokens(folder, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    for k in range(3):
        Image.new("L", (256, 256), 255 * (k > 0)).save(beside / f"{k}.png")
    out = found(folder, "conditioning_data_dir = 'beside'\n", masked_loss=True)
    assert out == {"mask": [("0.png", "0.png is black everywhere")]}
    scene(0, (256, 128)).save(beside / "0.png")
    scene(1, (128, 128)).save(beside / "1.png")
    out = found(folder, "control_directory = 'beside'\n")
    assert out == {"control shape": [("0.png", "0.png is 256x128, the picture 256x256")]}
    assert len(found(folder, "alpha_mask = true\n")["no transparency"]) == 3
    (folder / "1.txt").unlink()
    assert found(folder, "class_tokens = 'cat'\n") == {"class tokens": [("1.png", "'cat'")]}


def test_imbalance_is_named(folder, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    put(more / "m.png", scene(20))
    second = f"num_repeats = 11\n[[datasets.subsets]]\nimage_dir = '{more}'\ncaption_extension = '.txt'\n"
    out = found(folder, second, HEAD.replace("batch_size = 1", "batch_size = 2"))
    assert [(name, text[:20]) for name, text in out["share"]] == [("more", "1 of 34 items an epo")]
    put(folder / "wide.png", scene(21, (512, 128)))
    head = "[[datasets]]\nresolution = 256\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 128\n"
    assert found(folder, "", head)["short batch"] == [("wide.png", "bucket 512x128 has 1 for batches of 2")]


# ---------------------------------------------------------------- pictures that are there twice


def test_copies_that_were_resized_recompressed_mirrored_or_cropped_by_a_little_are_found(folder):
    whole = scene(0)
    copies = {
        "half": whole.resize((128, 128)), "mirrored": whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "cropped": whole.crop((2, 2, 254, 254)), "brighter": whole.point(lambda v: min(255, int(v * 1.02))),
    }  # fmt: skip
    for name, picture in copies.items():
        put(folder / f"{name}.png", picture)
    for k in range(100, 140):
        put(folder / f"{k}.png", scene(k))
    out = found(folder)["alike"]
    assert {name.split(".")[0] for name, _ in out} == set(copies)
    assert all(any(f"/{name}.png" in text for name in ("0", *copies)) for _, text in out)
    assert "mirrored, " in dict(out)["mirrored.png"]


def test_the_search_for_pairs_is_that_of_every_pair_with_every_other():
    generator = np.random.default_rng(0)
    table = generator.integers(0, 256, (700, 8, 8, 3)).astype(np.uint8)
    for k in range(0, 60, 2):  # planted: the later is the earlier with a little noise, some mirrored
        close = table[k].astype(int) + generator.integers(-3, 4, (8, 8, 3))
        table[699 - k] = np.clip(close, 0, 255)[:, :: -1 if k % 4 else 1]
    table[300] = 128
    table[301] = 128  # shows nothing
    looks = [decoded.Look("", thumbnail=base64.b64encode(one.tobytes()).decode()) for one in table]
    flat, mirrored = table.reshape(700, -1).astype(float), table[:, :, ::-1].reshape(700, -1).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        straight, turned = np.corrcoef(flat), np.corrcoef(flat, mirrored)[:700, 700:]
    expected = {
        (a, b): turned[a, b] > straight[a, b]
        for b in range(700)
        for a in range(b)
        if max(straight[a, b], turned[a, b]) > findings.ALIKE
    }
    assert len(expected) == 30
    assert {(a, b): flipped for a, b, _, flipped in findings.alike(looks)} == expected


def test_thousands_of_equal_thumbnails_take_no_time():
    one = decoded.Look("", thumbnail=base64.b64encode(np.arange(192, dtype=np.uint8).tobytes()).decode())
    began = time.perf_counter()
    assert len(list(findings.alike([one] * 3000))) == 2999
    assert time.perf_counter() - began < 5


def test_a_copy_on_the_other_side_of_the_validation_split_is_named(folder):
    for k in range(3):
        put(folder / f"{k}b.png", scene(k))
    out = found(folder, head=HEAD + "validation_split = 0.5\nvalidation_seed = 1\n")
    data = examined(folder, head=HEAD + "validation_split = 0.5\nvalidation_seed = 1\n").dataset
    held = {item.path.stem for item in data.validation}
    crossing = {str(k) for k in range(3) if (f"{k}" in held) != (f"{k}b" in held)}
    assert crossing and {name[0] for name, _ in out["both sides"]} == crossing and len(out["same"]) == 3


# ---------------------------------------------------------------- videos that are there twice


def pan(seed: int) -> list[np.ndarray]:
    """Forty frames of a camera that moves over a scene."""
    wide = np.asarray(scene(seed, (192, 64)))
    return [wide[:, 3 * n : 3 * n + 64] for n in range(40)]


@pytest.fixture
def clips(tmp_path):
    """Three videos that are unlike each other, one of them another played backwards."""
    target = tmp_path / "clips"
    target.mkdir()
    for name, frames in (("0", pan(0)), ("1", pan(1)), ("2", pan(0)[::-1])):
        write_video(target / f"{name}.mp4", frames, crf="12")
    return target


def examined_videos(clips: Path, head=HEAD) -> doctor.Examined:
    from test_videos import VIDEO

    for path in clips.iterdir():
        if path.suffix != ".txt" and not path.name.startswith("."):
            path.with_suffix(".txt").write_text(f"a video {path.stem}", encoding="utf-8")
    place = clips.parent / "videos.toml"
    text = f"{head}[[datasets.subsets]]\nvideo_directory = 'clips'\ncaption_extension = '.txt'\n"
    place.write_text(f"{text}target_frames = 5\nframe_extraction = 'chunk'\n", encoding="utf-8")
    return doctor.examine(options(dataset_config=str(place)), VIDEO, 16, collect=True)


def found_of_videos(clips: Path) -> dict[str, dict[str, str]]:
    """kind -> file -> text, of what is there twice."""
    return twice(examined_videos(clips))


def twice(examined: doctor.Examined) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {}
    for one in examined.findings:
        out.setdefault(one.kind, {})[Path(one.file).name] = one.text
    return {kind: own for kind, own in out.items() if kind in ("same", "alike", "both sides")}


def remuxed(source: Path, target: Path) -> None:
    """The same packets in another container."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def test_videos_that_are_unlike_give_no_findings(clips):
    assert found_of_videos(clips) == {}


def test_exact_copies_of_a_video_are_found_whatever_their_container(clips):
    (clips / "copy.mp4").write_bytes((clips / "0.mp4").read_bytes())
    remuxed(clips / "0.mp4", clips / "box.mkv")
    assert (clips / "box.mkv").read_bytes() != (clips / "0.mp4").read_bytes()
    out = found_of_videos(clips)
    assert set(out) == {"same"} and set(out["same"]) == {"copy.mp4", "box.mkv"}
    assert all(text == f"as {clips}/0.mp4, with another caption" for text in out["same"].values())


def test_copies_of_a_video_that_were_encoded_anew_resized_thinned_or_mirrored_are_found(clips):
    frames = pan(0)
    small = [np.asarray(Image.fromarray(one).resize((48, 48))) for one in frames]
    write_video(clips / "anew.mp4", frames, crf="35")
    write_video(clips / "small.avi", small, codec="mpeg4", b="2000000")
    write_video(clips / "thinned.mp4", frames[::2], rate=15)
    write_video(clips / "mirrored.mp4", [one[:, ::-1] for one in frames])
    (clips / "still").mkdir()
    for n, one in enumerate(frames):
        Image.fromarray(one).save(clips / "still" / f"{n}.png")
    out = found_of_videos(clips)
    assert set(out) == {"alike"}
    assert set(out["alike"]) == {"anew.mp4", "small.avi", "thinned.mp4", "mirrored.mp4", "still"}
    assert "mirrored, correlation 0.99" in out["alike"]["mirrored.mp4"]


def test_equal_folders_of_frames_are_the_same_video(clips):
    for name in ("a", "b"):
        (clips / name).mkdir()
        for n, one in enumerate(pan(5)):
            Image.fromarray(one).save(clips / name / f"{n}.png")
    assert found_of_videos(clips) == {"same": {"b": f"as {clips}/a, with another caption"}}


def test_a_copied_video_on_the_other_side_of_the_validation_split_is_named(clips):
    for name, seed in (("0b", 0), ("1b", 1)):
        write_video(clips / f"{name}.mp4", pan(seed), crf="30")
    seen = set()
    for seed in range(4):
        one = examined_videos(clips, HEAD + f"validation_split = 0.4\nvalidation_seed = {seed}\n")
        held, out = {item.path.stem for item in one.dataset.validation}, twice(one)
        crossing = {k for k in "01" if (k in held) != (f"{k}b" in held)}
        assert {name[0] for name in out["alike"]} == {"0", "1"}
        assert {name[0] for name in out.get("both sides", {})} == crossing
        seen |= {(k, k in crossing) for k in "01"}
    assert {crossed for _, crossed in seen} == {True, False}


def test_videos_are_decoded_once_and_an_index_without_their_looks_is_made_anew(clips, monkeypatch):
    (clips / "copy.mp4").write_bytes((clips / "0.mp4").read_bytes())
    first = found_of_videos(clips)
    probed, real, index = [], videos.probe, clips / ".lorasmith" / "videos.json"
    monkeypatch.setattr(videos, "probe", lambda path: probed.append(Path(path).name) or real(path))
    assert found_of_videos(clips) == first and probed == []
    old = json.loads(index.read_text())
    old["head"].pop("recipe")
    old["entries"] = {name: entry[:-2] for name, entry in old["entries"].items()}
    index.write_text(json.dumps(old))
    assert found_of_videos(clips) == first and sorted(probed) == ["0.mp4", "1.mp4", "2.mp4", "copy.mp4"]


# ---------------------------------------------------------------- once


def test_only_what_is_new_or_changed_is_decoded_again(folder, monkeypatch):
    looked = []
    real = decoded.look
    monkeypatch.setattr(decoded, "look", lambda path: looked.append(Path(path).name) or real(path))
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-50])
    first = examined(folder)
    assert sorted(looked) == ["0.png", "1.png", "2.png"]
    looked.clear()
    again = examined(folder)
    assert looked == [] and again.looks == first.looks and again.dataset.report.faults == first.dataset.report.faults
    put(folder / "1.png", scene(1))
    assert not examined(folder).dataset.report.faults and looked == ["1.png"]


def test_an_error_of_the_disk_is_not_remembered(folder, monkeypatch):
    with monkeypatch.context() as patch:
        examined(folder, check_data="headers")

        def fails(path):
            raise OSError(5, "Input/output error")

        patch.setattr(scan, "opened", fails)
        assert "it cannot be read (Input/output error)" in faults(folder)["0.png"]
    assert not faults(folder)


def test_another_process_waits_for_the_first_one_and_does_the_rest_if_that_dies(folder, monkeypatch):
    files = {str(path): folder / ".lorasmith" for path in folder.glob("*.png")}
    looked, real = [], decoded.look
    monkeypatch.setattr(decoded, "look", lambda path: looked.append(threading.current_thread()) or real(path))
    second = threading.Thread(target=lambda: out.update(decoded.look_at(files, rank=1, patience=10)))
    out: dict = {}
    second.start()
    time.sleep(0.2)
    first = decoded.look_at(files)
    second.join(10)
    assert out == first and len(looked) == 3
    (folder / ".lorasmith" / decoded.INDEX).unlink()
    assert decoded.look_at(files, rank=1, patience=0.1) == first and len(looked) == 6


# ---------------------------------------------------------------- the tool, and the start of a run


def tool(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, words)])
    check_dataset.main()
    return capsys.readouterr().out


def test_the_tool_says_everything_of_every_item_and_exits_with_3(folder, tmp_path, monkeypatch, capsys):
    put(folder / "wide.png", scene(5, (512, 256)))
    (folder / "bad.png").write_bytes(b"no")
    examined(folder)
    with pytest.raises(DatasetError, match="1 files cannot be used"):
        tool(monkeypatch, capsys, tmp_path / "data.toml")
    text = capsys.readouterr().out
    assert "bad.png: its header cannot be read" in text and "1 files lose more than 25% to the crop" in text
    said = json.loads(tool(monkeypatch, capsys, tmp_path / "data.toml", "--json", "--skip_bad"))
    assert (said["found"], said["trained"], said["dropped"]) == (5, 4, {"cannot be used": 1})
    (wide,) = (item for item in said["items"] if item["file"].endswith("wide.png"))
    assert wide["crop"] == [128, 0, 256, 256] and (wide["scale"], wide["lost"]) == (1.0, 0.5)
    assert wide["caption"] == "a scene wide" and said["captions_measured"] is False


def test_the_contact_sheet_shows_the_crop_as_trained_and_escapes_every_text(folder, tmp_path, monkeypatch, capsys):
    evil = "<script>alert(1)</script>&<img src=x onerror=y>'\""
    put(folder / "<b>&'.png", scene(5, (512, 256)), caption=evil)
    data = examined(folder, f"caption_prefix = {json.dumps(evil)}\n").dataset
    out = tool(monkeypatch, capsys, tmp_path / "data.toml", "--html", tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    assert "sheet.html" in out and html.escape(f"{evil} {evil}") in page
    assert set(re.findall(r"<(/?\w+)", page)) <= {
        f"{end}{tag}" for end in ("", "/") for tag in ("meta title style h1 h2 pre p ul li details summary main".split()
        + "article img div b mark a doctype".split())
    }  # fmt: skip
    assert "default-src 'none'" in page and "<b>&'" not in page
    shown = [Image.open(io.BytesIO(base64.b64decode(one))) for one in re.findall(r"base64,([^']+)'", page)]
    for item, picture in zip(data.items, shown, strict=True):
        trained = Image.fromarray(images.load(item, random.Random(0)).pixels)
        trained.thumbnail((220, 220))
        assert np.abs(np.asarray(trained, float) - np.asarray(picture, float)).mean() < 3


def test_pages_are_split(folder, tmp_path, monkeypatch):
    from library.data import contact_sheet

    monkeypatch.setattr(contact_sheet, "A_PAGE", 2)
    paths = contact_sheet.write(tmp_path / "s.html", examined(folder))
    assert [path.name for path in paths] == ["s.html", "s-2.html"]
    assert [path.read_text().count("<article") for path in paths] == [2, 1]


def test_captions_are_measured_with_the_tokenizer_of_the_model(toy, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    from transformers import AutoTokenizer

    from library.families.z_image import MAX_TOKENS, TEMPLATE

    text = " ".join(f"word{k}" for k in range(900))
    (folder / "1.txt").write_text(text, encoding="utf-8")
    examined(folder)
    words = (tmp_path / "data.toml", "--model_type", "z_image", "--tokenizer", toy.parent / "tokenizer")
    said = json.loads(tool(monkeypatch, capsys, *words, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(toy.parent / "tokenizer")
    room = MAX_TOKENS - sum(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in TEMPLATE)
    rest = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][room:])
    cuts = {Path(item["file"]).name: item["cut"] for item in said["items"]}
    assert said["captions_measured"] and cuts == {"0.png": "", "1.png": rest, "2.png": ""} and rest
    assert [one["kind"] for one in said["findings"]] == ["caption cut"]
    longest = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    short = len(tokenizer("a scene 0", add_special_tokens=False)["input_ids"])
    expected = {"longest": longest, "longest_file": str(folder / "1.png"), "median": short, "over": 1}
    assert said["tokens"] == {"text_encoder": expected} and said["captions_unmeasured"] == ""
    assert [item["tokens"] for item in said["items"]] == [{"text_encoder": n} for n in (short, longest, short)]
    out = tool(monkeypatch, capsys, *words, "--html", tmp_path / "s.html")
    line = f"  text_encoder: longest {longest} (1.png), median {short}, 1 longer than the model reads"
    assert line in out.splitlines() and line in (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "captions are not measured: give --tokenizer" in tool(monkeypatch, capsys, *words[:3])
    said = json.loads(tool(monkeypatch, capsys, *words[:3], "--json"))
    assert said["captions_unmeasured"].startswith("captions are not measured: give --tokenizer") and not said["tokens"]


def test_a_run_looks_first_and_refuses_or_leaves_out(toy, folder, tmp_path, capsys):  # noqa: F811
    put(folder / "cut.png", scene(9))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    put(folder / "copy.png", scene(0))
    examined(folder)
    data = tmp_path / "data.toml"
    data.write_text(data.read_text().replace("256", "64"))
    with pytest.raises(DatasetError, match=r"cut\.png: it cannot be decoded .*--skip_bad"):
        train(toy, data, tmp_path / "out", "--max_train_steps", "1")
    trainer = train(toy, data, tmp_path / "out", "--max_train_steps", "1", "--skip_bad")
    out = capsys.readouterr().out
    assert "warning: 1 files are the same picture or video as another file: copy.png" in out and "left out" in out
    assert len(trainer.dataset.items) == 4
    counted = "tokens of the captions, without what the model puts around them:\n  text_encoder: longest "
    assert counted in out and counted in trainer.plan.text
    assert out.index(counted) < out.index("captions: 0 of 4 are longer than the model reads") < out.index("text: ")


def test_the_doctor_needs_no_torch(folder, tmp_path):
    examined(folder)
    code = (
        "import sys, runpy; sys.argv = ['tools/check_dataset.py', *sys.argv[1:]]\n"
        "runpy.run_path('tools/check_dataset.py', run_name='__main__')\nassert 'torch' not in sys.modules"
    )
    words = [str(tmp_path / "data.toml"), "--html", str(tmp_path / "s.html")]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "found 3 = trained 3" in done.stdout, done.stderr
