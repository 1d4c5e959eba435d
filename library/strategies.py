"""How latents and text outputs are had: cached in memory, cached on disk, or made in the step. One interface each.

Cached latents are rounded to float16 in memory as on disk (2 bytes a value; normalised latents are of order 1, where
float16's 10 bits of mantissa err 8 times less than bfloat16's 7), so that both give the same losses.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from library.data import images
from library.data.cache import ContentHashes, Store
from library.data.captions import is_changing, variants
from library.data.dataset import item_rng
from library.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from library.data.dataset import Dataset, Item
    from library.families.family import Cond, Family

STORED = torch.float16
RECIPE = 1  # raised when the same inputs begin to give other latents or text


def cache_folder(options: Any, dataset: Dataset) -> Path:
    """--cache_dir, else `.lorasmith` beside the first pictures."""
    if options.cache_dir:
        return Path(options.cache_dir)
    subset = dataset.items[0].subset
    return (Path(subset.image_dir) if subset.image_dir else Path(subset.metadata_file).parent) / ".lorasmith"


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [H,W,3] -> float32 [3,H,W] in -1..1."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float().div_(127.5).sub_(1)


# ---------------------------------------------------------------- latents


class LiveLatents:
    """Pictures are loaded for the step and encoded in it."""

    cached = False

    def __init__(self, family: Family, load_vae: Callable[[], torch.nn.Module], batch: int) -> None:
        self.family, self.load_vae, self.batch = family, load_vae, max(1, batch)

    def picture(self, item: Item, rng: random.Random) -> tuple[Tensor, Tensor | None]:
        loaded = images.load(item, rng)
        return to_tensor(loaded.pixels), None if loaded.mask is None else torch.from_numpy(loaded.mask)

    def finish(self, pixels: Tensor) -> Tensor:
        """[B,3,H,W] -> latents [B,C,h,w] float32, `--vae_batch_size` at a time."""
        vae = self.load_vae()
        with torch.no_grad():
            return torch.cat([self.family.encode_image(vae, part) for part in pixels.split(self.batch)])


class CachedLatents:
    """Latents by item and mirroring, in memory or in a store."""

    cached = True

    def __init__(self, identities: dict[tuple[int, bool], str], store: Store | None) -> None:
        self.identities, self.store, self.memory = identities, store, {}

    def get(self, index: int, flipped: bool = False) -> Tensor:
        """[C,h,w] float32."""
        key = (index, flipped)
        if self.store is None:
            return self.memory[key].float()
        found = self.store.get(self.identities[key])
        if found is None:
            raise DatasetError(
                f"a cached latent vanished or was damaged during the run ({self.store.path(self.identities[key])}); "
                "start again, it will be made anew"
            )
        return found["latents"].float()

    def picture(self, item: Item, rng: random.Random) -> tuple[Tensor, Tensor | None]:
        flipped = item.subset.flip_aug and rng.random() < 0.5
        mask = None
        if item.mask_path is not None or item.subset.alpha_mask:  # masks are small: read anew instead of cached
            mask = torch.from_numpy(images.load(item, rng, flip=flipped).mask)
        return self.get(item.index, flipped), mask

    def finish(self, latents: Tensor) -> Tensor:
        return latents


def latent_source(
    dataset: Dataset,
    family: Family,
    load_vae: Callable[[], torch.nn.Module],
    options: Any,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
) -> LiveLatents | CachedLatents:
    """What the options ask for; this process's share of the caching happens here. Loads the VAE only if needed."""
    if not options.cache_latents:
        return LiveLatents(family, load_vae, options.vae_batch_size)
    folder = cache_folder(options, dataset)
    hashes = ContentHashes(folder if options.cache_latents_to_disk else None)
    vae = hashes.of_tree(Path(getattr(options, family.vae.option)))
    jobs = [
        (item, flip)
        for item in (*dataset.items, *dataset.validation)
        for flip in ((False, True) if item.subset.flip_aug else (False,))
    ]
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(lambda job: hashes.of(job[0].path), jobs))
    identities = {
        (
            item.index,
            flip,
        ): f"latents {RECIPE} {family.name} vae {vae} picture {content} flip {flip} {images.preprocessing_key(item)}"
        for (item, flip), content in zip(jobs, contents, strict=True)
    }
    hashes.write()
    store, share = Store(folder / "latents") if options.cache_latents_to_disk else None, jobs
    source = CachedLatents(identities, store)
    if store is not None:  # in memory every process encodes what it needs itself
        share = jobs[rank::world]  # before looking: what others write meanwhile must not shift the shares
        jobs = [job for job in share if store.get(identities[job[0].index, job[1]]) is None]
    if jobs:
        encode_latents(jobs, source, family, load_vae(), max(1, options.vae_batch_size))
    if store is not None and rank == 0:
        note = f", {store.damaged} damaged files made anew" if store.damaged else ""
        say(f"latents: {len(share) - len(jobs)} of {len(share)} were cached{note}")
    return source


def encode_latents(
    jobs: list[tuple[Item, bool]], source: CachedLatents, family: Family, vae: torch.nn.Module, size: int
) -> None:
    """Encode pictures in batches of one bucket; threads decode the next pictures and write the last ones meanwhile."""
    order = sorted(jobs, key=lambda job: job[0].placement.bucket)
    batches: list[list[tuple[Item, bool]]] = []
    for job in order:
        if batches and len(batches[-1]) < size and batches[-1][0][0].placement.bucket == job[0].placement.bucket:
            batches[-1].append(job)
        else:
            batches.append([job])
    device = next(vae.parameters()).device
    with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as writer:
        waiting: deque[tuple[list, list[Future]]] = deque()
        written: deque[Future] = deque()
        todo = iter(batches)
        for batch in todo:
            waiting.append((batch, [readers.submit(_pixels, item, flip) for item, flip in batch]))
            if len(waiting) < 3 and len(batches) > len(waiting):  # two batches ahead, no more: memory stays bounded
                continue
            _encode_one(*waiting.popleft(), source, family, vae, device, writer, written)
        while waiting:
            _encode_one(*waiting.popleft(), source, family, vae, device, writer, written)
        while written:
            written.popleft().result()


def _pixels(item: Item, flip: bool) -> Tensor:
    return to_tensor(images.load(item, item_rng(0, 0, 0, 0), flip=flip).pixels)


def _encode_one(
    batch: list,
    futures: list[Future],
    source: CachedLatents,
    family: Family,
    vae: Any,
    device: Any,
    writer: ThreadPoolExecutor,
    written: deque[Future],
) -> None:
    pixels = torch.stack([future.result() for future in futures]).to(device)
    with torch.no_grad():
        latents = family.encode_image(vae, pixels).to("cpu", STORED).contiguous()
    for (item, flip), value in zip(batch, latents, strict=True):
        if not torch.isfinite(value).all():
            raise DatasetError(
                f"{item.path}: the VAE gives latents that are not finite numbers; is the picture or the VAE damaged?"
            )
        if source.store is None:
            source.memory[item.index, flip] = value.clone()
        else:
            written.append(
                writer.submit(source.store.put, source.identities[item.index, flip], {"latents": value.clone()})
            )
    while len(written) > 64:
        written.popleft().result()


# ---------------------------------------------------------------- text


class LiveText:
    """Captions are encoded when the step asks for them."""

    cached = False

    def __init__(self, family: Family, load_encoders: Callable[[], tuple[list, list]]) -> None:
        self.family, self.load_encoders = family, load_encoders

    def get(self, caption: str) -> Cond:
        encoders, tokenizers = self.load_encoders()
        return self.family.encode(encoders, tokenizers, caption, next(encoders[0].parameters()).device)


class CachedText:
    """Text outputs by caption, each once, at true length."""

    cached = True

    def __init__(self) -> None:
        self.memory: dict[str, Cond] = {}

    def get(self, caption: str) -> Cond:
        return self.memory[caption]


def plain_caption(item: Item) -> str:
    """An item's caption without anything random, as validation uses it."""
    return variants(item.caption, item.subset)[0]


def text_source(
    dataset: Dataset,
    family: Family,
    load_encoders: Callable[[], tuple[list, list]],
    options: Any,
    extra: Iterable[str] = (),
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = print,
) -> LiveText | CachedText:
    """What the options ask for. Captions that change at random cannot be cached and are refused by name."""
    if not options.cache_text_encoder_outputs:
        return LiveText(family, load_encoders)
    captions = dict.fromkeys(extra)
    for item in (*dataset.items, *dataset.validation):
        if changing := is_changing(item.subset):
            raise ConfigError(
                f"--cache_text_encoder_outputs: {', '.join(changing)} of {item.subset.source} give a picture "
                "a new caption in every step; switch them off or do not cache text outputs"
            )
        captions.update(dict.fromkeys(variants(item.caption, item.subset)))
    source = CachedText()
    store, identity = None, None
    if options.cache_text_encoder_outputs_to_disk:
        folder = cache_folder(options, dataset)
        store, identity = Store(folder / "text"), _text_identity(family, options, folder)
        for caption in captions:
            found = store.get(f"{identity} caption {caption}")
            if found is not None:
                source.memory[caption] = found
    missing = [caption for caption in captions if caption not in source.memory]
    if missing:
        _encode_texts(missing, source, family, load_encoders, store, identity, rank)
    if rank == 0:
        note = f", {store.damaged} damaged files made anew" if store and store.damaged else ""
        say(f"text: {len(captions)} captions and prompts, {len(captions) - len(missing)} were cached{note}")
    return source


def _text_identity(family: Family, options: Any, folder: Path) -> str:
    hashes = ContentHashes(folder)
    files = [getattr(options, part.option) for part in family.text_encoders] + family.tokenizer_paths(options)
    parts = [hashes.of_tree(Path(path)) for path in files]
    hashes.write()
    return f"text {RECIPE} {family.name} {' '.join(parts)}"


def _encode_texts(
    captions: list[str],
    source: CachedText,
    family: Family,
    load_encoders: Callable,
    store: Store | None,
    identity: str | None,
    rank: int,
) -> None:
    encoders, tokenizers = load_encoders()
    device = next(encoders[0].parameters()).device
    for caption in captions:
        cond = {
            name: value.contiguous() for name, value in family.encode(encoders, tokenizers, caption, device).items()
        }
        if not all(torch.isfinite(value).all() for value in cond.values()):
            raise DatasetError(f"the text encoder gives no finite numbers for the caption {caption[:80]!r}")
        source.memory[caption] = cond
        if store is not None and rank == 0:
            store.put(f"{identity} caption {caption}", cond)


def truncations(dataset: Dataset, family: Family, tokenizers: list) -> list[tuple[str, str]]:
    """(file name, the part that is cut) of every caption that is too long for the model."""
    cut = ((item.path.name, family.tokenize(tokenizers, plain_caption(item))[1]) for item in dataset.items)
    return [(name, rest) for name, rest in cut if rest]
