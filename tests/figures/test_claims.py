"""Verdicts on curves of which the gap is known."""

from __future__ import annotations

import pytest

from dmoe_var.figures.claims import Gap, Verdict, gap, table


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
    assert (found.lower, found.upper) == pytest.approx((-1.75, -1.75))
    one_seed = curve("a", [(1, (9,)), (3, (7,))])
    assert gap(one_seed, one_seed).error is None


def test_halves_of_lines_that_cross():
    """x - 5 against 0 over 0..10: -2.5 below, +2.5 above, nothing over all."""
    ours = curve("a", [(0, (-5, -5)), (10, (5, 5))])
    found = gap(ours, curve("b", [(0, (0, 0)), (10, (0, 0))]))
    assert found.mean == pytest.approx(0)
    assert (found.lower, found.upper) == pytest.approx((-2.55, 2.55), abs=0.05)


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


def test_table():
    """A gap in FID, one in percent of the own dense model's, and none."""
    found = Gap(-3.0, 0.051, 5.0, 9.0, lower=-3.04, upper=-2.96, num_seeds=2)
    relative = Gap(-10.0, 0.0, 0.5, 1.0, lower=-14, upper=-4, num_seeds=3, relative=True)
    verdicts = [
        Verdict("a claim", name, "a", "b", each)
        for name, each in (("3", found), ("5", relative), ("4", None))
    ]
    heads, rule, *rows, _, note = table(verdicts).splitlines()
    assert heads.count("|") == rule.count("|") == 9
    assert rows == [
        "| a claim | 3 | a | b | 5.000 to 9.000 GMAC | -3.00 (0.05) | -3.0, -3.0 | confirmed |",
        "| a claim | 5 | a | b | 50 to 100 % of dense | -10.00 (0.00) % | -14.0, -4.0 % | "
        "confirmed |",
        "| a claim | 4 | a | b | - | - | - | cannot be told: the curves share too few FLOPs |",
    ]
    assert "a test at 5 % by itself" in note
