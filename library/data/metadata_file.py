"""Metadata files of the fine-tuning form: JSON {path: {caption, tags, image_size}} or JSONL with image_path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.data.config import SubsetSpec
from library.data.scan import EXTENSIONS, Found, picture_size
from library.errors import DatasetError


def read_metadata(subset: SubsetSpec) -> list[Found]:
    """The pictures of a metadata file, in its order. Raises DatasetError naming the file, the line, the picture."""
    path = Path(subset.metadata_file or "")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DatasetError(f"metadata_file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"metadata_file {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    rows = [_found(key, entry, subset, path) for key, entry in _entries(text, path)]
    if not rows:
        raise DatasetError(f"metadata_file {path}: there is no picture in it")
    return rows


def _entries(text: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        if path.suffix == ".jsonl":
            lines = [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
            return [(line["image_path"], line) for _, line in lines]
        content = json.loads(text)
        return [(key, value if isinstance(value, dict) else {"caption": value}) for key, value in content.items()]
    except ValueError as error:
        raise DatasetError(f"metadata_file {path} is not valid: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise DatasetError(f"metadata_file {path}: every line needs an image_path, every entry a table") from None


def _found(key: str, entry: dict[str, Any], subset: SubsetSpec, source: Path) -> Found:
    picture = _picture(key, subset)
    if picture is None:
        raise DatasetError(
            f"metadata_file {source}: {key} is not found" + (f" in {subset.image_dir}" if subset.image_dir else "")
        )
    caption, tags = (entry.get("caption") or "").strip(), (entry.get("tags") or "").strip()
    stat = picture.stat()
    found = Found(str(picture), (stat.st_size, stat.st_mtime_ns), None, None)
    joined = subset.caption_separator.rstrip() + " "
    if tags and subset.enable_wildcard and caption:
        found.caption = "\n".join(f"{line}{joined}{tags}" for line in caption.splitlines() if line.strip())
    else:
        found.caption = joined.join(part for part in (caption, tags) if part)
    try:
        found.size = picture_size(str(picture))  # the file decides: an image_size may be stale
    except (OSError, ValueError, SyntaxError) as error:
        found.problem = f"its header cannot be read ({error})"
    return found


def _picture(key: str, subset: SubsetSpec) -> Path | None:
    base = Path(key) if Path(key).is_absolute() or not subset.image_dir else Path(subset.image_dir) / key
    if base.suffix.lower() in EXTENSIONS:
        return base if base.is_file() else None
    return next((p for e in sorted(EXTENSIONS) if (p := base.with_name(base.name + e)).is_file()), None)
