"""The export stage: the finished model as one folder, bitwise; the hub where asked; all or
nothing."""

from __future__ import annotations

import errno

import pytest
import torch

from dmoe_var import HeadSkipping, Recipe, Threshold, TokenSkipping, TopK
from dmoe_var.checkpoints import pretrained
from dmoe_var.checkpoints.pretrained import from_pretrained
from dmoe_var.errors import CheckpointError
from dmoe_var.experiment.experiment import DEFAULT_VARIANT
from dmoe_var.experiment.graph import run_stage, run_through
from dmoe_var.stages import export
from dmoe_var.stages.parts import loaded

REPOSITORY = "me/dmoe-var-tiny"
URL = "https://hub.example/me/dmoe-var-tiny/commit/1"


@pytest.fixture
def pushed(monkeypatch):
    """What went to the hub: (repository, private, stages of the records) each time."""
    calls = []

    def push_to_hub(model, repo_id, private, records):
        calls.append((repo_id, private, [record.stage for record in records]))
        return URL

    monkeypatch.setattr(export, "push_to_hub", push_to_hub)
    return calls


@pytest.fixture
def broken_disk(monkeypatch):
    """Weights cannot be written."""

    def write_tensors(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrained, "write_tensors", write_tensors)


def saved_in(experiment):
    return experiment.folder("export") / export.FOLDER


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[k]) for k, t in ours.items())


@pytest.mark.parametrize(
    ("changes", "selection"),
    [
        ({"selection.tau": [0.3, 0.6]}, [Threshold(0.3), Threshold(0.6)]),
        ({"selection.rule": "top_k", "selection.k": 2}, TopK(2)),
    ],
)
def test_the_folder_is_the_configured_model(make_experiment, runs, pushed, changes, selection):
    experiment = make_experiment(runs, changes)
    record = run_stage(experiment, "export")
    found, model = from_pretrained(saved_in(experiment)), loaded.dynamic(experiment)
    assert same(found.state_dict(), model.state_dict())
    assert found.replaced_scales == (2, 3)
    assert found.selection == selection
    assert record.about["folder"] == "dynamic_var"
    assert record.metrics["dense_parameters_m"] == pytest.approx(size(model.dense) / 1e6)
    assert record.metrics["parameters_m"] == pytest.approx(size(model) / 1e6)
    assert (experiment.folder("export") / "result.json").exists()
    assert pushed == []


def test_the_recipe_is_that_of_sampling(make_experiment, runs):
    cfg, skips = (1.5, 1.5, 0.0, 0.0), {"ratios": (0.0, 0.0, 0.0, 0.5), "first_layer": 0}
    skipping = {f"sampling.skipping.{key}": value for key, value in skips.items()}
    heads = {"sampling.heads.ratios": (0.0, 0.0, 0.0, 0.5)}
    experiment = make_experiment(runs, {"sampling.cfg": cfg, **skipping, **heads})
    run_stage(experiment, "export")
    expected = Recipe(cfg, False, TokenSkipping(**skips), HeadSkipping((0.0, 0.0, 0.0, 0.5)))
    assert from_pretrained(saved_in(experiment)).recipe == expected
    assert experiment.variant("export") != make_experiment(runs).variant("export")


def size(model):
    """Parameters, each once."""
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_card_tells_of_the_stages_that_are_done(make_experiment, runs):
    """An evaluation of other thresholds, or of a pruned model, is not this model's."""
    experiment = make_experiment(runs)
    measured = run_stage(experiment, "evaluate")
    for other in ({"selection.tau": [0.7]}, {"evaluate.model": "pruned"}):
        run_stage(make_experiment(runs, other), "evaluate")
    record = run_stage(experiment, "export")
    done = ("sparsify", "split", "train_router", "evaluate")
    assert record.about["records"] == [f"{stage}/{DEFAULT_VARIANT}" for stage in done]
    card = (saved_in(experiment) / "README.md").read_text()
    assert [stage for stage in done if f"- {stage}: seed 0, float32 on" not in card] == []
    assert "- sweep:" not in card
    assert f"{measured.metrics['flops_gmac']:.4f}" in card
    assert "| sparsify.steps | 2 |" in card


def test_what_was_not_fine_tuned_is_held_once(make_experiment, runs):
    """With the FFNs alone fine-tuned, all but experts and routers is the dense model's."""
    whole = loaded.dynamic(make_experiment(runs))
    experiment = make_experiment(runs, {"conversion.train": "ffn"})
    record = run_through(experiment, "export", lambda stage, done: None)
    names = loaded.split(experiment).named_parameters()
    own = sum(tensor.numel() for name, tensor in names if ".ffn." in name)
    assert record.metrics["dense_parameters_m"] == pytest.approx(size(whole.dense) / 1e6)
    expected = record.metrics["dense_parameters_m"] + own / 1e6
    assert record.metrics["parameters_m"] == pytest.approx(expected)
    assert record.metrics["parameters_m"] < size(whole) / 1e6
    assert (saved_in(experiment) / "model.safetensors").stat().st_size < 4 * size(whole)
    found = from_pretrained(saved_in(experiment))
    assert same(found.state_dict(), loaded.dynamic(experiment).state_dict())


@pytest.mark.parametrize(("changes", "private"), [({}, True), ({"export.private": False}, False)])
def test_pushed_where_asked(make_experiment, runs, pushed, changes, private):
    """Beside the folder, and again at the next call: the card may have more to tell."""
    experiment = make_experiment(runs, {"export.push_to": REPOSITORY, **changes})
    for _ in range(2):
        assert run_stage(experiment, "export").about["url"] == URL
    assert from_pretrained(saved_in(experiment)).selection == Threshold(0.2)
    told = (REPOSITORY, private, ["sparsify", "split", "train_router"])
    assert pushed == [told] * 2


def test_the_main_process_alone_writes(make_experiment, runs, pushed, monkeypatch):
    monkeypatch.setattr(export, "is_main", lambda: False)
    experiment = make_experiment(runs, {"export.push_to": REPOSITORY})
    assert export.run(experiment).metrics["parameters_m"] > 0
    assert (saved_in(experiment).exists(), pushed) == (False, [])


def test_nothing_is_left_of_a_folder_that_cannot_be_written(
    make_experiment, runs, broken_disk, pushed
):
    experiment = make_experiment(runs, {"export.push_to": REPOSITORY})
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)$"):
        run_stage(experiment, "export")
    assert [path.name for path in experiment.folder("export").iterdir()] == ["config.yaml"]
    assert pushed == []


def test_a_hub_that_refuses(make_experiment, runs, monkeypatch):
    """There is no record then, and the next start pushes; the folder stays, for it is whole."""
    experiment = make_experiment(runs, {"export.push_to": REPOSITORY})
    answers = iter([CheckpointError("the hub cannot be reached"), URL])

    def push_to_hub(*args, **kwargs):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(export, "push_to_hub", push_to_hub)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        run_stage(experiment, "export")
    assert not (experiment.folder("export") / "result.json").exists()
    assert same(
        from_pretrained(saved_in(experiment)).state_dict(), loaded.dynamic(experiment).state_dict()
    )
    assert run_stage(experiment, "export").about["url"] == URL
