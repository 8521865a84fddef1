"""test.py: the prompt of training, greedy decoding as generate's, batches as single questions, and what is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dataset
import model as adapters
import test as cli
from client import GLOBAL_SET, Worker, evaluate_adapter
from exchange.scores import figures
from learning import answering, tuned
from learning.evaluation import generate, held_out, losses_on, prompt_of, score
from runs.runfolder import find_checkpoint
from settings.schema import RunError, SettingsError
from tests.federation import conversations, small
from utils import SUITE_FOLDER, read_json_lines

ALPACA = dataset.find_template("alpaca").read_text()
HELDOUT = read_json_lines(SUITE_FOLDER / "quickstart/data/heldout.jsonl")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run folder whose adapter does something, though nothing sensible."""
    folder = tmp_path_factory.mktemp("run")
    cfg = small().model
    lora = adapters.lora_config(cfg)
    shapes = adapters.adapter_shapes(adapters.empty_model(adapters.read_config(cfg), cfg), lora)
    draw = np.random.default_rng(1)
    for number in (2, 10):
        adapter = {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
        adapters.save_adapter(folder / f"peft_{number}", adapter, lora, ALPACA)
        (folder / f"peft_{number}" / "state.json").write_text(json.dumps({"round": number, "quantization": "none"}))
    return folder


def options(run_folder, *extra: str):
    asks = any(option.startswith(("--question", "--chat")) for option in extra)
    return cli.parse([f"--peft-path={run_folder}", *(["--temperature=0", "--max-new-tokens=24"] * asks), *extra])


@pytest.fixture(scope="module")
def answerer(run_folder):
    return answering.Answerer(find_checkpoint(str(run_folder)), options(run_folder, "--question=x"))


def test_a_run_folder_means_its_last_checkpoint(run_folder):
    assert find_checkpoint(str(run_folder)).name == "peft_10"
    assert find_checkpoint(str(run_folder / "peft_2")).name == "peft_2"


@pytest.mark.parametrize("quantization", ["4", "8", "none"])
def test_base_model_is_loaded_as_it_was_trained_unless_told_otherwise(quantization, run_folder, tmp_path):
    checkpoint = tmp_path / "peft_1"
    checkpoint.mkdir()
    saved = {"base_model_name_or_path": "quickstart/model"}
    asked, told = options(checkpoint, "--question=x"), options(checkpoint, "--question=x", "--quantization=8")
    assert tuned.base_settings(saved, checkpoint, asked).quantization == "none"  # an adapter from elsewhere
    (checkpoint / "state.json").write_text(json.dumps({"quantization": quantization}))
    assert tuned.base_settings(saved, checkpoint, asked).quantization == quantization
    assert tuned.base_settings(saved, checkpoint, told).quantization == "8"


def test_template_is_what_was_asked_for_else_the_adapters_else_the_tokenizers_else_alpacas(tmp_path):
    own, none = SimpleNamespace(chat_template="{{ 'own' }}"), SimpleNamespace(chat_template=None)
    assert tuned.choose_template(None, tmp_path, none) == ALPACA
    assert tuned.choose_template(None, tmp_path, own) == own.chat_template
    (tmp_path / "chat_template.jinja").write_text("{{ 'saved' }}")
    assert tuned.choose_template(None, tmp_path, own) == "{{ 'saved' }}"
    assert tuned.choose_template("tokenizer", tmp_path, own) == own.chat_template
    assert tuned.choose_template("alpaca", tmp_path, own) == ALPACA


def test_prompt_ids_equal_those_of_training_up_to_the_response(answerer):
    for row in HELDOUT[:20]:
        partition = dataset.tokenize_rows(conversations([row]), answerer.tokenizer, ALPACA, 512)
        assert answerer.prompt([dataset.as_message(row)]) == prompt_of(partition.row(0))


def test_greedy_answer_equals_generate_on_the_same_ids(answerer):
    for row in HELDOUT[:5]:
        prompt = answerer.prompt([dataset.as_message(row)])
        direct = answerer.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=answerer.tokenizer.eos_token_id,
            pad_token_id=answerer.tokenizer.eos_token_id,
        )[0, len(prompt) :].tolist()
        until = (direct + [answerer.tokenizer.eos_token_id]).index(answerer.tokenizer.eos_token_id)
        assert generate(answerer.model, answerer.tokenizer, [prompt], 24, 512) == [direct[:until]]
        assert answerer.answers([prompt]) == [answerer.tokenizer.decode(direct, skip_special_tokens=True).strip()]


def test_generation_stops_at_the_end_of_sequence_token(answerer, monkeypatch):
    end = answerer.tokenizer.eos_token_id
    monkeypatch.setattr(
        answerer.model, "generate", lambda input_ids, **_: torch.tensor([[1, 1, 5, 6, end, 7], [1, 1, 5, 6, 8, 9]])
    )
    assert generate(answerer.model, answerer.tokenizer, [[1], [1, 1]], 4, 512) == [[5, 6, 8, 9], [5, 6]]


def test_merged_model_equals_adapter_on_an_unquantized_base(run_folder, tmp_path):
    cli.run(options(run_folder, f"--merge={tmp_path / 'merged'}"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(SUITE_FOLDER / "quickstart/model", dtype=torch.float32)
    by_hand = PeftModel.from_pretrained(base, run_folder / "peft_10").eval()
    assert tokenizer.chat_template == ALPACA
    for row in HELDOUT[:5]:
        message = dataset.as_message(row)
        ids = torch.tensor([dataset.encode_prompt(tokenizer, tokenizer.chat_template, [message])])
        with torch.no_grad():
            assert (merged(ids).logits - by_hand(ids).logits).abs().max() < 1e-3
        answers = [m.generate(ids, max_new_tokens=16, do_sample=False).tolist() for m in (merged, by_hand)]
        assert answers[0] == answers[1]
    with pytest.raises(SettingsError, match="is not empty"):
        cli.run(options(run_folder, f"--merge={tmp_path / 'merged'}"))


def write_questions(path: Path, count: int) -> Path:
    rows = [{"instruction": row["instruction"], "input": row["input"]} for row in HELDOUT[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_batch_answers_equal_single_ones(run_folder, tmp_path, monkeypatch):
    # so that only padding could make a difference, not bfloat16 rounding
    monkeypatch.setattr(adapters, "compute_dtype", lambda *_: torch.float32)
    questions = answering.read_questions(write_questions(tmp_path / "q.jsonl", 24))
    files = [f"--questions={tmp_path / 'q.jsonl'}", f"--output={tmp_path / 'a.jsonl'}"]
    cli.run(options(run_folder, *files, "--batch-size=7"))
    answerer = answering.Answerer(run_folder / "peft_10", options(run_folder, "--question=x"))
    assert answerer.model.dtype == torch.float32
    single = [answerer.answers([answerer.prompt([dataset.as_message(row)])])[0] for row in questions]
    assert [line["answer"] for line in read_json_lines(tmp_path / "a.jsonl")] == single


@pytest.mark.slow
def test_interrupted_batch_goes_on_where_it_stopped(run_folder, tmp_path):
    write_questions(tmp_path / "q.jsonl", 60)
    arguments = [f"--questions={tmp_path / 'q.jsonl'}", f"--output={tmp_path / 'a.jsonl'}", "--batch-size=4"]
    command = [
        sys.executable,
        "test.py",
        f"--peft-path={run_folder}",
        "--temperature=0",
        "--max-new-tokens=16",
        *arguments,
    ]
    process = subprocess.Popen(command, cwd=SUITE_FOLDER, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    output, deadline = tmp_path / "a.jsonl", time.monotonic() + 120
    while not (output.exists() and output.read_bytes().count(b"\n") >= 8) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = output.read_bytes().count(b"\n")
    assert 8 <= done < 60
    output.write_bytes(output.read_bytes() + b'{"instruction": "torn')  # as if killed in the middle of a line
    finished = subprocess.run(command, cwd=SUITE_FOLDER, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert f"{done} of them from before" in finished.stdout
    answered = [(line["instruction"], line["input"]) for line in read_json_lines(output)]
    assert answered == [(row["instruction"], row["input"]) for row in HELDOUT[:60]]


def test_answers_to_other_questions_are_never_continued(tmp_path):
    questions = [{"instruction": "a", "input": "1"}, {"instruction": "b", "input": ""}]
    line = tmp_path / "a.jsonl"
    line.write_text(json.dumps(questions[0] | {"answer": "x\u2028y", "made_by": "m"}, ensure_ascii=False) + "\n")
    assert answering.kept_answers(line, questions, "m") == 1
    with pytest.raises(SettingsError, match="it answers other questions"):
        answering.kept_answers(line, [], "m")
    for other in ({"instruction": "a", "input": "2", "answer": "x", "made_by": "m"}, questions[0]):
        line.write_text(json.dumps(other) + "\n")
        before = line.read_bytes()
        with pytest.raises(
            SettingsError, match=r"--output=.*a.jsonl: cannot be continued \(it answers other questions"
        ):
            answering.kept_answers(line, questions, "m")
        assert line.read_bytes() == before


def test_answers_of_another_adapter_or_with_other_options_are_never_continued(run_folder, tmp_path):
    files = [f"--questions={write_questions(tmp_path / 'q.jsonl', 3)}", f"--output={tmp_path / 'a.jsonl'}"]
    asked = [*files, "--max-new-tokens=2", "--quantization=none"]
    cli.run(options(run_folder, *asked))
    before = (tmp_path / "a.jsonl").read_bytes()
    lines = read_json_lines(tmp_path / "a.jsonl")
    assert [list(line) for line in lines] == [["instruction", "input", "answer", "made_by"]] * 3
    cli.run(options(run_folder, *asked))  # the same again: everything is there already
    cli.run(options(run_folder / "peft_10", *asked))
    (tmp_path / "vicuna.jinja").write_text(dataset.find_template("vicuna_v1.1").read_text())
    changes = ["--seed=1", "--top-p=0.5", "--temperature=0.5", "--max-new-tokens=3", "--quantization=8"]
    for change in (*changes, "--template=vicuna_v1.1", f"--template={tmp_path / 'vicuna.jinja'}"):
        with pytest.raises(
            SettingsError, match=r"--output=.*: cannot be continued \(another adapter .* choose another file"
        ):
            cli.run(options(run_folder, *asked, change))
    with pytest.raises(SettingsError, match="another adapter"):
        cli.run(options(run_folder / "peft_2", *asked))
    assert (tmp_path / "a.jsonl").read_bytes() == before
    for line in lines:  # as answers were written before they said who made them
        del line["made_by"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SettingsError, match="another adapter"):
        cli.run(options(run_folder, *asked))


QUESTIONS = {
    "blank lines": b'{"question":"hi"}\n\n{"question":"ho"}\n \t\n\n',
    "byte order mark": b'\xef\xbb\xbf{"question":"hi"}\n{"question":"ho"}\n',
    "Windows": b'\xef\xbb\xbf{"question":"hi"}\r\n\r\n{"question":"ho"}\r\n',
    "no end": b'{"instruction":"hi"}\n{"instruction":"ho", "input": ""}',
}


@pytest.mark.parametrize("content", QUESTIONS.values(), ids=QUESTIONS)
def test_questions_are_read_as_editors_write_them(content, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(content)
    asked = [{"instruction": "hi", "input": ""}, {"instruction": "ho", "input": ""}]
    assert answering.read_questions(tmp_path / "q.jsonl") == asked


def test_questions_may_be_conversations_of_which_the_last_turn_is_asked(answerer, tmp_path):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    turns.append({"role": "user", "content": "And now?"})
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns]
    answered = {"from": "gpt", "value": "the right answer"}
    lines = [{"messages": turns}, {"conversations": [*sharegpt, answered]}, {"prompt": "And now?"}]
    lines += [{"prompt": turns}, {"messages": json.dumps(turns)}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = answering.read_questions(tmp_path / "q.jsonl")
    assert asked == [
        {"messages": turns},
        {"messages": turns},
        {"instruction": "And now?", "input": ""},
        asked[0],
        asked[0],
    ]
    text = answerer.tokenizer.decode(answerer.prompt(asked[0]["messages"]))
    assert text.endswith("Hi.</s>### Instruction:\nAnd now?\n\n### Response:\n")


def test_questions_keep_what_stands_beside_them(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    lines = [
        b'{"instruction": "x", "context": "y", "response": "z"}',
        b'{"question": "x", "system": "s", "history": [["a", "b"]]}',
        b'{"messages": [{"role": "user", "content": 1.50}], "system": "s", "tools": '
        + json.dumps(tools).encode()
        + b"}",
    ]
    (tmp_path / "q.jsonl").write_bytes(b"\n".join(lines))
    dolly, alpaca, chat = answering.read_questions(tmp_path / "q.jsonl")
    assert dolly == {"instruction": "x", "input": "y"}
    turns = [(turn["role"], turn["content"]) for turn in alpaca["messages"]]
    assert turns == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "x")]
    assert chat["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "1.50"}]
    assert chat["tools"] == tools


NO_QUESTIONS = {
    b'{"messages": []}': "line 1 cannot be asked (its messages ask nothing)",
    b'{"messages": [{"role": "x", "content": "y"}]}': "line 1 cannot be asked",
    b"": "holds no question",
    b"\xef\xbb\xbf\r\n \n": "holds no question",
    b'\n\n{"question": 7}\n': 'line 3 has no text in "question"',
    b'{"question": "x", "input": {"a": 1}}': 'line 1 has a dict in "input"',
    b'{"question": "\\ud800"}': "line 1 is not a JSON object",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "line 1 is not a JSON object",
    b'{"question": "x", "question": "y"}': "line 1 is not a JSON object ('question' is named twice)",
    b"[1]": "line 1 is not a JSON object (it is something else)",
    b"[" * 100_000: "line 1 is not a JSON object",
    '{"question": "x"}'.encode("utf-16"): "cannot be read",
}


@pytest.mark.parametrize(("content", "words"), NO_QUESTIONS.items())
def test_files_without_questions_are_refused(content, words, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(content)
    with pytest.raises(SettingsError, match="--questions=.*") as raised:
        answering.read_questions(tmp_path / "q.jsonl")
    assert words in str(raised.value)


def test_a_disk_that_is_full_gets_one_line(run_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    files = [f"--questions={write_questions(tmp_path / 'q.jsonl', 1)}", f"--output={tmp_path / 'a.jsonl'}"]
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SettingsError, match=r"--output=.*: cannot be written \(No space left on device\); make room"):
        cli.run(options(run_folder, *files, "--max-new-tokens=1"))


def test_a_gpu_that_is_too_small_gets_one_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(cli, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(cli, "start", full)
    asked = cli.parse(["--peft-path=x", "--question=Why?"])
    with pytest.raises(RunError, match=r"^out of GPU memory \(CUDA out of memory.*it helps: --quantization=4"):
        cli.run(asked)


def test_conversation_prompt_holds_its_history(answerer):
    turns = [dataset.as_message({"instruction": "Hello"}), {"role": "assistant", "content": "Hi."}]
    text = answerer.tokenizer.decode(answerer.prompt([*turns, dataset.as_message({"instruction": "And now?"})]))
    assert text.endswith(
        "### Instruction:\nHello\n\n### Response:\nHi.</s>### Instruction:\nAnd now?\n\n### Response:\n"
    )
    assert text.count("Below is an instruction") == 1


REFUSED = {
    "no such folder": (["--peft-path=/no/such", "--question=x"], "--peft-path=/no/such: no such folder; a run folder"),
    "no adapter": (["--peft-path={empty}", "--question=x"], "no adapter here; a run folder holds peft_<round>/"),
    "empty question": (["--peft-path={run}", "--question= "], "--question= : is empty"),
    "nothing to do": (["--peft-path={run}"], "use one of --question, --chat, --questions, --evaluate, --tasks and"),
    "two things": (["--peft-path={run}", "--question=x", "--chat"], "use one of"),
    "no output": (["--peft-path={run}", "--questions=q"], "go together"),
    "temperature": (["--peft-path={run}", "--question=x", "--temperature=-1"], "--temperature=-1.0: use a number"),
    "top p": (["--peft-path={run}", "--question=x", "--top-p=0"], "--top-p=0.0: use a number above 0"),
    "template": (["--peft-path={run}", "--question=x", "--template=no"], "--template=no: use alpaca, vicuna_v1.1"),
    "broken line": (["--peft-path={run}", "--questions={broken}", "--output={empty}/a"], "line 2 is not a JSON object"),
    "no text": (["--peft-path={run}", "--questions={blank}", "--output={empty}/a"], "line 1 has no text"),
    "missing base": (["--peft-path={lost}", "--question=x"], "--base=/lost/base: "),
    "other base": (["--peft-path={other}", "--question=x"], "does not fit the base model quickstart/model"),
    "torn adapter": (["--peft-path={torn}", "--question=x"], "adapter_model.safetensors cannot be read"),
}  # fmt: skip


WRONG = {
    "--temperature=nan": "--temperature=nan: use a number from 0 to 10",
    "--temperature=inf": "--temperature=inf: use a number from 0 to 10",
    "--temperature=-0.1": "--temperature=-0.1: use a number from 0 to 10",
    "--temperature=1e-40": "--temperature=1e-40: use 0 (greedy), or at least 0.001",
    "--temperature=warm": "--temperature: invalid float value: 'warm'; `python test.py --help`",
    "--top-p=nan": "--top-p=nan: use a number above 0 and at most 1",
    "--top-p=-inf": "--top-p=-inf: use a number above 0 and at most 1",
    "--top-p=1.01": "--top-p=1.01: use a number above 0 and at most 1",
    "--seed=-1": "--seed=-1: use a number from 0 to 4294967295",
    "--seed=4294967296": "--seed=4294967296: use a number from 0 to 4294967295",
    "--seed=1.5": "--seed: invalid int value: '1.5'",
    "--limit=0": "--limit=0: use a number from 1",
    "--num-fewshot=-1": "--num-fewshot=-1: use a number from 0 to 100",
    "--max-new-tokens=0": "--max-new-tokens=0: use a number from 1",
    "--batch-size=0": "--batch-size=0: use a number from 1",
    "--seq-length=15": "--seq-length=15: use a number from 16",
    "--answers=-1": "--answers=-1: use a number from 0",
    "--quantization=5": "--quantization: invalid choice: '5'",
    "--no-such": "unrecognized arguments: --no-such",
    "--question=\udcff": "--question: is not UTF-8 text",
    "--template=": "--template=: is empty",
    "--template={run}": "--template={run}: use alpaca, vicuna_v1.1, tokenizer, or the path of a Jinja file",
    "--template=tokenizer": "--template=tokenizer: this model's tokenizer has no chat template; use alpaca",
    "--template={broken_template}": "--template={broken_template}: makes no prompt",
    "--template={binary}": "--template={binary}: not a text file",
    "--include-path={file}": "--include-path={file}: is a file; name the folder",
    "--include-path={run}/no": "--include-path={run}/no: there is no such folder",
    "--output={run}/a": "--output={run}/a: goes with --questions, --evaluate or --tasks; leave it out",
    "--limit=3": "--limit=3: goes with --tasks; leave it out",
    "--merge-dtype=bfloat16": "--merge-dtype=bfloat16: goes with --merge; leave it out",
    "--batch-size=3": "--batch-size=3: goes with --questions, --evaluate or --tasks; leave it out",
    "--peft-path=": "--peft-path=: is empty",
    "--peft-path={file}": "--peft-path={file}: is a file; name the folder in which the adapter lies",
    "--peft-path=~nobody/x": "--peft-path=~nobody/x: no such folder",
    "--peft-path={long}": "no such folder",
}
WRONG_PLACES = {
    "--questions={run} --output={empty}/a": "--questions={run}: is a folder; name a file of JSON lines",
    "--questions={run}/no --output={empty}/a": "--questions={run}/no: there is no such file",
    "--questions= --output={empty}/a": "is a folder",
    "--questions={file} --output={empty}": "--output={empty}: is no ordinary file",
    "--questions={file} --output=/dev/null": "--output=/dev/null: is no ordinary file",
    "--questions={file} --output={file}": "--output={file}: is the data itself",
    "--questions={file} --output={run}/peft_2/adapter_config.json": "is one of the adapter's own files",
    "--questions={file} --output={empty}/a --compare": "--compare: goes with --question, --evaluate or --tasks",
    "--questions={file} --output={file}/a": "--output={file}/a: there is no folder {file}",
    "--questions={file} --output={empty}/{long}": "cannot be written (File name too long); choose another file",
    "--evaluate={rows} --output={rows}": "--output={rows}: is the data itself",
    "--evaluate={data} --output={rows}": "--output={rows}: is the data itself",
    "--evaluate=": "--evaluate=: is empty",
    "--evaluate={rows} --temperature=0": "--temperature=0.0: goes with --question, --chat or --questions; leave it out",
    "--evaluate={empty}": "--evaluate={empty}: ",
    "--tasks=": "--tasks=: is empty",
    "--tasks=x --max-new-tokens=9": "--max-new-tokens=9: goes with --question, --chat, --questions or --evaluate",
    "--merge={empty}/m --temperature=0": "--temperature=0.0: goes with --question, --chat or --questions; leave it out",
    "--merge={empty}/m --top-p=0.5": "--top-p=0.5: goes with --question, --chat or --questions; leave it out",
    "--merge={empty}/m --seed=1": "--seed=1: goes with --question, --chat or --questions; leave it out",
    "--merge={empty}/m --max-new-tokens=9": "--max-new-tokens=9: goes with --question, --chat, --questions or",
    "--merge={empty}/m --batch-size=9": "--batch-size=9: goes with --questions, --evaluate or --tasks; leave it out",
    "--merge={file}": "--merge={file}: {file} is a file; choose a new folder",
    "--merge={file}/a/b": "--merge={file}/a/b: {file} is a file; choose a new folder",
    "--merge={run}": "--merge={run}: the folder is not empty; choose another",
    "--merge={empty}/m --quantization=4": "--quantization=4: ",
}


@pytest.mark.parametrize("arguments", [*WRONG, *WRONG_PLACES])
def test_wrong_arguments_get_one_line_before_the_model_is_loaded(arguments, places, monkeypatch, capsys):
    asked = ["--peft-path={run}", *(["--question=x"] if arguments in WRONG else []), *arguments.split()]
    monkeypatch.setattr(sys, "argv", ["test.py", *(argument.format(**places) for argument in asked)])
    monkeypatch.setattr(adapters, "load_base", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert (WRONG | WRONG_PLACES)[arguments].format(**places) in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(places["empty"].iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_places_that_cannot_be_written_get_one_line(places, tmp_path, monkeypatch, capsys):
    tmp_path.chmod(0o500)
    for arguments in (f"--questions={places['file']} --output={tmp_path}/a", f"--merge={tmp_path}/m"):
        monkeypatch.setattr(sys, "argv", ["test.py", f"--peft-path={places['run']}", *arguments.split()])
        assert cli.main() == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.fixture(scope="module")
def places(run_folder, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    places = {name: folder / name for name in ("empty", "broken", "blank", "lost", "other", "torn")}
    for name in ("empty", "lost", "other", "torn"):
        places[name].mkdir()
    places["broken"].write_text('{"question": "fine"}\n{"question": \n')
    places["blank"].write_text('{"question": " "}\n')
    more = {"file": '{"question": "x"}\n', "broken_template": "{% if %}", "data/rows.jsonl": json.dumps(HELDOUT[0])}
    (folder / "data").mkdir()
    for name, text in more.items():
        (folder / name).write_text(text)
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    places |= {name: folder / name for name in ("file", "broken_template", "binary", "data")}
    places |= {"rows": folder / "data/rows.jsonl", "long": Path("x" * 300)}
    cfg = small().model
    lora = adapters.lora_config(cfg)
    for name in ("other", "lost"):
        adapter = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((9, 9), np.float32)}
        lora.base_model_name_or_path = "/lost/base" if name == "lost" else cfg.name
        places[name].rmdir()
        adapters.save_adapter(places[name], adapter, lora, ALPACA)
    for file in (run_folder / "peft_2").iterdir():
        content = file.read_bytes()
        (places["torn"] / file.name).write_bytes(content[:500] if file.suffix == ".safetensors" else content)
    return places | {"run": run_folder}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_gets_one_line_and_exit_code_2(case, places, monkeypatch, capsys):
    arguments, expected = REFUSED[case]
    monkeypatch.setattr(sys, "argv", ["test.py", *(argument.format(**places) for argument in arguments)])
    assert cli.main() == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert expected in error
    assert "\n" not in error


# --- measured on data and on tasks ----------------------------------------------------------------


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory) -> Path:
    """Seven held-out rows, one of each category."""
    chosen = list({row["category"]: row for row in HELDOUT}.values())
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return file


def test_measurements_equal_those_of_the_clients(run_folder, eval_file, tmp_path, capsys):
    asked = [f"--evaluate={eval_file}", "--compare", "--max-new-tokens=24", f"--output={tmp_path / 'out.json'}"]
    cli.run(options(run_folder, *asked))
    found = json.loads((tmp_path / "out.json").read_text())
    worker = Worker(small(f"dataset.eval_name={eval_file}", "evaluate.answers=7", "evaluate.max_new_tokens=24"))
    adapted = figures(evaluate_adapter(worker, adapters.load_adapter(run_folder / "peft_10"), GLOBAL_SET))
    base = figures(evaluate_adapter(worker, worker.initial, GLOBAL_SET))
    for ours, theirs in ((found["with the adapter"], adapted), (found["base model"], base)):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)  # the batches differ, and it is bfloat16
        assert (ours["tokens"], ours["answers"]) == (theirs["tokens"], theirs["answers"])
        assert ours["by_category"].keys() == theirs["by_category"].keys()
    shown = capsys.readouterr().out
    assert "7 rows of" in shown
    assert f"{found['base model']['loss']:.3f} → {found['with the adapter']['loss']:.3f}" in shown


def test_category_names_are_text_and_nothing_is_written_beside(run_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(HELDOUT[0] | {"category": name}) + "\n" for name in ("[/math]", "all", "[math]"))
    )
    monkeypatch.chdir(tmp_path)
    cli.run(options(run_folder, "--evaluate=rows.jsonl", "--answers=0", "--quantization=4"))
    shown = capsys.readouterr().out
    assert "[/math]" in shown
    assert "[math]" in shown
    assert shown.count("  all ") == 2
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]  # no cache of the quantized model


TASKS = {
    "own_loss": """
output_type: loglikelihood
metric_list:
  - metric: acc
""",
    "own_answers": """
output_type: generate_until
generation_kwargs: {max_gen_toks: 24, do_sample: false, until: []}
metric_list:
  - metric: exact_match
""",
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: "{file}"}}
test_split: train
doc_to_text: "{{{{instruction}}}}{{{{'\\n\\n### Input:\\n' + input if input else ''}}}}"
doc_to_target: "{{{{output}}}}{eos}"
target_delimiter: ""
"""


@pytest.fixture(scope="module")
def task_folder(eval_file) -> Path:
    folder = eval_file.parent / "tasks"
    folder.mkdir()
    for name, rest in TASKS.items():
        eos = "</s>" if name == "own_loss" else ""
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=eval_file, eos=eos) + rest)
    return folder


@pytest.mark.slow
def test_lm_eval_gives_the_log_likelihoods_of_our_own_loss(answerer, run_folder, eval_file, task_folder, tmp_path):
    """Rows of different lengths, prompt and response with EOS; each row alone, so that bfloat16 rounds alike."""
    tasks = [f"--tasks={','.join(TASKS)}", f"--include-path={task_folder}", "--batch-size=1"]
    cli.run(options(run_folder, *tasks, f"--output={tmp_path / 'out.json'}"))
    found = json.loads((tmp_path / "out.json").read_text())["with the adapter"]
    rows = dataset.load_rows(small(f"dataset.name={eval_file}").dataset)
    partition = dataset.tokenize_rows(rows, answerer.tokenizer, ALPACA, 512)
    data = held_out(partition, np.arange(len(rows)), rows, "category")
    ours = -losses_on(answerer.model, data.rows, tokens_at_once=1)[:, 0]
    theirs = [float(sample["resps"][0][0][0]) for sample in found["samples"]["own_loss"]]
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3)
    right = score(answerer.model, answerer.tokenizer, data, 1, answers=7, max_new_tokens=24)
    assert found["results"]["own_answers"]["exact_match,none"] == figures(right).get("exact_match")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--tasks=nosuch"],
            "--tasks=nosuch: there is no nosuch; `lm_eval ls tasks` lists all",
            marks=pytest.mark.slow,
        ),
        (["--tasks=,"], "--tasks=,: name at least one task; `lm_eval ls tasks` lists all"),
        (["--evaluate=nosuch.jsonl"], "--evaluate=nosuch.jsonl: there is no such file or folder"),
        (["--question=x", "--output=y"], "--output=y: goes with --questions, --evaluate or --tasks"),
        (["--tasks=x", "--evaluate=y"], "use one of --question, --chat, --questions, --evaluate, --tasks and --merge"),
        (["--tasks=x", "--output=/nosuch/y"], "--output=/nosuch/y: there is no folder /nosuch"),
    ],
)
def test_wrong_measurement_gets_one_clear_line(arguments, message, run_folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError) as raised:
        cli.run(options(run_folder, *arguments))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_tasks_without_lm_eval_say_what_to_install(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "learning.harness", raising=False)
    with pytest.raises(SettingsError, match=r"--tasks: needs lm_eval .* pip install -r requirements-extras.txt"):
        cli.run(options(run_folder, "--tasks=arc_easy"))
