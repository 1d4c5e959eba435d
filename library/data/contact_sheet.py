"""A page to look at: every item as it is trained, cropped, with its final caption and what was found about it.

Self-contained HTML; pictures are in the page. Every text from outside is escaped, and the page may load nothing.
"""

from __future__ import annotations

import base64
import html
import io
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from library.data import findings, images, wording
from library.data.findings import TITLES, Geometry
from library.errors import DatasetError, DiskError

if TYPE_CHECKING:
    from library.data.doctor import Examined
    from library.data.findings import Finding
    from library.data.items import Item
    from library.data.wording import Lengths

SIDE = 220  # pixels of a thumbnail's longer side
A_PAGE = 400  # items; more go to further pages
STYLE = """body{font:14px/1.4 system-ui,sans-serif;margin:1.5em}pre{background:#f4f4f4;padding:1em;overflow:auto}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:1em}
article{border:1px solid #ccc;padding:.6em;overflow-wrap:anywhere}article.warning{border-color:#c60}
img{max-width:100%;background:#eee}.facts{color:#666;font-size:12px}.warning{color:#c60}mark{background:#fc9}"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write(path: Path, examined: Examined) -> list[Path]:
    """`path`, and `<name>-2.html`, ... where one page is not enough; returns all. Raises DiskError."""
    data, lengths = examined.dataset, examined.lengths
    items = (*data.items, *data.validation)
    about: dict[str, list[Finding]] = defaultdict(list)
    for one in examined.findings:
        about[one.file].append(one)
    parts = [items[n : n + A_PAGE] for n in range(0, len(items), A_PAGE)] or [()]
    paths = [path, *(path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(2, len(parts) + 1))]
    held_out = {id(item) for item in data.validation}
    for page, part in zip(paths, parts, strict=True):
        with ThreadPoolExecutor(4) as pool:
            cards = list(pool.map(lambda i: _card(i, about[i.file], id(i) in held_out, lengths), part))
        head = _head(examined) if page is path else ""
        text = _page(path.stem, head, cards, [other.name for other in paths if len(paths) > 1])
        try:
            page.write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            raise DiskError(f"--html {page} cannot be written ({error.strerror or error})") from None
    return paths


def _page(title: str, head: str, cards: list[str], pages: list[str]) -> str:
    e = html.escape
    links = " ".join(f'<a href="{e(name)}">{n}</a>' for n, name in enumerate(pages, 1))
    return (
        f"<!doctype html><meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
        f"<title>{e(title)}</title><style>{STYLE}</style><h1>{e(title)}</h1>"
        f"{head}{links and f'<p>Pages: {links}</p>'}<main>{''.join(cards)}</main>"
    )


def _head(examined: Examined) -> str:
    e, data = html.escape, examined.dataset
    text = "\n".join((data.print_table(), *wording.lines(examined.words, examined.lengths)))
    parts = [f"<pre>{e(text)}</pre>"]
    if faults := list(dict.fromkeys(data.report.faults)):
        rows = "".join(f"<li>{e(one.file)}: {e(one.reason)}</li>" for one in faults)
        parts.append(f"<h2 class='warning'>{len(faults)} files cannot be used</h2><ul>{rows}</ul>")
    for kind, (level, title) in TITLES.items():
        if own := [one for one in examined.findings if one.kind == kind]:
            rows = "".join(f"<li>{e(one.file)}: {e(one.text)}</li>" for one in own)
            summary = f"<summary class='{level}'>{level}: {len(own)} files {e(title)}</summary>"
            parts.append(f"<details>{summary}<ul>{rows}</ul></details>")
    return "".join(parts)


def _card(item: Item, about: list[Finding], held_out: bool, lengths: Lengths | None) -> str:
    e, facts, place = html.escape, Geometry.of(item), item.placement
    level = "warning" if any(one.level == findings.WARNING for one in about) else ""
    sizes = f"{_size(item.size)} &rarr; {_size(place.resized)} &rarr; {_size(item.bucket)} at {place.left},{place.top}"
    said = [sizes, f"scaled {facts.scale:.2f}", f"{facts.lost:.0%} cut off", f"repeats {item.repeats}"]
    said += ["held out"] if held_out else []
    said += ["tags are shuffled or dropped"] if findings.is_shuffled(item) else []
    said += [f"{n} tokens ({e(name)})" for name, n in lengths.tokens[item.file].items()] if lengths else []
    cut = lengths.ends.get(item.file, "") if lengths else ""
    caption = e(findings.final_caption(item)) + (f" <mark>not read: {e(cut)}</mark>" if cut else "")
    notes = "".join(f"<div class='{one.level}'>{e(one.kind)}: {e(one.text)}</div>" for one in about)
    return (
        f"<article class='{level}'>{_pictures(item)}<div><b>{e(item.path.name)}</b></div><p>{caption}</p>"
        f"<div class='facts'>{'; '.join(said)}</div>{notes}</article>"
    )


def _size(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _pictures(item: Item) -> str:
    """The picture, or the first, middle and last frame of a clip, as trained; its mask and controls."""
    from library.data import controls

    try:
        loaded = images.load(item, random.Random(0), flip=False)
        pixels = loaded.pixels if loaded.pixels.ndim == 4 else loaded.pixels[None]
        shown = [(pixels[n], "as trained") for n in sorted({0, len(pixels) // 2, len(pixels) - 1})]
        if loaded.mask is not None:
            shown.append(((loaded.mask * 255).astype(np.uint8), "mask"))
        shown += [(pixels, "control") for pixels in controls.pixels(item)]
    except (DatasetError, MemoryError) as error:
        return f"<p class='warning'>{html.escape(str(error))}</p>"
    return "".join(_img(pixels, title) for pixels, title in shown)


def _img(pixels: np.ndarray, title: str) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return f"<img title='{title}' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
