"""What a run tells: a JSONL log of every step, the loss curve, one page with the numbers. No torch."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import statistics
import urllib.parse
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class JsonLog:
    """One line a step, flushed. A resumed run drops the lines that it is about to write again."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line.get("step", 0) <= resume_step] if resume_step else []
        _write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept).encode("utf-8"))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (kept open for the whole run)

    def write(self, **values: Any) -> None:
        """Numbers that are not finite become null: JSON has no others."""
        self.file.write(json.dumps(_finite(values), ensure_ascii=False, allow_nan=False) + "\n")
        self.file.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a line that a crash cut off is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").split("\n"):
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def losses_of(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of every step of a log."""
    return [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the `window - 1` before it, or of as many as there are."""
    total = [0.0, *itertools.accumulate(values)]
    return [(total[k] - total[max(0, k - window)]) / min(k, window) for k in range(1, len(total))]


def loss_facts(log: Path) -> dict[str, str]:
    """First, last and smoothed loss and the usual time of a step, from the log."""
    lines = read_lines(log)
    values = [loss for _, loss in losses_of(lines)]
    if not values:
        return {}
    window = max(1, len(values) // 20)
    means = smoothed(values, window)
    facts = {
        "loss, first -> last step": f"{values[0]:.4f} -> {values[-1]:.4f}",
        f"loss, mean of the first -> last {window} steps": f"{means[window - 1]:.4f} -> {means[-1]:.4f}",
    }
    seconds = [sum(line["seconds"].values()) for line in lines if "loss" in line and line.get("seconds")]
    return facts | ({"seconds a step, median": f"{statistics.median(seconds):.3f}"} if seconds else {})


def loss_curve(log: Path) -> bytes | None:
    """PNG of the loss over optimizer steps, raw and smoothed, with validation where there is any."""
    lines = read_lines(log)
    steps = losses_of(lines)
    if len(steps) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=110)
    axes = figure.add_subplot()
    x, y = zip(*steps, strict=True)
    axes.plot(x, y, color="0.75", linewidth=0.8, label="loss")
    window = max(1, len(y) // 20)
    axes.plot(x, smoothed(y, window), color="C0", label=f"mean of {window} steps")
    held_out = [(line["step"], line["validation"]["average"]) for line in lines if "validation" in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="C1", label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em}pre{background:#f4f4f4;
padding:1em;overflow:auto;font-size:12px}td{padding:.1em 1em .1em 0;vertical-align:top}img{max-width:100%}
td.hash{font:11px monospace;word-break:break-all}"""
HASHED = 1024**3  # bytes; larger files are not read again only for the report


def write(
    folder: Path,
    name: str,
    *,
    title: str,
    facts: Mapping[str, str],
    plan: str,
    options: str,
    log: Path,
    files: list[Path],
    grid: Path | None,
) -> Path:
    """`<name>-report.html`, self-contained, the same as `<name>-report.md`, and `<name>-loss.png`.

    `facts` are the run's own numbers, to which those of the log are added; every text from outside is escaped.
    Returns the path of the HTML page.
    """
    curve = loss_curve(log)
    if curve:
        _write(folder / f"{name}-loss.png", curve)
    facts = {**facts, **loss_facts(log)}
    rows = [(p.name, f"{p.stat().st_size:,} bytes", _sha256(p)) for p in files if p.is_file()]
    pictures = [("The base model and the training, same seeds", grid)] if grid and grid.is_file() else []
    pictures += [("Loss", folder / f"{name}-loss.png")] if curve else []
    path = folder / f"{name}-report.html"
    _write(path, _html(title, facts, plan, options, rows, pictures).encode("utf-8"))
    _write(path.with_suffix(".md"), _markdown(title, facts, plan, options, rows, pictures).encode("utf-8"))
    return path


Files = list[tuple[str, str, str]]  # name, size, sha256
Pictures = list[tuple[str, Path]]  # title, file


def _html(title: str, facts: Mapping[str, str], plan: str, options: str, files: Files, pictures: Pictures) -> str:
    e = html.escape
    table = "".join(f"<tr><td>{e(k)}</td><td>{e(v)}</td></tr>" for k, v in facts.items())
    listed = "".join(f"<tr><td>{e(n)}</td><td>{e(size)}</td><td class='hash'>{e(h)}</td></tr>" for n, size, h in files)
    shown = "".join(_picture(heading, path.read_bytes()) for heading, path in pictures)
    return (
        f"<!doctype html><meta charset='utf-8'><title>{e(title)}</title><style>{STYLE}</style>"
        f"<h1>{e(title)}</h1><table>{table}</table>{shown}<h2>Plan</h2><pre>{e(plan)}</pre>"
        f"<h2>Files, with their sha256</h2><table>{listed}</table>"
        f"<h2>Options and where they came from</h2><pre>{e(options)}</pre>"
    )


def _markdown(title: str, facts: Mapping[str, str], plan: str, options: str, files: Files, pictures: Pictures) -> str:
    table = "\n".join(f"| {_plain(k)} | {_plain(v)} |" for k, v in facts.items())
    listed = "\n".join(f"| {_plain(n)} | {_plain(size)} | {_plain(h)} |" for n, size, h in files)
    shown = "\n\n".join(f"![{heading}]({urllib.parse.quote(path.name)})" for heading, path in pictures)
    parts = [
        f"# {_plain(title)}", f"| | |\n|---|---|\n{table}", shown, "## Plan", _fenced(plan),
        "## Files", f"| file | size | sha256 |\n|---|---|---|\n{listed}",
        "## Options and where they came from", _fenced(options),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~])", r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _sha256(path: Path) -> str:
    if path.stat().st_size > HASHED:
        return "not computed, over 1 GiB"
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _picture(title: str, png: bytes) -> str:
    return f"<h2>{html.escape(title)}</h2><img src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    partial.write_bytes(data)
    os.replace(partial, path)
