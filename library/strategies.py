"""How latents and text outputs are had: cached in memory, cached on disk, or made in the step. One interface each.

Cached latents are rounded to float16 in memory as on disk (2 bytes a value; normalised latents are of order 1, where
float16's 10 bits of mantissa err 8 times less than bfloat16's 7), so that both give the same losses.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.checkpoints import path_of
from library.components.tokenizers import tokenizer_paths
from library.data import cache_start, controls, images
from library.data.cache import ContentHashes, Store
from library.data.cache_start import Progress
from library.data.captions import is_changing, variants, whole
from library.data.dataset import item_rng
from library.data.first_frames import FirstFrame
from library.data.images import to_tensor
from library.errors import ConfigError, DatasetError
from library.families.family import ItemInput, Text
from library.memory.precision import text_recipe

if TYPE_CHECKING:
    from library.data.dataset import Dataset, Item
    from library.families.family import Cond, Family, PartlyLive

STORED = torch.float16
RECIPE = 1  # raised when the same inputs begin to give other latents or text
AHEAD = 2 * 1024**3  # bytes of pixels that may wait for the VAE


def cache_folder(options: Any, dataset: Dataset) -> Path:
    """--cache_dir, else `.lorasmith` beside the first pictures."""
    if options.cache_dir:
        return Path(options.cache_dir)
    return dataset.items[0].subset.folder / ".lorasmith"


# ---------------------------------------------------------------- latents


@dataclass
class Loaded:
    """One item, ready for a batch."""

    tensor: Tensor  # latents [C,h,w] float32, or pixels [3,H,W] in -1..1; a video model's have F before h or H
    mask: Tensor | None  # [h,w] or [H,W] in 0..1
    extra: Any  # its Cond from the cache, or the ItemInput that its Cond is made of


@dataclass(frozen=True)
class Encoders:
    """What turns pictures into conditioning, loaded when it is first asked for."""

    vae: Callable[[], torch.nn.Module]
    images: Callable[[], list[torch.nn.Module]]

    def item(self, family: Family, given: ItemInput, device: Any) -> Cond:
        """What conditions an item besides its text; nothing for most families."""
        if family.encode_item is None:
            return {}
        pixels = None if given.pixels is None else given.pixels.to(device)
        given = replace(given, pixels=pixels, controls=tuple(one.to(device) for one in given.controls))
        return family.encode_item(self.vae(), self.images(), given)


def load_item(item: Item, rng: random.Random, flip: bool | None = None) -> tuple[ItemInput, Tensor | None]:
    """The pixels, controls and facts of an item, and its mask [H,W]."""
    loaded = images.load(item, rng, flip)
    given = ItemInput(
        pixels=to_tensor(loaded.pixels),
        controls=controls.load(item, loaded.flipped),
        original_size=item.size,
        crop=loaded.crop,
        size=item.placement.bucket,
        frames=max(1, item.frames),
    )
    return given, None if loaded.mask is None else torch.from_numpy(loaded.mask)


def stored(cond: Cond) -> Cond:
    """As the caches hold it: float16, but single numbers (sizes, guidance) exactly."""
    halve = {name: value.ndim > 1 and value.dtype == torch.float32 for name, value in cond.items()}
    return {n: v.to("cpu", STORED if halve[n] else v.dtype).clone().contiguous() for n, v in cond.items()}


class LiveLatents:
    """Pictures are loaded for the step and encoded in it."""

    cached = False

    def __init__(self, family: Family, encoders: Encoders, batch: int) -> None:
        self.family, self.encoders, self.batch = family, encoders, max(1, batch)

    def picture(self, item: Item, rng: random.Random) -> Loaded:
        given, mask = load_item(item, rng)
        return Loaded(given.pixels, mask, given)

    def finish(self, pixels: Tensor, extras: list[ItemInput]) -> tuple[Tensor, list[Cond]]:
        """[B,3,H,W] -> latents [B,C,h,w] float32, `--vae_batch_size` at a time, and what else conditions each item."""
        vae = self.encoders.vae()
        with torch.no_grad():
            latents = torch.cat([self.family.encode_image(vae, part) for part in pixels.split(self.batch)])
            conds = [self.encoders.item(self.family, given, pixels.device) for given in extras]
        return latents, conds


class CachedLatents:
    """Latents by item and mirroring, in memory or in a store."""

    cached = True

    def __init__(self, identities: dict[tuple[int, bool], str], store: Store | None) -> None:
        self.identities, self.store, self.memory = identities, store, {}

    def get(self, index: int, flipped: bool = False) -> Tensor:
        """[C,h,w] float32."""
        return self.entry(index, flipped)["latents"].float()

    def entry(self, index: int, flipped: bool = False) -> Cond:
        """The latents as they are stored, and beside them what else conditions the item."""
        key = (index, flipped)
        if self.store is None:
            return self.memory[key]
        return _whole(self.store, self.identities[key])

    def picture(self, item: Item, rng: random.Random) -> Loaded:
        flipped = item.subset.flip_aug and rng.random() < 0.5
        mask = None
        if item.mask_path is not None or item.subset.alpha_mask:  # masks are small: read anew instead of cached
            mask = torch.from_numpy(images.load(item, rng, flip=flipped).mask)
        cond = dict(self.entry(item.index, flipped))
        return Loaded(cond.pop("latents").float(), mask, cond)

    def finish(self, latents: Tensor, extras: list[Cond]) -> tuple[Tensor, list[Cond]]:
        return latents, [{name: value.to(latents.device) for name, value in cond.items()} for cond in extras]


def latent_source(
    dataset: Dataset,
    family: Family,
    encoders: Encoders,
    options: Any,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
) -> LiveLatents | CachedLatents:
    """What the options ask for; this process's share of the caching happens here. Loads the VAE only if needed."""
    if not options.cache_latents:
        return LiveLatents(family, encoders, options.vae_batch_size)
    folder = cache_folder(options, dataset)
    jobs = latent_jobs(dataset)
    identities = latent_identities(jobs, family, options, folder if options.cache_latents_to_disk else None)
    store, share = Store(folder / "latents") if options.cache_latents_to_disk else None, jobs
    source = CachedLatents(identities, store)
    if store is not None:  # in memory every process encodes what it needs itself
        share = jobs[rank::world]  # before looking: what others write meanwhile must not shift the shares
        jobs = [job for job in share if store.get(identities[job[0].index, job[1]]) is None]
    if store is not None and rank == 0:
        files = {identities[item.index, flip]: item.file for item, flip in latent_jobs(dataset)}
        rest = cache_start.told("latents", store, files, [identities[item.index, flip] for item, flip in jobs])
        say(f"latents: {len(share) - len(jobs)} of {len(share)} were cached{rest}")
    if jobs:
        what = "latents of this process" if store and world > 1 else "latents"
        pixels = sum(math.prod(item.bucket) for item, _ in jobs)
        forecast = Progress(what, len(jobs), pixels, store and store.folder, say if rank == 0 else lambda text: None)
        encode_latents(jobs, source, family, encoders, max(1, options.vae_batch_size), forecast)
    return source


def latent_jobs(dataset: Dataset) -> list[tuple[Item, bool]]:
    """What is encoded: every item, and mirrored where flip_aug is on."""
    return [
        (item, flip)
        for item in (*dataset.items, *dataset.validation)
        for flip in ((False, True) if item.subset.flip_aug else (False,))
    ]


def latent_identities(
    jobs: list[tuple[Item, bool]], family: Family, options: Any, folder: Path | None
) -> dict[tuple[int, bool], str]:
    """Everything that decides what is cached for an item: encoders, file contents, preprocessing."""
    hashes = ContentHashes(folder)
    parts = (family.vae, *family.image_encoders)
    made_by = " ".join(hashes.of_tree(Path(path_of(part, options))) for part in parts)
    recipe = f" {family.recipe}" if family.recipe else ""
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(lambda job: (images.content(job[0], hashes), controls.identity(job[0], hashes)), jobs))
    hashes.write()
    return {
        (item.index, flip): f"latents {RECIPE} {family.name}{recipe} vae {made_by} picture {content} flip {flip} "
        f"{images.preprocessing_key(item)}{beside}"
        for (item, flip), (content, beside) in zip(jobs, contents, strict=True)
    }


def encode_latents(
    jobs: list[tuple[Item, bool]],
    source: CachedLatents,
    family: Family,
    encoders: Encoders,
    size: int,
    forecast: Progress,
) -> None:
    """Encode pictures in batches of one bucket; threads decode the next pictures and write the last ones meanwhile."""
    order = sorted(jobs, key=lambda job: job[0].bucket)
    batches: list[list[tuple[Item, bool]]] = []
    for job in order:
        if batches and len(batches[-1]) < size and batches[-1][0][0].bucket == job[0].bucket:
            batches[-1].append(job)
        else:
            batches.append([job])
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as writer:
        waiting: deque[tuple[list, list[Future]]] = deque()
        written: deque[Future] = deque()
        todo = iter(batches)
        for batch in todo:
            waiting.append((batch, [readers.submit(_pixels, item, flip) for item, flip in batch]))
            if len(waiting) < 3 and sum(_bytes(one) for one, _ in waiting) < AHEAD:  # memory stays bounded
                continue
            _encode_one(*waiting.popleft(), source, family, encoders, writer, written, forecast)
        while waiting:
            _encode_one(*waiting.popleft(), source, family, encoders, writer, written, forecast)
        while written:
            written.popleft().result()


def _bytes(batch: list[tuple[Item, bool]]) -> int:
    """Of the pixels of a batch, which are float32."""
    return sum(12 * math.prod(item.bucket) for item, _ in batch)


def _pixels(item: Item, flip: bool) -> ItemInput:
    return load_item(item, item_rng(0, 0, 0, 0), flip=flip)[0]


def _encode_one(
    batch: list,
    futures: list[Future],
    source: CachedLatents,
    family: Family,
    encoders: Encoders,
    writer: ThreadPoolExecutor,
    written: deque[Future],
    forecast: Progress,
) -> None:
    given, vae = [future.result() for future in futures], encoders.vae()
    device = next(vae.parameters()).device
    pixels = given[0].pixels[None] if len(given) == 1 else torch.stack([one.pixels for one in given])  # may be large
    try:
        pixels = pixels.to(device)
        with torch.no_grad():
            latents = family.encode_image(vae, pixels).to("cpu", STORED).contiguous()
            conds = [encoders.item(family, one, device) for one in given]
    except Exception as error:
        error.items = [item for item, _ in batch]  # for the sentence about a failure
        raise
    for (item, flip), value, cond in zip(batch, latents, conds, strict=True):
        if not torch.isfinite(value).all():
            raise DatasetError(
                f"{item.path}: the VAE gives latents that are not finite numbers; is the picture or the VAE damaged?"
            )
        entry = {"latents": value.clone(), **stored(cond)}
        forecast.add(1, math.prod(item.bucket), sum(one.nbytes for one in entry.values()))
        if source.store is None:
            source.memory[item.index, flip] = entry
        else:
            written.append(writer.submit(source.store.put, source.identities[item.index, flip], entry))
    while len(written) > 64:
        written.popleft().result()


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Request:
    """What the text encoders are asked for: a text, and the files of the pictures that they see with it."""

    caption: str
    files: tuple[str, ...] = ()
    is_still: bool = False  # of a picture, where a video model has other words around a picture's caption
    first: FirstFrame | None = None  # of the video, where the encoders see it

    @classmethod
    def of(
        cls,
        family: Family,
        caption: str,
        controls: Iterable[Any] = (),
        frames: int = 0,
        first: FirstFrame | None = None,
    ) -> Request:
        """For a caption or a prompt, with what the family puts around it."""
        files = tuple(map(str, controls)) if family.text_pictures else ()
        is_still = family.encode_still is not None and frames == 1
        return cls(family.caption_text(caption), files, is_still, first if family.text_frame else None)

    @classmethod
    def of_item(cls, family: Family, caption: str, item: Item) -> Request:
        first = FirstFrame.of_item(item) if family.text_frame else None
        return cls.of(family, caption, item_controls(item), item.frames, first)

    def encoder(self, family: Family) -> Callable[..., Cond]:
        """(text encoders, tokenizers, Text, device) -> Cond."""
        return family.encode_still if self.is_still else family.encode

    def text(self, family: Family) -> Text:
        if self.first:
            return Text(self.caption, (family.text_frame(to_tensor(self.first.pixels())),))
        if not self.files:
            return Text(self.caption)
        return Text(self.caption, family.text_pictures(tuple(to_tensor(images.decode(f)[0]) for f in self.files)))


class LiveText:
    """Captions are encoded when the step asks for them."""

    cached = False

    def __init__(
        self, family: Family, load_encoders: Callable[..., tuple[list, list]], is_trained: bool = False
    ) -> None:
        self.family, self.load_encoders, self.is_trained = family, load_encoders, is_trained
        self.kept = tuple(part.name for part in family.text_encoders)  # names of those that the loop needs

    def get(self, request: Request) -> Cond:
        """On the encoders' device, with gradients where the encoders are trained."""
        encoders, tokenizers = self.load_encoders()
        device = next(encoders[0].parameters()).device
        with torch.set_grad_enabled(self.is_trained and torch.is_grad_enabled()):
            return request.encoder(self.family)(encoders, tokenizers, request.text(self.family), device)


class CachedText:
    """Text outputs by caption, each once, at true length; completed in the step where a family caches a part."""

    cached = True

    def __init__(
        self, rule: PartlyLive | None = None, load_encoders: Callable[..., tuple[list, list]] | None = None
    ) -> None:
        self.memory: dict[Request, Cond] = {}
        self.rule, self.load_encoders, self.kept = rule, load_encoders, rule.encoders if rule else ()

    def get(self, request: Request) -> Cond:
        if self.rule is None:
            return self.memory[request]
        encoders = self.load_encoders(self.kept)[0]
        device = next(encoders[0].parameters()).device
        with torch.no_grad():
            return self.rule.complete(encoders, {k: v.to(device) for k, v in self.memory[request].items()})


def plain_caption(item: Item) -> str:
    """An item's caption with all of its tags and without anything random, as validation uses it."""
    return whole(item.caption, item.subset)


def text_source(
    dataset: Dataset,
    family: Family,
    load_encoders: Callable[..., tuple[list, list]],
    options: Any,
    extra: Iterable[Request] = (),
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
    is_trained: bool = False,
    wait: Callable[[], None] = lambda: None,
) -> LiveText | CachedText:
    """What the options ask for. Captions that change at random cannot be cached and are refused by name.

    A cache on disk is made by all processes together: each encodes its share, then `wait`s for the others'.
    """
    if not options.cache_text_encoder_outputs:
        return LiveText(family, load_encoders, is_trained)
    requests = text_requests(dataset, family, extra)
    source = CachedText(family.partly_live, load_encoders)
    store, identities = None, {}
    if options.cache_text_encoder_outputs_to_disk:
        folder = cache_folder(options, dataset)
        store, identities = Store(folder / "text"), text_identities(requests, family, options, folder)
        for request in requests:
            found = store.get(identities[request])
            if found is not None:
                source.memory[request] = found
    missing = [request for request in requests if request not in source.memory]
    if rank == 0:
        files = {identities[request]: file for request, file in requests.items()} if store else {}
        rest = cache_start.told("text", store, files, [identities[one] for one in missing]) if store else ""
        say(f"text: {len(requests)} captions and prompts, {len(requests) - len(missing)} were cached{rest}")
    share = list(requests)[rank::world] if store else list(requests)  # of all: others write meanwhile
    if todo := [request for request in share if request not in source.memory]:
        what = "text of this process" if store and world > 1 else "text"
        tell = say if rank == 0 else lambda text: None
        forecast = Progress(what, len(todo), len(todo), store and store.folder, tell)
        _encode_texts(todo, source, family, load_encoders, store, identities, forecast)
    if store and world > 1:
        wait()
        source.memory |= {one: _whole(store, identities[one]) for one in requests if one not in source.memory}
    return source


def _whole(store: Store, identity: str) -> Cond:
    """An entry that was just looked for or written. Raises DatasetError."""
    found = store.get(identity)
    if found is None:
        raise DatasetError(
            f"a cached entry vanished or was damaged during the run ({store.path(identity)}); start again, it will be "
            "made anew"
        )
    return found


def text_requests(dataset: Dataset, family: Family, extra: Iterable[Request] = ()) -> dict[Request, str]:
    """What is encoded -> the file that it belongs to, "" for a prompt. Raises ConfigError for changing captions."""
    requests = dict.fromkeys(extra, "")
    for item in (*dataset.items, *dataset.validation):
        if changing := is_changing(item.subset):
            raise ConfigError(
                f"--cache_text_encoder_outputs: {', '.join(changing)} of {item.subset.source} give a picture "
                "a new caption in every step; switch them off or do not cache text outputs"
            )
        for caption in variants(item.caption, item.subset):
            requests.setdefault(Request.of_item(family, caption, item), item.file)
    return requests


def item_controls(item: Item) -> tuple[Path, ...]:
    """The files of an item's control pictures."""
    return item.controls


def text_identities(requests: Iterable[Request], family: Family, options: Any, folder: Path) -> dict[Request, str]:
    """Everything that decides a text output: encoders, tokenizers, caption, the contents of its pictures."""
    hashes = ContentHashes(folder)
    files = [path_of(part, options) for part in family.text_encoders]
    files += [path for path, _ in tokenizer_paths(family, options)]
    files += (options.base_weights or []) if family.text_prefixes else []  # which may change the text encoders
    recipe = f" {family.recipe}" if family.recipe else ""
    recipe += "".join(f" {part.name} {held}" for part in family.text_encoders if (held := text_recipe(options, part)))
    made_by = f"text {RECIPE} {family.name}{recipe} {' '.join(hashes.of_tree(Path(path)) for path in files)}"
    seen = {file: hashes.of(Path(file)) for file in {file for request in requests for file in request.files}}
    firsts = {first: f" first {first.identity(hashes)}" for request in requests if (first := request.first)}
    hashes.write()

    def beside(request: Request) -> str:
        pictures = "".join(f" picture {seen[file]}" for file in request.files)
        return pictures + " still" * request.is_still + firsts.get(request.first, "")

    return {request: f"{made_by}{beside(request)} caption {request.caption}" for request in requests}


def _encode_texts(
    requests: list[Request],
    source: CachedText,
    family: Family,
    load_encoders: Callable,
    store: Store | None,
    identities: dict[Request, str],
    forecast: Progress,
) -> None:
    encoders, tokenizers = load_encoders()
    device = next(encoders[0].parameters()).device
    for request in requests:
        encode = source.rule.encode if source.rule else request.encoder(family)
        with torch.no_grad():
            given = encode(encoders, tokenizers, request.text(family), device)
        cond = {name: value.cpu().contiguous() for name, value in given.items()}
        if not all(torch.isfinite(value).all() for value in cond.values()):
            raise DatasetError(f"the text encoder gives no finite numbers for the caption {request.caption[:80]!r}")
        source.memory[request] = cond
        forecast.add(1, 1, sum(value.nbytes for value in cond.values()))
        if store is not None:
            store.put(identities[request], cond)
