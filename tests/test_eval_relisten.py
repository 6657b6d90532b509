"""Re-listening in eval.py: what is heard again in an evaluation, its control, and the pages that play it."""

import json
import os
import re
import types

import pytest
from test_relisten import act, clips, omni  # noqa: F401 - fixtures

import eval as ev
import omni_grpo as og

SAID = "<think>I hear <seg>0.5, 1.25</seg> a bell, and <seg>9, 12</seg>, <seg>3.0, 3.4</seg>.</think><answer>bell</answer>"


def content(*names):
    with open(os.path.join(*names), encoding="utf-8") as f:
        return f.read()


def data_of(page):
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    )


@pytest.fixture
def asked(omni, clips, tmp_path, monkeypatch):  # noqa: F811
    """asked(*words): eval.main on three questions whose answers are always SAID, one without a clip.       -> exit code"""
    path = tmp_path / "q.jsonl"
    rows = [
        dict(id=str(i), audio=audio, question="What is heard?", choices=["bell", "hum"], answer=i % 2)
        for i, audio in enumerate([clips["bell"], [clips["one"], clips["two"]], clips["one"]])
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    act(monkeypatch, lambda seed, j: [*omni.ids(SAID), omni.policy.tokenizer.eos_token_id])
    monkeypatch.setattr(og, "load_policy", lambda cfg, train=True: omni.policy)
    monkeypatch.chdir(tmp_path)
    return lambda *words: ev.main(
        [
            "--data",
            str(path),
            "--model",
            omni.cfg.model,
            "--prompt",
            "relisten",
            "--max_new_tokens",
            "90",
            "--out",
            "out",
            *words,
        ]
    )


def test_an_evaluation_hears_again(asked, capsys):
    assert asked() == 0
    records = [json.loads(line) for line in content("out", "items.jsonl").splitlines()]
    assert [r["again"] for r in records] == [
        [[[0.5, 1.25], [3.0, pytest.approx(3.217, abs=1e-3)]]],
        [[[0.5, 1.25], [3.0, 3.4]]],
        [[[0.5, 1.25]]],
    ]
    assert [r["refused"] for r in records] == [[{"outside": 1}], [{"outside": 1}], [{"outside": 2}]]
    report = json.loads(content("out", "report.json"))
    assert report["heard_again"] == pytest.approx(5 / 3) and report["heard_again_share"] == 1
    assert report["refused"] == {"outside": 4} and report["accuracy"] == pytest.approx(2 / 3)
    assert (
        "heard again: 1.67 parts an answer, at least one in 100.0 % of them; refused: 4 outside"
        in capsys.readouterr().out
    )
    items = data_of(content("out", "report.html"))["items"]
    assert [item["again"] for item in items] == [r["again"][0] for r in records] and items[0]["said"] == SAID
    assert asked("--out", "twice", "--samples", "2") == 0
    records = [json.loads(line) for line in content("twice", "items.jsonl").splitlines()]
    second = [
        item["samples"] for item in data_of(content("twice", "report.html"))["items"]
    ]  # its parts can be played, too
    assert second == [[[r["said"][1], r["again"][1]]] for r in records] and second[0][0][1]


def test_settings_of_re_listening_keep_results_apart(asked, capsys):
    """Off and on, and with other limits; results from before there was re-listening are gone on with."""
    assert asked("--max_relistens", "0") == 0
    assert (
        "again" not in content("out", "items.jsonl")
        and json.loads(content("out", "config.json"))["relisten"] is None
    )
    assert asked() == 2 and "another relisten" in capsys.readouterr().err
    setting = json.loads(content("out", "config.json"))
    del setting["relisten"]
    with open("out/config.json", "w") as f:
        json.dump(setting, f)
    assert asked("--max_relistens", "0") == 0
    for words in (["--max_relistens", "-2"], ["--min_relisten_s", "0"], ["--max_relisten_s", "nan"]):
        assert asked(*words, "--out", "other") == 2 and words[0] in capsys.readouterr().err
    assert asked("--max_relistens", "1", "--out", "one") == 0
    assert json.loads(content("one", "report.json"))["refused"] == {"outside": 4, "too many": 2}


@pytest.mark.parametrize(
    "key, value",
    [
        ("again", 3),
        ("again", [3]),
        ("again", [[[1]]]),
        ("again", [[["a", "b"]]]),
        ("refused", [3]),
        ("refused", [{"long": "x"}]),
        ("refused", 3),
    ],
)
def test_damaged_results_are_refused(asked, capsys, key, value):
    assert asked() == 0
    lines = content("out", "items.jsonl").splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {key: value})
    with open("out/items.jsonl", "w") as f:
        f.write("\n".join(lines) + "\n")
    assert asked() == 2 and "damaged" in capsys.readouterr().err


def test_the_control_hears_once(asked, capsys):
    assert asked("--controls") == 0
    table = json.loads(content("out", "report.json"))
    assert list(table) == ["real", "silence", "none", "shuffled", "rotated", "once"]
    assert (
        "heard_again" in table["real"]
        and not {"heard_again"} & table["once"].keys()
        and "heard_again" not in table["none"]
    )
    assert "| once |" in capsys.readouterr().out


def test_the_page_of_rollouts(omni, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The newest first, each with its clip and what was heard again; clips without a path; an older file; a damaged one."""
    act(monkeypatch, lambda seed, j: [*omni.ids(SAID), omni.policy.tokenizer.eos_token_id])
    batch = [(i, e, h, False) for i, (e, h) in enumerate(zip(omni.examples, omni.heard))]
    groups = og.sampled_groups(omni.policy, omni.cfg, batch, {"accuracy": 1.0})
    monkeypatch.setattr(groups[1].example, "audio", [b"bytes", groups[0].example.audio])
    lines = [
        json.dumps(r) for step in (1, 2) for r in og.rollout_records(omni.policy, omni.cfg, step, groups)
    ]
    old = dict(json.loads(lines[0]), step=0, completion="</script><b>hum</b>")
    for key in ("audio", "heard", "refused"):
        del old[key]
    (tmp_path / "rollouts.jsonl").write_text("\n".join([json.dumps(old), *lines]) + '\n{"half')
    assert ev.main(["--rollouts", str(tmp_path)]) == 0
    page = content(tmp_path, "rollouts.html")
    items, sounds = data_of(page)["items"], data_of(page)["clips"]
    assert len(items) == len(lines) + 1 and [i["tags"][0] for i in items[::9]] == [
        "step 2",
        "step 1",
        "step 0",
    ]
    assert items[-1]["again"] is None and items[-1]["clips"] == [] and page.count("</script>") == 2
    first = items[-2]
    assert (
        first["again"][0] == [0.5, 1.25]
        and first["clips"] == [omni.examples[0].audio]
        and first["state"] == "right"
    )
    assert sounds[first["clips"][0]].startswith("data:audio/ogg") and "reward 1" in first["tags"]
    (tmp_path / "rollouts.jsonl").write_text('{"step": 1}\n')
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        assert ev.main(["--rollouts", str(path)]) == 2
    assert "damaged" in (error := capsys.readouterr().err) and "No such file" in error


def test_the_picture_of_a_rollout(omni, tmp_path):  # noqa: F811
    og.draw_rollout(str(tmp_path))
    record = dict(
        audio=omni.examples[0].audio,
        heard=[],
        parts={"accuracy": 1.0},
        reward=1.0,
        question="$x_",
        choices=["a"],
        completion=SAID,
    )
    for heard, drawn in (([], False), ([[0.5, 1.25], [3.0, 3.217]], True)):
        (tmp_path / "rollouts.jsonl").write_text(json.dumps(record | dict(heard=heard)) + "\n")
        og.draw_rollout(str(tmp_path))
        assert os.path.exists(tmp_path / "rollout.png") == drawn


def test_fakes_have_no_part(asked, monkeypatch):
    """A model without ears, or without clips, goes its way."""
    assert og.relistening(types.SimpleNamespace(), og.Config(prompt="relisten"), [], [[], []]) is None
