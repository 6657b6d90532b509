"""Speed and memory, measured. No weights are needed: random ones, at 7B size on a GPU, small on a CPU.

    python tests/bench.py --scoring      prefix-shared against repeated scoring, forward and backward, and the bound
    python tests/bench.py --step         a whole training step: seconds by part, its floor, peak memory (CUDA: 7B, capped)
    python tests/bench.py --memory       what a step of the 7B model holds, reckoned without a card, and which cards it fits
    python tests/bench.py --reading      training steps of the demo's base with 30 s clips on disk, against clips in memory
    python tests/bench.py --eval         k sampled answers a question, against the library's generate
    python tests/bench.py --rollout      the same for groups of G = 1, 4, 8, 16
    python tests/bench.py --relisten     rollouts in which one row in four hears a part of its clip again, against those without
    python tests/bench.py --trl          a whole training step against TRL's GRPOTrainer, and are the two the same step?
    python tests/bench.py --audio        a whole training step against the usual loop: repeated rows, clips and full logits
    python tests/bench.py --startup      seconds and memory until 1,000 ... 1,000,000 questions are ready

Ratios come from one run on one machine, the two sides taking turns; a cell is the median (lowest - highest turn). All tables
also go to --json, and from there by --readme into README.md. Memory is measured in a fresh process a side, over what it
holds before its first step.
"""

import argparse
import collections
import importlib.util
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from itertools import islice

import numpy as np
import soundfile
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402
import omni_grpo as og  # noqa: E402

SMALL = dict(
    vocab_size=2048,
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 12, 12]),
)
SMALL_AUDIO = dict(
    d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, output_dim=384
)
TOKENS = ("audio", "image", "video", "audio_start", "audio_end", "vision_start", "vision_end")
VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLES = []  # of this run


def thinker_config(big: bool):
    """Qwen2.5-Omni's thinker at its published 7B size (the library's defaults), or small."""
    import transformers

    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=dict(tie_word_embeddings=False) if big else SMALL,
        audio_config={} if big else SMALL_AUDIO,
        vision_config=VISION | dict(out_hidden_size=3584 if big else 384),
        **({} if big else {f"{name}_token_id": 2047 - i for i, name in enumerate(TOKENS)}),
    )


def random_policy(big: bool, rank: int = 16, nf4: bool = False) -> og.Policy:
    """With random weights and LoRA."""
    import bitsandbytes
    import transformers

    og.quiet_libraries()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if big else torch.float32)
    with torch.device(DEVICE):
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(thinker_config(big))
    if nf4:
        for parent in [
            m for n, m in model.named_modules() if "layers" in n and not n.startswith("audio_tower")
        ]:
            for name, m in parent.named_children():
                if isinstance(m, torch.nn.Linear):
                    small = bitsandbytes.nn.Linear4bit(
                        m.in_features,
                        m.out_features,
                        m.bias is not None,
                        compute_dtype=m.weight.dtype,
                        quant_type="nf4",
                    )
                    small.load_state_dict(m.state_dict())
                    setattr(parent, name, small.to(DEVICE))
    torch.set_default_dtype(torch.float32)
    return og.take_apart(og.Config(lora_rank=rank, lora_alpha=rank), model, og.OMNI)


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def by_turns(*functions, repeats: int) -> list[list[float]]:
    """Seconds of every turn of each function, A B A B ..., after one warm-up turn."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for f, seconds in zip(functions, times):
            sync()
            start = time.perf_counter()
            f()
            sync()
            if turn:
                seconds.append(time.perf_counter() - start)
    return times


def over(a: list[float], b: list[float]) -> list[float]:
    """How many times longer a took than b, turn by turn."""
    return [x / y for x, y in zip(a, b)]


def where() -> str:
    about = og.machine()
    return f"{about['hardware']}, torch {about['torch']}, transformers {about['transformers']}"


def table(title: str, *columns: str) -> None:
    TABLES.append(dict(title=title, columns=columns, rows=[]))
    print(f"\n{title}; {where()}\n\n" + "\n".join(lines(TABLES[-1])), flush=True)


def row(*cells) -> None:
    """One row of the last table; a list is what was measured, turn by turn."""
    TABLES[-1]["rows"].append(cells)
    print(lines(TABLES[-1])[-1], flush=True)


def lines(table: dict) -> list[str]:
    """In Markdown; of several turns the median (lowest - highest)."""

    def cell(c):
        if isinstance(c, list):
            return f"{statistics.median(c):.3g}" + (f" ({min(c):.3g} - {max(c):.3g})" if len(c) > 1 else "")
        return (
            {True: "yes", False: "no"}[c]
            if isinstance(c, bool)
            else f"{c:.3g}"
            if isinstance(c, float)
            else str(c)
        )

    rows = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return ["| " + " | ".join(map(cell, cells)) + " |" for cells in rows]


def write_readme(results: dict) -> None:
    """Put the tables of bench.json between README.md's marks: <!-- bench MODE --> ... <!-- end -->"""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")

    def block(mark):
        if mark[1] not in results:
            return mark[0]
        of = results[mark[1]]
        about = f"{of['where']}, {of['date']}: `python tests/bench.py {of['command']}`"
        said = (f"*{t['title'][0].upper()}{t['title'][1:]}. {about}*" for t in of["tables"])
        return (
            f"<!-- bench {mark[1]} -->\n\n"
            + "\n\n".join("\n".join([title, "", *lines(t)]) for title, t in zip(said, of["tables"]))
            + "\n\n<!-- end -->"
        )

    with open(path, encoding="utf-8") as f:
        text = re.sub(r"<!-- bench (\S+) -->.*?<!-- end -->", block, f.read(), flags=re.DOTALL)
    og.write_atomically(path, lambda tmp: open(tmp, "w", encoding="utf-8").write(text))


def memory_gib(peak: bool) -> float:
    """The highest since the last call without `peak`, or what is held now. Not ru_maxrss: a child inherits its parent's."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats() if not peak else None
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30
    if not os.path.exists("/proc/self/clear_refs"):  # not Linux
        return og.peak_memory_gib()
    if not peak:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    with open("/proc/self/status") as f:
        return next(int(x.split()[1]) for x in f if x.startswith("VmHWM:" if peak else "VmRSS:")) / 2**20


def fresh(what: str, *params) -> list[float]:
    """[seconds, GiB before, GiB more at the peak] of CHILDREN[what](args, *params)() in a process of its own."""
    command = [
        sys.executable,
        os.path.abspath(__file__),
        *sys.argv[1:],
        "--child",
        json.dumps([what, *params]),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(args) -> None:
    what, *params = json.loads(args.child)
    work = CHILDREN[what](args, *params)
    before, start = memory_gib(peak=False), time.perf_counter()
    work()
    print(json.dumps([time.perf_counter() - start, before, memory_gib(peak=True) - before]))


def scoring(args) -> None:
    """Forward and backward over one group: G full rows as one batch, against the packed row. The heads see the same tokens.

    Beside them one causal row of S + GT tokens, through the library's own path: what so many tokens cost without our masks.
    """
    policy = random_policy(big=torch.cuda.is_available())
    vocab = policy.head.weight.shape[0]
    table(
        "scoring, forward and backward",
        "S",
        "T",
        "G",
        "repeated s",
        "shared s",
        "one plain row s",
        "faster, x",
        "bound, x",
        "of the bound",
    )
    policy.lm.train()
    for s in (330, 830):
        for t, g in ((8, 4), (8, 8), (8, 16), (30, 4), (30, 8), (30, 16), (100, 8)):
            prompt = og.Tokens(torch.randint(vocab, (s,)).tolist())
            ids = [torch.randint(vocab, (t,)).tolist() for _ in range(g)]
            done = [og.Completion(i, sampled=[True] * t) for i in ids]
            shared = og.make_pack([og.Group(None, prompt, done)], [0], policy.device)
            rows = torch.tensor([prompt.ids + i for i in ids], device=policy.device)  # (G, S + T)

            def run_shared(pack=shared):
                og.token_logps(policy, pack, 1.0)[0].sum().backward()

            def run_repeated(rows=rows, s=s):
                run_rows(rows, s)

            def run_plain(row=torch.randint(vocab, (1, s + g * t), device=policy.device), s=s):
                run_rows(row, s)

            def run_rows(rows, s):
                x = torch.nn.functional.embedding(rows, policy.embed_tokens.weight)
                hidden = policy.lm(inputs_embeds=x, use_cache=False).last_hidden_state[:, s - 1 : -1]
                logps = policy.head(hidden).float().log_softmax(-1)
                logps.gather(2, rows[:, s:, None]).sum().backward()

            a, b, c = by_turns(run_repeated, run_shared, run_plain, repeats=args.repeats)
            bound = g * (s + t) / (s + g * t)
            row(s, t, g, a, b, c, over(a, b), bound, statistics.median(over(a, b)) / bound)


class Clock:
    """Seconds of named parts, each without the parts inside it."""

    def __init__(self):
        self.seconds, self.open = collections.Counter(), []

    def part(self, name):
        """A function -> the same, timed. `name`: a text, or asked for one at every call; None counts with what is around."""

        def wrap(function):
            def timed(*args, **kwargs):
                now = name() if callable(name) else name
                if now is None:
                    return function(*args, **kwargs)
                sync()
                start, inside = time.perf_counter(), sum(self.seconds.values())
                self.open.append(now)
                result = function(*args, **kwargs)
                sync()
                self.open.pop()
                self.seconds[now] += time.perf_counter() - start - (sum(self.seconds.values()) - inside)
                return result

            return timed

        return wrap

    def watch(self, policy, optimizer) -> None:
        policy.encode_audio = self.part("tower")(policy.encode_audio)
        og.read = self.part(lambda: None if {"score", "reference"} & set(self.open) else "prefill")(og.read)
        og.rollout = self.part("decode")(og.rollout)
        og.token_logps = self.part(lambda: "score" if torch.is_grad_enabled() else "reference")(
            og.token_logps
        )
        torch.Tensor.backward = self.part("backward")(torch.Tensor.backward)
        og.Prefix.backward = self.part("backward")(og.Prefix.backward)
        optimizer.step = self.part("optimizer")(optimizer.step)


PARTS = ("tower", "prefill", "decode", "score", "reference", "backward", "optimizer")


def machine_rates() -> tuple[float, float]:
    """-> (FLOP/s of a large matrix product in the base's dtype, bytes/s of a copy, read and written), both measured"""
    n, dtype = (8192, torch.bfloat16) if DEVICE == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    x = torch.zeros(2**30 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE)
    y = x.clone()
    product, copy = by_turns(lambda: a @ b, lambda: y.copy_(x), repeats=7)
    return 2 * n**3 / statistics.median(product), 2 * len(x) / statistics.median(copy)


def floor_s(policy, cfg, s: int, rates) -> float:
    """Seconds that a step cannot be shorter than: every product of base weights at the measured rate, and every decoding step
    no faster than the weights and the keys can be read. LoRA, attention, the tower and the optimizer are left out."""
    flops, bandwidth = rates
    linear = [
        m.weight for n, m in policy.lm.named_modules() if n.endswith("_proj") or n.endswith("base_layer")
    ]
    linear = list({id(w): w for w in linear}.values())
    weights, head = (
        sum(w.numel() * (2 if w.dtype == torch.uint8 else 1) for w in linear),
        policy.head.weight.numel(),
    )
    p, rows, t = cfg.prompts_per_step, cfg.prompts_per_step * cfg.num_generations, cfg.new_tokens
    prompt, fed = 2 * weights * p * s, 2 * weights * rows * (t - 1) + 2 * head * rows * t
    work = prompt * 1 + fed + (prompt + fed if cfg.beta else 0)  # prefill, scoring, reference
    work += (prompt + fed) * (2 if cfg.gradient_checkpointing else 1) + (
        0 if cfg.reuse_prefix else prompt
    )  # backward
    config = policy.lm.config
    kv = (
        2
        * config.num_hidden_layers
        * config.num_key_value_heads
        * (config.hidden_size // config.num_attention_heads)
    )
    bytes_ = sum(w.numel() * w.element_size() for w in [*linear, policy.head.weight]) + 2 * kv * (
        p * s + rows * t / 2
    )
    return work / flops + (t - 1) * max(bytes_ / bandwidth, 2 * (weights + head) * rows / flops)


def step(args) -> None:
    """Whole steps on random weights, clips and rewards: nothing is learned, everything is computed. On a GPU at 7B size under
    --cap_gib. The peak stands beside the one that the preflight reckons without a card."""
    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    policy = random_policy(big=cuda, rank=32, nf4=args.nf4)
    policy.stop_ids = []
    cfg = og.Config(
        prompts_per_step=args.prompts,
        num_generations=args.generations,
        max_new_tokens=args.new_tokens,
        data="-",
        load_in_4bit=args.nf4,
    )
    optimizer, clock = og.make_optimizer(policy, cfg), Clock()
    clock.watch(policy, optimizer)
    vocab, frames = policy.head.weight.shape[0], int(args.audio_s * 100)

    def once():
        audio = policy.encode_audio([torch.randn(128, frames) for _ in range(args.prompts)])
        prompts = [
            og.Tokens(
                torch.randint(vocab, (40,)).tolist() + [0] * len(a) + torch.randint(vocab, (40,)).tolist(),
                [(40, a)],
            )
            for a in audio
        ]
        our_step(policy, optimizer, cfg, prompts)
        return len(prompts[0].ids)

    rows, rates = [], machine_rates()
    for _ in range(args.steps):
        clock.seconds.clear()
        sync()
        start = time.perf_counter()
        s = once()
        sync()
        rows.append([*(clock.seconds[part] for part in PARTS), time.perf_counter() - start])
    if cuda:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        held = [*policy.model.parameters(), *policy.model.buffers()]
        with og.Live(held) as live:
            once()
        peak = (live.peak + sum(x.numel() * x.element_size() for x in held)) / 2**30
    config = policy.model.get_base_model().config
    reckoned = og.rehearse(cfg, config, og.OMNI, s, torch.bfloat16 if cuda else torch.float32)
    floor = floor_s(policy, cfg, s, rates)
    table(
        f"a whole step: {args.prompts} prompts of S = {s} ({args.audio_s:g} s clips), G = {args.generations}, T = "
        f"{args.new_tokens}, LoRA rank 32, {'nf4' if args.nf4 else 'bf16' if cuda else 'float32'}, cap {args.cap_gib:g} GiB; "
        f"{rates[0] / 1e12:.3g} TFLOP/s, {rates[1] / 1e9:.3g} GB/s measured",
        *(f"{p} s" for p in PARTS),
        "step s",
        "floor s",
        "over the floor, x",
        "peak GiB",
        "reckoned GiB",
    )
    columns = list(map(list, zip(*(rows[1:] or rows))))
    row(*columns, floor, statistics.median(columns[-1]) / floor, peak, max(reckoned.values()))


def memory(args) -> None:
    """What a step of the 7B model holds, played through on the meta device: no card and no weights are needed, and it is no
    measurement of a card. `--step` on a GPU measures one row and prints this reckoning beside it."""
    config = thinker_config(big=True)
    table(
        f"memory of a step of Qwen2.5-Omni-7B, {args.prompts} prompts, LoRA rank 32, reckoned",
        "weights",
        "G",
        "clip s",
        "T",
        "weights GiB",
        "rollout GiB",
        "update GiB",
        "fits a card of",
    )
    for nf4 in (False, True):
        for g in (4, 8, 16):
            for audio_s in (10, 30):
                for t in (16, 256):
                    cfg = og.Config(
                        data="-",
                        prompts_per_step=args.prompts,
                        num_generations=g,
                        max_new_tokens=t,
                        load_in_4bit=nf4,
                    )
                    gib = og.rehearse(cfg, config, og.OMNI, 120 + 25 * audio_s)
                    fits = next(
                        (f"{c} GB" for c in (16, 24, 48, 80) if max(gib.values()) <= 0.95 * c), "none"
                    )
                    row("nf4" if nf4 else "bf16", g, audio_s, t, *(f"{x:.1f}" for x in gib.values()), fits)


def reading(args) -> None:
    """Steps on recordings (44.1 kHz stereo) read ahead by worker threads, against the same clips decoded beforehand."""
    cfg, _ = og.parse_config(
        ["--prompts_per_step", str(args.prompts), "--num_generations", str(args.generations)]
    )
    og.make_demo()
    with tempfile.TemporaryDirectory() as folder:
        rng, n = np.random.default_rng(0), 4 * args.prompts
        for i in range(n):
            wave = np.cumsum(rng.standard_normal((int(args.audio_s * 44100), 2)), axis=0)
            soundfile.write(f"{folder}/{i}.{args.kind}", wave / np.abs(wave).max(), 44100)
        with open(f"{folder}/clips.jsonl", "w", encoding="utf-8") as f:
            for i in range(n):
                line = dict(
                    audio=f"{i}.{args.kind}", question="What is this?", choices=["hum", "hiss"], answer=i % 2
                )
                f.write(json.dumps(line) + "\n")
        examples = data.Examples(f"{folder}/clips.jsonl")
        start = time.perf_counter()
        memory = {e.audio: data.load_audio(e.audio, cfg.max_audio_s) for e in examples}
        print(
            f"{args.audio_s:g} s {args.kind}, {args.prompts} prompts x {args.generations} completions, {where()}; "
            f"one thread decodes a clip in {(time.perf_counter() - start) / n * 1000:.0f} ms",
            flush=True,
        )
        policy = og.load_policy(cfg)
        optimizer, disk = og.make_optimizer(policy, cfg), data.load_audio
        seconds = {"disk": [], "memory": []}
        for turn in range(2 * args.repeats):
            name = ("disk", "memory")[turn % 2]
            data.load_audio = (
                disk if name == "disk" else lambda clip, max_s: (memory[clip][0].copy(), memory[clip][1])
            )
            clips = og.listen(policy, cfg, og.draw(cfg, examples, range(n), 0, "rl"), [])
            for i in range(args.steps):
                start = time.perf_counter()
                batch = list(islice(clips, args.prompts))
                groups = og.sampled_groups(policy, cfg, batch, {"accuracy": 1.0})
                og.update(policy, optimizer, cfg, groups, cold=False)
                if i > 1:  # the first two begin with nothing read ahead
                    seconds[name].append(time.perf_counter() - start)
            clips.close()
        data.load_audio = disk
    a, b = seconds["disk"], seconds["memory"]
    table(f"steps on {args.audio_s:g} s clips ({args.kind})", "from disk s", "from memory s", "longer, x")
    row(a, b, statistics.median(a) / statistics.median(b))


def sampling(args, counts: tuple[int, ...]) -> None:
    """k completions of each question by our rollout, against the library's generate(num_return_sequences=k)."""
    policy = random_policy(big=torch.cuda.is_available())
    policy.stop_ids, vocab, frames = [], policy.head.weight.shape[0] - 8, int(args.audio_s * 100)
    audio_id, model = policy.model.get_base_model().config.audio_token_id, policy.model.get_base_model()
    table(
        f"{args.new_tokens} tokens, {args.audio_s:g} s clips, {args.prompts} questions",
        "k",
        "generate s",
        "ours s",
        "faster, x",
    )
    mels = [torch.randn(128, frames) for _ in range(args.prompts)]
    sizes = [len(a) for a in policy.encode_audio(mels)]
    before, after = torch.randint(vocab, (40,)).tolist(), torch.randint(vocab, (40,)).tolist()
    ids = torch.tensor([before + [audio_id] * n + after for n in sizes], device=policy.device)
    features = dict(
        input_features=torch.stack(mels).to(policy.device, model.dtype),
        feature_attention_mask=torch.ones(args.prompts, frames, dtype=torch.long, device=policy.device),
    )
    for k in counts:

        def theirs(k=k):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_return_sequences=k,
                **features,
                **plain_sampling(args.new_tokens),
            )

        def ours(k=k):
            prompts = [
                og.Tokens(before + [audio_id] * len(a) + after, [(40, a)]) for a in policy.encode_audio(mels)
            ]
            og.rollout(policy, prompts, k, 1.0, args.new_tokens, list(range(len(prompts))))

        a, b = by_turns(theirs, ours, repeats=args.repeats)
        row(k, a, b, over(a, b))


def relistening(args) -> None:
    """Rollouts in which one row in four hears --again_s of its clip again, features and tower included, and those without."""
    import transformers

    policy = random_policy(big=torch.cuda.is_available())
    policy.stop_ids, vocab, waves = [], policy.head.weight.shape[0] - 8, np.random.default_rng(0)
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, return_attention_mask=True
    )
    clips = [waves.standard_normal(int(args.audio_s * 16000)).astype(np.float32) for _ in range(args.prompts)]
    before, after = torch.randint(vocab, (40,)).tolist(), torch.randint(vocab, (40,)).tolist()
    embedded = policy.encode_audio([og.features(extractor, clip, 0) for clip in clips])
    prompts = [og.Tokens(before + [5] * len(a) + after, [(40, a)]) for a in embedded]
    table(
        f"rollouts of {args.prompts} prompts with {args.audio_s:g} s clips, G = {args.generations}; one row in four hears "
        f"{args.again_s:g} s again",
        "T",
        "without s",
        "with s",
        "longer, x",
    )
    for t in (32, 64, 256):

        def insert(which, rows, t=t):
            out = [None] * len(rows)
            asked = [
                n for n, row in enumerate(rows) if len(row.ids) == t // 4 + n * 5 % (t // 4) and n % 4 == 0
            ]
            parts = [clips[which[n]][: int(args.again_s * 16000)] for n in asked]
            heard = policy.encode_audio([og.features(extractor, part, 0) for part in parts]) if asked else []
            for n, audio in zip(asked, heard):
                out[n] = og.Tokens([3, *[5] * len(audio), 4], [(1, audio)])
            return out

        def roll(insert=None, t=t):
            return og.rollout(policy, prompts, args.generations, 1.0, t, list(range(args.prompts)), insert)

        heard = sum(not all(c.sampled) for group in roll(insert) for c in group)
        assert heard * 4 == args.prompts * args.generations, heard
        a, b = by_turns(roll, lambda insert=insert: roll(insert), repeats=args.repeats)
        row(t, a, b, over(b, a))


END = 1  # the end-of-turn token of --trl


def plain_sampling(tokens: int) -> dict:
    return dict(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
    )


def random_rewards(completion_ids: list[list[int]], **_) -> list[float]:
    """A reward that is a function of the tokens alone: the same on both sides."""
    return [random.Random(repr(list(map(int, ids)))).random() for ids in completion_ids]


def our_step(policy, optimizer, cfg, prompts: list[og.Tokens]) -> None:
    groups = og.roll_groups(policy, cfg, prompts, list(range(len(prompts))))
    for group in groups:
        group.rewards = random_rewards([c.ids for c in group.completions])
    og.update(policy, optimizer, cfg, groups, cold=False)


S, LORA = 400, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of --trl


def causal_lm(ends: bool):
    """A small Qwen2 with random weights, always the same; `ends`: one token in twelve is the last, as in direct answers."""
    import transformers

    torch.manual_seed(0)
    shape = SMALL | dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    shape["rope_parameters"] = dict(rope_type="default", rope_theta=10000.0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).to(DEVICE)
    if ends:
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(2048, device=DEVICE))
        model.lm_head.bias.data[END] = math.log(2047 / 11)
    return model


def fill_lora(model) -> None:
    """Random LoRA factors, the same for both sides; B is not 0, so the KL and both factors have gradients."""
    for i, (_, p) in enumerate(sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)):
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.device) * 0.02


def text_prompts(n: int) -> list[list[int]]:
    return [[7 + (i * i + 31 * j) % 2000 for i in range(S)] for j in range(n)]


def our_text(args, t: int, beta: float, checkpointing: bool, ends: bool):
    """-> (policy, optimizer, cfg, prompts) of --trl"""
    cfg = og.Config(
        data="-",
        prompts_per_step=args.prompts,
        num_generations=args.generations,
        max_new_tokens=t,
        lora_rank=16,
        lora_alpha=16,
        optimizer="adamw",
        beta=beta,
        scale="none",
        gradient_checkpointing=checkpointing,
    )
    policy = og.take_apart(cfg, causal_lm(ends), og.TEXT_ONLY)
    fill_lora(policy.model)
    policy.stop_ids = [END] if ends else []
    return policy, og.make_optimizer(policy, cfg), cfg, list(map(og.Tokens, text_prompts(args.prompts)))


def trl_trainer(args, t: int, beta: float, checkpointing: bool, ends: bool, steps: int, callbacks=()):
    """TRL's trainer, set to the algorithm of our_text: what differs is how the step is computed."""
    og.quiet_libraries()
    import datasets
    import peft
    import tokenizers
    import transformers
    import trl

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"PAD": 0, "END": END} | {f"w{i}": i for i in range(2, 2048)})
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="PAD", eos_token="END")
    prompts = [" ".join(f"w{i}" for i in ids) for ids in text_prompts(args.prompts)] * (steps + 1)
    g = args.generations
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.prompts * g,
        num_generations=g,
        max_completion_length=t,
        generation_kwargs={} if ends else dict(min_new_tokens=t),
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=beta,
        loss_type="grpo",
        scale_rewards="none",
        use_bias_correction_kl=False,
        epsilon=0.2,
        num_iterations=1,
        max_steps=steps,
        optim="adamw_torch",
        learning_rate=1e-5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        disable_dropout=True,
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=DEVICE == "cpu",
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
    )
    trainer = trl.GRPOTrainer(
        causal_lm(ends),
        random_rewards,
        args=config,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        train_dataset=datasets.Dataset.from_dict(dict(prompt=prompts)),
        peft_config=peft.LoraConfig(r=16, lora_alpha=16, target_modules=LORA, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    fill_lora(trainer.model)
    return trainer


def against_trl(args) -> None:
    """A whole step (rollout, scoring, update) of prompts of S = 400 tokens, G completions of T, against GRPOTrainer.train.
    T from 1 to 24: completions end by themselves, as answers do; otherwise all are cut at T.

    Equal on both sides: a small random Qwen2 and its LoRA (rank 16, all linear layers), the prompts, rewards that depend on
    the tokens alone, plain sampling, AdamW, float32, threads, checkpointing. Two settings of TRL's are not its defaults:
    the KL's gradient is that of k3 itself, and rewards are not divided by their std (TRL's is the sample's, ours the
    population's). The warm-up turn gives TRL's completions to our update and compares advantages and clipped gradients.
    """
    if not importlib.util.find_spec("trl"):
        print(
            "--trl needs TRL, for this comparison only: pip install --no-deps trl accelerate; pip install datasets"
        )
        return
    og.quiet_libraries()
    import accelerate
    import transformers
    import trl

    class Turns(transformers.TrainerCallback):
        """Inside TRL's own loop: its step is timed, then one of ours."""

        def on_step_begin(self, *_, **__):
            sync()
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, _, state, *__, **___):
            if not state.global_step:
                checks.append(same_step(trainer, *ours))

        def on_step_end(self, *_, **__):
            sync()
            middle = time.perf_counter()
            our_step(*ours)
            sync()
            turns.append((middle - self.start, time.perf_counter() - middle))

    table(
        f"one step of {args.prompts} prompts, S = {S}, G = {args.generations}, {args.threads} threads, against trl "
        f"{trl.__version__}, accelerate {accelerate.__version__}",
        "T",
        "beta",
        "checkpointing",
        "TRL s",
        "ours s",
        "faster, x",
        "TRL peak GiB",
        "ours peak GiB",
        "less, x",
        "advantages differ by",
        "lowest cosine of a gradient",
    )
    for params in [
        (24, 0.0, True, True),
        (24, 0.04, True, True),
        (24, 0.0, False, True),
        (24, 0.0, True, False),
        (24, 0.04, True, False),
        (24, 0.0, False, False),
        (8, 0.0, True, False),
        (8, 0.04, True, False),
    ]:
        turns, checks, ours = [], [], our_text(args, *params)
        trainer = trl_trainer(args, *params, args.repeats + 1, [Turns()])
        trainer.train()
        a, b = map(list, zip(*turns[1:]))
        peaks = [fresh(side, *params)[2] for side in ("trl", "ours")]
        t, beta, checkpointing, ends = params
        row(
            f"1 to {t}" if ends else t,
            beta,
            checkpointing,
            a,
            b,
            over(a, b),
            *peaks,
            peaks[0] / peaks[1],
            *checks[0],
        )


def same_step(trainer, policy, optimizer, cfg, prompts) -> tuple[float, float]:
    """Our update of the completions that TRL is just learning from, on equal weights.
    -> largest difference of an advantage, lowest cosine between the two gradients of a parameter"""
    batch, mine, g = trainer._buffered_inputs[0], {}, cfg.num_generations
    theirs = {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    ids = [
        c[:n] for c, n in zip(batch["completion_ids"].tolist(), batch["completion_mask"].sum(dim=1).tolist())
    ]
    done = [og.Completion(c, sampled=[True] * len(c)) for c in ids]
    places = [
        [i for i, ids in enumerate(batch["prompt_ids"].tolist()) if ids == p.ids] for p in prompts
    ]  # it shuffles rows
    assert all(len(p) == g for p in places) and all(
        len(c) == cfg.new_tokens or c[-1] in policy.stop_ids for c in ids
    )
    groups = [
        og.Group(None, p, [done[i] for i in at], None, random_rewards([done[i].ids for i in at]))
        for p, at in zip(prompts, places)
    ]
    keep = types.SimpleNamespace(
        zero_grad=lambda set_to_none: None,
        step=lambda: mine.update({n: p.grad for n, p in policy.trainable().items()}),
    )
    og.update(policy, keep, cfg, groups, cold=False)
    assert mine.keys() == theirs.keys()
    cosine = torch.nn.functional.cosine_similarity
    advantages = (
        og.group_advantages(torch.tensor([p.rewards for p in groups]), cfg.scale).flatten().to(DEVICE)
    )
    return (
        (advantages - batch["advantages"][sum(places, [])]).abs().max().item(),
        min(
            cosine(mine[n].flatten().double(), g.flatten().double(), dim=0).item() for n, g in theirs.items()
        ),
    )


def audio_step(args, naive: bool):
    """-> (step, clips that went through the audio tower so far) on the thinker, questions with a clip each"""
    policy = random_policy(big=torch.cuda.is_available())
    cfg = og.Config(
        data="-",
        prompts_per_step=args.prompts,
        num_generations=args.generations,
        max_new_tokens=args.new_tokens,
        lora_rank=16,
        lora_alpha=16,
        optimizer="adamw",
    )
    optimizer, heard, policy.stop_ids = og.make_optimizer(policy, cfg), [], []
    model, vocab, frames = policy.model, policy.head.weight.shape[0] - 8, int(args.audio_s * 100)
    tower = next(m for name, m in model.named_modules() if name.endswith("audio_tower"))
    tower.register_forward_pre_hook(
        lambda _, __, kw: heard.extend(kw["feature_lens"].tolist()), with_kwargs=True
    )
    mels = torch.randn(args.prompts, 128, frames)
    before, after = torch.randint(vocab, (40,)).tolist(), torch.randint(vocab, (40,)).tolist()

    def ours():
        clips = policy.encode_audio(list(mels))
        our_step(
            policy,
            optimizer,
            cfg,
            [og.Tokens(before + [0] * len(clip) + after, [(40, clip)]) for clip in clips],
        )

    def repeated():
        """The loop as it is usually written, a question after the other: nothing is wrong in it, and nothing is shared."""
        for mel in mels:
            repeated_one(mel)
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def repeated_one(mel):
        g, audio_id, n = (
            args.generations,
            model.get_base_model().config.audio_token_id,
            ((frames - 1) // 2 - 1) // 2 + 1,
        )
        ids = torch.tensor([before + [audio_id] * n + after] * g, device=DEVICE)
        clip = torch.nn.functional.pad(mel, (0, 30000 - frames))[None]  # as the feature extractor gives it
        features = dict(
            input_features=clip.repeat(g, 1, 1).to(DEVICE, policy.head.weight.dtype),
            feature_attention_mask=(torch.arange(30000) < frames).long().repeat(g, 1).to(DEVICE),
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **features,
            **plain_sampling(args.new_tokens),
            suppress_tokens=list(range(vocab, vocab + 8)),
        )

        def logps():
            logits = model(
                input_ids=out, attention_mask=torch.ones_like(out), use_cache=False, **features
            ).logits
            every = logits[:, :-1].float().log_softmax(-1).gather(2, out[:, 1:, None])[:, :, 0]
            return every[:, ids.shape[1] - 1 :]

        policy.lm.train()
        with torch.no_grad(), model.disable_adapter():
            ref_logp = logps()
        logp = logps()
        rewards = random_rewards(out[:, ids.shape[1] :].tolist())
        advantage = og.group_advantages(torch.tensor([rewards]))[0][:, None].to(DEVICE)
        kl = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
        ((cfg.beta * kl - torch.exp(logp - logp.detach()) * advantage).mean() / args.prompts).backward()
        policy.lm.eval()

    if naive:
        policy.lm.set_attn_implementation("sdpa")
    return repeated if naive else ours, heard


def against_repeated(args) -> None:
    """A whole step of questions with a clip each, against the usual loop of audio GRPO, which takes one question at a time
    and accumulates the gradient: features padded to 300 s and repeated G times, the tower run for every copy in the
    rollout, the policy's pass and the reference's, G full rows, logits at every position. Equal on both sides: the thinker,
    LoRA, checkpointing, AdamW, the features before the padding."""
    (theirs, their_clips), (ours, our_clips) = audio_step(args, True), audio_step(args, False)
    table(
        f"one step of {args.prompts} clips of {args.audio_s:g} s, T = {args.new_tokens}, G = {args.generations}",
        "repeated s",
        "ours s",
        "faster, x",
        "repeated peak GiB",
        "ours peak GiB",
        "less, x",
        "repeated: clips through the tower a step",
        "ours",
    )
    a, b = by_turns(theirs, ours, repeats=args.repeats)
    peaks = [fresh("audio", naive)[2] for naive in (True, False)]
    row(
        a,
        b,
        over(a, b),
        *peaks,
        peaks[0] / peaks[1],
        *(len(c) // (args.repeats + 1) for c in (their_clips, our_clips)),
    )


def startup(args) -> None:
    """What omni_grpo.py does with --data before the model loads; the probe of the audio alone takes up to 2 s by design."""
    table("data ready", "questions", "MB of JSON lines", "s", "peak GiB", "of it before the data")
    with tempfile.TemporaryDirectory() as folder:
        soundfile.write(f"{folder}/clip.wav", np.sin(np.arange(16000) / 20), 16000)
        for n in (1_000, 10_000, 100_000, 1_000_000):
            path = f"{folder}/{n}.jsonl"
            with open(path, "w", encoding="utf-8") as f:
                for i in range(n):
                    f.write(
                        json.dumps(
                            dict(
                                id=f"q{i}",
                                audio="clip.wav",
                                question=f"What is heard at {i}?",
                                answer=i % 4,
                                choices=["a dog", "a bell", "rain", "speech"],
                            )
                        )
                        + "\n"
                    )
            seconds, before, more = fresh("startup", path)
            row(n, os.path.getsize(path) / 1e6, seconds, before + more, before)


def two_steps(step):
    return lambda: (step(), step())


NAMED = ("kind", "new_tokens", "audio_s", "prompts")  # flags that tell results of one mode apart
CHILDREN = {  # work(args, *params) -> what is measured, in a fresh process
    "trl": lambda args, *params: trl_trainer(args, *params, 2).train,
    "ours": lambda args, *params: two_steps(lambda ours=our_text(args, *params): our_step(*ours)),
    "audio": lambda args, naive: two_steps(audio_step(args, naive)[0]),
    "startup": lambda args, path: lambda: og.open_data(og.Config(data=path)),
}
MODES = dict(
    scoring=scoring,
    step=step,
    memory=memory,
    reading=reading,
    trl=against_trl,
    relisten=relistening,
    audio=against_repeated,
    startup=startup,
    eval=lambda args: sampling(args, (1, 4, 8)),
    rollout=lambda args: sampling(args, (1, 4, 8, 16)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for mode in MODES:
        parser.add_argument(f"--{mode}", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="turns behind each median")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--audio_s", type=float, default=10.0)
    parser.add_argument(
        "--again_s", type=float, default=3.0, help="seconds heard again of --relisten; Echo's mean is 3"
    )
    parser.add_argument(
        "--kind", default="wav", choices=["wav", "flac", "mp3"], help="of the clips of --reading"
    )
    parser.add_argument("--cap_gib", type=float, default=48.0, help="of --step on a GPU: more is refused")
    parser.add_argument("--nf4", action="store_true", help="--step with 4-bit base weights")
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="of torch on a CPU, 0: its own choice; more than are free make small steps crawl",
    )
    parser.add_argument(
        "--json", default="bench.json", help="where the tables go, the last of every mode and its words"
    )
    parser.add_argument("--readme", action="store_true", help="put the tables of --json into README.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.threads = args.threads or torch.get_num_threads()  # the fresh processes of some modes get it, too
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args)
    asked = [mode for mode in MODES if getattr(args, mode)]
    if not asked and not args.readme:
        parser.print_help()
    results = {}
    if os.path.exists(args.json):
        with open(args.json, encoding="utf-8") as f:
            results = json.load(f)
    for mode in asked:
        TABLES.clear()
        MODES[mode](args)
        words = [w for w in sys.argv[1:] if w.removeprefix("--") not in MODES or w == f"--{mode}"]
        name = "-".join([mode, *(str(getattr(args, x)) for x in NAMED if f"--{x}" in words)])
        results[name] = dict(
            tables=TABLES[:],
            command=" ".join(words),
            where=where(),
            cores=os.cpu_count(),
            date=time.strftime("%Y-%m-%d"),
        )
        og.write_atomically(args.json, lambda tmp: open(tmp, "w").write(json.dumps(results, indent=1)))
    if args.readme:
        write_readme(results)


if __name__ == "__main__":
    main()
