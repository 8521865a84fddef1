"""Rows as token ids and labels: which tokens carry loss.

A conversation is rendered up to each turn of the assistant, with the model's own template. What the template writes
for that turn, up to and including what ends it, is trained; nothing else is. Each part is tokenized apart, so that the
boundary is exact for every tokenizer, and a row's own text is never taken for a marker or a special token.
"""

import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from data.forms import NO_ANSWER, Conversation, Turn
from data.templates import MARKS, encode_text, end_ids, end_marks, lead_of, marked, render
from utils import shortened

log = logging.getLogger(__name__)

IGNORED = -100  # the label that carries no loss


class Refused(ValueError):
    """A row that cannot be trained as it stands; the message says which rows are such."""


class Rewritten(Refused):
    """A row whose earlier turns the template writes in another way once others follow."""


@dataclass(frozen=True)
class Part:
    """A piece of a row's tokens, and the turn that it trains, if it does."""

    ids: list[int]
    turn: int | None = None


@dataclass(frozen=True)
class Encoded:
    """A row's tokens: parts that are asked and parts that answer them take turns, the last one answers."""

    parts: list[Part]
    whole: int
    """Tokens before the row was cut."""
    last_only: bool = False
    """The template writes earlier turns in another way, so that only the last one is trained."""


def fit(prompt: list[int], response: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Cut a row to `limit` tokens so that response is left: at least a quarter of `limit`, if it has as many.

    The prompt loses its middle, so that the task's start and the response marker stay. The response
    loses its end, with the end-of-sequence token: a cut answer must not teach to stop there.
    """
    kept = max(limit - len(prompt), min(len(response), limit // 4))
    response = response[:kept]
    room = limit - len(response)
    if len(prompt) > room:
        tail = room // 2
        prompt = prompt[: room - tail] + prompt[len(prompt) - tail :]
    return prompt, response


def encode_prompt(tokenizer: Tokenizer, template: str, turns: Sequence[Turn], tools: Any = None) -> list[int]:
    """Token ids of a conversation up to where the response starts: the same in training and in generation."""
    return encode_text(tokenizer, render(tokenizer, template, turns, tools, for_response=True))


def encode_row(tokenizer: Tokenizer, template: str, conversation: Conversation, limit: int, train_on: str) -> Encoded:
    """A conversation as tokens, cut to `limit` of them; `train_on` says whether "all" answers carry loss or the "last".

    Raises Refused if the template cannot write it, or leaves a part of it out.
    """
    answers, last_only = conversation.answers, False
    if any(MARKS.search(turn["content"]) for turn in conversation.turns):
        raise Refused("with U+F0000 or U+F0001, by which special tokens are told from text")
    if conversation.turns[0]["role"] == "text":
        return plain_text(tokenizer, conversation.turns[0]["content"], limit)
    try:
        wanted = answers if train_on == "all" else answers[-1:]
        try:
            parts = parts_of(tokenizer, template, conversation, wanted)
        except Rewritten:
            wanted, last_only = answers[-1:], True
            parts = parts_of(tokenizer, template, conversation, wanted)
        cut = to_turns(parts, limit) if len(wanted) > 1 else to_last(tokenizer, template, conversation, parts, limit)
        return Encoded(cut, size_of(parts), last_only)
    except Refused:
        raise
    except TemplateError as error:
        raise Refused(f"refused by the template ({shortened(error, 150)})") from error
    except (TypeError, ValueError, LookupError, AttributeError) as error:  # a template is a program
        raise Refused(f"at which the template fails ({shortened(error, 150)})") from error


def parts_of(tokenizer: Tokenizer, template: str, conversation: Conversation, wanted: Sequence[int]) -> list[Part]:
    """What stands before each turn that is `wanted`, and that turn, as tokens."""
    turns, tools = conversation.turns, conversation.tools
    parts, before = [], ""
    for number in wanted:
        prompt = render(tokenizer, template, turns[:number], tools, for_response=True)
        whole = render(tokenizer, template, turns[: number + 1], tools, for_response=False)
        if not prompt.startswith(before) or (not whole.startswith(prompt) and len(wanted) > 1):
            raise Rewritten("whose earlier turns the template writes in another way")
        answer = whole[len(prompt) :] if whole.startswith(prompt) else alone(tokenizer, template, turns[: number + 1])
        end = end_marks(tokenizer).search(answer)
        answer = answer[: end.end()] if end else answer  # what a template writes after it is not the answer's
        check_all_there(tokenizer, template, conversation, number, prompt, answer)
        asked = prompt[len(before) :]
        parts.append(Part(encode_text(tokenizer, asked, lead_of(tokenizer, before) if before else "")))
        parts.append(Part(ended(tokenizer, encode_text(tokenizer, answer, lead_of(tokenizer, prompt))), number))
        before = prompt + answer
    return parts


def alone(tokenizer: Tokenizer, template: str, turns: list[Turn]) -> str:
    """How the template writes the last turn if there is no system prompt: some move that once an answer follows."""
    shorter = turns[turns[0]["role"] == "system" :]
    prompt = render(tokenizer, template, shorter[:-1], for_response=True)
    whole = render(tokenizer, template, shorter, for_response=False)
    if not whole.startswith(prompt):
        raise Refused("whose response the template does not write behind the prompt")
    return whole[len(prompt) :]


def ended(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """An answer's tokens up to and including the first that ends it; EOS if the template writes none."""
    ends = end_ids(tokenizer)
    end = next((position for position, token in enumerate(ids) if token in ends), None)
    return [*ids, tokenizer.eos_token_id] if end is None else ids[: end + 1]


def check_all_there(
    tokenizer: Tokenizer, template: str, conversation: Conversation, number: int, prompt: str, answer: str
) -> None:
    """Raise Refused if the template writes the turns before `number`, or that one, without a part of what they say."""
    for turn in conversation.turns[:number]:
        if turn["role"] not in ("user", "assistant") and marked(tokenizer, turn["content"]).strip() not in prompt:
            raise Refused(f"with a turn of the role {turn['role']}, for which the template has no place")
    tools, turns = conversation.tools, conversation.turns
    if tools and prompt == render(tokenizer, template, turns[:number], for_response=True):
        raise Refused("with tools, for which the template has no place")
    for call in turns[number].get("tool_calls", []):
        if call.get("function", call)["name"] not in answer:
            raise Refused("with tool_calls, for which the template has no place")


def plain_text(tokenizer: Tokenizer, text: str, limit: int) -> Encoded:
    """Text without any template between the special tokens of the tokenizer, all of it trained."""
    start = tokenizer.bos_token or ""
    before = Part(encode_text(tokenizer, start))
    ids = [*encode_text(tokenizer, marked(tokenizer, text), start), tokenizer.eos_token_id]
    kept = ids[: limit - len(before.ids)]
    return Encoded([before, Part(kept, 0)], len(before.ids) + len(ids))


# --- rows that are too long -----------------------------------------------------------------------


def size_of(parts: Sequence[Part]) -> int:
    return sum(len(part.ids) for part in parts)


def to_turns(parts: list[Part], limit: int) -> list[Part]:
    """The first turns, as many whole ones as fit; of one that is too long by itself what `fit` leaves."""
    while len(parts) > 2 and size_of(parts) > limit:
        parts = parts[:-2]
    return fitted(parts, limit)


def to_last(
    tokenizer: Tokenizer, template: str, conversation: Conversation, parts: list[Part], limit: int
) -> list[Part]:
    """The last turn with as many of those before it as fit: whole exchanges are left out, the oldest first."""
    number = last = conversation.answers[-1]
    turns = conversation.turns
    while size_of(parts) > limit:
        asked = [at for at, turn in enumerate(turns[:number]) if turn["role"] == "user"]
        if len(asked) < 2:
            break
        turns = turns[: asked[0]] + turns[asked[1] :]  # what precedes the first question stays
        number -= asked[1] - asked[0]
        parts = parts_of(tokenizer, template, Conversation(turns, conversation.tools), [number])
    return fitted([parts[0], Part(parts[1].ids, last)], limit)


def fitted(parts: list[Part], limit: int) -> list[Part]:
    if size_of(parts) <= limit:
        return parts
    prompt, response = fit(parts[0].ids, parts[1].ids, limit)
    return [Part(prompt), Part(response, parts[1].turn)]


# --- a client's rows ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """A client's tokenized rows, and what was left out.

    ids: all rows one after the other, int32. trained: whether each of these tokens carries loss. starts: where each
    row begins, and the end; rows + 1 entries. whole: tokens of each row before it was cut. turns: number of the last
    turn that is trained, in its conversation. sources: number of each row before any were left out. counts: rows,
    without_response, cut; and, where there are any, refused (by the template) and last_only (of whose turns only the
    last is trained). reasons: why rows were left out, with how many.
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    whole: np.ndarray
    turns: np.ndarray
    sources: np.ndarray
    counts: dict[str, int]
    reasons: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sources)

    def keys(self) -> list[bytes]:
        """What tells rows apart: their tokens."""
        return [self.ids[start:end].tobytes() for start, end in pairwise(self.starts.tolist())]

    def row(self, index: int) -> dict[str, list[int]]:
        """One row as `input_ids` and `labels`, what is not trained masked."""
        place = slice(self.starts[index], self.starts[index + 1])
        ids = self.ids[place]
        return {"input_ids": ids.tolist(), "labels": np.where(self.trained[place], ids, IGNORED).tolist()}


def tokenize_rows(
    rows: Iterable[Conversation], tokenizer: Tokenizer, template: str, limit: int, train_on: str = "all"
) -> Partition:
    """Tokenize `rows`; those that say nothing, or that the template refuses, are left out, others cut to `limit`."""
    return as_partition(encoded(tokenizer, template, conversation, limit, train_on) for conversation in rows)


def encoded(tokenizer: Tokenizer, template: str, row: Conversation, limit: int, train_on: str) -> Encoded | str:
    """A row's tokens, or why it is left out."""
    if not row.answers:
        return NO_ANSWER
    try:
        return encode_row(tokenizer, template, row, limit, train_on)
    except Refused as error:
        return str(error)


def as_partition(made: Iterable[Encoded | str]) -> Partition:
    """All rows of a partition, each as its tokens or as why it is left out."""
    ids, trained, starts = array("i"), bytearray(), array("q", [0])
    whole, turns, sources = array("i"), array("i"), array("i")
    counts, reasons = Counter(rows=0, without_response=0, cut=0), Counter[str]()
    for number, row in enumerate(made):
        counts["rows"] += 1
        if isinstance(row, str):
            counts["without_response" if row == NO_ANSWER else "refused"] += 1
            reasons[row] += 1
            continue
        for part in row.parts:
            ids.extend(part.ids)
            trained.extend(bytes([part.turn is not None]) * len(part.ids))
        starts.append(len(ids))
        whole.append(row.whole)
        turns.append(row.parts[-1].turn or 0)
        sources.append(number)
        counts["cut"] += row.whole > size_of(row.parts)
        if row.last_only:
            counts["last_only"] += 1
    return Partition(
        ids=np.array(ids, np.int32),
        trained=np.frombuffer(bytes(trained), np.bool_),
        starts=np.array(starts, np.int64),
        whole=np.array(whole, np.int32),
        turns=np.array(turns, np.int32),
        sources=np.array(sources, np.int32),
        counts=dict(counts),
        reasons=dict(reasons),
    )


def save_partition(partition: Partition, path: Path) -> None:
    """Keep a tokenized partition for the run's other workers, if there is room. Safe when two write the same one."""
    beside = path.with_suffix(f".{os.getpid()}")
    arrays = {key: value for key, value in vars(partition).items() if isinstance(value, np.ndarray)}
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(arrays, beside, {"counts": json.dumps(partition.counts), "reasons": json.dumps(partition.reasons)})
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        log.warning("%s: the other workers must tokenize it again (%s)", path.name, error)
        beside.unlink(missing_ok=True)


def load_partition(path: Path) -> Partition | None:
    """What `save_partition` kept; None if it is not there, or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            told = {key: json.loads(text) for key, text in file.metadata().items()}
        arrays: dict[str, Any] = load_file(path)
        return Partition(**arrays, **told)
    except (OSError, SafetensorError, ValueError):
        return None
