"""Verdicts on curves of which the gap is known."""

from __future__ import annotations

import pytest

from dmoe_var.figures.claims import Gap, Verdict, gap, table, verdicts


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
    found = gap(ours, theirs)
    assert found.mean == pytest.approx(-1.75)
    assert found.error == pytest.approx(0.25)  # gaps -2 and -1.5: std 0.354 / sqrt(2)
    assert (found.low, found.high, found.num_seeds) == (2, 5, 2)
    assert (found.lower, found.upper) == (pytest.approx(-1.75), pytest.approx(-1.75))


def test_halves_of_lines_that_cross():
    """x - 5 against 0 over 0..10: -2.5 below, +2.5 above, nothing over all."""
    ours = curve("a", [(0, (-5, -5)), (10, (5, 5))])
    found = gap(ours, curve("b", [(0, (0, 0)), (10, (0, 0))]))
    assert found.mean == pytest.approx(0)
    assert (found.lower, found.upper) == (
        pytest.approx(-2.55, abs=0.05),
        pytest.approx(2.55, abs=0.05),
    )


def test_gap_of_one_seed_has_no_error():
    ours = curve("a", [(1, (9,)), (3, (7,))])
    found = gap(ours, ours)
    assert (found.mean, found.error) == (0, None)


@pytest.mark.parametrize(
    "far", [[(3, (9, 9)), (4, (7, 7))], [(1.97, (9, 9)), (4, (7, 7))], [(1.5, (8, 8))]]
)
def test_too_few_common_flops(far):
    """None at all, 1.5 % of them, and a curve of one point."""
    assert gap(curve("a", [(1, (9, 9)), (2, (7, 7))]), curve("b", far)) is None


def test_relative_to_the_own_dense_model():
    """Twice the FLOPs and twice the FID are the same relative curve."""
    small, large = [(5, (11, 12)), (10, (10, 10))], [(10, (22, 24)), (20, (20, 20))]
    dense = curve("d", [(10, (10, 10))]), curve("D", [(20, (20, 20))])
    found = gap(curve("a", small), curve("b", large), dense)
    assert (found.mean, found.error) == (pytest.approx(0), pytest.approx(0))
    assert (found.low, found.high) == (0.5, 1)


@pytest.mark.parametrize(
    ("mean", "error", "upper", "says"),
    [
        (-1.0, 0.35, -1.0, "confirmed"),  # t of 4 degrees of freedom: 2.776
        (1.0, 0.35, 1.0, "contradicted"),
        (-1.0, 0.37, -1.0, "not settled: within the spread over seeds"),
        (1.0, None, 1.0, "cannot be told: one seed"),
        (-1.0, 0.35, 0.5, "confirmed, but not in the upper half of the FLOPs"),
    ],
)
def test_says(mean, error, upper, says):
    found = Gap(mean, error, 1, 2, lower=mean, upper=upper, num_seeds=5)
    assert Verdict("c", "3", "a", "b", found).says == says


def test_says_nothing_without_common_flops():
    assert "share too few FLOPs" in Verdict("c", "3", "a", "b", None).says


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
    assert "| 5.000 to 9.000 GMAC | -3.00 (0.00) | -3.0, -3.0 |" in lines[2]


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
    assert (verdict.better, verdict.gap.mean) == ("depth 4", pytest.approx(-10))
    assert "| 50 to 100 % of dense | -10.00 (0.00) % |" in table([verdict])


def test_each_calibration_is_judged_against_each_rival():
    """By the curves' methods, not by their places."""
    points = {"dense": 5, "search": 4, "calibrated": 3, "fixed": 2, "by_layer": 1}
    curves = [
        {**curve(f"the {method}", [(1, (fid, fid)), (3, (fid, fid + 1))]), "method": method}
        for method, fid in points.items()
    ]
    found = verdicts({"calibration": {"curves": curves}})
    assert {(v.better, v.worse): v.gap.mean for v in found} == {
        ("the by_layer", "the fixed"): pytest.approx(-1),
        ("the by_layer", "the search"): pytest.approx(-3),
        ("the calibrated", "the fixed"): pytest.approx(1),
        ("the calibrated", "the search"): pytest.approx(-1),
    }


def test_routers_are_judged_against_chance():
    """By the curves' names, wherever they stand."""
    points = {"dense VAR": 5, "top-k": 3, "random k": 4, "oracle, Eq. 3": 1, "Eq. 3": 2}
    curves = [curve(name, [(1, (fid, fid)), (3, (fid, fid + 1))]) for name, fid in points.items()]
    (found,) = verdicts({"rules": {"curves": curves}})
    assert (found.better, found.worse, found.gap.mean) == ("Eq. 3", "random k", pytest.approx(-2))
