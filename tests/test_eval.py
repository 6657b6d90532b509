"""Evaluation: the benchmarks' rules on hand values, every statistic against its closed form, and that a model
with ears, one without and one that likes the first choice get the scores they deserve. The model is mostly a
function; for batches and kills it is the tiny base."""

import base64
import collections
import functools
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import data
import eval as ev
import model
import omni_grpo
import runs
from data import DataError, Example, Examples, UserError
from eval import Item
from test_data import cells
from tools import pages

ROOT = os.path.dirname(os.path.abspath(ev.__file__))
MINI = os.path.join(ROOT, "..", "shared", "data", "mmau-test-mini.json")
NAMES = ["dog", "cat", "rain", "bell"]  # in the clip of NAMES[i] every sample is (i + 1) / 10


def asks(i: int, **changes) -> dict:
    """Question i: its clip and its answer are NAMES[i % 4], which stands at place i % 4."""
    clip = f"{NAMES[i % 4]}.wav"
    return dict(id=f"q{i}", audio=clip, question=f"Number {i}?", choices=NAMES, answer=i % 4) | changes


def asking(n: int, **changes) -> list[dict]:
    return [asks(i, **changes) for i in range(n)]


# What a model says: (example as shown, clips, number of the sample) -> text, or (text, heard again, refused)


def hears(example, waves, n):
    return NAMES[round(float(waves[0][0]) * 10) - 1] if waves and waves[0].any() else "Silence."


def knows(example, waves, n):
    return example.choices[example.answer]


def says(text):
    return lambda *_: text


def hears_if(condition):
    """Of the number of the question."""
    return lambda e, w, n: hears(e, w, n) if condition(int(e.id[1:])) else "none"


def read(path):
    with open(path, encoding="utf-8", newline="") as f:
        if str(path).endswith(".html"):
            return f.read()
        return [json.loads(line) for line in f] if str(path).endswith(".jsonl") else json.load(f)


def save(path, content) -> str:
    """bytes, rows as lines (.jsonl), or one JSON value"""
    if not isinstance(content, bytes):
        rows = content if str(path).endswith(".jsonl") else [content]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(content)
    return str(path)


def pick(values: dict, names: str) -> list:
    return [values[name] for name in names.split()]


def shows(text: str, lines: str) -> bool:
    """Every one of the lines stands somewhere in the text."""
    missing = [line for line in lines.split("\n") if line.strip() not in text]
    assert not missing, (missing, text)
    return True


def page_of(path) -> SimpleNamespace:
    """A page: .items (group, state, title, html), .sounds ([address, seconds] of each), .head"""
    page, items = read(path), []
    for group, body in re.findall(r"<summary>(.*?): \d+</summary>(.*?)</details>", page, re.DOTALL):
        for item in body.split('<div class="item ')[1:]:
            state, title = re.match(r'(\w+)"><div class="small">(.*?)</div>', item, re.DOTALL).groups()
            items.append((group, state, html.unescape(title), item))
    sounds = re.search(r'<script id="sounds" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    return SimpleNamespace(page=page, items=items, sounds=json.loads(sounds), head=page.split("<details")[0])


def clip_in(address: str) -> str:
    """The name of a clip that is inside a page."""
    wave, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert rate_hz == data.RATE_HZ and len(wave) == 800
    return NAMES[round(np.median(wave) * 10) - 1]


@pytest.fixture
def clips(tmp_path):
    for i, name in enumerate(NAMES, 1):
        soundfile.write(tmp_path / f"{name}.wav", np.full(800, i / 10), data.RATE_HZ)
    return tmp_path


@pytest.fixture
def lab(clips, monkeypatch, capsys):
    """lab(rows, say, flags) runs the program on questions with a model that answers as `say` does.

    -> report, predictions, raw (what they hold word for word), rated (examples.jsonl), shown (ids of the
    examples the model saw), last (the last of them), cfg, decoding (samples, temperature, longest), said,
    error. rows None: as before.
    """
    policy = SimpleNamespace(cfg=None)

    def load_clips_of(policy, cfg, example):
        waves = [data.load_audio(c, cfg.max_audio_s)[0] for c in example.clips if cfg.audio != "none"]
        return [wave * (cfg.audio != "silence") for wave in waves], False

    def rollout(policy, cfg, prompts, clips, seeds, num_generations, temperature):
        assert len(seeds) == len(prompts) == len(clips)
        policy.cfg, policy.decoding = cfg, (num_generations, temperature, cfg.new_tokens)
        groups = []
        for (example, waves), heard in zip(prompts, clips):
            assert waves is heard
            policy.shown.append(example.id)
            policy.last = example
            groups.append([completion(policy.say(example, waves, k)) for k in range(num_generations)])
        return groups

    def completion(said):
        text, heard, refused = said if isinstance(said, tuple) else (said, [], {})
        return SimpleNamespace(text=text, heard=heard, refused=collections.Counter(refused))

    monkeypatch.setattr(omni_grpo, "load_run_policy", lambda cfg, train=True: policy)
    monkeypatch.setattr(omni_grpo, "load_clips_of", load_clips_of)
    monkeypatch.setattr(omni_grpo, "rollout", rollout)
    monkeypatch.setattr(model, "embed_clips", lambda policy, clips: clips)
    monkeypatch.setattr(model, "encode_prompt", lambda policy, example, waves, prompt: (example, waves))
    monkeypatch.setattr(model, "completion_text", lambda policy, completion: completion.text)
    monkeypatch.chdir(clips)
    (clips / "model").mkdir()
    save(clips / "model" / "config.json", {})

    def lab(rows, say, flags="", out="out", name="q.jsonl", code=0):
        if rows is not None:
            save(clips / name, rows)
        policy.say, policy.shown = say, []
        got = ev.main(f"--data {name} --model model --out {out} {flags}".split())
        said, error = capsys.readouterr()
        assert got == code and "Traceback" not in error, error
        done = SimpleNamespace(**vars(policy), said=said, error=error, predictions=[])
        files = dict(report="report.json", predictions="predictions.json", rated="examples.jsonl")
        for attribute, name in files.items():
            if os.path.isfile(f"{out}/{name}"):
                setattr(done, attribute, read(f"{out}/{name}"))
        done.raw = [p["raw_output"] for p in done.predictions]
        return done

    return lab


@pytest.fixture
def main(capsys):
    """main(flags) -> what it prints, or with code=2 what it complains about"""

    def main(flags, code=0):
        capsys.readouterr()
        assert ev.main(flags.split()) == code
        said, error = capsys.readouterr()
        assert code == 0 or error.startswith("error: ") and len(error) < 4000
        return error if code else said

    return main


@pytest.fixture
def score(tmp_path):
    """score(predictions, questions or None) -> report"""

    def score(rows, asked=None):
        questions = save(tmp_path / "q.json", asked) if asked else ""
        return ev.score_file(save(tmp_path / "p.json", rows), ev.Options(data=questions))

    return score


def example_of(*choices, answer=0) -> Example:
    return Example("1", None, "?", list(choices), answer)


def item_of(example, *said) -> Item:
    """An item with what was said in each rotation."""
    return Item(example, "", lines={r: dict(said=list(texts), error="") for r, texts in enumerate(said)})


# ---- the benchmarks' rules


def test_word_rule():
    """All words of the answer, and none that only another choice has; neither order, counts nor case matter.

    A letter is a word: where another choice holds it, "A. text" is wrong. A part of the answer is right.
    """
    example = example_of("a cat", "a dog barking", "Dog, barking a!", answer=1)
    right = "a dog barking|Barking: DOG, a|a a dog dog barking loudly|A. a dog barking|(B) a dog barking"
    for text in (right + "|The answer is a dog barking").split("|"):
        assert ev.word_rule(text, example) is True, text
    for text in "dog barking|a dog barking, no cat||...|a_dog barking".split("|"):
        assert ev.word_rule(text, example) is False, text
    example = example_of("drum", "a flute", "C# minor", "C minor")
    assert not ev.word_rule("A. drum", example) and ev.word_rule("B. drum", example)
    assert ev.word_rule("C minor", example_of("C# minor", "C minor"))
    assert not ev.word_rule("red blue", example_of("red", "red blue"))
    assert ev.word_rule("blue red", example_of("red blue", "red"))


def test_letter_rule():
    """First character, else the last but one, if it is A to D; all else is left out of the count."""
    texts = {
        True: "A|A.| A. dog|A dog is barking|Answer: B|(A)|\nA\n|the answer is\nA\n.",
        False: "B|Because it is a dog|Dog barking|C|D",
        None: "b||a|<answer>B</answer>|E",
    }
    for verdict, said in texts.items():
        for text in said.split("|"):
            assert ev.letter_rule(text, example_of("dog", "cat", "rain")) is verdict, text
    assert ev.letter_rule("C", example_of("dog", "cat", "dog")) is True  # it goes by the text of the choice


@pytest.fixture(scope="module")
def mini():
    if not os.path.exists(MINI):
        pytest.skip("the benchmark's file is not here")
    return read(MINI)


# what is said of an answer and its letter | right by the official rule | resolved and right
FORMS = """
{answer} | 1000 | 1000
"{answer}" | 1000 | 1000
The answer is {answer}. | 907 | 1000
{letter}. {answer} | 967 | 1000
({letter}) {answer} | 967 | 1000
<answer>{answer}</answer> | 1000 | 1000
{letter} | 2 | 998
{choices[0]} | 398 | any
{choices[0]} {choices[1]} {choices[2]} {choices[3]} | 1 | any
"""


@pytest.mark.parametrize("form, official, strict", cells(FORMS))
def test_mmau_scores_are_those_of_its_own_script(form, official, strict, mini, score, capsys):
    """v05.15.25, as counted with the published rule; the resolver is right wherever there is an answer."""
    rows = []
    for row in mini:
        letter = chr(65 + row["choices"].index(row["answer"]))
        choices = row["choices"] + [""] * 4
        said = form.format(answer=row["answer"], letter=letter, choices=choices).strip()
        rows.append(row | {"model_output": said})
    report = score(rows)
    assert pick(report, "n missing format version") == [1000, 0, "MMAU", "v05.15.25"]
    assert report["official_accuracy_raw"] == int(official) / 1000
    assert strict in ("any", f"{1000 * report['accuracy']:g}")
    baselines = dict(random=0.261, first_choice=0.398, longest_choice=0.396)
    assert report["baselines"] == pytest.approx(baselines, abs=5e-4)
    assert sum(part["n"] for part in report["by_task"].values()) == 1000
    assert shows(capsys.readouterr().out, "MMAU v05.15.25, 1000 items")


# ---- statistics


def test_wilson_closed_forms():
    z2 = 1.96**2
    assert ev.wilson(0, 0) == (0, 1)
    for n in (1, 10, 1000):
        half = 1.96 / 2 / math.sqrt(n + z2)
        forms = {0: (0, z2 / (n + z2)), 1: (n / (n + z2), 1), 0.5: (0.5 - half, 0.5 + half)}
        for p, interval in forms.items():
            assert ev.wilson(p, n) == pytest.approx(interval)
    assert ev.wilson(0.7, 1000) == pytest.approx((0.6709, 0.7276), abs=1e-4)
    for p, n in itertools.product((0, 1), range(1, 200)):
        low, high = ev.wilson(p, n)
        assert 0 <= low and high <= 1 and "-0" not in ev.percents((low, high))


def test_mcnemar_is_a_fair_coin():
    """The exact p, against every outcome of b + c throws."""
    assert ev.mcnemar(0, 5) == 2 / 32 and ev.mcnemar(1, 9) == 22 / 1024
    for b, c in itertools.product(range(6), repeat=2):
        heads = [sum(throws) for throws in itertools.product((0, 1), repeat=b + c)]
        p = sum(abs(2 * h - b - c) >= abs(b - c) for h in heads) / len(heads)
        assert ev.mcnemar(b, c) == pytest.approx(p)
    assert 0 < ev.mcnemar(400, 600) < 1e-9


def test_bootstrap_is_the_binomial():
    """Differences of 0 and 1, half of each: the mean of 100 drawn again is binomial(100, 1/2) / 100, of which
    40 to 60 hold 95 %. Where all are equal, the share that may be anywhere is Wilson's for 0 of n."""
    assert ev.bootstrap([0, 1] * 50) == (0.4, 0.6)
    assert ev.bootstrap([-1, 1] * 50) == pytest.approx((-0.2, 0.2))
    assert ev.bootstrap([0, 0, 1], seed=1) == ev.bootstrap([1, 0, 0], seed=1)
    for n in (1, 7, 1000):
        unseen = 1.96**2 / (n + 1.96**2)
        assert ev.bootstrap([0] * n) == pytest.approx((-unseen, unseen))
        assert ev.bootstrap([1] * n) == pytest.approx((1 - 2 * unseen, 1))
        assert ev.bootstrap([-0.5] * n) == pytest.approx((-0.5 - unseen / 2, -0.5 + 1.5 * unseen))


def test_half_right_items():
    """The interval is Wilson's on the items, however often each was asked: it holds what the spread gives. An
    item changes sides where it passes the half."""

    def items(right):  # of four samples each
        return [item_of(example_of("x", "y"), ["x"] * n + ["y"] * (4 - n)) for n in right]

    for right, share in (([0, 4, 4, 4], 0.75), ([2] * 10, 0.5)):  # all alike, and no certainty
        assert ev.score_part(items(right))["interval"] == ev.wilson(share, len(right))
    low, high = ev.score_part(items([1, 3] * 50))["interval"]
    half = 1.96 * 0.25 / math.sqrt(100)
    assert 0.4 < low < 0.5 - half < 0.5 + half < high < 0.6
    found = ev.compare_items(items([4, 3, 2, 1, 0]), items([3, 1, 1, 2, 1]))
    assert [len(found["lost"]), len(found["won"]), found["difference"]] == pytest.approx([2, 1, -0.1])


def test_baselines_need_no_ears():
    """Scored by the benchmark's rule, whose longest choice may hold the words of a shorter one."""
    examples = [example_of("dog", "Dog.", "the cat"), example_of("dog", "cat", answer=1)]
    examples.append(example_of("a", "bb", "cc", "bb", answer=3))
    shares = dict(random=(2 / 3 + 1 / 2 + 1 / 2) / 3, first_choice=1 / 3, longest_choice=1 / 3)
    assert ev.score_baselines(examples, ev.Benchmark()) == pytest.approx(shares)
    assert ev.score_baselines(examples[1:], ev.BENCHMARKS["MMSU"])["random"] == 0.5
    for choices in (["red", "red blue"], ["red blue", "red"]):
        scores = ev.score_baselines([example_of(*choices)], ev.BENCHMARKS["MMAU"])
        assert pick(scores, "random first_choice") == [0.5, 1]


def test_an_item_counts_what_reads_the_same():
    example = example_of("dog", "cat", "Dog!", answer=2)
    for right, texts in {1: "dog|Dog!|A|C", 0: "cat|B|A or B|"}.items():
        assert [item_of(example, [text]).score for text in texts.split("|")] == [right] * 4
    assert item_of(example).score == 0


def test_the_vote_of_equals_goes_to_the_one_said_first():
    """What resolves to nothing has no vote."""
    votes = {"cat dog dog": 1, "cat dog dog cat": 0, "? dog cat": 1, "? ?": None, "? ? ? dog": 1, "": None}
    for said, vote in votes.items():
        assert item_of(example_of("cat", "dog"), said.split()).vote == vote


# ---- rotations and samples


@pytest.mark.parametrize(
    "say, scores",
    [
        (lambda e, w, n: e.choices[0], [0.25, 0, 0, 0]),  # whatever stands there
        (says("B"), [0.25, 0, 0, 0]),
        (knows, [1, 1, 1, 0]),
        (says("cat"), [1 / 3, 1, 1 / 3, 0]),
        (says("hm"), [0, 0, 0, 12]),
    ],
)
def test_rotations(lab, say, scores):
    """Who likes a place is right once and never consistent."""
    report = lab(asking(3), say, "--rotate_choices").report
    names = "accuracy consistency right_in_every_rotation unresolved"
    assert pick(report, names) == pytest.approx(scores)


def test_rotations_of_fewer_or_equal_choices(lab):
    rows = [asks(0), asks(2, choices=NAMES[:3]), asks(4, choices=["dog", "cat", "dog"])]
    done = lab(rows, knows, "--rotate_choices")
    assert done.shown == ["q0"] * 4 + ["q2"] * 3 + ["q4"] * 3
    assert done.report["accuracy"] == done.report["consistency"] == 1  # whichever dog comes first


def test_samples(lab, clips):
    """Item i is right in i of 4 samples, the right ones last; data.py filter reads how often."""

    def say(example, waves, n):
        i = int(example.id[1:])
        return NAMES[i] if n >= 4 - i else ["bell", "bell", "no idea", "no idea"][n]

    done = lab(asking(3), say, "--samples 4")
    assert [row["meta"]["pass_rate"] for row in done.rated] == [0, 0.25, 0.5]
    scores = pick(done.report, "accuracy pass@4 samples majority answers unresolved temperature")
    assert scores == [0.25, pytest.approx(2 / 3), 4, 0, 12, 3, 1] and "pass@4: 66.7" in done.said
    assert done.predictions[1]["samples"] == [["bell", "bell", "no idea", "cat"]]
    assert data.main("filter out/examples.jsonl --pass_rate 0.1..0.4 --out kept.jsonl".split()) == 0
    assert [e.id for e in Examples("kept.jsonl")] == ["q1"]
    done = lab(None, lambda e, w, n: knows(e, w, n) if n else "bell", "--samples 3", out="most")
    assert pick(done.report, "accuracy majority") == [pytest.approx(2 / 3), 1]
    assert [p["model_output"] for p in done.predictions] == NAMES[:3] and done.raw[0] == "bell"


def test_pass_at_k_is_of_k_samples(lab):
    """Rotations are no further samples: right in one of four is a quarter."""
    flags = "--samples 2 --rotate_choices"
    done = lab(asking(1), lambda e, w, n: "dog" if n and e.answer == 2 else "cat", flags)
    assert pick(done.report, "pass@2 accuracy") == [0.25, 0.125]


DECODING = {
    "": (1, 0, 32),
    "--prompt think": (1, 0, 256),
    "--prompt caption": (1, 0, 128),
    "--samples 4": (4, 1, 32),
    "--samples 2 --temperature 0.7": (2, 0.7, 32),
    "--temperature 0.5 --max_new_tokens 5": (1, 0.5, 5),
}


@pytest.mark.parametrize("flags", DECODING)
def test_decoding_is_greedy_unless_asked(lab, flags):
    assert lab(asking(1), hears, flags).decoding == DECODING[flags]


# ---- controls


def test_controls_tell_ears_from_guesses(lab):
    """A model that hears: right with its clip, unresolved without, wrong with another's."""
    done = lab(asking(4), hears, "--controls")
    scores = {name: pick(report, "accuracy unresolved") for name, report in done.report.items()}
    assert scores == dict(real=[1, 0], silence=[0, 4], none=[0, 4], shuffled=[0, 0], rotated=[1, 0])
    assert "consistency" not in done.report["silence"]
    lines = """| silence | 0.0 | 0.0 - 49.0 | 4 | -100.0 | 0.12 |
        | rotated | 100.0 | 51.0 - 100.0 | 0 | +0.0 |  |
        rotated: the same answer in every rotation for 100.0 %"""
    assert shows(done.said, lines)
    rates = dict(pass_rate=1, pass_rate_silence=0, pass_rate_none=0, pass_rate_shuffled=0)
    assert [row["meta"] for row in done.rated] == [rates] * 4
    flags = "filter out/examples.jsonl --drop_answerable_without_audio --out kept.jsonl"
    assert data.main(flags.split()) == 0 and len(Examples("kept.jsonl")) == 4


def test_controls_need_answers_before_they_start(lab):
    done = lab(asking(2, answer=None), hears, "--controls", code=2)
    assert "no answers in this file" in done.error and not done.shown


@pytest.mark.parametrize("n_clips, n", [(2, 2), (3, 9), (5, 17)])
def test_shuffled_never_plays_its_own_clip(n_clips, n):
    """Several questions a clip; the same for the same seed; every clip is one of the file's."""
    items = [Example(str(i), f"/{i % n_clips}.wav", f"{i}?", NAMES, i % 4) for i in range(n)]
    items.append(example_of("x", "y"))  # without a clip
    orders = set()
    for seed in range(20):
        others = ev.shuffle_clips(items, seed)
        assert others == ev.shuffle_clips(items, seed) and others[-1] == items[-1]
        for own, other in zip(items[:-1], others):
            assert own.audio != other.audio and vars(own) == vars(other) | dict(audio=own.audio)
        orders.add(tuple(other.audio for other in others))
    assert set.union(*map(set, orders)) == {own.audio for own in items}
    assert len(orders) > 1 or n_clips == 2


def test_shuffled_run(lab):
    """Wrong for who hears; over the whole file, whatever the --limit: some items first is as all at once."""
    whole = lab(asking(8), hears, "--audio shuffled", out="whole")
    assert whole.report["accuracy"] == 0 and "pass_rate_shuffled" in whole.rated[0]["meta"]
    other = lab(None, hears, "--audio shuffled --seed 1", out="seed1")
    part, more = (lab(None, hears, "--audio shuffled " + limit) for limit in ("--limit 3", ""))
    assert len(part.shown) == 3 and len(more.shown) == 5 and part.predictions == whole.predictions[:3]
    assert more.predictions == whole.predictions != other.predictions
    one_clip = [asks(0), asks(4), asks(8, audio="./dog.wav")]
    error = lab(one_clip, hears, "--audio shuffled", out="one", code=2).error
    assert error == "error: --audio shuffled: all items have the same clip\n"


# ---- resume


def test_answered_items_are_not_asked_again(lab):
    assert lab(asking(5), hears, "--limit 2").shown == ["q0", "q1"]
    more = lab(None, hears, "--batch_size 2")
    assert more.shown == ["q2", "q3", "q4"] and more.report["n"] == 5
    again = lab(None, hears, "--batch_size 1 --rollout_rows 2")
    assert not again.shown and again.predictions == more.predictions
    part = lab(None, hears, "--limit 3")
    assert part.report["n"] == len(part.predictions) == len(part.rated) == 3
    assert lab(None, hears, "--limit 99").predictions == lab(None, hears, out="whole").predictions


def test_rotations_resume_one_by_one(lab, clips):
    whole = lab(asking(2), hears, "--rotate_choices")
    path = clips / "out" / "items.jsonl"
    save(path, read(path)[:5])
    again = lab(None, hears, "--rotate_choices")
    assert len(again.shown) == 3 and again.predictions == whole.predictions and again.report == whole.report


OTHER = """prompt answer|prompt caption|audio silence|samples 2|seed 1|max_new_tokens 5|temperature 0.5
max_audio_s 5|adapter a|rotate_choices|max_relistens 1|relisten_from embeddings|model_fingerprint
data_fingerprint"""


@pytest.mark.parametrize("flag", re.split(r"[|\n]", OTHER))
def test_other_settings_are_refused_by_name(lab, clips, flag):
    """And other weights, and other data of that name: the report stays."""
    before, rows = lab(asking(1), hears).report, None
    if flag == "model_fingerprint":
        (clips / "model" / "model.safetensors").write_bytes(b"other")
    elif flag == "data_fingerprint":
        rows = asking(2)[1:]
    refused = lab(rows, hears, "" if "fingerprint" in flag else f"--{flag}", code=2)
    assert flag.split()[0] in refused.error.partition("holds results of another ")[2]
    assert not refused.shown and refused.report == before


def test_a_report_is_never_that_of_other_data(lab, clips, main):
    """Whichever command wrote it, and whichever comes second."""
    rows = [row | dict(response="dog") for row in asking(4)]
    lab(rows, hears)
    lab(rows, hears, "--controls", out="controls")
    for _ in range(2):
        main("--score q.jsonl --out scored")
    save(clips / "q.jsonl", rows[1:])
    for out in ("out", "controls", "scored"):
        before = read(f"{out}/report.json")
        for flags in (
            "--score q.jsonl",
            "--data q.jsonl --model model",
            "--data q.jsonl --model model --controls",
        ):
            assert "data_fingerprint" in main(f"{flags} --out {out}", code=2)
        assert read(f"{out}/report.json") == before


def test_another_clip_is_refused(lab, clips):
    """Another --audio_dir, or another sound in the same place: the answers at hand are not about it."""
    (clips / "b").mkdir()
    for name, other in zip(NAMES, NAMES[::-1]):
        shutil.copy(clips / f"{other}.wav", clips / "b" / f"{name}.wav")
    first = lab(asking(3), hears)
    refused = lab(None, hears, "--audio_dir b", code=2)
    assert "q0 was asked on another clip" in refused.error and "give another --out" in refused.error
    assert lab(None, hears, "--audio_dir b", out="there").predictions != first.predictions
    assert not lab(None, hears).shown
    soundfile.write(clips / "cat.wav", np.full(900, 0.3), data.RATE_HZ)
    assert "q1 was asked on another clip" in lab(None, hears, code=2).error
    (clips / "cat.wav").unlink()
    assert "q1 was asked on another clip" in lab(None, hears, code=2).error


def test_clips_inside_a_parquet_file(lab, clips, main):
    """Another clip in the same row is refused; captions have a path that can be read again."""
    datasets = pytest.importorskip("datasets")
    for names in (NAMES, NAMES[::-1]):
        sounds = [{"bytes": (clips / f"{name}.wav").read_bytes(), "path": None} for name in names[:2]]
        rows = dict(audio=sounds, question=["?"] * 2, choices=[NAMES] * 2, answer=NAMES[:2])
        datasets.Dataset.from_dict(rows).to_parquet(f"{names[0]}.parquet")
    assert lab(None, hears, name="dog.parquet").raw == NAMES[:2]
    assert not lab(None, hears, name="dog.parquet").shown
    assert "holds results of another data_fingerprint" in lab(None, hears, name="bell.parquet", code=2).error
    main("--compare out out")
    lab(None, hears, "--prompt caption", name="dog.parquet", out="captions")
    written = Examples("captions/captions.jsonl")
    assert [hears(e, [data.load_audio(e.audio)[0]], 0) for e in written] == NAMES[:2]


def test_a_path_that_is_no_text_is_kept(lab, clips):
    """A folder holds names that are not UTF-8; JSON can spell them."""
    for folder, name in (("dog", b"1\xff.wav"), ("cat", b"2.wav")):
        (clips / "sounds" / folder).mkdir(parents=True)
        shutil.copy(clips / f"{folder}.wav", os.path.join(os.fsencode(clips / "sounds" / folder), name))
    assert lab(None, hears, name="sounds").report["accuracy"] == 1
    assert not lab(None, hears, name="sounds").shown


def test_a_failed_start_leaves_nothing_behind(lab, monkeypatch):
    """A misspelt adapter is found when the model is loaded; the right one may use the same --out."""

    def fails(cfg, train=True):
        raise UserError(f"--adapter {cfg.adapter}: no")

    with monkeypatch.context() as patched:
        patched.setattr(omni_grpo, "load_run_policy", fails)
        lab(asking(1), hears, "--adapter misspelt", code=2)
    assert lab(None, hears).report["accuracy"] == 1


def test_ctrl_c(lab):
    """Exit code 130, and what was answered is kept."""

    def say(example, waves, n):
        if example.id == "q2":
            raise KeyboardInterrupt
        return hears(example, waves, n)

    assert "goes on" in lab(asking(4), say, "--batch_size 2", code=130).error
    assert lab(None, hears).shown == ["q2", "q3"]


# ---- compare


def test_compare_finds_what_flipped(lab, main):
    """The base knows items 0-3, the new one 2-7 of 8: 2 lost, 4 won, p = 2 (1 + 6 + 15) / 64."""
    rows = [asks(i, meta={"task": "sound" if i % 2 else "music"}) for i in range(8)]
    lab(rows, hears_if(lambda i: i < 4), out="base")
    lab(None, hears_if(lambda i: i > 1), out="new")
    lines = """base -> new, 8 items
        | all | 8 | 50.0 | 75.0 | +25.0 |
        | 4 | 2 | 0.69 |
        | task: music | 4 | 50.0 | 75.0 |
        won: q4: Number 4? -> dog
        lost: q0: Number 0? -> none"""
    assert shows(main("--compare base new"), lines)
    found, keys = read("new/compare.json"), [ev.item_key(e) for e in Examples("q.jsonl")]
    assert (found["lost"], found["won"]) == (keys[:2], keys[4:])
    assert pick(found, "n base new difference p") == [8, 0.5, 0.75, 0.25, 2 * (1 + 6 + 15) / 64]
    assert found["interval"] == list(ev.bootstrap([-1] * 2 + [0] * 2 + [1] * 4))
    groups = collections.Counter(group for group, *_ in page_of("new/report.html").items)
    assert groups == dict(won=4, lost=2, right=2)
    assert shows(main("--compare new new"), "| 8 | 75.0 | 75.0 | +0.0 | -32.4 to +32.4 | 0 | 0 | 1 |")


def test_compare_pairs_items_and_not_lines(lab, clips, main):
    """In any order, and wherever the clips lie."""
    lab(asking(4), hears_if(lambda i: i < 2), out="a")
    shutil.copytree(clips, clips / "b")
    lab(asking(4)[::-1], hears_if(lambda i: i < 2), "--audio_dir b", out="other", name="reversed.jsonl")
    assert shows(main("--compare a other"), "| 0 | 0 | 1 |")


OTHERS = """
{"question": "Who?"} |  | items
{"answer": 2} |  | items
{"choices": ["cat", "dog"]} |  | items
{"id": "x"} |  | items
{} | --limit 1 | items
{} | --prompt answer | prompt
{} | --rotate_choices | rotate_choices
{} |  | version
"""


@pytest.mark.parametrize("change, flags, named", cells(OTHERS))
def test_compare_refuses_what_cannot_be_compared(lab, clips, main, change, flags, named):
    lab(asking(2), hears, out="a")
    b = lab([asks(0), asks(1) | json.loads(change)], hears, flags, out="b")
    if named == "version":
        save(clips / "b" / "report.json", b.report | {"version": "original"})
    assert f"have different {named} (" in main("--compare a b", code=2)
    assert not os.path.exists("b/compare.json")


LINE = dict(item="x", heard=[], rotation=0, said=["dog"], error="", again=[[]], refused=[{}])
DAMAGE = dict(
    item=(None, 1),
    rotation=(None, "0"),
    error=(None, 1),
    heard=(None, 1, [1]),
    said=(None, "dog", ["dog", 1], [["dog"]], {"dog": 1}),
    again=(3, [3], [[1]], [[["a", "b"]]]),
    refused=(3, [3], [{"long": "x"}]),
)


def test_damaged_results_are_refused(lab, clips, main):
    """In one line, by --compare and by a run that would go on; nothing is asked or changed."""
    lab(asking(1), hears, out="good")
    main("--compare good good")
    table = [(name, content) for name in ("config.json", "report.json") for content in (b"{", b"[]")]
    table += [("report.json", b'{"items_hash": "", "accuracy": 1}'), ("items.jsonl", b"1\n{}\n")]
    for key, values in DAMAGE.items():
        for value in values:
            line = {k: v for k, v in (LINE | {key: value}).items() if v is not None}
            table.append(("items.jsonl", json.dumps(line).encode() + b"\n"))
    for n, (name, content) in enumerate(table):
        broken = shutil.copytree("good", f"broken{n}") + "/" + name
        (clips / broken).write_bytes(content)
        errors = []
        if name != "config.json":
            errors.append(main(f"--compare good broken{n}", code=2))
        if name != "report.json":
            errors.append(lab(None, hears, out=f"broken{n}", code=2).error)
            assert (clips / broken).read_bytes() == content
        assert all(error.count("\n") == 1 for error in errors), (name, content)


def test_compare_refuses_what_is_no_result(lab, clips, main):
    lab(asking(1), hears)
    lab(asking(1, answer=None), hears, out="blank")
    lab(asking(2), hears, "--controls", out="controls")
    (clips / "empty").mkdir()
    for other in "empty none q.jsonl blank controls".split():
        for pair in (f"out {other}", f"{other} out"):
            assert other in main(f"--compare {pair}", code=2)


# ---- other people's predictions


def mmau(i: int, **more) -> dict:
    name = NAMES[i]
    row = dict(id=f"m{i}", audio_id=f"./{name}.wav", question="What is it?", choices=NAMES, answer=name)
    return row | dict(task=["sound", "music"][i % 2], difficulty="easy", category=["Reasoning"]) | more


MMAU = [mmau(i) for i in range(4)]
ANSWERED = [mmau(i, model_output=NAMES[i]) for i in range(4)]
MMSU = dict(task_name="t", audio_path="a.wav", question="?", choice_a="dog", choice_b="cat", answer_gt="cat")
MMSU |= dict(choice_c=None, choice_d=None)


@pytest.mark.parametrize("key", ev.PREDICTIONS[:5])
def test_every_key_is_scored(score, capsys, key):
    """A row that lacks the key, or holds null, is wrong and counted."""
    report = score([mmau(0) | {key: "It is dog."}, MMAU[1], mmau(2) | {key: None}, mmau(3) | {key: "cat"}])
    assert pick(report, "missing prediction_key unresolved") == [2, key, 0]
    assert {task: part["accuracy"] for task, part in report["by_task"].items()} == dict(sound=0.5, music=0)
    assert report["by"]["category"] == {"Reasoning": report["by"]["difficulty"]["easy"]}
    lines = """p.json: MMAU unknown version, 4 items
        | all | 4 | 25.0 | 4.6 - 69.9 | 0 |
        counted as wrong: 0 clips that could not be heard, 2 items without a prediction"""
    assert shows(capsys.readouterr().out, lines)


@pytest.mark.parametrize("ids", [["m0", "m1", "m2", "m3"], [0, 1, 2, 3], [None] * 4])
def test_predictions_join_by_id(score, ids):
    """Or by the clip: in any order, to no other item that asks the same; a row may be missing."""
    items = [row | {"id": i} for row, i in zip(MMAU, ids)]
    key = "audio_id" if None in ids else "id"
    said = [dict(question="What is it?", response=row["answer"]) | {key: row[key]} for row in items]
    other = [*said[2:], said[0] | {key: "x"}]
    for rows, right in ((said, 4), (said[::-1], 4), (said[1:3], 2), (said[:1], 1), (other, 2)):
        report = score(rows, items)
        assert pick(report, "n accuracy missing") == [4, right / 4, 4 - right]


def test_every_row_has_its_own_key(score):
    """A file merged from several: the first key of a row that is not null."""
    rows = [mmau(0, model_output="dog"), mmau(1, model_prediction="cat"), mmau(3, model_output=None)]
    rows.append(mmau(2, model_output=None, model_prediction="rain"))
    for questions in (None, MMAU):
        report = score(rows, questions)
        assert pick(report, "accuracy missing") == [0.75, 1]
        assert report["prediction_key"] == "model_output, model_prediction"


def test_predictions_join_by_what_they_have(score):
    """Ids of their own, and the right clip, or the right question: the surest name that leads to one item."""
    questions = [mmau(i, question=f"What is {i}?") for i in range(4)]
    said = [row | dict(id=i, audio_id=f"elsewhere/{NAMES[i]}.wav") for i, row in enumerate(questions)]
    for keys in ("id audio_id", "id question", "audio_id", "question", "id audio_id question"):
        rows = [dict(response=row["answer"]) | {key: row[key] for key in keys.split()} for row in said[::-1]]
        assert pick(score(rows, questions), "accuracy missing left_out") == [1, 0, []]
    with pytest.raises(DataError, match="p.json:entry 1: no row has an id, a clip or a question of "):
        score([dict(id=7, response="dog")], questions)


def test_questions_of_one_id_or_clip_have_their_own_predictions(score):
    """Told apart by the question; where a row does not hold it, it is a guess and does not count."""
    one_id = asking(3, id="x", audio="dog.wav")
    pairs = itertools.product(("dog.wav", "cat.wav"), ("a?", "b?"))
    two_clips = [asks(i, audio=audio, question=question) for i, (audio, question) in enumerate(pairs)]
    for rows, keys in ((one_id, ("id", "question")), (two_clips, ("audio", "question"))):
        said = [{key: row[key] for key in keys} | dict(response=NAMES[row["answer"]]) for row in rows]
        assert score(said[::-1], rows)["accuracy"] == 1
    said = [dict(id="x", question="Number 0?", response="dog"), dict(id="x", response="dog")]
    report = score(said, one_id)
    assert report["missing"] == 2 and [row[-7:] for row in report["left_out"]] == ["entry 2"]


def test_predictions_of_other_questions_are_refused(score):
    """Rows that hold what was asked must have asked the same: the text, the choices, and their order."""
    changes = [dict(question="Who?"), dict(question="Who?", choices=None)]
    changes += [dict(choices=x) for x in (NAMES[::-1], NAMES[:3], "dog", json.dumps(NAMES[::-1]))]
    for change in changes:
        with pytest.raises(DataError, match="p.json:entry 3: its question or choices are not those of"):
            score(ANSWERED[:2] + [row | change for row in ANSWERED[2:]], MMAU)
    for change in (dict(choices=None), dict(choices=json.dumps(NAMES)), dict(question=None), dict(answer="")):
        assert score([row | change for row in ANSWERED], MMAU)["accuracy"] == 1
    with pytest.raises(DataError, match="its question or choices"):
        score([MMSU | dict(id="c", response="B", choice_a="cat", choice_b="dog")], [MMSU | dict(id="c")])


def test_no_item_counts_twice(score, capsys):
    """Rows of an item that has one, and of none: the first counts, the others are counted and named."""
    again = mmau(0, model_output="cat")
    for questions in (None, [*MMAU, MMAU[0]]):
        report = score([*ANSWERED, again, again], questions)
        assert pick(report, "n accuracy") == [4, 1] and len(report["left_out"]) == 2
        assert shows(capsys.readouterr().out, "2 rows not counted, of no item\np.json:entry 5, ")
    rows = [dict(id="m9", model_output="dog"), dict(id="m1", model_output="cat")]
    assert pick(score(rows, MMAU), "n missing") == [4, 3] and "1 rows not" in capsys.readouterr().out
    rows = [dict(file_name="a.wav", QuestionText="Is it a dog?", answer=a) for a in ("yes", "yes", "no")]
    report = score([dict(file_name="a.wav", response="yes")], rows)  # an item of several rows
    assert pick(report, "n accuracy") == [1, 1]


def test_air_bench_predictions_join(score):
    """Many of its items ask the same and have the same choices: only the id tells them apart."""
    air = {k: v for k, v in MMSU.items() if k != "audio_path"} | dict(dataset_name="d")
    rows = [air | dict(path=f"{i}.wav", uniq_id=i) for i in range(3)]
    said = [dict(uniq_id=i, response=letter) for i, letter in enumerate("ABB")]
    assert pick(score(said[::-1], rows), "accuracy missing") == [pytest.approx(2 / 3), 0]


def test_numbers_and_lists_are_read_as_text(score):
    said = enumerate((1, "1", [1], True, ""))
    report = score([asks(i, choices=["1", "2"], answer=0, response=x) for i, x in said])
    assert pick(report, "n missing") == [5, 0] and report["accuracy"] >= 0.4


def test_pro_is_not_called_official(score, capsys):
    row = dict(audio_path=["a.wav"], question="?", choices=["x", "y"], answer="x", task_identifier="t")
    changes = (dict(model_output="x"), dict(choices=[]), dict(model_output="y"), dict(category="open"))
    report = score([row | dict(category="sound") | change for change in changes])
    assert pick(report, "format accuracy n") == ["MMAU-Pro", 0.5, 2] and "official_accuracy" not in report
    assert shows(capsys.readouterr().out, "not the official NV-Embed similarity\n2 skipped")


def test_items_left_out_by_the_letter_rule_are_counted(score):
    """Wrong in the strict score, left out of the benchmark's, and said to be."""
    answers = ["B", "b", "B. cat", "cat", "The answer is cat", "Answer: B", "<answer>B</answer>"]
    report = score([MMSU | dict(id=str(i), response=text) for i, text in enumerate(answers)])
    assert pick(report, "format accuracy official_accuracy") == ["MMSU", 1, 1]
    assert pick(report, "official_accuracy_raw_left_out official_accuracy_raw") == [4, pytest.approx(2 / 3)]
    assert list(report["by_task"]) == ["t"]


BAD_PREDICTIONS = """
[ |  | broken JSON
 |  | is empty
[1, 2] |  | expected a list or lines of JSON objects
{ |  | broken JSON
[] |  | holds no question
null |  | expected a
[{"id": "a", "model_output": "x"}] |  | unknown format
MMAU |  | no row has a prediction
[{"id": "a", "model_output": "x"}] | --data none.json | no such file
[{"id": "a"}] | --data p.json | p.json
"""


@pytest.mark.parametrize("content, flags, message", cells(BAD_PREDICTIONS.replace("MMAU", json.dumps(MMAU))))
def test_bad_predictions(tmp_path, monkeypatch, main, content, flags, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "p.json", content.encode())
    assert message in main(f"--score p.json {flags}", code=2)
    main("--score nowhere.json", code=2)
    main("--score .", code=2)


def test_score_writes_what_a_run_writes(lab, clips, main):
    """The same predictions, scores and page, sounds and all; an item that stands twice is one."""
    done = lab(MMAU, hears, name="q.json")
    save(clips / "twice.json", [MMAU[0], *MMAU])
    main("--score out/predictions.json --data twice.json --audio_dir . --out scored")
    assert sorted(os.listdir("scored")) == ["config.json", "predictions.json", "report.html", "report.json"]
    assert read("scored/predictions.json") == done.predictions
    names = "n accuracy interval by official_accuracy baselines"
    assert pick(read("scored/report.json"), names) == pick(done.report, names)
    page = page_of("scored/report.html")
    assert page.items == page_of("out/report.html").items
    assert sorted(clip_in(address) for address, _ in page.sounds) == sorted(NAMES)


def test_from_the_shell(tmp_path):
    """Exit codes and messages are those of the program, too; --score needs no model and no torch."""

    def run(*words):
        flags = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT}, timeout=60)
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, **flags)

    code = (
        "import sys, eval; code = eval.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    save(tmp_path / "p.jsonl", ANSWERED)
    done = run("-c", code, "--score", "p.jsonl")
    assert (done.returncode, done.stderr) == (0, "") and "| all | 4 | 100.0 |" in done.stdout
    save(tmp_path / "bad.json", b"[{]")
    done = run(f"{ROOT}/eval.py", "--score", "bad.json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: bad.json: broken JSON")


BAD = """|--samples 0|--data q --samples 2 --temperature 0|--data q --batch_size 0|--limit -1|--dta q
--compare a|--data q --max_audio_s 301|--data q --temperature nan|--data q --audio loud|--data q --prompt none
--data q --max_relistens -2|--data q --relisten_from ear"""
IGNORED = """
--compare a b --limit 3 | --limit | --compare
--compare a b --out x | --out | --compare
--compare a b --score p | --score | --compare
--score p --data q --model m | --model | --score
--score p --prompt caption | --prompt | --score
--data q --controls --audio none | --audio | --controls
--data q --controls --rotate_choices | --rotate_choices | --controls
--data q --prompt caption --controls | --controls | --prompt caption
--data q --prompt caption --audio shuffled | --audio | --prompt caption
--data q --prompt caption --rotate_choices | --rotate_choices | --prompt caption
"""


def test_bad_flags(main):
    for flags in re.split(r"[|\n]", BAD):
        main(flags, code=2)


def test_a_flag_that_would_be_ignored_is_refused(main):
    for flags, flag, mode in cells(IGNORED):
        assert main(flags, code=2) == f"error: {flag}: has no part in {mode}\n"
    used = "--score none.json --data q --audio_dir x --out y --max_audio_s 5"
    for flags in (used, "--compare none b --max_audio_s 5", "--data none.json --audio none --rotate_choices"):
        assert "no such file" in main(flags, code=2)


# ---- predictions in the benchmark's own layout


def test_mmau_layout(lab, score):
    """The rows of the file, in its order and with nothing lost, and all keys of predictions."""

    def say(example, waves, n):
        return "a bird" if example.id == "m3" else f"It is a {hears(example, waves, n)}."

    done = lab(MMAU, say, name="q.json")
    given = [(name, f"It is a {name}.", i) for i, name in enumerate(NAMES)]
    given[3] = "a bird", "a bird", None
    for row, p, (text, raw, resolved) in zip(MMAU, done.predictions, given):
        assert {k: p[k] for k in row} == row and list(p)[: len(row)] == list(row)
        assert pick(p, "model_output model_prediction answer_prediction") == [text] * 3
        assert pick(p, "raw_output resolved") == [raw, resolved]
    names = "accuracy official_accuracy unresolved official_accuracy_raw baselines version"
    assert pick(done.report, names)[:3] == [0.75, 0.75, 1]
    assert pick(score(done.predictions), names) == pick(done.report, names)


def test_hub_layout_keeps_its_letters(lab, score):
    """Its script compares with "(A) dog", so that is what it is given; the model sees bare choices."""
    lettered, rows = [f"({c}) {n}" for c, n in zip("ABCD", NAMES)], []
    for i in range(3):
        row = dict(context=f"{NAMES[i]}.wav", instruction="What is it?", choices=lettered, answer=lettered[i])
        rows.append(row | dict(other_attributes=json.dumps(dict(id=f"h{i}", task="sound"))))
    done = lab(rows, hears)
    assert done.last.choices == NAMES and pick(done.report, "format accuracy") == ["MMAU (Hub)", 1]
    assert [p["model_output"] for p in done.predictions] == lettered[:3]
    assert score(done.predictions)["accuracy"] == 1


def test_mmsu_layout_answers_with_letters(lab):
    rows = [MMSU | dict(id=f"c{i}", audio_path=f"{NAMES[i]}.wav", answer_gt=NAMES[i]) for i in range(3)]
    rows[2]["choice_c"] = "rain"
    done = lab(rows, hears)
    answers = [pick(p, "response model_output choice_c") for p in done.predictions]
    assert answers == [["A", "dog", None], ["B", "cat", None], ["C", "rain", "rain"]]
    assert pick(done.report, "official_accuracy official_accuracy_raw_left_out") == [1, 3]


def test_blank_answers_are_written_and_not_scored(lab, score):
    """A test set that withholds its answers, or some; clips that are not there are named all the same."""
    done = lab([row | {"answer": ""} for row in MMAU], hears, name="q.json")
    assert [pick(p, "model_output answer") for p in done.predictions] == [[name, ""] for name in NAMES]
    assert "accuracy" not in done.report and "nothing to score" in done.said and "%" not in done.said
    assert done.report["version"] == "answers withheld"
    score(done.predictions)
    done = lab([asks(0, answer=None), asks(1, answer=None, audio="gone.wav")], hears, out="gone")
    lines = "nothing to score\nnot answered: 1 clips that could not be heard\ngone.wav: no such file"
    assert shows(done.said, lines) and done.report["errors"] == 1
    done = lab([asks(0), asks(1, answer=None), asks(2, answer=0)], hears, out="some")
    assert pick(done.report, "n items accuracy") == [2, 3, 0.5] and len(done.predictions) == 3


# ---- odd data


def test_a_missing_clip_is_wrong_and_listed(lab, clips):
    """Never skipped: the count stays, the message names the file, and predictions and page have the item. The
    same command tries it again."""
    save(clips / "text.wav", b"no sound")
    rows = [asks(0), asks(1, audio="gone.wav"), asks(2), asks(3, audio="text.wav")]
    done = lab(rows, hears, "--batch_size 2")
    assert pick(done.report, "n accuracy errors missing") == [4, 0.5, 2, 0]
    assert ["gone.wav" in why for why in done.report["error_items"].values()] == [True, False]
    assert shows(done.said, "counted as wrong: 2 clips that could not be heard\ngone.wav: no such file")
    assert ["no such file" in p.get("error", "") for p in done.predictions] == [False, True, False, False]
    assert [row["meta"]["pass_rate"] for row in done.rated] == [1, 0, 1, 0]
    groups = [(group, "no such file" in item) for group, _, _, item in page_of("out/report.html").items]
    assert groups == [("unheard", True), ("unheard", False), ("right", False), ("right", False)]
    rotated = lab(None, hears, "--rotate_choices --samples 2", out="rotated").report
    assert pick(rotated, "accuracy right_in_every_rotation pass@2 majority consistency") == [0.5] * 4 + [1]
    shutil.copy("cat.wav", "gone.wav")
    again = lab(None, hears)
    assert again.shown == ["q1"] and pick(again.report, "accuracy errors") == [0.75, 1]


@pytest.mark.parametrize(
    "flags", ["", "--rotate_choices", "--audio silence", "--controls", "--prompt caption"]
)
def test_where_no_clip_is_heard_there_is_no_result(lab, flags):
    """An error, and nothing that looks like a score, whatever a question without a clip gets. Where no clip
    is to be heard there is none to miss."""
    rows = [asks(0, audio=None), asks(1, audio="away.wav"), asks(2, audio="gone.wav")]
    done = lab(rows, hears, flags, code=2)
    assert "no clip could be heard, of 2 items: " in done.error and "away.wav: no such file" in done.error
    assert not [name for _, _, names in os.walk("out") for name in names if name.startswith("report")]
    assert lab(rows, hears, "--audio none", out="none").report["accuracy"] == 0
    assert lab(rows[:1], hears, out="text").report["accuracy"] == 0


def test_items_that_look_alike(lab, main):
    """The same item twice, and items of one id that share all but the clip: each has its own answer."""
    same = dict(id="x", question="?", answer=1)
    for rows, accuracy, out in (([asks(0), asks(1), asks(0)], 1, "a"), (asking(3, **same), 1 / 3, "b")):
        done = lab(rows, hears, out=out)
        assert done.raw == [row["audio"][:-4] for row in rows]
        assert pick(done.report, "n accuracy") == [3, pytest.approx(accuracy)]
        again = lab(None, hears, out=out)
        assert not again.shown and again.predictions == done.predictions
        main(f"--compare {out} {out}")


def test_items_without_choices(lab):
    done = lab([asks(0), asks(1, choices=None, answer=None)], hears, "--rotate_choices")
    assert pick(done.report, "n items accuracy") == [1, 2, 1]
    assert pick(done.predictions[1], "raw_output resolved") == ["cat", None]


def test_countdown_is_scored(lab):
    """By its reward, which reads <answer>: the prompt asks for it unless told otherwise."""
    done = lab([dict(nums=[3, 4, 5], target=12)], says("<answer>3 + 4 + 5</answer>"))
    assert pick(done.report, "items accuracy prompt") == [1, 1, "answer"]
    sampled = lab(None, lambda e, w, n: f"<answer>{n} + 12</answer>", "--samples 2", out="sampled")
    assert sampled.report["pass@2"] == 0 and "majority" not in sampled.report
    assert lab(None, says("12"), "--prompt think", out="think").report["prompt"] == "think"
    assert lab(asking(1), hears, out="other").report["prompt"] == "direct"


def test_files_of_labels_and_captions(lab):
    """Labels become questions; captions are described and not scored."""
    rows = "audio,label\n" + "".join(f"{name}.wav,{name}\n" for name in NAMES)
    done = lab(rows.encode(), hears, name="labels.csv")
    assert pick(done.report, "format n accuracy") == ["labels", 4, 1]
    assert [p["label"] for p in done.predictions] == NAMES
    rows = [dict(audio=f"{name}.wav", captions=[f"a {name}", "a sound"]) for name in NAMES]
    assert lab(rows, hears, out="captions", name="captions.jsonl").raw == NAMES


def test_several_clips_a_question(lab, clips):
    rows = [asks(1, audio=None), asks(0, audio=["dog.wav", "cat.wav"])]
    done = lab(rows, lambda e, waves, n: NAMES[len(waves)])
    assert done.raw == ["dog", "rain"]
    assert done.last.clips == [str(clips / "dog.wav"), str(clips / "cat.wav")]


def test_unicode_survives(lab, main):
    """Half a character, too: JSON can write it, UTF-8 cannot, and it must not end a run that has answered."""
    choices, question = ["Hund 🐕", "Kätzchen", "雨"], "Was hört man? 犬 🐕\u2028"
    rows = [asks(0, id="é", question=question, choices=choices, answer=2), asks(1)]
    rows.append(asks(2, id="\ud800", comment="\udfff"))
    done = lab(rows, lambda e, w, n: "雨\u2028\r\n" if e.id == "é" else hears(e, w, n))
    assert done.report["accuracy"] == 1 and done.rated[0]["question"] == question
    assert pick(done.predictions[0], "raw_output model_output") == ["雨\u2028\r\n", "雨"]
    assert not lab(None, hears).shown
    main("--compare out out")


GOOD = json.dumps(asks(0))
BAD_DATA = f"""
{{ |  | q.jsonl:1: broken JSON
 |  | q.jsonl: is empty
{{"a": 1}} |  | unknown format
{json.dumps(asks(0, answer=9))} |  | q.jsonl:1: field "answer"
{json.dumps(asks(1, choices=["x"]))} |  | q.jsonl:1: field "choices"
{GOOD} | --model nowhere | --model nowhere:
{GOOD} | --data none.jsonl | none.jsonl: no such file
{GOOD} | --out q.jsonl | q.jsonl:
{GOOD} | --out q.jsonl/x | q.jsonl/x:
"""


@pytest.mark.parametrize("row, flags, message", cells(BAD_DATA))
def test_bad_data_and_bad_out(lab, row, flags, message):
    done = lab(row.encode(), hears, flags, code=2)
    assert done.error.startswith("error: ") and message in done.error and not done.shown


def test_answers_that_are_no_choices_are_refused(lab):
    done = lab([row | {"answer": "x"} for row in MMAU] * 6, hears, code=2)
    assert "24 answers are not among their choices" in done.error and not done.shown


def test_captions_are_read_by_the_loader(lab, clips):
    """k texts a clip, asked once a clip however many questions it has; what cannot be heard is left out, and
    said to be."""
    rows = [asks(0), asks(4), asks(1), asks(2, audio="gone.wav"), asks(3, audio=None)]
    flags = "--prompt caption --samples 3"
    done = lab(rows, lambda e, w, n: f"{hears(e, w, n)} {n} é", flags)
    written = Examples("out/captions.jsonl")
    assert written.format == "captions" and len(written) == 2
    for e, name in zip(written, NAMES):
        assert (e.audio, e.target) == (f"{clips}/{name}.wav", [f"{name} {k} é" for k in range(3)])
    assert shows(done.said, "2 clips, 3 captions each; 1 clips could not be heard")
    assert len(done.shown) == 2 and not done.last.choices and not lab(None, hears, flags).shown


# ---- re-listening

SAID = "<think>I hear <seg>0.5, 1.25</seg> a bell, and <seg>9, 12</seg>, <seg>3.0, 3.4</seg>.</think>dog"


def hears_again(example, waves, n):
    """Parts of the clip of question i: the first i of two; one was outside."""
    return SAID, [[0.5, 1.25], [3.0, 3.217]][: int(example.id[1:])], {"outside": 1}


def test_an_evaluation_hears_again(lab):
    """Counted over all answers; the page tells what was heard from what was refused."""
    done = lab(asking(3), hears_again, "--prompt relisten --samples 2")
    assert (done.cfg.relistens, done.cfg.prompt, done.cfg.relisten_from) == (8, "relisten", "audio")
    names = "heard_again heard_again_share accuracy refused"
    assert pick(done.report, names) == [1, pytest.approx(2 / 3), pytest.approx(1 / 3), {"outside": 6}]
    heard = "heard again: 1.00 parts an answer, at least one in 66.7 % of them; refused: 6 outside"
    assert shows(done.said, heard)
    buttons = {}
    for _, _, title, item in page_of("out/report.html").items:
        buttons[title[:2]] = re.findall(r'<button class="(\w+)"', item)
    none, one, two = ["refused"] * 3, ["heard", "refused", "refused"], ["heard", "refused", "heard"]
    assert buttons == dict(q0=none * 2, q1=one * 2, q2=two * 2)  # of both samples
    assert not lab(None, hears_again, "--prompt relisten --samples 2").shown
    once = lab(None, hears, "--prompt relisten --max_relistens 0", out="once")
    assert once.cfg.relistens == 0 and "heard_again" not in once.report
    assert "again" not in read("once/items.jsonl")[0]


def test_the_control_hears_once(lab):
    done = lab(asking(4), hears, "--controls --prompt relisten")
    assert list(done.report) == ["real", "silence", "none", "shuffled", "rotated", "once"]
    assert [name for name, report in done.report.items() if "heard_again" not in report] == ["none", "once"]
    assert "| once | 100.0 |" in done.said


# ---- the tiny base


@pytest.fixture(scope="module")
def taught(tiny):
    return omni_grpo.load_run_policy(omni_grpo.Config(model=tiny.base), train=False)


@pytest.fixture
def ask(taught, tiny, monkeypatch):
    """ask(questions, out, flags) -> predictions, by the tiny base loaded once, without the page"""
    monkeypatch.setattr(omni_grpo, "load_run_policy", lambda cfg, train=True: taught)
    monkeypatch.setattr(pages, "write_report", lambda *_: None)

    def ask(questions, out, flags):
        flags = f"--data {questions} --model {tiny.base} --max_new_tokens 6 --out {out} {flags}"
        assert ev.main(flags.split()) == 0
        return read(f"{out}/predictions.json")

    return ask


@pytest.fixture(scope="module")
def ragged(tiny, tmp_path_factory):
    """Questions of 3 to 90 words on clips of 0.1 to 3 s, on two clips and on none, one of them missing."""
    folder, rows = tmp_path_factory.mktemp("ragged"), []
    for i, e in enumerate(Examples(tiny.questions)[:8]):
        wave, rate_hz = soundfile.read(e.audio)
        length = int(rate_hz * (0.1, 3, 1, 0.5, 2)[i % 5])
        soundfile.write(folder / f"{i}.wav", np.tile(wave, 8)[:length], rate_hz)
        question, choices = "What is this? " * (1, 3, 30, 10)[i % 4], e.choices[: 2 + i % 3]
        rows.append(asks(i, audio=f"{i}.wav", question=question, choices=choices, answer=i % 2))
    rows[4]["audio"], rows[5]["audio"], rows[6]["audio"] = ["4.wav", "0.wav"], None, "gone.wav"
    return save(folder / "q.jsonl", rows)


@pytest.mark.parametrize("flags", ["", "--samples 2", "--prompt relisten"])
def test_batches_change_nothing(ask, ragged, tmp_path, flags):
    """The same predictions for any number of items or rows at once."""
    seen = []
    for n, size in enumerate(("batch_size 1", "batch_size 3", "batch_size 16", "rollout_rows 2")):
        seen.append(ask(ragged, tmp_path / str(n), f"--{size} {flags}"))
    assert all(predictions == seen[0] for predictions in seen)
    if "--samples" in flags:
        assert len({text for p in seen[0] for texts in p.get("samples", []) for text in texts}) > 5
        assert ask(ragged, tmp_path / "seed", f"--seed 1 {flags}") != seen[0]


def test_shuffled_prompts_have_room_for_the_clips_that_are_played(ask, tiny, tmp_path):
    """Items of one clip and of two change places."""
    sounds = [e.audio for e in Examples(tiny.questions)[:4]]
    rows = [asks(i, audio=[sounds[1], sounds[0]] if i == 1 else sounds[i]) for i in range(4)]
    predictions = ask(save(tmp_path / "q.jsonl", rows), tmp_path / "out", "--audio shuffled")
    assert not any("error" in p for p in predictions)


@pytest.mark.parametrize("flags, prompts", [("", 2), ("--samples 4", 2), ("--rotate_choices", 6)])
def test_the_tower_hears_a_clip_once(ask, taught, tmp_path, monkeypatch, flags, prompts):
    """30 s clips: one run of the tower a clip for all samples and rotations, one prompt a rotation."""
    for i in range(2):
        wave = np.sin(np.arange(30 * data.RATE_HZ) / (5 + i)) / 2
        soundfile.write(tmp_path / f"{i}.wav", wave, data.RATE_HZ)
    rows = [asks(i, audio=f"{i}.wav", choices=NAMES[:3]) for i in range(2)]
    questions, count = save(tmp_path / "q.jsonl", rows), collections.Counter()
    encode, rollout = taught.encode_audio, omni_grpo.rollout

    def hearing(mels):
        count.update(clips=len(mels), frames=sum(mel.shape[1] for mel in mels))
        return encode(mels)

    def rolling(policy, cfg, prompts, *rest):
        count.update(prompts=len(prompts))
        return rollout(policy, cfg, prompts, *rest)

    monkeypatch.setattr(taught, "encode_audio", hearing)
    monkeypatch.setattr(omni_grpo, "rollout", rolling)
    ask(questions, tmp_path / "out", f"--batch_size 2 --rollout_rows 4 {flags}")
    assert count == dict(clips=2, frames=6000, prompts=prompts)
    ask(questions, tmp_path / "out", flags)  # all is answered
    assert count["prompts"] == prompts


def tear_the_last_line(path):
    os.truncate(path, os.path.getsize(path) - 20)
    runs.kill()


def evaluate_and_die(moment, out, *words):
    replace, torn = os.replace, functools.partial(tear_the_last_line, f"{out}/items.jsonl")
    if moment == "in the second rollout":
        omni_grpo.rollout = runs.at_call(2, omni_grpo.rollout, runs.kill)
    elif moment == "in the fourth line":
        data.Ledger.append = runs.at_call(5, data.Ledger.append, torn)
    else:
        os.replace = lambda a, b: runs.kill() if b.endswith("report.json") else replace(a, b)
    return ev.main([*words, "--out", out])


def test_kill_at_three_moments(ask, tiny, tmp_path):
    """kill -9 in a rollout, with half a line on the disk, and before the report is in place, going on from
    there each time: the files are those of the run never killed, and no answer was asked for twice."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    flags = "--limit 8 --batch_size 2 --samples 2"
    words = f"--data {tiny.questions} --model {tiny.base} --max_new_tokens 6 {flags}".split()
    moments = {"in the second rollout": 2, "in the fourth line": 5, "before the report": 8}
    for moment, lines in moments.items():
        process = runs.fork(evaluate_and_die, moment, str(killed), *words)
        runs.finish(process, -signal.SIGKILL)
        assert (killed / "items.jsonl").read_bytes().count(b"\n") == lines
        assert not (killed / "report.json").exists()
    before = (killed / "items.jsonl").read_bytes()
    ask(tiny.questions, killed, flags)
    ask(tiny.questions, whole, flags)
    assert (killed / "items.jsonl").read_bytes() == before
    for name in ("predictions.json", "report.json", "examples.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_program(tiny, tmp_path, monkeypatch, main):
    """The tiny base as a program loads it: the files, where they go, and the table on the screen."""
    monkeypatch.chdir(tmp_path)
    said = main(f"--data {tiny.questions} --model {tiny.base} --limit 4")
    files = "config.json examples.jsonl items.jsonl predictions.json report.html report.json"
    assert sorted(os.listdir("results/demo-base")) == files.split()
    report = read("results/demo-base/report.json")
    assert pick(report, "n model model_fingerprint") == [4, tiny.base, ev.hash_weights(tiny.base)]
    table = f"| all | 4 | {100 * report['accuracy']:.1f} |\nwithout listening: random 25.0"
    assert shows(said, table)


# ---- the pages

EVIL = (
    "<script>document.title = 'owned'; console.error(1)</script></script><img src=x onerror=alert(1)>"
    '&lt;b&gt;" onclick="x <seg>1, 2</seg><details>'
)


@pytest.fixture
def reported(lab, main):
    """Two runs compared: 0 right in both, 1 won, 2 lost, 3 unresolved, 4 unheard, 5 all markup and wrong."""
    markup = dict(question=EVIL, choices=[EVIL, "cat"], answer=1, id="q5" + EVIL, meta=dict(category=EVIL))
    rows = [*asking(4), asks(4, audio="gone.wav"), asks(5, **markup)]
    for out, second, third in (("base", EVIL, "rain"), ("new", "cat", "cat")):
        said = ["dog", second, third, EVIL, "", EVIL]
        lab(rows, lambda e, w, n, said=said: said[int(e.id[1])], out=out)
    main("--compare base new")
    return "new/report.html"


def test_the_page_of_an_evaluation(reported):
    """Groups in order, sounds once each and whole, nothing fetched, and markup in any text is text."""
    page = page_of(reported)
    groups = "won right q1|lost wrong q2|unheard unresolved q4|wrong wrong q5|unresolved unresolved q3"
    titles = [f"{group} {state} {title[:2]}" for group, state, title, _ in page.items]
    assert titles == (groups + "|right right q0").split("|")
    assert sorted(clip_in(address) for address, _ in page.sounds) == sorted(NAMES)
    assert [seconds for _, seconds in page.sounds] == [0.05] * 4
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(""", page.page)
    counts = {tag: page.page.count(f"<{tag}") for tag in ("script", "img", "details", "/details")}
    assert counts == {"script": 2, "img": 0, "details": 6, "/details": 6}
    evil = page.items[3][3]
    assert evil.count(html.escape(EVIL)) == 5 and f"category: {html.escape(EVIL)}" in page.head
    assert set(re.findall(r"<(\w+)", evil)) == set("div audio ul li q".split())
    assert shows(evil, '<li class="bad">\n<li class="gold">cat ✓</li>')
    assert "gone.wav: no such file" in page.items[2][3] and "<title>q.jsonl: " in page.head


@pytest.mark.parametrize("audio", ["real", "silence", "none", "shuffled"])
def test_the_page_plays_what_the_model_heard(lab, main, audio):
    """And it and the screen name the condition; so does the page that --compare writes."""
    done = lab(asking(4), hears, f"--audio {audio}")
    heard = [[p["raw_output"]] if audio in ("real", "shuffled") else [] for p in done.predictions]
    for _ in range(2):
        page, played = page_of("out/report.html"), {}
        for _, _, title, item in page.items:
            numbers = re.findall(r'<audio [^>]*data-clip="(\d+)"', item)
            played[title[:2]] = [clip_in(page.sounds[int(n)][0]) for n in numbers]
        assert [played[f"q{i}"] for i in range(4)] == heard
        for text in (done.said, page.head):
            assert (f"4 items; --audio {audio}" in text) == (audio != "real")
        main("--compare out out")


def test_a_category_cannot_break_the_tables(lab, main):
    """However it is spelt it is one cell of one row."""
    names = ["a|b", "c\nd | e", "\u2028f\r\n|", "| - |", "plain"]
    done = lab([asks(i, meta=dict(category=name)) for i, name in enumerate(names)], hears)
    for text, width in ((done.said, 5), (main("--compare out out"), 9)):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if "|" in line]
        assert {len(row) for row in rows} == {width} and len(rows) == 8
    rows = re.findall("<tr>(.*?)</tr>", page_of("out/report.html").head, re.DOTALL)
    cells = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in rows[2:]]
    assert sorted(cell for cell, *_ in cells) == sorted(f"category: {name}" for name in names)
    assert {len(row) for row in cells} == {5}


def test_past_its_budget_the_page_links_to_the_files(lab, clips, monkeypatch):
    """And no name of a file ends its script."""
    monkeypatch.setattr(pages, "BUDGET_MIB", 1e-6)
    (clips / "<").mkdir()
    shutil.copy("cat.wav", "</script>.wav")
    lab([asks(0), asks(1, audio="</script>.wav")], hears)
    (address, _), linked = page_of("out/report.html").sounds
    assert address.startswith("data:") and linked == [f"file://{clips}/</script>.wav", 0.05]


DRIVE = """<script>
const players = [...document.querySelectorAll(".item audio")].slice(0, 2), played = [];
for (const [n, player] of players.entries()) player.play = () => played.push([n, player.currentTime]);
for (const button of document.querySelectorAll(".item button")) button.click();
document.title = JSON.stringify([players.map(p => p.src.slice(0, 14)), played]);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_the_page_in_a_browser(reported, lab, clips):
    """No complaint on the console; a segment plays in its clip, several clips on one time line."""
    for name in ("dog", "cat"):
        soundfile.write(clips / f"{name}.wav", np.full(data.RATE_HZ, 0.1), data.RATE_HZ)
    text = "<seg>0.25, 0.5</seg> <seg>1.5, 1.75</seg>"
    rows = [asks(0, audio=["dog.wav", "cat.wav"])]
    lab(rows, says((text, [[0.25, 0.5]], {})), "--prompt relisten", out="two")
    driven = clips / "driven.html"
    driven.write_text(read("two/report.html").replace("</html>", DRIVE), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --virtual-time-budget=3000 --enable-logging=stderr --dump-dom"
    )
    for path in (clips / reported, driven):
        command = ["chromium", *flags.split(), f"--user-data-dir={clips}/profile", f"file://{path}"]
        seen = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "CONSOLE" not in seen.stderr
    title = html.unescape(re.search("<title>(.*?)</title>", seen.stdout)[1])
    assert json.loads(title) == [["data:audio/ogg"] * 2, [[0, 0.25], [1, 0.5]]]


ROLLOUT = dict(id="q", audio=None, question="?", choices=["bell", "hum"], answer=0, completion=EVIL)
ROLLOUT |= dict(step=0, parts={"accuracy": 0.0}, reward=0.0, advantage=-0.5)


def test_the_page_of_rollouts(clips, capsys):
    """The newest step first, each with its clips and what was heard again; older lines; no torn one."""
    dog, parts = str(clips / "dog.wav"), [[0.5, 1.25], [3.0, 3.217]]
    rows = [ROLLOUT, ROLLOUT | dict(step=1, audio=[None, dog], parts={"accuracy": 1.0})]
    rows[1] |= dict(completion="<seg>1, 2</seg>" * 2, heard=[[1.0, 2.0]])  # the second time it was refused
    rows.append(ROLLOUT | dict(step=2, audio=dog, completion=SAID, heard=parts, advantage=1, parts={}))
    path = save(clips / "rollouts.jsonl", rows)
    with open(path, "a") as f:
        f.write('{"half')
    for run in (str(clips), path):
        assert pages.main([run]) == 0
        page = page_of(clips / "rollouts.html")
        states = [f"{group} {state}" for group, state, *_ in page.items]
        assert states == "step 2 right|step 1 right|step 0 wrong".split("|")
        assert [item.count("<audio") for *_, item in page.items] == [1, 1, 0] and len(page.sounds) == 1
        buttons = [re.findall(r'<button class="(\w+)"', item) for *_, item in page.items]
        assert buttons == [["heard", "refused", "heard"], ["heard", "refused"], []]
        assert html.escape(EVIL) in page.items[2][3]
        assert page.items[1][2] == "q · reward 0 · advantage -0.50 · accuracy 1"
    for row in ({"step": 1}, [], ROLLOUT | dict(choices="ab"), ROLLOUT | dict(reward="x")):
        save(clips / "rollouts.jsonl", [row])
        assert pages.main([str(clips)]) == 2 and "rollouts.jsonl:1: not a line" in capsys.readouterr().err
    for flags, message in (("missing.jsonl", "no such file"), (". --max_audio_s 0", "--max_audio_s")):
        assert pages.main(flags.split()) == 2 and message in capsys.readouterr().err


def test_predictions_as_others_write_them(tmp_path, capsys):
    """lmms-eval's samples, and one object of ids and texts, score as a list of rows does."""
    rows = [
        dict(id=f"q{i}", audio_id="a.wav", question=f"Which {i}?", choices=["dog", "cat"]) for i in range(4)
    ]
    gold = tmp_path / "mmau.json"
    gold.write_text(json.dumps([row | dict(answer="cat") for row in rows]))
    said = ["cat", "dog", "The answer is B.", "cat"]
    plain = [row | dict(model_output=text) for row, text in zip(rows, said)]
    samples = [
        dict(doc_id=i, doc=row | dict(answer="cat"), filtered_resps=[text], resps=[[text]])
        for i, (row, text) in enumerate(zip(rows, said))
    ]
    contents = {
        "plain.json": json.dumps(plain),
        "samples.jsonl": "".join(json.dumps(row) + "\n" for row in samples),
        "object.json": json.dumps({row["id"]: text for row, text in zip(rows, said)}, indent=1),
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        report = ev.score_file(str(tmp_path / name), ev.Options(data=str(gold)))
        assert report["accuracy"] == 0.75 and not report["left_out"], name
