"""Multi-scale residual quantiser of VAR's VQ-VAE (VAR, section 3.2; arXiv 2404.02905).

Legend: B batch, C code channels (z_channels), H W latent height and width (= patch_nums[-1]),
p = patch_nums[si], l = p*p, S number of scales, V vocabulary, N tokens of a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_var.ops import Conv2d, at_least_float32


class Phi(Conv2d):
    """Smooths an upsampled code map: phi(h) = (1 - r) h + r conv3x3(h). It computes in float32 at
    least, even with half weights or under autocast: it is part of the sum that tokens code."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, h_BCHW: Tensor) -> Tensor:
        dtype = torch.promote_types(at_least_float32(h_BCHW).dtype, self.weight.dtype)
        assert self.bias is not None
        weight, bias, h_BCHW = (x.to(dtype) for x in (self.weight, self.bias, h_BCHW))
        with torch.autocast(h_BCHW.device.type, enabled=False):
            smooth_BCHW = self._conv_forward(h_BCHW, weight, bias)
        return h_BCHW * (1 - self.ratio) + smooth_BCHW * self.ratio


def nearest_tick(num_phi: int, si: int, num_scales: int) -> int:
    """Return the index of scale si's phi: the tick nearest to si / (S - 1), the first of equals.

    It must use float64: in float32 the ties at si = 2 and 7 of ten scales fall the other way.
    """
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(edge, 1 - edge, num_phi)
    return int(np.argmin(np.abs(ticks - (si / max(num_scales - 1, 1)))))


def area_downsample(x_BCHW: Tensor, p: int) -> Tensor:
    """Average over p x p areas, (B, C, p, p)."""
    if x_BCHW.device.type == "mps" and x_BCHW.shape[-1] % p:
        # MPS pools only if p divides the side; these maps are small, so the CPU can do it.
        return F.interpolate(x_BCHW.cpu(), size=(p, p), mode="area").to(x_BCHW.device)
    return F.interpolate(x_BCHW, size=(p, p), mode="area")


class Phis(nn.Module):
    """Holds one phi per scale (`num_phi` 0), one for all (1), or K > 1, each of which serves the
    scales nearest to it. They are published as `quant_resi.N`, `.qresi` and `.qresi_ls.N`."""

    def __init__(self, channels: int, ratio: float, num_scales: int, num_phi: int):
        super().__init__()
        phis = [Phi(channels, ratio) for _ in range(num_phi or num_scales)]
        self.names = [str(si) for si in range(num_scales)]
        if num_phi == 0:
            for name, phi in zip(self.names, phis, strict=True):
                self.add_module(name, phi)
        elif num_phi == 1:
            self.qresi, self.names = phis[0], ["qresi"] * num_scales
        else:
            self.qresi_ls = nn.ModuleList(phis)
            ticks = [nearest_tick(num_phi, si, num_scales) for si in range(num_scales)]
            self.names = [f"qresi_ls.{tick}" for tick in ticks]

    def at(self, si: int) -> nn.Module:
        """Return the phi of scale si."""
        return self.get_submodule(self.names[si])


class MultiScaleQuantizer(nn.Module):
    """Turns a feature map into one token map per scale, coarse to fine, and back.

    Each scale codes what the coarser ones left over: the residual is area-downsampled to p x p,
    replaced by its nearest codes, upsampled (bicubic) and smoothed (phi).
    """

    ema_vocab_hit_SV: Tensor

    def __init__(
        self,
        vocab_size: int,
        channels: int,
        patch_nums: Sequence[int],
        beta: float = 0.25,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
    ):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.vocab_size = vocab_size
        self.channels = channels
        self.beta = beta
        self.embedding = nn.Embedding(vocab_size, channels)
        self.quant_resi = Phis(channels, phi_ratio, len(self.patch_nums), num_phi)
        hits = torch.zeros(len(self.patch_nums), vocab_size)
        self.register_buffer("ema_vocab_hit_SV", hits)

    @torch.no_grad()
    def nearest_code(self, z_NC: Tensor) -> Tensor:
        """Find the code with the least L2 distance to each row of z_NC; indices (N,)."""
        codes_VC = at_least_float32(self.embedding.weight)
        with torch.autocast(z_NC.device.type, enabled=False):  # 8 bits do not tell codes apart
            z_NC = z_NC.to(codes_VC.dtype)
            distance_NV = z_NC.square().sum(1, keepdim=True) + codes_VC.square().sum(1)
            return torch.addmm(distance_NV, z_NC, codes_VC.T, alpha=-2).argmin(1)

    def spread(self, code_BCpp: Tensor, si: int) -> Tensor:
        """Compute what scale si adds to f_hat: phi(bicubic upsampling of codes), (B, C, H, W)."""
        size = self.patch_nums[-1]
        if si != len(self.patch_nums) - 1:
            code_BCpp = F.interpolate(code_BCpp, size=(size, size), mode="bicubic")
        return self.quant_resi.at(si)(code_BCpp)

    def lookup(self, tokens_Bl: Tensor, si: int) -> Tensor:
        """Look up the codes (B, C, p, p), float32 at least, of one scale's tokens (B, p*p).

        Even a half-precision model sums them in float32: ten roundings of f_hat would show.
        """
        p = self.patch_nums[si]
        codes_BlC = at_least_float32(self.embedding(tokens_Bl))
        return codes_BlC.transpose(1, 2).reshape(-1, self.channels, p, p)

    def next_input(self, f_hat_BCHW: Tensor, si: int) -> Tensor:
        """Downsample f_hat by area to what the transformer reads at scale si, (B, p*p, C)."""
        p = self.patch_nums[si]
        return area_downsample(f_hat_BCHW, p).flatten(2).transpose(1, 2)

    def encode(self, f_BCHW: Tensor) -> list[Tensor]:
        """Encode a feature map (B, C, H, W) into the tokens of each scale, LongTensor (B, p*p)."""
        return [tokens_Bl for tokens_Bl, _ in self.encode_with_inputs(f_BCHW)]

    def encode_with_inputs(self, f_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, per scale, the tokens (B, p*p) and the vectors (N, C) that they stand for."""
        residual_BCHW = at_least_float32(f_BCHW.detach()).clone()
        scales = []
        for si in range(len(self.patch_nums)):
            z_NC = self._vectors_of(residual_BCHW, si)
            tokens_Bl = self.nearest_code(z_NC).view(f_BCHW.shape[0], -1)
            residual_BCHW -= self.spread(self.lookup(tokens_Bl, si), si).detach()
            scales.append((tokens_Bl, z_NC))
        return scales

    def _vectors_of(self, residual_BCHW: Tensor, si: int) -> Tensor:
        p, last = self.patch_nums[si], len(self.patch_nums) - 1
        if si != last:
            residual_BCHW = area_downsample(residual_BCHW, p)
        return residual_BCHW.permute(0, 2, 3, 1).reshape(-1, self.channels)

    def partial_sums(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Compute f_hat (B, C, H, W) after each scale."""
        f_hat = torch.zeros((), device=tokens[0].device)
        sums = []
        for si, tokens_Bl in enumerate(tokens):
            f_hat = f_hat + self.spread(self.lookup(tokens_Bl, si), si)
            sums.append(f_hat)
        return sums

    def teacher_input(self, tokens: Sequence[Tensor]) -> Tensor:
        """Compute VAR's inputs for scales 1..S-1 under teacher forcing, (B, L - 1, C)."""
        sums = self.partial_sums(tokens[:-1])
        return torch.cat([self.next_input(f_hat, si + 1) for si, f_hat in enumerate(sums)], dim=1)

    def forward(self, f_BCHW: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Quantise for training.

        Returns f_hat with the straight-through gradient (B, C, H, W), the quantisation loss
        mean_si(beta |sg(f_hat) - f|^2 + |f_hat - sg(f)|^2), and the tokens of each scale.
        """
        f_BCHW = at_least_float32(f_BCHW)
        target_BCHW = f_BCHW.detach()
        f_hat_BCHW = torch.zeros_like(target_BCHW)
        loss = f_BCHW.new_zeros(())
        tokens = []
        for si in range(len(self.patch_nums)):
            z_NC = self._vectors_of(target_BCHW - f_hat_BCHW.detach(), si)
            tokens_Bl = self.nearest_code(z_NC).view(f_BCHW.shape[0], -1)
            f_hat_BCHW = f_hat_BCHW + self.spread(self.lookup(tokens_Bl, si), si)
            commitment = F.mse_loss(f_hat_BCHW.detach(), f_BCHW)
            loss = loss + self.beta * commitment + F.mse_loss(f_hat_BCHW, target_BCHW)
            tokens.append(tokens_Bl)
        straight_through = f_BCHW + (f_hat_BCHW - f_BCHW).detach()
        return straight_through, loss / len(self.patch_nums), tokens
