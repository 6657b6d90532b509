"""Every model family: its logits, its audio, its packed scoring and its LoRA against the library's own
path."""

import os

import pytest
import torch
import torch.nn.functional as F
import transformers

import data
import model
import omni_grpo as og
from conftest import wake
from model import Completion, token_logps
from test_model import decode, make_groups, pack_of

FAMILIES = ("qwen2_audio", "llama", "qwen3", "qwen2")


@pytest.fixture(scope="session")
def family_folder(tiny, tmp_path_factory):
    """name -> a checkpoint directory with the family's real classes, small and random, and the tiny base's
    tokenizer."""
    root, made = tmp_path_factory.mktemp("families"), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.base)
    sizes = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

    def make(name):
        if name in made:
            return made[name]
        torch.manual_seed(1)
        folder = str(root / name)
        if name == "qwen2_audio":
            model = transformers.Qwen2AudioForConditionalGeneration(
                transformers.Qwen2AudioConfig(
                    audio_config=dict(
                        d_model=32,
                        encoder_layers=2,
                        encoder_attention_heads=2,
                        encoder_ffn_dim=64,
                        init_std=0.2,
                    ),
                    text_config=dict(sizes, model_type="qwen2"),
                    audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
                )
            )
            transformers.WhisperFeatureExtractor(feature_size=128).save_pretrained(folder)
        else:
            config = dict(
                llama=transformers.LlamaConfig, qwen2=transformers.Qwen2Config, qwen3=transformers.Qwen3Config
            )[name]
            model = transformers.AutoModelForCausalLM.from_config(
                config(
                    **sizes,
                    tie_word_embeddings=name != "llama",
                    **(dict(head_dim=16) if name == "qwen3" else {}),
                )
            )
        with torch.no_grad():  # what is initialised to 0 or 1 would hide a mistake
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = folder
        return folder

    return make


@pytest.fixture
def family(request, family_folder, config, tiny):
    """-> (policy with LoRA at work, its Config, three examples that it can hear or read)"""
    cfg = config(
        model=family_folder(request.param), audio="real" if request.param == "qwen2_audio" else "none"
    )
    torch.manual_seed(0)
    policy = wake(og.load_run_policy(cfg))
    return policy, cfg, list(data.Examples(tiny.questions))[:3]


def library_logits(policy, cfg, prompt, example, completion):
    """Logits of [prompt | completion] from the library's forward pass: ids, features and masks in, nothing of
    ours."""
    base = policy.model.get_base_model()
    policy.lm.set_attn_implementation("eager")
    policy.lm.eval()
    ids, features = torch.tensor([prompt.ids + completion]), {}
    if policy.extractor:
        waves = [data.load_audio(clip, cfg.max_audio_s)[0] for clip in example.clips]
        out = policy.extractor(
            waves, sampling_rate=16_000, return_tensors="pt", padding="max_length", return_attention_mask=True
        )
        features = dict(input_features=out["input_features"], feature_attention_mask=out["attention_mask"])
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), **features).logits[0].float()
    policy.lm.set_attn_implementation("packed")
    return logits[len(prompt.ids) - 1 : -1]


def encoded(policy, cfg, examples):
    clips = [og.load_clips_of(policy, cfg, e)[0] for e in examples]
    return og.encode_prompts(policy, cfg, examples, clips)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_logits_and_scoring_are_the_library_s(family):
    """Packed scoring of three groups equals one row at a time through the library's own path, audio
    included."""
    policy, cfg, examples = family
    prompts = encoded(policy, cfg, examples)
    g, done, plain = torch.Generator().manual_seed(0), [], []
    for example, prompt, lengths in zip(examples, prompts, [(3, 1, 7), (2, 5, 4), (6, 2, 1)]):
        ids = [torch.randint(20, 300, (n,), generator=g).tolist() for n in lengths]
        done.append([Completion(i, sampled=[True] * len(i)) for i in ids])
        for i in ids:
            logps = F.log_softmax(library_logits(policy, cfg, prompt, example, i), dim=-1)
            plain.append(logps.gather(1, torch.tensor(i)[:, None])[:, 0])
    groups = make_groups(examples, prompts, done)
    logps, _ = token_logps(policy, pack_of(groups), 1.0)
    assert (logps - torch.cat(plain)).abs().max() <= 2e-5
    (prefix,) = model.read_prompts(policy, prompts)
    for i, prompt in enumerate(prompts):
        prompt.read = prefix, i
    again, _ = token_logps(policy, pack_of(groups), 1.0, prefix)
    assert (again - logps).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_rollout_is_scored_as_it_was_sampled(family):
    policy, cfg, examples = family
    policy.stop_ids.clear()
    prompts = encoded(policy, cfg, examples)
    done = decode(policy, prompts, 3, 0.8, 6, [1, 2, 3])
    logps, _ = token_logps(policy, pack_of(make_groups(examples, prompts, done)), 0.8)
    sampled = torch.tensor([x for group in done for c in group for x in c.logps])
    assert (logps - sampled).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_lora_stays_inside_the_language_model(family):
    policy, cfg, _ = family
    inside = {id(p) for p in policy.lm.parameters()}
    trained = policy.trainable()
    assert trained and all(id(p) in inside and "lora_" in name for name, p in trained.items())
    layers = {name.partition("layers.")[2].partition(".lora_")[0] for name in trained}
    assert layers == {
        f"{i}.{part}"
        for i in range(2)
        for part in [f"self_attn.{x}_proj" for x in "qkvo"]
        + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    }


@pytest.mark.parametrize("seconds", [0.03, 0.5, 2.0, 3.217, 29.99, 30.0, 31.0])
def test_qwen2_audio_hears_what_the_library_hears(family_folder, config, tmp_path, seconds):
    """Features at true length, the tower's window filled up in the batch: the same embeddings, 30 s at most,
    of any clip."""
    import numpy as np
    import soundfile

    cfg = config(model=family_folder("qwen2_audio"), max_audio_s=60.0)
    policy = og.load_run_policy(cfg)
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "x.wav", rng.standard_normal(int(seconds * 16000)) * 0.1, 16000)
    example = data.Example("x", str(tmp_path / "x.wav"), "?", ["a", "b"], 0)
    (clip,), cut = og.load_clips_of(policy, cfg, example)
    assert cut == (seconds > 30)
    other = torch.randn(128, 52)
    ours = policy.encode_audio([other, clip.mel])[1]
    parts = policy.model.get_base_model().model
    out = policy.extractor(
        data.load_audio(example.audio, 30.0)[0],
        sampling_rate=16_000,
        return_tensors="pt",
        padding="max_length",
        return_attention_mask=True,
    )
    heard = out["input_features"].shape[2]
    assert heard == 3000
    inner, n = parts.audio_tower._get_feat_extract_output_lengths(out["attention_mask"].sum(-1))
    mask = (torch.arange(1500) < inner)[None, None, None]
    with torch.no_grad():
        theirs = parts.multi_modal_projector(
            parts.audio_tower(out["input_features"], attention_mask=mask).last_hidden_state
        )
    assert ours.shape == (int(n), 64)
    torch.testing.assert_close(ours, theirs[0, : int(n)], atol=2e-5, rtol=0)


def test_base_models_read_plain_text(family_folder, config, tmp_path, capsys):
    """Without a chat template a causal language model is prompted in plain text; a model with ears is
    refused."""
    import shutil

    for name in ("llama", "qwen2_audio"):
        folder = str(tmp_path / name)
        shutil.copytree(family_folder(name), folder)
        os.remove(os.path.join(folder, "chat_template.jinja"))
    cfg = config(model=str(tmp_path / "llama"), audio="none")
    policy = og.load_run_policy(cfg)
    assert "no chat template" in capsys.readouterr().out
    prompt = model.encode_prompt(policy, data.Example("1", None, "Why?"), [], cfg.prompt)
    assert policy.tokenizer.decode(prompt.ids) == "User: Why?\nAssistant:"
    with pytest.raises(data.UserError, match="no chat template"):
        og.load_run_policy(config(model=str(tmp_path / "qwen2_audio")))


def test_a_model_without_ears_says_so(family_folder, config, tiny):
    cfg = config(model=family_folder("llama"))
    with pytest.raises(data.UserError, match="no audio tower; use --audio none"):
        og.load_clips_of(og.load_run_policy(cfg), cfg, data.Examples(tiny.questions)[0])


def test_an_unknown_layout_is_refused(tiny, config, tmp_path):
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=400)
    ).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny.base).save_pretrained(tmp_path)
    with pytest.raises(
        data.UserError, match="GPT2LMHeadModel keeps its language model under none of the names"
    ):
        og.load_run_policy(config(model=str(tmp_path)))
