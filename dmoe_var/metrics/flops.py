"""Count the sampler's FLOPs from what ran: counted experts x their cost, plus traced fixed parts.

Unit: MAC, one multiply-add. The products of matrices, convolutions and attention are made of them;
nothing else counts (`flops_ops`). Every number is for one image: both guidance branches if cfg is
not 0. Legend: B images of a batch, N images, R rows (branches x images), l tokens of a scale, E
experts.

A second figure follows the accounting of one of the authors' counters: for a token on which a of E
experts ran it charges a / (1 + 0.1 log10(E - a + 1)) of them. Here that is done per token and
layer, and all else is as counted. It is no number of FLOPs, but what a published axis may show. If
every expert runs, both are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from dmoe_var import values
from dmoe_var.metrics.flops_fixed import OTHER, FixedCost, fixed_cost
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.counts import ExpertCounts, ExpertHistogram, other_scales
from dmoe_var.moe.observer import Observer, joined
from dmoe_var.moe.selection import All, SelectionRule
from dmoe_var.sampling.sampler import Call, Labels, generate

SAMPLER_PARTS = ("qkv_proj", "attention", "ffn", "experts", "router", "head", "adaln")
"""Parts that make up the total. `ffn`: dense FFNs; `experts`: FFNs that are split into experts, and
the means that stand for those that do not run."""
GIGA = 1e9
BINS = 20


@dataclass(frozen=True)
class FlopReport:
    """FLOPs per image: means over `num_images` images, and how far images differ.

    Totals leave the decoder and `other` out; one MAC is two FLOPs. Standard deviations are over
    the images as a population (divisor N). They come from the experts: all else is equal for all.
    """

    fixed: FixedCost
    ran: ExpertHistogram
    """Experts that ran, by scale with a selection rule; without rules all of `fixed` ran."""
    score_macs: Mapping[int, int]
    """MACs of the router, or of what a rule has in its place, by scale at which a rule selected."""
    skipped_macs: Mapping[int, int] = field(default_factory=dict)
    """MACs of adding means of skipped experts, by scale at which they are added."""

    @property
    def num_images(self) -> int:
        return self.ran.num_images

    @cached_property
    def pairs(self) -> dict[int, tuple[int, ...]]:
        """Number of (token, expert) pairs that ran, by scale with experts and by image."""
        if self.ran.scales:
            return self.ran.pairs
        experts = self.fixed.experts
        return {si: (cost.num_pairs,) * self.num_images for si, cost in experts.items()}

    @cached_property
    def charged(self) -> Mapping[int, tuple[float, ...]]:
        """As `pairs`, by the authors' accounting: the same if every expert ran."""
        return self.ran.charged if self.ran.scales else self.pairs

    @property
    def by_part_and_scale_gmac(self) -> dict[str, tuple[float, ...]]:
        """Mean GMAC of every part but the decoder, by scale."""
        scales, pairs = range(self.fixed.num_scales), self.pairs
        experts = {si: fmean(self._expert_macs(si, pairs[si])) for si in pairs}
        macs: dict[str, Sequence[float]] = {
            **self.fixed.macs,
            "experts": [experts.get(si, 0) for si in scales],
            "router": [self.score_macs.get(si, 0) for si in scales],
        }
        return {part: tuple(m / GIGA for m in macs[part]) for part in (*SAMPLER_PARTS, OTHER)}

    @property
    def by_part_gmac(self) -> dict[str, float]:
        """Mean GMAC by part, `other` and `decoder` included."""
        sums = {part: sum(by_scale) for part, by_scale in self.by_part_and_scale_gmac.items()}
        return {**sums, "decoder": self.decoder_gmac}

    @property
    def by_scale_gmac(self) -> tuple[float, ...]:
        """Mean GMAC by scale; they sum to the total."""
        parts = self.by_part_and_scale_gmac
        return tuple(
            sum(parts[part][si] for part in SAMPLER_PARTS) for si in range(self.fixed.num_scales)
        )

    @property
    def experts_gmac_per_image(self) -> tuple[float, ...]:
        """GMAC of the experts that ran, (N,); without experts ()."""
        return self._expert_gmac_per_image(self.pairs)

    @property
    def gmac_per_image(self) -> tuple[float, ...]:
        """Total GMAC, (N,)."""
        rest = sum(self.by_part_gmac[part] for part in SAMPLER_PARTS if part != "experts")
        experts = self.experts_gmac_per_image or (0.0,) * self.num_images
        return tuple(rest + gmac for gmac in experts)

    def histogram(self, bins: int = BINS) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Return edges (bins + 1,) in GMAC, evenly from the least total to the largest, and images
        per bin, (bins,). If all images cost the same there is one bin, without width."""
        gmac_N = self.gmac_per_image
        if min(gmac_N) == max(gmac_N):
            return (gmac_N[0], gmac_N[0]), (len(gmac_N),)
        counts, edges = np.histogram(gmac_N, bins)
        return tuple(edges.tolist()), tuple(counts.tolist())

    @property
    def total_gmac(self) -> float:
        """Mean GMAC."""
        return sum(self.by_scale_gmac)

    @property
    def authors_gmac(self) -> float:
        """Mean total by the authors' accounting (see the file's top)."""
        charged = self._expert_gmac_per_image(self.charged)
        return self.total_gmac - self.by_part_gmac["experts"] + (fmean(charged) if charged else 0)

    @property
    def decoder_gmac(self) -> float:
        """The VQ-VAE decoder's GMAC, which no total has."""
        return self.fixed.decoder_macs / GIGA

    @property
    def total_gmac_std(self) -> float:
        """Standard deviation over images, GMAC."""
        return pstdev(self.experts_gmac_per_image) if self.pairs else 0.0

    @property
    def total_gflop(self) -> float:
        """Mean GFLOP: two FLOPs per MAC."""
        return 2 * self.total_gmac

    @property
    def expert_share(self) -> dict[int, float]:
        """Density by scale with experts: the share in [0, 1] of (token, expert) pairs that ran."""
        return {si: fmean(self.pairs[si]) / self.fixed.experts[si].num_pairs for si in self.pairs}

    def metrics(self) -> dict[str, float]:
        """Return numbers by flat name for a record, the unit in the name; scales count from 0."""
        totals = {
            "flops_gmac": self.total_gmac,
            "flops_gmac_std": self.total_gmac_std,
            "flops_gmac_min": min(self.gmac_per_image),
            "flops_gmac_max": max(self.gmac_per_image),
            "flops_gflop": self.total_gflop,
            "flops_with_decoder_gmac": self.total_gmac + self.decoder_gmac,
            "flops_gmac_authors": self.authors_gmac,
        }
        parts = {f"flops_{part}_gmac": gmac for part, gmac in self.by_part_gmac.items()}
        scales = {f"flops_scale{si}_gmac": gmac for si, gmac in enumerate(self.by_scale_gmac)}
        shares = {f"experts_share_scale{si}": share for si, share in self.expert_share.items()}
        return {**totals, **parts, **scales, **shares}

    def _expert_gmac_per_image(self, pairs: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
        macs = [self._expert_macs(si, pairs[si]) for si in pairs]
        return tuple(sum(image) / GIGA for image in zip(*macs, strict=True))

    def _expert_macs(self, si: int, pairs: Sequence[float]) -> list[float]:
        """Count the MACs of the experts at a scale, for each image's pairs."""
        cost, added = self.fixed.experts[si].pair_macs, self.skipped_macs.get(si, 0)
        return [n * cost + added for n in pairs]


def count_flops(
    model: AnyVAR,
    vqvae: VQVAE,
    labels: Labels,
    batch_size: int = 64,
    observer: Observer | None = None,
    **generate_options: Any,
) -> FlopReport:
    """Count the FLOPs of sampling labels with these options of `generate` (cfg, seed, tau, ...).

    If a selection rule is given, or the model has its own, the images are sampled, `batch_size` at
    a time, and the experts that ran are counted. Without one every expert runs, no router does, and
    nothing has to be sampled. An oracle's pass over the true norms is left out, as in the paper.
    Raise what `generate` raises, and UnknownOperatorError for an operator of unknown cost.
    """
    batch_size = values.whole("batch_size", batch_size, 1)
    call = Call.of(model, vqvae, labels, observer=observer, **generate_options)
    labels_N, rules, first = call.labels_B, call.rules, call.start_index
    fixed = fixed_cost(model, vqvae, call.cfg_S, call.more_smooth, **call.plan_options)

    def ran() -> Iterator[ExpertHistogram]:
        for start in range(0, len(labels_N), batch_size):
            counts, batch_B = ExpertCounts(), labels_N[start : start + batch_size]
            options = {**generate_options, "start_index": first + start}
            generate(model, vqvae, batch_B, observer=joined(counts, observer), **options)
            yield ExpertHistogram.of(counts, rules, len(batch_B))

    everything = ExpertHistogram.none(len(labels_N))
    return report(fixed, ExpertHistogram.joined(ran()) if rules else everything, rules)


def report(
    fixed: FixedCost, ran: ExpertHistogram, rules: Mapping[int, SelectionRule]
) -> FlopReport:
    """Make the report of images that `generate` has sampled.

    ran: of those images. rules: those of the run, by scale, from `resolve_rules`. Raise ValueError
    if what ran is not of these rules or of this `fixed`.
    """
    if list(ran.scales) != sorted(rules):
        raise ValueError(other_scales(ran.scales, rules))
    tokens_NS = ran.times_NSK.sum(-1)
    for i, si in enumerate(ran.scales):
        cost = fixed.experts.get(si)
        if cost is None or (tokens_NS[:, i] * ran.num_experts != cost.num_pairs).any():
            raise ValueError(
                f"the counts of scale {si} are not those of this model at "
                f"{fixed.branches[si]} rows an image"
            )
    scores = {si: fixed.experts[si].score_macs(rule) for si, rule in rules.items()}
    adding = [si for si, rule in rules.items() if not isinstance(rule, All)]
    return FlopReport(fixed, ran, scores, {si: fixed.experts[si].skipped_macs for si in adding})
