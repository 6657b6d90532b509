"""Audio question answering data: one `Example` per question, read lazily, checked before anything expensive starts.

    python data.py check FILE        read every line and every sound, list what is wrong

A data set is a file whose rows are recognised by their keys (`FORMATS`): our own JSONL, whose keys are the fields of
`Example`, and R1-AQA's JSONL. To add a format, add one entry to FORMATS: the keys that give it away, and a function from
one row to the fields of `Example`. Reading a data set never touches audio and never needs torch.
"""

import argparse
import collections
import json
import math
import os
import sys
import time
import zlib
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

RATE_HZ = 16_000  # what every supported audio encoder expects
MIN_SAMPLES = 321  # anything shorter gives no audio token (25 tokens a second, after two strides and a pooling)


class UserError(Exception):
    """Something the user can mend: the message says what was found and what to do; no traceback, exit code 2."""


class DataError(UserError):
    """A fault in a data file: the message names file, line and field."""


class AudioError(DataError):
    """A clip that cannot be heard: missing, unreadable, empty, too short or not finite."""


# ---------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass
class Example:
    """One question. `answer` is an index into `choices`; `target` the completion(s) to imitate in a cold start."""

    id: str
    audio: str | bytes | None  # path (absolute once read), file content, or None for a text-only question
    question: str
    choices: list[str] = field(default_factory=list)
    answer: int | None = None
    target: str | list[str] | None = None
    meta: dict = field(default_factory=dict)


def own_row(row: dict) -> dict:
    """`audio` must be there, or null on purpose: a misspelt key must not become training on text alone."""
    if "audio" not in row:
        raise DataError('field "audio": missing; give a path, or null for a question without sound')
    return {k: row[k] for k in ("id", "audio", "question", "choices", "answer", "target", "meta") if k in row}


def r1_aqa_row(row: dict) -> dict:
    """AVQA as R1-AQA ships it (arXiv 2503.11197): null choices are padding, and "video" in a question means the sound."""
    choices, answer = row["multi_choice"], row["answer"]
    if isinstance(choices, list):
        if type(answer) is int and 0 <= answer < len(choices):  # True is an int too
            if choices[answer] is None:
                raise DataError('field "answer": it points at a null choice; drop the line or mend the answer')
            answer -= choices[:answer].count(None)
        choices = [c for c in choices if c is not None]
    question = row["question_text"]
    if isinstance(question, str):
        question = question.replace("video", "audio")
    return dict(id=row.get("id"), audio=row["audio_path"], question=question, choices=choices, answer=answer,
                meta={k: v for k, v in row.items()
                      if k not in ("id", "audio_path", "question_text", "multi_choice", "answer")})


FORMATS = [  # name, the keys that give it away, row -> fields of Example
    ("R1-AQA", {"question_text", "multi_choice", "answer", "audio_path"}, r1_aqa_row),
    ("own", {"question"}, own_row),
]


def parse(raw: bytes, where: str):
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text ({e.reason}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: broken JSON ({e}); was the file cut off, or an object spread over several lines?") from None


def make_example(row, convert, where: str, folder: str) -> Example:
    """One raw row -> a valid Example. Raises DataError with `where` (file:line), the field and the remedy."""

    def bad(key, problem):
        raise DataError(f'{where}: field "{key}": {problem}')

    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {row!r:.60}")
    try:
        fields = convert(row)
    except KeyError as e:
        bad(e.args[0], f"missing; found only {sorted(row)!r:.300}")
    except DataError as e:
        raise DataError(f"{where}: {e}") from None
    # null is the same as missing
    example = Example(**{"id": None, "audio": None, "question": None} | {k: v for k, v in fields.items() if v is not None})
    example.id = str(where.rpartition(":")[2] if example.id is None else example.id)
    if not isinstance(example.question, str) or not example.question.strip():
        bad("question", f"expected a text, found {example.question!r:.60}")
    if not isinstance(example.choices, list) or not all(isinstance(c, str) and c.strip() for c in example.choices):
        bad("choices", f"expected a list of texts, found {example.choices!r:.80}")
    if len(example.choices) == 1:
        bad("choices", f"only one choice, {example.choices[0]!r:.80}: a question needs at least two")
    n, answer = len(example.choices), example.answer
    if isinstance(answer, str):  # the answer's text instead of its index
        if answer not in example.choices:
            bad("answer", f"{answer!r:.80} is not among the choices {example.choices!r:.300}")
        example.answer = example.choices.index(answer)
    elif isinstance(answer, bool) or not isinstance(answer, int | None):
        bad("answer", f"expected the index or the text of a choice, found {answer!r:.80}")
    elif answer is not None and not 0 <= answer < n:
        bad("answer", f"{answer!r:.80} is not among the {n} choices" + (f"; give an index from 0 to {n - 1}" if n else ""))
    targets = [] if example.target is None else example.target if isinstance(example.target, list) else [example.target]
    if example.target == [] or not all(isinstance(t, str) for t in targets):
        bad("target", f"expected a text or a list of texts, found {example.target!r:.60}")
    for key, texts in (("question", [example.question]), ("choices", example.choices), ("target", targets)):
        try:
            " ".join(texts).encode()
        except UnicodeEncodeError as e:  # JSON can write it, no tokenizer can read it
            bad(key, f"holds {e.object[e.start]!a}, which is half a character; mend or drop the line")
    if not isinstance(example.meta, dict):
        bad("meta", f"expected an object, found {example.meta!r:.60}")
    if isinstance(example.audio, str):
        if not example.audio:
            bad("audio", "an empty path; give a file, or null for a text-only question")
        try:
            example.audio = os.path.join(folder, os.path.expanduser(example.audio))
        except ValueError:  # a NUL byte or half a character
            bad("audio", f"expected a path, found {example.audio!r:.80}")
    elif not isinstance(example.audio, bytes | None):
        bad("audio", f"expected a path, found {example.audio!r:.60}")
    return example


def no_file(path: str) -> str:
    """What is wrong with a path that should be a file, "" if nothing is. A pipe or a device is no file: it could hang."""
    if os.path.isfile(path):
        return ""
    what = "is a directory" if os.path.isdir(path) else "is not a regular file" if os.path.exists(path) else "no such file"
    return f"{path:.1000}: {what}"


class Examples(collections.abc.Sequence):
    """A data file as a sequence of Example, parsed on access: a million lines cost eight bytes each."""

    def __init__(self, path: str):
        self.path, self.folder = path, os.path.dirname(os.path.abspath(path))
        self.rows = None  # a JSON list is held whole, JSON lines are not
        if problem := no_file(path):
            raise DataError(f"{problem}; expected a file of questions (JSONL)")
        try:
            self.file = open(path, "rb")
            head = self.file.read(1024)
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}") from None
        if not head:
            raise DataError(f"{path}: is empty; expected a file of questions (JSONL)")
        self.file.seek(0)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            self.rows = parse(self.file.read(), path)
        else:
            self.starts, self.numbers = array("q"), array("q")  # byte offset and line number of every non-empty line
            start = 0
            for number, line in enumerate(self.file, 1):
                if line.strip():
                    self.starts.append(start)
                    self.numbers.append(number)
                start += len(line)
            self.starts.append(start)
        if not len(self):
            raise DataError(f"{path}: holds no question")
        first, where = self.raw(0)
        if not isinstance(first, dict):
            raise DataError(f"{where}: expected a JSON object, found {first!r:.60}")
        for self.format, signature, self.convert in FORMATS:
            if signature <= first.keys():
                break
        else:
            known = "; ".join(f"{name}: {', '.join(sorted(signature))}" for name, signature, _ in FORMATS)
            raise DataError(f"{where}: unknown format, keys {sorted(first)!r:.300}. Known formats and their keys: {known}")

    def __len__(self):
        return len(self.numbers) if self.rows is None else len(self.rows)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.numbers[i]}" if self.rows is None else f"{self.path}:entry {i + 1}"

    def raw(self, i: int):
        """(row, "file:line") of example i."""
        if self.rows is not None:
            return self.rows[i], self.where(i)
        # pread: threads may share it, and a file that shrank meanwhile is an error and not a crash
        line = os.pread(self.file.fileno(), self.starts[i + 1] - self.starts[i], self.starts[i])
        return parse(line, self.where(i)), self.where(i)

    def __getitem__(self, i: int) -> Example:
        row, where = self.raw(range(len(self))[i])
        return make_example(row, self.convert, where, self.folder)


def scan(examples: Examples, purpose: str = "train", most: int = 10) -> array:
    """Parse every line and look for its audio file; no audio is read.       -> one hash a line, of its clip or its id

    purpose: "train" needs choices and an answer, "cold_start" a target, "check" neither.
    Raises DataError listing the first `most` problems.
    """
    keys, problems, seen = array("L"), [], {}
    for i in range(len(examples)):
        try:
            example = examples[i]
            where = examples.where(i)
            if purpose == "train" and (example.answer is None or not example.choices):
                missing = "answer" if example.choices else "choices"
                raise DataError(f'{where}: field "{missing}": missing, and training needs it')
            if purpose == "cold_start" and example.target is None:
                raise DataError(f'{where}: field "target": missing, and a cold start needs the text to imitate')
            if isinstance(example.audio, str) and example.audio not in seen:
                if len(seen) < 100_000:  # several questions a clip is usual; remembering them all is not worth it
                    seen[example.audio] = True
                if problem := no_file(example.audio):
                    raise DataError(f'{where}: field "audio": {problem}')
            source = os.path.normpath(example.audio) if isinstance(example.audio, str) else example.id
            keys.append(zlib.crc32(source.encode("utf-8", "replace")))
        except DataError as e:
            keys.append(0)
            problems.append(str(e))
            if len(problems) == most:
                break
    if problems:
        raise DataError("\n".join(problems) + ("\n..." if len(problems) == most else ""))
    return keys


def held_out(keys: array, n: int) -> tuple[list[int], list[int]]:
    """Split by clip: -> (train indices, about n held-out indices). All questions on one clip fall on one side."""
    n = min(n, len(keys) // 5)
    if not n:
        return list(range(len(keys))), []
    mixed = [zlib.crc32(k.to_bytes(8, "little")) for k in keys]
    limit = sorted(mixed)[n - 1]
    train, held = [i for i, h in enumerate(mixed) if h > limit], [i for i, h in enumerate(mixed) if h <= limit]
    return (train, held) if train else (held, [])  # one clip cannot be split


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(source: str | bytes, max_s: float = 30.0) -> tuple[np.ndarray, bool]:
    """A wav, flac, ogg or mp3, whatever its name -> (float32 mono samples at 16 kHz, was it cut at max_s?).

    Channels are averaged and then resampled with soxr; only the first max_s seconds are decoded.
    Raises AudioError with the path and the reason.
    """
    import io

    import soundfile
    import soxr

    name = source if isinstance(source, str) else f"<{len(source)} bytes>"
    if isinstance(source, str) and no_file(source):
        raise AudioError(no_file(source))
    try:  # by descriptor: from a name such as x.raw or x.au the library would guess a format
        with soundfile.SoundFile(os.open(source, os.O_RDONLY) if isinstance(source, str) else io.BytesIO(source)) as f:
            wave = f.read(int(max_s * f.samplerate) + 1, dtype="float32", always_2d=True)
            rate_hz = f.samplerate
    except (OSError, RuntimeError) as e:  # soundfile's errors are RuntimeErrors
        raise AudioError(f"{name}: not a readable sound file ({str(e).rpartition(': ')[2].strip()})") from None
    if not len(wave):
        raise AudioError(f"{name}: is empty")
    if not (np.abs(wave) < 1e9).all():  # full scale is 1; a channel mean or a spectrum of more could overflow
        raise AudioError(f"{name}: holds samples that are not finite numbers, or absurdly large ones")
    cut = len(wave) > max_s * rate_hz
    wave = wave[:int(max_s * rate_hz)].mean(axis=1)
    if rate_hz != RATE_HZ:
        wave = soxr.resample(wave, rate_hz, RATE_HZ)
    if len(wave) < MIN_SAMPLES:
        raise AudioError(f"{name}: too short, {len(wave) / RATE_HZ * 1000:.1f} ms; at least "
                         f"{MIN_SAMPLES / RATE_HZ * 1000:.1f} ms are needed")
    return np.ascontiguousarray(wave, dtype=np.float32), cut


def ahead(items, work, workers: int, depth: int):
    """Yield (item, work(item) or the DataError it raised) in order, computing up to `depth` items in advance."""
    def run(item):
        try:
            return work(item)
        except DataError as e:
            return e

    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        queue = collections.deque((item, pool.submit(run, item)) for item in islice(items, depth))
        try:
            while queue:
                item, future = queue.popleft()
                for new in islice(items, 1):
                    queue.append((new, pool.submit(run, new)))
                yield item, future.result()
        finally:
            for _, future in queue:
                future.cancel()


def probe_audio(examples: Examples, max_s: float, budget_s: float = 5.0) -> tuple[int, list[str]]:
    """Decode clips for budget_s seconds, first and last lines first.      -> (number decoded, problems)"""
    n = len(examples)
    edge = [*range(min(n, 32)), *range(max(32, n - 32), n)]
    order = [*edge, *range(32, max(32, n - 32))]
    problems, count, deadline = [], 0, time.monotonic() + budget_s
    clips = ((i, audio) for i in order if (audio := examples[i].audio) is not None)
    for (i, _), result in ahead(clips, lambda clip: load_audio(clip[1], max_s)[0].shape, os.cpu_count() or 1, 16):
        count += 1
        if isinstance(result, DataError):
            problems.append(f'{examples.where(i)}: field "audio": {result}')
        if time.monotonic() > deadline and count >= min(len(edge), n):
            break
    return count, problems


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@dataclass(frozen=True)
class Template:
    """A named prompt: the user turn is the clip, the question, its options, and `ending`."""

    ending: str
    system: str | None = None  # None: whatever the checkpoint's chat template puts there
    max_new_tokens: int = 32


PROMPTS = {
    # Omni-R1 (arXiv 2505.09439): nothing but the question and its options
    "direct": Template(""),
    # R1-AQA (arXiv 2503.11197), without and with a chain of thought
    "answer": Template(" Output the final answer in <answer> </answer>."),
    "think": Template(" Output the thinking process in <think> </think> and final answer in <answer> </answer>.",
                      max_new_tokens=256),
}


def chat(example: Example, prompt: Template, with_audio: bool = True) -> list[dict]:
    """Messages for a chat template. Options are written as R1-AQA writes them, a Python list."""
    options = f" Please choose the answer from the following options: {example.choices}." if example.choices else ""
    content = [{"type": "text", "text": example.question + options + prompt.ending}]
    if with_audio and example.audio is not None:
        content.insert(0, {"type": "audio", "audio": "clip"})  # what to play is placed later, by position
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return [*system, {"role": "user", "content": content if len(content) > 1 else content[0]["text"]}]


def shuffle_choices(example: Example, rng) -> Example:
    """The same question with its options in another order (`rng`: a random.Random)."""
    order = rng.sample(range(len(example.choices)), len(example.choices))
    answer = None if example.answer is None else order.index(example.answer)
    return Example(**{**vars(example), "choices": [example.choices[i] for i in order], "answer": answer})


# ---------------------------------------------------------------------------------------------------------------------
# The demo's sounds: synthesised, labelled, written as real wav files


def synthesise(label: str, rng: np.random.Generator) -> np.ndarray:
    """A random instance of one of SOUNDS.       -> float32 at 16 kHz, 0.5 to 0.8 s"""
    n = int(rng.uniform(0.5, 0.8) * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    wave = SOUNDS[label](t, rng)
    wave = wave / (np.abs(wave).max() + 1e-9) + 0.003 * rng.standard_normal(n)
    return (0.9 * 10 ** rng.uniform(-1, 0) * wave / np.abs(wave).max()).astype(np.float32)


def tone(t, hz):  # hz: a number or one value a sample
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hz, t.shape)) / RATE_HZ)


def noise(t, rng, low_hz, high_hz):
    spectrum = np.fft.rfft(rng.standard_normal(len(t)))
    hz = np.fft.rfftfreq(len(t), 1 / RATE_HZ)
    return np.fft.irfft(spectrum * ((hz >= low_hz) & (hz <= high_hz)), len(t))


def pulses(t, rate_hz, decay):  # 1 at every pulse, then dying away
    return np.exp(-decay * ((t * rate_hz) % 1) / rate_hz)


SOUNDS = {
    "beep": lambda t, r: tone(t, r.uniform(700, 1300)) * (pulses(t, r.uniform(4, 6), 1) > np.exp(-0.1)),
    "buzz": lambda t, r: np.sign(tone(t, r.uniform(80, 160))),
    "hiss": lambda t, r: noise(t, r, 4000, 8000),
    "rumble": lambda t, r: noise(t, r, 40, 300),
    "whistle": lambda t, r: tone(t, r.uniform(2000, 3200)),
    "chirp": lambda t, r: tone(t, 1500 + 2500 * ((t * r.uniform(5, 8)) % 1)),
    "siren": lambda t, r: tone(t, 1000 + 500 * np.sin(2 * np.pi * r.uniform(2, 4) * t)),
    "clicks": lambda t, r: noise(t, r, 1000, 8000) * pulses(t, r.uniform(9, 14), 300),
    "bell": lambda t, r: sum(tone(t, r.uniform(450, 650) * k) for k in (1, 2.76, 5.4)) * np.exp(-6 * t),
    "knock": lambda t, r: tone(t, r.uniform(150, 220)) * pulses(t, r.uniform(4, 6), 30),
    "hum": lambda t, r: tone(t, r.uniform(250, 400)) * (1 + np.sin(2 * np.pi * r.uniform(6, 9) * t)),
    "roar": lambda t, r: noise(t, r, 300, 2500),
}


def write_sounds(folder: str, n: int, n_choices: int, seed: int, name: str, silent: float = 0.0) -> str:
    """Make n labelled clips and a JSONL of multiple-choice questions about them.      -> path of the JSONL

    A share of `silent` clips holds nothing, as in real collections: there only the options are left to go by.
    """
    import soundfile

    rng = np.random.default_rng(seed)
    labels = list(SOUNDS)
    asks = ["Which sound is heard in this clip?", "What is this sound?", "What do you hear?"]
    os.makedirs(os.path.join(folder, "sounds"), exist_ok=True)
    path = os.path.join(folder, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            label = labels[i % len(labels)]
            choices = [label, *rng.choice([x for x in labels if x != label], n_choices - 1, replace=False).tolist()]
            rng.shuffle(choices)
            audio = f"sounds/{name}_{i:04d}.wav"
            wave = synthesise(label, rng) * (rng.random() >= silent)
            soundfile.write(os.path.join(folder, audio), wave, RATE_HZ)
            example = Example(f"{name}_{i:04d}", audio, asks[rng.integers(len(asks))], choices, choices.index(label),
                              meta={"label": label})
            f.write(json.dumps(asdict(example)) + "\n")
    return path


def write_lessons(path: str, n: int = 8000) -> str:
    """Questions of `write_sounds` -> n cold-start lessons in their place, for the demo's base model.

    A quarter names a clip; in the others, some of them silent, every option is as good an answer as any: the base learns
    to hear and to answer in the format, and nothing that connects the two.
    """
    import soundfile

    rng = np.random.default_rng(0)
    with open(path, encoding="utf-8") as f:
        clips = [json.loads(line) for line in f]
    soundfile.write(os.path.join(os.path.dirname(path), "sounds", "silence.wav"), np.zeros(10_000), RATE_HZ)
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(n):
            clip, kind = clips[rng.integers(len(clips))], rng.random()
            if kind < 0.25:
                lesson = dict(audio=clip["audio"], question="Name the sound.", target=clip["meta"]["label"])
            else:
                choices = rng.permutation(list(SOUNDS))[:4].tolist()
                lesson = dict(audio="sounds/silence.wav" if kind < 0.4 else clip["audio"], question=clip["question"],
                              choices=choices, target=choices)
            f.write(json.dumps(lesson) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def check(path: str, max_s: float) -> None:
    """Read every line and every clip of a data file and say what is in it."""
    from tqdm import tqdm

    examples = Examples(path)
    scan(examples, "check", most=50)
    durations, cut, problems = [], 0, []
    clips = ((i, e.audio) for i, e in enumerate(examples) if e.audio is not None)
    for (i, _), result in tqdm(ahead(clips, lambda clip: load_audio(clip[1], max_s), os.cpu_count() or 1, 32),
                               total=len(examples), desc="clips", leave=False):
        if isinstance(result, DataError):
            problems.append(f'{examples.where(i)}: field "audio": {result}')
        else:
            durations.append(len(result[0]) / RATE_HZ)
            cut += result[1]
    answers = collections.Counter(e.answer for e in examples)
    print(f"{path}: {examples.format} format, {len(examples)} examples, {len(durations)} clips heard, "
          f"{sum(durations) / 3600:.2f} h, {cut} cut at {max_s:g} s")
    print("answer positions: " + ", ".join(f"{k}: {v}" for k, v in sorted(answers.items(), key=str)))
    if problems:
        raise DataError("\n".join(problems))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("check", help="read every line and every sound of a data file, list what is wrong")
    sub.add_argument("file")
    sub.add_argument("--max_audio_s", type=float, default=30.0, help="seconds of a clip that are read")
    args = parser.parse_args(argv)
    if not 0 < args.max_audio_s < math.inf:
        parser.error(f"--max_audio_s {args.max_audio_s:g}: must be above 0")
    try:
        check(args.file, args.max_audio_s)
    except DataError as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
