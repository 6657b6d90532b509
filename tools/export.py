"""A trained adapter for other programs.

    python -m tools.export runs/NAME/adapter --for vllm --out NAME-vllm

thinker  as a run saves it: for the thinker's class of this transformers, with PeftModel.from_pretrained
full     for the whole model's class of this transformers, Qwen2_5OmniForConditionalGeneration
vllm     the names of the published files: vLLM, ms-swift, transformers before 5.2x
merged   a whole checkpoint without an adapter: the base's files with other weights, for whatever loads those

The base is the one that the adapter names; one that has moved is given as --model. Adapters of other programs
come out of the same doors. Qwen2-Audio and language models without ears have no thinker.
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass

import data
from data import UserError, knob
from model import blame, find_model, in_layout, quiet_libraries, read_adapter, read_family
from omni_grpo import is_run

LM_PATHS = {  # model type: door: where the language model is
    "qwen2_5_omni_thinker": dict(
        thinker="model.language_model", full="thinker.model.language_model", vllm="thinker.model"
    ),
    "qwen2_audio": dict(full="model.language_model", vllm="language_model.model"),
}
TEXT_ONLY = dict(full="model", vllm="model")
DOORS = "thinker full vllm merged".split()
SHARD_BYTES = 5 * 10**9
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth")


@dataclass
class Options:
    out: str = knob("", "folder to write")
    model: str = knob("", "its base; none: the one that the adapter names")
    push_to_hub: str = knob(
        "", "USER/NAME: then also upload the folder there, with the token of `hf auth login`"
    )


def export(adapter: str, door: str, options: Options) -> None:
    from tools import card

    if not options.out:
        raise UserError("--out: give the folder to write")
    data.new_file(options.out)
    quiet_libraries()
    config, _ = read_adapter(adapter, "model")
    named = config.base_model_name_or_path or ""
    base = options.model or (f"{named}@{config.revision}" if config.revision else named)
    if not base:
        raise UserError(f"{adapter}: names no base; give --model")
    folder, run = find_model(base), os.path.dirname(os.path.abspath(adapter))
    parent = os.path.dirname(os.path.abspath(options.out))
    with blame(f"--out {options.out}"), tempfile.TemporaryDirectory(dir=parent, prefix="export-") as made:
        part = os.path.join(made, "made")
        os.mkdir(part)
        if door == "merged":
            merge(adapter, folder, part)
        else:
            rename(adapter, folder, door, part)
        if is_run(run):
            data.write_text(f"{part}/README.md", card.card(run))
        os.rename(part, options.out)
    print(f"{options.out}: {door}, of {base}")
    if options.push_to_hub:
        push(options.out, options.push_to_hub)


def rename(adapter: str, base: str, door: str, out: str) -> None:
    """Raises UserError if the base has no such door, or no place for a tensor."""
    import torch
    import transformers

    with blame(f"--model {base}"):
        config, family = read_family(base)
        with torch.device("meta"):
            model = getattr(transformers, family.model_class)._from_config(config)
    paths = LM_PATHS.get(config.model_type, TEXT_ONLY)
    if door not in paths:
        raise UserError(f"--for {door}: {config.model_type} has none; give {' or '.join(paths)} or merged")
    places = {in_layout(name, paths[door]) for name, _ in model.named_modules()}
    lora, tensors = read_adapter(adapter, paths[door])
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    if modules - places:
        raise UserError(f"--adapter {adapter}: {base} has no place for {min(modules - places)}")
    lora.save_pretrained(out)
    save(tensors, f"{out}/adapter_model.safetensors")


# ------------------------------------------------------------------------------------------------------------
# Merging: W + scaling * B A, one tensor of the base after the other


def merge(adapter: str, base: str, out: str) -> None:
    """The base's files with the adapter in its weights. Raises UserError if a tensor finds no place."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open

    pairs, scaling = lora_pairs(adapter)
    files, sizes = weight_files(base), {}
    for name, path in files.items():
        with safe_open(path, "pt") as f:
            sizes[name] = f.get_tensor(name).nbytes
    shards = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    for file, names in shards.filename_to_tensors.items():
        weights = {}
        for name in names:
            with safe_open(files[name], "pt") as f:
                weights[name] = f.get_tensor(name)
            lora = pairs.pop(in_layout(name, "model"), None)
            if lora:
                w, delta = weights[name], scaling * lora["lora_B"].float() @ lora["lora_A"].float()
                weights[name] = (w.float() + delta).to(w.dtype)
        save(weights, f"{out}/{file}")
    if pairs:
        raise UserError(f"--adapter {adapter}: {base} has no weights for {len(pairs)} of it: {min(pairs)}")
    if shards.is_sharded:
        index = dict(metadata=shards.metadata, weight_map=shards.tensor_to_filename)
        data.write_text(f"{out}/model.safetensors.index.json", json.dumps(index, indent=1))
    for name in os.listdir(base):  # tokenizer, processor, the talker's voices
        if os.path.isfile(os.path.join(base, name)) and not name.endswith(WEIGHTS):
            shutil.copy(os.path.join(base, name), out)
    if any(name.startswith("talker.") for name in files) and not os.path.exists(f"{out}/spk_dict.pt"):
        print("note: the base lies here without spk_dict.pt, the talker's voices; the whole class needs it")


def weight_files(base: str) -> dict[str, str]:
    """The name of every tensor of a checkpoint, and the file that holds it."""
    from safetensors import safe_open

    index = os.path.join(base, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            files = json.load(f)["weight_map"]
        return {name: os.path.join(base, file) for name, file in files.items()}
    path = os.path.join(base, "model.safetensors")
    with safe_open(path, "pt") as f:
        return dict.fromkeys(f.keys(), path)


def lora_pairs(adapter: str) -> tuple[dict[str, dict], float]:
    """-> {"model.layers.0.mlp.up_proj.weight": {"lora_A": (r, in), "lora_B": (out, r)}}, their scaling"""
    config, tensors = read_adapter(adapter, "model")
    pairs = {}
    for name, x in tensors.items():
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        pairs.setdefault(f"{module}.weight", {})[f"lora_{rest.removesuffix('.weight')}"] = x
    plain = all(pair.keys() == {"lora_A", "lora_B"} for pair in pairs.values())
    if not plain or config.rank_pattern or config.alpha_pattern:
        raise UserError(f"--adapter {adapter}: --for merged takes LoRA of one rank, and nothing beside it")
    return pairs, config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def save(tensors: dict, path: str) -> None:
    import safetensors.torch

    tensors = {name: x.contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------
# The Hub


def push(folder: str, repo: str) -> None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with blame(f"--push_to_hub {repo}"):
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    print(f"{api.endpoint}/{repo}")


# ------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None) -> int:
    parser = data.Parser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="runs/NAME/adapter, or one of another program")
    parser.add_argument("--for", dest="door", required=True, choices=DOORS, help="who shall load it")
    parser.add_knobs(Options)

    def command():
        given = vars(parser.parse_args(argv))
        export(given.pop("adapter"), given.pop("door"), Options(**given))

    return data.exit_code(command)


if __name__ == "__main__":
    data.leave(main())
