"""Plans against real runs, phase by phase, of clips and of models of 50 to 100 million weights.

With --cpu_offload_checkpointing the host is no part of what is counted.
"""

import json

import pytest
import torch
from PIL import Image
from studio_support import make_toy
from torch.utils._python_dispatch import _disable_current_modes
from video_support import write_video

from library import checkpoints, options
from library.families import get_family
from library.memory import activations, denoiser, plan_table, planner, sketch
from library.preflight import check
from tools.make_toy_model import part_shapes, weights

torch.set_num_threads(1)
WIDE = {  # what is changed of the toy's configuration: 512 wide, 8 blocks of the main kind
    "z_image": {"dim": 512, "n_layers": 8, "n_heads": 4, "n_kv_heads": 4},
    "wan": {"num_attention_heads": 4, "ffn_dim": 4096, "num_layers": 8},
    "flux": {"num_attention_heads": 4, "num_layers": 3, "num_single_layers": 8},
}
LORA, WHOLE, CHECKPOINTED = "toy.toml", "toy_full.toml", "--gradient_checkpointing"
CACHES = ("--cache_latents", "--cache_text_encoder_outputs")
OFFLOADED = (CHECKPOINTED, "--cpu_offload_checkpointing")


class TwoPools(activations.HostActivations):
    """Copies as between a host and a device: those on the host are not counted, those that come back are."""

    made = None

    def __init__(self, device):
        super().__init__(device)
        TwoPools.made = self

    def put(self, tensor):
        with _disable_current_modes():
            return super().put(tensor)

    def get(self, packed):
        return super().get(packed).clone()


def widened(name, toml):
    """The toy's denoiser exchanged for one of these sizes; how many weights it has."""
    part, path = get_family(name).denoiser, toml.with_name("denoiser.safetensors")
    found, layout = checkpoints.find_part(part, str(path))
    config = checkpoints.configuration(part, str(path), found.shapes, found.metadata, layout)
    shapes = part_shapes(part, config | WIDE[name], layout)
    checkpoints.save(weights(shapes, 0), path, {"format": "pt"})
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def dataset(folder, side, frames):
    """Two pictures or clips, a batch; the dataset file."""
    folder.mkdir()
    kind, rule = ("video", f"target_frames = [{frames}]\n") if frames > 1 else ("image", "")
    for k in range(2):
        if frames > 1:
            write_video(folder / f"{k}.mp4", frames, size=(side, side))
        else:
            Image.new("RGB", (side, side), (90 * k, 120, 40)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(
            f"a thing {k} from the left"
        )  # short: a plan counts a mask that transformers leaves out of a run
    where = f"{'video_directory' if frames > 1 else 'image_dir'} = {json.dumps(str(folder))}\n"
    text = f"[[datasets]]\nresolution = {side}\nbatch_size = 2\n[[datasets.subsets]]\n{where}{rule}"
    path = folder.with_suffix(".toml")
    path.write_text(text + "caption_extension = '.txt'\n", encoding="utf-8")
    return path


def real_peaks(given, monkeypatch):
    """Of a whole run: phase -> the most bytes of tensor storage that were alive in it, from the loading of its models on."""
    from library.runtime import Runtime
    from train_network import NetworkTrainer

    family, peaks, tracker, load = given.family.resolved(given), {}, sketch.Tracker(), Runtime._load_part
    now = ["start"]

    def until_here():
        peaks[now[0]] = max(peaks.get(now[0], 0), tracker.peak)

    def loaded(self, part, *how):
        until_here()
        model = load(self, part, *how)
        now[0] = "text" if part in family.text_encoders else "training" if part == family.denoiser else "latents"
        for weight in (*model.parameters(), *model.buffers()):
            tracker.see(weight)  # an unused one comes from the file's memory map without any operation
        tracker.restart()
        return model

    monkeypatch.setattr(Runtime, "_load_part", loaded)
    trainer = NetworkTrainer(given)
    trainer.finish = until_here  # the report has pictures, not the loop
    with tracker:
        trainer.run()
    return peaks


def compare(name, folder, monkeypatch, *extra, toml=LORA, side=256, frames=1, wide=True, cached=True):
    """Two steps on two items, so that the optimizer's states are there in the second.

    Peaks within a tenth, training's without the frozen weights too; the bytes of block inputs that move are equal.
    """
    monkeypatch.setattr(activations, "LEAST", 1 << 9)  # values; these models' inputs are smaller than real ones
    monkeypatch.setattr(denoiser, "HostActivations", TwoPools)
    toy = make_toy(name, folder / "toy")
    if wide:
        assert 40e6 < widened(name, toy) < 110e6
    words = ["--config_file", str(toy.with_name(toml)), "--dataset_config", str(dataset(folder / "data", side, frames)),
             "--output_dir", str(folder / "out"), "--output_name", "run", *(CACHES if cached else ()),
             "--max_train_steps", "2", *extra]  # fmt: skip
    given = options.parse(name, words, "test")
    found = check(given, lambda text: None)
    work = plan_table.largest(found.dataset)
    assert (work.width, work.frames, work.batch) == (side, frames, 2)
    plan = planner.make(given, found.family, work, accelerator=False)
    real, phases, host = real_peaks(given, monkeypatch), plan["device"]["phases"], plan["host"]
    if not cached:  # all of a run's models are there at once
        assert phases["training"]["peak_bytes"] == pytest.approx(max(real.values()), rel=0.1)
        assert phases["training"]["vae_bytes"] > 0 < phases["training"]["encoders_bytes"]
        return
    ratios = {name: phases[name]["peak_bytes"] / real[name] for name in ("latents", "training")}
    # A real run on a CPU has its caches in the same memory: of the texts all but the last while that is encoded, and
    # in training instead of the batch's copy on the device.
    caches = host["cached_text_bytes"] // 2 + host["cached_latents_bytes"]
    ratios["text"] = (phases["text"]["peak_bytes"] + caches) / real["text"]
    frozen = phases["training"]["weights_bytes"]
    ratios["training but for frozen weights"] = (phases["training"]["peak_bytes"] - frozen) / (
        real["training"] - frozen
    )
    print(name, {name: round(ratio, 3) for name, ratio in ratios.items()})
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
    if OFFLOADED[1] in extra:
        assert TwoPools.made.moved_bytes == 2 * host["block_inputs"] > 0  # in two steps


@pytest.mark.parametrize(("name", "side", "frames"), [("wan", 128, 9), ("flux", 128, 1)])
def test_plans_are_within_a_tenth_of_real_runs_in_every_phase(name, side, frames, tmp_path, monkeypatch):
    compare(name, tmp_path, monkeypatch, *OFFLOADED, side=side, frames=frames, wide=False)


@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_without_caches_encoders_and_vae_count_in_training(name, tmp_path, monkeypatch):
    compare(name, tmp_path, monkeypatch, CHECKPOINTED, side=128, wide=False, cached=False)


CASES = [
    ("z_image", 1, LORA, (CHECKPOINTED,)),
    ("z_image", 1, LORA, OFFLOADED),
    ("z_image", 1, WHOLE, (CHECKPOINTED,)),
    ("wan", 9, LORA, (CHECKPOINTED,)),
    ("wan", 9, LORA, OFFLOADED),
    ("wan", 9, WHOLE, (CHECKPOINTED,)),
    ("flux", 1, LORA, (CHECKPOINTED,)),
    ("flux", 1, LORA, OFFLOADED),
    ("flux", 1, WHOLE, (CHECKPOINTED,)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames", "toml", "extra"), CASES)
def test_plans_of_larger_models_are_within_a_tenth_of_real_runs(name, frames, toml, extra, tmp_path, monkeypatch):
    compare(name, tmp_path, monkeypatch, *extra, toml=toml, frames=frames)
