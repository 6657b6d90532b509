"""Several ranks: the step of two processes is the step of one, a rank that dies ends the run, and the run can go on."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import omni_grpo as og

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
import omni_grpo as og
update, n = og.update, 0

def dying(*args):
    global n
    n += 1
    if n == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)

og.update = dying
sys.exit(og.main())
"""


def torchrun(script, words, n=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(n),
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        str(script),
        *map(str, words),
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def read(run, name="log.jsonl"):
    with open(os.path.join(run, name), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def adapter(run):
    return load_file(os.path.join(run, "adapter", "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def words(tiny):
    return [
        "--data",
        tiny.questions,
        "--model",
        tiny.base,
        "--eval_size",
        4,
        "--eval_every",
        4,
        "--eval_samples",
        2,
        "--steps",
        4,
        "--save_every",
        2,
        "--log_rollouts",
        1,
        "--prompts_per_step",
        4,
        "--num_generations",
        4,
        "--max_new_tokens",
        6,
        "--lora_rank",
        4,
        "--workers",
        1,
        "--lr",
        1e-4,
        "--warmup_steps",
        0,
        "--temperature",
        1.5,
        "--optimizer",
        "adamw",
    ]


@pytest.fixture(scope="module")
def two(words, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("two") / "run")
    done = torchrun(os.path.join(ROOT, "omni_grpo.py"), [*words, "--out", out])
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("held out") == done.stdout.count("adapter, checkpoint") == 1
    )  # one of them speaks
    return out


def test_two_ranks_take_the_step_of_one(words, two, tmp_path):
    """Same prompts, same completions, and the same adapter to 1e-6 after four steps, with lengths that differ and a KL."""
    one = str(tmp_path / "one")
    assert og.main([str(w) for w in [*words, "--out", one]]) == 0
    for a, b in zip(read(one), read(two), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(("time/", "mem/")):
                assert a[key] == pytest.approx(b[key], abs=1e-5), (a["step"], key)
    by_id = [
        sorted((r["step"], r["id"], r["completion"], r["reward"]) for r in read(run, "rollouts.jsonl"))
        for run in (one, two)
    ]
    assert by_id[0] == by_id[1] and len(by_id[0]) == 64
    assert len({r["tokens"] for r in read(two, "rollouts.jsonl")}) > 1
    ours, theirs = adapter(one), adapter(two)
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in ours)
    assert max(ours[name].abs().max() for name in ours if "lora_B" in name) > 1e-4  # they did move


def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on(words, two, tmp_path):
    """Killed in step 4: a message and a whole checkpoint of step 2; two ranks go on to the same end, one rank may not."""
    script, out = tmp_path / "dies.py", str(tmp_path / "run")
    script.write_text(DIES.format(root=ROOT))
    done = torchrun(script, [*words, "--out", out])
    assert done.returncode != 0 and "another rank ended" in done.stderr and "--resume" in done.stderr
    assert torch.load(os.path.join(out, "checkpoint", "state.pt"), weights_only=True)["state"]["step"] == 2
    assert len(read(out)) == 4  # steps 0 to 3
    alone = subprocess.run(
        [sys.executable, "omni_grpo.py", "--resume", out], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        alone.returncode == 2
        and "torchrun --nproc_per_node 2" in alone.stderr
        and "Traceback" not in alone.stderr
    )
    done = torchrun(os.path.join(ROOT, "omni_grpo.py"), ["--resume", out])
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(x, adapter(two)[name]) for name, x in adapter(out).items())
    assert read(out, "rollouts.jsonl") == read(two, "rollouts.jsonl")


def test_prompts_that_cannot_be_shared_are_refused(words, tmp_path):
    done = torchrun(
        os.path.join(ROOT, "omni_grpo.py"), [*words, "--prompts_per_step", 3, "--out", tmp_path / "run"]
    )
    assert done.returncode != 0 and "cannot be shared evenly among 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists() and signal.SIGKILL.name not in done.stderr
