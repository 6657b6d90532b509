"""What the tests of whole runs share: to start the trainer as a user does, and to read what it leaves."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

import omni_grpo as og

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCHRUN = """-m torch.distributed.run --nproc_per_node 2
    --master_port 0 --rdzv_backend c10d --rdzv_endpoint localhost:0""".split()
# the trainer as a script, with a change: a constant that is no flag, or a fault
CHANGED = """
import sys
sys.path.insert(0, {root!r})
import omni_grpo as og
{change}
sys.exit(og.main())
"""


def start(words, change="", folder=None, ranks=1):
    """The trainer in a process of its own; with a change, which takes a folder for its script.    -> Popen"""
    script = os.path.join(ROOT, "omni_grpo.py")
    if change:
        script = os.path.join(folder, "changed.py")
        with open(script, "w", encoding="utf-8") as f:
            f.write(CHANGED.format(root=ROOT, change=change))
    command = [sys.executable, *(TORCHRUN if ranks == 2 else []), script, *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, **pipes)


def finish(process, code=0):
    """Wait for its end with this exit code; None: with any but 0.       -> (stdout, stderr)"""
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == code if code is not None else process.returncode, stderr
    assert "Traceback" not in stderr or code not in (0, 2)
    return stdout, stderr


def train(cfg, out):
    """-> the run directory, which is `out`"""
    folder, finished = og.train(dataclasses.replace(cfg, out=str(out)))
    assert finished and folder == str(out)
    return folder


def die_in_step(n, cfg, out, monkeypatch):
    """Train until the update of step n fails, and tear the last line of the log."""
    update, calls = og.update, []

    def dies(*args):
        calls.append(args)
        if len(calls) == n:
            raise RuntimeError("the lights went out")
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the lights"):
        patch.setattr(og, "update", dies)
        train(cfg, out)
    assert len(read(out)) == n
    with open(os.path.join(out, "log.jsonl"), "a", encoding="utf-8") as f:
        f.write('{"step": 9')


def flags(cfg):
    """Config -> the command line that says the same."""
    words = []
    for name, value in vars(cfg).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value != "":
            words += [f"--{name}", str(value)]
    return words


def whole_lines(out, name="log.jsonl"):
    """What a run that may still be writing has logged."""
    path = os.path.join(out, name)
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as f:
        return [line for line in f if line.endswith("\n")]


def read(out, name="log.jsonl"):
    return [json.loads(line) for line in whole_lines(out, name)]


def left_by(out):
    """All that a run says and has learned, without its clock and its memory: equal for equal runs."""
    records = []
    for record in read(out):
        records.append({k: v for k, v in record.items() if not k.startswith(("time/", "mem/"))})
    weights = {}
    for folder in ("adapter", "model"):
        path = os.path.join(out, folder)
        for name in os.listdir(path) if os.path.exists(path) else ():
            if name.endswith(".safetensors"):
                with open(os.path.join(path, name), "rb") as f:
                    weights[name] = f.read()
    assert weights
    return records, read(out, "rollouts.jsonl"), weights


def saved_state(out):
    import torch

    return torch.load(os.path.join(out, "checkpoint", "state.pt"), weights_only=True)["state"]
