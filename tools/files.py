"""What is done with a file of questions: `python data.py check | convert | folder | filter`."""

import collections
import contextlib
import json
import os
import random
import zlib
from array import array
from dataclasses import dataclass

import data
from data import (
    SPLITS,
    DataError,
    Examples,
    FolderRows,
    Parser,
    UserError,
    check_knobs,
    clip_problem,
    file_problem,
    find_sounds,
    held_out,
    knob,
    new_file,
    oddities,
    progress,
    write_examples,
)
from tools.check import check_file


def convert_file(path, out, audio_dir, columns, drop_bad):
    """Any known format -> our JSONL. drop_bad: without lines that cannot be read or whose clip is missing."""
    new_file(out)
    examples, bad = Examples(path, audio_dir, columns), []

    def good_examples():
        for i in range(len(examples)):
            try:
                example = examples[i]
                for clip in example.clips:
                    if drop_bad and isinstance(clip, str) and (problem := clip_problem(clip)):
                        raise DataError(f'{examples.where(i)}: field "audio": {problem}')
                examples.noted.update(oddities(example))
                yield example
            except DataError as e:
                bad.append(str(e))
                if not drop_bad and len(bad) == 10:
                    break
        if bad and not drop_bad:  # before the file gets its name
            raise DataError("\n".join(bad) + "\nmend these lines, or leave them out with --drop_bad")
        if len(bad) == len(examples):
            raise DataError(f"{path}: every line is bad, the first: {bad[0]}")

    n = write_examples(out, good_examples(), len(examples))
    left_out = f"; {len(bad)} left out, the first: {bad[0]}" if bad else ""
    print(f"{examples}\n{out}: {n} examples{left_out}")


def questions_from_folder(path, out, eval_size, n_choices):
    """A folder of sounds -> questions to train on, and in OUT_eval.jsonl those to hold out (-1: a tenth).

    Files with the same content fall on the same side. Of a folder with splits, the training split becomes
    OUT, and the first of validation and test OUT_eval.
    """
    stem, ending = os.path.splitext(out)
    out_eval = f"{stem}_eval{ending}"
    new_file(out, out_eval)
    _, splits, _ = find_sounds(path)
    if splits:
        if len(splits) == 1 or any(len(folders) > 1 for folders in splits.values()):
            found = ", ".join(sum(splits.values(), []))
            raise DataError(f"{path}: holds several folders of one split, {found}; give one set at a time")
        first, second, *others = sorted(splits, key=SPLITS.index)
        for name, split in ((out, first), (out_eval, second)):
            examples = read_folder(splits[split][0], n_choices)
            n = write_examples(name, examples, len(examples))
            print(f"{examples}\n{name}: {n} questions, the split {split}")
        for split in others:
            print(f"not used: the split {split} in {splits[split][0]}")
        return
    examples, keys = read_folder(path, n_choices), array("L")
    for example in progress(examples, len(examples), "clips"):
        if problem := file_problem(example.audio):
            raise DataError(f"{problem}; take it out of the folder")
        with open(example.audio, "rb") as f:
            keys.append(zlib.crc32(f.read()))
    train, held = held_out(keys, len(keys) // 10 if eval_size < 0 else eval_size)
    print(examples)
    for name, indices in ((out, train), (out_eval, held)):
        if indices:
            n = write_examples(name, (examples[i] for i in indices), len(indices))
            print(f"{name}: {n} questions on {len({keys[i] for i in indices})} clips")
    print(f"{len(examples.pools[''])} labels, {len(examples.pools) - 1} families")


def read_folder(path, n_choices):
    examples = Examples(path)
    if not isinstance(examples.rows, FolderRows):
        raise DataError(f"{path}: expected a folder of sounds, found {examples.format} format; use convert")
    examples.n_choices = n_choices
    return examples


def filter_file(path, out, max, seed, **conditions):
    """Filter by what `eval.py --samples` measured: pass_rate, pass_rate_silence and pass_rate_none of `meta`.

    Keeps questions that are sometimes right (Step-Audio-R1: 3 to 6 of 8 samples), and drops those that are as
    right without the sound (AudioMCQ's strong audio contribution).
    """
    new_file(out)
    examples, dropped, kept = Examples(path), collections.Counter(), []
    for i, example in enumerate(examples):
        try:
            reason = reason_to_drop(example.meta, **conditions)
        except DataError as e:
            raise DataError(f'{examples.where(i)}: field "meta": {e}') from None
        if reason:
            dropped[reason] += 1
        else:
            kept.append(i)
    if 0 < max < len(kept):
        dropped["over --max"] = len(kept) - max
        kept = sorted(random.Random(seed).sample(kept, max))
    counts = "".join(f"; {n} dropped: {reason}" for reason, n in dropped.most_common())
    if not kept:
        raise UserError(f"{path}: none of {len(examples)} examples is left{counts}")
    n = write_examples(out, (examples[i] for i in kept), len(kept))
    print(f"{out}: {n} of {len(examples)} examples{counts}")


def reason_to_drop(meta, pass_rate, drop_answerable_without_audio, where):
    """ "" to keep it. Raises DataError if a rate that is needed is not there."""
    if pass_rate:
        low, high = pass_rate
        rate = read_rate(meta, "pass_rate")
        if not low <= rate <= high:
            return "pass_rate below" if rate < low else "pass_rate above"
    if drop_answerable_without_audio is not None:
        keys = [key for key in ("pass_rate_silence", "pass_rate_none") if key in meta]
        rates = [read_rate(meta, key) for key in keys or ["pass_rate_silence"]]
        if max(rates) >= drop_answerable_without_audio:
            return "answerable without audio"
    for condition in where:
        key, _, value = condition.partition("=")
        found = meta.get(key.removesuffix("!"))
        is_it = value in (str(found), json.dumps(found, default=str))
        if is_it == key.endswith("!"):
            return f"not {condition}"
    return ""


def read_rate(meta, key):
    value = meta.get(key)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        found = f"found {value!r:.40}; python eval.py --samples 8 writes it"
        raise DataError(f'expected a number "{key}" from 0 to 1, {found}')
    return value


# ------------------------------------------------------------------------------------------------------------
# Command line


def rates_flag(text):
    with contextlib.suppress(ValueError):
        low, high = map(float, text.split(".."))
        if 0 <= low <= high <= 1:
            return low, high
    raise UserError(f"--pass_rate {text}: expected LOW..HIGH with 0 <= LOW <= HIGH <= 1, as in 0.1..0.9")


AUDIO_DIR = "where relative audio paths start; default: the folder of the file"
COLUMNS_HELP = "THEIRS=OURS,...: what the file calls our columns, as sound=audio,prompt=question"


@dataclass
class CheckOptions:
    max_audio_s: float = knob(30.0, "seconds of a clip that training reads", low=0.025, high=86_400)
    audio_dir: str = knob("", AUDIO_DIR)
    columns: str = knob("", COLUMNS_HELP)
    against: str = knob("", "another data set: which clips and questions do they share?")
    report: str = knob("", "a JSON file to write everything found to")


@dataclass
class ConvertOptions:
    out: str = knob("", "JSONL to write", required=True)
    audio_dir: str = knob("", AUDIO_DIR)
    columns: str = knob("", COLUMNS_HELP)
    drop_bad: bool = knob(False, "leave out lines that cannot be read and those whose clip is missing")


@dataclass
class FolderOptions:
    out: str = knob("", "JSONL to write; a held-out part goes to OUT_eval.jsonl", required=True)
    eval_size: int = knob(-1, "questions to hold out; -1: a tenth; at most a fifth", low=-1)
    n_choices: int = knob(4, "choices a question; wrong ones come from the same family first", low=2)


@dataclass
class FilterOptions:
    out: str = knob("", "JSONL to write", required=True)
    pass_rate: tuple = knob((), "LOW..HIGH: keep this share of right samples, ends included", type=rates_flag)
    drop_answerable_without_audio: float = knob(
        None,
        "drop what is right this often under silence or without audio; 0.5 if no number is given",
        above=0,
        high=1,
        nargs="?",
        const=0.5,
    )
    where: list = knob(
        (),
        "KEY=VALUE or KEY!=VALUE: keep lines whose meta says so; may be repeated",
        type=str,
        action="append",
    )
    max: int = knob(0, "keep a random sample of this size; 0: all")
    seed: int = knob(0, "of that sample")


COMMANDS = dict(  # name: function, options, what it does, an example
    check=(
        check_file,
        CheckOptions,
        "read every line and every sound, list what is wrong",
        "train.jsonl --against mmau-test-mini.json",
    ),
    convert=(
        convert_file,
        ConvertOptions,
        "any known format to our JSONL, losing no field",
        "train_qa.json --audio_dir clips --out avqa.jsonl",
    ),
    folder=(
        questions_from_folder,
        FolderOptions,
        "sounds in folders named after what is heard (dog/1.wav, animals/dog/1.wav) to questions",
        "recordings --out my.jsonl",
    ),
    filter=(
        filter_file,
        FilterOptions,
        "keep what a policy can learn from, by what eval.py --samples measured",
        "avqa.jsonl --pass_rate 0.1..0.9 --drop_answerable_without_audio --out hard.jsonl",
    ),
)


def run_command(argv):
    parser = Parser(description=data.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, options, about, example) in COMMANDS.items():
        description = f"{about}\n\n    python data.py {name} {example}"
        command = commands.add_parser(name, help=about, description=description)
        command.add_argument(
            "path", metavar="FILE", help="file, folder or Hub id (org/name[/config][:split])"
        )
        command.add_knobs(options)
    given = vars(parser.parse_args(argv))
    function, options_class, _, _ = COMMANDS[given.pop("command")]
    path, options = given.pop("path"), options_class(**given)
    check_knobs(options)
    return function(path, **vars(options))
