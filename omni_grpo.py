"""GRPO for audio question answering, from scratch, on one 48 GB card.

    python omni_grpo.py                          the demo: a tiny Qwen2.5-Omni learns to listen, on a CPU
    python omni_grpo.py --data avqa_gpt.jsonl    Qwen2.5-Omni-7B on your questions

One step: sample G completions for each of P prompts, reward them, normalise the rewards within each group,
and move the policy by the clipped surrogate with a KL penalty to a frozen reference (DeepSeekMath,
2402.03300). The setting is Omni-R1's (2505.09439): a direct answer and a correctness reward. What differs
from the papers:

  - LoRA on the language model's linear layers; the reference is the adapter switched off.
  - A prompt is read once a step: its keys and values serve all G completions, in the rollout and in the loss,
    whose gradient goes back through that same pass. There is no padding (model.py).
  - The loss is a weighted sum over the trained tokens of the whole step. One vector of weights is the only
    place where token, sequence and constant means differ, so nothing depends on how a step is cut into packs.
  - Sampling is the full softmax at --temperature, and scoring divides by the same temperature. There is no
    top-p and no top-k, on purpose: what is scored must be what was sampled.
  - All randomness is a function of (seed, step, prompt), so --resume restores nothing but the step number.

tests/plain.py is the same step as a textbook writes it, with padding and masks; a test holds both together.

Letters: P prompts a step, G completions a prompt, R = P * G rows, S prompt tokens, T completion tokens,
N packed tokens, M trained tokens, V vocabulary, H hidden size. Numbers such as 2402.03300 are arXiv's.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from itertools import accumulate, count, islice
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import data
from data import (
    PROMPTS,
    AudioError,
    DataError,
    Example,
    Examples,
    UserError,
    check_knobs,
    interruptible,
    knob,
    seed_of,
)
from model import (
    Clip,
    Completion,
    Decoder,
    Pack,
    Policy,
    Prefix,
    Prompt,
    Relistening,
    blame,
    completion_text,
    embed_clips,
    encode_prompt,
    find_model,
    freeze_reference,
    load_clips,
    load_policy,
    make_packs,
    read_prompts,
    reference,
    token_logps,
)
from reward import Said, accuracy, parse_rewards, score

# ------------------------------------------------------------------------------------------------------------
# Knobs: every one is one line here, and one flag

MAX_GRAD_NORM = 1.0  # nobody ablates these, so they are no flags
EVAL_SAMPLES = 4  # samples of a question behind eval/accuracy_sampled
LOG_ROLLOUTS = 10  # steps between entries in rollouts.jsonl
WORKERS = 4  # threads that read audio ahead of the step
BEST = {"best": "eval/accuracy", "best_sampled": "eval/accuracy_sampled"}  # --keep: key of the log
PROGRESS_S = 60  # between lines of progress, where there is no terminal
MAX_BAD_AUDIO = 10  # unreadable clips, or a hundredth of the draws, that are skipped before the run stops


@dataclass
class Config:
    # what to train on
    data: str = knob("", "questions, JSONL (see data.py); none: the built-in demo")
    eval_data: str = knob("", "held-out questions; none: --eval_size questions are split off --data, by clip")
    audio_dir: str = knob("", "where relative audio paths start; none: the folder of the file")
    eval_size: int = knob(200, "held-out questions used; 0: no evaluation")
    model: str = knob("Qwen/Qwen2.5-Omni-7B", "checkpoint: a local directory or a Hub id, safetensors only")
    adapter: str = knob("", "LoRA adapter to start from (it is then also the reference)")
    cold_start_data: str = knob("", "questions with a `target` to imitate first (same update, advantage 1)")
    cold_start_steps: int = knob(0, "supervised steps on --cold_start_data before the first GRPO step")
    # the run
    out: str = knob("", "run directory; none: runs/<name of the data>, with a number if that is taken")
    resume: str = knob(
        "",
        "go on from the last checkpoint of --out (or of the directory named here); auto: where there is one",
        nargs="?",
        const="--out",
        metavar="RUN",
    )
    seed: int = knob(0, "seed of LoRA, data order, choice order and sampling", high=2**63 - 1)
    steps: int = knob(1000, "GRPO steps (one rollout each)")
    save_every: int = knob(50, "steps between checkpoints", low=1)
    keep: str = knob("", "beside the last adapter: best, best_sampled (of the evaluations), or how many")
    eval_every: int = knob(100, "steps between evaluations; step 0 and the last are always evaluated", low=1)
    report_to: str = knob("", "trackers, of trackio, wandb, tensorboard, swanlab; e.g. trackio,tensorboard")
    # prompt, reward, rollout
    prompt: str = knob("direct", "prompt template: " + " | ".join(PROMPTS), choices=PROMPTS)
    reward: str = knob("accuracy=1", "weighted rewards, e.g. accuracy=1,format=0.5")
    prompts_per_step: int = knob(16, "P, prompts a step", low=1)
    num_generations: int = knob(8, "G, completions a prompt", low=2)
    temperature: float = knob(1.0, "of sampling and of scoring", above=0)
    max_new_tokens: int = knob(0, "longest completion; 0: the prompt template's (32 direct, 256 thinking)")
    # re-listening (Echo, arXiv 2602.11909): what stands behind <seg>start, end</seg> is heard again
    max_relistens: int = knob(-1, "parts heard again in a completion; -1: the prompt's (8 relisten)", low=-1)
    relisten_from: str = knob(
        "audio",
        "audio: the part itself goes through the audio tower | embeddings: those of the prompt",
        choices=("audio", "embeddings"),
    )
    # ablations: one flag, one line of code, one row in docs/ablations.md
    baseline: str = knob(
        "mean",
        "what a reward is compared with: mean (GRPO) | loo, mean of the others (RLOO, arXiv 2402.14740)",
        choices=("mean", "loo"),
    )
    scale: str = knob(
        "std",
        "advantage scale: std (GRPO) | batch, the step's std (arXiv 2508.08221) | none (Dr. GRPO, arXiv "
        "2503.20783)",
        choices=("std", "batch", "none"),
    )
    aggregate: str = knob(
        "sum",
        "several rewards: sum | gdpo, each one normalised by itself (arXiv 2601.05242)",
        choices=("sum", "gdpo"),
    )
    loss: str = knob(
        "ppo",
        "off-policy: ppo (arXiv 1707.06347) | cispo (arXiv 2506.13585) | sapo (arXiv 2511.20347)",
        choices=("ppo", "cispo", "sapo"),
    )
    mask_truncated: bool = knob(False, "completions that were cut are not learned from (DAPO)")
    reduce: str = knob(
        "sequence",
        "loss mean: sequence (GRPO) | token (DAPO, arXiv 2503.14476) | constant (Dr. GRPO)",
        choices=("sequence", "token", "constant"),
    )
    clip_low: float = knob(0.2, "ratio floor is 1 - clip_low (PPO, arXiv 1707.06347)", high=1)
    clip_high: float = knob(0.2, "ratio ceiling is 1 + clip_high (DAPO's clip-higher uses 0.28)")
    importance: str = knob(
        "token",
        "importance ratio: token (GRPO) | sequence (GSPO, arXiv 2507.18071)",
        choices=("token", "sequence"),
    )
    beta: float = knob(0.04, "weight of the k3 KL to the reference; 0: no reference at all")
    minibatches: int = knob(1, "parts of a rollout's prompts; an optimizer step on each", low=1)
    updates_per_rollout: int = knob(1, "passes over each rollout", low=1)
    audio: str = knob(
        "real",
        "what is played: real | silence (same length) | none (text only)",
        choices=("real", "silence", "none"),
    )
    shuffle_choices: bool = knob(True, "another order of the options every time a question is drawn")
    order: str = knob(
        "shuffled",
        "shuffled | easy_to_hard (by `pass_rate` in meta, SARI, arXiv 2504.15900)",
        choices=("shuffled", "easy_to_hard"),
    )
    resample_uniform: bool = knob(
        False, "draw again for groups without reward spread (DAPO dynamic sampling)"
    )
    # optimisation
    lr: float = knob(1e-5, "AdamW learning rate; 1e-6 is a full fine-tuning rate and does not move LoRA")
    cold_start_lr: float = knob(
        0.0, "AdamW learning rate of the cold start, which bears a higher one (0: --lr)"
    )
    warmup_steps: int = knob(10, "steps of linear warm-up, of the cold start and of RL")
    lr_schedule: str = knob(
        "constant",
        "after the warm-up: constant | linear (down to 0 at the end of the stage)",
        choices=("constant", "linear"),
    )
    optimizer: str = knob(
        "adamw8bit", "adamw8bit (bitsandbytes) | adamw (torch)", choices=("adamw8bit", "adamw")
    )
    lora_rank: int = knob(32, "LoRA rank on all linear layers of the language model; 0: train all weights")
    # memory and speed
    dtype: str = knob(
        "auto",
        "of the frozen base: auto | float32 | bfloat16; auto: bfloat16 on a card and where a CPU gains by it",
        choices=("auto", "float32", "bfloat16"),
    )
    load_in_4bit: bool = knob(False, "nf4 base weights, for cards under 24 GB")
    gradient_checkpointing: bool = knob(True, "recompute activations in the backward pass")
    pack_tokens: int = knob(8192, "tokens scored in one forward pass (at least one group)", low=1)
    rollout_rows: int = knob(128, "completions decoded together", low=1)
    max_audio_s: float = knob(30.0, "seconds of a clip that are heard, at most 300", above=0, high=300)

    def __post_init__(self):
        check_knobs(self)
        if not self.model:
            raise UserError("--model: is empty; name a directory or a Hub id")
        if self.adapter and not self.lora_rank:
            raise UserError(
                f"--adapter {self.adapter}: --lora_rank 0 trains all weights and has no use for one"
            )
        if self.keep and self.keep not in BEST and not re.fullmatch("[1-9][0-9]*", self.keep):
            raise UserError(f"--keep {self.keep}: must be {', '.join(BEST)} or a number from 1 on")
        if self.keep in BEST and not self.eval_size:
            raise UserError(f"--keep {self.keep}: --eval_size 0 leaves nothing to choose by")
        try:
            parse_rewards(self.reward)
        except ValueError as e:
            raise UserError(f"--reward {self.reward}: {e}") from None

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or PROMPTS[self.prompt].max_new_tokens

    @property
    def optimizer_steps(self) -> int:
        """On each rollout. With one, the policy that learns is the one that sampled: no ratio is off 1."""
        return self.minibatches * self.updates_per_rollout

    @property
    def relistens(self) -> int:
        """How many parts of its clip a completion may hear again."""
        if self.audio == "none":
            return 0
        return PROMPTS[self.prompt].relistens if self.max_relistens < 0 else self.max_relistens


# ------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions of tensors and floats


def group_advantages(
    rewards: Tensor, scale: str = "std", baseline: str = "mean", step_std: float = 1.0, eps: float = 1e-4
) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps), within each prompt's group.       rewards (P, G) -> (P, G)

    DeepSeekMath (arXiv 2402.03300), population std. scale="batch": the std of the whole step's rewards (Lite
    PPO, arXiv 2508.08221); "none": no division, Dr. GRPO (arXiv 2503.20783). baseline="loo": the mean of the
    other rewards, which makes the difference G / (G - 1) times as large (RLOO, arXiv 2402.14740). A group
    whose rewards are all equal gets exactly 0: rounding in the mean, divided by its own std, would not be.
    """
    adv = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "loo":
        adv = adv * rewards.shape[1] / (rewards.shape[1] - 1)
    if scale == "std":
        adv = adv / (rewards.std(dim=1, keepdim=True, unbiased=False) + eps)
    if scale == "batch":
        adv = adv / (step_std + eps)
    uniform = rewards.amax(dim=1) == rewards.amin(dim=1)
    return adv.masked_fill(uniform[:, None], 0.0)


def loss_weights(lengths: Tensor, reduce: str, max_tokens: int) -> Tensor:
    """What one trained token of each row weighs in the loss of the whole step.       lengths (R,) -> (R,)

    sequence: mean over rows of the mean over tokens (GRPO, arXiv 2402.03300); token: mean over all tokens
    (DAPO, arXiv 2503.14476); constant: sum over tokens / (R * max_tokens) (Dr. GRPO, arXiv 2503.20783). A row
    of length 0 weighs 0.
    """
    rows = len(lengths)
    lengths = lengths.double()
    weight = {
        "sequence": 1 / (rows * lengths.clamp(min=1)),
        "token": torch.ones_like(lengths) / lengths.sum().clamp(min=1),
        "constant": torch.ones_like(lengths) / (rows * max_tokens),
    }[reduce]
    return (weight * (lengths > 0)).float()


def importance_ratio(logp: Tensor, old_logp: Tensor, row: Tensor, importance: str) -> Tensor:
    """token: exp(logp - old_logp). sequence: the same for all tokens of a row, exp of the row's mean (GSPO,
    arXiv 2507.18071).       logp, old_logp (M,), row (M,) row of each token -> (M,)"""
    log_ratio = logp - old_logp
    if importance == "sequence":
        rows = int(row.max()) + 1 if len(row) else 0
        total = torch.zeros(rows, dtype=logp.dtype, device=logp.device).index_add(0, row, log_ratio)
        count = torch.bincount(row, minlength=rows).clamp(min=1)
        log_ratio = (total / count)[row]
    return torch.exp(log_ratio)


def policy_loss(ratio: Tensor, adv: Tensor, weight: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """- sum_m w_m min(ratio_m A_m, clip(ratio_m, 1 - clip_low, 1 + clip_high) A_m)       all (M,) -> scalar

    PPO's clipped surrogate (arXiv 1707.06347), negated to be minimised. While ratio = 1 its value is -sum w
    A, often 0, and its gradient is the policy gradient all the same.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weight * torch.minimum(ratio * adv, clipped * adv)).sum()


def cispo_loss(ratio: Tensor, adv: Tensor, weight: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """- sum_m w_m min(ratio_m, 1 + clip_high) A_m log pi_m, where only log pi has a gradient.    all (M,) ->
    scalar

    CISPO (arXiv 2506.13585): a token above the clip weighs less and is never left out. log ratio stands for
    log pi, since their gradients are equal.
    """
    capped = ratio.detach().clamp(max=1 + clip_high)
    return -(weight * capped * adv * ratio.log()).sum()


def sapo_loss(ratio: Tensor, adv: Tensor, weight: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """- sum_m w_m A_m sigmoid(t_m (ratio_m - 1)) 4 / t_m, t = 1 where A > 0, else 1.05.    all (M,) -> scalar

    SAPO (arXiv 2511.20347): no clip but a soft gate, whose slope at ratio 1 is the policy gradient's.
    """
    t = torch.where(adv > 0, 1.0, 1.05)
    return -(weight * adv * torch.sigmoid(t * (ratio - 1)) * 4 / t).sum()


LOSSES = dict(ppo=policy_loss, cispo=cispo_loss, sapo=sapo_loss)


def is_clipped(ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Tokens whose gradient the clip has removed.       all (M,) -> bool (M,)"""
    too_low, too_high = ratio < 1 - clip_low, ratio > 1 + clip_high
    return (too_low & (adv < 0)) | (too_high & (adv > 0))


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token: exp(d) - 1 - d, d = ref_logp - logp, never negative.
    (M,) -> (M,)

    Schulman's "k3", as in DeepSeekMath eq. 4. expm1 keeps it exact near d = 0; d is capped so that exp cannot
    overflow.
    """
    d = (ref_logp.float() - logp.float()).clamp(max=20.0)
    return torch.expm1(d) - d


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    adv: Tensor,
    weight: Tensor,
    row: Tensor,
    cfg: Config,
) -> tuple[Tensor, Tensor]:
    """The loss of M tokens, each with its log-probability under the policy (with gradient), under the policy
    that sampled it and under the reference, and with its row's advantage and weight.       all (M,) ->
    scalar, ratio (M,)

    The weights are those of the whole step, so the losses of packs, and of ranks, add up to the loss of the
    step.
    """
    ratio = importance_ratio(logp, old_logp, row, cfg.importance)
    loss = LOSSES[cfg.loss](ratio, adv, weight, cfg.clip_low, cfg.clip_high)
    if cfg.beta:
        loss = loss + cfg.beta * (weight * kl_k3(logp, ref_logp)).sum()
    return loss, ratio


# ------------------------------------------------------------------------------------------------------------
# One step: questions -> rollout -> rewards -> advantages -> loss -> optimizer


class Drawn(NamedTuple):
    """A question of this step."""

    cursor: int  # its place in the run's endless stream of questions
    example: Example
    clips: list[Clip]
    was_cut: bool  # a clip was longer than --max_audio_s


@dataclass
class Group:
    """The G completions of one prompt."""

    example: Example
    prompt: Prompt
    completions: list[Completion]
    rewards: list[float] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)  # of each completion: every reward before weighting
    advantages: list[float] = field(default_factory=list)

    @property
    def has_spread(self) -> bool:
        return max(self.rewards) > min(self.rewards)


def sample_groups(policy: Policy, cfg: Config, drawn: list[Drawn], weights: dict[str, float]) -> list[Group]:
    """GRPO: the policy answers every question G times, and its answers are rewarded."""
    clips = [d.clips for d in drawn]
    prompts = encode_prompts(policy, cfg, [d.example for d in drawn], clips)
    seeds = [seed_of(cfg.seed, "rollout", d.cursor) for d in drawn]
    completions = rollout(
        policy, cfg, prompts, clips, seeds, cfg.num_generations, cfg.temperature, learn=True
    )
    groups = [Group(d.example, *of_prompt) for d, *of_prompt in zip(drawn, prompts, completions)]
    for group in groups:
        for completion in group.completions:
            reward, parts = score(what_was_said(policy, cfg, completion, weights), group.example, weights)
            for name, part in parts.items():
                if not math.isfinite(part):
                    raise UserError(f"--reward: {name} gives {part} for question {group.example.id}")
            group.rewards.append(reward)
            group.parts.append(parts)
    return groups


def set_advantages(cfg: Config, groups: list[Group], weights: dict[str, float]) -> None:
    """Of all completions of the step, over all ranks."""
    if cfg.aggregate == "sum":
        adv = advantages_of(cfg, [group.rewards for group in groups])
    else:
        adv = torch.zeros(len(groups), cfg.num_generations)
        for name, weight in weights.items():
            adv += weight * advantages_of(cfg, [[part[name] for part in group.parts] for group in groups])
        every = torch.tensor(sum(gather(adv.flatten().tolist()), []))
        adv = adv / (every.std(unbiased=False) + 1e-4)  # its mean is 0: that of every group is
    for group, of_group in zip(groups, adv.tolist()):
        group.advantages = of_group


def advantages_of(cfg: Config, rewards: list[list[float]]) -> Tensor:
    """Of one reward, or of their sum.       (P, G)"""
    every = torch.tensor(sum(gather(sum(rewards, [])), []))
    return group_advantages(torch.tensor(rewards), cfg.scale, cfg.baseline, every.std(unbiased=False).item())


def teacher_groups(policy: Policy, cfg: Config, drawn: list[Drawn]) -> list[Group]:
    """Cold start: the completions are the example's targets, and every one has advantage 1. The update is the
    same, and what a target hears again is inserted as in a rollout."""
    clips = [d.clips for d in drawn]
    prompts = encode_prompts(policy, cfg, [d.example for d in drawn], clips)
    insert = relistening(policy, cfg, prompts, clips)
    groups = []
    for i, (d, prompt) in enumerate(zip(drawn, prompts)):
        targets = [d.example.target] if isinstance(d.example.target, str) else d.example.target
        completions = []
        for target in targets:
            completion = Completion([], finished=True)
            ids = policy.tokenizer(target, add_special_tokens=False)["input_ids"]
            for token in [*ids, policy.tokenizer.eos_token_id]:
                completion.append(token)
                (heard,) = insert([i], [completion])
                if heard:
                    completion.insert(heard)
            completions.append(completion)
        n = len(targets)
        groups.append(Group(d.example, prompt, completions, [1.0] * n, [{}] * n, advantages=[1.0] * n))
    return groups


# ---- questions -> rollout


def encode_prompts(
    policy: Policy, cfg: Config, examples: list[Example], clips: list[list[Clip]]
) -> list[Prompt]:
    audio = embed_clips(policy, clips)
    return [encode_prompt(policy, example, x, cfg.prompt) for example, x in zip(examples, audio)]


def rollout(
    policy: Policy,
    cfg: Config,
    prompts: list[Prompt],
    clips: list[list[Clip]],
    seeds: list[int],
    num_generations: int,
    temperature: float,
    learn: bool = False,
) -> list[list[Completion]]:
    """Sample num_generations completions of every prompt, --rollout_rows of them at a time.

    learn: the pass over the prompts keeps its graph, in Prompt.read: the gradient of the loss will go back
    through it.
    """
    done, at_once = [], max(1, cfg.rollout_rows // num_generations)
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        with torch.set_grad_enabled(learn):
            prefixes = read_prompts(policy, prompts[part], cfg.pack_tokens)
        insert = relistening(policy, cfg, prompts[part], clips[part])
        done += decode(policy, prefixes, num_generations, temperature, cfg.new_tokens, seeds[part], insert)
        if learn:
            for prefix in prefixes:
                for i, prompt in enumerate(prefix.prompts):
                    prompt.read = prefix, i
    return done


def relistening(policy: Policy, cfg: Config, prompts: list[Prompt], clips: list[list[Clip]]) -> Callable:
    """The hook of `decode` that lets completions hear parts of their clips again, where the run has any of
    that."""
    if not cfg.relistens or not any(clips):
        return insert_nothing
    return Relistening(policy, prompts, clips, cfg.relistens, cfg.relisten_from)


def insert_nothing(which: list[int], rows: list[Completion]) -> list[None]:
    return [None] * len(rows)


@torch.no_grad()
def decode(
    policy: Policy,
    prefixes: list[Prefix],
    num_generations: int,
    temperature: float,
    max_new_tokens: int,
    seeds: list[int],
    insert: Callable = insert_nothing,
) -> list[list[Completion]]:
    """G completions of every prompt that was read.       -> P lists of G

    The random numbers behind a prompt's samples come from its own seed alone, so they depend neither on the
    other prompts nor on how prompts are batched. insert([prompt number], [completion]) -> [Tokens or None] is
    asked after every step about all rows that go on. What it returns is read by its row in one pass, in which
    the other rows take their next step.
    """
    g = num_generations
    rows = [Completion([]) for _ in seeds for _ in range(g)]
    u = [torch.rand(g, max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    u = torch.cat(u).to(policy.device)
    decoder = Decoder(policy, prefixes, g, max_new_tokens)
    logits = decoder.first_logits()
    batch = list(range(len(rows)))  # which rows are decoded; finished ones leave when they are half of them
    for step in range(max_new_tokens):
        ids, logps = sample_tokens(logits, u[:, step], temperature)
        sampled = list(zip(batch, ids.tolist(), logps.tolist()))  # the step's one wait for the device
        if not all(math.isfinite(logp) for _, _, logp in sampled):
            raise UserError(
                "the policy's log-probabilities are not finite; in training, a lower --lr may keep them so"
            )
        for r, token, logp in sampled:
            if not rows[r].finished:
                rows[r].append(token, logp)
                rows[r].finished = token in policy.stop_ids
        live = [place for place, r in enumerate(batch) if not rows[r].finished]
        if not live or step + 1 == max_new_tokens:
            break
        going = [batch[place] for place in live]
        heard = insert([r // g for r in going], [rows[r] for r in going])
        if 2 * len(live) <= len(batch):
            decoder.keep(live)
            batch, ids, u = going, ids[live], u[live]
        inserted = {}
        for r, tokens in zip(going, heard):
            if tokens:
                inserted[batch.index(r)] = tokens
                rows[r].insert(tokens)
        logits = decoder.step(ids, inserted)
    return [rows[i : i + g] for i in range(0, len(rows), g)]


def sample_tokens(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row from the full softmax, by inverting its distribution function at u; temperature 0 is
    greedy.

    logits (R, V), u (R,) uniform in [0, 1) -> ids (R,), log-probabilities (R,)
    """
    logps = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids = logps.argmax(dim=-1, keepdim=True)
    else:
        cdf = logps.double().exp().cumsum(dim=-1)
        ids = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)
        ids = ids.clamp(max=logits.shape[1] - 1)  # of numbers that are not finite, which the caller refuses
    return ids[:, 0], logps.gather(1, ids)[:, 0]


# ---- rollout -> rewards


def what_was_said(policy: Policy, cfg: Config, completion: Completion, weights: dict[str, float]) -> Said:
    """What the rewards judge."""
    return Said(
        text=completion_text(policy, completion),
        used=sum(completion.sampled) / cfg.new_tokens,
        heard=completion.heard,
        confidence=confidence(policy, completion) if "confident_accuracy" in weights else None,
    )


def confidence(policy: Policy, completion: Completion) -> float | None:
    """Probability, as sampled, of the least certain token in the last <answer>...</answer>: the one that
    tells the choice from the others. None without an answer."""
    logps = [logp for logp, sampled in zip(completion.logps, completion.sampled) if sampled]
    pieces = [policy.tokenizer.decode([i], skip_special_tokens=True) for i in completion.sampled_ids]
    answers = list(re.finditer(r"<answer>(.*?)</answer>", "".join(pieces), re.DOTALL))
    if not answers:
        return None
    start, end = answers[-1].span(1)
    least = 0.0
    for logp, piece, stop in zip(logps, pieces, accumulate(map(len, pieces))):
        if piece and stop > start and stop - len(piece) < end:
            least = min(least, logp)
    return math.exp(least)


# ---- advantages -> loss -> optimizer


@dataclass
class Batch:
    """One rollout, ready to be learned from. Equal completions of a group share a row; R rows."""

    packs: list[Pack]
    adv: Tensor  # (R,)
    weight: Tensor  # (R,) of one token of the row, in the mean over the whole step
    copies: Tensor  # (R,) how many completions the row stands for
    old_logps: list[Tensor | None]  # of each pack (M,): under the policy that sampled


def make_batch(policy: Policy, cfg: Config, groups: list[Group]) -> tuple[Batch, int]:
    """-> (what to learn from, how many groups are scored). Without a KL, a group without an advantage is not
    scored at all: it has no gradient."""
    rank, _ = ranks()
    learned = [sum(c.sampled) * (c.finished or not cfg.mask_truncated) for g in groups for c in g.completions]
    lengths = gather(learned)  # the mean is over all ranks
    weight = loss_weights(torch.tensor(sum(lengths, [])), cfg.reduce, cfg.new_tokens)
    weight = weight.split([len(x) for x in lengths])[rank]
    adv = torch.tensor([a for g in groups for a in g.advantages])
    merged, first, copies = merge_repeats(groups)
    copies = torch.tensor(copies, dtype=weight.dtype)
    starts = [0, *accumulate(len(completions) for completions in merged)]
    scored = [i for i, group in enumerate(groups) if cfg.beta or any(group.advantages)]
    packs = make_packs(
        [groups[i].prompt for i in scored],
        [merged[i] for i in scored],
        [starts[i] for i in scored],
        cfg.pack_tokens,
        policy.device,
    )
    rows = [x.to(policy.device) for x in (adv[first], weight[first] * copies, copies)]
    return Batch(packs, *rows, old_logps=[None] * len(packs)), len(scored)


def merge_repeats(groups: list[Group]) -> tuple[list[list[Completion]], list[int], list[int]]:
    """Completions of a group that are equal, token by token, are scored once, with the sum of their weights:
    the loss and its gradient stay the same, and short answers repeat often.

    -> completions of each group; for each of these rows, where its first copy stands among all completions,
    and how many copies there are
    """
    merged, first, copies, n = [], [], [], 0
    for group in groups:
        kept, seen = [], {}
        for completion, adv in zip(group.completions, group.advantages):
            key = (*completion.ids, adv)
            if not all(completion.sampled):  # what it heard may differ
                key = id(completion)
            if key not in seen:
                seen[key] = len(first)
                first.append(n)
                copies.append(0)
                kept.append(completion)
            copies[seen[key]] += 1
            n += 1
        merged.append(kept)
    return merged, first, copies


def backward(policy: Policy, cfg: Config, batch: Batch, through_rollout: bool) -> dict[str, Tensor]:
    """Put the gradient of the step's loss into .grad, one pack after the other.    -> sums over the tokens,
    for the log

    through_rollout: prompts are not read again; the gradient goes back through the rollout's pass over them.
    No value of a tensor is read here, so tools/fits.py plays this very function through where tensors have
    sizes and no content.
    """
    prefixes = {}
    if through_rollout:
        prefixes = {id(pack.prefix): pack.prefix for pack in batch.packs if pack.prefix}
    copies = {key: prefix.detached() for key, prefix in prefixes.items()}
    sums = collections.Counter()
    for i, pack in enumerate(batch.packs):
        ref_logp = None
        if cfg.beta:
            with torch.no_grad(), reference(policy) as frozen:
                ref_logp, _ = token_logps(frozen, pack, cfg.temperature)
        logp, entropy = token_logps(policy, pack, cfg.temperature, copies.get(id(pack.prefix)))
        if batch.old_logps[i] is None:  # the first update is on-policy
            batch.old_logps[i] = logp.detach()
        old_logp, adv, weight = batch.old_logps[i], batch.adv[pack.row], batch.weight[pack.row]
        loss, ratio = grpo_loss(logp, old_logp, ref_logp, adv, weight, pack.row, cfg)
        loss.backward()
        with torch.no_grad():
            of_token = {
                "policy/logp": logp,
                "policy/entropy": entropy,
                "policy/clip_frac": is_clipped(ratio, adv, cfg.clip_low, cfg.clip_high),
                "policy/kl_old": kl_k3(logp, old_logp),
                "policy/sampler_gap": (old_logp - pack.sampler_logp).abs(),
            }
            if cfg.beta:
                of_token["policy/kl_ref"] = kl_k3(logp, ref_logp)
            n = batch.copies[pack.row]
            sums.update({name: (n * x).sum() for name, x in of_token.items()})
            sums.update({"tokens": n.sum(), "loss": loss.detach()})
    for key, prefix in prefixes.items():
        prefix.backward(copies[key])
    return sums


def update(policy: Policy, optimizer, cfg: Config, groups: list[Group]) -> dict[str, float]:
    """Optimizer steps on one rollout.       -> what the log says of them: means over the trained tokens of
    the step"""
    size = len(groups) // cfg.minibatches
    made = [make_batch(policy, cfg, groups[i : i + size]) for i in range(0, len(groups), size)]
    if cfg.minibatches > 1:
        score_before(policy, cfg, [batch for batch, _ in made])
    sums, norms, skipped = collections.Counter(), [], 0
    for nth in range(cfg.optimizer_steps):
        batch, _ = made[nth % cfg.minibatches]
        optimizer.zero_grad(set_to_none=True)
        sums.update(backward(policy, cfg, batch, through_rollout=nth == 0))  # later, the weights are others
        if not any(gather(len(batch.packs))):
            continue
        sum_gradients(policy)
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable().values(), MAX_GRAD_NORM)
        norms.append(norm.item())
        if math.isfinite(norms[-1]):
            optimizer.step()
        else:
            skipped += 1
    optimizer.zero_grad(set_to_none=True)
    for group in groups:
        group.prompt.read = None  # its memory is free
    values = {name: float(x) for name, x in sums.items()}  # not before: reading a value waits for the device
    values = total(values | {"scored": sum(scored for _, scored in made), "groups": len(groups)})
    record = {"policy/loss": values.pop("loss", 0.0) / cfg.optimizer_steps}
    record |= {"policy/clip_frac": 0.0, "policy/kl_old": 0.0}
    record["group/scored"] = values.pop("scored") / values.pop("groups")
    tokens = values.pop("tokens", 0) or 1
    record |= {name: x / tokens for name, x in values.items()}
    record["optim/grad_norm"] = sum(norms) / max(1, len(norms))
    record["optim/skipped"] = skipped
    return record


@torch.no_grad()
def score_before(policy: Policy, cfg: Config, batches: list[Batch]) -> None:
    """The log-probabilities that the ratios of all parts are measured to: those of before the first step."""
    for batch in batches:
        for i, pack in enumerate(batch.packs):
            batch.old_logps[i], _ = token_logps(policy, pack, cfg.temperature, pack.prefix)


# ------------------------------------------------------------------------------------------------------------
# The loop


def train(cfg: Config) -> tuple[str, bool]:
    """Run `cfg` from its start or its last checkpoint.       -> (run directory, did it come to its end?)"""
    from tools import trackers

    trackers.names_of(cfg.report_to)
    questions = open_data(cfg)
    find_model(cfg.model)  # before a directory is made for a run that cannot be
    rank, n_ranks = ranks()
    if cfg.prompts_per_step % (n_ranks * cfg.minibatches):
        among = f"among {n_ranks} ranks" + f" and {cfg.minibatches} minibatches" * (cfg.minibatches > 1)
        raise UserError(f"--prompts_per_step {cfg.prompts_per_step}: cannot be shared evenly {among}")
    out = gather("" if rank else open_run(cfg))[0]
    with contextlib.nullcontext() if rank else data.claimed(out):
        if rank == 0 and not cfg.resume:
            refuse_to_overwrite(out)
        return out, train_in(cfg, questions, out)


def warnings_of(cfg: Config) -> list[str]:
    """Flags that do nothing, or not what their paper does."""
    lines, idle = [], [n for n in ("loss", "importance", "clip_low", "clip_high") if is_changed(cfg, n)]
    if cfg.optimizer_steps == 1 and idle:
        flags = ", ".join(f"--{name}" for name in idle)
        lines.append(f"note: {flags}: no part in one optimizer step a rollout; see --minibatches")
    if cfg.importance == "sequence" and cfg.reduce == "token":
        lines.append("note: --importance sequence: its paper (GSPO) has --reduce sequence")
    return lines


def is_changed(cfg: Config, name: str) -> bool:
    return getattr(cfg, name) != getattr(Config, name)


def train_in(cfg: Config, questions: "Questions", out: str) -> bool:
    """The rest of `train`, in the run's directory, which no other process uses now."""
    from tools import trackers

    rank, n_ranks = ranks()
    if torch.cuda.is_available() and rank == 0:
        from tools.fits import preflight

        print(preflight(cfg, torch.cuda.get_device_properties(0).total_memory / 2**30), flush=True)
    torch.manual_seed(cfg.seed)  # LoRA's initial weights; everything else is seeded where it is drawn
    policy = load_run_policy(cfg)
    optimizer = make_optimizer(policy, cfg)
    # the ranks' places in the data
    state = {"step": 0, "record": None, "rl": list(range(n_ranks)), "cold": list(range(n_ranks))}
    if cfg.resume:
        state = load_checkpoint(policy, optimizer, out, n_ranks)
    has_log = gather(os.path.exists(os.path.join(out, "log.jsonl")))[0]
    if state["step"] and not has_log:
        raise UserError(f"--resume {out}: its log.jsonl is gone; put it back, or start another run")
    if rank == 0:
        for line in warnings_of(cfg):
            print(line, flush=True)
        about = machine()
        write_config(
            cfg,
            out,
            about | dict(ranks=n_ranks, data=questions.files, held_out=len(questions.held)),
            state["step"],
        )
        print(
            f"{out}: {cfg.model} in {str(policy.dtype)[6:]} on {about['hardware']}, "
            f"{sum(p.numel() for p in policy.trainable().values()):,} trained parameters, "
            f"{len(questions.rl[1]) if questions.rl else 0} questions, {len(questions.held)} held out",
            flush=True,
        )
    # a terminal that closes sends SIGHUP, a cluster that takes its machine back SIGTERM
    with interruptible("SIGINT", "SIGTERM", "SIGHUP") as stopping:
        if not cfg.resume:
            save_checkpoint(policy, optimizer, out, state)
        if not has_log:
            measured = measure(policy, cfg, questions.held, control=True, stopping=stopping)
            if measured is None:
                return False
            append_lines(out, "log.jsonl", [{"step": 0, **measured}])
        with trackers.following("" if rank else cfg.report_to, out):
            finished = loop(policy, optimizer, cfg, questions, out, state, stopping)
    if rank == 0:
        from tools.plots import draw_curves

        with writing(out):
            draw_curves(out)
            write_card(out, os.path.join(out, "adapter"))  # with the last evaluation
    return finished


def loop(policy: Policy, optimizer, cfg: Config, questions, out: str, state: dict, stopping: list) -> bool:
    """Rollout, reward, update, save, evaluate, log; until the last step or a signal.       -> was it the last
    step?

    A checkpoint holds the record of its step as long as that is not in the log: whoever is stopped during an
    evaluation evaluates again on --resume.
    """
    weights, last, first = parse_rewards(cfg.reward), cfg.cold_start_steps + cfg.steps, state["step"]
    phase, stream, bad, saved, flat_steps, lost_steps = None, None, {}, first, 0, 0
    rank = ranks()[0]
    last_logged = gather(read_log(out)[-1]["step"] if rank == 0 and state["record"] else 0)[0]
    logged = True
    if state["record"] and last_logged < first:
        logged = evaluate_and_log(policy, cfg, questions, out, state, stopping)
    keep_best(policy, optimizer, cfg, out, state)  # at step 0, or after a kill between log and save
    held_out = last_accuracy(out) if rank == 0 else None
    terminal, started, told = data.Lasting(sys.stderr), time.monotonic(), 0.0
    quiet = rank > 0 or not terminal.isatty()
    bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True, disable=quiet, file=terminal)
    # ranks may get a signal in different steps
    while logged and state["step"] < last and not any(gather(bool(stopping))):
        step = state["step"] + 1
        cold = step <= cfg.cold_start_steps
        if phase != ("cold" if cold else "rl"):
            phase = "cold" if cold else "rl"
            stream = draw(cfg, *getattr(questions, phase), state[phase][rank], phase, bad)
            stream = load_ahead(policy, cfg, stream, bad)
            if not cold:
                keep_reference(policy, cfg, out, step)
        lr = set_learning_rate(optimizer, cfg, step)
        try:
            record, groups = take_step(policy, optimizer, cfg, stream, weights, state, phase)
            record |= {"optim/lr": lr} | total({"audio/bad": len(bad)})
            if step % LOG_ROLLOUTS == 0 and not cold:
                append_lines(out, "rollouts.jsonl", sum(gather(rollout_lines(policy, cfg, step, groups)), []))
                if rank == 0:
                    tqdm.write(show_group(policy, groups[0], step), file=data.Lasting(sys.stdout))
            if step == last or step % cfg.save_every == 0:
                keep_some(policy, cfg, out, step)
                save_checkpoint(policy, optimizer, out, state)
                saved = step
            logged = evaluate_and_log(policy, cfg, questions, out, state, stopping)
            keep_best(policy, optimizer, cfg, out, state)
            lost_steps = lost_steps + 1 if record["optim/skipped"] == cfg.optimizer_steps else 0
            if lost_steps == min(10, last - first):
                raise UserError(f"all updates of {lost_steps} steps were skipped: gradients are not finite")
        except (UserError, RunStopped) as e:
            if isinstance(e, AudioError):  # the last step is whole
                save_checkpoint(policy, optimizer, out, state)
                saved = state["step"]
            bar.close()
            where = f"step {step}, lr {lr:g}; the last whole checkpoint is of step {saved}"
            raise type(e)(f"{e} ({where})") from None
        flat_steps = flat_steps + 1 if record["group/frac_zero_std"] == 1 and not cold else 0
        if flat_steps == 10 and rank == 0:
            tqdm.write(NO_SPREAD, file=data.Lasting(sys.stdout))
        bar.update()
        shown = {"logp": record["policy/logp"]} if cold else {"reward": record["reward/mean"]}
        held_out = record.get("eval/accuracy", held_out)
        if held_out is not None:
            shown["held_out"] = held_out
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()}, refresh=False)
        now = time.monotonic()
        if rank == 0 and quiet and (now - told >= PROGRESS_S or step == last or "eval/accuracy" in record):
            told = now
            print(progress_line(step, last, shown, (now - started) / (step - first)), file=terminal)
    bar.close()
    if saved != state["step"]:  # stopped by a signal
        save_checkpoint(policy, optimizer, out, state)
    return state["step"] >= last and logged


def progress_line(step: int, last: int, shown: dict[str, float], step_s: float) -> str:
    """Where there is no terminal for a bar: in a file, a line now and then."""
    values = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
    return (
        f"step {step} of {last}: {values}; {step_s:.1f} s a step, {step_s * (last - step) / 60:.0f} min left"
    )


def take_step(policy: Policy, optimizer, cfg: Config, stream, weights: dict, state: dict, phase: str):
    """Rollout, reward, update; `state` goes on by one step.       -> its record for the log, groups"""
    start, cold = time.monotonic(), phase == "cold"
    groups, drawn, every_group = draw_groups(policy, cfg, stream, weights, cold)
    if not cold:
        set_advantages(cfg, groups, weights)
    rolled = time.monotonic()
    step_cfg = dataclasses.replace(cfg, beta=0.0, temperature=1.0) if cold else cfg
    record = {"step": state["step"] + 1, **update(policy, optimizer, step_cfg, groups)}
    if cold:
        record.pop("policy/sampler_gap", None)  # nobody sampled the targets
    record |= describe(every_group, cfg) | total({"audio/cut": sum(d.was_cut for d in drawn)})
    record |= {"mem/peak_gib": peak_memory_gib(), "time/rollout_s": rolled - start}
    record["time/update_s"] = time.monotonic() - rolled
    state |= {"step": record["step"], "record": record, phase: gather(drawn[-1].cursor + ranks()[1])}
    return record, groups


def evaluate_and_log(policy: Policy, cfg: Config, questions, out: str, state: dict, stopping: list) -> bool:
    """Complete the record of the last step and append it to the log.       -> False: stopped before that"""
    record, last = state["record"], cfg.cold_start_steps + cfg.steps
    if record["step"] == last or record["step"] % cfg.eval_every == 0:
        start = time.monotonic()
        measured = measure(policy, cfg, questions.held, control=record["step"] == last, stopping=stopping)
        if measured is None:
            return False
        record |= measured | {"time/eval_s": time.monotonic() - start}
    append_lines(out, "log.jsonl", [record])
    state["record"] = None
    return True


def draw_groups(policy: Policy, cfg: Config, stream, weights: dict[str, float], cold: bool):
    """The next questions of the stream, answered and rewarded.       -> (groups to learn from, [Drawn], all
    groups)

    --resample_uniform draws again, three times at most, for groups without reward spread.
    """
    share = cfg.prompts_per_step // ranks()[1]
    groups, every_drawn, every_group = [], [], []
    for attempt in range(4):
        drawn = list(islice(stream, share - len(groups)))
        new = teacher_groups(policy, cfg, drawn) if cold else sample_groups(policy, cfg, drawn, weights)
        every_drawn += drawn
        every_group += new
        keep_all = cold or not cfg.resample_uniform or attempt == 3
        groups += [group for group in new if keep_all or group.has_spread]
        if len(groups) == share:
            break
    return groups, every_drawn, every_group


def set_learning_rate(optimizer, cfg: Config, step: int) -> float:
    """Linear warm-up, then constant or down to 0. The cold start and RL each have a schedule of their own."""
    if step <= cfg.cold_start_steps:
        nth, steps, lr = step, cfg.cold_start_steps, cfg.cold_start_lr or cfg.lr
    else:
        nth, steps, lr = step - cfg.cold_start_steps, cfg.steps, cfg.lr
    lr *= min(1.0, nth / max(1, cfg.warmup_steps))
    if cfg.lr_schedule == "linear":
        lr *= 1 - (nth - 1) / steps
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    return lr


def make_optimizer(policy: Policy, cfg: Config):
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(policy.trainable().values(), lr=cfg.lr, weight_decay=0.0)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(policy.trainable().values(), lr=cfg.lr, weight_decay=0.0)


def load_run_policy(cfg: Config, train: bool = True) -> Policy:
    flags = cfg.adapter, cfg.lora_rank, cfg.load_in_4bit, cfg.gradient_checkpointing
    policy = load_policy(cfg.model, *flags, train, cfg.dtype)
    if not train:
        print(f"{cfg.model} in {str(policy.dtype)[6:]}", file=sys.stderr, flush=True)
    return policy


def keep_reference(policy: Policy, cfg: Config, out: str, step: int) -> None:
    """At the first step of RL: what the KL is measured to. A fresh adapter needs no copy: switched off it is
    the base."""
    fresh = cfg.lora_rank and not cfg.adapter and not cfg.cold_start_steps
    if fresh or policy.reference or not cfg.beta:
        return
    path = os.path.join(out, "reference.pt")
    if step > cfg.cold_start_steps + 1:
        raise UserError(
            f"--beta {cfg.beta}: the reference at the start of RL was not kept, {path} is not there"
        )
    if ranks()[0] == 0:
        with writing(out):
            data.write_atomically(path, lambda part: torch.save(policy.trainable(), part))
    freeze_reference(policy)


# ---- what the log says of a step


def describe(groups: list[Group], cfg: Config) -> dict[str, float]:
    """Means over all rows and all groups of the step, of every rank."""
    rows = [c for group in groups for c in group.completions]
    sums = {"reward/mean": sum(sum(group.rewards) for group in groups)}
    for name in groups[0].parts[0]:
        sums[f"reward/{name}"] = sum(part[name] for group in groups for part in group.parts)
    sums["len/mean"] = sum(sum(c.sampled) for c in rows)
    sums["len/frac_truncated"] = sum(not c.finished for c in rows)
    if cfg.relistens:
        refused = sum((c.refused for c in rows), collections.Counter())
        sums["relisten/heard"] = sum(len(c.heard) for c in rows)
        sums["relisten/tokens"] = sum(len(c.ids) - sum(c.sampled) for c in rows)
        sums["relisten/refused"] = refused.total()
        for problem, n in refused.items():
            sums[f"relisten/refused_{problem.replace(' ', '_')}"] = n
    of_groups = {
        "group/frac_zero_std": sum(not group.has_spread for group in groups),
        "group/distinct": sum(len({tuple(c.ids) for c in group.completions}) for group in groups),
    }
    return mean_over_ranks(sums, len(rows)) | mean_over_ranks(of_groups, len(groups))


NO_SPREAD = (
    "ten steps without reward spread in any group: there is nothing to learn from. If reward/mean is 0, the "
    "answers are not recognised (read rollouts.jsonl) or the questions are too hard; at its maximum they are "
    "too easy. Try other data, another --prompt, or more --num_generations."
)


def rollout_lines(policy: Policy, cfg: Config, step: int, groups: list[Group]) -> list[dict]:
    """A line of rollouts.jsonl for every completion."""
    lines = []
    for group in groups:
        example = group.example
        # some lie inside a data set
        clips = [clip if isinstance(clip, str) else None for clip in example.clips]
        for i, completion in enumerate(group.completions):
            line = dict(step=step, id=example.id, question=example.question)
            line |= dict(choices=example.choices, answer=example.answer)
            line |= dict(completion=completion_text(policy, completion), reward=group.rewards[i])
            line |= dict(parts=group.parts[i], advantage=group.advantages[i], tokens=sum(completion.sampled))
            line |= dict(
                finished=completion.finished, audio=clips if len(clips) > 1 else (clips or [None])[0]
            )
            if cfg.relistens:
                line |= dict(heard=completion.heard, refused=dict(completion.refused))
            lines.append(line)
    return lines


def show_group(policy: Policy, group: Group, step: int) -> str:
    """One group on the terminal: the question, and what was sampled how often, for which reward."""
    e, said = group.example, collections.Counter()
    for completion, reward in zip(group.completions, group.rewards):
        said[f"{completion_text(policy, completion)[:60]!r} ({reward:g})"] += 1
    asked = f"{e.question} {e.choices} -> {e.choices[e.answer]!r}" if e.choices else e.question
    return f"step {step}: {asked}; sampled " + ", ".join(f"{n} x {text}" for text, n in said.most_common())


# ---- held-out accuracy


def measure(
    policy: Policy, cfg: Config, held: list[Example], control: bool, stopping: Collection = ()
) -> dict[str, float] | None:
    """Held-out accuracy for the log; with `control` also under silence (a gain that survives it is not
    hearing), and hearing the clip once, whatever a re-listening policy asks for. None if it was stopped."""
    if not held:
        return {}
    result, controls = evaluate(policy, cfg, held, EVAL_SAMPLES, stopping), {}
    if result is None:
        return None
    if control and cfg.audio == "real" and any(e.clips for e in held):
        controls["eval/accuracy_silence"] = dataclasses.replace(cfg, audio="silence")
    if control and cfg.relistens:
        controls["eval/accuracy_once"] = dataclasses.replace(cfg, max_relistens=0)
    for name, changed in controls.items():
        measured = evaluate(policy, changed, held, stopping=stopping)
        if measured is None:
            return None
        result[name] = measured["eval/accuracy"]
    return result


def evaluate(
    policy: Policy, cfg: Config, examples: list[Example], samples: int = 0, stopping: Collection = ()
) -> dict[str, float] | None:
    """-> eval/accuracy (greedy) and, of `samples` at the training temperature, eval/accuracy_sampled. None as
    soon as `stopping` holds something.

    A question whose clip cannot be heard counts as wrong, and eval/bad_audio says how many there are.
    """
    ways = [("eval/accuracy", 1, 0.0)]
    if samples:
        ways.append(("eval/accuracy_sampled", samples, cfg.temperature))
    right = {name: 0.0 for name, _, _ in ways} | {"heard": 0, "stopped": 0}
    rank, n_ranks = ranks()
    mine = islice(enumerate(examples), rank, None, n_ranks)
    loaded = data.ahead(mine, lambda item: load_clips_of(policy, cfg, item[1])[0], WORKERS, 2 * WORKERS)
    heard = ((i, e, clips) for (i, e), clips in loaded if not isinstance(clips, DataError))
    while batch := list(islice(heard, max(1, cfg.rollout_rows // max(1, samples)))):
        if stopping:
            right["stopped"] = 1
            break
        right["heard"] += len(batch)
        places, questions, clips = zip(*batch)
        prompts = encode_prompts(policy, cfg, questions, clips)
        seeds = [seed_of(cfg.seed, "eval", i) for i in places]
        for name, n, temperature in ways:
            done = rollout(policy, cfg, prompts, clips, seeds, n, temperature)
            for group, example in zip(done, questions):
                said = [Said(completion_text(policy, completion)) for completion in group]
                right[name] += sum(accuracy(x, example) for x in said) / n
    right = total(right)
    n_heard = right.pop("heard")
    if right.pop("stopped"):
        return None
    if not n_heard:
        raise UserError("none of the held-out clips can be heard; `python data.py check` lists why")
    result = {name: x / len(examples) for name, x in right.items()}
    return result | ({"eval/bad_audio": len(examples) - n_heard} if n_heard < len(examples) else {})


# ------------------------------------------------------------------------------------------------------------
# The questions of a run


@dataclass
class Questions:
    rl: tuple[Examples, list[int]] | None = None  # a data set, and which of its questions are trained on
    cold: tuple[Examples, list[int]] | None = None
    held: list[Example] = field(default_factory=list)
    files: dict = field(default_factory=dict)  # flag -> how many questions the file holds, and their hash


def open_data(cfg: Config) -> Questions:
    """Find what is wrong with the data before the model loads."""
    files, keys = {}, {}
    for flag, purpose in (("data", "train"), ("eval_data", "train"), ("cold_start_data", "cold_start")):
        path = getattr(cfg, flag)
        if path:
            files[flag] = Examples(path, cfg.audio_dir)
            to_split = flag == "eval_data" or not cfg.eval_data
            folder = files[flag].folder if to_split else ""
            keys[flag] = data.scan(files[flag], purpose, folder, deaf=cfg.audio == "none")
            if cfg.audio != "none":
                refuse_bad_audio(files[flag], cfg.max_audio_s)
            if ranks()[0] == 0:
                print(files[flag], flush=True)
    out = Questions()
    for flag, examples in files.items():
        out.files[flag] = dict(questions=len(examples), hash=examples.hash)
    if cfg.resume:
        refuse_other_data(cfg, out.files)
    if "cold_start_data" in files:
        out.cold = files["cold_start_data"], range(len(files["cold_start_data"]))
    if "eval_data" in files:
        some = data.sample_by_clip(keys["eval_data"], cfg.eval_size)[: cfg.eval_size]
        out.held = [files["eval_data"][i] for i in some]
    if "data" in files:
        examples, indices = files["data"], range(len(files["data"]))
        if cfg.eval_size and "eval_data" not in files:
            indices, held = data.held_out(keys["data"], cfg.eval_size)
            out.held = [examples[i] for i in held[: cfg.eval_size]]
        else:
            warn_of_shared_clips(out.held, set(keys["data"]))
        out.rl = examples, indices
        if cfg.order == "easy_to_hard":
            require_pass_rates(examples, indices)
    if cfg.steps and not out.rl:
        raise UserError(f"--steps {cfg.steps}: needs --data")
    if cfg.cold_start_steps and not out.cold:
        raise UserError(f"--cold_start_steps {cfg.cold_start_steps}: needs --cold_start_data")
    return out


def warn_of_shared_clips(held: list[Example], trained: set[int]) -> None:
    shared = sum(data.clip_key(example) in trained for example in held if example.clips)
    if shared and ranks()[0] == 0:
        print(
            f"warning: {shared} of the {len(held)} held-out questions are about a clip that --data has, too"
        )


def refuse_bad_audio(examples: Examples, max_audio_s: float) -> None:
    tried, problems = data.probe_audio(examples, max_audio_s)
    if len(problems) > min(MAX_BAD_AUDIO, tried // 100):  # one bad clip in a hundred is bad luck, more is not
        remedy = f"mend or drop these lines; `python data.py check {examples.path}` lists every one"
        raise DataError("\n".join([*problems[:10], remedy]))


def require_pass_rates(examples: Examples, indices) -> None:
    for i in indices:
        rate = examples[i].meta.get("pass_rate")
        if not isinstance(rate, int | float) or not math.isfinite(rate):
            where = examples.where(i)
            raise DataError(f'{where}: field "meta": --order easy_to_hard needs a number "pass_rate"')


def draw(cfg: Config, examples: Examples, indices, cursor: int, phase: str, bad: Collection = ()):
    """Endless (cursor, Example): the question at place `cursor` of this run is a function of the seed alone.
    N ranks take every N-th place each. A question whose clip has been found bad is not drawn again."""
    n, epoch, order, passed = len(indices), -1, None, 0
    if cfg.order == "easy_to_hard" and phase == "rl":
        order = sorted(indices, key=lambda i: -examples[i].meta["pass_rate"])
    while True:
        if cursor // n != epoch and (cfg.order == "shuffled" or phase == "cold"):
            epoch = cursor // n
            order = random.Random(seed_of(cfg.seed, phase, epoch)).sample(indices, n)
        example = examples[order[cursor % n]]
        if cfg.shuffle_choices and phase == "rl":
            example = data.shuffle_choices(example, random.Random(seed_of(cfg.seed, "choices", cursor)))
        passed = passed + 1 if bad and str(example.clips) in bad else 0
        if passed > n:
            raise AudioError(f"{examples.path}: none of its clips can be heard any more")
        if not passed:
            yield cursor, example
        cursor += ranks()[1]


def load_ahead(policy: Policy, cfg: Config, stream, bad: dict):
    """(cursor, Example) -> Drawn, its clips read by worker threads ahead of the step.

    A clip that cannot be heard is skipped and put on the list `bad`. Raises UserError past MAX_BAD_AUDIO of
    them.
    """
    loaded = data.ahead(
        stream, lambda item: load_clips_of(policy, cfg, item[1]), WORKERS, 2 * cfg.prompts_per_step
    )
    for drawn, ((cursor, example), heard) in enumerate(loaded):
        if not isinstance(heard, DataError):
            yield Drawn(cursor, example, *heard)
            continue
        bad[str(example.clips)] = heard
        if len(bad) > max(MAX_BAD_AUDIO, drawn // 100):
            raise AudioError(f"{len(bad)} clips could not be heard, the last: {heard}")


def load_clips_of(policy: Policy, cfg: Config, example: Example) -> tuple[list[Clip], bool]:
    return load_clips(policy, example, cfg.audio, cfg.max_audio_s, keep_samples=cfg.relistens > 0)


# ------------------------------------------------------------------------------------------------------------
# The run directory


def open_run(cfg: Config) -> str:
    """Find or make the run directory; of names of its own it takes the first that no other process has."""
    if cfg.resume:
        return cfg.resume
    if cfg.out:
        if os.path.exists(cfg.out) and not os.path.isdir(cfg.out):
            raise UserError(f"--out {cfg.out}: is a file")
        try:
            os.makedirs(cfg.out, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {cfg.out}: {e.strerror}") from None
        return cfg.out
    os.makedirs("runs", exist_ok=True)
    for i in count(1):
        out = usual_name(asdict(cfg)) + (f"-{i}" if i > 1 else "")
        with contextlib.suppress(FileExistsError):
            os.mkdir(out)
            return out


def usual_name(flags: dict) -> str:
    """The directory of a run without --out; "" without data."""
    path = flags.get("data") or flags.get("cold_start_data")
    return path and os.path.join("runs", os.path.splitext(os.path.basename(os.path.normpath(path)))[0])


def can_go_on(out: str) -> bool:
    return os.path.exists(os.path.join(out, "checkpoint", "state.pt"))


# what a run leaves that is killed before its first checkpoint
STARTED = {"config.json", "config.json.part", "adapter", "adapter.part", "model", "model.part", "checkpoint"}


def refuse_to_overwrite(out: str) -> None:
    """A new run needs an empty directory, or that of a run which was killed before its first checkpoint."""
    names = set(os.listdir(out))
    killed_early = any(name.startswith("config.json") for name in names) and names <= STARTED
    if names and (can_go_on(out) or not killed_early):
        remedy = "give another name"
        if can_go_on(out):
            remedy = f"go on with it by --resume {out}, or give another name"
        raise UserError(f"--out {out}: already holds something; {remedy}")


def write_config(cfg: Config, out: str, about: dict, step: int) -> None:
    """config.json: the run's flags, its data and machine, and what was changed at which --resume."""
    path, saved, history = os.path.join(out, "config.json"), asdict(cfg) | {"out": out, "resume": ""}, []
    if cfg.resume:
        before = read_config(out)
        history = before["history"]
        then = before["config"]
        changed = {k: [then[k], saved[k]] for k in then if then[k] != saved[k] and k != "out"}
        if changed:
            history.append(dict(step=step, changed=changed))
            print("changed: " + ", ".join(f"--{k} {old} -> {new}" for k, (old, new) in changed.items()))
    with writing(out):
        data.write_text(path, json.dumps(dict(config=saved) | about | dict(history=history), indent=1))


def read_config(out: str) -> dict:
    """Raises UserError if config.json is not that of a run of this version."""
    path = os.path.join(out, "config.json")
    with blame(f"--resume {out}: config.json"), open(path, encoding="utf-8") as f:
        content = json.load(f)
    saved = content.get("config") if isinstance(content, dict) else None
    if not isinstance(saved, dict) or set(saved) != {f.name for f in dataclasses.fields(Config)}:
        raise UserError(f"--resume {out}: config.json is not of this version; start the run again")
    with blame(f"--resume {out}: config.json"):
        Config(**saved)
    return {"data": {}, "history": []} | {key: value for key, value in content.items() if value}


def is_run(out: str) -> bool:
    """Is this the directory of a run of this version?"""
    try:
        return bool(read_config(out))
    except UserError:
        return False


def refuse_other_data(cfg: Config, files: dict) -> None:
    """A place in the order of other questions means nothing. A data set may be moved."""
    then = read_config(cfg.resume)
    if cfg.eval_size != then["config"]["eval_size"] and not cfg.eval_data:
        raise UserError(
            f"--eval_size {cfg.eval_size}: other questions would be held out than in the run so far"
        )
    nothing = {"questions": 0, "hash": "none"}
    for flag in ("data", "eval_data", "cold_start_data"):
        before, now = then["data"].get(flag, nothing), files.get(flag, nothing)
        if now != before:
            found = f"{now['questions']} questions (hash {now['hash']})"
            raise UserError(
                f"--{flag} {getattr(cfg, flag)}: {found}, and the run had {before['questions']} "
                f"(hash {before['hash']}); for other data start a run with --adapter {cfg.resume}/adapter"
            )


def save_weights(policy: Policy, out: str, name: str = "") -> None:
    """out/adapter in PEFT's format; out/model, a whole checkpoint directory, when all weights are trained.

    name: of another folder.
    """
    folder = os.path.join(out, name or ("adapter" if policy.has_adapter else "model"))
    part = folder + ".part"
    shutil.rmtree(part, ignore_errors=True)
    if policy.has_adapter:
        policy.model.save_pretrained(part, selected_adapters=["default"])
        os.remove(os.path.join(part, "README.md"))  # an empty form; tools/card.py writes what is known
    else:
        policy.model.save_pretrained(part)
        policy.tokenizer.save_pretrained(part)
        if policy.extractor is not None:
            policy.extractor.save_pretrained(part)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(part):
        os.replace(os.path.join(part, name), os.path.join(folder, name))
    shutil.rmtree(part)
    write_card(out, folder)


def write_card(out: str, folder: str) -> None:
    """README.md beside an adapter of the run."""
    from tools import card

    if os.path.exists(os.path.join(folder, "adapter_config.json")) and is_run(out):
        data.write_text(os.path.join(folder, "README.md"), card.card(out))


def save_checkpoint(policy: Policy, optimizer, out: str, state: dict) -> None:
    """One file, renamed into place. There is no random state to keep: every draw is a function of the seed
    and `state`."""
    if ranks()[0]:
        return
    content = dict(state=dict(state), weights=policy.trainable(), optimizer=optimizer.state_dict())
    with writing(out):
        os.makedirs(os.path.join(out, "checkpoint"), exist_ok=True)
        save_weights(policy, out)
        path = os.path.join(out, "checkpoint", "state.pt")
        data.write_atomically(path, lambda part: torch.save(content, part))


def keep_best(policy: Policy, optimizer, cfg: Config, out: str, state: dict) -> None:
    """--keep best: these weights go to out/best, unless the log holds a better evaluation."""
    if ranks()[0] or cfg.keep not in BEST:
        return
    measured = {r["step"]: r[BEST[cfg.keep]] for r in read_log(out) if BEST[cfg.keep] in r}
    if state["step"] not in measured or measured[state["step"]] < max(measured.values()):
        return
    save_checkpoint(policy, optimizer, out, state)  # from here on no kill makes the log forget this step
    with writing(out):
        save_weights(policy, out, "best")


def keep_some(policy: Policy, cfg: Config, out: str, step: int) -> None:
    """--keep N: the weights of the last N saves stay in out/step-STEP."""
    if ranks()[0] or not cfg.keep.isdecimal():
        return
    with writing(out):
        save_weights(policy, out, f"step-{step}")
        steps = [int(name[5:]) for name in os.listdir(out) if re.fullmatch(r"step-\d+", name)]
        for old in sorted(steps)[: -int(cfg.keep)]:
            shutil.rmtree(os.path.join(out, f"step-{old}"))


class RunStopped(Exception):
    """What ends a run that can go on once it is mended: exit code 1."""


@contextlib.contextmanager
def writing(out: str):
    """Around writing into the run directory: a full disk, or a directory that is gone, becomes one line."""
    import safetensors

    if not os.path.isdir(out):
        raise RunStopped(f"{out}: is gone")
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:  # torch.save raises a RuntimeError
        reason = getattr(e, "strerror", None) or " ".join(str(e).split())[:200]
        room = shutil.disk_usage(os.path.dirname(os.path.abspath(out))).free / 2**20
        raise RunStopped(f"{out}: could not be written, {reason}; {room:.0f} MiB are free") from None


def load_checkpoint(policy: Policy, optimizer, out: str, n_ranks: int) -> dict:
    """Put a run back as its last checkpoint left it, its logs included.       -> state"""

    def load(name):
        with blame(f"--resume {out}: {name}"):
            return torch.load(os.path.join(out, name), map_location=policy.device, weights_only=True)

    def fill(weights):
        trainable = policy.trainable()
        if {n: p.shape for n, p in weights.items()} != {n: p.shape for n, p in trainable.items()}:
            raise UserError(f"--resume {out}: its checkpoint is of another model or another --lora_rank")
        for name, p in trainable.items():
            p.data.copy_(weights[name])

    if os.path.exists(os.path.join(out, "reference.pt")):
        fill(load("reference.pt"))
        freeze_reference(policy)
    content = load("checkpoint/state.pt")
    if not isinstance(content, dict) or not content.keys() >= {"state", "weights", "optimizer"}:
        raise UserError(f"--resume {out}: checkpoint/state.pt is not a checkpoint of this trainer")
    state = content["state"]
    if not isinstance(state, dict) or not isinstance(content["weights"], dict) or "rl" not in state:
        raise UserError(f"--resume {out}: checkpoint/state.pt is damaged")
    if len(state["rl"]) != n_ranks:
        n = len(state["rl"])
        raise UserError(
            f"--resume {out}: the run has {n} ranks, each with its own place in the data, and not {n_ranks}; "
            f"go on with torchrun --nproc_per_node {n}"
        )
    fill(content["weights"])
    with blame(f"--resume {out}: checkpoint/state.pt, its optimizer"):
        optimizer.load_state_dict(content["optimizer"])
    if ranks()[0] == 0:
        for name in ("log.jsonl", "rollouts.jsonl"):
            forget_later_lines(os.path.join(out, name), state["step"])
    return state


def forget_later_lines(path: str, step: int) -> None:
    """What a killed run wrote after its last checkpoint is written again."""
    if not os.path.exists(path):
        return
    with blame(f"--resume: {path}"), open(path, encoding="utf-8") as f:
        whole = [line for line in f if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
    with writing(os.path.dirname(path)):
        data.write_text(path, "".join(kept))


def append_lines(out: str, name: str, records: list[dict]) -> None:
    if ranks()[0]:
        return
    lines = "".join(json.dumps(strict(record), allow_nan=False) + "\n" for record in records)
    with writing(out), open(os.path.join(out, name), "a", encoding="utf-8") as f:
        f.write(lines)


def strict(x):
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(x, dict):
        return {name: strict(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [strict(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def read_log(out: str) -> list[dict]:
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def last_accuracy(out: str) -> float | None:
    measured = [record["eval/accuracy"] for record in read_log(out) if "eval/accuracy" in record]
    return measured[-1] if measured else None


def machine() -> dict:
    import transformers

    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=folder)
        commit = git.stdout.strip()
    except OSError:  # no git
        commit = ""
    cuda = torch.cuda.is_available()
    return dict(
        commit=commit,
        python=sys.version.split()[0],
        torch=torch.__version__,
        transformers=transformers.__version__,
        hardware=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    )


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ------------------------------------------------------------------------------------------------------------
# More than one card: torchrun starts a process (rank) for each; the ranks share the prompts of a step and sum
# its gradient


def join_ranks() -> None:
    """Under torchrun, find the other ranks. Tensors go over NCCL where there are cards, all else over
    gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


class RankLost(RunStopped):
    """Another rank has ended."""


@contextlib.contextmanager
def notice_lost_rank():
    try:
        yield
    except RuntimeError as e:  # what the libraries say when a connection breaks
        reason = " ".join(str(e).split())[:120]
        raise RankLost(f"rank {ranks()[0]}: another rank ended ({reason}); go on with --resume") from None


def ranks() -> tuple[int, int]:
    """-> (this process's number, how many there are)"""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather(x) -> list:
    """x of every rank, in their order; all of them wait here for the last. Raises RankLost."""
    out = [x] * ranks()[1]
    if len(out) > 1:
        with notice_lost_rank():
            torch.distributed.all_gather_object(out, x)
    return out


def total(x: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks; a name that only some of them have counts as 0 with the others."""
    sums = {}
    for of_rank in gather(x):
        for name, value in of_rank.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def mean_over_ranks(sums: dict[str, float], n: int) -> dict[str, float]:
    """Sums over the n things of each rank -> means over the things of all ranks"""
    sums = total(sums | {"n": n})
    n = sums.pop("n")
    return {name: value / n for name, value in sums.items()}


def sum_gradients(policy: Policy) -> None:
    """One message with all gradients; every rank gets the same sum, and so takes the same step."""
    if ranks()[1] == 1:
        return
    parameters = policy.trainable().values()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([grad.flatten() for grad in grads])
    with notice_lost_rank():
        torch.distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)


# ------------------------------------------------------------------------------------------------------------
# Command line


def parse_config(argv=None) -> tuple[Config, str]:
    """Flags -> (Config, which demo it is, if any). With --resume the run's own config.json stands behind the
    flags."""
    from tools.demo import DEMOS

    parser = data.Parser(description=__doc__)
    parser.add_knobs(Config)
    parser.add_argument(
        "--demo",
        choices=list(DEMOS),
        help="sounds: tell sounds apart, the default without --data | relisten: listen again to what is too "
        "faint beside a loud sound",
    )
    given = vars(parser.parse_args(argv))
    demo = given.pop("demo", "")
    if given.get("resume") == "auto":
        given["out"] = given.get("out") or usual_name(given) or usual_name(DEMOS[demo or "sounds"])
        given["resume"] = "--out"
        if not can_go_on(given["out"]):
            del given["resume"]
    if "resume" in given:
        return resume_config(given), ""
    own = given.get("data") or given.get("cold_start_data")
    if own and demo:
        raise UserError(f"--demo {demo}: brings its own data; leave out --data and --cold_start_data")
    if own:
        return Config(**({} if given.get("data") else {"steps": 0}) | given), ""
    demo = demo or "sounds"
    return Config(**DEMOS[demo] | given), demo


# What --resume does not change: with it, the run's past and its future would be of two different runs
FIXED = (
    "model adapter seed prompt reward audio lora_rank optimizer order shuffle_choices cold_start_steps"
).split()


def resume_config(given: dict) -> Config:
    """The run's own config.json, with the given flags in place of its values."""
    run = given.get("out", "") if given["resume"] == "--out" else given["resume"]
    if not run:
        raise UserError("--resume: name the run, --resume runs/NAME")
    if os.path.normpath(given.get("out", run)) != os.path.normpath(run):
        raise UserError(
            f"--out {given['out']}: a run goes on where it is; leave it out beside --resume {run}"
        )
    if not can_go_on(run):
        raise UserError(f"--resume {run}: no checkpoint there; start it by the same command without --resume")
    saved = read_config(run)["config"]
    for name in FIXED:
        if given.get(name, saved[name]) != saved[name]:
            remedy = f"start another run, with --adapter {run}/adapter to begin where this one is"
            raise UserError(
                f"--{name} {given[name]}: cannot be changed on --resume, the run has {saved[name]}; {remedy}"
            )
    return Config(**saved | given | dict(out=run, resume=run))


SMALLER = (
    "In order of harmlessness: lower --pack_tokens, lower --rollout_rows, use --gradient_checkpointing, "
    "--load_in_4bit, then lower --max_audio_s, --max_new_tokens, --num_generations, --lora_rank. The last "
    "checkpoint is whole: go on with --resume."
)


def run(argv=None) -> int:
    cfg, demo = parse_config(argv)
    finished = True
    if demo and os.environ.get("RANK", "0") == "0":
        from tools.demo import make_demo

        finished = make_demo(demo, lambda **knobs: train(Config(**knobs)))
    join_ranks()  # the others wait here for the demo's base
    out, finished = train(cfg) if finished else ("", False)
    if not finished:
        if ranks()[0] == 0:
            n = ranks()[1]
            command = f"torchrun --nproc_per_node {n} omni_grpo.py" if n > 1 else "python omni_grpo.py"
            print(f"stopped; go on with: {command} --resume {out}" if out else "stopped", flush=True)
        return 130
    if ranks()[0]:
        return 0
    evaluations = [record for record in read_log(out) if "eval/accuracy" in record]
    for record in evaluations[:1] + evaluations[1:][-1:]:
        scores = [f"{key[5:]} {value:.3f}" for key, value in record.items() if key.startswith("eval/")]
        print(f"step {record['step']:>4}: " + ", ".join(scores))
    print(f"{out}: " + ", ".join(sorted(os.listdir(out))))
    return 0


def main(argv=None) -> int:
    """-> exit code: 0 at the end of the run; 1 for what ends a run that can go on; 2 for what the user can
    mend; 130 after SIGINT, SIGTERM or SIGHUP"""
    try:
        return data.exit_code(lambda: run(argv), "--resume goes on from the last checkpoint")
    except RunStopped as e:
        print(f"error: {e}", file=sys.stderr)
    except torch.OutOfMemoryError as e:
        print(f"error: out of memory ({str(e).split('. ')[0]}). {SMALLER}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    # tools that import this script get this one, not a second copy
    sys.modules["omni_grpo"] = sys.modules["__main__"]
    sys.exit(main())
