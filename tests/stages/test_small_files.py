"""max_file_mb: trainings and conversions leave files of that size, with the same weights."""

from __future__ import annotations

import shutil

import pytest

from dmoe_var.checkpoints import tensor_files
from dmoe_var.checkpoints.tensor_files import read_tensors
from dmoe_var.experiment.graph import run_stage
from dmoe_var.stages import train_var
from dmoe_var.training.state import STATE_FILE, StateFile

LIMIT = 40_000


@pytest.mark.parametrize("stage", ["train_var", "sparsify", "split", "train_router"])
def test_weights_in_small_files(make_experiment, runs, monkeypatch, stage):
    """Of checkpoints, snapshots and states, which are gone when the stage is done."""
    plain = make_experiment(runs)
    whole, _ = read_tensors(plain.folder(stage) / "checkpoint" / "model.safetensors")
    shutil.rmtree(plain.folder(stage))
    monkeypatch.setattr(tensor_files, "MB", LIMIT)
    states, save = [], StateFile.save

    def saved(self, *given):
        save(self, *given)
        states.append([each.stat().st_size for each in self.path.parent.glob(f"{STATE_FILE}*")])

    monkeypatch.setattr(StateFile, "save", saved)
    experiment = make_experiment(runs, {"max_file_mb": 1, "train_var.snapshot_every": 1})
    assert experiment.folder(stage) == plain.folder(stage)
    run_stage(experiment, stage)
    weights = experiment.folder(stage) / "checkpoint" / "model.safetensors"
    found, _ = read_tensors(weights)
    assert found.keys() == whole.keys()
    assert all(found[name].equal(tensor) for name, tensor in whole.items())
    left = [each for each in experiment.folder(stage).rglob("*safetensors*") if each.is_file()]
    assert len(left) > 2
    assert max(each.stat().st_size for each in left) <= LIMIT
    assert not [each for each in left if each.name.startswith(STATE_FILE)]
    assert [len(sizes) > 1 for sizes in states] == [stage != "train_router"] * len(states)
    assert bool(states) == (stage != "split")
    assert max(map(max, states), default=0) <= LIMIT
    if stage == "train_var":
        for folder in train_var.snapshots(experiment).values():
            assert len(list(folder.glob("model.safetensors.*"))) > 1
