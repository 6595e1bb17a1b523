"""Dense scales are the dense model's, MoE scales the expert model's, over one K/V cache."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dmoe_var import VAR, All, DynamicVAR, Oracle, Threshold, TopK, VARConfig, generate
from dmoe_var.conversion.relufication import relufy
from dmoe_var.conversion.to_moe import convert_to_moe
from dmoe_var.errors import InputError
from dmoe_var.models.dynamic_var import EMBEDDINGS
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.layer import ExpertConfig
from dmoe_var.moe.selection import Cumulative, LayerThreshold, Random
from dmoe_var.sampling.sampler import Call

pytestmark = pytest.mark.usefixtures("no_grad")

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


@pytest.mark.parametrize("options", [{"tau": 0.0}, {}, {"tau": 0.0, "impl": "reference"}], ids=str)
def test_tau_0_is_the_unsplit_relu_model(dense, relu, moe, teacher, options):
    """What scales do is compared with the equations in tests/moe/test_equations.py."""
    split, unsplit = DynamicVAR(dense, moe, (0, 2)), DynamicVAR(dense, relu, (0, 2))
    assert_close(split(LABELS, teacher, **options), unsplit(LABELS, teacher), rtol=0, atol=1e-9)


def test_which_scales_have_experts(dense, relu, moe):
    assert DynamicVAR(dense, moe, [1, 3]).moe_scales == (1, 3)
    unsplit = DynamicVAR(dense, relu, (1, 3))
    assert (unsplit.moe_scales, unsplit.replaced_scales) == ((), (1, 3))


@pytest.mark.parametrize(
    "scales",
    [3, "3", [True], [3.0], [[3]], None, (), (4,), (-1, 2), (2, 7, 8), (3, 1), (1, 1)],
    ids=str,
)
def test_moe_scales_are_whole_numbers_that_rise(dense, moe, scales):
    with pytest.raises(ValueError, match="moe_scales="):
        DynamicVAR(dense, moe, scales)


def test_models_of_another_kind(dense, moe):
    for models, said in (
        ((moe, dense), "other way round"),
        ((None, moe), "^dense is a NoneType"),
        ((dense, DynamicVAR(dense, moe, (3,))), "^moe is a DynamicVAR, but must be a VAR"),
    ):
        with pytest.raises(ValueError, match=said):
            DynamicVAR(*models, (3,))
    for convert in (convert_to_moe, relufy):
        with pytest.raises(ValueError, match=r"^var is a NoneType, but must be a VAR"):
            convert(None)


@pytest.fixture(scope="module")
def small(make_var, make_moe):
    """small(selection) -> a model of two scales, soon compiled; the second has experts."""
    shape = {"patch_nums": (1, 2)}
    dense, relu = (make_var(seed, **shape).double() for seed in (0, 1))
    moe = make_moe(relufy(relu))
    return lambda selection=None: DynamicVAR(dense, moe, (1,), selection)


def compiled_once(model, *args, backend="eager", fullgraph=False, **options):
    torch.compiler.reset()
    return torch.compile(model, backend=backend, fullgraph=fullgraph)(*args, **options)


SLOW_BACKENDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor")]


@pytest.mark.parametrize("backend", ["eager", *SLOW_BACKENDS])
def test_compiled(small, make_teacher, backend):
    """Into one graph, which counts the experts as well."""
    model, ours, theirs = small(), ExpertCounts(), ExpertCounts()
    given = LABELS, make_teacher(model.dense)
    expected = model(*given, observer=theirs, tau=0.4)
    options = {"backend": backend, "fullgraph": True}
    found = compiled_once(model, *given, observer=ours, tau=0.4, **options)
    assert_close(found, expected, rtol=0, atol=1e-5)
    assert ours.scales == theirs.scales == [1]
    assert torch.equal(ours.per_token(1), theirs.per_token(1))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_traced(small, make_teacher, dtype):
    """By torch.jit, as fvcore counts operators."""
    model = deepcopy(small()).to(dtype).requires_grad_(False)
    teacher = make_teacher(model.dense).to(dtype)

    def run(given):
        return model(LABELS, given, tau=0.4)

    traced = torch.jit.trace(run, (teacher,), check_trace=False)
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    assert_close(traced(teacher), run(teacher), rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [TopK(2), Oracle(0.4), Cumulative(0.6), Random(2), LayerThreshold((0.2, 0.4)), All(), None],
    ids=str,
)
def test_rules_compiled(small, make_teacher, rule):
    model = small(selection=rule).train()
    given = LABELS, make_teacher(model.dense)
    found = compiled_once(model, *given)
    model.eval()
    assert_close(found, model(*given), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_scores_that_are_not_finite_are_refused_compiled_too(small, make_teacher):
    broken = deepcopy(small())
    broken.moe.blocks[0].ffn.router.fc1.weight.fill_(torch.nan)
    with pytest.raises(InputError, match="score is not finite"):
        compiled_once(broken, LABELS, make_teacher(broken.dense), tau=0.4)


@pytest.mark.parametrize(("name", "value"), [("depth", 3), ("patch_nums", (1, 2, 3, 5))])
def test_models_of_other_shapes_raise(dense, moe, name, value):
    other = VAR(replace(moe.config, **{name: value}))
    with pytest.raises(ValueError, match=name):
        DynamicVAR(dense, other, (3,))


def test_two_dtypes_raise_until_both_are_converted(dense, moe, teacher, make_vqvae):
    model = DynamicVAR(deepcopy(dense).bfloat16(), moe, (2, 3))
    line = "the dense model is in torch.bfloat16, the MoE model in torch.float64; convert both"
    with pytest.raises(ValueError, match=line):
        model([0, 1], teacher)
    with pytest.raises(ValueError, match=line):
        generate(model, make_vqvae().bfloat16(), [0, 1])
    assert model.float()([0, 1], teacher).isfinite().all()


def memory(model):
    """Bytes of a model's tensors, each place in memory counted once."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


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


def test_a_d16_with_fine_tuned_ffns_takes_1_44_of_the_dense_model():
    """Sizes of all tensors, on the meta device: what is not in an FFN is there once."""
    config = VARConfig(depth=16)
    with torch.device("meta"):
        dense = VAR(config)
        moe = VAR(replace(config, activation="relu", experts=ExpertConfig(128)))
    own = [t.nbytes for name, t in moe.state_dict().items() if ".ffn." in name]
    whole = sum(t.nbytes for t in dense.state_dict().values())
    assert 1 + sum(own) / whole == pytest.approx(1.44, abs=0.005)


def test_two_values_for_what_is_held_once_raise(tuned):
    dense, _, moe = tuned
    model = DynamicVAR(dense, moe, (2, 3))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    state["moe.head.bias"] += 1
    with pytest.raises(ValueError, match=r"head\.bias: held once"):
        model.load_state_dict(state)
    assert torch.equal(model.dense.head.bias, state["dense.head.bias"])


def test_what_is_assigned_is_shared_again(tuned):
    """All but what is given two values."""
    dense, _, moe = tuned
    model = DynamicVAR(dense, moe, (2, 3))
    shared, state = set(model.shared_names), model.state_dict()
    model.load_state_dict(state, assign=True)
    assert set(model.shared_names) == shared
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["moe.head.bias"] += 1
    model.load_state_dict(state, assign=True)
    assert set(model.shared_names) == shared - {"head.bias"}
    assert torch.equal(model.moe.head.bias, state["moe.head.bias"])


def test_a_model_runs_its_own_selection(dense, moe, teacher, make_vqvae):
    vqvae, rules = make_vqvae().double(), [Threshold(0.4), TopK(2)]
    plain, model = (DynamicVAR(dense, moe, (2, 3), selection) for selection in (None, rules))
    expected = plain(LABELS, teacher, selection=rules)
    assert torch.equal(model(LABELS, teacher), expected)
    assert not torch.equal(plain(LABELS, teacher), expected)
    assert torch.equal(model(LABELS, teacher, selection=All()), plain(LABELS, teacher))
    assert torch.equal(model(LABELS, teacher, tau=0.9), plain(LABELS, teacher, tau=0.9))
    images = generate(plain, vqvae, LABELS, selection=rules)
    assert torch.equal(generate(model, vqvae, LABELS), images)
    # What `count_flops` reads.
    assert Call.of(model, vqvae, LABELS).rules == dict(zip((2, 3), rules, strict=True))


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
