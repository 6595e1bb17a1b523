"""`generate` and `count_flops` take numbers of numpy and torch, and refuse what has no meaning."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import torch
from watching import Scales

from dmoe_var import VAR, DynamicVAR, Threshold, TopK, count_flops, generate
from dmoe_var.errors import InputError
from dmoe_var.moe.selection import LayerThreshold

SMALL = {"top_k": 20, "top_p": 0.9}
TAU = [0.25, 0.5]


@pytest.fixture(scope="module")
def expected(tiny_models):
    return generate(*tiny_models, [1, 2, 3], cfg=2, seed=7, tau=TAU, **SMALL)


@pytest.mark.parametrize(
    "options",
    [
        {"tau": np.array(TAU), "labels": range(1, 4)},
        {"tau": (np.float16(0.25), torch.tensor(0.5)), "labels": np.array([1, 2, 3], np.uint16)},
        {"selection": (Threshold(np.float32(0.25)), LayerThreshold(np.array([0.5, 0.5])))},
        {"labels": [np.int8(1), torch.tensor(2), 3], "cfg": np.array([2])},
        {"cfg": torch.tensor(2.0), "seed": np.uint64(7), "top_k": np.int32(20)},
        {"seed": torch.tensor([7]), "top_p": np.float64(0.9), "start_index": np.int16(0)},
    ],
    ids=str,
)
def test_numbers_of_any_type_give_the_same_images(tiny_models, expected, options):
    given = {"labels": [1, 2, 3], "cfg": 2, "seed": 7, **SMALL, **options}
    if "selection" not in options:
        given.setdefault("tau", TAU)
    assert torch.equal(generate(*tiny_models, **given), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({"seed": seed}, "seed=.* whole number") for seed in (0.0, True, None)],
        *[({"labels": ls}, "labels=.* non-empty list") for ls in (3, [True], [], [[1]], [1.5])],
        ({"labels": np.array([0, 2**63], np.uint64)}, r"within 0\.\.5 .* got 0\.\.922337"),
        ({"labels": [-1]}, r"within 0\.\.5 .* got -1\.\.-1"),
        ({"labels": [0, 6]}, r"within 0\.\.5 .* got 0\.\.6"),
        ({"cfg": [1.0, 2.0]}, "cfg=.* has 2 values"),
        *[({"cfg": cfg}, "cfg=") for cfg in ("2", -1, np.inf)],
        *[({"top_k": k}, "top_k=") for k in (900.0, -1)],
        *[({"top_p": p}, "top_p=") for p in (1.5, np.nan)],
        *[({"start_index": i}, "start_index=") for i in (-1, 2**63)],
        *[({"tau": tau}, "tau=") for tau in ("0.3", True, [[0.1]], [0.1, np.nan], {0.1}, 1.5)],
        ({"tau": np.zeros(3)}, "tau has 3 values"),
        ({"tau": Threshold(0.2)}, "tau=Threshold"),
        ({"tau": 0.1, "selection": TopK(1)}, "both given"),
        *[({"selection": s}, "selection=.* must be a rule") for s in ("all", Threshold, [0.2])],
        ({"selection": TopK(9)}, "k=9"),
        ({"selection": LayerThreshold((0.1,) * 5)}, "5 layers, the model has fewer"),
        ({"selection": LayerThreshold((0.1,))}, "1 layers, the model has more"),
        *[({"impl": impl}, "impl=") for impl in (["grouped"], "fast")],
        ({"more_smooth": "no"}, "more_smooth="),
        ({"share_mask": 1.5}, "share_mask="),
        ({"generator": 3}, "generator=3"),
        ({"observer": True}, "observer=True"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused_before_any_work(tiny_models, monkeypatch, options, message):
    model, vqvae = tiny_models
    monkeypatch.setattr(VAR, "condition", lambda *_: pytest.fail("work has begun"))
    for call in (generate, count_flops):
        with pytest.raises(ValueError, match=message) as caught:
            call(model, vqvae, **{"labels": [1], **options})
        assert "\n" not in str(caught.value)


def test_the_models_are_checked(tiny_models, make_vqvae):
    model, vqvae = tiny_models
    with pytest.raises(ValueError, match="patch_nums"):
        generate(model, make_vqvae(patch_nums=(1, 2, 4)), [1])
    with pytest.raises(ValueError, match="no experts"):
        generate(model.dense, vqvae, [1], tau=0.1)
    with pytest.raises(ValueError, match="model is a VQVAE, but must be a VAR or DynamicVAR"):
        generate(vqvae, model, [1])
    with pytest.raises(ValueError, match="vqvae is a NoneType"):
        generate(model, None, [1])
    with pytest.raises(ValueError, match="model is on cpu, but the VQ-VAE is on meta"):
        generate(model, type(vqvae)(vqvae.config).to("meta"), [1])


# Modes, threads, gradients


def test_threads_draw_the_images_of_eval_mode_from_a_model_in_train_mode(make_var, make_vqvae):
    var, vqvae = make_var(drop_path=0.9), make_vqvae()
    seeds = range(8)
    expected = [generate(var, vqvae, [1, 2], seed=seed, **SMALL) for seed in seeds]
    var.train()
    var.blocks[1].attn.eval()
    modes = [module.training for module in var.modules()]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda s: generate(var, vqvae, [1, 2], seed=s, **SMALL), seeds))
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    assert [module.training for module in var.modules()] == modes


def test_teacher_forcing_over_a_cache_drops_nothing(make_var, make_moe, make_teacher):
    model = DynamicVAR(make_var(drop_path=0.9), make_moe(make_var(seed=1, drop_path=0.9)), (2, 3))
    teacher = make_teacher(model.dense)
    expected = model.eval()([1, 2], teacher)
    assert torch.equal(model.train()(np.array([1, 2]), teacher.numpy()), expected)


def test_images_are_plain_tensors(tiny_models, make_teacher):
    model, vqvae = tiny_models
    seen = []
    images = generate(model, vqvae, [1, 2], observer=Scales(lambda _, f: seen.append(f)), **SMALL)
    logits = model([1, 2], make_teacher(model.dense))
    for tensor in (images, *seen, logits):
        assert not tensor.requires_grad
        scale = torch.ones((), requires_grad=True)
        (tensor * scale).square().sum().backward()
        assert scale.grad.item() == pytest.approx(2 * tensor.square().sum().item(), rel=1e-5)
        tensor.mul_(2).requires_grad_()


def test_a_gradient_may_be_asked_for_while_images_are_drawn(tiny_models):
    """Through the whole decoder and a layer of the model, as a guidance loss does."""
    model, vqvae = tiny_models
    norms = []

    def on_scale(si, f_hat):
        with torch.enable_grad():
            f_hat = f_hat.clone().requires_grad_()
            loss = (
                vqvae.decode_f_hat(f_hat).mean()
                + model.dense.embed_scale(vqvae.quantize.next_input(f_hat, 1), 1).mean()
            )
            norms.append(torch.autograd.grad(loss, f_hat)[0].norm().item())

    generate(model, vqvae, [1], observer=Scales(on_scale), **SMALL)
    assert all(norm > 0 for norm in norms)


def test_logits_that_are_not_finite_are_an_error(make_var, make_vqvae):
    var = make_var()
    with torch.no_grad():
        var.head.bias[3] = float("inf")
    with pytest.raises(InputError, match="the logits of scale 0 are not finite"):
        generate(var, make_vqvae(), [1], **SMALL)


def test_scores_that_are_not_finite_are_an_error_unless_every_expert_runs(tiny_models):
    model, vqvae = tiny_models
    whole = generate(model, vqvae, [1], tau=0, **SMALL)
    broken = deepcopy(model)
    with torch.no_grad():
        broken.moe.blocks[1].ffn.router.fc2.weight[0] = float("nan")
    assert torch.equal(generate(broken, vqvae, [1], tau=0, **SMALL), whole)
    with pytest.raises(InputError, match="score is not finite"):
        generate(broken, vqvae, [1], tau=0.3, **SMALL)
