"""metrics.jsonl: a line a logged step, none twice; wandb gets the same."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from dmoe_var.errors import ConfigError, InputError
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
    "no UTF-8": b'{"step": 2, "loss": "\xff\xfe"}',
    "no JSON": b'{"step": 2, "lo',
    "no step": b'{"loss": 0.5}',
    "a step that is none": b'{"step": "2"}',
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


@pytest.fixture
def told(monkeypatch):
    """All that wandb was told, in order: how runs start, what they log, how they finish."""
    told = []
    run = SimpleNamespace(
        log=lambda metrics, step=None: told.append({**metrics, "step": step}),
        finish=lambda *status: told.append(status),
    )
    fake = SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return told


def test_wandb_gets_the_same_lines(tmp_path, told):
    tracking = Tracking("offline", group="experiment", job_type="stage", name="variant")
    with MetricsLog(tmp_path, tracking=tracking, config={"lr": 1}) as log:
        log.write(1, {"loss": 0.5})
        log.write(4, {"val": 2.0})
    given, *lines, finished = told
    assert lines == written(tmp_path)
    assert finished == (0,)
    assert given == {
        "group": "experiment", "job_type": "stage", "name": "variant", "project": "dmoe-var",
        "id": (tmp_path / "wandb_run.txt").read_text().strip(), "resume": None,
        "mode": "offline", "config": {"lr": 1}, "dir": tmp_path,
    }  # fmt: skip


def test_a_resumed_run_goes_on_with_the_same_run_of_wandb(tmp_path, told):
    """One that starts over is another; offline wandb sync joins those of one id."""
    for resume_step, mode in ((0, "online"), (3, "online"), (3, "offline"), (0, "online")):
        with MetricsLog(tmp_path, resume_step, Tracking(mode)):
            pass
    first, again, offline, anew = told[::2]
    assert first["id"] == again["id"] == offline["id"] != anew["id"]
    assert [call["resume"] for call in told[::2]] == [None, "allow", None, None]


def test_a_run_that_fails_is_not_finished_as_if_it_had_not(tmp_path, told):
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path, 0, Tracking("online")):
        raise KeyboardInterrupt
    assert told[-1] == (1,)


def test_what_has_no_steps(tmp_path, told):
    """Its numbers once, and no metrics.jsonl; nothing where wandb is off."""
    Tracking("offline").summarise(tmp_path, {"fid": 2.0}, {})
    Tracking().summarise(tmp_path, {"fid": 3.0}, {})
    assert told[1:] == [{"fid": 2.0, "step": None}, ()]
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_does_not_log(tmp_path, told, monkeypatch):
    """It leaves the file of the one that does alone, and wandb too."""
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5})
    monkeypatch.setattr("dmoe_var.training.tracking.is_main", lambda: False)
    with MetricsLog(tmp_path, tracking=Tracking("offline")) as log:
        log.write(2, {"loss": 0.25})
    assert written(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert told == []


def test_wandb_that_cannot_start_a_run(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("no\nroute to host")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(InputError, match=r"^wandb=online: .*\(no route to host\); .* offline"):
        MetricsLog(tmp_path, 0, Tracking("online"))


@pytest.mark.parametrize("where", ["variable", "netrc", "settings", "nowhere"])
def test_a_login_is_looked_for_beforehand(tmp_path, monkeypatch, where):
    """Where wandb looks for it; nothing is sent."""
    host = "https://tracker.test"
    settings = SimpleNamespace(api_key="k" if where == "settings" else None, base_url=host)
    fake = SimpleNamespace(setup=lambda: SimpleNamespace(settings=settings))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine tracker.test login user password k\n" if where == "netrc" else "")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("WANDB_API_KEY", "k" if where == "variable" else "")
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    Tracking("offline").check()
    Tracking("disabled").check()
    if where != "nowhere":
        Tracking("online").check()
        return
    with pytest.raises(ConfigError, match=r"wandb=online: no login .* wandb=offline"):
        Tracking("online").check()


def test_wandb_itself_keeps_the_group(tmp_path):
    """Offline, as the package writes it."""
    tracking = Tracking("offline", group="experiment", job_type="stage", name="variant")
    run = tracking.start(tmp_path, {"lr": 1})
    try:
        assert (run.group, run.job_type, run.name) == ("experiment", "stage", "variant")
        assert run.offline
    finally:
        run.finish()
