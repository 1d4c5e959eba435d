"""The first frame of a video, for models that show it to a text encoder: of a clip, or of a prompt's picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from library.data import images, videos

if TYPE_CHECKING:
    import numpy as np

    from library.data.cache import ContentHashes
    from library.data.items import Item


@dataclass(frozen=True)
class FirstFrame:
    """A picture file whole, or the first frame of an item's clip as it is placed, not mirrored, moved or coloured."""

    file: str
    placed: str = ""  # which frame of the file, and how it becomes pixels: two clips of one file differ in it
    item: Item | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of_item(cls, item: Item) -> FirstFrame | None:
        """None for an item that is a picture."""
        if item.clip is None:
            return None
        return cls(item.file, f"frame {item.clip.sources[0]} {images.preprocessing_key(item)}", item)

    def pixels(self) -> np.ndarray:
        """uint8 [H,W,3]. Raises DatasetError naming a file that cannot be decoded."""
        if self.item is None:
            return images.decode(self.file)[0]
        clip = self.item.clip
        (frame,) = videos.read(clip.video, clip.sources[:1])
        return images.place(frame, self.item.placement, self.item.subset.resize_interpolation)

    def identity(self, hashes: ContentHashes) -> str:
        """Everything that decides the pixels, the file's content among it."""
        if self.item is None:
            return hashes.of(Path(self.file))
        return f"{videos.content(self.item.clip, hashes)} {self.placed}"
