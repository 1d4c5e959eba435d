"""HiDream as a whole: text and pictures against diffusers' pipeline, Llama live and stored, experts, files, mistakes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import relative
from PIL import Image
from safetensors.torch import load_file, save_file
from studio_support import batched_and_one_by_one, make_toy, pair_of, start_of, studio_of
from training_support import arguments, losses, pictures  # noqa: F401

from library import checkpoints, options, sample
from library.components import hidream_text
from library.errors import ConfigError
from library.families import get_family
from library.families.family import Text
from library.prompts import defaults_of, parse_line

FAMILY = get_family("hidream")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy("hidream", tmp_path_factory.mktemp("toys") / "hidream")


@pytest.fixture(scope="module")
def studio(toy):
    return studio_of(toy)


@pytest.fixture(scope="module")
def pipeline(toy, studio):
    """diffusers' pipeline with its own classes and the toy's weights."""
    import diffusers
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    encoders, tokenizers = studio.encoders
    clips = []
    for encoder in encoders[:2]:
        clips.append(CLIPTextModelWithProjection(encoder.config).eval())
        clips[-1].load_state_dict(encoder.state_dict())
    t5 = T5EncoderModel(T5Config(**encoders[2].config.to_dict())).eval()
    t5.load_state_dict(load_file(toy.with_name("t5xxl.safetensors")), strict=False)
    ours = studio.denoiser
    transformer = diffusers.HiDreamImageTransformer2DModel(**_public(ours.config))
    transformer.load_state_dict(ours.state_dict())
    vae = diffusers.AutoencoderKL(**_public(studio.vae.config))
    vae.load_state_dict(studio.vae.state_dict())
    vae.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    for tokenizer in tokenizers:
        tokenizer.model_max_length = 10_000
    pairs = zip((*clips, t5, Llama(encoders[3])), tokenizers, strict=True)
    made = diffusers.HiDreamImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        *(one for pair in pairs for one in pair),
        transformer.eval(),
    )
    made.set_progress_bar_config(disable=True)
    made.default_sample_size = 6  # the area that it scales every size to
    return made


def _public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


class Llama(torch.nn.Module):
    """LlamaForCausalLM as far as the pipeline asks it; the toy has no output head."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, output_hidden_states, output_attentions):
        return self.model(input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states)


CAPTIONS = ["", "a red cat", "the picture of a black dog and a house " * 20]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_text_is_what_diffusers_pipeline_encodes(studio, pipeline, caption):
    """Four encoders of 128 tokens each, padding included; also with Llama's part made later."""
    encoders, tokenizers = studio.encoders
    with torch.no_grad():
        ours = studio.family.encode(encoders, tokenizers, Text(caption), "cpu")
        text, _, llama, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, device="cpu")
        cached = hidream_text.encode_cached(encoders, tokenizers, Text(caption), "cpu")
        later = hidream_text.complete(encoders[3:], cached)
    assert ours["llama"].shape == (4, 128, 64) and ours["text"].shape == (128, 64) and ours["pooled"].shape == (64,)
    assert relative(ours["llama"], llama[:, 0]) < 1e-5 and relative(ours["text"], text[0]) < 1e-5
    assert relative(ours["pooled"], pooled[0]) < 1e-5
    assert later.keys() == ours.keys() and all(torch.equal(later[name], ours[name]) for name in ours)
    cut = studio.family.tokenize(tokenizers, caption)[1]
    assert caption.endswith(cut) and bool(cut) == (len(caption) > 200)
    assert sum(v.numel() for name, v in cached.items() if "llama" in name) == 2 * 128


def test_clips_of_77_positions_read_77_tokens(studio):
    from tools.toy_parts import clip

    encoders, tokenizers = studio.encoders
    short = type(encoders[0])(type(encoders[0].config)(**clip(32, encoders[0].config.vocab_size)[0]))
    with torch.no_grad():
        cond = studio.family.encode([short, *encoders[1:]], tokenizers, Text(CAPTIONS[2]), "cpu")
    assert cond["pooled"].shape == (64,)


def draw(studio, line, shape, **changes):
    prompt = parse_line(line, "test", defaults_of(studio.family))
    settings = {"steps": prompt.sample_steps, "scale": prompt.scale, "shift": prompt.flow_shift,
                "sampler": prompt.sample_sampler} | changes  # fmt: skip
    return sample.generate_latents(studio.family, studio.denoiser, *studio.conditions(prompt), shape=shape, seed=5,
                                   device="cpu", **settings)  # fmt: skip


def test_a_picture_is_the_one_that_diffusers_pipeline_makes(studio, pipeline):
    ours = draw(studio, "a red cat --n blurry --s 3", (16, 6, 6))
    assert (FAMILY.sampling["scale"], FAMILY.sampling["flow_shift"]) == (5.0, 3.0)
    theirs = pipeline(
        "a red cat", negative_prompt="blurry", height=48, width=48, sigmas=np.linspace(1, 1 / 3, 3), guidance_scale=5.0,
        latents=start_of((16, 6, 6), 5), output_type="latent",
    ).images  # fmt: skip
    assert relative(ours, theirs) < 1e-4
    with torch.no_grad():
        pixels = pipeline.vae.decode(theirs / 0.3611 + 0.1159).sample[0].clamp(-1, 1)
    picture = sample.decode(studio.family, studio.vae, ours)
    assert np.abs(picture.astype(float) - ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 1.5


def test_a_picture_that_is_not_square_has_no_tokens_of_padding(studio, pipeline):
    """diffusers' model given the tokens, their positions and a mask of ones, in Euler steps of its scheduler."""
    scheduler, (c, h, w) = pipeline.scheduler, (16, 4, 8)
    ours = draw(studio, "a red cat --s 2", (c, h, w), scale=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 2, 2))
    cond, x = pair_of(studio, "a red cat")[0], start_of((c, h, w), 5)
    grid = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(h // 2.0), torch.arange(w // 2.0), indexing="ij"), -1
    )
    with torch.no_grad():
        for time in scheduler.timesteps:
            tokens = x.reshape(1, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, h * w // 4, 4 * c)
            out = pipeline.transformer(
                tokens, time[None], cond["text"][None], cond["llama"][:, None], cond["pooled"][None],
                img_ids=grid.reshape(1, -1, 3), img_sizes=torch.tensor([[h // 2, w // 2]]),
                hidden_states_masks=torch.ones(1, h * w // 4), return_dict=False,
            )[0]  # fmt: skip
            x = scheduler.step(-out, time, x, return_dict=False)[0]
    assert relative(ours, x) < 1e-4


def test_dev_and_fast_draw_with_fresh_noise(toy):
    """x = (1 - s') x0 + s' noise, with the predicted x0: HiDream's own sampler of the distilled models."""
    studio = studio_of(toy, model_version="dev")
    ours = draw(studio, "a red cat --s 2", (16, 4, 4))
    generator, cond = torch.Generator().manual_seed(5), pair_of(studio, "a red cat")[0]
    x, sigmas = torch.randn(1, 16, 4, 4, generator=generator), (1.0, 6 / 7, 0.0)
    with torch.no_grad():
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            data = x - now * studio.family.predict(studio.denoiser, x, torch.tensor([now]), [cond])
            x = (1 - then) * data + then * torch.randn(1, 16, 4, 4, generator=generator)
    assert relative(ours, x) < 1e-4
    assert defaults_of(studio.family).sample_steps == 28 and defaults_of(studio.family).scale == 1.0
    assert "distilled" in studio.family.advice(SimpleNamespace(base_weights=None))[0] and not FAMILY.advice(None)
    plain = studio_of(toy, model_version="fast", sample_sampler="euler")
    assert (plain.settings["sample_sampler"], plain.arguments.infer_steps) == ("euler", 16)
    assert studio.arguments.sample_sampler == "lcm" and studio_of(toy).arguments.sample_sampler == "euler"


def test_a_batch_of_different_items_is_batches_of_one(studio):
    conds = [pair_of(studio, line)[0] for line in ("a cat", "the picture of a house and a green tree")]
    both, each = batched_and_one_by_one(studio, conds, (16, 4, 6))
    assert relative(both, each) < 1e-5


# ---------------------------------------------------------------- training


def trainer_of(toy, pictures, output, *extra, live=False):  # noqa: F811
    from train_network import NetworkTrainer

    given = [w for w in arguments(toy, pictures, output, *extra) if not (live and w == "--cache_text_encoder_outputs")]
    return NetworkTrainer(options.parse("hidream", given, "test"))


def test_llama_is_live_or_stored_and_the_losses_are_the_same(toy, pictures, tmp_path, capsys):  # noqa: F811
    """Cached, the disk holds ids and the other encoders leave; a second run loads Llama alone."""
    disk = ("--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1")
    ways = {
        "uncached": ("--max_train_steps", "1"),
        "live": (*disk, "--cache_dir", str(tmp_path / "cache")),
        "again": (*disk, "--cache_dir", str(tmp_path / "cache")),
        "stored": (*disk, "--cache_dir", str(tmp_path / "stored"), "--cache_llama3"),
    }
    found, kept, size = {}, {}, {}
    for name, words in ways.items():
        trainer = trainer_of(toy, pictures, tmp_path / name, *words, live=name == "uncached")
        trainer.run()
        found[name], kept[name] = losses(tmp_path / name), sorted(trainer.runtime._text)
        folder = tmp_path / ("stored" if name == "stored" else "cache") / "text"
        size[name] = max((p.stat().st_size for p in folder.glob("**/*.safetensors")), default=0)
    assert "0 were cached" in capsys.readouterr().out
    assert kept == {"uncached": ["clip_g", "clip_l", "llama3", "t5xxl"], "live": ["llama3"], "again": ["llama3"],
                    "stored": []}  # fmt: skip
    assert all(one == pytest.approx(found["uncached"], rel=1e-5) for one in found.values())
    assert size["stored"] - size["live"] > 100_000 > 2 * size["live"] - 2 * 128 * 64 * 4


def test_every_expert_learns_and_diffusers_pipeline_takes_our_lora(toy, studio, pipeline, pictures, tmp_path):  # noqa: F811
    words = ("--max_train_steps", "2", "--learning_rate", "3e-2", "--gradient_checkpointing")
    trainer = trainer_of(toy, pictures, tmp_path, *words, "--save_format", "diffusers")
    trainer.run()
    ups = {k: v for k, v in load_file(tmp_path / "run.safetensors").items() if "lora_B" in k and ".experts." in k}
    assert len(ups) == 4 * 4 * 3 and all(float(value.abs().max()) > 0 for value in ups.values())
    gates = [module for module in trainer.denoiser.modules() if type(module).__name__ == "MoEGate"]
    assert len(gates) == 4 and all(gate.alpha == 0 for gate in gates)  # the balancing loss
    noisy, cond = torch.randn(1, 16, 4, 4), pair_of(studio, "a cat")[0]
    with torch.no_grad():
        ours = trainer.family.predict(trainer.denoiser.eval(), noisy, torch.tensor([0.5]), [cond])
        base = trainer.family.predict(studio.denoiser, noisy, torch.tensor([0.5]), [cond])
        pipeline.load_lora_weights(str(tmp_path / "run.safetensors"))
        theirs = trainer.family.predict(pipeline.transformer, noisy, torch.tensor([0.5]), [cond])
        pipeline.unload_lora_weights()
    assert relative(ours, base) > 0.02 and relative(theirs, ours) < 1e-5


def test_an_expert_without_tokens_does_not_stop_a_quantised_run(toy, tmp_path, monkeypatch):
    from library.models import hidream as model

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red cat")
    data = tmp_path / "data.toml"
    data.write_text(
        f"[[datasets]]\nresolution = 32\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\ncaption_extension = '.txt'\n"
    )
    counted, count = [], model._on_host
    monkeypatch.setattr(model, "_on_host", lambda *given: counted.append(count(*given)) or counted[-1])
    trainer_of(toy, data, tmp_path / "out", "--max_train_steps", "2", "--fp8_scaled", "--gradient_checkpointing").run()
    assert min(map(min, counted)) == 0 and max(map(sum, counted)) == 2 * (4 + 3 * 128)
    assert all(np.isfinite(losses(tmp_path / "out")))


def test_the_memory_plan_counts_llama_in_training(toy, pictures, tmp_path):  # noqa: F811
    """Without weights nobody knows which token goes to which expert: they are spread evenly."""
    from library.memory import planner

    pytest.importorskip("bitsandbytes")
    words = ("--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1", "--nf4_llm")
    chosen = options.parse("hidream", arguments(toy, pictures, tmp_path, *words), "test")
    work = planner.Work(width=64, height=64, batch=1, items=3, caption="a red cat")
    plan = planner.make(chosen, chosen.family, work)
    training, weights = plan["device"]["phases"]["training"], load_file(toy.with_name("llama3.safetensors"))
    embedding = weights["model.embed_tokens.weight"].numel()
    linear = sum(value.numel() for key, value in weights.items() if key.startswith("model.layers") and value.ndim == 2)
    # 4 bits a value and a byte for 64 values, and what does not count: norms, the scales of scales, tables
    assert training["encoders_bytes"] == pytest.approx(2 * embedding + linear * (1 / 2 + 1 / 64), rel=0.1)
    assert training["peak_bytes"] > training["encoders_bytes"] + training["weights_bytes"]
    assert plan["disk"]["cache_bytes"] < 3 * 4 * 128 * 64 * 2  # of which Llama's states alone would be that much


MISTAKES = [
    ("clip_g", "bare", r"bare.safetensors is not a CLIP-G text encoder with its projection \(text_projection\)"),
    ("clip_l", "t5xxl", "is not a CLIP-L text encoder with its projection .*: it is a T5"),
    ("llama3", "t5xxl", "is not a Llama 3.1 8B text encoder: it is a T5"),
    ("llama3", "wide", r"wide.safetensors: its states are 40 wide and .*denoiser.safetensors reads 64"),
]


@pytest.mark.parametrize(("option", "file", "said"), MISTAKES)
def test_a_wrong_encoder_is_named_before_anything_loads(toy, pictures, tmp_path, monkeypatch, option, file, said):  # noqa: F811
    if file == "wide":
        wide = load_file(toy.with_name("llama3.safetensors"))
        wide["model.embed_tokens.weight"] = wide["model.embed_tokens.weight"][:, :40].contiguous()
        save_file(wide, toy.with_name("wide.safetensors"), {"head_dim": "16"})
    if file == "bare":
        whole = load_file(toy.with_name("clip_g.safetensors"))
        save_file({k: v for k, v in whole.items() if "text_projection" not in k}, toy.with_name("bare.safetensors"))
    monkeypatch.setattr(checkpoints, "load_part", None)
    with pytest.raises(ConfigError, match=said):
        trainer_of(toy, pictures, tmp_path / "out", f"--{option}", str(toy.with_name(f"{file}.safetensors")))
