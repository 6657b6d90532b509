"""Several ranks: the step of two processes is the step of one, a rank that dies ends the run, and the run can
go on."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import omni_grpo as og
import reward
import runs

TORCHRUN = """-m torch.distributed.run --nproc_per_node 2
    --master_port 0 --rdzv_backend c10d --rdzv_endpoint localhost:0""".split()
# the trainer as a script whose rank 1 dies in step 4
SCRIPT = """
import sys
sys.path[:0] = {path!r}
import omni_grpo as og
import test_ranks
test_ranks.set_up()
test_ranks.die_in_step_4()
sys.exit(og.main())
"""


def set_up():
    """Every step has a gradient to speak of. Without any spread of rewards it is the rounding in the KL, which
    differs with the order of sums, and AdamW makes full steps of it."""
    reward.REWARDS["varied"] = lambda said, example: len(said.text) % 4
    og.LOG_ROLLOUTS, og.EVAL_SAMPLES = 1, 2


def die_in_step_4():
    og.update = runs.at_call(4, og.update, lambda: os.environ["RANK"] == "1" and runs.kill())


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
    out = str(tmp_path_factory.mktemp("two") / "run")
    said = "".join(map(runs.finish, runs.fork_ranks([*words, "--out", out], set_up)))
    assert said.count("held out") == said.count("adapter, checkpoint") == 1  # one of them speaks
    return out


@pytest.fixture
def setting(monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "varied", None)  # forgotten after the test
    monkeypatch.setattr(og, "LOG_ROLLOUTS", 1)
    monkeypatch.setattr(og, "EVAL_SAMPLES", 2)
    set_up()


def test_two_ranks_take_the_step_of_one(words, two, tmp_path, setting):
    """Same prompts, same completions, and the same adapter to 1e-6 after four steps, with lengths that differ
    and a KL."""
    one = str(tmp_path / "one")
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


@pytest.mark.parametrize("flags", ["--scale batch --baseline loo --mask_truncated", "--aggregate gdpo"])
def test_two_ranks_have_one_step_of_every_objective(words, tmp_path, setting, flags):
    """What is taken over the whole step, is taken over all ranks; parts of a rollout are the same prompts."""
    words = [
        *words,
        *flags.split(),
        "--minibatches",
        "2",
        "--loss",
        "sapo",
        "--steps",
        "2",
        "--eval_size",
        "0",
    ]
    assert og.main([*words, "--out", str(tmp_path / "one")]) == 0
    for rank in runs.fork_ranks([*words, "--out", str(tmp_path / "two")], set_up):
        runs.finish(rank)
    (log, *_), (other_log, *_) = runs.left_by(tmp_path / "one"), runs.left_by(tmp_path / "two")
    assert log[-1]["policy/kl_old"] > 0
    for a, b in zip(log, other_log, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    ours, theirs = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in ours)


def test_a_rank_that_dies_ends_the_run_and_the_run_goes_on(words, two, tmp_path, command, setting):
    """Killed in step 4, under torchrun: a message and a whole checkpoint of step 2; two ranks go on to the same
    end, one rank may not."""
    out, script = str(tmp_path / "run"), tmp_path / "dies.py"
    script.write_text(SCRIPT.format(path=[runs.ROOT, os.path.join(runs.ROOT, "tests")]))
    torchrun = [sys.executable, *TORCHRUN, str(script), *words, "--out", out]
    done = subprocess.run(torchrun, cwd=runs.ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode and "another rank ended" in done.stderr and "--resume" in done.stderr
    assert runs.saved_state(out)["step"] == 2 and len(runs.read(out)) == 4  # steps 0 to 3
    code, said = command(og.main, "--resume", out)
    assert code == 2 and "torchrun --nproc_per_node 2" in said
    for rank in runs.fork_ranks(["--resume", out], set_up):
        runs.finish(rank)
    assert runs.left_by(out) == runs.left_by(two)


def test_prompts_that_cannot_be_shared_are_refused(words, tmp_path):
    out = tmp_path / "run"
    for rank in runs.fork_ranks([*words, "--prompts_per_step", 3, "--out", out], set_up):
        assert "cannot be shared evenly among 2 ranks" in runs.finish(rank, 2)
    assert not out.exists()
