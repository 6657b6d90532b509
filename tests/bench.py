"""Speed and memory, measured. No weights are needed: random ones, at 7B size on a GPU, small on a CPU.

    python tests/bench.py --scoring      prefix-shared against repeated scoring, forward and backward, and the bound
    python tests/bench.py --step         a whole training step: seconds by part, peak memory (CUDA: 7B under a 48 GiB cap)
    python tests/bench.py --reading      training steps of the demo's base with 30 s clips on disk, against clips in memory
    python tests/bench.py --eval         k sampled answers a question, against the library's generate

Ratios come from one run on one machine, the two sides taking turns; times are medians.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import islice

import numpy as np
import soundfile
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402
import omni_grpo as og  # noqa: E402

SMALL = dict(vocab_size=2048, hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=6,
             num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 12, 12]))
SMALL_AUDIO = dict(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, output_dim=384)
TOKENS = ("audio", "image", "video", "audio_start", "audio_end", "vision_start", "vision_end")
VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)


def random_policy(big: bool, rank: int = 16) -> og.Policy:
    """Qwen2.5-Omni's thinker with random weights and LoRA: at its published 7B size (the library's defaults), or small."""
    import transformers

    og.quiet_libraries()
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=dict(tie_word_embeddings=False) if big else SMALL, audio_config={} if big else SMALL_AUDIO,
        vision_config=VISION | dict(out_hidden_size=3584 if big else 384),
        **({} if big else {f"{name}_token_id": 2047 - i for i, name in enumerate(TOKENS)}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if big else torch.float32)
    with torch.device(device):
        model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    return og.take_apart(og.Config(lora_rank=rank, lora_alpha=rank), model, og.OMNI)


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def by_turns(*functions, repeats: int) -> list[float]:
    """Median seconds of each function, A B A B ..., after one warm-up turn."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for f, seconds in zip(functions, times):
            sync()
            start = time.perf_counter()
            f()
            sync()
            if turn:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def where() -> str:
    about = og.machine()
    return f"{about['hardware']}, torch {about['torch']}, transformers {about['transformers']}"


def scoring(repeats: int) -> None:
    """Forward and backward over one group: G full rows as one batch, against the packed row. The heads see the same tokens."""
    policy = random_policy(big=torch.cuda.is_available())
    vocab = policy.head.weight.shape[0]
    print(f"scoring, forward and backward, {where()}\n")
    print("| S | T | G | repeated s | shared s | faster | bound | of the bound |\n|---|---|---|---|---|---|---|---|")
    policy.lm.train()
    for s in (330, 600, 830):
        for t in (8, 30, 100):
            for g in (4, 8, 16):
                prompt = og.Tokens(torch.randint(vocab, (s,)).tolist())
                ids = [torch.randint(vocab, (t,)).tolist() for _ in range(g)]
                done = [og.Completion(i, sampled=[True] * t) for i in ids]
                shared = og.make_pack([og.Group(None, prompt, done)], [0], policy.device)
                rows = torch.tensor([prompt.ids + i for i in ids], device=policy.device)  # (G, S + T)

                def run_shared(pack=shared):
                    og.token_logps(policy, pack, 1.0)[0].sum().backward()

                def run_repeated(rows=rows, s=s):
                    x = torch.nn.functional.embedding(rows, policy.embed_tokens.weight)
                    hidden = policy.lm(inputs_embeds=x, use_cache=False).last_hidden_state[:, s - 1:-1]
                    logps = policy.head(hidden).float().log_softmax(-1)
                    logps.gather(2, rows[:, s:, None]).sum().backward()

                a, b = by_turns(run_repeated, run_shared, repeats=repeats)
                bound = g * (s + t) / (s + g * t)
                print(f"| {s} | {t} | {g} | {a:.3f} | {b:.3f} | {a / b:.2f} x | {bound:.2f} x | {a / b / bound:.2f} |",
                      flush=True)


def step(args) -> None:
    """Whole steps on random weights, clips and rewards: nothing is learned, everything is computed."""
    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    policy = random_policy(big=cuda, rank=32)
    cfg = og.Config(prompts_per_step=args.prompts, num_generations=args.generations, max_new_tokens=args.new_tokens, data="-")
    optimizer = og.make_optimizer(policy, cfg)
    vocab, frames = policy.head.weight.shape[0], int(args.audio_s * 100)
    print(f"{args.steps} steps of {args.prompts} prompts x {args.generations} completions x {args.new_tokens} tokens, "
          f"{args.audio_s:g} s clips, LoRA rank 32, {where()}, cap {args.cap_gib:g} GiB", flush=True)
    seconds = []
    for n in range(args.steps):
        sync()
        start = time.perf_counter()
        audio = policy.encode_audio([torch.randn(128, frames) for _ in range(args.prompts)])
        prompts = [og.Tokens(torch.randint(vocab, (40,)).tolist() + [0] * len(a) + torch.randint(vocab, (40,)).tolist(),
                             [(40, a)]) for a in audio]
        sync()
        heard = time.perf_counter()
        at_once = max(1, cfg.rollout_rows // args.generations)
        done = []
        for i in range(0, len(prompts), at_once):
            part = prompts[i:i + at_once]
            done += og.rollout(policy, part, args.generations, 1.0, args.new_tokens, list(range(i, i + len(part))))
        sync()
        rolled = time.perf_counter()
        groups = [og.Group(None, p, c, torch.rand(args.generations).round().tolist()) for p, c in zip(prompts, done)]
        og.update(policy, optimizer, cfg, groups, cold=False)
        sync()
        end = time.perf_counter()
        seconds.append((heard - start, rolled - heard, end - rolled, end - start))
        peak = og.peak_memory_gib()
        print(f"step {n}: {end - start:.2f} s, peak {peak:.2f} GiB", flush=True)
    tower, rollout, update, whole = (statistics.median(x) for x in zip(*(seconds[1:] or seconds)))
    print(f"median step {whole:.2f} s = tower {tower:.2f} + rollout {rollout:.2f} + update {update:.2f}; peak {peak:.2f} GiB")


def reading(args) -> None:
    """Steps on recordings (44.1 kHz stereo) read ahead by worker threads, against the same clips decoded beforehand."""
    cfg, _ = og.parse_config(["--prompts_per_step", str(args.prompts), "--num_generations", str(args.generations)])
    og.make_demo()
    with tempfile.TemporaryDirectory() as folder:
        rng, n = np.random.default_rng(0), 4 * args.prompts
        for i in range(n):
            wave = np.cumsum(rng.standard_normal((int(args.audio_s * 44100), 2)), axis=0)
            soundfile.write(f"{folder}/{i}.{args.kind}", wave / np.abs(wave).max(), 44100)
        with open(f"{folder}/clips.jsonl", "w", encoding="utf-8") as f:
            for i in range(n):
                row = dict(audio=f"{i}.{args.kind}", question="What is this?", choices=["hum", "hiss"], answer=i % 2)
                f.write(json.dumps(row) + "\n")
        examples = data.Examples(f"{folder}/clips.jsonl")
        start = time.perf_counter()
        memory = {e.audio: data.load_audio(e.audio, cfg.max_audio_s) for e in examples}
        print(f"{args.audio_s:g} s {args.kind}, {args.prompts} prompts x {args.generations} completions, {where()}; "
              f"one thread decodes a clip in {(time.perf_counter() - start) / n * 1000:.0f} ms", flush=True)
        policy = og.load_policy(cfg)
        optimizer, disk = og.make_optimizer(policy, cfg), data.load_audio
        seconds = {"disk": [], "memory": []}
        for turn in range(2 * args.repeats):
            name = ("disk", "memory")[turn % 2]
            data.load_audio = disk if name == "disk" else lambda clip, max_s: (memory[clip][0].copy(), memory[clip][1])
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
    a, b = (statistics.median(seconds[name]) for name in ("disk", "memory"))
    print(f"median step {a:.3f} s from disk, {b:.3f} s from memory: {a / b:.3f} x")


def evaluation(args) -> None:
    """k answers to each question, as eval.py asks for them, against the library's generate(num_return_sequences=k)."""
    policy = random_policy(big=torch.cuda.is_available())
    policy.stop_ids, vocab, frames = [], policy.head.weight.shape[0] - 8, int(args.audio_s * 100)
    audio_id, model = policy.model.get_base_model().config.audio_token_id, policy.model.get_base_model()
    print(f"{args.new_tokens} tokens, {args.audio_s:g} s clips, {args.prompts} questions, {where()}\n\n"
          "| k | generate s | ours s | faster |\n|---|---|---|---|")
    mels = [torch.randn(128, frames) for _ in range(args.prompts)]
    sizes = [len(a) for a in policy.encode_audio(mels)]
    before, after = torch.randint(vocab, (40,)).tolist(), torch.randint(vocab, (40,)).tolist()
    ids = torch.tensor([before + [audio_id] * n + after for n in sizes], device=policy.device)
    features = dict(input_features=torch.stack(mels).to(policy.device, model.dtype),
                    feature_attention_mask=torch.ones(args.prompts, frames, dtype=torch.long, device=policy.device))
    for k in (1, 4, 8):
        def theirs(k=k):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                           num_return_sequences=k, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens,
                           pad_token_id=0, **features)

        def ours(k=k):
            prompts = [og.Tokens(before + [audio_id] * len(a) + after, [(40, a)]) for a in policy.encode_audio(mels)]
            og.rollout(policy, prompts, k, 1.0, args.new_tokens, list(range(len(prompts))))

        a, b = by_turns(theirs, ours, repeats=args.repeats)
        print(f"| {k} | {a:.2f} | {b:.2f} | {a / b:.2f} x |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scoring", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--reading", action="store_true")
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="turns behind each median")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--audio_s", type=float, default=10.0)
    parser.add_argument("--kind", default="wav", choices=["wav", "flac", "mp3"], help="of the clips of --reading")
    parser.add_argument("--cap_gib", type=float, default=48.0)
    args = parser.parse_args()
    if args.scoring:
        scoring(args.repeats)
    if args.step:
        step(args)
    if args.reading:
        reading(args)
    if args.eval:
        evaluation(args)
    if not (args.scoring or args.step or args.reading or args.eval):
        parser.print_help()


if __name__ == "__main__":
    main()
