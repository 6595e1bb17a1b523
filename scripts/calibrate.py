"""Find tau for a budget, and verify it on held-out images.

python scripts/calibrate.py budget=0.81        (a share of the dense model's FLOPs)
python scripts/calibrate.py budget_ms=900      (milliseconds of a batch on this device)
python scripts/calibrate.py temperature=true   (and how sharp predictions are to be)
"""

import re

from _hydra import main, report, say

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_stage

SHORT = re.compile(r"^(budget|budget_ms|budgets|by_layer|loss|temperature)=")


def in_full(overrides: list[str]) -> list[str]:
    """Write out the short keys of overrides."""
    return [SHORT.sub(r"calibrate.\1=", each) for each in overrides]


def run(experiment: Experiment) -> None:
    record = run_stage(experiment, "calibrate")
    report(experiment, "calibrate", record)
    tau = record.about["tau"]
    key = "layer_tau" if record.about["by_layer"] else "tau"
    say(f"selection.{key}={tau}".replace(" ", ""))
    if "temperature" in record.about:
        say(f"sampling.temperature={list(record.about['temperature'])}".replace(" ", ""))


if __name__ == "__main__":
    main(run, in_full)
