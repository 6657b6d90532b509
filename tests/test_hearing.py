"""Rows that hear something in the middle of a completion: exact whatever the others do, and heard by that row
alone."""

import copy
import dataclasses

import pytest
import torch

import model
import omni_grpo as og
from model import Completion, Tokens


def hearing(prompts, n=30):
    """The hook of decode: after every token of its own or every second one, by its prompt, a row hears n
    embeddings."""

    def part(prompt):
        return Tokens([7] * n, [(0, prompt.audio[0][1][:1].repeat(n, 1))])

    def insert(which, rows):
        every = [1 + len(prompts[i].ids) % 2 for i in which]
        return [
            part(prompts[i]) if len(r.sampled_ids) % n == 0 else None for i, r, n in zip(which, rows, every)
        ]

    return insert


def decode(policy, prompts, seeds, g=4, steps=12):
    prefixes = model.read_prompts(policy, prompts)
    return og.decode(policy, prefixes, g, 9.0, steps, seeds, hearing(prompts))


@pytest.fixture
def slots(monkeypatch):
    """A list that grows with every step: (how many parts are read, slots of the cache, how far each line is
    filled, did rows leave in this step)."""
    events, left = [], []
    reserve, keep = model.Decoder.reserve, model.Decoder.keep

    def watched_reserve(decoder, blocks):
        reserve(decoder, blocks)
        events.append((len(blocks), decoder.mask.shape[2], list(decoder.filled), bool(left)))
        left.clear()

    monkeypatch.setattr(model.Decoder, "reserve", watched_reserve)
    monkeypatch.setattr(model.Decoder, "keep", lambda decoder, rows: (left.append(rows), keep(decoder, rows)))
    return events


def test_rows_that_hear_do_not_depend_on_their_company(policy, prompts, slots):
    """The same tokens as one prompt at a time, while rows leave in the very step in which others hear a part,
    and while the cache has to grow."""
    _, tokens = prompts
    policy = dataclasses.replace(policy, stop_ids=list(range(0, len(policy.head.weight), 8)))
    together = decode(policy, tokens, [1, 2, 3])
    assert any(parts and left for parts, _, _, left in slots)
    assert slots[0][1] < slots[-1][1]  # it has grown
    alone = [decode(policy, [prompt], [i + 1])[0] for i, prompt in enumerate(tokens)]
    for a, b in zip(sum(together, []), sum(alone, []), strict=True):
        assert (a.ids, a.sampled, a.finished) == (b.ids, b.sampled, b.finished)
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


def test_a_part_takes_room_in_its_own_line_only(policy, prompts, slots):
    """Prompts whose rows hear in different steps share no room."""
    _, tokens = prompts
    done = decode(dataclasses.replace(policy, stop_ids=[]), tokens, [1, 2, 3], g=2)
    longest = max(len(p.ids) for p in tokens)
    fed = [sum(len(c.ids) - 1 for c in of_prompt) for of_prompt in done]
    assert slots[-1][2] == [longest + n for n in fed]


def test_other_sounds_in_a_part_are_heard_from_there_on(policy, prompts):
    """They change the log-probabilities of what follows in this completion, and not a bit of anything
    else."""
    _, tokens = prompts
    g = torch.Generator().manual_seed(0)
    heard = tokens[0].audio[0][1][:2]
    row = Completion(torch.randint(20, 300, (9,), generator=g).tolist(), [(3, heard)])
    row.sampled = [True] * 2 + [False] * 3 + [True] * 4
    others = [[row, Completion([30, 31], sampled=[True] * 2)], [Completion([40, 41, 42], sampled=[True] * 3)]]
    flipped = copy.copy(row)
    flipped.audio = [(3, heard.flip(0) + 1)]

    def logps(first):
        pack = model.make_pack(tokens[:2], [[first, others[0][1]], others[1]], [0, 2])
        return model.token_logps(policy, pack, 1.0)[0], pack

    before, pack = logps(row)
    changed = logps(flipped)[0] != before
    assert torch.equal(changed, (pack.row == 0) & (torch.arange(len(changed)) >= 2))
