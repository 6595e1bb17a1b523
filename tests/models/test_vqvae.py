"""The VQ-VAE against the published code's outputs and its published size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from dmoe_var import VQVAE, VQVAEConfig
from dmoe_var.models import vqvae as vqvae_module

TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_outputs_are_the_published_ones(parity):
    vqvae, io = parity.vqvae, parity.io
    tokens = [io[f"tokens.{si}"] for si in range(len(parity.config["patch_nums"]))]
    assert_close(vqvae.features(io["image"]), io["encoder_features"], **TOLERANCE)
    assert_close(vqvae.encode(io["image"]), tokens, rtol=0, atol=0)
    assert_close(parity.pixels(vqvae.decode(tokens)), io["reconstruction"], **TOLERANCE)
    assert_close(vqvae.teacher_input(tokens), io["teacher_input"], **TOLERANCE)


def test_published_size():
    with torch.device("meta"):
        vqvae = VQVAE(VQVAEConfig())
    assert sum(p.numel() for p in vqvae.parameters()) / 1e6 == pytest.approx(108.9, abs=0.05)
    assert vqvae.config.image_size == 256


def test_encode_gives_a_long_tensor_a_scale(make_vqvae, images):
    vqvae = make_vqvae()
    tokens = vqvae.encode(images)
    assert [t.shape for t in tokens] == [(3, p * p) for p in vqvae.config.patch_nums]
    assert all(t.dtype == torch.long and not t.is_inference() for t in tokens)


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 8, 4), (2, 1, 8, 8)])
def test_images_of_another_size_raise(make_vqvae, shape):
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 8, 8\), got"):
        make_vqvae().encode(torch.zeros(shape))


def test_many_images_are_decoded_in_slices(make_vqvae, images, monkeypatch):
    """Of two, and the fifth alone; with gradients all at once."""
    vqvae, sizes = make_vqvae(), []
    f_hat = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one_by_one = torch.cat([vqvae.decode_f_hat(row[None]) for row in f_hat])
    vqvae.decoder.register_forward_hook(lambda _, given, out: sizes.append(len(out)))
    monkeypatch.setattr(vqvae_module, "DECODED_TOGETHER", 2 * 32 * 8 * 8 + 1)
    with torch.no_grad():
        assert_close(vqvae.decode_f_hat(f_hat), one_by_one, **TOLERANCE)
    assert sizes == [2, 2, 1]
    vqvae.decode_f_hat(f_hat)
    assert sizes[3:] == [5]


@pytest.mark.parametrize(("fit", "tried"), [(2, [5, 2, 2, 1]), (1, [5, 2, 1, 1, 1, 1, 1])])
def test_fewer_are_decoded_together_if_memory_is_short(make_vqvae, fit, tried, capfd):
    vqvae, sizes = make_vqvae(), []
    f_hat = torch.randn(5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vqvae.decode_f_hat(f_hat)

    def short(_, given):
        sizes.append(len(given[0]))
        if sizes[-1] > fit:
            raise torch.OutOfMemoryError

    vqvae.decoder.register_forward_pre_hook(short)
    with torch.no_grad():
        assert_close(vqvae.decode_f_hat(f_hat), expected, **TOLERANCE)
    assert sizes == tried
    assert f"images are decoded {fit} at a time" in capfd.readouterr().err


def test_not_one_image_fits(make_vqvae):
    vqvae = make_vqvae()

    def short(_, given):
        raise torch.OutOfMemoryError

    vqvae.decoder.register_forward_pre_hook(short)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        vqvae.decode_f_hat(torch.zeros(3, 8, 4, 4))


def test_decode_clamps_and_the_training_pass_does_not(make_vqvae, images):
    vqvae = make_vqvae()
    with torch.no_grad():
        vqvae.decoder.conv_out.bias.add_(2)
    reconstruction, _, tokens = vqvae(images)
    assert reconstruction.max() > 1
    assert_close(tokens, vqvae.encode(images))
    assert_close(vqvae.decode(tokens), reconstruction.detach().clamp(-1, 1), **TOLERANCE)


def test_training_pass_moves_every_weight(make_vqvae, images):
    vqvae = make_vqvae()
    reconstruction, loss, _ = vqvae(images)
    (F.mse_loss(reconstruction, images) + loss).backward()
    without = [name for name, p in vqvae.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("patch_nums", [(1, 2, 2), (2, 1)])
def test_patch_nums_have_to_rise(patch_nums):
    with pytest.raises(ValueError, match="patch_nums"):
        VQVAEConfig(patch_nums=patch_nums)


def test_half_precision_takes_images_of_any_precision(make_vqvae, images):
    vqvae = make_vqvae().bfloat16()
    tokens = vqvae.encode(images)
    assert all(map(torch.equal, tokens, vqvae.encode(images.bfloat16())))
    exact = make_vqvae().bfloat16()
    f_BCHW = exact.features(images)
    expected = exact.float().quantize.encode(f_BCHW.float())
    assert all(map(torch.equal, tokens, expected))
    reconstruction, _, _ = vqvae(images)
    assert reconstruction.isfinite().all()
