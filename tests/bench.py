"""Speed and memory, measured. No weights are needed: random ones, at 7B size on a GPU, small on a CPU.

    python tests/bench.py --scoring      prefix-shared against repeated scoring, forward and backward, and the bound
    python tests/bench.py --step         a whole training step: seconds by part, peak memory (CUDA: 7B under a 48 GiB cap)

Ratios come from one run on one machine, the two sides taking turns; times are medians.
"""

import argparse
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import omni_grpo as og  # noqa: E402

SMALL = dict(vocab_size=2048, hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=6,
             num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[8, 12, 12]))
SMALL_AUDIO = dict(d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, output_dim=384)
VISION = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2)


def random_policy(big: bool, rank: int = 16) -> og.Policy:
    """Qwen2.5-Omni's thinker with random weights and LoRA: at its published 7B size (the library's defaults), or small."""
    import transformers

    og.quiet_libraries()
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config=dict(tie_word_embeddings=False) if big else SMALL, audio_config={} if big else SMALL_AUDIO,
        vision_config=VISION | dict(out_hidden_size=3584 if big else 384))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scoring", action="store_true")
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--repeats", type=int, default=3, help="turns behind each median")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--audio_s", type=float, default=10.0)
    parser.add_argument("--cap_gib", type=float, default=48.0)
    args = parser.parse_args()
    if args.scoring:
        scoring(args.repeats)
    if args.step:
        step(args)
    if not (args.scoring or args.step):
        parser.print_help()


if __name__ == "__main__":
    main()
