"""Where skipping tokens or heads is refused before any work."""

from __future__ import annotations

import pytest

from dmoe_var.errors import ConfigError
from dmoe_var.experiment.stage import find

ON = {"sampling.skipping.ratios": [0, 0, 0.5, 0.5], "sampling.skipping.first_layer": 0}
BY_ROUTER = {**ON, "sampling.skipping.measure": "router"}
HEADS = {"sampling.heads.ratios": [0, 0, 0.5, 0.5]}
SOME_HEADS = "sampling.heads.ratios=[0.0, 0.0, 0.5, 0.5]: "
ALL = "sampling.skipping.ratios=[0.0, 0.0, 0.5, 0.5]: "
ROUTER = "sampling.skipping.measure=router: "


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("calibrate", ON, f"{ALL}losses are measured under teacher forcing"),
        ("report", HEADS, f"{SOME_HEADS}the report shows"),
        ("find_recipe", HEADS, "sampling.heads.ratios="),
        ("report", ON, f"{ALL}the report shows what routers did for every token"),
        ("benchmark", {**ON, "benchmark.published": "x"}, f"{ALL}the published sampler"),
        ("benchmark", {**ON, "benchmark.kernels": True}, f"{ALL}benchmark.kernels=true"),
        ("benchmark", {**ON, "benchmark.compile": "both"}, f"{ALL}benchmark.compile=both"),
        ("calibrate", HEADS, f"{SOME_HEADS}losses are measured under teacher forcing"),
        ("benchmark", {**HEADS, "benchmark.published": "x"}, f"{SOME_HEADS}the published sampler"),
        ("benchmark", {**HEADS, "benchmark.kernels": True}, f"{SOME_HEADS}benchmark.kernels=true"),
        ("benchmark", {**HEADS, "benchmark.compile": "both"}, f"{SOME_HEADS}benchmark.compile"),
        ("benchmark", BY_ROUTER, f"{ROUTER}a benchmark samples from a model without routers"),
        ("sweep", BY_ROUTER, f"{ROUTER}a sweep samples"),
        ("sample", BY_ROUTER, f"{ROUTER}sample.model=both samples"),
        ("evaluate", {**BY_ROUTER, "evaluate.model": "dense"}, f"{ROUTER}evaluate.model=dense"),
        ("evaluate", {**BY_ROUTER, "evaluate.model": "pruned"}, f"{ROUTER}evaluate.model=pruned"),
        ("evaluate", {**BY_ROUTER, "evaluate.model": "dynamic"}, None),
        ("evaluate", {**ON, "evaluate.model": "dense"}, None),
        ("sample", {**BY_ROUTER, "sample.model": "dynamic"}, None),
        *((stage, ON, None) for stage in ("sample", "sweep", "benchmark", "maps")),
        *((stage, HEADS, None) for stage in ("sample", "sweep", "benchmark", "maps")),
    ],
)
def test_where_it_is_refused(make_experiment, stage, changes, message):
    config = make_experiment(changes=changes).config
    if message is None:
        find(stage).check(config)
        return
    with pytest.raises(ConfigError) as caught:
        find(stage).check(config)
    assert str(caught.value).startswith(message)
    assert "allowed here: " in str(caught.value)
