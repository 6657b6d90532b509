"""Time-stamped events to questions and chains of thought: what is asked and what is not, which chains are
accepted, which file a question goes to, and that kills and limits are those of generate."""

import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import data
import fake_server
import reward
import tools.server as client
from data import DataError, Example, Examples
from fake_server import ROOT, Runs, modes
from fake_server import server as server
from texts import write_lines
from tools import events

POOL = ["Rain", "Speech", "Cat", "Church bell", "Engine", "Violin"]


def heard(text: str) -> list[tuple]:
    """ "1-2.5 Dog, 3-4 Cat" -> [(1.0, 2.5, "Dog"), (3.0, 4.0, "Cat")]"""
    return [(float(a), float(b), label) for a, b, label in re.findall(r"([\d.]+)-([\d.]+) ([\w ]+)", text)]


YARD = heard("0-9 Wind, 1-2 Bark, 3-4.5 Siren, 3.2-3.9 Bark, 6-6.5 Door, 7-7.5 Bark")


class Server(fake_server.Server):
    """Writes a chain on what decides, and calls everything good, unless a label of the clip says mode=..."""

    def asked(self, request):
        system, prompt = (m["content"] for m in request["messages"])
        heard, writes = prompt.partition("Question: ")[0], system == events.CHAINER
        if not writes:
            heard = heard.replace("nojudge", "broken")
        return heard, dict(prompt=prompt, heard=heard, writes=writes, said=prompt.partition("Thoughts: ")[2])

    def reply(self, request, mode, prompt, heard, writes, said):
        if mode == "mixed":
            mode = ["", "babble", "badquestion", "poor", "late"][request["seed"] % 5]
        right, spans = (re.search(rf"{what}: (.*)", prompt)[1] for what in ("Right choice", "Decided in"))
        spans = re.sub(r"([\d.]+) to ([\d.]+)", r"and in <seg>\1, \2</seg> it can be heard", spans)
        chain = f"I have to listen for what decides, so I go there; {spans}. So what is asked for is {right}."
        question, good = ("bad" if bad else "good" for bad in (
            mode == "badquestion", mode == "poor" or said == "(none)"
        ))  # fmt: skip
        row = dict(reason=f"because {said[:9]}", question=question, chain=good)
        if writes:
            row = dict(chain=f"It is {right}." if mode == "babble" else chain)
        text = "no idea" if mode == "mute" and not writes else json.dumps(row)
        return text, "length" if mode == "late" and writes else "stop", (500, 60)


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    monkeypatch.setattr(fake_server, "Server", Server)


def sound(path, length_s=10.0, seed=0):
    """A file of low rate: only its length matters."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(length_s * 1000))
    soundfile.write(str(path), noise, 1000)


@pytest.fixture
def table(tmp_path):
    """Clips c00.wav, ... with the same events, and with two names of one sound that say how the server
    answers: it is not asked about. z.wav has no sound file, and gives its labels to other clips' choices.
    -> path of the table"""

    def table(text, sounds=YARD):
        rows = [f"z.wav\t1\t2\t{label}" for label in POOL]
        for i, mode in enumerate(modes(text)):
            sound(tmp_path / "clips" / f"c{i:02d}.wav", seed=i)
            signs = [(8.5, 8.9, f"sign mode={mode}"), (8.5, 8.9, f"sign mode={mode} too")]
            rows += [f"c{i:02d}.wav\t{a}\t{b}\t{label}" for a, b, label in [*sounds, *signs]]
        return write_lines(tmp_path / "clips" / "events.tsv", "filename\tonset\toffset\tevent_label", *rows)

    return table


@pytest.fixture
def make(server, tmp_path):
    return Runs(events, events.write_chains, ("", "_rl", "_rejects"), tmp_path, server)


def clip(sounds, name="x"):
    return Example(name, "/sounds/x.wav", "", meta=dict(events=sounds, duration_s=10.0))


# -----------------------------------------------------------------------------------------------------------
# What is asked

FIRST_OF_ALL = """
after "Door" begins? Bark, not: Siren, Wind; 6-6.5 7-7.5
after "Wind" begins? Bark, not: Door, Siren; 0-9 1-2"""
STEPS = """
after "A" begins? B, not: C; 1-1.5 2-2.5
after "B" begins? C, not: A; 2-2.5 4-4.5
before "B" begins? A, not: C; 2-2.5 1-1.5
before "C" begins? B, not: A; 4-4.5 2-2.5"""
COUNT = """
times is "Bark" heard? 2, not: 1, 3, 4; 1-2.5 4-4.2
times is "Bark" heard? 2, not: 3, 4, 5; 1-2.5 4-4.2
times is "Bell" heard? 1, not: 2, 3, 4; 5-5.1"""
DURATION = """
longest time in all? Bark, not: Door; 1-2 3.2-3.9 7-7.5
longest time in all? Siren, not: Door; 3-4.5
longest time in all? Wind, not: Bark, Door, Siren; 0-9
shortest time in all? Door, not: Bark, Siren, Wind; 6-6.5"""
OVERLAP = """
same time as "Bark"? Siren, not: Door; 3.2-3.9
same time as "Bark"? Wind, not: Door; 1-2 3.2-3.9 7-7.5
same time as "Door"? Wind, not: Bark, Siren; 6-6.5
same time as "Siren"? Bark, not: Door; 3.2-3.9
same time as "Siren"? Wind, not: Door; 3-4.5"""


@pytest.mark.parametrize(
    "kind, sounds, asked",
    [
        # Once heard: Wind, Siren, Door; but the second Bark begins 0.2 s after the Siren, so nothing is
        # asked after the Siren, and the Siren is no answer.
        ("order", YARD, FIRST_OF_ALL),
        ("order", heard("1-1.5 A, 2-2.5 B, 4-4.5 C"), STEPS),
        # Two barks that touch are one; the choices are four neighbouring numbers from 1 on.
        ("count", heard("1-2 Bark, 2.05-2.5 Bark, 4-4.2 Bark, 5-5.1 Bell, 0-9 Wind"), COUNT),
        # In all: Wind 9 s, Bark 2.2 s, Siren 1.5 s, Door 0.5 s. 2.2 is less than 1.5 times 1.5.
        ("duration", YARD, DURATION),
        # What is clearly apart is a wrong choice; the span is where both are heard.
        ("overlap", YARD, OVERLAP),
        # Not clear:
        ("order", heard("1-2 A, 1.2-3 B, 1.4-5 C"), ""),  # all begin at about the same time
        ("order", heard("1-2 A, 3-4 B, 3.1-5 C"), ""),  # what is next?
        ("order", heard("1-2 A, 3-4 A, 5-6 B, 7-7.5 B"), ""),  # after which of them?
        ("order", heard("1-2 A, 3-4 B"), ""),  # no wrong choice that is heard
        ("order", heard("1-2 Dog, 3-4 Speech, 5-6 Male speech"), ""),  # two names of one sound
        ("count", heard("1-2 A, 2.2-3 A"), ""),  # once or twice?
        ("count", heard("0-6 A, 8-8.1 B, 8.3-8.4 B"), ""),  # A never stops
        ("count", heard(", ".join(f"{k}-{k}.5 A" for k in range(9))), ""),
        ("count", heard("1-2 bark, 4-5 Bark"), ""),
        ("duration", heard("0-2 A, 3-5.9 B"), ""),  # 2.9 is less than 1.5 times 2
        ("overlap", heard("0-2 A, 1.6-4 B, 6-7 C"), ""),  # only 0.4 s
        ("overlap", heard("0-2 A, 1-4 B, 2.1-7 C"), ""),  # is C apart from A?
        ("overlap", heard("0-2 A, 3-4 B, 6-7 C"), ""),
    ],
)
def test_what_is_asked(kind, sounds, asked):
    """All that could be asked: the end of the question, right choice, wrong choices, segments that decide."""
    merged = events.merge_events(sounds)
    lines = []
    for question, right, wrong, spans in events.KINDS[kind](merged, events.clear_of(merged)):
        decide = " ".join(f"{a:g}-{b:g}" for a, b in spans)
        end = re.search(r"(after|before|times|longest|shortest|same) .*", question)[0]
        if wrong:
            lines.append(f"{end} {right}, not: {', '.join(sorted(wrong))}; {decide}")
    assert sorted(lines) == asked.split("\n")[1:]


def test_what_may_be_two_names_of_one_sound_is_not_asked_about():
    sounds = heard("0-1 Dog, 2-3 Speech, 4-6 Male speech, 7-9.9 Bell, 7.5-9.5 Door")
    asked = [q for seed in range(30) for q in events.questions_on(clip(sounds), POOL[:1] + POOL[2:], seed, 4)]
    assert len(asked) > 50 and not any("peech" in text for q in asked for text in (q.question, *q.choices))


def test_the_answer_is_right_on_a_grid_of_centiseconds():
    """Random clips, and every question on them answered again by looking at which sounds are on at each 10
    ms; gaps under 0.1 s are none."""
    rng, n, kinds = random.Random(1), 0, set()
    labels = [f"{a}{b}" for a in "KLMNPQ" for b in "aeiou"]
    for i in range(300):
        starts = [rng.randrange(0, 900) for _ in range(rng.randint(2, 9))]
        sounds = [
            (s / 100, min(1000, s + rng.randrange(10, 400)) / 100, rng.choice(labels[:7])) for s in starts
        ]
        on = {label: np.zeros(1002, int) for label in labels}
        for start, end, label in sounds:
            on[label][1 + round(start * 100) : 1 + round(end * 100)] = 1
        for row in on.values():
            stops, starts = np.flatnonzero(np.diff(row) < 0), np.flatnonzero(np.diff(row) > 0)
            for stop, start in zip(stops, starts[1:]):
                row[stop : start + 1] |= start - stop < 10
        begins = {label: np.flatnonzero(np.diff(row) > 0) for label, row in on.items()}
        for q in events.questions_on(clip(sounds, f"c{i}"), labels, 0, 4):
            named, right = (re.findall('"(.*)"', q.question) or [""])[0], q.choices[q.answer]
            wrong = [c for c in q.choices if c != right]
            n, kinds = n + 1, kinds | {q.meta["kind"]}
            assert len(set(q.choices)) == 4 and named not in q.choices
            if q.meta["kind"] == "count":
                assert int(right) == len(begins[named])
                continue
            assert any(on[c].any() for c in wrong)
            if q.meta["kind"] == "order":
                sign = 1 if "after" in q.question else -1
                times = {c: (begins[c] - begins[named][0]) * sign for c in q.choices}
                first = min(t for t in times[right] if t > 0)
                assert first >= 30 and not any(0 < t < first + 30 for c in wrong for t in times[c])
            elif q.meta["kind"] == "duration":
                sums = [int(on[c].sum()) for c in (right, *wrong)]
                if "longest" in q.question:
                    assert sums[0] >= 1.5 * max(sums[1:])
                else:
                    assert 1.5 * sums[0] <= min(sums[1:])
            else:
                both = on[named] & on[right]
                assert both.sum() >= 50 and not any((on[named] & on[c]).any() for c in wrong)
                assert all(both[1 + round(a * 100) : 1 + round(b * 100)].all() for a, b in q.meta["spans"])
    assert n > 400 and kinds == set(events.KINDS)


def test_questions_depend_on_clip_and_seed_alone():
    def asked(sounds=YARD, name="x", seed=0, per_clip=4):
        questions = events.questions_on(clip(sounds, name), POOL, seed, per_clip)
        return [(q.id, q.question, q.choices) for q in questions]

    first = asked()
    assert first == asked(YARD[::-1])  # the order of the rows is no matter
    assert asked(per_clip=2) == first[:2] and {id for id, _, _ in first} == {f"x {k}" for k in events.KINDS}
    many = [q for i in range(200) for q in events.questions_on(clip(YARD, f"c{i}"), POOL, 0, 4)]
    places = np.bincount([q.answer for q in many], minlength=4)
    assert ((places - 200) ** 2 / 200).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001
    assert len({q.question for q in many}) > 8
    assert any(sorted(asked(name=f"c{i}")) != sorted(asked(name=f"c{i}", seed=1)) for i in range(9))


def test_choices_are_filled_up_by_labels_that_name_no_sound_of_the_clip():
    two = heard("0-4 Bark, 5-6 Door")
    for more, pool in (
        ("7-8 Rain", "Dog bark|Rain on surface"),
        ("7-8 Rain, 7-8 Rain on surface", "Rain|Cat"),
    ):
        too_few = events.questions_on(clip(two + heard(more)), pool.split("|"), 0, 9)
        assert [q.meta["kind"] for q in too_few] == ["count"]
    pool = ["Dog bark", "bark", "Door", "Rain", "Rain on surface", "Cat", "Bell"]
    for seed in range(20):
        found = events.questions_on(clip(two), pool, seed, 9)
        (longest,) = [set(q.choices) for q in found if q.meta["kind"] == "duration"]
        assert {"Bark", "Door"} < longest and not {"Rain", "Rain on surface"} <= longest
        assert longest - {"Bark", "Door"} < {"Rain", "Rain on surface", "Cat", "Bell"}


# -----------------------------------------------------------------------------------------------------------
# Tables


def events_of(path, names=()):
    clips = events.read_events(data.open_rows(path), dict(names))
    return {name: clip.meta["events"] for name, clip in clips.items()}


@pytest.mark.parametrize(
    "header",
    [
        "filename\tonset\toffset\tevent_label",
        "file,start,end,label",
        "Audio;Start_Time;End_Time;Class",
        "# path,Onset,Offset,Category",
        "",
    ],
)
def test_tables(header, tmp_path):
    """One table in the spellings that there are; rows of a clip apart; one clip in which nothing is heard."""
    rows = [
        ("a.wav", 0.5, 1.25, "Dog_bark"),
        ("b.wav", 0, 10, "Rain"),
        ("a.wav", 3, 4.0, " Rain "),
        ("c.wav", "", "", ""),
    ]
    lines = [dict(zip(("wav", "start_s", "end_s", "sound"), row)) for row in rows]
    if header:
        mark = re.findall("[\t,;]", header)[0]
        lines = [header, *(mark.join(map(str, row)) for row in rows)]
    assert events_of(write_lines(tmp_path / "t", *lines)) == {
        "a.wav": [(0.5, 1.25, "Dog bark"), (3.0, 4.0, "Rain")],
        "b.wav": [(0.0, 10.0, "Rain")],
        "c.wav": [],
    }


def test_audioset_strong(tmp_path):
    """Codes become names. The file of a segment has its name, or the id and the second at which it begins."""
    ids = [f"-0ABcdefgh{i}_{ms}" for i, ms in enumerate((30000, 0, 120000, 20000, 20000))]
    codes = ["0\t1\t/m/05tny_", "2\t9.8\t/t/dd00129", "3\t4\t/m/04rlf"]
    rows = [f"{i}\t{code}" for code in codes for i in ids]
    path = write_lines(
        tmp_path / "strong.tsv", "segment_id\tstart_time_seconds\tend_time_seconds\tlabel", *rows
    )
    lines = ["/m/05tny_\tBark", "/t/dd00129\tOutside, rural", "/m/04rlf\tMusic", "/m/09x0r\tSpeech"]
    names = write_lines(tmp_path / "mid_to_display_name.tsv", *lines)
    read = events_of(path, events.read_display_names(names))
    assert read[ids[0]] == [(0, 1, "Bark"), (2, 9.8, "Outside, rural"), (3, 4, "Music")] and list(read) == ids
    files = [f"{ids[0]}.wav", "deeper/-0ABcdefgh1_0.wav", "-0ABcdefgh2_000120.flac", "-0ABcdefgh4_2.wav"]
    twice = ["x/-0ABcdefgh3_20.wav", "y/-0ABcdefgh3_20.wav"]
    for file in [*files, *twice]:  # two that it could be, one of another second
        sound(tmp_path / "clips" / file)
    questions, found = events.questions_of(path, str(tmp_path / "clips"), names)
    assert {os.path.relpath(q.audio, tmp_path / "clips") for q in questions} == set(files[:3])
    assert found["useless_clips"] == {events.NO_SOUND: 2} and found["clips"] == 5
    says = r"strong.tsv:2: field \"label\": /m/05tny_ is a code; give its name by --labels"
    with pytest.raises(DataError, match=says):
        events.questions_of(path, str(tmp_path / "clips"))
    for bad in (str(tmp_path / "none.tsv"), write_lines(tmp_path / "x.tsv", "a\tb")):
        with pytest.raises(DataError, match="mid_to_display_name.tsv"):
            events.read_display_names(bad)


BAD_ROWS = {  # in a table; {} is the field that is named
    "a.wav\t2.0\t1.0\tBark": 'field "offset": 1.0 is not after the start, 2.0',
    "a.wav\t2.0\t2.0\tBark": 'field "offset": 2.0 is not after the start',
    "a.wav\tsoon\t2.0\tBark": "field \"onset\": expected seconds, found 'soon'",
    "a.wav\t0\tnan\tBark": 'field "offset"',
    "a.wav\t-1\t2\tBark": 'field "onset"',
    "a.wav\t1\tinf\tBark": 'field "offset"',
    "a.wav\t1\t\tBark": 'field "offset"',
    "a.wav\t1\t90000\tBark": 'field "offset"',
    "a.wav\t1\t2\t": 'field "event_label": expected the name',
    "a.wav\t1\t2\t <> ": 'field "event_label"',
    "a.wav\t1\t2": "3 fields, expected the 4 columns",
}
BAD_OBJECTS = [  # changes of a row
    (dict(onset=True), 'field "onset"'),
    (dict(onset=10**400), 'field "onset"'),
    (dict(offset=[2]), 'field "offset"'),
    (dict(label=3), 'field "label": expected a text'),
    (dict(audio=None), 'field "audio": expected a text'),
    (dict(label="\ud800"), 'field "label"'),
    (dict(offset="-"), 'field "offset.end.*missing; found only .*audio'),
    (dict(audio="-"), 'field "segment_id.audio.*missing'),
]


@pytest.mark.parametrize("row, says", [*BAD_ROWS.items(), *BAD_OBJECTS])
def test_bad_rows_are_named(row, says, tmp_path):
    lines, where = ["filename\tonset\toffset\tevent_label", "b.wav\t1\t2\tBark", row], "t:3"
    if isinstance(row, dict):
        row = dict(audio="a.wav", onset=1, offset=2, label="x") | row
        lines, where = [{key: value for key, value in row.items() if value != "-"}], "t:1"
    with pytest.raises(DataError, match=f"{where}: {says}"):
        events_of(write_lines(tmp_path / "t", *lines))


def test_sounds_that_are_not_there(table, tmp_path):
    path = table("4 good")
    os.remove(tmp_path / "clips" / "c01.wav")
    (tmp_path / "clips" / "c02.wav").write_bytes(b"not a sound")
    sound(tmp_path / "clips" / "c03.wav", 6.9)
    _, found = events.questions_of(path)
    assert sum(found["questions"].values()) == 2 and found["clips"] == 5
    assert found["useless_clips"] == {
        events.NO_SOUND: 2,
        "sound file that cannot be read": 1,
        "sound file that ends before its events": 1,
    }
    sound(tmp_path / "clips" / "c03.wav", 8.6)  # the wind goes on for 0.4 s more: cut there
    meta = events.questions_of(path)[0][-1].meta
    assert meta["duration_s"] == 8.6 and (0.0, 8.6, "Wind") in meta["events"]
    nowhere = str(tmp_path / "nowhere")
    for says, *args in (
        ("none of the sounds of its 5 .*nowhere or .* looked for as c03 .*--audio_dir", path, nowhere),
        ("entry 1: expected a JSON object, found 1", write_lines(tmp_path / "list.json", "[1]")),
        ("holds no event", write_lines(tmp_path / "empty.tsv", "filename\tonset\toffset\tlabel")),
    ):
        with pytest.raises(DataError, match=says):
            events.questions_of(*args)
    with pytest.raises(DataError, match="there is nothing to ask: .*nothing clear to ask': 1"):
        events.questions_of(table("good", sounds=YARD[:1]))


# -----------------------------------------------------------------------------------------------------------
# Chains of thought

QUESTION = 'Which of these sounds is the next to begin after "Door" begins?'
META = dict(kind="order", spans=[[6, 6.5], [7, 7.5]], events=YARD, duration_s=10.0)
ASKED = Example("x", "/x.wav", QUESTION, ["Bell", "Wind", "Bark", "Rain"], 2, meta=META)
HEAD, TAIL = "I wait for the door, and in ", "it slams, so what comes next and answers is the bark. Bark"
SEG = "<seg>6, 6.5</seg> "


def cases():
    """chains.jsonl: the reason, "" for what is accepted, and a chain."""
    with open(os.path.join(ROOT, "tests", "chains.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    yield from ((row["chain"], row["reason"]) for row in rows)
    yield HEAD + (SEG + "and ") * 10_000 + TAIL, "chain length"


def refusal(check, *args) -> str:
    try:
        return check(*args) and ""
    except client.Refused as e:
        return str(e)


@pytest.mark.parametrize("chain, reason", list(cases()))
def test_chains(chain, reason):
    """And a chain that passes is a target that our rewards pay in full."""
    reply = json.dumps({"chain": chain})
    assert refusal(events.check_chain, reply, ASKED) == reason
    if not reason:
        target = f"<think>{events.check_chain(reply, ASKED)['chain']}</think><answer>Bark</answer>"
        said = reward.Said(target)
        assert reward.REWARDS["accuracy"](said, ASKED) == reward.REWARDS["think_format"](said, ASKED) == 1
        assert not re.search(r"</seg>\s*[A-Z<]", target) and "\n" not in target


def test_every_reason_has_a_case():
    assert {*events.chain_faults("", ASKED), "no JSON object", ""} == {reason for _, reason in cases()}


@pytest.mark.parametrize(
    "reply, reason",
    [
        ('Sure: {"chain": "%s"} Done.' % (HEAD + SEG + TAIL), ""),
        ('{"chain": "x"} {"chain": "y"}', "several JSON objects"),
        ('{"chain": ["x"]}', "wrong type"),
        ('{"thoughts": "x"}', "missing key"),
        ("[" * 100_000, "no JSON object"),
    ],
)
def test_replies_that_hold_no_chain(reply, reason):
    assert refusal(events.check_chain, reply, ASKED) == reason


def test_a_clip_of_unknown_length_ends_a_second_after_its_events():
    asked = Example(**vars(ASKED) | {"meta": {k: v for k, v in META.items() if k != "duration_s"}})
    for end, outside in ((10, False), (10.1, True)):
        faults = events.chain_faults(HEAD + f"<seg>6, {end}</seg> " + TAIL, asked)
        assert any(faults.values()) == bool(faults["segment outside the clip"]) == outside


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
    assert events.last_named(chain, ["2", "3", "4", "5"]) == named


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
    assert refusal(events.check_verdict, "well, " + json.dumps(verdict)) == reason


# -----------------------------------------------------------------------------------------------------------
# The files


def test_routes(table, make, capsys):
    """A line each: with a target, without, or dropped; all of them say why."""
    summary = make(table("good, babble, poor, badquestion, mute, late"), concurrency=2)
    cold, rl, rejects = make.rows()
    assert list(cold[0]) == ["id", "audio", "question", "choices", "answer", "target", "meta"]
    whys = []
    for r in cold + rl + rejects:
        why = r["meta"].get("no_chain") or r.get("reason")
        whys.append(f"{r['id'][:3]} {why} {r['meta']['attempts']}")
    assert whys[::2] == whys[1::2] and whys[::2] == [  # attempts of both calls
        "c00 None 2",
        "c01 chain length 4",
        "c02 judged bad 2",
        "c05 cut off 4",
        "c03 bad question 2",
        "c04 no verdict 4",
    ]
    assert [r["reply"][:7] for r in rejects[::2]] == ['{"reaso', "no idea"]
    assert cold[0]["meta"]["tokens"] == [1000, 120] and summary["tokens_in_and_out"] == [500 * 36, 60 * 36]
    assert cold[0]["meta"]["verdict"] == "because I have to" and rejects[2]["meta"]["verdict"] == ""
    assert summary["accepted"] == 8 and sum(summary["questions"].values()) == 12
    assert summary["without_a_chain"] == {"chain length": 2, "judged bad": 2, "cut off": 2}
    assert summary["rejected"] == {"bad question": 2, "no verdict": 2}
    said = re.sub(" +", " ", capsys.readouterr().out)
    for text in (
        f"clips 7\nuseless clips 1\n {events.NO_SOUND} 1\nquestions 12\n ",
        "accepted 8\nwithout a chain 6\n chain length 2\n",
        "rejected 4\n bad question 2\n",
        "\ntokens in and out 18000 2160\n",
    ):
        assert text in said
    asked = {e["said"] for e in make.log if not e["writes"] and "mode=babble" in e["heard"]}
    assert asked == {"(none)"} and {"json_schema"} == {e["response_format"]["type"] for e in make.log}


def test_lines_train(table, make):
    """Both files are data for the trainer, `check` finds no fault, and meta holds what a grounding reward
    needs."""
    make(table("good, poor, " * 3), per_clip=4)
    made = dict(model="m", judge_model="m", prompt_version=events.PROMPT_VERSION, seed=0, per_clip=4)
    for path, purpose in zip(make.paths(), ("cold_start", "train")):
        examples = Examples(path)
        assert len(data.scan(examples, purpose)) == len(data.scan(examples, "train")) == len(examples) == 12
        check = [sys.executable, "data.py", "check", path]
        assert subprocess.run(check, cwd=ROOT, capture_output=True).returncode == 0
        assert {e.meta["kind"] for e in examples} == set(events.KINDS)
        for e in examples:
            assert os.path.isfile(e.audio) and e.meta["duration_s"] == 10.0 and "events" not in e.meta
            assert all(0 <= a < b <= 10 for a, b in e.meta["spans"])
            assert (made | {"source": "relisten"}).items() <= e.meta.items()
            if purpose == "cold_start":
                names = ("accuracy", "think_format", "consistency")
                assert [reward.REWARDS[name](reward.Said(e.target), e) for name in names] == [1, 1, 1]
    with pytest.raises(DataError, match="a cold start needs"):
        data.scan(Examples(make.paths()[1]), "cold_start")


def test_another_judge(table, make):
    make(table("2 good"), model="writer", judge_model="judge")
    assert {(e["model"], e["writes"]) for e in make.log} == {("writer", True), ("judge", False)}


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(model="other"), "other"),
        (dict(seed=3), "'seed': 3"),
        (dict(per_clip=3), "'per_clip': 3"),
        (dict(judge_model="j"), "'judge_model': 'j'"),
        ({}, "'new'"),
    ],
)
def test_going_on_with_other_settings_is_refused(changes, says, table, make, monkeypatch):
    path = table("good, poor, badquestion")
    make(path)
    if not changes:
        monkeypatch.setattr(events, "PROMPT_VERSION", "new")
    make.refuses_to_go_on(says, path, **changes)


def test_failures_are_asked_again(table, make):
    """Though the chain was written: the judge's answer is a part of the question's line."""
    summary = make(table("good, broken, nojudge"), retries=0)
    assert summary["failed_to_be_asked_again"] == 4 and len(make.ids()) == 2
    assert summary["tokens_in_and_out"] == [500 * 6, 60 * 6]
    assert make(table("3 good"), retries=0)["failed_to_be_asked_again"] == 0
    assert sorted(r["id"][:3] for r in make.rows()[0]) == ["c00"] * 2 + ["c01"] * 2 + ["c02"] * 2


def test_limits_hold_over_all_runs(table, make):
    """No question is begun that might go beyond; what is left is less than one can take: 3 * (1,900 + 3 *
    100). The bytes are those of one run, whatever the concurrency, and a torn line is made again."""
    path, options = table("mixed@0.02, mixed, " * 10), dict(max_tokens=100)
    for limit in (20_000, 20_000, 40_000):
        summary = make(path, max_tokens_total=limit, **options)
        assert "limit" in summary["stopped"] and limit - 6_600 < sum(summary["tokens_in_and_out"]) <= limit
    assert sum(summary["tokens_in_and_out"]) == 560 * len(make.log)
    make(path, **options)
    make(path, "unbroken", concurrency=3, **options)
    whole = make.files()
    assert whole == make.files("unbroken") and all(len(rows) > 5 for rows in make.rows())
    for file, content in zip(make.paths(), whole):
        open(file, "wb").write(content[:-9])
        make(path, **options)
        assert make.files() == whole
