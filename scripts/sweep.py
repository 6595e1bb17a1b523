"""Sweep tau: dense baseline, grids, lists and seeds; records, table, figures.

A sweep can be cut into three shards, run one after the other or, with launcher=slurm, as jobs:

    python scripts/sweep.py -m sweep.parts=3 "sweep.part=range(1,4)"
    python scripts/sweep.py

The last line joins them: it measures what is missing, and plots. Shards may run at the same time
and on other machines; to join them, copy runs/<experiment>/evaluate/* of each into one run folder.
"""

from _hydra import main, say

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_stage
from dmoe_var.stages.sweep import run_part, table_of, whole


def run(experiment: Experiment) -> None:
    sweep = experiment.config.sweep
    if sweep.part is not None:
        records = run_part(experiment)
        say(f"sweep: part {sweep.part} of {sweep.parts}, {len(records)} points")
        return
    say(table_of(run_stage(experiment, "sweep")))
    say(f"figures and records: {experiment.folder('sweep')}")


def joined(experiment: Experiment) -> Experiment:
    """Return the sweep that a shard belongs to; any other as it is."""
    return experiment if experiment.config.sweep.part is None else whole(experiment)


if __name__ == "__main__":
    main(run, checked_as=joined)
