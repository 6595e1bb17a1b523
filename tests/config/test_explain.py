"""Every key has a default and an explanation, which are told once: where it is declared."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass

from dmoe_var.config.explain import declared, explained, explanations
from dmoe_var.config.parse import parse_config


@dataclass(frozen=True)
class Length:
    """How long.

    Not told.
    """

    steps: int | None = None
    """Optimiser steps,
    all of them."""
    unsaid: int = 1


MADE = make_dataclass("MADE", [("k", int, field(default=8, metadata={"explanation": "Experts."}))])
MADE.__doc__ = "A section made by code."


@dataclass(frozen=True)
class Stage(Length):
    """A stage."""

    lr: float = 0.1
    """Learning rate."""


@dataclass(frozen=True)
class Root:
    name: str
    """Its name."""
    stage: Stage = field(default_factory=lambda: Stage(steps=3))
    made: MADE = field(default_factory=MADE)


def test_explanations():
    assert explanations(Root) == {
        "name": "Its name.",
        "stage": "A stage.",
        "stage.steps": "Optimiser steps, all of them.",
        "stage.unsaid": "",
        "stage.lr": "Learning rate.",
        "made": "A section made by code.",
        "made.k": "Experts.",
    }
    assert explanations(Length) == {"steps": "Optimiser steps, all of them.", "unsaid": ""}


def test_declared():
    """A key that must be given has no default, and the defaults are those of the fields."""
    expected = {"stage": {"steps": None, "unsaid": 1, "lr": 0.1}, "made": {"k": 8}}
    assert declared(Root) == expected


def test_every_key_is_explained():
    texts = explanations()
    assert [key for key, text in texts.items() if not text] == []
    assert [key for key, text in texts.items() if len(text) > 180] == []
    config = parse_config({"name": "x", "data": {"image_size": 256, "kind": "image_folder"}})
    assert [key for key in config.leaves if key not in texts] == []


def test_declared_keys_are_those_of_the_configuration():
    content = declared()
    assert content["var"]["width"] is None
    trained = ("train_vqvae", "train_var", "sparsify", "train_router")
    lengths = {stage: {**content[stage], "steps": 1} for stage in trained}
    data = {**content["data"], "image_size": 256, "kind": "image_folder"}
    given = {"name": "x", "data": data}
    assert parse_config({**content, **lengths, **given}) == parse_config(given)


def test_explained():
    values = {
        "name": "a", "seed": 3, "evaluate": {"seed": 4}, "sweep": {"lists": {"x": [0.5]}},
        "sampling": {"skipping": {"source": 2}},
    }  # fmt: skip
    reads = {"name", "evaluate.seed", "sweep.lists", "train", "sampling.skipping.source"}
    assert explained(values, reads).splitlines() == [
        f"name: a # {explanations()['name']}",
        "",
        f"sampling.skipping: # {explanations()['sampling.skipping']}",
        f"  source: 2 # {explanations()['sampling.skipping.source']}",
        "",
        f"evaluate: # {explanations()['evaluate']}",
        "  seed: 4 # Seed of the images.",
        "",
        f"sweep: # {explanations()['sweep']}",
        f'  lists: {{"x": [0.5]}} # {explanations()["sweep.lists"]}',
    ]
