"""python test.py --peft-path=DIR --question="...": ask the model that was trained.

DIR is a run folder (its last checkpoint), a checkpoint (`peft_<round>`) or any PEFT adapter folder. The
base model is found from the adapter, the prompt is the one that it was trained with.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from config import SettingsError


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peft-path", required=True, help="run folder, checkpoint, or PEFT adapter folder")
    add("--question", help="ask this and print the answer")
    add("--input", default="", help="further context of the question (Alpaca's input field)")
    add("--chat", action="store_true", help="a conversation; Ctrl-D ends it")
    add("--questions", type=Path, metavar="FILE.jsonl", help='many questions: lines with "question", or "instruction"')
    add("--evaluate", metavar="DATA", help="measure it on these rows: a file, folder or Hub id, as dataset.name")
    add("--tasks", help="measure it on these tasks of EleutherAI's lm_eval, separated by commas")
    add("--output", type=Path, metavar="FILE", help="where answers go (JSON lines, continued) or measurements (JSON)")
    add("--merge", type=Path, metavar="DIR", help="write base model and adapter as one plain model")
    add("--merge-dtype", default="float32", choices=["float32", "bfloat16"], help="of the merged weights")
    add("--compare", action="store_true", help="also what the base model alone answers or reaches")
    add("--quantization", choices=["4", "8", "none"], help="of the base model; by default as it was trained")
    add(
        "--trust-remote-code", action="store_true", help="run Python code that the base model's repository brings along"
    )
    add("--template", help="alpaca, vicuna_v1.1 or a Jinja file; by default the one saved with the adapter")
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top-p", type=float, default=0.9)
    add("--max-new-tokens", type=int, default=256)
    add("--batch-size", type=int, default=16, help="of everything but --question and --chat")
    add("--split", default="test", help="of --evaluate, on the Hub")
    add("--category-column", default="category", help="of --evaluate: also measured by its values")
    add(
        "--answers",
        type=int,
        default=200,
        help="rows of --evaluate also answered, for exact match and ROUGE-L",
    )
    add("--seq-length", type=int, default=512, help="longest row of --evaluate, in tokens")
    add("--limit", type=int, help="questions of each of --tasks; by default all")
    add("--num-fewshot", type=int, help="examples before each question of --tasks; by default the task's own number")
    add("--include-path", type=Path, metavar="DIR", help="further --tasks, as lm_eval's YAML files")
    add("--confirm-run-unsafe-code", action="store_true", help="let --tasks run code that the model wrote")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def check_arguments(options: argparse.Namespace) -> None:
    """Raise SettingsError for arguments that do not go together or are out of range."""
    chosen = [
        name
        for name in ("question", "chat", "questions", "evaluate", "tasks", "merge")
        if getattr(options, name) not in (None, False)
    ]
    if len(chosen) != 1:
        raise SettingsError("use one of --question, --chat, --questions, --evaluate, --tasks and --merge")
    if options.question is not None and not options.question.strip():
        raise SettingsError("--question is empty: ask something")
    if options.questions and not options.output:
        raise SettingsError("--questions FILE.jsonl and --output FILE.jsonl go together")
    if options.output and chosen[0] not in ("questions", "evaluate", "tasks"):
        raise SettingsError(f"--output={options.output}: goes with --questions, --evaluate or --tasks")
    if options.output and not options.output.parent.is_dir():
        raise SettingsError(f"--output={options.output}: there is no folder {options.output.parent}")
    ranges = {"temperature": (0, 10), "max_new_tokens": (1, 10**6), "batch_size": (1, 10**4), "answers": (0, 10**6)}
    ranges |= {"seq_length": (16, 10**6), "limit": (1, 10**9), "num_fewshot": (0, 100)}
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise SettingsError(f"--{name.replace('_', '-')}={value}: use a number from {low} to {high}")
    if not 0 < options.top_p <= 1:
        raise SettingsError(f"--top-p={options.top_p}: use a number above 0 and at most 1")


def main() -> int:
    options = parse()
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries say at import is not for the user
    try:
        check_arguments(options)
        import answering  # the model libraries take seconds: arguments are checked first

        answering.run(options)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
