"""DynamicVAR runs the dense VAR at most scales and the MoE VAR at the others, over one K/V cache.

Scale-awareness (DMoE-VAR, section on scale-aware routing): scales outside `moe_scales` run the
untouched pretrained model, and those inside run the fine-tuned expert model, each with its own
head. Embeddings are the dense model's. Legend: B batch, R rows (branches x B), l tokens of a scale,
L of all, C width, V vocabulary, Cvae latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.models.build import build_strictly
from dmoe_var.models.plan import Passes, PlanOptions, Step, steps
from dmoe_var.models.recipe import Recipe
from dmoe_var.models.var import VAR, Labels, VARConfig
from dmoe_var.moe.experts import check_impl
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Selection, SelectionRule
from dmoe_var.moe.skipped_means import SkippedMeans
from dmoe_var.moe.tau_schedule import Tau, resolve_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack

PAPER_MOE_SCALES = (7, 8, 9)
SHARED_FIELDS = (
    "depth",
    "width",
    "num_heads",
    "num_classes",
    "patch_nums",
    "vocab_size",
    "z_channels",
    "attn_l2_norm",
)
"""Fields that two models need in common to share embeddings, a K/V cache and a tokenizer."""
EMBEDDINGS = ("word_embed.", "class_emb.", "pos_", "lvl_", "attn_bias_for_masking")
"""Prefixes of tensor names; these tensors are always the dense model's."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


class DynamicVAR(nn.Module):
    """Joins a dense VAR and its expert version (or an unsplit ReLU version, for comparison).

    Tensors that both models have are held once. These are the embeddings, which are the dense
    model's, and every tensor of `moe` that equals the dense one of its name bit by bit (because it
    was not fine-tuned). `dense` is held as it is. `moe` becomes a new VAR over the same memory, so
    the given one keeps its own tensors, device and dtype. Conversions (`.to`, `.half`) keep shared
    tensors shared. A shared parameter has the dense model's `requires_grad`: train both models
    before you join them.

    selection: the rule or rules that run if a call gives neither tau nor selection; None runs every
    expert. moe_scales rise. Raises ValueError if models, scales or rules do not fit together.
    """

    skipped: SkippedMeans | None
    """What stands for experts that do not run (`set_skipped`); None: nothing, as in the paper."""
    _selection: Selection = None
    _recipe: Recipe = Recipe()

    def __init__(
        self,
        dense: VAR,
        moe: VAR,
        moe_scales: Sequence[int] = PAPER_MOE_SCALES,
        selection: Selection = None,
    ):
        super().__init__()
        values.instance("dense", dense, VAR)
        values.instance("moe", moe, VAR)
        if dense.config.experts is not None and moe.config.experts is None:
            raise ValueError("dense has experts and moe has none: give them the other way round")
        for name in SHARED_FIELDS:
            theirs, ours = getattr(moe.config, name), getattr(dense.config, name)
            if theirs != ours:
                raise ValueError(f"{name}: the dense model has {ours}, the MoE model has {theirs}")
        scales = tuple(
            values.whole(f"moe_scales={values.shown(moe_scales)}: a scale", si)
            for si in values.items("moe_scales", moe_scales)
        )
        last = dense.config.num_scales - 1
        if not scales or scales[0] < 0 or scales[-1] > last or sorted(set(scales)) != [*scales]:
            raise ValueError(f"moe_scales={scales} must rise, and each must be within 0..{last}")
        self.config: VARConfig = dense.config
        """The dense model's shape; `moe.config` adds the experts'."""
        self.dense = dense
        self.moe = _over_common_tensors(dense, moe)
        self.replaced_scales = scales
        """Scales that the second model runs."""
        self.moe_scales = scales if moe.config.experts else ()
        """Scales at which experts are selected (none if the second model is not split)."""
        self.selection = selection
        self.register_module("skipped", None)

    @property
    def selection(self) -> Selection:
        """What runs if a call gives neither tau nor selection; ValueError if set to what cannot."""
        return self._selection

    @selection.setter
    def selection(self, selection: Selection) -> None:
        rules_of(self, selection=selection)
        self._selection = selection

    @property
    def recipe(self) -> Recipe:
        """How the model is meant to be sampled; ValueError if set to what it cannot do. It is no
        default: `generate(model, vqvae, labels, **model.recipe.options)`."""
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: Recipe) -> None:
        recipe.check(self.config.num_scales, self.config.depth)
        self._recipe = recipe

    def set_skipped(self, means: SkippedMeans | None) -> None:
        """Let means stand for the experts that do not run, on this model's device and in its dtype.
        Raise ValueError if they are not of its scales, layers, experts and width, or not finite."""
        if means is None:
            self.skipped = None
            return
        config, like = self.moe.config, self.moe.pos_start
        if means.scales != self.moe_scales:
            raise ValueError(
                f"skipped: means of scales {means.scales}, experts are at {self.moe_scales}"
            )
        fitting = (config.depth, config.num_experts, config.C)
        for si in means.scales:
            found = means.at(si)
            if tuple(found.shape) != fitting or not found.is_floating_point():
                raise ValueError(
                    f"skipped: means of scale {si} are {tuple(found.shape)}, {found.dtype}; "
                    f"allowed: {fitting} (layers, experts, width), floating"
                )
            if not found.is_meta and not found.isfinite().all():
                raise ValueError(f"skipped: means of scale {si} are not finite")
        ours = {si: means.at(si).to(like.device, like.dtype) for si in means.scales}
        self.skipped = SkippedMeans(ours, means.selection)

    def backbone_at(self, si: int) -> VAR:
        """Return the backbone that runs scale si."""
        return self.moe if si in self.replaced_scales else self.dense

    def plan(
        self, branches: Sequence[int] | None = None, **options: Unpack[PlanOptions]
    ) -> tuple[Step, ...]:
        """See `VAR.plan`; both backbones share the dense model's embeddings and cache. Raise
        ValueError if they are in different dtypes."""
        theirs, ours = (
            each.blocks[0].get_parameter("attn.q_bias").dtype for each in (self.moe, self.dense)
        )
        if theirs != ours:
            raise ValueError(
                f"the dense model is in {ours}, the MoE model in {theirs}; convert both, "
                "with model.float() for example"
            )
        backbones = [self.backbone_at(si) for si in range(self.config.num_scales)]
        return steps(backbones, self.dense, branches, **options)

    @torch.no_grad()
    def forward(
        self,
        labels_B: Labels,
        teacher_BLC: Tensor,
        tau: Tau = None,
        selection: Selection = None,
        impl: str = "auto",
        observer: Observer | None = None,
    ) -> Tensor:
        """Compute teacher-forced logits (B, L, V), scale by scale over the cache as in sampling.

        Without tau and selection the model's own selection runs, and without that every expert.
        teacher_BLC: (B, L - 1, Cvae). observer: sees only the routing, see `moe.observer`. No
        gradients flow, because the cache is written in place (see `forward_with_gradients`).
        """
        return self._forward(labels_B, teacher_BLC, tau, selection, impl, observer, False)

    def forward_with_gradients(
        self,
        labels_B: Labels,
        teacher_BLC: Tensor,
        tau: Tau,
        impl: str,
        observer: Observer | None = None,
    ) -> Tensor:
        """Compute what `forward` does with gradients, which only the impl grouped and reference
        have. Masks have none, and those of router scores stay in the routers."""
        return self._forward(labels_B, teacher_BLC, tau, None, impl, observer, True)

    def _forward(
        self,
        labels_B: Labels,
        teacher_BLC: Tensor,
        tau: Tau,
        selection: Selection,
        impl: str,
        observer: Observer | None,
        gradients: bool,
    ) -> Tensor:
        rules = rules_of(self, tau, selection)
        given = (labels_B, teacher_BLC, rules, impl, observer)
        logits = teacher_forced(self, *given, skipped=self.skipped, gradients=gradients)
        return torch.cat(list(logits), dim=1)

    @property
    def shared_names(self) -> tuple[str, ...]:
        """Names, without "dense." or "moe.", of the tensors that are held once."""
        dense = _tensors(self.dense)
        return tuple(n for n, tensor in _tensors(self.moe).items() if tensor is dense.get(n))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DynamicVAR:
        """Convert, then share again; `.to`, `.half` and `.cuda` call this. torch converts buffers
        one by one, and parameters too if it cannot change them in place."""
        shared = self.shared_names
        super()._apply(fn, recurse)
        self.share(shared)
        return self

    def share(self, names: Iterable[str]) -> None:
        """Let both models hold the dense one's tensors of these names."""
        dense = _tensors(self.dense)
        for name in names:
            _put(self.moe, name, dense[name])

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load as torch does, then share again; ValueError if a tensor that is held once is given
        two values, unless they are assigned."""
        shared = self.shared_names
        differ = [
            name
            for name in shared
            if {f"dense.{name}", f"moe.{name}"} <= state_dict.keys()
            and not _same_bits(state_dict[f"dense.{name}"], state_dict[f"moe.{name}"])
        ]
        if differ and not assign:
            raise ValueError(
                f"{', '.join(differ)}: held once, but given with one value for the dense and "
                "another for the MoE model; join the two models anew"
            )
        result = super().load_state_dict(state_dict, strict, assign)
        dense, moe = _tensors(self.dense), _tensors(self.moe)
        for name in shared:
            if _same_bits(moe[name], dense[name]):
                _put(self.moe, name, dense[name])
        return result

    def save_pretrained(self, folder: str | Path, records: Sequence[Any] = ()) -> None:
        """See `report.model_card.save_pretrained`."""
        from dmoe_var.report import model_card

        model_card.save_pretrained(self, folder, records)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> DynamicVAR:
        """See `checkpoints.pretrained.from_pretrained`."""
        from dmoe_var.checkpoints import pretrained

        return pretrained.from_pretrained(source, revision, cache_dir, local_files_only, token)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Add a DynamicVAR",
        records: Sequence[Any] = (),
    ) -> str:
        """See `report.model_card.push_to_hub`."""
        from dmoe_var.report import model_card

        return model_card.push_to_hub(self, repo_id, private, token, commit_message, records)


def _over_common_tensors(dense: VAR, moe: VAR) -> VAR:
    """Build a VAR like `moe`, in the same modes, over its memory; common tensors are `dense`'s own.
    Nothing is copied, and neither model is changed."""
    theirs, own = _tensors(dense), _tensors(moe)
    common = {
        name: theirs[name]
        for name, tensor in own.items()
        if name.startswith(EMBEDDINGS) or (name in theirs and _same_bits(tensor, theirs[name]))
    }
    # Detached, because load_state_dict sets requires_grad of the parameters that it is given.
    memory = {name: tensor.detach() for name, tensor in {**own, **common}.items()}
    joined = build_strictly(lambda: VAR(moe.config), memory, "the MoE model")
    for name, parameter in joined.named_parameters():
        parameter.requires_grad_(own[name].requires_grad)
    for name, tensor in common.items():
        _put(joined, name, tensor)
    for new, old in zip(joined.modules(), moe.modules(), strict=True):
        new.training = old.training
    return joined


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameter and buffer objects themselves, by their names in the state dict."""
    return dict(model.state_dict(keep_vars=True))


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, tensor)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors hold the same bits (so 0 and -0 differ, and NaN may equal NaN)."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a is b or a.is_meta:  # a tensor without values equals only itself
        return a is b
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    bits = BITS[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))


class Planned(Protocol):
    """A model that runs by a plan, such as `VAR`, `DynamicVAR` or `CollaborativeVAR`."""

    @property
    def config(self) -> VARConfig: ...
    @property
    def moe_scales(self) -> tuple[int, ...]: ...
    @property
    def selection(self) -> Selection: ...
    def backbone_at(self, si: int) -> VAR: ...
    def plan(
        self, branches: Sequence[int] | None = None, **options: Unpack[PlanOptions]
    ) -> tuple[Step, ...]: ...


def teacher_forced(
    model: Planned,
    labels_B: Labels,
    teacher_BLC: Tensor,
    rules: Mapping[int, SelectionRule],
    impl: str = "auto",
    observer: Observer | None = None,
    branches: Sequence[int] | None = None,
    share_mask: bool = False,
    skipped: SkippedMeans | None = None,
    gradients: bool = False,
) -> Iterator[Tensor]:
    """Walk the plan of a model with given inputs; yield the logits (R, l, V) of step after step.

    See `DynamicVAR.forward`. branches: rows per image at each scale (see `VAR.plan`); the second
    half has the null class. share_mask: both halves run the first one's experts. skipped: what
    stands for the others. gradients: whether they flow through the cache.
    """
    check_impl(impl)
    in_layers = None if observer is None else observer.in_layers()
    plan, rest = model.plan(branches), model.config.scale_slices[1:]
    first: VAR = plan[0].cache
    labels_B, teacher_BLC = first.check_teacher(labels_B, teacher_BLC)
    given = teacher_BLC.split([each.stop - each.start for each in rest], dim=1)
    inputs = dict(enumerate(given, 1))
    null_B = torch.full_like(labels_B, model.config.num_classes)
    labels_R = torch.cat([labels_B, null_B][: plan[0].branches])
    passes = Passes(labels_R, len(labels_B), gradients)
    for step in plan:
        rule, routing = step.rule(rules), None
        if rule is not None:
            routing = Routing(
                rule, step.si, impl, in_layers,
                sharing=step.branches if share_mask else 1,
                labels_B=labels_R[: step.branches * len(labels_B)],
                means_KEC=None if skipped is None else skipped.at(step.si),
            )  # fmt: skip
        passes.begin(step)
        yield passes.run(step, passes.embed(step, inputs), routing)


def rules_of(
    model: Planned, tau: Tau = None, selection: Selection = None
) -> dict[int, SelectionRule]:
    """Call `resolve_rules` for this model; ValueError also if it cannot run one of the rules."""
    scales = (model.config.num_scales, model.moe_scales)
    rules = resolve_rules(tau, selection, *scales, model.selection)
    for si, rule in rules.items():
        config = model.backbone_at(si).config
        rule.check(config.depth, config.num_experts)
    return rules
