"""Data: a row becomes a valid Example, or an error with file, line and field; a clip becomes 16 kHz mono."""

import collections
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from array import array

import numpy as np
import pytest
import soundfile

import data
from data import AudioError, DataError, Example, Examples, UserError

ROOT = os.path.dirname(os.path.abspath(data.__file__))
BOM = b"\xef\xbb\xbf"
ROW = dict(audio=None, question="What is it?", choices=["dog", "cat", "rain"], answer=1)


def lines(*rows) -> bytes:
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


def cells(text: str) -> list[list[str]]:
    """A table, one case a line"""
    return [[cell.strip() for cell in line.split(" | ")] for line in text.strip().splitlines()]


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
            data.scan(read(content), purpose)
        assert len(str(e.value)) < 2000
        return str(e.value)[str(e.value).index("questions.jsonl") :]

    return refusal


# ---- our own format


def test_every_field_is_read(read, tmp_path):
    row = dict(id="x", audio="clips/a.wav", question="Qué suena? 犬", choices=["perro 🐕", "gato"], answer=0)
    row |= dict(target="perro 🐕", meta={"pass_rate": 0.5}, comment="kept in meta")
    (example,) = read(lines(row))
    meta = {"pass_rate": 0.5, "comment": "kept in meta"}
    audio = str(tmp_path / "clips" / "a.wav")
    assert example == Example("x", audio, row["question"], row["choices"], 0, row["target"], meta)


def test_paths_are_relative_to_the_file(read, tmp_path, monkeypatch):
    """Whatever the working directory and however the file was named."""
    read(lines(*(ROW | {"audio": name} for name in ("a.wav", "/b.wav", "~/c.wav"))))
    monkeypatch.chdir(tmp_path)
    wanted = [str(tmp_path / "a.wav"), "/b.wav", os.path.expanduser("~/c.wav")]
    assert [e.audio for e in Examples("questions.jsonl")] == wanted


def test_answer_is_an_index_or_a_text(read):
    rows = [ROW | {"choices": ["1", "0", "cat"], "answer": a} for a in (2, "cat", 0, "0", "1")]
    assert [e.answer for e in read(lines(*rows))] == [2, 2, 0, 1, 0]


def test_null_is_the_same_as_missing(read):
    nulls = dict.fromkeys(("id", "audio", "choices", "answer", "target", "meta"))
    bare = {"audio": None, "question": "Why?"}
    wanted = [Example("1", None, "Why?", [], None, None, {})]
    assert list(read(lines(bare | nulls))) == list(read(lines(bare))) == wanted


def test_target_is_a_text_or_several(read):
    targets = ["cat", ["cat", "a cat"]]
    assert [e.target for e in read(lines(*(ROW | {"target": t} for t in targets)))] == targets


ROWS = [ROW | {"id": str(i), "question": f"{i} é 犬 🐕"} for i in range(3)]
LAYOUTS = {
    "no last newline": lines(*ROWS)[:-1],
    "CRLF": lines(*ROWS).replace(b"\n", b"\r\n"),
    "BOM": BOM + lines(*ROWS),
    "blank lines": b"\n \r\n" + lines(*ROWS).replace(b"\n", b"\n\n\t\n"),
    "BOMs": BOM + lines(ROWS[0]) + BOM + lines(*ROWS[1:]),
    "raw unicode": lines(*(json.dumps(r, ensure_ascii=False).encode() for r in ROWS)),
    "list": json.dumps(ROWS).encode(),
    "list, indented": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "list, BOM": BOM + b"\n" * 9000 + json.dumps(ROWS).encode(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_file_does_not_matter(read, layout):
    assert list(read(LAYOUTS[layout])) == [
        Example(r["id"], None, r["question"], r["choices"], 1) for r in ROWS
    ]


def test_lines_are_counted_as_an_editor_counts_them(refusal):
    bad = ROW | {"answer": 3}
    assert refusal(b"\n\n" + lines(ROW) + b"\r\n" + lines(bad)).startswith(
        'questions.jsonl:5: field "answer"'
    )
    assert refusal(json.dumps([ROW, bad]).encode()).startswith('questions.jsonl:entry 2: field "answer"')


def test_reading_is_lazy(read, tmp_path):
    """A broken line is found when it is read; nothing is remembered; the file may be cut off meanwhile."""
    examples = read(lines(ROW, b"{", ROW | {"id": "last"}))
    assert len(examples) == 3 and examples[0].id == "1" and examples[-1].id == examples[2].id == "last"
    assert examples[2] is not examples[2] and [e.id for e in examples[::2]] == ["1", "last"]
    for i in (3, -4):
        with pytest.raises(IndexError):
            examples[i]
    with pytest.raises(DataError, match="questions.jsonl:2: broken JSON"):
        examples[1]
    (tmp_path / "questions.jsonl").write_bytes(lines(ROW)[:20])
    with pytest.raises(DataError, match="questions.jsonl:3: broken JSON"):
        examples[2]


def test_what_is_read_may_be_changed(read):
    """Of lines, lists and tables: the next reading does not know of it."""
    for content in (lines(ROW), json.dumps([ROW]).encode(), b"file,caption,x\na,b,c\n"):
        examples = read(content)
        examples[0].meta["x"] = examples[0].choices.append("x")
        assert examples[0] == examples[0] and "x" not in examples[0].choices
        assert examples[0].meta.get("x") in (None, "c")


# ---- what is refused

BAD_FIELDS = r"""
question | {"question": null}
question | {"question": " "}
question | {"question": [[["?"]]]}
question | {"question": "\ud800"}
choices | {"choices": "dog"}
choices | {"choices": {"a": 1}}
answer | {"choices": ["dog", null]}
choices | {"choices": ["dog", ""], "answer": 0}
choices | {"choices": ["dog"], "answer": 0}
choices | {"choices": ["dog", "ca\udfff", "rain"]}
choices | {"choices": null}
answer | {"answer": 3}
answer | {"answer": -1}
answer | {"answer": "frog"}
answer | {"answer": true}
answer | {"answer": 1.0}
answer | {"answer": NaN}
answer | {"answer": [1]}
target | {"target": []}
target | {"target": ["cat", null]}
target | {"target": 0}
target | {"target": "\ud800"}
meta | {"meta": []}
audio | {"audio": 3}
audio | {"audio": ""}
audio | {"audio": []}
audio | {"audio": ["a", ""]}
audio | {"audio": ["a", 5]}
audio | {"audio": "none.wav"}
audio | {"audio": "."}
audio | {"audio": "/dev/zero"}
audio | {"audio": "a\u0000.wav"}
audio | {"audio": "~\u0000/a.wav"}
audio | {"audio": "\ud800"}
audio | {"audio": "~\ud800"}
"""


@pytest.mark.parametrize("name, change", cells(BAD_FIELDS))
def test_bad_field(refusal, name, change):
    assert refusal(lines(ROW, ROW | json.loads(change))).startswith(f'questions.jsonl:2: field "{name}": ')


@pytest.mark.parametrize(
    "name, value", [("answer", 10**4000), ("answer", "x" * 10**7), ("audio", "x" * 5000)]
)
def test_long_bad_field(refusal, name, value):
    assert refusal(lines(ROW, ROW | {name: value})).startswith(f'questions.jsonl:2: field "{name}": ')


def test_the_message_says_what_was_found_and_what_to_do(refusal):
    for change, message in (
        ({"answer": 3}, 'field "answer": 3 is not among the 3 choices; give an index from 0 to 2'),
        ({"answer": "frog"}, "field \"answer\": 'frog' is not among the choices ['dog', 'cat', 'rain']"),
        ({"choices": None}, "field \"choices\": missing, found only ['answer', 'id', 'question']"),
        (
            {"question": "\ud800"},
            "field \"question\": holds '\\ud800', which is half a character; mend or drop",
        ),
        ({"audio": "none.wav"}, "none.wav: no such file"),
    ):
        assert message in refusal(lines(ROW | change))
    del (row := dict(ROW))["audio"]
    assert 'field "audio": missing; give a path, or null' in refusal(lines(row))


BAD_FILES = [
    (b"", "questions.jsonl: is empty"),
    (b"\n \n\t\r\n", "questions.jsonl: holds no question"),
    (b"[]", "holds no question"),
    (b" [\n]\n", "holds no question"),
    (lines(ROW, ROW)[:-9], "questions.jsonl:2: broken JSON"),
    (json.dumps([ROW]).encode()[:-2], "questions.jsonl: broken JSON"),
    (json.dumps([ROW]).encode() + b" x", "questions.jsonl: broken JSON"),
    (json.dumps([ROW, ROW]).encode().replace(b"}, {", b"} {"), "was the file cut off"),
    (json.dumps(ROW, indent=1).encode() * 2, "an object spread over several lines?"),
    (lines(ROW, ROW).replace(b"\n", b"\r"), "questions.jsonl:1: "),
    (b"1\n2\n3\n", "questions.jsonl:1: expected a JSON object, found 1"),
    (b'"text"', ":1: expected a JSON object"),
    (b"[[1]]", "entry 1: expected a JSON object"),
    (lines(ROW, b"null"), ":2: expected a JSON object, found None"),
    (lines(ROW, ROW).decode().encode("utf-16"), "questions.jsonl: is UTF-16 text"),
    (lines(ROW, ROW).decode().encode("utf-16-le"), "questions.jsonl:1: "),
    ('{"question": "é"}'.encode("latin-1"), "not UTF-8 text"),
    (b'{"question": "\xed\xa0\x80"}', "not UTF-8 text"),
    (bytes(range(256)) * 99, "questions.jsonl:1: "),
    (b"\0" * 999, "questions.jsonl:1: "),
    (b"[" * 10**5, "broken JSON"),
    (lines(ROW, b'{"question":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "questions.jsonl:2: broken JSON"),
    (lines(ROW, b'{"question": "?", "answer": 1' + b"0" * 5000 + b"}"), "questions.jsonl:2: broken JSON"),
    (lines(ROW, json.dumps(ROW).replace("1", "1e400").encode()), 'questions.jsonl:2: field "answer"'),
    (json.dumps({"x" * 10**7: 1}).encode(), "unknown format"),
]


@pytest.mark.parametrize(
    "content, message", BAD_FILES, ids=lambda x: f"{x!r:.25}" if isinstance(x, bytes) else ""
)
def test_bad_file(refusal, content, message):
    assert message in refusal(content)


def test_odd_but_good(read):
    examples = list(read(lines(*(ROW | c for c in ({"id": [1, {}]}, {"id": 1}, {"question": "x" * 10**7})))))
    assert [e.id for e in examples] == ["[1, {}]", "1", "3"] and len(examples[2].question) == 10**7


def test_values_nested_as_deep_as_json_allows_are_read_or_refused(read):
    """repr() of a value may need more stack than its parser did."""
    for depth in range(960, 1000, 2):
        nested = b"[" * depth + b"]" * depth
        for key in (b"question", b"answer", b"id", b"choices"):
            row = b'{"audio": null, "question": "?", "choices": ["a", "b"], "%s": %s}' % (key, nested)
            try:
                list(read(lines(dict(audio=None, question="?"), row)))
            except DataError as e:
                assert "questions.jsonl:2: " in str(e)


def test_what_is_not_a_file(tmp_path):
    """A pipe or a device is refused and not waited for."""
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (
        ("pipe", "is not a regular file"),
        ("/dev/null", "is not a regular file"),
        (".", "expected a data set, or sounds"),
        ("none.jsonl", "no such file"),
        ("x" * 5000, "no such file"),
    ):
        with pytest.raises(DataError, match=reason):
            Examples(os.path.join(tmp_path, name))


# ---- scan and held_out


def test_scan_wants_what_its_purpose_needs(refusal, read):
    no_choices = {"audio": None, "question": "?"}
    no_answer = no_choices | {"choices": ["a", "b"]}
    assert refusal(lines(ROW, no_choices), "train").startswith('questions.jsonl:2: field "choices": missing')
    assert refusal(lines(ROW, no_answer), "train").startswith('questions.jsonl:2: field "answer": missing')
    assert refusal(lines(ROW), "cold_start").startswith('questions.jsonl:1: field "target": missing')
    assert len(data.scan(read(lines(no_choices, no_answer, ROW)), "check")) == 3
    assert len(data.scan(read(lines(dict(nums=[1, 2], target=3))), "train")) == 1


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


def test_a_moved_data_set_is_split_as_before(tmp_path):
    """In its folder, beside it, or by an absolute path: what is moved together keeps its keys."""
    keys = []
    for place in ("here", "far/away"):
        folder = tmp_path / place / "data"
        for name in ("data/clips/a.wav", "beside/b.wav"):
            clip = tmp_path / place / name
            clip.parent.mkdir(parents=True, exist_ok=True)
            clip.touch()
        names = ["clips/a.wav", "../beside/b.wav", str(folder / "clips" / "a.wav")]
        (folder / "q.jsonl").write_text("".join(json.dumps(ROW | {"audio": n}) + "\n" for n in names))
        examples = Examples(str(folder / "q.jsonl"))
        keys.append(list(data.scan(examples, folder=examples.folder)))
        assert not set(data.scan(examples)) & set(keys[-1])
    assert keys[0] == keys[1] and keys[0][0] == keys[0][2] != keys[0][1]


def test_a_sample_is_drawn_by_clip():
    """From the whole file, whatever its order; all questions of a clip, and the same ones every time."""
    keys = array("L", [clip for clip in range(100) for _ in range(3)])
    some = data.sample_by_clip(keys, 60)
    assert 60 <= len(some) < 63 and some == sorted(some) == data.sample_by_clip(keys, 60)
    assert len({keys[i] for i in some}) == len(some) / 3 and max(some) > 200
    assert data.sample_by_clip(keys, 1000) == list(range(300)) and data.sample_by_clip(keys, 0) == []


@pytest.mark.parametrize("per_clip", [1, 4, 25])
def test_held_out_splits_by_clip(per_clip):
    rng = random.Random(0)
    clips = [rng.getrandbits(32) for _ in range(1000 // per_clip)]
    keys = array("L", [clip for clip in clips for _ in range(per_clip)])
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
        assert dataclasses.replace(shuffled, choices=example.choices, answer=3) == example
        assert shuffled == data.shuffle_choices(example, random.Random(seed))
        orders.add((*shuffled.choices, shuffled.answer))
    assert len(orders) == 24 and example.choices == ["a", "b", "c", "b"]
    assert data.shuffle_choices(Example("x", None, "?"), random.Random(0)) == Example("x", None, "?")


def test_chat_messages():
    example = Example("x", ["a.wav", "b.wav"], "What is it?", ["a dog", "it's"], 0)
    text = "What is it? Please choose the answer from the following options: ['a dog', \"it's\"]."
    clip = {"type": "audio", "audio": "clip"}
    assert data.chat_messages(example, data.PROMPTS["direct"]) == [
        {"role": "user", "content": [clip, clip, {"type": "text", "text": text}]}
    ]
    assert data.chat_messages(example, data.PROMPTS["answer"], with_audio=False) == [
        {"role": "user", "content": text + " Output the final answer in <answer> </answer>."}
    ]
    assert data.chat_messages(Example("x", None, "Why?"), data.Template("", system="Be brief.")) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    assert "Describe" in data.chat_messages(example, data.PROMPTS["caption"], False)[0]["content"]


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
    gains = np.arange(channels) - np.arange(channels).mean() + 0.8  # their mean is 0.8
    for hz in (120, 1000, 3000):
        soundfile.write(path, sine(hz, rate_hz)[:, None] * gains / 4, rate_hz, subtype=subtype)
        wave, cut = data.load_audio(path)
        assert wave.dtype == np.float32 and wave.ndim == 1 and wave.flags.c_contiguous and not cut
        assert error_db(wave, 0.2 * sine(hz, 16000)) < -60


@pytest.mark.parametrize("rate_hz", [22050, 44100, 48000, 96000])
def test_nothing_folds_into_the_band(tmp_path, rate_hz):
    soundfile.write(tmp_path / "x.wav", sine(10_000, rate_hz), rate_hz, subtype="FLOAT")
    assert np.abs(data.load_audio(str(tmp_path / "x.wav"))[0][800:-800]).max() < 0.5e-3


WAVE = sine(440, 16000) * np.linspace(0.2, 1, 16000)


@pytest.fixture(scope="module")
def encodings(tmp_path_factory):
    """{format: path} of one second of sound in every format that soundfile can write here."""
    paths = {}
    for name in ("wav", "flac", "ogg", "mp3"):
        if name.upper() in soundfile.available_formats():
            paths[name] = str(tmp_path_factory.getbasetemp() / f"x.{name}")
            soundfile.write(paths[name], np.stack([WAVE, WAVE], 1), 16000)
    assert {"wav", "flac"} <= paths.keys()
    return paths


def test_formats(encodings):
    """A path and its bytes give the same; what was heard is what was written, lossy or not."""
    for name, path in encodings.items():
        heard, _ = data.load_audio(path)
        with open(path, "rb") as f:
            assert np.array_equal(data.load_audio(f.read())[0], heard)
        assert error_db(heard, WAVE) < (-60 if name in ("wav", "flac") else -20), name


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3", "raw", "au", "vox", "gsm", ""])
def test_the_name_does_not_matter(encodings, tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    for original in encodings.values():
        shutil.copy(original, path)
        assert np.array_equal(data.load_audio(str(path))[0], data.load_audio(original)[0])
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
    seconds = 2**15 / rate_hz  # as long as one block is
    soundfile.write(path, np.ones(2**15 + 1) / 2, rate_hz)
    assert data.load_audio(path, seconds)[1] and not data.load_audio(path, seconds + 1 / rate_hz)[1]


def with_sample(value):
    wave = sine(440, 16000)
    wave[5000] = value
    return wave


@pytest.mark.parametrize(
    "wave, reason",
    [
        (sine(440, 16000)[:321], ""),
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
def test_what_can_be_heard(tmp_path, wave, reason):
    path = str(tmp_path / "x.wav")
    soundfile.write(path, wave, 16000, subtype="FLOAT")
    if not reason:
        assert len(data.load_audio(path)[0]) == data.MIN_SAMPLES == len(wave)
        return
    with pytest.raises(AudioError) as e:
        data.load_audio(path)
    assert str(e.value).startswith(path) and reason in str(e.value)


def test_a_video_beside_or_instead_of_the_sound(tmp_path):
    """The command that extracts the sound can be run as it stands: what it writes has an ending."""
    (tmp_path / "v.mp4").write_bytes(b"a video")
    for name, out in (("v", "v.wav"), ("v.mp4", "v.wav"), ("v.flac", "v.flac")):
        with pytest.raises(AudioError) as e:
            data.load_audio(str(tmp_path / name))
        assert str(e.value).endswith(f"; extract the sound: ffmpeg -i {tmp_path}/v.mp4 {tmp_path}/{out}")


def test_bad_paths(tmp_path):
    """They are refused with their name and the reason; a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "no bytes.wav").touch()
    for name, reason in (
        ("none.wav", "no such file"),
        (".", "is a directory"),
        ("pipe.wav", "is not a regular file"),
        ("no bytes.wav", "not a readable sound file"),
        ("/dev/zero", "is not a regular file"),
        ("no bytes.wav\0.wav", "no such file"),
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
        with open(encodings.get(name, encodings["wav"]), "rb") as f:
            good = f.read()
        for _ in range(60):
            content = bytearray(good[: rng.choice([len(good), rng.randint(1, len(good))])])
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(min(len(content), rng.choice([64, 9999])))
                content[at] = rng.choice([0, 127, 128, 255])
            try:
                wave, _ = data.load_audio(bytes(content), 5.0)
                assert np.isfinite(wave).all() and 321 <= len(wave) <= 5 * 16000
                kinds["heard"] += 1
            except AudioError:
                kinds["refused"] += 1
    assert kinds["heard"] > 5 and kinds["refused"] > 5


@pytest.fixture
def clips(tmp_path):
    """A folder with a good clip, one of 10 ms and a text."""
    soundfile.write(tmp_path / "good.wav", sine(440, 16000), 16000)
    soundfile.write(tmp_path / "short.wav", sine(440, 16000, 0.01), 16000)
    (tmp_path / "text.wav").write_text("This is text.")
    return tmp_path


def test_probe_names_line_and_field(read, clips):
    names = ("good.wav", "short.wav", None, "good.wav", "text.wav")
    examples = read(lines(*(ROW | {"audio": name} for name in names)))
    count, problems = data.probe_audio(examples, 30.0)
    assert count == 4 and len(problems) == 2
    assert problems[0].startswith(f'{examples.path}:2: field "audio": {clips / "short.wav"}: too short')
    assert problems[1].startswith(f'{examples.path}:5: field "audio": {clips / "text.wav"}: not a readable')


def test_probe_keeps_to_its_budget(read, clips):
    """The first and the last lines come first, and whatever the budget they are read."""
    examples = read(lines(*(ROW | {"audio": name} for name in ["good.wav"] * 199 + ["short.wav"])))
    count, problems = data.probe_audio(examples, 30.0, budget_s=0.0)
    assert count == 64 and len(problems) == 1 and ":200: " in problems[0]
    assert data.probe_audio(examples, 30.0)[0] == 200


def test_data_needs_no_torch():
    """Neither to read a data set nor to read a clip."""
    code = (
        "import io, sys, data, numpy, soundfile; f = io.BytesIO();"
        "soundfile.write(f, numpy.zeros(999), 16000, format='WAV'); data.load_audio(f.getvalue());"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


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
    items = (drawn.append(i) or i for i in itertools.count())
    stream = data.ahead(items, lambda i: i, workers=2, depth=depth)
    for i, _ in itertools.islice(stream, 20):
        assert len(drawn) <= i + 1 + depth
    stream.close()


def test_ahead_works_in_threads():
    """Four at once: each waits for the other three."""
    barrier = threading.Barrier(4, timeout=10)
    assert len(list(data.ahead(range(8), lambda i: barrier.wait(), workers=4, depth=8))) == 8


def test_ahead_begins_nothing_that_has_no_room():
    waiting = []
    room = lambda items: waiting.append(len(items)) or len(items) <= 3  # noqa: E731
    assert [i for i, _ in data.ahead(range(9), lambda i: i, 2, depth=8, room=room)] == list(range(9))
    assert max(waiting) == 4


@pytest.mark.parametrize("end", ["close", "exception", "stopping"])
def test_ahead_stops_its_threads(end):
    """What was begun is finished; nothing else is begun, and after `stopping` there is no gap in what was."""
    before, begun, stopping = set(threading.enumerate()), [], []

    def work(i):
        begun.append(i)
        time.sleep(0.005)
        if end == "exception" and i == 3:
            raise ZeroDivisionError  # not a fault of the data: it is not passed on as a result
        return i

    stream = data.ahead(itertools.count(), work, workers=3, depth=20, stopping=stopping)
    if end == "close":
        assert next(stream)[0] == 0
        stream.close()
    elif end == "exception":
        with pytest.raises(ZeroDivisionError):
            list(stream)
    else:
        seen = [next(stream)[0]]
        stopping.append(1)
        seen += [i for i, _ in stream]
        assert seen == list(range(len(seen))) == sorted(begun)
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before and len(begun) < 20


# ---- options, exit codes, interruptions, files that survive a kill


@dataclasses.dataclass
class Knobs:
    size: int = data.knob(3, "how large", low=1, high=9)
    rate: float = data.knob(0.5, "100 % of it", above=0, high=1)
    kind: str = data.knob("a", "which", choices=("a", "b"))
    loud: bool = data.knob(False, "is it?")
    names: list = data.knob((), "several", type=str, action="append")


def test_knobs_become_flags():
    """What is not given is not there, so that a default and a flag of the same value can be told apart."""
    parser = data.Parser()
    parser.add_knobs(Knobs)
    argv = "--size 4 --loud --names x --names y".split()
    assert vars(parser.parse_args(argv)) == dict(size=4, loud=True, names=["x", "y"])
    assert vars(parser.parse_args(["--no-loud"])) == dict(loud=False) and not vars(parser.parse_args([]))
    assert "how large (default: 3)" in parser.format_help()
    for wrong in ("--size x", "--siz 4", "4", "--size"):
        with pytest.raises(UserError, match="--help lists the flags"):
            parser.parse_args(wrong.split())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(size=0), "--size 0: must be at least 1 and at most 9"),
        (dict(size=10), "--size 10"),
        (dict(rate=0.0), "--rate 0.0: must be above 0 and at most 1"),
        (dict(rate=float("nan")), "--rate nan"),
        (dict(rate=float("inf")), "--rate inf"),
        (dict(kind="c"), "--kind c: must be one of a [|] b"),
        (dict(), ""),
        (dict(size=1, rate=1, kind="b", loud=True), ""),
        (dict(size=9, rate=None), ""),
    ],
)
def test_ranges_of_knobs(options, message):
    if not message:
        return data.check_knobs(Knobs(**options))
    with pytest.raises(UserError, match=message):
        data.check_knobs(Knobs(**options))


def test_exit_codes(capsys):
    def fail(error):
        raise error

    for error, code, says in (
        (UserError("what and why"), 2, "error: what and why\n"),
        (OSError(28, "No space left", "f"), 2, "error: f: No space left\n"),
        (KeyboardInterrupt(), 130, "goes on"),
    ):
        assert data.exit_code(lambda error=error: fail(error)) == code and says in capsys.readouterr().err
    assert data.exit_code(lambda: None) == 0 and data.exit_code(lambda: 3) == 3
    with pytest.raises(AttributeError):  # a fault of ours
        data.exit_code(lambda: fail(AttributeError()))


def test_the_second_signal_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), data.interruptible() as stopping:
        assert not stopping
        signal.raise_signal(signal.SIGINT)
        assert len(stopping) == 1
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = str(tmp_path / "f")
    data.write_text(path, "old \ud800")

    def write(part):
        with open(part, "w") as f:
            f.write("new")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        data.write_atomically(path, write)
    assert open(path).read() == "old \\ud800" and os.listdir(tmp_path) == ["f"]


def test_a_ledger_goes_on_after_any_kill(tmp_path):
    """Wherever the last line was torn: whole lines are entered, the rest is cut off."""
    path, rows = str(tmp_path / "l"), [dict(id=i, text="é\n") for i in range(3)]
    with data.Ledger(path, "id", lambda *_: pytest.fail("new")) as ledger:
        for row in rows:
            ledger.append(row)
        with pytest.raises(UserError, match="another process is writing it"):
            data.Ledger(path, "id", print)
    whole = open(path, "rb").read()
    for cut in range(len(whole)):
        with open(path, "wb") as f:
            f.write(whole[:cut])
        entered = []
        with data.Ledger(path, "id", lambda row, where: entered.append(row)) as ledger:  # noqa: B023
            n = whole[:cut].count(b"\n")
            assert entered == rows[:n]
            for row in rows[n:]:
                ledger.append(row)
        assert open(path, "rb").read() == whole


@pytest.mark.parametrize("content", [b'{"other": 1}\n', b"[1]\n", b"text", b'{"id": 1}\n{\n', b"\xff\n"])
def test_a_ledger_leaves_other_files_alone(tmp_path, content):
    path = tmp_path / "l"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}:[12]: "):
        data.Ledger(str(path), "id", lambda *_: None)
    assert path.read_bytes() == content


def test_seeds_are_the_same_everywhere():
    assert data.seed_of(1, "a") == data.seed_of(1, "a") == 7669364106777831
    assert len({data.seed_of(i, "a") for i in range(1000)}) == 1000 and data.seed_of("x") < 2**56


def test_a_signal_that_is_ignored_stays_so():
    """A run that was started under nohup outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with data.interruptible("SIGHUP", "SIGTERM") as stopping:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stopping
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
