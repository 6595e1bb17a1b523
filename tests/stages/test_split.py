"""The split stage: the converted model in its checkpoint, its layers shared among processes."""

from __future__ import annotations

import shutil

import pytest
import torch

from dmoe_var import VAR, convert_to_moe
from dmoe_var.checkpoints.safetensors_io import read_fingerprint
from dmoe_var.stages import loaded, split

PROCESSES = 3
DEPTH = 5


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


@pytest.fixture
def work(make_work, runs):
    """Fine-tuned, but not split."""
    work = make_work(runs)
    shutil.rmtree(work.folder("split"))
    return work


def test_the_checkpoint_is_the_converted_model(make_work, work, monkeypatch):
    """Of this seed, by which neurons are clustered and routers begin."""
    work, seeds = make_work(work.config.run_dir, edited={"seed": 5}), []
    cluster_layer = split.cluster_layer
    monkeypatch.setattr(
        split, "cluster_layer", lambda *given: seeds.append(given[3:]) or cluster_layer(*given)
    )
    result = split.run(work)
    var = loaded.sparse(work)
    expected = convert_to_moe(var, work.config.split.expert_size, 5)
    assert same(loaded.split(work, "split").state_dict(), expected.state_dict())
    assert seeds == [(5,)]
    assert result.metrics == {"num_experts": 4, "expert_size": 32}
    assert read_fingerprint(loaded.checkpoint(work, "split")) == work.fingerprint("split")


def test_the_main_process_alone_writes(work, monkeypatch):
    monkeypatch.setattr(split, "is_main", lambda: False)
    result = split.run(work)
    assert result.metrics == {"num_experts": 4, "expert_size": 32}
    assert not loaded.checkpoint(work, "split").exists()


def test_processes_share_the_layers(make_work, monkeypatch):
    """Five layers over three processes: each is clustered once, and all get all of them."""
    work = make_work(changes={"var.depth": DEPTH})
    torch.manual_seed(0)
    var = VAR(work.config.var)
    expected = split.cluster(work, var)
    assert len(expected) == DEPTH
    by_process = []
    monkeypatch.setattr(split, "world_size", lambda: PROCESSES)
    monkeypatch.setattr(split, "gathered", lambda found: by_process.append(found) or by_process)
    for process in reversed(range(PROCESSES)):
        monkeypatch.setattr(split, "rank", lambda process=process: process)
        if process:
            with pytest.raises(KeyError):  # others' layers are not there yet
                split.cluster(work, var)
    labels = split.cluster(work, var)
    assert sorted(layer for found in by_process for layer in found) == list(range(DEPTH))
    assert {len(found) for found in by_process} == {1, 2}
    assert all(torch.equal(a, b) for a, b in zip(labels, expected, strict=True))


def test_a_process_without_a_layer(make_work, monkeypatch):
    work = make_work()
    torch.manual_seed(0)
    var, found_by = VAR(work.config.var), []
    expected = split.cluster(work, var)
    monkeypatch.setattr(split, "world_size", lambda: 2)
    monkeypatch.setattr(split, "rank", lambda: 1)
    whole = dict(enumerate(expected))
    monkeypatch.setattr(split, "gathered", lambda found: found_by.append(found) or [whole, found])
    assert torch.equal(split.cluster(work, var)[0], expected[0])
    assert found_by == [{}]
