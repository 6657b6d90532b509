"""Time-stamped events -> questions that want a second listening, as Echo's data was made (arXiv 2602.11909).

    python -m tools.events audioset_train_strong.tsv --labels mid_to_display_name.tsv --audio_dir clips \\
        --model MODEL --out echo.jsonl

The file is AudioSet-Strong's TSV, or any table (CSV, TSV, JSONL) of clip, onset, offset and label. Our own
rules make questions about order, count, duration and overlap, with choices and the right answer; a language
model writes a chain of thought that names segments; a second call judges both. Each question goes to one of
three files: --out (question and chain are good: a cold start), --rl (only the question is good) or --rejects.
The same command goes on where it was stopped.

An answer is right as far as the table is right. Nothing is asked where a listener could disagree with it by a
fraction of a second, or call a sound by another of its names.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise, product

from data import (
    CLIP_KEYS,
    HALF_CHARACTER,
    SEGMENT,
    DataError,
    Example,
    exit_code,
    file_problem,
    find_columns,
    knob,
    leave,
    locate,
    normal_text,
    normal_words,
    open_rows,
    progress,
    seed_of,
    stem_of,
)
from tools import server
from tools.generate import CONTROL
from tools.server import LINE, Task


@dataclass
class Options(server.Options):
    rl: str = knob("", "JSONL of good questions without a good chain; '': OUT_rl.jsonl")
    labels: str = knob("", "mid_to_display_name.tsv: the names of AudioSet's labels")
    per_clip: int = knob(2, "questions a clip at most, each of another kind", low=1)
    judge_model: str = knob("", "judges question and chain; '': --model")
    max_tokens: int = knob(800, "of one reply; a model that thinks aloud needs thousands", low=1)

    def __post_init__(self):
        super().__post_init__()
        self.rl = self.rl or self.beside_out("rl")
        self.judge_model = self.judge_model or self.model


# -----------------------------------------------------------------------------------------------------------
# Questions. `sounds` is {label: its segments in the order of time}. `clear` are the labels whose sound no
# other label of the clip could name, too. A kind yields all that could be asked: question, right choice,
# wrong choices, and the segments that decide.

EPS = 1e-6  # 2.3 - 2 is a little less than 0.3
APART_S = 0.3 - EPS  # what is less apart has no clear order
TOUCH_S = 0.1 - EPS  # two segments of a label with less between them are one
LONGER = 1.5 - EPS  # times as long
SHARED_S = 0.5 - EPS  # what sounds at the same time does so for this long at least
ASKED = dict(
    after='Which of these sounds is the next to begin after "{}" begins?',
    before='Which of these sounds is the last to begin before "{}" begins?',
    count='How many times is "{}" heard?',
    longest="Which of these sounds is heard for the longest time in all?",
    shortest="Which of these sounds is heard for the shortest time in all?",
    overlap='Which of these sounds is heard at the same time as "{}"?',
)


def merge_events(events) -> dict:
    """(start, end, label)s -> {label: its segments}; those that touch become one."""
    sounds = {}
    for start, end, label in sorted(events):
        segments = sounds.setdefault(label, [])
        if segments and start - segments[-1][1] < TOUCH_S:
            segments[-1][1] = max(segments[-1][1], end)
        else:
            segments.append([start, end])
    return sounds


@functools.cache
def alike(a: str, b: str) -> bool:
    """Could both name one sound? "Speech" and "Male speech, man speaking" could. Not so "Dog" and "Bark"."""
    a, b = set(normal_text(a).split()), set(normal_text(b).split())
    return a <= b or b <= a


def clear_of(sounds) -> list[str]:
    return [label for label in sounds if not any(alike(label, other) for other in sounds if other != label)]


def ask_order(sounds, clear):
    begins = sorted((start, end, label) for label, segments in sounds.items() for start, end in segments)
    for asked in clear:
        segment = sounds[asked][0]
        others = [event for event in begins if event[2] != asked]
        if len(sounds[asked]) > 1 or any(abs(start - segment[0]) < APART_S for start, _, _ in others):
            continue
        for way, sign in (("after", 1), ("before", -1)):
            side = [event for event in others[::sign] if sign * event[0] > sign * segment[0]]
            for start, end, right in side[:1]:
                rivals = [other for other, _, label in side if label != right]
                if right in clear and all(abs(other - start) >= APART_S for other in rivals):
                    wrong = [label for label in clear if label not in (asked, right)]
                    yield ASKED[way].format(asked), right, wrong, [segment, [start, end]]


def ask_count(sounds, clear):
    """Up to eight times. The choices are four neighbouring numbers from 1 on."""
    last = max(segments[-1][1] for segments in sounds.values())
    for label in clear:
        segments, n = sounds[label], len(sounds[label])
        lasting = n == 1 and segments[0][1] - segments[0][0] > last / 2  # what never stops is not counted
        apart = all(b[0] - a[1] >= APART_S for a, b in pairwise(segments))
        if n <= 8 and apart and not lasting:
            for low in range(max(1, n - 3), n + 1):
                wrong = [str(k) for k in range(low, low + 4) if k != n]
                yield ASKED["count"].format(label), str(n), wrong, segments


def ask_duration(sounds, clear):
    total = {label: sum(end - start for start, end in sounds[label]) for label in clear}
    for right in clear:
        shorter = [label for label in clear if total[label] * LONGER <= total[right]]
        longer = [label for label in clear if total[right] * LONGER <= total[label]]
        yield ASKED["longest"], right, shorter, sounds[right]
        if len(longer) >= 3:  # a label that is not heard at all would be a shorter one
            yield ASKED["shortest"], right, longer, sounds[right]


def ask_overlap(sounds, clear):
    for asked in clear:
        common = {}  # {another label: what each pair of segments shares; its end is first if that is nothing}
        for label in clear:
            if label != asked:
                pairs = product(sounds[asked], sounds[label])
                common[label] = [[max(a[0], b[0]), min(a[1], b[1])] for a, b in pairs]
        apart = [label for label, parts in common.items() if all(a - b >= APART_S for a, b in parts)]
        for right, parts in common.items():
            shared = sorted(part for part in parts if part[1] - part[0] >= SHARED_S)
            if shared:
                yield ASKED["overlap"].format(asked), right, apart, shared


KINDS = dict(order=ask_order, count=ask_count, duration=ask_duration, overlap=ask_overlap)


def questions_on(clip: Example, pool: list[str], seed: int, per_clip: int) -> list[Example]:
    """At most `per_clip` questions of different kinds; they depend on the clip, the pool and the seed alone.

    At least one wrong choice is heard in the clip (a count's are other numbers); what is missing to four is
    drawn from the pool, the labels of the whole table.
    """
    sounds = merge_events(clip.meta["events"])
    kinds = random.Random(seed_of(seed, clip.id)).sample(list(KINDS), len(KINDS))
    drawn = [draw_question(clip, kind, sounds, pool, seed) for kind in kinds] if sounds else []
    return [question for question in drawn if question][:per_clip]


def draw_question(clip, kind, sounds, pool, seed) -> Example | None:
    rng = random.Random(seed_of(seed, clip.id, kind))
    found = [candidate for candidate in KINDS[kind](sounds, clear_of(sounds)) if candidate[2]]
    for question, right, wrong, spans in rng.sample(found, len(found)):
        choices = draw_choices(right, wrong, sounds, pool, rng)
        if len(choices) == 4:
            rounded = [[round(start, 3), round(end, 3)] for start, end in spans]
            meta = dict(kind=kind, spans=rounded) | clip.meta
            name, answer = f"{clip.id} {kind}", choices.index(right)
            return Example(name, clip.audio, question, choices, answer, meta=meta)
    return None


def draw_choices(right, wrong, sounds, pool, rng) -> list[str]:
    """The right choice and wrong ones in random order; fewer than four if the pool has too few that fit."""
    choices = [right, *rng.sample(wrong, min(3, len(wrong)))]
    for label in rng.sample(pool, min(40, len(pool))) if len(choices) < 4 else ():
        if len(choices) < 4 and not any(alike(label, x) for x in (*sounds, *choices)):
            choices.append(label)
    rng.shuffle(choices)
    return choices


# -----------------------------------------------------------------------------------------------------------
# Tables of events

COLUMNS = (  # the names of the columns of clip, label, start and end
    f"segment_id|{CLIP_KEYS}",
    "event_label|label|event|class|class_name|category|sound",
    "onset|start|start_time|start_time_seconds|start_s|start_seconds|event_onset",
    "offset|end|end_time|end_time_seconds|end_s|end_seconds|event_offset",
)
CODE = re.compile(r"/[a-z]/\w+")  # what AudioSet calls a label
DAY_S = 86_400
NO_SOUND = "no sound file of its name, or several"


def read_events(rows, names) -> dict[str, Example]:
    """A table -> {name: clip with its events}. A row is an event, or a clip alone; in any order."""
    clips = {}
    for i in range(len(rows)):
        try:
            name, event = read_event(rows[i], names)
        except DataError as e:
            raise DataError(f"{rows.where(i)}: {e}") from None
        clip = clips.setdefault(name, Example(name, "", "", meta=dict(events=[])))
        if event:
            clip.meta["events"].append(event)
    return clips


def read_event(row, names):
    """-> the clip's name, (start, end, label) or None. Raises DataError with the field."""
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {row!r:.60}")
    where, label, start, end = event_columns(tuple(row))
    alone = all(row[key] in (None, "") for key in (label, start, end))
    for key in [where] if alone else [where, label]:
        if not isinstance(row[key], str):
            raise DataError(f'field "{key}": expected a text, found {row[key]!r:.60}')
    if alone:
        return row[where], None
    code = row[label].strip()
    heard = " ".join(re.sub(r"[_<>\x00-\x1f\x7f]", " ", names.get(code, code)).split())
    if not heard or HALF_CHARACTER.search(heard + row[where]):
        raise DataError(f'field "{label}": expected the name of a sound, found {code!r:.60}')
    if CODE.fullmatch(code) and code not in names:
        remedy = "give its name by --labels mid_to_display_name.tsv"
        raise DataError(f'field "{label}": {code} is a code; {remedy}')
    start_s, end_s = read_seconds(row, start), read_seconds(row, end)
    if start_s >= end_s:
        problem = f"{row[end]} is not after the start, {row[start]}; mend or drop the line"
        raise DataError(f'field "{end}": {problem}')
    return row[where], (start_s, end_s, heard)


@functools.cache
def event_columns(keys) -> list[str]:
    """The columns of clip, label, start and end among the keys of a row."""
    folded = {key.casefold(): key for key in keys}
    found = find_columns(tuple(folded), " ".join(COLUMNS))
    for known, name in zip(COLUMNS, found):
        if name is None:
            raise DataError(f'field "{known}": missing; found only {sorted(keys)!r:.300}')
    return [folded[name] for name in found]


def read_seconds(row, key) -> float:
    value = row[key]
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if type(value) is not bool and 0 <= float(value) <= DAY_S:
            return float(value)
    raise DataError(f'field "{key}": expected seconds, found {value!r:.60}; mend or drop the line')


def read_display_names(path: str) -> dict[str, str]:
    """AudioSet's mid_to_display_name.tsv: the code of a label and its name."""
    expected = "expected AudioSet's mid_to_display_name.tsv"
    if problem := file_problem(path):
        raise DataError(f"{problem}; {expected}")
    with open(path, encoding="utf-8", errors="replace") as f:
        names = dict(re.findall(rf"^({CODE.pattern})\t(.*)", f.read(), re.MULTILINE))
    if not names:
        raise DataError(f"{path}: holds no label such as /m/09x0r; {expected}")
    return names


def find_sound(clip, names, folder) -> str:
    """Find the clip's file by one of its names, read its length from the header and end its events there.

    Returns why it is of no use, or "".
    """
    import soundfile

    paths = [locate(name, folder) for name in names]
    found = [path for path in paths if not file_problem(path)]
    if not found:
        return NO_SOUND
    clip.audio = found[0]
    try:
        with soundfile.SoundFile(os.open(clip.audio, os.O_RDONLY)) as f:
            last = round(f.frames / f.samplerate, 3)
    except (OSError, RuntimeError):
        return "sound file that cannot be read"
    if last > DAY_S:
        return "sound file whose header does not know its length"
    events = clip.meta["events"]
    if any(end > last + 0.5 for _, end, _ in events):
        return "sound file that ends before its events"
    events = [(start, min(end, last), label) for start, end, label in events if start < last]
    clip.meta |= dict(duration_s=last, events=events)
    return ""


def questions_of(path: str, audio_dir="", labels="", per_clip=2, seed=0) -> tuple[list[Example], dict]:
    """A table -> the questions on it, and what there is: how many clips and questions of which kinds.

    audio_dir: where sounds are looked for; "" is the folder of the table. labels: the file of the labels'
    names. Raises DataError if there is nothing to ask.
    """
    folder = os.path.abspath(audio_dir or os.path.dirname(path))
    rows = open_rows(path)
    clips = read_events(rows, read_display_names(labels) if labels else {}).values()
    if not clips:
        raise DataError(f"{path}: holds no event")
    is_segments = "segment_id" in map(str.casefold, rows[0])
    pool = sorted({label for clip in clips for _, _, label in clip.meta["events"]})
    questions, useless = [], Counter()
    for clip in progress(clips, len(clips), "clips"):
        names = [clip.id]
        if is_segments:
            names.append(re.sub(r"_(\d+)$", lambda ms: f"_{int(ms[1]) // 1000}", clip.id))
        problem = find_sound(clip, names, folder)
        asked = [] if problem else questions_on(clip, pool, seed, per_clip)
        questions += asked
        if not asked:
            useless[problem or "nothing clear to ask"] += 1
    if useless[NO_SOUND] == len(clips):
        looked_for = " or ".join(stem_of(name) for name in names)
        raise DataError(
            f"{path}: none of the sounds of its {len(clips)} clips is in {folder} or its folders; the last "
            f"was looked for as {looked_for} (.wav, .flac, ...); give --audio_dir"
        )
    if not questions:
        raise DataError(f"{path}: there is nothing to ask: {dict(useless)}")
    kinds = Counter(question.meta["kind"] for question in questions)
    return questions, dict(clips=len(clips), useless_clips=dict(useless), questions=dict(kinds))


# -----------------------------------------------------------------------------------------------------------
# The chain of thought and its judge

CHAINER = """You write down how a listener thinks while answering a multiple-choice question about a short \
audio clip. The listener can play any part of it again, and knows nothing else. You cannot hear it; you \
get what others heard, in seconds, and the right choice.

Write the thoughts in English, 40 to 150 words, so that they
- say what to listen for, go to the one to six parts of the clip that decide, with a reason before each \
and what is heard there after it, and then conclude;
- name each part as <seg>start, end</seg>, in seconds, at least 0.2 s long; after it the same sentence \
goes on in lower case: "The bell should come late, and in <seg>1.2, 2.85</seg> it rings twice." There are \
no other tags;
- are those of somebody who only hears: no word of notes, labels, timestamps, captions, lists, or of an \
answer that is known;
- end with the right choice, word for word.

Reply with one JSON object and nothing else: {"chain": "..."}"""
CHECKER = """You check a multiple-choice question about a short audio clip, and the thoughts that lead a \
listener to its answer. You cannot hear it; you get what others heard, in seconds.

The question is good if a listener can answer it from the clip alone, what was heard supports the right \
choice, and no other choice can be right, too, or be another name of a sound that decides.
The thoughts, called the chain, are good if every step agrees with what was heard, the parts in \
<seg>start, end</seg> are those that decide, the answer follows from them, and they read like listening. \
Without thoughts the chain is bad.

Reply with one JSON object and nothing else:
{"reason": "one short sentence", "question": "good" or "bad", "chain": "good" or "bad"}"""
VERDICT_WORD = {"type": "string", "enum": ["good", "bad"]}
CHAIN = server.object_schema(chain={"type": "string"})
VERDICT = server.object_schema(reason={"type": "string"}, question=VERDICT_WORD, chain=VERDICT_WORD)
RULES = [ASKED, APART_S, TOUCH_S, LONGER, SHARED_S, CHAINER, CHECKER, CHAIN, VERDICT]
PROMPT_VERSION = hashlib.sha256(json.dumps(RULES).encode()).hexdigest()[:8]

# As CHAINER wants them; what a policy writes in a rollout may be spelt more freely.
NAMED_SEGMENT = re.compile(SEGMENT)
MOST_SEGMENTS, LEAST_S = 8, 0.2 - EPS  # Echo listens again eight times at most, and to nothing shorter
BETRAYS = re.compile(
    r"\b(?:annotat\w+|time[- ]?stamp\w*|label\w*|meta-?data|caption\w*|transcripts?|descriptions?|"
    r"ground[ -]truth|data ?sets?|according to|as (?:noted|listed|given|described)|"
    r"the (?:notes|list|table) (?:says?|shows?|gives?|tells?|mentions?)|"
    r"(?:given|provided|listed) (?:events?|segments?|times?|answers?|choices?|information))\b",
    re.IGNORECASE,
)
NUMERALS = "zero one two three four five six seven eight nine ten eleven".split()
NUMERALS = {name: str(n) for n, name in enumerate(NUMERALS)} | {"once": "1", "twice": "2"}


def messages_on(question, system, end) -> list[dict]:
    """All that is known of a question, for the model that writes the chain and for the one that judges it."""
    choices, meta = question.choices, question.meta
    known = [
        "Heard, in seconds:",
        *(f"{start:g} to {end:g}: {label}" for start, end, label in sorted(meta["events"])),
        f"Question: {question.question}",
        f"Choices: {'; '.join(choices)}",
        f"Right choice: {choices[question.answer]}",
        "Decided in: " + ", ".join(f"{start:g} to {end:g}" for start, end in meta["spans"]),
        "",
        end,
    ]
    text = HALF_CHARACTER.sub("?", "\n".join(known))
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def spell_numbers(text) -> str:
    """The words of a text between blanks, numbers in digits."""
    words = normal_text(re.sub("[-–—*“”]", " ", text)).split()
    return f" {' '.join(NUMERALS.get(word, word) for word in words)} "


def last_named(text: str, choices: list[str]) -> int | None:
    """The choice that is the last to be named; a number may be spelt out."""
    said = spell_numbers(text)
    names = [spell_numbers(choice) for choice in choices]
    ends = [said.rfind(name) + len(name) if name in said else 0 for name in names]
    return ends.index(max(ends)) if any(ends) else None


def chain_faults(chain: str, question: Example) -> dict:
    """{what can be wrong with a chain of thought: is it?}"""
    meta, rest = question.meta, NAMED_SEGMENT.sub(" ", chain)
    segments = [(float(start), float(end)) for start, end in NAMED_SEGMENT.findall(chain)]
    last = meta.get("duration_s") or max(end for _, end, _ in meta["events"]) + 1
    follows = [after.lstrip()[:1] or "<" for after in chain.split("</seg>")[1:]]  # </think> follows the end
    decides = [a < end and start < b for a, b in segments for start, end in meta["spans"]]
    return {
        "half a character": HALF_CHARACTER.search(chain),
        "control character": CONTROL.search(chain),
        "chain length": not 10 <= len(normal_words(rest)) <= 300 or len(chain) > 4000,
        "broken tag": "<" in rest or ">" in rest,
        "no segment": not segments,
        "too many segments": len(segments) > MOST_SEGMENTS,
        "segment outside the clip": any(end > last + 0.01 for _, end in segments),  # ends are rounded
        "segment too short": any(end - start < LEAST_S for start, end in segments),
        "no segment that decides": not any(decides),
        "new sentence after a segment": any(c == "<" or c.isupper() for c in follows),
        "mentions the notes": BETRAYS.search(rest),
        "ends at another choice": last_named(rest, question.choices) != question.answer,
    }


def check_chain(reply: str, question: Example) -> dict:
    """A reply -> {"chain": on one line}. Raises Refused."""
    chain = " ".join(server.read_reply(reply, CHAIN)["chain"].split())
    server.refuse_faults(chain_faults(chain, question))
    return dict(chain=chain)


def check_verdict(reply: str) -> dict:
    row = server.read_reply(reply, VERDICT)
    server.refuse_faults({"neither good nor bad": not {row["question"], row["chain"]} <= {"good", "bad"}})
    return row


# -----------------------------------------------------------------------------------------------------------
# The run

KEYS = dict(  # of the lines of each file
    out=(*LINE[:-1], "target", "meta"),
    rl=LINE,
    rejects=("id", "reason", "reply", *LINE[1:]),
)


def write_chains(path: str, options: Options) -> dict:
    """Have a chain of thought written to every question on a table, and both judged.      -> the summary

    Raises UserError, and KeyboardInterrupt after Ctrl-C; what was answered until then is in the files.
    """
    questions, found = questions_of(path, options.audio_dir, options.labels, options.per_clip, options.seed)
    writer, judge = options.connect(options.model, CHAIN), options.connect(options.judge_model, VERDICT)

    def prepare(question):
        first = messages_on(question, CHAINER, "Write the thoughts.")
        second = messages_on(question, CHECKER, "Thoughts: ")
        prompts = server.rough_prompt_tokens(first, CHAIN) + server.rough_prompt_tokens(second, VERDICT)
        return first, prompts + 3 * options.max_tokens  # two replies, and the judge reads the chain

    def work(question, first):
        answer = server.ask(writer, question.id, first, options, lambda text: check_chain(text, question))
        if answer.error is not None:
            return answer
        written = dict(thoughts=answer.row.get("chain", ""), no_chain=answer.reason)
        second = messages_on(question, CHECKER, f"Thoughts: {written['thoughts'] or '(none)'}")
        return server.ask(
            judge, question.id, second, options, lambda text: check_verdict(text) | written, answer
        )

    def make_line(question, answer, _):
        row = answer.row
        meta = question.meta | dict(
            source="relisten", verdict=HALF_CHARACTER.sub("?", row.get("reason", ""))[:300]
        )
        del meta["events"]
        line = vars(question) | dict(meta=meta, reply=answer.reply[:2000])
        if row.get("question") != "good":
            return "rejects", line | dict(reason="bad question" if row else "no verdict")
        if not row["thoughts"] or row["chain"] == "bad":
            meta["no_chain"] = row["no_chain"] or "judged bad"
            return "rl", line
        right = question.choices[question.answer]
        return "out", line | dict(target=f"<think>{row['thoughts']}</think><answer>{right}</answer>")

    made = {name: getattr(options, name) for name in ("model", "judge_model", "seed", "per_clip")}
    made["prompt_version"] = PROMPT_VERSION
    task = Task(options, KEYS, made, prepare, work, make_line, "question", found)
    return server.run(questions, task)


def main(argv=None):
    about = "AudioSet-Strong's TSV, or a table of clip, onset, offset and label"
    server.start("events", __doc__, "EVENTS", about, Options, write_chains, argv)


if __name__ == "__main__":
    leave(exit_code(main))
