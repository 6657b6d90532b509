"""Evaluation: the benchmarks' rules on hand values, every statistic against its closed form, and that a model with ears, one
without and one that likes the first choice get the scores they deserve. The tests of answers use a function as the model; those
of batches, prefills and kills the tiny base."""

import base64
import collections
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import data
import eval as ev
import omni_grpo as og
from data import Example, Examples, UserError
from eval import Result

ROOT = os.path.dirname(os.path.abspath(ev.__file__))
MINI = os.path.join(ROOT, "..", "shared", "data", "mmau-test-mini.json")
NAMES = ["dog", "cat", "rain", "bell"]  # in the clip of NAMES[i] every sample is (i + 1) / 10


def asks(i: int, **changes) -> dict:
    """Question i: its clip and its answer are NAMES[i % 4], which stands at place i % 4."""
    return (
        dict(
            id=f"q{i}",
            audio=f"{NAMES[i % 4]}.wav",
            question=f"What is number {i}?",
            choices=NAMES,
            answer=i % 4,
        )
        | changes
    )


def hears(example, waves, n):
    return NAMES[round(float(waves[0][0]) * 10) - 1] if waves and waves[0].any() else "Silence."


def knows(example, waves, n):
    return example.choices[example.answer]


def first(example, waves, n):
    return example.choices[0]


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f] if path.endswith(".jsonl") else json.load(f)


def save(path, content) -> str:
    """bytes, rows as lines (.jsonl), or one JSON value"""
    if not isinstance(content, bytes):
        content = (
            "".join(json.dumps(r) + "\n" for r in content)
            if str(path).endswith(".jsonl")
            else json.dumps(content)
        )
        content = content.encode()
    path.write_bytes(content)
    return str(path)


def held(out) -> dict:
    """What report.html in a folder of results holds: items, and sounds by the name of their clip."""
    with open(os.path.join(out, "report.html"), encoding="utf-8") as f:
        return json.loads(re.search(r'application/json">(.*?)</script>', f.read(), re.DOTALL)[1])


@pytest.fixture
def clips(tmp_path):
    for i, name in enumerate(NAMES, 1):
        soundfile.write(tmp_path / f"{name}.wav", np.full(800, i / 10), data.RATE_HZ)
    return tmp_path


@pytest.fixture
def lab(clips, monkeypatch, capsys):
    """lab(rows, say, *words) runs the program on questions with a model that answers say(example as shown, clips, n-th sample).

    -> out (folder), report, predictions, rated (examples.jsonl), shown (examples the model saw), decoding (samples,
    temperature, longest), stdout, stderr. rows None: as before.
    """
    policy = SimpleNamespace()

    def hear(policy, example, cfg):
        waves = [data.load_audio(c, cfg.max_audio_s)[0] for c in example.clips if cfg.audio != "none"]
        return [wave * (cfg.audio != "silence") for wave in waves], False

    def rollout(policy, prompts, n, temperature, max_new_tokens, seeds, insert=None):
        assert len(seeds) == len(prompts)
        policy.shown += [example for example, _ in prompts]
        policy.decoding = n, temperature, max_new_tokens
        return [[policy.say(example, waves, k) for k in range(n)] for example, waves in prompts]

    for name, fake in dict(
        load_policy=lambda cfg, train=True: policy,
        hear=hear,
        embeddings=lambda policy, mels: mels,
        prompt_tokens=lambda policy, example, waves, cfg: (example, waves),
        rollout=rollout,
        text_of=lambda policy, text: text,
    ).items():
        monkeypatch.setattr(og, name, fake)
    (clips / "model").mkdir()
    save(clips / "model" / "config.json", {})

    def lab(rows, say, *words, out="out", name="q.jsonl", code=0):
        if rows is not None:
            save(clips / name, rows)
        policy.say, policy.shown, policy.decoding, out = say, [], None, str(clips / out)
        words = list(map(str, words))
        try:
            got = ev.main(
                ["--data", str(clips / name), "--model", str(clips / "model"), "--out", out, *words]
            )
        except SystemExit as e:  # argparse
            got = e.code
        stdout, stderr = capsys.readouterr()
        assert got == code, stderr
        assert "Traceback" not in stderr

        def content(name):
            return read(os.path.join(out, name)) if os.path.isfile(os.path.join(out, name)) else None

        return SimpleNamespace(
            out=out,
            report=content("report.json"),
            predictions=content("predictions.json"),
            rated=content("examples.jsonl"),
            shown=policy.shown,
            decoding=policy.decoding,
            stdout=stdout,
            stderr=stderr,
        )

    return lab


def item(*choices, answer=0, **meta):
    return Example("1", None, "?", list(choices), answer, meta=meta)


# ---- the benchmarks' rules


@pytest.mark.parametrize(
    "text, right",
    [
        ("a dog barking", True),
        ("Barking: DOG, a", True),
        ("a a dog dog barking loudly", True),
        ("dog barking", False),
        ("a dog barking, no cat", False),
        ("", False),
        ("...", False),
        ("A. a dog barking", True),
        ("(B) a dog barking", True),
        ("The answer is a dog barking", True),
        ("a_dog barking", False),
    ],
)
def test_word_rule(text, right):
    """All words of the answer, and none that only another choice has; order, counts, case and punctuation do not matter."""
    assert ev.word_rule(text, item("a cat", "a dog barking", "Dog, barking a!", answer=1)) is right


def test_word_rule_knows_no_letters():
    """A letter is a word: where another choice holds it, "A. text" is wrong; and a wrong choice inside the answer is right."""
    example = item("drum", "a flute", "C# minor", "C minor")
    assert not ev.word_rule("A. drum", example) and ev.word_rule("B. drum", example)
    assert (
        ev.word_rule("C minor", item("C# minor", "C minor"))
        and ev.word_rule("red blue", item("red", "red blue")) is False
    )
    assert ev.word_rule("blue red", item("red blue", "red"))


@pytest.mark.parametrize(
    "text, right",
    [
        ("A", True),
        ("A.", True),
        (" A. dog", True),
        ("A dog is barking", True),
        ("Answer: B", True),
        ("B", False),
        ("(A)", True),
        ("Because it is a dog", False),
        ("Dog barking", False),
        ("\nA\n", True),
        ("b", None),
        ("", None),
        ("a", None),
        ("<answer>B</answer>", None),
        ("the answer is\nA\n.", True),
        ("E", None),
        ("C", False),
        ("D", False),
    ],
)
def test_letter_rule(text, right):
    """First character, else the last but one, if it is A to D; anything else is left out of the count, wrong or not."""
    assert ev.letter_rule(text, item("dog", "cat", "rain")) is right


def test_letter_rule_goes_by_the_text_of_the_choice():
    assert ev.letter_rule("C", item("dog", "cat", "dog")) is True


@pytest.fixture(scope="module")
def mini():
    if not os.path.exists(MINI):
        pytest.skip("the benchmark's file is not here")
    return read(MINI)


def letter_of(row):
    return chr(65 + row["choices"].index(row["answer"]))


FORMS = {  # what is said: (right by the official rule, resolved and right)
    "gold text": (lambda r: r["answer"], 1000, 1000),
    "quoted": (lambda r: f'"{r["answer"]}"', 1000, 1000),
    "The answer is X.": (lambda r: f"The answer is {r['answer']}.", 907, 1000),
    "A. text": (lambda r: f"{letter_of(r)}. {r['answer']}", 967, 1000),
    "(A) text": (lambda r: f"({letter_of(r)}) {r['answer']}", 967, 1000),
    "tags": (lambda r: f"<answer>{r['answer']}</answer>", 1000, 1000),
    "bare letter": (lambda r: letter_of(r), 2, 998),
    "first choice": (lambda r: r["choices"][0], 398, None),
    "all choices": (lambda r: " ".join(r["choices"]), 1, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_mmau_scores_are_those_of_its_own_script(form, mini, tmp_path, capsys):
    """v05.15.25 of the benchmark, as counted with the published rule; the resolver is right wherever the answer was given."""
    say, official, strict = FORMS[form]
    path = save(tmp_path / "predictions.json", [row | {"model_output": say(row)} for row in mini])
    report = ev.score_file(path, "")
    assert (report["n"], report["format"], report["version"]) == (1000, "MMAU", "v05.15.25")
    assert report["official_accuracy_raw"] == official / 1000
    assert strict is None or report["accuracy"] == strict / 1000
    assert report["baselines"] == {
        k: pytest.approx(v, abs=5e-4)
        for k, v in dict(random=0.261, first_choice=0.398, longest_choice=0.396).items()
    }
    assert report["missing"] == 0 and sum(g["n"] for g in report["by_task"].values()) == 1000
    assert "MMAU v05.15.25, 1000 items" in capsys.readouterr().out


def test_mmau_choices_that_read_the_same_are_one(mini):
    """In 27 rows choices occur twice, in 16 of them the answer; the letter of either is right. A bare letter fails only where
    it is itself another choice."""
    examples = list(Examples(MINI))
    twice = [e for e in examples if len(set(e.choices)) < len(e.choices)]
    other = [
        (e, i) for e in twice for i, c in enumerate(e.choices) if c == e.choices[e.answer] and i != e.answer
    ]
    assert len(twice) == 27 and len({e.id for e, _ in other}) == 16
    assert all(Result(e, "", [[chr(65 + i)]]).score == 1 for e, i in other)
    lost = [e for e in examples if Result(e, "", [[chr(65 + e.answer)]]).score < 1]
    letters = [e for e in examples if chr(65 + e.answer) in {c.strip().upper() for c in e.choices}]
    assert len(lost) == 2 and {e.id for e in lost} <= {e.id for e in letters}
    assert sum(any(ev.word_rule(c, e) for c in e.choices if c != e.choices[e.answer]) for e in examples) == 9


# ---- statistics


def test_wilson_closed_forms():
    z2 = 1.96**2
    assert ev.wilson(0, 0) == (0, 1)
    for n in (1, 10, 1000):
        assert ev.wilson(0, n) == pytest.approx((0, z2 / (n + z2))) and ev.wilson(1, n) == pytest.approx(
            (n / (n + z2), 1)
        )
        half = 1.96 / 2 / math.sqrt(n + z2)
        assert ev.wilson(0.5, n) == pytest.approx((0.5 - half, 0.5 + half))
    assert ev.wilson(0.7, 1000) == pytest.approx((0.6709, 0.7276), abs=1e-4)
    ends = [x for p in (0, 1) for n in range(1, 200) for x in ev.wilson(p, n)]
    assert (
        0 <= min(ends) and max(ends) <= 1 and "-" not in "".join(map(ev.percent, ends))
    )  # -2e-17 would read -0.0


def test_mcnemar_is_a_fair_coin():
    """The exact p, against every outcome of b + c throws."""
    assert (
        ev.mcnemar(0, 0) == ev.mcnemar(5, 5) == 1
        and ev.mcnemar(0, 5) == 2 / 32
        and ev.mcnemar(1, 9) == 22 / 1024
    )
    for b, c in itertools.product(range(5), repeat=2):
        heads = [sum(throws) for throws in itertools.product((0, 1), repeat=b + c)]
        p = sum(abs(2 * h - b - c) >= abs(b - c) for h in heads) / len(heads)
        assert ev.mcnemar(b, c) == ev.mcnemar(c, b) == pytest.approx(p)
    assert 0 < ev.mcnemar(400, 600) < 1e-9


def test_bootstrap_is_the_binomial():
    """Differences of 0 and 1, half of each: the mean of 100 drawn again is binomial(100, 1/2) / 100, and 40 to 60 hold 95 %."""
    assert ev.bootstrap([0, 1] * 50) == (0.4, 0.6)
    assert ev.bootstrap([-1, 1] * 50) == pytest.approx((-0.2, 0.2))
    assert ev.bootstrap([0, 0, 1], seed=1) == ev.bootstrap([1, 0, 0], seed=1)


def test_bootstrap_of_equal_differences_is_no_certainty():
    """Of n that agree, the share that may be anywhere from -1 to 1 is Wilson's for none of n."""
    for n in (1, 7, 1000):
        unseen = 1.96**2 / (n + 1.96**2)
        assert ev.bootstrap([0] * n) == pytest.approx((-unseen, unseen))
        assert ev.bootstrap([1] * n) == pytest.approx((1 - 2 * unseen, 1))
        assert ev.bootstrap([-0.5] * n) == pytest.approx((-0.5 - unseen / 2, -0.5 + 1.5 * unseen))


def test_interval_of_half_right_items():
    """Wilson's on the items, however often each was asked: it holds what the spread gives, and is none where all are alike."""

    def interval(*scores):  # of four samples each
        results = [
            Result(item("x", "y"), "", [["x"] * round(4 * s) + ["y"] * round(4 - 4 * s)]) for s in scores
        ]
        assert [r.score for r in results] == list(scores)
        return ev.report_of(
            results, SimpleNamespace(format="own", path="q.jsonl", version="", skipped={}), {}
        )["interval"]

    assert interval(0, 1, 1, 1) == ev.wilson(0.75, 4) and interval(*[0.5] * 10) == ev.wilson(0.5, 10)
    low, high = interval(*[0.25, 0.75] * 50)
    half = 1.96 * 0.25 / math.sqrt(100)
    assert 0.4 < low < 0.5 - half < 0.5 + half < high < 0.6


def test_baselines_need_no_ears():
    examples = [
        item("dog", "Dog.", "the cat"),
        item("dog", "cat", answer=1),
        item("a", "bb", "cc", "bb", answer=3),
    ]
    shares = dict(random=(2 / 3 + 1 / 2 + 1 / 2) / 3, first_choice=1 / 3, longest_choice=1 / 3)
    assert ev.baselines(examples, None) == pytest.approx(shares) == ev.baselines(examples, ev.letter_rule)
    inside = [item("red blue", "red")]  # the longest choice holds the words of the shorter
    assert ev.baselines([item("red", "red blue")], ev.word_rule)["random"] == 0.5
    assert ev.baselines(inside, ev.word_rule)["first_choice"] == 1


@pytest.mark.parametrize(
    "said, vote",
    [
        ([["cat", "dog", "dog"]], 1),
        ([["cat", "dog", "dog", "cat"]], 0),
        ([["?", "dog", "cat"]], 1),
        ([["?", "?"]], None),
        ([["?", "?", "?", "dog"]], 1),
        ([], None),
    ],
)
def test_majority_of_equals_is_the_one_said_first(said, vote):
    """What resolves to nothing has no vote."""
    assert ev.majority(Result(item("cat", "dog"), "", said)) == vote


def test_a_result_counts_what_reads_the_same():
    example = item("dog", "cat", "Dog!", answer=2)
    assert [
        Result(example, "", [[t]]).score for t in ("dog", "Dog!", "A", "C", "cat", "B", "A or B", "")
    ] == [1] * 4 + [0] * 4
    assert Result(example, "").score == 0
    assert not ev.same(item("?!", "..."), 0, 1) and not ev.same(example, None, None)


# ---- rotations


def test_rotations_map_back():
    example = item("a dog", "a cat", "rain", answer=2)
    for r in range(3):
        shown = ev.rotate(example, r)
        assert shown.choices[shown.answer] == "rain" and shown.choices[0] == example.choices[r]
        assert [Result(example, "", [[]] * r + [[c]]).resolved[r] for c in example.choices] == [[0], [1], [2]]
        assert Result(example, "", [[]] * r + [["B"]]).resolved[r] == [(r + 1) % 3]


def test_the_first_choice_is_right_once_and_never_consistent(lab):
    done = lab([asks(0), asks(1), asks(2, choices=NAMES[:3])], first, "--rotate_choices")
    assert [r["meta"]["pass_rate"] for r in done.rated] == [1 / 4, 1 / 4, 1 / 3]
    assert done.report["accuracy"] == pytest.approx(5 / 18) and done.report["consistency"] == 0
    assert done.report["right_in_every_rotation"] == 0
    assert collections.Counter(e.choices[0] for e in done.shown if e.id == "q1") == collections.Counter(NAMES)


def test_who_knows_is_right_in_every_rotation(lab):
    done = lab([asks(i) for i in range(3)], knows, "--rotate_choices")
    assert (
        done.report["accuracy"] == done.report["consistency"] == done.report["right_in_every_rotation"] == 1
    )
    always_b = lab([asks(i) for i in range(3)], lambda *_: "B", "--rotate_choices", out="letter")
    assert (always_b.report["accuracy"], always_b.report["consistency"]) == (0.25, 0)
    mute = lab([asks(i) for i in range(3)], lambda *_: "hm", "--rotate_choices", out="mute")
    assert (mute.report["accuracy"], mute.report["consistency"], mute.report["unresolved"]) == (0, 0, 12)
    stubborn = lab([asks(i) for i in range(3)], lambda *_: "cat", "--rotate_choices", out="stubborn")
    assert (stubborn.report["consistency"], stubborn.report["right_in_every_rotation"]) == (
        1,
        pytest.approx(1 / 3),
    )


def test_the_same_text_is_consistent(lab):
    """Whichever of two equal choices comes first."""
    done = lab([asks(0, choices=["dog", "cat", "dog"])], knows, "--rotate_choices")
    assert done.report["accuracy"] == 1 and done.report["consistency"] == 1


# ---- samples


def test_samples_pass_majority_and_pass_rates(lab, tmp_path):
    """Item i is right in i of 4 samples, the right ones last; data.py filter reads how often."""

    def say(example, waves, n):
        return (
            NAMES[int(example.id[1:]) % 4] if n >= 4 - int(example.id[1:]) else "bell" if n < 2 else "no idea"
        )

    done = lab([asks(i) for i in range(3)], say, "--samples", 4)
    assert [r["meta"]["pass_rate"] for r in done.rated] == [0, 0.25, 0.5]
    report = done.report
    assert (report["accuracy"], report["pass@4"], report["samples"]) == (0.25, pytest.approx(2 / 3), 4)
    assert report["majority"] == 0 and report["answers"] == 12 and report["unresolved"] == 3
    assert [p["samples"] for p in done.predictions][1] == [["bell", "bell", "no idea", "cat"]]
    assert "pass@4: 66.7" in done.stdout and report["decoding"]["temperature"] == 1
    data.keep(os.path.join(done.out, "examples.jsonl"), str(tmp_path / "kept.jsonl"), (0.1, 0.4))
    assert [e.id for e in Examples(str(tmp_path / "kept.jsonl"))] == ["q1"]


def test_pass_at_k_is_of_k_samples(lab):
    """Rotations are no further samples: right in one of four is a quarter."""
    done = lab(
        [asks(0)], lambda e, w, n: "dog" if n and e.answer == 2 else "cat", "--samples", 2, "--rotate_choices"
    )
    assert done.report["pass@2"] == 0.25 and done.report["accuracy"] == 0.125


def test_majority_beats_the_single_sample(lab):
    done = lab([asks(0), asks(1)], lambda e, w, n: knows(e, w, n) if n else "rain", "--samples", 3)
    assert (done.report["accuracy"], done.report["majority"]) == (pytest.approx(2 / 3), 1)
    assert [p["model_output"] for p in done.predictions] == ["dog", "cat"] and done.predictions[0][
        "raw_output"
    ] == "rain"


@pytest.mark.parametrize(
    "words, decoding",
    [
        ([], (1, 0, 32)),
        (["--prompt", "think"], (1, 0, 256)),
        (["--prompt", "caption"], (1, 0, 128)),
        (["--samples", 4], (4, 1, 32)),
        (["--samples", 2, "--temperature", 0.7], (2, 0.7, 32)),
        (["--temperature", 0.5, "--max_new_tokens", 5], (1, 0.5, 5)),
    ],
)
def test_decoding_is_greedy_unless_asked(lab, words, decoding):
    assert lab([asks(0)], hears, *words).decoding == decoding


# ---- controls


def test_controls_tell_ears_from_guesses(lab, tmp_path):
    """A model that hears: right with its clip, unresolved without, and wrong with another's; right again in every rotation."""
    done = lab([asks(i) for i in range(4)], hears, "--controls")
    table = done.report
    assert {k: r["accuracy"] for k, r in table.items()} == dict(
        real=1, silence=0, none=0, shuffled=0, rotated=1
    )
    assert {k: r["unresolved"] for k, r in table.items()} == dict(
        real=0, silence=4, none=4, shuffled=0, rotated=0
    )
    assert "| silence | 0.0 |" in done.stdout and "| -100.0 | 0.12 |" in done.stdout
    assert "rotated: the same answer in every rotation for 100.0 %" in done.stdout
    rates = [{k: v for k, v in r["meta"].items() if k.startswith("pass")} for r in done.rated]
    assert rates == [dict(pass_rate=1, pass_rate_silence=0, pass_rate_none=0, pass_rate_shuffled=0)] * 4
    data.keep(
        os.path.join(done.out, "examples.jsonl"),
        str(tmp_path / "kept.jsonl"),
        drop_answerable_without_audio=0.5,
    )
    assert len(Examples(str(tmp_path / "kept.jsonl"))) == 4


def test_controls_tell_text_from_ears(lab, tmp_path):
    """A model that reads the answer off the question is as right without the clip; nothing is left for data.py filter."""
    done = lab([asks(i) for i in range(4)], lambda e, w, n: NAMES[int(e.id[1:])], "--controls")
    assert {r["accuracy"] for r in done.report.values()} == {1}
    with pytest.raises(UserError):
        data.keep(
            os.path.join(done.out, "examples.jsonl"),
            str(tmp_path / "kept.jsonl"),
            drop_answerable_without_audio=0.5,
        )
        Examples(str(tmp_path / "kept.jsonl"))


def test_controls_set_what_is_heard_themselves(lab):
    done = lab([asks(i) for i in range(4)], hears, "--controls", "--audio", "silence", "--rotate_choices")
    assert {k: r["accuracy"] for k, r in done.report.items()} == dict(
        real=1, silence=0, none=0, shuffled=0, rotated=1
    )
    assert "consistency" not in done.report["silence"]


def test_controls_need_answers_before_they_start(lab):
    done = lab([asks(i, answer=None) for i in range(2)], hears, "--controls", code=2)
    assert "no answers in this file" in done.stderr and not done.shown
    done = lab([asks(i) for i in range(2)], hears, "--controls", "--prompt", "caption", code=2)
    assert "caption" in done.stderr and not done.shown


@pytest.mark.parametrize("n_clips, n", [(2, 2), (3, 9), (5, 17)])
def test_shuffled_never_plays_its_own_clip(n_clips, n):
    """Several questions a clip; the same for the same seed; every clip is one of the file's."""
    items = [Example(str(i), f"/{i % n_clips}.wav", f"{i}?", NAMES, i % 4) for i in range(n)] + [
        item("x", "y")
    ]
    orders = set()
    for seed in range(20):
        other = ev.other_clips(items, seed)
        assert all(
            a.audio != b.audio and (a.id, a.question, a.answer) == (b.id, b.question, b.answer)
            for a, b in zip(items[:-1], other)
        )
        assert {e.audio for e in other[:-1]} <= {e.audio for e in items} and other[-1] == items[-1]
        assert other == ev.other_clips(items, seed)
        orders.add(tuple(e.audio for e in other))
    assert len(orders) > 1 or n_clips == 2


def test_shuffled_needs_two_clips(lab):
    done = lab([asks(0), asks(4), asks(8, audio="./dog.wav")], hears, "--audio", "shuffled", code=2)
    assert done.stderr == "error: --audio shuffled: all items have the same clip\n"


def test_shuffled_run_is_wrong_for_who_hears(lab):
    done = lab([asks(i) for i in range(8)], hears, "--audio", "shuffled")
    assert done.report["accuracy"] == 0 and "pass_rate_shuffled" in done.rated[0]["meta"]
    again = lab(None, hears, "--audio", "shuffled", out="again")
    other = lab(None, hears, "--audio", "shuffled", "--seed", 1, out="seed1")
    assert again.predictions == done.predictions != other.predictions


def test_shuffled_pairs_over_the_whole_file(lab):
    """The first items alone, then all: the answers of a run that asked all at once."""
    rows = [asks(i) for i in range(8)]
    part, more = (lab(rows, hears, "--audio", "shuffled", *words) for words in (["--limit", 3], []))
    whole = lab(None, hears, "--audio", "shuffled", out="whole")
    assert len(part.shown) == 3 and len(more.shown) == 5
    assert part.predictions == whole.predictions[:3] and more.predictions == whole.predictions
    assert len(lab(rows, hears, "--audio", "shuffled", "--limit", 1, out="one").predictions) == 1


def test_shuffled_prompts_have_room_for_the_clips_that_are_played(ask, tiny, tmp_path):
    """Items of one clip and of two change places."""
    sounds = [e.audio for e in itertools.islice(Examples(tiny.questions), 4)]
    rows = [asks(i, audio=[sounds[1], sounds[0]] if i == 1 else sounds[i]) for i in range(4)]
    assert ask(save(tmp_path / "q.jsonl", rows), tmp_path / "out", "--audio", "shuffled")[0]["errors"] == 0


@pytest.mark.parametrize("audio", ["real", "silence", "none", "shuffled"])
def test_the_page_plays_what_the_model_heard(lab, capsys, audio):
    """And it and the screen name the condition; so does the page that --compare writes."""
    done = lab([asks(i) for i in range(4)], hears, "--audio", audio)
    written = held(done.out)
    assert ev.main(["--compare", done.out, done.out]) == 0
    assert held(done.out)["items"] == written["items"] and set(held(done.out)["clips"]) == set(
        written["clips"]
    )
    named = [[os.path.splitext(os.path.basename(c))[0] for c in i["clips"]] for i in written["items"]]
    heard = [[p["raw_output"]] for p in done.predictions] if audio in ("real", "shuffled") else [[]] * 4
    assert named == heard and len(written["clips"]) == len(set(sum(heard, [])))
    with open(os.path.join(done.out, "report.html"), encoding="utf-8") as f:
        table = f.read().partition("<nav>")[0]
    assert (
        (f"4 items; --audio {audio}" in done.stdout)
        == (f"4 items; --audio {audio}" in table)
        == (audio != "real")
    )


# ---- resume


def test_answered_items_are_not_asked_again(lab):
    rows = [asks(i) for i in range(5)]
    assert [e.id for e in lab(rows, hears, "--limit", 2).shown] == ["q0", "q1"]
    more = lab(None, hears, "--batch_size", 2)
    assert [e.id for e in more.shown] == ["q2", "q3", "q4"]
    again = lab(None, lambda *_: pytest.fail("asked again"))
    assert again.predictions == more.predictions == lab(None, hears, out="whole").predictions
    assert again.report["n"] == 5


def test_a_torn_line_is_asked_again(lab):
    """A kill cuts the last line anywhere, even within a character."""
    rows = [asks(i, question=f"Qué {i} 犬?") for i in range(3)]
    whole = lab(rows, lambda e, w, n: f"犬 {hears(e, w, n)}")
    path = os.path.join(whole.out, "items.jsonl")
    with open(path, "rb") as f:
        content = f.read()
    last = content.rindex(b"\n", 0, -1) + 1
    for at in (last, last + 1, content.rindex("犬".encode()) + 1, len(content) - 1):
        with open(path, "wb") as f:
            f.write(content[:at])
        again = lab(None, lambda e, w, n: f"犬 {hears(e, w, n)}")
        assert [e.id for e in again.shown] == ["q2"] and again.predictions == whole.predictions
        with open(path, "rb") as f:
            assert f.read() == content


@pytest.mark.parametrize(
    "words, named",
    [
        (["--prompt", "answer"], "prompt"),
        (["--audio", "silence"], "audio"),
        (["--samples", 2], "decoding"),
        (["--seed", 1], "decoding"),
        (["--max_new_tokens", 5], "decoding"),
        (["--temperature", 0.5], "decoding"),
        (["--rotate_choices"], "rotate_choices"),
        (["--max_audio_s", 5], "max_audio_s"),
        (["--adapter", "a"], "adapter"),
        (["--prompt", "caption"], "prompt"),
    ],
)
def test_other_settings_are_refused_by_name(lab, words, named):
    lab([asks(0)], hears)
    refused = lab(None, hears, *words, code=2)
    assert (
        "holds results of another" in refused.stderr
        and re.search(rf"\b{named}\b", refused.stderr)
        and not refused.shown
    )


def test_other_weights_are_refused(lab, clips):
    lab([asks(0)], hears)
    (clips / "model" / "model.safetensors").write_bytes(b"other")
    assert "model_fingerprint" in lab(None, hears, code=2).stderr


def test_another_clip_is_refused(lab, clips):
    """Another --audio_dir, or another sound in the same place: the answers at hand are not about it."""
    (clips / "b").mkdir()
    for name, other in zip(NAMES, NAMES[::-1]):
        shutil.copy(clips / f"{other}.wav", clips / "b" / f"{name}.wav")
    rows, there = [asks(i) for i in range(3)], ["--audio_dir", clips / "b"]
    first = lab(rows, hears, "--audio_dir", clips)
    refused = lab(None, hears, *there, code=2)
    assert "q0 was asked on another clip" in refused.stderr and "give another --out" in refused.stderr
    assert lab(None, hears, *there, out="b").predictions != first.predictions
    assert not lab(None, hears, "--audio_dir", clips).shown
    soundfile.write(clips / "cat.wav", np.full(900, 0.3), data.RATE_HZ)
    assert "q1 was asked on another clip" in lab(None, hears, code=2).stderr
    (clips / "cat.wav").unlink()
    assert "q1 was asked on another clip" in lab(None, hears, code=2).stderr


def test_another_clip_inside_a_parquet_file_is_refused(lab, clips):
    datasets = pytest.importorskip("datasets")
    for names in (NAMES, NAMES[::-1]):
        sounds = [{"bytes": (clips / f"{n}.wav").read_bytes(), "path": None} for n in names[:2]]
        datasets.Dataset.from_dict(
            dict(audio=sounds, question=["?"] * 2, choices=[NAMES] * 2, answer=NAMES[:2])
        ).to_parquet(str(clips / f"{names[0]}.parquet"))
    lab(None, hears, name="dog.parquet")
    assert not lab(None, hears, name="dog.parquet").shown
    assert "was asked on another clip" in lab(None, hears, name="bell.parquet", code=2).stderr


def test_two_runs_on_different_clips_are_paired(lab, clips, capsys):
    """An item is what is asked: where its clip lies is no part of it."""
    (clips / "b").mkdir()
    for name in NAMES:
        shutil.copy(clips / f"{name}.wav", clips / "b")
    a = lab([asks(i) for i in range(3)], hears, out="a")
    b = lab(None, hears, "--audio_dir", clips / "b", out="other")
    assert ev.main(["--compare", a.out, b.out]) == 0 and "3 items" in capsys.readouterr().out


def test_a_path_that_is_no_text_is_kept(lab, clips):
    """A folder holds names that are not UTF-8; JSON can spell them."""
    (clips / "sounds").mkdir()
    for folder, name in (("dog", b"1\xff.wav"), ("cat", b"2.wav")):
        (clips / "sounds" / folder).mkdir()
        shutil.copy(clips / f"{folder}.wav", os.path.join(os.fsencode(clips / "sounds" / folder), name))
    assert lab(None, hears, name="sounds").report["accuracy"] == 1
    assert not lab(None, hears, name="sounds").shown


def test_speed_is_no_setting(lab):
    lab([asks(0)], hears)
    assert not lab(None, hears, "--batch_size", 1, "--rollout_rows", 2).shown


def test_rotations_resume_one_by_one(lab):
    whole = lab([asks(0), asks(1)], hears, "--rotate_choices")
    path = os.path.join(whole.out, "items.jsonl")
    with open(path, encoding="utf-8") as f:
        lines = f.readlines()
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(lines[:5])
    again = lab(None, hears, "--rotate_choices")
    assert len(again.shown) == 3 and again.predictions == whole.predictions and again.report == whole.report


def test_a_failed_start_leaves_nothing_behind(lab, monkeypatch):
    """A misspelt adapter is found when the model is loaded; the right one may use the same --out."""

    def fails(cfg, train=True):
        raise UserError(f"--adapter {cfg.adapter}: no")

    load = og.load_policy
    monkeypatch.setattr(og, "load_policy", fails)
    lab([asks(0)], hears, "--adapter", "misspelt", code=2)
    monkeypatch.setattr(og, "load_policy", load)
    assert lab(None, hears).report["accuracy"] == 1


def test_ctrl_c(lab):
    """Exit code 130, and what was answered is kept."""

    def say(example, waves, n):
        if example.id == "q2":
            raise KeyboardInterrupt
        return hears(example, waves, n)

    assert "goes on" in lab([asks(i) for i in range(4)], say, "--batch_size", 2, code=130).stderr
    assert [e.id for e in lab(None, hears).shown] == ["q2", "q3"]


# ---- compare


def test_compare_finds_what_flipped(lab, clips, capsys):
    """The base knows items 0-3, the new one 2-7 of 8: 2 lost, 4 won, p = 2 (1 + 6 + 15) / 64."""
    rows = [asks(i, meta={"task": "sound" if i % 2 else "music"}) for i in range(8)]
    base = lab(rows, lambda e, w, n: hears(e, w, n) if int(e.id[1:]) < 4 else "none", out="base")
    new = lab(None, lambda e, w, n: hears(e, w, n) if int(e.id[1:]) > 1 else "none", out="new")
    assert (base.report["accuracy"], new.report["accuracy"]) == (0.5, 0.75)
    assert ev.main(["--compare", base.out, new.out]) == 0
    said, found = capsys.readouterr().out, read(os.path.join(new.out, "compare.json"))
    keys = {ev.item_key(e): e.id for e in Examples(str(clips / "q.jsonl"))}
    assert {k: [keys[x] for x in found[k]] for k in ("lost", "won")} == dict(
        lost=["q0", "q1"], won=["q4", "q5", "q6", "q7"]
    )
    assert (found["n"], found["difference"], found["p"]) == (8, 0.25, 2 * (1 + 6 + 15) / 64)
    assert found["interval"] == list(ev.bootstrap([-1] * 2 + [0] * 2 + [1] * 4))
    assert "| **all** | 8 | 50.0 | 75.0 | +25.0 |" in said and "| task: music | 4 | 50.0 | 75.0 |" in said
    with open(os.path.join(new.out, "report.html"), encoding="utf-8") as f:
        flips = [
            i["flip"]
            for i in json.loads(re.search(r'application/json">(.*?)</script>', f.read(), re.DOTALL)[1])[
                "items"
            ]
        ]
    assert flips == ["lost"] * 2 + [""] * 2 + ["won"] * 4
    assert ev.main(["--compare", new.out, new.out]) == 0
    assert "| 8 | 75.0 | 75.0 | +0.0 | -32.4 to +32.4 | 0 | 0 | 1 |" in capsys.readouterr().out


def test_compare_pairs_items_and_not_lines(lab, capsys):
    rows = [asks(i) for i in range(4)]
    a = lab(rows, lambda e, w, n: hears(e, w, n) if e.id in ("q0", "q1") else "none", out="a")
    b = lab(
        rows[::-1],
        lambda e, w, n: hears(e, w, n) if e.id in ("q0", "q1") else "none",
        out="b",
        name="reversed.jsonl",
    )
    assert ev.main(["--compare", a.out, b.out]) == 0
    assert "| 0 | 0 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, words, named",
    [
        ({"question": "Who?"}, [], "items"),
        ({"answer": 2}, [], "items"),
        ({"choices": NAMES[::-1]}, [], "items"),
        ({"id": "x"}, [], "items"),
        ({}, ["--prompt", "answer"], "prompt"),
        ({}, ["--rotate_choices"], "rotate_choices"),
        ({}, ["--limit", 1], "items"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(lab, capsys, change, words, named):
    a = lab([asks(0), asks(1)], hears, out="a")
    b = lab([asks(0), asks(1, **change)], hears, *words, out="b")
    assert ev.main(["--compare", a.out, b.out]) == 2
    stderr = capsys.readouterr().err
    assert f"have different {named} (" in stderr and not os.path.exists(os.path.join(b.out, "compare.json"))


def test_compare_refuses_other_versions(lab, capsys):
    """The same items, said to be of another version."""
    a, b = lab([asks(0)], hears, out="a"), lab([asks(0)], hears, out="b")
    save(pathlib.Path(b.out, "report.json"), b.report | {"version": "original"})
    assert ev.main(["--compare", a.out, b.out]) == 2
    assert "have different version" in capsys.readouterr().err


NO_ANSWERS = [
    json.dumps({k: v for k, v in record.items() if v != "left out"}) + "\n"
    for change in (
        dict(item="left out"),
        dict(item=1),
        dict(rotation="left out"),
        dict(rotation="0"),
        dict(rotation=None),
        dict(error="left out"),
        dict(error=None),
        dict(said="left out"),
        dict(said=None),
        dict(said="dog"),
        dict(said=["dog", 1]),
        dict(said=[["dog"]]),
        dict(said={"dog": 1}),
    )
    for record in [dict(item="x", rotation=0, said=["dog"], error="") | change]
]


def test_compare_refuses_what_is_no_result(lab, clips, capsys):
    a = lab([asks(0)], hears, out="a").out
    blank = lab([asks(0, answer=None)], hears, out="blank").out
    controls = lab([asks(0), asks(1)], hears, "--controls", out="controls").out
    (clips / "empty").mkdir()
    for other in (str(clips / "empty"), str(clips / "none"), str(clips / "q.jsonl"), blank, controls):
        assert ev.main(["--compare", a, other]) == 2 == ev.main(["--compare", other, a])
        assert "no finished and scored results" in capsys.readouterr().err
    for n, (name, content) in enumerate(
        [
            ("report.json", b"{"),
            ("report.json", b"[]"),
            ("report.json", b'{"items_hash": "", "accuracy": 1}'),
            ("items.jsonl", b"1\n"),
            *(("items.jsonl", line.encode()) for line in NO_ANSWERS),
        ]
    ):
        broken = shutil.copytree(a, clips / f"broken{n}")
        (broken / name).write_bytes(content)
        assert ev.main(["--compare", a, str(broken)]) == 2
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: ") and stderr.count("\n") == 1


# ---- other people's predictions


MMAU = [
    dict(
        id=f"m{i}",
        audio_id=f"./{NAMES[i]}.wav",
        question="What is it?",
        choices=NAMES,
        answer=NAMES[i],
        task=["sound", "music"][i % 2],
        difficulty="easy",
        category=["Reasoning"],
    )
    for i in range(4)
]


@pytest.mark.parametrize(
    "key", ["model_output", "model_prediction", "answer_prediction", "response", "raw_output"]
)
@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_every_key_is_scored(tmp_path, capsys, key, name):
    """A list or lines; a row that lacks the key, or holds null, is wrong and counted."""
    rows = [MMAU[0] | {key: "The answer is dog."}, MMAU[1], MMAU[2] | {key: None}, MMAU[3] | {key: "cat"}]
    assert ev.main(["--score", save(tmp_path / name, rows)]) == 0
    said = capsys.readouterr().out
    assert (
        "| **all** | 4 | **25.0** |" in said
        and "0 clips that could not be heard, 2 items without a prediction" in said
    )
    report = ev.score_file(str(tmp_path / name), "")
    assert (report["missing"], report["prediction_key"], report["unresolved"]) == (2, key, 0)
    assert {k: v["accuracy"] for k, v in report["by_task"].items()} == dict(sound=0.5, music=0)
    assert report["by"]["category"] == {"Reasoning": report["by"]["difficulty"]["easy"]}


@pytest.mark.parametrize(
    "ids", [["m0", "m1", "m2", "m3"], [0, 1, 2, 3], [None] * 4], ids=["names", "numbers", "only the clip"]
)
def test_predictions_join_by_id(tmp_path, ids):
    """In any order, to the item of that id and to no other that asks the same question; a row that is not there is missing."""
    items = [row | {"id": i} for row, i in zip(MMAU, ids)]
    key = "id" if ids[0] is not None else "audio_id"
    said = [{key: row[key], "question": row["question"], "model_output": row["answer"]} for row in items]
    questions = save(tmp_path / "q.json", items)
    for rows, right in (
        (said, 4),
        (said[::-1], 4),
        (said[1:3], 2),
        (said[:1], 1),
        ([*said[2:], said[0] | {key: "x"}], 2),
    ):
        report = ev.score_file(save(tmp_path / "p.json", rows), questions)
        assert (report["n"], report["accuracy"], report["missing"]) == (4, right / 4, 4 - right)


def test_every_row_has_its_own_key(tmp_path):
    """A file merged from several: the first key of a row that is not null."""
    rows = [
        MMAU[0] | {"model_output": "dog"},
        MMAU[1] | {"model_prediction": "cat"},
        MMAU[2] | {"model_output": None, "model_prediction": "rain"},
        MMAU[3] | {"model_output": None},
    ]
    for words in ("", save(tmp_path / "q.json", MMAU)):
        report = ev.score_file(save(tmp_path / "p.json", rows), words)
        assert (report["accuracy"], report["missing"]) == (0.75, 1)
        assert report["prediction_key"] == "model_output, model_prediction"


def test_predictions_join_by_what_they_have(tmp_path, capsys):
    """Ids of their own, and the right clip, or the right question: the surest name that leads to one item."""
    data_file = save(tmp_path / "q.json", [row | {"question": f"What is {row['id']}?"} for row in MMAU])
    asked = read(data_file)
    said = [
        {
            "id": i,
            "model_output": row["answer"],
            "audio_id": f"elsewhere/{os.path.basename(row['audio_id'])}",
            "question": row["question"],
        }
        for i, row in enumerate(asked)
    ]
    for keys in (
        ("id", "audio_id"),
        ("id", "question"),
        ("audio_id",),
        ("question",),
        ("id", "audio_id", "question"),
    ):
        rows = [{k: v for k, v in row.items() if k in (*keys, "model_output")} for row in said[::-1]]
        report = ev.score_file(save(tmp_path / "p.json", rows), data_file)
        assert (report["accuracy"], report["missing"], report["left_out"]) == (1, 0, [])
    capsys.readouterr()
    assert (
        ev.main(
            ["--score", save(tmp_path / "p.json", [{"id": 7, "model_output": "dog"}]), "--data", data_file]
        )
        == 2
    )
    stderr = capsys.readouterr().err
    assert (
        stderr.startswith("error: ")
        and "p.json:entry 1: no row has an id, a clip or a question of " in stderr
    )


def test_questions_of_one_id_or_clip_have_their_own_predictions(tmp_path):
    """Told apart by the question; where a row does not hold it, it is a guess and does not count."""
    items = [asks(i, id="x", audio="dog.wav") for i in range(3)]
    questions = save(tmp_path / "q.jsonl", items)
    said = [dict(id="x", question=row["question"], response=NAMES[row["answer"]]) for row in items]
    assert ev.score_file(save(tmp_path / "p.jsonl", said[::-1]), questions)["accuracy"] == 1
    report = ev.score_file(save(tmp_path / "p.jsonl", [said[0], dict(id="x", response="dog")]), questions)
    assert (report["missing"], report["left_out"]) == (2, [f"{tmp_path}/p.jsonl:2"])


def test_predictions_of_other_questions_are_refused(tmp_path, capsys):
    """Rows that hold what was asked must have asked the same: the text, the choices, and their order."""
    questions = save(tmp_path / "q.json", MMAU)
    said = [row | {"model_output": row["answer"]} for row in MMAU]
    for change in (
        dict(question="Who?"),
        dict(choices=NAMES[::-1]),
        dict(choices=NAMES[:3]),
        dict(choices=None, question="Who?"),
        dict(choices="dog"),
        dict(choices=json.dumps(NAMES[::-1])),
    ):
        rows = [said[0], said[1], said[2] | change, said[3] | change]
        assert ev.main(["--score", save(tmp_path / "p.json", rows), "--data", questions]) == 2
        stderr = capsys.readouterr().err
        assert (
            stderr.startswith("error: ")
            and "p.json:entry 3: its question or choices are not those of" in stderr
        )
        assert stderr.count("\n") == 1
    for change in (
        dict(choices=None),
        dict(choices=json.dumps(NAMES)),
        dict(question=None),
        dict(answer="", task="?"),
    ):
        assert (
            ev.score_file(save(tmp_path / "p.json", [row | change for row in said]), questions)["accuracy"]
            == 1
        )
    columns = [
        dict(id=f"c{i}", audio_path=f"{i}.wav", question="?", choice_a="dog", choice_b="cat", answer_gt="cat")
        for i in range(2)
    ]
    questions = save(tmp_path / "q.json", columns)
    rows = [row | dict(response="B", choice_a="cat", choice_b="dog") for row in columns]
    assert ev.main(["--score", save(tmp_path / "p.json", rows), "--data", questions]) == 2


def test_predictions_of_an_item_of_several_rows(tmp_path):
    rows = [dict(file_name="a.wav", QuestionText="Is it a dog?", answer=a) for a in ("yes", "yes", "no")]
    questions = save(tmp_path / "q.json", rows)
    report = ev.score_file(save(tmp_path / "p.json", [dict(file_name="a.wav", response="yes")]), questions)
    assert (report["n"], report["accuracy"]) == (1, 1)


def test_no_item_counts_twice(tmp_path, capsys):
    """Rows of an item that has one, and of none: the first counts, the others are counted and named."""
    said = [row | {"model_output": row["answer"]} for row in MMAU]
    again = said[0] | {"model_output": "cat"}
    rows = save(tmp_path / "p.json", [*said, again, again])
    for words in ([], ["--data", save(tmp_path / "q.json", MMAU)]):
        assert ev.main(["--score", rows, *words]) == 0
        stdout = capsys.readouterr().out
        assert (
            "| **all** | 4 | **100.0** |" in stdout
            and "2 rows not counted" in stdout
            and "p.json:entry 5, " in stdout
        )
    rows = save(
        tmp_path / "p.json", [{"id": "m9", "model_output": "dog"}, {"id": "m1", "model_output": "cat"}]
    )
    report = ev.score_file(rows, words[1])
    assert (report["n"], report["missing"], report["left_out"]) == (4, 3, [f"{rows}:entry 1"])
    assert "1 rows not counted" in capsys.readouterr().out


def test_mmsu_and_air_bench_predictions_join(tmp_path):
    """Many of their items ask the same and have the same choices: only the id tells them apart."""
    asked = dict(question="Which?", task_name="t", choice_a="dog", choice_b="cat", answer_gt="cat")
    mmsu = [asked | dict(id=f"code_{i}", audio_path=f"{i}.wav") for i in range(3)]
    air = [asked | dict(path=f"{i}.wav", uniq_id=i, dataset_name="d") for i in range(3)]
    for rows, key in ((mmsu, "id"), (air, "uniq_id")):
        questions = save(tmp_path / "q.json", rows)
        assert [e.id for e in Examples(questions)] == [str(r[key]) for r in rows]
        said = [{key: r[key], "response": "B" if i else "A"} for i, r in enumerate(rows)]
        report = ev.score_file(save(tmp_path / "p.jsonl", said[::-1]), questions)
        assert (report["accuracy"], report["missing"]) == (pytest.approx(2 / 3), 0)


def test_numbers_and_lists_are_read_as_text(tmp_path):
    rows = [
        dict(id=str(i), audio=None, question=f"{i}?", choices=["1", "2"], answer=0, response=r)
        for i, r in enumerate([1, "1", [1], True, ""])
    ]
    report = ev.score_file(save(tmp_path / "p.json", rows), "")
    assert report["missing"] == 0 and report["accuracy"] >= 0.4 and report["n"] == 5


def test_pro_is_not_called_official(tmp_path, capsys):
    row = dict(
        audio_path=["a.wav"],
        question="?",
        choices=["x", "y"],
        answer="x",
        task_identifier="t",
        category="sound",
    )
    changes = ({"model_output": "x"}, {"choices": []}, {"model_output": "y"}, {"category": "open"})
    rows = [row | change for change in changes]
    report = ev.score_file(save(tmp_path / "p.json", rows), "")
    assert (report["format"], report["accuracy"], report["n"]) == ("MMAU-Pro", 0.5, 2)
    said = capsys.readouterr().out
    assert (
        "not the official NV-Embed similarity" in said
        and "2 skipped" in said
        and "official_accuracy" not in report
    )


def test_items_left_out_by_the_letter_rule_are_counted(tmp_path):
    """Wrong in the strict score, left out of the benchmark's, and said to be."""
    answers = ["B", "b", "B. cat", "cat", "The answer is cat", "Answer: B", "<answer>B</answer>"]
    rows = [
        dict(
            id=str(i),
            task_name="t",
            audio_path="a.wav",
            question="?",
            choice_a="dog",
            choice_b="cat",
            choice_c=None,
            choice_d=None,
            answer_gt="cat",
            response=a,
        )
        for i, a in enumerate(answers)
    ]
    report = ev.score_file(save(tmp_path / "p.jsonl", rows), "")
    assert report["format"] == "MMSU" and report["accuracy"] == 1 == report["official_accuracy"]
    assert report["official_accuracy_raw_left_out"] == 4 and report["official_accuracy_raw"] == pytest.approx(
        2 / 3
    )
    assert list(report["by_task"]) == ["t"]


@pytest.mark.parametrize(
    "content, words, message",
    [
        (b"", [], "is empty"),
        (b"[", [], "broken JSON"),
        (b"[1, 2]", [], "expected a list or lines of JSON objects"),
        (b"{", [], "broken JSON"),
        (b"\xff\xfe\x00", [], "p.json"),
        (b"[]", [], "holds no question"),
        (b"null", [], "expected a"),
        (b'[{"id": "a", "model_output": "x"}]', [], "unknown format"),
        (json.dumps(MMAU).encode(), [], "no row has a prediction"),
        (b'[{"id": "a", "model_output": "x"}]', ["--data", "none.json"], "no such file"),
        (b'[{"id": "a"}]', ["--data", "p.json"], "p.json"),
    ],
)
def test_bad_predictions(tmp_path, monkeypatch, capsys, content, words, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "p.json", content)
    assert ev.main(["--score", "p.json", *words]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ") and message in stderr and len(stderr) < 4000
    assert ev.main(["--score", "nowhere.json"]) == ev.main(["--score", "."]) == 2


def test_from_the_shell(tmp_path):
    """Exit codes and messages are those of the program, too; --score needs no model and no torch."""

    def run(*words):
        code = (
            f"import sys; sys.path.insert(0, {ROOT!r}); import eval as ev; code = ev.main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        return subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )

    save(tmp_path / "p.json", [row | {"model_output": row["answer"]} for row in MMAU])
    done = run("--score", "p.json")
    assert (done.returncode, done.stderr) == (0, "") and "**100.0**" in done.stdout
    (tmp_path / "bad.json").write_text("[{]")
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "eval.py"), "--score", "bad.json"],
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(
        "error: bad.json: broken JSON"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--samples 0",
        "--data q --samples 2 --temperature 0",
        "--data q --batch_size 0",
        "--limit -1",
        "--data q --max_audio_s 301",
        "--data q --temperature nan",
        "--dta q",
        "--data q --audio loud",
        "--compare a",
        "--data q --prompt none",
        "--data q --prompt caption --audio shuffled",
    ],
)
def test_bad_flags(words, capsys):
    with pytest.raises(SystemExit) as e:
        ev.parse_args(words.split())
    assert e.value.code == 2 and "error: " in capsys.readouterr().err


# ---- predictions in the benchmark's own layout


def test_mmau_layout(lab):
    """The rows of the file, in its order and with nothing lost, both prediction keys, the raw text and the choice."""
    done = lab(
        MMAU, lambda e, w, n: f"It is a {hears(e, w, n)}." if e.id != "m3" else "a bird", name="q.json"
    )
    for i, (row, p) in enumerate(zip(MMAU, done.predictions)):
        assert {k: p[k] for k in row} == row and list(p)[: len(row)] == list(row)
        said = NAMES[i] if i < 3 else "a bird"
        assert p["model_output"] == p["model_prediction"] == p["answer_prediction"] == said
        assert p["raw_output"] == (f"It is a {NAMES[i]}." if i < 3 else "a bird") and p["resolved"] == (
            i if i < 3 else None
        )
        assert ev.word_rule(p["model_output"], Example("", None, "?", NAMES, i)) is (i < 3)
    report = done.report
    assert report["official_accuracy"] == 0.75 == report["accuracy"] and report["unresolved"] == 1
    again = ev.score_file(os.path.join(done.out, "predictions.json"), "")
    for key in (
        "accuracy",
        "official_accuracy",
        "official_accuracy_raw",
        "unresolved",
        "baselines",
        "version",
    ):
        assert again[key] == report[key]


def test_hub_layout_keeps_its_letters(lab):
    """Its script compares with "(A) dog", so that is what it is given; the model is shown the bare choices."""
    lettered = [f"({c}) {n}" for c, n in zip("ABCD", NAMES)]
    rows = [
        dict(
            context=f"{NAMES[i]}.wav",
            instruction="What is it?",
            choices=lettered,
            answer=lettered[i],
            other_attributes=json.dumps(dict(id=f"h{i}", task="sound")),
        )
        for i in range(3)
    ]
    done = lab(rows, hears)
    assert (
        done.shown[0].choices == NAMES
        and done.report["format"] == "MMAU (Hub)"
        and done.report["accuracy"] == 1
    )
    for row, p in zip(rows, done.predictions):
        assert p["model_output"] == row["answer"]
        assert ev.word_rule(p["model_output"], item(*lettered, answer=lettered.index(row["answer"])))
    assert ev.score_file(os.path.join(done.out, "predictions.json"), "")["accuracy"] == 1


def test_mmsu_layout_answers_with_letters(lab):
    rows = [
        dict(
            id=f"c{i}",
            task_name="t",
            audio_path=f"{NAMES[i]}.wav",
            question="?",
            choice_a="dog",
            choice_b="cat",
            choice_c=None if i < 2 else "rain",
            choice_d=None,
            answer_gt=NAMES[i],
        )
        for i in range(3)
    ]
    done = lab(rows, hears)
    assert [p["response"] for p in done.predictions] == ["A", "B", "C"]
    assert [p["model_output"] for p in done.predictions] == NAMES[:3] and done.report[
        "official_accuracy"
    ] == 1
    assert [p["choice_c"] for p in done.predictions] == [None, None, "rain"]
    assert done.report["official_accuracy_raw_left_out"] == 3


def test_blank_answers_are_written_and_not_scored(lab):
    """A test set that withholds its answers."""
    done = lab([row | {"answer": ""} for row in MMAU], hears, name="q.json")
    assert [p["model_output"] for p in done.predictions] == NAMES and [
        p["answer"] for p in done.predictions
    ] == [""] * 4
    assert "accuracy" not in done.report and "nothing to score" in done.stdout and "%" not in done.stdout
    assert done.report["version"] == "answers withheld"
    ev.score_file(os.path.join(done.out, "predictions.json"), "")


def test_missing_clips_are_named_without_answers_too(lab):
    done = lab([asks(i, answer=None, audio=f"gone{i}.wav") for i in range(4)], hears)
    assert "nothing to score" in done.stdout and "4 clips that could not be heard" in done.stdout
    assert (
        "gone3.wav: no such file" in done.stdout
        and "counted as wrong" not in done.stdout
        and done.report["errors"] == 4
    )


def test_some_answers_are_blank(lab):
    """Only the others are scored."""
    done = lab([asks(0), asks(1, answer=None), asks(2, answer=0)], hears)
    assert (done.report["n"], done.report["items"], done.report["accuracy"]) == (2, 3, 0.5) and len(
        done.predictions
    ) == 3


# ---- odd data


def test_a_missing_clip_is_wrong_and_listed(lab, clips):
    """Never skipped: the count stays, the message names the file, and predictions and page have the item."""
    (clips / "text.wav").write_text("no sound")
    rows = [asks(0), asks(1, audio="gone.wav"), asks(2), asks(3, audio="text.wav")]
    done = lab(rows, hears, "--batch_size", 2)
    report = done.report
    assert (report["n"], report["accuracy"], report["errors"], report["missing"]) == (4, 0.5, 2, 0)
    assert ["gone.wav" in report["error_items"].popitem()[1] for _ in range(2)] == [
        False,
        True,
    ] and not report["error_items"]
    assert "2 clips that could not be heard" in done.stdout and "gone.wav: no such file" in done.stdout
    assert (
        "no such file" in done.predictions[1]["error"]
        and len(done.predictions) == 4
        and "error" not in done.predictions[0]
    )
    assert [r["meta"]["pass_rate"] for r in done.rated] == [1, 0, 1, 0]
    rotated = lab(None, hears, "--rotate_choices", "--samples", 2, out="rotated").report
    assert (
        rotated["accuracy"]
        == rotated["right_in_every_rotation"]
        == rotated["pass@2"]
        == rotated["majority"]
        == 0.5
    )
    allgone = lab([asks(1, audio="gone.wav")], hears, out="gone", name="gone.jsonl")
    assert allgone.report["accuracy"] == 0 and allgone.report["errors"] == 1 and not allgone.shown


def test_a_clip_that_came_back_is_heard(lab, clips):
    """The same command tries again what could not be heard."""
    rows = [asks(0), asks(1)]
    (clips / "cat.wav").rename(clips / "away.wav")
    assert lab(rows, hears).report["errors"] == 1
    (clips / "away.wav").rename(clips / "cat.wav")
    again = lab(None, hears)
    assert (
        [e.id for e in again.shown] == ["q1"]
        and again.report["accuracy"] == 1
        and again.report["errors"] == 0
    )


def test_the_same_item_twice(lab):
    done = lab([asks(0), asks(1), asks(0)], hears)
    assert done.report["n"] == 3 == len(done.predictions) and done.report["accuracy"] == 1
    assert not lab(None, hears).shown and ev.main(["--compare", done.out, done.out]) == 0


def test_two_items_with_one_id(lab):
    """Each has its own answer, whatever they share but the clip."""
    done = lab([asks(0, id="x"), asks(1, id="x"), asks(2, id="x")], hears)
    assert [p["raw_output"] for p in done.predictions] == NAMES[:3]
    same = dict(id="x", question="?", answer=1)
    done = lab([asks(i, **same) for i in range(3)], hears, out="clips", name="clips.jsonl")
    assert [p["raw_output"] for p in done.predictions] == NAMES[:3] and done.report[
        "accuracy"
    ] == pytest.approx(1 / 3)
    again = lab(None, hears, out="clips", name="clips.jsonl")
    assert not again.shown and again.predictions == done.predictions
    assert ev.main(["--compare", done.out, done.out]) == 0


def test_items_without_choices(lab):
    done = lab([asks(i, choices=None, answer=None) for i in range(2)], hears)
    assert [p["raw_output"] for p in done.predictions] == NAMES[:2] and "nothing to score" in done.stdout
    assert [p["resolved"] for p in done.predictions] == [None] * 2
    mixed = lab(
        [asks(0), asks(1, choices=None, answer=None)],
        hears,
        "--rotate_choices",
        out="mixed",
        name="mixed.jsonl",
    )
    assert (mixed.report["n"], mixed.report["items"], mixed.report["accuracy"]) == (1, 2, 1)


def test_countdown_is_scored(lab):
    """By its reward, which reads <answer>: the prompt asks for it unless told otherwise. There is nothing to vote on."""
    done = lab([dict(nums=[3, 4, 5], target=12)], lambda *_: "<answer>3 + 4 + 5</answer>")
    assert (done.report["items"], done.report["accuracy"], done.report["prompt"]) == (1, 1, "answer")
    sampled = lab(None, lambda e, w, n: f"<answer>{n} + 12</answer>", "--samples", 2, out="sampled")
    assert (
        sampled.report["pass@2"] == 0
        and "majority" not in sampled.report
        and "majority" not in sampled.stdout
    )
    assert lab(None, lambda *_: "12", "--prompt", "think", out="think").report["prompt"] == "think"
    assert lab([asks(0)], hears, out="other").report["prompt"] == "direct"


def test_files_of_labels_and_captions(lab, clips):
    """Labels become questions; captions are described and not scored."""
    done = lab(
        ("audio,label\n" + "".join(f"{n}.wav,{n}\n" for n in NAMES)).encode(), hears, name="labels.csv"
    )
    assert (done.report["format"], done.report["n"], done.report["accuracy"]) == ("labels", 4, 1)
    assert [p["label"] for p in done.predictions] == NAMES
    rows = [dict(audio="dog.wav", captions=["a dog", "barking"]), dict(audio="cat.wav", captions=["a cat"])]
    done = lab(rows, hears, out="captions", name="captions.jsonl")
    assert [p["raw_output"] for p in done.predictions] == NAMES[:2] and "nothing to score" in done.stdout


def test_several_clips_a_question(lab, clips):
    done = lab(
        [asks(0, audio=["dog.wav", "cat.wav"]), asks(1, audio=None)],
        lambda e, waves, n: NAMES[len(waves)] if len(waves) != 2 else "dog",
    )
    assert done.report["accuracy"] == 0.5 and [p["raw_output"] for p in done.predictions] == NAMES[:1] * 2
    assert done.shown[0].clips == [str(clips / "dog.wav"), str(clips / "cat.wav")] and not done.shown[1].clips


def test_unicode_survives(lab, clips, capsys):
    row = asks(
        0, id="é", question="Was hört man? 犬 🐕\u2028", choices=["Hund 🐕", "Kätzchen", "雨"], answer=2
    )
    done = lab([row, asks(1)], lambda e, w, n: "雨\u2028\r\n" if e.id == "é" else "cat")
    assert done.report["accuracy"] == 1 and done.predictions[0]["raw_output"] == "雨\u2028\r\n"
    assert done.predictions[0]["model_output"] == "雨" and done.rated[0]["question"] == row["question"]
    assert not lab(None, hears).shown and ev.main(["--compare", done.out, done.out]) == 0


def test_half_a_character_anywhere(lab):
    """JSON can write it, UTF-8 cannot; what the questions do not show must not end a run that has answered them all."""
    done = lab([asks(0, id="\ud800", comment="\udfff")], hears)
    assert done.report["accuracy"] == 1 and len(done.predictions) == 1


def test_limit(lab):
    done = lab([asks(i) for i in range(5)], hears, "--limit", 3)
    assert done.report["n"] == len(done.predictions) == len(done.rated) == len(done.shown) == 3
    assert lab(None, hears, "--limit", 99).report["n"] == 5


@pytest.mark.parametrize(
    "rows, words, message",
    [
        (b"", [], "q.jsonl: is empty"),
        (b"{", [], "q.jsonl:1: broken JSON"),
        ([{"a": 1}], [], "unknown format"),
        ([asks(0, answer=9)], [], 'q.jsonl:1: field "answer"'),
        ([asks(0), asks(1, choices=["x"])], [], 'q.jsonl:2: field "choices"'),
        ([r | {"answer": "x"} for r in MMAU] * 6, [], "q.jsonl: 24 answers are not among their choices"),
        ([asks(0)], ["--model", "nowhere"], "--model nowhere: "),
        ([asks(0)], ["--data", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_bad_data(lab, rows, words, message):
    done = lab(rows, hears, *words, code=2)
    assert done.stderr.startswith("error: ") and message in done.stderr and not done.shown


def test_bad_out(lab, clips):
    """A file; below a file; a folder that holds something else; results that are damaged."""
    (clips / "file").write_text("x")
    for out in ("file", "file/x"):
        done = lab([asks(0)], hears, out=out, code=2)
        assert done.stderr.startswith("error: ") and "--out" in done.stderr
    assert (clips / "file").read_text() == "x"
    for n, (name, content) in enumerate(
        [
            ("config.json", "{"),
            ("config.json", "[]"),
            ("items.jsonl", "{}\n"),
            *(("items.jsonl", line) for line in NO_ANSWERS),
        ]
    ):
        done = lab([asks(0)], hears, out=f"damaged{n}")
        with open(os.path.join(done.out, name), "w", encoding="utf-8") as f:
            f.write(content)
        stderr = lab(None, hears, out=f"damaged{n}", code=2).stderr
        assert stderr.startswith("error: ") and "is damaged" in stderr and stderr.count("\n") == 1


# ---- captions


def test_captions_are_read_by_the_loader(lab, clips):
    """k texts a clip, asked once a clip however many questions it has; what cannot be heard is left out and said."""
    rows = [asks(0), asks(4), asks(1), asks(2, audio="gone.wav"), asks(3, audio=None)]
    done = lab(rows, lambda e, w, n: f"{hears(e, w, n)} {n} é", "--prompt", "caption", "--samples", 3)
    written = Examples(os.path.join(done.out, "captions.jsonl"))
    assert written.format == "captions" and [e.target for e in written] == [
        [f"{n} {k} é" for k in range(3)] for n in NAMES[:2]
    ]
    assert [os.path.samefile(e.audio, clips / f"{n}.wav") for e, n in zip(written, NAMES)] == [True] * 2
    assert "2 clips, 3 captions each; 1 clips could not be heard" in done.stdout
    assert not any(e.choices for e in done.shown) and len(done.shown) == 2
    assert not lab(None, hears, "--prompt", "caption", "--samples", 3).shown


def test_captions_of_clips_inside_a_parquet_file(lab, clips):
    """They have no path; what is written can be read again."""
    datasets = pytest.importorskip("datasets")
    sounds = [{"bytes": (clips / f"{n}.wav").read_bytes(), "path": None} for n in NAMES[:2]]
    datasets.Dataset.from_dict(
        dict(audio=sounds, question=["?"] * 2, choices=[NAMES] * 2, answer=NAMES[:2])
    ).to_parquet(str(clips / "q.parquet"))
    done = lab(None, hears, "--prompt", "caption", name="q.parquet")
    assert [
        hears(e, [data.load_audio(e.audio)[0]], 0) for e in Examples(os.path.join(done.out, "captions.jsonl"))
    ] == NAMES[:2]
    scored = lab(None, hears, out="scored", name="q.parquet")
    assert scored.report["accuracy"] == 1 and ev.main(["--compare", scored.out, scored.out]) == 0


# ---- the tiny base


@pytest.fixture(scope="module")
def taught(tiny):
    return og.load_policy(og.Config(model=tiny.base), train=False)


@pytest.fixture
def ask(taught, tiny, monkeypatch):
    """ask(questions, out, *words) -> (report, predictions), by the tiny base loaded once; without the page, which takes time"""
    monkeypatch.setattr(ev, "page", lambda *_: "")

    def ask(questions, out, *words):
        args = ev.parse_args(
            ["--data", str(questions), "--model", tiny.base, "--max_new_tokens", "6", *map(str, words)]
        )
        report, _ = ev.run(args, Examples(str(questions)), str(out), taught)
        return report, read(os.path.join(out, "predictions.json"))

    return ask


@pytest.fixture(scope="module")
def ragged(tiny, tmp_path_factory):
    """Questions of 3 to 90 words on clips of 0.1 to 3 s, on two clips and on none, one of them missing."""
    folder, rows = tmp_path_factory.mktemp("ragged"), []
    for i, e in enumerate(itertools.islice(Examples(tiny.questions), 8)):
        wave, rate_hz = soundfile.read(e.audio)
        soundfile.write(
            folder / f"{i}.wav", np.tile(wave, 8)[: int(rate_hz * (0.1, 3, 1, 0.5, 2)[i % 5])], rate_hz
        )
        row = dict(
            id=str(i),
            audio=f"{i}.wav",
            question="What is this? " * (1, 3, 30, 10)[i % 4],
            choices=e.choices[: 2 + i % 3],
            answer=i % 2,
        )
        rows.append(
            row
            | (
                {"audio": [f"{i}.wav", "0.wav"]}
                if i == 4
                else {"audio": None}
                if i == 5
                else {"audio": "gone.wav"}
                if i == 6
                else {}
            )
        )
    return save(folder / "q.jsonl", rows)


def test_batches_change_nothing(ask, ragged, tmp_path):
    """The same predictions, byte for byte, for batches of 1, 3 and 16, greedy and sampled, however many rows decode at once."""
    for words in ([], ["--samples", 2]):
        seen = []
        for size in (["--batch_size", 1], ["--batch_size", 3], ["--batch_size", 16], ["--rollout_rows", 2]):
            out = tmp_path / " ".join(map(str, words + size))
            ask(ragged, out, *size, *words)
            seen.append((out / "predictions.json").read_bytes())
        assert len(set(seen)) == 1
    said = {t for p in json.loads(seen[0]) for row in p.get("samples", []) for t in row}
    assert len(said) > 5 and ask(ragged, tmp_path / "seed", "--seed", 1, *words)[1] != json.loads(seen[0])


def test_the_tower_hears_a_clip_once_and_a_prompt_is_read_once(ask, taught, tmp_path, monkeypatch):
    """30 s clips: one run of the tower a clip for any number of samples and rotations, one prefill an item and rotation."""
    for i in range(2):
        soundfile.write(
            tmp_path / f"{i}.wav", np.sin(np.arange(30 * data.RATE_HZ) / (5 + i)) / 2, data.RATE_HZ
        )
    questions = save(tmp_path / "q.jsonl", [asks(i, audio=f"{i}.wav", choices=NAMES[:3]) for i in range(2)])
    count = collections.Counter()
    encode, read_prompts = taught.encode_audio, og.read

    def hearing(mels):
        count["clips"] += len(mels)
        count["frames"] += sum(mel.shape[1] for mel in mels)
        return encode(mels)

    def reading(policy, prompts):
        count["prompts"] += len(prompts)
        return read_prompts(policy, prompts)

    monkeypatch.setattr(taught, "encode_audio", hearing)
    monkeypatch.setattr(og, "read", reading)
    for name, words, prompts in (
        ("one", [], 2),
        ("four", ["--samples", 4], 2),
        ("rotated", ["--rotate_choices"], 6),
    ):
        count.clear()
        ask(questions, tmp_path / name, "--batch_size", 2, "--rollout_rows", 4, *words)
        assert count == dict(clips=2, frames=6000, prompts=prompts)
    count.clear()
    ask(questions, tmp_path / "four", "--samples", 4)  # all is answered
    assert not count


DIE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch
import data, eval as ev, omni_grpo as og
torch.set_num_threads(1)
policy, rollout, replace, n = og.load_policy(og.Config(model={model!r}), train=False), og.rollout, os.replace, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def in_the_second_rollout():
    def dying(*args):
        global n
        n += 1
        return rollout(*args) if n < 2 else die()
    og.rollout = dying

class Torn:  # as much of the answers as had reached the disk
    def __init__(self, path, *args, **kwargs):
        self.path, self.file = path, open(path, *args, **kwargs)
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def flush(self):
        global n
        n += 1
        self.file.flush()
        if n == 2:
            os.truncate(self.path, os.path.getsize(self.path) - 20)
            die()

def in_a_line():
    ev.open = lambda path, mode="r", **kw: (Torn if path.endswith("items.jsonl") and mode == "a" else open)(path, mode, **kw)

def before_the_report():
    os.replace = lambda a, b: die() if b.endswith("report.json") else replace(a, b)

args = ev.parse_args({words!r})
for moment in (in_the_second_rollout, in_a_line, before_the_report):
    pid = os.fork()
    if not pid:
        torch.set_num_threads(1)  # torch renews its pool after a fork, and not safely from several threads at once
        moment()
        ev.run(args, data.Examples(args.data), args.out, policy)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(args.out + "/items.jsonl", "rb") as f:
        print(code, f.read().count(b"\\n"), os.path.exists(args.out + "/report.json"))
"""


def test_kill_at_three_moments(ask, tiny, tmp_path):
    """kill -9 in a rollout, with half a line on the disk, and before the report is in place, each time going on from there:
    the files are those of the run never killed, and no answer was asked for twice."""
    words = [
        "--data",
        tiny.questions,
        "--model",
        tiny.base,
        "--out",
        str(tmp_path / "killed"),
        "--max_new_tokens",
        "6",
        "--limit",
        "8",
        "--batch_size",
        "2",
        "--samples",
        "2",
    ]
    code = DIE.format(root=ROOT, model=tiny.base, words=words)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{-signal.SIGKILL} {n} False" for n in (2, 5, 8)], done.stderr
    before, threads = (tmp_path / "killed" / "items.jsonl").read_bytes(), torch.get_num_threads()
    torch.set_num_threads(1)  # as in the killed run: another number of threads sums in another order
    try:
        ask(tiny.questions, tmp_path / "killed", *words[8:])
        ask(tiny.questions, tmp_path / "whole", *words[8:])
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "killed" / "items.jsonl").read_bytes() == before
    for name in ("predictions.json", "report.json", "examples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_the_program(tiny, tmp_path, capsys):
    """main() with the tiny base: the files, and the table on the screen."""
    out = tmp_path / "out"
    assert ev.main(["--data", tiny.questions, "--model", tiny.base, "--out", str(out), "--limit", "4"]) == 0
    assert {f.name for f in out.iterdir()} == {
        "config.json",
        "items.jsonl",
        "predictions.json",
        "report.json",
        "report.html",
        "examples.jsonl",
    }
    report = read(str(out / "report.json"))
    assert (
        report["n"] == 4
        and report["model"] == tiny.base
        and report["model_fingerprint"] == ev.fingerprint(tiny.base)
    )
    said = capsys.readouterr().out
    assert (
        f"| **all** | 4 | **{100 * report['accuracy']:.1f}** |" in said
        and "without listening: random 25.0" in said
    )


# ---- report.html


EVIL = "<script>document.title = 'owned'; console.error(1)</script></script><img src=x onerror=alert(1)> &lt;b&gt; __DATA__"
DRIVE = """
<script>
(async () => {
  const wait = () => new Promise(r => setTimeout(r, 50)), seen = {}, search = document.getElementById("search");
  const shown = () => [...document.querySelectorAll("#items .item")].map(i => i.firstChild.textContent.split(" ")[0]);
  for (const b of [...document.querySelectorAll("nav button")]) { b.click(); await wait(); seen[b.dataset.kind] = shown(); }
  location.hash = "all"; await wait();
  search.value = "NUMBER 2"; search.oninput(); seen.search = shown();
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
})();
</script></html>"""


def browse(path, profile) -> tuple[str, str]:
    """-> (the page as the browser sees it once its script has run, what the console says)"""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-sync --disable-component-update --virtual-time-budget=3000 --enable-logging=stderr --dump-dom"
    ).split()
    done = subprocess.run(
        [shutil.which("chromium"), *flags, f"--user-data-dir={profile}", f"file://{path}"],
        timeout=60,
        capture_output=True,
        text=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture
def reported(lab):
    """Two runs compared: 0 right in both, 1 won, 2 lost, 3 unresolved, 4 unheard, 5 all markup and wrong."""
    rows = [
        *(asks(i) for i in range(4)),
        asks(4, audio="gone.wav"),
        asks(5, question=EVIL, choices=[EVIL, "cat"], answer=1, meta={"category": EVIL, "task": "__DATA__"}),
    ]
    said = [(NAMES[0], EVIL, NAMES[2], EVIL, "", EVIL), (NAMES[0], NAMES[1], "cat", EVIL, "", EVIL)]
    base, new = (
        lab(rows, lambda e, w, n, s=s: s[int(e.id[1:])], out=out) for s, out in zip(said, ("base", "new"))
    )
    assert ev.main(["--compare", base.out, new.out]) == 0
    return os.path.join(new.out, "report.html")


def test_a_category_cannot_break_the_table(lab, capsys):
    """However it is spelt it is one cell of one row."""
    names = ["a|b", "c\nd | e", "\u2028f\r\n|", "| - |", "plain"]
    done = lab([asks(i, meta=dict(category=name)) for i, name in enumerate(names)], hears)
    assert ev.main(["--compare", done.out, done.out]) == 0
    for text, width in ((done.stdout, 5), (capsys.readouterr().out, 9)):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if "|" in line]
        assert {len(row) for row in rows} == {width} and len(rows) == 8
    with open(os.path.join(done.out, "report.html"), encoding="utf-8") as f:
        cells = [
            re.findall("<td>(.*?)</td>", row)
            for row in re.findall("<tr>(.*?)</tr>", f.read().partition("<nav>")[0])
        ]
    cells = [row for row in cells if row and row[0].startswith("category")]
    assert sorted(row[0] for row in cells) == sorted("category: " + " ".join(name.split()) for name in names)
    assert {len(row) for row in cells} == {5}


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_in_a_browser(reported, tmp_path):
    """Players, filters, search, no console error, and markup in a question is text."""
    dom, console = browse(reported + "#wrong", tmp_path / "profile")
    assert not console
    assert re.findall(r'class="item (\w+)"><div class="small">(\w+)', dom) == [
        ("wrong", "q2"),
        ("unresolved", "q3"),
        ("unresolved", "q4"),
        ("wrong", "q5"),
    ]
    assert (
        len(re.findall(r'<audio [^>]*controls=""[^>]*src="data:audio/ogg;base64,', dom)) == 3
    )  # the clip of q4 is not there
    assert '<span id="count" class="small">4 of 6</span>' in dom and "gone.wav: no such file" in dom
    assert (
        "<title>q.jsonl: " in dom
        and ">task: __DATA__<" in dom
        and "<img" not in dom.split('<script id="data"')[0]
    )
    assert html.escape(EVIL, quote=False) in dom and dom.count("<script>") == 1
    with open(reported, encoding="utf-8") as f:
        page = f.read()
    driven = tmp_path / "driven.html"
    driven.write_text(page.replace("</html>", DRIVE), encoding="utf-8")
    dom, console = browse(driven, tmp_path / "profile")
    assert not console
    assert json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom)[1])) == dict(
        all=["q0", "q1", "q2", "q3", "q4", "q5"],
        wrong=["q2", "q3", "q4", "q5"],
        right=["q0", "q1"],
        unresolved=["q3", "q4"],
        flipped=["q1", "q2"],
        unheard=["q4"],
        search=["q2"],
    )


def test_the_page_holds_its_sounds_and_nothing_from_outside(reported):
    """Each clip is in the page once, decodes, and lasts as long as it did; nothing is fetched; no tag ends the data."""
    with open(reported, encoding="utf-8") as f:
        page = f.read()
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(""", page.split('<script id="data"')[0]
    )
    packed = json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    )
    assert packed["items"][5]["question"] == EVIL and len(packed["items"]) == 6 and len(packed["clips"]) == 4
    for path, uri in packed["clips"].items():
        wave, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        level = (NAMES.index(os.path.splitext(os.path.basename(path))[0]) + 1) / 10
        assert rate_hz == data.RATE_HZ and len(wave) == 800 and abs(np.median(wave) - level) < 0.05


def test_past_its_budget_the_page_links_to_the_files(clips):
    results = [
        Result(Example(n, str(clips / f"{n}.wav"), "?", NAMES, i), n, [[n]]) for i, n in enumerate(NAMES)
    ]
    examples = SimpleNamespace(format="own", path="q.jsonl", version="", skipped={})
    page = ev.page(ev.report_of(results, examples, {}), results, 30.0, budget_mib=1e-6)
    packed = json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL)[1])["clips"]
    assert [uri.partition(":")[0] for uri in packed.values()] == ["data", "file", "file", "file"]
    assert packed[str(clips / "cat.wav")] == f"file://{clips / 'cat.wav'}"
