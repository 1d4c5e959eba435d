"""sd-scripts' arguments for FLUX.1, split_qkv, and LoRAs of its text encoders."""

import json

import pytest
import torch
from oracles import accepted_stems
from safetensors.torch import load_file, safe_open
from studio_support import make_toy

from library import checkpoints
from library.errors import ConfigError
from library.families import get_family
from networks import formats, lora, lora_flux

FAMILY = get_family("flux")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    make_toy("flux", folder)
    return folder


def model(toy):
    loaded = checkpoints.load_part(FAMILY.denoiser, toy / "denoiser.safetensors", dtype=torch.float32)
    loaded.binding.adapted = FAMILY.adapted
    return loaded


def ranks(toy, **arguments):
    network = lora_flux.create_network(1.0, 4, 4.0, None, [], model(toy), **arguments)
    return {name: adapter.rank for name, adapter in network.adapters.items()}


def test_ranks_by_part_and_the_last_pattern_counts(toy):
    found = ranks(toy, img_attn_dim="8", txt_mlp_dim="0", single_dim="2", network_reg_dims=r"img_attn\.proj=3")
    assert found["double_blocks.0.img_attn.qkv"] == 8 and found["double_blocks.0.img_attn.proj"] == 3
    assert not any("txt_mlp" in name for name in found)
    assert found["single_blocks.0.linear1"] == 2 and found["double_blocks.0.txt_attn.qkv"] == 4


def test_blocks_are_chosen_by_kind_and_by_number(toy):
    single, double, some = (
        ranks(toy, train_blocks="single"),
        ranks(toy, train_blocks="double"),
        ranks(toy, train_double_block_indices="1", train_single_block_indices="none"),
    )
    assert {name.split(".")[0] for name in single} == {"single_blocks"}
    assert {name.split(".")[0] for name in double} == {"double_blocks"}
    assert {".".join(name.split(".")[:2]) for name in some} == {"double_blocks.1"}


def test_layers_outside_of_the_blocks(toy):
    found = ranks(toy, in_dims="[4,0,0,0,2]")
    assert found["img_in"] == 4 and found["txt_in"] == 2
    assert not any(name.startswith(("time_in", "vector_in")) for name in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"train_blocks": "some"}, "all, double, single"), ({"img_attn_dim": "x"}, "no rank"),
     ({"in_dims": "[1,2]"}, "it takes 5"), ({"train_single_block_indices": "a"}, "0,2-5")],
)  # fmt: skip
def test_mistakes_are_named(toy, arguments, said):
    with pytest.raises(ConfigError, match=said):
        ranks(toy, **arguments)


def test_split_adapters_are_the_same_update_in_every_format(toy, tmp_path):
    """q, k and v with adapters of their own: fused files hold them side by side, diffusers' files one by one."""
    whole = model(toy)
    network = lora.create_network(1.0, 4, 4.0, None, [], whole, split_qkv="True")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    deltas = {name: adapter.delta().detach() for name, adapter in network.adapters.items()}
    shapes = {}
    for name in ("comfy", "diffusers"):
        network.save_format = name
        line = network.save_weights(str(tmp_path / f"{name}.safetensors"), torch.float32, {})
        assert line.split()[0].split("/")[0] == line.split()[0].split("/")[1]
        tensors = load_file(tmp_path / f"{name}.safetensors")
        shapes[name] = {key: value.shape for key, value in tensors.items()}
        for module, content in formats.read(tensors, network.layout).items():
            update = content["alpha"] / content["up"].shape[1] * content["up"] @ content["down"].flatten(1)
            assert torch.allclose(update, deltas[module].reshape(update.shape), atol=1e-5), (name, module)
    assert shapes["comfy"]["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"][0] == 12
    assert shapes["diffusers"]["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"][0] == 4


def test_split_adapters_compute_what_they_are_merged_to(toy):
    given = torch.randn(1, 4, 8, 8), torch.tensor([0.4])
    width = model(toy).config
    cond = [{"text": torch.randn(5, width.joint_attention_dim), "pooled": torch.randn(width.pooled_projection_dim)}]
    channels = FAMILY.channels_of(model(toy))
    noisy = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    del given
    attached, merged = model(toy), model(toy)
    network = lora.create_network(1.0, 2, 2.0, None, [], attached, split_qkv="True")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    network.apply_to([], attached, False, True)
    other = lora.create_network(1.0, 2, 2.0, None, [], merged, split_qkv="True")
    other.load_state_dict(network.state_dict())
    other.merge()
    with torch.no_grad():
        a, b = (FAMILY.predict(one, noisy, torch.tensor([0.4]), cond) for one in (attached, merged))
        base = FAMILY.predict(model(toy), noisy, torch.tensor([0.4]), cond)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4) and not torch.allclose(a, base, atol=1e-2)


def test_text_encoders_train_when_asked_and_have_the_names_of_sd_scripts(toy, tmp_path):
    from PIL import Image

    from library import options
    from train_network import NetworkTrainer

    for k in range(2):
        Image.new("RGB", (64, 64), (90 * k, 20, 30)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a red cat")
    data = tmp_path / "data.toml"
    data.write_text(f"[[datasets]]\nresolution = 64\nbatch_size = 1\n[[datasets.subsets]]\n"
                    f"image_dir = {json.dumps(str(tmp_path))}\ncaption_extension = '.txt'\n")  # fmt: skip
    words = ["--config_file", str(toy / "toy.toml"), "--dataset_config", str(data), "--output_dir", str(tmp_path / "o"),
             "--max_train_steps", "2", "--cache_latents", "--network_module", "networks.lora_flux",
             "--save_format", "kohya", "--output_name", "x"]  # fmt: skip
    trainer = NetworkTrainer(options.parse("flux", [*words, "--text_encoder_lr", "1e-3", "0"], "test"))
    trainer.run()
    with safe_open(tmp_path / "o" / "x.safetensors", "pt") as file:
        stems = {key.split(".")[0] for key in file.keys()}
        ups = [file.get_tensor(key) for key in file.keys() if key.startswith("lora_te1") and "lora_up" in key]
    assert ups and any(up.abs().max() > 0 for up in ups)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in stems
    assert not any(stem.startswith("lora_te3") for stem in stems)
    assert {stem for stem in stems if stem.startswith("lora_unet")} <= accepted_stems("flux")
    plain = options.parse("flux", words, "test")
    from library.trained import trained_parts

    assert not trained_parts(plain, plain.family).any_text
