"""A stage reads what it declared, and nothing else."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dmoe_var.experiment.graph import StageResult, run_stage
from dmoe_var.experiment.points import vary
from dmoe_var.experiment.view import HOUSEKEEPING, UndeclaredRead, view

BASE = ("base.vqvae", "base.var", "base.classifier")
DECLARED = ("sampling", "evaluate.seed", *BASE, "benchmark.batch_sizes")


@pytest.fixture
def whole(make_experiment):
    return make_experiment(changes={"evaluate.seed": 7, "benchmark.batch_sizes": [2, 3]}).config


@pytest.fixture
def shown(whole):
    return view(whole, "maps", DECLARED)


def test_what_is_declared_is_shown(whole, shown):
    """A section as it is, if all of it is declared; of another its declared keys."""
    assert shown.sampling is whole.sampling
    assert shown.base is whole.base
    assert shown.evaluate.seed == 7
    assert shown.benchmark.sizes == (2, 3)


def test_housekeeping_is_shown_to_all(whole, shown):
    for key in HOUSEKEEPING:
        found, expected = shown, whole
        for part in key.split("."):
            found, expected = getattr(found, part), getattr(expected, part)
        assert found == expected


@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("seed", lambda config: config.seed),
        ("evaluate.model", lambda config: config.evaluate.model),
        ("split", lambda config: config.split),
        ("train_var.lr", lambda config: config.train_var.lr),
        ("train_var.steps", lambda config: config.train_var.num_steps(3)),
        ("benchmark.real_masks", lambda config: config.benchmark.dynamic),
        ("evaluate.model", lambda config: asdict(config.evaluate)),
        ("evaluate.model", lambda config: replace(config.evaluate, seed=1)),
        ("seed", lambda config: replace(config, name="other")),
        ("seed", lambda config: config.leaves),
    ],
)
def test_what_is_not_declared_raises(whole, shown, key, read):
    with pytest.raises(UndeclaredRead, match=f"^maps reads {key}, which it does not declare: .*"):
        read(shown)
    read(whole)


def test_there_is_no_more_than_in_the_configuration(shown):
    for read in (lambda: shown.nothing, lambda: shown.evaluate.nothing):
        with pytest.raises(AttributeError, match="nothing"):
            read()


def test_a_stage_that_reads_what_it_did_not_declare_has_no_record(make_experiment, tmp_path):
    def run(experiment):
        return StageResult({"cfg": experiment.config.sampling.cfg})

    experiment = make_experiment(tmp_path)
    with pytest.raises(UndeclaredRead, match=r"train_vqvae reads sampling.cfg, .*train_vqvae\.py"):
        run_stage(experiment, "train_vqvae", run)
    assert not (experiment.folder("train_vqvae") / "result.json").exists()


def test_a_point_of_a_stage_is_shown_no_more_than_the_stage(make_experiment):
    varied = vary(
        make_experiment().read_by("sweep"), {"evaluate.num_samples": 40, "export.private": False}
    )
    assert varied.config.evaluate.num_samples == 40
    assert varied.whole.export.private is False
    with pytest.raises(UndeclaredRead, match="sweep reads export"):
        _ = varied.config.export
