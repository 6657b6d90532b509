"""Re-listening: a completion that writes <seg>start, end</seg> while it thinks hears that part of its clip again."""

import copy
import dataclasses
import json
import math
import os
import time
import types

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers
from test_families import family_folder  # noqa: F401 - a fixture
from test_model import Capture, gradients
from test_run import read, timeless, weights

import data
import omni_grpo as og
import reward
from data import RATE_HZ, Example

SECONDS = dict(bell=3.217, one=1.3, two=2.1)  # the bell is longer than the tower's window of 2 s


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """name -> path of a clip of so many SECONDS: noise that swells, under a rising tone"""
    paths, rng = {}, np.random.default_rng(0)
    for name, seconds in SECONDS.items():
        t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
        wave = 0.2 * np.sin(2 * np.pi * (300 + 300 * t) * t) + 0.1 * np.sin(2 * t) ** 2 * rng.standard_normal(
            len(t)
        )
        paths[name] = str(tmp_path_factory.mktemp("clips") / f"{name}.wav")
        soundfile.write(paths[name], wave, RATE_HZ)
    return paths


class Stage:
    """A policy with LoRA at work and three questions: about one clip, about two, and about none."""

    def __init__(self, config, clips, model, **changes):
        self.cfg = config(model=model, prompt="relisten", max_new_tokens=90, **changes)
        torch.manual_seed(0)
        self.policy = og.load_policy(self.cfg)
        with torch.no_grad():
            for name, p in self.policy.trainable().items():
                if "lora_B" in name:
                    p.normal_(0, 0.1)
        sounds = [clips["bell"], [clips["one"], clips["two"]], None]
        self.examples = [
            Example(str(i), sound, "What is heard?", ["bell", "hum"], 0) for i, sound in enumerate(sounds)
        ]
        self.heard = [og.hear(self.policy, e, self.cfg)[0] for e in self.examples]
        self.prompts = og.encode(self.policy, self.examples, self.heard, self.cfg)

    def ids(self, text):
        return self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]

    def wave(self, question):
        """The clips of a question on one time line."""
        return np.concatenate(
            [soundfile.read(path, dtype="float32")[0] for path in self.examples[question].clips]
        )

    def ask(self, said, question=0, policy=None, **changes):
        """What `said`, a text or token ids, is given to hear.       -> Completion"""
        policy, cfg, row = policy or self.policy, dataclasses.replace(self.cfg, **changes), og.Completion([])
        relisten = og.Relisten(policy, cfg, self.prompts, self.heard)
        for token in (
            policy.tokenizer(said, add_special_tokens=False)["input_ids"] if isinstance(said, str) else said
        ):
            row.append(token)
            if tokens := relisten([question], [row])[0]:
                row.insert(tokens)
        assert [len(a) for _, a in row.audio] == [
            len(self.inserted(row)[i]) - 2 for i in range(len(row.heard))
        ]
        return row

    @staticmethod
    def inserted(row):
        """-> the ids of every block that was inserted"""
        blocks = []
        for i, sampled in enumerate(row.sampled):
            if not sampled and row.sampled[i - 1]:
                blocks.append([])
            if not sampled:
                blocks[-1].append(row.ids[i])
        return blocks


@pytest.fixture(scope="module")
def omni(config, clips, tiny):
    return Stage(config, clips, tiny.base)


def act(patch, script):
    """Rollouts in which a completion says `script(seed of its prompt, its number in the group)`, token ids, and then goes on by
    itself; None: it says what it likes. Log-probabilities are the true ones."""
    rollout, sample, lines, now = og.rollout, og.sample, {}, [0]

    def acted(policy, prompts, g, temperature, most, seeds, *more):
        lines.clear()
        now[0] = 0
        for seed in seeds:
            for j, row in enumerate(
                torch.rand(g, most, generator=torch.Generator().manual_seed(seed)).tolist()
            ):
                said = zip(row, script(seed, j) or ())
                lines.update(
                    {(nth, u): token for nth, (u, token) in enumerate(said)}
                )  # a row is known by its draws
        return rollout(policy, prompts, g, temperature, most, seeds, *more)

    def says(logits, u, temperature):
        ids, _ = sample(logits, u, temperature)
        ids = torch.tensor([lines.get((now[0], x), i) for x, i in zip(u.tolist(), ids.tolist())])
        now[0] += 1
        logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
        return ids, logps.gather(1, ids[:, None])[:, 0]

    patch.setattr(og, "rollout", acted)
    patch.setattr(og, "sample", says)


# ---- exactness: the sampler, the packs and the library agree on what was heard

SAID = [  # a question's completions
    [
        "<think>I hear <seg>0.5, 1.25</seg> a bell, and <seg>0.00004, 3.4</seg>.</think><answer>bell</answer>",
        "<think>bell <seg>2.10003, 2.9</seg></think><answer>hum</answer>",
        "<think>so</think><answer>hum</answer>",
    ],
    [
        "<seg>1.0, 2.0</seg> hum",
        "<think>the <seg>0, 1.3</seg> and the <seg>1.3, 3.9</seg></think>",
        "<answer>hum</answer>",
    ],
    ["<think>a</think><answer>bell</answer>", "hum", "<seg>0, 1</seg> bell"],
]
SAMPLES = [
    [[(8000, 20000), (1, 51472)], [(33600, 46400)], []],
    [[(16000, 32000)], [(0, 20800), (20800, 54400)], []],
    [[], [], []],
]  # of the clips on one time line: what each completion is to hear, worked out by hand


@pytest.fixture(scope="module", params=["omni", "qwen2_audio"])
def rolled(request, config, clips, omni, family_folder):  # noqa: F811
    """-> (Stage, groups whose completions said SAID)"""
    stage = omni if request.param == "omni" else Stage(config, clips, family_folder("qwen2_audio"))
    with pytest.MonkeyPatch.context() as patch:
        act(patch, lambda seed, j: [*stage.ids(SAID[seed][j]), stage.policy.tokenizer.eos_token_id])
        groups = og.roll_groups(
            stage.policy,
            dataclasses.replace(stage.cfg, temperature=0.8),
            stage.prompts,
            [0, 1, 2],
            stage.heard,
        )
    return stage, groups


def library_logps(stage, question, completion, samples, temperature):
    """Of the sampled tokens, from one row through the library's own model: ids with placeholders, features of the clips and of
    the parts cut out of them, its positions, its audio path, its attention."""
    policy, model, features = stage.policy, stage.policy.model.get_base_model(), {}
    waves = [soundfile.read(path, dtype="float32")[0] for path in stage.examples[question].clips]
    waves += [stage.wave(question)[a:b] for a, b in samples]
    if waves:
        out = policy.extractor(
            waves,
            sampling_rate=RATE_HZ,
            return_tensors="pt",
            return_attention_mask=True,
            padding="max_length",
            max_length=None if policy.frames_after else 5 * RATE_HZ,
        )  # Qwen2-Audio: 30 s
        features = dict(input_features=out["input_features"], feature_attention_mask=out["attention_mask"])
    prompt = stage.prompts[question].ids
    ids = torch.tensor([prompt + completion.ids])
    policy.lm.eval()
    policy.lm.set_attn_implementation("eager")
    try:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits[0].float()
    finally:
        policy.lm.set_attn_implementation("packed")
    logps = F.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0][torch.tensor(completion.sampled)]


def test_the_library_agrees(rolled):
    """Log-probabilities of the sampler, of the packs (prompts read anew, and as the rollout has read them) and of the library,
    and the gradients of the last three: <= 1e-5."""
    stage, groups = rolled
    policy, rows = stage.policy, [0, 3, 6]
    sampled = torch.tensor(
        [x for g in groups for c in g.completions for x, s in zip(c.logps, c.sampled) if s]
    )
    weight = torch.randn(len(sampled), generator=torch.Generator().manual_seed(0))
    theirs = torch.cat(
        [
            library_logps(stage, q, c, samples, 0.8)
            for q, (g, parts) in enumerate(zip(groups, SAMPLES))
            for c, samples in zip(g.completions, parts)
        ]
    )
    anew, _ = og.token_logps(policy, og.make_pack(groups, rows), 0.8)
    prefix = og.read(policy, stage.prompts)
    kept, _ = og.token_logps(
        policy, og.make_pack(groups, rows, prefixes=[prefix], places=[0, 1, 2]), 0.8, prefix
    )
    rollouts, _ = og.token_logps(
        policy, og.make_pack(groups, rows, "cpu", *zip(*[g.read for g in groups])), 0.8, groups[0].read[0]
    )
    reference = gradients(policy, (weight * theirs).sum())
    for logps in (sampled, anew, kept, rollouts):
        assert (logps - theirs).abs().max() <= 1e-5
    for logps in (anew, kept):
        for name, grad in gradients(policy, (weight * logps).sum()).items():
            assert (grad - reference[name]).abs().max() <= 1e-5 * max(1.0, reference[name].abs().max()), name


def test_what_is_inserted_and_where(rolled):
    """Behind the token that closes the tag: the part's embeddings, between the tokens that stand around the prompt's clips."""
    stage, groups = rolled
    bos, audio_id, eos = stage.policy.tokenizer.convert_tokens_to_ids(
        ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    )
    for question, (group, parts) in enumerate(zip(groups, SAMPLES)):
        for completion, samples, text in zip(group.completions, parts, SAID[question]):
            assert og.text_of(stage.policy, completion) == text and completion.finished
            assert [(round(a * RATE_HZ), round(b * RATE_HZ)) for a, b in completion.heard] == samples
            assert len(completion.ids) == len(completion.sampled) == len(completion.logps)
            assert all(logp == 0 for logp, s in zip(completion.logps, completion.sampled) if not s)
            for (at, audio), block, (a, b) in zip(
                completion.audio, Stage.inserted(completion), samples, strict=True
            ):
                frames = -(-(b - a) // 160)
                assert block == [bos, *[audio_id] * (((frames - 1) // 2 + 1 - 2) // 2 + 1), eos]
                assert completion.ids[at - 1 : at + len(audio) + 1] == block
                before = stage.policy.tokenizer.decode(
                    [i for i, s in zip(completion.ids[:at], completion.sampled) if s]
                )
                assert before.rstrip(".").endswith("</seg>")
                mel = og.features(
                    stage.policy.extractor, stage.wave(question)[a:b], stage.policy.frames_after
                )
                torch.testing.assert_close(audio, stage.policy.encode_audio([mel])[0], atol=1e-5, rtol=0)
    refused = [dict(c.refused) for g in groups for c in g.completions]
    assert refused == [{}] * 8 + [{"outside": 1}]  # there is nothing to hear again


def test_inserted_tokens_are_no_targets(rolled, monkeypatch):
    """What predicts an inserted token gets no gradient, exactly; what predicts a sampled one does."""
    stage, groups = rolled
    seen, forward = [], og.forward

    def watched(*args):
        seen.append(forward(*args))
        seen[-1].retain_grad()
        return seen[-1]

    monkeypatch.setattr(og, "forward", watched)
    pack = og.make_pack(groups, [0, 3, 6])
    logps, _ = og.token_logps(stage.policy, pack, 1.0)
    logps.sum().backward()
    stage.policy.model.zero_grad()
    grad = seen[0].grad.abs().amax(dim=1)[sum(len(p.ids) for p in stage.prompts) :]
    predicts = torch.tensor([s for g in groups for c in g.completions for s in c.sampled[1:]])
    assert (~predicts).sum() > 100 and torch.equal(grad > 0, predicts)
    assert pack.target.tolist() == [
        i for g in groups for c in g.completions for i, s in zip(c.ids, c.sampled) if s
    ]
    for c in (c for g in groups for c in g.completions):
        for at, audio in c.audio:
            c.ids[at : at + len(audio)] = [7] * len(audio)  # the placeholder's id is of no account
    try:
        assert torch.equal(og.token_logps(stage.policy, og.make_pack(groups, [0, 3, 6]), 1.0)[0], logps)
    finally:
        for c in (c for g in groups for c in g.completions):
            for at, audio in c.audio:
                c.ids[at : at + len(audio)] = [stage.policy.audio_id] * len(audio)


def test_other_sounds_are_heard_from_there_on(rolled):
    """Other audio in a part changes the log-probabilities of what follows it, and not a bit of what precedes it."""
    stage, groups = rolled
    pack = og.make_pack(groups, [0, 3, 6])
    before, _ = og.token_logps(stage.policy, pack, 1.0)
    changed = copy.copy(groups[0])
    changed.completions = [copy.copy(c) for c in changed.completions]
    row = changed.completions[0]
    first, (at, audio) = row.audio
    row.audio = [first, (at, audio.flip(0))]
    after, _ = og.token_logps(stage.policy, og.make_pack([changed, *groups[1:]], [0, 3, 6]), 1.0)
    untouched = sum(row.sampled[:at])
    own = (pack.row == 0).nonzero()[:, 0]
    assert torch.equal(after[own[:untouched]], before[own[:untouched]]) and torch.equal(
        after[pack.row > 0], before[pack.row > 0]
    )
    assert len(own) - untouched > 5 and (after - before).abs()[own[untouched:]].min() > 0


def test_the_step_is_that_of_the_library(rolled):
    """beta 0: the gradient of - sum over rows of A_row * mean over its sampled tokens of logp / R, repeats merged or not."""
    stage, groups = rolled
    cfg = dataclasses.replace(stage.cfg, beta=0.0, max_grad_norm=0.0, temperature=0.8)
    groups = [
        dataclasses.replace(g, completions=[*g.completions, g.completions[0]], rewards=[1.0, 0.0, 0.5, 1.0])
        for g in groups
    ]
    adv, optimizer = og.group_advantages(torch.tensor([[1.0, 0.0, 0.5, 1.0]]))[0], Capture(stage.policy)
    log = og.update(
        stage.policy, optimizer, cfg, [dataclasses.replace(g, read=None) for g in groups], cold=False
    )
    loss = 0.0
    for q, (g, parts) in enumerate(zip(groups, SAMPLES)):
        for c, a, samples in zip(g.completions, adv, [*parts, parts[0]]):
            loss = loss - a * library_logps(stage, q, c, samples, 0.8).mean() / 12
    for name, grad in gradients(stage.policy, loss).items():
        torch.testing.assert_close(optimizer.steps[0][name], grad, atol=2e-6, rtol=1e-4)
    assert log["optim/skipped"] == 0


# ---- the teacher hears what the policy hears

TARGETS = [
    *SAID[0],
    "<seg>0, 1</seg>" * 3 + "<answer>bell</answer>",
    "<seg>2, 1</seg>x<seg>0, 1</seg></seg>",
    "",
    "</seg>",
    "<seg>0, 9</seg><seg>-1, 1e9</seg><seg>1, 1.5</seg>. <answer><seg>1, 1.5</seg></answer>",
    "<seg>0, 1</seg>",
]


def test_a_target_is_taught_as_it_would_be_sampled(omni, monkeypatch):
    """The same tokens, parts, refusals and audio, in a cold start and in a rollout that says the same."""
    policy, cfg = omni.policy, dataclasses.replace(omni.cfg, num_generations=len(TARGETS), max_relistens=2)
    act(monkeypatch, lambda seed, j: [*omni.ids(TARGETS[j]), policy.tokenizer.eos_token_id])
    examples = [dataclasses.replace(e, target=TARGETS) for e in omni.examples]
    taught = og.teacher_groups(
        policy, cfg, [(i, e, h, False) for i, (e, h) in enumerate(zip(examples, omni.heard))]
    )
    said = og.roll_groups(policy, cfg, omni.prompts, [1, 2, 3], omni.heard)
    assert sum(len(c.heard) for g in taught for c in g.completions) > 10
    for a, b in zip(
        (c for g in taught for c in g.completions), (c for g in said for c in g.completions), strict=True
    ):
        assert (a.ids, a.sampled, a.heard, a.refused, a.finished) == (
            b.ids,
            b.sampled,
            b.heard,
            b.refused,
            b.finished,
        )
        assert len(a.logps) == len(a.ids)
        for (at, audio), (place, other) in zip(a.audio, b.audio, strict=True):
            assert at == place
            torch.testing.assert_close(audio, other, atol=1e-5, rtol=0)
    assert taught[0].completions[3].refused == {"too many": 1} == taught[1].completions[3].refused
    assert taught[2].completions[3].refused == {"outside": 3}


# ---- the company does not matter


def outcomes(groups):
    return [(c.ids, c.sampled, c.heard, c.refused, c.finished) for g in groups for c in g.completions]


def test_rows_do_not_depend_on_their_company(omni, monkeypatch):
    """Any --rollout_rows gives the same tokens, of rows that go on by themselves after what they heard: while half of the rows
    leave in the very step in which others hear a part, and while the cache has to grow."""
    tag = omni.ids("<seg>0.1, 2.7</seg>")
    ender = [*omni.ids("bell" * 40)[: len(tag) - 1], omni.policy.tokenizer.eos_token_id]
    lines = {
        (1, 0): tag,
        (1, 1): tag,
        (2, 0): tag,
        (2, 1): [*omni.ids(" a hum"), *tag, *tag],
        (4, 2): tag,
        (3, 0): None,
        (4, 0): omni.ids("<seg>1, 1.2</seg><seg>0, 2</seg>"),
    }
    act(monkeypatch, lambda seed, j: lines.get((seed, j), ender))
    events, feed, keep = [], og.Decoding.feed, og.Decoding.keep

    def watched(cache, blocks=()):
        feed(cache, blocks)
        events.append((len(blocks), cache.mask.shape[2], max(cache.ends)))

    monkeypatch.setattr(og.Decoding, "feed", watched)
    monkeypatch.setattr(og.Decoding, "keep", lambda cache, rows: (events.append("keep"), keep(cache, rows)))
    order, results = [0, 1, 2, 0], []
    prompts, heard = [omni.prompts[i] for i in order], [omni.heard[i] for i in order]
    cfg = dataclasses.replace(
        omni.cfg, num_generations=4, max_new_tokens=2 * len(tag) + 9, temperature=9.0, rollout_rows=100
    )
    whole = og.roll_groups(omni.policy, cfg, prompts, [1, 2, 3, 4], heard)
    kept = [i for i, event in enumerate(events) if event == "keep"]
    assert kept and events[kept[0] + 1][0] >= 3  # rows leave, and others hear a part in the same step
    slots = [slots for _, slots, _ in (e for e in events if e != "keep")]
    assert slots[0] == max(len(p.ids) for p in prompts) + 4 * cfg.new_tokens < slots[-1]  # it has grown
    for rows in (1, 8):
        results.append(
            og.roll_groups(
                omni.policy, dataclasses.replace(cfg, rollout_rows=rows), prompts, [1, 2, 3, 4], heard
            )
        )
    results.append(
        [og.roll_groups(omni.policy, cfg, [prompts[i]], [i + 1], [heard[i]])[0] for i in (3, 2, 1, 0)][::-1]
    )
    results.append(og.roll_groups(omni.policy, cfg, prompts[::-1], [4, 3, 2, 1], heard[::-1])[::-1])
    for groups in results:
        assert outcomes(groups) == outcomes(whole)
        for a, b in zip(
            (c for g in groups for c in g.completions), (c for g in whole for c in g.completions)
        ):
            assert a.logps == pytest.approx(b.logps, abs=1e-4)
    assert [len(c.heard) for g in whole for c in g.completions] == [
        1,
        1,
        0,
        0,
        1,
        2,
        0,
        0,
        0,
        0,
        0,
        0,
        2,
        0,
        1,
        0,
    ]
    deaf = og.roll_groups(
        omni.policy, dataclasses.replace(cfg, max_relistens=0), prompts, [1, 2, 3, 4], heard
    )
    for i, line in enumerate(lines.get(key) for key in [(s, j) for s in (1, 2, 3, 4) for j in range(4)]):
        a, b = (outcomes(groups)[i] for groups in (whole, deaf))
        said = [i for i, sampled in zip(*a[:2]) if sampled]
        assert (said == b[0]) == (not a[2]) and said[: len(line or [])] == (
            line or []
        )  # what they heard is why they differ


def test_the_cache_holds_a_block_in_its_own_line_only(omni, monkeypatch):
    """Prompts whose rows hear in different steps share no room: a line holds its own tokens and parts, and nothing else."""
    tag, shift = omni.ids("<seg>0, 2</seg>"), omni.ids(" bell" * 6)
    act(monkeypatch, lambda seed, j: [*shift[:seed], *tag])
    filled, feed = [], og.Decoding.feed
    monkeypatch.setattr(
        og.Decoding,
        "feed",
        lambda cache, blocks=(): (feed(cache, blocks), filled.append(list(cache.ends)))[0],
    )
    cfg = dataclasses.replace(omni.cfg, num_generations=2, max_new_tokens=len(tag) + 8, temperature=9.0)
    policy = dataclasses.replace(omni.policy, stop_ids=[])
    done = og.roll_groups(policy, cfg, omni.prompts[:2] * 2, [0, 2, 4, 6], omni.heard[:2] * 2)
    longest = max(len(p.ids) for p in omni.prompts)
    assert filled[-1] == [longest + sum(len(c.ids) - 1 for c in g.completions) for g in done]


# ---- what may be asked for, and what may not

WANTED = [  # of a clip of 3.217 s
    ("<seg>0, 1</seg>", (0, 1)),
    ("<seg>0.,1.</seg>", (0, 1)),
    ("<seg>.5,1</seg>", (0.5, 1)),
    ("<seg>\n0 , 1.25 </seg>", (0, 1.25)),
    ("<seg>000.5000, 1</seg>", (0.5, 1)),
    ("<seg>1, 1.2</seg>", (1, 1.2)),
    ("<seg>3, 3.717</seg>", (3, 3.217)),
    ("<seg>0, 3.217</seg>", (0, 3.217)),
    ("<think>I hear<seg>0, 1</seg>", (0, 1)),
    ("<seg>0, 1</seg>.</think>", (0, 1)),
    ("<seg>0, 1" + " " * 70 + "<seg>0, 1</seg>" + " bell" * 99, (0, 1)),
    ("<seg>0, 1</seg></think><answer>", (0, 1)),
]
REFUSED = [
    ("<seg>-1, 1e9</seg>", "malformed"),
    ("<seg>nan, nan</seg>", "malformed"),
    ("<seg>0, inf</seg>", "malformed"),
    ("<seg></seg>", "malformed"),
    ("<seg>,</seg>", "malformed"),
    ("<seg>1</seg>", "malformed"),
    ("<seg>1,</seg>", "malformed"),
    ("<seg>0, 1, 2</seg>", "malformed"),
    ("<seg>0 1</seg>", "malformed"),
    ("<seg>0.1.2, 2</seg>", "malformed"),
    ("<seg>٠, ١</seg>", "malformed"),
    ("<seg>０, １</seg>", "malformed"),
    ("<seg>0, ²</seg>", "malformed"),
    ("<seg>0x0, 1</seg>", "malformed"),
    ("<seg>0s, 1s</seg>", "malformed"),
    ("<seg>0_0, 1</seg>", "malformed"),
    ("</seg>", "malformed"),
    ("0, 1</seg>", "malformed"),
    ("<seg>0, <seg>0, 1</seg>", "malformed"),
    ("<seg>0, 1 <seg>0, 1</seg>", "malformed"),
    ("<seg>0, 1</ seg></seg>", "malformed"),
    ("<SEG>0, 1</seg>", "malformed"),
    ("<seg>" + "9" * 400 + ", 1</seg>", "malformed"),
    ("<seg>0, " + "9" * 400 + "</seg>", "malformed"),
    ("<seg>0," + " " * 400 + "1</seg>", "malformed"),
    ("<seg>2, 1</seg>", "reversed"),
    ("<seg>1, 1</seg>", "reversed"),
    ("<seg>99, 1</seg>", "reversed"),
    ("<seg>0, 3.72</seg>", "outside"),
    ("<seg>3.217, 3.5</seg>", "outside"),
    ("<seg>0, 9999999999999999</seg>", "outside"),
    ("<seg>1, 1.19</seg>", "short"),
    ("<seg>3.1, 3.7</seg>", "short"),
    ("<seg>0, 3.1</seg>", "long"),
    ("<answer><seg>0, 1</seg></answer>", "not thinking"),
    ("</think><seg>0, 1</seg>", "not thinking"),
    ("<think>a</think><answer>bell</answer><seg>0, 1</seg>", "not thinking"),
    ("</THINK>\n<RESPONSE><seg>0, 1</seg>", "not thinking"),
    ("< answer ><seg>0, 1</seg>", "not thinking"),
    ("</think>" + " bell" * 99 + "<seg>0, 1</seg>", "not thinking"),
]
SILENT = [
    "",
    "<seg>",
    "<seg>0, 1",
    "<seg>0, 1</seg",
    "<seg>0, 1</SEG>",
    "<seg>0, 1</ seg>",
    "&lt;seg&gt;0, 1&lt;/seg&gt;",
    "<think></think><answer>bell</answer>",
    "<|audio_bos|><|AUDIO|><|audio_eos|>",
    ">" * 300,
]


def byte_by_byte(stage, text):
    """Token ids of the text, a byte each."""
    units = stage.policy.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return stage.policy.tokenizer.convert_tokens_to_ids([unit for word, _ in units(text) for unit in word])


@pytest.mark.parametrize("spelt", ["as usual", "byte by byte"])
def test_what_is_heard_and_what_is_refused(omni, spelt):
    """However the text is cut into tokens; a tag that is refused adds nothing and is counted once."""
    for text, span in WANTED:
        if spelt == "as usual" or len(text) < 100:
            row = omni.ask(text if spelt == "as usual" else byte_by_byte(omni, text))
            assert row.heard == [pytest.approx(span)] and not row.refused and len(Stage.inserted(row)) == 1, (
                text
            )
    for text, problem in [*REFUSED, *((text, None) for text in SILENT)]:
        if spelt == "as usual" or "|" not in text:
            row = omni.ask(text if spelt == "as usual" else byte_by_byte(omni, text), max_relisten_s=3.0)
            assert dict(row.refused) == ({problem: 1} if problem else {}), text
            assert not row.heard and not row.audio and all(row.sampled), text


@pytest.mark.parametrize(
    "text, heard, refused",
    [
        ("<seg>0, 1</seg></think><seg>1, 2</seg>", 1, "not thinking"),
        ("<seg>0, 1</seg><answer><seg>1, 2</seg></answer>", 1, "not thinking"),
        ("<seg>0, 1</seg><seg>1, 2</seg><seg>2, 3</seg>", 3, None),
        ("<seg>0, 1</seg>.<seg>1, 2</seg>.", 2, None),
        ("<seg>0, 1</seg><seg>2, 1</seg></think><seg>1, 2</seg>", 1, "not thinking"),
        ("</seg><seg>0, 1</seg>", 1, "malformed"),
        ("<seg>0, 1</seg><" + " bell" * 99 + "answer><seg>1, 2</seg>", 2, None),
    ],
)
def test_a_token_that_closes_a_tag_may_say_more(omni, text, heard, refused):
    """What is behind the tag in its last token is read on: it may open the next tag, or end the thinking."""
    policy = dataclasses.replace(omni.policy, tokenizer=copy.deepcopy(omni.policy.tokenizer))
    policy.tokenizer.add_tokens(["></", "><", "g>.", "g></"])
    assert {"></", "><", "g>.", "g></"} & set(policy.tokenizer.tokenize(text))
    row = omni.ask(text, policy=policy)
    assert (len(row.heard), row.refused[refused]) == (heard, bool(refused))
    assert all(
        row.ids[at - 2] in {*policy.tokenizer.convert_tokens_to_ids(["></", "><", "g>.", "g></", ">", ">."])}
        for at, _ in row.audio
    )


def test_numbers_of_any_length(omni):
    """A tokenizer with long numbers can fit 400 digits in a tag: they are no exception, and no long search."""
    relisten, start = og.Relisten(omni.policy, omni.cfg, omni.prompts, omni.heard), time.monotonic()
    digits = "9" * 400
    for tag, problem in [
        (f"<seg>0, {digits}</seg>", "outside"),
        (f"<seg>{digits}, 1</seg>", "reversed"),
        (f"<seg>{digits}, {digits}</seg>", "reversed"),
        (f"<seg>0.{digits}, 2</seg>", ""),
        (f"<seg>{digits}{digits}x</seg>", "malformed"),
    ]:
        assert relisten.span(tag, False, og.Completion([]), omni.heard[0])[0] == problem
    assert time.monotonic() - start < 5


def test_ten_thousand_tags(omni):
    """Of one completion; --max_relistens are heard, and the rest costs little."""
    start = time.monotonic()
    row = omni.ask("<seg>0, 1</seg>" * 10_000, max_relistens=3)
    assert len(row.heard) == 3 and row.refused == {"too many": 9997}
    assert omni.ask("</seg>" * 10_000).refused == {"malformed": 10_000}
    assert time.monotonic() - start < 30


def test_no_more_than_was_allowed(omni):
    """--max_relistens, --relisten_tokens (with what wraps a part) and --max_relisten_s, to the last one and the last token."""
    row = omni.ask("<seg>0, 1</seg>" * 5, max_relistens=2)
    assert len(row.heard) == 2 and row.refused == {"too many": 3}
    for tokens, parts in ((27, 1), (53, 1), (54, 2), (26, 0)):
        row = omni.ask("<seg>0, 1</seg><seg>2, 1</seg><seg>1, 2</seg>", relisten_tokens=tokens)
        assert len(row.heard) == parts and row.refused["no room"] == 2 - parts
    assert len(omni.ask("<seg>0, 1</seg><seg>0, 1.01</seg>", max_relisten_s=1.0).heard) == 1
    rng = np.random.default_rng(0)
    for source in ("audio", "embeddings"):
        for start, length in zip(rng.uniform(0, 2.5, 60).round(2), rng.uniform(0.2, 0.5, 60).round(2)):
            most = math.ceil(25 * length - 1e-6) + 2
            row = omni.ask(
                f"<seg>{start}, {start + length:.2f}</seg>", relisten_tokens=most, relisten_from=source
            )
            assert len(row.heard) == 1 and len(row.ids) - sum(row.sampled) <= most


def test_where_nothing_is_to_be_heard(omni, monkeypatch):
    """No clip, --audio none, --max_relistens 0: no part, and the rollout goes its way. --audio silence: the part is silent."""
    act(monkeypatch, lambda seed, j: omni.ids("<seg>0, 1</seg>"))
    for changes in (dict(audio="none"), dict(max_relistens=0), dict(prompt="think")):
        cfg = dataclasses.replace(omni.cfg, **changes)
        assert cfg.relistens == 0 and og.relistening(omni.policy, cfg, omni.prompts, omni.heard) is None
        heard = [og.hear(omni.policy, e, cfg)[0] for e in omni.examples]
        assert all(clip.wave is None for clips in heard for clip in clips)
        groups = og.sampled_groups(
            omni.policy, cfg, [(i, e, h, 0) for i, (e, h) in enumerate(zip(omni.examples, heard))], {}
        )
        assert not any(c.heard or c.audio or c.refused for g in groups for c in g.completions)
        assert not any("relisten" in key for key in og.tally(groups, cfg))
    assert og.relistening(omni.policy, omni.cfg, omni.prompts[2:], omni.heard[2:]) is None
    assert omni.ask("<seg>0, 1</seg>", question=2).refused == {"outside": 1}
    cfg = dataclasses.replace(omni.cfg, audio="silence")
    heard = [og.hear(omni.policy, e, cfg)[0] for e in omni.examples]
    silent = og.roll_groups(
        omni.policy, cfg, og.encode(omni.policy, omni.examples, heard, cfg), [1, 2, 3], heard
    )
    mel = og.features(omni.policy.extractor, np.zeros(RATE_HZ, np.float32), 0)
    for c in silent[0].completions + silent[1].completions:
        torch.testing.assert_close(c.audio[0][1], omni.policy.encode_audio([mel])[0], atol=1e-5, rtol=0)
    flags = dict(
        max_relistens=-2,
        min_relisten_s=0.02,
        max_relisten_s=math.nan,
        relisten_tokens=-1,
        relisten_from="tower",
    )
    for name, value in flags.items():
        with pytest.raises(og.UserError, match=name):
            dataclasses.replace(omni.cfg, **{name: value})
    assert (
        omni.cfg.relistens == 8
        and dataclasses.replace(omni.cfg, prompt="direct", max_relistens=3).relistens == 3
    )


# ---- which samples, and which embeddings


@pytest.mark.parametrize(
    "question, tag, first, last",
    [
        (0, "<seg>0.50003, 1.25004</seg>", 8000, 20001),
        (0, "<seg>3.017, 3.7</seg>", 48272, 51472),
        (0, "<seg>0, 3.217</seg>", 0, 51472),
        (1, "<seg>0, 1.3</seg>", 0, 20800),
        (1, "<seg>1.3, 3.4</seg>", 20800, 54400),
        (1, "<seg>1.2, 1.5</seg>", 19200, 24000),
        (1, "<seg>3.1, 3.85</seg>", 49600, 54400),
    ],
)
def test_exactly_these_samples(omni, monkeypatch, question, tag, first, last):
    """Seconds times 16,000, to the nearest; several clips follow each other; what reaches past the end ends there."""
    cut, features = [], og.features
    monkeypatch.setattr(
        og, "features", lambda extractor, wave, after: (cut.append(wave), features(extractor, wave, after))[1]
    )
    row = omni.ask(tag, question)
    assert len(cut) == 1 and np.array_equal(cut[0], omni.wave(question)[first:last])
    assert row.heard == [pytest.approx((first / RATE_HZ, last / RATE_HZ), abs=1 / RATE_HZ)]
    assert row.heard[0][1] <= len(omni.wave(question)) / RATE_HZ


def test_parts_of_several_rows_are_heard_at_once(omni):
    """One run of the tower for all that a step asks for, and to each row its own part."""
    ran = []
    policy = dataclasses.replace(
        omni.policy, encode_audio=lambda mels: (ran.append(len(mels)), omni.policy.encode_audio(mels))[1]
    )
    relisten = og.Relisten(policy, omni.cfg, omni.prompts, omni.heard)
    tags = [
        (1, "<seg>0, 1</seg>"),
        (0, "<seg>2, 1</seg>"),
        (0, "<seg>1, 3</seg>"),
        (2, "<seg>0, 1</seg>"),
        (1, "<seg>2, 2.5</seg>"),
        (0, "bell"),
    ]
    rows = [og.Completion([]) for _ in tags]
    for row, (_, tag) in zip(rows, tags):
        for token in omni.ids(tag):
            row.append(token)
    heard = relisten([question for question, _ in tags], rows)
    assert ran == [3] and [bool(tokens) for tokens in heard] == [True, False, True, False, True, False]
    for (question, tag), tokens in zip(tags, heard):
        if tokens:
            torch.testing.assert_close(
                tokens.audio[0][1], omni.ask(tag, question).audio[0][1], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize(
    "question, tag, first, last",
    [
        (0, "<seg>0, 1</seg>", 0, 25),
        (0, "<seg>1.6, 2</seg>", 40, 50),
        (0, "<seg>3.017, 3.7</seg>", 75, 80),
        (0, "<seg>0, 3.217</seg>", 0, 80),
        (1, "<seg>1.0, 2.0</seg>", 25, 50),
        (1, "<seg>0, 3.9</seg>", 0, 85),
    ],
)
def test_from_embeddings(omni, question, tag, first, last):
    """The prompt's own embeddings of that time, 25 a second, and no run of the tower."""

    def runs(mels):
        raise AssertionError("the tower ran")

    row = omni.ask(
        tag, question, dataclasses.replace(omni.policy, encode_audio=runs), relisten_from="embeddings"
    )
    whole = torch.cat([audio for _, audio in omni.prompts[question].audio])
    assert torch.equal(row.audio[0][1], whole[first:last])


# ---- runs


def lesson(e, start):
    said = f"<think>I hear <seg>{start}, 0.4</seg> {e.choices[e.answer]}.</think>\n<answer>{e.choices[e.answer]}</answer>"
    return dict(
        audio=e.audio,
        question=e.question,
        choices=e.choices,
        answer=e.answer,
        target=[said, said.replace("0.4", "9")],
    )


@pytest.mark.parametrize("source", ["audio", "embeddings"])
def test_resume_equals_the_unbroken_run(omni, config, tiny, tmp_path, monkeypatch, source):
    """A cold start whose targets hear parts again, then GRPO with two updates a rollout, killed and resumed: the log, the
    rollouts and the adapter are those of the run that was never stopped."""
    lessons, questions = str(tmp_path / "lessons.jsonl"), str(tmp_path / "questions.jsonl")
    with open(lessons, "w", encoding="utf-8") as f, open(questions, "w", encoding="utf-8") as g:
        for i, e in enumerate(data.Examples(tiny.questions)):
            f.write(json.dumps(lesson(e, i % 3 / 10)) + "\n")
            g.write(json.dumps(vars(e) | dict(meta=dict(spans=[[0.1, 0.3]]))) + "\n")
    said = [
        "<think>a<seg>0.1, 0.4</seg> hum</think>\n<answer>{}</answer>",
        "<seg>0, 9</seg>, <seg>0, 0.3</seg></seg> so <answer>{}</answer>",
        "<answer>{}</answer>",
        None,
    ]
    act(
        monkeypatch,
        lambda seed, j: (
            said[j]
            and omni.ids(said[j].format(list(data.SOUNDS)[seed % 4])) + [omni.policy.tokenizer.eos_token_id]
        ),
    )
    cfg = config(
        data=questions,
        prompt="relisten",
        max_new_tokens=48,
        cold_start_data=lessons,
        cold_start_steps=2,
        steps=3,
        save_every=2,
        log_rollouts=1,
        updates_per_rollout=2,
        num_generations=4,
        eval_size=3,
        eval_samples=1,
        relisten_from=source,
        reward="accuracy=1,segment=0.5,segment_flow=1,confident_accuracy=0.5,grounding=0.25",
    )
    whole, _ = og.train(dataclasses.replace(cfg, out=str(tmp_path / "whole")))
    half, update, steps = str(tmp_path / "half"), og.update, []

    def dies(*args):
        steps.append(args)
        if len(steps) == 4:  # after the checkpoint of step 2 and the log line of step 3
            raise RuntimeError("the lights went out")
        return update(*args)

    monkeypatch.setattr(og, "update", dies)
    with pytest.raises(RuntimeError):
        og.train(dataclasses.replace(cfg, out=half))
    monkeypatch.setattr(og, "update", update)
    assert og.main(["--resume", half]) == 0
    assert timeless(half) == timeless(whole) and weights(half) == weights(whole)
    assert timeless(half, "rollouts.jsonl") == timeless(whole, "rollouts.jsonl")

    log, rollouts = timeless(whole), read(os.path.join(whole, "rollouts.jsonl"))
    for r in log[1:3]:  # two targets a question: the part is heard, and another one is outside
        assert (r["relisten/heard"], r["relisten/refused"], r["relisten/refused_outside"]) == (0.5, 0.5, 0.5)
        assert 2 < r["relisten/tokens"] <= 6 and r["optim/grad_norm"] > 0
    for r in log[3:]:
        rows = [x for x in rollouts if x["step"] == r["step"]]
        assert len(rows) == 8 and r["relisten/heard"] == sum(len(x["heard"]) for x in rows) / 8 >= 0.5
        assert r["relisten/refused"] == sum(sum(x["refused"].values()) for x in rows) / 8 >= 0.5
        assert (r["relisten/refused_outside"], r["relisten/refused_malformed"]) == (0.25, 0.25)
        part = 9 if source == "audio" else 10  # 0.3 s and what wraps it
        assert r["relisten/tokens"] == pytest.approx(part * sum(len(x["heard"]) for x in rows) / 8)
        assert r["policy/kl_ref"] > 0 and all(x["audio"] and x["tokens"] <= 48 for x in rows)
        assert r["len/mean"] == sum(x["tokens"] for x in rows) / 8  # of what was said
        for x in rows:
            example = Example("", None, "?", x["choices"], x["answer"], meta=dict(spans=[[0.1, 0.3]]))
            text = reward.Text.of(x["completion"], heard=[tuple(span) for span in x["heard"]])
            for name in ("accuracy", "segment", "segment_flow", "grounding"):
                assert x["parts"][name] == reward.REWARDS[name](text, example)
            assert abs(x["parts"]["confident_accuracy"]) <= 1
            assert x["reward"] == pytest.approx(
                sum(w * x["parts"][n] for n, w in reward.parse_rewards(cfg.reward).items())
            )
    assert (
        {len(x["heard"]) for x in rollouts} == {0, 1}
        and "eval/accuracy_once" in log[0]
        and "eval/accuracy_once" in log[-1]
    )
    assert "<|" not in "".join(x["completion"] for x in rollouts)


def test_evaluation_hears_again(omni, monkeypatch):
    """As the policy does in training; a question whose clip is bad is wrong, and has no part in it."""
    act(
        monkeypatch,
        lambda seed, j: [
            *omni.ids("<seg>0, 1</seg><answer>bell</answer>"),
            omni.policy.tokenizer.eos_token_id,
        ],
    )
    rolled, rollout = [], og.rollout
    monkeypatch.setattr(og, "rollout", lambda *args: (rolled.append(rollout(*args)), rolled[-1])[1])
    missing = dataclasses.replace(omni.examples[0], audio="missing.wav")
    result = og.evaluate(omni.policy, omni.cfg, [*omni.examples, missing], samples=2)
    assert result == {"accuracy": 0.75, "accuracy_sampled": 0.75}
    assert [[len(c.heard) for c in group] for groups in rolled for group in groups] == [
        [1],
        [1],
        [0],
        [1, 1],
        [1, 1],
        [0, 0],
    ]
    assert og.measure(omni.policy, omni.cfg, omni.examples, control=True).keys() == {
        "eval/accuracy",
        "eval/accuracy_sampled",
        "eval/accuracy_silence",
        "eval/accuracy_once",
    }
    assert not any(c.heard for group in rolled[-1] for c in group)  # hearing the clip once


# ---- rewards

ABC = Example("", None, "?", ["a bell", "a hum", "rain"], 0)


def text(said, **known):
    return reward.Text.of(said, **known)


@pytest.mark.parametrize(
    "said, heard, value",
    [
        ("a bell", [(0, 1)], 1),
        ("<think><seg>0, 1</seg></think><answer>a bell</answer>", [(0, 1), (1, 2)], 1),
        ("a bell", [], 0),
        ("a hum", [(0, 1)], 0),
        ("", [(0, 1)], 0),
        ("<seg>0, 1</seg> a bell", [], 0),
    ],
)
def test_segment(said, heard, value):
    """What was heard counts, and not what was written; and only on the way to the right answer."""
    assert reward.segment(text(said, heard=heard), ABC) == value
    assert reward.segment(said, ABC) == 0


@pytest.mark.parametrize(
    "said, value",
    [
        ("", 0),
        ("<seg>0, 1</seg> a bell", 0),
        ("<seg>0, 1</seg> A bell", -0.1),
        ("<seg>0, 1</seg>. A bell", 0),
        ("<seg>0, 1</seg></think>", -0.1),
        ("<seg>0, 1</seg>\n\n<answer>", -0.1),
        ("<seg>0, 1</seg><seg>1, 2</seg> rings", -0.1),
        ("<seg>0, 1</seg>É", -0.1),
        ("<seg>0, 1</seg>é", 0),
        ("<seg>0, 1</seg>日", 0),
        ("<seg>0, 1</seg>", 0),
        ("<seg>0, 1</seg>3", 0),
        ("</seg>A" * 3, -0.3),
        ("</seg>A" * 5, -0.5),
        ("</seg>A" * 6, -0.5),
        ("</seg>" * 10_000, -0.5),
        ("Seg A", 0),
    ],
)
def test_segment_flow(said, value):
    assert reward.segment_flow(said, ABC) == pytest.approx(value)


@pytest.mark.parametrize(
    "said, p, value",
    [
        ("a bell", 0.5, 0.75),
        ("a bell", 1.0, 1),
        ("a bell", 0.0, 0),
        ("a bell", None, 1),
        ("a hum", 0.5, -0.25),
        ("a hum", 0.9, -0.81),
        ("a hum", 0.0, 0),
        ("a hum", None, -1),
        ("nothing", 0.9, 0),
        ("", None, 0),
        ("a bell or a hum", 0.9, 0),
    ],
)
def test_confident_accuracy(said, p, value):
    assert reward.confident_accuracy(text(said, confidence=p), ABC) == pytest.approx(value)
    assert p is not None or reward.confident_accuracy(said, ABC) == value


@pytest.mark.parametrize(
    "heard, spans, value",
    [
        ([(0, 1), (2, 3)], [[0.5, 2.5]], 1 / 3),
        ([(0, 1)], [[0, 1]], 1),
        ([(0, 1)], [[1, 2]], 0),
        ([(0, 2)], [[0, 1], [3, 4]], 1 / 3),
        ([(0, 1), (0, 1), (0.5, 2)], [[0, 2]], 1),
        ([(0, 4)], [[3, 4], [0, 1], [0.5, 2]], 3 / 4),
        ([(1, 2)], [[0, 1.5], [1, 2]], 0.5),
        ([], [[0, 1]], 0),
        ([(0, 1)], [], 0),
        ([(0, 1)], ((0, 2),), 0.5),
    ],
)
def test_grounding(heard, spans, value):
    """Time in both over time in either, whatever overlaps among the parts or among the true ones."""
    example = dataclasses.replace(ABC, meta=dict(spans=spans))
    assert reward.grounding(text("", heard=heard), example) == pytest.approx(value)
    assert reward.grounding("", example) == 0


@pytest.mark.parametrize(
    "spans",
    [
        None,
        5,
        "0, 1",
        {},
        {"0": 1},
        [5],
        ["01"],
        [[]],
        [[1]],
        [[0, 1, 2]],
        [["0", "1"]],
        [[True, 2]],
        [[2, 1]],
        [[1, 1]],
        [[math.nan, 1]],
        [[0, math.nan]],
        [[0, math.inf]],
        [[-math.inf, math.inf]],
        [[0, 10**400]],
        [[None, None]],
        [[[0], [1]]],
    ],
)
def test_grounding_takes_any_data(spans):
    """A file's meta may hold anything: what is no span is none, and a true one beside it counts."""
    heard = text("", heard=[(0.0, 1.0)])
    assert reward.grounding(heard, dataclasses.replace(ABC, meta=dict(spans=spans))) == 0
    if isinstance(spans, list):
        assert reward.grounding(heard, dataclasses.replace(ABC, meta=dict(spans=[*spans, [0, 2]]))) == 0.5


@pytest.mark.parametrize(
    "said",
    [
        "",
        "\0",
        "\ud800",
        "<seg>" * 20_000,
        "</seg>" + " " * 100_000,
        "</seg> " * 20_000,
        "<seg>0, 1" * 20_000,
        "</seg>\n" + "\u0301" * 9999,
        "<answer>" * 9999,
        "9" * 100_000,
    ],
)
def test_rewards_never_raise(said):
    start = time.monotonic()
    countdown = Example("", None, "?", meta={"nums": [1, 2], "target": 3})
    for example in (ABC, countdown, dataclasses.replace(ABC, answer=None)):
        for heard, p in (((), None), ([(0.0, 1.0)] * 1000, 0.5)):
            for name in ("segment", "segment_flow", "confident_accuracy", "grounding"):
                value = reward.REWARDS[name](text(said, heard=heard, confidence=p), example)
                assert isinstance(value, float) and -1 <= value <= 1
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "said, lowest",
    [  # what stands at {} has this log-probability, every other token a lower one
        ("<think>so</think><answer>[ bell]</answer>", " bell"),
        ("<answer>a hum</answer> <answer>[bell]</answer>", "bell"),
        ("<answer>[日本]</answer>é", "日本"),
        ("<answer>[é bell]", None),
        ("", None),
        ("bell", None),
        ("<answer>[]</answer>", ""),
        ("<answer>a<answer>[b]</answer>", "a"),
        ("é日<answer>[\nhum\n]</answer>", "\n"),
    ],
)
def test_confidence(omni, said, lowest):
    """The probability of the answer's least certain token, whatever was less certain outside of it, in what was inserted, or in
    an earlier answer; characters may be split over tokens."""
    before, _, rest = said.rpartition("[")
    inside, _, after = rest.partition("]") if "[" in said else ("", "", said)
    row = og.Completion([])
    for part, logp in ((before, -3.0), (inside, -0.5), (after, -3.0)):
        for k, token in enumerate(omni.ids(part)):
            row.append(token)
            row.logps.append(
                logp if part is not inside or k else -1.0
            )  # the first of the answer's is the least certain
            row.insert(og.Tokens([omni.policy.audio_id]))
            row.logps.append(-9.0)
    expected = (
        None if lowest is None else math.exp(0.0 if not lowest else -3.0 if "a<answer>" in said else -1.0)
    )
    assert og.confidence(omni.policy, row) == (expected and pytest.approx(expected))
    for spec, known in (("accuracy=1,confident_accuracy=1", expected), ("accuracy=1", None)):
        judged = og.said_by(omni.policy, dataclasses.replace(omni.cfg, reward=spec), row)
        assert (
            judged.confidence == (known and pytest.approx(known))
            and judged.heard == []
            and judged == said.replace("[", "").replace("]", "")
        )
        assert judged.used == sum(row.sampled) / 90


def test_a_token_on_the_answer_s_edge_belongs_to_it(omni):
    """ ">." is one token: it closes the tag and begins the answer."""
    row = og.Completion(
        omni.ids("<answer>.5</answer>"), sampled=[True] * len(omni.ids("<answer>.5</answer>"))
    )
    pieces = omni.policy.tokenizer.convert_ids_to_tokens(row.ids)
    row.logps = [-1.0 if piece == ">." else -0.5 if piece == "5" else -4.0 for piece in pieces]
    assert ">." in pieces and og.confidence(omni.policy, row) == pytest.approx(math.exp(-1))


# ---- will it fit


@pytest.mark.parametrize(
    "change", [dict(), dict(relisten_tokens=96, num_generations=2), dict(reuse_prefix=False, rollout_rows=8)]
)
def test_rehearsal_needs_what_the_step_needs(change, monkeypatch):
    """Every completion hears as much as it may, each prompt's at another time: live bytes of a real rollout (to 15 %: the
    cache grows in quarters) and update (to 10 %)."""
    cfg = og.Config(
        **dict(
            data="-",
            prompt="relisten",
            prompts_per_step=3,
            num_generations=4,
            max_new_tokens=16,
            relisten_tokens=64,
            lora_rank=8,
            optimizer="adamw",
        )
        | change
    )
    shape = dict(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    family = dataclasses.replace(og.TEXT_ONLY, encode_audio=lambda model, mels: None)
    config = transformers.Qwen2Config(**shape)
    policy = og.take_apart(cfg, transformers.Qwen2ForCausalLM(config), family)
    prompts = [og.Tokens([7 + i * (j + 3) % 500 for i in range(160)]) for j in range(3)]

    def insert(which, rows):
        return [
            og.Tokens([5] * cfg.relisten_tokens) if len(row.ids) == 2 + 2 * i else None
            for i, row in zip(which, rows)
        ]

    monkeypatch.setattr(og, "relistening", lambda *args: insert)
    with og.Live([*policy.model.parameters(), *policy.model.buffers()]) as live:
        groups = og.roll_groups(policy, cfg, prompts, [1, 2, 3], [[], [], []])
        for group in groups:
            assert all(len(c.ids) == cfg.relisten_tokens + 16 for c in group.completions)
            group.rewards = [float(i % 2) for i in range(len(group.completions))]
        rollout, live.peak = live.peak, live.now
        og.update(
            policy,
            types.SimpleNamespace(zero_grad=lambda set_to_none: None, step=lambda: None),
            cfg,
            groups,
            cold=False,
        )
    needs, deaf = (
        og.rehearse(c, config, family, 160, torch.float32)
        for c in (cfg, dataclasses.replace(cfg, max_relistens=0))
    )
    assert (needs["rollout"] - needs["weights"]) * 2**30 == pytest.approx(rollout, rel=0.15)
    assert (needs["update"] - needs["weights"]) * 2**30 == pytest.approx(live.peak, rel=0.1)
    assert needs["rollout"] >= deaf["rollout"] and needs["update"] > deaf["update"]
    without = [
        og.rehearse(c, config, f, 160, torch.float32)
        for c, f in (
            (dataclasses.replace(cfg, audio="none"), family),
            (cfg, og.TEXT_ONLY),
            (dataclasses.replace(cfg, relisten_tokens=0), family),
        )
    ]
    assert without == [deaf] * 3


def test_preflight_counts_what_may_be_heard_again(omni):
    few, many = (
        float(
            og.preflight(
                dataclasses.replace(omni.cfg, relisten_tokens=n, num_generations=16, max_new_tokens=8), 48.0
            )
            .partition("at most ")[2]
            .partition(" ")[0]
        )
        for n in (0, 512)
    )
    assert many > few


# ---- the rehearsal


def test_the_second_sound_is_heard_only_again(tmp_path):
    """Beside the loud sound nothing of the faint one is above the front end's floor; its part alone is full of it, and so is
    the part that the cold start's chains listen to, most of the time."""
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, return_attention_mask=True
    )
    path = data.write_scenes(str(tmp_path), 40, seed=1, name="scenes", taught=True)
    assert len(data.scan(data.Examples(path), "cold_start")) == 40
    clear = 0
    for e in data.Examples(path):
        (start, end), wave = e.meta["spans"][0], data.load_audio(e.audio)[0]
        whole = og.features(extractor, wave, 0)
        assert (
            whole[:, round(start * 100) + 3 : round(end * 100) - 3].max()
            <= whole.min() + 1e-3
            < whole.max() - 1.9
        )
        alone = og.features(extractor, wave[round(start * RATE_HZ) : round(end * RATE_HZ)], 0)
        assert (alone > alone.min() + 0.1).float().mean() > 0.02
        assert (
            e.choices[e.answer] == e.meta["label"]
            and e.meta["first"] in e.choices
            and len(set(e.choices)) == 4
        )
        found = [og.SEGMENT.search(chain[: chain.index("</seg>") + 6]) for chain in e.target]
        assert all(
            reward.think_format(chain, e) == 1 and reward.segment_flow(chain, e) == 0 for chain in e.target
        )
        assert [reward.resolve(chain, e.choices) for chain in e.target] == [0, 1, 2, 3]
        (heard,) = {tuple(map(float, m.groups())) for m in found}
        again = og.features(extractor, wave[round(heard[0] * RATE_HZ) : round(heard[1] * RATE_HZ)], 0)
        clear += again.max() < 0.5  # the loud one is not in it
        assert reward.grounding(reward.Text.of("", heard=[heard]), e) > 0.5
    assert clear >= 36


def test_demos_parse(monkeypatch):
    cfg, demo = og.parse_config(["--demo", "relisten", "--seed", "1"])
    assert demo == "relisten" and cfg.relistens == 2 and cfg.cold_start_steps and cfg.seed == 1
    assert og.parse_config([])[1] == "sounds"
    for words in (["--demo", "nothing"], ["--demo", "relisten", "--data", "x.jsonl"]):
        with pytest.raises(data.UserError):
            og.parse_config(words)
