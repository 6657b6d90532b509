"""Ask a model about clips: python eval.py --ask "What is heard first?" clip.wav --choices "a door" "a dog"

It prints the answer, or --samples of them, what was heard again, and how probable each choice is as the whole
answer. Without a question in front of the clips, questions are read from the terminal until the end of file.
"""

import os
import sys

import torch

import data
import eval as evaluation
import model
import omni_grpo
from data import Example, UserError


def answer(options, words: list[str], choices: list[str]) -> None:
    """words: a question or none, then clips"""
    question, clips = split_words(words)
    if options.audio == "shuffled":
        raise UserError("--audio shuffled: there is no other item's clip in --ask")
    cfg = evaluation.config_of(options)
    policy = omni_grpo.load_run_policy(cfg, train=False)
    for text in [question] if question else asked_on_terminal():
        for line in answer_lines(policy, cfg, options, Example("", clips or None, text, choices)):
            print(line, flush=True)


def split_words(words: list[str]) -> tuple[str, list[str]]:
    """Raises UserError for a clip that is not there."""
    is_question = not os.path.exists(words[0]) and not words[0].lower().endswith(data.SOUND_FILES)
    question, clips = (words[0], words[1:]) if is_question else ("", words)
    for clip in clips:
        if problem := data.file_problem(clip):
            raise UserError(f"--ask: {problem}")
    return question, clips


def asked_on_terminal():
    while True:
        if sys.stdin.isatty():
            print("? ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def answer_lines(policy, cfg, options, example: Example) -> list[str]:
    clips, was_cut = omni_grpo.load_clips_of(policy, cfg, example)
    prompts = omni_grpo.encode_prompts(policy, cfg, [example], [clips])
    how = options.samples, options.temperature
    (said,) = omni_grpo.rollout(policy, cfg, prompts, [clips], [options.seed], *how)
    lines = [f"only the first {cfg.max_audio_s:g} s are heard"] if was_cut else []
    for completion in said:
        lines.append(model.completion_text(policy, completion))
        lines += [f"  heard again: {start:g} to {end:g} s" for start, end in completion.heard]
        lines += [f"  not heard again: {problem} ({n})" for problem, n in completion.refused.items()]
    if example.choices:
        shares = choice_probabilities(policy, prompts[0], example.choices)
        shares["anything else"] = max(0.0, 1 - sum(shares.values()))
        lines += [f"  {share:.3f}  {choice}" for choice, share in shares.items()]
    return lines


@torch.no_grad()
def choice_probabilities(policy, prompt, choices: list[str]) -> dict[str, float]:
    """Of answering a prompt with a choice, and with nothing before or behind it, at temperature 1."""
    shares = {}
    for choice in dict.fromkeys(choices):
        ids = policy.tokenizer(choice, add_special_tokens=False)["input_ids"]
        ids.append(policy.tokenizer.eos_token_id)
        row = model.Completion(ids, sampled=[True] * len(ids))
        logps, _ = model.token_logps(policy, model.make_pack([prompt], [[row]], [0], policy.device), 1.0)
        shares[choice] = logps.sum().exp().item()
    return shares
