"""Rows as they are trained, for people and for programs: `python dataset.py`."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from data.forms import Conversation, Rows, Survey, left_out
from data.tokens import IGNORED, Encoded, Partition, as_partition, size_of

TRAINED = "bold green"
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours


def show(
    rows: Rows, made: Iterable[tuple[Conversation, Encoded | str]], tokenizer: Tokenizer, limit: int, wanted: int
) -> None:
    """Print the first rows as they are `made` into tokens, as many as `wanted`, and the counts of all."""
    console, answers = Console(highlight=False, soft_wrap=True), 0
    if wanted:
        console.print(legend(console))

    def results() -> Iterator[Encoded | str]:
        nonlocal answers
        for number, (row, result) in enumerate(made, start=1):
            if number <= wanted:
                show_row(console, tokenizer, number, row, result)
            answers += len(row.answers)
            yield result

    whole = as_partition(results())
    console.print(str(Survey(rows, answers, {})), markup=False)
    for line in summary(whole, tokenizer, limit):
        console.print(line, markup=False)
    if (found := Survey(rows, answers, whole.reasons)).is_mostly_left_out:
        console.print(alarm(found))


def spans(tokenizer: Tokenizer, made: Encoded) -> list[tuple[str, bool]]:
    """The text of a row's tokens piece by piece, and whether it is trained.

    A piece is what its tokens add to the text before: some tokenizers drop a blank where a text starts.
    """
    pieces, ids, before = [], list[int](), ""
    for is_trained, parts in groupby(made.parts, key=lambda part: part.turn is not None):
        ids += [token for part in parts for token in part.ids]
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append((text.removeprefix(before), is_trained))
        before = text
    return pieces


def as_json(tokenizer: Tokenizer, number: int, row: Conversation, made: Encoded | str) -> str:
    """One line: the row's number from 1, its messages, tokens, labels, their text, and that of what is trained."""
    pieces, parts = ([], []) if isinstance(made, str) else (spans(tokenizer, made), made.parts)
    line = {
        "row": number,
        "messages": [{key: value for key, value in turn.items() if key != "input"} for turn in row.turns],
        "input_ids": [token for part in parts for token in part.ids],
        "labels": [IGNORED if part.turn is None else token for part in parts for token in part.ids],
        "text": "".join(text for text, _ in pieces),
        "trained_text": "".join(text for text, is_trained in pieces if is_trained),
    }
    line |= {"tools": row.tools} if row.tools else {}
    line |= {"left_out": made} if isinstance(made, str) else {}
    return json.dumps(line)  # in ASCII: some take other characters than the line feed for ends of lines


def show_row(console: Console, tokenizer: Tokenizer, number: int, row: Conversation, made: Encoded | str) -> None:
    if isinstance(made, str):
        console.print(Text(f"row {number}: left out, {made}", "yellow"))
        for turn in row.turns:
            console.print(Text(f"  {turn['role']}: {visible(turn['content'])}", "dim"), soft_wrap=True)
        console.print()
        return
    size, learnt = size_of(made.parts), size_of([part for part in made.parts if part.turn is not None])
    cut = f", cut from {made.whole}" if made.whole > size else ""
    only = ", only its last turn" if made.last_only else ""
    console.print(Text(f"row {number}: {size} tokens{cut}, {learnt} of them trained{only}", "bold"))
    text = Text()
    for piece, is_trained in spans(tokenizer, made):
        if is_trained and console.color_system is None:
            piece = f"{OPEN}{piece}{CLOSE}"
        text.append(visible(piece), TRAINED if is_trained else "")
    console.print(text, soft_wrap=True)
    console.print()


def visible(text: str) -> str:
    """Text without characters that would move a terminal's cursor, change its colours or turn its lines around."""
    return "".join(c if c in "\n\t" or c.isprintable() or ord(c) > 0x2100 else repr(c)[1:-1] for c in text)


def legend(console: Console) -> Text:
    if console.color_system is None:
        return Text(f"what is trained stands between {OPEN} and {CLOSE}\n")
    return Text.assemble("what is trained is ", ("green", TRAINED), "\n")


def summary(partition: Partition, tokenizer: Tokenizer, limit: int) -> Iterator[str]:
    """The counts of all rows, a line each."""
    counts, lengths = partition.counts, partition.whole
    yield left_out(counts["rows"], partition.reasons) or "no row is left out"
    if not len(partition):
        return
    middle, high = np.percentile(lengths, [50, 95], method="lower")
    trained = partition.trained.sum()
    yield f"tokens: median {middle:,}, 95% at most {high:,}, longest {lengths.max():,}; {trained:,} are trained"
    over = int((lengths > limit).sum())
    yield f"over train.seq_length={limit}: {over:,} rows ({over / len(partition):.1%}), which are cut"
    yield f"duplicates: {len(partition) - len({*partition.keys()}):,}"
    if counts.get("last_only"):
        yield f"only the last turn is trained of {counts['last_only']:,} rows: the template rewrites earlier ones"
    if unknown := np.count_nonzero(partition.ids == tokenizer.unk_token_id):
        yield f"unknown to the tokenizer: {unknown:,} tokens, which are trained as {tokenizer.unk_token}"


def alarm(found: Survey) -> Panel:
    """What cannot be missed: more than half of the rows are left out."""
    why = left_out(len(found.rows), found.left_out)
    return Panel(Text(why), title="WARNING: most rows are not used", border_style="bold red", style="bold red")
