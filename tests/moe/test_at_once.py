"""A layer in one call: the bits of its steps, and who still gets the steps."""

from __future__ import annotations

import pytest
import torch

from dmoe_var.errors import InputError
from dmoe_var.moe import at_once
from dmoe_var.moe.experts import RAN, auto, native
from dmoe_var.moe.layer import ExpertConfig, MoEFFN
from dmoe_var.moe.observer import Observer
from dmoe_var.moe.routing import Routing
from dmoe_var.moe.selection import LayerThreshold, Oracle, Threshold, TopK
from dmoe_var.sampling_time import sampling

pytestmark = pytest.mark.skipif(native.kernel() is None, reason="no C compiler here")
C, H, D = 40, 96, 12


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    """An empty table, which finds native the fastest."""
    monkeypatch.setenv("DMOE_VAR_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "known", {})
    monkeypatch.setattr(auto, "_measured", times(native=(1.0, 2.0), reference=(3.0, 3.0)))


def times(**seconds):
    """On lines from density 0.25 to 1; where all run each takes as long as at 1."""

    def found(name):
        start, end = seconds.get(name, (9.0, 9.0))
        return *(start + (end - start) * (d - 0.25) / 0.75 for d in auto.DENSITIES), end

    return lambda paths, *given: {name: found(name) for name in paths}


def made(dtype=torch.float32, size=D, **config):
    torch.manual_seed(0)
    ffn = MoEFFN(C, H, "relu", ExpertConfig(size, 16, **config), 3, 2).requires_grad_(False)
    for name, parameter in ffn.named_parameters():
        if "router" not in name:
            torch.nn.init.normal_(parameter)
    return ffn.to(dtype)


def tokens(B=4, L=9, dtype=torch.float32):
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_steps(ffn, x_BLC, routing, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dmoe_var.moe.layer.run_at_once", lambda *given: None)
        return ffn(x_BLC, routing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize(("impl", "size"), [("auto", D), ("native", D), ("auto", 2)])
def test_the_bits_of_the_steps(dtype, tau, sharing, impl, size, monkeypatch):
    """Also of a longer batch after a shorter one, through a view, and of experts packed as one."""
    ffn, routing = made(dtype, size), Routing(Threshold(tau), impl=impl, sharing=sharing)
    with sampling():
        for x_BLC in (tokens(dtype=dtype), tokens(8, 300, dtype), tokens(8, 18, dtype)[:, ::2]):
            before = RAN["native"]
            found = at_once.run(ffn, x_BLC, routing)
            assert found is not None
            assert RAN["native"] == before + 1
            assert torch.equal(found, ffn(x_BLC, routing))
            assert torch.equal(found, by_steps(ffn, x_BLC, routing, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype, set_threads):
    """Of the whole layer, and of router and threshold by themselves."""
    ffn, x_BLC = made(dtype), tokens(8, 90, dtype)
    found = []
    for number in (1, 2, 3, 7):
        set_threads(number)
        with sampling(), torch.no_grad():
            out = at_once.run(ffn, x_BLC, Routing(Threshold(0.3), impl="native"))
            assert out is not None
            scores = ffn.router(x_BLC)
        found.append((out, scores, native.threshold(scores.flatten(0, 1), 0.3)))
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_selection_by_itself(tau, sharing):
    ffn, routing = made(), Routing(Threshold(tau), sharing=sharing)
    with sampling():
        dispatch = at_once.select(ffn, tokens(), routing)
        assert dispatch is not None
        assert torch.equal(dispatch.mask_NE, ffn.select(tokens(), routing)[0].flatten(0, 1))
        assert at_once.select(ffn, tokens(), Routing(TopK(2))) is None
        with pytest.raises(InputError, match="score is not finite"):
            at_once.select(ffn, torch.nan * tokens(), Routing(Threshold(0.5)))


def test_a_tau_for_each_layer(monkeypatch):
    ffn, x_BLC = made(), tokens()
    rule = LayerThreshold((0.2, 0.9))
    with sampling():
        found = [at_once.run(ffn, x_BLC, Routing(rule).at(layer)) for layer in (0, 1)]
        for layer, out in enumerate(found):
            expected = by_steps(ffn, x_BLC, Routing(rule).at(layer), monkeypatch)
            assert torch.equal(out, expected)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    "routing",
    [
        Routing(Oracle(0.5)),
        Routing(TopK(2)),
        Routing(Threshold(0.5), impl="grouped"),
        Routing(Threshold(0.5), observer=Observer()),
        Routing(Threshold(0.5), scores_bLE=torch.rand(4, 9, H // D)),
        Routing(Threshold(0.5), means_KEC=torch.rand(1, H // D, C)),
    ],
    ids=["oracle", "top_k", "impl", "observer", "scores", "means"],
)
def test_what_goes_by_steps(routing):
    with sampling():
        assert at_once.run(made(), tokens(), routing) is None


def test_outside_of_sampling_and_under_autocast():
    ffn, routing = made(), Routing(Threshold(0.5))
    assert at_once.run(ffn, tokens(), routing) is None
    with sampling(), torch.autocast("cpu", torch.bfloat16):
        assert at_once.run(ffn, tokens(), routing) is None


def test_routers_and_activations_that_the_kernel_does_not_know(monkeypatch):
    routing = Routing(Threshold(0.5))
    gelu = MoEFFN(C, H, "gelu", ExpertConfig(D, 16)).requires_grad_(False)
    with sampling():
        assert at_once.run(made(router_condition="scale"), tokens(), routing) is None
        assert at_once.run(gelu, tokens(), routing) is None
        assert at_once.run(made(), tokens(0), routing) is None
    monkeypatch.setenv(native.SWITCH, "0")
    with sampling():
        assert at_once.run(made(), tokens(), routing) is None


@pytest.mark.parametrize("watched", ["router", "router.fc1", "router.fc2", "act"])
def test_a_hook_sees_what_it_wants(watched):
    ffn, seen = made(), []
    ffn.get_submodule(watched).register_forward_hook(lambda *given: seen.append(watched))
    with sampling():
        ffn(tokens(), Routing(Threshold(0.5)))
    assert seen


@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize(
    ("tau", "seconds", "path"),
    [
        (0.5, (1.0, 2.0), "native"),
        (0.5, (1.0, 5.0), "native"),
        (0.05, (1.0, 5.0), "reference"),  # they meet at 0.63
        (0.0, (1.0, 5.0), "reference"),
        (0.5, (4.0, 5.0), "reference"),
        (1.0, (2.9, 2.95), "native"),
    ],
)
def test_auto_runs_what_is_fastest_for_the_mask(
    tau, seconds, path, sharing, libraries, monkeypatch
):
    """To the bits of the steps, and without a router where every expert runs."""
    monkeypatch.setattr(auto, "_measured", times(native=seconds, reference=(3.0, 3.0)))
    ffn, routing = made(), Routing(Threshold(tau), sharing=sharing)
    with sampling():
        before = RAN.copy()
        found = at_once.run(ffn, tokens(), routing)
        assert RAN - before == {path: 1}
        assert torch.equal(found, by_steps(ffn, tokens(), routing, monkeypatch))
        if tau == 0:
            ffn.router.fc1.weight.fill_(torch.nan)
            assert torch.equal(at_once.run(ffn, tokens(), Routing(Threshold(tau))), found)


@pytest.mark.parametrize(
    "changed", [("router.fc2.weight",), ("b2_C",), ("router.fc1.weight", "w1_EDC")]
)
@pytest.mark.parametrize("router_first", [False, True])
def test_weights_that_change_between_two_samplings(changed, router_first, monkeypatch):
    """All are read in one call, or those that were not read before."""
    ffn, x_BLC, routing, read = made(), tokens(), Routing(Threshold(0.3)), []
    fingerprints = native.kernel().fingerprints
    monkeypatch.setattr(
        native.kernel(), "fingerprints", lambda w: read.append(len(w)) or fingerprints(w)
    )
    with sampling():
        before = ffn(x_BLC, routing)
        assert read == [6]
    for name in changed:
        ffn.get_parameter(name).data.neg_().add_(0.1)
    read.clear()
    with sampling():
        if router_first:
            ffn.router(x_BLC)
        after = at_once.run(ffn, x_BLC, routing)
        assert read == ([2, 4] if router_first else [6])
        assert torch.equal(after, by_steps(ffn, x_BLC, routing, monkeypatch))
    assert not torch.equal(before, after)


def test_a_path_is_looked_up_once_a_process(set_threads, monkeypatch):
    """For each shape and number of threads, whichever layer and time of sampling it is."""
    asked, by_density = [], auto.by_density
    monkeypatch.setattr(auto, "by_density", lambda *given: asked.append(1) or by_density(*given))
    for _ in range(2):
        with sampling():
            for x_BLC in (tokens(), tokens(8)):
                at_once.run(made(), x_BLC, Routing(Threshold(0.5)))
    assert len(asked) == 2
    set_threads(3)
    with sampling():
        at_once.run(made(), tokens(), Routing(Threshold(0.5)))
        assert len(asked) == 3
        at_once.run(made(torch.bfloat16), tokens(dtype=torch.bfloat16), Routing(Threshold(0.5)))
    assert len(asked) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("native_takes", [2.0, 4.0])
def test_scores_that_are_not_finite(value, native_takes, monkeypatch):
    taken = times(native=(native_takes, native_takes), reference=(3.0, 3.0))
    monkeypatch.setattr(auto, "_measured", taken)
    ffn, x_BLC = made(), tokens()
    x_BLC[1, 2, 3] = value
    with sampling(), pytest.raises(InputError, match="an expert's score is not finite"):
        at_once.run(ffn, x_BLC, Routing(Threshold(0.5)))
