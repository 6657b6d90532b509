"""Will it fit: the step rehearsed without memory needs what the real one holds, to 10 %."""

import dataclasses
import types

import pytest
import torch
import transformers

import omni_grpo as og

SHAPE = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(reuse_prefix=False),
        dict(gradient_checkpointing=False),
        dict(pack_tokens=150),
        dict(beta=0.0, num_generations=4, max_new_tokens=24),
        dict(rollout_rows=8),
    ],
)
def test_rehearsal_needs_what_the_step_needs(change):
    """Live bytes of a real rollout and a real update, against the same step on the meta device: 10 %, as at this size
    small things count."""
    cfg = og.Config(
        **dict(data="-", prompts_per_step=3, max_new_tokens=16, lora_rank=8, optimizer="adamw") | change
    )
    config = transformers.Qwen2Config(**SHAPE)
    policy = og.take_apart(cfg, transformers.Qwen2ForCausalLM(config), og.TEXT_ONLY)
    prompts = [og.Tokens([7 + i * (j + 3) % 500 for i in range(160)]) for j in range(3)]
    optimizer = types.SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None)
    with og.Live([*policy.model.parameters(), *policy.model.buffers()]) as live:
        groups = og.roll_groups(policy, cfg, prompts, [1, 2, 3])
        for group in groups:
            group.rewards = [float(i % 2) for i in range(len(group.completions))]
        rollout, live.peak = live.peak, live.now
        og.update(policy, optimizer, cfg, groups, cold=False)
    needs = og.rehearse(cfg, config, og.TEXT_ONLY, 160, torch.float32)
    assert (needs["rollout"] - needs["weights"]) * 2**30 == pytest.approx(rollout, rel=0.1)
    assert (needs["update"] - needs["weights"]) * 2**30 == pytest.approx(live.peak, rel=0.1)
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.trainable().values())
    assert needs["weights"] * 2**30 == pytest.approx(weights + 8 * trained, rel=0.01)


def test_preflight_says_what_fits(monkeypatch, tiny):
    """Enough room: one line. Too little: the flags that help, in their order and only as many as needed, or that none do."""

    def peak(cfg, config, family, prompt_tokens):
        assert prompt_tokens == 120 + 25 * cfg.max_audio_s
        return {
            "weights": 10.0,
            "rollout": 12.0,
            "update": 12 + cfg.pack_tokens / 1024 + 4 * cfg.reuse_prefix,
        }

    monkeypatch.setattr(og, "rehearse", peak)
    cfg = og.Config(model=tiny.base)
    said = og.preflight(cfg, 48.0)
    assert (
        said
        == "memory: at most 24.0 GiB of the card's 48.0 by the tensors' sizes (weights 10.0, rollout 12.0, update 24.0)"
    )
    said = og.preflight(cfg, 17.0).splitlines()
    assert (
        said[1]
        == "warning: that will hardly fit; with --pack_tokens 2048 --no-reuse_prefix it takes 14.0 GiB"
    )
    assert og.preflight(cfg, 10.0).splitlines()[1].startswith("warning: that will not fit")
    assert og.preflight(dataclasses.replace(cfg, pack_tokens=2048, reuse_prefix=False), 17.0).count("\n") == 0


def test_four_bit_weights_are_counted():
    config = transformers.Qwen2Config(**SHAPE)
    cfg = og.Config(data="-", prompts_per_step=2, max_new_tokens=4, lora_rank=8)
    full, quantised = (
        og.rehearse(dataclasses.replace(cfg, load_in_4bit=x), config, og.TEXT_ONLY, 64)["weights"] * 2**30
        for x in (False, True)
    )
    linear = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512)
    assert full - quantised == pytest.approx(linear * (2 - 0.5625) - 2 * 128 * 512, rel=0.01)
