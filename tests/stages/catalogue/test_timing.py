"""What is timed for a figure, and what of it is drawn."""

from __future__ import annotations

from dmoe_var.figures import times
from dmoe_var.stages.catalogue import timing as timing_figures


def test_throughput_is_that_of_the_operating_point(experiment):
    (run,) = timing_figures.throughput(experiment).runs
    assert run.stage == "benchmark"
    expected = {
        "benchmark.tau": (), "benchmark.chosen": True, "benchmark.parts": True,
        "benchmark.batch_sizes": (2,), "selection.tau": (0.3, 0.6),
    }  # fmt: skip
    assert {key: run.changes[key] for key in expected} == expected


def test_every_size_of_experts_is_timed_at_every_tau(experiment):
    runs = timing_figures.over_tau(experiment).runs
    keys = ("benchmark.tau", "benchmark.batch_sizes", "benchmark.chosen", "split.expert_size")
    assert [(run.stage, *(run.changes[key] for key in keys)) for run in runs] == [
        ("benchmark", (0.0, 0.9), (2,), False, size) for size in (32, 64)
    ]


def timing_row(model, tau, ms, compiled=False, by_scale=(2.0, 8.0)):
    return {
        "model": model, "tau": tau, "batch_size": 4, "compiled": compiled, "ms_median": ms,
        "ms_p10": ms - 1, "ms_p90": ms + 1, "by_scale_ms": list(by_scale),
    }  # fmt: skip


def test_what_is_drawn_of_a_benchmark(monkeypatch, tmp_path):
    """Eager rows alone: images a second through each scale, and times over tau beside dense."""
    drawn = {}
    for name in ("draw_throughput", "draw_over_tau"):
        monkeypatch.setattr(times, name, lambda *given, name=name: drawn.update({name: given}))
    rows = [
        timing_row("dense", None, 20.0),
        timing_row("dense", None, 5.0, compiled=True, by_scale=(1.0, 1.0)),
        timing_row("dynamic", 0.5, 15.0, by_scale=(2.0, 5.0)),
        timing_row("random", 0.5, 14.0, by_scale=(1.0, 1.0)),
        timing_row("dynamic", 0.5, 4.0, compiled=True, by_scale=(1.0, 1.0)),
    ]
    timing = {"name": "experts of 32", "method": "last", "shade": 0.5, "rows": rows}
    data = {"figure": "9", "title": "a title", "timings": [timing], "note": "a note"}
    timing_figures.draw_throughput(None, data, tmp_path)
    bars, *rest = drawn["draw_throughput"]
    assert rest == ["Figure 9: a title", "a note", tmp_path]
    assert [(bar["method"], bar["images_per_s"]) for bar in bars] == [
        ("dense", [2000, 500]),
        ("chosen", [2000, 800]),
    ]
    timing_figures.draw_over_tau(None, data, tmp_path)
    ((curve,), *_) = drawn["draw_over_tau"]
    assert curve["dense"] == rows[0]
    assert curve["rows"] == [rows[2]]
    assert (curve["name"], curve["shade"]) == ("experts of 32", 0.5)
