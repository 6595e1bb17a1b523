"""The stages whose pictures are drawn."""

from __future__ import annotations

from dmoe_var.stages.catalogue import pictures

POINT = {"selection.rule": "threshold", "selection.tau": (0.3, 0.6)}


def test_samples_of_both_models(experiment):
    """Figure 11 as the paper draws pictures, figure 2a as all is measured."""
    (plain,), (fine,) = (
        f(experiment).runs for f in (pictures.same_seeds, pictures.same_seeds_smoothed)
    )
    assert plain.stage == fine.stage == "sample"
    assert plain.changes == {"sample.model": "both", "sample.per_class": 2, **POINT}
    assert fine.changes == {
        "sample.model": "both", "sample.per_class": 3, **POINT, "sampling.cfg": 4.0,
        "sampling.top_p": 0.95, "sampling.more_smooth": True,
    }  # fmt: skip


def test_one_record_of_maps_for_both_figures(experiment):
    for figure in (pictures.experts(experiment), pictures.experts_by_tau(experiment)):
        assert [(run.stage, run.changes) for run in figure.runs] == [("maps", POINT)]


def test_settings_of_the_maps(experiment, monkeypatch, tmp_path):
    """The operating point alone in figure 2b, all settings in figure 12."""
    drawn = []
    settings = [{"name": name} for name in ("chosen", "0", "0.4")]
    about = {"settings": settings, "scales": [2, 3]}
    monkeypatch.setattr(pictures.Record, "read", lambda path: type("R", (), {"about": about}))
    monkeypatch.setattr(pictures, "stored_maps", lambda folder, number: number)
    monkeypatch.setattr(pictures.expert_maps, "draw", lambda by_tau, *rest: drawn.append(by_tau))
    for figure in (pictures.experts(experiment), pictures.experts_by_tau(experiment)):
        figure.draw(experiment, {"record": "maps/default"}, tmp_path)
    assert drawn == [{"chosen tau": 0}, {"chosen tau": 0, "tau 0": 1, "tau 0.4": 2}]
