"""Trouble: signals, full disks, damaged checkpoints, other data on --resume, two runs at once, bad clips, numbers that
are not finite. Nothing is silent, nothing is lost, and no traceback is shown."""

import dataclasses
import functools
import json
import os
import re
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import model
import omni_grpo as og
import reward
import runs
from test_data import cells
from texts import write_lines


@pytest.fixture
def said(command):
    """The trainer's command line -> (exit code, all that it said)."""
    return functools.partial(command, og.main)


@pytest.fixture
def run(config, said, tmp_path):
    """run(changes) -> (exit code, what was said) of the command line of a run of four steps in tmp_path/run."""

    def run(**changes):
        cfg = config(**dict(steps=4, save_every=2, out=str(tmp_path / "run")) | changes)
        return said(*runs.flags(cfg))

    return run


@pytest.fixture(scope="module")
def finished_once(config, tmp_path_factory):
    return runs.train(config(steps=4, save_every=2), tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def finished(finished_once, tmp_path):
    """The directory of a run of four steps, tmp_path/run, for this test alone."""
    return shutil.copytree(finished_once, tmp_path / "run")


# ---- signals


@pytest.fixture(scope="module")
def evaluated(config, tiny, tmp_path_factory):
    """A run with evaluations -> (its Config, its directory)"""
    cfg = config(steps=3, save_every=2, eval_every=2, eval_data=tiny.questions, eval_size=4, rollout_rows=8)
    return cfg, runs.train(cfg, tmp_path_factory.mktemp("evaluated") / "run")


@pytest.mark.parametrize(
    "when, sign",
    [
        (("update", 2), signal.SIGTERM),
        (("evaluate", 1), signal.SIGTERM),
        (("evaluate", 3), signal.SIGHUP),
        (("evaluate", 5), signal.SIGTERM),  # the last control
    ],
)
def test_a_signal_loses_nothing(evaluated, said, tmp_path, monkeypatch, when, sign):
    """Exit code 130, soon; --resume then leaves what the unbroken run leaves, evaluations included."""
    cfg, whole = evaluated
    name, n = when
    watched = runs.at_call(n, getattr(og, name), lambda: os.kill(os.getpid(), sign))
    with monkeypatch.context() as patch:
        patch.setattr(og, name, watched)
        code, text = said(*runs.flags(dataclasses.replace(cfg, out=str(tmp_path / "run"))))
    assert code == 130 and f"go on with: python omni_grpo.py --resume {tmp_path}/run" in text
    assert len(watched.calls) == n
    code, _ = said("--resume", tmp_path / "run")
    assert code == 0 and runs.left_by(tmp_path / "run") == runs.left_by(whole)


def test_a_step_is_saved_before_it_is_evaluated(evaluated, tmp_path, monkeypatch):
    """Killed during the evaluation, the step need not be done again, and its line of the log is not lost."""
    (cfg, whole), out = evaluated, str(tmp_path / "run")
    measure = og.measure

    def dies(*args, **kwargs):
        if os.path.exists(os.path.join(out, "log.jsonl")):
            raise RuntimeError("the lights went out")
        return measure(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(og, "measure", dies)
        og.train(dataclasses.replace(cfg, out=out))
    assert runs.saved_state(out)["step"] == 2 and runs.read(out)[-1]["step"] == 1
    og.train(dataclasses.replace(cfg, out=out, resume=out))
    assert runs.left_by(out) == runs.left_by(whole)


def test_killed_before_the_first_checkpoint(run, tmp_path, monkeypatch, said):
    """The same command starts again; --resume says so; a folder of something else is not written over."""
    with monkeypatch.context() as patch:
        patch.setattr(og.torch, "save", lambda *args: os._exit(9))
        if not (child := os.fork()):
            run()
        os.waitpid(child, 0)
    assert sorted(os.listdir(tmp_path / "run")) == ["adapter", "checkpoint", "config.json"]
    code, text = said("--resume", tmp_path / "run")
    assert code == 2 and "start it by the same command without --resume" in text
    assert run()[0] == 0
    code, text = run()
    assert code == 2 and f"already holds something; go on with it by --resume {tmp_path}/run" in text
    shutil.rmtree(tmp_path / "run")
    os.makedirs(tmp_path / "run" / "model")
    assert run()[0] == 2


# ---- disks and files


def fill_the_disk_in_step_2():
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    og.save_checkpoint = runs.at_call(3, og.save_checkpoint, limit)


def test_a_disk_that_takes_no_more(config, tmp_path):
    """Exit code 1, one line with the last whole checkpoint, and --resume goes on from it."""
    out = str(tmp_path / "run")
    process = runs.fork_trainer(runs.flags(config(steps=4, save_every=1, out=out)), fill_the_disk_in_step_2)
    (line,) = re.findall("^error: .*", runs.finish(process, code=1), re.MULTILINE)
    assert f"error: {out}: could not be written, " in line and "MiB are free" in line
    assert "(step 2, lr 0.0002; the last whole checkpoint is of step 1)" in line
    assert runs.saved_state(out)["step"] == 1
    og.train(og.resume_config(dict(resume=out)))
    assert runs.saved_state(out)["step"] == 4


def test_a_directory_that_vanishes(run, tmp_path, monkeypatch):
    update = og.update

    def gone(*args):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return update(*args)

    monkeypatch.setattr(og, "update", gone)
    code, text = run(save_every=1)
    assert (
        code == 1 and f"error: {tmp_path}/run: is gone (step 1, " in text and not (tmp_path / "run").exists()
    )


# ---- resume


def other_shapes(path):
    content = torch.load(path, weights_only=True)
    name = next(iter(content["weights"]))
    content["weights"][name] = content["weights"][name][None]
    torch.save(content, path)


DAMAGE = {
    "is cut short": lambda path: os.truncate(path, path.stat().st_size - 200),
    "is zeros": lambda path: path.write_bytes(b"\0" * 5000),
    "ends in zeros": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 9 + b"\n"),
    "is no JSON": lambda path: path.write_text("{broken}\n"),
    "is a list": lambda path: torch.save([1], path),
    "is a dict": lambda path: torch.save({"a": 1}, path),
    "has other shapes": other_shapes,
    "has other knobs": lambda path: path.write_text(path.read_text().replace('"lora_rank"', '"rank"')),
    "is gone": os.remove,
}
# flags, or what is wrong with a file | the message
CANNOT_GO_ON = """
--data OTHER | 24 questions (hash
--eval_data TRAINED | --eval_data
--eval_size 4 | --eval_size 4: other questions would be held out
--out x | --out x: a run goes on where it is
--seed 1 | --seed 1: cannot be changed on --resume, the run has 0; start another run, with
--prompt think | --prompt think: cannot be changed
--reward accuracy=2 | --reward accuracy=2: cannot be changed
--adapter x | --adapter x: cannot be changed
--model x | --model x: cannot be changed
--lora_rank 8 | --lora_rank 8: cannot be changed on --resume, the run has 4
--optimizer adamw | --optimizer adamw: cannot be changed on --resume, the run has adamw8bit
--audio silence | --audio silence: cannot be changed
checkpoint/state.pt is cut short | checkpoint/state.pt:
checkpoint/state.pt is zeros | checkpoint/state.pt:
checkpoint/state.pt is a dict | checkpoint/state.pt is not a checkpoint of this trainer
checkpoint/state.pt is a list | checkpoint/state.pt is not a checkpoint of this trainer
checkpoint/state.pt has other shapes | its checkpoint is of another model or another --lora_rank
config.json has other knobs | config.json is not of this version
log.jsonl is gone | its log.jsonl is gone
log.jsonl is no JSON | log.jsonl:
log.jsonl ends in zeros | log.jsonl:
"""


def files_of(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, what", cells(CANNOT_GO_ON))
def test_what_cannot_go_on_is_refused(finished, said, tiny, tmp_path, change, what):
    """What would make another run of it, and what is damaged: exit code 2, one line, and the run is left as it
    was."""
    run, flags = tmp_path / "run", []
    if change.startswith("--"):
        rows = [vars(e) | dict(question="What else?") for e in data.Examples(tiny.questions)]
        other = write_lines(tmp_path / "other.jsonl", *rows)
        flags = change.replace("OTHER", other).replace("TRAINED", tiny.questions).split()
    else:
        name, damage = change.split(" ", 1)
        DAMAGE[damage](run / name)
    before = files_of(run)
    code, text = said("--resume", run, *flags, "--steps", 5)
    (line,) = re.findall("^error: .*", text, re.MULTILINE)
    assert code == 2 and what in line and files_of(run) == before


def test_a_run_goes_on_with_moved_data_and_keeps_its_history(finished, said, tiny, tmp_path):
    """What may change is said, and written into config.json."""
    shutil.copytree(tiny.folder, tmp_path / "moved")
    moved = str(tmp_path / "moved" / os.path.basename(tiny.questions))
    code, text = said("--resume", tmp_path / "run", "--data", moved, "--steps", 5, "--lr", 0.01)
    assert code == 0 and "--steps 4 -> 5" in text and "--lr 0.001 -> 0.01" in text
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    (entry,) = about["history"]
    assert entry["step"] == 4 and entry["changed"]["steps"] == [4, 5] and about["config"]["data"] == moved
    assert said("--resume", tmp_path / "run", "--steps", 6)[0] == 0
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["history"]) == 2


# ---- two at once


def test_two_runs_never_share_a_directory(config, tmp_path, monkeypatch):
    """--out or --resume twice: the second is refused. Names of the trainer's own: the second takes the next."""
    out = str(tmp_path / "run")
    runs.train(config(), out)
    with data.claimed(out):
        for cfg in (config(out=out), config(out=out, resume=out, steps=3)):
            with pytest.raises(data.UserError, match="another process is writing it"):
                og.train(cfg)
    monkeypatch.chdir(tmp_path)
    first, _ = og.train(config(steps=0))
    second, _ = og.train(config(steps=0))
    assert (first, second) == ("runs/demo", "runs/demo-2")
    processes = [runs.fork_trainer(runs.flags(config(out=str(tmp_path / "both")))) for _ in range(2)]
    for process in processes:
        process.join(240)
    assert sorted(process.exitcode for process in processes) == [0, 2]


# ---- clips and numbers


def test_a_bad_clip_counts_once(config, tiny, tmp_path, monkeypatch):
    """However often it would be drawn; a run whose clips all vanish ends."""
    monkeypatch.setattr(og, "MAX_BAD_AUDIO", 1)
    folder = shutil.copytree(tiny.folder, tmp_path / "data")
    questions = os.path.join(folder, os.path.basename(tiny.questions))
    examples = data.Examples(questions)
    monkeypatch.setattr(data, "probe_audio", lambda *args: (0, []))
    with open(examples[3].audio, "w") as f:
        f.write("no sound")
    out = runs.train(config(data=questions, steps=20), tmp_path / "run")
    assert runs.read(out)[-1]["audio/bad"] == 1
    monkeypatch.setattr(og, "MAX_BAD_AUDIO", 1000)
    for example in examples:
        with open(example.audio, "w") as f:
            f.write("no sound")
    with pytest.raises(data.AudioError, match="none of its clips can be heard any more"):
        og.train(config(data=questions, out=str(tmp_path / "deaf")))


def test_clips_in_both_files_are_said(config, tiny, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    clips = [example.audio for example in data.Examples(tiny.lessons)[:9]]
    rows = [dict(audio=clip, question="?", choices=["x", "y"], answer=0) for clip in clips]
    write_lines(other, *rows)
    og.open_data(config(eval_data=tiny.questions, eval_size=4))
    assert (
        "warning: 4 of the 4 held-out questions are about a clip that --data has, too"
        in capsys.readouterr().out
    )
    og.open_data(config(eval_data=str(other), eval_size=4))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "value, what", [(float("nan"), "gives nan for question"), (float("inf"), "gives inf for question")]
)
def test_a_reward_that_is_no_number(run, monkeypatch, value, what):
    monkeypatch.setitem(reward.REWARDS, "broken", lambda said, example: value)
    code, text = run(reward="accuracy=1,broken=1")
    assert (
        code == 2
        and f"error: --reward: broken {what}" in text
        and "the last whole checkpoint is of step 0" in text
    )


def test_updates_that_are_all_skipped(run, monkeypatch, tmp_path):
    """A short run ends with an error, too; the log is JSON without NaN."""
    monkeypatch.setattr(
        og, "grpo_loss", lambda logp, *args: (logp.sum() * float("nan"), torch.ones_like(logp))
    )
    code, text = run()
    assert (
        code == 2
        and "all updates of 4 steps were skipped: gradients are not finite (step 4, lr 0.0004;" in text
    )
    text = (tmp_path / "run" / "log.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert lines[-1]["optim/grad_norm"] is None and lines[-1]["optim/skipped"] == 1


def test_a_policy_that_is_not_finite(run, monkeypatch):
    update = og.update

    def too_far(policy, *args):
        record = update(policy, *args)
        next(iter(policy.trainable().values())).data.fill_(float("nan"))
        return record

    monkeypatch.setattr(og, "update", too_far)
    code, text = run()
    assert code == 2 and "the policy's log-probabilities are not finite; in training, a lower --lr" in text
    assert "(step 2, lr 0.0002; the last whole checkpoint is of step 0)" in text


# ---- other people's code and adapters


def test_code_of_a_checkpoint_is_not_run(config, tiny, tmp_path, monkeypatch):
    """Not even if someone answers yes."""
    monkeypatch.setattr(
        "builtins.input", lambda *args: pytest.fail("asked whether to run the checkpoint's code")
    )
    folder, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(tiny.base, folder)
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("configuration_x.py", "modeling_x.py", "tokenization_x.py", "processing_x.py"):
        (folder / name).write_text(code)
    maps = {
        "config.json": {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_x.X", None]},
        "preprocessor_config.json": {"AutoFeatureExtractor": "processing_x.X"},
    }
    for name, auto_map in maps.items():
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | dict(auto_map=auto_map)))
    og.load_run_policy(config(model=str(folder)))
    assert not mark.exists()


@pytest.fixture
def adapter(finished_once, tmp_path):
    return shutil.copytree(os.path.join(finished_once, "adapter"), tmp_path / "trained")


def rewrite(adapter, change):
    path = os.path.join(adapter, "adapter_model.safetensors")
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    "change, what",
    [
        (
            lambda w: {"x." + k: v for k, v in w.items()},
            "none of its 42 tensors is of a language model's layer; the first is x.base_",
        ),
        (
            lambda w: dict(list(w.items())[::2]),
            "0 of its 21 tensors have no place, 21 are missing: base_model.",
        ),
        (lambda w: {}, "none of its 0 tensors"),
        (lambda w: w | {"base_model.model.audio_tower.proj.lora_A.weight": torch.zeros(4, 8)}, "1 of its 43"),
        (
            lambda w: {k: torch.cat([v, v]) if "lora_A" in k else v for k, v in w.items()},
            "21 of its 42 tensors have no place, 0 are missing: base_model.",
        ),
    ],
    ids=["names", "half", "none", "tower", "shapes"],
)
def test_an_adapter_of_another_model_is_refused(config, adapter, change, what):
    rewrite(adapter, change)
    with pytest.raises(data.UserError, match="^--adapter ") as e:
        og.load_run_policy(config(adapter=adapter))
    assert what in str(e.value)


def test_a_list_of_names_does_not_reach_the_tower(config, adapter):
    """As TRL and LLaMA-Factory write target_modules; the log-probabilities are those of the pattern."""
    ours = og.load_run_policy(config(adapter=adapter)).trainable()
    path = os.path.join(adapter, "adapter_config.json")
    with open(path) as f:
        about = json.load(f)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    with open(path, "w") as f:
        json.dump(about | dict(target_modules=names), f)
    policy = og.load_run_policy(config(adapter=adapter))
    theirs = policy.trainable()
    assert theirs.keys() == ours.keys() and not any("audio_tower" in name for name in theirs)
    assert all(torch.equal(theirs[name], x) for name, x in ours.items())
    assert isinstance(policy, model.Policy)


@pytest.mark.parametrize(
    "template, what",
    [
        ("{{ raise_exception('only text') }}", "its chat template: only text"),
        ("{% for m in messages %}", "its chat template: "),
        (
            "{% for m in messages %}{{ m.role }}{% endfor %}",
            "its chat template writes no placeholder for a clip",
        ),
        ("{{ messages[0].content.nothing.at_all }}", "its chat template: "),
    ],
)
def test_chat_templates_that_do_not_work(config, tiny, tmp_path, template, what):
    folder = tmp_path / "base"
    shutil.copytree(tiny.base, folder)
    for name in os.listdir(folder):
        if name.endswith(".jinja"):
            (folder / name).write_text(template)
    with pytest.raises(data.UserError, match="^--model ") as e:
        og.load_run_policy(config(model=str(folder)))
    assert what in str(e.value) and "\n" not in str(e.value)


def test_libraries_that_are_too_old(config, monkeypatch):
    monkeypatch.setitem(model.OLDEST, "torch", "9.9")
    with pytest.raises(data.UserError, match=r"^torch 2\S+ is too old, 9.9 is needed: pip install -r"):
        og.load_run_policy(config())


def test_a_call_from_a_notebook_or_a_thread_leaves_things_as_they_were(config, tmp_path, drawn):
    """The plot backend and the signals belong to the caller."""
    import threading

    import matplotlib

    matplotlib.use("svg")
    handler, done = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(
        target=lambda: done.append(og.train(config(steps=1, out=str(tmp_path / "run"))))
    )
    thread.start()
    thread.join()
    assert done[0][1] and matplotlib.get_backend().lower() == "svg"
    assert signal.getsignal(signal.SIGTERM) is handler


# ---- what a run needs and no longer has


def test_the_reference_is_never_replaced_in_silence(run, said, adapter, tmp_path):
    """Of a run that started from an adapter, the KL is measured to that adapter, or the run does not go on."""
    assert run(adapter=adapter, lr=0.01)[0] == 0
    os.remove(tmp_path / "run" / "reference.pt")
    code, text = said("--resume", tmp_path / "run", "--steps", 5)
    assert code == 2 and "the reference at the start of RL was not kept" in text


def test_an_empty_resume_starts_no_new_run(said, tiny):
    code, text = said("--resume", "", "--data", tiny.questions)
    assert code == 2 and "--resume: name the run" in text


@pytest.mark.parametrize("value", [torch.tensor(1.0), "1"])
def test_rewards_become_numbers(run, monkeypatch, value):
    monkeypatch.setitem(reward.REWARDS, "odd", lambda said, example: value)
    assert run(reward="accuracy=1,odd=1", steps=1)[0] == 0


def close_the_terminal():
    for stream in (1, 2):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, stream)


def close_the_terminal_in_step_2():
    og.update, og.LOG_ROLLOUTS = runs.at_call(2, og.update, close_the_terminal), 1


def test_a_terminal_that_closes_does_not_end_the_run(config, tmp_path):
    out = str(tmp_path / "run")
    runs.fork_trainer(runs.flags(config(steps=4, save_every=2, out=out)), close_the_terminal_in_step_2).join(
        240
    )
    assert runs.saved_state(out)["step"] == 4 and runs.read(out)[-1]["step"] == 4


@pytest.mark.parametrize(
    "content, what",
    [
        ({}, "no adapter_config.json there"),
        ({"adapter/adapter_config.json": "{}"}, "did you mean "),
        ({"adapter_config.json": "{}", "adapter_model.bin": "x"}, "only safetensors are loaded"),
    ],
)
def test_folders_that_are_no_adapter(config, tmp_path, content, what):
    for name, text in content.items():
        path = tmp_path / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(data.UserError, match=what):
        og.load_run_policy(config(adapter=str(tmp_path / "x")))
