"""The log of a run and its page: what is in them, what is escaped, what a resumed run does."""

import hashlib
import html.parser
import json
import math

import pytest
from PIL import Image

from library import report


def log_of(path, losses):
    log = report.JsonLog(path)
    log.write(step=0, event="first step begins", seconds={"loading": 1.0})
    for step, loss in enumerate(losses, 1):
        log.write(step=step, loss=loss, seconds={"data": 0.25, "step": 0.5})
    return path


def page(folder, losses=(1.0, 0.5), *, title="t", facts=(), plan="plan", options="options", files=(), grid=None):
    path = report.write(
        folder, "x", title=title, facts=dict(facts), plan=plan, options=options,
        log=log_of(folder / "x.jsonl", losses), files=list(files), grid=grid,
    )  # fmt: skip
    return path.read_text(encoding="utf-8"), path.with_suffix(".md").read_text(encoding="utf-8")


def test_a_resumed_log_drops_what_will_be_written_again_and_a_line_cut_off_by_a_crash(tmp_path):
    log = report.JsonLog(tmp_path / "x.jsonl")
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0 / step)
    log.file.write('{"step": 4, "lo')
    log.file.flush()
    again = report.JsonLog(tmp_path / "x.jsonl", resume_step=2)
    again.write(step=3, loss=0.25)
    lines = (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"step": s, "loss": x} for s, x in ((1, 1.0), (2, 0.5), (3, 0.25))]


def test_a_new_run_starts_a_new_log(tmp_path):
    log_of(tmp_path / "x.jsonl", [1.0])
    report.JsonLog(tmp_path / "x.jsonl").write(step=1, loss=2.0)
    assert report.read_lines(tmp_path / "x.jsonl") == [{"step": 1, "loss": 2.0}]


def test_numbers_that_json_does_not_have_are_null_and_line_separators_do_not_cut_a_line(tmp_path):
    log = report.JsonLog(tmp_path / "x.jsonl")
    log.write(step=1, loss=0.5, grad_norm=math.inf, lr={"a\u2028b": math.nan}, list=[1.0, -math.inf])
    refuse = lambda word: pytest.fail(f"{word} is no JSON")  # noqa: E731
    text = (tmp_path / "x.jsonl").read_text(encoding="utf-8")
    expected = {"step": 1, "loss": 0.5, "grad_norm": None, "lr": {"a\u2028b": None}, "list": [1.0, None]}
    assert json.loads(text, parse_constant=refuse) == expected
    assert report.read_lines(tmp_path / "x.jsonl") == [expected]


def test_smoothing_is_the_mean_of_the_steps_before():
    values = [4.0, 2.0, 6.0, 1.0, 3.0]
    assert report.smoothed(values, 3) == pytest.approx([4.0, 3.0, 4.0, 3.0, 10 / 3])
    assert report.smoothed(values, 1) == pytest.approx(values)


def test_the_numbers_of_the_log_are_on_the_page(tmp_path):
    losses = [2.0] * 20 + [1.0] * 20  # windows of two steps
    for text in page(tmp_path, losses):
        assert "2.0000" in text and "1.0000" in text and "0.750" in text
    assert report.loss_facts(tmp_path / "x.jsonl") == {
        "loss, first -> last step": "2.0000 -> 1.0000",
        "loss, mean of the first -> last 2 steps": "2.0000 -> 1.0000",
        "seconds a step, median": "0.750",
    }


def test_a_run_of_one_step_has_a_page_and_no_curve(tmp_path):
    web, text = page(tmp_path, [1.0])
    assert "Plan" in web and "Plan" in text and not (tmp_path / "x-loss.png").exists()


def test_files_are_listed_with_size_and_hash_and_deleted_ones_are_not(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1234)
    for text in page(tmp_path, files=[tmp_path / "a.safetensors", tmp_path / "gone.safetensors"]):
        assert "1,234 bytes" in text and hashlib.sha256(b"x" * 1234).hexdigest() in text and "gone" not in text


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def test_what_users_wrote_is_text_and_no_markup(tmp_path):
    wild = "<script>alert(1)</script> <img src=x> | `` ``` & *b*"
    plain = Tags(page(tmp_path)[0])
    web, text = page(tmp_path, title=wild, facts=[(wild, wild)], plan=wild, options=wild)
    parsed = Tags(web)
    assert set(parsed.seen) <= set(plain.seen) and "script" not in parsed.seen
    assert parsed.words.count(wild) == 6  # title twice, both cells, plan, options
    row = next(line for line in text.splitlines() if line.startswith("| ") and "alert" in line)
    assert row.replace("\\|", "").count("|") == 3 and "\\<script\\>" in row
    lines = text.splitlines()
    assert lines.count("````") == 4 and lines[lines.index("````") + 1] == wild  # longer than any fence inside


def test_the_page_needs_no_other_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x-grid.png")
    web, text = page(tmp_path, grid=tmp_path / "x-grid.png")
    sources = Tags(web).sources
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "(x-grid.png)" in text and "(x-loss.png)" in text


def test_no_partial_file_stays_behind(tmp_path):
    page(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x-loss.png", "x-report.html", "x-report.md", "x.jsonl"]
