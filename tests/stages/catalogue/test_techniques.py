"""Techniques alone, joined and all but one; and the table of what was measured."""

from __future__ import annotations

from dmoe_var.figures.style import COLOURS
from dmoe_var.stages.catalogue import techniques
from dmoe_var.stages.catalogue.techniques import ABLATED, JOINED, PLAIN, table


def changes_of(curve):
    return [dict(point.changes) for point in curve.points]


def test_each_alone_joined_and_left_out(experiment):
    """Joined are the keys of all; each ablation lacks those of its own technique."""
    known = techniques.techniques_of(experiment)
    assert known.keys() <= COLOURS.keys()
    curves = {curve.name: curve for curve in techniques.techniques(experiment).curves}
    over = [{**each} for each in changes_of(curves[PLAIN])]
    assert [each["selection.tau"] for each in over] == [(0.0,), (0.5,)]
    everything = {key: value for changes in known.values() for key, value in changes.items()}
    for name, changes in (*known.items(), (JOINED, everything)):
        assert changes_of(curves[name]) == [{**each, **changes} for each in over]
    ablated = curves[ABLATED]
    assert [point.label for point in ablated.points] == list(known)
    for changes, left in zip(known.values(), changes_of(ablated), strict=True):
        others = {key: value for key, value in everything.items() if key not in changes}
        assert {**others, "selection.tau": (0.3, 0.6)}.items() <= left.items()
        assert not changes.keys() & left.keys()
    assert changes_of(curves["dense, guidance ends"]) == [
        {"sampling.cfg": (1.5, 0.0, 0.0, 0.0), "evaluate.model": "dense"}
    ]


def row(label, gmac, fid, **others):
    return {"label": label, "flops_gmac": gmac, "fid_mean": fid, "fid_std": 0.25, **others}


def test_table():
    dense = {"name": "dense VAR", "rows": [row("dense VAR", 2.0, 9, sampling_ms_per_image=4.0)]}
    ours = {"name": "ours", "rows": [
        row("0.4", 1.5, 8, sampling_ms_per_image=3.0, label_agreement=0.995)
    ]}  # fmt: skip
    *_, first, second = table([dense, ours], "fid").splitlines()
    assert first == "| dense VAR | - | 2.0000 | 0.0% | 9.0 ± 0.2 | - | 4.0 |"
    assert second == "| ours | 0.4 | 1.5000 | 25.0% | 8.0 ± 0.2 | 99.5% | 3.0 |"
