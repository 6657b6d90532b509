"""Shim until the merge: the server of test_generate."""

import asyncio
import json
import random
import re
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
