"""Omni-R1's claims (arXiv 2505.09439) on a small scale: does GRPO on sound, or on text alone, make a model hear better?

    python -m tools.small_omni && python -m tools.spoken
    python tests/claims.py --task order --seeds 0,1,2

Every row is a policy, every column what it is asked on the held-out questions of the task: voices and contents that
no training had. A cell is the mean over the seeds, its 95 % interval (Wilson, n = the questions), and p against the
base (McNemar; the largest of the seeds). What is done already, in runs/claims, is not done again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import eval as evaluation  # noqa: E402

ROWS = {  # a policy: the flags of its training
    "base": None,
    "GRPO on sound": "--data {spoken}/{task}.jsonl",
    "GRPO on the written questions": "--data {spoken}/{task}_written.jsonl --audio none",
    "GRPO under silence": "--data {spoken}/{task}.jsonl --audio silence",
    "GRPO on another written task": "--data {spoken}/{other}_written.jsonl --audio none",
    "GRPO on the choices alone": "--data {spoken}/{task}_alone.jsonl --audio none",
}
COLUMNS = {  # what is asked: folder of the results, condition within --controls
    "sound": ("heard", "real"),
    "silence": ("heard", "silence"),
    "another clip": ("heard", "shuffled"),
    "rotated": ("heard", "rotated"),
    "written": ("written", ""),
    "choices alone": ("alone", ""),
}
TRAINING = (
    "--lora_rank 16 --lr 3e-4 --lr_schedule linear --beta 0 --no-gradient_checkpointing --prompts_per_step 8 "
    "--max_new_tokens 12 --eval_size 0 --save_every 1000"
)


def run(script: str, words: str) -> None:
    """A command of the project in one thread. Leaves with its last line if it fails."""
    print(f"python {script} {words}", flush=True)
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, script, *words.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python {script} {words}\n{done.stderr.strip()[-500:]}")


def measure(args, row: str, seed: int) -> None:
    """Train the policy of a row, unless it is the base, and ask it everything."""
    out, flags = folder_of(args, row, seed), ROWS[row]
    model = f"--model {args.model} --max_new_tokens 12"
    if flags and not os.path.exists(f"{out}/run/curves.png"):
        resume = f"--resume {out}/run" if os.path.exists(f"{out}/run/config.json") else ""
        fresh = f"--model {args.model} {flags.format(**vars(args))} {TRAINING} --steps {args.steps} "
        fresh += f"--seed {seed} --out {out}/run"
        run("omni_grpo.py", resume or fresh)
    if flags:
        model += f" --adapter {out}/run/adapter"
    stem = f"{args.spoken}/{args.task}"
    asked = {
        "heard": f"--data {stem}_held_out.jsonl --controls",
        "written": f"--data {stem}_written_held_out.jsonl --audio none",
        "alone": f"--data {stem}_alone_held_out.jsonl --audio none",
    }
    for name, words in asked.items():
        if not os.path.exists(f"{out}/{name}/report.json"):
            run("eval.py", f"{model} {words} --out {out}/{name}")


def folder_of(args, row: str, seed: int) -> str:
    return f"{args.out}/{args.task}/{row.replace(' ', '_')}/{seed}"


def results_of(args, row: str, seed: int, column: str) -> tuple[float, dict]:
    """-> accuracy, score by item"""
    folder, condition = COLUMNS[column]
    report, items = evaluation.load_results(f"{folder_of(args, row, seed)}/{folder}/{condition}".rstrip("/"))
    return report["accuracy"], {key: item.score for key, item in items.items()}


def cell(args, row: str, column: str) -> str:
    seeds = args.seeds if ROWS[row] else args.seeds[:1]
    shares, ps = [], []
    _, before = results_of(args, "base", args.seeds[0], column)
    for seed in seeds:
        share, after = results_of(args, row, seed, column)
        shares.append(share)
        lost = sum(before[key] > score for key, score in after.items())
        won = sum(before[key] < score for key, score in after.items())
        ps.append(evaluation.mcnemar(lost, won))
    low, high = evaluation.wilson(statistics.mean(shares), len(before))
    text = f"{100 * statistics.mean(shares):.1f} ({100 * low:.0f} - {100 * high:.0f})"
    if ROWS[row] and column != "rotated":  # an item can be half right there: no coin to toss
        text += f" p {max(ps):.1g}"
    return text


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--task", default="order", help="of tools/spoken.py")
    add("--other", default="sums", help="the other task, of which only the written questions are trained on")
    add("--seeds", default="0,1,2")
    add("--steps", type=int, default=80)
    add("--model", default="runs/small_omni/base")
    add("--spoken", default="runs/spoken")
    add("--out", default="runs/claims")
    add("--workers", type=int, default=2, help="commands at a time, one thread each")
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    jobs = [(row, seed) for seed in args.seeds for row in ROWS if ROWS[row] or seed == args.seeds[0]]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: measure(args, *job), jobs))
    print(f"| {args.task} | {' | '.join(COLUMNS)} |\n| --- |{' --- |' * len(COLUMNS)}")
    table = {row: {column: cell(args, row, column) for column in COLUMNS} for row in ROWS}
    for row, cells in table.items():
        print(f"| {row} | {' | '.join(cells.values())} |")
    with open(f"{args.out}/{args.task}.json", "w", encoding="utf-8") as f:
        json.dump(table, f, indent=1)


if __name__ == "__main__":
    main()
