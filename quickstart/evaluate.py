"""python -m quickstart.evaluate RUN_FOLDER: what the base model knew, and what the federated adapter knows.

Asks every held-out question (quickstart/data/heldout.jsonl, never trained on) greedily, with and without
the adapter, and prints exact match by category, how many answers at least begin with the right line (a base
model never stops), and the loss on the right answers. Exit code 1 if the
adapter does not reach what the README promises.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import model as adapters
from compose import compose
from dataset import as_message, encode_prompt, find_template, load_rows, tokenize_rows
from training import loss_on
from utils import quiet_libraries

PROMISE = {"before_at_most": 0.05, "after_at_least": 0.50, "loss_at_most": 0.5}


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int = 64) -> list[str]:
    """Greedy answers of at most 24 tokens, prompts padded on the left."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
        texts += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def measure(model: Any, tokenizer: Any, rows: Any, template: str) -> dict[str, Any]:
    """Exact match (all, by category) and mean loss over response and EOS tokens of `rows`."""
    prompts = [encode_prompt(tokenizer, template, [as_message(row)]) for row in rows]
    given = answers(model, tokenizer, prompts)
    right = [answer == row["output"].strip() for answer, row in zip(given, rows, strict=True)]
    begun = [answer.split("\n")[0] == row["output"].strip() for answer, row in zip(given, rows, strict=True)]
    by_category = defaultdict(list)
    for row, correct in zip(rows, right, strict=True):
        by_category[row["category"]].append(correct)
    partition = tokenize_rows(rows, tokenizer, template, 512)
    loss, _, _ = loss_on(model, [partition.row(index) for index in range(len(partition))], 64)
    return {
        "exact_match": sum(right) / len(right),
        "first_line": sum(begun) / len(begun),
        "by_category": {name: sum(hits) / len(hits) for name, hits in sorted(by_category.items())},
        "loss": loss,
        "answers": given,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--quantization", default="4", choices=["4", "8", "none"])
    arguments = parser.parse_args()
    quiet_libraries()
    results = json.loads((arguments.run_folder / "results.json").read_text())
    config = compose(["experiment=quickstart", f"model.quantization={arguments.quantization}"])
    config.dataset.name = "quickstart/data/heldout.jsonl"
    rows, template = load_rows(config.dataset), find_template("alpaca").read_text(encoding="utf-8")
    tokenizer = adapters.read_tokenizer(config.model)
    model = PeftModel.from_pretrained(
        adapters.load_base(config.model), arguments.run_folder / results["adapter"]
    ).eval()
    with model.disable_adapter():
        before = measure(model, tokenizer, rows, template)
    after = measure(model, tokenizer, rows, template)
    print(f"{len(rows)} held-out questions, {results['adapter']}, quantization {arguments.quantization}")
    print(f"{'':14}{'base':>8}{'adapter':>9}")
    for name in after["by_category"]:
        print(f"{name:14}{before['by_category'][name]:8.1%}{after['by_category'][name]:9.1%}")
    print(f"{'exact match':14}{before['exact_match']:8.1%}{after['exact_match']:9.1%}")
    print(f"{'first line':14}{before['first_line']:8.1%}{after['first_line']:9.1%}")
    print(f"{'loss':14}{before['loss']:8.3f}{after['loss']:9.3f}")
    for row, wrong, given in list(zip(rows, before["answers"], after["answers"], strict=True))[:3]:
        question = " ".join(f"{row['instruction']} {row['input']}".split())
        print(f"\n{question}\n  base: {wrong[:60]!r}\n  adapter: {given!r}")
    kept = (
        before["exact_match"] <= PROMISE["before_at_most"]
        and after["exact_match"] >= PROMISE["after_at_least"]
        and after["loss"] <= PROMISE["loss_at_most"] * before["loss"]
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
