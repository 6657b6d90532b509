"""The resolver and the rewards: tables of cases, properties, and text that means harm."""

import random
import subprocess
import sys
import time

import pytest

import reward
from data import Example

FOUR = ["dog", "cat", "bird", "car horn"]
CASES = [
    # the text alone
    ("dog", 0), ("Cat", 1), ("  bird \n", 2), ("'cat'", 1), ('"cat".', 1), ("**Cat**", 1), ("`bird`", 2), ("CAR  HORN!", 3),
    ("car-horn", 3), ("A dog.", 0), ("The dog", 0),
    # letters
    ("B", 1), ("b", 1), ("b.", 1), ("(b)", 1), ("[C]", 2), ("D)", 3), ("Option C", 2), ("choice: d", 3), ("Answer: B", 1),
    ("The answer is (A)", 0), ("the correct option is c.", 2), ("**B**", 1), ("E", None), ("Z.", None),
    # letter and text
    ("B. cat", 1), ("(B) cat", 1), ("b) Cat", 1), ("B: cat", 1), ("B. dog", None), ("Answer: (D) car horn", 3),
    ("The correct answer is B) cat.", 1), ("A. I hear a dog barking", 0), ("B. Because it meows", 1),
    ("A. It is a cat", None),
    # sentences
    ("The answer is cat.", 1), ("The answer is a dog", 0), ("I think it's a bird", 2), ("That is a car horn, I believe", 3),
    ("I choose option B because it meows", 1), ("It sounds like a dog barking in the distance.", 0),
    ("There is a dog and a cat. The answer is cat.", 1), ("答案是 cat", 1),
    # more than one answer, or none
    ("dog or cat", None), ("dog, cat", None), ("A, B", None), ("A and C", None), ("A or B", None),
    ("dog cat bird car horn", None),
    ("(A) dog (B) cat (C) bird (D) car horn", None), ("['dog', 'cat', 'bird', 'car horn']", None), ("", None), (" \n", None),
    ("I don't know", None), ("none of them", None), ("carhorn", None), ("a horn of a car", None), ("hotdog", None),
    ("category", None), ("The answer is dog. The answer is cat.", None), ("a", 0),
    # negation
    ("not A", None), ("It is not a dog, it is a cat", 1), ("neither dog nor cat", None), ("not a dog but a bird", 2),
    ("a cat rather than a dog", 1), ("dog is wrong; cat", 1), ("It isn't a dog.", None), ("The dog is not correct", None),
    # tags and thinking
    ("<answer>bird</answer>", 2), ("<answer> B </answer>", 1), ("<answer>bird", 2), ("<ANSWER>dog</ANSWER>", 0),
    ("<think>dog, surely dog</think><answer>cat</answer>", 1), ("<think>dog</think> cat", 1), ("<think>dog", None),
    ("cat<think>dog", 1), ("<answer>dog</answer><answer>cat</answer>", None),
    ("<answer>dog</answer> <answer>dog</answer>", 0),
    ("<answer></answer>", None), ("<answer>dog or cat</answer>", None), ("dog <answer>cat</answer>", 1),
    ("<THINK>a cat</THINK><RESPONSE>The answer is A.</RESPONSE>", 0), ("\\boxed{B}", 1),
    ("so it is $\\boxed{\\text{bird}}$", 2),
]


@pytest.mark.parametrize("text, index", CASES, ids=[t[:30] for t, _ in CASES])
def test_table(text, index):
    assert reward.resolve(text, FOUR) == index


MORE = [  # choices, [(text, index)]
    # (choices, [(text, index)...])
    (["a dog", "two dogs", "a dog and a cat", "a cat"], [
        ("a dog and a cat", 2), ("I hear a dog and a cat.", 2), ("A dog", 0), ("two dogs are barking", 1), ("It is a cat", 3),
        ("the answer is a dog and a cat, not two dogs", 2), ("Option (c) a dog and a cat", 2), ("a cat and a dog", None)]),
    (["440 Hz", "44 Hz", "4.4 kHz", "440"], [
        ("440 Hz", 0), ("440", 3), ("44 Hz", 1), ("about 4.4 kHz", 2), ("The tone is at 440 Hz.", 0), ("4,400", None),
        ("440hz", None), ("B) 44 Hz", 1)]),
    (["Happy", "Unhappy", "Sad", "Not sure"], [
        ("happy", 0), ("Unhappy.", 1), ("The speaker is unhappy", 1), ("not sure", 3), ("I am not sure", 3),
        ("She is not happy", None),
        ("not happy but sad", 2), ("Sad!", 2), ("SAD", 2), ("**Sad**", 2), ("Sad (not happy)", 2)]),
    (["Yes", "No"], [
        ("yes", 0), ("No", 1), ("Yes, it is.", 0), ("No, there is no dog.", 1), ("The answer is yes.", 0), ("B", 1),
        ("A. Yes", 0),
        ("A. No", None), ("<answer>no</answer>", 1), ("$\\boxed{\\text{Yes}}$", 0), ("yes and no", None)]),
    (["Guitar, drums, and bass", "Piano and violin", "Guitar", "Drums"], [
        ("Guitar, drums, and bass", 0), ("guitar, drums and bass", 0), ("Guitar", 2), ("C", 2), ("drums", 3),
        ("guitar and drums", None),
        ("I hear piano and violin", 1), ("A: Guitar, drums, and bass", 0)]),
    (["C major", "A minor", "G major", "E minor"], [
        ("A minor", 1), ("a minor", 1), ("The key is G major.", 2), ("C", 2), ("C major", 0), ("A", 0), ("(A)", 0),
        ("(B) A minor", 1),
        ("E minor, I think", 3), ("It is in A", None)]),
    (["1", "2", "3", "4"], [
        ("2", 1), ("two", None), ("B", 1), ("There are 3 beeps", 2), ("3.", 2), ("(4)", 3), ("12", None),
        ("answer: 2", 1), ("B. 2", 1),
        ("1 or 2", None)]),
    (["man", "woman", "child", "robot"], [
        ("woman", 1), ("man", 0), ("a young woman's voice", 1), ("I'm sorry, I cannot answer that.", None),
        ("As an AI model, I can't hear audio.", None),
        ("Neither man nor woman, a child", 2), ("robot\n\nExplanation: the voice is flat", 3),
        ("The speaker is a man. So the answer is A.", 0),
        ("the correct answer is: **D. robot**", 3), ("{\"answer\": \"woman\"}", 1), ("Answer - child", 2),
        ("It's not the man, it's the woman", 1)]),
]


@pytest.mark.parametrize("text, choices, index", [(text, choices, index) for choices, cases in MORE for text, index in cases])
def test_table_of_other_choices(text, choices, index):
    assert reward.resolve(text, choices) == index


@pytest.mark.parametrize("text, choices, index", [
    ("C#", ["C", "C#", "D"], 1), ("C", ["C", "C#", "D"], 0), ("A minor", ["A", "A minor"], 1), ("A", ["C", "A", "B"], 1),
    ("3.5", ["3", "3.5", "35"], 1), ("3", ["3", "3.5", "35"], 0), ("-5", ["5", "-5"], 1), ("120 bpm", ["120", "60"], 0),
    ("50%", ["50%", "5%"], 0), ("two dogs", ["two dogs", "dogs"], 0), ("dogs", ["two dogs", "dogs"], 1),
    ("there are two dogs", ["two dogs", "dogs"], 0), ("yes", ["Yes", "No"], 0), ("No.", ["Yes", "No"], 1),
    ("狗", ["狗", "猫"], 0), ("我听到一只猫", ["狗", "猫"], 1), ("café", ["café", "bar"], 0), ("CAFÉ", ["café", "bar"], 0),
    ("की", ["का", "की"], 1),
    ("red, green", ["red", "green", "red, green"], 2), ("not present", ["present", "not present"], 1),
    ("dog", ["dog", "cat", "dog"], 0), ("Ｂ", ["dog", "cat"], 1), ("ABBA", ["ABBA", "Queen"], 0),
    ("U.S.", ["U.S.", "U.K."], 0), ("x", [], None), ("dog", ["?", "!"], None), ("?", ["?", "!"], 0)])
def test_odd_choices(text, choices, index):
    assert reward.resolve(text, choices) == index


def test_every_choice_resolves_to_itself_and_permutes():
    rng = random.Random(0)
    words = "dog barking a b C# 3 3.5 rain not no the answer horn — é 狗 is U.S.".split()
    for _ in range(3000):
        choices = list({" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(rng.randint(2, 6))})
        if len({reward.words(c) for c in choices}) < len(choices):
            continue
        for i, choice in enumerate(choices):
            assert reward.resolve(choice, choices) == i, (choice, choices)
        order = rng.sample(range(len(choices)), len(choices))
        text = " ".join(rng.choices(words, k=6))
        index, moved = reward.resolve(text, choices), reward.resolve(text, [choices[i] for i in order])
        if len(text.split()) > 1 and not any(len(w) == 1 for w in text.split()):  # letters do not permute with the texts
            assert (None if index is None else order.index(index)) == moved, (text, choices)


def test_all_choices_listed_is_no_answer():
    for joint in (" ", ", ", "\n", " / ", " and "):
        assert reward.resolve(joint.join(FOUR), FOUR) is None


@pytest.mark.parametrize("noise", [
    "dog " * 25_000, "<answer>" * 12_000, "answer is " * 10_000, "a) " * 30_000, "\\boxed{" * 15_000, "<think>" * 14_000,
    " " * 100_000, "(" * 100_000, "*" * 100_000 + "x", "1," * 50_000, "not " * 25_000, "é" * 100_000, "\x00\ud800" * 50_000,
    "".join(random.Random(1).choices("abcdefgh <>/()*.\\{}\n", k=100_000))], ids=range(14))
def test_100_kb_of_noise_takes_linear_time(noise):
    start = time.perf_counter()
    reward.resolve(noise, FOUR)
    for name in reward.REWARDS:
        reward.REWARDS[name](noise, Example("", None, "?", FOUR, 1))
    assert time.perf_counter() - start < 2.0


def test_accuracy():
    example = Example("", None, "?", ["dog", "cat", "Dog"], 2)
    assert [reward.accuracy(t, example) for t in ("Dog", "dog", "C", "cat", "", "dog or cat")] == [1, 1, 1, 0, 0, 0]
    assert reward.accuracy("dog", Example("", None, "?")) == 0


@pytest.mark.parametrize("text, plain, think", [
    ("<answer>cat</answer>", 1, 0), (" <answer>cat</answer>\n", 1, 0), ("<answer>cat", 0, 0), ("cat", 0, 0), ("", 0, 0),
    ("<answer>a</answer><answer>b</answer>", 0, 0), ("<answer><answer>a</answer>", 0, 0), ("x<answer>a</answer>", 0, 0),
    ("<think>why</think><answer>a</answer>", 0, 1), ("<think>why</think>\n <answer>a\nb</answer>", 0, 1),
    ("<think>why<answer>a</answer>", 0, 0), ("<answer>a</answer><think>why</think>", 0, 0),
    ("<think>a</think><think>b</think><answer>c</answer>", 0, 0)])
def test_formats(text, plain, think):
    assert reward.format(text, None) == plain
    assert reward.think_format(text, None) == think


def test_score_weighs_and_keeps_the_parts():
    example = Example("", None, "?", FOUR, 1)
    assert reward.parse_rewards("accuracy=2,format=0.5") == {"accuracy": 2.0, "format": 0.5}
    total, parts = reward.score("<answer>cat</answer>", example, {"accuracy": 2.0, "format": 0.5})
    assert total == 2.5 and parts == {"accuracy": 1.0, "format": 1.0}
    for spec in ("acuracy=1", "accuracy=x", "accuracy=inf", ""):
        with pytest.raises(ValueError):
            reward.parse_rewards(spec)


def test_reward_needs_no_torch():
    code = "import sys, reward; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=reward.__file__.rpartition("/")[0]).returncode == 0


@pytest.mark.parametrize("text, value, last_line", [
    ("<answer>3*5-2</answer>", 1, 1), ("<answer>(3 * 5) - 2 = 13</answer>", 1, 1), ("<answer>5*3-2</answer>\nDone.", 1, 0),
    ("<answer>1</answer> no: <answer>3*5-2</answer>", 1, 1), ("<answer>13</answer>", 0.1, 0.1),
    ("<answer>15-2</answer>", 0.1, 0.1),
    ("<answer>3*5-2+2-2</answer>", 0.1, 0.1), ("<answer>3*5</answer>", 0.1, 0.1), ("<answer>3*5-2 = 12</answer>", 0.1, 0.1),
    ("3*5-2", 0, 0), ("", 0, 0), ("<answer>3*5-2", 0, 0), ("<answer></answer>", 0.1, 0.1),
    ("<answer>3//5</answer>", 0.1, 0.1),
    ("<answer>9**9**9</answer>", 0.1, 0.1), ("<answer>__import__('os').abort()</answer>", 0.1, 0.1),
    ("<answer>3/0</answer>", 0.1, 0.1),
    ("<answer>" + "(" * 190 + "</answer>", 0.1, 0.1), ("<answer>" + "-" * 190 + "3</answer>", 0.1, 0.1),
    ("<answer>3.0*5-2</answer>", 0.1, 0.1), ("<answer>03*5-2</answer>", 0.1, 0.1), ("<answer>3 5 2</answer>", 0.1, 0.1)])
def test_countdown(text, value, last_line):
    """Every number exactly once, the target exactly; nothing is executed."""
    example = Example("", None, "?", meta={"nums": [3, 5, 2], "target": 13})
    assert (reward.countdown(text, example), reward.countdown_last_line(text, example)) == (value, last_line)


def test_countdown_is_exact():
    thirds = Example("", None, "?", meta={"nums": [1, 3, 3], "target": 1})
    assert reward.countdown("<answer>1/3*3</answer>", thirds) == 1
    assert reward.countdown("<answer>1/3*3</answer>", Example("", None, "?", ["a", "b"], 0)) == 0.1  # no Countdown question
