"""Speech and other sounds for a small model to learn from: voices of espeak-ng and flite, and recordings that
come in packages. A split is "train" or "held_out"; they share no speaker, and no recording.

    apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default
"""

import functools
import os
import random
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np

import data
from data import RATE_HZ, UserError

PROGRAMS = "apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default"
NAMES = "Anna Ben Clara David Emma Frank Helen Jack Kate Lucy Martin Nina Oscar Paul Rose Tom".split()


class Voice(NamedTuple):
    program: str  # espeak-ng | flite
    name: str
    sex: str  # man | woman
    speed: int = 0  # words a minute, of espeak-ng
    pitch: int = 0  # 0 to 99, of espeak-ng


ACCENTS = "en-us en-gb en-gb-scotland".split()
SPEAKERS = {  # espeak-ng speaks with these voices in every accent
    ("train", "woman"): "f1 f2 f3 f4 Annie Alicia anika belinda linda",
    ("train", "man"): "m1 m2 m3 m4 m5 m8 david edward john",
    ("held_out", "woman"): "f5 Andrea steph",
    ("held_out", "man"): "m6 m7",
}
PERSONS = {("train", "woman"): "slt", ("train", "man"): "awb kal16", ("held_out", "man"): "rms"}  # flite's
STAMPS, SAMPLES = "/usr/share/tuxpaint/stamps", "/usr/share/sonic-pi/samples"
RECORDINGS = """
    a dog barks: animals/mammals/dogs/dog
    a cow moos: animals/mammals/bovines/bull animals/mammals/bovines/cow animals/mammals/bovines/cow_white
    a sheep bleats: animals/mammals/bovines/sheep_lamb animals/mammals/bovines/sheep
    a pig grunts: animals/mammals/pig_golden animals/mammals/pig_golden2 animals/mammals/pig
    a horse neighs: animals/mammals/equines/horse
    a lion roars: animals/mammals/cats/tiger animals/mammals/cats/lion
    an elephant trumpets: animals/mammals/elephant
    a frog croaks: animals/amphibians/frog
    a duck quacks: animals/birds/drake animals/birds/duck
    a crow caws: animals/birds/crow misc_crow
    a rooster crows: animals/birds/rooster
    an owl hoots: animals/birds/owl
    a bee buzzes: animals/insects/hornet animals/insects/mosquito animals/insects/bee
    thunder: naturalforces/lightningbolt
    a siren: vehicles/emergency/firetruck
    a toilet is flushed: household/toilet
    a saw: household/tools/saw
    fireworks: seasonal/newyears/fireworks
    a door closes: perc_door
    a telephone: mehackit_phone1 mehackit_phone2 mehackit_phone3 mehackit_phone4
    a robot: mehackit_robot1 mehackit_robot2 mehackit_robot3 mehackit_robot4 mehackit_robot5
    a bell rings: perc_bell perc_bell2
    a drum: drum_tom_hi_hard drum_tom_lo_hard drum_snare_hard drum_tom_lo_soft drum_tom_mid_hard
    a drum beat: loop_amen_full loop_breakbeat loop_compus loop_mehackit1 loop_amen
    a cymbal: drum_cymbal_hard drum_splash_soft drum_cymbal_open drum_splash_hard
    a guitar: guit_em9 guit_e_slide guit_harmonics guit_e_fifths
    a violin: hobbies/music/string/cello hobbies/music/string/violin
    a piano: ambi_piano
    a choir: ambi_choir
    a record is scratched: vinyl_backspin vinyl_rewind vinyl_scratch
"""  # of several the last is held out


@functools.cache
def voices(split: str, sex: str = "") -> list[Voice]:
    """Those of espeak-ng each in every accent, with a speed and a pitch of their own, and flite's."""
    found = []
    for (of_split, voice_sex), names in SPEAKERS.items():
        if of_split != split or sex not in ("", voice_sex):
            continue
        for name in (f"{accent}+{name}" for name in names.split() for accent in ACCENTS):
            r = random.Random(name)
            found.append(Voice("espeak-ng", name, voice_sex, r.randint(150, 220), r.randint(35, 65)))
        persons = PERSONS.get((split, voice_sex), "").split()
        found += [Voice("flite", name, voice_sex) for name in persons] * len(ACCENTS)
    return found


def say(text: str, voice: Voice) -> np.ndarray:
    """-> float32 at 16 kHz"""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/said.wav"
        command = ["flite", "-voice", voice.name, "-o", path, "-t", text]
        if voice.program == "espeak-ng":
            speed, pitch = str(voice.speed), str(voice.pitch)
            command = ["espeak-ng", "-v", voice.name, "-s", speed, "-p", pitch, "-w", path, text]
        subprocess.run(command, check=True, capture_output=True)
        return data.load_audio(path)[0]


@functools.cache
def recordings(split: str) -> dict[str, list[str]]:
    """What is heard: files."""
    found = {}
    for line in RECORDINGS.strip().splitlines():
        label, names = line.strip().split(": ")
        paths = [f"{STAMPS}/{n}.ogg" if "/" in n else f"{SAMPLES}/{n}.flac" for n in names.split()]
        cut = len(paths) - 1 or 1
        found[label] = paths[:cut] if split == "train" else paths[cut:]
    return {label: paths for label, paths in found.items() if paths}


def join(r: random.Random, *waves: np.ndarray, peak: float = 0.0) -> np.ndarray:
    """One after the other, with short silences. The loudest sample is `peak`, or anything from 0.2 to 0.9."""
    parts = []
    for wave in waves:
        parts += [np.zeros(int(r.uniform(0.05, 0.15) * RATE_HZ)), wave / (np.abs(wave).max() + 1e-9)]
    return ((peak or r.uniform(0.2, 0.9)) * np.concatenate(parts)).astype(np.float32)


def check_programs() -> None:
    files = [
        path for split in ("train", "held_out") for paths in recordings(split).values() for path in paths
    ]
    missing = [name for name in ("espeak-ng", "flite") if not shutil.which(name)]
    missing += [path for path in files if not os.path.exists(path)]
    if missing:
        raise UserError(f"{missing[0]} is not there: {PROGRAMS}")
