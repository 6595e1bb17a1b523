"""Linear layers in 8 bits: which they are, how far their products may be, what refuses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dmoe_var import DynamicVAR, count_flops, generate
from dmoe_var.data.images import to_uint8
from dmoe_var.errors import ConfigError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.models import int8
from dmoe_var.models.int8 import in_int8
from dmoe_var.sampling_time import sampling
from dmoe_var.stages import benchmark
from dmoe_var.stages.parts import loaded

pytest.importorskip("torchao")

INT8 = {"sampling.int8": True}


def held(model):
    """Names of the weights in 8 bits."""
    return {name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}


def test_which_layers(make_var, make_moe):
    """Those of blocks and heads; routers, experts and embeddings stay, and so does the given
    model."""
    dense = make_var(num_classes=10)
    model = DynamicVAR(dense, make_moe(dense), (2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = held(in_int8(model))
    within = {name.removeprefix("dense.") for name in made if name.startswith("dense.")}
    for name in ("attn.mat_qkv", "attn.proj", "ffn.fc1", "ffn.fc2", "ada_lin.1"):
        assert f"blocks.0.{name}.weight" in within
    assert "head.weight" in within
    experts = {name for name in made if name.startswith("moe.") and ".ffn." in name}
    assert not experts | {name for name in made if "router" in name or "embed" in name}
    assert not held(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_product_by_its_definition(make_var):
    """Weights by output channel and activations by token, each in 255 steps over its range."""
    plain = make_var(num_classes=10)
    made, layer = in_int8(plain).blocks[0].ffn.fc1, plain.blocks[0].ffn.fc1
    x = torch.randn(33, layer.in_features, generator=torch.Generator().manual_seed(0))

    def rounded(values):
        step = values.abs().amax(-1, keepdim=True).double() / 127.5
        return (values.double() / step).round().clamp(-128, 127), step

    (xs, x_step), (ws, w_step) = rounded(x), rounded(layer.weight.detach())
    expected = xs @ ws.T * x_step * w_step.T + layer.bias.double()
    with torch.inference_mode(), sampling():
        found = made(x)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    assert (found - expected).norm() < 0.2 * (exact - expected).norm()


@pytest.mark.parametrize("model", ["dense", "dynamic"])
def test_a_point(make_experiment, runs, images_of, model):
    """Its images are those of the model in 8 bits, and its FLOPs the multiply-adds of the model."""
    plain = make_experiment(runs, {"evaluate.model": model})
    experiment = make_experiment(runs, {"evaluate.model": model, **INT8})
    record = run_stage(experiment, "evaluate")
    dense, rules = model == "dense", experiment.config.selection.rules()
    whole = loaded.dense(experiment) if dense else loaded.dynamic(experiment)
    vqvae, options = loaded.vqvae(experiment), {} if dense else {"selection": rules}
    image = to_uint8(generate(in_int8(whole), vqvae, [3], start_index=3, **options))[0]
    drawn = images_of(experiment.folder("evaluate") / "samples.npz")
    assert np.abs(image.astype(int) - drawn[3]).max() <= 1
    if dense:
        counted = count_flops(whole, vqvae, [i % 10 for i in range(len(drawn))])
        assert record.metrics["flops_gmac"] == pytest.approx(counted.total_gmac)
    assert record.config["sampling.int8"] is True
    assert "sampling.int8" not in plain.relevant("evaluate")
    assert plain.variant("evaluate") != experiment.variant("evaluate")


def test_other_stages(make_experiment, runs):
    """Pictures, maps and times are of the model in 8 bits too."""
    experiment = make_experiment(runs, {**INT8, "benchmark.tau": (0.5,), "benchmark.repeats": 1})
    run_stage(experiment, "sample")
    run_stage(experiment, "maps")
    record = benchmark.run(experiment.read_by("benchmark"))
    assert min(v for k, v in record.metrics.items() if k.endswith("_ms_median")) > 0


@pytest.mark.parametrize("stage", ["calibrate", "report", "export", "find_recipe"])
def test_stages_that_know_floats_alone(make_experiment, stage):
    with pytest.raises(ConfigError, match=r"sampling\.int8=true: .*; allowed here: false"):
        make_experiment(changes=INT8).check(stage)


@pytest.mark.parametrize("stage", ["evaluate", "sample", "benchmark"])
def test_without_torchao(make_experiment, monkeypatch, stage):
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao .*\[int8\]"):
        make_experiment(changes=INT8).check(stage)
