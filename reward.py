"""Rewards: what a completion is worth. And the resolver that they and eval.py share: which choice a completion gives.

A reward is a plain function (said, example) -> float in the table REWARDS. `--reward accuracy=1,format=0.5` weighs them,
and the log holds each one before its weight. To add a reward, write the function and put its name into the table. A reward
never raises on what a model wrote and never executes it.

The file reads from top to bottom: the rewards, `resolve` and its five passes, and last the word lists of the resolver.
It needs no torch.
"""

import ast
import difflib
import functools
import itertools
import math
import operator
import re
import string
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@dataclass
class Said:
    """What the policy said, and what is known about how it came to say it."""

    text: str
    used: float = 0.0  # the share of --max_new_tokens that it took, 0 to 1
    heard: tuple = ()  # the parts of the clip that it heard again: (start, end) in seconds
    confidence: float | None = (
        None  # the probability of its answer's least certain token, where that is known
    )


def accuracy(said: Said, example) -> float:
    """1 if the completion gives the right choice, or solves its Countdown; else 0."""
    if example.is_countdown:
        return float(countdown(said, example) == 1)
    return float(same_choice(example.choices, resolve(said.text, example.choices), example.answer))


def same_choice(choices: list[str], i: int | None, j: int | None) -> bool:
    """Whether two indices stand for the same choice. They may differ, because a question may hold a choice twice."""
    if i is None or j is None:
        return False
    words = choice_words(choices[i])
    return i == j or (words != () and words == choice_words(choices[j]))


def answer_format(said: Said, example) -> float:
    """1 if the completion is one <answer> block and nothing else (R1-AQA, arXiv 2503.11197)."""
    return float(after_block("answer", said.text.strip()) == "")


def think_format(said: Said, example) -> float:
    """1 if the completion is one <think> block and one <answer> block (R1-AQA's thinking mode)."""
    rest = after_block("think", said.text.strip())
    return float(rest is not None and after_block("answer", rest.strip()) == "")


def after_block(tag: str, text: str) -> str | None:
    """What follows the one <tag>...</tag> at the start of the text; None if there is no such block. Takes linear time,
    which a regular expression for the whole text would not."""
    block, closing, rest = text.partition(f"</{tag}>")
    is_one_block = block.startswith(f"<{tag}>") and block.count(f"<{tag}>") == 1 and closing
    return rest if is_one_block else None


FILLED = "PLANNING CAPTION REASONING SUMMARY RESPONSE".split()  # the sections that must hold a word
SECTIONS = (
    "THINK PLANNING /PLANNING CAPTION /CAPTION REASONING /REASONING SUMMARY /SUMMARY /THINK RESPONSE /RESPONSE"
).split()
SECTION_TAG = re.compile(rf"<(/?(?:THINK|{'|'.join(FILLED)}))>", re.IGNORECASE)
WORD = re.compile(r"[^\W_]")


def structure(said: Said, example) -> float:
    """1 if the completion is <THINK> with its four sections, in order and none empty, then <RESPONSE>, and nothing else
    (Audio-Reasoner, arXiv 2503.02318; SARI, arXiv 2504.15900, has the same four sections)."""
    before, *rest = SECTION_TAG.split(said.text)
    tags = [tag.upper() for tag in rest[::2]]
    if tags != SECTIONS or before.strip():
        return 0.0
    for tag, text in zip(tags, rest[1::2]):
        is_right = WORD.search(text) if tag in FILLED else not text.strip()
        if not is_right:
            return 0.0
    return 1.0


def split_trace(text: str) -> tuple[str, str] | None:
    """(what stands in the one <think> block, what follows it); None if there is no such block, or more than one."""
    tags = list(THINK.finditer(text))
    if [bool(tag[1]) for tag in tags] != [False, True]:
        return None
    opening, closing = tags
    return text[opening.end() : closing.start()], text[closing.end() :]


SHORT_TRACE, LONG_TRACE = 30, 50  # words


def think_length(said: Said, example) -> float:
    """1 for a trace of 30 to 50 words. A shorter one gets its n / 30, a longer one 2 - n / 50, and 0 from 100 words on:
    longer traces that cost nothing answer worse (CESAR; Ke-Omni-R asks for less than 50 words)."""
    found = split_trace(said.text)
    if found is None:
        return 0.0
    n = sum(WORD.search(word) is not None for word in found[0].split())
    if n <= LONG_TRACE:
        return min(1.0, n / SHORT_TRACE)
    return max(0.0, 2 - n / LONG_TRACE)


def consistency(said: Said, example) -> float:
    """1 if the trace ends at the choice that is then answered, or rules out all the others; 0 if it ends at another one,
    at none, or if there is no answer. Needs no judge; stands in for the consistency reward of Audio-Thinker."""
    found, choices = split_trace(said.text), example.choices
    given = resolve(found[1], choices) if found else None
    if given is None:
        return 0.0
    sentences = [s for s in SENTENCE_END.split(found[0][-4000:]) if s.strip()]
    sentences = sentences[-40:]  # enough, and it bounds the time
    for sentence in reversed(sentences):
        index = None if NEGATION.search(sentence) else resolve(sentence, choices)
        if index is not None:
            return float(choice_words(choices[index]) == choice_words(choices[given]))
    ruled_out = set()
    for sentence in sentences:
        if NEGATION.search(sentence):
            ruled_out |= choices_named(sentence, choices)
    others = set(range(len(choices))) - {given}
    return float(ruled_out == others != set())


def choices_named(sentence: str, choices: list[str]) -> set[int]:
    """The indices of the choices whose words stand side by side in the sentence."""
    padded = [f" {' '.join(choice_words(text))} " for text in (sentence, *choices)]
    return {i for i, choice in enumerate(padded[1:]) if choice in padded[0]}


def overlong(said: Said, example) -> float:
    """DAPO's soft punishment (arXiv 2503.14476 eq. 13): 0 up to 80 % of --max_new_tokens, then down to -1 at 100 %."""
    return -min(1.0, max(0.0, (said.used - 0.8) / 0.2))


# ---- re-listening: Echo (arXiv 2602.11909), R = 0.5 format + 0.5 accuracy + 0.5 segment + segment_flow


def segment(said: Said, example) -> float:
    """1 if the answer is right and at least one part of the clip was heard again on the way to it; else 0."""
    return float(len(said.heard) > 0 and accuracy(said, example) == 1)


def segment_flow(said: Said, example) -> float:
    """-0.1, five times at most, for every </seg> that a new sentence (an upper-case letter) or another tag follows: the
    policy has to use what it heard again where it heard it. Echo's consistency penalty."""
    following = re.findall(r"</seg>\s*([^\W\d_]|<)", said.text)
    return -0.1 * min(5, sum(c == "<" or c.isupper() for c in following))


def confident_accuracy(said: Said, example) -> float:
    """Right: 1 - (1 - p)^2; wrong: -p^2; no answer: 0. p is the probability of the answer's least certain token, and 1
    where it is not known (Echo's code, times 2)."""
    p = 1.0 if said.confidence is None else said.confidence
    if accuracy(said, example) == 1:
        return 1 - (1 - p) ** 2
    if resolve(said.text, example.choices) is None:
        return 0.0
    return -(p**2)


def grounding(said: Said, example) -> float:
    """How well the parts heard again meet the true ones, meta["spans"]: [[start, end], ...] in seconds: the time in both
    over the time in either (IoU). 0 where nothing was heard or no true span is known."""
    spans = example.meta.get("spans")
    spans = spans if isinstance(spans, list | tuple) else []
    true = merge_spans(span for span in spans if is_span(span))
    heard = merge_spans(said.heard)
    if not heard or not true:
        return 0.0
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in heard for c, d in true)
    total = sum(end - start for start, end in heard + true)
    return both / (total - both)


def is_span(span) -> bool:
    """Whether this entry of meta["spans"], which may hold anything, is a pair of numbers (start, end), start < end."""
    if not isinstance(span, list | tuple) or len(span) != 2:
        return False
    return all(type(x) in (int, float) and abs(x) < 1e9 for x in span) and span[0] < span[1]


def merge_spans(spans) -> list[list[float]]:
    """(start, end) pairs -> the same time in order, as [start, end] lists that neither overlap nor touch."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


# ---- Countdown: make a number of given ones (TinyZero)


def countdown(said: Said, example) -> float:
    """1 if the last <answer> uses every number of meta["nums"] exactly once and makes meta["target"]; 0.1 for any other
    answer in its tags; else 0."""
    answers = re.findall(r"<answer>([^<]*)</answer>", said.text)
    if not answers:
        return 0.0
    if not example.is_countdown:
        return 0.1
    nums, target = example.meta["nums"], example.meta["target"]
    found = evaluate(" ".join(answers[-1].split()).removesuffix(f"= {target}"))
    is_solved = found is not None and found[0] == target and sorted(found[1]) == sorted(nums)
    return 1.0 if is_solved else 0.1


def countdown_last_line(said: Said, example) -> float:
    """`countdown` of the last line alone, as TinyZero's code does."""
    last_line = said.text.rstrip().rpartition("\n")[2]
    return countdown(Said(last_line), example)


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """An expression of integers and + - * / ( ) -> (its exact value, its integers); None if it is anything else.

    Walks the syntax tree and executes nothing. A power such as 9**9**9 is refused, not computed.
    """
    if len(expression) > 200 or not re.fullmatch(r"[\d+\-*/() ]+", expression):  # short: no deep nesting
        return None
    numbers = []
    try:
        return node_value(ast.parse(expression.strip(), mode="eval").body, numbers), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def node_value(node, numbers: list[int]) -> Fraction:
    """The value of a node of the syntax tree. Appends its integers to `numbers`. Raises ValueError on any other node."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in SIGNS:
        return SIGNS[type(node.op)](node_value(node.operand, numbers))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = node_value(node.left, numbers), node_value(node.right, numbers)
        return OPERATORS[type(node.op)](left, right)
    raise ValueError


REWARDS = {
    "accuracy": accuracy,
    "format": answer_format,
    "think_format": think_format,
    "structure": structure,
    "think_length": think_length,
    "consistency": consistency,
    "overlong": overlong,
    "countdown": countdown,
    "countdown_last_line": countdown_last_line,
    "segment": segment,
    "segment_flow": segment_flow,
    "confident_accuracy": confident_accuracy,
    "grounding": grounding,
}


def parse_rewards(spec: str) -> dict[str, float]:
    """ "accuracy=1,format=0.5" -> {"accuracy": 1.0, "format": 0.5}. Raises ValueError, naming the nearest reward."""
    weights = {}
    for part in spec.split(","):
        name, _, weight = part.partition("=")
        name = name.strip()
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}{nearest(name, REWARDS)}")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise ValueError(f"reward {name!r}: weight {weight!r} is not a number") from None
        if not math.isfinite(weights[name]):
            raise ValueError(f"reward {name!r}: weight {weight!r} is not finite")
    return weights


def nearest(name: str, known) -> str:
    """The end of an error message about an unknown name: the known name nearest to it, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def score(said: Said, example, weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    """-> (the weighted sum of the rewards, each reward before its weight)"""
    parts = {name: REWARDS[name](said, example) for name in weights}
    return sum(weights[name] * part for name, part in parts.items()), parts


# ---------------------------------------------------------------------------------------------------------------------
# The resolver. Its data: `items` are the tokens of a text; `keys` maps the words of each choice to its index; `letters`
# holds the index that each letter A, B, ... stands for. Where a choice is named, the token is its symbol: "<2>".

UNCLEAR = -1  # the index of words that more than one choice consists of
SYMBOL = "<"  # only a symbol begins with it


def resolve(text: str, choices: list[str]) -> int | None:
    """The index of the one choice that a completion gives as its answer, or None: never a guess, never a fallback.

    What counts, in this order: only what follows </think>; only what stands in <answer>, <response> or \\boxed{}; then what
    is given as the answer, what stands alone, what is concluded, and last what is mentioned at all; by the text of a choice
    or by its letter, unless it is denied. Two different answers are none. Choices that read the same are one, the first.
    """
    given = {resolve_part(part, choices) for part in set(answer_parts(text))}
    return given.pop() if len(given) == 1 else None


def resolve_part(text: str, choices: list[str]) -> int | None:
    """The choice that one part of a completion gives, or None."""
    texts, keys, letters = index_choices(choices)
    boxed = [m[2] for m in ANSWER.finditer(text) if m[2] is not None]
    text = boxed[0] if len(boxed) == 1 else text
    for stripped in (text.strip(), text.strip().strip("\"'`*_.“”‘’ \n")):
        if stripped.casefold() in texts:
            return texts[stripped.casefold()]
    items = lex(text)
    index = resolve_alone(items, keys, letters)
    if index is None:
        items = with_mentions(items, keys, letters)
        items = with_letters(items, letters, keys)
        index = decide(signals(items), items, letters)
    return None if index == UNCLEAR else index


def index_choices(choices: list[str]) -> tuple[dict[str, int], dict[tuple, int], list[int]]:
    """-> (the index of each text, of the words of each choice, and of each letter). Equal texts share the first index."""
    texts, keys, letters = {}, {}, []
    for i, choice in enumerate(choices):
        first = texts.setdefault(choice.strip().casefold(), i)
        letters.append(first)
        if first == i:
            words = choice_words(choice)
            keys[words] = UNCLEAR if words in keys else i
    keys.pop((), None)
    return texts, keys, letters


def resolve_alone(items: list[str], keys: dict, letters: list[int]) -> int | None:
    """The choice that is all there is: its words, or its letter."""
    words = words_of(items)
    if words in keys and items[0] not in OPENING:  # "(A)" is a letter
        return keys[words]
    return label_of(words[0], letters) if len(words) == 1 else None


# ---- pass 1: the parts of the text that may hold the answer


def answer_parts(text: str) -> list[str]:
    """What follows the thinking; of that, what stands in <answer> or <response>, or else in \\boxed{}, or else all."""
    thinks = list(THINK.finditer(text))
    if thinks:
        last = thinks[-1]
        is_closed = last[1]
        text = text[last.end() :] if is_closed else text[: last.start()]  # <think> hides all that follows it
    text = UNWRAP.sub(r"\1", text)  # \boxed{\text{B}}
    parts, boxed, start = [], [], None
    for m in ANSWER.finditer(text):
        is_closing, in_box = m.groups()
        if in_box is not None:
            boxed.append(in_box)
            continue
        if start is not None:
            parts.append(text[start : m.start()])
        start = None if is_closing else m.end()
    if start is not None:  # cut off before </answer>; or <answer> in its place
        rest = text[start:]
        if rest.strip() or not parts:
            parts.append(rest)
    return parts or boxed or [text]


# ---- pass 2: the texts of choices become symbols


def with_mentions(items: list[str], keys: dict, letters: list[int]) -> list[str]:
    """Every mention of the text of a choice becomes its symbol; the longest text wins. Other tokens are folded, except that
    single characters keep their case, because they may be letters of choices."""
    low = [fold(t) for t in items]
    names = {
        key[1:]: i for key, i in keys.items() if key[0] in ARTICLES and len(key) > 2
    }  # without its article
    names |= keys
    by_first = {}
    for key in sorted(names, key=len, reverse=True):
        by_first.setdefault(key[0], []).append(key)
    cut = find_cut(low, keys)
    out, at = [], 0
    while at < len(low):
        key, end = find_choice(low, at, by_first)
        is_in_cut = end > cut and not LISTING.issuperset(low[cut:at] + low[end:])
        if key and not is_in_cut and is_mention(items, low, at, end, keys, letters):
            for other in joined_choices(out, low, end, key, keys, by_first):
                out += [symbol(other), "or"]
            out.append(symbol(names[key]))
            at = end
            continue
        if len(items[at]) > 1:
            out.append(low[at])
        else:
            out.append(items[at] if at < cut else "…")
        at += 1
    return out


def symbol(index: int) -> str:
    return f"{SYMBOL}{index}>"


def find_choice(low: list[str], at: int, by_first: dict[str, list[tuple]]) -> tuple[tuple, int]:
    """-> (the words of the longest choice that starts at token `at`, where it ends); ((), 0) if there is none"""
    for key in by_first.get(token_at(low, at), ()):
        end = match_choice(low, at, key)
        if end:
            return key, end
    return (), 0


def match_choice(low: list[str], at: int, key: tuple) -> int:
    """Where `key` ends if it starts at token `at`; else 0. Between two of its words may stand marks and one light word."""
    previous = None
    for word in key:
        if previous is not None:
            at = skip_to(word, low, at, previous)
        if token_at(low, at) != word:
            return 0
        at += 1
        previous = word
    return at


def skip_to(word: str, low: list[str], at: int, previous: str) -> int:
    """The place of `word` behind marks and at most one light word; the place that it cannot be behind, if there is none."""
    has_skipped = False
    while at < len(low) and low[at] != word and low[at] != "\n":
        if previous in ARTICLES and low[at] in {".", "a"}:  # "A. A dog"
            break
        if low[at] not in PUNCT:
            if has_skipped or low[at] not in LIGHT:
                break
            has_skipped = True
        at += 1
    return at


def find_cut(low: list[str], keys: dict) -> int:
    """Where a choice begins that the end of the text breaks off. A choice mentioned within it is not meant by itself."""
    if not low or low[-1] in PUNCT:
        return len(low)
    for start in range(max(0, len(low) - 80), len(low) - 1):
        if low[start] in PUNCT:
            continue
        words = tuple(t for t in low[start:] if t not in PUNCT)
        if any(is_beginning(words, key) for key in keys):
            return start
    return len(low)


def is_beginning(words: tuple, key: tuple) -> bool:
    """Whether a text that ends in `words` breaks off within `key`: between two words or inside of one."""
    n = len(words) - 1
    return len(key) > n and key[:n] == words[:n] and key[n].startswith(words[n]) and key != words


def is_mention(items: list[str], low: list[str], at: int, end: int, keys: dict, letters: list[int]) -> bool:
    """Whether the text of a choice, found from token `at` to `end`, is a mention of it. "No" and "one" have other uses, a
    single letter may be a label, and "over 10" is not 10."""
    word, before, after = low[at], token_at(low, at - 1), token_at(low, end)
    if word[0].isdigit() and (before in LIMITS or low[at - 2 : at] == ["up", "to"]):
        return False
    if end - at > 1:  # "in a minor key" is not A minor
        return items[at] != "a" or low[at + 1] not in {"minor", "major", "flat", "sharp"}
    if word in {"no", "not", "none", "never"}:
        return after in AFTER_NO
    if word == "one":
        return after != "of" and before not in BEFORE_ONE
    if len(word) == 1 and word.isascii() and word.isalpha():
        return is_letter_text(items, low, at, keys, letters)
    return True


def is_letter_text(items: list[str], low: list[str], at: int, keys: dict, letters: list[int]) -> bool:
    """Whether a single letter is the text of a choice, as the note A is, and neither a label nor an article."""
    word, before, after = low[at], token_at(low, at - 1), token_at(low, at + 1)
    label = label_of(word, letters)
    for t in low[at + 1 : at + 5]:
        if t not in PUNCT:
            if (
                label is not None and after in PUNCT and keys.get((t,)) == label
            ):  # "D. A": A is the fourth choice
                return False
            break
    if before in OPTIONS or (before in OPENING and after in CLOSING):
        return False
    return items[at].isupper() and (word not in "ai" or after in PUNCT or after in {"or", "and"})


def joined_choices(
    out: list[str], low: list[str], end: int, key: tuple, keys: dict, by_first: dict
) -> list[int]:
    """The choices that share words with `key` and are named by the one word that differs: "acoustic or electric guitar"
    names both guitars, "10 to 20 seconds" both lengths."""
    words = []
    before, after = out[-5:][::-1], low[end : end + 5]
    gap = joint_length(before, {"or", "and", "to", "nor", "/", ","})
    if gap:
        words.append(before[gap].lower())
    gap = joint_length(after, {"or", "nor", "/"})
    if gap and not find_choice(low, end + gap, by_first)[0]:
        words.append(after[gap].lower())
    words = [word for word in words if word not in key]
    shared = set(key) - LISTING
    return [i for other, i in keys.items() if shared & set(other) and any(word in other for word in words)]


def joint_length(tokens: list[str], joints: set[str]) -> int:
    """How many tokens, with a joint such as "or" among them, stand before the first word; 0 without a joint or a word."""
    for n, t in enumerate(tokens):
        if t not in joints and t not in ARTICLES and t != ",":
            return n if joints.intersection(tokens[:n]) else 0
    return 0


# ---- pass 3: the letters of choices become symbols


def with_letters(items: list[str], letters: list[int], keys: dict) -> list[str]:
    """Every letter that labels a choice, and is no article, note or initial, becomes its symbol."""
    low = [t.lower() for t in items] + ["\n", "\n"]
    out = []
    clear, cued = (
        True,
        False,
    )  # clear: nothing but filler since the sentence or a cue began; cued: by "the answer is"
    for i, t in enumerate(items):
        index = label_of(t, letters)
        if index is not None and is_label(items, low, i, clear, cued):
            out.append(symbol(read_label(low, i, index, keys)))
            continue
        if t in {".", ")", "]", ":"} and is_after_label(items, low, i, out):
            continue  # the mark belongs to the label
        out.append(low[i])
        cue = cue_level(low, i)
        if cue or t in ENDS:
            clear, cued = True, cue == EXPLICIT or (cued and t == "\n")
        elif t[0] != SYMBOL and low[i] not in FILLER and low[i] not in NEGATORS:
            clear = cued = False
    return out


def is_label(items: list[str], low: list[str], i: int, clear: bool, cued: bool) -> bool:
    """Whether the letter at token `i` labels a choice."""
    before, after = token_at(low, i - 1), low[i + 1]
    rest = " ".join(low[i + 1 : i + 11])
    is_capital = items[i].isupper()
    if before in OPTIONS or (before in OPENING and after in CLOSING):
        return True
    if before == ":" and token_at(low, i - 2) in OPTIONS and (is_capital or after in PUNCT):
        return True
    if before in ARTICLES or NOTE.match(rest):
        return False
    if after not in PUNCT and (AFTER.match(rest) or CHOSEN.match(rest)):
        return clear and (is_capital or before in ANSWERS)
    if low[i] in "ai" and (after[0] == SYMBOL or (after == "\n" and not is_capital and i > 0)):
        return False  # "A dog", "it is a"
    if not is_capital and not cued:  # "b." alone, "b) cat", "a. and b."
        return clear and after in {")", "]", ".", ":"} and before in LISTING and before not in ARTICLES
    if not clear:
        return False
    if after in PUNCT or after in CLOSERS or after[0] == SYMBOL:
        return True
    if cued and re.match(f"[{CJK}]", after):
        return True
    return (
        before in {"and", "or", "nor", "/"} and len(items[i - 2]) == 1 and items[i - 2].isupper()
    )  # "A and B are"


def read_label(low: list[str], i: int, index: int, keys: dict) -> int:
    """The index that the label at token `i` means: the letter's own, unless the letter is the text of another choice. It is
    unclear where it may be all that is left of a text cut off, such as "A" of "A dog"."""
    if next_word(low, i) == symbol(index) or token_at(low, i - 1) in OPTIONS:
        return index
    if token_at(low, i - 1) in OPENING and low[i + 1] in CLOSING:
        return index
    is_last = i == len(low) - 3
    if is_last and any(len(key) == 2 and key[0] == low[i] and keys[key] != index for key in keys):
        return UNCLEAR
    return keys.get((low[i],), index)


def is_after_label(items: list[str], low: list[str], i: int, out: list[str]) -> bool:
    """Whether the mark at token `i` stands between a label and what is said of it: "B. cat", "B. Incorrect"."""
    if not out or out[-1][0] != SYMBOL or items[i - 1][0] == SYMBOL:
        return False
    return next_word(low, i)[:1] == SYMBOL or AFTER.match(" ".join(low[i + 1 : i + 10])) is not None


def next_word(low: list[str], i: int) -> str:
    """The next of three tokens that is no mark and no article; a line's end counts as one. "" if there is none."""
    for t in low[i + 1 : i + 4]:
        if t == "\n" or (t not in PUNCT and t not in ARTICLES):
            return t
    return ""


def cue_level(low: list[str], i: int) -> int:
    """How a choice is given after the word at token `i`: EXPLICIT after "answer", CLAIM after "so"; MENTION for a word that
    is no cue, as in "to answer this question"."""
    before, after = token_at(low, i - 1), token_at(low, i + 1)
    if low[i] in ANSWERS and before not in BEFORE_VERB and after not in AFTER_VERB:
        return EXPLICIT
    if low[i] in OPTIONS and before in BEST:
        return EXPLICIT
    return CLAIM if low[i] in CONCLUDE else MENTION


# ---- pass 4: every symbol is weighed in its sentence

# How a choice is given: in passing, "so it is X", "X.", "the answer is X"
MENTION, CLAIM, TERSE, EXPLICIT = range(4)


@dataclass
class Signal:
    """One place where a choice is named."""

    index: int
    level: int
    denied: bool
    first: int  # its first and last token
    last: int
    turn: int  # where the last word of TURNS before it stands, or -1


def signals(items: list[str]) -> list[Signal]:
    """Every symbol, with how it is given and whether it is denied: by a negation before it, by what follows, or because the
    sentence is a question."""
    found = []
    level, turn = MENTION, -1
    bare = False  # the text since an explicit cue is nothing but filler; then the cue holds in the next line, too
    for start, end in split_sentences(items):
        sentence, mark = items[start:end], items[end : end + 1]
        asked = mark == ["?"] and token_at(items, end + 1) not in {"yes", "yeah", "correct"}
        terse = is_terse(sentence)
        negated = find_negated(items, start, end)
        level = level if bare else MENTION
        clear = True
        for i, t in enumerate(sentence, start):
            if t[0] == SYMBOL:
                after = " ".join(items[i + 1 : i + 10])
                denied_after = AFTER.match(after) is not None
                if denied_after:
                    deny_listed(found, items, i)
                rank = max(level, TERSE if terse else MENTION)
                if CHOSEN.match(after):
                    rank = EXPLICIT
                denied = i in negated or asked or denied_after
                found.append(Signal(int(t[1:-1]), rank, denied, i, i, turn))
                clear = bare = False
                continue
            cue = cue_level(items, i)
            level = max(level, cue, CLAIM if clear and t in VERBS else MENTION)
            if t in REASONS or (level == EXPLICIT and is_negator(items, i)):
                level = MENTION
            bare = cue == EXPLICIT or (bare and t in FILLER)
            clear = t == "," or (clear and t in FILLER)
            turn = i if t in TURNS else turn
        bare = bare and mark == ["\n"]
    return found


def split_sentences(items: list[str]) -> list[tuple[int, int]]:
    """(start, end) of every sentence; the mark that ends it stands at `end`. One goes on after "dog. Or cat."."""
    sentences, start = [], 0
    for i, t in enumerate(items):
        if t in ENDS and token_at(items, i + 1) not in {"or", "and", ")"}:
            sentences.append((start, i))
            start = i + 1
    return [*sentences, (start, len(items))]


def is_terse(sentence: list[str]) -> bool:
    """Whether a sentence holds nothing but symbols and filler, without a verb."""
    if any(t in VERBS or t in HEDGES for t in sentence):
        return False
    return all(t[0] == SYMBOL or t in FILLER for t in sentence)


def find_negated(items: list[str], start: int, end: int) -> set[int]:
    """The tokens of a sentence that a negation before them reaches: up to a word of RESETS, or a comma that does not go on
    with the list."""
    reached, negated = set(), False
    listing = False  # "or" and the like came after the negation
    for i in range(start, end):
        t = items[i]
        if negated:
            reached.add(i)
        if is_negator(items, i):
            negated, listing = True, t == "nor"
        elif t in LISTING and t not in PUNCT and t not in ARTICLES:
            listing = True
        elif t in RESETS and not (negated and not listing and goes_on_listing(items, i)):
            negated = negated and t == "as"  # "not ... such as"
    return reached


def is_negator(items: list[str], i: int) -> bool:
    is_negation = items[i] in NEGATORS or items[i].endswith("n't")
    return is_negation and token_at(items, i + 1) not in {"only", "just", "merely"}


def goes_on_listing(items: list[str], i: int) -> bool:
    """Whether token `i` is a comma between two symbols: "not happy, sad, or angry"."""
    if items[i] != "," or items[i - 1][0] != SYMBOL:
        return False
    return re.match(r"(?:(?:or|nor|and|a|an|the) )*<", " ".join(items[i + 1 : i + 6])) is not None


def deny_listed(found: list[Signal], items: list[str], here: int) -> None:
    """Deny every symbol that is listed with the denied one at token `here`: "dog and cat are wrong"."""
    for signal in reversed(found):
        if not is_near(signal.last, here, items, LISTING - ENDS):
            break
        signal.denied = True
        here = signal.first


def is_near(last: int, first: int, items: list[str], allowed: set[str]) -> bool:
    """Whether only allowed tokens stand between two signals, of which one ends at `last` and the other begins at `first`."""
    return allowed.issuperset(items[last + 1 : first])


# ---- pass 5: the strongest signal decides


def decide(found: list[Signal], items: list[str], letters: list[int]) -> int | None:
    """The index that is given in the strongest way, if it is only one and nothing later takes it back."""
    found = [s for s in drop_options(merge_signals(found, items), items, letters) if not s.denied]
    level = max((s.level for s in found), default=MENTION)
    if not found or (level < TERSE and REFUSAL.search(" ".join(items))):
        return None
    given = [s for s in found if s.level == level]
    chosen = {s.index for s in given}
    end = given[-1].first
    for s in found:
        if s.first > end and (s.level >= CLAIM or s.turn > end):
            chosen.add(s.index)
    alone = {s.index for s in found if s.level == TERSE}
    if len(alone) == 1:  # one stands by itself, and another is the answer. More of them are an analysis
        chosen |= alone
    return chosen.pop() if len(chosen) == 1 else None


def merge_signals(found: list[Signal], items: list[str]) -> list[Signal]:
    """Signals of the same choice side by side become one: "B. cat"."""
    merged = []
    for s in found:
        last = merged[-1] if merged else None
        if last and last.index == s.index and is_near(last.last, s.first, items, LISTING - ENDS):
            last.level = max(last.level, s.level)
            last.denied = last.denied or s.denied
            last.last = s.last
        else:
            merged.append(s)
    return merged


def drop_options(found: list[Signal], items: list[str], letters: list[int]) -> list[Signal]:
    """Without the options as the question gave them: all, each once, and nothing but commas and the like between them."""
    every = sorted(letters)
    distinct = sorted(
        index for index, _ in itertools.groupby(letters)
    )  # equal choices side by side may be one
    kept, i = [], 0
    while i < len(found):
        for options in (every, distinct):
            run = found[i : i + len(options)]
            if len(run) > 1 and is_list_of(options, run, items):
                i += len(run)
                break
        else:
            kept.append(found[i])
            i += 1
    return kept


def is_list_of(options: list[int], run: list[Signal], items: list[str]) -> bool:
    if any(s.denied for s in run) or sorted(s.index for s in run) != options:
        return False
    return all(is_near(a.last, b.first, items, LISTING) for a, b in zip(run, run[1:]))


# ---- tokens


def lex(text: str) -> list[str]:
    """The tokens of a text, in their own case. Spellings that mean the same become one first."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, plain in SPELLINGS:
        text = re.sub(pattern, plain, text, flags=re.IGNORECASE)
    return ["\n" if t[0] == "\n" else t for t in TOKEN.findall(text)]


def fold(token: str) -> str:
    """Lower case, and without 's: "a woman's voice" mentions a woman."""
    token = token.casefold()
    return token if token in FILLER else token.removesuffix("'s")


def words_of(items: list[str]) -> tuple[str, ...]:
    return tuple(fold(t) for t in items if t not in PUNCT)


@functools.lru_cache(4096)
def choice_words(text: str) -> tuple[str, ...]:
    """A choice as the resolver compares it: its folded tokens without punctuation."""
    return words_of(lex(text))


def label_of(token: str, letters: list[int]) -> int | None:
    """The index of the choice that a letter stands for, or None."""
    if len(token) != 1:
        return None
    i = string.ascii_lowercase.find(token.lower())
    return letters[i] if 0 <= i < len(letters) else None


def token_at(items: list[str], i: int) -> str:
    """The token at `i`; before the beginning and behind the end there is a line's end."""
    return items[i] if 0 <= i < len(items) else "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The resolver's regular expressions

THINK = re.compile(r"<\s*(?:(/)\s*)?think(?:ing)?\s*>", re.IGNORECASE)
ANSWER = re.compile(r"<\s*(?:(/)\s*)?(?:answer|response)\s*>|\\boxed\s*\{([^{}]*)\}", re.IGNORECASE)
UNWRAP = re.compile(r"\\(?:text|math)\w*\s*\{([^{}]*)\}")  # \text{B}, \mathbf{B}

# Vowel signs, as in Hindi, are no \w and yet part of their word.
MARKS = "".join(chr(c) for c in range(0x300, 0x3000) if unicodedata.category(chr(c))[0] == "M")
CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
TOKEN = re.compile(
    rf"""
    [{CJK}]                                           # one character
    | (?<!\w)-?\d+(?:[.,:/]\d+)*%?(?![^\W\d_])        # a number with its sign, decimals and percent
    | (?:[^\W{CJK}]|[{MARKS}])+(?:'[^\W\d_]+)?\#?     # a word: "C#" is one, "isn't" is one
    | \n\s*
    | [.,;:!?()\[\]/=—。、✓✔✅✗✘❌]
    """,
    re.VERBOSE,
)

# "A sharp" is a note only before "major" and the like: "a sharp sound" is none.
NOTE_A = r"a(?=-|\s(?:sharp|flat)\s(?:major|minor|maj|min)\b)"
# Spellings made one before the tokens: "10-20" is "10 to 20", "C sharp" is "C#", a dash between words is a mark, and
# "non-vocal" and "dog-like" are one word, which mentions neither vocals nor a dog.
SPELLINGS = (
    (r"\b(?:far from|(?:anything|everything|all) but|instead of|least likely)\b", "except"),
    (r"\b(?:no|without|beyond)(?: any| a| all)? (?:doubt|question)\b", "surely"),
    (r"<[|/]{0,2}\w+[|/]?>", " "),
    (UNWRAP.pattern, r"\1"),
    (r"\[ \]", "✗"),
    (r"\[x\]", "✓"),
    ("[’`´]", "'"),
    ("_", " "),
    ("♯", "#"),
    ("♭", "b"),
    (r"(?<=\d)\s*[-–—~]\s*(?=\d)", " to "),
    (r"(?<!\S)[-–—]+(?!\S)|[–—]|-{2,}|[-=]>|→", " — "),
    (rf"\b([b-g]|{NOTE_A})[\s-]sharp\b", r"\1#"),
    (rf"\b([b-g]|{NOTE_A})[\s-]flat\b", r"\1b"),
    (r"\b(non|un|anti|counter|dis|semi|pseudo|quasi)-(?=\w)", r"\1"),
    (r"-(?=(?:like|free|less|ish)\b)", ""),
)

# The next three read the tokens that follow a letter or a symbol, joined by spaces. VERBOSE ignores a plain space.
NOTE = re.compile(
    r"(?:: )?(?:maj|min|dim|aug|sus|flat|sharp|dorian|phrygian|lydian|mixolydian|aeolian|locrian)"
)
# A choice is denied by what follows it: "is not", ": incorrect", "(wrong)", "can be ruled out" ...
AFTER = re.compile(
    r"""
    (?:  # these may stand between a choice and a denial of the first group
        (?:
            [:()\]—] | ,(?=[ ](?:is|are|was|were|which)\b)
            | which|is|are|was|were|be|been
            | can|could|should|would|will|the|may|might|must|do|does|did|has|have|had
            | seems?|sounds?|looks?|appears?|to
            | also|all|both|clearly|definitely|probably|simply|just|obviously|really|very|most|highly
            | therefore|thus
            | option|choice
            | ist|es|est|n'est|das
            | here|completely|totally|quite
        )[ ]
    )*
    (?:
        (?:not|nicht|не|no[ ]es|pas)(?![ ](?:(?:a|an|the|option)[ ])?<|[ ]only|[ ]just)
        | \w+n't
        | cannot
        | never
        | neither
        | hardly
        | unlikely
        | improbable
        | (?<=the[ ])except
        | less
        | least
        | nowhere
        | by[ ]no[ ]means
        | makes?[ ]no
        | out[ ]of
        | off(?=[ ]\W|$)
        | if[ ](?!i\b)
        | impossible
        | wrong
        | incorrect
        | false
        | absent
        | missing
        | inaudible
        | ruled
        | eliminated
        | excluded
        | discarded
        | rejected
        | dismissed
        | irrelevant
        | inaccurate
        | untrue
        | implausible
        | doubtful
        | değil
        | नहीं
        | (?:で[ ]は|じ[ ]ゃ)[ ](?:な|あ)
        | (?:[이가은는][ ])?아[ ][니닌]
    )\b
    # these follow the choice at once
    | would\b(?![ ]be)
    | (?:is|was)[ ]the[ ](?:\w+[ ]){0,4}not\b(?![ ](?:(?:a|an|the|option)[ ])?<)
    | [:?(—][ ]no(?=[ ][^\w<]|$)
    | (?:is[ ]what[ ])?it[ ](?:isn't|is[ ]not)(?=[ ][^\w<]|$)
    | [✗✘❌]
    | [.\n:?][ ](?:(?:this|that|it)[ ]is[ ]|that's[ ]|it's[ ])?
      (?:incorrect|wrong|false|not[ ](?:heard|correct|right|present|likely|it))(?:[ ]\W|$)
    """,
    re.VERBOSE,
)
# ... or chosen: "is correct", "would be the best answer".
CHOSEN = re.compile(
    r"""
    [✓✔✅]
    | (?:is|was|seems|appears|would[ ]be|must[ ]be|as|to[ ]be|ist|es|est|是)
      (?:[ ](?:  # words that may stand before the choice
          to|be|the|my|most|more|best|correct|likely|right|final|only
          |clearly|definitely|indeed|therefore|accurate|appropriate
      ))*
      [ ](?:
          answer
          | option
          | choice
          | match
          | (?:correct|right|best|正[ ]确|对|richtig)(?=[ ][^\w]|$|[ ]answer|[ ]option|[ ]choice)
      )
    """,
    re.VERBOSE,
)
# The model says that it cannot answer.
REFUSAL = re.compile(
    r"""
    \bno[ ](?:audio|sound|clip|recording|file|attachment)\b(?![ ]other)
    | \bas[ ]an[ ]ai\b
    | audio[ ](?:is|was|were)[ ](?:missing|not)
    | (?:please|could[ ]you)[ ](?:provide|upload|share)
    | (?:can't|cannot|can[ ]not|couldn't|unable[ ]to|not[ ]able[ ]to|impossible[ ]to)(?:[ ]\w+)?[ ](?:be[ ])?
      (?:
          listen|access|process|play|analyze|determine|tell|answer|know|say|help|assist|identify
          | hear[ ](?:the|any|this|that|your)[ ](?:audio|sound|clip|recording|file)
      )
    """,
    re.VERBOSE,
)
SENTENCE_END = re.compile(r"(?<=[.!?;])\s+|\n+")
NEGATION = re.compile(
    r"\b(?:not|no|never|cannot|nor|neither|without|unlikely|wrong|incorrect|eliminat\w+|exclud\w+|"
    r"rul\w+ out|discard\w*|\w+n't)\b",
    re.IGNORECASE,
)

# ---------------------------------------------------------------------------------------------------------------------
# The resolver's words


def word_set(text: str) -> set[str]:
    return set(text.split())


PUNCT, ENDS = set(".,;:!?()[]/=—。、\n"), set(".!?;\n。")
OPENING, CLOSING = {"(", "["}, {")", "]"}
ARTICLES = {"a", "an", "the"}
LIGHT = {"is", "are", "was", "were", "a", "an", "the"}  # "a man is speaking" is "A man speaking"
ANSWERS = word_set(
    "answer ans antwort ответ respuesta réponse risposta resposta cevap jawaban उत्तर 答 选 選 답"
)
OPTIONS = word_set("option choice letter opción opcion opção opzione вариант 项 項 肢")
BEST = word_set("best top correct right final my likely appropriate suitable accurate matching chosen")
# "Answer" and "option" are verbs, or of the question, beside these.
BEFORE_VERB = word_set("to can cannot can't not no")
AFTER_VERB = word_set("this that the your question options choices")
CONCLUDE = word_set(
    "so therefore thus hence must choose chose choosing chosen select selected pick picked go going conclude "
    "conclusion guess think believe"
)
VERBS = CONCLUDE | word_set("is it's that's are was say sounds seems")
HEDGES = word_set("be could might may would maybe perhaps possibly potentially presumably")
# Tokens that may stand between the choices of a list.
LISTING = PUNCT | word_set("a an the and or nor to vs option options choice choices 或 和 oder und o y ou et")
# Words that may stand around an answer and add nothing to it.
FILLER = LISTING | HEDGES | ANSWERS | OPTIONS | BEST | VERBS
FILLER |= word_set(
    "answers should could will it its i i'd i'll i'm we this that most more probably definitely clearly surely "
    "certainly simply just in with for on sound heard hear clip audio like as appears here there's okay ok well "
    "sure yes no wait actually hmm but not sorry rather instead finally overall summary edit second now "
    "案 应 該 该 是 为 択 择 え は 我 正 确 解 で す 은 는 정 ist lautet die der das richtige korrekte "
    "la el es correcta una est bonne correcte правильный это é è correta"
)
# No answer follows these.
REASONS = word_set("because since as given due while whereas although though 因 weil porque")
# After these an answer may be taken back.
TURNS = word_set(
    "wait actually hmm however but no sorry correction scratch reconsider alternatively although though maybe perhaps "
    "possibly potentially oops hold initially edit second now"
)
NEGATORS = word_set(
    "not no never neither nor none non nothing nowhere nobody without except excluding unlike than cannot isnt "
    "doesnt dont cant wont didnt wasnt arent hardly barely rarely scarcely less unlikely impossible doubt doubtful "
    "fails lacks lacking hard difficult it'd worst wrong incorrect false whether if unable unclear unsure avoid "
    "refuse disagree opposite opposed against zero rule ruled ruling rules eliminate eliminated eliminating "
    "eliminates exclude excluded reject rejected rejecting discard discarded dismiss dismissed "
    "不 没 非 無 无 未 nicht kein keine keinen weder pas ni ne не нет não nem नहीं ✗ ✘ ❌"
)
# A negation reaches no further than these.
RESETS = REASONS | word_set(
    ", ) — 、 but so therefore thus hence however then 而 但 所 sondern sino mais pero aber mas а"
)
LIMITS = word_set("over under above below least most beyond")  # "over 10 seconds"
# "No" is an answer before these ("no it is not"), and "one" is none behind those.
AFTER_NO = PUNCT | REASONS | word_set("i it there he she they this that we the or and")
BEFORE_ONE = ARTICLES | word_set(
    "this that which no any first second third last only each every other another correct"
)
# A label may stand before these: "B or", "B because".
CLOSERS = REASONS | word_set("or and nor but not for with which over rather except unlike than ✓ ✔ ✅ ✗ ✘ ❌")
