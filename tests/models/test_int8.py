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
from dmoe_var.models.int8 import in_precision
from dmoe_var.sampling_time import sampling
from dmoe_var.stages import maps, sample
from dmoe_var.stages.parts import loaded, timed_cases, timed_samplers

pytest.importorskip("torchao")

INT8 = {"sampling.int8": "dynamic"}


def int8_of(model):
    return in_precision(model, "dynamic")


def held(model):
    """Names of the weights in 8 bits."""
    return {name for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}


def test_which_layers(make_var, make_moe):
    """Those of blocks and heads; routers, experts and embeddings stay, and so does the given
    model."""
    dense = make_var(num_classes=10)
    model = DynamicVAR(dense, make_moe(dense), (2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = held(int8_of(model))
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
    made, layer = int8_of(plain).blocks[0].ffn.fc1, plain.blocks[0].ffn.fc1
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
    image = to_uint8(generate(int8_of(whole), vqvae, [3], start_index=3, **options))[0]
    drawn = images_of(experiment.folder("evaluate") / "samples.npz")
    assert np.abs(image.astype(int) - drawn[3]).max() <= 1
    if dense:
        counted = count_flops(whole, vqvae, [i % 10 for i in range(len(drawn))])
        assert record.metrics["flops_gmac"] == pytest.approx(counted.total_gmac)
    assert record.config["sampling.int8"] == "dynamic"
    assert "sampling.int8" not in plain.relevant("evaluate")
    assert plain.variant("evaluate") != experiment.variant("evaluate")


def test_other_stages(make_experiment, runs, monkeypatch):
    """Pictures, maps and times are of the model in 8 bits too; means are those of the floats."""
    chosen = {"sample.classes": [3], "sample.per_class": 1, "benchmark.tau": (0.5,)}
    changes = {
        **INT8,
        **chosen,
        "benchmark.repeats": 1,
        "benchmark.warmup": 0,
        "moe.skipped": "mean",
    }
    experiment, seen = make_experiment(runs, changes), []
    for module in (sample, maps, timed_samplers):

        def noting(model, asked, name=module.__name__):
            seen.append((name.rpartition(".")[2], asked))
            return in_precision(model, asked)

        monkeypatch.setattr(module, "in_precision", noting)
    run_stage(experiment, "sample")
    run_stage(experiment, "maps")
    record = run_stage(experiment, "benchmark")
    assert {("sample", "dynamic"), ("maps", "dynamic")} <= set(seen)
    assert {row["name"] for row in record.about["timings"]} == {"dense", "plain", "dynamic_tau0.5"}
    sources = timed_cases.sources_of(experiment)
    task = timed_cases.cases_of(experiment.read_by("benchmark"), sources, 1)[0].task
    assert held(task.load()[0])
    assert not held(task.load(counted=True)[0])


def test_what_is_shared_stays_shared(make_var, make_moe):
    """So AdaLN projects once in 8 bits as in floats, and is held once."""
    dense = make_var(num_classes=10)
    made = int8_of(DynamicVAR(dense, make_moe(dense), (2, 3)))
    assert [step.projects for step in made.plan()] == [True, False, False, False]
    assert made.moe.blocks[0].attn.proj.weight is made.dense.blocks[0].attn.proj.weight


def test_weights_alone(make_var):
    """Their products are those of the rounded weights."""
    plain = make_var(num_classes=10)
    made = in_precision(plain, "weights").blocks[0].ffn.fc1
    layer = plain.blocks[0].ffn.fc1
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(0))
    step = layer.weight.detach().abs().amax(-1, keepdim=True) / 127.5
    rounded = (layer.weight.detach() / step).round().clamp(-128, 127) * step
    expected, exact = (x @ weight.T + layer.bias for weight in (rounded, layer.weight))
    with torch.inference_mode(), sampling():
        assert (made(x) - expected).norm() < 0.3 * (exact - expected).norm()
    assert in_precision(plain, "none") is plain


@pytest.mark.parametrize("stage", ["calibrate", "report", "export", "find_recipe"])
def test_stages_that_know_floats_alone(make_experiment, stage):
    with pytest.raises(ConfigError, match=r"sampling\.int8=dynamic: .*; allowed here: none"):
        make_experiment(changes=INT8).check(stage)


@pytest.mark.parametrize("stage", ["evaluate", "sample", "maps", "benchmark"])
def test_without_torchao(make_experiment, monkeypatch, stage):
    monkeypatch.setattr(int8, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao .*\[int8\]"):
        make_experiment(changes=INT8).check(stage)
