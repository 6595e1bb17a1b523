"""FLOPs of the sampler, from what ran: counted experts x their cost, plus traced fixed parts.

Unit: MAC, one multiply-add, of which the products of matrices, convolutions and attention are
made; nothing else counts (`flops_ops`). Every number is for one image: both guidance branches
where cfg is not 0. Legend: B images of a batch, N images, R rows (branches x images).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from dmoe_var.metrics.flops_fixed import OTHER, FixedCost, fixed_cost
from dmoe_var.models.var import VAR
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.moe.dynamic_var import DynamicVAR
from dmoe_var.moe.layer import ExpertCounts
from dmoe_var.moe.selection import SelectionRule
from dmoe_var.sampling.sampler import check_labels, config_device, generate
from dmoe_var.sampling.tau_schedule import resolve_rules

SAMPLER_PARTS = ("qkv_proj", "attention", "ffn", "experts", "router", "head", "adaln")
"""What the total is made of. `ffn`: dense FFNs; `experts`: FFNs that are split into experts."""
GIGA = 1e9


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of an image: means over `num_images` images, and how far images differ.

    Totals leave the decoder and `other` out; one MAC is two FLOPs. Standard deviations are over
    the images as a population (divisor N): they are the experts', all else is the same for all.
    """

    fixed: FixedCost
    num_images: int
    pairs: Mapping[int, tuple[int, ...]]
    """By scale with experts and by image: (token, expert) pairs that ran."""
    router_scales: tuple[int, ...]
    """Scales at which the routers ran."""

    @property
    def by_part_and_scale_gmac(self) -> dict[str, tuple[float, ...]]:
        """Mean GMAC of every part but the decoder, by scale."""
        scales = range(self.fixed.num_scales)
        experts, routers = self.fixed.experts, self.router_scales
        macs: dict[str, Sequence[float]] = {
            **self.fixed.macs,
            "experts": [self._mean_expert_macs(si) for si in scales],
            "router": [experts[si].router_macs if si in routers else 0 for si in scales],
        }
        return {part: tuple(m / GIGA for m in macs[part]) for part in (*SAMPLER_PARTS, OTHER)}

    @property
    def by_part_gmac(self) -> dict[str, float]:
        """Mean GMAC by part, `other` and `decoder` included."""
        sums = {part: sum(by_scale) for part, by_scale in self.by_part_and_scale_gmac.items()}
        return {**sums, "decoder": self.fixed.decoder_macs / GIGA}

    @property
    def by_scale_gmac(self) -> tuple[float, ...]:
        """Mean GMAC by scale; they sum to the total."""
        parts = self.by_part_and_scale_gmac
        return tuple(
            sum(parts[part][si] for part in SAMPLER_PARTS) for si in range(self.fixed.num_scales)
        )

    @property
    def experts_gmac_per_image(self) -> tuple[float, ...]:
        """GMAC of the experts that ran, (N,)."""
        macs = [
            [pairs * self.fixed.experts[si].pair_macs for pairs in self.pairs[si]]
            for si in self.pairs
        ]
        return tuple(sum(image) / GIGA for image in zip(*macs, strict=True))

    @property
    def total_gmac(self) -> float:
        """Mean GMAC."""
        return sum(self.by_scale_gmac)

    @property
    def total_gmac_std(self) -> float:
        """Standard deviation over images, GMAC."""
        return pstdev(self.experts_gmac_per_image) if self.pairs else 0.0

    @property
    def total_gflop(self) -> float:
        """Mean GFLOP: two a MAC."""
        return 2 * self.total_gmac

    @property
    def expert_share(self) -> dict[int, float]:
        """By scale with experts, the share in [0, 1] of (token, expert) pairs that ran."""
        return {si: fmean(self.pairs[si]) / self.fixed.experts[si].num_pairs for si in self.pairs}

    def metrics(self) -> dict[str, float]:
        """Flat name -> number for a record, the unit in the name; scales count from 0."""
        totals = {
            "flops_gmac": self.total_gmac,
            "flops_gmac_std": self.total_gmac_std,
            "flops_gflop": self.total_gflop,
        }
        parts = {f"flops_{part}_gmac": gmac for part, gmac in self.by_part_gmac.items()}
        scales = {f"flops_scale{si}_gmac": gmac for si, gmac in enumerate(self.by_scale_gmac)}
        shares = {f"experts_share_scale{si}": share for si, share in self.expert_share.items()}
        return {**totals, **parts, **scales, **shares}

    def table(self) -> str:
        """GMAC by scale (rows) and part (columns), and the share of expert work that ran."""
        parts = self.by_part_and_scale_gmac
        rows = [["scale", *SAMPLER_PARTS, "total", OTHER, "experts run"]]
        for si, total in enumerate(self.by_scale_gmac):
            gmacs = [*(parts[part][si] for part in SAMPLER_PARTS), total, parts[OTHER][si]]
            share = f"{self.expert_share[si]:.1%}" if si in self.pairs else "-"
            rows.append([str(si), *(f"{gmac:.4g}" for gmac in gmacs), share])
        sums = [*(sum(parts[part]) for part in SAMPLER_PARTS), self.total_gmac, sum(parts[OTHER])]
        rows.append(["all", *(f"{gmac:.4g}" for gmac in sums), ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        head = (
            f"GMAC an image, mean of {self.num_images}: {self.total_gmac:.5g} "
            f"(standard deviation {self.total_gmac_std:.3g}), {self.total_gflop:.5g} GFLOP; "
            f"not in it: other, and the decoder's {self.by_part_gmac['decoder']:.5g}"
        )
        return "\n".join([head, *(line.rstrip() for line in lines)])

    def _mean_expert_macs(self, si: int) -> float:
        if si not in self.pairs:
            return 0
        return fmean(self.pairs[si]) * self.fixed.experts[si].pair_macs


def count_flops(
    model: VAR | DynamicVAR,
    vqvae: VQVAE,
    labels: Sequence[int] | Tensor,
    batch_size: int = 64,
    **generate_options: Any,
) -> FlopReport:
    """FLOPs of sampling these labels with these options of `generate` (cfg, seed, tau, ...).

    Where a selection rule is given, or the model has its own, the images are sampled, `batch_size`
    at a time, and the experts that ran are counted; without one every expert runs, no router does,
    and nothing has to be sampled. An oracle's pass over the true norms is left out, as in the
    paper. Raises what `generate` raises, and UnknownOperatorError for an operator of unknown cost.
    """
    call = inspect.signature(generate).bind(model, vqvae, labels, **generate_options)
    call.apply_defaults()
    options = call.arguments
    config = model.config
    given = (options["tau"], options["selection"])
    rules = resolve_rules(*given, config.num_scales, model.moe_scales, model.selection)
    labels_N = check_labels(labels, config.num_classes, config_device(model))
    fixed = fixed_cost(
        model, vqvae, options["cfg"] != 0, options["adaln_every_scale"], options["more_smooth"]
    )
    first = generate_options.pop("start_index", options["start_index"])

    def batches() -> Iterator[ExpertCounts]:
        for start in range(0, len(labels_N), batch_size) if rules else ():
            counts, batch_B = ExpertCounts(), labels_N[start : start + batch_size]
            place: dict[str, Any] = {"start_index": first + start, "counts": counts}
            generate(model, vqvae, batch_B, **place, **generate_options)
            yield counts

    pairs = pairs_per_image(batches(), rules, fixed.branches)
    return report(fixed, pairs, rules, len(labels_N))


def report(
    fixed: FixedCost,
    pairs: Mapping[int, Sequence[int]],
    rules: Mapping[int, SelectionRule],
    num_images: int,
) -> FlopReport:
    """The report of images that `generate` has drawn, `num_images` in all.

    pairs: the (token, expert) pairs that ran, by scale and image, from `pairs_per_image`. rules:
    those of the run, by scale, from `resolve_rules`. Raises ValueError where the pairs are not of
    these rules, this many images or this `fixed`.
    """
    if sorted(pairs) != sorted(rules):
        raise ValueError(_other_scales(sorted(pairs), rules))
    counted = {si: tuple(of_scale) for si, of_scale in pairs.items()}
    if not rules:
        counted = {si: (cost.num_pairs,) * num_images for si, cost in fixed.experts.items()}
    for si, pairs_N in counted.items():
        if len(pairs_N) != num_images:
            raise ValueError(
                f"experts were counted for {len(pairs_N)} images of {num_images}, at "
                f"{fixed.branches} rows an image"
            )
        if si not in fixed.experts or max(pairs_N) > fixed.experts[si].num_pairs:
            raise ValueError(f"the counts of scale {si} are not those of this model")
    routers = tuple(si for si, rule in rules.items() if rule.uses_scores and not rule.true_norms)
    return FlopReport(fixed, num_images, counted, routers)


def pairs_per_image(
    batches: Iterable[ExpertCounts], rules: Mapping[int, SelectionRule], branches: int
) -> dict[int, tuple[int, ...]]:
    """(token, expert) pairs that ran, by scale and image: all layers, rows and tokens of it.

    batches: what `generate` counted, one a batch; read one after the other, so that none need be
    kept. branches: rows an image, 2 with guidance and else 1. Raises ValueError where scales were
    counted that have no rule, or the other way round.
    """
    pairs: dict[int, list[int]] = {si: [] for si in rules}
    for counts in batches:
        if counts.scales != sorted(rules):
            raise ValueError(_other_scales(counts.scales, rules))
        for si, of_scale in pairs.items():
            per_row_R = counts.per_token(si).sum((0, 2), dtype=torch.int64)
            of_scale += per_row_R.view(branches, -1).sum(0).tolist()
    return {si: tuple(of_scale) for si, of_scale in pairs.items()}


def _other_scales(counted: Sequence[int], rules: Mapping[int, SelectionRule]) -> str:
    return f"experts were counted at scales {counted}, the rules are for {sorted(rules)}"
