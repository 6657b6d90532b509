"""The objectives beside GRPO's own, each by numbers worked out by hand."""

import dataclasses
import re

import pytest
import torch

import data
import omni_grpo as og
import runs
from texts import DOCS

RATIO = [0.5, 1.0, 1.5, 3.0]
ADV, WEIGHT = torch.tensor([1.0, -1.0, 1.0, -2.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])


def loss_and_slopes(name):
    """d loss / d log pi of four tokens, with clip 0.2 and 0.2"""
    logp = torch.tensor(RATIO, dtype=torch.float64).log().requires_grad_()
    loss = og.LOSSES[name](logp.exp(), ADV.double(), WEIGHT.double(), 0.2, 0.2)
    loss.backward()
    return loss.item(), logp.grad.tolist()


def test_cispo_by_hand():
    """The cap is 1.2: - w * min(ratio, 1.2) * A."""
    loss, slopes = loss_and_slopes("cispo")
    assert slopes == pytest.approx([-0.05, 0.2, -0.36, 0.96])
    # - 0.1 * 0.5 * ln 0.5 + 0.2 * ln 1 - 0.3 * 1.2 * ln 1.5 + 0.8 * 1.2 * ln 3
    assert loss == pytest.approx(0.03466 + 0 - 0.14597 + 1.05467, abs=1e-4)


def test_sapo_by_hand():
    """sigmoid(-0.5) = 0.37754, sigmoid(0.5) = 0.62246, sigmoid(2.1) = 0.89090; the slope of the gate is
    4 s (1 - s) ratio."""
    loss, slopes = loss_and_slopes("sapo")
    assert loss == pytest.approx(
        -0.1 * 4 * 0.37754 + 0.2 * 2 / 1.05 - 0.3 * 4 * 0.62246 + 0.8 * 4 / 1.05 * 0.89090, abs=1e-4
    )
    assert slopes == pytest.approx(
        [-0.1 * 4 * 0.23500 * 0.5, 0.2, -0.3 * 4 * 0.23500 * 1.5, 0.8 * 4 * 0.09720 * 3], abs=1e-4
    )


def test_on_policy_all_losses_have_the_policy_gradient():
    logp = torch.zeros(4, requires_grad=True)
    for name in og.LOSSES:
        logp.grad = None
        og.LOSSES[name](logp.exp(), ADV, WEIGHT, 0.2, 0.2).backward()
        assert torch.allclose(logp.grad, -WEIGHT * ADV), name


def test_the_documented_dual_clip(monkeypatch):
    """The last token, ratio 4 and A = -2, has left the clip on the side where PPO follows it: -2 * 4 = -8 becomes
    3 * -2, without a slope; the others are PPO's."""
    (block,) = re.findall(r"```python\n(.*?)```", DOCS["ablations.md"], re.DOTALL)
    monkeypatch.setattr(og, "LOSSES", dict(og.LOSSES))
    exec(block, vars(og))
    logp = torch.tensor([0.5, 1.0, 1.5, 4.0]).log().requires_grad_()
    loss = og.LOSSES["ppo"](logp.exp(), ADV, WEIGHT, 0.2, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * 0.5 + 0.2 - 0.3 * 1.2 + 0.4 * 6)
    assert logp.grad.tolist() == pytest.approx([-0.05, 0.2, 0.0, 0.0])


def test_leave_one_out_by_hand():
    """1 against the mean 1/3 of 0, 0, 1."""
    adv = og.group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), "none", "loo")
    assert adv[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


def groups_of(*rewards, **parts):
    return [
        og.Group(
            data.Example(),
            None,
            [None] * len(r),
            list(r),
            [{n: p[i][j] for n, p in parts.items()} for j in range(len(r))],
        )
        for i, r in enumerate(rewards)
    ]


def advantages(groups, weights=None, **flags):
    og.set_advantages(
        og.Config(num_generations=len(groups[0].rewards), **flags), groups, weights or {"accuracy": 1.0}
    )
    return [group.advantages for group in groups]


def test_the_step_s_std_by_hand():
    """Of 1, 0, 1, 1: 0.43301. The second group has no spread."""
    adv = advantages(groups_of([1.0, 0.0], [1.0, 1.0]), scale="batch")
    assert adv[0] == pytest.approx([0.5 / 0.43311, -0.5 / 0.43311], abs=1e-4) and adv[1] == [0, 0]


def test_gdpo_by_hand():
    """Two rewards of weight 1 and 0.5 in one group: (1, 0) and (0, 10) become (1, -1) and (-1, 1): their scale
    does not count. Sum: (0.5, -0.5), and whitened over the step with a group of (0, 0): std 0.35355."""
    weights = {"accuracy": 1.0, "brief": 0.5}
    parts = dict(accuracy=[[1.0, 0.0], [0.0, 0.0]], brief=[[0.0, 10.0], [3.0, 3.0]])
    groups = groups_of([1.0, 5.0], [1.5, 1.5], **parts)
    adv = advantages(groups, weights, aggregate="gdpo")
    assert adv[0] == pytest.approx([0.5 / 0.35355, -0.5 / 0.35355], abs=2e-3) and adv[1] == [0, 0]
    groups = groups_of([1.0, 0.0], accuracy=[[1.0, 0.0]])
    assert advantages(groups, aggregate="gdpo")[0] == pytest.approx([1, -1], abs=1e-3)  # one reward: GRPO


def test_cut_completions_are_not_learned_from(policy, config, prompts):
    """Their weight is 0; the sequence mean is over all rows still, the token mean over what is left."""
    examples, encoded = prompts
    rows = [
        og.Completion([5, 6, 7], sampled=[True] * 3, logps=[0.0] * 3, finished=False),
        og.Completion([5, 2], sampled=[True] * 2, logps=[0.0] * 2, finished=True),
    ]
    for reduce, wanted in (("sequence", [0, 1 / 4]), ("token", [0, 1 / 2]), ("constant", [0, 1 / 12])):
        group = og.Group(examples[0], encoded[0], rows, [1.0, 0.0], [{}, {}], [1.0, -1.0])
        cfg = config(reduce=reduce, mask_truncated=True, num_generations=2, max_new_tokens=6)
        batch, _ = og.make_batch(policy, cfg, [group])
        assert batch.weight.tolist() == pytest.approx(wanted)


# ---- minibatches


def sampled(policy, cfg, prompts, spread=True):
    examples, encoded = prompts
    torch.manual_seed(0)
    done = og.rollout(policy, cfg, encoded[:2], [[], []], [1, 2], 3, 1.0, learn=True)
    return [og.Group(e, p, rows, advantages=[1.0, -1.0, 0.5]) for e, p, rows in zip(examples, encoded, done)]


def test_two_minibatches_are_two_steps_by_hand(policy, config, prompts):
    """The second part is measured to the policy before the first step; its gradient is of the policy after it."""
    cfg = config(minibatches=2, beta=0.0, clip_low=1.0, clip_high=10.0, max_new_tokens=6)
    groups = sampled(policy, cfg, prompts)
    start = {name: p.detach().clone() for name, p in policy.trainable().items()}
    before = [og.make_batch(policy, cfg, [group])[0] for group in groups]
    og.score_before(policy, cfg, before)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    record = og.update(policy, optimizer, cfg, groups)
    assert record["policy/kl_old"] > 1e-6  # the second part is off-policy
    after = {name: p.detach().clone() for name, p in policy.trainable().items()}

    for name, p in policy.trainable().items():
        p.data.copy_(start[name])
    for group, old in zip(groups, before):
        group.prompt.read = None
        (pack,) = og.make_batch(policy, cfg, [group])[0].packs
        logp, _ = og.token_logps(policy, pack, 1.0)
        ratio = (logp - old.old_logps[0]).exp()
        loss = -(old.weight[pack.row] * ratio * old.adv[pack.row]).sum()
        gradients = torch.autograd.grad(loss, list(policy.trainable().values()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for p, g in zip(policy.trainable().values(), gradients):
            p.data -= 0.5 * g * min(1.0, og.MAX_GRAD_NORM / (norm + 1e-6))
    for name, p in policy.trainable().items():
        assert (p - after[name]).abs().max() < 1e-5, name


def test_a_run_with_minibatches(config, tmp_path, monkeypatch):
    """Four optimizer steps a rollout, and bit for bit the same after a kill between two of them."""
    cfg = config(steps=2, minibatches=2, updates_per_rollout=2, save_every=1, reward="accuracy=1,overlong=1")
    steps = []
    made = og.make_optimizer

    def watched(policy, cfg):
        optimizer = made(policy, cfg)
        step = optimizer.step
        optimizer.step = lambda *args: (steps.append(1), step(*args))
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(og, "make_optimizer", watched)
        whole = runs.train(cfg, tmp_path / "whole")
    assert len(steps) == 8
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(og, "sum_gradients", runs.at_call(6, og.sum_gradients, runs.lights_out))
        runs.train(cfg, out)
    og.train(dataclasses.replace(cfg, out=out, resume=out))
    assert runs.left_by(out) == runs.left_by(whole)


def test_prompts_that_cannot_be_shared(config):
    with pytest.raises(
        data.UserError, match="--prompts_per_step 2: cannot be shared evenly among 1 ranks and 3 mini"
    ):
        og.train(config(minibatches=3))


@pytest.mark.parametrize(
    "flags, said",
    [
        ({}, []),
        (dict(loss="cispo", clip_high=0.3), ["note: --loss, --clip_high: no part in one optimizer step"]),
        (dict(loss="cispo", minibatches=2), []),
        (
            dict(importance="sequence", reduce="token", updates_per_rollout=2),
            ["note: --importance sequence: its paper (GSPO) has --reduce sequence"],
        ),
    ],
)
def test_flags_that_do_nothing_are_named(flags, said):
    lines = og.warnings_of(og.Config(**flags))
    assert len(lines) == len(said) and all(line.startswith(words) for line, words in zip(lines, said))
