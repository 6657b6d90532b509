"""Shim until the merge."""

import data
from data import RequestFailed, UserError  # noqa: F401


def connect(model, base_url, temperature, max_tokens, retries, timeout_s, schema=None):
    return data.connect(model, base_url or None, temperature, max_tokens, retries, timeout_s, schema)


class Failures:
    """Counts how requests end, and says when no further one makes sense."""

    def __init__(self, unit):
        self.unit, self.answered, self.failed, self.in_a_row, self.last = unit, 0, 0, 0, ""

    def enter(self, error):
        """How one request ended: an error, or None.      -> the UserError with which to stop, or None"""
        if error is None:
            self.answered += 1
            self.in_a_row = 0
            return None
        self.failed += 1
        self.in_a_row += 1
        self.last = str(error)
        if isinstance(error, UserError):
            return error
        if isinstance(error, ConnectionError) and not self.answered:
            return UserError(f"cannot reach the server: {error}; is it running, and is --base_url right?")
        if self.in_a_row == 20:
            last = f"20 {self.unit}s in a row failed, the last with: {error}"
            return UserError(f"{last}; once that is mended, the same command goes on from here")
        return None
