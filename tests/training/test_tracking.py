"""metrics.jsonl: a line a logged step, none twice; wandb gets the same."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from dmoe_var.training.tracking import MetricsLog, Tracking, read_lines


def written(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.1})
        log.write(2, {"loss": 1e-300})
    assert written(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1e-300}]
    assert read_lines(tmp_path / "metrics.jsonl") == written(tmp_path)


@pytest.mark.parametrize("tail", ["", '{"step": 4, "lo', '{"step": 4, "loss": 0.1}'])
def test_resuming_drops_what_will_be_written_again(tmp_path, tail):
    """Also a last line that a kill cut short."""
    with MetricsLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write(3, {"loss": 9.0})
    assert [line["loss"] for line in written(tmp_path)] == [0.1, 0.2, 9.0]


BROKEN = {
    "NULs": b"\0" * 40,
    "a list": b"[1]",
    "a number": b"7",
    "no UTF-8": b'{"step": 2, "loss": "\xff\xfe"}',
    "no JSON": b'{"step": 2, "lo',
    "no step": b'{"loss": 0.5}',
    "a step that is none": b'{"step": "2"}',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_crash_left_between_lines(tmp_path, capsys, kind):
    """The rest stays, a note says how much went, and a run goes on."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + BROKEN[kind] + b'\n{"step": 3, "loss": 0.1}\n')
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.write(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in written(tmp_path)] == [
        (1, 0.5), (3, 0.1), (4, 9.0)
    ]  # fmt: skip
    said = f"{path}: 1 of 3 lines are broken and were left out\n"
    assert capsys.readouterr().err == said


def test_a_line_after_nuls_stays(tmp_path):
    """A crash may leave them where the next run then goes on."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\0{"step": 2}\n\0\0')
    assert read_lines(tmp_path / "metrics.jsonl", step=int) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_gets_the_same_lines(tmp_path, monkeypatch, mode):
    sent, given = [], {}
    run = SimpleNamespace(
        log=lambda metrics, step: sent.append({"step": step, **metrics}),
        finish=lambda: sent.append("finished"),
    )
    fake = SimpleNamespace(init=lambda **options: given.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracking = Tracking(mode, group="experiment", job_type="stage", name="variant")
    with MetricsLog(tmp_path, tracking=tracking, config={"lr": 1}) as log:
        log.write(1, {"loss": 0.5})
        log.write(4, {"val": 2.0})
    assert sent == [*written(tmp_path), "finished"]
    names = {"group": "experiment", "job_type": "stage", "name": "variant"}
    assert given == {
        **names, "mode": mode, "config": {"lr": 1}, "dir": tmp_path, "project": "dmoe-var"
    }  # fmt: skip


def test_what_has_no_steps(tmp_path, monkeypatch):
    """Its numbers once, and no metrics.jsonl; nothing where wandb is off."""
    sent = []
    run = SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: run))
    Tracking("offline").summarise(tmp_path, {"fid": 2.0}, {})
    Tracking().summarise(tmp_path, {"fid": 3.0}, {})
    assert sent == [{"fid": 2.0}, "finished"]
    assert list(tmp_path.iterdir()) == []


def test_wandb_itself_keeps_the_group(tmp_path):
    """Offline, as the package writes it."""
    tracking = Tracking("offline", group="experiment", job_type="stage", name="variant")
    run = tracking.start(tmp_path, {"lr": 1})
    try:
        assert (run.group, run.job_type, run.name) == ("experiment", "stage", "variant")
        assert run.offline
    finally:
        run.finish()


def test_a_process_that_does_not_log(tmp_path, monkeypatch):
    """It leaves the file of the one that does alone, and wandb too."""
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5})
    fake = SimpleNamespace(init=lambda **options: pytest.fail("wandb was started"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsLog(tmp_path, tracking=Tracking("offline"), enabled=False) as log:
        log.write(2, {"loss": 0.25})
    assert written(tmp_path) == [{"step": 1, "loss": 0.5}]
