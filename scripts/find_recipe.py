"""Find the techniques and tau that keep to a budget with the best FID.

python scripts/find_recipe.py budget=0.5          (a share of the dense model's FLOPs)
python scripts/evaluate.py recipe=runs/digits/find_recipe/default/recipe.json
"""

import re

from _hydra import main, report, say

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_stage
from dmoe_var.stages.find_recipe import RECIPE_FILE

SHORT = re.compile(r"^(budget)=")


def in_full(overrides: list[str]) -> list[str]:
    """Write out the short keys of overrides."""
    return [SHORT.sub(r"find_recipe.\1=", each) for each in overrides]


def run(experiment: Experiment) -> None:
    report(experiment, "find_recipe", run_stage(experiment, "find_recipe"))
    say(f"recipe={experiment.folder('find_recipe') / RECIPE_FILE}")


if __name__ == "__main__":
    main(run, in_full)
