"""Text -> reward. One resolver maps a completion to one choice or to none, for training and for evaluation alike.

A reward is a plain function (completion, example) -> float in REWARDS; `--reward accuracy=1,format=0.5` weighs them and the
log holds each before weighting. To add one, write the function and add its name to the dict. A reward never raises on
what a model wrote and never executes it. This file needs no torch.
"""

import ast
import difflib
import math
import operator
import re
import unicodedata
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# The resolver

# One token: a CJK character; a number with its sign, decimals and percent; or a word ("C#" is one, "isn't" is one). Vowel
# signs, as in Hindi, are no \w and yet part of their word.
MARKS = "".join(chr(c) for c in range(0x300, 0x3000) if unicodedata.category(chr(c))[0] == "M")
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|(?<!\w)-?\d+(?:[.,:/]\d+)*%?(?![^\W\d_])|"
                   rf"(?:[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[{MARKS}])+(?:'[^\W\d_]+)?[#♯]?|[.,;:!?，。；：！？\n]")
STOPS = set(".,;:!?\n") | {"but"}  # marks that end a clause (NFKC has made the full-width ones plain)
NEGATORS = set("not no never nor neither without except excluding unlike instead rather cannot isn't aren't wasn't weren't "
               "doesn't don't didn't can't won't isnt doesnt dont cant 不 非 没".split())
REJECTED = {"incorrect", "wrong", "false", "not", "impossible", "excluded", "eliminated", "unlikely"}
FILLER = set("the correct final best right my answer answers option choice is would be it it's its i i'd choose select pick "
             "letter so therefore thus hence sure sound heard hear this that's that clip audio most likely , . : !".split())
CUE = re.compile(r"\b(?:answer|option|choice)\b(?:\s+(?:is|would be|must be|should be))?[\s:*_\"'(\[-]*|答案是?[:\s]*",
                 re.IGNORECASE)
LABEL = re.compile(r"[\s*_\"'`]*(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\s*[.):\]])(?!\w)[\s*_:.-]*")
THINK = re.compile(r"<\s*(/?)\s*think(?:ing)?\s*>", re.IGNORECASE)
ANSWER = re.compile(r"<\s*(/?)\s*(?:answer|response)\s*>|\\boxed\s*\{(?:\\(?:text|mathrm|textbf)\s*\{)?([^{}]*)\}",
                    re.IGNORECASE)


def tokens(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("_", " ")
    return [t if t in FILLER else t.removesuffix("'s") for t in TOKEN.findall(text)]  # "a woman's voice" mentions a woman


def words(text: str) -> tuple[str, ...]:
    """A choice as the resolver compares it: its tokens without punctuation."""
    return tuple(t for t in tokens(text) if t not in STOPS or t == "but")


def resolve(text: str, choices: list[str]) -> int | None:
    """The one choice that a completion gives as its answer, or None: never a guess, never a fallback.

    What counts, in this order: only what follows </think>; only what stands in <answer>, <response> or \\boxed{};
    the text of a choice, its letter, or both if they agree; after a cue ("the answer is"); else the only choice that is
    mentioned and not denied. Two different answers are none. Choices that read the same are one (the first index).
    """
    found = {resolve_part(part, choices) for part in answer_parts(text)}
    return found.pop() if len(found) == 1 else None


def answer_parts(text: str) -> list[str]:
    """The pieces of a completion that may hold its answer; none if it never stopped thinking."""
    thinks = list(THINK.finditer(text))
    if thinks:  # an unclosed <think> hides all that follows it
        text = text[thinks[-1].end():] if thinks[-1].group(1) else text[:thinks[-1].start()]
    parts, start, boxed = [], None, []
    for m in ANSWER.finditer(text):
        if m.group(2) is not None:
            boxed.append(m.group(2))
        elif not m.group(1):
            start = m.end()
        elif start is not None:
            parts.append(text[start:m.start()])
            start = None
    if start is not None:  # cut off before </answer>
        parts.append(text[start:])
    if not parts and not boxed and not text.strip():
        return []
    return parts or boxed or [ANSWER.sub(" ", text)]


def resolve_part(text: str, choices: list[str]) -> int | None:
    texts = {}  # raw text -> first index
    keys = {}  # words -> first index, or None where choices that differ only in punctuation share them
    for i, choice in enumerate(choices):
        raw = choice.strip().casefold()
        if raw not in texts:
            texts[raw] = i
            key = words(choice)
            keys[key] = None if key in keys else i
    keys.pop((), None)
    boxed = [m.group(2) for m in ANSWER.finditer(text) if m.group(2) is not None]
    text = boxed[-1] if len(boxed) == 1 else text
    for stripped in (text.strip(), text.strip().strip("\"'`*_.“”‘’ \n")):
        if stripped.casefold() in texts:
            return texts[stripped.casefold()]
    found = short_answer(text, keys, len(choices))
    if found:
        return found.pop() if len(found) == 1 else None
    after_cue = set()
    for m in list(CUE.finditer(text))[-20:]:  # a bound on the work, not a rule: who says it 20 times says no more
        sentence = re.split(r"[.!?](?:\s|$)|\n", text[m.end():m.end() + 400].strip(" \n"), maxsplit=1)[0]
        after_cue |= short_answer(sentence, keys, len(choices)) or label_after_cue(text[m.end():], keys, len(choices)) \
            or mentions(tokens(sentence), keys)
    found = after_cue or mentions(tokens(text), keys)
    return found.pop() if len(found) == 1 else None


def short_answer(text: str, keys: dict, n: int) -> set:
    """{index} if the text is nothing but a choice, a letter, or both; both but disagreeing: two indices."""
    read, start, longest = words(text), 0, max(map(len, keys), default=0)
    while start < len(read) and read[start] in FILLER and not (len(read) - start <= longest and read[start:] in keys):
        start += 1
    read = read[start:]
    if read in keys:
        return {keys[read]}
    if len(read) == 1 and len(read[0]) == 1 and read[0].isascii() and read[0].isalpha():
        return {ord(read[0]) - 97} if ord(read[0]) - 97 < n else set()
    label = LABEL.match(CUE.sub("", text, count=1) if CUE.match(text.strip()) else text)
    if label:
        letter, rest = ord((label.group(1) or label.group(2)).lower()) - 97, label.string[label.end():]
        if letter < n:
            return {letter} | (mentions(tokens(rest), keys) or other_labels(rest, n))
    return set()


def label_after_cue(text: str, keys: dict, n: int) -> set:
    """ "option B because ..." : a capital letter right after the cue; "a dog" after it is an article."""
    m = re.match(r"([A-Z])(?![\w#♯'])(?!\s+(?:minor|major|flat|sharp))", text)
    if not m or ord(m.group(1)) - 65 >= n:
        return set()
    rest = re.split(r"[.!?](?:\s|$)|\n", text[m.end():m.end() + 400], maxsplit=1)[0]
    return {ord(m.group(1)) - 65} | mentions(tokens(rest), keys) | other_labels(rest, n)


def other_labels(text: str, n: int) -> set:
    return {ord(c) - 65 for c in re.findall(r"(?<![\w'])([B-Z])(?![\w'#♯])", text[:2000]) if ord(c) - 65 < n}


def mentions(read: list[str], keys: dict) -> set:
    """Indices of the choices that a token list mentions and does not deny; a longer choice hides one inside it."""
    by_first = {}
    for key in sorted(keys, key=len, reverse=True):
        by_first.setdefault(key[0], []).append(key)
    flat = [(i, t) for i, t in enumerate(read) if t not in STOPS or t == "but"]
    plain = [t for _, t in flat]
    found, at = set(), 0
    while at < len(plain):
        for key in by_first.get(plain[at], ()):
            if tuple(plain[at:at + len(key)]) == key:
                if not denied(read, flat[at][0], flat[at + len(key) - 1][0]):
                    found.add(keys[key])
                at += len(key) - 1
                break
        at += 1
    return found


def denied(read: list[str], first: int, last: int) -> bool:
    """Is the mention read[first..last] negated: "not a dog", "rather than a dog", "a dog is wrong"?"""
    for token in read[max(0, first - 6):first][::-1]:
        if token in STOPS:
            break
        if token in NEGATORS:
            return True
    after = read[last + 1:last + 4]
    return bool(after) and (after[0] in NEGATORS and after[0].endswith("n't")
                            or after[0] in {"is", "are", "was", "were"} and bool(REJECTED & set(after[1:3])))


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def accuracy(completion: str, example) -> float:
    """1 if the completion resolves to the right choice (by text: a choice may stand twice)."""
    index = resolve(completion, example.choices)
    right = index is not None and example.answer is not None and (
        index == example.answer or words(example.choices[index]) == words(example.choices[example.answer]) != ())
    return float(right)


def one_block(tag: str, text: str) -> str:
    """A fullmatch-able pattern would backtrack; this walks: the rest after exactly one <tag>...</tag> at the start."""
    head, middle, tail = text.partition(f"</{tag}>")
    return tail if head.startswith(f"<{tag}>") and head.count(f"<{tag}>") == 1 and middle else "no block"


def format(completion: str, example) -> float:  # noqa: A001 - the name users write in --reward
    """1 if the completion is one <answer> block and nothing else (R1-AQA, arXiv 2503.11197)."""
    return float(one_block("answer", completion.strip()) == "")


def think_format(completion: str, example) -> float:
    """1 if the completion is one <think> block and one <answer> block (R1-AQA's thinking mode)."""
    return float(one_block("answer", one_block("think", completion.strip()).strip()) == "")


def arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """The value of an expression of integers and + - * / ( ), and its integers; None if it is anything else.

    Walks the syntax tree and executes nothing: 9**9**9 is refused and not computed. Exact: 1/3*3 is 1.
    """
    numbers = []

    def value(node) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise ValueError

    if len(expression) > 200 or not re.fullmatch(r"[\d+\-*/() ]+", expression):  # short: no deep nesting, no long division
        return None
    try:
        return value(ast.parse(expression.strip(), mode="eval").body), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def countdown(completion: str, example) -> float:
    """TinyZero's: 1 if the last <answer> uses every number of `meta["nums"]` exactly once and gives `meta["target"]`,
    0.1 for any other answer in its tags, else 0."""
    answers = re.findall(r"<answer>([^<]*)</answer>", completion)
    if not answers:
        return 0.0
    found = arithmetic(" ".join(answers[-1].split()).removesuffix(f"= {example.meta.get('target')}"))
    right = found and found[0] == example.meta.get("target") and sorted(found[1]) == sorted(example.meta.get("nums", []))
    return 1.0 if right else 0.1


def countdown_last_line(completion: str, example) -> float:
    """The same, looking only at the last line, as TinyZero's code does."""
    return countdown(completion.rstrip().rpartition("\n")[2], example)


REWARDS = {"accuracy": accuracy, "format": format, "think_format": think_format, "countdown": countdown,
           "countdown_last_line": countdown_last_line}


def parse_rewards(spec: str) -> dict[str, float]:
    """ "accuracy=1,format=0.5" -> {"accuracy": 1.0, "format": 0.5}. Raises ValueError naming the nearest reward."""
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
    close = difflib.get_close_matches(name, known, 1, 0.4)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(known)})"


def score(completion: str, example, weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    """-> (weighted sum, each part before weighting)"""
    parts = {name: REWARDS[name](completion, example) for name in weights}
    return sum(weights[name] * part for name, part in parts.items()), parts
