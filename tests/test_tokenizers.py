"""Tokenizers: where they are looked for, and that those of real models give the ids of an independent implementation."""

import base64
import io
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from oracles import SHARED
from safetensors.torch import save_file

from library.components import clip, llama3, t5, tokenizers
from library.errors import ConfigError
from library.families.family import Tokenizer

REAL = SHARED / "tokenizers"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizers are not here")
TEXTS = ("a red fox, 3 cats", "  Größe {x}\n日本 ok", "")


def options_of(part, encoder="", tokenizer=None):
    values = {part.option: str(encoder), part.tokenizer.option: tokenizer, "pretrained_model_name_or_path": None}
    return SimpleNamespace(**values)


def test_the_option_comes_first_then_a_folder_beside_the_encoder_then_its_own_file_then_the_hub(tmp_path):
    part, encoder = t5.umt5(), tmp_path / "umt5.safetensors"

    def found(**given):
        return tokenizers.tokenizer_path(part, options_of(part, encoder, **given))

    save_file({"encoder.x": torch.zeros(1)}, encoder)
    assert found() == ("google/umt5-xxl", "")
    save_file({"spiece_model": torch.zeros(1, dtype=torch.uint8)}, encoder)
    assert found() == (str(encoder), "")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert found() == (str(tmp_path / "tokenizer"), "")
    assert found(tokenizer="mine") == ("mine", "")


def test_the_tokenizers_of_a_diffusers_folder_are_told_apart_by_its_numbers(tmp_path):
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text("{}")
    for part, folder in (
        (clip.large(), "tokenizer"),
        (t5.xxl(), "tokenizer_2"),
        (t5.xxl(folder="text_encoder"), "tokenizer"),
    ):
        options = options_of(part, tmp_path / part.diffusers_folder)
        assert tokenizers.tokenizer_path(part, options) == (str(tmp_path / folder), "")


def test_a_models_own_folder_holds_its_tokenizer_beside_its_weights(tmp_path):
    """As Llama, Qwen and Mistral are published; a folder of files of many models has no config.json of one."""
    part, home = llama3.llama31(), tmp_path / "Meta-Llama-3.1-8B-Instruct"
    home.mkdir()
    (home / "tokenizer_config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, home / "model.safetensors")
    for encoder in (home, home / "model.safetensors"):
        assert tokenizers.tokenizer_path(part, options_of(part, encoder))[0] == part.tokenizer.hub
    (home / "config.json").write_text("{}")
    for encoder in (home, home / "model.safetensors"):
        assert tokenizers.tokenizer_path(part, options_of(part, encoder)) == (str(home), "")
        another = Tokenizer("tokenizer_llama3", "owner/another")
        assert tokenizers.tokenizer_path(part, options_of(part, encoder), another)[0] == "owner/another"


def sentencepiece_model(kind):
    """A small model with byte fallback, its special tokens where UMT5 and Gemma have them."""
    import sentencepiece

    special = {
        "umt5": {"model_type": "unigram", "eos_id": 1, "bos_id": -1, "unk_id": 2},
        "gemma": {
            "model_type": "bpe", "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False,
            "remove_extra_whitespaces": False, "normalization_rule_name": "identity", "bos_piece": "<bos>",
            "eos_piece": "<eos>", "user_defined_symbols": ["<start_of_turn>"],
        },
    }[kind]  # fmt: skip
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red fox jumps over  the lazy dog", "hello world, 123 cats cat catalog"] * 20),
        model_writer=out, vocab_size=310, byte_fallback=True, pad_id=0, hard_vocab_limit=False,
        minloglevel=2, **special,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize("kind", ["umt5", "gemma"])
def test_a_sentencepiece_model_inside_of_a_weight_file_gives_sentencepieces_own_ids(tmp_path, kind):
    """Characters that it lacks are their bytes, not one unknown token."""
    import sentencepiece

    model = sentencepiece_model(kind)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    load = {"umt5": tokenizers.load_umt5, "gemma": tokenizers.load_gemma}[kind]
    before, after = {"umt5": ([], [1]), "gemma": ([2], [])}[kind]
    raw = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    save_file({"text_encoders.x.transformer.spiece_model": raw}, tmp_path / "te.safetensors")
    (tmp_path / "bare.model").write_bytes(model)
    name = {"umt5": "spiece.model", "gemma": "tokenizer.model"}[kind]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(model)
    (tmp_path / "folder" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GemmaTokenizer", "add_bos_token": true}'
    )
    for path in ("te.safetensors", "bare.model", "folder"):
        tokenizer = load(str(tmp_path / path))
        for text in (*TEXTS, "😀 two\n\nlines"):
            ids = tokenizer(text)["input_ids"]
            assert ids == [*before, *oracle.encode(text), *after], (path, text)
            assert oracle.unk_id() not in ids
        assert tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"] == oracle.encode(TEXTS[0])
        assert tokenizer.decode(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) == TEXTS[0]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def merged(text, ranks):
    """Byte pair encoding by rank, as tiktoken defines it: always join the pair whose join has the lowest rank."""
    parts = [bytes([b]) for b in text.encode()]
    while True:
        joins = [(ranks[a + b], n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not joins:
            return [ranks[part] for part in parts]
        _, n = min(joins)
        parts[n : n + 2] = [parts[n] + parts[n + 1]]


def test_a_tekken_model_inside_of_a_weight_file_gives_the_ids_of_its_ranks(tmp_path):
    tokens = [bytes([n]) for n in range(256)]
    tokens += [b"he", b"ll", b"hell", b" w", b"or", b"hello", "日".encode()[:2], "日".encode(), b"wor", b" wo"]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) + 10,
            "default_num_special_tokens": 10,
            "version": "v11",
        },
        "vocab": [
            {"rank": n, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for n, token in enumerate(tokens)
        ],
        "special_tokens": [{"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(special)],
    }
    raw = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    save_file({"tekken_model": raw}, tmp_path / "te.safetensors")
    tokenizer = tokenizers.load_mistral(str(tmp_path / "te.safetensors"))
    ranks = {token: n for n, token in enumerate(tokens)}
    pieces = ["hello", " world", " 日", ",", " 1", "2", "\n", "hell"]
    words = [*pieces[:4], " ", "1", *pieces[5:]]  # digits stand alone
    expected = [10 + n for word in words for n in merged(word, ranks)]
    assert tokenizer("".join(pieces), add_special_tokens=False)["input_ids"] == expected
    ids = tokenizer("[SYSTEM_PROMPT]hello[/SYSTEM_PROMPT][INST]hell[/INST]", add_special_tokens=False)["input_ids"]
    assert ids == [5, 10 + ranks[b"hello"], 6, 3, 10 + ranks[b"hell"], 4]


def test_a_folder_without_a_vocabulary_is_refused_because_transformers_would_make_one_up(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ConfigError, match="holds no vocabulary"):
        tokenizers.load_tokenizer(str(tmp_path))


@real
@pytest.mark.parametrize("name", ["t5", "t5_old"])
def test_a_t5_folder_gives_sentencepieces_ids(name):
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "t5_old" / "spiece.model"))
    tokenizer = tokenizers.load_tokenizer(str(REAL / name))
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [[*oracle.encode(text), 1] for text in TEXTS]


def test_byt5_needs_no_file_and_its_ids_are_the_bytes():
    tokenizer = tokenizers.load_byt5("google/byt5-small")
    assert all(tokenizer(text)["input_ids"] == [*(b + 3 for b in text.encode()), 1] for text in TEXTS)


@real
def test_the_glyph_byt5_folder_gives_the_same_ids():
    folder, none = tokenizers.load_byt5(str(REAL / "byt5")), tokenizers.load_byt5("google/byt5-small")
    text = 'Text "Größe 日本". '
    assert folder(text)["input_ids"] == none(text)["input_ids"]


@real
def test_clips_ids_are_those_of_the_published_vocabulary():
    tokenizer = tokenizers.load_tokenizer(str(REAL / "clip"))
    assert len(tokenizer) == 49408 and tokenizer("a photo of a cat")["input_ids"] == [
        49406,
        320,
        1125,
        539,
        320,
        2368,
        49407,
    ]


@real
@pytest.mark.parametrize("name", ["qwen25", "qwen3"])
def test_qwens_special_tokens_are_single_ids_and_words_are_those_of_the_published_vocabulary(name):
    tokenizer = tokenizers.load_tokenizer(str(REAL / name))
    prompt = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>a cat<|im_end|>\n<|im_start|>assistant\n"
    ids = [151644, 872, 198, 151652, 151655, 151653, 64, 8251, 151645, 198, 151644, 77091, 198]
    assert tokenizer(prompt)["input_ids"] == ids
    assert tokenizer("<think>\n\n</think>\n\n")["input_ids"] == [151667, 271, 151668, 271]


@real
def test_auraflows_folder_gives_sentencepieces_ids_and_an_end_token():
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "auraflow" / "tokenizer.model"))
    tokenizer = tokenizers.load_tokenizer(str(REAL / "auraflow"))
    for text in ("a red fox, 3 cats", "Größe {x}\n日本 ok", "", "😀 two\n\nlines", "a  b"):
        assert tokenizer(text)["input_ids"] == [*oracle.encode(text), 2], text


def test_a_caption_that_is_too_long_loses_its_end_and_neither_template_nor_end_token():
    tokenizer = tokenizers.load_byt5("google/byt5-small")
    ids, cut = tokenizers.ended(tokenizer, "abcdef", 5)
    assert (tokenizer.decode(ids), cut) == ("abcd</s>", "ef") and len(ids) == 5
    assert tokenizers.ended(tokenizer, "abcd", 5) == (tokenizer("abcd")["input_ids"], "")
    assert tokenizers.ended(tokenizer, "", 5) == ([1], "")
    ids, cut = tokenizers.wrapped(tokenizer, "abcdef", 7, ("<<", ">"))
    assert (tokenizer.decode(ids), cut) == ("<<abcd>", "ef")
    assert tokenizers.wrapped(tokenizer, "abc", 7, ("<<", ">"))[1] == ""


@real
def test_clips_caption_is_cut_between_its_start_and_end_token():
    tokenizer = tokenizers.load_tokenizer(str(REAL / "clip"))
    ids, cut = tokenizers.ended(tokenizer, "a photo of a cat", 5)
    assert ids == [49406, 320, 1125, 539, 49407] and cut.strip() == "a cat"


def test_a_sentencepiece_tokenizer_cuts_as_transformers_do(tmp_path):
    (tmp_path / "m.model").write_bytes(sentencepiece_model("umt5"))
    tokenizer = tokenizers.load_umt5(str(tmp_path / "m.model"))
    whole = tokenizer(TEXTS[0])["input_ids"]
    cut = tokenizer(TEXTS[0], truncation=True, max_length=6)["input_ids"]
    assert cut == [*whole[:5], 1] and len(whole) > 6
    assert tokenizer(TEXTS[0], truncation=True, max_length=600)["input_ids"] == whole
    assert tokenizers.ended(tokenizer, TEXTS[0], 6)[0] == cut


def test_a_weight_file_without_a_tokenizer_is_one_sentence(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "te.safetensors")
    with pytest.raises(ConfigError, match="te.safetensors holds no tokenizer"):
        tokenizers.load_umt5(str(tmp_path / "te.safetensors"))


def test_ids_are_padded_on_either_side_with_their_mask():
    assert tokenizers.padded([5, 6], 4, 0) == ([5, 6, 0, 0], [1, 1, 0, 0])
    assert tokenizers.padded([5, 6], 4, 9, left=True) == ([9, 9, 5, 6], [0, 0, 1, 1])
    assert tokenizers.padded([5, 6], 2, 9) == ([5, 6], [1, 1])
