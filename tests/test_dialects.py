"""diffusion-pipe's files: every [model] table of its documents, every key, runs of the toys, the migrated file."""

import json
import re

import pytest
import tomllib
import torch
from dialect_support import toy_config
from PIL import Image
from safetensors.torch import load_file
from studio_support import make_toy
from training_support import ROOT, called, losses

from library import options
from library.data.config import load_dataset_config
from library.dialects import diffusion_pipe, diffusion_pipe_data
from library.errors import ConfigError
from library.families import FAMILIES, get_family
from tools.migrate import migrate

torch.set_num_threads(1)
SEEDS = ROOT.parent / "shared" / "seeds"
REST = "[adapter]\ntype = 'lora'\nrank = 32\ndtype = 'bfloat16'\n[optimizer]\ntype = 'adamw_optimi'\nlr = 2e-5\n"


def blocks():
    """The lines of every [model] table of the document that describes the models."""
    found, current = [], None
    for path in sorted(SEEDS.glob("000_*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip() == "```":
                found, current = (found, []) if current is None else ([*found, current], None)
            elif current is not None:
                current.append(line)
    return [block for block in found if block and block[0].startswith("[model]")]


def parsed(tmp_path, model, rest=REST, top="", **changes):
    path = tmp_path / "run.toml"
    path.write_text(f"output_dir = 'out'\nepochs = 10\n{top}\n{model}\n{rest}", encoding="utf-8")
    return options.parse(None, ["--config_file", str(path)])


@pytest.mark.parametrize("number", range(29))
def test_every_model_table_of_the_documents_is_read(number, tmp_path):
    """Lines that are neither TOML nor commented out (one block has prose) are left out, as a user has to."""
    if not SEEDS.is_dir():
        pytest.skip("the documents are not beside the repository")
    table = "\n".join(line for line in blocks()[number] if "=" in line or line.strip()[:1] in "[]{}'#")
    model = tomllib.loads(table)["model"]
    family = diffusion_pipe.TYPES[model["type"]].family
    if family not in FAMILIES:
        with pytest.raises(ConfigError, match=f"'{model['type']}' cannot be trained yet"):
            parsed(tmp_path, table)
        return
    found = parsed(tmp_path, table)
    assert found.model_type == family and found.mixed_precision == "bf16" and found.full_bf16
    assert found.network_dim == found.network_alpha == 32 and found.learning_rate == 2e-5
    files = {v for k, v in model.items() if k.endswith(("_path", "vae", "diffusion_model")) and k != "diffusers_path"}
    files |= {path for one in model.get("text_encoders", []) for path in one.get("paths", [one.get("path")])}
    known = {value for value in found.as_dict().values() if isinstance(value, str)}
    assert {file for file in files if "ckpt_path" not in model or file != model["ckpt_path"]} <= known
    held = model.get("transformer_dtype", model.get("diffusion_model_dtype"))
    assert found.fp8_base == (held or "").startswith("float8")
    report = found.report()
    assert "run.toml, [model] dtype" in report and "run.toml, [adapter] rank" in report


def test_every_setting_that_the_documents_comment_out_is_read(tmp_path):
    if not SEEDS.is_dir():
        pytest.skip("the documents are not beside the repository")
    tried = set()
    for block in blocks():
        lines = [line for line in block if "=" in line or line.strip()[:1] in "[]{}'"]
        for k, line in enumerate(lines):
            found = re.fullmatch(r"#\s*(\w+) = (.+)", line)
            if not found:
                continue
            rest = [other for n, other in enumerate(lines) if n != k and not re.match(rf"#?\s*{found[1]} =", other)]
            model = "\n".join(rest + [f"{found[1]} = {found[2]}"])
            given = tomllib.loads(model)["model"]
            options_found = parsed(tmp_path, model)
            assert f"run.toml, [model] {found[1]}" in options_found.report() or found[1] in ("ckpt_path", "flux_shift")
            tried.add((given["type"], found[1]))
    assert len(tried) >= 14 and {("sdxl", "v_pred"), ("ltx-video", "first_frame_conditioning_p")} <= tried


def test_a_file_of_musubi_tuners_is_read(tmp_path):
    (tmp_path / "run.toml").write_text(
        "dit = 'q.safetensors'\nvae = 'v'\ntext_encoder = 't'\nfp8_vl = true\nnetwork_module = 'networks.lora_qwen_image'\n"
        "network_dim = 16\ntimestep_sampling = 'shift'\ndiscrete_flow_shift = 2.2\nblocks_to_swap = 16\n"
        "gradient_checkpointing_cpu_offload = true\nmodel_version = 'edit-2509'\n", encoding="utf-8")  # fmt: skip
    found = options.parse("qwen_image", ["--config_file", str(tmp_path / "run.toml")])
    assert found.pretrained_model_name_or_path == "q.safetensors" and found.cpu_offload_checkpointing


def test_there_are_29_model_tables():
    if not SEEDS.is_dir():
        pytest.skip("the documents are not beside the repository")
    assert len(blocks()) == 29


FLUX = "[model]\ntype = 'flux'\ndiffusers_path = 'F'\ndtype = 'bfloat16'\n"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("", {"timestep_sampling": "sigmoid"}),
        ("shift = 3", {"timestep_sampling": "shift", "discrete_flow_shift": 3.0}),
        ("flux_shift = true\nsigmoid_scale = 1.3", {"timestep_sampling": "flux_shift", "sigmoid_scale": 1.3}),
        ("timestep_sample_method = 'uniform'", {"timestep_sampling": "uniform"}),
        ("timestep_sample_method = 'uniform'\nshift = 2", {"timestep_sampling": "sigma", "discrete_flow_shift": 2.0}),
        ("min_t = 0.1\nmax_t = 0.875", {"min_timestep": 100, "max_timestep": 875}),
        ("guidance = 3.5", {"guidance_scale": 3.5}),
        ("transformer_dtype = 'float8_e5m2'", {"fp8_base": True, "fp8_format": "e5m2"}),
        ("transformer_dtype = 'nf4'", {"nf4": True}),
        ("cache_text_embeddings = false", {"cache_text_encoder_outputs": False}),
        ("text_encoder_nf4 = true", {"nf4_t5": True}),
        ("merge_adapters = ['a', 'b']", {"base_weights": ["a", "b"]}),
        ("transformer_path = 't'", {"pretrained_model_name_or_path": "t", "vae": "F", "clip_l": "F", "t5xxl": "F"}),
        ("transformer_path = 't'\nvae_path = 'v'\nt5_path = 'x'", {"vae": "v", "clip_l": "F", "t5xxl": "x"}),
    ],
)
def test_a_model_key_says_what_it_sets(model, expected, tmp_path):
    found = parsed(tmp_path, FLUX + model)
    assert {name: getattr(found, name) for name in expected} == expected
    assert all(found.given(name) for name in expected if name != "cache_text_encoder_outputs")


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ("micro_batch_size_per_gpu = 4\ngradient_accumulation_steps = 2", {"train_batch_size": 4}),
        ("gradient_clipping = 0.5\nblocks_to_swap = 3", {"max_grad_norm": 0.5, "blocks_to_swap": 3}),
        ("warmup_steps = 100", {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100}),
        ("lr_scheduler = 'linear'", {"lr_scheduler": "linear"}),
        ("lr_scheduler = 'cosine'", {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 1e-6 / 2e-5}),
        ("uncond_fraction = 0.1", {"caption_dropout_rate": 0.1}),
        ("activation_checkpointing = true", {"gradient_checkpointing": True, "cpu_offload_checkpointing": False}),
        ("activation_checkpointing = 'unsloth'", {"gradient_checkpointing": True, "cpu_offload_checkpointing": True}),
        ("save_every_n_epochs = 2\ncheckpoint_every_n_epochs = 2", {"save_every_n_epochs": 2, "save_state": True}),
        ("checkpoint_every_n_minutes = 120\nsave_dtype = 'float32'", {"save_precision": "float"}),
        ("caching_batch_size = 2", {"vae_batch_size": 2, "text_encoder_batch_size": 2}),
        ("resume_from_checkpoint = true\nsteps_per_print = 5", {"resume": "auto", "log_every_n_steps": 5}),
        ("seed = 7", {"seed": 7, "max_train_epochs": 10}),  # an option of our own
    ],
)
def test_a_key_of_the_top_level_says_what_it_sets(top, expected, tmp_path):
    found = parsed(tmp_path, FLUX, top=top)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("model", "top", "rest", "message"),
    [
        (FLUX + "tranformer_path = 'x'", "", REST, r"run.toml: \[model\] tranformer_path: there is no such key; did you"),
        (FLUX.replace("flux", "fluks"), "", REST, r"\[model\] type: 'fluks' is no model; did you mean .flux."),
        (FLUX + "text_encoder_1_lr = 1e-5", "", REST, "text_encoder_1_lr: the text encoders of FLUX.1 are not trained"),
        (FLUX + "v_pred = true", "", REST, "v_pred: FLUX.1 has nothing that it could set"),
        (FLUX + "llama3_path = 'x'", "", REST, "llama3_path: FLUX.1 has no such text encoder .it has clip_l, t5xxl"),
        (FLUX + "ckpt_path = 'x'", "", REST, "ckpt_path: FLUX.1 has no folder of this kind"),
        (FLUX + "transformer_dtype = 'int8'", "", REST, "transformer_dtype: 'int8' is none of float8"),
        (FLUX + "shift = 3\nflux_shift = true", "", REST, "shift, flux_shift: logit_normal or uniform, with one shift"),
        (FLUX + "transformer_path = 'a'\ncheckpoint_path = 'b'", "", REST, "transformer_path is the denoiser already"),
        (FLUX + "max_t = 0.87512", "", REST, "max_t: 0.87512: three digits"),
        (FLUX, "epoch = 3", REST, "run.toml: epoch: there is no such key; did you mean .epochs."),
        (FLUX, "max_steps = 3", REST, "max_steps: the run ends after epochs; remove one"),
        (FLUX, "pipeline_stages = 2", REST, "pipeline_stages: a model is not spread over several cards; use blocks_to_swap"),
        (FLUX, "eval_datasets = ['x']", REST, "eval_datasets: hold a part of the data out with validation_split"),
        (FLUX, "huber_delta = 0.1", REST, "huber_delta: its function is another one"),
        (FLUX, "micro_batch_size_per_gpu = [[512, 2]]", REST, "batch sizes by resolution belong into the dataset"),
        (FLUX, "video_clip_mode = 'single_middle'", REST, "video_clip_mode: 'single_middle': only 'single_beginning'"),
        (FLUX, "", REST.replace("rank = 32", "rank = 32\nalpha = 1"), r"\[adapter\] alpha: alpha is always the rank"),
        (FLUX, "", REST.replace("rank = 32", "rank = 32\ndropout = 0.1"), r"\[adapter\] dropout: it drops what the adapter"),
        (FLUX, "", REST.replace("'lora'", "'loha'"), r"\[adapter\] type: 'loha' is none of lora, lokr"),
        (FLUX, "", REST.replace("adamw_optimi", "automagic"), r"\[optimizer\] type: automagic is not offered"),
        (FLUX, "", REST + "beta2_half_life = 5", r"\[optimizer\] beta2_half_life: no optimizer here has it"),
        (FLUX, "", REST + "[monitoring]\nwandb_api_key = 'k'", r"wandb_api_key: set the environment variable"),
        (FLUX, "", REST + "[optimiser]\nlr = 1", r"\[optimiser\]: there is no such table; did you mean .optimizer."),
    ],
)  # fmt: skip
def test_what_is_not_offered_is_refused_by_name_in_one_sentence(model, top, rest, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        parsed(tmp_path, model, rest, top)
    assert "\n" not in str(error.value)


def test_adapters_optimizers_and_full_fine_tunes(tmp_path):
    lokr = parsed(
        tmp_path, FLUX, REST.replace("'lora'", "'lokr'").replace("rank = 32", "rank = 8\ndecompose_factor = 4")
    )
    assert (lokr.network_module, lokr.network_args) == ("lycoris.kohya", ["algo=lokr", "factor=4"])
    assert lokr.save_precision == "bf16" and lokr.stochastic_rounding and lokr.optimizer_type == "AdamW"
    rest = ("[optimizer]\ntype = 'adamw8bitkahan'\nlr = 5e-6\nbetas = [0.9, 0.99]\nweight_decay = 0.01\neps = 1e-8\n"
            "gradient_release = true\n")  # fmt: skip
    full = parsed(tmp_path, FLUX, rest, "gradient_clipping = 1.0")
    assert full.network_module is None and full.full_bf16 and full.fused_backward_pass and full.max_grad_norm == 0
    assert full.optimizer_type == "AdamW8bitKahan" and not full.stochastic_rounding
    assert full.optimizer_args == ["betas=(0.9, 0.99)", "weight_decay=0.01", "eps=1e-08"]
    sdxl = parsed(
        tmp_path, "[model]\ntype='sdxl'\ncheckpoint_path='x'\ndtype='bfloat16'\ntext_encoder_2_lr=0\nv_pred=true"
    )
    assert sdxl.text_encoder_lr == [2e-5, 0.0] and sdxl.v_parameterization and sdxl.zero_terminal_snr
    assert lokr.save_format == "diffusers" and sdxl.save_format == "kohya", "as diffusion-pipe saves them"
    lumina = parsed(tmp_path, "[model]\ntype='lumina_2'\ntransformer_path='x'")
    assert lumina.system_prompt == "" and "type (lumina_2's usual one)" in lumina.report()
    assert sdxl.cache_latents and not sdxl.cache_text_encoder_outputs


# ---- datasets


def specs_of(tmp_path, text, model="[model]\ntype = 'hunyuan_image'\ntransformer_path = 'x'\n"):
    (tmp_path / "data.toml").write_text(text, encoding="utf-8")
    return load_dataset_config(parsed(tmp_path, model, top=f"dataset = {json.dumps(str(tmp_path / 'data.toml'))}"))


def pictures(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 48), (len(name) * 9 % 255, 50, 90)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a picture of {name}", encoding="utf-8")
    return folder


def test_a_dataset_becomes_one_for_each_resolution_with_the_very_buckets(tmp_path):
    pictures(tmp_path / "in", "a")
    pictures(tmp_path / "c1", "a")
    specs = specs_of(tmp_path, """
resolutions = [512, [1024, 768]]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 3
caption_prefix = 'art, '
[[directory]]
path = 'in'
num_repeats = 5
control_paths = ['c1']
[[directory]]
path = 'in'
resolutions = [640]
enable_ar_bucket = false
""")  # fmt: skip
    assert [spec.resolution for spec in specs] == [(512, 512), (1024, 768), (640, 640)]
    # side lengths by hand: sqrt(area * ratio), rounded to the 32 pixels of this model
    assert specs[0].bucket_sizes == ((352, 736), (512, 512), (736, 352)) and not specs[2].enable_bucket
    first, last = specs[0].subsets[0], specs[2].subsets[0]
    assert (first.num_repeats, last.num_repeats) == (5, 1) and first.caption_prefix == last.caption_prefix == "art, "
    assert first.control_directory == (str(tmp_path / "c1"),) and first.caption_extension == ".txt"
    assert first.image_dir == str(tmp_path / "in")


def test_videos_take_the_longest_of_their_buckets(tmp_path):
    from library.data.clips import windows

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "clip.mp4").write_bytes(b"")
    text = "resolutions = [256]\nframe_buckets = [1, 17, 33]\n[[directory]]\npath = 'in'\n"
    (spec,) = specs_of(tmp_path, text, "[model]\ntype = 'wan'\ntransformer_path = 'x'\n")
    (subset,) = spec.subsets
    assert subset.video_directory and subset.target_frames == (17, 33)
    rule = get_family("wan").frames
    assert [windows(count, subset, rule) for count in (16, 17, 40)] == [[], [(0, 17)], [(0, 33)]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[directory]]\npath = 'in'", "directory 1: resolutions is missing"),
        ("resolutions = [512]\n[[directory]]\nnum_repeats = 2", "directory 1: path is missing"),
        ("resolutions = [512]\npath = 'x'\n[[directory]]\npath = 'in'", "path belongs into a .*directory"),
        (
            "resolutions = [512]\n[[directory]]\npath = 'in'\ncontrol_pth = 'c'",
            "control_pth: there is no such key; did you",
        ),
        (
            "resolutions = [512]\ncache_shuffle_num = 3\n[[directory]]\npath = 'in'",
            "cache_shuffle_num: captions are shuff",
        ),
        ("resolutions = [512]\n[[directory]]\npath = 'in'\nnum_repeats = 0.5", "num_repeats 0.5: a whole number"),
        ("resolutions = [512]\nenable_ar_bucket = true\n[[directory]]\npath = 'in'", "enable_ar_bucket needs min_ar"),
    ],
)
def test_what_a_dataset_cannot_say_is_refused_by_name(text, message, tmp_path):
    pictures(tmp_path / "in", "a")
    with pytest.raises(ConfigError, match=message):
        specs_of(tmp_path, text)


def test_shuffled_tags_and_masks_reach_the_run(tmp_path):
    pictures(tmp_path / "in", "a")
    pictures(tmp_path / "masks", "a")
    (tmp_path / "data.toml").write_text(
        "resolutions = [64]\nshuffle_tags = true\n[[directory]]\npath = 'in'\nmask_path = 'masks'\n", encoding="utf-8"
    )
    found = parsed(tmp_path, FLUX, top="dataset = 'data.toml'")
    assert found.masked_loss and not found.cache_text_encoder_outputs and found.cache_latents
    ((subset,),) = (spec.subsets for spec in load_dataset_config(found))
    assert subset.shuffle_caption and subset.conditioning_data_dir == str(tmp_path / "masks")


# ---- runs


@pytest.mark.parametrize("family", ["z_image", "sdxl", "flux", "qwen_image"])
def test_a_file_of_diffusion_pipes_trains_the_row_that_it_names(family, tmp_path, capsys):
    from train_network import NetworkTrainer

    toy = make_toy(family, tmp_path / family)
    pictures(tmp_path / "in", "a", "bc")
    (tmp_path / "data.toml").write_text(
        "resolutions = [64]\nenable_ar_bucket = true\nar_buckets = [1.0, [80, 48]]\n[[directory]]\npath = 'in'\n"
        if family != "sdxl" else "resolutions = [64]\n[[directory]]\npath = 'in'\n", encoding="utf-8")  # fmt: skip
    path = toy_config(family, toy, tmp_path / "data.toml", tmp_path)
    trainer = NetworkTrainer(options.parse(None, ["--config_file", str(path)]))
    trainer.run()
    assert trainer.family.name == family and len(losses(tmp_path / "out")) == 2
    weights = load_file(tmp_path / "out" / "run.safetensors")
    assert any("lora" in key for key in weights)
    assert any("te1" in key for key in weights) == (family == "sdxl"), "SDXL's text encoders are trained"
    assert "eval_every_n_epochs is not read: there are no eval_datasets" in capsys.readouterr().err
    if family != "sdxl":
        assert trainer.dataset.items[0].bucket == (80, 48), "64 x 48 pictures"


def test_the_migrated_file_is_the_same_run(tmp_path):
    toy = make_toy("z_image", tmp_path / "z_image")
    pictures(tmp_path / "in", "a")
    (tmp_path / "data.toml").write_text("resolutions = [64, 96]\n[[directory]]\npath = 'in'\n", encoding="utf-8")
    source = toy_config("z_image", toy, "data.toml", tmp_path, "shift = 3\nmin_t = 0.2")
    target = tmp_path / "native" / "run.toml"
    result = called("tools/migrate.py", str(source), str(target))
    assert result.returncode == 0, result.stderr
    assert f"{source} -> {target}" in result.stdout and "[model] shift" in target.read_text()
    assert "model" not in tomllib.loads(target.read_text()), "the native form"
    old, new = (options.parse(None, ["--config_file", str(path)]) for path in (source, target))
    differing = {k for k in old.as_dict() if old.as_dict()[k] != new.as_dict()[k]}
    assert differing == {"config_file", "dataset_config"}
    assert load_dataset_config(old) == load_dataset_config(new)
    with pytest.raises(ConfigError, match="exists already"):
        migrate(source, target)
    with pytest.raises(ConfigError, match="no file of another program"):
        migrate(target, tmp_path / "other.toml")


def test_every_rule_sets_an_option_that_exists():
    from library.option_table import OPTIONS
    from library.options import options_of

    known = {o.name for o in OPTIONS} | {o.name for name in FAMILIES for o in options_of(get_family(name))}
    tables = (diffusion_pipe.MODEL, diffusion_pipe.TOP, diffusion_pipe.ADAPTER, diffusion_pipe.LOKR)
    assert {rule for table in tables for rule in table.values() if isinstance(rule, str)} <= known
    from library.data.config import SHARED, SUBSET_ONLY

    assert {
        rule for rule in diffusion_pipe_data.RULES.values() if isinstance(rule, str)
    } <= SHARED.keys() | SUBSET_ONLY.keys()
