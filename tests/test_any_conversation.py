"""Whatever text is written into a file, in any shape and any format, is the text that `python dataset.py` shows."""

import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dataset
from tests.test_properties import SPECIAL, examples
from tests.test_rows import as_json

MARKS = ("\U000f0000", "\U000f0001")  # by which special tokens are told from text: rows with them are left out
TRAPS = [
    *SPECIAL,
    "<|im_end|>",
    "{{ messages }}",
    "{% raw %}",
    "\r\n",
    "\u2028",
    '"',
    ";",
    "\t",
    "007",
    "1e3",
    "null",
    "[]",
]
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(TRAPS), max_size=3).map("".join)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), max_size=3)


def chat(system: str, pairs) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    for asked, said in pairs:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return turns


def alpaca_turns(pairs) -> list[tuple[str, str]]:
    return pairs or [("", "")]


def row_of(shape: str, system: str, pairs) -> tuple[dict, list[dict]]:
    """A row of this shape, and the conversation that it is."""
    turns, some = chat(system, pairs), alpaca_turns(pairs)
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]} for t in turns
    ]
    asked, said = some[-1]
    if shape == "Alpaca":
        history, before = [list(pair) for pair in some[:-1]], system if system.strip() else ""
        row = {"instruction": asked, "output": said, "history": history, "system": system}
        return row, chat(before, some)
    if shape == "Dolly":
        content = f"{asked}\n\n### Input:\n{system}" if system.strip() else asked
        row = {"instruction": asked, "context": system, "response": said, "category": None}
        return row, chat("", [(content, said)])
    if shape == "chat":
        return {"messages": turns}, turns
    if shape == "ShareGPT":
        return {"conversations": sharegpt, "id": 7}, turns
    if shape == "prompt":
        return {"prompt": asked, "completion": said}, chat("", [(asked, said)])
    if shape == "prompt of messages":  # not in CSV, where lists are text
        whole = chat(system, some)
        return {"prompt": whole[:-1], "completion": whole[-1:]}, whole
    return {"text": said}, [{"role": "text", "content": said}]


SHAPES = ("Alpaca", "Dolly", "chat", "ShareGPT", "prompt", "prompt of messages", "text")


def written(rows: list[dict], kind: str) -> bytes:
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",")
        writer.writerow(rows[0])
        cells = [[json.dumps(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        writer.writerows(cells)
        return text.getvalue().encode()
    if kind == "json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if kind == "json.gz":
        return gzip.compress(json.dumps({"data": rows}).encode())
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return pa.compress(content, codec="zstd", asbytes=True) if kind == "jsonl.zst" else content


KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "json.gz", "jsonl.zst")


@pytest.mark.parametrize("count", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_conversation_comes_back_as_it_was_written(count, tmp_path):
    numbers = iter(range(10**9))

    @examples(count)
    @given(st.sampled_from(SHAPES), st.sampled_from(KINDS), st.lists(st.tuples(TEXTS, PAIRS), min_size=1, max_size=3))
    def holds(shape, kind, drawn):
        kind = "jsonl" if shape == "prompt of messages" and kind in ("csv", "tsv") else kind
        made = [row_of(shape, system, pairs) for system, pairs in drawn]
        file = tmp_path / f"{next(numbers)}.{kind}"
        file.write_bytes(written([row for row, _ in made], kind))
        found = as_json(file, "train.seq_length=100000")
        assert [row["messages"] for row in found] == [turns for _, turns in made]
        for row, (_, turns) in zip(found, made, strict=True):
            answers = [t["content"] for t in turns if t["role"] in ("assistant", "text") and t["content"].strip()]
            if not answers or any(mark in turn["content"] for turn in turns for mark in MARKS):
                assert row["left_out"]
                assert row["input_ids"] == []
                continue
            assert row["trained_text"] == "".join(f"{answer}</s>" for answer in answers)
            assert [label for label in row["labels"] if label != dataset.IGNORED] == [
                token for token, label in zip(row["input_ids"], row["labels"], strict=True) if token == label
            ]
        file.unlink()

    holds()
