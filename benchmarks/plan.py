"""How long memory plans take, and whether a step that is extended from a few blocks equals the whole one.

    python benchmarks/plan.py [--models flux wan ...] [--ways lora full lora_plain full_plain lora_fp8 ...]

For every released model at its usual size (the rows of docs/memory.md): CPU seconds of the whole plan, and of its
training part with the step of a few blocks and with that of all, and whether device, host and facts of the two are
equal to the byte. The last line sums it up; exit code 1 if any two differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

BASE = "--mixed_precision bf16 --cache_latents --cache_text_encoder_outputs --optimizer_type AdamW8bit --output_dir ."
LORA, CHECKPOINTING = "--network_module networks.lora --network_dim 16", "--gradient_checkpointing"
WAYS = {
    "lora": f"{LORA} {CHECKPOINTING}", "full": CHECKPOINTING, "lora_plain": LORA, "full_plain": "",
    "lora_fp8": f"{LORA} {CHECKPOINTING} --fp8_scaled",
    "lora_offload": f"{LORA} {CHECKPOINTING} --cpu_offload_checkpointing",
}  # fmt: skip


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.process_time()
    return call(*arguments), time.process_time() - start


def outcome(planner: Any, measure: Any, shape: Any, cond: Any) -> tuple[Any, float, str]:
    """(device, host, facts), seconds, and for what reason all blocks were run."""
    from library.memory.extension import Unequal

    steps, step = [], planner._step
    planner._step = lambda *given: steps.append(1) or step(*given)
    start = time.process_time()
    try:
        device, host, facts = planner.training_by(measure, shape, cond)
    except Unequal as error:
        return None, time.process_time() - start, f"all blocks are run: {error}"
    finally:
        planner._step = step
    said = "" if len(steps) > 1 else "; all blocks are run, two short steps would be no gain"
    return (device.as_dict(), host.as_dict(), facts), time.process_time() - start, said


def lines(name: str, ways: list[str]) -> list[dict[str, Any]]:
    """One result for each way of training a released model."""
    from library import options as option_machinery
    from library.memory import extension
    from library.memory.planner import Planner, Work
    from library.memory.released import completed, index
    from tools.memory_table import SMALLER

    family, size = SMALLER.get(name, (index()["variants"].get(name, {}).get("family", name), None))
    options = option_machinery.parse(family, f"{BASE} {LORA}".split(), "benchmarks/plan.py")
    found, encoded = [], None
    with completed(options, name if name in index()["variants"] else None) as (options, record, _):
        width, height = size or (record.resolution, record.resolution)
        frames = record.sampling.get("frame_count", 1) if record.frames else 1
        work = Work(width, height, 1, frames, controls=((width, height),) * record.least_controls)
        for way in ways:
            own = option_machinery.parse(family, f"{BASE} {WAYS[way]}".split(), "benchmarks/plan.py")
            files = {part.option: getattr(options, part.option) for part in record.parts}
            planner = Planner(own.replace(**files), record, work)
            if encoded is None:
                (_, cond), text_seconds = timed(planner.text)
                (_, shape, extra), latents_seconds = timed(planner.latents)
                encoded = text_seconds + latents_seconds
                with planner.phase():
                    planner.load(record.denoiser, planner.dtype)  # what is imported for it is none of its memory
            few, planned, said = outcome(planner, extension.extended, shape, cond | extra)
            every, seconds, _ = outcome(planner, extension.whole, shape, cond | extra)
            planned += 0 if few else seconds
            found.append({
                "name": name, "way": way, "plan": encoded + planned, "training": planned, "whole": seconds,
                "said": said if few is None else f"{'equal' if few == every else 'DIFFERENT'}{said}",
            })  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["lora", "full"])
    arguments = parser.parse_args()
    import torch

    from tools.memory_table import names

    torch.set_num_threads(1)
    found = []
    for name in arguments.models or names():
        for one in lines(name, arguments.ways):
            found.append(one)
            print(f"{name:24} {one['way']:10} plan {one['plan']:5.1f} s; training {one['training']:5.1f} s, with all "
                  f"blocks {one['whole']:5.1f} s; {one['said'][:400]}", flush=True)  # fmt: skip
    wrong = [one for one in found if one["said"].startswith("DIFFERENT")]
    seconds = {key: sum(one[key] for one in found) for key in ("training", "whole")}
    extended = sum(one["said"] == "equal" for one in found)
    print(f"{len(found)} plans: {extended} extended and equal, {len(wrong)} different, "
          f"of the others all blocks are run; the longest {max(one['plan'] for one in found):.1f} s; training in all "
          f"{seconds['training']:.0f} s, with all blocks {seconds['whole']:.0f} s")  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
