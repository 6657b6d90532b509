"""Questions from captions: what is accepted, what is written, and that neither kills, nor limits, nor bad servers lose,
double or leak anything. The server is ours, on 127.0.0.1; what it answers depends on the request alone."""

import asyncio
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

import data as gen
from data import Example, Examples, UserError

COMMAND = [sys.executable, gen.__file__, "generate"]  # then the captions and the flags
KEY = "sk-test-0123456789abcdef"
ANIMALS = "dog cat cow duck goat horse owl frog crow sheep pig goose".split()
GOOD = dict(
    question="Which animal calls twice before the bell rings?",
    choices=["A dog", "A cat", "A duck", "A cow"],
    answer="A dog",
)

# ---------------------------------------------------------------------------------------------------------------------
# The server


def good(name: str) -> dict:
    """The right answer is always the first choice. Names that end in 9 share three questions between them."""
    part = str(int(name[-2]) % 3) if name.endswith("9") else name
    choices = random.Random(part).sample(ANIMALS, 4)
    return dict(question=f"Which animal is heard first in part {part}?", choices=choices, answer=choices[0])


def content(name: str, mode: str, seed: int):
    """(text, finish reason) of a reply."""
    row = good(name)
    bad = [
        json.dumps(row)[:40],
        json.dumps(row | {"answer": "a whale"}),
        "I cannot.",
        json.dumps(row | {"choices": ["x"]}),
    ]
    if mode == "mixed" and seed % 3 == 0:
        return bad[seed % len(bad)], "stop"
    table = {
        "prose": (f"Here you are:\n```json\n{json.dumps(row)}\n```\nHave fun.", "stop"),
        "cut": (json.dumps(row)[:60], "length"),
        "bad": (bad[1], "stop"),
        "null": (None, "stop"),
        "long": ("x" * 5000, "stop"),
        "half": (json.dumps(row | {"question": "What is \ud83d here now?"}), "stop"),
        "leak": (json.dumps(row | {"question": f"Which animal says {KEY} to you?"}), "stop"),
        "same": (json.dumps(GOOD), "stop"),
    }
    return table.get(mode, (json.dumps(row), "stop"))


class Server(asyncio.Protocol):
    """Its own smallest HTTP: a thread with an event loop. `log`: one dict a request, as they come."""

    def __init__(self, log, options):
        self.log, self.options, self.data = log, options, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        size = int(re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)[1]) if found else 0
        if found and len(rest) >= size:
            self.data = rest[size:]
            status, extra, body, wait_s = self.respond(json.loads(rest[:size]), head.decode())
            raw = json.dumps(body).encode() if not isinstance(body, bytes) else body
            kind = "text/html" if isinstance(body, bytes) else "application/json"
            answer = (
                f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\n{extra}Content-Length: {len(raw)}\r\n\r\n"
            ).encode() + raw
            asyncio.get_running_loop().call_later(wait_s, self.transport.write, answer)

    def respond(self, request, head):
        text = request["messages"][-1]["content"]
        name = re.search(r"clip (\w+)", text)[1]
        mode = (re.findall(r"mode=(\w+)", text) or ["good"])[0]
        wait_s = float((re.findall(r"slow=([\d.]+)", text) or [0])[0])
        hits = sum(entry["id"] == name for entry in self.log) if mode in ("limit", "errors", "refused") else 0
        self.log.append(
            dict(id=name, time=time.monotonic(), key=re.search(r"Bearer (\S+)", head)[1], **request)
        )
        for option, named in self.options:
            if option in request:
                return 400, "", {"error": {"message": f"unsupported: {option if named else 'something'}"}}, 0
        errors = {
            ("limit", 0): (429, "Retry-After: 1\r\n"),
            ("errors", 0): (500, ""),
            ("errors", 1): (503, ""),
            ("forbidden", 0): (401, ""),
            ("missing", 0): (404, ""),
            ("broken", 0): (500, ""),
            ("odd", 0): (422, ""),
        }
        if (mode, hits) in errors or mode in ("broken", "odd"):
            status, extra = errors[mode, hits if mode in ("limit", "errors") else 0]
            return status, extra, {"error": {"message": f"no good: Authorization: Bearer {KEY}"}}, 0
        if mode == "half_json":
            return (
                200,
                "Content-Encoding: identity\r\nContent-Type: application/json\r\n",
                b'{"id": "x", "choices": [{"ind',
                0,
            )
        if mode == "page":
            return 200, "", b"<html>hello</html>", 0
        said, finish = content(name, mode, request["seed"] if "seed" in request else 1)
        body = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": said}}
            ],
        }
        if mode != "free":
            body["usage"] = {"prompt_tokens": 300, "completion_tokens": 40, "total_tokens": 340}
        return 200, "", body, wait_s


@pytest.fixture
def server(monkeypatch):
    """.url, .log, .options (request fields to refuse, and whether to say which)"""
    loop, log, options = asyncio.new_event_loop(), [], []
    listening = loop.run_until_complete(loop.create_server(lambda: Server(log, options), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    yield type("Fixture", (), dict(url=url, log=log, options=options))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def clips(n: int, extra=lambda i: "", folder="/sounds", **meta) -> list[Example]:
    return [
        Example(
            f"c{i:04d}",
            f"{folder}/c{i:04d}.wav",
            "",
            meta={
                "captions": [f"notes on clip c{i:04d} {extra(i)}", "an animal calls"],
                "set": "test",
                **meta,
            },
        )
        for i in range(n)
    ]


def write_captions(path, examples) -> str:
    rows = [dict(id=e.id, audio=e.audio, captions=e.meta["captions"]) for e in examples]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def make(server, tmp_path):
    """Generate in this process; `.files(name)`: the bytes of both files, `.rows(name)`: their lines."""

    def paths(name="a"):
        return str(tmp_path / f"{name}.jsonl"), str(tmp_path / f"{name}.rejects")

    def make(examples, name="a", **options):
        return gen.generate(examples, *paths(name), options.pop("model", "m"), base_url=server.url, **options)

    make.paths = paths
    make.files = lambda name="a": [open(p, "rb").read() for p in paths(name)]
    make.rows = lambda name="a": [[json.loads(x) for x in b.splitlines()] for b in make.files(name)]
    return make


@pytest.fixture
def command(server, make):
    """Start the command line as a process of its own."""

    def start(captions, name="a", *more, **options):
        out, rejects = make.paths(name)
        return subprocess.Popen(
            [
                *COMMAND,
                captions,
                "--out",
                out,
                "--rejects",
                rejects,
                "--model",
                "m",
                "--base_url",
                server.url,
                *map(str, more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


# ---------------------------------------------------------------------------------------------------------------------
# What is accepted


def reply(**changes) -> str:
    return json.dumps(GOOD | changes)


REPLIES = [  # reply, reason
    (reply(), ""),
    ("Sure!\n```json\n" + reply() + "\n```\nAnything else?", ""),
    (reply() + "\n" + reply(), ""),  # twice the same
    ("<think>maybe {this}? no</think>" + reply(), ""),
    (json.dumps([GOOD]), ""),
    (reply(note="x"), ""),
    (reply(question="Which animal calls\ntwice before the bell?"), ""),
    (reply(answer="a DOG."), ""),
    (reply(answer="A"), ""),
    (reply(answer="B"), ""),
    (reply(answer="(C)"), ""),
    (reply(answer="B. A cat"), ""),
    (reply(choices=["A. dog", "B. cat", "C. owl", "D. cow"], answer="C"), ""),
    (reply(choices=["A) dog", "B) cat", "C) owl", "D) cow"], answer="owl"), ""),
    (reply(choices=["(A) dog", "(B) cat", "(C) owl", "(D) cow"], answer="(C) owl"), ""),
    (reply(choices=["G", "C", "E", "B"], answer="B"), ""),
    (reply(question="Does the dog, the cat, the duck or the cow call last?"), ""),  # names every choice
    (
        reply(
            question="What creaks in the yard, near the sea?",
            choices=["A see-saw", "A gate", "A saw", "A boat"],
            answer="A see-saw",
        ),
        "",
    ),
    (
        reply(
            question="What clicks three times at the end?",
            choices=["Camera shutter", "Text message alert", "Video game pad", "Light switch"],
            answer="Light switch",
        ),
        "",
    ),
    (reply(question="Which word best describes the mood of this musical passage?"), ""),
    (reply(question="Who is speaking from the other room?"), ""),
    (
        reply(
            question="Where do the notes of the coloratura go?",
            choices=["Up", "Down", "On", "To and fro"],
            answer="A",
        ),
        "",
    ),
    (
        reply(
            question="What ticks all the time?",
            choices=["Two watches", "A clock", "A seesaw", "A metronome"],
            answer="B",
        ),
        "",
    ),
    (reply(question="At what overseen recital did the audience laugh?"), ""),
    (reply(choices=["Two", "Three", "Four", "Five times in a row"], answer="Five times in a row"), ""),
    (reply(choices=["A dog", "A cat", "A duck", "A cow that stands " + "far " * 10], answer="A dog"), ""),
    (
        reply(
            choices=["A dog that stands " + "far " * 8, "A cat", "A duck", "A cow that stands far away"],
            answer="A",
        ),
        "",
    ),
    (reply(choices=["Un perro 🐕", "Un gato", "¿Qué?", "日本"], answer="Un gato"), ""),
    (reply(choices=["1. dog", "2. cat", "3. owl", "4. cow"], answer="2. cat"), ""),
    (reply(choices=["a. dog", "b. cat", "c. owl", "d. cow"], answer="b"), ""),
    (reply(choices=["a) dog", "b) cat", "c) owl", "d) cow"], answer="cat"), ""),
    (reply(answer="b) A cat"), ""),
    (reply(choices=["1.5 s", "2.5 s", "3.5 s", "4.5 s"], answer="2.5 s"), ""),
    (reply(choices=["C", "C#", "D", "Eb"], answer="C#"), ""),
    (reply(choices=["+10%", "-10%", "0%", "+50%"], answer="-10%"), ""),
    (
        reply(
            question="Based on the notes of the flute, which key is it?",
            choices=["C major", "D flat", "A minor", "G sharp"],
            answer="A minor",
        ),
        "",
    ),
    (reply(question="What is heard in the scene, next to the white noise?"), ""),
    ("", "no JSON object"),
    ("I can't help with that.", "no JSON object"),
    ('["a", "b"]', "no JSON object"),
    (reply()[:-1], "broken JSON"),
    (reply()[:50], "broken JSON"),
    ("{" * 100_000, "broken JSON"),
    ('{"a":' * 100_000, "broken JSON"),
    ("{'question': 'single quotes'}", "broken JSON"),
    ("as {asked}: " + reply(), "broken JSON"),
    (reply() + reply(answer="A cat"), "several JSON objects"),
    ("<think>" + reply(answer="A cat") + "</think> done", "no JSON object"),
    (json.dumps({"question": "What?"}), "missing key"),
    (json.dumps({"row": GOOD}), "missing key"),
    ("{}", "missing key"),
    (reply(question=["x"]), "wrong type"),
    (reply(question=None), "wrong type"),
    (reply(choices={"A": "dog"}), "wrong type"),
    (reply(choices="A dog"), "wrong type"),
    (reply(choices=["A dog", "A cat", "A duck", 4]), "wrong type"),
    (reply(answer=0), "wrong type"),
    (reply(choices=["A dog", "A cat", "A duck"]), "not four choices"),
    (reply(choices=["A dog", "A cat", "A duck", "A cow", "A pig"]), "not four choices"),
    (reply(choices=[], answer="A"), "not four choices"),
    (reply(answer="A whale"), "answer not among the choices"),
    (reply(answer=""), "answer not among the choices"),
    (reply(answer="E"), "answer not among the choices"),
    (reply(answer="2"), "answer not among the choices"),  # of what?
    (reply(choices=["1. dog", "2. cat", "3. owl", "cow"], answer="5. cow"), "answer not among the choices"),
    (
        reply(choices=["A dog", "A dog barking", "A duck", "A cow"], answer="A duck"),
        "one choice is part of another",
    ),
    (
        reply(choices=["Dog barking", "The dog", "A duck", "A cow"], answer="A duck"),
        "one choice is part of another",
    ),
    (reply(answer="A. A cat"), "answer not among the choices"),  # letter and text disagree
    (reply(answer="A dog or A cat"), "answer not among the choices"),
    (
        reply(choices=["G", "C", "E", "F"], answer="B"),
        "answer not among the choices",
    ),  # a note's name is no letter
    (reply(choices=["A dog", "a  DOG!", "A duck", "A cow"]), "choices alike"),
    (reply(choices=["A cafe\u0301", "A caf\u00e9", "A duck", "A cow"], answer="A cow"), "choices alike"),
    (reply(question="What is \ud83d it that calls?"), "half a character"),
    (reply(choices=["A dog", "A \udc00", "A duck", "A cow"]), "half a character"),
    (reply(choices=["A dog", "A\ncat", "A duck", "A cow"]), "line break or control character"),
    (reply(question="What calls\x00 twice here?"), "line break or control character"),
    (reply(choices=["A dog", "A\u2028cat", "A duck", "A cow"]), "line break or control character"),
    (reply(question="What calls?"), "question length"),
    (reply(question=" "), "question length"),
    (reply(question="Which " * 41), "question length"),
    (reply(question="Which animal " + "o" * 300), "question length"),
    (reply(choices=["A dog", "", "A duck", "A cow"]), "choice length"),
    (reply(choices=["A dog", "?!", "A duck", "A cow"]), "choice length"),
    (reply(choices=["A dog", "a " * 16, "A duck", "A cow"]), "choice length"),
    (reply(choices=["A dog", "o" * 101, "A duck", "A cow"]), "choice length"),
    *(
        (reply(question=f"Which animal {w} the bell rings?"), "about sight")
        for w in (
            "can you see when",
            "is seen before",
            "looks like it",
            "is visible as",
            "of a brown colour calls as",
            "of that Color calls as",
            "in the picture calls as",
            "in this image calls as",
            "in the video calls as",
            "wearing a collar calls as",
            "shown in the scene calls as",
            "viewed by us calls as",
            "in the frame calls as",
            "that comes into view calls as",
            "beside a man in a red shirt calls as",
            "near the white coats calls as",
            "is near the camera as",
            "appears on-screen when",
            "in the PHOTO calls as",
        )
    ),
    (reply(choices=["A colourful dog", "A cat", "A duck", "A cow"], answer="A cat"), "about sight"),
    *(
        (reply(question=f"Which animal {w} calls twice?"), "mentions a text")
        for w in (
            "in the caption",
            "from the description",
            "described here",
            "in the text",
            "of the passage",
            "in the captions",
            "according to the notes",
            "based on the notes",
            "as the notes say",
        )
    ),
    (reply(choices=["A dog", "A cat", "A duck", "None of the above"]), "mentions other choices"),
    (reply(choices=["A dog", "A cat", "A duck", "Both A and B"]), "mentions other choices"),
    (reply(question="After which sound is it that a small dog barks at a passing bus?"), "quotes a caption"),
    (reply(question="How often does the dog bark?"), "given away by the question"),
    (reply(question="Is it a dog or a cat that barks?"), "given away by the question"),
    (
        reply(
            choices=["A dog that howls at the moon for a long time", "A cat", "A duck", "A cow"], answer="A"
        ),
        "answer stands out",
    ),
]


@pytest.mark.parametrize("text, reason", REPLIES)
def test_replies(text, reason):
    row, found = gen.judge(text, ["A small dog barks at a passing bus", "bell"])
    assert found == reason and bool(row) == (not reason)


def test_every_reason_has_a_case():
    source = open(gen.__file__, encoding="utf-8").read().split("def fault")[1].split("\ndef ")[0]
    reasons = {reason for _, reason in REPLIES if reason}
    listed = re.findall(r'^        \("([a-z ]+)", ', source, re.MULTILINE) + [
        reason for reason, _ in gen.BANNED
    ]
    assert set(listed) <= reasons and len(listed) > 8


@pytest.mark.parametrize(
    "choices, answer, index, first",
    [
        (["A. dog", "B. cat", "C. owl", "D. cow"], "C", 2, "dog"),
        (["A: dog", "B: cat", "C: owl", "D: cow"], "B: cat", 1, "dog"),
        (["B. dog", "A. cat", "C. owl", "D. cow"], "A. cat", 1, "B. dog"),
        (["dog", "cat", "owl", "cow"], "D", 3, "dog"),
        (["C", "D", "E", "F"], "D", 1, "C"),
        (["C", "D", "E", "F"], "A", None, "C"),
    ],
)
def test_letters(choices, answer, index, first):
    row = gen.tidy(dict(question="?", choices=choices, answer=answer))
    assert row["answer"] == index and row["choices"][0] == first


def test_other_letters_go_from_the_choices():
    for marks in ("1234", "abcd", "ABCD"):
        row = gen.tidy(
            dict(
                question="?", choices=[f"{m}. {c}" for m, c in zip(marks, ANIMALS)], answer=f"{marks[2]}. cow"
            )
        )
        assert row["choices"] == ANIMALS[:4] and row["answer"] == 2


def test_near_duplicates():
    row = dict(
        question="Which animal calls twice in the clip?", choices=["A dog", "A cat", "A duck", "A cow"]
    )
    same = [
        dict(question="In this audio: which animal CALLS twice", choices=["cow", "the duck!", "cat", "dog"]),
        row | {"choices": row["choices"][::-1]},
    ]
    other = [
        row | {"question": "Which animal calls once in the clip?"},
        row | {"choices": [*row["choices"][:3], "A pig"]},
    ]
    assert {gen.fingerprint(r) for r in same} == {gen.fingerprint(row)}
    assert gen.fingerprint(row) not in {gen.fingerprint(r) for r in other}


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_lines(make, server, tmp_path):
    """Every clip gives one line; a line is an Example that `Examples` reads, with all that was known of the clip."""
    modes = ["good", "prose", "cut", "bad", "null", "half", "long", "same", "same"]
    examples = clips(
        len(modes), lambda i: "mode=" + modes[i], str(tmp_path / "wavs"), captions_from="listeners"
    )
    examples[1].audio = "/elsewhere/x.wav"
    summary = make(examples, concurrency=2)
    lines, rejects = make.rows()
    read = list(Examples(make.paths()[0]))
    assert [e.id for e in read] == ["c0000", "c0001", "c0007"] == [line["id"] for line in lines]
    assert [line["audio"] for line in lines] == ["wavs/c0000.wav", "/elsewhere/x.wav", "wavs/c0007.wav"]
    assert [e.audio for e in read][::2] == [examples[0].audio, examples[7].audio]
    assert all(
        e.choices[e.answer] == good(e.id)["answer"] and sorted(e.choices) == sorted(good(e.id)["choices"])
        for e in read[:2]
    )
    assert lines[0]["meta"] == examples[0].meta | dict(
        source="generated", model="m", prompt_version=gen.PROMPT_VERSION, seed=0, attempts=1, tokens=[300, 40]
    )
    assert {r["id"]: r["reason"] for r in rejects} == {
        "c0002": "cut off",
        "c0003": "answer not among the choices",
        "c0004": "no JSON object",
        "c0005": "half a character",
        "c0006": "no JSON object",
        "c0008": "near duplicate",
    }
    assert [r["meta"]["attempts"] for r in rejects] == [3, 3, 3, 3, 3, 1]
    assert rejects[0]["captions"] == examples[2].meta["captions"] and rejects[0]["meta"]["tokens"] == [
        900,
        120,
    ]
    assert len(rejects[4]["reply"]) == 2000
    assert (
        summary["rejected"]["near duplicate"] == 1
        and summary["accepted"] == 3
        and summary["tokens"] == [5700, 760]
    )
    seeds = {(e["id"], e["seed"]) for e in server.log}
    assert len(seeds) == len(server.log) and len({s for _, s in seeds}) == len(
        seeds
    )  # another one for every request
    assert all(e["response_format"]["json_schema"]["strict"] and e["key"] == KEY for e in server.log)


def test_order_and_bytes_do_not_depend_on_concurrency(make, capsys):
    examples = clips(100, lambda i: f"mode=mixed slow={[0, 0.02, 0.01][i % 3]}")
    summaries = [make(examples, name, concurrency=n) for name, n in (("one", 1), ("many", 16))]
    assert make.files("one") == make.files("many")
    ids = [[r["id"] for r in rows] for rows in make.rows("one")]
    assert (
        ids[0] == sorted(ids[0])
        and ids[1] == sorted(ids[1])
        and sorted(ids[0] + ids[1]) == [e.id for e in examples]
    )
    reasons = summaries[0]["rejected"]
    assert reasons["near duplicate"] >= 4 and len(reasons) >= 3  # a mixture that deserves the name
    assert [s | {"clips_per_s": 0} for s in summaries][0] == summaries[1] | {"clips_per_s": 0}
    assert "near duplicate" in capsys.readouterr().out


def instant(monkeypatch, answer=None):
    """No server: `send` itself answers."""

    def send(messages, seed):
        name = re.search(r"clip (\w+)", messages[-1]["content"])[1]
        if answer:
            answer(name)
        return json.dumps(good(name + "x")), "stop", [300, 40], False

    monkeypatch.setattr(gen, "connect", lambda *a: send)


def test_answer_positions_are_balanced(make, monkeypatch):
    """The server's right choice is always its first. Chi-squared, 3 degrees of freedom: 16.3 at p = 0.001."""
    instant(monkeypatch)
    summary = make(clips(2000))
    assert (
        sum((n - 500) ** 2 / 500 for n in summary["positions"]) < 16.3 and sum(summary["positions"]) == 2000
    )
    assert 0.2 < summary["longest"] < 0.3
    first = make.rows()[0]
    assert make(clips(2000), "b", seed=1) and [r["answer"] for r in make.rows("b")[0]] != [
        r["answer"] for r in first
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Kills and resumes


def done_ids(make) -> set:
    return {json.loads(line)["id"] for raw in make.files() for line in raw.split(b"\n")[:-1]}


@pytest.mark.parametrize("how, stops", [(signal.SIGKILL, (1, 40, 80)), (signal.SIGINT, (30,))])
def test_stopped_at_any_moment(how, stops, make, command, server, tmp_path):
    """Several times in one run; nothing is lost, doubled or asked again, and the bytes are those of an unbroken run."""
    n = 120
    examples = clips(n, lambda i: f"mode=mixed slow={0.01 if i % 7 else 0.06}")
    captions = write_captions(tmp_path / "captions.jsonl", examples)
    for stop_at in (*stops, n):
        del server.log[:]
        before = done_ids(make) if stop_at > stops[0] else set()
        process = command(captions, "a", "--concurrency", 8)
        while process.poll() is None and (
            not os.path.exists(make.paths()[1]) or len(done_ids(make)) < stop_at
        ):
            time.sleep(0.01)
        if stop_at < n:
            process.send_signal(how)
        _, errors = process.communicate()
        assert not {e["id"] for e in server.log} & before
        if stop_at < n:
            assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in errors
            assert stop_at <= len(done_ids(make)) < n
        if stop_at < n and how == signal.SIGINT:  # what was asked is written, in order, before the end
            assert (
                done_ids(make)
                == before | {e["id"] for e in server.log}
                == {e.id for e in examples[: len(done_ids(make))]}
            )
    for example in examples:
        del example.meta["set"]  # the command line has no such key
    make(examples, "unbroken")
    assert process.returncode == 0 and make.files() == make.files("unbroken")


def test_a_stop_begins_nothing_new():
    """What runs is waited for; what only waits is dropped, though the window has room for it."""
    begun, gate, stopping = [], threading.Event(), []

    def work(job):
        begun.append(job)
        return gate.wait(0 if job == 1 else 5) or job

    results = gen.answers(iter(range(1, 50)), work, 2, lambda jobs: True, stopping)
    assert next(results) == 1
    while len(begun) < 3:
        time.sleep(0.01)
    stopping.append("now")
    threading.Timer(0.3, gate.set).start()
    assert list(results) == [True, True] and begun == [1, 2, 3]


def test_a_second_interrupt_leaves_at_once(make, command, tmp_path):
    """Though a server takes its time. Each line was written when its turn came, and stays whole."""
    process = command(
        write_captions(tmp_path / "c.jsonl", clips(30, lambda i: "slow=30" if i > 3 else "")), "a"
    )
    deadline = time.monotonic() + 10
    while (not os.path.exists(make.paths()[1]) or len(done_ids(make)) < 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(make.rows()[0]) == 4
    for _ in range(2):
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    assert process.wait(3) == 130 and len(make.rows()[0]) == 4


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
    "changes, says",
    [(dict(model="other"), "other"), (dict(seed=3), "'seed': 3"), (dict(prompt="new"), gen.PROMPT_VERSION)],
)
def test_going_on_with_other_settings_is_refused(changes, says, make, server, monkeypatch):
    make(clips(3, lambda i: "mode=bad" if i == 2 else ""))
    before, asked = make.files(), len(server.log)
    monkeypatch.setattr(gen, "PROMPT_VERSION", changes.pop("prompt", gen.PROMPT_VERSION))
    for keep in (0, 1):  # either file alone is enough
        with pytest.raises(UserError) as e:
            make(clips(4), **changes)
        assert says in str(e.value) and "other files" in str(e.value)
        assert make.files()[keep:] == before[keep:] and len(server.log) == asked
        open(make.paths()[0], "w").close()


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": "x", "question": "mine?"}\n',
        b"a text without a line end",
        b'{"audio": "a.wav", "id',
        b"[]\n",
        b"3\n",
        b"\n",
        b'{"id": "c", "reason": "r", "reply": "", "captions": [], "meta": {}}\n',
        b"\xff\n",
        b"\0\0\0\0",
    ],
)
def test_files_of_others_are_left_alone(content, make, server):
    for path in make.paths():
        open(path, "wb").write(content)
        with pytest.raises(UserError, match="not written by this command|broken JSON|not UTF-8"):
            make(clips(2))
        assert open(path, "rb").read() == content and not server.log
        os.remove(path)


def test_swapped_files_and_one_file_for_both(make, server):
    examples = clips(4, lambda i: "mode=bad" if i % 2 else "")
    make(examples)
    with pytest.raises(UserError, match="not written by"):
        gen.generate(examples, *make.paths()[::-1], "m", base_url=server.url)
    with pytest.raises(UserError, match="same file"):
        gen.generate(examples, make.paths()[0], make.paths()[0], "m", base_url=server.url)
    with pytest.raises(UserError, match="is a directory"):
        gen.generate(examples, os.path.dirname(make.paths()[0]), make.paths()[1], "m", base_url=server.url)
    with pytest.raises(UserError, match="No such file"):
        gen.generate(
            examples,
            os.path.join(make.paths()[0] + "nowhere", "x"),
            make.paths()[1],
            "m",
            base_url=server.url,
        )


def test_two_processes_at_once(make, command, tmp_path):
    captions = write_captions(tmp_path / "captions.jsonl", clips(30, lambda i: "slow=0.3"))
    first = command(captions, "a", "--concurrency", 2)
    while not os.path.exists(make.paths()[1]):
        time.sleep(0.01)
    second = command(captions, "a")
    assert "another process is writing it" in second.communicate()[1] and second.returncode == 2
    assert first.wait() == 0 and sorted(r["id"] for rows in make.rows() for r in rows) == [
        f"c{i:04d}" for i in range(30)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Bad servers


def test_retry_after_is_honoured(make, server):
    """The client's own jittered wait would be half a second at most."""
    summary = make(clips(3, lambda i: "mode=limit" if i == 1 else ""))
    times = [e["time"] for e in server.log if e["id"] == "c0001"]
    assert (
        len(times) == 2
        and 1 <= times[1] - times[0] < 3
        and summary["accepted"] == 3
        and summary["failed"] == 0
    )
    assert len({e["seed"] for e in server.log if e["id"] == "c0001"}) == 1  # the same attempt, asked again


def test_server_errors_are_waited_out(make, server):
    summary = make(clips(2, lambda i: "mode=errors"))
    assert len(server.log) == 6 and summary["accepted"] == 2 and make.rows()[0][0]["meta"]["attempts"] == 1


def test_a_failed_clip_is_asked_again_in_the_next_run(make, server, capsys):
    examples = clips(5, lambda i: "mode=broken" if i == 2 else "")
    assert make(examples, retries=0)["failed"] == 1
    assert "Error code: 500" in capsys.readouterr().out
    assert [r["id"] for r in make.rows()[0]] == ["c0000", "c0001", "c0003", "c0004"]
    del server.log[:]
    assert make(clips(5), retries=0)["failed"] == 0
    assert [e["id"] for e in server.log] == ["c0002"] and done_ids(make) == {f"c{i:04d}" for i in range(5)}


def test_twenty_failures_in_a_row_stop(make, server):
    """Fewer do not, and what was answered is kept."""
    examples = clips(200, lambda i: "mode=broken" if 10 <= i < 29 or 30 <= i < 49 or i >= 60 else "")
    with pytest.raises(UserError, match="20 clips in a row failed, .*same command") as e:
        make(examples, retries=0, concurrency=4)
    assert KEY not in str(e.value) and "no good" in str(e.value)
    assert len(done_ids(make)) == 22 and len({e["id"] for e in server.log}) < 120


@pytest.mark.parametrize("mode, says", [("forbidden", "OPENAI_API_KEY"), ("missing", "--model")])
def test_refusals_that_hold_for_all_stop_at_once(mode, says, make, server):
    with pytest.raises(UserError, match=says) as e:
        make(clips(500, lambda i: f"mode={mode}" if i >= 5 else ""), concurrency=4)
    assert KEY not in str(e.value) and "***" in str(e.value)
    assert len(make.rows()[0]) == 5 and len({e["id"] for e in server.log}) < 50


def test_no_server(make, server):
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot reach the server: .*refused"):
        gen.generate(clips(50), *make.paths(), "m", base_url="http://127.0.0.1:1/v1", retries=1)
    assert time.monotonic() - start < 5


def test_a_page_instead_of_a_chat(make, server):
    with pytest.raises(UserError, match="no chat completion"):
        make(clips(30, lambda i: "mode=page"))
    assert make.files() == [b"", b""]


def test_an_answer_that_is_cut_off_is_a_failure_of_the_command(command, server, tmp_path, make):
    process = command(
        write_captions(tmp_path / "c.jsonl", clips(3, lambda i: "mode=half_json" if i else "")), "a"
    )
    said, errors = process.communicate()
    assert process.returncode == 2 and "error: 2 clips failed; the same command asks them again" in errors
    assert len(make.rows()[0]) == 1 and "failed, to be asked again               2" in said


def test_no_answer_in_time(make, server):
    summary = make(clips(3, lambda i: "slow=9" if i == 1 else ""), timeout_s=0.3, retries=0)
    assert summary["failed"] == 1 and len(make.rows()[0]) == 2


@pytest.mark.parametrize(
    "refused, named",
    [
        (["response_format"], True),
        (["response_format"], False),
        (["max_tokens"], True),
        (["seed", "response_format"], True),
    ],
)
def test_options_that_a_server_refuses(refused, named, make, server):
    """They are left out for the rest of the run: at most one refusal each a thread."""
    server.options[:] = [(k, named) for k in refused]
    summary = make(clips(60), concurrency=2)
    assert summary["accepted"] > 50 and summary["failed"] == 0
    assert sum(any(k in e for k in refused) for e in server.log) <= 2 * len(refused)
    assert {"response_format", "max_tokens", "seed"} - server.log[-1].keys() == set(refused)
    assert server.log[-1].get("max_completion_tokens", server.log[-1].get("max_tokens")) == 400


def test_a_refusal_later_that_names_nothing_is_no_refusal_of_an_option(make, server):
    assert make(clips(30, lambda i: "mode=odd" if i == 9 else ""), concurrency=1)["failed"] == 1
    assert all("response_format" in e for e in server.log)


def test_a_server_that_counts_no_tokens(make, capsys):
    summary = make(clips(4, lambda i: "mode=free"))
    prompt = sum(len(m["content"]) for m in gen.writing_prompt(clips(1)[0])) // 4
    assert summary["without_usage"] == 4 and abs(summary["tokens"][0] / 4 - prompt) < 20
    assert "estimates" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The key


def test_the_key_is_nowhere(make, command, server, tmp_path):
    """Though the server echoes it, in errors and in a question."""
    modes = ["leak", "odd", "bad", "good", "leak", "forbidden"]
    captions = write_captions(tmp_path / "captions.jsonl", clips(6, lambda i: f"mode={modes[i]}"))
    process = command(captions, "a", "--concurrency", 1)
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
        gen.generate(clips(1), *make.paths("b"), "m")
    for bad in ("sk-\u2026abc", "sk-one two"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(UserError, match="OPENAI_API_KEY") as e:
            make(clips(1), "b")
        assert bad not in str(e.value)
    monkeypatch.setenv(
        "OPENAI_API_KEY", "dog\n"
    )  # too short for a secret; it must not be cut out of the questions
    make(clips(40), "b")
    assert (
        server.log[-1]["key"] == "dog" and b"***" not in make.files("b")[0] and b'"dog"' in make.files("b")[0]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Limits, arguments, speed, memory


@pytest.mark.parametrize(
    "limit, used",
    [
        (dict(max_tokens_total=20_000), lambda t: t[0] + t[1]),
        (dict(max_cost=0.02, price_in=1.0, price_out=2.0), lambda t: t[0] + 2 * t[1]),
    ],
)
def test_limits_hold_over_all_runs(limit, used, make, server, capsys):
    """The limit is never exceeded, what it leaves is less than one clip might take, and a higher one goes on."""
    examples = clips(80, lambda i: "mode=mixed")
    make(examples, "unbroken")
    start = len(server.log)
    for factor in (1, 1, 1.5):
        summary = make(examples, **{k: v * factor if k.startswith("max") else v for k, v in limit.items()})
        assert summary["at_limit"] and 20_000 * factor - 7000 < used(summary["tokens"]) <= 20_000 * factor
        assert "higher limit" in capsys.readouterr().out
        assert summary["tokens"] == [300 * len(server.log[start:]), 40 * len(server.log[start:])]
    assert not make(examples)["at_limit"] and make.files() == make.files("unbroken")


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(max_cost=1.0), "--price_in"),
        (dict(max_cost=1.0, price_in=1.0), "--price_out"),
        (dict(concurrency=0), "at least 1"),
        (dict(attempts=0), "at least 1"),
        (dict(temperature=float("nan")), "--temperature"),
        (dict(temperature=-1), "--temp"),
        (dict(retries=-1), "--retries: must be at least 0, found -1"),
        (dict(max_tokens_total=-5), "--max_tokens_total"),
        (dict(max_cost=-1), "--max_cost"),
        (dict(max_cost=float("nan"), price_in=1, price_out=1), "--max_cost"),
        (dict(max_cost=1, price_in=-1.0, price_out=float("inf")), "--price_in"),
    ],
)
def test_arguments(options, says, make, server):
    with pytest.raises(UserError, match=says):
        make(clips(1), **options)
    assert not os.path.exists(make.paths()[0]) and not server.log


@pytest.mark.parametrize("captions", [None, [], "a dog", ["a dog", 3], [" "], ["half \ud800 a character"]])
def test_broken_captions_stop_after_what_came_before(captions, make, server):
    examples = clips(6)
    examples[3].meta["captions"] = captions
    with pytest.raises(UserError, match="clip 'c0003': field \"captions\": "):
        make(examples)
    assert [r["id"] for r in make.rows()[0]] == ["c0000", "c0001", "c0002"]
    examples[3] = Example("c0003", None, "", meta=examples[2].meta)
    with pytest.raises(UserError, match='field "audio"'):
        make(examples)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/v1", "http://127.0.0.1:abc/v1", "ftp://x/v1", "127.0.0.1/v1"]
)
def test_an_address_that_is_none(make, url):
    with pytest.raises(UserError, match="--base_url: expected http://HOST:PORT/v1") as e:
        gen.generate(clips(1), *make.paths(), "m", base_url=url)
    assert "\n" not in str(e.value) and not os.path.exists(make.paths()[0])


def test_a_timeout_that_is_none(command, tmp_path):
    process = command(write_captions(tmp_path / "c.jsonl", clips(1)), "a", "--timeout_s", "1e300")
    assert "86400 seconds" in process.communicate()[1] and process.returncode == 2


def test_the_labels_of_a_clip_are_one_question(command, server, make, tmp_path):
    (tmp_path / "c.csv").write_text("audio,category\na.wav,clip one\nb.wav,clip two\na.wav,clip three\n")
    command(str(tmp_path / "c.csv")).communicate()
    assert [(r["id"], r["meta"]["captions"]) for r in make.rows()[0]] == [
        ("a.wav", ["clip one", "clip three"]),
        ("b.wav", ["clip two"]),
    ]


def test_an_id_that_stands_there_again_gets_a_number(make):
    """Whatever the concurrency; nothing is lost, doubled or asked again."""
    examples = clips(12)
    for i in (3, 7, 8):
        examples[i].id = "c0000"
    examples[5].id = "c0000 #2"
    wanted = ["c0000", "c0001", "c0002", "c0000 #2", "c0004", "c0000 #2 #2", "c0006", "c0000 #3", "c0000 #4"]
    for name, n in (("one", 1), ("many", 64), ("many", 16)):
        make(examples, name, concurrency=n)
    assert make.files("one") == make.files("many")
    ids = [r["id"] for rows in make.rows("one") for r in rows]
    assert sorted(ids) == sorted([*wanted, "c0009", "c0010", "c0011"])


def test_embedded_clips_are_to_be_converted_first(make, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([dict(audio={"bytes": b"RIFF", "path": None}, caption="x")]).to_parquet(
        str(tmp_path / "p")
    )
    with pytest.raises(UserError, match="convert it first"):
        make(gen.Captioned(Examples(str(tmp_path / "p"))))


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


def test_a_disk_that_is_full(make, command, tmp_path):
    """A file-size limit is the nearest thing. What fits is written, half a line perhaps; then the run goes on."""
    examples = clips(40, lambda i: "mode=mixed")
    captions = write_captions(tmp_path / "captions.jsonl", examples)
    process = command(captions, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    _, errors = process.communicate()
    assert process.returncode == 2 and "same command goes on" in errors and "Traceback" not in errors
    assert len(make.files()[0]) == 6000 and len(done_ids(make)) > 5
    for example in examples:
        del example.meta["set"]  # the command line has no such key
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
            yield Example(
                f"c{i:06d}", f"/sounds/{i}.wav", "", meta={"captions": [f"clip c{i:06d} " + "x" * 3000]}
            )


def test_memory_is_flat(make, monkeypatch):
    """A result weighs 5 KB, so 6,000 kept ones would be 30 MB; hashes are 0.2 KB a clip."""
    instant(monkeypatch)
    make(Lazy(500), "small")
    before = resident_mb()
    assert make(Lazy(6000))["accepted"] == 6000
    assert resident_mb() - before < 12
    make(Lazy(6000))  # nor does reading what is done
    assert resident_mb() - before < 12


def test_speed(command, tmp_path):
    """Clips a second against a server in Python that shares the machine: measured 300 and more on two cores."""
    captions = write_captions(tmp_path / "captions.jsonl", clips(1000))
    said, errors = command(captions).communicate()
    speed = float(re.search(r"clips a second, this run +([\d.]+)", said)[1])
    assert speed > 100, said + errors
