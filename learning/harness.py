"""The standard benchmarks, through EleutherAI's lm_eval: `python test.py --peft-path=RUN --tasks=arc_easy,medmcqa`.

The model and the prompt are those of training. Optional: `pip install -r requirements-extras.txt`.
"""

import argparse
import json
import logging
from typing import Any

import torch

from dataset import encode_text
from learning.answering import Answerer, writing
from settings.schema import SettingsError
from utils import shortened, write_json

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise SettingsError(f"--tasks: needs lm_eval ({error}); pip install -r requirements-extras.txt") from error

KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "samples")


class Examinee(HFLM):
    """lm_eval's model around an answerer. Text becomes tokens as in training: prompt and answer apart."""

    def __init__(self, answerer: Answerer, batch_size: int) -> None:
        model, tokenizer = answerer.model, answerer.tokenizer
        tokenizer.chat_template = answerer.template
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        low = "bfloat16" if model.dtype == torch.bfloat16 else None  # as `model.arithmetic`
        # by default it takes logarithms in the model's bfloat16: -29.625 for -29.679
        kinds = {"softmax_dtype": "float32", "mixed_precision_dtype": low}
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, **kinds)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_text(self.tokenizer, context), encode_text(self.tokenizer, continuation)


def run_tasks(answerer: Answerer, options: argparse.Namespace) -> None:
    """Print lm_eval's table for --tasks, and with --compare the base model's; both to --output as JSON."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise SettingsError(f"--tasks={options.tasks}: name at least one task; `lm_eval ls tasks` lists all")
    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    missing = [name for name in tasks if not manager.match_tasks([name])]
    if missing:
        raise SettingsError(f"--tasks={options.tasks}: there is no {', '.join(missing)}; `lm_eval ls tasks` lists all")
    asked = {key: getattr(options, key) for key in ("num_fewshot", "limit", "confirm_run_unsafe_code")}
    asked |= {"tasks": tasks, "task_manager": manager, "apply_chat_template": True}
    found: dict[str, Any] = {}
    for name in answerer.models():
        try:
            found[name] = simple_evaluate(Examinee(answerer, options.batch_size), **asked)
        except (ValueError, OSError) as error:
            raise SettingsError(f"--tasks={options.tasks}: {shortened(error, 300)}") from error
    for name, results in found.items():
        print(f"{name} ({answerer.name})\n{make_table(results)}")
        if results.get("groups"):
            print(make_table(results, "groups"))
    if options.output:
        kept = {name: {key: results.get(key) for key in KEPT} for name, results in found.items()}
        with writing("output", options.output):
            write_json(options.output, json.loads(json.dumps(kept, default=str)))
