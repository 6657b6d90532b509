"""What is in a data file, and what is wrong with it: every line is read, every clip is decoded.

Started by `python data.py check FILE`.
"""

import collections
import io
import json
import os
import zlib

import numpy as np

from data import (
    RATE_HZ,
    DataError,
    Embedded,
    Examples,
    UserError,
    ahead,
    is_id,
    normal_text,
    normal_words,
    oddities,
    progress,
    read_audio,
    stem_of,
    write_text,
)
from tools.shortcuts import MANY, find_shortcuts, is_shortcut


class Survey:
    """What is in a data set. Lines are known by "file:line", questions by a hash, clips by a name.

    findings: (line, "problem" or "note", text). heard: of every clip that can be heard its seconds, rate_hz,
    channels, and sound: a hash, None for silence.
    """

    def __init__(self):
        self.findings, self.clips, self.heard, self.unread = [], {}, {}, 0
        self.first = {}  # (kind, value) -> the first line that has it
        self.lines = collections.defaultdict(list)  # of a clip
        self.asked = collections.defaultdict(list)  # the lines of a question
        self.choices, self.answers = collections.Counter(), collections.Counter()
        self.examples = []  # that can be read, for find_shortcuts

    def problem(self, where, text):
        self.findings.append((where, "problem", text))

    def note(self, where, text):
        self.findings.append((where, "note", text))

    def earlier(self, kind, value, where):
        """The line before this one that has the same value, or "" """
        line = self.first.setdefault((kind, value), where)
        return "" if line == where else line

    def facts(self, max_s):
        """Counts, for the screen and the report."""
        heard = list(self.heard.values())
        seconds = sorted(h["seconds"] for h in heard)
        facts = dict(clips=len(heard), hours=round(sum(seconds) / 3600, 4))
        if seconds:
            facts["seconds"] = dict(
                shortest=seconds[0], median=seconds[len(seconds) // 2], longest=seconds[-1]
            )
        facts["cut"] = sum(s > max_s for s in seconds)
        for key in ("rate_hz", "channels"):
            facts[key] = collections.Counter(h[key] for h in heard)
        return facts | dict(choices=self.choices, answers=self.answers)


def survey(examples, max_s):
    """Read every line, and decode every clip with all cores."""
    found = Survey()
    read_lines(found, examples)
    hear_clips(found, max_s)
    return found


def read_lines(found, examples):
    unanswered = []
    for i in progress(range(len(examples)), len(examples), "lines"):
        where = examples.where(i)
        try:
            example = examples[i]
        except DataError as e:
            found.problem(where, str(e).removeprefix(f"{where}: "))
            found.unread += 1
            continue
        if len(found.examples) < MANY:
            found.examples.append(example)
        options, answer = [normal_text(c) for c in example.choices], example.answer
        found.choices[len(options)] += 1
        found.answers[str(answer)] += 1
        if answer is None:
            unanswered.append(where)
        doubled = answer is not None and options.count(options[answer]) > 1
        if doubled:
            gold = f"the answer {example.choices[answer]!r:.80} stands among them twice"
            remedy = "so a right answer can be counted as wrong; drop one or the line"
            found.problem(where, f'field "choices": {gold}, {remedy}')
        for oddity in oddities(example)[doubled:]:  # the first is the equal choices
            found.note(where, f"{oddity}: {example.question!r:.200} {example.choices!r:.200}")
        if line := found.earlier("id", example.id, where):
            found.problem(
                where, f'field "id": {example.id!r:.80} is also the id of {line}; give each its own'
            )
        names = [str(clip) for clip in example.clips]
        question = hash((normal_words(example.question), *sorted(options)))
        if line := found.earlier("question", (question, *names), where):
            found.note(where, f"the same clip and question as {line}")
        found.asked[question].append(where)
        for name, clip in zip(names, example.clips):
            found.clips[name] = clip
            found.lines[name].append(where)
    if len(unanswered) < found.choices.total():
        for where in unanswered:
            found.problem(
                where, 'field "answer": missing, while other lines have one; give it or drop the line'
            )


def hear_clips(found, max_s):
    results = ahead(found.clips.items(), lambda item: listen(item[1], max_s), os.cpu_count() or 1, 64)
    for (name, _), result in progress(results, len(found.clips), "clips"):
        where = found.lines[name][0]
        if isinstance(result, DataError):
            is_missing = "no such file" in str(result)
            remedy = "mend the path, or give --audio_dir" if is_missing else "replace it or drop the line"
            for where in found.lines[name]:
                found.problem(where, f'field "audio": {result}; {remedy}')
            continue
        found.heard[name], seconds = result, result["seconds"]
        if seconds > max_s:
            found.note(where, f'field "audio": lasts {seconds:.1f} s, cut at {max_s:g} s; --max_audio_s')
        if result["note"]:
            found.note(where, f'field "audio": {result["note"]}')
        if result["sound"] and (line := found.earlier("sound", result["sound"], where)):
            found.note(where, f'field "audio": the same sound as {line}, under another name')


def listen(clip, max_s):
    wave, rate_hz, channels, seconds = read_audio(clip, max_s, whole=True)
    sound = (zlib.crc32(wave), zlib.adler32(wave))  # 32 bits are too few for pairs of 10,000 clips
    found = dict(seconds=seconds, rate_hz=rate_hz, channels=channels, sound=sound if wave.any() else None)
    return found | dict(note=oddity_of_clip(clip, wave, channels))


def oddity_of_clip(clip, wave, channels):
    """What a listener would notice at once, or "" """
    if np.abs(wave).max() > 10:
        return (
            f"samples up to {np.abs(wave).max():.3g}, and full scale is 1: a float file in units of integers?"
        )
    power, silent = np.square(wave, dtype=np.float64).mean(), "" if wave.any() else "is silent"
    if channels == 1 or power > 1e-3:
        return silent
    import soundfile

    clip = clip.read() if isinstance(clip, Embedded) else clip
    parts, _ = soundfile.read(io.BytesIO(clip) if isinstance(clip, bytes) else clip, RATE_HZ * 30)
    loudest = np.square(parts).mean(axis=0).max()
    if loudest < 1000 * power or not loudest:
        return silent
    below_db = min(100, 10 * np.log10(loudest / (power + 1e-20)))
    return f"its channels cancel out: mixed, it is {below_db:.0f} dB or more below either"


def find_shared(ours, theirs, path):
    """Add to our findings which clips and questions are also in their data set, at `path`.      -> counts"""
    sounds = {h["sound"] for h in theirs.heard.values()} - {None}
    absent = [clip for name, clip in theirs.clips.items() if name not in theirs.heard]
    ids = set(filter(is_id, map(clip_stem, absent)))
    clips = questions = 0
    for name, clip in ours.clips.items():
        same_sound = name in ours.heard and ours.heard[name]["sound"] in sounds
        if same_sound or clip_stem(clip) in ids:
            clips += len(ours.lines[name])
            for where in ours.lines[name]:
                ours.problem(
                    where, f"its clip is also in {path}; drop the line, or the score will mean little"
                )
    for question, lines in ours.asked.items():
        if question in theirs.asked:
            questions += len(lines)
            for where in lines:
                ours.note(where, f"the same question and choices as in {path}")
    by_name = f"{len(absent)} of {len(theirs.clips)} clips and {theirs.unread} lines of {path}"
    return {"shared": dict(clips=clips, questions=questions), "compared by name, or not": by_name}


def clip_stem(clip):
    return stem_of(clip.path if isinstance(clip, Embedded) else clip)


def shortcut_notes(examples):
    for rule, (right, chance, n) in find_shortcuts(examples).items():
        if is_shortcut(right, chance, n):
            gain = f"is right in {right:.1%} of {n} questions, chance is {chance:.1%}"
            yield f"the options alone: {rule} {gain}; eval.py --controls shows who uses it"


def check_file(path, max_audio_s, audio_dir, columns, against, report):
    """Say what is in a data file and what is wrong with it.       -> 0, or 2 if there is a problem"""
    examples = Examples(path, audio_dir, columns)
    others = Examples(against) if against else None
    if report and os.path.realpath(report) in map(os.path.realpath, (path, against)):
        raise UserError(f"--report {report}: is the data itself; give another name")
    if report:
        open(report, "a").close()  # if it cannot be written, say so now
    found = survey(examples, max_audio_s)
    facts = found.facts(max_audio_s)
    if others:
        facts |= find_shared(found, survey(others, max_audio_s), against)
    found.findings[:0] = [(path, "note", text) for text in shortcut_notes(found.examples)]
    print(f"{examples}, {len(found.heard)} clips heard")
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v:g}" for k, v in value.items())
        print(f"  {key:12} {value}")
    for kind, most in (("note", 20), ("problem", 200)):
        texts = [f"{where}: {text}" for where, k, text in found.findings if k == kind]
        print(f"  {kind + 's':12} {len(texts)}", *texts[:most], sep="\n    ")
        if len(texts) > most:
            print(f"    ... and {len(texts) - most} more; --report FILE.json has them all")
    if report:
        about = dict(file=path, format=examples.format, version=examples.version, examples=len(examples))
        about |= facts | dict(skipped=examples.skipped, findings=found.findings)
        write_text(report, json.dumps(about, indent=1))
    return 2 if any(kind == "problem" for _, kind, _ in found.findings) else 0
