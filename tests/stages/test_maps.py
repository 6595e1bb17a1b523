"""The maps stage: which selections it draws with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dmoe_var import DynamicVAR, Threshold, generate
from dmoe_var.data.images import to_uint8
from dmoe_var.experiment.graph import run_stage
from dmoe_var.experiment.points import vary
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.stages.maps import collect_maps, stored_maps
from dmoe_var.stages.parts import loaded


@pytest.mark.parametrize(
    ("selection", "name"),
    [
        ({"layer_tau": [[0.5], [0.5]]}, "threshold by layer 0.5; 0.5"),
        ({"rule": "oracle", "tau": [0.5, 1.0]}, "oracle 0.5,1"),
    ],
)
def test_chosen_is_what_is_configured(make_experiment, runs, selection, name):
    """The chosen maps are of the configured rule, a tau for each layer included; the others of one
    tau."""
    changes = {f"selection.{key}": value for key, value in selection.items()}
    shown = {"maps.tau": [0.0, 0.5], "maps.images": 2, "maps.seed": 3}
    experiment = make_experiment(runs, {**changes, **shown})
    record = run_stage(experiment, "maps")
    shown = [(each["name"], each["selection"]) for each in record.about["settings"]]
    assert shown == [("chosen", name), ("0", "threshold 0"), ("0.5", "threshold 0.5")]
    chosen, every, half = (stored_maps(experiment.folder("maps"), i).maps for i in range(3))
    assert (every == 1).all()
    assert (half < 1).any()
    assert np.array_equal(chosen, half) == (selection.get("rule") != "oracle")
    drawn = generate(
        loaded.dynamic(experiment), loaded.vqvae(experiment), [0, 1], seed=3,
        selection=experiment.config.selection.rules(),
    )  # fmt: skip
    assert np.array_equal(stored_maps(experiment.folder("maps"), 0).images[:, 1], to_uint8(drawn))
    assert (record.seed, record.num_samples) == (3, 2)


def test_maps_are_of_the_class_and_of_all_layers(
    make_experiment, make_vqvae, make_var, make_moe, tmp_path, no_grad
):
    """Of models whose class matters: the null branch, or one layer alone, has other maps. Each
    scale's cells are enlarged to the finest scale's."""
    experiment = make_experiment(tmp_path, {"var.depth": 2, "var.width": 64, "var.num_heads": 2})
    dense, labels, taus = make_var(num_classes=10), [3, 5], [0.4, 0.6]
    models = {"dense": dense, "experts": make_moe(dense), "vqvae": make_vqvae()}
    bench = SimpleNamespace(**models, drafted=lambda experiment, model: model)
    images, maps = collect_maps(experiment, bench, labels, [Threshold(tau) for tau in taus], seed=1)
    counts, model = ExpertCounts(), DynamicVAR(dense, bench.experts, (2, 3))
    drawn = generate(model, bench.vqvae, labels, seed=1, tau=taus, observer=counts)
    assert images.shape == (2, 2, 8, 8, 3)
    assert np.array_equal(images[:, 1], to_uint8(drawn))
    coarse = counts.per_token(2).view(2, 4, 3, 3)[:, :2].double().numpy().sum(0) / 16
    assert np.allclose(maps[:, 0], coarse[:, [0, 0, 1, 2]][:, :, [0, 0, 1, 2]])
    experts = counts.per_token(3).view(2, 4, 4, 4).double().numpy()  # of layers, rows; eight each
    assert np.allclose(maps[:, 1], experts[:, :2].sum(0) / 16)
    for others in (experts[:, 2:].sum(0) / 16, experts[0, :2] / 8, experts[1, :2] / 8):
        assert not np.allclose(maps[:, 1], others)


def test_skipped_tokens_run_no_expert(make_experiment, make_vqvae, make_var, make_moe, tmp_path):
    """One layer runs every expert on all tokens, the other on half of them."""
    experiment = make_experiment(tmp_path, {"var.depth": 2, "var.width": 64, "var.num_heads": 2})
    skips = {"ratios": (0.0, 0.0, 0.0, 0.5), "first_layer": 1}
    experiment = vary(experiment, {f"sampling.skipping.{k}": v for k, v in skips.items()})
    dense = make_var(num_classes=10)
    models = {"dense": dense, "experts": make_moe(dense), "vqvae": make_vqvae()}
    bench = SimpleNamespace(**models, drafted=lambda experiment, model: model)
    _, maps = collect_maps(experiment, bench, [3, 5], [Threshold(0.0)] * 2, seed=1)
    assert (maps[:, 0] == 1).all()
    assert [np.sort(each).ravel().tolist().count(1) for each in maps[:, 1]] == [8, 8]
    assert set(maps[:, 1].ravel()) == {0.5, 1.0}
