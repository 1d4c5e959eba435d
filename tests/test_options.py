"""Options: where values come from, what is refused, and what the user is told."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import library.families
from library import option_table, options
from library.errors import ConfigError
from library.objective import FLOW
from library.option_checks import RULES, SCHEDULER_OPTIONS, check_read
from library.option_kinds import Option, parse_pairs
from library.options_not_offered import NOT_OFFERED

ROOT = Path(__file__).parents[1]
BASE = ["--output_dir", "out", "--pretrained_model_name_or_path", "m.safetensors", "--dataset_config", "d.toml"]
TOY = SimpleNamespace(
    parts=(SimpleNamespace(option="text_encoder", title="a toy encoder"),),
    tokenizers=((SimpleNamespace(option="tokenizer", hub="o/n"), None),),
    name="toy",
    title="Toy",
    defaults={"timestep_sampling": "shift", "discrete_flow_shift": 6.0, "learning_rate": 1e-4},
    options=(Option("toy_option", "float", 0.5, "of the toy"),),
    save_formats=("kohya", "comfy"),
    objective=FLOW,
    text_prefixes=(),
)


@pytest.fixture(autouse=True)
def toy_family(monkeypatch):
    monkeypatch.setitem(library.families.FAMILIES, "toy", "unused:UNUSED")
    real = library.families.get_family
    monkeypatch.setattr(library.families, "get_family", lambda name: TOY if name == "toy" else real(name))


def parse(*words: str, family: str | None = "toy") -> options.Options:
    return options.parse(family, [str(word) for word in words])


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(*words: str, base: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_read(parse(*(BASE if base is None else base), *words))
    return str(caught.value)


# ------------------------------------------------------------------ where values come from


def test_the_command_line_is_above_the_file_above_the_family_above_the_default(tmp_path):
    path = config(tmp_path, "learning_rate = 3e-4\nseed = 7\n[network]\nnetwork_dim = 16\n")
    o = parse("--config_file", path, "--seed", "9")
    assert (o.seed, o.origin("seed")) == (9, "command line")
    assert (o.learning_rate, o.origin("learning_rate")) == (3e-4, f"config {path.as_posix()}")
    assert (o.network_dim, o.discrete_flow_shift, o.toy_option) == (16, 6.0, 0.5)
    assert (o.origin("discrete_flow_shift"), o.origin("toy_option")) == ("family toy", "default")
    assert o.given("seed") and o.given("network_dim") and not o.given("discrete_flow_shift")


def test_a_flag_of_the_file_is_turned_off_on_the_command_line(tmp_path):
    path = config(tmp_path, "gradient_checkpointing = true\nsample_prompts = 'p.txt'\n")
    o = parse("--config_file", path, "--gradient_checkpointing", "false", "--sample_prompts", "none")
    assert (o.gradient_checkpointing, o.sample_prompts) == (False, None)
    assert parse("--gradient_checkpointing").gradient_checkpointing is True


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--logit_mean", "-0.5"], "logit_mean", -0.5),
        (["--logit_mean=-0.5"], "logit_mean", -0.5),
        (["--lr_warmup_steps", "10%"], "lr_warmup_steps", 0.1),
        (["--lr_warmup_steps", "100%"], "lr_warmup_steps", 1.0),
        (["--lr_warmup_steps", "0.25"], "lr_warmup_steps", 0.25),
        (["--lr_warmup_steps", "100"], "lr_warmup_steps", 100),
        (["--resolution", "512"], "resolution", (512, 512)),
        (["--resolution", "768,512"], "resolution", (768, 512)),
        (["--network_args", "rank_dropout=0.1", "expr=a=b"], "network_args", ["rank_dropout=0.1", "expr=a=b"]),
        (["--base_weights", "a.safetensors", "b.safetensors"], "base_weights", ["a.safetensors", "b.safetensors"]),
        (["--base_weights_multiplier", "1", "-0.5"], "base_weights_multiplier", [1.0, -0.5]),
        (["--caption_extention", ".txt"], "caption_extension", ".txt"),
        (["--face_crop_aug_range", "2.0,4.0"], "face_crop_aug_range", (2.0, 4.0)),
    ],
)
def test_a_value_of_the_command_line_gets_its_type(words, name, value):
    got = getattr(parse(*words), name)
    assert got == value and type(got) is type(value)


def test_toml_values_become_the_same_as_those_of_the_command_line(tmp_path):
    text = (
        "lr_warmup_steps = '10%'\nresolution = [768, 512]\nlearning_rate = '1e-4'\nlogit_std = 2\n"
        "[network_args]\nrank_dropout = 0.1\nverbose = true\nname = 'x=y'\n"
        "[optimizer]\noptimizer_args = ['betas=(0.9, 0.99)']\n"
    )
    o = parse("--config_file", config(tmp_path, text))
    assert (o.lr_warmup_steps, o.resolution, o.learning_rate, o.logit_std) == (0.1, (768, 512), 1e-4, 2.0)
    assert o.network_args == ["rank_dropout=0.1", "verbose=True", "name=x=y"]
    assert o.optimizer_args == ["betas=(0.9, 0.99)"]


def test_relative_paths_of_a_file_are_beside_it_if_they_exist_there(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "vae.safetensors").touch()
    (tmp_path / "there" / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    text = "vae = 'vae.safetensors'\ntext_encoder = 'elsewhere.safetensors'\noutput_dir = 'out'\ntokenizer = 'Qwen/Q'\n"
    config(tmp_path / "there", text)
    o = parse("--config_file", "there/run.toml")
    assert Path(o.vae) == Path("there/vae.safetensors")
    assert (o.text_encoder, o.output_dir, o.tokenizer) == ("elsewhere.safetensors", "out", "Qwen/Q")
    assert Path(parse("--config_file", "there/run").vae) == Path("there/vae.safetensors"), "extension left out"


def test_steps_on_the_command_line_set_aside_epochs_of_the_file(tmp_path):
    path = config(tmp_path, "max_train_epochs = 10\n")
    o = parse("--config_file", path, *BASE, "--max_train_steps", "5")
    check_read(o)
    assert (o.max_train_steps, o.max_train_epochs) == (5, None)
    assert "set aside" in o.origin("max_train_epochs")


def test_what_follows_from_other_options_says_so():
    o = parse(*BASE, "--cache_latents_to_disk", "--network_module", "networks.lora", "--optimizer_type", "Prodigy",
              "--log_with", "tensorboard")  # fmt: skip
    assert (o.cache_latents, o.origin("cache_latents")) == (True, "implied by --cache_latents_to_disk")
    assert (o.save_format, o.learning_rate, o.logging_dir) == ("kohya", 1.0, "out/logs")
    assert parse("--optimizer_type", "Prodigy", "--learning_rate", "0.5").learning_rate == 0.5


def test_the_family_comes_from_the_file_or_the_command_line(tmp_path):
    assert parse("--config_file", config(tmp_path, "model_type = 'toy'"), family=None).family is TOY
    assert parse("--model_type", "toy", family=None).model_type == "toy"
    with pytest.raises(ConfigError, match="--model_type is missing"):
        parse(family=None)
    with pytest.raises(ConfigError, match="trains toy"):
        parse("--model_type", "z_image")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learnin_rate", "1"], r"--learnin_rate .*not an option; did you mean 'learning_rate'"),
        (["--learning-rate", "1"], r"did you mean 'learning_rate'"),
        (["--lr"], r"--lr .*not an option"),
        (["--mem_eff_attn"], r"sd-scripts that is not offered: "),
        (["--use_8bit_adam"], r"--optimizer_type AdamW8bit"),
        (["--network_dim", "4.5"], r"--network_dim '4.5' .*whole number"),
        (["--network_dim", "0"], r"at least 1"),
        (["--caption_dropout_rate", "1.5"], r"in 0..1"),
        (["--learning_rate", "nan"], r"finite"),
        (["--loss_type", "l3"], r"none of l1, l2, huber, smooth_l1"),
        (["--timestep_sampling", "flux_shift "], r"none of .*did you mean 'flux_shift'"),
        (["--seed"], r"--seed needs one value .*nothing"),
        (["--output_name", "my", "lora"], r"quote"),
        (["stray"], r"'stray' .*no option"),
        (["--network_args", "rank_dropout"], r"not of the form name=value"),
        (["--lr_warmup_steps", "1.5"], r"ratio below 1"),
        (["--lr_warmup_steps", "110%"], r"0% to 100%"),
        (["--face_crop_aug_range", "4,2"], r"min is above max"),
        (["--vae", ""], r"empty"),
        (["--gradient_checkpointing", "yes"], r"true or false"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate = 1", r"config .*run.toml.*did you mean 'learning_rate'"),
        ("[a]\nseed = 1\n[b]\nseed = 2", r"'seed' is set twice, the second time in \[b\]"),
        ("caption_extension = '.txt'\ncaption_extention = '.txt'", r"set twice"),
        ("[a.b]\nseed = 1", r"only one level"),
        ("seed = 1\nnetwork_dim = = 3", r"not valid TOML.*line 2"),
        ('vae = "C:\\models\\vae"', r"not valid TOML"),
        ("network_dim = '4a'", r"--network_dim '4a' \(config"),
        ("network_dim = true", r"whole number"),
        ("network_dim = 4.0", r"whole number"),
        ("gradient_checkpointing = 1", r"true or false"),
        ("output_name = 3", r"expected text"),
        ("lr_scheduler_args = ['a', 'b']", r"'a' is not of the form"),
        ("v2 = true", r"not offered"),
        ("print_config = true", r"belongs on the command line"),
        ("base_weights = [1]", r"expected text"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        parse("--config_file", config(tmp_path, text))


def test_an_unreadable_file_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="absent.toml cannot be read"):
        parse("--config_file", tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes("output_name = 'é'".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        parse("--config_file", tmp_path / "latin.toml")
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbfseed = 3")
    assert parse("--config_file", tmp_path / "bom.toml").seed == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sigmoid_scale 2 --timestep_sampling uniform", "--sigmoid_scale 2.0 (command line) has no effect with "
         "--timestep_sampling uniform"),
        ("--timestep_sampling sigmoid --discrete_flow_shift 2", "has no effect with --timestep_sampling sigmoid"),
        ("--logit_mean 0.5", "with --timestep_sampling shift"),
        ("--timestep_sampling sigma --logit_std 2", "with --weighting_scheme uniform; logit_normal reads it"),
        ("--timestep_sampling sigma --mode_scale 2", "mode reads it"),
        ("--weighting_scheme logit_normal", "a density of --timestep_sampling sigma"),
        ("--huber_c 0.2", "with --loss_type l2"),
        ("--loss_type huber --huber_scale 2", "with --huber_schedule snr"),
        ("--unet_lr 1e-4", "without --network_module"),
        ("--network_dim 8", "without --network_module"),
        ("--text_encoder_lr 1e-5", "whose text encoders are not trained"),
        ("--network_train_text_encoder_only", "whose text encoders are not trained"),
        ("--sample_every_n_steps 10", "without --sample_prompts"),
        ("--lr_warmup_steps 10", "use --lr_scheduler constant_with_warmup"),
        ("--lr_scheduler cosine --lr_scheduler_num_cycles 3", "read by cosine_with_restarts"),
        ("--lr_scheduler linear --lr_decay_steps 10%", "read by warmup_stable_decay"),
        ("--lr_scheduler cosin", "did you mean 'cosine'"),
        ("--lr_scheduler reduce_lr_on_plateau", "follows a measured loss"),
        ("--lr_scheduler_type CosineAnnealingLR --lr_warmup_steps 5", "--lr_scheduler_args"),
        ("--optimizer_type AdamWScheduleFree --lr_scheduler cosine", "warmup_steps=N"),
        ("--optimizer_type Prodigy --network_module networks.lora --network_args loraplus_lr_ratio=4", "loraplus"),
        ("--max_train_steps 10 --max_train_epochs 2", "with --max_train_epochs"),
        ("--save_last_n_steps 10", "without --save_every_n_steps"),
        ("--wandb_run_name x", "without --log_with"),
        ("--logging_dir logs --wandb_run_name x", "without --log_with wandb"),
        ("--train_data_dir x", "with --dataset_config"),
        ("--save_model_as ckpt", "run code"),
        ("--network_module networks.lora --save_format diffusers", "available: kohya, comfy"),
        ("--output_name a/b", "no file name"),
        ("--full_bf16", "needs --mixed_precision bf16"),
        ("--min_timestep 500 --max_timestep 100", "--min_timestep 500 is above --max_timestep 100"),
        ("--cache_dir c", "without --cache_latents_to_disk"),
        ("--ip_noise_gamma_random_strength", "without --ip_noise_gamma"),
        ("--network_module networks.lora --dim_from_weights", "without --network_weights"),
    ],
)  # fmt: skip
def test_an_option_that_nothing_reads_is_refused_with_the_reason(words, message):
    assert message in refused(*words.split())


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--weighting_scheme none",
        "--lr_warmup_steps 0 --huber_schedule snr --loss_type huber",
        "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.8",
        "--lr_scheduler warmup_stable_decay --lr_warmup_steps 10% --lr_decay_steps 0.2 --lr_scheduler_min_lr_ratio 0.1",
        "--optimizer_type AdamWScheduleFree --lr_warmup_steps 0",
        "--network_module networks.lora --network_dim 16 --network_train_unet_only --save_format comfy",
        "--save_every_n_epochs 1 --save_last_n_epochs 2 --save_state --save_last_n_steps_state 5",
        "--mixed_precision bf16 --full_bf16",
        "--caption_dropout_rate 0.1 --shuffle_caption --keep_tokens 1",
        "--lr_scheduler adafactor:1e-3",
    ],
)
def test_options_that_belong_together_are_accepted(words):
    check_read(parse(*BASE, *words.split()))


def test_what_is_missing_is_named():
    assert "--output_dir is missing" in refused(base=BASE[2:])
    assert "--pretrained_model_name_or_path is missing" in refused(base=BASE[:2] + BASE[4:])
    assert "no dataset" in refused(base=BASE[:4])


def test_a_tiny_learning_rate_for_prodigy_is_warned_of(capsys):
    check_read(parse(*BASE, "--optimizer_type", "Prodigy", "--learning_rate", "1e-4"))
    assert "--learning_rate 0.0001 multiplies the rate that Prodigy finds" in capsys.readouterr().err


def test_rules_name_only_options_that_exist():
    known = {option.name for option in option_table.OPTIONS}
    assert {name for rule in RULES for name in rule.names} | SCHEDULER_OPTIONS <= known
    assert {name for rule in RULES for name in re.findall(r"{(\w+)}", rule.why)} <= known


# ------------------------------------------------------------------ the object, the prints, the list


def test_options_are_read_only_and_name_the_nearest():
    o = parse()
    with pytest.raises(AttributeError, match="did you mean 'network_dim'"):
        _ = o.network_dimm
    with pytest.raises(AttributeError, match="read-only"):
        o.seed = 3
    assert (o.replace(seed="3").seed, o.seed) == (3, 42)


def test_print_config_shows_value_and_origin_and_exits_with_0(tmp_path, capsys):
    path = config(tmp_path, "seed = 7\n")
    with pytest.raises(SystemExit) as caught:
        parse("--config_file", path, *BASE, "--print_config", "--network_module", "networks.lora")
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert re.search(rf"^seed +7 +config {re.escape(path.as_posix())}$", out, re.MULTILINE)
    assert re.search(r"^discrete_flow_shift +6.0 +family toy$", out, re.MULTILINE)
    assert re.search(r"^save_format +\"kohya\" +family toy$", out, re.MULTILINE)
    assert {line.split()[0] for line in out.splitlines() if not line.startswith("#")} == set(parse().as_dict())


def test_the_saved_configuration_gives_the_same_run(tmp_path):
    words = [*BASE, "--network_module", "networks.lora", "--network_args", "a=b'c\"", "--resolution", "64,32",
             "--training_comment", "zwei\nZeilen \\ 🙂", "--learning_rate", "3e-5", "--shuffle_caption"]  # fmt: skip
    o = parse(*words)
    again = parse("--config_file", config(tmp_path, o.to_toml()))
    check_read(again)
    drop = {"config_file"}
    assert {k: v for k, v in again.as_dict().items() if k not in drop} == {
        k: v for k, v in o.as_dict().items() if k not in drop
    }


def test_help_lists_every_option_without_torch():
    program = (
        "import sys; from library import options; sys.argv[1:] = ['--help']\n"
        "try: options.parse(None)\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert all(f"--{option.name}" in done.stdout for option in option_table.OPTIONS)


def test_the_list_of_options_is_the_frozen_one():
    frozen = (ROOT / "tests" / "options.txt").read_text(encoding="utf-8")
    assert option_table.frozen() == frozen, "regenerate: python -m library.option_table > tests/options.txt"


def test_the_documentation_of_options_is_current(monkeypatch):
    monkeypatch.delitem(library.families.FAMILIES, "toy")
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert option_table.markdown() == text, "regenerate: python -m library.option_table --markdown > docs/options.md"


def test_names_are_either_offered_or_not():
    names = [option.name for option in option_table.OPTIONS]
    assert len(names) == len(set(names))
    assert not set(names) & NOT_OFFERED.keys()


def test_pairs_become_values():
    pairs = ["betas=(0.9, 0.99)", "lr=1e-3", "name=cosine", "expr=a=b", "flag=true", "x='1'", "nothing=None"]
    assert parse_pairs(pairs, "optimizer_args") == {
        "betas": (0.9, 0.99), "lr": 1e-3, "name": "cosine", "expr": "a=b", "flag": True, "x": "1", "nothing": None,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'a' is given twice"):
        parse_pairs(["a=1", "a=2"], "optimizer_args")


def test_train_network_finds_the_family_by_the_denoisers_file(tmp_path, monkeypatch):
    monkeypatch.delitem(library.families.FAMILIES, "toy")
    base = "models/emoji64/denoiser.safetensors"
    assert parse("--pretrained_model_name_or_path", base, family=None).model_type == "z_image"
    with pytest.raises(ConfigError, match="--model_type is missing; give one of"):
        parse("--config_file", config(tmp_path, "dit = 'gone.safetensors'"), family=None)
    with pytest.raises(ConfigError, match="vae.safetensors does not tell: it is none of anima, "):
        parse("--dit", "models/emoji64/vae.safetensors", family=None)
