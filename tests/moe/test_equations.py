"""DynamicVAR against its equations, written out in float64 from the weights of its two models.

No weight of the two models is the same. Legend: B batch, l tokens of a scale, C width, E experts,
H heads.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close
from watching import Scales

from dmoe_var import DynamicVAR, Oracle, Threshold, TopK, generate
from dmoe_var.moe.counts import ExpertCounts
from dmoe_var.moe.observer import joined
from dmoe_var.moe.selection import LayerThreshold

pytestmark = pytest.mark.usefixtures("no_grad")

FOUR_SCALES = (1, 2, 3, 4)
LABELS = torch.tensor([1, 4, 2])
NULL = 5
EXACT = {"rtol": 0, "atol": 1e-12}
BY_LAYER = [LayerThreshold((0.2, 0.8, 0.5)), LayerThreshold((0.7, 0.4, 0.1))]
CASES = {  # patch_nums, what a call is given, the rule of each scale of the second model
    "all experts": (FOUR_SCALES, {}, {3: None}),
    "a tau a scale": (FOUR_SCALES, {"tau": [0.3, 0.7]}, {2: Threshold(0.3), 3: Threshold(0.7)}),
    "dense between": (FOUR_SCALES, {"tau": 0.5}, {1: Threshold(0.5), 3: Threshold(0.5)}),
    "a tau a layer": (
        FOUR_SCALES,
        {"selection": BY_LAYER},
        dict(zip((2, 3), BY_LAYER, strict=True)),
    ),
    "other rules": (
        FOUR_SCALES,
        {"selection": [TopK(2), Oracle(0.5), TopK(5)]},
        {0: TopK(2), 2: Oracle(0.5), 3: TopK(5)},
    ),
    "four tokens first": ((2, 3, 4), {"tau": 0.4}, {1: Threshold(0.4)}),
}


def silu(x):
    return x * torch.sigmoid(x)


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def selected(rule, layer, predicted_BlE, norms_BlE):
    """Eq. 3, or the k largest scores; a bool a token and expert."""
    if rule is None:
        return torch.ones_like(predicted_BlE)
    if isinstance(rule, TopK):
        rank = (predicted_BlE[..., None, :] > predicted_BlE[..., None]).sum(-1)
        return rank < rule.k
    tau = rule.taus[layer] if isinstance(rule, LayerThreshold) else rule.tau
    scores = norms_BlE if isinstance(rule, Oracle) else predicted_BlE
    return scores >= tau * scores.max(-1, keepdim=True).values


class Equations:
    """The two models' weights by name; `dense` and `moe` are state dicts of float64."""

    def __init__(self, dense, moe, patch_nums, rules, num_heads):
        self.dense, self.moe = dense, moe
        self.patch_nums, self.rules, self.num_heads = patch_nums, rules, num_heads
        self.depth = len([name for name in dense if name.endswith("attn.proj.bias")])
        self.counts = {}

    def linear(self, weights, name, x):
        out = x @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def embed(self, si, labels, f_hat_BlC):
        start = sum(p * p for p in self.patch_nums[:si])
        where = slice(start, start + self.patch_nums[si] ** 2)
        places = self.dense["lvl_embed.weight"][si] + self.dense["pos_1LC"][:, where]
        if si == 0:
            return (
                self.dense["class_emb.weight"][labels][:, None] + self.dense["pos_start"] + places
            )
        return self.linear(self.dense, "word_embed", f_hat_BlC) + places

    def logits(self, si, labels, x, past):
        """Of one scale. `past` holds, by layer, the keys and values of all scales before it, each
        as the backbone of its scale wrote them, and is added to."""
        weights = self.moe if si in self.rules else self.dense
        cond = silu(self.dense["class_emb.weight"][labels])
        for i in range(self.depth):
            block = f"blocks.{i}."
            chunks = self.linear(weights, f"{block}ada_lin.1", cond).unflatten(-1, (6, -1))
            gamma1, gamma2, scale1, scale2, shift1, shift2 = chunks[:, None].unbind(2)
            h = norm(x) * (1 + scale1) + shift1
            x = x + gamma1 * self.attention(weights, f"{block}attn.", h, past[i])
            h = norm(x) * (1 + scale2) + shift2
            x = x + gamma2 * self.ffn(weights, f"{block}ffn.", h, si, i)
        scale, shift = self.linear(weights, "head_nm.ada_lin.1", cond)[:, None].chunk(2, dim=-1)
        return self.linear(weights, "head", norm(x) * (1 + scale) + shift)

    def attention(self, weights, prefix, h, past):
        q, k, v = self.linear(weights, f"{prefix}mat_qkv", h).chunk(3, dim=-1)
        q, v = q + weights[f"{prefix}q_bias"], v + weights[f"{prefix}v_bias"]
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        temperature = weights[f"{prefix}scale_mul_1H11"].clamp(max=math.log(100)).exp()
        past.append((unit(k), v))
        keys, values = (torch.cat(of_scales, dim=2) for of_scales in zip(*past, strict=True))
        shares = (temperature * unit(q) @ keys.mT).softmax(-1)
        return self.linear(weights, f"{prefix}proj", (shares @ values).transpose(1, 2).flatten(2))

    def ffn(self, weights, prefix, h, si, layer):
        if si not in self.rules:
            a = self.linear(weights, f"{prefix}fc1", h)
            a = a / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
            return self.linear(weights, f"{prefix}fc2", a)
        a = self.linear(weights, f"{prefix}router.fc1", h)
        a = a / 2 * (1 + torch.erf(a / math.sqrt(2)))
        predicted = self.linear(weights, f"{prefix}router.fc2", a).abs()
        experts = zip(
            *(weights[prefix + name] for name in ("w1_EDC", "b1_ED", "w2_EDC")), strict=True
        )
        outputs = [(h @ w1.T + b1).clamp(min=0) @ w2 for w1, b1, w2 in experts]
        norms = torch.stack([out.square().sum(-1).sqrt() for out in outputs], dim=-1)
        mask = selected(self.rules[si], layer, predicted, norms)
        self.counts.setdefault(si, []).append(mask.sum(-1))
        chosen = [out * mask[..., e, None] for e, out in enumerate(outputs)]
        return sum(chosen) + weights[f"{prefix}b2_C"]


@pytest.fixture(params=CASES)
def case(request, make_var, make_moe):
    """The model, what a call is given, and the equations."""
    patch_nums, given, rules = CASES[request.param]
    shape = {"depth": 3, "patch_nums": patch_nums}
    dense = make_var(seed=0, **shape).double()
    dense.blocks[1].attn.scale_mul_1H11.data[0, 0] = 6  # above the cap
    moe = make_moe(make_var(seed=1, activation="relu", **shape)).double()
    theirs, ours = ({k: t.clone() for k, t in m.state_dict().items()} for m in (dense, moe))
    same = {name for name in theirs if name in ours and torch.equal(theirs[name], ours[name])}
    assert all(name.endswith(("zero_k_bias", "lvl_1L", "masking")) for name in same)
    equations = Equations(theirs, ours, patch_nums, rules, dense.config.num_heads)
    return DynamicVAR(dense, moe, list(rules)), given, equations


def assert_counted(counts, equations):
    assert counts.scales == [si for si, rule in equations.rules.items() if rule]
    for si in counts.scales:
        assert_close(counts.per_token(si).long(), torch.stack(equations.counts[si]))


def teacher_forced(equations, teacher):
    """Logits (B, L, V), scale by scale."""
    inputs = [None, *teacher.split([p * p for p in equations.patch_nums[1:]], dim=1)]
    past = [[] for _ in range(equations.depth)]
    logits = [
        equations.logits(si, LABELS, equations.embed(si, LABELS, f_hat), past)
        for si, f_hat in enumerate(inputs)
    ]
    return torch.cat(logits, dim=1)


def test_teacher_forcing(case, make_teacher):
    """Over the cache, and of the dense model alone in one masked pass."""
    model, given, equations = case
    teacher, counts = make_teacher(model.dense, batch=3), ExpertCounts()
    logits = model(LABELS, teacher, observer=counts, **given)
    assert_close(logits, teacher_forced(equations, teacher), **EXACT)
    assert_counted(counts, equations)
    equations.rules = {}
    assert_close(model.dense(LABELS, teacher), teacher_forced(equations, teacher), **EXACT)


def test_greedy_sampling(case, make_vqvae):
    """Every scale's logits of both branches, and what is drawn of them."""
    model, given, equations = case
    vqvae = make_vqvae(patch_nums=equations.patch_nums).double()
    cfg, last = 3.0, len(equations.patch_nums) - 1
    labels = torch.cat([LABELS, torch.full_like(LABELS, NULL)])
    past, f_hat, read = [[] for _ in range(equations.depth)], 0, None
    expected_logits, expected_f_hats = [], []
    for si in range(last + 1):
        logits = equations.logits(si, labels, equations.embed(si, labels, read), past)
        expected_logits.append(logits)
        cond, null = logits.chunk(2)
        tokens = (cond + cfg * si / last * (cond - null)).argmax(-1)
        f_hat = f_hat + vqvae.quantize.spread(vqvae.quantize.lookup(tokens, si), si)
        expected_f_hats.append(f_hat)
        if si < last:
            read = vqvae.quantize.next_input(f_hat, si + 1).repeat(2, 1, 1)

    logits, f_hats, counts = [], [], ExpertCounts()
    hooks = [
        backbone.head.register_forward_hook(lambda _, __, out: logits.append(out.clone()))
        for backbone in (model.dense, model.moe)
    ]
    options = {"cfg": cfg, "top_k": 1, "impl": "reference", **given}
    observer = joined(counts, Scales(lambda _, drawn: f_hats.append(drawn.clone())))
    images = generate(model, vqvae, LABELS, observer=observer, **options)
    for hook in hooks:
        hook.remove()
    assert_close(logits, expected_logits, **EXACT)
    assert_close(f_hats, expected_f_hats, **EXACT)
    assert_close(images, (vqvae.decode_f_hat(f_hat) + 1) / 2, rtol=0, atol=1e-6)
    assert_counted(counts, equations)
