"""Metadata: sd-scripts' keys, modelspec, and nothing that says where on a disk something was."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
from types import SimpleNamespace

import pytest

import library.families
from library import options
from library.errors import ConfigError
from library.metadata import COPIED, check_thumbnail, legacy_hash, save_metadata, training_metadata, without_paths
from library.objective import FLOW

TOY = SimpleNamespace(
    name="toy",
    title="Toy",
    defaults={},
    options=(),
    save_formats=("comfy",),
    architecture="toy-1",
    base_model_version="toy_v1",
    resolution=1024,
    denoiser=SimpleNamespace(option="pretrained_model_name_or_path"),
    vae=SimpleNamespace(option="vae"),
    parts=(),
    text_prefixes=(),
    tokenizers=(),
    objective=FLOW,
)
RUN = {"total_steps": 40, "epochs": 3, "steps_per_epoch": 16}
# reference list of sd-scripts' keys, without those of options that only Stable Diffusion has
SD_SCRIPTS_KEYS = """
ss_session_id ss_training_started_at ss_output_name ss_learning_rate ss_text_encoder_lr ss_unet_lr ss_num_train_images
ss_num_validation_images ss_num_reg_images ss_num_batches_per_epoch ss_num_epochs ss_gradient_checkpointing
ss_gradient_accumulation_steps ss_max_train_steps ss_lr_warmup_steps ss_lr_scheduler ss_network_module ss_network_dim
ss_network_alpha ss_network_dropout ss_mixed_precision ss_full_fp16 ss_v2 ss_base_model_version ss_cache_latents ss_seed
ss_training_comment ss_optimizer ss_max_grad_norm ss_caption_dropout_rate ss_caption_dropout_every_n_epochs
ss_caption_tag_dropout_rate ss_face_crop_aug_range ss_prior_loss_weight ss_scale_weight_norms ss_ip_noise_gamma
ss_ip_noise_gamma_random_strength ss_loss_type ss_huber_schedule ss_huber_scale ss_huber_c ss_validation_seed
ss_validation_split ss_max_validation_steps ss_validate_every_n_epochs ss_validate_every_n_steps ss_resize_interpolation
ss_weighting_scheme ss_logit_mean ss_logit_std ss_mode_scale ss_timestep_sampling ss_sigmoid_scale
ss_model_prediction_type ss_discrete_flow_shift ss_network_args ss_sd_model_name ss_sd_model_hash ss_new_sd_model_hash
ss_vae_name ss_vae_hash ss_new_vae_hash ss_datasets ss_tag_frequency ss_dataset_dirs
"""


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Metadata of a run whose every path is absolute; returns (make(*words), folder)."""
    monkeypatch.setitem(library.families.FAMILIES, "toy", "unused:UNUSED")
    monkeypatch.setattr(library.families, "get_family", lambda name: TOY)
    (tmp_path / "denoiser.safetensors").write_bytes(bytes(range(256)) * 8192)
    (tmp_path / "vae.safetensors").write_bytes(b"small")
    dataset = {
        "ss_num_train_images": 20,
        "ss_num_validation_images": 2,
        "ss_num_reg_images": 0,
        "ss_num_batches_per_epoch": 16,
        "ss_datasets": json.dumps([
            {"resolution": [512, 512], "subsets": [{"image_dir": str(tmp_path / "images"), "num_repeats": 2}]},
            {"resolution": [768, 640], "subsets": [{"image_dir": r"C:\Users\me\images", "num_repeats": 1}]},
        ]),
        "ss_tag_frequency": {str(tmp_path / "images"): {"a/b": 3}},
        "ss_dataset_dirs": {str(tmp_path / "images"): {"n_repeats": 2, "img_count": 10}},
    }  # fmt: skip

    def make(*words: str, network: bool = True) -> dict[str, str]:
        argv = ["--pretrained_model_name_or_path", str(tmp_path / "denoiser.safetensors"), "--vae",
                str(tmp_path / "vae.safetensors"), "--output_dir", str(tmp_path / "out"), "--output_name", "mine",
                "--dataset_config", str(tmp_path / "d.toml"),
                "--lr_warmup_steps", "10%", "--lr_scheduler", "linear"]  # fmt: skip
        if network:
            argv += ["--network_module", "networks.lora", "--network_dim", "16"]
        return training_metadata(options.parse("toy", [*argv, *words]), TOY, dataset, {}, RUN)

    return make, tmp_path


def test_every_key_of_sd_scripts_that_has_a_meaning_is_there(made):
    make, folder = made
    arguments = f"file={folder}/list.txt", "rank_dropout=0.1"
    metadata = make("--network_args", *arguments, "--optimizer_args", "weight_decay=0.1")
    assert set(SD_SCRIPTS_KEYS.split()) <= metadata.keys()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items())
    expected = {
        "ss_output_name": "mine",
        "ss_max_train_steps": "40",
        "ss_num_epochs": "3",
        "ss_lr_warmup_steps": "4",
        "ss_network_dim": "16",
        "ss_network_alpha": "1.0",
        "ss_network_dropout": "None",
        "ss_base_model_version": "toy_v1",
        "ss_v2": "False",
        "ss_num_train_images": "20",
        "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
        "ss_sd_model_name": "denoiser.safetensors",
        "ss_vae_name": "vae.safetensors",
        "ss_seed": "42",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert json.loads(metadata["ss_network_args"]) == {"file": "list.txt", "rank_dropout": "0.1"}


def test_hashes_are_those_of_the_files(made):
    make, folder = made
    metadata = make()
    data = (folder / "denoiser.safetensors").read_bytes()
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(data[2**20 : 2**20 + 2**16]).hexdigest()[:8]
    assert metadata["ss_new_vae_hash"] == hashlib.sha256(b"small").hexdigest()
    assert legacy_hash(folder / "vae.safetensors") == "e3b0c442", "the window of a short file is empty"


@pytest.mark.parametrize("words", [(), ("--no_metadata",)])
def test_no_value_holds_an_absolute_path(made, words):
    make, folder = made
    arguments = "--network_args", f"file={folder}/x.txt", "--optimizer_args", f"foo={folder}/y.txt"
    metadata = save_metadata(make(*words, *arguments), step=1, epoch=1)
    for key, value in {**{v: k for k, v in metadata.items()}, **metadata}.items():
        assert not re.search(r"""(^|["'\s=(,])(/|~/|[A-Za-z]:[\\/])[^/"'\s]""", value), (key, value)
        assert str(folder) not in value and folder.name not in value


def test_paths_are_cut_wherever_they_are():
    value = {"/home/me/images": ["C:\\data\\x.png", "relative/x.png", "a / b", "/", 3], "~/x": None}
    assert without_paths(value) == {"images": ["x.png", "relative/x.png", "a / b", "/", 3], "x": None}
    assert without_paths('[{"image_dir": "/a/b"}]') == '[{"image_dir": "b"}]'
    assert without_paths("{wild|card} text") == "{wild|card} text"


def test_a_hub_id_and_a_folder_have_a_name_only(made):
    make, folder = made
    (folder / "model").mkdir()
    hub, local = make("--pretrained_model_name_or_path", "owner/model"), make(
        "--pretrained_model_name_or_path", str(folder / "model"))  # fmt: skip
    assert (hub["ss_sd_model_name"], local["ss_sd_model_name"]) == ("owner/model", "model")
    assert "ss_sd_model_hash" not in hub.keys() | local.keys()


def test_the_model_spec_is_complete(made):
    make, _ = made
    metadata = make("--metadata_author", "Ada", "--metadata_tags", "a, b", "--metadata_usage_hint", "say blueprint",
                    "--metadata_trigger_phrase", "blueprint", "--min_timestep", "100")  # fmt: skip
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    assert datetime.datetime.fromisoformat(spec.pop("date")).tzinfo is not None
    assert re.fullmatch(r"lorasmith/\d+\.\d+\.\d+", spec.pop("implementation_version"))
    assert spec == {
        "sai_model_spec": "1.0.1",
        "architecture": "toy-1/lora",
        "implementation": "diffusers",
        "title": "mine",
        "resolution": "768x640",
        "prediction_type": "flow",
        "timestep_range": "100,1000",
        "author": "Ada",
        "tags": "a, b",
        "usage_hint": "say blueprint",
        "trigger_phrase": "blueprint",
    }
    assert make("--metadata_title", "Blue", network=False)["modelspec.architecture"] == "toy-1"
    assert make("--metadata_title", "Blue")["modelspec.title"] == "Blue"


def test_a_thumbnail_is_a_data_url(made):
    make, folder = made
    (folder / "t.jpg").write_bytes(b"\xff\xd8picture")
    url = make("--metadata_thumbnail", str(folder / "t.jpg"))["modelspec.thumbnail"]
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64" and base64.b64decode(data) == b"\xff\xd8picture"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("absent.png", None, "cannot be read"), ("t.tiff", b"x", "only .png"), ("t.png", b"", "has 0 bytes")],
)
def test_a_thumbnail_that_cannot_be_used_is_refused_early(made, name, content, message):
    _, folder = made
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check_thumbnail(options.parse("toy", ["--metadata_thumbnail", str(folder / name)]))


def test_no_metadata_leaves_the_minimum_and_the_model_spec(made):
    make, _ = made
    metadata = save_metadata(make("--no_metadata", "--network_args", "rank_dropout=0.1"), step=7, epoch=2)
    assert {key for key in metadata if not key.startswith("modelspec.")} == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    }  # fmt: skip
    assert metadata["modelspec.architecture"] == "toy-1/lora"


def test_each_save_has_its_step_epoch_and_time(made):
    make, _ = made
    base = make()
    saved = save_metadata(base, step=7, epoch=2)
    assert (saved["ss_steps"], saved["ss_epoch"]) == ("7", "2")
    assert float(saved["ss_training_finished_at"]) >= float(saved["ss_training_started_at"])
    assert "ss_steps" not in base


def test_copied_options_exist():
    from library.option_table import OPTIONS

    assert set(COPIED) <= {option.name for option in OPTIONS}
