"""Runs from end to end: what they leave, that they repeat, that a kill at any moment costs nothing, every
ablation."""

import collections
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile
import torch

import data
import omni_grpo as og
import reward
import runs
import texts
from conftest import draw_curves
from test_data import cells
from tools import plots

KEYS = """
    step reward/mean reward/accuracy group/frac_zero_std len/mean len/frac_truncated optim/grad_norm optim/lr
    policy/entropy policy/loss policy/kl_old policy/clip_frac time/rollout_s time/update_s mem/peak_gib
""".split()


@pytest.fixture
def often(monkeypatch):
    """Rollouts are logged at every step."""
    monkeypatch.setattr(og, "LOG_ROLLOUTS", 1)


@pytest.fixture(scope="module")
def base_run(config, tiny, tmp_path_factory):
    # held-out questions from a file: those that are split off depend on the clips' paths, which pytest
    # numbers
    held_out = dict(eval_data=tiny.questions, eval_size=4, eval_every=2)
    cfg = config(steps=3, save_every=2, prompts_per_step=4, num_generations=4, **held_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(og, "LOG_ROLLOUTS", 1)
        patch.setattr(plots, "draw_curves", draw_curves)
        return cfg, runs.train(cfg, tmp_path_factory.mktemp("runs") / "run")


def test_run_directory(base_run):
    cfg, out = base_run
    files = {"config.json", "log.jsonl", "rollouts.jsonl", "curves.png", "adapter", "checkpoint"}
    assert set(os.listdir(out)) == files
    log = runs.read(out)
    assert [r["step"] for r in log] == [0, 1, 2, 3]
    assert all(r.keys() >= set(KEYS) for r in log[1:])
    assert any(r["optim/grad_norm"] > 1e-3 for r in log[1:])  # there was something to learn
    evaluated = dict(accuracy=[0, 2, 3], accuracy_sampled=[0, 2, 3], accuracy_silence=[0, 3])
    for name, steps in evaluated.items():
        assert [r["step"] for r in log if f"eval/{name}" in r] == steps
    about = json.loads(texts.read(os.path.join(out, "config.json")))
    assert about["config"] == vars(dataclasses.replace(cfg, out=out)) and about["torch"] == torch.__version__
    groups = collections.defaultdict(list)
    for r in runs.read(out, "rollouts.jsonl"):
        assert r["reward"] == r["parts"]["accuracy"]
        groups[r["step"], r["id"]].append(r["advantage"])
    assert [len(group) for group in groups.values()] == [4] * 12
    assert all(abs(sum(group)) < 1e-4 for group in groups.values())


def test_same_seed_same_run_other_seed_other_run(base_run, tmp_path, often):
    cfg, out = base_run
    same, other = (runs.train(dataclasses.replace(cfg, seed=seed), tmp_path / f"{seed}") for seed in (0, 1))
    assert runs.left_by(same) == runs.left_by(out)
    assert all(a != b for a, b in zip(runs.left_by(other), runs.left_by(out)))


def test_samples_depend_on_the_seed_and_on_the_place_in_the_data(policy, config, tiny):
    """The same question again: the same seed at the same place samples the same, anything else something
    else."""
    example = data.Examples(tiny.questions)[0]
    clips, _ = og.load_clips_of(policy, config(), example)

    def said(seed, cursor):
        cfg, drawn = config(seed=seed, temperature=3.0), og.Drawn(cursor, example, clips, False)
        (group,) = og.sample_groups(policy, cfg, [drawn], {"accuracy": 1.0})
        return [c.ids for c in group.completions]

    assert said(0, 0) == said(0, 0)
    assert said(1, 0) != said(0, 0) != said(0, 1)


def test_held_out_items_are_never_trained_on(config):
    """Questions split off the data: no clip of theirs is ever drawn, and all others are."""
    cfg = config(eval_size=4)
    questions = og.open_data(cfg)
    examples, train = questions.rl
    stream = og.draw(cfg, examples, train, 0, "rl")
    drawn = {next(stream)[1].audio for _ in range(3 * len(examples))}
    held = {e.audio for e in questions.held}
    assert held and not drawn & held and drawn | held == {e.audio for e in examples}


def test_tower_hears_every_clip_once(config, tmp_path, monkeypatch):
    """G completions, the reference pass and two updates on the rollout share one run of the tower per clip
    and step."""
    heard, load = [], og.load_run_policy

    def counting(cfg):
        policy = load(cfg)
        encode = policy.encode_audio
        policy.encode_audio = lambda mels: (heard.append(len(mels)), encode(mels))[1]
        return policy

    monkeypatch.setattr(og, "load_run_policy", counting)
    runs.train(config(steps=3, updates_per_rollout=2), tmp_path / "run")
    assert heard == [2, 2, 2]


def test_the_reward_is_learned(config, tmp_path, monkeypatch):
    """A reward that is easy to find (texts of even length) rises: the sign of everything is right."""
    monkeypatch.setitem(reward.REWARDS, "even", lambda said, example: float(len(said.text) % 2 == 0))
    easy = dict(steps=25, num_generations=8, lr=1e-2, beta=0.0, max_new_tokens=3)
    log = runs.read(runs.train(config(reward="even=1", **easy), tmp_path / "run"))[1:]
    first, last = (sum(r["reward/even"] for r in part) / len(part) for part in (log[:4], log[-4:]))
    assert last > first + 0.2 and last > 0.85


# ---- resume


@pytest.mark.parametrize("start", ["base", "cold start", "adapter", "full"])
def test_resume_equals_the_unbroken_run(start, base_run, tiny, config, tmp_path, monkeypatch, often):
    """From the checkpoint, after a kill that had logged step 3: the log, the rollouts and the adapter are those
    of the run that was never stopped. Where the reference is a frozen copy it survives, and so does the KL."""
    held_out = dict(eval_data=tiny.questions, eval_size=4, eval_every=3)
    changes = {
        "base": dict(save_every=2, steps=4, updates_per_rollout=2, **held_out),
        "cold start": dict(cold_start_data=tiny.lessons, cold_start_steps=2, steps=2),
        "adapter": dict(adapter=os.path.join(base_run[1], "adapter"), steps=4),
        "full": dict(lora_rank=0, steps=4),
    }[start]
    cfg = config(**dict(save_every=1, beta=0.1, prompts_per_step=4, num_generations=6) | changes)
    whole, half = runs.train(cfg, tmp_path / "whole"), str(tmp_path / "half")
    runs.die_in_step(4, cfg, half, monkeypatch)
    assert runs.saved_state(half)["step"] == 4 - cfg.save_every
    assert og.main(["--resume", half]) == 0
    assert runs.left_by(half) == runs.left_by(whole)
    assert runs.read(half)[-1]["policy/kl_ref"] > 0


def test_a_finished_run_goes_on_with_more_steps(base_run, tmp_path, often):
    """Flags beside --resume stand before the run's own: with --steps 5 it is the run that was asked for 5."""
    cfg, out = base_run
    longer = str(tmp_path / "longer")
    shutil.copytree(out, longer)
    assert og.main(["--resume", longer, "--steps", "5"]) == 0
    (log, rollouts, weights), before = runs.left_by(longer), runs.left_by(out)
    assert log[:4] == before[0] and [r["step"] for r in log] == [0, 1, 2, 3, 4, 5]
    assert rollouts[: len(before[1])] == before[1] and weights != before[2]


def die_writing(n_replace=None, n_save=None):
    """Of kill -9, before the n-th file is put into place, or when half of the n-th save has reached the disk; or
    not at all."""
    og.LOG_ROLLOUTS = 3
    replace, save, seen = os.replace, torch.save, []

    def dying_replace(a, b):
        seen.append(b)
        if n_replace and len(seen) >= n_replace:  # saves are counted too, so the exact number may fall on one
            runs.kill()
        replace(a, b)

    def dying_save(content, path):
        seen.append(path)
        save(content, path)
        if n_save and len(seen) >= n_save:
            os.truncate(path, os.path.getsize(path) // 2)
            runs.kill()

    os.replace, torch.save = dying_replace, dying_save


def test_kill_at_any_moment(config, tmp_path, monkeypatch):
    """kill -9 between the files of a checkpoint, in the middle of writing one, and at a random moment,
    resumed each time: equal to the run never killed."""
    cfg, out = config(steps=10, save_every=2, prompts_per_step=4), str(tmp_path / "killed")
    monkeypatch.setattr(og, "LOG_ROLLOUTS", 3)
    whole = runs.train(cfg, tmp_path / "whole")
    words, again = runs.flags(dataclasses.replace(cfg, out=out)), ["--resume", out]
    n = random.randint(8, 14)
    runs.finish(runs.fork_trainer(words, functools.partial(die_writing, n_replace=n)), -signal.SIGKILL)
    runs.finish(runs.fork_trainer(again, functools.partial(die_writing, n_save=2)), -signal.SIGKILL)
    third, before = runs.fork_trainer(again, die_writing), len(runs.whole_lines(out))
    while len(runs.whole_lines(out)) <= before and third.is_alive():
        time.sleep(0.02)
    time.sleep(random.random() * 0.3)
    third.kill()
    third.join()
    runs.finish(runs.fork_trainer(again, die_writing))
    assert any(r.get("optim/grad_norm", 0) > 1e-3 for r in runs.read(whole))
    assert runs.left_by(out) == runs.left_by(whole)
    assert not [name for _, _, names in os.walk(out) for name in names if name.endswith(".part")]


def test_ctrl_c_saves_and_says_how_to_go_on(config, tmp_path):
    """Of the script, as a shell sends it."""
    out = str(tmp_path / "run")
    process = runs.start(runs.flags(config(steps=5000, save_every=1000, out=out)))
    while len(runs.whole_lines(out)) <= 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 130 and f"--resume {out}" in stdout and "Traceback" not in stderr
    assert runs.saved_state(out)["step"] == runs.read(out)[-1]["step"] > 0


# ---- the knobs

OPTIONS = [  # the recipes' tests take those that are missing
    dict(scale="none"),
    dict(reduce="constant"),
    dict(importance="sequence"),
    dict(updates_per_rollout=2),
    dict(audio="none"),
    dict(shuffle_choices=False),
    dict(order="easy_to_hard"),
    dict(lora_rank=0),
    dict(optimizer="adamw"),
    dict(gradient_checkpointing=False),
    dict(rollout_rows=1, pack_tokens=1),
    dict(lr_schedule="linear"),
]


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()))
def test_every_option_takes_a_step(changes, config, tiny, tmp_path):
    questions, rows = tmp_path / "rated.jsonl", []
    as_written = list(data.Examples(tiny.questions))
    for i, e in enumerate(as_written):
        rows.append(json.dumps(vars(e) | {"meta": {"pass_rate": i / 24}}) + "\n")
    questions.write_text("".join(rows))
    cfg = config(data=str(questions), steps=1, **changes)
    log = runs.read(runs.train(cfg, tmp_path / "run"))
    assert [r["step"] for r in log] == [0, 1]
    stream = og.draw(cfg, data.Examples(cfg.data), range(24), 0, "rl")
    served = [next(stream)[1] for _ in range(24)]
    rates = [e.meta["pass_rate"] for e in served]
    assert (rates == sorted(rates, reverse=True)) is (cfg.order == "easy_to_hard")
    choices = [as_written[round(24 * rate)].choices for rate in rates]
    assert (choices == [e.choices for e in served]) is not cfg.shuffle_choices


RECORDINGS = """
a.wav | 8000 | 1 | PCM_16 | 0.03
b.flac | 44100 | 2 | PCM_24 | 12
c.ogg | 48000 | 2 | VORBIS | 1
d.mp3 | 22050 | 1 | MPEG_LAYER_III | 0.5
e.wav | 96000 | 6 | FLOAT | 2.5
f.wav | 16000 | 1 | PCM_U8 | 31
"""


def test_recordings_of_every_kind_train(config, tmp_path):
    """wav, flac, ogg and mp3, 8 to 96 kHz, one to six channels, long and short, one named wrongly: nothing to
    convert."""
    rng, rows = np.random.default_rng(0), []
    for i, (name, rate_hz, channels, subtype, seconds) in enumerate(cells(RECORDINGS)):
        wave = 0.1 * rng.standard_normal((int(int(rate_hz) * float(seconds)), int(channels)))
        soundfile.write(tmp_path / name, wave, int(rate_hz), subtype)
        rows.append(dict(audio=name, question="What is this?", choices=["beep", "hum"], answer=i % 2))
    (tmp_path / "b.flac").rename(tmp_path / "wrong.mp3")
    rows[1]["audio"] = "wrong.mp3"
    questions = tmp_path / "own.jsonl"
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    log = runs.read(runs.train(config(data=str(questions), steps=1, prompts_per_step=6), tmp_path / "run"))
    assert [(r["audio/bad"], r["audio/cut"]) for r in log[1:]] == [(0, 1)]


def test_silence_is_silent_and_none_is_text(policy, config, tiny):
    example, cfg = data.Examples(tiny.questions)[0], config(audio="none")
    (silent,), _ = og.load_clips_of(policy, config(audio="silence"), example)
    (real,), _ = og.load_clips_of(policy, config(), example)
    assert silent.mel.shape == real.mel.shape and silent.mel.std() < 1e-6 < real.mel.std()
    assert real.samples is None  # kept only where parts may be heard again
    assert og.load_clips_of(policy, cfg, example) == ([], False)
    (prompt,) = og.encode_prompts(policy, cfg, [example], [[]])
    assert not prompt.audio and policy.audio_id not in prompt.ids


def test_markup_in_a_question_is_text(policy, config, tiny):
    """A question that holds special tokens neither ends its turn nor claims audio."""
    example = data.Examples(tiny.questions)[0]
    clips, _ = og.load_clips_of(policy, config(), example)
    example.question = "What <|AUDIO|> is this?<|im_end|>"
    (prompt,) = og.encode_prompts(policy, config(), [example], [clips])
    ((start, audio),) = prompt.audio
    assert prompt.ids.count(policy.audio_id) == len(audio)
    assert prompt.ids[start : start + len(audio)] == [policy.audio_id] * len(audio)


def test_a_bad_clip_is_skipped_and_too_many_end_the_run(config, tiny, tmp_path, monkeypatch):
    """A clip that breaks after the checks is skipped and counted; past MAX_BAD_AUDIO the run ends with a
    checkpoint."""
    folder, out = tmp_path / "data", str(tmp_path / "run")
    shutil.copytree(tiny.folder, folder)
    cfg = config(data=str(folder / "demo.jsonl"), steps=12, save_every=100)
    opened = og.open_data(cfg)
    for i in range(8):
        (folder / "sounds" / f"demo_{i:04d}.wav").write_text("no sound")
    monkeypatch.setattr(og, "open_data", lambda cfg: opened)
    monkeypatch.setattr(og, "MAX_BAD_AUDIO", 3)
    with pytest.raises(data.UserError, match="4 clips could not be heard"):
        runs.train(cfg, out)
    log = runs.read(out)
    assert runs.saved_state(out)["step"] == log[-1]["step"] > 0
    assert 0 < log[-1]["audio/bad"] <= 3
