"""Questions from captions: what is accepted, what is written, and that neither kills, nor limits, nor bad
servers lose, double or leak anything."""

import json
import os
import re
import resource
import signal
import threading
import time
import types

import pytest

import tools.server as client
from data import Example, Examples, UserError, ahead
from fake_server import ANIMALS, GOOD, KEY, ROOT, Runs, good, wait_until
from fake_server import server as server
from tools import generate as gen


def clips(n: int, extra=lambda i: "", folder="/sounds", **meta) -> list[Example]:
    """c0000, c0001, ...; extra(i) is in the notes on clip i, where the server reads it."""

    def clip(i):
        captions = [f"notes on clip c{i:04d} {extra(i)}", "an animal calls"]
        return Example(f"c{i:04d}", f"{folder}/c{i:04d}.wav", "", meta={"captions": captions} | meta)

    return [clip(i) for i in range(n)]


def write_captions(path, examples) -> str:
    rows = [dict(id=e.id, audio=e.audio, captions=e.meta["captions"]) for e in examples]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def make(server, tmp_path):
    """Generate in this process; and the files of it."""

    class Make(Runs):
        def __call__(self, examples, name="a", **options):
            options = dict(model="m", out=self.paths(name)[0], base_url=server.url) | options
            return gen.generate_questions(examples, gen.Options(**options))

    return Make("tools.generate", tmp_path, ("", "_rejects"), server.url)


def instant(monkeypatch, answer=lambda name: None):
    """No server: `send` itself answers."""

    def send(messages, seed):
        name = re.search(r"clip (\w+)", messages[-1]["content"])[1]
        answer(name)
        return json.dumps(good(name + "x")), "stop", [300, 40], False

    monkeypatch.setattr(client, "connect", lambda *a: send)


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


@pytest.mark.parametrize(
    "choices, answer, index, first",
    [
        ("A. dog|B. cat|C. owl|D. cow", "C", 2, "dog"),
        ("A: dog|B: cat|C: owl|D: cow", "B: cat", 1, "dog"),
        ("B. dog|A. cat|C. owl|D. cow", "A. cat", 1, "B. dog"),
        ("dog|cat|owl|cow", "D", 3, "dog"),
        ("C|D|E|F", "D", 1, "C"),
        ("C|D|E|F", "A", None, "C"),
    ],
)
def test_letters(choices, answer, index, first):
    row = gen.tidy(dict(question="?", choices=choices.split("|"), answer=answer))
    assert row["answer"] == index and row["choices"][0] == first


@pytest.mark.parametrize("marks", ["1234", "abcd", "ABCD"])
def test_all_kinds_of_letters_go_from_the_choices(marks):
    choices = [f"{mark}. {animal}" for mark, animal in zip(marks, ANIMALS)]
    row = gen.tidy(dict(question="?", choices=choices, answer=f"{marks[2]}. cow"))
    assert row["choices"] == ANIMALS[:4] and row["answer"] == 2


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


def test_lines(make, server, tmp_path):
    """Every clip gives one line, an Example that `Examples` reads, with all that was known of the clip."""
    modes = ["good", "prose", "cut", "bad", "null", "half", "long", "same", "same"]
    examples = clips(9, lambda i: "mode=" + modes[i], str(tmp_path / "wavs"), captions_from="listeners")
    examples[1].audio = "/elsewhere/x.wav"
    summary = make(examples, concurrency=2)
    lines, rejects = make.rows()
    read = list(Examples(make.paths()[0]))
    assert [e.id for e in read] == ["c0000", "c0001", "c0007"] == [line["id"] for line in lines]
    assert [line["audio"] for line in lines] == ["wavs/c0000.wav", "/elsewhere/x.wav", "wavs/c0007.wav"]
    assert [e.audio for e in read][::2] == [examples[0].audio, examples[7].audio]
    for e in read[:2]:
        assert e.choices[e.answer] == good(e.id)["answer"] and sorted(e.choices) == sorted(
            good(e.id)["choices"]
        )
    made = dict(source="generated", model="m", prompt_version=gen.PROMPT_VERSION, seed=0)
    assert lines[0]["meta"] == examples[0].meta | made | dict(attempts=1, tokens=[300, 40])
    assert {r["id"]: (r["reason"], r["meta"]["attempts"]) for r in rejects} == {
        "c0002": ("cut off", 3),
        "c0003": ("answer not among the choices", 3),
        "c0004": ("no JSON object", 3),
        "c0005": ("half a character", 3),
        "c0006": ("no JSON object", 3),
        "c0008": ("near duplicate", 1),
    }
    assert rejects[0]["captions"] == examples[2].meta["captions"] and rejects[0]["meta"]["tokens"] == [
        900,
        120,
    ]
    assert len(rejects[4]["reply"]) == 2000 and summary["rejected"]["near duplicate"] == 1
    assert summary["accepted"] == 3 and summary["tokens_in_and_out"] == [5700, 760]
    assert len({e["seed"] for e in server.log}) == len(server.log)  # another one for every request
    assert all(e["response_format"]["json_schema"]["strict"] and e["key"] == KEY for e in server.log)


def test_order_and_bytes_do_not_depend_on_concurrency(make, capsys):
    examples = clips(100, lambda i: f"mode=mixed slow={[0, 0.02, 0.01][i % 3]}")
    one, many = (
        make(examples, name, concurrency=n) | {"answers_per_second": 0}
        for name, n in (("a", 1), ("many", 16))
    )
    assert one == many and make.files() == make.files("many")
    ids = [[r["id"] for r in rows] for rows in make.rows()]
    assert ids == list(map(sorted, ids)) and sorted(sum(ids, [])) == [e.id for e in examples]
    # a mixture that deserves the name
    assert one["rejected"]["near duplicate"] >= 4 and len(one["rejected"]) >= 3
    assert "near duplicate" in capsys.readouterr().out


def test_answer_positions_are_balanced(make, monkeypatch):
    """The server's right choice is always its first. Chi-squared, 3 degrees of freedom: 16.3 at p = 0.001."""
    instant(monkeypatch)
    summary = make(clips(2000))
    assert (
        sum((n - 500) ** 2 / 500 for n in summary["answer_positions"]) < 16.3
        and sum(summary["answer_positions"]) == 2000
    )
    assert 0.2 < summary["answer_is_the_longest_choice"] < 0.3
    make(clips(2000), "b", seed=1)
    assert [r["answer"] for r in make.rows("b")[0]] != [r["answer"] for r in make.rows()[0]]


# -----------------------------------------------------------------------------------------------------------
# Kills and resumes


@pytest.mark.parametrize("how, stops", [(signal.SIGKILL, (1, 40, 80)), (signal.SIGINT, (30,))])
def test_stopped_at_any_moment(how, stops, make, server, tmp_path):
    """Several times in one run; nothing is lost, doubled or asked again; the bytes are those of an unbroken
    run."""
    n = 120
    examples = clips(n, lambda i: f"mode=mixed slow={0.01 if i % 7 else 0.06}")
    captions = write_captions(tmp_path / "captions.jsonl", examples)
    for stop_at in (*stops, n):
        del server.log[:]
        before = set(make.ids())
        process = make.command(captions, "--concurrency", 8)
        wait_until(lambda at=stop_at, p=process: p.poll() is not None or len(make.ids()) >= at)
        if stop_at < n:
            process.send_signal(how)
        _, errors = process.communicate()
        done, asked = make.ids(), {e["id"] for e in server.log}
        assert len(set(done)) == len(done) and not asked & before
        if stop_at < n:
            assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in errors
            assert stop_at <= len(done) < n
        if stop_at < n and how == signal.SIGINT:  # what was asked is written, in order, before the end
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


def test_a_second_interrupt_leaves_at_once(make, tmp_path):
    """Though a server takes its time. Each line was written when its turn came, and stays whole."""
    process = make.command(
        write_captions(tmp_path / "c.jsonl", clips(30, lambda i: "slow=300" if i > 3 else ""))
    )
    wait_until(lambda: len(make.ids()) == 4)
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and len(make.rows()[0]) == 4


def test_a_line_that_was_cut_anywhere(make, server):
    examples = clips(6, lambda i: "mode=bad" if i in (2, 5) else "")
    make(examples)
    whole = make.files()
    for k, path in enumerate(make.paths()):
        last = len(whole[k].splitlines(True)[-1])
        for cut in (1, 2, last // 2, last - 8, last - 1, last):
            open(path, "wb").write(whole[k][:-cut])
            del server.log[:]
            make(examples)
            assert make.files() == whole and len({e["id"] for e in server.log}) == 1


@pytest.mark.parametrize(
    "changes, says", [(dict(model="other"), "other"), (dict(seed=3), "'seed': 3"), ({}, "'new'")]
)
def test_going_on_with_other_settings_is_refused(changes, says, make, server, monkeypatch):
    make(clips(3, lambda i: "mode=bad" if i == 2 else ""))
    before, asked = make.files(), len(server.log)
    if not changes:
        monkeypatch.setattr(gen, "PROMPT_VERSION", "new")
    for keep in (0, 1):  # either file alone is enough
        with pytest.raises(UserError, match=f"{says}.*other files"):
            make(clips(4), **changes)
        assert make.files()[keep:] == before[keep:] and len(server.log) == asked
        open(make.paths()[0], "w").close()


@pytest.mark.parametrize(
    "content",
    [
        '{"id": "x", "question": "mine?"}\n',
        '{"id": "c", "reason": "r", "reply": "", "captions": [], "meta": {}}\n',
        '{"id": "c", "reason": "r", "reply": "", "captions": [], "meta": 3}\n',
        *("a text without a line end", '{"audio": "a.wav", "id', "[]\n", "3\n", "\n", "\xff\n", "\0\0\0\0"),
    ],
)
def test_files_of_others_are_left_alone(content, make, server):
    for path in make.paths():
        open(path, "wb").write(content.encode("latin-1"))
        with pytest.raises(UserError, match="not written by this command|broken JSON|not UTF-8"):
            make(clips(2))
        assert open(path, "rb").read() == content.encode("latin-1") and not server.log
        os.remove(path)


def test_a_line_that_was_edited(make):
    make(clips(2))
    line = make.rows()[0][0]
    with open(make.paths()[0], "w") as f:
        f.write(json.dumps(line | {"answer": line["choices"][0]}) + "\n")
    with pytest.raises(UserError, match="a.jsonl:1: not written by this command"):
        make(clips(2))


def test_paths_that_cannot_be_right(make):
    examples = clips(4, lambda i: "mode=bad" if i % 2 else "")
    make(examples)
    out, rejects = make.paths()
    for one, other, says in [
        (rejects, out, "not written by"),
        (out, out, "--out and --rejects name the same file"),
        (os.path.dirname(out), rejects, "is a directory"),
        (os.path.join(out + "nowhere", "x"), rejects, "No such file"),
    ]:
        with pytest.raises(UserError, match=says):
            make(examples, out=one, rejects=other)


def test_two_processes_at_once(make, tmp_path):
    captions = write_captions(tmp_path / "captions.jsonl", clips(30, lambda i: "slow=300" if i > 3 else ""))
    first = make.command(captions, "--concurrency", 2)
    wait_until(lambda: len(make.ids()) == 4)
    second = make.command(captions)
    assert "another process is writing it" in second.communicate()[1] and second.returncode == 2
    first.kill()
    first.communicate()
    make(clips(30))  # the lock ended with its process
    assert len(make.ids()) == len(set(make.ids())) == 30


# -----------------------------------------------------------------------------------------------------------
# Bad servers


def test_retry_after_is_honoured(make, server):
    """The client's own jittered wait would be half a second at most."""
    summary = make(clips(3, lambda i: "mode=limit" if i == 1 else ""))
    times, seeds = zip(*((e["time"], e["seed"]) for e in server.log if e["id"] == "c0001"))
    assert len(times) == 2 and times[1] - times[0] >= 1
    assert summary["accepted"] == 3 and summary["failed_to_be_asked_again"] == 0
    assert seeds[0] == seeds[1]  # the same attempt, asked again


def test_server_errors_are_waited_out(make, server):
    summary = make(clips(2, lambda i: "mode=errors"))
    assert len(server.log) == 6 and summary["accepted"] == 2 and make.rows()[0][0]["meta"]["attempts"] == 1


def test_a_failed_clip_is_asked_again_in_the_next_run(make, server, capsys):
    assert (
        make(clips(5, lambda i: "mode=broken" if i == 2 else ""), retries=0)["failed_to_be_asked_again"] == 1
    )
    assert "Error code: 500" in capsys.readouterr().out
    assert [r["id"] for r in make.rows()[0]] == ["c0000", "c0001", "c0003", "c0004"]
    del server.log[:]
    assert make(clips(5), retries=0)["failed_to_be_asked_again"] == 0
    assert [e["id"] for e in server.log] == ["c0002"] and len(make.ids()) == 5


def test_twenty_failures_in_a_row_stop(make, server):
    """Fewer do not, and what was answered is kept."""
    examples = clips(200, lambda i: "mode=broken" if 10 <= i < 29 or 30 <= i < 49 or i >= 60 else "")
    with pytest.raises(UserError, match="20 clips in a row failed, .*no good.*same command") as e:
        make(examples, retries=0, concurrency=4)
    assert KEY not in str(e.value) and len(make.ids()) == 22 and len({e["id"] for e in server.log}) < 120


@pytest.mark.parametrize("mode, says", [("forbidden", "OPENAI_API_KEY"), ("missing", "--model")])
def test_refusals_that_hold_for_all_stop_at_once(mode, says, make, server):
    with pytest.raises(UserError, match=rf"\*\*\*.*{says}") as e:
        make(clips(500, lambda i: f"mode={mode}" if i >= 5 else ""), concurrency=4)
    assert KEY not in str(e.value) and len(make.rows()[0]) == 5 and len({e["id"] for e in server.log}) < 50


def test_no_server(make):
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot reach the server: .*refused"):
        make(clips(50), base_url="http://127.0.0.1:1/v1", retries=1)
    assert time.monotonic() - start < 30


def test_a_page_instead_of_a_chat(make):
    with pytest.raises(UserError, match="no chat completion"):
        make(clips(30, lambda i: "mode=page"))
    assert make.files() == [b"", b""]


def test_json_that_is_no_chat():
    spaces = [
        types.SimpleNamespace(choices=choices)
        for choices in (3, None, [], [3], [types.SimpleNamespace(message=3)])
    ]
    for reply in ([], "x", 3, None, *spaces):
        with pytest.raises(client.RequestFailed, match="no chat completion"):
            client.first_choice(reply)


def test_an_answer_that_is_cut_off_is_a_failure_of_the_command(tmp_path, make):
    process = make.command(
        write_captions(tmp_path / "c.jsonl", clips(3, lambda i: "mode=half_json" if i else ""))
    )
    said, errors = process.communicate()
    assert process.returncode == 2 and "error: 2 failed; the same command asks them again" in errors
    assert len(make.rows()[0]) == 1 and "failed to be asked again                2" in said


def test_no_answer_in_time(make):
    summary = make(clips(3, lambda i: "slow=300" if i == 1 else ""), timeout_s=3, retries=0)
    assert summary["failed_to_be_asked_again"] == 1 and len(make.rows()[0]) == 2


@pytest.mark.parametrize(
    "refused, named",
    [
        (["response_format"], True),
        (["response_format"], False),
        (["max_tokens"], True),
        (["temperature"], True),
        (["seed", "response_format"], True),
    ],
)
def test_options_that_a_server_refuses(refused, named, make, server, capsys):
    """They are left out for the rest of the run: at most one refusal each a thread. The user is told once."""
    server.options[:] = [(option, named) for option in refused]
    summary = make(clips(60), concurrency=2)
    assert summary["accepted"] > 50 and summary["failed_to_be_asked_again"] == 0
    assert sum(any(option in e for option in refused) for e in server.log) <= 2 * len(refused)
    assert set(client.OPTIONAL) - server.log[-1].keys() == set(refused)
    assert server.log[-1].get("max_completion_tokens", server.log[-1].get("max_tokens")) == 400
    assert all(f"the server refuses {option}" in capsys.readouterr().err for option in refused[:1])


def test_a_refusal_later_that_names_nothing_is_no_refusal_of_an_option(make, server):
    assert (
        make(clips(30, lambda i: "mode=odd" if i == 9 else ""), concurrency=1)["failed_to_be_asked_again"]
        == 1
    )
    assert all("response_format" in e for e in server.log)


def test_a_server_that_counts_no_tokens(make, capsys):
    summary = make(clips(4, lambda i: "mode=free"))
    prompt = sum(len(m["content"]) for m in gen.writing_prompt(clips(1)[0])) // 4
    assert (
        summary["replies_with_estimated_tokens"] == 4
        and abs(summary["tokens_in_and_out"][0] / 4 - prompt) < 20
    )
    assert "estimated" in capsys.readouterr().out


# -----------------------------------------------------------------------------------------------------------
# The key


def test_the_key_is_nowhere(make, server, tmp_path):
    """Though the server echoes it, in errors and in a question."""
    modes = ["leak", "odd", "bad", "good", "leak", "forbidden"]
    captions = write_captions(tmp_path / "captions.jsonl", clips(6, lambda i: f"mode={modes[i]}"))
    process = make.command(captions, "--concurrency", 1)
    said = "".join(process.communicate())
    assert process.returncode == 2 and "***" in said and b"***" in make.files()[0]
    for text in (said.encode(), *make.files()):
        assert KEY.encode() not in text and server.url.encode() not in text
    assert {e["key"] for e in server.log} == {KEY}


def test_which_key(make, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    make(clips(1))
    assert server.log[-1]["key"] == "none"
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        make(clips(1), "b", base_url="")
    for bad in ("sk-\u2026abc", "sk-one two"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(UserError, match="OPENAI_API_KEY") as e:
            make(clips(1), "b")
        assert bad not in str(e.value)
    monkeypatch.setenv("OPENAI_API_KEY", "dog\n")  # too short for a secret; it stays in the questions
    make(clips(40), "b")
    content = make.files("b")[0]
    assert server.log[-1]["key"] == "dog" and b"***" not in content and b'"dog"' in content


# -----------------------------------------------------------------------------------------------------------
# Limits, arguments, speed, memory


def test_limits_hold_over_all_runs(make, server, capsys):
    """The limit is never exceeded, it leaves less than one clip might take, and a higher one goes on."""
    examples = clips(80, lambda i: "mode=mixed")
    make(examples, "unbroken")
    start = len(server.log)
    for limit in (20_000, 20_000, 30_000):
        summary = make(examples, max_tokens_total=limit)
        assert summary["stopped"] and limit - 7000 < sum(summary["tokens_in_and_out"]) <= limit
        assert "with a higher one" in capsys.readouterr().out
        asked = len(server.log) - start
        assert summary["tokens_in_and_out"] == [300 * asked, 40 * asked]
    assert not make(examples)["stopped"] and make.files() == make.files("unbroken")


def test_a_limit_counts_all_attempts_at_full_length(make, monkeypatch):
    def send(messages, seed):
        return "no", "stop", [client.rough_prompt_tokens(messages, gen.SCHEMA), 400], False

    monkeypatch.setattr(client, "connect", lambda *a: send)
    one = 3 * (client.rough_prompt_tokens(gen.writing_prompt(clips(1)[0]), gen.SCHEMA) + 400)
    for n in (2, 5):
        summary = make(clips(20), max_tokens_total=round((n + 0.5) * one))
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
def test_arguments(options, says, make, server):
    with pytest.raises(UserError, match=says):
        make(clips(1), **options)
    assert not make.files() and not server.log


@pytest.mark.parametrize("captions", [None, [], "a dog", ["a dog", 3], [" "], ["half \ud800 a character"]])
def test_broken_captions_stop_after_what_came_before(captions, make):
    examples = clips(6)
    examples[3].meta["captions"] = captions
    with pytest.raises(UserError, match="clip 'c0003': field \"captions\": "):
        make(examples)
    assert [r["id"] for r in make.rows()[0]] == ["c0000", "c0001", "c0002"]
    examples[3] = Example("c0003", None, "", meta=examples[2].meta)
    with pytest.raises(UserError, match='field "audio"'):
        make(examples)


def test_the_command_line(make, tmp_path, capsys):
    """The labels of a clip are one question; --help has an example."""

    def run(name, text, *flags):
        (tmp_path / name).write_text(text)
        flags = ["--model", "m", "--out", make.paths()[0], "--base_url", make.url, *flags]
        gen.main([str(tmp_path / name), *flags])

    for flag, says in (
        ("--timeout_s=1e300", "86400"),
        ("--temprature=1", "--temprature"),
        ("--seed=x", "--seed"),
    ):
        with pytest.raises(UserError, match=says):
            run("c.csv", "", flag)
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
    examples = clips(12)
    for i in (3, 7, 8):
        examples[i].id = "c0000"
    examples[5].id = "c0000 #2"
    for name, n in (("a", 1), ("many", 64), ("many", 16)):
        make(examples, name, concurrency=n)
    assert make.files() == make.files("many")
    new = {"c0000 #2", "c0000 #2 #2", "c0000 #3", "c0000 #4"}
    assert len(make.ids()) == 12
    assert set(make.ids()) == {f"c{i:04d}" for i in range(12) if i not in (3, 5, 7, 8)} | new


def test_embedded_clips_are_to_be_converted_first(make, tmp_path):
    datasets = pytest.importorskip("datasets")
    row = dict(audio={"bytes": b"RIFF", "path": None}, caption="x")
    datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "p"))
    with pytest.raises(UserError, match="convert it first"):
        make(gen.Captioned(str(tmp_path / "p")))


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
    assert make(clips(100), concurrency=4)["accepted"] == 100 and gate.is_set()


def test_a_disk_that_is_full(make, tmp_path):
    """A file-size limit stands in for it. What fits is written, half a line perhaps; then the run goes on."""
    examples = clips(40, lambda i: "mode=mixed")
    captions = write_captions(tmp_path / "captions.jsonl", examples)
    process = make.command(
        captions, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    )
    _, errors = process.communicate()
    assert process.returncode == 2 and "same command goes on" in errors and "Traceback" not in errors
    assert len(make.files()[0]) == 6000 and len(make.ids()) > 5
    make(examples)
    make(examples, "unbroken")
    assert make.files() == make.files("unbroken")


def resident_mb() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


class Lazy:
    """A long list of clips that holds none."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        for i in range(self.n):
            captions = [f"clip c{i:06d} " + "x" * 3000]
            yield Example(f"c{i:06d}", f"/sounds/{i}.wav", "", meta={"captions": captions})


def test_memory_is_flat(make, monkeypatch):
    """A result weighs 5 KB, so 6,000 kept ones would be 30 MB; hashes are 0.2 KB a clip."""
    instant(monkeypatch)
    make(Lazy(500), "small")
    before = resident_mb()
    assert make(Lazy(6000))["accepted"] == 6000
    assert resident_mb() - before < 12
    make(Lazy(6000))  # nor does reading what is done
    assert resident_mb() - before < 12


def test_speed(make, tmp_path):
    """Processor time for 500 clips, so that a busy machine does not matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    make.command(write_captions(tmp_path / "captions.jsonl", clips(500))).communicate()
    assert len(make.ids()) == 500 and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 12
