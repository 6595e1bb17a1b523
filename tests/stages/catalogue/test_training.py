"""The trainings that are drawn, and the points of the models that they leave."""

from __future__ import annotations

from dmoe_var.stages.catalogue import training

DENSE = {"evaluate.model": "dense"}


def changes_of(figure):
    return {c.name: [dict(p.changes) for p in c.points] for c in figure.curves}


def runs_of(figure):
    return [(run.name, run.stage, run.changes, run.shade) for run in figure.runs]


def test_every_alpha_with_every_expert(experiment):
    figure = training.alphas(experiment)
    assert runs_of(figure) == [
        ("alpha 0", "sparsify", {"sparsify.alpha": 0.0}, 0),
        ("alpha 0.001", "sparsify", {"sparsify.alpha": 1e-3}, 1),
    ]
    every = {"evaluate.model": "dynamic", "selection.rule": "all"}
    assert changes_of(figure) == {
        "dense VAR": [DENSE],
        "all experts": [{"sparsify.alpha": alpha, **every} for alpha in (0.0, 1e-3)],
    }


def test_routers_of_a_low_and_a_high_alpha(experiment):
    """Each alpha's routers, and the curve over tau of the same name."""
    figure = training.routers(experiment)
    alphas = {"alpha 0.001": 1e-3, "alpha 0.1": 1e-1}
    assert runs_of(figure) == [
        (name, "train_router", {"sparsify.alpha": alpha}, shade)
        for shade, (name, alpha) in enumerate(alphas.items())
    ]
    fixed = {"evaluate.model": "dynamic", "selection.rule": "threshold"}
    assert changes_of(figure) == {
        "dense VAR": [DENSE],
        **{
            name: [{"sparsify.alpha": alpha, **fixed, "selection.tau": (tau,)} for tau in (0, 0.5)]
            for name, alpha in alphas.items()
        },
    }
