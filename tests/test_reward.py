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
    ("The correct answer is B) cat.", 1), ("A. I hear a dog barking", 0), ("B. Because it meows", 1), ("A. It is a cat", None),
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
    ("cat<think>dog", 1), ("<answer>dog</answer><answer>cat</answer>", None), ("<answer>dog</answer> <answer>dog</answer>", 0),
    ("<answer></answer>", None), ("<answer>dog or cat</answer>", None), ("dog <answer>cat</answer>", 1),
    ("<THINK>a cat</THINK><RESPONSE>The answer is A.</RESPONSE>", 0), ("\\boxed{B}", 1),
    ("so it is $\\boxed{\\text{bird}}$", 2),
]


@pytest.mark.parametrize("text, index", CASES, ids=[t[:30] for t, _ in CASES])
def test_table(text, index):
    assert reward.resolve(text, FOUR) == index


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
