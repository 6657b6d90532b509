"""Questions from captions: what is accepted, what is written, and that neither kills, nor limits, nor bad
servers lose, double or leak anything."""

import collections
import json
import os
import re
import resource
import signal
import threading
import time
from types import SimpleNamespace

import pytest

import tools.server as client
from data import Example, Examples, UserError, ahead
from fake_server import GOOD, KEY, ROOT, Runs, good, modes, wait_until
from fake_server import server as server
from tools import generate as gen


def clips(text: str, folder="/sounds", **meta) -> list[Example]:
    """c0000, c0001, ..., which the server answers in these modes: "3 good, bad"."""
    examples = []
    for i, mode in enumerate(modes(text)):
        name = f"c{i:04d}"
        captions = [f"notes on clip {name} mode={mode}", "an animal calls"]
        examples.append(Example(name, f"{folder}/{name}.wav", meta=dict(captions=captions) | meta))
    return examples


@pytest.fixture
def make(server, tmp_path):
    return Runs(gen, gen.generate_questions, ("", "_rejects"), tmp_path, server)


def start(make, examples, *flags, **options):
    """The command, a process of its own."""
    path = os.path.join(make.folder, "captions.jsonl")
    with open(path, "w") as f:
        for e in examples:
            f.write(json.dumps(dict(id=e.id, audio=e.audio, captions=e.meta["captions"])) + "\n")
    return make.command(path, *flags, **options)


def instant(monkeypatch, answer=lambda name: None):
    """No server: `send` itself answers."""

    def send(messages, seed):
        name = re.search(r"clip (\w+)", messages[-1]["content"])[1]
        answer(name)
        return json.dumps(good(name + "x")), "stop", [300, 40], False

    monkeypatch.setattr(client, "Chat", lambda *a: SimpleNamespace(send=send))


# -----------------------------------------------------------------------------------------------------------
# What is accepted


def cases():
    """questions.jsonl: a reason ("": it is accepted), and a reply, or how the reply's object differs from
    GOOD."""
    with open(os.path.join(ROOT, "tests", "questions.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    for row in rows:
        reason, text = row.pop("reason"), row.pop("reply", "GOOD").replace("GOOD", json.dumps(GOOD | row))
        yield text, reason
    for cut in (json.dumps(GOOD)[:-1], json.dumps(GOOD)[:50], "{" * 100_000, '{"a":' * 100_000):
        yield cut, "broken JSON"


@pytest.mark.parametrize("reply, reason", list(cases()))
def test_replies(reply, reason):
    try:
        row = gen.check_question(reply, ["A small dog barks at a passing bus", "bell"])
    except client.Refused as e:
        assert str(e) == reason
    else:
        assert not reason and len(row["choices"]) == 4 and row["answer"] in range(4)


def test_every_reason_has_a_case():
    listed = {*gen.question_faults([], "", ["a", "b"], 0), "not four choices", "answer not among the choices"}
    listed |= {"no JSON object", "broken JSON", "several JSON objects", "missing key", "wrong type", ""}
    assert listed == {reason for _, reason in cases()}


# choices; answer; its index; the first choice without its letter
LETTERED = """
A. dog|B. cat|C. owl|D. cow; C; 2; dog
A: dog|B: cat|C: owl|D: cow; B: cat; 1; dog
a. dog|b. cat|c. owl|d. cow; c. owl; 2; dog
1. dog|2. cat|3. owl|4. cow; 4. cow; 3; dog
B. dog|A. cat|C. owl|D. cow; A. cat; 1; B. dog
A. dog|B. cat|C. owl|D. cow|cow; A. dog; 0; A. dog
dog|cat|owl|cow; D; 3; dog
C|D|E|F; D; 1; C
C|D|E|F; A; None; C
"""


@pytest.mark.parametrize("row", LETTERED.strip().splitlines())
def test_letters(row):
    choices, answer, index, first = row.split("; ")
    row = gen.tidy(dict(question="?", choices=choices.split("|"), answer=answer))
    assert str(row["answer"]) == index and row["choices"][0] == first


def test_near_duplicates():
    def mark(question, choices="A dog|A cat|A duck|A cow"):
        return client.fingerprint(dict(question=question, choices=choices.split("|")))

    asked = "Which animal calls twice in the clip?"
    assert mark(asked) == mark("In this audio: which animal CALLS twice", "cow|the duck!|cat|dog")
    assert mark(asked) == mark(asked, "A cow|A duck|A cat|A dog")
    assert mark(asked) != mark(asked.replace("twice", "once"))
    assert mark(asked) != mark(asked, "A dog|A cat|A duck|A pig")


# -----------------------------------------------------------------------------------------------------------
# What is written


def test_lines(make, tmp_path):
    """Every clip gives one line, an Example that `Examples` reads, with all that was known of the clip."""
    asked = "good, prose, cut, bad, null, half, long, same, same"
    examples = clips(asked, str(tmp_path / "wavs"), captions_from="listeners")
    examples[1].audio = "/elsewhere/x.wav"
    summary = make(examples, concurrency=2)
    lines, rejects = make.rows()
    read = list(Examples(make.paths()[0]))
    assert [e.id for e in read] == ["c0000", "c0001", "c0007"] == [line["id"] for line in lines]
    assert [line["audio"] for line in lines] == ["wavs/c0000.wav", "/elsewhere/x.wav", "wavs/c0007.wav"]
    assert [e.audio for e in read][::2] == [examples[0].audio, examples[7].audio]
    for e in read[:2]:
        row = good(e.id)
        assert e.choices[e.answer] == row["answer"] and sorted(e.choices) == sorted(row["choices"])
    made = dict(source="generated", model="m", prompt_version=gen.PROMPT_VERSION, seed=0)
    assert lines[0]["meta"] == examples[0].meta | made | dict(attempts=1, tokens=[300, 40])
    assert [f"{r['id']} {r['reason']} {r['meta']['attempts']}" for r in rejects] == [
        "c0002 cut off 3",
        "c0003 answer not among the choices 3",
        "c0004 no JSON object 3",
        "c0005 half a character 3",
        "c0006 no JSON object 3",
        "c0008 near duplicate 1",
    ]
    assert rejects[0]["captions"] == examples[2].meta["captions"]
    assert rejects[0]["meta"]["tokens"] == [900, 120] and len(rejects[4]["reply"]) == 2000
    assert summary["rejected"]["near duplicate"] == 1
    assert summary["accepted"] == 3 and summary["tokens_in_and_out"] == [5700, 760]
    assert len({e["seed"] for e in make.log}) == len(make.log)  # another one for every request
    assert all(e["response_format"]["json_schema"]["strict"] and e["key"] == KEY for e in make.log)


def test_order_and_bytes_do_not_depend_on_concurrency(make, capsys):
    examples = clips("mixed, mixed@0.02, mixed@0.01, " * 33)
    one, many = make(examples, concurrency=1), make(examples, "many", concurrency=16)
    assert one | dict(answers_per_second=many["answers_per_second"]) == many
    assert make.files() == make.files("many")
    ids = [[r["id"] for r in rows] for rows in make.rows()]
    assert ids == list(map(sorted, ids)) and sorted(sum(ids, [])) == [e.id for e in examples]
    # a mixture that deserves the name
    assert one["rejected"]["near duplicate"] >= 4 and len(one["rejected"]) >= 3
    assert "near duplicate" in capsys.readouterr().out


def test_answer_positions_are_balanced(make, monkeypatch):
    """The server's right choice is always its first. Chi-squared, 3 degrees of freedom: 16.3 at p = 0.001."""
    instant(monkeypatch)
    summary = make(clips("2000 good"))
    places = summary["answer_positions"]
    assert sum((n - 500) ** 2 / 500 for n in places) < 16.3 and sum(places) == 2000
    assert 0.2 < summary["answer_is_the_longest_choice"] < 0.3
    make(clips("2000 good"), "b", seed=1)
    assert [r["answer"] for r in make.rows("b")[0]] != [r["answer"] for r in make.rows()[0]]


# -----------------------------------------------------------------------------------------------------------
# Kills and resumes


@pytest.mark.parametrize("how, stops", [(signal.SIGKILL, (1, 40, 80)), (signal.SIGINT, (30,))])
def test_stopped_at_any_moment(how, stops, make):
    """Several times in one run; nothing is lost, doubled or asked again; the bytes are those of an unbroken
    run."""
    examples = clips("6 mixed@0.01, mixed@0.06, " * 17)
    for stop_at in (*stops, len(examples)):
        make.log.clear()
        before = set(make.ids())
        process = start(make, examples, "--concurrency", 8)
        wait_until(lambda at=stop_at, p=process: p.poll() is not None or len(make.ids()) >= at)
        unfinished = stop_at < len(examples)
        if unfinished:
            process.send_signal(how)
        _, errors = process.communicate()
        done, asked = make.ids(), {e["id"] for e in make.log}
        assert len(set(done)) == len(done) and not asked & before
        if unfinished:
            assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in errors
            assert stop_at <= len(done) < len(examples)
        if unfinished and how == signal.SIGINT:  # what was asked is written, in order, before the end
            assert set(done) == before | asked == {e.id for e in examples[: len(done)]}
    make(examples, "unbroken")
    assert process.returncode == 0 and make.files() == make.files("unbroken")


def test_a_stop_begins_nothing_new():
    """What runs is waited for; what only waits is dropped, though the window has room for it."""
    begun, gate, stopping = [], threading.Event(), []

    def work(job):
        begun.append(job)
        return gate.wait(0 if job == 1 else 5) or job

    results = ahead(range(1, 50), work, 2, 8, stopping)
    assert next(results) == (1, 1)
    wait_until(lambda: len(begun) == 3)
    stopping.append("now")
    threading.Timer(0.3, gate.set).start()
    assert list(results) == [(2, True), (3, True)] and begun == [1, 2, 3]


def test_a_second_interrupt_leaves_at_once(make):
    """Though a server takes its time. Each line was written when its turn came, and stays whole."""
    process = start(make, clips("4 good, 26 good@300"))
    wait_until(lambda: len(make.ids()) == 4)
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and len(make.rows()[0]) == 4


def test_a_line_that_was_cut_anywhere(make):
    examples = clips("2 good, bad, 2 good, bad")
    make(examples)
    whole = make.files()
    for k, path in enumerate(make.paths()):
        last = len(whole[k].splitlines(True)[-1])
        for cut in (1, 2, last // 2, last - 8, last - 1, last):
            open(path, "wb").write(whole[k][:-cut])
            make.log.clear()
            make(examples)
            assert make.files() == whole and len({e["id"] for e in make.log}) == 1


@pytest.mark.parametrize(
    "changes, says", [(dict(model="other"), "other"), (dict(seed=3), "'seed': 3"), ({}, "'new'")]
)
def test_going_on_with_other_settings_is_refused(changes, says, make, monkeypatch):
    make(clips("2 good, bad"))
    if not changes:
        monkeypatch.setattr(gen, "PROMPT_VERSION", "new")
    make.refuses_to_go_on(says, clips("4 good"), **changes)


EDITED = """{"id": "c", "audio": "a", "question": "?", "choices": ["A dog"], "answer": "A dog",
"meta": {"model": "m", "prompt_version": "x", "seed": 0, "tokens": [1, 1]}}
"""


@pytest.mark.parametrize(
    "content",
    [
        '{"id": "x", "question": "mine?"}\n',
        EDITED.replace(",\n", ", "),
        '{"id": "c", "reason": "r", "reply": "", "captions": [], "meta": {}}\n',
        '{"id": "c", "reason": "r", "reply": "", "captions": [], "meta": 3}\n',
        *("a text without a line end", '{"audio": "a.wav", "id', "[]\n", "3\n", "\n", "\xff\n", "\0\0\0\0"),
    ],
)
def test_files_of_others_are_left_alone(content, make):
    for path in make.paths():
        open(path, "wb").write(content.encode("latin-1"))
        make.refuses("jsonl:1: not written by this command|broken JSON|not UTF-8", clips("2 good"))
        assert open(path, "rb").read() == content.encode("latin-1") and not make.log
        os.remove(path)


def test_paths_that_cannot_be_right(make):
    examples = clips("good, bad, good, bad")
    make(examples)
    out, rejects = make.paths()
    for one, other, says in [
        (rejects, out, "not written by"),
        (out, out, "--out and --rejects name the same file"),
        (os.path.dirname(out), rejects, "is a directory"),
        (os.path.join(out + "nowhere", "x"), rejects, "No such file"),
    ]:
        make.refuses(says, examples, out=one, rejects=other)


def test_two_processes_at_once(make):
    examples = clips("4 good, 26 good@300")
    first = start(make, examples, "--concurrency", 2)
    wait_until(lambda: len(make.ids()) == 4)
    second = start(make, examples)
    assert "another process is writing it" in second.communicate()[1] and second.returncode == 2
    first.kill()
    first.communicate()
    make(clips("30 good"))  # the lock ended with its process
    assert len(make.ids()) == len(set(make.ids())) == 30


# -----------------------------------------------------------------------------------------------------------
# Bad servers


def test_limits_and_errors_of_a_server_are_waited_out(make):
    """Retry-After is honoured: the client's own jittered wait would be half a second at most."""
    summary = make(clips("good, limit, errors"))
    times, seeds = zip(*((e["time"], e["seed"]) for e in make.log if e["id"] == "c0001"))
    assert len(times) == 2 and times[1] - times[0] >= 1
    assert seeds[0] == seeds[1]  # the same attempt, asked again
    assert len(make.log) == 1 + 2 + 3 and summary["accepted"] == 3 and not summary["failed_to_be_asked_again"]
    assert {r["meta"]["attempts"] for r in make.rows()[0]} == {1}


def test_a_failed_clip_is_asked_again_in_the_next_run(make, capsys):
    assert make(clips("2 good, broken, 2 good"), retries=0)["failed_to_be_asked_again"] == 1
    assert "Error code: 500" in capsys.readouterr().out
    assert [r["id"] for r in make.rows()[0]] == ["c0000", "c0001", "c0003", "c0004"]
    make.log.clear()
    assert make(clips("5 good"), retries=0)["failed_to_be_asked_again"] == 0
    assert [e["id"] for e in make.log] == ["c0002"] and len(make.ids()) == 5


@pytest.mark.parametrize(
    "asked, says, written, most",
    [
        (  # fewer in a row do not
            "10 good, 19 broken, good, 19 broken, 11 good, 140 broken",
            "20 clips in a row failed, .*no good.*same command",
            22,
            120,
        ),
        ("30 page", "no chat completion", 0, 30),
        ("5 good, 495 forbidden", r"\*\*\*.*OPENAI_API_KEY", 5, 50),
        ("5 good, 495 missing", r"\*\*\*.*--model", 5, 50),
    ],
)
def test_hopeless_runs_are_stopped(asked, says, written, most, make):
    """And what was answered is kept."""
    make.refuses(says, clips(asked), retries=0, concurrency=4)
    assert len(make.ids()) == written and len({e["id"] for e in make.log}) <= most


def test_no_server(make):
    start = time.monotonic()
    options = dict(base_url="http://127.0.0.1:1/v1", retries=1)
    make.refuses("cannot reach the server: .*refused", clips("50 good"), **options)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("choices", [3, None, [], [3], [SimpleNamespace(message=3)]])
def test_json_that_is_no_chat(choices):
    for reply in (choices, SimpleNamespace(choices=choices)):
        with pytest.raises(client.RequestFailed, match="no chat completion"):
            client.read_completion(reply)


def test_an_answer_that_is_cut_off_is_a_failure_of_the_command(make):
    process = start(make, clips("good, 2 half_json"))
    said, errors = process.communicate()
    assert process.returncode == 2 and "error: 2 failed; the same command asks them again" in errors
    assert len(make.rows()[0]) == 1 and "failed to be asked again                2" in said


def test_no_answer_in_time(make):
    summary = make(clips("good, good@300, good"), timeout_s=3, retries=0)
    assert summary["failed_to_be_asked_again"] == 1 and len(make.rows()[0]) == 2


@pytest.mark.parametrize(
    "refused, named",
    [
        ("response_format", False),
        *((name, True) for name in ("response_format", "max_tokens", "temperature", "seed response_format")),
        ("temperature max_tokens max_completion_tokens seed response_format", True),
    ],
)
def test_options_that_a_server_refuses(refused, named, make, server, capsys):
    """Whichever they are, they are left out for the rest of the run: at most one refusal each a thread. The
    user is told once."""
    refused = refused.split()
    server.options[:] = [(option, named) for option in refused]
    summary = make(clips("60 good"), concurrency=2)
    assert summary["accepted"] > 50 and summary["failed_to_be_asked_again"] == 0
    assert sum(any(option in e for option in refused) for e in make.log) <= 2 * len(refused)
    sent = {*make.log[-1]} & {"temperature", "max_tokens", "max_completion_tokens", "seed", "response_format"}
    limit = {"max_completion_tokens" if "max_tokens" in refused else "max_tokens"}
    assert sent == {"temperature", "seed", "response_format"} - {*refused} | limit - {*refused}
    assert all(make.log[-1][name] == 400 for name in sent & limit)
    notes = capsys.readouterr().err
    told = [option for option in refused if option != "max_completion_tokens"]
    assert all(notes.count(f"the server refuses {option};") in (1, 2) for option in told)


def test_a_refusal_later_that_names_nothing_is_no_refusal_of_an_option(make):
    summary = make(clips("9 good, odd, 20 good"), concurrency=1)
    assert summary["failed_to_be_asked_again"] == 1 and all("response_format" in e for e in make.log)


def test_a_server_that_counts_no_tokens(make, capsys):
    summary = make(clips("4 free"))
    prompt = sum(len(m["content"]) for m in gen.writing_prompt(clips("free")[0])) // 4
    assert summary["replies_with_estimated_tokens"] == 4
    assert abs(summary["tokens_in_and_out"][0] / 4 - prompt) < 20
    assert "estimated" in capsys.readouterr().out


# -----------------------------------------------------------------------------------------------------------
# The key


def test_the_key_is_nowhere(make):
    """Though the server echoes it, in errors and in a question."""
    process = start(make, clips("leak, odd, bad, good, leak, forbidden"), "--concurrency", 1)
    said = "".join(process.communicate())
    assert process.returncode == 2 and "***" in said and b"***" in make.files()[0]
    for text in (said.encode(), *make.files()):
        assert KEY.encode() not in text and make.url.encode() not in text
    assert {e["key"] for e in make.log} == {KEY}


def test_which_key(make, monkeypatch):
    one = clips("good")
    monkeypatch.setenv("OPENAI_API_KEY", "")
    make(one)
    assert make.log[-1]["key"] == "none"
    make.refuses("OPENAI_API_KEY", one, "b", base_url="")
    for bad in ("sk-\u2026abc", "sk-one two"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        make.refuses(f"OPENAI_API_KEY(?!.*{bad})", one, "b")
    monkeypatch.setenv("OPENAI_API_KEY", "dog\n")  # too short for a secret; it stays in the questions
    make(clips("40 good"), "b")
    content = make.files("b")[0]
    assert make.log[-1]["key"] == "dog" and b"***" not in content and b'"dog"' in content


# -----------------------------------------------------------------------------------------------------------
# Limits, arguments, speed, memory


def test_limits_hold_over_all_runs(make, capsys):
    """The limit is never exceeded, it leaves less than one clip might take, and a higher one goes on."""
    examples = clips("80 mixed")
    make(examples, "unbroken")
    make.log.clear()
    for limit in (20_000, 20_000, 30_000):
        summary = make(examples, max_tokens_total=limit)
        assert summary["stopped"] and limit - 7000 < sum(summary["tokens_in_and_out"]) <= limit
        assert "with a higher one" in capsys.readouterr().out
        assert summary["tokens_in_and_out"] == [300 * len(make.log), 40 * len(make.log)]
    assert not make(examples)["stopped"] and make.files() == make.files("unbroken")


def test_a_limit_counts_all_attempts_at_full_length(make, monkeypatch):
    def send(messages, seed):
        return "no", "stop", [client.rough_prompt_tokens(messages, gen.SCHEMA), 400], False

    monkeypatch.setattr(client, "Chat", lambda *a: SimpleNamespace(send=send))
    examples = clips("20 good")
    one = 3 * (client.rough_prompt_tokens(gen.writing_prompt(examples[0]), gen.SCHEMA) + 400)
    for n in (2, 5):
        summary = make(examples, max_tokens_total=round((n + 0.5) * one))
        assert summary["rejected"] == {"no JSON object": n} and sum(summary["tokens_in_and_out"]) == n * one


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(concurrency=0), "--concurrency 0: must be at least 1"),
        (dict(attempts=0), "--attempts"),
        (dict(temperature=float("nan")), "--temperature"),
        (dict(temperature=-1), "--temp"),
        (dict(retries=-1), "--retries -1: must be at least 0"),
        (dict(max_tokens_total=-5), "--max_tokens_total"),
        (dict(timeout_s=1e300), "--timeout_s .*86400"),
        (dict(model=""), "--model"),
        *((dict(base_url=url), "--base_url: expected http://HOST:PORT/v1 [^\n]*$") for url in (
            "http://127.0.0.1:99999/v1", "http://h:abc/v1", "http://h:0/v1", "ftp://x/v1", "127.0.0.1/v1"
        )),
    ],
)  # fmt: skip
def test_arguments(options, says, make):
    make.refuses(says, clips("good"), **options)
    assert not make.files() and not make.log


@pytest.mark.parametrize("captions", [None, [], "a dog", ["a dog", 3], [" "], ["half \ud800 a character"]])
def test_broken_captions_stop_after_what_came_before(captions, make):
    examples = clips("6 good")
    examples[3].meta["captions"] = captions
    make.refuses("clip 'c0003': field \"captions\": ", examples)
    assert [r["id"] for r in make.rows()[0]] == ["c0000", "c0001", "c0002"]
    examples[3] = Example("c0003", None, "", meta=examples[2].meta)
    make.refuses('field "audio"', examples)


def test_the_command_line(make, tmp_path, capsys):
    """The labels of a clip are one question; --help has an example."""

    def run(name, text, *flags):
        (tmp_path / name).write_text(text)
        flags = ["--model", "m", "--out", make.paths()[0], "--base_url", make.url, *flags]
        gen.main([str(tmp_path / name), *flags])

    for flag, says in (("timeout_s=1e300", "86400"), ("temprature=1", "--temprature"), ("seed=x", "--seed")):
        with pytest.raises(UserError, match=says):
            run("c.csv", "", f"--{flag}")
    with pytest.raises(SystemExit):
        run("c.csv", "", "--help")
    assert "python -m tools.generate captions.jsonl --model" in capsys.readouterr().out
    run("c.csv", "audio,category\na.wav,clip one\nb.wav,clip two\na.wav,clip three\n")
    lines = {r["id"]: r["meta"]["captions"] for r in make.rows()[0]}
    assert lines == {"a.wav": ["clip one", "clip three"], "b.wav": ["clip two"]}
    with pytest.raises(UserError, match="q.jsonl:1: neither captions nor a label"):
        run("q.jsonl", '{"audio": "a.wav", "question": "Why?", "choices": ["a", "b"], "answer": 0}\n')


def test_an_id_that_stands_there_again_gets_a_number(make):
    """Whatever the concurrency; nothing is lost, doubled or asked again."""
    examples = clips("12 good")
    own = [e.id for i, e in enumerate(examples) if i not in (3, 5, 7, 8)]
    for i in (3, 7, 8):
        examples[i].id = "c0000"
    examples[5].id = "c0000 #2"
    for name, n in (("a", 1), ("many", 64), ("many", 16)):
        make(examples, name, concurrency=n)
    assert make.files() == make.files("many")
    assert sorted(make.ids()) == sorted([*own, "c0000 #2", "c0000 #2 #2", "c0000 #3", "c0000 #4"])


def test_embedded_clips_are_to_be_converted_first(make, tmp_path):
    datasets = pytest.importorskip("datasets")
    row = dict(audio={"bytes": b"RIFF", "path": None}, caption="x")
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "p"))
    make.refuses("convert it first", gen.Captioned(str(tmp_path / "p")))


def test_the_window_is_bounded(make, monkeypatch):
    """One slow clip holds the others up before they pile up in memory."""
    asked, gate = [], threading.Event()

    def answer(name):
        asked.append(name)
        if name == "c0000":
            time.sleep(0.3)
            assert len(asked) <= 16
            gate.set()

    instant(monkeypatch, answer)
    assert make(clips("100 good"), concurrency=4)["accepted"] == 100 and gate.is_set()


def test_a_disk_that_is_full(make):
    """A file-size limit stands in for it. What fits is written, half a line perhaps; then the run goes on."""
    examples = clips("40 mixed")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    process = start(make, examples, preexec_fn=limit)
    _, errors = process.communicate()
    assert process.returncode == 2 and "same command goes on" in errors and "Traceback" not in errors
    assert len(make.files()[0]) == 6000 and len(make.ids()) > 5
    make(examples)
    make(examples, "unbroken")
    assert make.files() == make.files("unbroken")


def resident_mb() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


class Lazy(collections.UserList):
    """A long list of clips that holds none."""

    def __iter__(self):
        for i in self.data:
            captions = [f"clip c{i:06d} " + "x" * 3000]
            yield Example(f"c{i:06d}", f"/sounds/{i}.wav", "", meta={"captions": captions})


def test_memory_is_flat(make, monkeypatch):
    """A result weighs 5 KB, so 6,000 kept ones would be 30 MB; hashes are 0.2 KB a clip."""
    instant(monkeypatch)
    make(Lazy(range(500)), "small")
    before = resident_mb()
    assert make(Lazy(range(6000)))["accepted"] == 6000
    assert resident_mb() - before < 12
    make(Lazy(range(6000)))  # nor does reading what is done
    assert resident_mb() - before < 12


def test_speed(make):
    """Processor time for 500 clips, so that a busy machine does not matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    start(make, clips("500 good")).communicate()
    assert len(make.ids()) == 500 and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 12
