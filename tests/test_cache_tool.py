"""tools/cache.py: what a run finds, lacks and leaves, why, and what is damaged; held against what the run then does."""

import json
import os
import subprocess
import sys
import time

import pytest
from training_support import ROOT, arguments, pictures, toy, train  # noqa: F401

from library.data import cache_report
from library.errors import ConfigError, DiskError
from tools import cache

DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1")


@pytest.fixture
def run(toy, pictures, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A run with five pictures of its own whose cache is filled; returns (folder, how to call the tool on it)."""
    folder = tmp_path / "own"
    folder.mkdir()
    for path in (pictures.parent / pictures.stem).iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    data = tmp_path / "own.toml"
    data.write_text(pictures.read_text().replace(str(pictures.parent / pictures.stem), str(folder)))
    words = arguments(toy, data, tmp_path / "out", *DISK)

    def again(*extra):
        capsys.readouterr()
        train(toy, data, tmp_path / "out", *DISK, *extra)
        return capsys.readouterr().out

    def tool(command, *extra, alone=False):
        given = ["--cache_dir", str(folder / ".lorasmith")] if alone else words[: len(words) - 2]
        model = [] if alone else ["--model_type", "z_image"]
        monkeypatch.setattr(sys, "argv", ["cache.py", command, *extra, *given, *model])
        capsys.readouterr()
        cache.main()
        return capsys.readouterr().out

    again()
    return folder, tool, again


def status_of(tool):
    return json.loads(tool("status", "--json"))


def test_a_filled_cache_is_valid_and_the_run_encodes_nothing(run):
    folder, tool, again = run
    found = status_of(tool)
    assert (found["latents"]["valid"], found["text"]["valid"]) == (5, 6) and not found["damaged"]
    assert not found["latents"]["to_make"] and not found["text"]["to_make"]
    assert found["latents"]["models"] == {"z_image": 5}
    text = tool("status", alone=True)
    assert "latents: 5 entries" in text and "(5 for z_image)" in text and "text: 6 entries" in text
    assert "latents: 5 of 5 were cached" in again()


def test_each_reason_is_named_with_its_files_and_the_run_makes_just_these(run):
    folder, tool, again = run
    (folder / "1.txt").write_text("another caption", encoding="utf-8")
    (folder / "2.png").write_bytes((folder / "3.png").read_bytes() + b"\0")  # other bytes, the same picture
    (folder / "9.png").write_bytes((folder / "4.png").read_bytes()[:-1] + b"\x83")
    (folder / "9.txt").write_text("a picture of thing 9", encoding="utf-8")
    found = status_of(tool)
    assert {why: [os.path.basename(f) for f in files] for why, files in found["latents"]["to_make"].items()} == {
        "the picture was changed": ["2.png"], "a new picture": ["9.png"],
    }  # fmt: skip
    assert {why: [os.path.basename(f) for f in files] for why, files in found["text"]["to_make"].items()} == {
        "a new or edited caption": ["1.png", "9.png"]
    }
    assert found["latents"]["not_read"] == found["text"]["not_read"] == 1
    assert "to make 1: the picture was changed (2.png)" in tool("status")
    out = again()
    assert (
        "latents: 4 of 6 were cached; 1 to make: the picture was changed (2.png); 1 to make: a new picture (9.png); "
        "1 that this run does not read\n"
    ) in out
    edited = "2 to make: a new or edited caption (1.png, 9.png); 1 that this run does not read\n"
    assert f"7 captions and prompts, 5 were cached; {edited}" in out
    assert out.index(edited) < out.index("training 185,344")


@pytest.mark.parametrize(
    ("option", "kind", "why"),
    [
        ("--vae", "latents", "another VAE or text encoder"),
        ("--text_encoder", "text", "another VAE or text encoder"),
        ("--resolution", "latents", "another size, crop, resize or control picture"),
    ],
)
def test_other_models_and_sizes(run, toy, tmp_path, option, kind, why):  # noqa: F811
    folder, tool, _ = run
    name = option.removeprefix("--")
    if name == "resolution":
        data = tmp_path / "own.toml"
        data.write_text(data.read_text().replace("resolution = 64", "resolution = 128"))
        found = json.loads(tool("status", "--json"))
    else:
        from safetensors.torch import load_file, save_file

        weights = load_file(toy.with_name(f"{name}.safetensors"))
        first = next(iter(weights))
        weights[first] = weights[first] + 1
        metadata = cache_report.read_header(toy.with_name(f"{name}.safetensors")).metadata
        save_file(weights, tmp_path / "other.safetensors", metadata=dict(metadata))
        found = json.loads(tool("status", "--json", option, str(tmp_path / "other.safetensors")))
    assert list(found[kind]["to_make"]) == [why] and found[kind]["valid"] == 0


def damage(folder):
    """One flipped byte, one file cut off, one under another's name; returns their paths."""
    latents, text = (sorted((folder / ".lorasmith" / kind).glob("??/*.safetensors")) for kind in ("latents", "text"))
    data = bytearray(latents[0].read_bytes())
    data[-3] ^= 1
    latents[0].write_bytes(data)
    latents[1].write_bytes(latents[1].read_bytes()[:-5])
    text[0].write_bytes(text[1].read_bytes())
    return latents[0], latents[1], text[0]


def test_damage_is_found_by_name_and_removed_when_asked(run):
    folder, tool, again = run
    broken = damage(folder)
    with pytest.raises(DiskError, match="3 of 11 entries are damaged"):
        tool("verify", alone=True)
    headers = json.loads(tool("status", "--json", alone=True))["damaged"]
    assert set(headers) == {str(path) for path in broken[1:]}  # a flipped byte shows when all is read
    text = tool("verify", "--remove", alone=True)
    assert all(str(path) in text for path in broken) and not any(path.exists() for path in broken)
    assert "8 entries read, 0 damaged" in tool("verify", alone=True)
    first = next((folder / ".lorasmith" / "latents").rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-3] + b"abc")
    out = again()
    assert (
        "latents: 2 of 5 were cached; " in out
        and "; 1 to make: damaged (" in out
        and "11 entries read, 0 damaged" in tool("verify", alone=True)
    )


def test_prune_shows_first_and_deletes_only_what_no_named_run_reads(run, tmp_path):
    folder, tool, _ = run
    (folder / "1.txt").write_text("another caption", encoding="utf-8")
    broken = damage(folder)
    partials = [folder / ".lorasmith" / "text" / "00" / f".{k}.partial" for k in "ab"]
    partials[0].parent.mkdir(exist_ok=True)
    for path, age in zip(partials, (cache_report.OLD + 10, 0), strict=True):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    before = set((folder / ".lorasmith").rglob("*.*"))
    assert "would delete" in tool("prune") and before == set((folder / ".lorasmith").rglob("*.*"))
    text = tool("prune", "--yes")
    assert "2 damaged and 1 unfinished files" in text  # by their headers; the flipped byte is verify's
    gone = before - set((folder / ".lorasmith").rglob("*.*"))
    assert {broken[1], broken[2], partials[0]} <= gone
    assert all(
        cache_report.look(path, path.parent.parent.name).problem == ""
        for path in before - gone
        if path.suffix == ".safetensors"
    )
    found = status_of(tool)
    assert found["text"]["not_read"] == 0 and found["latents"]["valid"] == 4


def test_a_run_that_is_named_keeps_its_entries(run, toy, tmp_path):  # noqa: F811
    folder, tool, _ = run
    old = tmp_path / "old.toml"
    data = tmp_path / "old_data.toml"
    data.write_text((tmp_path / "own.toml").read_text())
    base = {line.split(" = ")[0]: line.split(" = ")[1] for line in toy.read_text().splitlines()}
    parts = {name: json.dumps(str(toy.parent / json.loads(base[name]))) for name in ("pretrained_model_name_or_path", "vae", "text_encoder", "tokenizer")}  # fmt: skip
    more = {"dataset_config": json.dumps(str(data)), "cache_latents_to_disk": "true", "model_type": '"z_image"'}
    old.write_text("\n".join(f"{name} = {value}" for name, value in {**parts, **more}.items()))
    (tmp_path / "own.toml").write_text(data.read_text().replace("resolution = 64", "resolution = 128"))
    assert "0 entries that no named run reads" in tool("prune", "--also", str(old))
    assert "5 entries that no named run reads" in tool("prune")


def test_explain_says_what_an_entry_is_made_from_and_why_one_is_lacking(run, toy):  # noqa: F811
    folder, tool, _ = run
    entry = next((folder / ".lorasmith" / "latents").glob("??/*.safetensors"))
    text = tool("explain", str(entry), alone=True)
    assert "model: z_image" in text and str(toy.with_name("vae.safetensors")) in text and str(folder) in text
    assert "latents: F16 [16, 8, 8]" in text and "bucket (64, 64)" in text
    text = tool("explain", str(folder / "3.txt"))
    assert "caption: 'a picture of thing 3'" in text and str(folder / "3.png") in text
    (folder / "3.txt").write_text("else", encoding="utf-8")
    assert "text: has to be made: a new or edited caption" in tool("explain", str(folder / "3.png"))
    with pytest.raises(ConfigError, match="not in the dataset"):
        tool("explain", str(folder.parent / "own.toml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status"], "say which cache"),
        (["status", "--cache_dir", "nowhere"], "nowhere: no such cache folder"),
        (["status", "--resolution", "64"], "the options of a run need one of --config_file"),
        (["explain"], "explain needs a file"),
        (["verify", "x"], "only explain takes one"),
    ],
)
def test_mistakes_are_one_sentence(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cache.py", *words])
    with pytest.raises(ConfigError, match=message):
        cache.main()


def test_an_inventory_needs_no_torch(run):
    folder, _, _ = run
    code = (
        "import sys, runpy; sys.argv = ['tools/cache.py', 'verify', '--cache_dir', sys.argv[1]]\n"
        "runpy.run_path('tools/cache.py', run_name='__main__')\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / ".lorasmith")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "11 entries read, 0 damaged" in done.stdout, done.stderr
