"""Behaviours over training: what is counted, what a judge is asked and believed, and that neither kills nor bad files nor bad
judges lose, double or leak anything. The judge is the server of test_generate with answers of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import test_generate
from test_generate import KEY, Server
from test_generate import server as server

import data
import eval as ev
from data import UserError

NAMES, DRAW = list(ev.BEHAVIOURS), ev.draw_behaviours


def said(name: str, text: str, first: bool):
    """(reply, finish reason) of the judge. A completion tells by "verification=2" what is true of it, and how it is said."""
    n, mode = (
        int((re.findall(rf"{name}=(\d+)", text) or [0])[0]),
        (re.findall(r"mode=(\w+)", text) or ["good"])[0],
    )
    good = f"<count>{n}</count>"
    return {
        "prose": (f"As <count>7</count> is:\n- 'so'\nThus **<COUNT> {n} </COUNT>**.", "stop"),
        "cut": (good, "length"),
        "think": (f"<think><count>9</count></think>\n{good}", "stop"),
        "garbage": ("Three times.", "stop"),
        "null": (None, "stop"),
        "once": (("none" if first else good), "stop"),
        "minus": ("<count>-3</count>", "stop"),
        "huge": (f"<count>{'9' * 6000}</count>", "stop"),
        "leak": (f"{KEY} {good}", "stop"),
    }.get(mode, (good, "stop"))


class Judge(Server):
    def respond(self, request, head):
        text = request["messages"][0]["content"]
        name = re.search(r"in that text: ([\w ]+), where", text)[1]
        completion = re.search(r"<text>\n(.*)\n</text>", text, re.DOTALL)[1]
        mode = (re.findall(r"mode=(\w+)", text) or ["good"])[0]
        hits = sum(e["job"] == (name, completion) for e in self.log)
        self.log.append(dict(job=(name, completion), key=re.search(r"Bearer (\S+)", head)[1], **request))
        error = {"error": {"message": f"no good: Bearer {KEY}"}}
        if mode in ("odd", "forbidden") or mode == "limit" and not hits:
            return {"limit": 429, "odd": 422, "forbidden": 401}[mode], "Retry-After: 0\r\n", error, 0
        if mode == "page":
            return 200, "", b"<html>hello</html>", 0
        reply, finish = said(name, completion, len(request["messages"]) == 1)
        wait_s = float((re.findall(r"slow=([\d.]+)", text) or [0])[0])
        return (
            200,
            "",
            {
                "id": "x",
                "object": "chat.completion",
                "created": 1,
                "model": "m",
                "choices": [
                    {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": reply}}
                ],
            },
            wait_s,
        )


@pytest.fixture(autouse=True)
def a_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(test_generate, "Server", Judge)
    monkeypatch.setattr(ev, "draw_behaviours", lambda *a: None)  # a second each
    monkeypatch.chdir(tmp_path)


def line(completion: str, **more) -> dict:
    return (
        dict(
            step=0,
            id="q",
            question="Which animal calls?",
            choices=["dog", "cat", "cow"],
            answer=0,
            completion=completion,
            reward=1.0,
            parts={},
            advantage=0.0,
            tokens=10,
            finished=True,
        )
        | more
    )


def rollouts(lines: list, run="a", end="\n") -> str:
    os.makedirs(f"runs/{run}", exist_ok=True)
    with open(f"runs/{run}/rollouts.jsonl", "w") as f:
        f.write("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + end)
    return f"runs/{run}/rollouts.jsonl"


def behaviours(*args) -> dict:
    """Run the command.     -> behaviours.json"""
    assert ev.main(["--behaviours", *map(str, args), "--out", "out"]) == 0
    return json.load(open("out/behaviours.json"))


def judged(server, *args) -> list[dict]:
    """-> of each step of the only run, {behaviour: stat}"""
    (steps,) = behaviours(*args, "--judge", "m", "--base_url", server.url)["runs"].values()
    return [step["judge"] for step in steps]


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    "name, n, text",
    [
        ("verification", 3, "Let me check. I'll verify it. Double-checked!"),
        ("verification", 2, "6*4 = 24 ✓, so this works."),
        ("verification", 0, "The verifier checks in at the hotel; = 24; verifiable"),
        ("verification", 1, "that is not the target"),
        ("backtracking", 3, "Wait, that doesn’t work. Let me try another."),
        ("backtracking", 2, "too high; use 5 instead"),
        ("backtracking", 0, "People waiting; a drum instead of a bell; to high heaven; await"),
        ("subgoal setting", 3, "First, we need to get 12. Step 1: sum."),
        ("subgoal setting", 0, "The first dog steps 1 m; we need it"),
        ("backward chaining", 3, "To get 24 we go on. Working backwards: 24 = 6 * 4, so a 6."),
        ("backward chaining", 1, "If it were a piano, each note would fade."),
        (
            "backward chaining",
            0,
            "6 * 4 = 24. 1 + 3 = 2 * 2. To get up we wait. If it is loud. It would fade",
        ),
    ],
)
def test_words(name, n, text):
    assert ev.COUNTERS["lexical"][name](ev.row_of(dict(completion=text), "x:1")) == n


@pytest.mark.parametrize(
    "name, n, text",
    [
        ("option elimination", 2, "It is not a dog. A cat can be ruled out. So a cow."),
        ("option elimination", 0, "Is it not a dog? cow"),
        ("option elimination", 2, "Option A is wrong, and (B) is incorrect."),
        ("option elimination", 1, "No dog. It isn't a dog."),
        ("question re-check", 2, "The question asks for an animal. Back to the question."),
        ("question re-check", 0, "A question."),
        ("audible cue", 3, "I hear a loud sound."),
        ("audible cue", 0, "A hearty, soundless crowd; aloud"),
        ("contradiction", 1, "<think>So it is a dog.</think>cat"),
        ("contradiction", 0, "So it is a dog.</think><answer>A</answer>"),
        ("contradiction", None, "<think>dog or cat</think>cat"),
        ("contradiction", None, "<think>So it is a dog.</think>Hm."),
        ("contradiction", None, "It is a dog. <answer>cat</answer>"),
        ("contradiction", None, "<think>So it is a dog."),
        ("contradiction", None, "So it is a dog. <think>"),
    ],
)
def test_what_audio_needs(name, n, text):
    assert ev.COUNTERS["audio"][name](ev.row_of(line(text), "x:1")) == n


def test_no_choices_no_elimination():
    row = ev.row_of(dict(completion="It is not a dog.</think>dog"), "x:1")
    assert ev.eliminated(row) is None and ev.contradiction(row) is None


@pytest.mark.parametrize(
    "part",
    [
        "wait ",
        "= ",
        " ",
        "9",
        "9 = 9 ",
        "if it is ",
        "to get ",
        "a",
        "not ",
        "<count>",
        "</think>",
        "first",
        "double-",
        "what is ",
    ],
)
def test_the_time_is_linear(part):
    """100 kB; quadratic patterns take minutes."""
    row = ev.row_of(line(part * (100_000 // len(part))), "x:1")
    start = time.process_time()
    for group in ev.COUNTERS.values():
        for count in group.values():
            count(row)
    ev.count_of(row["completion"])
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------------------------------------------
# Files of rollouts


def test_table_json_and_plot(capsys, monkeypatch):
    monkeypatch.setattr(ev, "draw_behaviours", DRAW)
    a = rollouts(
        [line("Wait. Wait.", reward=0.5, tokens=4), line("dog", step=5), line("Wait", reward=0, tokens=6)]
    )
    b = rollouts(
        [line("<think>So it is a dog.</think>cat", reward=None), line("I see.", tokens=[1, 2])], "b$x$"
    )
    report = behaviours(a, b)
    first, second = report["runs"]["a"]
    assert [first[k] for k in ("step", "n", "reward", "tokens")] == [0, 2, 0.25, 5.0] and second["step"] == 5
    assert (
        first["lexical"]["backtracking"] == dict(mean=1.5, n=2, unknown=0)
        and second["lexical"]["backtracking"]["mean"] == 0
    )
    assert first["audio"]["contradiction"] == dict(mean=None, n=0, unknown=2) and "judge" not in first
    (other,) = report["runs"]["b$x$"]
    assert other["audio"]["contradiction"] == dict(mean=1.0, n=1, unknown=1) and (
        other["reward"],
        other["tokens"],
    ) == (1, 10)
    out = capsys.readouterr().out
    assert "lexical (words, not a judge); mean count" in out and "judge:" not in out
    assert "| a | 0 | 2 | 0.250 | 5.0 | 0.00 | 1.50 | 0.00 | 0.00 |" in out
    assert "| b$x$ | 0 | 2 | 1.000 | 10.0 | 0.00 | 0.00 | 0.00 | 1.00 (of 1) |" in out
    assert open("out/behaviours.png", "rb").read(4) == b"\x89PNG" and not any(
        n.endswith(".part") for n in os.listdir("out")
    )


def test_every_run_is_a_line_of_every_panel(monkeypatch):
    from matplotlib import pyplot as plt

    kept = []
    monkeypatch.setattr(ev, "draw_behaviours", DRAW)
    monkeypatch.setattr(plt, "close", kept.append)
    behaviours(rollouts([line("wait"), line("dog", step=3)]), rollouts([line("wait")], "_b"))
    axes = kept[0].axes
    assert [len(ax.lines) for ax in axes] == [2, 2, 0, 0] + [2] * 8
    assert [t.get_text() for t in axes[2].get_legend().get_texts()] == [" a", " _b"]
    assert (
        list(axes[5].lines[0].get_ydata()) == [1, 0]
        and axes[5].get_title() == "backtracking\nlexical (words, not a judge)"
    )
    plt.figure(kept[0].number)
    monkeypatch.undo()
    plt.close("all")


def test_other_peoples_lines():
    rows, _ = ev.read_rollouts(
        rollouts(
            [
                dict(response="wait"),
                dict(output="x \ud800"),
                dict(completion="’", choices="ab"),
                "",
                dict(completion=None, output="y", step=None, reward="good", tokens=10**400),
            ]
        )
    )
    assert [r["completion"] for r in rows] == ["wait", "x ?", "'", "y"] and {r["step"] for r in rows} == {0}
    assert rows[3]["reward"] is rows[3]["tokens"] is None and rows[2]["choices"] == []


@pytest.mark.parametrize(
    "lines, end, says",
    [
        (["{}"], "\n", ':1: field "completion"'),
        ([line("x"), "{oops"], "\n", ":2: broken JSON"),
        ([line(3)], "\n", ":1: field"),
        ([line("x"), "", [1]], "\n", ":3: expected an object"),
        ([line("x", step="7")], "\n", ':1: field "step"'),
        ([line("x", step=10**400)], "", ':1: field "step"'),
        ([line("x", step=True)], "", ':1: field "step"'),
        ([], "", "holds no completion"),
        (["", " "], "\n", "holds no completion"),
        (['{"completion": "a'], "", "holds no completion"),
        (["hello"], "", ":1: broken JSON"),
        (["", "{}"], "", ":2: field"),
        (["[" * 100_000], "\n", ":1: broken JSON"),
        ([dict(text="x")], "", ":1: field"),
    ],
)
def test_bad_files_are_refused(lines, end, says, capsys):
    assert ev.main(["--behaviours", rollouts(lines, end=end)]) == 2
    err = capsys.readouterr().err
    assert f"runs/a/rollouts.jsonl{'' if says[0] == ':' else ': '}{says}" in err
    assert "Traceback" not in err and not os.path.exists("results")


@pytest.mark.parametrize(
    "args, says",
    [
        (["--behaviours", "none.jsonl"], "no such file"),
        (["--behaviours", "."], "is a directory"),
        (["--behaviours", "runs/a/rollouts.jsonl", "runs/../runs/a/rollouts.jsonl"], "given twice"),
        (["--behaviours", "runs/a/rollouts.jsonl", "--judge", "m", "--base_url", "nowhere"], "--base_url"),
        (["--behaviours", "runs/a/rollouts.jsonl", "--judge", "m"], "OPENAI_API_KEY"),
    ],
)
def test_bad_arguments(args, says, capsys, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    rollouts([line("x")])
    assert ev.main(args) == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--judge", "m"],
        ["--behaviours", "x", "--samples_per_step", "0"],
        ["--behaviours"],
        ["--behaviours", "x", "--concurrency", "0"],
    ],
)
def test_arguments_that_do_not_parse(args):
    with pytest.raises(SystemExit):
        ev.parse_args(args)


def test_a_line_that_a_kill_cut(capsys):
    whole = json.dumps(line("wait é"), ensure_ascii=False).encode()
    path, marks = rollouts([line("dog")]), set()
    for at in (1, 30, whole.index(b"\xc3") + 1, len(whole) - 1):
        with open(path, "wb") as f:
            f.write(json.dumps(line("dog")).encode() + b"\n" + whole[:at])
        rows, mark = ev.read_rollouts(path)
        marks.add(mark)
        assert len(rows) == 1 and f"note: {path}:2: cut off" in capsys.readouterr().err
    with open(path, "ab") as f:
        f.write(whole[-1:])
    assert len(ev.read_rollouts(path)[0]) == 2 and not capsys.readouterr().err
    assert len(marks) == 1 and ev.read_rollouts(path)[1] not in marks


def test_runs_are_named_after_their_folders():
    os.makedirs("x")
    for folder in ("x/a", "a", "b"):
        os.makedirs(folder)
        with open(f"{folder}/r.jsonl", "w") as f:
            f.write('{"completion": "x"}')
    assert ev.main(["--behaviours", "x/a/r.jsonl", "a/r.jsonl", "b/r.jsonl"]) == 0
    (out,) = os.listdir("results")
    assert list(json.load(open(f"results/{out}/behaviours.json"))["runs"]) == [
        "x/a/r.jsonl",
        "a/r.jsonl",
        "b",
    ]
    assert ev.main(["--behaviours", "b/r.jsonl"]) == 0 and os.path.exists(
        "results/b-behaviours/behaviours.json"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The judge


@pytest.mark.parametrize(
    "reply, count",
    [
        ("<count>3</count>", 3),
        ("a <Count> 12 </COUNT> b", 12),
        ("<count>1</count>, no: <count>2</count>", 2),
        ("3", None),
        ("", None),
        ("<count>3", None),
        ("<count>three</count>", None),
        ("<count>-1</count>", None),
        ("<count>2.5</count>", None),
        ("<count>100</count>", 100),
        ("<count>101</count>", 100),
        (f"<count>{'9' * 10_000}</count>", 100),
        ("<count></count>", None),
        ("<think><count>1</count></think>", None),
        ("<think><count>1</count></think><count>0</count>", 0),
    ],
)
def test_count_of(reply, count):
    assert ev.count_of(reply) == count


def test_replies(server, capsys):
    modes = ["good", "prose", "think", "once", "limit", "huge", "cut", "garbage", "null", "minus"]
    path = rollouts(
        [line(f"verification=3 backtracking={i} mode={mode}", step=i) for i, mode in enumerate(modes)]
    )
    steps = judged(server, path)
    assert [s["verification"]["mean"] for s in steps] == [3, 3, 3, 3, 3, 100] + [None] * 4
    assert [s["backtracking"]["mean"] for s in steps] == [0, 1, 2, 3, 4, 100] + [None] * 4
    assert (
        steps[9]["verification"] == dict(mean=None, n=0, unknown=1)
        and steps[0]["subgoal setting"]["mean"] == 0
    )
    asked = {
        mode: sum(f"mode={mode}" in e["job"][1] and e["job"][0] == "verification" for e in server.log)
        for mode in modes
    }
    assert asked == dict(good=1, prose=1, think=1, once=2, limit=2, huge=1) | dict.fromkeys(
        modes[-4:], ev.ATTEMPTS
    )
    out = capsys.readouterr().out
    assert (
        "left out: 16 counts that the judge did not give" in out
        and "judge: m; mean count a completion" in out
    )
    assert "lexical (words, not a judge)" in out
    behaviours(path, "--judge", "m", "--base_url", server.url)  # what could not be read is not asked again
    assert sum(asked.values()) * len(NAMES) == len(server.log)


def test_requests(server):
    """One a behaviour and completion, equal ones read once; the question is told; no JSON is asked for."""
    path = rollouts([line("verification=2"), line("verification=2"), line("x", question=None, step=1)])
    steps = judged(server, path, "--max_new_tokens", 77)
    assert sorted(e["job"] for e in server.log) == sorted(
        (n, t) for n in NAMES for t in ("verification=2", "x")
    )
    assert steps[0]["verification"] == dict(mean=2, n=2, unknown=0)
    assert all(
        "response_format" not in e and e["temperature"] == 0 and e["max_tokens"] == 77 for e in server.log
    )
    texts = [e["messages"][0]["content"] for e in server.log]
    assert all(ev.BEHAVIOURS[e["job"][0]][0] in text for e, text in zip(server.log, texts))
    assert {"Which animal calls?\n- dog\n- cat\n- cow" in text for text in texts} == {True, False}
    assert sum("<question>\n(not given)\n- dog" in text for text in texts) == len(NAMES)


def test_a_second_question_tells_what_was_wrong(server):
    judged(server, rollouts([line("mode=garbage")]))
    assert {len(e["messages"]) for e in server.log} == {1, 3} and len({e["seed"] for e in server.log}) == len(
        server.log
    )
    last = server.log[-1]["messages"]
    assert [m["role"] for m in last] == ["user", "assistant", "user"] and last[1]["content"] == "Three times."


def test_samples_of_a_step(server):
    """At most so many, spread at random, the same for every concurrency; a larger sample asks only what is new."""
    path = rollouts([line(f"verification={i % 2} no. {i}", step=i % 2) for i in range(40)])

    def asked(n, concurrency, out):
        before = len(server.log)
        assert (
            ev.main(
                [
                    "--behaviours",
                    path,
                    "--judge",
                    "m",
                    "--base_url",
                    server.url,
                    "--out",
                    out,
                    "--samples_per_step",
                    str(n),
                    "--concurrency",
                    str(concurrency),
                ]
            )
            == 0
        )
        return {e["job"][1] for e in server.log[before:]}

    five, again = asked(5, 1, "one"), asked(5, 8, "many")
    assert five == again and len(five) == 10 and five != {f"verification={i % 2} no. {i}" for i in range(10)}
    steps = json.load(open("one/behaviours.json"))["runs"]["a"]
    assert [s["judge"]["verification"] for s in steps] == [dict(mean=i, n=5, unknown=0) for i in range(2)]
    more = asked(8, 8, "one")
    assert len(more) == 6 and not more & five
    assert not asked(8, 8, "one") and len(asked(200, 8, "many")) == 30


def answered(out="out") -> set:
    path = f"{out}/behaviours_items.jsonl"
    raw = open(path, "rb").read() if os.path.exists(path) else b""
    return {json.loads(x)["item"] for x in raw.split(b"\n")[:-1]}


def test_killed_and_resumed(server):
    """What has a line is not asked again; what has half a line is."""
    texts = [f"verification={i} slow=0.05" for i in range(30)]
    path = rollouts([line(t) for t in texts])
    command = [
        sys.executable,
        ev.__file__,
        "--behaviours",
        path,
        "--judge",
        "m",
        "--base_url",
        server.url,
        "--out",
        "out",
        "--concurrency",
        "4",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(answered()) < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = answered()
    assert process.returncode == -9 and 20 <= len(before) < 100
    assert len(server.log) - len(before) <= 4 + 1  # no more than what was under way
    with open("out/behaviours_items.jsonl", "ab") as f:
        f.write(b'{"item": "half a li')
    items = {ev.row_of(line(t), "")["item"]: t for t in texts}
    done = {(i.partition(" ")[2], items[i.partition(" ")[0]]) for i in before}
    del server.log[:]
    steps = judged(server, path)
    assert sorted(e["job"] for e in server.log) == sorted({(n, t) for n in NAMES for t in texts} - done)
    assert steps[0]["verification"] == dict(mean=14.5, n=30, unknown=0)
    del server.log[:]
    assert judged(server, path) == steps and not server.log
    with open("out/behaviours_items.jsonl", "rb+") as f:
        f.truncate(os.path.getsize("out/behaviours_items.jsonl") - 5)
    assert judged(server, path) == steps and len(server.log) == 1


def test_ctrl_c_stops(server):
    path = rollouts([line(f"no. {i} slow=0.3") for i in range(100)])
    process = subprocess.Popen(
        [sys.executable, ev.__file__, "--behaviours", path, "--judge", "m", "--base_url", server.url],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and len(answered("results/a-behaviours")) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    "change, says",
    [
        (["--judge", "other"], "judge"),
        (["--seed", "1"], "seed"),
        (["--temperature", "0.5"], "temperature"),
        (["file"], "rollouts"),
        (["prompt"], "prompt_version"),
        ([], "judge"),
    ],
)
def test_other_settings_are_refused(change, says, server, capsys, monkeypatch):
    path = rollouts([line("x")])
    judged(server, path)
    before = {name: open(f"out/{name}", "rb").read() for name in os.listdir("out")}
    more = ["--judge", "m", "--base_url", server.url] if change else []
    if change == ["file"]:
        path, change = rollouts([line("x"), line("y")]), []
    if change == ["prompt"]:
        monkeypatch.setattr(ev, "JUDGE_VERSION", "12345678")
        change = []
    assert ev.main(["--behaviours", path, *more, *change, "--out", "out"]) == 2
    assert re.search(rf"--out out: holds results of another ([\w ,]+, )?{says}", capsys.readouterr().err)
    assert before == {name: open(f"out/{name}", "rb").read() for name in os.listdir("out")} and len(
        server.log
    ) == len(NAMES)


def test_results_of_an_evaluation_stay(server):
    """--out may be the folder of other results; without a judge the tables may be made anew at any time."""
    os.makedirs("out")
    for name in ("config.json", "items.jsonl", "report.json"):
        open(f"out/{name}", "w").write("mine")
    behaviours(rollouts([line("x")]))
    judged(server, rollouts([line("x"), line("y")]))
    assert all(open(f"out/{name}").read() == "mine" for name in ("config.json", "items.jsonl", "report.json"))


def test_damaged_counts_are_refused(server, capsys):
    path = rollouts([line("x")])
    judged(server, path)
    open("out/behaviours_items.jsonl", "w").write('{"count": 3}\n')
    assert ev.main(["--behaviours", path, "--judge", "m", "--base_url", server.url, "--out", "out"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_failed_requests_are_reported_and_asked_again(server, capsys):
    path = rollouts([line("verification=4"), line("mode=odd")])
    for _ in range(2):
        assert ev.main(["--behaviours", path, "--judge", "m", "--base_url", server.url, "--out", "out"]) == 2
        said = capsys.readouterr()
        assert "4 requests failed" in said.err and "the same command asks them again" in said.err
        assert "4.00 (of 1)" in said.out and "left out: 4 counts" in said.out
    assert len(server.log) == 4 + 4 + 4


@pytest.mark.parametrize(
    "mode, says",
    [
        ("forbidden", "check OPENAI_API_KEY"),
        ("odd", "20 requests in a row failed"),
        ("page", "20 requests in a row failed"),
    ],
)
def test_hopeless_judges_are_given_up(mode, says, server, capsys):
    path = rollouts([line(f"{i} mode={mode}") for i in range(50)])
    assert (
        ev.main(
            [
                "--behaviours",
                path,
                "--judge",
                "m",
                "--base_url",
                server.url,
                "--out",
                "out",
                "--concurrency",
                "2",
            ]
        )
        == 2
    )
    assert says in capsys.readouterr().err and len(server.log) < 80


def test_no_judge_there(capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    connect = data.connect
    monkeypatch.setattr(data, "connect", lambda *a, **k: connect(*a[:4], 0, *a[5:], **k))
    path = rollouts([line("x")])
    assert ev.main(["--behaviours", path, "--judge", "m", "--base_url", "http://127.0.0.1:9/v1"]) == 2
    assert "cannot reach the judge" in capsys.readouterr().err


def test_a_full_disk_stops_before_half_a_line_is_written_over(server, monkeypatch, capsys):
    written = []

    def append(file, record):
        written.append(record)
        if len(written) == 3:
            raise UserError("the disk is full")

    monkeypatch.setattr(data, "append_line", append)
    path = rollouts([line(f"no. {i}") for i in range(20)])
    assert ev.main(["--behaviours", path, "--judge", "m", "--base_url", server.url]) == 2
    assert "the disk is full" in capsys.readouterr().err and len(written) == 3


def test_the_key_is_nowhere(server, capsys):
    """Though the server echoes it, in errors and in replies."""
    path = rollouts([line("verification=1 mode=leak"), line("mode=odd"), line("mode=limit")])
    assert ev.main(["--behaviours", path, "--judge", "m", "--base_url", server.url, "--out", "out"]) == 2
    said = capsys.readouterr()
    files = [open(f"out/{name}", "rb").read() for name in os.listdir("out")]
    assert {e["key"] for e in server.log} == {KEY} and any(b"***" in f for f in files) and "***" in said.err
    for text in (said.out.encode(), said.err.encode(), *files):
        assert KEY.encode() not in text and server.url.encode() not in text
