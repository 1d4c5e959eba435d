"""What SD 1, SD 2 and SDXL share: sd-scripts' options for DDPM training and what they imply for the record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.components.clip_prompts import CHUNK
from library.errors import ConfigError
from library.families.family import Family
from library.objective import Objective, ddpm
from library.option_kinds import Option

if TYPE_CHECKING:
    from library.families.family import Cond

LOSS, TEXT = "Noise and loss of Stable Diffusion", "Text and prediction of Stable Diffusion"
V_PRED, ZTSNR = "v_pred", "ztsnr"  # keys of ComfyUI's by which a checkpoint says what it predicts
SAMPLERS = ddpm().sampler_names
MODEL = (
    Option("v_parameterization", "flag", False, "the model predicts v; known by itself where the file says so", TEXT),
    Option("zero_terminal_snr", "flag", False, "the last timestep is pure noise (needs v)", TEXT),
    Option("max_token_length", "int", CHUNK, "tokens of a caption that are read: 75, 150 or 225", TEXT, low=CHUNK),
    Option("weighted_captions", "flag", False, "(word:1.2) and [word] weigh words of captions and prompts", TEXT),
    Option("sample_sampler", "str", "euler", "sampler of pictures", TEXT, choices=SAMPLERS),
)
TRAINING = (
    Option("noise_offset", "float", None, "strength of noise that shifts whole channels", LOSS, low=0),
    Option("noise_offset_random_strength", "flag", False, "with a strength in 0..noise_offset for each item", LOSS),
    Option("adaptive_noise_scale", "float", None, "adds this times the latents' channel mean to the strength", LOSS),
    Option("multires_noise_iterations", "int", None, "octaves of multi-resolution noise", LOSS, low=1),
    Option("multires_noise_discount", "float", 0.3, "strength of each octave in that of the one before", LOSS, low=0),
    Option("min_snr_gamma", "float", None, "gamma of min-SNR loss weights; 5 is usual", LOSS, low=0),
    Option("scale_v_pred_loss_like_noise_pred", "flag", False, "weigh the loss of v like that of the noise", LOSS),
    Option("v_pred_like_loss", "float", None, "adds this times the loss as v would have it (not with v)", LOSS, low=0),
    Option("debiased_estimation_loss", "flag", False, "loss weights 1 / sqrt(SNR)", LOSS),
    # sd-scripts' users pass it out of habit; what it asks for always holds here
    Option("no_half_vae", "flag", False, "nothing: the VAE always computes in float32", LOSS),
)
SAMPLING = {"sample_steps": 30, "scale": 7.5}  # sd-scripts' prompts that say nothing
NEEDS = (  # option, another that must be on for it to do anything
    ("noise_offset_random_strength", "noise_offset"),
    ("adaptive_noise_scale", "noise_offset"),
    ("multires_noise_discount", "multires_noise_iterations"),
)


def markers(path: str | None) -> set[str]:
    """The markers that a checkpoint has, read from its header."""
    from library.checkpoints import Checkpoint

    if not path or not Path(path).is_file():
        return set()
    return {V_PRED, ZTSNR} & Checkpoint.open(path).files.keys()


def objective_of(options: Any, is_v: bool = False) -> Objective:
    """The DDPM that the file and the options ask for; `is_v`: the model is known to predict v.

    Raises ConfigError for options that contradict it or each other.
    """
    found = markers(options.pretrained_model_name_or_path)
    is_v = is_v or bool(options.v_parameterization) or V_PRED in found
    zero = bool(options.zero_terminal_snr) or ZTSNR in found
    if zero and not is_v:
        raise ConfigError(
            "--zero_terminal_snr needs a model that predicts v: one that predicts noise cannot begin at pure noise; "
            "add --v_parameterization or remove it"
        )
    if is_v and getattr(options, "v_pred_like_loss", None):
        raise ConfigError("--v_pred_like_loss is for models that predict noise, this one predicts v; remove it")
    if not is_v and getattr(options, "scale_v_pred_loss_like_noise_pred", False):
        raise ConfigError(
            "--scale_v_pred_loss_like_noise_pred is for models that predict v, this one predicts noise; remove it, "
            "or add --v_parameterization if the model does"
        )
    given = getattr(options, "given", lambda name: False)
    for name, other in NEEDS:
        if given(name) and not options.off(name) and not getattr(options, other):
            raise ConfigError(f"--{name} has no effect without --{other}; remove it")
    return ddpm("v" if is_v else "epsilon", zero)


def text_settings(options: Any) -> dict[str, Any]:
    """`most` and `weighted` of `clip_prompts`. Raises ConfigError."""
    most = options.max_token_length
    if most % CHUNK or most > 3 * CHUNK:
        raise ConfigError(f"--max_token_length {most}: 75, 150 and 225 are possible, chunks of 75 tokens")
    return {"most": most, "weighted": bool(options.weighted_captions)}


def new_markers(family: Family) -> dict[str, Any]:
    """The markers that a whole checkpoint of this record has to hold, empty tensors."""
    import torch

    objective = family.objective
    wanted = {V_PRED: objective.prediction_type == "v", ZTSNR: objective.zero_terminal_snr}
    return {key: torch.empty(0) for key, on in wanted.items() if on}


def sized(family: Any, given: Any) -> Cond:
    """{"size": [6]}: height and width of the file, crop from top and left, height and width that is trained."""
    import torch

    (width, height), (left, top), (target_w, target_h) = given.original_size, given.crop, given.size
    return {"size": torch.tensor([height, width, top, left, target_h, target_w], dtype=torch.float32)}
