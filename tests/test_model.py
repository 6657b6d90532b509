"""Exactness: packed scoring, decoding and the update against the plain computation (tests/plain.py) in
float32."""

import contextlib
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import model
import omni_grpo as og
import plain
from model import Completion, Tokens, make_pack, token_logps


def completion(ids, sampled=None, audio=()):
    return Completion(list(ids), list(audio), sampled or [True] * len(ids), [0.0] * len(ids))


def make_groups(examples, prompts, completions, rewards=(0.0, 1.0, 0.5)):
    groups = []
    for example, prompt, of_prompt in zip(examples, prompts, completions):
        rewarded = list(rewards) if len(rewards) == len(of_prompt) else [0.0] * len(of_prompt)
        adv = og.group_advantages(torch.tensor([rewarded]))[0].tolist()
        groups.append(og.Group(example, prompt, of_prompt, rewarded, [{}] * len(of_prompt), adv))
    return groups


def ragged_groups(policy, prompts, seed=0):
    """Three groups, completions of 1 to 7 tokens; one has forced tokens with audio in its middle, one the
    placeholder's id."""
    examples, tokens = prompts
    g = torch.Generator().manual_seed(seed)
    lengths = [(3, 1, 7), (2, 5, 4), (6, 2, 1)]
    done = [[completion(torch.randint(20, 300, (n,), generator=g).tolist()) for n in of] for of in lengths]
    inserted = done[0][2]
    inserted.sampled[2:5] = [False] * 3
    inserted.audio.append((3, tokens[1].audio[0][1][:2]))
    done[1][1].ids[1] = policy.audio_id
    return make_groups(examples, tokens, done)


def pack_of(groups, device="cpu"):
    """All groups in one pack."""
    counts = [len(group.completions) for group in groups]
    first_rows = [sum(counts[:i]) for i in range(len(groups))]
    return make_pack([g.prompt for g in groups], [g.completions for g in groups], first_rows, device)


def decode(policy, prompts, g, temperature, max_new_tokens, seeds, insert=og.insert_nothing):
    prefixes = model.read_prompts(policy, prompts)
    return og.decode(policy, prefixes, g, temperature, max_new_tokens, seeds, insert)


@contextlib.contextmanager
def library(policy):
    """The library's own model inside the policy, LoRA layers and all, with the library's own attention."""
    attention = policy.lm.config._attn_implementation
    policy.lm.eval()  # no checkpointing: its recomputation would come after the attention is switched back
    policy.lm.set_attn_implementation("eager")
    yield policy.model.get_base_model()
    policy.lm.set_attn_implementation(attention)


def plain_logps(policy, groups, temperature):
    """Of every trained token, by tests/plain.py.       -> (M,)"""
    rows = [(group.prompt, c) for group in groups for c in group.completions]
    with library(policy) as base:
        logps, trained = plain.token_logps(base, rows, temperature)
    return logps[trained.bool()]


def gradients(policy, loss):
    parameters = policy.trainable()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_plain(policy, prompts, temperature):
    """Log-probabilities and their gradients, three prompts in a pack, ragged, with forced tokens: <= 1e-5."""
    groups = ragged_groups(policy, prompts)
    logps, _ = token_logps(policy, pack_of(groups), temperature)
    weight = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    ours = gradients(policy, (weight * logps).sum())
    theirs = plain_logps(policy, groups, temperature)
    assert (logps - theirs).abs().max() <= 1e-5
    theirs = gradients(policy, (weight * theirs).sum())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5 * max(1.0, theirs[name].abs().max()), name


def test_scoring_leaves_its_inputs_alone(policy, prompts):
    """Embeddings are filled in, in a copy: neither the table, nor the prompts, nor a second call sees it."""
    groups = ragged_groups(policy, prompts)
    table, audio = policy.embed_tokens.weight.clone(), [a.clone() for g in groups for _, a in g.prompt.audio]
    pack = pack_of(groups)
    first, _ = token_logps(policy, pack, 1.0)
    assert torch.equal(token_logps(policy, pack, 1.0)[0], first)
    assert torch.equal(policy.embed_tokens.weight, table)
    assert all(torch.equal(a, b) for a, (_, b) in zip(audio, (x for g in groups for x in g.prompt.audio)))


def test_pack_rows_and_targets(policy, prompts):
    groups = ragged_groups(policy, prompts)
    pack = pack_of(groups)
    completions = [c for g in groups for c in g.completions]
    assert pack.row.bincount().tolist() == [sum(c.sampled) for c in completions]
    assert pack.target.tolist() == [i for c in completions for i in c.sampled_ids]
    assert len(pack.positions) == sum(len(p.ids) for p in pack.inputs)
    assert len(pack.positions) == sum(len(c.ids) - 1 for c in completions)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_equals_scored(policy, prompts, temperature):
    """The sampler's log-probabilities are the scorer's, for prompts of different lengths decoded together,
    each token by all that came before it (the tiny base ends its turn after two tokens: here it may not)."""
    examples, tokens = prompts
    policy.stop_ids.clear()
    done = decode(policy, tokens, 4, temperature, 9, [1, 2, 3])
    assert all(len(c.ids) == 9 for group in done for c in group)
    logps, _ = token_logps(policy, pack_of(make_groups(examples, tokens, done)), temperature)
    sampled = torch.tensor([x for group in done for c in group for x in c.logps])
    assert (logps - sampled).abs().max() <= 1e-5


def test_rollout_does_not_depend_on_its_company(policy, prompts):
    tokens = prompts[1]
    together = decode(policy, tokens, 3, 1.0, 6, [1, 2, 3])
    alone = [decode(policy, [p], 3, 1.0, 6, [s])[0] for p, s in zip(tokens, [1, 2, 3])]
    assert [[c.ids for c in g] for g in together] == [[c.ids for c in g] for g in alone]
    assert len({tuple(c.ids) for g in together for c in g}) > 5  # and they are really drawn


def test_every_sampled_token_has_its_own_draw(policy, prompts):
    """All logits equal: 3 x 8 x 6 tokens are then independent and uniform over the vocabulary; repeats are
    rare."""
    with torch.no_grad():
        policy.embed_tokens.weight.data = policy.embed_tokens.weight.data.clone()
        policy.head.weight.data = torch.zeros_like(policy.head.weight)
    policy.stop_ids.clear()
    done = decode(policy, prompts[1], 8, 1.0, 6, [1, 2, 3])
    ids = [i for g in done for c in g for i in c.ids]
    assert len(ids) == 144 and len(set(ids)) > 100
    assert abs(sum(ids) / 144 / len(policy.head.weight) - 0.5) < 0.1


@pytest.mark.parametrize("n_clips", [1, 2, 3])
def test_greedy_rollout_is_the_library_s(policy, tiny, config, n_clips):
    """Same tokens as generate() on input features, audio path of the library included; several clips keep
    their order."""
    policy.stop_ids.clear()
    policy.model.get_base_model().generation_config.eos_token_id = None
    examples = list(data.Examples(tiny.questions))
    for i in range(3):
        example = dataclasses.replace(examples[i], audio=[e.audio for e in examples[i : i + n_clips]])
        clips, _ = og.load_clips_of(policy, config(), example)
        prompt, mels = (
            og.encode_prompts(policy, config(), [example], [clips])[0],
            [clip.mel for clip in clips],
        )
        assert len(prompt.audio) == len(mels) == n_clips
        ours = decode(policy, [prompt], 1, 0.0, 8, [0])[0][0].ids
        ids, frames = torch.tensor([prompt.ids]), max(m.shape[1] for m in mels)
        theirs = (
            policy.model.get_base_model()
            .generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                input_features=torch.stack([F.pad(m, (0, frames - m.shape[1])) for m in mels]),
                feature_attention_mask=torch.tensor(
                    [[j < m.shape[1] for j in range(frames)] for m in mels]
                ).long(),
                do_sample=False,
                max_new_tokens=8,
                pad_token_id=0,
            )[0, ids.shape[1] :]
            .tolist()
        )
        assert ours == theirs and len(ours) == 8


def test_inserted_tokens_are_read_by_their_row(policy, prompts):
    """A row that inserts goes on with what it was given while the others sample; its later tokens have heard
    it."""
    tokens = prompts[1]
    policy.stop_ids.clear()
    heard = tokens[2].audio[0][1][:3]
    given = Tokens([7, policy.audio_id, policy.audio_id, policy.audio_id, 8], [(1, heard)])

    def insert(which, rows):
        assert len(which) == len(rows)
        return [given if i == 1 and len(row.ids) == 2 else None for i, row in zip(which, rows)]

    done = decode(policy, tokens, 2, 1.0, 6, [1, 2, 3], insert)
    plain = decode(policy, tokens, 2, 1.0, 6, [1, 2, 3])
    assert [c.ids for c in done[0] + done[2]] == [c.ids for c in plain[0] + plain[2]]
    for c in done[1]:
        assert c.ids[2:7] == given.ids and c.sampled == [True] * 2 + [False] * 5 + [True] * 4
        assert [(start, len(audio)) for start, audio in c.audio] == [(3, 3)] and len(c.logps) == len(c.ids)
    groups = make_groups([None] * 3, tokens, done)
    logps, _ = token_logps(policy, pack_of(groups), 1.0)
    sampled = torch.tensor([x for g in done for c in g for x, s in zip(c.logps, c.sampled) if s])
    assert (logps - sampled).abs().max() <= 1e-5


def test_audio_stays_with_its_prompt(policy, prompts):
    """Other audio under prompt A changes A's log-probabilities and leaves B's bit-identical."""
    groups = ragged_groups(policy, prompts)
    before, _ = token_logps(policy, pack_of(groups), 1.0)
    start, audio = groups[0].prompt.audio[0]
    groups[0].prompt.audio = [(start, audio.flip(0))]
    pack = pack_of(groups)
    after, _ = token_logps(policy, pack, 1.0)
    assert (after - before).abs()[pack.row < 3].min() > 0
    assert torch.equal(after[pack.row >= 3], before[pack.row >= 3])


def test_batched_audio_is_each_clip_s_own(policy, tiny, config):
    """The tower over a batch gives each clip what it gives it alone, in order."""
    mels = [og.load_clips_of(policy, config(), e)[0][0].mel for e in list(data.Examples(tiny.questions))[:5]]
    for mel, batched in zip(mels, policy.encode_audio(mels)):
        torch.testing.assert_close(policy.encode_audio([mel])[0], batched, atol=1e-5, rtol=0)


def test_no_padding_to_300_seconds(policy, tiny, config):
    """Features of the short path equal those of the library's default, which pads every clip to the
    maximum."""
    example = data.Examples(tiny.questions)[0]
    wave, _ = data.load_audio(example.audio)
    out = policy.extractor(
        wave, sampling_rate=16_000, return_tensors="pt", padding="max_length", return_attention_mask=True
    )
    assert out["input_features"].shape[2] == 30_000
    valid = int(out["attention_mask"].sum())
    ours = og.load_clips_of(policy, config(), example)[0][0].mel
    torch.testing.assert_close(ours, out["input_features"][0, :, :valid], atol=1e-6, rtol=0)


def test_end_of_turn_is_trained(policy, prompts):
    """Finished completions keep the token that ended them, it is a target, and nothing follows it."""
    examples, tokens = prompts
    policy.stop_ids[:] = list(range(0, 392, 3))  # a third of the vocabulary ends a completion
    done = decode(policy, tokens, 8, 1.0, 6, [1, 2, 3])
    finished = [c for g in done for c in g if c.finished]
    assert finished and len(finished) < 24
    for c in finished:
        assert (
            c.ids[-1] in policy.stop_ids
            and c.sampled[-1]
            and not any(i in policy.stop_ids for i in c.ids[:-1])
        )
    pack = pack_of(make_groups(examples, tokens, done))
    assert sum(i in policy.stop_ids for i in pack.target.tolist()) == len(finished)


# ---- the adapter


def test_lora_is_in_the_language_model_only(policy):
    names = [n for n, _ in policy.model.named_parameters() if "lora_" in n]
    inside = {id(p) for p in policy.lm.parameters()}
    assert all(id(p) in inside for n, p in policy.model.named_parameters() if "lora_" in n)
    assert not any(word in n for n in names for word in ("audio_tower", "visual", "lm_head", "talker"))
    assert set(policy.trainable()) == set(names)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(f".{part}." in n for n in names)
    assert all(p.dtype == torch.float32 for p in policy.trainable().values())


def test_every_lora_weight_gets_a_gradient_with_checkpointing(policy, prompts):
    assert policy.lm.is_gradient_checkpointing
    logps, _ = token_logps(policy, pack_of(ragged_groups(policy, prompts)), 1.0)
    logps.sum().backward()
    for name, p in policy.trainable().items():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_checkpointing_changes_nothing(policy, prompts):
    pack = pack_of(ragged_groups(policy, prompts))
    results = []
    for switch in (None, policy.lm.gradient_checkpointing_disable):
        if switch:
            switch()
        assert policy.lm.is_gradient_checkpointing == (not switch)
        results.append(gradients(policy, token_logps(policy, pack, 1.0)[0].sum()))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-6, rtol=1e-5)


def test_fresh_adapter_has_no_kl(config, prompts):
    policy = og.load_run_policy(config())
    examples, tokens = prompts
    pack = pack_of(make_groups(examples, tokens, decode(policy, tokens, 3, 1.0, 6, [1, 2, 3])))
    logps, _ = token_logps(policy, pack, 1.0)
    with model.reference(policy) as frozen:
        ref, _ = token_logps(frozen, pack, 1.0)
    assert og.kl_k3(logps, ref).abs().max() == 0


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_frozen_reference_stays(policy, prompts, config, lora_rank):
    """Training from an adapter (or all weights): the reference is a copy of the start and does not move."""
    if not lora_rank:
        policy = og.load_run_policy(config(lora_rank=0))
    pack = pack_of(ragged_groups(policy, prompts))
    with torch.no_grad():
        start, _ = token_logps(policy, pack, 1.0)
        model.freeze_reference(policy)
        for p in policy.trainable().values():
            p.add_(0.05 * torch.randn_like(p))
        with model.reference(policy) as frozen:
            ref, _ = token_logps(frozen, pack, 1.0)
        now, _ = token_logps(policy, pack, 1.0)
    assert torch.equal(ref, start)
    assert (now - start).abs().max() > 1e-3
    assert not any("reference" in name for name in policy.trainable())


# ---- the update


class Capture:
    """An optimizer that keeps the gradients it is given."""

    def __init__(self, policy):
        self.policy, self.steps, self.param_groups = policy, [], []

    def zero_grad(self, set_to_none=True):
        for p in self.policy.trainable().values():
            p.grad = None

    def step(self):
        self.steps.append({n: p.grad.clone() for n, p in self.policy.trainable().items()})


@pytest.fixture
def no_clipping(monkeypatch):
    monkeypatch.setattr(og, "MAX_GRAD_NORM", math.inf)


def step_gradient(policy, cfg, groups):
    """-> (the gradient of one update, or None if there was no step; its log)"""
    optimizer = Capture(policy)
    log = og.update(policy, optimizer, cfg, groups)
    return (optimizer.steps[0] if optimizer.steps else None), log


def reward_groups(groups, rewards, scale="std"):
    for group, of_group in zip(groups, rewards):
        group.rewards = list(of_group)
        group.advantages = og.group_advantages(torch.tensor([group.rewards]), scale)[0].tolist()


@pytest.mark.parametrize("reduce", ["sequence", "token", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_gradient_does_not_depend_on_packs(policy, prompts, config, no_clipping, reduce, importance):
    groups = ragged_groups(policy, prompts)
    results, sizes = [], []
    for n in (1, 150, 10_000):
        cfg = config(reduce=reduce, importance=importance, pack_tokens=n)
        sizes.append(len(og.make_batch(policy, cfg, groups)[0].packs))
        results.append(step_gradient(policy, cfg, groups))
    assert sizes[0] == 3 and sizes[2] == 1
    for grads, log in results[1:]:
        assert log["policy/kl_ref"] == pytest.approx(results[0][1]["policy/kl_ref"], rel=1e-4)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][0][name], atol=1e-6, rtol=1e-4)


def test_update_gradient_by_hand(policy, prompts, config, no_clipping):
    """beta 0: the gradient is that of - sum over rows of A_row * mean over its tokens of logp / R."""
    groups = ragged_groups(policy, prompts)
    grads, _ = step_gradient(policy, config(beta=0.0), groups)
    adv = [a for group in groups for a in group.advantages]
    lengths = [sum(c.sampled) for group in groups for c in group.completions]
    of_row = plain_logps(policy, groups, 1.0).split(lengths)
    loss = -sum(a * logps.mean() for a, logps in zip(adv, of_row)) / 9
    for name, grad in gradients(policy, loss).items():
        torch.testing.assert_close(grads[name], grad, atol=2e-6, rtol=1e-4)


def test_kl_pulls_back(policy, prompts, config, no_clipping):
    """Uniform rewards and beta > 0: only the KL is left, and a step along its gradient lowers it."""
    groups = ragged_groups(policy, prompts)
    reward_groups(groups, [[1.0] * 3] * 3)
    grads, log = step_gradient(policy, config(beta=1.0), groups)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p -= 0.02 * grads[name]
    assert 0 < step_gradient(policy, config(beta=1.0), groups)[1]["policy/kl_ref"] < log["policy/kl_ref"]


def test_uniform_groups_are_not_scored_without_kl(policy, prompts, config, monkeypatch):
    groups, scored = ragged_groups(policy, prompts), []

    def count(policy, pack, *more):
        scored.append(len(pack.prompts))
        return token_logps(policy, pack, *more)

    monkeypatch.setattr(og, "token_logps", count)
    reward_groups(groups[:2], [[1.0] * 3] * 2)
    assert step_gradient(policy, config(beta=0.0), groups)[1]["group/scored"] == pytest.approx(1 / 3)
    assert scored == [1]
    reward_groups(groups[2:], [[0.0] * 3])
    assert step_gradient(policy, config(beta=0.0), groups)[0] is None
    assert scored == [1]


def test_second_update_on_a_rollout_is_off_policy(policy, prompts, config):
    """--updates_per_rollout 2: the ratio is 1 in the first update and not in the second."""
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    for updates, off_policy in ((2, True), (1, False)):
        cfg = config(updates_per_rollout=updates, beta=0.0)
        log = og.update(policy, optimizer, cfg, ragged_groups(policy, prompts))
        assert (log["policy/kl_old"] > 1e-6) == off_policy
    assert log["policy/kl_old"] == 0 and log["policy/clip_frac"] == 0


def test_non_finite_gradient_skips_the_update(policy, prompts, config):
    groups = ragged_groups(policy, prompts)
    start, audio = groups[0].prompt.audio[0]
    groups[0].prompt.audio = [(start, audio * float("nan"))]
    before = copy.deepcopy({n: p.detach() for n, p in policy.trainable().items()})
    grads, log = step_gradient(policy, config(), groups)
    assert grads is None and log["optim/skipped"] == 1
    assert all(torch.equal(p, before[n]) for n, p in policy.trainable().items())


def drawn_from(policy, cfg, examples):
    return [og.Drawn(i, e, *og.load_clips_of(policy, cfg, e)) for i, e in enumerate(examples)]


def test_cold_start_is_the_same_update(policy, prompts, config, no_clipping):
    """Gradient = that of the mean negative log-likelihood of the targets' tokens, the end of turn among
    them."""
    targets = ["bell", ["hum", "roar"], "siren"]
    examples = [dataclasses.replace(e, target=t) for e, t in zip(prompts[0], targets)]
    cfg = config(reduce="token", beta=0.0)
    groups = og.teacher_groups(policy, cfg, drawn_from(policy, cfg, examples))
    assert [len(g.completions) for g in groups] == [1, 2, 1]
    assert all(c.ids[-1] == policy.tokenizer.eos_token_id for g in groups for c in g.completions)
    grads, _ = step_gradient(policy, cfg, groups)
    for name, grad in gradients(policy, -plain_logps(policy, groups, 1.0).mean()).items():
        torch.testing.assert_close(grads[name], grad, atol=2e-6, rtol=1e-4)


def test_repeats_are_scored_once_and_count_as_often(policy, config, prompts, no_clipping, monkeypatch):
    """The same step, in the log and in the weights, whether equal completions are merged or not."""
    ids = [[5, 6, 7], [5, 6], [5, 6, 7], [5, 6, 7], [5, 6]]
    said = [completion(x) for x in ids] + [completion([9], sampled=[False]) for _ in range(2)]
    rewards = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]  # one of the equal ones has another reward

    def groups(n):
        return make_groups([None], prompts[1][:1], [said[:n]], rewards[:n])

    (kept,), first, copies = og.merge_repeats(groups(7))
    assert [c.ids for c in kept] == [[5, 6, 7], [5, 6], [5, 6, 7], [9], [9]]
    assert first == [0, 1, 3, 5, 6] and copies == [2, 2, 1, 1, 1]

    def do_not_merge(groups):
        n = sum(len(group.completions) for group in groups)
        return [group.completions for group in groups], list(range(n)), [1] * n

    records, weights = [], []
    for merge in (og.merge_repeats, do_not_merge):
        monkeypatch.setattr(og, "merge_repeats", merge)
        trained = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(trained.trainable().values(), lr=1e-2)
        records.append(og.update(trained, optimizer, config(updates_per_rollout=2), groups(5)))
        weights.append(torch.cat([p.detach().flatten() for p in trained.trainable().values()]))
    assert records[0].keys() == records[1].keys()
    for key in records[0]:
        assert records[0][key] == pytest.approx(records[1][key], abs=1e-5), key
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_finished_rows_leave_the_batch(policy, prompts):
    """Rows that stop early change nothing for the others: the same tokens as one prompt at a time."""
    _, tokens = prompts
    policy.stop_ids = list(range(0, len(policy.head.weight), 8))  # one token in eight stops
    together = decode(policy, tokens, 4, 9.0, 40, [1, 2, 3])
    alone = [decode(policy, [t], 4, 9.0, 40, [i + 1])[0] for i, t in enumerate(tokens)]
    lengths = sorted(len(c.ids) for g in together for c in g)
    assert lengths[len(lengths) // 2] < lengths[-1]  # more than half of them had left
    for a, b in zip(sum(together, []), sum(alone, []), strict=True):
        assert a.ids == b.ids
        assert a.logps == pytest.approx(b.logps, abs=1e-4) and len(a.logps) == len(a.ids)


# ---- a prompt is read once a step


def sampled_groups(policy, tiny, cfg, n=3):
    """Groups of a real rollout; rewards by what was said, so that equal completions have equal ones."""
    examples = data.Examples(tiny.questions)[:n]
    groups = og.sample_groups(policy, cfg, drawn_from(policy, cfg, examples), {"accuracy": 1.0})
    reward_groups(groups, [[float(c.ids == g.completions[0].ids) for c in g.completions] for g in groups])
    assert all(g.has_spread for g in groups)
    return groups


def forget_reading(groups):
    for group in groups:
        group.prompt.read = None
    return groups


def tokens_through(policy, work):
    """-> (what work() returns, tokens that went through the language model with gradients and without)"""
    counts = {True: 0, False: 0}

    def count(module, args, kwargs):
        counts[torch.is_grad_enabled()] += kwargs["inputs_embeds"].shape[1]

    hook = policy.lm.register_forward_pre_hook(count, with_kwargs=True)
    result = work()
    hook.remove()
    return result, counts[True], counts[False]


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_learning_through_the_rollout_s_pass_is_the_same_step(
    policy, tiny, config, no_clipping, beta, updates
):
    """Neither the gradient nor the log depends on whether prompts are read again, nor on how the step is
    cut."""
    results = []
    for reuse, pack_tokens in ((False, 10_000), (True, 10_000), (True, 150), (True, 1)):
        trained = copy.deepcopy(policy)
        cfg = config(beta=beta, pack_tokens=pack_tokens, updates_per_rollout=updates)
        groups = sampled_groups(trained, tiny, cfg)
        assert all(g.prompt.read for g in groups)
        if not reuse:
            forget_reading(groups)
        log = og.update(trained, torch.optim.SGD(trained.trainable().values(), lr=0.1), cfg, groups)
        assert all(g.prompt.read is None for g in groups)
        results.append((log, {n: p.detach() for n, p in trained.trainable().items()}))
    start = policy.trainable()
    assert all((p - start[n]).abs().max() > 1e-5 for n, p in results[0][1].items())
    for log, weights in results[1:]:
        for key, value in log.items():
            assert value == pytest.approx(results[0][0][key], abs=1e-5), key
        for name, p in weights.items():
            torch.testing.assert_close(p, results[0][1][name], atol=2e-6, rtol=1e-4)


def test_a_prompt_is_read_once_a_step(policy, tiny, config):
    """beta 0: the prompt's tokens go through the model once, in the rollout, and again only if that pass was
    not kept."""
    cfg = config(beta=0.0)
    for reuse in (True, False):
        groups, grad, _ = tokens_through(policy, lambda: sampled_groups(policy, tiny, cfg))
        prompt = sum(len(g.prompt.ids) for g in groups)
        assert grad == prompt
        if not reuse:
            forget_reading(groups)
        fed = sum(len(ids) - 1 for g in groups for ids in {tuple(c.ids) for c in g.completions})
        _, grad, no_grad = tokens_through(policy, lambda groups=groups: step_gradient(policy, cfg, groups))
        assert (grad, no_grad) == (fed + prompt * (not reuse), 0)


def test_few_scored_groups_are_read_again(policy, tiny, config, no_clipping):
    """Without a KL, a backward pass through prompts that need none must not cost more than it saves."""
    cfg = config(beta=0.0)
    sizes = [len(g.prompt.ids) for g in sampled_groups(policy, tiny, cfg)]
    small, *large = sorted(range(3), key=lambda i: sizes[i])
    for kept, through in (([0, 1, 2], True), (sorted(large), True), ([small], False)):
        groups = sampled_groups(policy, tiny, cfg)
        reward_groups([groups[i] for i in range(3) if i not in kept], [[1.0] * 3] * 3)
        (pack,) = og.make_batch(policy, cfg, groups)[0].packs
        assert len(pack.prompts) == len(kept) and bool(pack.prefix) == through
        assert not through or list(pack.places) == kept
    grads = []
    for reuse in (True, False):
        groups = sampled_groups(policy, tiny, cfg)
        reward_groups([groups[small]], [[1.0] * 3])
        gradient, log = step_gradient(policy, cfg, groups if reuse else forget_reading(groups))
        assert log["group/scored"] == pytest.approx(2 / 3)
        grads.append(gradient)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], atol=1e-6, rtol=1e-4)


def test_decoding_holds_a_prompt_once(policy, prompts):
    """Keys and values of G rows: S + G * T slots a prompt, not G * (S + T); prompts without a live row
    leave."""
    prefixes = model.read_prompts(policy, prompts[1], pack_tokens=1)
    assert [len(p.prompts) for p in prefixes] == [1, 1, 1]
    decoder = model.Decoder(policy, prefixes, 4, 6)
    longest = max(len(p.ids) for p in prompts[1])
    kv_heads = policy.lm.config.num_key_value_heads
    assert decoder.kv[0][0].shape[:3] == (3, kv_heads, longest + 4 * 6)
    decoder.keep([1, 2, 8])
    assert decoder.place.tolist() == [1, 2, 4] and len(decoder.mask) == len(decoder.kv[0][0]) == 2


def test_unusual_attention_is_refused():
    """A sliding window would be ignored without a word."""
    pattern = model.PromptAttention([])
    with pytest.raises(data.UserError, match="sliding window"):
        model.packed_attention(None, None, None, None, None, pattern=pattern, sliding_window=4096)


@pytest.mark.parametrize("dtype, most", [("float32", 2e-6), ("bfloat16", 0.05)])
def test_what_bfloat16_costs(config, prompts, dtype, most):
    """Decoding and scoring round differently: in float32 it is nothing, in bfloat16 a few hundredths of a nat.
    A sampler at another temperature is far from both."""
    policy = og.load_run_policy(config(dtype=dtype))
    assert policy.dtype == getattr(torch, dtype)
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    examples, tokens = prompts
    gaps = []
    for temperature in (1.0, 0.7):
        completions = decode(policy, tokens, 3, temperature, 12, seeds=[1, 2, 3])
        groups = make_groups(examples, tokens, completions)
        optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.0)
        gaps.append(og.update(policy, optimizer, config(beta=0.0), groups)["policy/sampler_gap"])
    assert gaps[0] < most and gaps[1] > 0.1


def test_auto_is_bfloat16_where_the_hardware_gains(monkeypatch):
    def chosen(name, width, cuda=False, all_trained=False, **hardware):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware)
        config = transformers.Qwen2Config(hidden_size=width)
        return str(model.choose_dtype(name, config, all_trained, cuda)).removeprefix("torch.")

    assert chosen("auto", 64, cuda=True) == "bfloat16"
    assert chosen("auto", 576, amx_bf16=True) == chosen("auto", 576, avx512_bf16=True) == "bfloat16"
    assert chosen("auto", 576, avx512_f=True) == chosen("auto", 64, amx_bf16=True) == "float32"
    assert chosen("float32", 576, cuda=True) == "float32" and chosen("bfloat16", 64) == "bfloat16"
    assert chosen("auto", 576, cuda=True, all_trained=True) == "float32"
    with pytest.raises(data.UserError, match="--lora_rank 0 trains in float32"):
        chosen("bfloat16", 64, all_trained=True)
