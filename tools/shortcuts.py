"""What the options give away: how often rules that see neither the sound nor the question are right.

A policy that is paid for right answers learns such a shortcut first, and needs no ears for it.
`python data.py check` names those that a file has.
"""

import collections
import re
import zlib

import numpy as np

from data import Example, normal_words
from eval import wilson

MANY = 20_000  # questions that are looked at
FOLDS = 5  # of the questions for the classifier: it is tried on those that it was not fitted to
LEAST_GAIN = 0.05  # a rule is named if it is right so much more often than chance, beyond doubt


def length(choices: list[str]) -> list[float]:
    return [len(choice) for choice in choices]


def number(choices: list[str]) -> list[float] | None:
    """The first number in each, None if one has none."""
    found = [re.search(r"-?\d+(\.\d+)?", choice) for choice in choices]
    return [float(match[0]) for match in found] if all(found) else None


def nearness(choices: list[str]) -> list[float] | None:
    """How near its number is to the mean of all."""
    numbers = number(choices)
    return numbers and [-abs(x - np.mean(numbers)) for x in numbers]


def likeness(choices: list[str]) -> list[float]:
    """How many words it shares with the others: who makes up wrong choices changes the right one a little."""
    words = [set(normal_words(choice)) for choice in choices]
    return [sum(len(a & b) for b in words) - len(a) for a in words]


SCORES = dict(length=length, number=number, nearness=nearness, likeness=likeness)  # each: one value a choice
RULES = {  # the choice with the highest score; of several, one at random
    "the longest": ("length", 1),
    "the shortest": ("length", -1),
    "the largest number": ("number", 1),
    "the smallest number": ("number", -1),
    "the number nearest to the mean of all": ("nearness", 1),
    "the number farthest from the mean of all": ("nearness", -1),
    "the one that shares most words with the others": ("likeness", 1),
}


def find_shortcuts(examples: list[Example]) -> dict[str, tuple[float, float, int]]:
    """-> rule: (how often it is right, chance, of how many questions), the best first; also those that gain
    nothing. A question that a rule says nothing about is not among its questions."""
    asked = [e for e in examples if e.answer is not None and len(e.choices) > 1][:MANY]
    found = {}
    for rule, (name, sign) in RULES.items():
        hits, chances = [], []
        for example in asked:
            scores = SCORES[name](example.choices)
            if scores is None or min(scores) == max(scores):
                continue
            best = [i for i, score in enumerate(scores) if sign * score == max(sign * x for x in scores)]
            hits.append((example.answer in best) / len(best))
            chances.append(1 / len(scores))
        if hits:
            found[rule] = (float(np.mean(hits)), float(np.mean(chances)), len(hits))
    if len(asked) >= 10 * FOLDS:
        chance = float(np.mean([1 / len(e.choices) for e in asked]))
        found["a classifier of the options"] = (classify(asked), chance, len(asked))
    return dict(sorted(found.items(), key=lambda rule: rule[1][1] - rule[1][0]))


def is_shortcut(right: float, chance: float, n: int) -> bool:
    return right >= chance + LEAST_GAIN and wilson(right, n)[0] > chance


def classify(examples: list[Example]) -> float:
    """How often a conditional logit (McFadden 1974) is right that sees the scores above, and how often a text
    is the right one elsewhere in the file.

    It is fitted to four fifths of the questions and tried on the others, in turn; the same questions stay
    together, unless all are the same.
    """
    asked = [repr((e.question, sorted(e.choices))) for e in examples]
    fold = np.array([zlib.crc32(text.encode("utf-8", "replace")) % FOLDS for text in asked])
    if len(set(fold)) == 1:
        fold = np.arange(len(examples)) % FOLDS
    gold, most = np.array([e.answer for e in examples]), max(len(e.choices) for e in examples)
    there = np.array([[k < len(e.choices) for k in range(most)] for e in examples])
    scores = np.stack([padded(e, most) for e in examples])
    hits = []
    for held in set(fold):
        right, offered = collections.Counter(), collections.Counter()
        for example, part in zip(examples, fold):
            if part != held:
                offered.update(example.choices)
                right[example.choices[example.answer]] += 1
        prior = np.zeros((len(examples), most, 1))
        for i, (example, part) in enumerate(zip(examples, fold)):
            for k, choice in enumerate(example.choices):
                own = part != held  # what it is itself tells nothing of other questions
                rights = right[choice] - (own and k == example.answer)
                prior[i, k] = np.log((rights + 0.5) / (offered[choice] - own + 2))
        x = np.concatenate([scores, prior - prior.mean(axis=1, keepdims=True)], axis=2)
        train = fold != held
        weights = fit_logit(x[train], there[train], gold[train])
        utility = np.where(there, x @ weights, -np.inf)[~train]
        hits += (utility.argmax(axis=1) == gold[~train]).tolist()
    return float(np.mean(hits))


def padded(example: Example, most: int) -> np.ndarray:
    """The scores of the choices, each with mean 0 and deviation 1 within its question.      -> (most, S)"""
    x = np.zeros((most, len(SCORES)))
    for s, score in enumerate(SCORES.values()):
        values = score(example.choices)
        if values is not None and np.std(values) > 0:
            x[: len(values), s] = (values - np.mean(values)) / np.std(values)
    return x


def fit_logit(x: np.ndarray, there: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Weights w that make the right choices likely, p = softmax(x @ w), by gradient ascent with decay.
    x (N, K, S), there (N, K), gold (N,) -> (S,)"""
    weights, target = np.zeros(x.shape[2]), np.eye(x.shape[1])[gold]
    for _ in range(200):
        utility = np.where(there, x @ weights, -np.inf)
        p = np.exp(utility - utility.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = np.einsum("nk,nks->s", target - p, x) / len(x)
        weights += 0.5 * gradient - 0.001 * weights
    return weights
