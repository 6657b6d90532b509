"""Readers: rows of every known format, with the oddities of the real files, become the Examples they should, or are refused.

All rows are made up. OMNI_SLOW=1 reads a million lines instead of 50,000; OMNI_FUZZ=N mutates N lines instead of 100,000.
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

ROOT = os.path.dirname(os.path.abspath(data.__file__))
BOM = b"\xef\xbb\xbf"
SLOW = bool(os.environ.get("OMNI_SLOW"))


def lines(*rows) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


@pytest.fixture
def read(tmp_path):
    """Content, rows or one row -> Examples of a file whose name tells nothing."""

    def read(content, name="file", audio_dir=""):
        rows = [content] if isinstance(content, dict) else content
        content = (
            rows.encode() if isinstance(rows, str) else rows if isinstance(rows, bytes) else lines(*rows)
        )
        (tmp_path / name).write_bytes(content)
        return Examples(str(tmp_path / name), audio_dir)

    return read


@pytest.fixture
def refusal(read, tmp_path):
    """Content or rows -> the first message when they are read in order, without the folder. It is never long."""

    def refusal(content) -> str:
        with pytest.raises(DataError) as e:
            list(read(content))
        assert len(str(e.value)) < 3000 and str(e.value).encode()
        return str(e.value).removeprefix(f"{tmp_path}/")

    return refusal


# ---- every format, field by field: (format, row, the Example it becomes; `audio` relative to the folder of the file)

MC = dict(question='Which, "loud"?\n犬?', choices=["a, b", 'the "bell"', "Ünïcödé 🐕"], answer='the "bell"')
MC_READ = dict(question=MC["question"], choices=MC["choices"], answer=1)
AVQA = dict(
    id=7,
    video_name="-Xy_z0_000030",
    video_id=12,
    question_text="Why videos? The video!",
    question_relation="Sound",
    multi_choice=["dog", None, "cat", "rain"],
    answer=2,
    question_type="Why",
)
AVQA_META = {
    k: AVQA[k] for k in ("video_name", "video_id", "question_text", "question_relation", "question_type")
}
AVQA_READ = dict(
    id="7",
    audio="-Xy_z0_000030",
    question="Why audios? The audio!",
    choices=["dog", "cat", "rain"],
    answer=1,
    meta=AVQA_META,
)
R1 = AVQA | dict(dataset_name="AVQA", audio_path="clips/-Xy_z0_30.wav")
R1_READ = AVQA_READ | dict(audio="clips/-Xy_z0_30.wav", meta=AVQA_META | {"dataset_name": "AVQA"})
MMAU_MORE = {
    "dataset": "meld",
    "task": "speech",
    "split": "test-mini",
    "category": "Reasoning",
    "sub-category": "Emotion",
    "difficulty": "Hard",
}
MMAU = dict(MC, id="0a-1b", audio_id="./test-mini-audios/3c-4d.wav", **MMAU_MORE)
MMAU_READ = dict(MC_READ, id="0a-1b", audio="./test-mini-audios/3c-4d.wav", meta=MMAU_MORE)
MMAU_HUB = dict(
    context="x.wav",
    instruction="Which?",
    choices=["(A) A dog", "(B) B flat", "(C) a"],
    answer="(B) B flat",
    other_attributes=json.dumps({"id": "u-1"} | MMAU_MORE),
)
MMAU_HUB_READ = dict(
    id="u-1", audio="x.wav", question="Which?", choices=["A dog", "B flat", "a"], answer=1, meta=MMAU_MORE
)
PRO_MORE = {
    "length_type": "long",
    "perceptual_skills": ["pitch"],
    "reasoning_skills": [],
    "category": "music",
    "transcription": None,
    "task_classification": "x",
    "task_identifier": "t-1",
    "kwargs": None,
    "sub-cat": "y",
}
PRO = dict(MC, id="p1", audio_path=["data/a.wav", "data/b.wav"], **PRO_MORE)
MMAR_MORE = {
    "modality": "mix-sound-speech",
    "category": "Signal Layer",
    "sub-category": "x",
    "language": "en",
    "source": "y",
    "url": "https://example.org/a",
    "timestamp": "00:01,00:09",
    "thinking": "…",
    "cue": ["hum"],
    "rubric": {"r": 1},
}
MMAR = dict(MC, id="m_1", audio_path="./audio/other_name.wav", **MMAR_MORE)
COLUMNS = dict(question="Who?", choice_a="A dog", choice_b="a", choice_c=None, choice_d=None, answer_gt="a")
AIR = dict(COLUMNS, path="g.wav", task_name="Audio_Grounding", dataset_name="Own", uniq_id=0)
AIR_READ = dict(
    id="0",
    audio="Audio_Grounding_Own/g.wav",
    question="Who?",
    choices=["A dog", "a"],
    answer=1,
    meta=dict(task_name="Audio_Grounding", dataset_name="Own"),
)
MMSU_MORE = {
    "task_name": "t",
    "category": "c",
    "sub-category": "s",
    "sub-sub-category": "ss",
    "linguistics_sub_discipline": None,
}
MMSU = dict(COLUMNS, id="ms_1", audio_path="wav/m.wav", **MMSU_MORE)
MMSU_READ = dict(
    id="ms_1", audio="wav/m.wav", question="Who?", choices=["A dog", "a"], answer=1, meta=MMSU_MORE
)
ARC = dict(
    id="arc_1", question="Why 犬?", choices={"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, answerKey="C"
)
ARC_READ = dict(id="arc_1", audio=None, question="Why 犬?", choices=["x", "y", "z"], answer=2)
AI2 = dict(
    id="arc_1",
    answerKey="3",
    grade=4,
    question={"stem": "Why 犬?", "choices": [{"text": t, "label": label} for t, label in zip("xyz", "123")]},
)
COUNTDOWN_READ = dict(
    id="1",
    audio=None,
    meta=dict(nums=[3, 5, -7], target=105),
    question="Using the numbers [3, 5, -7], "
    "create an equation that equals 105. You can use basic arithmetic operations (+, -, *, /) and each "
    "number can only be used once.",
)
MUSIC = dict(
    video_id="00000031",
    question_id=5,
    type='["Audio", "Counting"]',
    question_content="Is <LR> <Object> <FL>?",
    templ_values='["left", "tuba"]',
    question_deleted=0,
    anser="two",
)
CLOTHO = [
    dict(file_name="a b.wav", QuestionText="Is it rain?", answer=a, confidence=c)
    for a, c in ((" Yes", "maybe"), ("no", "yes"), ("yes ", "yes"))
]
CHAT = dict(
    messages=[
        dict(role="user", content="<audio>\nWhat barks?"),
        dict(role="assistant", content="<THINK>A dog."),
    ],
    audios=["a.wav"],
    task="sound",
)
CHAT_READ = dict(
    id="1", audio="a.wav", question="What barks?", target="<THINK>A dog.", meta={"task": "sound"}
)
SHARE = dict(
    id="s1",
    sound="a.wav",
    conversations=[
        {"from": "human", "value": "<sound>\nWhat barks?"},
        {"from": "gpt", "value": "<THINK>A dog."},
    ],
)
LONGER = [
    dict(role="system", content="Think."),
    *CHAT["messages"],
    dict(role="user", content="Sure?"),
    dict(role="assistant", content="Yes."),
]
PROCESSED = dict(
    id=3,
    question="Which?\nIs it?\nChoices:\nA. a dog\nB. B flat\nC. a",
    answer="B. B flat",
    audio="p.wav",
    n=1,
)

CASES = [
    ("R1-AQA", R1, R1_READ),
    (
        "R1-AQA",
        R1 | dict(multi_choice=[None, None, "a", "B flat"], answer=3, question_text="A Video", id=None),
        R1_READ
        | dict(
            id="1",
            choices=["a", "B flat"],
            answer=1,
            question="A Video",
            meta={k: v for k, v in R1_READ["meta"].items() if k != "question_text"},
        ),
    ),
    (
        "R1-AQA",
        R1 | dict(multi_choice=["A", "A", "c"], answer=1),
        R1_READ | dict(choices=["A", "A", "c"], answer=1),
    ),
    (
        "R1-AQA",
        R1 | dict(multi_choice=[str(i) for i in range(8)], answer="7"),
        R1_READ | dict(choices=[str(i) for i in range(8)], answer=7),
    ),
    ("R1-AQA", R1 | dict(answer=None, audio_path="/x/y.wav"), R1_READ | dict(answer=None, audio="/x/y.wav")),
    ("AVQA", AVQA, AVQA_READ),
    (
        "AVRT",
        dict(
            id=3,
            audio_path="q.wav",
            question=MC["question"],
            multi_choice=MC["choices"],
            answer=MC["answer"],
            n=1,
        ),
        dict(MC_READ, id="3", audio="q.wav", meta={"n": 1}),
    ),
    (
        "AVQA",
        AVQA | dict(multi_choice=["x", "y"], answer=0, video_name="v.mp4"),
        AVQA_READ
        | dict(choices=["x", "y"], answer=0, audio="v.mp4", meta=AVQA_META | {"video_name": "v.mp4"}),
    ),
    (
        "own",
        dict(
            audio="x.wav", question="?", choices=["A. dog", "B. cat"], answer="B. cat", meta={"a": 1}, b=[2]
        ),
        dict(
            id="1",
            audio="x.wav",
            question="?",
            choices=["A. dog", "B. cat"],
            answer=1,
            meta={"a": 1, "b": [2]},
        ),
    ),  # verbatim
    (
        "own",
        dict(audio=["x.wav", "/y.wav"], question="?", target=["a", "b"]),
        dict(id="1", audio=["x.wav", "/y.wav"], question="?", target=["a", "b"]),
    ),
    (
        "AudioMCQ",
        dict(MC, audio_path="s/q.wav", source="S"),
        dict(MC_READ, id="1", audio="s/q.wav", meta={"source": "S"}),
    ),
    (
        "avqa-processed",
        PROCESSED,
        dict(
            id="3",
            audio="p.wav",
            question="Which?\nIs it?",
            choices=["a dog", "B flat", "a"],
            answer=1,
            meta={"n": 1},
        ),
    ),
    (
        "avqa-processed",
        PROCESSED | dict(question="Q\nChoices:\n\nA. x\n\nB. y\n", answer="A"),
        dict(id="3", audio="p.wav", question="Q", choices=["x", "y"], answer=0, meta={"n": 1}),
    ),
    ("MMAU", MMAU, MMAU_READ),
    (
        "MMAU",
        MMAU | {"category": ["Reasoning"], "choices": ["dog"] * 5, "answer": "dog", "id": 0},
        MMAU_READ | dict(choices=["dog"] * 5, answer=0, id="0", meta=MMAU_MORE | {"category": ["Reasoning"]}),
    ),
    (
        "MMAU",
        {k: v for k, v in MMAU.items() if k != "id"} | dict(answer=""),
        MMAU_READ | dict(id="3c-4d", answer=None),
    ),
    ("MMAU (Hub)", MMAU_HUB, MMAU_HUB_READ),
    (
        "MMAU (Hub)",
        MMAU_HUB | dict(other_attributes={"id": 0} | MMAU_MORE, answer="C"),
        MMAU_HUB_READ | dict(id="0", answer=2),
    ),
    (
        "MMAU (Hub)",
        dict(
            audio="x.wav",
            instruction="Which?",
            choices='["A dog", "B flat", "a"]',
            answer="B flat",
            id=4,
            n=None,
        ),
        MMAU_HUB_READ | dict(id="4", meta={"n": None}),
    ),
    ("MMAU-Pro", PRO, dict(MC_READ, id="p1", audio=["data/a.wav", "data/b.wav"], meta=PRO_MORE)),
    (
        "MMAU-Pro",
        PRO | dict(audio_path="data/a.wav"),
        dict(MC_READ, id="p1", audio="data/a.wav", meta=PRO_MORE),
    ),
    ("MMAR", MMAR, dict(MC_READ, id="m_1", audio="./audio/other_name.wav", meta=MMAR_MORE)),
    ("AIR-Bench", AIR, AIR_READ),
    (
        "AIR-Bench",
        AIR | dict(choice_c="A", choice_d="", answer_gt="A", uniq_id="u"),
        AIR_READ | dict(id="u", choices=["A dog", "a", "A"], answer=2),
    ),
    ("MMSU", MMSU, MMSU_READ),
    (
        "MMSU",
        MMSU | dict(choice_c="c", choice_d="d", choice_e="e", answer_gt="E", id=0),
        MMSU_READ | dict(id="0", choices=["A dog", "a", "c", "d", "e"], answer=4),
    ),
    (
        "MMSU",
        MMSU | dict(audio="x.wav", answer_gt=""),
        MMSU_READ | dict(audio="x.wav", answer=None, meta=MMSU_MORE | {"audio_path": "wav/m.wav"}),
    ),
    ("ARC", ARC, ARC_READ),
    (
        "ARC",
        ARC | dict(choices={"text": ["x", "y"], "label": ["1", "2"]}, answerKey="1"),
        ARC_READ | dict(choices=["x", "y"], answer=0),
    ),
    ("ARC", ARC | dict(choices=[{"text": t, "label": label} for t, label in zip("xyz", "ABC")]), ARC_READ),
    ("ARC", AI2, ARC_READ | dict(meta={"grade": 4})),
    ("ARC", AI2 | dict(answerKey=""), ARC_READ | dict(answer=None, meta={"grade": 4})),
    ("conversation", CHAT, CHAT_READ),
    (
        "conversation",
        CHAT | dict(audios=["a.wav", "b.wav"], messages=LONGER),
        CHAT_READ | dict(audio=["a.wav", "b.wav"], meta={"task": "sound", "messages": LONGER}),
    ),
    ("conversation", SHARE, CHAT_READ | dict(id="s1", meta={})),
    (
        "conversation",
        dict(query="Audio 1: <audio>a.wav</audio>\nWhat barks?", response="<THINK>A dog.", task="sound"),
        CHAT_READ,
    ),
    (
        "conversation",
        dict(query="Why?", response="So.", history=[]),
        dict(id="1", audio=None, question="Why?", target="So.", meta={"history": []}),
    ),
    ("Countdown", dict(nums=[3, 5, -7], target=105), COUNTDOWN_READ),
    ("Countdown", dict(nums=[3, 5, -7], target=105, id="c"), COUNTDOWN_READ | dict(id="c")),
    (
        "Clotho-AQA",
        CLOTHO,
        dict(
            id="1",
            audio="a b.wav",
            question="Is it rain?",
            choices=["yes", "no"],
            answer=0,
            meta=dict(answers=["yes", "no", "yes"], confidence=["maybe", "yes", "yes"], agreement=2 / 3),
        ),
    ),
    (
        "captions",
        [
            dict(ytid="-a_b", start_s=30, caption="Rain, ü", fold=2),
            dict(ytid="-a_b", start_s=30, caption="It rains"),
        ],
        dict(
            id="-a_b_000030",
            audio="-a_b_000030",
            question="Describe the sound.",
            target=["Rain, ü", "It rains"],
            meta=dict(ytid="-a_b", start_s=30, fold=2, captions=["Rain, ü", "It rains"]),
        ),
    ),
    (
        "captions",
        dict(id="i", file="f.wav", captions=["x", "y"], meta={"m": 1}),
        dict(
            id="i",
            audio="f.wav",
            question="Describe the sound.",
            target=["x", "y"],
            meta=dict(m=1, captions=["x", "y"]),
        ),
    ),
]


def expected(fields: dict, folder) -> Example:
    def place(clip):
        return clip and os.path.join(folder, clip)

    audio = fields["audio"]
    return Example(**fields | {"audio": list(map(place, audio)) if isinstance(audio, list) else place(audio)})


@pytest.mark.parametrize("name, row, fields", CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_every_field_is_read_or_kept(read, tmp_path, name, row, fields):
    examples = read(row)
    assert list(examples) == [expected(fields, tmp_path)]
    assert type(examples[0].answer) in (int, type(None))
    assert examples.format == name and str(examples).startswith(f"{tmp_path}/file: {name} format")
    assert f", {len(examples)} examples" in str(examples) and not examples.skipped
    assert examples.where(0) == f"{tmp_path}/file:1"


FIRST = {name: row for name, row, _ in reversed(CASES)} | {
    "MUSIC-AVQA": [MUSIC, MUSIC | dict(anser="one")],
    "labels": [dict(file="a.wav", label="dog"), dict(file="b.wav", label="cat")],
}


def rows_of(name: str) -> list[dict]:
    return FIRST[name] if isinstance(FIRST[name], list) else [FIRST[name]]


def test_every_format_has_a_case():
    assert FIRST.keys() == data.FORMATS.keys() - {"Hub"}  # which lives in parquet only


CONTAINERS = {
    "no last newline": lambda rows: lines(*rows)[:-1],
    "CRLF": lambda rows: lines(*rows).replace(b"\n", b"\r\n"),
    "BOM": lambda rows: BOM + lines(*rows),
    "list": lambda rows: json.dumps(rows).encode(),
    "blank lines": lambda rows: b"\n \t\n" + lines(*rows).replace(b"\n", b"\n\r\n"),
    "indented": lambda rows: (
        BOM + b"\n" + json.dumps(rows, indent=2, ensure_ascii=False).encode() + b"\r\n\r\n"
    ),
    "keys sorted": lambda rows: lines(
        *(json.dumps(r, sort_keys=True, ensure_ascii=False).encode() for r in rows)
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_container_and_the_name_do_not_matter(read, container):
    for i, (name, other) in enumerate(zip(FIRST, [*list(FIRST)[1:], "mmau-test-mini"])):
        examples = read(
            CONTAINERS[container](rows_of(name)), name=f"{i} {other}.{['csv', 'json', 'wav', 'tsv'][i % 4]}"
        )
        plain = list(read(rows_of(name)))
        assert examples.format == name
        assert [vars(e) | {"id": ""} for e in examples] == [vars(e) | {"id": ""} for e in plain]


def test_one_row_may_hold_more_than_its_format_needs(read):
    """The first of FORMATS decides, by the keys and not by their order; what it does not know is kept."""
    for name in FIRST.keys() - {"own"}:
        row = dict(reversed(rows_of(name)[0].items())) | {"comment": {"x": [None, 1]}}
        examples = read([row, *rows_of(name)[1:]] if name != "Clotho-AQA" else rows_of(name))
        assert examples.format == name and (
            name == "Clotho-AQA" or examples[0].meta["comment"] == {"x": [None, 1]}
        )


# ---- letters before choices, gold as letter or text


@pytest.mark.parametrize(
    "choices, answer, read_choices, index",
    [
        (["dog", "cat"], "cat", None, 1),
        (["dog", "cat"], "B", None, 1),
        (["dog", "cat"], "(B)", None, 1),
        (["dog", "cat"], "B.", None, 1),
        (["dog", "cat"], " b", None, "refused"),
        (["dog", "cat"], "C", None, "refused"),
        (["dog", "cat"], "", None, None),
        (["dog", "cat"], None, None, None),
        (["dog", "cat"], 1, None, 1),
        (["dog", "cat"], "Cat", None, "refused"),
        (["dog", "cat"], "a cat", None, "refused"),
        (["dog", "cat"], True, None, "refused"),
        (["dog", "cat"], 2, None, "refused"),
        (["dog", "cat"], -1, None, "refused"),
        (["(A) dog", "(B) cat"], "(B) cat", ["dog", "cat"], 1),
        (["(A) dog", "(B) cat"], "cat", ["dog", "cat"], 1),
        (["(A) dog", "(B) cat"], "B", ["dog", "cat"], 1),
        (["(A) dog", "(B) cat"], "(A)", ["dog", "cat"], 0),
        (["(A) dog", "(B) cat"], "", ["dog", "cat"], None),
        (["A. dog", "B. cat"], "B. cat", ["dog", "cat"], 1),
        (["A: dog", "B: cat"], "B", ["dog", "cat"], 1),
        (["A) dog", "B) cat"], "B) cat", ["dog", "cat"], 1),
        (["(A)dog", "(B)cat"], "(B)cat", ["dog", "cat"], 1),
        ([f"({c}) {c * 2}" for c in "ABCDEFGH"], "H", [c * 2 for c in "ABCDEFGH"], 7),
        # the letters are the content
        (["A minor", "B flat"], "B flat", None, 1),
        (["A dog", "B flat", "a"], "a", None, 2),
        (["C", "A", "G"], "A", None, 1),
        (["a", "b"], "a", None, 0),
        (["B", "A"], "B", None, 0),
        (["B", "A"], "C", None, "refused"),
        (["A.D.", "B.C."], "B.C.", None, 1),
        (["A", "B flat", "(C) sharp"], "B flat", None, 1),
        (["A.", "B."], "B.", None, 1),
        (["(B) dog", "(A) cat"], "(A) cat", None, 1),
        (["(A) dog", "cat"], "cat", None, 1),
        (["(A) x", "(A) y"], "(A) y", None, 1),
        (["(A) A", "(B) a"], "(B) a", ["A", "a"], 1),
        (["(A) (B) x", "(B) y"], "(B) y", ["(B) x", "y"], 1),
        (["A. C", "B. G", "C. A"], "A", ["C", "G", "A"], 0),  # where choices carry letters, a letter is one
        # duplicates, commas, lists in a text
        (["x", "x", "y"], "y", None, 2),
        (["x", "y", "x"], "x", None, 0),
        (["(A) x", "(B) x"], "(B) x", ["x", "x"], 1),
        (["a, b", "['c', 'd']"], "['c', 'd']", None, 1),
        ('["a", "b"]', "b", ["a", "b"], 1),
        ("[1, 2]", 1, None, "refused"),
        ("dog", "dog", None, "refused"),
        ('["a", "b"', "a", None, "refused"),
        (None, None, None, "refused"),
        (["dog", None], "dog", None, "refused"),
        (["dog"], "dog", None, "refused"),
        ([["dog"], ["cat"]], 0, None, "refused"),
        (["dog", " "], "dog", None, "refused"),
        ({"A": "dog", "B": "cat"}, "A", None, "refused"),
    ],
    ids=lambda x: f"{x!r:.24}",
)
def test_letters(read, refusal, choices, answer, read_choices, index):
    row = dict(audio_path="a.wav", question="?", choices=choices, answer=answer)
    if index == "refused":
        assert refusal([MC | {"audio_path": "b.wav"}, row]).startswith('file:2: field "')
    else:
        (example,) = read(row)
        assert (example.choices, example.answer) == (read_choices or choices, index)


# ---- versions, skipped rows, majorities, drawn choices


def mmau_rows(n=1000, meld=0, lost=0, **changes) -> list[dict]:
    return [
        MMAU
        | dict(id=str(i), dataset="meld" if i < meld else "own", answer="?" if i < lost else "a, b")
        | changes
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "rows, version",
    [
        (mmau_rows(meld=70), "v05.15.25"),
        (mmau_rows(meld=43), "original"),
        (mmau_rows(meld=44), "unknown version"),
        (mmau_rows(999, meld=70), "unknown version"),
        (mmau_rows(answer=""), "answers withheld"),
        (mmau_rows(3, answer=None), "answers withheld"),
        (mmau_rows(1000, meld=70, lost=20), "v05.15.25"),
        (mmau_rows(999, meld=70) + mmau_rows(1, answer=""), "v05.15.25"),
    ],
)
def test_mmau_says_which_version_it_is(read, tmp_path, rows, version):
    examples = read(json.dumps(rows))
    assert examples.version == version
    assert str(examples) == f"{tmp_path}/file: MMAU format {version}, {len(rows)} examples"


def test_the_broken_mmau_files_are_refused(refusal):
    """Those of 15 and 16 May 2025: 146 or 147 answers are not among their choices."""
    message = refusal(json.dumps(mmau_rows(meld=70, lost=146)))
    assert message.startswith("file: 146 answers are not among their choices") and "May 2025" in message
    assert refusal(mmau_rows(30, lost=1)).startswith("file:1: field \"answer\": '?' is not among the choices")


def test_mmau_of_the_hub_names_its_version_too(read, refusal):
    def hub(row):
        return dict(
            context="x.wav",
            instruction="?",
            choices=row["choices"],
            answer=row["answer"],
            other_attributes=json.dumps({"dataset": row["dataset"]}),
        )

    assert read([hub(r) for r in mmau_rows(meld=70)]).version == "v05.15.25"
    assert (
        read([hub(r) for r in mmau_rows(meld=43)] + [MMAU_HUB | {"other_attributes": "{"}]).version
        == "unknown version"
    )
    assert refusal([hub(r) for r in mmau_rows(meld=70, lost=146)]).startswith(
        "file: 146 answers are not among their choices"
    )


def test_a_broken_line_of_mmau_is_named_once(refusal):
    for line, message in (
        (b"{", "file:2: broken JSON"),
        (b"5", "file:2: expected a JSON object, found 5"),
        (b"null", "file:2: expected a JSON object"),
        (b'{"id": 1}', 'file:2: field "audio_id": missing'),
    ):
        assert refusal(lines(MMAU, line, MMAU)).startswith(message)


def test_mmau_pro_is_read_where_it_is_multiple_choice(read, tmp_path):
    rows = [
        PRO | dict(category="open", choices=[]),
        PRO | dict(id="p2"),
        PRO | dict(category="open"),
        PRO | dict(category="instruction following", answer=None),
        PRO | dict(choices=None),
        PRO | dict(answer="none of it"),
        PRO | dict(id="p7", choices=["(A) x", "(B) y"], answer="(B) y", audio_path=["c.wav"] * 3),
    ]
    examples = read(rows)
    assert [(e.id, e.answer, len(e.clips)) for e in examples] == [("p2", 1, 2), ("p7", 1, 3)]
    assert [examples.where(i) for i in range(2)] == [f"{tmp_path}/file:2", f"{tmp_path}/file:7"]
    assert examples.skipped == {
        "not multiple choice (open answer or instruction following)": 4,
        "the answer is not among the choices": 1,
    }
    assert str(examples).endswith(
        "MMAU-Pro format, 2 examples; 4 skipped: not multiple choice (open answer or instruction "
        "following); 1 skipped: the answer is not among the choices"
    )


def test_mmau_pro_golds_may_be_letters_and_choices_json(read):
    rows = [PRO | dict(answer="B"), PRO | dict(choices=json.dumps(PRO["choices"])), PRO | dict(answer=", ")]
    examples = read(rows)
    assert [e.answer for e in examples] == [1, 1] and sum(examples.skipped.values()) == 1


def test_nothing_but_skipped_rows(refusal):
    for row in (PRO | dict(choices=[]), MUSIC | dict(question_deleted=1), CLOTHO[:2]):
        message = refusal(row)
        assert (
            message.startswith("file: ")
            and "no question that can be used: {" in message
            and ": 1}" in message
        )


def test_music_avqa(read, tmp_path):
    """What can be heard; slots are filled in order; choices are answers to other questions of the same type."""
    rows = [
        MUSIC,
        MUSIC | dict(type='["Visual", "Counting"]', anser="nine"),
        MUSIC | dict(question_deleted=1, anser="ten"),
        *(
            MUSIC | dict(question_id=i, anser=a, templ_values="[]")
            for i, a in enumerate("one three four five".split())
        ),
        *(MUSIC | dict(type='["Audio", "Comparative"]', anser=a) for a in ("yes", "no")),
        MUSIC | dict(type='["Audio-Visual", "Location"]', anser="left"),
    ]
    examples = read(json.dumps(rows))
    example, counts = examples[0], {"one", "two", "three", "four", "five"}
    assert (example.id, example.audio, example.question) == (
        "5",
        str(tmp_path / "00000031"),
        "Is left tuba <FL>?",
    )
    assert example.meta == {k: v for k, v in MUSIC.items() if k not in ("question_id", "anser")}
    assert len(examples) == 7 and examples.where(1).endswith("file:entry 4")
    for e, row in zip(examples, [rows[0], *rows[3:9]]):
        n, kin = (4, counts) if "Count" in row["type"] else (2, {"yes", "no"})
        assert (
            e.choices[e.answer] == row["anser"]
            and len(set(e.choices)) == len(e.choices) == n
            and set(e.choices) <= kin
        )
    assert examples.skipped == {
        "cannot be heard: Visual": 1,
        "cannot be heard: Audio-Visual": 1,
        "deleted by its authors": 1,
    }
    assert [e.choices for e in read(json.dumps(rows))] == [e.choices for e in examples]
    assert examples[1].question == "Is <LR> <Object> <FL>?"


def test_clotho_aqa_takes_the_majority(read, tmp_path):
    """Of three annotators, whose lines need not follow each other; yes/no questions have two choices, others four."""
    answers = {
        "q1": ["dog", "cat", " Dog"],
        "q2": ["yes", "no", "No"],
        "q3": ["rain", "wind", "sea"],
        "q4": ["wind"] * 3,
        "q5": ["sea"] * 2 + ["no"],
        "q6": ["bird"] * 3,
    }
    rows = [(f"{q[1:]}.wav", q, a[k], "maybe") for k in range(3) for q, a in answers.items()]
    examples = read("file_name,QuestionText,answer,confidence\n" + "".join(",".join(r) + "\n" for r in rows))
    assert examples.format == "Clotho-AQA" and examples.skipped == {"the annotators disagree": 1}
    assert [(e.question, e.choices[e.answer]) for e in examples] == [
        ("q1", "dog"),
        ("q2", "no"),
        ("q4", "wind"),
        ("q5", "sea"),
        ("q6", "bird"),
    ]
    assert examples[1].choices == ["yes", "no"] and examples.where(2) == f"{tmp_path}/file:5"
    for e in (examples[i] for i in (0, 2, 3, 4)):
        assert len(set(e.choices)) == 4 and set(e.choices) <= {"dog", "wind", "sea", "bird", "no"}
    assert examples[0].meta == dict(answers=["dog", "cat", "dog"], confidence=["maybe"] * 3, agreement=2 / 3)
    assert examples[0].audio == str(tmp_path / "1.wav")
    (one,) = read([CLOTHO[0]])
    assert one.meta["agreement"] == 1


def test_drawn_choices(read):
    """The answer is one of them, none stands twice, its family comes first; a label stands everywhere."""
    names = ["dog bark", "dog howl", "dog growl", "cat purr", "cat meow", "rain", "wind"]
    rows = [dict(wav=f"{i}.wav", label=names[i % 7], family=names[i % 7].split()[0]) for i in range(700)]
    examples, at = read(rows), Counter()
    for e, row in zip(examples, rows):
        assert e.choices[e.answer] == row["label"] and len(set(e.choices)) == len(e.choices) == 4
        kin = {n for n in names if n.startswith(row["family"])}
        assert kin <= set(e.choices) and e.meta == row
        at[e.answer] += 1
    assert len(at) == 4 and min(at.values()) > 700 / 4 - 5 * math.sqrt(700 * 3 / 16)
    assert len({tuple(sorted(e.choices)) for e in examples if e.meta["label"] == "rain"}) > 5
    assert [e.choices for e in examples] == [e.choices for e in read(rows)]
    assert all(sorted(e.choices) == ["dog bark", "dog howl"] for e in read(rows[:2]))


def test_several_labels_of_a_clip(read):
    """They are one question, whose distractors are none of them; each can be a distractor elsewhere."""
    rows = [
        dict(file="a.wav", label="dog", id=1),
        dict(file="b.wav", label="cat"),
        dict(file="a.wav", label="bark", id=2),
    ]
    examples = read([*rows, *(dict(file=f"{i}.wav", label="rain") for i in range(50))])
    assert (
        len(examples) == 52 and set(examples[0].choices) == {"dog", "cat", "rain"} and examples[0].id == "1"
    )
    assert examples[0].meta == dict(file="a.wav", label=["dog", "bark"], ids=[1, 2])
    assert any("bark" in e.choices for e in examples)


def test_the_line_that_is_bad_is_named(refusal):
    """Though it is one of several on the same clip."""
    rows = [dict(file="a.wav", caption="x"), dict(file="a.wav", caption=5), dict(file="b.wav", caption="y")]
    assert refusal(rows).startswith('file:2: field "captions"')


@pytest.mark.parametrize("name", FIRST)
def test_only_some_formats_may_be_without_sound(read, name):
    """A null path is refused by line; without a line of its own, no clips are merged under the name None."""
    keys = (
        "audio",
        "audio_path",
        "video_name",
        "audio_id",
        "context",
        "path",
        "video_id",
        "file_name",
        "ytid",
        "file",
        "audios",
    )
    rows = [row | {k: None for k in keys if k in row} for row in rows_of(name)]
    if name in ("own", "ARC", "Countdown"):
        assert read(rows)[0].audio is None
        return
    with pytest.raises(
        DataError, match=r'file:\d: (field "(audios?|video_name|audio_id|path|video_id)": |not a row of)'
    ):
        examples = read([*rows_of(name), *rows])
        for i in range(len(rows_of(name)) if name not in ("Clotho-AQA", "captions") else 1, len(examples)):
            examples[i]
            pytest.fail(f"{examples[i]}")


def test_a_blank_label_spoils_only_its_own_line(refusal):
    rows = [dict(file=f"{i}.wav", label=name) for i, name in enumerate(["dog", " ", "cat"])]
    assert refusal(rows).startswith("file:2: ")
    rows = [MUSIC, MUSIC | dict(anser=""), MUSIC | dict(anser="one")]
    assert refusal(rows).startswith("file:2: ")
    assert refusal([rows[0] | dict(anser="\ud800"), *rows[2:]]).startswith("file:1: ")


# ---- refusals: a good first row, then one that is not; the message names its line and field

BAD = [
    ("R1-AQA", dict(answer=1), 'field "answer": it points at a null choice'),
    ("R1-AQA", dict(answer=4), 'field "answer": 4'),
    ("R1-AQA", dict(answer="2"), 'field "answer"'),
    ("R1-AQA", dict(multi_choice={}), 'field "choices"'),
    ("R1-AQA", dict(multi_choice=None), 'field "'),
    ("R1-AQA", dict(question_text=["?"]), 'field "question_text"'),
    ("R1-AQA", dict(audio_path=5), 'field "audio"'),
    ("R1-AQA", dict(audio_path=""), 'field "audio": an empty path'),
    ("AVQA", dict(video_name=5), 'field "video_name": expected a text'),
    ("AVQA", dict(answer=True), 'field "answer"'),
    ("own", dict(audio=[]), 'field "audio": an empty list'),
    ("own", dict(audio=["a", 5]), 'field "audio"'),
    ("own", dict(choices=["a", ""]), 'field "choices"'),
    ("own", dict(question=5), 'field "question"'),
    ("AudioMCQ", dict(question=None), 'field "question": expected a text, found None'),
    ("AudioMCQ", dict(audio_path=[]), 'field "audio"'),
    ("AudioMCQ", dict(audio_path={}), 'field "audio"'),
    ("avqa-processed", dict(question="no choices"), 'field "answer"'),
    ("avqa-processed", dict(answer="D"), 'field "answer"'),
    ("avqa-processed", dict(question=5), ""),
    ("MMAU", dict(audio_id=None), 'field "audio_id"'),
    ("MMAU", dict(question=5), 'field "question"'),
    ("MMAU", dict(choices=5), 'field "choices"'),
    ("MMAU (Hub)", dict(other_attributes="{"), 'field "other_attributes": broken JSON'),
    ("MMAU (Hub)", dict(other_attributes="[1]"), ""),
    ("MMAU (Hub)", dict(other_attributes=5), ""),
    ("MMAU (Hub)", dict(answer="(D) x"), 'field "answer"'),
    ("MMAU (Hub)", dict(instruction=None), 'field "instruction"'),
    ("MMAU-Pro", dict(audio_path=[]), 'field "audio"'),
    ("MMAU-Pro", dict(audio_path=[None]), 'field "audio"'),
    ("MMAU-Pro", dict(choices=5), ""),
    ("MMAR", dict(answer="none"), 'field "answer"'),
    ("MMAR", dict(choices=[]), 'field "'),
    ("AIR-Bench", dict(path=None), 'field "path": expected a text'),
    ("AIR-Bench", dict(choice_b=5), 'field "choices"'),
    ("AIR-Bench", dict(answer_gt="x"), 'field "answer"'),
    ("MMSU", dict(choice_b=None), 'field "'),
    ("MMSU", dict(audio_path=5), 'field "audio"'),
    ("MMSU", dict(answer_gt="C"), 'field "answer"'),
    ("MMSU", dict(choice_b=None, choice_c="c", choice_d="d", answer_gt="C"), 'field "choice'),
    ("ARC", dict(answerKey="D"), "field \"answerKey\": 'D' is not among"),
    ("ARC", dict(choices=["x", "y"]), ""),
    ("ARC", dict(choices={"text": ["x"], "label": ["C"]}), 'field "'),
    ("ARC", dict(question=5), 'field "question"'),
    ("ARC", dict(choices={"text": ["x", "y"]}), 'field "label": missing'),
    ("Countdown", dict(nums=[]), 'field "nums"'),
    ("Countdown", dict(nums="1"), 'field "nums"'),
    ("Countdown", dict(nums=[1, True]), 'field "nums"'),
    ("Countdown", dict(target=1.5), 'field "nums"'),
    ("Countdown", dict(target="5"), 'field "nums"'),
    ("conversation", dict(audios=[]), 'field "audios": missing'),
    ("conversation", dict(messages=[]), 'field "messages"'),
    ("conversation", dict(messages="hello"), ""),
    ("conversation", dict(messages=CHAT["messages"][:1]), 'field "messages"'),
    ("conversation", dict(audios="gone", messages=[dict(role=[1], content="x")]), ""),
    ("MUSIC-AVQA", dict(templ_values="["), 'field "templ_values": broken JSON'),
    ("MUSIC-AVQA", dict(type="[]"), ""),
    ("MUSIC-AVQA", dict(type='["Audio", ["x"]]'), ""),
    ("MUSIC-AVQA", dict(anser=5), 'field "anser"'),
    ("MUSIC-AVQA", dict(type=None), ""),
    ("MUSIC-AVQA", dict(question_content=5), ""),
    ("MUSIC-AVQA", dict(video_id=None), ""),
    ("Clotho-AQA", dict(answer=5, QuestionText="?"), ""),
    ("Clotho-AQA", dict(file_name=["a"]), ""),
    ("captions", dict(caption=5, ytid="x"), 'field "captions"'),
    ("captions", dict(caption="", ytid="x"), 'field "captions"'),
    ("captions", dict(ytid=["a"]), ""),
    ("captions", dict(ytid=["a"], start_s=None), ""),
    ("captions", dict(start_s=math.inf), ""),
    ("captions", dict(start_s="soon"), ""),
    ("captions", dict(start_s=[1]), ""),
    ("labels", dict(label=5), 'field "label"'),
    ("labels", dict(label=["dog"]), 'field "label"'),
    ("labels", dict(label=None), 'field "label"'),
    ("labels", dict(family=[1], file="c.wav"), ""),
    ("labels", dict(file=5), 'field "audio"'),
]


@pytest.mark.parametrize(
    "name, change, message", BAD, ids=lambda x: f"{x!r:.30}" if isinstance(x, dict) else x[:12]
)
def test_bad_values(refusal, name, change, message):
    rows = [*rows_of(name), rows_of(name)[0] | change]
    assert refusal(rows).startswith(f"file:{len(rows)}: {message}")


@pytest.mark.parametrize("name", FIRST)
def test_lost_keys(read, name):
    """A later row without one of its format's keys is refused by line, and never read as if it were whole."""
    rows = rows_of(name)
    needed = {k for either in data.FORMATS[name].keys.split() for k in either.split("|") if k in rows[0]} - {
        "modality",
        "task_identifier",
        *(["audio_path"] if name == "R1-AQA" else []),
    }  # `AVQA` does without
    if name not in ("R1-AQA", "AVQA", "avqa-processed", "Clotho-AQA"):
        needed -= {"answer", "answer_gt"}  # may be withheld
    if name == "MMAU-Pro":
        needed -= {"choices"}  # skipped then
    for key in needed:
        last = {k: "new" if k == "ytid" else v for k, v in rows[0].items() if k != key}
        with pytest.raises(
            DataError, match=rf"file:{len(rows) + 1}: " if name != "Clotho-AQA" else r"file:\d: "
        ):
            list(read([*rows, last]))
            pytest.fail(f"{name} without {key}")


@pytest.mark.parametrize("name", FIRST)
def test_rows_that_are_no_objects(refusal, name):
    for value in (5, None, "text", [1], []):
        message = refusal([*rows_of(name), json.dumps(value).encode()])
        assert message.startswith(f"file:{len(rows_of(name)) + 1}: expected a JSON object, found {value!r}")


@pytest.mark.parametrize(
    "row", [{}, {"audio": "a.wav"}, {"choices": [], "answer": 1}, {"video_id": "x"}, {"nums": [1]}]
)
def test_unknown_rows_are_told_the_known_keys(refusal, row):
    message = refusal(row)
    assert message.startswith(f"file:1: unknown format, keys {sorted(row)}")
    assert all(f"{name}: {known.keys}" in message for name, known in data.FORMATS.items())


def test_values_nested_as_deep_as_json_allows_are_read_or_refused(read):
    """repr() of a value may need more stack than its parser did."""
    for depth in range(960, 1000, 2):
        nested = b"[" * depth + b"]" * depth
        for key in (b"question", b"answer", b"id", b"choices"):
            row = b'{"audio": null, "question": "?", "choices": ["a", "b"], "%s": %s}' % (key, nested)
            try:
                list(read(lines(dict(audio=None, question="?"), row)))
            except DataError as e:
                assert "file:2: " in str(e)


# ---- JSON lists


def test_entries_of_a_list_are_found_by_their_bytes(read):
    """Whatever stands between and in them: characters of 1 to 4 bytes, brackets and quotes in texts, escapes."""
    rng = random.Random(0)
    rows = [
        dict(
            audio=None,
            question="".join(rng.choices('aé犬🐕[]{},"\\ \n\u2028', k=rng.randint(1, 30))) + "?",
            id=f"{i}é",
        )
        for i in range(300)
    ]
    for ascii, indent in ((False, None), (True, None), (False, 3), (False, "\t")):
        content = json.dumps(rows, ensure_ascii=ascii, indent=indent)
        examples = read(BOM + b" \r\n" + content.replace("\n", "\r\n").encode() + b"\n\n")
        assert [e.question for e in examples] == [r["question"] for r in rows]
        assert (examples[299].id, examples.where(299)[-9:]) == ("299é", "entry 300")


@pytest.mark.parametrize(
    "mangle, message",
    [
        (lambda s: s[:-1], "it ends too soon"),
        (lambda s: s[:-5], "after entry 2"),
        (lambda s: s[:-1] + ",", "it ends too soon"),
        (lambda s: s + " x", "text after the closing bracket"),
        (lambda s: s + s, "text after the closing bracket"),
        (lambda s: s.replace("}, {", "} {"), "entry 1 is followed by '{' and not by a comma"),
        (lambda s: s.replace("}, {", "}; {"), "entry 1 is followed by ';'"),
        (lambda s: s.replace("}, {", "},, {"), "after entry 1"),
        (lambda s: s[:40], "after entry 0"),
        (lambda s: "[", "it ends too soon"),
        (lambda s: "[" + s, "after entry 1"),
        (lambda s: s.replace("3", "1" + "0" * 5000), "after entry 2"),
    ],
)
def test_broken_lists(refusal, mangle, message):
    rows = [dict(audio=None, question="é犬?", id=i) for i in (1, 2, 3)]
    text = mangle(json.dumps(rows, ensure_ascii=False))
    assert refusal(text).startswith("file: broken JSON (") and message in refusal(text)


def test_empty_lists_and_blank_files(read, refusal):
    assert read("\n" * 9000 + json.dumps(dict(audio=None, question="?")))[0].id == "9001"
    for content in ("[]", " [ ] ", "[\n]\n", "\n" * 9, " " * 9000, "\ufeff\n"):
        assert refusal(content) == "file: holds no question"


# ---- CSV

TABLE = 'file_name,caption,n\r\n"a, b.wav","It\'s ""loud"",\r\nsaid the 犬",1\r\nb.wav,rain,2\r\n\r\nc.wav, wind ,\r\n'
TABLE_READ = [
    ("a, b.wav", 'It\'s "loud",\r\nsaid the 犬', "1"),
    ("b.wav", "rain", "2"),
    ("c.wav", " wind ", ""),
]


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
        TABLE.replace("file_name,caption,n", '"file_name","caption","n"').encode(),
        BOM + TABLE.replace("file_name,caption,n", '"file_name","caption","n"').encode(),
    ],
    ids="plain BOM cut blank space spaces tail quoted BOM-quoted".split(),
)
def test_csv(read, tmp_path, content):
    examples = read(content)
    assert [(e.audio, e.target, e.meta["n"]) for e in examples] == [
        (str(tmp_path / f), [c], n) for f, c, n in TABLE_READ
    ]
    assert all(e.meta == dict(n=n, captions=[c]) and e.id == f for e, (f, c, n) in zip(examples, TABLE_READ))
    assert examples.format == "captions"


@pytest.mark.parametrize("delimiter", ";\t")
def test_csv_with_other_delimiters(read, tmp_path, delimiter):
    content = (
        delimiter.join(["file", "label", "x"])
        + "\n"
        + delimiter.join(["a.wav", "dog, big", ""])
        + "\n"
        + delimiter.join(["b.wav", f'"cat{delimiter}\nsmall"', "y"])
        + "\n"
    )
    examples = read(content)
    assert [e.choices[e.answer] for e in examples] == ["dog, big", " ".join(f"cat{delimiter}\nsmall".split())]
    assert examples[1].meta == dict(file="b.wav", label=f"cat{delimiter}\nsmall", x="y")
    assert examples[0].audio == str(tmp_path / "a.wav")


def test_vggsound(read, tmp_path):
    """Its CSV has no header, neither has its older test.csv; starts become part of the name."""
    examples = read(
        '-x_y,30,"people eating, chewing",train\r\n__z,0,dog  barking,test\r\n"q",110,rain,train\r\n'
    )
    assert [os.path.basename(e.audio) for e in examples] == ["-x_y_000030", "__z_000000", "q_000110"]
    assert [e.choices[e.answer] for e in examples] == ["people eating, chewing", "dog barking", "rain"]
    assert examples[0].meta == dict(
        youtube_id="-x_y", start_s="30", label="people eating, chewing", split="train"
    )
    assert examples.format == "labels" and examples[2].id == "q_000110"
    assert examples[0].question == "Which sound is heard in this clip?" and set(examples[0].choices) == {
        "people eating, chewing",
        "dog barking",
        "rain",
    }
    for split in ("validation", "val"):
        assert len(read(f"ab,30,dog,{split}\ncd,30,cat,{split}\n")) == 2
    examples = read(BOM + b'-x_y_000030.mp4,"dog, big"\n__z_000000.mp4,cat\n')
    assert [(e.audio, e.choices[e.answer]) for e in examples] == [
        (str(tmp_path / "-x_y_000030.mp4"), "dog, big"),
        (str(tmp_path / "__z_000000.mp4"), "cat"),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "file: is empty"),
        ("file,label\n", "file: holds no question"),
        ("file,label", "file: holds no question"),
        (",,\n,\n", "file: holds no question"),
        ("file,label\na.wav,dog\nb.wav\n", "file:3: 1 fields, expected the 2 columns"),
        ("file,label\na.wav,dog\nb.wav,cat,\n", "file:3: 3 fields, expected the 2 columns ['file', 'label']"),
        ("file,label\na.wav,dog\nb.wav,bad dog, good cat\n", "file:3: 3 fields"),
        (
            'file,label\na.wav,dog\nb.wav,"cat\nc.wav,rain\nd.wav,wind\n',
            "file:",
        ),  # a quote left open swallows no line
        ('file,label\na.wav,dog\nb.wav,"cat', "file:3: "),
        ('file,label\na.wav,"d\n' + "x" * 200_000, "file:"),
        ("a,b\n1,2\n", "file:2: unknown format, keys ['a', 'b']"),
        ("file,label\na.wav,d\xf6g\n".encode("latin-1"), "file:2: not UTF-8"),
        ("file,label\na.wav,dog\rb.wav,cat\r", "file:2: "),
        ("file,label\ra.wav,dog\rb.wav,cat\r", "file:1: "),
        ("file,label,label\na.wav,dog,1\nb.wav,cat,2\n", "file:1: two columns are called 'label'"),
        (gzip.compress(b"file,label\na.wav,dog\n", mtime=0), "file: is compressed"),
        (gzip.compress(lines(MMAU), mtime=0), "file: is compressed; unpack it first (gunzip)"),
        ("file,label\na.wav,dog\n".encode("utf-16"), "file:1: not UTF-8"),
        ("PAR1,label\n", "file: could not be loaded"),
    ],
    ids=lambda x: f"{x!r:.25}",
)
def test_bad_csv(refusal, content, message):
    assert refusal(content).startswith(message)


@pytest.mark.parametrize(
    "header",
    [
        "File_Name,Label",
        "fname,Labels",
        "slice_file_name,fold,classID,class",
        "AUDIO,Caption",
        "# YTID,start_seconds,end_seconds,label",
        "FileName,CLASS",
    ],
)
def test_headers_are_known_whatever_their_case(read, header):
    columns = header.split(",")
    rows = [
        ",".join([f"{name}.wav", *["7"] * (len(columns) - 2), word])
        for name, word in (("a", "dog"), ("b", "cat"))
    ]
    examples = read("\n".join([header, *rows]) + "\n")
    assert examples[0].meta.get("captions", examples[0].choices) in (["dog"], ["dog", "cat"], ["cat", "dog"])
    assert os.path.basename(examples[0].audio) == ("a.wav_000007" if "YTID" in header else "a.wav")
    assert len(examples[0].meta) == len(columns) - (
        "Caption" in header
    )  # nothing is lost, and "captions" is all of them


def test_unnamed_columns_of_a_csv_keep_their_values(read):
    (e,) = read(",file,caption,\n5,a.wav,rain,6\n")
    assert e.meta == {"column 1": "5", "column 4": "6", "captions": ["rain"]}


def test_line_ends_of_an_old_mac_are_called_so(refusal):
    for content in ("file,label\ra.wav,dog\rb.wav,cat\r", "file,label\na.wav,dog\rb.wav,cat\r"):
        assert "lines end in CR alone" in refusal(content) and "quote left open" not in refusal(content)


def test_an_open_quote_is_called_so(refusal):
    assert "quote" in refusal('file,caption\na.wav,"dog\nb.wav,cat\n')


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
        {"captions": ["One.", "Two."]},
    )
    examples = read("audiocap_id,youtube_id,start_time,caption\n1,ab,20,One\n2,ab,30,Two\n3,ab,20,Three\n")
    assert [(os.path.basename(e.audio), e.target) for e in examples] == [
        ("ab_000020", ["One", "Three"]),
        ("ab_000030", ["Two"]),
    ]
    examples = read("filename,fold,target,category,take\n1-x-A-0.wav,1,0,dog,A\n1-y-A-1.wav,1,1,cat,A\n")
    assert [e.choices[e.answer] for e in examples] == ["dog", "cat"] and examples[0].meta["fold"] == "1"


# ---- where the clips lie

YT, UUID = "-HG3Omg_89c", "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"


@pytest.mark.parametrize(
    "name, files, found",
    [
        ("a.wav", ["a.wav", "x/a.wav"], "a.wav"),
        (f"{YT}_000030", [f"{YT}_30.wav"], 0),
        (f"{YT}_30", [f"{YT}_000030.flac"], 0),
        (f"{YT}_000030.mp4", [f"{YT}_30.mp3"], 0),
        (f"{YT}_000030.wav", [f"{YT}_000030.FLAC"], 0),
        (f"{YT}_000000", [f"{YT}_0.wav"], 0),
        (f"clips/{YT}_30.wav", [f"clips/{YT}_000030.wav"], 0),
        ("./test-audios/a.wav", ["test-audios/a.wav"], 0),
        (f"/old/disk/{YT}_000030.wav", [f"train/{YT}_30.flac"], 0),
        ("./test-audios/3c4d9a9e-1f", ["test-audios/3c4d9a9e-1f.wav"], 0),
        (f"./test-audios/{UUID}.wav", [f"{UUID}.wav"], 0),
        ("a.wav", ["x/a.wav"], 0),
        ("clips/a.wav", ["a.flac"], 0),  # --audio_dir names the folder that the row begins with
        ("Audio_Grounding_Own/g.wav", ["Audio_Grounding_Own/g.flac", "Speech_Own/g.flac"], 0),
        (f"{YT}_000005", [f"x/{YT}_5.ogg"], 0),
        ("d/a.wav", ["x/d/a.wav"], 0),
        ("a.wav", ["a.flac", "x/a.mp3"], 0),
        ("A.mp4", ["A.wav", "A.mp4"], 0),
        (f"x/{YT}_000030", [f"y/{YT}_30.wav", f"y/{YT}_300.wav"], 0),
        # another clip that is called like it
        ("avqa/0001.wav", ["clothoaqa/0001.wav"], None),
        ("clotho/1001.wav", ["fsd/1001.wav", "fsd/1002.wav"], None),
        ("clotho/1001.wav", ["1001.wav"], None),
        ("take_001.wav", ["take_1.wav"], None),
        ("take_000001.wav", ["take_1.wav"], None),
        ("a/take_0012.wav", ["b/take_0012.flac"], None),
        ("music/train/1.wav", ["train/1.wav"], None),
        ("a/session_a01_5.wav", ["b/session_a01_5.wav"], None),
        ("session_a01_0005.wav", ["session_a01_5.wav"], None),
        # not there, or not the only one: left as it is, for the message
        (f"{YT}_000030", [f"{YT}_300.wav", f"{YT}_3.wav", f"{YT}_000030.txt", f"x{YT}_30.wav"], None),
        (f"{YT}_30", [f"{YT.upper()}_30.wav"], None),
        (f"{YT}_000000", [f"{YT}_.wav"], None),
        (f"{YT}_000030", [f"{YT}_30.wav", f"{YT}_000030.mp3"], None),
        (f"{YT}_000030", [f"x/{YT}_30.wav", f"y/{YT}_30.wav"], None),
        ("a.mp4", ["a.wav", "a.flac"], None),
        ("a.wav", ["x/a.wav", "y/a.wav"], None),
        ("a.wav", ["x/a.mp3", "y/a.flac"], None),
        ("a", ["x/y/a.wav"], None),
        ("a.wav", ["a.wav/b.wav"], None),
        ("a\0", ["a.wav"], None),
        ("..", ["a.wav"], None),
        ("~no one/a.wav", [], None),
        ("x" * 300, ["a.wav"], None),
    ],
    ids=lambda x: f"{x!s:.40}",
)
def test_clips_are_found_whatever_their_ending_and_padding(read, tmp_path, name, files, found):
    for file in files:
        os.makedirs(os.path.dirname(tmp_path / "clips" / file), exist_ok=True)
        (tmp_path / "clips" / file).touch()
    (example,) = read(R1 | {"audio_path": name}, audio_dir=str(tmp_path / "clips"))
    named = os.path.expanduser(os.path.join(tmp_path / "clips", name))
    wanted = named if found is None else str(tmp_path / "clips" / (found or files[0]))
    assert os.path.normpath(example.audio) == os.path.normpath(wanted)


def test_two_rows_never_share_a_clip_that_one_of_them_lacks(read, tmp_path):
    (tmp_path / "Sound_AQA_clothoaqa").mkdir()
    (tmp_path / "Sound_AQA_clothoaqa" / "0001.wav").touch()
    rows = [AIR | dict(path="0001.wav", task_name="Sound_AQA", dataset_name=d) for d in ("clothoaqa", "avqa")]
    for folder in (tmp_path, tmp_path / "Sound_AQA_clothoaqa"):
        found = [os.path.isfile(e.audio) for e in read(rows, audio_dir=str(folder))]
        assert found == [True, False]


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
    (tmp_path / "a.wav").touch()
    assert read(dict(audio="x/a.flac", question="?"))[0].audio == str(tmp_path / "x" / "a.flac")


def test_several_clips_are_found_one_by_one(read, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.flac").touch()
    assert read(PRO)[0].audio == [str(tmp_path / "data" / "a.wav"), str(tmp_path / "data" / "b.flac")]


def test_a_folder_of_sounds(tmp_path):
    """Labelled by the innermost folder that says something, or by the name; ids differ; other files do not matter."""
    for name in (
        "dog bark/1.wav",
        "cat/1.wav",
        "train/animals/Cow-Moo_02/x.FLAC",
        "wavs/dog_howl_01.mp3",
        "cat/notes.txt",
        "cat/._2.wav",
        "Siren.ogg",
    ):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).touch()
    examples = Examples(str(tmp_path / "s"))
    labels = {os.path.relpath(e.audio, tmp_path / "s"): e.choices[e.answer] for e in examples}
    assert labels == {
        "dog bark/1.wav": "dog bark",
        "cat/1.wav": "cat",
        "train/animals/Cow-Moo_02/x.FLAC": "cow moo",
        "wavs/dog_howl_01.mp3": "dog howl",
        "Siren.ogg": "siren",
    }
    assert {e.meta["label"]: e.meta["family"] for e in examples} == {
        "dog bark": "dog",
        "cat": "cat",
        "cow moo": "animals",
        "dog howl": "dog",
        "siren": "siren",
    }
    assert (
        len({e.id for e in examples}) == 5 and str(examples) == f"{tmp_path / 's'}: labels format, 5 examples"
    )
    assert all(len(set(e.choices)) == 4 for e in examples)
    for i, e in enumerate(examples):
        assert examples.where(i) == f"{tmp_path / 's'}:{os.path.relpath(e.audio, tmp_path / 's')}"


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "holds neither sounds"),
        (["a.txt"], "holds neither sounds"),
        (["dog/1.wav", "dog/2.wav"], "do not tell them apart"),
        (["24 bus/1.wav", "7 bus/1.wav", "car/1.wav"], "24 bus and 7 bus .*'bus'; merge"),
        (["1.wav", "2.wav"], "do not tell them apart"),
    ],
)
def test_folders_that_tell_nothing(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        Examples(str(tmp_path))


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
    "high.wav": dict(rate_hz=192000, subtype="PCM_32"),
    "an mp3.wav": dict(format="MP3"),
    None: dict(subtype="DOUBLE"),
}


@pytest.mark.parametrize("kind", ["Audio", "struct", "bytes", "saved", "folder"])
def test_clips_inside_parquet(tmp_path, datasets, monkeypatch, kind):
    """They are heard, and their bytes are not read before that."""
    import pyarrow
    import pyarrow.parquet

    n = len(SOUNDS)
    clips = [{"bytes": sound(**how), "path": name} for name, how in SOUNDS.items()]
    table = dict(
        id=[f"r{i}" for i in range(n)],
        audio=[c["bytes"] for c in clips] if kind == "bytes" else clips,
        question=["Which? 犬"] * n,
        choices=[["(A) a", "(B) b", "(C) A"]] * n,
        answer=["(C) A"] * n,
        extra=[{"x": [i]} for i in range(n)],
    )
    path = str(tmp_path / "a.json")
    if kind in ("Audio", "saved"):
        table = datasets.Dataset.from_dict(table).cast_column("audio", datasets.Audio(decode=False))
        table.save_to_disk(path) if kind == "saved" else table.to_parquet(path)
    else:
        if kind == "folder":
            os.mkdir(path)
        pyarrow.parquet.write_table(
            pyarrow.table(table), os.path.join(path, "train.parquet") if kind == "folder" else path
        )
    with monkeypatch.context() as m:
        m.setattr(data.Embedded, "read", lambda self: pytest.fail("the bytes were read"))
        examples = Examples(path)
        read = list(examples)
        data.scan(examples)
    assert str(examples) == f"{path}: Hub format, {n} examples" and examples.where(2) == f"{path}:row 3"
    wanted = data.load_audio(sound())[0]
    for i, (e, clip) in enumerate(zip(read, clips)):
        assert (e.id, e.question, e.choices, e.answer) == (f"r{i}", "Which? 犬", ["a", "b", "A"], 2)
        assert e.meta == {"extra": {"x": [i]}}
        assert e.audio.read() == clip["bytes"] and e.audio.path == (
            clip["path"] or "" if kind != "bytes" else ""
        )
        wave, cut = data.load_audio(e.audio)
        assert not cut and abs(len(wave) - 16000) <= 1, clip["path"]
        assert np.abs(wave[1000:15000] - wanted[1000:15000]).max() < 0.02, clip["path"]


@pytest.mark.parametrize("name", FIRST)
def test_every_format_may_come_as_parquet(tmp_path, read, datasets, name):
    """The same fields as from JSON lines, wherever arrow keeps them."""
    rows = [r | {k: v for k, v in (("rubric", None), ("meta", None)) if k in r} for r in rows_of(name)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p"))
    examples = Examples(str(tmp_path / "p"))
    assert examples.format == name
    assert list(examples) == list(read(rows))
    assert examples.where(0) == f"{tmp_path}/p:row 1"


@pytest.mark.parametrize(
    "row, name",
    [
        (dict(MMAU_HUB, context={}), "MMAU (Hub)"),
        (dict(MMSU, audio={}), "MMSU"),
        (dict(PROCESSED, audio={}), "avqa-processed"),
        (dict(question="?", audio={}), "own"),
        (dict(audio={}, caption="rain"), "captions"),
    ],
)
def test_formats_with_their_clips_inside(tmp_path, datasets, row, name):
    rows = [
        {k: {"bytes": sound(channels=n), "path": None} if v == {} else v for k, v in row.items()}
        for n in (1, 2)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p"))
    examples = Examples(str(tmp_path / "p"))
    assert examples.format == name and len(examples) == 2
    assert [len(data.load_audio(e.audio)[0]) for e in examples] == [16000, 16000]
    assert (
        examples[0].question
        == (row.get("instruction") or row.get("question") or "Describe the sound.").split("\nCh")[0]
    )


def test_paths_inside_parquet_are_found_as_others_are(tmp_path, datasets, monkeypatch):
    """A clip without bytes is a path, relative to the file or --audio_dir and not to where one happens to stand."""
    monkeypatch.chdir("/")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(sound())
    rows = [dict(audio={"bytes": None, "path": "a.wav"}, question="?", choices=["x", "y"], answer="y")]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "p"))
    for folder in ("", str(tmp_path / "clips")):
        (example,) = Examples(str(tmp_path / "p"), folder)
        assert len(data.load_audio(example.audio)[0]) == 16000


def parquet(path, **columns) -> Examples:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), str(path))
    return Examples(str(path))


@pytest.mark.parametrize("null", [None, {"bytes": None, "path": None}])
def test_a_null_clip_inside_parquet_is_refused(tmp_path, datasets, null):
    """In the first row, too, where it says nothing of the format."""
    clips = [null, {"bytes": sound(), "path": None}, null]
    examples = parquet(
        tmp_path / "p", audio=clips, question=["?"] * 3, choices=[["x", "y"]] * 3, answer=["y"] * 3
    )
    assert examples.format == "Hub" and examples[1].audio
    for i in (0, 2):
        with pytest.raises(DataError, match=f'p:row {i + 1}: field "audio": missing'):
            examples[i]


def test_embedded_clips_are_known_by_their_content(tmp_path, datasets):
    """And not by a path that is the same in all rows; a clip that stands in several rows is one."""
    clips = [{"bytes": sound(rate_hz=8000 + i % 40), "path": "audio.wav"} for i in range(60)]
    examples = parquet(
        tmp_path / "p", audio=clips, question=["?"] * 60, choices=[["x", "y"]] * 60, answer=["y"] * 60
    )
    keys = data.scan(examples)
    assert len(set(keys)) == 40 and keys[0] == keys[40] and all(data.held_out(keys, 9))


def test_captions_of_an_embedded_clip(tmp_path, datasets):
    clips = [{"bytes": sound(rate_hz=8000 + i % 2), "path": "audio.wav"} for i in range(4)]
    examples = parquet(tmp_path / "p", audio=clips, caption=["a", "b", "c", "d"])
    assert [(e.id, e.target) for e in examples] == [("1", ["a", "c"]), ("2", ["b", "d"])]


def test_several_embedded_clips_a_question(tmp_path, datasets):
    clip = {"bytes": sound(), "path": None}
    lists = [
        [clip, {"bytes": sound(channels=2), "path": "b.wav"}],
        [clip],
        [clip, {"bytes": None, "path": None}],
    ]
    examples = parquet(
        tmp_path / "p", audio=lists, question=["?"] * 3, choices=[["x", "y"]] * 3, answer=["y"] * 3
    )
    assert [len(data.load_audio(clip)[0]) for e in examples[:2] for clip in e.clips] == [16000] * 3
    with pytest.raises(DataError, match='row 3: field "audio": expected a path, found None'):
        examples[2]


def test_bad_rows_of_parquet_are_named(tmp_path, datasets):
    path, row = (
        str(tmp_path / "p"),
        dict(audio={"bytes": b"text", "path": "a.wav"}, question="?", choices=["x", "y"]),
    )
    rows = [row | {"answer": a} for a in ("y", "z", "x")]
    datasets.Dataset.from_list(rows).to_parquet(path)
    examples = Examples(path)
    with pytest.raises(DataError, match=f'^{path}:row 2: field "answer"'):
        examples[1]
    with pytest.raises(data.AudioError, match="row 3: a.wav.*not a readable sound"):
        data.load_audio(examples[2].audio)
    with open(path, "rb") as f:
        content = f.read()
    for i, bad in enumerate((content[: len(content) // 2], b"PAR1", b"PAR1" * 99, content[:4] + content[9:])):
        (tmp_path / f"bad {i}").write_bytes(bad)
        with pytest.raises(DataError, match=f"^{tmp_path}/bad {i}: could not be loaded"):
            Examples(str(tmp_path / f"bad {i}"))


@pytest.mark.parametrize(
    "name",
    [
        "nobody/none",
        "nobody/none:dev",
        "nobody/none/en:dev",
        "nobody/none:v05.15.25",
        "nobody/MMAU-v05.15.25",
        "nobody/x/v1.0",
        "nobody/none:train[:100]",
        "no-b.o_dy/n.o-ne",
    ],
)
def test_a_hub_id_that_cannot_be_had(tmp_path, datasets, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as e:
        Examples(name)
    assert str(e.value).startswith(f"{name}: could not be loaded") and "org/name[/config][:split]" in str(
        e.value
    )


def test_hub_ids_are_taken_apart(datasets, monkeypatch, tmp_path):
    rows, asked = datasets.Dataset.from_list([dict(audio=None, question="?")]), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kw: asked.append((*args, kw["split"])) or rows
    )
    for name in ("o/n", "o/n:dev", "o/n/en", "o/n/en:dev", "o/n-v1.25", "o/n/v1.0:train[:10%]"):
        assert len(Examples(name)) == 1
    assert asked == [
        ("o/n", "train"),
        ("o/n", "dev"),
        ("o/n", "en", "train"),
        ("o/n", "en", "dev"),
        ("o/n-v1.25", "train"),
        ("o/n", "v1.0", "train[:10%]"),
    ]
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
    """With torch, soundfile and soxr out of reach and every clip a pipe that would block, all formats read."""
    os.mkfifo(tmp_path / "x.wav")
    for i, name in enumerate(FIRST):
        rows = [
            {
                k: "x.wav"
                if k in ("audio_path", "audio_id", "audio", "file_name")
                else "./" * j + "x.wav"
                if k == "file"
                else v
                for k, v in row.items()
            }
            for j, row in enumerate(rows_of(name))
        ]
        (tmp_path / f"{i}").write_bytes(lines(*rows))
    code = textwrap.dedent("""
        import sys
        blocked = dict.fromkeys(("torch", "transformers", "soundfile", "soxr", "datasets"))
        sys.modules.update(blocked)
        import data
        print(sum(len(list(data.Examples(name))) for name in sys.argv[1:]))""")
    paths = [str(tmp_path / f"{i}") for i in range(len(FIRST))]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{len(FIRST) + 2}\n", done.stderr


def test_rows_are_parsed_when_they_are_asked_for(read):
    """One line, and only that; nothing is remembered."""
    for name in (
        "R1-AQA",
        "AVQA",
        "AVRT",
        "own",
        "AudioMCQ",
        "avqa-processed",
        "MMAR",
        "AIR-Bench",
        "MMSU",
        "ARC",
        "Countdown",
    ):
        examples, parsed = read(lines(*rows_of(name) * 50, b"{", *rows_of(name))), []
        examples.rows.parse = lambda raw, where, parsed=parsed: (
            parsed.append(raw) or data.parse_json(raw, where)
        )
        assert len(examples) == 52 and examples[51] is not examples[51] and examples[51].question
        assert parsed == [lines(rows_of(name)[-1])] * 3


MANY = int(1e6) if SLOW else 50_000


@pytest.mark.parametrize(
    "name", ["own", "list", "R1-AQA", "MMAU", "MMAU-Pro", "captions", "labels", "Clotho-AQA", "csv"]
)
def test_a_million_lines_are_ready_in_20_s_and_2_gib(tmp_path, name):
    """On top of what an empty process takes. The smaller default: in proportion, in twice the time, on a busy machine."""
    path = str(tmp_path / "many")
    rows = rows_of("own" if name == "list" else "labels" if name == "csv" else name)
    kinds = [f"label {i}" for i in range(300)]
    with open(path, "w", encoding="utf-8") as f:
        f.write("[" if name == "list" else "file,label\n" if name == "csv" else "")
        for i in range(MANY):
            row, k = dict(rows[i % len(rows)]), str(i // len(rows))
            row |= {"file": f"{i}"} if "file" in row else {}
            row |= (
                {"file_name": k}
                if "file_name" in row
                else {"id": k}
                if "id" in row
                else ({"ytid": k} if "ytid" in row else {})
            )
            row |= {"label": kinds[i % 300]} if "label" in row else {}
            f.write(
                f"{i}.wav,{row['label']}\n"
                if name == "csv"
                else json.dumps(row) + (",\n" if name == "list" else "\n")
            )
        f.seek(f.tell() - 2)
        f.write("]" if name == "list" else "")
    code = textwrap.dedent("""
        import re, sys, time, data
        peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
        before, begin = peak(), time.process_time()
        examples = data.Examples(sys.argv[1])
        print(len(examples), time.process_time() - begin, (peak() - before) / 2**20)
        for i in (0, 1, len(examples) // 2, -1): examples[i].question""")
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    n, seconds, gib = map(float, done.stdout.split())
    print(f"{name}: {n:.0f} examples, {seconds:.1f} s, {gib:.2f} GiB")
    assert n >= MANY // 3 - 1 and seconds < (20 if SLOW else 40) * MANY / 1e6 and gib < 2 * MANY / 1e6


# ---- fuzzing

ODD = [
    json.dumps(value)
    for value in (
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
        '"x"',
        "nan",
        "inf",
        "1e999",
        "-5",
        '["Audio"]',
        '["Audio", ["x"]]',
        '["Audio", null, {}]',
        '["Sound \\ud800"]',
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
        ["(A) a", "(B) b"],
        ["A", "A"],
        [[]],
        [["a"], ["b"]],
        [{}],
        [math.nan],
        {"label": ["A", "B"], "text": ["x", "y"]},
        {"label": 5, "text": None},
        {"bytes": None},
        {"stem": "?", "choices": [{}]},
        [{"label": "A", "text": "x"}] * 2,
        {"a": {"b": [1]}},
        ["\ud800", "b"],
        ["x"] * 30,
        "x.wav",
        ["a.wav", None],
    )
]
PIECES = [
    b"[",
    b"{",
    b"}",
    b"]",
    b"\n",
    b"\r",
    b'"',
    b"\\ud800",
    b"\\",
    b"\0",
    b"null",
    b"1e999",
    b"NaN",
    b"\xff",
    b"\xf0\x9f",
    BOM,
    b",",
    b";",
    b"\t",
    b":",
    b"-",
    b"true",
    b"0" * 5000,
    b"{" * 50,
    *(bytes([i]) for i in range(32, 127, 12)),
]
KEYS = sorted(
    {k for name in FIRST for row in rows_of(name) for k in row}
    | {"start", "family", "description", "caption_2"}
)
TABLES = {
    "Clotho-AQA CSV": "file_name,QuestionText,answer,confidence\n"
    + "".join(f'{i}.wav,"Is it, 犬?",{a},yes\n' for i in range(2) for a in ("yes", "no", "yes")),
    "captions CSV": 'youtube_id,start_s,caption\na,1,"x, y"\nb,2,z\n',
    "labels CSV": 'file;label\na.wav;dog\nb.wav;"c\n d"\n',
    "VGGSound CSV": 'ab,30,"dog, big",train\ncd,40,cat,test\n',
    "TSV": "path\tdescription\na.wav\tx\nb.wav\t\n",
}


def mutate_row(rng, row: dict) -> dict:
    row = json.loads(json.dumps(row))
    for _ in range(rng.choice([1, 1, 2, 3])):
        place, key = row, rng.choice(KEYS) if rng.random() < 0.1 else rng.choice(list(row) or KEYS)
        while (
            rng.random() < 0.5
            and isinstance(place, dict)
            and isinstance(place.get(key), dict | list)
            and place[key]
        ):
            place = place[key]
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if rng.random() < 0.15:
            place.pop(key, None) if isinstance(place, dict) else place.pop(key)
        else:
            place[key] = json.loads(rng.choice(ODD))
    return row


def mutate_bytes(rng, content: bytes) -> bytes:
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        content[at : at + rng.choice([0, 0, 1, 1, 30, 300])] = rng.choice(PIECES)
    return bytes(content)


def look_at(examples: Examples) -> Counter:
    """Read all lines; what is read must be fit for training or refused by line."""
    outcome = Counter()
    for i in range(len(examples)):
        try:
            e = examples[i]
        except DataError as error:
            item = examples.items[i]
            places = tuple(map(examples.rows.where, item if isinstance(item, tuple) else [item]))
            assert str(error).startswith(places) and len(str(error)) < 3000 and str(error).isprintable()
            outcome["refused"] += 1
            continue
        " ".join(
            [e.question, *e.choices, *([e.target] if isinstance(e.target, str) else e.target or [])]
        ).encode()
        assert (
            e.question.strip()
            and len(e.choices) != 1
            and all(c.strip() for c in e.choices)
            and type(e.id) is str
        )
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


LINES = int(os.environ.get("OMNI_FUZZ", 100_000))
EAGER = [
    n for n, f in data.FORMATS.items() if n in FIRST and (f.group or f.skip or f.pool or f.about)
]  # read when opened


@pytest.mark.parametrize("name", [*FIRST, *TABLES])
def test_mutated_lines_are_read_or_refused(tmp_path, watchdog, name):
    """100,000 over all formats: values of other kinds, lost and foreign keys, damaged bytes; no traceback, no hang."""
    rng, outcome, crashes, path = random.Random(name), Counter(), {}, tmp_path / "file"
    rows = rows_of(name) if name in FIRST else None
    per_file = 1 if name in (*EAGER, *TABLES) else 500
    n_lines = (
        LINES // 50
        if per_file == 1
        else LINES * (50 - len(EAGER) - len(TABLES)) // 50 // (len(FIRST) - len(EAGER)) + 1
    )

    def mutated() -> bytes:
        if name in TABLES:
            return mutate_bytes(rng, TABLES[name].encode())
        row = mutate_row(rng, rng.choice(rows))
        content = json.dumps(row, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
        return mutate_bytes(rng, content) if rng.random() < 0.3 else content

    def look(content: bytes) -> Counter:
        path.write_bytes(content)
        watchdog(20)
        try:
            examples = Examples(str(path))
            assert (
                str(examples).startswith(f"{path}: ") and len(str(examples)) < 3000 and str(examples).encode()
            )
            return look_at(examples)
        except DataError as e:
            if not (str(e).startswith(f"{path}:") and len(str(e)) < 3000 and str(e).isprintable()):
                crashes.setdefault(f"message {str(e)!r:.300}", content[-300:])
            return Counter(refused=1)
        except Exception as e:  # what no user should see
            crashes.setdefault(f"{type(e).__name__}: {e!s:.80}", content[-300:])
            return Counter()

    for n in range(0, n_lines, per_file):
        some = [mutated() for _ in range(per_file)]
        outcome += look(some[0] if name in TABLES else lines(*rows, *some))
        if name in FIRST and n % 10 == 0:
            look(lines(some[0], *rows))  # which format is it?
    assert not crashes, "\n".join(f"{what}: {content!r}" for what, content in crashes.items())
    assert min(outcome["read"], outcome["refused"]) > n_lines // 50, outcome
