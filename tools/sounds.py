"""The demo's sounds: synthesised, written as wav files, with questions about them.

write_sounds    one sound a clip: which one is it?
write_scenes    a loud sound, then a faint one: which comes second?
write_lessons   a cold start for the demo's base model

The same seed always gives the same files: keep the order in which random numbers are drawn.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import RATE_HZ, Example

# -----------------------------------------------------------------------------------------------------------
# Synthesis: t is time in seconds, r the random number generator


def tone(t, hz):
    """A sine; hz is a number or one value a sample."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hz, t.shape)) / RATE_HZ)


def noise(t, r, low_hz, high_hz):
    spectrum = np.fft.rfft(r.standard_normal(len(t)))
    hz = np.fft.rfftfreq(len(t), 1 / RATE_HZ)
    return np.fft.irfft(spectrum * ((hz >= low_hz) & (hz <= high_hz)), len(t))


def pulses(t, rate_hz, decay):
    """1 at every pulse, then dying away."""
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

# The front end covers 80 dB below the loudest frequency of a clip. The power of a LOUD sound lies in a few
# frequencies: beside one at full level, a sound at its level in FAINT_DB is below that range. Alone, every
# sound is audible.
LOUD = ("beep", "buzz", "hum", "siren")
FAINT_DB = {
    "beep": -86,
    "buzz": -89,
    "hiss": -66,
    "rumble": -81,
    "whistle": -84,
    "chirp": -82,
    "siren": -87,
    "clicks": -62,
    "bell": -77,
    "knock": -84,
    "hum": -87,
    "roar": -72,
}


def synthesise(label: str, rng: np.random.Generator) -> np.ndarray:
    """A random instance of one of SOUNDS.       -> float32 at 16 kHz, 0.5 to 0.8 s"""
    n = int(rng.uniform(0.5, 0.8) * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    wave = SOUNDS[label](t, rng)
    wave = wave / (np.abs(wave).max() + 1e-9) + 0.003 * rng.standard_normal(n)
    return (0.9 * 10 ** rng.uniform(-1, 0) * wave / np.abs(wave).max()).astype(np.float32)


def scene(rng: np.random.Generator) -> tuple[np.ndarray, str, str, float, float]:
    """A loud sound, and after it a faint one, which can only be heard in a part without the loud one.

    Returns float32 at 16 kHz, 1.3 to 2.2 s; the two labels; where the second starts and ends, in seconds.
    """
    first = str(rng.choice(LOUD))
    second = str(rng.choice([label for label in SOUNDS if label != first]))
    loud, faint = synthesise(first, rng), synthesise(second, rng)
    loud = 0.9 * loud / np.abs(loud).max()
    faint = 10 ** (FAINT_DB[second] / 20) * faint / np.abs(faint).max()
    before, between, after = (
        np.zeros(int(rng.uniform(low, high) * RATE_HZ)) for low, high in ((0, 0.3), (0.15, 0.3), (0, 0.2))
    )
    start_s = (len(before) + len(loud) + len(between)) / RATE_HZ
    wave = np.concatenate([before, loud, between, faint, after]).astype(np.float32)
    return wave, first, second, start_s, start_s + len(faint) / RATE_HZ


# -----------------------------------------------------------------------------------------------------------
# Questions


def write_questions(folder: str, n: int, name: str, make: Callable, subtype: str = "PCM_16") -> str:
    """Write n lines to folder/name.jsonl, and their sounds to folder/sounds.      -> path of the JSONL

    make(i) returns the i-th sound and the fields of its Example; or None and a line that is written as it is.
    """
    import soundfile

    path = Path(folder, f"{name}.jsonl")
    Path(folder, "sounds").mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            wave, line = make(i)
            if wave is not None:
                audio = f"sounds/{name}_{i:04d}.wav"
                soundfile.write(Path(folder, audio), wave, RATE_HZ, subtype=subtype)
                line = vars(Example(id=f"{name}_{i:04d}", audio=audio, **line))
            f.write(json.dumps(line) + "\n")
    return str(path)


def draw_choices(rng: np.random.Generator, given: list[str], n: int) -> list[str]:
    """The given labels and others of SOUNDS, n in all, in random order."""
    others = [label for label in SOUNDS if label not in given]
    choices = [*given, *rng.choice(others, n - len(given), replace=False).tolist()]
    rng.shuffle(choices)
    return choices


def write_sounds(
    folder: str, n: int, n_choices: int, seed: int, name: str, silent: float = 0.0, faint: bool = False
) -> str:
    """Make n clips of one sound each, and multiple-choice questions about them.      -> path of the JSONL

    silent: the share of clips that hold nothing, as in real collections: only the choices are left to go by.
    faint: clips of any loudness from full level down to FAINT_DB.
    """
    rng = np.random.default_rng(seed)
    labels = list(SOUNDS)
    questions = ["Which sound is heard in this clip?", "What is this sound?", "What do you hear?"]

    def make(i):
        label = labels[i % len(labels)]
        choices = draw_choices(rng, [label], n_choices)
        wave = synthesise(label, rng) * (rng.random() >= silent)
        if faint:
            wave *= 10 ** (rng.uniform(FAINT_DB[label], 0) / 20)
        question = questions[rng.integers(len(questions))]
        answer = choices.index(label)
        return wave, dict(question=question, choices=choices, answer=answer, meta={"label": label})

    return write_questions(folder, n, name, make, subtype="PCM_24" if faint else "PCM_16")


def write_scenes(folder: str, n: int, seed: int, name: str, taught: bool = False) -> str:
    """Make n scenes, and questions about which sound comes second.      -> path of the JSONL

    The loud sound is always among the choices. taught: with targets that listen again where the second sound
    is, name it, and then answer with any of the choices: a cold start that teaches where to listen, to hear
    and to answer, but nothing that connects the last two.
    """
    rng = np.random.default_rng(seed)

    def make(i):
        wave, first, second, start_s, end_s = scene(rng)
        choices = draw_choices(rng, [first, second], 4)
        target = None
        if taught:
            segment = f"<seg>{start_s - 0.1:.1f}, {len(wave) / RATE_HZ:.1f}</seg>"
            thought = f"<think>Listen again: {segment} it is {second}.</think>"
            target = [f"{thought}<answer>{choice}</answer>" for choice in choices]
        meta = {"first": first, "label": second, "spans": [[start_s, end_s]]}
        question, answer = "Which sound comes second?", choices.index(second)
        return wave, dict(question=question, choices=choices, answer=answer, target=target, meta=meta)

    return write_questions(folder, n, name, make, subtype="PCM_24")


def write_lessons(path: str, n: int = 8000) -> str:
    """Replace a file of write_sounds by n cold-start lessons for the demo's base model.      -> path

    A quarter of them names a clip. In the others, some of them silent, every choice is as good an answer as
    any: the base learns to hear and to answer in the format, but nothing that connects the two.
    """
    import soundfile

    rng = np.random.default_rng(0)
    folder, name = Path(path).parent, Path(path).stem
    with open(path, encoding="utf-8") as f:
        clips = [json.loads(line) for line in f]
    soundfile.write(Path(folder, "sounds", "silence.wav"), np.zeros(10_000), RATE_HZ)

    def make(i):
        clip = clips[rng.integers(len(clips))]
        kind = rng.random()
        audio = clip["audio"]
        if kind < 0.25:
            return None, dict(audio=audio, question="Name the sound.", target=clip["meta"]["label"])
        if kind < 0.4:
            audio = "sounds/silence.wav"
        choices = rng.permutation(list(SOUNDS))[:4].tolist()
        return None, dict(audio=audio, question=clip["question"], choices=choices, target=choices)

    return write_questions(folder, n, name, make)
