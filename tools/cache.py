"""Look into, check and clear a cache of latents and text outputs.

    python tools/cache.py status --cache_dir pictures/.lorasmith
    python tools/cache.py status --config_file run.toml
    python tools/cache.py verify --cache_dir pictures/.lorasmith [--remove]
    python tools/cache.py prune --config_file run.toml [--also other.toml ...] [--yes]
    python tools/cache.py explain FILE --config_file run.toml

`status` counts what is there; with the options of a run, as its training script takes them, also what that run finds,
what it has to make and why. `verify` reads every entry and names those that are damaged; `--remove` deletes them.
`prune` lists what no named run reads, damaged files and what killed runs left behind, and deletes them with `--yes`.
`explain` says what an entry was made from; of a picture or a caption file, whether a run finds its entries and why not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library.data import cache_report as report
from library.errors import ConfigError, DiskError, run

OF_RUN = ("--config_file", "--dataset_config", "--train_data_dir")  # one of these means that a run is described
LISTED = 10


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("status", "verify", "prune", "explain"))
    parser.add_argument("file", nargs="?", help="explain: an entry, a picture or a caption file")
    parser.add_argument("--cache_dir", help="the cache folder; with the options of a run it is known")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--remove", action="store_true", help="verify: delete what is damaged")
    parser.add_argument("--also", nargs="*", default=[], help="prune: configuration files of runs that read it, too")
    parser.add_argument("--yes", action="store_true", help="prune: delete; without it the list is only shown")
    given, words = parser.parse_known_args()
    if (given.command == "explain") != (given.file is not None):
        raise ConfigError("explain needs a file, and only explain takes one")
    if given.cache_dir and words:
        words += ["--cache_dir", given.cache_dir]
    if words and not any(word.split("=")[0] in OF_RUN for word in words):
        raise ConfigError(f"{words[0]}: the options of a run need one of {', '.join(OF_RUN)}")
    if not words and not given.cache_dir and given.command != "explain":
        raise ConfigError("say which cache: --cache_dir FOLDER, or --config_file and other options of a run")
    return given, words


def needs_of(words: list[str]) -> tuple[Path, list[report.Need]]:
    """The cache folder of a run, and every entry that it asks for."""
    from library import options as option_machinery
    from library import prompts, strategies
    from library.data.dataset import prepare
    from library.preflight import check_parts

    options = option_machinery.parse(None, words, "tools/cache.py")
    if not (options.cache_latents_to_disk or options.cache_text_encoder_outputs_to_disk):
        raise ConfigError(
            "this run keeps nothing on disk: --cache_latents_to_disk and --cache_text_encoder_outputs_to_disk are off"
        )
    family, _ = check_parts(options.family, options)
    dataset = prepare(options, family, family.pixel_multiple)
    folder = strategies.cache_folder(options, dataset)
    needs = []
    if options.cache_latents_to_disk:
        jobs = strategies.latent_jobs(dataset)
        files = {item.index: item.file for item, _ in jobs}
        identities = strategies.latent_identities(jobs, family, options, folder)
        needs += [report.Need("latents", identity, files[index]) for (index, _), identity in identities.items()]
    if options.cache_text_encoder_outputs_to_disk:
        found, _ = prompts.of_run(options.sample_prompts, family, max(item.frames for item in dataset.items))
        requests = strategies.text_requests(dataset, family, prompts.asked_of_text(found, family))
        identities = strategies.text_identities(requests, family, options, folder)
        needs += [report.Need("text", identities[one], file) for one, file in requests.items()]
    return folder, needs


def size(entries: list[report.Entry]) -> str:
    total = sum(entry.bytes for entry in entries)
    return f"{total / 1024**3:.2f} GB" if total >= 1024**3 else f"{total / 1024**2:.1f} MB"


def status(folder: Path, needs: list[report.Need] | None) -> dict[str, Any]:
    entries, files = report.entries_of(folder), report.Files(folder)
    damaged = [entry for entry in entries if entry.problem]
    out: dict[str, Any] = {"folder": str(folder), "damaged": [str(entry.path) for entry in damaged]}
    lines = [f"cache {folder}"]
    for kind in report.KINDS:
        own = [entry for entry in entries if entry.kind == kind and not entry.problem]
        made = Counter((entry.fields.get("recipe") or "? unknown").split()[1] for entry in own)
        listed = ", ".join(f"{count} for {name}" for name, count in made.items())
        out[kind] = {"entries": len(own), "bytes": sum(entry.bytes for entry in own), "models": dict(made)}
        if needs is None or not any(need.kind == kind for need in needs):
            lines.append(f"{kind}: {len(own)} entries, {size(own)}{listed and f' ({listed})'}")
            continue
        found = report.compare(kind, needs, entries, files)
        lacking = sum(map(len, found.lacking.values()))
        unused = [entry for some in found.unused.values() for entry in some]
        lines.append(
            f"{kind}: {len(found.valid)} valid ({size(found.valid)}), {lacking} to make, {len(unused)} not read"
        )
        for reason, some in found.lacking.items():
            lines.append(f"  to make {len(some)}: {reason} ({report.named([need.file for need in some])})")
        lines += [f"  not read {len(some)}: made for {name} ({size(some)})" for name, some in found.unused.items()]
        out[kind] |= {
            "valid": len(found.valid), "not_read": len(unused),
            "to_make": {reason: [need.file for need in some] for reason, some in found.lacking.items()},
        }  # fmt: skip
    lines += [f"damaged {entry.path}: {entry.problem}" for entry in damaged[:LISTED]]
    lines.append(f"damaged: {len(damaged)} (headers only; verify reads everything)")
    return out | {"said": "\n".join(lines)}


def verify(folder: Path, remove: bool) -> dict[str, Any]:
    """Raises DiskError if an entry is damaged and stays."""
    entries = report.entries_of(folder, whole=True)
    damaged = [entry for entry in entries if entry.problem]
    lines = [f"{entry.path}: {entry.problem}" for entry in damaged]
    if remove:
        delete([entry.path for entry in damaged])
    state = "deleted; the next start makes them anew" if remove else "the next start makes them anew"
    lines.append(f"{len(entries)} entries read, {len(damaged)} damaged{f' ({state})' if damaged else ''}")
    found = {str(entry.path): entry.problem for entry in damaged}
    return {"folder": str(folder), "entries": len(entries), "damaged": found, "said": "\n".join(lines)}


def prune(folder: Path, runs: list[list[report.Need]], sure: bool) -> dict[str, Any]:
    entries = report.entries_of(folder)
    wanted = {need.identity for needs in runs for need in needs}
    gone = [entry for entry in entries if entry.problem or (runs and entry.identity not in wanted)]
    left = report.unfinished(folder)
    if sure:
        delete([*(entry.path for entry in gone), *left])
    idle = [entry for entry in gone if not entry.problem]
    lines = [f"{entry.path}: {entry.problem or 'read by no run that was named'}" for entry in gone[:LISTED]]
    lines += [f"... and {len(gone) - LISTED} more"] if len(gone) > LISTED else []
    lines.append(
        f"{'deleted' if sure else 'would delete, with --yes,'} {len(idle)} entries that no named run reads, "
        f"{len(gone) - len(idle)} damaged and {len(left)} unfinished files ({size(gone)}); "
        f"{len(entries) - len(gone)} stay"
    )
    paths = [str(path) for path in (*(entry.path for entry in gone), *left)]
    return {"folder": str(folder), "deleted": sure, "files": paths, "said": "\n".join(lines)}


def delete(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(f"{path} cannot be deleted ({error.strerror or error})") from None


def explain(file: Path, words: list[str], cache_dir: str | None) -> dict[str, Any]:
    if not file.exists():
        raise ConfigError(f"{file}: no such file")
    if file.suffix == ".safetensors" and file.parent.parent.name in report.KINDS:
        entry = report.look(file, file.parent.parent.name, whole=True)
        folder = Path(cache_dir) if cache_dir else file.parent.parent.parent
        text = "\n".join(report.described(entry, report.Files(folder)))
        return {"file": str(file), "identity": entry.identity, "problem": entry.problem, "said": text}
    if not words:
        raise ConfigError(f"{file} is no entry of a cache; with the options of a run its entries can be explained")
    folder, needs = needs_of(words)
    entries, files = report.entries_of(folder), report.Files(folder)
    own = [n for n in needs if n.file and Path(n.file).with_suffix("").resolve() == file.with_suffix("").resolve()]
    if not own:
        raise ConfigError(f"{file} is not in the dataset of this run")
    lines = []
    for kind in report.KINDS:
        found = report.compare(kind, own, entries, files)
        lines += [line for entry in found.valid for line in report.described(entry, files)]
        lines += [f"{kind}: has to be made: {reason}" for reason, some in found.lacking.items() for _ in some]
    return {"file": str(file), "said": "\n".join(lines)}


def main() -> None:
    given, words = arguments()
    if given.command == "explain":
        done = explain(Path(given.file), words, given.cache_dir)
    else:
        folder, needs = needs_of(words) if words else (Path(given.cache_dir), None)
        if given.command == "status":
            done = status(folder, needs)
        elif given.command == "verify":
            done = verify(folder, given.remove)
        else:
            others = [needs_of(["--config_file", path])[1] for path in given.also]
            done = prune(folder, [needs, *others] if needs is not None else others, given.yes)
    print(json.dumps({k: v for k, v in done.items() if k != "said"}, indent=1) if given.json else done["said"])
    if given.command == "verify" and done["damaged"] and not given.remove:
        raise DiskError(f"{len(done['damaged'])} of {done['entries']} entries are damaged; --remove deletes them")


if __name__ == "__main__":
    run(main)
