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
    Golden("flux", "flux", ("plain", "kontext", "kontext2"), variant="dev"),
    Golden("flux", "flux", ("kontext2_index",), options={"references": "index"}, variant="dev"),
    Golden("flux_schnell", "flux", variant="schnell"),
    # "odd" and "edit_big" are ComfyUI's positions, which differ from Qwen's own code: see the tests of Qwen-Image.
    Golden("qwen_image", "qwen_image", ("plain", "padded", "edit", "edit_plus")),
    Golden("qwen_image_2511", "qwen_image", ("plain", "edit", "edit_plus"), variant="2511"),
    Golden("chroma", "chroma", ("ragged", "plain")),
    Golden("flux2", "flux2", ("plain", "edit2")),
    Golden("flux2_klein", "flux2", ("plain", "edit2")),
    Golden("sd3", "sd3", per_mille=True, variant="3.5 medium", masks=False),
    Golden("sd3_2b", "sd3", per_mille=True, variant="3 medium", masks=False),
    Golden("sd3_large", "sd3", per_mille=True, variant="3.5 large", masks=False),
)
ALL_FORMS = ("comfy", "kohya", "diffusers")
FLUX = "convert_flux_transformer_checkpoint_to_diffusers"
FULL_SIZE = (
    FullSize("hunyuan_image", "hunyuan_image"),
    FullSize("flux", "flux", "dev", FLUX, ALL_FORMS),
    FullSize("flux_schnell", "flux", "schnell", FLUX, ALL_FORMS),
    FullSize("flux_kontext", "flux", "dev", FLUX, ALL_FORMS),
    FullSize("qwen_image", "qwen_image", forms=ALL_FORMS),
    FullSize("qwen_image_edit_2511", "qwen_image", "2511", forms=ALL_FORMS),
    FullSize("flux2", "flux2", "dev", "convert_flux2_transformer_checkpoint_to_diffusers"),
    FullSize("flux2_klein_4b", "flux2", "klein 4B", "convert_flux2_transformer_checkpoint_to_diffusers"),
    FullSize("flux2_klein_9b", "flux2", "klein 9B", "convert_flux2_transformer_checkpoint_to_diffusers"),
    FullSize("chroma", "chroma", "", "convert_chroma_transformer_checkpoint_to_diffusers", ALL_FORMS),
    FullSize("sd3", "sd3", "3.5 medium", "convert_sd3_transformer_checkpoint_to_diffusers", ALL_FORMS),
    FullSize("sd3_large", "sd3", "3.5 large", "convert_sd3_transformer_checkpoint_to_diffusers", ALL_FORMS),
)
