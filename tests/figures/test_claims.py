"""Verdicts on curves of which the gap is known."""

from __future__ import annotations

import pytest

from dmoe_var.figures.claims import Verdict, gap, table, verdicts


def curve(name, points):
    """points: (gmac, FID of each seed)."""
    rows = [
        {"flops_gmac": g, "fid_by_seed": list(f), "fid_mean": sum(f) / len(f)} for g, f in points
    ]
    return {"name": name, "rows": rows}


def test_gap_of_parallel_lines():
    """FID 10 - x against 12 - x at other places: the gap is -2 wherever both reach."""
    ours = curve("a", [(1, (9, 9.5)), (3, (7, 7.5)), (6, (4, 4.5))])
    theirs = curve("b", [(5, (7, 7)), (2, (10, 10))])
    mean, error = gap(ours, theirs)
    assert mean == pytest.approx(-1.75)
    assert error == pytest.approx(0.25)  # gaps -2 and -1.5: std 0.354 / sqrt(2)


def test_gap_of_one_seed_has_no_error():
    ours = curve("a", [(1, (9,)), (3, (7,))])
    assert gap(ours, ours) == (0, None)


def test_no_common_flops():
    near, far = curve("a", [(1, (9, 9)), (2, (7, 7))]), curve("b", [(3, (9, 9)), (4, (7, 7))])
    assert gap(near, far) == (None, None)


def test_relative_to_the_own_dense_model():
    """Twice the FLOPs and twice the FID are the same relative curve."""
    small, large = [(5, (11, 12)), (10, (10, 10))], [(10, (22, 24)), (20, (20, 20))]
    dense = curve("d", [(10, (10, 10))]), curve("D", [(20, (20, 20))])
    mean, error = gap(curve("a", small), curve("b", large), dense)
    assert (mean, error) == (pytest.approx(0), pytest.approx(0))


@pytest.mark.parametrize(
    ("mean", "error", "says"),
    [
        (-1.0, 0.35, "confirmed"),  # t of 4 degrees of freedom: 2.776
        (1.0, 0.35, "contradicted"),
        (-1.0, 0.37, "not settled"),
        (1.0, None, "one seed"),
        (None, None, "share no FLOPs"),
    ],
)
def test_says(mean, error, says):
    assert says in Verdict("c", "3", "a", "b", mean, error, 5).says


def test_verdicts_name_the_curves_they_compare():
    dense = curve("dense VAR", [(10, (5, 5))])
    good, bad = [(5, (6, 6.1)), (9, (5, 5.1))], [(5, (9, 9.1)), (9, (8, 8.1))]
    drawn = {
        "3": {"curves": [dense, curve("last", good), curve("all", bad), curve("pruned", bad)]},
        "4": {"curves": [dense, curve("scale 3", bad), curve("scale 4", good)]},
        "7": {"curves": [dense, curve("both", good), curve("relu", good), curve("gelu", bad)]},
        "8a": {"curves": [dense, curve("8", bad), curve("16", good), curve("32", good)]},
    }
    found = verdicts(drawn)
    pairs = [(v.figure, v.better, v.worse, v.says.split(":")[0]) for v in found]
    assert pairs == [
        ("3", "last", "all", "confirmed"),
        ("3", "last", "pruned", "confirmed"),
        ("4", "scale 4", "scale 3", "confirmed"),
        ("7", "relu", "gelu", "confirmed"),
        ("7", "both", "relu", "not settled"),
        ("8a", "8", "32", "contradicted"),
    ]
    lines = table(found).splitlines()
    assert len(lines) == 4 + len(found)
    assert "-3.00 (0.00)" in lines[2]


def test_depths_are_compared_relative_to_their_own_dense_models():
    drawn = {
        "5": {
            "curves": [
                curve("dense 2", [(10, (10, 10))]),
                curve("depth 2", [(5, (12, 12)), (10, (10, 10))]),
                curve("dense 4", [(20, (5, 5))]),
                curve("depth 4", [(10, (5, 5)), (20, (5, 5))]),
            ]
        }
    }
    (verdict,) = verdicts(drawn)
    assert (verdict.better, verdict.gap) == ("depth 4", pytest.approx(-10))
