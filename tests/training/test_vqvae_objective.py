"""The VQ-VAE's losses, its count of codes, and the restart of dead ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dmoe_var.models.blocks import whole
from dmoe_var.training.vqvae_objective import (
    PerceptualDistance,
    VQVAEObjective,
    VQVAETrainingConfig,
)

ALL = torch.arange(20)


@pytest.fixture
def objective(build):
    """Restarts every second step in the first half of ten."""
    return build("vqvae", mse=2.0, l1=0.5, restart_every=2, restart_until=0.5, dead_below=0.1)[0]


def codes(objective):
    return objective.vqvae.quantize.embedding.weight.detach().clone()


def vectors(objective, images_B3RR):
    """All that is coded of these images at any scale, (N, Cvae)."""
    with torch.no_grad():
        features = objective.vqvae.features(images_B3RR)
        return torch.cat([z for _, z in objective.vqvae.quantize.encode_with_inputs(features)])


def are_among(rows, candidates):
    return (torch.cdist(rows.double(), candidates.double()).min(1).values < 1e-5).all()


def test_loss(objective, digits):
    """mse * MSE + l1 * L1 + the quantiser's."""
    images = digits[0].tensors(ALL)
    loss, logged = objective.loss(ALL, 1, 10, whole(20))
    out, quantisation, _ = objective.vqvae(images)
    mse, l1 = (out - images).square().mean(), (out - images).abs().mean()
    torch.testing.assert_close(loss, 2 * mse + 0.5 * l1 + quantisation)
    assert logged["mse"] == pytest.approx(mse.item())
    assert logged["quantisation"] == pytest.approx(quantisation.item())


def test_codes_are_counted_by_scale(objective, digits):
    tokens = objective.vqvae.encode(digits[0].tensors(ALL))
    _, logged = objective.loss(ALL, 1, 10, whole(20))
    hits_SV = objective.vqvae.quantize.ema_vocab_hit_SV
    for si, tokens_Bl in enumerate(tokens):
        counts = [0.1 * tokens_Bl.eq(code).sum() for code in range(hits_SV.shape[1])]
        torch.testing.assert_close(hits_SV[si], torch.stack(counts))
    assert logged["codes_alive"] == len(torch.cat(tokens, 1).unique())


def test_codebook_starts_on_vectors_of_the_first_batch(objective, digits):
    candidates = vectors(objective, digits[0].tensors(ALL))
    assert not are_among(codes(objective), candidates)
    objective.loss(ALL, 0, 10, whole(20))
    assert are_among(codes(objective), candidates)


def test_dead_codes_move_and_live_ones_do_not(objective, digits):
    """Dead: hit less than dead_below (0.1) times the mean, over all scales."""
    objective.loss(ALL, 1, 10, whole(20))
    hits_SV = objective.vqvae.quantize.ema_vocab_hit_SV
    totals_V = torch.ones(hits_SV.shape[1])
    totals_V[[3, 5, 7, 9]] = torch.tensor([0.0, 0.0, 0.08, 0.1])  # of a mean of 0.88
    hits_SV.copy_((totals_V / len(hits_SV)).expand_as(hits_SV))
    dead = [3, 5, 7]
    live = [code for code in range(len(totals_V)) if code not in dead]
    before = codes(objective)
    candidates = vectors(objective, objective.training.tensors(ALL))
    objective.after_step(1, 10)
    after = codes(objective)
    assert torch.equal(after[live], before[live])
    assert (after[dead] != before[dead]).any(1).all()
    assert are_among(after[dead], candidates)


@pytest.mark.parametrize(("step", "restarts"), [(0, False), (1, True), (3, True), (5, False)])
def test_restarts_are_due_every_so_often_until_a_share_of_the_steps(objective, step, restarts):
    objective.loss(ALL, 1, 10, whole(20))
    objective.vqvae.quantize.ema_vocab_hit_SV.zero_()[0, 0] = 1.0
    before = codes(objective)
    objective.after_step(step, 10)
    assert (not torch.equal(codes(objective), before)) == restarts


def test_validation(objective, digits, monkeypatch):
    monkeypatch.setattr("dmoe_var.training.vqvae_objective.VALIDATION_BATCH", 4)
    images = digits[1].tensors(torch.arange(10))
    tokens = objective.vqvae.encode(images)
    error = objective.vqvae.decode(tokens) - images
    size = objective.vqvae.config.vocab_size
    naive = {"val_mse": float(error.square().mean()), "val_l1": float(error.abs().mean())}
    naive["val_codes_used"] = len(torch.cat(tokens, 1).unique()) / size
    for si, tokens_Bl in enumerate(tokens):
        naive[f"val_codes_used_scale{si}"] = len(tokens_Bl.unique()) / size
    assert objective.validate() == pytest.approx(naive)


def test_perceptual_term(objective, digits):
    """Zero for the same images, more for others; added with its weight; itself frozen."""
    images = digits[0].tensors(ALL[:4])
    distance = PerceptualDistance(32)
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    assert float(distance(images, images)) == 0
    assert float(distance(images, -images)) > 0.01
    plain, _ = objective.loss(ALL[:4], 1, 10, whole(4))
    config = replace(objective.config, perceptual=3.0, perceptual_size=32)
    sets = objective.training, objective.held_out
    loss, logged = VQVAEObjective(objective.vqvae, *sets, config).loss(ALL[:4], 1, 10, whole(4))
    assert (loss - plain).item() == pytest.approx(3 * logged["perceptual"], rel=1e-4)
    loss.backward()
    assert objective.vqvae.encoder.conv_in.weight.grad.abs().max() > 0


def test_perceptual_term_under_autocast():
    """A reconstruction is then bfloat16; its gradient is the float32 one but for rounding."""
    generator = torch.Generator().manual_seed(0)
    a_B3RR, b_B3RR = torch.rand(2, 2, 3, 16, 16, generator=generator).mul_(2).sub_(1)
    distance, gradients = PerceptualDistance(32), []
    for dtype in (torch.float32, torch.bfloat16):
        given_B3RR = a_B3RR.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            distance(given_B3RR, b_B3RR).backward()
        gradients.append(given_B3RR.grad.flatten())
    plain, half = gradients
    assert F.cosine_similarity(plain, half.float(), dim=0) > 0.9


def test_codes_are_counted_on_whole_batches():
    with pytest.raises(ValueError, match="micro_batch_size=4 must be null"):
        VQVAETrainingConfig(steps=1, micro_batch_size=4)
