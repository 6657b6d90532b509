"""A policy: all that the algorithm asks of a language model that hears. Only this file knows transformers.

  families      where a model class keeps its language model and its audio tower; LoRA; the frozen reference
  prompts       a clip goes through the audio tower once, and its embeddings become part of the prompt
  prefixes      the prompts of a step are read in one row without padding: [prompt 1 | prompt 2 | ...]
  packs         completions follow in rows of their own: [completion 1 of prompt 1 | completion 2 of ...]
  decoding      G completions of every prompt, one token of each a step, over one copy of the prompt
  re-listening  a completion that writes <seg>start, end</seg> hears that part of its clip again

A token attends to its own prompt and to the earlier tokens of its own completion, and to nothing else. So the
results are exactly those of G separate rows, and no padding mask can be wrong. Letters: see omni_grpo.py.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import data
from data import PROMPTS, SEGMENT, Example, UserError

OLDEST = dict(torch="2.11", transformers="5.0", peft="0.17")
LORA_ALPHA_PER_RANK = 2  # LoRA's updates are scaled by alpha / rank, the same for every rank
MIN_RELISTEN_S, MAX_RELISTEN_S = 0.2, 10.0  # of a shorter or a longer part nothing is heard again
WIDE = 512  # from this hidden size on, bfloat16 products save a CPU more time than the casts around them cost
RELISTEN_TOKENS = 512  # what may be heard again in one completion, at 25 tokens a second
SLACK_S = 0.5  # so far past the clip's end a part may reach: models round


# ------------------------------------------------------------------------------------------------------------
# Tokens


@dataclass
class Tokens:
    """Token ids, and audio embeddings for some of them: a list of (start, (n, H)).

    Embeddings are placed by position and never by looking for the placeholder's id: the policy may sample
    that id.
    """

    ids: list[int]
    audio: list[tuple[int, Tensor]] = field(default_factory=list)


@dataclass
class Prompt(Tokens):
    # the rollout's pass over this prompt, and the prompt's number there
    read: "tuple[Prefix, int] | None" = None


@dataclass
class Completion(Tokens):
    """What follows a prompt. Tokens that the environment inserts are fed to the model and never trained:
    sampled False."""

    sampled: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # as the sampler saw them; 0 for what was not sampled
    finished: bool = False  # it ended its turn; otherwise it was cut at max_new_tokens
    # parts of the clip heard again, in seconds
    heard: list[tuple[float, float]] = field(default_factory=list)
    # why other parts were not heard
    refused: collections.Counter = field(default_factory=collections.Counter)

    def append(self, token: int, logp: float = 0.0) -> None:
        self.ids.append(token)
        self.sampled.append(True)
        self.logps.append(logp)

    def insert(self, tokens: Tokens) -> None:
        self.audio += [(len(self.ids) + start, audio) for start, audio in tokens.audio]
        self.ids += tokens.ids
        self.sampled += [False] * len(tokens.ids)
        self.logps += [0.0] * len(tokens.ids)

    @property
    def sampled_ids(self) -> list[int]:
        return [token for token, sampled in zip(self.ids, self.sampled) if sampled]


# ------------------------------------------------------------------------------------------------------------
# Families: how a model class is taken apart


@dataclass
class Family:
    """Where a model class keeps its parts. To add a family, add one entry to FAMILIES."""

    model_class: str
    # paths of the language model (embeddings in, hidden states out); the first that exists is taken
    lm: tuple[str, ...]
    drop: tuple[str, ...] = ()  # paths of parts that audio and text never use
    inner_config: str = ""  # the part of the checkpoint's configuration that the class takes
    audio_id: str = ""  # the configuration's name for the id of the audio placeholder
    # (model, mels [(bins, frames)]) -> [(n, H)]; None: a model without ears
    encode_audio: Callable | None = None
    frames_after: int = 0  # how many frames past its end belong to a clip's features


def encode_omni_audio(model, mels: list[Tensor]) -> list[Tensor]:
    """Qwen2.5-Omni's audio tower, once over a batch of clips of any length.       [(bins, frames)] -> [(n,
    H)]"""
    frames = torch.tensor([mel.shape[1] for mel in mels])
    longest = int(frames.max())
    padded = torch.stack([F.pad(mel, (0, longest - mel.shape[1])) for mel in mels])
    mask = (torch.arange(longest) < frames[:, None]).long()
    out = model.get_audio_features(padded.to(model.device, model.dtype), mask.to(model.device))
    sizes = (((frames - 1) // 2 + 1 - 2) // 2 + 1).tolist()  # 25 a second: two strides and a pooling
    return list(out.last_hidden_state.split(sizes))


def encode_qwen2_audio(model, mels: list[Tensor]) -> list[Tensor]:
    """Qwen2-Audio's tower and projector.       [(bins, frames + 2)] -> [(n, H)]

    Their window is 30 s whatever a clip's length. The convolutions see two frames past a clip's end;
    attention never looks at what is behind them.
    """
    parts = getattr(model, "model", model)
    tower, projector = parts.audio_tower, parts.multi_modal_projector
    window = 2 * tower.config.max_source_positions
    padded = torch.stack([F.pad(mel[:, :window], (0, max(0, window - mel.shape[1]))) for mel in mels])
    frames = torch.tensor([mel.shape[1] - 2 for mel in mels])
    inner = (frames - 1) // 2 + 1
    behind = torch.arange(window // 2) >= inner[:, None, None, None]
    mask = torch.zeros(len(mels), 1, 1, window // 2).masked_fill(behind, -1e30)
    dtype = projector.linear.weight.dtype
    out = tower(padded.to(model.device, dtype), attention_mask=mask.to(model.device, dtype)).last_hidden_state
    sizes = ((inner - 2) // 2 + 1).tolist()
    return [x[:n] for x, n in zip(projector(out), sizes)]


# transformers moved the language model and the towers in 5.2x: both layouts are found
OMNI = Family(
    model_class="Qwen2_5OmniThinkerForConditionalGeneration",
    lm=("model.language_model", "model"),
    drop=("model.visual", "visual"),
    inner_config="thinker_config",
    audio_id="audio_token_id",
    encode_audio=encode_omni_audio,
)
QWEN2_AUDIO = Family(
    model_class="Qwen2AudioForConditionalGeneration",
    lm=("model.language_model", "language_model.model"),
    audio_id="audio_token_id",
    encode_audio=encode_qwen2_audio,
    frames_after=2,
)
# any causal language model of the usual make
TEXT_ONLY = Family(model_class="AutoModelForCausalLM", lm=("model",))
FAMILIES = {"qwen2_5_omni": OMNI, "qwen2_5_omni_thinker": OMNI, "qwen2_audio": QWEN2_AUDIO}

PLAIN_TEMPLATE = """{% for m in messages %}{% if m.role == 'user' %}User: {% endif %}{{ m.content }}
{% endfor %}Assistant:"""  # for base models: TinyZero's, less its preamble


@dataclass
class Policy:
    """A model taken apart: what the algorithm needs of it and nothing else."""

    model: Any  # the library's model, LoRA layers inside; a PeftModel unless lora_rank is 0
    lm: Any
    head: Any
    embed_tokens: Any
    encode_audio: Callable | None
    frames_after: int = 0
    tokenizer: Any = None
    extractor: Any = None  # samples -> log-mel features; None: a model without ears
    audio_id: int | None = None
    stop_ids: list[int] = field(default_factory=list)
    # None: the adapter switched off; "reference": a frozen adapter; a Policy: a frozen copy
    reference: Any = None

    @property
    def device(self):
        return self.head.weight.device

    @property
    def dtype(self):
        """Of the frozen base; LoRA is float32."""
        return self.head.weight.dtype

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------------------
# Loading


def find_model(name: str) -> str:
    """A local directory, or the files of a Hub id, or of ID@REVISION (configuration, tokenizer, safetensors;
    never code or pickles)."""
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise UserError(f"--model {name}: no config.json in that directory")
        return name
    import huggingface_hub

    hub_id, revision = split_revision(name)
    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
    try:
        return huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    except Exception as e:  # offline, misspelt, gated: the library has an exception class for each
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(
            f"--model {name}: not a local directory, and not to be had from the Hub ({reason})"
        ) from None


def split_revision(name: str) -> tuple[str, str | None]:
    """A Hub id, and behind an @ its revision; a directory is no Hub id."""
    hub_id, _, revision = name.partition("@")
    return (name, None) if os.path.isdir(name) else (hub_id, revision or None)


def check_libraries() -> None:
    """Raises UserError for a library that is older than any that this code was written for."""
    for name, oldest in OLDEST.items():
        found = importlib.metadata.version(name)
        if list(map(int, re.findall(r"\d+", found)[:2])) < list(map(int, oldest.split("."))):
            raise UserError(f"{name} {found} is too old, {oldest} is needed: pip install -r requirements.txt")


def quiet_libraries() -> None:
    """The terminal belongs to the run: no notes about deprecations, optional kernels and shards."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextlib.contextmanager
def blame(what: str):
    """Around calls of libraries that read the user's files: what they raise becomes a UserError of one
    line."""
    import jinja2
    import safetensors

    known = OSError, EOFError, ValueError, TypeError, LookupError, RuntimeError, AttributeError
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (*known, safetensors.SafetensorError, pickle.UnpicklingError, jinja2.TemplateError) as e:
        raise UserError(f"{what}: {' '.join(str(e).split())[:300] or type(e).__name__}") from None


def read_family(folder: str) -> tuple[Any, Family]:
    """-> (the checkpoint's configuration, how its class is taken apart)"""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family = FAMILIES.get(config.model_type, TEXT_ONLY)
    return getattr(config, family.inner_config, config) if family.inner_config else config, family


def load_policy(
    model: str,
    adapter: str = "",
    lora_rank: int = 0,
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
    train: bool = False,
    dtype: str = "auto",
) -> Policy:
    """Checkpoint directory or Hub id -> Policy.

    To train: with a fresh LoRA adapter, with `adapter`, or (lora_rank 0) with all weights trainable.
    Otherwise the model as it is, with `adapter` where one is given, and nothing trainable. Raises UserError.
    """
    import transformers

    check_libraries()
    quiet_libraries()
    folder, cuda = find_model(model), torch.cuda.is_available()
    if load_in_4bit and not cuda:
        raise UserError("--load_in_4bit: needs a CUDA card")
    options = {}
    if cuda:
        options["device_map"] = {"": torch.cuda.current_device()}
    if load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["lm_head", "audio_tower", "multi_modal_projector", "visual"],
        )
    where = f"--model {model}"
    refuse_pickles(folder, where)
    with blame(where):
        config, family = read_family(folder)
        model_class = getattr(transformers, family.model_class)
        options["dtype"] = choose_dtype(dtype, config, train and not lora_rank, cuda)
        loaded, info = model_class.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(family.drop)]
    if missing:
        raise UserError(
            f"{where}: its files lack {len(missing)} of the model's weights, the first is {missing[0]}"
        )
    policy = take_apart(loaded, family, adapter, lora_rank, gradient_checkpointing, train)
    add_text_side(policy, family, folder, where)
    if policy.has_adapter:
        # what the user typed, and not where it lies here: wherever the adapter goes, its base must be found
        lora = policy.model.peft_config["default"]
        lora.base_model_name_or_path, lora.revision = split_revision(model)
    return policy


def choose_dtype(name: str, config, all_trained: bool, cuda: bool) -> torch.dtype:
    """The base's dtype: what --dtype names, or for "auto" bfloat16 where the hardware multiplies it faster.

    config: of the language model, or of the model around it. LoRA is float32 whatever the base is, and a base
    that is trained itself always is: bfloat16 would round small steps away. Raises UserError.
    """
    if all_trained:
        if name == "bfloat16":
            raise UserError("--dtype bfloat16: rounds small steps away; --lora_rank 0 trains in float32")
        return torch.float32
    if name != "auto":
        return getattr(torch, name)
    hardware = getattr(torch.cpu, "get_capabilities", dict)()
    multiplies = hardware.get("amx_bf16") or hardware.get("avx512_bf16")
    gains = multiplies and config.get_text_config().hidden_size >= WIDE
    return torch.bfloat16 if cuda or gains else torch.float32


def refuse_pickles(folder: str, where: str) -> None:
    """use_safetensors does not look at what the index of a checkpoint names."""
    path = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(path):
        return
    with blame(where), open(path, encoding="utf-8") as f:
        files = set(json.load(f)["weight_map"].values())
    pickles = sorted(name for name in files if not name.endswith(".safetensors"))
    if pickles:
        raise UserError(f"{where}: its index names {pickles[0]}, and only safetensors are loaded")


def take_apart(
    model,
    family: Family,
    adapter: str = "",
    lora_rank: int = 0,
    gradient_checkpointing: bool = False,
    train: bool = False,
) -> Policy:
    """Drop what is never used, pack the attention, put LoRA on the language model. add_text_side does the
    rest."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("packed", packed_attention)
    modules = dict(model.named_modules())
    full_training = train and not lora_rank
    for path in family.drop:
        if path in modules and not full_training:  # a checkpoint of all weights is saved whole
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, None)
    lm_path = next((path for path in family.lm if path in modules), "")
    if not lm_path:
        names = ", ".join(family.lm)
        raise UserError(
            f"--model: {type(model).__name__} keeps its language model under none of the names {names}; "
            "write a Family for it"
        )
    lm = modules[lm_path]
    lm.set_attn_implementation("packed")
    policy = Policy(
        model=model,
        lm=lm,
        head=model.get_output_embeddings(),
        embed_tokens=model.get_input_embeddings(),
        encode_audio=family.encode_audio and torch.no_grad()(functools.partial(family.encode_audio, model)),
        frames_after=family.frames_after,
    )
    model.requires_grad_(False)
    if adapter and not full_training:
        policy.model = load_adapter(model, lm_path, adapter, train)
    elif train and lora_rank:
        policy.model = add_lora(model, lm_path, lora_rank)
    elif train:
        lm.requires_grad_(True)
        policy.head.requires_grad_(True)
    if train and gradient_checkpointing:
        enable = getattr(lm, "activation_checkpointing_enable", None)  # the new name, from 5.2x on
        (enable or lm.gradient_checkpointing_enable)({"use_reentrant": False})
    policy.model.eval()
    return policy


# What stands before layers.0 in the names of a language model's parts: here, in the published files and in
# vLLM, and with the whole Omni around it. No part of a tower, nor of the talker, is named so.
BEFORE_LAYERS = r"(?:thinker\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?"


def load_adapter(model, lm_path: str, adapter: str, train: bool):
    """LoRA as PEFT saves it, on the language model alone.       -> PeftModel

    Raises UserError if its tensors are not exactly those that the adapted model has a place for: what the
    library leaves out in silence would be the base's scores under the adapter's name.
    """
    import peft

    where = f"--adapter {adapter}"
    config, there = read_adapter(adapter, lm_path)
    with blame(where):
        config.base_model_name_or_path, config.inference_mode = None, not train
        adapted = peft.get_peft_model(model, config)
        wanted = {name: x.shape for name, x in peft.utils.get_peft_model_state_dict(adapted).items()}
        unplaced = sorted(name for name, x in there.items() if wanted.get(name) != x.shape)
        missing = sorted(wanted.keys() - there.keys())
        if unplaced or missing:
            counts = f"{len(unplaced)} of its {len(there)} tensors have no place, {len(missing)} are missing"
            raise UserError(f"{where}: not an adapter of this model, {counts}: {(unplaced + missing)[0]}")
        peft.set_peft_model_state_dict(adapted, there)
    return adapted


def read_adapter(folder: str, lm_path: str):
    """LoRA of any layout -> its LoraConfig and its tensors, named as where the language model is at lm_path.

    Raises UserError.
    """
    import peft

    where = f"--adapter {folder}"
    refuse_no_adapter(folder, where)
    with blame(where):
        config = peft.PeftConfig.from_pretrained(folder)
        if not isinstance(config, peft.LoraConfig) or not config.target_modules:
            raise UserError(f"{where}: is {config.peft_type}; only LoRA with target_modules can be loaded")
        weights = peft.utils.load_peft_weights(folder, device="cpu")
        tensors = {in_layout(name, lm_path): x for name, x in weights.items()}
        config.target_modules = lora_pattern([name.partition(".lora_")[0] for name in tensors])
        if not config.target_modules:
            first = f"; the first is {min(tensors)}" if tensors else ""
            raise UserError(
                f"{where}: none of its {len(tensors)} tensors is of a language model's layer{first}"
            )
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        for patterns in ("rank_pattern", "alpha_pattern"):
            moved = {in_layout(name, lm_path): n for name, n in getattr(config, patterns).items()}
            setattr(config, patterns, moved)
    return config, tensors


def refuse_no_adapter(folder: str, where: str) -> None:
    has = {name: os.path.exists(os.path.join(folder, name)) for name in ("adapter", "config.json")}
    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        hint = "; a whole checkpoint is given as --model" if has["config.json"] else ""
        hint = f"; did you mean {os.path.join(folder, 'adapter')}?" if has["adapter"] else hint
        raise UserError(f"{where}: no adapter_config.json there{hint}")
    if not os.path.exists(os.path.join(folder, "adapter_model.safetensors")):
        raise UserError(f"{where}: no adapter_model.safetensors there, and only safetensors are loaded")


def in_layout(name: str, lm_path: str) -> str:
    """The name of a part of a layer, or of a tensor of an adapter, as it is where the language model is at
    lm_path; other names stay."""
    return re.sub(rf"^(base_model\.model\.)?{BEFORE_LAYERS}(?=layers\.\d)", rf"\g<1>{lm_path}.", name)


def lora_pattern(modules: list[str]) -> str:
    """Matches those of the modules that are in a language model's layers, in every layout, and nothing else.
    "" if none is."""
    inside = rf"(?:base_model\.model\.)?{BEFORE_LAYERS}layers\.(\d+)\.(.+)"
    found = [re.fullmatch(inside, name) for name in modules]
    layers = sorted({int(layer[1]) for layer in found if layer})
    names = sorted({re.escape(layer[2]) for layer in found if layer})
    pattern = rf"{BEFORE_LAYERS}layers\.({'|'.join(map(str, layers))})\.({'|'.join(names)})"
    return pattern if layers else ""


def add_lora(model, lm_path: str, rank: int):
    """LoRA on every linear layer of the language model; the pattern cannot match the audio tower.    ->
    PeftModel"""
    import peft

    lm = model.get_submodule(lm_path)
    pattern = lora_pattern([name for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear)])
    lora = peft.LoraConfig(
        r=rank, lora_alpha=LORA_ALPHA_PER_RANK * rank, target_modules=pattern, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, lora)


def add_text_side(policy: Policy, family: Family, folder: str, where: str) -> None:
    """Tokenizer, chat template, feature extractor, placeholder and end-of-turn ids, from the checkpoint's
    files."""
    import transformers

    model = policy.model
    with blame(where):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if family.encode_audio:
            policy.extractor = transformers.AutoFeatureExtractor.from_pretrained(
                folder, trust_remote_code=False
            )
        template = os.path.join(folder, "chat_template.json")  # where processors used to keep it
        if tokenizer.chat_template is None and os.path.exists(template):
            with open(template, encoding="utf-8") as f:
                tokenizer.chat_template = json.load(f)["chat_template"]
    if tokenizer.chat_template is None:
        if family.encode_audio:
            raise UserError(f"{where}: its tokenizer has no chat template")
        print(f"{folder}: no chat template, so prompts are written as plain text, as for a base model")
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer names no end-of-turn token")
    if family.audio_id:
        policy.audio_id = getattr(model.config, family.audio_id)
        if policy.audio_id >= len(tokenizer):
            raise UserError(
                f"{where}: its tokenizer does not hold the audio placeholder, id {policy.audio_id}; "
                "are its files there?"
            )
    content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "?"}] if family.audio_id else "?"
    with blame(f"{where}: its chat template"):
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if family.audio_id and ids.count(policy.audio_id) != 1:
        raise UserError(f"{where}: its chat template writes no placeholder for a clip")
    stops = getattr(model.generation_config, "eos_token_id", None) or []
    stops = stops if isinstance(stops, list) else [stops]
    policy.stop_ids = sorted({tokenizer.eos_token_id, *stops})
    policy.tokenizer = tokenizer


# ------------------------------------------------------------------------------------------------------------
# The frozen reference


def freeze_reference(policy: Policy) -> None:
    """Keep the policy as it is now as the reference. A fresh adapter needs none of this: switched off it is
    the base."""
    if policy.has_adapter:
        policy.model.add_adapter("reference", copy.deepcopy(policy.model.peft_config["default"]))
        weights = dict(policy.model.named_parameters())
        for name, p in weights.items():
            if ".reference." in name:
                p.data.copy_(weights[name.replace(".reference.", ".default.")].data)
                p.requires_grad_(False)
        policy.model.set_adapter("default")
        policy.reference = "reference"
        return
    lm, head = copy.deepcopy((policy.lm, policy.head))
    policy.reference = dataclasses.replace(
        policy,
        lm=lm.requires_grad_(False),
        head=head.requires_grad_(False),
        embed_tokens=lm.get_input_embeddings(),
    )


@contextlib.contextmanager
def reference(policy: Policy):
    """The frozen policy that the KL is measured to."""
    if isinstance(policy.reference, Policy):
        yield policy.reference
    elif policy.reference is None:
        with policy.model.disable_adapter():
            yield policy
    else:
        policy.model.set_adapter(policy.reference)
        try:
            yield policy
        finally:
            policy.model.set_adapter("default")


# ------------------------------------------------------------------------------------------------------------
# Clips and prompts as embeddings


@dataclass
class Clip:
    """A clip as the model hears it: log-mel features (bins, frames); its samples (n,) where parts may be
    heard again."""

    mel: Tensor
    samples: Any = None


def load_clips(
    policy: Policy, example: Example, audio: str, max_audio_s: float, keep_samples: bool
) -> tuple[list[Clip], bool]:
    """The clips of a question, read and turned into features; worker threads call this.      -> (clips, was
    one cut?)

    audio: real | silence (as long as the clip) | none. Raises AudioError.
    """
    if audio == "none" or not example.clips:
        return [], False
    extractor = policy.extractor
    if extractor is None:
        raise UserError("--model: this model has no audio tower; use --audio none")
    limit_s = min(max_audio_s, extractor.n_samples / extractor.sampling_rate)
    clips, any_cut = [], False
    for source in example.clips:
        samples, was_cut = data.load_audio(source, limit_s)
        if audio == "silence":
            samples[:] = 0
        mel = log_mel(extractor, samples, policy.frames_after)
        clips.append(Clip(mel, samples if keep_samples else None))
        any_cut = any_cut or was_cut
    return clips, any_cut


def log_mel(extractor, samples, frames_after: int) -> Tensor:
    """Samples (n,) -> log-mel features (bins, frames).

    The library pads every clip to the extractor's whole length, 300 s for Qwen2.5-Omni and 30 s for
    Qwen2-Audio. Padding by one window gives the same features in a fraction of the time.
    """
    hop = extractor.hop_length
    padded = -(-len(samples) // hop) * hop + extractor.n_fft
    out = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        padding="max_length",
        max_length=min(padded, extractor.n_samples),
        return_attention_mask=True,
    )
    frames = int(out["attention_mask"].sum()) + frames_after
    mel = out["input_features"][0, :, :frames]
    return F.pad(mel, (0, frames - mel.shape[1]))  # where the extractor's length ends with the clip


def embed_clips(policy: Policy, clips: list[list[Clip]]) -> list[list[Tensor]]:
    """The clips of every question -> their audio embeddings (n, H). The audio tower runs once for all of
    them."""
    mels = [clip.mel for of_question in clips for clip in of_question]
    each = iter(policy.encode_audio(mels) if mels else ())
    return [[next(each) for _ in of_question] for of_question in clips]


def encode_prompt(policy: Policy, example: Example, audio: list[Tensor], prompt_name: str) -> Prompt:
    """A question -> its prompt. `audio`: the embeddings (n, H) of its clips, for the placeholders in their
    order."""
    plain = dataclasses.replace(
        example,
        question=example.question.replace("<|", "< |"),  # what a question says is no markup
        choices=[choice.replace("<|", "< |") for choice in example.choices],
    )
    messages = data.chat_messages(plain, PROMPTS[prompt_name], with_audio=bool(audio))
    text = policy.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt, start = Prompt(policy.tokenizer(text, add_special_tokens=False)["input_ids"]), 0
    for clip in audio:
        start = prompt.ids.index(policy.audio_id, start)
        prompt.ids[start : start + 1] = [policy.audio_id] * len(clip)
        prompt.audio.append((start, clip))
        start += len(clip)
    return prompt


def completion_text(policy: Policy, completion: Completion) -> str:
    """What the policy said, and nothing of what was inserted."""
    return policy.tokenizer.decode(completion.sampled_ids, skip_special_tokens=True)


def embed(policy: Policy, parts: Sequence[Tokens]) -> Tensor:
    """Token embeddings of all parts, one after the other, with every audio embedding at its position.    ->
    (N, H)"""
    ids = torch.tensor([token for part in parts for token in part.ids], device=policy.device)
    x = F.embedding(ids, policy.embed_tokens.weight)  # not the module: peft hooks it to require a gradient
    offset = 0
    for part in parts:
        for start, audio in part.audio:
            x[offset + start : offset + start + len(audio)] = audio.to(x.dtype)
        offset += len(part.ids)
    return x


# ------------------------------------------------------------------------------------------------------------
# Attention in one row of tokens. The language model is told who sees whom by a `pattern`: an object with a
# method attend(layer, query, key, value, scaling), query (1, heads, N, d), key and value (1, KV heads, N, d)
# -> (1, heads, N, d)


def forward(policy: Policy, x: Tensor, positions: Tensor, pattern) -> Tensor:
    """The language model on one row.       x (N, H), positions (N,) -> hidden states (N, H)"""
    learning = torch.is_grad_enabled()
    # gradient checkpointing works in training mode only; there is no dropout
    if policy.lm.training != learning:
        policy.lm.train(learning)
    out = policy.lm(inputs_embeds=x[None], position_ids=positions[None], pattern=pattern, use_cache=False)
    return out.last_hidden_state[0]


def packed_attention(module, query, key, value, attention_mask, pattern=None, **kwargs):
    """The library calls this for attention. Without a pattern (its own generate) it is the library's."""
    if pattern is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("sliding_window") is not None or kwargs.get("softcap") is not None:
        raise UserError("this model's attention has a sliding window or a soft cap, which packs do not have")
    out = pattern.attend(module.layer_idx, query, key, value, kwargs.get("scaling"))
    return out.transpose(1, 2), None


def attend(query, key, value, scaling, mask=None, causal=False):
    """Grouped-query attention. Heads that share a key share its memory.    (1, heads, n, d), (1, KV heads, m,
    d)"""
    kv_heads, (n, d) = key.shape[1], query.shape[2:]
    query = query[0].reshape(kv_heads, -1, n, d)
    key = key[0, :, None].expand(-1, query.shape[1], -1, -1)
    value = value[0, :, None].expand(-1, query.shape[1], -1, -1)
    return fused_attention(query, key, value, scaling, mask, causal).reshape(1, -1, n, d)


def between(x: Tensor, start: int, end: int) -> Tensor:
    """Tokens start to end.       (1, heads, N, d) -> (1, heads, end - start, d)"""
    return x[:, :, start:end]


def fused_attention(query, key, value, scaling, mask=None, causal=False):
    if query.is_meta:  # there, the plain call would make a matrix of scores that no real device holds
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if mask is not None:  # the plain call makes numbers of the booleans, and backward needs them
            mask = torch.empty_like(mask, dtype=query.dtype)
        return fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)[0]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)


# ---- reading prompts


@dataclass
class Prefix:
    """Prompts that the policy has read: what their completions need of them, computed once."""

    prompts: Sequence[Tokens]
    # of each layer: keys and values (1, KV heads, N, d), one prompt after the other
    kv: list[tuple[Tensor, Tensor]]
    last: Tensor  # (P, H) hidden states of the prompts' last tokens, which predict the completions' first

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where each prompt starts and ends among the N tokens."""
        return ranges_of(self.prompts)

    def detached(self) -> "Prefix":
        """A copy that is cut off from the pass over the prompts. Several backward passes add up their
        gradients on it."""

        def leaf(x):
            return x.detach().requires_grad_(x.requires_grad)

        return Prefix(self.prompts, [(leaf(k), leaf(v)) for k, v in self.kv], leaf(self.last))

    def backward(self, copy: "Prefix") -> None:
        """Backpropagate the gradients collected on the detached copy through the original pass over the
        prompts."""
        ours = [self.last, *(x for kv in self.kv for x in kv)]
        theirs = [copy.last, *(x for kv in copy.kv for x in kv)]
        pairs = [(x, leaf.grad) for x, leaf in zip(ours, theirs) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])


class PromptAttention:
    """Every token sees the earlier ones of its own prompt. Keys and values are kept for the completions."""

    def __init__(self, ranges: list[tuple[int, int]]):
        self.ranges, self.kv = ranges, {}

    def attend(self, layer: int, query, key, value, scaling):
        self.kv.setdefault(layer, (key, value))  # the backward pass runs a checkpointed layer a second time
        outs = []
        for a, b in self.ranges:
            own = [between(x, a, b) for x in (query, key, value)]
            outs.append(attend(*own, scaling, causal=True))
        return torch.cat(outs, dim=2)


def read_prompts(policy: Policy, prompts: Sequence[Tokens], pack_tokens: int = 8192) -> list[Prefix]:
    """Passes over at most pack_tokens tokens each: only the activations of one pass are held at a time.

    With gradients on, every pass keeps its graph, for Prefix.backward.
    """
    prefixes = []
    for part in split_by_size([len(p.ids) for p in prompts], pack_tokens):
        some = [prompts[i] for i in part]
        pattern = PromptAttention(ranges_of(some))
        positions = torch.cat([torch.arange(len(p.ids)) for p in some]).to(policy.device)
        hidden = forward(policy, embed(policy, some), positions, pattern)
        last = hidden[[end - 1 for _, end in pattern.ranges]]
        prefixes.append(Prefix(some, list(pattern.kv.values()), last))
    return prefixes


def ranges_of(parts: Sequence[Tokens]) -> list[tuple[int, int]]:
    """Where each part starts and ends when they stand one after the other."""
    ends = list(accumulate(len(part.ids) for part in parts))
    return list(zip([0, *ends], ends))


def split_by_size(sizes: list[int], limit: int) -> list[list[int]]:
    """Indices in order, in parts whose sizes sum to `limit` at most; what is larger is a part of its own."""
    parts, room = [], 0
    for i, size in enumerate(sizes):
        if size > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(i)
        room -= size
    return parts


# ---- scoring completions


@dataclass
class Pack:
    """Completions of some prompts in one row of n tokens, without padding. M of their tokens are trained."""

    prompts: list[Prompt]
    prefix: Prefix | None  # the rollout's pass over these prompts; None: they are read again
    places: Sequence[int]  # the prompts' numbers in the prefix
    inputs: list[Tokens]  # the completions, each without its last token, which predicts nothing
    positions: Tensor  # (n,)
    # of each prompt: start and end of its completions, mask (1, 1, m, S + m)
    blocks: list[tuple[int, int, Tensor]]
    # (M,) which hidden state predicts the token: first the prompts' last ones, then those of the n
    predictor: Tensor
    target: Tensor  # (M,) the token
    row: Tensor  # (M,) to which completion of the step it belongs
    sampler_logp: Tensor  # (M,) as the sampler saw it; 0 for what was not sampled but is to be imitated


def make_pack(
    prompts: list[Prompt], completions: list[list[Completion]], first_rows: Sequence[int], device="cpu"
) -> Pack:
    """The completions of each prompt, numbered from its first_row on. Of prompts that were read, all in the
    same pass."""
    inputs, positions, blocks, predictor, target, row, sampler_logp, n = [], [], [], [], [], [], [], 0
    for i, (prompt, of_prompt, first_row) in enumerate(zip(prompts, completions, first_rows)):
        start, size, owner = n, len(prompt.ids), []
        for j, completion in enumerate(of_prompt):
            fed = len(completion.ids) - 1
            audio = [(at, x[: fed - at]) for at, x in completion.audio if at < fed]
            inputs.append(Tokens(completion.ids[:fed], audio))
            positions.append(torch.arange(size, size + fed))
            owner += [j] * fed
            trained = torch.tensor(completion.sampled, dtype=torch.bool).nonzero()[:, 0]
            before = len(prompts) + n + trained - 1  # a token is predicted by the one before it ...
            predictor.append(torch.where(trained == 0, i, before))  # ... and the first by the prompt's last
            target.append(torch.tensor(completion.ids, dtype=torch.long)[trained])
            row.append(torch.full((len(trained),), first_row + j))
            logps = completion.logps or [0.0] * len(completion.ids)
            sampler_logp.append(torch.tensor(logps)[trained])
            n += fed
        owner = torch.tensor(owner, dtype=torch.long)
        same = owner[:, None] == owner[None, :]
        sees_prompt = torch.ones(n - start, size, dtype=torch.bool)
        # its prompt, and what came before in its completion
        mask = torch.cat([sees_prompt, same.tril()], dim=1)
        blocks.append((start, n, mask.to(device)[None, None]))
    prefix, places = None, range(len(prompts))
    if prompts[0].read:
        prefix, _ = prompts[0].read
        places = [prompt.read[1] for prompt in prompts]
    positions, *of_token = (
        torch.cat(x).to(device) for x in (positions, predictor, target, row, sampler_logp)
    )
    return Pack(prompts, prefix, places, inputs, positions, blocks, *of_token)


def make_packs(
    prompts: list[Prompt],
    completions: list[list[Completion]],
    first_rows: list[int],
    pack_tokens: int,
    device="cpu",
) -> list[Pack]:
    """Packs of at most pack_tokens tokens; the completions of one prompt stay together, however many they
    are.

    Completions are scored with the rollout's pass over their prompts, where it was kept. A backward pass
    through it goes through all its prompts and costs twice a forward pass: where less than two thirds of them
    are wanted here, reading those again is cheaper.
    """
    by_pass = collections.defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_pass[id(prompt.read[0]) if prompt.read else None].append(i)
    for key, members in list(by_pass.items()):
        wanted = sum(len(prompts[i].ids) for i in members)
        if key and 3 * wanted < 2 * prompts[members[0]].read[0].ranges[-1][1]:
            for i in members:
                prompts[i].read = None
            by_pass[None] += by_pass.pop(key)
    packs = []
    for members in by_pass.values():
        sizes = []
        for i in members:
            to_read = 0 if prompts[i].read else len(prompts[i].ids)
            sizes.append(to_read + sum(len(c.ids) for c in completions[i]))
        for part in split_by_size(sizes, pack_tokens):
            some = [members[k] for k in part]
            chosen = ([x[i] for i in some] for x in (prompts, completions, first_rows))
            packs.append(make_pack(*chosen, device))
    return packs


class CompletionAttention:
    """Every token sees its prompt, and the earlier tokens of its own completion."""

    def __init__(self, prefix: Prefix, places: Sequence[int], blocks: list):
        self.kv, ranges = prefix.kv, prefix.ranges
        self.blocks = [
            (*ranges[place], *block) for place, block in zip(places, blocks) if block[1] > block[0]
        ]

    def attend(self, layer: int, query, key, value, scaling):
        prompt_key, prompt_value = self.kv[layer]
        outs = []
        for p, q, a, b, mask in self.blocks:  # tokens p to q of the prompts, a to b of the completions
            keys = torch.cat([between(prompt_key, p, q), between(key, a, b)], dim=2)
            values = torch.cat([between(prompt_value, p, q), between(value, a, b)], dim=2)
            outs.append(attend(between(query, a, b), keys, values, scaling, mask))
        return torch.cat(outs, dim=2)


def token_logps(
    policy: Policy, pack: Pack, temperature: float, prefix: Prefix | None = None, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every trained token under softmax(logits / temperature).       -> (M,),
    (M,)

    `prefix`: where the pack's prompts were read, at pack.places; None: they are read here. The head runs on
    the M predicting positions only, `chunk` at a time under checkpointing, in float32 from the softmax on:
    (M, V) is never held.
    """

    def chunk_logps(hidden, target):
        logps = F.log_softmax(policy.head(hidden).float() / temperature, dim=-1)
        with torch.no_grad():
            entropy = token_entropy(logps)
        return logps.gather(1, target[:, None])[:, 0], entropy

    places = pack.places
    if prefix is None:
        (prefix,) = read_prompts(policy, pack.prompts, sum(len(p.ids) for p in pack.prompts))
        places = range(len(pack.prompts))
    hidden = prefix.last[list(places)]
    if len(pack.positions):  # completions of one token feed nothing
        pattern = CompletionAttention(prefix, places, pack.blocks)
        fed = forward(policy, embed(policy, pack.inputs), pack.positions, pattern)
        hidden = torch.cat([hidden, fed])
    hidden = hidden[pack.predictor]  # (M, H)
    logps, entropies = [], []
    for h, t in zip(hidden.split(chunk), pack.target.split(chunk)):
        logp, entropy = torch.utils.checkpoint.checkpoint(chunk_logps, h, t, use_reentrant=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def token_entropy(logps: Tensor) -> Tensor:
    """- sum_v p_v log p_v       logps (M, V) -> (M,)"""
    return -(logps.exp() * logps).sum(dim=-1)


# ------------------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """Feeds one token of every row at a time, G rows a prompt. R rows go on; row r of them is number
    numbers[r] of P * G (a list; `place` holds the same on the device).

    Keys and values lie in one line for each prompt, [prompt | token 1 of rows 1 ... G | token 2 of rows 1 ...
    G | ...]. The prompt's are there once and read once for all its rows. mask (P, G, slots) says which row
    may see which slot. What a row hears again is a block: it follows the tokens of its step in the line of
    its prompt, and only that row sees it.
    """

    def __init__(self, policy: Policy, prefixes: list[Prefix], g: int, steps: int):
        sources = [(prefix, a, b) for prefix in prefixes for a, b in prefix.ranges]
        sizes = torch.tensor([b - a for _, a, b in sources], device=policy.device)
        longest = int(max(b - a for _, a, b in sources))
        slots = longest + g * steps
        self.policy, self.g, self.prefixes = policy, g, prefixes
        self.numbers = list(range(len(sources) * g))
        self.place = torch.tensor(self.numbers, device=policy.device)
        self.position = sizes.repeat_interleave(g)  # (R,) of the next token
        self.filled = [longest] * len(sources)  # how far each line is filled
        self.blocks = []  # of the last step: (line, row of the line, start, size)
        slot = torch.arange(slots, device=policy.device)
        self.mask = (slot < sizes[:, None])[:, None].repeat(1, g, 1)
        self.kv = []
        for layer, kv in enumerate(prefixes[0].kv):
            lines = tuple(x.new_zeros(len(sources), x.shape[1], slots, x.shape[3]) for x in kv)
            for line, (prefix, a, b) in enumerate(sources):
                for to, x in zip(lines, prefix.kv[layer]):
                    to[line, :, : b - a] = x[0, :, a:b]
            self.kv.append(lines)

    def first_logits(self) -> Tensor:
        """What follows the prompts.       -> (R, V)"""
        last = torch.cat([prefix.last for prefix in self.prefixes])
        return self.policy.head(last).repeat_interleave(self.g, dim=0)

    def step(self, ids: Tensor, inserted: dict[int, Tokens]) -> Tensor:
        """Feed a token of every row and, behind it, what some rows hear again.    ids (R,), {row: Tokens} ->
        logits (R, V)"""
        self.reserve([(row, len(tokens.ids)) for row, tokens in inserted.items()])
        x, positions = F.embedding(ids, self.policy.embed_tokens.weight), self.position
        # `last` predicts the row's next token
        last, end = torch.arange(len(ids), device=ids.device), len(ids)
        if inserted:
            x = torch.cat([x, embed(self.policy, list(inserted.values()))])
        for row, tokens in inserted.items():
            n = len(tokens.ids)
            behind = self.position[row] + 1 + torch.arange(n, device=ids.device)
            positions = torch.cat([positions, behind])
            end += n
            last[row] = end - 1
            self.position[row] += n
        hidden = forward(self.policy, x, positions, self)
        self.position = self.position + 1
        return self.policy.head(hidden[last])

    def reserve(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Slots for a token of every row and for the blocks: (row, size)."""
        self.show_blocks()
        g, device = self.g, self.place.device
        self.starts = torch.tensor(self.filled, device=device)
        self.filled = [end + g for end in self.filled]
        self.seen = max(self.filled)  # by the tokens of this step; a block sees itself, too
        for row, size in blocks:
            line, row = divmod(self.numbers[row], g)
            self.blocks.append((line, row, self.filled[line], size))
            self.filled[line] += size
        more = max(self.filled) - self.mask.shape[2]
        if more > 0:  # grow by a quarter, one layer after the other
            more = max(more, self.mask.shape[2] // 4)
            self.mask = F.pad(self.mask, (0, more))
            for layer, kv in enumerate(self.kv):
                self.kv[layer] = tuple(F.pad(x, (0, 0, 0, more)) for x in kv)
        line, row = torch.arange(len(self.mask), device=device), torch.arange(g, device=device)
        self.mask[line[:, None], row, self.starts[:, None] + row] = True

    def show_blocks(self) -> None:
        """A row sees its block from the next step on: the token before it, fed in the same pass, must not
        look ahead."""
        for line, row, start, size in self.blocks:
            self.mask[line, row, start : start + size] = True
        self.blocks = []

    def attend(self, layer: int, query, key, value, scaling):
        (lines, kv_heads, _, d), heads, g = self.kv[layer][0].shape, query.shape[1], self.g
        line, row, r = self.place // g, self.place % g, len(self.place)
        for to, x in zip(self.kv[layer], (key, value)):
            to[line, :, self.starts[line] + row] = x[0, :, :r].transpose(0, 1)
        keys, values = (x[:, :, : self.seen] for x in self.kv[layer])
        # all queries that share a key stand together: (P, KV heads, heads of a KV head * G, d)
        rows = query.new_zeros(lines * g, heads, d)
        rows[self.place] = query[0, :, :r].transpose(0, 1)
        rows = rows.view(lines, g, kv_heads, -1, d).permute(0, 2, 3, 1, 4).reshape(lines, kv_heads, -1, d)
        mask = self.mask[:, None, None, :, : self.seen].expand(-1, 1, heads // kv_heads, -1, -1)
        out = fused_attention(rows, keys, values, scaling, mask.reshape(lines, 1, -1, self.seen))
        out = out.view(lines, kv_heads, -1, g, d).permute(0, 3, 1, 2, 4).reshape(lines * g, heads, d)
        outs = [out[self.place].transpose(0, 1)[None]]
        for line, row, start, size in self.blocks:
            for to, x in zip(self.kv[layer], (key, value)):
                to[line, :, start : start + size] = x[0, :, r : r + size]
            keys, values = (x[line : line + 1, :, : start + size] for x in self.kv[layer])
            before = self.mask[line, row, :start].repeat(size, 1)
            mask = torch.cat([before, self.mask.new_ones(size, size).tril()], dim=1)
            outs.append(attend(between(query, r, r + size), keys, values, scaling, mask))
            r += size
        return torch.cat(outs, dim=2)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows; prompts without one leave."""
        self.show_blocks()
        numbers = [self.numbers[row] for row in rows]
        lines = sorted({number // self.g for number in numbers})
        if len(lines) < len(self.mask):
            numbers = [lines.index(number // self.g) * self.g + number % self.g for number in numbers]
            self.mask = self.mask[lines]
            self.kv = [tuple(x[lines] for x in kv) for kv in self.kv]
            self.filled = [self.filled[line] for line in lines]
        self.numbers, self.place = numbers, torch.tensor(numbers, device=self.place.device)
        self.position = self.position[rows]


# ------------------------------------------------------------------------------------------------------------
# Re-listening (Echo, arXiv 2602.11909)

CLOSED_SEGMENT = re.compile(SEGMENT + r"\Z")
ANSWERING = re.compile(r"</\s*think|<\s*(?:answer|response)", re.IGNORECASE)  # as the rewards read it


@functools.cache  # the vocabulary is long, and every step asks
def around_clips(tokenizer, audio_id: int) -> tuple[set[int], list[int], list[int]]:
    """-> (the tokens that may close a tag, what the prompt puts before a clip, what it puts behind it)"""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    closers = {i for i, token in enumerate(tokens) if token and ">" in token}
    content = [{"type": "audio", "audio": "clip"}, {"type": "text", "text": "?"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    at, special = ids.index(audio_id), tokenizer.added_tokens_decoder
    before = [i for i in ids[at - 1 : at] if i in special]
    after = [i for i in ids[at + 1 : at + 2] if i in special]
    return closers, before, after


class Relistening:
    """Inserts what a completion asks for by <seg>start, end</seg>: that part of its clip, wrapped as the
    prompt wraps clips.

    Called after every step with the rows that go on. Seconds; several clips follow each other on one time
    line. Only while thinking. A tag may be split over tokens in any way: the part follows the token that
    closes it. A part that cannot be heard adds nothing, and Completion.refused counts why.

    most: parts that one completion may hear again. source: "audio" sends the samples through the audio tower,
    "embeddings" repeats those of the prompt.
    """

    def __init__(
        self, policy: Policy, prompts: list[Prompt], clips: list[list[Clip]], most: int, source: str = "audio"
    ):
        self.policy, self.prompts, self.clips, self.most, self.source = policy, prompts, clips, most, source
        # of each completion: how many of its tokens are dealt with, and the text behind the last tag
        self.done = {}
        self.answering = set()  # completions that are past thinking
        self.closers, self.before, self.after = around_clips(policy.tokenizer, policy.audio_id)

    def __call__(self, which: list[int], rows: list[Completion]) -> list[Tokens | None]:
        """After the last token of each of `rows`, completions of the prompts `which`: what it now hears, or
        None."""
        asked = []
        for n, (i, row) in enumerate(zip(which, rows)):
            tag = self.closed_tag(row) if row.ids[-1] in self.closers else None
            if tag is None:
                continue
            problem, span = self.read_tag(*tag, row, self.clips[i])
            if problem:
                row.refused[problem] += 1
            else:
                row.heard.append(span)
                asked.append((n, i, span))
        out = [None] * len(rows)
        parts = self.embed_parts([(i, *span) for _, i, span in asked])
        for (n, _, _), audio in zip(asked, parts):
            ids = [*self.before, *[self.policy.audio_id] * len(audio), *self.after]
            out[n] = Tokens(ids, [(len(self.before), audio)])
            _, rest = self.done[id(rows[n])]
            self.done[id(rows[n])] = len(rows[n].ids) + len(ids), rest
        return out

    def closed_tag(self, row: Completion, window: int = 64) -> tuple[str, bool] | None:
        """If the last token closes a tag: the text up to it, from the tag before on; was the thinking over by
        then?"""
        done, rest = self.done.get(id(row), (0, ""))
        start = len(row.ids) - window
        text = self.policy.tokenizer.decode(row.ids[max(done, start) :], skip_special_tokens=True)
        if done >= start:
            text = rest + text
        head, tag, rest = text.rpartition("</seg>")
        over = id(row) in self.answering or ANSWERING.search(head) is not None
        if ANSWERING.search(text):
            self.answering.add(id(row))
        if not tag:
            return None
        self.done[id(row)] = len(row.ids), rest
        return head + tag, over

    def read_tag(
        self, text: str, over: bool, row: Completion, clips: list[Clip]
    ) -> tuple[str, tuple[float, float]]:
        """-> ("" or why nothing is heard, (start, end) in seconds)"""
        found = CLOSED_SEGMENT.search(text)
        if not found or text.count("<seg>") > 1:
            return "malformed", (0, 0)
        start, asked_end = map(float, found.groups())
        seconds = sum(len(clip.samples) for clip in clips) / data.RATE_HZ
        end = min(asked_end, seconds)
        inserted = len(row.ids) - sum(row.sampled)
        problems = {
            "not thinking": over,
            "reversed": start >= asked_end,
            "outside": start >= seconds or asked_end > seconds + SLACK_S,
            "short": end - start < MIN_RELISTEN_S - 1e-6,
            "long": end - start > MAX_RELISTEN_S + 1e-6,
            "too many": len(row.heard) >= self.most,
            "no room": inserted + 25 * (end - start) + 2 > RELISTEN_TOKENS + 1e-6,
        }
        return next((problem for problem, there in problems.items() if there), ""), (start, end)

    def embed_parts(self, parts: list[tuple[int, float, float]]) -> list[Tensor]:
        """(prompt, start, end) -> audio embeddings (n, H). The audio tower runs once for all."""
        if self.source == "embeddings":
            return [self.part_of_prompt(*part) for part in parts]
        mels = []
        for i, start, end in parts:
            samples = np.concatenate([clip.samples for clip in self.clips[i]])
            part = samples[round(start * data.RATE_HZ) : round(end * data.RATE_HZ)]
            mels.append(log_mel(self.policy.extractor, part, self.policy.frames_after))
        return self.policy.encode_audio(mels) if mels else []

    def part_of_prompt(self, i: int, start: float, end: float) -> Tensor:
        """The same part as the prompt holds it: cheaper, and nothing new is heard."""
        whole = torch.cat([audio for _, audio in self.prompts[i].audio])
        per_second = len(whole) * data.RATE_HZ / sum(len(clip.samples) for clip in self.clips[i])
        first = min(round(start * per_second), len(whole) - 1)
        return whole[first : first + max(1, round(25 * (end - start)))]
