"""What the scripts share, in this process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from dmoe_var.config import parse_config
from dmoe_var.errors import ConfigError
from dmoe_var.models.var import VAR, VARConfig
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
DEPTHS = {"d16": 16, "d20": 20, "d24": 24, "d30": 30, "d36_512": 36}
MILLIONS = {"d16": 310.28, "d20": 600.92, "d24": 1033, "d30": 2010}
"""Parameters of the published models (VAR, table of its README)."""
OWN = sorted(path.stem for path in (CONFIGS / "experiment").glob("imagenet_*.yaml"))


@pytest.fixture(scope="module")
def shared():
    """scripts/_hydra.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("_hydra")


def composed(*overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        content = OmegaConf.to_container(hydra.compose("sample", list(overrides)), resolve=True)
    return content


@pytest.fixture(scope="module")
def of_model():
    """of_model(name) -> the configuration of a model on ImageNet folders."""

    def of_model(name):
        content = composed(f"model={name}", "moe=published")
        side = 16 * content["vqvae"]["patch_nums"][-1]
        data = {"kind": "image_folder", "root": "x", "num_classes": 1000, "image_size": side}
        return parse_config({**content, "data": data})

    return of_model


@pytest.mark.parametrize("name", DEPTHS)
def test_published_models(of_model, name):
    """Depth derives all; the default of every field is the published one."""
    config = of_model(name)
    schedule = {"patch_nums": PATCH_NUMS_512} if name == "d36_512" else {}
    shared_adaln = {"shared_adaln": True} if name == "d36_512" else {}
    assert config.vqvae == VQVAEConfig(**schedule)
    assert config.var == VARConfig(depth=DEPTHS[name], **schedule, **shared_adaln)
    assert config.vqvae.image_size == (512 if name == "d36_512" else 256)
    assert (config.moe.scales, config.split.expert_size) == ((7, 8, 9), 128)
    assert config.selection.tau == pytest.approx([1 - t for t in (0.81839, 0.81302, 0.78686)])


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_of_published_models(of_model, name):
    with torch.device("meta"):
        var = VAR(of_model(name).var)
    millions = sum(p.numel() for p in var.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=1e-3)


def test_size_of_the_published_tokenizer(of_model):
    with torch.device("meta"):
        vqvae = VQVAE(of_model("d16").vqvae)
    assert sum(p.numel() for p in vqvae.parameters()) / 1e6 == pytest.approx(108.9, abs=0.1)


def test_classes_by_name(of_model):
    """Names are indices from the configuration on."""
    content = composed("model=d16", "moe=published")
    content["sample"]["classes"] = ["Golden-Retriever", 985, "tench"]
    data = {"kind": "image_folder", "root": "x", "num_classes": 1000, "image_size": 256}
    assert parse_config({**content, "data": data}).sample.classes == (207, 985, 0)


@pytest.fixture
def some_experiments(shared, monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    for name in ("imagenet_d16", "imagenet_d36_512", "digits"):
        (tmp_path / "experiment" / f"{name}.yaml").touch()
    monkeypatch.setattr(shared, "CONFIGS", tmp_path)


@pytest.mark.usefixtures("some_experiments")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["model=d16", "seed=1"], ["experiment=imagenet_d16", "seed=1"]),
        (["seed=1", "model=d36_512"], ["seed=1", "experiment=imagenet_d36_512"]),
        (["model=d16,d36_512"], ["experiment=imagenet_d16,imagenet_d36_512"]),
        (["model=mini"], ["model=mini"]),
        (["model=d16", "experiment=digits"], ["model=d16", "experiment=digits"]),
        (["+experiment=digits", "model=d16"], ["+experiment=digits", "model=d16"]),
        (["vqvae.model=d16", "data=imagenet"], ["vqvae.model=d16", "data=imagenet"]),
        ([], []),
    ],
)
def test_a_models_own_experiment(shared, given, expected):
    assert shared._own_experiment(given) == expected


@pytest.mark.usefixtures("some_experiments")
def test_models_with_and_without_an_experiment(shared):
    with pytest.raises(ConfigError, match="model=mini,d16: of these only d16 have"):
        shared._own_experiment(["model=mini,d16"])


@pytest.mark.parametrize("experiment", OWN)
def test_own_experiments_are_of_their_model(shared, experiment):
    """Else `model=d16` would not be `experiment=imagenet_d16`."""
    model = experiment.removeprefix("imagenet_")
    ours = composed(f"experiment={experiment}")
    theirs = composed(f"model={model}", f"experiment={experiment}")
    assert ours["vqvae"] == theirs["vqvae"]
    assert ours["var"] == theirs["var"]
    parse_config(ours)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["classes=[a b,3]", "seeds=2"], ["sample.classes=[a b,3]", "sample.seeds=2"]),
        (["tau=0.2"], ["sample.selection=given", "selection.tau=0.2"]),
        (["selection.k=2"], ["sample.selection=given", "selection.k=2"]),
        (["sampling.cfg=4", "sweep.seeds=[1]"], ["sampling.cfg=4", "sweep.seeds=[1]"]),
    ],
)
def test_short_keys_of_sample(shared, given, expected):
    assert importlib.import_module("sample").in_full(given) == expected


@pytest.mark.parametrize(
    "arguments",
    [["a=1", "-m", "b=2,3"], ["-m", "a=1", "b=2,3"], ["a=1", "b=2,3", "--multirun"]],
)
def test_options_may_stand_anywhere(shared, monkeypatch, arguments):
    """Hydra itself takes what follows an option in the middle for an unknown argument."""
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    found = shared._command_line(list)
    assert (found.overrides, found.multirun) == (["a=1", "b=2,3"], True)
    again = shared.get_args_parser().parse_args()
    assert (again.overrides, again.multirun) == (["a=1", "b=2,3"], True)


@pytest.mark.parametrize(
    ("rank", "rest", "waits"),
    [("", True, []), ("0", True, []), ("3", True, ["waits"]), ("3", False, [])],
)
def test_the_main_process_speaks_first(shared, monkeypatch, capsys, rank, rest, waits):
    """torchrun ends the others, silent so far, once it has; a process that fails alone speaks, and
    one where a rank is left over from something else."""
    monkeypatch.setenv("RANK", rank)
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "4" if rest else "")
    events = []
    monkeypatch.setattr(shared.time, "sleep", lambda seconds: events.append("waits"))
    with pytest.raises(SystemExit) as stopped:
        shared._stop(ConfigError("seed=-1:\n  wrong"), 2)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "seed=-1: wrong\n"
    assert events == waits


def test_only_the_main_process_reports(shared, monkeypatch, capsys):
    monkeypatch.setattr(shared.distributed, "rank", lambda: 1)
    shared.say("where")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(shared.distributed, "rank", lambda: 0)
    shared.say("where")
    assert capsys.readouterr().out == "where\n"
