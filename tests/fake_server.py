"""An OpenAI-compatible server of our own on 127.0.0.1, in a thread; what it answers depends on the request
alone. And the files of the runs that ask it.

`server` is the fixture. Other tests let it answer otherwise: a subclass of Server with its own `respond`,
put in its place by monkeypatch.setattr(fake_server, "Server", Other).
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import pytest

KEY = "sk-test-0123456789abcdef"
ANIMALS = "dog cat cow duck goat horse owl frog crow sheep pig goose".split()
GOOD = dict(
    question="Which animal calls twice before the bell rings?",
    choices=["A dog", "A cat", "A duck", "A cow"],
    answer="A dog",
)
ERRORS = {  # mode: (status, header) of the first requests on a clip; of all, but for the first two modes
    "limit": [(429, "Retry-After: 1\r\n")],
    "errors": [(500, ""), (503, "")],
    "forbidden": [(401, "")],
    "missing": [(404, "")],
    "broken": [(500, "")],
    "odd": [(422, "")],
}


def good(name: str) -> dict:
    """The right answer is always the first choice. Names that end in 9 share three questions between them."""
    part = str(int(name[-2]) % 3) if name.endswith("9") else name
    choices = random.Random(part).sample(ANIMALS, 4)
    return dict(question=f"Which animal is heard first in part {part}?", choices=choices, answer=choices[0])


def content(name: str, mode: str, seed: int) -> tuple[str | None, str]:
    """The text and the finish reason of a reply to a request for a question."""
    row = good(name)
    whole = json.dumps(row)
    wrong = json.dumps(row | {"answer": "a whale"})
    if mode == "mixed" and seed % 3 == 0:
        return [whole[:40], wrong, "I cannot.", json.dumps(row | {"choices": ["x"]})][seed % 4], "stop"
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
    return texts.get(mode, whole), "length" if mode == "cut" else "stop"


def completion(text: str | None, finish: str = "stop", tokens: tuple | None = (300, 40)) -> dict:
    """The body of a chat completion; with its usage unless tokens is None."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
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
            status, extra, body, wait_s = self.respond(json.loads(rest[:size]), head.decode())
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            kind = "application/json" if raw[:1] == b"{" else "text/html"
            start = (
                f"HTTP/1.1 {status} X\r\n{extra}Content-Type: {kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
            )
            asyncio.get_running_loop().call_later(wait_s, self.transport.write, start.encode() + raw)

    def respond(self, request, head):
        """-> status, more headers, body, seconds to wait. A clip's notes say "mode=..." and "slow=..." """
        text = request["messages"][-1]["content"]
        name = re.search(r"clip (\w+)", text)[1]
        mode = (re.findall(r"mode=(\w+)", text) or ["good"])[0]
        wait_s = float((re.findall(r"slow=([\d.]+)", text) or [0])[0])
        hits = sum(entry["id"] == name for entry in self.log) if mode in ("limit", "errors") else 0
        key = re.search(r"Bearer (\S+)", head)[1]
        self.log.append(dict(id=name, time=time.monotonic(), key=key, **request))
        for option, named in self.options:
            if option in request:
                message = f"unsupported: {option if named else 'something'}"
                return 400, "", {"error": {"message": message}}, 0
        errors = ERRORS.get(mode, [])
        if hits < len(errors):
            return *errors[hits], {"error": {"message": f"no good: Authorization: Bearer {KEY}"}}, 0
        if mode == "half_json":
            return 200, "", b'{"id": "x", "choices": [{"ind', 0
        if mode == "page":
            return 200, "", b"<html>hello</html>", 0
        tokens = None if mode == "free" else (300, 40)
        return 200, "", completion(*content(name, mode, request.get("seed", 1)), tokens), wait_s


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
    yield type("Fixture", (), dict(url=url, log=log, options=options))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Runs:
    """Runs of a tool in a folder, each with a name; its files are the name and a part each."""

    def __init__(self, tool, folder, parts, url):
        self.tool, self.folder, self.parts, self.url = tool, str(folder), parts, url

    def paths(self, name="a") -> list[str]:
        return [os.path.join(self.folder, f"{name}{part}.jsonl") for part in self.parts]

    def files(self, name="a") -> list[bytes]:
        return [open(path, "rb").read() for path in self.paths(name) if os.path.exists(path)]

    def rows(self, name="a") -> list[list[dict]]:
        return [[json.loads(line) for line in content.splitlines()] for content in self.files(name)]

    def ids(self) -> list[str]:
        """Of whole lines."""
        return [json.loads(line)["id"] for content in self.files() for line in content.split(b"\n")[:-1]]

    def command(self, path, *flags, **options) -> subprocess.Popen:
        """The command line, a process of its own."""
        command = [sys.executable, "-m", self.tool, path, "--out", self.paths()[0], "--model", "m"]
        command += ["--base_url", self.url, *map(str, flags)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, **options)


def wait_until(is_so, most_s=300.0):
    deadline = time.monotonic() + most_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
