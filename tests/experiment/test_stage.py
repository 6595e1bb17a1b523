"""What stages declare."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest

from dmoe_var.experiment.stage import STAGES, find
from dmoe_var.experiment.view import HOUSEKEEPING, OPTIONAL

CONFIGURATIONS = [
    {},
    {"evaluate.model": "dense", "sample.model": "dense"},
    {"evaluate.model": "pruned"},
    {"evaluate.samples": "."},
    {"sample.pretrained": "x"},
    {"base.vqvae": "digits", "base.var": "digits"},
    {"benchmark.kernels": True},
    {"benchmark.chosen": True},
]


def is_known(key, config):
    section = config
    for part in key.split("."):
        if not is_dataclass(section) or part not in {each.name for each in fields(section)}:
            return False
        section = getattr(section, part)
    return True


@pytest.mark.parametrize("changes", CONFIGURATIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_declared_keys_are_known(make_experiment, stage, changes):
    experiment = make_experiment(changes=changes)
    assert find(stage).name == stage
    assert [key for key in experiment.declared(stage) if not is_known(key, experiment.config)] == []
    assert set(experiment.needs(stage)) <= set(STAGES)


def test_other_keys_are_known(make_experiment):
    config = make_experiment().config
    given = [find(stage).given for stage in STAGES if find(stage).given]
    assert sorted(given) == ["base.classifier", "base.var", "base.vqvae"]
    assert [k for k in (*HOUSEKEEPING, *OPTIONAL, *given) if not is_known(k, config)] == []
