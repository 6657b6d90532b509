"""Will it fit: the step played through without memory needs what the real one holds, to 10 %."""

import dataclasses
import types

import pytest
import torch
import transformers

import model
import omni_grpo as og
from tools import fits

SHAPE = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
HEARING = dataclasses.replace(model.TEXT_ONLY, encode_audio=lambda model, mels: None)


@pytest.mark.parametrize(
    "change, reheard",
    [
        (dict(), 0),
        (dict(gradient_checkpointing=False), 0),
        (dict(pack_tokens=150), 0),
        (dict(beta=0.0, num_generations=4, max_new_tokens=24), 0),
        (dict(rollout_rows=8), 0),
        (dict(num_generations=4), 64),
        (dict(num_generations=2), 96),
        (dict(num_generations=2), 512),
    ],
)
def test_the_forecast_is_what_the_step_needs(change, reheard, monkeypatch):
    """Live bytes of a real rollout and a real update, against the same step on the meta device: 10 %, as at
    this size small things count. reheard: tokens that every completion hears again, each prompt's in another
    step."""
    for module in (model, fits):
        monkeypatch.setattr(module, "RELISTEN_TOKENS", reheard)
    knobs = dict(data="-", prompts_per_step=3, max_new_tokens=16, lora_rank=8, optimizer="adamw")
    cfg, config = og.Config(**knobs | change, prompt="relisten"), transformers.Qwen2Config(**SHAPE)
    policy = model.take_apart(
        transformers.Qwen2ForCausalLM(config),
        HEARING,
        lora_rank=8,
        gradient_checkpointing=cfg.gradient_checkpointing,
        train=True,
    )
    prompts = [model.Prompt([7 + i * (j + 3) % 500 for i in range(160)]) for j in range(3)]

    def insert(which, rows):
        part = model.Tokens([5] * reheard)
        return [part if reheard and len(row.ids) == 2 + 2 * i else None for i, row in zip(which, rows)]

    monkeypatch.setattr(og, "relistening", lambda *args: insert)
    optimizer = types.SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None)
    g = cfg.num_generations
    with fits.LiveBytes([*policy.model.parameters(), *policy.model.buffers()]) as live:
        done = og.rollout(policy, cfg, prompts, [[]] * 3, [1, 2, 3], g, 1.0, learn=True)
        advantages = [1.0, -1.0] * (g // 2)
        groups = [og.Group(None, p, c, advantages=advantages) for p, c in zip(prompts, done)]
        rollout, live.peak = live.peak, live.now
        og.update(policy, optimizer, cfg, groups)
    needs = fits.forecast(cfg, config, HEARING, 160, torch.float32)
    assert (needs["rollout"] - needs["weights"]) * 2**30 == pytest.approx(rollout, rel=0.1)
    assert (needs["update"] - needs["weights"]) * 2**30 == pytest.approx(live.peak, rel=0.1)
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.trainable().values())
    assert needs["weights"] * 2**30 == pytest.approx(weights + 8 * trained, rel=0.01)


def test_only_who_can_hear_again_needs_room_for_it():
    config = transformers.Qwen2Config(**SHAPE)
    knobs = dict(data="-", prompts_per_step=2, num_generations=2, max_new_tokens=4, lora_rank=8)
    hears, deaf, plain = (
        fits.forecast(og.Config(**knobs, prompt=prompt, max_relistens=most, audio=audio), config, HEARING, 64)
        for prompt, most, audio in (("relisten", 8, "real"), ("relisten", 0, "real"), ("relisten", 8, "none"))
    )
    assert deaf == plain
    assert hears["update"] > 2 * deaf["update"] and hears["rollout"] > 2 * deaf["rollout"]


def test_preflight_says_what_fits(monkeypatch, tiny):
    """Enough room: one line. Too little: the flags that help, in their order and only as many as needed, or
    that none do."""

    def forecast(cfg, config, family, prompt_tokens):
        assert prompt_tokens == 120 + 25 * cfg.max_audio_s
        return {"weights": 10.0, "rollout": 12.0, "update": 12 + cfg.pack_tokens / 1024}

    monkeypatch.setattr(fits, "forecast", forecast)
    cfg = og.Config(model=tiny.base)
    first = "memory: at most 20.0 GiB of the card's {} by the tensors' sizes (weights 10.0, rollout 12.0, update 20.0)"
    assert fits.preflight(cfg, 48.0) == first.format("48.0")
    said = fits.preflight(cfg, 15.0).splitlines()
    better = "warning: that will hardly fit; with --pack_tokens 2048 it takes 14.0 GiB"
    assert said == [first.format("15.0"), better]
    assert fits.preflight(cfg, 10.0).splitlines()[1].startswith("warning: that will not fit")
    assert fits.preflight(dataclasses.replace(cfg, pack_tokens=2048), 15.0).count("\n") == 0


def test_the_tool_prints_the_forecast(tiny, capsys):
    words = ["--model", tiny.base, "--prompts_per_step", "2", "--max_audio_s", "1", "--gib", "1"]
    assert fits.main(words) == 0
    assert capsys.readouterr().out.startswith("memory: at most 0.0 GiB of the card's 1.0")
    assert fits.main([*words, "--beta", "-1"]) == 2


def test_four_bit_weights_are_counted():
    config = transformers.Qwen2Config(**SHAPE)
    cfg = og.Config(data="-", prompts_per_step=2, max_new_tokens=4, lora_rank=8)
    full, quantised = (
        fits.forecast(dataclasses.replace(cfg, load_in_4bit=x), config, model.TEXT_ONLY, 64)["weights"]
        * 2**30
        for x in (False, True)
    )
    linear = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512)
    assert full - quantised == pytest.approx(linear * (2 - 0.5625) - 2 * 128 * 512, rel=0.01)
