"""The multimodal diffusion transformers: golden files, full-size key lists, the adapter names that ComfyUI takes."""

from denoiser_cases import FullSize, Golden


def leads_to(inputs):
    """A MeanFlow step ends at the sigma that follows in the schedule."""
    now = (inputs["sample_sigmas"] == inputs["sigmas"][0]).nonzero().flatten()[0]
    return {"next_sigma": inputs["sample_sigmas"][now + 1]}


GLYPHS = ("plain", "byt5", "byt5_padded_diffusers")
GOLDENS = (
    Golden("hunyuan_image", "hunyuan_image", GLYPHS, per_mille=True),
    Golden("hunyuan_image_distilled", "hunyuan_image", GLYPHS, per_mille=True, extra=leads_to, variant="distilled"),
)
FULL_SIZE = (FullSize("hunyuan_image", "hunyuan_image"),)
