"""Bad input: exit code 2, one message with the file, line, field and remedy, no traceback, and in time: before the model."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

import omni_grpo as og


@pytest.fixture
def refused(tiny, tmp_path, monkeypatch, capsys):
    """Run the trainer on arguments that it must refuse.       -> its message, without "error: "

    TMP in the arguments and in the message is the test's folder. `loads`: the fault is one that only loading can find.
    """

    def refused(argv, loads=False):
        if not loads:
            monkeypatch.setattr(og, "load_policy", lambda cfg: pytest.fail("the model was loaded"))
        monkeypatch.chdir(tmp_path)
        argv = [a.replace("TMP", str(tmp_path)) for a in argv]
        defaults = {
            "--model": tiny.base,
            "--data": tiny.questions,
            "--out": str(tmp_path / "out"),
            "--steps": "1",
        }
        if "--resume" not in argv:
            argv = [x for flag, value in defaults.items() if flag not in argv for x in (flag, value)] + argv
        start = time.monotonic()
        try:
            code = og.main(argv)
        except SystemExit as e:  # argparse
            code = e.code
        err = capsys.readouterr().err
        assert code == 2, err
        assert time.monotonic() - start < 10 and len(err) < 4000
        usage, _, message = err.rpartition("error: ")
        assert (not usage or usage.startswith("usage: ")) and "Traceback" not in err
        assert not os.path.exists(tmp_path / "out") or not os.listdir(tmp_path / "out")
        return message.replace(str(tmp_path), "TMP")

    return refused


# ---- data: the third line of three is bad


def clip(wave=None, **options):
    """-> content of a wav file"""
    wave = np.sin(np.arange(16_000) / 5) / 2 if wave is None else wave
    return lambda path: soundfile.write(path, wave, 16_000, **options)


def text(content):
    return lambda path: path.write_bytes(content)


ROW = dict(audio="good.wav", question="What is it?", choices=["dog", "cat", "rain"], answer=1, target="cat")
LINE = "TMP/questions.jsonl:3: "
BAD_ROWS = {  # name: (what the third row changes, or what it is; the message begins with; and holds)
    "index": ({"answer": 3}, 'field "answer": 3 is not among the 3 choices', "give an index from 0 to 2"),
    "negative index": ({"answer": -1}, 'field "answer": -1 is not among', "give an index from 0 to 2"),
    "answer text": (
        {"answer": "frog"},
        "field \"answer\": 'frog' is not among the choices",
        "['dog', 'cat', 'rain']",
    ),
    "no answer": ({"answer": None}, 'field "answer": missing', "training needs it"),
    "answer true": ({"answer": True}, 'field "answer": expected the index or the text', "found True"),
    "answer 1e400": (
        json.dumps(ROW).replace(": 1,", ": 1e400,"),
        'field "answer": expected the index',
        "found inf",
    ),
    "one choice": (
        {"choices": ["cat"], "answer": 0},
        'field "choices": only one choice',
        "needs at least two",
    ),
    "no choices": ({"choices": None, "answer": None}, 'field "choices": missing', "training needs it"),
    "choices a text": (
        {"choices": "dog, cat"},
        'field "choices": expected a list of texts',
        "found 'dog, cat'",
    ),
    "choice null": ({"choices": ["dog", "cat", None]}, 'field "choices": expected a list of texts', "None"),
    "no question": ({"question": None}, 'field "question": expected a text', "found None"),
    "question a list": ({"question": [["?"]]}, 'field "question": expected a text', "[['?']]"),
    "half a character": ({"question": "\ud800"}, 'field "question": holds', "mend or drop the line"),
    "no clip": ({"audio": "none.wav"}, 'field "audio": TMP/none.wav: no such file', ""),
    "clip a folder": ({"audio": "."}, 'field "audio": TMP/.: is a directory', ""),
    "clip a device": ({"audio": "/dev/zero"}, 'field "audio": /dev/zero: is not a regular file', ""),
    "clip a number": ({"audio": 3}, 'field "audio": expected a path', "found 3"),
    "clip with NUL": ({"audio": "good.wav\0"}, 'field "audio": TMP/good.wav\0: no such file', ""),
    "text clip": (
        {"audio": "text.wav"},
        'field "audio": TMP/text.wav: not a readable sound file',
        "mend or drop",
    ),
    "empty clip": ({"audio": "empty.wav"}, 'field "audio": TMP/empty.wav: is empty', "mend or drop"),
    "short clip": (
        {"audio": "short.wav"},
        'field "audio": TMP/short.wav: too short, 10.0 ms',
        "at least 20.1 ms are needed",
    ),
    "NaN clip": (
        {"audio": "nan.wav"},
        'field "audio": TMP/nan.wav: holds samples that are not finite',
        "mend or drop",
    ),
    "cut line": (json.dumps(ROW)[:40], "broken JSON", "was the file cut off"),
    "deep line": ('{"question":' + "[" * 10**5, "broken JSON", "was the file cut off"),
    "null": ("null", "expected a JSON object", "found None"),
}


def write_rows(folder, change):
    for name, write in (
        ("good.wav", clip()),
        ("text.wav", text(b"This is text.")),
        ("empty.wav", clip(np.zeros(0))),
        ("short.wav", clip(np.zeros(160))),
        ("nan.wav", clip(np.full(16_000, np.nan), subtype="FLOAT")),
    ):
        write(folder / name)
    last = change if isinstance(change, str) else json.dumps(ROW | change)
    (folder / "questions.jsonl").write_text(
        "".join(f"{line}\n" for line in (json.dumps(ROW), json.dumps(ROW), last))
    )


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row(refused, tmp_path, name):
    change, begins, holds = BAD_ROWS[name]
    write_rows(tmp_path, change)
    message = refused(["--data", "TMP/questions.jsonl"])
    assert message.startswith(LINE + begins) and holds in message


@pytest.mark.parametrize("flag", ["--eval_data", "--cold_start_data"])
def test_the_other_data_are_read_before_the_model_too(refused, tmp_path, flag):
    write_rows(tmp_path, {"answer": 3})
    assert refused([flag, "TMP/questions.jsonl"]).startswith(LINE + 'field "answer"')
    write_rows(tmp_path, {"audio": "text.wav"})
    assert refused([flag, "TMP/questions.jsonl"]).startswith(LINE + 'field "audio"')
    assert refused([flag, "TMP/none.jsonl"]).startswith("TMP/none.jsonl: no such file")


def test_cold_start_without_target(refused, tmp_path):
    write_rows(tmp_path, {"target": None})
    message = refused(["--cold_start_data", "TMP/questions.jsonl"])
    assert message.startswith(LINE + 'field "target": missing') and "the text to imitate" in message


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "TMP/questions.jsonl: is empty; expected a file of questions"),
        (b"\n \n", "TMP/questions.jsonl: holds no question"),
        (bytes(range(256)) * 99, "TMP/questions.jsonl:2: "),
        (b"\x1f\x8b\x08\x00" * 999, "TMP/questions.jsonl: is compressed"),
        (b'{"a": 1}', "TMP/questions.jsonl:1: unknown format, keys ['a']. Known formats and their keys: "),
        (b"1\n2\n", "TMP/questions.jsonl:1: expected a JSON object, found 1"),
        (b"[" * 10**5, "TMP/questions.jsonl: broken JSON"),
        (json.dumps(ROW, indent=1).encode(), "TMP/questions.jsonl:1: broken JSON"),
        (json.dumps(ROW).encode("utf-16"), "TMP/questions.jsonl:1: not UTF-8 text"),
    ],
    ids=["empty", "blank", "binary", "gzip", "other keys", "numbers", "deep", "pretty-printed", "UTF-16"],
)
def test_bad_file(refused, tmp_path, content, message):
    (tmp_path / "questions.jsonl").write_bytes(content)
    assert refused(["--data", "TMP/questions.jsonl"]).startswith(message)


def test_what_is_not_a_file(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        ("TMP/none.jsonl", "no such file"),
        ("/dev/null", "is not a regular file"),
        ("TMP/pipe", "is not a regular file"),
        ("x" * 5000, "no such file"),
    ):
        assert f"{path[:1000]}: {reason}; expected a file of questions" in refused(["--data", path])
    assert "TMP: is a directory, and holds neither sounds" in refused(["--data", "TMP"])


# ---- flags


BAD_FLAGS = {  # arguments: (the message begins with; and holds)
    "--reward accuracy=nan": ("--reward accuracy=nan: ", "is not finite"),
    "--seed -1": ("--seed -1: ", ""),
    "--seed 99999999999999999999": ("--seed 99999999999999999999: ", ""),
    "--prompts_per_step 99999999999999999999": ("--prompts_per_step 99999999999999999999: ", ""),
    "--adapter TMP/run --lora_rank 0": ("--adapter TMP/run: ", "--lora_rank 0"),
    "--out TMP/file/x": ("--out TMP/file/x: ", "Not a directory"),
    "--order easy_to_hard": ("", 'field "meta": --order easy_to_hard needs a number "pass_rate"'),
    "--num_generations 1": ("--num_generations 1: ", "at least 2"),
    "--temperature 0": ("--temperature 0.0: ", "above 0"),
    "--temperature nan": ("--temperature nan: ", "above 0"),
    "--temperature inf": ("--temperature inf: ", ""),
    "--lr nan": ("--lr nan: ", "0 or more"),
    "--lr -1": ("--lr -1.0: ", "0 or more"),
    "--lr inf": ("--lr inf: ", ""),
    "--beta -0.1": ("--beta -0.1: ", "0 or more"),
    "--steps -1": ("--steps -1: ", "0 or more"),
    "--clip_low 1.5": ("--clip_low 1.5: ", "[0, 1]"),
    "--prompts_per_step 0": ("--prompts_per_step 0: ", "at least 1"),
    "--workers 0": ("--workers 0: ", "at least 1"),
    "--max_audio_s 301": ("--max_audio_s 301.0: ", "at most 300 s"),
    "--max_audio_s 0": ("--max_audio_s 0.0: ", ""),
    "--max_audio_s nan": ("--max_audio_s nan: ", ""),
    "--reward accuray=1": ("--reward accuray=1: unknown reward 'accuray'", "did you mean 'accuracy'?"),
    "--reward accuracy=x": ("--reward accuracy=x: ", "'x' is not a number"),
    "--reward ,": ("--reward ,: unknown reward", "known: accuracy"),
    "--prompt dirct": ("--prompt dirct: unknown", "did you mean 'direct'?"),
    "--scale sdt": ("--scale sdt: ", "'std', 'none'"),
    "--cold_start_steps 3": ("--cold_start_steps 3: needs --cold_start_data", ""),
    "--stpes 3": ("unrecognized arguments: --stpes", ""),
    "--step 3": ("unrecognized arguments: --step", ""),  # no abbreviations
    "more.jsonl": ("unrecognized arguments: more.jsonl", ""),
    "--steps": ("argument --steps: expected one argument", ""),
    "--steps many": ("argument --steps: invalid int value: 'many'", ""),
    "--steps 1.5": ("argument --steps: invalid int value: '1.5'", ""),
    "--lr fast": ("argument --lr: invalid float value: 'fast'", ""),
    "--out TMP/run": ("--out TMP/run: already holds something", "--resume TMP/run, or choose another name"),
    "--out TMP/file": ("--out TMP/file: is a file", ""),
    "--resume TMP/run": ("--resume TMP/run: no checkpoint there", ""),
    "--resume TMP/none": ("--resume TMP/none: no checkpoint there", ""),
    "--resume": ("--resume: name the run", "--resume runs/"),
}


@pytest.mark.parametrize("argv", BAD_FLAGS)
def test_bad_flag(refused, tmp_path, argv):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    (tmp_path / "file").touch()
    begins, holds = BAD_FLAGS[argv]
    message = refused(argv.split())
    assert message.startswith(begins) and holds in message


@pytest.mark.parametrize(
    "argv, begins",
    [
        ("--model TMP/empty", "--model TMP/empty: no config.json in that directory"),
        ("--model TMP/none", "--model TMP/none: not a local directory, and not to be had from the Hub"),
        (
            "--model nobody/nothing",
            "--model nobody/nothing: not a local directory, and not to be had from the Hub",
        ),
        ("--adapter TMP/none", "--adapter TMP/none: "),
        ("--adapter TMP/empty", "--adapter TMP/empty: "),
    ],
)
def test_bad_model(refused, tmp_path, argv, begins):
    (tmp_path / "empty").mkdir()
    assert refused(argv.split(), loads=True).startswith(begins)


def test_from_the_shell(tiny, tmp_path):
    """What the table checks within this process holds for the program: exit code 2, and nothing on stderr but the message."""
    write_rows(tmp_path, {"answer": 3})
    program = os.path.abspath(og.__file__)
    done = subprocess.run(
        [sys.executable, program, "--model", tiny.base, "--data", "questions.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == 'error: questions.jsonl:3: field "answer": 3 is not among the 3 choices; give an index from 0 to 2\n'
    )
    assert not os.path.exists(tmp_path / "runs")
