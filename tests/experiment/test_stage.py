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
def test_declared_keys_are_known(make_work, stage, changes):
    work = make_work(changes=changes)
    assert find(stage).name == stage
    assert [key for key in work.declared(stage) if not is_known(key, work.config)] == []
    assert set(work.needs(stage)) <= set(STAGES)


def test_other_keys_are_known(make_work):
    config = make_work().config
    given = [find(stage).given for stage in STAGES if find(stage).given]
    assert given == ["base.vqvae", "base.var"]
    assert [k for k in (*HOUSEKEEPING, *OPTIONAL, *given) if not is_known(k, config)] == []
