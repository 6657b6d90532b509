"""Omni-R1's claims (arXiv 2505.09439) on a small scale: does GRPO on sound, or on text alone, make a model hear better?

    python -m tools.small_omni && python -m tools.spoken
    python tests/claims.py --task order --seeds 0,1,2

Every row is a policy, every column what it is asked on the held-out questions of the task: voices and contents that
no training had. A cell is the mean over the seeds, its 95 % interval (Wilson, n = the questions), and p against the
base (McNemar; the largest of the seeds). What is done already, in runs/claims, is not done again, so that seeds and
rows can be added; --workers 0 shows what is there. What the task does not have (who speaks is not told in writing) is
left out.
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

ROWS = {  # a policy: what it is trained on
    "base": "",
    "GRPO on sound": "--data {spoken}/{task}.jsonl",
    "GRPO on the written questions": "--data {spoken}/{task}_written.jsonl --audio none",
    "GRPO under silence": "--data {spoken}/{task}.jsonl --audio silence",
    "GRPO on another written task": "--data {spoken}/{other}_written.jsonl --audio none",
    "GRPO on the choices alone": "--data {spoken}/{task}_alone.jsonl --audio none",
}
COLUMNS = {  # what is asked
    "sound": "--data {spoken}/{task}_held_out.jsonl",
    "silence": "--data {spoken}/{task}_held_out.jsonl --audio silence",
    "another clip": "--data {spoken}/{task}_held_out.jsonl --audio shuffled",
    "rotated": "--data {spoken}/{task}_held_out.jsonl --rotate_choices --limit 80",
    "written": "--data {spoken}/{task}_written_held_out.jsonl --audio none",
    "choices alone": "--data {spoken}/{task}_alone_held_out.jsonl --audio none",
}
STYLES = {  # how it is to answer: flags of both, and of the training
    "direct": ("--max_new_tokens 12", ""),
    "think_short": ("--prompt think_short --max_new_tokens 64", "--reward accuracy=2,think_format=1"),
    "structured": (
        "--prompt structured --max_new_tokens 128",
        "--reward accuracy=1,structure=0.5 --cold_start_data {out}/{task}_structured.jsonl --cold_start_steps 40",
    ),
}
TRAINING = (
    "--lora_rank 16 --lr 3e-4 --lr_schedule linear --beta 0 --no-gradient_checkpointing --prompts_per_step 8 "
    "--eval_size 0 --save_every 1000 --steps {steps} --seed {seed} --out {folder}/run"
)
STRUCTURED = (  # a trace for the cold start, out of what is said and the answer
    "<THINK><PLANNING>I listen to what is said.</PLANNING><CAPTION>{said}</CAPTION><REASONING>{question} It is "
    "{answer}.</REASONING><SUMMARY>It is {answer}.</SUMMARY></THINK><RESPONSE>{answer}</RESPONSE>"
)


def run(script: str, words: str) -> None:
    """A command of the project in one thread. Leaves with its last lines if it fails."""
    print(f"python {script} {words}", flush=True)
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, script, *words.split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python {script} {words}\n{done.stderr.strip()[-500:]}")


def measure(args, row: str, seed: int) -> None:
    """Train the policy of a row, unless it is the base, and ask it everything."""
    folder = folder_of(args, row, seed)
    words = vars(args) | dict(seed=seed, folder=folder)
    both, training = STYLES[args.style]
    both = f"--model {args.model} {both}"
    if ROWS[row] and not os.path.exists(f"{folder}/run/curves.png"):
        flags = f"{both} {ROWS[row]} {training} {TRAINING}".format(**words)
        started = os.path.exists(f"{folder}/run/config.json")
        run("omni_grpo.py", f"--resume {folder}/run" if started else flags)
    if ROWS[row]:
        both += f" --adapter {folder}/run/adapter"
    for column, flags in COLUMNS.items():
        out = results_folder(args, row, seed, column)
        if is_there(args, flags) and not os.path.exists(f"{out}/report.json"):
            run("eval.py", f"{both} {flags} --out {out}".format(**words))


def is_there(args, flags: str) -> bool:
    path = flags.format(**vars(args)).partition("--data ")[2].split(" ")[0]
    return not path or os.path.exists(path)


def folder_of(args, row: str, seed: int) -> str:
    return f"{args.out}/{args.task}_{args.style}/{row.replace(' ', '_')}/{seed}"


def results_folder(args, row: str, seed: int, column: str) -> str:
    return f"{folder_of(args, row, seed)}/{column.replace(' ', '_')}"


def results_of(args, row: str, seed: int, column: str) -> tuple[float, dict]:
    """-> accuracy, score by item"""
    report, items = evaluation.load_results(results_folder(args, row, seed, column))
    return report["accuracy"], {key: item.score for key, item in items.items()}


def seeds_of(args, row: str, columns: list[str]) -> list[int]:
    """Those that were asked everything."""
    reports = {seed: [results_folder(args, row, seed, column) for column in columns] for seed in args.seeds}
    return [s for s, of_seed in reports.items() if all(os.path.exists(f"{x}/report.json") for x in of_seed)]


def cell(args, row: str, seeds: list[int], column: str) -> str:
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


def write_traces(args) -> None:
    """The cold start of the structured format: the questions with a `target`."""
    with open(f"{args.spoken}/{args.task}.jsonl", encoding="utf-8") as f:
        heard = [json.loads(line) for line in f]
    with open(f"{args.spoken}/{args.task}_written.jsonl", encoding="utf-8") as f:
        said = [json.loads(line)["question"].split('"')[1] for line in f]
    os.makedirs(args.out, exist_ok=True)
    with open(f"{args.out}/{args.task}_structured.jsonl", "w", encoding="utf-8") as f:
        for row, text in zip(heard, said, strict=True):
            answer = row["choices"][row["answer"]]
            row["target"] = STRUCTURED.format(said=text, question=row["question"], answer=answer)
            row["audio"] = os.path.abspath(f"{args.spoken}/{row['audio']}")
            f.write(json.dumps(row) + "\n")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--task", default="order", help="of tools/spoken.py")
    add("--other", default="sums", help="the other task, of which only the written questions are trained on")
    add("--rows", default=",".join(ROWS), help="the base is always one of them")
    add("--style", default="direct", choices=STYLES)
    add("--seeds", default="0,1,2")
    add("--steps", type=int, default=50)
    add("--model", default="runs/small_omni/base")
    add("--spoken", default="runs/spoken")
    add("--out", default="runs/claims")
    add("--workers", type=int, default=2, help="commands at a time, one thread each")
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    if args.style == "structured":
        write_traces(args)
    rows = [row for row in ROWS if row in ("base", *args.rows.split(",")) and is_there(args, ROWS[row])]
    jobs = [(row, seed) for seed in args.seeds for row in rows if ROWS[row] or seed == args.seeds[0]]
    if args.workers:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: measure(args, *job), jobs))
    columns = [column for column, flags in COLUMNS.items() if is_there(args, flags)]
    print(f"| {args.task}, {args.style} | {' | '.join(columns)} |\n| --- |{' --- |' * len(columns)}")
    table = {}
    for row in rows:
        seeds = seeds_of(args, row, columns)
        name = row if row == "base" else f"{row}, seeds {' '.join(map(str, seeds))}"
        if seeds:
            table[name] = {column: cell(args, row, seeds, column) for column in columns}
            print(f"| {name} | {' | '.join(table[name].values())} |")
    with open(f"{args.out}/{args.task}_{args.style}.json", "w", encoding="utf-8") as f:
        json.dump(table, f, indent=1)


if __name__ == "__main__":
    main()
