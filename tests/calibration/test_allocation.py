"""Where to save, against closed forms and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dmoe_var.calibration.allocation import LossCurve, allocate, tau_at

GRID = tuple(np.linspace(0, 0.99, 100).tolist())


def quadratic(weight, cost):
    """loss = weight (1 - d)^2."""
    return LossCurve(GRID, tuple(weight * (1 - d) ** 2 for d in GRID), cost)


def test_equal_marginal_loss_of_quadratics():
    """min a x^2 + b y^2 with p x + q y = s has x : y = p/a : q/b."""
    found = allocate({"x": quadratic(3, 2), "y": quadratic(1, 5)}, saved=2.0)
    x, y = 1 - found["x"], 1 - found["y"]
    assert 2 * x + 5 * y == pytest.approx(2.0)
    assert x / y == pytest.approx((2 / 3) / (5 / 1), abs=0.03)  # pieces of 1 %


def test_against_brute_force():
    generator = np.random.default_rng(0)
    shares = (1.0, 0.75, 0.5, 0.25)
    curves = {
        i: LossCurve(shares[1:], tuple(np.cumsum(np.sort(generator.random(3)))), 1.0)
        for i in range(3)
    }
    levels = {i: dict(zip(shares, (0, *c.loss), strict=True)) for i, c in curves.items()}
    for pieces in range(10):  # whole pieces, of 0.25 each
        found = allocate(curves, 0.25 * pieces)
        ours = sum(levels[i][round(d, 2)] for i, d in found.items())
        best = min(
            sum(levels[i][d] for i, d in enumerate(choice))
            for choice in itertools.product(shares, repeat=3)
            if sum(choice) == pytest.approx(3 - 0.25 * pieces)
        )
        assert ours == pytest.approx(best)


def test_the_hull_of_a_loss_that_seems_to_fall():
    """By hand: noise alone takes losses down, and below 0; they stay where they were."""
    noisy = LossCurve((0.4, 0.8, 0.2, 0.6), (0.1, 0.5, 1.0, 0.2), 1.0)
    assert noisy.hull() == [(1.0, 0.0), (0.4, 0.5), (0.2, 1.0)]
    below = LossCurve((0.75, 0.5, 0.25), (-0.3, 0.2, 0.1), 1.0)
    assert below.hull() == [(1.0, 0.0), (0.75, 0.0), (0.25, 0.2)]


def test_nothing_saved_and_too_much():
    curves = {"x": quadratic(1, 2)}
    assert allocate(curves, 0) == {"x": 1.0}
    assert allocate(curves, 2.0)["x"] == pytest.approx(0)
    with pytest.raises(ValueError, match=r"2\.1 cannot be saved, at most 2"):
        allocate(curves, 2.1)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_tau_at(target):
    assert tau_at(lambda tau: 1 - tau**2, target) == pytest.approx((1 - target) ** 0.5)
