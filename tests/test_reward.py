"""The resolver and the rewards: tables of cases, properties, and text that means harm."""

import itertools
import json
import pathlib
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
    ("dog", 0),
    ("Cat", 1),
    ("  bird \n", 2),
    ("'cat'", 1),
    ('"cat".', 1),
    ("**Cat**", 1),
    ("`bird`", 2),
    ("CAR  HORN!", 3),
    ("car-horn", 3),
    ("A dog.", 0),
    ("The dog", 0),
    # letters
    ("B", 1),
    ("b", 1),
    ("b.", 1),
    ("(b)", 1),
    ("[C]", 2),
    ("D)", 3),
    ("Option C", 2),
    ("choice: d", 3),
    ("Answer: B", 1),
    ("The answer is (A)", 0),
    ("the correct option is c.", 2),
    ("**B**", 1),
    ("E", None),
    ("Z.", None),
    # letter and text
    ("B. cat", 1),
    ("(B) cat", 1),
    ("b) Cat", 1),
    ("B: cat", 1),
    ("B. dog", None),
    ("Answer: (D) car horn", 3),
    ("The correct answer is B) cat.", 1),
    ("A. I hear a dog barking", 0),
    ("B. Because it meows", 1),
    ("A. It is a cat", None),
    # sentences
    ("The answer is cat.", 1),
    ("The answer is a dog", 0),
    ("I think it's a bird", 2),
    ("That is a car horn, I believe", 3),
    ("I choose option B because it meows", 1),
    ("It sounds like a dog barking in the distance.", 0),
    ("There is a dog and a cat. The answer is cat.", 1),
    ("答案是 cat", 1),
    # more than one answer, or none
    ("dog or cat", None),
    ("dog, cat", None),
    ("A, B", None),
    ("A and C", None),
    ("A or B", None),
    ("dog cat bird car horn", None),
    ("(A) dog (B) cat (C) bird (D) car horn", None),
    ("['dog', 'cat', 'bird', 'car horn']", None),
    ("", None),
    (" \n", None),
    ("I don't know", None),
    ("none of them", None),
    ("carhorn", None),
    ("a horn of a car", None),
    ("hotdog", None),
    ("category", None),
    ("The answer is dog. The answer is cat.", None),
    ("a", 0),
    # negation
    ("not A", None),
    ("It is not a dog, it is a cat", 1),
    ("neither dog nor cat", None),
    ("not a dog but a bird", 2),
    ("a cat rather than a dog", 1),
    ("dog is wrong; cat", 1),
    ("It isn't a dog.", None),
    ("The dog is not correct", None),
    # tags and thinking
    ("<answer>bird</answer>", 2),
    ("<answer> B </answer>", 1),
    ("<answer>bird", 2),
    ("<ANSWER>dog</ANSWER>", 0),
    ("<think>dog, surely dog</think><answer>cat</answer>", 1),
    ("<think>dog</think> cat", 1),
    ("<think>dog", None),
    ("cat<think>dog", 1),
    ("<answer>dog</answer><answer>cat</answer>", None),
    ("<answer>dog</answer> <answer>dog</answer>", 0),
    ("<answer></answer>", None),
    ("<answer>dog or cat</answer>", None),
    ("dog <answer>cat</answer>", 1),
    ("<THINK>a cat</THINK><RESPONSE>The answer is A.</RESPONSE>", 0),
    ("\\boxed{B}", 1),
    ("so it is $\\boxed{\\text{bird}}$", 2),
]


@pytest.mark.parametrize("text, index", CASES, ids=[t[:30] for t, _ in CASES])
def test_table(text, index):
    assert reward.resolve(text, FOUR) == index


MORE = [  # choices, [(text, index)]
    # (choices, [(text, index)...])
    (
        ["a dog", "two dogs", "a dog and a cat", "a cat"],
        [
            ("a dog and a cat", 2),
            ("I hear a dog and a cat.", 2),
            ("A dog", 0),
            ("two dogs are barking", 1),
            ("It is a cat", 3),
            ("the answer is a dog and a cat, not two dogs", 2),
            ("Option (c) a dog and a cat", 2),
            ("a cat and a dog", None),
        ],
    ),
    (
        ["440 Hz", "44 Hz", "4.4 kHz", "440"],
        [
            ("440 Hz", 0),
            ("440", 3),
            ("44 Hz", 1),
            ("about 4.4 kHz", 2),
            ("The tone is at 440 Hz.", 0),
            ("4,400", None),
            ("440hz", None),
            ("B) 44 Hz", 1),
        ],
    ),
    (
        ["Happy", "Unhappy", "Sad", "Not sure"],
        [
            ("happy", 0),
            ("Unhappy.", 1),
            ("The speaker is unhappy", 1),
            ("not sure", 3),
            ("I am not sure", 3),
            ("She is not happy", None),
            ("not happy but sad", 2),
            ("Sad!", 2),
            ("SAD", 2),
            ("**Sad**", 2),
            ("Sad (not happy)", 2),
        ],
    ),
    (
        ["Yes", "No"],
        [
            ("yes", 0),
            ("No", 1),
            ("Yes, it is.", 0),
            ("No, there is no dog.", 1),
            ("The answer is yes.", 0),
            ("B", 1),
            ("A. Yes", 0),
            ("A. No", None),
            ("<answer>no</answer>", 1),
            ("$\\boxed{\\text{Yes}}$", 0),
            ("yes and no", None),
        ],
    ),
    (
        ["Guitar, drums, and bass", "Piano and violin", "Guitar", "Drums"],
        [
            ("Guitar, drums, and bass", 0),
            ("guitar, drums and bass", 0),
            ("Guitar", 2),
            ("C", 2),
            ("drums", 3),
            ("guitar and drums", None),
            ("I hear piano and violin", 1),
            ("A: Guitar, drums, and bass", 0),
        ],
    ),
    (
        ["C major", "A minor", "G major", "E minor"],
        [
            ("A minor", 1),
            ("a minor", 1),
            ("The key is G major.", 2),
            ("C", 2),
            ("C major", 0),
            ("A", 0),
            ("(A)", 0),
            ("(B) A minor", 1),
            ("E minor, I think", 3),
            ("It is in A", None),
        ],
    ),
    (
        ["1", "2", "3", "4"],
        [
            ("2", 1),
            ("two", None),
            ("B", 1),
            ("There are 3 beeps", 2),
            ("3.", 2),
            ("(4)", 3),
            ("12", None),
            ("answer: 2", 1),
            ("B. 2", 1),
            ("1 or 2", None),
        ],
    ),
    (
        ["man", "woman", "child", "robot"],
        [
            ("woman", 1),
            ("man", 0),
            ("a young woman's voice", 1),
            ("I'm sorry, I cannot answer that.", None),
            ("As an AI model, I can't hear audio.", None),
            ("Neither man nor woman, a child", 2),
            ("robot\n\nExplanation: the voice is flat", 3),
            ("The speaker is a man. So the answer is A.", 0),
            ("the correct answer is: **D. robot**", 3),
            ('{"answer": "woman"}', 1),
            ("Answer - child", 2),
            ("It's not the man, it's the woman", 1),
        ],
    ),
]


@pytest.mark.parametrize(
    "text, choices, index", [(text, choices, index) for choices, cases in MORE for text, index in cases]
)
def test_table_of_other_choices(text, choices, index):
    assert reward.resolve(text, choices) == index


@pytest.mark.parametrize(
    "text, choices, index",
    [
        ("C#", ["C", "C#", "D"], 1),
        ("C", ["C", "C#", "D"], 0),
        ("A minor", ["A", "A minor"], 1),
        ("A", ["C", "A", "B"], 1),
        ("3.5", ["3", "3.5", "35"], 1),
        ("3", ["3", "3.5", "35"], 0),
        ("-5", ["5", "-5"], 1),
        ("120 bpm", ["120", "60"], 0),
        ("50%", ["50%", "5%"], 0),
        ("two dogs", ["two dogs", "dogs"], 0),
        ("dogs", ["two dogs", "dogs"], 1),
        ("there are two dogs", ["two dogs", "dogs"], 0),
        ("yes", ["Yes", "No"], 0),
        ("No.", ["Yes", "No"], 1),
        ("狗", ["狗", "猫"], 0),
        ("我听到一只猫", ["狗", "猫"], 1),
        ("café", ["café", "bar"], 0),
        ("CAFÉ", ["café", "bar"], 0),
        ("की", ["का", "की"], 1),
        ("red, green", ["red", "green", "red, green"], 2),
        ("not present", ["present", "not present"], 1),
        ("dog", ["dog", "cat", "dog"], 0),
        ("Ｂ", ["dog", "cat"], 1),
        ("ABBA", ["ABBA", "Queen"], 0),
        ("U.S.", ["U.S.", "U.K."], 0),
        ("x", [], None),
        ("dog", ["?", "!"], None),
        ("?", ["?", "!"], 0),
    ],
)
def test_odd_choices(text, choices, index):
    assert reward.resolve(text, choices) == index


SAID = {  # choices: {index: completions}
    tuple(FOUR): {
        None: [
            "Option B is wrong.",
            "Option B is not correct.",
            "Choice B is not correct.",
            "It is not option B.",
            "It can't be option B",
            "I would not choose option B.",
            "I would rule out option A.",
            "Wrong option: B",
            "Answer A is wrong.",
            "(A) is incorrect",
            "A) dog is wrong",
            "A. Incorrect",
            "A. Not heard",
            "A. dog: not heard",
            "(a) or (b)",
            "(a), (b)",
            "a) or b)",
            "a. and b.",
            "The answer is (b) or (c).",
            "option a or option b",
            "Answer: B♭ major",
            "Answer: D-flat major",
            "Answer: C maj",
            "D dorian",
            "Answer: C major",
            "The answer is dog. Wait, it is cat.",
            "Initially I thought the answer is dog. But it's cat.",
            "At first the answer seems dog. Actually cat.",
            "The answer is A. No wait, B.",
            "cat (A)",
            "Answer: cat (A)",
            "dog (B)",
            "cat - A",
            "cat, option A",
            "I don't think that the sound in this clip is a dog.",
            "dog can be ruled out",
            "The dog is absent",
            "The dog does not appear",
            "Dog: incorrect",
            "dog (incorrect)",
            "Dog? No.",
            "I'd eliminate dog",
            "dog and cat are incorrect",
            "It's unlikely to be a dog",
            "The dog is unlikely",
            "It's hardly a dog",
            "It wouldn't be a dog",
            "It couldn't be the dog",
            "it shouldn't be a dog",
            "it ain't a dog",
            "It hasn't a dog",
            "B\ndog",
            "Is it a dog?",
            "Could it be a cat?",
            "Dog or cat?",
            "I can't tell if it is a dog or a cat.",
            "It is hard to say whether it's a dog.",
            "I cannot hear a dog.",
            "There is no dog in this audio.",
            "Not dog.",
            "Definitely not a dog.",
            "no dog",
            "It's anything but a dog",
            "cat > dog",
            "Everything except dog",
            "all but cat",
            "It doesn't sound like a dog to me",
            "I don't hear a dog",
            "Nobody would say it's a dog",
            "I doubt it's a dog",
            "I doubt that it is a dog.",
            "It's far from a dog",
            "It fails to match a dog",
            "A dog would bark.",
            "A. dog B. cat C. bird D. car horn",
            "The options are dog, cat, bird, and car horn.",
            "dog/cat/bird/car horn",
            "The answer is B, no, C.",
            "B... no, C",
            "B. Actually, C.",
            "Wait, B. No, C.",
            "Answer: B\nAnswer: C",
            "The answer is dog, but it could also be cat.",
            "The answer is dog. Alternatively, cat.",
            "dog. Or cat.",
            "dog and also cat",
            "dog + cat",
            "dog & cat",
            "dog\ncat",
            "1. dog\n2. cat",
            "dog; cat",
            "dog -> cat",
            "A/B",
            "A & B",
            "A,B",
            "AB",
            "A B",
            "B, C",
            "B and C",
            "(B)(C)",
            "Options B and C",
            "The answer is B and C.",
            "B as well as C",
            "A through D",
            "A-D",
            "Option A: dog\nOption B: cat",
            "I'm sorry, but I can't listen to audio. It may be a dog.",
            "As an AI, I cannot hear, but typical answers are dog or cat",
            "Sorry, I can't help with that.",
            "Please provide the audio file.",
            "The audio is unclear; I can't say if it's a dog.",
            "I cannot determine the answer. A dog barks usually.",
            "The answer cannot be determined.",
            "The answer is unclear, maybe a dog or a cat",
            "unknown",
            "N/A",
            "n/a",
            "I",
            "e",
            "The answer is E.",
            "Plan B is fine",
            "Vitamin C",
            "Hepatitis B virus",
            "It is in C major",
            "The note is C.",
            "grade A audio",
            "A sound.",
            "A loud noise.",
            "这是狗叫",
            "不选B",
            "答案不是B",
            "La respuesta no es B.",
            "Die Antwort ist nicht B.",
            "Ce n'est pas B.",
            "<answer>dog</answer>\n<answer>cat</answer>",
            "dogs",
            "The dogs",
            "catlike",
            "a cat-like sound",
            "dog-free",
            "non-dog sound",
            "Cats",
            "The speaker says 'dog' but the sound is a cat.",
            "I hear a dog (option B)",
            "The answer is B (dog).",
            "The answer is A, cat.",
            "A. dog. B. cat.",
            "The answer is dog, which corresponds to option B.",
            "Answer: none",
            "Answer:",
            "The answer is",
            "The answer is:",
            "Answer: the sound of rain",
            "<answer></answer>",
            "dogdog",
            "The correct answer is not listed.",
            "I would not say dog",
            "dog... wait, cat",
            "It is a dog. Just kidding, it is a cat.",
            "It isn't A, C, or D.",
            "I reject B.",
            "B is out.",
            "B can be excluded.",
            "B must be wrong.",
            "B doesn't fit.",
            "B does not match the audio",
            "Option B doesn't match.",
            "It's B that is wrong.",
            "The wrong answer is B.",
            "An incorrect answer would be B.",
            "The least likely answer is B.",
            "the answer is anything but B",
            "The answer isn't B.",
            "The answer can't be B.",
            "The answer must not be B",
            "The answer is never B.",
            "Answer: not B",
            "Answer: definitely not dog",
            "no, not B",
            "Anything but dog",
            "B is false",
            "B (wrong)",
            "B - wrong",
            "B: wrong",
            "Not (B)",
            "B ❌",
            "❌ B",
        ],
        0: [
            "dog (A)",
            "The sound you hear is that of a dog barking.",
            "Well, that's clearly a dog.",
            "I would go with A.",
            "Is it dog? Yes, dog.",
            "Is it a dog? Yes.",
            "Let's analyze each option:\n\nA. dog: There is barking.\nB. cat: no.\nC. bird: no.\nD. car horn: "
            "no.\n\nTherefore, the correct answer is A. dog.",
            "The answer is dog (option A).",
            "The answer is dog, which is option A.",
            "Option A corresponds to the dog, and it's the correct answer.",
        ],
        1: [
            "B\n\nExplanation: I hear a meow, not a bark.",
            "B, because it meows.",
            "B is correct.",
            "B is the answer",
            "I'd go with B.",
            "It must be B.",
            "B, not A",
            "not A but B",
            "Option B: cat",
            "<answer>\nB\nbecause it meows</answer>",
            "The correct answer is B because option A has no meow and option C no chirp.",
            "Ans: B",
            "\\text{B}",
            "\\boxed{\\mathbf{B}}",
            "B<|im_end|>",
            "<answer>cat<answer>",
            "选B",
            "选项B",
            "我选择B。",
            "回答はB",
            "Ответ: B",
            "Die Antwort ist B.",
            '{"answer": "B"}',
            '{"answer": "cat"}',
            "{'answer': 'B'}",
            "You can hear a cat meowing.",
            "Answer is cat",
            "answer cat",
            "ANSWER: CAT",
            "Selected option: B",
            "Option (B)",
            "option b",
            "Option B.",
            "(B) cat.",
            "[B] cat",
            "B - cat",
            "B) cat\n",
            "B.cat",
            "B:cat",
            "B cat",
            "cat, B",
            "cat. (B)",
            "**B) cat**",
            "_cat_",
            "`B`",
            "B\ncat",
            "cat\nB",
            "The answer is B: cat",
            "The answer is **B**.",
            "The answer is option (b) cat",
            "Correct answer: B",
            "So, the answer is B.",
            "Hence, B.",
            "I choose B",
            "I choose B.",
            "I would say B.",
            "I'd say it's B.",
            "Let's go with B",
            "My final answer is B.",
            "Final answer: B",
            "Final answer - B",
            "The best choice is B",
            "It's B.",
            "It is B",
            "B!",
            "Probably B.",
            "Definitely B!",
            "I think B.",
            "I think it is B",
            "I believe B is correct.",
            "I'm confident the answer is B.",
            "I am not sure, but I think the answer is B.",
            "I'm not sure but B",
            "Is it a dog? No, it's a cat.",
            "There's no dog here, only a cat.",
            "I hear no bird, no dog, just a cat.",
            "It's a cat, definitely not a dog.",
            "cat (not dog)",
            "cat, not dog",
            "cat instead of dog",
            "a cat and not a dog",
            "rather a cat than a dog",
            "more like a cat than a dog",
            "A dog? I don't think so. It's a cat.",
            "If it were a dog, it would bark. It's a cat.",
            "A dog would bark, but here I hear a cat.",
            "Although it resembles a dog, the answer is cat.",
            "A: incorrect\nB: correct\nC: incorrect\nD: incorrect",
            "A) No bark heard. B) Meow is heard. So B.",
            "- A: dog: not heard\n- B: cat: clearly heard\n- C: bird: not heard\n- D: car horn: not heard",
            "A. dog - no barking is present.\nB. cat - meowing is present.\nC. bird - no chirping.\nD. car horn - "
            "none.\nThe answer is B.",
            "Options: A. dog B. cat C. bird D. car horn\nAnswer: B",
            "The answer is not A, it is B.",
            "The answer is not dog but cat.",
            "The answer isn't A. It's B.",
            "Not A. B.",
            "A? No. B.",
            "Answer: B\n\nAnswer: B",
            "The answer is B. I repeat: B.",
            "答案是B。",
            "答案：B",
            "答案是（B）。",
            "正确答案是 B. cat",
            "选择 B",
            "我认为答案是B",
            "不是A，是B",
            "答えはBです",
            "정답은 B입니다.",
            "Die richtige Antwort ist B.",
            "Die Antwort lautet: B",
            "La respuesta correcta es B.",
            "La réponse est B.",
            "La risposta è B.",
            "A resposta correta é B.",
            "Правильный ответ: B",
            "Es ist kein dog, sondern cat",
            "उत्तर: B",
            "<think>I hear meow</think>\n<answer>B. cat</answer>",
            "<think>\nmaybe dog\n</think>\n\nThe answer is cat.",
            "</think>B",
            "<answer>The answer is B</answer>",
            "<answer>B</answer> because dog is not heard",
            "<response>cat</response>",
            "<answer>(B)</answer>",
            "<answer>[cat]</answer>",
            "<answer>cat.</answer>",
            "[answer]B[/answer]",
            "B</s>",
            "B<|endoftext|>",
            "<b>B</b>",
            "```\nB\n```",
            '{"choice": "B"}',
            '{"answer": "B", "explanation": "dog is absent"}',
            "Answer = B",
            "answer=B",
            "ans. B",
            "cat\n\nThe audio clip contains a meowing sound, which is typical of a cat.",
            "cat\n\nThere is no dog.",
            "The correct answer is cat because dogs bark and a bird chirps.",
            "B because the sound is not a dog.",
            "B since A is not heard.",
            "B, as the cat meows.",
            "B, since dog is wrong",
            "B is the correct answer because A, C and D are not heard.",
            "I can rule out A, C, and D. So B.",
            "Eliminating dog and bird, I'm left with cat.",
            "The correct answer is B, not A.",
            "B seems right.",
            "B appears to be correct.",
            "B would be the best answer.",
            "The sound matches option B.",
            "Option B fits.",
            "Option B matches best.",
            "option B, because cat",
            "A is incorrect because there's no barking. B is correct.",
        ],
        2: [
            "A. dog\nB. cat\nC. bird\nD. car horn\n\nAnswer: C. bird",
            "A. dog\nB. cat\nC. bird\nD. car horn\n\nC. bird",
            "A. dog\nB. cat\nC. bird\nD. car horn\n\nC",
            "A. dog\nB. cat\nC. bird\nD. car horn\n\nThe answer is C.",
            "The options are dog, cat, bird and car horn. The answer is bird.",
            "Based on the audio, I would choose: bird",
            "The right answer is c",
            "Therefore, the sound is a bird.",
            "I select option C.",
            "My choice is C.",
            "I didn't hear any dog; I heard a bird",
            "Dog is wrong. Cat is wrong. Bird is right.",
            "A is wrong, B is wrong, so C.",
            "A and B are wrong. C is correct.",
            "Neither A nor B. C.",
            "应该选C。",
            "正解：C",
            "정답: C",
            "La bonne réponse est (C).",
            "Ответ: C.",
            "The animal heard is definitely a bird.",
            "This clip features the sound of a bird singing.",
            "bird's song",
            "bird.\n\nThe bird chirps.",
        ],
        3: [
            "The audio features a car horn.",
            "My answer: car horn",
            "Thus the correct option is D) car horn.",
            "I'd pick D.",
            "That would be a car horn",
            "What you are hearing is a car horn.",
            "After ruling out A, B and C, the answer is D.",
            "Not A, B, or C, so D.",
            "Not A, B or C but D.",
        ],
    },
    ("Woman speaking", "Man speaking", "Child laughing", "Dog barking"): {
        1: ["Answer: A man is speaking", "The answer is: A man speaking"],
    },
    ("A woman", "A man"): {
        1: ["The answer is A man", "The answer is: A man."],
    },
    ("C major", "A minor", "B flat minor", "D dorian"): {
        None: ["Answer: C maj", "Answer: B♭ major", "Answer: D-flat major"],
    },
    ("Implying triviality", "Criticizing", "Praising Stuart's choice genuinely.", "Expressing surprise."): {
        None: [
            "Implying triviality, Criticizing, Praising Stuart's choice genuinely., Expressing surprise.",
            "Implying triviality Criticizing Praising Stuart's choice genuinely. Expressing surprise.",
            "Implying triviality\nCriticizing\nPraising Stuart's choice genuinely.\nExpressing surprise.",
        ],
    },
    ("Yes", "No"): {
        None: [
            "There is no audio provided.",
            "I'm sorry, there is no audio attached.",
            "I have no idea.",
            "no clue",
            "There is no way to tell.",
            "I hear no dog",
            "The audio has no sound.",
            "Nope",
            "Yes. No, wait.",
            "It is not clear.",
            "yes/no",
            "Yes or no?",
            "No, yes.",
            "There's no sound.",
            "No audio.",
            "No idea",
            "No one speaks.",
            "Not at all.",
            "The answer is neither yes nor no.",
            "Yes? No? I don't know.",
            "There are no yes or no answers",
            "not no",
            "Is there music? Yes. Is there speech? No.",
            "No music, no speech.",
            "No music.",
        ],
        0: [
            "Yes, there is no dog.",
            "Yes, I can hear it, no doubt.",
            "Yes. There is no other sound.",
            "With no doubt yes",
            "Yes",
            "Yes, there is a dog barking.",
            "No doubt: yes",
            "I would say yes, definitely.",
            "No problem! The answer is yes.",
            "(A) Yes",
            "A. Yes, it is",
            "Absolutely yes!",
            "Yes, no other speaker is present",
            "Yes it does.",
            "I think yes",
            "Answer: A",
        ],
        1: [
            "No.",
            "No, I do not hear it.",
            "The answer is no.",
            "The answer is No, there isn't.",
            "There is no dog, so the answer is no.",
            "I'd say no.",
            "(B) No",
            "B. No, there is none",
            "No — there are two speakers.",
            "no\n\nThe speaker is alone.",
            "No it doesn't.",
            "The answer to the question is no.",
            "Correct answer: No",
            "I think no.",
            "B. No.",
            "no, it isn't",
            "No!",
            "No, sir",
            "no\n",
            "**No**",
            "No (there is silence)",
            "No because it is silent",
            "No since it's silent",
        ],
    },
    ("Happy", "Sad"): {
        None: ["I'd be happy to help, but no audio was provided."],
    },
    ("10 seconds", "20 seconds", "30 seconds", "40 seconds"): {
        None: [
            "10-20 seconds",
            "between 10 and 20 seconds",
            "10 or 20 seconds",
            "10, 20 seconds",
            "less than 10 seconds",
            "10 to 20 seconds",
        ],
        0: ["10 seconds", "It lasts 10 seconds.", "The answer is 10 seconds"],
    },
    ("120 BPM", "140 BPM", "90 BPM"): {
        None: ["120-140 BPM", "120–140 BPM", "between 120 and 140 BPM"],
    },
    ("Acoustic guitar", "Electric guitar"): {
        None: [
            "acoustic or electric guitar",
            "an acoustic or an electric guitar",
            "acoustic/electric guitar",
            "electric guitar or acoustic",
        ],
    },
    ("First speaker", "Second speaker"): {
        None: ["first or second speaker", "first and second speaker", "the first or the second speaker"],
    },
    ("jazz", "rock", "pop", "blues"): {
        None: ["It isn't jazz, rock", "neither jazz, rock nor pop"],
    },
    ("Vocal", "Instrumental"): {
        None: ["non-vocal", "It is non-vocal music"],
    },
    ("Stationary", "Clockwise", "Happy"): {
        None: ["non-stationary", "anti-clockwise", "un-happy"],
    },
    ("happy", "sad", "angry", "neutral"): {
        3: [
            "The tone is neutral; not happy, sad, or angry.",
            "neither happy, sad, nor angry but neutral",
            "The tone is neutral, neither happy nor sad.",
            "The speaker is neither happy, sad, nor angry; the tone is neutral.",
        ],
        1: [
            "Is it happy? No. It's sad.",
            "The speaker's tone is not happy but sad.",
            "She isn't angry, she's sad.",
            "sad rather than angry",
            "The speaker seems sad, as opposed to angry.",
        ],
        0: ["The speaker sounds happy."],
        None: [
            "The emotion conveyed is anger",
            "She sounds unhappy",
            "mostly neutral, slightly sad",
            "I'm happy to help, but I can't listen to audio.",
            "The mood is a mix of happy and sad",
            "The speaker is not at all happy.",
            "far from happy",
        ],
        2: ["angry (not sad)", "It's not that she's sad; she's angry."],
    },
    ("A dog barking", "A cat meowing", "Birds chirping", "A car horn honking"): {
        0: [
            "The sound in the audio is a dog barking.",
            "Based on the audio, the answer is A dog barking.",
            "dog barking",
            "Answer: A.",
            "A",
            "A dog barking, not a cat meowing.",
        ],
        1: [
            "The audio contains the sound of a cat meowing, so the correct choice is B.",
            "It's not a dog barking; it's a cat meowing.",
            "The correct answer is: A cat meowing.\n\nThe meowing is clearly audible, while no dog barking can be "
            "heard.",
            "I believe that the answer would be B, as the meow is distinct.",
            "Option A, a dog barking, is unlikely. Option B, a cat meowing, fits best.",
            "$\\boxed{\\text{(B) A cat meowing}}$",
            "I'm torn between A dog barking and A cat meowing, but the answer is A cat meowing.",
        ],
        None: [
            "I can hear birds chirping in the background, and a dog barking in the foreground.",
            "The audio is silent, so I cannot determine the answer.",
            "A cat",
            "It is a",
            "I hear a",
            "This is a",
            "None of the above.",
            "All of the above.",
            "Both A and B.",
            "both a dog barking and a cat meowing",
            "The answer is either A or B.",
        ],
        2: [
            "The primary sound is birds chirping. Therefore, the answer is C) Birds chirping.",
            "Sure! The answer is (C) Birds chirping.",
            "**Answer:** C. Birds chirping",
            "### Answer\nC",
            "It could be A or C, but I'd go with C.",
        ],
        3: [
            "Let me think. First I hear a car horn honking, then a dog barking. The question asks for the first "
            "sound. So the answer is D.",
            "A car horn honking is heard at the start.",
            "The sound is most consistent with option D, a car horn honking.",
            "D. A car horn",
            "Final Answer: \\boxed{D}",
        ],
    },
    ("C major", "A minor", "G major", "E minor"): {
        2: ["The key is G major.", "C"],
        1: ["The song is in A minor.", "A minor key", "B. A minor"],
        None: [
            "The key is C.",
            "The key is A",
            "G",
            "C or G major",
            "C major or A minor",
            "The piece is in C# major",
            "C sharp major",
            "C-sharp major",
            "E flat minor",
            "F major",
            "minor",
            "It's in a minor key",
            "The song is in a minor key",
            "It sounds like a minor",
        ],
        3: ["It's in the key of E minor, not G major", "The answer is D."],
        0: ["A. C major"],
    },
    ("10 seconds", "20 seconds", "30 seconds", "5 seconds"): {
        0: ["About 10 seconds", "It's 10 seconds, not 20 seconds."],
        None: [
            "10s",
            "10",
            "It lasts between 10 and 20 seconds",
            "15 seconds",
            "more than 20 seconds",
            "at least 10 seconds",
            "under 10 seconds",
            "5 to 10 seconds",
            "5-10 seconds",
            "ten seconds",
            "110 seconds",
            "10.5 seconds",
            "over 20 seconds",
        ],
        1: ["The clip is 20 seconds long."],
        3: ["D. 5 seconds"],
    },
    ("One", "Two", "Three", "Four"): {
        1: ["There are two speakers.", "The answer is two.", "I hear two voices, so the answer is Two.", "B"],
        0: ["One", "one"],
        None: [
            "one of them",
            "The first one",
            "No one",
            "One or two",
            "two to three",
            "two, maybe three",
            "There are three people: one man and two women.",
            "the last one",
        ],
    },
    ("Acoustic guitar", "Electric guitar", "Bass guitar", "Piano"): {
        1: ["An electric guitar"],
        None: [
            "guitar",
            "acoustic and electric guitars",
            "acoustic and electric guitar",
            "bass or electric guitar",
            "acoustic, electric and bass guitar",
            "piano and acoustic guitar",
            "either acoustic or bass guitar",
            "Electric",
        ],
        0: [
            "The instrument is an acoustic guitar.",
            "It's an acoustic guitar, not an electric one.",
            "not electric guitar but acoustic guitar",
        ],
        3: ["a piano"],
    },
    ("Male", "Female"): {
        1: ["female", "a female speaker", "The voice is female, not male", "B", "It's B, female."],
        0: ["The speaker is male.", "A) Male"],
        None: [
            "male or female",
            "non-female",
            "The speaker is a man",
            "Male.\nFemale.",
            "The first speaker is male and the second is female.",
        ],
    },
    (
        "A man speaking with music in the background",
        "A woman speaking",
        "Music",
        "A crowd cheering and applauding",
    ): {
        0: ["A man speaking with music in the background", "A man is speaking with music in the background."],
        None: [
            "A man speaking with music",
            "The answer is A man speaking",
            "A woman is speaking over music",
            "a crowd cheering and",
            "A crowd cheering and applauding, with music",
            "the answer is A crowd",
            "Answer: A woman",
            "Answer: A man speaking with music in the",
        ],
        2: ["Music plays", "The audio contains music."],
        1: ["A woman is speaking"],
    },
    ("Rain falling on a roof", "Wind blowing through trees", "Waves crashing", "Fire crackling"): {
        0: [
            "The audio clip features the sound of rain falling on a roof.",
            "Step 1: listen. Step 2: The sound is steady. Step 3: Conclude.\nAnswer: A",
            "Given the steady pattern, the answer must be A.",
            "The clip: [rain falling on a roof]",
        ],
        2: [
            "The sound is of waves crashing on the shore.",
            "I think it's waves crashing, though it might be rain.",
            "Considering all options, I conclude that C is the correct answer.",
            "I will go with C: Waves crashing.",
            "The sound heard is 'Waves crashing'.",
            "C, but I'm not sure.",
            "C (I'm not 100% sure)",
            "C; not A, B or D",
            "The sound can't be A since there's no rain, and B is excluded by the lack of wind. D has crackling. So C.",
            "Is it A? No, no rain. Is it B? No. Is it C? Yes.",
            "The answer is C because waves crashing has a periodic sound, unlike rain falling on a roof.",
            "answer: c",
            "the answer is c",
            "the answer is c) waves crashing",
            "c) waves crashing",
            "c. waves crashing",
            "(c) waves crashing",
            "option c",
            "choice c",
            "ANSWER: C",
            "Answer: C)",
            "C)",
            "'C'",
            '"C"',
            "C,",
            "C:",
            "C -",
            "- C",
            "* C",
            "• C",
            "My guess is C.",
            "I guess C.",
            "I'd guess waves crashing.",
            "I apologize, but I am unable to process audio. However, the answer is C.",
            "<audio> The sound is waves crashing </audio>",
            "Waves crashing\n\nWaves crashing\n\nWaves crashing",
            "The answer is C. The answer is C. The answer is C.",
        ],
        3: [
            "Fire crackling is the dominant sound; there is also some wind.",
            "I do not believe the sound is waves crashing; rather, it is fire crackling.",
            "The background noise isn't rain falling on a roof or wind blowing through trees. It's fire crackling.",
            "Option D: Fire crackling is correct.",
            "It's neither A nor B. C could be, but there's no water. So D.",
        ],
        1: [
            "The correct answer is (B) Wind blowing through trees.",
            "Wind blowing through trees is the most likely answer, given the rustling.",
        ],
        None: [
            "Waves crashing or fire crackling",
            "The audio does not contain waves crashing.",
            "The background noise isn't rain falling on a roof or wind blowing through trees.",
            "Rain",
            "It's a tie between A and D.",
            "A and D are both plausible.",
            "Could be C?",
            "Is it rain falling on a roof? I don't think so.",
            "There isn't enough information to choose.",
            "I cannot listen to audio files directly.",
            "C C C C",
            "Waves crashing. Waves crashing. Fire crackling.",
            "The answer is C. The answer is D.",
        ],
    },
    ("The first speaker", "The second speaker", "Both speakers", "Neither speaker"): {
        2: ["Both speakers"],
        0: ["The first speaker is angry.", "first speaker"],
        3: ["Neither speaker", "Neither speaker is angry.", "The answer is neither speaker.", "D"],
        None: [
            "neither the first speaker nor the second speaker",
            "the first or the second speaker",
            "The first and second speaker",
            "the second one",
        ],
        1: ["Not the first speaker but the second speaker", "It's the second speaker."],
    },
    ("The dog is barking", "The dog is not barking", "There is no dog", "It cannot be determined"): {
        1: ["The dog is not barking", "B. The dog is not barking"],
        0: ["The dog is barking."],
        2: ["There is no dog.", "The answer is: There is no dog"],
        3: ["It cannot be determined.", "The answer is it cannot be determined"],
        None: ["The dog isn't barking", "A. The dog is not barking", "I cannot tell.", "no dog", "The dog"],
    },
    ("To express sarcasm", "To show support", "To mock the guests", "To change the subject"): {
        0: ["The speaker wants to express sarcasm."],
        2: ["to mock the guests, not to show support"],
        1: [
            "The speaker's intent is to show support, given her tone.",
            "I think the purpose is B: to show support.",
        ],
        3: ["The intent is to change the subject rather than to mock the guests."],
        None: ["to express sarcasm and to mock the guests", "To show"],
    },
    ("A", "B", "C", "D"): {
        0: ["A"],
        1: ["The answer is B."],
        2: ["(C)"],
        3: ["D. D", "Option D"],
        None: ["A or B"],
    },
    ("B", "A", "D", "C"): {
        1: ["A", "B. A", "(B) A"],
        0: ["A. B"],
    },
    ("Cough", "Sneeze", "Laughter", "Yawn"): {
        None: ["The person coughs.", "A: Sneeze", "A cough, then a sneeze.", "A) A sneeze"],
        0: ["cough", "A. A cough", "The correct choice is a cough", "Option A: a cough"],
        2: ["laughter can be heard", "The sound is laughter.", "A laughter"],
        1: [
            "A sneeze.",
            "B: sneeze",
            "A sneeze",
            "The answer is a sneeze",
            "I'd go with a sneeze.",
            "I would choose A sneeze.",
        ],
        3: ["A yawn is heard", "It is a yawn", "best option: a yawn"],
    },
    ("Classroom", "Kitchen", "Street", "Church"): {
        3: [
            "The recording takes place in a church.",
            "We can eliminate kitchen and street; between classroom and church, I pick church.",
            "Church because the classroom would have no reverb",
            "It does not sound like a classroom, kitchen, or street, so church.",
            "Kitchen: no\nStreet: no\nChurch: yes\nClassroom: no",
        ],
        2: [
            "It's a street scene, no kitchen sounds.",
            "not in a church; on a street",
            "The setting is neither a church nor a classroom but a street.",
            "This cannot be a classroom, as there are cars; it is a street.",
            "A classroom is too quiet, a kitchen would have dishes, so it is a street",
        ],
        1: [
            "The place is most likely a kitchen, because dishes clatter.",
            "Since there is no choir, it's not a church. Dishes suggest a kitchen.",
            "The audio suggests kitchen",
            "kitchen (most likely)",
            "The only option that fits is kitchen.",
            "Only kitchen fits.",
            "Everything points to a kitchen",
        ],
        None: [
            "in a kitchen or in a classroom",
            "Kitchen/Classroom",
            "Likely kitchen, possibly street",
            "Kitchen. Possibly street.",
            "the street is outside the church",
            "Kitchen? Street? Church?",
            "It does not sound like a classroom, kitchen, or street.",
            "All the options except church are unlikely.",
            "Nothing suggests a kitchen",
            "There is nothing that suggests a kitchen.",
            "No evidence of a kitchen.",
            "No kitchen sounds here",
            "Without dishes, a kitchen is out of the question.",
            "Kitchen is the least likely.",
            "Kitchen is unlikely",
            "kitchen is less likely than street",
            "Kitchen can't be right.",
            "Kitchen is not it.",
            "kitchen seems off",
            "A kitchen makes no sense.",
            "A kitchen does not make sense",
            "I disagree with kitchen",
            "I refuse to say kitchen",
            "It would be wrong to say kitchen.",
            "kitchen would be wrong",
            "Kitchen would be incorrect",
            "It's incorrect to choose kitchen",
            "avoid kitchen",
            "opposite of kitchen",
            "Kitchen: 10%, Street: 90%",
            "not kitchen not street not church",
            "never a kitchen",
            "hardly a kitchen",
            "scarcely a kitchen",
            "it is no kitchen",
            "by no means a kitchen",
            "Kitchen is by no means right",
            "kitchen is definitely wrong",
            "kitchen is clearly not the answer",
            "kitchen is not the correct answer",
            "Kitchen is not likely to be correct",
            "kitchen has been ruled out",
            "The kitchen option can be discarded",
            "the kitchen is nowhere to be heard",
            "There's zero kitchen noise",
            "The answer could be kitchen if there were dishes",
            "The answer would be kitchen if there were dishes, but there are none",
        ],
    },
    ("Piano", "Violin", "Drums", "Flute"): {
        0: [
            "To determine the instrument, I listened for timbre. The sound has a bright attack and decay typical "
            "of struck strings. The piano is the most likely instrument. Answer: A",
            "I hear drums? No, piano.",
            "The answer is A. B is wrong.",
            "The answer is A; B, C and D are wrong.",
            "The answer is A and not B.",
            "A instead of B",
            "A rather than B",
            "Not B. It's A.",
        ],
        2: [
            "The audio begins with a violin, and then drums join. The question asks what joins later. The "
            "answer: Drums."
        ],
        3: [
            "First there is a piano, followed by a flute. Since the question asks for the last instrument, the "
            "answer is flute.",
            "In the audio, the melody is played by a flute. The flute has a breathy tone.",
            "The melody is played by a flute, accompanied by piano. So the correct option is D.",
            "The instrument is not the piano, violin or drums. It must be the flute.",
            "Compared to the piano, the flute is softer. Answer: flute",
            "Best guess is flute",
            "I'm leaning towards flute",
            "I'm inclined to say flute",
            "Likely answer: flute",
            "Most likely: flute",
            "Most likely the flute.",
            "The most likely option is D",
            "no piano, no violin, no drums -> flute",
            "Piano, Violin, Drums, Flute. I pick Flute.",
            "A) Piano B) Violin C) Drums D) Flute. Answer: D",
            "A) Piano\nB) Violin\nC) Drums\nD) Flute\nD) Flute",
            "Not A\nNot B\nNot C\nD",
        ],
        None: [
            "The melody is played by a flute, accompanied by piano.",
            "The instrument isn't a piano. It isn't a violin either. It could be drums or a flute.",
            "I first considered piano. However, the sustained notes indicate violin.",
            "not piano/violin",
            "piano/violin?",
            "piano and/or violin",
            "piano (maybe violin)",
            "piano, perhaps violin",
            "piano, or possibly violin",
            "Either the piano or the violin.",
            "Both piano and violin",
            "Piano plus violin",
            "piano with drums",
            "A piano duet with violin",
            "piano, then violin",
            "Piano... Violin... Drums... Flute...",
            "All four: piano, violin, drums, flute",
            "piano violin",
            "A) Piano\nB) Violin\nC) Drums\nD) Flute\n\nThe correct answer is not A) Piano.",
            "I won't choose between piano and violin",
            "I cannot choose",
            "I can't pick an option; the audio is missing.",
            "The audio does not contain any instruments such as piano.",
            "if piano then A",
            "It depends: piano or violin.",
            "A > B",
            "A beats B",
            "False: B",
            "The violin is the instrument that is NOT heard.",
            "The instrument not heard is the violin.",
            "The one that does not fit is violin",
            "vi0lin",
            "violins",
            "viola",
            "Violín",
            "V i o l i n",
            "Pian",
            "Flut",
            "The answer is Flu",
            "The answer is pia",
            "<think>It is piano</think>I am unsure.",
            "<answer>B or C</answer>",
            "<answer>not B</answer>",
            "<answer>B</answer> no, <answer>C</answer>",
            "\\boxed{B} or \\boxed{C}",
            "没有 piano",
            "是 piano 还是 violin？",
            "A 是错的",
            "A不对",
            "ピアノ",
            "A는 아닙니다",
        ],
        1: [
            "There are no drums. There's a violin.",
            "There are no drums, just a violin.",
            "I first considered piano. However, the sustained notes indicate violin. My answer is violin.",
            "Unlike a piano, a violin has sustained notes. So violin.",
            "The piano has a percussive attack, unlike what I hear. The violin has sustained notes, which match. "
            "Therefore, B.",
            "B. Violin is correct, since the sound is bowed.",
            "B. Violin. The bowing is audible; there's no piano.",
            "Answer: (B) Violin. Explanation: The bowing noise rules out piano and flute.",
            "(B) Violin because A, C, and D don't have bowing.",
            "The answer is Violin (B).",
            "The answer is 'Violin'.",
            'The answer is "B".',
            "the answer is: b",
            "The answer is: b.",
            "The answer is:\n\nB",
            "The answer is:\n\nB. Violin",
            "The answer is:\n- Violin",
            "**Final answer**: **B**",
            "**Final answer:**\n\n**B. Violin**",
            "> **B. Violin**",
            "Answer: `B`",
            "Answer: [B]",
            "Answer: {B}",
            "Answer → B",
            "Answer is (b)",
            "Answer is b) violin",
            "The correct letter is B.",
            "Letter B",
            "Letter: B",
            "B is my answer.",
            "B is my final answer",
            "I heard (B)",
            "It would be B.",
            "My best guess would be B.",
            "My best guess: violin",
            "most probably B",
            "Options: Piano / Violin / Drums / Flute\n\nViolin",
            "No, B.",
            "No. B.",
            "Yes, B.",
            "Yes - B",
            "Sure, B",
            "OK: B",
            "Okay, the answer is B",
            "Correct: B",
            "Incorrect: A, C, D. Correct: B.",
            "Wrong: A\nWrong: C\nRight: B",
            "Violin is missing, so the answer is Violin.",
            "violin!!!",
            "VIOLIN",
            "<think>..</think><answer>B</answer><answer>B</answer>",
            "<answer>I think it's B</answer>",
            "<answer>Answer: B. Violin</answer>",
            "Answer: <answer>B</answer>",
            "\\boxed{B. Violin}",
            "\\boxed{\\text{Violin}}",
            "The answer is $B$.",
            "The answer is $\\mathbf{B}$.",
            "\\(\\boxed{B}\\)",
            "\\textbf{B}",
            "我选择 Violin",
            "声音是 violin，不是 piano",
            "不是 piano，而是 violin",
            "選 B",
        ],
    },
    ("A woman laughing", "A man coughing", "A baby crying", "An engine idling"): {
        None: [
            "A man coughs",
            "A baby",
            "A. A baby crying",
            "A: A man coughing",
            "I hear a woman and a man",
            "A woman laughing or a man coughing",
            "A woman or a man",
            "Answer: A woman",
            "Answer: A laughing woman",
            "Answer: A person is laughing.",
            "Answer: A loud engine",
            "The answer is A person",
            "The answer is A, a man coughing.",
            "An engine",
            "A few people talk.",
            "A large crowd",
            "It is a woman's laugh",
            "The answer is D a man coughing",
            "a baby crying, a woman laughing, a man coughing",
            "First a woman laughing, finally a baby crying",
            "A woman laughing\nA man coughing\nA baby crying\nAn engine idling",
        ],
        1: ["A man is coughing.", "No woman laughing. A man coughing."],
        2: [
            "A baby is crying in the background",
            "The answer is A baby crying",
            "C. A baby crying",
            "C: a baby",
            "Not A woman laughing but a baby crying",
            "A woman isn't laughing; a baby is crying.",
            "The sounds include a woman laughing, a man coughing, a baby crying and an engine idling. The "
            "loudest is a baby crying.",
        ],
        0: [
            "Answer: A woman is laughing.",
            "The correct answer is A because a woman laughs.",
            "The answer is A, a woman laughing.",
            "A, since laughter is heard",
            "A since laughter is heard",
            "The answer is A and it is clear.",
            "The answer is A as the woman laughs",
            "The answer is A for sure",
            "The answer is A given the laughter",
            "The answer is A due to the laughter.",
            "There is a woman laughing, but no baby crying.",
        ],
        3: ["An engine idling", "engine idling", "The answer is D an engine idling", "A or D? D."],
    },
    ("Yes, once", "Yes, twice", "No"): {
        0: ["Yes, once", "yes once"],
        None: ["Yes", "Yes, once or twice", "twice", "There is no sound"],
        2: ["No", "No, never", "The answer is No."],
        1: ["Yes, twice."],
    },
    ("2", "3", "4", "5"): {
        0: ["2"],
        None: [
            "There are 2 dogs and 3 cats",
            "Between 2 and 4",
            "2-3",
            "2 or 3",
            "1 + 2 = 3",
            "2+2=4",
            "10",
            "3.5",
            "more than 3",
            "B. 2",
            "3rd",
            "There are 4: 2 men and 2 women.",
            "four",
            "at least 2",
            "up to 4",
            "2, 3, 4, 5",
            "2 3 4 5",
            "No more than 3",
            "3x",
            "-3",
            "3%",
            "3,4",
            "3/4",
            "3:4",
        ],
        1: [
            "The answer is 3.",
            "3 speakers",
            "B",
            "B. 3",
            "3 (B)",
            "$3$",
            "\\boxed{3}",
            "exactly 3",
            "about 3",
            "3 times",
        ],
        2: [
            "The total is 4.",
            "not 3 but 4",
            "There are 2 men and 2 women, so 4 in total.",
            "<answer>4</answer>",
            "less than 5, so 4",
        ],
    },
    ("Sad", "Very sad", "Not sad", "Happy and sad"): {
        0: ["sad", "It is sad, not happy and sad"],
        1: ["very sad", "She is very sad."],
        2: ["not sad", "Not sad", "The speaker is not sad"],
        3: ["happy and sad"],
        None: ["She is not very sad", "sad or very sad", "happy and", "very"],
    },
    ("Joyful", "Melancholic", "Tense", "Serene"): {
        0: ["The music feels joyful thanks to its bright major chords."],
        1: [
            "The piece conveys a melancholic mood with slow strings.",
            "The mood is hardly joyful; I'd call it melancholic.",
            'The right option here is "Melancholic".',
            "melancholic - the slow tempo gives it away",
            "Melancholic, not joyful, tense or serene.",
        ],
        3: [
            "I'd describe the mood as serene.",
            "Going with option D here.",
            "Answer - D. Serene",
            "It cannot be joyful as the tempo is slow, and it cannot be tense as the harmony is consonant, so "
            "it's serene.",
        ],
        2: [
            "Mood: tense",
            "A tense atmosphere builds up; nothing serene about it.",
            "My answer: option (c), tense.",
            "Question: What is the mood? Answer: Tense",
            "more tense than joyful",
        ],
        None: [
            "The mood shifts from tense to serene.",
            "It begins tense and ends joyful.",
            "It lacks the energy to be joyful.",
            "I wouldn't call this joyful.",
            "Options A and C are off the table.",
            "#2",
            "Answer: 3",
            "Sorry, there was an error processing the audio.",
            "Q: Is it joyful? A: No.",
            "joyful ≠ melancholic",
            "70% joyful, 30% serene",
            "Joyful: 0.1, Melancholic: 0.7, Tense: 0.1, Serene: 0.1",
            "as joyful as it is serene",
            "It's joyful, I think. Or maybe serene.",
            "It's joyful. Hmm, on reflection, serene.",
            "joyful\n\nEdit: serene",
            "Answer: joyful (corrected: serene)",
            "~~joyful~~ serene",
            "The answer was B, but now I think C.",
            "B (second choice: C)",
            "Top choice: B, second: D",
            "Anything other than joyful",
            "joyful is what it is not",
            "Is the mood joyful, or is it tense?",
            "Joyful it isn't.",
            "Hard to call it joyful.",
            "Can one call it joyful?",
            "Had it been faster, it'd be joyful.",
        ],
    },
}


@pytest.mark.parametrize(
    "choices, index, text",
    [
        (list(choices), index, text)
        for choices, by in SAID.items()
        for index, said in by.items()
        for text in said
    ],
)
def test_what_models_say(choices, index, text):
    assert reward.resolve(text, choices) == index


# What a property is tested on: the benchmark's own choices where it is here, and drawn ones.
MINI = pathlib.Path(reward.__file__).parent.parent / "shared" / "data" / "mmau-test-mini.json"
NOUNS = "rain wind thunder violin trumpet laughter applause footsteps siren engine".split()


def choice_sets():
    """Sets of choices that read differently, none of them a letter or the beginning of another."""
    rng = random.Random(0)
    drawn = [rng.sample(NOUNS, rng.randint(2, 6)) for _ in range(50)]
    drawn += (
        [
            [
                f"{rng.choice(['A', 'The', 'Loud'])} {a} and {b}"
                for a, b in itertools.batched(rng.sample(NOUNS, 8), 2)
            ]
            for _ in range(50)
        ]
        if hasattr(itertools, "batched")
        else []
    )
    real = [row["choices"] for row in json.loads(MINI.read_text())] if MINI.exists() else []
    return drawn + [
        c
        for c in real
        if len({reward.words(x) for x in c}) == len(c)
        and min(len(x.strip()) for x in c) > 1
        and not any("?" in x for x in c)
    ]


SETS = choice_sets()


@pytest.mark.parametrize(
    "form",
    [
        "{x}",
        '"{x}"',
        "**{x}**",
        "{x}.",
        "The answer is {x}.",
        "The correct answer is: {x}",
        "Answer: {x}",
        "<answer>{x}</answer>",
        "It is {x}.",
        "So the answer is {x}",
        "{l}. {x}",
        "({l}) {x}",
        "{l}) {x}",
        "{l}: {x}",
        "Option {l}: {x}",
        "{x} ({l})",
        "The answer is {l}. {x}",
        "The answer is ({l}) {x}.",
        '{{"answer": "{x}"}}',
        "{l}",
        "{l}.",
        "({l})",
        "Option {l}",
        "The answer is {l}.",
        "\\boxed{{{l}}}",
        "Option {l} is correct.",
        "{l}, because it fits.",
        "{all}\n\nAnswer: {l}. {x}",
        "The answer is {l}, not {m}.",
    ],
)
def test_plain_answers(form):
    for choices in SETS:
        lines = "\n".join(f"{chr(65 + i)}. {x}" for i, x in enumerate(choices))
        for i, x in enumerate(choices):
            x, m = (
                x.replace('"', "'") if "json" in form or '"' in form else x,
                chr(65 + (i + 1) % len(choices)),
            )
            text = form.format(x=x, l=chr(65 + i), m=m, all=lines)
            assert reward.resolve(text, choices) in ((i,) if "[" not in x else (i, None)), (text, choices)


@pytest.mark.parametrize(
    "form",
    [
        "Option {l} is wrong.",
        "It is not option {l}.",
        "({l}) is incorrect",
        "The answer is not {l}.",
        "I would rule out {l}.",
        "{l}. Incorrect",
        "The answer is not {x}.",
        "It is not {x}",
        "{x} or {y}",
        "The answer is {x} or {y}.",
        "{l} or {m}",
        "({l}) or ({m})",
        "The answer is {l} or {m}.",
        "{l}. {x}\n{m}. {y}",
        "The answer is {l}. {y}",
        "{x} ({m})",
    ],
)
def test_denied_and_two_answers_are_none(form):
    for choices in SETS:
        for i, x in enumerate(choices):
            others = [(j, y) for j, y in enumerate(choices) if j != i]
            for j, y in others[:2] if "{y}" in form or "{m}" in form else others[:1]:
                text = form.format(x=x.rstrip("."), y=y.rstrip("."), l=chr(65 + i), m=chr(65 + j))
                if reward.words(text) not in map(reward.words, choices):
                    assert reward.resolve(text, choices) is None, (text, choices)


def test_a_choice_cut_off_is_no_other():
    for choices in SETS:
        for i, x in enumerate(choices):
            *whole, last = x.split()
            for cut in (" ".join(whole), " ".join([*whole, last[: len(last) // 2]])):
                if whole and reward.words(cut) not in map(reward.words, choices):
                    for head in ("The answer is: ", "Answer: ", "It is "):
                        assert reward.resolve(head + cut, choices) in (i, None), (head + cut, choices)


def test_permuted_choices_permute_the_answer():
    rng, forms = (
        random.Random(0),
        (
            "{x}",
            "The answer is {x}.",
            "I hear {x}, not {y}.",
            "{x} or {y}",
            "not {y} but {x}",
            "{y}? No. {x}",
        ),
    )
    for choices in SETS:
        order = rng.sample(range(len(choices)), len(choices))
        x, y = rng.sample(choices, 2)
        for form in forms:
            text = form.format(x=x, y=y)
            index, moved = reward.resolve(text, choices), reward.resolve(text, [choices[i] for i in order])
            assert (None if index is None else order.index(index)) == moved, (text, choices)


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
        if len(text.split()) > 1 and not any(
            len(w) == 1 for w in text.split()
        ):  # letters do not permute with the texts
            assert (None if index is None else order.index(index)) == moved, (text, choices)


def test_all_choices_listed_is_no_answer():
    for joint in (" ", ", ", "\n", " / ", " and "):
        assert reward.resolve(joint.join(FOUR), FOUR) is None


NOISE = [
    t * (100_000 // len(t))
    for t in (
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
    )
] + [
    "<" + " " * 100_000,
    "\\boxed" + " " * 100_000,
    "*" * 100_000 + "x",
    "dog" + " " * 100_000 + "cat",
    "car" + "." * 100_000 + "horn",
    "".join(random.Random(1).choices("abcdefgh <>/()*.\\{}\n", k=100_000)),
]


@pytest.mark.parametrize("noise", NOISE, ids=range(len(NOISE)))
def test_100_kb_of_noise_takes_linear_time(noise):
    """Seconds of this thread's time, on a machine that does other things, too; quadratic time would be minutes."""
    start = time.thread_time()
    for name in reward.REWARDS:  # `accuracy` resolves
        reward.REWARDS[name](noise, Example("", None, "?", FOUR, 1))
    assert time.thread_time() - start < 6.0


def test_accuracy():
    example = Example("", None, "?", ["dog", "cat", "Dog"], 2)
    assert [reward.accuracy(t, example) for t in ("Dog", "dog", "C", "cat", "", "dog or cat")] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert reward.accuracy("dog", Example("", None, "?")) == 0


@pytest.mark.parametrize(
    "text, plain, think",
    [
        ("<answer>cat</answer>", 1, 0),
        (" <answer>cat</answer>\n", 1, 0),
        ("<answer>cat", 0, 0),
        ("cat", 0, 0),
        ("", 0, 0),
        ("<answer>a</answer><answer>b</answer>", 0, 0),
        ("<answer><answer>a</answer>", 0, 0),
        ("x<answer>a</answer>", 0, 0),
        ("<think>why</think><answer>a</answer>", 0, 1),
        ("<think>why</think>\n <answer>a\nb</answer>", 0, 1),
        ("<think>why<answer>a</answer>", 0, 0),
        ("<answer>a</answer><think>why</think>", 0, 0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0, 0),
    ],
)
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
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=reward.__file__.rpartition("/")[0]).returncode == 0
    )


@pytest.mark.parametrize(
    "text, value, last_line",
    [
        ("<answer>3*5-2</answer>", 1, 1),
        ("<answer>(3 * 5) - 2 = 13</answer>", 1, 1),
        ("<answer>5*3-2</answer>\nDone.", 1, 0),
        ("<answer>1</answer> no: <answer>3*5-2</answer>", 1, 1),
        ("<answer>13</answer>", 0.1, 0.1),
        ("<answer>15-2</answer>", 0.1, 0.1),
        ("<answer>3*5-2+2-2</answer>", 0.1, 0.1),
        ("<answer>3*5</answer>", 0.1, 0.1),
        ("<answer>3*5-2 = 12</answer>", 0.1, 0.1),
        ("3*5-2", 0, 0),
        ("", 0, 0),
        ("<answer>3*5-2", 0, 0),
        ("<answer></answer>", 0.1, 0.1),
        ("<answer>3//5</answer>", 0.1, 0.1),
        ("<answer>9**9**9</answer>", 0.1, 0.1),
        ("<answer>__import__('os').abort()</answer>", 0.1, 0.1),
        ("<answer>3/0</answer>", 0.1, 0.1),
        ("<answer>" + "(" * 190 + "</answer>", 0.1, 0.1),
        ("<answer>" + "-" * 190 + "3</answer>", 0.1, 0.1),
        ("<answer>3.0*5-2</answer>", 0.1, 0.1),
        ("<answer>03*5-2</answer>", 0.1, 0.1),
        ("<answer>3 5 2</answer>", 0.1, 0.1),
    ],
)
def test_countdown(text, value, last_line):
    """Every number exactly once, the target exactly; nothing is executed."""
    example = Example("", None, "?", meta={"nums": [3, 5, 2], "target": 13})
    assert (reward.countdown(text, example), reward.countdown_last_line(text, example)) == (value, last_line)


def test_countdown_is_exact():
    thirds = Example("", None, "?", meta={"nums": [1, 3, 3], "target": 1})
    assert reward.countdown("<answer>1/3*3</answer>", thirds) == 1
    assert (
        reward.countdown("<answer>1/3*3</answer>", Example("", None, "?", ["a", "b"], 0)) == 0.1
    )  # no Countdown question


ABC = Example("", None, "What is heard?", ["a dog", "a cat", "rain"], 0)
CHAIN = (
    "<THINK>\n<PLANNING>Listen first.</PLANNING>\n<CAPTION>A bark.</CAPTION>\n<REASONING>Dogs bark.</REASONING>\n"
    "<SUMMARY>It is a dog.</SUMMARY>\n</THINK>\n<RESPONSE>a dog</RESPONSE>"
)


@pytest.mark.parametrize(
    "text, value",
    [
        (CHAIN, 1),
        (CHAIN.lower(), 1),
        ("  " + CHAIN + "\n", 1),
        (CHAIN.replace("\n", ""), 1),
        ("", 0),
        (CHAIN + " Yes.", 0),
        ("Well: " + CHAIN, 0),
        (CHAIN.replace("</THINK>", ""), 0),
        (CHAIN.replace("Listen first.", " \n"), 0),
        (CHAIN.replace("A bark.", "..."), 0),
        (CHAIN.replace("a dog</R", "</R"), 0),
        (CHAIN + CHAIN, 0),
        (
            CHAIN.replace("CAPTION", "X").replace("PLANNING", "CAPTION").replace("X", "PLANNING"),
            0,
        ),  # another order
        (CHAIN.replace("<SUMMARY>It is a dog.</SUMMARY>\n", ""), 0),
        (CHAIN.replace("</CAPTION>\n", "</CAPTION>\nAnd so on.\n"), 0),
        (CHAIN.replace("<PLANNING>", "<PLANNING><PLANNING>"), 0),
        (CHAIN.replace("Dogs bark.", CHAIN), 0),
        (CHAIN.replace("<RESPONSE>a dog</RESPONSE>", "a dog"), 0),
        (CHAIN.replace("</RESPONSE>", ""), 0),
        (CHAIN.replace("Dogs bark.", "It is <loud> & 犬."), 1),
    ],
)
def test_structure(text, value):
    assert reward.structure(text, ABC) == value
    assert not value or reward.accuracy(text, ABC) == 1


@pytest.mark.parametrize(
    "n, value",
    [(0, 0), (1, 1 / 30), (15, 0.5), (30, 1), (40, 1), (50, 1), (51, 0.98), (75, 0.5), (100, 0), (5000, 0)],
)
def test_think_length(n, value):
    """Words, not marks; one block only; and nothing outside of it counts."""
    for text in (
        f"<think>{' word' * n}</think><answer>a dog</answer>",
        f"a <THINK>{' w, .' * n}</THINK>" + " word" * 90,
    ):
        assert reward.think_length(text, ABC) == pytest.approx(value)
    for text in (
        "word " * 40,
        "<think>" + "word " * 40,
        "<think>" + "word " * 40 + "</think><think></think>",
        "</think>" + "word " * 40 + "<think>",
    ):
        assert reward.think_length(text, ABC) == 0


@pytest.mark.parametrize(
    "thought, answer, value",
    [
        ("A bark. So it is a dog.", "a dog", 1),
        ("A bark. So it is a dog.", "a cat", 0),
        ("A bark. So it is a dog.", "(A)", 1),
        ("It could be a cat. But the bark says: a dog.", "a dog", 1),
        ("It could be a dog. But it is a cat.", "a dog", 0),
        ("Something is loud.", "a dog", 0),
        ("", "a dog", 0),
        ("It is a dog.", "no idea", 0),
        ("It is a dog.", "", 0),
        ("It is not a cat. There is no rain.", "a dog", 1),
        ("It is not a cat.", "a dog", 0),  # rain is still possible
        ("It is not a cat. There is no rain. It is not a dog.", "a dog", 0),
        ("It isn't rain, and a cat is ruled out.", "a dog", 1),
        ("It is not a dog. There is no rain.", "a dog", 0),
        ("a dog or a cat", "a dog", 0),
    ],
)
def test_consistency(thought, answer, value):
    assert reward.consistency(f"<think>{thought}</think>\n<answer>{answer}</answer>", ABC) == value
    assert (
        reward.consistency(f"<think>{thought}<think>{thought}</think>\n<answer>{answer}</answer>", ABC) == 0
    )
    assert reward.consistency(f"{thought}\n<answer>{answer}</answer>", ABC) == 0  # no trace


@pytest.mark.parametrize("used, value", [(0, 0), (0.8, 0), (0.9, -0.5), (1, -1), (1.3, -1)])
def test_overlong(used, value):
    text = reward.Text.of("a dog", used=used)
    assert reward.overlong(text, ABC) == pytest.approx(value)
    assert text == "a dog" and reward.accuracy(text, ABC) == 1
    assert reward.overlong("a dog", ABC) == 0  # nothing is known of its length


HOSTILE = [
    "",
    "\0",
    "<think>" * 2_000,
    "</think>" * 2_000,
    "<think></think>" * 2_000,
    "<PLANNING>" * 2_000,
    CHAIN * 2_000,
    "<think>" + "a dog. " * 10_000 + "</think>a dog",
    "<think>" + "not a cat " * 10_000 + "</think>a dog",
    "<answer>" + "(" * 50_000 + "1" + ")" * 50_000 + "</answer>",
    "<answer>9**9**9</answer>",
    "<answer>" + "9" * 5_000 + "</answer>",
    "<answer>__import__('os').abort()</answer>",
    "<answer>１+２</answer>",
    "<answer>1/0</answer>",
    "<think>" + "\n" * 50_000 + "</think>",
    "<think>" + "!" * 50_000 + "</think>a dog",
    "<" * 50_000,
    "\ud800" * 1000,
    "İ" * 10_000 + "<think>x</think>",
    "<think>" + "a" * 100_000 + "</think>a",
    "n't " * 20_000,
]


@pytest.mark.parametrize("name", sorted(reward.REWARDS))
def test_rewards_are_bounded_quick_and_never_raise(name):
    """Whatever a model writes: a number from -1 to 1, in time linear in the text, and nothing is executed."""
    countdown = Example("", None, "?", [], None, meta=dict(nums=[1, 2], target=3))
    for text in HOSTILE:
        for example in (ABC, countdown):
            start = time.perf_counter()
            value = reward.REWARDS[name](text, example)
            assert -1 <= value <= 1 and isinstance(value, float)
            assert time.perf_counter() - start < 3
