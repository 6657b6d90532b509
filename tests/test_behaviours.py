"""Behaviours over training: what is counted, what a judge is asked and believed, and that neither kills nor
bad files nor bad judges lose, double or leak anything. The judge is the fake server with its own answers."""

import json
import os
import re
import time

import pytest

import fake_server
from fake_server import KEY, start_tool, wait_until
from fake_server import server as server  # a fixture
from test_data import cells
from tools import behaviours as bh

NAMES, DRAW = list(bh.BEHAVIOURS), bh.draw_behaviours


class Judge(fake_server.Server):
    """A completion tells by "verification=2" what is true of it, by "mode=..." how that is said."""

    def asked(self, request):
        text = request["messages"][0]["content"]
        name = re.search(r"in that text: ([\w ]+), where", text)[1]
        said = re.search(r"<text>\n(.*)\n</text>", text, re.DOTALL)[1]
        return text, dict(name=name, said=said, job=(name, said))

    def reply(self, request, mode, name, said, job):
        (number,) = re.findall(rf"{name}=(\w+)", said) or ["0"]
        good = f"<count>{number}</count>"
        replies = dict(
            prose=f"As <count>7</count> is:\n- 'so'\nThus **{good.upper()}**.",
            think=f"<think><count>9</count></think>\n{good}",
            garbage="Three times.",
            null=None,
            once=good if len(request["messages"]) > 1 else "none",
            minus="<count>-3</count>",
            huge=f"<count>{'9' * 6000}</count>",
            leak=f"{KEY} {good}",
        )
        return replies.get(mode, good), "length" if mode == "cut" else "stop"


@pytest.fixture(autouse=True)
def a_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(fake_server, "Server", Judge)
    monkeypatch.setattr(bh, "draw_behaviours", lambda *a: None)  # a second each
    monkeypatch.chdir(tmp_path)


def line(completion: str, **more) -> dict:
    row = dict(step=0, id="q", question="Which animal calls?", choices=["dog", "cat", "cow"], answer=0)
    return row | dict(completion=completion, reward=1.0, parts={}, advantage=0.0, tokens=10) | more


def rollouts(lines: list, run="a", end="\n") -> str:
    """A file of these lines, texts as they are."""
    os.makedirs(f"runs/{run}", exist_ok=True)
    with open(f"runs/{run}/rollouts.jsonl", "w") as f:
        f.write("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + end)
    return f"runs/{run}/rollouts.jsonl"


def completions(*texts: str) -> str:
    return rollouts([line(text) for text in texts])


def read(name: str):
    with open(name, "rb") as f:
        return f.read()


def folder(out="out") -> dict[str, bytes]:
    return {name: read(f"{out}/{name}") for name in os.listdir(out)}


def behaviours(*args, code=0, out="out") -> dict | None:
    """Run the command.     -> behaviours.json"""
    assert bh.main([*map(str, args), "--out", out]) == code
    return None if code else json.loads(read(f"{out}/behaviours.json"))


def judge_flags(server) -> list[str]:
    return ["--judge", "m", "--base_url", server.url]


def judged(server, *args) -> list[dict]:
    """-> of each step of the only run, {behaviour: stat}"""
    (steps,) = behaviours(*args, *judge_flags(server))["runs"].values()
    return [step["judge"] for step in steps]


def counted(mean, n=1, unknown=0) -> dict:
    return dict(mean=mean, n=n, unknown=unknown)


# ------------------------------------------------------------------------------------------------------------
# Words


WORDS = """
verification      | 3    | Let me check. I'll verify it. Double-checked!
verification      | 2    | 6*4 = 24 ✓, so this works.
verification      | 0    | The verifier checks in at the hotel; = 24; verifiable
verification      | 1    | that is not the target
backtracking      | 3    | Wait, that doesn’t work. Let me try another.
backtracking      | 2    | too high; use 5 instead
backtracking      | 0    | People waiting; a drum instead of a bell; to high heaven; await
subgoal setting   | 3    | First, we need to get 12. Step 1: sum.
subgoal setting   | 0    | The first dog steps 1 m; we need it
backward chaining | 3    | To get 24 we go on. Working backwards: 24 = 6 * 4, so a 6.
backward chaining | 1    | If it were a piano, each note would fade.
backward chaining | 0    | 6 * 4 = 24. 1 + 3 = 2 * 2. To get up we wait. If it is loud. It would fade
option elimination| 2    | It is not a dog. A cat can be ruled out. So a cow.
option elimination| 0    | Is it not a dog? cow
option elimination| 2    | Option A is wrong, and (B) is incorrect.
option elimination| 1    | No dog. It isn't a dog.
question re-check | 2    | The question asks for an animal. Back to the question.
question re-check | 0    | A question.
audible cue       | 3    | I hear a loud sound.
audible cue       | 0    | A hearty, soundless crowd; aloud
contradiction     | 1    | <think>So it is a dog.</think>cat
contradiction     | 0    | So it is a dog.</think><answer>A</answer>
contradiction     | None | <think>dog or cat</think>cat
contradiction     | None | <think>So it is a dog.</think>Hm.
contradiction     | None | It is a dog. <answer>cat</answer>
contradiction     | None | <think>So it is a dog.
contradiction     | None | So it is a dog. <think>
"""


@pytest.mark.parametrize("row", WORDS.strip().splitlines())
def test_words(row):
    name, n, text = map(str.strip, row.split("|"))
    counters = bh.COUNTERS["lexical"] | bh.COUNTERS["audio"]
    assert str(counters[name](bh.read_row(line(text), "x:1"))) == n


def test_no_choices_no_elimination():
    row = bh.read_row(dict(completion="It is not a dog.</think>dog"), "x:1")
    assert bh.count_eliminated(row) is None and bh.contradiction(row) is None


PARTS = "wait |= | |9|9 = 9 |if it is |to get |a|not |<count>|</think>|first|double-|what is "


@pytest.mark.parametrize("part", PARTS.split("|"))
def test_the_time_is_linear(part):
    """100 kB; quadratic patterns take minutes."""
    row = bh.read_row(line(part * (100_000 // len(part))), "x:1")
    start = time.process_time()
    for counters in bh.COUNTERS.values():
        for count in counters.values():
            count(row)
    bh.count_of(row["completion"])
    assert time.process_time() - start < 2


# ------------------------------------------------------------------------------------------------------------
# Files of rollouts


def test_table_json_and_plot(capsys, monkeypatch):
    """Two runs, one of them of two steps; every run is a line of every panel."""
    from matplotlib import pyplot

    figures, close = [], pyplot.close
    monkeypatch.setattr(bh, "draw_behaviours", DRAW)
    monkeypatch.setattr(pyplot, "close", figures.append)
    a = [line("Wait. Wait.", reward=0.5, tokens=4), line("dog", step=5), line("Wait", reward=0, tokens=6)]
    b = [line("<think>So it is a dog.</think>cat", reward=None), line("I see.", tokens=[1, 2])]
    report = behaviours(rollouts(a), rollouts(b, "_b$x$"))
    first, second = report["runs"]["a"]
    assert [first[k] for k in ("step", "n", "reward", "tokens")] == [0, 2, 0.25, 5.0] and second["step"] == 5
    assert first["lexical"]["backtracking"] == counted(1.5, 2) and "judge" not in first
    assert first["audio"]["contradiction"] == counted(None, 0, 2)
    (other,) = report["runs"]["_b$x$"]
    assert other["audio"]["contradiction"] == counted(1.0, 1, 1)
    assert (other["reward"], other["tokens"]) == (1, 10)
    out = capsys.readouterr().out
    assert "lexical (words, not a judge); mean count" in out and "judge:" not in out
    assert "| a | 0 | 2 | 0.250 | 5.0 | 0.00 | 1.50 | 0.00 | 0.00 |" in out
    assert "| _b$x$ | 0 | 2 | 1.000 | 10.0 | 0.00 | 0.00 | 0.00 | 1.00 (of 1) |" in out
    assert sorted(folder()) == ["behaviours.json", "behaviours.png", "behaviours_config.json"]
    assert read("out/behaviours.png")[:4] == b"\x89PNG"
    axes = figures[0].axes
    assert [len(ax.lines) for ax in axes] == [2, 2, 0, 0] + [2] * 8
    assert [t.get_text() for t in axes[2].get_legend().get_texts()] == [" a", r" _b\$x\$"]
    assert list(axes[5].lines[0].get_ydata()) == [1.5, 0]
    assert axes[5].get_title() == "backtracking\nlexical (words, not a judge)"
    close(figures[0])


def test_other_peoples_lines():
    lines = [dict(response="wait"), dict(output="x \ud800"), dict(completion="’", choices="ab"), ""]
    lines.append(dict(completion=None, output="y", step=None, reward="good", tokens=10**400))
    rows, _ = bh.read_rollouts(rollouts(lines))
    assert [r["completion"] for r in rows] == ["wait", "x ?", "'", "y"] and {r["step"] for r in rows} == {0}
    assert rows[3]["reward"] is rows[3]["tokens"] is None and rows[2]["choices"] == []


@pytest.mark.parametrize(
    "lines, says",
    [
        ("{}\n", ':1: field "completion"'),
        ('{"completion": "x"}\n{oops\n', ":2: broken JSON"),
        ('{"completion": 3}\n', ":1: field"),
        ('{"completion": "x"}\n\n[1]\n', ":3: expected an object"),
        ('{"completion": "x", "step": "7"}\n', ':1: field "step"'),
        ('{"completion": "x", "step": 1%s}' % ("0" * 400), ':1: field "step"'),
        ('{"completion": "x", "step": true}', ':1: field "step"'),
        ("", ": holds no completion"),
        ("\n \n", ": holds no completion"),
        ('{"completion": "a', ": holds no completion"),
        ("hello", ":1: broken JSON"),
        ("\n{}", ":2: field"),
        ("[" * 100_000 + "\n", ":1: broken JSON"),
        ('{"text": "x"}', ":1: field"),
    ],
)
def test_bad_files_are_refused(lines, says, capsys):
    assert bh.main([rollouts([lines], end="")]) == 2
    err = capsys.readouterr().err
    assert f"runs/a/rollouts.jsonl{says}" in err and "Traceback" not in err and not os.path.exists("results")


BAD_ARGUMENTS = """
none.jsonl | no such file
. | is a directory
 | ROLLOUTS
PATH runs/../PATH | given twice
PATH --judge m --base_url nowhere | --base_url
PATH --judge m | OPENAI_API_KEY
PATH --samples_per_step 0 | --samples_per_step
PATH --concurrency 0 | --concurrency
PATH --judg m | --judg
"""


@pytest.mark.parametrize("args, says", cells(BAD_ARGUMENTS))
def test_bad_arguments(args, says, capsys, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    path = completions("x")
    assert bh.main(args.replace("PATH", path).split()) == 2 and says in capsys.readouterr().err


def test_a_line_that_a_kill_cut(capsys):
    whole = json.dumps(line("wait é"), ensure_ascii=False).encode()
    path, marks = completions("dog"), set()
    for end in (1, 30, whole.index(b"\xc3") + 1, len(whole) - 1):
        with open(path, "wb") as f:
            f.write(json.dumps(line("dog")).encode() + b"\n" + whole[:end])
        rows, mark = bh.read_rollouts(path)
        marks.add(mark)
        assert len(rows) == 1 and f"note: {path}:2: cut off" in capsys.readouterr().err
    with open(path, "ab") as f:
        f.write(whole[-1:])
    rows, mark = bh.read_rollouts(path)
    assert len(rows) == 2 and not capsys.readouterr().err and len(marks) == 1 and mark not in marks


def test_runs_are_named_after_their_folders():
    paths = ["x/a/r.jsonl", "a/r.jsonl", "b/r.jsonl"]
    for path in paths:
        os.makedirs(os.path.dirname(path))
        with open(path, "w") as f:
            f.write('{"completion": "x"}')
    assert list(behaviours(*paths)["runs"]) == ["x/a/r.jsonl", "a/r.jsonl", "b"]
    assert bh.main(["b/r.jsonl"]) == 0 and os.path.exists("results/b-behaviours/behaviours.json")


# ------------------------------------------------------------------------------------------------------------
# The judge


COUNTS = """
<count>3</count> -> 3
a <Count> 12 </COUNT> b -> 12
<count>1</count>, no: <count>2</count> -> 2
3 -> None
 -> None
<count>3 -> None
<count>three</count> -> None
<count>-1</count> -> None
<count>2.5</count> -> None
<count>100</count> -> 100
<count>101</count> -> 100
<count></count> -> None
<think><count>1</count></think> -> None
<think><count>1</count></think><count>0</count> -> 0
"""


def test_count_of():
    for row in COUNTS.splitlines()[1:]:
        reply, count = row.split(" -> ")
        assert str(bh.count_of(reply)) == count, row
    assert bh.count_of(f"<count>{'9' * 10_000}</count>") == bh.MOST


def test_replies(server, capsys):
    """What cannot be read is asked ATTEMPTS times, with one more question, and then left out."""
    modes = ["good", "prose", "think", "once", "limit", "huge", "cut", "garbage", "null", "minus"]
    lines = [line(f"verification=3 backtracking={i} mode={mode}", step=i) for i, mode in enumerate(modes)]
    path = rollouts(lines)
    steps = judged(server, path)
    assert [s["verification"]["mean"] for s in steps] == [3, 3, 3, 3, 3, 100] + [None] * 4
    assert [s["backtracking"]["mean"] for s in steps] == [0, 1, 2, 3, 4, 100] + [None] * 4
    assert steps[9]["verification"] == counted(None, 0, 1)
    assert steps[0]["subgoal setting"]["mean"] == 0
    log = [e for e in server.log if e["job"][0] == "verification"]
    asked = {mode: sum(f"mode={mode}" in e["job"][1] for e in log) for mode in modes}
    tries = dict(good=1, prose=1, think=1, once=2, limit=2, huge=1)
    assert asked == tries | dict.fromkeys(modes[-4:], bh.ATTEMPTS)
    garbage = [e for e in log if "mode=garbage" in e["job"][1]]
    assert len({e["seed"] for e in garbage}) == bh.ATTEMPTS
    assert [len(e["messages"]) for e in garbage] == [1, 3, 3]
    last = garbage[-1]["messages"]
    assert [m["role"] for m in last] == ["user", "assistant", "user"] and last[1]["content"] == "Three times."
    out = capsys.readouterr().out
    assert "left out: 16 counts that the judge did not give" in out and "lexical (words, not a judge)" in out
    assert "judge: m; mean count a completion" in out
    assert judged(server, path) == steps  # what could not be read is not asked again
    assert sum(asked.values()) * len(NAMES) == len(server.log)


def test_requests(server):
    """One a behaviour and completion, equal ones read once; the question is told; no JSON is asked for."""
    path = rollouts([line("verification=2"), line("verification=2"), line("x", question=None, step=1)])
    steps = judged(server, path, "--max_new_tokens", 77)
    texts = ("verification=2", "x")
    assert sorted(e["job"] for e in server.log) == sorted((n, t) for n in NAMES for t in texts)
    assert steps[0]["verification"] == counted(2, 2)
    for e in server.log:
        assert "response_format" not in e and e["temperature"] == 0 and e["max_tokens"] == 77
        (message,) = e["messages"]
        assert bh.BEHAVIOURS[e["job"][0]][0] in message["content"]
        shown = "(not given)" if e["job"][1] == "x" else "Which animal calls?"
        assert f"<question>\n{shown}\n- dog\n- cat\n- cow\n" in message["content"]


def test_samples_of_a_step(server):
    """At most so many, spread at random, whatever the concurrency; a larger sample asks only what is new."""
    texts = [f"verification={i % 2} no. {i}" for i in range(40)]
    path = rollouts([line(text, step=i % 2) for i, text in enumerate(texts)])

    def asked(n, concurrency, out):
        before = len(server.log)
        flags = ["--samples_per_step", n, "--concurrency", concurrency]
        behaviours(path, *judge_flags(server), *flags, out=out)
        return {e["job"][1] for e in server.log[before:]}

    five, again = asked(5, 1, "one"), asked(5, 8, "many")
    assert five == again and len(five) == 10 and five != set(texts[:10])
    steps = json.loads(read("one/behaviours.json"))["runs"]["a"]
    assert [s["judge"]["verification"] for s in steps] == [counted(i, 5) for i in range(2)]
    more = asked(8, 8, "one")
    assert len(more) == 6 and not more & five
    assert not asked(8, 8, "one") and len(asked(200, 8, "many")) == 30


def test_killed_and_resumed(server):
    """What has a line is not asked again; what has half a line is."""
    texts, items = [f"verification={i} mode=good@0.05" for i in range(30)], "out/behaviours_items.jsonl"

    def answered():
        return read(items).split(b"\n")[:-1] if os.path.exists(items) else []

    path = completions(*texts)
    process = start_tool(bh, path, *judge_flags(server), "--out", "out", "--concurrency", 4)
    wait_until(lambda: process.poll() is not None or len(answered()) >= 20)
    process.kill()
    process.communicate()
    before = {json.loads(x)["item"] for x in answered()}
    assert process.returncode == -9 and 20 <= len(before) < 100
    assert len(server.log) - len(before) <= 4 * 4 + 1  # no more than what was under way
    with open(items, "ab") as f:
        f.write(b'{"item": "half a li')
    jobs = {f"{bh.read_row(line(t), '')['item']} {name}": (name, t) for t in texts for name in NAMES}
    server.log.clear()
    steps = judged(server, path)
    assert sorted(e["job"] for e in server.log) == sorted(jobs[key] for key in jobs.keys() - before)
    assert steps[0]["verification"] == counted(14.5, 30)
    server.log.clear()
    assert judged(server, path) == steps and not server.log
    os.truncate(items, os.path.getsize(items) - 5)
    assert judged(server, path) == steps and len(server.log) == 1


OTHER = """
--judge other | judge
--seed 1 | seed
--temperature 0.5 | temperature
--max_new_tokens 5 | max_new_tokens
another file | rollouts
another prompt | prompt_version
no judge | judge
damaged | damaged
damaged twice | not written by this command
"""


@pytest.mark.parametrize("change, says", cells(OTHER))
def test_what_does_not_belong_together_is_refused(change, says, server, capsys, monkeypatch):
    path = completions("x")
    judged(server, path)
    flags = [] if change == "no judge" else judge_flags(server)
    flags += change.split() if change.startswith("--") else []
    if change == "another file":
        completions("x", "y")
    if change == "another prompt":
        monkeypatch.setattr(bh, "JUDGE_VERSION", "12345678")
    if change.startswith("damaged"):
        with open("out/behaviours_items.jsonl", "w") as f:
            f.write('{"item": "x", "said": 3}\n' if change == "damaged" else '{"count": 3}\n')
    before = folder()
    behaviours(path, *flags, code=2)
    err = capsys.readouterr().err
    assert says in err and (change.startswith("damaged") or "--out out: holds results of another" in err)
    assert before == folder() and len(server.log) == len(NAMES)


def test_results_of_an_evaluation_stay(server):
    """--out may be the folder of other results; without a judge the tables may be made anew at any time."""
    os.makedirs("out")
    mine = dict.fromkeys(("config.json", "items.jsonl", "report.json"), b"mine")
    for name, content in mine.items():
        with open(f"out/{name}", "wb") as f:
            f.write(content)
    behaviours(completions("x"))
    judged(server, completions("x", "y"))
    assert mine.items() <= folder().items()


def test_failed_requests_are_reported_and_asked_again(server, capsys):
    path = completions("verification=4", "mode=odd")
    for _ in range(2):
        behaviours(path, *judge_flags(server), code=2)
        said = capsys.readouterr()
        assert "4 requests failed" in said.err and "the same command asks them again" in said.err
        assert "4.00 (of 1)" in said.out and "left out: 4 counts" in said.out
    assert len(server.log) == 4 + 4 + 4


def test_hopeless_judges_are_given_up(server, capsys):
    path = completions(*(f"{i} mode=odd" for i in range(50)))
    behaviours(path, *judge_flags(server), "--concurrency", 2, code=2)
    assert "20 requests in a row failed" in capsys.readouterr().err and len(server.log) < 80


def test_options_that_a_judge_refuses(server, capsys):
    """They are left out, and what is asked next goes without."""
    server.options[:] = [
        (name, True) for name in ("temperature", "max_tokens", "max_completion_tokens", "seed")
    ]
    (step,) = judged(server, completions("verification=4"), "--concurrency", 1)
    assert step["verification"] == counted(4) and len(server.log) == 4 + len(NAMES)
    assert not {"temperature", "max_completion_tokens", "seed"} & server.log[-1].keys()
    assert "the server refuses temperature; it is left out" in capsys.readouterr().err


def test_the_key_is_nowhere(server, capsys):
    """Though the server echoes it, in errors and in replies."""
    path = completions("verification=1 mode=leak", "mode=odd", "mode=limit")
    behaviours(path, *judge_flags(server), code=2)
    said, files = capsys.readouterr(), list(folder().values())
    assert {e["key"] for e in server.log} == {KEY} and any(b"***" in f for f in files) and "***" in said.err
    for text in (said.out.encode(), said.err.encode(), *files):
        assert KEY.encode() not in text and server.url.encode() not in text
