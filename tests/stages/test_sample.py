"""Pictures of chosen classes and seeds, on the tiny experiment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe_var import DynamicVAR, Recipe
from dmoe_var.config.root import DataConfig
from dmoe_var.data.images import to_uint8
from dmoe_var.errors import CheckpointError, InputError
from dmoe_var.experiment.graph import run_stage
from dmoe_var.moe.experts import PATHS
from dmoe_var.moe.selection import Cumulative, Threshold, TopK
from dmoe_var.sampling.sampler import generate
from dmoe_var.stages import sample
from dmoe_var.stages.parts import loaded
from dmoe_var.stages.sample import Pictures, describe, settled

CHOSEN = {"sample.classes": [7, 3], "sample.seeds": [5, 1], "sample.per_class": 3}
TAU = {"selection.tau": [0.9, 1.0]}


def stored(folder):
    with np.load(folder / "samples.npz") as file:
        return {name: file[name] for name in file.files}


def base_of(make_experiment, runs):
    """Options that name the trained base models by their folders."""
    experiment = make_experiment(runs)
    folders = {name: experiment.folder(f"train_{name}") / "checkpoint" for name in ("vqvae", "var")}
    return {f"base.{name}": str(folder) for name, folder in folders.items()}


def test_every_picture_can_be_drawn_alone(make_experiment, runs):
    """As documented: class c, seed s, j-th: generate(labels=[c], seed=s, start_index=j)."""
    experiment = make_experiment(runs, {**CHOSEN, **TAU, "sampling.batch_size": 2})
    record = run_stage(experiment, "sample")
    assert (record.num_samples, record.seed, record.dtype) == (12, 5, "float32")
    vqvae, dynamic = loaded.vqvae(experiment), loaded.dynamic(experiment)
    cells = [(c, s, j) for c in (7, 3) for s in (5, 1) for j in range(3)]
    shown = {}
    for name, model, tau in (("dense", dynamic.dense, None), ("dynamic", dynamic, [0.9, 1.0])):
        found = stored(experiment.folder("sample") / name)
        assert found["arr_0"].shape == (12, 8, 8, 3)
        keys = zip(
            *(found[key].tolist() for key in ("labels", "seeds", "start_indices")), strict=True
        )
        assert list(keys) == cells
        for image, (label, seed, index) in zip(found["arr_0"], cells, strict=True):
            alone = generate(model, vqvae, [label], seed=seed, start_index=index, tau=tau)
            assert np.abs(to_uint8(alone)[0].astype(int) - image).max() <= 1
        shown[name] = found["arr_0"]
    assert not np.array_equal(shown["dense"], shown["dynamic"])
    assert set(record.about["experts_ran_by"]) <= set(PATHS)
    assert record.about == {
        "experts_ran_by": record.about["experts_ran_by"], "grid": "grid.png", "seeds": [5, 1],
        "dense": "dense VAR", "dynamic": "DMoE-VAR, tau 0.9, 1", "samples": "dense/samples.npz",
    }  # fmt: skip
    assert Image.open(experiment.folder("sample") / "grid.png").format == "PNG"


def test_single_pngs(make_experiment, runs):
    """Named by class and seed; those of an earlier configuration do not stay."""
    changes = {"sample.single_pngs": True, "sample.per_class": 2}
    for seeds in ([3], [4, 0]):
        experiment = make_experiment(
            runs, edited={**changes, "sample.classes": [6], "sample.seeds": seeds}
        )
        run_stage(experiment, "sample")
        for name in ("dense", "dynamic"):
            images = stored(experiment.folder("sample") / name)["arr_0"]
            files = [f"class6_seed{seed}_{j}.png" for seed in seeds for j in range(2)]
            found = {path.name: path for path in (experiment.folder("sample") / name).glob("*.png")}
            assert sorted(found) == sorted(files)
            singles = np.stack([np.asarray(Image.open(found[file])) for file in files])
            assert np.array_equal(singles, images)


def test_names_of_imagenet(make_experiment):
    config = make_experiment(changes={"sample.seeds": [0, 2], "sample.per_class": 2}).config
    assert Pictures.of(config).labels == tuple(range(10))  # where none are named
    pictures = replace(Pictures.of(config), names=("tench", "great white shark"), labels=(1,))
    assert pictures.row_names == ["great white shark"]
    assert pictures.column_names == ["seed 0", "", "seed 2", ""]
    assert pictures.file_names[1:3] == [
        "class1_great_white_shark_seed0_1.png",
        "class1_great_white_shark_seed2_0.png",
    ]
    unnamed = replace(pictures, names=None)
    assert (unnamed.row_names, unnamed.file_names[0]) == (["class 1"], "class1_seed0_0.png")


def test_the_dynamic_model_alone(make_experiment, runs):
    experiment, note = settled(make_experiment(runs, edited={"sample.model": "dynamic"}))
    assert note is None
    assert run_stage(experiment, "sample").about["samples"] == "dynamic/samples.npz"
    assert not (experiment.folder("sample") / "dense").exists()
    assert experiment.folder("sample").name == "default"


def test_no_experts_yet(make_experiment, runs):
    """The dense model is drawn alone, which a line says; in its own folder, so that both models
    are drawn once there are experts."""
    routers = make_experiment(runs).folder("train_router") / "result.json"
    record = routers.read_text()
    routers.unlink()
    experiment, note = settled(make_experiment(runs))
    assert note.startswith("sample: the dense model alone")
    assert "train_router is not done" in note
    assert "scripts/train_router.py" in note
    assert "\n" not in note
    run_stage(experiment, "sample")
    alone = experiment.folder("sample")
    assert (alone / "dense" / "samples.npz").exists()
    assert not (alone / "dynamic").exists()
    assert settled(make_experiment(runs, {"sample.model": "dense"}))[0].folder("sample") == alone
    for model in ("both", "dynamic"):
        with pytest.raises(InputError, match=r"train_router is not done .*sample.model=dense$"):
            settled(make_experiment(runs, {"sample.model": model}))
    routers.write_text(record)
    experiment, note = settled(make_experiment(runs))
    assert (note, experiment.folder("sample").name) == (None, "default")
    run_stage(experiment, "sample")
    dense = [stored(folder / "dense")["arr_0"] for folder in (alone, experiment.folder("sample"))]
    assert np.array_equal(*dense)


def test_broken_experts_are_not_taken_for_missing_ones(make_experiment, runs):
    path = make_experiment(runs).folder("train_router") / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing, cut short"):
        settled(make_experiment(runs))


def test_nothing_is_there(make_experiment, tmp_path):
    with pytest.raises(InputError, match="train_router is not done"):
        settled(make_experiment(tmp_path))
    with pytest.raises(InputError, match="train_var is not done"):
        run_stage(make_experiment(tmp_path, {"sample.model": "dense"}), "sample")


def test_given_base_models_need_no_stage_and_no_data(make_experiment, runs, tmp_path, monkeypatch):
    def no_data(config: DataConfig):
        raise AssertionError("data are loaded")

    for module in ("parts.loaded", "train_vqvae"):
        monkeypatch.setattr(f"dmoe_var.stages.{module}.load_data", no_data)
    base = base_of(make_experiment, runs)
    experiment, note = settled(make_experiment(tmp_path / "new", {**CHOSEN, **base}))
    assert experiment.needs("sample") == ()
    assert "no dynamic one yet" in note
    run_stage(experiment, "sample")
    trained = make_experiment(runs, {**CHOSEN, "sample.model": "dense"})
    run_stage(trained, "sample")
    ours, theirs = (stored(w.folder("sample") / "dense")["arr_0"] for w in (experiment, trained))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, ("train_router",)),
        ({"sample.model": "dynamic", "base.var": "x", "base.vqvae": "y"}, ("train_router",)),
        ({"sample.model": "dense"}, ("train_var",)),
        ({"sample.model": "dense", "base.var": "x"}, ("train_vqvae",)),
        ({"sample.model": "dense", "base.var": "x", "base.vqvae": "y"}, ()),
        ({"sample.pretrained": "x"}, ("train_vqvae",)),
    ],
)
def test_needs(make_experiment, changes, needs):
    assert make_experiment(changes=changes).needs("sample") == needs


@pytest.mark.parametrize("key", ["base.var", "base.vqvae", "var.shared_adaln", "vqvae.phi_ratio"])
def test_dense_pictures_depend_on_their_models(make_experiment, key):
    given = {"sample.model": "dense", "base.var": "x", "base.vqvae": "y"}
    value = {"var.shared_adaln": True, "vqvae.phi_ratio": 0.25}.get(key, "z")
    plain, experiment = (make_experiment(changes={**given, **more}) for more in ({}, {key: value}))
    assert experiment.relevant("sample") != plain.relevant("sample")
    other = make_experiment(changes={**given, "selection.tau": 0.9, "moe.scales": [3]})
    assert other.relevant("sample") == plain.relevant("sample")


@pytest.fixture
def pretrained(make_experiment, runs, tmp_path):
    """Options that name the tiny DynamicVAR, stored with a selection of its own."""
    model = loaded.dynamic(make_experiment(runs))
    model.selection = [Threshold(0.9), Threshold(0.8)]
    model.save_pretrained(tmp_path / "stored")
    vqvae = base_of(make_experiment, runs)["base.vqvae"]
    return {"sample.pretrained": str(tmp_path / "stored"), "base.vqvae": vqvae, **CHOSEN}


@pytest.mark.parametrize(("selection", "tau"), [("stored", [0.9, 0.8]), ("given", [0.2])])
def test_pretrained(make_experiment, pretrained, tmp_path, runs, selection, tau):
    """Both models come from it, with its own selection or the given one; no stage is needed."""
    experiment, note = settled(
        make_experiment(tmp_path, {**pretrained, "sample.selection": selection})
    )
    assert (note, experiment.needs("sample")) == (None, ())
    title = f"DMoE-VAR, {describe([*map(Threshold, tau)])}"
    assert run_stage(experiment, "sample").about["dynamic"] == title
    ours = make_experiment(runs, {**CHOSEN, "selection.tau": tau})
    run_stage(ours, "sample")
    for name in ("dense", "dynamic"):
        found = [stored(each.folder("sample") / name)["arr_0"] for each in (experiment, ours)]
        assert np.array_equal(*found)


STORED = (1.5, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "cfg"),
    [({}, STORED), ({"sampling.cfg": 2.0, "sample.selection": "given"}, 2.0)],
)
def test_a_stored_recipe(make_experiment, pretrained, tmp_path, runs, given, cfg):
    """It is taken whole, or the configuration's is; the record says so."""
    path = pretrained["sample.pretrained"]
    model = DynamicVAR.from_pretrained(path)
    model.recipe = Recipe(STORED)
    model.save_pretrained(path)
    taus = {"selection.tau": [0.9, 0.8]}
    experiment = settled(make_experiment(tmp_path, {**pretrained, **taus, **given}))[0]
    ours = make_experiment(runs, {**CHOSEN, **taus, "sampling.cfg": cfg})
    records = [run_stage(each, "sample") for each in (experiment, ours)]
    assert [record.about.get("recipe", {}).get("cfg") for record in records] == [
        None if given else STORED, None,
    ]  # fmt: skip
    clash = settled(make_experiment(tmp_path, {**pretrained, "sampling.cfg": 3.0}))[0]
    with pytest.raises(CheckpointError, match="a recipe is stored"):
        run_stage(clash, "sample")
    found = [stored(each.folder("sample") / "dynamic")["arr_0"] for each in (experiment, ours)]
    assert np.array_equal(*found)


def test_the_dense_model_of_a_stored_one(make_experiment, pretrained, tmp_path):
    changes = {**pretrained, "sample.model": "dense", "sample.selection": "given"}
    record = run_stage(settled(make_experiment(tmp_path, changes))[0], "sample")
    assert record.about["dense"] == "dense VAR"
    assert "dynamic" not in record.about


def test_pretrained_pictures_depend_on_its_content(make_experiment, runs, tmp_path):
    """And not on the base VAR, which need not be there."""
    base = {"base.vqvae": base_of(make_experiment, runs)["base.vqvae"], "base.var": "not there"}
    found = set()
    for content in (b"some weights", b"other weights"):
        (tmp_path / "model.safetensors").write_bytes(content)
        experiment = make_experiment(tmp_path, {**base, "sample.pretrained": str(tmp_path)})
        found.add(experiment.fingerprint("sample"))
        assert set(experiment.weights("sample")) == {"base.vqvae", "sample.pretrained"}
    assert len(found) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"var.depth": 2}, r"stored: depth is 1, the configuration says var.depth=2"),
        (
            {"sample.selection": "given", "selection.rule": "top_k", "split.expert_size": 8},
            r"stored: selection.k=8 must be at most 4",
        ),
        (
            {"sample.selection": "given", "moe.scales": [1, 2, 3], "selection.tau": [0, 0.1, 0.2]},
            r"stored: its second model runs scales \[2, 3\], the .* says moe.scales=\[1, 2, 3\]",
        ),
    ],
)
def test_pretrained_that_does_not_fit(make_experiment, pretrained, tmp_path, changes, message):
    experiment, _ = settled(make_experiment(tmp_path, {**pretrained, **changes}))
    with pytest.raises(CheckpointError, match=message):
        run_stage(experiment, "sample")


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        (None, "all experts"),
        ([Cumulative(0.5), TopK(3)], "cumulative share 0.5, top_k k 3"),
    ],
)
def test_description(selection, text):
    assert describe(selection) == text


def test_processes_share_the_work(make_experiment, runs, monkeypatch):
    """Two processes draw half of the batches each, and both get all of them."""
    experiment = make_experiment(runs, CHOSEN)
    vqvae, pictures = loaded.vqvae(experiment), Pictures.of(experiment.config)
    drawer = sample.Drawer(loaded.dense(experiment), "")

    def drawn(number, gathered):
        monkeypatch.setattr(sample, "rank", lambda: number)
        monkeypatch.setattr(sample, "world_size", lambda: 2)
        monkeypatch.setattr(sample, "gathered", gathered)
        return sample._draw(experiment, drawer, vqvae, pictures, "")

    shares = []
    with pytest.raises(KeyError):  # what the other process draws is not there yet
        drawn(1, lambda share: [shares.append(share) or share])
    together = drawn(0, lambda share: [shares.append(share) or share, shares[0]])
    assert [len(share) for share in shares] == [2, 2]
    monkeypatch.undo()
    assert np.array_equal(together, sample._draw(experiment, drawer, vqvae, pictures, ""))


def test_half_precision(make_experiment, runs):
    """The models are drawn from in sampling.dtype."""
    experiment = make_experiment(runs, {"sample.classes": [1], "sampling.dtype": "bfloat16"})
    assert run_stage(experiment, "sample").dtype == "bfloat16"
    vqvae = loaded.vqvae(experiment)
    for drawer in sample._drawers(experiment, vqvae).values():
        assert {parameter.dtype for parameter in drawer.model.parameters()} == {torch.bfloat16}
