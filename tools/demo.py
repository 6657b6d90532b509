"""The built-in demo: a tiny Qwen2.5-Omni that hears and knows the answer format, but does not yet use the one
for the other.

    python omni_grpo.py                    tell sounds apart
    python omni_grpo.py --demo relisten    listen again to what is too faint beside a loud sound

The sounds are synthesised (tools/sounds.py), the model has the real classes at 0.7 million parameters and
random weights, and the trainer itself teaches it the lessons that make it a base.
"""

import os
import shutil
from collections.abc import Callable, Sequence

import data
from data import PROMPTS, Examples, UserError
from model import quiet_libraries
from tools import sounds

DEMO = dict(
    eval_size=240,
    steps=300,
    prompts_per_step=8,
    lora_rank=16,
    lr=2e-3,
    lr_schedule="linear",
    eval_every=25,
)
DEMOS = {
    # which sound is it?
    "sounds": DEMO
    | dict(
        model="runs/tiny/base",
        data="runs/tiny/demo.jsonl",
        eval_data="runs/tiny/held_out.jsonl",
        max_new_tokens=12,
    ),
    # which sound comes second? It is too faint to be heard beside the first: one has to listen again. All
    # weights are trained, as Echo does: LoRA alone does not teach so small a base to write the tags without
    # slips
    "relisten": DEMO
    | dict(
        model="runs/tiny_relisten/base",
        data="runs/tiny_relisten/demo.jsonl",
        eval_data="runs/tiny_relisten/held_out.jsonl",
        cold_start_data="runs/tiny_relisten/cold_start.jsonl",
        cold_start_steps=600,
        cold_start_lr=2e-3,
        steps=400,
        lr=1e-3,
        eval_every=100,
        prompt="relisten",
        reward="accuracy=1,think_format=0.5,segment=0.5",
        max_relistens=2,
        max_new_tokens=48,
        lora_rank=0,
        gradient_checkpointing=False,
    ),
}
LESSONS = dict(
    cold_start_steps=250,
    steps=0,
    lora_rank=0,
    lr=2e-3,
    lr_schedule="linear",
    warmup_steps=20,
    prompts_per_step=32,
    reduce="token",
    gradient_checkpointing=False,
    save_every=10**9,
)

CHAT_TEMPLATE = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'audio' %}\
<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_demo(name: str, train: Callable) -> bool:
    """Make the demo's sounds, questions and base model, once.       -> is it there?

    train(**knobs) -> (run directory, finished): the trainer, which teaches the base.
    """
    folder = os.path.dirname(DEMOS[name]["data"])
    base = os.path.join(folder, "base", "config.json")
    if os.path.exists(base):
        return True
    if os.path.exists(folder):
        raise UserError(f"{folder}: is in the way of the demo, and holds no base model; remove it")
    print(f"making sounds, questions and a tiny base model in {folder} (once)", flush=True)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with data.claimed(os.path.dirname(folder)):
        return os.path.exists(base) or fill_demo(name, folder, train)  # another process may have made it now


def fill_demo(name: str, folder: str, train: Callable) -> bool:
    making = folder + ".making"
    shutil.rmtree(making, ignore_errors=True)
    texts = []  # beside the lessons, what the tokenizer should know the words of
    if name == "sounds":
        sounds.write_sounds(making, 960, 4, seed=1, name="demo", silent=0.15)
        sounds.write_sounds(making, 240, 4, seed=2, name="held_out")
    else:
        sounds.write_scenes(making, 960, seed=1, name="demo")
        sounds.write_scenes(making, 240, seed=2, name="held_out")
        for example in Examples(sounds.write_scenes(making, 960, seed=4, name="cold_start", taught=True)):
            texts += [user_turn(example, "relisten"), *example.target]
    clips = sounds.write_sounds(making, 1200, 4, seed=3, name="lessons", faint=name != "sounds")
    lessons = sounds.write_lessons(clips)
    init = os.path.join(making, "init")
    make_tiny_omni(init, lessons, texts)
    taught, finished = train(
        model=init, cold_start_data=lessons, out=os.path.join(making, "teach"), **LESSONS
    )
    if finished:
        os.rename(os.path.join(taught, "model"), os.path.join(making, "base"))
        os.rename(making, folder)
    return finished


def user_turn(example, prompt_name: str) -> str:
    return data.chat_messages(example, PROMPTS[prompt_name], with_audio=False)[-1]["content"]


def make_tiny_omni(folder: str, lessons: str, more_texts: Sequence[str] = ()) -> None:
    """A checkpoint directory: Qwen2.5-Omni's thinker, small and random, and a tokenizer that knows the words
    of the texts."""
    import torch
    import transformers

    quiet_libraries()
    texts = [user_turn(example, "think") for example in Examples(lessons)]
    texts += [*sounds.SOUNDS, "system\nYou are a helpful assistant.", "user\nassistant\n", *more_texts]
    tokenizer, ids = train_tokenizer(texts, vocab_size=768 if more_texts else 512)
    audio_config = dict(
        d_model=64,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        output_dim=128,
        # wider than a large model's 0.02, which at this size drowns the sound in the positions
        initializer_range=0.15,
    )
    vision_config = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=128)
    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=ids["<|im_end|>"],
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    config = transformers.Qwen2_5OmniThinkerConfig(
        audio_config=audio_config,
        vision_config=vision_config,
        text_config=text_config,
        tie_word_embeddings=True,
        audio_token_index=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        image_token_index=ids["<|IMAGE|>"],
        video_token_index=ids["<|VIDEO|>"],
        vision_start_token_id=ids["<|vision_bos|>"],
        vision_end_token_id=ids["<|vision_eos|>"],
    )
    torch.manual_seed(0)
    transformers.Qwen2_5OmniThinkerForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=128, chunk_length=300, return_attention_mask=True
    )
    extractor.save_pretrained(folder)


def train_tokenizer(texts: list[str], vocab_size: int):
    """A byte-level tokenizer with Qwen2.5-Omni's special tokens.       -> (tokenizer, {special token: id})"""
    import tokenizers
    import transformers

    special = (
        "<|endoftext|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> <|IMAGE|> <|VIDEO|> "
    )
    special = (special + "<|vision_bos|> <|vision_eos|>").split()
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=1, special_tokens=special, show_progress=False
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=special[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer, dict(zip(special, tokenizer.convert_tokens_to_ids(special)))
