"""Released models without their weights, for plans: files with the released header and nothing behind it.

`library/released` holds the names and shapes of the published files, and which of them belong together. A part that
the user gives no file for gets one of these, of the right size and without content (a sparse file, which takes no
room), so that from there on a plan reads headers and nothing else.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.checkpoints import path_of
from library.errors import ConfigError, nearest
from library.headers import BITS

if TYPE_CHECKING:
    from library.families.family import Family, Part

FOLDER = Path(__file__).resolve().parent.parent / "released"


def index() -> dict[str, dict[str, Any]]:
    """ "families": name -> {part: list}; "variants": name -> its family, and what is not as in the family.

    "options" in either: what the published file does not tell about itself. "optional": encoders that a run has where
    their file is given; a plan takes them where no text encoder is given.
    """
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))


def variants_of(family: str) -> list[str]:
    """The names of a family's other released models."""
    return [name for name, row in index()["variants"].items() if row["family"] == family]


def write(name: str, folder: Path, dtype: str = "BF16") -> Path:
    """`folder/name.safetensors` with the names and shapes of `library/released/name.json.gz`, all in `dtype`."""
    shapes = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    table, position = {}, 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * BITS[dtype] // 8
        table[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(table).encode("utf-8")
    path = folder / f"{name}.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)
    return path


@contextlib.contextmanager
def completed(options: Any, variant: str | None = None) -> Iterator[tuple[Any, Family, list[str]]]:
    """(options, resolved family, notes): every part has a file, the user's or one of these, which are gone afterwards.

    `variant` is one of `variants_of` the family. Raises ConfigError for an unknown one, and for a part without a list.
    """
    family, notes = options.family, []
    usual, own = index()["families"].get(family.name, {}), _variant(family.name, variant) if variant else {}
    told = (usual | own).get("options", {})
    if not path_of(family.denoiser, options):
        options = options.replace(**{name: value for name, value in told.items() if not options.given(name)})
    with tempfile.TemporaryDirectory() as folder:

        def complete(options: Any, part: Part, known: Mapping[str, str]) -> Any:
            if path_of(part, options):
                return options
            if part.name not in known:
                raise ConfigError(f"--{part.option} is missing: give {part.title} (its released size is not known)")
            name = known[part.name]
            notes.append(f"{part.name}: no file is given, so the released model's size is taken ({name})")
            return options.replace(**{part.option: str(write(name, Path(folder)))})

        named = [part for part in family.text_encoders if path_of(part, options)]
        options = complete(options, family.denoiser, usual | dict(family.released) | own)
        for part in family.text_encoders:
            if not named and part.name in usual.get("optional", ()):
                options = complete(options, part, usual | own)
        family = family.resolved(options)  # which parts there are can depend on the denoiser
        for part in family.parts[1:]:
            options = complete(options, part, usual | dict(family.released) | own)
        yield options, family, notes


def _variant(family: str, name: str) -> dict[str, Any]:
    row = index()["variants"].get(name, {})
    if row.get("family") != family:
        known = variants_of(family)
        raise ConfigError(f"--released {name} is no released {family}{nearest(name, known)} "
                          f"(known: {', '.join(known) or 'only the usual one'})")  # fmt: skip
    return {"denoiser": name} | {key: value for key, value in row.items() if key != "family"}
