"""Claims go by the names of curves; of the committed data they say what is committed with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composing import composed

from dmoe_var.config.parse import parse_config
from dmoe_var.experiment.work import Work
from dmoe_var.figures.calibration import NAMES
from dmoe_var.figures.claims import table
from dmoe_var.stages.catalogue import FIGURES

ROOT = Path(__file__).resolve().parents[3]
DRAWN = ROOT / "notebooks" / "records" / "digits" / "figures"
JUDGED = ("3", "4", "5", "7", "8a", "rules")


@pytest.fixture(scope="module")
def digits():
    """The experiment of the committed records."""
    config = parse_config(composed("figures"))
    return Work(config, config)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("claims.md", JUDGED),
        ("claims_calibration.md", ("calibration",)),
        ("seeds_3_4_5/claims.md", ("7",)),
    ],
)
def test_claims_of_the_committed_figures(digits, text, names):
    found = []
    for name, figure in FIGURES.items():
        path = (DRAWN / text).with_name(f"figure_{name}.json")
        if name in names:
            found += figure(digits).verdicts(json.loads(path.read_text()))
    assert table(found) + "\n" == (DRAWN / text).read_text()


def test_claims_are_about_curves_of_their_figure(work):
    for name, make in FIGURES.items():
        figure = make(work)
        named = {n for claim in figure.claims for n in (claim.better, claim.worse, *claim.dense)}
        known = set(NAMES.values()) if figure.pending else {curve.name for curve in figure.curves}
        assert named <= known
        assert bool(named) == (name in (*JUDGED, "calibration"))


def drawn(name, fid_at):
    """Data of a figure: by curve, FID by FLOPs, with the second seed 0.1 worse; curves in the order
    of their names, in which no figure has them."""
    curves = [
        {
            "name": curve,
            "rows": [
                {"flops_gmac": gmac, "fid_by_seed": [fid, fid + 0.1]} for gmac, fid in fids.items()
            ],
        }
        for curve, fids in sorted(fid_at.items())
    ]
    return {"figure": name, "curves": curves}


GOOD, BAD = {5: 6, 9: 5}, {5: 9, 9: 8}
FID = {
    "3": {"one tau, last scales": GOOD, "one tau, all scales": BAD, "Pruned-FFN, last scales": BAD},
    "4": {"scale 4 alone": GOOD, "scale 2 alone": BAD},
    "7": {"ReLU and Hoyer": GOOD, "ReLU alone (alpha 0)": GOOD, "GELU and Hoyer": BAD},
    "8a": {"experts of 32": BAD, "experts of 64": GOOD},
    "rules": {"Eq. 3": GOOD, "random k": BAD, "oracle, Eq. 3": {5: 1, 9: 1}},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "3",
            [
                ("one tau, last scales", "one tau, all scales", "confirmed"),
                ("one tau, last scales", "Pruned-FFN, last scales", "confirmed"),
            ],
        ),
        ("4", [("scale 4 alone", "scale 2 alone", "confirmed")]),
        (
            "7",
            [
                ("ReLU alone (alpha 0)", "GELU and Hoyer", "confirmed"),
                ("ReLU and Hoyer", "ReLU alone (alpha 0)", "not settled"),
            ],
        ),
        ("8a", [("experts of 32", "experts of 64", "contradicted")]),
        ("rules", [("Eq. 3", "random k", "confirmed")]),
    ],
)
def test_verdicts(work, name, expected):
    found = FIGURES[name](work).verdicts(drawn(name, {"dense VAR": {5: 5}, **FID[name]}))
    assert [(v.better, v.worse, v.says.split(":")[0]) for v in found] == expected
    assert {v.figure for v in found} == {name}


def test_depths_are_compared_relative_to_their_own_dense_models(work):
    """The deepest with the shallowest: depths 1 and 3 of three."""
    ours = "one tau, last scales, depth"
    fids = {f"{ours} 1": {5: 12, 9: 10}, f"{ours} 2": {5: 1, 9: 1}, f"{ours} 3": {5: 5, 9: 5}}
    data = drawn("5", fids)
    for depth, fid in ((1, 10), (2, 1), (3, 5)):
        rows = [{"flops_gmac": 9, "fid_by_seed": [fid, fid + 0.1]}]
        data["curves"].append({"name": f"dense, depth {depth}", "rows": rows})
    (verdict,) = FIGURES["5"](work).verdicts(data)
    assert (verdict.better, verdict.worse) == (f"{ours} 3", f"{ours} 1")
    assert verdict.gap.relative
    assert verdict.gap.mean == pytest.approx(-10, abs=0.1)


def test_each_calibration_is_judged_against_each_rival(work):
    """Of those that were drawn: no curve rises linearly here."""
    fid = {"search": 4, "calibrated": 3, "fixed": 2, "by_layer": 1}
    data = drawn("calibration", {NAMES[method]: {5: f, 9: f} for method, f in fid.items()})
    found = FIGURES["calibration"](work).verdicts(data)
    assert {(v.better, v.worse): v.gap.mean for v in found} == {
        (NAMES[ours], NAMES[rival]): pytest.approx(fid[ours] - fid[rival])
        for ours in ("by_layer", "calibrated")
        for rival in ("fixed", "search")
    }
