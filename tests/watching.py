"""An observer of one function, for tests that watch a single thing."""

from __future__ import annotations

from dmoe_var.moe.observer import Observer


class Scales(Observer):
    """Calls see(si, f_hat_BCHW) after each scale."""

    def __init__(self, see):
        self.on_scale = see
