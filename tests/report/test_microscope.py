"""What is stored for the page, against the experts themselves run with masks."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe_var import DynamicVAR, Threshold, count_flops, generate
from dmoe_var.data.images import to_uint8
from dmoe_var.metrics.flops_fixed import fixed_cost
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.experts import run_experts
from dmoe_var.report import microscope, page
from dmoe_var.report.microscope import STEPS, errors_by_count, quantised_ratios, record, runs_at
from dmoe_var.report.pictures import grid_uri, png_uri
from dmoe_var.sampling.sampler import SamplingConfig
from dmoe_var.stages.report import costs

SCALES = (2, 3)
SEED, INDEX, LABEL = 3, 2, 4
SAMPLING = SamplingConfig(cfg=1.5, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def models(make_vqvae, make_var, make_moe):
    """(DynamicVAR, VQVAE) of random weights, 8 experts a layer."""
    dense = make_var()
    moe = make_moe(make_var(seed=1, activation="relu"))
    for block in moe.blocks:
        torch.nn.init.normal_(block.ffn.router.fc2.weight)
    return DynamicVAR(dense, moe, SCALES), make_vqvae()


@pytest.fixture(scope="module")
def recording(models):
    return record(*models, LABEL, SEED, INDEX, SAMPLING, "grouped")


def drawn(models, tau, counts=None):
    return generate(
        *models, [LABEL], cfg=1.5, top_k=20, top_p=0.9, seed=SEED, start_index=INDEX,
        selection=Threshold(tau), observer=counts,
    )  # fmt: skip


def test_ratios_give_the_mask_of_eq_3():
    """Of 16-bit scores the mask is exactly Eq. 3's, at every tau."""
    scores_NE = torch.randint(1, STEPS, (200, 8)).float()
    scores_NE[:, 3] = STEPS
    stored_NE = quantised_ratios(scores_NE).numpy()
    for tau in np.linspace(0, 1, 41):
        expected = scores_NE.double().numpy() >= tau * STEPS
        assert (runs_at(stored_NE, tau) == expected).all()


def test_a_token_without_scores_runs_every_expert():
    stored_E = quantised_ratios(torch.zeros(5)).numpy()
    assert runs_at(stored_E, 1.0).all()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_errors_are_those_of_the_masked_ffn(models, tau, no_grad, monkeypatch):
    """Also where the tokens do not fit into one piece."""
    monkeypatch.setattr(microscope, "CHUNK", 8 * 64 * 5)
    ffn = models[0].moe.blocks[0].ffn.double()
    x_RlC = torch.randn(2, 9, 64, dtype=torch.float64)
    ratios_RlE = quantised_ratios(ffn.router(x_RlC))
    errors_RlE = errors_by_count(ffn, x_RlC, ratios_RlE)
    x_NC, mask_NE = x_RlC.flatten(0, 1), torch.from_numpy(runs_at(ratios_RlE.numpy(), tau))
    mask_NE = mask_NE.flatten(0, 1)
    every_NC = run_experts(x_NC, torch.ones_like(mask_NE), ffn.weights, ffn.act, "reference")
    some_NC = run_experts(x_NC, mask_NE, ffn.weights, ffn.act, "reference")
    expected_N = (every_NC - some_NC).norm(dim=-1) / (every_NC - ffn.b2_C).norm(dim=-1)
    counts_N1 = mask_NE.sum(-1, keepdim=True)
    found_N = errors_RlE.flatten(0, 1).gather(1, counts_N1 - 1)[:, 0]
    torch.testing.assert_close(found_N, expected_N)
    ffn.float()


def test_recording_is_of_the_picture_that_tau_0_draws(models, recording):
    images = to_uint8(drawn(models, 0.0))
    assert (recording.pictures[SCALES[-1]] == images[0]).all()
    assert recording.pictures.keys() == recording.ratios.keys() == set(SCALES)
    for si in SCALES:
        shape = (2, 2, (si + 1) ** 2, 8)  # layers, branches, tokens, experts
        assert recording.ratios[si].shape == recording.errors[si].shape == shape
        assert (recording.ratios[si].max(-1) == STEPS).all()
        assert (recording.errors[si][..., -1] == 0).all()


def test_counts_are_the_samplers(models, recording):
    """Up to the first FFN with experts nothing has been left out, whatever tau is."""
    for tau in (0.1, 0.4, 0.8):
        counts = ExpertCounts()
        drawn(models, tau, counts)
        ours = runs_at(recording.ratios[SCALES[0]], tau).sum(-1)
        assert (ours[0] == counts.per_token(SCALES[0])[0].numpy()).all()


def test_costs_add_up_to_the_reports(models, recording):
    dynamic, vqvae = models
    found = costs(fixed_cost(dynamic, vqvae), fixed_cost(dynamic.dense, vqvae))
    pairs = {si: runs_at(recording.ratios[si], 0.0).sum() for si in SCALES}
    total = found["fixed_gmac"] + sum(found["pair_gmac"][str(si)] * pairs[si] for si in SCALES)
    assert total == pytest.approx(count_flops(dynamic, vqvae, [LABEL], tau=0.0).total_gmac)
    dense = count_flops(dynamic.dense, vqvae, [LABEL]).total_gmac
    assert found["dense_gmac"] == pytest.approx(dense)


def test_packed_numbers_come_back(recording):
    content = page.packed(recording, 8)
    for si in SCALES:
        for key, exact in (("ratios", recording.ratios), ("errors", recording.errors)):
            stored = np.frombuffer(base64.b64decode(content[key][str(si)]), "<u2")
            step = 1 if key == "ratios" else content["error_step"]
            np.testing.assert_allclose(stored * step, exact[si].ravel(), atol=step / 2)


def test_size_is_told_beforehand(recording):
    content = page.packed(recording, 8)
    stored = sum(len(text) for key in ("ratios", "errors") for text in content[key].values())
    expected = microscope.num_bytes(2, 2, 9 + 16, 8)
    assert stored == pytest.approx(expected, rel=0.01)


def opened(uri):
    kind, _, content = uri.partition(";base64,")
    return kind, np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_pictures_keep_their_pixels_or_shrink():
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), dtype=np.uint8)
    kind, found = opened(png_uri(images[0], 12))
    assert kind == "data:image/png"
    assert (found == images[0]).all()
    assert opened(png_uri(images[0], 8))[1].shape == (8, 8, 3)
    kind, found = opened(grid_uri(images, 2, 12))
    assert kind == "data:image/png"
    assert (found[:12, 13:] == images[1]).all()
    assert (found[13:, :12] == images[2]).all()
    kind, found = opened(grid_uri(images, 2, 8))
    assert (kind, found.shape) == ("data:image/jpeg", (17, 17, 3))
