"""Tiny repositories laid out like well-known ones on the Hugging Face Hub, for `tests.hub.server` to serve.

    python -m tests.hub.repositories ROOT [NAME...]     # all when no name is given

Names of files, weights and special tokens, forms of configurations and the behaviour of chat templates are those of the
real repositories. Weights are random, texts are our own (`tests.hub.text`), sizes are as small as the layout allows.
"""

import argparse
import itertools
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors

from tests.hub import text
from tests.hub.server import GATE
from tests.hub.vocabularies import (
    CONTROL,
    GPT2_SPLIT,
    LLAMA3_SPLIT,
    LLAMA_HEAD,
    QWEN_SPLIT,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    added_tokens,
    byte_level_json,
    sentencepiece_json,
    sentencepiece_model,
    starting_with,
)

GATED_TOKEN = "hf_granted"
"""Opens the gated repositories."""

Builder = Callable[[Path], None]
State = dict[str, torch.Tensor]
BUILDERS: dict[str, Builder] = {}
"""By the path below the root: models/OWNER/NAME or datasets/OWNER/NAME."""

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096,
    "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": True,
}  # fmt: skip


def build(root: Path, *names: str) -> None:
    """Build repositories below `root`, all when no name is given; what is there is replaced."""
    unknown = set(names) - {path.partition("/")[2] for path in BUILDERS}
    if unknown:
        raise ValueError(f"no such repositories: {', '.join(sorted(unknown))}; there are {', '.join(BUILDERS)}")
    for path, builder in BUILDERS.items():
        if not names or path.partition("/")[2] in names:
            build_one(root / path, builder)


def build_one(folder: Path, builder: Builder) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    builder(folder)


def repository(*paths: str) -> Callable[[Builder], Builder]:
    """Register the builder of these repositories."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(paths, builder))
        return builder

    return register


# ----------------------------------------------------------------------------- files


def write(folder: Path, name: str, content: Any) -> None:
    """Write a text, or anything else as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, metadata: str) -> None:
    """README.md with metadata (YAML), and the .gitattributes that every repository has."""
    write(folder, "README.md", f"---\n{metadata}\n---\n\n# A stand-in of a test: this layout with other content\n")
    write(folder, ".gitattributes", "*.bin filter=lfs diff=lfs merge=lfs -text\n")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, template: str = "", **settings: Any) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json; `template` names a file in templates/."""
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = {"chat_template": read_template(template)} if template else {}
    about = {"added_tokens_decoder": added_tokens(tokenizer), "clean_up_tokenization_spaces": False}
    write(folder, "tokenizer_config.json", about | settings | chat)
    named = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
    write(folder, "special_tokens_map.json", {key: settings[key] for key in named if settings.get(key)})


def read_template(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


def write_sentencepiece(folder: Path, model: ModelProto) -> None:
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def padded(size: int, multiple: int = 64) -> int:
    """A vocabulary's size as models have it: more rows than tokens."""
    return math.ceil((size + 1) / multiple) * multiple


# ----------------------------------------------------------------------------- weights


def random_weights(folder: Path) -> State:
    """The weights of a model with the folder's config.json, in its data type; a tied head is left out, as in files."""
    import transformers  # slow to import, and the repositories of the default tests do without it

    config = transformers.AutoConfig.from_pretrained(folder)
    dtype, tied = config.dtype, config.get_text_config().tie_word_embeddings
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return {
        name: value.to(dtype).contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def save_safetensors(state: State, path: Path) -> None:
    save_file(state, path, metadata={"format": "pt"})


def save_weights(folder: Path, state: State, *, pickled: bool = False, shards: int = 1) -> None:
    """Weights in one file, or in shards with an index; pickled as torch did before safetensors."""
    stem, suffix, save = ("pytorch_model", "bin", torch.save) if pickled else ("model", "safetensors", save_safetensors)
    if shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return
    names, files = list(state), {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        files |= dict.fromkeys(part, f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}")
    for file, part in itertools.groupby(names, files.get):
        save({name: state[name] for name in part}, folder / file)
    total = sum(value.numel() * value.element_size() for value in state.values())
    write(folder, f"{stem}.{suffix}.index.json", {"metadata": {"total_size": total}, "weight_map": files})


# ----------------------------------------------------------------------------- LLaMA with SentencePiece


@repository("models/openlm-research/open_llama_3b_v2", "models/openlm-research/open_llama_7b_v2")
def open_llama(folder: Path) -> None:
    """Pickled float16 weights with rotary buffers, a tokenizer.model of 32,000 pieces and no tokenizer.json."""
    is_3b = "3b" in folder.name
    sizes = {"hidden_size": 200, "num_attention_heads": 2} if is_3b else {"num_hidden_layers": 3}
    config = LLAMA | SIZES | sizes | {"max_position_embeddings": 2048, "pad_token_id": 0, "torch_dtype": "float16"}
    config |= {"rms_norm_eps": 1e-06, "transformers_version": "4.30.0.dev0", "vocab_size": 32000}
    for newer in ("attention_bias", "attention_dropout", "num_key_value_heads", "pretraining_tp", "rope_scaling"):
        del config[newer]
    write_card(folder, "license: apache-2.0\ndatasets:\n- tiiuae/falcon-refinedweb\nlibrary_name: transformers")
    write(folder, "config.json", config)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write(folder, "generation_config.json", {"_from_model_config": True, **ids, "transformers_version": "4.30.0.dev0"})
    write_old_tokenizer(folder)
    state = open_llama_weights(config)
    save_weights(folder, state, pickled=True, shards=1 if is_3b else 2)
    if is_3b:  # an open pull request of SFconvertbot, from which transformers may download in the background
        offered = folder.with_name(f"{folder.name}@pr")
        shutil.copytree(folder, offered, dirs_exist_ok=True)
        save_weights(offered, {name: value for name, value in state.items() if "rotary" not in name})


def write_old_tokenizer(folder: Path) -> None:
    """The tokenizer's files as transformers 4.30 left them for LLaMA."""
    write_sentencepiece(folder, sentencepiece_model(size=32000))
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        name: {"content": token} | flags
        for name, token in {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}.items()
    }
    write(folder, "special_tokens_map.json", special)
    settings = {"add_bos_token": True, "add_eos_token": False, "model_max_length": 2048, "pad_token": None}
    settings |= {"sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False}
    typed = {name: {"__type": "AddedToken"} | token for name, token in special.items()}
    write(folder, "tokenizer_config.json", settings | typed)


def open_llama_weights(config: dict[str, Any]) -> State:
    """Random weights of a LLaMA without grouped heads; written out, because transformers is slow to import."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    rng = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=rng) * config["initializer_range"]).to(torch.float16)

    half_head = torch.arange(0, hidden // config["num_attention_heads"], 2) / (hidden // config["num_attention_heads"])
    ones = torch.ones(hidden, dtype=torch.float16)
    state = {"model.embed_tokens.weight": matrix(vocabulary, hidden)}
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        state |= {f"{layer}.self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"}
        state |= {f"{layer}.mlp.{name}_proj.weight": matrix(inner, hidden) for name in ("gate", "up")}
        state[f"{layer}.mlp.down_proj.weight"] = matrix(hidden, inner)
        state |= {f"{layer}.{name}_layernorm.weight": ones.clone() for name in ("input", "post_attention")}
        state[f"{layer}.self_attn.rotary_emb.inv_freq"] = 10000.0**-half_head  # saved until transformers 4.31
    return state | {"model.norm.weight": ones.clone(), "lm_head.weight": matrix(vocabulary, hidden)}


@repository("models/meta-llama/Llama-2-7b-chat-hf")
def llama_2(folder: Path) -> None:
    """Gated; both forms of the tokenizer and of the weights."""
    model = sentencepiece_model()
    write_card(folder, "license: llama2\npipeline_tag: text-generation\ntags:\n- facebook\n- llama-2")
    write(folder, GATE, GATED_TOKEN)
    write(folder, "config.json", LLAMA | SIZES | {"torch_dtype": "float16", "vocab_size": len(model.pieces)})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": True, "max_length": 4096}
    generation |= {"temperature": 0.6, "top_p": 0.9}
    write(folder, "generation_config.json", generation)
    write_llama_tokenizer(folder, model, "llama-2", pad_token=None)
    state = random_weights(folder)
    save_weights(folder, state, shards=2)
    save_weights(folder, state, shards=2, pickled=True)


def write_llama_tokenizer(folder: Path, model: ModelProto, template: str = "", **settings: Any) -> None:
    """tokenizer.model with the tokenizer.json that was made from it."""
    write_sentencepiece(folder, model)
    usual = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "model_max_length": 2048}
    usual |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    usual |= {"sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False}
    write_tokenizer(folder, sentencepiece_json(model), template, **usual | settings)


@repository("models/TinyLlama/TinyLlama-1.1B-Chat-v1.0")
def tiny_llama(folder: Path) -> None:
    """Zephyr's template: a turn ends with EOS and a line break."""
    model = sentencepiece_model()
    write_card(folder, "license: apache-2.0\nlanguage:\n- en\ndatasets:\n- HuggingFaceH4/ultrachat_200k")
    write(folder, "config.json", LLAMA | SIZES | {"max_position_embeddings": 2048, "vocab_size": len(model.pieces)})
    generation = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 2048, "pad_token_id": 0}
    write(folder, "generation_config.json", generation)
    write_llama_tokenizer(folder, model, "tinyllama", pad_token="</s>")
    save_weights(folder, random_weights(folder))


@repository("models/mistralai/Mistral-7B-Instruct-v0.3")
def mistral(folder: Path) -> None:
    """Control tokens [INST] behind </s>, strict roles, and the weights a second time in Mistral's own form."""
    tools = [f"{start}{name}]" for name in ("AVAILABLE_TOOLS", "TOOL_RESULTS") for start in ("[", "[/")]
    controls = ["[INST]", "[/INST]", "[TOOL_CALLS]", *tools, *(f"[control_{number}]" for number in range(8, 40))]
    model = sentencepiece_model(LLAMA_HEAD | dict.fromkeys(controls, CONTROL))
    write_card(folder, "license: apache-2.0\nbase_model: mistralai/Mistral-7B-v0.3\nextra_gated_description: none")
    config = LLAMA | SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1000000.0}
    config |= {"max_position_embeddings": 32768, "sliding_window": None, "vocab_size": len(model.pieces)}
    for foreign in ("attention_bias", "pretraining_tp", "rope_scaling"):
        del config[foreign]
    write(folder, "config.json", config)
    write(folder, "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})
    write_llama_tokenizer(folder, model, "mistral-v0.3", model_max_length=10**30, pad_token=None)
    (folder / "tokenizer.model.v3").write_bytes(model.SerializeToString())
    write(folder, "params.json", {"dim": 128, "n_layers": 2, "head_dim": 32, "n_heads": 4, "n_kv_heads": 2})
    state = random_weights(folder)
    save_weights(folder, state)
    save_safetensors(
        {name.removeprefix("model."): value for name, value in state.items()}, folder / "consolidated.safetensors"
    )


@repository("models/microsoft/Phi-3-mini-4k-instruct")
def phi_3(folder: Path) -> None:
    """Fused projections, code beside a model type that transformers knows, special tokens that swallow blanks."""
    model = sentencepiece_model()
    first = len(model.pieces)
    names = ["endoftext", "assistant", *(f"placeholder{n}" for n in range(1, 5)), "system", "end", "placeholder5"]
    tokens = [f"<|{name}|>" for name in [*names, "placeholder6", "user"]]
    write_card(folder, "license: mit\nlanguage:\n- en\npipeline_tag: text-generation\ntags:\n- nlp\n- code")
    config = LLAMA | SIZES | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_key_value_heads": 4}
    config |= {"eos_token_id": first, "pad_token_id": first, "original_max_position_embeddings": 4096}
    config |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_theta": 10000.0, "sliding_window": 2047}
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    write(folder, "config.json", config | {"auto_map": code, "vocab_size": padded(first + len(tokens))})
    for file in ("configuration_phi3.py", "modeling_phi3.py"):
        write(folder, file, 'raise RuntimeError("nobody should run this: transformers has its own Phi-3")\n')
    ends = [first + tokens.index(token) for token in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    write(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": ends, "pad_token_id": first})
    tokenizer = sentencepiece_json(model)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, rstrip=token != "<|endoftext|>", special=True) for token in tokens]
    )
    write_sentencepiece(folder, model)
    write(folder, "added_tokens.json", {token: first + index for index, token in enumerate(tokens)})
    write_tokenizer(
        folder, tokenizer, "phi-3", add_bos_token=False, add_eos_token=False, bos_token="<s>", unk_token="<unk>",
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", legacy=False, model_max_length=4096, padding_side="left",
        sp_model_kwargs={}, tokenizer_class="LlamaTokenizer", use_default_system_prompt=False,
    )  # fmt: skip
    save_weights(folder, random_weights(folder), shards=2)


# ----------------------------------------------------------------------------- Llama 3.2


@repository("models/meta-llama/Llama-3.2-1B-Instruct", "models/unsloth/Llama-3.2-1B-Instruct")
def llama_3(folder: Path) -> None:
    """256 special tokens, a template with today's date, three EOS ids, tied embeddings; Meta's is gated."""
    is_copy = folder.parent.name == "unsloth"
    tokenizer = llama_3_tokenizer()
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    ends = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    pad = {"pad_token_id": tokenizer.token_to_id("<|finetune_right_pad_id|>")} if is_copy else {}
    write_card(folder, "license: llama3.2\nlibrary_name: transformers\npipeline_tag: text-generation")
    rope = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    config = LLAMA | SIZES | pad | {"bos_token_id": begin, "eos_token_id": ends, "max_position_embeddings": 131072}
    config |= {"head_dim": 32, "mlp_bias": False, "rope_scaling": rope | {"original_max_position_embeddings": 8192}}
    config |= {"rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": tokenizer.get_vocab_size()}
    write(folder, "config.json", config)
    generation = {"bos_token_id": begin, "eos_token_id": ends, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    write(folder, "generation_config.json", generation | pad)
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}
    if is_copy:
        names |= {"pad_token": "<|finetune_right_pad_id|>", "padding_side": "left", "unk_token": None}
    inputs = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_tokenizer(folder, tokenizer, "llama-3.2", **names | inputs | kind)
    save_weights(folder, random_weights(folder))
    if not is_copy:
        write(folder, GATE, GATED_TOKEN)
        write(folder, "original/params.json", {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2})
        torch.save({"tok_embeddings.weight": torch.zeros(1)}, folder / "original" / "consolidated.00.pth")


def llama_3_tokenizer() -> Tokenizer:
    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    named += [
        "finetune_right_pad_id",
        "reserved_special_token_2",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
    ]
    named += ["python_tag", *(f"reserved_special_token_{number}" for number in range(3, 248))]
    tokenizer = byte_level_json(LLAMA3_SPLIT, special=[f"<|{name}|>" for name in named])
    begin = starting_with("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


@repository("models/unsloth/Llama-3.2-1B-Instruct-bnb-4bit")
def llama_3_quantized(folder: Path) -> None:
    """Stored in bitsandbytes' nf4, as its config.json says."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4"}
    nf4 |= {"bnb_4bit_use_double_quant": True, "load_in_4bit": True, "load_in_8bit": False}
    with tempfile.TemporaryDirectory() as temporary:
        full = Path(temporary) / "unsloth" / "Llama-3.2-1B-Instruct"
        build_one(full, llama_3)
        model = AutoModelForCausalLM.from_pretrained(full, quantization_config=BitsAndBytesConfig(**nf4))
        (full / "model.safetensors").unlink()
        shutil.copytree(full, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    model.save_pretrained(folder)
    nf4 |= {"_load_in_4bit": True, "_load_in_8bit": False, "quant_method": "bitsandbytes", "llm_int8_threshold": 6.0}
    nf4 |= {"llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None}
    write(folder, "config.json", config | {"quantization_config": nf4, "unsloth_fixed": True})


# ----------------------------------------------------------------------------- ChatML


QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"]
QWEN_ORDINARY = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|repo_name|>"]


@repository("models/Qwen/Qwen2.5-0.5B-Instruct")
def qwen_2(folder: Path) -> None:
    """ChatML with a default system prompt, no BOS, added tokens that are not special, a vocabulary with spare rows."""
    write_qwen(folder, QWEN_ORDINARY, "qwen-2.5", {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 21, "sliding_window": 32768,
        "use_sliding_window": False, "attention_dropout": 0.0,
    })  # fmt: skip


@repository("models/Qwen/Qwen3-0.6B")
def qwen_3(folder: Path) -> None:
    """Norms of queries and keys; a template that drops the thoughts of earlier turns."""
    thoughts = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    write_qwen(folder, QWEN_ORDINARY + thoughts, "qwen-3", {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64, "attention_bias": False,
        "max_window_layers": 28, "sliding_window": None, "use_sliding_window": False,
    })  # fmt: skip


def write_qwen(folder: Path, ordinary: Iterable[str], template: str, own: dict[str, Any]) -> None:
    """A Qwen of either generation; `own` are its settings in config.json."""
    tokenizer = byte_level_json(QWEN_SPLIT, special=QWEN_SPECIAL, ordinary=list(ordinary))
    tokenizer.normalizer = normalizers.NFC()
    end_of_text, end = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    write_card(
        folder, "license: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\nlibrary_name: transformers"
    )
    config = SIZES | own | {"bos_token_id": end_of_text, "eos_token_id": end, "hidden_act": "silu"}
    config |= {"initializer_range": 0.02, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06}
    config |= {"rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True}
    spare = len(QWEN_SPECIAL) + 60  # the real ones have some 270 rows more than tokens
    write(folder, "config.json", config | {"vocab_size": padded(tokenizer.get_vocab_size() + spare)})
    generation = {"bos_token_id": end_of_text, "pad_token_id": end_of_text, "eos_token_id": [end, end_of_text]}
    generation |= {"do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20, "top_p": 0.8}
    write(folder, "generation_config.json", generation)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    write_tokenizer(
        folder, tokenizer, template, add_bos_token=False, add_prefix_space=False, bos_token=None, unk_token=None,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=QWEN_SPECIAL[1:], errors="replace",
        model_max_length=131072, split_special_tokens=False, tokenizer_class="Qwen2Tokenizer",
    )  # fmt: skip
    save_weights(folder, random_weights(folder))


@repository("models/HuggingFaceTB/SmolLM2-135M-Instruct")
def smollm(folder: Path) -> None:
    """A LLaMA with GPT-2's tokenizer; ChatML; special tokens at the start of the vocabulary; an ONNX export."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>", "<filename>", "<gh_stars>"]
    tokenizer = byte_level_json(GPT2_SPLIT, first=special)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    write_card(folder, "license: apache-2.0\nlanguage:\n- en\nlibrary_name: transformers")
    config = LLAMA | SIZES | {"pad_token_id": 2, "rope_theta": 100000, "tie_word_embeddings": True}
    config |= {"is_llama_config": True, "max_position_embeddings": 8192, "vocab_size": tokenizer.get_vocab_size()}
    write(folder, "config.json", config)
    write(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    tokenizer.model.save(str(folder))
    write_tokenizer(
        folder, tokenizer, "smollm-2", add_prefix_space=False, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=8192, tokenizer_class="GPT2Tokenizer", vocab_size=tokenizer.get_vocab_size(),
    )  # fmt: skip
    save_weights(folder, random_weights(folder))
    write(folder, "onnx/model.onnx", "not a model\n")


# ----------------------------------------------------------------------------- Gemma


GEMMA = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "pad_token_id": 0, "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "use_cache": True,
}  # fmt: skip


def gemma_vocabulary(generation: int) -> ModelProto:
    """Special tokens at the ids that the real ones have, line breaks and blanks as added tokens, no dummy prefix."""
    head = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN, "<mask>": USER_DEFINED}
    head |= dict.fromkeys(["<2mass>", "[@BOS@]"] if generation == 2 else ["[multimodal]"], USER_DEFINED)
    images = [] if generation == 2 else ["<start_of_image>", "<end_of_image>"]
    start_of_turn = 106 if generation == 2 else 105
    unused = start_of_turn - len(head) - len(images)
    head |= dict.fromkeys((f"<unused{number}>" for number in range(unused)), USER_DEFINED)
    head |= dict.fromkeys([*images, "<start_of_turn>", "<end_of_turn>"], CONTROL)
    runs = [character * count for character in ("\n", SPACE) for count in range(1, 5)]
    head |= dict.fromkeys([run for run in [*runs, "<table>", "</table>"] if run != SPACE], USER_DEFINED)
    return sentencepiece_model(head, ids={"pad": 0, "eos": 1, "bos": 2, "unk": 3}, dummy_prefix=False)


def write_gemma_tokenizer(folder: Path, model: ModelProto, template: str, *appended: str, **more: Any) -> None:
    """Both forms of the tokenizer; `appended` special tokens follow the vocabulary."""
    tokenizer = sentencepiece_json(model, bos="<bos>")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in appended])
    write_sentencepiece(folder, model)
    write_tokenizer(
        folder, tokenizer, template, add_bos_token=True, add_eos_token=False, bos_token="<bos>", eos_token="<eos>",
        pad_token="<pad>", unk_token="<unk>", model_max_length=10**30, sp_model_kwargs={},
        spaces_between_special_tokens=False, tokenizer_class="GemmaTokenizer", use_default_system_prompt=False, **more,
    )  # fmt: skip


@repository("models/google/gemma-2-2b-it")
def gemma_2(folder: Path) -> None:
    """Soft-capped logits, alternating windows, no system role, two EOS ids."""
    model = gemma_vocabulary(2)
    write_card(folder, "license: gemma\nlibrary_name: transformers\npipeline_tag: text-generation")
    config = SIZES | GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "eos_token_id": [1, 107]}
    config |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"}
    config |= {"sliding_window": 4096, "torch_dtype": "bfloat16", "vocab_size": len(model.pieces)}
    write(folder, "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    write(folder, "generation_config.json", generation | {"cache_implementation": "hybrid"})
    turns = ["<start_of_turn>", "<end_of_turn>"]
    write_gemma_tokenizer(folder, model, "gemma-2", additional_special_tokens=turns)
    save_weights(folder, random_weights(folder), shards=2)


GEMMA_3 = GEMMA | {
    "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 2,
}  # fmt: skip
GEMMA_3_GENERATION = {
    "cache_implementation": "hybrid",
    "do_sample": True,
    "eos_token_id": [1, 106],
    "top_k": 64,
    "top_p": 0.95,
}
IMAGE = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


@repository("models/google/gemma-3-1b-it")
def gemma_3_text(folder: Path) -> None:
    """Text only; the tokenizer has one token more than the embeddings have rows."""
    model = gemma_vocabulary(3)
    write_card(folder, "license: gemma\nlibrary_name: transformers\npipeline_tag: text-generation")
    config = SIZES | GEMMA_3 | {"architectures": ["Gemma3ForCausalLM"], "eos_token_id": [1, 106]}
    write(folder, "config.json", config | {"torch_dtype": "bfloat16", "vocab_size": len(model.pieces)})
    write(folder, "generation_config.json", GEMMA_3_GENERATION)
    write(folder, "added_tokens.json", {"<image_soft_token>": len(model.pieces)})
    write_gemma_tokenizer(folder, model, "gemma-3", "<image_soft_token>", **IMAGE)
    save_weights(folder, random_weights(folder))


@repository("models/google/gemma-3-4b-it")
def gemma_3_vision(folder: Path) -> None:
    """A language model beside a SigLIP vision tower, in the names of transformers 4.50."""
    model = gemma_vocabulary(3)
    image = len(model.pieces)
    write_card(folder, "license: gemma\nlibrary_name: transformers\npipeline_tag: image-text-to-text")
    language = {**SIZES, **GEMMA_3, "vocab_size": padded(image), "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    vision = {"hidden_size": 64, "image_size": 56, "intermediate_size": 128, "model_type": "siglip_vision_model"}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14, "vision_use_head": False}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    config |= {"boi_token_index": 103, "eoi_token_index": 104, "image_token_index": image, "mm_tokens_per_image": 4}
    config |= {"initializer_range": 0.02, "torch_dtype": "bfloat16", "text_config": language, "vision_config": vision}
    write(folder, "config.json", config)
    write(folder, "generation_config.json", GEMMA_3_GENERATION)
    write(folder, "added_tokens.json", {"<image_soft_token>": image})
    write_gemma_tokenizer(folder, model, "gemma-3", "<image_soft_token>", processor_class="Gemma3Processor", **IMAGE)
    write(folder, "chat_template.json", {"chat_template": read_template("gemma-3")})
    write(folder, "processor_config.json", {"image_seq_length": 4, "processor_class": "Gemma3Processor"})
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255}
    pixels |= {"do_normalize": True, "do_rescale": True, "do_resize": True, "size": {"height": 56, "width": 56}}
    processor = {"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}
    write(folder, "preprocessor_config.json", pixels | processor | {"image_seq_length": 4})
    save_weights(folder, {old_gemma_3_name(name): value for name, value in random_weights(folder).items()}, shards=2)


def old_gemma_3_name(name: str) -> str:
    """The name in the real files of what transformers 5 calls `name`."""
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


# ----------------------------------------------------------------------------- GPT-NeoX


@repository("models/EleutherAI/pythia-70m")
def pythia(folder: Path) -> None:
    """Fused query_key_value, both forms of the weights with old buffers, no chat template."""
    tokenizer = byte_level_json(
        GPT2_SPLIT, first=["<|endoftext|>", "<|padding|>"], ordinary=[" " * n for n in range(8, 1, -1)]
    )
    tokenizer.normalizer = normalizers.NFC()
    write_card(folder, "license: apache-2.0\nlanguage:\n- en\ntags:\n- pytorch\n- causal-lm\n- pythia")
    config = {key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}
    config |= {"architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu"}
    config |= {"initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 512, "rotary_pct": 0.25}
    config |= {"model_type": "gpt_neox", "rotary_emb_base": 10000, "tie_word_embeddings": False, "use_cache": True}
    config |= {"torch_dtype": "float16", "use_parallel_residual": True}
    write(folder, "config.json", config | {"vocab_size": padded(tokenizer.get_vocab_size(), 128)})
    write_tokenizer(
        folder, tokenizer, add_prefix_space=False, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
        unk_token="<|endoftext|>", name_or_path="EleutherAI/gpt-neox-20b", tokenizer_class="GPTNeoXTokenizer",
    )  # fmt: skip
    state = random_weights(folder)
    for layer in range(SIZES["num_hidden_layers"]):
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        state[f"{attention}.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    save_weights(folder, state)
    save_weights(folder, state, pickled=True)


# ----------------------------------------------------------------------------- what cannot be used as it is


@repository("models/tests/no-tokenizer")
def no_tokenizer(folder: Path) -> None:
    """A LLaMA without any file of a tokenizer."""
    write_card(folder, "license: apache-2.0")
    write(folder, "config.json", LLAMA | SIZES | {"vocab_size": 32000})
    save_weights(folder, random_weights(folder))


@repository("models/tests/no-vocabulary")
def no_vocabulary(folder: Path) -> None:
    """A LLaMA with settings of a tokenizer and no vocabulary: transformers makes one of 3 tokens, silently."""
    no_tokenizer(folder)
    write_old_tokenizer(folder)
    (folder / "tokenizer.model").unlink()


@repository("models/tests/no-weights")
def no_weights(folder: Path) -> None:
    """A configuration and a tokenizer only."""
    model = sentencepiece_model()
    write_card(folder, "license: apache-2.0")
    write(folder, "config.json", LLAMA | SIZES | {"vocab_size": len(model.pieces)})
    write_llama_tokenizer(folder, model, "tinyllama")


@repository("models/tests/adapter-only")
def adapter_only(folder: Path) -> None:
    """What PEFT saves: an adapter of OpenLLaMA 7B."""
    write_card(folder, "base_model: openlm-research/open_llama_7b_v2\nlibrary_name: peft")
    config = {"base_model_name_or_path": "openlm-research/open_llama_7b_v2", "bias": "none", "inference_mode": True}
    config |= {
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    write(folder, "adapter_config.json", config | {"task_type": "CAUSAL_LM"})
    state = {}
    for layer, module in itertools.product(range(3), "qv"):
        name = f"base_model.model.model.layers.{layer}.self_attn.{module}_proj"
        state[f"{name}.lora_A.weight"] = torch.full((8, 128), 0.01)
        state[f"{name}.lora_B.weight"] = torch.zeros(128, 8)
    save_safetensors(state, folder / "adapter_model.safetensors")


@repository("models/tests/gguf-only")
def gguf_only(folder: Path) -> None:
    """Files of llama.cpp only."""
    write_card(folder, "base_model: TinyLlama/TinyLlama-1.1B-Chat-v1.0\nquantized_by: nobody")
    for bits in ("Q4_K_M", "Q8_0"):
        header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)  # version 3, no tensors, no metadata
        (folder / f"tinyllama-1.1b-chat-v1.0.{bits}.gguf").write_bytes(header)


CUSTOM_CONFIGURATION = '''"""A model type of its own."""

from transformers import LlamaConfig


class CustomConfig(LlamaConfig):
    model_type = "custom_llama"
'''
CUSTOM_MODEL = '''"""LLaMA under another name."""

from transformers import LlamaForCausalLM

from .configuration_custom import CustomConfig


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
'''


@repository("models/tests/custom-code")
def custom_code(folder: Path) -> None:
    """A model type that transformers lacks, with its code: loads with `trust_remote_code` only."""
    tiny_llama(folder)
    code = {
        "AutoConfig": "configuration_custom.CustomConfig",
        "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
    }
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["CustomForCausalLM"], "auto_map": code, "model_type": "custom_llama"}
    write(folder, "config.json", config)
    write(folder, "configuration_custom.py", CUSTOM_CONFIGURATION)
    write(folder, "modeling_custom.py", CUSTOM_MODEL)


@repository("models/tests/gptq")
def gptq(folder: Path) -> None:
    """Weights in GPTQ's 4 bits, which the suite does not train."""
    tiny_llama(folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"bits": 4, "desc_act": False, "group_size": 128, "quant_method": "gptq", "sym": True}
    write(folder, "config.json", config | {"quantization_config": quantization})
    state = {}
    for name, value in random_weights(folder).items():
        if name.endswith("_proj.weight"):
            state |= gptq_parts(name.removesuffix(".weight"), *value.shape)
        else:
            state[name] = value
    save_weights(folder, state)


def gptq_parts(module: str, rows: int, columns: int) -> State:
    """The four tensors that GPTQ stores for a matrix: 8 weights in an int32, groups of 128 columns."""
    groups = columns // 128
    return {
        f"{module}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{module}.qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
        f"{module}.scales": torch.ones(groups, rows, dtype=torch.float16),
        f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // 128,
    }


@repository("models/tests/named-templates")
def named_templates(folder: Path) -> None:
    """Several chat templates, by name."""
    tiny_llama(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = {"default": "tinyllama", "tool_use": "tool-use"}
    named = [{"name": name, "template": read_template(file)} for name, file in names.items()]
    write(folder, "tokenizer_config.json", settings | {"chat_template": named})


# ----------------------------------------------------------------------------- data sets


@repository("datasets/vicgalle/alpaca-gpt4")
def alpaca(folder: Path) -> None:
    """One Parquet file with the columns instruction, input, output and text."""
    table = pyarrow.Table.from_pylist([row | {"text": text.prompt(row)} for row in text.rows(400)])
    file = folder / "data" / "train-00000-of-00001-6ef3991c06080e14.parquet"
    file.parent.mkdir()
    pyarrow.parquet.write_table(table, file)
    features = "".join(f"  - name: {column}\n    dtype: string\n" for column in table.column_names)
    split = f"  - name: train\n    num_bytes: {table.nbytes}\n    num_examples: {table.num_rows}\n"
    sizes = f"  download_size: {file.stat().st_size}\n  dataset_size: {table.nbytes}\n"
    about = "task_categories:\n- text-generation\nlanguage:\n- en\nlicense: cc-by-nc-4.0\ntags:\n- gpt4\n- alpaca"
    write_card(folder, f"dataset_info:\n  features:\n{features}  splits:\n{split}{sizes}{about}")


def write_split(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """A split as one Parquet file of a configuration's folder."""
    file = folder / f"{name}-00000-of-00001.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


def asked(row: text.Row) -> str:
    return f"{row['instruction']}\n{row['input']}".strip()


def messages(rows: list[text.Row]) -> list[dict[str, Any]]:
    """Some rows as a conversation."""
    turns = [[{"content": asked(row), "role": "user"}, {"content": row["output"], "role": "assistant"}] for row in rows]
    return list(itertools.chain(*turns))


def configurations(**files: dict[str, str]) -> str:
    """The part of a card that lists configurations: by name, the files of each split."""
    lines = ["configs:"]
    for name, splits in files.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {path}" for split, path in splits.items()]
    return "\n".join(lines)


@repository("datasets/databricks/databricks-dolly-15k")
def dolly(folder: Path) -> None:
    """One file of JSON lines with instruction, context, response and category."""
    rows = [
        {"instruction": r["instruction"], "context": r["input"], "response": r["output"], "category": f"kind {n % 8}"}
        for n, r in enumerate(text.rows(300))
    ]
    write(folder, "databricks-dolly-15k.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_card(folder, "license: cc-by-sa-3.0\ntask_categories:\n- question-answering")


@repository("datasets/Open-Orca/SlimOrca")
def slim_orca(folder: Path) -> None:
    """One file of JSON lines; conversations of from, value and weight, with a system prompt."""
    rows = [
        {
            "conversations": [
                {"from": "system", "value": "You are an AI assistant.", "weight": None},
                {"from": "human", "value": asked(row), "weight": 0.0},
                {"from": "gpt", "value": row["output"], "weight": 1.0},
            ]
        }
        for row in text.rows(300)
    ]
    write(folder, "oo-labeled_correct.gpt4.sharegpt.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_card(folder, "license: mit")


@repository("datasets/HuggingFaceH4/ultrachat_200k")
def ultrachat(folder: Path) -> None:
    """Parquet in four splits, none of them called train; prompt, prompt_id and messages of several turns."""
    splits = ("train_sft", "test_sft", "train_gen", "test_gen")
    for number, split in enumerate(splits):
        parts = [text.rows(count, seed=seed) for seed, count in enumerate([1, 2, 3] * 40)]
        rows = [
            {"prompt": asked(part[0]), "prompt_id": f"{n}", "messages": messages(part)} for n, part in enumerate(parts)
        ]
        write_split(folder / "data", split, rows[: 120 - number])
    files = {split: f"data/{split}-*" for split in splits}
    write_card(folder, f"license: mit\n{configurations(default=files)}")


@repository("datasets/HuggingFaceTB/smoltalk")
def smoltalk(folder: Path) -> None:
    """Parquet in several configurations; messages and source."""
    names = ("all", "smol-magpie-ultra", "everyday-conversations")
    for name in names:
        rows = [{"messages": messages(text.rows(2, seed=seed)), "source": name} for seed in range(100)]
        for split in ("train", "test"):
            write_split(folder / "data" / name, split, rows if split == "train" else rows[:10])
    files = {name: {split: f"data/{name}/{split}-*" for split in ("train", "test")} for name in names}
    write_card(folder, f"language:\n- en\n{configurations(**files)}")


@repository("datasets/openai/gsm8k")
def gsm8k(folder: Path) -> None:
    """Parquet in two configurations; question and answer."""
    for name in ("main", "socratic"):
        rows = [{"question": asked(row), "answer": f"{row['output']}\n#### {name}"} for row in text.rows(200)]
        for split in ("train", "test"):
            write_split(folder / name, split, rows if split == "train" else rows[:20])
    files = {name: {split: f"{name}/{split}-*" for split in ("train", "test")} for name in ("main", "socratic")}
    write_card(folder, f"license: mit\n{configurations(**files)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    options = parser.parse_args()
    build(options.root, *options.names)


if __name__ == "__main__":
    main()
