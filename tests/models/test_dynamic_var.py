"""Dense scales are the dense model's, MoE scales the expert model's, over one K/V cache."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import VAR, All, DynamicVAR, Oracle, Threshold, TopK, VARConfig, count_flops, generate
from dmoe_var.conversion.relufication import relufy
from dmoe_var.errors import InputError
from dmoe_var.models.dynamic_var import EMBEDDINGS
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.moe.selection import Cumulative, LayerThreshold, Random

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
    split, unsplit = DynamicVAR(dense, moe, moe_scales), DynamicVAR(dense, relu, moe_scales)
    with head_inputs(split.dense, split.moe) as split_h:
        split = split(LABELS, teacher, **options)
    with head_inputs(unsplit.dense, unsplit.moe) as unsplit_h:
        unsplit = unsplit(LABELS, teacher)
    assert len(split_h) == len(unsplit_h) == LAST + 1
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
    DynamicVAR(dense, moe, (1, 3))(LABELS, teacher, tau=[1.0, 0.0], observer=counts)
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


@pytest.mark.parametrize("scales", [(3, 1), [1, 3, 1]], ids=str)
def test_a_list_for_scales_in_another_order_is_refused(dense, moe, teacher, scales):
    """It would go to other scales than those it was written for."""
    model = DynamicVAR(dense, moe, scales)
    model(LABELS, teacher, tau=0.5)
    for options in ({"tau": [0.1, 0.9]}, {"selection": [TopK(1), TopK(2)]}):
        with pytest.raises(ValueError, match=r"moe_scales=\(.* in another order"):
            model(LABELS, teacher, **options)
    with pytest.raises(ValueError, match=r"selection .*moe_scales=\(.* in another order"):
        DynamicVAR(dense, moe, scales, [TopK(1), TopK(2)])


@pytest.mark.parametrize("scales", [3, "3", [True], [3.0], [[3]], None], ids=str)
def test_moe_scales_are_whole_numbers(dense, moe, scales):
    with pytest.raises(ValueError, match="moe_scales="):
        DynamicVAR(dense, moe, scales)


@pytest.mark.parametrize("taus", [(0.1,), (0.1,) * 5])
def test_a_tau_for_each_layer_and_no_more(dense, moe, taus):
    with pytest.raises(ValueError, match=r"taus=.* layers, the model has"):
        DynamicVAR(dense, moe, (2, 3), LayerThreshold(taus))


def compiled_once(model, *args, backend="eager", fullgraph=False, **options):
    torch.compiler.reset()
    return torch.compile(model, backend=backend, fullgraph=fullgraph)(*args, **options)


SLOW_BACKENDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")]


@pytest.mark.parametrize("backend", ["eager", *SLOW_BACKENDS])
def test_compiled(dense, moe, teacher, backend):
    """Into one graph, which counts the experts as well."""
    model = DynamicVAR(dense, moe, (2, 3))
    for options in ({}, {"tau": 0.4}):
        ours, theirs = ExpertCounts(), ExpertCounts()
        expected = model(LABELS, teacher, observer=theirs, **options)
        found = compiled_once(
            model, LABELS, teacher, backend=backend, fullgraph=True, observer=ours, **options
        )
        assert_close(found, expected, rtol=0, atol=1e-5)
        assert ours.scales == theirs.scales
        assert all(torch.equal(ours.per_token(si), theirs.per_token(si)) for si in ours.scales)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [TopK(2), Oracle(0.4), Cumulative(0.6), Random(2), LayerThreshold((0.2, 0.4)), All()],
    ids=str,
)
def test_rules_compiled(dense, moe, teacher, rule):
    model = DynamicVAR(dense, moe, (3,), rule).train()
    found = compiled_once(model, LABELS, teacher)
    model.eval()
    assert_close(found, model(LABELS, teacher), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_scores_that_are_not_finite_are_refused_compiled_too(dense, make_moe, relu, teacher):
    broken = make_moe(relu)
    broken.blocks[0].ffn.router.fc1.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="score is not finite"):
        compiled_once(DynamicVAR(dense, broken, (3,)), LABELS, teacher, tau=0.4)


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


def memory(model):
    """Bytes of a model's tensors, each place in memory counted once."""
    places = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
    return sum(places.values())


def places(model):
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


def names_held_once(model):
    """By address, whatever the model itself says."""
    dense, moe = places(model.dense), places(model.moe)
    return {name for name in moe if moe[name] == dense.get(name)}


@pytest.fixture
def tuned(make_var, make_moe):
    """Dense, its FFNs fine-tuned, and those as experts: the rest equals the dense model's."""
    dense = make_var(seed=0)
    relu = relufy(deepcopy(dense))
    for block in relu.blocks:
        for parameter in block.ffn.parameters():
            parameter.mul_(1.5)
    return dense, relu, make_moe(relu)


@pytest.mark.parametrize("split", [True, False], ids=["experts", "unsplit"])
def test_what_was_not_fine_tuned_is_held_once(tuned, split):
    dense, relu, experts = tuned
    moe = experts if split else relu
    model = DynamicVAR(dense, moe, (2, 3))
    rest = {name for name in moe.state_dict() if ".ffn." not in name}
    assert names_held_once(model) == rest == set(model.shared_names)
    own = sum(t.numel() * 4 for name, t in moe.state_dict().items() if name not in rest)
    assert memory(model) == memory(dense) + own
    assert len(list(model.parameters())) == len(list(dense.parameters())) + sum(
        ".ffn." in name for name, _ in moe.named_parameters()
    )
    prefixed = {f"dense.{n}" for n in dense.state_dict()} | {f"moe.{n}" for n in moe.state_dict()}
    assert set(model.state_dict()) == prefixed


def test_nothing_is_copied_and_neither_model_changes(tuned):
    dense, _, moe = tuned
    before = [places(dense), places(moe)]
    values = deepcopy([dense.state_dict(), moe.state_dict()])
    model = DynamicVAR(dense, moe, (2, 3))
    joined = places(model.moe)
    assert {p for n, p in joined.items() if ".ffn." in n} == {
        p for n, p in before[1].items() if ".ffn." in n
    }
    assert set(joined.values()) <= set(before[0].values()) | set(before[1].values())
    model.double()
    assert places(moe) == before[1]
    assert all(t.dtype in (torch.float32, torch.int64) for t in moe.state_dict().values())
    for now, then in zip((dense.float(), moe), values, strict=True):
        assert all(torch.equal(now.state_dict()[name], tensor) for name, tensor in then.items())


def test_embeddings_are_the_dense_models_whatever_the_other_holds(dense, moe):
    model = DynamicVAR(dense, moe, (2, 3))
    embeddings = {name for name in dense.state_dict() if name.startswith(EMBEDDINGS)}
    assert len(embeddings) == 8
    assert embeddings <= names_held_once(model)
    assert not torch.equal(moe.class_emb.weight, model.moe.class_emb.weight)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.half(),
        lambda model: model.to(torch.bfloat16).float(),
        lambda model: model.to("meta").to_empty(device="cpu"),
        deepcopy,
    ],
    ids=["float64", "half", "there and back", "device", "deepcopy"],
)
def test_conversions_keep_it_shared(tuned, convert):
    dense, _, moe = tuned
    model = DynamicVAR(dense, moe, (2, 3))
    names = names_held_once(model)
    assert {"attn_bias_for_masking", "blocks.0.attn.zero_k_bias", "lvl_1L"} <= names
    converted = convert(model)
    assert names_held_once(converted) == names
    for name in names:
        ours, theirs = (
            m.state_dict(keep_vars=True)[name] for m in (converted.dense, converted.moe)
        )
        assert ours is theirs
    kinds = {t.dtype for t in converted.state_dict().values() if t.is_floating_point()}
    assert len(kinds) == 1


def test_conversion_gives_the_same_logits_as_converting_first(tuned, teacher):
    dense, _, moe = tuned
    first = DynamicVAR(deepcopy(dense).double(), deepcopy(moe).double(), (2, 3))
    later = DynamicVAR(dense, moe, (2, 3)).double()
    assert torch.equal(first(LABELS, teacher, tau=0.4), later(LABELS, teacher, tau=0.4))


def test_equal_means_bit_by_bit(tuned):
    dense, relu, _ = tuned
    dense.head.bias[0], relu.head.bias[0] = 0.0, -0.0
    dense.blocks[0].attn.proj.bias[0] = relu.blocks[0].attn.proj.bias[0] = torch.nan
    held = names_held_once(DynamicVAR(dense, relu, (2, 3)))
    assert "head.bias" not in held
    assert {"head.weight", "blocks.0.attn.proj.bias"} <= held


def test_modes_and_gradients_stay(tuned):
    dense, _, moe = tuned
    dense.train()
    dense.head.requires_grad_(False)
    moe.eval()
    moe.blocks[1].ffn.train()
    moe.blocks[0].ffn.w1_EDC.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in moe.named_parameters()}
    model = DynamicVAR(dense, moe, (2, 3))
    assert {name: p.requires_grad for name, p in moe.named_parameters()} == flags
    assert model.dense.training
    assert [m.training for m in model.moe.modules()] == [m.training for m in moe.modules()]
    assert not model.moe.head.weight.requires_grad
    assert not model.moe.blocks[0].ffn.w1_EDC.requires_grad
    assert model.moe.blocks[1].ffn.w1_EDC.requires_grad
    assert model.moe.blocks[0].attn.proj.weight.requires_grad


def test_a_d16_with_fine_tuned_ffns_takes_1_46_of_the_dense_model():
    """Sizes of all tensors, on the meta device: what is not in an FFN is there once."""
    config = VARConfig(depth=16)
    with torch.device("meta"):
        dense = VAR(config)
        moe = VAR(replace(config, activation="relu", experts=ExpertConfig(128)))
    size = {n: t.numel() * t.element_size() for n, t in dense.state_dict().items()}
    own = [t.numel() * t.element_size() for n, t in moe.state_dict().items() if ".ffn." in n]
    neurons, width = 4 * 1024, 1024
    ffns = 16 * 4 * (2 * neurons * width + neurons + width)
    routers = 16 * 4 * (width * 128 + 128 * 32)
    assert sum(own) == ffns + routers
    ratio = 1 + sum(own) / sum(size.values())
    assert 1.43 < ratio <= 1.46


def test_two_values_for_what_is_held_once_raise(tuned):
    dense, _, moe = tuned
    model = DynamicVAR(dense, moe, (2, 3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    state["moe.head.bias"] += 1
    with pytest.raises(ValueError, match=r"head\.bias: held once"):
        model.load_state_dict(state)
    assert torch.equal(model.dense.head.bias, state["dense.head.bias"])


def test_a_model_runs_its_own_selection(dense, moe, teacher, make_vqvae):
    vqvae = make_vqvae().double()
    plain = DynamicVAR(dense, moe, (2, 3))
    model = DynamicVAR(dense, moe, (2, 3), selection=[Threshold(0.4), TopK(2)])
    given = {"selection": [Threshold(0.4), TopK(2)]}
    for run in (
        lambda m, **kw: m(LABELS, teacher, **kw),
        lambda m, **kw: generate(m, vqvae, LABELS, **kw),
    ):
        expected = run(plain, **given)
        assert torch.equal(run(model), expected)
        assert not torch.equal(run(plain), expected)
        assert torch.equal(run(model, selection=All()), run(plain))
        assert torch.equal(run(model, tau=0.9), run(plain, tau=0.9))
    counted = count_flops(model, vqvae, LABELS)
    assert counted.metrics() == count_flops(plain, vqvae, LABELS, **given).metrics()
    assert counted.total_gmac < count_flops(plain, vqvae, LABELS).total_gmac


def test_own_selection_can_be_set_and_is_checked(dense, relu, moe):
    model = DynamicVAR(dense, moe, (2, 3))
    assert model.selection is None
    model.selection = TopK(2)
    assert model.selection == TopK(2)
    with pytest.raises(ValueError, match="selection has 3 values"):
        model.selection = [TopK(2)] * 3
    assert model.selection == TopK(2)
    with pytest.raises(ValueError, match="no experts"):
        DynamicVAR(dense, relu, (2, 3), selection=TopK(2))
