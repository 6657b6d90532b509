"""Spoken questions: the right answer is right, the options alone tell nothing, and what is held out is new."""

import json
import os
import shutil

import pytest
import soundfile

import data
from tools import speech, spoken
from tools.shortcuts import find_shortcuts, is_shortcut

SPLITS = ("train", "held_out")


def asked_of(task, split, n=400):
    return [spoken.ask(task, split, i)[0] for i in range(n)]


def solve(asked):
    """The right choice, from what is said."""
    text = " ".join(text for text, _ in asked.said)
    words = data.normal_words(text)
    if asked.sexes:
        return f"a {asked.sexes[0]}, then a {asked.sexes[1]}"
    if "result" in asked.question:
        return str(int(words[0]) + int(words[2]))
    if "larger" in asked.question:
        return "the first" if int(words[0]) > int(words[1]) else "the second"
    if "How many" in asked.question:
        return str(len(words))
    return words[0 if "first" in asked.question else -1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", spoken.TASKS)
def test_the_answer_is_right_and_the_options_tell_nothing(task, split):
    questions = asked_of(task, split)
    assert all(asked.choices[asked.answer] == solve(asked) for asked in questions)
    examples = [data.Example("q", None, a.question, a.choices, a.answer) for a in questions]
    found = find_shortcuts(examples)
    assert not [rule for rule, of_rule in found.items() if is_shortcut(*of_rule)]
    assert questions[:5] == asked_of(task, split, 5)  # the same each time


@pytest.mark.parametrize("task", spoken.TASKS)
def test_nothing_that_is_held_out_was_trained_on(task):
    contents = [
        {tuple(sorted(data.normal_words(str(asked.said)))) for asked in asked_of(task, split)}
        for split in SPLITS
    ]
    assert len(contents[0]) > 50 and not contents[0] & contents[1]


def test_rows():
    asked = spoken.Asked([("7, 30", 0)], "Which number is said last?", ["7", "30", "8", "9"], 1)
    rows = spoken.rows_of(asked, "x")
    assert rows[""]["audio"] == "clips/x.flac" and rows[""]["question"] == asked.question
    assert rows["_written"]["question"] == 'Someone says: "7, 30." Which number is said last?'
    assert rows["_alone"]["question"] == "Which one?" and rows["_alone"]["audio"] is None
    two = spoken.Asked([("Anna", 0), ("Ben", 1)], "Who speaks?", ["a", "b"], 0, ("man", "woman"))
    assert rows.keys() - spoken.rows_of(two, "x").keys() == {"_written"}  # no text tells who speaks


def test_unknown_task(command):
    code, said = command(spoken.main, "--tasks", "order,songs")
    assert code == 2 and "--tasks songs: must be of sums, order" in said


@pytest.mark.skipif(
    not shutil.which("espeak-ng") or not shutil.which("flite"), reason="needs espeak-ng and flite"
)
def test_written_files_are_data(tmp_path, monkeypatch, command):
    monkeypatch.setattr(speech, "recordings", lambda split: {})
    out = tmp_path / "spoken"
    words = ["--out", out, "--tasks", "order,who", "--train", 3, "--held_out", 2]
    assert command(spoken.main, *words)[0] == 0
    names = "order order_written order_alone order_held_out order_written_held_out order_alone_held_out"
    for name in f"{names} who who_held_out".split():
        examples = data.Examples(str(out / f"{name}.jsonl"))
        assert len(examples) == (2 if "held_out" in name else 3)
        for example in examples:
            assert example.has_answer
            for clip in example.clips:
                wave, _ = data.load_audio(clip)
                assert 0.3 * data.RATE_HZ < len(wave) < 6 * data.RATE_HZ and abs(wave).max() > 0.1
    clip = out / "clips" / "order_train_0000.flac"
    before = clip.read_bytes()
    os.remove(out / "clips" / "order_train_0001.flac")
    assert command(spoken.main, *words)[0] == 0  # what is there is not made again
    with data.claimed(str(out)):
        code, said = command(spoken.main, *words)
    assert code == 2 and "another process is writing it" in said
    assert clip.read_bytes() == before and soundfile.info(str(out / "clips" / "order_train_0001.flac")).frames
    assert json.loads((out / "order.jsonl").read_text().splitlines()[0])["id"] == "order_train_0000"
