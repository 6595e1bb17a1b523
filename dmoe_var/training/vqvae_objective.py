"""Train the multi-scale VQ-VAE: the published code leaves this out.

Legend: B batch, R image side, N vectors, V vocabulary, S scales, Cvae latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dmoe_var.config_fields import Share
from dmoe_var.data.images import Images
from dmoe_var.models.blocks import Rows
from dmoe_var.models.vqvae import VQVAE
from dmoe_var.ops import at_least_float32
from dmoe_var.training.objectives import VALIDATION_BATCH, Mean
from dmoe_var.training.step import OptimConfig

HIT_MOMENTUM = 0.9
PERCEPTUAL_BLOCKS = (0, 2, 4)


@dataclass(frozen=True)
class VQVAETrainingConfig(OptimConfig):
    """Training of the VQ-VAE.

    Loss: mse * MSE + l1 * L1 + quantisation + perceptual * feature distance.
    """

    mse: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the squared error."""
    l1: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the absolute error."""
    perceptual: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance of EfficientNet-Lite0 features; 0 does without the network."""
    perceptual_size: Annotated[int, Field(ge=32)] = 64
    """Side in pixels of the images that this network sees."""
    restart_every: Annotated[int, Field(gt=0)] = 25
    """Steps from one restart of dead codes to the next."""
    restart_until: Share = 0.8
    """Share of the steps after which codes are restarted no more."""
    dead_below: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """A code is dead if it is hit less than this times the mean, in a running count over scales."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must be null: codes are counted and "
                "restarted on whole batches"
            )


class PerceptualDistance(nn.Module):
    """Mean squared distance of unit-length feature columns of an ImageNet-trained network.

    They are the early blocks of EfficientNet-Lite0, which a package carries, and are frozen.
    """

    def __init__(self, input_size: int):
        super().__init__()
        from dmoe_var.metrics.efflite0 import EfficientNetLite0Features

        self.input_size = input_size
        network = EfficientNetLite0Features("perceptual", ["1280"], input_size).network
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[: PERCEPTUAL_BLOCKS[-1] + 1])
        self.requires_grad_(False).eval()

    def _features(self, images_B3RR: Tensor) -> list[Tensor]:
        x = at_least_float32(images_B3RR)  # on a CPU antialiasing has no bfloat16 gradient
        x = F.interpolate(x, self.input_size, mode="bilinear", antialias=True)
        x = self.stem(x)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in PERCEPTUAL_BLOCKS:
                features.append(F.normalize(x, dim=1))
        return features

    def forward(self, a_B3RR: Tensor, b_B3RR: Tensor) -> Tensor:
        """Compute the distance of two batches of images in [-1, 1], a scalar."""
        pairs = zip(self._features(a_B3RR), self._features(b_B3RR), strict=True)
        return torch.stack([F.mse_loss(fa, fb) for fa, fb in pairs]).mean()


class VQVAEObjective:
    """Reconstruction and quantisation losses; counts codes, restarts dead ones."""

    repeatable = False

    def __init__(
        self, vqvae: VQVAE, training: Images, held_out: Images, config: VQVAETrainingConfig
    ):
        self.module: nn.Module = vqvae
        self.vqvae = vqvae
        self.training = training
        self.held_out = held_out
        self.config = config
        self.num_examples = len(training)
        self.device = vqvae.quantize.embedding.weight.device
        self.perceptual = None
        if config.perceptual:
            self.perceptual = PerceptualDistance(config.perceptual_size).to(self.device)
        self._last_batch: Tensor | None = None

    def loss(
        self, indices_B: Tensor, step: int, num_steps: int, rows: Rows
    ) -> tuple[Tensor, dict[str, float]]:
        images_B3RR = self.training.tensors(indices_B, self.device)
        if step == 0:
            self._restart(images_B3RR, torch.ones_like(self._hits(), dtype=torch.bool))
        out_B3RR, quantisation, tokens = self.vqvae(images_B3RR)
        config = self.config
        mse = F.mse_loss(out_B3RR, images_B3RR)
        loss = config.mse * mse + config.l1 * F.l1_loss(out_B3RR, images_B3RR) + quantisation
        logged = {"mse": mse.item(), "quantisation": quantisation.item()}
        if self.perceptual is not None:
            distance = self.perceptual(out_B3RR, images_B3RR)
            loss = loss + config.perceptual * distance
            logged["perceptual"] = distance.item()
        self._count(tokens)
        self._last_batch = images_B3RR
        logged["codes_alive"] = int((self._hits() > 0).sum())
        return loss, logged

    @torch.no_grad()
    def _count(self, tokens: list[Tensor]) -> None:
        hits_SV = self.vqvae.quantize.ema_vocab_hit_SV
        for si, tokens_Bl in enumerate(tokens):
            tokens_N = tokens_Bl.flatten()  # not by bincount, which waits for a GPU
            counts_V = tokens_N.new_zeros(hits_SV.shape[1])
            counts_V.index_add_(0, tokens_N, torch.ones_like(tokens_N))
            hits_SV[si].mul_(HIT_MOMENTUM).add_(counts_V, alpha=1 - HIT_MOMENTUM)

    def _hits(self) -> Tensor:
        """Sum the running hits of each code over all scales, (V,)."""
        return self.vqvae.quantize.ema_vocab_hit_SV.sum(0)

    def after_step(self, step: int, num_steps: int) -> None:
        """Restart dead codes if a restart is due."""
        due = (step + 1) % self.config.restart_every == 0
        if not due or step + 1 > self.config.restart_until * num_steps:
            return
        hits_V = self._hits()
        dead_V = hits_V < self.config.dead_below * hits_V.mean()
        if bool(dead_V.any()):
            assert self._last_batch is not None
            self._restart(self._last_batch, dead_V)

    @torch.no_grad()
    def _restart(self, images_B3RR: Tensor, dead_V: Tensor) -> None:
        """Put dead codes on vectors of this batch that have to be coded, each scale as likely."""
        quantize = self.vqvae.quantize
        scales = quantize.encode_with_inputs(self.vqvae.features(images_B3RR))
        num_dead = int(dead_V.sum())
        choices = torch.randint(len(scales), (num_dead,)).bincount(minlength=len(scales))
        rows = [
            z_NC[torch.randint(len(z_NC), (int(n),))].to(quantize.embedding.weight.dtype)
            for n, (_, z_NC) in zip(choices, scales, strict=True)
        ]
        quantize.embedding.weight[dead_V] = torch.cat(rows)

    def validate(self) -> dict[str, float]:
        """Measure reconstruction error on held-out images and each scale's share of used codes."""
        mean = Mean()
        config = self.vqvae.config
        used_SV = torch.zeros(len(config.patch_nums), config.vocab_size, dtype=torch.bool)
        for indices_B in torch.arange(len(self.held_out)).split(VALIDATION_BATCH):
            images_B3RR = self.held_out.tensors(indices_B, self.device)
            tokens = self.vqvae.encode(images_B3RR)
            out_B3RR = self.vqvae.decode(tokens)
            mean.add("val_mse", F.mse_loss(out_B3RR, images_B3RR), len(indices_B))
            mean.add("val_l1", F.l1_loss(out_B3RR, images_B3RR), len(indices_B))
            for si, tokens_Bl in enumerate(tokens):
                used_SV[si, tokens_Bl.flatten().cpu()] = True
        shares = {
            f"val_codes_used_scale{si}": float(u.float().mean()) for si, u in enumerate(used_SV)
        }
        return {**mean.result(), "val_codes_used": float(used_SV.any(0).float().mean()), **shares}
