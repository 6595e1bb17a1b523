"""What the scripts share, in this process."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from composing import CONFIGS, composed
from hydra.core.override_parser.overrides_parser import OverridesParser

from dmoe_var import distributed
from dmoe_var.config.explain import explanations
from dmoe_var.config.parse import parse_config
from dmoe_var.errors import ConfigError, InputError, TrainingDiverged
from dmoe_var.models.var import VARConfig
from dmoe_var.models.vqvae import VQVAEConfig

ROOT = Path(__file__).resolve().parents[2]
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
DEPTHS = {"d16": 16, "d20": 20, "d24": 24, "d30": 30, "d36_512": 36}
OWN = sorted(path.stem for path in (CONFIGS / "experiment").glob("imagenet_*.yaml"))


@pytest.fixture(scope="module")
def shared():
    """scripts/_hydra.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("_hydra")


@pytest.fixture(scope="module")
def command_line(shared):
    """scripts/_command_line.py."""
    return importlib.import_module("_command_line")


@pytest.fixture(scope="module")
def composer(shared):
    """scripts/_compose.py."""
    return importlib.import_module("_compose")


@pytest.fixture(scope="module")
def of_model():
    """of_model(name, **sample) -> the configuration of a model on ImageNet folders."""

    def of_model(name, **sample):
        content = composed("sample", f"model={name}", "moe=published")
        side = 16 * content["vqvae"]["patch_nums"][-1]
        data = {"kind": "image_folder", "root": "x", "num_classes": 1000, "image_size": side}
        return parse_config({**content, "data": data, "sample": {**content["sample"], **sample}})

    return of_model


@pytest.mark.parametrize("name", DEPTHS)
def test_published_models(of_model, name):
    """Depth derives all; the default of every field is the published one."""
    config = of_model(name)
    of_512 = name == "d36_512"
    schedule = {"patch_nums": PATCH_NUMS_512} if of_512 else {}
    assert config.vqvae == VQVAEConfig(**schedule)
    assert config.var == VARConfig(depth=DEPTHS[name], **schedule, shared_adaln=of_512)
    assert config.vqvae.image_size == (512 if of_512 else 256)
    assert (config.moe.scales, config.split.expert_size) == ((7, 8, 9), 128)
    assert config.selection.tau == pytest.approx([1 - t for t in (0.81839, 0.81302, 0.78686)])


def test_classes_by_name(of_model):
    """Names are indices from the configuration on."""
    config = of_model("d16", classes=["Golden-Retriever", 985, "tench"])
    assert config.sample.classes == (207, 985, 0)


@pytest.fixture
def our_experiments(composer):
    with composer.composing("sample", SimpleNamespace(config_dir=None)):
        yield


@pytest.mark.usefixtures("our_experiments")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["model=d16", "seed=1"], ["experiment=imagenet_d16", "seed=1"]),
        (["model=d16,d36_512"], ["experiment=imagenet_d16,imagenet_d36_512"]),
        (["model=mini"], ["model=mini"]),
        (["model=d16", "experiment=digits"], ["model=d16", "experiment=digits"]),
        (["+experiment=digits", "model=d16"], ["+experiment=digits", "model=d16"]),
        (["vqvae.model=d16", "data=imagenet"], ["vqvae.model=d16", "data=imagenet"]),
    ],
)
def test_a_models_own_experiment(composer, given, expected):
    assert composer.own_experiment(given) == expected


@pytest.mark.usefixtures("our_experiments")
def test_models_with_and_without_an_experiment(composer):
    with pytest.raises(ConfigError, match="model=mini,d16: of these only imagenet_d16 are"):
        composer.own_experiment(["model=mini,d16"])


@pytest.mark.parametrize("experiment", OWN)
def test_own_experiments_are_of_their_model(shared, experiment):
    """Else `model=d16` would not be `experiment=imagenet_d16`."""
    model = experiment.removeprefix("imagenet_")
    ours = composed("sample", f"experiment={experiment}")
    theirs = composed("sample", f"model={model}", f"experiment={experiment}")
    assert (ours["vqvae"], ours["var"]) == (theirs["vqvae"], theirs["var"])
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


@pytest.mark.parametrize("arguments", [["a=1", "-m", "b=2,3"], ["a=1", "b=2,3", "--multirun"]])
def test_options_may_stand_anywhere(command_line, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    found = command_line.read(list)
    assert (found.overrides, found.multirun) == (["a=1", "b=2,3"], True)


def test_the_parser_holds_only_text(command_line):
    """From Python 3.14 on argparse refuses anything else as soon as an option is added."""
    actions = command_line.parser()._actions
    formatter = argparse.HelpFormatter("script.py")
    assert [formatter._expand_help(action) for action in actions] == [a.help for a in actions]
    assert all(type(action.help) is str for action in actions)


TEXT = [
    ("fidelity.reference", "runs/digits/evaluate/cfg=3-1a2b/samples.npz"),
    ("fidelity.reference", "/data/ü (1)/[x] {y}/it's 100 % \\ 'a\"b'.npz"),
    ("data.root", "~/pictures"),
    ("base.var", "1_000"),
    ("run_dir", "true"),
    ("run_dir", " a b "),
    ("base.var", "range(1,3)x"),
    ("sample.pretrained", "me/model@main"),
    ("launcher.partition", "007"),
    ("figures.depths.2", "runs/a=b"),
]


@pytest.mark.parametrize(("key", "value"), TEXT)
def test_text_is_taken_as_it_is(command_line, key, value):
    """By the grammar of Hydra itself, and as each of two values of a multirun."""
    parse = OverridesParser.create().parse_override
    if "," not in value:
        both = parse(command_line.written_out(f"{key}={value},x", True))
        assert both._convert_value(both._value.list) == [value, "x"]
    alone = command_line.written_out(f"{key}={value}", False)
    assert parse(alone).value() == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("base.var=null", "base.var=null"),
        ("base.var='a=b'", "base.var='a=b'"),
        ("run_dir=${name}/x", "run_dir=${name}/x"),
        ("run_dir=runs/plain-1.5", "run_dir=runs/plain-1.5"),
        ("sweep.seeds=[0,1]", "sweep.seeds=[0,1]"),
        ("moe.scales=[", "moe.scales=["),
        ("sample.classes=[jack-o'-lantern,ü,3]", "sample.classes=['jack-o\\'-lantern','ü',3]"),
        ("train_var.steps=ma=ny", "train_var.steps='ma=ny'"),
        ("sweep.lists.mine=[0.1]", "++sweep.lists.mine=[0.1]"),
        ("figures.depths={2: null}", "++figures.depths={2: null}"),
        ("+launcher.more.mem=1G", "++launcher.more.mem=1G"),
        ("+benchmark.real_masks=true", "++benchmark.real_masks=true"),
        ("~sweep.lists.paper", "~sweep.lists.paper"),
    ],
)
def test_what_is_written_out(command_line, given, expected):
    assert command_line.written_out(given, False) == expected


@pytest.mark.parametrize(
    ("given", "points"),
    [
        ("base.var=nope.pth,1_0,2024,null", ["nope.pth", "1_0", "2024", None]),
        ("seed=range(1,4)", [1, 2, 3]),
        ("sweep.seeds=[0,1],[2]", [[0, 1], [2]]),
        ("selection.tau=choice(0.1,0.2)", [0.1, 0.2]),
        ("experiment=digits,digits_base", ["digits", "digits_base"]),
    ],
)
def test_several_values(command_line, given, points):
    parsed = OverridesParser.create().parse_override(command_line.written_out(given, True))
    assert list(map(parsed._convert_value, parsed.sweep_iterator())) == points
    with pytest.raises(ConfigError, match=r"several values are for a multirun, -m; a list is"):
        command_line.written_out(given, False)


def test_a_path_with_a_comma(command_line, monkeypatch, tmp_path):
    """It is there: it is no two values, in a multirun neither."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    for multirun in (False, True):
        assert command_line.written_out("base.var=a,b", multirun) == "base.var='a,b'"


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


def failing_run(failures):
    """A run that fails as the point's seed says."""

    def run(experiment):
        if experiment.config.seed in failures:
            raise failures[experiment.config.seed]
        print(f"ran {experiment.config.seed}")

    return run


POINTS_FAIL = {
    1: InputError("base.var=nope.pth: no such file"),
    2: TrainingDiverged("train_var: the loss is nan at step 3"),
    3: OSError(28, "No space left on device"),
    4: ZeroDivisionError("a fault"),
    5: MemoryError("Unable to allocate 8 TiB"),
}


@pytest.fixture
def run_points(shared, monkeypatch, tmp_path):
    """run_points(run, *arguments) -> what `_run` does in this process, without its threads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "prepare", lambda experiment: None)

    def run_points(run, *arguments):
        monkeypatch.setattr(sys, "argv", ["train_var.py", "device=cpu", *arguments])
        return shared._run(run, list, lambda experiment: experiment)

    return run_points


def test_a_point_that_fails_leaves_the_others(run_points, capsys):
    """Each line says which; the first status is the script's."""
    assert run_points(failing_run(POINTS_FAIL), "-m", "seed=2,1,4,0") == 1
    out, err = capsys.readouterr()
    assert out == "ran 0\n"
    lines = [line for line in err.splitlines() if line.startswith("device=cpu seed=")]
    assert [line.partition(": ")[0][-1] for line in lines] == list("214")
    assert lines[1].endswith("seed=1: base.var=nope.pth: no such file")
    assert "Traceback" in err


def test_an_interrupt_ends_all_points(run_points, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_points(failing_run({0: KeyboardInterrupt()}), "-m", "seed=0,1")
    assert capsys.readouterr().out == ""


def test_one_point_alone(run_points, capsys, monkeypatch):
    """One line and its status; a fault of the program is a traceback. So with each of several
    processes, which stay in step."""
    for seed, status in ((1, 2), (2, 1), (3, 2), (5, 1)):
        with pytest.raises(SystemExit) as stopped:
            run_points(failing_run(POINTS_FAIL), f"seed={seed}")
        assert stopped.value.code == status
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ZeroDivisionError):
        run_points(failing_run(POINTS_FAIL), "seed=4")
    monkeypatch.setattr(distributed, "launched_processes", lambda: 2)
    with pytest.raises(SystemExit):
        run_points(failing_run(POINTS_FAIL), "-m", "seed=1")


def test_help_explains_the_keys_that_the_stage_reads(run_points, capsys):
    assert run_points(None, "--help", "train_var.lr=0.5") == 0
    shown, texts = capsys.readouterr().out, explanations()
    assert "== Configuration groups ==" in shown
    assert f"\ntrain_var: # {texts['train_var']}\n" in shown
    assert f"\n  lr: 0.5 # {texts['train_var.lr']}\n" in shown
    assert "\nseed: 0 # " in shown
    assert "\nsweep: #" not in shown


MINE = """# @package _global_
defaults:
  - digits

name: mine
seed: 3
"""
ROOT_OF_MINE = """defaults:
  - train_var
  - override experiment: mine
  - _self_

threads: 2
hydra:
  sweeper:
    params:
      seed: 1,2
"""


@pytest.fixture
def conf(tmp_path):
    """A folder of a user's own, beside configs/."""
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    for name, newline in (("mine", "\n"), ("imagenet_own", "\n"), ("crlf", "\r\n")):
        (folder / "experiment" / f"{name}.yaml").write_text(MINE, newline=newline)
    (folder / "mine.yaml").write_text(ROOT_OF_MINE)
    return folder


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config-dir", "conf", "experiment=mine"], [("mine", 3, True, None)]),
        (["-cd=conf", "experiment=crlf"], [("mine", 3, True, None)]),
        (["-cd", "conf", "-cn", "mine", "seed=3"], [("mine", 3, True, 2)]),
        (["-cd", "conf", "-cn", "mine", "-m"], [("mine", 1, False, 2), ("mine", 2, False, 2)]),
    ],
)
def test_configurations_of_ones_own(run_points, conf, arguments, expected):
    """The experiment's own settings name what differs from them, here the seed of some."""
    found = []
    assert run_points(found.append, *arguments) == 0
    assert [
        (w.config.name, w.config.seed, w.variant("train_vqvae") == "default", w.config.threads)
        for w in found
    ] == expected


def test_a_models_own_experiment_of_ones_own(composer, conf):
    with composer.composing("sample", SimpleNamespace(config_dir=str(conf))):
        assert composer.own_experiment(["model=own"]) == ["experiment=imagenet_own"]


def test_jobs_get_the_folders(shared, conf, monkeypatch, run_points):
    sent = []
    monkeypatch.setattr(shared.launcher, "check", lambda config: None)
    monkeypatch.setattr(shared.launcher, "run_jobs", lambda *given: sent.extend(given[2]) or [])
    options = ("-cd", "conf", "-cn", "mine", "-m", "launcher=slurm")
    assert run_points(lambda experiment: None, *options, "device=cpu") == 0
    assert [job[-2:] for job in sent] == [[f"--config-dir={conf}", "--config-name=mine"]] * 2
    assert not any("launcher" in each for job in sent for each in job)
