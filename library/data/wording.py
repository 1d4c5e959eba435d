"""What the captions of a dataset say: which words nearly all of them share, how many tokens each has; no torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.findings import final_caption, one_a_file
from library.data.items import SHOWN, names

if TYPE_CHECKING:
    from library.data.dataset import Dataset
    from library.data.items import Item
    from library.families.family import Family

MOST = 0.9  # part of the captions from which on a word was probably meant for all of them
TAG_WORDS = 3  # a piece between commas that is a tag has on average no more words
LISTED = 20  # words of one line
EDGES = ".,;:!?\"'()[]{}“”‘’…"  # belong to the sentence, not to the word
COMMON = frozenset(  # English words that say nothing about a picture
    "a an the of in on at to from by with and or as is are was be it its this that his her their for into".split()
)


# ---------------------------------------------------------------- words


@dataclass(frozen=True)
class Word:
    text: str  # as it is spelled most often
    have: int  # captions
    lacking: tuple[str, ...]  # keys of those without it, SHOWN at most


@dataclass(frozen=True)
class Coverage:
    """Of one subset, or of all of them."""

    captions: int
    tags: bool  # the captions are lists of tags; a word is then a whole tag
    words: tuple[Word, ...]  # in at least MOST of the captions; those in all come first
    subset: str = ""  # "" = all

    @property
    def in_all(self) -> list[str]:
        return [word.text for word in self.words if word.have == self.captions]

    @property
    def in_most(self) -> list[Word]:
        return [word for word in self.words if word.have < self.captions]


def coverage(captions: Mapping[str, str], subset: str = "") -> Coverage:
    """Key -> caption. Upper and lower case are the same; at least half of the captions being lists makes them tags."""
    tags = 2 * sum(is_list(text) for text in captions.values()) >= max(len(captions), 1)
    spelled: dict[str, Counter[str]] = {}
    own: dict[str, set[str]] = {}
    for key, text in captions.items():
        pieces = _tags(text) if tags else _words(text)
        for piece in pieces:
            spelled.setdefault(piece.casefold(), Counter())[piece] += 1
        own[key] = {piece.casefold() for piece in pieces}
    have = Counter(piece for pieces in own.values() for piece in pieces)
    found = [piece for piece in spelled if have[piece] >= MOST * len(captions)]  # in the order of the first caption
    words = tuple(
        Word(spelled[p].most_common(1)[0][0], have[p], tuple([key for key in own if p not in own[key]][:SHOWN]))
        for p in sorted(found, key=lambda p: -have[p])
    )
    return Coverage(len(captions), tags, words, subset)


def is_list(text: str) -> bool:
    """Whether it is a list of tags: three pieces or more between commas, and short ones."""
    pieces = _tags(text)
    return len(pieces) > 2 and len(text.split()) <= TAG_WORDS * len(pieces)


def _tags(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _words(text: str) -> list[str]:
    words = (word.strip(EDGES) for word in text.split())
    return [word for word in words if word and word.casefold() not in COMMON]


def of_dataset(dataset: Dataset) -> list[Coverage]:
    """Of all captions, then of each subset where there are several; without regularisation pictures. A caption of a
    file of its own goes by the name of that, another by its picture's. One caption alone says nothing."""
    items = [item for item in one_a_file((*dataset.items, *dataset.validation)) if not item.is_reg]
    sources = list(dict.fromkeys(item.subset.source for item in items))
    groups = [("", items)]
    if len(sources) > 1:
        groups += [(source, [item for item in items if item.subset.source == source]) for source in sources]
    found = (
        coverage({_place(item): final_caption(item) for item in own}, source) for source, own in groups if len(own) > 1
    )
    return [one for one in found if one.words]


def _place(item: Item) -> str:
    beside = item.path.with_suffix(item.subset.caption_extension)
    return str(beside) if not item.subset.metadata_file and beside.is_file() else item.file


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Lengths:
    """Tokens are of the caption alone, without what the model puts around it."""

    tokens: Mapping[str, Mapping[str, int]]  # key -> tokenizer -> tokens of the caption
    ends: Mapping[str, str]  # key -> the end of its caption that the model does not read
    over: Mapping[str, int | None]  # tokenizer -> captions longer than it takes; None = the model does not say

    def summary(self) -> dict[str, dict[str, Any]]:
        """Tokenizer -> its longest caption and where, the median, how many are too long."""
        out = {}
        for name, over in self.over.items():
            counts = {key: own[name] for key, own in self.tokens.items()}
            where = max(counts, key=counts.__getitem__, default="")
            median = statistics.median(counts.values()) if counts else 0
            out[name] = {"longest": counts.get(where, 0), "longest_file": where, "median": median, "over": over}
        return out


@dataclass
class Watched:
    """A tokenizer that notes whether it was asked and what it was told to write out, which is what is cut."""

    tokenizer: Any
    asked: bool = False
    cut: list[str] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        return self.tokenizer(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        text = self.tokenizer.decode(*args, **kwargs)
        self.cut += [text] if text else []
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def lengths(
    captions: Mapping[str, str],
    tokenizers: Mapping[str, Any],
    tokenize: Callable[[list[Any], str], tuple[Any, str]],
    caption_text: Callable[[str], str] = lambda caption: caption,
) -> Lengths:
    """Key -> caption; name -> tokenizer, in the family's order; the family's two functions. Each caption once."""
    watched = [Watched(one) for one in tokenizers.values()]
    counts: dict[str, dict[str, int]] = {}
    ends: dict[str, str] = {}
    longer = {text: [0] * len(watched) for text in captions.values()}
    for text in longer:
        counts[text] = {name: len(one(text, add_special_tokens=False)["input_ids"]) for name, one in tokenizers.items()}
        for one in watched:
            one.cut.clear()
        ends[text] = tokenize(watched, caption_text(text))[1]
        longer[text] = [int(bool(one.cut)) for one in watched]
    over = {
        name: sum(longer[text][n] for text in captions.values()) if watched[n].asked else None
        for n, name in enumerate(tokenizers)
    }
    cut = {key: ends[text] for key, text in captions.items() if ends[text]}
    return Lengths({key: counts[text] for key, text in captions.items()}, cut, over)


def measured(dataset: Dataset, family: Family, tokenizers: list[Any]) -> Lengths:
    """Of every caption as it is trained without shuffling and dropout, by file; tokenizers in the family's order."""
    own = [part.name if where is part.tokenizer else where.option for where, part in family.tokenizers]
    texts = {item.file: final_caption(item) for item in (*dataset.items, *dataset.validation)}
    return lengths(texts, dict(zip(own, tokenizers, strict=True)), family.tokenize, family.caption_text)


# ---------------------------------------------------------------- in words


def lines(covered: list[Coverage], measured: Lengths | None) -> Iterator[str]:
    """For people."""
    if measured is not None:
        yield "tokens of the captions, without what the model puts around them:"
        for name, one in measured.summary().items():
            over = "" if one["over"] is None else f", {one['over']} longer than the model reads"
            where = f" ({Path(one['longest_file']).name})" if one["longest_file"] else ""
            yield f"  {name}: longest {one['longest']}{where}, median {one['median']:g}{over}"
    for one in covered:
        what = f"{one.captions} captions{one.subset and f' of {one.subset}'}"
        if one.in_all:
            yield f"{'tags' if one.tags else 'words'} in all {what}: {names(one.in_all, LISTED)}"
        for word in one.in_most:
            lacking = len(word.lacking), one.captions - word.have
            more = f" and {lacking[1] - lacking[0]} more" if lacking[1] > lacking[0] else ""
            files = ", ".join(Path(key).name for key in word.lacking)
            kind = "tag" if one.tags else "trigger word"
            yield f'{kind} "{word.text}": in {word.have} of {what}, not in {files}{more}'


def told(found: Lengths) -> str:
    """What a run says of its captions before anything is encoded: tokens, how many are cut, the first by name."""
    shown = [f"  {Path(file).name}: ... {rest[:60]!r}" for file, rest in list(found.ends.items())[:SHOWN]]
    cut = f"captions: {len(found.ends)} of {len(found.tokens)} are longer than the model reads and are cut"
    return "\n".join([*lines([], found), cut, *shown])


def as_dict(one: Coverage) -> dict[str, Any]:
    """For machines."""
    return {
        "subset": one.subset,
        "captions": one.captions,
        "tags": one.tags,
        "in_all": one.in_all,
        "in_most": [{"text": w.text, "captions": w.have, "lacking": list(w.lacking)} for w in one.in_most],
    }
