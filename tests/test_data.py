"""Data: a row becomes a valid Example or an error naming file, line and field; a clip 16 kHz mono or an error naming it."""

import collections
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from array import array

import numpy as np
import pytest
import soundfile

import data
from data import AudioError, DataError, Example, Examples

ROOT = os.path.dirname(os.path.abspath(data.__file__))
BOM = b"\xef\xbb\xbf"
ROW = dict(audio=None, question="What is it?", choices=["dog", "cat", "rain"], answer=1)
R1_ROW = dict(
    id=7,
    question_text="What is in the video?",
    multi_choice=["dog", None, "cat", "rain"],
    answer=2,
    audio_path="a.wav",
    video_name="v",
    question_type="Is",
)


def lines(*rows) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


@pytest.fixture
def read(tmp_path):
    """File content -> Examples."""

    def read(content: bytes, name="questions.jsonl"):
        (tmp_path / name).write_bytes(content)
        return Examples(str(tmp_path / name))

    return read


@pytest.fixture
def refusal(read):
    """File content -> the message with which it is refused, without the folder. It is never long."""

    def refusal(content: bytes, purpose="check"):
        with pytest.raises(DataError) as e:
            examples = read(content)
            data.scan(examples, purpose)
        assert len(str(e.value)) < 2000
        return str(e.value)[str(e.value).index("questions.jsonl") :]

    return refusal


# ---- our own format


def test_every_field_is_read(read, tmp_path):
    row = dict(
        id="x",
        audio="clips/a.wav",
        question="Qué suena? 犬",
        choices=["perro 🐕", "gato"],
        answer=0,
        target="perro 🐕",
        meta={"pass_rate": 0.5},
        comment="kept in meta",
    )
    (example,) = read(lines(row))
    assert example == Example(
        "x",
        str(tmp_path / "clips" / "a.wav"),
        row["question"],
        row["choices"],
        0,
        row["target"],
        {"pass_rate": 0.5, "comment": "kept in meta"},
    )


def test_paths_are_relative_to_the_file(read, tmp_path, monkeypatch):
    """Whatever the working directory and however the file was named."""
    read(lines(ROW | {"audio": "a.wav"}, ROW | {"audio": "/b.wav"}, ROW | {"audio": "~/c.wav"}))
    monkeypatch.chdir(tmp_path)
    assert [e.audio for e in Examples("questions.jsonl")] == [
        str(tmp_path / "a.wav"),
        "/b.wav",
        os.path.expanduser("~/c.wav"),
    ]


def test_answer_is_an_index_or_a_text(read):
    choices = ["1", "0", "cat"]
    rows = (
        {"audio": None, "question": "?", "choices": choices, "answer": a} for a in (2, "cat", 0, "0", "1")
    )
    examples = read(lines(*rows))
    assert [e.answer for e in examples] == [2, 2, 0, 1, 0]


def test_null_is_the_same_as_missing(read):
    nulls = dict.fromkeys(("id", "audio", "choices", "answer", "target", "meta"))
    bare = {"audio": None, "question": "Why?"}
    assert (
        list(read(lines(bare | nulls)))
        == list(read(lines(bare)))
        == [Example("1", None, "Why?", [], None, None, {})]
    )


def test_target_is_a_text_or_several(read):
    assert [e.target for e in read(lines(ROW | {"target": "cat"}, ROW | {"target": ["cat", "a cat"]}))] == [
        "cat",
        ["cat", "a cat"],
    ]


ROWS = [ROW | {"id": str(i), "question": f"{i} é 犬 🐕"} for i in range(3)]


@pytest.mark.parametrize(
    "content",
    [
        lines(*ROWS),
        lines(*ROWS)[:-1],
        lines(*ROWS).replace(b"\n", b"\r\n"),
        BOM + lines(*ROWS),
        b"\n \r\n" + lines(*ROWS).replace(b"\n", b"\n\n\t\n"),
        BOM + lines(ROWS[0]) + BOM + lines(*ROWS[1:]),
        lines(*(json.dumps(r, ensure_ascii=False).encode() for r in ROWS)),
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        BOM + b"\n" * 100 + json.dumps(ROWS).encode(),
    ],
    ids=[
        "plain",
        "no last newline",
        "CRLF",
        "BOM",
        "blank lines",
        "BOMs",
        "raw unicode",
        "list",
        "list indented",
        "list BOM",
    ],
)
def test_the_layout_of_the_file_does_not_matter(read, content):
    assert list(read(content)) == [Example(r["id"], None, r["question"], r["choices"], 1) for r in ROWS]


def test_lines_are_counted_as_an_editor_counts_them(refusal):
    assert refusal(b"\n\n" + lines(ROW) + b"\r\n" + lines(ROW | {"answer": 3})).startswith(
        'questions.jsonl:5: field "answer"'
    )
    assert refusal(json.dumps([ROW, ROW | {"answer": 3}]).encode()).startswith(
        'questions.jsonl:entry 2: field "answer"'
    )


def test_reading_is_lazy(read):
    """A broken line is found when it is read, or scanned; the sequence knows its length without parsing."""
    examples = read(lines(ROW, b"{", ROW | {"id": "last"}))
    assert len(examples) == 3 and examples[0].id == "1" and examples[-1].id == examples[2].id == "last"
    for i in (3, -4):
        with pytest.raises(IndexError):
            examples[i]
    with pytest.raises(DataError, match="questions.jsonl:2: broken JSON"):
        examples[1]


def test_a_file_cut_off_while_it_is_used(read, tmp_path):
    examples = read(lines(ROW, ROW, ROW))
    (tmp_path / "questions.jsonl").write_bytes(lines(ROW)[:20])
    with pytest.raises(DataError, match="questions.jsonl:3: broken JSON"):
        examples[2]


# ---- R1-AQA and the choice of a format


def test_r1_aqa(read, tmp_path):
    """Null choices are padding and shift the index, "video" is "audio", what is not used is kept in meta."""
    padded = R1_ROW | {"multi_choice": ["dog", "cat", None, None], "answer": 1, "id": None}
    examples = list(read(lines(R1_ROW, padded, R1_ROW | {"answer": "rain"}), name="anything.txt"))
    assert examples[0] == Example(
        "7",
        str(tmp_path / "a.wav"),
        "What is in the audio?",
        ["dog", "cat", "rain"],
        1,
        meta={"video_name": "v", "question_type": "Is", "question_text": R1_ROW["question_text"]},
    )
    assert (examples[1].id, examples[1].choices, examples[1].answer) == ("2", ["dog", "cat"], 1)
    assert examples[2].answer == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": 1}, 'field "answer": it points at a null choice'),
        ({"answer": 4}, 'field "answer": 4 is not among the 3'),
        ({"answer": -1}, 'field "answer": -1 is not'),
        ({"answer": True}, 'field "answer": expected the index'),
        ({"multi_choice": [None, "dog"], "answer": 1}, 'field "choices": only one'),
        ({"question_text": 3}, 'field "question_text"'),
        ({"multi_choice": "dog"}, 'field "choices": expected a list'),
        ({"audio_path": 3}, 'field "audio": expected a path'),
    ],
)
def test_r1_aqa_refusals(refusal, change, message):
    assert refusal(lines(R1_ROW | change)).startswith(f"questions.jsonl:1: {message}")


def test_unknown_format_lists_the_known_ones(refusal):
    message = refusal(lines({"prompt": "?", "wav": "a.wav"}))
    assert "questions.jsonl:1: unknown format, keys ['prompt', 'wav']" in message
    for name, known in data.FORMATS.items():
        assert f"{name}: {known.keys}" in message


def test_a_later_line_of_another_format(refusal):
    assert 'questions.jsonl:2: field "multi_choice": missing; found only' in refusal(
        lines(R1_ROW | {"audio_path": None}, ROW)
    )
    assert 'questions.jsonl:2: field "audio": missing' in refusal(lines(ROW, R1_ROW))


# ---- what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": None}, 'field "question": expected a text, found None'),
        ({"question": " "}, 'field "question"'),
        ({"question": [[["?"]]]}, 'field "question"'),
        ({"question": "\ud800"}, "field \"question\": holds '\\ud800'"),
        ({"choices": "dog"}, 'field "choices": expected a list'),
        ({"choices": {"a": 1}}, 'field "choices"'),
        ({"choices": ["dog", None]}, 'field "choices"'),
        ({"choices": ["dog", ""]}, 'field "choices"'),
        ({"choices": ["dog"], "answer": 0}, 'field "choices": only one choice'),
        ({"choices": ["dog", "ca\udfff", "rain"]}, 'field "choices": holds'),
        ({"choices": None}, 'field "answer": 1 is not among'),
        ({"answer": 3}, 'field "answer": 3 is not among the 3 choices; give an index from 0 to 2'),
        ({"answer": -1}, 'field "answer": -1'),
        ({"answer": "Dog"}, "field \"answer\": 'Dog' is not among the choices ['dog'"),
        ({"answer": True}, 'field "answer": expected the index'),
        ({"answer": 1.0}, 'field "answer": expected the index'),
        ({"answer": float("nan")}, 'field "answer"'),
        ({"answer": [1]}, 'field "answer"'),
        ({"answer": 10**4000}, 'field "answer"'),
        ({"target": []}, 'field "target"'),
        ({"target": ["cat", None]}, 'field "target"'),
        ({"target": 0}, 'field "target"'),
        ({"target": "\ud800"}, 'field "target": holds'),
        ({"meta": []}, 'field "meta": expected an object'),
        ({"audio": 3}, 'field "audio": expected a path'),
        ({"audio": ""}, 'field "audio": an empty path'),
        ({"audio": "none.wav"}, 'field "audio"'),
        ({"audio": "."}, 'field "audio"'),
        ({"audio": "/dev/zero"}, 'field "audio"'),
        ({"audio": "a\0.wav"}, 'field "audio"'),
        ({"audio": "~\0/a.wav"}, 'field "audio"'),
        ({"audio": "\ud800"}, 'field "audio"'),
        ({"audio": "~\ud800"}, 'field "audio"'),
        ({"audio": "x" * 5000}, 'field "audio"'),
        ({"answer": "x" * 10**7}, 'field "answer"'),
    ],
    ids=lambda x: f"{x!r:.40}" if isinstance(x, dict) else "",
)
def test_bad_field(refusal, change, message):
    assert refusal(lines(ROW, ROW | change)).startswith(f"questions.jsonl:2: {message}")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "questions.jsonl: is empty"),
        (b"\n \n\t\r\n", "questions.jsonl: holds no question"),
        (b"[]", "holds no question"),
        (lines(ROW, ROW)[:-9], "questions.jsonl:2: broken JSON"),
        (json.dumps([ROW]).encode()[:-2], "questions.jsonl: broken JSON"),
        (json.dumps(ROW, indent=1).encode(), "an object spread over several lines?"),
        (lines(ROW, ROW).replace(b"\n", b"\r"), "questions.jsonl:1: "),
        (b"1\n2\n3\n", "questions.jsonl:1: expected a JSON object, found 1"),
        (b'"text"', ":1: expected a JSON object"),
        (b"[[1]]", "entry 1: expected a JSON object"),
        (lines(ROW, b"null"), ":2: expected a JSON object, found None"),
        (lines(ROW, ROW).decode().encode("utf-16"), "questions.jsonl:1: not UTF-8 text"),
        (lines(ROW, ROW).decode().encode("utf-16-le"), "questions.jsonl:1: "),
        ('{"question": "é"}'.encode("latin-1"), "not UTF-8 text"),
        (b'{"question": "\xed\xa0\x80"}', "not UTF-8 text"),
        (bytes(range(256)) * 99, "questions.jsonl:2: not UTF-8"),
        (b"\0" * 999, "questions.jsonl:1: "),
        (b"[" * 10**5, "broken JSON"),
        (
            lines(ROW, b'{"audio": null, "question":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
            "questions.jsonl:2: broken JSON",
        ),
        (
            lines(ROW, b'{"audio": null, "question": "?", "answer": 1' + b"0" * 5000 + b"}"),
            "questions.jsonl:2: broken JSON",
        ),
        (
            lines(ROW, b'{"audio": null, "question": "?", "answer": 1e400}'),
            'questions.jsonl:2: field "answer"',
        ),
        (json.dumps({"x" * 10**7: 1}).encode(), "unknown format"),
    ],
    ids=lambda x: f"{x!r:.25}" if isinstance(x, bytes) else "",
)
def test_bad_file(refusal, content, message):
    assert message in refusal(content)


def test_odd_but_good(read):
    examples = list(
        read(lines(ROW | {"id": [1, {}]}, ROW | {"id": 1}, ROW | {"id": 1}, ROW | {"question": "x" * 10**7}))
    )
    assert [e.id for e in examples] == ["[1, {}]", "1", "1", "4"] and len(examples[3].question) == 10**7


def test_what_is_not_a_file(tmp_path):
    """A pipe or a device is refused and not waited for."""
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("pipe", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        (".", "is a directory"),
        ("none.jsonl", "no such file"),
        ("x" * 5000, "no such file"),
    ):
        with pytest.raises(DataError, match=reason):
            Examples(os.path.join(tmp_path, name))


def test_damaged_files_give_examples_or_data_errors(read):
    rng, kinds = random.Random(0), set()
    good = lines(*(ROW | {"id": "é", "meta": {"a": [1]}, "target": ["x", "y"]} for _ in range(4)))
    pieces = [
        b"[",
        b"{",
        b"}",
        b"\n",
        b'"',
        b"\\ud800",
        b"\0",
        b"null",
        b"1e999",
        b"\xff",
        b",",
        b"-",
        b"true",
    ]
    for _ in range(400):
        content = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(content))
            content[at : at + rng.choice([0, 1, 30])] = rng.choice(pieces)
        try:
            examples = read(bytes(content))
            data.scan(examples, "check")
            for e in examples:
                "".join([e.question, *e.choices, *(e.target or [])]).encode()
                assert e.answer is None or type(e.answer) is int and 0 <= e.answer < len(e.choices)
            kinds.add("good")
        except DataError:
            kinds.add("bad")
    assert kinds == {"good", "bad"}


# ---- scan and held_out


def test_scan_wants_what_its_purpose_needs(refusal, read):
    no_choices, no_answer = (
        {"audio": None, "question": "?"},
        {"audio": None, "question": "?", "choices": ["a", "b"]},
    )
    assert refusal(lines(ROW, no_choices), "train").startswith('questions.jsonl:2: field "choices": missing')
    assert refusal(lines(ROW, no_answer), "train").startswith('questions.jsonl:2: field "answer": missing')
    assert refusal(lines(ROW), "cold_start").startswith('questions.jsonl:1: field "target": missing')
    assert len(data.scan(read(lines(no_choices, no_answer, ROW)), "check")) == 3


def test_scan_lists_the_first_problems(refusal):
    message = refusal(lines(ROW, *[ROW | {"answer": 9}] * 50)).split("\n")
    assert len(message) == 11 and ":11: field" in message[9] and message[-1] == "..."


def test_scan_knows_a_clip_by_its_file(read, tmp_path):
    """One hash a clip, however its path is spelt; a question without a clip has its own."""
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    names = ["a.wav", "./a.wav", str(tmp_path / "a.wav"), "b.wav", None, None]
    keys = data.scan(read(lines(*(ROW | {"audio": n} for n in names))))
    assert keys[0] == keys[1] == keys[2] and len(set(keys[2:])) == 4


@pytest.mark.parametrize("per_clip", [1, 4, 25])
def test_held_out_splits_by_clip(per_clip):
    rng = random.Random(0)
    keys = array(
        "L", [k for k in (rng.getrandbits(32) for _ in range(1000 // per_clip)) for _ in range(per_clip)]
    )
    train, held = data.held_out(keys, 100)
    assert sorted(train + held) == list(range(1000)) and 100 <= len(held) < 100 + per_clip
    assert not {keys[i] for i in train} & {keys[i] for i in held}
    assert (train, held) == data.held_out(array("L", keys), 100)
    assert {keys[i] for i in data.held_out(keys, 50)[1]} <= {keys[i] for i in held}


def test_held_out_leaves_something_to_train_on():
    assert data.held_out(array("L", [1, 2, 3, 4]), 100) == ([0, 1, 2, 3], [])
    assert data.held_out(array("L", [5] * 20), 100) == (list(range(20)), [])  # one clip
    train, held = data.held_out(array("L", range(50)), 1000)
    assert len(held) == 10 and len(train) == 40


# ---- prompts


def test_shuffled_choices_keep_the_answer():
    example, orders = Example("x", "a.wav", "?", ["a", "b", "c", "b"], 3, "t", {"m": 1}), set()
    for seed in range(200):
        shuffled = data.shuffle_choices(example, random.Random(seed))
        assert shuffled.choices[shuffled.answer] == "b" and sorted(shuffled.choices) == ["a", "b", "b", "c"]
        assert (shuffled.id, shuffled.audio, shuffled.target, shuffled.meta) == ("x", "a.wav", "t", {"m": 1})
        assert shuffled == data.shuffle_choices(example, random.Random(seed))
        orders.add((*shuffled.choices, shuffled.answer))
    assert len(orders) == 24 and example.choices == ["a", "b", "c", "b"]
    assert data.shuffle_choices(Example("x", None, "?"), random.Random(0)) == Example("x", None, "?")


def test_chat_messages():
    example = Example("x", "a.wav", "What is it?", ["a dog", "it's"], 0)
    text = "What is it? Please choose the answer from the following options: ['a dog', \"it's\"]."
    assert data.chat(example, data.PROMPTS["direct"]) == [
        {"role": "user", "content": [{"type": "audio", "audio": "clip"}, {"type": "text", "text": text}]}
    ]
    assert data.chat(example, data.PROMPTS["answer"], with_audio=False) == [
        {"role": "user", "content": text + " Output the final answer in <answer> </answer>."}
    ]
    assert data.chat(Example("x", None, "Why?"), data.Template("", system="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]


# ---- audio


def sine(hz, rate_hz, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate_hz)) / rate_hz)


def error_db(wave, exact, edge=800):
    """Error relative to the exact wave, 50 ms away from the edges."""
    assert abs(len(wave) - len(exact)) <= 1
    n = min(len(wave), len(exact))
    wave, exact = wave[edge : n - edge], exact[edge : n - edge]
    return 10 * np.log10(np.mean((wave - exact) ** 2) / np.mean(exact**2) + 1e-20)


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_any_wav_becomes_16_khz_mono(tmp_path, rate_hz, subtype, channels):
    """A sine is the exact sine at 16 kHz to -60 dB, the mean of its channels, and in time with it."""
    path = str(tmp_path / "x.wav")
    gains = np.arange(channels) - 0.5  # mean (channels - 2) / 2 ...
    gains += 0.8 - gains.mean()  # ... made 0.8
    for hz in (120, 1000, 3000):
        soundfile.write(path, sine(hz, rate_hz)[:, None] * gains / 4, rate_hz, subtype=subtype)
        wave, cut = data.load_audio(path)
        assert wave.dtype == np.float32 and wave.ndim == 1 and wave.flags.c_contiguous and not cut
        assert error_db(wave, 0.2 * sine(hz, 16000)) < -60


@pytest.mark.parametrize("rate_hz", [22050, 44100, 48000, 96000])
def test_nothing_folds_into_the_band(tmp_path, rate_hz):
    soundfile.write(tmp_path / "x.wav", sine(10_000, rate_hz), rate_hz, subtype="FLOAT")
    assert np.abs(data.load_audio(str(tmp_path / "x.wav"))[0][800:-800]).max() < 0.5e-3


@pytest.fixture(scope="module")
def encodings(tmp_path_factory):
    """{format: path} of one second of sound in every format that soundfile can write here."""
    folder, formats = tmp_path_factory.mktemp("encodings"), soundfile.available_formats()
    wave = sine(440, 16000) * np.linspace(0.2, 1, 16000)
    for name in [n for n in ("wav", "flac", "ogg", "mp3") if n.upper() in formats]:
        soundfile.write(folder / f"x.{name}", np.stack([wave, wave], 1), 16000)
    return {
        name: str(folder / f"x.{name}")
        for name in ("wav", "flac", "ogg", "mp3")
        if (folder / f"x.{name}").exists()
    }, wave


def test_formats(encodings):
    """A path and its bytes give the same; what was heard is what was written, lossy or not."""
    paths, wave = encodings
    assert {"wav", "flac"} <= paths.keys()
    for name, path in paths.items():
        heard, _ = data.load_audio(path)
        with open(path, "rb") as f:
            assert np.array_equal(data.load_audio(f.read())[0], heard)
        assert error_db(heard, wave) < (-60 if name in ("wav", "flac") else -20), name


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "raw", "au", "vox", ""])
def test_the_name_does_not_matter(encodings, tmp_path, ending):
    for path in encodings[0].values():
        shutil.copy(path, tmp_path / f"x.{ending}")
        assert np.array_equal(data.load_audio(str(tmp_path / f"x.{ending}"))[0], data.load_audio(path)[0])


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "raw", "au", "vox", "gsm"])
def test_text_is_not_a_sound_under_any_name(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    path.write_text("This is text. " * 1000)
    with pytest.raises(AudioError, match=f"x.{ending}: not a readable sound file"):
        data.load_audio(str(path))


@pytest.mark.parametrize("rate_hz", [8000, 16000, 44100])
def test_cut_at_max_s(tmp_path, rate_hz):
    path = str(tmp_path / "x.wav")
    for seconds, max_s, cut in ((2.0, 2.0, False), (2.0, 1.0, True), (1.0, 300.0, False), (1.0, 0.5, True)):
        soundfile.write(path, sine(440, rate_hz, seconds), rate_hz)
        wave, was_cut = data.load_audio(path, max_s)
        assert was_cut == cut and abs(len(wave) - 16000 * min(seconds, max_s)) <= 1
    soundfile.write(path, sine(440, rate_hz)[: rate_hz // 2 + 1], rate_hz)  # one sample too many
    assert data.load_audio(path, 0.5)[1]


def test_shortest_clip(tmp_path):
    soundfile.write(tmp_path / "x.wav", sine(440, 16000)[:321], 16000)
    assert len(data.load_audio(str(tmp_path / "x.wav"))[0]) == data.MIN_SAMPLES == 321


def with_sample(value):
    wave = sine(440, 16000)
    wave[5000] = value
    return wave


@pytest.mark.parametrize(
    "wave, reason",
    [
        (sine(440, 16000)[:320], "too short, 20.0 ms; at least 20.1 ms"),
        (sine(440, 16000)[:1], "too short"),
        (sine(440, 16000)[:0], "is empty"),
        (with_sample(np.nan), "not finite"),
        (with_sample(np.inf), "not finite"),
        (with_sample(-np.inf), "not finite"),
        (with_sample(1e30), "absurdly large"),
        (np.full((16000, 2), 3e38), "absurdly large"),
    ],
)
def test_bad_samples(tmp_path, wave, reason):
    path = str(tmp_path / "x.wav")
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    with pytest.raises(AudioError) as e:
        data.load_audio(path)
    assert str(e.value).startswith(path) and reason in str(e.value)


def test_a_video_beside_or_instead_of_the_sound(tmp_path):
    """The command that extracts the sound can be run as it stands: what it writes has an ending."""
    (tmp_path / "v.mp4").write_bytes(b"a video")
    for name, out in (("v", "v.wav"), ("v.mp4", "v.wav"), ("v.flac", "v.flac")):
        with pytest.raises(data.AudioError) as e:
            data.load_audio(str(tmp_path / name))
        assert str(e.value).endswith(f"; extract the sound: ffmpeg -i {tmp_path}/v.mp4 {tmp_path}/{out}")


def test_bad_paths(tmp_path):
    """They are refused with their name and the reason; a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "no bytes.wav").touch()
    soundfile.write(tmp_path / "good.wav", sine(440, 16000), 16000)
    for name, reason in (
        ("none.wav", "no such file"),
        (".", "is a directory"),
        ("pipe.wav", "is not a regular file"),
        ("no bytes.wav", "not a readable sound file"),
        ("/dev/zero", "is not a regular file"),
        ("good.wav\0.wav", "no such file"),
        ("\ud800.wav", "no such file"),
        ("x" * 5000, "no such file"),
    ):
        path = os.path.join(tmp_path, name)
        with pytest.raises(AudioError) as e:
            data.load_audio(path)
        assert str(e.value).startswith(path[:1000]) and reason in str(e.value)
    for content in (b"", b"RIFF", b"This is text. " * 100):
        with pytest.raises(AudioError, match=f"<{len(content)} bytes>: not a readable sound file"):
            data.load_audio(content)


def test_damaged_sounds_are_heard_or_refused(encodings):
    rng, kinds = random.Random(0), collections.Counter()
    for name in ("wav", "flac", "ogg"):
        with open(encodings[0].get(name, encodings[0]["wav"]), "rb") as f:
            good = f.read()
        for _ in range(60):
            content = bytearray(good[: rng.choice([len(good), rng.randint(1, len(good))])])
            for _ in range(rng.randint(1, 8)):
                content[rng.randrange(min(len(content), rng.choice([64, 9999])))] = rng.choice(
                    [0, 127, 128, 255]
                )
            try:
                wave, _ = data.load_audio(bytes(content), 5.0)
                assert np.isfinite(wave).all() and 321 <= len(wave) <= 5 * 16000
                kinds["heard"] += 1
            except AudioError:
                kinds["refused"] += 1
    assert kinds["heard"] > 5 and kinds["refused"] > 5


# ---- reading ahead


def test_ahead_keeps_the_order():
    def work(i):
        time.sleep(random.random() / 200)
        if i % 7 == 3:
            raise AudioError(f"clip {i}")
        return i * i

    results = list(data.ahead(range(60), work, workers=4, depth=9))
    assert [i for i, _ in results] == list(range(60))
    for i, result in results:
        assert str(result) == f"clip {i}" if i % 7 == 3 else result == i * i
    assert list(data.ahead([], work, 4, 9)) == []


@pytest.mark.parametrize("depth", [1, 5])
def test_ahead_reads_no_further_than_depth(depth):
    drawn = []
    stream = data.ahead(
        (drawn.append(i) or i for i in itertools.count()), lambda i: i, workers=2, depth=depth
    )
    for i, _ in itertools.islice(stream, 20):
        assert len(drawn) <= i + 1 + depth
    assert not isinstance(next(stream)[1], DataError)
    stream.close()


def test_ahead_works_in_threads():
    """Four at once: each waits for the other three."""
    barrier = threading.Barrier(4, timeout=10)
    assert len(list(data.ahead(range(8), lambda i: barrier.wait(), workers=4, depth=8))) == 8


@pytest.mark.parametrize("end", ["close", "exception"])
def test_ahead_stops_its_threads(end):
    before, begun = set(threading.enumerate()), []

    def work(i):
        begun.append(i)
        time.sleep(0.005)
        if end == "exception" and i == 3:
            raise ZeroDivisionError  # not a fault of the data: it is not passed on as a result
        return i

    stream = data.ahead(itertools.count(), work, workers=3, depth=20)
    if end == "close":
        assert next(stream)[0] == 0
        stream.close()
    else:
        with pytest.raises(ZeroDivisionError):
            list(stream)
    n = len(begun)
    assert n < 20 and not set(threading.enumerate()) - before
    time.sleep(0.03)
    assert len(begun) == n


# ---- probing, and the command line


@pytest.fixture
def clips(tmp_path):
    """A folder with a good clip, one of 10 ms and a text."""
    soundfile.write(tmp_path / "good.wav", sine(440, 16000), 16000)
    soundfile.write(tmp_path / "short.wav", sine(440, 16000, 0.01), 16000)
    (tmp_path / "text.wav").write_text("This is text.")
    return tmp_path


def test_probe_names_line_and_field(read, clips):
    examples = read(
        lines(*(ROW | {"audio": a} for a in ("good.wav", "short.wav", None, "good.wav", "text.wav")))
    )
    data.scan(examples)
    count, problems = data.probe_audio(examples, 30.0)
    assert count == 4 and len(problems) == 2
    assert problems[0].startswith(f'{examples.path}:2: field "audio": {clips / "short.wav"}: too short')
    assert problems[1].startswith(f'{examples.path}:5: field "audio": {clips / "text.wav"}: not a readable')


def test_probe_keeps_to_its_budget(read, clips):
    """The first and the last lines come first, and whatever the budget they are read."""
    names = ["good.wav"] * 199 + ["short.wav"]
    examples = read(lines(*(ROW | {"audio": a} for a in names)))
    count, problems = data.probe_audio(examples, 30.0, budget_s=0.0)
    assert count == 64 and len(problems) == 1 and ":200: " in problems[0]
    assert data.probe_audio(examples, 30.0)[0] == 200


def test_check_exit_codes(read, clips, capsys):
    read(lines(ROW | {"audio": "good.wav"}, ROW | {"audio": None}))
    assert data.main(["check", str(clips / "questions.jsonl")]) == 0
    out, _ = capsys.readouterr()
    assert "own format, 2 examples, 1 clips heard" in out and "gold at          1: 2" in out
    for content, message in (
        (lines(ROW | {"audio": "short.wav"}), ':1: field "audio": '),
        (b"\n", "holds no question"),
        (lines(ROW, ROW | {"answer": 3}), ':2: field "answer": 3'),
    ):
        (clips / "questions.jsonl").write_bytes(content)
        assert data.main(["check", str(clips / "questions.jsonl")]) == 2
        assert message in "".join(capsys.readouterr())
    for argv in (
        [],
        ["check"],
        ["check", "x", "--max_audio_s", "nan"],
        ["check", "x", "--max_audio_s", "-1"],
    ):
        with pytest.raises(SystemExit) as e:
            data.main(argv)
        assert e.value.code == 2


def test_check_from_the_shell(read, clips):
    def shell(*argv):
        return subprocess.run([sys.executable, "data.py", *argv], cwd=ROOT, capture_output=True, text=True)

    read(lines(ROW | {"audio": "good.wav"}))
    good, bad = shell("check", str(clips / "questions.jsonl")), shell("check", str(clips / "none.jsonl"))
    assert good.returncode == 0 and "1 clips heard" in good.stdout
    assert bad.returncode == 2
    assert (
        bad.stderr == f"error: {clips / 'none.jsonl'}: no such file; expected a file of questions (JSONL)\n"
    )


def test_data_needs_no_torch():
    """Neither to read a data set nor to read a clip."""
    code = (
        "import io, sys, data, numpy, soundfile; f = io.BytesIO();"
        "soundfile.write(f, numpy.zeros(999), 16000, format='WAV'); data.load_audio(f.getvalue());"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


# ---- the demo's sounds


def test_synthetic_questions_are_sound(tmp_path):
    examples = Examples(data.write_sounds(str(tmp_path), 24, 4, seed=1, name="demo", silent=0.3))
    data.scan(examples)
    for e in examples:
        assert e.choices[e.answer] == e.meta["label"] and len(set(e.choices)) == 4
        assert 0.5 <= len(data.load_audio(e.audio)[0]) / 16000 <= 0.8
    assert len({e.answer for e in examples}) == 4
    data.scan(
        Examples(data.write_lessons(data.write_sounds(str(tmp_path), 12, 4, seed=3, name="lessons"), 40)),
        "cold_start",
    )


def test_synthetic_questions_are_a_function_of_the_seed(tmp_path):
    contents = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = data.write_sounds(str(tmp_path / folder), 6, 4, seed=seed, name="demo")
        with open(path, "rb") as f, open(Examples(path)[5].audio, "rb") as clip:
            contents.append(f.read() + clip.read())
    assert contents[0] == contents[1] != contents[2]
