"""Living with runs: which weights are kept, the same command after a preemption, progress in a file."""

import dataclasses
import os
import re

import pytest
import torch
from safetensors.torch import load_file

import data
import omni_grpo as og
import runs
import texts
from texts import DOCS

KEY = "eval/accuracy_sampled"


@pytest.fixture(scope="module")
def evaluated(config, tiny):
    """A Config: six steps, each evaluated, of a policy that goes to and fro."""
    return config(
        cold_start_data=tiny.lessons,
        cold_start_steps=6,
        steps=0,
        save_every=2,
        eval_every=1,
        eval_data=tiny.questions,
        eval_size=16,
        lr=0.03,
        warmup_steps=0,
        rollout_rows=64,
    )


@pytest.fixture(scope="module")
def kept(evaluated, tmp_path_factory):
    """-> the run directory, the step of its best evaluation"""
    cfg = dataclasses.replace(evaluated, keep="best_sampled")
    out = runs.train(cfg, tmp_path_factory.mktemp("kept") / "run")
    measured = {record["step"]: record[KEY] for record in runs.read(out)}
    best = max(measured, key=lambda step: (measured[step], step))
    assert 0 < best < 6 and len(set(measured.values())) > 2, measured
    return out, best


def weights(out, name="adapter"):
    return load_file(os.path.join(out, name, "adapter_model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_best_is_the_adapter_of_the_best_evaluation(kept, evaluated, tmp_path):
    """The weights of that step, and they score what the log says."""
    out, best = kept
    card = texts.read(os.path.join(out, "best", "README.md"))
    assert f"after step {best};" in card and card != texts.read(os.path.join(out, "adapter", "README.md"))
    shorter = runs.train(dataclasses.replace(evaluated, cold_start_steps=best), tmp_path / "shorter")
    assert same(weights(out, "best"), weights(shorter)) and not same(weights(out, "best"), weights(out))
    cfg = dataclasses.replace(evaluated, adapter=os.path.join(out, "best"))
    policy = og.load_run_policy(cfg, train=False)
    measured = og.measure(policy, cfg, og.open_data(cfg).held, control=False)
    assert measured[KEY] == next(record[KEY] for record in runs.read(out) if record["step"] == best)


def test_keeping_the_best_changes_nothing_else(kept, evaluated, tmp_path):
    assert runs.left_by(runs.train(evaluated, tmp_path / "run")) == runs.left_by(kept[0])


@pytest.mark.parametrize("dying", ["save_checkpoint", "save_weights"])
def test_the_best_survives_a_kill_between_evaluation_and_save(kept, evaluated, tmp_path, monkeypatch, dying):
    whole, best = kept
    cfg, out = dataclasses.replace(evaluated, keep="best_sampled"), str(tmp_path / "run")
    function = getattr(og, dying)

    def dies(policy, *args):
        measured = runs.read(out) and runs.read(out)[-1]["step"] == best
        if measured and (dying == "save_checkpoint" or args[-1] == "best"):
            runs.lights_out()
        return function(policy, *args)

    with monkeypatch.context() as patch, pytest.raises((RuntimeError, og.RunStopped)):
        patch.setattr(og, dying, dies)
        og.train(dataclasses.replace(cfg, out=out))
    og.train(dataclasses.replace(cfg, out=out, resume=out))
    assert same(weights(out, "best"), weights(whole, "best")) and runs.left_by(out) == runs.left_by(whole)


def test_the_last_few_are_kept(evaluated, config, tmp_path):
    cfg = config(steps=5, save_every=1, keep="2")
    out = runs.train(cfg, tmp_path / "run")
    assert sorted(name for name in os.listdir(out) if name.startswith("step-")) == ["step-4", "step-5"]
    assert same(weights(out, "step-5"), weights(out)) and not same(weights(out, "step-4"), weights(out))


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(keep="0"), "--keep 0: must be best, best_sampled or a number from 1 on"),
        (dict(keep="worst"), "--keep worst: must be best"),
        (dict(keep="best", eval_size=0), "--keep best: --eval_size 0 leaves nothing to choose by"),
    ],
)
def test_what_cannot_be_kept(flags, said):
    with pytest.raises(data.UserError, match=re.escape(said)):
        og.Config(**flags)


# ---- the same command again


def test_resume_auto_starts_goes_on_and_is_done(config, tmp_path, monkeypatch):
    """One command line, whatever is there: nothing, half a run, a whole one."""
    whole = runs.train(config(steps=4), tmp_path / "whole")
    words = [*runs.flags(config(steps=4, out=str(tmp_path / "run"))), "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(og, "update", runs.at_call(3, og.update, lambda: os.kill(os.getpid(), 15)))
        assert og.main(words) == 130
    for _ in range(2):
        assert og.main(words) == 0
        assert runs.left_by(tmp_path / "run") == runs.left_by(whole)


def test_where_resume_auto_looks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, out in [
        (["--data", "x/avqa.jsonl"], "runs/avqa"),
        (["--cold_start_data", "cota.jsonl"], "runs/cota"),
        (["--demo", "relisten"], "runs/demo"),
        ([], "runs/demo"),
        (["--data", "x.jsonl", "--out", "y"], "y"),
    ]:
        cfg, demo = og.parse_config([*words, "--resume", "auto"])
        assert (cfg.out, cfg.resume) == (out, "") and bool(demo) == (not words or "--demo" in words)


# ---- progress


def test_progress_in_a_file_is_lines(config, tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(og, "PROGRESS_S", 0)
    runs.train(config(steps=3, eval_data=tiny.questions, eval_size=4), tmp_path / "run")
    said = capfd.readouterr().err
    assert "\r" not in said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    pattern = r"step \d of 3: reward \d\.\d{3}(, held_out \d\.\d{3}); \d+\.\d s a step, 0 min left"
    assert len(lines) == 3 and all(re.fullmatch(pattern, line) for line in lines)


def test_progress_is_told_now_and_then(config, tmp_path, capfd):
    runs.train(config(steps=3), tmp_path / "run")
    assert len(re.findall("^step ", capfd.readouterr().err, re.MULTILINE)) == 2  # the first and the last


def test_progress_line():
    line = og.progress_line(40, 100, {"reward": 0.5}, 30.0)
    assert line == "step 40 of 100: reward 0.500; 30.0 s a step, 30 min left"


# ---- early stopping, as the docs have it


def test_the_documented_patience(evaluated, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", DOCS["runs.md"], re.DOTALL)
    monkeypatch.setattr(og, "evaluate_and_log", og.evaluate_and_log)
    exec(block.replace("patience=5", "patience=2"), vars(og))
    scores = iter([0.1, 0.5, 0.2, 0.5, 0.9, 0.9])  # at step 3 none of the last two is better
    monkeypatch.setattr(og, "measure", lambda *args, **more: {"eval/accuracy": next(scores)})
    out, finished = og.train(dataclasses.replace(evaluated, out=str(tmp_path / "run")))
    assert not finished and runs.saved_state(out)["step"] == runs.read(out)[-1]["step"] == 3
