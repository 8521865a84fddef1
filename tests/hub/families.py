"""Every family of base models, through the commands: `python -m tests.hub.families` writes docs/models.md.

Each one is a repository of repositories.py on a local Hub: the real layout (files, names, tokenizer, chat template)
with random weights of a tiny shape. It is trained in 4 bits for a round, saved, loaded again, asked, and merged.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings.schema import SettingsError
from tests.hub.repositories import GATED_TOKEN, build
from tests.hub.server import LocalHub
from utils import SUITE_FOLDER

TABLE = SUITE_FOLDER / "docs/models.md"
ROWS = "vicgalle/alpaca-gpt4"
FAMILIES = {  # name: repository, prompt
    "OpenLLaMA v2 7B": ("openlm-research/open_llama_7b_v2", "alpaca"),
    "OpenLLaMA v2 3B": ("openlm-research/open_llama_3b_v2", "vicuna_v1.1"),
    "Llama 2 chat": ("meta-llama/Llama-2-7b-chat-hf", "tokenizer"),
    "Llama 3.2 Instruct": ("meta-llama/Llama-3.2-1B-Instruct", "tokenizer"),
    "Llama 3.2 Instruct, stored in 4 bits": ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "tokenizer"),
    "Qwen 2.5 Instruct": ("Qwen/Qwen2.5-0.5B-Instruct", "tokenizer"),
    "Qwen 3": ("Qwen/Qwen3-0.6B", "tokenizer"),
    "Mistral Instruct v0.3": ("mistralai/Mistral-7B-Instruct-v0.3", "tokenizer"),
    "Gemma 2": ("google/gemma-2-2b-it", "tokenizer"),
    "Gemma 3, text": ("google/gemma-3-1b-it", "tokenizer"),
    "Gemma 3, with its vision tower": ("google/gemma-3-4b-it", "tokenizer"),
    "Phi-3 mini": ("microsoft/Phi-3-mini-4k-instruct", "tokenizer"),
    "Pythia (GPT-NeoX)": ("EleutherAI/pythia-70m", "alpaca"),
    "SmolLM2 Instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", "tokenizer"),
    "TinyLlama chat": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tokenizer"),
}
SHORT = (
    "num_clients=2", "strategy.fraction_fit=1", "num_rounds=1", "train.seq_length=128", "model.lora.r=8",
    "train.training_arguments.max_steps=1", "train.training_arguments.per_device_train_batch_size=2",
    "train.micro_batch_size=2", "client_resources.num_cpus=1", "client_resources.num_gpus=0",
    "train.learning_rate_max=1e-2", "train.learning_rate_min=1e-2",
)  # fmt: skip
MERGED_WITHIN = 1e-4  # of float32 logits


def tried(family: str, folder: Path) -> dict[str, Any]:
    """What became of a family; raises if any step fails. The Hub has to be in this process's environment."""
    from tests.federation import call_main

    name, template = FAMILIES[family]
    place = folder / name.replace("/", "--")
    settings = [f"model.name={name}", f"dataset.template={template}", f"hydra.run.dir={place}", *SHORT]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = call_main(*settings)
    assert code == 0, f"{family}: {said.getvalue()}"
    [line] = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert not line["dropped"]
    lora = json.loads((place / "peft_1/adapter_config.json").read_text())
    answer = asked(place, "--question=What is 3 plus 4?", "--max-new-tokens=4", "--temperature=0")
    try:
        asked(place, f"--merge={place / 'merged'}")
        merged = merged_difference(place, name)
    except SettingsError as error:
        assert "is stored in 4 bits" in str(error)  # noqa: PT017
        merged = None
    return {
        "family": family,
        "repository": name,
        "targets": sorted(lora["target_modules"]),
        "prompt": template,
        "loss": line["train_loss"],
        "answered": bool(answer is not None),
        "merged": merged,
    }


def asked(place: Path, *arguments: str) -> str:
    """What `python test.py --peft-path=PLACE ARGUMENTS` prints, in this process."""
    import test

    options = test.parse([f"--peft-path={place}", *arguments])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        test.run(options)
    return said.getvalue()


def merged_difference(place: Path, name: str) -> float:
    """The largest difference between float32 logits of the merged model, and of base plus adapter loaded by hand."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from hub import models as hub

    base = AutoModelForCausalLM.from_pretrained(hub.model_folder(name, weights=True), dtype=torch.float32)
    both = PeftModel.from_pretrained(base, str(place / "peft_1")).eval()
    merged = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32).eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        found, expected = merged(input_ids=ids).logits, both(input_ids=ids).logits
        with both.disable_adapter():
            assert not torch.allclose(expected, both(input_ids=ids).logits, atol=MERGED_WITHIN)  # it does something
    return float((found - expected).abs().max())


def try_all(families: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """`tried` for each of `families`, in one process of its own that knows a local Hub."""
    build(folder / "hub", ROWS, *(FAMILIES[family][0] for family in families))
    with LocalHub(folder / "hub") as local:
        environment = os.environ | local.environment(folder / "home") | {"HF_TOKEN": GATED_TOKEN}
        command = [sys.executable, "-m", "tests.hub.families", "--child", str(folder), *families]
        done = subprocess.run(command, cwd=SUITE_FOLDER, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(results: Sequence[dict[str, Any]]) -> str:
    """docs/models.md."""
    head = ["family", "repository whose layout it has", "default LoRA targets", "prompt", "merged within"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for found in results:
        prompt = "its own" if found["prompt"] == "tokenizer" else f"`{found['prompt']}`"
        targets = ", ".join(f"`{target}`" for target in found["targets"])
        merged = "refused" if found["merged"] is None else f"{found['merged']:.0e}"
        lines.append(f"| {found['family']} | `{found['repository']}` | {targets} | {prompt} | {merged} |")
    return TEXT.format(table="\n".join(lines))


TEXT = """# Base models

`python -m tests.hub.families` makes this page. It starts a Hugging Face Hub of its own on the loopback address, with
repositories laid out like the real ones: the same files, names of weights, tokenizer kinds, special tokens, chat
template behaviour and `config.json` fields, but **random weights of a tiny shape**, on a CPU. So it shows that each
family loads, trains, is saved, loaded again, asked and merged through `main.py` and `test.py`. It does not show how
good a tuned model is, and the real weights were not tried.

Each was trained in 4 bits for one round by two clients with `model.lora.target_modules=null`, the default. *Merged
within* is the largest difference between float32 logits of `test.py --merge`'s model and of base plus adapter.

{table}

## What is decided for you

- **Where LoRA goes**: `model.lora.target_modules=null` means PEFT's own choice for the kind of model, or the attention
  projections that it has. Only the language model gets adapters; a vision tower stays as it is. A name that the model
  lacks is refused with the names that it has.
- **A tokenizer that plainly belongs to another model** is refused: it knows less than half of the vocabulary, has token
  ids beyond it, or turns more than a quarter of a plain English sentence into unknown tokens.
- **Special tokens in your rows stay text**, whatever the family: `<|start_header_id|>` in a row becomes the letters.
- **The end of an answer** is the tokenizer's EOS or a token that `generation_config.json` names beside it
  (`<end_of_turn>`, `<|eot_id|>`, `<|end|>`). It is trained, and what a template writes after it is not.
- **Of several chat templates** the one called `default` is used (`dataset.template=tokenizer`), here and in `test.py`.
- **A template that writes today's date** gets 26 July 2024 every day, so that a run, its resume, `test.py` and whoever
  loads the checkpoint's template see the same tokens.
- **A model that is stored in 4 or 8 bits by bitsandbytes** needs the same `model.quantization`; other formats (GPTQ,
  AWQ, GGUF) are refused: name the original model. `--merge` needs plain weights: `--base=` the unquantized model.

## A model of your own

- **Private or gated**: if it is gated, ask for access on its page; then `hf auth login`, or set `HF_TOKEN`, on every
  machine that loads it: each machine of a Ray cluster, each SuperNode, and the SuperLink's for config and tokenizer.
- **A local folder**: `model.name=/path` with `config.json`, the tokenizer's files, and `model.safetensors` or
  `pytorch_model.bin`, whole or in shards with their index. In a deployment each machine needs it: a SuperNode takes
  `--model=/path`.
- **With image input**: it works if transformers' `AutoModelForCausalLM` loads it, as it does Gemma 3. Only the language
  part is trained, on text.
- **With Python code of its own**: `model.trust_remote_code=true`, and `--trust-remote-code` for `test.py`. SuperNodes
  refuse it.

## From the Hub

In a simulation on one machine a model and a data set are looked up once, when the run starts, and downloaded with
progress; from then on no process asks the Hub. On a Ray cluster and in a deployment each machine does so for itself. If
the Hub cannot be reached, what the cache holds is used as it is. A dry run asks nothing.
"""


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        from utils import send_nothing_home

        send_nothing_home()
        for family in sys.argv[3:]:
            print(json.dumps(tried(family, Path(sys.argv[2]))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        TABLE.write_text(table(try_all(list(FAMILIES), Path(folder))), encoding="utf-8")


if __name__ == "__main__":
    main()
