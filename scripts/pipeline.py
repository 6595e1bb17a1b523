"""All stages in order, sweep and figures included: what is done is skipped, what was cut off goes on."""

from _hydra import main

from dmoe_var.stages.graph import run_through
from dmoe_var.stages.sweep import print_table
from dmoe_var.stages.work import Work


def run(work: Work) -> None:
    def announce(stage: str, done: bool) -> None:
        print(f"{stage}: {'done already' if done else 'running'} ({work.folder(stage)})", flush=True)

    record = run_through(work, "sweep", announce)
    print_table(record)


if __name__ == "__main__":
    main(run)
