"""Multimodal diffusion transformers against outside oracles, and what training needs of them, file by file."""

import json

import pytest
import torch
from denoiser_cases import Transfers, identity, masks_seen, meta_layout, shortened
from mmdit_cases import FULL_SIZE, GOLDENS
from oracles import golden_metadata, load, relative

from library.checkpointing import checkpoint_blocks
from library.checkpoints import load_part, save_part
from library.errors import ConfigError
from library.layout import shapes_of
from networks import lora

EVERY_CASE = [pytest.param(g, case, id=f"{g.file}-{case}") for g in GOLDENS for case in g.cases]
EVERY_FILE = [pytest.param(g, id=g.file) for g in GOLDENS]
EVERY_SIZE = [pytest.param(real, id=real.name) for real in FULL_SIZE]


@pytest.mark.parametrize(("file", "case"), EVERY_CASE)
def test_the_velocity_is_that_of_an_independent_implementation(file, case, tmp_path):
    with torch.no_grad():
        out = file.predict(file.model(tmp_path), *file.inputs(case))
    assert out.dtype == torch.float32 and relative(out, file.output(case)) < file.tolerance


@pytest.mark.parametrize(("file", "case"), EVERY_CASE)
def test_a_lora_in_the_files_own_coordinates_gives_the_independent_implementations_output(file, case, tmp_path):
    with torch.no_grad():
        out = file.predict(file.model(tmp_path, with_lora=True), *file.inputs(case))
    assert relative(out, file.output(case, "out_lora")) < file.tolerance
    assert relative(file.output(case), file.output(case, "out_lora")) > 1e-2


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_comfyui_lora_attached_to_the_model_gives_that_output_too(file, tmp_path):
    model, tensors = file.model(tmp_path), file.lora()
    network, _ = lora.create_network_from_weights(1.0, None, None, None, model, weights_sd=tensors)
    network.apply_to(None, model, False, True)
    network.load_tensors(tensors, "golden")
    with torch.no_grad():
        out = file.predict(model, *file.inputs_of_last)
    assert relative(out, file.output(file.cases[-1], "out_lora")) < file.tolerance


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_saved_model_is_the_file_that_was_loaded(file, tmp_path):
    from safetensors.torch import load_file

    save_part(file.model(tmp_path), tmp_path / "saved.safetensors", {})
    saved, expected = load_file(tmp_path / "saved.safetensors"), file.weights()
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)


@pytest.mark.parametrize("real", EVERY_SIZE)
def test_every_key_of_the_real_file_is_claimed_with_its_shape(real):
    assert not real.unclaimed(real.shapes, real.layout())


@pytest.mark.parametrize("real", EVERY_SIZE)
def test_the_toy_file_is_a_whole_small_model(real):
    assert not real.unclaimed(real.toy, meta_layout(real.part, real.toy))


@pytest.mark.parametrize("real", EVERY_SIZE)
def test_a_diffusers_folder_gives_the_same_model(real):
    ours = real.layout().shapes
    assert real.part.recognise(ours) == ("diffusers" if "diffusers" in real.part.layouts else "comfy")
    assert meta_layout(real.part, ours).shapes == ours


@pytest.mark.parametrize("family", sorted({real.family for real in FULL_SIZE}))
def test_without_a_file_the_model_has_the_released_size(family):
    real = next(real for real in FULL_SIZE if real.family == family)
    with torch.device("meta"):
        shapes = shapes_of(real.part.build({}))
    expected = real.layout().shapes
    assert {key: shapes.get(key) for key in expected if "guidance" not in key} == {
        key: shape for key, shape in expected.items() if "guidance" not in key
    }


@pytest.mark.parametrize(("real", "form"), [pytest.param(r, f, id=f"{r.name}-{f}") for r in FULL_SIZE for f in r.forms])
def test_every_adapter_name_that_is_saved_is_one_that_comfyui_takes_for_the_same_weight(real, form):
    stems, taken = real.adapter_stems(form), real.taken_by_comfyui()
    assert len(stems) > 20
    assert stems == {stem: taken.get(stem) for stem in stems}


@pytest.mark.parametrize("real", [one for one in EVERY_SIZE if one.values[0].converter])
def test_the_layout_is_diffusers_own_converter(real):
    assert not real.differences_from_converter()


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_small_file_is_named_by_family_and_variant(file):
    found = identity({key: tuple(value.shape) for key, value in file.weights().items()})
    assert (found.kind, found.family, found.variant) == ("checkpoint", file.family, file.variant)


@pytest.mark.parametrize("real", EVERY_SIZE)
def test_a_file_is_named_by_family_and_variant_under_every_container_prefix(real):
    for prefix in real.part.prefixes:
        found = identity({prefix + key: shape for key, shape in real.shapes.items()})
        assert (found.kind, found.family, found.variant) == ("checkpoint", real.family, real.variant), prefix


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_batch_of_two_lengths_is_two_batches_of_one(file, tmp_path):
    model, (noisy, sigma, conds) = file.model(tmp_path), file.inputs_of_last
    conds = shortened(conds)
    with torch.no_grad(), masks_seen() as masks:
        both = file.predict(model, noisy, sigma, conds)
        assert not file.masks or any(mask is not None for mask in masks)
        masks.clear()
        each = [file.predict(model, noisy[k : k + 1], sigma[k : k + 1], conds[k : k + 1]) for k in (0, 1)]
        same = file.predict(model, noisy, sigma, file.inputs_of_last[2])
        assert masks and all(mask is None for mask in masks), "a mask where every token counts"
    assert relative(both, torch.cat(each)) < 1e-5 and relative(both[1], same[1]) > 1e-4


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("file", EVERY_FILE)
def test_under_bf16_times_and_guidance_reach_their_embedding_in_float32(file, mode, tmp_path):
    from diffusers.models.embeddings import Timesteps

    model, seen = file.model(tmp_path, dtype=torch.bfloat16 if mode == "bf16 weights" else torch.float32), []
    for module in model.modules():
        if isinstance(module, Timesteps):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0].double().flatten() * m.scale))
    noisy, _, conds = file.inputs_of_last
    sigma, guidance = torch.tensor([0.12345, 0.98765]), torch.tensor(3.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        out = file.predict(model, noisy, sigma, [cond | {"guidance": guidance} for cond in conds])
    expected = [*sigma, guidance, torch.tensor(0.0), *(cond["next_sigma"] for cond in conds if "next_sigma" in cond)]
    expected = torch.stack(expected).double() * 1000
    for times in seen:
        assert (times[:, None] - expected).abs().amin(1).max() < 1e-3
    guided = getattr(model.config, "guidance_embeds", False)
    needed = [sigma * 1000, guidance.expand(2) * 1000] if guided else [sigma * 1000]
    for value in needed:
        assert any((times[:2] - value).abs().max() < 1e-3 for times in seen)
    assert out.dtype == torch.float32 and out.isfinite().all()


@pytest.mark.parametrize("file", EVERY_FILE)
def test_checkpointed_blocks_give_the_same_output_and_gradients(file, tmp_path):
    model, (noisy, sigma, conds) = file.model(tmp_path).requires_grad_(True).train(), file.inputs_of_last
    conds = shortened(conds)

    def gradients():
        model.zero_grad(set_to_none=True)
        out = file.predict(model, noisy, sigma, conds)
        out.square().mean().backward()
        return out.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    out, before = gradients()
    assert checkpoint_blocks(model, file.module.BLOCKS) >= 2
    again, after = gradients()
    assert relative(again, out) < 1e-6 and before.keys() == after.keys() and len(before) > 20
    assert max(relative(after[k], before[k]) for k in before if before[k].norm() > 1e-6) < 1e-4


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_step_neither_reads_from_the_device_nor_copies_to_it(file, tmp_path):
    """On the meta device nothing can be read; what is made of host data is recorded."""
    model, (noisy, sigma, conds) = file.model(tmp_path), file.inputs_of_last
    conds = [{key: value.to("meta") for key, value in cond.items()} for cond in shortened(conds)]
    model, noisy, sigma = model.to("meta"), noisy.to("meta"), sigma.to("meta")
    with torch.no_grad():
        file.predict(model, noisy, sigma, conds)  # tables of positions are made once
        with Transfers() as transfers:
            out = file.predict(model, noisy, sigma, conds)
    assert out.shape == noisy.shape and not transfers.found


@pytest.mark.parametrize("file", [one for one in EVERY_FILE if one.values[0].cases[-1].startswith(("kontext", "edit"))])
def test_references_of_different_sizes_and_numbers_are_one_batch(file, tmp_path):
    model, (noisy, sigma, conds) = file.model(tmp_path), file.inputs_of_last
    conds[0] = {key: value for key, value in conds[0].items() if not key.startswith("control.")}
    with torch.no_grad():
        both = file.predict(model, noisy, sigma, conds)
        each = [file.predict(model, noisy[k : k + 1], sigma[k : k + 1], conds[k : k + 1]) for k in (0, 1)]
    assert relative(both, torch.cat(each)) < 1e-5


TENCENT = (  # what ComfyUI replaces in Tencent's names as it loads them
    ("_embedder.mlp.0.", "_embedder.in_layer."), ("_embedder.mlp.2.", "_embedder.out_layer."),
    ("_embedder.linear_1.", "_embedder.in_layer."), ("_embedder.linear_2.", "_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."), ("modulation.linear.", "modulation.lin."), ("_attn_qkv.", "_attn.qkv."),
    ("_attn_proj.", "_attn.proj."), ("mlp.fc1.", "mlp.0."), ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.scale"), ("_attn_k_norm.weight", "_attn.norm.key_norm.scale"),
    (".q_norm.weight", ".norm.query_norm.scale"), (".k_norm.weight", ".norm.key_norm.scale"),
    ("_in.mlp.0.", "_in.in_layer."), ("_in.mlp.2.", "_in.out_layer."),
)  # fmt: skip


def test_tencents_names_are_what_comfyui_makes_its_own_from():
    real = next(real for real in FULL_SIZE if real.name == "hunyuan_image")
    original, comfy = real.layout("original"), real.layout("comfy")
    renamed = {}
    for entry in original.entries:
        name = entry.theirs
        for old, new in TENCENT:
            name = name.replace(old, new)
        renamed[name] = entry.ours
    assert original.their_shapes == real.shapes
    assert renamed == {entry.theirs: entry.ours for entry in comfy.entries}


@pytest.fixture
def flux():
    return next(file for file in GOLDENS if file.file == "flux")


def test_flex1s_bypassed_guidance_is_a_model_without_it(flux, tmp_path):
    noisy, sigma, conds = flux.inputs("plain")
    weights = {key: value for key, value in flux.weights().items() if not key.startswith("guidance_in.")}
    without = load(flux.module.DENOISER, weights, tmp_path, torch.float32)
    with torch.no_grad():
        out = flux.module.predict(flux.model(tmp_path), noisy, sigma, conds, bypass_guidance_embedding=True)
        expected = flux.module.predict(without, noisy, sigma, conds)
    assert relative(out, expected) < 1e-6 and relative(out, flux.output("plain")) > 1e-3


def test_flex2_takes_empty_controls_after_the_latents(flux, tmp_path):
    weights = flux.weights()
    more = torch.randn(len(weights["img_in.weight"]), 4 * 33)
    noisy, sigma, conds = flux.inputs("plain")
    wide = load(
        flux.module.DENOISER, weights | {"img_in.weight": torch.cat([weights["img_in.weight"], more], 1)}, tmp_path
    )
    with torch.no_grad():
        out = flux.module.predict(wide, noisy, sigma, conds)
    assert flux.module.channels_of(wide) == noisy.shape[1] and relative(out, flux.output("plain")) < 1e-4


def test_a_flux_model_for_filling_is_refused_in_one_sentence(flux, tmp_path):
    weights = flux.weights()
    filling = weights | {"img_in.weight": torch.randn(len(weights["img_in.weight"]), 96)}
    with pytest.raises(ConfigError, match="takes 96 channels of input, which are made for filling"):
        load(flux.module.DENOISER, filling, tmp_path)


class ComfyPositions(torch.nn.Module):
    """ComfyUI's for Qwen-Image: rows from -(n // 2), text after half of the target alone."""

    axes, theta = (4, 6, 6), 10000.0

    def forward(self, sizes, max_txt_seq_len, device=None):
        pictures = []
        for index, (_, rows, columns) in enumerate(sizes[0]):
            row, column = torch.arange(rows) - rows // 2, torch.arange(columns) - columns // 2
            pictures.append(torch.cartesian_prod(torch.tensor([index]), row, column))
        text = torch.arange(max_txt_seq_len) + max(sizes[0][0][1:]) // 2
        return self.turns(torch.cat(pictures)), self.turns(text[:, None].expand(-1, 3))

    def turns(self, places):
        angles = [
            torch.outer(places[:, k].float(), self.theta ** -(torch.arange(0, d, 2) / d))
            for k, d in enumerate(self.axes)
        ]
        return torch.polar(torch.ones(1), torch.cat(angles, 1))


@pytest.fixture
def qwen():
    return next(file for file in GOLDENS if file.file == "qwen_image")


@pytest.mark.parametrize("case", ["odd", "edit_big"])
def test_qwen_images_positions_are_those_of_its_own_code_and_all_that_differs_from_comfyui(qwen, case, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    model, (noisy, sigma, conds) = qwen.model(tmp_path), qwen.inputs(case)
    pictures = [noisy, *([torch.stack([cond["control.0"] for cond in conds])] if case == "edit_big" else [])]
    reference = QwenImageTransformer2DModel(**json.loads(golden_metadata("qwen_image")["diffusers_config"]))
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        out = qwen.predict(model, noisy, sigma, conds)
        expected = reference(
            torch.cat([pixel_shuffled(picture) for picture in pictures], 1),
            torch.stack([cond["text"] for cond in conds]),
            timestep=sigma,
            img_shapes=[[(1, picture.shape[-2] // 2, picture.shape[-1] // 2) for picture in pictures]] * 2,
            return_dict=False,
        )[0][:, : noisy.shape[-2] * noisy.shape[-1] // 4]
        assert relative(pixel_shuffled(out), expected) < 1e-6
        model.pos_embed = ComfyPositions()
        as_comfyui = qwen.predict(model, noisy, sigma, conds)
    assert relative(as_comfyui, qwen.output(case)) < 1e-4 and relative(out, qwen.output(case)) > 1e-3


def pixel_shuffled(latents):
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def test_a_diffusers_folder_of_qwen_image_2511_is_known_by_its_configuration_and_saved_with_comfyuis_marker(tmp_path):
    from safetensors.torch import load_file, save_file

    file = next(file for file in GOLDENS if file.file == "qwen_image_2511")
    folder, weights = tmp_path / "transformer", file.weights()
    folder.mkdir()
    del weights["__index_timestep_zero__"]
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    noisy, sigma, conds = file.inputs("edit")
    outs = []
    for clean in (True, False):
        (folder / "config.json").write_text(json.dumps({"zero_cond_t": clean}), encoding="utf-8")
        model = load_part(file.module.DENOISER, tmp_path, dtype=torch.float32)
        with torch.no_grad():
            outs.append(file.predict(model, noisy, sigma, conds))
        save_part(model, tmp_path / "saved.safetensors", {})
        assert ("__index_timestep_zero__" in load_file(tmp_path / "saved.safetensors")) == clean
    assert relative(outs[0], file.output("edit")) < 1e-4 and relative(outs[1], file.output("edit")) > 1e-3
