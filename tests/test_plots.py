"""Runs side by side: which of them are one variant, what is drawn, what stands in the table, what is refused."""

import json
import os
import re
import shlex
import subprocess

import pytest

import omni_grpo as og
import texts
from tools import plots

FILE = {"data": {"questions": 1000, "hash": "a1"}}
CURVE = {0: 0.25, 10: 0.5, 20: 0.75}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)


def fake(name, accuracy=CURVE, log=(), about=None, **flags):
    """A run's directory. accuracy: step -> greedy; log: further records"""
    os.makedirs(f"runs/{name}")
    config = vars(og.Config(data="x.jsonl", out=f"runs/{name}", **flags))
    about = dict(data=FILE, held_out=100) if about is None else about
    with open(f"runs/{name}/config.json", "w", encoding="utf-8") as f:
        json.dump(dict(config=config) | about, f)
    evaluated = [{"step": step, "eval/accuracy": share} for step, share in accuracy.items()]
    texts.write_lines(f"runs/{name}/log.jsonl", *evaluated, *log)
    return f"runs/{name}"


def rewards(values):
    return [{"step": step, "reward/mean": value} for step, value in enumerate(values, 1)]


@pytest.fixture
def compared(command):
    """compared(*runs) -> (cells of the table by variant, its column names, all that was said)"""

    def compared(*runs):
        code, said = command(plots.main, *runs, "--out", "ablation.png")
        assert code == 0, said
        with open("ablation.png", "rb") as f:
            assert f.read(4) == b"\x89PNG"
        assert said.endswith(texts.read(os.path.abspath("ablation.md")))
        lines = [line for line in said.splitlines() if line.startswith("|")]
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {label: cells for label, *cells in rows}, head, said

    return compared


def figure(*runs):
    """-> (figure, {label: its colour})"""
    fig = plots.draw_variants(plots.variants_of([plots.read_run(run) for run in runs]))
    (legend,) = fig.legends
    names = [text.get_text() for text in legend.get_texts()]
    return fig, dict(zip(names, [line.get_color() for line in legend.legend_handles]))


def drawn_in(ax, colour):
    """-> the points of the line of a colour, and of its band: {step: (low, high)}"""
    (line,) = [line for line in ax.lines if line.get_color() == colour]
    index = [line for line in ax.lines if line.get_color() != "black"].index(line)
    corners = ax.collections[index].get_paths()[0].vertices
    band = {step: corners[corners[:, 0] == step][:, 1] for step in line.get_xdata()}
    points = dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist()))
    return points, {int(step): (low_high.min(), low_high.max()) for step, low_high in band.items()}


# ---- variants


def test_runs_of_other_seeds_are_one_variant(compared):
    runs = [fake(f"b{beta}_{seed}", beta=beta, seed=seed) for beta in (0.0, 0.04) for seed in (0, 1, 2)]
    table, _, _ = compared(*runs)
    assert [(label, cells[0]) for label, cells in table.items()] == [("beta 0", "3"), ("beta 0.04", "3")]


def test_labels_are_the_flags_that_others_do_not_share(compared):
    runs = [fake("b0", beta=0.0), fake("token", beta=0.04, reduce="token")]
    assert list(compared(*runs)[0]) == ["reduce sequence beta 0", "reduce token beta 0.04"]
    runs += [fake("plain_0"), fake("plain_1", seed=1), fake("mixed", shuffle_choices=False)]
    assert list(compared(*runs)[0]) == ["beta 0", "reduce token", "plain", "shuffle_choices False"]


def test_where_nothing_differs_the_label_is_the_name(compared):
    runs = [fake("one"), fake("other", seed=1)]
    assert list(compared(runs[0])[0]) == ["one"] and list(compared(*runs)[0])[0] == "o"
    moved = [fake(f"to_{name}", model=f"models/{name}/base") for name in "xy"]
    assert list(compared(*moved)[0]) == ["model base", "model base runs/to_y"]


def test_a_file_with_other_content_makes_another_variant(compared):
    runs = [fake("a", seed=0), fake("b", seed=1, about=dict(held_out=100, data={"data": dict(hash="b2")}))]
    assert list(compared(*runs)[0]) == ["a", "b"]


def test_the_same_seed_twice_is_not_two_seeds(compared):
    first = fake("a")
    table, _, said = compared(first, fake("again", {0: 1.0, 20: 1.0}), f"{first}/")
    assert table == {"a": ["1", "20", "75.0 (65.7 - 82.5)"]}
    assert said.count("left out, a run with its flags and its seed is there already") == 2


# ---- the picture


def test_a_line_is_the_mean_and_a_band_from_lowest_to_highest():
    shares = ({0: 0.2, 10: 0.3}, {0: 0.4, 10: 0.9}, {0: 0.3, 10: 0.6})
    runs = [fake(f"b0_{seed}", share, beta=0.0, seed=seed) for seed, share in enumerate(shares)]
    fig, colours = figure(*runs, fake("b4", {0: 0.5, 10: 0.1}))
    assert list(colours) == ["beta 0 (3 seeds)", "beta 0.04"] and len(set(colours.values())) == 2
    points, band = drawn_in(fig.axes[0], colours["beta 0 (3 seeds)"])
    assert points == pytest.approx({0: 0.3, 10: 0.6})
    assert band[0] == pytest.approx((0.2, 0.4)) and band[10] == pytest.approx((0.3, 0.9))
    points, band = drawn_in(fig.axes[0], colours["beta 0.04"])
    assert points == pytest.approx({0: 0.5, 10: 0.1}) and band[10] == pytest.approx((0.1, 0.1))
    assert [text.get_text() for text in fig.axes[0].get_legend().get_texts()] == ["greedy"]
    assert "lowest to the highest" in fig.legends[0].get_title().get_text()


def test_noisy_lines_are_running_medians_of_each_seed():
    outlier = [1.0, 1.0, 9.0, 1.0, 1.0]
    runs = [fake("0", log=rewards(outlier)), fake("1", log=rewards([3.0] * 5), seed=1)]
    fig, colours = figure(*runs)
    (ax,) = [ax for ax in fig.axes if ax.get_title() == "reward"]
    points, band = drawn_in(ax, *colours.values())
    assert points == dict.fromkeys(range(1, 6), 2.0) and band[3] == (1, 3)


def test_what_not_all_seeds_have_is_left_out_and_said(capsys):
    cut = fake("0", {0: 0.2, 10: 0.4, 20: 0.6}, rewards([0.5, None, 0.5]))
    runs = [cut, fake("1", {0: 0.4, 5: 0.9, 20: 0.8}, rewards([0.5] * 8), seed=1)]
    fig, colours = figure(*runs)
    points, _ = drawn_in(fig.axes[0], *colours.values())
    assert points == pytest.approx({0: 0.3, 20: 0.7})
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "2 of eval/accuracy, 6 of reward/mean" in said
    assert "none in this run" in [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_legends_lie_beside_the_lines_and_inside_the_picture():
    words = "accuracy=2,think_format=1,consistency=0.3,think_length=0.2,overlong=0.5"
    runs = [fake("short"), fake("long", reward=words, prompt="think_short", scale="none", beta=0.0)]
    fig, _ = figure(*runs)
    fig.savefig(os.devnull, format="png")  # places everything
    box = fig.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
    boxes = [ax.get_tightbbox() for ax in fig.axes] + [fig._supxlabel.get_window_extent()]
    assert not any(box.overlaps(other) for other in boxes)


# ---- the table


def test_the_table_has_mean_interval_of_the_questions_and_range_of_the_seeds(compared):
    """Wilson's interval of 50 of 100 is 40.4 to 59.6, of 85 % of 200 it is 79.4 to 89.3."""
    seeds = [
        fake(f"s{seed}", log=[{"step": 30, "eval/accuracy": share, "eval/accuracy_silence": 0.25}], seed=seed)
        for seed, share in enumerate((0.4, 0.5, 0.6))
    ]
    one = fake("b0", {0: 0.1, 40: 0.85}, about=dict(data=FILE, held_out=200), beta=0.0)
    table, head, said = compared(*seeds, one)
    assert head == ["variant", "seeds", "steps", "greedy %", "greedy, silence played %"]
    greedy, silence = "50.0 (40.4 - 59.6) [40.0 - 60.0]", "25.0 (17.5 - 34.3) [25.0 - 25.0]"
    assert table == {
        "beta 0.04": ["3", "30", greedy, silence],
        "beta 0": ["1", "40", "85.0 (79.4 - 89.3)", ""],
    }
    assert "comparable" not in said and "No interval" not in said


def test_the_step_of_the_table_is_one_at_which_all_seeds_were_evaluated(compared):
    """Not 0, where silence was played to both, nor 15 or 20, where one was evaluated."""
    start = [{"step": 0, "eval/accuracy_silence": 0.5}]
    runs = [fake("0", {10: 0.2, 20: 0.9}, start), fake("1", {10: 0.4, 15: 0.9}, start, seed=1)]
    table, _, _ = compared(*runs)
    assert list(table.values()) == [["2", "10", "30.0 (21.9 - 39.6) [20.0 - 40.0]", ""]]


def test_other_held_out_questions_are_said_in_one_line(compared):
    runs = [fake("a"), fake("b", beta=0.0, eval_size=50), fake("c", scale="none"), fake("d", reduce="token")]
    _, _, said = compared(*runs)
    (line,) = [line for line in said.splitlines() if line.startswith("Not comparable")]
    assert line.endswith("are held out: a, scale none, reduce token | eval_size 50 beta 0")
    held = dict(data={"data": dict(hash="a1"), "eval_data": dict(hash="e1")}, held_out=100)
    trained_on_other = dict(data={"data": dict(hash="b2"), "eval_data": dict(hash="e1")}, held_out=100)
    same = [fake("e", eval_data="e", about=held), fake("f", eval_data="e", beta=0.0, about=trained_on_other)]
    assert "Not comparable" not in compared(*same)[2]
    other = dict(data={"data": dict(hash="a1"), "eval_data": dict(hash="e2")}, held_out=100)
    assert "Not comparable" in compared(same[0], fake("g", eval_data="e", lr=1e-4, about=other))[2]


def test_older_runs_have_no_interval_which_is_said_once(compared):
    runs = [fake("a", about={}), fake("b", about={}, beta=0.0)]
    table, _, said = compared(*runs)
    assert [cells[2] for cells in table.values()] == ["75.0", "75.0"] and said.count("No interval") == 1


def test_runs_without_any_value_have_an_empty_table(compared):
    table, head, _ = compared(fake("a", {}, [{"step": 0}]))
    assert table == {"a": ["1", "0"]} and head == ["variant", "seeds", "steps"]


# ---- what cannot be read


def test_a_torn_line_is_left_out_and_said(compared):
    run = fake("a")
    with open(f"{run}/log.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 30, "eval/accu')
    table, _, said = compared(run)
    assert table["a"][1] == "20" and said.startswith(
        "runs/a/log.jsonl: its last line is torn, and left out\n"
    )


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_no_log_of_a_run_is_one_line(alone, command):
    whole = [] if alone else [fake("whole"), "--out", "x.png"]
    for name, content, word in [
        ("empty", "", "no step yet"),
        ("broken", '{"step": 0\n{"step": 1}\n', ":1: broken JSON"),
    ]:
        run = fake(name)
        with open(f"{run}/log.jsonl", "w", encoding="utf-8") as f:
            f.write(content)
        code, said = command(plots.main, run, *whole)
        assert code == 2 and said.count("\n") == 1 and f"{run}/log.jsonl" in said and word in said
    os.makedirs("runs/nothing")
    code, said = command(plots.main, "runs/nothing", *whole)
    assert code == 2 and said.count("\n") == 1 and "runs/nothing/" in said and "no such file" in said
    assert not os.path.exists("x.png")


def test_a_model_is_no_run(command):
    os.makedirs("base")
    texts.write_lines("base/config.json", {"model_type": "qwen2"})
    code, said = command(plots.main, "base", "--out", "x.png")
    assert code == 2 and said == "error: base: its config.json is not that of a run\n"


@pytest.mark.parametrize("words", [[], ["--out", "x"], ["--out", "x.docx"]])
def test_a_picture_needs_a_name(words, command):
    code, said = command(plots.main, fake("a"), fake("b", beta=0.0), *words)
    assert code == 2 and "name the picture" in said and said.count("\n") == 1


def test_more_variants_than_colours_are_refused(command):
    runs = [fake(f"{i}", lr=(i + 1) * 1e-6) for i in range(11)]
    code, said = command(plots.main, *runs, "--out", "x.png")
    assert code == 2 and said.startswith("error: 11 variants") and not os.path.exists("x.png")
    assert command(plots.main, *runs[:10], "--out", "x.pdf")[0] == 0
    with open("x.pdf", "rb") as f:
        assert f.read(4) == b"%PDF"


# ---- one run, and the documentation


def test_one_run_draws_its_own_curves(command):
    """NaN, which the log has as null, is a gap."""
    run = fake("a", log=rewards([0.5, None, 0.7]))
    assert command(plots.main, run) == (0, f"{run}/curves.png\n")
    assert sorted(os.listdir(run)) == ["config.json", "curves.png", "log.jsonl"] and os.listdir() == ["runs"]


def test_the_recipe_trains_every_variant_and_compares_them(command):
    chapter = texts.DOCS["recipes.md"].partition("## Ablations side by side")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"^    (.*)$", chapter, re.MULTILINE))
    told = subprocess.run(
        ["bash", "-c", 'python() { printf "%q " "$@"; echo; }\n' + lines],
        capture_output=True,
        text=True,
        check=True,
    )
    *trained, (_, tool, *words) = map(shlex.split, told.stdout.splitlines())
    assert len(trained) == 9 and tool == "tools.plots"
    for script, *flags in trained:
        cfg, _ = og.parse_config(flags)
        assert script == "omni_grpo.py"
        fake(cfg.out.removeprefix("runs/"), beta=cfg.beta, reduce=cfg.reduce, seed=cfg.seed)
    runs = sorted(f"runs/ablation/{name}" for name in os.listdir("runs/ablation"))
    code, said = command(plots.main, *runs, *words[1:])
    assert code == 0 and os.path.exists("ablation.md")
    rows = sorted(line.split(" | ")[:2] for line in said.splitlines()[2:5])
    assert rows == [["| beta 0", "3"], ["| beta0.04", "3"], ["| reduce token", "3"]]
