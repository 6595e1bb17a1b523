"""Sweep tau: dense baseline, grids, lists and seeds; records, table, figures."""

from _hydra import main, say

from dmoe_var.stages.graph import run_stage
from dmoe_var.stages.sweep import table_of
from dmoe_var.stages.work import Work


def run(work: Work) -> None:
    say(table_of(run_stage(work, "sweep")))
    say(f"figures and records: {work.folder('sweep')}")


if __name__ == "__main__":
    main(run)
