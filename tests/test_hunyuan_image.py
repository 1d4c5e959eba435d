"""HunyuanImage-2.1 as a whole: its prompts, its pictures against diffusers' pipeline, its LoRA converter, learning."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import SHARED, relative
from studio_support import make_toy

from library import sample
from library.families import get_family
from library.families.family import Text

FAMILY = get_family("hunyuan_image")
GUIDE_TEMPLATE_TOKENS = 34  # of Qwen2.5-VL, before the caption


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hunyuan_image")
    return make_toy("hunyuan_image", folder)


@pytest.fixture(scope="module")
def studio(toy):
    from library.inference import Studio, parser_of

    words = ["--device", "cpu", "--save_path", "x.png", "--dit", str(toy.with_name("denoiser.safetensors"))]
    for part in ("vae", "text_encoder", "byt5"):
        words += [f"--{part}", str(toy.with_name(f"{part}.safetensors"))]
    options = parser_of(FAMILY).parse_args(words)
    return Studio(FAMILY.resolved(options), options)


def test_what_is_quoted_is_drawn_as_letters_and_apostrophes_are_not():
    from library.components.glyphs import IMAGE

    glyphs = IMAGE.prompt
    assert glyphs('a sign "OPEN" and “关门”') == 'Text "OPEN". Text "关门". '
    assert glyphs("it's a dog that doesn't bark") == ""


def test_the_head_of_the_template_is_34_tokens_of_the_real_tokenizer():
    from transformers import AutoTokenizer

    from library.families.hunyuan_image import TEMPLATE

    folder = SHARED / "tokenizers" / "qwen25"
    if not folder.exists():
        pytest.skip("the tokenizer of Qwen2.5 is not in this repository")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer(TEMPLATE[0])["input_ids"]) == GUIDE_TEMPLATE_TOKENS
    ids, cut = FAMILY.tokenize([tokenizer], "a red fox " * 600)
    assert len(ids) == GUIDE_TEMPLATE_TOKENS + 1000 and "red fox" in cut
    assert tokenizer.decode(ids[-1:]) == "<|im_end|>"


@pytest.mark.parametrize("caption", ["a red cat", 'a sign that says "cat"'])
def test_text_is_what_diffusers_pipeline_encodes(studio, caption):
    """Its pipeline drops the first 34 tokens, as many as the real head has; with this tokenizer it has others."""
    from diffusers import HunyuanImagePipeline

    (encoder, byt5), (tokenizer, byte_tokenizer) = studio.encoders
    head = len(tokenizer(FAMILY_HEAD, add_special_tokens=False)["input_ids"])
    language = SimpleNamespace(dtype=encoder.dtype)
    pipeline = HunyuanImagePipeline.__new__(HunyuanImagePipeline)
    call = lambda **inputs: encoder(**inputs)  # noqa: E731
    call.dtype = language.dtype
    with torch.no_grad():
        theirs, mask = HunyuanImagePipeline._get_qwen_prompt_embeds(
            pipeline, tokenizer, call, [caption], device="cpu", tokenizer_max_length=100,
            template=FAMILY_HEAD + "{}<|im_end|>", drop_idx=head,
        )  # fmt: skip
        ours = FAMILY.encode([encoder, byt5], [tokenizer, byte_tokenizer], Text(caption), "cpu")
        length = int(mask.sum())
        assert ours["text"].shape[0] == length and relative(ours["text"], theirs[0, :length]) < 1e-5
        if '"' not in caption:
            assert "byt5" not in ours
            return
        glyphs = 'Text "cat". '
        out = byt5(**byte_tokenizer(glyphs, return_tensors="pt"))[0]
    assert relative(ours["byt5"], out[0]) < 1e-6 and ours["byt5"].shape[0] == len(glyphs) + 1  # bytes and the end


from library.families.hunyuan_image import TEMPLATE  # noqa: E402

FAMILY_HEAD = TEMPLATE[0]


def pair_of(studio, caption):
    from library.prompts import defaults_of, parse_line

    prompt = parse_line(f"{caption} --n blurry", "test", defaults_of(studio.family))
    return studio.conditions(prompt)


def pipeline_of(studio, **guider):
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    ours = studio.denoiser
    theirs = HunyuanImageTransformer2DModel(**{k: v for k, v in ours.config.items() if not k.startswith("_")})
    theirs.load_state_dict(ours.state_dict())
    guiders = {
        name: AdaptiveProjectedMixGuidance(guidance_scale=3.5, adaptive_projected_guidance_start_step=start, **guider)
        for name, start in (("guider", 1), ("ocr_guider", 3))
    }
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), vae=studio.vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=theirs, **guiders,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("caption", "rescale"), [("a red cat", 0.0), ('a sign "cat"', 0.0), ("a red cat", 0.5)])
def test_a_picture_is_the_one_that_diffusers_pipeline_makes(studio, caption, rescale):
    """Classifier-free guidance, then adaptive projected guidance, whose start differs where letters are drawn."""
    cond, uncond = pair_of(studio, caption)
    settings = {"apg_start_step_general": 1, "apg_start_step_ocr": 3, "guidance_rescale": rescale,
                "guidance_rescale_apg": rescale}  # fmt: skip
    ours = sample.generate_latents(
        studio.family, studio.denoiser, cond, uncond, shape=(64, 2, 3), seed=5, steps=6, scale=3.5, shift=5.0,
        device="cpu", settings=settings,
    )  # fmt: skip
    pipeline = pipeline_of(studio, guidance_rescale=rescale)

    def embeds(one):
        text, glyphs = one["text"][None], one.get("byt5", torch.zeros(1, 1472))[None]
        return text, torch.ones(text.shape[:2]), glyphs, torch.full(glyphs.shape[:2], float("byt5" in one))

    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    given = dict(zip(names, embeds(cond), strict=True))
    given |= {f"negative_{name}": value for name, value in zip(names, embeds(uncond), strict=True)}
    start = torch.randn((1, 64, 2, 3), generator=torch.Generator().manual_seed(5))
    theirs = pipeline(height=64, width=96, num_inference_steps=6, latents=start, output_type="latent", **given).images
    assert relative(ours, theirs) < 1e-4
    picture = sample.decode(studio.family, studio.vae, ours)
    pixels = studio.vae.decode(theirs / 0.75289).sample[0].clamp(-1, 1)
    assert np.abs(picture.astype(float) - ((pixels + 1) * 127.5).permute(1, 2, 0).detach().numpy()).max() < 1.5


def test_a_vae_in_strips_gives_the_same_latents(studio):
    from library.components import vae_hunyuan_image

    pixels = torch.rand(1, 3, 128, 96) * 2 - 1
    with torch.no_grad():
        whole, strips = (vae_hunyuan_image.encode(studio.vae, pixels, chunk) for chunk in (0, 16))
    assert relative(strips, whole) < 1e-5


def test_a_batch_of_captions_of_different_lengths_is_two_batches_of_one(studio):
    conds = [pair_of(studio, caption)[0] for caption in ("a cat", 'the picture of a house with a sign "cat"')]
    noisy, sigma = torch.randn(2, 64, 2, 2), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        both = FAMILY.predict(studio.denoiser, noisy, sigma, conds)
        each = [FAMILY.predict(studio.denoiser, noisy[k : k + 1], sigma[k : k + 1], conds[k : k + 1]) for k in (0, 1)]
    assert relative(both, torch.cat(each)) < 1e-5


def test_a_lora_overfits_one_picture_and_switched_off_the_loss_is_the_bases(toy, tmp_path):
    """The validation loss of the training picture, with fixed noise and sigmas, falls to a tenth."""
    from PIL import Image

    from library import options
    from library.stops import Stops
    from train_network import NetworkTrainer

    for k in range(2):  # the same picture is trained and held out
        coarse = (np.random.default_rng(0).random((2, 2, 3)) * 255).astype(np.uint8)
        Image.fromarray(coarse).resize((64, 64)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a red cat")
    data = tmp_path / "data.toml"
    data.write_text(
        "[[datasets]]\nresolution = 32\nbatch_size = 8\nvalidation_split = 0.5\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(tmp_path))}\ncaption_extension = '.txt'\nnum_repeats = 8\n"
    )
    words = ["--config_file", str(toy), "--dataset_config", str(data), "--output_dir", str(tmp_path / "out"),
             "--cache_latents", "--cache_text_encoder_outputs", "--network_dim", "32", "--network_alpha", "32",
             "--learning_rate", "2e-3", "--max_train_steps", "400", "--validate_every_n_steps", "400",
             "--network_module", "networks.lora_hunyuan_image", "--network_train_unet_only",
             "--lr_scheduler", "cosine", "--network_args",
             "include_patterns=img_in.proj,final_layer.linear,final_layer.adaLN_modulation.1"]  # fmt: skip
    trainer = NetworkTrainer(options.parse("hunyuan_image", words, "test"))
    trainer.stops = Stops(tmp_path / "out")
    trainer.setup()
    before = trainer.outputs.validation.run()["average"]
    trainer.train()
    after = trainer.outputs.validation.run()["average"]
    assert after < before / 10, (before, after)
    trainer.network.set_multiplier(0.0)
    assert trainer.outputs.validation.run()["average"] == pytest.approx(before, rel=1e-5)
