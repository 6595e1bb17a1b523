"""Sample chosen classes, dense beside dynamic from the same seeds: a grid, and single PNGs.

python scripts/sample.py "classes=[golden_retriever,985]" "seeds=[0,1]" tau=0.2
"""

import re

from _hydra import main, report, say

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_stage
from dmoe_var.stages.sample import settled

SHORT = {"classes": "sample.classes", "seeds": "sample.seeds", "tau": "selection.tau"}


def in_full(overrides: list[str]) -> list[str]:
    """Write out the short keys of overrides.

    A selection on the command line stands above the one that is stored with a pretrained model.
    """
    found = [
        re.sub(r"^(\w+)=", lambda key: f"{SHORT.get(key[1], key[1])}=", each) for each in overrides
    ]
    given = any(each.startswith("selection.") for each in found)
    return ["sample.selection=given", *found] if given else found


def run(experiment: Experiment) -> None:
    experiment, note = settled(experiment)
    if note is not None:
        say(note)
    report(experiment, "sample", run_stage(experiment, "sample"))


if __name__ == "__main__":
    main(run, in_full)
