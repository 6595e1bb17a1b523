"""VAR: a transformer that predicts the next scale's token map (VAR, section 3; 2404.02905).

Legend: B batch, L tokens of all scales, l tokens of one scale, C width, V vocabulary, Cvae latent
channels of the VQ-VAE, S scales, si scale index from 0.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap, zip_longest
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe_var import values
from dmoe_var.models.blocks import FFN, Block, HeadNorm, Modulation, Rows, Vectors, whole
from dmoe_var.models.head_skipping import Heads
from dmoe_var.models.kv_cache import KVCache
from dmoe_var.models.plan import PlanOptions, Step, steps
from dmoe_var.models.token_skipping import Skip
from dmoe_var.models.vqvae import PATCH_NUMS_256, PatchNums
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.routing import Routing
from dmoe_var.ops import Linear, at_least_float32, hooked

if TYPE_CHECKING:
    from typing_extensions import Unpack

Labels = Sequence[int] | np.ndarray | Tensor
"""Class numbers of any integer type, on any device."""
HEAD_DIM = 64
ADALN_GAMMA_GAIN = {16: 1e-3, 20: 1e-3, 24: 1e-4, 30: 1e-5, 36: 5e-6}  # by depth, as published


@dataclass(frozen=True)
class VARConfig:
    """Shape of a VAR; what is left null is derived from depth."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    depth: Annotated[int, Field(gt=0)] = 16
    """Transformer blocks."""
    width: Annotated[int, Field(gt=0)] | None = None
    """Channels C per token; null means 64 times depth."""
    num_heads: Annotated[int, Field(gt=0)] | None = None
    """Attention heads; null means one per 64 channels."""
    num_classes: Annotated[int, Field(gt=0)] = 1000
    """Number of classes, without guidance's null class."""
    patch_nums: PatchNums = PATCH_NUMS_256
    """Side of each scale's token map, coarse to fine; must be the VQ-VAE's."""
    vocab_size: Annotated[int, Field(gt=1)] = 4096
    """Codes that a token can take; must be the VQ-VAE's."""
    z_channels: Annotated[int, Field(gt=0)] = 32
    """Channels per code; must be the VQ-VAE's."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Hidden neurons of an FFN, as a multiple of its width."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation of the FFNs: gelu as published, relu after ReLUfication."""
    shared_adaln: bool = False
    """Whether all blocks share one AdaLN projection."""
    attn_l2_norm: bool = True
    """Whether queries and keys have length 1, with a learnt scale per head."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stochastic depth's rate at the last block, to which it rises; null means 0.1 * depth / 24."""
    label_drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of labels that training replaces by the null class."""
    adaln_gamma_gain: Annotated[float, Field(gt=0)] | None = None
    """Gain of AdaLN gates at initialisation; null means the published value for the depth."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """Epsilon of the layer norms."""
    experts: ExpertConfig | None = None
    """How FFNs are cut into experts; null means that they are not."""

    def __post_init__(self) -> None:
        values.take_fields(self)
        derived = {"width": HEAD_DIM * self.depth, "drop_path": 0.1 * self.depth / 24}
        derived["adaln_gamma_gain"] = ADALN_GAMMA_GAIN.get(self.depth, 1e-3)
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.num_heads is None:
            object.__setattr__(self, "num_heads", max(1, self.C // HEAD_DIM))
        if self.C % self.H:
            raise ValueError(f"num_heads={self.H} does not divide width={self.C}")
        if self.hidden < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves the FFN no hidden neuron")
        if self.experts is not None and self.hidden % self.experts.expert_size:
            size = self.experts.expert_size
            raise ValueError(f"expert_size={size} does not divide the FFN's {self.hidden} neurons")

    @property
    def C(self) -> int:
        assert self.width is not None
        return self.width

    @property
    def H(self) -> int:
        assert self.num_heads is not None
        return self.num_heads

    @property
    def hidden(self) -> int:
        """Width of the FFN's hidden layer."""
        return round(self.C * self.mlp_ratio)

    @property
    def num_experts(self) -> int:
        """Experts per FFN; 0 if FFNs are not split."""
        return self.hidden // self.experts.expert_size if self.experts else 0

    @property
    def num_tokens(self) -> int:
        """L: tokens of all scales."""
        return sum(p * p for p in self.patch_nums)

    @property
    def num_scales(self) -> int:
        return len(self.patch_nums)

    @property
    def scale_slices(self) -> tuple[slice, ...]:
        """Where each scale's tokens lie among all L."""
        ends = [sum(p * p for p in self.patch_nums[: si + 1]) for si in range(self.num_scales)]
        return tuple(slice(end - p * p, end) for end, p in zip(ends, self.patch_nums, strict=True))


def check_labels(labels: Labels, num_classes: int, device: torch.device) -> Tensor:
    """Turn labels into a LongTensor (B,) on a device. Raises ValueError unless they are a non-empty
    list of whole numbers within 0..num_classes (the last is the null class)."""
    if torch.compiler.is_compiling() and isinstance(labels, Tensor):  # knows no values
        if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point():
            raise ValueError("labels must be a non-empty list of whole numbers")
        return labels.to(device).long()
    given = values.whole_numbers("labels", labels)
    if min(given) < 0 or max(given) > num_classes:
        raise ValueError(
            f"labels must be within 0..{num_classes} ({num_classes} is the null class), got "
            f"{min(given)}..{max(given)}"
        )
    return torch.tensor(given, device=device)


class VAR(nn.Module):
    """The transformer; its FFNs are dense, or split into experts if `config.experts` is set.

    State-dict names of a dense VAR are those of the published models.
    """

    pos_start: nn.Parameter
    lvl_1L: Tensor
    attn_bias_for_masking: Tensor
    selection: ClassVar[None] = None
    """A VAR has no selection rule of its own: if none is given, every expert runs."""
    skipped: ClassVar[None] = None
    """Nothing stands for experts that do not run."""

    def __init__(self, config: VARConfig):
        super().__init__()
        self.config = config
        C, L, first_l = config.C, config.num_tokens, config.patch_nums[0] ** 2
        self.word_embed = Linear(config.z_channels, C)
        self.class_emb = nn.Embedding(config.num_classes + 1, C)
        self.pos_start = nn.Parameter(torch.empty(1, first_l, C))
        self.pos_1LC = nn.Parameter(torch.empty(1, L, C))
        self.lvl_embed = nn.Embedding(config.num_scales, C)
        self.shared_ada_lin = (
            nn.Sequential(nn.SiLU(), Linear(C, 6 * C)) if config.shared_adaln else nn.Identity()
        )
        assert config.drop_path is not None
        drop_path = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        alike = (config.attn_l2_norm, config.shared_adaln, config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(C, self._build_ffn(), config.H, rate, *alike) for rate in drop_path
        )
        self.head_nm = HeadNorm(C, config.norm_eps)
        self.head = Linear(C, config.vocab_size)
        # In numpy: on the meta device the first tensor arithmetic would import torch's compiler.
        level_L = np.repeat(np.arange(config.num_scales), [p * p for p in config.patch_nums])
        self.register_buffer("lvl_1L", torch.from_numpy(level_L[None]))
        sees_LL = level_L[:, None] >= level_L
        mask_LL = np.where(sees_LL, np.float32(0), np.float32(-np.inf))
        self.register_buffer("attn_bias_for_masking", torch.from_numpy(mask_LL[None, None]))
        self._init_weights()

    def _build_ffn(self) -> nn.Module:
        config = self.config
        if config.experts is None:
            return FFN(config.C, config.hidden, config.activation)
        shape = (config.C, config.hidden, config.activation, config.experts)
        return MoEFFN(*shape, config.num_scales, config.num_classes)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Initialise as published (the routers of expert FFNs initialise themselves)."""
        if self.pos_start.is_meta:  # a skeleton that gets its values later
            return
        config = self.config
        std = (1 / config.C / 3) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for position in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(position, std=std)
        self.head.weight.mul_(0.02)
        self.head_nm.ada_lin[1].get_parameter("weight").mul_(0.5)
        assert config.adaln_gamma_gain is not None
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.proj.weight.div_((2 * config.depth) ** 0.5)
            if isinstance(block.ffn, MoEFFN):
                block.ffn.reset_parameters(std, (2 * config.depth) ** -0.5)
            else:
                block.ffn.get_parameter("fc2.weight").div_((2 * config.depth) ** 0.5)
            if config.shared_adaln:
                block.ada_gss[:, :, 2:].mul_(0.5)
                block.ada_gss[:, :, :2].mul_(config.adaln_gamma_gain)
            else:
                ada_weight = block.ada_lin[1].get_parameter("weight")
                ada_weight[2 * config.C :].mul_(0.5)
                ada_weight[: 2 * config.C].mul_(config.adaln_gamma_gain)

    @property
    def moe_scales(self) -> tuple[int, ...]:
        """Scales at which experts are selected: all, or none if there are no experts."""
        return tuple(range(self.config.num_scales)) if self.config.experts else ()

    def backbone_at(self, si: int) -> VAR:
        """Return the backbone that runs scale si; a DynamicVAR has two."""
        return self

    def plan(
        self, branches: Sequence[int] | None = None, **options: Unpack[PlanOptions]
    ) -> tuple[Step, ...]:
        """Plan the steps of an image in order, see `models.plan.steps`."""
        return steps([self] * self.config.num_scales, self, branches, **options)

    def condition(self, labels_B: Tensor) -> Tensor:
        """Embed classes, (B, C); label `num_classes` is the null class."""
        return self.class_emb(labels_B)

    def _position(self, tokens: slice) -> Tensor:
        return self.lvl_embed(self.lvl_1L[:, tokens]) + self.pos_1LC[:, tokens]

    def embed_start(self, cond_BC: Tensor) -> Tensor:
        """Compute the input of scale 0, (B, l, C): the condition at each of its tokens."""
        tokens = self.config.scale_slices[0]
        return cond_BC[:, None] + self.pos_start + self._position(tokens)

    def embed_scale(self, f_hat_BlC: Tensor, si: int) -> Tensor:
        """Compute the input of scale si >= 1, (B, l, C), from a downsampled f_hat (B, l, Cvae)."""
        words_BlC = self.word_embed(f_hat_BlC.to(self.word_embed.weight.dtype))
        return words_BlC + self._position(self.config.scale_slices[si])

    def modulation(self, cond_BC: Tensor) -> Modulation:
        """Compute AdaLN's projections of a condition for all blocks at once, and for the head. They
        are the same at every scale."""
        blocks: Any = self.blocks
        if self.config.shared_adaln:
            shared_B16C = self.shared_ada_lin(cond_BC).view(-1, 1, 6, self.config.C)
            mod_NB16C = torch.stack([block.ada_gss for block in blocks]) + shared_B16C
        else:
            mods = torch.stack([block.ada_lin(cond_BC) for block in blocks])
            mod_NB16C = mods.view(len(blocks), -1, 1, 6, self.config.C)
        mod_NB16C[..., 2:4, :] += 1
        return Modulation([*mod_NB16C.unbind()], self.head_nm.modulation(cond_BC))

    def attention_vectors(self) -> list[Vectors]:
        """Compute what attention adds to and multiplies with every token, block by block."""
        return [block.attn.vectors() for block in self.blocks]  # type: ignore[union-attr, operator]

    def projects_as(self, other: VAR) -> bool:
        """Tell whether AdaLN's projections are another VAR's, because their weights are the same
        tensors, and no hook wants to see either."""
        if self is other:
            return True
        ours, theirs = (
            (p for name, p in each.named_parameters() if "ada_" in name) for each in (self, other)
        )
        watched = (m for each in (self, other) for n, m in each.named_modules() if "ada_" in n)
        alike = starmap(operator.is_, zip_longest(ours, theirs))
        return all(alike) and not hooked(*watched)  # lazily: the first that differs ends the walk

    def new_cache(self, batch: int) -> KVCache:
        """Make an empty K/V cache for all scales of `batch` rows, in the weights' dtype."""
        config = self.config
        shape = (config.depth, batch, config.H, config.num_tokens, config.C // config.H)
        return KVCache(shape, like=self.word_embed.weight)

    def step(
        self,
        x_BlC: Tensor,
        mod: Modulation,
        cache: KVCache,
        routing: Routing | None = None,
        skip: Skip | None = None,
        mask_11lL: Tensor | None = None,
        num_predicted: int | None = None,
        heads: Heads | None = None,
        vectors: Sequence[Vectors] | None = None,
    ) -> Tensor:
        """Run one scale over the cache of those before it; logits (B, l, V), float32 at least.

        mask_11lL: what each of several scales sees of the cache and of the others. num_predicted:
        how many tokens, from the last on, have logits; None is all. heads: which heads are
        projected; None is all. vectors: `attention_vectors`, if they are known.
        """
        for i, block in enumerate(self.blocks):
            here = None if routing is None else routing.at(i)
            skipped = None if skip is None else skip.at(i)
            kept = None if heads is None else heads.at(i)
            own = None if vectors is None else vectors[i]
            how = (mask_11lL, cache, here, None, skipped, kept, own)
            x_BlC = block(x_BlC, mod.blocks[i], i, *how)
            cache.advance(i, int(x_BlC.shape[1]) if skipped is None else skipped.scale.num_kept)
        first = 0 if num_predicted is None else x_BlC.shape[1] - num_predicted
        return self.logits(x_BlC[:, first:], mod)

    def logits(self, x_BLC: Tensor, mod: Modulation) -> Tensor:
        """Apply the head norm and the head; logits (B, L, V), float32 at least."""
        out: Tensor = self.head(self.head_nm(x_BLC, mod.head).to(self.head.weight.dtype))
        return at_least_float32(out)

    def drop_labels(self, labels_B: Tensor, rows: Rows | None = None) -> Tensor:
        """Replace labels by the null class with probability `label_drop`, in train mode only."""
        if not self.training or self.config.label_drop == 0:
            return labels_B
        start, total = rows or whole(len(labels_B))
        drop = torch.rand(total, device=labels_B.device) < self.config.label_drop
        drop_B = drop[start : start + len(labels_B)]
        return torch.where(drop_B, self.config.num_classes, labels_B)

    def check_teacher(self, labels: Labels, teacher_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Move labels (B,) and teacher input to the model's device. Raises ValueError if they do
        not fit the model or each other."""
        config, device = self.config, self.pos_1LC.device
        labels_B = check_labels(labels, config.num_classes, device)
        teacher_BLC = torch.as_tensor(teacher_BLC, device=device)
        num_given = config.num_tokens - config.patch_nums[0] ** 2
        expected = (labels_B.shape[0], num_given, config.z_channels)
        if tuple(teacher_BLC.shape) != expected:
            raise ValueError(f"teacher_BLC must be {expected}, got {tuple(teacher_BLC.shape)}")
        return labels_B, teacher_BLC

    def forward(
        self,
        labels_B: Labels,
        teacher_BLC: Tensor,
        rows: Rows | None = None,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Compute the teacher-forced logits (B, L, V) of all scales, float32 at least.

        teacher_BLC: (B, L - 1, Cvae) from `VQVAE.teacher_input`. Scale 0 reads only the class; if
        it has more than one token, all are left out. rows: where these lie in the whole batch, for
        random numbers in training. activation_checkpointing: blocks run again in the backward pass
        instead of storing what it needs.
        """
        labels_B, teacher_BLC = self.check_teacher(labels_B, teacher_BLC)
        labels_B = self.drop_labels(labels_B, rows)
        return self.predict(labels_B, teacher_BLC, rows, activation_checkpointing)

    def predict(
        self,
        labels_B: Tensor,
        teacher_BLC: Tensor,
        rows: Rows | None = None,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        """Compute what `forward` does, for labels and teacher input that were checked. No label is
        dropped any more."""
        rest = slice(self.config.scale_slices[0].stop, None)
        cond_BC = self.condition(labels_B)
        words_BLC = self.word_embed(teacher_BLC.to(self.word_embed.weight.dtype))
        x_BLC = torch.cat([self.embed_start(cond_BC), words_BLC + self._position(rest)], dim=1)
        mod = self.modulation(cond_BC)
        for i, block in enumerate(self.blocks):
            given = (x_BLC, mod.blocks[i], i, self.attn_bias_for_masking, None, None, rows)
            if activation_checkpointing:
                x_BLC = checkpoint(block, *given, use_reentrant=False)
            else:
                x_BLC = block(*given)
        return self.logits(x_BLC, mod)
