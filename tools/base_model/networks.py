"""The three networks of emoji64 besides the VAE's training: tokenizer, text encoder, denoiser.

`fast_velocity` computes exactly what diffusers' ZImageTransformer2DModel computes (`check` compares them),
about three times as fast for 64 px pictures on a CPU.
"""

import json
import math
import os
import unicodedata

import emoji_data as data
import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from transformers import AutoTokenizer, Qwen3Config, Qwen3Model

PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT_WIDTH, TEXT_LENGTH = 128, 32
DENOISER = dict(
    in_channels=16,
    dim=192,
    n_layers=6,
    n_refiner_layers=1,
    n_heads=3,
    n_kv_heads=3,
    norm_eps=1e-5,
    qk_norm=True,
    cap_feat_dim=TEXT_WIDTH,
    rope_theta=256.0,
    t_scale=1000.0,
    axes_dims=[16, 24, 24],
    axes_lens=[1536, 512, 512],
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Words of captions that a LoRA may bring along: one token each, though the base model never saw them.
STYLE_WORDS = """blueprint drawing sketch painting watercolor pixel style color colour photo picture image poster logo icon
illustration cartoon comic ink pencil chalk neon gold silver wooden paper glass metal stone clay lego knitted embroidered
stained mosaic vintage retro modern minimal flat abstract realistic portrait landscape scene light dark red orange purple
brown grey gray navy teal with without and the of in on at by from for to a an is are his her its one two three four five
front back side top bottom left right behind under over near inside outside small large big little wearing holding
background foreground texture pattern line lines grid thin thick bold soft bright high low quality detailed simple""".split()


def build_tokenizer(folder):
    """Trains a Qwen2-type byte-level BPE on captions and emoji names and writes the usual files."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1497, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    os.makedirs(folder, exist_ok=True)
    tokenizer.model.save(folder)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = dict(
        tokenizer_class="Qwen2Tokenizer",
        add_prefix_space=False,
        add_bos_token=False,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        unk_token=None,
        bos_token=None,
        errors="replace",
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
        split_special_tokens=False,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=list(SPECIAL[1:]),
    )
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as out:
        json.dump(config, out, indent=2)


def _corpus():
    """Every caption form, so that the words of captions become single tokens, then the names of all emoji."""
    rest = list(data.FILLERS) + STYLE_WORDS + ["user", "assistant", "system"]
    for _ in range(40):
        yield from (f"{word} {word}" for word in rest)
        yield from (
            f"{name} of a {name} on a {color} background" for name in data.CLASSES for color in data.BACKGROUNDS
        )
    for code in [*range(0x2600, 0x27C0), *range(0x1F300, 0x1F650), *range(0x1F680, 0x1F700), *range(0x1F900, 0x1FA00)]:
        name = unicodedata.name(chr(code), "").lower().replace("-", " ")
        yield f"{name} {name}"


def load_tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def build_text_encoder(vocabulary):
    """A toy Qwen3; everything that shapes do not show (rope theta, eps) is Qwen3-4B's."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_theta=1000000.0, rope_type="default"),
            use_cache=False,
        )
    )


def build_denoiser():
    """A toy Z-Image with zero-initialised modulation and output, as diffusion transformers start."""
    model = ZImageTransformer2DModel(**DENOISER)
    width = min(DENOISER["dim"], 256)
    # diffusers fixes the inner width at 1024; the file format's other reader derives min(dim, 1024).
    model.t_embedder = TimestepEmbedder(width, mid_size=min(DENOISER["dim"], 1024))
    final = model.all_final_layer["2-1"]
    for block in [*model.layers, *model.noise_refiner]:
        torch.nn.init.zeros_(block.adaLN_modulation[0].weight)
        torch.nn.init.zeros_(block.adaLN_modulation[0].bias)
    for part in (final.linear, final.adaLN_modulation[1]):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    torch.nn.init.normal_(model.x_pad_token, std=0.02)
    torch.nn.init.normal_(model.cap_pad_token, std=0.02)
    return model


def tokenize(tokenizer, captions, length=TEXT_LENGTH):
    """Right-padded ids [B, length] and the true lengths [B]."""
    ids = tokenizer([PROMPT.format(caption) for caption in captions], add_special_tokens=False)["input_ids"]
    lengths = torch.tensor([len(row) for row in ids])
    if lengths.max() > length:
        raise ValueError(f"a caption has {lengths.max()} tokens with its template, at most {length} fit")
    pad = tokenizer.pad_token_id
    return torch.tensor([row + [pad] * (length - len(row)) for row in ids]), lengths


def text_states(encoder, ids):
    """hidden_states[-2] of the encoder: causal, so right padding needs no mask; the last layer is not run."""
    hidden = encoder.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = encoder.rotary_emb(hidden, positions)
    for layer in encoder.layers[:-1]:
        out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden


def _rotary(model, ids):
    """cos and sin [1, T, 1, head_dim / 2] of position ids [T, 3]."""
    freqs = model.rope_embedder(ids)
    return freqs.real[None, :, None], freqs.imag[None, :, None]


def _rotate(x, rotary):
    cos, sin = rotary
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _attention(block, x, rotary, bias, queries):
    attn = block.attention
    qkv = F.linear(x, torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight]))
    q, k, v = qkv.unflatten(-1, (3, attn.heads, -1)).unbind(2)
    q = _rotate(F.rms_norm(q, q.shape[-1:], attn.norm_q.weight, 1e-5), rotary)[:, :queries].transpose(1, 2)
    k = _rotate(F.rms_norm(k, k.shape[-1:], attn.norm_k.weight, 1e-5), rotary).transpose(1, 2)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1])) + bias
    return attn.to_out[0]((scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))


def _norm(layer, x):
    return F.rms_norm(x, x.shape[-1:], layer.weight, 1e-5)


def fast_block(block, x, rotary, bias, modulation=None, queries=None):
    """One transformer block; `queries` keeps only the first tokens, for the last block."""
    queries = queries or x.shape[1]
    if modulation is None:
        scale_a = scale_f = gate_a = gate_f = 1.0
    else:
        scale_a, gate_a, scale_f, gate_f = block.adaLN_modulation(modulation)[:, None].chunk(4, 2)
        scale_a, gate_a, scale_f, gate_f = 1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()
    out = _attention(block, _norm(block.attention_norm1, x) * scale_a, rotary, bias, queries)
    x = x[:, :queries] + gate_a * _norm(block.attention_norm2, out)
    part = block.feed_forward
    gate, value = F.linear(_norm(block.ffn_norm1, x) * scale_f, torch.cat([part.w1.weight, part.w3.weight])).chunk(
        2, -1
    )
    return x + gate_f * _norm(block.ffn_norm2, part.w2(F.silu(gate) * value))


def fast_velocity(model, latents, sigma, states, lengths, block=fast_block):
    """noise - x0 for latents [B,16,8,8], sigma [B], text states [B,<=32,C] of which `lengths` are real.

    Z-Image pads picture tokens to a multiple of 32 with one learned token at one position. The 16 copies
    see and answer the same, so one copy whose keys count 16 times (log 16 added to its scores) is equal.
    """
    count = latents.shape[0]
    patches = latents.reshape(count, 16, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(count, 16, 64)
    grid = torch.stack(
        torch.meshgrid(torch.tensor([TEXT_LENGTH + 1]), torch.arange(4), torch.arange(4), indexing="ij"), -1
    )
    image_ids = torch.cat([grid.reshape(16, 3), torch.zeros(1, 3, dtype=torch.long)])
    text_ids = F.pad(torch.arange(1, TEXT_LENGTH + 1)[:, None], (0, 2))
    image_rotary, text_rotary = _rotary(model, image_ids), _rotary(model, text_ids)
    both_rotary = _rotary(model, torch.cat([image_ids, text_ids]))
    bias = torch.zeros(17 + TEXT_LENGTH)
    bias[16] = math.log(16)
    embedded = model.t_embedder((1 - sigma) * model.t_scale)
    image = torch.cat([model.all_x_embedder["2-1"](patches), model.x_pad_token[None].expand(count, 1, -1)], 1)
    for layer in model.noise_refiner:
        image = block(layer, image, image_rotary, bias[:17], embedded)
    text = model.cap_embedder[1](_norm(model.cap_embedder[0], states))
    text = F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1]))
    real = (torch.arange(TEXT_LENGTH) < lengths[:, None])[..., None]
    text = torch.where(real, text, model.cap_pad_token)
    for layer in model.context_refiner:
        text = block(layer, text, text_rotary, bias[17:])
    both = torch.cat([image, text], 1)
    for layer in model.layers[:-1]:
        both = block(layer, both, both_rotary, bias, embedded)
    out = model.all_final_layer["2-1"](block(model.layers[-1], both, both_rotary, bias, embedded, 16), c=embedded)
    return -out.reshape(count, 4, 4, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(count, 16, 8, 8)


@torch.no_grad()
def check():
    """The largest difference between the fast forward and diffusers' on random weights."""
    torch.manual_seed(0)
    model = build_denoiser()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    latents, sigma, lengths = torch.randn(3, 16, 8, 8), torch.rand(3), torch.tensor([9, 14, 20])
    states = torch.randn(3, 20, TEXT_WIDTH)
    fast = fast_velocity(model, latents, sigma, states, lengths)
    slow = model([x[:, None] for x in latents], 1 - sigma, [s[:n] for s, n in zip(states, lengths)]).sample
    return (fast + torch.stack(slow)[:, :, 0]).abs().max().item(), fast.abs().max().item()


@torch.no_grad()
def sample(model, states, lengths, empty, noise, steps=24, cfg=3.5, shift=1.0):
    """Euler from noise to latents with guidance; `empty` is the (states, lengths) of the empty caption."""
    count = noise.shape[0]
    both = torch.cat([states, empty[0].expand(count, -1, -1)])
    both_lengths = torch.cat([lengths, empty[1].expand(count)])
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    x = noise
    for now, then in zip(sigmas[:-1], sigmas[1:]):
        cond, uncond = fast_velocity(model, x.repeat(2, 1, 1, 1), now.expand(2 * count), both, both_lengths).chunk(2)
        x = x + (then - now) * (uncond + cfg * (cond - uncond))
    return x
