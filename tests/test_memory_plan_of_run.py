"""--memory_plan: what a run says about its memory, and that saying it changes and stops nothing."""

import json
from types import SimpleNamespace

import pytest
import torch
from training_support import arguments, pictures, toy, train  # noqa: F401  (fixtures)

from library import options as option_machinery
from library.memory import peaks, plan_of_run
from library.preflight import check

RUN = ("--max_train_steps", "1")


def parsed(toy, pictures, output, *extra):  # noqa: F811
    return option_machinery.parse("z_image", arguments(toy, pictures, output, *RUN, *extra), "test")


def test_a_run_says_its_memory_and_what_the_report_keeps(toy, pictures, tmp_path, capsys):  # noqa: F811
    trainer = train(toy, pictures, tmp_path, *RUN, "--memory_plan", "always")
    said = capsys.readouterr().out
    assert "memory with the largest batch, 2 x 64x64: at most" in said and "  training " in said
    assert said.index("memory with the largest") < said.index("training 1") or "step 1/1" in said
    assert "memory with the largest batch" in (tmp_path / "run-report.md").read_text(encoding="utf-8")
    assert trainer.plan.memory["device"]["peak_bytes"] > 0 and "memory plan" in trainer.runtime.seconds


def test_toys_on_a_cpu_are_not_planned_unless_asked(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    options = parsed(toy, pictures, tmp_path)
    plan, cpu, cuda = check(options, lambda text: None), torch.device("cpu"), torch.device("cuda")
    assert not plan_of_run.is_wanted(options, plan, cpu) and plan_of_run.is_wanted(options, plan, cuda)
    assert not plan_of_run.is_wanted(options.replace(memory_plan="never"), plan, cuda)
    monkeypatch.setattr(plan_of_run, "LARGE", 1000)
    assert plan_of_run.is_wanted(options, plan, cpu)


@pytest.mark.parametrize("code, said", [("raise SystemExit('no such thing')", "no such thing"), ("print(1 / 0)", "Zero"),
                                        ("print('nonsense')", "JSON"), ("import time; time.sleep(9)", "Timeout")])  # fmt: skip
def test_a_plan_that_fails_is_a_note(toy, pictures, tmp_path, monkeypatch, code, said):  # noqa: F811
    options = parsed(toy, pictures, tmp_path, "--memory_plan", "always")
    plan, lines = check(options, lambda text: None), []
    monkeypatch.setattr(plan_of_run, "CHILD", code)
    monkeypatch.setattr(plan_of_run, "PATIENCE", 2)
    assert plan_of_run.tell(options, plan, torch.device("cpu"), lines.append) is None
    assert (
        len(lines) == 1
        and lines[0].startswith("note: the memory of this run could not be planned")
        and said in lines[0]
    )


def test_on_an_accelerator_the_free_memory_decides_what_is_said(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    """The device is only asked for its name and its free bytes, so that a name is enough."""
    options = parsed(toy, pictures, tmp_path)
    plan, lines, device = check(options, lambda text: None), [], SimpleNamespace(type="cuda")
    monkeypatch.setattr(plan_of_run, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(plan_of_run, "elsewhere", lambda question: plan_of_run.answer(json.loads(json.dumps(question))))
    found = plan_of_run.tell(options, plan, device, lines.append)
    assert found, lines
    peak = found["device"]["peak_bytes"]
    assert peak > 10**6 and found["advice"]["vram_bytes"] == 10**6
    assert "warning: the device has 0.00 GB free" in lines[0] and "in 0.001 GB it does not fit; closest is" in lines[0]
    assert "--gradient_checkpointing" in lines[0] and json.dumps(found)
    assert plan_of_run.compared(5 * 10**9, 6 * 10**9) == "the device has 6.00 GB free"
    assert plan_of_run.measured({"device": {"peak_bytes": 3 * 10**9}}, 2 * 10**9) == "2.00 GB, 3.00 GB planned"
    assert plan_of_run.measured(None, 2 * 10**9) == "2.00 GB" and not plan_of_run.measured(None, None)


def test_each_bucket_has_its_peak_in_the_log_and_the_report(toy, pictures, tmp_path, monkeypatch):  # noqa: F811
    """On a made-up device whose memory is a list of peaks, the first from before the first step."""

    class Made:
        values, now = iter([3, 5, 2, 4]), 9 * 10**9

        def max_memory_allocated(self, device):
            return self.now

        def reset_peak_memory_stats(self, device):
            self.now = next(self.values) * 10**9

    monkeypatch.setattr(peaks, "counter", lambda device, made=Made(): made)  # noqa: B008
    train(toy, pictures, tmp_path, "--max_train_steps", "4")  # an epoch is 2, 2 and 1 pictures
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    found = [(line["bucket"], line["peak_bytes"] // 10**9) for line in lines if "loss" in line]
    assert [peak for _, peak in found] == [3, 5, 2, 4] and {name for name, _ in found} == {"2 x 64x64", "1 x 64x64"}
    report = (tmp_path / "run-report.md").read_text(encoding="utf-8")
    assert "| memory, most at one time | 9.00 GB |" in report
    for bucket in ("2 x 64x64", "1 x 64x64"):
        most = max(peak for name, peak in found if name == bucket)
        assert f"| memory, most in training with {bucket} | {most}.00 GB |" in report


def test_a_processor_counts_no_peaks():
    one = peaks.Peaks(torch.device("cpu"))
    one.begin()
    assert one.highest() is None and one.end([]) == {} == one.facts()
