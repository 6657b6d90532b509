"""Time-stamped events to questions and chains of thought: what is asked and what is not, what of a chain is accepted, which
file a question goes to, and that kills and limits are those of `generate`. The server is that of test_generate.py."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import test_generate
from test_generate import server  # noqa: F401 - a fixture

import data
import reward
from data import DataError, Example, Examples, UserError

POOL = ["Rain", "Speech", "Cat", "Church bell", "Engine", "Violin"]

# ---------------------------------------------------------------------------------------------------------------------
# The server


class Server(test_generate.Server):
    """Writes a chain on what decides, and calls everything good, unless a caption of the clip says mode=..."""

    def respond(self, request, head):
        system, prompt = (m["content"] for m in request["messages"])
        writes, said = system == data.CHAINER, prompt.partition("Thoughts: ")[2]
        mode = (re.findall(r"mode=(\w+)", prompt) or [""])[0]
        mode = (
            ["", "babble", "bad_question", "poor", "late"][request["seed"] % 5] if mode == "mixed" else mode
        )
        wait_s = float((re.findall(r"slow=([\d.]+)", prompt) or [0])[0])
        self.log.append(dict(prompt=prompt, writes=writes, said=said, **request))
        if mode == "broken" or mode == "no_judge" and not writes:
            return 500, "", {"error": {"message": "no good"}}, 0
        right, spans = (re.search(rf"{what}: (.*)", prompt)[1] for what in ("Right choice", "Decided in"))
        parts = ", and ".join(
            f"in <seg>{a}, {b}</seg> it can be heard" for a, b in re.findall(r"([\d.]+) to ([\d.]+)", spans)
        )
        chain = f"I have to listen for what decides here, so I go there; {parts}. So what is asked for is {right}."
        reply = (
            {"chain": f"It is {right}." if mode == "babble" else chain}
            if writes
            else dict(
                reason=f"because {said[:9]}",
                question="bad" if mode == "bad_question" else "good",
                chain="bad" if mode == "poor" or said == "(none)" else "good",
            )
        )
        text = "no idea" if mode == "mute" and not writes else json.dumps(reply)
        finish = "length" if mode == "late" and writes else "stop"
        return (
            200,
            "",
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
                ],
                "usage": {"prompt_tokens": 500, "completion_tokens": 60, "total_tokens": 560},
            },
            wait_s,
        )


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    monkeypatch.setattr(test_generate, "Server", Server)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and sounds


def sound(path, seconds_long=10.0, seed=0):
    """A file of low rate: only its length matters."""
    os.makedirs(os.path.dirname(str(path)), exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds_long * 1000))
    soundfile.write(str(path), noise, 1000)


YARD = [
    (0.0, 9.0, "Wind"),
    (1.0, 2.0, "Bark"),
    (3.0, 4.5, "Siren"),
    (3.2, 3.9, "Bark"),
    (6.0, 6.5, "Door"),
    (7.0, 7.5, "Bark"),
]


@pytest.fixture
def table(tmp_path):
    """n clips c00.wav, ... with the same events; their captions say `extra(i)`. -> (path of the table, of the captions)"""

    def table(n=6, extra=lambda i: "", events=YARD):
        for i in range(n):
            sound(tmp_path / "clips" / f"c{i:02d}.wav", seed=i)
        rows = [f"c{i:02d}.wav\t{a}\t{b}\t{label}" for i in range(n) for a, b, label in events]
        rows += [
            f"z.wav\t1\t2\t{label}" for label in POOL
        ]  # which has no sound, and gives its labels to other clips' choices
        (tmp_path / "clips" / "events.tsv").write_text(
            "\n".join(["filename\tonset\toffset\tevent_label", *rows]) + "\n"
        )
        notes = [
            json.dumps(dict(audio=f"c{i:02d}.wav", captions=["a yard", f"clip {extra(i)}"])) for i in range(n)
        ]
        (tmp_path / "clips" / "captions.jsonl").write_text("\n".join(notes) + "\n")
        return str(tmp_path / "clips" / "events.tsv"), str(tmp_path / "clips" / "captions.jsonl")

    return table


@pytest.fixture
def make(server, tmp_path):  # noqa: F811
    """`relisten` in this process; `.paths(name)`: out, rl, rejects; `.files(name)`: their bytes; `.rows(name)`: their lines."""

    def paths(name="a"):
        return [str(tmp_path / f"{name}{part}.jsonl") for part in ("", "_rl", "_rejects")]

    def make(table, name="a", seed=0, per_clip=2, **options):
        questions = data.TimedQuestions(table[0], captions=table[1], seed=seed, per_clip=per_clip)
        return data.relisten(
            questions, *paths(name), options.pop("model", "m"), base_url=server.url, **options
        )

    make.paths, make.server = paths, server
    make.files = lambda name="a": [open(p, "rb").read() for p in paths(name)]
    make.rows = lambda name="a": [
        [json.loads(line) for line in content.splitlines()] for content in make.files(name)
    ]
    return make


def clip(events, name="x"):
    return Example(name, "/sounds/x.wav", "", meta=dict(events=events, duration_s=10.0))


def possible(kind, events):
    """{(question, right choice): (wrong choices that are surely heard or numbers, spans)}"""
    sounds = data.merge(events)
    clear = [x for x in sounds if not any(data.alike(x, other) for other in sounds if other != x)]
    return {
        (q, right): (sorted(wrong), spans)
        for q, right, wrong, spans in data.KINDS[kind](sounds, clear)
        if wrong
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


def test_order():
    """Wind at 0, Bark at 1, Siren at 3, Bark at 3.2, Door at 6, Bark at 7. Once heard: Wind, Siren, Door; but the second Bark
    begins 0.2 s after the Siren, so nothing is asked after the Siren, and the Siren is no answer."""
    after, before = data.ASKED["after"], data.ASKED["before"]
    assert possible("order", YARD) == {
        (after.format("Wind"), "Bark"): (["Door", "Siren"], [[0, 9], [1, 2]]),
        (after.format("Door"), "Bark"): (["Siren", "Wind"], [[6, 6.5], [7, 7.5]]),
    }
    steps = [(1.0, 1.5, "A"), (2.0, 2.5, "B"), (4.0, 4.5, "C")]
    assert possible("order", steps) == {
        (after.format("A"), "B"): (["C"], [[1, 1.5], [2, 2.5]]),
        (after.format("B"), "C"): (["A"], [[2, 2.5], [4, 4.5]]),
        (before.format("B"), "A"): (["C"], [[2, 2.5], [1, 1.5]]),
        (before.format("C"), "B"): (["A"], [[4, 4.5], [2, 2.5]]),
    }


def test_count():
    """Two barks that touch are one; the choices are four neighbouring numbers from 1 on."""
    events = [
        (1.0, 2.0, "Bark"),
        (2.05, 2.5, "Bark"),
        (4.0, 4.2, "Bark"),
        (5.0, 5.1, "Bell"),
        (0.0, 9.0, "Wind"),
    ]
    sounds = data.merge(events)
    found = sorted((q, right, wrong, spans) for q, right, wrong, spans in data.count(sounds, list(sounds)))
    bark, bell = (data.ASKED["count"].format(x) for x in ("Bark", "Bell"))
    spans = [[1.0, 2.5], [4.0, 4.2]]
    assert found == [
        (bark, "2", ["1", "3", "4"], spans),
        (bark, "2", ["3", "4", "5"], spans),
        (bell, "1", ["2", "3", "4"], [[5.0, 5.1]]),
    ]


def test_duration():
    """In all: Wind 9 s, Bark 2.2 s, Siren 1.5 s, Door 0.5 s. 2.2 is less than 1.5 times 1.5."""
    found, longest, shortest = possible("duration", YARD), data.ASKED["longest"], data.ASKED["shortest"]
    assert found == {
        (longest, "Wind"): (["Bark", "Door", "Siren"], [[0, 9]]),
        (longest, "Siren"): (["Door"], [[3, 4.5]]),
        (longest, "Bark"): (["Door"], [[1, 2], [3.2, 3.9], [7, 7.5]]),
        (shortest, "Door"): (["Bark", "Siren", "Wind"], [[6, 6.5]]),
    }


def test_overlap():
    """What is clearly apart is a wrong choice; the span is where both are heard."""
    asked = data.ASKED["overlap"]
    assert possible("overlap", YARD) == {
        (asked.format("Siren"), "Bark"): (["Door"], [[3.2, 3.9]]),
        (asked.format("Siren"), "Wind"): (["Door"], [[3, 4.5]]),
        (asked.format("Bark"), "Siren"): (["Door"], [[3.2, 3.9]]),
        (asked.format("Bark"), "Wind"): (["Door"], [[1, 2], [3.2, 3.9], [7, 7.5]]),
        (asked.format("Door"), "Wind"): (["Bark", "Siren"], [[6, 6.5]]),
    }


@pytest.mark.parametrize(
    "kind, events",
    [
        ("order", [(1.0, 2.0, "A"), (1.2, 3.0, "B"), (1.4, 5.0, "C")]),  # all begin at about the same time
        ("order", [(1.0, 2.0, "A"), (3.0, 4.0, "B"), (3.1, 5.0, "C")]),  # what is next?
        (
            "order",
            [(1.0, 2.0, "A"), (3.0, 4.0, "A"), (5.0, 6.0, "B"), (7.0, 7.5, "B")],
        ),  # after which of them?
        ("order", [(1.0, 2.0, "A"), (3.0, 4.0, "B")]),  # no wrong choice that is heard
        (
            "order",
            [(1.0, 2.0, "Dog"), (3.0, 4.0, "Speech"), (5.0, 6.0, "Male speech, man speaking")],
        ),  # two names of one sound
        ("count", [(1.0, 2.0, "A"), (2.2, 3.0, "A")]),  # once or twice?
        ("count", [(0.0, 6.0, "A"), (8.0, 8.1, "B"), (8.3, 8.4, "B")]),  # A never stops
        ("count", [(k, k + 0.5, "A") for k in range(9)]),
        ("count", [(1.0, 2.0, "bark"), (4.0, 5.0, "Bark")]),
        ("duration", [(0.0, 2.0, "A"), (3.0, 5.9, "B")]),  # 2.9 is less than 1.5 times 2
        ("overlap", [(0.0, 2.0, "A"), (1.6, 4.0, "B"), (6.0, 7.0, "C")]),  # only 0.4 s
        ("overlap", [(0.0, 2.0, "A"), (1.0, 4.0, "B"), (2.1, 7.0, "C")]),  # is C apart from A?
        ("overlap", [(0.0, 2.0, "A"), (3.0, 4.0, "B"), (6.0, 7.0, "C")]),
    ],
)
def test_what_is_not_clear_is_not_asked(kind, events):
    assert not possible(kind, events)


def test_what_may_be_two_names_of_one_sound_is_not_asked_about():
    events = [
        (0, 1, "Dog"),
        (2, 3, "Speech"),
        (4, 6, "Male speech, man speaking"),
        (7, 9.9, "Bell"),
        (7.5, 9.5, "Door"),
    ]
    asked = [q for seed in range(30) for q in data.questions_on(clip(events), POOL[:1] + POOL[2:], seed, 4)]
    assert len(asked) > 50 and not any("peech" in text for q in asked for text in (q.question, *q.choices))


def test_the_answer_is_right_on_a_grid_of_centiseconds():
    """Random clips, and every question on them answered again by looking at which sounds are on at each 10 ms; gaps under
    0.1 s are none."""
    rng, n, kinds = random.Random(1), 0, set()
    labels = [f"{a}{b}" for a in "KLMNPQ" for b in "aeiou"]
    for i in range(300):
        events = []
        for _ in range(rng.randint(2, 9)):
            start = rng.randrange(0, 900)
            events.append(
                (start / 100, min(1000, start + rng.randrange(10, 400)) / 100, rng.choice(labels[:7]))
            )
        on = {label: np.zeros(1002, int) for label in labels}
        for start, end, label in events:
            on[label][1 + round(start * 100) : 1 + round(end * 100)] = 1
        for row in on.values():
            stops, starts = np.flatnonzero(np.diff(row) < 0), np.flatnonzero(np.diff(row) > 0)
            for stop, start in zip(stops, starts[1:]):
                row[stop : start + 1] |= start - stop < 10
        begins = {label: np.flatnonzero(np.diff(row) > 0) for label, row in on.items()}
        for q in data.questions_on(clip(events, f"c{i}"), labels, 0, 4):
            named, right = (re.findall('"(.*)"', q.question) or [""])[0], q.choices[q.answer]
            wrong = [c for c in q.choices if c != right]
            n, kinds = n + 1, kinds | {q.meta["kind"]}
            assert len(set(q.choices)) == 4 and named not in q.choices
            if q.meta["kind"] == "count":
                assert int(right) == len(begins[named])
                continue
            assert any(on[c].any() for c in wrong)
            if q.meta["kind"] == "order":
                at = begins[named][0]
                times = {c: (begins[c] - at) * (1 if "after" in q.question else -1) for c in q.choices}
                first = min(t for t in times[right] if t > 0)
                assert first >= 30 and not any(0 < t < first + 30 for c in wrong for t in times[c])
            elif q.meta["kind"] == "duration":
                sums, sign = {c: int(on[c].sum()) for c in q.choices}, 1 if "longest" in q.question else -1
                assert all(
                    max(sums[c], sums[right]) >= 1.5 * min(sums[c], sums[right])
                    and (sums[right] - sums[c]) * sign > 0
                    for c in wrong
                )
            else:
                assert (on[named] & on[right]).sum() >= 50 and not any(
                    (on[named] & on[c]).any() for c in wrong
                )
                assert all(
                    (on[named] & on[right])[1 + round(a * 100) : 1 + round(b * 100)].all()
                    for a, b in q.meta["spans"]
                )
    assert n > 400 and kinds == set(data.KINDS)


def test_questions_depend_on_clip_and_seed_alone():
    first = data.questions_on(clip(YARD), POOL, 0, 4)
    assert [(q.question, q.choices) for q in first] == [
        (q.question, q.choices) for q in data.questions_on(clip(YARD[::-1]), POOL, 0, 4)
    ]  # the order of the rows is no matter
    assert [q.id for q in data.questions_on(clip(YARD), POOL, 0, 2)] == [q.id for q in first][:2]  # a prefix
    assert (
        sorted(q.id for q in first)
        == sorted(f"x {q.meta['kind']}" for q in first)
        == sorted(f"x {k}" for k in data.KINDS)
    )

    def many(seed):
        return [q for i in range(200) for q in data.questions_on(clip(YARD, f"c{i}"), POOL, seed, 4)]

    places = np.bincount([q.answer for q in many(0)], minlength=4)
    assert ((places - 200) ** 2 / 200).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    assert len({q.question for q in many(0)}) > 8 and [q.choices for q in many(0)] != [
        q.choices for q in many(1)
    ]


def test_choices_are_filled_up_by_labels_that_name_no_sound_of_the_clip():
    two = [(0.0, 4.0, "Bark"), (5.0, 6.0, "Door")]
    pool = ["Dog bark", "bark", "Door", "Rain", "Rain on surface", "Cat"]
    assert not data.questions_on(clip([*two, (7.0, 8.0, "Rain")]), ["Dog bark", "Rain on surface"], 0, 9)[
        1:
    ]  # but a count
    for seed in range(20):
        longest = [
            q for q in data.questions_on(clip(two), [*pool, "Bell"], seed, 9) if q.meta["kind"] == "duration"
        ]
        assert len(longest) == 1 and {"Bark", "Door"} < set(longest[0].choices)
        assert set(longest[0].choices) - {"Bark", "Door"} < {"Rain", "Rain on surface", "Cat", "Bell"}
        assert not {"Rain", "Rain on surface"} <= set(longest[0].choices)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def write(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return str(path)


def events_of(path, names=None):
    return {name: c.meta["events"] for name, c in data.read_events(data.open_rows(path), names or {}).items()}


def test_tables(tmp_path):
    """One table in the spellings that there are; rows of a clip apart; one clip in which nothing is heard."""
    wanted = {
        "a.wav": [(0.5, 1.25, "Dog bark"), (3.0, 4.0, "Rain")],
        "b.wav": [(0.0, 10.0, "Rain")],
        "c.wav": [],
    }
    rows = [
        ("a.wav", 0.5, 1.25, "Dog_bark"),
        ("b.wav", 0, 10, "Rain"),
        ("a.wav", 3, 4.0, " Rain "),
        ("c.wav", "", "", ""),
    ]
    for n, (header, mark) in enumerate(
        [
            ("filename onset offset event_label", "\t"),
            ("file,start,end,label", ","),
            ("Audio;Start_Time;End_Time;Class", ";"),
            ("# path,Onset,Offset,Category", ","),
        ]
    ):
        lines = [
            header.replace(" ", mark) if mark == "\t" else header,
            *(mark.join(map(str, r)) for r in rows),
        ]
        assert events_of(write(tmp_path / f"{n}.txt", *lines)) == wanted, header
    assert (
        events_of(
            write(tmp_path / "j.jsonl", *(dict(zip(("wav", "start_s", "end_s", "sound"), r)) for r in rows))
        )
        == wanted
    )


def test_audioset_strong(tmp_path):
    """Codes become names; the file of a segment is found by any of its usual names, and by no other."""
    ids = [
        "b0RFKhbpFJA_30000",
        "-0ABcdefgh1_0",
        "y_ABcdefgh2_120000",
        "y_ABcdefgh3_20000",
        "y_ABcdefgh4_20000",
        "y_ABcdefgh5_20000",
        "y_ABcdefgh6_20000",
    ]
    events = [(0, 1, "/m/05tny_"), (2, 9.8, "/t/dd00129"), (3, 4, "/m/04rlf")]
    rows = [f"{i}\t{a}\t{b}\t{code}" for a, b, code in events for i in ids]
    path = write(tmp_path / "strong.tsv", "segment_id\tstart_time_seconds\tend_time_seconds\tlabel", *rows)
    names = write(
        tmp_path / "mid_to_display_name.tsv",
        "/m/05tny_\tBark",
        "/t/dd00129\tOutside, rural",
        "/m/04rlf\tMusic",
        "/m/09x0r\tSpeech",
    )
    csv = write(
        tmp_path / "class_labels_indices.csv",
        "index,mid,display_name",
        '0,/m/05tny_,"Bark"',
        '1,/t/dd00129,"Outside, rural"',
        "2,/m/04rlf,Music",
    )
    for labels in (names, csv):
        read = events_of(path, data.display_names(labels))
        assert (
            read[ids[0]] == [(0, 1, "Bark"), (2, 9.8, "Outside, rural"), (3, 4, "Music")]
            and list(read) == ids
        )
    files = [
        "b0RFKhbpFJA_30000.wav",
        "deeper/Y-0ABcdefgh1_0.000_10.000.wav",
        "y_ABcdefgh2_120.flac",
        "Yy_ABcdefgh3.wav",
        "y_ABcdefgh4_20_30.wav",
        "y_ABcdefgh5_10.wav",
        "Yy_ABcdefgh6_20.wav",
        "y_ABcdefgh6_000020_x.wav",
        "y_ABcdefgh6_20_30.wav",
    ]
    for n, file in enumerate(files):
        sound(tmp_path / "clips" / file, seed=n)
    found = data.TimedQuestions(path, str(tmp_path / "clips"), names)
    assert [os.path.relpath(c.audio, tmp_path / "clips") for c in found.clips] == files[:5]
    assert (
        found.found["  no sound file"] == 1
        and found.found["  several sound files"] == 1
        and found.found["clips"] == 7
    )
    with pytest.raises(
        DataError, match=r"strong.tsv:2: field \"label\": /m/05tny_ is a code; give its name by --labels"
    ):
        data.TimedQuestions(path, str(tmp_path / "clips"))
    for bad in (str(tmp_path / "none.tsv"), path):
        with pytest.raises(DataError, match="mid_to_display_name.tsv"):
            data.display_names(bad if "none" in bad else write(tmp_path / "x.tsv", "a\tb"))


BENCH = dict(
    dataset="MusicBench",
    location="data/m1.wav",
    main_caption="A calm song.",
    alt_caption="",
    prompt_ch="G, Am.",
    beats=[[0.3, 9.0], [1, 2]],
    bpm=60,
    chords=["G", "Am", "N", "C#", "G"],
    chords_time=[0.4, 2.5, 4, 5.5, 7.25],
    key=["G", "major"],
    keyprob=[0.5],
)


def test_musicbench(tmp_path):
    """A chord lasts until the next, the last to the clip's end; N is none; captions come along."""
    path = write(
        tmp_path / "MusicBench_train.json",
        BENCH,
        BENCH | dict(location="data/m2.wav", chords=[], chords_time=[]),
    )
    sound(tmp_path / "data" / "m1.wav", 10.0)
    sound(tmp_path / "data" / "m2.wav", 10.0)
    questions = data.TimedQuestions(path, per_clip=4)
    assert questions.clips[0].meta == dict(
        events=[(0.4, 2.5, "G chord"), (2.5, 4, "Am chord"), (5.5, 7.25, "C# chord"), (7.25, 10, "G chord")],
        captions=["A calm song."],
        duration_s=10.0,
    )
    assert questions.found["clips"] == 2 and questions.found["  nothing clear to ask"] == 1
    kinds = {q.meta["kind"]: q for q in questions}
    assert (
        "count" in kinds and "overlap" not in kinds and len(kinds) == len(questions) == 1
    )  # three chords are no four choices
    for bad in (
        dict(chords_time=[1, 2]),
        dict(chords_time=[3, 2, 1, 4, 5]),
        dict(chords_time=[1, 2, 3, 4, "x"]),
        dict(chords="G"),
        dict(location=None),
    ):
        with pytest.raises(DataError, match=r"b.json:1: field \"(chords_time|location)\""):
            events_of(write(tmp_path / "b.json", BENCH | bad))


@pytest.mark.parametrize(
    "row, says",
    [
        ("a.wav\t2.0\t1.0\tBark", 'field "offset": 1.0 is not after the start, 2.0'),
        ("a.wav\t2.0\t2.0\tBark", "not after the start"),
        ("a.wav\tsoon\t2.0\tBark", "field \"onset\": expected seconds, found 'soon'"),
        ("a.wav\t0\tnan\tBark", 'field "offset"'),
        ("a.wav\t-1\t2\tBark", 'field "onset"'),
        ("a.wav\t1\tinf\tBark", 'field "offset"'),
        ("a.wav\t1\t\tBark", 'field "offset"'),
        ("a.wav\t1\t2\t", 'field "event_label": expected the name'),
        ("a.wav\t1\t2\t <> ", 'field "event_label"'),
        ("a.wav\t1\t2", "3 fields, expected the 4 columns"),
        ("a.wav\t1\t90000\tBark", 'field "offset"'),
    ],
)
def test_bad_rows_are_named(row, says, tmp_path):
    path = write(tmp_path / "t.tsv", "filename\tonset\toffset\tevent_label", "b.wav\t1\t2\tBark", row)
    with pytest.raises(DataError, match=f"t.tsv:3: {says}" if says[0] != "n" else says):
        events_of(path)


@pytest.mark.parametrize(
    "row, says",
    [
        (dict(audio="a.wav", onset=True, offset=2, label="x"), 'field "onset"'),
        (dict(audio="a.wav", onset=10**400, offset=2, label="x"), 'field "onset"'),
        (dict(audio="a.wav", onset=1, offset=[2], label="x"), 'field "offset"'),
        (dict(audio="a.wav", onset=1, offset=2, label=3), 'field "label": expected a text'),
        (dict(audio=None, onset=1, offset=2, label="x"), 'field "audio": expected a text'),
        (dict(audio="a.wav", onset=1, offset=2, label="\ud800"), 'field "label"'),
        (dict(audio="a.wav", onset=1, label="x"), 'field "offset.end.*missing; found only .*audio'),
        (dict(onset=1, offset=2, label="x"), 'field "segment_id.audio.*missing'),
    ],
)
def test_bad_objects_are_named(row, says, tmp_path):
    with pytest.raises(DataError, match=f"t.jsonl:1: {says}"):
        events_of(write(tmp_path / "t.jsonl", row))


def test_sounds_that_are_not_there(table, tmp_path):
    path, _ = table(4)
    os.remove(tmp_path / "clips" / "c01.wav")
    (tmp_path / "clips" / "c02.wav").write_bytes(b"not a sound")
    sound(tmp_path / "clips" / "c03.wav", 6.9)
    found = data.TimedQuestions(path).found
    assert found == {
        "clips": 5,
        "  no sound file": 2,
        "  sound file that cannot be read": 1,
        "questions": 2,
        "  sound file that ends before its events": 1,
    } | {k: 1 for k in found if k[2:] in data.KINDS}
    sound(tmp_path / "clips" / "c03.wav", 8.6)  # the wind goes on for 0.4 s more: cut there
    c03 = data.TimedQuestions(path).clips[1]
    assert c03.meta["duration_s"] == 8.6 and (0.0, 8.6, "Wind") in c03.meta["events"]
    with pytest.raises(
        DataError,
        match="none of the sounds of its 5 clips is in .*nowhere or its folders; the last was looked "
        "for as z .*give --audio_dir",
    ):
        data.TimedQuestions(path, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="there is nothing to ask: .*nothing clear to ask': 1"):
        data.TimedQuestions(table(1, events=YARD[:1])[0])
    with pytest.raises(DataError, match="entry 1: expected a JSON object, found 1"):
        data.TimedQuestions(write(tmp_path / "list.json", "[1]"))
    with pytest.raises(DataError, match="holds no event"):
        data.TimedQuestions(write(tmp_path / "empty.tsv", "filename\tonset\toffset\tlabel"))


def test_captions_join_by_name(table, tmp_path):
    """Whatever the folder and the ending; where two sounds of the file have the name, neither is meant."""
    path, _ = table(3)
    rows = [
        dict(audio="c00.flac", caption="one"),
        dict(audio="x/c01.wav", caption="two"),
        dict(audio="y/c01.wav", caption="three"),
        dict(audio="x/c02.wav", captions=["four", "five"]),
    ]
    clips = data.TimedQuestions(path, captions=write(tmp_path / "other.jsonl", *rows)).clips
    assert [c.meta.get("captions") for c in clips] == [["one"], None, ["four", "five"]]
    with pytest.raises(DataError, match="q.jsonl: holds no captions"):
        data.TimedQuestions(
            path, captions=write(tmp_path / "q.jsonl", dict(audio="c00.wav", question="Why?"))
        )


# ---------------------------------------------------------------------------------------------------------------------
# Chains of thought


ASKED = Example(
    "x",
    "/x.wav",
    'Which of these sounds is the next to begin after "Door" begins?',
    ["Bell", "Wind", "Bark", "Rain"],
    2,
    meta=dict(kind="order", spans=[[6, 6.5], [7, 7.5]], events=YARD, duration_s=10.0),
)
HEAD, TAIL = "I wait for the door, and in ", "it slams, so what comes next and answers is the bark. Bark"
SEG = "<seg>6, 6.5</seg> "
CHAINS = [  # chain, reason
    (HEAD + SEG + TAIL, ""),
    (HEAD + "<seg>6.0,6.5</seg> " + TAIL, ""),
    (HEAD + "<seg>6, 6.5</seg>, " + TAIL, ""),
    (HEAD + "<seg>5.5, 10.01</seg> and " + TAIL, ""),
    (HEAD + "<seg>0, 1</seg> nothing, in " + SEG + TAIL, ""),  # one that decides is enough
    (HEAD + SEG + "there is no bell and no rain, just the door.\nNext is a *bark*.", ""),
    (HEAD + " ".join([SEG + "and"] * 8) + TAIL, ""),
    (HEAD + SEG + "a table is hit, so it is the bark", ""),
    ("So it is Bark", "chain length"),
    (HEAD + SEG + "so " * 300 + "Bark", "chain length"),
    (HEAD + "\x00" + SEG + TAIL, "control character"),
    (HEAD + "\ud800" + SEG + TAIL, "half a character"),
    (HEAD + TAIL, "no segment"),
    (HEAD + " ".join([SEG + "and"] * 9) + TAIL, "too many segments"),
    (HEAD + (SEG + "and ") * 100 + TAIL, "too many segments"),
    (HEAD + (SEG + "and ") * 10_000 + TAIL, "chain length"),
    *(
        (HEAD + seg + " " + SEG + TAIL, "broken tag")
        for seg in (
            "<seg>6, 6.5",
            "<seg>nan, 6.5</seg>",
            "<seg>6, inf</seg>",
            "<seg>6</seg>",
            "<seg>6, 7, 8</seg>",
            "<seg>6-7</seg>",
            "<seg>-1, 2</seg>",
            "<seg>1e0, 2</seg>",
            "<SEG>6, 7</SEG>",
            "<seg>٦, ٧</seg>",
            "<seg>6 s, 7 s</seg>",
            "<seg>6., 7</seg>",
            "<seg>000006, 7</seg>",
            "<seg></seg>",
            "<seg><seg>6, 7</seg></seg>",
            "</seg>",
            "<think>",
            "<answer>Rain</answer>",
            "1 < 2",
        )
    ),
    (HEAD + SEG + "</think>" + TAIL, "no JSON object"),  # of the reply that is what follows the thoughts
    (HEAD + "<seg>6, 10.2</seg> " + TAIL, "segment outside the clip"),
    (HEAD + SEG + "and <seg>99998, 99999</seg> " + TAIL, "segment outside the clip"),
    (HEAD + "<seg>6.5, 6</seg> " + TAIL, "segment too short"),
    (HEAD + "<seg>6, 6.1</seg> " + TAIL, "segment too short"),
    (HEAD + "<seg>1, 2</seg> " + TAIL, "no segment that decides"),
    (HEAD + "<seg>6.5, 7</seg> " + TAIL, "no segment that decides"),
    (HEAD + SEG + "It slams, so what comes next and answers is Bark", "new sentence after a segment"),
    (HEAD + SEG + "\n  É slams, so what comes next and answers is Bark", "new sentence after a segment"),
    (
        "I wait, and it is after the door slams shut: Bark, in <seg>6, 6.5</seg>",
        "new sentence after a segment",
    ),
    (HEAD + "<seg>6, 6.5</seg><seg>7, 7.5</seg> " + TAIL, "new sentence after a segment"),
    *(
        (HEAD + SEG + f"{said}, so the next one is Bark", "mentions the notes")
        for said in (
            "as the annotation says",
            "by its timestamps",
            "where the label is Door",
            "labelled so",
            "in the metadata",
            "as captioned",
            "in the caption",
            "the list says so",
            "as described",
            "a time-stamped door",
            "of the given events",
            "according to it",
        )
    ),
    (HEAD + SEG + "it slams, so what comes next is a rain", "ends at another choice"),
    (HEAD + SEG + "it slams, then comes the Bark, and not the Bell", "ends at another choice"),
    (HEAD + SEG + "it slams, and something else follows it at once", "ends at another choice"),
]


@pytest.mark.parametrize("chain, reason", CHAINS)
def test_chains(chain, reason):
    """And a chain that passes is a target that our rewards pay in full."""
    row, found = data.read_chain(json.dumps({"chain": chain}), ASKED)
    assert found == reason and bool(row) == (not reason)
    if row:
        target = f"<think>{row['chain']}</think><answer>Bark</answer>"
        assert reward.accuracy(target, ASKED) == reward.think_format(target, ASKED) == 1
        assert not re.search(r"</seg>\s*[A-Z<]", target) and "\n" not in target


def test_every_reason_of_a_chain_has_a_case():
    source = open(data.__file__, encoding="utf-8").read().split("def chain_fault")[1].split("\ndef ")[0]
    listed = re.findall(r'^        \("([a-z ]+)", ', source, re.MULTILINE)
    assert set(listed) == {reason for _, reason in CHAINS} - {"", "no JSON object"} and len(listed) == 12


@pytest.mark.parametrize(
    "reply, reason",
    [
        ('Sure: {"chain": "%s"} Done.' % (HEAD + SEG + TAIL), ""),
        ('{"chain": "x"} {"chain": "y"}', "several JSON objects"),
        ('{"chain": "%s"' % HEAD, "broken JSON"),
        ('{"chain": ["x"]}', "wrong type"),
        ('{"thoughts": "x"}', "missing key"),
        (HEAD + SEG + TAIL, "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("{" * 100_000, "broken JSON"),
    ],
)
def test_replies_that_hold_no_chain(reply, reason):
    assert data.read_chain(reply, ASKED)[1] == reason


def test_a_clip_of_unknown_length_ends_a_second_after_its_events():
    asked = Example(**vars(ASKED) | {"meta": {k: v for k, v in ASKED.meta.items() if k != "duration_s"}})
    assert data.chain_fault(HEAD + "<seg>6, 10</seg> " + TAIL, asked) == ""
    assert data.chain_fault(HEAD + "<seg>6, 10.1</seg> " + TAIL, asked) == "segment outside the clip"


@pytest.mark.parametrize(
    "chain, named",
    [
        ("it is three, three barks", 1),
        ("once, twice", 0),
        ("2 and then 4. That makes 4", 2),
        ("12 or 31", None),
        ("it is twice, no, five times", 3),
    ],
)
def test_numbers_may_be_spelt_out(chain, named):
    assert data.last_named(chain, ["2", "3", "4", "5"]) == named


@pytest.mark.parametrize(
    "verdict, reason",
    [
        (dict(reason="x", question="good", chain="bad"), ""),
        (dict(reason="x", question="fine", chain="bad"), "neither good nor bad"),
        (dict(question="good", chain="bad"), "missing key"),
        (dict(reason="x", question=True, chain="bad"), "wrong type"),
    ],
)
def test_verdicts(verdict, reason):
    row, found = data.read_verdict("well, " + json.dumps(verdict))
    assert found == reason and bool(row) == (not reason)


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_routes(table, make, capsys):
    """A line each: with a target, without, or dropped; all of them say why."""
    modes = ["", "babble", "poor", "bad_question", "mute", "late"]
    summary = make(table(6, lambda i: f"mode={modes[i]}"), concurrency=2)
    cold, rl, rejects = make.rows()
    assert [r["id"].split(".")[0] for r in cold] == ["c00"] * 2 and list(cold[0]) == [
        "id",
        "audio",
        "question",
        "choices",
        "answer",
        "target",
        "meta",
    ]
    assert [(r["id"].split(".")[0], r["meta"]["no_chain"]) for r in rl[::2]] == [
        ("c01", "chain length"),
        ("c02", "judged bad"),
        ("c05", "cut off"),
    ] and len(rl) == 6
    assert [(r["id"].split(".")[0], r["reason"], r["reply"][:7]) for r in rejects[::2]] == [
        ("c03", "bad question", '{"reaso'),
        ("c04", "no verdict", "no idea"),
    ] and list(rl[0]) == data.LINE
    assert [r["meta"]["attempts"] for r in (cold[0], rl[0], rl[2], rejects[0], rejects[2])] == [
        2,
        4,
        2,
        2,
        4,
    ]  # of both calls
    assert cold[0]["meta"]["tokens"] == [1000, 120] and summary["tokens"] == [500 * 36, 60 * 36]
    assert len(make.server.log) == 36
    assert cold[0]["meta"]["verdict"] == "because I have to" and rejects[2]["meta"]["verdict"] == ""
    assert summary["accepted"] == 8 and summary["chains"] == {
        "": 2,
        "chain length": 2,
        "judged bad": 2,
        "cut off": 2,
    }
    assert summary["rejected"] == {"bad question": 2, "no verdict": 2} and summary["clips"] == 12
    said = re.sub(" +", " ", capsys.readouterr().out)
    for text in (
        "clips 7\n no sound file 1\n",
        "questions 12\n order",
        "accepted 8\n with a chain 2\n",
        " without a chain: cut off 2\n",
        "rejected 4\n bad question 2\n",
    ):
        assert text in said
    asked = {e["said"] for e in make.server.log if not e["writes"] and "mode=babble" in e["prompt"]}
    assert asked == {"(none)"} and {"json_schema"} == {e["response_format"]["type"] for e in make.server.log}


def test_lines_train(table, make, capsys):
    """Both files are data for the trainer, `check` finds nothing wrong, and meta holds what a grounding reward needs."""
    make(table(6, lambda i: "mode=poor" if i % 2 else ""), per_clip=4)
    for path, purpose in zip(make.paths(), ("cold_start", "train")):
        examples = Examples(path)
        assert len(examples) == 12 and examples.format == "own" and len(data.scan(examples, purpose)) == 12
        assert data.scan(examples, "train") and data.check(path) == 0
        for e in examples:
            assert os.path.isfile(e.audio) and e.meta["kind"] in data.KINDS and e.meta["duration_s"] == 10.0
            assert all(0 <= a < b <= 10 for a, b in e.meta["spans"]) and e.meta["captions"][0] == "a yard"
            made = dict(
                source="relisten",
                model="m",
                judge_model="m",
                prompt_version=data.RELISTEN_VERSION,
                seed=0,
                per_clip=4,
            )
            assert made.items() <= e.meta.items() and "events" not in e.meta
            if purpose == "cold_start":
                assert (
                    reward.accuracy(e.target, e)
                    == reward.think_format(e.target, e)
                    == reward.consistency(e.target, e)
                    == 1
                )
    assert {e.meta["kind"] for e in Examples(make.paths()[0])} == set(data.KINDS)
    with pytest.raises(DataError, match="a cold start needs"):
        data.scan(Examples(make.paths()[1]), "cold_start")


def test_another_judge(table, make):
    make(table(2), model="writer", judge_model="judge")
    assert {(e["model"], e["writes"]) for e in make.server.log} == {("writer", True), ("judge", False)}


@pytest.fixture
def command(server, make, tmp_path):  # noqa: F811
    def start(table, *more):
        return subprocess.Popen(
            [
                sys.executable,
                data.__file__,
                "relisten",
                table[0],
                "--captions",
                table[1],
                "--out",
                make.paths()[0],
                "--model",
                "m",
                "--base_url",
                server.url,
                *map(str, more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_stopped_at_any_moment(table, make, command):
    """Killed and interrupted; nothing is lost, doubled or asked again, and the bytes are those of one run."""
    clips, done = table(30, lambda i: f"mode=mixed slow={0.02 if i % 7 else 0.05}"), []

    def ids():
        with contextlib.suppress(FileNotFoundError):
            return [json.loads(line)["id"] for content in make.files() for line in content.split(b"\n")[:-1]]
        return []

    for how, stop_at in ((signal.SIGKILL, 1), (signal.SIGINT, 25), (None, 60)):
        before, asked = set(done), len(make.server.log)
        process = command(clips, "--concurrency", 4)
        while process.poll() is None and len(ids()) < stop_at:
            time.sleep(0.01)
        if how:
            process.send_signal(how)
        _, errors = process.communicate()
        done = ids()
        assert len(done) == len(set(done)) and before <= set(done) and "Traceback" not in errors
        texts = {e["prompt"].rpartition("Question: ")[0] for e in make.server.log[asked:]}
        assert texts and process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, None: 0}[how]
        assert len(done) == 60 if how is None else len(done) < 60
    make(clips, "unbroken", concurrency=3)
    assert make.files() == make.files("unbroken") and all(len(rows) > 5 for rows in make.rows())


def test_a_line_that_was_cut_anywhere(table, make):
    clips = table(4, lambda i: "mode=" + ["", "poor", "bad_question", ""][i])
    make(clips)
    whole, log = make.files(), make.server.log
    for k, path in enumerate(make.paths()):
        last = len(whole[k].splitlines(True)[-1])
        for cut in (1, last // 2, last):
            open(path, "wb").write(whole[k][:-cut])
            del log[:]
            make(clips)
            assert make.files() == whole and len(log) == 2


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(model="other"), "other"),
        (dict(seed=3), "'seed': 3"),
        (dict(per_clip=3), "'per_clip': 3"),
        (dict(judge_model="j"), "'judge_model': 'j'"),
        (dict(prompt="new"), data.RELISTEN_VERSION),
    ],
)
def test_going_on_with_other_settings_is_refused(changes, says, table, make, monkeypatch):
    clips = table(3, lambda i: "mode=" + ["", "poor", "bad_question"][i])
    make(clips)
    before, asked = make.files(), len(make.server.log)
    monkeypatch.setattr(data, "RELISTEN_VERSION", changes.pop("prompt", data.RELISTEN_VERSION))
    for k, path in enumerate(make.paths()):  # each file alone is enough
        with pytest.raises(UserError, match="other files") as e:
            make(clips, **changes)
        assert says in str(e.value) and make.files()[k:] == before[k:] and len(make.server.log) == asked
        open(path, "w").close()


def test_files_of_generate_and_one_file_for_two(table, make):
    clips = table(2)
    for name in make.paths():
        open(name, "w").write(json.dumps(dict(id="c", reason="r", reply="", captions=[], meta={})) + "\n")
        with pytest.raises(UserError, match="not written by this command"):
            make(clips)
        os.remove(name)
    out, rl, _ = make.paths()
    with pytest.raises(UserError, match="--out and --rejects name the same file"):
        data.relisten(data.TimedQuestions(clips[0]), out, rl, out, "m", base_url=make.server.url)


def test_failures_are_asked_again(table, make):
    """Though the chain was written: the judge's answer is a part of the question's line."""
    clips = table(3, lambda i: ["", "mode=broken", "mode=no_judge"][i])
    summary = make(clips, retries=0)
    assert summary["failed"] == 4 and len(make.rows()[0]) == 2 and summary["tokens"] == [500 * 6, 60 * 6]
    assert make(table(3), retries=0)["failed"] == 0
    assert sorted(r["id"][:3] for r in make.rows()[0]) == ["c00"] * 2 + ["c01"] * 2 + ["c02"] * 2


def test_limits_hold_over_all_runs(table, make):
    """No question is begun that might go beyond; what is left is less than one can take, about 3 * (1,900 + 2 * 100)."""
    clips = table(20, lambda i: "mode=mixed")
    for factor in (1, 1, 2):
        summary = make(clips, max_tokens_total=20_000 * factor, max_tokens=100)
        assert summary["at_limit"] and 20_000 * factor - 6_500 < sum(summary["tokens"]) <= 20_000 * factor
    assert sum(summary["tokens"]) == 560 * len(make.server.log)
    make(clips, max_tokens=100)
    make(clips, "unbroken", max_tokens=100)
    assert make.files() == make.files("unbroken")
