"""Rewards: what a completion is worth; and the resolver: which choice a completion gives as its answer.

A reward is a plain function (said, example) -> float in the table REWARDS. `--reward accuracy=1,format=0.5`
weighs them, and the log holds each one before its weight. To add a reward, write the function and enter it in
the table. A reward never raises on what a model wrote and never executes it.

`resolve` serves training and evaluation alike. It works in five passes; its word lists stand at the end.
This file needs no torch.
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

# ------------------------------------------------------------------------------------------------------------
# Rewards


@dataclass
class Said:
    """What the policy said, and what is known about how it said it."""

    text: str
    used: float = 0.0  # the share of --max_new_tokens that it took, 0 to 1
    heard: tuple = ()  # the parts of its clip that it heard again: (start, end) in seconds
    confidence: float | None = None  # the probability of its answer's least certain token, if known


def accuracy(said: Said, example) -> float:
    """1 if the completion gives the right choice, or solves its Countdown; else 0."""
    if example.is_countdown:
        return float(countdown(said, example) == 1)
    index = resolve(said.text, example.choices)
    return float(same_choice(example.choices, index, example.answer))


def same_choice(choices: list[str], i: int | None, j: int | None) -> bool:
    """Whether two indices mean the same choice. They may differ: a question may hold a choice twice."""
    if i is None or j is None:
        return False
    words = choice_words(choices[i])
    return i == j or (words != () and words == choice_words(choices[j]))


def answer_format(said: Said, example) -> float:
    """1 if the completion is one <answer> block and nothing else (R1-AQA, arXiv 2503.11197)."""
    return float(after_block("answer", said.text.strip()) == "")


def think_format(said: Said, example) -> float:
    """1 if the completion is one <think> block, then one <answer> block (R1-AQA's thinking mode)."""
    rest = after_block("think", said.text.strip()) or ""
    return float(after_block("answer", rest.strip()) == "")


def after_block(tag: str, text: str) -> str | None:
    """What follows the one <tag>...</tag> that the text begins with; None if it does not begin with one."""
    block, closing, rest = text.partition(f"</{tag}>")
    is_block = closing and block.startswith(f"<{tag}>") and block.count(f"<{tag}>") == 1
    return rest if is_block else None


SECTIONS = "PLANNING CAPTION REASONING SUMMARY RESPONSE".split()
SECTION_TAG = re.compile(rf"<(/?(?:THINK|{'|'.join(SECTIONS)}))>", re.IGNORECASE)
TAGS_IN_ORDER = """
    THINK PLANNING /PLANNING CAPTION /CAPTION REASONING /REASONING SUMMARY /SUMMARY /THINK RESPONSE /RESPONSE
""".split()
WORD = re.compile(r"[^\W_]")


def structure(said: Said, example) -> float:
    """1 if the completion is <THINK> with its four sections, in order and none empty, then <RESPONSE>.

    Audio-Reasoner (arXiv 2503.02318); SARI (arXiv 2504.15900) plans, describes, reasons and sums up alike.
    """
    before, *rest = SECTION_TAG.split(said.text)
    tags = [tag.upper() for tag in rest[::2]]
    if tags != TAGS_IN_ORDER or before.strip():
        return 0.0
    for tag, text in zip(tags, rest[1::2]):
        is_right = WORD.search(text) if tag in SECTIONS else not text.strip()
        if not is_right:
            return 0.0
    return 1.0


def split_trace(text: str) -> tuple[str, str] | None:
    """(what stands in the one <think> block, what follows it); None without a block, or with several."""
    tags = list(THINK.finditer(text))
    if [bool(tag[1]) for tag in tags] != [False, True]:
        return None
    opening, closing = tags
    return text[opening.end() : closing.start()], text[closing.end() :]


SHORT_TRACE, LONG_TRACE = 30, 50  # words


def think_length(said: Said, example) -> float:
    """1 for a trace of n = 30 to 50 words; n / 30 for a shorter one; 2 - n / 50 for a longer one, at least 0.

    Longer traces that cost nothing answer worse (CESAR); Ke-Omni-R asks for less than 50 words.
    """
    found = split_trace(said.text)
    if found is None:
        return 0.0
    n = sum(WORD.search(word) is not None for word in found[0].split())
    if n <= LONG_TRACE:
        return min(1.0, n / SHORT_TRACE)
    return max(0.0, 2 - n / LONG_TRACE)


def consistency(said: Said, example) -> float:
    """1 if the trace ends at the choice that is then answered, or rules out every other one; else 0.

    Stands in for the consistency reward of Audio-Thinker, and needs no judge.
    """
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
    denials = "\n".join(spaced_words(s) for s in sentences if NEGATION.search(s))
    ruled_out = [i for i, choice in enumerate(choices) if spaced_words(choice) in denials]
    others = [i for i in range(len(choices)) if i != given]
    return float(len(others) > 0 and ruled_out == others)


def spaced_words(text: str) -> str:
    """The words of a text with a space before and behind each: then a search finds no parts of words."""
    return f" {' '.join(choice_words(text))} "


def overlong(said: Said, example) -> float:
    """0 up to 80 % of --max_new_tokens, then down to -1 at 100 % (DAPO, arXiv 2503.14476 eq. 13)."""
    return -min(1.0, max(0.0, (said.used - 0.8) / 0.2))


# ---- re-listening: Echo (arXiv 2602.11909), R = 0.5 format + 0.5 accuracy + 0.5 segment + segment_flow


def segment(said: Said, example) -> float:
    """1 if the answer is right and the policy heard at least one part of the clip again on the way to it."""
    return float(len(said.heard) > 0 and accuracy(said, example) == 1)


def segment_flow(said: Said, example) -> float:
    """-0.1, five times at most, for every </seg> before a new sentence (an upper-case letter) or another tag:
    the policy has to use what it heard again where it heard it. Echo's consistency penalty."""
    following = re.findall(r"</seg>\s*([^\W\d_]|<)", said.text)
    return -0.1 * min(5, sum(c == "<" or c.isupper() for c in following))


def confident_accuracy(said: Said, example) -> float:
    """Right: 1 - (1 - p)^2; wrong: -p^2; no answer: 0 (Echo's code, times 2).

    p is the probability of the answer's least certain token, and 1 where it is not known.
    """
    p = 1.0 if said.confidence is None else said.confidence
    if accuracy(said, example) == 1:
        return 1 - (1 - p) ** 2
    if resolve(said.text, example.choices) is None:
        return 0.0
    return -(p**2)


def grounding(said: Said, example) -> float:
    """How well the parts heard again meet the true ones: the time in both over the time in either (IoU).

    meta["spans"] holds the true ones: [[start, end], ...] in seconds. 0 without any, or if nothing was heard.
    """
    spans = example.meta.get("spans")
    if not isinstance(spans, list | tuple):
        return 0.0
    true = merge_spans(span for span in spans if is_span(span))
    heard = merge_spans(said.heard)
    if not heard or not true:
        return 0.0
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in heard for c, d in true)
    total = sum(end - start for start, end in heard + true)
    return both / (total - both)


def is_span(span) -> bool:
    """Whether an entry of meta["spans"], which may hold anything, is a pair of numbers start < end."""
    if not isinstance(span, list | tuple) or len(span) != 2:
        return False
    return all(type(x) in (int, float) and abs(x) < 1e9 for x in span) and span[0] < span[1]


def merge_spans(spans) -> list[list[float]]:
    """(start, end) pairs -> the same time as [start, end] lists in order that neither overlap nor touch."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


# ---- Countdown: make a number out of given ones


def countdown(said: Said, example) -> float:
    """1 if the last <answer> uses every number of meta["nums"] exactly once and makes meta["target"]; 0.1 if
    it holds anything else; 0 without one (TinyZero)."""
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
    """An expression of integers and + - * / ( ) -> (its exact value, its integers). Anything else -> None.

    Walks the syntax tree and executes nothing. A power such as 9**9**9 is refused, not computed.
    """
    if not re.fullmatch(r"[\d+\-*/() ]{1,200}", expression):  # short: no deep nesting, no long division
        return None
    numbers = []
    try:
        return node_value(ast.parse(expression.strip(), mode="eval").body, numbers), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def node_value(node: ast.AST, numbers: list[int]) -> Fraction:
    """The value of a node of the syntax tree; its integers are appended to `numbers`. Raises ValueError."""
    match node:
        case ast.Constant(int(n)):
            numbers.append(n)
            return Fraction(n)
        case ast.UnaryOp(ast.UAdd(), operand):
            return node_value(operand, numbers)
        case ast.UnaryOp(ast.USub(), operand):
            return -node_value(operand, numbers)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](node_value(left, numbers), node_value(right, numbers))
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
    """ "accuracy=1,format=0.5" -> {"accuracy": 1.0, "format": 0.5}. Raises ValueError on what is wrong."""
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
    """How the message about an unknown name ends: the nearest known name, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"


def score(said: Said, example, weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    """-> (the weighted sum of the rewards, each reward before its weight)"""
    parts = {name: float(REWARDS[name](said, example)) for name in weights}
    return sum(weights[name] * part for name, part in parts.items()), parts


# ------------------------------------------------------------------------------------------------------------
# The resolver. It replaces every mention of choice i, by its text or by its letter, by one token, the symbol
# "<i>"; then it weighs the symbols by what stands around them. These names mean the same in all passes:
#   items    the tokens of a text
#   low      the same tokens in lower case
#   keys     {the words of a choice: its index}
#   letters  the indices that A, B, ... stand for: of equal choices, that of the first
#   i, at    the place of a token; `end` is the place behind the last one

UNCLEAR = -1  # the index where one spelling stands for several choices
SYMBOL = "<"  # how a symbol begins, and no other token


def resolve(text: str, choices: list[str]) -> int | None:
    """The index of the one choice that a completion gives as its answer, or None. It never guesses.

    What counts, in this order: only what follows </think>; only what stands in <answer>, <response> or
    \\boxed{}; then what is given as the answer, what stands alone, what is concluded, and last what is
    mentioned at all. A choice is named by its text or by its letter, and does not count where it is denied.
    Two different answers are none. Choices that read the same are one, the first.
    """
    given = {resolve_part(part, choices) for part in set(answer_parts(text))}
    return given.pop() if len(given) == 1 else None


def resolve_part(text: str, choices: list[str]) -> int | None:
    """The choice that one part of a completion gives, or None."""
    texts, keys, letters = index_choices(choices)
    boxed = find_boxed(text)
    text = boxed[0] if len(boxed) == 1 else text
    whole = text.strip().casefold()
    for raw in (whole, whole.strip("\"'`*_.“”‘’ \n")):
        if raw in texts:
            return texts[raw]
    items = lex(text)
    words = drop_marks(fold(t) for t in items)
    letter = label_of(words[0], letters) if len(words) == 1 else None
    if words in keys and items[0] not in OPENING:  # "(A)" is a letter
        index = keys[words]
    elif letter is not None:
        index = letter
    else:
        items = with_mentions(items, keys, letters)
        items = with_letters(items, letters, keys)
        index = decide(signals(items), items, letters)
    return None if index == UNCLEAR else index


def index_choices(choices: list[str]) -> tuple[dict, dict, list[int]]:
    """-> ({text: index}, keys, letters)"""
    texts, keys, letters = {}, {}, []
    for i, choice in enumerate(choices):
        first = texts.setdefault(choice.strip().casefold(), i)
        letters.append(first)
        if first == i:
            words = choice_words(choice)
            keys[words] = UNCLEAR if words in keys else i
    keys.pop((), None)
    return texts, keys, letters


# ---- pass 1: the parts of the text that may hold the answer


def answer_parts(text: str) -> list[str]:
    """What stands in <answer> or <response> behind the thinking; or else in \\boxed{}; or else all of it."""
    thinks = list(THINK.finditer(text))
    if thinks:
        last = thinks[-1]
        is_closing = last[1]
        text = text[last.end() :] if is_closing else text[: last.start()]  # <think> hides what follows it
    text = UNWRAP.sub(r"\1", text)  # \boxed{\text{B}}
    parts, start = [], None
    for tag in ANSWER.finditer(text):
        is_closing, boxed = tag.groups()
        if boxed is not None:
            continue
        if start is not None:
            parts.append(text[start : tag.start()])
        start = None if is_closing else tag.end()
    if start is not None:  # cut off before </answer>; or it says <answer> for </answer>
        rest = text[start:]
        if rest.strip() or not parts:
            parts.append(rest)
    return parts or find_boxed(text) or [text]


def find_boxed(text: str) -> list[str]:
    """What stands in each \\boxed{}."""
    return [tag[2] for tag in ANSWER.finditer(text) if tag[2] is not None]


# ---- pass 2: the texts of choices become symbols


def with_mentions(items: list[str], keys: dict, letters: list[int]) -> list[str]:
    """Replace every mention of the text of a choice by its symbol; the longest text wins.

    Other tokens become lower case, but for single characters: they may be the letters of choices.
    """
    low = [fold(t) for t in items]
    # a choice such as "A dog barking" is also named by "dog barking"
    names = {key[1:]: i for key, i in keys.items() if key[0] in ARTICLES and len(key) > 2} | keys
    longest_first = sorted(names, key=len, reverse=True)
    cut = find_cut(low, keys)
    out, at = [], 0
    while at < len(low):
        key, end = find_choice(low, at, longest_first)
        is_cut = end > cut and not LISTING.issuperset(low[cut:at] + low[end:])
        if key and not is_cut and is_mention(items, low, at, end, keys, letters):
            for index in joined_choices(out, low, end, key, keys, longest_first):
                out += [f"<{index}>", "or"]
            out.append(f"<{names[key]}>")
            at = end
            continue
        if len(items[at]) > 1:
            out.append(low[at])
        else:
            out.append(items[at] if at < cut else "…")  # in what is cut off, a letter is no label
        at += 1
    return out


def find_choice(low, at, longest_first) -> tuple[tuple, int]:
    """-> (the words of the longest choice that stands at token `at`, its end); ((), 0) if there is none"""
    for key in longest_first:
        end = match_choice(low, at, key)
        if end:
            return key, end
    return (), 0


def match_choice(low, at, key) -> int:
    """The end of the words `key` if they stand at token `at`, else 0.

    Marks may stand between two of them, and one light word: "A man is speaking" is "A man speaking".
    """
    for k, word in enumerate(key):
        has_light = False
        while k and token_at(low, at) not in (word, "\n"):
            if key[k - 1] in ARTICLES and low[at] in {".", "a"}:  # "A. A dog"
                return 0
            if low[at] not in PUNCT:
                if has_light or low[at] not in LIGHT:
                    return 0
                has_light = True
            at += 1
        if token_at(low, at) != word:
            return 0
        at += 1
    return at


def find_cut(low, keys) -> int:
    """Where a choice begins that the end of the text breaks off. What it mentions itself does not count."""
    if not low or low[-1] in PUNCT:
        return len(low)
    for start in range(max(0, len(low) - 80), len(low) - 1):
        words = drop_marks(low[start:])
        if low[start] not in PUNCT and any(is_broken_off(words, key) for key in keys):
            return start
    return len(low)


def is_broken_off(words, key) -> bool:
    """Whether `words` are the first ones of `key`, the last of them perhaps only in part."""
    n = len(words) - 1
    return len(key) > n and key[:n] == words[:n] and key[n].startswith(words[n]) and key != words


def is_mention(items, low, at, end, keys, letters) -> bool:
    """Whether a choice's text means the choice. "No" and "one" have other uses, and "over 10" is not 10."""
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


def is_letter_text(items, low, at, keys, letters) -> bool:
    """Whether a letter is the text of a choice, as the note A is, and neither a label nor an article."""
    word, after = low[at], token_at(low, at + 1)
    label = label_of(word, letters)
    following = drop_marks(low[at + 1 : at + 5])[:1]
    if label is not None and after in PUNCT and keys.get(following) == label:
        return False  # "D. A", and A is the fourth choice
    if is_marked(low, at):
        return False
    return items[at].isupper() and (word not in "ai" or after in PUNCT | {"or", "and"})


def joined_choices(out, low, end, key, keys, longest_first) -> list[int]:
    """The choices that share words with `key`, and of which only a word that differs is said beside it:
    "acoustic or electric guitar" names both guitars, "10 to 20 seconds" both lengths."""
    differing = []
    before, after = out[-5:][::-1], low[end : end + 5]
    gap = joint_length(before, {"or", "and", "to", "nor", "/", ","})
    if gap:
        differing.append(before[gap].lower())
    gap = joint_length(after, {"or", "nor", "/"})
    if gap and not find_choice(low, end + gap, longest_first)[0]:
        differing.append(after[gap].lower())
    differing = set(differing) - set(key)
    shared = set(key) - LISTING
    return [index for other, index in keys.items() if shared & set(other) and differing & set(other)]


def joint_length(tokens, joints) -> int:
    """How many tokens stand before the first word, if a joint such as "or" is among them; else 0."""
    for n, t in enumerate(tokens):
        if t not in joints and t not in ARTICLES and t != ",":
            return n if joints.intersection(tokens[:n]) else 0
    return 0


# ---- pass 3: the letters of choices become symbols


def with_letters(items: list[str], letters: list[int], keys: dict) -> list[str]:
    """Replace every letter that labels a choice, and is no article, note or initial, by its symbol."""
    low = [t.lower() for t in items] + ["\n", "\n"]  # low[-1] also stands for what is before the beginning
    out = []
    clear, cued = True, False  # only filler since the sentence or a cue began; the cue is "the answer is"
    for i, t in enumerate(items):
        index = label_of(t, letters)
        if index is not None and is_label(items, low, i, clear, cued):
            out.append(f"<{read_label(low, i, index, keys)}>")
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


def is_label(items, low, i, clear, cued) -> bool:
    """Whether the letter at token `i` labels a choice."""
    before, after, is_capital = low[i - 1], low[i + 1], items[i].isupper()
    rest = " ".join(low[i + 1 : i + 11])
    if is_marked(low, i):
        return True
    if before == ":" and low[i - 2] in OPTIONS and (is_capital or after in PUNCT):
        return True
    if before in ARTICLES or NOTE.match(rest):
        return False
    if after not in PUNCT and (AFTER.match(rest) or CHOSEN.match(rest)):
        return clear and (is_capital or before in ANSWERS)
    if low[i] in "ai" and (after[0] == SYMBOL or (after == "\n" and not is_capital and i > 0)):
        return False  # "A dog", "it is a"
    if not is_capital and not cued:  # "b." alone, "b) cat", "a. and b."
        return clear and after in {")", "]", ".", ":"} and before in LISTING and before not in ARTICLES
    is_closed = after in PUNCT or after in CLOSERS or after[0] == SYMBOL
    if is_closed or (cued and re.match(f"[{CJK}]", after)):
        return clear
    is_second = before in {"and", "or", "nor", "/"} and len(items[i - 2]) == 1 and items[i - 2].isupper()
    return clear and is_second  # "A and B are"


def is_marked(low, i) -> bool:
    """Whether a letter is marked as a label: "option B", "(B)"."""
    before, after = token_at(low, i - 1), token_at(low, i + 1)
    return before in OPTIONS or (before in OPENING and after in CLOSING)


def read_label(low, i, index, keys) -> int:
    """The index that the label at token `i` means: its letter's, unless the letter is the text of a choice.

    At the end of the text it is unclear if it may be all that is left of a choice, as "A" of "A dog".
    """
    if is_marked(low, i) or next_word(low, i) == f"<{index}>":
        return index
    is_last = i == len(low) - 3
    if is_last and any(len(key) == 2 and key[0] == low[i] and keys[key] != index for key in keys):
        return UNCLEAR
    return keys.get((low[i],), index)


def is_after_label(items, low, i, out) -> bool:
    """Whether the mark at token `i` stands between a label and what is said of it: "B. cat", "B. Wrong"."""
    if not out or out[-1][0] != SYMBOL or items[i - 1][0] == SYMBOL:
        return False
    return next_word(low, i)[:1] == SYMBOL or AFTER.match(" ".join(low[i + 1 : i + 10])) is not None


def next_word(low, i) -> str:
    """The first of the next three tokens that is a line's end, or neither a mark nor an article; or ""."""
    for t in low[i + 1 : i + 4]:
        if t == "\n" or (t not in PUNCT and t not in ARTICLES):
            return t
    return ""


def cue_level(low, i) -> int:
    """How this word gives the choice behind it: EXPLICIT for "answer", CLAIM for "so", MENTION for no cue.

    "Answer" in "to answer this question" is no cue.
    """
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
    first: int  # where it begins and ends: the places of two symbols, or of the same one
    last: int
    turn: int  # the place of the last word of TURNS before it, or -1


def signals(items: list[str]) -> list[Signal]:
    """How every symbol is given, and whether it is denied: by a negation before it, by what follows it, or by
    a question mark."""
    found = []
    level, turn = MENTION, -1
    open_cue = False  # only filler since an explicit cue: then the cue holds on the next line, too
    for start, end in split_sentences(items):
        sentence, mark = items[start:end], token_at(items, end)
        is_question = mark == "?" and token_at(items, end + 1) not in {"yes", "yeah", "correct"}
        least = TERSE if is_terse(sentence) else MENTION
        negated = find_negated(items, start, end)
        level = level if open_cue else MENTION
        clear = True  # only filler so far
        for i, t in enumerate(sentence, start):
            if t[0] == SYMBOL:
                after = " ".join(items[i + 1 : i + 10])
                is_denied = AFTER.match(after) is not None
                if is_denied:
                    deny_listed(found, items, i)
                rank = EXPLICIT if CHOSEN.match(after) else max(level, least)
                denied = is_denied or is_question or i in negated
                found.append(Signal(int(t[1:-1]), rank, denied, i, i, turn))
                clear = open_cue = False
                continue
            cue = cue_level(items, i)
            level = max(level, cue, CLAIM if clear and t in VERBS else MENTION)
            if t in REASONS or (level == EXPLICIT and is_negator(items, i)):
                level = MENTION
            open_cue = cue == EXPLICIT or (open_cue and t in FILLER)
            clear = t == "," or (clear and t in FILLER)
            turn = i if t in TURNS else turn
        open_cue = open_cue and mark == "\n"
    return found


def split_sentences(items) -> list[tuple[int, int]]:
    """(start, end) of each sentence, with its mark at `end`. "Dog. Or cat." is one sentence."""
    glue = {"or", "and", ")"}
    ends = [i for i, t in enumerate(items) if t in ENDS and token_at(items, i + 1) not in glue]
    return [(before + 1, end) for before, end in itertools.pairwise([-1, *ends, len(items)])]


def is_terse(sentence) -> bool:
    """Whether there is nothing but symbols and filler, and no verb."""
    return all(t[0] == SYMBOL or t in VERBLESS for t in sentence)


def find_negated(items, start, end) -> set[int]:
    """The places in a sentence that a negation reaches, up to a word of RESETS: "not a dog but a cat"."""
    reached = set()
    negated = in_list = False  # in_list: "or" and the like came behind the negation
    for i in range(start, end):
        t = items[i]
        if negated:
            reached.add(i)
        if is_negator(items, i):
            negated, in_list = True, t == "nor"
        elif t in JOINTS:
            in_list = True
        elif t in RESETS and (in_list or not continues_list(items, i)):
            negated = negated and t == "as"  # "not ... such as"
    return reached


def is_negator(items, i) -> bool:
    """Whether the token is a negation, and not that of "not only"."""
    is_negation = items[i] in NEGATORS or items[i].endswith("n't")
    return is_negation and token_at(items, i + 1) not in {"only", "just", "merely"}


def continues_list(items, i) -> bool:
    """Whether the token is a comma between two symbols: "not happy, sad, or angry"."""
    if items[i] != "," or token_at(items, i - 1)[0] != SYMBOL:
        return False
    return re.match(r"(?:(?:or|nor|and|a|an|the) )*<", " ".join(items[i + 1 : i + 6])) is not None


def deny_listed(found, items, at) -> None:
    """Deny every signal that is listed with the denied symbol at `at`: "dog and cat are wrong"."""
    for signal in reversed(found):
        if not BESIDE.issuperset(items[signal.last + 1 : at]):
            break
        signal.denied = True
        at = signal.first


# ---- pass 5: the strongest signal decides


def decide(found: list[Signal], items: list[str], letters: list[int]) -> int | None:
    """The index that is given in the strongest way, if it is one, and nothing later takes it back."""
    found = drop_options(merge_signals(found, items), items, letters)
    found = [s for s in found if not s.denied]
    if not found:
        return None
    level = max(s.level for s in found)
    if level < TERSE and REFUSAL.search(" ".join(items)):
        return None
    given = [s for s in found if s.level == level]
    last = given[-1].first
    given += [s for s in found if s.first > last and (s.level >= CLAIM or s.turn > last)]
    chosen = {s.index for s in given}
    alone = {s.index for s in found if s.level == TERSE}
    if len(alone) == 1:  # if one stands alone and another is the answer, it is none; several are an analysis
        chosen |= alone
    return chosen.pop() if len(chosen) == 1 else None


def merge_signals(found, items) -> list[Signal]:
    """Signals of one choice side by side become one: "B. cat"."""
    merged = []
    for s in found:
        before = merged[-1] if merged else None
        if before and before.index == s.index and BESIDE.issuperset(items[before.last + 1 : s.first]):
            before.level = max(before.level, s.level)
            before.denied = before.denied or s.denied
            before.last = s.last
        else:
            merged.append(s)
    return merged


def drop_options(found, items, letters) -> list[Signal]:
    """Drop the options where they are listed as the question lists them: all, each once, with nothing but
    commas and the like between them."""
    distinct = [index for index, _ in itertools.groupby(letters)]  # equal choices side by side may be one
    kept, i = [], 0
    while i < len(found):
        listed = listed_options(letters, found, i, items) or listed_options(distinct, found, i, items)
        if not listed:
            kept.append(found[i])
        i += listed or 1
    return kept


def listed_options(options, found, i, items) -> int:
    """How many signals, from signal `i` on, list all the options in any order; 0 if they do not."""
    run = found[i : i + len(options)]
    if len(run) < 2 or any(s.denied for s in run) or sorted(s.index for s in run) != sorted(options):
        return 0
    are_close = all(LISTING.issuperset(items[a.last + 1 : b.first]) for a, b in zip(run, run[1:]))
    return len(run) if are_close else 0


# ---- tokens


def lex(text: str) -> list[str]:
    """The tokens of a text in their own case. Spellings that mean the same become one first."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, plain in SPELLINGS.items():
        text = re.sub(pattern, plain, text, flags=re.IGNORECASE)
    return TOKEN.findall(text)


def fold(token: str) -> str:
    """Lower case, and without 's: "a woman's voice" mentions a woman."""
    token = token.casefold()
    return token if token in FILLER else token.removesuffix("'s")


def drop_marks(items) -> tuple[str, ...]:
    return tuple(t for t in items if t not in PUNCT)


@functools.lru_cache(4096)
def choice_words(text: str) -> tuple[str, ...]:
    """A choice as the resolver compares it: its tokens, folded and without punctuation."""
    return drop_marks(fold(t) for t in lex(text))


def label_of(token: str, letters: list[int]) -> int | None:
    """The index of the choice that a letter stands for, or None."""
    i = string.ascii_lowercase.find(token.lower()) if len(token) == 1 else -1
    return letters[i] if 0 <= i < len(letters) else None


def token_at(items, i) -> str:
    """The token at `i`; before the beginning and behind the end stands a line's end."""
    return items[i] if 0 <= i < len(items) else "\n"


# ------------------------------------------------------------------------------------------------------------
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
    | \n
    | [.,;:!?()\[\]/=—。、✓✔✅✗✘❌]
    """,
    re.VERBOSE,
)

# "A sharp" is a note only before "major" and the like: "a sharp sound" is none.
NOTE_A = r"a(?=-|\s(?:sharp|flat)\s(?:major|minor|maj|min)\b)"
# Spellings made one before the tokens: "10-20" is "10 to 20", "C sharp" is "C#", a dash between words is a
# mark, and "non-vocal" and "dog-like" are one word, which mentions neither vocals nor a dog.
SPELLINGS = {
    r"\b(?:far from|(?:anything|everything|all) but|instead of|least likely)\b": "except",
    r"\b(?:no|without|beyond)(?: any| a| all)? (?:doubt|question)\b": "surely",
    r"<[|/]{0,2}\w+[|/]?>": " ",
    UNWRAP.pattern: r"\1",
    r"\[ \]": "✗",
    r"\[x\]": "✓",
    "[’`´]": "'",
    "_": " ",
    "♯": "#",
    "♭": "b",
    r"(?<=\d)\s*[-–—~]\s*(?=\d)": " to ",
    r"(?<!\S)[-–—]+(?!\S)|[–—]|-{2,}|[-=]>|→": " — ",
    rf"\b([b-g]|{NOTE_A})[\s-]sharp\b": r"\1#",
    rf"\b([b-g]|{NOTE_A})[\s-]flat\b": r"\1b",
    r"\b(non|un|anti|counter|dis|semi|pseudo|quasi)-(?=\w)": r"\1",
    r"-(?=(?:like|free|less|ish)\b)": "",
    r"\n\s*": "\n",
}

# The next three read the tokens that follow a letter or a symbol, joined by spaces. In VERBOSE [ ] is one.
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

# ------------------------------------------------------------------------------------------------------------
# The resolver's words


def word_set(text: str) -> set[str]:
    return set(text.split())


PUNCT, ENDS = set(".,;:!?()[]/=—。、\n"), set(".!?;\n。")
OPENING, CLOSING = {"(", "["}, {")", "]"}
ARTICLES = {"a", "an", "the"}
LIGHT = ARTICLES | word_set("is are was were")  # may stand within the text of a choice: "A man is speaking"

# Words before an answer.
ANSWERS = word_set("""
    answer ans antwort ответ respuesta réponse risposta resposta cevap jawaban उत्तर 答 选 選 답
""")
OPTIONS = word_set("option choice letter opción opcion opção opzione вариант 项 項 肢")
BEST = word_set("best top correct right final my likely appropriate suitable accurate matching chosen")
# Beside these, "answer" is a verb or the question's: "to answer", "answer this".
BEFORE_VERB = word_set("to can cannot can't not no")
AFTER_VERB = word_set("this that the your question options choices")
CONCLUDE = word_set("""
    so therefore thus hence must choose chose choosing chosen select selected pick picked go going
    conclude conclusion guess think believe
""")
VERBS = CONCLUDE | word_set("is it's that's are was say sounds seems")
HEDGES = word_set("be could might may would maybe perhaps possibly potentially presumably")

# What may stand between the choices of a list; of that, the words; of that, what does not end a sentence.
LISTING = (
    PUNCT | ARTICLES | word_set("and or nor to vs option options choice choices 或 和 oder und o y ou et")
)
JOINTS = LISTING - PUNCT - ARTICLES
BESIDE = LISTING - ENDS
# What may stand around an answer and adds nothing to it; of that, what is not part of a statement.
FILLER = (
    LISTING
    | HEDGES
    | ANSWERS
    | OPTIONS
    | BEST
    | VERBS
    | word_set("""
    answers should could will it its i i'd i'll i'm we this that most more probably definitely clearly
    surely certainly simply just in with for on sound heard hear clip audio like as appears here there's
    okay ok well sure yes no wait actually hmm but not sorry rather instead finally overall summary edit
    second now 案 应 該 该 是 为 択 择 え は 我 正 确 解 で す 은 는 정 ist lautet die der das richtige
    korrekte la el es correcta una est bonne correcte правильный это é è correta
""")
)
VERBLESS = FILLER - VERBS - HEDGES

# Words behind which there is no answer any more; behind which an answer may be taken back.
REASONS = word_set("because since as given due while whereas although though 因 weil porque")
TURNS = word_set("""
    wait actually hmm however but no sorry correction scratch reconsider alternatively although though
    maybe perhaps possibly potentially oops hold initially edit second now
""")
# Negations, and how far they reach.
NEGATORS = word_set("""
    not no never neither nor none non nothing nowhere nobody without except excluding unlike than cannot
    isnt doesnt dont cant wont didnt wasnt arent hardly barely rarely scarcely less unlikely impossible
    doubt doubtful fails lacks lacking hard difficult it'd worst wrong incorrect false whether if unable
    unclear unsure avoid refuse disagree opposite opposed against zero rule ruled ruling rules eliminate
    eliminated eliminating eliminates exclude excluded reject rejected rejecting discard discarded dismiss
    dismissed 不 没 非 無 无 未 nicht kein keine keinen weder pas ni ne не нет não nem नहीं ✗ ✘ ❌
""")
RESETS = REASONS | word_set("""
    , ) — 、 but so therefore thus hence however then 而 但 所 sondern sino mais pero aber mas а
""")

# What stands beside a word that names no choice, or a choice's letter: "over 10 seconds", "no, it is not",
# "the first one", "B because".
LIMITS = word_set("over under above below least most beyond")
AFTER_NO = PUNCT | REASONS | word_set("i it there he she they this that we the or and")
BEFORE_ONE = ARTICLES | word_set("""
    this that which no any first second third last only each every other another correct
""")
CLOSERS = REASONS | word_set("or and nor but not for with which over rather except unlike than ✓ ✔ ✅ ✗ ✘ ❌")
