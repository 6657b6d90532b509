"""Text -> reward. One resolver maps a completion to one choice or to none, for training and for evaluation alike.

A reward is a plain function (completion, example) -> float in REWARDS; `--reward accuracy=1,format=0.5` weighs them and the
log holds each before weighting. To add one, write the function and add its name to the dict. A reward never raises on
what a model wrote and never executes it. This file needs no torch.
"""

import ast
import dataclasses
import difflib
import functools
import itertools
import math
import operator
import re
import string
import unicodedata
from fractions import Fraction

# ---------------------------------------------------------------------------------------------------------------------
# The resolver

# One token: a CJK character; a number with its sign, decimals and percent; a word ("C#" is one, "isn't" is one); or a mark.
# Vowel signs, as in Hindi, are no \w and yet part of their word.
MARKS = "".join(chr(c) for c in range(0x300, 0x3000) if unicodedata.category(chr(c))[0] == "M")
CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
TOKEN = re.compile(
    rf"[{CJK}]|(?<!\w)-?\d+(?:[.,:/]\d+)*%?(?![^\W\d_])|(?:[^\W{CJK}]|[{MARKS}])+(?:'[^\W\d_]+)?#?|"
    r"\n\s*|[.,;:!?()\[\]/=—。、✓✔✅✗✘❌]"
)
PUNCT, ENDS = set(".,;:!?()[]/=—。、\n"), set(".!?;\n。")
UNWRAP = re.compile(r"\\(?:text|math)\w*\s*\{([^{}]*)\}")  # \text{B}, \mathbf{B}
NOTE_A = r"a(?=-|\s(?:sharp|flat)\s(?:major|minor|maj|min)\b)"  # "a sharp sound" is no note
# Spellings made one before the tokens: "10-20" is "10 to 20", "C sharp" is "C#", a dash between words is a mark, and
# "non-vocal" and "dog-like" are one word, which mentions neither vocals nor a dog.
SPELLINGS = [
    (re.compile(pattern, re.IGNORECASE), plain)
    for pattern, plain in (
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
]

ARTICLES = {"a", "an", "the"}
ANSWERS = set(
    "answer ans antwort ответ respuesta réponse risposta resposta cevap jawaban उत्तर 答 选 選 답".split()
)
OPTIONS = set("option choice letter opción opcion opção opzione вариант 项 項 肢".split())
BEST = set("best top correct right final my likely appropriate suitable accurate matching chosen".split())
CONCLUDE = set(
    "so therefore thus hence must choose chose choosing chosen select selected pick picked go going conclude "
    "conclusion guess think believe".split()
)
VERBS = CONCLUDE | set("is it's that's are was say sounds seems".split())
HEDGES = set("be could might may would maybe perhaps possibly potentially presumably".split())
LISTING = (
    PUNCT | ARTICLES | set("and or nor to vs option options choice choices 或 和 oder und o y ou et".split())
)
# Words that may stand around an answer and add nothing to it.
FILLER = (
    LISTING
    | HEDGES
    | ANSWERS
    | OPTIONS
    | BEST
    | VERBS
    | set(
        "answers should could will it its i i'd i'll i'm we this that most more probably definitely clearly surely "
        "certainly simply just in with for on sound heard hear clip audio like as appears here there's okay ok well "
        "sure yes no wait actually hmm but not sorry rather instead finally overall summary edit second now 案 应 該 该 "
        "是 为 択 择 え は 我 正 确 解 で す 은 는 정 ist lautet die der das richtige korrekte la el es correcta una "
        "est bonne correcte правильный это é è correta".split()
    )
)
REASONS = set(
    "because since as given due while whereas although though 因 weil porque".split()
)  # no answer follows these
TURNS = set(
    "wait actually hmm however but no sorry correction scratch reconsider alternatively although though maybe perhaps "
    "possibly potentially oops hold initially edit second now".split()
)  # an answer may be taken back
NEGATORS = set(
    "not no never neither nor none non nothing nowhere nobody without except excluding unlike than cannot isnt "
    "doesnt dont cant wont didnt wasnt arent hardly barely rarely scarcely less unlikely impossible doubt doubtful "
    "fails lacks lacking hard difficult it'd worst wrong incorrect false whether if unable unclear unsure avoid "
    "refuse disagree opposite opposed against zero rule ruled ruling rules eliminate eliminated eliminating "
    "eliminates exclude excluded reject rejected rejecting discard discarded dismiss dismissed 不 没 非 無 无 未 "
    "nicht kein keine keinen weder pas ni ne не нет não nem नहीं ✗ ✘ ❌".split()
)
RESETS = REASONS | set(
    ", ) — 、 but so therefore thus hence however then 而 但 所 sondern sino mais pero aber mas а".split()
)
LIMITS = set("over under above below least most beyond".split())  # "over 10 seconds"
PRONOUNS = set("i it there he she they this that we the or and".split())  # "no it is not"
BEFORE_ONE = ARTICLES | set(
    "this that which no any first second third last only each every other another correct".split()
)
CLOSERS = REASONS | set(
    "or and nor but not for with which over rather except unlike than ✓ ✔ ✅ ✗ ✘ ❌".split()
)  # "B or"
# A choice is denied by what follows it: "is not", ": incorrect", "(wrong)", "can be ruled out" ...
AFTER = re.compile(
    r"(?:(?:[:()\]—]|,(?= (?:is|are|was|were|which)\b)|which|is|are|was|were|be|been|can|could|should|would|will|the|may|might|"
    r"must|do|does|did|has|have|had|seems?|sounds?|looks?|appears?|to|also|all|both|clearly|definitely|probably|simply|just|"
    r"obviously|really|very|most|highly|therefore|thus|option|choice|ist|es|est|n'est|das|here|completely|totally|quite) )*"
    r"(?:(?:not|nicht|не|no es|pas)(?! (?:(?:a|an|the|option) )?<| only| just)|\w+n't|cannot|never|neither|"
    r"hardly|unlikely|improbable|(?<=the )except|less|least|nowhere|by no means|makes? no|out of|off(?= \W|$)|if (?!i\b)|"
    r"impossible|wrong|incorrect|false|absent|missing|inaudible|ruled|eliminated|excluded|discarded|rejected|dismissed|irrelevant|inaccurate|"
    r"untrue|implausible|doubtful|değil|नहीं|(?:で は|じ ゃ) (?:な|あ)|(?:[이가은는] )?아 [니닌])\b|"
    r"would\b(?! be)|(?:is|was) the (?:\w+ ){0,4}not\b(?! (?:(?:a|an|the|option) )?<)|[:?(—] no(?= [^\w<]|$)|"
    r"(?:is what )?it (?:isn't|is not)(?= [^\w<]|$)|[✗✘❌]|"
    r"[.\n:?] (?:(?:this|that|it) is |that's |it's )?"
    r"(?:incorrect|wrong|false|not (?:heard|correct|right|present|likely|it))(?: \W|$)"
)
# ... or chosen: "is correct", "would be the best answer".
CHOSEN = re.compile(
    r"[✓✔✅]|(?:is|was|seems|appears|would be|must be|as|to be|ist|es|est|是)(?: (?:to|be|the|my|most|more|best|correct|likely|"
    r"right|final|only|clearly|definitely|indeed|therefore|accurate|appropriate))* (?:answer|option|choice|match|"
    r"(?:correct|right|best|正 确|对|richtig)(?= [^\w]|$| answer| option| choice))"
)
NOTE = re.compile(
    r"(?:: )?(?:maj|min|dim|aug|sus|flat|sharp|dorian|phrygian|lydian|mixolydian|aeolian|locrian)"
)
REFUSAL = re.compile(
    r"\bno (?:audio|sound|clip|recording|file|attachment)\b(?! other)|\bas an ai\b|audio (?:is|was|were) (?:missing|not)|"
    r"(?:please|could you) (?:provide|upload|share)|(?:can't|cannot|can not|couldn't|unable to|not able to|impossible to)"
    r"(?: \w+)? (?:be )?(?:listen|access|process|play|analyze|determine|tell|answer|know|say|help|assist|identify|"
    r"hear (?:the|any|this|that|your) (?:audio|sound|clip|recording|file))"
)
THINK = re.compile(r"<\s*(?:(/)\s*)?think(?:ing)?\s*>", re.IGNORECASE)
ANSWER = re.compile(r"<\s*(?:(/)\s*)?(?:answer|response)\s*>|\\boxed\s*\{([^{}]*)\}", re.IGNORECASE)
MENTION, CLAIM, TERSE, EXPLICIT = range(
    4
)  # how a choice is given: in passing, "so it is X", "X.", "the answer is X"


@dataclasses.dataclass
class Signal:
    """One place where a choice is named."""

    index: int
    level: int
    denied: bool
    first: int  # where it stands
    last: int
    turn: int  # where the last word of TURNS before it stands


def lex(text: str) -> list[str]:
    """Tokens in their own case."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, plain in SPELLINGS:
        text = pattern.sub(plain, text)
    return ["\n" if t[0] == "\n" else t for t in TOKEN.findall(text)]


def fold(token: str) -> str:
    token = token.casefold()
    return token if token in FILLER else token.removesuffix("'s")  # "a woman's voice" mentions a woman


def tokens(text: str) -> list[str]:
    return [fold(t) for t in lex(text)]


@functools.lru_cache(4096)
def words(text: str) -> tuple[str, ...]:
    """A choice as the resolver compares it: its tokens without punctuation."""
    return tuple(t for t in tokens(text) if t not in PUNCT)


def resolve(text: str, choices: list[str]) -> int | None:
    """The one choice that a completion gives as its answer, or None: never a guess, never a fallback.

    What counts, in this order: only what follows </think>; only what stands in <answer>, <response> or \\boxed{}; then what
    is given as the answer, what stands alone, what is concluded, and last what is mentioned at all; by the text of a choice or
    by its letter, unless denied. Two different answers are none. Choices that read the same are one (the first index).
    """
    given = None
    for part in set(answer_parts(text)):
        index = resolve_part(part, choices)
        if index is None or given not in (None, index):
            return None
        given = index
    return given


def answer_parts(text: str) -> list[str]:
    """The pieces of a completion that may hold its answer; none if it never stopped thinking."""
    thinks = list(THINK.finditer(text))
    if thinks:  # an unclosed <think> hides all that follows it
        text = text[thinks[-1].end() :] if thinks[-1].group(1) else text[: thinks[-1].start()]
    text = UNWRAP.sub(r"\1", text)  # \boxed{\text{B}}
    parts, start, boxed = [], None, []
    for m in ANSWER.finditer(text):
        if m.group(2) is not None:
            boxed.append(m.group(2))
            continue
        if start is not None:
            parts.append(text[start : m.start()])
        start = None if m.group(1) else m.end()
    if start is not None and (
        text[start:].strip() or not parts
    ):  # cut off before </answer>; or <answer> for </answer>
        parts.append(text[start:])
    return parts or boxed or [text]


def resolve_part(text: str, choices: list[str]) -> int | None:
    """Three passes: choices become symbols, letters become symbols, and every symbol is weighed."""
    texts, keys, letters = (
        {},
        {},
        [],
    )  # raw text -> first index; words -> it, or -1 where punctuation tells choices apart
    for i, choice in enumerate(choices):
        raw = choice.strip().casefold()
        letters.append(texts.setdefault(raw, i))
        if letters[i] == i:
            keys[words(choice)] = -1 if words(choice) in keys else i
    keys.pop((), None)
    boxed = [m.group(2) for m in ANSWER.finditer(text) if m.group(2) is not None]
    text = boxed[-1] if len(boxed) == 1 else text
    for stripped in (text.strip(), text.strip().strip("\"'`*_.“”‘’ \n")):
        if stripped.casefold() in texts:
            return texts[stripped.casefold()]
    items = lex(text)
    said = tuple(fold(t) for t in items if t not in PUNCT)
    if said in keys and items[0] not in "([":
        index = keys[said]
    elif len(said) != 1 or (index := label_of(said[0], letters)) is None:
        items = with_letters(with_mentions(items, keys, letters), letters, keys)
        index = decide(unlisted(signals(items), items, letters), REFUSAL.search(" ".join(items)) is not None)
    return None if index == -1 else index


def with_mentions(items: list[str], keys: dict, letters: list[int]) -> list[str]:
    """Every mention of the text of choice i becomes "<i>"; the longest wins. The rest is folded, all but letters."""
    low, out, at, by_first = [fold(t) for t in items], [], 0, {}
    shorter = {
        key[1:]: i for key, i in keys.items() if key[0] in ARTICLES and len(key) > 2
    }  # without its article
    names = shorter | keys
    for key in sorted(names, key=len, reverse=True):
        by_first.setdefault(key[0], []).append(key)

    def find(at: int) -> tuple:
        return next(
            (
                (key, end)
                for key in by_first.get("".join(low[at : at + 1]), ())
                if (end := match(low, at, key))
            ),
            ((), 0),
        )

    cut = cut_off(low, keys)
    while at < len(low):
        key, end = find(at)
        whole = end <= cut or not set(low[cut:at] + low[end:]) - LISTING
        if key and whole and stands(items, low, at, end, letters, keys):
            out += [
                t
                for other in joined(out, low[end : end + 5], key, keys, find, end)
                for t in (f"<{keys[other]}>", "or")
            ]
            out.append(f"<{names[key]}>")
            at = end
        else:
            out.append(low[at] if len(items[at]) > 1 else items[at] if at < cut else "…")
            at += 1
    return out


def match(low: list[str], at: int, key: tuple) -> int:
    """Where `key` ends if it starts at token `at`, over marks and one light word between two of its own; else 0."""
    for k, word in enumerate(key):
        spare = True
        while k and at < len(low) and low[at] != word and low[at] != "\n":
            if key[k - 1] in ARTICLES and low[at] in {".", "a"}:
                return 0  # "A. A dog"
            if low[at] not in PUNCT:
                if not spare or low[at] not in {"is", "are", "was", "were", "a", "an", "the"}:
                    return 0
                spare = False
            at += 1
        if at >= len(low) or low[at] != word:
            return 0
        at += 1
    return at


def cut_off(low: list[str], keys: dict) -> int:
    """Where a choice begins that the end of the text breaks off; what is mentioned within it is not meant by itself."""
    for size in range(min(len(low), 80), 1, -1) if low and low[-1] not in PUNCT else ():
        *rest, last = [t for t in low[-size:] if t not in PUNCT] or [""]
        if (
            rest
            and low[-size] not in PUNCT
            and any(
                list(key[: len(rest)]) == rest
                and key != (*rest, last)
                and "".join(key[len(rest) :][:1]).startswith(last)
                and len(key) > len(rest)
                for key in keys
            )
        ):
            return len(low) - size
    return len(low)


def stands(items: list[str], low: list[str], at: int, end: int, letters: list[int], keys: dict) -> bool:
    """Is this a mention? "No" and "one" are other words, too, single letters may be labels, and "over 10" is not 10."""
    word, before, after = low[at], low[at - 1] if at else "\n", low[end] if end < len(low) else "\n"
    if word[0].isdigit() and (before in LIMITS or low[at - 2 : at] == ["up", "to"]):
        return False
    if end - at > 1:
        return items[at] != "a" or low[at + 1] not in {"minor", "major", "flat", "sharp"}  # "in a minor key"
    if word in {"no", "not", "none", "never"}:
        return after in PUNCT | REASONS | PRONOUNS
    if word == "one":
        return after != "of" and before not in BEFORE_ONE
    if len(word) == 1 and word.isascii() and word.isalpha():
        text = next((keys.get((t,)) for t in low[end : end + 4] if t not in PUNCT), None)
        labelled = (
            after in PUNCT and text == label_of(word, letters) is not None
        )  # "D. A" where A is the fourth choice
        return (
            not labelled
            and before not in OPTIONS
            and not (before in "([" and after in ")]")
            and items[at].isupper()
            and (word not in "ai" or after in PUNCT | {"or", "and"})
        )
    return True


def joined(out: list[str], later: list[str], key: tuple, keys: dict, find, end: int) -> list[tuple]:
    """Choices of which "acoustic or electric guitar" and "10 to 20 seconds" say only the word that tells them apart."""
    near = []
    for side, joints in (out[-5:][::-1], {"or", "and", "to", "nor", "/", ","}), (later, {"or", "nor", "/"}):
        gap = next(
            (k for k, t in enumerate(side) if t not in joints and t not in ARTICLES and t != ","), len(side)
        )
        if joints & set(side[:gap]) and not (side is later and find(end + gap)[1]):
            near += [t.lower() for t in side[gap : gap + 1]]
    return [k for k in keys if any(t in k and t not in key for t in near) and set(k) & set(key) - LISTING]


def label_of(token: str, letters: list[int]) -> int | None:
    i = string.ascii_lowercase.find(token.lower()) if len(token) == 1 else -1
    return letters[i] if 0 <= i < len(letters) else None


def with_letters(items: list[str], letters: list[int], keys: dict) -> list[str]:
    """Every letter that is a label, and no article, note or initial, becomes "<i>" too."""
    low, out, clear, cued = (
        [t.lower() for t in items] + ["\n", "\n"],
        [],
        True,
        False,
    )  # nothing but filler, a cue before this
    for i, t in enumerate(items):
        index = label_of(t, letters)
        if index is not None and is_label(items, low, i, clear, cued):
            out.append(f"<{meant(low, i, index, keys)}>")
        elif (
            t in {".", ")", "]", ":"}
            and out
            and out[-1][0] == "<"
            and items[i - 1][0] != "<"
            and (content(low, i)[:1] == "<" or AFTER.match(" ".join(low[i + 1 : i + 10])))
        ):
            continue  # the mark belongs to the label: "B. cat", "B. Incorrect"
        else:
            out.append(low[i])
            if cue(low, i) or t in ENDS:
                clear, cued = True, cue(low, i) == EXPLICIT or cued and t == "\n"
            elif t[0] != "<" and low[i] not in FILLER and low[i] not in NEGATORS:
                clear = cued = False
    return out


def content(low: list[str], i: int) -> str:
    """The next token that is no mark and no article."""
    return next((t for t in low[i + 1 : i + 4] if t == "\n" or t not in PUNCT and t not in ARTICLES), "")


def meant(low: list[str], i: int, index: int, keys: dict) -> int:
    """The label's choice, unless the letter is the text of another, or all that is left of one ("A" of "A dog") at the end."""
    if (
        content(low, i) == f"<{index}>"
        or i
        and (low[i - 1] in OPTIONS or low[i - 1] in "([" and low[i + 1] in ")]")
    ):
        return index
    cut = i == len(low) - 3 and any(len(key) == 2 and key[0] == low[i] and keys[key] != index for key in keys)
    return -1 if cut else keys.get((low[i],), index)


def is_label(items: list[str], low: list[str], i: int, clear: bool, cued: bool) -> bool:
    before, after, capital, rest = (
        low[i - 1] if i else "\n",
        low[i + 1],
        items[i].isupper(),
        " ".join(low[i + 1 : i + 11]),
    )
    if before in "([" and after in ")]" or before in OPTIONS:
        return True
    if before == ":" and i > 1 and low[i - 2] in OPTIONS and (capital or after in PUNCT):
        return True
    if before in ARTICLES or NOTE.match(rest):
        return False
    if after not in PUNCT and (AFTER.match(rest) or CHOSEN.match(rest)):
        return clear and (capital or before in ANSWERS)
    if low[i] in "ai" and (after[0] == "<" or after == "\n" and not capital and i > 0):
        return False  # "A dog", "it is a"
    if not capital and not cued:  # "b." alone, "b) cat", "a. and b."
        return clear and after in {")", "]", ".", ":"} and before in LISTING and before not in ARTICLES
    paired = (
        before in {"and", "or", "nor", "/"} and len(items[i - 2]) == 1 and items[i - 2].isupper()
    )  # "A and B are ..."
    closed = (
        after in PUNCT
        or after in CLOSERS
        or after[0] == "<"
        or cued
        and re.match(f"[{CJK}]", after) is not None
    )
    return clear and (closed or paired)


def cue(low: list[str], i: int) -> int:
    """How the answer is given after this word: EXPLICIT, CLAIM, or MENTION where it is no cue ("to answer this question")."""
    before, after = low[i - 1] if i else "\n", low[i + 1] if i + 1 < len(low) else "\n"
    noun = before not in {"to", "can", "cannot", "can't", "not", "no"} and after not in {
        "this",
        "that",
        "the",
        "your",
        "question",
        "options",
        "choices",
    }
    if low[i] in ANSWERS and noun or low[i] in OPTIONS and before in BEST:
        return EXPLICIT
    return CLAIM if low[i] in CONCLUDE else MENTION


def signals(items: list[str]) -> list[Signal]:
    """Every symbol weighed in its sentence."""
    found, level, turn, start, bare = [], MENTION, -1, 0, False  # bare: a cue, and nothing after it yet
    glue = {"or", "and", ")"}  # a sentence goes on: "dog. Or cat."
    for end in [i for i, t in enumerate(items) if t in ENDS and not glue & set(items[i + 1 : i + 2])] + [
        len(items)
    ]:
        part, mark, after_it = items[start:end], items[end : end + 1], items[end + 1 : end + 2]
        asked = mark == ["?"] and after_it not in (["yes"], ["yeah"], ["correct"])
        terse = not (VERBS | HEDGES) & set(part) and all(t[0] == "<" or t in FILLER for t in part)
        level = level if bare else MENTION
        clear, negated, conjoined = True, False, False
        for i in range(start, end):
            t = items[i]
            if t[0] == "<":
                after = " ".join(items[i + 1 : i + 10])
                if denied := bool(
                    AFTER.match(after)
                ):  # and with it all that it is listed with: "dog and cat are wrong"
                    here, k = i, len(found) - 1
                    while k >= 0 and not set(items[found[k].last + 1 : here]) - (LISTING - ENDS):
                        found[k].denied, here, k = True, found[k].first, k - 1
                rank = EXPLICIT if CHOSEN.match(after) else max(level, TERSE if terse else MENTION)
                found.append(Signal(int(t[1:-1]), rank, negated or asked or denied, i, i, turn))
                clear = bare = False
                continue
            level = max(level, cue(items, i), CLAIM if clear and t in VERBS else MENTION)
            bare = bare and t in FILLER or cue(items, i) == EXPLICIT
            clear = t == "," or clear and t in FILLER
            turn = i if t in TURNS else turn
            if (t in NEGATORS or t.endswith("n't")) and not {"only", "just", "merely"} & set(
                items[i + 1 : i + 2]
            ):
                negated, conjoined = True, t == "nor"
                level = MENTION if level == EXPLICIT else level
            elif t in LISTING and t not in PUNCT and t not in ARTICLES:
                conjoined = True
            elif t in RESETS and not (
                t == ","
                and negated
                and not conjoined
                and items[i - 1][0] == "<"
                and re.match(r"(?:(?:or|nor|and|a|an|the) )*<", " ".join(items[i + 1 : i + 6]))
            ):  # "not happy, sad, or angry"
                negated = negated and t == "as"  # "not ... such as"
                level = MENTION if t in REASONS else level
        start, bare = end + 1, bare and mark == ["\n"]
    return found


def unlisted(found: list[Signal], items: list[str], letters: list[int]) -> list[Signal]:
    """Without what is denied, and without the options as the question gave them: all, once, with but commas between."""

    def near(a: Signal, b: Signal, over: set = LISTING) -> bool:
        return not set(items[a.last + 1 : b.first]) - over

    merged, out, i = [], [], 0
    for s in found:  # "B. cat" is one
        if merged and merged[-1].index == s.index and near(merged[-1], s, LISTING - ENDS):
            one = merged[-1]
            one.level, one.denied, one.last = max(one.level, s.level), one.denied or s.denied, s.last
        else:
            merged.append(s)
    whole = (
        sorted(letters),
        sorted(index for index, _ in itertools.groupby(letters)),
    )  # choices alike, side by side, may be one
    while i < len(merged):
        runs = [(every, merged[i : i + len(every)]) for every in whole]
        listed = [
            run
            for every, run in runs
            if not any(s.denied for s in run)
            and sorted(s.index for s in run) == every
            and all(near(a, b) for a, b in zip(run, run[1:]))
        ]
        out += [] if listed and len(listed[0]) > 1 else merged[i : i + 1]
        i += len(listed[0]) if listed else 1
    return [s for s in out if not s.denied]


def decide(found: list[Signal], refused: bool) -> int | None:
    """The strongest way in which a choice is given decides, if it is one choice and nothing takes it back."""
    level = max((s.level for s in found), default=MENTION)
    if not found or refused and level < TERSE:
        return None
    given = [s for s in found if s.level == level]
    last = given[-1].first
    chosen = {s.index for s in given} | {
        s.index for s in found if s.first > last and (s.level >= CLAIM or s.turn > last)
    }
    alone = {
        s.index for s in found if s.level == TERSE
    }  # one stands by itself, and another is the answer; two are an analysis
    chosen |= alone if len(alone) == 1 else set()
    return chosen.pop() if len(chosen) == 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def accuracy(completion: str, example) -> float:
    """1 if the completion resolves to the right choice (by text: a choice may stand twice), or solves its Countdown."""
    if example.is_countdown:
        return float(countdown(completion, example) == 1)
    index = resolve(completion, example.choices)
    right = (
        index is not None
        and example.answer is not None
        and (
            index == example.answer
            or words(example.choices[index]) == words(example.choices[example.answer]) != ()
        )
    )
    return float(right)


choice_words = words


def same_choice(choices, i, j):
    if i is None or j is None:
        return False
    return i == j or words(choices[i]) == words(choices[j]) != ()


@dataclasses.dataclass
class Said:
    text: str
    used: float = 0.0
    heard: tuple = ()
    confidence: float | None = None


completion_accuracy = accuracy


def accuracy(said, example) -> float:
    return completion_accuracy(getattr(said, "text", said), example)


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


SECTIONS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
SKELETON = [
    "THINK",
    *(tag for name in SECTIONS for tag in (name, "/" + name)),
    "/THINK",
    "RESPONSE",
    "/RESPONSE",
]
SECTION_TAG = re.compile(rf"<(/?(?:THINK|{'|'.join(SECTIONS)}|RESPONSE))>", re.IGNORECASE)


def structure(completion: str, example) -> float:
    """1 if the completion is <THINK> with its four sections, in order and none empty, then <RESPONSE>, and nothing else
    (Audio-Reasoner, arXiv 2503.02318; SARI, arXiv 2504.15900, plans, describes, reasons and sums up alike)."""
    outside, *rest = SECTION_TAG.split(completion)
    tags, texts = [tag.upper() for tag in rest[::2]], rest[1::2]
    filled = all(
        bool(WORD.search(text)) if tag in (*SECTIONS, "RESPONSE") else not text.strip()
        for tag, text in zip(tags, texts)
    )
    return float(tags == SKELETON and filled and not outside.strip())


def trace(completion: str) -> tuple[str, str] | None:
    """(what stands in the one <think> block, what follows it); None if there is no such block, or more than one"""
    tags = list(THINK.finditer(completion))
    if [bool(m[1]) for m in tags] != [False, True]:
        return None
    return completion[tags[0].end() : tags[1].start()], completion[tags[1].end() :]


WORD = re.compile(r"[^\W_]")
SHORT_WORDS, LONG_WORDS = 30, 50


def think_length(completion: str, example) -> float:
    """1 for a trace of 30 to 50 words, less for a shorter one, and less again for a longer one, down to 0 at 100: without a
    price longer traces answer worse (CESAR; Ke-Omni-R asks for less than 50 words)."""
    found = trace(completion)
    n = sum(bool(WORD.search(word)) for word in found[0].split()) if found else 0
    return min(n / SHORT_WORDS, 1.0) if n <= LONG_WORDS else max(0.0, 2 - n / LONG_WORDS)


NEGATION = re.compile(
    r"\b(?:not|no|never|cannot|nor|neither|without|unlikely|wrong|incorrect|eliminat\w+|exclud\w+|"
    r"rul\w+ out|discard\w*|\w+n't)\b",
    re.IGNORECASE,
)


def consistency(completion: str, example) -> float:
    """1 if the trace ends at the choice that is then answered, or rules out every other one; 0 if it ends at another, comes
    to no end or gives no answer. Judge-free stand-in for the consistency reward of Audio-Thinker."""
    found, choices = trace(completion), example.choices
    given = resolve(found[1], choices) if found else None
    if given is None:
        return 0.0
    sentences = [s for s in re.split(r"(?<=[.!?;])\s+|\n+", found[0][-4000:]) if s.strip()][
        -40:
    ]  # enough, and bounded
    for sentence in reversed(sentences):
        if not NEGATION.search(sentence) and (end := resolve(sentence, choices)) is not None:
            return float(words(choices[end]) == words(choices[given]))
    denied = [" ".join(words(s)) for s in sentences if NEGATION.search(s)]
    named = [any(f" {' '.join(words(choice))} " in f" {s} " for s in denied) for choice in choices]
    return float(not named[given] and sum(named) == len(choices) - 1 > 0)


class Text(str):
    """A completion's text that knows more of itself: which share of --max_new_tokens it `used`, 0 to 1; which parts of its
    clip it `heard` again, (start, end) in seconds; its `confidence`, the probability of its answer's least certain token."""

    used = 0.0
    heard = ()
    confidence = None

    @classmethod
    def of(cls, text: str, **known) -> "Text":
        text = cls(text)
        vars(text).update(known)
        return text


def overlong(completion: str, example) -> float:
    """DAPO's soft punishment (arXiv 2503.14476 eq. 13): 0 up to 80 % of --max_new_tokens, then down to -1 at all of them."""
    return -min(1.0, max(0.0, (getattr(completion, "used", 0.0) - 0.8) / 0.2))


# ---- re-listening: Echo (arXiv 2602.11909), R = 0.5 format + 0.5 accuracy + 0.5 segment + segment_flow


def segment(completion: str, example) -> float:
    """1 if the answer is right and at least one part of the clip was heard again on the way to it."""
    return float(bool(getattr(completion, "heard", ())) and accuracy(completion, example) == 1)


FRESH_START = re.compile(r"</seg>\s*([^\W\d_]|<)")


def segment_flow(completion: str, example) -> float:
    """-0.1, five times at most, for every </seg> that a new sentence (an upper-case letter) or another tag follows: what
    was heard again has to be used where it was heard. Echo's consistency penalty."""
    return -0.1 * min(5, sum(c.isupper() or c == "<" for c in FRESH_START.findall(completion)))


def confident_accuracy(completion: str, example) -> float:
    """Right: 1 - (1 - p)^2, wrong: -p^2, where p is the probability of the answer's least certain token (Echo's code, times 2).
    Where p is not known it counts as 1: 1 or -1. No answer at all: 0."""
    p = getattr(completion, "confidence", None)
    if accuracy(completion, example) == 1:
        return 1 - (1 - (1.0 if p is None else p)) ** 2
    return 0.0 if resolve(completion, example.choices) is None else -((1.0 if p is None else p) ** 2)


def grounding(completion: str, example) -> float:
    """How well the parts heard again meet the true ones, meta["spans"]: [[start, end], ...] in seconds: time in both over time
    in either (IoU). 0 where nothing was heard, or no true span is known."""

    def union(spans) -> list[list[float]]:
        out = []
        for start, end in sorted(spans):
            if out and start <= out[-1][1]:
                out[-1][1] = max(out[-1][1], end)
            else:
                out.append([start, end])
        return out

    true = example.meta.get("spans")
    true = (
        [
            s
            for s in true
            if isinstance(s, list | tuple)
            and len(s) == 2
            and all(type(x) in (int, float) and abs(x) < 1e9 for x in s)
            and s[0] < s[1]
        ]
        if isinstance(true, list | tuple)
        else []
    )
    ours, true = union(getattr(completion, "heard", ())), union(true)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in ours for c, d in true)
    return both / (sum(b - a for a, b in ours + true) - both) if ours and true else 0.0


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

    if len(expression) > 200 or not re.fullmatch(
        r"[\d+\-*/() ]+", expression
    ):  # short: no deep nesting, no long division
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
    nums, target = (example.meta["nums"], example.meta["target"]) if example.is_countdown else ([], None)
    found = arithmetic(" ".join(answers[-1].split()).removesuffix(f"= {target}"))
    return 1.0 if found and found[0] == target and sorted(found[1]) == sorted(nums) else 0.1


def countdown_last_line(completion: str, example) -> float:
    """The same, looking only at the last line, as TinyZero's code does."""
    return countdown(completion.rstrip().rpartition("\n")[2], example)


REWARDS = {
    "accuracy": accuracy,
    "format": format,
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
