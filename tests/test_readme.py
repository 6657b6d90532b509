"""The README says what the code does: flags, commands, functions and tests that it names exist. So do the mutants' places."""

import dataclasses
import os
import re
import runpy
import shlex

import data
import eval as eval_
import omni_grpo as og
from data import PROMPTS
from reward import REWARDS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
    README = f.read()
FIELDS = {f.name: f for f in dataclasses.fields(og.Config)}


def source(*names):
    return "".join(open(os.path.join(ROOT, n), encoding="utf-8").read() for n in names)


def test_every_flag_is_in_the_readme_and_the_reverse():
    named = set(re.findall(r"--(?:no-)?(\w+)", README)) - {
        "nproc_per_node",
        "deps",
        "demo",
    }  # torchrun's, pip's
    assert set(FIELDS) <= named
    other = set(re.findall(r'"--(\w+)"', source("tests/bench.py", "data.py", "eval.py")))
    other |= set(
        re.findall(r"python tests/bench.py --(\w+)", source("tests/bench.py"))
    )  # its modes, in its docstring
    assert named - set(FIELDS) <= other | {"help"}
    assert all(f.metadata["help"] for f in FIELDS.values())


def test_commands_parse():
    commands = re.findall(r"^    .*?python omni_grpo\.py(.*)$", README, re.MULTILINE)
    commands += re.findall(r"`python omni_grpo\.py(.*?)`", README)
    assert len(commands) >= 4
    for words in map(shlex.split, commands):
        if "--help" not in words and "--resume" not in words:
            og.parse_config(words)
    for module in (data, eval_):
        commands = re.findall(rf"^    python {module.__name__}\.py(.*)$", README, re.MULTILINE)
        assert len(commands) >= 3
        for words in map(shlex.split, commands):
            module.parse_args(words)


def test_options_named_are_real():
    for flag, options in re.findall(r"`--(\w+) (\w+(?:\\\|\w+)+)`", README):
        allowed = set(FIELDS[flag].metadata["choices"] or PROMPTS)
        assert set(options.split("\\|")) == allowed, flag
    for name in REWARDS:
        assert f"`{name}`" in README or f"{name}=" in README


def test_functions_and_tests_named_exist():
    code = source("omni_grpo.py", "data.py", "reward.py", "eval.py")
    tests = source(*(f"tests/{n}" for n in os.listdir(os.path.join(ROOT, "tests")) if n.endswith(".py")))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for name in ("group_advantages", "importance_ratio", "policy_loss", "loss_weights", "kl_k3", "make_pack"):
        assert f"`{name}`" in README and f"def {name}(" in code


def test_every_config_default_is_valid_and_parses_back():
    cfg, demo = og.parse_config(["--data", "x.jsonl"])
    assert not demo and cfg == og.Config(data="x.jsonl")
    assert og.parse_config([])[1]
    assert og.parse_config(["--data", "x", "--no-shuffle_choices"])[0].shuffle_choices is False


def test_log_keys_in_the_readme():
    written = set(
        re.findall(
            r'"((?:policy|group|len|optim|time|mem|audio|reward|eval|relisten)/\w+)"', source("omni_grpo.py")
        )
    )
    missing = {k for k in written if f"`{k}`" not in README} - {
        "policy/logp",
        "group/scored",
        "time/eval_s",
        "optim/lr",
    }
    assert not missing


def test_every_mutant_still_finds_its_text():
    """A mutant whose text is gone breaks nothing, and proves nothing."""
    code = source("omni_grpo.py")
    assert not [
        what
        for what, old, *_ in runpy.run_path(os.path.join(ROOT, "tests", "mutants.py"))["MUTANTS"]
        if code.count(old) != 1
    ]
