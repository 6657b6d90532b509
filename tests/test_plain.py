"""omni_grpo.py's step against tests/plain.py: the same tokens and rewards give the same loss and
gradients."""

import math
import types

import pytest
import torch
import transformers

import model
import omni_grpo as og
import plain
from test_model import Capture, ragged_groups


@pytest.fixture
def twins(tiny, config, prompts):
    """-> (our policy with all weights trained, the library's model with the same weights, its reference,
    groups)"""
    torch.manual_seed(0)
    policy = og.load_run_policy(config(lora_rank=0))
    model.freeze_reference(policy)
    library_class = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    library, reference = (
        library_class.from_pretrained(tiny.base, attn_implementation="eager") for _ in range(2)
    )
    ours = policy.model.get_parameter
    with torch.no_grad():  # the policy has moved away from its reference, so the KL is not 0
        for name, p in library.named_parameters():
            if name in policy.trainable():
                p += 0.02 * torch.randn_like(p)
                ours(name).copy_(p)
    return policy, library.eval(), reference.eval(), ragged_groups(policy, prompts)


def rows_of(groups):
    rows = [(group.prompt, c) for group in groups for c in group.completions]
    return rows, torch.tensor([group.rewards for group in groups])


def check_gradients(ours, library):
    """ours: {name: gradient}, of the parameters that we train"""
    theirs = dict(library.named_parameters())
    for name, grad in ours.items():
        scale = max(1.0, theirs[name].grad.abs().max().item())
        assert (grad - theirs[name].grad).abs().max() <= 1e-5 * scale, name
    assert max(grad.abs().max() for grad in ours.values()) > 1e-3


@pytest.mark.parametrize("pack_tokens", [1, 10_000])
@pytest.mark.parametrize(
    "knobs",
    [
        dict(),
        dict(reduce="token", temperature=0.7),
        dict(reduce="constant", beta=0.0, scale="none"),
        dict(beta=0.5, temperature=1.3),
    ],
)
def test_a_step_is_the_textbook_s(twins, config, monkeypatch, knobs, pack_tokens):
    policy, library, reference, groups = twins
    rows, rewards = rows_of(groups)
    loss = plain.grpo_loss(library, reference, rows, rewards, max_tokens=6, **knobs)
    loss.backward()
    cfg = config(lora_rank=0, pack_tokens=pack_tokens, max_new_tokens=6, **knobs)
    for group in groups:
        group.advantages = og.group_advantages(torch.tensor([group.rewards]), cfg.scale)[0].tolist()
    optimizer = Capture(policy)
    monkeypatch.setattr(og, "MAX_GRAD_NORM", math.inf)
    log = og.update(policy, optimizer, cfg, groups)
    assert log["policy/loss"] == pytest.approx(loss.item(), abs=1e-5)
    check_gradients(optimizer.steps[0], library)


def test_clipped_tokens_are_the_textbook_s(twins, config):
    """Off-policy: ratios from 0.5 to 2, some of them beyond the clip; the same loss and gradient."""
    policy, library, reference, groups = twins
    rows, rewards = rows_of(groups)
    logps, trained = plain.token_logps(library, rows, 1.0)
    shift = 0.7 * torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    knobs = dict(clip_low=0.1, clip_high=0.3, max_tokens=6)
    old_logps = logps.detach() + shift
    loss = plain.grpo_loss(library, reference, rows, rewards, old_logps=old_logps, **knobs)
    loss.backward()
    cfg = config(lora_rank=0, max_new_tokens=6, clip_low=0.1, clip_high=0.3)
    for group in groups:
        group.advantages = og.group_advantages(torch.tensor([group.rewards]))[0].tolist()
    batch, _ = og.make_batch(policy, cfg, groups)
    batch.old_logps = [old_logps[trained.bool()]]
    sums = og.backward(policy, cfg, batch, through_rollout=False)
    assert sums["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    assert 3 < sums["policy/clip_frac"] < sums["tokens"] - 3
    check_gradients({name: p.grad for name, p in policy.trainable().items()}, library)


def test_the_textbook_s_step_learns(twins):
    """plain.grpo_step, with a reward for saying token 7: it is said more often after a few steps."""
    _, library, reference, groups = twins
    prompts = [group.prompt for group in groups[:2]]
    said = []

    def reward(i, ids):
        said.append(7 in ids)
        return float(7 in ids)

    with torch.no_grad():  # no other word is nearly as likely as it would be untaught
        library.get_output_embeddings().weight *= 0.1
    optimizer = torch.optim.AdamW(library.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(12):
        plain.grpo_step(
            library, reference, optimizer, prompts, reward, [9], group_size=8, max_tokens=12, beta=0.0
        )
    assert sum(said[-48:]) > 2 * sum(said[:48])


def test_the_textbook_s_sampling_is_ours(twins, prompts):
    """Nearly greedy, token by token over the whole row: the tokens of the cached decoder."""
    policy, library, _, groups = twins
    policy.stop_ids.clear()
    prefixes = model.read_prompts(policy, [group.prompt for group in groups])
    ours = og.decode(policy, prefixes, 1, 0.0, 5, [0, 0, 0])
    for group, completions in zip(groups, ours):
        theirs = plain.sample(library, types.SimpleNamespace(**vars(group.prompt)), [], 5, 1e-4)
        assert theirs.ids == completions[0].ids
