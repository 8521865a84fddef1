"""Every shape of instruction data becomes a conversation; every answer in it is trained, and nothing else."""

import csv
import json

import pytest
from transformers import AutoTokenizer

import dataset
from data.display import spans
from data.forms import Conversation
from data.templates import own_template
from data.tokens import IGNORED, Refused, encode_row, encoded
from settings.schema import SettingsError
from tests.federation import run_locally, small
from tests.hub.repositories import build
from tests.test_rows import as_json, config_of, lines
from utils import local_path

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))


def asked(content, **more):
    return USER | {"content": content} | more


def said(content, **more):
    return ASSISTANT | {"content": content} | more


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "maximum": 1.50}}}]
ONE = [asked("Name a colour."), said("Red.")]
TWO = [*ONE, asked("Another."), said("Blue.")]
BRIEF = [SYSTEM | {"content": "Be brief."}]
SHAPES = {  # what: a row, how it was read, the conversation
    "Alpaca": (
        {"instruction": "Name a colour.", "input": "", "output": "Red."}, "Alpaca: instruction, input, output", ONE
    ),
    "Alpaca without input": ({"instruction": "Name a colour.", "output": "Red."}, "Alpaca: instruction, output", ONE),
    "Alpaca with response": (
        {"instruction": "Name a colour.", "response": "Red."}, "Alpaca: instruction, response", ONE
    ),
    "Alpaca with input": (
        {"instruction": "Pick one.", "input": "red, blue", "output": "red"},
        "Alpaca: instruction, input, output",
        [asked("Pick one.\n\n### Input:\nred, blue"), said("red")],
    ),
    "Alpaca with system and history": (
        {"system": "Be brief.", "history": [["Name a colour.", "Red."]], "instruction": "Another.", "output": "Blue."},
        "Alpaca: instruction, output, system, history",
        [*BRIEF, *TWO],
    ),
    "Alpaca with its own rendering": (
        {"instruction": "Name a colour.", "input": "", "output": "Red.", "text": "### Name a colour. ### Red."},
        "Alpaca: instruction, input, output",
        ONE,
    ),
    "Dolly": (
        {"instruction": "Pick one.", "context": "red, blue", "response": "red", "category": "closed_qa"},
        "Dolly: instruction, context, response",
        [asked("Pick one.\n\n### Input:\nred, blue"), said("red")],
    ),
    "chat": ({"messages": [*BRIEF, *TWO]}, "chat: messages", [*BRIEF, *TWO]),
    "chat beside its first prompt": (
        {"prompt": "Name a colour.", "prompt_id": "7", "messages": TWO}, "chat: messages", TWO
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]},
        "chat: conversations",
        ONE,
    ),
    "ShareGPT with a system column and weights": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "user", "value": "Name a colour.", "weight": 0.0},
                {"from": "assistant", "value": "Red.", "weight": 1},
            ],
        },
        "chat: system, conversations",
        [*BRIEF, *ONE],
    ),
    "conversations of roles": ({"conversations": TWO}, "chat: conversations", TWO),
    "messages as JSON text": ({"messages": json.dumps(TWO)}, "chat: messages", TWO),
    "messages of parts": (
        {"messages": [asked([{"type": "text", "text": "Name a "}, {"type": "text", "text": "colour."}]), said("Red.")]},
        "chat: messages",
        ONE,
    ),
    "numbers in messages": (
        json.dumps({"messages": [asked(""), said("")]}).replace('""', "1.50", 1).replace('""', "1e3"),
        "chat: messages",
        [asked("1.50"), said("1e3")],
    ),
    "columns of messages": (
        {"messages": {"role": ["user", "assistant"], "content": ["Name a colour.", "Red."]}}, "chat: messages", ONE
    ),
    "prompt and completion": (
        {"prompt": "Name a colour.", "completion": "Red."}, "prompt and completion: prompt, completion", ONE
    ),
    "prompt and completion of messages": (
        {"prompt": TWO[:3], "completion": TWO[3:]}, "prompt and completion: prompt, completion", TWO
    ),
    "text": ({"text": "Once upon a time"}, "text: text", [{"role": "text", "content": "Once upon a time"}]),
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_shape_is_found_by_itself_and_becomes_a_conversation(what, tmp_path):
    row, told, expected = SHAPES[what]
    file = tmp_path / "rows.jsonl"
    file.write_text(row if isinstance(row, str) else json.dumps(row))
    rows = dataset.load_rows(config_of(file))
    assert sorted(str(rows.form).replace(":", ",").split(", ")) == sorted(told.replace(":", ",").split(", "))
    [found] = as_json(file)
    weightless = [{key: value for key, value in turn.items() if key != "weight"} for turn in found["messages"]]
    assert weightless == expected
    answers = [turn["content"] + "</s>" for turn in expected if turn["role"] in ("assistant", "text")]
    assert found["trained_text"] == "".join(answers)
    last = as_json(file, "dataset.train_on=last")[0]
    assert last["trained_text"] == answers[-1]
    assert last["input_ids"] == found["input_ids"]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Name a colour.", "answer": "Red."}, "{instruction: question, output: answer}"),
        ({"question": "Name a colour.", "answer": "Red."}, "{prompt: question, completion: answer}"),
        ({"instruction": "Name a colour.", "output": "x", "answer": "Red."}, "{output: answer}"),
        ({"instruction": "Name a colour.", "input": "left out", "output": "Red."}, "{input: null}"),
        ({"instruction": "a", "output": "b", "messages": ONE}, "{messages: messages}"),
        ({"instruction": "Name a colour.", "output": "Red.", "messages": TWO}, "{instruction: instruction}"),
        ({"chat": ONE}, "{messages: chat}"),
        ({"instruction": "Name a colour.", "response": "Red.", "output": "x"}, "{response: response}"),
    ],
)
def test_columns_of_other_names_are_chosen(row, columns, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    assert as_json(file, f"dataset.columns={columns}")[0]["messages"] == ONE


WRONG = {
    "{instruction: q}": r"dataset.columns.instruction=q: .*rows.jsonl has instruction, output",
    "{instrucion: x}": r"dataset.columns.instrucion=x: use one of .*; did you mean instruction\?",
    "{prompt: instruction}": r"has no columns that make a row",
}


@pytest.mark.parametrize("columns", WRONG)
def test_columns_that_are_not_there_are_refused(columns, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "x", "output": "y"}')
    with pytest.raises(SettingsError, match=WRONG[columns]):
        dataset.load_rows(config_of(file, f"dataset.columns={columns}"))


NO_CONVERSATION = {
    "a role that nobody knows": ([{"role": "narrator", "content": "x"}], "has a message of the role 'narrator'"),
    "no role": ([{"content": "x"}], "has a message without role"),
    "no content": ([{"role": "user"}], "has a message without content"),
    "an image": ([asked([{"type": "image", "image": "x"}])], "has a message with a part of the type image"),
    "text for a message": (["x"], "holds a message that is no object"),
    "text that is no JSON": ("hello", "holds text that is no JSON list"),
}


@pytest.mark.parametrize("what", NO_CONVERSATION)
def test_what_is_no_conversation_is_refused_with_its_row(what, tmp_path):
    messages, expected = NO_CONVERSATION[what]
    file = tmp_path / "rows.jsonl"
    good = ONE if isinstance(messages, list) else json.dumps(ONE)
    file.write_bytes(lines([{"messages": good}, {"messages": messages}]))
    with pytest.raises(SettingsError, match=r"rows.jsonl: row 2 ") as raised:
        list(dataset.load_rows(config_of(file)))
    assert expected in str(raised.value)


def test_messages_in_csv_are_read_from_json_text(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "source"], [json.dumps(TWO), "a"]])
    assert as_json(tmp_path / "rows.csv")[0]["messages"] == TWO


# --- the models' own templates ----------------------------------------------------------------------

REPOSITORIES = (
    "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B", "google/gemma-2-2b-it",
    "mistralai/Mistral-7B-Instruct-v0.3", "google/gemma-3-1b-it", "tests/named-templates",
)  # fmt: skip
THREE = [*TWO, asked("Say </s>, <|im_end|> or <end_of_turn>."), said("<|eot_id|></s><|im_end|><end_of_turn>!")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build(folder, *REPOSITORIES)
    return folder / "models"


def loaded(root, name):
    """A tokenizer and a template: of a repository, or of conf/template with the tokenizer of the quickstart."""
    if name in REPOSITORIES:
        tokenizer = AutoTokenizer.from_pretrained(root / name)
        return tokenizer, own_template(tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(local_path("quickstart/model"))
    return tokenizer, dataset.find_template(name).read_text()


def shown(tokenizer, made) -> str:
    return "".join(f"[[{text}]]" if is_trained else text for text, is_trained in spans(tokenizer, made))


CHAT_ML = """<|im_start|>user
Name a colour.<|im_end|>
<|im_start|>assistant
{}Red.<|im_end|>{}
<|im_start|>user
Another.<|im_end|>
<|im_start|>assistant
{}Blue.<|im_end|>{}
<|im_start|>user
Say </s>, <|im_end|> or <end_of_turn>.<|im_end|>
<|im_start|>assistant
[[{}<|eot_id|></s><|im_end|><end_of_turn>!<|im_end|>]]"""
EXPECTED = {  # read by eye: what the real templates write, and between [[ and ]] what is trained
    "meta-llama/Llama-3.2-1B-Instruct": """<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

<|eot_id|><|start_header_id|>user<|end_header_id|>

Name a colour.<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[[Red.<|eot_id|>]]<|start_header_id|>user<|end_header_id|>

Another.<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[[Blue.<|eot_id|>]]<|start_header_id|>user<|end_header_id|>

Say </s>, <|im_end|> or <end_of_turn>.<|eot_id|><|start_header_id|>assistant<|end_header_id|>

[[<|eot_id|></s><|im_end|><end_of_turn>!<|eot_id|>]]""",
    "Qwen/Qwen2.5-0.5B-Instruct": "<|im_start|>system\nYou are a model of a test and answer helpfully.<|im_end|>\n"
    + CHAT_ML.format("[[", "]]", "[[", "]]", ""),
    "Qwen/Qwen3-0.6B": CHAT_ML.format("", "", "", "", "<think>\n\n</think>\n\n"),  # it rewrites earlier turns
    "mistralai/Mistral-7B-Instruct-v0.3": "<s>[INST]  Name a colour.[/INST][[  Red.</s>]][INST]  Another.[/INST]"
    "[[  Blue.</s>]][INST]  Say </s>, <|im_end|> or <end_of_turn>.[/INST]"
    "[[  <|eot_id|></s><|im_end|><end_of_turn>!</s>]]",
    "google/gemma-3-1b-it": """<bos><start_of_turn>user
Name a colour.<end_of_turn>
<start_of_turn>model
[[Red.<end_of_turn>]]
<start_of_turn>user
Another.<end_of_turn>
<start_of_turn>model
[[Blue.<end_of_turn>]]
<start_of_turn>user
Say </s>, <|im_end|> or <end_of_turn>.<end_of_turn>
<start_of_turn>model
[[<|eot_id|></s><|im_end|><end_of_turn>!<end_of_turn>]]""",
    "alpaca": """<s>Below is an instruction that describes a task. """
    """Write a response that appropriately completes the request.

### Instruction:
Name a colour.

### Response:
[[Red.</s>]]### Instruction:
Another.

### Response:
[[Blue.</s>]]### Instruction:
Say </s>, <|im_end|> or <end_of_turn>.

### Response:
[[<|eot_id|></s><|im_end|><end_of_turn>!</s>]]""",
    "vicuna_v1.1": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: Name a colour. ASSISTANT: [[Red.</s>]] USER: "
    "Another. ASSISTANT: [[Blue.</s>]] USER: Say </s>, <|im_end|> or <end_of_turn>. ASSISTANT: "
    "[[<|eot_id|></s><|im_end|><end_of_turn>!</s>]]",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_answer_of_three_turns_is_trained_and_nothing_else(name, root):
    tokenizer, template = loaded(root, name)
    made = encode_row(tokenizer, template, Conversation(THREE), 4096, "all")
    assert shown(tokenizer, made) == EXPECTED[name]
    assert made.last_only == (name == "Qwen/Qwen3-0.6B")
    [partition] = [dataset.tokenize_rows([Conversation(THREE)], tokenizer, template, 4096)]
    row = partition.row(0)
    assert row["input_ids"] == [token for part in made.parts for token in part.ids]
    ends = dataset.end_ids(tokenizer)
    learnt = [token for token in row["labels"] if token != IGNORED]
    assert sum(token in ends for token in learnt) == sum(part.turn is not None for part in made.parts)


@pytest.mark.parametrize("name", EXPECTED)
def test_tokens_of_the_parts_are_those_of_the_whole_conversation(name, root):
    """What generation reads of a conversation so far is what was trained of it."""
    tokenizer, template = loaded(root, name)
    if name == "Qwen/Qwen3-0.6B":
        return
    made = encode_row(tokenizer, template, Conversation(TWO), 4096, "all")
    prompt = dataset.encode_prompt(tokenizer, template, TWO[:3])
    assert [token for part in made.parts for token in part.ids][: len(prompt)] == prompt


def test_system_prompt_that_a_template_moves_is_trained_with_the_last_turn(root):
    tokenizer, template = loaded(root, "mistralai/Mistral-7B-Instruct-v0.3")
    made = encode_row(tokenizer, template, Conversation([*BRIEF, *TWO]), 4096, "all")
    assert made.last_only
    assert shown(tokenizer, made).endswith("[INST]  Be brief.\n\nAnother.[/INST][[  Blue.</s>]]")
    single = encode_row(tokenizer, template, Conversation([*BRIEF, *ONE]), 4096, "all")
    assert shown(tokenizer, single) == "<s>[INST]  Be brief.\n\nName a colour.[/INST][[  Red.</s>]]"


@pytest.mark.parametrize(
    ("name", "turns", "tools", "reason"),
    [
        ("google/gemma-2-2b-it", [*BRIEF, *ONE], None, "This model knows no system role."),
        ("google/gemma-2-2b-it", [asked("a"), asked("b"), said("c")], None, "Roles must alternate"),
        ("google/gemma-3-1b-it", ONE, TOOLS, "with tools, for which the template has no place"),
        ("alpaca", ONE, TOOLS, "Alpaca has no place for tools"),
        ("alpaca", [*ONE, {"role": "tool", "content": "7"}, said("x")], None, "no place for a turn of the role tool"),
        ("Qwen/Qwen2.5-0.5B-Instruct", [asked("a"), said("", tool_calls=[{"name": "f"}])], None, "with tool_calls"),
        ("alpaca", [asked("a\U000f0000b"), said("c")], None, "with U+F0000"),
    ],
)
def test_what_a_template_cannot_write_is_refused_with_the_reason(name, turns, tools, reason, root):
    tokenizer, template = loaded(root, name)
    with pytest.raises(Refused, match=reason.replace("+", r"\+")):
        encode_row(tokenizer, template, Conversation(turns, tools), 4096, "all")
    partition = dataset.tokenize_rows([Conversation(turns, tools), Conversation(ONE)], tokenizer, template, 4096)
    assert (partition.counts["refused"], partition.sources.tolist()) == (1, [1])


def test_tools_go_through_the_models_own_template(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "tests/named-templates")
    template = tokenizer.chat_template["tool_use"]
    made = encode_row(tokenizer, template, Conversation(ONE, TOOLS), 4096, "all")
    assert '"name": "add"' in shown(tokenizer, made)
    assert shown(tokenizer, made).count("[[") == 1


# --- what is trained, and what is cut ---------------------------------------------------------------


@pytest.fixture(scope="module")
def alpaca(root):
    return loaded(root, "alpaca")


def test_answers_that_say_nothing_or_weigh_nothing_are_not_trained(alpaca):
    turns = [
        asked("a"),
        said("one", weight=0.0),
        asked("b"),
        said(" "),
        asked("c"),
        said("three"),
        asked("d"),
        said(""),
    ]
    text = shown(alpaca[0], encode_row(*alpaca, Conversation(turns), 4096, "all"))
    assert text.split("### Response:\n")[1:] == [
        "one</s>### Instruction:\nb\n\n", " </s>### Instruction:\nc\n\n", "[[three</s>]]"
    ]  # fmt: skip
    assert encoded(*alpaca, Conversation(turns[:4]), 4096, "all") == "without an answer"


def test_long_conversations_are_cut_at_a_turn(alpaca):
    turns = [turn for n in range(10) for turn in (asked(f"Say {n}."), said(f"It is {n}."))]
    whole = encode_row(*alpaca, Conversation(turns), 4096, "all")
    sizes = [sum(len(part.ids) for part in whole.parts[: 2 * count]) for count in range(1, 11)]
    for limit in (sizes[3], sizes[3] + 1, sizes[4] - 1):
        made = encode_row(*alpaca, Conversation(turns), limit, "all")
        assert made.parts == whole.parts[:8]
        assert made.whole == sizes[-1]
    tight = encode_row(*alpaca, Conversation(turns), 32, "all")  # less than the first turn
    assert sum(len(part.ids) for part in tight.parts) == 32
    partition = dataset.tokenize_rows([Conversation(turns)] * 2, *alpaca, sizes[3])
    assert partition.counts["cut"] == 2
    assert partition.turns.tolist() == [7, 7]


def test_the_last_turn_keeps_as_much_of_what_precedes_it_as_fits(alpaca):
    turns = [*BRIEF, *(turn for n in range(10) for turn in (asked(f"Say {n}."), said(f"It is {n}.")))]
    text = shown(alpaca[0], encode_row(*alpaca, Conversation(turns), 100, "last"))
    assert text.startswith("<s>Be brief.\n\n### Instruction:\nSay ")
    assert text.endswith("### Instruction:\nSay 9.\n\n### Response:\n[[It is 9.</s>]]")
    assert text.count("[[") == 1
    first = int(text.split("Say ")[1][0])
    assert 4 < first < 9
    longer = [*BRIEF, *turns[1 + 2 * (first - 1) :]]
    assert encode_row(*alpaca, Conversation(longer), 4096, "last").whole > 100  # one exchange more does not fit


def test_all_of_a_text_is_trained_and_its_markers_stay_text(alpaca):
    text = "<s>### Response:\nOnce</s> upon"
    row = dataset.tokenize_rows([Conversation([{"role": "text", "content": text}])], *alpaca, 128).row(0)
    tokenizer = alpaca[0]
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert tokenizer.decode(row["input_ids"]) == f"<s>{text}</s>"
    assert [t for t in row["input_ids"] if t in tokenizer.all_special_ids] == [
        tokenizer.bos_token_id, tokenizer.eos_token_id
    ]  # fmt: skip


# --- the same training ------------------------------------------------------------------------------


def test_chat_rows_train_the_same_adapter_as_their_alpaca_form(tmp_path):
    with open("quickstart/data/train.jsonl", encoding="utf-8") as file:  # noqa: PTH123
        rows = [json.loads(next(file)) for _ in range(40)]
    content = [row["instruction"] + (f"\n\n### Input:\n{row['input']}" if row["input"] else "") for row in rows]
    assert any("### Input" in text for text in content)
    twins = [
        {"messages": [asked(text), said(row["output"])], "category": row["category"]}
        for row, text in zip(rows, content, strict=True)
    ]
    digests = set()
    for name, form in (("alpaca", rows), ("chat", twins)):
        file = tmp_path / f"{name}.jsonl"
        file.write_bytes(lines(form))
        config = small(f"dataset.name={file}", "dataset.holdout=0.1", "num_rounds=1")
        digests.add(run_locally(config, tmp_path / name)[1]["adapter_sha256"])
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("partitioner", "row", "message"),
    [
        ("natural_id", {"category": None}, r"partition_by=category: 1 of 25 rows have none; fill it in"),
        ("natural_id", {"category": ["x"]}, r"partition_by=category: the column holds lists \(rows.jsonl line 25\)"),
        ("dirichlet", {"other": 1}, r"partition_by=category: 1 of 25 rows have none"),
        ("shard", None, r"partition_by=nosuch: .*rows.jsonl has messages, category"),
    ],
)
def test_columns_that_cannot_partition_are_named(partitioner, row, message, tmp_path):
    good = [{"messages": ONE, "category": "ab"[n % 2]} for n in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(lines([*good, *([{"messages": ONE} | row] if row else [])]))
    extra = [] if row else ["dataset.partitioner.partition_by=nosuch"]
    config = config_of(file, f"dataset/partitioner={partitioner}", *extra)
    with pytest.raises(SettingsError, match=message):
        dataset.partition_rows(dataset.load_rows(config), config, 2, 0)


def test_numbers_partition_as_numbers_and_are_trained_as_they_are_written(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "x", "completion": {n % 3 * 5}.0}}\n' for n in range(30)))
    config = config_of(file, "dataset/partitioner=natural_id", "dataset.partitioner.partition_by=completion")
    rows = dataset.load_rows(config)
    partitioner = dataset.partition_rows(rows, config, 3, 0)
    assert [set(dataset.partition_of(rows, partitioner, n).column("completion")) for n in range(3)] == [
        {"0.0"}, {"5.0"}, {"10.0"}
    ]  # fmt: skip
