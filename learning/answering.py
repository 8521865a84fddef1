"""Answer with a tuned model, or measure it, with the prompt of its training."""

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer, set_seed

import model as adapters
from dataset import Turn, as_message, asked_in, encode_prompt, left_out, load_rows, object_in, tokenize_rows
from exchange.scores import figures
from learning.evaluation import generate, held_out, score
from learning.tuned import PICKLED_FILE, TOKENIZER_FILES, choose_template, explained, find_tuned
from settings.schema import DatasetConfig, SettingsError
from utils import file_sha256, local_path, write_json


class Answerer:
    """A tuned model with its tokenizer and prompt. The weights are loaded when they are first needed."""

    def __init__(self, checkpoint: Path, options: argparse.Namespace) -> None:
        self.options, self.tuned = options, find_tuned(checkpoint, options)
        self.tokenizer = self.tuned.tokenizer
        self.name = f"{checkpoint.resolve().name}, quantization {self.tuned.cfg.quantization}"
        with self.prompting():
            self.template = choose_template(options.template, checkpoint, self.tokenizer)
        self.prompt([as_message({"instruction": "x"})])

    @functools.cached_property
    def model(self) -> Any:
        """Base model and adapter on the device; what is drawn afterwards depends on --seed alone."""
        model = self.tuned.load()
        set_seed(self.options.seed)
        return model

    def models(self) -> Iterator[str]:
        """The names of what is asked, each while `model` is that: with --compare the base model alone comes first."""
        if self.options.compare:
            with self.model.disable_adapter():
                yield "base model"
        yield "with the adapter"

    @property
    def made_by(self) -> str:
        """A short digest of what decides an answer: the adapter, the prompt, and how tokens are chosen."""
        options, cfg, folder = self.options, self.tuned.cfg, adapters.base_folder(self.tuned.cfg)
        names = (adapters.ADAPTER_CONFIG_FILE, adapters.ADAPTER_FILE, PICKLED_FILE, *TOKENIZER_FILES)
        files = [file_sha256(self.tuned.checkpoint / name) for name in names]
        # a folder of the Hub's cache is named by the commit
        place = str(folder.resolve()) if local_path(cfg.name) else f"{cfg.name}@{folder.name}"
        chosen = [options.temperature, options.top_p, options.max_new_tokens, options.seed]
        facts = [files, [place, cfg.quantization], self.template, chosen]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def prompting(self) -> AbstractContextManager[None]:
        """Answers a template that fails, which is a program, with one line."""
        named = f"--template={self.options.template or 'of the adapter'}"
        return explained(f"{named}: makes no prompt", "; choose another, such as --template=alpaca")

    def prompt(self, messages: Sequence[Turn], tools: Sequence[Any] | None = None) -> list[int]:
        with self.prompting():
            return encode_prompt(self.tokenizer, self.template, messages, tools)

    def answers(self, prompts: Sequence[list[int]], streamer: Any = None) -> list[str]:
        """What is answered to each prompt; `streamer` gets the tokens of a single one while they are made."""
        options = self.options
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        chosen = (sampling if options.temperature else {}) | {"streamer": streamer}
        most = options.batch_size * options.seq_length
        found = generate(self.model, self.tokenizer, prompts, options.max_new_tokens, most, **chosen)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    def say(self, messages: Sequence[dict[str, str]]) -> str:
        """Answer a conversation; the answer is printed word by word while it is made."""
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self.answers([self.prompt(messages)], streamer)[0]


def writing(option: str, path: Path) -> AbstractContextManager[None]:
    """Answers a full disk, and whatever else cannot be written, with one line."""
    return explained(f"--{option}={path}: cannot be written", "; make room, or choose another")


# --- questions ------------------------------------------------------------------------------------


def ask(answerer: Answerer, options: argparse.Namespace) -> None:
    """Answer --question; with --compare by the base model first."""
    for name in answerer.models():
        if options.compare:
            print(f"\n{name}:")
        set_seed(options.seed)
        answerer.say([as_message({"instruction": options.question, "input": options.input})])


def chat(answerer: Answerer, options: argparse.Namespace) -> None:
    """A conversation at a prompt, with its history; Ctrl-D ends it."""
    import readline  # noqa: F401  line editing for input()

    assert answerer.model  # loaded before the first question
    history: list[dict[str, str]] = []
    while True:
        try:
            question = input("you> ").strip()
        except EOFError:
            print()
            return
        if question:
            history.append(as_message({"instruction": question}))
            history.append({"role": "assistant", "content": answerer.say(history)})


def answer_all(answerer: Answerer, options: argparse.Namespace) -> None:
    """Answer --questions in batches, a line each to --output, in their order; continues after what is there."""
    questions, made_by = read_questions(options.questions), answerer.made_by
    done = kept_answers(options.output, questions, made_by)
    starts = range(done, len(questions), options.batch_size)
    assert not starts or answerer.model  # loaded before the clock runs
    for start in track(list(starts), description="answering"):
        rows = questions[start : start + options.batch_size]
        prompts = [answerer.prompt(row.get("messages") or [as_message(row)], row.get("tools")) for row in rows]
        answers = answerer.answers(prompts)
        with writing("output", options.output), options.output.open("a", encoding="utf-8") as file:
            for row, answer in zip(rows, answers, strict=True):
                file.write(json.dumps(row | {"answer": answer, "made_by": made_by}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    print(f"{len(questions)} answers in {options.output}" + (f", {done} of them from before" if done else ""))


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Lines with `question`, or with what rows of any shape have but their answer; blank ones are skipped."""
    with explained(f"--questions={path}: cannot be read", "; use a text file in UTF-8"):
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
    asked = {f"--questions={path}: line {number}": line for number, line in enumerate(lines, 1) if line.strip()}
    if not asked:
        raise SettingsError(f'--questions={path}: holds no question; use a line such as {{"question": "..."}} for each')
    return [read_question(where, line) for where, line in asked.items()]


def read_question(where: str, line: str) -> dict[str, Any]:
    with explained(f"{where} is not a JSON object"):
        row = object_in(line)
    text = row.get("question", row.get("instruction", row.get("prompt")))
    given = row.get("input", row.get("context", ""))
    if row.get("messages", row.get("conversations")) is None and not isinstance(text, dict | list):
        if not isinstance(text, str) or not text.strip():
            raise SettingsError(f'{where} has no text in "question" or "instruction"')
        if isinstance(given, dict | list):
            raise SettingsError(f'{where} has a {type(given).__name__} in "input"; use text')
    with explained(f"{where} cannot be asked"):
        asked = asked_in(row)
        turns = up_to_question(asked.turns)
    if len(turns) == 1 and "input" in turns[0]:
        return {"instruction": text, "input": given}
    return {"messages": turns} | ({"tools": asked.tools} if asked.tools else {})


def up_to_question(turns: Sequence[Turn]) -> list[Turn]:
    """A conversation up to the last turn that asks: answers that follow it are left out."""
    turns = list(turns)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        raise ValueError("its messages ask nothing")
    return turns


def kept_answers(path: Path, questions: Sequence[dict[str, Any]], made_by: str) -> int:
    """How many answers `path` already holds; a line that was cut off in the middle is removed.

    Raises SettingsError if the file answers other questions, or another adapter or other options made its answers.
    """
    with explained(f"--output={path}: cannot be continued", "; choose another file"):
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        kept = [json.loads(line) for line in whole.splitlines()]
        asked = [row.items() <= line.items() and "answer" in line for line, row in zip(kept, questions, strict=False)]
        if len(kept) > len(questions) or not all(asked):
            raise ValueError("it answers other questions")
        if any(line.get("made_by") != made_by for line in kept):
            raise ValueError(f"another adapter or other options made its answers: made_by is not {made_by}")
        if whole != data:
            path.write_bytes(whole)
    return len(kept)


# --- measurements ---------------------------------------------------------------------------------


def evaluate(answerer: Answerer, options: argparse.Namespace) -> None:
    """Print how good the adapter, and with --compare the base model, is on the rows of --evaluate; JSON to --output."""
    cfg = DatasetConfig(
        name=options.evaluate, subset=options.subset, split=options.split, columns=options.columns,
        category_column=options.category_column,
    )  # fmt: skip
    rows = load_rows(cfg)
    with answerer.prompting():
        partition = tokenize_rows(rows, answerer.tokenizer, answerer.template, options.seq_length)
    why = left_out(len(rows), partition.reasons)
    if not len(partition):
        raise SettingsError(f"--evaluate={options.evaluate}: {why}")
    data = held_out(partition, np.arange(len(partition)), rows, cfg.category_column)
    asked = options.batch_size * options.seq_length, options.answers, options.max_new_tokens
    found = {name: figures(score(answerer.model, answerer.tokenizer, data, *asked)) for name in answerer.models()}
    answered = f"{min(options.answers, len(partition))} answered in at most {options.max_new_tokens} tokens"
    what = f"{len(partition)} rows of {options.evaluate}, {answered}; {answerer.name}"
    print(*filter(None, (what, why)), sep="\n")
    Console(highlight=False).print(table_of(found))
    if options.output:
        with writing("output", options.output):
            write_json(options.output, {"measured": what} | found)


def table_of(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """A line for each category and one for all; the figures of several models in one cell, base model first."""
    shown = {"loss": ".3f", "token_accuracy": ".1%", "exact_match": ".1%", "rouge_l": ".3f"}
    *_, last = found.values()
    columns = [key for key in shown if key in last]
    table = Table("", *(key.replace("_", " ") for key in columns), box=SIMPLE, title=" → ".join(found))
    lines = [(name, [figure["by_category"][name] for figure in found.values()]) for name in last.get("by_category", {})]
    for name, models in [*lines, ("all", list(found.values()))]:
        cells = (" → ".join(format(m[key], shown[key]) if key in m else "–" for m in models) for key in columns)
        table.add_row(Text(name), *cells)
    return table
