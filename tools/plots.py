"""log.jsonl of a run -> curves.png. A run draws it at its end; by hand, for a run that is still going on:

python -m tools.plots runs/NAME

Several runs in one picture, and the table of their last held-out accuracies, ablation.md:

python -m tools.plots runs/A runs/B runs/C --out ablation.png
"""

import os
import sys
from collections import Counter, defaultdict
from itertools import chain

import numpy as np

from data import Parser, UserError, exit_code, file_problem, parse_json, write_atomically, write_text
from eval import read_object, wilson

# place in the picture: title, {key of the log: name of its line, or "" for one line with its running median}
PANELS = {
    "A": (
        "held-out accuracy",
        {
            "eval/accuracy": "greedy",
            "eval/accuracy_sampled": "sampled",
            "eval/accuracy_silence": "greedy, silence played",
            "eval/accuracy_once": "greedy, no re-listening",
        },
    ),
    "B": ("reward", {"reward/mean": ""}),
    "C": ("entropy, nats a token", {"policy/entropy": ""}),
    "D": ("KL to the reference, nats a token", {"policy/kl_ref": ""}),
    "E": ("completion length, tokens", {"len/mean": ""}),
}
ACCURACIES = PANELS["A"][1]
EXPLAINED = "Mean of the seeds (95 % interval, Wilson, n = the held-out questions) [lowest - highest seed]."
TITLE = "mean of the seeds in a band from the lowest to the highest; on the right running medians"
NO_INTERVAL = "No interval where config.json does not say how many questions are held out (an older version)."
SAME = ("seed", "out", "keep", "report_to", "save_every")  # runs that differ in these are one variant
STYLES = dict(zip(ACCURACIES, ("o-", "--", "^:", "v-.")))  # theirs, where the colour is the variant's


def draw_curves(out: str) -> None:
    """Raises UserError where there is no log."""
    from matplotlib.figure import Figure

    log = read_log(out)
    fig = Figure(figsize=(13, 5))  # not by pyplot, whose state belongs to the notebook that may call this
    for ax, key, name in panels(fig):
        points = values_of(log, key)
        if points and name:
            ax.plot(*zip(*points.items()), "o-", ms=4, label=name)
        elif points:
            draw_noisy(ax, *zip(*points.items()))
    fig.tight_layout()
    write_atomically(os.path.join(out, "curves.png"), lambda part: fig.savefig(part, dpi=100, format="png"))


def read_log(out: str) -> list[dict]:
    """Raises UserError where there is none."""
    path = os.path.join(out, "log.jsonl")
    problem = file_problem(path)
    if problem:
        raise UserError(f"{problem}; expected the directory of a run")
    with open(path, "rb") as f:
        lines = f.readlines()
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        print(f"{path}: its last line is torn, and left out")
    if not lines:
        raise UserError(f"{path}: holds no step yet; leave this run out")
    return [parse_json(line, f"{path}:{n}") for n, line in enumerate(lines, 1)]


def values_of(log: list[dict], key: str) -> dict[int, float]:
    """step -> value, where there is one; NaN is null in the log"""
    measured = [record for record in log if record.get(key) is not None]
    return {record["step"]: record[key] for record in measured if np.isfinite(record[key])}


def panels(fig):
    """Yields what is to be drawn: (axes, key of the log, name of its line)."""
    axes = fig.subplot_mosaic("AABC;AADE")
    for place, (title, lines) in PANELS.items():
        ax = axes[place]
        for key, name in lines.items():
            yield ax, key, name
        if not ax.lines:
            ax.text(0.5, 0.5, "none in this run", ha="center", color="gray", transform=ax.transAxes)
        elif place == "A":
            ax.legend()
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    axes["A"].set_ylim(0, 1.02)
    fig.supxlabel("step", fontsize=10)


def draw_noisy(ax, x, y) -> None:
    """One value a step: thin, with a running median over it; single outliers do not set the scale."""
    ax.plot(x, y, lw=0.7, alpha=0.4, color="tab:blue")
    ax.plot(x, running_median(y), color="tab:blue")
    low, high = np.percentile(y, [1, 98])
    margin = 0.1 * (high - low) + 1e-3
    ax.set_ylim(low - margin, high + margin)


def running_median(y) -> list[float]:
    n = max(1, len(y) // 20)
    return [np.median(y[max(0, i - n) : i + n + 1]) for i in range(len(y))]


# ------------------------------------------------------------------------------------------------------------
# Runs side by side


def compare(folders: list[str], out: str) -> None:
    """Draws runs into the picture `out`; writes their table beside it, and prints it."""
    stem, kind = os.path.splitext(out)
    if kind not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out}: name the picture of the runs, .png, .pdf or .svg")
    variants = variants_of([read_run(folder) for folder in folders])
    fig = draw_variants(variants)
    write_atomically(out, lambda part: fig.savefig(part, dpi=200, format=kind[1:]))
    text = table(variants)
    write_text(f"{stem}.md", text)
    print(text, end="")


def read_run(folder: str) -> dict:
    """Its config.json, and in it `folder`, `log` and, as `flags`, what makes it another variant."""
    run = read_object(os.path.join(folder, "config.json"))
    if "seed" not in run.get("config", ""):
        raise UserError(f"{folder}: its config.json is not that of a run")
    flags = [f"{name} {value}" for name, value in run["config"].items() if name not in SAME]
    return run | dict(folder=folder, log=read_log(folder), flags=flags)


def variants_of(runs: list[dict]) -> dict[str, list[dict]]:
    """label -> runs that differ in their seed only; of the same seed the first

    The label: the flags that a variant does not share with most, or what its runs' names have in common.
    """
    groups, out = defaultdict(dict), {}
    for run in runs:
        seeds = groups[str((run["flags"], run.get("data")))]
        if seeds.setdefault(run["config"]["seed"], run) is not run:
            print(f"{run['folder']}: left out, a run with its flags and its seed is there already")
    groups = [list(seeds.values()) for seeds in groups.values()]
    n = Counter(chain(*(runs[0]["flags"] for runs in groups)))
    for runs in groups:
        names = [os.path.basename(os.path.abspath(run["folder"])) for run in runs]
        unusual = [short(flag) for flag in runs[0]["flags"] if n[flag] <= len(groups) / 2]
        label = " ".join(unusual) or os.path.commonprefix(names).rstrip("_-") or names[0]
        if label in out:  # paths that end alike, or other data at the same path
            label = f"{label} {runs[0]['folder']}"
        out[label] = runs
    return out


def short(flag: str) -> str:
    """Without folders: a path is known by its name."""
    name, _, value = flag.partition(" ")
    return f"{name} {os.path.basename(value).removesuffix('.0') or 'none'}"


def together(runs: list[dict], key: str):
    """-> the steps at which all runs have a value, [run][step], how many other steps there are"""
    every = [values_of(run["log"], key) for run in runs]
    steps = sorted(set.intersection(*map(set, every)))
    values = np.array([[of_run[step] for step in steps] for of_run in every])
    return steps, values, len(set().union(*every)) - len(steps)


def draw_variants(variants: dict[str, list[dict]]):
    """A colour for each: the mean of its seeds, and a band from the lowest to the highest.       -> figure"""
    from matplotlib.figure import Figure

    if len(variants) > 10:
        raise UserError(f"{len(variants)} variants: ten can be told apart by their colours; name fewer runs")
    fig = Figure(figsize=(11, 5 + len(variants) / 5), layout="constrained")
    cut, legend = defaultdict(list), {}
    for ax, key, name in panels(fig):
        before = len(ax.lines)
        for i, (label, runs) in enumerate(variants.items()):
            steps, values, others = together(runs, key)
            if others:
                cut[label].append(f"{others} of {key}")
            if len(runs) > 1:
                label += f" ({len(runs)} seeds)"
            if not name:
                values = np.array([running_median(of_run) for of_run in values])
            if steps:
                (legend[label],) = ax.plot(steps, values.mean(0), STYLES.get(key, "-"), ms=4, color=f"C{i}")
                ax.fill_between(steps, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
        if name and len(ax.lines) > before:
            ax.plot([], [], STYLES[key], ms=4, color="black", label=name)
    fig.legend(legend.values(), legend.keys(), title=TITLE, loc="outside upper center")
    for label, keys in cut.items():
        print(f"{label}: steps that not all of its seeds have are left out: {', '.join(keys)}")
    return fig


def table(variants: dict[str, list[dict]]) -> str:
    """The accuracies at the last step at which all seeds of a variant were evaluated."""
    keys = [key for key in ACCURACIES if any(together(runs, key)[0] for runs in variants.values())]
    head = ["variant", "seeds", "steps", *(f"{ACCURACIES[key]} %" for key in keys)]
    rows, notes, held_out = [head, ["---"] * len(head)], ["", EXPLAINED], defaultdict(list)
    for label, runs in variants.items():
        n = min(run.get("held_out", 0) for run in runs)
        step = max(together(runs, "eval/accuracy")[0], default=0)
        rows.append([label, len(runs), step, *(cell(runs, key, step, n) for key in keys)])
        files = runs[0].get("data", {})
        asked = files.get("eval_data") or files.get("data"), runs[0]["config"].get("eval_size")
        held_out[str(asked)].append(label)
        if not n and NO_INTERVAL not in notes:
            notes.append(NO_INTERVAL)
    if len(held_out) > 1:
        same = " | ".join(map(", ".join, held_out.values()))
        notes.append(f"Not comparable, other questions (data or --eval_size) are held out: {same}")
    return "\n".join([*(f"| {' | '.join(map(str, row))} |" for row in rows), *notes, ""])


def cell(runs: list[dict], key: str, step: int, n: int) -> str:
    """mean (interval, of n questions) [lowest - highest seed]"""
    steps, values, _ = together(runs, key)
    if step not in steps:
        return ""
    at = values[:, steps.index(step)]
    text = f"{100 * at.mean():.1f}"
    if n:
        low, high = wilson(at.mean(), n)
        text += f" ({100 * low:.1f} - {100 * high:.1f})"
    if len(runs) > 1:
        text += f" [{100 * at.min():.1f} - {100 * at.max():.1f}]"
    return text


def main(argv=None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory")
    parser.add_argument("--out", default="", help="picture of several runs, with their table beside it (.md)")

    def run():
        given = parser.parse_args(argv)
        if given.out or len(given.runs) > 1:
            return compare(given.runs, given.out)
        draw_curves(given.runs[0])
        print(os.path.join(given.runs[0], "curves.png"))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
