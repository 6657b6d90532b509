"""Shim until the merge."""

import data
from data import RequestFailed  # noqa: F401


def connect(model, base_url, temperature, max_tokens, retries, timeout_s, schema=None):
    return data.connect(model, base_url, temperature, max_tokens, retries, timeout_s, schema)
