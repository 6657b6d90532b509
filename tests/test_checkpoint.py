"""The published layout of Qwen2.5-Omni: a whole checkpoint (thinker, talker, token2wav), a megabyte large.

Its text files stand in tests/published; the published ids are 151643 + place, here they begin where a small
vocabulary ends.
"""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import peft
import pytest
import safetensors.torch
import soundfile
import torch
import torch.nn.functional as F
import transformers

import data
import model
import omni_grpo as og
import texts
from conftest import wake
from tools import export

SPECIAL = """
    <|endoftext|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_bos|> <|vision_eos|> <|vision_pad|> <|IMAGE|> <|VIDEO|>
""".split()
TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|audio_bos|>"
ASKED = (
    "<|audio_eos|>What makes this sound? Please choose the answer from the following options: "
    "['a bell', 'a car', 'the rain'].<|im_end|>\n<|im_start|>assistant\n"
)
QUESTION = data.Example("0", None, "What makes this sound?", ["a bell", "a car", "the rain"], 0)
SECONDS = [1.0, 10.0, 29.99]
INDEX = "model.safetensors.index.json"


def write(folder, name, content):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(content if isinstance(content, str) else json.dumps(content))


def read(folder, name):
    return json.loads(texts.read(os.path.join(folder, name)))


def published_name(name):
    """The library's name of a weight -> its name in the published files, which are older than the library's
    modules."""
    name = name.replace("thinker.model.language_model.", "thinker.model.")
    return re.sub(r"^thinker\.model\.(audio_tower|visual)\.", r"thinker.\1.", name)


def write_weights(folder):
    """Random bfloat16 weights in three shards with an index.       -> {published name: weight}"""
    config = transformers.Qwen2_5OmniConfig(**read(folder, "config.json"))
    with torch.device("meta"):
        whole = transformers.Qwen2_5OmniForConditionalGeneration(config)
    random, weights, index = torch.Generator().manual_seed(0), {}, {}
    for name, shape in sorted((published_name(name), w.shape) for name, w in whole.state_dict().items()):
        mean = len(shape) == 1 and name.endswith("weight")  # 1 for the weight of a norm
        weights[name] = (mean + 0.1 * torch.randn(shape, generator=random)).bfloat16()
    for i, names in enumerate(np.array_split(list(weights), 3)):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        save({name: weights[name] for name in names.tolist()}, os.path.join(folder, shard))
        index |= dict.fromkeys(names.tolist(), shard)
    write(folder, INDEX, dict(metadata={}, weight_map=index))
    return weights


def save(weights, path):
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A namespace: the checkpoint's folder, the ids of its special tokens, its weights."""
    folder = str(tmp_path_factory.mktemp("published"))
    shutil.copytree(os.path.join(texts.ROOT, "tests", "published"), folder, dirs_exist_ok=True)
    write(folder, "spk_dict.pt", "the talker's voices, a pickle; nobody here may open it")
    ids = read(folder, "added_tokens.json")
    return type("Published", (), dict(folder=folder, ids=ids, weights=write_weights(folder)))


def load(folder, **flags):
    torch.manual_seed(0)
    return model.load_policy(str(folder), train=True, **dict(lora_rank=4) | flags)


@pytest.fixture
def omni(published):
    return load(published.folder)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The question over three clips of SECONDS: noise that swells, under a rising tone."""
    folder, rng, made = tmp_path_factory.mktemp("clips"), np.random.default_rng(0), []
    for s in SECONDS:
        t, path = np.arange(round(s * 16_000)) / 16_000, str(folder / f"{s}.wav")
        noise = np.sin(t) ** 2 * rng.standard_normal(len(t))
        soundfile.write(path, 0.2 * np.sin(2 * np.pi * (300 + 40 * t) * t) + 0.1 * noise, 16_000)
        made.append(dataclasses.replace(QUESTION, audio=path))
    return made


@pytest.fixture(scope="module")
def padded(published, examples):
    """The library's features of the clips, as its processor asks for them: padded to 300 s, with a mask."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(published.folder)
    how = dict(sampling_rate=16_000, return_tensors="pt", padding="max_length", return_attention_mask=True)
    heard = [extractor(soundfile.read(e.audio, dtype="float32")[0], **how) for e in examples]
    assert all(h["input_features"].shape == (1, 128, 30_000) for h in heard)
    return heard


def library(folder):
    """The library's own class as its own loader makes it, vision included."""
    whole = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return whole.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def library_logits(whole, folder, heard, completion=()):
    """The library's path: its features, and ids with as many placeholders as its processor would write. ->
    (S, V)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    frames = int(heard["attention_mask"].sum())
    text = TURN + "<|AUDIO|>" * (((frames - 1) // 2 + 1 - 2) // 2 + 1) + ASKED
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] + list(completion)])
    features = dict(input_features=heard["input_features"], feature_attention_mask=heard["attention_mask"])
    return whole(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits[0]


@torch.no_grad()
def our_logits(policy, prompts):
    """Every position of the prompts in one row.       -> [(S, V)]"""
    sizes = [len(p.ids) for p in prompts]
    pattern = model.PromptAttention(model.ranges_of(prompts))
    positions = torch.cat([torch.arange(size) for size in sizes])
    return policy.head(model.forward(policy, model.embed(policy, prompts), positions, pattern)).split(sizes)


def prompts_of(policy, examples):
    cfg = og.Config(data="-")
    return og.encode_prompts(policy, cfg, examples, [og.load_clips_of(policy, cfg, e)[0] for e in examples])


def question_prompt(policy):
    return model.encode_prompt(policy, QUESTION, [], "direct")


def variant(published, folder, without=(), files=()):
    """A copy of the checkpoint (links) `without` some files and with other `files` (name, content).       ->
    its folder"""
    os.makedirs(folder)
    for name in set(os.listdir(published.folder)) - {*without, *dict(files)}:
        os.symlink(os.path.join(published.folder, name), os.path.join(folder, name))
    for name, content in dict(files).items():
        write(folder, name, content)
    return str(folder)


# ---- what is loaded

SOME_NAMES = """
    thinker.model.embed_tokens.weight thinker.model.layers.0.self_attn.q_proj.bias
    thinker.model.norm.weight thinker.lm_head.weight thinker.audio_tower.audio_bos_eos_token.weight
    thinker.audio_tower.conv1.weight thinker.audio_tower.layers.0.self_attn.out_proj.bias
    thinker.audio_tower.ln_post.weight thinker.audio_tower.proj.weight
    thinker.visual.blocks.0.attn.q.weight thinker.visual.merger.mlp.0.weight
    talker.thinker_to_talker_proj.weight talker.model.layers.0.mlp.up_proj.weight
    talker.codec_head.weight token2wav.code2wav_dit_model.proj_out.weight
    token2wav.code2wav_bigvgan_model.conv_pre.weight
""".split()


def test_the_fixture_is_the_published_layout(published):
    """Guards the rest: published names, several shards, other ids than the published ones, room above the
    tokenizer."""
    index = read(published.folder, INDEX)["weight_map"]
    assert len(set(index.values())) == 3 and index.keys() >= set(SOME_NAMES)
    assert {name.split(".")[0] for name in index} == {"thinker", "talker", "token2wav"}
    assert not any("language_model" in name for name in index)
    vocab_size = read(published.folder, "config.json")["thinker_config"]["text_config"]["vocab_size"]
    assert list(published.ids) == SPECIAL and max(published.ids.values()) < vocab_size < 151_643
    files = os.listdir(published.folder)
    assert not any(f.endswith((".bin", ".jinja")) or f == "tokenizer.json" for f in files)


def test_every_weight_of_the_thinker_is_the_file_s(published, omni):
    """Language model, head and audio tower equal the files; nothing is missing, tied or left at random."""
    loaded = {}
    for name, weight in omni.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            loaded[published_name("thinker." + name).replace(".base_layer", "")] = weight
    thinker = {name for name in published.weights if name.startswith("thinker.")}
    assert set(loaded) == {name for name in thinker if not name.startswith("thinker.visual.")}
    for name, weight in loaded.items():
        assert torch.equal(weight, published.weights[name].float()), name
    assert omni.head.weight.data_ptr() != omni.embed_tokens.weight.data_ptr()


def test_only_what_hears_and_answers_is_loaded(omni):
    names = " ".join(name for name, _ in [*omni.model.named_parameters(), *omni.model.named_modules()])
    found = [part in names for part in ("audio_tower", "talker", "token2wav", "visual")]
    assert found == [True, False, False, False] and all("lora_" in name for name in omni.trainable())


def test_head_is_not_tied_either_way(published, tmp_path):
    """The head is the file's, whether or not the language model's configuration says so."""
    config = read(published.folder, "config.json")
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = False
    policy = load(variant(published, tmp_path / "said", files={"config.json": config}))
    assert torch.equal(policy.head.weight, published.weights["thinker.lm_head.weight"].float())


def shards(published):
    return [name for name in os.listdir(published.folder) if "safetensors" in name]


@pytest.mark.parametrize("index", [None, "pytorch_model.bin.index.json", INDEX])
def test_pickles_are_refused(published, tmp_path, monkeypatch, index):
    """The right weights in the wrong format: no file is opened, and the message says what is wanted."""
    folder = variant(published, tmp_path / "pickled", shards(published))
    pickled = "pytorch_model-00001-of-00001.bin" if index else "pytorch_model.bin"
    torch.save(published.weights, os.path.join(folder, pickled))
    if index:
        write(folder, index, dict(metadata={}, weight_map=dict.fromkeys(published.weights, pickled)))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it was opened"))
    with pytest.raises(data.UserError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "missing", ["lm_head.weight", "audio_tower.conv1.bias", "model.layers.1.mlp.up_proj.weight"]
)
def test_incomplete_weights_are_refused(published, tmp_path, missing):
    """The library leaves a weight it does not find at random; here that is an error."""
    folder = variant(published, tmp_path / "incomplete", shards(published))
    rest = {name: w for name, w in published.weights.items() if name != "thinker." + missing}
    save(rest, os.path.join(folder, "model.safetensors"))
    with pytest.raises(data.UserError, match=missing.removeprefix("model.")):
        load(folder)


def test_a_lost_or_torn_shard_is_refused(published, tmp_path):
    """A download that stopped is the user's to mend."""
    shard = "model-00002-of-00003.safetensors"
    lost, torn = (variant(published, tmp_path / name, [shard]) for name in ("lost", "torn"))
    shutil.copy(os.path.join(published.folder, shard), torn)
    os.truncate(os.path.join(torn, shard), 100_000)
    with pytest.raises(data.UserError, match=shard):
        load(lost)
    with pytest.raises(data.UserError):
        load(torn)


# ---- prompts


def test_ids_are_the_checkpoint_s(published, omni, examples):
    """Placeholder, end-of-turn tokens and the tokens around the audio are looked up, not constants."""
    ids = published.ids
    assert omni.audio_id == ids["<|AUDIO|>"]
    assert omni.stop_ids == sorted([ids["<|im_end|>"], ids["<|endoftext|>"]])
    assert omni.tokenizer.convert_tokens_to_ids(SPECIAL) == [ids[token] for token in SPECIAL]
    for prompt in prompts_of(omni, examples):
        ((start, audio),) = prompt.audio
        n = len(audio)
        assert prompt.ids.count(omni.audio_id) == n
        text = omni.tokenizer.decode(prompt.ids)
        assert text == TURN + "<|AUDIO|>" * n + ASKED and prompt.ids.index(omni.audio_id) == start


def test_sampled_ids_above_the_tokenizer_are_no_text(published, omni):
    """The head is wider than the tokenizer, as published: the rows above it decode to nothing."""
    ids = [*omni.tokenizer("a bell")["input_ids"], 383, published.ids["<|im_end|>"]]
    assert model.completion_text(omni, model.Completion(ids, sampled=[True] * len(ids))) == "a bell"


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "chat_template.jinja"])
def test_chat_template_is_found(published, tmp_path, place):
    """In the three places where checkpoints keep it."""
    template = read(published.folder, "chat_template.json")["chat_template"]
    other = template.replace("a helpful assistant", "kept in " + place)
    content = {
        "chat_template.json": {"chat_template": other},
        "chat_template.jinja": other,
        "tokenizer_config.json": read(published.folder, "tokenizer_config.json") | {"chat_template": other},
    }[place]
    policy = load(variant(published, tmp_path / "moved", ["chat_template.json"], {place: content}))
    text = policy.tokenizer.decode(question_prompt(policy).ids)
    system = f"<|im_start|>system\nYou are kept in {place}.<|im_end|>\n"
    assert text.startswith(system + "<|im_start|>user\nWhat makes")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_tokenizer_json_gives_the_same_prompt(published, omni, tmp_path):
    """The published files also hold the tokenizer in one piece; it comes first and must not differ."""
    whole = variant(published, tmp_path / "whole", ["vocab.json", "merges.txt"])
    omni.tokenizer.backend_tokenizer.save(os.path.join(whole, "tokenizer.json"))
    policy = load(whole)
    assert question_prompt(policy) == question_prompt(omni)
    assert policy.stop_ids == omni.stop_ids


@pytest.mark.parametrize("files", [{}, {"generation_config.json": {"_from_model_config": True}}])
def test_without_generation_config_the_tokenizer_ends_a_turn(published, tmp_path, files):
    policy = load(variant(published, tmp_path / "bare", ["generation_config.json"], files))
    assert policy.stop_ids == [published.ids["<|im_end|>"]]


# ---- what is computed


def test_prompts_are_the_library_s(published, omni, examples, padded):
    """Clips of 1, 10 and 29.99 s in one pack: the logits of every position are those of the library's own
    audio path."""
    prompts, whole = prompts_of(omni, examples), library(published.folder)
    for heard, prompt, seconds, ours in zip(padded, prompts, SECONDS, our_logits(omni, prompts)):
        ((start, audio),) = prompt.audio
        frames = -(-round(seconds * 16_000) // 160)
        assert len(audio) == ((frames - 1) // 2 + 1 - 2) // 2 + 1
        theirs = library_logits(whole, published.folder, heard)
        assert ours.shape == theirs.shape == (len(prompt.ids), 384)
        assert (ours - theirs).abs().max() <= 1e-5
        (other,) = our_logits(omni, [model.Tokens(prompt.ids, [(start, audio.flip(0))])])
        assert (other - theirs)[-1].abs().max() > 1e-2  # and they do depend on what is heard


def test_saved_adapter_fits_the_library_s_class(published, omni, examples, padded, tmp_path):
    """PEFT puts it on the unmodified class, vision and all: the same log-probabilities."""
    og.save_weights(wake(omni), str(tmp_path))
    said = [*omni.tokenizer("a bell")["input_ids"], published.ids["<|im_end|>"]]
    row = model.Completion(said, sampled=[True] * len(said))
    with torch.no_grad():
        ours, _ = model.token_logps(omni, model.make_pack(prompts_of(omni, examples[1:2]), [[row]], [0]), 1.0)

    def scored(whole):
        logits = library_logits(whole, published.folder, padded[1], said)[-len(said) - 1 : -1]
        return F.log_softmax(logits, dim=-1).gather(1, torch.tensor(said)[:, None])[:, 0]

    base = library(published.folder)
    bare = scored(base)
    theirs = scored(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval())
    assert (ours - theirs).abs().max() <= 1e-5 and (ours - bare).abs().max() > 1e-2


def test_full_fine_tuning_goes_round(published, omni, examples, padded, tmp_path):
    """--lora_rank 0 saves a checkpoint that loads here and in the library's class, with the weights it was
    given."""
    whole = load(published.folder, lora_rank=0)
    with torch.no_grad():
        whole.head.weight.mul_(1.5)
    og.save_weights(whole, str(tmp_path))
    folder = str(tmp_path / "model")
    assert any(name.startswith("model.visual") for name, _ in whole.model.named_parameters())
    again = load(folder)
    assert again.stop_ids == omni.stop_ids and again.audio_id == omni.audio_id
    before, after = prompts_of(omni, examples[:1]), prompts_of(again, examples[:1])
    (ours,), (saved,) = our_logits(omni, before), our_logits(again, after)
    assert before[0].ids == after[0].ids and (1.5 * ours - saved).abs().max() <= 1e-5
    assert (library_logits(library(folder), folder, padded[0]) - saved).abs().max() <= 1e-5


# ---- what comes out of it


@pytest.fixture
def trained(published, omni, tmp_path):
    """A base with the talker's voices, and an adapter for it that is not a no-op.       -> (base, adapter)"""
    base = variant(published, tmp_path / "base", ["spk_dict.pt"])
    torch.save({}, os.path.join(base, "spk_dict.pt"))
    omni.model.peft_config["default"].base_model_name_or_path = base
    og.save_weights(wake(omni), str(tmp_path))
    return base, str(tmp_path / "adapter")


@pytest.fixture
def wanted(omni, trained, examples):
    """-> the completion's ids, our log-probabilities of them behind a clip and a question"""
    said = [*omni.tokenizer("a bell")["input_ids"], *omni.stop_ids[:1]]
    row = model.Completion(said, sampled=[True] * len(said))
    with torch.no_grad():
        pack = model.make_pack(prompts_of(omni, examples[1:2]), [[row]], [0])
        return said, model.token_logps(omni, pack, 1.0)[0]


def gap(thinker, base, heard, wanted):
    """The library's log-probabilities against ours."""
    said, ours = wanted
    logits = library_logits(thinker, base, heard, said)[-len(said) - 1 : -1]
    theirs = F.log_softmax(logits, dim=-1).gather(1, torch.tensor(said)[:, None])[:, 0]
    return (ours - theirs).abs().max()


def exported(adapter, door, out, *more):
    code = export.main([adapter, "--for", door, "--out", str(out), *map(str, more)])
    return code, str(out)


def whole_omni(folder):
    whole = transformers.Qwen2_5OmniForConditionalGeneration
    return whole.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("door", ["thinker", "full"])
def test_an_adapter_for_the_library_s_classes(trained, wanted, padded, tmp_path, door):
    base, adapter = trained
    code, out = exported(adapter, door, tmp_path / "out")
    bare = library(base) if door == "thinker" else whole_omni(base)
    assert code == 0 and gap(getattr(bare, "thinker", bare), base, padded[1], wanted) > 1e-2
    theirs = peft.PeftModel.from_pretrained(bare, out).eval().get_base_model()
    assert gap(getattr(theirs, "thinker", theirs), base, padded[1], wanted) <= 1e-5
    reached = [name for name, _ in theirs.named_parameters() if "lora_" in name]
    assert not any("talker" in name or "audio_tower" in name or "visual" in name for name in reached)


def test_vllm_finds_every_tensor(trained, tmp_path):
    """Its rule: behind base_model.model. the first prefix of its list that fits is replaced, and what is then no
    module of the model is left out in silence."""
    base, adapter = trained
    _, out = exported(adapter, "vllm", tmp_path / "out")
    prefixes = {
        "thinker.lm_head.": "language_model.lm_head.",
        "thinker.model.": "language_model.model.",
        "thinker.": "",
    }

    def module_of(name):
        name = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for theirs, ours in prefixes.items():
            if name.startswith(theirs):
                return name.replace(theirs, ours, 1)
        return name

    def modules_of(folder):
        weights = safetensors.torch.load_file(f"{folder}/adapter_model.safetensors")
        return {module_of(name) for name in weights}

    there = {
        name.replace("model.language_model.", "language_model.model.")
        for name, _ in library(base).named_modules()
    }
    assert len(modules_of(out)) == 21 and modules_of(out) <= there
    assert not modules_of(adapter) & there  # as a run saves it, the base would be served


@pytest.mark.parametrize("shard_bytes", [10**6 // 3, 5 * 10**9])
def test_merged_weights_are_a_checkpoint_like_any_other(
    published, trained, wanted, padded, tmp_path, monkeypatch, shard_bytes
):
    """The library alone loads them, as a whole and as the thinker; what LoRA does not reach is the base's."""
    monkeypatch.setattr(export, "SHARD_BYTES", shard_bytes)
    base, adapter = trained
    for name in shards(published):  # in float32, so that nothing is rounded
        if name.endswith(".safetensors"):
            weights = safetensors.torch.load_file(os.path.join(base, name))
            os.remove(os.path.join(base, name))
            save({key: x.float() for key, x in weights.items()}, os.path.join(base, name))
    code, out = exported(adapter, "merged", tmp_path / "out")
    assert code == 0 and gap(whole_omni(out).thinker, out, padded[1], wanted) <= 1e-5
    assert gap(library(out), out, padded[1], wanted) <= 1e-5
    files = [name for name in os.listdir(out) if name.endswith(".safetensors")]
    assert (len(files) > 2) == (shard_bytes < 10**6)
    assert all(os.path.getsize(os.path.join(out, name)) < shard_bytes + 10**5 for name in files)
    merged = {}
    for name in files:
        merged |= safetensors.torch.load_file(os.path.join(out, name))
    changed = {name for name, x in published.weights.items() if not torch.equal(merged[name], x.float())}
    assert merged.keys() == published.weights.keys() and len(changed) == 21
    assert all(name.startswith("thinker.model.layers.") for name in changed)
    others = {name for name in os.listdir(base) if "safetensors" not in name}
    assert others <= set(os.listdir(out)) and sorted(os.listdir(tmp_path)) == ["adapter", "base", "out"]


LAYOUTS = {
    "ms-swift, vLLM": "thinker.model.",
    "the whole Omni": "thinker.model.language_model.",
    "the thinker, before 5.2x": "model.",
    "the thinker": "model.language_model.",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_of_other_layouts_come_in(omni, trained, tmp_path, layout):
    """Their target_modules are a list of names, which the audio tower has, too, or a pattern of their own."""
    base, adapter = trained
    weights = safetensors.torch.load_file(f"{adapter}/adapter_model.safetensors")
    ours = {name.replace(".default.", "."): x for name, x in omni.trainable().items()}
    assert weights.keys() == ours.keys()
    theirs = {
        name.replace("base_model.model.model.language_model.", f"base_model.model.{LAYOUTS[layout]}"): x
        for name, x in weights.items()
    }
    save(theirs, f"{adapter}/adapter_model.safetensors")
    about = read(adapter, "adapter_config.json")
    for target in (
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
        "thinker.*",
    ):
        write(adapter, "adapter_config.json", about | dict(target_modules=target))
        policy = load(base, adapter=adapter)
        loaded = {name.replace(".default.", "."): x for name, x in policy.trainable().items()}
        assert loaded.keys() == ours.keys() and all(torch.equal(loaded[name], x) for name, x in ours.items())


@pytest.mark.parametrize("door", ["thinker", "full", "vllm", "merged"])
def test_a_tensor_without_a_place_is_an_error(trained, tmp_path, capsys, door):
    base, adapter = trained
    path = f"{adapter}/adapter_model.safetensors"
    weights = safetensors.torch.load_file(path)
    save(
        {name.replace("layers.1.mlp.up_proj", "layers.9.mlp.up_proj"): x for name, x in weights.items()}, path
    )
    code, out = exported(adapter, door, tmp_path / "out")
    assert code == 2 and "layers.9.mlp.up_proj" in capsys.readouterr().err and not os.path.exists(out)
    with pytest.raises(data.UserError, match="layers.9.mlp.up_proj"):
        load(base, adapter=adapter)


def test_an_export_on_a_full_disk_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    base, adapter = trained
    for error in (OSError(28, "No space left on device"), safetensors.SafetensorError("I/O error: no space")):

        def full(*args, error=error, **more):
            raise error

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        code, out = exported(adapter, "merged", tmp_path / "out")
        assert code == 2 and capsys.readouterr().err.startswith(f"error: --out {out}: ")
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_files_that_the_index_does_not_name_are_not_merged(published, trained, tmp_path):
    """Some publishers put the same weights beside them once more, under other names."""
    base, adapter = trained
    save({"another.name": torch.zeros(3)}, os.path.join(base, "consolidated.safetensors"))
    code, out = exported(adapter, "merged", tmp_path / "out")
    (file,) = [name for name in os.listdir(out) if name.endswith(".safetensors")]
    assert safetensors.torch.load_file(os.path.join(out, file)).keys() == published.weights.keys()


def test_the_talker_s_voices_are_asked_for(trained, tmp_path, capsys):
    base, adapter = trained
    os.remove(os.path.join(base, "spk_dict.pt"))
    assert exported(adapter, "merged", tmp_path / "out")[0] == 0
    assert "without spk_dict.pt, the talker's voices" in capsys.readouterr().out


def test_a_config_that_is_no_run_s_gives_no_card(trained, tmp_path):
    """The folder around an adapter may be anything, a checkpoint's too."""
    base, adapter = trained
    shutil.copy(os.path.join(base, "config.json"), tmp_path)
    code, out = exported(adapter, "thinker", tmp_path / "out")
    assert code == 0 and sorted(os.listdir(out)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_what_cannot_be_exported(trained, tmp_path, capsys):
    base, adapter = trained
    (tmp_path / "there").mkdir()
    assert exported(adapter, "full", tmp_path / "there")[0] == 2
    assert exported(base, "full", tmp_path / "out")[0] == 2
    assert exported(adapter, "full", tmp_path / "out", "--model", tmp_path / "gone")[0] == 2
    about = read(adapter, "adapter_config.json")
    write(adapter, "adapter_config.json", about | dict(alpha_pattern={"q_proj": 3}))
    assert exported(adapter, "merged", tmp_path / "out")[0] == 2
    said = capsys.readouterr().err.splitlines()
    for line, words in zip(said, ["exists", "is given as --model", "gone", "LoRA of one rank"], strict=True):
        assert line.startswith("error: ") and words in line


OLD = dict(  # all that PEFT 0.4 wrote, and two keys that later versions have forgotten
    dict(peft_type="LORA", task_type="CAUSAL_LM", inference_mode=True, r=4, lora_alpha=8, lora_dropout=0.0),
    **dict(bias="none", fan_in_fan_out=False, init_lora_weights=True, modules_to_save=None, revision=None),
    **dict(layers_pattern=None, enable_lora=None, merge_weights=False, base_model_name_or_path="x"),
)


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_adapters_of_older_versions_and_of_some_layers(omni, trained, wanted, examples, layers):
    """Where an adapter has only some layers, the others stay the base's."""
    base, adapter = trained
    path = f"{adapter}/adapter_model.safetensors"
    kept = {
        name: x
        for name, x in safetensors.torch.load_file(path).items()
        if layers is None or int(name.split("layers.")[1].split(".")[0]) in layers
    }
    save(kept, path)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    write(adapter, "adapter_config.json", OLD | dict(target_modules=names, layers_to_transform=layers))
    policy = load(base, adapter=adapter)
    assert len(policy.trainable()) == len(kept) == (42 if layers is None else 28)
    said, ours = wanted
    row = model.Completion(said, sampled=[True] * len(said))
    with torch.no_grad():
        pack = model.make_pack(prompts_of(policy, examples[1:2]), [[row]], [0])
        gap = (model.token_logps(policy, pack, 1.0)[0] - ours).abs().max()
    assert (gap <= 1e-5) == (layers is None)


def test_an_adapter_is_named_after_what_was_typed(published, tmp_path, monkeypatch):
    """A Hub id with its revision, and not the folder where its files lie."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: asked.append((name, how["revision"])) or published.folder,
    )
    for typed, named in (("a/b@v2", ("a/b", "v2")), ("a/b", ("a/b", None))):
        og.save_weights(load(typed), str(tmp_path))
        about = read(tmp_path / "adapter", "adapter_config.json")
        assert (about["base_model_name_or_path"], about["revision"]) == asked[-1] == named
    og.save_weights(load(published.folder), str(tmp_path))
    about = read(tmp_path / "adapter", "adapter_config.json")
    assert (about["base_model_name_or_path"], about["revision"]) == (published.folder, None)
