"""Hostile inputs to every reader: no traceback, no hang, no unbounded memory. Few by default, 10,000 each with -m slow."""

import io
import json
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_support import mutated, survives
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from test_data import options

from library import checkpoints, fingerprints, headers, prompts, torch_files
from library import options as option_machinery
from library.data import cache, cache_report, decoded, images, scan
from library.data.captions import make_caption
from library.data.config import SubsetSpec, load_dataset_config
from library.data.dataset import prepare
from library.errors import ConfigError, DatasetError
from library.option_kinds import literal

COUNTS = [pytest.param(200, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]


@pytest.fixture(params=COUNTS)
def fuzz(request, tmp_path, monkeypatch, record_property):
    """`fuzz(reader)`: the reader, called with a random generator in an empty folder; a slow one with a tenth of them."""
    monkeypatch.chdir(tmp_path)

    def run(reader, slow=False, **more):
        count = request.param // 10 if slow else request.param
        facts = survives(reader, count, **more)
        print(f"{request.node.name}: {json.dumps(facts)}")
        assert facts["inputs"] == count
        return facts

    return run


# ---------------------------------------------------------------- safetensors


def header(rng: random.Random) -> bytes:
    """A safetensors file that is whole, or wrong in one or two places that a mutation of bytes seldom finds."""
    table, start = {}, 0
    for k in range(rng.randint(0, 4)):
        shape = [rng.choice((0, 1, 2, 3, 7)) for _ in range(rng.randint(0, 3))]
        dtype = rng.choice(("F32", "BF16", "F16", "I64", "U8", "BOOL", "F8_E4M3"))
        size = int(np.prod(shape)) * headers.BITS[dtype] // 8
        name = rng.choice(("a", "layers.0.attention.qkv.weight", "model.diffusion_model.x", "é", "", "../x")) + str(k)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    if rng.random() < 0.5:
        table["__metadata__"] = rng.choice(({}, {"a": "b"}, {"a": 1}, [], None, "x", {"a": None}))
    for _ in range(rng.randint(0, 2)):
        if not table:
            break
        name = rng.choice(list(table))
        odd = (-1, 2**63, 1e9, 1.5, True, None, "1", [], {}, [1, 2, 3], [2**40, 2**41], "F99", "F64", [[1]], [0, 0])
        if isinstance(table[name], dict) and table[name] and rng.random() < 0.9:
            table[name][rng.choice([*table[name], "more"])] = rng.choice(odd)
        else:
            table[name] = rng.choice(odd)
    raw = json.dumps(table).encode()
    raw += b" " * rng.choice((0, 0, 3))
    length = len(raw) if rng.random() < 0.9 else rng.choice((0, 1, len(raw) + 1, 2**31, 2**63, 2**64 - 1))
    body = rng.randbytes(max(0, start + rng.choice((0, 0, 0, 0, -1, 1, 7))))
    return struct.pack("<Q", length) + raw + body


def test_safetensors_files(fuzz):
    whole = save({"x.weight": torch.ones(4, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"about": "it"})

    def reader(rng):
        data = header(rng) if rng.random() < 0.5 else mutated(whole, rng)
        Path("x.safetensors").write_bytes(data)
        try:
            found = headers.read_header("x.safetensors")
        except ConfigError:
            return "refused"
        assert all(len(data) >= found.data_start + info.end for info in found.tensors.values())
        checkpoints.Checkpoint.open("x.safetensors").shapes  # noqa: B018
        fingerprints.identify_path("x.safetensors")
        try:
            with safe_open("x.safetensors", "pt") as file:  # what we take, the library that reads the weights takes
                assert set(file.keys()) == set(found.tensors)
        except SafetensorError as error:
            raise AssertionError(f"{error}: {data[:400]!r}") from None
        return "taken"

    assert len(fuzz(reader)["answers"]) == 2


def test_cache_entries(fuzz):
    folder = Path("cache")
    store = cache.Store(folder)
    store.put("latents 1 x vae y picture z flip False p", {"latents": torch.ones(4, 2, 2, dtype=torch.float16)})
    path = store.path("latents 1 x vae y picture z flip False p")
    whole = path.read_bytes()

    def reader(rng):
        data = mutated(whole, rng)
        path.write_bytes(data)
        found = store.get("latents 1 x vae y picture z flip False p")
        cache_report.look(path, "latents")
        assert found is None or (data == whole or torch.equal(found["latents"], torch.ones(4, 2, 2).half()))
        return "taken" if found else "refused"

    fuzz(reader)


def reshaped(shapes: dict, rng: random.Random) -> dict:
    """Names and shapes of a model with some lost, renamed or of another size."""
    out = dict(shapes)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        key = rng.choice(list(out))
        shape, kind = out[key], rng.randrange(4)
        if kind == 0:
            del out[key]
        elif kind == 1 and shape:
            at = rng.randrange(len(shape))
            size = rng.choice((0, 1, 3, 2**20, shape[at] * 2, shape[at] + 1))
            out[key] = (*shape[:at], size, *shape[at + 1 :])
        elif kind == 2:
            out[key] = rng.choice(((), (1,), (*shape, 1), shape[1:], shape[::-1]))
        else:
            parts = key.split(".")
            parts[rng.randrange(len(parts))] = rng.choice(("0", "-1", "999999999999", "x", "", "é", "weight"))
            out[".".join(parts)] = out.pop(key)
        if not out:
            break
    return out


def test_headers_of_every_model(fuzz, tmp_path):
    """Names and shapes that are almost those of a released model, for the parts of every family."""
    from library.families import FAMILIES, get_family
    from library.memory import released, sketch

    parts = []
    for family in map(get_family, FAMILIES):
        parts += [(part, family.released[part.name]) for part in family.parts if part.name in family.released]
    whole = {name: sketch.of_file(part, released.write(name, tmp_path))[0] for part, name in parts}
    stated = ("", "null", "[]", "{}", "-1", "0", "1e30", '"x"', "[" * 5000, "NaN", "2")

    def reader(rng):
        part, name = rng.choice(parts)
        shapes = reshaped(whole[name].shapes, rng)
        layout = part.layout_in(shapes)
        if layout is None:
            return "not recognised"
        names = [
            word for word in ("hidden_size", "num_attention_heads", "rope_theta", "head_dim") if rng.random() < 0.2
        ]
        metadata = {word: rng.choice(stated) for word in names}
        checkpoints.configuration(part, "x", shapes, metadata, layout)
        return "taken"

    fuzz(reader)


def test_weights_of_a_model(fuzz):
    from library.families import get_family

    part = get_family("z_image").denoiser
    golden = headers.read_header(Path(__file__).parent / "data" / "golden" / "z_image.safetensors")
    whole = {key.removeprefix("ckpt."): one.shape for key, one in golden.tensors.items() if key.startswith("ckpt.")}
    stated = ("", "null", "[]", "-1", "0", "1e30", '"x"', "[" * 5000, "2", "3")

    def reader(rng, shapes=None):
        table, start = {}, 0
        for key, shape in (shapes or reshaped(whole, rng)).items():
            end = start + 4 * int(np.prod(shape))
            table[key], start = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}, end
        if shapes is None and rng.random() < 0.5:
            table["__metadata__"] = {rng.choice(("n_heads", "num_attention_heads", "axes_dims")): rng.choice(stated)}
        raw = json.dumps(table).encode()
        Path("m.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate("m.safetensors", 8 + len(raw) + start)  # zeros that take no space
        checkpoints.load_part(part, "m.safetensors", dtype=torch.float32)
        return "taken"

    reader(random, whole)  # what it imports takes seconds
    assert {"ConfigError", "taken"} <= set(fuzz(reader, slow=True)["answers"])


def test_lora_files(fuzz, tmp_path):
    from networks_support import tiny

    from networks import lora

    model = tiny()
    network = lora.create_network(1.0, 2, 1.0, None, [], model)
    network.apply_to([], model, False, True)
    network.save_weights(str(tmp_path / "l.safetensors"), torch.float32, {"ss_network_args": "{}"})
    with safe_open(tmp_path / "l.safetensors", "pt") as file:
        whole = {key: tuple(file.get_tensor(key).shape) for key in file.keys()}

    def reader(rng):
        tensors = {
            k: torch.ones(s) * rng.choice((1.0,) * 40 + (0.0, float("nan"))) for k, s in reshaped(whole, rng).items()
        }
        args = rng.choice(("{}", "[]", "", "[" * 5000, '{"split_qkv": []}', '{"split_qkv": "True"}', "null", "1"))
        Path("l.safetensors").write_bytes(save(tensors, {"ss_network_args": args}))
        made, _ = lora.create_network_from_weights(1.0, "l.safetensors", None, [], tiny())
        made.load_weights("l.safetensors")
        return "taken"

    fuzz(reader)


class Bomb:
    """Unpickled by a trusting reader it would leave a file behind."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_torch_files(fuzz):
    buffers = [io.BytesIO() for _ in range(3)]
    torch.save({"model": {"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}}, buffers[0])
    torch.save({"a": torch.ones(3), "evil": Bomb()}, buffers[1])
    torch.save([torch.ones(3)], buffers[2])

    def reader(rng):
        which = rng.randrange(3)
        data = buffers[which].getvalue()
        Path("x.pt").write_bytes(data if rng.random() < 0.05 else mutated(data, rng))
        try:
            found = torch_files.tensors_of(Path("x.pt"))
        finally:
            assert not Path("pwned").exists()
        sum(float(t.float().sum()) for t in found.values())
        return "taken"

    fuzz(reader)


def test_a_compressed_torch_file_is_refused_before_it_grows(tmp_path):
    import zipfile

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(8 * 1024**2)}, buffer)  # 32 MB of zeros
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    assert (tmp_path / "b.pt").stat().st_size < 1024**2
    with pytest.raises(ConfigError, match="compressed"):
        torch_files.tensors_of(tmp_path / "b.pt")


def test_a_tokenizer_folder_with_code_of_its_own_runs_none_of_it(tmp_path):
    from library.components.tokenizers import load_tokenizer

    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "pwned").exists()


def test_nothing_in_the_code_starts_a_shell_or_trusts_a_pickle():
    """Calls that would make text or a file from outside run."""
    import ast

    from test_house import CODE

    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
            where = f"{path.name}:{node.lineno} {name}"
            assert name not in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads"), where
            assert given.get("shell") in (None, "False") and given.get("allow_pickle") in (None, "False"), where
            assert given.get("trust_remote_code") in (None, "False"), where
            assert name != "torch.load" or given.get("weights_only") == "True", where
            assert not name.endswith("extractall"), where


# ---------------------------------------------------------------- TOML and JSON

RUN = b"""# a run
model_type = "z_image"
pretrained_model_name_or_path = "m.safetensors"
output_dir = 'out'
[training]
learning_rate = 1e-4
network_args = ["conv_dim=4", "exclude_patterns=['a.*']"]
max_train_steps = 100
optimizer_args = ["betas=(0.9, 0.99)"]
resolution = "512,512"
"""
DATA = """[general]
caption_extension = ".txt"
shuffle_caption = true
[[datasets]]
resolution = [64, 64]
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 16
validation_split = 0.1
  [[datasets.subsets]]
  image_dir = "p"
  num_repeats = 2
  caption_prefix = "a"
  [[datasets.subsets]]
  metadata_file = "m.jsonl"
  target_frames = [1, 25]
"""
WORDS = (
    "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "\n", '"', '"""', "'", "#", "\\", "\\u0000", "true", "-1", "0", "1e999",
    "nan", "inf", "9" * 30, "1979-05-27", "0x1F", "\x00", "\ufeff", "é", "datasets", "subsets", "general", "resolution",
    "image_dir", "batch_size", "num_repeats", "keep_tokens", "caption_separator", "learning_rate", "[" * 3000, "{a=" * 3000, '{"a":' * 3000,
)  # fmt: skip


def reworded(text: str, rng: random.Random) -> bytes:
    """A text with words and values exchanged, added and lost."""
    words = text.split(" ")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(words) + 1)
        words[at : at + rng.randint(0, 2)] = [rng.choice(WORDS) for _ in range(rng.randint(0, 2))]
    return " ".join(words).encode("utf-8", "replace")


ODD = ("1", "-1", "0", "1.5", "-0.0", "true", "''", "'x'", "[]", "{}", "[1, 2]", "[[1, 2], ['a', 3]]", "[[]]", "{a = 1}", "1e999",
       "nan", "9999999999999999999999", "1979-05-27", "[{}]", "[1.5, 'a']", "'1,2'", "'../..'", "'/dev/zero'", "[0]")  # fmt: skip


def revalued(text: str, rng: random.Random) -> bytes:
    """A text whose keys have one or two values of other kinds."""
    lines = text.splitlines()
    keys = [n for n, line in enumerate(lines) if "=" in line]
    for n in rng.sample(keys, rng.choice((1, 1, 2))):
        lines[n] = f"{lines[n].split('=')[0]}= {rng.choice(ODD)}"
    return "\n".join(lines).encode()


def hostile(text: str, rng: random.Random) -> bytes:
    return rng.choice((revalued, reworded, lambda text, rng: mutated(text.encode(), rng)))(text, rng)


PIPE = """output_dir = 'out'
dataset = 'data.toml'
epochs = 10
micro_batch_size_per_gpu = 1
gradient_accumulation_steps = 4
save_every_n_epochs = 2
activation_checkpointing = true
eval_datasets = []
[model]
type = 'flux'
diffusers_path = 'F'
dtype = 'bfloat16'
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
"""
PIPE_DATA = """resolutions = [64]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 33]
[[directory]]
path = 'p'
num_repeats = 2
"""


def test_configuration_files(fuzz):
    def reader(rng):
        Path("c.toml").write_bytes(hostile(rng.choice((RUN.decode(), PIPE)), rng))
        made = option_machinery.parse(None, ["--config_file", "c.toml"], "fuzz")
        made.to_toml()
        return "taken"

    assert fuzz(reader)["answers"].get("ConfigError")


def folder_of_pictures(place: Path) -> Path:
    place.mkdir()
    for k in range(3):
        Image.fromarray(np.full((64, 64 + 16 * k, 3), 50 * k, np.uint8)).save(place / f"{k}.png")
        (place / f"{k}.txt").write_text(f"caption {k}")
    return place


def test_dataset_descriptions(fuzz):
    folder_of_pictures(Path("p"))
    Path("m.jsonl").write_text('{"image_path": "p/0.png", "caption": "x"}\n')
    table = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "p", "caption_extension": ".txt"}]}]}

    def reader(rng):
        as_json = rng.random() < 0.3
        name = "d.json" if as_json else "d.toml"
        text = json.dumps(table) if as_json else rng.choice((DATA, PIPE_DATA))
        Path(name).write_bytes(mutated(text.encode(), rng) if as_json else hostile(text, rng))
        given = options(dataset_config=name, masked_loss=True, cache_latents=rng.random() < 0.5)
        load_dataset_config(given)
        prepare(given, None, 8).batches(0)
        return "taken"

    assert {"ConfigError", "taken"} <= set(fuzz(reader)["answers"])


def test_metadata_files(fuzz):
    folder_of_pictures(Path("p"))
    Path("d.toml").write_text("[[datasets]]\nresolution=64\n[[datasets.subsets]]\nmetadata_file='m.json'\n")
    Path("e.toml").write_text("[[datasets]]\nresolution=64\n[[datasets.subsets]]\nmetadata_file='m.jsonl'\n")
    lines = [
        {"image_path": f"p/{k}.png", "caption": f"x {k}", "tags": "a, b", "image_size": [64, 64]} for k in range(3)
    ]
    lines[0]["control_path_0"] = "p/1.png"
    odd = (None, 1, -1.5, True, [], {}, "", "..", "/dev/zero", "/", "a" * 5000, "p", ["p/0.png"], "\x00", "p/\udce9")

    def reader(rng):
        made = [dict(line) for line in lines]
        for _ in range(rng.randint(0, 2)):
            line = rng.choice(made)
            line[rng.choice([*line, "control_path", "video_path", "control_path_-1"])] = rng.choice(odd)
        as_table = rng.random() < 0.5
        if as_table:
            text = json.dumps({str(line.get("image_path")): line for line in made})
        else:
            text = "\n".join(map(json.dumps, made))
        data = text.encode("utf-8", "replace")
        Path("m.json" if as_table else "m.jsonl").write_bytes(mutated(data, rng) if rng.random() < 0.5 else data)
        prepare(options(dataset_config="d.toml" if as_table else "e.toml"), None, 8)
        return "taken"

    assert {"DatasetError", "taken"} <= set(fuzz(reader)["answers"])


PROMPT = "a red fox, {a|b} --w 1024 --h 768 --d -1 --s 20 --l 4.5 --n blurry --ci x.png\n# no\nanother --fs 3\n"


def test_prompt_files(fuzz):
    as_toml = '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a"\nseed = 3\nscale = 2.5\n'
    as_json = json.dumps([{"prompt": "a", "width": 64, "controls": ["x.png"]}, "b --w 3"])

    def reader(rng):
        name, text = rng.choice((("p.txt", PROMPT), ("p.toml", as_toml), ("p.json", as_json)))
        Path(name).write_bytes(hostile(text, rng) if name == "p.toml" else mutated(text.encode(), rng))
        prompts.parse_prompts(Path(name))
        return "taken"

    fuzz(reader)


def test_values_on_the_command_line(fuzz):
    names = [option.name for option in option_machinery.OPTIONS if option.name not in ("print_config", "config_file")]
    values = (*WORDS, "1,2", "(1,)", "{'a': 1}", "-", "a=b", "=", "a=" + "(" * 400, "1_0", "０", "∞", "x" * 3000, "5%")

    def reader(rng):
        words = ["--model_type", "z_image"]
        for _ in range(rng.randint(1, 3)):
            words += [f"--{rng.choice(names)}", *(rng.choice(values) for _ in range(rng.randint(0, 2)))]
        literal(rng.choice(values))
        made = option_machinery.parse(None, words, "fuzz")
        try:
            option_machinery.check_read(made)
        except ConfigError:
            return "read"
        return "taken"

    assert fuzz(reader)["answers"].get("ConfigError")


# ---------------------------------------------------------------- captions


def test_captions(fuzz):
    folder = folder_of_pictures(Path("p"))
    pieces = ("{a|b}", "{{x}}", "{", "}", "|", ",", ",,", "|||", "\n", "\r\n", " ", "tag", "é", "\x00", "\u2028", "👩‍👧", "{a|{b|c}}",
              "{" * 50, "x" * 500, "<script>", "$(touch pwned)", "`touch pwned`", "%s", "\\", "\ufeff")  # fmt: skip

    def reader(rng):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 30)))
        data = text.encode("utf-8", "surrogatepass")
        (folder / "0.txt").write_bytes(mutated(data + b" ", rng) if rng.random() < 0.4 else data)
        Path("d.toml").write_text(
            "[[datasets]]\nresolution=64\n[[datasets.subsets]]\nimage_dir='p'\ncaption_extension='.txt'\n"
        )
        raw = prepare(options(dataset_config="d.toml"), None, 8).items[0].caption
        subset = SubsetSpec(
            image_dir="p", shuffle_caption=rng.random() < 0.5, enable_wildcard=rng.random() < 0.5,
            keep_tokens=rng.randint(0, 3), keep_tokens_separator=rng.choice(("", "|||", ",")),
            caption_separator=rng.choice((",", ";", ", ")), secondary_separator=rng.choice((None, ";;;", "")),
            caption_tag_dropout_rate=rng.choice((0.0, 0.5)), token_warmup_step=rng.choice((0.0, 0.5, 3)),
            caption_prefix=rng.choice((None, "{p|q}")), caption_suffix=rng.choice((None, "s")),
        )  # fmt: skip
        made = make_caption(raw, subset, rng, rng.randint(0, 5), rng.randint(0, 3), 10)
        assert isinstance(made, str) and not Path("pwned").exists()
        return "taken"

    assert {"DatasetError", "taken"} <= set(fuzz(reader)["answers"])


# ---------------------------------------------------------------- pictures


def pictures() -> dict[str, bytes]:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = {}
    for name, picture, more in (
        ("png", rgb, {}), ("png", rgb.convert("RGBA"), {"exif": exif}), ("png", rgb.convert("P"), {"transparency": 3}),
        ("png", rgb.convert("L"), {}), ("png", Image.fromarray(np.full((9, 7), 40000, np.uint16)), {}),
        ("jpeg", rgb, {"exif": exif}), ("jpeg", rgb.convert("CMYK"), {}), ("jpeg", rgb, {"progressive": True}),
        ("webp", rgb, {"exif": exif}), ("webp", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("bmp", rgb, {}), ("gif", rgb.convert("P"), {"save_all": True, "append_images": [rgb.convert("P")]}),
        ("avif", rgb, {}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        if name.upper() not in Image.SAVE and (Image.init() or name.upper() not in Image.SAVE):
            continue  # a format that this PIL does not write
        picture.save(buffer, name.upper(), **more)
        out[f"{len(out)}.{name}"] = buffer.getvalue()
    return out


def test_pictures(fuzz):
    whole = pictures()
    assert len(whole) >= 11

    def reader(rng):
        name = rng.choice(list(whole))
        path = Path(rng.choice((name, "x.png", "x.jpg")))
        path.write_bytes(mutated(whole[name], rng))
        size, problem = scan.size_of(str(path))
        _, seen, _ = decoded.safe_look(str(path))
        assert bool(size) != bool(problem) and "\n" not in problem + seen.problem
        try:
            pixels = images.decode(path)[0]
        except (DatasetError, MemoryError):
            assert seen.problem
            return "refused"
        assert not seen.problem and seen.size == (pixels.shape[1], pixels.shape[0])
        return "taken" if size == seen.size else "the header says another size"

    answers = fuzz(reader, memory=3 * 1024**3)["answers"]
    assert answers["taken"] and answers["refused"]


def test_videos(fuzz, tmp_path):
    from library.data import videos

    videos.write(tmp_path / "v.mp4", np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), 8)
    whole = (tmp_path / "v.mp4").read_bytes()

    def reader(rng):
        Path("x.mp4").write_bytes(mutated(whole, rng))
        try:
            found = videos.probe("x.mp4")
            for _ in videos.read(found, range(found.frames)):
                pass
        except ValueError:
            return "refused"
        return "taken"

    fuzz(reader)
