"""Spoken questions whose options give nothing away: first they are drawn, and then which of them is right.

    python -m tools.spoken --out runs/spoken

For every task it writes questions about clips, TASK.jsonl and TASK_held_out.jsonl, whose voices and contents
are none of those of TASK.jsonl. For --audio none, the same questions with the words in place of the clip,
TASK_written.jsonl, and the options alone, to measure what they tell: TASK_alone.jsonl. Voices: speech.py.
"""

import io
import itertools
import json
import os
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import soundfile

import data
from data import RATE_HZ, knob
from tools.speech import NAMES, check_programs, join, say, voices

LARGEST = 40  # of the numbers of a sum
WINDOW = 20  # the options of a sum lie so near to each other


class Asked(NamedTuple):
    said: list[tuple[str, int]]  # text, by which of the two speakers
    question: str
    choices: list[str]
    answer: int
    sexes: tuple[str, str] | None = None  # of the two speakers; None: anyone


# Each task yields questions for ever. Whoever wants one of certain contents takes the first that fits: which
# option is right does not depend on it.


def sums(r: random.Random) -> Iterator[Asked]:
    """Four sums near each other; then which of them is asked for; then two numbers that make it."""
    while True:
        lowest = r.randrange(12, 60)
        totals, answer = r.sample(range(lowest, lowest + WINDOW), 4), r.randrange(4)
        total = totals[answer]
        numbers = range(max(1, total - LARGEST), min(LARGEST, total - 1) + 1)
        for a in r.sample(numbers, len(numbers)):
            yield Asked([(f"{a} plus {total - a}", 0)], "What is the result?", [*map(str, totals)], answer)


def order(r: random.Random) -> Iterator[Asked]:
    """Two of the four numbers are said; which was the first, or the last?"""
    while True:
        numbers, which = r.sample(range(1, 100), 4), r.randrange(2)
        pairs = list(itertools.permutations(range(4), 2))
        for pair in r.sample(pairs, len(pairs)):
            said = ", ".join(str(numbers[i]) for i in pair)
            question = f"Which number is said {('first', 'last')[which]}?"
            yield Asked([(said, 0)], question, [*map(str, numbers)], pair[which])


def compare(r: random.Random) -> Iterator[Asked]:
    while True:
        numbers = r.sample(range(1, 100), 2)
        larger = numbers[1] > numbers[0]
        said = f"{numbers[0]}, {numbers[1]}"
        yield Asked([(said, 0)], "Which number is larger?", ["the first", "the second"], int(larger))


def count(r: random.Random) -> Iterator[Asked]:
    while True:
        counts, answer = r.sample(range(2, 8), 4), r.randrange(4)
        said = ", ".join(r.sample(NAMES, counts[answer]))
        yield Asked([(said, 0)], "How many names are said?", [*map(str, counts)], answer)


def who(r: random.Random) -> Iterator[Asked]:
    """Two speakers say a name each."""
    while True:
        sexes = r.choices(("man", "woman"), k=2)
        names = r.sample(NAMES, 2)
        choices = [f"a {a}, then a {b}" for a, b in itertools.product(("man", "woman"), repeat=2)]
        answer = choices.index(f"a {sexes[0]}, then a {sexes[1]}")
        yield Asked([(names[0], 0), (names[1], 1)], "Who speaks?", choices, answer, tuple(sexes))


TASKS = dict(sums=sums, order=order, compare=compare, count=count, who=who)


def is_held_out(said: list[tuple[str, int]]) -> bool:
    """A fifth of the contents; the order of the words does not count."""
    words = sorted(data.normal_words(" ".join(text for text, _ in said)))
    return zlib.crc32(" ".join(words).encode()) % 5 == 0


def ask(task: str, split: str, i: int) -> tuple[Asked, random.Random]:
    """Question i of a split, and the random numbers that go on with it."""
    r = random.Random(data.seed_of(task, split, i))
    held = split == "held_out"
    return next(asked for asked in TASKS[task](r) if is_held_out(asked.said) == held), r


def speak(asked: Asked, split: str, r: random.Random):
    """-> float32 at 16 kHz"""
    speakers = [r.choice(voices(split, sex)) for sex in asked.sexes or ("", "")]
    return join(r, *[say(text, speakers[who]) for text, who in asked.said])


def rows_of(asked: Asked, name: str) -> dict[str, dict]:
    """The question with its clip, written out, and its options alone."""
    row = dict(id=name, audio=None, question=asked.question, choices=asked.choices, answer=asked.answer)
    rows = {"": row | dict(audio=f"clips/{name}.flac"), "_alone": row | dict(question="Which one?")}
    if asked.sexes is None:  # words tell it
        text = " ".join(text for text, _ in asked.said)
        rows["_written"] = row | dict(question=f'Someone says: "{text}." {asked.question}')
    return rows


def write_clip(path: str, wave) -> None:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE_HZ, format="FLAC")

    def write(part):
        with open(part, "wb") as f:  # a full disk is an OSError here, and one line
            f.write(file.getvalue())

    data.write_atomically(path, write)


def write_task(folder: str, task: str, split: str, n: int) -> None:
    ending = {"train": ".jsonl", "held_out": "_held_out.jsonl"}[split]
    lines = {}
    for i in data.progress(range(n), n, f"{task}, {split}"):
        asked, r = ask(task, split, i)
        name = f"{task}_{split}_{i:04d}"
        path = f"{folder}/clips/{name}.flac"
        if not os.path.exists(path):  # what a kill has left goes on
            write_clip(path, speak(asked, split, r))
        for kind, row in rows_of(asked, name).items():
            lines.setdefault(kind, []).append(json.dumps(row))
    for kind, of_kind in lines.items():
        data.write_text(f"{folder}/{task}{kind}{ending}", "\n".join(of_kind) + "\n")


@dataclass
class Options:
    out: str = knob("runs/spoken", "folder to write; clips that are there are not made again")
    tasks: str = knob(",".join(TASKS), "which ones")
    train: int = knob(600, "questions to train on, of each task", low=1)
    held_out: int = knob(240, "questions to hold out", low=1)


def main(argv=None) -> int:
    parser = data.Parser(description=__doc__)
    parser.add_knobs(Options)

    def run():
        options = Options(**vars(parser.parse_args(argv)))
        data.check_knobs(options)
        unknown = set(options.tasks.split(",")) - set(TASKS)
        if unknown:
            raise data.UserError(f"--tasks {min(unknown)}: must be of {', '.join(TASKS)}")
        check_programs()
        os.makedirs(f"{options.out}/clips", exist_ok=True)
        with data.claimed(options.out):
            for task in options.tasks.split(","):
                for split, n in (("train", options.train), ("held_out", options.held_out)):
                    write_task(options.out, task, split, n)
        print(f"{options.out}: {options.tasks}")

    return data.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
