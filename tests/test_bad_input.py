"""Bad input: exit code 2, one message with the file, line, field and remedy, no traceback, and in time:
before the model."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

import omni_grpo as og
import runs
from test_data import cells


@pytest.fixture
def refuses(tiny, tmp_path, monkeypatch, capsys):
    """Run the trainer on arguments that it must refuse, and check its message: what stands before " ... "
    begins it, the rest is in it. TMP is the test's folder. `loads`: the fault is one that only loading can
    find."""

    def refuses(words, expected, loads=False):
        if not loads:
            monkeypatch.setattr(og, "load_policy", lambda *args: pytest.fail("the model was loaded"))
        monkeypatch.chdir(tmp_path)
        words = [word.replace("TMP", str(tmp_path)) for word in words]
        defaults = {
            "--model": tiny.base,
            "--data": tiny.questions,
            "--out": str(tmp_path / "out"),
            "--steps": "1",
        }
        if "--resume" not in words:
            for flag in defaults.keys() - set(words):
                words = [flag, defaults[flag], *words]
        start = time.process_time()
        code = og.main(words)
        error = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and "Traceback" not in error, error
        assert time.process_time() - start < 10 and len(error) < 4000
        assert not os.path.exists(tmp_path / "out") or not os.listdir(tmp_path / "out")
        message = error.removeprefix("error: ").replace(str(tmp_path), "TMP")
        begins, _, holds = expected.partition(" ... ")
        assert message.startswith(begins) and holds in message, message

    return refuses


# ---- data: the third line of three is bad

ROW = dict(audio="good.wav", question="What is it?", choices=["dog", "cat", "rain"], answer=1, target="cat")
# what the third row changes | the message
BAD_ROWS = r"""
{"answer": 3} | field "answer": 3 is not among the 3 choices ... give an index from 0 to 2
{"answer": -1} | field "answer": -1 is not among ... give an index from 0 to 2
{"answer": "frog"} | field "answer": 'frog' is not among ... ['dog', 'cat', 'rain']
{"answer": null} | field "answer": missing ... training needs it
{"answer": true} | field "answer": expected the index or the text ... found True
{"choices": ["cat"], "answer": 0} | field "choices": only one choice ... needs at least two
{"choices": null, "answer": null} | field "choices": missing ... training needs it
{"choices": "a, b"} | field "choices": expected a list of texts ... found 'a, b'
{"choices": ["dog", null]} | field "answer": it points at a blank choice
{"question": null} | field "question": expected a text ... found None
{"question": [["?"]]} | field "question": expected a text ... [['?']]
{"question": "\ud800"} | field "question": holds ... mend or drop the line
{"audio": "none.wav"} | field "audio": TMP/none.wav: no such file
{"audio": "."} | field "audio": TMP/.: is a directory
{"audio": "/dev/zero"} | field "audio": /dev/zero: is not a regular file
{"audio": 3} | field "audio": expected a path ... found 3
{"audio": "good.wav\u0000"} | field "audio": TMP/good.wavNUL: no such file
{"audio": "text.wav"} | field "audio": TMP/text.wav: not a readable sound file ... mend or drop
{"audio": "empty.wav"} | field "audio": TMP/empty.wav: is empty ... mend or drop
{"audio": "short.wav"} | field "audio": TMP/short.wav: too short, 10.0 ms ... at least 20.1 ms are needed
{"audio": "nan.wav"} | field "audio": TMP/nan.wav: holds samples that are not finite ... mend or drop
"""
BAD_LINES = [  # what the third line is, the message
    (json.dumps(ROW).replace(": 1,", ": 1e400,"), 'field "answer": expected the index ... found inf'),
    (json.dumps(ROW)[:40], "broken JSON ... was the file cut off"),
    ('{"question":' + "[" * 10**5, "broken JSON ... was the file cut off"),
    ("null", "expected a JSON object ... found None"),
]
for change, message in cells(BAD_ROWS):
    BAD_LINES.append((json.dumps(ROW | json.loads(change)), message.replace("NUL", "\0")))


def write_rows(folder, last):
    """questions.jsonl, with such a third line, and its clips."""
    waves = dict(good=np.sin(np.arange(16_000) / 5) / 2, empty=np.zeros(0), short=np.zeros(160))
    for name, wave in waves.items():
        soundfile.write(folder / f"{name}.wav", wave, 16_000)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (folder / "text.wav").write_text("This is text.")
    (folder / "questions.jsonl").write_text("\n".join([json.dumps(ROW), json.dumps(ROW), last, ""]))


@pytest.mark.parametrize("line, message", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_row(refuses, tmp_path, line, message):
    write_rows(tmp_path, line)
    refuses(["--data", "TMP/questions.jsonl"], "TMP/questions.jsonl:3: " + message)


@pytest.mark.parametrize("flag", ["--eval_data", "--cold_start_data"])
def test_the_other_data_are_read_before_the_model_too(refuses, tmp_path, flag):
    for field, value in dict(answer=3, audio="text.wav").items():
        write_rows(tmp_path, json.dumps(ROW | {field: value}))
        refuses([flag, "TMP/questions.jsonl"], f'TMP/questions.jsonl:3: field "{field}"')
    refuses([flag, "TMP/none.jsonl"], "TMP/none.jsonl: no such file")


def test_cold_start_without_target(refuses, tmp_path):
    write_rows(tmp_path, json.dumps(ROW | {"target": None}))
    message = 'TMP/questions.jsonl:3: field "target": missing ... the text to imitate'
    refuses(["--cold_start_data", "TMP/questions.jsonl"], message)


BAD_FILES = {  # name: (content, the message)
    "empty": (b"", ": is empty; expected a file of questions"),
    "blank": (b"\n \n", ": holds no question"),
    "binary": (bytes(range(256)) * 99, ":1: broken JSON"),
    "gzip": (b"\x1f\x8b\x08\x00" * 999, ": could not be unpacked ... was the file cut off?"),
    "other keys": (
        b'{"a": 1}',
        ":1: unknown format, keys ['a']. `data.py convert --columns ... Known formats and their keys: ",
    ),
    "numbers": (b"1\n2\n", ":1: expected a JSON object, found 1"),
    "deep": (b"[" * 10**5, ": broken JSON"),
    "pretty-printed": (json.dumps(ROW, indent=1).encode()[:-5], ":1: broken JSON"),
    "UTF-16": (json.dumps(ROW).encode("utf-16"), ": is UTF-16 text; save it as UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(refuses, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / "questions.jsonl").write_bytes(content)
    refuses(["--data", "TMP/questions.jsonl"], "TMP/questions.jsonl" + message)


def test_what_is_not_a_file(refuses, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in {
        "TMP/none.jsonl": "no such file",
        "/dev/null": "is not a regular file",
        "TMP/pipe": "is not a regular file",
        "x" * 5000: "no such file",
    }.items():
        refuses(["--data", path], f"{path[:1000]}: {reason}; expected a file of questions")
    refuses(["--data", "TMP"], "TMP: expected a data set, or sounds")


# ---- flags

OUT_OF_RANGE = """
    --seed -1, --seed 99999999999999999999, --prompts_per_step 99999999999999999999, --prompts_per_step 0,
    --num_generations 1, --temperature 0, --temperature nan, --temperature inf, --lr nan, --lr -1, --lr inf,
    --beta -0.1, --steps -1, --clip_low 1.5, --max_audio_s 301, --max_audio_s 0, --max_audio_s nan,
    --max_relistens -2, --prompt dirct, --scale sdt, --relisten_from tower
"""
# arguments | the message
BAD_FLAGS = """
--reward accuracy=nan | --reward accuracy=nan: ... is not finite
--reward accuray=1 | --reward accuray=1: unknown reward 'accuray' ... did you mean 'accuracy'?
--reward accuracy=x | --reward accuracy=x: ... 'x' is not a number
--reward , | --reward ,: unknown reward ... known: accuracy
--adapter TMP/run --lora_rank 0 | --adapter TMP/run: ... --lora_rank 0
--order easy_to_hard | / ... field "meta": --order easy_to_hard needs a number "pass_rate"
--cold_start_steps 3 | --cold_start_steps 3: needs --cold_start_data
--stpes 3 | unrecognized arguments: --stpes
--step 3 | unrecognized arguments: --step
more.jsonl | unrecognized arguments: more.jsonl
--steps | argument --steps: expected one argument
--steps many | argument --steps: invalid int value: 'many'
--steps 1.5 | argument --steps: invalid int value: '1.5'
--lr fast | argument --lr: invalid float value: 'fast'
--out TMP/file/x | --out TMP/file/x: Not a directory
--out TMP/run | --out TMP/run: already holds something; give another name
--out TMP/file | --out TMP/file: is a file
--resume TMP/run | --resume TMP/run: no checkpoint there
--resume TMP/none | --resume TMP/none: no checkpoint there
--resume | --resume: name the run ... --resume runs/
"""
BAD_FLAGS = cells(BAD_FLAGS)
for words in OUT_OF_RANGE.split(","):
    BAD_FLAGS.append((words.strip(), words.split()[0] + " ... : must be "))


@pytest.mark.parametrize("words, message", BAD_FLAGS)
def test_bad_flag(refuses, tmp_path, words, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    (tmp_path / "file").touch()
    refuses(words.split(), message)


NOT_FOUND = ": not a local directory, and not to be had from the Hub"


@pytest.mark.parametrize(
    "words, message",
    [
        ("--model TMP/empty", "--model TMP/empty: no config.json in that directory"),
        ("--model TMP/none", "--model TMP/none" + NOT_FOUND),
        ("--model nobody/nothing", "--model nobody/nothing" + NOT_FOUND),
        ("--adapter TMP/none", "--adapter TMP/none: "),
        ("--adapter TMP/empty", "--adapter TMP/empty: "),
    ],
)
def test_bad_model(refuses, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    refuses(words.split(), message, loads=True)


def test_from_the_shell(tiny, tmp_path):
    """What the table checks within this process holds for the program: exit code 2, and nothing on stderr but
    the message."""
    write_rows(tmp_path, json.dumps(ROW | {"answer": 3}))
    command = [sys.executable, os.path.join(runs.ROOT, "omni_grpo.py"), "--model", tiny.base]
    command += ["--data", "questions.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    message = 'questions.jsonl:3: field "answer": 3 is not among the 3 choices; give an index from 0 to 2'
    assert done.stderr == f"error: {message}\n"
    assert not os.path.exists(tmp_path / "runs")
