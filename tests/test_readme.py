"""README and docs say what the code does: flags, commands, functions, tests and numbers that they name exist."""

import dataclasses
import importlib
import os
import re
import runpy
import shlex

import torch

import data
import omni_grpo as og
from reward import REWARDS
from texts import ALL, DOCS, README, ROOT, read

FIELDS = {f.name: f for f in dataclasses.fields(og.Config)}
SCRIPTS = ["omni_grpo.py", "model.py", "data.py", "reward.py", "eval.py"]
TOOLS = [f"tools/{name}" for name in os.listdir(os.path.join(ROOT, "tools")) if name.endswith(".py")]
CODE = "".join(map(read, SCRIPTS + TOOLS))
TESTS = "".join(
    read(f"tests/{name}") for name in os.listdir(os.path.join(ROOT, "tests")) if name.endswith(".py")
)
TOOL_COMMANDS = ("generate", "events", "behaviours", "pages", "plots", "export", "trackers")
OTHERS = set(
    "nproc_per_node no-deps generation-config requeue open-mode signal enable-lora max-lora-rank lora-modules".split()
)
OTHERS |= set("extra extra-index-url no-python rm gpus user".split())  # of pip, uv, torchrun, docker


def test_the_readme_is_short():
    assert len(README.encode()) <= 16_000


def test_every_flag_named_exists():
    named = {flag.removeprefix("no-") for flag in re.findall(r"--([a-z][\w-]*)", ALL) if flag not in OTHERS}
    known = set(re.findall(r'"--(\w+)"', CODE + read("tests/bench.py") + read("tests/claims.py"))) | {"help"}
    known |= set(re.findall(r"^    (\w+): (?:\w+|.*) = knob\(", CODE, re.MULTILINE))
    assert named <= known | set(re.findall(r"bench\.py --(\w+)", read("tests/bench.py"))), named - known


def test_every_ablation_is_in_the_readme():
    block = read("omni_grpo.py").partition("# ablations:")[2].partition("# optimisation")[0]
    ablations = re.findall(r"^    (\w+): \w+ = knob\(", block, re.MULTILINE)
    assert len(ablations) >= 10
    for name in ablations:
        for page in (README.partition("\n## Ablations")[2].partition("\n## ")[0], DOCS["ablations.md"]):
            assert f"`--{name}" in page or f" --{name}" in page, name
    for flag, options in re.findall(r"`--(\w+) (\w+(?:\\\|\w+)+)`", DOCS["ablations.md"]):
        assert set(options.split("\\|")) == set(FIELDS[flag].metadata["choices"]), flag
    assert all(f"`{name}`" in ALL or f"{name}=" in ALL for name in REWARDS)
    assert all(f.metadata["help"] for f in FIELDS.values())


def commands(start: str) -> list[list[str]]:
    found = re.findall(rf"^    (?:.*&& )?{start}(.*)$", ALL, re.MULTILINE)
    found += re.findall(rf"`{start}(.*?)`", ALL)
    return [shlex.split(words) for words in found]


def test_commands_parse():
    trainer = commands(r"python omni_grpo\.py")
    assert len(trainer) > 15
    for words in trainer:
        if "--help" not in words and "--resume" not in words:
            og.parse_config(words)


def test_other_commands_parse(tmp_path, monkeypatch, capsys):
    """Run in an empty folder they miss a file, a model or a key, and never stumble over a flag."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for start, name, least in [
        (r"python data\.py", "data", 4),
        (r"python eval\.py", "eval", 5),
        *((rf"python -m tools\.{name}", f"tools.{name}", 0) for name in TOOL_COMMANDS),
    ]:
        found = [words for words in commands(start) if len(words) > 1 and "..." not in words]
        assert len(found) >= least
        for words in found:
            command = importlib.import_module(name).main
            assert data.exit_code(lambda command=command, words=words: command(words)) == 2, words
            assert "--help lists the flags" not in capsys.readouterr().err, words


def test_tools_named_are_there():
    named = set(re.findall(r"python -m tools\.(\w+)", ALL))
    assert named >= {"generate", "events", "behaviours", "pages", "fits"}
    for name in named:
        assert f"tools/{name}.py" in TOOLS and 'if __name__ == "__main__":' in read(f"tools/{name}.py")


def test_functions_and_tests_named_exist():
    for name in re.findall(r"`(test_\w+)`", ALL):
        assert f"def {name}(" in TESTS, name
    step = README.partition("\n## The step")[2].partition("\n## ")[0]
    for name in re.findall(r"`([a-z_0-9]+)`", step):
        if not name.startswith("test_") and name not in FIELDS["reduce"].metadata["choices"]:
            assert f"def {name}(" in CODE, name
    for name in re.findall(r"`(tests/\w+\.py)", ALL):
        assert os.path.exists(os.path.join(ROOT, name))
    for page, text in [("README.md", README), *((f"docs/{name}", text) for name, text in DOCS.items())]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), link)), (page, link)


def test_the_worked_group():
    """The README's group of four: advantages, weights and losses, computed."""
    section = README.partition("One group in numbers")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    lengths, rewards = (torch.tensor([float(row[i]) for row in rows]) for i in (1, 2))
    adv = og.group_advantages(rewards[None])[0]
    assert [f"{a:.4f}" for a in adv.tolist()] == [row[3] for row in rows]
    for i, reduce in enumerate(("sequence", "token", "constant")):
        weights = og.loss_weights(lengths, reduce, 32)
        assert [f"{w:.4f}" for w in weights.tolist()] == [row[4 + i] for row in rows]
    row = torch.repeat_interleave(torch.arange(4), lengths.long())
    weight, zeros = og.loss_weights(lengths, "sequence", 32)[row], torch.zeros(len(row))
    ratio = torch.where(row == 0, 1.3, 1.0).requires_grad_()
    cfg = og.Config(beta=0.0)
    first, _ = og.grpo_loss(zeros, zeros, None, adv[row], weight, row, cfg)
    second, _ = og.grpo_loss(ratio.log(), zeros, None, adv[row], weight, row, cfg)
    (gradient,) = torch.autograd.grad(second, ratio)
    assert (gradient[row == 0] == 0).all() and (gradient[row == 1] != 0).all()
    k3 = og.kl_k3(zeros, zeros - 0.1)
    said = re.findall(r"-?\d\.\d{4}", section.partition("The policy that is updated")[2])
    values = [first.item() + 0.0, second.item(), k3[0].item(), 0.04 * (weight * k3).sum().item()]
    assert said == [f"{abs(values[0]):.4f}"] + [f"{x:.4f}" for x in values[1:]]


def test_every_config_default_is_valid_and_parses_back():
    cfg, demo = og.parse_config(["--data", "x.jsonl"])
    assert not demo and cfg == og.Config(data="x.jsonl")
    assert og.parse_config([])[1]
    assert og.parse_config(["--data", "x", "--no-shuffle_choices"])[0].shuffle_choices is False


def test_log_keys_are_explained():
    keys = r'"((?:policy|group|len|optim|time|mem|audio|reward|eval|relisten)/\w+)"'
    written = set(re.findall(keys, read("omni_grpo.py")))
    untold = {"policy/logp", "group/scored", "time/eval_s", "optim/lr"}
    assert len(written) > 20
    assert not {key for key in written - untold if f"`{key}`" not in ALL}


def test_every_mutant_still_finds_its_text():
    """A mutant whose text is gone breaks nothing, and proves nothing."""
    mutants = runpy.run_path(os.path.join(ROOT, "tests", "mutants.py"))
    scripts = mutants["read_scripts"]()
    lost = [what for what, old, *_ in mutants["MUTANTS"] if len(mutants["places_of"](old, scripts)) != 1]
    assert not lost
    assert f"breaks the scripts in {len(mutants['MUTANTS'])} ways" in README
