"""What the columns of a data set say, as a conversation: the one form that all later steps read.

A conversation is a list of turns, each with `role` and `content`, and the tools that could be called, if there are any.
Turns of the role "text" are plain text, all of which is trained.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from data.cells import BYTES, JSON, NESTED, text_of
from data.table import Kinds, Table
from settings.schema import SettingsError, suggest

Turn = dict[str, Any]
NO_ANSWER = "without an answer"

COLUMNS = {  # what a column is for: the names under which it is found by itself
    "instruction": ("instruction",), "input": ("input", "context"), "output": ("output", "response"),
    "system": ("system",), "history": ("history",), "messages": ("messages", "conversations"), "tools": ("tools",),
    "prompt": ("prompt",), "completion": ("completion",), "text": ("text",),
}  # fmt: skip
SHAPES = {  # by what is needed: the rest may be there
    "Alpaca": (("instruction", "output"), ("input", "system", "history")),
    "chat": (("messages",), ("system", "tools")),
    "prompt and completion": (("prompt", "completion"), ("system", "tools")),
    "text": (("text",), ()),
}
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "chatgpt": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool", "observation": "tool", "function_call": "assistant",
}  # fmt: skip
TURN_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # of a message, to the chat template
HOW = (
    "use instruction and output (Alpaca), instruction, context and response (Dolly), messages or conversations (chat), "
    "prompt and completion, or text; or say which is which: dataset.columns={instruction: question, output: answer}"
)


@dataclass(frozen=True)
class Conversation:
    turns: list[Turn]
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The turns that say something and may be trained, in their order."""
        return [
            number
            for number, turn in enumerate(self.turns)
            if turn["role"] in ("assistant", "text")
            and (turn["content"].strip() or turn.get("tool_calls"))
            and turn.get("weight", 1) != 0
            and (number or turn["role"] == "text")  # what opens a conversation answers nothing
        ]


@dataclass(frozen=True)
class Form:
    """How a row is read: its shape, and which column stands for what."""

    shape: str
    columns: Mapping[str, str]
    """By what it is for: the user's column."""
    is_nested: Mapping[str, bool]
    """Whether that column holds lists and objects, as JSON."""

    def __str__(self) -> str:
        name = "Dolly" if self.columns.get("input") == "context" and self.shape == "Alpaca" else self.shape
        return f"{name}: {', '.join(self.columns.values())}"

    def conversation(self, cells: Iterable[str | None]) -> Conversation:
        """A row, of the cells of its columns. Raises ValueError if a list or object in it is no conversation."""
        row = {key: value_of(key, text, self.is_nested[key]) for key, text in zip(self.columns, cells, strict=True)}
        return READERS[self.shape](row)


def value_of(key: str, text: str | None, is_nested: bool) -> Any:
    """What a cell holds. Lists may also be written as JSON text, as in CSV."""
    if text is None or not (is_nested or key in ("messages", "tools", "history")):
        return text
    if not text.strip():
        return None
    try:
        return JSON.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the column for {key} holds text that is no JSON list") from error


# --- which shape ----------------------------------------------------------------------------------


def form_of(table: Table, chosen: Mapping[str, Any], name: str) -> Form:
    """The shape of the rows that `name` stands for, by the names of their columns and by `chosen`: dataset.columns.

    Raises SettingsError if there is none, if there are several, or if a column holds what it cannot.
    """
    given, names = standard(chosen), table.columns.column_names
    options = assigned(names, given, name)
    found = {key: columns[0] for key, columns in options.items() if columns}
    asked = {key for key, column in given.items() if column is not None}
    fits = [
        shape for shape, (needed, more) in SHAPES.items() if found.keys() >= {*needed} and {*needed, *more} >= asked
    ]
    if len(fits) > 1 and "text" in fits:
        fits.remove("text")  # beside other columns it is most often their rendering
    if not fits:
        raise SettingsError(f"{name}: has no columns that make a row (it has {', '.join(names)}); {HOW}")
    if len(fits) > 1:
        shapes = [f"{shape} ({', '.join(found[key] for key in SHAPES[shape][0])})" for shape in fits]
        key = SHAPES[fits[0]][0][0]
        raise SettingsError(
            f"{name}: can be read as {' and as '.join(shapes)}; choose one with its column, such as "
            f"dataset.columns={{{key}: {found[key]}}}"
        )
    needed, more = SHAPES[fits[0]]
    columns = {key: found[key] for key in COLUMNS if key in found and key in (*needed, *more)}
    if twice := next((key for key in columns if len(options[key]) > 1), None):
        raise SettingsError(
            f"{name}: has the columns {' and '.join(options[twice])}, which mean the same; choose one with "
            f"dataset.columns={{{twice}: {columns[twice]}}}"
        )
    check_kinds(columns, table.kinds, name)
    held = {key: any(kind in table.kinds.get(column, {}) for kind in NESTED) for key, column in columns.items()}
    return Form(fits[0], columns, held)


def standard(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """`dataset.columns` with our own word for each use: context is input, response is output."""
    uses = {other: key for key, names in COLUMNS.items() for other in names}
    made: dict[str, Any] = {}
    for key, column in chosen.items():
        setting, use = f"dataset.columns.{key}={column}", uses.get(key)
        if use is None:
            raise SettingsError(f"{setting}: use one of {', '.join(COLUMNS)}{suggest(key, list(COLUMNS))}")
        if made.setdefault(use, column) != column:
            raise SettingsError(f"{setting}: {made[use]} already is for {use}; choose one of them")
    return made


def assigned(names: Sequence[str], given: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """The columns by what they can be for: as `given`, or by their names."""
    for key, column in given.items():
        if column is not None and column not in names:
            raise SettingsError(f"dataset.columns.{key}={column}: {name.partition('=')[2]} has {', '.join(names)}")
    free = {*names} - {*given.values()}
    found = {key: [column for column in known if column in free] for key, known in COLUMNS.items()}
    return found | {key: [column] if column is not None else [] for key, column in given.items()}


def check_kinds(columns: Mapping[str, str], kinds: Kinds, name: str) -> None:
    """Raise SettingsError for a column that holds lists where text is needed, or both where one of them is."""
    for key, column in columns.items():
        held = kinds.get(column, {})
        lists = next((f"{kind} ({held[kind]})" for kind in (*NESTED, BYTES) if kind in held), None)
        texts = next((f"{kind} ({place})" for kind, place in held.items() if kind not in (*NESTED, BYTES)), None)
        if lists and key in ("instruction", "input", "output", "system", "text"):
            raise SettingsError(f"{name}: column {column} holds {lists}; text is needed")
        if lists and texts:
            raise SettingsError(f"{name}: column {column} holds {lists} and {texts}; use one of them")


# --- conversations --------------------------------------------------------------------------------


def as_message(row: Mapping[str, Any]) -> Turn:
    """The user's turn of an Alpaca row. `content` holds instruction and input, whatever the template."""
    instruction, given = text_of(row.get("instruction")), text_of(row.get("input"))
    content = f"{instruction}\n\n### Input:\n{given}" if given.strip() else instruction
    return {"role": "user", "content": content, "input": given.strip()}


def said(content: Any) -> Turn:
    return {"role": "assistant", "content": text_of(content)}


def from_alpaca(row: Mapping[str, Any]) -> Conversation:
    turns = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("history is no list of pairs: what was asked, and what was answered")
        turns += [as_message({"instruction": content_of(pair[0])}), said(content_of(pair[1]))]
    return with_system(row, [*turns, as_message(row), said(row["output"])])


def from_chat(row: Mapping[str, Any]) -> Conversation:
    turns = messages_of(row["messages"] or [])
    return replace(with_system(row, turns), tools=tools_of(row.get("tools")))


def from_prompt(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    asked = messages_of(prompt) if isinstance(prompt, list | dict) else [as_message({"instruction": prompt})]
    answer = messages_of(completion) if isinstance(completion, list | dict) else [said(completion)]
    spoken = [(turn["role"], turn["content"]) for turn in [*asked, *answer]]
    if asked and spoken[: len(asked)] == spoken[len(asked) : 2 * len(asked)]:
        raise ValueError(
            "has a completion that begins with the prompt; use its column alone: dataset.columns={messages: COLUMN}"
        )
    return replace(with_system(row, [*asked, *answer]), tools=tools_of(row.get("tools")))


def from_text(row: Mapping[str, Any]) -> Conversation:
    return Conversation([{"role": "text", "content": text_of(row["text"])}])


def asked_in(row: Mapping[str, Any]) -> Conversation:
    """What a row of any shape but text asks: its answer need not be there. `question` stands for instruction, too."""
    found = {}
    for use, names in (COLUMNS | {"instruction": ("question", "instruction")}).items():
        value = next((row[name] for name in names if row.get(name) is not None), None)
        found[use] = value_of(use, value, False) if isinstance(value, str) else value
    if found["messages"] is not None:
        return from_chat(found)
    if isinstance(found["prompt"], list | dict):
        return from_prompt(found | {"completion": None})
    return from_alpaca(found | {"instruction": found["instruction"] or found["prompt"], "output": None})


READERS = {"Alpaca": from_alpaca, "chat": from_chat, "prompt and completion": from_prompt, "text": from_text}


def with_system(row: Mapping[str, Any], turns: list[Turn]) -> Conversation:
    """The turns, after the system prompt of a column if it holds one."""
    system = text_of(row.get("system"))
    own = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
    if not system.strip() or own == system:
        return Conversation(turns)
    if own is not None:
        raise ValueError(
            "has a system prompt in its column and another in its messages; leave that column out: "
            "dataset.columns={system: null}"
        )
    return Conversation([{"role": "system", "content": system}, *turns])


def messages_of(value: Any) -> list[Turn]:
    """The turns of a list of messages, of a single one, or of columns of messages as `datasets` once kept them."""
    if isinstance(value, dict) and value and all(isinstance(inner, list) for inner in value.values()):
        if len({len(inner) for inner in value.values()}) > 1:
            raise ValueError(f"has lists of different lengths in {', '.join(value)}")
        value = [dict(zip(value, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    elif isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("holds no list of messages")
    return [turn_of(message) for message in value]


def turn_of(message: Any) -> Turn:
    """A message with `role` and `content`, or `from` and `value`, as a turn."""
    if not isinstance(message, dict):
        raise ValueError(f"holds a message that is no object: {message!r:.60}")
    named = next(((r, c) for r, c in (("role", "content"), ("from", "value")) if message.get(r) is not None), None)
    if named is None:
        raise ValueError(f"has a message without role (or from); it has {', '.join(message)}")
    role = ROLES.get(str(message[named[0]]).strip().lower())
    if role is None:
        raise ValueError(f"has a message of the role {message[named[0]]!r:.60}; use one of {', '.join(ROLES)}")
    more = {key: message[key] for key in TURN_KEYS if message.get(key)}
    if "tool_calls" in more:
        more["tool_calls"] = calls_of(more["tool_calls"])
    if named[1] not in message and not more:
        raise ValueError(f"has a message without {named[1]}; it has {', '.join(message)}")
    if role == "assistant" and message.get("weight") is not None:
        more["weight"] = weight_of(message["weight"])
    return {"role": role, "content": content_of(message.get(named[1])), **more}


def weight_of(value: Any) -> float:
    with contextlib.suppress(TypeError, ValueError):
        if float(value) in (0, 1):
            return float(value)
    raise ValueError(f"has a message of the weight {text_of(value):.60}; use 0 or 1")


def content_of(content: Any) -> str:
    """The text of a message: itself, or its parts joined."""
    if isinstance(content, list):
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
        for part, text in zip(content, texts, strict=True):
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise ValueError(f"has a message with a part of the type {kind}; only text can be trained")
        return "".join(texts)
    if isinstance(content, dict):
        raise ValueError(f"has a message whose content is an object with {', '.join(content)}; use text")
    return text_of(content)


def calls_of(calls: Any) -> list[Any]:
    """Calls of tools, with their arguments as objects, which chat templates expect."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError("has tool_calls without the function's name")
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):  # else as it is written
                function = function | {"arguments": JSON.decode(function["arguments"])}
        made.append({**call, "type": "function", "function": function} if "function" in call else function)
    return made


def tools_of(value: Any) -> list[Any] | None:
    """Descriptions of tools, as JSON Schema."""
    if value is not None and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise ValueError("tools is no list of objects")
    return value or None


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a data set: the user's own columns as text, and how they are read."""

    name: str
    """KEY=VALUE of the setting that names them."""
    table: Dataset
    form: Form
    kinds: Kinds
    files: Sequence[tuple[int, str]] = ()
    """The number of rows before each file, and its name."""

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Conversation]:
        """Every row as a conversation. Raises SettingsError for one that is none, with its place."""
        columns = self.form.columns.values()
        blocks = self.table.select_columns([*dict.fromkeys(columns)]).iter(1000)
        rows = (cells for block in blocks for cells in zip(*(block[column] for column in columns), strict=True))
        for number, cells in enumerate(rows, start=1):
            try:
                yield self.form.conversation(cells)
            except ValueError as error:
                raise SettingsError(f"{self.name}: {self.place(number)} {error}") from error

    def place(self, number: int) -> str:
        """Where a row is, counted from 1: in which file, if there are several."""
        before, name = next(((before, name) for before, name in reversed(self.files) if before < number), (0, ""))
        return f"row {number - before} of {name}" if len(self.files) > 1 else f"row {number}"

    def select(self, numbers: Iterable[int] | np.ndarray) -> "Rows":
        return replace(self, table=self.table.select(numbers), files=())

    def column(self, name: str) -> list[str]:
        """The text of a column, empty where there is none."""
        return [text_of(value) for value in self.table[name]] if name in self.table.column_names else []


@dataclass(frozen=True)
class Survey:
    """What a data set has, before any tokens are made."""

    rows: Rows
    answers: int
    """Turns of the assistant that can be trained."""
    left_out: dict[str, int]
    """Why rows are left out, with how many."""

    def __str__(self) -> str:
        line = f"read as {self.rows.form}, {len(self.rows):,} rows, {self.answers:,} assistant turns"
        return f"{line}; {why}" if (why := left_out(len(self.rows), self.left_out)) else line

    @property
    def is_mostly_left_out(self) -> bool:
        return 2 * sum(self.left_out.values()) > len(self.rows)


def survey(rows: Rows, encode: Callable[[Conversation], Any]) -> Survey:
    """Look at every row, and let `encode` say of one row of each order of turns why it is left out, if it is."""
    answers, faults, reasons = 0, dict[Any, str](), Counter[str]()
    for row in rows:
        count = len(row.answers)
        answers += count
        order = (count > 0, bool(row.tools), *map(outline, row.turns))
        if order not in faults:
            made = encode(row) if count else NO_ANSWER
            faults[order] = made if isinstance(made, str) else ""
        reasons[faults[order]] += 1
    return Survey(rows, answers, {reason: number for reason, number in reasons.items() if reason})


def outline(turn: Turn) -> tuple[str, bool, bool]:
    """What decides whether a template can write a turn: its role, whether it says something, and whether it calls."""
    return turn["role"], bool(turn["content"].strip()), bool(turn.get("tool_calls"))


def left_out(rows: int, reasons: Mapping[str, int]) -> str:
    """How many rows are left out, and why; empty if none is."""
    count = sum(reasons.values())
    why = "; ".join(f"{number:,} {reason}" for reason, number in sorted(reasons.items(), key=lambda item: -item[1]))
    return f"{count:,} of {rows:,} rows are left out: {why}" if count else ""
