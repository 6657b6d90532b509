"""What stands beside a published adapter, and the way to the Hub."""

import base64
import dataclasses
import http.server
import json
import os
import shlex
import subprocess
import sys
import threading

import pytest

import omni_grpo as og
import runs
import texts
from tools import card


@pytest.fixture(scope="module")
def finished_once(config, tmp_path_factory):
    return runs.train(config(steps=1), tmp_path_factory.mktemp("finished") / "run")


def write_run(folder, cfg, log=()):
    about = dict(commit="abc", torch="2", transformers="5", hardware="CPU", held_out=240)
    about["data"] = {"data": dict(questions=960, hash="d5")}
    texts.write_lines(str(folder / "log.jsonl"), *log)
    (folder / "config.json").write_text(json.dumps(about | dict(config=dataclasses.asdict(cfg))))
    return card.card(str(folder))


def test_a_card_says_what_was_measured(tmp_path):
    cfg = og.Config(data="my data.jsonl", beta=0.0, gradient_checkpointing=False, out="runs/x")
    log = [
        {"step": 0, "eval/accuracy": 0.25, "eval/accuracy_silence": 0.2},
        {"step": 10, "eval/accuracy": 0.7},
        {"step": 15},
        {"step": 20, "eval/accuracy": 0.75, "eval/accuracy_silence": 0.25},
        {"step": 21, "reward/mean": 1},
    ]
    text = write_run(tmp_path, cfg, log)
    assert "| held-out accuracy, greedy | 0.750 (0.692 to 0.801); before training 0.250 |" in text
    assert (
        "| held-out accuracy, greedy, silence played | 0.250 (0.199 to 0.308); before training 0.200 |"
        in text
    )
    assert "240 questions, after step 20" in text and "`my data.jsonl`, 960 questions, hash d5" in text
    assert "base_model: Qwen/Qwen2.5-Omni-7B\n" in text and "licence is left open" in text
    (command,) = [line.strip() for line in text.splitlines() if line.startswith("    python")]
    assert shlex.split(command)[2:] == [
        "--data",
        "my data.jsonl",
        "--beta",
        "0.0",
        "--no-gradient_checkpointing",
    ]


def test_a_card_does_not_invent(tmp_path):
    text = write_run(tmp_path, og.Config(data="x", model=str(tmp_path)))
    assert "| held-out accuracy | not measured |" in text and "base_model" not in text


def test_a_run_writes_its_card(finished_once):
    text = texts.read(os.path.join(finished_once, "adapter", "README.md"))
    assert text == card.card(finished_once) and "More Information Needed" not in text
    config = json.loads(texts.read(os.path.join(finished_once, "adapter", "adapter_config.json")))
    model = json.loads(texts.read(os.path.join(finished_once, "config.json")))["config"]["model"]
    assert config["base_model_name_or_path"] == model


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload asks for. Every file is small."""

    refuses = 0
    files, keys = {}, []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.keys.append(self.headers["Authorization"])
        repo = f"http://{self.headers['Host']}/me/ears"
        reply = dict(url=repo, commitUrl=f"{repo}/commit/1", commitOid="1")
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            reply = dict(files=[dict(path=n, uploadMode="regular", shouldIgnore=False) for n in names])
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.send_response(self.refuses or 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("refuses", [0, 401])
def test_push_to_hub(finished_once, tmp_path, monkeypatch, refuses):
    monkeypatch.setattr(Hub, "refuses", refuses)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out, secret = str(tmp_path / "out"), "hf_secretsecretsecret"
    environment = os.environ | dict(HF_TOKEN=secret, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    command = [sys.executable, "-m", "tools.export", os.path.join(finished_once, "adapter")]
    command += ["--for", "thinker", "--out", out, "--push_to_hub", "me/ears"]
    done = subprocess.run(command, cwd=texts.ROOT, env=environment, capture_output=True, text=True)
    server.shutdown()
    assert Hub.keys[-1] == f"Bearer {secret}" and secret not in done.stdout + done.stderr
    if refuses:
        assert done.returncode == 2 and done.stderr.startswith("error: --push_to_hub me/ears: ")
        return
    assert done.returncode == 0, done.stderr
    here = {name: open(os.path.join(out, name), "rb").read() for name in os.listdir(out)}
    assert Hub.files == here and {"README.md", "adapter_model.safetensors"} <= here.keys()
