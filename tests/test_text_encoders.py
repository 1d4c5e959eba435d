"""Text and image encoders against an independent implementation's outputs and the key lists of the real files."""

import itertools
import json

import pytest
import torch
from oracles import golden, golden_metadata, load, read_json, relative, weights_of

from library import checkpoints
from library.components import clip, decoder, gemma2, llama3, mistral, qwen3, qwen25_vl, t5, vision
from library.errors import ConfigError
from library.layout import Layout, shapes_of

TOLERANCE = 1e-4
PARTS = {  # key list of a real file -> the part that reads it
    "te_clip_l": clip.large(),
    "te_clip_g": clip.big(),
    "te_t5xxl": t5.xxl(),
    "te_t5xxl_old": t5.old(),
    "te_umt5xxl": t5.umt5(),
    "te_umt5_auraflow": t5.pile(),
    "te_byt5_glyphxl": t5.byt5(),
    "te_qwen25_vl_7b": qwen25_vl.part(),
    "te_qwen25_3b": qwen25_vl.part(),
    "te_qwen3_0.6b": qwen3.part("a Qwen3 text encoder", "Qwen/Qwen3-0.6B"),
    "te_qwen3_4b": qwen3.part("a Qwen3 text encoder", "Qwen/Qwen3-4B"),
    "te_qwen3_8b": qwen3.part("a Qwen3 text encoder", "Qwen/Qwen3-8B"),
    "te_llama3_8b": llama3.llava(),
    "te_mistral_small_flux2": mistral.part(),
    "te_mistral_small_flux2_pruned": mistral.part(),
    "te_gemma2_2b": gemma2.part(),
}
OF_ONE_KIND = [
    {"te_qwen25_vl_7b", "te_qwen25_3b"},
    {"te_qwen3_0.6b", "te_qwen3_4b", "te_qwen3_8b"},
    {"te_mistral_small_flux2", "te_mistral_small_flux2_pruned"},
]


def full_size(name):
    content = read_json(f"layouts/{name}")
    return {key: tuple(shape) for key, shape in content.get("keys", content).items()}


def layout_of(part, shapes, name):
    with torch.device("meta"):
        ours = shapes_of(part.build(part.config(shapes, {}, name)))
    return Layout(name, checkpoints.rows_of(part, name, ours), ours)


@pytest.mark.parametrize("name", PARTS)
def test_every_key_of_the_full_size_file_is_claimed_with_its_shape(name):
    part, shapes = PARTS[name], full_size(name)
    layout = layout_of(part, shapes, part.recognise(shapes))
    assert {key: tuple(shape) for key, shape in layout.their_shapes.items()} == shapes


@pytest.mark.parametrize("name", PARTS)
def test_a_file_is_not_taken_for_another_encoder(name):
    shapes = full_size(name)
    takers = {other for other, part in PARTS.items() if part.recognise(shapes)}
    assert takers == next((group for group in OF_ONE_KIND if name in group), {name})


def test_an_sdxl_checkpoint_holds_both_clips_in_its_own_names():
    everything = full_size("sdxl_full_checkpoint")
    for part, layout, prefix in (
        (clip.large(), "original", "conditioner.embedders.0.transformer."),
        (clip.big(), "open_clip", "conditioner.embedders.1.model."),
    ):
        assert prefix in part.prefixes
        shapes = {key.removeprefix(prefix): s for key, s in everything.items() if key.startswith(prefix)}
        assert part.recognise(shapes) == layout
        left = shapes.keys() - layout_of(part, shapes, layout).their_shapes.keys()
        assert all(part.may_carry(key, shapes[key]) for key in left) and len(left) == 1
        assert layout_of(part, shapes, layout).their_shapes.items() <= shapes.items()


def clip_weights(name):
    """The golden file keeps only the rows of the embedding that its ids use."""
    tensors = golden(name)
    weights = weights_of(tensors, "weights/")
    rows = weights.pop("text_model.embeddings.token_embedding.rows")
    table = torch.zeros(49408, rows.shape[1])
    table[tensors["inputs/used_ids"]] = rows
    return weights | {"text_model.embeddings.token_embedding.weight": table}


def heads(name):
    return {"num_attention_heads": str(json.loads(golden_metadata(name)["hf_config"])["num_attention_heads"])}


def open_clip(weights):
    """transformers' names in OpenCLIP's spelling, from its own source: qkv stacked, the projection transposed."""
    renames = (
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm", "ln_"),
        ("fc1", "c_fc"),
        ("fc2", "c_proj"),
    )
    out = {}
    for key, value in weights.items():
        for a, b in renames:
            key = key.replace(a, b)
        out[key] = value
    out["text_projection"] = out.pop("text_projection.weight").T
    layers = {key.split(".self_attn")[0] for key in out if ".self_attn" in key}
    for layer, leaf in itertools.product(layers, ("weight", "bias")):
        stacked = [out.pop(f"{layer}.self_attn.{p}_proj.{leaf}") for p in "qkv"]
        out[f"{layer}.attn.in_proj_{leaf}"] = torch.cat(stacked)
    return out | {"logit_scale": torch.tensor(4.6)}


def flat(weights):
    return {key.removeprefix("text_model."): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("name", "part", "spelling"),
    [
        ("te_clip_l", clip.large(), dict),
        ("te_clip_l", clip.large(), flat),
        ("te_clip_g", clip.big(), dict),
        ("te_clip_g", clip.big(), open_clip),
    ],
)
def test_clip_gives_the_states_and_vectors_of_an_independent_implementation(name, part, spelling, tmp_path):
    tensors = golden(name)
    model = load(part, spelling(clip_weights(name)), tmp_path, **heads(name))
    ids = tensors["inputs/input_ids"]
    with torch.no_grad():
        states, vector = clip.hidden_and_pooled(model, ids)
        assert relative(states, tensors["outputs/z_hidden"]) < TOLERANCE
        assert relative(vector, tensors["outputs/pooled_hidden"]) < TOLERANCE
        assert relative(clip.hidden(model, ids, -1, final_norm=True), tensors["outputs/z_last"]) < TOLERANCE
        assert relative(clip.pooled(model, ids, projected=False), tensors["outputs/pooled_last"]) < TOLERANCE
        assert torch.equal(clip.hidden(model, ids), states) and torch.equal(clip.pooled(model, ids), vector)


def test_a_clip_without_projection_gives_its_bare_vector_and_says_what_lacks(tmp_path):
    weights = clip_weights("te_clip_l")
    del weights["text_projection.weight"]
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    model = load(clip.large(), weights, tmp_path, **heads("te_clip_l"))
    tensors = golden("te_clip_l")
    with torch.no_grad():
        vector = clip.pooled(model, tensors["inputs/input_ids"], projected=False)
        assert relative(vector, tensors["outputs/pooled_last"]) < TOLERANCE
        with pytest.raises(ConfigError, match="part.safetensors has no text_projection"):
            clip.pooled(model, tensors["inputs/input_ids"])


def test_the_text_half_of_a_whole_clip_is_read(tmp_path):
    weights = clip_weights("te_clip_l")
    vision = weights_of(golden("te_vision_clip_h"), "weights/")
    model = load(clip.large(), weights | vision, tmp_path, **heads("te_clip_l"))
    assert model.binding.extras.keys() == vision.keys()
    tensors = golden("te_clip_l")
    with torch.no_grad():
        assert relative(clip.hidden(model, tensors["inputs/input_ids"]), tensors["outputs/z_hidden"]) < TOLERANCE


T5 = {"te_t5xxl": t5.xxl(), "te_t5xxl_old": t5.old(), "te_umt5xxl": t5.umt5(), "te_byt5": t5.byt5()}


@pytest.mark.parametrize("name", T5)
def test_t5_gives_the_states_of_an_independent_implementation_with_and_without_a_mask(name, tmp_path):
    tensors = golden(name)
    weights = weights_of(tensors, "weights/")
    copy = {"encoder.embed_tokens.weight": weights["shared.weight"].clone()}  # the usual files hold it twice
    model = load(T5[name], weights | copy, tmp_path)
    ids, mask = tensors["inputs/input_ids"], tensors["inputs/attention_mask"]
    with torch.no_grad():
        states = t5.states(model, ids, mask)
        assert relative(t5.states(model, ids), tensors["outputs/out_mask0_zero0"]) < TOLERANCE
        assert relative(states, tensors["outputs/out_mask1_zero0"]) < TOLERANCE
        assert relative(t5.zeroed(states, mask), tensors["outputs/out_mask1_zero1"]) < TOLERANCE
        length = int(mask[1].sum())
        alone = t5.states(model, ids[1:, :length])
        assert 2 < length < ids.shape[1] and relative(alone[0], states[1, :length]) < TOLERANCE


def test_umt5_in_wans_own_names_gives_the_same_states(tmp_path):
    tensors, other = golden("te_umt5xxl_kijai_names"), golden("te_umt5xxl")
    model = load(t5.umt5(), weights_of(tensors, "weights/"), tmp_path)
    assert model.binding.layout.name == "wan"
    ids, mask = tensors["inputs/input_ids"], tensors["inputs/attention_mask"]
    with torch.no_grad():
        states = t5.states(model, ids, mask)
    assert torch.equal(ids, other["inputs/input_ids"]) and torch.equal(mask, other["inputs/attention_mask"])
    assert relative(states, other["outputs/out_mask1_zero0"]) < TOLERANCE
    real = mask.bool()
    assert relative(states[real], tensors["outputs/out_wan"][real]) < TOLERANCE


def test_quantised_text_encoders_give_the_states_of_an_independent_implementation(tmp_path):
    tensors = golden("te_fp8_conventions")
    model = load(t5.xxl(), weights_of(tensors, "old/"), tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert relative(t5.states(model, tensors["input_ids"]), tensors["out_old"]) < TOLERANCE
    four_bits = load(t5.xxl(), weights_of(tensors, "nv/"), tmp_path, dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():  # the same weights, rounded more coarsely
        assert relative(four_bits[name], value) < 0.15, name


def tower(width=32, depth=3):
    """Random weights of a picture tower in the release's names, as wide as the golden language model."""
    shapes = {
        "patch_embed.proj.weight": (width, 3, 2, 14, 14),
        "merger.ln_q.weight": (width,),
        "merger.mlp.0.weight": (4 * width, 4 * width),
        "merger.mlp.0.bias": (4 * width,),
        "merger.mlp.2.weight": (32, 4 * width),
        "merger.mlp.2.bias": (32,),
    }
    for n in range(depth):
        for leaf, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.gate_proj", 40, width),
            ("mlp.up_proj", 40, width),
            ("mlp.down_proj", width, 40),
        ):
            shapes[f"blocks.{n}.{leaf}.weight"], shapes[f"blocks.{n}.{leaf}.bias"] = (rows, columns), (rows,)
        shapes |= {f"blocks.{n}.norm1.weight": (width,), f"blocks.{n}.norm2.weight": (width,)}
    generator = torch.Generator().manual_seed(1)
    return {f"visual.{key}": 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


QWEN = {"head_dim": "8", "vision_num_heads": "2", "fullatt_block_indexes": "[1]", "image_token_id": "45"}
SPELLINGS = {
    "original": lambda weights: weights,
    "flat": lambda weights: {k.removeprefix("model."): v for k, v in weights.items() if not k.startswith("visual.")},
    "renamed": lambda weights: {
        (k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else f"model.{k}"): v
        for k, v in weights.items()
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("with_tower", [False, True])
def test_qwen25_vl_gives_the_states_of_an_independent_implementation(spelling, with_tower, tmp_path):
    tensors = golden("te_qwen25vl")
    weights = weights_of(tensors, "weights/") | (tower() if with_tower else {})
    extra = {"lm_head.weight": torch.zeros(50, 32)}
    model = load(qwen25_vl.part(), SPELLINGS[spelling](weights) | extra, tmp_path, **QWEN)
    assert model.binding.layout.name == spelling
    with torch.no_grad():
        states = qwen25_vl.states(model, tensors["inputs/input_ids"])
    assert relative(states, tensors["outputs/out"]) < TOLERANCE
    assert (model.visual is not None) == (with_tower and spelling != "flat")


def picture(height, width, seed=0):
    """A smooth picture in 256 steps, [3,H,W] in -1..1."""
    small = torch.rand((1, 3, 5, 7), generator=torch.Generator().manual_seed(seed))
    big = torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic").clamp(0, 1)[0]
    return (big * 255).round() / 127.5 - 1


def preprocessor(largest=28 * 28 * 16384):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": largest})


def as_pil(image):
    from PIL import Image

    return Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def test_qwen25_vl_sees_pictures_as_transformers_does(tmp_path):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    weights = weights_of(golden("te_qwen25vl"), "weights/") | tower()
    model = load(qwen25_vl.part(), weights, tmp_path, **QWEN)
    pictures = [picture(224, 252), picture(56, 84, seed=1)]  # the first is larger than an attention window
    tokens = [qwen25_vl.picture_tokens(p) for p in pictures]
    assert tokens == [72, 6]
    ids = torch.tensor([[3, 4, *[45] * 72, 7, *[45] * 6, 8, 9, 10]])
    with torch.no_grad():
        states = qwen25_vl.states(model, ids, (-1, -3), pictures=pictures)
        blind = qwen25_vl.states(model, ids, -1)

    seen = preprocessor()([as_pil(p) for p in pictures], return_tensors="pt")
    config = Qwen2_5_VLConfig(**qwen25_vl.config({k: tuple(v.shape) for k, v in weights.items()}, QWEN, "original"))
    state = weights | {"lm_head.weight": torch.zeros(50, 32)}
    other = Qwen2_5_VLForConditionalGeneration.from_pretrained(None, config=config, state_dict=state)
    with torch.no_grad():
        out = other.eval().model(
            input_ids=ids,
            output_hidden_states=True,
            mm_token_type_ids=(ids == 45).long(),
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
        )
    assert relative(states[:, 0], out.hidden_states[-1]) < TOLERANCE
    assert relative(states[:, 1], out.hidden_states[-3]) < TOLERANCE
    assert relative(blind, states[:, 0]) > 0.1


@pytest.mark.parametrize("size", [(224, 252), (100, 333), (30, 40), (290, 410), (31, 900)])
def test_pictures_are_fitted_as_the_published_preprocessor_fits_them(size):
    image, largest = picture(*size), 28 * 28 * 100
    seen = preprocessor(largest)([as_pil(image)], return_tensors="pt")
    fitted = qwen25_vl.resized(image, qwen25_vl.fit(*size, largest=largest))
    values, grid = qwen25_vl.patches(fitted)
    assert list(grid) == seen["image_grid_thw"][0].tolist() and values.shape == seen["pixel_values"].shape
    assert float((values - seen["pixel_values"]).abs().max()) < 0.02  # a step of 256 is 0.015
    if fitted is image:
        assert float((values - seen["pixel_values"]).abs().max()) < 1e-5


def test_a_picture_for_a_file_without_its_tower_is_one_sentence(tmp_path):
    model = load(qwen25_vl.part(), weights_of(golden("te_qwen25vl"), "weights/"), tmp_path, **QWEN)
    with pytest.raises(ConfigError, match="part.safetensors holds no picture tower"):
        qwen25_vl.states(model, torch.tensor([[45] * 4]), pictures=[picture(56, 56)])


def test_what_no_file_holds_is_computed_in_float32_whatever_the_weights_are_in(tmp_path):
    weights = weights_of(golden("te_qwen25vl"), "weights/") | tower()
    model = load(qwen25_vl.part(), weights, tmp_path, dtype=torch.bfloat16, **QWEN)
    computed = dict(model.named_buffers())
    assert computed and all(b.dtype == torch.float32 and b.device.type == "cpu" for b in computed.values())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_picture_that_is_not_made_of_tokens_is_refused():
    with pytest.raises(ValueError, match="tokens of 28 pixels"):
        qwen25_vl.patches(picture(56, 60))


HEAD = {"head_dim": "16"}
DECODERS = {  # golden file -> part, what its header states, layers that are read
    "te_qwen3_zimage": (qwen3.part("", ""), {}, -2),
    "te_llama3_hunyuan": (llama3.llava(), HEAD, -3),
    "te_llama3_hidream": (llama3.llama31(), HEAD | {"rope_type": '"default"'}, range(6)),
    "te_mistral_flux2": (mistral.part(), HEAD, (1, 2, 4)),
    "te_gemma2": (gemma2.part(), HEAD | {"attn_logit_softcapping": "null"}, -2),
}


@pytest.mark.parametrize("spelling", ["original", "flat", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize("name", DECODERS)
def test_language_models_give_the_layers_of_an_independent_implementation(name, spelling, tmp_path):
    tensors = golden(name)
    part, stated, layers = DECODERS[name]
    weights = weights_of(tensors, "weights/")
    if spelling != "original":
        prefix = spelling if "." in spelling else ""
        weights = {prefix + key.removeprefix("model."): value for key, value in weights.items()}
    model = load(part, weights | {"vision_tower.x": torch.ones(1)}, tmp_path, **stated)
    ids = tensors["inputs/input_ids"]
    with torch.no_grad():
        states = decoder.states(model, ids, layers)
        assert relative(states, tensors["outputs/out"]) < TOLERANCE
        padded, mask = torch.cat([ids, ids[:, :3]], 1), torch.ones(1, 10, dtype=torch.long)
        mask[:, 7:] = 0  # on the right nothing attends to it, on the left it has to be hidden
        right = decoder.states(model, padded, layers, mask)
        assert relative(right[..., :7, :], tensors["outputs/out"]) < TOLERANCE
        left = decoder.states(model, torch.cat([ids[:, :3], ids], 1), layers, mask.flip(1))
        assert relative(left[..., 3:, :], tensors["outputs/out"]) < TOLERANCE


def test_a_pruned_mistral_ends_with_the_bare_state_of_its_last_layer(tmp_path):
    tensors = golden("te_mistral_flux2")
    kept = {
        k: v for k, v in weights_of(tensors, "weights/").items() if ".layers.4." not in k and k != "model.norm.weight"
    }
    model = load(mistral.part(), kept | {"tekken_model": torch.zeros(3, dtype=torch.uint8)}, tmp_path, **HEAD)
    with torch.no_grad():
        states = decoder.states(model, tensors["inputs/input_ids"], (1, 2, 4))
    assert relative(states, tensors["outputs/out"]) < TOLERANCE


def test_what_comfyui_leaves_out_is_the_published_constant_unless_a_header_says_otherwise(tmp_path):
    gemma = load(gemma2.part(), weights_of(golden("te_gemma2"), "weights/"), tmp_path, **HEAD)
    assert gemma.config.attn_logit_softcapping == 50.0 and gemma.config._attn_implementation == "eager"
    with torch.no_grad():
        out = decoder.states(gemma, golden("te_gemma2")["inputs/input_ids"], -2)
    assert 1e-5 < relative(out, golden("te_gemma2")["outputs/out"]) < 1e-2
    llama = load(llama3.llama31(), weights_of(golden("te_llama3_hidream"), "weights/"), tmp_path, **HEAD)
    plain = load(llama3.llava(), weights_of(golden("te_llama3_hidream"), "weights/"), tmp_path, **HEAD)
    # Llama 3.1: wavelengths beyond 8192 are eight times as long, those below 2048 as they were
    ratio = llama.rotary_emb.inv_freq / plain.rotary_emb.inv_freq
    wave = 2 * torch.pi / plain.rotary_emb.inv_freq
    assert torch.allclose(ratio[wave > 8192], torch.tensor(1 / 8)) and (wave > 8192).any()
    assert torch.allclose(ratio[wave < 2048], torch.tensor(1.0)) and (wave < 2048).any()


VISION = {"te_vision_clip_h": vision.clip_h(), "te_vision_siglip": vision.siglip()}


@pytest.mark.parametrize("spelling", ["original", "flat"])
@pytest.mark.parametrize("name", VISION)
def test_image_encoders_give_the_states_of_an_independent_implementation(name, spelling, tmp_path):
    tensors = golden(name)
    weights = weights_of(tensors, "weights/")
    if spelling == "flat":
        weights = {key.removeprefix("vision_model."): value for key, value in weights.items()}
    extra = {"logit_scale": torch.tensor(1.0)}
    model = load(VISION[name], weights | extra, tmp_path, num_attention_heads="4")
    with torch.no_grad():
        assert (
            relative(vision.states(model, tensors["inputs/pixel_values"], -2), tensors["outputs/penultimate"])
            < TOLERANCE
        )
        assert relative(vision.states(model, tensors["inputs/pixel_values"]), tensors["outputs/last"]) < TOLERANCE


def wans_clip(weights):
    """transformers' names -> those of `XLMRobertaCLIP` in Wan's wan/modules/clip.py, with pieces of its other parts."""
    get = {key.removeprefix("vision_model."): value for key, value in weights.items()}
    out = {
        "visual.patch_embedding.weight": get["embeddings.patch_embedding.weight"],
        "visual.cls_embedding": get["embeddings.class_embedding"][None, None],
        "visual.pos_embedding": get["embeddings.position_embedding.weight"][None],
        "visual.head": torch.ones(4, 2), "textual.token_embedding.weight": torch.ones(3, 2), "log_scale": torch.ones(()),
    }  # fmt: skip
    for kind in ("weight", "bias"):
        out |= {
            f"visual.{a}.{kind}": get[f"{b}.{kind}"]
            for a, b in (("pre_norm", "pre_layrnorm"), ("post_norm", "post_layernorm"))
        }
        for i in range(1 + max(int(key.split(".")[2]) for key in get if key.startswith("encoder.layers."))):
            theirs, ours = f"visual.transformer.{i}", f"encoder.layers.{i}"
            out[f"{theirs}.attn.to_qkv.{kind}"] = torch.cat([get[f"{ours}.self_attn.{n}_proj.{kind}"] for n in "qkv"])
            for a, b in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.out_proj"),
                         ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")):  # fmt: skip
                out[f"{theirs}.{a}.{kind}"] = get[f"{ours}.{b}.{kind}"]
    return out


def test_the_image_encoder_of_wans_own_folder_gives_the_same_states(tmp_path):
    tensors = golden("te_vision_clip_h")
    model = load(vision.clip_h(), wans_clip(weights_of(tensors, "weights/")), tmp_path, num_attention_heads="4")
    assert model.binding.layout.name == "wan" and len(model.binding.extras) == 3
    with torch.no_grad():
        states = vision.states(model, tensors["inputs/pixel_values"], -2)
    assert relative(states, tensors["outputs/penultimate"]) < TOLERANCE
    back = model.binding.layout.to_theirs(model.state_dict())
    assert all(
        torch.equal(value, back[key])
        for key, value in wans_clip(weights_of(tensors, "weights/")).items()
        if key in back
    )
    assert len(back) == len(wans_clip(weights_of(tensors, "weights/"))) - 3


PUBLISHED = {  # of laion/CLIP-ViT-H-14-laion2B-s32B-b79K and google/siglip-so400m-patch14-384
    "te_vision_clip_h": {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "hidden_act": "gelu", "image_size": 224, "patch_size": 14, "num_channels": 3, "layer_norm_eps": 1e-5,
    },
    "te_vision_siglip": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "hidden_act": "gelu_pytorch_tanh", "image_size": 384, "patch_size": 14, "num_channels": 3, "layer_norm_eps": 1e-6,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_of_an_image_encoder_are_read_from_its_shapes(name):
    part = VISION[name]
    with torch.device("meta"):
        ours = shapes_of(part.build(PUBLISHED[name]))
    shapes = {f"vision_model.{key}": shape for key, shape in ours.items()}
    assert part.recognise(shapes) == "original"
    assert [other for other in VISION if VISION[other].recognise(shapes)] == [name]
    assert part.config(shapes, {}, "original") == PUBLISHED[name]
    assert layout_of(part, shapes, "original").their_shapes == shapes


@pytest.mark.parametrize("size", [(28, 28), (60, 91), (100, 40)])
def test_pictures_are_prepared_as_the_published_preprocessors_prepare_them(size, tmp_path):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    side = {"height": 28, "width": 28}
    for name, crop, processor in (
        ("te_vision_clip_h", True, CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)),
        ("te_vision_siglip", False, SiglipImageProcessorPil(size=side)),
    ):
        model = load(VISION[name], weights_of(golden(name), "weights/"), tmp_path, num_attention_heads="4")
        image = picture(*size)
        expected = processor(as_pil(image), return_tensors="pt")["pixel_values"]
        prepared = vision.prepare(model, image[None], crop=crop, clip_colours=name == "te_vision_clip_h")
        assert prepared.shape == expected.shape == (1, 3, 28, 28)
        assert float((prepared - expected).abs().max()) < 0.035  # two steps of 256


QUANTISED = {  # golden file -> part, what its header states
    "te_clip_g": (clip.big(), None),
    "te_umt5xxl_kijai_names": (t5.umt5(), {}),
    "te_qwen25vl": (qwen25_vl.part(), QWEN),
    "te_vision_siglip": (vision.siglip(), {"num_attention_heads": "4"}),
    **{name: (part, stated) for name, (part, stated, _) in DECODERS.items()},
}


@pytest.mark.parametrize("companion", ["scale_weight", "weight_scale", ""])
@pytest.mark.parametrize("name", QUANTISED)
def test_every_encoder_is_dequantised_when_it_is_read(name, companion, tmp_path):
    part, stated = QUANTISED[name]
    weights = open_clip(clip_weights(name)) if name == "te_clip_g" else weights_of(golden(name), "weights/")
    weights |= tower() if name == "te_qwen25vl" else {}
    stored, expected = {}, {}
    for key, value in weights.items():
        stored[key] = expected[key] = value
        if key.endswith(".weight") and value.ndim > 1:
            scale = value.abs().max() / 448 if companion else torch.tensor(1.0)
            stored[key] = (value / scale).to(torch.float8_e4m3fn)
            expected[key] = stored[key].float() * scale
            if companion:
                stored[f"{key.removesuffix('weight')}{companion}"] = scale.clone()
                stored[f"{key.removesuffix('weight')}input_scale"] = torch.ones(())
    if companion == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    model = load(part, stored, tmp_path, torch.float32, **(heads(name) if stated is None else stated))
    theirs = model.binding.layout.to_theirs(model.state_dict())
    assert theirs.keys() == {key for key in weights if key != "logit_scale"}
    assert all(torch.equal(theirs[key], expected[key]) for key in theirs)
