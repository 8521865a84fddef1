"""python test.py --peft-path=DIR --question="...": ask the model that was trained.

DIR is a run folder (its last checkpoint), a checkpoint (`peft_<round>`) or any PEFT adapter folder. The base model and
the prompt are those that it was trained with.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from machine import gpus
from runs.runfolder import find_checkpoint
from settings.schema import RunError, SettingsError
from utils import DIGESTS_FILE, quick_imports, quiet_transformers, send_nothing_home, shortened

MODES = ("question", "chat", "questions", "evaluate", "tasks", "merge")
LEAST_TEMPERATURE = 0.001  # logits divided by much less are no numbers any more
OPTION_OF = {  # what a setting is called here
    "model.name": "--base",
    "model.quantization": "--quantization",
    "model.trust_remote_code=true": "--trust-remote-code",
    "dataset.name": "--evaluate",
    "dataset.split": "--split",
    "dataset.subset": "--subset",
    "dataset.columns": "--columns",
    "dataset.template": "--template",
}


# --- what an option may be: each says what is wrong with a value, or None ------------------------


def filled(value: str) -> str | None:
    return None if value.strip() else "is empty; give it a value"


def between(low: int, high: int) -> Callable[[float], str | None]:
    return lambda value: None if low <= value <= high else f"use a number from {low} to {high}"  # NaN is in no range


def temperature(value: float) -> str | None:
    is_tiny = 0 < value < LEAST_TEMPERATURE
    return f"use 0 (greedy), or at least {LEAST_TEMPERATURE}" if is_tiny else between(0, 10)(value)


def share(value: float) -> str | None:
    return None if 0 < value <= 1 else "use a number above 0 and at most 1"


def file_to_read(path: Path) -> str | None:
    if os.path.isdir(path):
        return "is a folder; name a file of JSON lines"
    return None if os.path.exists(path) else "there is no such file"


def folder_to_read(path: Path) -> str | None:
    what_is_there = "is a file; name the folder" if os.path.exists(path) else "there is no such folder"
    return None if os.path.isdir(path) else what_is_there


def file_to_write(path: Path) -> str | None:
    """Opens the file as it will be opened; leaves none that was not there."""
    is_new = not os.path.exists(path)
    if not os.path.isdir(path.parent):
        return f"there is no folder {path.parent}; create it, or choose another file"
    if not is_new and not os.path.isfile(path):
        return "is no ordinary file; name one that may be written"
    if not is_new and path.name in own_files(path.parent):
        return "is one of the adapter's own files; choose another name"
    try:
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror}); choose another file"
    return None


def own_files(folder: Path) -> set[str]:
    """The files of a checkpoint, as it lists them itself, or at least those that PEFT needs."""
    with suppress(OSError, ValueError):
        return {*json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8")), DIGESTS_FILE}
    return {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"}


def folder_to_write(path: Path) -> str | None:
    """A new or empty folder, at a place that can be written."""
    there = next(place for place in (path, *path.parents, Path("/")) if os.path.exists(place))  # or where it would lie
    if not os.path.isdir(there):
        return f"{there} is a file; choose a new folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"cannot be written in {there}; choose another folder"
    return "the folder is not empty; choose another" if there == path and any(path.iterdir()) else None


# --- the options ----------------------------------------------------------------------------------


def as_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path's own raises for the home of nobody


def as_text(text: str) -> str:
    """What can become tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"is not UTF-8 text ({error.reason}); set the terminal to UTF-8") from error
    return text


def as_columns(text: str) -> dict[str, str]:
    """Which column is what, as `dataset.columns` says it."""
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    if not all(use.strip() and column.strip() for use, column in pairs):
        raise argparse.ArgumentTypeError("is not USE=COLUMN, separated by commas")
    return {use.strip(): column.strip() for use, column in pairs}


ASKED = ("question", "chat", "questions")
EVALUATE, TASKS, WRITTEN = ("evaluate",), ("tasks",), ("questions", "evaluate", "tasks")
FLAG = dict(action="store_true")
OPTIONS: dict[str, tuple[tuple[str, ...], Callable[[Any], str | None] | None, dict[str, Any]]] = {
    # name: the modes in which it means something, what finds faults of its values, and what argparse is told
    "peft-path": (MODES, filled, dict(required=True, help="run folder, checkpoint, or PEFT adapter folder")),
    "question": (MODES, filled, dict(type=as_text, help="ask this and print the answer")),
    "chat": (MODES, None, FLAG | dict(help="a conversation; Ctrl-D ends it")),
    "questions": (MODES, file_to_read, dict(type=as_path, metavar="FILE.jsonl", help='lines with "question"')),
    "evaluate": (MODES, filled, dict(metavar="DATA", help="measure it on rows: a file, folder or Hub id")),
    "tasks": (MODES, filled, dict(help="measure it on tasks of EleutherAI's lm_eval, separated by commas")),
    "merge": (MODES, folder_to_write, dict(type=as_path, metavar="DIR", help="write base and adapter as one model")),
    "base": (MODES, filled, dict(help="name or folder of the base model; by default what the adapter notes")),
    "quantization": (MODES, None, dict(choices=["4", "8", "none"], help="of the base model; by default as trained")),
    "trust-remote-code": (MODES, None, FLAG | dict(help="run code that the base model's repository brings along")),
    "template": (MODES, filled, dict(help="alpaca, vicuna_v1.1, tokenizer or a Jinja file; else the adapter's own")),
    "compare": (
        ("question", *EVALUATE, *TASKS),
        None,
        FLAG | dict(help="also what the base model alone answers or reaches"),
    ),
    "output": (WRITTEN, file_to_write, dict(type=as_path, metavar="FILE", help="answers (continued), or measurements")),
    "batch-size": (WRITTEN, between(1, 10**4), dict(type=int, default=16)),
    "temperature": (ASKED, temperature, dict(type=float, default=0.7, help="0 is greedy")),
    "top-p": (ASKED, share, dict(type=float, default=0.9)),
    "seed": (ASKED, between(0, 2**32 - 1), dict(type=int, default=0)),  # what numpy takes
    "max-new-tokens": ((*ASKED, "evaluate"), between(1, 10**6), dict(type=int, default=256)),
    "input": (("question",), None, dict(type=as_text, default="", help="further context (Alpaca's input field)")),
    "split": (EVALUATE, filled, dict(default="test", help="on the Hub")),
    "subset": (EVALUATE, filled, dict(help="configuration on the Hub")),
    "columns": (
        EVALUATE,
        None,
        dict(type=as_columns, default={}, metavar="USE=COLUMN,...", help="such as instruction=question,output=answer"),
    ),
    "category-column": (EVALUATE, None, dict(default="category", help="also measured by its values")),
    "answers": (EVALUATE, between(0, 10**6), dict(type=int, default=200, help="rows answered: exact match, ROUGE-L")),
    "seq-length": (EVALUATE, between(16, 10**6), dict(type=int, default=512, help="longest row, in tokens")),
    "limit": (TASKS, between(1, 10**9), dict(type=int, help="questions of each; by default all")),
    "num-fewshot": (TASKS, between(0, 100), dict(type=int, help="examples before each; by default the task's")),
    "include-path": (TASKS, folder_to_read, dict(type=as_path, metavar="DIR", help="of more tasks: YAML files")),
    "confirm-run-unsafe-code": (TASKS, None, FLAG | dict(help="let them run code that the model wrote")),
    "merge-dtype": (("merge",), None, dict(default="float32", choices=["float32", "bfloat16"])),
}


class Parser(argparse.ArgumentParser):
    """Answers what it cannot read with SettingsError, so that every wrong argument gets one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message.removeprefix('argument ')}; `python test.py --help` lists all arguments")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, by default those of the command line. Raises SettingsError for the first that cannot work."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups: dict[Sequence[str], Any] = {MODES: parser}
    for name, (modes, _, told) in OPTIONS.items():
        if modes not in groups:
            groups[modes] = parser.add_argument_group(f"with {listed(modes)}")
        groups[modes].add_argument(f"--{name}", **told)
    chosen = parser.parse_args(arguments)
    mode = mode_of(chosen)
    for name, (modes, fault, _) in OPTIONS.items():
        key = name.replace("-", "_")
        if (value := getattr(chosen, key)) != parser.get_default(key):
            shown = f"--{name}" if value is True else f"--{name}={value}"
            if found := fault and fault(value):
                raise SettingsError(f"{shown}: {found}")
            if mode not in modes:
                raise SettingsError(f"{shown}: goes with {listed(modes)}; leave it out")
    check_together(chosen)
    return chosen


def listed(modes: Sequence[str]) -> str:
    *others, last = (f"--{mode}" for mode in modes)
    return f"{', '.join(others)} or {last}" if others else last


def mode_of(options: argparse.Namespace) -> str:
    """The one of MODES that is asked for."""
    chosen = [mode for mode in MODES if getattr(options, mode) not in (None, False)]
    if len(chosen) != 1:
        raise SettingsError("use one of --question, --chat, --questions, --evaluate, --tasks and --merge")
    if options.questions and not options.output:
        raise SettingsError("--questions FILE.jsonl and --output FILE.jsonl go together")
    return chosen[0]


def check_together(options: argparse.Namespace) -> None:
    """What is wrong with one option because of another."""
    if options.merge and options.quantization in ("4", "8"):
        raise SettingsError(f"--quantization={options.quantization}: --merge sums unquantized weights; leave it out")
    if options.output and options.output.exists():
        read = [data for data in (options.questions, options.evaluate) if data and os.path.exists(data)]
        if any(os.path.samefile(place, data) for place in (options.output, options.output.parent) for data in read):
            raise SettingsError(
                f"--output={options.output}: is the data itself, which would be overwritten; choose another file"
            )


# --- what they ask for ----------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do what the options of test.py ask for. Raises SettingsError for whatever they name that is not there."""
    try:
        start(find_checkpoint(options.peft_path), options)
    except (SettingsError, RunError) as error:
        words = str(error)
        for setting, option in OPTION_OF.items():
            words = words.replace(setting, option)
        raise type(error)(words) from error
    except RuntimeError as error:
        from machine.faults import is_out_of_memory  # PyTorch is there, and raised it

        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of GPU memory ({shortened(error, 200)}); it helps: --quantization=4, and a smaller --batch-size with "
            f"{listed(WRITTEN)}"
        ) from error


def start(checkpoint: Path, options: argparse.Namespace) -> None:
    if options.merge:
        gpus.show([])  # a sum of weights is taken where there is room for them
    with quick_imports():  # the model libraries take seconds: what can be checked without them is checked first
        from learning.answering import Answerer, answer_all, ask, chat, evaluate
        from learning.merging import merge

    quiet_transformers()
    modes = {"question": ask, "chat": chat, "questions": answer_all, "evaluate": evaluate, "merge": merge}
    if options.tasks:
        from learning.harness import run_tasks  # of an optional package: it may be missing

        modes["tasks"] = run_tasks
    modes[mode_of(options)](Answerer(checkpoint, options), options)


def main() -> int:
    send_nothing_home()
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries say at import is not for the user
    try:
        run(parse())
    except (SettingsError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
