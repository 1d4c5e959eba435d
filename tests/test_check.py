"""A LoRA held against a model from headers alone: the names that ComfyUI takes, the shapes of every kind of adapter."""

import json
import math
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from oracles import read_json
from test_inspect import DENOISERS, FAMILY_OF

from library import comfy_names, options
from library.checkpoints import Checkpoint, layout_of, rows_of
from library.errors import ConfigError
from library.families import get_family
from library.headers import Header, TensorInfo
from library.layout import our_shapes
from library.memory import released
from networks import check, formats, kinds, sizes
from networks.lora import is_adapted
from networks.names import denoiser_space

ROOT = Path(__file__).resolve().parent.parent


def keys_of(name):
    content = read_json(f"layouts/{name}")
    return {key: tuple(shape) for key, shape in content.get("keys", content).items()}


def header(path, shapes):
    """A file of these names and shapes, with nothing but zeros behind its header."""
    table, end = {}, 0
    for key, shape in shapes.items():
        table[key] = {"dtype": "U8", "shape": list(shape), "data_offsets": [end, end + math.prod(shape)]}
        end += math.prod(shape)
    text = json.dumps(table).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def checkpoint(shapes):
    tensors = {key: TensorInfo("BF16", shape, 0, 0) for key, shape in shapes.items()}
    return Checkpoint(Path("x"), (Header(Path("x"), tensors, {}, 8),))


# ---- names


# What ComfyUI's map has besides: Flux 1's and 2's names for each other's modules, and Z-Image's diffusers names for
# Lumina 2, which point outside of its narrower k and v. With dots for underscores.
NOT_OURS = {
    "flux": r"attn.to.out$|to.qkv.mlp|ff(.context)?.linear|norm.out|norm\d?(.context)?.linear|time.text.embed",
    "flux2": r"single.transformer.blocks|ff(.context)?.net|norm\d(.context)?.linear|time.text.embed|norm.out",
    "lumina_2": r"^(transformer|lycoris)|attention.(to|norm)|all.(final.layer|x.embedder)",
    "sdxl": r"class.embedding",  # another name for label_emb, of models that diffusers has not
}


@pytest.mark.parametrize("name", DENOISERS)
def test_the_names_are_those_that_comfyui_takes(name):
    family, oracle = get_family(FAMILY_OF.get(name, name)), read_json(f"lora_keys/{name}")
    taken = {stem: weight for style in oracle["styles"].values() for stem, weight in style["keys"].items()}
    later = oracle.get("names_only_ComfyUI_of_Feb_2026_accepts") or {}
    shapes = keys_of(name)
    part = family.denoiser
    found = check.weights_of(family, check.shapes_of_header(part, checkpoint(shapes), part.layout_in(shapes)))
    matrices = {stem for stem, (weight, _) in found.items() if len(weight) > 1}
    assert len(matrices) > 360 and matrices <= taken.keys() | later.keys()
    for stem in matrices & taken.keys():
        if isinstance(taken[stem], dict) and "slice" not in taken[stem]:
            continue
        if isinstance(taken[stem], dict):
            assert found[stem][0][0] == taken[stem]["slice"]["length"], stem
        elif name not in ("hunyuan_image", "hunyuan_video", "hunyuan_video_15", "hunyuan_video_15_i2v"):
            assert found[stem][0] == shapes[taken[stem].removeprefix("diffusion_model.")], stem
    other = re.compile(NOT_OURS.get("flux" if family.name == "chroma" else family.name, "^$"))
    works = taken.keys() - oracle["names_in_the_map_that_cannot_work"].keys()
    lacking = [stem for stem in works - found.keys() if not other.search(stem.replace("_", "."))]
    assert not lacking, lacking[:5]


@pytest.mark.parametrize("name", DENOISERS)
def test_a_format_is_taken_if_every_adapter_of_the_blocks_is(name):
    family, shapes = get_family(FAMILY_OF.get(name, name)), keys_of(name)
    part = family.denoiser
    ours = check.shapes_of_header(part, checkpoint(shapes), part.layout_in(shapes))
    found, layout = check.weights_of(family, ours), layout_of(part, next(iter(part.layouts)), ours)
    space = denoiser_space(layout, part.diffusers_folder, part.apart)
    assert comfy_names.is_taken(family, family.save_formats[0]), "what is saved if nothing is said"
    for form in family.save_formats:
        places = formats._format_places(form, (space,))
        adapted = [stem for stem, place in places.items() if is_adapted(place.name, family.adapted)]
        missing = [stem for stem in adapted if stem not in found]
        assert len(adapted) >= 80 and comfy_names.is_taken(family, form) == (not missing), (form, missing[:3])


def test_a_run_that_saves_for_other_programs_says_so():
    def said(name, *words):
        given = options.parse(name, ["--output_dir", "x", "--network_module", "networks.lora", *words], "test")
        return comfy_names.advice(get_family(name), given)

    assert said("wan") == said("wan", "--save_format", "kohya") == said("flux", "--save_format", "diffusers") == ()
    (note,) = said("wan", "--save_format", "diffusers")
    assert "--save_format diffusers: ComfyUI does not know these names" in note


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_the_names_of_text_encoders_are_those_that_comfyui_takes(name):
    styles = read_json(f"lora_keys/{name}")["text_encoder_styles"]
    taken = {stem for style in styles.values() for stem in style["keys"]}
    found = check.text_weights(get_family(name), [])
    kohya = {stem for stem, (weight, _) in found.items() if stem.startswith("lora_te") and len(weight) > 1}
    inside = {stem for stem in kohya if "_encoder_layers_" in stem or "_encoder_block_" in stem}
    assert len(inside) > 200 and inside <= taken
    assert {s for s in taken if re.match(r"lora_te[12]_text_model_encoder_layers", s)} <= kohya | {
        s for s in taken if name == "flux"
    }


@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_video", "hunyuan_video_15", "lumina_2"])
def test_a_header_divides_fused_weights_as_the_model_does(name):
    part = get_family(name).denoiser
    for title, configuration in sizes._released(get_family(name)):  # of the others ComfyUI's slices say it, above
        built = sizes._layout(part, configuration)
        rows = rows_of(part, next(iter(part.layouts)), built.shapes)
        assert our_shapes(rows, built.their_shapes) == dict(built.shapes), title


# ---- shapes


LINEAR, CONV = (40, 24), (20, 12, 3, 3)
# What LyCORIS 4.1.3 saves for a Linear(24, 40) and a Conv2d(12, 20, 3), rank 2: algorithm -> (of the one, of the other)
LYCORIS = {
    "loha": (dict(hada_w1_a=(40, 2), hada_w1_b=(2, 24), hada_w2_a=(40, 2), hada_w2_b=(2, 24)),
             dict(hada_w1_a=(20, 2), hada_w1_b=(2, 108), hada_w2_a=(20, 2), hada_w2_b=(2, 108))),
    "loha, tucker": (dict(hada_w1_a=(40, 2), hada_w1_b=(2, 24), hada_w2_a=(40, 2), hada_w2_b=(2, 24)),
                     dict(hada_w1_a=(2, 20), hada_w1_b=(2, 12), hada_w2_a=(2, 20), hada_w2_b=(2, 12),
                          hada_t1=(2, 2, 3, 3), hada_t2=(2, 2, 3, 3))),
    "lokr": (dict(lokr_w1=(4, 4), lokr_w2_a=(10, 2), lokr_w2_b=(2, 6)),
             dict(lokr_w1=(4, 3), lokr_w2_a=(5, 2), lokr_w2_b=(2, 36))),
    "lokr, full": (dict(lokr_w1=(4, 4), lokr_w2=(10, 6)), dict(lokr_w1=(4, 3), lokr_w2=(5, 4, 3, 3))),
    "lokr, tucker": (dict(lokr_w1=(2, 2), lokr_w2_a=(20, 2), lokr_w2_b=(2, 12)),
                     dict(lokr_w1=(2, 2), lokr_w2_a=(2, 10), lokr_w2_b=(2, 6), lokr_t2=(2, 2, 3, 3))),
    "locon, tucker": (dict(up=(40, 2), down=(2, 24)), dict(up=(20, 2, 1, 1), down=(2, 12, 1, 1), mid=(2, 2, 3, 3))),
    "dora": (dict(dora_scale=(40, 1), up=(40, 2), down=(2, 24)),
             dict(dora_scale=(20, 1, 1, 1), up=(20, 2, 1, 1), down=(2, 12, 3, 3))),
    "full": (dict(diff=(40, 24), diff_b=(40,)), dict(diff=(20, 12, 3, 3), diff_b=(20,))),
    "oft": (dict(oft_blocks=(20, 2, 2), rescale=(40, 1)), dict(oft_blocks=(10, 2, 2), rescale=(20, 1, 1, 1))),
    "boft": (dict(oft_blocks=(3, 10, 4, 4)), dict(oft_blocks=(2, 5, 4, 4))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LYCORIS)
def test_every_kind_of_adapter_fits_its_weight_and_no_other(kind):
    for parts, weight in zip(LYCORIS[kind], (LINEAR, CONV), strict=True):
        bias = (weight[0],)
        assert kinds.fault(parts | {"alpha": ()}, weight, bias) == ""
        assert kinds.fault(parts, (weight[0] + 8, *weight[1:]), (weight[0] + 8,)), "more rows"
        if "oft_blocks" not in parts:  # which turn the rows, whatever the columns are
            assert kinds.fault(parts, (weight[0], weight[1] + 4, *weight[2:]), bias), "more columns"
        needed = [
            role for role in parts if role not in ("dora_scale", "rescale", "diff", "diff_b", "oft_blocks", "mid")
        ]
        for role in needed:
            assert kinds.fault({r: s for r, s in parts.items() if r != role}, weight, bias), f"without {role}"


def test_faults_say_what_is_wrong():
    pair = {"down": (4, 24), "up": (40, 4)}
    assert kinds.fault(pair, LINEAR) == ""
    assert "down [4, 24], up [40, 8]" in kinds.fault(pair | {"up": (40, 8)}, LINEAR)
    assert "update of 40 x 32, the weight is [40, 24]" in kinds.fault(pair | {"down": (4, 32)}, LINEAR)
    assert kinds.fault({"down": (4, 24), "alpha": ()}, LINEAR) == "up is missing beside alpha, down"
    assert "dora_scale [7]" in kinds.fault(pair | {"dora_scale": (7,)}, LINEAR)
    assert "diff_b [40] is for a bias" in kinds.fault({"diff_b": (40,)}, LINEAR)
    assert "own matrix" in kinds.fault({"alpha": ()}, LINEAR)
    assert "one number" in kinds.fault(pair | {"alpha": (4,)}, LINEAR)


def test_no_shapes_are_odd_enough_for_an_exception():
    draw = random.Random(0)
    roles, sizes = sorted({*kinds.ROLES.values(), *kinds.OTHER_ROLES.values()}), (0, 1, 2, 24, 40)
    found = set()
    for _ in range(3000):
        shapes = [tuple(draw.choices(sizes, k=draw.randrange(5))) for _ in range(8)]
        parts = dict(zip(draw.sample(roles, draw.randrange(1, 6)), shapes, strict=False))
        found.add(kinds.fault(parts, shapes[6], draw.choice([None, shapes[7]])))
    assert all(isinstance(one, str) for one in found) and len(found) > 100 and "" in found


# ---- files


def lora(shapes, prefix="diffusion_model.", rank=1, separator="."):
    """A LoRA of all matrices of the blocks."""
    out = {}
    for key, shape in shapes.items():
        if key.startswith("blocks.") and key.endswith(".weight") and len(shape) == 2:
            stem = prefix + key.removesuffix(".weight").replace(".", separator)
            out |= {
                f"{stem}.lora_A.weight": (rank, shape[1]),
                f"{stem}.lora_B.weight": (shape[0], rank),
                f"{stem}.alpha": (),
            }
    return out


def inspect(*words):
    words = [sys.executable, "-X", "importtime", "tools/inspect.py", *map(str, words)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert not re.search(r"\| +(torch|diffusers|transformers)$", done.stderr, re.M), "from headers alone"
    return done


def test_an_image_to_video_lora_names_what_a_text_to_video_model_lacks(tmp_path):
    path = header(tmp_path / "lora.safetensors", lora(keys_of("wan_i2v_14b")))
    right, wrong = (released.write(name, tmp_path) for name in ("wan_i2v_14b", "wan_t2v_14b"))
    done = inspect(path, "--base", right)
    assert done.returncode == 0 and done.stdout.startswith("ComfyUI: 1440/1440 keys match")
    done = inspect(path, "--base", wrong)
    assert done.returncode == 2 and "ComfyUI: 1200/1440 keys match" in done.stdout
    assert "cross_attn.k_img.lora_A.weight" in done.stdout and "240 of 1440 keys would change nothing" in done.stderr
    found = json.loads(inspect(path, "--base", wrong, "--json").stdout)
    assert (found["family"], found["matched"], found["total"]) == ("wan", 1200, 1440)
    assert all(".k_img." in key or ".v_img." in key for key in found["unmatched"]) and len(found["unmatched"]) == 240


def test_a_model_of_another_size_or_kind_says_what_it_is(tmp_path):
    path = header(tmp_path / "lora.safetensors", lora(keys_of("wan_i2v_14b")))
    small = check.check(path, [released.write("wan", tmp_path)])
    assert small.matched == 0 and any("the weight is [1536, 1536]" in reason for reason in small.unmatched.values())
    other = check.check(path, [released.write("flux", tmp_path)])
    assert other.matched == 0 and "by its names the file is a LoRA of Wan" in check.text(other)
    with pytest.raises(ConfigError, match="is no denoiser: it is .*VAE"):
        check.check(path, [released.write("vae_flux", tmp_path)])
    with pytest.raises(ConfigError, match="is not a LoRA: it is a Flux denoiser"):
        check.check(tmp_path / "flux.safetensors", [tmp_path / "flux.safetensors"])


def test_names_that_comfyui_drops_are_not_matched(tmp_path):
    """Wan's own names with diffusers' prefix; diffusers folders as the base; the count is of this format's keys."""
    base, shapes = released.write("wan_t2v_14b", tmp_path), keys_of("wan_t2v_14b")
    for prefix, separator, matched in (("lora_unet_", "_", 1200), ("transformer.", ".", 0), ("lycoris_", "_", 0)):
        path = header(tmp_path / "lora.safetensors", lora(shapes, prefix, separator=separator))
        assert check.check(path, [base]).matched == matched, prefix
    part = get_family("wan").denoiser
    ours = check.shapes_of_header(part, checkpoint(shapes), "comfy")
    folder = tmp_path / "diffusers"
    folder.mkdir()
    header(folder / "diffusion_pytorch_model.safetensors", ours)
    path = header(tmp_path / "lora.safetensors", lora(layout_of(part, "comfy", ours).their_shapes))
    assert check.check(path, [folder]).unmatched == {}


def test_text_encoders_are_held_against_their_file_or_the_released_one(tmp_path):
    unet = {
        "lora_unet_middle_block_1_proj_in.lora_down.weight": (4, 1280),
        "lora_unet_middle_block_1_proj_in.lora_up.weight": (1280, 4),
    }
    text = {f"lora_te{n}_text_model_encoder_layers_0_mlp_fc1.lora_{w}.weight": s
            for n, width in ((1, 768), (2, 1280)) for w, s in (("down", (4, width)), ("up", (4 * width, 4)))}  # fmt: skip
    path = header(tmp_path / "lora.safetensors", unet | text)
    bare, whole = released.write("sdxl", tmp_path), released.write("sdxl_full_checkpoint", tmp_path)
    assert check.check(path, [bare]).unmatched == {} == check.check(path, [whole]).unmatched
    wrong = {key.replace("lora_te1", "lora_te2"): shape for key, shape in text.items() if "te1" in key}
    found = check.check(header(tmp_path / "lora.safetensors", unet | wrong), [bare])
    assert found.matched == 2 and all("the weight is [5120, 1280]" in reason for reason in found.unmatched.values())
