"""Audio question answering data: one `Example` per question, read lazily, checked before a run starts.

    python data.py check FILE       read every line and every sound, list what is wrong
    python data.py convert FILE     any known format to our JSONL
    python data.py folder DIR       a folder of sounds to multiple-choice questions
    python data.py filter FILE      keep what a policy can learn from

`python -m tools.generate` writes questions from captions, `python -m tools.events` from time-stamped events.

A data set is a file of rows, recognised by their columns (`FORMATS`): our own JSONL, whose keys are the
fields of `Example`, what the field trains and evaluates on, and tables of captions or labels. To add a
format, add one entry: the columns that give it away, and which of them holds which field. Reading touches no
audio and needs no torch.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"error: Python {sys.version.split()[0]} is too old; 3.11 or later is needed")

import argparse
import ast
import collections
import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import string
import tempfile
import time
import unicodedata
import urllib.parse
import zlib
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

RATE_HZ = 16_000  # what every supported audio encoder expects
MIN_SAMPLES = 321  # shorter clips give no audio token (25 a second, after two strides and a pooling)


class UserError(Exception):
    """Something the user can mend: the message says what was found and what to do.

    Exit code 2, no traceback.
    """


class DataError(UserError):
    """A fault in a data file. The message names file, line and field."""


class AudioError(DataError):
    """A clip that cannot be heard: missing, unreadable, empty, too short or not finite."""


# ------------------------------------------------------------------------------------------------------------
# Examples


@dataclass
class Example:
    """One question.

    audio: an absolute path, the bytes of a file, an Embedded, a list of these, or None: a text-only question.
    answer: an index into `choices`. target: the completion, or several, to imitate in a cold start.
    """

    id: str = ""
    audio: "str | bytes | Embedded | list | None" = None
    question: str = ""
    choices: list[str] = field(default_factory=list)
    answer: int | None = None
    target: str | list[str] | None = None
    meta: dict = field(default_factory=dict)

    @property
    def clips(self) -> list:
        """The clips of the question, in the order in which they are heard."""
        if self.audio is None:
            return []
        return self.audio if isinstance(self.audio, list) else [self.audio]

    @property
    def is_countdown(self) -> bool:
        """No choices, but `nums` that have to make a `target`: reward.countdown tells right from wrong."""
        has_numbers = is_list_of(int, self.meta.get("nums")) and type(self.meta.get("target")) is int
        return has_numbers and not self.choices

    @property
    def has_answer(self) -> bool:
        return self.answer is not None or self.is_countdown


def is_list_of(kind, value):
    return isinstance(value, list) and {*map(type, value)} <= {kind}


class Embedded:
    """A clip inside a parquet or Hub data set. Its bytes are read when they are asked for, and not before."""

    def __init__(self, rows, row, column, place=None):
        self.rows, self.row, self.column, self.place = rows, row, column, place

    def child(self, name):
        """`bytes` (a view of the memory map, not a copy), `path`, `array`...; None if there is none."""
        value = self.rows.table[self.row].column(self.column)[0]
        if self.place is not None:
            value = value[self.place]
        if value.is_valid and hasattr(value, "keys"):
            value = value[name] if name in value.keys() else None
        elif name != "bytes":  # a plain column of bytes
            return None
        if value is None or not value.is_valid:
            return None
        return value.as_buffer() if name == "bytes" else value.as_py()

    @property
    def path(self):
        return self.child("path") or ""

    def content(self):
        """The bytes of a file; samples with their rate become a wav. None if there is neither."""
        samples = self.child("array")
        if samples is None:
            return self.child("bytes")
        import pyarrow
        import soundfile

        wave = np.array(samples, np.float32)
        file = io.BytesIO()
        soundfile.write(
            file,
            wave.T if wave.ndim == 2 and len(wave) < 16 else wave,
            self.child("sampling_rate"),
            format="WAV",
            subtype="FLOAT",
        )
        return pyarrow.py_buffer(file.getvalue())

    @functools.cached_property
    def key(self):
        """The same for the same clip.

        A hash of three samples: reading all bytes of a data set takes hours.
        """
        content = self.content()
        if not content:
            return self.path
        size = len(content)
        samples = [content[at : at + 4096].to_pybytes() for at in (0, size // 2, max(0, size - 4096))]
        return f"{size} bytes {hashlib.blake2b(b''.join(samples), digest_size=8).hexdigest()}"

    def __bool__(self):
        return bool(self.key)

    def __eq__(self, other):
        return isinstance(other, Embedded) and self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def read(self):
        content = self.content()
        return content.to_pybytes() if content else locate(self.path, self.rows.folder)

    def __repr__(self):
        return f"<clip of row {self.row + 1}{self.path and ': ' + self.path}>"


HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can write it, no tokenizer can read it


def make_example(fields, known):
    """The fields of one question -> a valid Example. Null is the same as missing.

    known: the Format, which knows what the file calls the fields. Raises DataError with column and remedy.
    """

    def bad(name, problem):
        column = known.fields.get(name, name).partition("|")[0]
        raise DataError(f'field "{column}": {problem}')

    example = Example(**{k: v for k, v in fields.items() if v is not None})
    example.id = str(example.id)
    question, choices, answer, target = example.question, example.choices, example.answer, example.target
    if not isinstance(question, str) or not question.strip():
        bad("question", f"expected a text, found {fields.get('question')!r:.60}")
    if not is_list_of(str, choices) or not all(map(str.strip, choices)):
        bad("choices", f"expected a list of texts, found {choices!r:.80}")
    if len(choices) == 1:
        bad("choices", f"only one choice, {choices[0]!r:.80}: a question needs at least two")
    if answer is not None and not choices:
        found = [name for name, value in fields.items() if name != "meta" and value not in (None, [])]
        found += fields.get("meta", {})
        remedy = "open answers are not supported; --columns options=choices renames a column"
        bad("choices", f"missing, found only {sorted(map(str, found))!r:.300}; {remedy}")
    if isinstance(answer, str):  # the answer's text instead of its index
        if answer not in choices:
            bad("answer", f"{answer!r:.80} is not among the choices {choices!r:.300}")
        example.answer = choices.index(answer)
    elif answer is not None and type(answer) is not int:
        bad("answer", f"expected the index or the text of a choice, found {answer!r:.80}")
    elif answer is not None and not 0 <= answer < len(choices):
        remedy = f"give an index from 0 to {len(choices) - 1}"
        bad("answer", f"{answer!r:.80} is not among the {len(choices)} choices; {remedy}")
    targets = target if isinstance(target, list) else [target]
    if target is None:
        targets = []
    elif not targets or not is_list_of(str, targets):
        bad("target", f"expected a text or a list of texts, found {target!r:.60}")
    texts = dict(question=question, choices=" ".join(choices), target=" ".join(targets))
    for name, text in texts.items():
        if half := HALF_CHARACTER.search(text):
            bad(name, f"holds {half[0]!a}, which is half a character; mend or drop the line")
    if isinstance(example.audio, Embedded) and not example.audio:  # neither bytes nor a path
        example.audio = None
    clips = example.clips
    if example.audio is None and not known.text_only:
        bad("audio", "missing, and this format is about sound; name it or drop the line")
    if example.audio == [] or "" in clips:
        bad("audio", "an empty path or list; give a file, or null for a text-only question")
    if not all(isinstance(clip, (str, bytes, Embedded)) for clip in clips):
        bad("audio", f"expected a path, found {example.audio!r:.60}")
    return example


# ------------------------------------------------------------------------------------------------------------
# Formats: the columns that give a kind of file away, and how its rows become the fields of an Example

FIELDS = dict(id="id", audio="audio", question="question", choices="choices", answer="answer")
CLIP_KEYS = (
    "audio|audio_path|audio_file|file_name|filename|file|wav|clip|path|youtube_id|ytid|fname|slice_file_name"
)
CAPTION_KEYS = "captions|caption|caption_1|description"
LABEL_KEYS = "label|labels|positive_labels|class|category"
START_KEYS = "start_s|start_time|start|start_seconds"


@dataclass
class Format:
    """How a kind of file becomes questions.

    All functions but `is_it` get a list of rows, those of one question: one row, unless there is a `group`.
    What neither `fields` nor `convert` takes out of the first row is kept in `meta`, so nothing gets lost.
    """

    keys: str  # the columns that give it away; "a|b": either
    fields: dict = field(default_factory=FIELDS.copy)  # field of Example -> its column; "a|b": the first
    convert: Callable = None  # -> the fields that renaming does not give; takes what it uses out of the row
    texts: str = ""  # columns that must hold a text, so that the functions need not look
    is_it: Callable = lambda row: True  # is this row of the format? Where the columns alone do not tell
    skip: Callable = None  # -> why this is no question for us, or ""
    group: Callable = None  # [row] -> what rows of the same question share; None: the row stands alone
    pool: Callable = None  # -> kinds, right answers: wrong choices come from the first kind, then the next
    about: Callable = None  # all rows, path -> the version of the file; DataError if it is a broken one
    verbatim: bool = False  # choices and paths mean what they say: our own format
    text_only: bool = False  # may a question be without sound?

    def read(self, rows):
        """The rows of one question -> the fields of an Example. The rows are used up."""
        fields = self.convert(rows) if self.convert else {}
        for name, column in self.fields.items():
            if name not in fields:
                fields[name] = take(rows[0], column)
        if fields.get("choices") is not None or "choices" in self.fields and not self.verbatim:
            fields["choices"], fields["answer"] = tidy_choices(fields["choices"], fields.get("answer"))
        return fields | dict(meta=rest_of(rows))


def take(row, column):
    """Take a value out of a row; of "a|b" the first that is not null, and the nulls before it."""
    for key in column.split("|"):
        value = row.pop(key, None)
        if value is not None:
            return value
    return None


def first_key(row, keys):
    """The first of "a|b|c" that the row has."""
    return find_columns(tuple(row), keys)[0]


@functools.lru_cache(1000)  # most rows of a file have the same columns
def find_columns(columns, keys):
    """ "a|b c" -> the first of a and b that is among the columns or None, and the same of c."""
    found = []
    for either in keys.split():
        found.append(next((key for key in either.split("|") if key in columns), None))
    return found


def rest_of(rows):
    """What is left of the rows of one question, for `meta`: the first row, with what its own `meta` holds.

    Where a key stands inside and outside of that `meta`, the inner value goes to ["meta"]. The other rows go
    to ["rows"].
    """
    row, *others = rows
    inner = row.pop("meta", None) or {}
    if not isinstance(inner, dict):
        inner = {"meta": inner}
    hidden = {k: v for k, v in inner.items() if row.get(k, v) != v}
    rest = inner | row
    if hidden:
        rest["meta"] = hidden
    if others:
        rest["rows"] = others
    return rest


def read_json(row, key, kind):
    """A column that holds a list or an object, or the JSON or Python text of one. Raises DataError."""
    value = row[key]
    if isinstance(value, str):
        try:
            value = parse_json(value.encode("utf-8", "replace"), f'field "{key}"')
        except DataError:
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                commas = re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", value.strip())  # numpy writes none
                value = ast.literal_eval(commas)
            if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
                raise
    if not isinstance(value, kind):
        name = getattr(kind, "__name__", "a list of texts")
        raise DataError(f'field "{key}": expected {name}, found {value!r:.80}')
    return value


SEQUENCES = [  # how people label choices
    [*string.ascii_uppercase],
    [*string.ascii_lowercase],
    [str(i) for i in range(1, 100)],
    [str(i) for i in range(100)],
    "I II III IV V VI VII VIII".split(),
    "i ii iii iv v vi vii viii".split(),
]
# "(a) dog", "[A] dog", "A、dog", "1. dog", "Option A: dog", "A.dog"; but "A.D." and "1.5 s" have no label
LABEL = re.compile(
    r"""\s* (?:(?i:option|choice|answer)\s+)? [*]{0,2} [(\[（【]? ([A-Za-z]|\d\d?|[IVX]+|[ivx]+)
    (?: [.]?[)\]）】、．：][.:]?[*]{0,2}\s*
      | [.](?=[\s*]|$)[*]{0,2}\s*
      | (?<=[A-Za-z]):(?=\s|$)\s* | (?<=\d):\s+(?!\d)  # "1: 2" is a score
      | (?<=[A-Za-z])\s+[-–—]\s+(?!\S$|\S\s-)  # and "A - B" are two places
      | (?<=[A-Za-z])[.:](?=[^\W\d_]{2}|[^\x00-\x7f]) )
    """,
    re.VERBOSE,
)


def tidy_choices(choices, answer):
    """(["(A) dog", "(B) cat", None], "B") -> (["dog", "cat"], 1)

    choices: a list, the JSON or Python text of one, or {"A": "dog", "B": "cat"}. Labels go if all choices
    have theirs, in any order. Blank, null and "nan" choices are padding and go. An answer that is a text or a
    label becomes an index; one that is neither stays as it is. Raises DataError.
    """
    choices = read_json(dict(choices=choices), "choices", list | dict)
    if isinstance(choices, dict):
        labels, texts = [*choices], [*choices.values()]
    else:
        labels, texts = split_labels(choices)
    are_numbers = any(type(text) in (int, float) and text == text for text in texts)  # [3, 4, 5]
    texts = [str(text) if type(text) in (int, float) and text == text else text for text in texts]
    if are_numbers and type(answer) in (int, float) and str(answer) in texts:
        place = texts.index(str(answer))
        if type(answer) is int and place != answer and 0 <= answer < len(texts):
            raise DataError(
                f'field "answer": {answer} may be a choice or an index; write the choices as texts'
            )
        answer = texts[place]
    if not all(isinstance(text, str) or is_padding(text) for text in texts):
        raise DataError(f'field "choices": expected a list of texts, found {choices!r:.80}')
    gold = answer
    if type(answer) is int and str(answer) in labels and labels.index(str(answer)) != answer:
        raise DataError(f'field "answer": {answer} may be a label or an index; write the choice itself')
    if isinstance(answer, str):
        gold = find_answer(answer, [*choices], labels, texts)
    kept = [i for i, text in enumerate(texts) if not is_padding(text) or i == gold and text == answer]
    if type(gold) is int and 0 <= gold < len(texts):
        if gold not in kept and gold == answer:
            raise DataError('field "answer": it points at a blank choice; drop the line or mend the answer')
        gold = kept.index(gold) if gold in kept else answer
    return [texts[i] for i in kept], gold


def is_padding(choice) -> bool:
    if isinstance(choice, str):
        return len(choice) < 9 and choice.strip().lower() in ("", "nan")
    return choice is None or choice != choice


def split_labels(choices: list) -> tuple[list[str], list]:
    """-> (labels, texts); no labels if not every choice has its own"""
    labels, texts, marks = [""] * len(choices), list(choices), []
    for i, choice in enumerate(choices):
        mark = LABEL.match(choice) if isinstance(choice, str) else None
        if mark:
            labels[i], texts[i] = mark[1], choice[mark.end() :]
            marks.append(i)
        elif not is_padding(choice):
            return [], choices
    found, said = sorted(labels[i] for i in marks), [texts[i] for i in marks]
    for sequence in SEQUENCES:
        n = len(marks)
        in_place = [sequence[i] for i in marks if i < len(sequence)]
        few_lost = n > 2 and found[:2] == sequence[:2] and {*found} < {*sequence[: n + 2]}
        fits = found in (sorted(sequence[:n]), in_place) or few_lost
        # of "1. Satz" and "2. Satz" the number is what they say
        says_more = len({*said}) == n or sequence[0].upper() == "A"
        if n > 1 and fits and says_more and any(map(str.strip, said)):
            return labels, texts
    return [], choices


def find_answer(answer: str, choices: list, labels: list, texts: list):
    """The index that an answer means, by its text or its label; None if it is blank; else the answer."""
    if not answer.strip():
        return None  # a benchmark withholds it
    if answer in choices:
        return choices.index(answer)
    mark = LABEL.match(answer.strip()) or LABEL.match(answer.strip() + ")")  # "B. cat", "(B)"; "b"
    said = mark and mark[1]
    if labels and said in labels:
        return labels.index(said)
    if answer in texts:
        return texts.index(answer)
    same = [i for i, text in enumerate(texts) if normal_text(str(text)) == normal_text(answer)]
    if len(same) == 1:
        return same[0]
    letter = SEQUENCES[0].index(said.upper()) if said and said.isalpha() and len(said) == 1 else len(texts)
    rest = answer.strip()[mark.end() :] if mark else ""
    if letter < len(texts) and rest.strip() in ("", texts[letter]):
        return letter
    return answer


# ---- kinds of answers: a wrong choice of another kind would give the right one away

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred once twice"
).split()
AROUND_NUMBERS = set("a about almost and around at fewer least less more most over than times".split())
ALWAYS_THERE = {  # wrong choices of a kind, also where no other answer of the file is of it
    "yes or no": ["yes", "no"],
    "number": ["one", "two", "three", "four"],
    "digits": ["1", "2", "3", "4"],
}


def kind_of(answer: str) -> str:
    """ "yes or no", "number" (in words), "digits" (with what is counted: "digits seconds"), or "words"."""
    words = normal_words(answer)
    if words in (("yes",), ("no",)):
        return "yes or no"
    numbers = [w for w in words if w.isdigit() or w in NUMBERS or w.removeprefix("twenty") in NUMBERS]
    if not numbers:
        return "words"
    counted = [w for w in words if w not in numbers and w not in AROUND_NUMBERS]
    return " ".join(["digits" if any(map(str.isdigit, numbers)) else "number", *counted])


def answer_pool(answer: str, *topics: str) -> tuple[list[str], list[str]]:
    """For Format.pool: wrong choices of the answer's own kind, from the same topics first."""
    kind = kind_of(answer)
    return [f"{topic} {kind}" for topic in topics] + [kind], [answer]


# ---- converters, for what renaming does not give: rows -> fields. The rows have the columns of the format


def own_fields(rows):
    """`audio` must be there, or null on purpose: a misspelt key must not become training on text alone."""
    (row,) = rows
    if first_key(row, CLIP_KEYS) is None:
        raise DataError('field "audio": missing; give a path, or null for a question without sound')
    if not isinstance(row.get("meta"), dict | None):
        raise DataError(f'field "meta": expected an object, found {row["meta"]!r:.60}')
    return {}


def avqa(rows):
    """AVQA asks about videos, of which we have the sound (R1-AQA, arXiv 2503.11197)."""
    (row,) = rows
    asked = row["question_text"]
    if "video" not in asked:
        del row["question_text"]
    return dict(question=asked.replace("video", "audio"))


def avqa_processed(rows):
    r"""gijs/avqa-processed: the choices stand in the question, "Q\nChoices:\nA. dog\nB. cat"."""
    question, _, choices = rows[0].pop("question").partition("\nChoices:\n")
    return dict(question=question, choices=[line for line in choices.split("\n") if line.strip()])


def mmau(rows):
    """A row without an id has the name of its clip."""
    (row,) = rows
    name = os.path.splitext(os.path.basename(row["audio_id"]))[0]
    given = take(row, "id")
    return dict(id=name if given is None else given)


def unpack(rows):
    """MMAU's parquet packs most columns into other_attributes."""
    (row,) = rows
    if row.get("other_attributes") is not None:
        row |= read_json(row, "other_attributes", dict)
    row.pop("other_attributes", None)
    return {}


def mmau_version(rows, path):
    """Which MMAU test-mini this is, since scores on its versions are not comparable.

    DataError on the broken ones.
    """
    n = lost = meld = withheld = 0
    for row in rows:
        with contextlib.suppress(DataError):  # a bad line is named when it is read
            unpack([row])
        answer, choices = row.get("answer"), row.get("choices")
        n += 1
        meld += row.get("dataset") == "meld"
        withheld += answer in (None, "")
        lost += bool(answer) and isinstance(choices, list) and answer not in choices
    if lost > 20:
        raise DataError(
            f"{path}: {lost} answers are not among their choices, as in MMAU's files of 15 and 16 May 2025, "
            "whose answers were mapped wrongly; take the current file of the benchmark"
        )
    if withheld == n:
        return "answers withheld"
    versions = {(1000, 70): "v05.15.25", (1000, 43): "original"}
    return versions.get((n, meld), "unknown version")


def mmau_pro_skip(rows):
    choices = rows[0]["choices"]
    if rows[0].get("category") in ("open", "instruction following") or choices in (None, "", [], "[]"):
        return "not multiple choice (open answer or instruction following)"
    choices, answer = tidy_choices(choices, rows[0].get("answer"))
    return "" if type(answer) is int or answer in choices else "the answer is not among the choices"


def choice_columns(rows):
    """MMSU and AIR-Bench: one column a choice, null or blank where there are fewer."""
    (row,) = rows
    keys = [f"choice_{letter}" for letter in "abcdefgh" if f"choice_{letter}" in row]
    return dict(choices=[row.pop(key) or None for key in keys])


def air_bench(rows):
    """AIR-Bench's folders are named after task and source."""
    folder = f"{rows[0]['task_name']}_{rows[0]['dataset_name']}"
    return dict(choice_columns(rows), audio=f"{folder}/{rows[0].pop('path')}")


def arc(rows):
    """ARC in the Hub's columns or in AI2's nesting; the labels are letters or numbers."""
    (row,) = rows
    question, choices = row.pop("question"), row.get("choices")
    if isinstance(question, dict):
        row["question"] = question  # there may be more in it
        question, choices = question.get("stem"), question.get("choices")
    if is_list_of(dict, choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("label", "text")}
    if not isinstance(choices, dict):
        choices = {}
    labels, texts, answer = choices.get("label"), choices.get("text"), row.pop("answerKey")
    if not is_list_of(str, labels) or not is_list_of(str, texts) or len(labels) != len(texts):
        raise DataError(
            f'field "choices": expected as many labels as texts, found {labels!r:.40}, {texts!r:.40}'
        )
    if answer and answer not in labels:
        raise DataError(f'field "answerKey": {answer!r:.40} is not among the labels {labels!r:.80}')
    return dict(question=question, choices=texts, answer=labels.index(answer) if answer else None)


ROLES = dict(user="user", human="user", assistant="assistant", gpt="assistant", model="assistant")
TAG = r"(?:Audio \d+: *)?(?:<audio>(?:[^<\n]+</audio>)?|<sound>)"
CHAT_CLIP_KEYS = f"audios|audio_paths|sounds|sound|audio_url|audio_filepath|speech|{CLIP_KEYS}"
TURNS = "query|messages|conversations|prompt|problem"
NEEDS_EYES = re.compile("<(image|img|video)>")


def is_conversation(row):
    """A prompt beside a question of its own, or beside a label, is something else."""
    if "messages" in row or "conversations" in row:
        return True
    known = "response completion solution ground_truth answer".split()
    return not row.keys().isdisjoint(known) and row.keys().isdisjoint(["question", *LABEL_KEYS.split("|")])


def conversation(rows):
    """Rows of those who fine-tune by ms-swift, LLaMA-Factory, ShareGPT (arXiv 2503.02318) or TRL.

    What the user asks is the question, the reply the target; for RL there is a solution instead, one of the
    options of the question. Clips stand in `audios`, among the parts of the content, or in the question as
    <audio>PATH</audio>.
    """
    (row,) = rows
    key = first_key(row, TURNS)
    turns, inside = read_turns(row, key)
    said = dict(turns)
    asked, reply = said.get("user"), said.get("assistant")
    solutions = [row.get(name) for name in ("solution", "answer", "ground_truth")]
    solution = next((found for found in solutions if found is not None), None)
    if not isinstance(asked, str) or not isinstance(reply, str) and solution is None:
        expected = "expected a text of the user, and a reply or a solution"
        raise DataError(f'field "{key}": {expected}, found {said!r:.200}')
    key = first_key(row, CHAT_CLIP_KEYS)
    if key and isinstance(row[key], str) and row[key].startswith("["):
        row[key] = read_json(row, key, list)
    clips = take(row, CHAT_CLIP_KEYS) or inside or re.findall("<audio>([^<\n]+)</audio>", asked)
    clips = [clip_in(clip) for clip in (clips if isinstance(clips, list) else [clips])]
    if (tags := len(re.findall(TAG, asked))) and tags != len(clips):
        raise DataError(f'field "audios": {len(clips)} clips, and the question has {tags} places for them')
    fields = dict(
        audio=clips if clips[1:] else next(iter(clips), None), question=name_clips(asked), target=reply
    )
    if solution is not None:
        answer = re.search(r"<answer>(.*?)</answer>|\\boxed\{(.*?)\}", str(solution), re.DOTALL)
        fields["answer"] = (answer[1] or answer[2] or "").strip() if answer else solution
        fields["choices"] = take(row, "choices|options")
        if fields["choices"] is None:
            fields["question"], fields["choices"] = split_options(fields["question"])
    return fields


def read_turns(row, key):
    """-> [(role, text)] without the system's, [clips that stand among the texts]. Takes the columns out."""
    if key == "query":
        history = row.get("history") or []
        if not is_list_of(list, history):
            raise DataError(f'field "history": expected a list of pairs, found {history!r:.80}')
        earlier = [text for pair in history for text in pair]
        turns = [*earlier, row.pop("query"), row.pop("response", None)]
        turns = [dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]
    else:
        turns = row.pop(key)
        if isinstance(turns, str) and key in ("prompt", "problem"):
            turns = [dict(role="user", content=turns)]
        if not is_list_of(dict, turns):
            raise DataError(f'field "{key}": expected a list of turns, found {turns!r:.200}')
        turns = [*turns, dict(role="assistant", content=take(row, "response|completion"))]
    said, clips = [], []
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        content = turn.get("content", turn.get("value"))
        if role != "system" and content is not None:
            said.append((ROLES.get(role, role), join_parts(content, clips)))
    return said, clips


def join_parts(content, clips):
    """[{"type": "audio", "audio": PATH}, {"type": "text", "text": ...}] -> "<audio>...", and its clips."""
    if not is_list_of(dict, content):
        return content
    texts = []
    for part in content:
        kind = str(part.get("type"))
        if kind == "text":
            texts.append(str(part.get("text")))
        elif "audio" in kind:
            names = [kind, "audio", "audio_url", "url", "path"]
            clips.append(next((part[name] for name in names if part.get(name) is not None), None))
            texts.append("<audio>")
        else:
            texts.append("<image>")
    return "".join(texts)


def clip_in(value):
    """A path, bytes or Embedded, also where it lies in an object. Raises DataError."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if not value or isinstance(value, str) and value.startswith("data:"):
        raise DataError(f'field "audios": expected the path of a clip, found {value!r:.60}')
    return value


def conversation_skip(rows):
    (row,) = rows
    if any(row.get(key) for key in ("images", "videos", "image", "video")) or row.get("data_type") == "video":
        return "needs a picture or a video"
    try:
        turns, _ = read_turns(row, first_key(row, TURNS))
    except DataError:
        return ""  # it is named when the question is read
    if NEEDS_EYES.search(" ".join(str(text) for _, text in turns)):
        return "needs a picture or a video"
    return "several turns" if len(turns) > 2 or {*dict(turns)} - {"user", "assistant"} else ""


def name_clips(text: str) -> str:
    """A question without the tags around it. A tag inside gets a name, since all clips are heard first."""
    count = len(re.findall(TAG, text))
    inner = re.sub(rf"^(?:\s*{TAG})+\s*", "", text)
    n = count - len(re.findall(TAG, inner))
    inner = re.sub(rf"\s*(?:{TAG}\s*)+$", "", inner)

    def name(tag):
        nonlocal n
        n += 1
        return f"audio {n}" if count > 1 else "the audio"

    return re.sub(TAG, name, inner).strip()


# what stands behind the last option: another paragraph, or how to answer
END_OF_OPTIONS = (
    r"(?s)\n.*|(?i:[.\s]+(please|output|answer|respond|think|choose|select|give|put)\b"
    r".*(answer|letter|option|<).*)"
)


def split_options(text: str):
    """ "Which? Choose from: ['dog', 'cat'].", "Which? A. dog B. cat" -> "Which?", its choices or None"""
    found = re.search(r"""\[(?:'|").*?(?:'|"),.*?(?:'|")\]""", text, re.DOTALL)
    parts = re.split(r"(?:^|\s)[(\[]?([A-Ja-j]|\d)[.):\]]\s+", text)
    labels = parts[1::2]
    starts = [
        k for k in range(len(labels) - 1) if labels[k:] in [seq[: len(labels) - k] for seq in SEQUENCES]
    ]
    if found:
        question, choices = text[: found.start()], read_json(dict(options=found[0]), "options", list)
    elif starts:
        question = text[: text.rindex(parts[2 * starts[-1] + 2])]
        question = re.sub(r"\s*[(\[]?\w[.):\]]\s*$", "", question)
        choices = [" ".join(part.split()).rstrip(",;") for part in parts[2 * starts[-1] + 2 :: 2]]
        choices[-1] = re.sub(END_OF_OPTIONS, "", parts[-1]).strip().rstrip(",;")
    else:
        return text, None
    asks = r"\s*(?:(?:please )?(?:choose|select|pick)[^.?!\n]*|(?:choices|options)):?\s*$"
    return re.sub(asks, "", question, flags=re.IGNORECASE).strip(), choices


def countdown(rows):
    """TinyZero's task. The numbers and the target stay in `meta`, for the reward."""
    nums, target = rows[0]["nums"], rows[0]["target"]
    if not nums or not is_list_of(int, nums) or type(target) is not int:
        found = f"found {nums!r:.60}, {target!r:.40}"
        raise DataError(f'field "nums": expected a list of integers and an integer target, {found}')
    question = (
        f"Using the numbers {nums}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number can only be used once."
    )
    return dict(question=question)


def music_avqa(rows):
    """Slots of the question are filled in order."""
    values = iter(read_json(rows[0], "templ_values", list))
    question = re.sub(r"<\w+>", lambda slot: str(next(values, slot[0])), rows[0]["question_content"])
    return dict(question=question)


def music_types(rows):
    """What is needed to answer, and what is asked: ["Audio", "Counting"]."""
    types = read_json(rows[0], "type", list)
    if not types or not is_list_of(str, types) or HALF_CHARACTER.search("".join(types)):
        raise DataError(f'field "type": expected a list of texts, found {types!r:.80}')
    return types


def music_avqa_skip(rows):
    if rows[0].get("question_deleted"):
        return "deleted by its authors"
    needed = music_types(rows)[0]
    return "" if needed == "Audio" else f"cannot be heard: {needed:.40}"


def clotho_aqa(rows):
    """Three annotators a question: the majority's answer. `meta` keeps what share of them gave it."""
    answer, rows[0]["agreement"] = majority(rows)
    return dict(answer=answer)


def majority(rows):
    """The commonest answer, and the share of the rows that give it."""
    answers = collections.Counter(row["answer"].strip().lower() for row in rows)
    answer, votes = answers.most_common(1)[0]
    return answer, votes / len(rows)


def clip_of(rows):
    """The clip of a row of captions or labels.

    A YouTube id gets its start second, as in VGGSound's file names.
    """
    key = first_key(rows[0], CLIP_KEYS)
    clip = rows[0][key]
    if not isinstance(clip, str | Embedded | None):
        raise DataError(f'field "{key}": expected a path, found {clip!r:.60}')
    starts = [rows[0][k] for k in START_KEYS.split("|") if rows[0].get(k) not in (None, "")]
    if clip is None or key not in ("youtube_id", "ytid") or not starts:
        return clip
    if not re.fullmatch(r"\d{1,7}(\.\d*)?", str(starts[0])):
        raise DataError(f"expected the second at which the clip starts, found {starts[0]!r:.60}")
    return f"{clip}_{int(float(starts[0])):06d}"


def clip_fields(rows):
    """The clip of rows of captions or labels. Its name is the id, if they have none."""
    clip, key = clip_of(rows), first_key(rows[0], CLIP_KEYS)
    if rows[0][key] == clip:
        del rows[0][key]
    name = rows[0].pop("id", None)
    if name is None and isinstance(clip, str):
        name = clip
    return dict(id=name, audio=clip)


def caption_fields(rows):
    """All captions of one clip: material for tools.generate; as a cold start, lessons in describing."""
    found = []
    for row in rows:
        for key in [k for k in row if re.fullmatch(r"captions?(_?\d+)?|description", k)]:
            value = row.pop(key)
            found += value if isinstance(value, list) else [value]
    found = [caption for caption in found if caption]
    if not found or not is_list_of(str, found):
        raise DataError(f'field "captions": expected texts, found {found!r:.60}')
    rows[0]["captions"] = found
    return dict(clip_fields(rows), question="Describe the sound.", target=found)


def label_fields(rows):
    labels = labels_of(rows)
    if len(labels) > 1:
        rows[0][first_key(rows[0], LABEL_KEYS)] = labels
    return dict(clip_fields(rows), question="Which sound is heard in this clip?", answer=labels[0])


def labels_of(rows):
    """The labels of one clip, each once, with single blanks.

    A cell may hold several, as in FSD50K's "Electric_guitar,Guitar"; a blank behind the comma is part of a
    name, as in VGGSound's "playing violin, fiddle", unless the column is called `labels`.
    """
    labels = []
    for row in rows:
        key = first_key(row, LABEL_KEYS)
        values = row[key]
        if isinstance(values, str) and values.startswith("["):
            values = read_json(row, key, list)
        elif isinstance(values, str):
            values = re.split("[,;|]" if key.endswith("labels") else r"[,;|](?!\s)", values)
        names = []
        for value in values if isinstance(values, list) else [values]:
            if type(value) not in (str, int):
                raise DataError(f'field "{key}": expected a text, found {value!r:.60}')
            if re.match("/[mgt]/", str(value)):
                remedy = "write its display_name of class_labels_indices.csv instead"
                raise DataError(f'field "{key}": {value} is an id of AudioSet and no name; {remedy}')
            names.append("" if is_padding(value) else " ".join(str(value).replace("_", " ").split()))
        if not any(names):
            raise DataError(f'field "{key}": is blank; name what is heard, or drop the line')
        labels += filter(None, names)
    return list(dict.fromkeys(labels))


FORMATS = {
    "R1-AQA": Format(
        "question_text multi_choice answer audio_path",
        FIELDS | dict(audio="audio_path", choices="multi_choice"),
        avqa,
        texts="question_text",
    ),
    "AVQA": Format(
        "question_text multi_choice answer video_name",
        FIELDS | dict(audio="video_name", choices="multi_choice"),
        avqa,
        texts="question_text",
    ),
    "AVRT": Format(
        "audio_path question multi_choice answer",
        FIELDS | dict(audio="audio_path", choices="multi_choice"),
    ),
    "MMAU": Format(
        "audio_id question choices answer",
        FIELDS | dict(audio="audio_id"),
        mmau,
        texts="audio_id",
        about=mmau_version,
    ),
    "MMAU (Hub)": Format(
        "instruction choices answer context|audio",
        FIELDS | dict(audio="context|audio", question="instruction"),
        unpack,
        about=mmau_version,
    ),
    "MMAU-Pro": Format(
        "audio_path question choices answer task_identifier",
        FIELDS | dict(audio="audio_path"),
        skip=mmau_pro_skip,
    ),
    "MMAR": Format("audio_path question choices answer modality", FIELDS | dict(audio="audio_path")),
    "AudioMCQ": Format("audio_path question choices answer", FIELDS | dict(audio="audio_path")),
    "AIR-Bench": Format(
        "path question choice_a choice_b answer_gt task_name dataset_name",
        FIELDS | dict(id="uniq_id|id", answer="answer_gt"),
        air_bench,
        texts="path",
    ),
    "MMSU": Format(
        "question choice_a choice_b answer_gt audio|audio_path",
        FIELDS | dict(id="uniq_id|id", audio="audio|audio_path", answer="answer_gt"),
        choice_columns,
    ),
    "ARC": Format("question answerKey", convert=arc, text_only=True),
    "Countdown": Format("nums target", dict(id="id"), countdown, text_only=True),
    "conversation": Format(
        TURNS,
        dict(id="id"),
        conversation,
        is_it=is_conversation,
        skip=conversation_skip,
        text_only=True,
    ),
    "MUSIC-AVQA": Format(
        "video_id question_content templ_values anser type",
        dict(id="question_id", audio="video_id", answer="anser"),
        music_avqa,
        texts="video_id question_content anser",
        skip=music_avqa_skip,
        pool=lambda rows: answer_pool(rows[0]["anser"], *music_types(rows)[1:]),
    ),
    "Clotho-AQA": Format(
        "file_name QuestionText answer",
        dict(audio="file_name", question="QuestionText"),
        clotho_aqa,
        texts="file_name QuestionText answer",
        group=lambda rows: (rows[0]["file_name"], rows[0]["QuestionText"]),
        skip=lambda rows: "" if majority(rows)[1] > 0.5 else "the annotators disagree",
        pool=lambda rows: answer_pool(majority(rows)[0]),
    ),
    "avqa-processed": Format(
        "question answer audio",
        convert=avqa_processed,
        texts="question",
        is_it=lambda row: "\nChoices:\n" in str(row["question"]),
    ),
    "Hub": Format("audio question choices answer", is_it=lambda row: isinstance(row["audio"], Embedded)),
    "own": Format(
        "question",
        FIELDS | dict(audio=CLIP_KEYS, target="target"),
        own_fields,
        verbatim=True,
        text_only=True,
    ),
    "captions": Format(f"{CLIP_KEYS} {CAPTION_KEYS}", {}, caption_fields, group=clip_of),
    "labels": Format(
        f"{CLIP_KEYS} {LABEL_KEYS}",
        {},
        label_fields,
        group=clip_of,
        pool=lambda rows: ([str(rows[0].get("family") or ""), ""], labels_of(rows)),
    ),
}


def format_of(row, where):
    """The name of the first format that the row fits. Raises DataError listing the known ones."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {row!r:.60}")
    if name := name_of_format(row):
        return name
    listed = "; ".join(f"{name}: {known.keys}" for name, known in FORMATS.items())
    found = f"unknown format, keys {sorted(map(str, row))!r:.300}"
    remedy = "`data.py convert --columns sound=audio,prompt=question` reads others"
    raise DataError(f"{where}: {found}. {remedy}. Known formats and their keys: {listed}")


def name_of_format(row: dict) -> str:
    """The first format that the row fits, or ""."""
    for name, known in FORMATS.items():
        if None not in find_columns(tuple(row), known.keys) and known.is_it(row):
            return name
    return ""


def row_problem(row, known):
    """ "" for an object that has the columns of the format, and a text where its functions need one."""
    if not isinstance(row, dict):
        return f"expected a JSON object, found {row!r:.60}"
    columns = tuple(row)
    found = find_columns(columns, known.keys)
    if None in found:
        missing = known.keys.split()[found.index(None)]
        return f'field "{missing}": missing; found only {sorted(map(str, row))!r:.300}'
    for key in find_columns(columns, known.texts):
        if not isinstance(row[key], str):
            return f'field "{key}": expected a text, found {row[key]!r:.60}'
    return ""


# ------------------------------------------------------------------------------------------------------------
# Files: rows of JSON lines, a JSON list, a table, a Hub data set or a folder of sounds


def parse_json(raw: bytes, where: str):
    """Raises DataError with `where`."""
    try:
        return json.loads(raw.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text ({e.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as e:
        remedy = "was the file cut off, or an object spread over several lines?"
        raise DataError(f"{where}: broken JSON ({e}); {remedy}") from None


def file_problem(path: str) -> str:
    """What is wrong with a path that should be a file, or "".

    A pipe or a device is no file: it could hang.
    """
    if os.path.isfile(path):
        return ""
    what = "no such file"
    if os.path.isdir(path):
        what = "is a directory"
    elif os.path.exists(path):
        what = "is not a regular file"
    return f"{path:.1000}: {what}"


def clip_problem(path: str) -> str:
    """The same of a clip, with what to do about it."""
    problem = file_problem(path)
    if problem and re.match(r"\w+://", path):
        return f"{path:.1000}: a web address; download the clip and give its path"
    return problem and problem + (video_hint(path) or spelling_hint(path))


SPELLINGS = {
    "a backslash": lambda name: name.replace("\\", "/"),
    "%-escapes": urllib.parse.unquote,
    "blanks at an end": lambda name: "/".join(map(str.strip, name.split("/"))),
    "another Unicode form": lambda name: unicodedata.normalize("NFC", name),
    "case": str.casefold,
}


def spell(name: str, but: str = "") -> str:
    for what, change in SPELLINGS.items():
        name = name if what == but else change(name)
    return name


@functools.cache
def names_in(folder: str) -> dict[str, list[str]]:
    """How a name is spelt when nothing but its letters counts -> the names in the folder"""
    found = collections.defaultdict(list)
    with contextlib.suppress(OSError, ValueError):
        for name in os.listdir(folder):
            found[spell(name)].append(name)
    return found


def spelling_hint(path: str) -> str:
    """Which file may be meant, and in what its name differs; "" if there is none."""
    found = os.sep
    for part in urllib.parse.unquote(path.replace("\\", "/")).split("/"):
        names = [part]
        if not os.path.exists(os.path.join(found, part)):
            names = names_in(found).get(spell(part), [])
        if len(names) != 1:
            return ""
        found = os.path.join(found, names[0])
    differs = [what for what in SPELLINGS if spell(path, what) != spell(found, what)]
    return f"; {found!r} is there, whose name differs in {' and '.join(differs)}"


MAGIC = [  # where in a file, its bytes there, what it is
    (0, b"RIFF", "a sound"),
    (0, b"fLaC", "a sound"),
    (0, b"OggS", "a sound"),
    (0, b"ID3", "a sound"),
    (0, b"FORM", "a sound"),
    (0, b"PK\3\4", "a zip archive; unpack it first"),
    (257, b"ustar", "a tar archive; unpack it first"),
    (0, b"\x1f\x8b", "compressed; unpack it first (gunzip)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed; unpack it first (zstd -d)"),
    (0, b"BZh", "compressed; unpack it first (bunzip2)"),
    (0, b"\xfd7zXZ", "compressed; unpack it first (unxz)"),
    (0, b"version https://git-lfs", "a Git LFS pointer and not the file itself; git lfs pull"),
    (0, b"<!doctype", "an HTML page: the download went wrong"),
    (0, b"<html", "an HTML page: the download went wrong"),
    (0, b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (4, b"ftyp", "AAC or a video"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"#!AMR", "AMR"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "WMA"),
]


def kind_of_file(path: str) -> str:
    """What a file is by its first bytes, whatever its name; "" if they do not tell."""
    with open(path, "rb") as f:
        head = f.read(512)
    for at, magic, what in MAGIC:
        if head[at : at + len(magic)].lower() == magic.lower():
            return what
    return ""


class Rows:
    """The rows of a data set. rows[i] is a fresh object each time, or a DataError that names its place."""

    def __init__(self, path, unit=""):
        self.path, self.unit = path, unit
        self.places = array("q")  # of each row: its line or number
        self.folder = ""  # where the paths of clips start
        self.left_out = collections.Counter()  # files that are no rows, and why
        self.columns = {}  # theirs -> ours

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i: int):
        row = self.read_row(i)
        if self.columns and isinstance(row, dict):
            for theirs, ours in self.columns.items():
                if theirs in row:
                    row[ours] = row.pop(theirs)
        return row

    def where(self, i: int) -> str:
        """ "file:line" of row i."""
        return f"{self.path}:{self.unit}{self.places[i]}"


class TextRows(Rows):
    """Rows of a text file: JSON lines, read when they are asked for; or a JSON list or a table, read at once.

    A JSON line costs 16 bytes until it is read. Raises DataError.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self.starts = array("q")  # of each row of JSON lines: where it begins in the file
        self.rows, self.header = [], []  # of the others: entries as JSON, or the cells of a record
        if problem := file_problem(path):
            raise DataError(f"{problem}; expected a file of questions (JSONL)")
        kind = kind_of_file(path)
        if kind and not kind.startswith("compressed; unpack it first (gunzip)"):
            raise DataError(f"{path}: is {kind}; expected a file of questions (JSONL)")
        self.file = unzipped(path) if kind else open(path, "rb")
        blanks = b" \t\r\n\xef\xbb\xbf"  # with the bytes of a byte order mark
        start = list(islice(filter(None, (line.strip(blanks) for line in self.file)), 50))
        self.file.seek(0)
        if not os.path.getsize(path):
            raise DataError(f"{path}: is empty; expected a file of questions (JSONL)")
        while is_comment(start):
            del start[0]
        first = start[0] if start else b""
        if first.startswith(b"["):
            self.read_list(parse_json(self.file.read(), path))
        elif first.lower().endswith(tuple(map(str.encode, SOUND_FILES))) and b"," not in first:
            remedy = "write a CSV with the columns audio,label, or questions as JSON lines"
            raise DataError(f"{path}: a list of sounds is no set of questions; {remedy}")
        elif first.startswith(b"{") or re.fullmatch(rb'[^,;\t]*|"[^"]*"', first):
            self.find_lines()
            self.read_object(first)
        else:
            self.read_table(max(",;\t", key=first.decode("utf-8", "replace").count))

    def find_lines(self):
        at = 0
        for number, line in enumerate(self.file, 1):
            if not line.isspace():
                self.starts.append(at)
                self.places.append(number)
            at += len(line)
        self.starts.append(at)

    def read_object(self, first):
        """One JSON object, on one line or several, which is the only row or holds the list of them."""
        with contextlib.suppress(ValueError):
            if isinstance(json.loads(first), dict) and len(self.places) > 1 or self.starts[-1] > 2**30:
                return
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(os.pread(self.file.fileno(), self.starts[-1], 0))
            if not isinstance(whole, dict):
                return
            lists = [value for value in whole.values() if value and is_list_of(dict, value)]
            is_row = len(lists) != 1 or name_of_format(whole) or not name_of_format(lists[0][0])
            if len(self.places) > 1 or not is_row:
                self.starts = array("q")
                self.read_list([whole] if is_row else lists[0])

    def read_list(self, rows):
        """Entries are kept as JSON: it takes less memory, and whoever gets a row may change it."""
        self.rows = [json.dumps(row).encode() for row in rows]
        self.places, self.unit = range(1, len(rows) + 1), "entry "

    def read_table(self, delimiter):
        """A record may span lines."""
        raw = self.file.read()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            line = raw.count(b"\n", 0, e.start) + 1
            raise DataError(
                f"{self.path}:{line}: not UTF-8 text ({e.reason}); save the file as UTF-8"
            ) from None
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        try:
            for record in reader:
                if any(cell.strip() for cell in record):
                    self.rows.append([cell.strip() for cell in record])
                    self.places.append(reader.line_num)
        except csv.Error as e:
            reason = f"not a CSV record ({e}); is a quote left open?"
            raise DataError(f"{self.path}:{reader.line_num}: {reason}") from None
        while is_comment([first for first, *_ in self.rows[:2]]):
            del self.rows[0], self.places[0]
        if self.rows:
            self.read_header(self.rows[0])

    def read_header(self, first):
        """Usually the first record; VGGSound's files have none."""
        if len(first) == 4 and first[1].isdigit():
            self.header = ["youtube_id", "start_s", "label", "split"]
            return
        if len(first) == 2 and first[0].endswith(SOUND_FILES + VIDEO_FILES):
            self.header = ["clip", "label"]
            return
        for n, name in enumerate(first, 1):
            column = COLUMNS.get(name.lstrip("# ").casefold(), name or f"column {n}")  # AudioSet: "# YTID"
            if column in self.header:
                raise DataError(f"{self.where(0)}: two columns are called {column!r:.80}")
            self.header.append(column)
        del self.rows[0], self.places[0]

    def read_row(self, i):
        if self.starts:  # pread: threads may share it, and a file that shrank is an error and no crash
            raw = os.pread(self.file.fileno(), self.starts[i + 1] - self.starts[i], self.starts[i])
            return parse_json(raw, self.where(i))
        row = self.rows[i]
        if not self.header:
            return parse_json(row, self.where(i))
        if len(row) != len(self.header):
            expected = f"expected the {len(self.header)} columns {self.header!r:.300}"
            raise DataError(f"{self.where(i)}: {len(row)} fields, {expected}")
        return dict(zip(self.header, row))


def is_comment(lines) -> bool:
    """Is the first line a comment? The header itself may begin with "#", as AudioSet's does."""
    return len(lines) > 1 and all(line[:1] in ("#", b"#") for line in lines[:2])


def unzipped(path: str):
    """A gzip file -> an open file of its content, which has no name."""
    file = tempfile.TemporaryFile()
    try:
        with gzip.open(path) as f:
            shutil.copyfileobj(f, file)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: could not be unpacked ({e}); was the file cut off?") from None
    file.seek(0)
    return file


COLUMN_NAMES = " ".join(known.keys for known in FORMATS.values())
COLUMN_NAMES += f" {START_KEYS} id family confidence caption_2 caption_3 caption_4 caption_5"
COLUMNS = {name.casefold(): name for name in re.split("[ |]", COLUMN_NAMES)}  # headers come in any case
SOUND_FILES = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".opus", ".aif", ".aiff", ".au", ".w64")
VIDEO_FILES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4a", ".aac", ".wma", ".amr", ".3gp", ".caf")


class TableRows(Rows):
    """Rows of a parquet file, a saved data set or a Hub id ("org/name[/config][:split]"), by `datasets`."""

    def __init__(self, source: str):
        super().__init__(source, "row ")
        try:
            import datasets
        except ImportError:
            needs = "parquet and Hub data sets need the package datasets (pip install datasets)"
            raise DataError(f"{source}: {needs}") from None
        datasets.disable_progress_bars()
        try:
            rows = load_table(source, datasets)
        except Exception as e:  # the library raises what its storage raises
            expected = "expected a file, or a Hub id as org/name[/config][:split]"
            reason = f"{type(e).__name__}: {e!s:.300}"
            raise DataError(f"{source}: could not be loaded ({reason}); {expected}") from None
        self.table, self.places = rows.with_format("arrow"), range(1, len(rows) + 1)
        self.lists, self.clips = set(), set()  # columns that hold lists, and clips
        self.names = {}  # of columns that hold a class: its names
        for name, kind in rows.features.items():
            if hasattr(kind, "feature"):
                self.lists.add(name)
                kind = kind.feature
            if isinstance(kind, datasets.ClassLabel):
                self.names[name] = [*kind.names, None]  # -1: no label
            is_struct = isinstance(kind, dict) and ("bytes" in kind or {"array", "sampling_rate"} <= {*kind})
            is_bytes = getattr(kind, "dtype", "") in ("binary", "large_binary")
            if is_struct or is_bytes or isinstance(kind, datasets.Audio):
                self.clips.add(name)

    def read_row(self, i):
        row = self.table[i]
        return {name: self.cell(i, name, row.column(name)[0]) for name in row.column_names}

    def cell(self, i, name, value):
        if name in self.names and value.is_valid:
            classes, names = value.as_py(), self.names[name]
            return [names[i] for i in classes] if isinstance(classes, list) else names[classes]
        if name not in self.clips or name in self.lists and not value.is_valid:
            return value.as_py()
        if name not in self.lists:
            return Embedded(self, i, name)
        return [Embedded(self, i, name, k) or None for k in range(len(value))]


def load_table(source, datasets):
    if os.path.isfile(source):
        return datasets.load_dataset("parquet", data_files=source, split="train")
    name, _, split = source.partition(":")
    if not os.path.isdir(name):
        org, name, *config = name.split("/")
        return datasets.load_dataset(f"{org}/{name}", *config, split=split or "train")
    saved = any(os.path.exists(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json"))
    found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    if not isinstance(found, dict):
        if split:
            raise DataError(f"one set without splits, so there is no {split}; give {name}")
        return found
    split = split or (min(found) if len(found) == 1 else "train")
    if split not in found:
        raise DataError(f"no split {split!r}; there are {', '.join(found)}, as in {name}:{min(found)}")
    return found[split]


NOT_A_LABEL = set("audio audios clips data sounds samples wav wavs".split())
SPLITS = "train training validation valid val dev eval evaluation test testing".split()


def find_sounds(folder: str):
    """-> (names of the sounds below a folder, {split: its folders}, Counter of what is left out, and why)

    train/ and test/ are splits where both stand above other folders; else train/ may be a train's sound.
    """
    names, splits, left_out, first = [], collections.defaultdict(list), collections.Counter(), {}
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
        here = {name: split_of(name) for name in folders if split_of(name)}
        here = {name: split for name, split in here.items() if holds_folders(os.path.join(place, name))}
        if len(here) > 1:
            for name, split in here.items():
                splits[split].append(os.path.join(place, name))
        for name in sorted(files):
            path, ending = os.path.join(place, name), os.path.splitext(name)[1].lower()
            if name[0] == ".":
                continue
            if ending in SOUND_FILES:
                names.append(os.path.relpath(path, folder))
            else:
                left_out[first.setdefault(ending, no_sound(path))] += 1
    return sorted(names), splits, left_out


def ffmpeg_line(source, target=""):
    """To paste: the sound of a video, or of a file that libsndfile does not read, as a wav beside it."""
    target = target or os.path.splitext(source)[0] + ".wav"
    if target == source:
        target = os.path.splitext(source)[0] + "_mended.wav"
    return f"ffmpeg -i {shlex.quote(source)} {shlex.quote(target)}"


def split_of(name: str) -> str:
    """ "Train" and "training_set" -> "train", "training"; "" for what is no split"""
    words = re.findall("[a-z]+", name.lower())
    is_split = words and words[0] in SPLITS and {*words[1:]} <= NOT_A_LABEL | {"set", "split"}
    return words[0] if is_split else ""


def holds_folders(folder: str) -> bool:
    return any(entry.is_dir() for entry in os.scandir(folder))


def no_sound(path):
    ending = os.path.splitext(path)[1].lower()
    if ending not in VIDEO_FILES:
        return f"not a sound ({ending or 'no ending'})"
    return f"{ending} cannot be read; {ffmpeg_line(path)}"


class FolderRows(Rows):
    """Sounds in folders named after what is heard: animals/dog/1.wav is a dog, of the family animals."""

    def __init__(self, path: str):
        super().__init__(path)
        self.places, splits, self.left_out = find_sounds(path)
        if splits:
            one = min(sum(splits.values(), []))
            raise DataError(f"{path}: holds the splits {', '.join(splits)}; give one, {one}")
        labels = {row["label"]: row["audio"] for row in self}
        if len(labels) < 2 or "" in labels:
            found = labels.get("") or (self.places or [*self.left_out, "no sound"])[0]
            raise DataError(
                f"{path}: expected a data set, or sounds ({', '.join(SOUND_FILES)}) in folders named after "
                f"what is heard, found {found}; sort them so, or write a CSV with the columns audio,label"
            )

    def read_row(self, i):
        return folder_row(self.places[i])


def folder_row(name):
    """ "train/animals/Cow_Moo/1.wav" -> label "cow moo", family "animals"; "101 - Dog" is "dog"."""
    labels = ["", ""]
    for folder in os.path.dirname(name).split(os.sep):
        words = re.sub(r"^\d+ - ", "", unicodedata.normalize("NFC", folder).lower())
        label = " ".join(re.findall(r"[^\s_-]+", words))
        if label and label not in NOT_A_LABEL:
            labels.append(label)
    classes = ["", ""] + [label for label in labels if label and not split_of(label)]
    label = classes[-1] or labels[-1]  # the sound of a train
    return dict(audio=name, label=label, family=classes[-2])


def stem_of(name: str) -> str:
    """A clip's name without folder and ending.

    AVQA says "-HG3Omg_89c_000030", a YouTube id and its start second, and the file is "-HG3Omg_89c_30.wav".
    In other names zeros count: take_1 and take_001 are two.
    """
    stem, ending = os.path.splitext(os.path.basename(name))
    if ending.lower() not in SOUND_FILES + VIDEO_FILES:
        stem += ending
    return re.sub(r"^([\w-]{11}_)(?=\d{6}$)0{1,5}", r"\1", stem)


# stems that no other clip of the world has: a YouTube id with a start second, a UUID, a hash
is_id = re.compile(r"(?=.*[a-z])(?=.*[A-Z])[\w-]{11}_(0|[1-9]\d*)|(?=.*\d)(?=.*[a-f])[\da-f-]{16,}").fullmatch


@functools.cache
def folders_in(folder):
    with contextlib.suppress(OSError, ValueError):  # no such folder; no such name
        return sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    return []


@functools.cache
def sounds_in(folder: str, deep: bool = False) -> dict[str, list[str]]:
    """stem -> files, of the sounds of a folder; deep: and of its folders."""
    found = collections.defaultdict(list)
    for place in [folder, *folders_in(folder)] if deep else [folder]:
        with contextlib.suppress(OSError, ValueError):
            for entry in os.scandir(place):
                if entry.name.lower().endswith(SOUND_FILES):
                    found[stem_of(entry.name)].append(entry.path)
    return found


# an id of YouTube with its start second or without, and what downloaders put around it: "Y", the end second
VIDEO_NAME = re.compile(
    r"Y?(?=[\w-]{0,10}[a-z])(?=[\w-]{0,10}[A-Z])([\w-]{11})(?:_0*(\d+)(?:\.\d+)?(?:_\d+(?:\.\d+)?)?)?"
)


@functools.cache
def videos_in(folder: str) -> dict[str, list[tuple]]:
    """id of YouTube -> (start second or None, file), of the sounds of a folder and of its folders."""
    found = collections.defaultdict(list)
    for stem, paths in sounds_in(folder, deep=True).items():
        if video := VIDEO_NAME.fullmatch(stem):
            found[video[1]] += [(video[2], path) for path in paths]
    return found


def find_video(stem: str, folder: str) -> list[str]:
    """The files that a name with an id of YouTube can mean. A start may be in seconds or milliseconds."""
    video = VIDEO_NAME.fullmatch(stem)
    if video is None:
        return []
    start, starts = video[2], (None, video[2], f"{video[2]}000")
    return [path for found, path in videos_in(folder).get(video[1], []) if start is None or found in starts]


def below(name, folder):
    if "://" in name:
        if not name.startswith("file://"):
            return name
        name = urllib.parse.unquote(name.removeprefix("file://"))
    return os.path.join(folder, os.path.expanduser(name) if name.startswith("~/") else name)


def locate(name: str, folder: str) -> str:
    """Where the clip lies that a data set calls `name`, relative to `folder`: there, whatever its ending.

    If it is not there, and only one file can be it: in any folder of `folder`, by an id; in `folder` itself,
    if the name begins with that folder; in a folder of `folder`, by the whole name. "clotho/1.wav" is never
    "fsd/1.wav".       -> `folder`/`name` if it is not found
    """
    path = below(name, folder)
    if os.path.isfile(path) and not path.lower().endswith(VIDEO_FILES):
        return path
    stem, start = stem_of(name), os.path.normpath(os.path.dirname(name))
    found = sounds_in(os.path.dirname(path)).get(stem)
    if not found and is_id(stem):
        found = sounds_in(folder, deep=True).get(stem)
    found = found or find_video(stem, folder)
    if not found and folder.endswith(os.sep + start):
        found = sounds_in(folder).get(stem)
    if not found:
        found = [os.path.join(place, name) for place in folders_in(folder)]
        found = list(filter(os.path.isfile, found))
    return found[0] if len(found) == 1 else path


class Examples(collections.abc.Sequence):
    """A data set as a sequence of Example, each made when it is asked for.

    source: a file of a known format (JSON lines, a JSON list, CSV, parquet), a folder of sounds, or a Hub id.
    audio_dir: where relative audio paths start; "" is the folder of the file. columns: what other files call
    our columns, as "sound=audio,prompt=question".
    Attributes: format, version (a benchmark's, or ""), skipped and noted (Counters of reasons), items (of
    every question the numbers of its rows), hash (of all questions, once `scan` has read them). Raises
    DataError.
    """

    def __init__(self, source: str, audio_dir: str = "", columns: str = ""):
        self.path = source
        self.rows = open_rows(source)
        own_folder = self.rows.path.partition(":")[0]
        own_folder = own_folder if os.path.isdir(own_folder) else os.path.dirname(self.rows.path)
        self.folder = self.rows.folder = os.path.abspath(audio_dir or own_folder)
        if not len(self.rows):
            raise DataError(f"{source}: holds no question")
        if columns:
            self.rename(columns)
        self.format = format_of(self.rows[0], self.rows.where(0))
        self.known = FORMATS[self.format]
        self.noted = collections.Counter()  # oddities of those that were looked at
        self.n_choices = 4  # where wrong choices are drawn
        self.items = [(i,) for i in range(len(self.rows))]
        self.skipped, self.pools, self.version = collections.Counter(self.rows.left_out), {}, ""
        if self.known.group:
            self.group_rows()
        if self.known.skip:
            self.skip_items(self.known.skip)
        if self.known.pool:
            self.pool_answers()
        if self.known.about:
            rows = (self.ask(lambda rows: rows[0], item) for item in self.items)
            self.version = self.known.about(rows, source)

    def rename(self, columns):
        pairs = [pair.strip().partition("=")[::2] for pair in columns.split(",")]
        for theirs, ours in pairs:
            if not theirs or not ours or theirs not in self.rows[0]:
                found = f"found {sorted(map(str, self.rows[0]))!r:.300}"
                raise UserError(f"--columns {columns}: expected THEIRS=OURS for columns of the file, {found}")
        self.rows.columns = dict(pairs)

    def group_rows(self):
        groups = collections.defaultdict(list)
        for item in self.items:
            key = self.ask(self.known.group, item)
            groups[item if key is None else key] += item
        self.items = list(map(tuple, groups.values()))

    def skip_items(self, reason_of):
        kept = []
        for item in self.items:
            if reason := self.ask(reason_of, item):
                self.skipped[reason] += 1
            else:
                kept.append(item)
        self.items = kept
        if not kept:
            found = f"{self.format} format, and no question that can be used: {dict(self.skipped)!r:.300}"
            raise DataError(f"{self.path}: {found}")

    def pool_answers(self):
        """kind -> all right answers of that kind, from which wrong choices are drawn."""
        pools = collections.defaultdict(set)
        for item in self.items:
            kinds, answers = self.ask(self.known.pool, item)
            for kind in kinds:
                pools[kind].update(a for a in answers if a.strip() and not HALF_CHARACTER.search(a))
        for kind in pools.keys() & ALWAYS_THERE.keys():
            pools[kind].update(ALWAYS_THERE[kind])
        self.pools = {kind: sorted(answers) for kind, answers in pools.items()}
        if any(len(pool) == 1 for pool in pools.values()):
            self.skip_items(self.lonely)

    def lonely(self, rows):
        kinds, right = self.known.pool(rows)
        others = any(set(self.pools[kind]).difference(right) for kind in kinds)
        is_bad = right[0] not in self.pools[kinds[-1]]  # which is named when the question is read
        return "" if others or is_bad else "no other answer to choose from is of its answer's kind"

    def rows_of(self, i: int) -> list[dict]:
        """The rows of question i, as the file has them."""
        return [self.rows[k] for k in self.items[i]]

    def ask(self, function, item):
        """function(rows), after the rows are checked. A DataError gets its line; other errors are our own."""
        rows = [self.rows[k] for k in item]
        for k, row in zip(item, rows):
            if problem := row_problem(row, self.known):
                raise DataError(f"{self.rows.where(k)}: {problem}")
        try:
            return function(rows)
        except DataError as e:
            for k in item[1:]:
                self.ask(function, (k,))  # is it this row's fault?
            raise DataError(f"{self.rows.where(item[0])}: {e}") from None

    def __len__(self):
        return len(self.items)

    def __str__(self):
        skipped = "".join(f"; {n} skipped: {reason}" for reason, n in self.skipped.most_common(4))
        noted = "".join(f"; {n} noted: {reason}" for reason, n in self.noted.most_common())
        version = f" {self.version}" if self.version else ""
        return f"{self.path}: {self.format} format{version}, {len(self)} examples{skipped}{noted}"

    def where(self, i):
        """ "file:line" of question i."""
        return self.rows.where(self.items[i][0])

    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        i = range(len(self))[i]
        return self.ask(lambda rows: self.make(i, rows), self.items[i])

    def make(self, i, rows):
        drawn = self.draw_choices(i, rows) if self.pools else None  # before the rows are used up
        fields = self.known.read(rows)
        fields["choices"] = fields.get("choices") or drawn
        if fields.get("id") is None:
            fields["id"] = self.rows.places[self.items[i][0]]
        example = make_example(fields, self.known)
        find = below if self.known.verbatim else locate
        clips = [find(clip, self.folder) if isinstance(clip, str) else clip for clip in example.clips]
        if clips:
            example.audio = clips if isinstance(example.audio, list) else clips[0]
        return example

    def draw_choices(self, i, rows):
        """The right answer among wrong ones of its first kind, then of the next. The same for i each time."""
        kinds, right = self.known.pool(rows)
        seed = f"{i} {right[0]}".encode("utf-8", "replace")
        rng, choices, n = random.Random(seed), [right[0]], self.n_choices
        for kind in kinds:
            pool = self.pools[kind]
            others = rng.sample(pool, min(len(pool), n + len(choices) + len(right) - 1))
            others = [c for c in others if c not in choices and c not in right]
            choices += others[: n - len(choices)]
        rng.shuffle(choices)
        return choices


def names_files(path: str) -> bool:
    """Is it the metadata of one of the Hub's audio folders?"""
    if os.path.basename(path) not in ("metadata.jsonl", "metadata.csv"):
        return False
    with open(path, "rb") as f:
        return b"file_name" in f.readline()


def open_rows(source: str):
    """A file, a folder or a Hub id -> its rows, by len(rows), rows[i] and rows.where(i). Raises DataError."""
    kind, name, split = TextRows, *source.partition(":")[::2]  # TextRows also says what is wrong
    if os.path.isdir(source) or split and os.path.isdir(name) and not os.path.exists(source):
        files = [os.path.join(place, file) for place, _, files in os.walk(name) for file in files]
        metadata = [file for file in files if names_files(file)]
        if split or any(file.endswith((".parquet", f"{os.sep}state.json")) for file in files):
            kind = TableRows
        elif len(metadata) > 1:
            raise DataError(f"{source}: holds several sets; give one, as {min(metadata)}")
        elif metadata:  # the layout of the Hub's audio folders
            return TextRows(metadata[0])
        else:
            kind = FolderRows
    elif os.path.isfile(source):
        with open(source, "rb") as f:
            if f.read(4) == b"PAR1":
                kind = TableRows
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w.-]+)?(:[\w.%+:\[\]-]+)?", source):
        file_endings = r"\.(jsonl?|csv|tsv|txt|parquet|arrow|gz|zip|wav|flac|mp3|ogg)$"
        if not os.path.isdir(name.split("/")[0]) and not re.search(file_endings, name):
            kind = TableRows
    return kind(source)


def scan(examples: Examples, purpose="train", folder="", most=10, deaf=False) -> array:
    """Parse every line and look for its audio file; no audio is read.       -> the clip_key of every question

    purpose: "train" needs choices and an answer (or Countdown's numbers), "cold_start" a target, "check"
    neither. folder: where the keys' paths start. deaf: nothing is played, so clips may be missing. Raises
    DataError listing the first `most` problems.
    """
    keys, problems, digest = array("L"), [], hashlib.blake2b(digest_size=8)
    problem_of = functools.lru_cache(100_000)(clip_problem)  # several questions a clip is usual
    for i in range(len(examples)):
        try:
            example, problem = examples[i], ""
            if purpose == "train" and not example.has_answer:
                missing = "answer" if example.choices else "choices"
                problem = f'field "{missing}": missing, and training needs it'
            if purpose == "cold_start" and example.target is None:
                problem = 'field "target": missing, and a cold start needs the text to imitate'
            for clip in example.clips:
                if not deaf and isinstance(clip, str) and problem_of(clip):
                    problem = f'field "audio": {problem_of(clip)}'
            if problem:
                raise DataError(f"{examples.where(i)}: {problem}")
            keys.append(clip_key(example, folder))
            examples.noted.update(oddities(example))
            names = [os.path.basename(str(clip)) for clip in example.clips]  # the data may be moved
            asked = example.question, example.choices, example.answer, example.target
            digest.update(repr((names, *asked)).encode("utf-8", "replace"))
        except DataError as e:
            problems.append(str(e))
            if len(problems) == most:
                problems.append("...")
                break
    if problems:
        raise DataError("\n".join(problems))
    examples.hash = digest.hexdigest()
    return keys


PLAIN = re.compile(r"[A-Za-z0-9]+( [A-Za-z0-9]+)*").fullmatch  # what normal_text only puts into lower case


def oddities(example: Example) -> list[str]:
    """What is no fault, and should be known: it is counted at the start of a run, and listed by `check`."""
    found, choices = [], example.choices
    if len({*map(str.lower, choices)}) < len(choices) or not all(map(PLAIN, choices)):
        if len({*map(normal_text, choices)}) < len(choices):
            found.append("two of the choices are the same")
    if example.meta.get("question_relation") == "View":
        found.append("only the eye can answer; leave out by `data.py filter --where question_relation!=View`")
    return found


def clip_key(example: Example, folder: str = "") -> int:
    """A hash of the first clip, or of the id where there is none. Questions of one key belong together.

    folder: paths are taken from there, so that the key stays the same when a data set is moved.
    """
    key = example.id
    if example.clips:
        clip = example.clips[0]
        key = clip.key if isinstance(clip, Embedded) else os.path.normpath(clip)
        if folder and key.startswith(os.path.join(folder, "")):
            key = key[len(folder) :].lstrip(os.sep)
        elif folder and os.path.isabs(key):
            key = os.path.relpath(key, folder)
    return zlib.crc32(key.encode("utf-8", "replace"))


def sample_by_clip(keys: array, n: int) -> list[int]:
    """About n indices, in order: of the clips that their keys' hashes choose, all questions."""
    mixed = [zlib.crc32(key.to_bytes(8, "little")) for key in keys]
    limit = sorted(mixed)[min(n, len(keys)) - 1] if n else -1
    return [i for i, h in enumerate(mixed) if h <= limit]


def held_out(keys: array, n: int) -> tuple[list[int], list[int]]:
    """Split by clip: all questions on one clip fall on one side.

    -> train indices, about n held-out indices, at most a fifth or so
    """
    held = sample_by_clip(keys, min(n, len(keys) // 5))
    train = sorted({*range(len(keys))}.difference(held))
    return (train, held) if train else (held, [])  # one clip cannot be split


# ------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(source: str | bytes | Embedded, max_s: float = 30.0):
    """A wav, flac, ogg or mp3, whatever its name -> (float32 mono samples at 16 kHz, was it cut at max_s?).

    Channels are averaged and then resampled with soxr; only the first max_s seconds are decoded.
    Raises AudioError with the path and the reason.
    """
    wave, _, _, seconds = read_audio(source, max_s)
    return wave, seconds > max_s


def read_audio(source: str | bytes | Embedded, max_s: float, whole: bool = False):
    """-> the first max_s seconds as load_audio gives them, the file's rate in Hz, its channels, its seconds

    Raises AudioError; if it must be `whole`, also for a clip that lost its end: it plays, but its header
    knows.
    """
    import soundfile

    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
    if isinstance(source, Embedded):
        source = source.read()
    if isinstance(source, str) and (problem := clip_problem(source)):
        raise AudioError(problem)
    try:  # by descriptor: from a name such as x.raw or x.au the library would guess a format
        file = os.open(source, os.O_RDONLY) if isinstance(source, str) else io.BytesIO(source)
        with soundfile.SoundFile(file) as f:
            wave, n = decode(f, max_s, name)
            rate_hz, channels = f.samplerate, f.channels
            promised_s = f.frames / rate_hz if f.frames < 2**62 else 0  # some headers do not know
            sizes = re.search(r"data : (\d+) \(should be (\d+)", f.extra_info)  # of a wav
    except (OSError, RuntimeError) as e:  # soundfile's errors are RuntimeErrors
        reason = str(e).rpartition(": ")[2].strip()
        hint = video_hint(source) if isinstance(source, str) else ""
        kind = kind_of_file(source) if isinstance(source, str) else ""
        if kind not in ("", "a sound"):
            reason = f"it is {kind}"
        if kind in ("AAC", "AAC or a video", "a video", "AMR", "WMA"):
            hint = hint or f"; {ffmpeg_line(source)}"
        raise AudioError(f"{name}: not a readable sound file ({reason}){hint}") from None
    seconds = n / rate_hz
    if seconds > max_s:
        seconds = max(seconds, promised_s)
    if whole and sizes and int(sizes[2]) < int(sizes[1]) < 0x7FFFFF00:  # above: a stream of unknown length
        raise AudioError(f"{name}: is cut short, {sizes[2]} of {sizes[1]} bytes of sound are there")
    if whole and promised_s > seconds + 0.1:
        raise AudioError(f"{name}: is cut short, {seconds:.1f} of {promised_s:.1f} s are there")
    heard_s, least_s = min(seconds, max_s), (MIN_SAMPLES - 0.5) / RATE_HZ
    if heard_s < least_s:
        least_ms = MIN_SAMPLES / RATE_HZ * 1000
        raise AudioError(f"{name}: too short, {heard_s * 1000:.1f} ms; at least {least_ms:.1f} ms are needed")
    return wave, rate_hz, channels, seconds


def decode(f, max_s, name):
    """An open SoundFile -> its first max_s seconds at 16 kHz, and the number of frames that were read.

    Block by block, each of which stays in the cache: it takes half the time of doing it in one piece.
    """
    import soxr

    kind, full_scale = "float32", 1
    if f.subtype == "PCM_16":
        kind, full_scale = "int16", 2**15  # a third of the time
    block = np.empty((1 << 15, f.channels), kind)
    mix = np.full(f.channels, 1 / f.channels / full_scale, np.float32)
    resampler = soxr.ResampleStream(f.samplerate, RATE_HZ, 1)
    parts, n, longest = [], 0, int(max_s * f.samplerate)
    while n <= longest and len(part := f.read(out=block)):
        mono = part[: longest - n] @ mix
        n += len(part)
        if len(mono) and not (mono.min() > -1e9 and mono.max() < 1e9):  # NaN is neither; full scale is 1
            raise AudioError(f"{name}: holds samples that are not finite numbers, or absurdly large ones")
        parts.append(mono if f.samplerate == RATE_HZ else resampler.resample_chunk(mono))
    if not n:
        raise AudioError(f"{name}: is empty")
    if f.samplerate != RATE_HZ:
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts), n


def video_hint(path):
    """What to do if the sound that should be at `path` lies in a video, "" if it does not."""
    stem, ending = os.path.splitext(path)
    for video_ending in (ending, *VIDEO_FILES):
        video = stem + video_ending
        if video_ending.lower() in VIDEO_FILES and os.path.isfile(video):
            sound = path if ending.lower() in SOUND_FILES else ""
            return f"; extract the sound: {ffmpeg_line(video, sound)}"
    return ""


def probe_audio(examples: Examples, max_s: float, budget_s: float = 2.0):
    """Decode clips for budget_s seconds, first and last lines first.      -> (number decoded, problems)"""
    places = range(len(examples))
    edge = sorted({*places[:32], *places[-32:]})
    clips = ((i, clip) for i in [*edge, *places[32:-32]] for clip in examples[i].clips)
    problems, count, deadline = [], 0, time.monotonic() + budget_s
    waves = ahead(clips, lambda clip: load_audio(clip[1], max_s), os.cpu_count() or 1, 16)
    for (i, _), result in waves:
        count += 1
        if isinstance(result, DataError):
            problems.append(f'{examples.where(i)}: field "audio": {result}')
        if time.monotonic() > deadline and count >= len(edge):
            break
    return count, problems


# ------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Template:
    """A named prompt: the user turn is the clip, the question, its options, and `ending`."""

    ending: str
    system: str | None = None  # None: whatever the checkpoint's chat template puts there
    max_new_tokens: int = 32
    relistens: int = 0  # parts of its clip that a completion may hear again, by <seg>start, end</seg>
    question: str | None = None  # asked in place of the example's own question and options


# How a completion asks to hear a part of its clip again: start and end in seconds
SEGMENT = r"<seg>\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*,\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*</seg>"

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
    # TinyZero's; the task itself is the question of the Countdown format
    "countdown": Template(
        " Show your work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
        "for example <answer> (1 + 2) / 3 </answer>.",
        max_new_tokens=512,
    ),
    # material for tools.generate
    "caption": Template(
        "", max_new_tokens=128, question="Describe in detail everything that can be heard in this audio."
    ),
}


def chat_messages(example: Example, prompt: Template, with_audio: bool = True) -> list[dict]:
    """Messages for a chat template. Options are written as R1-AQA writes them, a Python list."""
    options = ""
    if example.choices:
        options = f" Please choose the answer from the following options: {example.choices}."
    content = prompt.question or example.question + options + prompt.ending
    if with_audio and example.clips:
        clips = [{"type": "audio", "audio": "clip"} for _ in example.clips]  # what to play is placed later
        content = [*clips, {"type": "text", "text": content}]
    messages = [{"role": "user", "content": content}]
    if prompt.system:
        messages.insert(0, {"role": "system", "content": prompt.system})
    return messages


def shuffle_choices(example: Example, rng) -> Example:
    """The same question with its options in another order (`rng`: a random.Random)."""
    order = rng.sample(range(len(example.choices)), len(example.choices))
    answer = None if example.answer is None else order.index(example.answer)
    return dataclasses.replace(example, choices=[example.choices[i] for i in order], answer=answer)


# ------------------------------------------------------------------------------------------------------------
# What every script here needs: texts as they are compared, options, exit codes, interruptions, look-ahead
# threads, files that survive a kill


def normal_words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation."""
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def normal_text(choice: str) -> str:
    """A choice without case and punctuation: "Dog." and "dog" are the same, "C" and "C#" are not."""
    text = unicodedata.normalize("NFKC", choice).casefold()
    return " ".join(re.findall(r"""[^\s.,;:!?"'()\[\]]+""", text)) or text.strip()


def knob(default, help, choices=None, low=0, high=2**31 - 1, above=None, **flag):
    """A field of a dataclass of options: its default, its help, and the range of a number.

    above: a lower limit that is itself excluded. flag: further arguments of argparse's add_argument.
    """
    is_open = above is not None
    low = above if is_open else low
    metadata = dict(help=help, choices=choices, low=low, high=high, open=is_open, flag=flag)
    return field(default=default, metadata=metadata)


def check_knobs(options):
    """Raises UserError for the first knob whose value is not among its choices or not in its range."""
    for f in dataclasses.fields(options):
        value, m = getattr(options, f.name), f.metadata
        if m["choices"] and value not in m["choices"]:
            raise UserError(f"--{f.name} {value}: must be one of {' | '.join(m['choices'])}")
        if type(value) not in (int, float):
            continue
        fits = m["low"] < value <= m["high"] if m["open"] else m["low"] <= value <= m["high"]
        if not fits or not math.isfinite(value):
            limits = f"above {m['low']}" if m["open"] else f"at least {m['low']}"
            if value > m["high"] or m["high"] < 2**31 - 1:
                limits += f" and at most {m['high']}"
            raise UserError(f"--{f.name} {value}: must be {limits}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are a UserError: one line, and not forty lines of usage."""

    def __init__(self, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            formatter_class=raw, argument_default=argparse.SUPPRESS, allow_abbrev=False, **options
        )

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")

    def add_knobs(self, options_class) -> None:
        """One flag for each field of a dataclass of knobs. A flag that is not given is not in the result."""
        for f in dataclasses.fields(options_class):
            text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
            if f.type is bool:
                options = dict(action=argparse.BooleanOptionalAction)
            else:
                options = dict(type=f.type, metavar=f.name.upper())
            self.add_argument(f"--{f.name}", help=text, **options | f.metadata["flag"])


def exit_code(command: Callable[[], int | None], goes_on: str = "the same command goes on") -> int:
    """Run a command.

    -> 0 or what it returns, 2 with one line for what the user can mend, 130 after Ctrl-C
    """
    with contextlib.suppress(AttributeError):  # a stream that cannot be told how to write odd characters
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
        print(f"stopped; {goes_on}", file=sys.stderr)
        return 130


def leave(code: int) -> None:
    """End the process; after Ctrl-C at once, without waiting for threads that wait for a server."""
    if code == 130:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def interruptible(*names: str, note: str = ""):
    """Yields a list. The first signal (SIGINT unless named) goes on it, the second raises KeyboardInterrupt.

    An exception that comes anywhere leaves work half done; a list can be looked at between two pieces of
    work. Outside the main thread signals are left alone.
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
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup: the run outlives its terminal
                before[number] = signal.signal(number, stop)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ahead(
    items, work: Callable, workers: int, depth: int, stopping=(), room: Callable = lambda waiting: True
):
    """Yield (item, work(item) or the DataError it raised) in order; threads work `depth` items in advance.

    Once `stopping` holds something, no further item is begun. room(waiting): may the last of the items
    `waiting` be begun while the others are not yet yielded?
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
    """write(a temporary path), and rename it: after a kill the old file or the new one is there, whole."""
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

    path: the file; it is made if there is none. first_key: the first key of every line. enter(line, where):
    is called with each line there is, and raises UserError if a line is not of this run; nothing has changed
    by then. Raises UserError if another process holds the file, or if the file holds something else.
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
    """Take the file's lock, which ends with the process, kill -9 included. True where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def claimed(folder: str):
    """Lock a folder of results for this process. A kill takes the lock away, too. Raises UserError."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no directories
        yield
        return
    try:
        if not lock(opened):
            remedy = "wait for its end, or give another --out"
            raise UserError(f"{folder}: another process is writing it; {remedy}")
        yield
    finally:
        os.close(opened)


class Lasting:
    """A stream of the terminal that may be closed before the run ends: from then on it swallows all."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def seed_of(*parts) -> int:
    """56 bits that depend on nothing but the parts, whatever process computes them."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


def progress(items, total: int, what: str):
    from tqdm import tqdm

    return tqdm(items, total=total, desc=what, unit="", leave=False, disable=None)  # None: only on a terminal


# ------------------------------------------------------------------------------------------------------------
# Our JSONL, written


def new_file(*outs):
    """Refuse what exists, before any work is done."""
    for out in outs:
        if os.path.lexists(out):
            raise UserError(f"--out {out}: exists; remove it or give another name")
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)


def write_examples(out: str, examples, total: int) -> int:
    """Examples -> our JSONL at `out`, a new file; clips from inside a data set go beside it.    -> lines"""
    new_file(out)
    count = 0

    def plain(value):
        return None if isinstance(value, Embedded) else str(value)  # a clip in `meta` is left out

    def write(part):
        nonlocal count
        with open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
            for example in progress(examples, total, "lines"):
                row = own_row(example, os.path.abspath(out), count)
                f.write(json.dumps(row, ensure_ascii=False, default=plain) + "\n")
                count += 1

    write_atomically(out, write)
    return count


def own_row(example, out, n):
    """Line n of our JSONL at `out`.

    Clips in its folder get a relative path, so that both can be moved together.
    """
    paths, names, meta = [], [], example.meta
    folder = os.path.join(os.path.dirname(out), "")
    for k, clip in enumerate(example.clips):
        if isinstance(clip, Embedded):
            names.append(clip.path)
            clip = clip.read()
        if isinstance(clip, bytes):
            name = re.sub(r"[^\w.-]", "_", example.id)[:80]
            clip = write_clip(f"{os.path.splitext(out)[0]}_audio/{n:07d}_{name}_{k}", clip)
        paths.append(os.path.abspath(clip).removeprefix(folder))
    if any(names):  # what the clips were called inside the data set
        meta = dict(audio_path=names if names[1:] else names[0]) | meta
    if not isinstance(example.audio, list):
        paths = paths[0] if paths else None
    return vars(example) | dict(audio=paths, meta=meta)


def write_clip(path: str, content: bytes) -> str:
    """Write a sound to `path` plus the ending of what it is, whatever it was called.   -> where it is now"""
    kinds = {
        b"RIFF": ".wav",
        b"fLaC": ".flac",
        b"OggS": ".ogg",
        b"ID3": ".mp3",
        b"\xff": ".mp3",
        b"FORM": ".aiff",
    }
    path += next((ending for magic, ending in kinds.items() if content.startswith(magic)), ".wav")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
    return path


# ------------------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str] | None = None) -> int:
    from tools.files import run_command

    return exit_code(lambda: run_command(argv))


if __name__ == "__main__":
    sys.modules["data"] = sys.modules["__main__"]  # the tools that import this script get this one
    leave(main())
