"""Dense scales are the dense model's, MoE scales the expert model's, over one K/V cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import VAR, DynamicVAR, Oracle, Threshold, TopK
from dmoe_var.conversion.relufication import relufy
from dmoe_var.moe.layer import ExpertCounts

pytestmark = pytest.mark.usefixtures("no_grad")

LAST = 3
MOE_SCALES = [(3,), (2, 3), (1,), (0,), (0, 2), (0, 1, 2, 3)]
LABELS = torch.tensor([1, 5])


@pytest.fixture(scope="module")
def dense(make_var):
    return make_var(seed=0).double()


@pytest.fixture(scope="module")
def relu(make_var):
    """The fine-tuned model: other weights than the dense one's, head and all."""
    return relufy(make_var(seed=1)).double()


@pytest.fixture(scope="module")
def moe(relu, make_moe):
    return make_moe(relu)


@pytest.fixture(scope="module")
def teacher(dense, make_teacher):
    return make_teacher(dense)


@pytest.mark.parametrize("moe_scales", MOE_SCALES, ids=str)
@pytest.mark.parametrize("options", [{"tau": 0.0}, {}, {"tau": 0.0, "impl": "reference"}], ids=str)
def test_tau_0_is_the_unsplit_relu_model(
    dense, relu, moe, teacher, head_inputs, moe_scales, options
):
    with head_inputs(dense, moe) as split_h:
        split = DynamicVAR(dense, moe, moe_scales)(LABELS, teacher, **options)
    with head_inputs(dense, relu) as unsplit_h:
        unsplit = DynamicVAR(dense, relu, moe_scales)(LABELS, teacher)
    assert_close(split_h, unsplit_h, rtol=0, atol=1e-12)
    assert_close(split, unsplit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("moe_scales", MOE_SCALES, ids=str)
def test_scales_before_the_switch_are_the_dense_model(dense, moe, teacher, moe_scales):
    """What a dense scale after an expert one reads (its keys and values) has changed, so only the
    scales before the first are the dense model's."""
    logits = DynamicVAR(dense, moe, moe_scales)(LABELS, teacher, tau=0.7)
    switch = dense.config.scale_slices[moe_scales[0]].start
    moved = (logits - dense(LABELS, teacher)).abs().amax((0, 2))
    assert (moved[:switch] < 1e-5).all()
    assert (moved[switch:] > 1e-3).all()


def test_all_scales_sparse_is_the_moe_model_with_the_dense_embeddings(dense, relu, moe, teacher):
    state = relu.state_dict()
    for name, tensor in dense.state_dict().items():
        if name.startswith(("pos_", "word_embed", "class_emb", "lvl_embed")):
            state[name] = tensor
    expected = VAR(relu.config).double().eval()
    expected.load_state_dict(state)
    logits = DynamicVAR(dense, moe, range(LAST + 1))(LABELS, teacher)
    assert_close(logits, expected(LABELS, teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize("moe_scales", MOE_SCALES, ids=str)
def test_each_head_serves_its_own_scales(dense, moe, make_moe, relu, teacher, moe_scales):
    """The MoE head and head norm at every MoE scale, not at the first alone."""
    other = make_moe(relu)
    other.head.bias.add_(1)
    other.head_nm.ada_lin[1].bias.add_(1)
    moved = DynamicVAR(dense, other, moe_scales)(LABELS, teacher)
    moved = (moved - DynamicVAR(dense, moe, moe_scales)(LABELS, teacher)).abs().amax((0, 2))
    for si, tokens in enumerate(dense.config.scale_slices):
        assert bool((moved[tokens] > 1e-3).all()) == (si in moe_scales)
        assert bool((moved[tokens] == 0).all()) == (si not in moe_scales)


def test_tau_reaches_its_own_scale(dense, moe, teacher):
    counts = ExpertCounts()
    DynamicVAR(dense, moe, (1, 3))(LABELS, teacher, tau=[1.0, 0.0], counts=counts)
    assert counts.scales == [1, 3]
    assert (counts.per_token(1) == 1).all()
    assert (counts.per_token(3) == 8).all()
    assert counts.per_token(3).shape == (2, 2, 16)


def test_selection_and_tau_agree(dense, moe, teacher):
    model = DynamicVAR(dense, moe, (2, 3))
    by_tau = model(LABELS, teacher, tau=0.4)
    assert torch.equal(by_tau, model(LABELS, teacher, selection=Threshold(0.4)))
    for other in (Oracle(0.4), TopK(2)):
        assert not torch.equal(by_tau, model(LABELS, teacher, selection=other))


def test_which_scales_have_experts(dense, relu, moe):
    assert DynamicVAR(dense, moe, [3, 1, 3]).moe_scales == (1, 3)
    unsplit = DynamicVAR(dense, relu, (1, 3))
    assert (unsplit.moe_scales, unsplit.replaced_scales) == ((), (1, 3))


@pytest.mark.parametrize("moe_scales", [(), (4,), (-1, 2), (2, 7, 8)], ids=str)
def test_wrong_moe_scales_raise(dense, moe, moe_scales):
    with pytest.raises(ValueError, match=r"moe_scales=.* each must be within 0\.\.3"):
        DynamicVAR(dense, moe, moe_scales)


@pytest.mark.parametrize(
    ("name", "value"), [("depth", 3), ("num_classes", 4), ("patch_nums", (1, 2, 3, 5))]
)
def test_models_of_other_shapes_raise(dense, moe, name, value):
    other = VAR(replace(moe.config, **{name: value}))
    with pytest.raises(ValueError, match=name):
        DynamicVAR(dense, other, (3,))


@pytest.mark.parametrize("change", [-1, 1])
def test_teacher_input_of_another_length_raises(dense, moe, make_teacher, change):
    teacher = make_teacher(dense)
    teacher = teacher[:, :-1] if change < 0 else torch.cat([teacher, teacher[:, :1]], dim=1)
    with pytest.raises(ValueError, match="teacher_BLC"):
        DynamicVAR(dense, moe, (3,))(LABELS, teacher)


def test_forward_needs_no_context(dense, moe, teacher):
    model = DynamicVAR(dense, moe, (2, 3))
    expected = model(LABELS, teacher, tau=0.4)
    with torch.enable_grad():
        assert torch.equal(model(LABELS, teacher, tau=0.4), expected)


def test_all_experts_equal_the_unsplit_model_in_float64(dense, make_moe, teacher):
    """The logits themselves, head norm and head included."""
    relu = dense
    split, joined = DynamicVAR(dense, make_moe(relu), (2, 3)), DynamicVAR(dense, relu, (2, 3))
    logits = split.double()(LABELS, teacher.double(), tau=0.0)
    expected = joined.double()(LABELS, teacher.double())
    assert logits.dtype == torch.float64
    assert (logits - expected).abs().max() <= 1e-12 * expected.abs().max()
