"""The README's section "Hack it": every block is run in the module that it is for, and does what it says."""

import json
import os
import re
import runpy
import shutil
import sys

import pytest
import torch

import data
import eval as eval_
import model
import omni_grpo as og
import reward
import runs
from runs import ROOT
from test_families import family_folder  # noqa: F401 - a fixture
from test_house import ORDER
from texts import README, write_lines

BLOCKS = dict(
    zip(
        ("reward", "prompt", "format", "loss", "model", "benchmark"),
        re.findall(
            r"```python\n(.*?)```", README.partition("\n## Hack it")[2].partition("\n## ")[0], re.DOTALL
        ),
    )
)


@pytest.fixture
def hack():
    """Run a block inside its module, which is itself again after the test, with what its tables held."""
    kept = []

    def run(name, module):
        assert 0 < BLOCKS[name].count("\n") < 10
        space = vars(module)
        kept.append((space, space.copy()))
        kept.extend(
            (table, table.copy()) for key, table in space.items() if key.isupper() and isinstance(table, dict)
        )
        exec(BLOCKS[name], space)

    yield run
    for table, content in reversed(kept):
        table.clear()
        table.update(content)


def test_every_block_is_tested():
    section = README.partition("\n## Hack it")[2].partition("\n## ")[0]
    assert len(BLOCKS) == section.count("```python") == 6


def test_reward(hack):
    hack("reward", reward)
    weights = reward.parse_rewards("accuracy=1,brief=0.2")
    example = data.Example("", None, "?", ["a dog", "a cat"], 0)
    assert reward.score(reward.Said("a dog"), example, weights) == (1.2, {"accuracy": 1.0, "brief": 1.0})
    assert reward.score(reward.Said("It is a dog, I think."), example, weights)[1]["brief"] == 0


def test_prompt(hack, config, policy):
    hack("prompt", data)
    cfg = config(prompt="polite", audio="none", max_new_tokens=0)
    assert cfg.new_tokens == 16
    text = policy.tokenizer.decode(
        model.encode_prompt(policy, data.Example("", None, "Why?", ["a", "b"], 0), [], cfg.prompt).ids
    )
    assert "You are polite." in text and "['a', 'b']. Please answer in one word." in text


def test_format(hack, tmp_path):
    hack("format", data)
    path = tmp_path / "quiz.jsonl"
    write_lines(path, dict(sound="/a.wav", ask="Which?", options="dog|cat", right="1", level="hard"))
    examples = data.Examples(str(path))
    assert examples.format == "quiz"
    assert examples[0] == data.Example("1", "/a.wav", "Which?", ["dog", "cat"], 1, meta={"level": "hard"})


def test_loss(hack, config, tmp_path):
    hack("loss", og)
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    ratio = (logp - torch.tensor([-1.0, -2.5, -2.0])).exp()
    loss = og.LOSSES["ppo"](ratio, torch.tensor([1.0, 1.0, -1.0]), torch.ones(3), 0.2, 0.2)
    assert torch.autograd.grad(loss, logp)[0].tolist() == pytest.approx([-1.0, -1.2, 0.8])
    out, finished = og.train(config(steps=1, out=str(tmp_path / "run")))
    assert finished


def test_model(hack, config, family_folder):  # noqa: F811
    hack("model", model)
    policy = og.load_run_policy(config(model=family_folder("qwen3"), audio="none"))
    assert model.read_family(family_folder("qwen3"))[1].model_class == "Qwen3ForCausalLM"
    assert all(name.startswith("base_model.model.model.layers") for name in policy.trainable())


def test_benchmark(hack, tiny, tmp_path, capsys):
    hack("format", data)
    hack("benchmark", eval_)
    path = tmp_path / "quiz.jsonl"
    clip = data.Examples(tiny.questions)[0].audio
    asked = dict(sound=clip, ask="Which?", options="beep|hum")
    write_lines(path, *[asked | dict(right=str(i % 2), level=f"l{i % 2}") for i in range(4)])
    out = str(tmp_path / "out")
    assert eval_.main(["--data", str(path), "--model", tiny.base, "--out", out]) == 0
    shown = capsys.readouterr().out
    with open(os.path.join(out, "report.json"), encoding="utf-8") as f:
        report = json.load(f)
    assert "l0" in shown and "l1" in shown
    assert any("rule" in key or "official" in key for key in report), list(report)


def paste(folder, name, block):
    """Put a block where the README says: above the line that starts the script, or at the end."""
    path = os.path.join(folder, name)
    with open(path, encoding="utf-8") as f:
        above, start, below = f.read().partition('if __name__ == "__main__":')
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{above}\n{BLOCKS[block]}\n\n{start}{below}")


def run_script(folder, words):
    """What `python` does with these words, in a process that has loaded the scripts of this project."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ORDER]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    sys.argv = words
    os.chdir(folder)
    runpy.run_path(words[0], run_name="__main__")


def test_pasted_into_the_scripts(tiny, tmp_path):
    """A reader's copy of the project, run as scripts: every block has its effect."""
    names = [name for name in os.listdir(ROOT) if name.endswith(".py")]
    for name in names:
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    shutil.copytree(os.path.join(ROOT, "tools"), tmp_path / "tools")
    places = dict(
        reward="reward.py", prompt="data.py", format="data.py", loss="omni_grpo.py", benchmark="eval.py"
    )
    for block, name in places.items():
        paste(tmp_path, name, block)
    clip = data.Examples(tiny.questions)[0].audio
    rows = [
        dict(sound=clip, ask="Which?", options="beep|hum", right=str(i % 2), level=f"l{i}") for i in range(2)
    ]
    write_lines(tmp_path / "quiz.jsonl", *rows)

    def run(words):
        return runs.finish(runs.fork(run_script, tmp_path, words.split()))

    knobs = f"--model {tiny.base} --data quiz.jsonl --steps 1 --prompts_per_step 2 --num_generations 8 --eval_size 0"
    knobs += (
        " --lora_rank 4 --beta 0 --temperature 5 --reduce token --prompt polite --reward accuracy=1,brief=1"
    )
    run(f"omni_grpo.py {knobs} --out runs/hacked")
    log = runs.read(tmp_path / "runs" / "hacked")
    assert 0 < log[1]["reward/brief"] <= 1 and log[1]["optim/grad_norm"] > 0
    assert log[1]["policy/loss"] == 0  # the pasted one, whose ratio is 1; ours is not 0 where lengths differ
    assert log[1]["len/mean"] < 16.1
    out = run(f"eval.py --data quiz.jsonl --model {tiny.base} --out results/quiz --prompt polite")
    assert "l0" in out and "l1" in out
