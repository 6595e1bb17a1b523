"""Every figure can be asked of every experiment: its points hold together as configurations."""

from __future__ import annotations

import pytest
from composing import composed

from dmoe_var.config.parse import parse_config
from dmoe_var.experiment.experiment import Experiment
from dmoe_var.stages.catalogue import FIGURES

OTHER_MODELS = ("learning", "drafted")
"""Figures that need a base training or a deeper model."""


@pytest.mark.parametrize("name", ["cifar10", "digits", "imagenet_d16"])
def test_points_of_every_figure(name):
    config = parse_config(composed("figures", f"experiment={name}"))
    experiment = Experiment(config, config)
    for figure in FIGURES.keys() - OTHER_MODELS:
        assert list(FIGURES[figure](experiment).needs(experiment)), figure
