"""Re-listening: a completion that writes <seg>start, end</seg> while it thinks hears that part of its clip
again."""

import copy
import dataclasses
import itertools
import json
import math
import re
import time

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import transformers

import data
import model
import omni_grpo as og
import runs
from conftest import wake
from data import RATE_HZ, Example
from model import Completion, Prompt, Relistening, make_pack, token_logps
from reward import Said, parse_rewards, score
from test_data import cells
from test_families import family_folder  # noqa: F401 - a fixture
from test_model import gradients, library
from tools import sounds

SECONDS = dict(bell=3.217, one=1.3, two=2.1)  # the bell is longer than the tower's window of 2 s


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """name -> path of a clip of so many SECONDS: noise that swells, under a rising tone"""
    folder, rng, paths = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), {}
    for name, seconds in SECONDS.items():
        t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
        noise = np.sin(2 * t) ** 2 * rng.standard_normal(len(t))
        paths[name] = str(folder / f"{name}.wav")
        soundfile.write(paths[name], 0.2 * np.sin(2 * np.pi * (300 + 300 * t) * t) + 0.1 * noise, RATE_HZ)
    return paths


class Stage:
    """A policy with LoRA at work and three questions: about one clip, about two, and about none."""

    def __init__(self, config, recordings, folder):
        self.cfg = config(model=folder, prompt="relisten", max_new_tokens=90)
        torch.manual_seed(0)
        self.policy = wake(og.load_run_policy(self.cfg))
        sounds = (recordings["bell"], [recordings["one"], recordings["two"]], None)
        self.examples = [Example("", clips, "What is heard?", ["bell", "hum"], 0) for clips in sounds]
        self.prompts, self.clips = self.listen(self.cfg)

    def listen(self, cfg):
        clips = [og.load_clips_of(self.policy, cfg, e)[0] for e in self.examples]
        return og.encode_prompts(self.policy, cfg, self.examples, clips), clips

    def drawn(self, clips, **changes):
        examples = [dataclasses.replace(e, **changes) for e in self.examples]
        return [og.Drawn(i, e, clips[i], False) for i, e in enumerate(examples)]

    def ids(self, text, policy=None):
        return (policy or self.policy).tokenizer(text, add_special_tokens=False)["input_ids"]

    def turn(self, text):
        return [*self.ids(text), self.policy.tokenizer.eos_token_id]

    def samples(self, question):
        """The clips of a question on one time line."""
        return np.concatenate(waves_of(self.examples[question]))

    def ask(self, said, question=0, policy=None, most=8, source="audio"):
        """What `said`, a text or token ids, is given to hear.       -> Completion"""
        policy, row = policy or self.policy, Completion([])
        insert = Relistening(policy, self.prompts, self.clips, most, source)
        for token in self.ids(said, policy) if isinstance(said, str) else said:
            row.append(token)
            heard = insert([question], [row])[0]
            if heard:
                row.insert(heard)
        assert [len(audio) + 2 for _, audio in row.audio] == list(map(len, inserted(row)))
        return row


def waves_of(example):
    return [soundfile.read(path, dtype="float32")[0] for path in example.clips]


def inserted(row):
    """-> the ids of every block that was inserted"""
    runs_of_ids = itertools.groupby(zip(row.ids, row.sampled), key=lambda pair: pair[1])
    return [[token for token, _ in pairs] for sampled, pairs in runs_of_ids if not sampled]


@pytest.fixture(scope="module")
def omni(config, recordings, tiny):
    return Stage(config, recordings, tiny.base)


def act(patch, script):
    """In rollouts from now on a completion says script(seed of its prompt, its number in the group), token
    ids, and then goes on by itself; None: it says what it likes. Log-probabilities are the true ones."""
    decode, sample_tokens, lines, steps = og.decode, og.sample_tokens, {}, []

    def acted(policy, prefixes, g, temperature, most, seeds, *more):
        lines.clear()
        steps.clear()
        for seed in seeds:
            draws = torch.rand(g, most, generator=torch.Generator().manual_seed(seed)).tolist()
            for j, row in enumerate(draws):  # a row is known by its draws
                for nth, (u, token) in enumerate(zip(row, script(seed, j) or ())):
                    lines[nth, u] = token
        return decode(policy, prefixes, g, temperature, most, seeds, *more)

    def says(logits, u, temperature):
        ids, _ = sample_tokens(logits, u, temperature)
        ids = [lines.get((len(steps), x), token) for x, token in zip(u.tolist(), ids.tolist())]
        steps.append(ids)
        logps = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
        return torch.tensor(ids), logps.gather(1, torch.tensor(ids)[:, None])[:, 0]

    patch.setattr(og, "decode", acted)
    patch.setattr(og, "sample_tokens", says)


# ---- exactness: the sampler, the packs and the library agree on what was heard

SAID = [  # a question's completions
    [
        "<think>I hear <seg>0.5, 1.25</seg> it, and <seg>0.00004, 3.4</seg>.</think><answer>bell</answer>",
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
SAMPLES = [  # of the clips on one time line: what each completion is to hear, worked out by hand
    [[(8000, 20000), (1, 51472)], [(33600, 46400)], []],
    [[(16000, 32000)], [(0, 20800), (20800, 54400)], []],
    [[], [], []],
]


@pytest.fixture(scope="module", params=["omni", "qwen2_audio"])
def rolled(request, config, recordings, omni, family_folder):  # noqa: F811
    """-> (Stage, completions of its questions that said SAID, their pack)"""
    stage = omni
    if request.param == "qwen2_audio":
        stage = Stage(config, recordings, family_folder("qwen2_audio"))
    prompts = [Prompt(p.ids, p.audio) for p in stage.prompts]
    with pytest.MonkeyPatch.context() as patch:
        act(patch, lambda seed, j: stage.turn(SAID[seed][j]))
        done = og.rollout(stage.policy, stage.cfg, prompts, stage.clips, [0, 1, 2], 3, 0.8, learn=True)
    return stage, done, make_pack(prompts, done, [0, 3, 6])


def library_logps(stage, question, completion, samples):
    """Of the sampled tokens, from one row through the library's own model: ids with placeholders, features of
    the clips and of the parts cut out of them, its positions, its audio path, its attention."""
    policy, features, prompt = stage.policy, {}, stage.prompts[question].ids
    waves = waves_of(stage.examples[question]) + [stage.samples(question)[a:b] for a, b in samples]
    if waves:
        length = None if policy.frames_after else 5 * RATE_HZ  # Qwen2-Audio: 30 s
        how = dict(return_tensors="pt", return_attention_mask=True, padding="max_length", max_length=length)
        out = policy.extractor(waves, sampling_rate=RATE_HZ, **how)
        features = dict(input_features=out["input_features"], feature_attention_mask=out["attention_mask"])
    ids = torch.tensor([prompt + completion.ids])
    with library(policy) as base:
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits
    logps = F.log_softmax(logits[0, len(prompt) - 1 : -1].float() / 0.8, dim=-1)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0][torch.tensor(completion.sampled)]


def every(done):
    return [completion for of_prompt in done for completion in of_prompt]


def test_the_library_agrees(rolled):
    """Log-probabilities of the sampler, of the packs (prompts read anew, read in another pass, and as the
    rollout has read them) and of the library, and the gradients of the first two: <= 1e-5 (or the steps of
    float32 at -18)."""
    stage, done, pack = rolled
    policy, theirs = stage.policy, []
    for question, (of_prompt, parts) in enumerate(zip(done, SAMPLES)):
        theirs += [library_logps(stage, question, c, samples) for c, samples in zip(of_prompt, parts)]
    theirs = torch.cat(theirs)
    sampled = torch.tensor([x for c in every(done) for x, s in zip(c.logps, c.sampled) if s])
    (other_pass,) = model.read_prompts(policy, stage.prompts)
    anew, other, rollouts = (
        token_logps(policy, pack, 0.8, prefix)[0] for prefix in (None, other_pass, pack.prefix)
    )
    for logps in (sampled, anew, other, rollouts):
        torch.testing.assert_close(logps, theirs, atol=1e-5, rtol=1e-6)
    weight = torch.randn(len(theirs), generator=torch.Generator().manual_seed(0))
    reference = gradients(policy, (weight * theirs).sum())
    for logps in (anew, other):
        for name, grad in gradients(policy, (weight * logps).sum()).items():
            assert (grad - reference[name]).abs().max() <= 1e-5 * max(1.0, reference[name].abs().max()), name


def test_what_is_inserted_and_where(rolled):
    """Behind the token that closes the tag: as many placeholders as the part has embeddings, between the
    tokens that stand around the prompt's clips."""
    stage, done, _ = rolled
    policy = stage.policy
    bos, audio_id, eos = policy.tokenizer.convert_tokens_to_ids(
        ["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    )
    assert [model.completion_text(policy, c) for c in every(done)] == every(SAID)
    for c, samples in zip(every(done), every(SAMPLES)):
        assert [(round(a * RATE_HZ), round(b * RATE_HZ)) for a, b in c.heard] == samples
        assert [logp != 0 for logp in c.logps] == c.sampled and c.finished
        for (at, audio), block, (a, b) in zip(c.audio, inserted(c), samples, strict=True):
            frames = -(-(b - a) // 160)
            assert len(audio) == ((frames - 1) // 2 + 1 - 2) // 2 + 1
            assert block == [bos, *[audio_id] * len(audio), eos] == c.ids[at - 1 : at + len(audio) + 1]
            before = model.completion_text(policy, Completion(c.ids[: at - 1], sampled=c.sampled[: at - 1]))
            assert before.rstrip(".").endswith("</seg>")
    assert [dict(c.refused) for c in every(done)] == [{}] * 8 + [{"outside": 1}]  # nothing to hear again


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


@pytest.mark.parametrize("rows, questions", [(128, 3), (1, 2)])
def test_a_target_is_taught_as_it_would_be_sampled(omni, monkeypatch, rows, questions):
    """The same tokens, parts, refusals and audio, in a cold start and in a rollout that says the same, all at
    once or one question after the other."""
    cfg = dataclasses.replace(omni.cfg, max_relistens=2, rollout_rows=rows)
    act(monkeypatch, lambda seed, j: omni.turn(TARGETS[j]))
    groups = og.teacher_groups(omni.policy, cfg, omni.drawn(omni.clips, target=TARGETS))
    taught = [group.completions for group in groups]
    said = og.rollout(omni.policy, cfg, omni.prompts, omni.clips, [1, 2, 3], len(TARGETS), 1.0)
    assert sum(len(c.heard) for c in every(taught)) > 10
    for a, b in zip(every(taught[:questions]), every(said[:questions]), strict=True):
        assert (a.ids, a.sampled, a.heard) == (b.ids, b.sampled, b.heard) and len(a.logps) == len(a.ids)
        assert (a.refused, a.finished) == (b.refused, b.finished)
        for (at, audio), (place, other) in zip(a.audio, b.audio, strict=True):
            assert at == place
            torch.testing.assert_close(audio, other, atol=1e-5, rtol=0)
    assert [of_question[3].refused for of_question in taught] == [{"too many": 1}] * 2 + [{"outside": 3}]


# ---- what may be asked for, and what may not

WANTED = """
<seg>0, 1</seg> | 0 | 1
<seg>0.,1.</seg> | 0 | 1
<seg>.5,1</seg> | 0.5 | 1
<seg>NEWLINE0 , 1.25 </seg> | 0 | 1.25
<seg>000.5000, 1</seg> | 0.5 | 1
<seg>1, 1.2</seg> | 1 | 1.2
<seg>3, 3.717</seg> | 3 | 3.217
<seg>0, 3.217</seg> | 0 | 3.217
<think>I hear<seg>0, 1</seg> | 0 | 1
<seg>0, 1</seg>.</think> | 0 | 1
<seg>0, 1SPACES<seg>0, 1</seg>MANY | 0 | 1
<seg>0, 1</seg></think><answer> | 0 | 1
"""
REFUSED = """
malformed | <seg>-1, 1e9</seg> | <seg>nan, nan</seg> | <seg>0, inf</seg> | <seg></seg> | <seg>,</seg>
malformed | <seg>1</seg> | <seg>1,</seg> | <seg>0, 1, 2</seg> | <seg>0 1</seg> | <seg>0.1.2, 2</seg>
malformed | <seg>٠, ١</seg> | <seg>０, １</seg> | <seg>0, ²</seg> | <seg>0x0, 1</seg> | <seg>0s, 1s</seg>
malformed | <seg>0_0, 1</seg> | </seg> | 0, 1</seg> | <seg>0, <seg>0, 1</seg> | <seg>0, 1 <seg>0, 1</seg>
malformed | <seg>0, 1</ seg></seg> | <SEG>0, 1</seg> | <seg>NINES, 1</seg> | <seg>0, NINES</seg> | <seg>0,SPACES1</seg>
reversed | <seg>2, 1</seg> | <seg>1, 1</seg> | <seg>99, 1</seg>
outside | <seg>0, 3.72</seg> | <seg>3.217, 3.5</seg> | <seg>0, 9999999999999999</seg>
short | <seg>1, 1.19</seg> | <seg>3.1, 3.7</seg>
long | <seg>0, 3.1</seg>
not thinking | <answer><seg>0, 1</seg></answer> | </think><seg>0, 1</seg> | < answer ><seg>0, 1</seg>
not thinking | <think>a</think><answer>bell</answer><seg>0, 1</seg> | </THINK>NEWLINE<RESPONSE><seg>0, 1</seg>
not thinking | </think>MANY<seg>0, 1</seg>
nothing | <seg> | <seg>0, 1 | <seg>0, 1</seg | <seg>0, 1</SEG> | <seg>0, 1</ seg> | ARROWS
nothing | &lt;seg&gt;0, 1&lt;/seg&gt; | <think></think><answer>bell</answer> | <|audio_bos|><|AUDIO|><|audio_eos|>
"""


LONG = dict(NEWLINE="\n", MANY=" bell" * 99, NINES="9" * 400, SPACES=" " * 400, ARROWS=">" * 300)


def spelt_out(text):
    for name, long in LONG.items():
        text = text.replace(name, long)
    return text


def byte_by_byte(stage, text):
    """Token ids of the text, a byte each."""
    tokenizer = stage.policy.tokenizer
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return tokenizer.convert_tokens_to_ids([unit for word, _ in words for unit in word])


@pytest.mark.parametrize("spelt", ["as usual", "byte by byte"])
def test_what_is_heard_and_what_is_refused(omni, spelt, monkeypatch):
    """However the text is cut into tokens; a tag that is refused adds nothing and is counted once."""

    def ask(text):
        text = spelt_out(text)
        if spelt == "as usual" or len(text) > 100 or "|" in text:
            return omni.ask(text)
        return omni.ask(byte_by_byte(omni, text))

    for text, start, end in cells(WANTED):
        row = ask(text)
        assert row.heard == [pytest.approx((float(start), float(end)))], text
        assert not row.refused and len(inserted(row)) == 1, text
    monkeypatch.setattr(model, "MAX_RELISTEN_S", 3.0)
    for problem, *texts in cells(REFUSED):
        for text in texts:
            row = ask(text)
            assert dict(row.refused) == ({} if problem == "nothing" else {problem: 1}), text
            assert not row.heard and not row.audio and all(row.sampled), text


MERGED = ["></", "><", "g>.", "g></"]
RUN_ON = """
<seg>0, 1</seg></think><seg>1, 2</seg> | 1 | not thinking
<seg>0, 1</seg><answer><seg>1, 2</seg></answer> | 1 | not thinking
<seg>0, 1</seg><seg>1, 2</seg><seg>2, 3</seg> | 3 | nothing
<seg>0, 1</seg>.<seg>1, 2</seg>. | 2 | nothing
<seg>0, 1</seg><seg>2, 1</seg></think><seg>1, 2</seg> | 1 | not thinking
</seg><seg>0, 1</seg> | 1 | malformed
<seg>0, 1</seg><MANYanswer><seg>1, 2</seg> | 2 | nothing
"""


@pytest.mark.parametrize("text, heard, refused", cells(RUN_ON))
def test_a_token_that_closes_a_tag_may_say_more(omni, text, heard, refused):
    """What is behind the tag in its last token is read on: it may open the next tag, or end the thinking."""
    policy = dataclasses.replace(omni.policy, tokenizer=copy.deepcopy(omni.policy.tokenizer))
    policy.tokenizer.add_tokens(MERGED)
    assert set(MERGED) & set(policy.tokenizer.tokenize(text))
    row = omni.ask(spelt_out(text), policy=policy)
    assert (len(row.heard), row.refused[refused]) == (int(heard), refused != "nothing")
    closers = policy.tokenizer.convert_tokens_to_ids([*MERGED, ">", ">."])
    assert all(row.ids[at - 2] in closers for at, _ in row.audio)


def test_numbers_of_any_length(omni):
    """A tokenizer with long numbers can fit 400 digits in a tag: they are no exception, and no long
    search."""
    insert = Relistening(omni.policy, omni.prompts, omni.clips, 8)
    start = time.process_time()
    for tag, problem in {
        "0, NINES": "outside",
        "NINES, 1": "reversed",
        "NINES, NINES": "reversed",
        "0.NINES, 2": "",
        "NINESNINESx": "malformed",
    }.items():
        tag = spelt_out(f"<seg>{tag}</seg>")
        assert insert.read_tag(tag, False, Completion([]), omni.clips[0])[0] == problem
    assert time.process_time() - start < 5


def test_five_thousand_tags(omni):
    """Of one completion; --max_relistens are heard, and the rest costs little."""
    start = time.process_time()
    row = omni.ask("<seg>0, 1</seg>" * 5_000, most=3)
    assert len(row.heard) == 3 and row.refused == {"too many": 4997}
    assert omni.ask("</seg>" * 5_000).refused == {"malformed": 5_000}
    assert time.process_time() - start < 8


def test_no_more_than_was_allowed(omni, monkeypatch):
    """--max_relistens, RELISTEN_TOKENS (with what wraps a part) and MAX_RELISTEN_S, to the last one and the
    last token."""
    row = omni.ask("<seg>0, 1</seg>" * 5, most=2)
    assert len(row.heard) == 2 and row.refused == {"too many": 3}
    for tokens, parts in {27: 1, 53: 1, 54: 2, 26: 0}.items():
        monkeypatch.setattr(model, "RELISTEN_TOKENS", tokens)
        row = omni.ask("<seg>0, 1</seg><seg>2, 1</seg><seg>1, 2</seg>")
        assert len(row.heard) == parts and row.refused["no room"] == 2 - parts
    rng = np.random.default_rng(0)
    for start, length in rng.uniform((0, 0.2), (2.5, 0.5), (60, 2)).round(2):
        most = math.ceil(25 * length - 1e-6) + 2
        monkeypatch.setattr(model, "RELISTEN_TOKENS", most)
        for source in ("audio", "embeddings"):
            row = omni.ask(f"<seg>{start}, {start + length:.2f}</seg>", source=source)
            assert len(row.heard) == 1 and row.sampled.count(False) <= most
    monkeypatch.undo()
    monkeypatch.setattr(model, "MAX_RELISTEN_S", 1.0)
    assert len(omni.ask("<seg>0, 1</seg><seg>0, 1.01</seg>").heard) == 1


@pytest.mark.parametrize("changes", [dict(audio="none"), dict(max_relistens=0), dict(prompt="think")])
def test_where_nothing_is_to_be_heard(omni, monkeypatch, changes):
    """No part is kept and none is heard: the rollout goes its way, and the log says nothing of re-
    listening."""
    act(monkeypatch, lambda seed, j: omni.ids("<seg>0, 1</seg>"))
    cfg = dataclasses.replace(omni.cfg, **changes)
    _, clips = omni.listen(cfg)
    assert not any(clip.samples is not None for of_question in clips for clip in of_question)
    groups = og.sample_groups(omni.policy, cfg, omni.drawn(clips), {"accuracy": 1.0})
    assert not any(c.heard or c.audio or c.refused for g in groups for c in g.completions)
    assert not any("relisten" in key for key in og.describe(groups, cfg))


def test_a_question_without_a_clip_has_no_part(omni):
    assert og.relistening(omni.policy, omni.cfg, omni.prompts[2:], omni.clips[2:]) is og.insert_nothing
    assert omni.ask("<seg>0, 1</seg>", question=2).refused == {"outside": 1}
    assert omni.cfg.relistens == 8  # the prompt's
    assert dataclasses.replace(omni.cfg, prompt="direct", max_relistens=3).relistens == 3


def test_a_part_of_silence_is_silent(omni, monkeypatch):
    act(monkeypatch, lambda seed, j: omni.ids("<seg>0, 1</seg>"))
    cfg = dataclasses.replace(omni.cfg, audio="silence")
    prompts, clips = omni.listen(cfg)
    done = og.rollout(omni.policy, cfg, prompts, clips, [1, 2, 3], 2, 1.0)
    silence = model.log_mel(omni.policy.extractor, np.zeros(RATE_HZ, np.float32), 0)
    for c in every(done[:2]):
        ((_, audio),) = c.audio
        torch.testing.assert_close(audio, omni.policy.encode_audio([silence])[0], atol=1e-5, rtol=0)


# ---- which samples, and which embeddings


FROM_AUDIO = """
0 | 0.50003, 1.25004 | 8000 | 20001
0 | 3.017, 3.7 | 48272 | 51472
0 | 0, 3.217 | 0 | 51472
1 | 0, 1.3 | 0 | 20800
1 | 1.3, 3.4 | 20800 | 54400
1 | 1.2, 1.5 | 19200 | 24000
1 | 3.1, 3.85 | 49600 | 54400
"""


@pytest.mark.parametrize("question, tag, first, last", cells(FROM_AUDIO))
def test_exactly_these_samples(omni, monkeypatch, question, tag, first, last):
    """Seconds times 16,000, to the nearest; several clips follow each other; what reaches past the end ends
    there."""
    cut, log_mel = [], model.log_mel
    monkeypatch.setattr(model, "log_mel", lambda *args: (cut.append(args[1]), log_mel(*args))[1])
    question, first, last = int(question), int(first), int(last)
    row, whole = omni.ask(f"<seg>{tag}</seg>", question), omni.samples(question)
    assert len(cut) == 1 and np.array_equal(cut[0], whole[first:last])
    assert row.heard == [pytest.approx((first / RATE_HZ, last / RATE_HZ), abs=1 / RATE_HZ)]
    assert row.heard[0][1] <= len(whole) / RATE_HZ


FROM_EMBEDDINGS = """
0 | 0, 1 | 0 | 25
0 | 1.6, 2 | 40 | 50
0 | 3.017, 3.7 | 75 | 80
0 | 0, 3.217 | 0 | 80
1 | 1.0, 2.0 | 25 | 50
1 | 0, 3.9 | 0 | 85
"""


@pytest.mark.parametrize("question, tag, first, last", cells(FROM_EMBEDDINGS))
def test_from_embeddings(omni, question, tag, first, last):
    """The prompt's own embeddings of that time, 25 a second, and no run of the tower."""
    deaf = dataclasses.replace(omni.policy, encode_audio=lambda mels: pytest.fail("the tower ran"))
    row = omni.ask(f"<seg>{tag}</seg>", int(question), deaf, source="embeddings")
    whole = torch.cat([audio for _, audio in omni.prompts[int(question)].audio])
    assert torch.equal(row.audio[0][1], whole[int(first) : int(last)])


def test_parts_of_several_rows_are_heard_at_once(omni):
    """One run of the tower for all that a step asks for, and to each row its own part."""
    ran, encode = [], omni.policy.encode_audio
    policy = dataclasses.replace(
        omni.policy, encode_audio=lambda mels: (ran.append(len(mels)), encode(mels))[1]
    )
    questions, spans = (1, 0, 0, 2, 1, 0), ("0, 1", "2, 1", "1, 3", "0, 1", "2, 2.5", "bell")
    rows = [Completion(omni.ids(f"<seg>{span}</seg>"), sampled=[True] * 99) for span in spans]
    heard = Relistening(policy, omni.prompts, omni.clips, 8)(list(questions), rows)
    assert ran == [3] and list(map(bool, heard)) == [True, False, True, False, True, False]
    for n in (0, 2, 4):
        ((_, alone),) = omni.ask(f"<seg>{spans[n]}</seg>", questions[n]).audio
        torch.testing.assert_close(heard[n].audio[0][1], alone, atol=1e-5, rtol=0)


# ---- runs


@pytest.fixture
def lessons(tiny, tmp_path):
    """-> (questions, and a cold start on them with two chains each: one hears a part, one asks for too
    much)"""
    questions, cold = tmp_path / "questions.jsonl", tmp_path / "lessons.jsonl"
    with open(questions, "w") as f, open(cold, "w") as g:
        for i, e in enumerate(data.Examples(tiny.questions)):
            right = e.choices[e.answer]
            said = f"<think>I hear <seg>{i % 3 / 10}, 0.4</seg> {right}.</think>\n<answer>{right}</answer>"
            e.meta = dict(spans=[[0.1, 0.3]])
            f.write(json.dumps(vars(e)) + "\n")
            g.write(json.dumps(vars(e) | dict(target=[said, said.replace("0.4", "9")])) + "\n")
    return str(questions), str(cold)


CHAINS = [
    "<think>a<seg>0.1, 0.4</seg> hum</think>\n<answer>{}</answer>",
    "<seg>0, 9</seg>, <seg>0, 0.3</seg></seg> so <answer>{}</answer>",
    "<answer>{}</answer>",
    None,
]


@pytest.mark.parametrize("source", ["audio", "embeddings"])
def test_the_log_says_what_was_heard(omni, config, lessons, tmp_path, monkeypatch, drawn, source):
    """In a cold start whose targets hear parts again, and in GRPO with two updates a rollout; and the rewards
    judge what was heard."""
    monkeypatch.setattr(og, "LOG_ROLLOUTS", 1)
    monkeypatch.setattr(og, "EVAL_SAMPLES", 1)
    names = list(sounds.SOUNDS)
    act(monkeypatch, lambda seed, j: CHAINS[j] and omni.turn(CHAINS[j].format(names[seed % 4])))
    cfg = config(
        data=lessons[0],
        cold_start_data=lessons[1],
        cold_start_steps=2,
        steps=3,
        prompt="relisten",
        relisten_from=source,
        max_new_tokens=48,
        num_generations=4,
        updates_per_rollout=2,
        eval_size=3,
        reward="accuracy=1,segment=0.5,segment_flow=1,confident_accuracy=0.5,grounding=0.25",
    )
    log, rollouts, _ = runs.left_by(runs.train(cfg, tmp_path / "run"))
    for r in log[1:3]:  # two targets a question: the part is heard, and another one is outside
        assert (r["relisten/heard"], r["relisten/refused"], r["relisten/refused_outside"]) == (0.5, 0.5, 0.5)
        assert 2 < r["relisten/tokens"] <= 6 and r["optim/grad_norm"] > 0
    for r in log[3:]:
        rows = [x for x in rollouts if x["step"] == r["step"]]
        assert len(rows) == 8 and r["relisten/heard"] == sum(len(x["heard"]) for x in rows) / 8 >= 0.5
        assert r["relisten/refused"] == sum(sum(x["refused"].values()) for x in rows) / 8 >= 0.5
        assert (r["relisten/refused_outside"], r["relisten/refused_malformed"]) == (0.25, 0.25)
        part = 9 if source == "audio" else 10  # 0.3 s and what wraps it
        assert r["relisten/tokens"] == pytest.approx(part * r["relisten/heard"])
        assert r["policy/kl_ref"] > 0 and r["len/mean"] == sum(x["tokens"] for x in rows) / 8  # what was said
    weights = parse_rewards(cfg.reward)
    for x in rollouts:
        assert x["audio"] and x["tokens"] <= 48 and "<|" not in x["completion"]
        example = Example("", None, "?", x["choices"], x["answer"], meta=dict(spans=[[0.1, 0.3]]))
        said, parts = Said(x["completion"], heard=tuple(map(tuple, x["heard"]))), x["parts"]
        known = dict(confident_accuracy=parts["confident_accuracy"])
        assert parts == score(said, example, weights)[1] | known and abs(known["confident_accuracy"]) <= 1
        assert x["reward"] == pytest.approx(sum(weights[name] * parts[name] for name in weights))
    assert {len(x["heard"]) for x in rollouts} == {0, 1}
    assert [r["step"] for r in log if "eval/accuracy_once" in r] == [0, 5]


def test_evaluation_hears_again(omni, monkeypatch):
    """As the policy does in training; a question whose clip is bad is wrong, and has no part in it. The
    control hears the clip once."""
    act(monkeypatch, lambda seed, j: omni.turn("<seg>0, 1</seg><answer>bell</answer>"))
    heard, rollout = [], og.rollout

    def watched(*args):
        done = rollout(*args)
        heard.append([len(c.heard) for c in every(done)])
        return done

    monkeypatch.setattr(og, "rollout", watched)
    missing = dataclasses.replace(omni.examples[0], audio="missing.wav")
    result = og.evaluate(omni.policy, omni.cfg, [*omni.examples, missing], samples=2)
    assert result == {"eval/accuracy": 0.75, "eval/accuracy_sampled": 0.75, "eval/bad_audio": 1}
    assert sum(heard, []) == [1, 1, 0, 1, 1, 1, 1, 0, 0]
    result = og.measure(omni.policy, omni.cfg, omni.examples, control=True)
    assert result.keys() == {"eval/accuracy" + x for x in ("", "_sampled", "_silence", "_once")}
    assert heard[-1] == [0, 0, 0]


# ---- what the rewards are told


SURE = """
<think>so</think><answer>[ bell]</answer> | -1
<answer>a hum</answer> <answer>[bell]</answer> | -1
<answer>[日本]</answer>é | -1
<answer>[é bell] | unknown
bell | unknown
<answer>[]</answer> | 0
<answer>a<answer>[b]</answer> | -3
é日<answer>[NEWLINEhumNEWLINE]</answer> | -1
"""


@pytest.mark.parametrize("said, lowest", cells(SURE))
def test_confidence(omni, said, lowest):
    """The probability of the answer's least certain token, whatever was less certain outside of it, in what
    was inserted, or in an earlier answer; characters may be split over tokens.

    What stands in [] has log-probability -0.5 but for its first token, -1; all else has -3."""
    row, said = Completion([]), spelt_out(said)
    for i, part in enumerate(re.split(r"[][]", said)):
        for k, token in enumerate(omni.ids(part)):
            logp = -0.5 if k else -1.0
            row.append(token, logp if i == 1 else -3.0)
            row.insert(model.Tokens([omni.policy.audio_id]))
            row.logps[-1] = -9.0
    judged = og.what_was_said(omni.policy, omni.cfg, row, dict(accuracy=1, confident_accuracy=1))
    assert judged.text == re.sub(r"[][]", "", said) and judged.used == sum(row.sampled) / 90
    expected = None if lowest == "unknown" else pytest.approx(math.exp(float(lowest)))
    assert judged.confidence == expected and judged.heard == []
    assert og.what_was_said(omni.policy, omni.cfg, row, dict(accuracy=1)).confidence is None


def test_a_token_on_the_answer_s_edge_belongs_to_it(omni):
    """ ">." is one token: it closes the tag and begins the answer."""
    row = Completion(omni.ids("<answer>.5</answer>"))
    row.sampled = [True] * len(row.ids)
    pieces = omni.policy.tokenizer.convert_ids_to_tokens(row.ids)
    row.logps = [{">.": -1.0, "5": -0.5}.get(piece, -4.0) for piece in pieces]
    judged = og.what_was_said(omni.policy, omni.cfg, row, {"confident_accuracy": 1.0})
    assert ">." in pieces and judged.confidence == pytest.approx(math.exp(-1))


# ---- the demo


def test_the_second_sound_is_heard_only_again(tmp_path):
    """Beside the loud sound nothing of the faint one is above the front end's floor; its part alone is full
    of it, and so is the part that the cold start's chains listen to, most of the time."""
    how = dict(feature_size=128, chunk_length=300, return_attention_mask=True)
    extractor = transformers.WhisperFeatureExtractor(**how)
    examples = data.Examples(sounds.write_scenes(str(tmp_path), 40, seed=1, name="scenes", taught=True))
    clear = 0
    for e in examples:
        samples, (start, end) = data.load_audio(e.audio)[0], e.meta["spans"][0]

        def mel(start, end, samples=samples):
            return model.log_mel(extractor, samples[round(start * RATE_HZ) : round(end * RATE_HZ)], 0)

        whole, alone = mel(0, 9), mel(start, end)
        faint = whole[:, round(start * 100) + 3 : round(end * 100) - 3]
        assert faint.max() <= whole.min() + 1e-3 < whole.max() - 1.9
        assert (alone > alone.min() + 0.1).float().mean() > 0.02
        heard = tuple(map(float, re.search(data.SEGMENT, e.target[0]).groups()))
        assert score(Said("", heard=(heard,)), e, {"grounding": 1.0})[0] > 0.5
        clear += mel(*heard).max() < 0.5  # the loud one is not in it
    assert clear >= 36


def test_demos_parse():
    cfg, demo = og.parse_config(["--demo", "relisten", "--seed", "1"])
    assert demo == "relisten" and cfg.relistens == 2 and cfg.cold_start_steps and cfg.seed == 1
    assert og.parse_config([])[1] == "sounds"
    for words in (["--demo", "nothing"], ["--demo", "relisten", "--data", "x.jsonl"]):
        with pytest.raises(data.UserError):
            og.parse_config(words)
