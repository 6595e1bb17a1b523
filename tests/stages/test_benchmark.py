"""The benchmark stage beside a made-up checkout, which draws with our own sampler."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmoe_var import CudaGraphs, generate, load_var, load_vqvae
from dmoe_var.errors import CheckpointError, ConfigError, InputError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.metrics.part_timing import PartClock
from dmoe_var.moe.experts import paths_on, triton
from dmoe_var.moe.experts.triton_code import disassembler
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.stages import benchmark
from dmoe_var.stages.parts import kernels, timed_cases, timed_samplers

LENGTH = {"benchmark.repeats": 3, "benchmark.warmup": 1, "benchmark.batch_size": 2}
SEED = 5
SHAPES = {
    "vqvae.ch_mult": [1, 2], "vqvae.attention": True, "vqvae.z_channels": 8,
    "vqvae.vocab_size": 32, "var.z_channels": 8, "var.vocab_size": 32, "var.depth": 2,
    "var.width": 64, "var.num_heads": 2, "var.shared_adaln": False,
}  # fmt: skip
"""Of the models that `files` holds."""
SHIFT = 0.25
CHECKOUT = """
from .var import build_vae_var
"""
MODELS = """
import torch

from dmoe_var import VAR, VQVAE, VARConfig, VQVAEConfig, generate

SIZES = {{"vocab_size": 32, "z_channels": 8}}


class Published(VAR):
    def autoregressive_infer_cfg(self, B, label_B, g_seed, cfg, top_k, top_p, more_smooth=False):
        assert label_B.shape == (B,) and not torch.is_grad_enabled()
        generator = torch.Generator().manual_seed(g_seed)
        images = generate(
            self, self.tokenizer[0], label_B, cfg=cfg, top_k=top_k, top_p=top_p,
            more_smooth=more_smooth, generator=generator,
        )  # fmt: skip
        return images + {shift}


def build_vae_var(device, patch_nums, depth, shared_aln, num_classes):
    vqvae = VQVAEConfig(patch_nums=patch_nums, ch=32, ch_mult=(1, 2), num_res_blocks=1, **SIZES)
    var = VARConfig(
        patch_nums=patch_nums, depth=depth, width=64, num_heads=2, num_classes=num_classes,
        shared_adaln=shared_aln, **SIZES,
    )
    model = Published(var)
    model.tokenizer = [VQVAE(vqvae)]  # in a list, so that it is no part of the state dict
    return model.tokenizer[0], model
"""


@pytest.fixture
def files(make_vqvae, make_var, tmp_path):
    """Configuration keys of base models in the published layout."""
    models = {"vqvae": make_vqvae(), "var": make_var(num_classes=10)}
    for kind, model in models.items():
        torch.save(model.state_dict(), tmp_path / f"{kind}.pth")
    return {**SHAPES, **{f"base.{kind}": str(tmp_path / f"{kind}.pth") for kind in models}}


@pytest.fixture
def checkout(tmp_path):
    """checkout(shift) -> folder of a sampler whose images are ours plus `shift`."""

    def checkout(shift=0.0):
        folder = tmp_path / "checkout"
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "__init__.py").write_text(CHECKOUT)
        (folder / "models" / "var.py").write_text(MODELS.format(shift=shift))
        return str(folder)

    return checkout


@pytest.fixture
def no_process(monkeypatch):
    """Fails the test where something is timed."""

    def time_in_turn(*args):
        raise AssertionError("processes start")

    monkeypatch.setattr(benchmark, "time_in_turn", time_in_turn)


def test_beside_the_published_sampler_and_a_smaller_model(
    make_experiment, files, checkout, make_var, warm_processes, tmp_path, no_grad
):
    """Ratios are of what is recorded; images differ by what the samplers do."""
    torch.save(make_var(num_classes=10, depth=1).state_dict(), tmp_path / "small.pth")
    changes = {
        **files, **LENGTH, "benchmark.published": checkout(SHIFT), "evaluate.seed": SEED,
        "benchmark.smaller": str(tmp_path / "small.pth"),
    }  # fmt: skip
    experiment = make_experiment(tmp_path / "runs", changes)
    record = run_stage(experiment, "benchmark")
    metrics, runs_ms = record.metrics, record.about["runs_ms"]
    assert metrics["images_max_abs_difference"] == pytest.approx(SHIFT, abs=1e-6)
    names = ("dense", "smaller", "published")
    assert {name: len(runs) for name, runs in runs_ms.items()} == dict.fromkeys(names, 3)
    for name, runs in runs_ms.items():
        assert metrics[f"{name}_ms_median"] == pytest.approx(np.median(runs))
        assert metrics[f"{name}_ms_p10"] == pytest.approx(np.quantile(runs, 0.1))
        assert metrics[f"{name}_ms_p90"] == pytest.approx(np.quantile(runs, 0.9))
    for ratio, key in (("time_ratio", "ms_median"), ("memory_ratio", "peak_memory_mb")):
        expected = metrics[f"dense_{key}"] / metrics[f"published_{key}"]
        assert metrics[ratio] == pytest.approx(expected)
    pairs = [a / b for a, b in zip(runs_ms["dense"], runs_ms["published"], strict=True)]
    assert min(pairs) <= metrics["time_ratio_p10"] <= metrics["time_ratio_p90"] <= max(pairs)
    assert (record.num_samples, record.dtype, record.about["batch_size"]) == (2, "float32", 2)
    assert record.weights.keys() == {"base.vqvae", "base.var"}
    dense, small, published = record.about["timings"]
    assert [row["model"] for row in record.about["timings"]] == list(names)
    assert small["flops_gmac"] < dense["flops_gmac"] == published["flops_gmac"]
    ratio = metrics["smaller_ms_median"] / metrics["dense_ms_median"]
    assert metrics["smaller_time_ratio"] == pytest.approx(ratio)


def test_ours_alone(make_experiment, warm_processes, tmp_path):
    """A packaged model will do then."""
    shapes = {
        "data.image_size": 16, "var.depth": 4, "var.width": 128, "var.num_heads": 2,
        "var.shared_adaln": True, "moe.scales": [4, 5, 6], "sampling.cfg": 0,
    }  # fmt: skip
    for model in ("vqvae", "var"):
        shapes |= {f"{model}.patch_nums": [1, 2, 3, 4, 5, 6, 8], f"{model}.vocab_size": 128}
        shapes |= {f"{model}.z_channels": 16, f"base.{model}": "digits"}
    changes = {**shapes, "benchmark.repeats": 1, "benchmark.warmup": 0}
    experiment = make_experiment(tmp_path, changes)
    record = run_stage(experiment, "benchmark")
    assert record.about["runs_ms"].keys() == {"dense"}
    assert {name.partition("_")[0] for name in record.metrics} == {"dense"}


def test_side_by_side(make_experiment, runs, warm_processes):
    """Dense, dynamic and random masks: rows, ratios, parts and counted cost of each."""
    changes = {
        "benchmark.batch_sizes": [2],
        "benchmark.repeats": 2,
        "benchmark.tau": [0.9],
        "benchmark.random_masks": True,
        "benchmark.parts": True,
    }
    experiment = make_experiment(runs, changes)
    record = run_stage(experiment, "benchmark")
    rows = {(row["name"], row["batch_size"]): row for row in record.about["timings"]}
    assert list(rows) == [(n, 2) for n in ("dense", "dynamic_tau0.9", "random_tau0.9")]
    for (name, size), row in rows.items():
        label, dense = f"{name}_b{size}", rows["dense", size]
        assert record.metrics[f"{label}_ms_median"] == row["ms_median"]
        assert row["ms_median"] == pytest.approx(np.median(row["runs_ms"]))
        assert row["images_per_s"] == pytest.approx(1000 * size / row["ms_median"])
        assert (row["device"], row["compiled"], len(row["runs_ms"])) == ("cpu", False, 2)
        assert len(row["by_scale_ms"]) == 4
        assert 0 < row["without_decoder_ms_median"] < row["with_clock_ms_median"]
        if name != "dense":
            ratio = row["ms_median"] / dense["ms_median"]
            assert record.metrics[f"{label}_time_ratio"] == pytest.approx(ratio)
    dense, high, chance = rows.values()
    assert dense["expert_share"] is None
    assert high["tau"] == 0.9
    assert high["expert_share"] < 1
    assert chance["expert_share"] == pytest.approx(high["expert_share"], rel=0.01, abs=0.004)
    assert chance["flops_gmac"] == pytest.approx(high["flops_gmac"], rel=0.01)
    assert "router" in chance["by_part_ms"]
    assert "router" not in dense["by_part_ms"]
    assert (experiment.folder("benchmark") / "part_times.png").stat().st_size > 1000


def test_a_recipe_stands_beside_the_model_as_published(make_experiment, runs, warm_processes):
    """The dense model is timed under both; what saves time is told against either."""
    changes = {"sampling.cfg": (1.5, 1.5, 0.0, 0.0), "benchmark.tau": [0.9], "benchmark.repeats": 1}
    record = run_stage(make_experiment(runs, changes), "benchmark")
    rows = {row["name"]: row for row in record.about["timings"]}
    assert list(rows) == ["dense", "plain", "dynamic_tau0.9"]
    uncut = run_stage(make_experiment(runs, {"evaluate.model": "dense"}), "evaluate")
    assert rows["plain"]["flops_gmac"] == pytest.approx(uncut.metrics["flops_gmac"])
    assert rows["dense"]["flops_gmac"] < rows["plain"]["flops_gmac"]
    for name in ("dense", "dynamic_tau0.9"):
        ratio = rows[name]["ms_median"] / rows["plain"]["ms_median"]
        assert record.metrics[f"{name}_plain_ratio"] == pytest.approx(ratio)
    assert "plain_plain_ratio" not in record.metrics


@pytest.mark.slow
def test_compiled(make_experiment, files, warm_processes, tmp_path):
    """Beside the eager one, of the same images' cost; its transformer is one part."""
    changes = {**files, **LENGTH, "benchmark.compile": "both", "benchmark.parts": True}
    eager, compiled = run_stage(make_experiment(tmp_path, changes), "benchmark").about["timings"]
    assert [eager["compiled"], compiled["compiled"]] == [False, True]
    assert compiled["name"] == "dense_compiled"
    assert "attention" in eager["by_part_ms"]
    assert "attention" not in compiled["by_part_ms"]


def test_compiling_needs_a_compiler(make_experiment, files, no_process, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    experiment = make_experiment(tmp_path, {**files, "benchmark.compile": "compiled"})
    refused(experiment, ConfigError, "benchmark.compile=compiled", "no-such-compiler", "allowed")


def test_no_published_model_below(make_experiment, files, no_process, tmp_path):
    experiment = make_experiment(tmp_path, {**files, "benchmark.smaller": "next"})
    refused(experiment, ConfigError, "benchmark.smaller=next", "var_d20, var_d24, var_d30")


def test_a_smaller_model_that_is_not_there(make_experiment, files, no_process, tmp_path):
    experiment = make_experiment(tmp_path, {**files, "benchmark.smaller": "/nope"})
    refused(experiment, CheckpointError, "benchmark.smaller=/nope", "no such file")


def test_random_masks_need_a_density(make_experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"random_masks=true needs tau or chosen"):
        make_experiment(tmp_path, {"benchmark.random_masks": True})


def test_experts_need_the_stages(make_experiment, tmp_path):
    """The dense model alone needs none, and does not depend on experts."""
    dense = make_experiment(tmp_path)
    dynamic = make_experiment(tmp_path, {"benchmark.tau": [0.2]})
    assert dense.needs("benchmark") == ()
    assert dynamic.needs("benchmark") == ("train_router",)
    assert "moe.scales" not in dense.relevant("benchmark")
    assert "split.expert_size" in dynamic.relevant("benchmark")
    assert "selection.tau" not in dynamic.relevant("benchmark")
    with pytest.raises(InputError, match=r"train_(vqvae|router)"):
        run_stage(dynamic, "benchmark")


def test_our_call_draws_in_the_published_order(files, no_grad):
    """From one generator of the seed, the same at every call."""
    sampling = SamplingConfig(cfg=1.5, top_k=20, top_p=0.9)
    vqvae_file, var_file = files["base.vqvae"], files["base.var"]
    call = timed_samplers.ours(
        timed_samplers.Task(vqvae_file, var_file, (1, 2, 3, 4), (3, 1), SEED, "cpu", sampling)
    )
    vqvae = load_vqvae(vqvae_file, (1, 2, 3, 4))
    expected = generate(
        load_var(var_file, vqvae), vqvae, [3, 1], cfg=1.5, top_k=20, top_p=0.9,
        generator=torch.Generator().manual_seed(SEED),
    )  # fmt: skip
    assert torch.equal(call(), expected)
    assert torch.equal(call(), expected)


def test_cuda_graphs_are_recorded_before_anything_is_timed(files, monkeypatch):
    """And the dense model without them is timed beside."""
    given = []
    monkeypatch.setattr(timed_samplers, "generate", lambda *a, **k: given.append(k) or a[2])
    sampling = SamplingConfig(cuda_graphs=True)
    sources = (files["base.vqvae"], files["base.var"], (1, 2, 3, 4))
    monkeypatch.setattr(
        SamplingConfig,
        "new_graphs",
        lambda self, device: CudaGraphs() if self.cuda_graphs else None,
    )
    call = timed_samplers.ours(timed_samplers.Task(*sources, (3, 1), SEED, "cpu", sampling))
    assert len(given) == 2
    call()
    call(PartClock(torch.device("cpu")))
    graphs = {id(each["graphs"]) for each in given}
    assert len(graphs) == 1
    assert isinstance(given[0]["graphs"], CudaGraphs)
    config = SimpleNamespace(sampling=sampling, var=SimpleNamespace(num_scales=4))
    assert timed_cases.as_published(config) == SamplingConfig()
    config.sampling = SamplingConfig()
    assert timed_cases.as_published(config) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampling.heads.ratios": [0, 0, 0, 0.5]}, r"sampling.heads.ratios=\[.*: \[\]$"),
        ({"moe.impl": "grouped"}, "moe.impl=grouped: .*: auto, reference, triton$"),
        ({"benchmark.compile": "both"}, "benchmark.compile=both: .*: eager$"),
    ],
)
def test_what_no_graph_holds_is_not_timed_with_them(make_experiment, changes, said):
    experiment = make_experiment(".", {"sampling.cuda_graphs": True, **changes})
    with pytest.raises(ConfigError, match=said):
        benchmark.refuse(experiment.config)


def test_base_models_must_be_given(make_experiment, files, no_process, tmp_path):
    experiment = make_experiment(tmp_path, {**files, "base.var": None})
    refused(experiment, ConfigError, "base.vqvae and base.var must both be given")


def test_a_folder_that_is_no_checkout(make_experiment, files, no_process, tmp_path):
    changes = {**files, "benchmark.published": str(tmp_path)}
    refused(
        make_experiment(tmp_path, changes), ConfigError, f"benchmark.published={tmp_path}: no check"
    )


def test_the_published_code_reads_pth_files_alone(
    make_experiment, files, checkout, no_process, tmp_path
):
    changes = {**files, "benchmark.published": checkout(), "base.var": "digits"}
    refused(make_experiment(tmp_path, changes), CheckpointError, "base.var=", ".pth files alone")


KERNELS = {"benchmark.kernels": True, "benchmark.repeats": 2, "benchmark.expert_sizes": [8, 64]}


def test_kernels(make_experiment, no_process, tmp_path):
    """No models are needed; a picture and a row for each path, size, scale and density."""
    changes = {**KERNELS, "benchmark.densities": [1, 0.5], "moe.scales": [2, 3]}
    experiment = make_experiment(tmp_path, {**changes, "benchmark.chosen": True})  # without effect
    record = run_stage(experiment, "benchmark")
    rows = [row for row in record.about["kernels"] if row["density"] is not None]
    full = [row for row in rows if row["masks"] == "no_zeros"]
    assert len(full) == (len(paths_on(experiment.device)) + 1) * 2 * 2
    assert {(row["density"], row.get("zeros", 0)) for row in full} == {(1, 0)}
    for row in full:
        name = f"{row['impl']}_e{row['expert_size']}_n{row['tokens']}_no_zeros"
        assert record.metrics[f"{name}_time_ratio"] == row["time_ratio"]
    rows = [row for row in rows if row["masks"] == "random"]
    assert len(rows) == (len(paths_on(experiment.device)) + 1) * 2 * 2 * 2
    assert {row["tokens"] for row in rows} == {2 * 9, 2 * 16}
    for row in rows:
        name = f"{row['impl']}_e{row['expert_size']}_n{row['tokens']}_d{row['density']:g}"
        assert record.metrics[f"{name}_time_ratio"] == row["time_ratio"]
    assert record.metrics["product_gflops_per_s"] > 0
    assert (experiment.folder("benchmark") / "kernels.png").stat().st_size > 10_000


@pytest.mark.skipif(
    triton.kernels() is None or disassembler() is None, reason="no triton package with nvdisasm"
)
def test_kernels_predicted(make_experiment, no_process, tmp_path):
    """For GPUs, by shape and density, without one."""
    changes = {"benchmark.predict": ["a100", "h100"], "sampling.dtype": "bfloat16"}
    sizes = {"benchmark.expert_sizes": [64], "moe.scales": [3], "benchmark.densities": [1, 0.5]}
    experiment = make_experiment(tmp_path, {**KERNELS, **sizes, **changes})
    about = run_stage(experiment, "benchmark").about
    for name in ("a100", "h100"):
        rows = about[f"predicted_{name}"]
        assert [(row["tokens"], row["density"]) for row in rows] == [(2 * 16, 1), (2 * 16, 0.5)]
    changes.pop("sampling.dtype")
    refused(make_experiment(tmp_path, {**KERNELS, **changes}), ConfigError, "benchmark.predict")
    with pytest.raises(ConfigError, match="predict needs kernels=true"):
        make_experiment(tmp_path, changes)


def test_kernels_on_a_gpu_are_of_many_tokens_too(make_experiment, tmp_path):
    """By the one command; unless batches are named."""
    for changes, sizes in (({}, (1, 64)), ({"benchmark.batch_sizes": [2]}, (2,))):
        experiment = make_experiment(tmp_path, {**KERNELS, **changes})
        on_gpu = SimpleNamespace(config=experiment.config, device=torch.device("cuda"))
        tokens = {shape.tokens for shape in kernels._shapes(on_gpu)}
        scales = [experiment.config.var.patch_nums[si] for si in experiment.config.moe.scales]
        assert tokens == {2 * size * side**2 for size in sizes for side in scales}


def test_kernels_of_experts_that_do_not_divide(make_experiment, no_process, tmp_path):
    experiment = make_experiment(tmp_path, {**KERNELS, "benchmark.expert_sizes": [48]})
    refused(experiment, ConfigError, "benchmark.expert_sizes=48 must divide the hidden width")


def test_kernels_of_a_model_as_it_draws(make_experiment, runs, no_process):
    """Beside random ones: each sparse scale's layers, with the masks of each tau."""
    changes = {
        **KERNELS, "benchmark.densities": [1], "benchmark.tau": [0.9, 0.97],
        "benchmark.real_masks": True, "benchmark.batch_size": 2,
    }  # fmt: skip
    experiment = make_experiment(runs, changes)
    record = run_stage(experiment, "benchmark")
    rows = [row for row in record.about["kernels"] if row["masks"].startswith("tau")]
    scales = experiment.config.moe.scales
    tokens = {2 * 2 * experiment.config.var.patch_nums[si] ** 2 for si in scales}
    assert {(row["masks"], row["tokens"]) for row in rows} == {
        (name, n) for name in ("tau0.9", "tau0.97") for n in tokens
    }
    paths = [row for row in rows if row["density"] is not None]
    assert {row["layers"] for row in rows} == {experiment.config.var.depth}
    assert all(0 < row["density"] < 1 and 0 <= row["zeros"] <= 1 for row in paths)
    few, many = (
        min(row["density"] for row in paths if row["masks"] == name)
        for name in ("tau0.97", "tau0.9")
    )
    assert few < many


def test_real_masks_want_kernels_and_tau(make_experiment, tmp_path):
    for changes in ({"benchmark.tau": [0.5]}, {"benchmark.kernels": True}):
        with pytest.raises(ConfigError, match="real_masks=true needs kernels=true"):
            make_experiment(tmp_path, {**changes, "benchmark.real_masks": True})


def test_kernels_want_no_models(make_experiment, tmp_path):
    """Neither those of a sampler that an experiment times, nor weights to be fetched."""
    changes = {**KERNELS, "benchmark.tau": [0.2], "base.var": "var_d16"}
    experiment = make_experiment(tmp_path, changes)
    assert experiment.needs("benchmark") == ()
    assert experiment.weights("benchmark") == {}


def refused(experiment, error, *parts):
    """One line of wrong input, and no record."""
    with pytest.raises(error) as caught:
        run_stage(experiment, "benchmark")
    message = str(caught.value)
    assert isinstance(caught.value, InputError)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []
    assert not (experiment.folder("benchmark") / "result.json").exists()
