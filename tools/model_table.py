"""The README's table of models: python tools/model_table.py [--write]

A row for every family that is in tests/results.json, which `pytest tests/test_families.py --record` writes: a cell says
yes only for a test that passed. What a family is called, its variants, formats and scripts are read off its record.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its inspect.py hides the standard one

from library.errors import ConfigError, run
from library.families import FAMILIES, get_family, script_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "results.json"
START, END = "<!-- models: tools/model_table.py -->", "<!-- /models -->"
# column -> the tests that all have to have passed
COLUMNS = {
    "LoRA": ("a_lora_trains_and_every_key_of_every_format_is_matched", "all_formats_hold_the_same_update"),
    "full fine-tune": ("a_full_fine_tune_keeps_the_files_names_and_changes_its_weights",),
    "base in fp8": ("a_lora_trains_on_blocks_in_fp8",),
    "pictures, clips": ("the_inference_script_draws_with_a_lora_and_its_strength", "a_picture_is_drawn_while_training"),
    "ComfyUI's keys": ("comfyui_takes_every_key",),
    "diffusers loads it": ("diffusers_takes_the_lora_in_its_format_and_predicts_as_we_do",),
}
PASSED, SKIPPED = "passed", "skipped"  # a test skips where there is nothing to hold a family against
PAGES = {"sd": "sdxl"}  # family -> its page, where that has another name
# what the released files are called whose lists of tensors lie in library/released
TITLES = {
    "cosmos_predict2": "2B", "cosmos_predict2_14b": "14B", "sd15": "1", "sd2": "2", "flux": "dev",
    "flux_schnell": "schnell",
    "flux_kontext": "Kontext", "flux2": "dev", "flux2_klein_4b": "klein 4B", "flux2_klein_9b": "klein 9B",
    "sd3": "medium", "sd3_large": "large", "wan": "2.1 T2V 1.3B", "wan_t2v_14b": "2.1 T2V 14B",
    "wan_i2v_14b": "2.1 I2V 14B",
    "wan22_a14b_t2v": "2.2 T2V A14B", "wan22_a14b_i2v": "2.2 I2V A14B", "wan22_ti2v_5b": "2.2 TI2V 5B",
    "hunyuan_video_15": "T2V", "hunyuan_video_15_i2v": "I2V", "hunyuan_video": "T2V", "hunyuan_video_i2v": "I2V",
}  # fmt: skip


def variants(name: str) -> list[str]:
    """The models that one family is: those of its module, else the released ones of library/released."""
    from library.memory import released

    module = importlib.import_module(FAMILIES[name].split(":")[0])
    versions = getattr(module, "VERSIONS", None)
    family = get_family(name)
    records = list(versions.values()) if isinstance(versions, Mapping) else []
    titles = [record.title for record in records if hasattr(record, "title")]
    if len(set(titles)) > 1:
        return titles
    index = released.index()
    usual = index["families"].get(name, {}).get("denoiser", name)
    others = [v if v in TITLES else index["variants"][v].get("denoiser", v) for v in released.variants_of(name)]
    lists = dict.fromkeys((usual, *others))
    found = [TITLES.get(listed, "") for listed in lists]
    several = [title for title in dict.fromkeys(found) if title]
    if len(several) < 2:
        return [family.title]
    shared = family.title.removesuffix(f" {several[0]}")  # a record may be called after its first variant
    return [f"{shared} ({', '.join(several)})"]


def table(results: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown. Raises ConfigError for results of a family that is not listed."""
    if alien := sorted(results.keys() - FAMILIES.keys()):
        raise ConfigError(f"{RESULTS}: there is no family {alien[0]}; record the results anew")
    heads = ["model", *COLUMNS, "LoRA formats", "script"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name in sorted(results, key=lambda name: get_family(name).title.lower()):
        cells = [_cell([results[name].get(test) for test in tests]) for tests in COLUMNS.values()]
        page = ROOT / "docs" / f"{PAGES.get(name, name)}.md"
        title = ", ".join(variants(name))
        linked = f"[{title}](docs/{page.name})" if page.is_file() else title
        formats = ", ".join(get_family(name).save_formats)
        lines.append(f"| {linked} | {' | '.join([*cells, formats, f'`{script_of(name)}_train_network.py`'])} |")
    return "\n".join(lines)


def _cell(outcomes: Sequence[str | None]) -> str:
    if all(outcome == PASSED for outcome in outcomes):
        return "yes"
    return "-" if all(outcome in (PASSED, SKIPPED) for outcome in outcomes) else "no"


def results() -> dict[str, dict[str, str]]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def placed(text: str, made: str) -> str:
    """A page with the table between its two marks. Raises ConfigError if they are not there."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ConfigError(f"the page lacks its marks {START} and {END}")
    before, rest = text.split(START)
    return f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it into README.md instead of printing it")
    made = table(results())
    if not parser.parse_args().write:
        print(made)
        return
    page = ROOT / "README.md"
    page.write_text(placed(page.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    run(main)
