"""GRPO for audio question answering, from scratch, on one 48 GB card.

    python omni_grpo.py                            the built-in demo: a tiny Qwen2.5-Omni learns to listen, on a CPU
    python omni_grpo.py --data avqa_gpt.jsonl      Qwen2.5-Omni-7B on your questions

One step: sample G completions for each of P prompts, reward them, normalise the rewards within each group, and move the
policy by the clipped surrogate with a KL penalty to a frozen reference (DeepSeekMath, arXiv 2402.03300). The setting is
Omni-R1's (arXiv 2505.09439): a direct answer and a correctness reward. What differs from the papers:

  - LoRA on the language model's linear layers instead of full fine-tuning; the reference is the adapter switched off.
  - A prompt is read once a step: its keys and values serve all G completions in the rollout and in the loss, whose gradient
    goes back through that same pass. There is no padding, and the result is exactly that of G separate rows.
  - The loss is a weighted sum over the trained tokens of the whole step; the weights (one vector) are the only place
    where token, sequence and constant means differ, so nothing depends on how a step is cut into packs.
  - Sampling is the full softmax at --temperature, and scoring divides by the same temperature. There is no top-p or
    top-k, on purpose: what is scored must be what was sampled.
  - All randomness is a function of (seed, step, prompt): nothing but the step number has to be restored on --resume.

Alphabet: P prompts a step, G completions a prompt, R = P * G rows, S prompt tokens, T completion tokens, N packed tokens,
M trained tokens, V vocabulary, H hidden size.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, count, islice
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import data
from data import PROMPTS, DataError, Example, Examples, UserError
from reward import Text, accuracy, nearest, parse_rewards, score

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every knob is one line here, and one flag


def arg(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass
class Config:
    # what to train on
    data: str = arg("", "questions, JSONL (see data.py); none: the built-in demo")
    eval_data: str = arg("", "held-out questions; none: --eval_size questions are split off --data, by clip")
    eval_size: int = arg(200, "held-out questions used; 0: no evaluation")
    model: str = arg("Qwen/Qwen2.5-Omni-7B", "checkpoint: a local directory or a Hub id, safetensors only")
    adapter: str = arg("", "LoRA adapter to start from (it is then also the reference)")
    cold_start_data: str = arg("", "questions with a `target` to imitate first (same update, advantage 1)")
    cold_start_steps: int = arg(0, "supervised steps on --cold_start_data before the first GRPO step")
    # the run
    out: str = arg("", "run directory; none: runs/<name of the data>, with a number if that is taken")
    resume: str = arg("", "go on from the last checkpoint of --out (or of the directory named here)")
    seed: int = arg(0, "seed of LoRA, data order, choice order and sampling")
    steps: int = arg(1000, "GRPO steps (one rollout each)")
    save_every: int = arg(50, "steps between checkpoints")
    eval_every: int = arg(100, "steps between evaluations; step 0 and the last are always evaluated")
    eval_samples: int = arg(4, "samples a question behind eval/accuracy_sampled")
    log_rollouts: int = arg(10, "steps between entries in rollouts.jsonl")
    # prompt, reward, rollout
    prompt: str = arg("direct", "prompt template: " + " | ".join(PROMPTS))
    reward: str = arg("accuracy=1", "weighted rewards, e.g. accuracy=1,format=0.5")
    prompts_per_step: int = arg(16, "P, prompts a step")
    num_generations: int = arg(8, "G, completions a prompt")
    temperature: float = arg(1.0, "of sampling and of scoring")
    max_new_tokens: int = arg(0, "longest completion; 0: the prompt template's (32 direct, 256 thinking)")
    # re-listening (Echo, arXiv 2602.11909): a completion that writes <seg>start, end</seg> hears that part of its clip again
    max_relistens: int = arg(
        -1, "parts that a completion may hear again; 0: none, -1: the prompt template's (8 relisten)"
    )
    min_relisten_s: float = arg(0.2, "seconds; of a shorter part nothing is heard")
    max_relisten_s: float = arg(10.0, "seconds; of a longer part nothing is heard")
    relisten_tokens: int = arg(
        512, "most tokens that the parts heard again add to a completion (25 a second)"
    )
    relisten_from: str = arg(
        "audio",
        "audio: the part itself goes through the audio tower | embeddings: those of the prompt",
        ("audio", "embeddings"),
    )
    # ablations: one flag, one line of code, one row of the README's table
    scale: str = arg(
        "std", "advantage scale: std (GRPO) | none (Dr. GRPO, arXiv 2503.20783)", ("std", "none")
    )
    reduce: str = arg(
        "sequence",
        "loss mean: sequence (GRPO) | token (DAPO, arXiv 2503.14476) | constant (Dr. GRPO)",
        ("sequence", "token", "constant"),
    )
    clip_low: float = arg(0.2, "ratio floor is 1 - clip_low (PPO, arXiv 1707.06347)")
    clip_high: float = arg(0.2, "ratio ceiling is 1 + clip_high (DAPO's clip-higher uses 0.28)")
    importance: str = arg(
        "token", "importance ratio: token (GRPO) | sequence (GSPO, arXiv 2507.18071)", ("token", "sequence")
    )
    beta: float = arg(0.04, "weight of the k3 KL to the reference; 0: no reference at all")
    updates_per_rollout: int = arg(1, "optimizer steps on each rollout")
    audio: str = arg(
        "real", "what is played: real | silence (same length) | none (text only)", ("real", "silence", "none")
    )
    shuffle_choices: bool = arg(True, "another order of the options every time a question is drawn")
    order: str = arg(
        "shuffled",
        "shuffled | easy_to_hard (by `pass_rate` in meta, SARI, arXiv 2504.15900)",
        ("shuffled", "easy_to_hard"),
    )
    resample_uniform: bool = arg(
        False, "draw new prompts for groups without reward spread (DAPO dynamic sampling)"
    )
    # optimisation
    lr: float = arg(1e-5, "AdamW learning rate; 1e-6 is a full fine-tuning rate and does not move LoRA")
    cold_start_lr: float = arg(
        0.0, "AdamW learning rate of the cold start, which bears a higher one (0: --lr)"
    )
    warmup_steps: int = arg(10, "steps of linear warm-up, of the cold start and of RL")
    lr_schedule: str = arg(
        "constant",
        "after the warm-up: constant | linear (down to 0 at the end of the stage)",
        ("constant", "linear"),
    )
    max_grad_norm: float = arg(1.0, "gradient norm ceiling")
    optimizer: str = arg("adamw8bit", "adamw8bit (bitsandbytes) | adamw (torch)", ("adamw8bit", "adamw"))
    lora_rank: int = arg(
        32, "LoRA rank on all linear layers of the language model; 0: full fine-tuning (small models)"
    )
    lora_alpha: int = arg(64, "LoRA scale is lora_alpha / lora_rank")
    # memory and speed
    load_in_4bit: bool = arg(False, "nf4 base weights, for cards under 24 GB")
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass")
    pack_tokens: int = arg(8192, "tokens scored in one forward pass (at least one group)")
    rollout_rows: int = arg(128, "completions decoded together")
    reuse_prefix: bool = arg(
        True, "learn through the rollout's own pass over the prompts; off: read them again, less memory"
    )
    workers: int = arg(4, "threads that read audio ahead of the step")
    max_audio_s: float = arg(30.0, "seconds of a clip that are heard, at most 300")
    max_bad_audio: int = arg(10, "unreadable clips that are skipped before the run stops")

    def __post_init__(self):
        rules = [
            ("num_generations", self.num_generations >= 2, "a group needs at least 2 to compare"),
            ("temperature", 0 < self.temperature < math.inf, "sampling needs a temperature above 0"),
            ("max_audio_s", 0 < self.max_audio_s <= 300, "the audio front end hears at most 300 s"),
            ("clip_low", 0 <= self.clip_low <= 1, "the ratio floor 1 - clip_low must lie in [0, 1]"),
            ("model", bool(self.model), "name a directory or a Hub id"),
            ("seed", 0 <= self.seed < 2**63, "must lie in [0, 2**63)"),
            ("max_relistens", -1 <= self.max_relistens < 2**31, "must be -1 or more"),
            (
                "min_relisten_s",
                0.025 <= self.min_relisten_s < math.inf,
                "less than 0.025 s gives no audio token",
            ),
            ("adapter", not self.adapter or self.lora_rank > 0, "--lora_rank 0 has no use for an adapter"),
            ("prompt", self.prompt in PROMPTS, f"unknown{nearest(self.prompt, PROMPTS)}"),
        ]
        rules += [
            (k, 1 <= getattr(self, k) < 2**31, "must be at least 1")
            for k in (
                "prompts_per_step",
                "updates_per_rollout",
                "save_every",
                "eval_every",
                "eval_samples",
                "log_rollouts",
                "pack_tokens",
                "rollout_rows",
                "workers",
                "lora_alpha",
            )
        ]
        rules += [
            (k, 0 <= getattr(self, k) < math.inf, "must be 0 or more")
            for k in (
                "steps",
                "cold_start_steps",
                "eval_size",
                "max_new_tokens",
                "clip_high",
                "beta",
                "lr",
                "cold_start_lr",
                "warmup_steps",
                "lora_rank",
                "max_bad_audio",
                "max_grad_norm",
                "max_relisten_s",
                "relisten_tokens",
            )
        ]
        for f in dataclasses.fields(self):
            allowed = f.metadata["choices"]
            rules.append(
                (f.name, not allowed or getattr(self, f.name) in allowed, f"must be one of {allowed}")
            )
        for name, ok, why in rules:
            if not ok:
                raise UserError(f"--{name} {getattr(self, name)}: {why}")
        try:
            parse_rewards(self.reward)
        except ValueError as e:
            raise UserError(f"--reward {self.reward}: {e}") from None

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or PROMPTS[self.prompt].max_new_tokens

    @property
    def relistens(self) -> int:
        most = PROMPTS[self.prompt].relistens if self.max_relistens < 0 else self.max_relistens
        return 0 if self.audio == "none" else most


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics: pure functions of tensors and floats


def group_advantages(rewards: Tensor, scale: str = "std", eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean r) / (std r + eps), within each prompt's group.       rewards (P, G) -> (P, G)

    DeepSeekMath (arXiv 2402.03300), population std; scale="none" leaves the std out: Dr. GRPO (arXiv 2503.20783).
    A group whose rewards are all equal gets exactly 0: rounding in the mean, divided by its own std, would not be.
    """
    adv = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "std":
        adv = adv / (rewards.std(dim=1, keepdim=True, unbiased=False) + eps)
    return adv.masked_fill(uniform(rewards)[:, None], 0.0)


def uniform(rewards: Tensor) -> Tensor:
    """Groups without reward spread.       rewards (P, G) -> bool (P,)"""
    return rewards.amax(dim=1) == rewards.amin(dim=1)


def loss_weights(lengths: Tensor, reduce: str, max_tokens: int) -> Tensor:
    """What one trained token of each row weighs in the loss of the whole step.       lengths (R,) -> (R,)

    sequence: mean over rows of the mean over tokens (GRPO, arXiv 2402.03300); token: mean over all tokens (DAPO, arXiv
    2503.14476); constant: sum over tokens / (R * max_tokens) (Dr. GRPO, arXiv 2503.20783). A row of length 0 weighs 0.
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
    """token: exp(logp - old_logp). sequence: the same for all tokens of a row, exp of the row's mean (GSPO, arXiv
    2507.18071).       logp, old_logp (M,), row (M,) row of each token -> (M,)"""
    log_ratio = logp - old_logp
    if importance == "sequence":
        rows = int(row.max()) + 1 if len(row) else 0
        total = torch.zeros(rows, dtype=logp.dtype, device=logp.device).index_add(0, row, log_ratio)
        count = torch.bincount(row, minlength=rows).clamp(min=1)
        log_ratio = (total / count)[row]
    return torch.exp(log_ratio)


def policy_loss(ratio: Tensor, adv: Tensor, weight: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """- sum_m w_m min(ratio_m A_m, clip(ratio_m, 1 - clip_low, 1 + clip_high) A_m)       all (M,) -> scalar

    PPO's clipped surrogate (arXiv 1707.06347), negated to be minimised. While ratio = 1 its value is -sum w A, often 0,
    and its gradient is the policy gradient all the same.
    """
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -(weight * torch.minimum(ratio * adv, clipped * adv)).sum()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token: exp(d) - 1 - d, d = ref_logp - logp; never negative.  (M,) -> (M,)

    Schulman's "k3", as in DeepSeekMath eq. 4. expm1 keeps it exact near d = 0; d is capped so that exp cannot overflow.
    """
    d = (ref_logp.float() - logp.float()).clamp(max=20.0)
    return torch.expm1(d) - d


def token_entropy(logps: Tensor) -> Tensor:
    """- sum_v p_v log p_v       logps (M, V) -> (M,)"""
    return -(logps.exp() * logps).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Packs: tokens of all lengths in one row, without padding. Prompts are read first, [prompt 1 | prompt 2 | ...]; completions
# follow in rows of their own, [completion 1 of prompt 1 | completion 2 of prompt 1 | ...], and attend to what was read.


@dataclass
class Tokens:
    """Token ids with audio embeddings in their place: audio is a list of (start, (n, H)). Placed by position, because
    the policy may sample the placeholder's id."""

    ids: list[int]
    audio: list[tuple[int, Tensor]] = field(default_factory=list)


@dataclass
class Completion(Tokens):
    """What follows a prompt. Tokens the environment put there are fed to the model and never trained: sampled False."""

    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # as the sampler saw them, 0 where not sampled
    finished: bool = False  # ended by itself; otherwise it was cut at max_new_tokens
    heard: list[tuple[float, float]] = field(
        default_factory=list
    )  # parts of the clip that were heard again, seconds
    refused: collections.Counter = field(default_factory=collections.Counter)  # and why others were not

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.sampled.append(True)

    def insert(self, tokens: Tokens) -> None:
        self.audio += [(len(self.ids) + start, audio) for start, audio in tokens.audio]
        self.ids += tokens.ids
        self.sampled += [False] * len(tokens.ids)


@dataclass
class Prefix:
    """Prompts that a policy has read: all that their completions need of them, computed once."""

    prompts: list[Tokens]
    kv: list[
        tuple[Tensor, Tensor]
    ]  # a layer: keys and values (1, KV heads, N, d), the prompts one after the other
    ends: Tensor  # (P, H) hidden states at the prompts' last tokens, which predict the completions' first

    def bounds(self) -> list[tuple[int, int]]:
        """Where each prompt lies among the N tokens."""
        ends = list(accumulate(len(p.ids) for p in self.prompts))
        return list(zip([0, *ends], ends))

    def cut(self) -> "Prefix":
        """A copy that collects gradients, from as many backward passes as there are, and keeps them for `backward`."""

        def leaf(x):
            return x.detach().requires_grad_(x.requires_grad)

        return Prefix(self.prompts, [(leaf(k), leaf(v)) for k, v in self.kv], leaf(self.ends))

    def backward(self, leaves: "Prefix") -> None:
        """What `leaves`, a cut of this prefix, has collected goes on to the weights."""
        pairs = zip([self.ends, *chain(*self.kv)], [leaves.ends, *chain(*leaves.kv)])
        pairs = [(x, leaf.grad) for x, leaf in pairs if leaf.grad is not None]
        if pairs:
            torch.autograd.backward(*zip(*pairs))


@dataclass
class Group:
    example: Example
    prompt: Tokens
    completions: list[Completion]
    read: tuple[Prefix, int] | None = None  # the rollout's pass over the prompt, and its place there
    rewards: list[float] = field(default_factory=list)
    parts: list[dict] = field(default_factory=list)


@dataclass
class Pack:
    """Completions of some groups in one row of n tokens; M of their tokens are trained."""

    prompts: list[Tokens]
    prefix: Prefix | None  # where the rollout has read these prompts, and their places there
    places: Sequence[int]
    parts: list[Tokens]
    positions: Tensor  # (n,)
    spans: list[
        tuple[int, int, Tensor]
    ]  # a group: where its completions start and end, and their mask (1, 1, n, S + n)
    predict: Tensor  # (M,) what predicts the token: the prompts' ends come first, then the n tokens
    target: Tensor  # (M,) the token
    row: Tensor  # (M,) which completion of the step it belongs to


def make_pack(groups: list[Group], rows: list[int], device="cpu", prefixes=(None,), places=()) -> Pack:
    """`rows`: the number, within the step, of each group's first completion. `prefixes`, all the same one, and `places` in
    it: where the prompts were read; none: they will be read in this order."""
    parts, positions, spans, predict, target, row = [], [], [], [], [], []
    at = 0
    for n, (group, first_row) in enumerate(zip(groups, rows)):
        size, start, owner = len(group.prompt.ids), at, []
        for i, completion in enumerate(group.completions):
            trained = torch.tensor(completion.sampled, dtype=torch.bool).nonzero()[:, 0]
            predict.append(torch.where(trained == 0, n, len(groups) + at + trained - 1))
            target.append(torch.tensor(completion.ids, dtype=torch.long)[trained])
            row.append(torch.full((len(trained),), first_row + i))
            fed = len(completion.ids) - 1  # the last token predicts nothing
            parts.append(
                Tokens(completion.ids[:fed], [(s, a[: fed - s]) for s, a in completion.audio if s < fed])
            )
            positions.append(torch.arange(size, size + fed))
            owner.append(torch.full((fed,), i))
            at += fed
        owner = torch.cat(owner)
        order = torch.arange(len(owner))
        own = (owner[:, None] == owner[None, :]) & (
            order[:, None] >= order[None, :]
        )  # same completion, not later
        mask = torch.cat([torch.ones(len(owner), size, dtype=torch.bool), own], dim=1)
        spans.append((start, at, mask.to(device)[None, None]))
    positions, predict, target, row = (torch.cat(x).to(device) for x in (positions, predict, target, row))
    return Pack(
        [g.prompt for g in groups], prefixes[0], places, parts, positions, spans, predict, target, row
    )


def packed_attention(module, query, key, value, attention_mask, pattern=None, **kwargs):
    """The library asks here for attention; `pattern` says who sees whom.       query (1, heads, N, d) -> (1, N, heads, d)

    Without one (the library's own generate) it is ordinary attention.
    """
    if pattern is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("sliding_window") is not None or kwargs.get("softcap") is not None:
        raise UserError("this model's attention has a sliding window or a soft cap, which packs do not have")
    return pattern.attend(module.layer_idx, query, key, value, kwargs.get("scaling")).transpose(1, 2), None


def attend(query, key, value, scaling, mask=None, causal=False):
    """Grouped-query attention of one row; keys are shared by heads, not copied.       (1, heads, n, d), (1, KV heads, m, d)"""
    kv, (n, d) = key.shape[1], query.shape[2:]
    query = query[0].reshape(kv, -1, n, d)
    key, value = (x[0, :, None].expand(-1, query.shape[1], -1, -1) for x in (key, value))
    return fused_attention(query, key, value, scaling, mask, causal).reshape(1, -1, n, d)


def fused_attention(query, key, value, scaling, mask=None, causal=False):
    if query.is_meta:  # left to itself, `rehearse` would count a matrix of scores that no real device holds
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)[0]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)


class Reading:
    """Prompts: every token sees the earlier ones of its own prompt. Keys and values are kept for what follows."""

    def __init__(self, bounds: list[tuple[int, int]]):
        self.bounds, self.kv = bounds, {}

    def attend(self, layer: int, query, key, value, scaling):
        self.kv.setdefault(layer, (key, value))  # a checkpointed layer comes by again in the backward pass
        return torch.cat(
            [
                attend(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling, causal=True)
                for a, b in self.bounds
            ],
            dim=2,
        )


class Scoring:
    """Completions: every token sees its prompt, and the earlier tokens of its own completion."""

    def __init__(self, prefix: Prefix, places: Sequence[int], spans: list):
        self.kv, self.bounds = prefix.kv, prefix.bounds()
        self.spans = [(*self.bounds[place], *span) for place, span in zip(places, spans) if span[1] > span[0]]

    def attend(self, layer: int, query, key, value, scaling):
        keys, values = self.kv[layer]
        return torch.cat(
            [
                attend(
                    query[:, :, a:b],
                    torch.cat([keys[:, :, p:q], key[:, :, a:b]], dim=2),
                    torch.cat([values[:, :, p:q], value[:, :, a:b]], dim=2),
                    scaling,
                    mask,
                )
                for p, q, a, b, mask in self.spans
            ],
            dim=2,
        )


class ReadingAndScoring(Scoring):
    """Prompts and, after all of them, their completions, in one pass."""

    def attend(self, layer: int, query, key, value, scaling):
        n = self.bounds[-1][1]
        prompts, completions = (
            [x[:, :, part] for x in (query, key, value)] for part in (slice(n), slice(n, None))
        )
        self.kv = {layer: prompts[1:]}
        out = Reading(self.bounds).attend(layer, *prompts, scaling)
        return torch.cat([out, super().attend(layer, *completions, scaling)], dim=2) if self.spans else out


class Decoding:
    """One token of every row: it sees its prompt, and the tokens its row has so far. Behind them, blocks of some rows.

    Keys and values lie in one line a prompt, [prompt | token 1 of rows 1 ... G | token 2 of rows 1 ... G | ...]: the prompt's
    are there once, read once for all its rows, and never copied. place (R,): row r of the batch is row place[r] of P * G.
    A block (what its row hears again) follows the tokens of its step, in its line only; mask (P, G, slots) says what is whose.
    """

    def __init__(self, prefixes: list[Prefix], g: int, room: int):
        spots = [(prefix, a, b) for prefix in prefixes for a, b in prefix.bounds()]
        self.g, longest, device = g, max(b - a for _, a, b in spots), prefixes[0].ends.device
        self.ends, self.blocks = (
            [longest] * len(spots),
            [],
        )  # how far each line is filled; the last step's blocks
        self.place = torch.arange(len(spots) * g, device=device)
        sizes = torch.tensor([b - a for _, a, b in spots], device=device)
        slot = torch.arange(longest + room, device=device)
        self.mask = (slot < sizes[:, None])[:, None].repeat(1, g, 1)  # (P, G, slots)
        self.kv = []
        for layer, kv in enumerate(prefixes[0].kv):
            lines = tuple(x.new_zeros(len(spots), x.shape[1], len(slot), x.shape[3]) for x in kv)
            for line, (prefix, a, b) in enumerate(spots):
                for to, x in zip(lines, prefix.kv[layer]):
                    to[line, :, : b - a] = x[0, :, a:b]
            self.kv.append(lines)

    def feed(self, blocks: Sequence[tuple[int, int]] = ()) -> None:
        """What comes next: a token of every row, then `blocks`: (which row of the batch, how many tokens of it)."""
        self.settle()
        self.starts = torch.tensor(self.ends, device=self.place.device)
        self.ends = [end + self.g for end in self.ends]
        self.seen = max(self.ends)  # by the tokens; a block sees its own, too
        for line, row, n in [(*divmod(int(self.place[r]), self.g), n) for r, n in blocks]:
            self.blocks.append((line, row, self.ends[line], n))
            self.ends[line] += n
        if (more := max(self.ends) - self.mask.shape[2]) > 0:  # grows by a quarter, one layer after the other
            more = max(more, self.mask.shape[2] // 4)
            self.mask = F.pad(self.mask, (0, more))
            for layer, kv in enumerate(self.kv):
                self.kv[layer] = tuple(F.pad(x, (0, 0, 0, more)) for x in kv)
        line, every = (
            torch.arange(len(self.mask), device=self.place.device),
            torch.arange(self.g, device=self.place.device),
        )
        self.mask[line[:, None], every, self.starts[:, None] + every] = True

    def settle(self) -> None:
        """Blocks are seen from the next step on: the token before one, read in the same pass, must not look ahead."""
        for line, row, start, n in self.blocks:
            self.mask[line, row, start : start + n] = True
        self.blocks = []

    def attend(self, layer: int, query, key, value, scaling):
        (lines, kv, _, d), (heads, g, end) = self.kv[layer][0].shape, (query.shape[1], self.g, self.seen)
        line, row, r = self.place // g, self.place % g, len(self.place)
        for to, x in zip(self.kv[layer], (key, value)):
            to[line, :, self.starts[line] + row] = x[0, :, :r].transpose(0, 1)
        keys, values = (x[:, :, :end] for x in self.kv[layer])
        rows = query.new_zeros(lines * g, heads, d)
        rows[self.place] = query[0, :, :r].transpose(0, 1)
        # all queries that share a key stand in one block: (P, KV heads, heads a KV head * G, d)
        rows = rows.view(lines, g, kv, -1, d).permute(0, 2, 3, 1, 4).reshape(lines, kv, -1, d)
        mask = self.mask[:, None, None, :, :end].expand(-1, 1, heads // kv, -1, -1).reshape(lines, 1, -1, end)
        out = fused_attention(rows, keys, values, scaling, mask)
        out = out.view(lines, kv, -1, g, d).permute(0, 3, 1, 2, 4).reshape(lines * g, heads, d)
        outs = [out[self.place].transpose(0, 1)[None]]
        for line, row, start, n in self.blocks:
            for to, x in zip(self.kv[layer], (key, value)):
                to[line, :, start : start + n] = x[0, :, r : r + n]
            keys, values = (x[line : line + 1, :, : start + n] for x in self.kv[layer])
            mask = torch.cat(
                [self.mask[line, row, :start].repeat(n, 1), self.mask.new_ones(n, n).tril()], dim=1
            )
            outs.append(attend(query[:, :, r : r + n], keys, values, scaling, mask))
            r += n
        return torch.cat(outs, dim=2)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch; prompts without one go."""
        self.settle()
        self.place = self.place[rows]
        lines, line = torch.unique(self.place // self.g, return_inverse=True)
        if len(lines) < len(self.mask):
            self.place = line * self.g + self.place % self.g
            self.kv, self.mask = [tuple(x[lines] for x in kv) for kv in self.kv], self.mask[lines]
            self.ends = [self.ends[line] for line in lines.tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# The model side: the only place that knows of transformers, peft and bitsandbytes


@dataclass
class Family:
    """How to find the parts of a model class. To add a family, add one entry to FAMILIES."""

    model_class: str
    lm: tuple[str, ...]  # path of the language model, embeddings in, hidden states out; the first that exists
    drop: tuple[str, ...] = ()  # paths of parts that audio and text never use, where they exist
    config: Callable = lambda config: (
        config
    )  # the part of the checkpoint's configuration that the class takes
    encode_audio: Callable | None = None  # (model, mels [(bins, frames)]) -> [(n, H)]
    audio_id: Callable = lambda config: None  # id of the audio placeholder
    frames_after: int = 0  # how many frames past its end belong to a clip's features


def omni_audio(model, mels: list[Tensor]) -> list[Tensor]:
    """Qwen2.5-Omni's audio tower, once over a batch of clips of any length.       [(bins, frames)] -> [(n, H)]"""
    frames = torch.tensor([m.shape[1] for m in mels])
    padded = torch.stack([F.pad(m, (0, int(frames.max()) - m.shape[1])) for m in mels])
    mask = torch.arange(int(frames.max()))[None] < frames[:, None]
    out = model.get_audio_features(padded.to(model.device, model.dtype), mask.long().to(model.device))
    flat = out.last_hidden_state
    sizes = (((frames - 1) // 2 + 1 - 2) // 2 + 1).tolist()  # 25 a second: two strides and a pooling
    return list(flat.split(sizes))


def qwen2_audio(model, mels: list[Tensor]) -> list[Tensor]:
    """Qwen2-Audio's tower and projector, whose window is 30 s whatever a clip's length.    [(bins, frames + 2)] -> [(n, H)]

    The convolutions see two frames past a clip's end; what is behind them, attention never looks at.
    """
    parts, frames = getattr(model, "model", model), torch.tensor([m.shape[1] - 2 for m in mels])
    window = 2 * parts.audio_tower.config.max_source_positions
    padded = torch.stack([F.pad(m[:, :window], (0, max(0, window - m.shape[1]))) for m in mels])
    inner = (frames - 1) // 2 + 1
    mask = torch.zeros(len(mels), 1, 1, window // 2).masked_fill(
        torch.arange(window // 2) >= inner[:, None, None, None], -1e30
    )
    dtype = parts.multi_modal_projector.linear.weight.dtype
    out = parts.audio_tower(
        padded.to(model.device, dtype), attention_mask=mask.to(model.device, dtype)
    ).last_hidden_state
    return [x[:n] for x, n in zip(parts.multi_modal_projector(out), ((inner - 2) // 2 + 1).tolist())]


# transformers moved the language model and the towers in 5.2x: both layouts are found
OMNI = Family(
    "Qwen2_5OmniThinkerForConditionalGeneration",
    ("model.language_model", "model"),
    ("model.visual", "visual"),
    lambda config: getattr(config, "thinker_config", config),
    omni_audio,
    lambda config: config.audio_token_id,
)
QWEN2_AUDIO = Family(
    "Qwen2AudioForConditionalGeneration",
    ("model.language_model", "language_model.model"),
    encode_audio=qwen2_audio,
    audio_id=lambda config: config.audio_token_id,
    frames_after=2,
)
FAMILIES = {"qwen2_5_omni": OMNI, "qwen2_5_omni_thinker": OMNI, "qwen2_audio": QWEN2_AUDIO}
TEXT_ONLY = Family("AutoModelForCausalLM", ("model",))  # any causal language model of the usual make
PLAIN_TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}User: {% endif %}{{ m.content }}
{% endfor %}Assistant:"""  # for base models: TinyZero's, less its preamble


@dataclass
class Policy:
    """A model taken apart: what the algorithm needs of it and nothing else."""

    model: Any  # the library's model, LoRA layers inside; a PeftModel unless lora_rank is 0
    lm: Any
    head: Any
    embed_tokens: Any
    tokenizer: Any
    extractor: Any  # clip -> log-mel features; None: a model without ears
    encode_audio: Any
    audio_id: int | None
    stop_ids: list[int]
    frames_after: int = 0  # Family's
    reference: Any = (
        None  # None: the adapter switched off; "reference": a frozen adapter; a Policy: a frozen copy
    )

    @property
    def device(self):
        return self.head.weight.device

    def trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def find_model(name: str) -> str:
    """A local directory, or the files of a Hub id (configuration, tokenizer, safetensors; never code or pickles)."""
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise UserError(f"--model {name}: no config.json in that directory")
        return name
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    except Exception as e:  # offline, misspelt, gated: the library has an exception class for each
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"--model {name}: not a local directory, and not to be had from the Hub ({reason})"
        ) from None


def quiet_libraries() -> None:
    """The terminal belongs to the run: no notes about deprecations, optional kernels and shards."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextlib.contextmanager
def blame(what: str):
    """What goes wrong in here is a fault of the user's files: say so in one line."""
    import safetensors

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        safetensors.SafetensorError,
        pickle.UnpicklingError,
    ) as e:
        raise UserError(f"{what}: {' '.join(str(e).split())[:300] or type(e).__name__}") from None


def family_of(folder: str) -> tuple[Any, Family]:
    """-> (the checkpoint's configuration, how its class is taken apart)"""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    family = FAMILIES.get(config.model_type, TEXT_ONLY)
    return family.config(config), family


def load_policy(cfg: Config, train: bool = True) -> Policy:
    """Checkpoint directory or Hub id -> Policy, with a fresh LoRA adapter, --adapter, or all weights trainable.

    Not to train: the model as it is, with --adapter where one is given, and nothing trainable.
    """
    import transformers

    quiet_libraries()
    folder = find_model(cfg.model)
    cuda = torch.cuda.is_available()
    if cfg.load_in_4bit and not cuda:
        raise UserError("--load_in_4bit: needs a CUDA card")
    options = dict(
        dtype=torch.bfloat16 if cuda and (cfg.lora_rank or not train) else torch.float32, use_safetensors=True
    )
    if cuda:
        options["device_map"] = {"": torch.cuda.current_device()}
    if cfg.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "audio_tower", "multi_modal_projector", "visual"],
        )
    with blame(f"--model {cfg.model}"):
        config, family = family_of(folder)
        index = os.path.join(folder, "model.safetensors.index.json")
        if os.path.exists(index):  # use_safetensors does not look at what the index names
            with open(index, encoding="utf-8") as f:
                if pickles := {
                    x for x in json.load(f)["weight_map"].values() if not x.endswith(".safetensors")
                }:
                    raise ValueError(f"its index names {sorted(pickles)[0]}, and only safetensors are loaded")
        model, info = getattr(transformers, family.model_class).from_pretrained(
            folder, config=config, output_loading_info=True, **options
        )
        if missing := [n for n in sorted(info["missing_keys"]) if not n.startswith(family.drop)]:
            raise ValueError(
                f"its files lack {len(missing)} of the model's weights, the first is {missing[0]}"
            )
    return make_policy(cfg, model, family, folder, train)


def make_policy(cfg: Config, model, family: Family, folder: str, train: bool = True) -> Policy:
    """A loaded model, taken apart, with its tokenizer and feature extractor from `folder`."""
    import transformers

    with blame(f"--model {cfg.model}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        template = os.path.join(folder, "chat_template.json")  # where processors used to keep it
        if tokenizer.chat_template is None and os.path.exists(template):
            with open(template, encoding="utf-8") as f:
                tokenizer.chat_template = json.load(f)["chat_template"]
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder) if family.encode_audio else None
        audio_id = family.audio_id(model.config)
        stops = getattr(model.generation_config, "eos_token_id", None) or []
        stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
        if tokenizer.chat_template is None:
            if family.encode_audio:
                raise ValueError("its tokenizer has no chat template")
            print(f"{folder}: no chat template, so prompts are written as plain text, as for a base model")
            tokenizer.chat_template = PLAIN_TEMPLATE
        if tokenizer.eos_token_id is None:
            raise ValueError("its tokenizer names no end-of-turn token")
        if audio_id is not None and audio_id >= len(tokenizer):
            raise ValueError(
                f"its tokenizer does not hold the audio placeholder, id {audio_id}; are its files there?"
            )
    policy = take_apart(cfg, model, family, train)
    return dataclasses.replace(
        policy, tokenizer=tokenizer, extractor=extractor, audio_id=audio_id, stop_ids=sorted(stops)
    )


def take_apart(cfg: Config, model, family: Family, train: bool = True) -> Policy:
    """Drop what is never used, put LoRA on the language model, pack its attention; the text side is left to make_policy."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
    modules = dict(model.named_modules())
    for parent, _, name in (
        path.rpartition(".") for path in family.drop if path in modules and (cfg.lora_rank or not train)
    ):
        setattr(modules[parent], name, None)
    encode_audio = family.encode_audio and torch.no_grad()(
        lambda mels, model=model: family.encode_audio(model, mels)
    )
    if not (lm_path := next((path for path in family.lm if path in modules), "")):
        raise UserError(
            f"--model {cfg.model}: {type(model).__name__} keeps its language model under none of the names "
            f"{', '.join(family.lm)}; write a Family for it"
        )
    lm, head, embed_tokens = modules[lm_path], model.get_output_embeddings(), model.get_input_embeddings()
    lm.set_attn_implementation("packed")
    model.requires_grad_(False)
    if cfg.adapter and (cfg.lora_rank or not train):
        import peft

        with blame(f"--adapter {cfg.adapter}"):
            model = peft.PeftModel.from_pretrained(model, cfg.adapter, is_trainable=train)
    elif cfg.lora_rank and train:
        import peft

        linear = sorted(
            {name.rpartition(".")[2] for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        pattern = rf"{re.escape(lm_path)}\..*\b({'|'.join(linear)})"  # cannot match the audio tower
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=pattern, task_type="CAUSAL_LM"
            ),
        )
    elif train:
        lm.requires_grad_(True)
        head.requires_grad_(True)
    if cfg.gradient_checkpointing and train:
        enable = (
            getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        )  # renamed in 5.2x
        enable({"use_reentrant": False})
    model.eval()
    return Policy(model, lm, head, embed_tokens, None, None, encode_audio, None, [], family.frames_after)


def freeze_reference(policy: Policy) -> None:
    """Keep the policy as it is now as the reference. A fresh adapter needs none of this: switched off it is the base."""
    if hasattr(policy.model, "peft_config"):
        policy.model.add_adapter("reference", copy.deepcopy(policy.model.peft_config["default"]))
        weights = dict(policy.model.named_parameters())
        for name, p in weights.items():
            if ".reference." in name:
                p.data.copy_(weights[name.replace(".reference.", ".default.")].data)
                p.requires_grad_(False)
        policy.model.set_adapter("default")
        policy.reference = "reference"
    else:
        lm, head = copy.deepcopy((policy.lm, policy.head))
        policy.reference = dataclasses.replace(
            policy,
            lm=lm.requires_grad_(False),
            head=head.requires_grad_(False),
            embed_tokens=lm.get_input_embeddings(),
        )


@contextlib.contextmanager
def reference(policy: Policy):
    """The frozen policy that the KL is measured to."""
    if isinstance(policy.reference, Policy):
        yield policy.reference
    elif policy.reference is None:
        with policy.model.disable_adapter():
            yield policy
    else:
        policy.model.set_adapter(policy.reference)
        try:
            yield policy
        finally:
            policy.model.set_adapter("default")


@dataclass
class Clip:
    """A clip as it is heard: its log-mel features (bins, frames), and its samples (n,) where parts may be heard again."""

    mel: Tensor
    wave: Any = None


def features(extractor, wave, frames_after: int) -> Tensor:
    """Samples (n,) -> log-mel features (bins, frames).

    The library pads every clip to the extractor's whole length (300 s for Qwen2.5-Omni, 30 s for Qwen2-Audio, and no more
    of a clip is heard); padding by one window gives the same features in a fraction of the time.
    """
    padded = min(
        -(-len(wave) // extractor.hop_length) * extractor.hop_length + extractor.n_fft, extractor.n_samples
    )
    out = extractor(
        wave,
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        padding="max_length",
        max_length=padded,
        return_attention_mask=True,
    )
    frames = int(out["attention_mask"].sum()) + frames_after
    mel = out["input_features"][0, :, :frames]
    return F.pad(mel, (0, frames - mel.shape[1]))  # where the extractor's length ends with the clip


def hear(policy: Policy, example: Example, cfg: Config) -> tuple[list[Clip], bool]:
    """Runs in a worker thread: a question -> (its clips, was one of them cut?)"""
    sources = [] if cfg.audio == "none" else example.clips
    if sources and policy.extractor is None:
        raise UserError(f"--model {cfg.model}: this model has no audio tower; use --audio none")
    clips, any_cut, extractor = [], False, policy.extractor
    for source in sources:
        wave, cut = data.load_audio(
            source, min(cfg.max_audio_s, extractor.n_samples / extractor.sampling_rate)
        )
        if cfg.audio == "silence":
            wave[:] = 0
        clips.append(Clip(features(extractor, wave, policy.frames_after), wave if cfg.relistens else None))
        any_cut |= cut
    return clips, any_cut


def embeddings(policy: Policy, questions: list[list[Clip]]) -> list[list[Tensor]]:
    """The clips of every question -> their audio embeddings (n, H); the tower runs once for the whole batch."""
    flat = [clip.mel for clips in questions for clip in clips]
    each = iter(policy.encode_audio(flat) if flat else ())
    return [list(islice(each, len(clips))) for clips in questions]


def encode(policy: Policy, examples: list[Example], heard: list[list[Clip]], cfg: Config) -> list[Tokens]:
    return [prompt_tokens(policy, e, clips, cfg) for e, clips in zip(examples, embeddings(policy, heard))]


def prompt_tokens(policy: Policy, example: Example, clips: list[Tensor], cfg: Config) -> Tokens:
    """clips: the embeddings (n, H) of each clip, which take the places of the placeholders in the chat template's text"""
    plain = dataclasses.replace(
        example,
        question=example.question.replace("<|", "< |"),
        choices=[c.replace("<|", "< |") for c in example.choices],
    )  # text is not markup
    messages = data.chat(plain, PROMPTS[cfg.prompt], with_audio=bool(clips))
    text = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    audio, at = [], 0
    for clip in clips:
        at = ids.index(policy.audio_id, at)
        ids[at : at + 1] = [policy.audio_id] * len(clip)
        audio.append((at, clip))
        at += len(clip)
    return Tokens(ids, audio)


def embed(policy: Policy, parts: list[Tokens]) -> Tensor:
    """-> (N, H), every audio embedding at its position"""
    ids = torch.tensor([i for part in parts for i in part.ids], device=policy.device)
    x, at = (
        F.embedding(ids, policy.embed_tokens.weight),
        0,
    )  # not the module: peft hooks it to require a gradient
    for part in parts:
        for start, audio in part.audio:
            x[at + start : at + start + len(audio)] = audio.to(x.dtype)
        at += len(part.ids)
    return x


def forward(policy: Policy, x: Tensor, positions: Tensor, pattern) -> Tensor:
    """The language model on one row.       x (N, H), positions (N,) -> hidden states (N, H)"""
    if (
        policy.lm.training != torch.is_grad_enabled()
    ):  # gradient checkpointing works in training mode only; there is no
        policy.lm.train(torch.is_grad_enabled())  # dropout anywhere
    return policy.lm(
        inputs_embeds=x[None], position_ids=positions[None], pattern=pattern, use_cache=False
    ).last_hidden_state[0]


def positions_of(policy: Policy, prompts: list[Tokens]) -> Tensor:
    return torch.cat([torch.arange(len(p.ids)) for p in prompts]).to(policy.device)


def read(policy: Policy, prompts: list[Tokens]) -> Prefix:
    """The pass over the prompts, in one row; with its graph where gradients are on, for `Prefix.backward`."""
    prefix = Prefix(prompts, [], None)
    pattern = Reading(prefix.bounds())
    hidden = forward(policy, embed(policy, prompts), positions_of(policy, prompts), pattern)
    return Prefix(prompts, list(pattern.kv.values()), hidden[[b - 1 for _, b in pattern.bounds]])


def token_logps(
    policy: Policy, pack: Pack, temperature: float, prefix: Prefix | None = None, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every trained token under softmax(logits / temperature).       -> (M,), (M,)

    `prefix`: where the prompts were read, at pack.places; none: they are read here. The head runs on the M predicting
    positions only, `chunk` at a time under checkpointing, in float32 from the softmax on: (M, V) is never held.
    """

    def chunk_logps(hidden, target):
        logps = F.log_softmax(policy.head(hidden).float() / temperature, dim=-1)
        with torch.no_grad():
            entropy = token_entropy(logps)
        return logps.gather(1, target[:, None])[:, 0], entropy

    if prefix:
        hidden = prefix.ends[list(pack.places)]
        if len(pack.positions):  # completions of one token need no more
            own = forward(
                policy, embed(policy, pack.parts), pack.positions, Scoring(prefix, pack.places, pack.spans)
            )
            hidden = torch.cat([hidden, own])
    else:
        pattern = ReadingAndScoring(Prefix(pack.prompts, [], None), range(len(pack.prompts)), pack.spans)
        positions = torch.cat([positions_of(policy, pack.prompts), pack.positions])
        every = forward(policy, embed(policy, [*pack.prompts, *pack.parts]), positions, pattern)
        ends = [b - 1 for _, b in pattern.bounds]
        hidden = torch.cat([every[ends], every[ends[-1] + 1 :]])
    hidden = hidden[pack.predict]  # (M, H)
    pieces = [
        torch.utils.checkpoint.checkpoint(chunk_logps, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), pack.target.split(chunk))
    ]
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


# ---------------------------------------------------------------------------------------------------------------------
# Rollout: read every prompt once, then decode all completions together


def sample(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row from the full softmax, by inverting its distribution function at u; temperature 0 is greedy.

    logits (R, V), u (R,) uniform in [0, 1) -> ids (R,), log-probabilities (R,)
    """
    logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids = logps.argmax(dim=-1, keepdim=True)
    else:
        cdf = logps.double().exp().cumsum(dim=-1)
        ids = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)
    return ids[:, 0], logps.gather(1, ids)[:, 0]


def read_in_parts(policy: Policy, prompts: list[Tokens], part_tokens: int = 8192) -> list[Prefix]:
    """At most part_tokens in one pass: activations of a pass, and not of all prompts, are held."""
    return [
        read(policy, [prompts[i] for i in part])
        for part in in_parts([len(p.ids) for p in prompts], part_tokens)
    ]


def in_parts(sizes: list[int], limit: int) -> list[list[int]]:
    """Places in order, in parts whose sizes sum to `limit` at most; what is larger is a part of its own."""
    parts, room = [], 0
    for place, size in enumerate(sizes):
        if size > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(place)
        room -= size
    return parts


@torch.no_grad()
def rollout_rows_of(
    policy: Policy,
    prompts: list[Tokens],
    num_generations: int,
    temperature: float,
    max_new_tokens: int,
    seeds: list[int],
    insert: Callable | None = None,
    prefixes: list[Prefix] | None = None,
) -> list[list[Completion]]:
    """Sample num_generations completions a prompt.       -> P lists of G Completion

    The uniform numbers behind a prompt's samples come from its own seed alone, so they depend neither on the other
    prompts nor on how prompts are batched. `insert([prompt index], [completion]) -> [Tokens or None]` is asked after every
    step, of all rows that go on; what it returns is read by its row in one pass, in which the others take their next step.
    `prefixes`: the prompts, where they were read already.
    """
    g, device = num_generations, policy.device
    rows = [Completion([]) for _ in prompts for _ in range(g)]
    u = torch.cat(
        [torch.rand(g, max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    ).to(device)

    prefixes = prefixes or read_in_parts(policy, prompts)
    cache = Decoding(prefixes, g, g * max_new_tokens)
    position = torch.tensor([len(p.ids) for p in prompts], device=device).repeat_interleave(
        g
    )  # (R,) of the next token
    logits = policy.head(torch.cat([p.ends for p in prefixes])).repeat_interleave(g, dim=0)  # (R, V)

    at, history = list(range(len(rows))), []  # at: which row decodes in which place
    for nth in range(max_new_tokens):
        ids, logp = sample(logits, u[:, nth], temperature)
        live, taken = [], []
        for place, (r, token) in enumerate(zip(at, ids.tolist())):  # the one wait for the device in a step
            if rows[r].finished:
                continue
            taken.append((rows[r], place, len(rows[r].ids)))
            rows[r].append(token)
            rows[r].finished = token in policy.stop_ids
            if not rows[r].finished:
                live.append(place)
        history.append((logp, taken))
        if not live or nth + 1 == max_new_tokens:
            break
        going = [at[place] for place in live]
        inserted = zip(going, insert([r // g for r in going], [rows[r] for r in going])) if insert else ()
        inserted = {r: tokens for r, tokens in inserted if tokens}
        if len(live) <= len(at) // 2:  # half of them are done: go on without them
            keep = torch.tensor(live, device=device)
            cache.keep(keep)
            ids, u, position, at = ids[keep], u[keep], position[keep], going
        x, positions, last = F.embedding(ids, policy.embed_tokens.weight), position, slice(len(at))
        blocks = [(place, inserted[r]) for place, r in enumerate(at) if r in inserted]
        if blocks:
            places, sizes = [place for place, _ in blocks], [len(tokens.ids) for _, tokens in blocks]
            x = torch.cat([x, embed(policy, [tokens for _, tokens in blocks])])
            positions = torch.cat(
                [
                    position,
                    *[
                        position[place] + 1 + torch.arange(n, device=device)
                        for place, n in zip(places, sizes)
                    ],
                ]
            )
            last = torch.arange(len(at), device=device)  # what predicts the row's next token
            last[places] = torch.tensor(list(accumulate(sizes, initial=len(at) - 1))[1:], device=device)
            position = position.index_add(
                0, torch.tensor(places, device=device), torch.tensor(sizes, device=device)
            )
            for r, tokens in inserted.items():
                rows[r].insert(tokens)
        cache.feed([(place, len(tokens.ids)) for place, tokens in blocks])
        logits = policy.head(forward(policy, x, positions, cache)[last])
        position = position + 1
    for row in rows:
        row.logps = [0.0] * len(row.ids)
    for logp, taken in history:
        values = logp.tolist()
        for row, place, n in taken:
            row.logps[n] = values[place]
    return [rows[i : i + g] for i in range(0, len(rows), g)]


def load_clips_of(policy, cfg, example):
    return hear(policy, example, cfg)


def load_run_policy(cfg, train=True):
    return load_policy(cfg, train)


def rollout(policy, cfg, prompts, clips, seeds, num_generations, temperature):
    out, at_once = [], max(1, cfg.rollout_rows // num_generations)
    for at in range(0, len(prompts), at_once):
        part = slice(at, at + at_once)
        insert = relistening(policy, cfg, prompts[part], clips[part])
        out += rollout_rows_of(
            policy, prompts[part], num_generations, temperature, cfg.new_tokens, seeds[part], insert
        )
    return out


def text_of(policy: Policy, completion: Completion) -> str:
    """What the policy said, and nothing of what was inserted."""
    said = [i for i, sampled in zip(completion.ids, completion.sampled) if sampled]
    return policy.tokenizer.decode(said, skip_special_tokens=True)


SEGMENT = re.compile(r"<seg>\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*,\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*</seg>\Z")
ANSWERING = re.compile(r"</\s*think|<\s*(?:answer|response)", re.IGNORECASE)  # as the rewards read it
SLACK_S = 0.5  # so far past the clip's end a part may reach: models round


@functools.cache  # the vocabulary is long, and every step asks
def around_clips(tokenizer, audio_id: int) -> tuple[set[int], list[int], list[int]]:
    """-> (the tokens that may close a tag, what the prompt puts before a clip, what it puts behind it)"""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closers = {i for i, token in enumerate(tokens) if token and ">" in token}
    chat = [{"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "?"}]}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)[
        "input_ids"
    ]
    at, added = ids.index(audio_id), tokenizer.added_tokens_decoder
    before, after = ([i for i in part if i in added] for part in (ids[at - 1 : at], ids[at + 1 : at + 2]))
    return closers, before, after


class Relisten:
    """Puts what a completion asks for by <seg>start, end</seg> behind that tag: the part of its clip, from the samples, wrapped
    as the prompt wraps clips (Echo, arXiv 2602.11909). Several clips follow each other on one time line.

    Seconds, while thinking. A part that cannot be heard adds nothing; why is counted in Completion.refused. A tag may be
    split over tokens in any way; the part follows the token that closes it.
    """

    def __init__(self, policy: Policy, cfg: Config, prompts: list[Tokens], heard: list[list[Clip]]):
        self.policy, self.cfg, self.prompts, self.heard = policy, cfg, prompts, heard
        self.read = {}  # of each completion: how many tokens are dealt with, and what the last of them says behind its tag
        self.answering = set()  # which completions are past thinking
        self.closers, self.before, self.after = around_clips(policy.tokenizer, policy.audio_id)

    def __call__(self, which: list[int], rows: list[Completion]) -> list[Tokens | None]:
        """After the last token of each of `rows`, completions of the prompts `which`: what it now hears, or None."""
        out, asked = [None] * len(rows), []
        for n, (i, row) in enumerate(zip(which, rows)):
            if row.ids[-1] in self.closers and (tag := self.closed(row)):
                problem, span = self.span(*tag, row, self.heard[i])
                if problem:
                    row.refused[problem] += 1
                else:
                    row.heard.append(span)
                    asked.append((n, i, span))
        for (n, *_), audio in zip(asked, self.parts([(i, *span) for _, i, span in asked])):
            ids = [*self.before, *[self.policy.audio_id] * len(audio), *self.after]
            out[n] = Tokens(ids, [(len(self.before), audio)])
            self.read[id(rows[n])] = len(rows[n].ids) + len(out[n].ids), self.read[id(rows[n])][1]
        return out

    def closed(self, row: Completion, window: int = 64) -> tuple[str, bool] | None:
        """If the last token closes a tag: what was said up to it, from the tag before it on; was the thinking over by then?"""
        (read, rest), start = self.read.get(id(row), (0, "")), len(row.ids) - window
        text = self.policy.tokenizer.decode(row.ids[max(read, start) :], skip_special_tokens=True)
        text = rest + text if read >= start else text
        head, tag, rest = text.rpartition("</seg>")
        over = id(row) in self.answering or ANSWERING.search(head) is not None
        if ANSWERING.search(text):
            self.answering.add(id(row))
        if tag:
            self.read[id(row)] = len(row.ids), rest
        return (head + tag, over) if tag else None

    def span(
        self, tag: str, over: bool, row: Completion, clips: list[Clip]
    ) -> tuple[str, tuple[float, float]]:
        """-> ("" or why it is not heard, (start, end))"""
        found, cfg = SEGMENT.search(tag), self.cfg
        if not found or tag.count("<seg>") > 1:
            return "malformed", (0, 0)
        start, end = map(float, found.groups())
        seconds = sum(len(clip.wave) for clip in clips) / data.RATE_HZ
        stop = min(end, seconds)
        used = len(row.ids) - sum(row.sampled)
        problems = {
            "not thinking": over,
            "reversed": start >= end,
            "outside": start >= seconds or end > seconds + SLACK_S,
            "short": stop - start < cfg.min_relisten_s - 1e-6,
            "long": stop - start > cfg.max_relisten_s + 1e-6,
            "too many": len(row.heard) >= cfg.relistens,
            "no room": used + 25 * (stop - start) + 2 > cfg.relisten_tokens + 1e-6,
        }
        return next((problem for problem, there in problems.items() if there), ""), (start, stop)

    def parts(self, spans: list[tuple[int, float, float]]) -> list[Tensor]:
        """(prompt, start, end) -> audio embeddings (n, H); the tower runs once for all."""
        if self.cfg.relisten_from == "embeddings":
            return [self.held(*span) for span in spans]
        import numpy as np

        waves = [
            np.concatenate([clip.wave for clip in self.heard[i]])[
                round(start * data.RATE_HZ) : round(end * data.RATE_HZ)
            ]
            for i, start, end in spans
        ]
        mels = [features(self.policy.extractor, wave, self.policy.frames_after) for wave in waves]
        return self.policy.encode_audio(mels) if mels else []

    def held(self, i: int, start: float, end: float) -> Tensor:
        """The same part as the prompt holds it."""
        whole = torch.cat([audio for _, audio in self.prompts[i].audio])
        rate = len(whole) * data.RATE_HZ / sum(len(clip.wave) for clip in self.heard[i])
        first, n = min(round(start * rate), len(whole) - 1), max(1, round(25 * (end - start)))
        return whole[first : first + n]


def relistening(
    policy: Policy, cfg: Config, prompts: list[Tokens], heard: list[list[Clip]]
) -> Relisten | None:
    """What `rollout` asks for parts to be heard again, where there are clips and --max_relistens allows it."""
    return Relisten(policy, cfg, prompts, heard) if cfg.relistens and any(heard) else None


# ---------------------------------------------------------------------------------------------------------------------
# More than one card: torchrun starts a process (rank) for each; the ranks share the prompts of a step and sum its gradient


def join_ranks() -> None:
    """Under torchrun, find the other ranks. Tensors go over NCCL where there are cards, all else over gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


class RankLost(Exception):
    """Another rank has ended."""


@contextlib.contextmanager
def together():
    try:
        yield
    except RuntimeError as e:  # what the libraries say when a connection breaks
        raise RankLost(f"rank {ranks()[0]}: another rank ended ({' '.join(str(e).split())[:120]})") from None


def ranks() -> tuple[int, int]:
    """-> (this process's number, how many there are)"""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather(x) -> list:
    """x of every rank, in their order; all of them wait here for the last. Raises RankLost."""
    out = [x] * ranks()[1]
    if len(out) > 1:
        with together():
            torch.distributed.all_gather_object(out, x)
    return out


def total(x: dict[str, float]) -> dict[str, float]:
    """Sums over the ranks; a name that only some of them have counts as 0 with the others."""
    every = gather(x)
    return {name: sum(y.get(name, 0) for y in every) for name in dict.fromkeys(chain(*every))}


def sum_gradients(policy: Policy) -> None:
    """One message with all gradients; every rank gets the same sum, and so takes the same step."""
    if ranks()[1] > 1:
        parameters = policy.trainable().values()
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        with together():
            torch.distributed.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)


# ---------------------------------------------------------------------------------------------------------------------
# From questions to groups


def seed_of(*parts) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def draw(cfg: Config, examples: Examples, indices: list[int], cursor: int, phase: str):
    """Endless (cursor, Example): the question at place `cursor` of this run is a function of the seed alone. N ranks take
    every N-th place each."""
    n, epoch, order = len(indices), -1, None
    if cfg.order == "easy_to_hard" and phase == "rl":
        order = sorted(indices, key=lambda i: -examples[i].meta["pass_rate"])
    while True:
        if cursor // n != epoch and (cfg.order == "shuffled" or phase == "cold"):
            epoch = cursor // n
            order = random.Random(seed_of(cfg.seed, phase, epoch)).sample(indices, n)
        example = examples[order[cursor % n]]
        if cfg.shuffle_choices and phase == "rl":
            example = data.shuffle_choices(example, random.Random(seed_of(cfg.seed, "choices", cursor)))
        yield cursor, example
        cursor += ranks()[1]


def listen(policy: Policy, cfg: Config, stream, bad: list):
    """(cursor, Example) -> (cursor, Example, features, cut), read by worker threads ahead of the step.

    A clip that cannot be heard is skipped and put on the list `bad`; raises UserError past --max_bad_audio of them.
    """
    for (cursor, example), heard in data.ahead(
        stream, lambda item: hear(policy, item[1], cfg), cfg.workers, 2 * cfg.prompts_per_step
    ):
        if not isinstance(heard, DataError):
            yield cursor, example, *heard
            continue
        bad.append(heard)
        if len(bad) > cfg.max_bad_audio:
            raise UserError(
                f"more than --max_bad_audio {cfg.max_bad_audio} clips could not be heard, the last: {heard}"
            )


def roll_groups(
    policy: Policy,
    cfg: Config,
    prompts: list[Tokens],
    seeds: list[int],
    heard: list[list[Clip]] | None = None,
) -> list[Group]:
    """A group for each prompt, --rollout_rows rows at a time; with --reuse_prefix the pass over the prompts is kept."""
    groups, at_once = [], max(1, cfg.rollout_rows // cfg.num_generations)
    for at in range(0, len(prompts), at_once):
        part = slice(at, at + at_once)
        with torch.set_grad_enabled(cfg.reuse_prefix):
            prefixes = read_in_parts(policy, prompts[part], cfg.pack_tokens)
        insert = relistening(policy, cfg, prompts[part], heard[part]) if heard else None
        sampled = rollout_rows_of(
            policy,
            prompts[part],
            cfg.num_generations,
            cfg.temperature,
            cfg.new_tokens,
            seeds[part],
            insert,
            prefixes,
        )
        places = [
            (prefix, i) if cfg.reuse_prefix else None
            for prefix in prefixes
            for i in range(len(prefix.prompts))
        ]
        groups += [Group(None, *of_prompt) for of_prompt in zip(prompts[part], sampled, places)]
    return groups


def said_by(policy: Policy, cfg: Config, completion: Completion) -> Text:
    """What the rewards judge."""
    return Text.of(
        text_of(policy, completion),
        used=sum(completion.sampled) / cfg.new_tokens,
        heard=completion.heard,
        confidence=confidence(policy, completion) if "confident_accuracy" in cfg.reward else None,
    )


def confidence(policy: Policy, completion: Completion) -> float | None:
    """Probability of the least certain token in the last <answer>...</answer>, as sampled: the one that tells the choice from
    the others. None without an answer."""
    said = [
        (i, logp) for i, logp, sampled in zip(completion.ids, completion.logps, completion.sampled) if sampled
    ]
    pieces = [policy.tokenizer.decode([i], skip_special_tokens=True) for i, _ in said]
    ends = list(accumulate(map(len, pieces)))
    if not (answers := list(re.finditer(r"<answer>(.*?)</answer>", "".join(pieces), re.DOTALL))):
        return None
    start, end = answers[-1].span(1)
    return math.exp(
        min(
            (
                logp
                for (_, logp), piece, stop in zip(said, pieces, ends)
                if stop > start and stop - len(piece) < end and piece
            ),
            default=0.0,
        )
    )


def sampled_groups(policy: Policy, cfg: Config, batch: list, weights: dict) -> list[Group]:
    """[(cursor, Example, clips, cut)] -> one group each, with rewards"""
    cursors, examples, heard, _ = zip(*batch)
    seeds = [seed_of(cfg.seed, "rollout", cursor) for cursor in cursors]
    groups = roll_groups(policy, cfg, encode(policy, examples, heard, cfg), seeds, heard)
    for group, group.example in zip(groups, examples):
        scores = [score(said_by(policy, cfg, c), group.example, weights) for c in group.completions]
        group.rewards, group.parts = map(list, zip(*scores))
    return groups


def teacher_groups(policy: Policy, cfg: Config, batch: list) -> list[Group]:
    """[(cursor, Example, clips, cut)] -> groups whose completions are the example's targets, re-heard parts included"""
    _, examples, heard, _ = zip(*batch)
    groups, prompts = [], encode(policy, examples, heard, cfg)
    insert = relistening(policy, cfg, prompts, heard)
    for i, (example, prompt) in enumerate(zip(examples, prompts)):
        targets = [example.target] if isinstance(example.target, str) else example.target
        completions = [Completion([], finished=True) for _ in targets]
        for completion, target in zip(completions, targets):
            for token in policy.tokenizer(target, add_special_tokens=False)["input_ids"] + [
                policy.tokenizer.eos_token_id
            ]:
                completion.append(token)
                if insert and (tokens := insert([i], [completion])[0]):
                    completion.insert(tokens)
            completion.logps = [0.0] * len(completion.ids)
        groups.append(Group(example, prompt, completions, None, [1.0] * len(targets), [{}] * len(targets)))
    return groups


def evaluate(policy: Policy, cfg: Config, examples: list[Example], samples: int = 0) -> dict[str, float]:
    """-> {"accuracy": greedy, "accuracy_sampled": of `samples` at the training temperature}; a bad clip is a wrong answer."""
    right = {"accuracy": 0.0} | ({"accuracy_sampled": 0.0} if samples else {})
    rank, n_ranks = ranks()
    each = data.ahead(
        islice(enumerate(examples), rank, None, n_ranks),
        lambda item: hear(policy, item[1], cfg)[0],
        cfg.workers,
        2 * cfg.workers,
    )
    each = ((i, e, clips) for (i, e), clips in each if not isinstance(clips, DataError))
    while batch := list(islice(each, max(1, cfg.rollout_rows // max(1, samples)))):
        places, questions, heard = zip(*batch)
        prompts = encode(policy, questions, heard, cfg)
        seeds = [seed_of(cfg.seed, "eval", i) for i in places]
        for name, n, temperature in [("accuracy", 1, 0.0), ("accuracy_sampled", samples, cfg.temperature)][
            : len(right)
        ]:
            insert = relistening(policy, cfg, prompts, heard)
            for group, e in zip(
                rollout_rows_of(policy, prompts, n, temperature, cfg.new_tokens, seeds, insert), questions
            ):
                right[name] += sum(accuracy(text_of(policy, c), e) for c in group) / n
    return {name: n / len(examples) for name, n in total(right).items()}


# ---------------------------------------------------------------------------------------------------------------------
# The update


def pack_groups(groups: list[Group], keep: list[int], pack_tokens: int, device) -> list[Pack]:
    """The groups `keep`, in packs of at most pack_tokens tokens (a larger group is a pack of its own).

    Groups are scored with the rollout's own pass over their prompts, if it was kept. A backward pass through it goes through
    all its prompts, at twice the price of a forward pass: where less than two thirds of them are to be scored (without a KL,
    groups without reward spread are not), reading those again is cheaper.
    """
    first = [0, *accumulate(len(g.completions) for g in groups)]
    members, packs = collections.defaultdict(list), []
    for i in keep:
        members[id(groups[i].read[0]) if groups[i].read else None].append(i)
    for key, some in list(members.items()):
        if (
            key
            and 3 * sum(len(groups[i].prompt.ids) for i in some) < 2 * groups[some[0]].read[0].bounds()[-1][1]
        ):
            members[None] += members.pop(key)
    for key, some in members.items():
        sizes = [
            (0 if key else len(groups[i].prompt.ids)) + sum(len(c.ids) for c in groups[i].completions)
            for i in some
        ]
        for part in in_parts(sizes, pack_tokens):
            part = [some[k] for k in part]
            read = zip(*[groups[i].read for i in part]) if key else ()
            packs.append(make_pack([groups[i] for i in part], [first[i] for i in part], device, *read))
    return packs


def merge_repeats(
    groups: list[Group], adv: Tensor, weight: Tensor
) -> tuple[list[Group], Tensor, Tensor, Tensor]:
    """Completions of a group that are the same, token by token, are scored once, with the sum of their weights.

    The loss and its gradient stay the same; short answers repeat often. adv, weight (R,)
    -> groups, adv, weight and how often each completion stood there, (R',)
    """
    merged, first, times, r = [], [], [], 0
    for group in groups:
        kept, seen = [], {}
        for completion in group.completions:
            key = (*completion.ids, adv[r].item(), id(completion) if not all(completion.sampled) else None)
            if key not in seen:
                seen[key] = len(first)
                first.append(r)
                times.append(0)
                kept.append(completion)
            times[seen[key]] += 1
            r += 1
        merged.append(dataclasses.replace(group, completions=kept))
    times = torch.tensor(times, dtype=weight.dtype)
    return merged, adv[first], weight[first] * times, times  # equal completions have equal weights


def update(policy: Policy, optimizer, cfg: Config, groups: list[Group], cold: bool) -> dict[str, float]:
    """Optimizer steps on one rollout.       -> what the log says of them, means over the trained tokens of the step

    A cold start is the same update: the completions are the teacher's, the advantage is 1, and there is no KL.
    """
    completions = [c for g in groups for c in g.completions]  # R rows
    beta, temperature = (0.0, 1.0) if cold else (cfg.beta, cfg.temperature)
    adv = (
        torch.ones(len(completions))
        if cold
        else group_advantages(torch.tensor([g.rewards for g in groups]), cfg.scale).flatten()
    )  # (P, G) -> (R,)
    lengths = gather([sum(c.sampled) for c in completions])  # of every rank: the mean is over the whole step
    weight = loss_weights(torch.tensor(sum(lengths, [])), cfg.reduce, cfg.new_tokens)
    weight = weight.split([len(x) for x in lengths])[ranks()[0]]  # (R,)
    # without a KL a group without reward spread has no gradient: it is not scored at all
    keep = [i for i, g in enumerate(groups) if beta or cold or max(g.rewards) > min(g.rewards)]
    merged, adv, weight, times = (
        x if isinstance(x, list) else x.to(policy.device) for x in merge_repeats(groups, adv, weight)
    )
    packs = pack_groups(merged, keep, cfg.pack_tokens, policy.device)
    old_logps, sums, norms, skipped = [None] * len(packs), collections.Counter(), [], 0
    anything = any(gather(len(packs)))

    for nth in range(cfg.updates_per_rollout):
        optimizer.zero_grad(set_to_none=True)
        prefixes = {
            id(p.prefix): p.prefix for p in packs if p.prefix and nth == 0
        }  # later updates have other weights
        leaves = {key: prefix.cut() for key, prefix in prefixes.items()}
        for j, pack in enumerate(packs):
            ref_logp = None
            if beta:
                with torch.no_grad(), reference(policy) as frozen:
                    ref_logp, _ = token_logps(frozen, pack, temperature)
            logp, entropy = token_logps(policy, pack, temperature, leaves.get(id(pack.prefix)))
            if old_logps[j] is None:
                old_logps[j] = (
                    logp.detach()
                )  # the first update is on-policy: no pass of its own for the old policy
            a, w = adv[pack.row], weight[pack.row]
            ratio = importance_ratio(logp, old_logps[j], pack.row, cfg.importance)
            loss = policy_loss(ratio, a, w, cfg.clip_low, cfg.clip_high)
            if beta:
                loss = loss + beta * (w * kl_k3(logp, ref_logp)).sum()
            loss.backward()
            with torch.no_grad():
                clipped = ((ratio < 1 - cfg.clip_low) & (a < 0)) | ((ratio > 1 + cfg.clip_high) & (a > 0))
                of_token = {
                    "policy/logp": logp,
                    "policy/entropy": entropy,
                    "policy/clip_frac": clipped,
                    "policy/kl_old": kl_k3(logp, old_logps[j]),
                }
                of_token |= {"policy/kl_ref": kl_k3(logp, ref_logp)} if beta else {}
                n = times[pack.row]
                sums.update({name: (n * x).sum() for name, x in of_token.items()})
                sums.update({"tokens": n.sum(), "loss": loss})
        for key, prefix in prefixes.items():
            prefix.backward(leaves[key])
        if anything:
            sum_gradients(policy)
            norms.append(
                torch.nn.utils.clip_grad_norm_(
                    policy.trainable().values(), cfg.max_grad_norm or math.inf
                ).item()
            )
            if math.isfinite(norms[-1]):
                optimizer.step()
            else:
                skipped += 1
    optimizer.zero_grad(set_to_none=True)
    for group in groups:
        group.read = None  # its memory is free
    sums = {
        name: float(x) for name, x in sums.items()
    }  # here and not before: reading a value waits for the device
    sums = total(sums | {"scored": len(keep), "groups": len(groups)})
    scored = sums.pop("scored") / sums.pop("groups")
    tokens, loss = sums.pop("tokens", 0) or 1, sums.pop("loss", 0.0) / cfg.updates_per_rollout
    return (
        {"policy/loss": loss, "policy/clip_frac": 0.0, "policy/kl_old": 0.0}
        | {n: x / tokens for n, x in sums.items()}
        | {
            "optim/grad_norm": sum(norms) / max(1, len(norms)),
            "optim/skipped": skipped,
            "group/scored": scored,
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Will it fit? The step itself, played through on torch's meta device, where tensors have sizes and no content


class Live(TorchDispatchMode):
    """Bytes of all tensors made in this context that are still alive, and the most there were; `before`: older ones."""

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.before = [x.untyped_storage() for x in before]
        self.sizes, self.now, self.peak = dict.fromkeys(map(id, self.before), 0), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor) and id(storage := x.untyped_storage()) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, id(storage))
        return out

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def rehearse(
    cfg: Config, config, family: Family, prompt_tokens: int, dtype=torch.bfloat16
) -> dict[str, float]:
    """GiB that a step needs if all prompts have prompt_tokens tokens and no completion ends early; dtype of the base's weights.
    -> weights (of the base, LoRA and the optimizer), rollout and update (their peaks, the weights included)

    Kernels' own workspaces and the audio tower (less than the update from about 10 prompt tokens on) are not in it.
    """
    import transformers

    model_class = getattr(transformers, family.model_class)
    with torch.device("meta"):
        model = getattr(model_class, "from_config", model_class)(config).to(dtype)
    policy = take_apart(dataclasses.replace(cfg, adapter=""), model, family)
    parameters = [*policy.model.parameters(), *policy.model.buffers()]
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())
    trained = sum(p.numel() for p in policy.trainable().values())
    weights += trained * (2 if cfg.optimizer == "adamw8bit" else 8)  # the optimizer's two moments
    if (
        cfg.load_in_4bit
    ):  # half a byte a weight and a float32 scale for 64 of them; one matrix at a time as it was
        large = [
            m.weight.numel()
            for n, m in policy.lm.named_modules()
            if isinstance(m, torch.nn.Linear) and "lora_" not in n
        ]
        weights += max(large) * dtype.itemsize - sum(large) * (dtype.itemsize - 0.5 - 4 / 64)
    g, peaks, again = (
        cfg.num_generations,
        {},
        cfg.relisten_tokens if cfg.relistens and family.encode_audio else 0,
    )
    with Live(parameters) as live:
        groups = []
        for at in range(0, cfg.prompts_per_step, max(1, cfg.rollout_rows // g)):
            prompts = [Tokens([0] * prompt_tokens)] * len(
                range(cfg.prompts_per_step)[at : at + max(1, cfg.rollout_rows // g)]
            )
            with torch.set_grad_enabled(cfg.reuse_prefix):
                prefixes = read_in_parts(policy, prompts, cfg.pack_tokens)
            with torch.no_grad():
                cache = Decoding(prefixes, g, g * (cfg.new_tokens + again))
                cache.feed()
                x = policy.embed_tokens.weight.new_zeros(
                    len(prompts) * g, policy.embed_tokens.weight.shape[1]
                )
                logits = policy.head(forward(policy, x, x[:, 0].long(), cache))
                sample(logits, logits[:, 0].float(), cfg.temperature)
                del cache, x, logits
            said = [
                Completion([0] * (again + cfg.new_tokens), sampled=[False] * again + [True] * cfg.new_tokens)
                for _ in range(g)
            ]
            places = [
                (prefix, i) if cfg.reuse_prefix else None
                for prefix in prefixes
                for i in range(len(prefix.prompts))
            ]
            groups += [Group(None, prompt, said, place) for prompt, place in zip(prompts, places)]
        peaks["rollout"], live.peak = live.peak, live.now
        packs = pack_groups(groups, list(range(len(groups))), cfg.pack_tokens, "meta")
        prefixes = {id(p.prefix): p.prefix for p in packs if p.prefix}
        leaves = {key: prefix.cut() for key, prefix in prefixes.items()}
        for pack in packs:
            if cfg.beta:
                with torch.no_grad():
                    token_logps(policy, pack, cfg.temperature)
            token_logps(policy, pack, cfg.temperature, leaves.get(id(pack.prefix)))[0].sum().backward()
        for key, prefix in prefixes.items():
            prefix.backward(leaves[key])
        peaks["update"] = live.peak
    return {"weights": weights / 2**30} | {name: (weights + peak) / 2**30 for name, peak in peaks.items()}


SMALLER = [
    ("pack_tokens", 4096),
    ("pack_tokens", 2048),
    ("reuse_prefix", False),
    ("rollout_rows", 64),
    ("load_in_4bit", True),
    ("gradient_checkpointing", True),
    ("max_audio_s", 10.0),
    ("num_generations", 4),
    ("lora_rank", 8),
]  # by harmlessness


def preflight(cfg: Config, room_gib: float) -> str:
    """What the run will need, beside what the card has; and the flags that would make it fit if it does not."""
    config, family = family_of(find_model(cfg.model))

    def peak_of(cfg):
        hears = family.encode_audio and cfg.audio != "none"
        return rehearse(cfg, config, family, 120 + int(25 * cfg.max_audio_s) if hears else 512)

    needs = peak_of(cfg)
    said = (
        f"memory: at most {max(needs.values()):.1f} GiB of the card's {room_gib:.1f} by the tensors' sizes ("
        + ", ".join(f"{name} {gib:.1f}" for name, gib in needs.items())
        + ")"
    )
    if max(needs.values()) <= 0.95 * room_gib:
        return said
    flags, tried = [], cfg
    for name, value in SMALLER:
        if (
            type(value) is bool
            and getattr(tried, name) == value
            or type(value) is not bool
            and getattr(tried, name) <= value
        ):
            continue
        tried = dataclasses.replace(tried, **{name: value})
        flags = [f for f in flags if name not in f] + [
            f"--no-{name}" if value is False else f"--{name}" if value is True else f"--{name} {value}"
        ]
        if (peak := max(peak_of(tried).values())) <= 0.95 * room_gib:
            return f"{said}\nwarning: that will hardly fit; with {' '.join(flags)} it takes {peak:.1f} GiB"
    return f"{said}\nwarning: that will not fit, and neither will any flags of one card this size"


# ---------------------------------------------------------------------------------------------------------------------
# The run directory


def write_atomically(path: str, write: Callable[[str], None]) -> None:
    """write(temporary path), then rename: a kill at any moment leaves the old file or the new one, whole. Of several ranks,
    the first writes."""
    if ranks()[0]:
        return
    tmp = path + ".tmp"
    write(tmp)
    with open(tmp, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(tmp, path)


def open_run(cfg: Config) -> str:
    """Make the run directory, or refuse to write over one."""
    out = cfg.out
    if not out:
        stem = os.path.join("runs", os.path.splitext(os.path.basename(cfg.data or cfg.cold_start_data))[0])
        names = chain([stem], (f"{stem}-{i}" for i in count(2)))
        out = next(p for p in names if not os.path.exists(p) or os.path.isdir(p) and not os.listdir(p))
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out}: is a file")
    if os.path.exists(out) and os.listdir(out):
        raise UserError(
            f"--out {out}: already holds something; go on with that run by --resume {out}, or choose another name"
        )
    with blame(f"--out {out}"):
        os.makedirs(out, exist_ok=True)
    return out


def save_weights(policy: Policy, out: str) -> None:
    """out/adapter in PEFT's format; out/model, a whole checkpoint directory, when all weights are trained."""
    lora = hasattr(policy.model, "peft_config")
    folder = os.path.join(out, "adapter" if lora else "model")
    tmp = folder + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    policy.model.save_pretrained(tmp, **(dict(selected_adapters=["default"]) if lora else {}))
    for part in (policy.tokenizer, policy.extractor):
        if part is not None and not lora:
            part.save_pretrained(tmp)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(tmp):
        os.replace(os.path.join(tmp, name), os.path.join(folder, name))
    shutil.rmtree(tmp)


def save_checkpoint(policy: Policy, optimizer, out: str, state: dict) -> None:
    """One file, renamed into place. There is no random state to keep: every draw is a function of the seed and `state`."""
    if ranks()[0]:
        return
    content = dict(state=dict(state), weights=policy.trainable(), optimizer=optimizer.state_dict())
    os.makedirs(os.path.join(out, "checkpoint"), exist_ok=True)
    save_weights(policy, out)
    write_atomically(os.path.join(out, "checkpoint", "state.pt"), lambda path: torch.save(content, path))


def load_checkpoint(policy: Policy, optimizer, out: str) -> dict:
    """Put a run back as its last checkpoint left it, its logs included.       -> state"""

    def load(name):
        return torch.load(os.path.join(out, name), map_location=policy.device, weights_only=True)

    def fill(weights):
        for name, p in policy.trainable().items():
            p.data.copy_(weights[name])

    if os.path.exists(os.path.join(out, "reference.pt")):
        fill(load("reference.pt"))
        freeze_reference(policy)
    content = load("checkpoint/state.pt")
    fill(content["weights"])
    optimizer.load_state_dict(content["optimizer"])
    for path in (os.path.join(out, "log.jsonl"), os.path.join(out, "rollouts.jsonl")):
        if os.path.exists(path):  # what a killed run wrote after its last checkpoint is written again
            with open(path, encoding="utf-8") as f:
                lines = [
                    x for x in f if x.endswith("\n") and json.loads(x)["step"] <= content["state"]["step"]
                ]
            write_atomically(path, lambda tmp: open(tmp, "w", encoding="utf-8").writelines(lines))  # noqa: B023
    return content["state"]


def append(path: str, records: list[dict]) -> None:
    if ranks()[0]:
        return
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)


def machine() -> dict:
    import transformers

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            cwd=os.path.dirname(os.path.abspath(__file__)),
        ).stdout.strip()
    except OSError:  # no git
        commit = ""
    card = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return dict(
        commit=commit,
        python=sys.version.split()[0],
        torch=torch.__version__,
        transformers=transformers.__version__,
        hardware=card,
    )


def peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


CURVES = [
    (
        "A",
        "held-out accuracy",
        {
            "eval/accuracy": "greedy",
            "eval/accuracy_sampled": "sampled",
            "eval/accuracy_silence": "greedy, silence played",
            "eval/accuracy_once": "greedy, no re-listening",
        },
    ),
    ("B", "reward", {"reward/mean": None}),
    ("C", "entropy, nats a token", {"policy/entropy": None}),
    ("D", "KL to the reference, nats a token", {"policy/kl_ref": None}),
    ("E", "completion length, tokens", {"len/mean": None}),
]


def draw_curves(out: str) -> None:
    """log.jsonl -> curves.png"""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        log = [json.loads(line) for line in f]
    fig, axes = plt.subplot_mosaic("AABC;AADE", figsize=(13, 5))
    for place, title, keys in CURVES:
        ax = axes[place]
        for key, label in keys.items():
            x, y = (
                np.array([(r["step"], r[key]) for r in log if math.isfinite(r.get(key, math.nan))])
                .reshape(-1, 2)
                .T
            )
            if label and len(x):
                ax.plot(x, y, "o-", ms=4, label=label)
            elif len(
                x
            ):  # one value a step: a running median over it, and single outliers do not set the scale
                n = max(1, len(y) // 20)
                ax.plot(x, y, lw=0.7, alpha=0.4, color="tab:blue")
                ax.plot(x, [np.median(y[max(0, i - n) : i + n + 1]) for i in range(len(y))], color="tab:blue")
                low, high = np.percentile(y, [1, 98])
                ax.set_ylim(low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3)
        if place == "A":
            ax.set_ylim(0, 1.02)
            if ax.lines:
                ax.legend()
        if not ax.lines:
            ax.text(
                0.5, 0.5, "none in this run", ha="center", va="center", color="gray", transform=ax.transAxes
            )
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    fig.supxlabel("step", fontsize=10)
    fig.tight_layout()
    write_atomically(os.path.join(out, "curves.png"), lambda tmp: fig.savefig(tmp, dpi=100, format="png"))
    plt.close(fig)


def draw_rollout(out: str) -> None:
    """The last of the best answers to one clip in rollouts.jsonl that listened again -> rollout.png: clip, parts, text.

    A part is drawn at the height at which it is heard: the front end's range ends 80 dB below the loudest of what it is given.
    """
    path, last = os.path.join(out, "rollouts.jsonl"), None
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for r in map(json.loads, f):
                if (
                    r.get("heard")
                    and isinstance(r["audio"], str)
                    and r["parts"].get("accuracy", r["reward"]) > 0
                ):
                    last = r if not last or r["reward"] >= last["reward"] else last
    if not last:
        return
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    try:
        wave = data.load_audio(last["audio"], 300.0)[0]
    except DataError:  # gone meanwhile: no reason to end a finished run with an error
        return
    seconds = np.arange(len(wave)) / data.RATE_HZ
    fig, ax = plt.subplots(figsize=(11, 3.6))
    ax.plot(seconds, wave / (np.abs(wave).max() + 1e-12), lw=0.5, color="gray", label="the clip")
    for n, (start, end) in enumerate(last["heard"]):
        part = slice(round(start * data.RATE_HZ), round(end * data.RATE_HZ))
        level = np.abs(wave[part]).max() + 1e-12
        db = 20 * np.log10(level / (np.abs(wave).max() + 1e-12))
        ax.axvspan(start, end, color=f"C{n}", alpha=0.15)
        label = f"heard again, {round(start, 2):g} to {round(end, 2):g} s, {db:.0f} dB"
        ax.plot(seconds[part], wave[part] / level, lw=0.5, color=f"C{n}", label=label)
    ax.set(xlim=(0, len(wave) / data.RATE_HZ), ylim=(-1.1, 1.1), yticks=[], xlabel="seconds")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    said = f"{last['question']} {', '.join(last['choices'])}\n{last['completion']}"
    ax.set_title(
        "\n".join(textwrap.fill(x, 120) for x in said.splitlines()), fontsize=10, loc="left", parse_math=False
    )
    fig.tight_layout()
    write_atomically(os.path.join(out, "rollout.png"), lambda tmp: fig.savefig(tmp, dpi=100, format="png"))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def open_data(cfg: Config) -> dict[str, Any]:
    """Find what is wrong with the data before the model loads.       -> rl and cold: (Examples, indices); held: [Example]"""
    files, keys = {}, {}
    for flag, purpose in (("data", "train"), ("eval_data", "train"), ("cold_start_data", "cold_start")):
        if path := getattr(cfg, flag):
            files[flag] = Examples(path)
            keys[flag] = data.scan(files[flag], purpose)
            tried, problems = (
                data.probe_audio(files[flag], cfg.max_audio_s) if cfg.audio != "none" else (0, [])
            )
            if len(problems) > min(
                cfg.max_bad_audio, tried // 100
            ):  # one bad clip in a hundred is bad luck, more is not
                raise DataError(
                    "\n".join(problems[:10]) + "\nmend or drop these lines; "
                    f"`python data.py check {path}` lists every one"
                )
    out = {"rl": None, "cold": None, "held": []}
    if "cold_start_data" in files:
        out["cold"] = files["cold_start_data"], range(len(files["cold_start_data"]))
    if "eval_data" in files:
        out["held"] = list(islice(files["eval_data"], cfg.eval_size))
    if "data" in files:
        train, split_off = range(len(files["data"])), []
        if cfg.eval_size and "eval_data" not in files:
            train, split_off = data.held_out(keys["data"], cfg.eval_size)
            out["held"] = [files["data"][i] for i in split_off[: cfg.eval_size]]
        out["rl"] = files["data"], train
    if cfg.order == "easy_to_hard" and out["rl"]:
        for i in out["rl"][1]:
            rate = files["data"][i].meta.get("pass_rate")
            if not isinstance(rate, int | float) or not math.isfinite(rate):
                raise DataError(
                    f'{files["data"].where(i)}: field "meta": --order easy_to_hard needs a number "pass_rate"'
                )
    for phase, steps in (("rl", cfg.steps), ("cold", cfg.cold_start_steps)):
        if steps and out[phase] is None:
            raise UserError(
                f"--{'steps' if phase == 'rl' else 'cold_start_steps'} {steps}: needs "
                f"--{'data' if phase == 'rl' else 'cold_start_data'}"
            )
    return out


def make_optimizer(policy: Policy, cfg: Config):
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(policy.trainable().values(), lr=cfg.lr, weight_decay=0.0)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(policy.trainable().values(), lr=cfg.lr, weight_decay=0.0)


def measure(policy: Policy, cfg: Config, held: list[Example], control: bool) -> dict[str, float]:
    """Held-out accuracy for the log; with `control` also under silence (a gain that survives it is not hearing), and hearing
    the clip once, whatever a re-listening policy asks for."""
    if not held:
        return {}
    result = evaluate(policy, cfg, held, cfg.eval_samples)
    if control and cfg.audio == "real" and any(e.clips for e in held):
        result["accuracy_silence"] = evaluate(policy, dataclasses.replace(cfg, audio="silence"), held)[
            "accuracy"
        ]
    if control and cfg.relistens:
        result["accuracy_once"] = evaluate(policy, dataclasses.replace(cfg, max_relistens=0), held)[
            "accuracy"
        ]
    return {f"eval/{name}": value for name, value in result.items()}


def train(cfg: Config) -> tuple[str, bool]:
    """Run `cfg` from its start or its last checkpoint.       -> (run directory, did it come to its end?)"""
    questions = open_data(cfg)
    find_model(cfg.model)  # before a directory is made for a run that cannot be
    rank, n_ranks = ranks()
    if cfg.prompts_per_step % n_ranks:
        raise UserError(
            f"--prompts_per_step {cfg.prompts_per_step}: cannot be shared evenly among {n_ranks} ranks"
        )
    out = cfg.resume or gather("" if rank else open_run(cfg))[0]
    if torch.cuda.is_available() and rank == 0:
        quiet_libraries()
        with blame(f"--model {cfg.model}"):
            print(preflight(cfg, torch.cuda.get_device_properties(0).total_memory / 2**30), flush=True)
    torch.manual_seed(cfg.seed)  # LoRA's initial weights; everything else is seeded where it is drawn
    policy, held = load_policy(cfg), questions["held"]
    optimizer = make_optimizer(policy, cfg)
    with blame(f"--resume {out}"):
        state = (
            load_checkpoint(policy, optimizer, out)
            if cfg.resume
            else {"step": 0} | {phase: list(range(n_ranks)) for phase in ("rl", "cold")}
        )  # the next place in the data, of each rank
        if len(state["rl"]) != n_ranks:
            raise UserError(
                f"--resume {out}: the run has {len(state['rl'])} ranks, each with its own place in the data, and "
                f"not {n_ranks}; go on with torchrun --nproc_per_node {len(state['rl'])}"
            )
    about = dict(config=asdict(cfg) | {"out": out, "resume": ""}, ranks=n_ranks, **machine())
    write_atomically(
        os.path.join(out, "config.json"), lambda tmp: open(tmp, "w").write(json.dumps(about, indent=1))
    )
    if rank == 0:
        print(
            f"{out}: {cfg.model} on {about['hardware']}, {sum(p.numel() for p in policy.trainable().values()):,} trained "
            f"parameters, {len(questions['rl'][1]) if questions['rl'] else 0} questions, {len(held)} held out",
            flush=True,
        )
    log_path, stopping = os.path.join(out, "log.jsonl"), []

    def stop(number, frame):
        if stopping:  # asked twice: at once, and back to the last checkpoint
            raise KeyboardInterrupt
        stopping.append(number)

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        if not cfg.resume:
            save_checkpoint(policy, optimizer, out, state)
        if not gather(os.path.exists(log_path))[0]:
            append(log_path, [{"step": 0, **measure(policy, cfg, held, control=True)}])
        finished = loop(policy, optimizer, cfg, questions, out, state, stopping)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    draw_curves(out)
    if cfg.relistens:
        draw_rollout(out)
    return out, finished


def loop(
    policy: Policy, optimizer, cfg: Config, questions: dict, out: str, state: dict, stopping: list
) -> bool:
    """rollout -> reward -> advantage -> update -> log -> evaluate -> save, until the last step or a signal."""
    weights, held, last = parse_rewards(cfg.reward), questions["held"], cfg.cold_start_steps + cfg.steps
    log_path, rollouts_path = os.path.join(out, "log.jsonl"), os.path.join(out, "rollouts.jsonl")
    phase, clips, bad, flat_steps, saved, last_eval, (rank, n_ranks) = (
        None,
        None,
        [],
        0,
        state["step"],
        [],
        ranks(),
    )
    share = cfg.prompts_per_step // n_ranks
    if rank == 0:
        with open(log_path, encoding="utf-8") as f:
            last_eval = [r["eval/accuracy"] for r in map(json.loads, f) if "eval/accuracy" in r][-1:]
    bar = tqdm(total=last, initial=state["step"], unit="step", dynamic_ncols=True, disable=rank > 0)
    while state["step"] < last and not any(
        gather(bool(stopping))
    ):  # a signal may reach the ranks in different steps
        start, step = time.monotonic(), state["step"] + 1
        cold = step <= cfg.cold_start_steps
        if phase != ("cold" if cold else "rl"):
            phase = "cold" if cold else "rl"
            clips = listen(policy, cfg, draw(cfg, *questions[phase], state[phase][rank], phase), bad)
            fresh = (
                cfg.lora_rank and not cfg.adapter and not cfg.cold_start_steps
            )  # then the adapter is switched off
            if not (cold or fresh or policy.reference) and cfg.beta:
                write_atomically(
                    os.path.join(out, "reference.pt"), lambda tmp: torch.save(policy.trainable(), tmp)
                )
                freeze_reference(policy)

        # ---- rollout and reward; --resample_uniform draws again, three times at most, for groups without reward spread
        groups, drawn, cut = [], [], 0
        try:
            for attempt in range(4):
                batch = list(islice(clips, share - len(groups)))
                cut += sum(was_cut for *_, was_cut in batch)
                new = (
                    teacher_groups(policy, cfg, batch)
                    if cold
                    else sampled_groups(policy, cfg, batch, weights)
                )
                drawn += new
                keep_all = cold or not cfg.resample_uniform or attempt == 3
                groups += [g for g in new if keep_all or max(g.rewards) > min(g.rewards)]
                if len(groups) == share:
                    break
        except UserError:  # too many bad clips: the last step is whole, keep it
            save_checkpoint(policy, optimizer, out, state)
            raise
        rolled = time.monotonic()

        # ---- advantage and update
        nth, of = (
            (step, cfg.cold_start_steps) if cold else (step - cfg.cold_start_steps, cfg.steps)
        )  # each stage has its own
        lr = (cold and cfg.cold_start_lr or cfg.lr) * min(1.0, nth / max(1, cfg.warmup_steps))
        lr *= 1 - (nth - 1) / of if cfg.lr_schedule == "linear" else 1
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr
        record = {"step": step, **update(policy, optimizer, cfg, groups, cold), "optim/lr": lr}
        state |= {"step": step, phase: gather(batch[-1][0] + n_ranks)}

        # ---- log: one line a step, means over the whole step
        sums = total(tally(drawn, cfg) | {"audio/cut": cut, "audio/bad": len(bad)})
        over = {
            "reward": sums["rows"],
            "len": sums["rows"],
            "group": sums["groups"],
            "relisten": sums["rows"],
            "audio": 1,
        }
        record |= {name: x / over[name.partition("/")[0]] for name, x in sums.items() if "/" in name}
        record |= {
            "mem/peak_gib": peak_memory_gib(),
            "time/rollout_s": rolled - start,
            "time/update_s": time.monotonic() - rolled,
        }
        flat_steps = flat_steps + 1 if record["group/frac_zero_std"] == 1 and not cold else 0
        if flat_steps == 10 and rank == 0:
            tqdm.write(NO_SPREAD)
        if step % cfg.log_rollouts == 0 and not cold:
            append(rollouts_path, sum(gather(rollout_records(policy, cfg, step, groups)), []))
            if rank == 0:
                tqdm.write(show(policy, groups[0], step))

        # ---- evaluate and save
        if step == last or step % cfg.eval_every == 0:
            start = time.monotonic()
            record |= measure(policy, cfg, held, control=step == last) | {
                "time/eval_s": time.monotonic() - start
            }
            last_eval = [record["eval/accuracy"]] if held else []
        append(log_path, [record])
        bar.update()
        shown = {"logp": record["policy/logp"]} if cold else {"reward": record["reward/mean"]}
        shown |= {"held_out": last_eval[0]} if last_eval else {}
        bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()}, refresh=False)
        if step == last or step % cfg.save_every == 0:
            save_checkpoint(policy, optimizer, out, state)
            saved = step
    bar.close()
    if saved != state["step"]:  # stopped by a signal
        save_checkpoint(policy, optimizer, out, state)
    return state["step"] >= last


def tally(groups: list[Group], cfg: Config) -> dict[str, float]:
    """Sums over groups and rows of what the log shows as means."""
    rows = [c for g in groups for c in g.completions]
    parts = [p for g in groups for p in g.parts]
    refused = sum((c.refused for c in rows), collections.Counter())
    return (
        {f"reward/{name}": sum(p[name] for p in parts) for name in parts[0]}
        | {
            "rows": len(rows),
            "groups": len(groups),
            "reward/mean": sum(sum(g.rewards) for g in groups),
            "group/frac_zero_std": sum(max(g.rewards) == min(g.rewards) for g in groups),
            "group/distinct": sum(len({tuple(c.ids) for c in g.completions}) for g in groups),
            "len/mean": sum(sum(c.sampled) for c in rows),
            "len/frac_truncated": sum(not c.finished for c in rows),
        }
        | (
            {
                "relisten/heard": sum(len(c.heard) for c in rows),
                "relisten/refused": refused.total(),
                "relisten/tokens": sum(len(c.ids) - sum(c.sampled) for c in rows),
            }
            if cfg.relistens
            else {}
        )
        | {f"relisten/refused_{problem.replace(' ', '_')}": n for problem, n in refused.items()}
    )


NO_SPREAD = (
    "ten steps without reward spread in any group: there is nothing to learn from. If reward/mean is 0, the answers "
    "are not recognised (read rollouts.jsonl) or the questions are too hard; if it is at its maximum, they are too "
    "easy. Try other data, another --prompt, or more --num_generations."
)


def rollout_records(policy: Policy, cfg: Config, step: int, groups: list[Group]) -> list[dict]:
    advantages = group_advantages(torch.tensor([g.rewards for g in groups]), cfg.scale).tolist()

    def again(c, example):
        clips = [
            clip if isinstance(clip, str) else None for clip in example.clips
        ]  # a clip inside a data set has no path
        heard = dict(heard=c.heard, refused=dict(c.refused)) if cfg.relistens else {}
        return dict(audio=clips if len(clips) > 1 else clips[0] if clips else None) | heard

    return [
        dict(
            step=step,
            id=g.example.id,
            question=g.example.question,
            choices=g.example.choices,
            answer=g.example.answer,
            completion=text_of(policy, c),
            reward=reward,
            parts=parts,
            advantage=a,
            tokens=sum(c.sampled),
            finished=c.finished,
            **again(c, g.example),
        )
        for g, adv in zip(groups, advantages)
        for c, reward, parts, a in zip(g.completions, g.rewards, g.parts, adv)
    ]


def show(policy: Policy, group: Group, step: int) -> str:
    e = group.example
    said = collections.Counter(
        f"{text_of(policy, c)[:60]!r} ({r:g})" for c, r in zip(group.completions, group.rewards)
    )
    asked = f"{e.question} {e.choices} -> {e.choices[e.answer]!r}" if e.choices else e.question
    return f"step {step}: {asked}; sampled " + ", ".join(f"{n} x {text}" for text, n in said.most_common())


# ---------------------------------------------------------------------------------------------------------------------
# The demo: a tiny Qwen2.5-Omni that hears and knows the answer format, but does not yet use the one for the other

DEMO = dict(
    eval_size=240,
    steps=300,
    prompts_per_step=8,
    lora_rank=16,
    lora_alpha=32,
    lr=2e-3,
    lr_schedule="linear",
    eval_every=25,
    log_rollouts=25,
)
DEMOS = {
    # which sound is it?
    "sounds": DEMO
    | dict(
        model="runs/tiny/base",
        data="runs/tiny/demo.jsonl",
        eval_data="runs/tiny/held_out.jsonl",
        max_new_tokens=12,
    ),
    # which sound comes second? It is too faint to be heard beside the first: one has to listen again (data.write_scenes). All
    # weights are trained, as Echo does: LoRA alone does not teach so small a base to write the tags without slips
    "relisten": DEMO
    | dict(
        model="runs/tiny_relisten/base",
        data="runs/tiny_relisten/demo.jsonl",
        eval_data="runs/tiny_relisten/held_out.jsonl",
        prompt="relisten",
        cold_start_data="runs/tiny_relisten/cold_start.jsonl",
        cold_start_steps=600,
        steps=400,
        eval_every=100,
        lora_rank=0,
        cold_start_lr=2e-3,
        lr=1e-3,
        gradient_checkpointing=False,
        reward="accuracy=1,think_format=0.5,segment=0.5",
        max_relistens=2,
        max_new_tokens=48,
    ),
}

CHAT_TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'audio' %}\
<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_demo(name: str) -> bool:
    """Sounds, questions and a tiny base checkpoint, made once; the base is taught by `train` itself.       -> done?"""
    folder, texts = os.path.dirname(DEMOS[name]["data"]), []
    if os.path.exists(os.path.join(folder, "base", "config.json")):
        return True
    if os.path.exists(folder):
        raise UserError(f"{folder}: is in the way of the demo, and holds no base model; remove it")
    print(f"making sounds, questions and a tiny base model in {folder} (once)", flush=True)
    making = folder + ".making"
    shutil.rmtree(making, ignore_errors=True)
    if name == "sounds":
        data.write_sounds(making, 960, 4, seed=1, name="demo", silent=0.15)
        data.write_sounds(making, 240, 4, seed=2, name="held_out")
    else:
        data.write_scenes(making, 960, seed=1, name="demo")
        data.write_scenes(making, 240, seed=2, name="held_out")
        for e in Examples(data.write_scenes(making, 960, seed=4, name="cold_start", taught=True)):
            texts += [data.chat(e, PROMPTS["relisten"], with_audio=False)[-1]["content"], *e.target]
    lessons = data.write_lessons(
        data.write_sounds(making, 1200, 4, seed=3, name="lessons", faint=name != "sounds")
    )
    make_tiny_omni(os.path.join(making, "init"), lessons, texts)
    taught, finished = train(
        Config(
            model=os.path.join(making, "init"),
            cold_start_data=lessons,
            cold_start_steps=250,
            steps=0,
            lora_rank=0,
            lr=2e-3,
            lr_schedule="linear",
            warmup_steps=20,
            prompts_per_step=32,
            reduce="token",
            gradient_checkpointing=False,
            save_every=10**9,
            out=os.path.join(making, "teach"),
        )
    )
    if finished:
        os.rename(os.path.join(taught, "model"), os.path.join(making, "base"))
        os.rename(making, folder)
    return finished


def make_tiny_omni(folder: str, lessons: str, more: Sequence[str] = ()) -> None:
    """A checkpoint directory with Qwen2.5-Omni's real classes at 0.7 million parameters, random weights. Its tokenizer knows
    the words of the lessons, and of `more` texts."""
    import tokenizers
    import transformers

    quiet_libraries()
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|AUDIO|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
        "<|IMAGE|>",
        "<|VIDEO|>",
        "<|vision_bos|>",
        "<|vision_eos|>",
    ]
    bpe = tokenizers.ByteLevelBPETokenizer()  # its words are those of the lessons, so prompts are short
    chats = [data.chat(e, PROMPTS["think"], with_audio=False) for e in Examples(lessons)]
    texts = [c[-1]["content"] for c in chats] + [
        *data.SOUNDS,
        "system\nYou are a helpful assistant.",
        "user\nassistant\n",
    ]
    bpe.train_from_iterator(
        [*texts, *more],
        vocab_size=768 if more else 512,
        min_frequency=1,
        special_tokens=special,
        show_progress=False,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special)))
    # wider initial weights than a large model's: at this size the usual 0.02 drowns the sound in the positions
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=dict(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=128,
            output_dim=128,
            initializer_range=0.15,
        ),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=128),
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            eos_token_id=ids["<|im_end|>"],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            initializer_range=0.1,
            tie_word_embeddings=True,
        ),
        tie_word_embeddings=True,
        audio_token_index=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
    )
    torch.manual_seed(0)
    transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, return_attention_mask=True
    ).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # the message alone, not under forty lines of usage
        raise UserError(f"{message} (--help lists the flags)")


def parse_config(argv=None) -> tuple[Config, str]:
    """Flags -> (Config, which demo it is, if any). With --resume the run's own config.json stands behind the flags."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in dataclasses.fields(Config):
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        elif f.name == "resume":
            parser.add_argument("--resume", nargs="?", const="--out", metavar="RUN", help=text)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, metavar=f.name.upper(), help=text)
    parser.add_argument(
        "--demo",
        choices=list(DEMOS),
        help="sounds: tell sounds apart, the default without --data | relisten: "
        "listen again to what is too faint beside a loud sound",
    )
    given = vars(parser.parse_args(argv))
    demo = given.pop("demo", "")
    if given.get("resume"):
        run = given["resume"] if given["resume"] != "--out" else given.get("out", "")
        if not run:
            raise UserError("--resume: name the run, --resume runs/NAME")
        if not os.path.exists(os.path.join(run, "checkpoint", "state.pt")):
            raise UserError(
                f"--resume {run}: no checkpoint there; a run killed before its first one has to start again"
            )
        with (
            blame(f"--resume {run}: config.json"),
            open(os.path.join(run, "config.json"), encoding="utf-8") as f,
        ):
            saved = json.load(f)["config"]
            for name in {"lora_rank", "lora_alpha", "optimizer"} & given.keys():
                if given[name] != saved[name]:
                    raise UserError(
                        f"--{name} {given[name]}: cannot be changed on --resume, the run has {saved[name]}"
                    )
            return Config(**saved | given | dict(out=run, resume=run)), ""
    own = given.get("data") or given.get("cold_start_data")
    if own and demo:
        raise UserError(f"--demo {demo}: brings its own data; leave out --data and --cold_start_data")
    demo = demo or ("" if own else "sounds")
    only_cold = {} if given.get("data") else {"steps": 0}
    return Config(**(DEMOS[demo] if demo else only_cold) | given), demo


def main(argv=None) -> int:
    try:
        cfg, demo = parse_config(argv)
        finished = make_demo(demo) if demo and os.environ.get("RANK", "0") == "0" else True
        join_ranks()  # the others wait here for the demo's base
        out, finished = train(cfg) if finished else ("", False)
    except RankLost as e:
        print(f"error: {e}. The last checkpoint is whole: go on with --resume", file=sys.stderr)
        return 1
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:
        print(
            f"error: out of memory ({str(e).split('. ')[0]}). In order of harmlessness: lower --pack_tokens, lower "
            "--rollout_rows, use --gradient_checkpointing, --load_in_4bit, then lower --max_audio_s, --max_new_tokens, "
            "--num_generations, --lora_rank. The last checkpoint is whole: go on with --resume.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("stopped at once; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    if ranks()[0]:
        return 0
    if not finished:
        print(f"stopped; go on with: python omni_grpo.py --resume {out}" if out else "stopped", flush=True)
        return 0
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        evaluations = [r for r in map(json.loads, f) if "eval/accuracy" in r]
    for r in evaluations[:1] + evaluations[1:][-1:]:
        print(
            f"step {r['step']:>4}: "
            + ", ".join(f"{k[5:]} {v:.3f}" for k, v in r.items() if k.startswith("eval/"))
        )
    print(f"{out}: " + ", ".join(sorted(os.listdir(out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
