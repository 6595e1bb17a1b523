"""Means that stand for skipped experts: what they add, where they go with the model, their cost."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import All, DynamicVAR, Random, Threshold, TopK, count_flops, generate
from dmoe_var.conversion.relufication import relufy
from dmoe_var.errors import CheckpointError
from dmoe_var.moe.experts import paths_on
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.skipped_means import SkippedMeans

pytestmark = pytest.mark.usefixtures("no_grad")

LABELS = [0, 1, 2]
SMALL = {"top_k": 20, "top_p": 0.9, "seed": 2}
SHAPE = (2, 8, 64)
"""Layers, experts, width."""


def means(scales=(2, 3), shape=SHAPE, size=0.2):
    generator = torch.Generator().manual_seed(0)
    drawn = {si: size * torch.randn(shape, generator=generator) for si in scales}
    return SkippedMeans(drawn, Threshold(0.5))


@pytest.fixture(scope="module")
def vqvae(make_vqvae):
    return make_vqvae()


@pytest.fixture
def dynamic(make_var, make_moe):
    return DynamicVAR(make_var(seed=0), make_moe(relufy(make_var(seed=1))), (2, 3))


@pytest.mark.parametrize("impl", sorted(paths_on(torch.device("cpu"))))
@pytest.mark.parametrize("rule", [Threshold(0.6), TopK(3), Random(2)], ids=repr)
def test_what_a_layer_adds(dynamic, impl, rule):
    """For every expert that a token skips its mean, whatever runs the others."""
    ffn, table = dynamic.moe.blocks[1].ffn, means().at(2)
    x_BLC = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1))
    plain, routing = Routing(rule, 2, impl), Routing(rule, 2, impl, means_KEC=table).at(1)
    mask_BLE, _ = ffn.select(x_BLC, plain)
    expected = ffn(x_BLC, plain).double()
    for b, token, e in (~mask_BLE).nonzero().tolist():
        expected[b, token] += table[1, e].double()
    assert_close(ffn(x_BLC, routing).double(), expected, rtol=0, atol=1e-5)


def test_off_is_the_plain_sampler(dynamic, vqvae):
    """So is a table of zeros, and a rule that skips nothing, with any table."""
    for rule in (Threshold(0.6), Threshold(0.0), All()):
        dynamic.set_skipped(None)
        plain = generate(dynamic, vqvae, LABELS, selection=rule, **SMALL)
        dynamic.set_skipped(means(size=0.0))
        assert torch.equal(generate(dynamic, vqvae, LABELS, selection=rule, **SMALL), plain)
        dynamic.set_skipped(means())
        with_means = generate(dynamic, vqvae, LABELS, selection=rule, **SMALL)
        assert torch.equal(with_means, plain) == (rule != Threshold(0.6))


def test_under_teacher_forcing(dynamic, make_teacher):
    teacher = make_teacher(dynamic.dense, 3)
    plain = dynamic(LABELS, teacher, tau=0.6)
    dynamic.set_skipped(means())
    change = (dynamic(LABELS, teacher, tau=0.6) - plain).abs().amax((0, 2))
    assert not change[:5].any()  # of scales before the first with experts
    assert change[5:].all()


@pytest.mark.parametrize("cfg", [1.5, 0, (1.5, 1.5, 1.5, 0)], ids=str)
def test_flops(dynamic, vqvae, cfg):
    """C multiply-adds per pair, whether it runs or not, where a rule selects."""
    given = {"cfg": cfg, "selection": [Threshold(0.6), All()], **SMALL}
    plain = count_flops(dynamic, vqvae, LABELS, **given)
    dynamic.set_skipped(means(size=0.0))
    report = count_flops(dynamic, vqvae, LABELS, **given)
    rows = 1 if cfg == 0 else 2
    added = 2 * rows * 9 * 8 * 64 / 1e9  # layers, rows, tokens of scale 2, experts, width
    assert report.pairs == plain.pairs
    assert report.total_gmac - plain.total_gmac == pytest.approx(added)
    assert report.by_part_gmac["experts"] - plain.by_part_gmac["experts"] == pytest.approx(added)
    assert report.authors_gmac - plain.authors_gmac == pytest.approx(added)
    of_images = zip(report.gmac_per_image, plain.gmac_per_image, strict=True)
    assert [ours - theirs for ours, theirs in of_images] == pytest.approx([added] * 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (means((1, 2)), r"skipped: means of scales \(1, 2\), experts are at \(2, 3\)"),
        (means(shape=(2, 8, 32)), r"means of scale 2 are \(2, 8, 32\).*allowed: \(2, 8, 64\)"),
        (means(size=float("nan")), "means of scale 2 are not finite"),
        (SkippedMeans({si: torch.ones(SHAPE).long() for si in (2, 3)}), "int64"),
    ],
)
def test_what_does_not_fit_is_refused(dynamic, given, message):
    with pytest.raises(ValueError, match=message):
        dynamic.set_skipped(given)
    assert dynamic.skipped is None


def test_they_go_with_the_model(dynamic, vqvae, tmp_path):
    """Copied, pickled, cast, as a state dict, saved and loaded; the given ones stay as they are."""
    given = means()
    dynamic.set_skipped(given)
    dynamic.selection = Threshold(0.6)
    expected = generate(dynamic, vqvae, LABELS, **SMALL)
    other = copy.deepcopy(dynamic)
    other.set_skipped(means(size=0.0))
    other.load_state_dict(dynamic.state_dict())
    dynamic.save_pretrained(tmp_path / "saved")
    loaded = DynamicVAR.from_pretrained(tmp_path / "saved")
    for model in (other, pickle.loads(pickle.dumps(dynamic)), loaded):
        assert torch.equal(generate(model, vqvae, LABELS, **SMALL), expected)
        assert model.skipped.selection == Threshold(0.5)
    dynamic.to(torch.bfloat16)
    assert {dynamic.skipped.at(si).dtype for si in (2, 3)} == {torch.bfloat16}
    assert given.at(2).dtype == torch.float32
    assert "skipped experts add their means under tau 0.5" in _text(tmp_path / "saved")


def test_a_folder_is_read_strictly(dynamic, tmp_path):
    dynamic.save_pretrained(tmp_path / "plain")
    assert '"skipped"' not in _text(tmp_path / "plain", "config.json")
    dynamic.set_skipped(means())
    dynamic.save_pretrained(tmp_path / "means")
    for there, here in (("plain", "means"), ("means", "plain")):
        folder = tmp_path / f"{here} as {there}"
        dynamic.set_skipped(means() if here == "means" else None)
        dynamic.save_pretrained(folder)
        (folder / "config.json").write_text(_text(tmp_path / there, "config.json"))
        with pytest.raises(CheckpointError, match=r"2 keys: skipped.scale2_KEC"):
            DynamicVAR.from_pretrained(folder)


def _text(folder, name="README.md"):
    return (folder / name).read_text()
