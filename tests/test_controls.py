"""Control pictures: which belong together, in which size they are seen, what is refused by name; musubi-tuner's rules."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import options, picture

from library import strategies
from library.data import buckets, controls, images
from library.data.cache import ContentHashes
from library.data.dataset import prepare
from library.errors import ConfigError, DatasetError
from library.families.family import Tokenizer

HEAD = "[[datasets]]\nresolution = 64\nbatch_size = 2\n"


@pytest.fixture
def targets(tmp_path):
    """Three 64-pixel pictures a, b, c with captions."""
    folder = tmp_path / "targets"
    folder.mkdir()
    for name in "abc":
        picture(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"make it {name}", encoding="utf-8")
    return folder


def made(folder: Path, *names: str, size=(64, 64)) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        picture(folder / name, size)
    return folder


def prepared(tmp_path, targets, extra="", family=None, head=HEAD, collect=False, **changes):
    text = f"{head}[[datasets.subsets]]\nimage_dir = {json.dumps(str(targets))}\ncaption_extension = '.txt'\n{extra}"
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    chosen = options(dataset_config=str(tmp_path / "data.toml"), **changes)
    return prepare(chosen, family, 16, collect=collect)


def edits(most, text_pictures=None, least=0, size=None):
    """What an edit model says of its control pictures."""
    return SimpleNamespace(
        title="Edit", max_controls=most, least_controls=least, control_size=size, text_pictures=text_pictures, text_frame=None, sizes=(),
        frames=None, pixel_multiple=16, partly_live=None, caption_text=str,
    )  # fmt: skip


def beside(data):
    return {item.path.stem: [control.name for control in item.controls] for item in data.items}


# ---------------------------------------------------------------- pairs


def test_controls_are_found_by_equal_stems_and_by_number_in_every_folder(tmp_path, targets):
    made(tmp_path / "one", "a.jpg", "b.png", "c.webp")
    assert beside(prepared(tmp_path, targets, "control_directory = 'one'\n")) == {
        "a": ["a.jpg"], "b": ["b.png"], "c": ["c.webp"],
    }  # fmt: skip
    made(tmp_path / "two", "a_0.png", "a_1.png", "b.png", "c_0010.png", "c_0000.png")
    for n in range(1, 10):
        picture(tmp_path / "two" / f"c_{n:04d}.png")
    found = beside(prepared(tmp_path, targets, "control_directory = ['two', 'one']\n"))
    assert found["a"] == ["a_0.png", "a_1.png", "a.jpg"] and found["b"] == ["b.png", "b.png"]
    assert found["c"] == [f"c_{n:04d}.png" for n in range(11)] + ["c.webp"]


def test_all_pictures_without_a_control_are_named_and_a_control_without_a_picture_is_noted(tmp_path, targets):
    made(tmp_path / "one", "b.png")
    with pytest.raises(DatasetError, match=r"2 pictures have no control picture in .*one: a\.png, c\.png"):
        prepared(tmp_path, targets, "control_directory = 'one'\n")
    made(tmp_path / "one", "a.png", "c.png", "d.png")
    notes = prepared(tmp_path, targets, "control_directory = 'one'\n").print_table()
    assert "1 control pictures belong to no picture (d.png)" in notes


def test_pictures_whose_names_end_in_numbers_keep_their_own_controls(tmp_path, targets):
    picture(targets / "a_1.png")
    (targets / "a_1.txt").write_text("another", encoding="utf-8")
    made(tmp_path / "one", "a.png", "a_1.png", "b.png", "c.png")
    assert beside(prepared(tmp_path, targets, "control_directory = 'one'\n")) == {
        name: [f"{name}.png"] for name in ("a", "a_1", "b", "c")
    }
    (tmp_path / "one" / "a.png").rename(tmp_path / "one" / "a_0.png")
    with pytest.raises(DatasetError, match=r"a_1\.png fits the picture a\.png by its number and the picture a_1"):
        prepared(tmp_path, targets, "control_directory = 'one'\n")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("a_0.png", "a_2.png"), r"a_0.png, a_2.png, the control pictures of a.png, .* number 1 is missing"),
        (("a_2.png",), r"number 1 is missing"),
        (("a.png", "a.jpg"), r"a\.jpg and a\.png are the same control picture"),
        (("a_1.png", "a_01.png"), r"a_01\.png and a_1\.png are the same control picture"),
    ],
)
def test_incomplete_and_double_controls_are_named(tmp_path, targets, names, match):
    made(tmp_path / "one", *names, "b.png", "c.png")
    with pytest.raises(DatasetError, match=match):
        prepared(tmp_path, targets, "control_directory = 'one'\n")


def test_a_control_that_is_there_twice_is_a_fault_of_its_picture_alone(tmp_path, targets):
    made(tmp_path / "one", "a.png", "a.jpg", "b.png", "b_0.png", "b_0.jpg")
    said = prepared(tmp_path, targets, "control_directory = 'one'\n", collect=True).report.faults
    reasons = {Path(fault.file).name: fault.reason for fault in said}
    assert set(reasons) == {"a.png", "b.png", "c.png"} and "b_0.jpg and b_0.png are the same" in reasons["b.png"]
    made(tmp_path / "two", "a.png", "b.png", "b_0.png", "b_0.jpg", "c.png")
    made(targets, "b_0.png")
    (targets / "b_0.txt").write_text("b, again", encoding="utf-8")
    data = prepared(tmp_path, targets, "control_directory = 'two'\n", skip_bad=True)
    assert [item.path.name for item in data.items] == ["a.png", "b.png", "c.png"]  # what is twice is b_0's own
    assert [path.name for path in data.items[1].controls] == ["b.png"]


def test_a_damaged_control_and_a_missing_folder_are_named(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png")
    (tmp_path / "one" / "b.png").write_bytes(b"\x89PNG is not enough")
    with pytest.raises(DatasetError, match=r"b\.png: its control picture .*b\.png: its header cannot be read"):
        prepared(tmp_path, targets, "control_directory = 'one'\n")
    with pytest.raises(DatasetError, match="control_directory elsewhere: no such folder"):
        prepared(tmp_path, targets, "control_directory = 'elsewhere'\n")


def from_lines(tmp_path, lines, extra="", suffix="jsonl"):
    path = tmp_path / f"meta.{suffix}"
    text = "\n".join(map(json.dumps, lines)) if suffix == "jsonl" else json.dumps(lines)
    path.write_text(text, encoding="utf-8")
    (tmp_path / "m.toml").write_text(
        f"{HEAD}[[datasets.subsets]]\nmetadata_file = {json.dumps(str(path))}\n{extra}", encoding="utf-8"
    )
    return prepare(options(dataset_config=str(tmp_path / "m.toml")), None, 16)


def test_metadata_files_name_controls_in_the_order_of_their_numbers(tmp_path, targets):
    made(tmp_path / "one", "x.png", "y.png", "z.png", "c.png")
    first = {"image_path": "targets/a.png", "caption": "a", "control_path": "one/x.png"}
    second = {"image_path": "targets/b.png", "caption": "b", "control_path_10": "one/z.png"}
    second |= {"control_path_1": "one/y.png", "control_path_0": "one/x"}
    third = {"image_path": "targets/c.png", "caption": "c", "control_path": None}  # text to image beside edits
    data = from_lines(tmp_path, [first, second, third])
    assert beside(data) == {"a": ["x.png"], "b": ["x.png", "y.png", "z.png"], "c": []}
    entries = {line.pop("image_path"): line for line in (first, second, third)}
    assert beside(from_lines(tmp_path, entries, suffix="json")) == beside(data)
    entries["targets/a.png"]["control_path"] = "x.png"
    entries["targets/b.png"] = {"caption": "b", "control_path": "y.png"}
    folder = f"control_directory = {json.dumps(str(tmp_path / 'one'))}\n"
    assert beside(from_lines(tmp_path, entries, folder, "json")) == {"a": ["x.png"], "b": ["y.png"], "c": ["c.png"]}


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"control_path": "one/gone.png"}, r"a\.png: its control picture one/gone\.png is not found"),
        ({"control_paths": ["one/x.png"]}, "has control_paths = "),
        ({"control_path": "one/x.png", "control_path_0": "one/x.png"}, "has control_path_0 = "),
    ],
)
def test_mistakes_in_metadata_files_are_named(tmp_path, targets, entry, match):
    made(tmp_path / "one", "x.png")
    with pytest.raises(DatasetError, match=match):
        from_lines(tmp_path, [{"image_path": "targets/a.png", "caption": "a", **entry}])


# ---------------------------------------------------------------- sizes and pixels


def test_by_default_a_control_covers_the_bucket_of_its_picture(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png", size=(200, 100))
    for item in prepared(tmp_path, targets, "control_directory = 'one'\n").items:
        assert item.control_buckets == ((64, 64),)
        whole = np.asarray(Image.open(item.controls[0]))
        expected = images.resize(whole, (128, 64), "area")[:, 32:96]
        (tensor,) = controls.load(item)
        assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.from_numpy(expected.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1)


def test_no_resize_control_keeps_the_pixels_and_cuts_both_sides_to_the_unit(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png", size=(203, 100))
    item = prepared(tmp_path, targets, "control_directory = 'one'\nno_resize_control = true\n").items[0]
    (tensor,) = controls.load(item)
    whole = np.asarray(Image.open(item.controls[0]))
    left, top = (203 - 192) // 2, (100 - 96) // 2
    expected = whole[top : top + 96, left : left + 192].astype(np.float32)
    assert torch.equal(tensor, torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)
    assert buckets.cropped((10, 40), 16).bucket == (16, 32)  # too small for one unit: enlarged to it


def test_control_resolution_gives_the_area_in_the_controls_own_proportions():
    generator = random.Random(0)
    for _ in range(300):
        size = (generator.randint(200, 3000), generator.randint(200, 3000))
        area = generator.randint(256, 1024) ** 2
        side = int(area**0.5)
        placed = buckets.of_area(size, (side, side), 16)
        (w, h), ratio = placed.bucket, size[0] / size[1]
        assert w % 16 == h % 16 == 0 and w * h <= side * side
        if 0.25 < ratio < 4:  # of ALL sizes that fill the area none comes nearer to the proportions
            every = [(x, side * side // x // 16 * 16) for x in range(16, side * 16, 16) if side * side // x >= 16]
            assert abs(w / h - ratio) <= min(abs(x / y - ratio) for x, y in every) + 1e-9
            assert placed.resized[0] >= w and placed.resized[1] >= h
    assert buckets.of_area((5000, 10), (64, 64), 16).bucket == (256, 16)


def test_a_family_may_say_the_size_of_a_control_and_the_dataset_another(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png", size=(200, 100))
    family = edits(1, size=lambda size: (size[0] // 4, 32))
    item = prepared(tmp_path, targets, "control_directory = 'one'\n", family).items[0]
    expected = images.resize(np.asarray(Image.open(item.controls[0])), (50, 32), "area")
    assert torch.equal(controls.load(item)[0], images.to_tensor(expected))
    for key, size in (("control_resolution = 128", (176, 80)), ("no_resize_control = true", (192, 96))):
        item = prepared(tmp_path, targets, f"control_directory = 'one'\n{key}\n", family).items[0]
        assert item.control_buckets == (size,)


def test_both_keys_together_make_the_resolution_an_upper_limit(tmp_path, targets):
    made(tmp_path / "one", "a.png", size=(400, 200))
    made(tmp_path / "one", "b.png", "c.png", size=(90, 50))
    extra = "control_directory = 'one'\ncontrol_resolution = 128\n"
    data = prepared(tmp_path, targets, extra)
    assert [item.control_buckets for item in data.items] == [((176, 80),), ((160, 96),), ((160, 96),)]
    limited = prepared(tmp_path, targets, extra + "no_resize_control = true\n")
    assert [item.control_buckets for item in limited.items] == [((176, 80),), ((80, 48),), ((80, 48),)]
    shapes = [tuple(tensor.shape) for item in limited.items for tensor in controls.load(item)]
    assert shapes == [(3, 80, 176), (3, 48, 80), (3, 48, 80)]


def test_controls_are_upright_on_white_and_mirrored_with_their_picture(tmp_path, targets):
    made(tmp_path / "one", "b.png", "c.png")
    base = np.zeros((64, 64, 3), np.uint8)
    base[:, :32] = (255, 0, 0)  # left half red as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # left becomes top
    Image.fromarray(base).save(tmp_path / "one" / "a.png", exif=exif)
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[:, :16] = (0, 0, 255, 255)
    Image.fromarray(rgba).save(tmp_path / "one" / "b.png")
    upright, clear, _ = prepared(tmp_path, targets, "control_directory = 'one'\n").items
    (tensor,) = controls.load(upright)
    assert (tensor[0, :32] == 1).all() and (tensor[0, 32:] == -1).all()
    (tensor,) = controls.load(clear)
    assert (tensor[:, :, 16:] == 1).all() and (tensor[0, :, :16] == -1).all()
    assert torch.equal(controls.load(clear, flipped=True)[0], tensor.flip(-1))


# ---------------------------------------------------------------- batches, limits, caches


def test_controls_of_unequal_sizes_and_pictures_without_are_never_in_one_batch(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", size=(128, 64))
    made(tmp_path / "one", "c.png", size=(64, 128))
    plain = made(tmp_path / "plain", "p.png", "q.png")
    extra = "control_directory = 'one'\nno_resize_control = true\n"
    extra += f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(plain))}\nclass_tokens = 'thing'\n"
    data = prepared(tmp_path, targets, extra)
    batches = {frozenset(data.items[i].path.stem for i, _ in plan.entries) for plan in data.batches(0)}
    assert batches == {frozenset("ab"), frozenset("c"), frozenset("pq")}
    table = data.print_table()
    assert "bucket 64x64 with controls 128x64: 2 pictures" in table and "bucket 64x64: 2 pictures" in table


def test_more_controls_than_the_model_takes_are_refused_by_name(tmp_path, targets):
    made(tmp_path / "one", "a_0.png", "a_1.png", "b.png", "c.png")
    extra = "control_directory = 'one'\n"
    assert len(prepared(tmp_path, targets, extra, edits(2)).items) == 3
    with pytest.raises(DatasetError, match=r"takes 1 control pictures, but a\.png have more"):
        prepared(tmp_path, targets, extra, edits(1))
    with pytest.raises(DatasetError, match="takes no control pictures"):
        prepared(tmp_path, targets, extra, edits(0))
    with pytest.raises(DatasetError, match=r"pairs of pictures, but a\.png, b\.png, c\.png have no control picture"):
        prepared(tmp_path, targets, "", edits(2, least=1))
    rest = prepared(tmp_path, targets, extra, edits(1), skip_bad=True)
    assert [item.path.name for item in rest.items] == ["b.png", "c.png"]
    assert [(fault.file[-5:], fault.reason) for fault in rest.report.faults] == [
        ("a.png", "it has 2 control pictures, Edit takes 1")
    ]
    assert rest.report.found == rest.report.trained + sum(rest.report.dropped.values()) == 3


def test_what_changes_a_picture_alone_is_refused_beside_controls(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png")
    with pytest.raises(ConfigError, match=r"random_crop would change a\.png and not its controls"):
        prepared(tmp_path, targets, "control_directory = 'one'\nrandom_crop = true\n")
    mirrored = "control_directory = 'one'\nflip_aug = true\n"
    assert prepared(tmp_path, targets, mirrored, edits(1)).items
    with pytest.raises(ConfigError, match="flip_aug does not go with Edit"):
        prepared(tmp_path, targets, mirrored, edits(1, text_pictures=tuple))
    with pytest.raises(ConfigError, match="is the image_dir"):
        prepared(tmp_path, targets, f"control_directory = {json.dumps(str(targets))}\n")


def test_the_identity_of_a_cache_entry_knows_content_size_and_order_of_its_controls(tmp_path, targets):
    made(tmp_path / "one", "a_0.png", "a_1.png", "b.png", "c.png")

    def identities(extra=""):
        data = prepared(tmp_path, targets, "control_directory = 'one'\n" + extra)
        return [controls.identity(item, ContentHashes(None)) for item in data.items]

    first = identities()
    assert first == identities() and len(set(first)) == 3
    assert all(a != b for a, b in zip(first, identities("control_resolution = 128\n"), strict=True))
    a, b = tmp_path / "one" / "a_0.png", tmp_path / "one" / "a_1.png"
    swapped = a.read_bytes(), b.read_bytes()
    b.write_bytes(swapped[0]), a.write_bytes(swapped[1])
    second = identities()
    assert second[0] != first[0] and second[1:] == first[1:]
    assert controls.identity(prepared(tmp_path, targets).items[0], ContentHashes(None)) == ""


def test_musubis_form_is_read_a_dataset_that_names_its_own_files_and_older_names(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png")
    head = (
        "[general]\nresolution = [64, 64]\ncaption_extension = '.txt'\nqwen_image_edit_control_resolution = [32, 32]\n"
    )
    body = "[[datasets]]\nimage_directory = 'targets'\ncontrol_directory = 'one'\n"
    (tmp_path / "m.toml").write_text(head + body, encoding="utf-8")
    data = prepare(options(dataset_config=str(tmp_path / "m.toml")), None, 16)
    assert len(data.items) == 3 and all(item.control_buckets == ((32, 32),) for item in data.items)
    for line, match in {
        "control_directry = 'x'\n": "did you mean 'control_directory'",
        "cache_directory = 'x'\n": "give --cache_dir",
        "image_dir = 'x'\n": "is another name",
        "control_directory = 3\n": "is not a text or a list of texts",
    }.items():
        text = head + body + line if "control_directory" not in line else head + body.split("control")[0] + line
        (tmp_path / "m.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=match):
            prepare(options(dataset_config=str(tmp_path / "m.toml")), None, 16)


# ---------------------------------------------------------------- caching


class Edit:
    """An edit model: its VAE averages 8x8 pixels, controls are cached beside latents, the text encoder sees them."""

    def __init__(self, sees=True):
        self.name, self.title, self.recipe, self.max_controls, self.frames = "edit", "Edit", "", 2, None
        self.least_controls, self.control_size, self.partly_live = 0, None, None
        self.caption_text = str
        tokenizer = Tokenizer("tokenizer", "owner/name")
        self.text_encoders = (SimpleNamespace(option="text_encoder", tokenizer=tokenizer, precision_options=""),)
        self.vae, self.image_encoders, self.items, self.texts = SimpleNamespace(option="vae"), (), 0, 0
        self.text_prefixes, self.tokenizers = (), ((tokenizer, self.text_encoders[0]),)
        self.encode_still, self.sizes = None, ()
        self.text_pictures = (lambda given: tuple(one[:, ::2, ::2] for one in given)) if sees else None
        self.text_frame = None

    def encode_image(self, vae, pixels):
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def encode_item(self, vae, image_encoders, given):
        self.items += 1
        size = torch.tensor([*given.original_size, *given.crop, *given.size])
        return {f"control.{n}": self.encode_image(vae, one) for n, one in enumerate(given.controls)} | {"size": size}

    def encode(self, encoders, tokenizers, text, device):
        self.texts += 1
        return {"text": torch.stack([torch.tensor(float(len(text.caption))), *(p.mean() for p in text.pictures)])}


def cached(tmp_path, targets, family, extra="", **changes):
    for name in ("vae", "te"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    files = {"vae": "vae.safetensors", "text_encoder": "te.safetensors", "tokenizer": "vae.safetensors"}
    values = {"cache_latents": True, "cache_latents_to_disk": True, "cache_text_encoder_outputs": True}
    values |= {"cache_text_encoder_outputs_to_disk": True, "vae_batch_size": 2, "prior_loss_weight": 1.0}
    values |= {name: str(tmp_path / file) for name, file in files.items()} | changes
    extra = "control_directory = 'one'\nno_resize_control = true\n" + extra
    data = prepared(tmp_path, targets, extra, family, **values)
    chosen = options(dataset_config="", **values)
    encoders = strategies.Encoders(lambda: torch.nn.Linear(1, 1), list)
    latents = strategies.latent_source(data, family, encoders, chosen, say=lambda text: None)
    text = strategies.text_source(data, family, lambda: ([torch.nn.Linear(1, 1)], []), chosen, say=lambda t: None)
    return data, latents, text


@pytest.mark.parametrize("sees", [True, False])
def test_only_what_a_changed_control_decides_is_made_anew(tmp_path, targets, sees):
    made(tmp_path / "one", "a_0.png", "a_1.png", "b.png", "c.png", size=(80, 64))
    first, second, third = Edit(sees), Edit(sees), Edit(sees)
    data, latents, text = cached(tmp_path, targets, first)
    assert (first.items, first.texts) == (3, 3)
    for item in data.items:
        entry = latents.entry(item.index)
        assert set(entry) == {"latents", "size"} | {f"control.{n}" for n in range(len(item.controls))}
        for n, control in enumerate(controls.load(item)):
            assert torch.allclose(entry[f"control.{n}"].float(), first.encode_image(None, control), atol=2e-3)
        assert entry["size"].tolist() == [64, 64, 0, 0, 64, 64]
        seen = text.get(strategies.Request.of(first, item.caption, item.controls))["text"]
        assert len(seen) == 1 + (len(item.controls) if sees else 0)
    cached(tmp_path, targets, second)
    assert (second.items, second.texts) == (0, 0)
    picture(tmp_path / "one" / "new.png", (80, 64)).replace(tmp_path / "one" / "b.png")
    cached(tmp_path, targets, third)
    assert (third.items, third.texts) == (1, 1 if sees else 0)


def test_mirrored_items_have_mirrored_controls_cached_or_not(tmp_path, targets):
    made(tmp_path / "one", "a.png", "b.png", "c.png", size=(80, 64))
    family = Edit(sees=False)
    data, latents, _ = cached(tmp_path, targets, family, "flip_aug = true\n")
    _, live, _ = cached(tmp_path, targets, family, "flip_aug = true\n", cache_latents=False)
    seen = set()
    for seed in range(12):
        item = data.items[seed % 3]
        kept, fresh = (source.picture(item, random.Random(seed)) for source in (latents, live))
        (a, (x,)), (b, (y,)) = (source.finish(one.tensor[None], [one.extra])
                                for source, one in ((latents, kept), (live, fresh)))  # fmt: skip
        assert torch.allclose(a, b, atol=2e-3) and torch.allclose(x["control.0"].float(), y["control.0"], atol=2e-3)
        seen.add(torch.equal(y["control.0"], family.encode_image(None, controls.load(item, True)[0])))
    assert seen == {True, False}


def test_a_sample_prompt_sees_its_control_in_its_own_proportions(tmp_path, targets):
    from library.prompts import parse_line
    from library.sample import item_of

    made(tmp_path, "wide.png", size=(200, 100))
    prompt = parse_line(f"make it blue --w 128 --h 128 --ci {tmp_path / 'wide.png'}", "here")
    given = item_of(prompt, edits(1), 64)
    assert given.size == (128, 128) and [tuple(one.shape) for one in given.controls] == [(3, 80, 176)]
    (stretched,) = item_of(prompt, edits(1, size=lambda size: (size[0] // 2, size[0] // 2)), 64).controls
    whole = np.asarray(Image.open(tmp_path / "wide.png").resize((100, 100), Image.Resampling.LANCZOS))
    assert torch.equal(stretched, images.to_tensor(whole))


def test_a_prompt_without_the_pictures_that_its_model_needs_or_with_too_many_is_named(tmp_path, targets):
    from library.prompts import check_controls, parse_line

    line = f"make it blue --ci {targets / 'a.png'}"
    one, two = (parse_line(line + (f" --ci {targets / 'b.png'}") * n, "here") for n in (0, 1))
    check_controls([one, two], edits(2, least=1))
    with pytest.raises(ConfigError, match="prompt 2 has 2 control pictures, Edit takes 1"):
        check_controls([one, two], edits(1))
    with pytest.raises(ConfigError, match="prompt 1 has 1 control pictures, Edit takes none"):
        check_controls([one], edits(0))
    with pytest.raises(ConfigError, match="prompt 1 has no control picture, and Edit edits pictures"):
        check_controls([parse_line("make it blue", "here")], edits(1, least=1))
