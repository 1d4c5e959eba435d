"""Our gradient checkpointing keeps masks and gradients, where diffusers' own does not; times stay exact."""

import pytest
import torch

from library.checkpointing import checkpoint_blocks, exact_times


def gradients(model, call):
    model.zero_grad(set_to_none=True)
    out = call(model)
    out.square().mean().backward()
    return out.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def chroma():
    from diffusers import ChromaTransformer2DModel

    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    mask = torch.ones(1, 5 + 6, dtype=torch.bool)
    mask[:, 3:5] = False
    inputs = {
        "hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 5, 12), "timestep": torch.tensor([0.4]),
        "img_ids": torch.rand(6, 3), "txt_ids": torch.zeros(5, 3), "attention_mask": mask, "return_dict": False,
    }  # fmt: skip
    return model, ("transformer_blocks", "single_transformer_blocks"), lambda m: m(**inputs)[0]


def hunyuan_image():
    from diffusers import HunyuanImageTransformer2DModel

    torch.manual_seed(0)
    model = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=12, text_embed_2_dim=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0]])
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4), "timestep": torch.tensor([400.0]), "encoder_hidden_states": torch.randn(1, 4, 12),
        "encoder_attention_mask": mask, "encoder_hidden_states_2": torch.randn(1, 3, 8),
        "encoder_attention_mask_2": torch.ones(1, 3), "return_dict": False,
    }  # fmt: skip
    return model, ("transformer_blocks", "single_transformer_blocks"), lambda m: m(**inputs)[0]


def flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 6, 8), "encoder_hidden_states": torch.randn(1, 5, 24), "timestep": torch.tensor([0.4]),
        "pooled_projections": torch.randn(1, 12), "guidance": torch.tensor([3.5]), "img_ids": torch.rand(6, 3),
        "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip
    return model, ("transformer_blocks", "single_transformer_blocks"), lambda m: m(**inputs)[0]


def z_image():
    from library.families.z_image import Z_IMAGE, build

    torch.manual_seed(0)
    model = build({
        "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 12,
        "axes_dims": [4, 6, 6], "axes_lens": [128, 64, 64], "time_width": 48,
    })  # fmt: skip
    conds = [{"text": torch.randn(n, 12)} for n in (5, 40)]  # ragged: with attention masks
    noisy, sigma = torch.randn(2, 4, 8, 6), torch.tensor([0.3, 0.7])
    return model, Z_IMAGE.blocks, lambda m: Z_IMAGE.predict(m, noisy, sigma, conds)


@pytest.mark.parametrize("make", [z_image, flux, chroma, hunyuan_image])
def test_checkpointed_blocks_give_the_same_output_and_gradients(make):
    model, blocks, call = make()
    model.train()
    plain, expected = gradients(model, call)
    assert checkpoint_blocks(model, blocks) >= 2
    out, found = gradients(model, call)
    assert torch.allclose(out, plain, atol=1e-6) and found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7), name


def test_a_mask_hides_text_from_checkpointed_blocks():
    model, blocks, call = chroma()
    checkpoint_blocks(model.train(), blocks)
    text = call.__closure__[0].cell_contents["encoder_hidden_states"]
    before = call(model)
    hidden, shown = text.clone(), text.clone()
    text[:, 3:5] += 10
    assert torch.allclose(call(model), before, atol=1e-6)
    text.copy_(shown)[:, :3] += 10
    assert not torch.allclose(call(model), before, atol=1e-3) and torch.equal(hidden, shown)


def test_blocks_are_really_recomputed_in_the_backward_pass():
    model, blocks, call = z_image()
    calls = []
    model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    inner = model.layers[0].feed_forward
    inner.register_forward_pre_hook(lambda *a: calls.append("inner"))
    checkpoint_blocks(model, blocks)
    call(model).sum().backward()
    assert calls.count("inner") == 2


def test_under_bf16_times_and_guidance_are_embedded_in_float32():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).bfloat16()  # fmt: skip
    seen = []
    proj = model.time_text_embed.time_proj
    proj.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    sigma, guidance = torch.tensor([0.7654]), torch.tensor([3.5])
    inputs = {
        "hidden_states": torch.randn(1, 6, 8).bfloat16(), "encoder_hidden_states": torch.randn(1, 5, 24).bfloat16(),
        "pooled_projections": torch.randn(1, 12).bfloat16(), "timestep": sigma, "guidance": guidance, "img_ids": torch.rand(6, 3),
        "txt_ids": torch.zeros(5, 3), "return_dict": False,
    }  # fmt: skip

    exact = proj(torch.tensor([765.4])), proj(torch.tensor([3500.0]))
    seen.clear()
    with torch.no_grad():
        model(**inputs)
        assert not torch.allclose(seen[0].float(), exact[0], atol=1e-2)  # diffusers alone rounds
        seen.clear()
        with exact_times(proj, [sigma * 1000, guidance * 1000]):
            model(**inputs)
    assert torch.allclose(seen[0].float(), exact[0], atol=1e-3) and torch.allclose(seen[1].float(), exact[1], atol=1e-3)
