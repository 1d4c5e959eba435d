"""Tokenizers: where they are looked for, and that those of real models give the ids of an independent implementation."""

from types import SimpleNamespace

import pytest
import torch
from oracles import SHARED
from safetensors.torch import save_file

from library.components import clip, t5, tokenizers
from library.errors import ConfigError

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


@real
def test_a_sentencepiece_model_inside_of_a_weight_file_gives_sentencepieces_own_ids(tmp_path):
    import sentencepiece

    file = REAL / "t5_old" / "spiece.model"
    raw = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    save_file({"text_encoders.umt5xxl.transformer.spiece_model": raw}, tmp_path / "te.safetensors")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for path in (tmp_path / "te.safetensors", file):
        tokenizer = tokenizers.load_t5(str(path))
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == [[*oracle.encode(text), 1] for text in TEXTS]


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


def test_a_weight_file_without_a_tokenizer_is_one_sentence(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "te.safetensors")
    with pytest.raises(ConfigError, match="te.safetensors holds no tokenizer"):
        tokenizers.load_t5(str(tmp_path / "te.safetensors"))


def test_ids_are_padded_on_either_side_with_their_mask():
    assert tokenizers.padded([5, 6], 4, 0) == ([5, 6, 0, 0], [1, 1, 0, 0])
    assert tokenizers.padded([5, 6], 4, 9, left=True) == ([9, 9, 5, 6], [0, 0, 1, 1])
    assert tokenizers.padded([5, 6], 2, 9) == ([5, 6], [1, 1])
