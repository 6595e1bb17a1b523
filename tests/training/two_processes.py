"""Runs of two processes: `python two_processes.py FOLDER` prints how each of them ended.

FOLDER holds the models, the tokens and cases.json; each process writes under FOLDER/CASE/RANK what
it ends with.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from dmoe_var import distributed, load_var, load_vqvae
from dmoe_var.data.token_cache import About, Seconds, TokenSet
from dmoe_var.training import loop
from dmoe_var.training.loop import train
from dmoe_var.training.objectives import ConversionConfig, SparsifyConfig, SparsifyObjective
from dmoe_var.training.router_objective import RouterConfig, RouterObjective
from dmoe_var.training.step import Run

PROCESSES = 2


def build(folder, kind, fields):
    """(objective in float64, its configuration)."""
    vqvae = load_vqvae(folder / "vqvae").double()
    stored, sets = load_file(folder / "tokens.safetensors"), []
    for name in ("training", "held_out"):
        rows_NL = stored[f"{name}.tokens"].numpy().astype("uint16")
        labels = stored[f"{name}.labels"]
        about = About(len(labels), 0, Seconds())
        sets.append(TokenSet(rows_NL, labels, vqvae.config.patch_nums, about))
    model = load_var(folder / ("moe" if kind == "router" else "var")).double()
    if kind == "router":
        config = RouterConfig(**fields)
        return RouterObjective(model, vqvae, *sets, config), config
    config = SparsifyConfig(**fields)
    return SparsifyObjective(model, vqvae, *sets, config, ConversionConfig()), config


def run_case(folder, name, kind, fields, stop):
    """Train, and write weights, metrics and how many micro-batches this process had. As step `stop`
    begins, a kill comes that nothing in the process can answer."""
    objective, config = build(folder, kind, fields)
    ran, loss = [], objective.loss

    def noted(indices_B, step, num_steps, rows):
        if step == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        ran.append(step)
        return loss(indices_B, step, num_steps, rows)

    objective.loss = noted
    mine = folder / name / str(distributed.rank())
    (mine / "run").mkdir(parents=True)
    run = Run(mine / "run", "ours", name="test", seed=3, progress=distributed.is_main())
    metrics = train(objective, config, run)
    save_file(objective.module.state_dict(), mine / "weights.safetensors")
    (mine / "metrics.json").write_text(json.dumps([len(ran), metrics]))


def check_collectives():
    """What distributed.py promises."""
    rank = dist.get_rank()
    assert (distributed.rank(), distributed.is_main()) == (rank, rank == 0)
    assert distributed.world_size() == PROCESSES
    assert distributed.gathered({"rank": rank}) == [{"rank": r} for r in range(PROCESSES)]
    assert distributed.from_main(("value", rank)) == ("value", 0)
    distributed.BUCKET = 7
    shapes = [(), (2, 3), (4,), (30,), (1, 1), (3,)]
    tensors = [torch.full(shape, float(i + 10 * rank)) for i, shape in enumerate(shapes)]
    distributed.sum_over_processes(iter(tensors))
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        expected = sum(i + 10 * r for r in range(PROCESSES))
        assert torch.equal(tensor, torch.full(shape, float(expected)))


def one_of_them(folder, rank):
    torch.set_num_threads(1)
    loop.LONG_RUN = 1  # the main process rehearses every run, the other waits for it
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    check_collectives()
    for case in json.loads((folder / "cases.json").read_text()):
        run_case(folder, **case)
    distributed.stop()


def main(folder):
    """The imports, which an optimiser adds to, take longer than the runs: once is enough."""
    torch.optim.AdamW([torch.zeros(1)])
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes = [context.Process(target=one_of_them, args=(folder, r)) for r in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(json.dumps([process.exitcode for process in processes]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
