"""A language model behind an OpenAI-compatible server, and a run that asks it about many clips.

connect   the client: send(messages, seed) -> a reply
ask       asks until a reply is accepted
run       asks about every clip and writes a line on each; it can be stopped at any moment, and goes on

generate.py and events.py are such runs; behaviours.py uses the client alone.
"""

import contextlib
import functools
import json
import os
import re
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from data import Ledger, Parser, UserError, ahead, check_knobs, interruptible, knob, normal_words, seed_of


@dataclass
class Options:
    """How a language model is asked, and where the lines go."""

    model: str = knob("", "the language model, as the server calls it; the key is read from OPENAI_API_KEY")
    out: str = knob("", "JSONL of questions; the same command goes on where it stopped")
    rejects: str = knob("", "JSONL of what was refused, and why; '': OUT_rejects.jsonl")
    audio_dir: str = knob("", "where relative audio paths start; '': the folder of the file")
    base_url: str = knob("", "an OpenAI-compatible server, http://HOST:PORT/v1; '': OpenAI's")
    concurrency: int = knob(16, "requests at once", low=1)
    attempts: int = knob(3, "times that the same thing is asked until a reply passes", low=1)
    temperature: float = knob(1.0, "of the language model")
    max_tokens: int = knob(400, "of one reply; a model that thinks aloud needs thousands", low=1)
    seed: int = knob(0, "of the requests, and of what is drawn at random", low=-(2**31))
    max_tokens_total: int = knob(0, "stop before all runs together use more; 0: no limit", high=10**15)
    retries: int = knob(5, "after 429, 5xx, time-outs; Retry-After is honoured up to 120 s")
    timeout_s: float = knob(120.0, "seconds to wait for a reply", above=0, high=86_400)

    def __post_init__(self):
        check_knobs(self)
        if not self.model or not self.out:
            raise UserError("give --model and --out (--help lists the flags)")
        self.rejects = self.rejects or self.beside_out("rejects")

    def beside_out(self, part):
        stem, ending = os.path.splitext(self.out)
        return f"{stem}_{part}{ending}"

    def connect(self, model, schema):
        limits = self.max_tokens, self.retries, self.timeout_s
        return connect(model, self.base_url, self.temperature, *limits, schema)


def start(name, description, metavar, about, options_class, work, argv) -> None:
    """The command of a tool: work(file, options) -> the summary of a run. Raises UserError if any failed."""
    parser = Parser(prog=f"python -m tools.{name}", description=description)
    parser.add_argument("path", metavar=metavar, help=about)
    parser.add_knobs(options_class)
    given = vars(parser.parse_args(argv))
    failed = work(given.pop("path"), options_class(**given))["failed_to_be_asked_again"]
    if failed:
        raise UserError(f"{failed} failed; the same command asks them again")


# -----------------------------------------------------------------------------------------------------------
# The client


class RequestFailed(Exception):
    """A request without a usable answer, after all retries. The next run asks again."""


REMEDIES = {  # statuses that would come back for every request: stop at once
    401: "check OPENAI_API_KEY",
    403: "the key may not do this; check OPENAI_API_KEY and --model",
    404: "check --model and --base_url (it usually ends in /v1)",
}
OPTIONAL = ("response_format", "max_tokens", "seed", "temperature")  # what a server may refuse
NO_CHAT = "the answer is no chat completion; is --base_url right (it usually ends in /v1)?"


def connect(
    model: str,
    base_url: str = "",
    temperature: float = 1.0,
    max_tokens: int = 400,
    retries: int = 5,
    timeout_s: float = 120.0,
    schema: dict | None = None,
) -> Callable:
    """Returns send(messages, seed) -> (text, finish reason, [prompt, completion tokens], are they estimates?)

    schema: of the JSON object that is asked for; None: a plain text. The openai client itself waits and asks
    again after 408, 409, 429, 5xx, time-outs and lost connections.

    Raises UserError if key or address cannot be right. `send` raises RequestFailed, ConnectionError if there
    is no connection at all, or UserError if no request can ever succeed.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    client = open_client(key, base_url or os.environ.get("OPENAI_BASE_URL", ""), retries, timeout_s)
    options = dict(model=model, temperature=temperature, max_tokens=max_tokens)
    if schema is not None:
        named_schema = {"name": "reply", "strict": True, "schema": schema}
        options["response_format"] = {"type": "json_schema", "json_schema": named_schema}
    return Chat(client, key, options).send


def open_client(key, base_url, retries, timeout_s):
    import openai

    if not key and not base_url:
        raise UserError("no OPENAI_API_KEY in the environment; set it, or give --base_url of your own server")
    if not re.fullmatch(r"[!-~]*", key):  # the client would fail with a message that quotes the key
        raise UserError("OPENAI_API_KEY holds a character that no key has; set it anew")
    options = dict(api_key=key or "none", max_retries=retries, timeout=timeout_s)
    try:
        if base_url and not re.match(r"https?://[^/]", base_url) or urllib.parse.urlsplit(base_url).port == 0:
            raise ValueError("no web address")
        return openai.OpenAI(base_url=base_url or None, **options)
    except Exception as e:  # each library that reads the address raises its own
        expected = "http://HOST:PORT/v1 or https://HOST/v1"
        raise UserError(f"--base_url: expected {expected}, found {base_url!r:.200} ({e})") from None


class Chat:
    """An openai client, the options of its requests, and what the server has refused so far."""

    def __init__(self, client, key, options):
        self.client, self.key, self.options = client, key, options
        self.refused = set()
        self.answered = False

    def send(self, messages, seed):
        import openai

        try:
            reply = self.create(self.options | dict(messages=messages, seed=seed))
        except openai.APIError as e:
            said = self.hide_key(e.__cause__ or e)[:300]
            status = getattr(e, "status_code", 0)
            if status in REMEDIES:
                raise UserError(f"the server refuses: {said}; {REMEDIES[status]}") from None
            if type(e) is openai.APIConnectionError:
                raise ConnectionError(said) from None
            raise RequestFailed(said) from None
        except ValueError:  # not JSON
            raise RequestFailed(NO_CHAT) from None
        choice = first_choice(reply)
        self.answered = True
        text = self.hide_key(choice.message.content or getattr(choice.message, "refusal", None) or "")
        tokens = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        estimated = not all(type(n) is int for n in tokens)
        if estimated:
            tokens = [rough_tokens(*(m["content"] for m in messages)), rough_tokens(text)]
        return text, choice.finish_reason, tokens, estimated

    def create(self, options):
        """Send a request. What the server refuses by name is left out, and from the next answer on for good.

        If the first request is refused and no option is named, it is the response format that is left out.
        """
        import openai

        first, refused = not self.answered, set(self.refused)
        while True:
            sent = {name: value for name, value in options.items() if name not in refused}
            if "max_tokens" in refused:
                sent["max_completion_tokens"] = options["max_tokens"]  # its newer name
            try:
                reply = self.client.chat.completions.create(**sent)
                break
            except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as e:
                named = [name for name in OPTIONAL if name in str(e)] or ["response_format"] * first
                named = [name for name in named if name in sent]
                if not named:
                    raise
                refused.add(named[0])
        for name in refused - self.refused:
            print(f"note: the server refuses {name}; it is left out", file=sys.stderr)
        self.refused |= refused
        return reply

    def hide_key(self, text) -> str:
        """Servers echo keys. A key as short as "none" is no secret, and may be a word of the reply."""
        return str(text).replace(self.key, "***") if len(self.key) >= 8 else str(text)


def first_choice(reply):
    """Raises RequestFailed if the reply is no chat completion: the client checks little of what it gets."""
    choices = getattr(reply, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not hasattr(getattr(choice, "message", None), "content"):
        raise RequestFailed(NO_CHAT)
    return choice


def rough_tokens(*texts: str) -> int:
    return sum(len(text.encode("utf-8", "replace")) // 4 + 1 for text in texts)


def rough_prompt_tokens(messages, schema) -> int:
    return rough_tokens(json.dumps(schema), *(m["content"] for m in messages))


class Failures:
    """Counts how requests end, and says when no further one makes sense."""

    def __init__(self, unit):
        self.unit, self.answered, self.failed, self.in_a_row, self.last = unit, 0, 0, 0, ""

    def enter(self, error):
        """How one request ended: an error, or None.      -> the UserError with which to stop, or None"""
        if error is None:
            self.answered += 1
            self.in_a_row = 0
            return None
        self.failed += 1
        self.in_a_row += 1
        self.last = str(error)
        if isinstance(error, UserError):
            return error
        if isinstance(error, ConnectionError) and not self.answered:
            return UserError(f"cannot reach the server: {error}; is it running, and is --base_url right?")
        if self.in_a_row == 20:
            last = f"20 {self.unit}s in a row failed, the last with: {error}"
            return UserError(f"{last}; once that is mended, the same command goes on from here")
        return None


# -----------------------------------------------------------------------------------------------------------
# Replies


class Refused(Exception):
    """A reply that is not accepted; the text is the reason, in words that can be counted."""


def refuse_faults(faults: dict) -> None:
    """{reason: is it so?}      Raises Refused with the first reason that holds."""
    for reason, wrong in faults.items():
        if wrong:
            raise Refused(reason)


def object_schema(**properties) -> dict:
    """The JSON schema of an object with exactly these properties."""
    names = list(properties)
    return {"type": "object", "additionalProperties": False, "required": names, "properties": properties}


def read_reply(text: str, schema: dict) -> dict:
    """The properties of the schema from the one JSON object of a reply; each is a text or a list of texts.

    Prose around the object, and properties that the schema does not name, are left out. Raises Refused.
    """
    text = text.rpartition("</think>")[2]  # some servers leave the model's thoughts in
    decoder, found = json.JSONDecoder(), []
    at = text.find("{")
    while at >= 0:
        try:
            row, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            raise Refused("broken JSON") from None
        if row not in found:
            found.append(row)
        at = text.find("{", end)
    kinds = schema["properties"]
    refuse_faults({"no JSON object": not found, "several JSON objects": len(found) > 1})
    if not kinds.keys() <= found[0].keys():
        raise Refused("missing key")
    row = {name: found[0][name] for name in kinds}
    for name, kind in kinds.items():
        values = row[name] if kind["type"] == "array" else [row[name]]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise Refused("wrong type")
    return row


@dataclass
class Answer:
    """What came of asking: an accepted row, or why the last reply was refused, or an error."""

    row: dict = field(default_factory=dict)
    reason: str = ""
    reply: str = ""
    error: Exception | None = None
    attempts: int = 0
    tokens: list = field(default_factory=lambda: [0, 0])  # prompts, completions
    estimated: int = 0  # replies whose tokens are estimates
    before: "Answer | None" = None  # to another question, on which this one builds

    def add_cost(self, attempts, tokens, estimated):
        self.attempts += attempts
        self.tokens = add_pairs(self.tokens, tokens)
        self.estimated += estimated


def add_pairs(a, b):
    return [a[0] + b[0], a[1] + b[1]]


def ask(send: Callable, name: str, messages: list[dict], options: Options, accept: Callable) -> Answer:
    """Ask until accept(reply) returns a row and does not raise Refused, options.attempts times at most.

    name: what is asked about; it seeds the requests. An error of `send` ends the asking and is in the answer.
    """
    answer = Answer()
    for attempt in range(options.attempts):
        try:
            seed = seed_of(options.seed, name, attempt) >> 25  # 31 bits: servers differ in how many they take
            answer.reply, finish, tokens, estimated = send(messages, seed)
            answer.add_cost(1, tokens, estimated)
            refuse_faults({"cut off": finish == "length"})
            answer.row, answer.reason = accept(answer.reply), ""
            break
        except Refused as e:
            answer.reason = str(e)
        except (RequestFailed, ConnectionError, UserError) as e:
            answer.error = e
            break
    return answer


# -----------------------------------------------------------------------------------------------------------
# The files of a run

LINE = ("id", "audio", "question", "choices", "answer", "meta")  # the keys of a question's line
STOP_WORDS = frozenset(
    "a an the this that these those it its in on at of to is are was were be been do does did and or "
    "clip audio recording".split()
)


@dataclass
class Task:
    """What a run asks about each clip, and what it writes. The names of its files are those of options.

    keys: {name of a file: the keys of its lines}; "out", "rejects", perhaps "rl": questions without a chain
    made: what the `meta` of every line says of how it was made; a run goes on with the same only
    prepare(clip) -> messages, the most tokens that one attempt at the clip can take
    work(clip, messages) -> Answer; it is called in threads
    make_line(clip, answer, fingerprints) -> the name of a file, the fields of the line
    """

    keys: dict[str, tuple]
    made: dict
    prepare: Callable
    work: Callable
    make_line: Callable
    unit: str = "clip"
    found: dict = field(default_factory=dict)  # what there is to ask about: the start of the summary


class Book:
    """The files of a run, each a Ledger, what is known of their lines (hashes, sums), and how the run goes.

    Raises UserError, and changes nothing, if a file is not ours or was made otherwise.
    """

    def __init__(self, task, options, stack):
        self.task, self.options = task, options
        self.done, self.fingerprints = set(), set()  # hashes of ids, and of accepted questions
        self.no_chain, self.rejected = Counter(), Counter()  # reasons
        self.positions = [0] * 4
        self.longest = 0.0  # answers that are the longest choice; one of k equally long ones counts 1 / k
        self.tokens = [0, 0]
        # of this run alone: clips with a line from before, replies whose tokens are estimates, what stops it
        self.failures, self.start_s = Failures(task.unit), time.monotonic()
        self.done_before, self.estimated, self.broken = 0, 0, None
        self.ledgers, names = {}, {}
        for name in task.keys:
            path = getattr(options, name)
            other = names.setdefault(os.path.realpath(path), name)
            if other != name:
                raise UserError(f"--{other} and --{name} name the same file; give two")
            ledger = Ledger(path, "id", functools.partial(self.enter, name))
            self.ledgers[name] = stack.enter_context(ledger)

    def enter(self, name, line, where):
        """Count a line of an earlier run."""
        made, meta = self.task.made, line.get("meta")
        ours = tuple(line) == self.task.keys[name] and line.get("answer", 0) in range(4)
        if not ours or not isinstance(meta, dict) or not meta.keys() >= {"tokens", *made}:
            raise UserError(f"{where}: not written by this command; give another file")
        other = {key: meta[key] for key in made}
        if other != made:
            remedy = "go on with the same, or give other files"
            raise UserError(f"{where}: made with {other}, and this run has {made}; {remedy}")
        self.count(name, line)

    def count(self, name, line):
        self.done.add(seed_of(line["id"]))
        self.tokens = add_pairs(self.tokens, line["meta"]["tokens"])
        if name == "rejects":
            self.rejected[line["reason"]] += 1
            return
        if name == "rl":
            self.no_chain[line["meta"]["no_chain"]] += 1
        self.fingerprints.add(fingerprint(line))
        self.positions[line["answer"]] += 1
        sizes = [len(choice) for choice in line["choices"]]
        if sizes[line["answer"]] == max(sizes):
            self.longest += 1 / sizes.count(max(sizes))

    def jobs(self, clips):
        """Yield (clip, messages, the most tokens of an attempt) of every clip that has no line yet."""
        try:
            for clip in with_own_ids(clips):
                if seed_of(clip.id) in self.done:
                    self.done_before += 1
                else:
                    yield clip, *self.task.prepare(clip)
        except UserError as e:  # all that stands before it is still asked and written
            self.broken = e

    def n_begun(self):
        return self.done_before + self.failures.answered + self.failures.failed

    def has_room(self, jobs):
        """May all these be begun without going beyond the limit?"""
        most = sum(tokens for _, _, tokens in jobs) * self.options.attempts
        limit = self.options.max_tokens_total
        return not limit or sum(self.tokens) + most <= limit

    def take(self, clip, answer):
        """Write the line of an answered clip.      -> the UserError with which to stop, or None"""
        self.estimated += answer.estimated
        if answer.error is None:
            clip = replace(clip, audio=relative_path(self.options.out, clip.audio))
            name, fields = self.task.make_line(clip, answer, self.fingerprints)
            cost = dict(attempts=answer.attempts, tokens=answer.tokens)
            fields = fields | dict(meta=fields["meta"] | self.task.made | cost)
            line = {key: fields[key] for key in self.task.keys[name]}
            self.ledgers[name].append(line)
            self.count(name, line)
        else:
            self.tokens = add_pairs(self.tokens, answer.tokens)
        return self.failures.enter(answer.error)

    def summary(self, stopped):
        accepted, failures = sum(self.positions), self.failures
        return self.task.found | dict(
            accepted=accepted,
            without_a_chain=dict(self.no_chain.most_common()),
            rejected=dict(self.rejected.most_common()),
            failed_to_be_asked_again=failures.failed,
            last_failure=failures.last,
            tokens_in_and_out=self.tokens,
            replies_with_estimated_tokens=self.estimated,
            answers_per_second=round(failures.answered / (time.monotonic() - self.start_s), 1),
            answer_positions=self.positions,
            answer_is_the_longest_choice=round(self.longest / max(accepted, 1), 2),  # 0.25 by chance
            stopped=stopped,
        )


def fingerprint(row: dict) -> int:
    """Equal for questions with the same words in question and choices, in any order, but for stop words."""
    text = " ".join([row["question"], *row["choices"]])
    return seed_of(sorted(set(normal_words(text)) - STOP_WORDS))


# -----------------------------------------------------------------------------------------------------------
# The run: one line on each clip that was answered, in the order of the clips, one system call a line. So the
# files are whole at any moment: after any end, kill -9 included, the same command goes on where they stop,
# and the bytes are those that an unbroken run writes.


def run(clips, task: Task, options: Options) -> dict:
    """Ask about every clip that has no line in any file yet.      -> the summary of all files, also printed

    clips: has a length, is read once and in order. Raises UserError, and KeyboardInterrupt after Ctrl-C; what
    was answered until then is in the files.
    """
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        book = Book(task, options, stack)
        note = "\nstopping when the running requests are answered; Ctrl-C again to leave at once\n"
        stopping = stack.enter_context(interruptible(note=note))
        bar = stack.enter_context(tqdm(total=len(clips), unit=task.unit, dynamic_ncols=True, disable=None))
        n = options.concurrency
        results = ahead(book.jobs(clips), lambda job: task.work(*job[:2]), n, 4 * n, stopping, book.has_room)
        for (clip, _, _), answer in stack.enter_context(contextlib.closing(results)):
            why = book.take(clip, answer)
            if why is not None:
                stopping.append(why)
            bar.update(book.n_begun() - bar.n)
    if book.broken is not None:
        stopping.append(book.broken)
    stopped = ""
    if not stopping and book.n_begun() < len(clips):
        stopped = "at the limit, which the next clip might exceed; the same command with a higher one goes on"
    summary = book.summary(stopped)
    print_summary(summary)
    if stopping:
        raise stopping[0]
    return summary


def print_summary(summary):
    for name, value in summary.items():
        if value in ("", {}):
            continue
        parts = value if isinstance(value, dict) else {}
        if parts:
            value = sum(parts.values())
        if isinstance(value, list):
            value = " ".join(map(str, value))
        print(f"{name.replace('_', ' '):<40}{value}")
        for part, n in parts.items():
            print(f"  {part:<38}{n}")


def with_own_ids(clips):
    """Yield the clips; an id that stands there again gets a number."""
    times = Counter()  # of hashes: ids can be long
    for clip in clips:
        name = clip.id
        while times[seed_of(clip.id)]:
            times[seed_of(name)] += 1
            clip = replace(clip, id=f"{name} #{times[seed_of(name)]}")
        times[seed_of(clip.id)] += 1
        yield clip


def relative_path(out: str, path: str) -> str:
    """The path from the folder of `out`, or the whole one if it is not below that."""
    folder = os.path.dirname(os.path.abspath(out))
    return os.path.normpath(path).removeprefix(os.path.join(folder, ""))
