"""Distilled models are told by their weights, their folder or their name, and the plan warns of training them."""

from types import SimpleNamespace

import pytest

from library.components import few_steps
from library.families import FAMILIES, get_family
from library.families.family import Family

NAMES = {  # published files: few steps, and the models that they were made of
    "chroma": (["Chroma1-Flash.safetensors"], ["Chroma1-HD.safetensors", "chroma-unlocked-v48.safetensors"]),
    "flux": (["flux.1-turbo-alpha-merged.safetensors"], ["flux1-dev.safetensors", "flux1-kontext-dev.safetensors"]),
    "hunyuan_video": (["fast_hunyuan_video_t2v_720_fp8_e4m3fn.safetensors"],
                      ["hunyuan_video_720_cfgdistill_fp8_e4m3fn.safetensors", "hunyuan_video_t2v_720p_bf16.safetensors"]),
    "ltx_video": (["ltxv-13b-0.9.7-distilled.safetensors"], ["ltxv-13b-0.9.7-dev.safetensors"]),
    "qwen_image": (["Qwen-Image-Edit-Lightning-4steps.safetensors"], ["qwen_image_edit_2509_bf16.safetensors"]),
    "sd": (["sd_turbo.safetensors"], ["v1-5-pruned-emaonly.safetensors", "hyperrealism.safetensors"]),
    "sd3": (["sd3.5_large_turbo.safetensors"], ["sd3.5_large.safetensors"]),
    "sdxl": (["sd_xl_turbo_1.0_fp16.safetensors", "sdxl_lightning_4step.safetensors", "DreamShaperXL_Turbo_v2.safetensors"],
             ["sd_xl_base_1.0.safetensors", "hyperRealisticXL.safetensors", "enlightening.safetensors"]),
    "wan": (["Wan2_1-T2V-14B_CausVid_fp8.safetensors", "wan2.1_t2v_14b_lightx2v_cfg_step_distill.safetensors"],
            ["wan2.1_t2v_1.3B_fp16.safetensors", "wan2.2_t2v_high_noise_14B_fp16.safetensors"]),
    "z_image": (["z_image_turbo_bf16.safetensors"], ["z_image_bf16.safetensors"]),
}  # fmt: skip


def options(path, **more):
    return SimpleNamespace(pretrained_model_name_or_path=str(path), base_weights=None, **more)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_published_files_tell(name, tmp_path):
    family = get_family(name)
    family = family.resolved(options(tmp_path / NAMES[name][0][0])) if name == "z_image" else family
    for few, files in zip((True, False), NAMES[name], strict=True):
        for file in files:
            told = family.advice(options(tmp_path / file))
            assert bool(told) == few, file
            assert not few or (file in told[0] and "--base_weights" in told[0])
    adapted = options(tmp_path / NAMES[name][0][0])
    adapted.base_weights = ["adapter.safetensors"]
    assert family.advice(adapted) == (), "a training adapter is what the advice asks for"


def test_a_diffusers_folder_is_told_by_its_own_name_and_by_a_part_of_it(tmp_path):
    part = get_family("sdxl").denoiser
    (tmp_path / "sdxl-turbo" / part.diffusers_folder).mkdir(parents=True)
    assert few_steps.word_in(tmp_path / "sdxl-turbo", part, "turbo lcm") == "turbo"
    assert few_steps.word_in(tmp_path / "sdxl-turbo" / part.diffusers_folder, part, "turbo lcm") == "turbo"
    assert few_steps.word_in(tmp_path / "sdxl-turbo" / "x.safetensors", part, "turbo lcm") == ""


@pytest.mark.parametrize(
    ("name", "tells"), [("flux", "flux_schnell"), ("flux", "flux"), ("hunyuan_image", "hunyuan_image")]
)
def test_weights_tell(name, tells, tmp_path):
    """schnell lacks the guidance that dev embeds; the distilled HunyuanImage embeds one that its base lacks."""
    from test_check import header, keys_of

    shapes = keys_of(tells)
    family = get_family(name)
    guided = {key.replace("time_in.", "guidance_in."): s for key, s in shapes.items() if key.startswith("time_in.")}
    cases = [(shapes, tells == "flux_schnell")]
    if name == "hunyuan_image":
        cases.append((shapes | guided, True))
    for k, (content, few) in enumerate(cases):
        own = options(header(tmp_path / f"{k}.safetensors", content))
        for option in (*family.options, *family.inference_options):
            vars(own).setdefault(option.name, option.default)
        told = family.resolved(own).advice(own)
        assert bool(told) == few and (not few or "guidance" in told[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_toys_and_base_models_are_not_warned_of(name):
    family = get_family(name)
    assert isinstance(family, Family)
    if name != "cosmos_predict2":  # whose advice is about its options
        assert not [text for text in family.advice(options("denoiser.safetensors")) if "distilled" in text]
