"""The standard benchmarks, through EleutherAI's lm_eval: `python test.py --peft-path=RUN --tasks=arc_easy,medmcqa`.

The model is what training had: the base model in its quantization, with the adapter, and the same prompt. Optional:
`pip install -r requirements-extras.txt`.
"""

import argparse
import json
import logging
from typing import TYPE_CHECKING, Any

from dataset import encode_text
from settings.schema import SettingsError
from utils import shortened, write_json

if TYPE_CHECKING:
    from learning.answering import Answerer

try:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise SettingsError(f"--tasks: needs lm_eval ({error}); pip install -r requirements-extras.txt") from error


KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "samples")


class Tuned(HFLM):
    """lm_eval's model around an answerer. Text becomes tokens as in training: prompt and answer apart."""

    def __init__(self, answerer: "Answerer", batch_size: int) -> None:
        tokenizer = answerer.tokenizer
        tokenizer.chat_template = answerer.template
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        # by default it takes logarithms in the model's bfloat16: -29.625 for -29.679
        super().__init__(answerer.model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return encode_text(self.tokenizer, context), encode_text(self.tokenizer, continuation)


def run_tasks(answerer: "Answerer", options: argparse.Namespace) -> None:
    """Print lm_eval's table for --tasks, and with --compare the base model's; both to --output as JSON.

    Raises:
        SettingsError: if there is no such task, or lm_eval cannot run it as asked.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise SettingsError(f"--tasks={options.tasks}: name at least one task; `lm_eval ls tasks` lists all")
    if options.include_path and not options.include_path.is_dir():
        raise SettingsError(f"--include-path={options.include_path}: there is no such folder")
    manager = TaskManager(include_path=str(options.include_path) if options.include_path else None)
    missing = [name for name in tasks if not manager.match_tasks([name])]
    if missing:
        raise SettingsError(f"--tasks={options.tasks}: there is no {', '.join(missing)}; `lm_eval ls tasks` lists all")
    found: dict[str, Any] = {}
    if options.compare:
        with answerer.model.disable_adapter():
            found["base model"] = results_of(answerer, options, tasks, manager)
    found["with the adapter"] = results_of(answerer, options, tasks, manager)
    for name, results in found.items():
        print(f"{name} ({answerer.name})\n{make_table(results)}")
        if results.get("groups"):
            print(make_table(results, "groups"))
    if options.output:
        kept = {name: {key: r.get(key) for key in KEPT} for name, r in found.items()}
        write_json(options.output, json.loads(json.dumps(kept, default=str)))


def results_of(answerer: "Answerer", options: argparse.Namespace, tasks: list[str], manager: Any) -> dict[str, Any]:
    try:
        results: dict[str, Any] = simple_evaluate(
            model=Tuned(answerer, options.batch_size),
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=manager,
            apply_chat_template=True,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        )
    except (ValueError, OSError, ConnectionError) as error:
        raise SettingsError(f"--tasks={options.tasks}: {shortened(error, 300)}") from error
    return results
