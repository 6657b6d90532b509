"""The mathematics against closed forms, in float64. Expected numbers are written by hand."""

import itertools
import math

import pytest
import torch

from model import token_entropy
from omni_grpo import (
    Config,
    group_advantages,
    grpo_loss,
    importance_ratio,
    kl_k3,
    loss_weights,
    policy_loss,
    sample_tokens,
)

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# ---- advantages


@pytest.mark.parametrize("g", [4, 8])
def test_k_of_g_correct(g):
    """p = k/G: A = sqrt((1-p)/p) for the correct, -sqrt(p/(1-p)) for the others."""
    for k in range(1, g):
        adv = group_advantages(torch.tensor([[1.0] * k + [0.0] * (g - k)], dtype=F64), eps=0.0)[0]
        p = k / g
        torch.testing.assert_close(adv[:k], torch.full((k,), math.sqrt((1 - p) / p), dtype=F64))
        torch.testing.assert_close(adv[k:], torch.full((g - k,), -math.sqrt(p / (1 - p)), dtype=F64))


def test_uniform_group_is_exactly_zero():
    for value in torch.linspace(0, 3, 61).tolist():
        for g in (2, 3, 7, 8, 12, 32):
            rewards = torch.full((1, g), value, dtype=torch.float32)
            assert group_advantages(rewards, eps=1e-12).abs().max().item() == 0.0


def test_nearly_uniform_group_is_nearly_zero():
    """Weighted reward parts add up differently by rounding; without eps this would be +-1."""
    assert group_advantages(torch.tensor([[0.3, 0.1 + 0.2]], dtype=F64)).abs().max() < 1e-6


def test_advantage_invariances():
    r = torch.rand(3, 8, dtype=F64)
    adv = group_advantages(r, eps=0.0)
    torch.testing.assert_close(group_advantages(5 * r - 2, eps=0.0), adv)
    torch.testing.assert_close(adv.sum(1), torch.zeros(3, dtype=F64), atol=1e-12, rtol=0)
    other = r.clone()
    other[1] = 7 * torch.rand(8, dtype=F64)
    torch.testing.assert_close(group_advantages(other)[[0, 2]], group_advantages(r)[[0, 2]])
    order = torch.randperm(8)
    torch.testing.assert_close(group_advantages(r[:, order]), group_advantages(r)[:, order])


def test_scale_none_is_the_centred_reward():
    adv = group_advantages(tensor(1.0, 0.0, 0.0, 0.0)[None], scale="none")[0]
    assert adv.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_advantages_leave_rewards_alone():
    r = torch.rand(2, 4)
    before = r.clone()
    group_advantages(r)
    assert torch.equal(r, before)


# ---- the surrogate


def test_clip_quadrants():
    """eps = 0.2 / 0.28, ratio 0.5, 1, 1.5: value and gradient for A = +1 and A = -1."""
    for a, losses, grads in [
        (1.0, [-0.5, -1.0, -1.28], [-1.0, -1.0, 0.0]),
        (-1.0, [0.8, 1.0, 1.5], [0.0, 1.0, 1.0]),
    ]:
        for value, loss_expected, grad_expected in zip([0.5, 1.0, 1.5], losses, grads):
            ratio = tensor(value).requires_grad_()
            loss = policy_loss(ratio, tensor(a), tensor(1.0), 0.2, 0.28)
            loss.backward()
            assert loss.item() == pytest.approx(loss_expected)
            assert ratio.grad.item() == pytest.approx(grad_expected)


def test_on_policy_gradient_is_the_policy_gradient():
    """ratio = 1: dL/dlogp = -w A exactly; with sum A = 0 and equal weights the value is 0."""
    logp = torch.randn(6, dtype=F64).requires_grad_()
    adv, w = tensor(1, -1, 2, -2, 0.5, -0.5), torch.full((6,), 1 / 6, dtype=F64)
    ratio = importance_ratio(logp, logp.detach(), torch.arange(6), "token")
    loss = policy_loss(ratio, adv, w, 0.2, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(logp.grad, -w * adv)


def test_sequence_ratio_is_the_geometric_mean():
    """GSPO: rows (log ratios 0.1, 0.3) and (-0.4): ratios exp 0.2, exp 0.2, exp -0.4."""
    ratio = importance_ratio(tensor(0.1, 0.3, -0.4), tensor(0, 0, 0), torch.tensor([2, 2, 5]), "sequence")
    torch.testing.assert_close(ratio, tensor(math.exp(0.2), math.exp(0.2), math.exp(-0.4)))
    ratio = importance_ratio(tensor(0.1, 0.3, -0.4), tensor(0, 0, 0), torch.tensor([2, 2, 5]), "token")
    torch.testing.assert_close(ratio, tensor(math.exp(0.1), math.exp(0.3), math.exp(-0.4)))


@pytest.mark.parametrize("reduce, expected", [("sequence", 1.5), ("token", 10 / 6), ("constant", 10 / 16)])
def test_reductions(reduce, expected):
    """Rows of 2 and 4 tokens costing 1 and 2 a token; constant with at most 8 tokens."""
    lengths, cost = torch.tensor([2, 4]), torch.tensor([1.0, 2.0])
    weight = loss_weights(lengths, reduce, 8)
    assert (weight * lengths * cost).sum().item() == pytest.approx(expected)


def test_empty_row_weighs_nothing():
    for reduce in ("sequence", "token", "constant"):
        assert loss_weights(torch.tensor([0, 3]), reduce, 8)[0] == 0


def test_k3():
    """Never negative, 0 at equality, and E_p[k3] = KL(p || q) exactly over a vocabulary of seven."""
    p, q = torch.randn(7, dtype=F64).log_softmax(0), torch.randn(7, dtype=F64).log_softmax(0)
    k3 = torch.expm1(q - p) - (q - p)
    torch.testing.assert_close(kl_k3(p, q).double(), k3, rtol=1e-5, atol=1e-7)
    assert (kl_k3(p, q) >= 0).all()
    assert kl_k3(p, p).abs().max() == 0
    assert (p.exp() * kl_k3(p, q)).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)
    assert kl_k3(tensor(-100.0), tensor(0.0)).isfinite().all()
    assert kl_k3(tensor(0.0), tensor(1e-4)).item() == pytest.approx(0.5e-8, rel=1e-2)


def test_the_loss_is_surrogate_plus_beta_kl():
    """Two tokens with weights 1/2: -(1 * 1 - 1 * 1) / 2 + beta * mean of k3(-0.5)."""
    logp = tensor(-1.0, -2.0).requires_grad_()
    row, weight, adv = torch.tensor([0, 1]), tensor(0.5, 0.5), tensor(1.0, -1.0)
    k3 = math.exp(-0.5) - 1 + 0.5
    for beta in (0.0, 0.5):
        cfg = Config(beta=beta)
        loss, ratio = grpo_loss(logp, logp.detach(), logp.detach() - 0.5, adv, weight, row, cfg)
        assert ratio.tolist() == [1.0, 1.0] and loss.item() == pytest.approx(beta * k3)
        (grad,) = torch.autograd.grad(loss, logp)
        kl_grad = 1 - math.exp(-0.5)  # of k3 by logp
        assert grad.tolist() == pytest.approx([0.5 * (-1 + beta * kl_grad), 0.5 * (1 + beta * kl_grad)])
    assert grpo_loss(logp, logp.detach(), None, adv, weight, row, Config(beta=0.0))[0].item() == 0


def test_entropy():
    assert token_entropy(torch.zeros(1, 8, dtype=F64).log_softmax(-1)).item() == pytest.approx(math.log(8))


def test_the_estimator_is_the_policy_gradient():
    """A softmax bandit with 3 arms and G = 3, all 27 groups enumerated: E[grad(-L)] = (1 - 1/G) grad J
    (scale none)."""
    theta, arm_reward, g = tensor(0.3, -0.2, 0.5).requires_grad_(), tensor(1.0, 0.0, 0.4), 3
    logits = theta.log_softmax(0)
    (grad_j,) = torch.autograd.grad((logits.exp() * arm_reward).sum(), theta, retain_graph=True)
    total = torch.zeros(3, dtype=F64)
    for arms in itertools.product(range(3), repeat=g):
        arms = torch.tensor(arms)
        logp = theta.log_softmax(0)[arms]
        adv = group_advantages(arm_reward[arms][None], scale="none")[0]
        weight = loss_weights(torch.ones(g, dtype=torch.long), "sequence", 1).double()
        ratio = importance_ratio(logp, logp.detach(), torch.arange(g), "token")
        (grad,) = torch.autograd.grad(-policy_loss(ratio, adv, weight, 0.2, 0.2), theta)
        total += logp.detach().sum().exp() * grad
    torch.testing.assert_close(total, (1 - 1 / g) * grad_j, rtol=1e-6, atol=1e-9)


def test_it_learns_a_bandit():
    torch.manual_seed(0)
    theta = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.0)
    for _ in range(200):
        arms = torch.multinomial(theta.softmax(0), 8, replacement=True)
        logp = theta.log_softmax(0)[arms]
        adv = group_advantages((arms == 1).double()[None])[0]
        ratio = importance_ratio(logp, logp.detach(), torch.arange(8), "token")
        loss = policy_loss(ratio, adv, torch.full((8,), 1 / 8, dtype=F64), 0.2, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert theta.softmax(0)[1] > 0.99


# ---- sampling


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampling_inverts_the_distribution(temperature):
    """An even grid of u visits every token in proportion to its probability, and the log-probability is that
    one's."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    p = (logits.double() / temperature).softmax(0)
    n = 100_000
    u = (torch.arange(n) + 0.5) / n
    ids, logps = sample_tokens(logits.expand(n, 4), u, temperature)
    counts = torch.bincount(ids, minlength=4) / n
    torch.testing.assert_close(counts.double(), p, atol=2e-5, rtol=0)
    torch.testing.assert_close(logps.double(), p.log()[ids], atol=1e-6, rtol=0)


def test_sampling_never_leaves_the_vocabulary():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0.0
    ids, _ = sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)
    assert ids.tolist() == [2, 2, 2]


def test_greedy():
    ids, _ = sample_tokens(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.99]), 0.0)
    assert ids.tolist() == [1]
