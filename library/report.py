"""What a run tells: a JSONL log of every step, the loss curve, one page with the numbers. No torch."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLog:
    """One line a step, flushed. A resumed run drops the lines that it is about to write again."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line.get("step", 0) <= resume_step] if resume_step else []
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (kept open for the whole run)

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values, ensure_ascii=False) + "\n")
        self.file.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a line that a crash cut off is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def loss_curve(log: Path) -> bytes | None:
    """PNG of the loss over optimizer steps, raw and smoothed, with validation where there is any."""
    lines = read_lines(log)
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if len(steps) < 2:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=110)
    axes = figure.add_subplot()
    x, y = zip(*steps, strict=True)
    axes.plot(x, y, color="0.75", linewidth=0.8, label="loss")
    window = max(1, len(y) // 20)
    smooth = [sum(y[max(0, k - window + 1) : k + 1]) / len(y[max(0, k - window + 1) : k + 1]) for k in range(len(y))]
    axes.plot(x, smooth, color="C0", label=f"mean of {window} steps")
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
padding:1em;overflow:auto;font-size:12px}td{padding:.1em 1em .1em 0;vertical-align:top}img{max-width:100%}"""


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
    """`<name>-report.html`, self-contained, and `<name>-loss.png`. Every text from outside is escaped."""
    curve = loss_curve(log)
    if curve:
        _write(folder / f"{name}-loss.png", curve)
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    listed = "".join(
        f"<tr><td>{html.escape(p.name)}</td><td>{p.stat().st_size:,} bytes</td></tr>" for p in files if p.is_file()
    )
    pictures = (
        _picture("The base model and the training, same seeds", grid.read_bytes()) if grid and grid.is_file() else ""
    )
    pictures += _picture("Loss", curve) if curve else ""
    page = (
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>{pictures}<h2>Plan</h2><pre>{html.escape(plan)}</pre>"
        f"<h2>Files</h2><table>{listed}</table>"
        f"<h2>Options and where they came from</h2><pre>{html.escape(options)}</pre>"
    )
    path = folder / f"{name}-report.html"
    _write(path, page.encode("utf-8"))
    return path


def _picture(title: str, png: bytes) -> str:
    return f"<h2>{html.escape(title)}</h2><img src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    partial.write_bytes(data)
    os.replace(partial, path)
