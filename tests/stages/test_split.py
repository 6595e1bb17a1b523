"""The split stage: the converted model in its checkpoint, its layers shared among processes."""

from __future__ import annotations

import shutil

import pytest
import torch

from dmoe_var import VAR, convert_to_moe
from dmoe_var.checkpoints.safetensors_io import read_fingerprint
from dmoe_var.stages import split
from dmoe_var.stages.parts import loaded

PROCESSES = 3
DEPTH = 5


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


@pytest.fixture
def experiment(make_experiment, runs):
    """Fine-tuned, but not split."""
    experiment = make_experiment(runs)
    shutil.rmtree(experiment.folder("split"))
    return experiment


def test_the_checkpoint_is_the_converted_model(make_experiment, experiment, monkeypatch):
    """Of this seed, by which neurons are clustered and routers begin."""
    experiment, seeds = make_experiment(experiment.config.run_dir, edited={"seed": 5}), []
    cluster_layer = split.cluster_layer
    monkeypatch.setattr(
        split, "cluster_layer", lambda *given: seeds.append(given[3:]) or cluster_layer(*given)
    )
    result = split.run(experiment)
    var = loaded.sparse(experiment)
    expected = convert_to_moe(var, experiment.config.split.expert_size, 5)
    assert same(loaded.split(experiment, "split").state_dict(), expected.state_dict())
    assert seeds == [(5,)]
    assert result.metrics == {"num_experts": 4, "expert_size": 32}
    assert read_fingerprint(loaded.checkpoint(experiment, "split")) == experiment.fingerprint(
        "split"
    )


def test_the_main_process_alone_writes(experiment, monkeypatch):
    monkeypatch.setattr(split, "is_main", lambda: False)
    result = split.run(experiment)
    assert result.metrics == {"num_experts": 4, "expert_size": 32}
    assert not loaded.checkpoint(experiment, "split").exists()


def test_processes_share_the_layers(make_experiment, monkeypatch):
    """Five layers over three processes: each is clustered once, and all get all of them."""
    experiment = make_experiment(changes={"var.depth": DEPTH})
    torch.manual_seed(0)
    var = VAR(experiment.config.var)
    expected = split.cluster(experiment, var)
    assert len(expected) == DEPTH
    by_process = []
    monkeypatch.setattr(split, "world_size", lambda: PROCESSES)
    monkeypatch.setattr(split, "gathered", lambda found: by_process.append(found) or by_process)
    for process in reversed(range(PROCESSES)):
        monkeypatch.setattr(split, "rank", lambda process=process: process)
        if process:
            with pytest.raises(KeyError):  # others' layers are not there yet
                split.cluster(experiment, var)
    labels = split.cluster(experiment, var)
    assert sorted(layer for found in by_process for layer in found) == list(range(DEPTH))
    assert {len(found) for found in by_process} == {1, 2}
    assert all(torch.equal(a, b) for a, b in zip(labels, expected, strict=True))


def test_a_process_without_a_layer(make_experiment, monkeypatch):
    experiment = make_experiment()
    torch.manual_seed(0)
    var, found_by = VAR(experiment.config.var), []
    expected = split.cluster(experiment, var)
    monkeypatch.setattr(split, "world_size", lambda: 2)
    monkeypatch.setattr(split, "rank", lambda: 1)
    whole = dict(enumerate(expected))
    monkeypatch.setattr(split, "gathered", lambda found: found_by.append(found) or [whole, found])
    assert torch.equal(split.cluster(experiment, var)[0], expected[0])
    assert found_by == [{}]
