"""What people bring: files as others write them are read right, or refused with what they are and one remedy."""

import collections
import functools
import gzip
import json
import os
import random
import unicodedata

import numpy as np
import pytest
import soundfile

import data
import reward
from data import DataError, Examples, UserError
from test_data import ROOT, lines

ROW = dict(audio="a.wav", question="Which?", choices=["dog", "cat"], answer=0)
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 8000).astype(np.float32)


@pytest.fixture
def put(tmp_path):
    """put(name, content or rows) -> the path of the new file. Of a name that ends as a sound, a sound."""

    def put(name, content=b"", rate=16000):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            soundfile.write(path, content, rate, subtype="FLOAT")
        else:
            content = lines(*content) if isinstance(content, list) else content
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return put


@pytest.fixture
def said(command):
    """A command of data.py -> its exit code and everything it said."""
    return functools.partial(command, data.main)


# ---- what is paid for


@pytest.mark.parametrize("label", ["A. {}", "({}) ", "[{}] ", "{})", "Option {}: "])
def test_a_right_answer_earns_one_however_choices_are_labelled_and_mixed(put, label):
    """Today's letters are those of the shown order, and the gold is paid under every order."""
    label = label.replace("A. {}", "{}. ")
    choices = [label.format(letter) + text for letter, text in zip("ABC", ("dog", "cat", "rain"))]
    (example,) = Examples(put("q.jsonl", [ROW | dict(choices=choices, answer=choices[1])]))
    for seed in range(6):
        mixed = data.shuffle_choices(example, random.Random(seed))
        assert sorted(mixed.choices) == ["cat", "dog", "rain"]
        for text, earns in (("cat", 1.0), ("ABC"[mixed.answer], 1.0), ("dog", 0.0)):
            assert reward.accuracy(reward.Said(text), mixed) == earns


def test_wrong_choices_are_of_the_right_ones_kind(put):
    """Also where the file has one number only; of a lonely unit no question is made, and that is counted."""
    answers = ["two"] + ["water", "child", "dog"] + ["yes"] + ["10 seconds", "more than five", "3"]
    rows = [f"{i}.wav,What {i}?,{answer}\n" for i, answer in enumerate(answers)]
    examples = Examples(put("clotho.csv", "file_name,QuestionText,answer\n" + "".join(rows)))
    assert examples.skipped == {"no other answer to choose from is of its answer's kind": 1}
    for example in examples:
        kinds = {data.kind_of(choice) for choice in example.choices}
        assert len(kinds) == 1 and len(example.choices) >= 2
    assert {*examples[4].choices} == {"yes", "no"} and len(examples[0].choices) == 4


@pytest.mark.parametrize(
    "answer, kind",
    [
        ("Yes", "yes or no"),
        ("NO.", "yes or no"),
        ("yes, twice", "number yes"),
        ("twentyfive", "number"),
        ("at least two times", "number"),
        ("12", "digits"),
        ("10 seconds", "digits seconds"),
        ("piano", "words"),
    ],
)
def test_kinds(answer, kind):
    assert data.kind_of(answer) == kind


def test_oddities_are_counted_once_and_said(put, said):
    """Two equal choices, and questions for the eye: at the start of a run, by check, and by convert."""
    seen = dict(
        question_text="What colour?", multi_choice=["red", "Red.", "blue"], answer=2, audio_path="a.wav"
    )
    path = put(
        "avqa.jsonl", [seen | dict(question_relation="View"), seen, seen | dict(multi_choice=[*"xyz"])]
    )
    put("a.wav", NOISE)
    examples = Examples(path)
    data.scan(examples)
    assert sorted(examples.noted.values()) == [1, 2] and "; 2 noted: two of the choices" in str(examples)
    code, text = said("convert", path, "--out", path + ".out")
    assert code == 0 and "1 noted: only the eye can answer" in text
    code, text = said("filter", path + ".out", "--where", "question_relation!=View", "--out", path + ".heard")
    assert code == 0 and "2 of 3 examples" in text
    assert "only the eye" in said("check", path)[1]


# ---- labels and folders


def test_cells_with_several_labels(put):
    """One is right, none of the others stands among the wrong; a comma and a blank are part of a name."""
    path = put("fsd.csv", 'fname,labels\na,"Electric_guitar,Music"\nb,"Rain,Raindrop"\nc,"Choir,Music"\n')
    for example in Examples(path):
        mine = example.meta["labels"]
        assert example.choices[example.answer] == mine[0] and not set(mine[1:]) & set(example.choices)
        assert not any("_" in choice for choice in example.choices)
    names = put("vgg.csv", 'clip,label\na.wav,"playing violin, fiddle"\nb.wav,rain;wind\n')
    assert {e.choices[e.answer] for e in Examples(names)} == {"playing violin, fiddle", "rain"}
    numbers = Examples(put("n.jsonl", [dict(file="a.wav", label=7), dict(file="b.wav", label=["0", "1"])]))
    assert [e.choices[e.answer] for e in numbers] == ["7", "0"]


def test_folders(put, tmp_path, said):
    """Digits and single letters are labels; files that are no sounds are counted, with a line to paste."""
    for label in ("0", "1", "m", "it's"):
        for i in range(3):
            put(f"f/{label}/{i}.wav", NOISE[i:])
    for name in ("it's/0.m4a", "it's/1.M4A", "notes.txt", ".DS_Store", "it's/.x.wav"):
        put(f"f/{name}", b"?")
    code, text = said("folder", tmp_path / "f", "--out", tmp_path / "out.jsonl", "--eval_size", 0)
    assert code == 0 and "4 labels" in text and "1 skipped: not a sound (.txt)" in text
    line = f"""ffmpeg -i '{tmp_path}/f/it'"'"'s/0.m4a' '{tmp_path}/f/it'"'"'s/0.wav'"""
    assert f"2 skipped: .m4a cannot be read; {line}" in text
    rows = [json.loads(line) for line in open(tmp_path / "out.jsonl")]
    assert collections.Counter(r["choices"][r["answer"]] for r in rows) == dict.fromkeys(
        ["0", "1", "m", "it's"], 3
    )


def test_splits_are_never_merged(put, tmp_path, said):
    for split, n in (("train", 4), ("Test", 2), ("val", 1)):
        for label in ("dog", "cat"):
            for i in range(n):
                put(f"set/data/{split}/{label}/{i}.wav", NOISE[i + 10 * n :])
    with pytest.raises(DataError, match="holds the splits test, train, val; give one, "):
        Examples(str(tmp_path / "set"))
    code, text = said("folder", tmp_path / "set", "--out", tmp_path / "out.jsonl")
    assert code == 0 and "not used: the split test in" in text
    counts = [len(Examples(str(tmp_path / name))) for name in ("out.jsonl", "out_eval.jsonl")]
    assert counts == [8, 2] and len(Examples(str(tmp_path / "set" / "data" / "Test"))) == 4


def test_splits_beside_other_folders_or_below_classes(put, tmp_path, said):
    for name in ("training_set/dog", "training_set/cat", "test_set/dog", "test_set/cat"):
        put(f"a/{name}/1.wav", NOISE)
    put("a/docs/readme.txt")
    with pytest.raises(DataError, match="holds the splits test, training"):
        Examples(str(tmp_path / "a"))
    for name in ("dog/train", "dog/test", "cat/train", "cat/test"):
        put(f"b/{name}/x/1.wav", NOISE)
    assert "several folders of one split" in said("folder", tmp_path / "b", "--out", tmp_path / "o.jsonl")[1]


def test_the_sound_of_a_train_is_a_class(put, tmp_path):
    for label in ("dog", "train"):
        put(f"{label}/1.wav", NOISE)
    assert {e.choices[e.answer] for e in Examples(str(tmp_path))} == {"dog", "train"}


# ---- conversations


@pytest.mark.parametrize(
    "row, reason",
    [
        (dict(messages=[dict(role="user", content="<image>What?")], images=["c.png"]), "needs a picture"),
        (dict(query="<img>c.png</img>What?", response="a cup"), "needs a picture"),
        (dict(query="<audio>What?", response="a cup", videos=["c.mp4"]), "needs a picture"),
        (
            dict(messages=[dict(role="user", content=[dict(type="image_url")])], solution="x"),
            "needs a picture",
        ),
        (dict(query="And?", response="cat", history=[["<audio>What?", "dog"]]), "several turns"),
        (
            dict(messages=[dict(role="user", content="?"), *[dict(role="assistant", content="!")] * 2]),
            "several",
        ),
        (dict(messages=[dict(role="tool", content="?")], solution="x"), "several turns"),
    ],
)
def test_rows_that_would_be_read_by_half_are_skipped_and_counted(put, row, reason):
    whole = dict(messages=[dict(role="user", content="?"), dict(role="assistant", content="!")])
    examples = Examples(put("chat.jsonl", [row, whole, row]))
    assert len(examples) == 1 and str(examples).split("; 2 skipped: ")[1].startswith(reason)


@pytest.mark.parametrize(
    "row, clips",
    [
        (dict(audios=[{"path": "a.wav"}]), ["a.wav"]),
        (dict(audios='["a.wav"]'), ["a.wav"]),
        (dict(audio_filepath="a.wav"), ["a.wav"]),
        (dict(file_name="a.wav"), ["a.wav"]),
        (dict(audios=[None]), "expected the path of a clip, found None"),
        (dict(audios=["data:audio/wav;base64,UklGRg=="]), "expected the path of a clip, found 'data:"),
    ],
)
def test_where_the_clip_of_a_conversation_stands(put, row, clips):
    """Never a question without its sound."""
    turns = [dict(role="user", content="What?"), dict(role="assistant", content="dog")]
    if isinstance(clips, str):
        with pytest.raises(DataError, match=clips):
            list(Examples(put("chat.jsonl", [row | dict(messages=turns)])))
        return
    for content in ("What?", "<audio>What?"):
        turns = [dict(role="user", content=content), dict(role="assistant", content="dog")]
        (example,) = Examples(put("chat.jsonl", [row | dict(messages=turns)]))
        assert [os.path.basename(clip) for clip in example.clips] == clips


@pytest.mark.parametrize(
    "part",
    [
        dict(audio=dict(path="a.wav")),
        dict(audio_url=dict(url="a.wav")),
        dict(url="a.wav"),
        dict(audio="a.wav"),
    ],
)
def test_clips_among_the_parts_of_a_content(put, part):
    turns = [dict(role="user", content=[dict(part, type="audio"), dict(type="text", text="What?")])]
    turns.append(dict(role="model", content="dog"))
    (example,) = Examples(put("chat.jsonl", [dict(messages=turns)]))
    assert os.path.basename(example.audio) == "a.wav" and example.question == "What?"
    turns[0]["content"][0] = dict(type="input_audio", input_audio=dict(data="UklGRg==", format="wav"))
    with pytest.raises(DataError, match="expected the path of a clip"):
        list(Examples(put("chat.jsonl", [dict(messages=turns)])))


def test_a_prompt_beside_a_question_is_no_conversation(put):
    row = ROW | dict(prompt="You are a helpful assistant.", query="x", problem="y")
    (example,) = Examples(put("q.jsonl", [row]))
    assert example.question == "Which?" and example.meta["prompt"] == row["prompt"]


@pytest.mark.parametrize(
    "asked, question, choices",
    [
        ("What? A. x B. y C. z Output the final answer in <answer> </answer>.", "What?", ["x", "y", "z"]),
        ("What?\nA. a dog\nB. a cat. Please answer with the letter only.", "What?", ["a dog", "a cat"]),
        ("What?\n(a) dog\n(b) cat\n\nThink first.", "What?", ["dog", "cat"]),
        ("What? 1. dog, 2. cat, 3. rain", "What?", ["dog", "cat", "rain"]),
        ("J. S. Bach or A. Vivaldi? A. Bach B. Vivaldi", "J. S. Bach or A. Vivaldi?", ["Bach", "Vivaldi"]),
        ("Is ['quoted'] heard? A. yes B. no", "Is ['quoted'] heard?", ["yes", "no"]),
        ("Choose from the options: ['x', 'y']", "", ["x", "y"]),
        ("What is it?", "What is it?", None),
    ],
)
def test_options_in_the_question(asked, question, choices):
    assert data.split_options(asked) == (question, choices)


@pytest.mark.parametrize(
    "choices",
    [
        ["1 - 2 s", "2 - 3 s", "3 - 4 s"],
        ["A - B", "B - C", "C - D"],
        ["0 - 1", "1 - 0"],
        ["1: 2", "2: 1"],
        ["I. Newton", "C. Darwin"],
        ["A. Vivaldi", "C. Debussy"],
        ["A minor", "B minor"],
        ["1.5 s", "2.5 s"],
        ["A.D.", "B.C."],
    ],
)
def test_what_looks_like_a_label_and_is_none(put, choices):
    (example,) = Examples(put("q.jsonl", [ROW | dict(choices=choices)]))
    assert example.choices == choices


@pytest.mark.parametrize("label", ["({}). ", "[{}]: ", "**{}.** ", "{} — ", "{}.) ", "Answer {}: "])
def test_other_labels(put, label):
    choices = [label.format(letter) + text for letter, text in zip("ABD", ("dog", "cat", "rain"))]
    (example,) = Examples(put("q.jsonl", [ROW | dict(choices=choices, answer="D")]))
    assert example.choices == ["dog", "cat", "rain"] and example.answer == 2


@pytest.mark.parametrize(
    "choices, answer, right",
    [
        ([10, 20, 30], 20, "20"),  # no index
        ([10, 20, 30], 2, "30"),  # an index
        ([0.5, 1.5, None], 1.5, "1.5"),
        (["1", "2", "3"], 1, "2"),  # texts: an index, as ever
        (["1", "3"], 1, "3"),
        ([0, 1, 2], 1, "1"),  # both, and the same
        ([2, 3, 4], 2, None),  # both, and not the same
        ([2, True], 2, None),
        ([2, {}], 2, None),
    ],
)
def test_choices_that_are_numbers(put, choices, answer, right):
    examples = Examples(put("q.jsonl", [ROW | dict(choices=choices, answer=answer)]))
    if right is None:
        with pytest.raises(DataError, match='field "(answer|choices)"'):
            examples[0]
    else:
        assert examples[0].choices[examples[0].answer] == right
        assert examples[0].choices == [str(c) for c in choices if c is not None]


@pytest.mark.parametrize("history", ["x", [5], [[5]], {"a": 1}])
def test_a_history_that_is_none(put, history):
    rows = [dict(query="?", response="!"), dict(query="?", response="!", history=history)]
    try:
        assert len(list(Examples(put("chat.jsonl", rows)))) == 1
    except DataError as e:
        assert ":2: " in str(e)


# ---- containers and columns


def test_the_same_rows_in_other_containers(put, tmp_path):
    rows = [ROW, ROW | dict(answer=1)]
    wanted = [(e.question, e.choices, e.answer) for e in Examples(put("q.jsonl", rows))]
    around = dict(version=1, data=rows)
    cells = "audio,question,choices,answer\n" + "a.wav , Which?,\"['dog', 'cat']\", dog\n" * 2
    sources = [
        put("q.jsonl.gz", gzip.compress(lines(*rows))),
        put("lines.json", json.dumps(around)),
        put("pretty.json", json.dumps(around, indent=1)),
        put("q.csv", cells.replace("dog\n", "cat\n").replace("cat\n", "dog\n", 1)),
        put("plain.csv", "# made by hand\n# audio,question,choices,answer\n" + cells.split("\n", 1)[1]),
    ]
    put("audiofolder/metadata.jsonl", [dict(row, file_name=row["audio"]) for row in rows])
    for source in [*sources[:4], str(tmp_path / "audiofolder")]:
        assert [(e.question, e.choices, e.answer) for e in Examples(source)] == wanted, source
    assert Examples(str(tmp_path / "audiofolder"))[0].audio == str(tmp_path / "audiofolder" / "a.wav")
    assert len(Examples(sources[4])) == 2
    (one,) = Examples(put("one.json", json.dumps(ROW, indent=1)))
    assert one.choices == ["dog", "cat"]
    put("two/train/metadata.csv", cells.replace("audio,", "file_name,"))
    put("two/test/metadata.csv", cells.replace("audio,", "file_name,"))
    with pytest.raises(DataError, match="holds several sets; give one, as .*test/metadata.csv"):
        Examples(str(tmp_path / "two"))


def test_columns(put, said):
    path = put("q.jsonl", [dict(sound="a.wav", ask="Which?", options=["dog", "cat"], right="B")])
    columns = "sound=audio,ask=question,options=choices,right=answer"
    (example,) = Examples(path, columns=columns)
    assert (example.question, example.answer, example.meta) == ("Which?", 1, {})
    with pytest.raises(DataError, match="data.py convert --columns sound=audio"):
        Examples(path)
    for wrong in ("sound", "nosuch=audio", "sound="):
        with pytest.raises(UserError, match="--columns .*expected THEIRS=OURS"):
            Examples(path, columns=wrong)
    assert said("convert", path, "--columns", columns, "--out", path + ".out")[0] == 0


def test_a_column_that_a_line_lacks_is_not_made_null(put):
    path = put(
        "q.jsonl", [dict(ROW, sound="a.wav"), dict(ROW, audio="b.wav"), dict(question="?", sound2="c.wav")]
    )
    examples = Examples(path, columns="sound=audio")
    assert os.path.basename(examples[1].audio) == "b.wav"
    with pytest.raises(DataError, match=':3: field "audio": missing'):
        examples[2]


def test_metadata_of_something_else_is_no_set(put, tmp_path):
    for label in ("dog", "cat"):
        put(f"{label}/1.wav", NOISE)
    put("metadata.csv", "id,license\n1,x\n")
    assert len(Examples(str(tmp_path))) == 2


def test_kinds_of_parquet(tmp_path):
    """Samples with their rate, bytes with further fields, classes; the only split needs no name."""
    datasets = pytest.importorskip("datasets")
    wav = tmp_path / "a.wav"
    soundfile.write(wav, NOISE, 16000, subtype="FLOAT")
    rows = dict(question=["?"], choices=[["dog", "cat"]], answer=["dog"])
    stereo = np.stack([NOISE, NOISE]).tolist()
    for audio in (
        dict(array=NOISE.tolist(), sampling_rate=16000),
        dict(array=stereo, sampling_rate=16000, path="x.wav"),
        dict(bytes=wav.read_bytes(), path="x.wav", extra=1),
    ):
        path = str(tmp_path / "q.parquet")
        datasets.Dataset.from_dict(rows | dict(audio=[audio])).to_parquet(path)
        (example,) = Examples(path)
        wave, _ = data.load_audio(example.audio)
        np.testing.assert_allclose(wave, NOISE, atol=1e-6)
    features = datasets.Features(
        file=datasets.Value("string"), label=datasets.ClassLabel(names=["dog", "cat"])
    )
    made = datasets.Dataset.from_dict(dict(file=["a", "b"], label=[1, 0]), features=features)
    os.makedirs(tmp_path / "set" / "data")
    made.to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    for source in (f"{tmp_path}/set:test", f"{tmp_path}/set"):
        assert [e.choices[e.answer] for e in Examples(source)] == ["cat", "dog"]
    with pytest.raises(DataError, match="no split 'train'; there are test"):
        Examples(f"{tmp_path}/set:train")


# ---- clips by the names that downloaders give, and names that are spelt in another way

ID = "vfY_TJq7n_U"


@pytest.mark.parametrize(
    "file",
    [f"{ID}.wav", f"Y{ID}.wav", f"{ID}_130.wav", f"{ID}_130_140.wav", f"{ID}_130.000_140.000.flac"]
    + [f"{ID}_130000_140000.wav", f"deep/Y{ID}_000130.wav"],
)
def test_clips_of_youtube(put, file):
    put(file)
    put("other_TJq7n_130.wav")
    rows = "audiocap_id,youtube_id,start_time,caption\n1,{},130,rain\n".format(ID)
    assert Examples(put("captions.csv", rows))[0].audio.endswith(file)


def test_of_two_parts_of_a_video_none_is_guessed(put):
    put(f"{ID}_10_20.wav")
    put(f"{ID}_30_40.wav")
    rows = f"youtube_id,start_time,caption\n{ID},130,rain\n{ID},30,wind\n"
    first, second = Examples(put("captions.csv", rows))
    assert first.audio.endswith(f"{ID}_000130") and second.audio.endswith(f"{ID}_30_40.wav")


@pytest.mark.parametrize(
    "name, differs",
    [
        ("sub dir\\a.wav", "a backslash"),
        ("sub%20dir/a.wav", "%-escapes"),
        (unicodedata.normalize("NFD", "sub dir/é.wav"), "another Unicode form"),
        ("Sub dir/A.wav", "case"),
        ("sub dir/a.wav ", "blanks at an end"),
        ("Sub%20dir\\a.wav", "a backslash and %-escapes and case"),
        ("https://example.org/a.wav", "a web address; download the clip"),
        ("s3://bucket/a.wav", "a web address; download the clip"),
        ("sub dir/b.wav", ""),
    ],
)
def test_what_differs_in_a_name(put, name, differs):
    for file in ("sub dir/a.wav", "sub dir/é.wav"):
        put(file)
    with pytest.raises(DataError) as e:
        data.scan(Examples(put("q.jsonl", [ROW | dict(audio=name)])))
    message = str(e.value)
    assert (differs in message) if differs else message.endswith("no such file")
    if "differs in" in message:
        assert message.endswith(f"is there, whose name differs in {differs}") and "/sub dir/" in message


def test_addresses_of_files_are_read(put):
    path = put("sub dir/a.wav")
    (example,) = Examples(put("q.jsonl", [ROW | dict(audio="file://" + path.replace(" ", "%20"))]))
    assert example.audio == path


# ---- things that are something else


@pytest.mark.parametrize(
    "content, what",
    [
        (b"PK\3\4....", "is a zip archive; unpack it first"),
        (b"\0" * 257 + b"ustar\0", "is a tar archive; unpack it first"),
        (b"RIFF....WAVE", "is a sound; expected a file of questions"),
        (b"<!DOCTYPE html>", "is an HTML page: the download went wrong"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer and not the file itself"),
        ("é".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"a.wav\nb.wav\n", "a list of sounds is no set of questions; write a CSV"),
        (
            lines(dict(audio="a", question="?", options=["x", "y"], answer="x")),
            'field "choices": missing, found only',
        ),
    ],
)
def test_a_file_of_questions_that_is_none(put, content, what):
    with pytest.raises(DataError, match=what.replace("(", "\\(")):
        list(Examples(put("q.jsonl", content)))


@pytest.mark.parametrize(
    "content, what",
    [
        (b"\0\0\0\x20ftypM4A ", r"it is AAC or a video\); ffmpeg -i \S+/a.wav \S+/a_mended.wav"),
        (b"<html>404</html>", r"it is an HTML page: the download went wrong\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"it is a Git LFS pointer .* git lfs pull\)"),
        (b"no sound at all", r"not a readable sound file \("),
    ],
)
def test_a_clip_that_is_none(put, content, what):
    with pytest.raises(data.AudioError, match=what):
        data.load_audio(put("a.wav", content))


def test_check_notes_clips_that_say_nothing(put, said):
    put("phase.wav", np.stack([NOISE, -NOISE], axis=1))
    put("scale.wav", NOISE * 2**15)
    put("quiet.wav", np.stack([NOISE, NOISE], axis=1) / 1000)
    put("stereo.wav", np.stack([NOISE, np.roll(NOISE, 99)], axis=1) / 30)
    names = ["phase.wav", "scale.wav", "quiet.wav", "stereo.wav"]
    rows = [ROW | dict(audio=name, question=f"{name}?") for name in names]
    code, text = said("check", put("q.jsonl", rows))
    assert code == 0 and "notes        2" in text
    assert ':1: field "audio": its channels cancel out: mixed, it is 100 dB' in text
    assert ':2: field "audio": samples up to 1.64e+04, and full scale is 1' in text


# ---- annotation files as their authors publish them (never part of this project)

PUBLISHED = os.path.join(os.path.dirname(ROOT), "shared", "data")


@pytest.mark.skipif(not os.path.isdir(PUBLISHED), reason="no published annotation files here")
def test_published_files():
    def read(name):
        return Examples(os.path.join(PUBLISHED, name))

    mmar = read("MMAR-meta.jsonl")
    assert len(list(mmar)) == 1000 and len(mmar[395].choices) == 4
    for name in ("music-avqa-val.json", "clotho_aqa_val.csv"):
        for example in read(name):
            assert len({data.kind_of(choice) for choice in example.choices}) == 1
    assert all(e.answer is not None for e in read("vggsound-test-3000.csv"))
    assert len(read("audiocaps-val.csv")[0].target) >= 1
    assert len(read("llama-factory-audio.json")) == 3
    with pytest.raises(DataError, match="needs a picture or a video"):
        read("llama-factory-video-audio.json")
