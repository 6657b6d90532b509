"""The published layout of Qwen2.5-Omni: a whole checkpoint (thinker, talker, token2wav) of a megabyte, in its file formats."""

import json
import os

import numpy as np
import peft
import pytest
import safetensors.torch
import soundfile
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import data
import omni_grpo as og

# the published order; the published ids are 151643 + place, here they begin where a small vocabulary ends
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
]
NAMED = dict(
    image_token="<|IMAGE|>",
    audio_token="<|AUDIO|>",
    video_token="<|VIDEO|>",
    vision_bos_token="<|vision_bos|>",
    vision_eos_token="<|vision_eos|>",
    audio_bos_token="<|audio_bos|>",
    audio_eos_token="<|audio_eos|>",
)
TEMPLATE = """{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'audio' or 'audio' in part -%}
{{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""
QUESTION = data.Example("0", None, "What makes this sound?", ["a bell", "a car", "the rain"], 0)
SECONDS = [1.0, 10.0, 29.99]


def write(folder, name, content):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        f.write(content if isinstance(content, str) else json.dumps(content, indent=2))


def write_tokenizer(folder):
    """vocab.json and merges.txt with everything around them.       -> {special token: id}"""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [
            "system user assistant You are a helpful assistant. What makes this sound? "
            "Please choose the answer from the following options"
        ]
        * 9,
        vocab_size=300,
        show_progress=False,
    )
    bpe.save_model(folder)
    ids = {token: bpe.get_vocab_size() + i for i, token in enumerate(SPECIAL)}
    flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    named = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=SPECIAL[1:])
    write(folder, "added_tokens.json", ids)
    write(folder, "special_tokens_map.json", named | NAMED)
    write(
        folder,
        "tokenizer_config.json",
        named
        | NAMED
        | dict(
            add_bos_token=False,
            add_prefix_space=False,
            bos_token=None,
            unk_token=None,
            clean_up_tokenization_spaces=False,
            added_tokens_decoder={str(i): dict(content=token) | flags for token, i in ids.items()},
            errors="replace",
            extra_special_tokens=NAMED,
            model_max_length=32768,
            processor_class="Qwen2_5OmniProcessor",
            split_special_tokens=False,
            tokenizer_class="Qwen2Tokenizer",
        ),
    )
    write(folder, "chat_template.json", {"chat_template": TEMPLATE})
    return ids


def write_config(folder, ids):
    """config.json, generation_config.json and preprocessor_config.json with the published keys.       -> the configuration"""
    audio = dict(
        audio_token_index=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
    )
    vision = dict(
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
    )
    rope = dict(
        rope_theta=1000000.0,
        rope_scaling=dict(mrope_section=[2, 3, 3], rope_type="default", type="default"),
        max_window_layers=28,
        sliding_window=32768,
        use_sliding_window=False,
        max_position_embeddings=32768,
    )
    small = dict(
        num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-06, init_std=0.02
    )
    thinker = dict(
        audio_config=dict(
            activation_function="gelu",
            d_model=48,
            encoder_attention_heads=4,
            encoder_ffn_dim=96,
            encoder_layers=2,
            max_source_positions=1500,
            model_type="qwen2_5_omni_audio_encoder",
            n_window=100,
            num_hidden_layers=2,
            num_mel_bins=128,
            output_dim=64,
            scale_embedding=False,
        ),
        # `tie_word_embeddings` is not among the published keys, and the library's default for this part is to tie
        text_config=small
        | rope
        | dict(
            hidden_size=64,
            intermediate_size=160,
            model_type="qwen2_5_omni_text",
            num_hidden_layers=3,
            use_cache=True,
            vocab_size=384,
        ),
        vision_config=dict(
            depth=2,
            embed_dim=32,
            fullatt_block_indexes=[1],
            hidden_act="silu",
            hidden_size=32,
            in_channels=3,
            in_chans=3,
            intermediate_size=48,
            model_type="qwen2_5_omni_vision_encoder",
            num_heads=2,
            out_hidden_size=64,
            patch_size=14,
            spatial_merge_size=2,
            spatial_patch_size=14,
            temporal_patch_size=2,
            tokens_per_second=25,
            window_size=112,
        ),
        architectures=["Qwen2OmniNaViTThinkerForConditionalGeneration"],
        bos_token_id=ids["<|im_start|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        vision_token_id=ids["<|vision_pad|>"],
        model_type="qwen2_5_omni_thinker",
        ignore_index=-100,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
        torch_dtype="bfloat16",
        user_token_id=72,
        **audio,
        **vision,
    )
    talker = (
        small
        | rope
        | dict(
            architectures=["Qwen2OmniTalkerForConditionalGeneration"],
            embedding_size=64,
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            model_type="qwen2_5_omni_talker",
            num_hidden_layers=2,
            position_id_per_seconds=25,
            seconds_per_chunk=2,
            spatial_merge_size=2,
            tts_codec_end_token_id=394,
            tts_codec_mask_token_id=396,
            tts_codec_pad_token_id=392,
            tts_codec_start_token_id=393,
            tts_text_end_token_id=361,
            tts_text_pad_token_id=359,
            tts_text_start_token_id=360,
            vocab_size=448,
            **audio,
            **vision,
        )
    )
    token2wav = dict(
        model_type="qwen2_5_omni_token2wav",
        dit_config=dict(
            model_type="qwen2_5_omni_dit",
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            head_dim=16,
            emb_dim=16,
            num_embeds=33,
            mel_dim=8,
            enc_emb_dim=8,
            enc_dim=8,
            enc_channels=[16, 16, 16],
            enc_kernel_sizes=[5, 3, 1],
            enc_dilations=[1, 2, 1],
            enc_attention_channels=8,
            enc_se_channels=8,
        ),
        bigvgan_config=dict(
            model_type="qwen2_5_omni_bigvgan",
            mel_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[5, 3],
            upsample_kernel_sizes=[11, 7],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
        ),
    )
    config = dict(
        architectures=["Qwen2_5OmniModel"],
        enable_audio_output=True,
        enable_talker=True,
        model_type="qwen2_5_omni",
        talker_config=talker,
        thinker_config=thinker,
        token2wav_config=token2wav,
        torch_dtype="bfloat16",
        transformers_version="4.50.0.dev0",
    )
    write(folder, "config.json", config)
    write(
        folder,
        "generation_config.json",
        dict(
            bos_token_id=ids["<|endoftext|>"],
            pad_token_id=ids["<|endoftext|>"],
            eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        ),
    )
    write(
        folder,
        "preprocessor_config.json",
        dict(
            chunk_length=300,
            dither=0.0,
            feature_extractor_type="WhisperFeatureExtractor",
            feature_size=128,
            hop_length=160,
            image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711],
            image_processor_type="Qwen2VLImageProcessor",
            max_pixels=12845056,
            merge_size=2,
            min_pixels=3136,
            n_fft=400,
            n_samples=4800000,
            nb_max_frames=30000,
            padding_side="right",
            padding_value=0.0,
            patch_size=14,
            processor_class="Qwen2_5OmniProcessor",
            return_attention_mask=True,
            sampling_rate=16000,
            temporal_patch_size=2,
        ),
    )
    return config


def published_name(name):
    """The library's name of a weight -> its name in the published files, which are older than the library's modules."""
    for now, then in [
        ("language_model.", "model."),
        ("audio_tower.", "audio_tower."),
        ("visual.", "visual."),
    ]:
        if name.startswith("thinker.model." + now):
            return name.replace("thinker.model." + now, "thinker." + then)
    return name


def write_weights(folder, config):
    """Random bfloat16 weights in three shards with an index.       -> {published name: weight}"""
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(transformers.Qwen2_5OmniConfig(**config))
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in sorted((published_name(n), w.shape) for n, w in model.state_dict().items()):
        mean = len(shape) == 1 and name.endswith("weight")  # 1 for the weight of a norm
        weights[name] = (mean + 0.1 * torch.randn(shape, generator=random)).bfloat16()
    names, index = list(weights), {}
    for i in range(3):
        shard = f"model-{i + 1:05}-of-00003.safetensors"
        part = names[i * len(names) // 3 : (i + 1) * len(names) // 3]
        safetensors.torch.save_file(
            {n: weights[n] for n in part}, os.path.join(folder, shard), metadata={"format": "pt"}
        )
        index |= dict.fromkeys(part, shard)
    write(
        folder,
        "model.safetensors.index.json",
        dict(metadata=dict(total_size=sum(2 * w.numel() for w in weights.values())), weight_map=index),
    )
    return weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("published"))
    ids = write_tokenizer(folder)
    weights = write_weights(folder, write_config(folder, ids))
    write(folder, "spk_dict.pt", "the talker's voices, a pickle; nobody here may open it")
    return type("Published", (), dict(folder=folder, ids=ids, weights=weights))


@pytest.fixture
def cfg(published):
    return og.Config(model=published.folder, lora_rank=4, lora_alpha=8)


@pytest.fixture
def omni(cfg):
    torch.manual_seed(0)
    return og.load_policy(cfg)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The question over three clips of SECONDS: noise that swells, under a rising tone."""
    made, rng = [], np.random.default_rng(0)
    for s in SECONDS:
        t = np.arange(round(s * 16_000)) / 16_000
        wave = 0.2 * np.sin(2 * np.pi * (300 + 40 * t) * t) + 0.1 * np.sin(t) ** 2 * rng.standard_normal(
            len(t)
        )
        path = str(tmp_path_factory.mktemp("clips") / f"{s}.wav")
        soundfile.write(path, wave, 16_000)
        made.append(data.Example(str(s), path, QUESTION.question, QUESTION.choices, 0))
    return made


@pytest.fixture(scope="module")
def padded(published, examples):
    """The library's features of the clips, as its processor asks for them: padded to 300 s, with a mask."""
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(published.folder)
    heard = [
        extractor(
            soundfile.read(e.audio, dtype="float32")[0],
            sampling_rate=16_000,
            return_tensors="pt",
            padding="max_length",
            return_attention_mask=True,
        )
        for e in examples
    ]
    assert all(h["input_features"].shape == (1, 128, 30_000) for h in heard)
    return heard


def library(folder):
    """The library's own class as its own loader makes it, vision included."""
    return transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


@torch.no_grad()
def library_logits(model, folder, example, heard, completion=()):
    """The library's path: its features, and ids with as many placeholders as its processor would write.       -> (S, V)"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    frames = int(heard["attention_mask"].sum())
    placeholders = "<|AUDIO|>" * (((frames - 1) // 2 + 1 - 2) // 2 + 1)
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|audio_bos|>"
        + placeholders
        + f"<|audio_eos|>{example.question} Please choose the answer from the following options: {example.choices}."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"] + list(completion)])
    return model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        input_features=heard["input_features"],
        feature_attention_mask=heard["attention_mask"],
    ).logits[0]


@torch.no_grad()
def our_logits(policy, prompts):
    """Every position of the prompts in one pack.       -> [(S, V)]"""
    positions = torch.cat([torch.arange(len(p.ids)) for p in prompts])
    pattern = og.Reading(og.Prefix(prompts, [], None).bounds())
    hidden = og.forward(policy, og.embed(policy, prompts), positions, pattern)
    return policy.head(hidden).split([len(p.ids) for p in prompts])


def prompts_of(policy, examples, cfg):
    return og.encode(policy, examples, [og.hear(policy, e, cfg)[0] for e in examples], cfg)


def variant(published, folder, without=(), files=()):
    """A copy of the checkpoint (links) `without` some files and with other `files` (name, content).       -> Config"""
    os.makedirs(folder)
    for name in set(os.listdir(published.folder)) - {*without, *dict(files)}:
        os.symlink(os.path.join(published.folder, name), os.path.join(folder, name))
    for name, content in dict(files).items():
        write(folder, name, content)
    return og.Config(model=str(folder), lora_rank=4)


def read(published, name):
    with open(os.path.join(published.folder, name), encoding="utf-8") as f:
        return json.load(f)


# ---- what is loaded


def test_the_fixture_is_the_published_layout(published):
    """Guards the rest: published names, several shards, other ids than the published ones, room above the tokenizer."""
    index = read(published, "model.safetensors.index.json")["weight_map"]
    assert len(set(index.values())) == 3
    assert {n.split(".")[0] for n in index} == {"thinker", "talker", "token2wav"}
    for name in """
            thinker.model.embed_tokens.weight thinker.model.layers.0.self_attn.q_proj.bias thinker.model.norm.weight
            thinker.lm_head.weight thinker.audio_tower.audio_bos_eos_token.weight thinker.audio_tower.conv1.weight
            thinker.audio_tower.layers.0.self_attn.out_proj.bias thinker.audio_tower.ln_post.weight
            thinker.audio_tower.proj.weight thinker.visual.blocks.0.attn.q.weight thinker.visual.merger.mlp.0.weight
            talker.thinker_to_talker_proj.weight talker.model.layers.0.mlp.up_proj.weight talker.codec_head.weight
            token2wav.code2wav_dit_model.proj_out.weight token2wav.code2wav_bigvgan_model.conv_pre.weight""".split():
        assert name in index, name
    assert not any("language_model" in n for n in index)
    config = read(published, "config.json")
    assert max(published.ids.values()) < config["thinker_config"]["text_config"]["vocab_size"] < 151_643
    files = os.listdir(published.folder)
    assert not any(f.endswith((".bin", ".jinja")) or f == "tokenizer.json" for f in files)
    assert sum(os.path.getsize(os.path.join(published.folder, f)) for f in files) < 4e6


def test_every_weight_of_the_thinker_is_the_file_s(published, omni):
    """Language model, head and audio tower equal the files; nothing is missing, tied or left at random."""
    prefix = {
        "model.language_model": "thinker.model",
        "model.audio_tower": "thinker.audio_tower",
        "lm_head": "thinker.lm_head",
    }
    loaded = {}
    for name, weight in omni.model.get_base_model().state_dict().items():
        if "lora_" not in name:
            ours = next(p for p in prefix if name.startswith(p + "."))
            loaded[prefix[ours] + name[len(ours) :].replace(".base_layer", "")] = weight
    assert set(loaded) == {
        n for n in published.weights if n.startswith("thinker.") and not n.startswith("thinker.visual.")
    }
    for name, weight in loaded.items():
        assert torch.equal(weight, published.weights[name].float()), name
    assert omni.head.weight.data_ptr() != omni.embed_tokens.weight.data_ptr()
    assert omni.head.weight.shape == omni.embed_tokens.weight.shape


def test_only_what_hears_and_answers_is_loaded(omni):
    names = [n for n, _ in omni.model.named_parameters()] + [n for n, _ in omni.model.named_modules()]
    assert any("audio_tower" in n for n in names)
    for absent in ("talker", "token2wav", "visual"):
        assert not any(absent in n for n in names), absent
    assert all("lora_" in n for n in omni.trainable())


def test_head_is_not_tied_either_way(published, cfg, tmp_path):
    """The head is the file's, whether or not the language model's configuration says so."""
    config = read(published, "config.json")
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = False
    policy = og.load_policy(variant(published, tmp_path / "said", files={"config.json": config}))
    assert torch.equal(policy.head.weight, published.weights["thinker.lm_head.weight"].float())


def shards(published):
    return [f for f in os.listdir(published.folder) if "safetensors" in f]


@pytest.mark.parametrize("layout", ["one file", "sharded", "index of pickles"])
def test_pickles_are_refused(published, tmp_path, monkeypatch, layout):
    """The right weights in the wrong format: no file is opened, and the message says what is wanted."""
    index = "model.safetensors.index.json" if layout == "index of pickles" else "pytorch_model.bin.index.json"
    cfg = variant(published, tmp_path / "pickled", shards(published))
    pickled = "pytorch_model.bin" if layout == "one file" else "pytorch_model-00001-of-00001.bin"
    torch.save(published.weights, os.path.join(cfg.model, pickled))
    if layout != "one file":
        write(cfg.model, index, dict(metadata={}, weight_map=dict.fromkeys(published.weights, pickled)))
    opened = []
    monkeypatch.setattr(torch, "load", lambda f, *args, **kwargs: opened.append(f))
    with pytest.raises(og.UserError, match="safetensors"):
        og.load_policy(cfg)
    assert not opened


@pytest.mark.parametrize(
    "missing",
    ["thinker.lm_head.weight", "thinker.audio_tower.conv1.bias", "thinker.model.layers.1.mlp.up_proj.weight"],
)
def test_incomplete_weights_are_refused(published, tmp_path, missing):
    """The library leaves a weight it does not find at random; here that is an error."""
    cfg = variant(published, tmp_path / "incomplete", shards(published))
    safetensors.torch.save_file(
        {n: w for n, w in published.weights.items() if n != missing},
        os.path.join(cfg.model, "model.safetensors"),
        metadata={"format": "pt"},
    )
    with pytest.raises(og.UserError, match=missing.removeprefix("thinker.").removeprefix("model.")):
        og.load_policy(cfg)


def test_a_lost_or_torn_shard_is_refused(published, tmp_path):
    """A download that stopped is the user's to mend."""
    shard = "model-00002-of-00003.safetensors"
    lost, torn = (variant(published, tmp_path / name, [shard]) for name in ("lost", "torn"))
    with (
        open(os.path.join(published.folder, shard), "rb") as whole,
        open(os.path.join(torn.model, shard), "wb") as half,
    ):
        half.write(whole.read()[:100_000])
    with pytest.raises(og.UserError, match=shard):
        og.load_policy(lost)
    with pytest.raises(og.UserError):
        og.load_policy(torn)


def test_tiny_base_still_loads(tiny, policy):
    """The demo's base is the thinker alone: model_type qwen2_5_omni_thinker, tied, a tokenizer.json."""
    with open(os.path.join(tiny.base, "config.json"), encoding="utf-8") as f:
        assert json.load(f)["model_type"] == "qwen2_5_omni_thinker"
    assert policy.head.weight.data_ptr() == policy.embed_tokens.weight.data_ptr()
    assert policy.audio_id == policy.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    with safetensors.safe_open(os.path.join(tiny.base, "model.safetensors"), "pt") as f:
        (embedding,) = [f.get_tensor(n) for n in f.keys() if n.endswith("embed_tokens.weight")]
    assert torch.equal(policy.embed_tokens.weight, embedding)


# ---- prompts


def test_ids_are_the_checkpoint_s(published, omni, cfg, examples):
    """Placeholder, end-of-turn tokens and the tokens around the audio are looked up, not constants."""
    ids = published.ids
    assert omni.audio_id == ids["<|AUDIO|>"]
    assert omni.stop_ids == sorted([ids["<|im_end|>"], ids["<|endoftext|>"]])
    assert omni.tokenizer.convert_tokens_to_ids(SPECIAL) == [ids[t] for t in SPECIAL]
    for prompt in prompts_of(omni, examples, cfg):
        ((start, audio),) = prompt.audio
        n = len(audio)
        assert prompt.ids[start - 1 : start + n + 1] == [
            ids["<|audio_bos|>"],
            *[ids["<|AUDIO|>"]] * n,
            ids["<|audio_eos|>"],
        ]
        assert prompt.ids.count(ids["<|AUDIO|>"]) == n
        assert omni.tokenizer.decode(prompt.ids[:start]) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|audio_bos|>"
        )
        assert omni.tokenizer.decode(prompt.ids[start + n :]) == (
            "<|audio_eos|>What makes this sound? Please choose the answer from the following options: "
            "['a bell', 'a car', 'the rain'].<|im_end|>\n<|im_start|>assistant\n"
        )


def test_sampled_ids_above_the_tokenizer_are_no_text(published, omni):
    """The head is wider than the tokenizer, as published: the rows above it decode to nothing."""
    ids = [*omni.tokenizer("a bell")["input_ids"], 383, published.ids["<|im_end|>"]]
    assert og.text_of(omni, og.Completion(ids, sampled=[True] * len(ids))) == "a bell"


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "chat_template.jinja"])
def test_chat_template_is_found(published, tmp_path, place):
    """In the three places where checkpoints keep it."""
    other = TEMPLATE.replace("a helpful assistant", "kept in " + place)
    content = {
        "chat_template.json": {"chat_template": other},
        "chat_template.jinja": other,
        "tokenizer_config.json": read(published, "tokenizer_config.json") | {"chat_template": other},
    }[place]
    cfg = variant(published, tmp_path / "moved", ["chat_template.json"], {place: content})
    policy = og.load_policy(cfg)
    text = policy.tokenizer.decode(og.prompt_tokens(policy, QUESTION, [], cfg).ids)
    assert text.startswith(
        f"<|im_start|>system\nYou are kept in {place}.<|im_end|>\n<|im_start|>user\nWhat makes"
    )
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_tokenizer_json_gives_the_same_prompt(published, omni, cfg, tmp_path):
    """The published files also hold the tokenizer in one piece; it comes first and must not differ."""
    whole = variant(published, tmp_path / "whole", ["vocab.json", "merges.txt"])
    omni.tokenizer.backend_tokenizer.save(os.path.join(whole.model, "tokenizer.json"))
    policy = og.load_policy(whole)
    assert og.prompt_tokens(policy, QUESTION, [], whole) == og.prompt_tokens(omni, QUESTION, [], cfg)
    assert policy.stop_ids == omni.stop_ids


@pytest.mark.parametrize("content", [None, {"_from_model_config": True}])
def test_without_generation_config_the_tokenizer_ends_a_turn(published, tmp_path, content):
    cfg = variant(
        published,
        tmp_path / "bare",
        ["generation_config.json"],
        {} if content is None else {"generation_config.json": content},
    )
    assert og.load_policy(cfg).stop_ids == [published.ids["<|im_end|>"]]


# ---- what is computed


def test_prompts_are_the_library_s(published, omni, cfg, examples, padded):
    """Clips of 1, 10 and 29.99 s in one pack: the logits of every position are those of the library's own audio path."""
    prompts = prompts_of(omni, examples, cfg)
    model = library(published.folder)
    for example, heard, prompt, seconds, ours in zip(
        examples, padded, prompts, SECONDS, our_logits(omni, prompts)
    ):
        frames = -(-round(seconds * 16_000) // 160)
        assert len(prompt.audio[0][1]) == ((frames - 1) // 2 + 1 - 2) // 2 + 1
        theirs = library_logits(model, published.folder, example, heard)
        assert ours.shape == theirs.shape == (len(prompt.ids), 384)
        assert (ours - theirs).abs().max() <= 1e-5
        start, audio = prompt.audio[0]
        (deaf,) = our_logits(omni, [og.Tokens(prompt.ids, [(start, audio.flip(0))])])
        assert (deaf - theirs)[-1].abs().max() > 1e-2  # and they do depend on what is heard


def test_saved_adapter_fits_the_library_s_class(published, omni, cfg, examples, padded, tmp_path):
    """PEFT puts it on the unmodified class, vision and all: the same log-probabilities."""
    with torch.no_grad():
        for name, p in omni.trainable().items():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    og.save_weights(omni, str(tmp_path))
    base = library(published.folder)
    completion = [*omni.tokenizer("a bell")["input_ids"], published.ids["<|im_end|>"]]
    group = og.Group(
        examples[1],
        prompts_of(omni, examples[1:2], cfg)[0],
        [og.Completion(completion, sampled=[True] * len(completion))],
    )
    with torch.no_grad():
        ours, _ = og.token_logps(omni, og.make_pack([group], [0]), 1.0)

    def scored(model):
        logits = library_logits(model, published.folder, examples[1], padded[1], completion)[
            -len(completion) - 1 : -1
        ]
        return F.log_softmax(logits, dim=-1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    bare = scored(base)
    theirs = scored(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval())
    assert (ours - theirs).abs().max() <= 1e-5
    assert (ours - bare).abs().max() > 1e-2


def test_full_fine_tuning_goes_round(published, omni, cfg, examples, padded, tmp_path):
    """--lora_rank 0 saves a checkpoint that loads here and in the library's class, with the weights it was given."""
    whole = og.load_policy(og.Config(model=published.folder, lora_rank=0))
    with torch.no_grad():
        whole.head.weight.mul_(1.5)
    og.save_weights(whole, str(tmp_path))
    folder = str(tmp_path / "model")
    assert any(n.startswith("model.visual") for n, _ in whole.model.named_parameters())
    again = og.load_policy(og.Config(model=folder, lora_rank=4))
    assert again.stop_ids == omni.stop_ids and again.audio_id == omni.audio_id
    prompts = [prompts_of(p, examples[:1], cfg) for p in (omni, again)]
    assert prompts[0][0].ids == prompts[1][0].ids
    ours, saved = our_logits(omni, prompts[0])[0], our_logits(again, prompts[1])[0]
    assert (1.5 * ours - saved).abs().max() <= 1e-5
    assert (library_logits(library(folder), folder, examples[0], padded[0]) - saved).abs().max() <= 1e-5
