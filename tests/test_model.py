"""Exactness: packed scoring, rollout and update against the plain computation, on the tiny Qwen2.5-Omni in float32."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import data
import omni_grpo as og


def completion(ids, sampled=None, audio=()):
    return og.Completion(list(ids), list(audio), sampled or [True] * len(ids))


def ragged_groups(policy, prompts, seed=0):
    """Three groups, completions of 1 to 7 tokens; one has forced tokens with audio in its middle, one the placeholder's id."""
    examples, tokens = prompts
    g = torch.Generator().manual_seed(seed)
    groups = []
    for e, prompt, lengths in zip(examples, tokens, [(3, 1, 7), (2, 5, 4), (6, 2, 1)]):
        done = [completion(torch.randint(20, 300, (n,), generator=g).tolist()) for n in lengths]
        groups.append(og.Group(e, prompt, done, None, [0.0, 1.0, 0.5]))
    heard = tokens[1].audio[0][1][:2]
    inserted = groups[0].completions[2]
    inserted.sampled[2:5] = [False] * 3
    inserted.audio.append((3, heard))
    groups[1].completions[1].ids[1] = policy.audio_id
    return groups


def plain_logps(policy, prompt, completion, temperature):
    """One row through the library's own model and attention.       -> (trained tokens of this completion,)"""
    model, attention = policy.model.get_base_model(), policy.lm.config._attn_implementation
    policy.lm.eval()  # no checkpointing: its recomputation would come after the attention is switched back
    policy.lm.set_attn_implementation("eager")
    x = torch.nn.Embedding.from_pretrained(policy.embed_tokens.weight)(
        torch.tensor(prompt.ids + completion.ids)
    )
    for offset, part in ((0, prompt), (len(prompt.ids), completion)):
        for start, audio in part.audio:
            x[offset + start : offset + start + len(audio)] = audio
    logits = model(inputs_embeds=x[None]).logits[0].float()
    policy.lm.set_attn_implementation(attention)
    at = len(prompt.ids)
    logps = F.log_softmax(logits[at - 1 : -1] / temperature, dim=-1)
    logps = logps.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
    return logps[torch.tensor(completion.sampled)]


def gradients(policy, loss):
    parameters = policy.trainable()
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_one_by_one(policy, prompts, temperature):
    """Log-probabilities and their gradients, three prompts in a pack, ragged, with forced tokens: <= 1e-5."""
    groups = ragged_groups(policy, prompts)
    pack = og.make_pack(groups, [0, 3, 6])
    logps, _ = og.token_logps(policy, pack, temperature)
    weight = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    ours = gradients(policy, (weight * logps).sum())
    plain = torch.cat([plain_logps(policy, g.prompt, c, temperature) for g in groups for c in g.completions])
    assert (logps - plain).abs().max() <= 1e-5
    theirs = gradients(policy, (weight * plain).sum())
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5 * max(1.0, theirs[name].abs().max()), name


def test_scoring_leaves_its_inputs_alone(policy, prompts):
    """Embeddings are filled in, in a copy: neither the table, nor the prompts, nor a second call sees it."""
    groups = ragged_groups(policy, prompts)
    table, audio = policy.embed_tokens.weight.clone(), [a.clone() for g in groups for _, a in g.prompt.audio]
    pack = og.make_pack(groups, [0, 3, 6])
    first, _ = og.token_logps(policy, pack, 1.0)
    assert torch.equal(og.token_logps(policy, pack, 1.0)[0], first)
    assert torch.equal(policy.embed_tokens.weight, table)
    assert all(torch.equal(a, b) for a, (_, b) in zip(audio, (x for g in groups for x in g.prompt.audio)))


def test_pack_rows_and_targets(policy, prompts):
    groups = ragged_groups(policy, prompts)
    pack = og.make_pack(groups, [0, 3, 6])
    completions = [c for g in groups for c in g.completions]
    assert pack.row.bincount().tolist() == [sum(c.sampled) for c in completions]
    assert pack.target.tolist() == [i for c in completions for i, s in zip(c.ids, c.sampled) if s]
    assert (
        len(pack.positions) == sum(len(p.ids) for p in pack.parts) == sum(len(c.ids) - 1 for c in completions)
    )


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_sampled_equals_scored(policy, prompts, temperature):
    """The sampler's log-probabilities are the scorer's, for prompts of different lengths decoded together, each token by
    all that came before it (the tiny base ends its turn after two tokens: here it may not)."""
    examples, tokens = prompts
    policy.stop_ids.clear()
    done = og.rollout(policy, tokens, 4, temperature, 9, [1, 2, 3])
    assert all(len(c.ids) == 9 for group in done for c in group)
    groups = [og.Group(e, p, c) for e, p, c in zip(examples, tokens, done)]
    logps, _ = og.token_logps(policy, og.make_pack(groups, [0, 4, 8]), temperature)
    sampled = torch.tensor([x for group in done for c in group for x in c.logps])
    assert (logps - sampled).abs().max() <= 1e-5


def test_rollout_does_not_depend_on_its_company(policy, prompts):
    tokens = prompts[1]
    together = og.rollout(policy, tokens, 3, 1.0, 6, [1, 2, 3])
    alone = [og.rollout(policy, [p], 3, 1.0, 6, [s])[0] for p, s in zip(tokens, [1, 2, 3])]
    assert [[c.ids for c in g] for g in together] == [[c.ids for c in g] for g in alone]
    assert len({tuple(c.ids) for g in together for c in g}) > 5  # and they are really drawn


def test_every_sampled_token_has_its_own_draw(policy, prompts):
    """All logits equal: 3 x 8 x 6 tokens are then independent and uniform over the vocabulary; repeats are rare."""
    with torch.no_grad():
        policy.embed_tokens.weight.data = policy.embed_tokens.weight.data.clone()
        policy.head.weight.data = torch.zeros_like(policy.head.weight)
    policy.stop_ids.clear()
    done = og.rollout(policy, prompts[1], 8, 1.0, 6, [1, 2, 3])
    ids = [i for g in done for c in g for i in c.ids]
    assert len(ids) == 144 and len(set(ids)) > 100
    assert abs(sum(ids) / 144 / len(policy.head.weight) - 0.5) < 0.1


@pytest.mark.parametrize("n_clips", [1, 2, 3])
def test_greedy_rollout_is_the_library_s(policy, tiny, config, n_clips):
    """Same tokens as generate() on input features, audio path of the library included; several clips keep their order."""
    policy.stop_ids.clear()
    policy.model.get_base_model().generation_config.eos_token_id = None
    examples = list(data.Examples(tiny.questions))
    for i in range(3):
        example = dataclasses.replace(examples[i], audio=[e.audio for e in examples[i : i + n_clips]])
        clips, _ = og.hear(policy, example, config())
        prompt, mels = og.encode(policy, [example], [clips], config())[0], [clip.mel for clip in clips]
        assert len(prompt.audio) == len(mels) == n_clips
        ours = og.rollout(policy, [prompt], 1, 0.0, 8, [0])[0][0].ids
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
    """A row that inserts goes on with what it was given while the others sample; its later tokens have heard it."""
    tokens = prompts[1]
    policy.stop_ids.clear()
    heard = tokens[2].audio[0][1][:3]
    given = og.Tokens([7, policy.audio_id, policy.audio_id, policy.audio_id, 8], [(1, heard)])

    def insert(which, rows):
        assert len(which) == len(rows)
        return [given if i == 1 and len(row.ids) == 2 else None for i, row in zip(which, rows)]

    done = og.rollout(policy, tokens, 2, 1.0, 6, [1, 2, 3], insert)
    plain = og.rollout(policy, tokens, 2, 1.0, 6, [1, 2, 3])
    assert [c.ids for c in done[0] + done[2]] == [c.ids for c in plain[0] + plain[2]]
    for c in done[1]:
        assert c.ids[2:7] == given.ids and c.sampled == [True] * 2 + [False] * 5 + [True] * 4
        assert [(start, len(audio)) for start, audio in c.audio] == [(3, 3)] and len(c.logps) == len(c.ids)
    groups = [og.Group(None, p, c) for p, c in zip(tokens, done)]
    logps, _ = og.token_logps(policy, og.make_pack(groups, [0, 2, 4]), 1.0)
    sampled = torch.tensor([x for g in done for c in g for x, s in zip(c.logps, c.sampled) if s])
    assert (logps - sampled).abs().max() <= 1e-5


def test_audio_stays_with_its_prompt(policy, prompts):
    """Other audio under prompt A changes A's log-probabilities and leaves B's bit-identical."""
    groups = ragged_groups(policy, prompts)
    before, _ = og.token_logps(policy, og.make_pack(groups, [0, 3, 6]), 1.0)
    start, audio = groups[0].prompt.audio[0]
    groups[0].prompt = og.Tokens(groups[0].prompt.ids, [(start, audio.flip(0))])
    pack = og.make_pack(groups, [0, 3, 6])
    after, _ = og.token_logps(policy, pack, 1.0)
    assert (after - before).abs()[pack.row < 3].min() > 0
    assert torch.equal(after[pack.row >= 3], before[pack.row >= 3])


def test_batched_audio_is_each_clip_s_own(policy, tiny, config):
    """The tower over a batch gives each clip what it gives it alone, in order."""
    mels = [og.hear(policy, e, config())[0][0].mel for e in list(data.Examples(tiny.questions))[:5]]
    for mel, batched in zip(mels, policy.encode_audio(mels)):
        torch.testing.assert_close(policy.encode_audio([mel])[0], batched, atol=1e-5, rtol=0)


def test_no_padding_to_300_seconds(policy, tiny, config):
    """Features of the short path equal those of the library's default, which pads every clip to the maximum."""
    example = data.Examples(tiny.questions)[0]
    wave, _ = data.load_audio(example.audio)
    out = policy.extractor(
        wave, sampling_rate=16_000, return_tensors="pt", padding="max_length", return_attention_mask=True
    )
    assert out["input_features"].shape[2] == 30_000
    valid = int(out["attention_mask"].sum())
    ours = og.hear(policy, example, config())[0][0].mel
    torch.testing.assert_close(ours, out["input_features"][0, :, :valid], atol=1e-6, rtol=0)


def test_end_of_turn_is_trained(policy, prompts):
    """Finished completions keep the token that ended them, it is a target, and nothing follows it."""
    examples, tokens = prompts
    policy.stop_ids[:] = list(range(0, 392, 3))  # a third of the vocabulary ends a completion
    done = og.rollout(policy, tokens, 8, 1.0, 6, [1, 2, 3])
    finished = [c for g in done for c in g if c.finished]
    assert finished and len(finished) < 24
    for c in finished:
        assert (
            c.ids[-1] in policy.stop_ids
            and c.sampled[-1]
            and not any(i in policy.stop_ids for i in c.ids[:-1])
        )
    pack = og.make_pack([og.Group(e, p, c) for e, p, c in zip(examples, tokens, done)], [0, 8, 16])
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
    logps, _ = og.token_logps(policy, og.make_pack(ragged_groups(policy, prompts), [0, 3, 6]), 1.0)
    logps.sum().backward()
    for name, p in policy.trainable().items():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_checkpointing_changes_nothing(policy, prompts):
    pack = og.make_pack(ragged_groups(policy, prompts), [0, 3, 6])
    results = []
    for switch in (None, policy.lm.gradient_checkpointing_disable):
        if switch:
            switch()
        assert policy.lm.is_gradient_checkpointing == (not switch)
        results.append(gradients(policy, og.token_logps(policy, pack, 1.0)[0].sum()))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-6, rtol=1e-5)


def test_fresh_adapter_has_no_kl(config, tiny):
    cfg = config()
    policy = og.load_policy(cfg)
    example = data.Examples(tiny.questions)[0]
    prompt = og.encode(policy, [example], [og.hear(policy, example, cfg)[0]], cfg)[0]
    pack = og.make_pack([og.Group(example, prompt, og.rollout(policy, [prompt], 3, 1.0, 6, [1])[0])], [0])
    logps, _ = og.token_logps(policy, pack, 1.0)
    with og.reference(policy) as frozen:
        ref, _ = og.token_logps(frozen, pack, 1.0)
    assert og.kl_k3(logps, ref).abs().max() == 0


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_frozen_reference_stays(policy, prompts, config, lora_rank):
    """Training from an adapter (or all weights): the reference is a copy of the start and does not move."""
    if not lora_rank:
        policy = og.load_policy(config(lora_rank=0))
        prompts = (
            prompts[0],
            og.encode(policy, prompts[0], [og.hear(policy, e, config())[0] for e in prompts[0]], config()),
        )
    pack = og.make_pack(ragged_groups(policy, prompts), [0, 3, 6])
    with torch.no_grad():
        start, _ = og.token_logps(policy, pack, 1.0)
        og.freeze_reference(policy)
        for p in policy.trainable().values():
            p.add_(0.05 * torch.randn_like(p))
        with og.reference(policy) as frozen:
            ref, _ = og.token_logps(frozen, pack, 1.0)
        now, _ = og.token_logps(policy, pack, 1.0)
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


def step_gradient(policy, cfg, groups):
    optimizer = Capture(policy)
    log = og.update(policy, optimizer, dataclasses.replace(cfg, max_grad_norm=0.0), groups, cold=False)
    return (optimizer.steps[0] if optimizer.steps else None), log


@pytest.mark.parametrize("reduce", ["sequence", "token", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_gradient_does_not_depend_on_packs(policy, prompts, config, reduce, importance):
    groups = ragged_groups(policy, prompts)
    results = [
        step_gradient(policy, config(reduce=reduce, importance=importance, pack_tokens=n), groups)
        for n in (1, 150, 10_000)
    ]
    assert (
        len(og.pack_groups(groups, [0, 1, 2], 1, "cpu")) == 3
        and len(og.pack_groups(groups, [0, 1, 2], 10_000, "cpu")) == 1
    )
    for grads, log in results[1:]:
        assert log["policy/kl_ref"] == pytest.approx(results[0][1]["policy/kl_ref"], rel=1e-4)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][0][name], atol=1e-6, rtol=1e-4)


def test_update_gradient_by_hand(policy, prompts, config):
    """beta 0: the gradient is that of - sum over rows of A_row * mean over its tokens of logp / R."""
    groups = ragged_groups(policy, prompts)
    grads, _ = step_gradient(policy, config(beta=0.0), groups)
    adv = og.group_advantages(torch.tensor([g.rewards for g in groups]))
    loss = 0.0
    for g, group_adv in zip(groups, adv):
        for c, a in zip(g.completions, group_adv):
            loss = loss - a * plain_logps(policy, g.prompt, c, 1.0).mean() / 9
    for name, grad in gradients(policy, loss).items():
        torch.testing.assert_close(grads[name], grad, atol=2e-6, rtol=1e-4)


def test_kl_pulls_back(policy, prompts, config):
    """Uniform rewards and beta > 0: only the KL is left, and a step along its gradient lowers it."""
    groups = ragged_groups(policy, prompts)
    for g in groups:
        g.rewards = [1.0, 1.0, 1.0]
    grads, log = step_gradient(policy, config(beta=1.0), groups)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p -= 0.02 * grads[name]
    assert 0 < step_gradient(policy, config(beta=1.0), groups)[1]["policy/kl_ref"] < log["policy/kl_ref"]


def test_uniform_groups_are_not_scored_without_kl(policy, prompts, config):
    groups = ragged_groups(policy, prompts)
    for g in groups[:2]:
        g.rewards = [1.0, 1.0, 1.0]
    scored = []
    original = og.token_logps
    try:
        og.token_logps = lambda policy, pack, t, *more: (
            scored.append(len(pack.prompts)),
            original(policy, pack, t, *more),
        )[1]
        assert step_gradient(policy, config(beta=0.0), groups)[1]["group/scored"] == pytest.approx(1 / 3)
        assert scored == [1]
        groups[2].rewards = [0.0, 0.0, 0.0]
        assert step_gradient(policy, config(beta=0.0), groups)[0] is None
        assert scored == [1]
    finally:
        og.token_logps = original


def test_second_update_on_a_rollout_is_off_policy(policy, prompts, config):
    """--updates_per_rollout 2: the ratio is 1 in the first update and not in the second."""
    cfg = config(updates_per_rollout=2, beta=0.0, lr=0.5)
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    log = og.update(policy, optimizer, cfg, ragged_groups(policy, prompts), cold=False)
    assert log["policy/kl_old"] > 1e-6
    again = og.update(
        policy,
        optimizer,
        dataclasses.replace(cfg, updates_per_rollout=1),
        ragged_groups(policy, prompts),
        False,
    )
    assert again["policy/kl_old"] == 0 and again["policy/clip_frac"] == 0


def test_non_finite_gradient_skips_the_update(policy, prompts, config):
    groups = ragged_groups(policy, prompts)
    start, audio = groups[0].prompt.audio[0]
    groups[0].prompt.audio = [(start, audio * float("nan"))]
    before = copy.deepcopy({n: p.detach() for n, p in policy.trainable().items()})
    grads, log = step_gradient(policy, config(), groups)
    assert grads is None and log["optim/skipped"] == 1
    assert all(torch.equal(p, before[n]) for n, p in policy.trainable().items())


def test_cold_start_is_the_same_update(policy, prompts, config):
    """Gradient = that of the mean negative log-likelihood of the targets' tokens."""
    examples, tokens = prompts
    examples = [
        dataclasses.replace(e, target=t) for e, t in zip(examples, ["bell", ["hum", "roar"], "siren"])
    ]
    groups = og.teacher_groups(
        policy, config(), [(i, e, og.hear(policy, e, config())[0], False) for i, e in enumerate(examples)]
    )
    assert [len(g.completions) for g in groups] == [1, 2, 1]
    assert all(c.ids[-1] == policy.tokenizer.eos_token_id for g in groups for c in g.completions)
    optimizer = Capture(policy)
    og.update(policy, optimizer, config(reduce="token", max_grad_norm=0.0), groups, cold=True)
    logps = torch.cat([plain_logps(policy, g.prompt, c, 1.0) for g in groups for c in g.completions])
    for name, grad in gradients(policy, -logps.mean()).items():
        torch.testing.assert_close(optimizer.steps[0][name], grad, atol=2e-6, rtol=1e-4)


def test_repeats_are_scored_once_and_count_as_often(policy, config, prompts):
    """The same step, in the log and in the weights, whether equal completions are merged or not."""
    _, tokens = prompts
    said = [
        completion([5, 6, 7]),
        completion([5, 6]),
        completion([5, 6, 7]),
        completion([5, 6, 7]),
        completion([5, 6]),
        completion([9], sampled=[False]),
        completion([9], sampled=[False]),
    ]
    groups = [og.Group(None, tokens[0], said, None, [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])]
    adv, weight = (
        og.group_advantages(torch.tensor([groups[0].rewards]), "std").flatten(),
        torch.full((7,), 0.1),
    )
    (merged,), new_adv, new_weight, times = og.merge_repeats(groups, adv, weight)
    assert [c.ids for c in merged.completions] == [
        [5, 6, 7],
        [5, 6],
        [5, 6, 7],
        [9],
        [9],
    ]  # one of them with another reward
    assert times.tolist() == [2, 2, 1, 1, 1] and torch.equal(new_adv, adv[[0, 1, 3, 5, 6]])
    torch.testing.assert_close(new_weight, torch.tensor([0.2, 0.2, 0.1, 0.1, 0.1]))
    records, weights = [], []
    for merge in (True, False):
        model = copy.deepcopy(policy)
        optimizer = torch.optim.SGD(model.trainable().values(), lr=1e-2)
        with pytest.MonkeyPatch.context() as patch:
            if not merge:
                patch.setattr(
                    og,
                    "merge_repeats",
                    lambda groups, adv, weight: (groups, adv, weight, torch.ones_like(weight)),
                )
            records.append(
                og.update(
                    model,
                    optimizer,
                    config(beta=0.04, updates_per_rollout=2, max_grad_norm=0.0),
                    [og.Group(None, tokens[0], said[:5], None, [1.0, 0.0, 1.0, 0.0, 0.0])],
                    cold=False,
                )
            )
        weights.append(torch.cat([p.detach().flatten() for p in model.trainable().values()]))
    assert records[0].keys() == records[1].keys()
    for key in records[0]:
        assert records[0][key] == pytest.approx(records[1][key], abs=1e-5), key
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)


def test_finished_rows_leave_the_batch(policy, prompts):
    """Rows that stop early change nothing for the others: the same tokens as one prompt at a time."""
    _, tokens = prompts
    policy = dataclasses.replace(
        policy, stop_ids=list(range(0, len(policy.head.weight), 8))
    )  # one token in eight stops
    together = og.rollout(policy, tokens, 4, 9.0, 40, [1, 2, 3])
    alone = [og.rollout(policy, [t], 4, 9.0, 40, [i + 1])[0] for i, t in enumerate(tokens)]
    lengths = sorted(len(c.ids) for g in together for c in g)
    assert lengths[len(lengths) // 2] < lengths[-1]  # more than half of them had left
    assert [[c.ids for c in g] for g in together] == [[c.ids for c in g] for g in alone]
    for a, b in zip((c for g in together for c in g), (c for g in alone for c in g)):
        assert a.logps == pytest.approx(b.logps, abs=1e-4) and len(a.logps) == len(a.ids)


# ---- a prompt is read once a step


def sampled(policy, tiny, cfg, n=3):
    """Groups of a real rollout, with rewards of their own making.       -> [Group]"""
    examples = list(data.Examples(tiny.questions))[:n]
    groups = og.sampled_groups(
        policy,
        cfg,
        [(i, e, og.hear(policy, e, cfg)[0], False) for i, e in enumerate(examples)],
        {"accuracy": 1.0},
    )
    for g in groups:  # by what was said, so that equal completions have equal rewards
        g.rewards = [float(c.ids == g.completions[0].ids) for c in g.completions]
    assert all(len({tuple(c.ids) for c in g.completions}) > 1 for g in groups)
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
def test_learning_through_the_rollout_s_pass_is_the_same_step(policy, tiny, config, beta, updates):
    """--reuse_prefix changes neither the gradient nor the log, however the step is cut into packs."""
    results = []
    for reuse, pack_tokens in ((False, 10_000), (True, 10_000), (True, 150), (True, 1)):
        model = copy.deepcopy(policy)
        cfg = config(
            reuse_prefix=reuse,
            beta=beta,
            pack_tokens=pack_tokens,
            updates_per_rollout=updates,
            max_grad_norm=0.0,
        )
        groups = sampled(model, tiny, cfg)
        assert all(bool(g.read) == reuse for g in groups)
        log = og.update(model, torch.optim.SGD(model.trainable().values(), lr=0.1), cfg, groups, cold=False)
        assert all(g.read is None for g in groups)
        results.append((log, {n: p.detach() for n, p in model.trainable().items()}))
    start = policy.trainable()
    assert all((p - start[n]).abs().max() > 1e-5 for n, p in results[0][1].items())
    for log, weights in results[1:]:
        for key, value in log.items():
            assert value == pytest.approx(results[0][0][key], abs=1e-5), key
        for name, p in weights.items():
            torch.testing.assert_close(p, results[0][1][name], atol=2e-6, rtol=1e-4)


def test_a_prompt_is_read_once_a_step(policy, tiny, config):
    """beta 0: the prompt's tokens go through the model once, in the rollout, and again only without --reuse_prefix."""
    for reuse in (True, False):
        cfg = config(reuse_prefix=reuse, beta=0.0)
        groups, grad, plain = tokens_through(policy, lambda cfg=cfg: sampled(policy, tiny, cfg))
        prompt = sum(len(g.prompt.ids) for g in groups)
        assert grad == prompt * reuse
        fed = sum(len(ids) - 1 for g in groups for ids in {tuple(c.ids) for c in g.completions})
        _, grad, plain = tokens_through(
            policy, lambda cfg=cfg, groups=groups: step_gradient(policy, cfg, groups)
        )
        assert (grad, plain) == (fed + prompt * (not reuse), 0)


def test_few_scored_groups_are_read_again(policy, tiny, config):
    """Without a KL, a backward pass through prompts that need none must not cost more than it saves."""
    cfg = config(beta=0.0)
    small, *large = sorted(range(3), key=lambda i: len(sampled(policy, tiny, cfg)[i].prompt.ids))
    for kept, through in (([0, 1, 2], True), (sorted(large), True), ([small], False)):
        packs = og.pack_groups(sampled(policy, tiny, cfg), kept, 10_000, "cpu")
        assert len(packs) == 1 and len(packs[0].prompts) == len(kept) and bool(packs[0].prefix) == through
        assert not through or list(packs[0].places) == kept
    reference = None
    for reuse in (True, False):
        groups = sampled(policy, tiny, config(beta=0.0, reuse_prefix=reuse))
        groups[small].rewards = [1.0] * len(groups[small].rewards)
        grads, log = step_gradient(policy, cfg, groups)
        assert log["group/scored"] == pytest.approx(2 / 3)
        reference = reference or grads
        for name in grads:
            torch.testing.assert_close(grads[name], reference[name], atol=1e-6, rtol=1e-4)


def test_decoding_holds_a_prompt_once(policy, prompts):
    """Keys and values of G rows: S + G * T slots a prompt, not G * (S + T); prompts without a live row leave."""
    prefixes = og.read_in_parts(policy, prompts[1], part_tokens=1)
    assert [len(p.prompts) for p in prefixes] == [1, 1, 1]
    cache = og.Decoding(prefixes, 4, 4 * 6)
    longest = max(len(p.ids) for p in prompts[1])
    assert cache.kv[0][0].shape[:3] == (3, policy.lm.config.num_key_value_heads, longest + 4 * 6)
    cache.keep(torch.tensor([1, 2, 8]))
    assert cache.place.tolist() == [1, 2, 4] and len(cache.mask) == len(cache.kv[0][0]) == 2


def test_unusual_attention_is_refused(policy, prompts):
    """A sliding window would be ignored without a word."""
    with pytest.raises(data.UserError, match="sliding window"):
        og.packed_attention(None, None, None, None, None, pattern=og.Reading([]), sliding_window=4096)
