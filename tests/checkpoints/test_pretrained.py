"""Saved dynamic models: bitwise round trips, shared tensors once, one clear line for what is wrong,
a card that says what records say."""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import checking
import huggingface_hub
import pytest
import torch
from checking import same
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model

from dmoe_var import (
    All,
    Cumulative,
    DynamicVAR,
    HeadSkipping,
    Oracle,
    Random,
    Recipe,
    Threshold,
    TokenSkipping,
    TopK,
)
from dmoe_var.checkpoints import load_var, pretrained
from dmoe_var.checkpoints.safetensors_io import save_checkpoint
from dmoe_var.conversion.relufication import relufy
from dmoe_var.errors import CheckpointError, DataError
from dmoe_var.experiment.record import SCHEMA_VERSION, Record
from dmoe_var.moe.selection import Keys, LayerThreshold, SelectionRule
from dmoe_var.report.model_card import model_card

refused = partial(checking.assert_refused, DynamicVAR.from_pretrained)
SCALES = (1, 3)
RULES = [Threshold(0.3), TopK(2)]


@pytest.fixture(scope="module")
def make_model(make_var, make_moe):
    """(selection, split) -> a DynamicVAR of which only the FFNs were fine-tuned."""

    def make(selection=None, split=True, dtype=torch.float32, **fields):
        dense = make_var(**fields)
        tuned = relufy(deepcopy(dense))
        with torch.no_grad():
            for block in tuned.blocks:
                for parameter in block.ffn.parameters():
                    parameter.mul_(1.5)
        moe = make_moe(tuned) if split else tuned
        return DynamicVAR(dense, moe, SCALES, selection).to(dtype)

    return make


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(RULES)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """A saved model; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def about(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("selection", "fields"),
    [
        (None, {"shared_adaln": True}),
        ([Threshold(0.1 + 0.2), Oracle(1)], {}),
        ([LayerThreshold((0.1, 0.2)), TopK(2)], {"split": True, "dtype": torch.bfloat16}),
        (None, {"split": False, "attn_l2_norm": False}),
    ],
    ids=str,
)
def test_round_trip_is_bitwise(make_model, tmp_path, selection, fields):
    model = make_model(selection, **fields)
    model.save_pretrained(tmp_path / "new" / "model")
    loaded = DynamicVAR.from_pretrained(str(tmp_path / "new" / "model"))
    assert same(loaded, model)
    assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert (loaded.dense.config, loaded.moe.config) == (model.dense.config, model.moe.config)
    assert (loaded.moe_scales, loaded.replaced_scales) == (model.moe_scales, SCALES)
    assert loaded.selection == selection
    assert not loaded.training


HEADS = HeadSkipping((0, 0, 0.5, 0.5))
RECIPE = Recipe((1.5, 1.5, 0, 0), True, TokenSkipping((0, 0, 0, 0.5), "router", 1), HEADS)


def test_a_recipe_travels_with_the_model(make_model, folder, tmp_path):
    """Whole, in its own kinds of value; the card tells how to use it."""
    model = make_model(Threshold(0.3), depth=2)
    model.recipe = RECIPE
    model.save_pretrained(tmp_path / "own")
    loaded = DynamicVAR.from_pretrained(tmp_path / "own")
    assert loaded.recipe == RECIPE
    assert loaded.recipe.options == {
        "cfg": (1.5, 1.5, 0.0, 0.0), "share_mask": True, "skipping": RECIPE.skipping,
        "heads": RECIPE.heads,
    }  # fmt: skip
    assert "labels=[0, 1], **model.recipe.options)" in (tmp_path / "own/README.md").read_text()
    assert DynamicVAR.from_pretrained(folder).recipe == Recipe()
    assert "recipe" not in json.loads((folder / "config.json").read_text())["config"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"cfg": [1.5, 0.0]}, ["cfg=", "has 2 values; allowed: 1, or one for each of 4 scales"]),
        ({"cfg": -1.0}, ["cfg"]),
        ({"skipping": {"ratios": [0.5, 0, 0, 0]}}, ["must begin with 0"]),
        ({"heads": {"ratios": [0.5]}}, ["heads.ratios=(0.5,) has 1 values"]),
        ({"top_k": 3}, ["top_k"]),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(folder, recipe, said):
    content = json.loads((folder / "config.json").read_text())
    content["config"]["recipe"] = recipe
    (folder / "config.json").write_text(json.dumps(content))
    refused(folder, *said)


def test_shared_tensors_lie_in_the_file_once(model, written, tmp_path):
    stored = load_file(written / "model.safetensors")
    shared = {name for name in model.moe.state_dict() if ".ffn." not in name}
    assert set(DynamicVAR.from_pretrained(written).shared_names) == shared
    left_out = {key: kept for key, kept in about(written).items() if key != "format"}
    assert left_out == {f"moe.{name}": f"dense.{name}" for name in shared}
    assert stored.keys() == model.state_dict().keys() - left_out.keys()
    data = sum(t.numel() * t.element_size() for t in stored.values())
    assert data <= (written / "model.safetensors").stat().st_size < data + 20_000

    save_model(model, str(tmp_path / "theirs.safetensors"), {"format": "pt"})
    with safe_open(tmp_path / "theirs.safetensors", framework="pt") as file:
        assert file.metadata() == about(written)
        assert set(file.keys()) == stored.keys()


def test_a_loaded_model_can_be_saved_over_itself(written, folder):
    loaded = DynamicVAR.from_pretrained(folder)
    loaded.selection = Threshold(0.9)
    loaded.save_pretrained(folder)
    again = DynamicVAR.from_pretrained(folder)
    assert again.selection == Threshold(0.9)
    first, last = (load_file(f / "model.safetensors") for f in (written, folder))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_config_says_all(written):
    config = json.loads((written / "config.json").read_text())
    assert config["format"] == "dmoe-var/1"
    assert config["kind"] == "dynamic_var"
    assert config["library_version"]
    assert config["config"]["moe_scales"] == [1, 3]
    assert config["config"]["moe"]["experts"]["expert_size"] == 32
    assert config["config"]["selection"] == [
        {"rule": "threshold", "tau": 0.3},
        {"rule": "top_k", "k": 2},
    ]


@pytest.mark.parametrize("left", [0, -1])
def test_a_truncated_file_is_refused(folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(folder, "model.safetensors: ", "cut short")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name}: cannot be read (No such file")


def rewrite(folder, change, change_about=lambda content: None):
    path, content = folder / "model.safetensors", about(folder)
    tensors = load_file(path)
    change(tensors)
    change_about(content)
    save_file({name: t.clone() for name, t in tensors.items()}, path, content)


def test_all_that_does_not_fit_is_named_in_one_line(folder):
    def damage(tensors):
        del tensors["dense.head.bias"]
        tensors["moe.extra"] = torch.zeros(1)
        tensors["moe.blocks.0.ffn.b2_C"] = torch.zeros(3)

    rewrite(folder, damage)
    refused(
        folder,
        "missing 2 keys: dense.head.bias, moe.head.bias",
        "unexpected 1 keys: moe.extra",
        "moe.blocks.0.ffn.b2_C is (3,), should be (64,)",
    )


def test_a_twin_that_is_not_there_is_missing(folder):
    rewrite(folder, lambda tensors: None, lambda about: about.pop("moe.head.bias"))
    refused(folder, "missing 1 keys: moe.head.bias")


def test_a_twin_beside_its_tensor_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({"moe.head.bias": torch.zeros(32)}))
    refused(folder, "moe.head.bias: there, and said to be left out")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["format"], "dmoe-var/2", "format='dmoe-var/2'"),
        (["kind"], "var", "kind='var'"),
        (["config"], None, "config: "),
        (["config", "dense", "depth"], "2", "config.dense.depth: "),
        (["config", "dense", "depth"], 3, "depth is 2, its config.json says 3"),
        (["config", "moe", "unknown"], 1, "config.moe.unknown: "),
        (["config", "moe", "norm_eps"], float("nan"), "config.moe.norm_eps: "),
        (["config", "moe", "patch_nums"], [1, 2, 3, 5], "pos_1LC is"),
        (["config", "moe_scales"], [1, 4], "each must be within 0..3"),
        (["config", "moe_scales"], "13", "config.moe_scales: "),
        (["config", "selection", 0, "rule"], "best", "selection.rule='best' is none of threshold"),
        (["config", "selection", 0, "tau"], 1.5, "less than or equal to 1, given 1.5"),
        (["config", "selection"], [{"rule": "all"}] * 3, "selection has 3 values"),
    ],
)
def test_a_wrong_configuration_is_refused(folder, keys, value, said):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))
    refused(folder, said)


def test_rules_of_others_cannot_be_saved(make_model, tmp_path):
    class Odd(SelectionRule):
        def __call__(self, scores, noise=None):
            return scores > 1

    with pytest.raises(CheckpointError, match="its rule is none of threshold"):
        make_model(Odd()).save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


FOREIGN = (".DS_Store", ".git/HEAD", "LICENSE", "assets/grid.png")


def add_foreign(folder, names=FOREIGN):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_other_files_in_a_saved_model_s_folder_stay(make_model, folder):
    add_foreign(folder)
    other = make_model(Threshold(0.9))
    for _ in range(2):
        other.save_pretrained(folder)
    assert DynamicVAR.from_pretrained(folder).selection == Threshold(0.9)
    assert all((folder / name).read_text() == name for name in FOREIGN)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_hidden_files_are_no_obstacle(model, tmp_path):
    """A repository that was just made."""
    add_foreign(tmp_path, FOREIGN[:2])
    model.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == name for name in FOREIGN[:2])
    assert set(pretrained.FILES) < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        *((rule, type(rule).__name__) for rule in (*RULES, Cumulative(0.5), Oracle(0.1), All())),
        (Random(1, seed=3), "Random"),
        (Keys(0.5), "Keys"),
        (LayerThreshold((0.25, 0.5)), "LayerThreshold taus [0.25, 0.5]"),
    ],
    ids=str,
)
def test_every_rule_has_a_card(model, rule, said):
    told = deepcopy(model)
    told.selection = rule
    assert said in model_card(told, "name")


def test_what_stands_for_a_saved_folder(model, tmp_path, monkeypatch):
    """The file of weights in it; the folder of the export stage around it."""
    model.save_pretrained(tmp_path / "default" / "dynamic_var")
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = tmp_path / "default" / "dynamic_var" / "model.safetensors"
    for source in (inside, tmp_path / "default", "~/default/dynamic_var"):
        assert same(DynamicVAR.from_pretrained(source), model)
    (tmp_path / "zipped").write_bytes(b"PK")
    refused(tmp_path / "zipped", "a file; a saved DynamicVAR is a folder")


def test_what_is_no_saved_model_is_not_replaced(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"other files than a saved model's: README.md"):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        model.save_pretrained(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_a_failed_save_leaves_the_older_model(make_model, folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(pretrained, "write_config", full)
    with pytest.raises(CheckpointError, match=r"model: cannot be written \(No space left"):
        make_model().save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("old", [True, False])
def test_a_killed_save_can_be_repeated(model, folder, monkeypatch, old, number):
    rename, renamed = os.replace, []

    def killed(source, target):
        if target.parent == folder:
            renamed.append(target)
            if len(renamed) > number:
                raise KeyboardInterrupt
        rename(source, target)

    if not old:
        shutil.rmtree(folder)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert not (folder / "config.json").exists()
    model.save_pretrained(folder)
    assert same(DynamicVAR.from_pretrained(folder), model)


class FakeHub:
    """What `push_to_hub` calls, kept in a folder."""

    def __init__(self, root, error=None):
        self.root, self.error, self.calls = root, error, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        if self.error:
            raise self.error
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload_folder", repo_id, commit_message))
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1")


def test_push_then_pull(model, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    url = model.push_to_hub("mine", private=True, token="secret", commit_message="First")
    assert url == "hub/someone/mine/commit/1"
    assert hub.calls == [
        ("token", "secret"),
        ("create_repo", "mine", True, True),
        ("upload_folder", "someone/mine", "First"),
    ]
    pushed = tmp_path / "someone" / "mine"
    assert {path.name for path in pushed.iterdir()} == set(pretrained.FILES)
    assert 'from_pretrained("mine")' in (pushed / "README.md").read_text()
    asked = {}

    def snapshot(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(pushed)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    options = {
        "revision": "v1",
        "cache_dir": tmp_path / "c",
        "local_files_only": True,
        "token": "t",
    }
    loaded = DynamicVAR.from_pretrained("someone/mine", **options)
    files = {"model.safetensors", "config.json"}
    assert set(asked.pop("allow_patterns")) == files
    assert asked == {**options, "repo_id": "someone/mine"}
    assert same(loaded, model)


def test_a_hub_that_refuses_is_one_line(model, tmp_path, monkeypatch):
    error = OSError("403 Forbidden: \n no token")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub(tmp_path, error))
    said = "cannot be uploaded: 403 Forbidden: no token"
    checking.assert_refused(model.push_to_hub, "someone/mine", said)


def test_no_network_is_one_line(tmp_path, monkeypatch):
    said = "someone/mine: no such folder, and cannot be fetched from the hub"
    refused("someone/mine", said, cache_dir=tmp_path, local_files_only=True)

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("cannot find it\nand no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("someone/mine", said, "cannot find it and no network")


def test_what_is_no_name_is_one_line(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    refused("two words", "two words: no such folder")


def test_a_revision_of_a_folder_is_refused(folder):
    refused(folder, "revision=main", "is a folder", revision="main")


CONFIG = {
    "var.depth": 2,
    "var.width": 64,
    "var.patch_nums": [1, 2, 3, 4],
    "base.var": "var_d16",
    "base.vqvae": "vae_ch160v4096z32",
    "sparsify.alpha": 0.001,
    "sparsify.log_every": 10,
    "split.expert_size": 32,
    "train_router.lr": 0.01,
    "sampling.cfg": 1.5,
    "moe.scales": [1, 3],
    "selection.rule": "threshold",
    "selection.tau": [0.3, 0.4],
    "evaluate.model": "dynamic",
}
POINT = Record(
    stage="evaluate",
    variant="default",
    fingerprint="f",
    metrics={
        "flops_gmac": 0.75, "flops_gmac_std": 0.0, "fid_efflite0_64px": 12.5, "recall": 0.25,
        "sampling_ms": 5.0,
    },
    config=CONFIG,
    seed=7,
    num_samples=1000,
    dtype="float32",
    started="2026-01-01T00:00:00+00:00",
    ended="2026-01-01T01:00:00+00:00",
    device="a | b",
    threads=1,
    git_commit="c0ffee",
    libraries={"torch": "2.6"},
    about={
        "base_sha256": "abc123", "reference": {"sha256": "def456"},
        "fidelity": "fid_efflite0_64px",
    },
)  # fmt: skip
DENSE = replace(
    POINT,
    config=CONFIG | {"evaluate.model": "dense"},
    metrics={"flops_gmac": 1.0, "flops_gmac_std": 0.0, "fid_efflite0_64px": 12.0},
)
SWEEP = replace(
    POINT,
    stage="sweep",
    about={
        "fidelity": "fid",
        "seeds": [0, 1, 2],
        "settings": [
            {"group": group, "tau": tau, "scales": [1, 3], "fid_mean": fid, "fid_std": 0.5}
            | {"flops_gmac": gmac, "flops_saved": 1 - gmac, "label_agreement": 0.99}
            for group, tau, fid, gmac in [
                ("dense", [], 10.0, 1.0),
                ("last", [0.1], 11.0, 0.9),
                ("chosen", [0.3, 0.4], 10.5, 0.8),
            ]
        ],
    },
)


@pytest.fixture(scope="module")
def card_of(make_model):
    """card_of(records) -> the card of a model with the rules of CONFIG."""
    model = make_model([Threshold(0.3), Threshold(0.4)])
    return lambda records: ModelCard(model_card(model, "card", records))


def test_a_card_without_records_says_so(card_of):
    card = card_of([])
    assert card.data.library_name == "dmoe-var"
    assert card.data.license is None
    assert card.data.base_model is None
    assert "Nothing was measured" in card.text
    assert "GMAC" not in card.text
    assert "scale 1: Threshold tau 0.3; scale 3: Threshold tau 0.4" in card.text
    code = card.text.split("```python\n")[1].split("```")[0].splitlines()
    assert len(code) == 4
    assert 'DynamicVAR.from_pretrained("card")' in code[2]


def test_a_card_shows_what_records_say(card_of, tmp_path):
    POINT.write(tmp_path)
    card = card_of([tmp_path / "result.json", DENSE, SWEEP])
    assert card.data.license == "mit"
    assert card.data.base_model == "FoundationVision/var"
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    mine = "(this model's rule and scales)"
    assert rows[1:5] == [
        f"| **threshold** {mine} | 0.3, 0.4 | 1, 3 | 1000 | 7 | 0.7500 | 25.0% | "
        "fid_efflite0_64px 12.5; recall 0.25 |",
        "| dense | - | - | 1000 | 7 | 1.0000 | 0.0% | fid_efflite0_64px 12 |",
        "| dense | - | 1, 3 | 1000 | 0, 1, 2 | 1.0000 | 0.0% | "
        "fid 10 ± 0.5; label_agreement 0.99 |",
        f"| **operating point** {mine} | 0.3, 0.4 | 1, 3 | 1000 | 0, 1, 2 | 0.8000 | 20.0% | "
        "fid 10.5 ± 0.5; label_agreement 0.99 |",
    ]
    for text in (
        "| sparsify.alpha | 0.001 |",
        "| split.expert_size | 32 |",
        "| train_router.lr | 0.01 |",
        "base model: var_d16",
        "base_sha256 `abc123`",
        "reference.sha256 `def456`",
        "float32 on a | b, commit `c0ffee`",
        'load_vqvae("vae_ch160v4096z32")',
    ):
        assert text in card.text
    assert "log_every" not in card.text
    assert "Nothing was measured" not in card.text


def test_a_dense_record_tells_nothing_of_how_experts_were_made(card_of):
    """Which other experiments may have made otherwise, wherever it stands in the list."""
    dense = CONFIG | {"evaluate.model": "dense"}
    other = replace(POINT, config=dense | {"sparsify.alpha": 0.5})
    again = replace(POINT, config=dense | {"evaluate.seed": 8}, seed=8)
    for records in ([POINT, other, again], [other, again, POINT]):
        text = card_of(records).text
        assert f"| sparsify.alpha | {CONFIG['sparsify.alpha']:g} |" in text
        assert "| dense | - | - | 1000 | 7, 8 | " in text


def test_evaluations_of_one_setting_are_joined_over_their_seeds(card_of):
    """Of another number of images it is another line; under other guidance, another recipe."""
    seed = {"config": CONFIG | {"evaluate.seed": 8}, "seed": 8}
    other = replace(POINT, **seed, metrics={**POINT.metrics, "fid_efflite0_64px": 13.5})
    few = replace(other, num_samples=10)
    unguided = replace(POINT, config=CONFIG | {"sampling.cfg": 0.0})
    card = card_of([POINT, few, other, unguided])
    lines = [
        line for line in card.text.splitlines() if "threshold" in line and " | 1, 3 | " in line
    ]
    rows = [line.split(" | ")[3:] for line in lines]
    assert [
        ("(this model" in line, row[0], row[1], row[-1])
        for line, row in zip(lines, rows, strict=True)
    ] == [
        (True, "1000", "7, 8", "fid_efflite0_64px 13 ± 0.71; recall 0.25 |"),
        (True, "10", "8", "fid_efflite0_64px 13.5; recall 0.25 |"),
        (False, "1000", "7", "fid_efflite0_64px 12.5; recall 0.25 |"),
    ]


def test_skipped_tokens_are_told(card_of):
    """Such images are not those of the model as it is stored."""
    skips = {"sampling.skipping.ratios": [0, 0, 0, 0.5], "sampling.skipping.source": None}
    off = {"sampling.skipping.ratios": [], "sampling.skipping.source": 1}
    card = card_of([DENSE, *(replace(POINT, config=CONFIG | each) for each in (skips, off, {}))])
    assert card.text.count("| threshold, tokens skipped | ") == 1
    heads = {"sampling.heads.ratios": [0, 0, 0, 0.5]}
    assert "| threshold, heads skipped | " in card_of([replace(POINT, config=CONFIG | heads)]).text
    for key, value, told in (
        ("sampling.temperature", 0.9, "at another temperature"),
        ("sampling.int8", "dynamic", "in 8 bits"),
    ):
        text = card_of([replace(POINT, config=CONFIG | {key: value})]).text
        assert f"| threshold, {told} | " in text
        assert "(this model's rule and scales)" not in text
    assert card.text.count("(this model's rule and scales)") == 1
    assert "sampling.skipping.source" not in card_of([replace(POINT, config=CONFIG | off)]).text


def test_a_path_on_this_machine_is_not_shown(card_of):
    config = CONFIG | {"base.var": "/home/me/var_d16", "base.vqvae": "/home/me/vae.pth"}
    card = card_of([replace(POINT, config=config)])
    assert "/home/me" not in str(card)
    assert card.data.license is None
    assert card.data.base_model is None
    assert "licence: not recorded" in card.text


def test_savings_need_a_dense_model_under_the_same_guidance(card_of):
    unguided = replace(DENSE, config=DENSE.config | {"sampling.cfg": 0.0})
    card = card_of([POINT, unguided])
    assert "| 0.7500 | - |" in card.text


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (replace(POINT, config=CONFIG | {"var.depth": 3}), "var.depth is 3, this model has 2"),
        (replace(POINT, metrics={"fid_efflite0_64px": 1.0}), "lacks 'flops_gmac'"),
        (replace(POINT, about={}), "record of evaluate: lacks 'fidelity'"),
        (replace(SWEEP, about={"fidelity": "fid", "seeds": 3}), "record of sweep"),
    ],
)
def test_records_that_do_not_fit_are_refused(card_of, record, said):
    with pytest.raises(DataError, match=said):
        card_of([record])


def test_a_broken_record_is_refused(card_of, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION}))
    with pytest.raises(DataError, match=r"result\.json"):
        card_of([path])


def test_a_packaged_model_takes_its_dense_weights_from_beside_it(make_model, tmp_path):
    model = make_model(Threshold(0.25))
    save_checkpoint(tmp_path / "var", model.dense)
    folder = tmp_path / pretrained.EXPORTED
    pretrained.write_model(model, folder, "", dense_beside=True)
    assert all(name.startswith("moe.") for name in load_file(folder / "model.safetensors"))
    loaded = DynamicVAR.from_pretrained(folder)
    assert same(loaded, model)
    assert loaded.selection == Threshold(0.25)
    shutil.rmtree(tmp_path / "var")
    refused(folder, "var", "model.safetensors")


def test_a_packaged_model_by_its_name():
    model = DynamicVAR.from_pretrained("cifar10")
    assert same(model.dense, load_var("cifar10"))
    assert model.moe_scales == (4, 5, 6)
