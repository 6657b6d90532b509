"""The resolver on a table of completions and on forms with any choices; the closed forms of the rewards."""

import json
import math
import pathlib
import random
import time
from fractions import Fraction

import pytest

import reward
from data import Example
from reward import REWARDS, Said, choice_words, resolve
from test_data import cells

TESTS = pathlib.Path(__file__).parent
FOUR = Example("", None, "What is heard?", ["dog", "cat", "bird", "car horn"], 0)
COUNTDOWN = Example("", None, "?", meta={"nums": [3, 5, 2], "target": 13})


def value_of(name, text, example=FOUR, **known):
    return REWARDS[name](Said(text, **known), example)


# ---- the resolver


def test_every_completion_of_the_table_gives_its_index():
    """completions.jsonl: a text, the choices, and the index that a careful reader takes, or null for none."""
    with open(TESTS / "completions.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    wrong = []
    for n, row in enumerate(rows, 1):
        index = resolve(row["text"], row["choices"])
        if index != row["index"]:
            wrong.append(f"line {n}: {index}, not {row['index']}: {row['text']!r} of {row['choices']}")
    assert not wrong, f"{len(wrong)} of {len(rows)}:\n" + "\n".join(wrong)
    assert len(rows) > 1200


# a benchmark's own choices, where it is at hand
MINI = TESTS.parent.parent / "shared" / "data" / "mmau-test-mini.json"
NOUNS = "rain wind thunder violin trumpet laughter applause footsteps siren engine".split()


def make_choice_sets():
    """Sets of choices that read differently, none of them a letter."""
    rng = random.Random(0)
    sets = [rng.sample(NOUNS, rng.randint(2, 6)) for _ in range(50)]
    for _ in range(50):
        words = rng.sample(NOUNS, 8)
        sets.append([f"{rng.choice(['A', 'The', 'Loud'])} {a} and {b}" for a, b in zip(words[:4], words[4:])])
    for row in json.loads(MINI.read_text()) if MINI.exists() else ():
        choices = row["choices"]
        is_plain = min(len(choice.strip()) for choice in choices) > 1 and "?" not in "".join(choices)
        if is_plain and len(set(map(choice_words, choices))) == len(choices):
            sets.append(choices)
    return sets


SETS = make_choice_sets()
LETTERS = "ABCDEFGHIJ"
PLAIN = r"""
{x}
"{x}"
**{x}**
{x}.
The answer is {x}.
The correct answer is: {x}
Answer: {x}
<answer>{x}</answer>
It is {x}.
So the answer is {x}
{l}. {x}
({l}) {x}
{l}) {x}
{l}: {x}
Option {l}: {x}
{x} ({l})
The answer is {l}. {x}
The answer is ({l}) {x}.
{{"answer": "{x}"}}
{l}
{l}.
({l})
Option {l}
The answer is {l}.
\boxed{{{l}}}
Option {l} is correct.
{l}, because it fits.
{all}NEWLINENEWLINEAnswer: {l}. {x}
The answer is {l}, not {m}.
"""
DENIED_OR_TWO = """
Option {l} is wrong.
It is not option {l}.
({l}) is incorrect
The answer is not {l}.
I would rule out {l}.
{l}. Incorrect
The answer is not {x}.
It is not {x}
{x} or {y}
The answer is {x} or {y}.
{l} or {m}
({l}) or ({m})
The answer is {l} or {m}.
{l}. {x}NEWLINE{m}. {y}
The answer is {l}. {y}
{x} ({m})
"""


def forms(text):
    """One a line"""
    return [line.replace("NEWLINE", "\n") for line in text.strip().splitlines()]


@pytest.mark.parametrize("form", forms(PLAIN))
def test_plain_answers_resolve_whatever_the_choices(form):
    """{x}, {l}: a choice and its letter; {m}: another letter; {all}: the options as a question lists them."""
    for choices in SETS:
        options = "\n".join(f"{letter}. {x}" for letter, x in zip(LETTERS, choices))
        for i, x in enumerate(choices):
            x = x.replace('"', "'") if '"' in form else x
            text = form.format(x=x, l=LETTERS[i], m=LETTERS[(i + 1) % len(choices)], all=options)
            right = {i, None} if "[" in x else {i}
            assert resolve(text, choices) in right, (text, choices)


@pytest.mark.parametrize("form", forms(DENIED_OR_TWO))
def test_denied_and_two_answers_are_none_whatever_the_choices(form):
    for choices in SETS:
        for i, x in enumerate(choices):
            for j in [j for j in range(len(choices)) if j != i][:2]:
                y = choices[j].rstrip(".")
                text = form.format(x=x.rstrip("."), y=y, l=LETTERS[i], m=LETTERS[j])
                if choice_words(text) not in map(choice_words, choices):
                    assert resolve(text, choices) is None, (text, choices)


def test_a_choice_cut_off_is_no_other():
    for choices in SETS:
        for i, x in enumerate(choices):
            *whole, last = x.split()
            for cut in (" ".join(whole), " ".join([*whole, last[: len(last) // 2]])):
                if whole and choice_words(cut) not in map(choice_words, choices):
                    for head in ("The answer is: ", "Answer: ", "It is "):
                        assert resolve(head + cut, choices) in (i, None), (head + cut, choices)


def assert_permutes(text, choices, rng):
    """Choices in another order give the same choice."""
    order = rng.sample(range(len(choices)), len(choices))
    index, moved = resolve(text, choices), resolve(text, [choices[i] for i in order])
    assert (None if index is None else order.index(index)) == moved, (text, choices)


def test_permuted_choices_permute_the_answer():
    rng = random.Random(0)
    for choices in SETS:
        x, y = rng.sample(choices, 2)
        for form in (
            "{}",
            "The answer is {}.",
            "I hear {}, not {}.",
            "{} or {}",
            "not {1} but {0}",
            "{1}? No. {0}",
        ):
            assert_permutes(form.format(x, y), choices, rng)


def test_every_choice_resolves_to_itself_and_random_words_permute():
    rng = random.Random(0)
    words = "dog barking a b C# 3 3.5 rain not no the answer horn — é 狗 is U.S.".split()
    for _ in range(3000):
        choices = list({" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(2, 6))})
        if len(set(map(choice_words, choices))) < len(choices):
            continue
        for i, choice in enumerate(choices):
            assert resolve(choice, choices) == i, (choice, choices)
        text = rng.choices(words, k=6)
        if min(map(len, text)) > 1:  # letters do not permute with the texts
            assert_permutes(" ".join(text), choices, rng)


def test_all_choices_listed_are_no_answer():
    for joint in (" ", ", ", "\n", " / ", " and "):
        assert resolve(joint.join(FOUR.choices), FOUR.choices) is None


# ---- the rewards


def test_accuracy_is_of_the_text_and_a_choice_may_stand_twice():
    twice = Example("", None, "?", ["dog", "cat", "Dog"], 2)
    values = [value_of("accuracy", text, twice) for text in ("Dog", "dog", "C", "A", "cat", "", "dog or cat")]
    assert values == [1, 1, 1, 1, 0, 0, 0]
    assert value_of("accuracy", "dog", Example("", None, "?")) == 0
    assert value_of("accuracy", "<answer>3*5-2</answer>", COUNTDOWN) == 1
    assert value_of("accuracy", "<answer>3*5</answer>", COUNTDOWN) == 0


FORMATS = {  # (format, think_format): completions
    (1, 0): ["<answer>cat</answer>", " <answer>cat</answer>\n", "<answer></answer>"],
    (0, 1): ["<think>why</think><answer>a</answer>", "\n<think>why</think>\n <answer>a\nb</answer> "],
    (0, 0): [
        "",
        "cat",
        "<answer>cat",
        "<answer>a</answer><answer>b</answer>",
        "<answer><answer>a</answer>",
        "x<answer>a</answer>",
        "<answer>a</answer>x",
        "<think>why<answer>a</answer>",
        "<think>why</think>",
        "<think>why</think><answer>a</answer>x",
        "<answer>a</answer><think>why</think>",
        "<think>a</think><think>b</think><answer>c</answer>",
        "<think><think>a</think><answer>c</answer>",
    ],
}


@pytest.mark.parametrize("values", FORMATS)
def test_formats_are_one_block_or_two_and_nothing_else(values):
    for text in FORMATS[values]:
        assert (value_of("format", text), value_of("think_format", text)) == values, text


CHAIN = (
    "<THINK>\n<PLANNING>Listen first.</PLANNING>\n<CAPTION>A bark.</CAPTION>\n"
    "<REASONING>Dogs bark.</REASONING>\n<SUMMARY>It is a dog.</SUMMARY>\n</THINK>\n<RESPONSE>a dog</RESPONSE>"
)
BREAKS = [  # what to replace, and by what
    ("</THINK>", ""),
    ("</RESPONSE>", ""),
    ("</RESPONSE>", "</RESPONSE> Yes."),
    ("<THINK>", "Well: <THINK>"),
    ("<PLANNING>", "<PLANNING><PLANNING>"),
    ("Listen first.", " \n"),
    ("A bark.", "..."),
    ("a dog</R", "</R"),
    ("Dogs bark.", CHAIN),
    ("</CAPTION>\n", "</CAPTION>\nAnd so on.\n"),
    ("<SUMMARY>It is a dog.</SUMMARY>\n", ""),
    ("<RESPONSE>a dog</RESPONSE>", "a dog"),
    (
        "<CAPTION>A bark.</CAPTION>\n<REASONING>Dogs bark.</REASONING>",
        "<REASONING>A.</REASONING><CAPTION>A.</CAPTION>",
    ),
]


def test_structure_is_every_section_in_order_and_filled():
    other_words = CHAIN.replace("Dogs bark.", "It is <loud> & 犬.")
    for text in (CHAIN, CHAIN.lower(), f"  {CHAIN}\n", CHAIN.replace("\n", ""), other_words):
        assert value_of("structure", text) == value_of("accuracy", text) == 1, text
    for old, new in BREAKS:
        assert old in CHAIN and value_of("structure", CHAIN.replace(old, new)) == 0, (old, new)
    assert value_of("structure", "") == value_of("structure", CHAIN + CHAIN) == 0


@pytest.mark.parametrize(
    "n, value",
    [(0, 0), (1, 1 / 30), (15, 0.5), (30, 1), (40, 1), (50, 1), (51, 0.98), (75, 0.5), (100, 0), (5000, 0)],
)
def test_think_length(n, value):
    """min(n / 30, 1, 2 - n / 50), at least 0, of the n words in the one block; marks are no words."""
    for text in (f"<think>{' word' * n}</think>dog", f"a <THINK>{' w, .' * n}</THINK>" + " word" * 90):
        assert value_of("think_length", text) == pytest.approx(value)


def test_think_length_wants_one_block():
    words = "word " * 40
    for text in (
        words,
        f"<think>{words}",
        f"<think>{words}</think><think></think>",
        f"</think>{words}<think>",
    ):
        assert value_of("think_length", text) == 0


CONSISTENT = Example("", None, "?", ["a dog", "a cat", "rain"], 0)


# thought | answer | value
CONCLUDED = """
A bark. So it is a dog. | a dog | 1
A bark. So it is a dog. | a cat | 0
A bark. So it is a dog. | (A) | 1
It could be a cat. But the bark says: a dog. | a dog | 1
It could be a dog. But it is a cat. | a dog | 0
Something is loud. | a dog | 0
 | a dog | 0
It is a dog. | no idea | 0
It is a dog. |  | 0
It is not a cat. There is no rain. | a dog | 1
It is not a cat. | a dog | 0
It is not a cat. There is no rain. It is not a dog. | a dog | 0
It isn't rain, and a cat is ruled out. | a dog | 1
It is not a dog. There is no rain. | a dog | 0
a dog or a cat | a dog | 0
"""


@pytest.mark.parametrize("thought, answer, value", cells(CONCLUDED))
def test_consistency(thought, answer, value):
    """1 if the trace ends at the answer or rules out the rest. Without a trace, or with two, 0."""
    answer = f"\n<answer>{answer}</answer>"
    assert value_of("consistency", f"<think>{thought}</think>{answer}", CONSISTENT) == int(value)
    assert value_of("consistency", f"<think>{thought}<think>{thought}</think>{answer}", CONSISTENT) == 0
    assert value_of("consistency", thought + answer, CONSISTENT) == 0


def test_consistency_needs_two_choices():
    alone = Example("", None, "?", ["a dog"], 0)
    assert value_of("consistency", "<think>It is not rain.</think>a dog", alone) == 0


@pytest.mark.parametrize("used, value", [(0, 0), (0.8, 0), (0.9, -0.5), (1, -1), (1.3, -1)])
def test_overlong(used, value):
    """-(used - 0.8) / 0.2, within [-1, 0]."""
    assert value_of("overlong", "dog", used=used) == pytest.approx(value)
    assert value_of("accuracy", "dog", used=used) == 1
    assert value_of("overlong", "dog") == 0  # nothing is known of its length


SOLUTIONS = {  # (countdown, countdown_last_line): answers
    (1, 1): [
        "<answer>3*5-2</answer>",
        "<answer>(3 * 5) - 2 = 13</answer>",
        "<answer>+3*5--2-2*2</answer><answer>-2+5*+3</answer>",
        "<answer>1</answer> no: <answer>3*5-2</answer>",
    ],
    (1, 0): ["<answer>5*3-2</answer>\nDone."],
    (0.1, 0.1): [
        f"<answer>{inner}</answer>"
        for inner in (
            "13",
            "15-2",
            "3*5-2+2-2",
            "3*5",
            "3*5-2 = 12",
            "",
            "3//5",
            "9**9**9",
            "__import__('os').abort()",
            "3/0",
            "(" * 190,
            "-" * 190 + "3",
            "3.0*5-2",
            "03*5-2",
            "3 5 2",
        )
    ],
    (0, 0): ["3*5-2", "", "<answer>3*5-2"],
}


@pytest.mark.parametrize("values", SOLUTIONS)
def test_countdown_uses_every_number_once_and_executes_nothing(values):
    for text in SOLUTIONS[values]:
        both = value_of("countdown", text, COUNTDOWN), value_of("countdown_last_line", text, COUNTDOWN)
        assert both == values, text


def test_countdown_is_exact():
    """With floats 1/49*49 is 0.9999999999999999."""
    example = Example("", None, "?", meta={"nums": [1, 49, 49], "target": 1})
    assert value_of("countdown", "<answer>1/49*49</answer>", example) == 1
    assert value_of("countdown", "<answer>1/49*49</answer>", FOUR) == 0.1  # no Countdown question


# ---- the rewards of re-listening


# completion | parts heard | value
SEGMENTS = """
dog | [[0, 1]] | 1
<think><seg>0, 1</seg></think><answer>dog</answer> | [[0, 1], [1, 2]] | 1
dog | [] | 0
<seg>0, 1</seg> dog | [] | 0
cat | [[0, 1]] | 0
 | [[0, 1]] | 0
"""


@pytest.mark.parametrize("text, heard, value", cells(SEGMENTS))
def test_segment_is_what_was_heard_on_the_way_to_the_right_answer(text, heard, value):
    assert value_of("segment", text, heard=json.loads(heard)) == int(value)


FLOWS = {  # how many </seg> something new follows: texts
    0: ["", "Seg A", "</seg>", "</seg> a bell", "</seg>. A bell", "</seg>é", "</seg>日", "</seg>3"],
    1: ["</seg> A bell", "</seg></think>", "</seg>\n\n<answer>", "</seg><seg>1, 2</seg> rings", "</seg>É"],
    3: ["</seg>A" * 3],
    5: ["</seg>A" * 5, "</seg>A" * 6, "</seg>" * 10_000],
}


@pytest.mark.parametrize("n", FLOWS)
def test_segment_flow_is_minus_a_tenth_for_each(n):
    for text in FLOWS[n]:
        assert value_of("segment_flow", text) == pytest.approx(-0.1 * n), text


# completion | p | value
CONFIDENT = """
dog | 0.5 | 0.75
dog | 1 | 1
dog | 0 | 0
dog | null | 1
cat | 0.5 | -0.25
cat | 0.9 | -0.81
cat | 0 | 0
cat | null | -1
nothing | 0.9 | 0
 | null | 0
dog or cat | 0.9 | 0
"""


@pytest.mark.parametrize("text, p, value", cells(CONFIDENT))
def test_confident_accuracy(text, p, value):
    """1 - (1 - p)^2 if it is right, -p^2 if it is wrong, 0 without an answer; p is 1 if it is not known."""
    assert value_of("confident_accuracy", text, confidence=json.loads(p)) == pytest.approx(float(value))


def ground(heard, spans):
    return value_of("grounding", "", Example("", None, "?", ["dog"], 0, meta={"spans": spans}), heard=heard)


# parts heard | true spans | value
GROUNDED = """
[[0, 1], [2, 3]] | [[0.5, 2.5]] | 1/3
[[0, 1]] | [[0, 1]] | 1
[[0, 1]] | [[1, 2]] | 0
[[0, 2]] | [[0, 1], [3, 4]] | 1/3
[[0, 1], [0, 1], [0.5, 2]] | [[0, 2]] | 1
[[0, 4]] | [[3, 4], [0, 1], [0.5, 2]] | 3/4
[[1, 2]] | [[0, 1.5], [1, 2]] | 1/2
[] | [[0, 1]] | 0
[[0, 1]] | [] | 0
"""


@pytest.mark.parametrize("heard, spans, value", cells(GROUNDED))
def test_grounding(heard, spans, value):
    """Time in both over time in either, whatever overlaps among the parts or among the true spans."""
    assert ground(json.loads(heard), json.loads(spans)) == pytest.approx(float(Fraction(value)))


NO_SPANS = [
    *(5, "01", [], [1], [0, 1, 2], ["0", "1"], [True, 2], [2, 1], [1, 1], [None, None], [[0], [1]]),
    *([math.nan, 1], [0, math.nan], [0, math.inf], [-math.inf, math.inf], [0, 10**400]),
]


def test_grounding_takes_any_data():
    """A file's meta may hold anything: what is no span is none, and a true one beside it counts."""
    assert ground([(0, 1)], ((0, 2),)) == 0.5
    for spans in (None, 5, "0, 1", {}, {"0": 1}, NO_SPANS):
        assert ground([(0, 1)], spans) == 0
    for span in NO_SPANS:
        assert ground([(0, 1)], [span, [0, 2]]) == 0.5, span


def test_score_weighs_and_keeps_the_parts():
    weights = reward.parse_rewards("accuracy=2, format=0.5")
    assert weights == {"accuracy": 2.0, "format": 0.5}
    total, parts = reward.score(Said("<answer>dog</answer>"), FOUR, weights)
    assert total == 2.5 and parts == {"accuracy": 1.0, "format": 1.0}
    assert reward.parse_rewards("overlong") == {"overlong": 1.0}


@pytest.mark.parametrize(
    "spec, named",
    [("acuracy=1", "accuracy"), ("accuracy=x", "'x'"), ("accuracy=inf", "'inf'"), ("", "known")],
)
def test_a_wrong_reward_is_named(spec, named):
    with pytest.raises(ValueError, match=named):
        reward.parse_rewards(spec)


# ---- whatever a model writes

REPEATED = [
    "dog ",
    "<answer>",
    "answer is ",
    "a) ",
    "\\boxed{",
    "<think>",
    " ",
    "\n",
    "(",
    "<",
    "*",
    "1,",
    "not ",
    "é",
    "\x00\ud800",
    "dog. ",
    "<answer>dog",
    "B or ",
    "The answer is B. ",
    "dog, ",
    "car ",
    "car .",
    "car, horn ",
    "a dog is wrong ",
    "C sharp ",
    "10-",
    "- ",
    "İ",
    "\\text{",
    "<|",
    "B\n\n",
    "Is it a dog? ",
    "neither dog nor ",
    "</think>",
    "<think></think>",
    "<PLANNING>",
    CHAIN,
    "n't ",
    "<seg>0, 1",
    "</seg> ",
    "</seg>\n\u0301",
]
N = 50_000
LONG = [
    *(text * (N // len(text)) for text in REPEATED),
    "<" + " " * N,
    "\\boxed" + " " * N,
    "*" * N + "x",
    "dog" + " " * N + "cat",
    "car" + "." * N + "horn",
    "".join(random.Random(1).choices("abcdefgh <>/()*.\\{}\n", k=N)),
    "<think>" + "a dog. " * (N // 7) + "</think>a dog",
    "<think>" + "not a cat " * (N // 10) + "</think>a dog",
    "<think>" + "\n" * N + "</think>",
    "<think>" + "!" * N + "</think>a dog",
    "<think>" + "a" * N + "</think>a",
    "İ" * N + "<think>x</think>",
    "<answer>" + "(" * (N // 2) + "1" + ")" * (N // 2) + "</answer>",
    "<answer>" + "9" * N + "</answer>",
]


def assert_bounded(text, example, **known):
    for name in REWARDS:
        value = value_of(name, text, example, **known)
        assert isinstance(value, float) and -1 <= value <= 1, name


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_50_kb_take_linear_time(text):
    """Seconds of this thread's time, whatever else the machine does; quadratic time would be many."""
    start = time.thread_time()
    assert_bounded(text, FOUR)
    assert time.thread_time() - start < 2


def test_rewards_are_bounded_and_never_raise():
    for text in [
        "",
        "\0",
        "<answer>１+２</answer>",
        "<answer>1/0</answer>",
        *(text[:500] for text in LONG),
    ]:
        for example in (FOUR, COUNTDOWN, Example("", None, "?")):
            assert_bounded(text, example)
    assert_bounded("</seg> " * 20_000, FOUR, heard=[(0.0, 1.0)] * 1000, confidence=0.5)
