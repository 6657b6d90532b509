"""Shim until the merge."""

import omni_grpo
from omni_grpo import Clip, Completion, Policy, Tokens, find_model, load_policy, quiet_libraries  # noqa: F401
from omni_grpo import embeddings as embed_clips  # noqa: F401
from omni_grpo import text_of as completion_text  # noqa: F401


def encode_prompt(policy, example, embedded_clips, prompt_name):
    return omni_grpo.prompt_tokens(policy, example, embedded_clips, omni_grpo.Config(prompt=prompt_name))
