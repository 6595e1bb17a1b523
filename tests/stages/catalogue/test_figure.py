"""Claims go by the names of curves; of the committed data they say what is committed with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from composing import composed

from dmoe_var.config.parse import parse_config
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.figures.calibration import NAMES
from dmoe_var.figures.claims import table
from dmoe_var.stages.catalogue import FIGURES, named

ROOT = Path(__file__).resolve().parents[3]
DRAWN = ROOT / "notebooks" / "records" / "digits" / "figures"
JUDGED = ("3", "4", "5", "7", "8a", "rules")


@pytest.fixture(scope="module")
def digits():
    """The experiment of the committed records."""
    config = parse_config(composed("figures"))
    return Experiment(config, config)


PAPER = ("2a", "2b", "3", "4", "5", "6", "7", "8a", "8b", "9", "10", "11", "12")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", PAPER),
        ("3", ("3",)),
        (("2", "8b"), ("2a", "2b", "8b")),
        (("rules", "all"), ("rules", *PAPER)),
        (("3", "3"), ("3",)),
    ],
)
def test_names(given, expected):
    assert named((given,) if isinstance(given, str) else given) == expected


@pytest.mark.parametrize("given", ["13", "3a", "", "none"])
def test_wrong_names(given):
    with pytest.raises(ConfigError, match=f"figures.figure={given}: no figure; allowed: all, 2a, "):
        named(("3", given))


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


def test_claims_are_about_curves_of_their_figure(experiment):
    for name in FIGURES.keys() - {"learning"}:  # which needs a training to look at
        figure = FIGURES[name](experiment)
        named = {n for claim in figure.claims for n in (claim.better, claim.worse, *claim.dense)}
        known = set(NAMES.values()) if figure.pending else {curve.name for curve in figure.curves}
        assert named <= known
        beyond = (
            "calibration",
            "drafted",
            "guidance",
            "skipped",
            "skipping",
            "heads",
            "conditions",
            "tuned",
            "techniques",
        )
        assert bool(named) == (name in (*JUDGED, *beyond))
        assert figure.verdicts({"figure": name}) == []  # of curves that are not there
