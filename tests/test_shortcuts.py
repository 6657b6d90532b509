"""What the options give away: every rule on hand-made options, and a file that hides nothing."""

import json
import random

import pytest

import data
from data import Example
from tools.shortcuts import find_shortcuts, is_shortcut


def ask(choices, answer):
    return Example("q", None, "Which?", list(choices), answer)


@pytest.mark.parametrize(
    "rule, choices, answer",
    [
        ("the longest", ["a dog", "a cat", "a small bell"], 2),
        ("the shortest", ["a dog barks", "rain", "a small bell"], 1),
        ("the largest number", ["3 dogs", "12 dogs", "7 dogs"], 1),
        ("the smallest number", ["-3", "2.5", "7"], 0),
        ("the number nearest to the mean of all", ["10", "14", "19", "3"], 0),
        ("the number farthest from the mean of all", ["10", "11", "12", "30"], 3),
        ("the one that shares most words with the others", ["a red cat", "a red car", "a dog", "the car"], 1),
    ],
)
def test_a_rule_picks_its_choice(rule, choices, answer):
    for right in range(len(choices)):
        assert find_shortcuts([ask(choices, right)])[rule] == (right == answer, 1 / len(choices), 1)


def test_ties_count_in_parts_and_what_says_nothing_is_left_out():
    """Two of three are the longest: half a hit. Where all are as long, or a number is missing, the rule is
    silent."""
    found = find_shortcuts([ask(["bell", "bird", "cat"], 1), ask(["cow", "dog"], 0), ask(["1", "two"], 0)])
    assert found["the longest"] == ((0.5 + 0) / 2, (1 / 3 + 1 / 2) / 2, 2)
    assert "the largest number" not in found
    assert find_shortcuts([ask(["a", "bb"], None), ask(["a"], 0)]) == {}


def fair(rng, n=600):
    """Four different numbers, and any of them is right."""
    return [ask(map(str, rng.sample(range(10, 99), 4)), rng.randrange(4)) for _ in range(n)]


def near_the_right_one(rng, n=600):
    """Three wrong numbers within 10 of the right one, as one writes them without a thought."""
    asked = []
    for _ in range(n):
        right = rng.randrange(20, 80)
        near = [x for x in range(right - 10, right + 11) if x != right]
        numbers = [right, *rng.sample(near, 3)]
        rng.shuffle(numbers)
        asked.append(ask(map(str, numbers), numbers.index(right)))
    return asked


def a_favourite(rng, n=600):
    """Half of the questions offer a dog, and then it is the dog."""
    asked = []
    for i in range(n):
        names = rng.sample(["cat", "cow", "hen", "owl", "pig", "rat", "ewe"], 4)
        if i % 2:
            names[rng.randrange(4)] = "dog"
        asked.append(ask(names, names.index("dog") if i % 2 else rng.randrange(4)))
    return asked


def test_a_file_that_hides_nothing_has_no_shortcut():
    for seed in range(3):
        found = find_shortcuts(fair(random.Random(seed)))
        assert len(found) == 5 and not any(is_shortcut(*of_rule) for of_rule in found.values())


def test_the_middle_of_near_numbers_is_found():
    found = find_shortcuts(near_the_right_one(random.Random(0)))
    middle = found["the number nearest to the mean of all"]
    assert is_shortcut(*middle) and middle[0] > 0.45
    assert found["a classifier of the options"][0] > 0.45


def test_the_classifier_learns_which_text_is_right_elsewhere():
    """All names are as long and share no word: only the classifier can know. (1 + 1/4) / 2 = 0.625."""
    found = find_shortcuts(a_favourite(random.Random(0)))
    assert found["a classifier of the options"][0] == pytest.approx(0.625, abs=0.05)
    shuffled = [
        ask(e.choices, random.Random(i).randrange(4)) for i, e in enumerate(a_favourite(random.Random(0)))
    ]
    assert find_shortcuts(shuffled)["a classifier of the options"][0] == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize("make, notes", [(near_the_right_one, 2), (fair, 0)])
def test_check_names_them(tmp_path, capsys, make, notes):
    path = tmp_path / "q.jsonl"
    with open(path, "w", encoding="utf-8") as f:
        for i, e in enumerate(make(random.Random(1))):
            row = dict(id=i, audio=None, question=f"{i}?", choices=e.choices, answer=e.answer)
            f.write(json.dumps(row) + "\n")
    assert data.main(["check", str(path)]) == 0
    assert capsys.readouterr().out.count("the options alone: ") == notes
