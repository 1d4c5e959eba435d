"""Both experts of Wan 2.2 in one run: videos against diffusers' pipelines, one LoRA or two, whose turn a step is."""

import json
from types import SimpleNamespace

import pytest
import torch
from oracles import accepted_stems, relative
from PIL import Image
from safetensors.torch import load_file, save_file
from test_processes import run_all
from training_support import losses
from wan_support import (  # noqa: F401
    FAMILY,
    FILES,
    clips,
    padded_text,
    photo,
    pipeline_of,
    prompt_of,
    toy,
    trainer_of,
    words_of,
)

from library import checkpoints, sample
from library.errors import ConfigError
from library.families.family import Pair
from library.inference import Studio, main, parser_of
from library.memory.experts import Experts
from library.turns import Turns

LOW, HIGH = {"t2v": "2.2 t2v low", "i2v": "2.2 i2v"}, {"t2v": "2.2 t2v", "i2v": "2.2 i2v high"}
CACHED = ("--cache_latents", "--cache_text_encoder_outputs", "--seed", "2")  # the experts take turns: 0, 1, 0, 1


def file_of(toy, model):
    return str(toy / f"{FILES[model][1]}.safetensors")


def both(toy, kind="t2v"):
    return ["--dit_high_noise", file_of(toy, HIGH[kind])]


def pair_studio(toy, kind, *more):
    options = parser_of(FAMILY).parse_args([*words_of(toy, LOW[kind]), *both(toy, kind), "--save_path", "x.mp4", *more])
    return Studio(FAMILY.resolved(options), options)


def expert(toy, model):
    return checkpoints.load_part(FAMILY.denoiser, file_of(toy, model), dtype=torch.float32)


# ---------------------------------------------------------------- videos


@pytest.mark.parametrize(("kind", "boundary", "scales"), [("t2v", 0.875, (3.0, 4.0)), ("i2v", 0.9, (3.5, 3.5))])
@pytest.mark.parametrize("swapped", [0, 1])
def test_a_video_is_the_one_that_diffusers_pipeline_makes_with_two_transformers(
    toy, photo, kind, boundary, scales, swapped, monkeypatch
):
    if swapped:
        monkeypatch.setattr("library.memory.swap_plan.STAY", 0)
    studio, image = pair_studio(toy, kind, "--blocks_to_swap", str(swapped)), kind == "i2v"
    prompt = prompt_of(studio, f"--i {photo}" if image else "")
    pair, shape = studio.conditions(prompt), (16, 3, 8, 8)
    made = {"shape": shape, "seed": 5, "steps": 6, "shift": 3.0, "device": "cpu"}
    family, low_scale = studio.family, prompt.scale
    assert low_scale == scales[0] and family.pair.boundary == boundary
    ours = sample.generate_latents(family, studio.denoiser, *pair, scale=low_scale, **made)
    again = sample.generate_latents(family, studio.denoiser, *pair, scale=low_scale, **made)
    assert torch.equal(ours, again)  # which ends with the other expert than it begins with
    pipeline = pipeline_of(SimpleNamespace(**vars(studio) | {"vae": studio.vae, "denoiser": None, "family": family}),
                           image=image, high_noise=expert(toy, HIGH[kind]))  # fmt: skip
    pipeline.register_modules(transformer_2=expert(toy, LOW[kind]))
    pipeline.register_to_config(boundary_ratio=boundary)
    start = torch.randn((1, *shape), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        theirs = pipeline(
            height=64, width=64, num_frames=9, num_inference_steps=6, guidance_scale=scales[1], latents=start,
            guidance_scale_2=scales[0], prompt_embeds=padded_text(pair[0]), negative_prompt_embeds=padded_text(pair[1]),
            output_type="latent", return_dict=False, **({"image": Image.open(photo)} if image else {}),
        )[0]  # fmt: skip
    assert relative(ours, theirs) < 1e-4
    other = sample.generate_latents(family, studio.denoiser, *pair, scale=low_scale, **made,
                                    settings={"guidance_scale_high_noise": 6.0})  # fmt: skip
    assert relative(other, theirs) > 1e-3


def test_loras_are_given_to_the_experts_by_their_names(toy, tmp_path):
    from networks import lora

    files = {}
    for seed, name in enumerate(("a-low_noise", "a-high_noise", "a")):
        network = lora.create_network(1.0, 4, 4, None, [], expert(toy, LOW["t2v"]))
        for k, parameter in enumerate(network.parameters()):
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9 * seed + k)) * 0.1
        files[name] = str(tmp_path / f"{name}.safetensors")
        network.save_weights(files[name], torch.float32, {})
    studio = pair_studio(toy, "t2v", "--lora_weight", *files.values())
    noisy, cond = torch.randn(1, 16, 2, 8, 8), {"text": torch.randn(7, 4096)}
    for model, names, sigma in (("2.2 t2v", ("a-high_noise", "a"), 0.95), ("2.2 t2v low", ("a-low_noise", "a"), 0.4),
                                ("2.2 t2v", ("a-high_noise", "a"), 0.875)):  # fmt: skip
        alone = expert(toy, model)
        for name in names:
            network, tensors = lora.create_network_from_weights(1.0, files[name], None, [], alone, for_inference=True)
            network.merge_to([], alone, tensors)
        with torch.no_grad():
            ours = studio.family.predict(studio.denoiser, noisy, torch.tensor([sigma]), [cond])
            assert relative(ours, FAMILY.predict(alone, noisy, torch.tensor([sigma]), [cond])) < 1e-5
    with pytest.raises(ValueError, match="both experts"):
        studio.family.predict(studio.denoiser, noisy.repeat(2, 1, 1, 1, 1), torch.tensor([0.5, 0.9]), [cond, cond])


def test_diffusers_pipeline_takes_the_loras_of_both(toy, tmp_path):
    import diffusers

    from networks import lora

    models = {"transformer": expert(toy, HIGH["t2v"]), "transformer_2": expert(toy, LOW["t2v"])}
    pipeline = diffusers.WanPipeline(None, None, None, diffusers.FlowMatchEulerDiscreteScheduler(), **models)
    noisy, conds, sigma, theirs = torch.randn(1, 16, 2, 8, 8), [{"text": torch.randn(7, 4096)}], torch.tensor([0.9]), {}
    for number, (name, model) in enumerate(models.items()):
        network = lora.create_network(1.0, 4, 4, None, [], model)
        network.save_format = "diffusers"
        for k, parameter in enumerate(network.parameters()):
            parameter.data = (
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k + 99 * number)) * 0.1
            )
        path = tmp_path / f"{name}.safetensors"
        network.save_weights(path, torch.float32, {})
        network.apply_to([], model, False, True)
        with torch.no_grad():
            theirs[name] = FAMILY.predict(model, noisy, sigma, conds)
        network.remove()
        pipeline.load_lora_weights(path, load_into_transformer_2=name == "transformer_2")
    with torch.no_grad():
        assert all(relative(FAMILY.predict(models[name], noisy, sigma, conds), theirs[name]) < 1e-5 for name in models)


def test_the_inference_script_takes_both(toy, tmp_path):
    main("wan", [*words_of(toy, LOW["t2v"]), *both(toy), "--prompt", "a cat", "--video_size", "64", "64", "--video_length",
                 "5", "--infer_steps", "2", "--fp8_scaled", "--save_path", str(tmp_path / "x.mp4")])  # fmt: skip
    assert (tmp_path / "x.mp4").stat().st_size > 100


@pytest.mark.parametrize("scheme", [None, "fp8_scaled"])
def test_a_device_with_memory_of_its_own_gets_copies(toy, scheme):
    """As on a GPU, whose memory the sets are copied into: both stay what they were."""
    from library.memory.loading import Loading
    from library.memory.precision import Recipe

    def loaded(model):
        recipe = Recipe(scheme, "e4m3", FAMILY.blocks, ()) if scheme else None
        path, loading = file_of(toy, model), Loading(recipe, "cpu", torch.float32)
        part = checkpoints.load_part(FAMILY.denoiser, path, dtype=torch.float32, loading=loading)
        return part.requires_grad_(False).eval()

    noisy, conds, sigma = torch.randn(1, 16, 2, 8, 8), [{"text": torch.randn(7, 4096)}], torch.tensor([0.5])
    with torch.no_grad():
        alone = [FAMILY.predict(loaded(model["t2v"]), noisy, sigma, conds) for model in (LOW, HIGH)]
        model = loaded(LOW["t2v"])
        experts = Experts(model, loaded(HIGH["t2v"]), Pair(FAMILY.denoiser, 0.875))
        experts.place(torch.device("cpu"), None, copies=True)
        for index in (0, 1, 1, 0, 1, 0):
            experts.use(index)
            # not to the bit: some CPUs add in an order that depends on where in memory a weight begins
            assert relative(FAMILY.predict(model, noisy, sigma, conds), alone[index]) < 1e-5
    assert relative(alone[0], alone[1]) > 0.1


def test_samples_that_swap_fewer_blocks_change_the_expert_too(toy):
    from library.memory.swap import BlockSwap

    noisy, conds, sigma = torch.randn(1, 16, 2, 8, 8), [{"text": torch.randn(7, 4096)}], torch.tensor([0.5])
    with torch.no_grad():
        alone = [FAMILY.predict(expert(toy, model["t2v"]), noisy, sigma, conds) for model in (LOW, HIGH)]
        model = expert(toy, LOW["t2v"])
        experts = Experts(model, expert(toy, HIGH["t2v"]), Pair(FAMILY.denoiser, 0.875))
        swap = BlockSwap(list(model.blocks), "cpu")
        experts.place(torch.device("cpu"), swap)
        with swap.only([model.blocks[1]]):
            for index in (0, 1, 0, 1):
                experts.use(index)
                assert torch.equal(FAMILY.predict(model, noisy, sigma, conds), alone[index])
        for index in (1, 0):
            experts.use(index)
            assert torch.equal(FAMILY.predict(model, noisy, sigma, conds), alone[index])


# ---------------------------------------------------------------- turns


def test_the_noise_levels_of_a_run_are_distributed_as_with_one_denoiser(toy, clips, tmp_path):
    trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path, *both(toy), "--discrete_flow_shift", "6")
    family, options = trainer.family, trainer.options
    turns, count = Turns(family, options, 16), 2000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1))
    whole = family.objective.sigma(uniform, 16, options)
    taken = [turns.of(step) for step in range(count)]
    assert abs(sum(taken) / count - float((whole >= 0.875).float().mean())) < 0.03
    parts = [family.objective.sigma(uniform, 16, turns.options[k]) for k in (0, 1)]
    assert float(parts[0].max()) < 0.875 <= float(parts[1].min())
    joined = torch.tensor([float(parts[turn][k]) for k, turn in enumerate(taken)])
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert abs(float(joined.quantile(share)) - float(whole.quantile(share))) < 0.03


def test_an_expert_keeps_its_turn_for_some_steps(toy, clips, tmp_path):
    trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path, *both(toy), "--switch_experts_every", "5")
    taken = [Turns(trainer.family, trainer.options, 16).of(step) for step in range(100)]
    assert all(len(set(taken[k : k + 5])) == 1 for k in range(0, 100, 5)) and len(set(taken)) == 2


def test_a_step_is_that_of_a_run_with_this_expert_alone(toy, clips, tmp_path):
    """The first step: same files, same noise, --min_timestep or --max_timestep at the boundary."""
    seen = set()
    for seed in (0, 5):
        words = ("--max_train_steps", "1", "--seed", str(seed), "--optimizer_type", "torch.optim.SGD")
        trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path / f"both{seed}", *words, *both(toy))
        trainer.run()
        turn = trainer.turns.of(0)
        seen.add(turn)
        model, limit = (HIGH, "--min_timestep") if turn else (LOW, "--max_timestep")
        trainer_of(toy, model["t2v"], clips, tmp_path / f"one{seed}", *words, limit, "875").run()
        ours, theirs = losses(tmp_path / f"both{seed}"), losses(tmp_path / f"one{seed}")
        assert ours == pytest.approx(theirs, rel=1e-4)
        mine, alone = (load_file(tmp_path / f"{name}{seed}" / "run.safetensors") for name in ("both", "one"))
        assert all(relative(mine[key], alone[key]) < 1e-3 for key in alone)
    assert seen == {0, 1}


# ---------------------------------------------------------------- one LoRA or two


def moved(path):
    return sum(float(v.abs().sum()) for k, v in load_file(path).items() if "lora_B" in k or "lora_up" in k)


def test_two_loras_have_names_and_each_is_trained_in_its_turns_only(toy, clips, photo, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --l 1 --f 5 --fs 3\n", encoding="utf-8")
    words = (*both(toy), "--network_per_expert", *CACHED, "--save_every_n_steps", "1", "--save_last_n_steps", "1",
             "--sample_prompts", str(prompts), "--sample_every_n_steps", "2")  # fmt: skip
    trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path, *words, "--max_train_steps", "4")
    trainer.run()
    taken = [trainer.turns.of(step) for step in range(4)]
    assert taken == [0, 1, 0, 1]
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {f"run-{n}_noise{end}.safetensors" for n in ("low", "high") for end in ("-step00000003", "")}
    once = trainer_of(toy, LOW["t2v"], clips, tmp_path / "short", *words[:-4], "--max_train_steps", "1")
    once.run()
    for index, name in enumerate(("low_noise", "high_noise")):
        path = tmp_path / f"run-{name}.safetensors"
        stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in load_file(path)}
        assert stems <= accepted_stems("wan22_a14b_t2v") and moved(path) > 0
        header = checkpoints.Checkpoint.open(path).metadata
        assert header["modelspec.timestep_range"] == ("0,875", "875,1000")[index]
        assert (moved(tmp_path / "short" / path.name) > 0) == (index == taken[0])
    assert {p.suffix for p in (tmp_path / "sample").iterdir()} == {".mp4", ".png"}


def test_a_resumed_run_is_the_run_that_never_stopped(toy, clips, tmp_path):
    words = (*both(toy), "--network_per_expert", *CACHED)
    trainer_of(toy, LOW["t2v"], clips, tmp_path / "whole", *words, "--max_train_steps", "4").run()
    trainer_of(toy, LOW["t2v"], clips, tmp_path / "parts", *words, "--save_state_on_train_end").run()
    state = next((tmp_path / "parts").glob("*-state"))
    trainer_of(
        toy, LOW["t2v"], clips, tmp_path / "parts", *words, "--max_train_steps", "4", "--resume", str(state)
    ).run()
    for path in (tmp_path / "whole").glob("*.safetensors"):
        theirs = load_file(tmp_path / "parts" / path.name)
        assert all(torch.equal(value, theirs[key]) for key, value in load_file(path).items())


def test_memory_options_change_no_loss(toy, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("library.memory.swap_plan.STAY", 0)
    for folder, more in (("plain", ()), ("less", ("--blocks_to_swap", "1", "--gradient_checkpointing"))):
        trainer = trainer_of(
            toy, LOW["t2v"], clips, tmp_path / folder, *both(toy), *CACHED, *more, "--max_train_steps", "4"
        )
        trainer.run()
    assert set(map(trainer.turns.of, range(4))) == {0, 1}
    assert losses(tmp_path / "plain") == losses(tmp_path / "less")


def test_validation_changes_the_expert_once(toy, clips, tmp_path, monkeypatch):
    data, used = tmp_path / "v.toml", []
    text = clips.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 1\nvalidation_split = 0.5")
    data.write_text(text, encoding="utf-8")
    trainer = trainer_of(toy, LOW["t2v"], data, tmp_path, *both(toy), *CACHED, "--discrete_flow_shift", "6")
    trainer.run()
    trainer.outputs.validation.items *= 3
    monkeypatch.setattr(Experts, "switch_networks", lambda self: used.append(self.active))
    values = trainer.outputs.validation.run()
    assert (
        used[-1] == 1
        and len(used) <= 2
        and set(values) == {"sigma_q20", "sigma_q40", "sigma_q60", "sigma_q80", "average"}
    )
    assert values == trainer.outputs.validation.run() and used[-2:] == [0, 1]


def test_two_processes_give_the_same_expert_its_turn(toy, clips, tmp_path):
    """And leave the other one's LoRA, and what the optimizer knows of it, alone."""
    single = tmp_path / "single.toml"
    single.write_text(clips.read_text(encoding="utf-8").replace("batch_size = 2", "batch_size = 1"), encoding="utf-8")
    words = (
        *both(toy),
        "--network_per_expert",
        *CACHED,
        "--max_train_steps",
        "4",
        "--optimizer_args",
        "weight_decay=0.1",
    )
    trainer_of(toy, LOW["t2v"], clips, tmp_path / "one", *words).run()
    run_all(tmp_path / "logs", 2, lambda rank: trainer_of(toy, LOW["t2v"], single, tmp_path / "two", *words).run())
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    for name in ("low_noise", "high_noise"):
        one, two = (load_file(tmp_path / k / f"run-{name}.safetensors") for k in ("one", "two"))
        flat = [torch.cat([weights[key].flatten() for key in sorted(weights)]) for weights in (one, two)]
        assert relative(flat[1], flat[0]) < 1e-3


def test_two_loras_go_on_from_the_files_of_both(toy, clips, tmp_path):
    words = (*both(toy), "--network_per_expert", *CACHED)
    trainer_of(toy, LOW["t2v"], clips, tmp_path / "a", *words).run()
    given = str(tmp_path / "a" / "run-low_noise.safetensors")
    trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path / "b", *words, "--network_weights", given,
                         "--learning_rate", "0")  # fmt: skip
    with pytest.raises(ConfigError, match="learning rate above 0"):
        trainer.run()
    for name, one in trainer.network.networks.items():
        theirs = load_file(tmp_path / "a" / f"run-{name}.safetensors")
        adapter = next(iter(one.adapters.values()))
        key = next(key for key in theirs if adapter.name in key and key.endswith(("lora_B.weight", "lora_up.weight")))
        assert torch.equal(adapter.lora_up.weight.detach().cpu(), theirs[key].float())


def test_the_memory_plan_counts_both_experts_on_the_host_and_one_on_the_device(toy, clips, tmp_path):
    from library.memory import planner

    plans = []
    for more in ((), both(toy)):
        trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path, *CACHED, *more)
        plans.append(planner.make(trainer.options, trainer.family, planner.Work(64, 64, 1, 9)))
    one, two = plans
    weights = one["device"]["phases"]["training"]["weights_bytes"]
    assert two["device"]["peak_bytes"] == one["device"]["peak_bytes"]
    assert two["host"]["peak_bytes"] - one["host"]["peak_bytes"] == two["host"]["experts"] == 2 * weights


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("low", "high", "extra", "said"),
    [
        ("2.2 t2v", "2.2 t2v low", [], "the other way round"),
        ("2.2 t2v low", "2.2 i2v high", [], "is another model"),
        ("5B", "2.2 t2v", [], "Wan 2.2 5B, which has one denoiser"),
        ("2.1 i2v", "2.2 t2v", [], "--model_version 2.2"),
        ("2.2 t2v low", None, ["--network_per_expert"], "no effect with one expert"),
        ("2.2 t2v low", None, ["--timestep_boundary", "800"], "no effect with one expert"),
        ("2.2 t2v low", "2.2 t2v", ["--base_weights", "x"], "does not go with --base_weights"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_two_experts_is_one_sentence(toy, clips, tmp_path, low, high, extra, said):
    second = ["--dit_high_noise", file_of(toy, high)] if high else []
    with pytest.raises(ConfigError) as caught:
        trainer_of(toy, low, clips, tmp_path, *second, *extra)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_fine_tune_of_both_is_refused(toy, clips, tmp_path):
    from library import options
    from train_network import NetworkTrainer

    words = [w.replace("--dit", "--pretrained_model_name_or_path") for w in words_of(toy, LOW["t2v"])[:-2]]
    words += [*both(toy), "--dataset_config", str(clips), "--output_dir", str(tmp_path)]
    with pytest.raises(ConfigError, match="as LoRAs only"):
        NetworkTrainer(options.parse("wan", words, "test"))


def test_files_that_hold_their_weights_differently_are_refused(toy, clips, tmp_path):
    """One fp8 file, one that is not, kept in fp8: their scales have other shapes."""
    part = checkpoints.Checkpoint.open(file_of(toy, HIGH["t2v"]))
    with part.reader() as reader:
        tensors = {key: reader.tensor(key).clone() for key in part.files}
    for key, value in list(tensors.items()):
        if value.ndim == 2 and key.endswith(".weight") and "blocks." in key:
            tensors[key] = value.to(torch.float8_e4m3fn)
    path = tmp_path / "fp8_high_noise.safetensors"
    save_file(tensors, path, part.metadata)
    trainer = trainer_of(toy, LOW["t2v"], clips, tmp_path, "--dit_high_noise", str(path), "--fp8_scaled")
    with pytest.raises(ConfigError, match="both fp8 or neither"):
        trainer.run()


def test_the_plan_names_both_and_a_strange_boundary(toy, clips, tmp_path):
    plan = trainer_of(toy, LOW["t2v"], clips, tmp_path, *both(toy), "--network_per_expert").plan
    assert "run-low_noise.safetensors and run-high_noise.safetensors" in plan.text and not plan.warnings
    assert "both experts" in plan.text and "high noise" in plan.text
    plan = trainer_of(toy, LOW["t2v"], clips, tmp_path, *both(toy), "--timestep_boundary", "0.5").plan
    assert ["boundary 500 is not" in note for note in plan.warnings] == [True] and plan.family.pair.boundary == 0.5
    plan = trainer_of(toy, LOW["t2v"], clips, tmp_path, *both(toy), "--max_timestep", "800").plan
    assert ["all of one expert" in note for note in plan.warnings] == [True]
    assert json.dumps(plan.origin.options, default=str) and "dit_high_noise" in plan.origin.inputs
