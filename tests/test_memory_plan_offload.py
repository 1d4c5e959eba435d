"""Plans with --cpu_offload_checkpointing against real runs in which the host is no part of what is counted."""

import pytest
import torch
from studio_support import make_toy
from test_memory_plan import real_peak
from test_memory_plan_families import two_pictures  # noqa: F401  (fixture)
from torch.utils._python_dispatch import _disable_current_modes

from library import options
from library.memory import activations, denoiser, plan_table, planner
from library.preflight import check

torch.set_num_threads(1)
LEAST = 1 << 9  # values; of toys nothing is as large as of real models
OFFLOADED = ("--gradient_checkpointing", "--cpu_offload_checkpointing")


class TwoPools(activations.HostActivations):
    """Copies as between a host and a device: those on the host are not counted, those that come back are."""

    made = None

    def __init__(self, device):
        super().__init__(device)
        TwoPools.made = self

    def put(self, tensor):
        with _disable_current_modes():
            return super().put(tensor)

    def get(self, packed):
        return super().get(packed).clone()


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_what_a_plan_has_on_the_host_is_what_a_run_moves(name, two_pictures, tmp_path, monkeypatch):  # noqa: F811
    """Bytes equal; the device's peak within a tenth, with and without the frozen weights."""
    monkeypatch.setattr(activations, "LEAST", LEAST)
    monkeypatch.setattr(denoiser, "HostActivations", TwoPools)
    words = ["--config_file", str(make_toy(name, tmp_path / "toy")), "--dataset_config", str(two_pictures),
             "--output_dir", str(tmp_path / "out"), "--output_name", "run", "--cache_latents",
             "--cache_text_encoder_outputs", "--max_train_steps", "2", *OFFLOADED]  # fmt: skip
    given = options.parse(name, words, "test")
    found = check(given, lambda text: None)
    made = planner.make(given, found.family, plan_table.largest(found.dataset), accelerator=False)
    plan, host = made["device"]["phases"]["training"], made["host"]
    peak, weights = real_peak(given, monkeypatch), plan["weights_bytes"]
    assert TwoPools.made.moved_bytes == 2 * host["block_inputs"] > 0  # in two steps
    assert plan["peak_bytes"] == pytest.approx(peak, rel=0.1)
    assert plan["peak_bytes"] - weights == pytest.approx(peak - weights + host["cached_text_bytes"], rel=0.1)
