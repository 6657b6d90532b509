"""Break the code on purpose and see a test die:  python tests/mutants.py [NAME ...]

Every mutant is one replacement in one of the scripts. A mutant that survives the tests named beside it is printed,
and the exit code says so. It takes a quarter of an hour; it is not part of the test suite.
"""

import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = (
    "omni_grpo.py",
    "model.py",
    "data.py",
    *(f"tools/{x}.py" for x in "export ask card served trackers".split()),
)
MATH, MODEL, PLAIN, RUN, RANKS, FAMILIES, AGAIN, INPUTS, TROUBLE, DATA, CHECKPOINT, OBJECTIVES = (
    f"tests/test_{x}.py"
    for x in "math model plain run ranks families relisten inputs trouble data checkpoint objectives".split()
)

MUTANTS = [  # what, old, new, the tests that must die
    # ---- the mathematics
    ("loss sign", "return -(weight * torch.minimum(", "return (weight * torch.minimum(", MATH),
    ("min becomes max", "torch.minimum(ratio * adv", "torch.maximum(ratio * adv", MATH),
    ("no clip", "clipped = ratio.clamp(1 - clip_low, 1 + clip_high)", "clipped = ratio", MATH),
    ("clip bounds swapped", "ratio.clamp(1 - clip_low, 1 + ", "ratio.clamp(1 - clip_high, 1 + ", MATH),
    ("ratio inverted", "log_ratio = logp - old_logp", "log_ratio = old_logp - logp", MATH),
    ("sample std", "keepdim=True, unbiased=False", "keepdim=True, unbiased=True", MATH),
    ("mean over the batch", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()", MATH),
    ("always scaled", 'if scale == "std":', "if True:", MATH),
    ("no uniform mask", "return adv.masked_fill(uniform[:, None], 0.0)", "return adv", MATH),
    ("no eps", "unbiased=False) + eps)", "unbiased=False))", MATH),
    ("row length not divided", "1 / (rows * lengths.clamp(min=1))", "torch.ones_like(lengths) / rows", MATH),
    ("k3 flipped", "(ref_logp.float() - logp.float())", "(logp.float() - ref_logp.float())", MATH),
    ("k3 by exp", "return torch.expm1(d) - d", "return torch.exp(d) - 1 - d", MATH),
    ("sequence ratio is a sum", "log_ratio = (total / count)[row]", "log_ratio = total[row]", MATH),
    ("KL rewarded", "loss = loss + cfg.beta", "loss = loss - cfg.beta", MATH),
    ("KL without weight", "(weight * kl_k3(logp, ref_logp)).sum()", "kl_k3(logp, ref_logp).mean()", PLAIN),
    ("sampler ignores the temperature", "logits.float() / (temperature or 1.0)", "logits.float()", MATH),
    (
        "sampler is off by one",
        "cdf[:, -1:], right=True)",
        "cdf[:, -1:], right=False)",
        MATH,
    ),
    # ---- scoring
    ("scorer ignores the temperature", "head(hidden).float() / temperature", "head(hidden).float()", MODEL),
    ("first token predicted by itself", "torch.where(trained == 0, i, before)", "before", MODEL),
    ("shifted by one", "len(prompts) + n + trained - 1", "len(prompts) + n + trained", MODEL),
    (
        "forced tokens trained",
        "torch.tensor(completion.sampled, dtype=torch.bool)",
        "torch.ones(len(completion.ids), dtype=torch.bool)",
        MODEL,
    ),
    ("completions see each other", "same = owner[:, None] == owner", "same = owner[:, None] >= owner", MODEL),
    ("completions see later tokens", "[sees_prompt, same.tril()]", "[sees_prompt, same]", MODEL),
    (
        "positions run on",
        "torch.arange(size, size + fed)",
        "torch.arange(size, size + fed) + n - start",
        MODEL,
    ),
    ("audio rows swapped", "_state.split(sizes))\n", "_state.split(sizes))[::-1]\n", MODEL),
    (
        "audio left out of scoring",
        "x[offset + start : offset + start + len(audio)] = audio.to(x.dtype)",
        "pass",
        MODEL,
    ),
    (
        "sampled placeholder swallowed",
        "x = F.embedding(ids, policy.embed_tokens.weight)  # not",
        "x = F.embedding(ids.masked_fill(ids == policy.audio_id, 0), policy.embed_tokens.weight)  # not",
        MODEL,
    ),
    (
        "end of turn dropped",
        "rows[r].append(token, logp)",
        "token in policy.stop_ids or rows[r].append(token, logp)",
        MODEL,
    ),
    ("repeats count once", "weight[first] * copies, copies", "weight[first], copies", MODEL),
    (
        "repeats of another reward merged",
        "key = (*completion.ids, adv)",
        "key = tuple(completion.ids)",
        MODEL,
    ),
    (
        "loss per pack",
        "batch.weight[pack.row]\n",
        "batch.weight[pack.row] / batch.weight[pack.row].sum()\n",
        MODEL,
    ),
    ("reference is the policy", "with policy.model.disable_adapter():", "if True:", MODEL),
    ("old policy refreshed", "if batch.old_logps[i] is None:", "if True:", MODEL),
    ("LoRA everywhere", 'pattern = rf"{BEFORE_LAYERS}', 'pattern = rf".*', MODEL),
    ("prefix without its gradient", "        prefix.backward(copies[key])", "        pass", MODEL),
    ("old weights' prefix used again", "through_rollout=nth == 0)", "through_rollout=True)", MODEL),
    ("prompts of a prefix swapped", "prefix.last[list(places)]", "prefix.last[list(places)[::-1]]", MODEL),
    ("non-finite step taken", "if math.isfinite(norms[-1]):", "if True:", MODEL),
    (
        "teacher's turn never ends",
        "for token in [*ids, policy.tokenizer.eos_token_id]:",
        "for token in ids:",
        MODEL,
    ),
    # ---- decoding
    (
        "rows shifted when others leave",
        "batch, ids, u = going, ids[live], u[live]",
        "batch, ids = going, ids[live]",
        MODEL,
    ),
    ("u shared by tokens", "u[:, step], temperature)", "u[:, 0], temperature)", MODEL),
    (
        "padding seen in decoding",
        "(slot < sizes[:, None])[:, None].repeat(1, g, 1)",
        "(slot < longest).repeat(len(sources), g, 1)",
        MODEL,
    ),
    (
        "rows of a prompt see each other",
        "self.mask[line[:, None], row, self.starts[:, None] + row] = True",
        "self.mask[line[:, None, None], row[:, None], self.starts[:, None, None] + row] = True",
        MODEL,
    ),
    ("step writes over the last", "[end + g for end in self.filled]", "[end for end in self.filled]", MODEL),
    (
        "wrong row leaves",
        "lines.index(number // self.g) * self.g + number % self.g",
        "lines.index(number // self.g) * self.g",
        MODEL,
    ),
    # ---- the run
    (
        "weights of one rank's tokens",
        "lengths = gather(learned)",
        "lengths = [learned] * ranks()[1]",
        RANKS,
    ),
    ("gradients not summed", "torch.distributed.all_reduce(flat)", "pass", RANKS),
    ("order forgets the seed", "random.Random(seed_of(cfg.seed, phase, epoch))", "random.Random()", RUN),
    ("log not cut on resume", '["step"] <= step]', '["step"] <= 10**9]', RUN),
    ("optimizer not restored", 'optimizer.load_state_dict(content["optimizer"])', "pass", RUN),
    ("cursor not restored", "phase: gather(drawn[-1].cursor + ranks()[1])}", "}", RUN),
    (
        "checkpoint written in place",
        "        write(part)\n",
        "        write(path)\n        write(part)\n",
        RUN,
    ),
    ("a stopped evaluation counts", '    if right.pop("stopped"):\n', "    if False:\n", TROUBLE),
    ("evaluated before it is saved", '"record": record, phase', '"record": None, phase', TROUBLE),
    ("other data on --resume", "        if now != before:\n", "        if False:\n", TROUBLE),
    ("a directory for two", "if not lock(opened):", "if False:", TROUBLE),
    ("a bad clip counts every time", "bad[str(example.clips)] = heard", "bad[drawn] = heard", TROUBLE),
    ("NaN in the log", "return None if isinstance(x, float)", "return x if isinstance(x, float)", TROUBLE),
    ("any adapter fits", "        if unplaced or missing:\n", "        if False:\n", TROUBLE),
    ("LoRA on the tower", "config.target_modules = lora_pattern(", "lora_pattern(", TROUBLE),
    # ---- what comes out
    ("merged twice as strong", 'scaling * lora["lora_B"]', '2 * scaling * lora["lora_B"]', CHECKPOINT),
    ("vLLM serves the base", 'vllm="thinker.model"', 'vllm="thinker.model.language_model"', CHECKPOINT),
    ("a part is not merged", "    if pairs:\n        raise", "    if False:\n        raise", CHECKPOINT),
    ("a part has no door", "    if modules - places:\n", "    if False:\n", CHECKPOINT),
    ("a long choice is as probable", "logps.sum().exp()", "logps.mean().exp()", "tests/test_ask.py"),
    (
        "a card without its flags",
        'words.append(f"--{name} {shlex',
        '(f"--{name} {shlex',
        "tests/test_card.py",
    ),
    ("silence is served aloud", "wave[:] = 0", "pass", "tests/test_served.py"),
    # ---- objectives
    ("CISPO's sign", "return -(weight * capped * adv", "return (weight * capped * adv", OBJECTIVES),
    (
        "CISPO through its cap",
        "capped = ratio.detach().clamp(max=1 + clip_high)",
        "capped = ratio",
        OBJECTIVES,
    ),
    (
        "SAPO's sign",
        "return -(weight * adv * torch.sigmoid",
        "return (weight * adv * torch.sigmoid",
        OBJECTIVES,
    ),
    (
        "SAPO's temperatures swapped",
        "torch.where(adv > 0, 1.0, 1.05)",
        "torch.where(adv < 0, 1.0, 1.05)",
        OBJECTIVES,
    ),
    ("leave none out", "rewards.shape[1] / (rewards.shape[1] - 1)", "1", OBJECTIVES),
    (
        "each group's own step",
        "every = torch.tensor(sum(gather(sum(rewards, [])), []))",
        "every = torch.tensor(rewards[0])",
        OBJECTIVES,
    ),
    ("GDPO without weights", "adv += weight * advantages_of", "adv += advantages_of", OBJECTIVES),
    (
        "GDPO unwhitened",
        "adv = adv / (every.std(unbiased=False) + 1e-4)",
        "pass",
        OBJECTIVES,
    ),
    ("cut completions learned", "* (c.finished or not cfg.mask_truncated)", "* 1", OBJECTIVES),
    ("parts measured to themselves", "    if cfg.minibatches > 1:\n", "    if False:\n", OBJECTIVES),
    ("always the first part", "made[nth % cfg.minibatches]", "made[0]", OBJECTIVES),
    # ---- living with runs
    ("any is the best", 'measured[state["step"]] < max(measured.values())', "False", "tests/test_living.py"),
    (
        "the best is forgotten",
        "    keep_best(policy, optimizer, cfg, out, state)  # at step 0",
        "    pass  # at step 0",
        "tests/test_living.py",
    ),
    ("auto starts again", 'if not can_go_on(given["out"]):', "if True:", "tests/test_living.py"),
    ("sent twice", 'if record["step"] > after:', "if True:", "tests/test_trackers.py"),
    # ---- data
    ("labels stay", "return labels, texts\n    return [], choices", "return [], choices", INPUTS),
    ("choices of any kind", 'return [f"{topic} {kind}" for topic in topics] + [kind]', 'return [""]', INPUTS),
    (
        "splits are merged",
        "        if splits:\n            one",
        "        if False:\n            one",
        INPUTS,
    ),
    ("a tag without a clip", "and tags != len(clips)", "and False", "tests/test_formats.py"),
    ("held out by absolute path", "key = os.path.relpath(key, folder)", "pass", DATA),
    # ---- families, re-listening
    ("frames past a clip's end dropped", "frames_after=2", "frames_after=0", FAMILIES),
    (
        "tower attends to what is behind the clip",
        "window // 2) >= inner",
        "window // 2) >= window + inner",
        FAMILIES,
    ),
    ("what was inserted is trained", "self.sampled += [False] *", "self.sampled += [True] *", AGAIN),
    (
        "another part is heard again",
        "samples[round(start * data.RATE_HZ) :",
        "samples[round(0 * data.RATE_HZ) :",
        AGAIN,
    ),
    ("a block looks ahead", "new_ones(size, size).tril()", "new_ones(size, size)", AGAIN),
    ("a block takes no positions", "self.position[row] += n", "self.position[row] += 0", AGAIN),
    ("no end of parts", "len(row.heard) >= self.most", "False", AGAIN),
    ("parts are heard in the answer", '"not thinking": over', '"not thinking": False', AGAIN),
]


def read_scripts() -> dict[str, str]:
    scripts = {}
    for name in SCRIPTS:
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            scripts[name] = f.read()
    return scripts


def places_of(old: str, scripts: dict[str, str]) -> list[str]:
    """The scripts in which the text stands, once for each time."""
    return [name for name, source in scripts.items() for _ in range(source.count(old))]


def run_mutant(name: str, source: str, tests: str) -> str:
    """-> the first test that died, or "" """
    with tempfile.TemporaryDirectory() as folder:
        for part in (
            "omni_grpo.py",
            "model.py",
            "data.py",
            "reward.py",
            "eval.py",
            "README.md",
            "docs",
            "tools",
            "tests",
        ):
            path = os.path.join(ROOT, part)
            if os.path.exists(path):
                (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, os.path.join(folder, part))
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(source)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    died = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return died[0].split(" - ")[0].split("::")[-1] if died else ""


def main() -> int:
    scripts, wanted, survivors = read_scripts(), sys.argv[1:], []
    for what, old, new, tests in MUTANTS:
        if wanted and what not in wanted:
            continue
        places = places_of(old, scripts)
        if len(places) != 1:
            survivors.append(f"{what}: its text stands {len(places)} times in {' and '.join(SCRIPTS)}")
            continue
        died = run_mutant(places[0], scripts[places[0]].replace(old, new), tests)
        print(f"died: {what} ({died})" if died else f"SURVIVED: {what}", flush=True)
        if not died:
            survivors.append(what)
    print(f"{len(survivors)} survived", *survivors, sep="\n  ")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
