"""What the benchmarks run on, made here and now: documentation rows and LLaMA models with random weights."""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from utils import SUITE_FOLDER

TOKENIZER = SUITE_FOLDER / "quickstart" / "model"
SHAPES = {  # hidden size, layers, intermediate size, heads
    "7M": dict(hidden_size=256, num_hidden_layers=8, intermediate_size=704, num_attention_heads=4),
    "80M": dict(hidden_size=768, num_hidden_layers=11, intermediate_size=2048, num_attention_heads=12),
}


def documentation(limit: int) -> Iterator[dict[str, str]]:
    """Alpaca rows from the docstrings of Python's own library: real text, of all lengths, on every machine."""
    found = 0
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and (text := ast.get_docstring(node))
                and len(text) > 40
            ):
                given = f"{file.stem}.{node.name}" if len(node.name) % 5 < 2 else ""
                yield {"instruction": f"What does {node.name} in {file.stem} do?", "input": given, "output": text}
                found += 1
                if found == limit:
                    return


def write_rows(path: Path, count: int = 3900) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in documentation(count)), encoding="utf-8")
    return path


def write_model(folder: Path, shape: str, vocabulary: int = 32000) -> Path:
    """A LLaMA of that shape with random weights, saved like any other model.

    Its tokenizer is the embedded one. Tokens that fill it up to `vocabulary` never occur in text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.glob("tokenizer*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if "model" in content:
            known = content["model"]["vocab"]
            first = max(*known.values(), *(token["id"] for token in content["added_tokens"])) + 1
            known |= {f"<unused {number}>": number for number in range(first, vocabulary)}
        (folder / file.name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **SHAPES[shape])
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
