"""The data doctor: look at a dataset before anything is trained on it.

    python tools/check_dataset.py data.toml
    python tools/check_dataset.py data.toml --model_type z_image --tokenizer FOLDER --html sheet.html
    python tools/check_dataset.py data.toml --skip_bad --json

Decodes every file once, in parallel, and remembers what it saw by size and time, as a run does at its start. Says by
name what cannot be used and what is worth knowing: damaged, mislabelled, tiny, equal and nearly equal pictures, EXIF
orientation, alpha, captions, masks, controls, how each picture is enlarged and cropped, what is seen how often. With
--model_type (or the --config_file of a run) the rules of that model apply and captions are measured with its
tokenizers. Says which words all or nearly all captions share, and which captions lack one. Other options are those of
training. Exit code 3 if files cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library import options as option_machinery
from library.data import findings, wording
from library.data.config import load_dataset_config
from library.data.doctor import Examined, as_dict, examine
from library.errors import ConfigError, DatasetError, run

if TYPE_CHECKING:
    from library.families.family import Family
    from library.options import Options

PIXELS = 8  # sides of pictures are multiples of this for every model


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("dataset", help="dataset description, TOML or JSON")
    parser.add_argument("--json", action="store_true", help="everything, for machines")
    parser.add_argument("--html", nargs="?", const="", metavar="FILE", help="a contact sheet; <dataset>-check.html")
    return parser.parse_known_args(argv)


def options_of(words: list[str]) -> Options:
    """With a family if the words, or the configuration file that they name, say which."""
    if any(word.split("=")[0] in ("--model_type", "--config_file") for word in words):
        return option_machinery.parse(None, words, "tools/check_dataset.py")
    return option_machinery.parse_data(words)


def family_of(options: Options) -> Family | None:
    """The family's record; its files are looked at only where they are given."""
    family = options.family
    if family is not None and getattr(options, family.denoiser.option):
        from library.preflight import check_parts

        return check_parts(family, options)[0]
    if family is None and any(
        subset.video_directory for spec in load_dataset_config(options) for subset in spec.subsets
    ):
        raise ConfigError("how videos are cut depends on the model; give --model_type")
    return family


def caption_lengths(examined: Examined, family: Family | None, options: Options) -> tuple[wording.Lengths | None, str]:
    """(what the model's tokenizers make of the captions, or None; why captions were not measured)."""
    if family is None:
        return None, "captions are not measured: --model_type says what a model reads"
    from library.components.tokenizers import load_tokenizers, not_here

    if lacking := [option for option in not_here(family, options) if not getattr(options, option)]:
        return None, f"captions are not measured: give --{lacking[0]} a folder or a hub id"
    return wording.measured(examined.dataset, family, load_tokenizers(family, options)), ""


def print_report(examined: Examined) -> None:
    data, own = examined.dataset, examined.findings
    print(data.print_table())
    print("seen in an epoch:")
    for source, (files, count) in findings.seen(data).items():
        print(f"  {source}: {files} files, {count} items")
    if faults := list(dict.fromkeys(data.report.faults)):
        print(f"{len(faults)} files cannot be used:")
        print("\n".join(f"  {one.file}: {one.reason}" for one in faults))
    for kind, (level, title) in findings.TITLES.items():
        if rows := [one for one in own if one.kind == kind]:
            print(f"{level}: {len(rows)} files {title}")
            print("\n".join(f"  {one.file}: {one.text}" for one in rows))
    for line in wording.lines(examined.words, examined.lengths):
        print(line)
    if examined.unmeasured:
        print(f"note: {examined.unmeasured}")


def check(given: argparse.Namespace, options: Options) -> dict[str, Any]:
    family = family_of(options)
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if given.json else print
    examined = examine(options, family, family.pixel_multiple if family else PIXELS, collect=True, say=say)
    examined.words = wording.of_dataset(examined.dataset)
    examined.lengths, examined.unmeasured = caption_lengths(examined, family, options)
    if examined.lengths and examined.lengths.ends:
        examined.findings = findings.find(examined.dataset, examined.looks, examined.lengths.ends)
    out = as_dict(examined)
    if given.json:
        print(json.dumps(out, ensure_ascii=False, indent=1))
    else:
        print_report(examined)
    if given.html is not None:
        from library.data import contact_sheet

        path = Path(given.html or f"{Path(given.dataset).stem}-check.html")
        pages = contact_sheet.write(path, examined)
        say(f"contact sheet: {', '.join(map(str, pages))}")
    return out


def main() -> None:
    given, words = arguments(sys.argv[1:])
    options = options_of([*words, "--dataset_config", given.dataset])
    faults = check(given, options)["faults"]
    if faults and not options.skip_bad:
        raise DatasetError(f"{len(faults)} files cannot be used; repair them, take them out, or train with --skip_bad")


if __name__ == "__main__":
    run(main)
