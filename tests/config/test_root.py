"""The configuration: everything in configs/ composes, and what is wrong is told in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from composing import CONFIGS, composed
from omegaconf import MissingMandatoryValue, OmegaConf
from tiny_experiment import changed

from dmoe_var.config.parse import is_text, is_users_own, parse_config
from dmoe_var.config.root import flatten
from dmoe_var.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[!_]*.py"))
GOOD = [(script, ()) for script in SCRIPTS] + [
    ("pipeline", (f"{path.parent.name}={path.stem}",))
    for group in ("experiment", "sweep")
    for path in sorted((CONFIGS / group).glob("*.yaml"))
    if not path.stem.startswith("imagenet")  # those of a model: tests/scripts/test_hydra.py
]


@pytest.fixture(scope="module")
def digits():
    """The plain content of the digits experiment."""
    return composed("pipeline")


@pytest.mark.parametrize(("script", "overrides"), GOOD)
def test_everything_in_configs_composes(script, overrides):
    parse_config(composed(script, *overrides))


EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))


OF_CIFAR10 = [path.stem for path in EXPERIMENTS if path.stem.startswith("cifar10")]


@pytest.mark.parametrize("name", OF_CIFAR10)
def test_cifar10_s_experiments_also_read_torchvision_s_files(name):
    """Whatever they say of picture files: how they are cut and how fast they are read."""
    content = composed("pipeline", f"experiment={name}", "data=cifar10_download")
    assert parse_config(content).data.kind == "cifar10"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_differs_from_its_base(path, tmp_path):
    """Its base is what is composed where the file holds its defaults list alone."""
    folder = tmp_path / "configs"
    shutil.copytree(CONFIGS, folder)
    said = OmegaConf.to_container(OmegaConf.load(path))
    defaults = OmegaConf.to_yaml({"defaults": said.pop("defaults", [])})
    (folder / "experiment" / path.name).write_text(f"# @package _global_\n{defaults}")
    content = composed("pipeline", f"experiment={path.stem}", folder=folder, whole=False)
    base = dict(flatten(content))
    assert [key for key, value in flatten(said) if key in base and base[key] == value] == []


@pytest.mark.parametrize(
    ("overrides", "key"),
    [(["experiment=imagenet", "model=d16"], "base.var"), (["model=published"], "var.depth")],
)
def test_what_a_file_demands_has_no_default(overrides, key):
    with pytest.raises(MissingMandatoryValue, match=key):
        composed("pipeline", *overrides)


def test_values_arrive(digits):
    found = parse_config(digits).leaves
    for key, value in flatten(digits):
        assert found[key] in (value, [value]), key


WRONG = [
    # unknown keys
    ({"sede": 1}, ("sede: unknown key", "did you mean seed?", "run_dir")),
    ({"train_var.step": 1}, ("train_var.step: unknown key", "did you mean steps?", "batch_size")),
    ({"train_var.start": "digits"}, ("train_var.start=digits: nothing is trained", "base.var=")),
    (
        {"train_var.scale_weights": [1, 2]},
        ("train_var.scale_weights=[1.0, 2.0]: allowed", "a number for each of 7 scales"),
    ),
    ({"train_var.scale_weights": [0] * 7}, ("not all of them 0",)),
    ({"train_var.scale_weights": [-1] + [1] * 6}, ("train_var.scale_weights", "-1")),
    ({"figures.hoyer_alpha": 0}, ("figures.hoyer_alpha", "0", "greater than 0")),
    ({"sparsify.start": "digits"}, ("sparsify.start: unknown key", "activation_checkpointing")),
    ({"sparsify.snapshot_every": 9}, ("sparsify.snapshot_every: unknown key",)),
    # names of classes
    ({"data.class_names": ["a"]}, ("data.class_names=('a',) is read by kind=image_folder alone",)),
    (
        {"data.kind": "image_folder", "data.class_names": ["a"]},
        ("data.class_names=['a'] must be none", "var.num_classes=10"),
    ),
    # types
    ({"seed": "one"}, ("seed='one'", "integer")),
    ({"seed": 1.5}, ("seed=1.5", "integer")),
    ({"train_var.lr": True}, ("train_var.lr=True",)),
    ({"train_var": None}, ("train_var=None",)),
    ({"progress": 2}, ("progress=2", "boolean")),
    ({"run_dir": 3}, ("run_dir=3", "string")),
    ({"moe.scales": 4}, ("moe.scales=4", "array")),
    ({"moe.skipped": "means"}, ("moe.skipped='means'", "'zero' or 'mean'")),
    ({"moe.mean_images": 0}, ("moe.mean_images=0", "greater than 0")),
    ({"selection.tau": "high"}, ("selection.tau='high'",)),
    # ranges
    ({"seed": -1}, ("seed=-1", "greater than or equal to 0")),
    ({"name": "a/b"}, ("name='a/b'", "A-Za-z0-9")),
    ({"device": "gpu"}, ("device='gpu'", "auto", "cpu", "cuda")),
    ({"dtype": "float16"}, ("dtype='float16'", "'float32' or 'bfloat16'")),
    ({"until": "figures"}, ("until='figures'", "'split'", "'sweep'")),
    ({"train_var.lr": float("nan")}, ("train_var.lr=nan", "finite")),
    ({"train_var.betas": [0.9]}, ("train_var.betas", "[0.9]")),
    ({"train_var.betas": [0.9, 1.0]}, ("train_var.betas", "1.0")),
    ({"train_router.scales": []}, ("train_router.scales=[]",)),
    ({"vqvae.ch": 40}, ("vqvae.ch=40", "multiple of 32")),
    ({"vqvae.conv_kernel": 2}, ("vqvae.conv_kernel=2", "odd")),
    ({"sampling.temperature": -1}, ("sampling.temperature=-1.0 is not within",)),
    ({"data.kind": "cifar10", "data.resize_ratio": 2}, ("data.resize_ratio=2.0 is read by",)),
    ({"vqvae.patch_nums": [1, 3, 2, 8]}, ("patch_nums must rise", "(1, 3, 2, 8)")),
    ({"var.num_heads": 3}, ("num_heads=3", "width=128")),
    ({"var.mlp_ratio": 1e-9}, ("mlp_ratio=1e-09",)),
    ({"selection.tau": 1.5}, ("selection.tau", "1.5", "less than or equal to 1")),
    ({"fidelity.weights": "a"}, ("fidelity.weights=a: backbone=efflite0", "allowed with it: null")),
    ({"selection.rule": "best"}, ("selection.rule='best'", "'top_k'", "'oracle'", "'keys'")),
    ({"selection.k": 2.5}, ("selection.k=2.5", "integer")),
    ({"selection.layer_tau": [[2]]}, ("selection.layer_tau.0.0=2", "less than or equal to 1")),
    ({"selection.shares": 1}, ("selection.shares: unknown key", "did you mean share?")),
    ({"selection.rule": "top_k", "selection.layer_tau": [[0.1]]}, ("layer_tau=[[0.1]] goes with",)),
    ({"sampling.cfg": [1.5, 0]}, ("sampling.cfg=(1.5, 0", "has 2 values", "each of 7 scales")),
    ({"sampling.skipping.ratios": [0, 0.5]}, ("sampling.skipping.ratios=(0.0, 0.5) has 2 values",)),
    ({"sampling.skipping.ratios": [0, 0]}, ("sampling.skipping.ratios=(0.0, 0.0) has 2 values",)),
    ({"sampling.heads.ratios": [0, 0]}, ("sampling.heads.ratios=(0.0, 0.0) has 2 values",)),
    ({"sampling.heads.ratios": [0, 0.5]}, ("sampling.heads.ratios=(0.0, 0.5) has 2 values",)),
    (
        {"sampling.heads.ratios": [0, 0, 0, 0, 0, 0, 0.5], "sampling.int8": "dynamic"},
        ("sampling.int8=dynamic holds projections in 8 bits",),
    ),
    (
        {"tune_experts.steps": 1, "tune_experts.guidance": 4},
        ("tune_experts.guidance=4 joins predictions", "distill=0; allowed: distill above 0"),
    ),
    (
        {"tune_experts.steps": 1, "tune_experts.distill": 1, "tune_experts.guidance": [4, 0]},
        ("tune_experts.guidance=(4.0, 0", "has 2 values", "each of 7 scales"),
    ),
    ({"sampling.skipping.ratio": [0]}, ("sampling.skipping.ratio: unknown key", "mean ratios?")),
    (
        {"sampling.skipping": {"ratios": [0, 0, 0, 0.5, 0, 0, 0], "measure": "router"}},
        ("sampling.skipping.measure=router: no experts at [3] (moe.scales=[4, 5, 6])", "distance"),
    ),
    (
        {
            "sampling.skipping": {"ratios": [0, 0, 0, 0, 0, 0, 0.5], "measure": "router"},
            "selection.rule": "random",
        },
        ("sampling.skipping.measure=router: selection.rule=random runs no router", "distance"),
    ),
    ({"evaluate.num_samples": 1}, ("evaluate.num_samples=1", "greater than or equal to 2")),
    ({"evaluate.model": "sparse"}, ("evaluate.model='sparse'", "'dynamic' or 'pruned'")),
    ({"pruning.rule": "mean"}, ("pruning.rule='mean'", "'mean_abs' or 'mean_signed'")),
    ({"fidelity.backbone": "clip"}, ("fidelity.backbone='clip'", "'efflite0' or 'inception'")),
    ({"data.image_size": 20}, ("data.image_size=20", "multiple of 8")),
    ({"sweep.seeds": []}, ("sweep.seeds=[]", "at least 1")),
    ({"sweep.last": [0.1, 2]}, ("sweep.last.1=2", "less than or equal to 1")),
    # keys that must fit together
    ({"train_var.epochs": 2}, ("train_var", "steps=1000, epochs=2", "exactly one")),
    ({"train_var.steps": None}, ("train_var", "steps=None, epochs=None", "exactly one")),
    ({"var.vocab_size": 64}, ("var.vocab_size=64", "vqvae.vocab_size=128")),
    ({"vqvae.z_channels": 8}, ("var.z_channels=16", "vqvae.z_channels=8")),
    ({"data.image_size": 32}, ("data.image_size=32", "8 cells of 2 pixels")),
    ({"split.expert_size": 48}, ("split.expert_size=48", "divide the FFN's 512")),
    ({"split.expert_size": 512}, ("split.expert_size=512", "at least two")),
    ({"var.experts": {"expert_size": 32}}, ("var.experts must be null", "split")),
    ({"moe.scales": [5, 7]}, ("moe.scales=[5, 7]", "distinct scales within 0..6")),
    ({"moe.scales": [5, 5]}, ("moe.scales=[5, 5]", "distinct scales within 0..6")),
    ({"train_router.scales": [9]}, ("train_router.scales=[9]", "within 0..6")),
    ({"selection.tau": [0.1, 0.2]}, ("selection.tau=[0.1, 0.2]", "1, 3, 7 values")),
    (
        {"tune_experts.tau": [0.1, 0.2], "tune_experts.steps": 1},
        ("tune_experts.tau=[0.1, 0.2] has 2 values",),
    ),
    ({"tune_experts.steps": 2, "tune_experts.epochs": 2}, ("tune_experts", "exactly one")),
    ({"train_router.condition": "layer"}, ("train_router.condition='layer'", "'scale', 'class'")),
    ({"selection.rule": "keys", "selection.tau": [0.1, 0.2]}, ("selection.tau=[0.1, 0.2]",)),
    ({"selection.layer_tau": [[0.1]]}, ("selection.layer_tau=[[0.1]] is for 1 layers",)),
    ({"selection.rule": "top_k", "selection.k": 17}, ("selection.k=17", "at most 16")),
    (
        {"fidelity.precision_recall": True, "fidelity.neighbours": 1000},
        ("evaluate.num_samples=1000", "greater than fidelity.neighbours=1000"),
    ),
    (
        {"fidelity.precision_recall": True, "fidelity.reference_images": 3},
        ("fidelity.reference_images=3", "greater than fidelity.neighbours=3"),
    ),
    ({"drafter.scales": 2}, ("drafter.var=None and scales=2 must both be given, or none",)),
    ({"drafter": {"var": "digits", "scales": 8}}, ("drafter.scales=8 must be within 0..7",)),
    ({"sweep.chosen": "mine"}, ("sweep", "chosen='mine'", "paper")),
    ({"sweep.parts": 2}, ("sweep.part=null: parts=2 needs one, 1..2; neither joins",)),
    ({"sweep.parts": 2, "sweep.part": 3}, ("sweep.part=3 must be at most parts=2",)),
    ({"sample.classes": [3, 10]}, ("sample.classes", "10", "within 0..9")),
    ({"sample.classes": []}, ("sample.classes: [] must be a class or a list of classes",)),
    ({"sample.classes": [1.5]}, ("sample.classes: [1.5] must be", "by index or name")),
    ({"benchmark.tau": [0.1, 0.1]}, ("benchmark.tau: [0.1, 0.1] must be distinct",)),
]


@pytest.mark.parametrize(("changes", "parts"), WRONG)
def test_wrong_values_are_told_in_one_line(digits, changes, parts):
    with pytest.raises(ConfigError) as caught:
        parse_config(changed(digits, changes))
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


PATHS = [
    "run_dir", "data.root", "base.var", "base.vqvae", "drafter.var", "fidelity.reference",
    "sample.pretrained", "benchmark.smaller", "benchmark.published",
]  # fmt: skip


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_is_known_wherever_a_path_is_given(digits, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/someone")
    others = {"data.root": {"data.kind": "image_folder"}, "drafter.var": {"drafter.scales": 1}}
    for given, expected in (("~/a b/c", "/home/someone/a b/c"), ("digits", "digits")):
        assert (
            parse_config(changed(digits, {key: given, **others.get(key, {})})).leaves[key]
            == expected
        )


@pytest.mark.parametrize(
    ("key", "text", "users_own"),
    [
        ("run_dir", True, False),
        ("base.var", True, False),
        ("launcher.partition", True, False),
        ("figures.depths.2", True, True),
        ("sweep.lists.mine", False, True),
        ("launcher.more.mem", False, True),
        ("dtype", False, False),
        ("seed", False, False),
        ("sample.classes", False, False),
        ("sweep.lists", False, True),
        ("no.such.key", False, False),
        ("experiment", False, False),
    ],
)
def test_kinds_of_keys(key, text, users_own):
    assert (is_text(key), is_users_own(key)) == (text, users_own)
