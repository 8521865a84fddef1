"""Answer with a tuned model, or measure it, with the prompt of its training."""

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers import GenerationConfig, TextStreamer, set_seed

import model as adapters
from dataset import as_message, encode_prompt, end_ids, load_rows, tokenize_rows
from exchange.scores import figures
from learning.evaluation import HeldOut, generate, held_out, score
from learning.tuned import PICKLED_FILE, TOKENIZER_FILES, choose_template, find_tuned, told_of
from settings.schema import DatasetConfig, RunError, SettingsError
from utils import file_sha256, let_others_read, local_path, shortened, write_json


@contextmanager
def templated(options: argparse.Namespace) -> Iterator[None]:
    """Answer a template that fails, which is a program, with one line."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(str(error).replace("dataset.template", "--template")) from error
    except Exception as error:
        raise SettingsError(
            f"--template={options.template or 'of the adapter'}: makes no prompt ({shortened(error, 200)}); "
            "choose another, such as --template=alpaca"
        ) from error


class Answerer:
    """A tuned model with its tokenizer and prompt. The weights are loaded when they are first needed."""

    def __init__(self, checkpoint: Path, options: argparse.Namespace) -> None:
        self.options, self.tuned = options, find_tuned(checkpoint, options)
        self.tokenizer = self.tuned.tokenizer
        self.template = choose_template(options.template, checkpoint, self.tokenizer)
        self.name = f"{checkpoint.resolve().name}, quantization {self.tuned.cfg.quantization}"
        self.prompt([as_message({"instruction": "x"})])

    @functools.cached_property
    def model(self) -> Any:
        """Base model and adapter on the device; what is drawn afterwards depends on --seed alone."""
        with told_of(self.tuned.checkpoint):
            base = adapters.load_base(self.tuned.cfg)
        model = self.tuned.load(base)
        set_seed(self.options.seed)
        return model

    @property
    def made_by(self) -> str:
        """A short digest of what decides an answer: the adapter, the prompt, and how tokens are chosen."""
        names = (adapters.ADAPTER_CONFIG_FILE, adapters.ADAPTER_FILE, PICKLED_FILE, *TOKENIZER_FILES)
        files = [file_sha256(self.tuned.checkpoint / name) for name in names]
        options = self.options
        chosen = [options.temperature, options.top_p, options.max_new_tokens, options.seed]
        folder, name = self.tuned.base_folder, self.tuned.cfg.name
        place = str(folder.resolve()) if local_path(name) else f"{name}@{folder.name}"  # named by its commit
        base = [place, self.tuned.cfg.quantization]
        facts = [files, base, self.template, chosen]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        with templated(self.options):
            return encode_prompt(self.tokenizer, self.template, messages)

    def generate(self, prompts: Sequence[list[int]], streamer: Any = None) -> list[list[int]]:
        """New token ids after each prompt, up to and without EOS."""
        options, count = self.options, len(prompts)
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
        chosen = (sampling if options.temperature else {}) | {"streamer": streamer}
        return generate(self.model, self.tokenizer, prompts, options.max_new_tokens, count, **chosen)

    def answer(self, messages: Sequence[dict[str, str]], stream: bool = True) -> str:
        """One answer; printed word by word while it is made, if `stream`."""
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        return self.text(self.generate([self.prompt(messages)], streamer)[0])

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()


# --- what can be asked for ------------------------------------------------------------------------


def ask(answerer: Answerer, options: argparse.Namespace) -> None:
    """Answer --question; with --compare by the base model first."""
    messages = [as_message({"instruction": options.question, "input": options.input})]
    if options.compare:
        print("base model:")
        with answerer.model.disable_adapter():
            answerer.answer(messages)
        print("\nwith the adapter:")
        set_seed(options.seed)
    answerer.answer(messages)


def chat(answerer: Answerer) -> None:
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
            history.append({"role": "assistant", "content": answerer.answer(history)})


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Lines with `question`, or `instruction` and `input`; blank ones are skipped.

    Raises:
        SettingsError: with the number of the line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--questions={path}: cannot be read ({error}); use a text file in UTF-8") from error
    questions = [read_question(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise SettingsError(f'--questions={path}: holds no question; use a line such as {{"question": "..."}} for each')
    return questions


def read_question(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        text, given = row.get("question", row.get("instruction")), row.get("input", "")
        f"{text}{given}".encode()  # half a character outside of the basic plane is no text
    except (ValueError, AttributeError, RecursionError) as error:
        raise SettingsError(f"--questions={path}: line {number} is not a JSON object ({error})") from error
    if not isinstance(text, str) or not text.strip():
        raise SettingsError(f'--questions={path}: line {number} has no text in "question" or "instruction"')
    if isinstance(given, dict | list):
        raise SettingsError(f'--questions={path}: line {number} has a {type(given).__name__} in "input"; use text')
    return {"instruction": text, "input": given}


def kept_answers(path: Path, questions: Sequence[dict[str, Any]], made_by: str) -> int:
    """How many answers `path` already holds; a line that was cut off in the middle is removed.

    Raises:
        SettingsError: if the file answers other questions, or another adapter or other options made its answers.
    """
    if not path.exists():
        return 0
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"--output={path}: cannot be read ({error.strerror}); choose another file") from error
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    try:
        kept = [json.loads(line) for line in lines]
        same = all(
            "answer" in line and all(line[key] == row[key] for key in row)
            for line, row in zip(kept, questions, strict=False)
        )
    except (ValueError, KeyError, TypeError):
        same = False
    if not same or len(lines) > len(questions):
        raise SettingsError(f"--output={path}: exists and answers other questions; choose another file")
    if any(line.get("made_by") != made_by for line in kept):
        raise SettingsError(
            f"--output={path}: exists, and another adapter or other options made its answers "
            f"(made_by is not {made_by}); choose another file"
        )
    if len(whole) < len(data):
        path.write_bytes(whole)
    return len(lines)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Answer a full disk, and whatever else cannot be written, with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shortened(error, 200)
        raise SettingsError(f"--{option}={path}: cannot be written ({reason}); make room, or choose another") from error


def answer_all(
    answerer: Answerer, options: argparse.Namespace, questions: Sequence[dict[str, Any]], done: int = 0
) -> None:
    """Answer --questions in batches, a line each to --output, in their order; continues after what is there."""
    from rich.progress import track

    batches, made_by = range(done, len(questions), options.batch_size), {"made_by": answerer.made_by}
    assert not batches or answerer.model  # loaded before the clock runs
    with writing("output", options.output), options.output.open("a", encoding="utf-8") as file:
        for start in track(list(batches), description="answering"):
            for record in answered(answerer, questions[start : start + options.batch_size]):
                file.write(json.dumps(record | made_by, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    print(f"{len(questions)} answers in {options.output}" + (f", {done} of them from before" if done else ""))


def answered(answerer: Answerer, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    prompts = [answerer.prompt([as_message(row)]) for row in rows]
    for row, ids in zip(rows, answerer.generate(prompts), strict=True):
        yield row | {"answer": answerer.text(ids)}


def evaluate(answerer: Answerer, options: argparse.Namespace) -> None:
    """Print how good the adapter, and with --compare the base model, is on the rows of --evaluate; JSON to --output."""
    cfg = DatasetConfig(name=options.evaluate, split=options.split, category_column=options.category_column)
    try:
        rows = load_rows(cfg)
    except (SettingsError, RunError) as error:
        words = str(error).replace("dataset.name=", "--evaluate=").replace("dataset.split=", "--split=")
        raise type(error)(words) from error
    with templated(options):
        partition = tokenize_rows(rows, answerer.tokenizer, answerer.template, options.seq_length)
    if not len(partition):
        raise SettingsError(f"--evaluate={options.evaluate}: none of its rows has an output")
    data = held_out(partition, np.arange(len(partition)), rows, cfg.category_column)
    found = {}
    if options.compare:
        with answerer.model.disable_adapter():
            found["base model"] = measured(answerer, data, options)
    found["with the adapter"] = measured(answerer, data, options)
    console = Console(highlight=False)
    answered = f"{min(options.answers, len(partition))} answered in at most {options.max_new_tokens} tokens"
    what = f"{len(partition)} rows of {options.evaluate}, {answered}; {answerer.name}"
    console.print(what, soft_wrap=True, markup=False)
    console.print(table_of(found))
    if options.output:
        with writing("output", options.output):
            write_json(options.output, {"measured": what} | found)


def measured(answerer: Answerer, data: HeldOut, options: argparse.Namespace) -> dict[str, Any]:
    asked = options.batch_size, options.answers, options.max_new_tokens
    return figures(score(answerer.model, answerer.tokenizer, data, *asked))


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


def merge(checkpoint: Path, options: argparse.Namespace) -> None:
    """Write the adapter merged into the unquantized base model, with tokenizer and chat template.

    The sum is taken in float32: bfloat16 weights are too coarse for what an adapter adds.
    """
    tuned = find_tuned(checkpoint, options, merging=True)
    if tuned.cfg.quantization != "none":
        raise SettingsError(
            f"--merge={options.merge}: the base model {tuned.cfg.name} is stored in {tuned.cfg.quantization} bits, and "
            "a sum needs plain weights; name the unquantized model with --base"
        )
    tokenizer = tuned.tokenizer
    tokenizer.chat_template = choose_template(options.template, checkpoint, tokenizer)
    with told_of(checkpoint):
        base = adapters.load_weights(tuned.cfg, torch.float32, "cpu")
    model = tuned.load(base)
    untie(model)
    try:
        merged = model.merge_and_unload().to(getattr(torch, options.merge_dtype))
    except (RuntimeError, ValueError, NotImplementedError) as error:  # such as LoRA with biases
        raise SettingsError(
            f"--merge={options.merge}: PEFT cannot merge this adapter ({shortened(error, 200)}); load it beside its "
            "base model instead"
        ) from error
    merged.generation_config = generation_settings(merged.generation_config, sorted(end_ids(tokenizer)))
    with writing("merge", options.merge):
        merged.save_pretrained(options.merge)
        tokenizer.save_pretrained(options.merge)
        let_others_read(*options.merge.glob("*.safetensors"))
    print(f"merged model: {options.merge}")


def generation_settings(base: GenerationConfig, ends: list[int]) -> GenerationConfig:
    """The base model's settings of generation with `ends`, or nothing but those if its own contradict each other."""
    base.eos_token_id = ends
    try:
        base.validate(strict=True)
    except ValueError:  # as with a temperature and no sampling: transformers reads such a file, and writes none
        return GenerationConfig(bos_token_id=base.bos_token_id, eos_token_id=ends)
    return base


def untie(model: Any) -> None:
    """Give an output embedding that shares its weights with the input one a copy, if LoRA changes only one of them."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    inner = [getattr(layer, "base_layer", layer) for layer in layers]
    if None not in layers and inner != layers and inner[0].weight is inner[1].weight:
        inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
