"""The compiled kernel: values against float64, and what bits may not depend on."""

from __future__ import annotations

import copy
import gc
import pickle
import platform
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from float64_experts import in_float64, layer, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from dmoe_var import c_library
from dmoe_var.moe.experts import RAN, ExpertWeights, native, packed, run_experts
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.router import Router
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import Threshold
from dmoe_var.ops import activation
from dmoe_var.sampling_time import sampling

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler here")
RELU = nn.ReLU()
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Relative error of the norm."""
# C width, E experts, D neurons of an expert
LAYERS = [
    (1, 1, 1),
    (12, 5, 3),
    (33, 12, 2),
    (64, 4, 8),
    (33, 7, 33),
    (96, 2, 48),
    (128, 4, 128),
    (1060, 2, 160),
]
"""Some fill no panel alone, and are packed beside each other. The last is wider, in both
directions, than what is multiplied in pairs at once."""


def masks(N, E):
    """By chance, none, all, one a token, few tokens of one expert."""
    draws = torch.rand(N, E, generator=torch.Generator().manual_seed(3))
    lone = torch.zeros(N, E, dtype=torch.bool)
    lone[::7, E // 2] = True
    one = torch.arange(N)[:, None] % E == torch.arange(E)
    return [draws < 0.6, draws < 0, draws < 2, one, lone, draws < draws[:, :1]]


def run(x, mask, weights):
    """By the kernel itself: no other path in its place."""
    assert native.can_run(x, weights, RELU)
    return run_experts(x, mask, weights, RELU, "native")


def close_to_float64(x, mask, weights):
    out, expected = run(x, mask, weights), in_float64(x, mask, weights)
    assert out.dtype == x.dtype
    assert (out - expected).norm() <= PRECISION[x.dtype] * expected.norm()


@pytest.fixture(params=["widened", "dot products", "AMX"])
def products(request, monkeypatch):
    """The ways to multiply bfloat16, as far as the processor knows them."""
    number = ["widened", "dot products", "AMX"].index(request.param)
    has_dots = torch.cpu._is_avx512_bf16_supported()
    if number > native.kernel().pairs or (number == 1 and not has_dots):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(native.kernel(), "pairs", number)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_values(products, sizes, dtype):
    """Over ragged numbers of tokens, of tiles, tasks and passes."""
    C, E, D = sizes
    weights = layer(C, E, D, dtype)
    for N in (1, 7, 256, 300) if C > 1000 else (1, 7, 9, 255, 256, 300, 2049):
        x = tokens(N, C, dtype)
        for mask in masks(N, E):
            close_to_float64(x, mask, weights)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other names")
@pytest.mark.parametrize("march", ["haswell", "x86-64"])
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("cached", [-1, native.CACHED])
def test_values_of_smaller_vectors(march, dtype, cached, monkeypatch):
    """AVX2's registers, and four lanes as NEON has them, whatever this processor has."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(c_library, "FLAGS", ("-O3", f"-march={march}", "-fPIC"))
    compiled = native._Kernel(c_library.load(native.SOURCE))
    assert compiled.lanes == {"haswell": 8, "x86-64": 4}[march]
    monkeypatch.setattr(native, "_compiled", lambda: compiled)
    monkeypatch.setattr(native, "CACHED", cached)
    for C, E, D in LAYERS[:-1]:
        weights = layer(C, E, D, dtype)
        for N in (1, 9, 300):
            x = tokens(N, C, dtype)
            for mask in masks(N, E):
                close_to_float64(x, mask, weights)


@pytest.mark.parametrize("dtype", [*PRECISION, torch.float64])
@pytest.mark.parametrize(
    "sizes",
    [(0, 3, 4), (5, 1, 1), (70, 7, 33), (300, 64, 8), (90, 9, 16), (50, 3, 32), (900, 5, 130)],
)
def test_reference_zeroes_what_does_not_run(sizes, dtype, set_threads, monkeypatch):
    """As a product with the mask does, whatever the threads; a hook of ReLU sees all of it."""
    N, E, D = sizes
    h_NED = torch.rand(N, E, D, dtype=torch.float64).to(dtype)
    x, weights, act = tokens(N, 24).to(dtype), layer(24, E, D), nn.ReLU()
    weights = ExpertWeights(*(each.to(dtype) for each in weights))
    for mask in masks(N, E):
        for threads in (1, 2, 5) if dtype in PRECISION else ():
            set_threads(threads)
            assert torch.equal(native.zeroed(h_NED.clone(), mask), h_NED * mask[..., None])
        expected = in_float64(x, mask, weights)
        out = run_experts(x, mask, weights, act, "reference")
        assert (out - expected).norm() <= PRECISION.get(dtype, 1e-12) * expected.norm()
    seen = []
    act.register_forward_hook(lambda module, given, out: seen.append((out, out.clone())))
    run_experts(x, torch.zeros(N, E, dtype=torch.bool), weights, act, "reference")
    assert all(torch.equal(*each) for each in seen)


class Keeping(nn.Module):
    """A ReLU whose output somebody keeps."""

    def forward(self, x):
        self.kept = F.relu(x)
        return self.kept


def test_who_else_holds_hidden_values_still_has_them():
    x, weights, keeping, seen = tokens(20, 24), layer(24, 4, 8), Keeping(), []
    hooked = nn.Sequential(nn.ReLU())
    hooked[0].register_forward_hook(lambda module, given, out: seen.append(out))
    for act in (keeping, hooked):
        run_experts(x, masks(20, 4)[0], weights, act, "reference")
    for held in (keeping.kept, *seen):
        expected = F.relu(x @ weights[0].flatten(0, 1).T + weights[1].flatten())
        torch.testing.assert_close(held, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_forward_derivatives(impl):
    """Tangents that grouped has, no other path loses."""
    x, weights, mask = tokens(20, 24), layer(24, 4, 8), masks(20, 4)[0]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        found, expected = (
            forward_ad.unpack_dual(run_experts(dual, mask, weights, RELU, each)).tangent
            for each in (impl, "grouped")
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_fake_tensors_outside_of_their_mode(impl):
    with FakeTensorMode():
        x, weights = tokens(20, 24), layer(24, 4, 8)
        mask = torch.empty(20, 4, dtype=torch.bool)
    with torch.no_grad():
        assert run_experts(x, mask, weights, RELU, impl).shape == (20, 24)


def test_no_tokens():
    assert run(tokens(0, 12), torch.ones(0, 5, dtype=torch.bool), layer(12, 5, 3)).shape == (0, 12)


def test_tokens_that_do_not_lie_beside_each_other():
    weights, wide = layer(12, 5, 3), tokens(20, 24)
    mask = masks(5, 20)[0].T
    expected = run(wide[:, ::2].contiguous(), mask.contiguous(), weights)
    assert torch.equal(run(wide[:, ::2], mask, weights), expected)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", [(130, 6, 40), (130, 6, 5)], ids=str)
def test_bits_depend_neither_on_threads_nor_on_other_tokens(products, sizes, dtype, set_threads):
    N, (C, E, D) = 700, sizes
    x, mask, weights = tokens(N, C, dtype), masks(N, E)[0], layer(C, E, D, dtype)
    found = []
    for number in (1, 2, 3, 7):
        set_threads(number)
        found += [run(x, mask, weights) for _ in range(3)]
    assert all(torch.equal(out, found[0]) for out in found)
    some = torch.arange(3, N, 5)
    assert torch.equal(run(x[some], mask[some], weights), found[0][some])


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_memory_asked_early_changes_no_bit(products, sizes, dtype, set_threads, monkeypatch):
    """Bits stay the same where the next expert has no tokens, where there is none, and where other
    threads take them."""
    kept = layer(*sizes, dtype)
    monkeypatch.setattr(native, "CACHED", -1)
    streamed = ExpertWeights(*(weight.clone() for weight in kept))
    assert native.pack(streamed).layer.streamed
    for N in (9, 300):
        x = tokens(N, sizes[0], dtype)
        for mask in masks(N, sizes[1]):
            for number in (1, 2, 5):
                set_threads(number)
                with monkeypatch.context() as patch:
                    patch.setattr(native, "CACHED", 1 << 40)
                    assert not native.pack(kept).layer.streamed
                    expected = run(x, mask, kept)
                assert torch.equal(run(x, mask, streamed), expected)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", [(64, 3, 24), (130, 4, 64), (192, 3, 130)], ids=str)
def test_zeros_are_left_out_and_no_bit_changes(dtype, sizes, monkeypatch):
    """Of rows with no zero, many, and nothing else, beside each other; -0 counts as 0."""
    monkeypatch.setattr(native.kernel(), "pairs", 0)
    (C, E, D), N = sizes, 301
    w1, b1, w2, b2 = layer(C, E, D)
    b1[0] += torch.linspace(-60, 60, D)
    b1[1] = 1e4
    b1[2] = -1e4
    x = tokens(N, C, dtype) * torch.logspace(-2, 1, N)[:, None].to(dtype)
    weights = ExpertWeights(*(w.to(dtype) for w in (w1, b1, w2, b2)))
    for mask in masks(N, E):
        with sampling():
            found = run(x, mask, weights)
            reading = native.kernel().fingerprints
            (kept,) = packed.packed_of((weights, native.pack), fingerprints=reading)
            assert kept.layer.finite
            kept.layer.finite = 0  # as if a product of 0 could be another value
            assert torch.equal(run(x, mask, weights), found)
            kept.layer.finite = 1
        close_to_float64(x, mask, weights)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_products_of_0_and_what_is_not_finite(value):
    """NaN, as dense: for tokens whose hidden value is 0 too."""
    x, weights = tokens(9, 64), layer(64, 2, 8)
    weights.b1_ED[1] = -1e4
    weights.w2_EDC[1, 3, 5] = value
    out = run(x, torch.ones(9, 2, dtype=torch.bool), weights)
    assert out[:, 5].isnan().all()
    out[:, 5] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", PRECISION)
def test_small_experts_are_packed_as_one(products, dtype):
    """As many as fill a register, or a tile of pairs, and divide all of them. One that does not run
    beside one that does adds nothing: no hidden value that is not finite, and no weight of fc2."""
    C, E, D = 40, 6, 2
    x, weights, mask = tokens(99, C, dtype), layer(C, E, D, dtype), masks(99, E)[0]
    columns = native.kernel().tile if native.pack(weights).layer.pairs else native.kernel().lanes
    of_two, of_five = {4: (2, 1), 8: (3, 1), 16: (6, 3), 32: (6, 6)}[columns]
    by_size = {2: of_two, 5: of_five, columns // 2: 2, columns: 1, columns + 1: 1}
    for size, members in by_size.items():
        assert native.pack(layer(C, E, size, dtype)).layer.members == members
    mask[:, 1] = False
    expected = run(x, mask, weights)
    close_to_float64(x, mask, weights)
    weights.w1_EDC[1, 1, 7] = weights.b1_ED[1, 0] = torch.inf
    assert torch.equal(run(x, mask, weights), expected)
    weights.w2_EDC[1] = torch.nan
    assert native.pack(weights).layer.members == 1
    torch.testing.assert_close(run(x, mask, weights), expected)


def test_what_is_not_finite_stays_in_its_token():
    x, weights = tokens(9, 12), layer(12, 5, 3)
    x[4, 0] = torch.nan
    out = run(x, torch.ones(9, 5, dtype=torch.bool), weights)
    assert out.isnan().all(1).tolist() == [token == 4 for token in range(9)]


def written_in_place(ffn):
    with torch.no_grad():
        ffn.w2_EDC.mul_(2)


def through_another_dtype(ffn):
    """There and back: other values, possibly where the old ones were."""
    ffn.to(torch.bfloat16).to(torch.float32)


def replaced_memory(ffn):
    ffn.w1_EDC.data = -ffn.w1_EDC.data


def replaced_parameter(ffn):
    ffn.b2_C = nn.Parameter(torch.ones_like(ffn.b2_C), requires_grad=False)


def trained(ffn):
    """By what trains here: torch counts none of a fused optimiser's writes."""
    parameter = ffn.requires_grad_(True).w1_EDC
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5, fused=True).step()
    ffn.requires_grad_(False)


def written_by_numpy(ffn):
    ffn.w2_EDC.numpy()[:] *= 2


def two_neurons_swapped(ffn):
    """The same values in another order."""
    ffn.w1_EDC.data[0, [0, 1]] = ffn.w1_EDC.data[0, [1, 0]]


def loaded(ffn):
    ffn.load_state_dict({name: -values for name, values in ffn.state_dict().items()})


def assigned(ffn):
    given = {name: -values for name, values in ffn.state_dict().items()}
    ffn.load_state_dict(given, assign=True)


CHANGES = [
    written_in_place, through_another_dtype, replaced_memory, replaced_parameter, trained,
    written_by_numpy, two_neurons_swapped, loaded, assigned,
]  # fmt: skip


@pytest.fixture
def ffn():
    made = MoEFFN(32, 64, "relu", ExpertConfig(expert_size=16)).requires_grad_(False)
    for parameter, values in zip(made.weights, layer(32, 4, 16), strict=True):
        parameter.copy_(values)
    return made


@pytest.mark.parametrize("time", [nullcontext, sampling])
@pytest.mark.parametrize("change", CHANGES)
def test_packed_weights_follow_the_weights(ffn, change, time):
    """Whether drawn in `sampling` or not, before and after."""
    x, mask = tokens(20, 32), masks(20, 4)[0]
    with time():
        before = run(x, mask, ffn.weights)
    change(ffn)
    with time():
        close_to_float64(x, mask, ffn.weights)
        assert not torch.equal(run(x, mask, ffn.weights), before)


def test_writes_that_torch_counts_are_seen_within_sampling(ffn):
    x, mask = tokens(20, 32), masks(20, 4)[0]
    with sampling():
        before = run(x, mask, ffn.weights)
        written_in_place(ffn)
        close_to_float64(x, mask, ffn.weights)
        assert not torch.equal(run(x, mask, ffn.weights), before)


def test_packed_weights_are_made_once_and_go_with_the_weights(ffn, monkeypatch):
    """And their content is read once for each time of `sampling`."""
    x, mask, made, read = tokens(20, 32), masks(20, 4)[0], [], []
    pack, kernel = native.pack, native.kernel()
    fingerprints = kernel.fingerprints
    monkeypatch.setattr(native, "pack", lambda weights: made.append(pack(weights)) or made[-1])
    monkeypatch.setattr(kernel, "fingerprints", lambda w: read.append(w) or fingerprints(w))
    for _ in range(2):
        with sampling():
            run(x, mask, ffn.weights)
            run(x, mask, ffn.weights)
    assert (len(made), len(read)) == (1, 2)
    assert sum(t.nbytes for t in made[0].tensors) >= sum(w.nbytes for w in ffn.weights)
    run(x, mask, ffn.weights)
    assert (len(made), len(read)) == (1, 3)
    place, before = ffn.w1_EDC, len(packed._kept)
    assert place in packed._kept
    ffn.w1_EDC = nn.Parameter(torch.zeros_like(place), requires_grad=False)
    del place
    read.clear()
    gc.collect()
    assert len(packed._kept) == before - 1


def test_a_model_that_is_cast_or_moved_drops_its_packed_weights(ffn):
    run(tokens(20, 32), masks(20, 4)[0], ffn.weights)
    place = ffn.w1_EDC
    assert place in packed._kept
    ffn.to(torch.bfloat16)
    assert place not in packed._kept


def fingerprint_of_one(values):
    (found,) = native.kernel().fingerprints([values])
    return found


def test_fingerprints_are_of_each_tensor(set_threads):
    """Whatever is read beside it, and whether it lies in one piece."""
    fingerprints = native.kernel().fingerprints
    a, b, c = torch.randn(70_000), torch.randn(2, 30)[:, ::2], torch.randn(40_000)
    none = torch.empty(0)
    for number in (1, 2, 5):
        set_threads(number)
        alone = [fingerprint_of_one(each.clone()) for each in (a, none, b, c)]
        assert fingerprints([a, none, b, c]) == alone
        assert fingerprints([c, a]) == [alone[3], alone[0]]
    assert len(set(alone)) == 4
    assert fingerprints([]) == []


@pytest.mark.parametrize("number", [1, 16, 17, 1 << 14, (1 << 16) + 5, 300_001])
def test_a_fingerprint_is_of_every_value_and_of_their_order(number, set_threads):
    """Whatever the number of threads."""
    fingerprint = fingerprint_of_one
    values = torch.randn(number, generator=torch.Generator().manual_seed(0))
    found = {fingerprint(values)}
    for count in (1, 2, 3):
        set_threads(count)
        assert {fingerprint(values.clone())} == found
    places = {0, number // 3, number // 2, number - 1}
    for place in places:
        changed = values.clone()
        changed[place] = -changed[place]
        found.add(fingerprint(changed))
    for place in places - {number - 1}:
        swapped = values.clone()
        swapped[[place, number - 1]] = values[[number - 1, place]]
        found.add(fingerprint(swapped))
    found.add(fingerprint(values[:-1]))
    assert len(found) == 1 + 1 + 2 * len(places) - 1


@pytest.mark.parametrize("apart", [1, 2, 3, 16, 63, 64, 65, 128, 1 << 14])
def test_a_fingerprint_tells_values_apart_that_change_places(apart):
    """In a word, from chain to chain, along a chain, and from piece to piece."""
    fingerprint = fingerprint_of_one
    values = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    swapped = values.clone()
    swapped[[5, 5 + apart]] = values[[5 + apart, 5]]
    assert fingerprint(swapped) != fingerprint(values)


def test_a_copy_that_another_thread_drops_is_still_used(ffn, monkeypatch):
    """While a further part is packed."""
    router = [torch.randn(8, 32), torch.randn(4, 8)]
    pack, pack_router = native.pack, native._pack_router

    def dropping(weights):
        packed.forget(router)
        return pack(weights)

    parts = (router, pack_router), (ffn.weights, dropping)
    fingerprints = native.kernel().fingerprints
    first, second = packed.packed_of(*parts, fingerprints=fingerprints)
    assert torch.equal(first.tensors[0], pack_router(router).tensors[0])
    assert torch.equal(second.tensors[0], pack(ffn.weights).tensors[0])


def through_pickle(ffn):
    """As a model goes to another process, by ourselves."""
    return pickle.loads(pickle.dumps(ffn))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_pack_their_own(ffn, copied):
    x, mask = tokens(20, 32), masks(20, 4)[0]
    expected, other = run(x, mask, ffn.weights), copied(ffn)
    assert torch.equal(run(x, mask, other.weights), expected)
    written_in_place(other)
    close_to_float64(x, mask, other.weights)
    assert torch.equal(run(x, mask, ffn.weights), expected)


def test_weights_of_inference_mode_are_not_kept():
    """Their writes are not counted."""
    x, mask = tokens(20, 12), masks(20, 5)[0]
    with torch.inference_mode():
        weights = layer(12, 5, 3)
        run(x, mask, weights)
        weights.w1_EDC.neg_()
        close_to_float64(x, mask, weights)


def test_what_the_kernel_does_not_know_is_run_by_grouped(monkeypatch):
    x, mask, weights = tokens(9, 12), masks(9, 5)[0], layer(12, 5, 3)
    double = ExpertWeights(*(w.double() for w in weights))
    learning = weights._replace(w1_EDC=weights.w1_EDC.clone().requires_grad_())
    cases = [
        (x, weights, nn.GELU(approximate="tanh")),
        (x.double(), double, RELU),
        (x.half(), ExpertWeights(*(w.half() for w in weights)), RELU),
        (x, learning, RELU),
        (x.clone().requires_grad_(), weights, RELU),
    ]
    for given in cases:
        assert not native.can_run(*given)
        before = RAN["grouped"]
        out = run_experts(given[0], mask, *given[1:], "native")
        assert RAN["grouped"] == before + 1
        assert torch.equal(out, run_experts(given[0], mask, *given[1:], "grouped"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.can_run(x, weights, RELU)
    with torch.no_grad():
        assert native.can_run(x, learning, RELU)
    monkeypatch.setenv(native.SWITCH, "0")
    assert not native.can_run(x, weights, RELU)


def test_tensors_that_do_not_fit_are_torch_s_to_refuse():
    """The kernel would read past their ends."""
    x, mask, weights = tokens(9, 12), masks(9, 5)[0], layer(12, 5, 3)
    router = Router(12, 4, 5)
    elsewhere = ExpertWeights(*(w.to("meta") for w in weights))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes|size"):
        run_experts(x[:, :8], mask, weights, RELU, "native")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes|size"):
        router(x[None, :, :8])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"meta|device"):
        run_experts(x, mask, elsewhere, RELU, "native")


@torch.no_grad()
def test_a_router_that_is_too_wide_for_the_stack_is_torch_s():
    router, x = Router(8, native.WIDEST + 1, 4), tokens(3, 8)[None]
    assert not native.knows_router(x, router.fc1.weight, router.fc2.weight)
    expected = router.fc2(F.gelu(router.fc1(x))).abs()
    assert torch.equal(router(x), expected)


@torch.no_grad()
def test_under_torch_func(ffn):
    x = tokens(6, 32)[:, None]
    found = torch.func.vmap(ffn.router)(x)
    torch.testing.assert_close(found, ffn.router(x))


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("sizes", [(64, 4, 40), (64, 3, 16), (96, 2, 3), (64, 1, 100)], ids=str)
def test_an_infinite_token_reaches_no_weights_of_others(products, sizes, dtype):
    """ReLU of -inf is 0 in every neuron, so the token gets b2; padded neurons would give NaN."""
    C, E, D = sizes
    w1, b1, w2, b2 = layer(C, E, D, dtype)
    w1 = -w1.abs() - 1
    x = tokens(9, C, dtype)
    x[4] = 0
    x[4, 0] = torch.inf
    weights = ExpertWeights(w1, b1, w2, b2)
    mask = torch.ones(9, E, dtype=torch.bool)
    out = run(x, mask, weights)
    assert torch.equal(out[4], b2)
    others = [*range(4), *range(5, 9)]
    assert torch.equal(out[others], run(x[others], mask[others], weights))


def test_a_hook_sees_the_activation():
    weights, seen, act = layer(12, 5, 3), [], activation("relu")
    act.register_forward_hook(lambda *given: seen.append(given))
    run_experts(tokens(9, 12), masks(9, 5)[0], weights, act, "native")
    assert seen


@torch.no_grad()
def test_under_torch_compile(ffn):
    """As one operator, without a break."""
    x = tokens(20, 32)[None]
    routing = Routing(Threshold(0.5), impl="native")
    compiled = torch.compile(ffn, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, routing), ffn(x, routing))
