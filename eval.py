"""Evaluation that can be trusted: audio question answering benchmarks, with controls.

    python eval.py --data mmau-test-mini.json --model Qwen/Qwen2.5-Omni-7B --adapter runs/x/adapter \\
                   --out results/x
    python eval.py --data mmau-test-mini.json --model ... --out results/x --controls      is it listening?
    python eval.py --compare results/base results/x                    is it better? paired, item by item
    python eval.py --data ... --base_url http://HOST:PORT/v1 --model NAME         a model behind a server
    python eval.py --score predictions.json [--data FILE]              anybody's predictions, no model
    python eval.py --ask "What is heard first?" clip.wav --choices "a door" "a dog" --model ...

Greedy by default. What the model says is mapped to one choice or to none by `reward.resolve`, the very
function that training rewards; none is wrong, and never a guess. Beside that stand the benchmark's own rule,
the score of three answers that need no ears (random, first choice, longest choice), and controls: silence,
no audio, another item's clip, every rotation of the choices. The prompt is the one of training. A killed run
goes on where it was.

What completions do over training: python -m tools.behaviours. A page that plays rollouts: tools.pages.
"""

import functools
import hashlib
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import numpy as np

import data
from data import PROMPTS, DataError, Embedded, Example, Examples, UserError, knob
from reward import Said, accuracy, resolve, same_choice

# ------------------------------------------------------------------------------------------------------------
# Options: every knob is one line here, and one flag


@dataclass
class Options:
    data: str = knob("", "a benchmark or any questions data.py reads: file, folder or Hub id")
    audio_dir: str = knob("", "where relative audio paths start; none: the folder of the file")
    model: str = knob("Qwen/Qwen2.5-Omni-7B", "local directory or Hub id; with --base_url: its name there")
    base_url: str = knob(
        "",
        "an OpenAI-compatible server that takes sound, http://HOST:PORT/v1; the key is read from "
        "OPENAI_API_KEY; none: the model is loaded here",
    )
    adapter: str = knob("", "runs/NAME/adapter")
    out: str = knob("", "folder of results; none: results/DATA-MODEL, with --score: no files")
    prompt: str = knob(
        "",
        f"{' | '.join(PROMPTS)}, as in training; none: direct, and answer for Countdown, whose reward reads "
        "its tags; caption: describe the clips instead of answering",
        ("", *PROMPTS),
    )
    max_new_tokens: int = knob(0, "longest answer; 0: what the prompt needs")
    samples: int = knob(1, "answers an item; above 1: pass@k, majority vote, pass rates", low=1)
    temperature: float = knob(None, "none: 0 (greedy) for one sample, 1 for more")
    audio: str = knob("real", "controls: what is heard", ("real", "silence", "none", "shuffled"))
    rotate_choices: bool = knob(False, "ask every rotation of the choices; accuracy and consistency")
    controls: bool = knob(False, "real, silence, none, shuffled and rotated, in one table")
    limit: int = knob(0, "only the first items; 0: all")
    batch_size: int = knob(16, "items at once; changes speed and memory, not the answers", low=1)
    rollout_rows: int = knob(128, "answers decoded at once", low=1)
    seed: int = knob(0, "of the samples and of --audio shuffled")
    max_audio_s: float = knob(30.0, "seconds of a clip that are heard, at most 300", above=0, high=300)
    dtype: str = knob("auto", "of the base, as in training", ("auto", "float32", "bfloat16"))
    load_in_4bit: bool = knob(False, "nf4 weights, CUDA only")
    max_relistens: int = knob(-1, "parts that an answer may hear again; 0: none, -1: the prompt's", low=-1)
    relisten_from: str = knob("audio", "as in training", ("audio", "embeddings"))

    def __post_init__(self):
        data.check_knobs(self)
        if self.temperature is None:
            self.temperature = 0.0 if self.samples == 1 else 1.0
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                "--samples above 1 needs a --temperature above 0: greedy answers are all the same"
            )

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or PROMPTS[self.prompt].max_new_tokens

    def first(self, examples: Examples) -> list[Example]:
        """Those that --limit leaves."""
        return examples[: self.limit or None]


KNOBS = {f.name for f in fields(Options)}
LOADED = {"adapter", "dtype", "load_in_4bit", "max_relistens", "relisten_from"}  # of a model that runs here
UNUSED = {  # by what is done: the flags that have no part in it
    "--compare": KNOBS - {"max_audio_s"} | {"score"},
    "--score": KNOBS - {"data", "audio_dir", "out", "max_audio_s"},
    "--controls": {"audio", "rotate_choices"},
    "--ask": set("base_url data audio_dir out rotate_choices controls limit batch_size".split()),
    "--prompt caption": {"audio", "rotate_choices", "controls"},
    "--prompt relisten": {"base_url"},  # a server plays no part again
    "--base_url": {*LOADED, "batch_size", "rollout_rows"},
}


def check_flags(given: dict):
    """Raises UserError for a flag that would be ignored in silence."""
    modes = {f"--{name}" for name, value in given.items() if value} | {f"--prompt {given.get('prompt')}"}
    for mode in UNUSED:
        unused = UNUSED[mode] & given.keys()
        if mode in modes and unused:
            raise UserError(f"--{min(unused)}: has no part in {mode}")


# ------------------------------------------------------------------------------------------------------------
# The benchmarks' own rules, re-implemented from their descriptions


def word_rule(text: str, example: Example) -> bool:
    """MMAU and MMAR: all words of the answer occur, and none that only other choices have.

    Order and counts are lost.
    """
    said = word_set(text)
    answer = word_set(example.choices[example.answer])
    others = set().union(*map(word_set, example.choices)) - answer
    return bool(said) and answer <= said and not said & others


def word_set(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def letter_rule(text: str, example: Example) -> bool | None:
    """MMSU and AIR-Bench: the first character, else the last but one, if it is A to D.

    None: the benchmark leaves the item out of the count.
    """
    text = text.strip().replace("\n", "")
    for letter in (text[:1], text[-2:-1]):
        if letter and letter in "ABCD":
            index = ord(letter) - ord("A")
            return index < len(example.choices) and example.choices[index] == example.choices[example.answer]
    return None


@dataclass(frozen=True)
class Benchmark:
    rule: Callable | None = None  # (text, example) -> right, or None where the benchmark leaves the item out
    by: str = "task"  # the column of its published table
    note: str = ""
    letters: bool = False  # its rule reads letters: a resolved choice is handed to it as one

    def spell(self, example: Example, index: int) -> str:
        """A choice as the rule reads it."""
        return chr(ord("A") + index) if self.letters else example.choices[index]

    def accepts(self, example: Example, index: int) -> bool:
        """Is that choice right, by the rule if there is one?"""
        if self.rule:
            return bool(self.rule(self.spell(example, index), example))
        return same_choice(example.choices, index, example.answer)


BENCHMARKS = {  # by the name of the data format; anything else is scored strictly, and only so
    "MMAU": Benchmark(word_rule),
    "MMAU (Hub)": Benchmark(word_rule),
    "MMAR": Benchmark(word_rule, "modality"),
    "MMSU": Benchmark(letter_rule, "task_name", letters=True),
    "AIR-Bench": Benchmark(letter_rule, "task_name", letters=True),
    "MMAU-Pro": Benchmark(by="category", note="resolved choices, not the official NV-Embed similarity"),
}
COLUMNS = (  # of meta, by which scores are split; --compare by the first six
    "task modality category sub-category sub_category difficulty "
    "task_name language length_type dataset_name question_type split"
).split()


# ------------------------------------------------------------------------------------------------------------
# Statistics


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share p of n (Wilson 1927).

    It also holds for a mean of n scores from 0 to 1, which spread no wider.
    """
    if not n:
        return 0.0, 1.0
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)  # rounding gives -2e-17


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p of b against c discordant pairs (McNemar 1947): a fair coin, b + c times."""
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n)


def bootstrap(differences: list[float], seed: int = 0, repeats: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean of paired differences, items drawn again with replacement.

    Where all are equal that shows no spread. Then Wilson's bound for 0 of n is the share of items that may be
    anywhere from -1 to 1.
    """
    n = len(differences)
    values, counts = np.unique(np.asarray(differences), return_counts=True)
    if len(values) == 1:
        d, unseen = float(values[0]), wilson(0, n)[1]
        return d - unseen * (1 + d), d + unseen * (1 - d)
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=repeats)
    low, high = np.percentile(draws @ values / n, [2.5, 97.5])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------------
# One item: what is asked, what was said, and what that is worth

FAILED = "the request failed, the same command asks again: "  # so begins the error of a line


@dataclass
class Item:
    """Indices of choices count in the order of the data file, whatever was shown."""

    example: Example
    key: str  # in items.jsonl
    clips: list = field(default_factory=list)  # those that are played
    rotations: int = 1  # of the choices, each of which is asked
    lines: dict[int, dict] = field(default_factory=dict)  # of items.jsonl, by rotation

    @property
    def played(self) -> Example:
        """The question with the clips that are played."""
        return replace(self.example, audio=self.clips or None)

    @functools.cached_property
    def marks(self) -> list[list]:
        """What tells its clips from others."""
        return [clip_mark(clip) for clip in self.clips]

    @property
    def missing(self) -> list[int]:
        """The rotations that are still to be asked."""
        return [r for r in range(self.rotations) if r not in self.lines]

    @property
    def answers(self) -> dict[int, dict]:
        """The lines that hold an answer, by rotation."""
        return {r: line for r, line in sorted(self.lines.items()) if line["said"]}

    @property
    def said(self) -> list[list[str]]:
        """[rotation][sample]"""
        return [line["said"] for line in self.answers.values()]

    @property
    def error(self) -> str:
        """Why the clip could not be heard, or the request failed; that counts as wrong."""
        return next((line["error"] for line in self.lines.values() if line["error"]), "")

    @property
    def failed(self) -> int:
        """How many of its rotations a server did not answer."""
        return sum(line["error"].startswith(FAILED) for line in self.lines.values())

    @functools.cached_property
    def resolved(self) -> list[list[int | None]]:
        """[rotation][sample]: the choice that was given as the answer, None where none was."""
        return [[self.choice_in(text, r) for text in line["said"]] for r, line in self.answers.items()]

    def choice_in(self, text: str, rotation: int) -> int | None:
        index = resolve(text, rotate(self.example, rotation).choices)
        if index is None:
            return None
        choices = self.example.choices
        index = (index + rotation) % len(choices)
        return next(i for i in range(index + 1) if same_choice(choices, i, index))

    @functools.cached_property
    def right(self) -> list[list[bool]]:
        """[rotation][sample], by the reward of training; an error is one wrong sample"""
        right = []
        for rotation, line in sorted(self.lines.items()):
            shown = rotate(self.example, rotation)
            right.append([accuracy(Said(text), shown) == 1 for text in line["said"]] or [False])
        return right

    @property
    def score(self) -> float:
        """Share of right answers over rotations and samples; 0 or 1 for one greedy answer."""
        return mean(flatten(self.right))

    @property
    def vote(self) -> int | None:
        """The choice that was given most often; of equals the one given first."""
        votes = Counter(i for i in flatten(self.resolved) if i is not None)
        return votes.most_common(1)[0][0] if votes else None

    @property
    def raw(self) -> str:
        """The first sample, word for word."""
        return next(iter(flatten(self.said)), "")

    @property
    def answer(self) -> str:
        """As a file of predictions has it: the text of the choice, else what was said."""
        return self.raw if self.vote is None else self.example.choices[self.vote]


def flatten(rows) -> list:
    return [x for row in rows for x in row]


def rotate(example: Example, r: int) -> Example:
    """Choice number i moves to place i - r."""
    choices = example.choices[r:] + example.choices[:r]
    answer = example.answer
    if answer is not None:
        answer = (answer - r) % len(choices)
    return replace(example, choices=choices, answer=answer)


def item_key(example: Example) -> str:
    """The same for the same question, wherever its clip lies."""
    return hash_of(json.dumps((example.id, example.question, example.choices, example.answer)))


def data_mark(examples) -> str:
    """The same for the same file; of other sources, how many questions there are and the first of them."""
    if os.path.isfile(examples.path):
        with open(examples.path, "rb") as f:
            return hashlib.file_digest(f, "blake2b").hexdigest()[:16]
    return f"{len(examples)} {hash_of(''.join(map(item_key, examples[:20])))}"


def item_keys(examples: list[Example]) -> list[str]:
    """Items that differ in nothing but the clip, or in nothing at all, are told apart by their order."""
    seen, keys = Counter(), []
    for key in map(item_key, examples):
        seen[key] += 1
        keys.append(key if seen[key] == 1 else f"{key}.{seen[key]}")
    return keys


def hash_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# The report: all scores of a run, as JSON and as a text


def make_report(items: list[Item], examples: Examples, about: dict) -> dict:
    """about: further entries. Items without a known answer have no part in scores."""
    benchmark = BENCHMARKS.get(examples.format, Benchmark())
    known = [item for item in items if item.example.has_answer]
    with_choices = [item for item in known if item.example.choices]
    errors = {item.key: item.error for item in items if item.error}
    report = dict(
        about,
        file=os.path.basename(examples.path),
        format=examples.format,
        version=examples.version,
        n=len(known),
        items=len(items),
        skipped=dict(examples.skipped),
        note=benchmark.note,
        errors=len(errors),
        error_items=errors,
        missing=sum(not item.lines for item in known or items),
    )
    report.update(count_relistens(items))
    if not known:
        report["note"] = "no labels in this file: predictions written, nothing to score"
        return report
    report.update(score_part(known))
    if with_choices:
        report.update(score_officially(with_choices, benchmark))
        report["baselines"] = score_baselines([item.example for item in with_choices], benchmark)
    report.update(score_samples(known, with_choices))
    report.update(score_rotations(with_choices))
    report["by"] = {}
    for name in dict.fromkeys((*COLUMNS, benchmark.by)):
        parts = split_by(known, name)
        if set(parts) != {"None"} and len(parts) <= 100:
            report["by"][name] = {value: score_part(part) for value, part in parts.items()}
    report["by_task"] = report["by"].get(benchmark.by, {})
    return report


def score_part(items: list[Item]) -> dict:
    """Accuracy with its 95 % interval, and in how many answers no choice could be told."""
    share = mean(item.score for item in items)
    answers = flatten(flatten(item.resolved) for item in items if item.example.choices)
    return dict(
        n=len(items),
        accuracy=share,
        interval=wilson(share, len(items)),
        unresolved=answers.count(None),
        answers=len(answers),
    )


def split_by(items: list[Item], name: str) -> dict[str, list[Item]]:
    """By the value of a column of meta, in the order of the values."""
    parts = defaultdict(list)
    for item in items:
        value = item.example.meta.get(name)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        parts[str(value)].append(item)
    return dict(sorted(parts.items()))


def score_officially(items: list[Item], benchmark: Benchmark) -> dict:
    """The benchmark's own rule, on the resolved choices and on what was said, word for word."""
    if benchmark.rule is None:
        return {}
    scores = {}
    for name in ("official_accuracy", "official_accuracy_raw"):
        verdicts = []
        for item in items:
            text = item.raw
            if name == "official_accuracy" and item.vote is not None:
                text = benchmark.spell(item.example, item.vote)
            verdicts.append(benchmark.rule(text, item.example))
        scores[name] = mean(verdict for verdict in verdicts if verdict is not None)
        scores[f"{name}_left_out"] = verdicts.count(None)
    return scores


def score_baselines(examples: list[Example], benchmark: Benchmark) -> dict[str, float]:
    """Three answers that need no ears, scored by the benchmark's rule where it has one."""
    scores = defaultdict(list)
    for example in examples:
        lengths = list(map(len, example.choices))
        right = [benchmark.accepts(example, i) for i in range(len(lengths))]
        scores["random"].append(mean(right))
        scores["first_choice"].append(right[0])
        scores["longest_choice"].append(right[lengths.index(max(lengths))])
    return {name: mean(values) for name, values in scores.items()}


def score_samples(known: list[Item], with_choices: list[Item]) -> dict:
    """pass@k and the majority's score, where there are several samples an item."""
    k = max(map(len, flatten(item.said for item in known)), default=0)
    if k < 2:
        return {}
    scores = {"samples": k, f"pass@{k}": mean(mean(map(any, item.right)) for item in known)}
    if with_choices:
        votes = [(item.example, item.vote) for item in with_choices]
        scores["majority"] = mean(same_choice(e.choices, vote, e.answer) for e, vote in votes)
    return scores


def score_rotations(items: list[Item]) -> dict:
    """Consistency, where every rotation of the choices was asked. It goes by the first sample."""
    if not any(len(item.said) > 1 for item in items):
        return {}
    heard = [item for item in items if item.said]
    choices = [{row[0] for row in item.resolved} for item in heard]
    right = sum(all(row[0] for row in item.right) for item in heard)
    return dict(
        consistency=mean(len(said) == 1 and said != {None} for said in choices),
        right_in_every_rotation=right / len(items),
    )


def count_relistens(items: list[Item]) -> dict:
    """Parts heard again an answer, the share of answers with any, and why others were refused."""
    parts, refused = [], Counter()
    for line in flatten(item.answers.values() for item in items):
        parts += line.get("again", [])
        for reasons in line.get("refused", []):
            refused.update(reasons)
    if not parts:
        return {}
    return dict(
        heard_again=mean(map(len, parts)),
        heard_again_share=mean(map(bool, parts)),
        refused=dict(refused),
    )


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def signed(x: float) -> str:
    return f"{100 * x:+.1f}"


def percents(interval) -> str:
    return " - ".join(map(percent, interval))


def score_cells(part: dict) -> list:
    return [percent(part["accuracy"]), percents(part["interval"]), part["unresolved"]]


def markdown_table(heads: list, rows: list) -> str:
    """What a data file says stays in its cell: on one line, and no end of a column."""
    lines = []
    for cells in (heads, ["---"] * len(heads), *rows):
        cells = [" ".join(str(cell).split()).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report_title(report: dict) -> str:
    title = f"{report['file']}: {report['format']} {report['version']}".rstrip()
    title += f", {report['items']} items"
    if report.get("audio", "real") != "real":
        title += f"; --audio {report['audio']}"
    return title + "".join(f"; {n} skipped: {why}" for why, n in report["skipped"].items())


def report_table(report: dict) -> tuple[list, list]:
    """-> (heads, rows); no rows where nothing is scored"""
    heads = ["", "n", "accuracy %", "95 % interval", "unresolved"]
    if "accuracy" not in report:
        return heads, []
    parts = {"all": report}
    for name, groups in report["by"].items():
        if groups == report["by_task"] or name in ("difficulty", "category"):
            parts.update({f"{name}: {value}": part for value, part in groups.items()})
    return heads, [[name, part["n"], *score_cells(part)] for name, part in parts.items()]


def report_lines(report: dict) -> list[str]:
    """What there is to say below the table."""
    lines = []
    if "official_accuracy" in report:
        line = f"the benchmark's own rule: {percent(report['official_accuracy'])} on the resolved choices, "
        line += f"{percent(report['official_accuracy_raw'])} on what was said, word for word"
        if left_out := report["official_accuracy_raw_left_out"]:
            line += f" ({left_out} left out by it)"
        lines.append(line)
    if "baselines" in report:
        named = [f"{name.replace('_', ' ')} {percent(x)}" for name, x in report["baselines"].items()]
        lines.append("without listening: " + ", ".join(named))
    for key in report:
        if key.startswith("pass@") or key in ("majority", "consistency", "right_in_every_rotation"):
            lines.append(f"{key.replace('_', ' ')}: {percent(report[key])}")
    if left := report.get("left_out"):
        what = "of no item or of an item that an earlier row is of"
        lines.append(f"{len(left)} rows not counted, {what}: {', '.join(left[:5])}")
    if report["errors"] or report["missing"]:
        line = "counted as wrong: " if "accuracy" in report else "not answered: "
        failed = sum(why.startswith(FAILED) for why in report["error_items"].values())
        line += f"{report['errors'] - failed} clips that could not be heard, "
        if failed:
            line += f"{failed} items whose request failed, "
        lines.append(line + f"{report['missing']} items without a prediction")
        lines += [f"  {why}" for why in list(report["error_items"].values())[:10]]
    if "heard_again" in report:
        refused = ", ".join(f"{n} {why}" for why, n in report["refused"].items())
        line = f"heard again: {report['heard_again']:.2f} parts an answer, at least one in "
        line += f"{percent(report['heard_again_share'])} % of them; refused: {refused or 'none'}"
        lines.append(line)
    if report["note"]:
        lines.append(f"note: {report['note']}")
    return lines


def report_text(report: dict) -> str:
    heads, rows = report_table(report)
    table = [markdown_table(heads, rows), ""] if rows else []
    return "\n".join([report_title(report), "", *table, *report_lines(report)])


# ------------------------------------------------------------------------------------------------------------
# Asking a model: an answer is a line of items.jsonl; the settings of all answers of a folder stand beside it


def config_of(options: Options):
    """The settings of training that decide what a policy is shown and how it answers."""
    import omni_grpo

    shared = "model adapter prompt max_new_tokens rollout_rows "
    shared += "max_audio_s dtype load_in_4bit max_relistens relisten_from"
    return omni_grpo.Config(
        audio="real" if options.audio == "shuffled" else options.audio,
        **{name: getattr(options, name) for name in shared.split()},
    )


def load_policy(options: Options):
    import omni_grpo

    return omni_grpo.load_run_policy(config_of(options), train=False)


NO_SETTINGS = (  # no answer depends on them; base_url is entered by itself, without a password
    "data audio_dir out controls limit batch_size rollout_rows base_url".split()
)


def settings_of(options: Options, examples: Examples) -> dict:
    """All that an answer depends on: results of different settings or data never stand in one folder."""
    settings = {name: value for name, value in vars(options).items() if name not in NO_SETTINGS}
    settings.update(
        max_new_tokens=options.new_tokens,
        prompt_text=asdict(PROMPTS[options.prompt]),
        data_fingerprint=data_mark(examples),
    )
    if options.base_url:
        from tools import server

        settings["base_url"] = server.address_of(options.base_url)
        return {name: value for name, value in settings.items() if name not in LOADED}
    import model

    settings.update(
        max_relistens=config_of(options).relistens,
        model_fingerprint=hash_weights(model.find_model(options.model)),
    )
    if os.path.isdir(options.adapter):
        settings["adapter_fingerprint"] = hash_weights(options.adapter)
    return settings


def hash_weights(folder: str) -> str:
    """Of names, sizes, and 64 KiB at the start, the middle and the end of every file."""
    mark, window = hashlib.blake2b(digest_size=8), 65536
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".txt") and path.is_file():
            size = path.stat().st_size
            mark.update(f"{path.name} {size}".encode())
            with path.open("rb") as f:
                for start in (0, size // 2, max(0, size - window)):
                    f.seek(start)
                    mark.update(f.read(window))
    return mark.hexdigest()


def check_settings(out: str, settings: dict, prefix: str = ""):
    """Write the settings into a folder without results. Raises UserError if it has some of other settings."""
    path = f"{out}/{prefix}config.json"
    os.makedirs(out, exist_ok=True)
    results = [f"{out}/{prefix}{name}" for name in ("items.jsonl", "report.json")]
    if not any(os.path.exists(result) and os.path.getsize(result) for result in results):
        data.write_text(path, json.dumps(settings, indent=1))
        return
    before = read_object(path)
    differs = [name for name in settings if before.get(name) != settings[name]]
    if differs:
        raise UserError(f"--out {out}: holds results of another {', '.join(differs)}; give another --out")


def read_object(path: str) -> dict:
    """A JSON object in a file. Raises UserError if it is none."""
    if problem := data.file_problem(path):
        raise UserError(problem)
    with open(path, "rb") as f:
        content = data.parse_json(f.read(), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {content!r:.60}")
    return content


ANSWER = dict(item="", rotation=0, error="", said=[""], heard=[[]])  # a line of items.jsonl
ANSWER |= dict(again=[[[0.0]]], refused=[{"reason": 0}])  # where parts of the clip could be heard again


def check_answer(line, where: str):
    """Raises UserError where a line of items.jsonl has not the shape of ANSWER."""
    if isinstance(line, dict):
        full = dict(again=[], refused=[]) | line
        if all(has_shape(full.get(key), shape) for key, shape in ANSWER.items()):
            return
    raise UserError(f"{where}: is damaged: no answer of eval.py; give another folder")


def has_shape(x, shape) -> bool:
    """Is x of the type of `shape`, and all that it holds of the type of what the shape holds, if anything?"""
    if type(x) is not type(shape):
        return False
    if isinstance(x, dict):
        x, shape = list(x.values()), list(shape.values())
    return not isinstance(x, list) or not shape or all(has_shape(entry, shape[0]) for entry in x)


def content_of(clip):
    """-> bytes, or a path"""
    return clip.read() if isinstance(clip, Embedded) else clip


def clip_mark(clip) -> list:
    """What tells a clip from another: path, size and time of a file; checksum of one inside a data set."""
    content = content_of(clip)
    if isinstance(content, bytes):
        return [repr(clip)[:200], zlib.crc32(content)]
    if not os.path.isfile(content):
        return [content]
    about = os.stat(content)
    return [content, about.st_size, about.st_mtime]


def ask(options: Options, settings: dict, examples: list, played: list, policy=None) -> list[Item]:
    """Ask about every item that has no answer in the folder yet; answers are appended to items.jsonl.

    played: the same examples with the clips that are played, which --audio shuffled changes.
    Raises UserError if the folder holds answers of other settings or on other clips, or if nothing is heard.
    """
    check_settings(options.out, settings)
    items = {}
    for key, example, source in zip(item_keys(examples), examples, played):
        n = len(example.choices) if options.rotate_choices else 1
        items[key] = Item(example, key, source.clips, max(1, n))

    def enter(line: dict, where: str):
        check_answer(line, where)
        item = items.get(line["item"])
        if item is None or line["error"]:  # behind --limit; what could not be heard is tried again
            return
        if line["heard"] != item.marks:
            name = f"{item.example.id:.60} was asked on another clip than {item.marks!s:.300}"
            raise UserError(f"--out {options.out}: {name}; give another --out")
        item.lines[line["rotation"]] = line

    with data.Ledger(f"{options.out}/items.jsonl", "item", enter) as ledger:
        todo = [item for item in items.values() if item.missing]
        if todo:
            ask_missing(options, todo, ledger, policy)
    with_clips = [item for item in items.values() if item.clips]
    if with_clips and not any(item.said for item in with_clips):
        what = "question was answered" if with_clips[0].failed else "clip could be heard"
        raise UserError(f"no {what}, of {len(with_clips)} items: {with_clips[0].error}")
    return list(items.values())


def ask_missing(options: Options, items: list[Item], ledger, policy=None):
    """A server in threads; a policy a batch of items at a time, while threads read the next clips."""

    def take(item: Item, rotation: int, answer: dict):
        line = dict(item=item.key, heard=item.marks, rotation=rotation, **answer)
        ledger.append(line)
        item.lines[rotation] = line

    if options.base_url:
        from tools import served

        served.ask(options, items, take)
        return
    import omni_grpo

    cfg, policy = config_of(options), policy or load_policy(options)

    def load_clips(item: Item):
        return omni_grpo.load_clips_of(policy, cfg, item.played)[0]

    loaded = data.ahead(items, load_clips, workers=4, depth=2 * options.batch_size)
    bar = data.progress(loaded, len(items), "items")
    stream, scores = iter(bar), []
    while batch := list(islice(stream, options.batch_size)):
        for answer in ask_batch(options, cfg, policy, batch):
            take(*answer)
        scores += [item.score for item, _ in batch if item.example.has_answer]
        bar.set_postfix(accuracy=f"{mean(scores):.3f}", refresh=False)


def ask_batch(options: Options, cfg, policy, batch: list):
    """One rollout. The audio tower hears a clip once, for all rotations and samples.

    batch: (item, its clips, or the DataError that says why they cannot be heard).
    Yields (item, rotation, what its line of items.jsonl says of the answer).
    """
    import model
    import omni_grpo

    heard, asked, questions = [], [], []
    for item, clips in batch:
        if isinstance(clips, DataError):
            for rotation in item.missing:
                yield item, rotation, dict(said=[], error=str(clips))
        else:
            heard.append((item, clips))
    embedded = model.embed_clips(policy, [clips for _, clips in heard])
    for (item, clips), audio in zip(heard, embedded):
        for rotation in item.missing:
            prompt = model.encode_prompt(policy, rotate(item.played, rotation), audio, cfg.prompt)
            questions.append((prompt, clips, data.seed_of(options.seed, item.key, rotation)))
            asked.append((item, rotation))
    if not asked:
        return
    groups = omni_grpo.rollout(policy, cfg, *map(list, zip(*questions)), options.samples, options.temperature)
    for (item, rotation), group in zip(asked, groups):
        answer = dict(said=[model.completion_text(policy, c) for c in group], error="")
        if cfg.relistens:
            answer["again"] = [c.heard for c in group]
            answer["refused"] = [dict(c.refused) for c in group]
        yield item, rotation, answer


def shuffle_clips(examples: list[Example], seed: int) -> list[Example]:
    """Every one with the clip of another: the next, in a random order, that has another clip."""
    order = [i for i, e in enumerate(examples) if e.clips]
    random.Random(seed).shuffle(order)
    keys = list(map(data.clip_key, examples))
    out = list(examples)
    for place, i in enumerate(order):
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))
        other = next((j for j in following if keys[j] != keys[i]), None)
        if other is None:
            raise UserError("--audio shuffled: all items have the same clip")
        out[i] = replace(examples[i], audio=examples[other].audio)
    return out


# ------------------------------------------------------------------------------------------------------------
# A run, and what it writes


def run(options: Options, examples: Examples, policy=None) -> tuple[dict, list[Item]]:
    """Answer, score, write everything.       -> (report, items)"""
    played = asked = options.first(examples)
    if options.audio == "shuffled":  # over the whole file, whatever the --limit
        played = shuffle_clips(examples[:], options.seed)[: len(asked)]
    about = settings_of(options, examples)
    items = ask(options, about, asked, played, policy)
    del about["prompt_text"]
    about["items_hash"] = hash_of("".join(sorted(item.key for item in items)))
    report = make_report(items, examples, about)
    write_results(options, report, examples, dict(enumerate(items)))
    write_rates(options.out, {options.audio: items})
    return report, items


def write_results(options: Options, report: dict, examples: Examples, items: dict[int, Item]):
    """items: by the number of the example"""
    from tools import pages

    write_json(f"{options.out}/predictions.json", own_layout(examples, items))
    write_json(f"{options.out}/report.json", report)
    pages.write_report(options.out, report, list(items.values()), options.max_audio_s)


def write_json(path: str, content):
    def plain(value):
        return None if isinstance(value, Embedded) else str(value)

    data.write_text(path, json.dumps(content, indent=1, ensure_ascii=False, default=plain))


def own_layout(examples: Examples, items: dict[int, Item]) -> list[dict]:
    """The benchmark's own rows, with the keys under which its scripts and their predecessors look."""
    rows = []
    for i, item in items.items():
        row = dict(examples.rows_of(i)[0])
        text = letter = item.answer
        if item.vote is not None:
            letter, choices = chr(ord("A") + item.vote), row.get("choices")
            if isinstance(choices, list) and len(choices) == len(item.example.choices):
                text = choices[item.vote]  # with its "(A) ", where the file has it
        row.update(dict.fromkeys(("model_output", "model_prediction", "answer_prediction"), text))
        row.update(response=letter, raw_output=item.raw, resolved=item.vote)
        if len(flatten(item.said)) > 1:
            row["samples"] = item.said
        if item.error:
            row["error"] = item.error
        rows.append(row)
    return rows


def write_rates(out: str, conditions: dict[str, list[Item]]):
    """examples.jsonl: the questions with the share of right answers in their meta.

    `data.py filter` and `--order easy_to_hard` read it.
    """
    path = f"{out}/examples.jsonl"
    if os.path.exists(path):
        os.remove(path)
    rated = []
    for items in zip(*conditions.values()):
        meta = dict(items[0].example.meta)
        for name, item in zip(conditions, items):
            meta["pass_rate" if name == "real" else f"pass_rate_{name}"] = item.score
        rated.append(replace(items[0].example, meta=meta))
    data.write_examples(path, rated, len(rated))


def write_captions(options: Options, examples: Examples) -> list[Item]:
    """Descriptions of every clip, several with --samples, as `python -m tools.generate` reads them."""
    clips, lines = {}, []
    for e in options.first(examples):
        if e.clips:
            clips[data.clip_key(e)] = replace(e, choices=[], answer=None)
    asked = list(clips.values())
    items = ask(options, settings_of(options, examples), asked, asked)
    for item in items:
        if item.said:
            path = save_clip(item.clips[0], f"{options.out}/clips/{item.key}")
            line = dict(id=item.example.id, audio=path, captions=item.said[0])
            line["captioner"] = Path(options.model).name
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    data.write_text(f"{options.out}/captions.jsonl", "".join(lines))
    print(f"{options.out}/captions.jsonl: {len(lines)} clips, {options.samples} captions each; ", end="")
    print(f"{len(items) - len(lines) - sum(item.failed for item in items)} clips could not be heard")
    return items


def save_clip(clip, path: str) -> str:
    """-> where it is: a clip from inside a data set is written to `path`"""
    content = content_of(clip)
    if isinstance(content, bytes):
        content = data.write_clip(path, content)
    return os.path.abspath(content)


# ------------------------------------------------------------------------------------------------------------
# Controls and comparisons

CONTROLS = {
    "real": {},
    "silence": dict(audio="silence"),
    "none": dict(audio="none"),
    "shuffled": dict(audio="shuffled"),
    "rotated": dict(rotate_choices=True),
    "once": dict(max_relistens=0),  # the clip is heard once, whatever a re-listening policy asks for
}


def run_controls(options: Options, examples: Examples) -> list[Item]:
    """The standard set, one table: how much of the score is hearing?      -> the items of all conditions"""
    if not any(e.has_answer for e in options.first(examples)):
        raise UserError(f"--data {options.data}: no answers in this file, and controls compare scores")
    settings = settings_of(options, examples)
    check_settings(options.out, settings)
    policy = None if options.base_url else load_policy(options)
    reports, items, rows = {}, {}, []
    for name, change in CONTROLS.items():
        if name == "once" and not settings.get("max_relistens"):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        changed = replace(options, out=f"{options.out}/{name}", **change)
        reports[name], items[name] = run(changed, examples, policy)
        pair, difference, p = compare_items(items["real"], items[name]), "", ""
        if name != "real":
            difference = signed(pair["difference"])
        if name not in ("real", "rotated"):  # an item can be half right: no coin to toss
            p = f"{pair['p']:.2g}"
        rows.append([name, *score_cells(reports[name]), difference, p])
    heads = ["condition", "accuracy %", "95 % interval", "unresolved", "against real", "p"]
    print(f"{report_text(reports['real'])}\n\n{markdown_table(heads, rows)}\n")
    consistency = percent(reports["rotated"].get("consistency", 0))
    print(f"rotated: the same answer in every rotation for {consistency} % of the items")
    asked = flatten(items.values())
    del items["rotated"]
    write_rates(options.out, items)
    write_json(f"{options.out}/report.json", reports)
    return asked


def compare_items(base: list[Item], new: list[Item]) -> dict:
    """Item by item.       -> accuracies, difference with its interval, p, items that flipped"""
    before, after = [item.score for item in base], [item.score for item in new]
    differences = [b - a for a, b in zip(before, after)]
    lost = [item.key for item, a, b in zip(new, before, after) if a >= 0.5 > b]
    won = [item.key for item, a, b in zip(new, before, after) if b >= 0.5 > a]
    return dict(
        n=len(new),
        base=mean(before),
        new=mean(after),
        difference=mean(differences),
        interval=bootstrap(differences),
        p=mcnemar(len(lost), len(won)),
        lost=lost,
        won=won,
    )


def load_results(folder: str) -> tuple[dict, dict[str, Item]]:
    """A finished run.       -> (report, items by key). Raises UserError where there is none."""
    report = read_object(f"{folder}/report.json")
    needed = (
        "file format version items n skipped note errors error_items missing items_hash accuracy by by_task"
    )
    lacks = sorted(set(needed.split()) - report.keys())
    if lacks:
        raise UserError(f"{folder}: no finished and scored results of eval.py there (no {', '.join(lacks)})")
    examples = list(Examples(f"{folder}/examples.jsonl"))
    items = {key: Item(e, key, e.clips) for key, e in zip(item_keys(examples), examples)}
    answers = data.TextRows(f"{folder}/items.jsonl")
    for i in range(len(answers)):
        line = answers[i]
        check_answer(line, answers.where(i))
        if item := items.get(line["item"]):
            item.lines[line["rotation"]] = line
            if report.get("audio") == "shuffled":
                item.clips = [str(mark[0]) for mark in line["heard"]]
    return report, items


def compare(base: str, new: str, max_audio_s: float):
    """Paired, per item. Raises UserError on different items, versions or prompts: what would that compare?"""
    from tools import pages

    old_report, before = load_results(base)
    report, after = load_results(new)
    for key in ("items_hash", "version", "prompt", "rotate_choices"):
        a, b = old_report.get(key), report.get(key)
        if a != b:
            what = "items" if key == "items_hash" else key
            raise UserError(f"--compare: {base} and {new} have different {what} ({a!s:.60}, {b!s:.60})")

    parts = {"all": list(after.values())}
    for name in COLUMNS[:6]:
        groups = split_by(parts["all"], name)
        if 1 < len(groups) <= 30:
            parts.update({f"{name}: {value}": part for value, part in groups.items()})
    pairs = {name: compare_items([before[item.key] for item in part], part) for name, part in parts.items()}
    rows = []
    for name, pair in pairs.items():
        row = [name, pair["n"], percent(pair["base"]), percent(pair["new"]), signed(pair["difference"])]
        row.append(" to ".join(map(signed, pair["interval"])))
        rows.append(row + [len(pair["won"]), len(pair["lost"]), f"{pair['p']:.2g}"])
    heads = ["", "n", "base %", "new %", "difference", "95 % interval", "won", "lost", "p"]
    print(f"{base} -> {new}, {len(after)} items\n\n{markdown_table(heads, rows)}")
    print("\np: McNemar's exact test on the items that changed sides; interval: bootstrap over items")

    flips = {}
    for name in ("won", "lost"):
        flips.update(dict.fromkeys(pairs["all"][name], name))
        for key in pairs["all"][name][:5]:
            example = after[key].example
            print(f"  {name}: {example.id}: {example.question:.80} -> {after[key].answer:.40}")
    write_json(f"{new}/compare.json", dict(pairs["all"], before=base, after=new))
    pages.write_report(new, report, parts["all"], max_audio_s, flips)
    print(f"{new}/compare.json; {new}/report.html now shows the flipped ones")


# ------------------------------------------------------------------------------------------------------------
# Other people's predictions

PREDICTIONS = "raw_output model_output model_prediction answer_prediction response prediction output".split()
ASKED = (  # the columns of all formats that hold the question or its choices
    "question instruction question_text question_content templ_values QuestionText query messages "
    "conversations nums target choices multi_choice choice_a choice_b choice_c choice_d"
).split()


def score_file(path: str, options: Options) -> dict:
    """Score anybody's predictions: rows of the benchmark, or what tells the items of --data apart.

    Raises DataError if no row has a prediction, or if a row asks something else than the item that it names.
    """
    rows, places = read_predictions(path)
    examples = Examples(options.data or path, options.audio_dir)
    asked = unique_examples(examples)
    keys = [prediction_key(row) for row in rows]
    if not any(keys):
        raise DataError(f"{path}: no row has a prediction; looked for {', '.join(PREDICTIONS)}")
    if options.data:
        numbers = set(range(len(rows)))
        found = join(rows, asked)
        check_joined(places, rows, examples, found)
    else:
        numbers = {first for first, *_ in examples.items}
        found = {j: examples.items[j][0] for j in asked}
    items = {j: Item(example, item_key(example), example.clips) for j, example in asked.items()}
    for j, i in found.items():
        if keys[i]:
            items[j].lines[0] = dict(said=[str(rows[i][keys[i]])], error="")
    settings = dict(data_fingerprint=data_mark(examples), predictions_fingerprint=hash_of(json.dumps(rows)))
    about = dict(
        settings,
        predictions=Path(path).name,
        left_out=[places[i] for i in sorted(numbers - set(found.values()))],
        prediction_key=", ".join(key for key in PREDICTIONS if key in keys),
    )
    report = make_report(list(items.values()), examples, about)
    if options.out:
        os.makedirs(options.out, exist_ok=True)
        with data.claimed(options.out):
            check_settings(options.out, settings)
            write_results(options, report, examples, items)
    print(report_text(report))
    if options.out:
        print(f"\n{options.out}: predictions.json, report.json, report.html")
    return report


def read_predictions(path: str) -> tuple[list[dict], list[str]]:
    """-> rows, and where in the file each stands: lines or a list of objects, lmms-eval's samples (the
    benchmark's row is their `doc`), or one object of ids and predictions."""
    source = data.TextRows(path)
    rows, places = [source[i] for i in range(len(source))], list(map(source.where, range(len(source))))
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list or lines of JSON objects, one a prediction")
    if len(rows) == 1 and not prediction_key(rows[0]) and {*map(type, rows[0].values())} == {str}:
        rows = [dict(id=name, prediction=said) for name, said in rows[0].items()]
        return rows, places * len(rows)
    for i, row in enumerate(rows):
        said = row.get("filtered_resps") or row.get("resps")
        while isinstance(said, list) and said:
            said = said[0]
        if isinstance(row.get("doc"), dict) and isinstance(said, str):
            rows[i] = row["doc"] | dict(prediction=said)
    return rows, places


def prediction_key(row: dict) -> str:
    """Of each row by itself: files are merged from several."""
    return next((key for key in PREDICTIONS if row.get(key) is not None), "")


def unique_examples(examples: Examples) -> dict[int, Example]:
    """-> {index: example}: no item counts twice."""
    first = {}
    for j, example in enumerate(examples):
        first.setdefault((item_key(example), str(example.audio)), (j, example))
    return dict(first.values())


def names_of(row: dict) -> list[tuple]:
    """What a row is found by, the surest first: id, clip, question.

    With the question first, where several items share an id or a clip.
    """
    question = ("question", str(row.get("question")))
    names = [("id", str(row[key])) for key in ("id", "uniq_id") if row.get(key) not in (None, "")]
    for key in ("audio_id", *data.CLIP_KEYS.split("|")):
        if row.get(key):
            names.append(("clip", data.stem_of(str(row[key]).strip("[]'"))))
    return [*flatten((name + question, name) for name in names), question]


def join(rows: list[dict], asked: dict[int, Example]) -> dict[int, int]:
    """-> {item: the first row that has one of its names}; a name that several items share leads to none."""
    row_of = {}
    for i, row in enumerate(rows):
        for name in names_of(row):
            row_of.setdefault(name, i)
    sought = {}
    for j, e in asked.items():
        audio = e.audio.path if isinstance(e.audio, Embedded) else e.audio
        sought[j] = names_of(dict(id=e.id, audio=audio, question=e.question))
    owners = Counter(flatten(map(set, sought.values())))
    found = {}
    for j, names in sought.items():
        for name in names:
            if name in row_of and owners[name] == 1:
                found.setdefault(j, row_of[name])
    return found


def check_joined(places: list[str], rows: list[dict], examples: Examples, found: dict[int, int]):
    """Raises DataError if nothing was found, or if a row asks something else than its item."""
    remedy = f"of {examples.path}; give the file that was asked"
    if not found:
        raise DataError(f"{places[0]}: no row has an id, a clip or a question {remedy}")
    for j, i in sorted(found.items(), key=lambda pair: pair[1]):
        own = examples.rows_of(j)[0]
        for column in ASKED:
            here, there = rows[i].get(column), own.get(column)
            if here and there and data.normal_words(str(here)) != data.normal_words(str(there)):
                raise DataError(f"{places[i]}: its question or choices are not those {remedy}")


# ------------------------------------------------------------------------------------------------------------
# Command line


def evaluate(options: Options):
    """--data: one run, or all controls, or captions."""
    examples = Examples(options.data, options.audio_dir)
    if not options.out:
        options.out = f"results/{Path(options.data).stem}-{Path(options.model).name}"
    if not options.prompt:  # the reward of Countdown reads the tags
        options.prompt = "answer" if any(e.is_countdown for e in options.first(examples)) else "direct"
    os.makedirs(options.out, exist_ok=True)
    with data.claimed(options.out):
        if options.controls:
            items = run_controls(options, examples)
        elif options.prompt == "caption":
            items = write_captions(options, examples)
        else:
            report, items = run(options, examples)
            print(report_text(report))
            print(f"\n{options.out}: predictions.json, report.json, report.html, examples.jsonl")
    if failed := sum(item.failed for item in items):
        raise UserError(f"{failed} requests failed; the same command asks them again")


def main(argv=None) -> int:
    parser = data.Parser(description=__doc__)
    parser.add_knobs(Options)
    add = parser.add_argument
    add("--compare", nargs=2, metavar=("BASE", "NEW"), help="two folders of results, paired")
    add("--score", metavar="PREDICTIONS", help="score a file; --data where it holds no questions")
    add(
        "--ask",
        nargs="+",
        metavar="TEXT",
        help="a question, then clips; only clips: questions from the terminal",
    )
    add("--choices", nargs="+", metavar="TEXT", help="of --ask: what the answer may be")

    def command():
        given = vars(parser.parse_args(argv))
        check_flags(given)
        for name in ("data", "score", "compare", "base_url", "model"):
            value = given.get(name, "not given")
            if not all(value if isinstance(value, list) else [value]):
                raise UserError(f"--{name}: is empty")
        folders, predictions = given.pop("compare", None), given.pop("score", None)
        words, choices = given.pop("ask", None), given.pop("choices", [])
        options = Options(**given)
        if choices and not words:
            raise UserError("--choices: belong to --ask")
        if words:
            from tools.ask import answer

            options.prompt = options.prompt or "direct"
            answer(options, words, choices)
        elif folders:
            compare(*folders, options.max_audio_s)
        elif predictions:
            score_file(predictions, options)
        elif options.data:
            evaluate(options)
        else:
            raise UserError(
                "nothing to do: give --data, --compare, --score or --ask (--help lists the flags)"
            )

    return data.exit_code(command)


if __name__ == "__main__":
    data.leave(main())
