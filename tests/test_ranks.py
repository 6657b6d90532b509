"""Several ranks: the step of two processes is the step of one, a rank that dies ends the run, and the run can
go on."""

import os

import pytest
from safetensors.torch import load_file

import omni_grpo as og
import reward
import runs

# Every step has a gradient to speak of. Without any spread of rewards it is the rounding in the KL, which
# differs with the order of sums, and AdamW makes full steps of it.
SETTING = """
import reward
reward.REWARDS["varied"] = lambda said, example: len(said.text) % 4
og.LOG_ROLLOUTS, og.EVAL_SAMPLES = 1, 2
"""
DIES = """
import os, signal
update, calls = og.update, []
def dying(*args):
    calls.append(args)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)
og.update = dying
"""


def adapter(run):
    return load_file(os.path.join(run, "adapter", "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def words(config, tiny):
    # held-out questions from a file: those that are split off depend on the clips' paths, which pytest numbers
    cfg = config(
        eval_data=tiny.questions,
        eval_size=4,
        eval_every=4,
        steps=4,
        save_every=2,
        prompts_per_step=4,
        num_generations=4,
        temperature=1.5,
        lr=1e-4,
        warmup_steps=0,
        optimizer="adamw",
        reduce="token",  # its weights depend on the tokens of every rank
    )
    return [*runs.flags(cfg), "--reward", "accuracy=1,varied=1"]


@pytest.fixture(scope="module")
def two(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    out = str(folder / "run")
    stdout, _ = runs.finish(runs.start([*words, "--out", out], SETTING, folder, ranks=2))
    assert stdout.count("held out") == stdout.count("adapter, checkpoint") == 1  # one of them speaks
    return out


def test_two_ranks_take_the_step_of_one(words, two, tmp_path, monkeypatch):
    """Same prompts, same completions, and the same adapter to 1e-6 after four steps, with lengths that differ
    and a KL."""
    one = str(tmp_path / "one")
    monkeypatch.setattr(og, "LOG_ROLLOUTS", 1)
    monkeypatch.setattr(og, "EVAL_SAMPLES", 2)
    monkeypatch.setitem(reward.REWARDS, "varied", lambda said, example: len(said.text) % 4)
    assert og.main([*words, "--out", one]) == 0
    (log, rollouts, _), (other_log, other_rollouts, _) = runs.left_by(one), runs.left_by(two)
    assert all(record["optim/grad_norm"] > 1e-2 for record in log[1:])
    for a, b in zip(log, other_log, strict=True):
        assert a == pytest.approx(b, abs=1e-5)

    def said(lines):
        return sorted((r["step"], r["id"], r["completion"], r["reward"]) for r in lines)

    assert said(rollouts) == said(other_rollouts) and len(rollouts) == 64
    assert len({r["tokens"] for r in rollouts}) > 1
    ours, theirs = adapter(one), adapter(two)
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in ours)
    assert max(ours[name].abs().max() for name in ours if "lora_B" in name) > 1e-4  # they did move


def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on(words, two, tmp_path):
    """Killed in step 4: a message and a whole checkpoint of step 2; two ranks go on to the same end, one rank
    may not."""
    out = str(tmp_path / "run")
    process = runs.start([*words, "--out", out], SETTING + DIES, tmp_path, ranks=2)
    _, stderr = runs.finish(process, code=None)
    assert "another rank ended" in stderr and "--resume" in stderr
    assert runs.saved_state(out)["step"] == 2 and len(runs.read(out)) == 4  # steps 0 to 3
    _, stderr = runs.finish(runs.start(["--resume", out], SETTING, tmp_path), 2)
    assert "torchrun --nproc_per_node 2" in stderr
    runs.finish(runs.start(["--resume", out], SETTING, tmp_path, ranks=2))
    assert runs.left_by(out) == runs.left_by(two)


def test_prompts_that_cannot_be_shared_are_refused(words, tmp_path):
    out = tmp_path / "run"
    process = runs.start([*words, "--prompts_per_step", 3, "--out", out], SETTING, tmp_path, ranks=2)
    _, stderr = runs.finish(process, code=None)
    assert "cannot be shared evenly among 2 ranks" in stderr and not out.exists()
