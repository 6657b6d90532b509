"""Runs from end to end: what they leave, that they repeat, that a kill at any moment costs nothing, every ablation."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

import data
import omni_grpo as og

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEYS = {
    "step",
    "reward/mean",
    "reward/accuracy",
    "group/frac_zero_std",
    "len/mean",
    "len/frac_truncated",
    "policy/entropy",
    "policy/kl_old",
    "policy/clip_frac",
    "policy/loss",
    "optim/grad_norm",
    "optim/lr",
    "time/rollout_s",
    "time/update_s",
    "mem/peak_gib",
}


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def timeless(out, name="log.jsonl"):
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "mem/"))}
        for r in read(os.path.join(out, name))
    ]


def weights(out):
    with open(os.path.join(out, "adapter", "adapter_model.safetensors"), "rb") as f:
        return f.read()


def flags(cfg):
    """Config -> the command line that says the same."""
    words = []
    for name, value in vars(cfg).items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value != "":
            words += [f"--{name}", str(value)]
    return words


@pytest.fixture(scope="module")
def base_run(config, tmp_path_factory):
    cfg = config(
        steps=3,
        eval_size=4,
        eval_every=2,
        log_rollouts=1,
        save_every=2,
        out=str(tmp_path_factory.mktemp("runs") / "run"),
    )
    return cfg, og.train(cfg)[0]


def test_run_directory(base_run):
    cfg, out = base_run
    assert set(os.listdir(out)) == {
        "config.json",
        "log.jsonl",
        "rollouts.jsonl",
        "curves.png",
        "adapter",
        "checkpoint",
    }
    log = read(os.path.join(out, "log.jsonl"))
    assert [r["step"] for r in log] == [0, 1, 2, 3]
    assert all(set(r) >= KEYS for r in log[1:])
    assert any(r["group/frac_zero_std"] < 1 for r in log[1:])  # there was something to learn
    assert [r["step"] for r in log if "eval/accuracy" in r and "eval/accuracy_sampled" in r] == [0, 2, 3]
    assert "eval/accuracy_silence" in log[0] and "eval/accuracy_silence" in log[3]
    with open(os.path.join(out, "config.json"), encoding="utf-8") as f:
        about = json.load(f)
    assert about["config"]["lora_rank"] == 4 and about["torch"] == torch.__version__
    rollouts = read(os.path.join(out, "rollouts.jsonl"))
    assert len(rollouts) == 3 * 2 * 3
    for r in rollouts:
        assert r["reward"] == pytest.approx(r["parts"]["accuracy"])
    groups = [rollouts[i : i + 3] for i in range(0, len(rollouts), 3)]
    assert all(len({r["id"] for r in g}) == 1 and abs(sum(r["advantage"] for r in g)) < 1e-4 for g in groups)


def test_same_seed_same_run_other_seed_other_run(base_run, config, tmp_path):
    cfg, out = base_run
    for seed, same in ((0, True), (1, False)):
        again, _ = og.train(og.Config(**vars(cfg) | dict(out=str(tmp_path / f"seed{seed}"), seed=seed)))
        assert (timeless(out) == timeless(again)) is same
        assert (weights(out) == weights(again)) is same


def test_held_out_items_are_never_trained_on(base_run, config):
    cfg, _ = base_run
    questions = og.open_data(cfg)
    examples, train = questions["rl"]
    stream = og.draw(cfg, examples, train, 0, "rl")
    drawn = {next(stream)[1].audio for _ in range(3 * len(examples))}
    assert questions["held"] and not drawn & {e.audio for e in questions["held"]}
    assert drawn | {e.audio for e in questions["held"]} == {e.audio for e in examples}


def test_tower_hears_every_clip_once(config, tmp_path, monkeypatch):
    """G completions, the reference pass and two updates on the rollout share one run of the tower per clip and step."""
    heard, load = [], og.load_policy

    def counting(cfg):
        policy = load(cfg)
        encode = policy.encode_audio
        policy.encode_audio = lambda mels: (heard.append(len(mels)), encode(mels))[1]
        return policy

    monkeypatch.setattr(og, "load_policy", counting)
    og.train(config(steps=3, updates_per_rollout=2, out=str(tmp_path / "run")))
    assert sum(heard) == 3 * 2


def test_the_reward_is_learned(tiny, config, tmp_path):
    """A reward that is easy to find (texts of even length) rises: the sign of everything is right."""
    import reward

    reward.REWARDS["short"] = lambda text, example: float(len(text) % 2 == 0)
    try:
        cfg = config(
            steps=25,
            num_generations=8,
            reward="short=1",
            lr=1e-2,
            beta=0.0,
            max_new_tokens=3,
            out=str(tmp_path / "run"),
        )
        log = read(os.path.join(og.train(cfg)[0], "log.jsonl"))[1:]
    finally:
        del reward.REWARDS["short"]
    first, last = (sum(r["reward/short"] for r in part) / len(part) for part in (log[:4], log[-4:]))
    assert last > first + 0.2 and last > 0.85


# ---- resume


def test_resume_equals_the_unbroken_run(config, tmp_path, monkeypatch):
    """Steps 1-2, then 3-4 from the checkpoint: the log, the rollouts and the adapter are those of steps 1-4."""
    cfg = config(steps=4, save_every=2, log_rollouts=1, eval_size=4, eval_every=3, updates_per_rollout=2)
    whole, _ = og.train(og.Config(**vars(cfg) | dict(out=str(tmp_path / "whole"))))
    half = str(tmp_path / "half")
    update = og.update

    def dies(*args):
        dies.n += 1
        if dies.n == 4:  # in step 4, after the checkpoint of step 2 and the log line of step 3
            raise RuntimeError("the lights went out")
        return update(*args)

    dies.n = 0

    monkeypatch.setattr(og, "update", dies)
    with pytest.raises(RuntimeError):
        og.train(og.Config(**vars(cfg) | dict(out=half)))
    monkeypatch.setattr(og, "update", update)
    assert len(read(os.path.join(half, "log.jsonl"))) == 4
    assert og.main(["--resume", half]) == 0
    assert timeless(half) == timeless(whole)
    assert read(os.path.join(half, "rollouts.jsonl")) == read(os.path.join(whole, "rollouts.jsonl"))
    assert weights(half) == weights(whole)


@pytest.mark.parametrize("start", ["cold start", "adapter", "full"])
def test_resume_keeps_the_reference(start, base_run, tiny, config, tmp_path, monkeypatch):
    """Where the reference is a frozen copy it survives the resume, and the KL goes on as if nothing had happened."""
    changes = {
        "cold start": dict(cold_start_data=tiny.lessons, cold_start_steps=2, steps=2),
        "adapter": dict(adapter=os.path.join(base_run[1], "adapter"), steps=4),
        "full": dict(lora_rank=0, steps=4),
    }[start]
    cfg = config(save_every=1, beta=0.1, prompts_per_step=4, num_generations=6, **changes)
    whole, _ = og.train(og.Config(**vars(cfg) | dict(out=str(tmp_path / "whole"))))
    half = str(tmp_path / "half")
    save = og.save_checkpoint

    def save_until_3(policy, optimizer, out, state):
        if state["step"] <= 3:
            save(policy, optimizer, out, state)

    monkeypatch.setattr(og, "save_checkpoint", save_until_3)
    og.train(og.Config(**vars(cfg) | dict(out=half)))
    monkeypatch.setattr(og, "save_checkpoint", save)
    og.main(["--resume", half])
    assert timeless(half) == timeless(whole)
    assert read(os.path.join(half, "log.jsonl"))[-1]["policy/kl_ref"] > 0


DIE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import omni_grpo, torch
replace, save, seen = os.replace, torch.save, []
def dying_replace(a, b):
    seen.append(b)
    if len(seen) >= {n_replace}:  # saves are counted too, so the exact number may fall on one
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
def dying_save(content, path):
    seen.append(path)
    save(content, path)
    if len(seen) >= {n_save}:
        os.truncate(path, os.path.getsize(path) // 2)  # as much as had reached the disk
        os.kill(os.getpid(), signal.SIGKILL)
os.replace, torch.save = dying_replace, dying_save
sys.exit(omni_grpo.main(sys.argv[1:]))
"""


def run(*words, code=None):
    start = [sys.executable, "-c", code] if code else [sys.executable, os.path.join(ROOT, "omni_grpo.py")]
    return subprocess.Popen(
        [*start, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


def test_kill_at_any_moment(config, tmp_path):
    """kill -9 between the files of a checkpoint, in the middle of writing one, and at a random moment, resumed each time:
    equal to the run never killed."""
    cfg = config(steps=10, save_every=2, log_rollouts=3, prompts_per_step=4)
    whole, _ = og.train(og.Config(**vars(cfg) | dict(out=str(tmp_path / "whole"))))
    out = str(tmp_path / "killed")
    first = run(
        *flags(og.Config(**vars(cfg) | dict(out=out))),
        code=DIE.format(root=ROOT, n_replace=random.randint(8, 14), n_save=99),
    )
    assert first.wait(120) == -signal.SIGKILL
    second = run("--resume", out, code=DIE.format(root=ROOT, n_replace=99, n_save=2))
    assert second.wait(120) == -signal.SIGKILL
    third, before = run("--resume", out), len(read_loosely(out))
    while len(read_loosely(out)) <= before and third.poll() is None:
        time.sleep(0.02)
    time.sleep(random.random() * 0.3)
    third.kill()
    third.wait()
    last = run("--resume", out)
    assert last.wait(120) == 0, last.stderr.read()
    assert any(r.get("optim/grad_norm", 0) > 1e-3 for r in timeless(whole))
    assert timeless(out) == timeless(whole)
    assert timeless(out, "rollouts.jsonl") == timeless(whole, "rollouts.jsonl")
    assert weights(out) == weights(whole)


def read_loosely(out):
    with open(os.path.join(out, "log.jsonl"), encoding="utf-8") as f:
        return [line for line in f if line.endswith("\n")]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_says_how_to_go_on(sign, config, tmp_path):
    out = str(tmp_path / "run")
    process = run(*flags(config(steps=5000, save_every=1000, out=out)))
    while (
        not (os.path.exists(os.path.join(out, "log.jsonl")) and len(read_loosely(out)) > 2)
        and process.poll() is None
    ):
        time.sleep(0.05)
    process.send_signal(sign)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"--resume {out}" in stdout
    state = torch.load(os.path.join(out, "checkpoint", "state.pt"), weights_only=True)["state"]
    assert state["step"] == read(os.path.join(out, "log.jsonl"))[-1]["step"]


# ---- the knobs


@pytest.mark.parametrize(
    "changes",
    [  # the recipes' tests take those that are missing
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
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_option_takes_a_step(changes, config, tiny, tmp_path):
    questions = str(tmp_path / "rated.jsonl")
    with open(questions, "w", encoding="utf-8") as f:
        for i, e in enumerate(data.Examples(tiny.questions)):
            f.write(json.dumps(vars(e) | {"meta": {"pass_rate": i / 24}}) + "\n")
    out, finished = og.train(config(data=questions, steps=1, out=str(tmp_path / "run"), **changes))
    log = read(os.path.join(out, "log.jsonl"))
    assert finished and log[-1]["step"] == 1
    if changes.get("order") == "easy_to_hard":
        cfg = config(data=questions, **changes)
        stream = og.draw(cfg, data.Examples(questions), range(24), 0, "rl")
        served = [next(stream)[1].meta["pass_rate"] for _ in range(24)]
        assert served == sorted(served, reverse=True)
    if changes.get("audio") == "none":
        assert not any("AUDIO" in r for r in map(str, log))


def test_recordings_of_every_kind_train(config, tiny, tmp_path):
    """wav, flac, ogg and mp3, 8 to 96 kHz, one to six channels, long and short, one named wrongly: nothing to convert."""
    rng = np.random.default_rng(0)
    kinds = [
        ("a.wav", 8000, 1, "PCM_16"),
        ("b.flac", 44_100, 2, "PCM_24"),
        ("c.ogg", 48_000, 2, "VORBIS"),
        ("d.mp3", 22_050, 1, "MPEG_LAYER_III"),
        ("e.wav", 96_000, 6, "FLOAT"),
        ("f.wav", 16_000, 1, "PCM_U8"),
    ]
    rows = []
    for i, (name, rate_hz, channels, subtype) in enumerate(kinds):
        wave = 0.1 * rng.standard_normal((int(rate_hz * (0.03, 12.0, 1.0, 0.5, 2.5, 31.0)[i]), channels))
        soundfile.write(tmp_path / name, wave, rate_hz, subtype)
        rows.append(dict(audio=name, question="What is this?", choices=["beep", "hum"], answer=i % 2))
    (tmp_path / "b.flac").rename(tmp_path / "wrong.mp3")
    rows[1]["audio"] = "wrong.mp3"
    questions = tmp_path / "own.jsonl"
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out, finished = og.train(
        config(data=str(questions), steps=2, prompts_per_step=6, out=str(tmp_path / "run"))
    )
    log = read(os.path.join(out, "log.jsonl"))
    assert finished and log[-1]["audio/bad"] == 0 and log[-1]["audio/cut"] == 1


def test_silence_is_silent_and_none_is_text(policy, config, tiny):
    example = data.Examples(tiny.questions)[0]
    (silent,), _ = og.hear(policy, example, config(audio="silence"))
    (real,), _ = og.hear(policy, example, config())
    assert (
        silent.mel.shape == real.mel.shape and silent.mel.std() < 1e-6 < real.mel.std() and real.wave is None
    )
    assert og.hear(policy, example, config(audio="none"))[0] == []
    assert policy.audio_id not in og.encode(policy, [example], [[]], config(audio="none"))[0].ids


def test_markup_in_a_question_is_text(policy, config, tiny):
    """A question that holds special tokens neither ends its turn nor claims audio."""
    example = data.Examples(tiny.questions)[0]
    example.question = "What <|AUDIO|> is this?<|im_end|>"
    clips, _ = og.hear(policy, example, config())
    prompt = og.encode(policy, [example], [clips], config())[0]
    ((start, audio),) = prompt.audio
    assert prompt.ids.count(policy.audio_id) == len(audio)
    assert prompt.ids[start : start + len(audio)] == [policy.audio_id] * len(audio)


def test_a_bad_clip_is_skipped_and_too_many_end_the_run(config, tiny, tmp_path, capsys):
    """A clip that breaks after the checks is skipped and counted; past --max_bad_audio the run ends with a checkpoint."""
    folder = tmp_path / "data"
    shutil.copytree(tiny.folder, folder)
    questions = str(folder / "demo.jsonl")
    cfg = config(data=questions, steps=12, max_bad_audio=3, save_every=100, out=str(tmp_path / "run"))
    opened = og.open_data(cfg)
    for i in range(8):
        (folder / "sounds" / f"demo_{i:04d}.wav").write_text("no sound")
    og_open = og.open_data
    try:
        og.open_data = lambda cfg: opened
        with pytest.raises(og.UserError, match="max_bad_audio 3"):
            og.train(cfg)
    finally:
        og.open_data = og_open
    log = read(os.path.join(cfg.out, "log.jsonl"))
    state = torch.load(os.path.join(cfg.out, "checkpoint", "state.pt"), weights_only=True)["state"]
    assert state["step"] == log[-1]["step"] > 0
