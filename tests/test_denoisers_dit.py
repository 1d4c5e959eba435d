"""Video and DiT denoisers against an independent implementation's outputs, and what training needs of them."""

import pytest
import torch
from denoiser_cases import Transfers
from dit_cases import GOLDENS
from oracles import golden, golden_metadata, load, relative, weights_of

from library.checkpointing import checkpoint_blocks
from networks import lora

EVERY_CASE = [pytest.param(g, case, id=f"{g.file}-{case}") for g in GOLDENS for case in g.cases]
EVERY_FILE = [pytest.param(g, id=g.file) for g in GOLDENS]


@pytest.mark.parametrize(("file", "case"), EVERY_CASE)
def test_the_velocity_is_that_of_an_independent_implementation(file, case, tmp_path):
    with torch.no_grad():
        out = file.run(file.model(tmp_path), case)
    assert out.dtype == torch.float32
    assert relative(out, file.output(case)) < file.tolerance


@pytest.mark.parametrize(("file", "case"), EVERY_CASE)
def test_a_lora_in_the_files_own_coordinates_gives_the_independent_implementations_output(file, case, tmp_path):
    if not file.has_lora:
        pytest.skip("the golden file has no LoRA")
    expected = file.output(case, "out_lora")
    with torch.no_grad():
        out = file.run(file.model(tmp_path, with_lora=True), case)
    assert relative(out, expected) < file.tolerance
    assert relative(file.output(case), expected) > 1e-3


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_comfyui_lora_attached_to_the_model_gives_that_output_too(file, tmp_path):
    if not file.has_lora:
        pytest.skip("the golden file has no LoRA")
    model, case = file.model(tmp_path), file.cases[-1]
    weights = {f"diffusion_model.{key}": value for key, value in weights_of(golden(file.file), "lora.").items()}
    scale = float(golden_metadata(file.file)["lora_scale"])
    for key in [key for key in weights if key.endswith("lora_A.weight")]:
        weights[key.replace("lora_A.weight", "alpha")] = torch.tensor(scale * weights[key].shape[0])
    network, _ = lora.create_network_from_weights(1.0, None, None, None, model, weights_sd=weights)
    network.apply_to(None, model, False, True)
    network.load_tensors(weights, "golden")
    with torch.no_grad():
        assert relative(file.run(model, case), file.output(case, "out_lora")) < file.tolerance


@pytest.mark.parametrize("file", [f for f in EVERY_FILE if f.values[0].ragged])
def test_a_batch_of_texts_of_different_lengths_is_what_each_gives_alone(file, tmp_path):
    model, case = file.model(tmp_path), file.cases[0]

    def cut(conds):
        """Two items whose texts have different lengths."""
        conds = (conds * 2)[:2]
        return [conds[0], conds[1] | {key: conds[1][key][:-3] for key in file.ragged}]

    inputs = file.inputs(case)
    noisy, sigma = (torch.cat([t, t])[:2] for t in (file.noisy(case, inputs), file.sigma(case, inputs)))
    conds = cut(file.conds(case, inputs))
    with torch.no_grad():
        both = file.module.predict(model, noisy, sigma, conds, **file.options)
        each = [
            file.module.predict(model, noisy[k : k + 1], sigma[k : k + 1], conds[k : k + 1], **file.options)
            for k in (0, 1)
        ]
        same = file.module.predict(model, noisy, sigma, [conds[0], file.conds(case, inputs)[-1]], **file.options)
    assert relative(both, torch.cat(each)) < 1e-5
    assert relative(both[1], same[1]) > 1e-4, "the length of the text matters"


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
@pytest.mark.parametrize("file", EVERY_FILE)
def test_under_bf16_the_time_reaches_its_embedding_in_float32(file, mode, tmp_path):
    from diffusers.models.embeddings import Timesteps

    model = file.model(tmp_path, dtype=torch.bfloat16 if mode == "bf16 weights" else torch.float32)
    seen = []
    for module in model.modules():
        if isinstance(module, Timesteps):
            module.register_forward_pre_hook(lambda m, args: seen.append((args[0].clone(), m.scale)))
    case = file.cases[0]
    inputs = file.inputs(case)
    sigma = torch.tensor([0.12345, 0.98765])[: len(file.noisy(case, inputs))]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        file.module.predict(model, file.noisy(case, inputs), sigma, file.conds(case, inputs), **file.options)
    assert seen
    if file.guidance:  # embedded by the same module
        guidance = torch.stack([cond["guidance"] for cond in file.conds(case, inputs)]) * 1000
        assert any(torch.equal(time, guidance) for time, _ in seen) and not torch.equal(guidance, guidance.bfloat16())
        seen = [(time, scale) for time, scale in seen if not torch.equal(time, guidance)]
    for time, scale in seen:
        allowed = torch.cat([file.times(sigma), torch.zeros(1)]) if time.numel() > len(sigma) else file.times(sigma)
        assert time.dtype == torch.float32
        assert (time.flatten()[:, None] * scale - allowed).abs().amin(1).max() < 1e-4 * float(allowed.max())
        assert len(time.flatten().unique()) >= len(sigma)


def gradients(file, model, case):
    model.zero_grad(set_to_none=True)
    out = file.run(model, case)
    out.square().mean().backward()
    return out.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("file", EVERY_FILE)
def test_checkpointed_blocks_give_the_same_output_and_gradients(file, tmp_path):
    model, case = file.model(tmp_path).requires_grad_(True), file.cases[-1]
    out, before = gradients(file, model, case)
    assert checkpoint_blocks(model, file.module.BLOCKS) >= 2
    again, after = gradients(file, model, case)
    assert torch.equal(out, again) and before.keys() == after.keys()
    assert max(relative(after[k], before[k]) for k in before if before[k].norm() > 1e-6) < 1e-4
    without = [k for k, _ in model.named_parameters() if k not in before]
    assert [k for k in without if not k.startswith(file.dead or "-")] == []


@pytest.mark.parametrize("file", EVERY_FILE)
def test_no_mask_is_made_where_all_texts_are_equally_long(file, tmp_path, monkeypatch):
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask if len(args) < 4 else args[3])
        return attention(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, case = file.model(tmp_path), file.cases[0]
    inputs = file.inputs(case)
    conds = file.conds(case, inputs)
    conds = [cond | {key: conds[0][key] for key in file.ragged} for cond in conds]
    with torch.no_grad():
        file.module.predict(model, file.noisy(case, inputs), file.sigma(case, inputs), conds, **file.options)
    assert masks and all(mask is None for mask in masks)


# HiDream's experts have to be told on the host how many tokens each gets.
@pytest.mark.parametrize("file", [f for f in EVERY_FILE if f.values[0].file != "hidream"])
def test_predict_neither_waits_for_the_device_nor_copies_to_it(file, tmp_path):
    """On the meta device whatever reads a value back raises."""
    model, case = file.model(tmp_path).to("meta"), file.cases[0]
    inputs = file.inputs(case)
    conds = (file.conds(case, inputs) * 2)[:2]
    conds[1] = conds[1] | {key: conds[1][key][:-3] for key in file.ragged}
    noisy, sigma = (torch.cat([t, t])[:2].to("meta") for t in (file.noisy(case, inputs), file.sigma(case, inputs)))
    conds = [{key: value.to("meta") for key, value in cond.items()} for cond in conds]
    with torch.no_grad(), Transfers() as transfers:
        out = file.module.predict(model, noisy, sigma, conds, **file.options)
    assert out.shape == noisy.shape and not transfers.found


def test_hidreams_experts_get_the_gradients_of_diffusers_training_mode(tmp_path):
    from diffusers import HiDreamImageTransformer2DModel

    file = golden_of("hidream")
    ours = file.model(tmp_path).eval().requires_grad_(True)
    theirs = HiDreamImageTransformer2DModel(**ours.config).train()
    theirs.load_state_dict(ours.state_dict())
    inputs = file.inputs("square")
    out = theirs(
        inputs["x"], inputs["timestep"], inputs["context"], inputs["llama"].transpose(0, 1), inputs["y"],
        return_dict=False,
    )[0]  # fmt: skip
    out.square().mean().backward()  # of shuffled tokens, which a mean does not see
    _, mine = gradients(file, ours, "square")
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    assert mine.keys() == expected.keys()
    experts = [key for key in mine if ".experts." in key]
    assert len(experts) == 24 and all(float(mine[key].norm()) > 1e-6 for key in experts)
    assert max(relative(mine[key], expected[key]) for key in mine) < 1e-4


def golden_of(name):
    (file,) = (g for g in GOLDENS if g.file == name)
    return file


def test_tencents_own_names_with_q_k_and_v_apart_give_the_same_hunyuan_video_15(tmp_path):
    file = golden_of("hunyuan_video15")
    weights = {}
    for key, value in file.weights().items():
        head, found, tail = key.rpartition("_attn_qkv")
        parts = zip("qkv", value.chunk(3), strict=True) if found and "double_blocks" in key else ()
        weights |= {f"{head}_attn_{x}{tail}": part for x, part in parts} or {key: value}
    model = load(file.module.DENOISER, weights, tmp_path, torch.float32)
    assert model.binding.layout.name == "split"
    with torch.no_grad():
        assert relative(file.run(model, "out_i2v"), file.output("out_i2v")) < file.tolerance


def test_a_distilled_hunyuan_video_15_is_told_where_its_step_leads(tmp_path):
    from diffusers import HunyuanVideo15Transformer3DModel

    file, inputs = golden_of("hunyuan_video15"), golden_of("hunyuan_video15").inputs("out_i2v")
    weights = file.weights()
    weights |= {k.replace("time_in", "time_r_in"): v.flip(0) / 2 for k, v in weights.items() if k.startswith("time_in")}
    model = load(file.module.DENOISER, weights, tmp_path, torch.float32)
    theirs = HunyuanVideo15Transformer3DModel(**{k: v for k, v in model.config.items() if k != "glyph_width"})
    theirs.context_embedder_2 = model.context_embedder_2
    theirs.load_state_dict(model.state_dict())
    masks = [torch.ones(inputs[key].shape[:2]) for key in ("context", "byt5")]
    conds = [cond | {"next_sigma": torch.tensor(0.3)} for cond in file.conds("out_i2v", inputs)]
    with torch.no_grad():
        expected = theirs(
            inputs["x"], inputs["timestep"], inputs["context"], masks[0], torch.full((2,), 300.0), inputs["byt5"], masks[1],
            inputs["vision"], return_dict=False,
        )[0]  # fmt: skip
        out = file.run(model, "out_i2v", change=lambda _: conds)
    assert relative(out, expected) < 1e-5
    assert relative(out, file.output("out_i2v")) > 1e-3


def test_text_to_video_and_image_to_video_can_be_in_one_batch(tmp_path):
    file = golden_of("hunyuan_video15")
    model, inputs = file.model(tmp_path), file.inputs("out_i2v")
    conds = [file.conds("out_i2v", inputs)[0], file.conds("out_t2v_textonly", inputs)[1]]
    with torch.no_grad():
        out = file.module.predict(model, file.noisy("out_i2v", inputs), file.sigma("out_i2v", inputs), conds)
    assert relative(out[0], file.output("out_i2v")[0]) < file.tolerance
    assert relative(out[1], file.output("out_t2v_textonly")[1]) < file.tolerance


@pytest.mark.parametrize("name", ["wan22_ti2v", "ltx_091"])
def test_items_with_and_without_a_first_frame_can_be_in_one_batch(name, tmp_path):
    file = golden_of(name)
    model, case = file.model(tmp_path), file.cases[-1]
    inputs = file.inputs(case)
    noisy, sigma, conds = inputs["x"], file.sigma(case, inputs), file.conds(case, inputs)
    assert "first_frame" in conds[0]
    conds[1] = {key: value for key, value in conds[1].items() if key != "first_frame"}
    with torch.no_grad():
        both = file.module.predict(model, noisy, sigma, conds, **file.options)
        each = [
            file.module.predict(model, noisy[k : k + 1], sigma[k : k + 1], [conds[k]], **file.options) for k in (0, 1)
        ]
    assert relative(both, torch.cat(each)) < 1e-5
    assert relative(both[0], file.output(case)[0]) < file.tolerance


def test_wan_models_of_first_and_last_frame_see_the_features_of_both(tmp_path):
    """Attention to the same features twice is attention to them once; a table of zeros adds no position."""
    file = golden_of("wan21_i2v")
    clip = file.inputs("out")["clip_fea"]
    weights = file.weights() | {"img_emb.emb_pos": torch.zeros(1, 2 * clip.shape[1], clip.shape[2])}
    model = load(file.module.DENOISER, weights, tmp_path, torch.float32, **file.metadata)
    with torch.no_grad():
        out = file.run(model, "out", change=lambda cs: [c | {"clip": torch.cat([c["clip"], c["clip"]])} for c in cs])
    assert relative(out, file.output("out")) < file.tolerance


@pytest.mark.parametrize("causal", [True, False])
def test_ltx_positions_are_those_of_diffusers_pipelines(causal):
    from diffusers import LTXConditionPipeline
    from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed

    from library.families.ltx_video import coordinates

    pipeline, video = LTXConditionPipeline, torch.zeros(2, 4, 3, 5, 7)
    mine = coordinates(video, torch.tensor([25.0, 30.0]), causal)
    if causal:  # 0.9.5 and later
        ids = pipeline._prepare_video_ids(2, 3, 5, 7, 1, 1)
        theirs = pipeline._scale_video_ids(ids, 32, 8, 0).float()
        theirs[:, 0] /= torch.tensor([25.0, 30.0])[:, None]
        assert torch.allclose(mine, theirs)
        return
    rope, tokens = LTXVideoRotaryPosEmbed(48), torch.zeros(1, 105, 4)
    for k, rate in enumerate((25, 30)):
        expected = rope(tokens, 3, 5, 7, (8 / rate, 32, 32))
        found = rope(tokens, video_coords=mine[k : k + 1])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("header", "width", "causal"),
    [
        ({}, 2048, False),
        ({}, 4096, True),
        ({"config": '{"transformer": {"causal_temporal_positioning": true}}'}, 2048, True),
        ({"config": '{"vae": {}}'}, 2048, False),
    ],
)
def test_an_ltx_file_says_how_its_frames_are_counted(header, width, causal):
    from library.families.ltx_video import config

    shapes = {
        "patchify_proj.weight": (width, 128), "proj_out.weight": (128, width), "transformer_blocks.0.attn2.to_k.weight": (width, width),
        "caption_projection.linear_1.weight": (width, 4096),
    }  # fmt: skip
    assert config(shapes, header, "comfy")["causal"] is causal
