"""A model behind a server gets the tables that the same model gets when it is loaded; the stand-in compares what it
hears with the clips, sample by sample. Neither kills nor bad servers lose, double or leak anything."""

import base64
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import data
import eval as ev
import fake_server
import model
import omni_grpo
import tools.server as client
from data import Example, Examples
from fake_server import HOW, KEY, ROOT, Listener, start_tool, wait_until
from fake_server import server as server
from test_data import cells
from test_eval import NAMES, asking, asks, pick, read, shows
from test_eval import clips as clips
from test_eval import lab as lab
from test_eval import main as main
from tools import served

SOUNDS = dict(dog=(16_000, "PCM_16", 0.1), cat=(44_100, "FLOAT", 0.3), rain=(8000, "PCM_24", 1.0))
SOUNDS |= dict(bell=(16_000, "PCM_16", 2.0))  # of a name: rate in Hz, coding, seconds


@functools.cache
def heard_of(folder, name, max_s):
    return data.load_audio(f"{folder}/{name}.wav", max_s)[0]


def name_of(folder, samples, max_s) -> str:
    """Which clip these 16-bit samples are, every one of them and no more; silence is as long as it is."""
    if not any(samples):
        return f"{len(samples)} samples of silence"
    for name in NAMES:
        wave = heard_of(folder, name, max_s)
        if len(wave) == len(samples) and np.abs(np.array(samples) / 2**15 - wave).max() < 2**-15:
            return name
    return "something else"


def listen(folder, max_s=30.0):
    """-> what the model says: the names of the clips it hears; every third sample is its first choice"""

    def say(choices, sounds, n):
        names = [name_of(folder, samples, max_s) for samples in sounds]
        return choices[0] if choices and n % 3 == 1 else " and ".join(names) or "nothing"

    return say


def as_policy(say):
    """The same model, loaded: what it says of (example, waves, number of the sample)."""

    def answer(example, waves, n):
        sounds = [np.rint(wave * 2**15).astype(int).tolist() for wave in waves]
        how = re.search(r"mode=(\w+)", example.question)
        return HOW[how[1] if how else "good"](say(example.choices, sounds, n)) or ""

    return answer


@pytest.fixture
def ask(lab, clips, server, monkeypatch):
    """ask(rows, flags) -> what lab does, by a model behind the server, whose requests are in .log; NAMES are noises.

    .local: the same by the model that is loaded. say: as listen() does it, if not otherwise.
    """
    for i, (name, (rate_hz, subtype, seconds)) in enumerate(SOUNDS.items()):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, (int(rate_hz * seconds), 1 + i % 2))
        soundfile.write(f"{name}.wav", noise, rate_hz, subtype)
    monkeypatch.setattr(fake_server, "Server", Listener)

    def ask(rows, flags="", say=None, **options):
        given = re.search(r"--max_audio_s (\S+)", flags)
        monkeypatch.setattr(Listener, "say", say or listen(clips, float(given[1]) if given else 30.0))
        address = f" --base_url {options.pop('url', server.url)}"
        done = lab(rows, None, flags + address, **options)
        assert not done.shown
        return done

    def local(rows, flags="", **options):
        return lab(rows, as_policy(Listener.say), flags, **options)

    ask.local, ask.log, ask.url = local, server.log, server.url
    return ask


@pytest.fixture
def hasty(monkeypatch):
    """No retries."""
    monkeypatch.setattr(client, "Chat", functools.partial(client.Chat, retries=0))


def modes(text) -> list[dict]:
    """A question for each: "good null" """
    rows = []
    for i, mode in enumerate(text.split()):
        rows.append(asks(i, question=f"Number {i}? mode={mode}", meta=dict(task=mode[:3])))
    return rows


def unsettled(folder) -> dict:
    """A report without the settings."""
    settings = read(f"{folder}/config.json")
    return {name: value for name, value in read(f"{folder}/report.json").items() if name not in settings}


def all_files() -> str:
    """What stands in all files of the working directory and in their names."""
    texts = []
    for folder, _, names in os.walk("."):
        for name in names:
            with open(f"{folder}/{name}", "rb") as f:
                texts.append(name + f.read().decode("latin-1"))
    return "\n".join(texts)


def moody(breaks):
    """A Listener that answers no request about which it is said: it breaks."""

    class Moody(Listener):
        def asked(self, request):
            text, about = super().asked(request)
            return "mode=broken" if breaks(about) else text, about

    return Moody


# ---- the same model, loaded and served

ORDERS = ["cat and dog and bell", "dog and cat and bell"]
ODD = [
    asks(4, audio=["cat.wav", "dog.wav", "bell.wav"], choices=ORDERS, answer=0),
    asks(5, audio=None),
    asks(6, choices=None, answer=None),
    asks(7, audio="gone.wav"),
]
MODES = modes("good cut null empty think thought thinking free limit errors good@0.5")
SAME = [
    (asking(4) + ODD, ""),
    (asking(4) + ODD, "--rotate_choices"),
    (asking(4) + ODD, "--audio silence"),
    (asking(4) + ODD, "--audio none"),
    (asking(4) + ODD, "--audio shuffled"),
    (asking(4) + ODD, "--audio shuffled --max_audio_s 0.2 --limit 5"),
    (asking(4) + ODD, "--samples 5 --prompt think"),
    (MODES, ""),
    (asking(8), "--prompt structured --max_audio_s 1.5"),
]


@pytest.mark.parametrize("rows, flags", SAME)
def test_served_or_loaded_is_the_same(ask, rows, flags):
    """Answers, scores, tables and errors, whatever the server does with its answers."""
    there = ask(rows, flags, out="there")
    here = ask.local(None, flags, out="here")
    assert len(here.shown) and here.predictions == there.predictions and here.rated == there.rated
    assert unsettled("here") == unsettled("there")
    heard = {name for p in there.predictions for name in NAMES if name in p["raw_output"]}
    assert bool(heard) == (flags.split()[:2] not in (["--audio", "silence"], ["--audio", "none"]))
    said = [re.sub("here|there", "", text.partition("\n")[2]) for text in (here.said, there.said)]
    assert said[0] == said[1]


def test_the_answers_of_the_stand_in(ask):
    """It is right where it hears its clip, and by the rules for answers that are loaded where it thinks aloud."""
    done = ask(MODES)
    right = {mode: part["accuracy"] for mode, part in done.report["by_task"].items()}
    assert right == dict(goo=1, cut=1, nul=0, emp=0, thi=0.5, tho=1, fre=1, lim=1, err=1)
    assert [p["resolved"] for p in done.predictions[2:4]] == [None, None]
    assert done.raw[6].startswith("<think>") and done.predictions[6]["resolved"] is None  # it never answers


def test_controls(ask):
    """One table, as of a model that is loaded."""
    there = ask(asking(8), "--controls", out="there")
    here = ask.local(None, "--controls", out="here")
    for name in ("real", "silence", "none", "shuffled", "rotated"):
        assert unsettled(f"here/{name}") == unsettled(f"there/{name}")
    scores = {name: pick(report, "accuracy unresolved") for name, report in there.report.items()}
    assert scores == dict(real=[1, 0], silence=[0, 8], none=[0, 8], shuffled=[0, 0], rotated=[1, 0])
    assert here.said.partition("\n")[2] == there.said.partition("\n")[2] and here.rated == there.rated
    ask(None, "--controls", out="there")
    assert len(ask.log) == 4 * 8 + 8 * 4  # nothing twice


# ---- what is asked


def messages_in(log) -> list[tuple]:
    """(number, the messages with [sound] in the place of a sound)"""
    found = []
    for entry in log:
        text = json.dumps(entry["messages"])
        found.append((entry["id"], json.loads(re.sub(r'"[\w+/=]{200,}"', '"[sound]"', text))))
    return sorted(found, key=lambda pair: pair[0])


@pytest.mark.parametrize("prompt", ["direct", "structured", "think"])
@pytest.mark.parametrize("audio", ["real", "silence", "none", "shuffled"])
def test_the_messages_are_those_of_training(ask, prompt, audio):
    """A sound for every place of a clip; without audio there is no such part. Nothing else is in a request."""
    rows = [asks(0), asks(1, audio=["bell.wav", "cat.wav"]), asks(2, audio=None)]
    ask(rows, f"--prompt {prompt} --audio {audio}")
    sound = dict(type="input_audio", input_audio=dict(data="[sound]", format="wav"))
    examples = list(Examples("q.jsonl"))
    if audio == "shuffled":
        examples = ev.shuffle_clips(examples, 0)
    for example, (number, messages) in zip(examples, messages_in(ask.log), strict=True):
        wanted = data.chat_messages(example, data.PROMPTS[prompt], audio != "none")
        for message in wanted:
            if isinstance(message["content"], list):
                message["content"] = [sound if "audio" in part else part for part in message["content"]]
        assert messages == wanted and f"q{number}" == example.id
        assert ("input_audio" in str(messages)) == (audio != "none" and bool(example.clips))
    sent = dict(model="model", temperature=0, max_tokens=data.PROMPTS[prompt].max_new_tokens, key=KEY)
    for entry in ask.log:
        assert {name: entry[name] for name in sent} == sent and "response_format" not in entry


@pytest.mark.parametrize("audio", ["real", "silence", "none", "shuffled"])
def test_what_is_heard(ask, clips, audio):
    """The clips of the question, in their order, cut at --max_audio_s; or zeros as long; or another item's."""
    rows = [asks(0), asks(1, audio=["bell.wav", "cat.wav"]), asks(2), asks(3)]
    ask(rows, f"--audio {audio} --max_audio_s 0.5")
    heard = {entry["id"]: [name_of(clips, s, 0.5) for s in entry["sounds"]] for entry in ask.log}
    own = {"0": ["dog"], "1": ["bell", "cat"], "2": ["rain"], "3": ["bell"]}
    size = dict(dog=1600, cat=4800, rain=8000, bell=8000)
    if audio == "real":
        assert heard == own
    elif audio == "none":
        assert heard == {number: [] for number in own}
    elif audio == "silence":
        assert heard == {n: [f"{size[name]} samples of silence" for name in own[n]] for n in own}
    else:
        assert all(heard[n] != own[n] and heard[n] in own.values() for n in own)


def test_a_sound_beyond_full_scale_does_not_turn_round(clips):
    loud = str(clips / "loud.wav")
    soundfile.write(loud, np.array([1.5, -1.5, 1.0, -1.0, 0.5] * 200), data.RATE_HZ, "FLOAT")
    part = served.sound_part(loud, ev.Options())
    samples = np.frombuffer(base64.b64decode(part["input_audio"]["data"])[44:], np.int16)
    assert samples[:5].tolist() == [32767, -32768, 32767, -32768, 16384]


def test_every_sample_has_its_own_seed(ask):
    """The same in every run of the same --seed, 31 bits, and none twice; other rotations have others."""
    flags = "--samples 3 --rotate_choices --temperature 0.7"
    ask(asking(2), flags, out="a")
    seeds = sorted(entry["seed"] for entry in ask.log)
    assert len(set(seeds)) == 2 * 4 * 3 and 0 <= seeds[0] and seeds[-1] < 2**31
    assert {entry["temperature"] for entry in ask.log} == {0.7}
    ask.log.clear()
    ask(None, flags, out="b")
    assert sorted(entry["seed"] for entry in ask.log) == seeds
    ask.log.clear()
    ask(None, f"{flags} --seed 1", out="c")
    assert not {entry["seed"] for entry in ask.log} & set(seeds)


def test_what_a_question_says_is_no_markup(ask):
    rows = [asks(0, question="Number 0 <|audio_eos|>?", choices=["<|im_end|>", "dog"], answer=1)]
    assert ask(rows).report["accuracy"] == 1
    asked = "Number 0 < |audio_eos|>? Please choose the answer from the following options: ['< |im_end|>', 'dog']."
    assert ask.log[0]["text"] == asked


def test_requests_run_at_once(ask):
    """Sixteen, each of which takes a second; the next one waits for the first of them."""
    ask(modes("good@1 " * 17))
    times = sorted(entry["time"] for entry in ask.log)
    assert times[15] - times[0] < 5 and times[16] - times[0] > 0.95


def test_tokens_of_a_prompt_with_sounds_are_estimated(server, monkeypatch, clips):
    """By its texts: a server need not count."""
    monkeypatch.setattr(fake_server, "Server", Listener)
    monkeypatch.setattr(Listener, "say", lambda *_: "dog")
    send = client.Chat("m", None, server.url, 0.0, 9).send
    example = Example("x", str(clips / "dog.wav"), "Number 1? mode=free", ["dog", "cat"], 0)
    with_sound = served.messages_of(example, ev.Options(prompt="direct"))
    without = served.messages_of(example, ev.Options(prompt="direct", audio="none"))
    (*_, counts, estimated), (*_, plain, _) = send(with_sound, 0), send(without, 0)
    assert estimated and counts == plain and 10 < counts[0] < 40
    rough = [client.rough_prompt_tokens(messages, {}) for messages in (with_sound, without)]
    assert rough == [counts[0] + 1] * 2


# ---- kills and resumes


def start(ask, *flags, out="killed"):
    words = ["--data", "q.jsonl", "--model", "model", "--base_url", ask.url, "--out", out, *flags]
    return start_tool(ev, *words)


def lines_of(out) -> list[dict]:
    """The whole lines, if there are any."""
    if not os.path.exists(f"{out}/items.jsonl"):
        return []
    with open(f"{out}/items.jsonl", "rb") as f:
        return list(map(json.loads, f.read().split(b"\n")[:-1]))


def test_kill_at_any_moment(ask):
    """kill -9 and the same command again, and again: what has its line is not asked again; the files are those
    of the unbroken run."""
    flags = "--rotate_choices --samples 2"
    ask(modes("good@0.05 think@0.1 good@0.02 cut@0.1 " * 6), flags, out="whole")
    text_of = texts_of(Examples("q.jsonl"))
    before = set()
    for stop_at in (1, 30, 70, 96):
        begun = len(ask.log)
        process = start(ask, *flags.split())
        wait_until(lambda at=stop_at, p=process: p.poll() is not None or len(lines_of("killed")) >= at)
        if stop_at < 96:
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        done = [text_of[line["item"], line["rotation"]] for line in lines_of("killed")]
        assert len(set(done)) == len(done) and before < set(done)
        assert not before & {entry["text"] for entry in ask.log[begun:]}
        before = set(done)
    assert process.returncode == 0, errors
    for name in ("config.json", "items.jsonl", "predictions.json", "report.json", "examples.jsonl"):
        assert read(f"killed/{name}") == read(f"whole/{name}"), name


def texts_of(examples) -> dict:
    """{(key of the item, rotation): what is asked}"""
    texts = {}
    for example in examples:
        for r in range(len(example.choices)):
            message = data.chat_messages(ev.rotate(example, r), data.PROMPTS["direct"], False)[-1]
            texts[ev.item_key(example), r] = message["content"]
    return texts


def test_ctrl_c_writes_what_was_asked(ask):
    ask(modes("good@0.2 " * 60), "--limit 1", out="killed")
    ask.log.clear()
    process = start(ask)
    wait_until(lambda: len(lines_of("killed")) >= 5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    done = len(lines_of("killed"))
    assert len(ask.log) == done - 1 < 59
    ask.log.clear()
    assert ask(None, out="killed").report["n"] == 60 and len(ask.log) == 60 - done


# ---- bad servers


def test_a_request_that_failed_is_asked_again(ask, hasty, monkeypatch):
    """It is counted and named, it is wrong, and the exit code is 2; the same command asks that one alone."""
    broken = {"1", "4"}
    monkeypatch.setattr(fake_server, "Server", moody(lambda about: about["id"] in broken))
    done = ask(asking(6), "--samples 2", code=2)
    assert done.error == "error: 2 requests failed; the same command asks them again\n"
    says = "counted as wrong: 0 clips that could not be heard, 2 items whose request failed, 0 items without"
    assert shows(
        done.said, f"{says} a prediction\nthe request failed, the same command asks again: Error code: 500"
    )
    assert pick(done.report, "n accuracy errors missing") == [6, pytest.approx(2.5 / 6), 2, 0]
    lines = read("out/items.jsonl")
    assert [(len(line["said"]), line["error"][:18]) for line in lines] == [(2, "")] * 4 + [
        (0, "the request failed")
    ] * 2
    assert [bool(p.get("error")) for p in done.predictions] == [False, True, False, False, True, False]
    assert KEY not in all_files() + done.said + done.error
    broken.clear()
    ask.log.clear()
    again = ask(None, "--samples 2")
    assert sorted(entry["id"] for entry in ask.log) == ["1", "1", "4", "4"]
    whole = ask(None, "--samples 2", out="whole")
    assert again.report == whole.report and again.predictions == whole.predictions
    assert again.report["errors"] == 0


def test_controls_with_failed_requests(ask, hasty, monkeypatch):
    """All conditions are asked, and in the table, before it is said how many failed in them together."""
    broken = {"1"}
    monkeypatch.setattr(fake_server, "Server", moody(lambda about: about["id"] in broken))
    done = ask(asking(4), "--controls", code=2)
    assert done.error.endswith(
        "error: 8 requests failed; the same command asks them again\n"
    )  # 4 are rotations
    names = "real silence none shuffled rotated".split()
    assert list(done.report) == names and pick(done.report["real"], "accuracy errors") == [0.75, 1]
    broken.clear()
    ask.log.clear()
    done = ask(None, "--controls")
    assert len(ask.log) == 8 and done.report["real"]["accuracy"] == 1


def test_a_rotation_that_failed_is_wrong(ask, hasty, monkeypatch):
    """Though the others are right, and in every place where that is counted."""
    monkeypatch.setattr(fake_server, "Server", moody(lambda about: "options: ['cat'" in about["text"]))
    done = ask(asking(2), "--rotate_choices", code=2)
    assert "error: 2 requests failed" in done.error
    assert pick(done.report, "accuracy right_in_every_rotation errors") == [0.75, 0, 2]


def test_where_no_request_is_answered_there_is_no_result(ask, hasty):
    """As where no clip is heard, which is said in other words."""
    done = ask(modes("broken broken"), code=2)
    says = "error: no question was answered, of 2 items: the request failed, the same command asks again: Error code"
    assert done.error.startswith(says) and done.error.count("\n") == 1
    assert not os.path.exists("out/report.json") and KEY not in all_files()
    done = ask([asks(0, audio="gone.wav")], out="gone", code=2)
    assert "no clip could be heard, of 1 items: " in done.error and "gone.wav: no such file" in done.error


@pytest.mark.parametrize(
    "text, says",
    [
        ("forbidden " * 90, r"the server refuses: .*\*\*\*.*; check OPENAI_API_KEY"),
        ("missing " * 90, r"the server refuses: .*\*\*\*.*; check --model and --base_url"),
        ("page " * 90, "20 questions in a row failed, the last with: the answer is no chat completion"),
        (
            "good " + "broken " * 89,
            "20 questions in a row failed.*; once that is mended, the same command goes on",
        ),
    ],
)
def test_hopeless_runs_are_stopped(ask, hasty, text, says):
    """At once, with one line, and nothing is left that would stand in the way of another command."""
    done = ask(modes(text), code=2)
    assert re.fullmatch(f"error: {says}.*\n", done.error) and len(ask.log) < 90
    assert len(read("out/items.jsonl")) == text.count("good") and not hasattr(done, "report")
    assert KEY not in all_files() + done.error
    if "good" not in text:
        assert ask(asking(1), "--seed 1").report["accuracy"] == 1


def test_no_server(ask, hasty):
    done = ask(asking(50), url="http://127.0.0.1:1/v1", code=2)
    says = "error: cannot reach the server: .*; is it running, and is --base_url right[?]\n"
    assert re.fullmatch(says, done.error)
    assert not os.path.getsize("out/items.jsonl")


def test_a_client_that_cannot_be_right(ask, monkeypatch):
    for url in ("127.0.0.1/v1", "ftp://x/v1", "http://me:secret@h:abc/v1"):
        error = ask(asking(1), url=url, code=2).error
        assert error.startswith("error: --base_url: expected http://HOST") and "secret" not in error
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2026")
    assert "OPENAI_API_KEY holds a character" in ask(None, code=2).error and not ask.log


# ---- settings, flags and secrets


def test_the_settings(ask):
    """All that decides the answers, and nothing of a model that runs here."""
    ask(asking(1), "--prompt think --temperature 0.5")
    settings = read("out/config.json")
    assert settings.pop("prompt_text")["ending"] == data.PROMPTS["think"].ending
    assert settings.pop("data_fingerprint") == ev.data_mark(Examples("q.jsonl"))
    given = dict(model="model", base_url=ask.url, prompt="think", temperature=0.5, max_new_tokens=256)
    given |= dict(samples=1, seed=0, audio="real", rotate_choices=False, max_audio_s=30)
    assert settings == given
    ask.local(None, out="here")
    assert "base_url" not in read("here/config.json")


OTHER = "prompt answer|audio silence|samples 2|seed 1|max_new_tokens 5|temperature 0.5|max_audio_s 5|rotate_choices"


@pytest.mark.parametrize("flag", OTHER.split("|"))
def test_other_settings_are_refused_by_name(ask, flag):
    ask(asking(1))
    n = len(ask.log)
    refused = ask(None, f"--{flag}", code=2).error
    assert flag.split()[0] in refused.partition("holds results of another ")[2] and len(ask.log) == n


def test_another_model_or_server_is_refused(ask, main, clips):
    """And a loaded model of the same name, whichever comes first."""
    before = ask(asking(1)).report
    error = ask(None, url=ask.url.replace("127.0.0.1", "localhost"), code=2).error
    assert "holds results of another base_url; give another --out" in error
    assert "another model;" in main(f"--data q.jsonl --model other --base_url {ask.url} --out out", code=2)
    refused = ask.local(None, code=2)
    assert "model_fingerprint" in refused.error and refused.report == before
    ask.local(None, out="here")
    assert "holds results of another base_url" in ask(None, out="here", code=2).error


def test_secrets_are_written_nowhere(ask, monkeypatch):
    """Neither the key, which an answer and errors echo, nor what stands in the address beside the host."""
    url = ask.url.replace("127", "me:pass-word@127") + "?token=hidden"
    done = ask(modes("leak good leak"), "--controls")
    assert KEY not in all_files() + done.said + done.error and "dog ***" in all_files()
    assert {entry["key"] for entry in ask.log} == {KEY}
    ask(None, "--limit 1", out="plain")
    instant = SimpleNamespace(send=lambda messages, seed: ("dog", "stop", [1, 1], False))
    monkeypatch.setattr(client, "Chat", lambda *_: instant)
    done = ask(None, "--limit 1", url=url, out="there")
    assert read("there/config.json") == read("plain/config.json")
    assert not re.search("pass-word|hidden", all_files() + done.said + done.error)


REFUSED = """
--adapter a | --adapter | --base_url
--dtype float32 | --dtype | --base_url
--load_in_4bit | --load_in_4bit | --base_url
--rollout_rows 8 | --rollout_rows | --base_url
--batch_size 8 | --batch_size | --base_url
--max_relistens 0 | --max_relistens | --base_url
--relisten_from audio | --relisten_from | --base_url
--prompt relisten | --base_url | --prompt relisten
--score p.json | --base_url | --score
--compare a b | --base_url | --compare
--prompt caption --rotate_choices | --rotate_choices | --prompt caption
--controls --audio none | --audio | --controls
"""


def test_flags_that_have_no_part_are_refused(main):
    for flags, flag, mode in cells(REFUSED):
        error = main(f"{flags} --base_url http://127.0.0.1:1/v1", code=2)
        assert error == f"error: {flag}: has no part in {mode}\n"


@pytest.mark.parametrize("name", ["base_url", "model"])
def test_an_empty_address_or_name_is_refused(name, capsys):
    """A variable of the shell that is not set would have another model answer."""
    assert ev.main(["--data", "q.jsonl", f"--{name}", ""]) == 2
    assert capsys.readouterr().err == f"error: --{name}: is empty\n"


# ---- beside other results


def test_compare(ask, main, clips):
    """A served model that hears all but the bell, or the same when it is loaded, and one that hears only that."""
    hear = listen(clips)
    ask(asking(4), say=lambda choices, sounds, n: "bell", out="there")
    ask(None, say=lambda choices, sounds, n: hear(choices, sounds, n).replace("bell", "?"), out="served")
    ask.local(None, out="loaded")
    for base in ("served", "loaded"):
        said = main(f"--compare {base} there")
        assert shows(said, f"{base} -> there, 4 items\n| all | 4 | 75.0 | 25.0 | -50.0 |\n| 1 | 3 | 0.62 |")
        assert [len(read("there/compare.json")[name]) for name in ("won", "lost")] == [1, 3]
    assert shows(main("--compare loaded served"), "| all | 4 | 75.0 | 75.0 | +0.0 |\n| 0 | 0 | 1 |")
    ask(None, "--prompt think", out="think")
    assert "have different prompt" in main("--compare loaded think", code=2)


def test_captions(ask, clips, hasty, monkeypatch):
    """Every clip once, several texts each, as the question tools read them; one that failed is asked again."""
    rows = [asks(0), asks(4), asks(1), asks(2, audio="gone.wav"), asks(3, audio=None)]
    flags = "--prompt caption --samples 3"
    cats = itertools.count()

    class Captioner(Listener):
        def asked(self, request):
            *parts, last = request["messages"][-1]["content"]
            assert last["text"] == data.PROMPTS["caption"].question
            name = name_of(clips, self.hear(**parts[0]), 30.0)
            mode = "broken" if name == "cat" and next(cats) < 1 else "good"
            return f"mode={mode}", dict(id=name, text="", sounds=[])

        def reply(self, request, mode, id, text, sounds):
            return f"a {id}, seed {request['seed']}", "stop"

    monkeypatch.setattr(fake_server, "Server", Captioner)
    done = ask(rows, flags, code=2)
    assert shows(done.said, "1 clips, 3 captions each; 1 clips could not be heard")
    assert "error: 1 requests failed; the same command asks them again" in done.error
    ask.log.clear()
    done = ask(None, flags)
    assert shows(done.said, "2 clips, 3 captions each; 1 clips could not be heard")
    assert [entry["id"] for entry in ask.log] == ["cat"] * 3
    written = Examples("out/captions.jsonl")
    assert [os.path.basename(e.audio) for e in written] == ["dog.wav", "cat.wav"]
    for e, name in zip(written, NAMES):
        assert len(set(e.target)) == 3 and all(text.startswith(f"a {name}, seed ") for text in e.target)
        assert e.meta["captioner"] == "model"


def test_no_torch(ask):
    """Neither for the scores nor for the controls and the page: the machine may have none."""
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, omni_grpo=None, model=None); import eval\n"
        "sys.exit(eval.main(sys.argv[1:]))"
    )
    ask(asking(2), "--controls", out="here")
    words = f"--data q.jsonl --model model --base_url {ask.url} --controls --out blind".split()
    environment = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert read("blind/report.json") == read("here/report.json") and os.path.exists("blind/real/report.html")


# ---- the tiny base


@pytest.fixture
def tiny_server(tiny, server, monkeypatch):
    """The tiny base behind the server: it reads the prompt and the sounds of a request, and knows no question."""
    policy = omni_grpo.load_run_policy(omni_grpo.Config(model=tiny.base), train=False)
    cfg = omni_grpo.Config(model=tiny.base, prompt="direct", max_new_tokens=6)

    class Tiny(Listener):
        def asked(self, request):
            content = request["messages"][-1]["content"]
            parts = content[:-1] if isinstance(content, list) else []
            return "", dict(text=str(content)[-300:], sounds=[self.hear(**part) for part in parts])

        def reply(self, request, mode, text, sounds):
            messages = json.loads(json.dumps(request["messages"]).replace("input_audio", "audio"))
            whole = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            prompt = model.Prompt(policy.tokenizer(whole, add_special_tokens=False)["input_ids"])
            waves = [np.array(samples, np.float32) / 2**15 for samples in sounds]
            clips = [model.Clip(model.log_mel(policy.extractor, w, policy.frames_after), None) for w in waves]
            for heard in model.embed_clips(policy, [clips])[0]:  # a clip a question
                at = prompt.ids.index(policy.audio_id)
                prompt.ids[at : at + 1] = [policy.audio_id] * len(heard)
                prompt.audio.append((at, heard))
            asked = policy, cfg, [prompt], [clips], [request["seed"]]
            ((completion,),) = omni_grpo.rollout(*asked, 1, request["temperature"])
            return model.completion_text(policy, completion), "stop"

    monkeypatch.setattr(fake_server, "Server", Tiny)
    return server


@pytest.mark.parametrize("audio", ["real", "silence", "none", "shuffled"])
def test_the_tiny_base_says_the_same_when_it_is_served(tiny, tiny_server, tmp_path, main, audio):
    """Word for word: the prompt, the places of the clips and every sample are those of a model that is loaded."""
    flags = f"--data {tiny.questions} --max_new_tokens 6 --limit 12 --audio {audio}"
    main(f"{flags} --model {tiny.base} --out {tmp_path}/here")
    main(f"{flags} --model tiny --base_url {tiny_server.url} --out {tmp_path}/there")
    said = [[p["raw_output"] for p in read(tmp_path / out / "predictions.json")] for out in ("here", "there")]
    assert said[0] == said[1] and len(set(said[0])) > 1
    assert len(tiny_server.log) == 12
