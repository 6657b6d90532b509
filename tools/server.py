"""A language model behind an OpenAI-compatible server, and a run that asks it about many clips.

Chat      the client: send(messages, seed) -> a reply
ask       asks until a reply is accepted
run       asks about every clip and writes a line on each; it can be stopped at any moment, and goes on

generate.py and events.py are such runs; behaviours.py and served.py use the client alone.
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

from data import (
    Ledger,
    Parser,
    UserError,
    ahead,
    check_knobs,
    interruptible,
    is_list_of,
    knob,
    normal_words,
    progress,
    seed_of,
)


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
        return Chat(model, schema, self.base_url, self.temperature, *limits).send


def start(name, description, metavar, about, options_class, work, argv, **argument) -> None:
    """The command of a tool: work(what METAVAR names, options), which may return the summary of a run.

    argument: how argparse takes METAVAR. Raises UserError if some of the run failed.
    """
    parser = Parser(prog=f"python -m tools.{name}", description=description)
    parser.add_argument("path", metavar=metavar, help=about, **argument)
    parser.add_knobs(options_class)
    given = vars(parser.parse_args(argv))
    path, options = given.pop("path"), options_class(**given)
    check_knobs(options)
    summary = work(path, options) or {}
    if failed := summary.get("failed_to_be_asked_again"):
        raise UserError(f"{failed} failed; the same command asks them again")


# -----------------------------------------------------------------------------------------------------------
# The client


class RequestFailed(Exception):
    """A request without a usable answer, after all retries. The next run asks again."""


FAILURES = (RequestFailed, ConnectionError, UserError)  # what the client raises
REMEDIES = {  # statuses that would come back for every request: stop at once
    401: "check OPENAI_API_KEY",
    403: "the key may not do this; check OPENAI_API_KEY and --model",
    404: "check --model and --base_url (it usually ends in /v1)",
}
NO_CHAT = "the answer is no chat completion; is --base_url right (it usually ends in /v1)?"


def address_of(base_url: str) -> str:
    """Without what may be secret: a name and a password before the host, and a query."""
    return re.sub("//[^/]*@", "//", base_url).partition("?")[0]


def open_client(base_url, retries, timeout_s):
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip()
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
        found = address_of(base_url)
        raise UserError(f"--base_url: expected {expected}, found {found!r:.200} ({e})") from None


class Chat:
    """A language model: send(messages, seed) -> text, finish reason, [prompt, completion tokens], estimated?

    schema: of the JSON object that is asked for; None: a plain text. The openai client itself waits and asks
    again after 408, 409, 429, 5xx, time-outs and lost connections.

    Raises UserError if key or address cannot be right. `send` raises RequestFailed, ConnectionError if there
    is no connection at all, or UserError if no request can ever succeed.
    """

    def __init__(self, model, schema, base_url, temperature, max_tokens, retries=5, timeout_s=120.0):
        self.client = open_client(base_url or os.environ.get("OPENAI_BASE_URL", ""), retries, timeout_s)
        self.model, self.answered = model, False
        self.options = dict(temperature=temperature, max_tokens=max_tokens, seed=0)  # less what is refused
        if schema is not None:
            named_schema = {"name": "reply", "strict": True, "schema": schema}
            self.options["response_format"] = {"type": "json_schema", "json_schema": named_schema}

    def send(self, messages, seed):
        import openai

        try:
            reply = self.create(messages, seed)
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
        text, finish = read_completion(reply)
        text = self.hide_key(text)
        tokens = [getattr(reply.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
        estimated = not is_list_of(int, tokens)
        if estimated:
            tokens = [rough_tokens(*texts_of(messages)), rough_tokens(text)]
        return text, finish, tokens, estimated

    def create(self, messages, seed):
        """Send a request. An option that the server refuses by name is left out, for good once it answers.

        If the first request is refused and no option is named, it is the response format that is left out.
        """
        import openai

        options = dict(self.options)
        while True:
            if "seed" in options:
                options["seed"] = seed
            try:
                reply = self.client.chat.completions.create(model=self.model, messages=messages, **options)
                break
            except (openai.BadRequestError, openai.NotFoundError, openai.UnprocessableEntityError) as e:
                learned = self.options.keys() ^ options.keys()  # by another thread, since this one asked
                guess = ["response_format"] if learned or not self.answered else []
                words = [*learned, *re.findall(r"\w+", str(e)), *guess]
                refused = next((word for word in words if word in options), None)
                if refused is None:
                    raise
                value = options.pop(refused)
                if refused == "max_tokens":
                    options["max_completion_tokens"] = value  # its newer name
        for name in self.options.keys() - options.keys():
            print(f"note: the server refuses {name}; it is left out", file=sys.stderr)
        self.options, self.answered = options, True
        return reply

    def hide_key(self, text) -> str:
        """Servers echo keys. A key as short as "none" is no secret, and may be a word of the reply."""
        key = self.client.api_key
        return str(text).replace(key, "***") if len(key) >= 8 else str(text)


def read_completion(reply) -> tuple[str, str]:
    """-> text, finish reason. Raises RequestFailed if it is no chat completion: the client checks little."""
    try:
        choice = reply.choices[0]
        text = choice.message.content or getattr(choice.message, "refusal", None) or ""
        return text, choice.finish_reason
    except (AttributeError, LookupError, TypeError):
        raise RequestFailed(NO_CHAT) from None


def rough_tokens(*texts: str) -> int:
    return sum(len(text.encode("utf-8", "replace")) // 4 + 1 for text in texts)


def rough_prompt_tokens(messages, schema) -> int:
    return rough_tokens(json.dumps(schema), *texts_of(messages))


def texts_of(messages) -> list[str]:
    """What the messages say; their sounds are left out."""
    texts = []
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if "text" in part]
    return texts


def answer_all(jobs, total, unit, work, take, concurrency, room=lambda waiting: True):
    """work(job) -> Answer in threads; take(job, answer) in the order of the jobs.

    Returns the error, or None, of each job that was begun, as a text; and a list of why no further one makes
    sense: Ctrl-C, or errors. room: as in data.ahead.
    """
    errors, note = [], "\nstopping when the running requests are answered; Ctrl-C again to leave at once\n"
    with interruptible(note=note) as stopping:
        answers = ahead(jobs, work, concurrency, 4 * concurrency, stopping, room)
        with contextlib.closing(answers):
            for job, answer in progress(answers, total, f"{unit}s"):
                take(job, answer)
                error = answer.error
                errors.append(error and str(error))
                if isinstance(error, UserError):
                    stopping.append(error)
                elif isinstance(error, ConnectionError) and None not in errors:
                    remedy = "is it running, and is --base_url right?"
                    stopping.append(UserError(f"cannot reach the server: {error}; {remedy}"))
                elif len(errors) >= 20 and None not in errors[-20:]:
                    last = f"20 {unit}s in a row failed, the last with: {error}"
                    remedy = "once that is mended, the same command goes on from here"
                    stopping.append(UserError(f"{last}; {remedy}"))
    return errors, stopping


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
        refuse_faults({"wrong type": not is_list_of(str, values)})
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


def add_pairs(a, b):
    return [a[0] + b[0], a[1] + b[1]]


def ask(send: Callable, name: str, messages: list, options: Options, accept: Callable, answer=None) -> Answer:
    """Ask until accept(reply) returns a row and does not raise Refused, options.attempts times at most.

    name: what is asked about; it seeds the requests. An error of `send` ends the asking and is in the answer.
    answer: to an earlier question; it becomes the answer to this one, and goes on counting.
    """
    answer = answer or Answer()
    for attempt in range(options.attempts):
        try:
            seed = seed_of(options.seed, name, attempt) >> 25  # 31 bits: servers differ in how many they take
            answer.reply, finish, tokens, estimated = send(messages, seed)
            answer.attempts += 1
            answer.tokens = add_pairs(answer.tokens, tokens)
            answer.estimated += estimated
            refuse_faults({"cut off": finish == "length"})
            answer.row, answer.reason = accept(answer.reply), ""
            break
        except Refused as e:
            answer.row, answer.reason = {}, str(e)
        except FAILURES as e:
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
    """A run: what it asks about each clip, what it writes, and how it goes. The files are those of options.

    keys: {name of a file: the keys of its lines}; "out", "rejects", perhaps "rl": questions without a chain
    made: what the `meta` of every line says of how it was made; a run goes on with the same only
    prepare(clip) -> messages, the most tokens that one attempt at the clip can take
    work(clip, messages) -> Answer; it is called in threads
    make_line(clip, answer, fingerprints) -> the name of a file, the fields of the line
    """

    options: Options
    keys: dict
    made: dict
    prepare: Callable
    work: Callable
    make_line: Callable
    unit: str = "clip"
    found: dict = field(default_factory=dict)  # what there is to ask about: the start of the summary

    def __post_init__(self):
        self.done, self.fingerprints = set(), set()  # hashes of ids, and of accepted questions
        self.longest = 0.0  # answers that are the longest choice; one of k equally long ones counts 1 / k
        self.all_begun, self.broken = False, []  # has every clip its line or a request? The fault of a clip
        self.summary = self.found | dict(
            accepted=0,
            without_a_chain=Counter(),  # reasons
            rejected=Counter(),
            failed_to_be_asked_again=0,
            last_failure="",
            tokens_in_and_out=[0, 0],
            replies_with_estimated_tokens=0,
            answers_per_second=0.0,
            answer_positions=[0] * 4,
            answer_is_the_longest_choice=0.0,  # 0.25 by chance
            stopped="",
        )

    def open(self, stack):
        """Open the files, each a Ledger, and count their lines.

        Raises UserError, and changes nothing, if a file is not ours or was made otherwise.
        """
        self.ledgers, names = {}, {}
        for name in self.keys:
            path = getattr(self.options, name)
            other = names.setdefault(os.path.realpath(path), name)
            if other != name:
                raise UserError(f"--{other} and --{name} name the same file; give two")
            ledger = Ledger(path, "id", functools.partial(self.enter, name))
            self.ledgers[name] = stack.enter_context(ledger)

    def enter(self, name, line, where):
        """Count a line of an earlier run."""
        meta = line.get("meta")
        ours = tuple(line) == self.keys[name] and line.get("answer", 0) in range(4)
        if not ours or not isinstance(meta, dict) or not meta.keys() >= {"tokens", *self.made}:
            raise UserError(f"{where}: not written by this command; give another file")
        made = {key: meta[key] for key in self.made}
        if made != self.made:
            remedy = "go on with the same, or give other files"
            raise UserError(f"{where}: made with {made}, and this run has {self.made}; {remedy}")
        self.count(name, line)

    def count(self, name, line):
        sums, answer = self.summary, line.get("answer")
        self.done.add(seed_of(line["id"]))
        self.spend(line["meta"]["tokens"])
        if name == "rejects":
            sums["rejected"][line["reason"]] += 1
            return
        if name == "rl":
            sums["without_a_chain"][line["meta"]["no_chain"]] += 1
        self.fingerprints.add(fingerprint(line))
        sums["accepted"] += 1
        sums["answer_positions"][answer] += 1
        sizes = [len(choice) for choice in line["choices"]]
        if sizes[answer] == max(sizes):
            self.longest += 1 / sizes.count(max(sizes))
        sums["answer_is_the_longest_choice"] = round(self.longest / sums["accepted"], 2)

    def spend(self, tokens):
        self.summary["tokens_in_and_out"] = add_pairs(self.summary["tokens_in_and_out"], tokens)

    def jobs(self, clips):
        """Yield (clip, messages, the most tokens of an attempt) of every clip that has no line yet."""
        try:
            for clip in with_own_ids(clips):
                if seed_of(clip.id) not in self.done:
                    yield clip, *self.prepare(clip)
        except UserError as e:  # all that stands before it is still asked and written
            self.broken.append(e)
        self.all_begun = True

    def has_room(self, jobs):
        """May all these be begun without going beyond the limit?"""
        most = sum(tokens for _, _, tokens in jobs) * self.options.attempts
        limit = self.options.max_tokens_total
        return not limit or sum(self.summary["tokens_in_and_out"]) + most <= limit

    def take(self, job, answer):
        """Write the line of an answered clip."""
        self.summary["replies_with_estimated_tokens"] += answer.estimated
        if answer.error is not None:
            self.spend(answer.tokens)
            return
        clip = replace(job[0], audio=relative_path(self.options.out, job[0].audio))
        name, fields = self.make_line(clip, answer, self.fingerprints)
        meta = fields["meta"] | self.made | dict(attempts=answer.attempts, tokens=answer.tokens)
        line = {key: meta if key == "meta" else fields[key] for key in self.keys[name]}
        self.ledgers[name].append(line)
        self.count(name, line)


def fingerprint(row: dict) -> int:
    """Equal for questions with the same words in question and choices, in any order, but for stop words."""
    text = " ".join([row["question"], *row["choices"]])
    return seed_of(sorted(set(normal_words(text)) - STOP_WORDS))


# -----------------------------------------------------------------------------------------------------------
# The run: one line on each clip that was answered, in the order of the clips, one system call a line. So the
# files are whole at any moment: after any end, kill -9 included, the same command goes on where they stop,
# and the bytes are those that an unbroken run writes.


def run(clips, task: Task) -> dict:
    """Ask about every clip that has no line in any file yet.      -> the summary of all files, also printed

    clips: has a length, is read once and in order. Raises UserError, and KeyboardInterrupt after Ctrl-C; what
    was answered until then is in the files.
    """
    start_s, summary = time.monotonic(), task.summary
    with contextlib.ExitStack() as stack:
        task.open(stack)
        jobs, left = task.jobs(clips), len(clips) - len(task.done)
        work, n = lambda job: task.work(*job[:2]), task.options.concurrency
        errors, stopping = answer_all(jobs, left, task.unit, work, task.take, n, task.has_room)
    stopping += task.broken
    failures = [error for error in errors if error is not None]
    if failures:
        summary |= dict(failed_to_be_asked_again=len(failures), last_failure=failures[-1])
    summary["answers_per_second"] = round(errors.count(None) / (time.monotonic() - start_s), 1)
    if not stopping and not task.all_begun:
        more = "the same command with a higher one goes on"
        summary["stopped"] = f"at the limit, which the next clip might exceed; {more}"
    print_summary(summary)
    if stopping:
        raise stopping[0]
    return summary


def print_summary(summary):
    for name, value in summary.items():
        if value in ("", {}):
            continue
        parts = Counter(value if isinstance(value, dict) else ())
        if isinstance(value, list):
            value = " ".join(map(str, value))
        print(f"{name.replace('_', ' '):<40}{parts.total() or value}")
        for part, n in parts.most_common():
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
