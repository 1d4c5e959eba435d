"""Buckets, captions, pictures and datasets against sd-scripts' written rules and against plain arithmetic."""

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from library import option_table
from library.data import buckets, images, scan
from library.data.captions import make_caption, variants
from library.data.config import SubsetSpec, load_dataset_config
from library.data.dataset import prepare
from library.errors import ConfigError, DatasetError


def options(**changes):
    values = {option.name: option.default for option in option_table.OPTIONS}
    return SimpleNamespace(**{**values, **changes})


def picture(path: Path, size=(64, 64), **save):
    generator = np.random.default_rng(abs(hash(path.stem)) % 2**32)
    Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, **save)
    return path


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "pictures"
    target.mkdir()
    for k in range(6):
        picture(target / f"{k}.png", (64 + 16 * (k % 3), 64))
        (target / f"{k}.txt").write_text(f"tag {k}, red, blue", encoding="utf-8")
    return target


def dataset_file(tmp_path, folder, dataset="resolution = 64\nbatch_size = 2\n", subset=""):
    path = tmp_path / "data.toml"
    text = f"[[datasets]]\n{dataset}[[datasets.subsets]]\ncaption_extension = '.txt'\n"
    text += f"image_dir = {json.dumps(str(folder))}\n"
    path.write_text(text + subset, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- buckets


def by_the_rules(resolution, low, high, steps):
    """The written rules, word for word: every pair is looked at."""
    area = resolution[0] * resolution[1]
    side = int(area**0.5 + 1e-9) // steps * steps
    found = {(side, side)}
    for w in range(low, high + 1, steps):
        h = max((h for h in range(0, high + 1, steps) if w * h <= area), default=0)
        if h >= low:
            found |= {(w, h), (h, w)}
    return sorted(found)


@pytest.mark.parametrize(("high", "count"), [(1024, 25), (2048, 41)])
def test_the_bucket_counts_are_those_of_sd_scripts(high, count):
    assert len(buckets.bucket_list((1024, 1024), 256, high, 64)) == count


@pytest.mark.parametrize(
    "case",
    [
        ((1024, 1024), 256, 1024, 64),
        ((768, 512), 256, 2048, 64),
        ((2048, 2048), 512, 4096, 32),
        ((80, 64), 48, 128, 16),
    ],
)
def test_bucket_lists_follow_the_written_rules(case):
    assert buckets.bucket_list(*case) == by_the_rules(*case)


def test_a_picture_goes_to_the_bucket_of_nearest_ratio_covers_it_and_is_cropped_in_the_middle():
    made = buckets.bucket_list((1024, 1024), 256, 2048, 64)
    generator = random.Random(0)
    for _ in range(300):
        size = (generator.randint(100, 4000), generator.randint(100, 4000))
        p = buckets.assign(size, made)
        if size in made:
            assert p.bucket == p.resized == size
            continue
        errors = [abs(w / h - size[0] / size[1]) for w, h in made]
        assert abs(p.bucket[0] / p.bucket[1] - size[0] / size[1]) == min(errors)
        scale = max(p.bucket[0] / size[0], p.bucket[1] / size[1])
        assert all(abs(p.resized[k] - size[k] * scale) <= 0.5 + 1e-6 for k in (0, 1))
        assert p.resized[0] >= p.bucket[0] and p.resized[1] >= p.bucket[1] and p.bucket in (p.bucket, p.resized)
        assert (p.left, p.top) == ((p.resized[0] - p.bucket[0]) // 2, (p.resized[1] - p.bucket[1]) // 2)


def test_without_upscaling_small_pictures_keep_their_size_and_large_ones_shrink_to_the_area():
    small = buckets.assign_no_upscale((300, 200), (1024, 1024), 64)
    assert small.resized == (300, 200) and small.bucket == (256, 192)
    large = buckets.assign_no_upscale((4000, 3000), (1024, 1024), 64)
    assert large.bucket[0] % 64 == large.bucket[1] % 64 == 0
    assert large.resized[0] * large.resized[1] <= 1024 * 1024 * 1.02
    assert abs(large.resized[0] / large.resized[1] - 4 / 3) < 0.01


# ---------------------------------------------------------------- captions


def caption(raw, seed=0, step=0, epoch=0, **subset):
    return make_caption(raw, SubsetSpec(image_dir="x", **subset), random.Random(seed), step, epoch, 100)


def test_captions_keep_their_first_tags_and_shuffle_the_rest():
    texts = {caption("a, b, c, d, e", seed, shuffle_caption=True, keep_tokens=2) for seed in range(200)}
    assert all(text.startswith("a, b, ") for text in texts)
    assert texts == {f"a, b, {x}, {y}, {z}" for x in "cde" for y in "cde" for z in "cde" if len({x, y, z}) == 3}


def test_the_keep_tokens_separator_marks_fixed_parts_and_never_stays_in_the_caption():
    made = caption("x, y ||| a, b ||| end", shuffle_caption=True, keep_tokens_separator="|||")
    assert made in ("x, y, a, b, end", "x, y, b, a, end")
    assert caption("x ||| a", keep_tokens_separator="|||") == "x, a"


def test_tags_are_joined_with_the_separator_that_split_them():
    assert caption("a; b; c", caption_separator=";", caption_tag_dropout_rate=1e-9) == "a; b; c"


def test_dropout_prefix_suffix_wildcards_and_warm_up():
    assert caption("cat", caption_prefix="a", caption_suffix="photo") == "a cat photo"
    assert caption("cat", caption_dropout_rate=1.0, caption_prefix="a") == ""
    assert caption("cat", epoch=1, caption_dropout_every_n_epochs=2) == ""
    assert caption("cat", epoch=2, caption_dropout_every_n_epochs=2) == "cat"
    assert {caption("one {a|b} {{x}}\ntwo", seed, enable_wildcard=True) for seed in range(50)} == {
        "one a {x}",
        "one b {x}",
        "two",
    }
    assert caption("first\nsecond") == "first"
    warm = [caption("a, b, c, d", step=step, token_warmup_step=30, token_warmup_min=1) for step in (0, 10, 20, 30)]
    assert warm == ["a", "a, b", "a, b, c", "a, b, c, d"]
    assert caption("a;;b", secondary_separator=";;") == "a,b"
    dropped = [caption("a, b", seed, caption_tag_dropout_rate=0.5, keep_tokens=1) for seed in range(400)]
    assert set(dropped) == {"a, b", "a"} and 150 < dropped.count("a") < 250


def test_variants_are_all_captions_that_a_static_picture_can_have():
    subset = SubsetSpec(image_dir="x", caption_prefix="p", caption_dropout_rate=0.5)
    made = {make_caption("cat", subset, random.Random(seed), 0, 0, 1) for seed in range(50)}
    assert made == set(variants("cat", subset)) == {"p cat", ""}


# ---------------------------------------------------------------- pictures


def test_exif_orientation_counts_for_the_size_and_for_the_pixels(tmp_path):
    base = np.zeros((40, 80, 3), np.uint8)
    base[:, :40] = (255, 0, 0)  # left half red as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    for name in ("a.jpg", "a.png"):
        Image.fromarray(base).save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        assert scan.picture_size(str(tmp_path / name)) == (40, 80)
        pixels, _ = images.decode(tmp_path / name)
        assert pixels.shape == (80, 40, 3) and pixels[:35, :, 0].min() > 200 and pixels[45:, :, 0].max() < 60


def test_alpha_is_composed_on_white_and_every_mode_becomes_rgb(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels, alpha = images.decode(tmp_path / "a.png", with_alpha=True)
    assert (pixels[:4] == (10, 20, 30)).all() and (pixels[4:] == 255).all() and alpha[0, 0] == 255 and alpha[7, 7] == 0
    Image.fromarray((np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)).save(tmp_path / "deep.png")
    deep, _ = images.decode(tmp_path / "deep.png")
    assert abs(int(deep[7, 7, 0]) - 63000 / 257) <= 1
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert images.decode(tmp_path / "c.jpg")[0].min() > 250
    Image.new("P", (8, 8)).save(tmp_path / "p.png")
    assert images.decode(tmp_path / "p.png")[0].shape == (8, 8, 3)


def test_a_truncated_picture_is_named(tmp_path):
    path = picture(tmp_path / "cut.png", (200, 200))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match="cut.png"):
        images.decode(path)


def test_a_mask_is_cropped_with_its_picture(tmp_path, folder):
    wide = np.zeros((256, 512, 3), np.uint8)
    wide[:, 128:384] = 255  # the middle half, which is what a square bucket shows
    for name in ("masks", "wide"):
        (tmp_path / name).mkdir()
        Image.fromarray(wide).save(tmp_path / name / "w.png")
    (tmp_path / "wide" / "w.txt").write_text("w", encoding="utf-8")
    subset = f"conditioning_data_dir = {json.dumps(str(tmp_path / 'masks'))}\n"
    path = dataset_file(tmp_path, tmp_path / "wide", "resolution = 256\n", subset)
    item = prepare(options(dataset_config=path, masked_loss=True), None, 16).items[0]
    loaded = images.load(item, random.Random(0), flip=False)
    assert loaded.pixels.min() == 255 and loaded.mask.min() == 1.0


def test_the_crop_is_numpys_slice_and_a_flip_mirrors_picture_and_mask(folder, tmp_path):
    path = dataset_file(tmp_path, folder)
    item = next(i for i in prepare(options(dataset_config=path), None, 16).items if i.size == (96, 64))
    whole, _ = images.decode(item.path)
    loaded = images.load(item, random.Random(0), flip=False)
    assert (loaded.pixels == whole[:, 16:80]).all()
    assert (images.load(item, random.Random(0), flip=True).pixels == whole[:, 16:80][:, ::-1]).all()


# ---------------------------------------------------------------- datasets


def test_every_repeat_is_in_exactly_one_batch_of_one_bucket_and_the_order_is_a_function_of_seed_and_epoch(
    folder, tmp_path
):
    text = "resolution = 64\nbatch_size = 2\nenable_bucket = true\nmin_bucket_reso = 32\nmax_bucket_reso = 128\n"
    text += "bucket_reso_steps = 16\n"
    path = dataset_file(tmp_path, folder, text, "num_repeats = 3\n")
    one, two = (prepare(options(dataset_config=path, seed=7), None, 16) for _ in range(2))
    for epoch in range(3):
        plans = one.batches(epoch)
        assert plans == two.batches(epoch)
        entries = sorted(entry for plan in plans for entry in plan.entries)
        assert entries == [(item.index, k) for item in one.items for k in range(3)]
        for plan in plans:
            assert {one.items[i].placement.bucket for i, _ in plan.entries} == {plan.bucket}
    assert one.batches(0) != one.batches(1)
    assert one.batches(0) != prepare(options(dataset_config=path, seed=8), None, 16).batches(0)


def test_found_is_trained_plus_held_out_plus_dropped_and_the_split_is_by_file(folder, tmp_path):
    path = dataset_file(tmp_path, folder, "resolution = 64\nvalidation_split = 0.34\n")
    data = prepare(options(dataset_config=path), None, 16)
    r = data.report
    assert r.found == 6 == r.trained + r.held_out + sum(r.dropped.values()) and r.held_out == 2
    assert not {i.path for i in data.items} & {i.path for i in data.validation}
    again = prepare(options(dataset_config=path), None, 16)
    assert {i.path for i in again.validation} == {i.path for i in data.validation}
    assert str(tmp_path) not in json.dumps(data.metadata())


def test_a_new_file_moves_at_most_one_to_the_other_side_of_the_split_and_a_new_place_none(tmp_path):
    names = [f"{k:03d}" for k in range(60)]
    random.Random(0).shuffle(names)

    def held(parent, some):
        folder = tmp_path / parent / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        for name in some:
            if not (folder / f"{name}.png").is_file():
                picture(folder / f"{name}.png")
                (folder / f"{name}.txt").write_text("x", encoding="utf-8")
        path = dataset_file(tmp_path, folder, "resolution = 64\nvalidation_split = 0.2\n")
        return {item.path.name for item in prepare(options(dataset_config=path), None, 16).validation}

    before = held("one", names[:40])
    assert len(before) == 8 and held("two", names[:40]) == before
    for count in range(41, 61):
        now = held("one", names[:count])
        moved = (before ^ now) - {f"{names[count - 1]}.png"}
        assert len(now) == round(count * 0.2) and len(moved) <= 1
        before = now


def test_a_file_that_one_dataset_holds_out_is_held_out_of_all(folder, tmp_path):
    path = dataset_file(tmp_path, folder, "resolution = 64\nvalidation_split = 0.34\n")
    entry = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(folder))}\ncaption_extension = '.txt'\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"[[datasets]]\nresolution = 128\n{entry}")
    data = prepare(options(dataset_config=path), None, 16)
    held, trained = ({(item.dataset, item.path.name) for item in some} for some in (data.validation, data.items))
    names = {name for number, name in held if number == 0}
    assert len(names) == 2 and held == {(n, name) for n in (0, 1) for name in names} and len(trained) == 8
    assert not names & {name for _, name in trained}
    assert "2 files are held out of every dataset, since one holds them out" in data.print_table()
    assert data.report.found == 12 == data.report.trained + data.report.held_out


MISTAKES = {
    "resolutoin = 64\n": "did you mean 'resolution'",
    "resolution = 64\nimage_dir = 'x'\n": "belongs in",
    "resolution = 'big'\n": "is not a size",
    "resolution = 64\nbatch_size = '2'\n": "is not a whole number",
    "resolution = 72\n": "multiple of 16",
    "batch_size = 1\n": "resolution is missing",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_in_the_description_are_named(folder, tmp_path, text):
    with pytest.raises(ConfigError, match=MISTAKES[text]):
        prepare(options(dataset_config=dataset_file(tmp_path, folder, text)), None, 16)


UNREAD = {  # what is written into [general], the dataset, the subset -> what is said of it
    ("", "max_bucket_reso = 512\n", ""): "dataset 1: max_bucket_reso = 512 has no effect without enable_bucket",
    (
        "bucket_no_upscale = true\n",
        "",
        "",
    ): r"\[general\]: bucket_no_upscale = True has no effect without enable_bucket",
    ("", "validation_seed = 3\n", ""): "validation_seed = 3 has no effect without validation_split",
    ("", "", "keep_tokens = 2\n"): "subset 1: keep_tokens = 2 has no effect without shuffle_caption",
    ("token_warmup_min = 3\n", "", ""): "token_warmup_min = 3 has no effect without token_warmup_step",
    ("", "target_frames = [9, 17]\n", ""): r"dataset 1: target_frames = \(9, 17\) has no effect without videos",
    ("", "", "control_resolution = 512\n"): "has no effect without control pictures",
    ("keep_tokens = 2\n", "", "shuffle_caption = true\n"): "",
    ("max_bucket_reso = 512\n", "enable_bucket = true\nmin_bucket_reso = 64\n", ""): "",
    ("bucket_reso_steps = 64\nkeep_tokens = 0\n", "", "frame_stride = 1\n"): "",  # what holds anyway
}


@pytest.mark.parametrize("given", UNREAD)
def test_a_key_that_nothing_below_its_table_reads_is_refused(folder, tmp_path, given):
    general, dataset, subset = given
    path = dataset_file(tmp_path, folder, f"resolution = 64\n{dataset}", subset)
    text = f"[general]\n{general}{Path(path).read_text(encoding='utf-8')}"
    Path(path).write_text(text, encoding="utf-8")
    if not UNREAD[given]:
        assert load_dataset_config(options(dataset_config=path))
        return
    with pytest.raises(ConfigError, match=UNREAD[given]):
        load_dataset_config(options(dataset_config=path))


def test_toml_syntax_errors_name_the_line(tmp_path):
    (tmp_path / "bad.toml").write_text("[general]\nx = = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2"):
        load_dataset_config(options(dataset_config=str(tmp_path / "bad.toml")))


def test_bad_files_are_named(folder, tmp_path):
    path = dataset_file(tmp_path, folder)

    def fails(match):
        with pytest.raises(DatasetError, match=match):
            prepare(options(dataset_config=path), None, 16)

    (folder / "0.txt").write_bytes(b"caf\xe9")
    fails("0.txt is not UTF-8")
    (folder / "0.txt").write_text("", encoding="utf-8")
    fails("0.png: its caption .* is empty")
    (folder / "0.txt").unlink()
    fails("0.png: its caption .* is missing")
    (folder / "0.txt").write_text("ok", encoding="utf-8")
    (folder / "bad.png").write_bytes(b"\x89PNG not a picture at all, really")
    (folder / "bad.txt").write_text("bad", encoding="utf-8")
    fails("bad.png")


def test_the_command_line_form_reads_repeats_and_class_tokens(tmp_path):
    for name in ("3_cat", "1_dog", "notes"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(tmp_path / "train" / name / "x.png")
    data = prepare(options(train_data_dir=str(tmp_path / "train"), resolution=(64, 64), train_batch_size=1), None, 16)
    assert sorted((i.caption, i.repeats) for i in data.items) == [("cat", 3), ("dog", 1)]


def test_validation_and_previews_have_the_caption_with_all_of_its_tags_in_order(tmp_path, folder):
    from library.data.preview import write_preview
    from library.strategies import plain_caption

    for path in folder.glob("*.txt"):
        path.write_text("sks, a, b, c, d", encoding="utf-8")
    text = "resolution = 64\nshuffle_caption = true\ncaption_tag_dropout_rate = 0.9\ntoken_warmup_step = 9\n"
    data = prepare(options(dataset_config=dataset_file(tmp_path, folder, text)), None, 16)
    assert {plain_caption(item) for item in data.items} == {"sks, a, b, c, d"}
    write_preview(data, tmp_path / "preview")
    assert {path.read_text() for path in (tmp_path / "preview").glob("*.txt")} == {"sks, a, b, c, d"}


def test_metadata_files_give_captions_and_tags(tmp_path, folder):
    entries = {
        str(folder / "0.png"): {"caption": "a cat", "tags": "red, blue"},
        str(folder / "1"): {"caption": "a dog"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    lines = [{"image_path": "2.png", "caption": "two"}]
    (tmp_path / "meta.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (tmp_path / "d.toml").write_text(
        "[[datasets]]\nresolution = 64\n"
        f"[[datasets.subsets]]\nmetadata_file = {json.dumps(str(tmp_path / 'meta.json'))}\n"
        f"[[datasets.subsets]]\nmetadata_file = {json.dumps(str(tmp_path / 'meta.jsonl'))}\n"
        f"image_dir = {json.dumps(str(folder))}\n",
        encoding="utf-8",
    )
    data = prepare(options(dataset_config=str(tmp_path / "d.toml")), None, 16)
    assert [i.caption for i in data.items] == ["a cat, red, blue", "a dog", "two"]


def test_regularisation_pictures_match_the_number_of_training_pictures(folder, tmp_path):
    reg = tmp_path / "reg"
    reg.mkdir()
    for k in range(4):
        picture(reg / f"r{k}.png")
    subset = f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(reg))}\nis_reg = true\nclass_tokens = 'thing'\n"
    data = prepare(
        options(dataset_config=dataset_file(tmp_path, folder, subset=subset), prior_loss_weight=0.5), None, 16
    )
    own = [i for i in data.items if i.is_reg]
    assert sum(i.repeats for i in own) == 6 and {i.weight for i in own} == {0.5} and len(own) == 4


def test_a_second_scan_opens_no_picture_and_notices_a_changed_caption(folder, monkeypatch):
    first, _ = scan.scan_folder(folder, ".txt", folder / ".lorasmith")
    monkeypatch.setattr(scan, "picture_size", lambda path: pytest.fail(f"{path} was opened"))
    second, _ = scan.scan_folder(folder, ".txt", folder / ".lorasmith")
    assert second == first
    (folder / "3.txt").write_text("another caption", encoding="utf-8")
    monkeypatch.undo()
    third, _ = scan.scan_folder(folder, ".txt", folder / ".lorasmith")
    assert third[3].caption == "another caption" and third[:3] == first[:3]


def test_augmentation_that_changes_pixels_is_refused_beside_cached_latents(folder, tmp_path):
    path = dataset_file(tmp_path, folder, subset="random_crop = true\n")
    with pytest.raises(ConfigError, match="random_crop"):
        prepare(options(dataset_config=path, cache_latents=True), None, 16)


def test_a_random_crop_stays_inside_the_resized_picture():
    placement = buckets.single((200, 100), (64, 64))
    for seed in range(100):
        moved = images.moved(placement, random.Random(seed))
        assert 0 <= moved.left <= moved.resized[0] - 64 and 0 <= moved.top <= moved.resized[1] - 64
    assert replace(moved, left=placement.left, top=placement.top) == placement


def test_every_fault_is_named_at_once_and_skip_bad_goes_on_without_them(folder, tmp_path):
    path = dataset_file(tmp_path, folder)
    (folder / "0.txt").write_bytes(b"caf\xe9")
    (folder / "1.txt").unlink()
    (folder / "2.txt").write_text(" \n", encoding="utf-8")
    (folder / "3.png").write_bytes(b"\x89PNG not a picture at all, really")
    with pytest.raises(DatasetError) as error:
        prepare(options(dataset_config=path), None, 16)
    said = str(error.value)
    assert said.startswith("4 pictures cannot be used: ") and said.endswith("go on without them with --skip_bad")
    assert all(f"{k}.png: " in said for k in range(4)) and "4.png" not in said
    data = prepare(options(dataset_config=path, skip_bad=True), None, 16)
    r = data.report
    assert [item.path.name for item in data.items] == ["4.png", "5.png"]
    assert r.found == 6 == r.trained + r.held_out + sum(r.dropped.values()) and r.dropped == {"cannot be used": 4}
    assert all(f"left out {folder / f'{k}.png'}: " in data.print_table() for k in range(4))
    known = {str(folder / "4.png"): "it cannot be decoded"}
    data = prepare(options(dataset_config=path), None, 16, bad=known, collect=True)
    assert [Path(fault.file).name for fault in data.report.faults] == ["0.png", "3.png", "4.png", "1.png", "2.png"]
    with pytest.raises(DatasetError, match="nothing to train on"):
        prepare(options(dataset_config=path, skip_bad=True), None, 16, bad=known | {str(folder / "5.png"): "no"})
