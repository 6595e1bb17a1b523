"""A configured drafter: what samples with it, under which name, and what refuses it."""

from __future__ import annotations

import numpy as np
import pytest

from dmoe_var import CollaborativeVAR, count_flops, generate
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.data.images import to_uint8
from dmoe_var.errors import CheckpointError, ConfigError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.metrics.timing import Timing
from dmoe_var.stages import benchmark
from dmoe_var.stages.evaluate import Bench, describe
from dmoe_var.stages.maps import stored_maps
from dmoe_var.stages.parts import loaded, timed_cases

DENSE = {"evaluate.model": "dense"}


@pytest.fixture
def drafter(make_var):
    return make_var(seed=3, num_classes=10, depth=3)


@pytest.fixture
def keys(drafter, tmp_path):
    """keys(scales) -> what a command line says."""
    save_checkpoint(tmp_path / "drafter", drafter)
    return lambda scales: {
        "drafter.var": str(tmp_path / "drafter"), "drafter.scales": scales,
    }  # fmt: skip


@pytest.mark.parametrize(("model", "scales"), [("dense", 2), ("dynamic", 3)])
def test_a_point(make_experiment, runs, drafter, keys, images_of, model, scales):
    """It is drawn from, and counted as, drafter and refiner."""
    plain = make_experiment(runs, {"evaluate.model": model})
    experiment = make_experiment(runs, {"evaluate.model": model, **keys(scales)})
    record = run_stage(experiment, "evaluate")
    dense, rules = model == "dense", experiment.config.selection.rules()
    refiner = loaded.dense(experiment) if dense else loaded.dynamic(experiment)
    expected, vqvae = CollaborativeVAR(drafter, refiner, scales), loaded.vqvae(experiment)
    options = {} if dense else {"selection": rules}
    image = to_uint8(generate(expected, vqvae, [3], start_index=3, **options))[0]
    drawn = images_of(experiment.folder("evaluate") / "samples.npz")
    assert np.abs(image.astype(int) - drawn[3]).max() <= 1
    labels = [i % 10 for i in range(len(drawn))]
    counted = count_flops(expected, vqvae, labels, **options)
    assert record.metrics["flops_gmac"] == pytest.approx(counted.total_gmac)
    assert {"drafter.var", "drafter.scales"} <= experiment.relevant("evaluate").keys()
    assert len(record.weights["drafter.var"]) == 64
    assert experiment.variant("evaluate").startswith(f"scales={scales}_var=" if dense else "")
    assert not any(key.startswith("drafter") for key in plain.relevant("evaluate"))
    assert describe(experiment).endswith(
        f" after {scales} scales of {experiment.config.drafter.var} seed 0"
    )
    needed = experiment.needs("evaluate")[0]
    assert experiment.fingerprint(needed) == plain.fingerprint(needed)


def test_points_have_a_drafter_each(make_experiment, runs, keys):
    """Loaded once for all; the dense baseline beside them is drafted as they are, or not at all."""
    works = [make_experiment(runs, {**DENSE, **given}) for given in (keys(0), keys(4), {})]
    assert len({work.folder("evaluate") for work in works}) == 3
    bench = Bench(works[0])
    models = [bench.model(work) for work in works]
    assert models[0].drafter is models[1].drafter
    assert [getattr(model, "drafted_scales", None) for model in models] == [0, 4, None]


def test_pictures_and_maps(make_experiment, runs, drafter, keys, images_of):
    shown = {"sample.classes": [3], "maps.images": 2, "maps.tau": []}
    experiment = make_experiment(runs, {**keys(3), **shown})
    vqvae, rules = loaded.vqvae(experiment), experiment.config.selection.rules()
    refiners = {"dense": loaded.dense(experiment), "dynamic": loaded.dynamic(experiment)}
    record = run_stage(experiment, "sample")
    for name, refiner in refiners.items():
        model = CollaborativeVAR(drafter, refiner, 3)
        selection = rules if name == "dynamic" else None
        image = to_uint8(generate(model, vqvae, [3], selection=selection))
        stored = images_of(experiment.folder("sample") / name / "samples.npz")
        assert np.array_equal(stored, image)
        assert record.about[name].endswith(", 3 drafted")
    run_stage(experiment, "maps")
    model = CollaborativeVAR(drafter, refiners["dynamic"], 3)
    images = to_uint8(generate(model, vqvae, [0, 1], selection=rules))
    assert np.array_equal(stored_maps(experiment.folder("maps"), 0).images[:, 1], images)


def test_what_is_timed(make_experiment, runs, keys):
    """The drafter alone, and each of our models after it."""
    experiment = make_experiment(runs, {**keys(2), "benchmark.tau": [0.5]})
    cases = timed_cases.cases_of(experiment, timed_cases.sources_of(experiment), 2)
    dense, dynamic, alone, drafted, both = cases
    assert [case.name for case in cases[2:]] == [
        "drafter",
        "drafted_dense",
        "drafted_dynamic_tau0.5",
    ]
    assert (alone.task.load()[0].config.depth, alone.model) == (3, "drafter")
    assert both.flops.expert_share.keys() == dynamic.flops.expert_share.keys()
    for case, refiner in ((drafted, dense), (both, dynamic)):
        assert case.task.load()[0].drafted_scales == 2
        assert refiner.flops.total_gmac < case.flops.total_gmac
        assert case.tau == refiner.tau


def test_the_drafter_is_timed_as_published_too(make_experiment, runs, keys):
    """Where guidance ends early, the dense models with the published guidance stand beside."""
    early = {"sampling.cfg": [1.5, 1.5, 0.0, 0.0], "benchmark.tau": [0.5]}
    experiment = make_experiment(runs, {**keys(2), **early})
    cases = timed_cases.cases_of(experiment, timed_cases.sources_of(experiment), 2)
    found = {
        case.name: (case.task.load()[0].config.depth, case.task.sampling.cfg) for case in cases
    }
    ends = (1.5, 1.5, 0.0, 0.0)
    assert found == {
        "dense": (1, ends), "plain": (1, 1.5), "drafter": (3, ends), "plain_drafter": (3, 1.5),
        "dynamic_tau0.5": (1, ends),
        "drafted_dense": (1, ends), "drafted_dynamic_tau0.5": (1, ends),
    }  # fmt: skip
    timings = {name: Timing((1.0 + at,), 0, np.zeros(1)) for at, name in enumerate(found)}
    metrics = benchmark._metrics(timings, "")
    times = {name: timing.runs_ms[0] for name, timing in timings.items()}
    ratio = times["drafted_dense"] / times["plain_drafter"]
    assert metrics["drafted_dense_drafter_ratio"] == pytest.approx(ratio)
    assert "plain_drafter_drafter_ratio" not in metrics


def test_another_tokenizer_or_experts(make_experiment, runs, make_var, make_moe, tmp_path):
    for wrong, message in (
        (make_var(vocab_size=16), "num_classes is 5, the configuration says 10; vocab_size is 16"),
        (make_moe(make_var(num_classes=10)), "experts is ExpertConfig"),
    ):
        save_checkpoint(tmp_path / "wrong", wrong)
        given = {"drafter.var": str(tmp_path / "wrong"), "drafter.scales": 1}
        experiment = make_experiment(runs, {**DENSE, **given})
        with pytest.raises(CheckpointError, match=rf"drafter\.var=.*wrong: .*: {message}"):
            run_stage(experiment, "evaluate")


@pytest.mark.parametrize(
    ("stage", "scales", "message"),
    [
        ("export", 2, "a drafter is not exported; allowed here: null"),
        ("calibrate", 2, "allowed here: null"),
        ("report", 2, "allowed here: null"),
        ("sweep", 4, r"drafter.scales=4 leaves no scale to the experts; allowed with them: 0\.\.3"),
        ("maps", 4, "drafter.scales=4 leaves"),
        ("evaluate", 4, "drafter.scales=4 leaves"),
    ],
)
def test_refusals(make_experiment, runs, keys, stage, scales, message):
    with pytest.raises(ConfigError, match=message):
        run_stage(make_experiment(runs, keys(scales)), stage)
