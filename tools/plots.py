"""log.jsonl of a run -> curves.png. A run draws it at its end; by hand, for a run that is still going on:

python -m tools.plots runs/NAME
"""

import json
import math
import os
import sys

from data import UserError, exit_code, file_problem, write_atomically

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


def draw_curves(out: str) -> None:
    """Raises UserError where there is no log."""
    path = os.path.join(out, "log.jsonl")
    problem = file_problem(path)
    if problem:
        raise UserError(f"{problem}; expected the directory of a run")
    with open(path, encoding="utf-8") as f:
        log = [json.loads(line) for line in f]

    from matplotlib.figure import Figure

    fig = Figure(figsize=(13, 5))  # not by pyplot, whose state belongs to the notebook that may call this
    axes = fig.subplot_mosaic("AABC;AADE")
    for place, (title, lines) in PANELS.items():
        ax = axes[place]
        for key, name in lines.items():
            points = [(record["step"], record[key]) for record in log if key in record]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if points and name:
                ax.plot(*zip(*points), "o-", ms=4, label=name)
            elif points:
                draw_noisy(ax, *zip(*points))
        if not ax.lines:
            ax.text(0.5, 0.5, "none in this run", ha="center", color="gray", transform=ax.transAxes)
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    axes["A"].set_ylim(0, 1.02)
    if axes["A"].lines:
        axes["A"].legend()
    fig.supxlabel("step", fontsize=10)
    fig.tight_layout()
    write_atomically(os.path.join(out, "curves.png"), lambda part: fig.savefig(part, dpi=100, format="png"))


def draw_noisy(ax, x, y) -> None:
    """One value a step: thin, with a running median over it; single outliers do not set the scale."""
    import numpy as np

    n = max(1, len(y) // 20)
    median = [np.median(y[max(0, i - n) : i + n + 1]) for i in range(len(y))]
    ax.plot(x, y, lw=0.7, alpha=0.4, color="tab:blue")
    ax.plot(x, median, color="tab:blue")
    low, high = np.percentile(y, [1, 98])
    margin = 0.1 * (high - low) + 1e-3
    ax.set_ylim(low - margin, high + margin)


def main(argv=None) -> int:
    from data import Parser

    parser = Parser(description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the run's directory")

    def run():
        out = parser.parse_args(argv).run
        draw_curves(out)
        print(os.path.join(out, "curves.png"))

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
