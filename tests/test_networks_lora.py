import pytest
import torch
from networks_support import fill, images, tiny
from safetensors import safe_open

from library.errors import ConfigError
from networks import lora
from networks.lora import last_match, parse_args

EVERYTHING = ("blocks", "img_in", "patch", "mix", "final")
BLOCKS = sorted(f"blocks.{i}.{name}" for i in range(2) for name in ("attn.proj", "attn.qkv", "mlp.0", "mlp.2"))


def create(adapted=("blocks",), dim=4, alpha=2.0, **args):
    return lora.create_network(1.0, dim, alpha, None, None, tiny(adapted), **args)


def ranks(network) -> dict[str, int]:
    return {name: adapter.rank for name, adapter in network.adapters.items()}


def test_an_adapter_belongs_to_an_original_module_and_fused_rows_have_one_down_matrix():
    network = create()
    assert sorted(network.adapters) == BLOCKS
    qkv = network.adapters["blocks.0.attn.qkv"]
    assert qkv.lora_down.weight.shape == (4, 8) and qkv.lora_up.weight.shape == (8 + 4 + 4, 4)


def test_modules_are_those_of_the_family_and_without_a_family_those_in_numbered_blocks():
    assert sorted(create(("blocks.1.mlp", "final")).adapters) == ["blocks.1.mlp.0", "blocks.1.mlp.2", "final.mod"]
    assert sorted(create(()).adapters) == BLOCKS
    assert sorted(create(("blocks.1",)).adapters) == BLOCKS[4:], "a prefix ends at a dot"


def test_include_and_exclude_match_whole_names_and_include_wins():
    assert sorted(create(exclude_patterns=r".*mlp.*").adapters) == [n for n in BLOCKS if "mlp" not in n]
    both = create(exclude_patterns=r"['.*mlp.*']", include_patterns=r"['img_in', r'blocks\.0\.mlp\.2']")
    assert set(both.adapters) == {*(n for n in BLOCKS if "mlp" not in n), "img_in", "blocks.0.mlp.2"}
    with pytest.raises(ConfigError, match="matches no module as a whole"):
        create(exclude_patterns="mlp")
    with pytest.raises(ConfigError, match="leaves no module"):
        create(exclude_patterns=".*")


def test_scale_is_alpha_over_rank_and_no_alpha_means_the_rank():
    assert {a.scale for a in create(alpha=2.0).adapters.values()} == {0.5}
    for alpha in (None, 0):
        assert {a.scale for a in create(alpha=alpha).adapters.values()} == {1.0}
    assert set(ranks(create(dim=None)).values()) == {4}


def test_the_last_matching_regex_sets_rank_and_learning_rate():
    network = create(
        network_reg_dims="attn=8,blocks.1=2,mlp.2=0", network_reg_lrs="attn=1e-3,lora_unet_blocks_1_attn_qkv=2e-3"
    )
    assert ranks(network) == {
        "blocks.0.attn.qkv": 8, "blocks.0.attn.proj": 8, "blocks.0.mlp.0": 4,
        "blocks.1.attn.qkv": 2, "blocks.1.attn.proj": 2, "blocks.1.mlp.0": 2,
    }  # fmt: skip
    assert network.learning_rates == {
        "blocks.0.attn.qkv": 1e-3, "blocks.0.attn.proj": 1e-3, "blocks.1.attn.proj": 1e-3, "blocks.1.attn.qkv": 2e-3,
    }  # fmt: skip


def test_a_regex_may_hold_commas_and_equals_signs():
    rules = parse_args({"network_reg_dims": r"blocks\.\d{1,2}\.attn(?=\.qkv)=8, mlp=2"}).reg_dims
    assert [(p.pattern, v) for p, v in rules] == [(r"blocks\.\d{1,2}\.attn(?=\.qkv)", 8.0), ("mlp", 2.0)]
    assert last_match("blocks.11.attn.qkv", rules) == 8.0 and last_match("blocks.11.attn.proj", rules) is None


def test_parameter_groups_by_learning_rate_and_lora_plus_ratio():
    network = create(network_reg_lrs="mlp.0=1e-3,mlp.2=0", loraplus_lr_ratio="4")
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, 5e-5)
    found = {name: (len(g["params"]), g["lr"]) for name, g in zip(names, groups, strict=True)}
    expected = {"unet": (4, 1e-4), "unet plus": (4, 4e-4), "unet reg_lr_0": (2, 1e-3), "unet reg_lr_0 plus": (2, 4e-3)}
    assert found == expected
    assert all(p.shape[1] == 4 for name, g in zip(names, groups, strict=True) if "plus" in name for p in g["params"])
    assert network.untrained == ("blocks.0.mlp.2", "blocks.1.mlp.2")
    network.prepare_grad_etc(None, None)
    grouped = {id(p) for g in groups for p in g["params"]}
    assert (
        grouped
        == {id(p) for p in network.get_trainable_params()}
        == {id(p) for p in network.parameters() if p.requires_grad}
    )
    assert create().prepare_optimizer_params(None, None, 5e-5)[0][0]["lr"] == 5e-5, "without unet_lr the general one"
    with pytest.raises(ConfigError, match="learning rate above 0"):
        create().prepare_optimizer_params(None, 0.0, 1e-4)


def test_the_ratio_of_the_denoiser_wins_over_the_general_one():
    assert create(loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16").plus_ratios[""] == 16


def test_convolutions_are_adapted_only_with_conv_dim_and_one_pixel_ones_are_linear():
    assert "patch" not in create(EVERYTHING).adapters
    network = create(EVERYTHING, conv_dim="2", conv_alpha="1")
    patch, mix = network.adapters["patch"], network.adapters["mix"]
    assert (patch.rank, patch.scale, patch.lora_down.weight.shape) == (2, 0.5, (2, 3, 3, 3)) and mix.rank == 4
    with pytest.raises(ConfigError, match="conv_dim=2 has no effect"):
        create(conv_dim="2")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rank_dropuot": "0.1"}, "did you mean 'rank_dropout'"),
        ({"rank_dropout": "1.5"}, "outside 0..0.999"),
        ({"module_dropout": "much"}, "module_dropout=much is not a number"),
        ({"verbose": "perhaps"}, "neither true nor false"),
        ({"network_reg_dims": "attn"}, "'attn' is not regex=value"),
        ({"network_reg_dims": "attn=4.5"}, "whole number"),
        ({"network_reg_dims": "attn=4,(=2"}, "not a regular expression"),
        ({"network_reg_lrs": "atn=1e-3"}, "'atn' matches none of the 8 modules"),
        ({"exclude_patterns": "['a', 3]"}, "not a Python list of strings"),
        ({"network_reg_dims": ".=0"}, "gives every module rank 0"),
    ],
)
def test_a_wrong_network_argument_is_refused_by_name(args, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        create(**args)


def test_dropout_given_for_third_party_modules_is_network_dropout():
    assert create(dropout="0.25").adapters["blocks.0.attn.qkv"].dropout.network == 0.25
    given = lora.create_network(1.0, 4, 1.0, None, None, tiny(), 0.5, dropout="0.25")
    assert given.adapters["blocks.0.attn.qkv"].dropout.network == 0.5
    assert create(dropout=None).adapters["blocks.0.attn.qkv"].dropout.network is None


def test_training_a_step_moves_only_the_network():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = lora.create_network(1.0, 4, 4, None, [], model)
    network.apply_to([], model, False, True)
    network.prepare_grad_etc([], model)
    network.on_epoch_start([], model)
    assert network.training
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-2, 1e-2)
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(5):
        network.on_step_start([], model)
        loss = model(images()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loading_names_the_module_and_both_ranks_that_differ():
    small, large = fill(create(dim=2)), create(dim=4)
    with pytest.raises(ConfigError, match=r"blocks.0.attn.qkv has rank 2.*network's is 4.*dim_from_weights"):
        large.load_tensors(small.state_dict(), "old.safetensors")
    part = create(("blocks.1",), dim=2)
    with pytest.raises(
        ConfigError, match=r"old.safetensors: 4 of its 8 modules are not in this network.*blocks.0.attn"
    ):
        part.load_tensors(small.state_dict(), "old.safetensors")
    fill(part, seed=9)
    line = small.load_tensors(part.state_dict(), "part.safetensors")
    assert line == "part.safetensors: 4/8 modules loaded, 4 modules of the network are not in it and start from nothing"
    assert torch.equal(small.adapters["blocks.1.mlp.0"].lora_up.weight, part.adapters["blocks.1.mlp.0"].lora_up.weight)


def test_a_network_from_weights_has_the_files_modules_ranks_alphas_and_values():
    source = fill(create(dim=4, alpha=1.0, network_reg_dims="mlp=2", exclude_patterns=r"blocks\.0\..*"))
    network, tensors = lora.create_network_from_weights(1.0, None, None, None, tiny(), weights_sd=source.state_dict())
    assert (
        ranks(network)
        == ranks(source)
        == {"blocks.1.attn.qkv": 4, "blocks.1.attn.proj": 4, "blocks.1.mlp.0": 2, "blocks.1.mlp.2": 2}
    )
    network.load_tensors(tensors, "weights")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in network.state_dict().items())
    assert {n: a.scale for n, a in network.adapters.items()} == {n: a.scale for n, a in source.adapters.items()}


def test_base_weights_are_merged_with_their_multiplier_as_sd_scripts_does_it():
    source = fill(create())
    attached, merged = tiny(), tiny()
    live = fill(lora.create_network(0.6, 4, 2.0, None, None, attached))
    live.apply_to(None, attached, False, True)
    network, tensors = lora.create_network_from_weights(
        0.6, None, None, None, merged, weights_sd=source.state_dict(), for_inference=True
    )
    network.merge_to(None, merged, tensors, torch.float32, "cpu")
    torch.testing.assert_close(merged(images()), attached(images()), rtol=1e-5, atol=1e-5)
    assert network.is_mergeable() and not any("forward" in m.__dict__ for m in merged.modules())


@pytest.mark.parametrize("form", ["comfy", "kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_save_is_checked_hashed_and_loads_again(tmp_path, form, dtype):
    network = fill(create(dim=4, alpha=1.0))
    network.save_format = form
    path = tmp_path / "x.safetensors"
    line = network.save_weights(str(path), dtype, {"ss_output_name": "x", "modelspec.title": "y"})
    with safe_open(path, "pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
        values = {file.get_tensor(key).dtype for key in keys if not key.endswith(".alpha")}
    assert line == f"{len(keys)}/{len(keys)} keys match"
    assert values == {dtype or torch.float32}
    assert {"ss_output_name", "modelspec.title", "sshs_model_hash", "sshs_legacy_hash"} == metadata.keys()
    again = create(dim=4, alpha=None)
    again.load_weights(path)
    for name, adapter in network.adapters.items():
        expected = adapter.delta().detach()
        error = again.adapters[name].delta().detach() - expected
        assert float(error.norm() / expected.norm()) < (1e-2 if dtype else 1e-6)


def test_a_file_that_is_no_lora_or_is_cut_short_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    fill(create()).save_weights(path, None, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="x.safetensors is truncated"):
        create().load_weights(path)
    with pytest.raises(ConfigError, match="y.safetensors"):
        create().load_weights(tmp_path / "y.safetensors")
