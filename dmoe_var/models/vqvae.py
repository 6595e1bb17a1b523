"""The multi-scale VQ-VAE: convolutional encoder and decoder around MultiScaleQuantizer.

Legend: B batch, R image side, C channels, H W height and width of a feature map, Cvae latent
channels, p = patch_nums[si], L = sum of p*p over all scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from dmoe_var import values
from dmoe_var.files import note
from dmoe_var.models.quantizer import MultiScaleQuantizer
from dmoe_var.ops import Conv2d, at_least_float32

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # as published
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PatchNums = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=2)]
GROUPS = 32
DECODED_TOGETHER = 1 << 27
"""Most values of the largest feature map in one pass: 12 images of 256 px as published."""


@dataclass(frozen=True)
class VQVAEConfig:
    """Shape of a multi-scale VQ-VAE; the defaults are the published vae_ch160v4096z32."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    ch: Annotated[int, Field(gt=0, multiple_of=GROUPS)] = 160
    """Channels of the finest level."""
    ch_mult: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)] = (
        1, 1, 2, 2, 4,
    )  # fmt: skip
    """Channels of each level, in ch; the side halves from one level to the next."""
    num_res_blocks: Annotated[int, Field(gt=0)] = 2
    """Residual blocks per level."""
    attention: bool = True
    """Whether the coarsest level has attention."""
    z_channels: Annotated[int, Field(gt=0)] = 32
    """Channels per code."""
    vocab_size: Annotated[int, Field(gt=1)] = 4096
    """Codes in the codebook."""
    patch_nums: PatchNums = PATCH_NUMS_256
    """Side of each scale's token map, coarse to fine."""
    num_phi: Annotated[int, Field(ge=0)] = 4
    """Number of convolutions phi after upsampling: 0 means one per scale, 1 one for all scales."""
    phi_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of phi's output in what is added; the rest is its input."""
    beta: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the commitment loss."""
    conv_kernel: Annotated[int, Field(ge=1)] = 3
    """Kernel side of the convolutions before and after the quantiser."""

    def __post_init__(self) -> None:
        values.take_fields(self)
        if list(self.patch_nums) != sorted(set(self.patch_nums)):
            raise ValueError(f"patch_nums must rise from scale to scale: {self.patch_nums}")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel={self.conv_kernel} must be odd")

    @property
    def downsampling(self) -> int:
        """Image pixels per side of a latent cell."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def image_size(self) -> int:
        """Side of the images that fill the finest scale, in pixels."""
        return self.patch_nums[-1] * self.downsampling


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


def silu(x: Tensor) -> Tensor:
    """Apply SiLU in place: at full size a fresh feature map costs more than the function itself."""
    return F.silu(x, inplace=True)


class ResBlock(nn.Module):
    """Adds norm, SiLU, conv, norm, SiLU, conv to a shortcut (a 1x1 conv if channels change)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels
        self.nin_shortcut = Conv2d(in_channels, out_channels, 1) if changes else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x_BCHW)))
        h = self.conv2(silu(self.norm2(h)))
        return h.add_(self.nin_shortcut(x_BCHW))


class AttnBlock(nn.Module):
    """Adds single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        q, k, v = self.qkv(self.norm(x_BCHW)).view(B, 3, 1, C, H * W).transpose(3, 4).unbind(1)
        h_B1LC = F.scaled_dot_product_attention(q, k, v)
        return x_BCHW + self.proj_out(h_B1LC.transpose(2, 3).reshape(B, C, H, W))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels: int, attention: bool):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Level(nn.Module):
    """Holds the residual blocks (and attention) of one resolution, and an optional resampling."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.block = nn.ModuleList(ResBlock(c_in, c_out) for c_in, c_out in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(num_blocks * attention))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return self.upsample(self.downsample(x_BCHW))


class Encoder(nn.Module):
    """Turns images (B, 3, R, R) into features (B, Cvae, H, W), H = R / downsampling."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        last = len(widths) - 1
        for i, width in enumerate(widths):
            in_width = widths[i - 1] if i else config.ch
            attention = config.attention and i == last
            level = Level(in_width, width, config.num_res_blocks, attention)
            if i != last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], config.attention)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x_B3RR: Tensor) -> Tensor:
        h = self.conv_in(x_B3RR)
        for level in self.down:
            h = level(h)
        return self.conv_out(silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Turns features (B, Cvae, H, W) into images (B, 3, R, R)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.attention)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            in_width = widths[min(i + 1, last)]
            attention = config.attention and i == last
            level = Level(in_width, width, config.num_res_blocks + 1, attention)
            if i:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = group_norm(widths[0])
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(silu(self.norm_out(h)))


class VQVAE(nn.Module):
    """Turns images into token maps and back. State-dict names are those of the published model."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        kernel, z = config.conv_kernel, config.z_channels
        self.quantize = MultiScaleQuantizer(
            config.vocab_size, z, config.patch_nums, config.beta, config.num_phi, config.phi_ratio
        )
        self.quant_conv = Conv2d(z, z, kernel, padding=kernel // 2)
        self.post_quant_conv = Conv2d(z, z, kernel, padding=kernel // 2)

    def features(self, images_B3RR: Tensor) -> Tensor:
        """Compute the encoder's output after quant_conv, (B, Cvae, H, W)."""
        size = self.config.image_size
        if images_B3RR.shape[-3:] != (3, size, size):
            shape = tuple(images_B3RR.shape)
            raise ValueError(f"images must be (B, 3, {size}, {size}), got {shape}")
        if images_B3RR.is_floating_point():
            images_B3RR = images_B3RR.to(self.quant_conv.weight.dtype)
        return self.quant_conv(self.encoder(images_B3RR))

    @torch.no_grad()
    def encode(self, images_B3RR: Tensor) -> list[Tensor]:
        """Encode images in [-1, 1] into the tokens of each scale, LongTensor (B, p*p)."""
        return self.quantize.encode(self.features(images_B3RR))

    @torch.no_grad()
    def decode(self, tokens: Sequence[Tensor]) -> Tensor:
        """Decode the tokens of all scales into images (B, 3, R, R) in [-1, 1]."""
        return self.decode_f_hat(self.quantize.partial_sums(tokens)[-1])

    def decode_f_hat(self, f_hat_BCHW: Tensor) -> Tensor:
        """Decode an accumulated code map into images in [-1, 1]; any scale's partial sum will do.

        Without gradients it decodes a few images at a time, so memory does not grow with the batch.
        Where a GPU has too little left for them it takes half as many, down to one.
        """
        if torch.is_grad_enabled():
            return self._decode(f_hat_BCHW)
        together = max(1, DECODED_TOGETHER // (self.config.ch * self.config.image_size**2))
        while True:
            try:
                return torch.cat([self._decode(part) for part in f_hat_BCHW.split(together)])
            except torch.OutOfMemoryError:
                if together == 1:
                    raise
            together = max(1, min(together, len(f_hat_BCHW)) // 2)  # now that the error is let go
            note(f"too little memory is free: images are decoded {together} at a time")

    def _decode(self, f_hat_BCHW: Tensor) -> Tensor:
        dtype = self.post_quant_conv.weight.dtype
        z_BCHW = f_hat_BCHW.to(dtype, memory_format=torch.channels_last)
        out: Tensor = self.decoder(self.post_quant_conv(z_BCHW))
        return at_least_float32(out).clamp(-1, 1)

    @torch.no_grad()
    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Compute VAR's inputs for scales 1..S-1 under teacher forcing, (B, L - 1, Cvae)."""
        return self.quantize.teacher_input(tokens)

    def forward(self, images_B3RR: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return, for training, the unclamped reconstruction, quantisation loss and all tokens."""
        f_hat_BCHW, loss, tokens = self.quantize(self.features(images_B3RR))
        z_BCHW = f_hat_BCHW.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z_BCHW)), loss, tokens
