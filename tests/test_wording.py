"""What captions share, and how long they are to the tokenizers of real models."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from oracles import path_of
from test_doctor import examined, folder, put, scene  # noqa: F401
from transformers import AutoTokenizer

from library.data import wording
from library.data.captions import whole
from library.data.config import SubsetSpec
from library.families import anima, flux, hunyuan_video_15
from tools import check_dataset


def said(captions, measured=None):
    return list(wording.lines([wording.coverage(captions)], measured))


# ---------------------------------------------------------------- words


def test_a_word_that_few_captions_lack_is_named_with_their_files():
    captions = {f"/x/{name}.txt": "photo of a (dog)" for name in "ba"}
    captions |= {f"/x/{k}.txt": f"Photo of sks, a dog number{k}." for k in range(38)}
    assert said(captions) == [
        "words in all 40 captions: Photo, dog",
        'trigger word "sks": in 38 of 40 captions, not in b.txt, a.txt',
    ]
    for k in range(2):
        captions[f"/x/{k}.txt"] = "photo of a dog"
    assert 'trigger word "sks": in 36 of 40 captions, not in b.txt, a.txt, 0.txt, 1.txt' in said(captions)
    captions["/x/2.txt"] = "photo of a dog"
    assert said(captions) == ["words in all 40 captions: Photo, dog"]  # 35 of 40 are less than 90 %


def test_at_most_five_files_are_named_and_the_others_counted():
    captions = {f"{k}.txt": "a dog" if k < 7 else "a sks dog" for k in range(100)}
    assert said(captions)[1] == (
        'trigger word "sks": in 93 of 100 captions, not in 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more'
    )


def test_of_lists_whole_tags_are_compared():
    captions = {f"{k}.txt": f"sks, red hair, tag {k}, smile" for k in range(10)}
    captions["9.txt"] = "sks woman,red hair,  smile "
    covered = wording.coverage(captions)
    assert covered.tags and covered.in_all == ["red hair", "smile"]
    assert said(captions)[1] == 'tag "sks": in 9 of 10 captions, not in 9.txt'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1girl, red hair, smile", True),
        ("a woman in a red dress, standing on the beach, with a dog at her side", False),
        ("a woman, smiling", False),
        ("sks dog", False),
        ("", False),
    ],
)
def test_lists_of_tags_are_told_from_sentences(text, expected):
    assert wording.is_list(text) is expected


def test_no_captions_share_nothing():
    assert wording.coverage({}).words == ()
    assert said({"a.txt": "one", "b.txt": "two"}) == []


def test_the_caption_that_is_compared_has_all_of_its_tags_in_the_order_of_the_file():
    subset = SubsetSpec(
        shuffle_caption=True, caption_tag_dropout_rate=0.9, token_warmup_step=10, caption_dropout_rate=1.0,
        caption_prefix="sks,", keep_tokens_separator="|||",
    )  # fmt: skip
    assert whole("a, b ||| c, d", subset) == "sks, a, b, c, d"


def test_of_a_dataset_all_captions_and_those_of_each_subset_without_regularisation(
    folder, tmp_path, monkeypatch, capsys
):
    for k in range(3, 10):
        put(folder / f"{k}.png", scene(k))
    (folder / "4.txt").write_text("a sketch", encoding="utf-8")
    (tmp_path / "more").mkdir()
    put(tmp_path / "more" / "m.png", scene(20), "a dog")
    put(tmp_path / "more" / "n.png", scene(21), "some dog")
    (tmp_path / "reg").mkdir()
    put(tmp_path / "reg" / "r.png", scene(22), "nothing")
    more = (
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'more'}'\ncaption_extension = '.txt'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'reg'}'\ncaption_extension = '.txt'\nis_reg = true\n"
    )
    examined(folder, more)
    monkeypatch.setattr(sys, "argv", ["check_dataset.py", str(tmp_path / "data.toml"), "--json"])
    check_dataset.main()
    words = json.loads(capsys.readouterr().out)["words"]
    lacking = [{"text": "scene", "captions": 9, "lacking": [str(folder / "4.txt")]}]
    first = {"subset": str(folder), "captions": 10, "tags": False, "in_all": [], "in_most": lacking}
    second = {"subset": str(tmp_path / "more"), "captions": 2, "tags": False, "in_all": ["dog"], "in_most": []}
    assert words == [first, second]  # all 12 together share nothing
    monkeypatch.setattr(sys, "argv", sys.argv[:2])
    check_dataset.main()
    assert f'trigger word "scene": in 9 of 10 captions of {folder}, not in 4.txt' in capsys.readouterr().out


def test_a_caption_without_a_file_goes_by_the_name_of_its_picture(folder):
    for k in range(3, 10):
        put(folder / f"{k}.png", scene(k))
    (folder / "5.txt").unlink()
    (one,) = wording.of_dataset(examined(folder, "class_tokens = 'cat'\n").dataset)
    assert one.in_most == [wording.Word("scene", 9, (str(folder / "5.png"),))]


# ---------------------------------------------------------------- tokens


def real(name):
    return AutoTokenizer.from_pretrained(path_of(f"tokenizers/{name}"))


def test_each_encoder_counts_and_the_one_that_the_model_cuts_by_says_how_many_are_too_long():
    clip, t5 = real("clip"), real("t5")
    long = "a photo of a cat " * 130  # 5 tokens of CLIP's each: 320, 1125, 539, 320, 2368 in OpenAI's vocabulary
    captions = {"a.png": "a photo of a cat", "b.png": long, "c.png": ""}
    out = wording.lengths(captions, {"clip_l": clip, "t5xxl": t5}, flux.FLUX.tokenize)
    assert [own["clip_l"] for own in out.tokens.values()] == [5, 650, 0]
    ids = t5(long)["input_ids"][:-1]
    assert [own["t5xxl"] for own in out.tokens.values()][1:] == [len(ids), 0] and len(ids) > 511
    assert out.ends == {"b.png": t5.decode(ids[511:])} and out.over == {"clip_l": None, "t5xxl": 1}
    assert out.summary()["clip_l"] == {"longest": 650, "longest_file": "b.png", "median": 5, "over": None}
    assert list(wording.lines([], out))[1:] == [
        "  clip_l: longest 650 (b.png), median 5",
        f"  t5xxl: longest {len(ids)} (b.png), median {out.tokens['a.png']['t5xxl']}, 1 longer than the model reads",
    ]


def test_where_a_model_cuts_by_two_tokenizers_each_has_its_own_number():
    tokenizers = {"qwen3": real("qwen3"), "t5": real("t5_old")}
    captions = {f"{n}.png": " ".join(["cat"] * n) for n in (2, 4, 5, 9)}
    counts = {n: {k: len(one(t, add_special_tokens=False)["input_ids"]) for k, t in captions.items()}
              for n, one in tokenizers.items()}  # fmt: skip
    out = wording.lengths(captions, tokenizers, partial(anima.tokenize, lengths=(4, 8)))
    room = {"qwen3": 4, "t5": 7}  # T5 ends every text with a token
    assert out.over == {n: sum(c > room[n] for c in own.values()) for n, own in counts.items()}
    assert out.over["qwen3"] == 2 and out.over["t5"] == 1
    assert set(out.ends) == {"5.png", "9.png"}


def test_a_model_that_cuts_its_template_counts_too():
    tokenizers = {"text_encoder": real("qwen25"), "byt5": real("byt5")}
    captions = {"a.png": "a cat", "b.png": "cat " * 1200}
    out = wording.lengths(captions, tokenizers, hunyuan_video_15.tokenize)
    assert out.over == {"text_encoder": 1, "byt5": None} and set(out.ends) == {"b.png"}
    assert [own["byt5"] for own in out.tokens.values()] == [5, 4800]  # bytes


def test_what_a_family_puts_before_a_caption_is_measured_against_its_limit_and_not_counted():
    def words(text, add_special_tokens=True):
        return {"input_ids": text.split()}

    def tokenize(tokenizers, caption):
        ids = tokenizers[0](caption)["input_ids"]
        return ids[:3], tokenizers[0].decode(ids[3:])

    class Words(SimpleNamespace):
        __call__ = staticmethod(words)
        decode = staticmethod(" ".join)

    out = wording.lengths({"a": "one two", "b": "one"}, {"w": Words()}, tokenize, lambda text: f"draw now {text}")
    assert out.tokens == {"a": {"w": 2}, "b": {"w": 1}} and out.ends == {"a": "two"} and out.over == {"w": 1}
