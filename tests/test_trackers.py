"""--report_to: what a run logs, in trackers; and a run that no tracker can disturb."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import omni_grpo as og
import runs
import texts
from data import UserError
from fake_server import wait_until
from tools import trackers

LOG = [
    {"step": 0, "eval/accuracy": 0.25},
    {"step": 1, "reward/mean": 0.5, "optim/grad_norm": None},
    {"step": 2, "reward/mean": 0.75, "eval/accuracy": 0.5},
]


@pytest.fixture
def finished(tmp_path):
    """The files of a run of two steps, with a rollout of two completions about a clip."""
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(3200) / 5) / 2, 16_000)
    said = dict(step=2, question="What | is\nit?", choices=["dog", "cat"], audio=str(tmp_path / "a.wav"))
    (tmp_path / "run").mkdir()
    texts.write_lines(str(tmp_path / "run/log.jsonl"), *LOG)
    rollouts = [said | dict(completion=text, reward=reward) for text, reward in (("dog", 1.0), ("cow", 0.0))]
    texts.write_lines(str(tmp_path / "run/rollouts.jsonl"), *rollouts)
    (tmp_path / "run/config.json").write_text(json.dumps(dict(config=dict(seed=7, model="x"))))
    return str(tmp_path / "run")


def sent(run, names, **environment):
    """By the command.    -> what it said"""
    command = [sys.executable, "-m", "tools.trackers", run, "--report_to", names]
    pipes = dict(capture_output=True, text=True, cwd=texts.ROOT, env=os.environ | environment)
    done = subprocess.run(command, **pipes)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def curves_in_tensorboard(run):
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(f"{run}/tensorboard").Reload()
    return events, {(key, x.step): x.value for key in events.Tags()["scalars"] for x in events.Scalars(key)}


def curves_of(log):
    return {(key, r["step"]): x for r in log for key, x in r.items() if key != "step" and x is not None}


def test_tensorboard_holds_the_log(finished):
    for _ in range(2):  # it is written anew, not twice
        sent(finished, "tensorboard")
        events, curves = curves_in_tensorboard(finished)
        assert curves == curves_of(LOG)
    (text,) = events.Tensors("rollouts/text_summary")
    assert (
        text.step == 2
        and b"| What \\| is it? | ['dog', 'cat'] | cow | 0.0 |" in text.tensor_proto.string_val[0]
    )
    (heard,) = events.Audio("rollouts/first")
    assert heard.sample_rate == 16_000 and heard.length_frames == 3200


def test_trackio_holds_the_log(finished, tmp_path):
    pytest.importorskip("trackio")
    folder = dict(TRACKIO_DIR=str(tmp_path / "trackio"))
    sent(finished, "trackio", **folder)
    texts.write_lines(f"{finished}/log.jsonl", *LOG, {"step": 3, "reward/mean": 1.0})
    sent(finished, "trackio", **folder)  # only what is new
    code = "from trackio import SQLiteStorage as S; import json; print(json.dumps(S.get_logs('omni-grpo', 'run')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | folder, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    tables = [row.pop("rollouts") for row in rows if "rollouts" in row]
    curves = [((key, row["step"]), x) for row in rows for key, x in row.items() if "/" in key]
    assert len(curves) == 5 and dict(curves) == curves_of([*LOG, {"step": 3, "reward/mean": 1.0}])
    assert len(tables) == 1 and "cow" in str(tables[0])


def test_a_run_with_a_tracker_is_the_run_without(config, tmp_path):
    pytest.importorskip("tensorboard")
    plain = runs.train(config(steps=3), tmp_path / "plain")
    out = runs.train(config(steps=3, report_to="tensorboard"), tmp_path / "followed")
    assert runs.left_by(out) == runs.left_by(plain)
    _, curves = curves_in_tensorboard(out)
    theirs = curves_of(runs.read(out))
    assert curves.keys() == theirs.keys()
    assert all(x == pytest.approx(theirs[key], rel=1e-6) for key, x in curves.items())


@pytest.mark.parametrize("fault", ["import", "log", "hang", "killed"])
def test_a_tracker_that_fails_costs_a_warning(config, tmp_path, monkeypatch, capfd, fault):
    body = {
        "import": "raise OSError('no network')",
        "log": "def init(*args, **more): return type('R', (), dict(log=lambda *a, **m: 1 / 0))()",
        "hang": "import time\ndef init(*args, **more): time.sleep(100)",
        "killed": "import os\ndef init(*args, **more): os.kill(os.getpid(), 9)",
    }[fault]
    (tmp_path / "trackio.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trackers, "FINISH_S", 5)
    plain = runs.train(config(steps=2), tmp_path / "plain")
    out = runs.train(config(steps=2, report_to="trackio"), tmp_path / "followed")
    assert runs.left_by(out) == runs.left_by(plain)
    said = capfd.readouterr().err
    words = {
        "import": "warning: trackio is left out from here on: no network",
        "log": "warning: trackio is left out from here on: division by zero",
        "hang": f"python -m tools.trackers {out} --report_to trackio sends the rest",
        "killed": f"python -m tools.trackers {out} --report_to trackio sends the rest",
    }[fault]
    assert words in said


def test_a_signal_does_not_stop_the_follower(finished):
    """It ends when the run has closed its pipe, and not before all is sent."""
    pytest.importorskip("tensorboard")
    command = [
        sys.executable,
        "-m",
        "tools.trackers",
        finished,
        "--report_to",
        "tensorboard",
        "--until_closed",
    ]
    follower = subprocess.Popen(command, cwd=texts.ROOT, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    path = f"{finished}/trackers.json"
    wait_until(lambda: os.path.exists(path))
    follower.send_signal(signal.SIGTERM)
    with open(f"{finished}/log.jsonl", "a") as f:
        f.write('{"step": 3, "reward/mean": 1.0}\n{"step": 4, "rew')
    follower.stdin.close()
    assert follower.wait(60) == 0
    assert curves_in_tensorboard(finished)[1] == curves_of([*LOG, {"step": 3, "reward/mean": 1.0}])


def test_trackers_that_are_not_there(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("--report_to wandb: is not installed; pip install wandb")):
        og.train(config(report_to="wandb"))
    with pytest.raises(UserError, match="--report_to mlflow: must be of tensorboard, trackio"):
        trackers.names_of("mlflow")
    assert trackers.main(["nowhere", "--report_to", ""]) == 2
