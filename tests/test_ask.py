"""eval.py --ask: one question about a clip, for people."""

import collections
import io
import math

import pytest

import data
import eval as evaluation
import model
import omni_grpo as og
from test_families import family_folder  # noqa: F401 - a fixture
from tools import ask


@pytest.fixture
def asked(tiny, capsys):
    """eval.py --ask ... -> its exit code, what it printed, its error"""

    def run(*words, more=("--max_new_tokens", "6"), base=tiny.base):
        code = evaluation.main(["--model", base, *more, "--ask", *words])
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err.strip().splitlines()[-1:]

    return run


def test_it_says_what_an_evaluation_says(tiny, asked, tmp_path):
    options = evaluation.Options(
        data=tiny.questions, model=tiny.base, out=str(tmp_path), limit=3, prompt="direct", max_new_tokens=6
    )
    _, items = evaluation.run(options, data.Examples(tiny.questions))
    assert len({item.said[0][0] for item in items}) > 1
    for item in items:
        e = item.example
        code, lines, _ = asked(e.question, e.audio, "--choices", *e.choices)
        assert code == 0 and lines[0] == item.said[0][0]
        shares = {line.split(None, 1)[1]: float(line.split()[0]) for line in lines[1:]}
        assert list(shares) == [*e.choices, "anything else"] and abs(sum(shares.values()) - 1) < 0.003


def test_probabilities_are_those_of_the_sampler(policy, config, prompts):
    (example, *_), (prompt, *_) = prompts
    (prefix,) = model.read_prompts(policy, [prompt])
    (rows,) = og.decode(policy, [prefix], 64, 1.0, 6, [0])
    whole = {model.completion_text(policy, row): math.exp(sum(row.logps)) for row in rows if row.finished}
    again = {text for text in whole if ask_ids(policy, text) in [row.ids for row in rows]}
    assert len(again) > 2
    for text, share in ask.choice_probabilities(policy, prompt, sorted(again)).items():
        assert math.isclose(share, whole[text], rel_tol=1e-4)


def ask_ids(policy, text):
    return [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id]


def test_questions_come_from_the_terminal(tiny, asked, monkeypatch):
    clip = data.Examples(tiny.questions)[0].audio
    monkeypatch.setattr("sys.stdin", io.StringIO("What do you hear?\n\nName the sound.\n"))
    code, lines, _ = asked(clip, clip, more=("--samples", "2", "--max_new_tokens", "6"))
    assert code == 0 and len(lines) == 4


def test_what_was_heard_again_is_said(policy, config, monkeypatch):
    row = model.Completion([5], sampled=[True], heard=[(0.5, 1.25)], refused=collections.Counter(short=2))
    monkeypatch.setattr(og, "rollout", lambda *args, **more: [[row]])
    lines = ask.answer_lines(policy, config(), evaluation.Options(), data.Example("", None, "What?"))
    assert lines[1:] == ["  heard again: 0.5 to 1.25 s", "  not heard again: short (2)"]


def test_a_long_clip_is_cut_aloud(tiny, asked):
    clip = data.Examples(tiny.questions)[0].audio
    _, lines, _ = asked("What?", clip, more=("--max_audio_s", "0.5", "--max_new_tokens", "6"))
    assert lines[0] == "only the first 0.5 s are heard"


@pytest.mark.parametrize(
    "words, more, said",
    [
        (["What?", "gone.wav"], [], "--ask: gone.wav: "),
        (["gone.wav"], [], "--ask: gone.wav: "),
        (["What?"], ["--audio", "shuffled"], "--audio shuffled: there is no other item's clip"),
        (["What?"], ["--data", "x"], "--data: has no part in --ask"),
    ],
)
def test_what_it_refuses(asked, words, more, said):
    code, lines, (error,) = asked(*words, more=more)
    assert code == 2 and not lines and error.startswith(f"error: {said}")


def test_choices_without_a_question(capsys):
    assert evaluation.main(["--choices", "a", "b"]) == 2
    assert "--choices: belong to --ask" in capsys.readouterr().err


def test_a_model_without_ears_says_so(tiny, asked, family_folder):  # noqa: F811
    clip = data.Examples(tiny.questions)[0].audio
    code, lines, (error,) = asked("What?", clip, base=family_folder("llama"))
    assert code == 2 and not lines and "no audio tower; use --audio none" in error
    code, lines, _ = asked("What?", clip, base=family_folder("llama"), more=["--audio", "none"])
    assert code == 0 and len(lines) == 1
