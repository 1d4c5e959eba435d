"""Caches: found by content, noticed when anything they were made from changes, gone on with after an interruption."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import dataset_file, folder, options, picture  # noqa: F401  (fixtures)

from library import strategies
from library.data import cache_start
from library.data.dataset import prepare
from library.errors import ConfigError, DatasetError
from library.families.family import Tokenizer
from library.strategies import Request


class Counting:
    """A family whose VAE averages 8x8 pixels and whose text encoder counts letters; both count their calls."""

    def __init__(self):
        self.name, self.encoded, self.texts, self.recipe = "fake", [], [], ""
        encoder = SimpleNamespace(
            option="text_encoder", tokenizer=Tokenizer("tokenizer", "owner/name"), precision_options=""
        )
        self.vae, self.text_encoders, self.image_encoders = SimpleNamespace(option="vae"), (encoder,), ()
        self.tokenizers = ((encoder.tokenizer, encoder),)
        self.encode_item = self.encode_still = self.text_pictures = self.text_frame = self.partly_live = None
        self.text_prefixes, self.control_size, self.caption_text = (), None, str
        self.title, self.max_controls, self.least_controls, self.frames = "Fake", 0, 0, None
        self.sizes = ()
        self.limit = None

    def encode_image(self, vae, pixels):
        if self.limit is not None and len(self.encoded) + len(pixels) > self.limit:
            raise KeyboardInterrupt
        self.encoded += [float(p.sum()) for p in pixels]
        out = torch.nn.functional.avg_pool2d(pixels, 8) * float(vae.weight)
        return out.to(memory_format=torch.channels_last)  # as convolutions may give them

    def encode(self, encoders, tokenizers, text, device):
        self.texts.append(text.caption)
        return {"text": torch.arange(len(text.caption) + 1, dtype=torch.float32)[:, None]}


def load_vae():
    vae = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(vae.weight)
    return vae


ENCODERS = strategies.Encoders(load_vae, list)


@pytest.fixture
def run(folder, tmp_path):  # noqa: F811
    for name in ("vae", "te"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode() * 10)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")

    alone = threading.Lock()

    def start(
        dataset_text="resolution = 64\nbatch_size = 2\n",
        subset="",
        rank=0,
        world=1,
        limit=None,
        wait=lambda: None,
        **changes,
    ):
        family = Counting()
        family.limit = limit
        values = {"cache_latents": True, "cache_latents_to_disk": True, "cache_text_encoder_outputs": True,
                  "cache_text_encoder_outputs_to_disk": True, "vae": str(tmp_path / "vae.safetensors"),
                  "text_encoder": str(tmp_path / "te.safetensors"), "tokenizer": str(tmp_path / "tokenizer"),
                  "vae_batch_size": 2}  # fmt: skip
        with alone:  # they write the same description
            path = dataset_file(tmp_path, folder, dataset_text, subset)
            chosen = options(dataset_config=path, **{**values, **changes})
            data = prepare(chosen, family, 16)
        latents = strategies.latent_source(data, family, ENCODERS, chosen, rank, world, say=lambda text: None)
        text = strategies.text_source(
            data, family, lambda: ([load_vae()], []), chosen, [Request("")], rank, world, lambda t: None, wait=wait
        )
        return SimpleNamespace(family=family, data=data, latents=latents, text=text)

    start.folder, start.tmp = folder, tmp_path
    return start


def test_the_second_start_encodes_nothing_and_gives_the_same_values(run):
    first, second = run(), run()
    assert len(first.family.encoded) == 6 and len(first.family.texts) == 7
    assert not second.family.encoded and not second.family.texts
    memory = run(cache_latents_to_disk=False)
    for item in first.data.items:
        values = [r.latents.get(item.index) for r in (first, second, memory)]
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
        pixels = np.asarray(Image.open(item.path).convert("RGB"), np.float32)
        left = (pixels.shape[1] - 64) // 2
        square = torch.from_numpy(pixels[:, left : left + 64] / 127.5 - 1).permute(2, 0, 1)
        assert torch.allclose(values[0], torch.nn.functional.avg_pool2d(square, 8), atol=2e-3)
        request = Request(item.caption.splitlines()[0])
        assert torch.equal(second.text.get(request)["text"], first.text.get(request)["text"])


def change_caption(run):
    (run.folder / "2.txt").write_text("a new caption", encoding="utf-8")


def change_picture(run):
    picture(run.folder / "new.png", (64, 64))
    (run.folder / "new.png").replace(run.folder / "2.png")


def change_vae(run):
    (run.tmp / "vae.safetensors").write_bytes(b"another one")


def change_encoder(run):
    (run.tmp / "te.safetensors").write_bytes(b"another one")


def change_tokenizer(run):
    (run.tmp / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')


def flip_byte(run):
    path = next((run.folder / ".lorasmith" / "latents").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(run):
    path = next((run.folder / ".lorasmith" / "text").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-5])


CHANGES = [(change_caption, 0, 1), (change_picture, 1, 0), (change_vae, 6, 0), (change_encoder, 0, 7)]
CHANGES += [(change_tokenizer, 0, 7), (flip_byte, 1, 0), (truncate, 0, 1)]


@pytest.mark.parametrize(("change", "pictures", "texts"), CHANGES, ids=[c[0].__name__ for c in CHANGES])
def test_only_what_changed_is_made_anew(run, change, pictures, texts):
    run()
    change(run)
    again = run()
    assert (len(again.family.encoded), len(again.family.texts)) == (pictures, texts)


def test_interrupted_caching_goes_on_where_it_stopped(run):
    with pytest.raises(KeyboardInterrupt):
        run(limit=4)
    again = run()
    assert len(again.family.encoded) == 2
    assert not [p for p in (run.folder / ".lorasmith").rglob("*.partial")]


def test_two_processes_share_the_work_and_read_the_same(run):
    meet = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda rank: run(rank=rank, world=2, wait=meet.wait), (0, 1))
    assert len(one.family.encoded) == len(two.family.encoded) == 3
    assert sorted((len(one.family.texts), len(two.family.texts))) == [3, 4]
    assert not set(one.family.texts) & set(two.family.texts)
    whole = run()
    assert not whole.family.encoded and not whole.family.texts and torch.isfinite(whole.latents.get(5)).all()
    for request, cond in whole.text.memory.items():
        assert all(torch.equal(each.text.get(request)["text"], cond["text"]) for each in (one, two))


def test_flipped_pictures_have_their_own_latents(run):
    flipped = run(subset="flip_aug = true\n")
    assert len(flipped.family.encoded) == 12
    for item in flipped.data.items:
        assert torch.allclose(
            flipped.latents.get(item.index, True), flipped.latents.get(item.index).flip(-1), atol=1e-3
        )


def test_a_caption_of_several_pictures_is_encoded_and_stored_once(run):
    for path in run.folder.glob("*.txt"):
        path.write_text("one for all", encoding="utf-8")
    first = run()
    assert first.family.texts == ["", "one for all"]
    assert len(list((run.folder / ".lorasmith" / "text").rglob("*.safetensors"))) == 2


def test_captions_that_change_in_every_step_are_refused_beside_cached_text(run):
    with pytest.raises(ConfigError, match="shuffle_caption"):
        run(subset="shuffle_caption = true\n")


def test_latents_that_are_no_numbers_name_their_picture(run, monkeypatch):
    monkeypatch.setattr(
        Counting, "encode_image", lambda self, vae, pixels: torch.full((len(pixels), 3, 8, 8), float("nan"))
    )
    with pytest.raises(DatasetError, match=r"\d\.png"):
        run()


def test_after_its_first_entry_the_forecast_of_a_cache_is_the_size_that_it_gets(run, monkeypatch):
    totals, made = [], []

    class Noted(cache_start.Progress):
        def add(self, *values):
            super().add(*values)
            totals.append((self.what, self.total))

    monkeypatch.setattr(strategies, "Progress", Noted)
    run(dataset_text="resolution = 64\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16\n")
    for path in (run.folder / ".lorasmith" / "latents").rglob("*.safetensors"):
        data = path.read_bytes()
        made.append(len(data) - 8 - int.from_bytes(data[:8], "little"))
    assert len(set(made)) > 1  # buckets of different sizes
    assert {total for what, total in totals if what == "latents"} == {sum(made)}


def test_the_time_that_is_left_is_told_after_seconds_and_then_every_minute(tmp_path, monkeypatch):
    said, now = [], [100.0]
    monkeypatch.setattr(cache_start.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3e12))
    progress = cache_start.Progress("latents", 1000, 4000, tmp_path, said.append, lambda: now[0])
    for _ in range(40):  # one in two seconds, four pixels and a gigabyte each
        progress.add(1, 4, 10**9)
        now[0] += 2
    assert said == [
        "latents: 4 of 1000 made, 0.5 a second, 33 min left; 1000.00 GB in all, 3000.00 GB are free",
        "latents: 34 of 1000 made, 0.5 a second, 32 min left; 1000.00 GB in all, 3000.00 GB are free",
    ]
    assert [cache_start.spoken(s) for s in (40, 700, 9000)] == ["40 s", "12 min", "2.5 h"]


@pytest.mark.parametrize(("count", "free", "warns"), [(4, 10**9, False), (4, 700, True), (1, 700, False)])
def test_a_cache_that_will_not_fit_is_a_warning_after_its_first_entry(tmp_path, monkeypatch, count, free, warns):
    said = []
    monkeypatch.setattr(cache_start.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    progress = cache_start.Progress("text", count, count, tmp_path, said.append)
    progress.add(1, 1, 300)
    assert len(said) == warns and all("warning: text: about 0.00 GB more will be written" in line for line in said)


def test_a_value_takes_two_bytes_on_the_disk(run):
    run()
    for path in Path(run.folder / ".lorasmith" / "latents").rglob("*.safetensors"):
        size = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - 8 - size == 2 * 3 * 8 * 8
        assert "picture" in json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["identity"]
