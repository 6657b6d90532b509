"""Captions -> multiple-choice questions, as AVQA-GPT and VGGS-GPT were made (Omni-R1, arXiv 2505.09439).

    python -m tools.generate captions.jsonl --model gpt-4o-mini --out vggs_gpt.jsonl

The file holds clips with captions, or with a label; `eval.py --prompt caption` writes one. A language model
behind an OpenAI-compatible server writes a question on each clip, and `check_question` accepts or refuses it.
Accepted ones go to --out, the others to --rejects with the reason. The same command goes on where it was
stopped.
"""

import hashlib
import itertools
import json
import random
import re
from dataclasses import replace

from data import (
    HALF_CHARACTER,
    LABEL_KEYS,
    DataError,
    Embedded,
    Example,
    Examples,
    exit_code,
    first_key,
    is_list_of,
    leave,
    normal_text,
    normal_words,
    seed_of,
    shuffle_choices,
)
from tools import server
from tools.server import LINE, STOP_WORDS, Options, Task

WRITER = """You write multiple-choice listening questions. A listener hears one short audio clip and \
nothing else. You cannot hear it; you get the notes of people who could. Notes may be wrong or contradict \
each other, and some tell what only eyes could know, such as colours, clothes or places in view: build on \
what they agree on and on what is audible.

Write one question in English that
- can be answered only by listening: not by common sense, not from the wording of the question or of its \
choices;
- asks about what sounds, how, how often, how loud, how long, in which order, how near, by whom or what, \
or in which mood;
- has exactly four choices of the same kind, similar in length and wording, each plausible for such a \
clip, none part of another, and no "none of the above";
- has exactly one right choice, which the notes support, and three wrong ones, which the notes speak \
against;
- never hints at the answer, and never mentions notes, captions, descriptions, texts or anything that has \
to be seen;
- fits on one line: at most 40 words, each choice at most 15 words, without a letter or a number in front.

Reply with one JSON object and nothing else:
{"question": "...", "choices": ["...", "...", "...", "..."], "answer": "the right choice, word for word"}"""
NOTES = "Notes on the clip:\n{}\n\nWrite the question."
SHOWN_NOTES = """- a door creaks open slowly and someone walks in on a wooden floor
- a squeaking door, then footsteps, a man in a red coat enters"""
SHOWN_REPLY = dict(
    question="What is heard right after the door creaks?",
    choices=["A key in a lock", "Footsteps on wood", "A window closing", "A dog on gravel"],
    answer="Footsteps on wood",
)
SHOWN = [  # one worked example: without it small models answer with prose
    {"role": "user", "content": NOTES.format(SHOWN_NOTES)},
    {"role": "assistant", "content": json.dumps(SHOWN_REPLY)},
]
SCHEMA = server.object_schema(
    question={"type": "string"},
    answer={"type": "string"},
    choices={"type": "array", "items": {"type": "string"}, "minItems": 4, "maxItems": 4},
)
# changes by itself when a prompt changes
PROMPT_VERSION = hashlib.sha256(json.dumps([WRITER, NOTES, SHOWN, SCHEMA]).encode()).hexdigest()[:8]
KEYS = dict(out=LINE, rejects=("id", "reason", "reply", "captions", "meta"))  # of the lines of each file


def writing_prompt(clip: Example) -> list[dict]:
    """The messages that ask for a question. Raises DataError if the clip has no file or no captions."""
    where = f"clip {clip.id!r:.80}"
    if not isinstance(clip.audio, str):
        remedy = "; it lies inside the data set: convert it first" if isinstance(clip.audio, Embedded) else ""
        raise DataError(f'{where}: field "audio": expected a path, found {clip.audio!r:.60}{remedy}')
    captions = clip.meta.get("captions")
    if not captions or not is_list_of(str, captions) or not all(map(str.strip, captions)):
        raise DataError(f'{where}: field "captions": expected a list of texts, found {captions!r:.80}')
    notes = "\n".join("- " + " ".join(text.split()) for text in captions)
    if HALF_CHARACTER.search(notes):
        raise DataError(f'{where}: field "captions": holds half a character; mend or drop the line')
    return [{"role": "system", "content": WRITER}, *SHOWN, {"role": "user", "content": NOTES.format(notes)}]


# -----------------------------------------------------------------------------------------------------------
# What is accepted

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
LETTERS = ("ABCD", "abcd", "1234")
LETTERED = re.compile(r"\(?([A-Da-d1-4])[.):]+(?!\d)\s*(.*)", re.DOTALL)  # "B. dog", "(b) dog", not "2.5"
# What must not stand in a question or in a choice; sounds whose name holds such a word are let through.
SIGHT = (
    r"see(?![ -]?saw)|sees|seen|seeing|look(?:s|ed|ing)?|watch(?:ed|ing)|visib\w*|visual\w*|"
    r"colou?r(?!atura)\w*|picture[sd]?|images?|photo(?:s|graphs?)?|footage|videos?(?![ -]?games?)|"
    r"on[ -]?screen|wearing|wears|dressed|cameras?(?! (?:shutter|click|flash))|shown|view(?:s|ed|ers?|ing)?|"
    r"in (?:the|this) frame|(?:t-?)?shirts?|"
    r"(?:red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y) "
    r"(?:coat|jacket|dress|hat|suit|uniform)(?:s|es)?"
)
TEXTS = (
    r"captions?|captioned|descriptions?|described|annotations?|transcripts?|according to|"
    r"(?:based on|from|by) (?:the |these |your )?(?:given |provided )?notes(?! of)|"
    r"the notes (?:say|state|mention|suggest)|"
    r"texts?(?!(?:[ -](?:message|alert|tone|notification)))|(?<!musical )passages?"
)
OTHERS = r"of the (?:above|choices|options|other choices)|both [a-d] and [a-d]"
WORDS = {"about sight": SIGHT, "mentions a text": TEXTS, "mentions other choices": OTHERS}
BANNED = {reason: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for reason, words in WORDS.items()}


def check_question(reply: str, captions: list[str]) -> dict:
    """A reply -> question, choices, and the answer's index. Raises Refused."""
    row = tidy(server.read_reply(reply, SCHEMA))
    server.refuse_faults({"not four choices": len(row["choices"]) != 4})
    server.refuse_faults({"answer not among the choices": row["answer"] is None})
    server.refuse_faults(question_faults(captions, **row))
    return row


def tidy(row) -> dict:
    """The question on one line, the choices without letters in front, the answer as an index or None."""
    choices = [choice.strip() for choice in row["choices"]]
    marks = [LETTERED.fullmatch(choice) for choice in choices]
    letters = "".join(mark[1] if mark else "?" for mark in marks)
    if letters in LETTERS:
        choices = [mark[2] for mark in marks]
    index = answer_index(row["answer"].strip(), choices, letters)
    return dict(question=" ".join(row["question"].split()), choices=choices, answer=index)


def answer_index(answer, choices, letters):
    """Which choice is meant by its text, by its letter, or by both? letters: those that the choices had."""
    texts = [normal_text(choice) for choice in choices]
    if normal_text(answer) in texts:
        return texts.index(normal_text(answer))
    mark = LETTERED.fullmatch(answer)
    letter, text = mark.groups() if mark else (answer, "")
    if not text and any(len(choice) == 1 for choice in choices):  # "B" may be the name of a note
        return None
    for kind in LETTERS:
        counts = text or kind in ("ABCD", letters)  # a bare "2" may count something
        if counts and letter in list(kind[: len(choices)]):
            index = kind.index(letter)
            return index if not text or normal_text(text) == texts[index] else None  # both must agree
    return None


def question_faults(captions, question, choices, answer) -> dict:
    """{what can be wrong with a question: is it?}"""
    asked, keys = normal_words(question), [normal_words(choice) for choice in choices]
    texts = [normal_text(choice) for choice in choices]
    everything = "\n".join([question, *choices])
    longest_other = max(len(choice) for i, choice in enumerate(choices) if i != answer)
    return {
        "half a character": HALF_CHARACTER.search(everything),
        "line break or control character": any(CONTROL.search(text) for text in [question, *choices]),
        "question length": not 3 <= len(asked) <= 40 or len(question) > 300,
        "choice length": any(not 1 <= len(key) <= 15 or len(c) > 100 for key, c in zip(keys, choices)),
        "choices alike": len(set(texts)) < 4,
        "one choice is part of another": one_is_part_of_another(texts),
        **{reason: pattern.search(everything) for reason, pattern in BANNED.items()},
        "quotes a caption": any(quotes(asked, normal_words(caption)) for caption in captions),
        "given away by the question": gives_away(asked, keys, answer),
        "answer stands out": len(choices[answer]) > max(2 * longest_other, longest_other + 20),
    }


def one_is_part_of_another(texts) -> bool:
    """As "the dog" is of "a dog barking": stop words do not count."""
    parts = []
    for text in texts:
        kept = [word for word in text.split() if word not in STOP_WORDS]
        parts.append(f" {' '.join(kept) or text} ")
    return any(a in b for a, b in itertools.permutations(parts, 2))


def quotes(asked, caption) -> bool:
    """Does the question hold a whole caption of more than five words?"""
    return len(caption) > 5 and f" {' '.join(caption)} " in f" {' '.join(asked)} "


def gives_away(asked, keys, answer) -> bool:
    """Are all words of the right choice in the question, but not those of all choices?"""
    named = [(set(key) - STOP_WORDS or set(key)) <= set(asked) for key in keys]
    return named[answer] and not all(named)


# -----------------------------------------------------------------------------------------------------------
# The run


class Captioned(Examples):
    """The clips of a data set, with what is known of their sound in meta["captions"]: captions or a label."""

    def __getitem__(self, i: int) -> Example:
        example = super().__getitem__(i)
        if "captions" in example.meta:
            return example
        key = first_key(example.meta, LABEL_KEYS)
        if key is None:
            where = self.where(i)
            raise DataError(f"{where}: neither captions nor a label; eval.py --prompt caption writes some")
        labels = example.meta[key]
        captions = labels if isinstance(labels, list) else [labels]
        return replace(example, meta={"captions": captions} | example.meta)


def generate_questions(clips, options: Options) -> dict:
    """Have a question written on every clip whose line is in neither file yet.      -> the summary

    clips: a sequence of Example with absolute `audio` and texts in meta["captions"]; read once and in order.
    Raises UserError, and KeyboardInterrupt after Ctrl-C; what was answered until then is in the files.
    """
    send = options.connect(options.model, SCHEMA)

    def prepare(clip):
        messages = writing_prompt(clip)
        return messages, server.rough_prompt_tokens(messages, SCHEMA) + options.max_tokens

    def work(clip, messages):
        captions = clip.meta["captions"]
        return server.ask(send, clip.id, messages, options, lambda text: check_question(text, captions))

    def make_line(clip, answer, fingerprints):
        reason, captions = answer.reason, clip.meta["captions"]
        if answer.row and server.fingerprint(answer.row) in fingerprints:
            reason = "near duplicate"
        if reason:
            reply = answer.reply[:2000]
            return "rejects", dict(id=clip.id, reason=reason, reply=reply, captions=captions, meta={})
        example = Example(clip.id, clip.audio, **answer.row, meta=clip.meta | {"source": "generated"})
        return "out", vars(shuffle_choices(example, random.Random(seed_of(options.seed, clip.id))))

    made = dict(model=options.model, prompt_version=PROMPT_VERSION, seed=options.seed)
    task = Task(options, KEYS, made, prepare, work, make_line, found={"clips": len(clips)})
    return server.run(clips, task)


def main(argv=None):
    def work(path, options):
        return generate_questions(Captioned(path, options.audio_dir), options)

    about = "JSONL or CSV of clips with captions or a label"
    server.start("generate", __doc__, "CAPTIONS", about, Options, work, argv)


if __name__ == "__main__":
    leave(exit_code(main))
