"""Plot the paper's figures from records; if asked, first make the records that are missing.

python scripts/figures.py experiment=digits figure=all make=true quick=true
"""

import re

from _hydra import main, report, say

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_stage
from dmoe_var.stages import figures

SHORT = ("figure", "make", "plan", "quick")


def in_full(overrides: list[str]) -> list[str]:
    """Write out the short keys of overrides, and figure=3,4 as the list that it is."""
    short = re.compile(rf"^({'|'.join(SHORT)})=")
    written = [short.sub(r"figures.\1=", each) for each in overrides]
    return [re.sub(r"^(figures\.figure)=([^\[\]]*,.*)$", r"\1=[\2]", each) for each in written]


def run(experiment: Experiment) -> None:
    if experiment.config.figures.plan:
        say(figures.plan_text(experiment, figures.missing(experiment)))
        return
    if experiment.config.figures.make:  # here, as the stage locks its folder: others can help
        figures.make(experiment)
    report(experiment, "figures", run_stage(experiment, "figures"))


if __name__ == "__main__":
    main(run, in_full)
