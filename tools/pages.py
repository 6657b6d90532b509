"""Pages to look and listen through what a model said. Each is one file, with its sounds inside.

    python -m tools.pages runs/NAME      what was said in training, the newest first: runs/NAME/rollouts.html

The page of an evaluation, report.html, is written by eval.py itself. A <seg>start, end</seg> is a button that
plays that part of the clip; where nothing was heard again for it, it is struck through.
"""

import base64
import collections
import html
import io
import json
import os
import re
from dataclasses import dataclass, field

import data
import eval as ev
from data import UserError, knob
from tools import server

BUDGET_MIB = 96.0  # of sounds in a page; further clips are linked by their path
ORDER = ("won", "lost", "unheard", "wrong", "unresolved", "right", "unscored")  # of the groups of report.html
MOST_ROLLOUTS = 2000


@dataclass
class Entry:
    """One question of a page, with what was said."""

    title: list[str]
    state: str  # right, wrong, unresolved or unscored: the colour
    question: str
    choices: list[str]
    gold: int | None
    said: list[tuple]  # (text, parts of the clip that were heard again, or None where that is not known)
    clips: list = field(default_factory=list)
    given: int | None = None  # the choice that was given as the answer
    error: str = ""


# ------------------------------------------------------------------------------------------------------------
# HTML. All text of data and models goes through `escape`, and cannot become markup


def escape(x) -> str:
    return html.escape(str(x))


def html_table(heads: list, rows: list) -> str:
    lines = []
    for tag, cells in [("th", heads), *(("td", row) for row in rows)]:
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>" if rows else ""


SEGMENT = re.compile(html.escape(data.SEGMENT))  # in escaped text


def text_html(text: str, heard: list | None) -> str:
    """The text, in which every segment is a button where `heard` is known: [[start, end], ...] in order."""
    left = list(heard or [])

    def button(found):
        start, end = float(found[1]), float(found[2])
        state, title = "refused", "refused: nothing was heard again"
        for n, part in enumerate(left):
            if abs(part[0] - start) < 1e-6 and part[1] <= end + 1e-6:  # it may end earlier, with the clip
                del left[: n + 1]
                state, title = "heard", "heard again"
                break
        places = f'data-start="{start}" data-end="{end}"'
        return f'<button class="{state}" title="{title}" {places}>&#9654; {found[1]}, {found[2]}</button>'

    text = escape(text)
    return "<q>" + (text if heard is None else SEGMENT.sub(button, text, count=100)) + "</q>"


def entry_html(entry: Entry, numbers: dict[str, int]) -> str:
    """numbers: name of a clip -> its place among the sounds of the page"""
    title = " · ".join(part for part in entry.title if part)
    lines = [f'<div class="item {entry.state}"><div class="small">{escape(title)}</div>']
    for name in map(str, entry.clips):
        if name in numbers:
            lines.append(f'<audio controls preload="none" data-clip="{numbers[name]}"></audio>')
    if entry.error:
        lines.append(f'<div class="bad">{escape(entry.error)}</div>')
    lines.append(f"<div>{escape(entry.question)}</div><ul>")
    for i, choice in enumerate(entry.choices):
        kind, mark = "", ""
        if i == entry.given:
            kind, mark = "bad", " ←"
        if i == entry.gold:
            kind, mark = "gold", " ✓" + mark
        lines.append(f'<li class="{kind}">{escape(choice)}{mark}</li>')
    lines.append("</ul>")
    lines += [text_html(text, heard) for text, heard in entry.said[:8]]
    return "\n".join([*lines, "</div>"])


def make_page(title: str, head: str, groups: dict[str, list[Entry]], sounds: dict[str, tuple]) -> str:
    """head: HTML. sounds: name of a clip -> (address, seconds)"""
    numbers = {name: n for n, name in enumerate(sounds)}
    packed = json.dumps(list(sounds.values())).replace("<", "\\u003c")  # no tag can close the script
    parts = []
    for name, entries in groups.items():
        body = "\n".join(entry_html(entry, numbers) for entry in entries)
        opened = "" if parts else " open"
        summary = f"<summary>{escape(name)}: {len(entries)}</summary>"
        parts.append(f"<details{opened}>{summary}\n{body}\n</details>")
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><link rel="icon" href="data:,">
{STYLE}
<h1>{escape(title)}</h1>
{head}
{chr(10).join(parts)}
<script id="sounds" type="application/json">{packed}</script>
{SCRIPT}
</html>
"""


STYLE = """<style>
 body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
 table { border-collapse: collapse; margin: 1em 0 }
 th, td { border-bottom: 1px solid #ddd; padding: .15em .8em .15em 0; text-align: left }
 summary { font-size: 120%; margin: 1em 0; cursor: pointer }
 .item { border-left: 5px solid #999; padding: .3em 1em; margin: 1em 0; background: #f7f7f7 }
 .right { border-color: #2a8a3e } .wrong { border-color: #c0392b } .unresolved { border-color: #e0a100 }
 .gold { color: #2a8a3e; font-weight: 600 } .bad { color: #c0392b; text-decoration: underline }
 .small { color: #666; font-size: 85% } audio { width: 100%; height: 2.2em } q { font-family: monospace }
 button { padding: 0 .5em; margin: 0 .2em; border: 1px solid #222; border-radius: 1em; background: none }
 .heard { background: #cfe4ff } .refused { text-decoration: line-through }
</style>"""
SCRIPT = """<script>
"use strict";
const sounds = JSON.parse(document.getElementById("sounds").textContent);
for (const player of document.querySelectorAll("audio")) player.src = sounds[player.dataset.clip][0];
document.onclick = event => {
  const button = event.target.closest("button");
  if (!button) return;
  let start = +button.dataset.start, end = +button.dataset.end;
  const players = button.closest(".item").querySelectorAll("audio");
  for (const player of players) { player.pause(); player.ontimeupdate = null; }
  for (const player of players) {  // the clips of a question stand on one time line
    const seconds = sounds[player.dataset.clip][1], stop = end;
    if (start < seconds) {
      player.ontimeupdate = () => {
        if (player.currentTime >= stop) { player.pause(); player.ontimeupdate = null; }
      };
      player.currentTime = start;
      player.play();
      return;
    }
    start -= seconds;
    end -= seconds;
  }
};
</script>"""


# ------------------------------------------------------------------------------------------------------------
# Sounds


def encode_sound(clip, max_audio_s: float) -> tuple[str, float]:
    """-> (a data: URI, 16 kHz mono in Ogg Vorbis, about 5 kB a second; seconds). Raises AudioError."""
    import soundfile

    wave, _ = data.load_audio(clip, max_audio_s)
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", data.RATE_HZ, 1, format="OGG", subtype="VORBIS") as f:
        for start in range(0, len(wave), 65536):  # the encoder overflows its stack on one long write
            f.write(wave[start : start + 65536])
    packed = base64.b64encode(buffer.getvalue()).decode()
    return f"data:audio/ogg;base64,{packed}", len(wave) / data.RATE_HZ


def encode_sounds(groups: dict[str, list[Entry]], max_audio_s: float) -> dict[str, tuple]:
    """-> {name of a clip: (address, seconds)}, without those that cannot be heard"""
    clips = {}
    for entry in ev.flatten(groups.values()):
        clips.update({str(clip): clip for clip in entry.clips})
    room, sounds = BUDGET_MIB * 2**20, {}
    encoded = data.ahead(clips, lambda name: encode_sound(clips[name], max_audio_s), os.cpu_count() or 1, 32)
    for name, sound in encoded:
        if isinstance(sound, data.DataError):
            continue
        if room > 0:
            room -= len(sound[0])
            sounds[name] = sound
        elif isinstance(clips[name], str):
            sounds[name] = ("file://" + os.path.abspath(name), sound[1])
    return sounds


# ------------------------------------------------------------------------------------------------------------
# The two pages


def write_report(folder: str, report: dict, items: list, max_audio_s: float, flips=None) -> None:
    """report.html of an evaluation. flips: {key of an item: won or lost}, against another run"""
    groups = {name: [] for name in ORDER}
    for item in items:
        entry, flip = item_entry(item), (flips or {}).get(item.key, "")
        entry.title.insert(2, flip)
        if report.get("audio") in ("silence", "none"):
            entry.clips = []
        groups[flip or ("unheard" if item.error else entry.state)].append(entry)
    groups = {name: entries for name, entries in groups.items() if entries}
    title = f"{report['file']}: {report.get('model', '')} {report.get('adapter', '')}".strip()
    lines = "<br>\n".join(map(escape, ev.report_lines(report)))
    head = f"<p>{escape(ev.report_title(report))}</p>{html_table(*ev.report_table(report))}<p>{lines}</p>"
    write_page(f"{folder}/report.html", title, head, groups, max_audio_s)


def item_entry(item) -> Entry:
    """An item of eval.py"""
    example, state = item.example, "wrong"
    if not example.has_answer:
        state = "unscored"
    elif item.score == 1:
        state = "right"
    elif item.vote is None and example.choices:
        state = "unresolved"
    tags = [f"{name}: {example.meta[name]}" for name in ev.COLUMNS if example.meta.get(name)]
    said = []
    for line in item.answers.values():
        again = line.get("again") or [None] * len(line["said"])
        said += zip(line["said"], again)
    return Entry(
        [example.id, state, *tags],
        state,
        example.question,
        example.choices,
        example.answer,
        said,
        item.clips,
        item.vote,
        item.error,
    )


ROLLOUT = dict(  # what a line of rollouts.jsonl has to hold
    step=int,
    id=str,
    question=str,
    choices=list,
    completion=str,
    reward=(int, float),
    parts=dict,
    advantage=(int, float),
)


def write_rollouts(path: str, max_audio_s: float = 30.0) -> str:
    """rollouts.jsonl of a run, or its folder -> rollouts.html beside it. Raises UserError on other files."""
    if os.path.isdir(path):
        path = f"{path}/rollouts.jsonl"
    if problem := data.file_problem(path):
        raise UserError(problem)
    with open(path, "rb") as f:
        whole = ((n, line) for n, line in enumerate(f, 1) if line.endswith(b"\n"))
        lines = collections.deque(whole, MOST_ROLLOUTS)
    groups = collections.defaultdict(list)
    for n, line in reversed(lines):
        row = data.parse_json(line, f"{path}:{n}")
        known = row if isinstance(row, dict) else {}
        bad = [key for key, kind in ROLLOUT.items() if not isinstance(known.get(key), kind)]
        if bad:
            raise UserError(f"{path}:{n}: not a line of rollouts.jsonl, or damaged: {', '.join(bad)}")
        groups[f"step {row['step']}"].append(rollout_entry(row))
    out = os.path.join(os.path.dirname(path), "rollouts.html")
    head = f"<p>the newest {len(lines)} completions</p>"
    write_page(out, path, head, groups, max_audio_s)
    return out


def rollout_entry(row: dict) -> Entry:
    right = row["parts"].get("accuracy", row["advantage"]) > 0
    title = [row["id"], f"reward {row['reward']:g}", f"advantage {row['advantage']:.2f}"]
    title += [f"{name} {value:g}" for name, value in row["parts"].items()]
    clips = data.Example(audio=row.get("audio")).clips
    return Entry(
        title,
        "right" if right else "wrong",
        row["question"],
        row["choices"],
        row.get("answer"),
        [(row["completion"], row.get("heard"))],
        [clip for clip in clips if isinstance(clip, str)],
    )


def write_page(path: str, title: str, head: str, groups: dict[str, list[Entry]], max_audio_s: float) -> None:
    data.write_text(path, make_page(title, head, groups, encode_sounds(groups, max_audio_s)))


@dataclass
class Options:
    max_audio_s: float = knob(30.0, "seconds of a clip that are played", above=0, high=300)


def main(argv=None) -> int:
    def work(path, options):
        print(write_rollouts(path, options.max_audio_s))

    about = "folder of a run, or a rollouts.jsonl"
    return data.exit_code(lambda: server.start("pages", __doc__, "RUN", about, Options, work, argv))


if __name__ == "__main__":
    data.leave(main())
