"""Speed and memory, measured. No weights are needed: random ones, at 7B size on a CUDA card, small on a CPU.

    python tests/bench.py --step       a whole training step: seconds by part, its floor, its peak of memory
    python tests/bench.py --step --full  the same at 7B size on a CPU with 24 GiB and no card
    python tests/bench.py --decode     seconds a token of the rollout, for short and long completions
    python tests/bench.py --command    two steps of the real command line on a checkpoint with random weights
    python tests/bench.py --card       all that is worth knowing of a card, in eight minutes, into bench.json
    python tests/bench.py --scoring    scoring with a shared prompt against scoring full rows
    python tests/bench.py --rollout    sampling against the library's generate, without and with re-listening
    python tests/bench.py --trl        a whole training step against TRL's GRPOTrainer
    python tests/bench.py --memory     what a step of the 7B model holds, forecast without a card
    python tests/bench.py --reading    seconds until a clip on disk is features
    python tests/bench.py --startup    seconds until 1,000 ... 1,000,000 questions are ready

The sides of a ratio take turns in one run; a cell is the median (lowest - highest turn). --write puts the
table into docs/benchmarks.md. --trl needs TRL, for this comparison only: pip install --no-deps trl accelerate
"""

import argparse
import contextlib
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import soundfile
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import data  # noqa: E402
import model  # noqa: E402
import omni_grpo as og  # noqa: E402
from model import Completion, Prompt, Tokens  # noqa: E402
from tools import demo, fits, sounds  # noqa: E402

PAGE = os.path.join(ROOT, "docs", "benchmarks.md")
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)

# ------------------------------------------------------------------------------------------------------------
# What the modes share: turns, tables, memory


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds_of(function) -> float:
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def by_turns(repeats: int, *functions) -> list[list[float]]:
    """Seconds of every turn of each function, A B A B ..., after a warm-up turn."""
    turns = [[seconds_of(function) for function in functions] for _ in range(repeats + 1)]
    return [list(seconds) for seconds in zip(*turns[1:])]


def ratio(a: list[float], b: list[float]) -> list[float]:
    """How many times longer a took than b, turn by turn."""
    return [x / y for x, y in zip(a, b)]


class Table:
    """A Markdown table, printed row by row. A cell that is a list holds a value of each turn."""

    def __init__(self, title: str, heads: str):
        self.rows = []  # as they were given
        about = og.machine()
        where = f"{about['hardware']}, torch {about['torch']}, transformers {about['transformers']}"
        command = " ".join(["python tests/bench.py", *sys.argv[1:]])
        self.lines = [f"*{title}. {where}, {time.strftime('%Y-%m-%d')}: `{command}`*", ""]
        print(*self.lines, sep="\n")
        self.heads = heads.split(" | ")
        self.print_row(self.heads)
        self.print_row(["---"] * len(self.heads))

    def add(self, *cells) -> None:
        self.rows.append(dict(zip(self.heads, cells)))
        self.print_row(cells)

    def print_row(self, cells) -> None:
        self.lines.append(f"| {' | '.join(map(self.cell, cells))} |")
        print(self.lines[-1], flush=True)

    def cell(self, value) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        if not isinstance(value, list):
            return str(value)
        middle = f"{statistics.median(value):.3g}"
        return f"{middle} ({min(value):.3g} - {max(value):.3g})" if len(value) > 1 else middle

    def write(self, mark: str) -> None:
        """Put the table between its marks in PAGE."""
        before, _, rest = read_page().partition(mark)
        _, end, after = rest.partition("<!-- end -->")
        data.write_text(PAGE, "\n".join([before + mark, "", *self.lines, "", end + after]))


def read_page() -> str:
    with open(PAGE, encoding="utf-8") as f:
        return f.read()


def held_gib() -> float:
    """Memory of this process now, on the card where it uses one. Its peak is counted from here on."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    with open("/proc/self/clear_refs", "w") as f:  # Linux; ru_maxrss would hold the parent's peak, too
        f.write("5")
    return linux_gib("VmRSS")


def peak_gib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return linux_gib("VmHWM")


def linux_gib(name: str) -> float:
    with open("/proc/self/status") as f:
        fields = dict(line.split(":", 1) for line in f)
    return int(fields[name].split()[0]) / 2**20


def measure(make, args, *params) -> tuple[float, float]:
    model.quiet_libraries()
    torch.set_num_threads(args.threads)
    work = make(args, *params)
    before = held_gib()
    seconds = seconds_of(work)
    return seconds, peak_gib() - before


def in_new_process(make, args, *params) -> tuple[float, float]:
    """-> seconds of the function that make(args, *params) returns, and the GiB that it adds at its peak"""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, make, args, *params).result()


# ------------------------------------------------------------------------------------------------------------
# A policy with random weights, and a step of it

ROPE = dict(rope_type="default", rope_theta=10000.0)
SMALL = dict(
    vocab_size=2048,
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_parameters=ROPE | dict(mrope_section=[8, 12, 12]),
)
SMALL_AUDIO = dict(
    d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, output_dim=384
)
NO_VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)  # it is never used
SPECIAL = dict(
    audio_token_id=2047, image_token_id=2046, video_token_id=2045, vision_start_token_id=2044
)  # random_ids has none of them


def thinker_config(big: bool):
    """Qwen2.5-Omni's thinker: at its 7B size, which is the library's default, or small."""
    parts = dict(text_config=SMALL, audio_config=SMALL_AUDIO)
    if big:
        parts = dict(text_config=dict(tie_word_embeddings=False))
    return transformers.Qwen2_5OmniThinkerConfig(vision_config=NO_VISION, **parts, **SPECIAL)


def make_config(args, **more) -> og.Config:
    return og.Config(prompts_per_step=args.prompts, num_generations=args.generations, **more)


def random_policy(cfg: og.Config, big: bool, dtype: torch.dtype) -> model.Policy:
    """Random weights: the library's, which take minutes at 7B size on a CPU, so there our own."""
    config = thinker_config(big)
    quick = big and not CUDA
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    no_weights = transformers.initialization.no_init_weights() if quick else contextlib.nullcontext()
    with no_weights, torch.device(DEVICE):
        thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    if quick:
        thinker.visual = None
        fill(thinker)
    policy = take_apart(cfg, thinker, model.OMNI)
    policy.audio_id = config.audio_token_id
    if cfg.load_in_4bit:
        for layer in lora_layers(policy):
            layer.base_layer = quantize(layer.base_layer)
    return policy


@torch.no_grad()
def fill(thinker) -> None:
    """A million random numbers again and again in the matrices; norms are 1, biases 0."""
    block = torch.randn(2**20) * 0.02
    for name, weight in thinker.named_parameters():
        if weight.ndim == 1:
            weight.fill_(float(name.endswith("weight")))
            continue
        for part in weight.view(-1).split(len(block)):
            part.copy_(block[: len(part)])


def take_apart(cfg: og.Config, whole, family: model.Family) -> model.Policy:
    checkpointing = cfg.gradient_checkpointing
    return model.take_apart(
        whole, family, lora_rank=cfg.lora_rank, gradient_checkpointing=checkpointing, train=True
    )


def lora_layers(policy) -> list:
    """All linear layers of the language model; each has its frozen weights in .base_layer."""
    return [module for module in policy.lm.modules() if hasattr(module, "base_layer")]


def quantize(linear):
    """To nf4, as --load_in_4bit does."""
    from bitsandbytes.nn import Linear4bit

    sizes, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    quantized = Linear4bit(*sizes, has_bias, compute_dtype=DTYPE, quant_type="nf4", device=DEVICE)
    quantized.load_state_dict(linear.state_dict())
    return quantized.requires_grad_(False).to(DEVICE)


def random_ids(n: int) -> list[int]:
    return torch.randint(7, 2000, (n,)).tolist()


def random_mels(args) -> list[torch.Tensor]:
    return [torch.randn(128, int(args.audio_s * 100)) for _ in range(args.prompts)]


def audio_prompts(policy, mels: list[torch.Tensor]) -> list[Prompt]:
    """40 tokens, a clip and 40 tokens."""
    prompts = []
    for clip in policy.encode_audio(mels):
        ids = random_ids(40) + [policy.audio_id] * len(clip) + random_ids(40)
        prompts.append(Prompt(ids, [(40, clip)]))
    return prompts


def random_rewards(completion_ids: list[list[int]], **_) -> list[float]:
    """A function of the tokens alone, so that TRL's rewards are ours."""
    return [random.Random(repr(list(map(int, ids)))).random() for ids in completion_ids]


def reward_group(cfg: og.Config, prompt: Prompt, completions: list[Completion]) -> og.Group:
    rewards = random_rewards([completion.ids for completion in completions])
    advantages = og.group_advantages(torch.tensor([rewards]), cfg.scale)[0].tolist()
    return og.Group(None, prompt, completions, rewards, advantages=advantages)


def our_step(policy, optimizer, cfg: og.Config, prompts: list[Prompt]) -> dict:
    """Everything is computed, and nothing is learned: the rewards are random.      -> the log's record"""
    n = len(prompts)
    rolled = og.rollout(policy, cfg, prompts, [[]] * n, range(n), cfg.num_generations, 1.0, learn=True)
    groups = [reward_group(cfg, prompt, completions) for prompt, completions in zip(prompts, rolled)]
    return og.update(policy, optimizer, cfg, groups)


# ------------------------------------------------------------------------------------------------------------
# --step

CARD_GIB = 48
LIBRARIES_GIB = (
    3  # what a process holds beside its tensors: torch, kernels' buffers, pieces that are free again
)


def step(args) -> Table:
    """On a card at 7B size, in CARD_GIB of its memory. The forecast's peak stands beside the measured one: on
    a card what torch holds, on a CPU the sizes of the live tensors, and beside it all that the process holds.
    """
    dtype = torch.bfloat16 if args.full else DTYPE
    cfg = make_config(args, max_new_tokens=args.new_tokens, load_in_4bit=args.nf4)
    if CUDA:
        room = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_GIB / room))
    elif args.full:
        need_room(cfg, args)
    policy = random_policy(cfg, CUDA or args.full, dtype)
    optimizer = og.make_optimizer(policy, cfg)
    prompt_tokens = len(audio_prompts(policy, random_mels(args))[0].ids)
    floor = floor_s(policy, cfg, prompt_tokens)
    seconds = watch_parts(policy, optimizer)
    weights = [*policy.model.parameters(), *policy.model.buffers()]
    peak, turns = sum(x.nbytes for x in weights) / 2**30 - held_gib(), []
    for _ in range(args.repeats + 1):
        seconds.clear()
        start = time.perf_counter()
        gap = our_step(policy, optimizer, cfg, audio_prompts(policy, random_mels(args)))["policy/sampler_gap"]
        wait()
        turns.append([*seconds.values(), time.perf_counter() - start])
    peak += peak_gib()
    heads, resident = "step s | floor s | sampler gap, nats | peak GiB | forecast GiB", []
    if not CUDA:
        with fits.LiveBytes(weights) as live:
            our_step(policy, optimizer, cfg, audio_prompts(policy, random_mels(args)))
        peak = (fits.weight_bytes(policy, cfg, dtype) + live.peak) / 2**30
        heads, resident = f"{heads} | resident GiB", [linux_gib("VmHWM")]
    config = policy.model.get_base_model().config
    forecast = fits.forecast(cfg, config, model.OMNI, prompt_tokens, dtype)
    title = f"A step of {args.prompts} prompts of {prompt_tokens} tokens ({args.audio_s:g} s clips), "
    title += f"G = {args.generations}, T = {args.new_tokens}, {'nf4' if args.nf4 else dtype}"
    table = Table(title, " s | ".join(seconds) + f" s | {heads}")
    table.add(*map(list, zip(*turns[1:])), floor, gap, peak, max(forecast.values()), *resident)
    return table


def need_room(cfg: og.Config, args) -> None:
    """Leave with one line before the machine begins to swap."""
    forecast = fits.forecast(cfg, thinker_config(big=True), model.OMNI, 80 + int(25 * args.audio_s))
    with open("/proc/meminfo") as f:
        kib = dict(line.split(":") for line in f)["MemAvailable"].split()[0]
    need, there = max(forecast.values()) + LIBRARIES_GIB, int(kib) / 2**20
    if need > there:
        sys.exit(f"error: a step at 7B size needs {need:.1f} GiB of memory, and {there:.1f} are free")


def watch_parts(policy, optimizer) -> Counter:
    """From here on the seconds of the parts of a step are added up. No part runs inside another."""
    seconds = Counter()

    def timed(function, part=""):
        def run(*args, **kwargs):
            results = []
            name = part or ("score" if torch.is_grad_enabled() else "reference")
            seconds[name] += seconds_of(lambda: results.append(function(*args, **kwargs)))
            return results[0]

        return run

    policy.encode_audio = timed(policy.encode_audio, "tower")
    og.read_prompts = timed(og.read_prompts, "prefill")  # in the rollout only: scoring calls it in model.py
    og.decode = timed(og.decode, "decode")
    og.token_logps = timed(og.token_logps)
    torch.Tensor.backward = timed(torch.Tensor.backward, "backward")
    model.Prefix.backward = timed(model.Prefix.backward, "backward")
    optimizer.step = timed(optimizer.step, "optimizer")
    return seconds


def floor_s(policy, cfg: og.Config, prompt_tokens: int) -> float:
    """Seconds that no step can be shorter than: the products of the base's weights at the rate of a large
    product, and no step of decoding faster than the weights are read. All else is left out."""
    n, size = (8192, 2**30) if CUDA else (2048, 2**28)
    a = torch.randn(n, n, device=DEVICE).to(policy.dtype)
    x = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    y = x.clone()
    product_s, copy_s = map(statistics.median, by_turns(7, lambda: a @ a, lambda: y.copy_(x)))
    flops, bandwidth = 2 * n**3 / product_s, 2 * size / copy_s

    linear, head = [layer.base_layer.weight for layer in lora_layers(policy)], policy.head.weight
    weights = sum(w.numel() * (2 if w.dtype == torch.uint8 else 1) for w in linear)  # nf4: two in a byte
    rows, t = cfg.prompts_per_step * cfg.num_generations, cfg.new_tokens
    tokens = cfg.prompts_per_step * prompt_tokens + rows * (t - 1)
    once = 2 * weights * tokens + 2 * head.numel() * rows * t
    passes = 2 + bool(cfg.beta) + cfg.gradient_checkpointing  # forward, backward, reference, forward again
    reading_s = sum(w.nbytes for w in [*linear, head]) / bandwidth
    decoding_s = max(reading_s, 2 * (weights + head.numel()) * rows / flops)
    return passes * once / flops + (t - 1) * decoding_s


# ------------------------------------------------------------------------------------------------------------
# --scoring, --rollout, --memory


def scoring(args) -> Table:
    """Forward and backward over one group: G full rows as one batch, against the pack."""
    policy = random_policy(og.Config(), CUDA, DTYPE)
    policy.lm.train()
    table = Table("Scoring, forward and backward", "S | T | G | repeated s | shared s | faster, x | bound, x")

    def score_rows(rows, s):  # (G, S + T)
        x = torch.nn.functional.embedding(rows, policy.embed_tokens.weight)
        hidden = policy.lm(inputs_embeds=x, use_cache=False).last_hidden_state[:, s - 1 : -1]
        logps = policy.head(hidden).float().log_softmax(-1)
        logps.gather(2, rows[:, s:, None]).sum().backward()

    def compare(s, t, g):
        prompt, ids = Prompt(random_ids(s)), [random_ids(t) for _ in range(g)]
        completions = [Completion(x, sampled=[True] * t) for x in ids]
        pack = model.make_pack([prompt], [completions], [0], DEVICE)
        rows = torch.tensor([prompt.ids + x for x in ids], device=DEVICE)
        repeated, shared = by_turns(
            args.repeats,
            lambda: score_rows(rows, s),
            lambda: model.token_logps(policy, pack, 1.0)[0].sum().backward(),
        )
        table.add(s, t, g, repeated, shared, ratio(repeated, shared), g * (s + t) / (s + g * t))

    for s in (330, 830):  # a clip of 10 s, of 30 s
        for t, g in ((8, 8), (30, 8), (30, 16), (100, 8)):
            compare(s, t, g)
    return table


def decode(args) -> Table:
    policy = random_policy(make_config(args, load_in_4bit=args.nf4), CUDA, DTYPE)
    title = f"{args.prompts} questions with {args.audio_s:g} s clips, {'nf4' if args.nf4 else DTYPE}"
    table = Table(title, "G | T | s a token | tokens a second")
    for t in (16, 256):
        with torch.no_grad():
            prefixes = model.read_prompts(policy, audio_prompts(policy, random_mels(args)))
            sample = functools.partial(og.decode, policy, prefixes, args.generations, 1.0, t)
            (turns,) = by_turns(args.repeats, lambda sample=sample: sample(range(args.prompts)))
        rows = args.prompts * args.generations
        table.add(args.generations, t, [s / t for s in turns], [t * rows / s for s in turns])
    return table


def command(args) -> Table:
    """What is printed and logged by `python omni_grpo.py --model DIR --data FILE --steps 2`."""
    with tempfile.TemporaryDirectory() as folder:
        base, run = os.path.join(folder, "base"), os.path.join(folder, "run")
        questions = sounds.write_sounds(folder, 24, 4, seed=0, name="demo")
        write_checkpoint(base, questions)
        words = [f"--model={base}", f"--data={questions}", f"--out={run}", "--steps=2", "--eval_size=0"]
        words += [f"--prompts_per_step={args.prompts}", f"--num_generations={args.generations}"]
        words += ["--load_in_4bit"] * args.nf4
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, os.path.join(ROOT, "omni_grpo.py"), *words], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr.strip().splitlines()[-1])
        total = time.monotonic() - start
        print(
            *[line for line in done.stdout.splitlines() if line.startswith(("memory", "warning"))], sep="\n"
        )
        with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as f:
            last = json.loads(f.read().splitlines()[-1])
    table = Table(
        "Two steps of the command line, random weights", "command s | rollout s | update s | peak GiB"
    )
    table.add(total, last["time/rollout_s"], last["time/update_s"], last["mem/peak_gib"])
    return table


def write_checkpoint(folder: str, questions: str) -> None:
    """Random weights, and a tokenizer that knows the words of the questions."""
    texts = [demo.user_turn(example, "direct") for example in data.Examples(questions)]
    tokenizer, ids = demo.train_tokenizer(texts, vocab_size=512)
    config = thinker_config(CUDA)
    config.audio_token_id = ids["<|AUDIO|>"]
    config.text_config.eos_token_id = ids["<|im_end|>"]
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    thinker.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=300, feature_size=128)
    extractor.save_pretrained(folder)


CARD_S = 480  # all that --card may take
CARD = [  # each in a process of its own, what matters most first
    "--step --repeats 2",
    "--step --repeats 2 --nf4",
    "--command --repeats 1",
    "--decode --repeats 1",
    "--step --repeats 1 --audio_s 30",
    "--step --repeats 1 --audio_s 30 --nf4",
    "--decode --repeats 1 --nf4",
]


def card(args) -> Table:
    """bench.json is written after every line, so that a run that is cut off keeps what it had."""
    start, results = time.monotonic(), []
    table = Table("A card, with random weights at 7B size", "measured | value")
    size = f"--prompts {args.prompts} --generations {args.generations}"
    with tempfile.TemporaryDirectory() as folder:
        for words in CARD:
            left, out = CARD_S - (time.monotonic() - start), os.path.join(folder, "rows.json")
            argv = [sys.executable, os.path.abspath(__file__), *words.split(), *size.split(), f"--json={out}"]
            try:
                done = subprocess.run(argv, capture_output=True, text=True, timeout=max(1, left))
                rows, error = [], (done.stderr.strip() or "?").splitlines()[-1]
                if not done.returncode:
                    with open(out, encoding="utf-8") as f:
                        rows, error = json.load(f), ""
            except subprocess.TimeoutExpired:
                rows, error = [], f"no time left of {CARD_S} s"
            results.append(dict(command=words, rows=rows, error=error))
            data.write_text("bench.json", json.dumps(dict(title=table.lines[0], results=results), indent=1))
            for row in rows or [dict(error=error)]:
                for name, value in row.items():
                    table.add(f"`{words}`: {name}", value)
    return table


def rollout(args) -> Table:
    """The library's generate, our rollout, and ours when one row in four hears 3 s of its clip again."""
    policy, t, mels = random_policy(make_config(args), CUDA, DTYPE), args.new_tokens, random_mels(args)
    thinker = policy.model.get_base_model()
    ids = torch.tensor([prompt.ids for prompt in audio_prompts(policy, mels)], device=DEVICE)
    features = torch.stack(mels).to(DEVICE, DTYPE)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), input_features=features)
    inputs["feature_attention_mask"] = torch.ones_like(features[:, 0], dtype=torch.long)
    sampling = dict(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=t, min_new_tokens=t, pad_token_id=0)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    part = np.zeros(3 * data.RATE_HZ, dtype=np.float32)

    def hear_again(_, rows):
        asking = [n for n in range(0, len(rows), 4) if len(rows[n].ids) == 1 + n % (t - 1)]
        parts = [model.log_mel(extractor, part, 0) for _ in asking]
        heard = [None] * len(rows)
        for n, audio in zip(asking, policy.encode_audio(parts) if parts else ()):
            heard[n] = Tokens([policy.audio_id] * len(audio), [(0, audio)])
        return heard

    def ours(g, *insert):
        prompts = audio_prompts(policy, mels)
        with torch.no_grad():
            prefixes = model.read_prompts(policy, prompts)
        og.decode(policy, prefixes, g, 1.0, t, range(args.prompts), *insert)

    title = f"{t} tokens for {args.prompts} questions with {args.audio_s:g} s clips"
    table = Table(title, "G | generate s | ours s | faster, x | hearing again s | longer, x")
    for g in (1, 4, 8, 16):
        theirs, plain, again = by_turns(
            args.repeats,
            lambda g=g: thinker.generate(**inputs, **sampling, num_return_sequences=g),
            lambda g=g: ours(g),
            lambda g=g: ours(g, hear_again),
        )
        table.add(g, theirs, plain, ratio(theirs, plain), again, ratio(again, plain))
    return table


def memory(args) -> Table:
    """By torch's meta device: no card is needed, and none was measured. --step measures one."""
    title = f"A step of Qwen2.5-Omni-7B: {args.prompts} prompts with {args.audio_s:g} s clips, "
    title += f"G = {args.generations}, LoRA rank 32; a forecast"
    table = Table(title, "weights | T | weights GiB | rollout GiB | update GiB | fits a card of")
    config, prompt_tokens = thinker_config(big=True), 120 + int(25 * args.audio_s)
    for weights in ("bf16", "nf4"):
        for t in (16, 256):
            cfg = make_config(args, max_new_tokens=t, load_in_4bit=weights == "nf4")
            gib = fits.forecast(cfg, config, model.OMNI, prompt_tokens)
            cards = [f"{card} GB" for card in (16, 24, 48, 80) if max(gib.values()) <= 0.95 * card]
            table.add(weights, t, *gib.values(), [*cards, "none"][0])
    return table


# ------------------------------------------------------------------------------------------------------------
# --trl

S, END = 400, 1  # tokens of a prompt; the token that ends a turn
SETTINGS = [  # T, beta, gradient checkpointing, do completions end by themselves?
    (24, 0.04, True, True),
    (24, 0.0, False, True),
    (24, 0.04, True, False),
    (8, 0.04, True, False),
]


def against_trl(args) -> Table:
    """A whole step (rollout, scoring, update) against GRPOTrainer.train.

    Equal on both sides: a small random Qwen2, its LoRA, prompts, rewards, plain sampling, AdamW, float32,
    threads, checkpointing. In the warm-up turn our update gets TRL's completions, and gradients are compared.
    """
    import trl

    class Turns(transformers.TrainerCallback):
        """Inside TRL's loop: its step is timed, then one of ours."""

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, _, state, *__, **___):
            if not state.global_step:
                cosines.append(lowest_cosine(trainer, *ours))

        def on_step_end(self, *_, **__):
            wait()
            seconds = time.perf_counter() - self.start
            turns.append((seconds, seconds_of(lambda: our_step(*ours))))

    title = (
        f"A step of {args.prompts} prompts, S = {S}, G = {args.generations}, against trl {trl.__version__}"
    )
    heads = "T | beta | checkpointing | TRL s | ours s | faster, x | TRL peak GiB | ours peak GiB | less, x"
    table = Table(title, heads + " | lowest cosine of a gradient")
    for setting in SETTINGS:
        turns, cosines, ours = [], [], our_side(args, *setting)
        trainer = trl_side(args, args.repeats + 1, [Turns()], *setting)
        trainer.train()
        theirs_s, ours_s = map(list, zip(*turns[1:]))
        _, theirs_gib = in_new_process(two_trl_steps, args, *setting)
        _, ours_gib = in_new_process(two_steps, args, *setting)
        t, beta, checkpointing, ends = setting
        row = [f"1 to {t}" if ends else t, beta, checkpointing, theirs_s, ours_s, ratio(theirs_s, ours_s)]
        table.add(*row, theirs_gib, ours_gib, theirs_gib / ours_gib, *cosines)
    return table


def lowest_cosine(trainer, policy, optimizer, cfg, prompts) -> float:
    """Of the gradients of all parameters: TRL's, and ours of the same completions."""
    batch, by_prompt = trainer._buffered_inputs[0], defaultdict(list)
    lengths = batch["completion_mask"].sum(dim=1).tolist()
    for prompt, ids, n in zip(batch["prompt_ids"].tolist(), batch["completion_ids"].tolist(), lengths):
        by_prompt[tuple(prompt)].append(Completion(ids[:n], sampled=[True] * n))
    groups = [reward_group(cfg, Prompt(list(ids)), completions) for ids, completions in by_prompt.items()]
    og.backward(policy, cfg, og.make_batch(policy, cfg, groups)[0], through_rollout=True)
    ours, cosines = policy.trainable(), []
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            a, b = p.grad.flatten().double(), ours[name].grad.flatten().double()
            cosines.append(torch.nn.functional.cosine_similarity(a, b, dim=0).item())
    return min(cosines)


def small_qwen2(ends: bool):
    """Random weights, always the same. ends: one token in twelve ends the turn, as in direct answers."""
    torch.manual_seed(0)
    shape = SMALL | dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, rope_parameters=ROPE)
    qwen2 = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).to(DEVICE)
    if ends:
        qwen2.lm_head.bias = torch.nn.Parameter(torch.zeros(2048, device=DEVICE))
        qwen2.lm_head.bias.data[END] = math.log(2047 / 11)
    return qwen2


def fill_lora(peft_model) -> None:
    """Random factors, equal on both sides. B is not 0: the KL and both factors have gradients."""
    torch.manual_seed(1)
    for _, p in sorted(peft_model.named_parameters()):
        if p.requires_grad:
            p.data = 0.02 * torch.randn(p.shape).to(p.device)


def text_prompts(n: int) -> list[list[int]]:
    return [[7 + (i * i + 31 * j) % 2000 for i in range(S)] for j in range(n)]


def our_side(args, t: int, beta: float, checkpointing: bool, ends: bool):
    """-> the arguments of our_step"""
    cfg = make_config(
        args,
        max_new_tokens=t,
        lora_rank=16,
        optimizer="adamw",
        beta=beta,
        scale="none",
        gradient_checkpointing=checkpointing,
    )
    policy = take_apart(cfg, small_qwen2(ends), model.TEXT_ONLY)
    fill_lora(policy.model)
    policy.stop_ids = [END] if ends else []
    return policy, og.make_optimizer(policy, cfg), cfg, list(map(Prompt, text_prompts(args.prompts)))


def trl_side(args, steps: int, callbacks: list, t: int, beta: float, checkpointing: bool, ends: bool):
    """TRL's trainer, set to the same algorithm: what differs is how the step is computed."""
    import datasets
    import peft
    import tokenizers
    import trl

    vocabulary = {"PAD": 0, "END": END} | {f"w{i}": i for i in range(2, 2048)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="PAD", eos_token="END")
    prompts = [" ".join(f"w{i}" for i in ids) for ids in text_prompts(args.prompts)]
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.prompts * args.generations,
        num_generations=args.generations,
        max_completion_length=t,
        generation_kwargs={} if ends else dict(min_new_tokens=t),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=beta,
        loss_type="grpo",
        scale_rewards="none",  # its std is the sample's, ours the population's
        use_bias_correction_kl=False,  # the gradient of k3 itself
        max_steps=steps,
        optim="adamw_torch",
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=not CUDA,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    trainer = trl.GRPOTrainer(
        small_qwen2(ends),
        random_rewards,
        args=config,
        processing_class=tokenizer,
        callbacks=callbacks,
        train_dataset=datasets.Dataset.from_dict(dict(prompt=prompts * (steps + 1))),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    fill_lora(trainer.model)
    return trainer


def two_trl_steps(args, *setting):
    return trl_side(args, 2, [], *setting).train


def two_steps(args, *setting):
    ours = our_side(args, *setting)
    return lambda: [our_step(*ours) for _ in range(2)]


# ------------------------------------------------------------------------------------------------------------
# --reading, --startup


def reading(args) -> Table:
    """What a worker thread does with a recording (44.1 kHz, stereo) ahead of the step."""
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    wave = 0.1 * np.random.default_rng(0).standard_normal((int(args.audio_s * 44100), 2))
    table = Table(f"A clip of {args.audio_s:g} s, by one thread", "format | decode s | log-mel s")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("wav", "flac", "mp3"):
            path = f"{folder}/clip.{kind}"
            soundfile.write(path, wave, 44100)
            samples, _ = data.load_audio(path, args.audio_s)
            decode, features = by_turns(
                args.repeats,
                lambda path=path: data.load_audio(path, args.audio_s),
                lambda samples=samples: model.log_mel(extractor, samples, 0),
            )
            table.add(kind, decode, features)
    return table


def startup(args) -> Table:
    """All that the trainer does with --data before the model loads; up to 2 s of it go into trying clips."""
    table = Table("Questions ready to train on", "questions | MB of JSON lines | s | GiB")
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/clip.wav", np.sin(np.arange(16000) / 20), 16000)
        line = dict(audio="clip.wav", choices=["a dog", "a bell", "rain", "speech"], answer="rain")
        for n in (1_000, 10_000, 100_000, 1_000_000):
            path = f"{folder}/{n}.jsonl"
            with open(path, "w", encoding="utf-8") as f:
                for i in range(n):
                    f.write(json.dumps(line | dict(id=f"q{i}", question=f"What is heard at {i}?")) + "\n")
            table.add(n, os.path.getsize(path) / 1e6, *in_new_process(open_questions, args, path))
    return table


def open_questions(_, path: str):
    return lambda: og.open_data(og.Config(data=path))


MODES = {
    "step": step,
    "decode": decode,
    "command": command,
    "card": card,
    "scoring": scoring,
    "rollout": rollout,
    "trl": against_trl,
    "memory": memory,
    "reading": reading,
    "startup": startup,
}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    modes = parser.add_mutually_exclusive_group(required=True)
    for name in MODES:
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="turns behind each median")
    add("--prompts", type=int, default=8)
    add("--generations", type=int, default=8)
    add("--new_tokens", type=int, default=16)
    add("--audio_s", type=float, default=10.0)
    add("--full", action="store_true", help="--step at 7B size on a CPU: 2 prompts, T = 8, one turn")
    add("--nf4", action="store_true", help="--step with 4-bit base weights")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch on a CPU")
    add("--json", default="", metavar="FILE", help="write the rows of the table there, too")
    add("--write", nargs="?", const="", metavar="NAME", help="write the table as NAME (none: the mode's)")
    if "--full" in sys.argv:
        parser.set_defaults(prompts=2, new_tokens=8, repeats=1)
    args = parser.parse_args()
    mark = f"<!-- bench {args.write or args.mode} -->"
    if args.write is not None and mark not in read_page():
        parser.error(f"--write: {PAGE} has no {mark}")
    model.quiet_libraries()
    torch.set_num_threads(args.threads)
    table = MODES[args.mode](args)
    if args.json:
        data.write_text(args.json, json.dumps(table.rows))
    if args.write is not None:
        table.write(mark)


if __name__ == "__main__":
    main()
