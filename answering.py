"""Find a trained adapter, load it into its base model, and answer or be measured with the prompt of its training."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TextStreamer, set_seed

import model as adapters
from config import DatasetConfig, ModelConfig, SettingsError
from dataset import as_message, encode_prompt, find_template, load_rows, tokenize_rows
from evaluation import HeldOut, figures, generate, held_out, score
from runfolder import folder_of, rounds_in
from utils import DIGESTS_FILE, quiet_transformers, torn_files, write_json

RUN_FOLDER_LOOK = (
    "a run folder holds peft_<round>/ folders, each with adapter_config.json and adapter_model.safetensors"
)


def run(options: argparse.Namespace) -> None:
    """Do what the options of test.py ask for. Raises SettingsError for whatever they name that is not there."""
    quiet_transformers()
    if options.tasks:
        from harness import run_tasks  # of an optional package: it may be missing
    questions = read_questions(options.questions) if options.questions else []
    done = kept_answers(options.output, questions) if options.questions else 0
    checkpoint = find_checkpoint(options.peft_path)
    if options.merge:
        return merge(checkpoint, options)
    set_seed(options.seed)
    answerer = Answerer(checkpoint, options)
    if options.evaluate:
        return evaluate(answerer, options)
    if options.tasks:
        return run_tasks(answerer, options)
    if options.questions:
        return answer_all(answerer, options, questions, done)
    return chat(answerer) if options.chat else ask(answerer, options)


# --- find and load --------------------------------------------------------------------------------


def find_checkpoint(name: str) -> Path:
    """The adapter folder that `--peft-path` means: itself, or the last checkpoint of a run folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise SettingsError(f"--peft-path={name}: no such folder; {RUN_FOLDER_LOOK}")
    if (folder / adapters.ADAPTER_CONFIG_FILE).is_file():
        return whole(folder)
    rounds = rounds_in(folder)
    if not rounds:
        raise SettingsError(f"--peft-path={name}: no adapter here; {RUN_FOLDER_LOOK}")
    return whole(folder_of(folder, rounds[0]))


def whole(checkpoint: Path) -> Path:
    """`checkpoint`, unless it says itself that it is damaged."""
    if (checkpoint / DIGESTS_FILE).exists() and (torn := torn_files(checkpoint)):
        raise SettingsError(f"--peft-path={checkpoint}: damaged ({', '.join(torn)}); name another checkpoint")
    return checkpoint


def base_settings(checkpoint: Path, quantization: str | None, trust: bool = False) -> ModelConfig:
    """The base model of an adapter, quantized as in training; unquantized if the adapter came from elsewhere."""
    try:
        saved = json.loads((checkpoint / adapters.ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        name = saved["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"--peft-path={checkpoint}: adapter_config.json is broken ({error!r})") from error
    state = checkpoint / "state.json"
    try:
        trained = json.loads(state.read_text(encoding="utf-8")).get("quantization") if state.is_file() else None
    except ValueError as error:
        raise SettingsError(
            f"--peft-path={checkpoint}: state.json is broken; choose --quantization and remove it"
        ) from error
    return ModelConfig(
        name=str(name), quantization=quantization or trained or "none", trust_remote_code=trust, cache_folder=None
    )


def check_shapes(cfg: ModelConfig, checkpoint: Path) -> None:
    """Raise SettingsError, before any weights are loaded, if the adapter does not fit the base model."""
    lora = LoraConfig.from_pretrained(str(checkpoint))
    lora.inference_mode = False  # so that the adapter counts as trainable, and is listed
    expected = adapters.adapter_shapes(adapters.read_config(cfg), lora)
    try:
        with safe_open(checkpoint / adapters.ADAPTER_FILE, framework="np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a missing or torn file
        raise SettingsError(f"--peft-path={checkpoint}: {adapters.ADAPTER_FILE} can not be read ({error})") from error
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise SettingsError(
                f"--peft-path={checkpoint}: does not fit the base model {cfg.name}: {name} is {found.get(name)}, "
                f"the base model needs {expected.get(name)}"
            )


def choose_template(name: str | None, checkpoint: Path, tokenizer: Any) -> str:
    """The chat template: the one asked for, else the adapter's own, else the tokenizer's, else Alpaca's."""
    saved = checkpoint / adapters.TEMPLATE_FILE
    if name is None and saved.is_file():
        return saved.read_text(encoding="utf-8")
    if name is None and isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return find_template(name or "alpaca").read_text(encoding="utf-8")
    except SettingsError as error:
        raise SettingsError(str(error).replace("dataset.template", "--template").replace(", tokenizer", "")) from error


class Answerer:
    """A tuned model with its tokenizer and prompt."""

    def __init__(self, checkpoint: Path, options: argparse.Namespace) -> None:
        cfg = base_settings(checkpoint, options.quantization, options.trust_remote_code)
        check_shapes(cfg, checkpoint)
        self.tokenizer = adapters.read_tokenizer(cfg)
        self.template = choose_template(options.template, checkpoint, self.tokenizer)
        self.model: Any = PeftModel.from_pretrained(adapters.load_base(cfg), str(checkpoint)).eval()
        self.options, self.name = options, f"{checkpoint.resolve().name}, quantization {cfg.quantization}"

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
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
    """Lines with `question`, or `instruction` and `input`. Raises SettingsError with the line's number."""
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--questions={path}: can not be read ({error})") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            text = row.get("question", row.get("instruction"))
        except (ValueError, AttributeError) as error:
            raise SettingsError(f"--questions={path}: line {number} is not a JSON object ({error})") from error
        if not isinstance(text, str) or not text.strip():
            raise SettingsError(f'--questions={path}: line {number} has no text in "question" or "instruction"')
        questions.append({"instruction": text, "input": row.get("input", "")})
    return questions


def kept_answers(path: Path, questions: Sequence[dict[str, Any]]) -> int:
    """How many answers `path` already holds; a line that was cut off in the middle is removed.

    Raises:
        SettingsError: if the file answers other questions.
    """
    if not path.parent.is_dir():
        raise SettingsError(f"--output={path}: there is no folder {path.parent}")
    if not path.exists():
        return 0
    data = path.read_bytes()
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
    if len(whole) < len(data):
        path.write_bytes(whole)
    return len(lines)


def answer_all(
    answerer: Answerer, options: argparse.Namespace, questions: Sequence[dict[str, Any]], done: int = 0
) -> None:
    """Answer --questions in batches, a line each to --output, in their order; goes on behind what is there."""
    from rich.progress import track

    batches = range(done, len(questions), options.batch_size)
    with options.output.open("a", encoding="utf-8") as file:
        for start in track(list(batches), description="answering"):
            for record in answered(answerer, questions[start : start + options.batch_size]):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
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
    except SettingsError as error:
        words = str(error).replace("dataset.name=", "--evaluate=").replace("dataset.split=", "--split=")
        raise SettingsError(words) from error
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
        write_json(options.output, {"measured": what} | found)


def measured(answerer: Answerer, data: HeldOut, options: argparse.Namespace) -> dict[str, Any]:
    batch, answers = options.batch_size, min(options.answers, len(data.rows))
    return figures(score(answerer.model, answerer.tokenizer, data, batch, answers, options.max_new_tokens))


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
    cfg = base_settings(checkpoint, "none", options.trust_remote_code)
    check_shapes(cfg, checkpoint)
    if options.merge.exists() and any(options.merge.iterdir()):
        raise SettingsError(f"--merge={options.merge}: the folder is not empty; choose another")
    tokenizer = adapters.read_tokenizer(cfg)
    tokenizer.chat_template = choose_template(options.template, checkpoint, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(adapters.source_of(cfg.name), dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload()
    merged = merged.to(getattr(torch, options.merge_dtype))
    merged.generation_config.eos_token_id = tokenizer.eos_token_id
    merged.save_pretrained(options.merge)
    tokenizer.save_pretrained(options.merge)
    print(f"merged model: {options.merge}")
