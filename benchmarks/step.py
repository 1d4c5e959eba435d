"""Cost of a training step of the trainer against bare PyTorch on the same model, adapter and tensors.

    python benchmarks/step.py [--width 768] [--layers 4] [--size 256] [--repeats 5]

Both do forward, backward, clipping and an AdamW step of the same LoRA on the same cached inputs. The trainer's
side is its own loop (loader, draws, step, update, log lines), timed between two steps. Rounds alternate, the
ratio is that of the medians. Width and size are chosen so that a step takes 0.3 s or more on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

STEPS = 4  # per round


def prepare(folder: Path, width: int, layers: int, size: int) -> list[str]:
    """A random model of real proportions, a dataset of one bucket, and the options of the run."""
    from benchmarks.make_inputs import write_inputs

    return write_inputs(folder, width=width, layers=layers, size=size, pictures=STEPS)


def bare_round(trainer, batches) -> float:
    """The same arithmetic with nothing around it: fixed noise and sigma, no loader, no logs."""
    import torch

    family, denoiser, parameters = trainer.family, trainer.denoiser, trainer.parameters
    optimizer = trainer.optimizer
    start = time.perf_counter()
    for noisy, target, sigma, conds in batches:
        predicted = family.predict(denoiser, noisy, sigma, conds)
        (predicted.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - start) / len(batches)


def trainer_round(trainer, number: int) -> float:
    """`STEPS` steps of the trainer's own loop."""
    trainer.loader.max_steps = trainer.plan.total_steps = (number + 1) * STEPS + 1000
    start = time.perf_counter()
    for done, step in enumerate(trainer.loader(trainer.position.step)):
        trainer.outputs.step_begins(step)
        losses = [trainer._micro_step(batch, step.number, k) for k, batch in enumerate(step.batches)]
        trainer.outputs.after_backward()
        loss, norm = trainer._update(step, losses)
        trainer.position.step += 1
        trainer.outputs.after_step(loss, norm, trainer.agreement.granted, last=False)
        if done + 1 == STEPS:
            break
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    from library import flow, options
    from library.stops import Stops
    from train_network import NetworkTrainer

    with tempfile.TemporaryDirectory() as folder:
        argv = prepare(Path(folder), arguments.width, arguments.layers, arguments.size)
        trainer = NetworkTrainer(options.parse("z_image", argv, "benchmark"))
        trainer.setup()
        trainer.stops = Stops(trainer.plan.output_dir)
        trainer.outputs.before_training()
        steps = [s for _, s in zip(range(STEPS), trainer.loader(0), strict=False)]
        batches = []
        for step in steps:
            x0, conds, draws = trainer.conditions(step.batches[0])
            sigma = torch.full((len(x0),), 0.5)
            batches.append((flow.noisy(x0, draws.noise, sigma), flow.velocity(x0, draws.noise), sigma, conds))
        bare_round(trainer, batches), trainer_round(trainer, 0)
        bare, ours = [], []
        for number in range(1, arguments.repeats + 1):
            bare.append(bare_round(trainer, batches))
            ours.append(trainer_round(trainer, number))
        a, b = statistics.median(bare), statistics.median(ours)
        print(
            f"bare {a:.3f} s  trainer {b:.3f} s  ratio {b / a:.3f}  "
            f"(target 1.02, {arguments.repeats} rounds of {STEPS} steps)"
        )


if __name__ == "__main__":
    main()
