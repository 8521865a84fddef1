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
    add("--output", type=Path, metavar="FILE.jsonl", help="where the answers to --questions go; continued if it exists")
    add("--merge", type=Path, metavar="DIR", help="write base model and adapter as one plain model")
    add("--merge-dtype", default="float32", choices=["float32", "bfloat16"], help="of the merged weights")
    add("--compare", action="store_true", help="also print what the base model alone answers")
    add("--quantization", choices=["4", "8", "none"], help="of the base model; by default as it was trained")
    add(
        "--trust-remote-code", action="store_true", help="run Python code that the base model's repository brings along"
    )
    add("--template", help="alpaca, vicuna_v1.1 or a Jinja file; by default the one saved with the adapter")
    add("--temperature", type=float, default=0.7, help="0 is greedy")
    add("--top-p", type=float, default=0.9)
    add("--max-new-tokens", type=int, default=256)
    add("--batch-size", type=int, default=16, help="of --questions")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def check_arguments(options: argparse.Namespace) -> None:
    """Raise SettingsError for arguments that do not go together or are out of range."""
    chosen = [
        name for name in ("question", "chat", "questions", "merge") if getattr(options, name) not in (None, False)
    ]
    if len(chosen) != 1:
        raise SettingsError("use one of --question, --chat, --questions and --merge")
    if options.question is not None and not options.question.strip():
        raise SettingsError("--question is empty: ask something")
    if bool(options.questions) != bool(options.output):
        raise SettingsError("--questions FILE.jsonl and --output FILE.jsonl go together")
    for name, low, high in (("temperature", 0, 10), ("max_new_tokens", 1, 10**6), ("batch_size", 1, 10**4)):
        value = getattr(options, name)
        if not low <= value <= high:
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
