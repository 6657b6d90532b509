"""README.md beside an adapter: what it was trained from, on what, with which command, and how well it does.

A run writes it at every checkpoint and at its end, and export.py takes it along.
"""

import json
import os
import shlex

import eval as evaluation
from model import split_revision
from omni_grpo import Config

CARD = """---
{hub_id}library_name: peft
pipeline_tag: audio-text-to-text
---

# {name}

A LoRA adapter for `{model}`, trained by GRPO with omni-grpo:

    {command}

| | |
|---|---|
{rows}

The licence is left open: base and data have theirs.
"""
MEASURED = {
    "eval/accuracy": "greedy",
    "eval/accuracy_sampled": "sampled",
    "eval/accuracy_silence": "greedy, silence played",
    "eval/accuracy_once": "greedy, no re-listening",
}


def card(run: str) -> str:
    with open(f"{run}/config.json", encoding="utf-8") as f:
        about = json.load(f)
    cfg, model = Config(**about["config"]), about["config"]["model"]
    rows = {"base": f"`{model}`"}
    for flag, file in about["data"].items():
        path = os.path.basename(getattr(cfg, flag))
        rows[flag] = f"`{path}`, {file['questions']} questions, hash {file['hash']}"
    libraries = f"torch {about['torch']}, transformers {about['transformers']}, {about['hardware']}"
    rows["code"] = f"commit {about['commit'] or 'unknown'}, {libraries}"
    rows |= measured_rows(run, about.get("held_out", 0))
    return CARD.format(
        hub_id="" if os.path.isdir(model) else f"base_model: {split_revision(model)[0]}\n",
        name=os.path.basename(os.path.abspath(run)),
        model=model,
        command=command_of(cfg),
        rows="\n".join(f"| {name} | {text} |" for name, text in rows.items()),
    )


def command_of(cfg: Config) -> str:
    """The flags that are not the defaults."""
    words = ["python omni_grpo.py"]
    for name, value in vars(cfg).items():
        if value == getattr(Config, name) or name in ("out", "resume"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join(words)


def measured_rows(run: str, n: int) -> dict[str, str]:
    """The last evaluation of the log, with 95 % intervals, and the one before the first step."""
    log = []
    if os.path.exists(f"{run}/log.jsonl"):
        with open(f"{run}/log.jsonl", encoding="utf-8") as f:
            log = [record for record in map(json.loads, f) if "eval/accuracy" in record]
    if not log:
        return {"held-out accuracy": "not measured"}
    rows = {}
    for key, name in MEASURED.items():
        if key in log[-1]:
            share, before = log[-1][key], log[0].get(key)
            text = f"{share:.3f}"
            if n:
                text += " ({:.3f} to {:.3f})".format(*evaluation.wilson(share, n))
            if before is not None and log[0] is not log[-1]:
                text += f"; before training {before:.3f}"
            rows[f"held-out accuracy, {name}"] = text
    step = {"measured": f"{n} questions, after step {log[-1]['step']}; 95 % intervals (Wilson)"}
    return rows | step
