"""Audio question answering data: one `Example` per question, read lazily, checked before anything expensive starts.

    python data.py check FILE           read every line and every sound, list what is wrong
    python data.py convert FILE         any known format -> our JSONL
    python data.py folder DIR           a folder of sounds -> multiple-choice questions
    python data.py generate CAPTIONS    captions -> a language model's questions about them (AVQA-GPT, VGGS-GPT)
    python data.py relisten EVENTS      time-stamped events -> questions, and chains of thought that name segments (Echo)
    python data.py filter FILE          keep what a policy can learn from

A data set is a file of rows, recognised by their keys (`FORMATS`): our own JSONL, whose keys are the fields of `Example`,
what the field trains and evaluates on, and tables of captions or labels. To add a format, add one entry: the keys that
give it away, and a function from one row to the fields of `Example`. Reading never touches audio and never needs torch.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import string
import sys
import time
import unicodedata
import urllib.parse
import zlib
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

RATE_HZ = 16_000  # what every supported audio encoder expects
MIN_SAMPLES = (
    321  # anything shorter gives no audio token (25 tokens a second, after two strides and a pooling)
)


class UserError(Exception):
    """Something the user can mend: the message says what was found and what to do; no traceback, exit code 2."""


class DataError(UserError):
    """A fault in a data file: the message names file, line and field."""


class AudioError(DataError):
    """A clip that cannot be heard: missing, unreadable, empty, too short or not finite."""


# ---------------------------------------------------------------------------------------------------------------------
# What every script here needs: options, exit codes, interruptions, look-ahead threads, files that survive a kill


def knob(default, help, choices=None, low=0, high=2**31 - 1, above=None):
    """A field of a dataclass of options: its default, its help, and the range of a number (`above`: low is excluded)."""
    low = low if above is None else above
    return field(
        default=default,
        metadata=dict(help=help, choices=choices, low=low, high=high, open=above is not None),
    )


def check_knobs(options) -> None:
    """Raises UserError, naming the flag, for the first knob whose value is not among its choices or not in its range."""
    for f in dataclasses.fields(options):
        value, m = getattr(options, f.name), f.metadata
        if m["choices"] and value not in m["choices"]:
            raise UserError(f"--{f.name} {value}: must be one of {' | '.join(m['choices'])}")
        if type(value) not in (int, float):
            continue
        fits = m["low"] < value <= m["high"] if m["open"] else m["low"] <= value <= m["high"]
        if not fits or not math.isfinite(value):
            word = "above" if m["open"] else "at least"
            raise UserError(f"--{f.name} {value}: must be {word} {m['low']} and at most {m['high']}")


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as its help. What is wrong is a UserError, one line and not forty lines of usage."""

    def __init__(self, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            formatter_class=raw, argument_default=argparse.SUPPRESS, allow_abbrev=False, **options
        )

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def add_knobs(self, options_class) -> None:
        """One flag for each field of a dataclass of knobs. A flag that is not given is not in the parsed namespace."""
        for f in dataclasses.fields(options_class):
            text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
            if f.type is bool:
                self.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
            else:
                self.add_argument(f"--{f.name}", type=f.type, metavar=f.name.upper(), help=text)


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command.       -> 0 or what it returns, 2 with one line for what the user can mend, 130 after Ctrl-C"""
    with contextlib.suppress(
        AttributeError
    ):  # not every stream can be told how to write what no terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as e:  # no room, no permission, no such folder
        name = e.filename2 or e.filename
        print(f"error: {f'{name}: ' if name else ''}{e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def leave(code: int) -> None:
    """End the process. After Ctrl-C at once: threads that still wait for a server would hold up a plain exit."""
    if code == 130:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def interruptible(*names: str, note: str = ""):
    """Yields a list. The first signal (SIGINT unless named) goes on the list, a second one raises KeyboardInterrupt.

    An exception raised wherever the main thread happens to be would leave work half done; a list can be looked at between
    two pieces of work. Outside the main thread signals are left alone.
    """
    stopping = []

    def stop(number, frame):
        if stopping:
            raise KeyboardInterrupt
        stopping.append(KeyboardInterrupt())
        os.write(2, note.encode())  # print is not safe here

    before = {}
    with contextlib.suppress(ValueError):
        for name in names or ("SIGINT",):
            before[name] = signal.signal(getattr(signal, name), stop)
    try:
        yield stopping
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def ahead(
    items, work: Callable, workers: int, depth: int, stopping=(), room: Callable = lambda waiting: True
):
    """Yield (item, work(item) or the DataError it raised) in order; threads compute up to `depth` items in advance.

    Once `stopping` holds something, no further item is begun. room(waiting): may the last of the items `waiting` be begun
    while the others are not yet yielded?
    """

    def run(item):
        try:
            return work(item)
        except DataError as e:
            return e

    items, queue, pool = iter(items), collections.deque(), ThreadPoolExecutor(workers)
    fresh = list(islice(items, 1))
    try:
        while True:
            if stopping:  # threads begin items in order, so there is no gap between those that were begun
                fresh, queue = [], collections.deque(pair for pair in queue if not pair[1].cancel())
            while fresh and len(queue) < depth and room([item for item, _ in queue] + fresh):
                queue.append((fresh[0], pool.submit(run, fresh[0])))
                fresh = list(islice(items, 1))
            if not queue:
                return
            item, future = queue.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def write_atomically(path: str, write: Callable[[str], None]) -> None:
    """write(a temporary path), then rename: a kill at any moment leaves the old file or the new one, whole."""
    part = path + ".part"
    try:
        write(part)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def write_text(path: str, text: str) -> None:
    """Atomically. Half a character, which UTF-8 does not have, is written as JSON spells it."""

    def write(part):
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
            f.write(text)

    write_atomically(path, write)


class Ledger:
    """JSON lines that are only ever appended, one write each, by one process at a time.

    A kill leaves whole lines and at most a torn last one, which is cut off when the file is opened again.

    path: the file; it is made where there is none. first_key: the first key of every line. enter(line, where): is called
    with each line there is, and raises UserError where a line is not this run's; nothing has been changed by then.
    Raises UserError if another process holds the file, or if it holds something else.
    """

    def __init__(self, path: str, first_key: str, enter: Callable[[dict, str], None]):
        self.path = path
        if os.path.exists(path) and (problem := file_problem(path)):
            raise UserError(problem)
        try:
            self.file = open(path, "ab", buffering=0)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None
        try:
            if not lock(self.file):
                raise UserError(
                    f"{path}: another process is writing it; wait for its end, or give another file"
                )
            size, start = 0, f'{{"{first_key}": '.encode()
            with open(path, "rb") as lines:
                for n, raw in enumerate(lines, 1):
                    if not raw.endswith(b"\n") and raw[: len(start)] == start[: len(raw)]:
                        break
                    line = parse_json(raw, f"{path}:{n}")
                    if not isinstance(line, dict) or next(iter(line), None) != first_key:
                        raise UserError(f"{path}:{n}: not written by this command; give another file")
                    enter(line, f"{path}:{n}")
                    size += len(raw)
            self.file.truncate(size)
        except BaseException:
            self.file.close()
            raise

    def append(self, line: dict) -> None:
        """Raises UserError if the disk does not take the whole line."""
        raw = (json.dumps(line) + "\n").encode()
        try:
            if self.file.write(raw) != len(raw):
                raise OSError(0, "only part of a line could be written; is the disk full?")
        except OSError as e:
            raise UserError(
                f"{self.path}: {e.strerror}; once that is mended, the same command goes on from here"
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def lock(file) -> bool:
    """Take the file's lock, which ends with the process, kill -9 included; True where the system has no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def seed_of(*parts) -> int:
    """56 bits that depend on nothing but the parts, whatever process computes them."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def progress(items, total: int, what: str):
    from tqdm import tqdm

    return tqdm(
        items, total=total, desc=what, unit="", leave=False, disable=None
    )  # None: silent where nobody looks


# ---------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass
class Example:
    """One question. `answer` is an index into `choices`; `target` the completion(s) to imitate in a cold start."""

    id: str
    audio: "str | bytes | Embedded | list | None"  # path (absolute once read), content, several of them, or None: text only
    question: str
    choices: list[str] = field(default_factory=list)
    answer: int | None = None
    target: str | list[str] | None = None
    meta: dict = field(default_factory=dict)

    @property
    def clips(self) -> list:
        """The clips of the question, in the order in which they are heard."""
        return [] if self.audio is None else self.audio if isinstance(self.audio, list) else [self.audio]

    @property
    def is_countdown(self) -> bool:
        """No choices, but `nums` that have to make a `target`: reward.countdown tells right from wrong."""
        nums = self.meta.get("nums")
        return (
            not self.choices
            and isinstance(nums, list)
            and all(type(n) is int for n in [*nums, self.meta.get("target")])
        )

    @property
    def has_answer(self) -> bool:
        return self.answer is not None or self.is_countdown


class Embedded:
    """A clip inside a parquet or Hub data set. Its bytes are read when they are asked for, and not before."""

    def __init__(self, table, row: int, column: str, place: int | None = None):
        self.table, self.row, self.column, self.place, self.folder = table, row, column, place, ""

    def child(self, name: str):
        """`bytes` (a view of the memory map, nothing is copied) or `path`; None if there is none"""
        value = self.table[self.row].column(self.column)[0]
        value = value if self.place is None else value[self.place]
        if value.is_valid and hasattr(value, "keys"):
            value = value[name]
            return value.as_py() if name == "path" or not value.is_valid else value.as_buffer()
        return value.as_buffer() if name == "bytes" and value.is_valid else None  # a plain column of bytes

    @property
    def path(self) -> str:
        return self.child("path") or ""

    @functools.cached_property
    def key(self) -> str:
        """The same for the same clip. A sample of its bytes must do: it costs 50 us, and reading a whole set takes hours."""
        if not (content := self.child("bytes")):
            return self.path
        pieces = [
            content[at : at + 4096].to_pybytes() for at in (0, len(content) // 2, max(0, len(content) - 4096))
        ]
        return f"{len(content)} bytes {hashlib.blake2b(b''.join(pieces), digest_size=8).hexdigest()}"

    def __bool__(self):
        return bool(self.key)

    def __eq__(self, other):
        return isinstance(other, Embedded) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def read(self) -> str | bytes:
        content = self.child("bytes")
        return content.to_pybytes() if content else locate(self.path, self.folder)

    def __repr__(self):
        return f"<clip of row {self.row + 1}{self.path and ': ' + self.path}>"


def make_example(fields: dict, where: str) -> Example:
    """The fields of one question -> a valid Example. Raises DataError with `where` (file:line), the field and the remedy."""

    def bad(key, problem):
        raise DataError(f'{where}: field "{key}": {problem}')

    # null is the same as missing
    example = Example(
        **{"id": None, "audio": None, "question": None} | {k: v for k, v in fields.items() if v is not None}
    )
    example.id = str(re.split(":| ", where)[-1] if example.id is None else example.id)
    if isinstance(example.audio, Embedded) and not example.audio:  # neither bytes nor a path
        example.audio = None
    if not isinstance(example.question, str) or not example.question.strip():
        bad("question", f"expected a text, found {example.question!r:.60}")
    if not isinstance(example.choices, list) or not all(
        isinstance(c, str) and c.strip() for c in example.choices
    ):
        bad("choices", f"expected a list of texts, found {example.choices!r:.80}")
    if len(example.choices) == 1:
        bad("choices", f"only one choice, {example.choices[0]!r:.80}: a question needs at least two")
    n, answer = len(example.choices), example.answer
    if isinstance(answer, str):  # the answer's text instead of its index
        if answer not in example.choices:
            bad("answer", f"{answer!r:.80} is not among the choices {example.choices!r:.300}")
        example.answer = example.choices.index(answer)
    elif answer is not None and (isinstance(answer, bool) or not isinstance(answer, int)):
        bad("answer", f"expected the index or the text of a choice, found {answer!r:.80}")
    elif answer is not None and not 0 <= answer < n:
        bad(
            "answer",
            f"{answer!r:.80} is not among the {n} choices"
            + (f"; give an index from 0 to {n - 1}" if n else ""),
        )
    targets = (
        []
        if example.target is None
        else example.target
        if isinstance(example.target, list)
        else [example.target]
    )
    if example.target == [] or not all(isinstance(t, str) for t in targets):
        bad("target", f"expected a text or a list of texts, found {example.target!r:.60}")
    try:
        " ".join([example.question, *example.choices, *targets]).encode()
    except UnicodeEncodeError as e:  # JSON can write it, no tokenizer can read it
        half = e.object[e.start]
        key = (
            "question"
            if half in example.question
            else "choices"
            if half in "".join(example.choices)
            else "target"
        )
        bad(key, f"holds {half!a}, which is half a character; mend or drop the line")
    if not isinstance(example.meta, dict):
        bad("meta", f"expected an object, found {example.meta!r:.60}")
    if example.audio == []:
        bad("audio", "an empty list; give a path, or null for a text-only question")
    for clip in example.clips:
        if clip == "":
            bad("audio", "an empty path; give a file, or null for a text-only question")
        if not isinstance(clip, (str, bytes, Embedded)):
            bad("audio", f"expected a path, found {clip!r:.60}")
    return example


# ---------------------------------------------------------------------------------------------------------------------
# Formats: the keys that give a row away, and how it becomes the fields of an Example. A converter takes out (pops) what
# it carries over as it is; what is left of the row is kept in `meta`, so that nothing gets lost.


def own(row: dict) -> dict:
    """`audio` must be there, or null on purpose: a misspelt key must not become training on text alone."""
    if "audio" not in row:
        raise DataError('field "audio": missing; give a path, or null for a question without sound')
    fields = {k: row.pop(k) for k in ("id", "audio", "question", "choices", "answer", "target") if k in row}
    return fields | {
        "meta": flat(row) if row.get("meta") is None or isinstance(row["meta"], dict) else row["meta"]
    }


def flat(row: dict) -> dict:
    """A row with what its own `meta` holds; a key that stands inside and outside of it keeps both values."""
    if "meta" not in row:
        return row
    meta = dict(row.pop("meta") or {}) if isinstance(row["meta"], dict | None) else {}
    for key, value in row.items():
        name = key
        while name in meta and meta[name] != value or name != key and name in row:
            name += "_outside_meta"
        meta[name] = value
    return meta


def together(rows: list[dict]) -> dict:
    """The rows of one question as one: where they differ, all their values."""
    if len(rows) == 1:
        return rows[0]
    given = {
        k: [row[k] for row in rows if row.get(k) is not None]
        for k in dict.fromkeys(k for row in rows for k in row)
    }
    return {
        k: values if any(v != values[0] for v in values[1:]) else (values or [None])[0]
        for k, values in given.items()
    }


def text(row: dict, key: str, pop: bool = True) -> str:
    value = row.pop(key) if pop else row[key]
    if not isinstance(value, str):
        raise DataError(f'field "{key}": expected a text, found {value!r:.60}')
    return value


def bare(choices: list[str], answer) -> tuple[list[str], object]:
    """(["(A) dog", "(B) cat"], "(B) cat" or "B") -> (["dog", "cat"], 1). Letters go if all choices have theirs in order."""
    found = [
        re.match(rf"\s*\(?{letter}(?:\)\s*|[.:]\s+)(?=\S)", c)
        for letter, c in zip(string.ascii_uppercase, choices)
    ]
    lettered = len(found) == len(choices) > 0 and all(found)  # "A.D." and "B.C." are not
    if lettered:
        answer = choices.index(answer) if answer in choices else answer
        choices = [c[m.end() :] for c, m in zip(choices, found)]
    if isinstance(answer, str) and (
        lettered or answer not in choices
    ):  # a lettered "C. A" makes of "A" a letter
        letter = re.fullmatch(r"\s*\(?([A-Z])[).:]?\s*", answer)
        if letter and ord(letter[1]) - 65 < len(choices):
            answer = ord(letter[1]) - 65
    return choices, answer


def multiple_choice(row: dict, question="question", choices="choices", answer="answer", **fields) -> dict:
    """What most benchmarks share. A blank answer is one that the benchmark withholds."""
    asked, options, gold = text(row, question), row.pop(choices), row.pop(answer, None)
    if isinstance(options, str):  # some parquet copies hold the list as JSON
        options = parse_json(options.encode("utf-8", "replace"), f'field "{choices}"')
    if not isinstance(options, list) or not all(isinstance(c, str) for c in options):
        raise DataError(f'field "{choices}": expected a list of texts, found {options!r:.80}')
    options, gold = bare(options, gold)
    return (
        dict(id=row.pop("id", None), question=asked, choices=options, answer=None if gold == "" else gold)
        | fields
    )


def avqa(row: dict) -> dict:
    """AVQA, as released and as R1-AQA ships it (arXiv 2503.11197): null choices are padding, "video" means the sound."""
    choices, answer = row.pop("multi_choice"), row.pop("answer")
    if isinstance(choices, list):
        if type(answer) is int and 0 <= answer < len(choices):  # True is an int too
            if choices[answer] is None:
                raise DataError(
                    'field "answer": it points at a null choice; drop the line or mend the answer'
                )
            answer -= choices[:answer].count(None)
        choices = [c for c in choices if c is not None]
    asked = text(row, "question_text", pop=False)
    if "video" not in asked:
        del row["question_text"]
    audio = row.pop("audio_path") if "audio_path" in row else text(row, "video_name", pop=False)
    return dict(
        id=row.pop("id", None),
        audio=audio,
        question=asked.replace("video", "audio"),
        choices=choices,
        answer=answer,
    )


def avqa_processed(row: dict) -> dict:
    """gijs/avqa-processed: the choices stand in the question, "Q\nChoices:\nA. dog\nB. cat", the answer is "B. cat"."""
    asked, _, listed = row.pop("question").partition("\nChoices:\n")
    choices, answer = bare([line for line in listed.split("\n") if line.strip()], row.pop("answer"))
    return dict(
        id=row.pop("id", None), audio=row.pop("audio"), question=asked, choices=choices, answer=answer
    )


def mmau(row: dict) -> dict:
    audio = text(row, "audio_id")
    return {"id": os.path.splitext(os.path.basename(audio))[0]} | {
        k: v for k, v in multiple_choice(row, audio=audio).items() if v is not None
    }


def unpack(row: dict) -> None:
    more = row.pop("other_attributes", None)
    row |= parse_json(more.encode(), 'field "other_attributes"') if isinstance(more, str) else more or {}


def mmau_hub(row: dict) -> dict:
    """MMAU's parquet: the question is the instruction, the rest is packed into other_attributes."""
    unpack(row)
    return multiple_choice(
        row, question="instruction", audio=row.pop("context") if "context" in row else row.pop("audio")
    )


def mmau_version(rows) -> str:
    """Which MMAU test-mini this is: scores on its versions are not comparable. Raises DataError on the broken ones."""
    n = lost = meld = withheld = 0
    for row in rows:
        with contextlib.suppress(DataError, TypeError, ValueError):  # a bad line is named when it is read
            unpack(row)
        answer, choices = row.get("answer"), row.get("choices")
        n, meld, withheld = n + 1, meld + (row.get("dataset") == "meld"), withheld + (answer in (None, ""))
        lost += bool(answer) and isinstance(choices, list) and answer not in choices
    if lost > 20:
        raise DataError(
            f"{lost} answers are not among their choices, as in MMAU's files of 15 and 16 May 2025, whose answers "
            "were mapped wrongly; take the current file of the benchmark"
        )
    if withheld == n:
        return "answers withheld"
    return "unknown version" if n != 1000 else {70: "v05.15.25", 43: "original"}.get(meld, "unknown version")


def mmau_pro_skip(row: dict) -> str:
    if row.get("category") in ("open", "instruction following") or row.get("choices") in (None, "", [], "[]"):
        return "not multiple choice (open answer or instruction following)"
    fields = multiple_choice(dict(row), audio=None)
    found = type(fields["answer"]) is int or fields["answer"] in fields["choices"]
    return "" if found else "the answer is not among the choices"


def choice_columns(row: dict) -> dict:
    """MMSU and AIR-Bench: one column a choice, null where there are fewer; AIR-Bench's folders are named by task and source."""
    row["choices"] = choices = [row.pop(f"choice_{letter}", None) for letter in "abcdefgh"]
    while choices and choices[-1] in (None, ""):
        choices.pop()
    if "path" in row:
        audio = f"{row['task_name']}_{row['dataset_name']}/{text(row, 'path')}"
    else:
        audio = row.pop("audio") if row.get("audio") else row.pop("audio_path")
    fields, uniq_id = multiple_choice(row, answer="answer_gt", audio=audio), row.pop("uniq_id", None)
    return fields if uniq_id is None else fields | {"id": uniq_id}


def arc(row: dict) -> dict:
    """ARC in the Hub's columns or in AI2's nesting; the labels are letters or numbers."""
    stem = nested = row.pop("question")
    if isinstance(nested, dict):
        stem, row["choices"] = nested.pop("stem"), nested.pop("choices")
    rest = row.pop("choices")
    labels, choices = (
        [c.pop(k) for c in rest] if isinstance(rest, list) else rest.pop(k) for k in ("label", "text")
    )
    row |= {"question": nested} if nested and nested is not stem else {}  # what else stood there
    row |= {"choices": rest} if (any(rest) if isinstance(rest, list) else rest) else {}
    key = row.pop("answerKey")
    if key and key not in labels:
        raise DataError(f'field "answerKey": {key!r:.40} is not among the labels {labels!r:.80}')
    return dict(
        id=row.pop("id", None), question=stem, choices=choices, answer=labels.index(key) if key else None
    )


def conversation(row: dict) -> dict:
    """Fine-tuning rows as ms-swift and ShareGPT write them, Audio-Reasoner's CoTA (arXiv 2503.02318) among them: what the
    user asks first is the question, the reply the target. Clips stand in `audios`, or in the question as <audio>PATH</audio>.
    """
    if "query" in row:
        asked, reply = text(row, "query"), text(row, "response")
    else:
        key = "messages" if "messages" in row else "conversations"
        turns = [
            (
                {"human": "user", "gpt": "assistant"}.get(who := t.get("role", t.get("from")), who),
                t.get("content", t.get("value")),
            )
            for t in row[key]
        ]
        said = dict(
            reversed([turn for turn in turns if turn[0] in ("user", "assistant")])
        )  # the first of each
        if not all(isinstance(said.get(who), str) for who in ("user", "assistant")):
            raise DataError(
                f'field "{key}": expected a text of the user and a reply, found {row[key]!r:.200}'
            )
        asked, reply = said["user"], said["assistant"]
        if len(turns) == 2 and all(len(t) == 2 for t in row[key]):  # nothing else is in it
            del row[key]
    clips = re.findall(r"<audio>([^<\n]+)</audio>", asked)
    if key := next((k for k in ("audios", "audio", "sound", "audio_path") if k in row), None):
        clips = row.pop(key)
    if re.search("<audio>|<sound>", asked) and not clips:
        raise DataError('field "audios": missing, and the question has an <audio>')
    question = re.sub(r"(?:Audio \d+: *)?<audio>(?:[^<\n]+</audio>)?\n?|<sound>\n?", "", asked).strip()
    return dict(
        id=row.pop("id", None),
        audio=clips[0] if isinstance(clips, list) and len(clips) == 1 else clips or None,
        question=question,
        target=reply,
    )


def countdown(row: dict) -> dict:
    """TinyZero's task. The numbers and the target go to `meta`, for the reward."""
    nums, target = row["nums"], row["target"]
    if not isinstance(nums, list) or not nums or not all(type(n) is int for n in [*nums, target]):
        raise DataError(
            f'field "nums": expected a list of integers and an integer target, found {nums!r:.60}, {target!r:.40}'
        )
    return dict(
        id=row.pop("id", None),
        question=f"Using the numbers {nums}, create an equation that equals {target}. You can "
        "use basic arithmetic operations (+, -, *, /) and each number can only be used once.",
    )


def music_avqa(row: dict) -> dict:
    """Slots of the question are filled in order; choices come from the answers to other questions of the same type."""
    values, asked = (
        iter(parse_json(row["templ_values"].encode(), 'field "templ_values"')),
        row["question_content"],
    )
    asked = re.sub(r"<\w+>", lambda slot: str(next(values, slot[0])), asked)
    audio = text(row, "video_id", pop=False)
    return dict(id=row.pop("question_id", None), audio=audio, question=asked, answer=text(row, "anser"))


def music_avqa_skip(row: dict) -> str:
    kind = parse_json(row["type"].encode(), 'field "type"')[0]
    kind.encode()  # half a character could not be printed
    why = "" if kind == "Audio" else f"cannot be heard: {kind[:40]}"
    return "deleted by its authors" if row.get("question_deleted") else why


def clotho_aqa(rows: list[dict]) -> dict:
    """Three annotators a question: the majority's answer."""
    answer, votes, answers = majority(rows)
    rest = [
        {k: v for k, v in row.items() if k not in ("file_name", "QuestionText", "answer", "confidence")}
        for row in rows
    ]
    return dict(
        audio=rows[0]["file_name"],
        question=rows[0]["QuestionText"],
        answer=answer,
        choices=["yes", "no"] if answer in ("yes", "no") else None,
        meta=together(rest)
        | dict(answers=answers, confidence=[r.get("confidence") for r in rows], agreement=votes / len(rows)),
    )


def majority(rows: list[dict]) -> tuple[str, int, list[str]]:
    answers = [r["answer"].strip().lower() for r in rows]
    return *collections.Counter(answers).most_common(1)[0], answers


CLIP = (
    "audio|audio_path|audio_file|file_name|filename|file|wav|clip|path|youtube_id|ytid|fname|slice_file_name"
)
CAPTION = "captions|caption|caption_1|description"
LABEL = "label|labels|class|category"
START = ("start_s", "start_time", "start", "start_seconds")
TOLD = re.compile(r"captions?(_?\d+)?|description")


def clip_of(row: dict):
    """The clip of a row of captions or labels; YouTube ids carry their start second, as VGGSound's files do."""
    key = next(k for k in CLIP.split("|") if k in row)
    if key not in ("youtube_id", "ytid") or row[key] is None:
        return row[key]
    start = next((row[k] for k in START if row.get(k) not in (None, "")), None)
    return row[key] if start is None else f"{text(row, key, pop=False)}_{int(float(start)):06d}"


def one_clip(rows: list[dict], clip) -> dict:
    """What the rows of a clip have in common: its id and audio, and in `meta` all that they hold."""
    ids = [i for row in rows if (i := row.pop("id", None)) is not None]
    meta = together([flat(row) for row in rows])
    if any(i != ids[0] for i in ids):
        meta = flat({"ids": ids, "meta": meta})
    return dict(id=ids[0] if ids else clip if isinstance(clip, str) else None, audio=clip, meta=meta)


def captions(rows: list[dict]) -> dict:
    """All captions of one clip: material for `generate`; as a cold start, lessons in describing."""
    found = [v for row in rows for k, v in row.items() if TOLD.fullmatch(k) and v]
    found = [c for v in found for c in (v if isinstance(v, list) else [v])]
    if not found or not all(isinstance(c, str) for c in found):
        raise DataError(f'field "captions": expected texts, found {found!r:.60}')
    clip, carried = clip_of(rows[0]), next(k for k in CLIP.split("|") if k in rows[0])
    fields = one_clip(
        [
            {k: v for k, v in row.items() if not TOLD.fullmatch(k) and (k != carried or v != clip)}
            for row in rows
        ],
        clip,
    )
    meta = fields["meta"]
    if "captions" in meta:
        meta = flat({"captions_in_meta": meta.pop("captions"), "meta": meta})
    return fields | dict(question="Describe the sound.", target=found, meta=meta | {"captions": found})


def label(rows: list[dict]) -> dict:
    return one_clip(rows, clip_of(rows[0])) | dict(
        question="Which sound is heard in this clip?", answer=labels_of(rows)[0]
    )


def labels_of(rows: list[dict]) -> list[str]:
    key = next(k for k in LABEL.split("|") if k in rows[0])
    return list(dict.fromkeys(" ".join(text(row, key, pop=False).split()) for row in rows))


@dataclass(frozen=True)
class Format:
    """How a kind of file becomes questions. Readers that are given `group` get all rows of a question as a list."""

    keys: str  # the columns that give it away; "a|b" is either
    convert: Callable  # row -> fields of Example, taking out of the row what it carries over unchanged
    is_it: Callable = lambda row: True  # where the columns alone do not tell
    skip: Callable | None = None  # row -> why it is no question for us, or ""
    group: Callable | None = (
        None  # rows with the same key are one question; a row whose key is null stands alone
    )
    pool: Callable | None = (
        None  # row -> kinds, right answers; distractors: those of its first kind, then of the next
    )
    about: Callable | None = None  # all rows -> the version of the file; raises DataError on a broken one
    find: bool = True  # audio is looked for by its name, too; our own paths mean what they say
    text_only: bool = False  # may a question be without sound?


FORMATS = {
    "R1-AQA": Format("question_text multi_choice answer audio_path", avqa),
    "AVQA": Format("question_text multi_choice answer video_name", avqa),
    "AVRT": Format(
        "audio_path question multi_choice answer",
        lambda row: multiple_choice(row, choices="multi_choice", audio=row.pop("audio_path")),
    ),
    "MMAU": Format("audio_id question choices answer", mmau, about=mmau_version),
    "MMAU (Hub)": Format("instruction choices answer context|audio", mmau_hub, about=mmau_version),
    "MMAU-Pro": Format(
        "audio_path question choices answer task_identifier",
        skip=mmau_pro_skip,
        convert=lambda row: multiple_choice(row, audio=row.pop("audio_path")),
    ),
    "MMAR": Format(
        "audio_path question choices answer modality",
        lambda row: multiple_choice(row, audio=row.pop("audio_path")),
    ),
    "AudioMCQ": Format(
        "audio_path question choices answer", lambda row: multiple_choice(row, audio=row.pop("audio_path"))
    ),
    "AIR-Bench": Format("path question choice_a choice_b answer_gt task_name dataset_name", choice_columns),
    "MMSU": Format("question choice_a choice_b answer_gt audio|audio_path", choice_columns),
    "ARC": Format("question answerKey", arc, text_only=True),
    "Countdown": Format("nums target", countdown, text_only=True),
    "conversation": Format(
        "messages|conversations|query",
        conversation,
        text_only=True,
        is_it=lambda row: "query" not in row or "response" in row,
    ),
    "MUSIC-AVQA": Format(
        "video_id question_content templ_values anser type",
        music_avqa,
        skip=music_avqa_skip,
        pool=lambda row: (parse_json(row["type"].encode(), 'field "type"')[1:], [text(row, "anser")]),
    ),
    "Clotho-AQA": Format(
        "file_name QuestionText answer",
        clotho_aqa,
        group=lambda row: (row["file_name"], row["QuestionText"]),
        skip=lambda rows: "" if majority(rows)[1] > len(rows) / 2 else "the annotators disagree",
        pool=lambda rows: ([""], majority(rows)[:1]),
    ),
    "avqa-processed": Format(
        "question answer audio", avqa_processed, is_it=lambda row: "\nChoices:\n" in str(row["question"])
    ),
    "Hub": Format(
        "audio question choices answer",
        lambda row: multiple_choice(row, audio=row.pop("audio")),
        is_it=lambda row: isinstance(row["audio"], Embedded),
    ),
    "own": Format("question", own, find=False, text_only=True),
    "captions": Format(f"{CLIP} {CAPTION}", captions, group=clip_of),
    "labels": Format(
        f"{CLIP} {LABEL}",
        label,
        group=clip_of,
        pool=lambda rows: ([rows[0].get("family") or "", ""], labels_of(rows)),
    ),
}
COLUMNS = {
    k.casefold(): k for known in FORMATS.values() for either in known.keys.split() for k in either.split("|")
}
COLUMNS |= {k: k for k in (*START, "id", "family", "confidence", *(f"caption_{n}" for n in range(2, 6)))}


def format_of(row: dict, where: str) -> str:
    """The name of the first format that the row fits. Raises DataError listing the known ones."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {row!r:.60}")
    for name, known in FORMATS.items():
        if all(any(key in row for key in either.split("|")) for either in known.keys.split()) and known.is_it(
            row
        ):
            return name
    listed = "; ".join(f"{name}: {known.keys}" for name, known in FORMATS.items())
    raise DataError(
        f"{where}: unknown format, keys {sorted(map(str, row))!r:.300}. Known formats and their keys: {listed}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files: rows of JSON lines, a JSON list, CSV, parquet or a folder of sounds, each found again when it is asked for


JSON = json.JSONDecoder().decode  # what json.loads calls; a quarter of its time is finding that out


def parse_json(raw: bytes, where: str):
    try:
        return JSON(raw.decode().removeprefix("\ufeff"))  # ten times faster than the codec utf-8-sig
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text ({e.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise DataError(
            f"{where}: broken JSON ({e}); was the file cut off, or an object spread over several lines?"
        ) from None


def file_problem(path: str) -> str:
    """What is wrong with a path that should be a file, "" if nothing is. A pipe or a device is no file: it could hang."""
    if os.path.isfile(path):
        return ""
    what = (
        "is a directory"
        if os.path.isdir(path)
        else "is not a regular file"
        if os.path.exists(path)
        else "no such file"
    )
    return f"{path:.1000}: {what}"


class TextRows:
    """Rows of a text file, parsed on access: a million of them cost 24 bytes each."""

    def __init__(self, path: str):
        self.path, self.starts, self.stops, self.numbers = path, array("q"), array("q"), array("q")
        if problem := file_problem(path):
            raise DataError(f"{problem}; expected a file of questions (JSONL)")
        try:
            self.file = open(path, "rb")
            head = self.file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            while not head and (more := self.file.read(1 << 16)):
                head = more.lstrip()
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}") from None
        self.file.seek(0)
        if not head:
            if os.path.getsize(path):
                raise DataError(f"{path}: holds no question")
            raise DataError(f"{path}: is empty; expected a file of questions (JSONL)")
        if head[:2] == b"\x1f\x8b":
            raise DataError(f"{path}: is compressed; unpack it first (gunzip)")
        first = head.partition(b"\n")[0].decode("utf-8", "replace")
        self.entry, self.parse = "", parse_json
        if head[:1] == b"[":
            self.entry = "entry "
            self.index_list()
        elif head[:1] == b"{" or not re.search("[,;\t]", first) or re.fullmatch(r'"[^"]*"\s*', first):
            self.index_lines()
        else:
            self.index_csv(max(",;\t", key=first.count))

    def add(self, start: int, stop: int, number: int):
        self.starts.append(start)
        self.stops.append(stop)
        self.numbers.append(number)

    def index_lines(self):
        start = 0
        for number, line in enumerate(self.file, 1):
            if not line.isspace():
                self.add(start, start + len(line), number)
            start += len(line)

    def index_list(self):
        """Every entry is parsed once to find its end, and forgotten."""
        raw = self.file.read()
        try:
            whole = raw.decode("utf-8")
            del raw
            decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
            at, byte, seen = (
                whole.index("[") + 1,
                0,
                0,
            )  # `byte` is where character number `seen` lies in the file
            at = blank.match(whole, at).end()
            while whole[at] != "]":
                _, stop = decode(whole, at)
                start = byte = byte + len(whole[seen:at].encode())
                byte, seen = byte + len(whole[at:stop].encode()), stop
                self.add(start, byte, len(self) + 1)
                at = blank.match(whole, stop).end()
                if whole[at] == ",":
                    at = blank.match(whole, at + 1).end()
                elif whole[at] != "]":
                    raise ValueError(f"entry {len(self)} is followed by {whole[at]!r} and not by a comma")
            if blank.match(whole, at + 1).end() != len(whole):
                raise ValueError("text after the closing bracket")
        except UnicodeDecodeError as e:
            raise DataError(f"{self.path}: not UTF-8 text ({e.reason}); save the file as UTF-8") from None
        except (ValueError, IndexError, RecursionError) as e:
            why = "it ends too soon" if isinstance(e, IndexError) else e
            raise DataError(
                f"{self.path}: broken JSON ({why}) after entry {len(self)}; was the file cut off?"
            ) from None

    def index_csv(self, delimiter: str):
        """A record may span lines. A header is a first line that names a known column; VGGSound's files have none."""
        at, start = 0, 0

        def lines():
            nonlocal at
            for line in self.file:
                at += len(line)
                yield line.decode("utf-8")

        def parse_record(raw: bytes, where: str) -> dict:
            try:
                line = raw.decode().removeprefix("\ufeff").rstrip("\r\n")
                record = (
                    line.split(delimiter)
                    if '"' not in line and line.isprintable()
                    # three times faster
                    else next(csv.reader(io.StringIO(line, newline=""), delimiter=delimiter, strict=True))
                )
            except (StopIteration, UnicodeDecodeError, csv.Error) as e:
                raise DataError(f"{where}: not a CSV record ({e})") from None
            if len(record) != len(self.header):
                raise DataError(
                    f"{where}: {len(record)} fields, expected the {len(self.header)} columns {self.header!r:.300}"
                )
            return dict(zip(self.header, record))

        reader = csv.reader(lines(), delimiter=delimiter, strict=True)  # a quote left open is an error
        try:
            for record in reader:
                if any(cell.strip() for cell in record):
                    self.add(start, at, reader.line_num)
                start = at
        except UnicodeDecodeError as e:
            raise DataError(
                f"{self.path}:{reader.line_num + 1}: not UTF-8 text ({e.reason}); save the file as UTF-8"
            ) from None
        except csv.Error as e:
            why = (
                "do its lines end in CR alone? save it with LF or CRLF"
                if "new-line" in str(e)
                else "is a quote left open?"
            )
            raise DataError(
                f"{self.path}:{reader.line_num}: not a CSV record ({str(e).partition(' - ')[0]}); {why}"
            ) from None
        self.header, self.parse = [], parse_record
        if len(self):
            raw = os.pread(self.file.fileno(), self.stops[0], 0).decode("utf-8-sig")
            try:
                record = next(
                    csv.reader(io.StringIO(raw.lstrip(), newline=""), delimiter=delimiter, strict=True)
                )
            except csv.Error as e:
                raise DataError(f"{self.where(0)}: not a CSV record ({e})") from None
            record = [cell.strip() for cell in record]
            if (
                len(record) == 4
                and record[1].isdigit()
                and record[3] in ("train", "test", "validation", "val")
            ):
                self.header = ["youtube_id", "start_s", "label", "split"]
            elif len(record) == 2 and re.search(r"\.(mp4|mkv|webm|wav|flac|mp3|ogg)$", record[0]):
                self.header = ["clip", "label"]
            else:
                self.header = record = [
                    COLUMNS.get(name.lstrip("# ").casefold(), name or f"column {n}")  # AudioSet: "# YTID"
                    for n, name in enumerate(record, 1)
                ]
                if twice := [name for name in record if record.count(name) > 1]:
                    raise DataError(f"{self.where(0)}: two columns are called {twice[0]!r:.80}")
                del self.starts[0], self.stops[0], self.numbers[0]

    def __len__(self):
        return len(self.starts)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.entry}{self.numbers[i]}"

    def __getitem__(self, i: int):
        # pread: threads may share it, and a file that shrank meanwhile is an error and not a crash
        raw = os.pread(self.file.fileno(), self.stops[i] - self.starts[i], self.starts[i])
        try:
            return self.parse(raw, "")
        except DataError:
            return self.parse(raw, self.where(i))  # spelt out only for a line that is refused


class TableRows:
    """Rows of a parquet file, a saved data set or a Hub id ("org/name[/config][:split]"), through `datasets`."""

    def __init__(self, source: str):
        self.path = source
        try:
            import datasets
        except ImportError:
            raise DataError(
                f"{source}: parquet and Hub data sets need the package datasets (pip install datasets)"
            ) from None
        name, _, split = source.partition(":") if not os.path.exists(source) else (source, "", "")
        try:
            datasets.disable_progress_bars()
            if os.path.isfile(source):
                rows = datasets.load_dataset("parquet", data_files=source, split="train")
            elif os.path.exists(os.path.join(source, "state.json")):
                rows = datasets.load_from_disk(source)
            elif os.path.isdir(source):
                rows = datasets.load_dataset(source, split="train")
            else:
                org, name, *config = name.split("/")
                rows = datasets.load_dataset(f"{org}/{name}", *config, split=split or "train")
        except Exception as e:  # the library raises what its storage raises
            raise DataError(
                f"{source}: could not be loaded ({type(e).__name__}: {e!s:.300}); expected a file, or a Hub id as "
                "org/name[/config][:split]"
            ) from None
        self.table = rows.with_format("arrow")
        kinds = {
            name: getattr(kind, "feature", kind) for name, kind in rows.features.items()
        }  # of a list: of its items
        self.clips = {
            name
            for name, kind in kinds.items()
            if isinstance(kind, datasets.Audio)
            or isinstance(kind, dict)
            and set(kind) == {"bytes", "path"}
            or getattr(kind, "dtype", "") in ("binary", "large_binary")
        }
        self.lists = {name for name in self.clips if hasattr(rows.features[name], "feature")}

    def __len__(self):
        return len(self.table)

    def where(self, i: int) -> str:
        return f"{self.path}:row {i + 1}"

    def __getitem__(self, i: int) -> dict:
        row = self.table[i]
        cells = {name: row.column(name)[0] for name in row.column_names}
        return {
            name: value.as_py()
            if name not in self.clips or name in self.lists and not value.is_valid
            else [Embedded(self.table, i, name, k) or None for k in range(len(value))]
            if name in self.lists
            else Embedded(self.table, i, name)
            for name, value in cells.items()
        }


class FolderRows:
    """Sounds sorted in folders, or named after what they are: "dog/1.wav" and "dog_bark_01.wav" are labelled.

    Of animals/dog/1.wav the label is "dog" and the family "animals"; of dog_bark_01.wav they are "dog bark" and "dog".
    """

    def __init__(self, path: str):
        self.path = path
        names = sorted(
            os.path.relpath(os.path.join(folder, name), path)
            for folder, _, files in os.walk(path)
            for name in files
            if name.lower().endswith(SOUND_FILES)
        )
        names = [
            n for n in names if not any(part[0] == "." or part == "__MACOSX" for part in n.split(os.sep))
        ]  # hidden
        if not names:
            raise DataError(
                f"{path}: is a directory, and holds neither sounds ({', '.join(SOUND_FILES)}) nor a data set"
            )
        self.rows, called = [self.label(name) for name in names], {}
        for row in self.rows:  # "24 bus" and "7 bus": is it a count, or do the numbers tell them apart?
            part = next((p for p in row["audio"].split(os.sep)[-2::-1] if plain_words(p) == row["label"]), "")
            first = called.setdefault(row["label"], part)
            if first and part and re.sub(r"[\W_]", "", first.lower()) != re.sub(r"[\W_]", "", part.lower()):
                raise DataError(
                    f"{path}: the folders {first} and {part} would both be labelled {row['label']!r}; merge them, "
                    "or tell them apart in words"
                )
        if len({row["label"] for row in self.rows}) < 2:
            raise DataError(
                f"{path}: the names of its {len(names)} sounds do not tell them apart; sort them in folders named "
                "after what is heard, or write a CSV with the columns audio,label"
            )
        if mute := [row["audio"] for row in self.rows if not row["label"]]:
            raise DataError(
                f"{path}: the names of {len(mute)} of its {len(names)} sounds do not say what is heard, the first "
                f"{mute[0]}; put them in folders named after it, or take them out"
            )

    @staticmethod
    def label(name: str) -> dict:
        folders = [
            words
            for part in name.split(os.sep)[:-1]
            if (words := plain_words(part)) and words not in NOT_A_LABEL
        ]
        words = folders[-1] if folders else plain_words(os.path.splitext(os.path.basename(name))[0])
        return {
            "audio": name,
            "label": words,
            "family": folders[-2] if len(folders) > 1 else words.split(" ")[0],
        }

    def __len__(self):
        return len(self.rows)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.rows[i]['audio']}"

    def __getitem__(self, i: int) -> dict:
        return dict(self.rows[i])


SOUND_FILES = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aif", ".aiff")
VIDEO_FILES = (".mp4", ".mkv", ".webm", ".m4a")
NOT_A_LABEL = {
    "audio",
    "audios",
    "clips",
    "data",
    "sounds",
    "samples",
    "wav",
    "wavs",
    "train",
    "test",
    "val",
    "validation",
}


def plain_words(name: str) -> str:
    """ "Dog-bark_01b" -> "dog bark", "C_major" -> "c major": what is left without numbers and letters that name no word"""
    letters = (
        c if unicodedata.category(c)[0] in "LM" else " " for c in unicodedata.normalize("NFC", name.lower())
    )
    found = "".join(letters).split()
    return " ".join(
        w for w, then in zip(found, [*found[1:], ""]) if len(w) > 1 or not w.isascii() or len(then) > 1
    )


def stem_of(name: str) -> str:
    """A clip's name without folder and ending; AVQA says "-HG3Omg_89c_000030" (a YouTube id and its start second) and the
    file is "-HG3Omg_89c_30.wav". In other names zeros count: take_1 and take_001 are two."""
    name = re.sub(
        r"\.(wav|flac|ogg|mp3|opus|aiff?|mp4|mkv|webm|m4a)$", "", os.path.basename(name), flags=re.IGNORECASE
    )
    return re.sub(r"^([\w-]{11}_)(?=\d{6}$)0{1,5}", r"\1", name)


# stems that no other clip of the world has: a YouTube id with a start second, a UUID, a hash
is_id = re.compile(r"(?=.*[a-z])(?=.*[A-Z])[\w-]{11}_(0|[1-9]\d*)|(?=.*\d)(?=.*[a-f])[\da-f-]{16,}").fullmatch


@functools.cache
def folders_in(folder: str) -> list[str]:
    try:
        return sorted(e.path for e in os.scandir(folder) if e.is_dir())
    except (OSError, ValueError):
        return []


@functools.cache
def sounds_in(folder: str, deep: bool = False) -> dict[str, list[str]]:
    """stem -> files, of the sounds of a folder, and of its folders"""
    found = collections.defaultdict(list)
    for place in (folder, *(folders_in(folder) if deep else ())):
        with contextlib.suppress(OSError, ValueError):
            for e in os.scandir(place):
                if e.name.lower().endswith(SOUND_FILES):
                    found[stem_of(e.name)].append(e.path)
    return found


def below(name: str, folder: str) -> str:
    return os.path.join(folder, os.path.expanduser(name) if name[:1] == "~" else name)


def locate(name: str, folder: str) -> str:
    """Where the clip lies that a data set calls `name`: there, whatever its ending; or in `folder` or one of its folders, if
    only one file there can be it: by the whole name, or by an id. "clotho/1.wav" is never "fsd/1.wav"."""
    path = below(name, folder)
    if os.path.isfile(path) and not path.lower().endswith(VIDEO_FILES):
        return path
    stem = stem_of(name)
    found = set(sounds_in(os.path.dirname(path)).get(stem, ()))
    if not found and is_id(stem):
        found = set(sounds_in(folder, deep=True).get(stem, ()))
    if (
        not found
        and os.path.dirname(name)
        and folder.endswith(os.path.join(os.sep, os.path.normpath(os.path.dirname(name))))
    ):
        found = set(sounds_in(folder).get(stem, ()))  # `folder` is the one that the name begins with
    found = found or {
        file for place in folders_in(folder) if os.path.isfile(file := os.path.join(place, name))
    }
    return found.pop() if len(found) == 1 else path


def with_distractors(right: list[str], kinds: list[str], pools: dict, seed: str, n: int = 4) -> list[str]:
    """n choices in random order: the first right one, and wrong ones of its first kind, then of the next. Drawn by seed."""
    rng, choices = random.Random(seed), [right[0]]
    for kind in kinds:
        others = rng.sample(pools[kind], min(len(pools[kind]), n + len(choices) + len(right) - 1))
        choices += [c for c in others if c not in choices and c not in right][: n - len(choices)]
    rng.shuffle(choices)
    return choices


class Examples(collections.abc.Sequence):
    """A data set as a sequence of Example, each made when it is asked for.

    source: a file of a known format (JSON lines, a JSON list, CSV, parquet), a folder of sounds, or a Hub id.
    audio_dir: where relative audio paths start; "" is the folder of the file.
    Attributes: format, version (a benchmark's, or ""), skipped (Counter of reasons).
    """

    def __init__(self, source: str, audio_dir: str = ""):
        self.path = source
        self.folder = os.path.abspath(
            audio_dir or (source if os.path.isdir(source) else os.path.dirname(source))
        )
        self.rows = open_rows(source)
        if not len(self.rows):
            raise DataError(f"{source}: holds no question")
        self.format = format_of(self.rows[0], self.rows.where(0))
        self.known, self.skipped, self.pools, self.n_choices = (
            FORMATS[self.format],
            collections.Counter(),
            {},
            4,
        )
        self.own_items = range(len(self.rows))  # of every question: its row, or the tuple of its rows
        if self.known.group:
            groups = {}
            for i in self.own_items:
                self.ask(
                    lambda row, i=i: groups.setdefault(self.known.group(row) or (None, i), []).append(i), i
                )
            self.own_items = list(map(tuple, groups.values()))
        if self.known.skip:
            reasons = [self.ask(self.known.skip, item) for item in self.own_items]
            self.skipped.update(filter(None, reasons))
            self.own_items = [item for item, reason in zip(self.own_items, reasons) if not reason]
            if not self.own_items:
                raise DataError(
                    f"{source}: {self.format} format, and no question that can be used: "
                    f"{dict(self.skipped)!r:.300}"
                )
        if self.known.pool:
            pools = collections.defaultdict(set)

            def pooled(row):
                kinds, answers = self.known.pool(row)
                for answer in answers:
                    for kind in kinds if answer.strip() and answer.encode() else ():
                        pools[kind].add(answer)

            for item in self.own_items:
                self.ask(pooled, item)
            self.pools = {kind: sorted(answers) for kind, answers in pools.items()}
        try:
            rows = (self.ask(lambda row: row, item) for item in self.own_items)
            self.version = self.known.about(rows) if self.known.about else ""
        except DataError as e:
            raise e if str(e).startswith(f"{source}:") else DataError(f"{source}: {e}") from None

    def ask(self, function: Callable, item):
        """function(row or rows), whose every fault is a DataError that names the line"""
        rows = [self.rows[i] for i in item] if isinstance(item, tuple) else self.rows[item]
        for i, row in zip(item, rows) if isinstance(item, tuple) else [(item, rows)]:
            if not isinstance(row, dict):
                raise DataError(f"{self.rows.where(i)}: expected a JSON object, found {row!r:.60}")
        try:
            return function(rows)
        except (
            DataError,
            TypeError,
            ValueError,
            AttributeError,
            LookupError,
            StopIteration,
            OverflowError,
        ) as e:
            if isinstance(item, tuple) and len(item) > 1:
                for i in item:  # which of them is bad alone?
                    self.ask(function, (i,))
            where, row = (
                (self.rows.where(item), rows)
                if isinstance(item, int)
                else (self.rows.where(item[0]), rows[0])
            )
            why = (
                f'field "{e.args[0]}": missing; found only {sorted(map(str, row))!r:.300}'
                if isinstance(e, KeyError)
                else e
                if isinstance(e, DataError)
                else f"not a row of {self.format} format ({e!s:.200}); found {row!r:.300}"
            )
            raise DataError(f"{where}: {why}") from None

    def __len__(self):
        return len(self.own_items)

    @property
    def items(self):
        return [item if isinstance(item, tuple) else (item,) for item in self.own_items]

    def rows_of(self, i: int) -> list:
        return [self.rows[k] for k in self.items[i]]

    def __str__(self):
        skipped = "".join(f"; {n} skipped: {reason}" for reason, n in self.skipped.most_common(4))
        version = f" {self.version}" if self.version else ""
        return f"{self.path}: {self.format} format{version}, {len(self)} examples{skipped}"

    def where(self, i: int) -> str:
        item = self.own_items[i]
        return self.rows.where(item[0] if isinstance(item, tuple) else item)

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        where, item = self.where(i), self.own_items[i]
        fields = self.ask(self.convert, item)
        if self.pools and not fields.get("choices"):
            kinds, right = self.ask(self.known.pool, item)
            fields["choices"] = with_distractors(right, kinds, self.pools, f"{i} {right[0]}", self.n_choices)
        example = make_example(fields, where)
        if example.audio is None and not self.known.text_only:
            raise DataError(
                f'{where}: field "audio": missing; {self.format} format is about sound: name it or drop the line'
            )
        find, clips = locate if self.known.find else below, example.clips
        try:
            for k, clip in enumerate(clips):
                if isinstance(clip, Embedded):
                    clip.folder = self.folder
                elif isinstance(clip, str):
                    clips[k] = find(clip, self.folder)
            example.audio = clips if isinstance(example.audio, list) else clips[0] if clips else None
        except ValueError:  # a NUL byte or half a character
            raise DataError(f'{where}: field "audio": expected a path, found {example.audio!r:.80}') from None
        return example

    def convert(self, row) -> dict:
        """What the converter leaves of a row is its `meta`."""
        fields = self.known.convert(row)
        return fields if "meta" in fields else fields | {"meta": row}


def open_rows(source: str):
    if os.path.isdir(source):
        holds = [name for _, _, files in os.walk(source) for name in files]
        return (
            TableRows if "state.json" in holds or any(n.endswith(".parquet") for n in holds) else FolderRows
        )(source)
    if os.path.isfile(source):
        with open(source, "rb") as f:
            return (TableRows if f.read(4) == b"PAR1" else TextRows)(source)
    if (
        re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.%+:\[\]-]+)?", source)
        and not os.path.isdir(source.split("/")[0])
        and not re.search(
            r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip|wav|flac|mp3|ogg)$", source.split(":")[0]
        )
    ):
        return TableRows(source)
    return TextRows(source)  # which says what is wrong


def scan(examples: Examples, purpose: str = "train", most: int = 10) -> array:
    """Parse every line and look for its audio file; no audio is read.       -> one hash a line, of its clip or its id

    purpose: "train" needs choices and an answer (or Countdown's numbers), "cold_start" a target, "check" neither.
    Raises DataError listing the first `most` problems.
    """
    keys, problems, seen = array("L"), [], {}
    for i in range(len(examples)):
        try:
            example = examples[i]
            if purpose == "train" and not example.has_answer:
                missing = "answer" if example.choices else "choices"
                raise DataError(f'{examples.where(i)}: field "{missing}": missing, and training needs it')
            if purpose == "cold_start" and example.target is None:
                raise DataError(
                    f'{examples.where(i)}: field "target": missing, and a cold start needs the text to imitate'
                )
            for clip in example.clips:
                if isinstance(clip, str) and clip not in seen:
                    if (
                        len(seen) < 100_000
                    ):  # several questions a clip is usual; remembering them all is not worth it
                        seen[clip] = True
                    if problem := file_problem(clip):
                        raise DataError(f'{examples.where(i)}: field "audio": {problem}{in_video(clip)}')
            keys.append(clip_key(example))
        except DataError as e:
            keys.append(0)
            problems.append(str(e))
            if len(problems) == most:
                break
    if problems:
        raise DataError("\n".join(problems) + ("\n..." if len(problems) == most else ""))
    return keys


def clip_key(example: Example) -> int:
    """A hash of the first clip, or of the id of a question without one: questions with the same key belong together."""
    clip, *_ = example.clips or [example.id]
    if isinstance(clip, Embedded):
        clip = clip.key
    elif example.clips and ("/." in clip or "//" in clip):  # one file, however its path is spelt
        clip = os.path.normpath(clip)
    return zlib.crc32(clip.encode("utf-8", "replace"))


def held_out(keys: array, n: int) -> tuple[list[int], list[int]]:
    """Split by clip: -> (train indices, about n held-out indices). All questions on one clip fall on one side."""
    n = min(n, len(keys) // 5)
    if not n:
        return list(range(len(keys))), []
    mixed = [zlib.crc32(k.to_bytes(8, "little")) for k in keys]
    limit = sorted(mixed)[n - 1]
    train, held = (
        [i for i, h in enumerate(mixed) if h > limit],
        [i for i, h in enumerate(mixed) if h <= limit],
    )
    return (train, held) if train else (held, [])  # one clip cannot be split


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(source: str | bytes | Embedded, max_s: float = 30.0) -> tuple[np.ndarray, bool]:
    """A wav, flac, ogg or mp3, whatever its name -> (float32 mono samples at 16 kHz, was it cut at max_s?).

    Channels are averaged and then resampled with soxr; only the first max_s seconds are decoded.
    Raises AudioError with the path and the reason.
    """
    wave, _, _, seconds = read_audio(source, max_s)
    return wave, seconds > max_s


def in_video(path: str) -> str:
    """What to do if the sound that should be at `path` lies in a video, "" if it does not."""
    stem, end = os.path.splitext(path)
    video = next(
        (stem + e for e in (end, *VIDEO_FILES) if e.lower() in VIDEO_FILES and os.path.isfile(stem + e)), ""
    )
    return (
        video
        and f"; extract the sound: ffmpeg -i {video} {path if end.lower() in SOUND_FILES else stem + '.wav'}"
    )


def read_audio(
    source: str | bytes | Embedded, max_s: float, whole: bool = False
) -> tuple[np.ndarray, int, int, float]:
    """-> (the first max_s seconds as load_audio gives them, the file's rate in Hz, its channels, seconds of the whole clip)

    Raises AudioError; if it must be `whole`, also on a clip that lost its end: it plays, and only its header knows. Blocks
    that stay in the cache are mixed and resampled as they are decoded: half the time of doing it in one piece.
    """
    import soundfile
    import soxr

    name = (
        source
        if isinstance(source, str)
        else f"<{len(source)} bytes>"
        if isinstance(source, bytes)
        else repr(source)
    )
    source = source.read() if isinstance(source, Embedded) else source
    if isinstance(source, str) and file_problem(source):
        raise AudioError(file_problem(source) + in_video(source))
    try:  # by descriptor: from a name such as x.raw or x.au the library would guess a format
        with soundfile.SoundFile(
            os.open(source, os.O_RDONLY) if isinstance(source, str) else io.BytesIO(source)
        ) as f:
            rate_hz, channels, parts, n = f.samplerate, f.channels, [], 0
            kind, full_scale = (
                ("int16", 2**15) if f.subtype == "PCM_16" else ("float32", 1)
            )  # int16: a third of the time
            block, mix = (
                np.empty((1 << 15, channels), kind),
                np.full(channels, 1 / channels / full_scale, np.float32),
            )
            resampler, longest = soxr.ResampleStream(rate_hz, RATE_HZ, 1), int(max_s * rate_hz)
            while n <= max_s * rate_hz and len(part := f.read(out=block)):
                mean = part[: max(0, longest - n)] @ mix
                if len(mean) and not (
                    mean.min() > -1e9 and mean.max() < 1e9
                ):  # NaN is neither; full scale is 1
                    raise AudioError(
                        f"{name}: holds samples that are not finite numbers, or absurdly large ones"
                    )
                parts.append(mean if rate_hz == RATE_HZ else resampler.resample_chunk(mean))
                n += len(part)
            promised = f.frames / rate_hz if f.frames < 2**62 else 0  # some headers do not know
            sizes = re.search(r"data : (\d+) \(should be (\d+)", f.extra_info)  # of a wav
    except (OSError, RuntimeError) as e:  # soundfile's errors are RuntimeErrors
        hint = in_video(source) if isinstance(source, str) else ""
        raise AudioError(
            f"{name}: not a readable sound file ({str(e).rpartition(': ')[2].strip()}){hint}"
        ) from None
    if not n:
        raise AudioError(f"{name}: is empty")
    seconds = n / rate_hz if n <= max_s * rate_hz else max(n / rate_hz, promised)
    if (
        whole and sizes and int(sizes[2]) < int(sizes[1]) < 0x7FFFFF00
    ):  # above: a stream that did not know its length
        raise AudioError(f"{name}: is cut short, {sizes[2]} of {sizes[1]} bytes of sound are there")
    if whole and promised > seconds + 0.1:
        raise AudioError(f"{name}: is cut short, {seconds:.1f} of {promised:.1f} s are there")
    if (heard := min(n, longest)) * RATE_HZ < (MIN_SAMPLES - 0.5) * rate_hz:
        raise AudioError(
            f"{name}: too short, {heard / rate_hz * 1000:.1f} ms; at least "
            f"{MIN_SAMPLES / RATE_HZ * 1000:.1f} ms are needed"
        )
    if rate_hz != RATE_HZ:
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts), rate_hz, channels, seconds


def probe_audio(examples: Examples, max_s: float, budget_s: float = 2.0) -> tuple[int, list[str]]:
    """Decode clips for budget_s seconds, first and last lines first.      -> (number decoded, problems)"""
    n = len(examples)
    edge = [*range(min(n, 32)), *range(max(32, n - 32), n)]
    order = [*edge, *range(32, max(32, n - 32))]
    problems, count, deadline = [], 0, time.monotonic() + budget_s
    clips = ((i, clip) for i in order for clip in examples[i].clips)
    for (i, _), result in ahead(
        clips, lambda clip: load_audio(clip[1], max_s)[0].shape, os.cpu_count() or 1, 16
    ):
        count += 1
        if isinstance(result, DataError):
            problems.append(f'{examples.where(i)}: field "audio": {result}')
        if time.monotonic() > deadline and count >= min(len(edge), n):
            break
    return count, problems


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Template:
    """A named prompt: the user turn is the clip, the question, its options, and `ending`."""

    ending: str
    system: str | None = None  # None: whatever the checkpoint's chat template puts there
    max_new_tokens: int = 32
    relistens: int = 0  # parts of its clip that a completion may hear again, by <seg>start, end</seg>
    question: str | None = None  # asked in place of the example's own question and options


PROMPTS = {
    # Omni-R1 (arXiv 2505.09439): nothing but the question and its options
    "direct": Template(""),
    # R1-AQA (arXiv 2503.11197), without and with a chain of thought
    "answer": Template(" Output the final answer in <answer> </answer>."),
    "think": Template(
        " Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
        max_new_tokens=256,
    ),
    # Ke-Omni-R: the same, kept short
    "think_short": Template(
        " Output the thinking process (less than 50 words) in <think> </think> and final answer in "
        "<answer> </answer>.",
        max_new_tokens=128,
    ),
    # Audio-Reasoner (arXiv 2503.02318), whose four steps SARI (arXiv 2504.15900) has too
    "structured": Template(
        "",
        max_new_tokens=512,
        system="You are an audio deep-thinking model. Upon receiving a question, "
        "please respond in two parts: <THINK> and <RESPONSE>. The <THINK> section should be further "
        "divided into four parts: <PLANNING>, <CAPTION>, <REASONING>, and <SUMMARY>.",
    ),
    # Echo (arXiv 2602.11909): what is behind <seg>start, end</seg> is heard again
    "relisten": Template(
        " Think step-by-step. Refer to the specific audio segments while thinking, and indicate the "
        "corresponding timestamps. Answer in the format of <think>...</think><answer>...</answer>.",
        max_new_tokens=512,
        relistens=8,
    ),
    # TinyZero's; the task itself is the question of data.py's Countdown format
    "countdown": Template(
        " Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
        "for example <answer> (1 + 2) / 3 </answer>.",
        max_new_tokens=512,
    ),
    # material for `data.py generate`
    "caption": Template(
        "", max_new_tokens=128, question="Describe in detail everything that can be heard in this audio."
    ),
}


def chat(example: Example, prompt: Template, with_audio: bool = True) -> list[dict]:
    """Messages for a chat template. Options are written as R1-AQA writes them, a Python list."""
    options = (
        f" Please choose the answer from the following options: {example.choices}." if example.choices else ""
    )
    content = [{"type": "text", "text": prompt.question or example.question + options + prompt.ending}]
    if with_audio:
        content = [
            {"type": "audio", "audio": "clip"} for _ in example.clips
        ] + content  # what to play is placed later
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": content if len(content) > 1 else content[0]["text"]}]


def shuffle_choices(example: Example, rng) -> Example:
    """The same question with its options in another order (`rng`: a random.Random)."""
    order = rng.sample(range(len(example.choices)), len(example.choices))
    answer = None if example.answer is None else order.index(example.answer)
    return Example(**{**vars(example), "choices": [example.choices[i] for i in order], "answer": answer})


# ---------------------------------------------------------------------------------------------------------------------
# Question generation: captions -> questions, as AVQA-GPT and VGGS-GPT were made (Omni-R1, arXiv 2505.09439)
#
#     captions of a clip -> a language model behind an OpenAI-compatible server -> `judge` -> one line of JSON
#
# Every clip that was answered gives one line, in the file of questions or in the file of rejects. Lines are written in the
# order of the clips, one system call each, so both files are whole at any moment: after any end, kill -9 included, the
# same command goes on where they stop, and an unbroken run would have written the same bytes.

WRITER = """You write multiple-choice listening questions. A listener hears one short audio clip and nothing else. You \
cannot hear it; you get the notes of people who could. Notes may be wrong or contradict each other, and some tell what \
only eyes could know, such as colours, clothes or places in view: build on what they agree on and on what is audible.

Write one question in English that
- can be answered only by listening: not by common sense, not from the wording of the question or of its choices;
- asks about what sounds, how, how often, how loud, how long, in which order, how near, by whom or what, or in which mood;
- has exactly four choices of the same kind, similar in length and wording, each plausible for such a clip, none part of \
another, and no "none of the above";
- has exactly one right choice, which the notes support, and three wrong ones, which the notes speak against;
- never hints at the answer, and never mentions notes, captions, descriptions, texts or anything that has to be seen;
- fits on one line: at most 40 words, each choice at most 15 words, without a letter or a number in front.

Reply with one JSON object and nothing else:
{"question": "...", "choices": ["...", "...", "...", "..."], "answer": "the right choice, word for word"}"""
NOTES = "Notes on the clip:\n{}\n\nWrite the question."
SHOWN = [  # one worked example: without it small models answer with prose
    {
        "role": "user",
        "content": NOTES.format(
            "- a door creaks open slowly and someone walks in on a wooden floor\n"
            "- a squeaking door, then footsteps, a man in a red coat enters"
        ),
    },
    {
        "role": "assistant",
        "content": json.dumps(
            dict(
                question="What is heard right after the door creaks?",
                choices=["A key in a lock", "Footsteps on wood", "A window closing", "A dog on gravel"],
                answer="Footsteps on wood",
            )
        ),
    },
]
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["question", "choices", "answer"],
    "properties": {
        "question": {"type": "string"},
        "answer": {"type": "string"},
        "choices": {"type": "array", "items": {"type": "string"}, "minItems": 4, "maxItems": 4},
    },
}
PROMPT_VERSION = hashlib.sha256(json.dumps([WRITER, NOTES, SHOWN, SCHEMA]).encode()).hexdigest()[
    :8
]  # cannot be forgotten


def number(*parts) -> int:
    """64 bits that depend on nothing but the parts (JSON values)."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big")


def writing_prompt(clip: Example) -> list[dict]:
    """The messages that ask for a question on a clip. Raises DataError if its captions are not texts, or without a file."""
    captions = clip.meta.get("captions")
    if not isinstance(clip.audio, str):
        remedy = "; it lies inside the data set: convert it first" if isinstance(clip.audio, Embedded) else ""
        raise DataError(
            f'clip {clip.id!r:.80}: field "audio": expected a path, found {clip.audio!r:.60}{remedy}'
        )
    if (
        not isinstance(captions, list)
        or not captions
        or not all(isinstance(c, str) and c.strip() for c in captions)
    ):
        raise DataError(
            f'clip {clip.id!r:.80}: field "captions": expected a list of texts, found {captions!r:.80}'
        )
    text = NOTES.format("\n".join("- " + " ".join(c.split()) for c in captions))
    if HALF.search(text):
        raise DataError(
            f'clip {clip.id!r:.80}: field "captions": holds half a character; mend or drop the line'
        )
    return [{"role": "system", "content": WRITER}, *SHOWN, {"role": "user", "content": text}]


# ---- what is accepted

STOP_WORDS = frozenset(
    "a an the this that these those it its in on at of to is are was were be been do does did and or "
    "clip audio recording".split()
)
HALF, CONTROL = re.compile(r"[\ud800-\udfff]"), re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LETTERS = ("ABCD", "abcd", "1234")
LETTERED = re.compile(
    r"\(?([A-Da-d1-4])[.):]+(?!\d)\s*(.*)", re.DOTALL
)  # "B. dog", "(b) dog", "2. dog", not "2.5"
BANNED = [  # reason, what must not stand in a question or a choice; sounds with such a name are let through
    (
        "about sight",
        r"see(?![ -]?saw)|sees|seen|seeing|look(?:s|ed|ing)?|watch(?:ed|ing)|visib\w*|visual\w*|"
        r"colou?r(?!atura)\w*|picture[sd]?|images?|photo(?:s|graphs?)?|footage|videos?(?![ -]?games?)|on[ -]?screen|wearing|"
        r"wears|dressed|cameras?(?! (?:shutter|click|flash))|shown|view(?:s|ed|ers?|ing)?|in (?:the|this) frame|(?:t-?)?shirts?|"
        r"(?:red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y) (?:coat|jacket|dress|hat|suit|uniform)(?:s|es)?",
    ),
    (
        "mentions a text",
        r"captions?|captioned|descriptions?|described|annotations?|transcripts?|according to|"
        r"(?:based on|from|by) (?:the |these |your )?(?:given |provided )?notes(?! of)|the notes (?:say|state|mention|suggest)|"
        r"texts?(?!(?:[ -](?:message|alert|tone|notification)))|(?<!musical )passages?",
    ),
    ("mentions other choices", r"of the (?:above|choices|options|other choices)|both [a-d] and [a-d]"),
]
BANNED = [(reason, re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)) for reason, pattern in BANNED]


def words(text: str) -> tuple[str, ...]:
    """A text as it is compared: lower-case words without punctuation."""
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def fingerprint(row: dict) -> int:
    """Equal for questions that share all words of question and choices but stop words, in whatever order."""
    return number(sorted(set(words(" ".join([row["question"], *row["choices"]]))) - STOP_WORDS))


def read_reply(text: str, schema: dict = SCHEMA) -> tuple[dict, str]:
    """A reply -> (its one JSON object, "") or ({}, reason). Prose around the object is let through, a second one is not."""
    text = text.rpartition("</think>")[2]  # what some servers leave in of a model's thoughts is not its reply
    found, at = [], text.find("{")
    try:
        while at >= 0:
            row, end = json.JSONDecoder().raw_decode(text, at)
            found += [row] if row not in found else []
            at = text.find("{", end)
    except (ValueError, RecursionError):
        return {}, "broken JSON"
    if len(found) != 1:
        return {}, "several JSON objects" if found else "no JSON object"
    kinds = schema["properties"]
    if not kinds.keys() <= found[0].keys():
        return {}, "missing key"
    row = {key: found[0][key] for key in kinds}
    lists = [row[key] if kind["type"] == "array" else [row[key]] for key, kind in kinds.items()]
    if not all(isinstance(values, list) and all(isinstance(v, str) for v in values) for values in lists):
        return {}, "wrong type"
    return row, ""


def tidy(row: dict) -> dict:
    """The question on one line, the choices without letters in front, the answer as an index or None."""
    choices, answer = [c.strip() for c in row["choices"]], row["answer"].strip()
    marks, mark = [LETTERED.fullmatch(c) for c in choices], LETTERED.fullmatch(answer)
    letters = next((kind for kind in LETTERS if [m and m[1] for m in marks] == list(kind)), "")
    choices = [m[2] for m in marks] if letters else choices
    letter, rest = (mark[1], mark[2]) if mark else (answer, "")
    kinds = [kind for kind in LETTERS if rest or kind in ("ABCD", letters)]  # a bare "2" may count something
    place = next((kind.index(letter) for kind in kinds if letter in list(kind[: len(choices)])), None)
    keys = [reads(c) for c in choices]
    if answer in choices:
        index = choices.index(answer)
    elif reads(answer) in keys:
        index = keys.index(reads(answer))
    elif place is not None and rest:  # both must agree
        index = place if reads(rest) == keys[place] else None
    else:  # a choice may be a note's name
        index = None if any(len(c) == 1 for c in choices) else place
    return dict(question=" ".join(row["question"].split()), choices=choices, answer=index)


def fault(row: dict, captions: list[str]) -> str:
    """What is wrong with a tidy row, in words that can be counted; "" if nothing is."""
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if len(choices) != 4:
        return "not four choices"
    if answer is None:
        return "answer not among the choices"
    asked, keys, text = words(question), [words(c) for c in choices], "\n".join([question, *choices])
    alike = [reads(c).split() for c in choices]
    parts = [f" {' '.join([w for w in c if w not in STOP_WORDS] or c)} " for c in alike]
    given = [set(k) - STOP_WORDS <= set(asked) if set(k) - STOP_WORDS else set(k) <= set(asked) for k in keys]
    longest_other = max(len(c) for i, c in enumerate(choices) if i != answer)
    checks = [
        ("half a character", HALF.search(text)),
        ("line break or control character", any(CONTROL.search(t) for t in [question, *choices])),
        ("question length", not 3 <= len(asked) <= 40 or len(question) > 300),
        ("choice length", not all(1 <= len(k) <= 15 and len(c) <= 100 for k, c in zip(keys, choices))),
        ("choices alike", len(set(map(tuple, alike))) < 4),
        (
            "one choice is part of another",
            any(a in b for i, a in enumerate(parts) for j, b in enumerate(parts) if i != j),
        ),
        *((reason, pattern.search(text)) for reason, pattern in BANNED),
        (
            "quotes a caption",
            any(len(c) > 5 and f" {' '.join(c)} " in f" {' '.join(asked)} " for c in map(words, captions)),
        ),
        ("given away by the question", given[answer] and not all(given)),
        ("answer stands out", len(choices[answer]) > max(2 * longest_other, longest_other + 20)),
    ]
    return next((reason for reason, wrong in checks if wrong), "")


def judge(reply: str, captions: list[str]) -> tuple[dict, str]:
    """A reply -> (question, choices and the answer's index, "") or ({}, reason)."""
    row, reason = read_reply(reply)
    row = tidy(row) if row else {}
    reason = reason or fault(row, captions)
    return ({}, reason) if reason else (row, "")


# ---- the server

REMEDIES = {
    401: "check OPENAI_API_KEY",
    403: "the key may not do this; check OPENAI_API_KEY and --model",
    404: "check --model and --base_url (it usually ends in /v1)",
}  # these would fail for every clip: stop at once
OPTIONAL = (
    "response_format",
    "max_tokens",
    "seed",
)  # what a server may refuse; max_tokens then gets its newer name


class RequestFailed(Exception):
    """A request without a usable answer, after all retries. The clip is asked again in the next run."""


def rough_tokens(text: str) -> int:
    return len(text.encode("utf-8", "replace")) // 4 + 1


def prompt_tokens(messages: list[dict], schema: dict) -> int:
    return sum(rough_tokens(text) for text in (json.dumps(schema), *(m["content"] for m in messages)))


def connect(
    model: str,
    base_url: str | None,
    temperature: float,
    max_tokens: int,
    retries: int,
    timeout_s: float,
    schema: dict | None = SCHEMA,
):
    """-> send(messages, seed) -> (reply, finish reason, [prompt tokens, completion tokens], were they only estimated?)

    `send` raises RequestFailed, ConnectionError (no connection at all) or UserError (no request can ever succeed). Waiting
    and asking again after 408, 409, 429, 5xx, timeouts and lost connections, Retry-After included, is the client's work.
    schema: the JSON that is asked for; None: a text.
    """
    import openai

    key, base_url = (
        os.environ.get("OPENAI_API_KEY", "").strip(),
        base_url or os.environ.get("OPENAI_BASE_URL"),
    )
    if not key and not base_url:
        raise UserError(
            "no OPENAI_API_KEY in the environment; set it, or give --base_url for a server of your own"
        )
    if not re.fullmatch(r"[!-~]*", key):  # the client would fail with a text that holds it
        raise UserError("OPENAI_API_KEY holds a character that no key has; set it anew")
    try:
        if base_url and not (
            re.match(r"https?://[^/]", base_url) and urllib.parse.urlsplit(base_url).port != 0
        ):
            raise ValueError("no web address")
        client = openai.OpenAI(
            api_key=key or "none", base_url=base_url, max_retries=retries, timeout=timeout_s
        )
    except Exception as e:  # of whatever library takes the address apart
        raise UserError(
            f"--base_url: expected http://HOST:PORT/v1 or https://HOST/v1, found {base_url!r:.200} ({e})"
        ) from None
    refused, answered = set(), False
    form = (
        {}
        if schema is None
        else {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "question", "strict": True, "schema": schema},
            }
        }
    )

    def clean(
        text,
    ) -> str:  # servers echo keys; a word such as "none" is no secret, and may be one of the reply's
        return str(text).replace(key, "***") if len(key) >= 8 else str(text)

    def create(options: dict):
        """Leave out, for good, what the server names in a refusal; response_format also if the first request fails."""
        first, without = not answered, set(refused)
        while True:
            sent = {k: v for k, v in options.items() if k not in without}
            if "max_tokens" in without:
                sent["max_completion_tokens"] = options["max_tokens"]
            try:
                reply = client.chat.completions.create(**sent)
                refused.update(without)
                return reply
            except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as e:
                named = [k for k in OPTIONAL if k in str(e)] or ["response_format"] * first
                if not (named := [k for k in named if k in sent]):
                    raise
                without.add(named[0])

    def send(messages: list[dict], seed: int):
        nonlocal answered
        try:
            reply = create(
                form
                | dict(
                    model=model, messages=messages, temperature=temperature, max_tokens=max_tokens, seed=seed
                )
            )
            choice, usage = reply.choices[0], reply.usage
            text = clean(choice.message.content or getattr(choice.message, "refusal", None) or "")
        except openai.APIError as e:
            status, said = getattr(e, "status_code", 0), clean(e.__cause__ or e)[:300]
            if status in REMEDIES:
                raise UserError(f"the server refuses: {said}; {REMEDIES[status]}") from None
            raise (ConnectionError if type(e) is openai.APIConnectionError else RequestFailed)(said) from None
        except (
            AttributeError,
            IndexError,
            TypeError,
            ValueError,
        ):  # the client checks little of what it is sent
            raise RequestFailed(
                "the answer is no chat completion; is --base_url right (it usually ends in /v1)?"
            ) from None
        answered = True
        tokens = [getattr(usage, k, None) for k in ("prompt_tokens", "completion_tokens")]
        estimated = not all(type(t) is int for t in tokens)
        if estimated:
            tokens = [sum(rough_tokens(m["content"]) for m in messages), rough_tokens(text)]
        return text, choice.finish_reason, tokens, estimated

    return send


def ask(send, clip: Example, messages: list[dict], attempts: int, seed: int, accept: Callable) -> dict:
    """Ask until accept(reply), as `judge` does, gives a row, `attempts` times at most. `error`: why there is no answer."""
    result = dict(clip=clip, row={}, reason="", reply="", attempts=0, tokens=[0, 0], estimated=0, error=None)
    while result["attempts"] < attempts and not result["row"]:
        result["attempts"] += 1
        try:  # 31 bits: servers differ in how large a seed may be
            text, finish, tokens, estimated = send(messages, number(seed, clip.id, result["attempts"]) >> 33)
        except (RequestFailed, ConnectionError, UserError) as e:
            return result | {"error": e}
        row, reason = ({}, "cut off") if finish == "length" else accept(text)
        result |= dict(
            row=row,
            reason=reason,
            reply=text,
            estimated=result["estimated"] + estimated,
            tokens=[a + b for a, b in zip(result["tokens"], tokens)],
        )
    return result


# ---- the files

LINE = [
    "id",
    "audio",
    "question",
    "choices",
    "answer",
    "meta",
]  # keys of the file of questions, and of the other
REJECT = ["id", "reason", "reply", "captions", "meta"]


@dataclass
class Tally:
    """All that is kept of the lines of both files, those of earlier runs included: two hashes each, and sums."""

    done: set[int] = field(default_factory=set)  # ids
    seen: set[int] = field(default_factory=set)  # fingerprints of accepted questions
    rejected: collections.Counter = field(default_factory=collections.Counter)
    positions: list[int] = field(default_factory=lambda: [0] * 4)
    longest: float = 0.0  # answers that are the longest choice; one of k equally long ones counts 1 / k
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # prompts, completions
    chains: collections.Counter = field(
        default_factory=collections.Counter
    )  # of `relisten`: why a question has none, or ""

    def enter(self, line: dict) -> None:
        self.done.add(number(line["id"]))
        self.tokens = [a + b for a, b in zip(self.tokens, line["meta"]["tokens"], strict=True)]
        if "reason" in line:
            self.rejected[line["reason"]] += 1
            return
        self.chains.update(
            [line["meta"].get("no_chain", "")] if "target" in line or "no_chain" in line["meta"] else []
        )
        sizes, answer = [len(c) for c in line["choices"]], line["answer"]
        self.seen.add(fingerprint(line))
        self.positions[answer] += 1
        self.longest += (sizes[answer] == max(sizes)) / sizes.count(max(sizes))


def reopen(path: str, keys: list[str], made: dict, tally: Tally, stack: contextlib.ExitStack):
    """Lock a file of ours, enter its lines, cut off a last one that a kill left unfinished.     -> the file, unbuffered

    Raises UserError, and changes nothing, if another process has it, or if it is not ours or was `made` otherwise.
    """
    import fcntl

    if os.path.exists(path) and (problem := file_problem(path)):
        raise UserError(problem)
    try:
        file = stack.enter_context(open(path, "ab", buffering=0))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{path}: another process is writing it; wait for its end, or give another file"
        ) from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    size = 0
    with open(path, "rb") as lines:
        for n, raw in enumerate(lines, 1):
            if not raw.endswith(b"\n") and raw[:7] == b'{"id": '[: len(raw)]:
                break
            line = parse_json(raw, f"{path}:{n}")
            try:
                if list(line) != keys:
                    raise KeyError
                other = {k: line["meta"][k] for k in made}
                tally.enter(line)
            except (KeyError, TypeError, ValueError, IndexError):
                raise UserError(f"{path}:{n}: not written by this command; give another file") from None
            if other != made:
                raise UserError(
                    f"{path}:{n}: made with {other}, and this run has {made}; go on with the same, or give "
                    "other files"
                )
            size += len(raw)
    os.ftruncate(file.fileno(), size)
    return file


def path_from(folder: str, path: str) -> str:
    return os.path.normpath(path).removeprefix(os.path.join(folder, ""))


def make_line(result: dict, made: dict, seen: set[int], folder: str) -> dict:
    """The line of an answered clip, for the file of questions, or with a "reason" for the other."""
    clip, row = result["clip"], result["row"]
    made = made | {k: result[k] for k in ("attempts", "tokens")}
    reason = result["reason"] or ("near duplicate" if fingerprint(row) in seen else "")
    if reason:
        return dict(
            id=clip.id, reason=reason, reply=result["reply"][:2000], captions=clip.meta["captions"], meta=made
        )
    example = Example(
        clip.id, path_from(folder, clip.audio), **row, meta=clip.meta | {"source": "generated"} | made
    )
    example = shuffle_choices(example, random.Random(number(made["seed"], clip.id)))
    return {k: getattr(example, k) for k in LINE}


# ---- the run


def answers(jobs, work, concurrency: int, room, stopping: list):
    """Yield work(job) in order, computing a bounded window ahead: at most four jobs a thread, no more than room(jobs)
    allows, and none that has not begun once `stopping` holds something."""
    queue, job = collections.deque(), next(jobs, None)
    pool = ThreadPoolExecutor(concurrency)
    try:
        while True:
            if (
                stopping
            ):  # threads begin jobs in order, so those that cannot be cancelled have no gap between them
                job, queue = None, collections.deque(item for item in queue if not item[1].cancel())
            while job and len(queue) < 4 * concurrency and room([j for j, _ in queue] + [job]):
                queue.append((job, pool.submit(work, job)))
                job = next(jobs, None)
            if not queue:
                return
            yield queue.popleft()[1].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Requests:
    """How a language model is asked, and how much of it all runs together may use.

    max_tokens: of one reply; a model that thinks aloud needs thousands. max_tokens_total, max_cost (USD) with prices (USD a
    million tokens): bounds on all runs together; nothing is begun that might, with all its attempts, go beyond.
    """

    model: str
    base_url: str | None = None
    concurrency: int = 16
    attempts: int = 3
    temperature: float = 1.0
    max_tokens: int = 400
    seed: int = 0
    max_tokens_total: int = 0
    max_cost: float = 0.0
    price_in: float = 0.0
    price_out: float = 0.0
    retries: int = 5
    timeout_s: float = 120.0

    def __post_init__(self):
        if self.max_cost and not (self.price_in and self.price_out):
            raise UserError("--max_cost needs --price_in and --price_out, USD per million tokens")
        for name, low in dict(
            concurrency=1,
            attempts=1,
            max_tokens=1,
            temperature=0,
            retries=0,
            price_in=0,
            price_out=0,
            max_cost=0,
            max_tokens_total=0,
        ).items():
            if not low <= getattr(self, name) < math.inf:
                raise UserError(f"--{name}: must be at least {low}, found {getattr(self, name)}")

    def connect(self, model: str, schema: dict):
        return connect(
            model, self.base_url, self.temperature, self.max_tokens, self.retries, self.timeout_s, schema
        )


def generate(clips, out: str, rejects: str, model: str, **options) -> dict:
    """Write a question on every clip whose line is in neither file yet.      -> the summary of both files, also printed

    clips: a sequence of Example, read once and in order; absolute `audio`, texts in `meta["captions"]`; an `id` may recur.
    options: those of Requests. Raises UserError, and KeyboardInterrupt after Ctrl-C; what was answered until then is in the
    files.
    """
    asked, folder = Requests(model, **options), os.path.dirname(os.path.abspath(out))
    made, send = (
        dict(model=model, prompt_version=PROMPT_VERSION, seed=asked.seed),
        asked.connect(model, SCHEMA),
    )

    def prepare(clip):
        messages = writing_prompt(clip)
        return messages, [prompt_tokens(messages, SCHEMA), asked.max_tokens]

    def work(clip, messages):
        return ask(
            send, clip, messages, asked.attempts, asked.seed, lambda text: judge(text, clip.meta["captions"])
        )

    return run(
        clips,
        dict(out=(out, LINE), rejects=(rejects, REJECT)),
        made,
        asked,
        prepare,
        work,
        lambda result, seen: make_line(result, made, seen, folder),
    )


def run(
    clips,
    files: dict[str, tuple[str, list[str]]],
    made: dict,
    asked: Requests,
    prepare: Callable,
    work: Callable,
    make: Callable,
    unit: str = "clip",
    found: dict | None = None,
) -> dict:
    """Ask about every clip whose line is in none of the files yet.      -> the summary of all files, also printed

    files: option -> its path and the keys of its lines; a line goes where its keys say. made: what every line was made with.
    prepare(clip) -> (its messages, the [prompt, completion] tokens that one attempt can take); work(clip, messages) -> what
    `ask` returns; make(that, fingerprints seen) -> the line. found: what the summary begins with, in place of their number.
    """
    from tqdm import tqdm

    paths = {}
    for name, (path, _) in files.items():
        if (other := paths.setdefault(os.path.realpath(path), name)) != name:
            raise UserError(f"--{other} and --{name} name the same file; give two")
    limits = [
        (most, a, b)
        for most, a, b in (
            (asked.max_tokens_total, 1, 1),
            (asked.max_cost * 1e6, asked.price_in, asked.price_out),
        )
        if most
    ]
    tally, stopping, broken, counts, in_a_row, start = (
        Tally(),
        [],
        [],
        collections.Counter(),
        0,
        time.monotonic(),
    )
    last_failure = ""

    def interrupted(*_):
        if stopping:
            raise KeyboardInterrupt
        stopping.append(KeyboardInterrupt())
        os.write(
            2, b"\nstopping when the running requests are answered; Ctrl-C again to leave at once\n"
        )  # print may not

    def to_do():  # a job: the clip, its messages, the most tokens it can take
        times = collections.Counter()
        try:
            for clip in clips:
                name = clip.id
                while times[number(clip.id)]:
                    times[number(name)] += 1
                    clip = dataclasses.replace(clip, id=f"{name} #{times[number(name)]}")
                times[number(clip.id)] += 1
                if number(clip.id) in tally.done:
                    counts["done before"] += 1
                    continue
                messages, most = prepare(clip)
                yield clip, messages, [asked.attempts * n for n in most]
        except UserError as e:  # a broken line: all that stands before it is still asked and written
            broken.append(e)

    def room(jobs) -> bool:
        prompt, completion = map(sum, zip(tally.tokens, *(most for _, _, most in jobs)))
        return all(a * prompt + b * completion <= most for most, a, b in limits)

    with contextlib.ExitStack() as stack:
        opened = {tuple(keys): reopen(path, keys, made, tally, stack) for path, keys in files.values()}
        with contextlib.suppress(ValueError):  # only the main thread can listen to Ctrl-C
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupted))
        bar = stack.enter_context(tqdm(total=len(clips), unit=unit, dynamic_ncols=True, disable=None))
        for result in stack.enter_context(
            contextlib.closing(
                answers(to_do(), lambda job: work(*job[:2]), asked.concurrency, room, stopping)
            )
        ):
            counts["without usage"] += result["estimated"]
            if (error := result["error"]) is None:
                line = make(result, tally.seen)
                append_line(opened[tuple(line)], line)
                tally.enter(line)
                counts["answered"], in_a_row = counts["answered"] + 1, 0
                bar.update(counts["done before"] + counts["answered"] - bar.n)
                bar.set_postfix(accepted=sum(tally.positions), rejected=tally.rejected.total(), refresh=False)
                continue
            counts["failed"], in_a_row, last_failure = counts["failed"] + 1, in_a_row + 1, str(error)
            tally.tokens = [a + b for a, b in zip(tally.tokens, result["tokens"])]
            if isinstance(error, ConnectionError) and not counts["answered"]:
                error = UserError(
                    f"cannot reach the server: {error}; is it running, and is --base_url right?"
                )
            elif in_a_row == 20:
                error = UserError(
                    f"20 {unit}s in a row failed, the last with: {error}; once that is mended, the same command "
                    "goes on from here"
                )
            if isinstance(error, UserError):
                stopping.append(error)
    accepted, seconds = sum(tally.positions), time.monotonic() - start
    at_limit = (
        not stopping + broken and len(clips) > counts["done before"] + counts["answered"] + counts["failed"]
    )
    summary = dict(
        clips=len(clips),
        accepted=accepted,
        chains=dict(tally.chains.most_common()),
        rejected=dict(tally.rejected.most_common()),
        failed=counts["failed"],
        last_failure=last_failure,
        tokens=tally.tokens,
        without_usage=counts["without usage"],
        clips_per_s=counts["answered"] / seconds,
        cost=sum(n * price for n, price in zip(tally.tokens, (asked.price_in, asked.price_out))) / 1e6,
        positions=tally.positions,
        longest=tally.longest / max(accepted, 1),
        at_limit=at_limit,
    )
    print_summary(summary, found or {f"{unit}s": len(clips)}, unit)
    for reason in stopping + broken:
        raise reason
    return summary


def append_line(file, line: dict) -> None:
    raw = (json.dumps(line) + "\n").encode()
    try:
        if file.write(raw) != len(raw):
            raise OSError(0, "only part of a line could be written; is the disk full?")
    except OSError as e:
        raise UserError(
            f"{file.name}: {e.strerror}; once that is mended, the same command goes on from here"
        ) from None


def print_summary(summary: dict, found: dict, unit: str) -> None:
    tokens, share = summary["tokens"], summary["longest"]
    table = [*found.items(), ("accepted", summary["accepted"])]
    table += [
        (f"  without a chain: {reason}" if reason else "  with a chain", n)
        for reason, n in summary["chains"].items()
    ]
    table += [("rejected", sum(summary["rejected"].values()))]
    table += [(f"  {reason}", n) for reason, n in summary["rejected"].items()]
    table += [("failed, to be asked again", summary["failed"])]
    table += [("  the last with", summary["last_failure"])] if summary["failed"] else []
    table += [("tokens in and out", f"{tokens[0]:,} + {tokens[1]:,}")]
    table += (
        [("  replies whose tokens are estimates", summary["without_usage"])]
        if summary["without_usage"]
        else []
    )
    table += [("cost", f"{summary['cost']:.2f} USD")] if summary["cost"] else []
    table += [
        (f"{unit}s a second, this run", f"{summary['clips_per_s']:.1f}"),
        ("answer positions", " ".join(map(str, summary["positions"]))),
        ("answer is the longest choice", f"{share:.0%} (25% by chance)"),
    ]
    print("\n".join(f"{name:<40}{value}" for name, value in table))
    if summary["at_limit"]:
        print(
            "stopped at the limit: the next clip might exceed it; the same command with a higher limit goes on"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Questions that want a second listening, made as Echo's data was (arXiv 2602.11909): time-stamped events -> questions about
# order, count, duration and overlap, with a chain of thought that names segments
#
#     events -> question, choices, answer by our own rules -> a language model writes the chain -> `chain_fault`
#            -> a second call judges both -> cold start, RL or rejects, by the run of `generate`
#
# The answer is right by construction, as far as the table is: where a listener could differ from it by a fraction of a
# second, or call a sound by another of its names, nothing is asked.

EPS = 1e-6  # 2.3 - 2 is a little less than 0.3
APART_S, TOUCH_S = (
    0.3 - EPS,
    0.1 - EPS,
)  # less apart has no clear order; two of a kind with less between them are one
LONGER, SHARED_S = (
    1.5 - EPS,
    0.5 - EPS,
)  # times as long; what sounds at the same time does so for this long at least
ASKED = dict(
    after='Which of these sounds is the next to begin after "{}" begins?',
    before='Which of these sounds is the last to begin before "{}" begins?',
    count='How many times is "{}" heard?',
    longest="Which of these sounds is heard for the longest time in all?",
    shortest="Which of these sounds is heard for the shortest time in all?",
    overlap='Which of these sounds is heard at the same time as "{}"?',
)

# ---- questions: a kind yields all that could be asked, as (question, right choice, wrong choices, spans that decide)


def merge(events: list) -> dict[str, list[list[float]]]:
    """(start, end, label)s -> {label: its segments in the order of time}; those that touch are one"""
    sounds = {}
    for start, end, label in sorted(events):
        segments = sounds.setdefault(label, [])
        if segments and start - segments[-1][1] < TOUCH_S:
            segments[-1][1] = max(segments[-1][1], end)
        else:
            segments.append([start, end])
    return sounds


@functools.cache
def alike(a: str, b: str) -> bool:
    """Could both name one sound? "Speech" and "Male speech, man speaking" could; "Dog" and "Bark" are not known to."""
    a, b = set(reads(a).split()), set(reads(b).split())
    return a <= b or b <= a


def order(sounds: dict, clear: list[str]):
    begins = sorted((start, end, label) for label, segments in sounds.items() for start, end in segments)
    for asked in clear:
        span, others = sounds[asked][0], [e for e in begins if e[2] != asked]
        if len(sounds[asked]) > 1 or any(abs(start - span[0]) < APART_S for start, _, _ in others):
            continue
        later, earlier = [e for e in others if e[0] > span[0]], [e for e in others if e[0] < span[0]][::-1]
        for way, side in (("after", later), ("before", earlier)):
            start, end, right = side[0] if side else (0, 0, "")
            if right in clear and all(abs(s - start) >= APART_S for s, _, label in side if label != right):
                yield (
                    ASKED[way].format(asked),
                    right,
                    [x for x in clear if x not in (asked, right)],
                    [span, [start, end]],
                )


def count(sounds: dict, clear: list[str]):
    last = max(segments[-1][1] for segments in sounds.values())
    for label in clear:
        segments, n = sounds[label], len(sounds[label])
        lone = (
            n == 1 and segments[0][1] - segments[0][0] > last / 2
        )  # what goes on all the time is not counted
        if n <= 8 and not lone and all(b[0] - a[1] >= APART_S for a, b in zip(segments, segments[1:])):
            for low in range(max(1, n - 3), n + 1):
                yield (
                    ASKED["count"].format(label),
                    str(n),
                    [str(k) for k in range(low, low + 4) if k != n],
                    segments,
                )


def duration(sounds: dict, clear: list[str]):
    total = {label: sum(end - start for start, end in sounds[label]) for label in clear}
    for right in clear:
        yield ASKED["longest"], right, [x for x in clear if total[x] * LONGER <= total[right]], sounds[right]
        longer = [x for x in clear if total[right] * LONGER <= total[x]]
        if (
            len(longer) >= 3
        ):  # of the labels that are not in the clip each would be heard for an even shorter time
            yield ASKED["shortest"], right, longer, sounds[right]


def overlap(sounds: dict, clear: list[str]):
    for asked in clear:
        both = {
            x: [[max(a[0], b[0]), min(a[1], b[1])] for a in sounds[asked] for b in sounds[x]]
            for x in clear
            if x != asked
        }
        apart = [x for x, spans in both.items() if all(start - end >= APART_S for start, end in spans)]
        for right, spans in both.items():
            if shared := sorted(span for span in spans if span[1] - span[0] >= SHARED_S):
                yield ASKED["overlap"].format(asked), right, apart, shared


KINDS = dict(order=order, count=count, duration=duration, overlap=overlap)


def questions_on(clip: Example, pool: list[str], seed: int, per_clip: int) -> list[Example]:
    """At most `per_clip` questions of different kinds, functions of the clip and the seed. At least one wrong choice is
    heard in the clip (a count's are other numbers); what is missing to four comes from the `pool` of the table's labels."""
    sounds, made = merge(clip.meta["events"]), []
    clear = [x for x in sounds if not any(alike(x, other) for other in sounds if other != x)]
    for kind in random.Random(number(seed, clip.id)).sample(list(KINDS), len(KINDS)) if sounds else ():
        rng = random.Random(number(seed, clip.id, kind))
        found = [possible for possible in KINDS[kind](sounds, clear) if possible[2]]
        for question, right, wrong, spans in rng.sample(found, len(found)):
            choices = [right, *rng.sample(wrong, min(3, len(wrong)))]
            for label in rng.sample(pool, min(40, len(pool))) if len(choices) < 4 else ():
                if len(choices) < 4 and not any(alike(label, x) for x in (*sounds, *choices)):
                    choices.append(label)
            if len(choices) == 4 and len(made) < per_clip:
                rng.shuffle(choices)
                meta = dict(kind=kind, spans=[[round(t, 3) for t in span] for span in spans]) | clip.meta
                made.append(
                    Example(
                        f"{clip.id} {kind}", clip.audio, question, choices, choices.index(right), meta=meta
                    )
                )
                break
    return made


# ---- tables of events

EVENT = dict(  # what -> the columns that hold it
    clip=f"segment_id|{CLIP}",
    label="event_label|label|event|class|class_name|category|sound",
    start="onset|start|start_time|start_time_seconds|start_s|start_seconds|event_onset",
    end="offset|end|end_time|end_time_seconds|end_s|end_seconds|event_offset",
)
CODE = re.compile(r"/[a-z]/\w+")  # what AudioSet calls a label


def read_events(rows, names: dict[str, str]) -> dict[str, Example]:
    """A table -> {name: clip with its events}. A row is an event, a clip alone or the chords of one, in any order."""
    clips = {}
    for i in range(len(rows)):
        row = rows[i]
        try:
            if not isinstance(row, dict):
                raise DataError(f"expected a JSON object, found {row!r:.60}")
            read = chords(row) if {"location", "chords", "chords_time"} <= row.keys() else event(row, names)
        except DataError as e:
            raise DataError(f"{rows.where(i)}: {e}") from None
        if (clip := clips.setdefault(read.id, read)) is not read:
            clip.meta["events"] += read.meta["events"]
    return clips


@functools.cache
def event_columns(keys: tuple[str, ...]) -> list[str]:
    folded = {key.casefold(): key for key in keys}
    found = [
        next((folded[name] for name in known.split("|") if name in folded), None) for known in EVENT.values()
    ]
    if None in found:
        raise DataError(
            f'field "{[*EVENT.values()][found.index(None)]}": missing; found only {sorted(keys)!r:.300}'
        )
    return found


def event(row: dict, names: dict[str, str]) -> Example:
    where, label, start, end = event_columns(tuple(row))
    clip = Example(text(row, where, pop=False), "", "", meta=dict(events=[], segment=where == "segment_id"))
    if all(row[key] in (None, "") for key in (label, start, end)):
        return clip
    said = text(row, label, pop=False).strip()
    heard = " ".join(re.sub(r"[_<>\x00-\x1f\x7f]", " ", names.get(said, said)).split())
    if not heard or HALF.search(heard + clip.id):
        raise DataError(f'field "{label}": expected the name of a sound, found {said!r:.60}')
    if CODE.fullmatch(said) and said not in names:
        raise DataError(
            f'field "{label}": {said} is a code; give its name by --labels mid_to_display_name.tsv'
        )
    times = seconds(row, start), seconds(row, end)
    if times[0] >= times[1]:
        raise DataError(
            f'field "{end}": {row[end]} is not after the start, {row[start]}; mend or drop the line'
        )
    clip.meta["events"].append((*times, heard))
    return clip


def seconds(row: dict, key: str) -> float:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if not isinstance(row[key], bool) and 0 <= float(row[key]) <= 86_400:
            return float(row[key])
    raise DataError(f'field "{key}": expected seconds, found {row[key]!r:.60}; mend or drop the line')


def chords(row: dict) -> Example:
    """MusicBench: when each chord begins; "N" is none, and the last goes on to the clip's end. It has captions, too."""
    clip, heard, times = text(row, "location", pop=False), row["chords"], row["chords_time"]
    if not isinstance(heard, list) or not isinstance(times, list) or len(heard) != len(times):
        raise DataError(
            f'field "chords_time": expected as many times as chords, found {times!r:.60} and {heard!r:.60}'
        )
    times = [seconds({"chords_time": t}, "chords_time") for t in times]
    if times != sorted(set(times)):
        raise DataError(f'field "chords_time": expected times in their order, found {times!r:.100}')
    events = [
        (start, end, f"{chord} chord")
        for chord, start, end in zip(heard, times, [*times[1:], math.inf])
        if chord != "N"
    ]
    told = [row[k] for k in ("main_caption", "alt_caption") if isinstance(row.get(k), str) and row[k].strip()]
    return Example(
        clip, "", "", meta=dict(events=events, segment=False) | ({"captions": told} if told else {})
    )


def segment_stems(segment: str) -> list[str]:
    """What the file of an AudioSet segment, a YouTube id and the milliseconds at which its 10 s begin, is called: the id and
    milliseconds, seconds or both ends, with or without a Y before it; or Y and the id alone."""
    if not (found := re.fullmatch(r"([\w-]{11})_(\d{1,9})", segment)):
        return [stem_of(segment)]
    ms, s = int(found[2]), int(found[2]) // 1000
    ends = f"_{ms}", f"_{s}", f"_{s:06d}", f"_{ms}_{ms + 10_000}", f"_{s}_{s + 10}", f"_{s}.000_{s + 10}.000"
    return [stem_of(y + found[1] + end) for y in ("", "Y") for end in ends] + ["Y" + found[1]]


def display_names(path: str) -> dict[str, str]:
    """AudioSet's mid_to_display_name.tsv or class_labels_indices.csv, where a label's name follows its code."""
    if problem := file_problem(path):
        raise DataError(f"{problem}; expected AudioSet's mid_to_display_name.tsv")
    with open(path, encoding="utf-8", errors="replace") as f:
        rows = [
            line.rstrip("\n").split("\t") if "\t" in line else next(csv.reader([line.replace("\0", "")]), [])
            for line in f
        ]
    if not (
        names := {code: name for row in rows for code, name in zip(row, row[1:]) if CODE.fullmatch(code)}
    ):
        raise DataError(
            f"{path}: holds no label such as /m/09x0r; expected AudioSet's mid_to_display_name.tsv"
        )
    return names


def hear(clip: Example, stems: list[str], folder: str) -> str:
    """Find the clip's sound, read its length from the header, and end its events there.      -> why not, or "" """
    import soundfile

    clip.audio = locate(clip.id, folder)
    if file_problem(clip.audio):
        files = {file for stem in stems if stems[1:] for file in sounds_in(folder, deep=True).get(stem, ())}
        if len(files) != 1:
            return "several sound files" if files else "no sound file"
        clip.audio = files.pop()
    try:
        with soundfile.SoundFile(os.open(clip.audio, os.O_RDONLY)) as f:
            last = round(f.frames / f.samplerate, 3)
    except (OSError, RuntimeError):
        return "sound file that cannot be read"
    if last > 86_400:
        return "sound file whose header does not know its length"
    if any(last + 0.5 < end < math.inf for _, end, _ in clip.meta["events"]):
        return "sound file that ends before its events"
    events = [(start, min(end, last), label) for start, end, label in clip.meta["events"] if start < last]
    clip.meta |= dict(duration_s=last, events=events)
    return ""


class TimedQuestions:
    """The questions on a table of events, made when they are asked for. `found`: what there is, for the summary.

    audio_dir: where sounds are looked for; "" is the folder of the table. labels: what codes of labels mean. captions: any
    file that Examples reads with captions; they are joined by the clip's name.
    """

    def __init__(
        self,
        path: str,
        audio_dir: str = "",
        labels: str = "",
        captions: str = "",
        per_clip: int = 2,
        seed: int = 0,
    ):
        self.per_clip, self.seed, folder = per_clip, seed, os.path.abspath(audio_dir or os.path.dirname(path))
        clips = read_events(open_rows(path), display_names(labels) if labels else {}).values()
        if not clips:
            raise DataError(f"{path}: holds no event")
        self.pool = sorted({label for clip in clips for _, _, label in clip.meta["events"]})
        told = collections.defaultdict(dict)  # a name without folder and ending -> {sound: its captions}
        for example in Examples(captions, audio_dir) if captions else ():
            for sound in example.clips[:1]:
                name = getattr(sound, "path", sound)
                said = example.meta.get("captions")
                told[stem_of(name)][name] = [
                    c for c in (said if isinstance(said, list) else [said]) if isinstance(c, str)
                ]
        if captions and not any(said for sounds in told.values() for said in sounds.values()):
            raise DataError(f"{captions}: holds no captions")
        self.clips, found, without = [], collections.Counter(), collections.Counter()
        for clip in progress(clips, len(clips), "clips"):
            stems = segment_stems(clip.id) if clip.meta.pop("segment") else [stem_of(clip.id)]
            said = [*next((told[stem] for stem in stems if stem in told), {}).values()]
            if len(said) == 1 and said[0]:  # of two sounds with this name it could be either
                clip.meta["captions"] = clip.meta.get("captions", []) + said[0]
            why = hear(clip, stems, folder)
            asked = [] if why else questions_on(clip, self.pool, seed, per_clip)
            found.update(f"  {question.meta['kind']}" for question in asked)
            without.update([] if asked else [f"  {why or 'nothing clear to ask'}"])
            self.clips += [clip] if asked else []
        if without["  no sound file"] == len(clips):
            raise DataError(
                f"{path}: none of the sounds of its {len(clips)} clips is in {folder} or its folders; the last was "
                f"looked for as {', '.join(stems)} (.wav, .flac, ...); give --audio_dir"
            )
        self.n, self.found = (
            found.total(),
            {"clips": len(clips)} | without | {"questions": found.total()} | found,
        )
        if not self.n:
            raise DataError(f"{path}: there is nothing to ask: {dict(without)}")

    def __len__(self):
        return self.n

    def __iter__(self):
        return (
            question
            for clip in self.clips
            for question in questions_on(clip, self.pool, self.seed, self.per_clip)
        )


# ---- the chain of thought and its judge

CHAINER = """You write down how a listener thinks while answering a multiple-choice question about a short audio clip. The \
listener can play any part of it again, and knows nothing else. You cannot hear it; you get what others heard, in seconds, \
and the right choice.

Write the thoughts in English, 40 to 150 words, so that they
- say what to listen for, go to the one to six parts of the clip that decide, with a reason before each and what is heard \
there after it, and then conclude;
- name each part as <seg>start, end</seg>, in seconds, at least 0.2 s long; after it the same sentence goes on in lower case: \
"The bell should come late, and in <seg>1.2, 2.85</seg> it rings twice." There are no other tags;
- are those of somebody who only hears: no word of notes, labels, timestamps, captions, lists, or of an answer that is known;
- end with the right choice, word for word.

Reply with one JSON object and nothing else: {"chain": "..."}"""
CHECKER = """You check a multiple-choice question about a short audio clip, and the thoughts that lead a listener to its \
answer. You cannot hear it; you get what others heard, in seconds.

The question is good if a listener can answer it from the clip alone, what was heard supports the right choice, and no other \
choice can be right, too, or be another name of a sound that decides.
The thoughts, called the chain, are good if every step agrees with what was heard, the parts in <seg>start, end</seg> are \
those that decide, the answer follows from them, and they read like listening. Without thoughts the chain is bad.

Reply with one JSON object and nothing else:
{"reason": "one short sentence", "question": "good" or "bad", "chain": "good" or "bad"}"""
WORD = {"type": "string", "enum": ["good", "bad"]}
CHAIN, VERDICT = (
    {"type": "object", "additionalProperties": False, "required": [*keys], "properties": keys}
    for keys in (
        {"chain": {"type": "string"}},
        {"reason": {"type": "string"}, "question": WORD, "chain": WORD},
    )
)
RELISTEN_VERSION = hashlib.sha256(
    json.dumps([ASKED, APART_S, TOUCH_S, LONGER, SHARED_S, CHAINER, CHECKER, CHAIN, VERDICT]).encode()
).hexdigest()[:8]
SEGMENT = re.compile(r"<seg>([0-9]{1,5}(?:\.[0-9]{1,6})?), ?([0-9]{1,5}(?:\.[0-9]{1,6})?)</seg>")
MOST_SEGMENTS, LEAST_S = 8, 0.2 - EPS  # Echo listens again eight times at most, and to nothing shorter
BETRAYS = re.compile(
    r"\b(?:annotat\w+|time[- ]?stamp\w*|label\w*|meta-?data|caption\w*|transcripts?|descriptions?|ground[ -]truth|data ?sets?|"
    r"according to|as (?:noted|listed|given|described)|the (?:notes|list|table) (?:says?|shows?|gives?|tells?|mentions?)|"
    r"(?:given|provided|listed) (?:events?|segments?|times?|answers?|choices?|information))\b",
    re.IGNORECASE,
)
NUMERALS = "zero one two three four five six seven eight nine ten eleven".split()
NUMERALS = {name: str(n) for n, name in enumerate(NUMERALS)} | {"once": "1", "twice": "2"}


def material(question: Example, end: str) -> str:
    """What is known of a question, for the one who writes and the one who judges."""
    meta, choices = question.meta, question.choices
    known = ["Heard, in seconds:", *(f"{a:g} to {b:g}: {label}" for a, b, label in sorted(meta["events"]))]
    known += ["On the whole clip:", *meta["captions"]] if "captions" in meta else []
    known += [
        f"Question: {question.question}",
        f"Choices: {'; '.join(choices)}",
        f"Right choice: {choices[question.answer]}",
        f"Decided in: {', '.join(f'{a:g} to {b:g}' for a, b in meta['spans'])}",
        "",
        end,
    ]
    return "\n".join(known).encode("utf-8", "replace").decode()


def last_named(text: str, choices: list[str]) -> int | None:
    """The choice that is the last to be named; a number may be spelt out."""

    def spelt(text):
        return " ".join(["", *(NUMERALS.get(w, w) for w in reads(re.sub("[-–—*“”]", " ", text)).split()), ""])

    said = spelt(text)
    ends = [at + len(name) if (at := said.rfind(name)) >= 0 else -1 for name in map(spelt, choices)]
    return ends.index(max(ends)) if max(ends) >= 0 else None


def chain_fault(chain: str, question: Example) -> str:
    """What is wrong with a chain of thought, in words that can be counted; "" if nothing is."""
    meta, rest = question.meta, SEGMENT.sub(" ", chain)
    segments = [(float(start), float(end)) for start, end in SEGMENT.findall(chain)]
    last = meta.get("duration_s") or max(end for _, end, _ in meta["events"]) + 1
    follows = [after.lstrip()[:1] or "<" for after in chain.split("</seg>")[1:]]  # </think> follows the end
    checks = [
        ("half a character", HALF.search(chain)),
        ("control character", CONTROL.search(chain)),
        ("chain length", not 10 <= len(words(rest)) <= 300 or len(chain) > 4000),
        ("broken tag", "<" in rest or ">" in rest),
        ("no segment", not segments),
        ("too many segments", len(segments) > MOST_SEGMENTS),
        ("segment outside the clip", any(end > last + 0.01 for _, end in segments)),  # rounded ends
        ("segment too short", any(end - start < LEAST_S for start, end in segments)),
        (
            "no segment that decides",
            not any(a < end and start < b for a, b in segments for start, end in meta["spans"]),
        ),
        ("new sentence after a segment", any(c == "<" or c.isupper() for c in follows)),
        ("mentions the notes", BETRAYS.search(rest)),
        ("ends at another choice", last_named(rest, question.choices) != question.answer),
    ]
    return next((reason for reason, wrong in checks if wrong), "")


def read_chain(reply: str, question: Example) -> tuple[dict, str]:
    """A reply -> ({"chain": on one line}, "") or ({}, reason)."""
    row, reason = read_reply(reply, CHAIN)
    row = {key: " ".join(value.split()) for key, value in row.items()}
    reason = reason or chain_fault(row["chain"], question)
    return ({}, reason) if reason else (row, "")


def read_verdict(reply: str) -> tuple[dict, str]:
    row, reason = read_reply(reply, VERDICT)
    good = row and {row["question"], row["chain"]} <= {"good", "bad"}
    return (row, "") if good else ({}, reason or "neither good nor bad")


# ---- the run

COLD_START, DROPPED = [*LINE[:-1], "target", "meta"], ["id", "reason", "reply", *LINE[1:]]


def relisten(
    questions: TimedQuestions, out: str, rl: str, rejects: str, model: str, judge_model: str = "", **options
) -> dict:
    """Have a chain of thought written to every question, and both judged.      -> the summary of the files, also printed

    Good questions go to `out` if their chain is good, as the target of a cold start, and else to `rl`; bad ones to `rejects`.
    options: those of Requests. Stops, goes on and raises as `generate` does.
    """
    asked, folder = Requests(model, seed=questions.seed, **options), os.path.dirname(os.path.abspath(out))
    made = dict(
        model=model,
        judge_model=judge_model or model,
        prompt_version=RELISTEN_VERSION,
        seed=asked.seed,
        per_clip=questions.per_clip,
    )
    writer, checker = asked.connect(model, CHAIN), asked.connect(made["judge_model"], VERDICT)

    def messages(system: str, question: Example, end: str) -> list[dict]:
        return [{"role": "system", "content": system}, {"role": "user", "content": material(question, end)}]

    def prepare(question):
        first, second = (
            messages(CHAINER, question, "Write the thoughts."),
            messages(CHECKER, question, "Thoughts: "),
        )
        most = (
            prompt_tokens(first, CHAIN) + prompt_tokens(second, VERDICT) + asked.max_tokens
        )  # the judge reads the chain
        return first, [most, 2 * asked.max_tokens]

    def work(question, first):
        chain = ask(
            writer, question, first, asked.attempts, asked.seed, lambda text: read_chain(text, question)
        )
        if chain["error"] is not None:
            return chain
        second = messages(CHECKER, question, f"Thoughts: {chain['row'].get('chain', '(none)')}")
        verdict = ask(checker, question, second, asked.attempts, asked.seed, read_verdict)
        sums = {k: chain[k] + verdict[k] for k in ("attempts", "estimated")}
        return (
            verdict
            | sums
            | dict(chain=chain, tokens=[a + b for a, b in zip(chain["tokens"], verdict["tokens"])])
        )

    def make(result, _):
        question, chain, verdict = result["clip"], result["chain"], result["row"]
        meta = {k: v for k, v in question.meta.items() if k != "events"} | {"source": "relisten"} | made
        meta |= {k: result[k] for k in ("attempts", "tokens")} | {
            "verdict": HALF.sub("?", verdict.get("reason", ""))[:300]
        }
        line = vars(question) | dict(audio=path_from(folder, question.audio), meta=meta)
        if not verdict or verdict["question"] == "bad":
            line |= dict(reason="bad question" if verdict else "no verdict", reply=result["reply"][:2000])
            return {k: line[k] for k in DROPPED}
        if chain["row"] and verdict["chain"] == "good":
            answer = question.choices[question.answer]
            line["target"] = f"<think>{chain['row']['chain']}</think><answer>{answer}</answer>"
            return {k: line[k] for k in COLD_START}
        meta["no_chain"] = chain["reason"] or "judged bad"
        return {k: line[k] for k in LINE}

    files = dict(out=(out, COLD_START), rl=(rl, LINE), rejects=(rejects, DROPPED))
    return run(questions, files, made, asked, prepare, work, make, "question", questions.found)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's sounds: synthesised, labelled, written as real wav files


def synthesise(label: str, rng: np.random.Generator) -> np.ndarray:
    """A random instance of one of SOUNDS.       -> float32 at 16 kHz, 0.5 to 0.8 s"""
    n = int(rng.uniform(0.5, 0.8) * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    wave = SOUNDS[label](t, rng)
    wave = wave / (np.abs(wave).max() + 1e-9) + 0.003 * rng.standard_normal(n)
    return (0.9 * 10 ** rng.uniform(-1, 0) * wave / np.abs(wave).max()).astype(np.float32)


def tone(t, hz):  # hz: a number or one value a sample
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hz, t.shape)) / RATE_HZ)


def noise(t, rng, low_hz, high_hz):
    spectrum = np.fft.rfft(rng.standard_normal(len(t)))
    hz = np.fft.rfftfreq(len(t), 1 / RATE_HZ)
    return np.fft.irfft(spectrum * ((hz >= low_hz) & (hz <= high_hz)), len(t))


def pulses(t, rate_hz, decay):  # 1 at every pulse, then dying away
    return np.exp(-decay * ((t * rate_hz) % 1) / rate_hz)


SOUNDS = {
    "beep": lambda t, r: tone(t, r.uniform(700, 1300)) * (pulses(t, r.uniform(4, 6), 1) > np.exp(-0.1)),
    "buzz": lambda t, r: np.sign(tone(t, r.uniform(80, 160))),
    "hiss": lambda t, r: noise(t, r, 4000, 8000),
    "rumble": lambda t, r: noise(t, r, 40, 300),
    "whistle": lambda t, r: tone(t, r.uniform(2000, 3200)),
    "chirp": lambda t, r: tone(t, 1500 + 2500 * ((t * r.uniform(5, 8)) % 1)),
    "siren": lambda t, r: tone(t, 1000 + 500 * np.sin(2 * np.pi * r.uniform(2, 4) * t)),
    "clicks": lambda t, r: noise(t, r, 1000, 8000) * pulses(t, r.uniform(9, 14), 300),
    "bell": lambda t, r: sum(tone(t, r.uniform(450, 650) * k) for k in (1, 2.76, 5.4)) * np.exp(-6 * t),
    "knock": lambda t, r: tone(t, r.uniform(150, 220)) * pulses(t, r.uniform(4, 6), 30),
    "hum": lambda t, r: tone(t, r.uniform(250, 400)) * (1 + np.sin(2 * np.pi * r.uniform(6, 9) * t)),
    "roar": lambda t, r: noise(t, r, 300, 2500),
}


def write_sounds(
    folder: str, n: int, n_choices: int, seed: int, name: str, silent: float = 0.0, faint: bool = False
) -> str:
    """Make n labelled clips and a JSONL of multiple-choice questions about them.      -> path of the JSONL

    A share of `silent` clips holds nothing, as in real collections: there only the options are left to go by. `faint`: they
    are of any loudness down to FAINT_DB.
    """
    import soundfile

    rng = np.random.default_rng(seed)
    labels = list(SOUNDS)
    asks = ["Which sound is heard in this clip?", "What is this sound?", "What do you hear?"]
    os.makedirs(os.path.join(folder, "sounds"), exist_ok=True)
    path = os.path.join(folder, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            label = labels[i % len(labels)]
            choices = [
                label,
                *rng.choice([x for x in labels if x != label], n_choices - 1, replace=False).tolist(),
            ]
            rng.shuffle(choices)
            audio = f"sounds/{name}_{i:04d}.wav"
            wave = synthesise(label, rng) * (rng.random() >= silent)
            wave *= 10 ** (rng.uniform(FAINT_DB[label], 0) / 20) if faint else 1
            soundfile.write(
                os.path.join(folder, audio), wave, RATE_HZ, subtype="PCM_24" if faint else "PCM_16"
            )
            example = Example(
                f"{name}_{i:04d}",
                audio,
                asks[rng.integers(len(asks))],
                choices,
                choices.index(label),
                meta={"label": label},
            )
            f.write(json.dumps(asdict(example)) + "\n")
    return path


# The front end's range is 80 dB below the loudest frequency of a clip. LOUD sounds have all their power in a few, and beside
# one of them at full level a sound at its level here is silence; alone, all are as audible as each other.
LOUD = ("beep", "buzz", "hum", "siren")
FAINT_DB = {
    "beep": -86,
    "buzz": -89,
    "hiss": -66,
    "rumble": -81,
    "whistle": -84,
    "chirp": -82,
    "siren": -87,
    "clicks": -62,
    "bell": -77,
    "knock": -84,
    "hum": -87,
    "roar": -72,
}


def scene(rng: np.random.Generator) -> tuple[np.ndarray, str, str, float, float]:
    """A loud sound, and after it a faint one, which only a part without the loud one lets hear.
    -> float32 at 16 kHz, 1.3 to 2.2 s; the two labels; where the second starts and ends, seconds"""
    first = rng.choice(LOUD)
    second = rng.choice([label for label in SOUNDS if label != first])
    a, b = synthesise(first, rng), synthesise(second, rng)
    a, b = 0.9 * a / np.abs(a).max(), 10 ** (FAINT_DB[second] / 20) * b / np.abs(b).max()
    before, between, after = (
        np.zeros(int(rng.uniform(*s) * RATE_HZ)) for s in ((0, 0.3), (0.15, 0.3), (0, 0.2))
    )
    start = (len(before) + len(a) + len(between)) / RATE_HZ
    wave = np.concatenate([before, a, between, b, after]).astype(np.float32)
    return wave, str(first), str(second), start, start + len(b) / RATE_HZ


def write_scenes(folder: str, n: int, seed: int, name: str, taught: bool = False) -> str:
    """Make n scenes and a JSONL of questions about what comes second; the loud sound is always among the choices.
    -> path of the JSONL

    `taught`: with chains that listen again where the second sound is, name it, and then answer with any of the choices: a cold
    start that teaches where to listen, to hear and to answer, and nothing that connects the last two.
    """
    import soundfile

    rng = np.random.default_rng(seed)
    os.makedirs(os.path.join(folder, "sounds"), exist_ok=True)
    path = os.path.join(folder, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            wave, first, second, start, end = scene(rng)
            choices = [
                first,
                second,
                *rng.choice([x for x in SOUNDS if x not in (first, second)], 2, replace=False).tolist(),
            ]
            rng.shuffle(choices)
            audio = f"sounds/{name}_{i:04d}.wav"
            soundfile.write(os.path.join(folder, audio), wave, RATE_HZ, subtype="PCM_24")
            thought = f"Listen again: <seg>{start - 0.1:.1f}, {len(wave) / RATE_HZ:.1f}</seg> it is {second}."
            chains = [f"<think>{thought}</think><answer>{choice}</answer>" for choice in choices]
            example = Example(
                f"{name}_{i:04d}",
                audio,
                "Which sound comes second?",
                choices,
                choices.index(second),
                chains if taught else None,
                {"first": first, "label": second, "spans": [[start, end]]},
            )
            f.write(json.dumps(asdict(example)) + "\n")
    return path


def write_lessons(path: str, n: int = 8000) -> str:
    """Questions of `write_sounds` -> n cold-start lessons in their place, for the demo's base model.

    A quarter names a clip; in the others, some of them silent, every option is as good an answer as any: the base learns
    to hear and to answer in the format, and nothing that connects the two.
    """
    import soundfile

    rng = np.random.default_rng(0)
    with open(path, encoding="utf-8") as f:
        clips = [json.loads(line) for line in f]
    soundfile.write(os.path.join(os.path.dirname(path), "sounds", "silence.wav"), np.zeros(10_000), RATE_HZ)
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(n):
            clip, kind = clips[rng.integers(len(clips))], rng.random()
            if kind < 0.25:
                lesson = dict(audio=clip["audio"], question="Name the sound.", target=clip["meta"]["label"])
            else:
                choices = rng.permutation(list(SOUNDS))[:4].tolist()
                lesson = dict(
                    audio="sounds/silence.wav" if kind < 0.4 else clip["audio"],
                    question=clip["question"],
                    choices=choices,
                    target=choices,
                )
            f.write(json.dumps(lesson) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def listen_to(clip, max_s: float) -> dict:
    wave, rate_hz, channels, seconds = read_audio(clip, max_s, whole=True)
    return dict(
        seconds=seconds,
        rate_hz=rate_hz,
        channels=channels,
        silent=not wave.any(),
        hash=(zlib.crc32(wave), zlib.adler32(wave)),
    )  # 32 bits are too few for pairs of 10,000 clips


def reads(choice: str) -> str:
    """What is left of a choice without case and punctuation: "Dog." and "dog" are one, "C" and "C#" are not."""
    text = unicodedata.normalize("NFKC", choice).casefold()
    return " ".join(re.findall(r"""[^\s.,;:!?"'()\[\]]+""", text)) or text.strip()


def survey(examples: Examples, max_s: float) -> dict:
    """Read every line and every clip of a data set, with all cores. Lines are "file:line" or "file:entry n".

    -> problems and notes (texts), heard {clip: what listen_to says}, questions and lines by clip, and counts
    """
    found = dict(
        problems=[],
        notes=[],
        choices=collections.Counter(),
        answers=collections.Counter(),
        asked=collections.defaultdict(list),
        lines={},
    )
    problems, ids, pairs, blank, same = found["problems"], {}, {}, [], {}
    for i in progress(range(len(examples)), len(examples), "lines"):
        where = examples.where(i)
        try:
            example = examples[i]
        except DataError as e:
            problems.append(str(e))
            continue
        options = [reads(c) for c in example.choices]
        found["choices"][len(options)] += 1
        found["answers"][example.answer] += 1
        if example.answer is None:
            blank.append(where)
        elif options.count(options[example.answer]) > 1:
            problems.append(
                f'{where}: field "choices": the answer {example.choices[example.answer]!r:.80} stands among them '
                "twice, so a right answer can be counted as wrong; drop one or the line"
            )
        elif len(set(options)) < len(options):
            found["notes"].append(f'{where}: field "choices": two are the same, {example.choices!r:.200}')
        if (first := ids.setdefault(example.id, where)) != where:
            problems.append(
                f'{where}: field "id": {example.id!r:.80} is also the id of {first}; give each its own'
            )
        names = tuple(str(c) for c in example.clips)
        pair = hash((names, words(example.question), *sorted(options)))
        if (first := pairs.setdefault(pair, where)) != where:
            found["notes"].append(f"{where}: the same clip and question as {first}")
        found["asked"][hash((words(example.question), *sorted(options)))].append(where)
        for name, clip in zip(names, example.clips):
            found["lines"].setdefault(name, (clip, []))[1].append(where)
    if len(blank) < sum(found["choices"].values()):
        problems += [
            f'{w}: field "answer": missing, while other lines have one; give it or drop the line'
            for w in blank
        ]
    found["heard"], clips = {}, found["lines"].items()
    results = ahead(clips, lambda item: listen_to(item[1][0], max_s), os.cpu_count() or 1, 64)
    for (name, (_, (where, *more))), result in progress(results, len(clips), "clips"):
        if isinstance(result, DataError):
            remedy = (
                "mend the path, or give --audio_dir"
                if "no such file" in str(result)
                else "replace it or drop the line"
            )
            problems += [f'{w}: field "audio": {result}; {remedy}' for w in (where, *more)]
            continue
        found["heard"][name] = result
        if result["seconds"] > max_s:
            found["notes"].append(
                f'{where}: field "audio": lasts {result["seconds"]:.1f} s, cut at {max_s:g} s; --max_audio_s'
            )
        if result["silent"]:
            found["notes"].append(f'{where}: field "audio": is silent')
        elif (first := same.setdefault(result["hash"], where)) != where:
            found["notes"].append(f'{where}: field "audio": the same sound as {first}, under another name')
    return found


def check(path: str, max_s: float = 30.0, audio_dir: str = "", against: str = "", report: str = "") -> int:
    """Say what is in a data file and what is wrong with it.       -> 0, or 2 if there is a problem"""
    examples, others = Examples(path, audio_dir), Examples(against) if against else None
    if report:
        if os.path.realpath(report) in (os.path.realpath(path), os.path.realpath(against or path)):
            raise UserError(f"--report {report}: is the data itself; give another name")
        open(report, "a").close()  # if it cannot be written, say so now
    found = survey(examples, max_s)
    heard, problems = found["heard"], found["problems"]
    seconds = sorted(h["seconds"] for h in heard.values())
    count = {
        key: dict(collections.Counter(h[key] for h in heard.values()).most_common())
        for key in ("rate_hz", "channels")
    }
    same = collections.Counter(h["hash"] for h in heard.values() if not h["silent"])
    facts = dict(
        file=path,
        format=examples.format,
        version=examples.version,
        examples=len(examples),
        skipped=dict(examples.skipped),
        clips=len(heard),
        hours=round(sum(seconds) / 3600, 4),
        seconds=[round(f(seconds), 3) for f in (min, lambda s: s[len(s) // 2], max)] if seconds else [],
        cut=sum(s > max_s for s in seconds),
        **count,
        choices=dict(sorted(found["choices"].items())),
        answers={str(k): v for k, v in sorted(found["answers"].items(), key=str)},
        same_sound=sum(n - 1 for n in same.values()),
    )
    if against:
        other = survey(others, max_s)
        sounds = {h["hash"] for h in other["heard"].values() if not h["silent"]}
        absent = [
            stem_of(getattr(c, "path", c))
            for name, (c, _) in other["lines"].items()
            if name not in other["heard"]
        ]
        named, bad = set(filter(is_id, absent)), len(others) - sum(other["choices"].values())
        shared = [
            where
            for name, (clip, lines) in found["lines"].items()
            for where in lines
            if stem_of(getattr(clip, "path", clip)) in named
            or name in heard
            and heard[name]["hash"] in sounds
        ]
        asked = [where for key, lines in found["asked"].items() if key in other["asked"] for where in lines]
        problems += [
            f"{w}: its clip is also in {against}; drop the line, or the score will mean little"
            for w in shared
        ]
        found["notes"] += [f"{w}: the same question and choices as in {against}" for w in asked]
        facts |= dict(against=against, shared_clips=len(shared), shared_questions=len(asked))
        facts |= (
            {
                "not_compared": f"{len(absent)} of {len(other['lines'])} clips of {against} could not be heard: compared by "
                f"name or not at all; {bad} of {len(others)} lines of {against} could not be read"
            }
            if bad or absent
            else {}
        )
    facts |= dict(problems=problems, notes=found["notes"])
    print(f"{examples}, {len(heard)} clips heard, {facts['hours']:.2f} h")
    if seconds:
        shortest, median, longest = facts["seconds"]
        print(
            f"  {'seconds':16} {shortest:g} shortest, {median:g} median, {longest:g} longest; "
            f"{facts['cut']} cut at {max_s:g}"
        )
    titles = dict(
        rate_hz="rate in Hz",
        channels="channels",
        choices="choices",
        answers="gold at",
        same_sound="copies of a clip",
        shared_clips="clips shared",
        shared_questions="asked there too",
        not_compared="but",
    )
    for key, name in titles.items():
        if key in facts:
            value = facts[key]
            value = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"  {name:16} {value}")
    for title, lines, most in (("notes", found["notes"], 20), ("problems", problems, 200)):
        print(f"  {title:16} {len(lines)}", *lines[:most], sep="\n    ")
        if len(lines) > most:
            print(f"    ... and {len(lines) - most} more; --report FILE.json has them all")
    if report:
        with open(report, "w", encoding="utf-8") as f:
            json.dump(facts, f, indent=1)
    return 2 if problems else 0


def new_file(*outs: str) -> None:
    """Refuses what exists, before any work is done."""
    for out in outs:
        if not out or os.path.lexists(out):
            raise UserError(
                f"--out {out}: "
                + ("exists; remove it or give another name" if out else "is empty; name a file")
            )
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)


def write_examples(out: str, examples, total: int) -> int:
    """Examples -> our JSONL at `out`, which must be new; clips from inside a data set are written beside it. -> lines"""
    new_file(out)
    folder, stem = os.path.dirname(os.path.abspath(out)), os.path.splitext(os.path.basename(out))[0]
    n, part = 0, f"{out}.part"
    try:
        with open(
            part, "w", encoding="utf-8", errors="backslashreplace"
        ) as f:  # half a character: as JSON spells it
            for example in progress(examples, total, "lines"):
                row = asdict(dataclasses.replace(example, audio=None, meta={}))
                paths, inner = [], []  # inner: what embedded clips were called
                for k, clip in enumerate(example.clips):
                    content = clip.read() if isinstance(clip, Embedded) else clip
                    if isinstance(content, bytes):
                        inner += [clip.path] if isinstance(clip, Embedded) and clip.path else []
                        name = re.sub(r"[^\w.-]", "_", example.id)[:80] + (f"_{k}" if k else "")
                        content = write_clip(
                            os.path.join(folder, f"{stem}_audio", f"{n:07d}_{name}"), content
                        )
                    path = os.path.abspath(content)
                    paths.append(
                        os.path.relpath(path, folder) if path.startswith(os.path.join(folder, "")) else path
                    )
                row["audio"] = paths if isinstance(example.audio, list) else paths[0] if paths else None
                meta = {k: None if isinstance(v, Embedded) else v for k, v in example.meta.items()}
                row["meta"] = (
                    flat({"audio_path": inner if inner[1:] else inner[0], "meta": meta}) if inner else meta
                )
                f.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                n += 1
        os.replace(part, out)
    finally:
        if os.path.exists(part):
            os.remove(part)
    return n


def write_clip(path: str, content: bytes) -> str:
    """Its ending tells what it is and not what it was called."""
    kinds = {
        b"RIFF": ".wav",
        b"fLaC": ".flac",
        b"OggS": ".ogg",
        b"ID3": ".mp3",
        b"\xff": ".mp3",
        b"FORM": ".aiff",
    }
    path += next((end for magic, end in kinds.items() if content.startswith(magic)), ".wav")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
    return path


def convert(path: str, out: str, audio_dir: str = "", drop_bad: bool = False) -> None:
    """Any known format -> our JSONL. With drop_bad, lines that cannot be read or whose clip is missing are left out."""
    examples, bad = Examples(path, audio_dir), []

    def good():
        for i in range(len(examples)):
            try:
                example = examples[i]
                lost = [file_problem(c) for c in example.clips if isinstance(c, str) and file_problem(c)]
                if lost and drop_bad:
                    raise DataError(f'{examples.where(i)}: field "audio": {lost[0]}')
                yield example
            except DataError as e:
                bad.append(str(e))
                if not drop_bad and len(bad) == 10:
                    break
        if bad and not drop_bad:  # before the file gets its name
            raise DataError("\n".join(bad) + "\nmend these lines, or leave them out with --drop_bad")
        if len(bad) == len(examples):
            raise DataError(f"{path}: every line is bad, the first: {bad[0]}")

    n = write_examples(out, good(), len(examples))
    print(examples)
    print(f"{out}: {n} examples" + (f"; {len(bad)} left out, the first: {bad[0]}" if bad else ""))


def folder(path: str, out: str, eval_size: int = -1, n_choices: int = 4) -> None:
    """A folder of sounds -> questions to train on, and in OUT_eval.jsonl those to hold out (-1: a tenth). Files with the
    same content fall on the same side."""
    examples = Examples(path)
    if examples.format != "labels" or not os.path.isdir(path):
        raise DataError(f"{path}: expected a folder of sounds, found {examples.format} format; use convert")
    stem, end = os.path.splitext(out)
    new_file(out, f"{stem}_eval{end}")
    examples.n_choices = n_choices
    keys = array("L")
    for example in progress(examples, len(examples), "clips"):
        if problem := file_problem(example.audio):
            raise DataError(f"{problem}; take it out of the folder")
        with open(example.audio, "rb") as f:
            keys.append(zlib.crc32(f.read()))
    train, held = held_out(keys, len(keys) // 10 if eval_size < 0 else eval_size)
    for name, indices in ((out, train), (f"{stem}_eval{end}", held)):
        if indices:
            n = write_examples(name, (examples[i] for i in indices), len(indices))
            print(f"{name}: {n} questions on {len({keys[i] for i in indices})} clips")
    print(f"{len(examples.pools[''])} labels, {len(examples.pools) - 1} families")


def keep(
    path: str,
    out: str,
    pass_rate: tuple = (),
    drop_answerable_without_audio: float | None = None,
    where: list[str] = (),
    most: int = 0,
    seed: int = 0,
) -> None:
    """Filter by what `eval.py --samples` measured: columns pass_rate, pass_rate_silence and pass_rate_none of `meta`.

    Keeps questions that are sometimes right (Step-Audio-R1: 3 to 6 of 8 samples), and drops those that are as right
    without the sound (AudioMCQ's strong audio contribution).
    """
    low, high = pass_rate or (0.0, 1.0)
    wanted = [condition.partition("=")[::2] for condition in where]
    new_file(out)
    examples, dropped = Examples(path), collections.Counter()

    def rate(example, i, key):
        value = example.meta.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise DataError(
                f'{examples.where(i)}: field "meta": expected a number "{key}" from 0 to 1, found {value!r:.40}; '
                "python eval.py --samples 8 writes it"
            )
        return value

    def reason(example, i) -> str:
        if pass_rate and not low <= rate(example, i, "pass_rate") <= high:
            return "pass_rate below" if rate(example, i, "pass_rate") < low else "pass_rate above"
        if drop_answerable_without_audio is not None:
            keys = [k for k in ("pass_rate_silence", "pass_rate_none") if k in example.meta] or [
                "pass_rate_silence"
            ]
            if max(rate(example, i, key) for key in keys) >= drop_answerable_without_audio:
                return "answerable without audio"
        return next(
            (
                f"not {key}={value}"
                for key, value in wanted
                if value not in (str(example.meta.get(key)), json.dumps(example.meta.get(key), default=str))
            ),
            "",
        )

    kept = []
    for i in range(len(examples)):
        why = reason(examples[i], i)
        dropped.update([why] if why else [])
        kept += [] if why else [i]
    if most and len(kept) > most:
        dropped["over --max"] = len(kept) - most
        kept = sorted(random.Random(seed).sample(kept, most))
    if not kept:
        raise UserError(
            f"{path}: none of {len(examples)} examples is left"
            + "".join(f"; {c} dropped: {why}" for why, c in dropped.most_common())
        )
    n = write_examples(out, (examples[i] for i in kept), len(kept))
    print(
        f"{out}: {n} of {len(examples)} examples"
        + "".join(f"; {c} dropped: {why}" for why, c in dropped.most_common())
    )


class Captioned(collections.abc.Sequence):
    """The clips of a data set with what is known of their sound in meta["captions"]: captions, or else a label."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        example = self.examples[i]
        labels = next((example.meta[k] for k in LABEL.split("|") if k in example.meta), None)
        if labels is None and "captions" not in example.meta:
            raise DataError(
                f"{self.examples.where(i)}: neither captions nor a label; eval.py --prompt caption writes some"
            )
        return dataclasses.replace(
            example, meta={"captions": labels if isinstance(labels, list) else [labels]} | example.meta
        )


def write_questions(path: str, out: str, rejects: str, audio_dir: str, **options) -> None:
    stem, end = os.path.splitext(out)
    if failed := generate(
        Captioned(Examples(path, audio_dir)), out, rejects or f"{stem}_rejects{end}", **options
    )["failed"]:
        raise UserError(f"{failed} clips failed; the same command asks them again")


def write_chains(
    path: str,
    out: str,
    rl: str,
    rejects: str,
    audio_dir: str,
    labels: str,
    captions: str,
    per_clip: int,
    seed: int,
    **options,
) -> None:
    questions, (stem, end) = (
        TimedQuestions(path, audio_dir, labels, captions, per_clip, seed),
        os.path.splitext(out),
    )
    if failed := relisten(
        questions, out, rl or f"{stem}_rl{end}", rejects or f"{stem}_rejects{end}", **options
    )["failed"]:
        raise UserError(f"{failed} questions failed; the same command asks them again")


def span(text: str) -> float:
    if not 0.025 <= (value := float(text)) <= 86_400:  # shorter clips give no audio token
        raise argparse.ArgumentTypeError(f"{text}: must be from 0.025 to 86400 seconds")
    return value


def bounds(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(".."))
        if 0 <= low <= high <= 1:
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected LOW..HIGH with 0 <= LOW <= HIGH <= 1, as in 0.1..0.9")


def share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


def condition(text: str) -> str:
    if not text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"{text}: expected KEY=VALUE")
    return text


def at_least(low: int) -> Callable:
    def whole(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {low}")
        return int(text)

    return whole


def parse_args(argv=None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, about, example):
        sub = commands.add_parser(
            name,
            help=about,
            allow_abbrev=False,
            description=f"{about}.\n\n    python data.py {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub.add_argument

    def server(add, max_tokens):
        add("--model", required=True, help="as the server calls it; the key is read from OPENAI_API_KEY")
        add(
            "--base_url",
            default=None,
            help="an OpenAI-compatible server, http://HOST:PORT/v1; default: OpenAI's",
        )
        add("--concurrency", type=int, default=16, help="requests at once")
        add("--attempts", type=int, default=3, help="times that the same thing is asked until a reply passes")
        add("--temperature", type=float, default=1.0, help="of the language model")
        add(
            "--max_tokens",
            type=int,
            default=max_tokens,
            help="of one reply; a model that thinks aloud needs thousands",
        )
        add("--seed", type=int, default=0, help="of the requests, and of what is drawn at random")
        add(
            "--max_tokens_total",
            type=int,
            default=0,
            help="stop before all runs together use more; 0: no limit",
        )
        add(
            "--max_cost",
            type=float,
            default=0.0,
            help="the same in USD, with --price_in and --price_out; 0: no limit",
        )
        add("--price_in", type=float, default=0.0, help="USD per million prompt tokens")
        add("--price_out", type=float, default=0.0, help="USD per million completion tokens")
        add(
            "--retries",
            type=int,
            default=5,
            help="after 429, 5xx, time-outs; Retry-After is honoured up to 120 s",
        )
        add("--timeout_s", type=span, default=120.0, help="of one request")

    add = command(
        "check",
        check,
        "read every line and every sound, list what is wrong",
        "train.jsonl --against mmau-test-mini.json",
    )
    add("path", metavar="FILE", help="file, folder or Hub id")
    add("--max_audio_s", dest="max_s", type=span, default=30.0, help="seconds of a clip that training reads")
    add("--audio_dir", default="", help="where relative audio paths start; default: the folder of the file")
    add(
        "--against",
        default="",
        metavar="FILE",
        help="another data set: which clips and questions do they share?",
    )
    add("--report", default="", metavar="FILE.json", help="write everything found to this file")

    add = command(
        "convert",
        convert,
        "any known format to our JSONL, losing no field",
        "train_qa.json --audio_dir clips --out avqa.jsonl",
    )
    add("path", metavar="FILE", help="file, folder or Hub id (org/name[/config][:split])")
    add("--out", required=True, help="JSONL to write")
    add("--audio_dir", default="", help="where relative audio paths start; default: the folder of the file")
    add(
        "--drop_bad",
        action="store_true",
        help="leave out lines that cannot be read and those whose clip is missing",
    )

    add = command(
        "folder",
        folder,
        "sounds in folders, or named after what they are, to questions",
        "recordings --out my.jsonl",
    )
    add("path", metavar="DIR", help="folder: dog/1.wav, animals/dog/1.wav or dog_bark_01.wav")
    add("--out", required=True, help="JSONL to write; a held-out part goes to OUT_eval.jsonl")
    add(
        "--eval_size",
        type=at_least(-1),
        default=-1,
        help="questions to hold out; -1: a tenth; at most a fifth",
    )
    add(
        "--n_choices",
        type=at_least(2),
        default=4,
        help="choices a question; distractors come from the same family first",
    )

    add = command(
        "generate",
        write_questions,
        "captions to questions, written by a language model and checked",
        "captions.jsonl --model gpt-4o-mini --max_cost 5 --price_in 0.15 --price_out 0.6 --out vggs_gpt.jsonl",
    )
    add(
        "path",
        metavar="CAPTIONS",
        help="JSONL or CSV of clips with captions or a label; eval.py --prompt caption writes one",
    )
    add("--out", required=True, help="JSONL of questions; the same command goes on where it stopped")
    add("--rejects", default="", help="JSONL of what was refused, and why; default: OUT_rejects.jsonl")
    add("--audio_dir", default="", help="where relative audio paths start; default: the folder of the file")
    server(add, 400)

    add = command(
        "relisten",
        write_chains,
        "time-stamped events to questions and chains of thought that name segments",
        "audioset_train_strong.tsv --labels mid_to_display_name.tsv --audio_dir clips --model MODEL --out echo.jsonl",
    )
    add(
        "path",
        metavar="EVENTS",
        help="AudioSet-Strong's TSV, MusicBench's JSONL, or a table of clip, onset, offset and label",
    )
    add(
        "--out",
        required=True,
        help="JSONL of questions with a chain of thought; the same command goes on where it stopped",
    )
    add("--rl", default="", help="JSONL of good questions without a good chain; default: OUT_rl.jsonl")
    add("--rejects", default="", help="JSONL of bad questions, and why; default: OUT_rejects.jsonl")
    add("--audio_dir", default="", help="where the sounds are; default: the folder of the file")
    add("--labels", default="", metavar="FILE", help="mid_to_display_name.tsv: what AudioSet's labels mean")
    add(
        "--captions",
        default="",
        metavar="FILE",
        help="clips with captions, which the language model gets to read",
    )
    add("--per_clip", type=at_least(1), default=2, help="questions a clip at most, each of another kind")
    add("--judge_model", default="", help="judges question and chain; default: --model")
    server(add, 800)

    add = command(
        "filter",
        keep,
        "keep what a policy can learn from, by what eval.py --samples measured",
        "avqa.jsonl --pass_rate 0.1..0.9 --drop_answerable_without_audio --out hard.jsonl",
    )
    add("path", metavar="FILE", help="questions with pass_rate in their meta")
    add("--out", required=True, help="JSONL to write")
    add(
        "--pass_rate",
        type=bounds,
        default=(),
        metavar="LOW..HIGH",
        help="keep this share of right samples, ends included",
    )
    add(
        "--drop_answerable_without_audio",
        type=share,
        nargs="?",
        const=0.5,
        default=None,
        metavar="RATE",
        help="drop what is right this often under silence or without audio (0.5)",
    )
    add(
        "--where",
        type=condition,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="keep lines whose meta says so; may be repeated",
    )
    add("--max", dest="most", type=at_least(0), default=0, help="keep a random sample of this size; 0: all")
    add("--seed", type=int, default=0, help="of that sample")

    return vars(parser.parse_args(argv))


def main(argv=None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name can hold what no terminal can show
    args = parse_args(argv)
    run, path = args.pop("run"), args["path"]
    del args["command"]
    try:
        code = run(**args) or 0
        sys.stdout.flush()
        return code
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as e:  # no room, no permission, no such folder
        print(f"error: {e.filename2 or e.filename or path}: {e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


normal_words, normal_text, CLIP_KEYS, chat_messages = words, reads, CLIP, chat
SEGMENT = r"<seg>\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*,\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*</seg>"


if __name__ == "__main__":
    code = main()
    if code == 130:  # the files are closed; threads that still wait for a server would hold up a plain exit
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
