"""Readers: rows of every format, with the oddities of real files, become the right Examples, or are refused.

All rows are made up. OMNI_SLOW=1 reads a million lines, not 50,000; OMNI_FUZZ=N mutates N lines, not 5,000.
"""

import gzip
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest
import soundfile

import data
from data import DataError, Example, Examples
from test_data import BOM, ROOT, cells, lines

SLOW = bool(os.environ.get("OMNI_SLOW"))


@pytest.fixture
def read(tmp_path):
    """Content, rows or one row -> Examples of a file whose name tells nothing."""

    def read(content, name="file", audio_dir=""):
        if isinstance(content, dict):
            content = [content]
        if isinstance(content, list):
            content = lines(*content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Examples(str(tmp_path / name), audio_dir)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """Content or rows -> the first message when they are read in order, without the folder. Never long."""

    def refusal(content) -> str:
        with pytest.raises(DataError) as e:
            list(read(content))
        assert len(str(e.value)) < 3000 and str(e.value).encode()
        return str(e.value).removeprefix(f"{tmp_path}/")

    return refusal


# ---- every format, field by field: formats.jsonl holds rows, and the Example that they become

with open(os.path.join(ROOT, "tests", "formats.jsonl"), encoding="utf-8") as f:
    CASES = [json.loads(line) for line in f]
FIRST = {}
for case in CASES:
    FIRST.setdefault(case["format"], case["rows"])
MC = dict(question="Which?", choices=["a, b", 'the "bell"', "c"], answer="c")
R1, MMAU, HUB, PRO, AIR, MMSU, MUSIC, PROCESSED = (
    FIRST[name][0]
    for name in (
        "R1-AQA",
        "MMAU",
        "MMAU (Hub)",
        "MMAU-Pro",
        "AIR-Bench",
        "MMSU",
        "MUSIC-AVQA",
        "avqa-processed",
    )
)
CLOTHO = FIRST["Clotho-AQA"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if "example" in case], ids=lambda case: case["format"]
)
def test_every_field_is_read_or_kept(read, tmp_path, case):
    examples, fields = read(case["rows"]), dict(case["example"])
    if isinstance(fields.get("audio"), list):
        fields["audio"] = [os.path.join(tmp_path, clip) for clip in fields["audio"]]
    elif "audio" in fields:
        fields["audio"] = os.path.join(tmp_path, fields["audio"])
    assert list(examples) == [Example(**fields)] and type(examples[0].answer) in (int, type(None))
    assert examples.format == case["format"] and examples.where(0) == f"{tmp_path}/file:1"
    assert str(examples).startswith(f"{tmp_path}/file: {case['format']} format") and not examples.skipped
    assert examples.items == [tuple(range(len(case["rows"])))] and examples.rows_of(0) == case["rows"]


def test_every_format_has_a_case():
    assert FIRST.keys() == data.FORMATS.keys() - {"Hub"}  # which lives in parquet only


@pytest.mark.parametrize("name", FIRST)
def test_the_container_and_the_name_do_not_matter(read, name):
    """Nor the order of the columns, nor what else a row holds: it is kept."""
    plain = [vars(e) | {"id": ""} for e in read(FIRST[name])]
    for content in (json.dumps(FIRST[name]), json.dumps(FIRST[name], indent=2, ensure_ascii=False)):
        examples = read(content, name="mmau-test-mini.csv")
        assert examples.format == name and [vars(e) | {"id": ""} for e in examples] == plain
    examples = read([dict(reversed(row.items()), comment={"x": [None, 1]}) for row in FIRST[name]])
    assert examples.format == name and examples[0].meta["comment"] == {"x": [None, 1]}
    assert [(e.question, e.answer, e.target) for e in examples] == [
        (e["question"], e["answer"], e["target"]) for e in plain
    ]


# ---- letters before choices, gold as letter or text

# choices | answer | the choices that are read (=: these) | the index that is read, or "refused"
LETTERED = r"""
["dog", "cat"] | "cat" | = | 1
["dog", "cat"] | "B" | = | 1
["dog", "cat"] | "(B)" | = | 1
["dog", "cat"] | "B." | = | 1
["dog", "cat"] | " b" | = | 1
["dog", "cat"] | "C" | = | refused
["dog", "cat"] | "" | = | None
["dog", "cat"] | null | = | None
["dog", "cat"] | 1 | = | 1
["dog", "cat"] | "Cat." | = | 1
["dog", "Dog", "cat"] | "DOG" | = | refused
["dog", "cat"] | "B. cat" | = | 1
["dog", "cat"] | "B. dog" | = | refused
["dog", "cat"] | "a cat" | = | refused
["dog", "cat"] | true | = | refused
["dog", "cat"] | 2 | = | refused
["dog", "cat"] | -1 | = | refused
["(A) dog", "(B) cat"] | "(B) cat" | ["dog", "cat"] | 1
["(A) dog", "(B) cat"] | "cat" | ["dog", "cat"] | 1
["(A) dog", "(B) cat"] | "B" | ["dog", "cat"] | 1
["(A) dog", "(B) cat"] | "(A)" | ["dog", "cat"] | 0
["(A) dog", "(B) cat"] | "" | ["dog", "cat"] | None
["A. dog", "B. cat"] | "B. cat" | ["dog", "cat"] | 1
["A: dog", "B: cat"] | "B" | ["dog", "cat"] | 1
["A) dog", "B) cat"] | "B) cat" | ["dog", "cat"] | 1
["(A)dog", "(B)cat"] | "(B)cat" | ["dog", "cat"] | 1
["(A) x", "(B) y", "(C) z", "(D) x1", "(E) y1", "(F) z1"] | "F" | ["x", "y", "z", "x1", "y1", "z1"] | 5
["A minor", "B flat"] | "B flat" | = | 1
["A dog", "B flat", "a"] | "a" | = | 2
["C", "A", "G"] | "A" | = | 1
["a", "b"] | "a" | = | 0
["B", "A"] | "B" | = | 0
["B", "A"] | "C" | = | refused
["A.D.", "B.C."] | "B.C." | = | 1
["A", "B flat", "(C) sharp"] | "B flat" | = | 1
["A.", "B."] | "B." | = | 1
["(B) dog", "(A) cat"] | "(A) cat" | ["dog", "cat"] | 1
["(B) dog", "(A) cat"] | "B" | ["dog", "cat"] | 0
["(B) dog", "(C) cat"] | "(C) cat" | = | 1
["(a) dog", "(b) cat"] | "b" | ["dog", "cat"] | 1
["a) dog", "b) cat"] | "A" | ["dog", "cat"] | 0
["1. dog", "2. cat"] | "2" | ["dog", "cat"] | 1
["0. dog", "1. cat"] | "1" | ["dog", "cat"] | 1
["1. dog", "2. cat"] | 1 | = | refused
["A、dog", "B、cat"] | "B" | ["dog", "cat"] | 1
["A.狗", "B.猫"] | "B" | ["狗", "猫"] | 1
["[A] dog", "[B] cat"] | "B" | ["dog", "cat"] | 1
["Option A: dog", "Option B: cat"] | "Option B" | ["dog", "cat"] | 1
["A.dog", "B.cat"] | "B.cat" | ["dog", "cat"] | 1
["A - dog", "B - cat"] | "cat" | ["dog", "cat"] | 1
["i. dog", "ii. cat"] | "ii" | ["dog", "cat"] | 1
["1. Satz", "2. Satz"] | "2. Satz" | = | 1
["1.5 s", "2.5 s"] | "2.5 s" | = | 1
["1:30", "2:30"] | "2:30" | = | 1
["A: ", "B: cat"] | "B" | = | refused
["A. dog", "B. cat", "C. ", "D."] | "B" | ["dog", "cat"] | 1
["A. dog", "B. cat", "", null] | "B" | ["dog", "cat"] | 1
["A. dog", null, "C. cat"] | "C" | ["dog", "cat"] | 1
["dog", "cat", "", " "] | "cat" | ["dog", "cat"] | 1
["", "dog", "cat"] | 2 | ["dog", "cat"] | 1
["dog", "nan", "cat"] | "cat" | ["dog", "cat"] | 1
["dog", NaN, "cat"] | 2 | ["dog", "cat"] | 1
["bap", "nan"] | "nan" | = | 1
"['dog', \"cat's\"]" | "cat's" | ["dog", "cat's"] | 1
{"B": "dog", "A": "cat"} | "B" | ["dog", "cat"] | 0
{"A": "dog", "B": "cat"} | "cat" | ["dog", "cat"] | 1
["(A) dog", "cat"] | "cat" | = | 1
["(A) x", "(A) y"] | "(A) y" | = | 1
["(A) A", "(B) a"] | "(B) a" | ["A", "a"] | 1
["(A) (B) x", "(B) y"] | "(B) y" | ["(B) x", "y"] | 1
["A. C", "B. G", "C. A"] | "A" | ["C", "G", "A"] | 0
["dog", null, "cat", null] | 2 | ["dog", "cat"] | 1
["dog", null, "cat"] | 1 | = | refused
["dog", null] | "dog" | = | refused
["x", "x", "y"] | "y" | = | 2
["x", "y", "x"] | "x" | = | 0
["(A) x", "(B) x"] | "(B) x" | ["x", "x"] | 1
["a, b", "['c', 'd']"] | "['c', 'd']" | = | 1
"[\"a\", \"b\"]" | "b" | ["a", "b"] | 1
"[1, 2]" | 1 | = | refused
"dog" | "dog" | = | refused
"[\"a\", \"b\"" | "a" | = | refused
null | null | = | refused
["dog"] | "dog" | = | refused
[["dog"], ["cat"]] | 0 | = | refused
["dog", " "] | "dog" | = | refused
"""


@pytest.mark.parametrize("choices, answer, wanted, index", cells(LETTERED))
def test_letters(read, refusal, choices, answer, wanted, index):
    """Nulls go; letters that are what a choice says stay; where choices carry letters, an answer is one."""
    choices = json.loads(choices)
    row = dict(audio_path="a.wav", question="?", choices=choices, answer=json.loads(answer))
    if index == "refused":
        assert refusal([MC | {"audio_path": "b.wav"}, row]).startswith('file:2: field "')
    else:
        (example,) = read(row)
        assert example.choices == (choices if wanted == "=" else json.loads(wanted))
        assert str(example.answer) == index


# ---- versions, skipped rows, majorities, drawn choices


def mmau_rows(hub, n=1000, meld=0, lost=0, **changes) -> list[dict]:
    """n rows, some of them of the data set MELD, some with an answer that is no choice"""
    rows = []
    for i in range(n):
        more = dict(id=str(i), dataset="meld" if i < meld else "own")
        row = dict(choices=["x", "y"], answer="?" if i < lost else "x") | changes
        if hub:
            rows.append(row | dict(context="x.wav", instruction="?", other_attributes=json.dumps(more)))
        else:
            rows.append(row | more | dict(audio_id="x.wav", question="?"))
    return rows


VERSIONS = [
    (dict(meld=70), "v05.15.25"),
    (dict(meld=43), "original"),
    (dict(meld=44), "unknown version"),
    (dict(n=999, meld=70), "unknown version"),
    (dict(answer=""), "answers withheld"),
    (dict(n=3, answer=None), "answers withheld"),
    (dict(meld=70, lost=20), "v05.15.25"),
]


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("options, version", VERSIONS)
def test_mmau_says_which_version_it_is(read, options, version, hub):
    examples = read(json.dumps(mmau_rows(hub, **options)))
    assert examples.version == version and f" format {version}, " in str(examples)


def test_broken_files_and_lines_of_mmau(read, refusal):
    """Those of 15 and 16 May 2025: 146 or 147 answers are not among their choices."""
    for hub in (False, True):
        message = refusal(json.dumps(mmau_rows(hub, meld=70, lost=146)))
        assert message.startswith("file: 146 answers are not among their choices") and "May 2025" in message
    assert refusal(mmau_rows(False, 30, lost=1)).startswith(
        "file:1: field \"answer\": '?' is not among the choices"
    )
    bad = HUB | {"other_attributes": "{"}  # named when it is read
    assert read([*mmau_rows(True, meld=43), bad]).version == "unknown version"
    for line in (b"{", b"null", b'{"id": 1}'):
        assert refusal(lines(MMAU, line, MMAU)).startswith("file:2: ")


def test_mmau_pro_is_read_where_it_is_multiple_choice(read, tmp_path):
    lettered = dict(choices='["(A) x", "(B) y"]', answer="(B) y", audio_path=["c.wav"] * 3)
    changes = [
        dict(category="open", choices=[]),
        {},
        dict(category="open"),
        dict(category="instruction following"),
    ]
    changes += [dict(choices=None), dict(answer="none of it"), lettered, dict(answer="B")]
    examples = read([PRO | change for change in changes])
    assert [(e.answer, len(e.clips)) for e in examples] == [(1, 2), (1, 3), (1, 2)]
    assert examples.items == [(1,), (6,), (7,)] and examples.where(1) == f"{tmp_path}/file:7"
    assert examples.rows_of(1) == [PRO | lettered]
    assert str(examples).endswith(
        "MMAU-Pro format, 3 examples; 4 skipped: not multiple choice (open answer or instruction "
        "following); 1 skipped: the answer is not among the choices"
    )


def test_nothing_but_skipped_rows(refusal):
    for row in (PRO | dict(choices=[]), MUSIC | dict(question_deleted=1), CLOTHO[:2]):
        assert "no question that can be used: {" in refusal(row) and ": 1}" in refusal(row)


def test_music_avqa(read):
    """What can be heard; slots are filled in order; choices are answers to questions of the same type."""
    counts = ["two", "one", "three", "four", "five"]
    rows = [MUSIC, *(MUSIC | dict(anser=count, templ_values="[]") for count in counts[1:])]
    rows += [MUSIC | dict(type='["Audio", "Comparative"]', anser=answer) for answer in ("yes", "no")]
    rows += [
        MUSIC | dict(type=f'["{needs}", "Counting"]', anser="nine") for needs in ("Visual", "Audio-Visual")
    ]
    examples = read([*rows, MUSIC | dict(question_deleted=1, anser="ten")])
    assert [e.question for e in examples][:2] == ["Is left tuba <FL>?", "Is <LR> <Object> <FL>?"]
    assert examples[0].id == "5" and examples[0].audio.endswith("/00000031")
    assert examples[0].meta["type"] == MUSIC["type"]
    for e, row in zip(examples, rows[:7], strict=True):
        kin = counts if "Count" in row["type"] else ["yes", "no"]
        assert e.choices[e.answer] == row["anser"] and set(e.choices) <= set(kin)
        assert len(set(e.choices)) == len(e.choices) == min(4, len(kin))
    reasons = ["cannot be heard: Visual", "cannot be heard: Audio-Visual", "deleted by its authors"]
    assert examples.skipped == dict.fromkeys(reasons, 1)
    assert [e.choices for e in read([*rows])] == [e.choices for e in examples]


def test_clotho_aqa_takes_the_majority(read, tmp_path):
    """Of three annotators, whose lines need not follow each other; yes/no has two choices, others four."""
    answers = dict(q1=["dog", "cat", " Dog"], q2=["yes", "no", "No"], q3=["rain", "wind", "sea"])
    answers |= dict(q4=["wind"] * 3, q5=["sea"] * 2 + ["no"], q6=["bird"] * 3)
    rows = [f"{q[1:]}.wav,{q},{a[k]},maybe{k}\n" for k in range(3) for q, a in answers.items()]
    examples = read("file_name,QuestionText,answer,confidence\n" + "".join(rows))
    assert examples.format == "Clotho-AQA" and examples.skipped == {"the annotators disagree": 1}
    wanted = [("q1", "dog"), ("q2", "no"), ("q4", "wind"), ("q5", "sea"), ("q6", "bird")]
    assert [(e.question, e.choices[e.answer]) for e in examples] == wanted
    assert {*examples[1].choices} == {"yes", "no"} and examples.where(2) == f"{tmp_path}/file:5"
    for i in (0, 2, 3, 4):
        choices = examples[i].choices
        assert len(set(choices)) == 4 and set(choices) <= {"dog", "wind", "sea", "bird"}
    assert examples.items[0] == (0, 6, 12) and examples[0].meta["agreement"] == 2 / 3


def test_drawn_choices(read):
    """The answer is one of them, none stands twice, its family comes first; a label stands everywhere."""
    names = ["dog bark", "dog howl", "dog growl", "cat purr", "cat meow", "rain", "wind"]
    rows = [dict(wav=f"{i}.wav", label=names[i % 7], family=names[i % 7].split()[0]) for i in range(700)]
    examples = read(rows)
    for e, row in zip(examples, rows):
        assert e.choices[e.answer] == row["label"] and len(set(e.choices)) == len(e.choices) == 4
        assert {name for name in names if name.startswith(row["family"])} <= set(e.choices)
    at = Counter(e.answer for e in examples)
    assert min(at[i] for i in range(4)) > 700 / 4 - 5 * math.sqrt(700 * 3 / 16)
    assert len({tuple(sorted(e.choices)) for e in examples if e.meta["label"] == "rain"}) > 5
    assert [e.choices for e in examples] == [e.choices for e in read(rows)]
    assert all(sorted(e.choices) == ["dog bark", "dog howl"] for e in read(rows[:2]))


def test_several_labels_of_a_clip(read):
    """They are one question, whose distractors are none of them; each can be a distractor elsewhere."""
    rows = [dict(file="a.wav", label="dog", id=1), dict(file="b.wav", label="cat")]
    rows += [dict(file="a.wav", label="bark", id=2)]
    examples = read([*rows, *(dict(file=f"{i}.wav", label="rain") for i in range(50))])
    assert len(examples) == 52 and set(examples[0].choices) == {"dog", "cat", "rain"}
    assert examples[0].id == "1" and examples[0].meta == dict(label=["dog", "bark"], rows=[rows[2]])
    assert any("bark" in e.choices for e in examples)


@pytest.mark.parametrize("name", FIRST)
def test_only_some_formats_may_be_without_sound(read, name):
    """A null path is refused by line; no clips are merged under the name None."""
    keys = "audio audio_path video_name audio_id context path video_id file_name ytid file audios".split()
    rows = [row | {k: None for k in keys if k in row} for row in FIRST[name]]
    if name in ("own", "ARC", "Countdown"):
        assert read(rows)[0].audio is None
        return
    with pytest.raises(DataError, match=r'file:\d: field "'):
        examples = read([*FIRST[name], *rows])
        pytest.fail(f"{examples[-1]}")


def test_a_blank_label_spoils_only_its_own_line(refusal):
    rows = [dict(file=f"{i}.wav", label=name) for i, name in enumerate(["dog", " ", "cat"])]
    assert refusal(rows).startswith("file:2: ")
    rows = [MUSIC, MUSIC | dict(anser=""), MUSIC | dict(anser="one")]
    assert refusal(rows).startswith("file:2: ")
    assert refusal([rows[0] | dict(anser="\ud800"), *rows[2:]]).startswith("file:1: ")


# ---- refusals: a good first row, then one that is not; the message names its line and field

BAD = r"""
R1-AQA | {"answer": 1} | field "answer": it points at a blank choice
R1-AQA | {"answer": 4} | field "answer": 4
R1-AQA | {"answer": -1} | field "answer": -1
R1-AQA | {"answer": "2"} | field "answer"
R1-AQA | {"multi_choice": {}} | field "multi_choice": missing
R1-AQA | {"multi_choice": null} | field "
R1-AQA | {"multi_choice": [null, "dog"], "answer": 1} | field "multi_choice": only one
R1-AQA | {"question_text": ["?"]} | field "question_text"
R1-AQA | {"audio_path": 5} | field "audio_path"
R1-AQA | {"audio_path": ""} | field "audio_path": an empty path
AVQA | {"video_name": 5} | field "video_name"
AVQA | {"answer": true} | field "answer"
AudioMCQ | {"question": null} | field "question": expected a text, found None
AudioMCQ | {"audio_path": []} | field "audio_path"
AudioMCQ | {"audio_path": {}} | field "audio_path"
avqa-processed | {"question": "no choices"} | field "
avqa-processed | {"answer": "D"} | field "answer"
avqa-processed | {"question": 5} | field "question"
MMAU | {"audio_id": null} | field "audio_id"
MMAU | {"question": 5} | field "question"
MMAU | {"choices": 5} | field "choices"
MMAU (Hub) | {"other_attributes": "{"} | field "other_attributes": broken JSON
MMAU (Hub) | {"other_attributes": "[1]"} | field "other_attributes"
MMAU (Hub) | {"other_attributes": 5} | field "other_attributes"
MMAU (Hub) | {"answer": "(D) x"} | field "answer"
MMAU (Hub) | {"instruction": null} | field "instruction"
MMAU-Pro | {"audio_path": []} | field "audio_path"
MMAU-Pro | {"audio_path": [null]} | field "audio_path"
MMAU-Pro | {"choices": 5} | field "choices"
MMAR | {"answer": "none"} | field "answer"
MMAR | {"choices": []} | field "choices"
AIR-Bench | {"path": null} | field "path": expected a text
AIR-Bench | {"choice_b": [5]} | field "choices"
AIR-Bench | {"answer_gt": "x"} | field "answer_gt"
MMSU | {"choice_b": null} | field "
MMSU | {"audio_path": 5} | field "audio
MMSU | {"answer_gt": "C"} | field "answer_gt"
ARC | {"answerKey": "D"} | field "answerKey": 'D' is not among
ARC | {"choices": ["x", "y"]} | field "choices"
ARC | {"choices": {"text": ["x"], "label": ["C"]}} | field "
ARC | {"question": 5} | field "question"
ARC | {"choices": {"text": ["x", "y"]}} | field "choices"
Countdown | {"nums": []} | field "nums"
Countdown | {"nums": "1"} | field "nums"
Countdown | {"nums": [1, true]} | field "nums"
Countdown | {"target": 1.5} | field "nums"
conversation | {"audios": []} | field "audios": 0 clips, and the question has 1 places for them
conversation | {"audios": ["a.wav", "b.wav"]} | field "audios": 2 clips, and the question has 1 places
conversation | {"messages": [{"role": "user", "content": "<audio>What?"}], "solution": "dog"} | field "choices": missing
conversation | {"messages": []} | field "messages"
conversation | {"messages": "hello"} | field "messages"
conversation | {"messages": [{"role": "user", "content": "<audio>\nWhat barks?"}]} | field "messages"
conversation | {"query": "?"} | field "query"
MUSIC-AVQA | {"templ_values": "["} | field "templ_values": broken JSON
MUSIC-AVQA | {"type": "[]"} | field "type"
MUSIC-AVQA | {"type": "[\"Audio\", [\"x\"]]"} | field "type"
MUSIC-AVQA | {"type": null} | field "type"
MUSIC-AVQA | {"anser": 5} | field "anser"
MUSIC-AVQA | {"question_content": 5} | field "question_content"
MUSIC-AVQA | {"video_id": null} | field "video_id"
Clotho-AQA | {"answer": 5, "QuestionText": "?"} | field "answer"
Clotho-AQA | {"file_name": ["a"]} | field "file_name"
captions | {"caption": 5, "ytid": "x"} | field "captions"
captions | {"caption": "", "ytid": "x"} | field "captions"
captions | {"ytid": ["a"]} | field "ytid"
captions | {"ytid": ["a"], "start_s": null} | field "ytid"
captions | {"start_s": Infinity} | expected the second at which the clip starts, found inf
captions | {"start_s": "soon"} | expected the second at which the clip starts
captions | {"start_s": [1]} | expected the second at which the clip starts
labels | {"label": 5.5} | field "label"
labels | {"label": ["dog", null]} | field "label"
labels | {"label": "[1"} | field "label": broken JSON
labels | {"label": " "} | field "label": is blank
labels | {"label": "/m/01"} | field "label": /m/01 is an id of AudioSet
labels | {"label": null} | field "label"
labels | {"file": 5} | field "file"
"""


@pytest.mark.parametrize("name, change, message", cells(BAD))
def test_bad_values(refusal, name, change, message):
    rows = [*FIRST[name], FIRST[name][0] | json.loads(change)]
    assert refusal(rows).startswith(f"file:{len(rows)}: {message}")


@pytest.mark.parametrize("name", FIRST)
def test_lost_columns_and_rows_that_are_no_objects(read, refusal, name):
    """A later row without a column of its format is refused by line, but the answer may be withheld."""
    known, rows = data.FORMATS[name], FIRST[name]
    for key in rows[0].keys() & set(known.keys.replace("|", " ").split()) - {known.fields.get("answer")}:
        lost = {k: v for k, v in rows[0].items() if k != key}
        assert refusal([*rows, lost]).startswith(f'file:{len(rows) + 1}: field "'), key
    for value in (5, None, "text", [1], []):
        message = refusal([*rows, json.dumps(value).encode()])
        assert message.startswith(f"file:{len(rows) + 1}: expected a JSON object, found {value!r}")


def test_a_fault_of_ours_is_not_blamed_on_the_file(read, monkeypatch):
    """A typo in a converter surfaces as what it is; a DataError of a converter gets its line."""

    def convert(rows):
        if rows[0]["options"] == "bad":
            raise DataError('field "options": bad')
        return rows[0]["optoins"]

    def skip(rows):
        return rows.strip()

    rows = [dict(sound="a.wav", options=options) for options in ("good", "bad")]
    monkeypatch.setitem(data.FORMATS, "quiz", data.Format("sound options", dict(audio="sound"), convert))
    with pytest.raises(KeyError, match="optoins"):
        read(rows)[0]
    with pytest.raises(DataError, match='file:2: field "options": bad'):
        read(rows)[1]
    monkeypatch.setitem(data.FORMATS, "quiz", data.Format("sound options", skip=skip))
    with pytest.raises(AttributeError):
        read(rows)


@pytest.mark.parametrize("row", [{}, {"audio": "a.wav"}, {"choices": [], "answer": 1}, {"nums": [1]}])
def test_unknown_rows_are_told_the_known_keys(refusal, row):
    message = refusal(row)
    assert message.startswith(f"file:1: unknown format, keys {sorted(row)}")
    assert all(f"{name}: {known.keys}" in message for name, known in data.FORMATS.items())


# ---- tables

TABLE = 'file_name,caption,n\r\n"a, b.wav","It\'s ""loud"",\r\nsaid the 犬",1\r\n'
TABLE += "b.wav,rain,2\r\n\r\nc.wav, wind ,\r\n"
TABLE_READ = [
    ("a, b.wav", 'It\'s "loud",\r\nsaid the 犬', "1"),
    ("b.wav", "rain", "2"),
    ("c.wav", "wind", ""),
]
QUOTED = TABLE.replace("file_name,caption,n", '"file_name","caption","n"').encode()


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode(),
        BOM + TABLE.encode(),
        TABLE[:-2].encode(),
        b"\n\r\n" + TABLE.encode(),
        b" \n" + TABLE.encode(),
        TABLE.replace("file_name,caption,n", "file_name , caption,n ").encode(),
        (TABLE + ",,\r\n\r\n").encode(),
        QUOTED,
        BOM + QUOTED,
    ],
    ids="plain BOM cut blank space spaces tail quoted BOM-quoted".split(),
)
def test_csv(read, tmp_path, content):
    examples = read(content)
    assert examples.format == "captions" and [e.id for e in examples] == [name for name, _, _ in TABLE_READ]
    for e, (name, caption, n) in zip(examples, TABLE_READ, strict=True):
        assert (e.audio, e.target, e.meta) == (str(tmp_path / name), [caption], dict(n=n, captions=[caption]))


@pytest.mark.parametrize("delimiter", ";\t")
def test_csv_with_other_delimiters(read, tmp_path, delimiter):
    examples = read('file;label;x\na.wav;dog, big;\nb.wav;"cat;\nsmall";y\n'.replace(";", delimiter))
    assert [e.choices[e.answer] for e in examples] == ["dog, big", " ".join(f"cat{delimiter}\nsmall".split())]
    assert examples[1].meta == dict(label=f"cat{delimiter}\nsmall", x="y")
    assert examples[0].audio == str(tmp_path / "a.wav")


def test_vggsound(read, tmp_path):
    """Its CSV has no header, neither has its older test.csv; starts become part of the name."""
    content = '-x_y,30,"people eating, chewing",train\r\n__z,0,dog  barking,test\r\n"q",110,rain,train\r\n'
    examples, labels = read(content), ["people eating, chewing", "dog barking", "rain"]
    assert [os.path.basename(e.audio) for e in examples] == ["-x_y_000030", "__z_000000", "q_000110"]
    assert [e.choices[e.answer] for e in examples] == labels and set(examples[0].choices) == set(labels)
    assert examples[0].meta == dict(youtube_id="-x_y", start_s="30", label=labels[0], split="train")
    assert examples[2].id == "q_000110" and examples[0].question == "Which sound is heard in this clip?"
    for split in ("validation", "val"):
        assert len(read(f"ab,30,dog,{split}\ncd,30,cat,{split}\n")) == 2
    examples = read(BOM + b'-x_y_000030.mp4,"dog, big"\n__z_000000.mp4,cat\n')
    assert (
        examples[0].audio == str(tmp_path / "-x_y_000030.mp4")
        and examples[1].choices[examples[1].answer] == "cat"
    )


BAD_TABLES = [
    ("file,label\n", "file: holds no question"),
    ("file,label", "file: holds no question"),
    (",,\n,\n", "file: holds no question"),
    ("file,label\na.wav,dog\nb.wav\n", "file:3: 1 fields, expected the 2 columns"),
    ("file,label\na.wav,dog\nb.wav,cat,\n", "file:3: 3 fields, expected the 2 columns ['file', 'label']"),
    ("file,label\na.wav,dog\nb.wav,bad dog, good cat\n", "file:3: 3 fields"),
    ('file,label\na.wav,dog\nb.wav,"cat\nc.wav,rain\nd.wav,wind\n', "file:5: not a CSV record"),
    ('file,label\na.wav,dog\nb.wav,"cat', "file:3: not a CSV record"),
    ('file,label\na.wav,"d\n' + "x" * 200_000, "file:3: not a CSV record"),
    ('file,caption\na.wav,"dog" x\n', "file:2: not a CSV record"),
    ("a,b\n1,2\n", "file:2: unknown format, keys ['a', 'b']"),
    ("file,label\na.wav,d\xf6g\n".encode("latin-1"), "file:2: not UTF-8"),
    ("file,label,label\na.wav,dog,1\nb.wav,cat,2\n", "file:1: two columns are called 'label'"),
    (gzip.compress(lines(MMAU), mtime=0)[:-9], "file: could not be unpacked"),
    ("file,label\na.wav,dog\n".encode("utf-16"), "file: is UTF-16 text; save it as UTF-8"),
    ("PAR1,label\n", "file: could not be loaded"),
]


@pytest.mark.parametrize("content, message", BAD_TABLES, ids=lambda x: f"{x!r:.25}")
def test_bad_csv(refusal, content, message):
    found = refusal(content)
    assert found.startswith(message) and ("CSV" not in found or "is a quote left open?" in found)


HEADERS = [
    "File_Name,Label",
    "fname,Labels",
    "slice_file_name,fold,classID,class",
    "AUDIO,Caption",
    "# YTID,start_seconds,end_seconds,label",
    "FileName,CLASS",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_are_known_whatever_their_case(read, header):
    middle = ",7" * (header.count(",") - 1)
    examples = read(f"{header}\na.wav{middle},dog\nb.wav{middle},cat\n")
    assert examples[0].meta.get("captions", examples[0].choices) in (["dog"], ["dog", "cat"], ["cat", "dog"])
    assert os.path.basename(examples[0].audio) == ("a.wav_000007" if "YTID" in header else "a.wav")
    assert len(examples[0].meta) == header.count(",") + ("YTID" in header)  # all but the clip


def test_columns_without_a_name_and_old_line_ends(read, tmp_path):
    (e,) = read(",file,caption,\n5,a.wav,rain,6\n")
    assert e.meta == {"column 1": "5", "column 4": "6", "captions": ["rain"]}
    examples = read("file,caption\ra.wav,x\rb.wav,y\r")
    assert [e.target for e in examples] == [["x"], ["y"]] and examples.where(1) == f"{tmp_path}/file:3"


def test_lines_of_a_csv_are_those_of_an_editor(read, tmp_path):
    """A record that spans lines 2 to 4 does not shift those after it."""
    examples = read('file,caption\na.wav,"1\n2\n3"\n\nb.wav,x\nc.wav,y\n')
    assert [examples.where(i) for i in (1, 2)] == [f"{tmp_path}/file:6", f"{tmp_path}/file:7"]


@pytest.mark.parametrize(
    "content, name",
    [
        ('{"file": "a;b,c", "captions": ["x"]}', "captions"),
        ('[{"file": "a;b,c", "captions": ["x"]}]', "captions"),
        ('  \n\t[\n\n {"file": "a", "captions": ["x"]}]', "captions"),
        ("caption;file\nx, y, z;a", "captions"),
        ('"caption","file"\n"{""x"": 1}","[a]"', "captions"),
        ("caption\tfile\n{x},a\tb", "captions"),
        ("[x],file,caption\n1,2,3", "broken JSON"),
        ("caption\nx\n", "broken JSON"),
    ],
)
def test_lists_lines_and_tables_are_told_apart(read, content, name):
    try:
        assert list(examples := read(content)) and examples.format == name
    except DataError as e:
        assert name in str(e)


def test_wide_tables_of_captions_and_labels(read, tmp_path):
    """Clotho: five columns; AudioCaps: a line a caption; ESC-50: a class column among others."""
    (e,) = read("file_name,caption_1,caption_2,caption_3\nx y.wav,One.,Two.,\n")
    assert (e.audio, e.target, e.meta) == (
        str(tmp_path / "x y.wav"),
        ["One.", "Two."],
        {"captions": e.target},
    )
    examples = read("audiocap_id,youtube_id,start_time,caption\n1,ab,20,One\n2,ab,30,Two\n3,ab,20,Three\n")
    assert [os.path.basename(e.audio) for e in examples] == ["ab_000020", "ab_000030"]
    assert [e.target for e in examples] == [["One", "Three"], ["Two"]]
    assert examples[0].meta["audiocap_id"] == "1" and examples[0].meta["rows"][0]["audiocap_id"] == "3"
    examples = read("filename,fold,target,category,take\n1-x-A-0.wav,1,0,dog,A\n1-y-A-1.wav,1,1,cat,A\n")
    assert [e.choices[e.answer] for e in examples] == ["dog", "cat"] and examples[0].meta["fold"] == "1"


# ---- where the clips lie

# what the data set says | the files there are, the first of which it is. YT is an id
FOUND = """
a.wav | a.wav x/a.wav
YT_000030 | YT_30.wav
YT_30 | YT_000030.flac
YT_000030.mp4 | YT_30.mp3
YT_000030.wav | YT_000030.FLAC
YT_000000 | YT_0.wav
clips/YT_30.wav | clips/YT_000030.wav
./test-audios/a.wav | test-audios/a.wav
/old/disk/YT_000030.wav | train/YT_30.flac
./test-audios/3c4d9a9e-1f | test-audios/3c4d9a9e-1f.wav
./test-audios/0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9.wav | 0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9.wav
a.wav | x/a.wav
clips/a.wav | a.flac
Audio_Grounding_Own/g.wav | Audio_Grounding_Own/g.flac Speech_Own/g.flac
YT_000005 | x/YT_5.ogg
d/a.wav | x/d/a.wav
a.wav | a.flac x/a.mp3
A.mp4 | A.wav A.mp4
x/YT_000030 | y/YT_30.wav y/YT_300.wav
"""
# another clip that is called like it; or none, or not the only one: it is left as it is, for the message
NOT_FOUND = """
avqa/0001.wav | clothoaqa/0001.wav
clotho/1001.wav | fsd/1001.wav fsd/1002.wav
clotho/1001.wav | 1001.wav
take_001.wav | take_1.wav
take_000001.wav | take_1.wav
a/take_0012.wav | b/take_0012.flac
music/train/1.wav | train/1.wav
a/session_a01_5.wav | b/session_a01_5.wav
session_a01_0005.wav | session_a01_5.wav
YT_000030 | YT_300.wav YT_3.wav YT_000030.txt xYT_30.wav
YT_30 | -HG3OMG_89C_30.wav
YT_000000 | YT_.wav
YT_000030 | YT_30.wav YT_000030.mp3
YT_000030 | x/YT_30.wav y/YT_30.wav
a.mp4 | a.wav a.flac
a.wav | x/a.wav y/a.wav
a.wav | x/a.mp3 y/a.flac
a | x/y/a.wav
a.wav | a.wav/b.wav
.. | a.wav
"""
YT = "-HG3Omg_89c"
PLACES = [(name, files.split(), 0) for name, files in cells(FOUND.replace("YT", YT))]
PLACES += [(name, files.split(), None) for name, files in cells(NOT_FOUND.replace("YT", YT))]
PLACES += [("a\0", ["a.wav"], None), ("x" * 300, ["a.wav"], None), ("~no one/a.wav", [], None)]


@pytest.mark.parametrize("name, files, found", PLACES, ids=lambda x: f"{x!s:.40}")
def test_clips_are_found_whatever_their_ending_and_padding(read, tmp_path, name, files, found):
    clips = tmp_path / "clips"
    for file in files:
        (clips / file).parent.mkdir(parents=True, exist_ok=True)
        (clips / file).touch()
    (example,) = read(R1 | {"audio_path": name}, audio_dir=str(clips))
    wanted = os.path.join(clips, name if found is None else files[found])
    assert os.path.normpath(example.audio) == os.path.normpath(wanted)


def test_two_rows_never_share_a_clip_that_one_of_them_lacks(read, tmp_path):
    clips = tmp_path / "Sound_AQA_clothoaqa"
    clips.mkdir()
    (clips / "0001.wav").touch()
    rows = [AIR | dict(path="0001.wav", task_name="Sound_AQA", dataset_name=d) for d in ("clothoaqa", "avqa")]
    for folder in (tmp_path, clips):
        assert [os.path.isfile(e.audio) for e in read(rows, audio_dir=str(folder))] == [True, False]


def test_many_folders_of_clips_are_listed_once(read, tmp_path, monkeypatch):
    for i in range(300):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / f"{YT}_{i}.wav").touch()
    scanned, scandir = [], os.scandir
    monkeypatch.setattr(data.os, "scandir", lambda folder: scanned.append(folder) or scandir(folder))
    examples = read([R1 | {"audio_path": f"{YT}_{i:06d}"} for i in range(400)])
    assert [os.path.isfile(e.audio) for e in examples] == [i < 300 for i in range(400)]
    assert len(scanned) == 300 + 3  # the root for its sounds, for its folders, and for both


def test_our_own_paths_mean_what_they_say(read, tmp_path):
    """Those of other formats are found one by one, where there are several."""
    (tmp_path / "data").mkdir()
    for name in ("a.wav", "data/b.flac"):
        (tmp_path / name).touch()
    assert read(dict(audio="x/a.flac", question="?"))[0].audio == str(tmp_path / "x" / "a.flac")
    assert read(PRO)[0].audio == [str(tmp_path / "data" / "a.wav"), str(tmp_path / "data" / "b.flac")]


# ---- parquet, saved data sets and the Hub


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return datasets


def sound(rate_hz=16000, channels=1, **kind) -> bytes:
    wave, f = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz), io.BytesIO()
    soundfile.write(f, np.stack([wave] * channels, 1), rate_hz, **({"format": "WAV"} | kind))
    return f.getvalue()


SOUNDS = {
    "pcm16.wav": dict(),
    "pcm24.wav": dict(subtype="PCM_24", rate_hz=48000),
    "six.wav": dict(subtype="FLOAT", channels=6),
    "x.flac": dict(format="FLAC", channels=2, rate_hz=44100),
    "low.wav": dict(rate_hz=8000, subtype="PCM_U8"),
    "an mp3.wav": dict(format="MP3"),
    None: dict(subtype="DOUBLE"),
}


def parquet(path, **columns) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["Audio", "struct", "bytes", "saved", "folder"])
def test_clips_inside_parquet(tmp_path, datasets, monkeypatch, kind):
    """They are heard, and their bytes are not read before that."""
    n, path = len(SOUNDS), str(tmp_path / "a.json")
    clips = [{"bytes": sound(**how), "path": name} for name, how in SOUNDS.items()]
    table = {
        k: [v] * n for k, v in dict(question="Which?", choices=["(A) a", "(B) b"], answer="(B) b").items()
    }
    table |= dict(
        id=[f"r{i}" for i in range(n)], audio=[c["bytes"] for c in clips] if kind == "bytes" else clips
    )
    if kind in ("Audio", "saved"):
        table = datasets.Dataset.from_dict(table).cast_column("audio", datasets.Audio(decode=False))
        table.save_to_disk(path) if kind == "saved" else table.to_parquet(path)
    elif kind == "folder":
        os.mkdir(path)
        parquet(f"{path}/train.parquet", **table)
    else:
        parquet(path, **table)
    with monkeypatch.context() as m:
        m.setattr(data.Embedded, "read", lambda self: pytest.fail("the bytes were read"))
        examples = Examples(path)
        read = list(examples)
        data.scan(examples)
    assert str(examples) == f"{path}: Hub format, {n} examples" and examples.where(2) == f"{path}:row 3"
    wanted = data.load_audio(sound())[0]
    for i, (e, clip) in enumerate(zip(read, clips)):
        assert (e.id, e.choices, e.answer, e.audio.read()) == (f"r{i}", ["a", "b"], 1, clip["bytes"])
        assert e.audio.path == (clip["path"] or "" if kind != "bytes" else "")
        wave, _ = data.load_audio(e.audio)
        assert abs(len(wave) - 16000) <= 1 and np.abs(wave[1000:15000] - wanted[1000:15000]).max() < 0.02


@pytest.mark.parametrize("name", FIRST)
def test_every_format_may_come_as_parquet(tmp_path, read, datasets, name):
    """The same fields as from JSON lines, wherever arrow keeps them."""
    rows = [{k: v for k, v in row.items() if k != "rubric"} for row in FIRST[name]]
    path = str(tmp_path / "p")
    datasets.Dataset.from_list(rows).to_parquet(path)
    examples = Examples(path)
    assert examples.format == name and examples.where(0) == f"{path}:row 1"
    filled = [{k: None for k in rows[0]} | row for row in rows]  # what arrow does
    assert list(examples) == list(read(filled))


INSIDE = {
    "MMAU (Hub)": HUB | dict(context={}),
    "MMSU": MMSU | dict(audio={}),
    "avqa-processed": PROCESSED | dict(audio={}),
}
INSIDE |= {"own": dict(question="?", audio={}), "captions": dict(audio={}, caption="rain")}


@pytest.mark.parametrize("name", INSIDE)
def test_formats_with_their_clips_inside(tmp_path, datasets, name):
    clips = [{"bytes": sound(channels=n), "path": None} for n in (1, 2)]
    rows = [{k: clip if v == {} else v for k, v in INSIDE[name].items()} for clip in clips]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p"))
    examples = Examples(str(tmp_path / "p"))
    assert examples.format == name
    assert [len(data.load_audio(e.audio)[0]) for e in examples] == [16000, 16000]


QUIZ = dict(question="?", choices=["x", "y"], answer="y")


def quiz(path, clips) -> Examples:
    return Examples(parquet(path, audio=clips, **{k: [v] * len(clips) for k, v in QUIZ.items()}))


def test_paths_inside_parquet_are_found_as_others_are(tmp_path, datasets, monkeypatch):
    """A clip without bytes is a path, relative to the file or --audio_dir, not to the working directory."""
    monkeypatch.chdir("/")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(sound())
    quiz(tmp_path / "p", [{"bytes": None, "path": "a.wav"}])
    for folder in ("", str(tmp_path / "clips")):
        (example,) = Examples(str(tmp_path / "p"), folder)
        assert len(data.load_audio(example.audio)[0]) == 16000


@pytest.mark.parametrize("null", [None, {"bytes": None, "path": None}])
def test_a_null_clip_inside_parquet_is_refused(tmp_path, datasets, null):
    """In the first row, too, where it says nothing of the format."""
    examples = quiz(tmp_path / "p", [null, {"bytes": sound(), "path": None}, null])
    assert examples.format == "Hub" and examples[1].audio
    for i in (0, 2):
        with pytest.raises(DataError, match=f'p:row {i + 1}: field "audio": missing'):
            examples[i]


def test_embedded_clips_are_known_by_their_content(tmp_path, datasets):
    """And not by a path that is the same in all rows; a clip that stands in several rows is one."""
    clips = [{"bytes": sound(rate_hz=8000 + i % 40), "path": "audio.wav"} for i in range(60)]
    keys = data.scan(quiz(tmp_path / "p", clips))
    assert len(set(keys)) == 40 and keys[0] == keys[40] and all(data.held_out(keys, 9))
    examples = Examples(
        parquet(tmp_path / "c", audio=[*clips[:2], *clips[40:42]], caption=["a", "b", "c", "d"])
    )
    assert [(e.id, e.target) for e in examples] == [("1", ["a", "c"]), ("2", ["b", "d"])]


def test_several_embedded_clips_a_question(tmp_path, datasets):
    clip = {"bytes": sound(), "path": None}
    other = {"bytes": sound(channels=2), "path": "b.wav"}
    examples = quiz(tmp_path / "p", [[clip, other], [clip], [clip, {"bytes": None, "path": None}]])
    assert [len(data.load_audio(clip)[0]) for e in examples[:2] for clip in e.clips] == [16000] * 3
    with pytest.raises(DataError, match='row 3: field "audio": expected a path'):
        examples[2]


def test_bad_rows_of_parquet_are_named(tmp_path, datasets):
    path, row = str(tmp_path / "p"), dict(QUIZ, audio={"bytes": b"text", "path": "a.wav"})
    datasets.Dataset.from_list([row | {"answer": a} for a in ("y", "z", "x")]).to_parquet(path)
    examples = Examples(path)
    with pytest.raises(DataError, match=f'^{path}:row 2: field "answer"'):
        examples[1]
    with pytest.raises(data.AudioError, match="row 3: a.wav.*not a readable sound"):
        data.load_audio(examples[2].audio)
    content = (tmp_path / "p").read_bytes()
    for bad in (content[: len(content) // 2], b"PAR1", b"PAR1" * 99, content[:4] + content[9:]):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(DataError, match=f"^{tmp_path}/bad: could not be loaded"):
            Examples(str(tmp_path / "bad"))


def test_hub_ids_are_taken_apart(datasets, monkeypatch, tmp_path):
    rows, asked = datasets.Dataset.from_list([dict(audio=None, question="?")]), []

    def load_dataset(*args, split):
        asked.append(" ".join([*args, split]))
        if "none" in args[0]:
            raise OSError("not there")
        return rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("o/n", "o/n:dev", "o/n/en", "o/n/en:dev", "o/n-v1.25", "o/n/v1.0:train[:10%]"):
        assert len(Examples(name)) == 1
    wanted = ["o/n train", "o/n dev", "o/n en train", "o/n en dev", "o/n-v1.25 train", "o/n v1.0 train[:10%]"]
    assert asked == wanted
    with pytest.raises(
        DataError, match=r"^o/none:v05.15.25: could not be loaded .* org/name\[/config\]\[:split\]"
    ):
        Examples("o/none:v05.15.25")
    for name in ("o/n.json", "o/n.jsonl", "o/n.csv", "o/n.parquet"):
        with pytest.raises(DataError, match="no such file"):
            Examples(name)


@pytest.mark.parametrize("source", ["nobody/none", "p"])
def test_without_the_package_datasets(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=f"^{source}: .*pip install datasets"):
        Examples(source)


# ---- what reading must not do


def test_reading_touches_no_sound_and_needs_no_torch(tmp_path):
    """All formats read without torch, soundfile and soxr, and where every clip is a pipe that would block."""
    os.mkfifo(tmp_path / "x.wav")
    for name, rows in FIRST.items():
        clips = {"audio_path", "audio_id", "audio", "file_name"}
        rows = [row | dict.fromkeys(row.keys() & clips, "x.wav") for row in rows]
        (tmp_path / name).write_bytes(lines(*rows))
    code = textwrap.dedent("""
        import sys
        sys.modules.update(dict.fromkeys(("torch", "transformers", "soundfile", "soxr", "datasets")))
        import data
        print(sum(len(list(data.Examples(name))) for name in sys.argv[1:]))""")
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in FIRST)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{len(FIRST) + 2}\n", done.stderr


MANY = int(1e6) if SLOW else 50_000
CAPTION = '{"ytid": "#", "start_s": 3, "caption": "It rains"}'
ANSWER = '{"file_name": "#.wav", "QuestionText": "Is it rain?", "answer": "yes"}'
TEMPLATES = {  # kind: before, a line, between, after
    "own": (
        "",
        '{"audio": "#.wav", "question": "Is it rain?", "choices": ["yes", "no"], "answer": 1}',
        "\n",
        "",
    ),
    "list": (
        "[",
        '{"audio": "#.wav", "question": "Is it rain?", "choices": ["yes", "no"], "answer": 1}',
        ",\n",
        "]",
    ),
    "MMAU": ("", json.dumps(MMAU), "\n", ""),
    "captions": ("", f"{CAPTION}\n{CAPTION}", "\n", ""),
    "Clotho-AQA": ("", f"{ANSWER}\n{ANSWER}", "\n", ""),
    "labels": ("", '{"file": "#.wav", "label": "dog #"}', "\n", ""),
    "csv": ("file,label\n", "#.wav,dog #", "\n", ""),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_million_lines_are_ready_in_20_s_and_2_gib(tmp_path, kind):
    """On top of what an empty process takes. The default: in proportion, in four times the time, as cores are shared."""
    before, line, between, after = TEMPLATES[kind]
    n_lines = MANY // (line.count("\n") + 1)
    content = between.join(line.replace("#", str(i)) for i in range(n_lines))
    (tmp_path / "many").write_text(before + content + after)
    code = textwrap.dedent("""
        import re, sys, time, data
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
        before, begin = peak(), time.process_time()
        examples = data.Examples(sys.argv[1])
        print(len(examples), time.process_time() - begin, (peak() - before) / 2**20)
        for i in (0, 1, len(examples) // 2, -1): examples[i].question""")
    command = [sys.executable, "-c", code, str(tmp_path / "many")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    n, seconds, gib = map(float, done.stdout.split())
    print(f"{kind}: {n:.0f} examples, {seconds:.1f} s, {gib:.2f} GiB")
    assert n == n_lines and seconds < (20 if SLOW else 80) * MANY / 1e6 and gib < 2 * MANY / 1e6


# ---- fuzzing

ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    10**400,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "\n",
    "A",
    "(A)",
    "A. ",
]
ODD += [
    "b",
    "\0",
    "\ud800",
    "\udfff犬",
    "x" * 3000,
    "é🐕",
    "~",
    "~x/y",
    "/",
    ".",
    "..",
    "a\nb",
    "[]",
    "[1",
    "{}",
    "null",
]
ODD += [
    '"x"',
    "nan",
    "inf",
    "1e999",
    "-5",
    '["Audio"]',
    '["Audio", ["x"]]',
    '["Audio", null, {}]',
    '["Sound \\ud800"]',
]
ODD += [
    "yes",
    "open",
    "\nChoices:\n",
    "?\nChoices:\nA. x\nB. y",
    [],
    {},
    [None],
    [0],
    ["a"],
    ["a", "b"],
    [[]],
    [{}],
]
ODD += [["(A) a", "(B) b"], ["A", "A"], [["a"], ["b"]], [math.nan], {"label": ["A", "B"], "text": ["x", "y"]}]
ODD += [
    {"label": 5, "text": None},
    {"bytes": None},
    {"stem": "?", "choices": [{}]},
    [{"label": "A", "text": "x"}] * 2,
]
ODD += [{"a": {"b": [1]}}, ["\ud800", "b"], ["x"] * 30, "x.wav", ["a.wav", None]]
PIECES = b'[ { } ] \n \r " \\ud800 \\ \0 null 1e999 NaN \xff \xf0\x9f , ; \t : - true'.split(b" ")
PIECES += [BOM, b"0" * 5000, b"{" * 50, *(bytes([i]) for i in range(32, 127, 12))]
KEYS = sorted(
    {key for rows in FIRST.values() for row in rows for key in row} | {"start", "family", "caption_2"}
)
ANSWERS = "".join(f'{i}.wav,"Is it, 犬?",{answer},yes\n' for i in range(2) for answer in ("yes", "no", "yes"))
TABLES = {
    "Clotho-AQA CSV": "file_name,QuestionText,answer,confidence\n" + ANSWERS,
    "captions CSV": 'youtube_id,start_s,caption\na,1,"x, y"\nb,2,z\n',
    "labels CSV": 'file;label\na.wav;dog\nb.wav;"c\n d"\n',
    "VGGSound CSV": 'ab,30,"dog, big",train\ncd,40,cat,test\n',
    "TSV": "path\tdescription\na.wav\tx\nb.wav\t\n",
    "list": json.dumps([MMAU] * 3, ensure_ascii=False),
}


def mutate_row(rng, row: dict) -> dict:
    row = json.loads(json.dumps(row))
    for _ in range(rng.choice([1, 1, 2, 3])):
        place, key = row, rng.choice(KEYS if rng.random() < 0.1 or not row else list(row))
        while (
            rng.random() < 0.5 and isinstance(place, dict) and isinstance(place.get(key), dict) and place[key]
        ):
            place = place[key]
            key = rng.choice(list(place))
        if rng.random() > 0.15:
            place[key] = json.loads(json.dumps(rng.choice(ODD)))
        else:
            place.pop(key, None)
    return row


def mutate_bytes(rng, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        content[at : at + rng.choice([0, 0, 1, 1, 30, 300])] = rng.choice(PIECES)
    return bytes(content)


def check_message(error, *starts):
    assert str(error).startswith(starts) and len(str(error)) < 3000 and str(error).isprintable(), repr(error)


def look_at(examples: Examples) -> Counter:
    """Read all lines; what is read must be fit for training or refused by line."""
    outcome = Counter()
    assert str(examples).startswith(f"{examples.path}: ") and str(examples).encode()
    for i in range(len(examples)):
        try:
            e = examples[i]
        except DataError as error:
            check_message(error, *(f"{examples.rows.where(k)}: " for k in examples.items[i]))
            outcome["refused"] += 1
            continue
        targets = e.target if isinstance(e.target, list) else [e.target or ""]
        assert " ".join([e.question, *e.choices, *targets]).encode() and e.question.strip()
        assert len(e.choices) != 1 and all(c.strip() for c in e.choices) and type(e.id) is str
        assert e.answer is None or type(e.answer) is int and 0 <= e.answer < len(e.choices)
        assert isinstance(e.meta, dict) and all(isinstance(c, str) and c for c in e.clips)
        outcome["read"] += 1
    return outcome


@pytest.fixture
def watchdog():
    def bark(*_):
        raise TimeoutError("a line takes for ever")

    before = signal.signal(signal.SIGALRM, bark)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


LINES = int(os.environ.get("OMNI_FUZZ", 5_000))


@pytest.mark.parametrize("name", [*FIRST, *TABLES])
def test_mutated_lines_are_read_or_refused(tmp_path, watchdog, name):
    """Odd values, lost and foreign keys, damaged bytes: no traceback, no hang, each message with its line."""
    rng, outcome, path = random.Random(name), Counter(), tmp_path / "file"
    known = data.FORMATS.get(name)
    is_eager = (
        known is None or known.group or known.skip or known.pool or known.about
    )  # a bad line ends the file
    per_file = 1 if is_eager else 50

    def mutated() -> bytes:
        if name in TABLES:
            return mutate_bytes(rng, TABLES[name].encode())
        row = mutate_row(rng, rng.choice(FIRST[name]))
        content = json.dumps(row, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
        return mutate_bytes(rng, content) if rng.random() < 0.3 else content

    for n in range(0, LINES // len([*FIRST, *TABLES]) + 1, per_file):
        some = [mutated() for _ in range(per_file)]
        content = some[0] if name in TABLES else lines(*FIRST[name], *some)
        if name in FIRST and n % 10 == 9:
            content = lines(some[0], *FIRST[name])  # which format is it?
        path.write_bytes(content)
        watchdog(20)
        try:
            outcome += look_at(Examples(str(path)))
        except DataError as e:
            check_message(e, f"{path}:")
            outcome["refused"] += 1
        except Exception as e:  # what no user should see
            raise AssertionError(f"{type(e).__name__}: {e!s:.80}: {content[-300:]!r}") from e
    assert min(outcome["read"], outcome["refused"]) > sum(outcome.values()) // 50, outcome
