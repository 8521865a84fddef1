"""python test.py --peft-path=DIR --question="...": ask the model that was trained.

DIR is a run folder (its last checkpoint), a checkpoint (`peft_<round>`) or any PEFT adapter folder. The
base model is found from the adapter, the prompt is the one that it was trained with.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from runs.runfolder import find_checkpoint
from settings.schema import RunError, SettingsError
from utils import DIGESTS_FILE, quiet_transformers, send_nothing_home

MODES = ("question", "chat", "questions", "evaluate", "tasks", "merge")
ONLY_WITH = {  # options that belong to some modes alone
    "input": ("question",),
    "compare": ("question", "evaluate", "tasks"),
    "output": ("questions", "evaluate", "tasks"),
    "split": ("evaluate",),
    "category_column": ("evaluate",),
    "answers": ("evaluate",),
    "seq_length": ("evaluate",),
    "limit": ("tasks",),
    "num_fewshot": ("tasks",),
    "include_path": ("tasks",),
    "confirm_run_unsafe_code": ("tasks",),
    "merge_dtype": ("merge",),
}
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 10),
    "max_new_tokens": (1, 10**6),
    "batch_size": (1, 10**4),
    "answers": (0, 10**6),
    "seq_length": (16, 10**6),
    "limit": (1, 10**9),
    "num_fewshot": (0, 100),
    "seed": (0, 2**32 - 1),  # what numpy takes
}
LEAST_TEMPERATURE = 0.001  # logits divided by much less are no numbers any more


class Parser(argparse.ArgumentParser):
    """Answers what it cannot read with SettingsError, so that every wrong argument gets one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message.removeprefix('argument ')}; `python test.py --help` lists all arguments")


def as_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path's own raises for the home of nobody


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, by default those of the command line. Raises SettingsError for one that cannot be read."""
    return make_parser().parse_args(arguments)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peft-path", required=True, help="run folder, checkpoint, or PEFT adapter folder")
    add("--question", help="ask this and print the answer")
    add("--input", default="", help="further context of the question (Alpaca's input field)")
    add("--chat", action="store_true", help="a conversation; Ctrl-D ends it")
    add(
        "--questions",
        type=as_path,
        metavar="FILE.jsonl",
        help='many questions: lines with "question", or "instruction"',
    )
    add("--evaluate", metavar="DATA", help="measure it on these rows: a file, folder or Hub id, as dataset.name")
    add("--tasks", help="measure it on these tasks of EleutherAI's lm_eval, separated by commas")
    add("--output", type=as_path, metavar="FILE", help="of answers (JSON lines, continued) or measurements (JSON)")
    add("--merge", type=as_path, metavar="DIR", help="write base model and adapter as one plain model")
    add("--merge-dtype", default="float32", choices=["float32", "bfloat16"], help="of the merged weights")
    add("--compare", action="store_true", help="also what the base model alone answers or reaches")
    add("--base", help="name or folder of the base model; by default the one that the adapter notes")
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
    add("--include-path", type=as_path, metavar="DIR", help="further --tasks, as lm_eval's YAML files")
    add("--confirm-run-unsafe-code", action="store_true", help="let --tasks run code that the model wrote")
    add("--seed", type=int, default=0)
    return parser


def check_arguments(options: argparse.Namespace) -> None:
    """Raise SettingsError for arguments that do not go together, are out of range, or name no usable place."""
    mode = check_mode(options)
    check_ranges(options)
    check_inputs(options)
    check_options_of_mode(options, mode)
    if options.output:
        check_output(options)
    if options.merge:
        check_folder_to_write(options.merge)


def check_mode(options: argparse.Namespace) -> str:
    """The one of MODES that is asked for."""
    chosen = [name for name in MODES if getattr(options, name) not in (None, False)]
    if len(chosen) != 1:
        raise SettingsError("use one of --question, --chat, --questions, --evaluate, --tasks and --merge")
    for key in ("peft_path", "base", "question", "evaluate", "tasks", "template", "split"):
        value = getattr(options, key)
        if value is not None and not value.strip():
            raise SettingsError(f"--{key.replace('_', '-')} is empty: give it a value")
    if options.questions and not options.output:
        raise SettingsError("--questions FILE.jsonl and --output FILE.jsonl go together")
    if options.merge and options.quantization in ("4", "8"):
        raise SettingsError(f"--quantization={options.quantization}: --merge sums unquantized weights; leave it out")
    return chosen[0]


def check_ranges(options: argparse.Namespace) -> None:
    for name, (low, high) in RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:  # not a number is in no range
            raise SettingsError(f"--{name.replace('_', '-')}={value}: use a number from {low} to {high}")
    if 0 < options.temperature < LEAST_TEMPERATURE:
        raise SettingsError(f"--temperature={options.temperature}: use 0 (greedy), or at least {LEAST_TEMPERATURE}")
    if not 0 < options.top_p <= 1:
        raise SettingsError(f"--top-p={options.top_p}: use a number above 0 and at most 1")


def check_options_of_mode(options: argparse.Namespace, mode: str) -> None:
    """Raise SettingsError for an option that means nothing in this mode."""
    parser = make_parser()
    for key, modes in ONLY_WITH.items():
        value = getattr(options, key)
        if mode not in modes and value != parser.get_default(key):
            shown = "" if value is True else f"={value}"
            allowed = " or ".join(filter(None, [", ".join(f"--{name}" for name in modes[:-1]), f"--{modes[-1]}"]))
            raise SettingsError(f"--{key.replace('_', '-')}{shown}: goes with {allowed}; leave it out")


def check_inputs(options: argparse.Namespace) -> None:
    """What is read: text that can become tokens, a file of questions, a folder of tasks."""
    for key in ("question", "input"):
        try:
            (getattr(options, key) or "").encode()
        except UnicodeEncodeError as error:
            raise SettingsError(f"--{key}: is not UTF-8 text ({error.reason}); set the terminal to UTF-8") from error
    if options.questions and os.path.isdir(options.questions):
        raise SettingsError(f"--questions={options.questions}: is a folder; name a file of JSON lines")
    if options.questions and not os.path.exists(options.questions):
        raise SettingsError(f"--questions={options.questions}: there is no such file")
    if options.include_path and not os.path.isdir(options.include_path):
        found = "is a file; name the folder" if os.path.exists(options.include_path) else "there is no such folder"
        raise SettingsError(f"--include-path={options.include_path}: {found}")


def check_output(options: argparse.Namespace) -> None:
    """--output can be written, and is not the data that it would replace."""
    path, folder = options.output, options.output.parent
    if not os.path.isdir(folder):
        raise SettingsError(f"--output={path}: there is no folder {folder}; create it, or choose another file")
    if not os.path.exists(path):
        return check_can_write(path, is_new=True)
    if not os.path.isfile(path):
        raise SettingsError(f"--output={path}: is no ordinary file; name one that may be written")
    if path.name in own_files(folder):
        raise SettingsError(f"--output={path}: is one of the adapter's own files; choose another name")
    read = [data for data in (options.questions, options.evaluate) if data and os.path.exists(data)]
    if any(os.path.samefile(place, data) for place in (path, folder) for data in read):
        raise SettingsError(f"--output={path}: is the data itself, which would be overwritten; choose another file")
    return check_can_write(path, is_new=False)


def own_files(folder: Path) -> set[str]:
    """The files of a checkpoint, as it lists them itself, or at least those that PEFT needs."""
    with suppress(OSError, ValueError):
        return {*json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8")), DIGESTS_FILE}
    return {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}


def check_can_write(path: Path, is_new: bool) -> None:
    """Open --output as it will be opened; leaves no file that was not there."""
    try:
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise SettingsError(f"--output={path}: cannot be written ({error.strerror}); choose another file") from error


def check_folder_to_write(path: Path) -> None:
    """--merge is a new or empty folder at a place that can be written."""
    there = next(place for place in (path, *path.parents, Path("/")) if os.path.exists(place))  # or where it would lie
    if not os.path.isdir(there):
        raise SettingsError(f"--merge={path}: {there} is a file; choose a new folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise SettingsError(f"--merge={path}: cannot be written in {there}; choose another folder")
    if there == path and any(path.iterdir()):
        raise SettingsError(f"--merge={path}: the folder is not empty; choose another")


def run(options: argparse.Namespace) -> None:
    """Do what the options of test.py ask for. Raises SettingsError for whatever they name that is not there."""
    checkpoint = find_checkpoint(options.peft_path)
    # the model libraries take seconds: what can be checked without them is checked first
    from learning.answering import Answerer, answer_all, ask, chat, evaluate, kept_answers, merge, read_questions

    quiet_transformers()
    if options.tasks:
        from learning.harness import run_tasks  # of an optional package: it may be missing
    questions = read_questions(options.questions) if options.questions else []
    if options.merge:
        return merge(checkpoint, options)
    answerer = Answerer(checkpoint, options)
    if options.evaluate:
        return evaluate(answerer, options)
    if options.tasks:
        return run_tasks(answerer, options)
    if options.questions:
        return answer_all(answerer, options, questions, kept_answers(options.output, questions, answerer.made_by))
    return chat(answerer) if options.chat else ask(answerer, options)


def main() -> int:
    send_nothing_home()
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries say at import is not for the user
    try:
        options = parse()
        check_arguments(options)
        run(options)
    except (SettingsError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
