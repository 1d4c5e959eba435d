"""Clips in the caches: by content and frames, resumable, shared over processes; and the loss of clips with masks."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_data import options, picture
from test_videos import RULE
from video_support import number_of, pattern, write_video

from library import losses, strategies
from library.data.dataset import prepare


class Clips:
    """A video model whose VAE averages 4 frames of 8x8 pixels after the first frame, and counts what it encodes."""

    def __init__(self, limit=None):
        self.name, self.title, self.recipe, self.max_controls, self.frames = "clips", "Clips", "", 0, RULE
        self.least_controls, self.control_size = 0, None
        self.vae, self.text_encoders, self.image_encoders = SimpleNamespace(option="vae"), (), ()
        self.encode_item, self.text_pictures, self.text_frame = self.item, None, None
        self.shapes, self.limit = [], limit
        self.encode_still, self.sizes = None, ()

    def encode_image(self, vae, pixels):
        if self.limit is not None and len(self.shapes) >= self.limit:
            raise KeyboardInterrupt
        self.shapes += [tuple(pixels.shape[1:])] * len(pixels)
        spatial = torch.nn.functional.avg_pool3d(pixels, (1, 8, 8))
        fours = spatial[:, :, 1:].unflatten(2, ((spatial.shape[2] - 1) // 4, 4)).mean(3)
        return torch.cat([spatial[:, :, :1], fours], 2)

    def item(self, vae, image_encoders, given):
        return {"first": given.pixels[:, :1, ::8, ::8], "frames": torch.tensor(given.frames)}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "clips"
    (folder / "still").mkdir(parents=True)
    write_video(folder / "a.mp4", 30)
    write_video(folder / "b.mp4", [pattern(n + 100) for n in range(13)])
    for n in range(7):
        Image.fromarray(pattern(n + 200)).save(folder / "still" / f"{n}.png")
    (tmp_path / "pictures").mkdir()
    picture(tmp_path / "pictures" / "p.png")
    (tmp_path / "vae.safetensors").write_bytes(b"vae")

    def start(keys="target_frames = 5\nframe_extraction = 'chunk'\n", limit=None, rank=0, world=1, **changes):
        text = "[general]\nresolution = 64\nclass_tokens = 'x'\n[[datasets]]\nbatch_size = 2\n[[datasets.subsets]]\n"
        text += f"video_directory = {json.dumps(str(folder))}\n{keys}[[datasets.subsets]]\nimage_dir = 'pictures'\n"
        (tmp_path / "data.toml").write_text(text, encoding="utf-8")
        values = {"cache_latents": True, "cache_latents_to_disk": True, "vae": str(tmp_path / "vae.safetensors")}
        chosen = options(dataset_config=str(tmp_path / "data.toml"), **values | changes)
        family = Clips(limit)
        data = prepare(chosen, family, 16)
        encoders = strategies.Encoders(lambda: torch.nn.Linear(1, 1), list)
        source = strategies.latent_source(data, family, encoders, chosen, rank, world, say=lambda text: None)
        return SimpleNamespace(family=family, data=data, source=source, folder=folder)

    start.folder = folder
    return start


def test_a_clips_latents_are_those_of_its_frames_cached_or_not(run):
    cached, live = run(), run(cache_latents=False, cache_latents_to_disk=False)
    assert sorted(cached.family.shapes) == [(3, 1, 64, 64)] + 9 * [(3, 5, 64, 64)]
    for item in cached.data.items:
        kept, fresh = (one.source.picture(item, random.Random(0)) for one in (cached, live))
        a, (x,) = cached.source.finish(kept.tensor[None], [kept.extra])
        b, (y,) = live.source.finish(fresh.tensor[None], [fresh.extra])
        assert a.shape == (1, 3, 1 + item.frames // 4, 8, 8) and torch.allclose(a, b, atol=2e-3)
        assert int(x["frames"]) == int(y["frames"]) == item.frames
        assert torch.allclose(x["first"].float(), y["first"], atol=2e-3)
        if item.clip:
            first = {"a.mp4": 0, "b.mp4": 100, "still": 200}[item.path.name] + item.clip.start
            assert number_of((b[0].movedim(0, -1)[0].numpy() + 1) * 127) == first


def test_the_second_start_encodes_nothing_and_only_what_changed_is_made_anew(run):
    run()
    assert not run().family.shapes
    write_video(run.folder / "b.mp4", [pattern(n + 50) for n in range(13)])
    assert len(run().family.shapes) == 2
    Image.fromarray(pattern(7)).save(run.folder / "still" / "3.png")
    assert len(run().family.shapes) == 1
    more = run("target_frames = [5, 9]\nframe_extraction = 'chunk'\n")
    assert {shape[1] for shape in more.family.shapes} == {9} and len(more.family.shapes) == 4
    # of the clips from frame 0 at half the rate none has the frames of one that is there
    assert len(run("target_frames = 5\nsource_fps = 32.0\n").family.shapes) == 2


def test_interrupted_caching_goes_on_and_processes_share_it(run):
    with pytest.raises(KeyboardInterrupt):
        run(limit=4)
    assert len(run().family.shapes) == 6
    write_video(run.folder / "a.mp4", [pattern(n + 300) for n in range(30)])
    shares = [run(rank=rank, world=2).family.shapes for rank in (0, 1)]
    assert sum(map(len, shares)) == 6 and min(map(len, shares)) >= 2
    assert not run().family.shapes


def test_few_clips_wait_for_the_vae(run, monkeypatch):
    waiting, most = [], []

    class Slow(Clips):
        def encode_image(self, vae, pixels):
            most.append(len(waiting))
            waiting.clear()
            return super().encode_image(vae, pixels)

    keep = strategies._pixels
    monkeypatch.setattr(strategies, "_pixels", lambda item, flip: waiting.append(item) or keep(item, flip))
    monkeypatch.setattr(strategies, "AHEAD", 0)
    monkeypatch.setitem(globals(), "Clips", Slow)
    run()
    assert max(most) == 1 and len(most) == 10


def test_a_mask_weighs_every_frame_of_a_video_alike():
    error, mask = torch.ones(2, 4, 3, 8, 8), torch.zeros(2, 64, 64)
    mask[1, :32] = 1
    weighed = losses.masked(error, mask)
    assert weighed[0].sum() == 0 and (weighed[1, :, :, :4] == 1).all() and (weighed[1, :, :, 4:] == 0).all()
    assert torch.equal(losses.masked(error[:, :, 0], mask), weighed[:, :, 0])
