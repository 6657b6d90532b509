"""Will it fit? One step of training, played through on torch's meta device, where tensors have sizes and no
content.

    python -m tools.fits --model Qwen/Qwen2.5-Omni-7B --gib 48

prints what the run needs, by part, and the flags that would make it fit if it does not. It takes the
trainer's flags, and the trainer prints the same before it loads a model onto a card. The forecast follows the
code because it is the code: reading, decoding and backward are the trainer's own functions.
"""

import dataclasses
import sys
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
from data import UserError
from model import (
    RELISTEN_TOKENS,
    Completion,
    Decoder,
    Family,
    Policy,
    Prompt,
    Tokens,
    blame,
    choose_dtype,
    find_model,
    read_family,
    read_prompts,
    take_apart,
)
from omni_grpo import Config, Group, backward, make_batch, sample_tokens


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made in this context that are still alive, and the most there were at a
    time.

    before: tensors that are there already, and count as nothing.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.before = [x.untyped_storage() for x in before]
        self.sizes, self.now, self.peak = {id(storage): 0 for storage in self.before}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self.count(x.untyped_storage())
        return out

    def count(self, storage) -> None:
        if id(storage) in self.sizes:
            return
        self.sizes[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, id(storage))

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def forecast(cfg: Config, config, family: Family, prompt_tokens: int, dtype=None) -> dict[str, float]:
    """GiB of a step whose prompts all have prompt_tokens tokens and whose completions never end early.

    dtype: of the base's weights; None: that of --dtype on a card. -> weights (the base, LoRA, the optimizer's
    state), rollout and update (their peaks, weights included). Kernels' own workspaces are not in it, nor is
    the audio tower, which needs less than the update.
    """
    dtype = dtype or choose_dtype(cfg.dtype, config, not cfg.lora_rank, cuda=True)
    policy = make_meta_policy(cfg, config, family, dtype)
    base = [*policy.model.parameters(), *policy.model.buffers()]
    weights = weight_bytes(policy, cfg, dtype)
    relistened = RELISTEN_TOKENS if cfg.relistens and family.encode_audio else 0
    peaks = {}
    with LiveBytes(base) as live:
        groups = []
        at_once = max(1, cfg.rollout_rows // cfg.num_generations)
        while len(groups) < cfg.prompts_per_step:
            n = min(at_once, cfg.prompts_per_step - len(groups))
            groups += imagine_rollout(policy, cfg, n, prompt_tokens, relistened)
        peaks["rollout"], live.peak = live.peak, live.now
        batch, _ = make_batch(policy, cfg, groups)
        backward(policy, cfg, batch, through_rollout=True)
        peaks["update"] = live.peak
    return {"weights": weights / 2**30} | {name: (weights + x) / 2**30 for name, x in peaks.items()}


def make_meta_policy(cfg: Config, config, family: Family, dtype) -> Policy:
    import transformers

    model_class = getattr(transformers, family.model_class)
    with torch.device("meta"):
        model = getattr(model_class, "from_config", model_class)(config).to(dtype)
    return take_apart(
        model,
        family,
        lora_rank=cfg.lora_rank,
        gradient_checkpointing=cfg.gradient_checkpointing,
        train=True,
    )


def weight_bytes(policy: Policy, cfg: Config, dtype) -> float:
    parameters = {id(p): p for p in [*policy.model.parameters(), *policy.model.buffers()]}
    size = sum(p.numel() * p.element_size() for p in parameters.values())
    trained = sum(p.numel() for p in policy.trainable().values())
    size += trained * (2 if cfg.optimizer == "adamw8bit" else 8)  # the optimizer's two moments
    # half a byte a weight and a float32 scale for 64 of them; one matrix at a time as it was
    if cfg.load_in_4bit:
        linear = []
        for name, module in policy.lm.named_modules():
            if isinstance(module, torch.nn.Linear) and "lora_" not in name:
                linear.append(module.weight.numel())
        size += max(linear) * dtype.itemsize - sum(linear) * (dtype.itemsize - 0.5 - 4 / 64)
    return size


def imagine_rollout(policy: Policy, cfg: Config, n: int, prompt_tokens: int, relistened: int) -> list[Group]:
    """n prompts read, one step of decoding with room for all others, and completions of full length.

    Of re-listening, the most that is likely at a time: all completions of one prompt hear their parts in this
    step.
    """
    g, new = cfg.num_generations, cfg.new_tokens
    prompts = [Prompt([0] * prompt_tokens) for _ in range(n)]
    prefixes = read_prompts(policy, prompts, cfg.pack_tokens)
    with torch.no_grad():
        decoder = Decoder(policy, prefixes, g, new + relistened)
        ids = torch.zeros(n * g, dtype=torch.long, device=policy.device)
        inserted = {row: Tokens([0] * relistened) for row in range(g)} if relistened else {}
        logits = decoder.step(ids, inserted)
        sample_tokens(logits, logits[:, 0].float(), cfg.temperature)
    for prefix in prefixes:
        for i, prompt in enumerate(prefix.prompts):
            prompt.read = prefix, i
    sampled = [False] * relistened + [True] * new
    groups = []
    for prompt in prompts:
        # none is a repeat
        completions = [Completion([i] * len(sampled), sampled=list(sampled)) for i in range(g)]
        groups.append(Group(None, prompt, completions, advantages=[1.0] * g))
    return groups


SMALLER = [  # by harmlessness
    ("pack_tokens", 4096),
    ("pack_tokens", 2048),
    ("rollout_rows", 64),
    ("load_in_4bit", True),
    ("gradient_checkpointing", True),
    ("max_audio_s", 10.0),
    ("num_generations", 4),
    ("lora_rank", 8),
]


def preflight(cfg: Config, room_gib: float) -> str:
    """What the run will need beside what the card has, and the flags that would make it fit if it does
    not."""
    with blame(f"--model {cfg.model}"):
        config, family = read_family(find_model(cfg.model))

    def needs_of(cfg):
        hears = family.encode_audio and cfg.audio != "none"
        prompt_tokens = 120 + int(25 * cfg.max_audio_s) if hears else 512
        return forecast(cfg, config, family, prompt_tokens)

    needs = needs_of(cfg)
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in needs.items())
    peak = max(needs.values())
    said = f"memory: at most {peak:.1f} GiB of the card's {room_gib:.1f} by the tensors' sizes ({parts})"
    if peak <= 0.95 * room_gib:
        return said
    flags = {}
    for name, value in SMALLER:
        if not is_smaller(value, getattr(cfg, name)):
            continue
        cfg = dataclasses.replace(cfg, **{name: value})
        flags[name] = f"--{name}" if value is True else f"--{name} {value}"
        peak = max(needs_of(cfg).values())
        if peak <= 0.95 * room_gib:
            better = " ".join(flags.values())
            return f"{said}\nwarning: that will hardly fit; with {better} it takes {peak:.1f} GiB"
    return f"{said}\nwarning: that will not fit, and neither will any flags of one card this size"


def is_smaller(value, current) -> bool:
    return not current if value is True else value < current


def main(argv=None) -> int:
    parser = data.Parser(description=__doc__)
    parser.add_knobs(Config)
    parser.add_argument("--gib", type=float, default=48.0, help="memory of the card (default: 48)")

    def run():
        given = vars(parser.parse_args(argv))
        room_gib = given.pop("gib")
        if not room_gib > 0:
            raise UserError(f"--gib {room_gib}: must be above 0")
        print(preflight(Config(**given), room_gib))

    return data.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
