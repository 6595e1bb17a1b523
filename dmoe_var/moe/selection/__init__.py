"""Selection rules, one file per kind: they choose a token's experts from one score per expert.

`SelectionRule.scores` computes the scores: predicted output norms, true ones, or others.
"""

from dmoe_var.moe.selection.base import Selection, SelectionRule, describe
from dmoe_var.moe.selection.by_chance import Random, RandomDensity, random_mask
from dmoe_var.moe.selection.config import SelectionConfig, recorded_selection
from dmoe_var.moe.selection.cumulative import Cumulative
from dmoe_var.moe.selection.everything import All
from dmoe_var.moe.selection.finite import check_finite
from dmoe_var.moe.selection.keys import Keys
from dmoe_var.moe.selection.rules import RULES, selection_from_json, selection_to_json
from dmoe_var.moe.selection.threshold import LayerThreshold, Oracle, Threshold
from dmoe_var.moe.selection.top_k import TopK

__all__ = [
    "RULES",
    "All",
    "Cumulative",
    "Keys",
    "LayerThreshold",
    "Oracle",
    "Random",
    "RandomDensity",
    "Selection",
    "SelectionConfig",
    "SelectionRule",
    "Threshold",
    "TopK",
    "check_finite",
    "describe",
    "random_mask",
    "recorded_selection",
    "selection_from_json",
    "selection_to_json",
]
