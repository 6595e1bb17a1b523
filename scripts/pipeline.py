"""Run all stages in order, sweep and figures included.

What is done with the same configuration is skipped; what was interrupted goes on.
"""

from _hydra import main, say

from dmoe_var.experiment.experiment import Experiment
from dmoe_var.experiment.graph import run_through
from dmoe_var.stages.sweep import table_of


def run(experiment: Experiment) -> None:
    def announce(stage: str, done: bool) -> None:
        say(f"{stage}: {'done already' if done else 'running'}, {experiment.folder(stage)}")

    record = run_through(experiment, experiment.config.until, announce)
    if record.stage == "sweep":
        say(table_of(record))


if __name__ == "__main__":
    main(run)
