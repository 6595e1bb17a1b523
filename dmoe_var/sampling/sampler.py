"""The sampler: it samples images scale by scale, with guidance, by a dense, expert or dynamic VAR.

Legend: B images, R rows of the transformer's batch (2B with guidance: [cond; null]), l tokens of
a scale, C width, V vocabulary, Cvae latent channels. In shapes of images R is their side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import Signature, signature
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from dmoe_var import values
from dmoe_var.errors import ConfigError
from dmoe_var.models import guidance
from dmoe_var.models.collaborative_var import AnyVAR
from dmoe_var.models.dynamic_var import rules_of
from dmoe_var.models.guidance import Cfg
from dmoe_var.models.head_skipping import HeadSkipping
from dmoe_var.models.int8 import Int8
from dmoe_var.models.pair import check_pair
from dmoe_var.models.plan import Passes, PlanOptions, Step
from dmoe_var.models.recipe import Recipe
from dmoe_var.models.token_skipping import TokenSkipping
from dmoe_var.models.var import Labels, VARConfig, check_labels
from dmoe_var.models.vqvae import VQVAE, VQVAEConfig
from dmoe_var.moe.experts import check_impl
from dmoe_var.moe.experts.paths import path
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import All, Selection, SelectionRule
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.moe.tau_schedule import Tau
from dmoe_var.sampling.cuda_graphs import CudaGraphs, Predict
from dmoe_var.sampling.memory import keep_freed_memory
from dmoe_var.sampling.token_sampling import (
    ImageStreams,
    Temperature,
    by_scale,
    draw_tokens,
    filter_logits,
    soft_mix,
)
from dmoe_var.sampling_time import sampling, this_sampling

T = TypeVar("T")

MAX_INDEX = 2**63 - 1  # of int64


@dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled; the defaults are the published ones."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    cfg: Cfg = 1.5
    """Strength of guidance, which rises from 0 at the first scale to cfg at the last. One value, or
    one per scale on that rise; zeros at the end stop the unconditional half."""
    top_k: Annotated[int, Field(ge=0)] = 900
    """Tokens are drawn from the k likeliest; 0 takes all."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.96
    """Tokens are drawn from the likeliest that together have this probability; 0 takes all."""
    temperature: Temperature = None
    """Divides the guided logits: one value, or one per scale; null leaves them. A little less than
    1 where experts run takes back what they blur (beyond the paper)."""
    more_smooth: bool = False
    """Whether codes are mixed by Gumbel softmax: for pictures, never for FID."""
    share_mask: bool = False
    """Whether both halves of guidance run the conditional half's experts, and skip its tokens
    (beyond the paper)."""
    batch_size: Annotated[int, Field(gt=0)] = 128
    """Images sampled at once; it changes an image only by rounding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the models that sample."""
    int8: Int8 = "none"
    """Linear layers in 8 bits (beyond the paper; needs torchao): dynamic (weights and activations,
    for CPUs), weights (alone, for GPUs) or none."""
    cuda_graphs: bool = False
    """Whether an NVIDIA GPU keeps the transformer's work as CUDA graphs, from the second batch on:
    faster for small batches, at the cost of memory. Images are the same."""
    skipping: TokenSkipping = field(default_factory=TokenSkipping)
    heads: HeadSkipping = field(default_factory=HeadSkipping)

    def __post_init__(self) -> None:
        values.take_fields(self)

    def new_graphs(self, device: torch.device) -> CudaGraphs | None:
        """Make what keeps graphs from call to call; None without `cuda_graphs`. Raise ConfigError
        on another device than an NVIDIA GPU."""
        if self.cuda_graphs and device.type != "cuda":
            raise ConfigError(
                f"sampling.cuda_graphs=true: needs an NVIDIA GPU, device={device}; allowed: false"
            )
        return CudaGraphs() if self.cuda_graphs else None

    @property
    def options(self) -> dict[str, Any]:
        """The fields that are arguments of `generate`."""
        names = ("top_k", "top_p", "temperature", "more_smooth")
        own = {name: getattr(self, name) for name in names}
        return own | self.recipe.options

    @property
    def recipe(self) -> Recipe:
        """The fields that a model's own recipe has too."""
        return Recipe(self.cfg, self.share_mask, self.skipping, self.heads)

    @property
    def counted(self) -> dict[str, Any]:
        """The fields that are arguments of `metrics.flops_fixed.fixed_cost`."""
        return self.recipe.options

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Call(NamedTuple):
    """Holds the arguments of `generate`, checked, as plain Python."""

    labels_B: Tensor
    rules: dict[int, SelectionRule]
    cfg_S: tuple[float, ...]
    top_k: int
    top_p: float
    temperature_S: tuple[float, ...] | None
    seed: int
    start_index: int
    more_smooth: bool
    share_mask: bool
    adaln_every_scale: bool
    skipping: TokenSkipping
    heads: HeadSkipping

    @property
    def plan_options(self) -> PlanOptions:
        return {
            "adaln_every_scale": self.adaln_every_scale,
            "share_mask": self.share_mask,
            "skipping": self.skipping,
            "heads": self.heads,
        }

    def recordable(self, impl: str) -> bool:
        """Say whether a CUDA graph can hold the transformer's work. It cannot where random numbers
        are drawn, heads are measured anew for each call, the host waits, or autocast keeps weights
        that it has cast."""
        draws = any(not (rule.uses_scores or isinstance(rule, All)) for rule in self.rules.values())
        waits = path(impl).waits
        return not (draws or waits or self.heads.scales or torch.is_autocast_enabled("cuda"))

    def kind(self, impl: str) -> Hashable:
        """Say what the transformer's operators depend on, beside the model and its batch."""
        rules, branches = tuple(self.rules.items()), guidance.branches(self.cfg_S)
        return (impl, rules, branches, *self.plan_options.values())

    @classmethod
    def of(cls, *args: Any, **named: Any) -> Call:
        """Check arguments of `generate`; raise ValueError for the first one that is wrong."""
        bound = _signature().bind(*args, **named)
        bound.apply_defaults()
        given = SimpleNamespace(**bound.arguments)
        device = _check_models(given.model, given.vqvae)
        check_impl(given.impl)
        _check_generator(given.generator, device)
        if given.observer is not None and not isinstance(given.observer, Observer):
            raise ValueError(f"observer={values.shown(given.observer)} must be an Observer or None")
        rules = rules_of(given.model, given.tau, given.selection)
        config = given.model.config
        skipping = _of_kind(TokenSkipping, "skipping", given.skipping)
        skipping.check(config.num_scales, config.depth)
        skipping.check_routers(rules)
        heads = _of_kind(HeadSkipping, "heads", given.heads)
        heads.check(config.num_scales)
        _check_graphs(given.graphs, device)
        return cls(
            check_labels(given.labels, config.num_classes, device),
            rules,
            guidance.by_scale(given.cfg, config.num_scales),
            values.whole("top_k", given.top_k, 0),
            values.number("top_p", given.top_p, 0, 1),
            by_scale(given.temperature, config.num_scales),
            values.whole("seed", given.seed),
            values.whole("start_index", given.start_index, 0, MAX_INDEX),
            values.flag("more_smooth", given.more_smooth),
            values.flag("share_mask", given.share_mask),
            values.flag("adaln_every_scale", given.adaln_every_scale),
            skipping,
            heads,
        )


def _check_models(model: AnyVAR, vqvae: VQVAE) -> torch.device:
    """Return the device that both models are on; ValueError if they do not belong together."""
    for name, given, kind in (("model", model, VARConfig), ("vqvae", vqvae, VQVAEConfig)):
        if not isinstance(getattr(given, "config", None), kind):
            wanted = "VQVAE" if kind is VQVAEConfig else "VAR or DynamicVAR"
            raise ValueError(f"{name} is a {type(given).__name__}, but must be a {wanted}")
    check_pair(vqvae, model.config)
    device, other = config_device(model), config_device(vqvae)
    if device != other:
        raise ValueError(f"the model is on {device}, but the VQ-VAE is on {other}")
    return device


def _of_kind(kind: type[T], name: str, given: Any) -> T:
    """Return an argument of this type, made without fields if None is given."""
    found = kind() if given is None else given
    if not isinstance(found, kind):
        raise ValueError(f"{name}={values.shown(given)} must be a {kind.__name__} or None")
    return found


def _check_generator(generator: Any, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator={values.shown(generator)} must be a torch.Generator or None")
    if generator.device.type != device.type or (generator.device.index or 0) != (device.index or 0):
        raise ValueError(f"generator is of {generator.device}, but the model is on {device}")


def _check_graphs(graphs: Any, device: torch.device) -> None:
    if graphs is None:
        return
    if not isinstance(graphs, CudaGraphs):
        raise ValueError(f"graphs={values.shown(graphs)} must be CudaGraphs or None")
    if device.type != "cuda":
        raise ValueError(f"graphs need an NVIDIA GPU, but the model is on {device}")


class _Transformer:
    """Runs the steps of a plan for the classes of its rows, those of the conditional branch first.

    routing_noise, watching and in_layers are the sampler's.
    """

    def __init__(
        self,
        call: Call,
        means: SkippedMeans | None,
        impl: str,
        routing_noise: Callable[..., Tensor],
        labels_R: Tensor,
        in_layers: Observer | None,
        watching: Observer,
    ):
        self._call, self._means, self._impl, self._noise = call, means, impl, routing_noise
        self._labels_R, self._in_layers, self._watching = labels_R, in_layers, watching
        self._passes = Passes(labels_R, len(call.labels_B))

    def __call__(self, step: Step, inputs: Mapping[int, Tensor]) -> Tensor:
        self._watching.on_part("embedding", step.si)
        self._passes.begin(step)
        x_RlC = self._passes.embed(step, inputs)
        routing = self._routing(step)
        self._watching.on_part("transformer", step.si)
        return self._passes.run(step, x_RlC, routing)

    def _routing(self, step: Step) -> Routing | None:
        rule = step.rule(self._call.rules)
        if rule is None:
            return None
        sharing = step.branches if self._call.share_mask else 1
        return Routing(
            rule,
            step.si,
            self._impl,
            self._in_layers,
            noise=partial(self._noise, branches=step.branches // sharing),
            sharing=sharing,
            labels_B=self._labels_R[: step.branches * len(self._call.labels_B)],
            means_KEC=None if self._means is None else self._means.at(step.si),
        )


@sampling()
def generate(
    model: AnyVAR,
    vqvae: VQVAE,
    labels: Labels,
    cfg: float | Sequence[float] = 1.5,
    top_k: int = 900,
    top_p: float = 0.96,
    seed: int = 0,
    tau: Tau = None,
    selection: Selection = None,
    generator: torch.Generator | None = None,
    start_index: int = 0,
    more_smooth: bool = False,
    share_mask: bool = False,
    impl: str = "auto",
    adaln_every_scale: bool = False,
    observer: Observer | None = None,
    skipping: TokenSkipping | None = None,
    heads: HeadSkipping | None = None,
    graphs: CudaGraphs | None = None,
    temperature: float | Sequence[float] | None = None,
) -> Tensor:
    """Sample images (B, 3, R, R) in [0, 1] of the given classes.

    Every image has its own random stream, a hash of `seed` and of `start_index` plus its place in
    the batch. So batch size and sharding change an image only by rounding. With `generator` all
    tokens are drawn from that one generator, in the published order.

    tau, selection: see `resolve_rules`. Without both the model's own `selection` runs, and without
    that every expert. impl: the compute path, see `moe.experts.run_experts`. cfg, top_k, top_p,
    temperature, more_smooth, share_mask: see `SamplingConfig`. skipping: which tokens of late
    scales skip the blocks; None is none. heads: how many attention heads the tokens of late scales
    leave out; None is none. adaln_every_scale: compute AdaLN's projections at each scale, as the
    published sampler does, instead of once per image. observer: is shown f_hat and which experts
    run, see `moe.observer`, whose `joined` joins several. Images, and what an observer sees, are
    plain tensors without a gradient. graphs: keeps the transformer's work on a GPU as CUDA graphs
    from call to call, see `CudaGraphs`. What no graph can hold runs as without: rules that select
    by chance, fewer heads, impl=grouped, autocast.

    Numbers may be of any type of numpy and torch. Raises ValueError before any work if an argument
    has no meaning, and at the end if logits were not finite.
    """
    call = Call.of(
        model, vqvae, labels, cfg, top_k, top_p, seed, tau, selection, generator, start_index,
        more_smooth, share_mask, impl, adaln_every_scale, observer, skipping, heads, graphs,
        temperature,
    )  # fmt: skip
    config, labels_B = model.config, call.labels_B
    branches_S = guidance.branches(call.cfg_S)
    strengths_S = guidance.strengths(call.cfg_S, config.num_scales)
    null_B = torch.full_like(labels_B, config.num_classes)
    labels_R = torch.cat([labels_B, null_B][: branches_S[0]])

    # Random streams, observers
    device = labels_B.device
    if device.type == "cpu":
        keep_freed_memory()
    streams = ImageStreams(call.seed, call.start_index, len(labels_B), device, generator)
    watching = Observer() if observer is None else observer
    in_layers = None if observer is None else observer.in_layers()
    plan = model.plan(branches_S, **call.plan_options)
    transformer = partial(_Transformer, call, model.skipped, impl, streams.routing_noise)
    if graphs is not None and not call.recordable(impl):
        graphs = None
    if graphs is None:
        predict: Predict = transformer(labels_R, in_layers, watching)
    else:
        build = partial(transformer, watching=Observer())
        predict = graphs.start(call.kind(impl), model, labels_R, in_layers, build)
    # Scale by scale
    f_hat_BCHW = torch.zeros((), device=device)
    inputs: dict[int, Tensor] = {}  # by scale, (B, l, Cvae)
    for i, step in enumerate(plan):
        # Predict, guide, draw
        si = step.si
        if graphs is not None:
            watching.on_part("transformer", si)
        logits_RlV = predict(step, inputs)
        if not step.num_predicted:
            continue
        watching.on_part("sampling", si)
        progress = si / plan[-1].si
        logits_BlV = logits_RlV
        if step.branches == 2:
            logits_BlV = guidance.guide(logits_RlV, strengths_S[si])
        if call.temperature_S is not None:
            logits_BlV = logits_BlV / call.temperature_S[si]
        _check_finite(logits_BlV, si)
        logits_BlV = filter_logits(logits_BlV, call.top_k, call.top_p)
        codes_BCpp = _draw_codes(logits_BlV, vqvae, si, progress, streams, call.more_smooth)
        # Add to f_hat
        watching.on_part("quantiser", si)
        f_hat_BCHW = f_hat_BCHW + vqvae.quantize.spread(codes_BCpp, si)
        watching.on_scale(si, f_hat_BCHW)
        if later := plan[i + 1 :]:  # the next input, and those that are read again
            inputs[si + 1] = vqvae.quantize.next_input(f_hat_BCHW, si + 1)
            since = min(each.since for each in later)
            inputs = {scale: given for scale, given in inputs.items() if scale >= since}
    if graphs is not None:
        graphs.finish()
    # Decode the images
    watching.on_part("decoder", None)
    return (vqvae.decode_f_hat(f_hat_BCHW) + 1) / 2


@cache
def _signature() -> Signature:
    """Say what `generate` takes; found once, because it takes as long as a hundredth of a small
    image."""
    return signature(generate)


def _check_finite(logits_BlV: Tensor, si: int) -> None:
    """Raise InputError, at the end of sampling, if a scale's logits are not finite: what is drawn
    from NaN looks like a picture."""
    this = this_sampling()
    assert this is not None
    this.check_at_end(
        logits_BlV.amax(-1).isfinite().all(),
        f"the logits of scale {si} are not finite: the model's weights are not, or its activations "
        "overflow in their dtype",
    )


def _draw_codes(
    logits_BlV: Tensor,
    vqvae: VQVAE,
    si: int,
    progress: float,
    streams: ImageStreams,
    more_smooth: bool,
) -> Tensor:
    """Draw the tokens of one scale; code vectors (B, Cvae, p, p)."""
    tokens_Bl = draw_tokens(logits_BlV, streams)
    if not more_smooth:
        return vqvae.quantize.lookup(tokens_Bl, si)
    # The published sampler draws tokens in this mode too, which advances its generator.
    mix_BlC = soft_mix(logits_BlV, vqvae.quantize.embedding.weight, progress, streams)
    p = vqvae.config.patch_nums[si]
    return mix_BlC.transpose(1, 2).unflatten(2, (p, p))


def config_device(model: torch.nn.Module) -> torch.device:
    """Return the device that a model's parameters are on."""
    return next(model.parameters()).device
