"""What the tests of whole runs share: to start the trainer as a user does, and to read what it leaves."""

import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile

import pytest

import omni_grpo as og

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARIES = "peft bitsandbytes transformers.models.qwen2_5_omni.modeling_qwen2_5_omni".split()


def start(words):
    """The trainer as a user starts it: a script, in a process of its own.    -> Popen"""
    command = [sys.executable, os.path.join(ROOT, "omni_grpo.py"), *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # a background job of a shell would hand on that it does not listen to Ctrl-C
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=hear_ctrl_c, **pipes)


def hear_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@functools.cache
def server_of_forks():
    """A process that has loaded the libraries and computed nothing: a fork of it starts in no time. (A fork of
    this process, where threads have been at work, may hang in MKL.)"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", *LIBRARIES])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.path.join(ROOT, "tests")]))
        multiprocessing.forkserver.ensure_running()
    return context


def child(said, act, environment):
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")
    os.environ.update(environment)
    sys.exit(act())


def fork(act, *words, **environment):
    """act(*words) -> its exit code, in a process of its own, whatever was patched in this one; a function that
    can be pickled.    -> Process"""
    number, said = tempfile.mkstemp()
    os.close(number)
    act = functools.partial(act, *words)
    process = server_of_forks().Process(target=child, args=(said, act, environment), daemon=True)
    process.said = said
    process.start()
    return process


def change_and_train(change, *words):
    if change:
        change()
    return og.main(list(words))


def fork_trainer(words, change=None, **environment):
    """change() comes first: a constant that is no flag, or a fault."""
    return fork(change_and_train, change, *map(str, words), **environment)


def fork_ranks(words, change=None):
    """Two ranks, with what torchrun tells each.    -> [Process]"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    return [fork_trainer(words, change, RANK=rank, LOCAL_RANK=rank, **told) for rank in "01"]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def finish(process, code=0):
    """Wait for the end of a fork with this exit code.    -> all that it said"""
    process.join(240)
    if process.is_alive():  # the trainer would finish its step after a SIGTERM
        process.kill()
    with open(process.said, encoding="utf-8") as f:
        said = f.read()
    assert process.exitcode == code, said
    assert "Traceback" not in said
    return said


def train(cfg, out):
    """-> the run directory, which is `out`"""
    folder, finished = og.train(dataclasses.replace(cfg, out=str(out)))
    assert finished and folder == str(out)
    return folder


def at_call(n, function, act):
    """The function, whose n-th call does act() first; .calls: the arguments of each"""

    def watched(*args, **kwargs):
        watched.calls.append(args)
        if len(watched.calls) == n:
            act()
        return function(*args, **kwargs)

    watched.calls = []
    return watched


def lights_out():
    raise RuntimeError("the lights went out")


def die_in_step(n, cfg, out, monkeypatch):
    """Train until the update of step n fails, and tear the last line of the log."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the lights"):
        patch.setattr(og, "update", at_call(n, og.update, lights_out))
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
