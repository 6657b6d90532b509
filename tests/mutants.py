"""Break the code on purpose and see a test die:  python tests/mutants.py

Every mutant is one replacement in one file. A mutant that survives all tests named beside it is printed, and the exit
code says so. It takes some minutes; it is not part of the test suite.
"""

import os
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MATH, MODEL, RUN, RANKS, FAMILIES, AGAIN = (
    f"tests/test_{x}.py" for x in ("math", "model", "run", "ranks", "families", "relisten")
)

MUTANTS = [  # what, old, new, the tests that must die
    ("loss sign", "return -(weight * torch.minimum(", "return (weight * torch.minimum(", MATH),
    ("min becomes max", "torch.minimum(ratio * adv", "torch.maximum(ratio * adv", MATH),
    ("no clip", "clipped = ratio.clamp(1 - clip_low, 1 + clip_high)", "clipped = ratio", MATH),
    (
        "clip bounds swapped",
        "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_high, 1 + clip_low)",
        MATH,
    ),
    ("ratio inverted", "log_ratio = logp - old_logp", "log_ratio = old_logp - logp", MATH),
    ("sample std", "unbiased=False", "unbiased=True", MATH),
    ("mean over the batch", "rewards.mean(dim=1, keepdim=True)", "rewards.mean()", MATH),
    ("always scaled", 'if scale == "std":', "if True:", MATH),
    ("no uniform mask", "return adv.masked_fill(uniform(rewards)[:, None], 0.0)", "return adv", MATH),
    ("no eps", "unbiased=False) + eps)", "unbiased=False))", MATH),
    ("row length not divided", "1 / (rows * lengths.clamp(min=1))", "torch.ones_like(lengths) / rows", MATH),
    ("k3 flipped", "d = (ref_logp.float() - logp.float())", "d = (logp.float() - ref_logp.float())", MATH),
    ("k3 by exp", "return torch.expm1(d) - d", "return torch.exp(d) - 1 - d", MATH),
    ("sequence ratio is a sum", "log_ratio = (total / count)[row]", "log_ratio = total[row]", MATH),
    ("sampler ignores the temperature", "logits.float() / (temperature or 1.0)", "logits.float()", MATH),
    (
        "sampler is off by one",
        "right=True)\n    return ids[:, 0]",
        "right=False)\n    return ids[:, 0]",
        MATH,
    ),
    (
        "scorer ignores the temperature",
        "policy.head(hidden).float() / temperature",
        "policy.head(hidden).float()",
        MODEL,
    ),
    (
        "first token predicted by itself",
        "torch.where(trained == 0, n, len(groups) + at + trained - 1)",
        "len(groups) + at + trained - 1",
        MODEL,
    ),
    ("shifted by one", "len(groups) + at + trained - 1)", "len(groups) + at + trained)", MODEL),
    (
        "forced tokens trained",
        "torch.tensor(completion.sampled, dtype=torch.bool)",
        "torch.ones(len(completion.ids), dtype=torch.bool)",
        MODEL,
    ),
    (
        "completions see each other",
        "own = (owner[:, None] == owner[None, :]) &",
        "own = (owner[:, None] >= -1) &",
        MODEL,
    ),
    (
        "completions see later tokens",
        "& (order[:, None] >= order[None, :])",
        "& (order[:, None] >= -1)",
        MODEL,
    ),
    (
        "positions run on",
        "torch.arange(size, size + fed)",
        "torch.arange(size + at - start, size + at - start + fed)",
        MODEL,
    ),
    ("audio rows swapped", "return list(flat.split(sizes))", "return list(flat.split(sizes))[::-1]", MODEL),
    ("audio left out of scoring", "x[at + start:at + start + len(audio)] = audio.to(x.dtype)", "pass", MODEL),
    (
        "sampled placeholder swallowed",
        "x, at = F.embedding(",
        "ids = ids.masked_fill(ids == policy.audio_id, 0); x, at = F.embedding(",
        MODEL,
    ),
    (
        "end of turn dropped",
        "            taken.append((rows[r], place, len(rows[r].ids)))",
        "            if token in policy.stop_ids:\n                rows[r].finished = True\n                continue\n"
        "            taken.append((rows[r], place, len(rows[r].ids)))",
        MODEL,
    ),
    ("repeats count once", "weight[first] * times, times", "weight[first], times", MODEL),
    (
        "repeats of another reward merged",
        "key = (*completion.ids, adv[r].item(), ",
        "key = (*completion.ids, ",
        MODEL,
    ),
    (
        "rows shifted when others leave",
        "u[keep], position[keep], going",
        "u[keep], position[keep], at[:len(live)]",
        MODEL,
    ),
    (
        "loss per pack",
        "a, w = adv[pack.row], weight[pack.row]",
        "a, w = adv[pack.row], weight[pack.row] / weight[pack.row].sum()",
        MODEL,
    ),
    ("KL without weight", "(w * kl_k3(logp, ref_logp)).sum()", "kl_k3(logp, ref_logp).mean()", MODEL),
    ("reference is the policy", "with policy.model.disable_adapter():", "if True:", MODEL),
    ("old policy refreshed", "if old_logps[j] is None:", "if True:", MODEL),
    (
        "LoRA everywhere",
        r"pattern = rf\"{re.escape(lm_path)}\..*\b(".replace('\\"', '"'),
        r'pattern = rf".*\b(',
        MODEL,
    ),
    (
        "padding seen in decoding",
        "(slot < sizes[:, None])[:, None].repeat(1, g, 1)",
        "(slot < longest).repeat(len(spots), g, 1)",
        MODEL,
    ),
    (
        "rows of a prompt see each other",
        "self.mask[line[:, None], every, self.starts[:, None] + every] = True",
        "self.mask[line[:, None, None], every[:, None], self.starts[:, None, None] + every] = True",
        MODEL,
    ),
    ("step writes over the last", "end + self.g for end in", "end for end in", MODEL),
    (
        "wrong row leaves",
        "self.place = line * self.g + self.place % self.g",
        "self.place = line * self.g",
        MODEL,
    ),
    (
        "prefix without its gradient",
        "            prefix.backward(leaves[key])\n        if anything",
        "            pass\n        if anything",
        MODEL,
    ),
    ("old weights' prefix used again", "if p.prefix and nth == 0}", "if p.prefix}", MODEL),
    (
        "prompts of a prefix swapped",
        "hidden = prefix.ends[list(pack.places)]",
        "hidden = prefix.ends[list(pack.places)[::-1]]",
        MODEL,
    ),
    (
        "weights of one rank's tokens",
        "lengths = gather([sum(c.sampled) for c in completions])",
        "lengths = [[sum(c.sampled) for c in completions]] * ranks()[1]",
        RANKS,
    ),
    ("gradients not summed", "torch.distributed.all_reduce(flat)", "pass", RANKS),
    (
        "u shared by tokens",
        "sample(logits, u[:, nth], temperature)",
        "sample(logits, u[:, 0], temperature)",
        MODEL,
    ),
    ("non-finite step taken", "if math.isfinite(norms[-1]):", "if True:", MODEL),
    ("order forgets the seed", "random.Random(seed_of(cfg.seed, phase, epoch))", "random.Random()", RUN),
    ("log not cut on resume", '<= content["state"]["step"]]', "<= 10**9]", RUN),
    ("optimizer not restored", 'optimizer.load_state_dict(content["optimizer"])', "pass", RUN),
    (
        "cursor not restored",
        'state |= {"step": step, phase: gather(batch[-1][0] + n_ranks)}',
        'state |= {"step": step}',
        RUN,
    ),
    ("checkpoint written in place", '    tmp = path + ".tmp"\n', "    tmp = path\n", RUN),
    ("frames past a clip's end dropped", "frames_after=2)", "frames_after=0)", FAMILIES),
    (
        "Qwen2-Audio attends to what is behind the clip",
        "window // 2) >= inner",
        "window // 2) >= window + inner",
        FAMILIES,
    ),
    ("what was inserted is trained", "self.sampled += [False] *", "self.sampled += [True] *", AGAIN),
    ("another part is heard again", "[round(start * data.RATE_HZ):", "[round(0 * data.RATE_HZ):", AGAIN),
    ("a block looks ahead", "self.mask.new_ones(n, n).tril()", "self.mask.new_ones(n, n)", AGAIN),
    (
        "a block takes no positions",
        "torch.tensor(sizes, device=device))\n",
        "torch.tensor(sizes, device=device) * 0)\n",
        AGAIN,
    ),
    ("no end of parts", "len(row.heard) >= cfg.relistens", "False", AGAIN),
    ("parts are heard in the answer", '"not thinking": over', '"not thinking": False', AGAIN),
]


def main() -> int:
    with open(os.path.join(ROOT, "omni_grpo.py"), encoding="utf-8") as f:
        source = f.read()
    wanted, survivors = sys.argv[1:], []
    for what, old, new, tests in MUTANTS:
        if wanted and what not in wanted:
            continue
        if source.count(old) != 1:
            survivors.append(f"{what}: its text stands {source.count(old)} times in omni_grpo.py")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for name in ("data.py", "reward.py", "tests"):
                path = os.path.join(ROOT, name)
                (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, os.path.join(folder, name))
            with open(os.path.join(folder, "omni_grpo.py"), "w", encoding="utf-8") as f:
                f.write(source.replace(old, new))
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        died = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print(
            f"{'died' if died else 'SURVIVED'}: {what}"
            + (f" ({died[0].split(' - ')[0].split('::')[-1]})" if died else ""),
            flush=True,
        )
        if not died:
            survivors.append(what)
    print(f"{len(survivors)} survived" + "".join(f"\n  {s}" for s in survivors))
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
