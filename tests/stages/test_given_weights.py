"""Given base models: what is in the file counts, not where it lies nor in which precision."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from dmoe_var import load_var, load_vqvae
from dmoe_var.checkpoints import hub
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.data.token_cache import weights_hash
from dmoe_var.errors import CheckpointError
from dmoe_var.experiment.graph import require, run_stage, run_through
from dmoe_var.experiment.record import Record
from dmoe_var.experiment.stage import STAGES
from dmoe_var.models.classifier import ClassifierConfig, ResNetClassifier
from dmoe_var.stages.evaluate import Bench
from dmoe_var.stages.parts import loaded


@pytest.fixture(scope="module")
def bases(trained, make_experiment):
    """Checkpoint folders of a base VQ-VAE and VAR."""
    experiment = make_experiment(trained)
    return {
        f"base.{kind}": experiment.folder(f"train_{kind}") / "checkpoint"
        for kind in ("vqvae", "var")
    }


def at(bases, place):
    """Copies of the base models there, as values on a command line."""
    for key, folder in bases.items():
        shutil.copytree(folder, place / key)
    return {key: str(place / key) for key in bases}


def halved(bases, place, dtype):
    """The same in another precision, as published files."""
    for key, folder in bases.items():
        load = load_vqvae if key == "base.vqvae" else load_var
        torch.save(load(folder).to(dtype).state_dict(), place / f"{key}.pth")
    return {key: str(place / f"{key}.pth") for key in bases}


def named(experiment):
    return {stage: (experiment.variant(stage), experiment.fingerprint(stage)) for stage in STAGES}


def test_the_place_says_nothing(make_experiment, bases, tmp_path):
    """Of the experiment's own file or on the command line: the same folders, the same work."""
    here, there = at(bases, tmp_path / "here"), at(bases, tmp_path / "scratch" / "job 17")
    own = make_experiment(tmp_path, edited=here)
    assert {variant for variant, _ in named(own).values()} == {"default"}
    assert named(make_experiment(tmp_path, there, edited=here)) == named(own)
    plain = make_experiment(tmp_path, here)
    assert plain.variant("sparsify") != "default"
    assert named(make_experiment(tmp_path, there)) == named(plain)
    file = {key: f"{folder}/model.safetensors" for key, folder in there.items()}
    assert named(make_experiment(tmp_path, file)) == named(plain)


def test_the_content_says_all(make_experiment, bases, tmp_path):
    here, there = at(bases, tmp_path / "here"), at(bases, tmp_path / "there")
    var = load_var(there["base.var"])
    with torch.no_grad():
        var.head.bias += 1
    save_checkpoint(tmp_path / "there" / "base.var", var)
    own, other = (
        make_experiment(tmp_path, edited=here),
        make_experiment(tmp_path, there, edited=here),
    )
    assert own.fingerprint("sparsify") != other.fingerprint("sparsify")
    name = other.variant("sparsify")
    assert name.startswith("var=")
    assert "here" not in name
    assert "there" not in name
    assert len(name) < 40
    assert other.folder("train_vqvae") == own.folder("train_vqvae")


def test_a_moved_base_finds_its_work_done(make_experiment, bases, tmp_path, no_work):
    here, there = at(bases, tmp_path / "here"), at(bases, tmp_path / "there")
    experiment = make_experiment(tmp_path, edited=here)
    record = Record(
        "sparsify", "default", experiment.fingerprint("sparsify"), {},
        dict(experiment.config.leaves), 0, 0, "", "", "", "", 1, "", {},
        weights=experiment.weights("sparsify"),
    )  # fmt: skip
    experiment.folder("sparsify").mkdir(parents=True)
    record.write(experiment.folder("sparsify"))
    moved = make_experiment(tmp_path, there, edited=here)
    assert require(moved, "sparsify").config["base.var"] == here["base.var"]
    assert run_stage(moved, "sparsify").fingerprint == record.fingerprint
    assert moved.differing("sparsify", record) == []
    other = make_experiment(
        tmp_path, {"base.var": "digits", **{"sparsify.alpha": 1.0}}, edited=here
    )
    keys = [line.partition(" is ")[0] for line in other.differing("sparsify", record)]
    assert keys == ["base.var", "sparsify.alpha"]


@pytest.fixture
def hub_of(monkeypatch):
    """Published names that are in the cache, and none is ever fetched."""
    files = {}

    def fetch(name):
        raise AssertionError(f"{name} is fetched")

    monkeypatch.setattr(hub, "cached", files.get)
    monkeypatch.setattr(hub, "fetch", fetch)
    return files


def test_a_published_file_under_its_path(make_experiment, bases, tmp_path, hub_of):
    """Nothing is fetched to name a folder; what is in the cache is known."""
    path = halved(bases, tmp_path, torch.float32)["base.var"]
    own = make_experiment(tmp_path, edited={"base.var": "var_d16"})
    copied = make_experiment(tmp_path, {"base.var": path}, edited={"base.var": "var_d16"})
    assert own.variant("sparsify") == "default"
    unknown = copied.variant("sparsify")
    assert unknown.startswith("var=")
    hub_of["var_d16"] = bases["base.vqvae"] / "model.safetensors"
    assert copied.variant("sparsify") == unknown
    shutil.copy(path, tmp_path / "cached")
    hub_of["var_d16"] = tmp_path / "cached"
    assert copied.variant("sparsify") == "default"


def test_a_published_name_names_its_folder(make_experiment, tmp_path, hub_of):
    experiment = make_experiment(tmp_path, {"base.var": "var_d20"}, edited={"base.var": "var_d16"})
    before = experiment.variant("sparsify")
    assert before.startswith("var=var_d20-")
    (tmp_path / "cached").write_bytes(b"weights")
    hub_of["var_d20"] = tmp_path / "cached"
    assert experiment.variant("sparsify") == before  # once it is there as before


def test_pretrained_and_fidelity_weights_go_by_content(make_experiment, bases, tmp_path):
    here, there = at(bases, tmp_path / "here"), at(bases, tmp_path / "there")
    for key, stage in (("sample.pretrained", "sample"), ("fidelity.weights", "evaluate")):
        ours, theirs, more = here["base.var"], there["base.var"], {}
        if key == "fidelity.weights":
            ours, theirs = f"{ours}/model.safetensors", f"{theirs}/model.safetensors"
            more = {"fidelity.backbone": "inception", "evaluate.num_samples": 10}
        own, moved = (make_experiment(tmp_path, {key: path, **more}) for path in (ours, theirs))
        assert own.variant(stage) == moved.variant(stage) != "default"
        assert own.fingerprint(stage) == moved.fingerprint(stage)
        assert (
            make_experiment(tmp_path, {key: theirs, **more}, edited={key: ours, **more}).variant(
                stage
            )
            == "default"
        )


def test_half_a_base_is_computed_with_in_float32(make_experiment, bases, tmp_path):
    """As the same values in a float32 file: tokens, losses, trained weights; the record tells."""
    (tmp_path / "half").mkdir()
    (tmp_path / "whole").mkdir()
    given = halved(bases, tmp_path / "half", torch.bfloat16)
    for key, path in given.items():
        state = torch.load(path)
        whole = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
        torch.save(whole, tmp_path / "whole" / f"{key}.pth")
    whole = {key: str(tmp_path / "whole" / f"{key}.pth") for key in given}
    found = []
    for name, changes in (("half", given), ("whole", whole)):
        experiment = make_experiment(tmp_path / f"runs_{name}", changes)
        records = [run_through(experiment, s, lambda *_: None) for s in ("train_var", "sparsify")]
        found.append(([r.metrics for r in records], loaded.sparse(experiment).state_dict()))
        told = "bfloat16" if name == "half" else "float32"
        for record in records:
            assert set(record.weights_dtype.values()) == {told}
            assert record.dtype == "float32"
    (metrics, weights), (expected, expected_weights) = found
    for ours, theirs in zip(metrics, expected, strict=True):
        losses = [key for key in ours if not key.endswith("_per_s") and "second" not in key]
        assert [ours[key] for key in losses] == [theirs[key] for key in losses]
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_hashes_of_weights(make_vqvae):
    """Of float32 what they were; of any precision there is one; strides do not count."""
    vqvae = make_vqvae()
    assert weights_hash(vqvae.bfloat16()) != weights_hash(make_vqvae())
    assert weights_hash(make_vqvae().half()) != weights_hash(make_vqvae())
    digest = hashlib.sha256()
    for name, tensor in sorted(make_vqvae().state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert weights_hash(make_vqvae()) == digest.hexdigest()[:16]
    strided = make_vqvae().to(memory_format=torch.channels_last)
    assert weights_hash(strided) == digest.hexdigest()[:16]


BF16 = {"sampling.dtype": "bfloat16"}
FEW = {
    "calibrate.budget": 0.85, "calibrate.densities": [0.5], "calibrate.images": 8,
    "calibrate.held_out": 8, "calibrate.drawn": 10, "calibrate.batch_size": 8,
    "calibrate.refinements": 0, "calibrate.time_batch": 2, "calibrate.time_repeats": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("calibrate", FEW),
        ("evaluate", {"evaluate.model": "pruned", "pruning.images": 8}),
        ("maps", {"maps.images": 2}),
    ],
)
def test_samples_in_bfloat16_use_the_tokens_of_float32(make_experiment, runs, stage, changes):
    """No second cache of tokens, and none of a rounded tokenizer."""
    caches = {path.name for path in (runs / "cache" / "tokens").iterdir()}
    record = run_stage(make_experiment(runs, {**BF16, **changes}), stage)
    assert record.dtype == "bfloat16"
    assert {path.name for path in (runs / "cache" / "tokens").iterdir()} == caches
    assert json.dumps(dict(record.metrics))


def test_a_bench_samples_as_asked(make_experiment, bases, tmp_path):
    """From a float16 file: float32 where nothing is said, bfloat16 where it is."""
    given = halved(bases, tmp_path, torch.float16)
    for changes, dtype in (({}, torch.float32), (BF16, torch.bfloat16)):
        bench = Bench(make_experiment(tmp_path, {**given, **changes}))
        for model in (bench.vqvae, bench.dense):
            assert {p.dtype for p in model.parameters()} == {dtype}


def test_training_goes_on_from_given_weights(make_experiment, runs, bases, tmp_path, make_var):
    """A first step with next to no learning rate leaves them as they were; their content counts."""
    source = str(bases["base.var"])
    still = {"train_var.start": source, "train_var.lr": 1e-12, "train_var.steps": 1}
    experiment = make_experiment(runs, still)
    record = run_through(experiment, "train_var", lambda *_: None)
    assert len(record.weights["train_var.start"]) == 64
    assert experiment.variant("train_var") != "default"
    theirs, ours = load_var(source).state_dict(), loaded.dense(experiment).state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert "train_var.start" not in make_experiment(runs).relevant("train_var")
    save_checkpoint(tmp_path / "other", make_var(num_classes=10, depth=3))
    unfit = make_experiment(runs, {**still, "train_var.start": str(tmp_path / "other")})
    with pytest.raises(CheckpointError, match=r"^train_var\.start=.*depth is 3"):
        run_through(unfit, "train_var", lambda *_: None)


def test_training_weights_scales_as_asked(make_experiment, runs):
    """Equal weights learn what none learn; those of the first scale alone learn something else."""
    asked = {"base.var": None, "train_var.steps": 2}

    def losses(weights):
        experiment = make_experiment(runs, {**asked, "train_var.scale_weights": weights})
        run_through(experiment, "train_var", lambda *_: None)
        lines = (experiment.folder("train_var") / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]

    plain = losses(None)
    assert losses([2, 2, 2, 2]) == pytest.approx(plain, rel=1e-5)
    assert losses([1, 0, 0, 0]) != pytest.approx(plain, rel=1e-3)


def test_tuning_goes_on_from_given_experts(make_experiment, runs, tmp_path, make_var):
    """As above, for experts that were tuned before: they start, and not those of train_router."""
    before = make_experiment(runs, {"tune_experts.steps": 1, "tune_experts.lr": 0.1})
    run_through(before, "tune_experts", lambda *_: None)
    source = str(before.folder("tune_experts") / "checkpoint")
    still = {"tune_experts.start": source, "tune_experts.lr": 1e-12, "tune_experts.steps": 1}
    experiment = make_experiment(runs, still)
    record = run_through(experiment, "tune_experts", lambda *_: None)
    assert len(record.weights["tune_experts.start"]) == 64
    theirs, ours = load_var(source).state_dict(), loaded.split(experiment).state_dict()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    untuned = loaded.split(make_experiment(runs), "train_router").state_dict()
    name = "blocks.0.ffn.w1_EDC"
    assert not torch.allclose(ours[name], untuned[name], atol=1e-3)
    assert "tune_experts.start" not in before.relevant("tune_experts")
    save_checkpoint(tmp_path / "dense", make_var(num_classes=10))
    unfit = make_experiment(runs, {**still, "tune_experts.start": str(tmp_path / "dense")})
    with pytest.raises(CheckpointError, match=r"^tune_experts\.start=.*experts is None"):
        run_through(unfit, "tune_experts", lambda *_: None)


@pytest.mark.parametrize(
    "key", ["base.var", "base.vqvae", "base.classifier", "train_var.start", "tune_experts.start"]
)
@pytest.mark.parametrize("source", ["/nowhere", "digits_d2"])
def test_a_wrong_model_ends_the_run_before_the_first_stage(make_experiment, runs, key, source):
    """digits_d2 has a VAR, of another shape, and neither a VQ-VAE nor a classifier."""
    asked = {"tune_experts.steps": 1, "seed": 5, "fidelity.classifier": "resnet", key: source}
    last = "train_classifier" if key == "base.classifier" else "tune_experts"
    started = []
    with pytest.raises(CheckpointError, match=rf"^{key}={source}\b"):
        run_through(make_experiment(runs, asked), last, lambda *given: started.append(given))
    assert started == []


def test_a_classifier_of_other_classes_ends_the_run_before_the_first_stage(
    make_experiment, runs, tmp_path
):
    save_checkpoint(tmp_path / "other", ResNetClassifier(ClassifierConfig(3, 4)))
    given = {"fidelity.classifier": "resnet", "base.classifier": str(tmp_path / "other")}
    started = []
    with pytest.raises(CheckpointError, match=r"^base\.classifier=.*of 3 classes; expected"):
        run_through(
            make_experiment(runs, given), "train_classifier", lambda *given: started.append(given)
        )
    assert started == []
