"""check, convert, folder, filter: what they find, write and refuse, with which exit code."""

import collections
import contextlib
import json
import math
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

import data
from data import Examples
from test_data import cells
from test_formats import CASES
from texts import read_lines, write_lines
from tools import check

PROGRAM = os.path.abspath(data.__file__)
SINE = np.sin(np.arange(1600) / 5) / 2
ROW = dict(audio="a.wav", question="What is it?", choices=["dog", "cat", "rain"], answer=1)


def sound(path, seed=0, wave=None, rate_hz=16_000, **options):
    """A file, with its folders: 0.1 s of a sound that no other seed has."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if wave is None:
        wave = SINE * np.random.default_rng(seed).uniform(0.1, 1, 1600)
    soundfile.write(path, wave, rate_hz, **options)


def write_rows(path, *changes):
    """One row for each of its changes -> JSONL"""
    return write_lines(path, *[ROW | change for change in changes])


def all_files():
    return {os.path.join(d, f) for d, _, files in os.walk(".") for f in files}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test's folder, which is the working directory, with the clips a.wav and b.wav."""
    monkeypatch.chdir(tmp_path)
    sound(str(tmp_path / "a.wav"), 1)
    sound(str(tmp_path / "b.wav"), 2)
    return tmp_path


@pytest.fixture
def run(here, capsys):
    """Arguments -> (stdout, stderr); the exit code must be `code`."""

    def run(*argv, code=0):
        found = data.main(list(map(str, argv)))
        out, err = capsys.readouterr()
        assert found == code and "Traceback" not in err, out + err
        return out, err

    return run


@pytest.fixture
def report(here, capsys):
    """check -> what --report writes, with `problems` and `notes`: {where: [texts]}"""

    def report(path, *argv):
        code = data.main(["check", str(path), *map(str, argv), "--report", "report.json"])
        out, _ = capsys.readouterr()
        with open("report.json", encoding="utf-8") as f:
            facts = json.load(f)
        facts |= dict(problems=collections.defaultdict(list), notes=collections.defaultdict(list))
        for where, kind, text in facts["findings"]:
            facts[f"{kind}s"][where].append(text)
            assert f"{where}: {text}" in out
        assert code == (2 if facts["problems"] else 0)
        return facts

    return report


def shell(*argv, **options):
    command = [sys.executable, PROGRAM, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# ---- check

# line | what its row changes, or what it is | problem or note | how what is said of it begins
PLANTED = r"""
17 | {"audio": "none.wav"} | problem | field "audio": HERE/none.wav: no such file; mend the path, or
101 | {"audio": "empty.wav"} | problem | field "audio": HERE/empty.wav: is empty; replace it or drop the line
102 | {"audio": "no_bytes.wav"} | problem | field "audio": HERE/no_bytes.wav: not a readable sound file
250 | {"audio": "text.wav"} | problem | field "audio": HERE/text.wav: not a readable sound file
333 | {"audio": "cut.flac"} | problem | field "audio": HERE/cut.flac: not a readable sound file
400 | {"audio": "short.wav"} | problem | field "audio": HERE/short.wav: too short, 19.9 ms; at least
512 | {"audio": "long.wav"} | note | field "audio": lasts 40.0 s, cut at 30 s
640 | {"audio": "nan.wav"} | problem | field "audio": HERE/nan.wav: holds samples that are not finite
777 | {"id": "5"} | problem | field "id": '5' is also the id of q.jsonl:6; give each its own
801 | {"answer": null} | problem | field "answer": missing, while other lines have one; give it or
860 | {"choices": ["cat", "rain", "Cat "], "answer": 0} | problem | field "choices": the answer 'cat' stands
900 | {"choices": ["cat", "rain", "rain"], "answer": 0} | note | two of the choices are the same
955 | {"answer": 3} | problem | field "answer": 3 is not among the 3 choices; give an index from 0 to 2
1000 | {"answer": "frog"} | problem | field "answer": 'frog' is not among the choices
1111 | {"choices": ["dog"], "answer": 0} | problem | field "choices": only one choice
1200 | {"audio": "clips/1.wav", "question": | problem | broken JSON
1300 | {"audio": "clips/3.wav"} | note | the same clip and question as q.jsonl:4
1313 | {"audio": "silent.wav"} | note | field "audio": is silent
1499 | {"audio": "short.wav", "question": "And now?"} | problem | field "audio": HERE/short.wav: too short
1500 | {"question": null} | problem | field "question": expected a text, found None
"""


def test_check_finds_every_planted_defect(here):
    """And nothing else; each with its line; on a terminal it shows how far it is, in a file it does not."""
    planted = {int(line): rest for line, *rest in cells(PLANTED)}
    for i in range(1500):
        sound(f"clips/{i}.wav", i, subtype="PCM_16")
    for name, wave in dict(empty=SINE[:0], short=SINE[:318], nan=SINE * np.nan, silent=SINE * 0).items():
        sound(f"{name}.wav", wave=wave, subtype="FLOAT")
    sound("long.wav", wave=np.tile(SINE, 200), rate_hz=8000)
    sound("cut.flac", wave=np.random.default_rng(0).uniform(-1, 1, 9999))
    (here / "cut.flac").write_bytes((here / "cut.flac").read_bytes()[:9000])
    (here / "no_bytes.wav").touch()
    (here / "text.wav").write_text("This is text. " * 99)
    rows = [ROW | dict(id=str(i), audio=f"clips/{i}.wav", answer=i % 3) for i in range(1500)]
    for line, (change, _, _) in planted.items():
        rows[line - 1] = rows[line - 1] | json.loads(change) if change.endswith("}") else change
    write_lines(here / "q.jsonl", *rows)

    done = shell("check", "q.jsonl", "--report", "report.json", cwd=here)
    assert (done.returncode, done.stderr) == (2, "")
    findings = json.loads((here / "report.json").read_text())["findings"]
    assert sorted(where for where, _, _ in findings) == sorted(f"q.jsonl:{line}" for line in planted)
    for where, kind, text in findings:
        _, wanted, says = planted[int(where.removeprefix("q.jsonl:"))]
        assert kind == wanted and text.startswith(says.replace("HERE", str(here)))
        assert f"\n    {where}: {text}\n" in done.stdout

    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    command = [sys.executable, PROGRAM, "check", "q.jsonl"]
    again = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=side)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    assert again.stdout.read().decode() == done.stdout and again.wait() == 2
    assert re.search(rb"lines: +\d+%.*/1500", shown) and re.search(rb"clips: +\d+%.*/14\d\d", shown)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
def test_check_hears_two_clips_at_a_time(run, here, monkeypatch):
    """Whether by threads or by processes: a clip is heard when another is."""
    barrier, read_audio = multiprocessing.get_context("fork").Barrier(2), data.read_audio
    monkeypatch.setattr(check, "read_audio", lambda *a, **k: (barrier.wait(20), read_audio(*a, **k))[1])
    for i in range(64):
        sound(f"{here}/{i}.wav", i)
    run("check", write_lines(here / "q.jsonl", *[ROW | dict(audio=f"{i}.wav") for i in range(64)]))


def test_check_counts(report, here):
    sound("stereo.flac", wave=np.tile(np.stack([SINE, SINE], 1), (5, 1)), rate_hz=8000)
    stereo = dict(audio="stereo.flac", choices=["a", "b"], answer="b")
    changes = [{}, {"question": "?"}, {"audio": "b.wav", "answer": 0}, stereo, {"audio": None, "answer": 2}]
    facts = report(write_rows(here / "q.jsonl", *changes))
    wanted = dict(format="own", examples=5, clips=3, cut=0, findings=[])
    wanted |= dict(seconds=dict(shortest=0.1, median=0.1, longest=1.0), hours=0.0003)
    wanted |= dict(rate_hz={"16000": 2, "8000": 1}, channels={"1": 2, "2": 1})
    wanted |= dict(choices={"2": 1, "3": 4}, answers={"0": 1, "1": 3, "2": 1})
    assert facts | wanted == facts
    assert report("q.jsonl", "--max_audio_s", "0.5")["cut"] == 1


def test_check_of_other_files(report, here):
    """A benchmark without answers is no defect; a folder, a table and a list are read like lines."""
    blank = write_rows(here / "blank.jsonl", {"answer": None}, {"audio": "b.wav", "answer": None})
    assert report(blank)["answers"] == {"None": 2}
    (here / "list.json").write_text(json.dumps([ROW, ROW | {"audio": "no.wav"}]))
    (here / "t.csv").write_text("audio,label\na.wav,dog\nb.wav,cat\nc.wav,cat\n")
    sound("sounds/dog/1.wav")
    sound("sounds/cat/1.wav", 5)
    (here / "sounds" / "cat" / "2.wav").write_text("text")
    for path, where in {"list.json": "entry 2", "t.csv": "4", "sounds": "cat/2.wav"}.items():
        assert [*report(path)["problems"]] == [f"{path}:{where}"]
    assert report("t.csv")["format"] == "labels"


TWICE = """
["C", "C#", "D"] | 0 | []
["5", "-5"] | 1 | []
["की", "का"] | "की" | []
["1.5", "15"] | 0 | []
["+", "-"] | 0 | []
["dog", "Dog.", "cat"] | 0 | ["problem"]
["dog", "cat", " DOG"] | 2 | ["problem"]
["dog", "Dog", "cat"] | 2 | ["note"]
"""


@pytest.mark.parametrize("choices, answer, found", cells(TWICE))
def test_what_counts_as_the_gold_text_twice(report, here, choices, answer, found):
    """What the reward tells apart is not the same."""
    row = ROW | dict(choices=json.loads(choices), answer=json.loads(answer))
    findings = report(write_lines(here / "q.jsonl", row))["findings"]
    assert [kind for _, kind, _ in findings] == json.loads(found)


def test_same_sound_under_another_name_is_noted(report, here):
    sound("c.flac", wave=soundfile.read("a.wav")[0])
    facts = report(write_rows(here / "q.jsonl", {}, {"audio": "b.wav"}, {"audio": "c.flac"}))
    assert [*facts["notes"]] == [f"{here}/q.jsonl:3"] and not facts["problems"]


YT = "-Xy_z0aBcDe"
SHARED = """
a.wav | x/b.wav | yes
a.wav | x/b.flac | yes
a.wav | x/a.wav | no
1.wav | x/1.wav | no
1.wav | x/none/1.wav | no
recording_0001.wav | x/none/recording_0001.wav | no
-Xy_z0aBcDe_000030.wav | x/none/-Xy_z0aBcDe_30.mp3 | yes
-Xy_z0aBcDe_000030.wav | x/none/-Xy_z0aBcDe_40.mp3 | no
silent.wav | x/silence.wav | no
"""


@pytest.mark.parametrize("ours, theirs, shared", cells(SHARED))
def test_against_finds_the_same_clip(report, here, ours, theirs, shared):
    """By its sound, under any name and in any container; by a name that is an id, if there is no sound."""
    is_silent = ours == "silent.wav"
    clip = SINE * 0 if is_silent else np.round(SINE * 9999) / 2**15
    sound(ours, wave=clip)
    if "none" not in theirs:
        sound(theirs, wave=clip if shared == "yes" or is_silent else clip[::-1].copy())
    theirs = write_rows(here / "theirs.jsonl", dict(audio=theirs, question="Something else?"))
    changes = [dict(audio=ours), dict(audio="b.wav"), dict(audio=ours, question="What else?")]
    facts = report(write_rows(here / "ours.jsonl", *changes), "--against", theirs)
    lines = [f"{here}/ours.jsonl:1", f"{here}/ours.jsonl:3"] if shared == "yes" else []
    assert [*facts["problems"]] == lines and facts["shared"] == dict(clips=len(lines), questions=0)


def test_against_finds_the_same_question(report, here):
    """Whatever the order of its choices and its punctuation. That is a note and no problem."""
    theirs = write_rows(here / "theirs.jsonl", {}, {"question": "Who is it?"})
    changes = [dict(choices=["rain", "dog", "cat"], answer=2), dict(question="who is it")]
    changes += [dict(question="Why is it?"), dict(choices=["rain", "dog", "cow"])]
    ours = write_rows(here / "ours.jsonl", *[dict(audio="b.wav") | change for change in changes])
    facts = report(ours, "--against", theirs)
    assert facts["shared"] == dict(clips=0, questions=2) and not facts["problems"]
    assert [*facts["notes"]] == [f"{ours}:1", f"{ours}:2"]


def test_two_clips_with_the_same_32_bits_are_two(report, here):
    """Among pairs of 10,000 clips, hashes of 32 bits collide. These two have the same CRC."""
    base, files = (np.sin(np.arange(-2, 1598) / 5) * 9000).astype(np.int16), []
    for name, start in (("c.wav", (2268, 26237)), ("d.wav", (-7530, -12977))):
        base[:2] = start
        sound(name, wave=base)
        files.append(write_rows(here / f"{name}.jsonl", {"audio": name}))
    assert report(files[0], "--against", files[1])["shared"]["clips"] == 0


def test_against_says_what_could_not_be_compared(run, here):
    """Clips that are not at hand, and bad lines; --audio_dir is not theirs."""
    (here / "x").mkdir()
    rows = [ROW, ROW | {"audio": "none.wav"}, "{", ROW | {"audio": "/no/2.wav"}]
    theirs = write_lines(here / "x" / "theirs.jsonl", *rows)
    out, _ = run("check", write_lines(here / "ours.jsonl", ROW), "--audio_dir", here, "--against", theirs)
    assert f"compared by name, or not 3 of 3 clips and 1 lines of {theirs}" in out


def test_against_knows_embedded_clips_by_their_inner_name(report, here):
    datasets = pytest.importorskip("datasets")
    name = f"{YT}_000030.wav"
    row = ROW | dict(audio={"bytes": (here / "a.wav").read_bytes(), "path": name}, answer="cat")
    datasets.Dataset.from_list([row]).to_parquet("ours.parquet")
    theirs = write_lines(here / "theirs.jsonl", ROW | {"audio": f"none/{name}"})
    assert report("ours.parquet", "--against", theirs)["shared"]["clips"] == 1


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_heard(run, here, monkeypatch):
    monkeypatch.setattr(check, "read_audio", lambda *_, **__: pytest.fail("it was heard"))
    _, err = run("check", write_lines(here / "q.jsonl", ROW), "--report", "none/r.json", code=2)
    assert err == "error: none/r.json: No such file or directory\n"


def test_the_report_never_takes_the_place_of_the_data(run, here):
    content = open(write_lines(here / "q.jsonl", ROW)).read()
    os.symlink("q.jsonl", "link")
    os.mkdir("x")
    (here / "a.csv").write_text("audio,label\na.wav,dog\nb.wav,cat\n")
    for argv in (
        "check q.jsonl --report ./q.jsonl",
        "check q.jsonl --report link",
        "check x/../q.jsonl --report q.jsonl",
        "check a.csv --against q.jsonl --report q.jsonl",
    ):
        _, err = run(*argv.split(), code=2)
        assert "is the data itself" in err and open("q.jsonl").read() == content


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["mp3", "wav"])
def test_half_a_clip_is_a_problem(report, here, kind, inside):
    """Whether on disk or inside a data set; its header still says how long it was."""
    clip, path = here / f"x.{kind}", write_rows(here / "q.jsonl", {"audio": f"x.{kind}"})
    sound(clip, wave=np.tile(SINE, 80))
    assert not report(path)["problems"]
    os.truncate(clip, clip.stat().st_size // 2)
    if inside:
        datasets = pytest.importorskip("datasets")
        row = ROW | dict(audio={"bytes": clip.read_bytes(), "path": None}, answer="cat")
        datasets.Dataset.from_list([row]).to_parquet(path := "q.parquet")
    assert "is cut short" in str(report(path)["problems"])


def test_what_no_terminal_can_show_and_a_pipe_that_closes(here):
    write_lines(here / "q.jsonl", ROW | {"choices": "\ud800"}, *[ROW | {"answer": 9}] * 500)
    done = shell("check", "q.jsonl", "--report", "r.json", cwd=here)
    assert done.returncode == 2 and 'q.jsonl:1: field "choices": ' in done.stdout and not done.stderr
    assert len(json.loads((here / "r.json").read_text())["findings"]) == 501
    assert "... and 301 more; --report FILE.json has them all" in done.stdout
    read, side = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, PROGRAM, "check", "q.jsonl"], stdout=side, stderr=subprocess.PIPE)
    os.close(side)
    assert done.stderr == b""


# ---- what all of them refuse

RANGE = "filter rated.jsonl --out o.jsonl --pass_rate={0} | --pass_rate {0}: expected LOW..HIGH"
RANGES = "0.9..0.1 nan..1 10..90 0.5 ..0.5 0.2.. a..b 0.1-0.9 0..1..1 -1..0.5 0..inf".split()
# arguments | what stderr holds. empty/ is empty, file a file, there.jsonl exists, q.jsonl is good
REFUSED = """
chek q.jsonl | invalid choice: 'chek'
 | the following arguments are required: command
check | required: FILE
check none.jsonl | error: none.jsonl: no such file; expected a file of questions (JSONL)
check blank.jsonl | blank.jsonl: holds no question
check empty | empty: expected a data set
check q.jsonl more.jsonl | unrecognized arguments: more.jsonl
check q.jsonl --repot x | unrecognized arguments: --repot
check q.jsonl --rep x | unrecognized arguments: --rep
check q.jsonl --max_audio_s 0 | --max_audio_s 0.0: must be at least 0.025 and at most 86400
check q.jsonl --max_audio_s nan | --max_audio_s
check q.jsonl --max_audio_s inf | --max_audio_s
check q.jsonl --against none.jsonl | error: none.jsonl: no such file
check q.jsonl --report empty | error: empty:
convert q.jsonl | required: --out
convert none.jsonl --out o.jsonl | error: none.jsonl: no such file
convert q.jsonl --out there.jsonl | error: --out there.jsonl: exists; remove it or give another name
convert q.jsonl --out empty | error: --out empty: exists
convert q.jsonl --out q.jsonl | error: --out q.jsonl: exists
convert q.jsonl --out file/o.jsonl | error:
convert bad.jsonl --out o.jsonl | error: bad.jsonl:2: field "answer": 9 is not among
convert empty --out o.jsonl | error:
convert all_bad.jsonl --out o.jsonl --drop_bad | error: all_bad.jsonl
folder q.jsonl --out o.jsonl | error: q.jsonl: expected a folder of sounds
folder empty --out o.jsonl | error: empty: expected a data set, or sounds (.wav, .flac
folder none --out o.jsonl | error: none: no such
folder sounds | required: --out
folder sounds --out there.jsonl | --out there.jsonl: exists
folder sounds --out held.jsonl | held_eval.jsonl: exists
folder sounds --out o.jsonl --n_choices 1 | --n_choices 1: must be at least 2
folder sounds --out o.jsonl --eval_size -7 | --eval_size
folder sounds --out o.jsonl --eval_size x | --eval_size
folder one_label --out o.jsonl | in folders named after what is heard
folder named --out o.jsonl | found dog_1.wav; sort them so, or write a CSV with the columns
folder mixed --out o.jsonl | found wav/x.wav; sort them
folder broken --out o.jsonl | 2.wav: no such file
folder piped --out o.jsonl | 2.wav: is not a regular file
filter rated.jsonl | required: --out
filter rated.jsonl --out there.jsonl | --out there.jsonl: exists
filter rated.jsonl --out o.jsonl --drop_answerable_without_audio 7 | must be above 0 and at most 1
filter rated.jsonl --out o.jsonl --drop_answerable_without_audio 0 | must be above 0
filter rated.jsonl --out o.jsonl --drop_answerable_without_audio x | --drop_answerable
filter rated.jsonl --out o.jsonl --where k | 11 dropped: not k
filter rated.jsonl --out o.jsonl --max -5 | --max -5
filter rated.jsonl --out o.jsonl --pass_rate 0.95..0.99 | none of 11 examples
filter rated.jsonl --out o.jsonl --where nokey=1 | not nokey=1
filter q.jsonl --out o.jsonl --pass_rate 0..1 | q.jsonl:1: field "meta": expected a number "pass_rate" from 0 to 1, found None; python eval.py
filter q.jsonl --out o.jsonl --drop_answerable_without_audio | q.jsonl:1: field "meta": expected a number "pass_rate_silence"
"""


def rated(path, n=11):
    changes = []
    for i in range(n):
        meta = dict(pass_rate=i / 10, pass_rate_silence=1 - i / 10, loud=i > 5, k=i % 2)
        changes.append(dict(question=f"{i}?", meta=meta))
    return write_rows(path, *changes)


@pytest.mark.parametrize("argv, message", cells(REFUSED) + [RANGE.format(r).split(" | ") for r in RANGES])
def test_refused(run, here, argv, message):
    """Exit code 2, one message, in no time; and no file that was not there."""
    files("sounds", *(f"{label}/{i}.wav" for label in ("dog", "cat") for i in range(5)))
    files("one_label", "dog/1.wav", "dog/2.wav", "audio/dog/3.wav")
    files("named", "dog_1.wav", "cat_1.wav")
    files("mixed", "dog/1.wav", "cat/1.wav", "wav/x.wav")
    for folder in ("broken", "piped"):
        files(folder, "dog/1.wav", "cat/1.wav")
    os.symlink("nowhere", "broken/dog/2.wav")
    os.mkfifo("piped/dog/2.wav")
    (here / "empty").mkdir()
    for name in ("file", "there.jsonl", "held_eval.jsonl"):
        (here / name).touch()
    write_lines(here / "blank.jsonl", "")
    write_rows(here / "q.jsonl", {}, {"question": "And?"})
    write_rows(here / "bad.jsonl", {}, {"answer": 9})
    write_rows(here / "all_bad.jsonl", {"answer": 9}, {"audio": "none.wav"})
    rated(here / "rated.jsonl")
    before = all_files()
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    try:
        _, err = run(*argv.split(), code=2)
    finally:
        signal.alarm(0)
    assert err.startswith("error: ") and message in err and len(err) < 4000 and all_files() == before


@pytest.mark.parametrize("command", ["check", "convert", "folder", "filter"])
def test_help_has_an_example_that_is_valid(run, here, capsys, command):
    """The example gets past the flags, and fails for its file only; every flag says what it does."""

    def help_of(*argv):
        with pytest.raises(SystemExit, match="^0$"):
            data.main([*argv, "--help"])
        return capsys.readouterr().out

    text = help_of(command)
    (example,) = re.findall(rf"^    python data\.py {command} (.*)$", text, re.MULTILINE)
    _, err = run(command, *example.split(), code=2)
    assert re.match(r"error: .*: no such ", err)
    told = re.split(r"\n  (?=-|[A-Z])", text.partition("options:")[2])[1:]
    assert len(told) >= 3
    assert all(len(re.sub(r"^.*?(  +|\n)", "", t, count=1).split()) > 1 for t in told), told
    assert f"\n    python data.py {command} " in help_of()


# ---- convert


def leaves(value):
    """Every number and text of a nested value"""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [] if value is None else [str(value)]


@pytest.mark.parametrize("case", CASES)
def test_convert_loses_nothing(run, here, case):
    """The lines read back as the same questions; columns that the format does not name are all there."""
    rows, known = case["rows"], data.FORMATS[case["format"]]
    write_lines(here / "in", *rows)
    run("convert", "in", "--out", "sub/out.jsonl")
    before, after = Examples("in"), Examples("sub/out.jsonl")
    assert after.format == "own" and len(after) == len(before)
    for old, new in zip(before, after):
        assert vars(new) == vars(old) | dict(audio=new.audio)
        assert list(map(os.path.normpath, new.clips)) == list(map(os.path.normpath, old.clips))
    named = set(re.split("[ |]", " ".join([known.keys, *known.fields.values(), "other_attributes response"])))
    given = leaves([value for row in rows for key, value in row.items() if key not in named])
    lost = set(given) - set(leaves(read_lines("sub/out.jsonl")))
    assert not [leaf for leaf in lost if leaf and not leaf.endswith(".wav")]
    run("convert", "sub/out.jsonl", "--out", "sub/again.jsonl")
    assert read_lines("sub/again.jsonl") == read_lines("sub/out.jsonl")


def test_convert_embedded_clips(run, here):
    """The bytes are written as they are, with the ending of what they are; their name is kept."""
    datasets = pytest.importorskip("datasets")
    rows, contents = [], {}
    for kind in ("wav", "flac", "ogg", "mp3"):
        sound(f"x.{kind}", wave=np.tile(SINE, 10))
        contents[kind] = (here / f"x.{kind}").read_bytes()
        clip = {"bytes": contents[kind], "path": "named.wav"}
        rows.append(ROW | dict(id=f"q/{kind} 犬", answer="cat", audio=clip))
    datasets.Dataset.from_list(rows).to_parquet("in.parquet")
    run("convert", "in.parquet", "--out", "far/out.jsonl")
    os.rename("far", "moved")  # what was written together stays together
    before, after = Examples("in.parquet"), Examples("moved/out.jsonl")
    for old, new, (kind, content) in zip(before, after, contents.items(), strict=True):
        assert new.audio.startswith(str(here / "moved")) and new.audio.endswith(f".{kind}")
        with open(new.audio, "rb") as f:
            assert f.read() == content
        assert vars(new) == vars(old) | dict(audio=new.audio, meta=old.meta | {"audio_path": "named.wav"})
    run("check", "moved/out.jsonl")


def test_convert_keeps_pointing_at_the_clips(run, here):
    """Wherever --out lies and however the clips were named; beside the clips, the paths stay relative."""
    sound("data/clips/a.wav", 3)
    names = ("clips/a.wav", "../a.wav", str(here / "b.wav"), "./clips/../clips/a.wav")
    write_rows(here / "data" / "in.jsonl", *[{"audio": name} for name in names])
    wanted = [here / "data/clips/a.wav", here / "a.wav", here / "b.wav", here / "data/clips/a.wav"]
    for out in ("data/out.jsonl", "out.jsonl", "a/b/out.jsonl", str(here / "c" / "out.jsonl")):
        run("convert", "data/in.jsonl", "--out", out)
        assert [os.path.normpath(e.audio) for e in Examples(out)] == list(map(str, wanted))
    assert [r["audio"] for r in read_lines("data/out.jsonl")][::3] == ["clips/a.wav"] * 2
    write_lines(here / "in.jsonl", ROW)
    run("convert", "in.jsonl", "--audio_dir", "data/clips", "--out", "d/out.jsonl")
    assert Examples("d/out.jsonl")[0].audio == str(wanted[0])


def test_convert_drops_bad_lines_when_asked(run, here):
    rows = [ROW, ROW | {"audio": "none.wav"}, "{", ROW | {"answer": 9}, ROW | {"question": "Last?"}]
    write_lines(here / "q.jsonl", *rows)
    out, _ = run("convert", "q.jsonl", "--out", "out.jsonl", "--drop_bad")
    assert "out.jsonl: 2 examples; 3 left out, the first: q.jsonl:2: " in out
    assert [r["question"] for r in read_lines("out.jsonl")] == ["What is it?", "Last?"]
    _, err = run("convert", "q.jsonl", "--out", "o.jsonl", code=2)
    assert re.findall(r"q\.jsonl:(\d)", err) == ["3", "4"] and "--drop_bad" in err
    write_lines(here / "missing.jsonl", *rows[:2])  # a clip may arrive later
    run("convert", "missing.jsonl", "--out", "missing_out.jsonl")
    assert len(read_lines("missing_out.jsonl")) == 2


@pytest.mark.parametrize("name", ["KILL", "INT"])
def test_convert_ended_in_the_middle(here, name):
    """Leaves nothing under the final name, and does not stand in the way of the next."""
    write_lines(here / "q.jsonl", *[ROW | {"question": f"{i}?" * 20} for i in range(500)])
    code = (
        "import os, signal, sys; import data; get = data.Examples.__getitem__\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job of a shell has none
        f"kill = lambda: os.kill(os.getpid(), signal.SIG{name})\n"
        "data.Examples.__getitem__ = lambda self, i: (i == 400 and kill(), get(self, i))[1]\n"
        "sys.exit(data.main(['convert', 'q.jsonl', '--out', 'out.jsonl']))"
    )
    env = os.environ | {"PYTHONPATH": os.path.dirname(PROGRAM)}
    done = subprocess.run([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    assert done.returncode == (-signal.SIGKILL if name == "KILL" else 130) and "Traceback" not in done.stderr
    assert not os.path.exists("out.jsonl")
    assert (
        data.main(["convert", "q.jsonl", "--out", "out.jsonl"]) == 0 and len(read_lines("out.jsonl")) == 500
    )
    assert not [n for n in os.listdir() if ".part" in n]


def test_bytes_of_a_clip_have_their_ending(here):
    magics = dict(wav=b"RIFF", flac=b"fLaC", ogg=b"OggS", mp3=b"ID3", aiff=b"FORM")
    for kind, magic in [*magics.items(), ("mp3", b"\xff\xfb")]:
        path = data.write_clip(str(here / "x" / "y"), magic + bytes(9))
        assert path.endswith(f"y.{kind}") and (here / path).read_bytes() == magic + bytes(9)


# ---- folder: its command reads the content of a file, and decodes nothing


def files(folder, *names, content="{folder}/{name}"):
    """Files, each with another content"""
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content.format(folder=folder, name=name, i=i), "utf-8", "surrogateescape")


# files | labels
LABELS = """
dog/1.wav, cat/1.FLAC | cat, dog
animals/dog/1.wav, tools/saw/1.ogg | dog, saw
dog/audio/1.wav, cat/train/wav/1.wav | cat, dog
train/dog/1.wav, train/cat/2.wav, train/dog/7.mp3 | cat, dog
101 - Dog/1-30226-A-0.ogg, 102 - Rain/1-1-A-0.ogg | dog, rain
dog/cow.wav, cat/cow.wav | cat, dog
犬/1.wav, 猫/1.wav | 犬, 猫
Größe/1.wav, été/1.wav | größe, été
कुत्ता/1.wav, बिल्ली/1.wav | कुत्ता, बिल्ली
dog/1.wav, cat/1.wav, cat/._1.wav, dog/.hidden.wav, .trash/cow/1.wav, __MACOSX/pig/1.wav | cat, dog
C_major/1.wav, D-major/1.wav, A minor/1.wav | a minor, c major, d major
24 bus/1.wav, 7 bus/1.wav, 0/1.wav | 0, 24 bus, 7 bus
train/dog bark/1.wav, train/Dog_Bark/2.wav, cat/1.wav | cat, dog bark
dog/1.wav, cat/1.wav, README.md, cow/notes.txt, dog/1.json, labels.csv | cat, dog
"""


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("names, labels", cells(LABELS))
def test_labels(run, here, names, labels, form):
    """Those of the innermost folder that says something, in whatever Unicode form."""
    files("in", *unicodedata.normalize(form, names).split(", "))
    out, _ = run("folder", "in", "--out", "out.jsonl")
    examples, labels = list(Examples("out.jsonl")), unicodedata.normalize("NFC", labels).split(", ")
    assert sorted({c for e in examples for c in e.choices}) == labels and f"{len(labels)} labels" in out
    for e in examples:
        assert e.choices[e.answer] == e.meta["label"] and os.path.isfile(e.audio)
        assert "/." not in e.audio


def test_a_file_name_in_another_encoding(run, here):
    files("in", "dog/\udce9.wav", "cat/1.wav")
    run("folder", "in", "--out", "out.jsonl")
    assert sorted(os.path.isfile(e.audio) for e in Examples("out.jsonl")) == [True, True]


def test_distractors_come_from_the_family(run, here):
    kinds = dict(animals="dog cat cow pig hen", tools="saw drill hammer file", water="rain sea")
    for kind, labels in kinds.items():
        files(f"in/{kind}", *(f"{label}/{i}.wav" for label in labels.split() for i in range(12)))
    out, _ = run("folder", "in", "--out", "out.jsonl")
    assert "11 labels, 3 families" in out
    examples = [*Examples("out.jsonl"), *Examples("out_eval.jsonl")]
    for e in examples:
        family = kinds[e.meta["family"]].split()
        assert len(set(e.choices)) == 4 and e.choices[e.answer] == e.meta["label"]
        assert len(set(e.choices) & set(family)) == min(4, len(family))
    assert len(examples) == 132 and len({tuple(e.choices) for e in examples}) > 50
    assert min(collections.Counter(e.answer for e in examples)[k] for k in range(4)) > 132 / 8
    dogs = [choice for e in examples if e.meta["label"] == "dog" for choice in e.choices]
    assert set(dogs) == set(kinds["animals"].split())
    run("folder", "in", "--out", "again.jsonl")
    assert read_lines("again.jsonl") == read_lines("out.jsonl")  # drawn, and not differently every time


def test_split_by_clip(run, here):
    """No content is on both sides, under whatever names; nothing gets lost; the sizes are those asked for."""
    for k, label in enumerate(("dog", "cat", "cow", "pig")):
        for i in range(50):
            files("in", f"{label}/{i}.wav", content=str((50 * k + i) % 67))
    for size, low, high in (("-1", 20, 24), ("30", 30, 34), ("1000", 40, 44)):
        out, _ = run("folder", "in", "--out", f"of{size}.jsonl", "--eval_size", size)
        parts, content = [], []
        for end in ("", "_eval"):
            parts.append([Path(e.audio) for e in Examples(f"of{size}{end}.jsonl")])
            content.append({path.read_bytes() for path in parts[-1]})
            assert f"of{size}{end}.jsonl: {len(parts[-1])} questions" in out
        assert not content[0] & content[1] and len(content[0] | content[1]) == 67
        assert low <= len(parts[1]) <= high and len({*parts[0], *parts[1]}) == 200
    run("folder", "in", "--out", "all.jsonl", "--eval_size", "0")
    assert len(Examples("all.jsonl")) == 200 and not os.path.exists("all_eval.jsonl")


@pytest.mark.parametrize("n_labels, n_choices", [(2, 4), (4, 4), (4, 2), (5, 3), (300, 6)])
def test_number_of_choices(run, here, n_labels, n_choices):
    files("in", *(f"label {i}/1.wav" for i in range(n_labels)))
    run("folder", "in", "--out", "out.jsonl", "--n_choices", n_choices, "--eval_size", "0")
    examples = list(Examples("out.jsonl"))
    assert len(examples) == n_labels and {len(set(e.choices)) for e in examples} == {min(n_labels, n_choices)}
    assert all(e.choices[e.answer] == e.meta["label"] for e in examples)


def test_its_own_output_passes_check(run, here):
    """Even with the same names in all folders, and with spaces; it shares no clip with what is held out."""
    for k, label in enumerate(("dog", "cat", "old cow")):
        for i in range(8):
            sound(f"in/{label}/my {i}: a.wav", 10 * k + i)
    run("folder", "in", "--out", "data/out.jsonl")
    out, _ = run("check", "data/out.jsonl", "--against", "data/out_eval.jsonl")
    assert "clips: 0" in out and re.search(r"problems +0\n", out)
    assert len({e.id for e in [*Examples("data/out.jsonl"), *Examples("data/out_eval.jsonl")]}) == 24


# ---- filter


def filtered(run, *argv):
    """-> (pass rates that are left, stdout)"""
    rated(Path("rated.jsonl"))
    name = f"{len(os.listdir())}.jsonl"
    out, _ = run("filter", "rated.jsonl", "--out", name, *argv)
    left, every = list(Examples(name)), list(Examples("rated.jsonl"))
    assert out.startswith(f"{name}: {len(left)} of 11 examples")
    assert left == [e for e in every if e in left]  # unchanged, and in order
    return [round(10 * e.meta["pass_rate"]) for e in left], out


FILTERS = """
--pass_rate 0.1..0.9 | 1 2 3 4 5 6 7 8 9 | 1 dropped: pass_rate below; 1 dropped: pass_rate above
--pass_rate 0.4..0.4 | 4 | 6 dropped: pass_rate above; 4 dropped: pass_rate below
--pass_rate 0..1 | 0 1 2 3 4 5 6 7 8 9 10 | 11 of 11 examples
--drop_answerable_without_audio | 6 7 8 9 10 | 6 dropped: answerable without audio
--drop_answerable_without_audio 0.8 | 3 4 5 6 7 8 9 10 | 3 dropped: answerable without audio
--pass_rate 0.1..0.9 --drop_answerable_without_audio | 6 7 8 9 | 5 dropped: answerable without audio; 1 d
--where loud=True | 6 7 8 9 10 | 6 dropped: not loud=True
--where loud=true | 6 7 8 9 10 | 6 dropped: not loud=true
--where k=1 --where loud=false | 1 3 5 | 3 of 11 examples
--max 99 | 0 1 2 3 4 5 6 7 8 9 10 | 11 of 11 examples
"""


@pytest.mark.parametrize("argv, left, says", cells(FILTERS))
def test_filter(run, here, argv, left, says):
    """Ends included; the reasons are counted; what is left still has what --order easy_to_hard reads."""
    found, out = filtered(run, *argv.split())
    assert found == [int(i) for i in left.split()] and says in out


def test_filter_without_audio_by_either_measure(run, here):
    names = "pass_rate_silence", "pass_rate_none"
    rates = [{names[0]: 0.1, names[1]: 0.9}, {names[1]: 0.9}, {names[1]: 0.1}, {names[0]: 0.9}, {names[0]: 0}]
    path = write_rows(here / "q.jsonl", *[dict(question=f"{i}?", meta=meta) for i, meta in enumerate(rates)])
    run("filter", path, "--out", "out.jsonl", "--drop_answerable_without_audio")
    assert [r["question"] for r in read_lines("out.jsonl")] == ["2?", "4?"]


def test_filter_max_is_a_sample_by_seed(run, here):
    drawn = [filtered(run, "--max", "5", "--seed", str(s)) for s in (0, 0, 1, 2, 3, 4)]
    assert drawn[0][0] == drawn[1][0] and len({tuple(left) for left, _ in drawn}) > 2
    assert all(len(set(left)) == 5 and "6 dropped: over --max" in out for left, out in drawn)
    assert len(filtered(run, "--pass_rate", "0..0.5", "--max", "3")[0]) == 3


@pytest.mark.parametrize("value", [None, "0.5", True, math.nan, 1.5, -0.1, [0.5]])
def test_filter_names_the_line_without_a_rate(run, here, value):
    rates = (0.1, 0.2, 0.3, value)
    write_rows(here / "q.jsonl", *[{"meta": {"pass_rate": rate}} for rate in rates])
    _, err = run("filter", "q.jsonl", "--out", "out.jsonl", "--pass_rate", "0..1", code=2)
    assert err.startswith('error: q.jsonl:4: field "meta": expected a number "pass_rate" from 0 to 1')
