"""An OpenAI-compatible server of our own on 127.0.0.1, in a thread; what it answers depends on the request
alone. And the runs of the tools that ask it. Listener is one that hears.

`server` is the fixture. Other tests let it answer otherwise: a subclass of Server with its own `asked` and
`reply`, put in its place by monkeypatch.setattr(fake_server, "Server", Other).
"""

import ast
import asyncio
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import soundfile

from data import RATE_HZ, UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEY = "sk-test-0123456789abcdef"
ANIMALS = "dog cat cow duck goat horse owl frog crow sheep pig goose".split()
GOOD = dict(
    question="Which animal calls twice before the bell rings?",
    choices=["A dog", "A cat", "A duck", "A cow"],
    answer="A dog",
)
ERRORS = {  # mode: the statuses of the first requests on the same thing
    "limit": [429],
    "errors": [500, 503],
    "forbidden": [401] * 999,
    "missing": [404] * 999,
    "broken": [500] * 999,
    "odd": [422] * 999,
}
PAGES = {"page": b"<html>hello</html>", "half_json": b'{"id": "x", "choices": [{"ind'}


def modes(text: str) -> list[str]:
    """ "2 good, bad@3" -> ["good", "good", "bad@3"]: so it goes with each clip; @3: after three seconds."""
    found = []
    for n, mode in re.findall(r"(\d+ )?([a-z][\w@.]*)", text):
        found += [mode] * int(n or 1)
    return found


def good(name: str) -> dict:
    """The right answer is always the first choice. Names that end in 9 share three questions between them."""
    part = str(int(name[-2]) % 3) if name.endswith("9") else name
    choices = random.Random(part).sample(ANIMALS, 4)
    return dict(question=f"Which animal is heard first in part {part}?", choices=choices, answer=choices[0])


def completion(text: str | None, finish: str = "stop", tokens: tuple | None = (300, 40)) -> dict:
    """The body of a chat completion; with its usage unless tokens is None."""
    choice = dict(index=0, finish_reason=finish, message=dict(role="assistant", content=text))
    body = dict(id="x", object="chat.completion", created=1, model="m", choices=[choice])
    if tokens:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        body["usage"] = dict(zip(names, (*tokens, sum(tokens))))
    return body


class Server(asyncio.Protocol):
    """Its own smallest HTTP. log: a dict a request, as they come. options: (a field to refuse, is it
    named?)s"""

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
            status, body, wait_s = self.respond(json.loads(rest[:size]), head.decode())
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = "application/json" if raw[:1] == b"{" else "text/html"
            start = f"HTTP/1.1 {status} X\r\nRetry-After: 1\r\nContent-Type: {kind}\r\n"
            start += f"Content-Length: {len(raw)}\r\n\r\n"
            asyncio.get_running_loop().call_later(wait_s, self.transport.write, start.encode() + raw)

    def respond(self, request, head):
        """-> status, body, seconds to wait. What is asked about says "mode=good" or "mode=good@0.5"."""
        text, about = self.asked(request)
        mode, wait_s = (re.findall(r"mode=(\w*)@?([\d.]*)", text) or [("good", "")])[0]
        hits = sum(about.items() <= entry.items() for entry in self.log)
        key = re.search(r"Bearer (\S+)", head)[1]
        self.log.append(dict(about, time=time.monotonic(), key=key, **request))
        for option, named in self.options:
            if option in request:
                return 400, {"error": {"message": f"unsupported: {option if named else 'something'}"}}, 0
        errors = ERRORS.get(mode, [])
        if hits < len(errors):
            return errors[hits], {"error": {"message": f"no good: Authorization: Bearer {KEY}"}}, 0
        body = PAGES.get(mode) or completion(*self.reply(request, mode, **about))
        return 200, body, float(wait_s or 0)

    def asked(self, request):
        """-> the text that holds the mode, {what the log says of the request}"""
        text = request["messages"][-1]["content"]
        return text, dict(id=re.search(r"clip (\w+)", text)[1])

    def reply(self, request, mode, id):
        """-> the text, the finish reason, the tokens"""
        row = good(id)
        whole, wrong, seed = json.dumps(row), json.dumps(row | {"answer": "a whale"}), request.get("seed", 1)
        if mode == "mixed" and seed % 3 == 0:
            bad = [whole[:40], wrong, "I cannot.", json.dumps(row | {"choices": ["x"]})]
            return bad[seed % 4], "stop"
        texts = {
            "prose": f"Here you are:\n```json\n{whole}\n```\nHave fun.",
            "cut": whole[:60],
            "bad": wrong,
            "null": None,
            "long": "x" * 5000,
            "half": json.dumps(row | {"question": "What is \ud83d here now?"}),
            "leak": json.dumps(row | {"question": f"Which animal says {KEY} to you?"}),
            "same": json.dumps(GOOD),
        }
        tokens = None if mode == "free" else (300, 40)
        return texts.get(mode, whole), "length" if mode == "cut" else "stop", tokens


class Listener(Server):
    """An audio model: to `say`, a function of (choices, sounds, number of the sample) -> text, it hands what it hears.

    What is asked about is "Number 7?", with "mode=" and how the answer goes; the sounds are lists of 16-bit samples.
    """

    say = None

    def asked(self, request):
        content = request["messages"][-1]["content"]
        *parts, last = content if isinstance(content, list) else [{"text": content}]
        about = dict(id=re.search(r"Number (\w+)", last["text"])[1], text=last["text"])
        return last["text"], about | dict(sounds=[self.hear(**part) for part in parts])

    def hear(self, type, input_audio):
        assert type == "input_audio" and input_audio["format"] == "wav"
        file = io.BytesIO(base64.b64decode(input_audio["data"], validate=True))
        with soundfile.SoundFile(file) as f:
            assert (f.format, f.subtype, f.samplerate, f.channels) == ("WAV", "PCM_16", RATE_HZ, 1)
            return f.read(dtype="int16").tolist()

    def reply(self, request, mode, id, text, sounds):
        about = dict(id=id, text=text, sounds=sounds)
        seeds = dict.fromkeys(entry["seed"] for entry in self.log if about.items() <= entry.items())
        n = list(seeds).index(request["seed"])
        choices = re.search(r"following options: (\[.*?\])\.", text)
        said = type(self).say(ast.literal_eval(choices[1]) if choices else [], sounds, n)
        return HOW[mode](said), "length" if mode == "cut" else "stop", None if mode == "free" else (300, 40)


HOW = {  # mode: what becomes of a good answer
    "cut": lambda said: said[:3],
    "null": lambda said: None,
    "empty": lambda said: "",
    "think": lambda said: f"<think>A dog, a cat, rain or a bell?</think>\n\n{said}",
    "thought": lambda said: f"A dog? A cat, rain, or a bell?</think>{said}",
    "thinking": lambda said: f"<think>This is surely {said}",
    "leak": lambda said: f"{said} {KEY}",
}
HOW |= dict.fromkeys(("good", "free", "limit", "errors", "broken"), str)


@pytest.fixture
def server(monkeypatch):
    """.url, .log, .options"""
    loop, log, options = asyncio.new_event_loop(), [], []
    listening = loop.run_until_complete(loop.create_server(lambda: Server(log, options), "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    yield SimpleNamespace(url=url, log=log, options=options)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


class Runs:
    """Runs of a tool in a folder, each with a name; its files are the name and a part each.

    work: its function of what is asked about and Options, which a call of the object calls in this process.
    """

    def __init__(self, tool, work, parts, folder, server):
        self.tool, self.work, self.parts, self.folder = tool, work, parts, str(folder)
        self.url, self.log = server.url, server.log

    def __call__(self, asked, name="a", **options) -> dict:
        options = dict(model="m", out=self.paths(name)[0], base_url=self.url) | options
        return self.work(asked, self.tool.Options(**options))

    def refuses(self, says, asked, *name, **options):
        """With such a message, and no key in it."""
        with pytest.raises(UserError, match=says) as e:
            self(asked, *name, **options)
        assert KEY not in str(e.value)

    def refuses_to_go_on(self, says, asked, **options):
        """What each of the files alone is enough for."""
        before, n = self.files(), len(self.log)
        for k, path in enumerate(self.paths()):
            self.refuses(f"{says}.*other files", asked, **options)
            assert self.files()[k:] == before[k:] and len(self.log) == n
            os.truncate(path, 0)

    def paths(self, name="a") -> list[str]:
        return [os.path.join(self.folder, f"{name}{part}.jsonl") for part in self.parts]

    def files(self, name="a") -> list[bytes]:
        return [open(path, "rb").read() for path in self.paths(name) if os.path.exists(path)]

    def rows(self, name="a") -> list[list[dict]]:
        """Of each file the whole lines."""
        return [list(map(json.loads, content.split(b"\n")[:-1])) for content in self.files(name)]

    def ids(self) -> list[str]:
        return [row["id"] for rows in self.rows() for row in rows]

    def command(self, path, *flags, **options) -> subprocess.Popen:
        """The command line, a process of its own."""
        out = ["--out", self.paths()[0], "--model", "m", "--base_url", self.url]
        return start_tool(self.tool, path, *out, *flags, **options)


def start_tool(tool, *words, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", tool.__name__, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": ROOT}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment, **pipes, **options)


def wait_until(is_so, most_s=300.0):
    deadline = time.monotonic() + most_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
