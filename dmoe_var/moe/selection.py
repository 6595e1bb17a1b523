"""Selection rules: which experts run on a token, from one score an expert.

Every rule is a pure function scores (..., E) -> bool mask (..., E). Scores are predicted output
norms, or true ones for a rule with `true_norms`. Legend: E experts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from dmoe_var import generators, values
from dmoe_var.config_fields import STRICT, Several, Share, Taus
from dmoe_var.errors import InputError
from dmoe_var.moe.experts import native
from dmoe_var.ops import widest_float
from dmoe_var.sampling_time import this_sampling


@dataclass(frozen=True)
class SelectionRule:
    """Base of all rules."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    true_norms: ClassVar[bool] = False
    """The rule reads the experts' true norms; the pass that computes them is not counted."""
    uses_scores: ClassVar[bool] = True
    """The rule reads scores, so that a router has to run."""

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def at(self, layer: int) -> SelectionRule:
        """The rule of one layer; most rules are the same in all."""
        return self

    def check(self, depth: int, num_experts: int) -> None:
        """ValueError where a model of `depth` layers of so many experts cannot run the rule."""

    def _set(self, name: str, value: object) -> None:
        """A field as `values` has it."""
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Threshold(SelectionRule):
    """Eq. 3: expert e runs iff score_e >= tau * max_j score_j. tau = 0 runs all experts."""

    tau: float

    def __post_init__(self) -> None:
        self._set("tau", values.number("tau", self.tau, 0, 1))

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.tau == 0:
            return torch.ones_like(scores, dtype=torch.bool)
        if scores.numel() and native.knows(scores):
            mask = native.threshold(scores, self.tau)
            return check_finite(scores) if mask is None else mask
        scores = check_finite(scores)
        return scores >= self.tau * scores.amax(-1, keepdim=True)


@dataclass(frozen=True)
class LayerThreshold(SelectionRule):
    """Eq. 3 with a tau for each layer."""

    taus: tuple[float, ...]

    def __post_init__(self) -> None:
        taus = tuple(values.numbers("taus", self.taus, 0, 1))
        if not taus:
            raise ValueError("taus=() must be a tau within [0, 1] for each layer")
        self._set("taus", taus)

    def at(self, layer: int) -> SelectionRule:
        return Threshold(self.taus[layer])

    def check(self, depth: int, num_experts: int) -> None:
        if len(self.taus) != depth:
            more = "more" if depth > len(self.taus) else "fewer"
            raise ValueError(
                f"taus={values.shown(self.taus)}: {len(self.taus)} layers, the model has {more} "
                f"({depth})"
            )

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        raise TypeError("a rule by layer selects through at(layer)")


@dataclass(frozen=True)
class Oracle(Threshold):
    """Eq. 3 on the true norms: an upper bound for any router."""

    true_norms: ClassVar[bool] = True


@dataclass(frozen=True)
class _Counted(SelectionRule):
    """Rules that run k experts."""

    k: int

    def __post_init__(self) -> None:
        self._set("k", values.whole("k", self.k, 1, 2**31))

    def check(self, depth: int, num_experts: int) -> None:
        if self.k > num_experts:
            raise ValueError(f"k={self.k} is more than the {num_experts} experts")

    def _mask(self, ranks: Tensor) -> Tensor:
        """Of exactly k experts a token; ties go to torch.topk's order."""
        self.check(0, ranks.shape[-1])
        chosen = ranks.topk(self.k, dim=-1).indices
        return torch.zeros_like(ranks, dtype=torch.bool).scatter(-1, chosen, True)


@dataclass(frozen=True)
class TopK(_Counted):
    """The k experts of the largest scores."""

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        scores = check_finite(scores)
        return self._mask(scores)


@dataclass(frozen=True)
class Cumulative(SelectionRule):
    """The smallest set of experts whose scores sum to at least `share` of the total.

    At least one expert runs, also where the share is 0 or all scores are.
    """

    share: float

    def __post_init__(self) -> None:
        self._set("share", values.number("share", self.share, 0, 1))

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        scores = check_finite(scores)
        ordered, order = scores.to(widest_float(scores.device)).sort(-1, descending=True)
        reached = ordered.cumsum(-1)
        # Shifted, not reached - ordered: that would round, and share = 1 keep or drop too much.
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], dim=-1)
        needed = before < self.share * reached[..., -1:]
        needed[..., 0] = True
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, needed)


@dataclass(frozen=True)
class Random(_Counted):
    """k experts by chance, whatever the scores: the baseline that any router has to beat.

    `noise` (..., E): uniform draws to rank by, where a sampler gives every image its own stream;
    without it the draws come from `seed`.
    """

    seed: int = 0
    uses_scores: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("seed", values.whole("seed", self.seed))

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            generator = generators.seeded(scores.device, self.seed)
            noise = torch.rand(scores.shape, generator=generator, device=scores.device)
        return self._mask(noise)


@dataclass(frozen=True)
class All(SelectionRule):
    """Every expert on every token: the unsplit FFN."""

    uses_scores: ClassVar[bool] = False

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.ones_like(scores, dtype=torch.bool)


Selection = SelectionRule | Sequence[SelectionRule] | None
"""One rule for all scales with experts, a list of rules (see `resolve_rules`), or none."""

RULES: dict[str, type[SelectionRule]] = {
    "threshold": Threshold,
    "layer_threshold": LayerThreshold,
    "oracle": Oracle,
    "top_k": TopK,
    "random": Random,
    "cumulative": Cumulative,
    "all": All,
}
"""The rules by the names that configurations and stored models have for them."""


def selection_to_json(selection: Selection) -> Any:
    """Rules as plain values: {"rule": name, ...}, a list of such, or None.

    ValueError for a rule that is none of `RULES`.
    """
    if selection is None:
        return None
    if isinstance(selection, Sequence):
        return [selection_to_json(rule) for rule in selection]
    name = next((name for name, rule in RULES.items() if type(selection) is rule), None)
    if name is None:
        raise ValueError(f"selection={selection!r}: its rule is none of {', '.join(RULES)}")
    return {"rule": name, **asdict(selection)}  # type: ignore[call-overload]


def selection_from_json(content: Any) -> Selection:
    """The rules that `selection_to_json` wrote; ValueError, in one line, for anything else."""
    if content is None:
        return None
    if isinstance(content, list):
        return [_rule_from_json(item) for item in content]
    return _rule_from_json(content)


def _rule_from_json(content: Any) -> SelectionRule:
    name = content.get("rule") if isinstance(content, dict) else content
    if not isinstance(content, dict) or not isinstance(name, str) or name not in RULES:
        raise ValueError(f"selection.rule={name!r} is none of {', '.join(RULES)}")
    fields = {key: value for key, value in content.items() if key != "rule"}
    try:
        # From JSON text, where strict still takes an object for a dataclass.
        rule: SelectionRule = TypeAdapter(RULES[name]).validate_json(
            json.dumps(fields), strict=True
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("selection", *first["loc"]))
        raise ValueError(f"{where} of rule {name}: {first['msg']}") from error
    return rule


NOT_FINITE = "an expert's score is not finite: the router or its input has overflowed"


def check_finite(scores: Tensor) -> Tensor:
    """The scores; InputError where NaN or infinity among them would decide what runs.

    While a GPU draws images it is raised at the end: to ask it at every layer is to wait for it.
    """
    # torch.compile knows no values: it takes the whole check as one operator.
    return _finite(scores.detach()) if torch.compiler.is_compiling() else _checked(scores)


def _checked(scores: Tensor) -> Tensor:
    finite, sampling = scores.isfinite().all(), this_sampling()
    if sampling is not None and scores.device.type != "cpu":
        sampling.check_at_end(finite, NOT_FINITE)
    elif not bool(finite):
        raise InputError(NOT_FINITE)
    return scores


@torch.library.custom_op("dmoe_var::finite", mutates_args=(), schema="(Tensor scores) -> Tensor")
def _finite(scores: Tensor) -> Tensor:
    return _checked(scores).clone()


@_finite.register_fake
def _(scores: Tensor) -> Tensor:
    return torch.empty_like(scores)


def _listed(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


@dataclass(frozen=True)
class SelectionConfig:
    """A selection rule: threshold and oracle read `tau` (one, one a sparse scale, or one a
    scale), top_k and random read `k`, cumulative reads `share`."""

    __pydantic_config__ = STRICT

    rule: Literal["threshold", "oracle", "top_k", "random", "cumulative", "all"] = "threshold"
    tau: Taus = (0.2,)
    k: Annotated[int, Field(gt=0)] = 8
    share: Share = 0.9
    layer_tau: tuple[Annotated[tuple[Share, ...], Several], ...] = ()
    """For threshold, in the place of `tau`: by sparse scale, a tau for each layer."""

    def __post_init__(self) -> None:
        if self.layer_tau and self.rule != "threshold":
            given = [list(taus) for taus in self.layer_tau]
            raise ValueError(f"layer_tau={given} goes with rule=threshold, but rule={self.rule}")

    def rules(self) -> SelectionRule | list[SelectionRule]:
        """What `generate(selection=...)` takes."""
        if self.rule == "threshold" and self.layer_tau:
            return [LayerThreshold(taus) for taus in self.layer_tau]
        if self.rule in ("threshold", "oracle"):
            rule = Threshold if self.rule == "threshold" else Oracle
            rules: list[SelectionRule] = [rule(tau) for tau in self.tau]
            return rules if len(rules) > 1 else rules[0]
        others = {
            "top_k": TopK(self.k),
            "random": Random(self.k),
            "cumulative": Cumulative(self.share),
            "all": All(),
        }
        return others[self.rule]

    @property
    def text(self) -> str:
        """In a few words: "threshold 0.2,0.3"; of a tau for each layer, scales behind ";"."""
        values: dict[str, Any] = {
            "top_k": self.k,
            "random": self.k,
            "cumulative": self.share,
            "all": "",
        }
        if self.rule == "threshold" and self.layer_tau:
            return f"threshold by layer {'; '.join(map(_listed, self.layer_tau))}"
        return f"{self.rule} {values.get(self.rule, _listed(self.tau))}".rstrip()


@dataclass(frozen=True)
class RandomDensity(SelectionRule):
    """Experts by chance, `mean` of them a token: each token has the whole number below or above.

    Over N tokens the mean is met to 1/N. The router runs, as it does for the rule whose density
    this is; its scores are not looked at. Masks are drawn once a shape, so that it is not drawing
    that is timed, and are the same in each layer.
    """

    mean: float

    def __post_init__(self) -> None:
        self._set("mean", values.number("mean", self.mean, 0, 2**31))

    def __call__(self, scores: Tensor, noise: Tensor | None = None) -> Tensor:
        num_experts = scores.shape[-1]
        num_tokens = scores.numel() // num_experts
        return random_mask(self.mean, num_tokens, num_experts, scores.device).view(scores.shape)


@lru_cache(maxsize=64)
def random_mask(mean: float, num_tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """(N, E): as in `RandomDensity`, drawn once."""
    generator = torch.Generator().manual_seed(0)
    ranks_NE = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1).argsort(-1)
    reached = (torch.arange(num_tokens + 1, dtype=torch.float64) * mean).round()
    return (ranks_NE < reached.diff()[:, None]).to(device)
