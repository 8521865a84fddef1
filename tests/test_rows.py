"""Rows of other people's files: exactly what stands there is trained, or one line says which file, line and column."""

import contextlib
import csv
import gzip
import io
import json
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dataset
from settings.schema import DatasetConfig, SettingsError

ASKED, SAID = "Say the number {}.", "It is {}."
ROWS = [
    {"instruction": ASKED.format(n), "input": "", "output": SAID.format(n), "category": "ab"[n % 2]} for n in range(24)
]
RIGHT = [SAID.format(n) for n in range(24)]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows, delimiter=",", end="\r\n", header=None) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerow(header or rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue().encode()


def outputs(values) -> list[dict]:
    return [row | {"output": value} for row, value in zip(ROWS, values, strict=False)]


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def parquet(columns: dict | pa.Table, schema=None) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns, schema=schema), sink)
    return sink.getvalue()


def chat(*turns: dict) -> bytes:
    return lines([{"messages": [{"role": role, "content": "x"} | more for role, more in turns]}])


def written(folder, files: dict[str, bytes]):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / next(iter(files)) if len(files) == 1 else folder


def as_json(path, *overrides: str) -> list[dict]:
    """`python dataset.py dataset.name=PATH OVERRIDES --json`, in this process."""
    printed = io.StringIO()
    name = str(path).replace("'", "\\'")
    with contextlib.redirect_stdout(printed):
        dataset.show(dataset.parse(["experiment=quickstart", f"dataset.name='{name}'", *overrides, "--json"]))
    return [json.loads(line) for line in printed.getvalue().split("\n") if line]


def trained(path, *overrides: str) -> list[str]:
    return [row["trained_text"].removesuffix("</s>") for row in as_json(path, *overrides)]


def raw(values: str, count=24) -> bytes:
    """JSON lines whose outputs are these literals, over and over."""
    literals = values.split()
    return "".join(f'{{"instruction": "x", "output": {literals[n % len(literals)]}}}\n' for n in range(count)).encode()


NUMBERS = "1.50 1e3 12345678901234567890123 18446744073709551615 -0 -0.0 1E-7 0.1 true null 2.5 1"
WITH_NONE = ["" if value == "null" else value for value in NUMBERS.split()]
INDEXED = [{"": str(number), **row} for number, row in enumerate(ROWS)]
MANY = [{"instruction": "x", "output": "text"}] * 30_000  # more than any first chunk of a reader that guesses
LATE = {"instruction": "late", "input": "seen", "output": 1.50}

GOOD = {  # what: files, what is trained
    # the samples
    "a byte order mark in CSV": ({"d.csv": b"\xef\xbb\xbf" + table(ROWS)}, RIGHT),
    "whole and broken numbers": (
        {"d.jsonl": lines(outputs([n if n % 2 else n + 0.5 for n in range(24)]))},
        [str(n) if n % 2 else f"{n}.5" for n in range(24)],
    ),
    "numbers and text": (
        {"d.jsonl": lines(outputs([n if n % 2 else f"{n} apples" for n in range(24)]))},
        [str(n) if n % 2 else f"{n} apples" for n in range(24)],
    ),
    "dates": (
        {"d.jsonl": lines(outputs([f"2024-05-{n:02}" for n in range(1, 25)]))},
        [f"2024-05-{n:02}" for n in range(1, 25)],
    ),
    "nothing at all in a column of the first file": (
        {
            "a.jsonl": lines([r | {"input": None} for r in ROWS[:12]]),
            "b.jsonl": lines([r | {"input": "t"} for r in ROWS[12:]]),
        },
        RIGHT,
    ),
    "a column more in the second file": (
        {"a.jsonl": lines(ROWS[:12]), "b.jsonl": lines([r | {"source": "web"} for r in ROWS[12:]])},
        RIGHT,
    ),
    "what a Mac adds to archives": (
        {"train.jsonl": lines(ROWS), "._train.jsonl": b"\0\5\26\7\0\2\0\0Mac OS X", "__MACOSX/train.jsonl": b"\0"},
        RIGHT,
    ),
    "brackets in the path": ({"data[1].jsonl": lines(ROWS)}, RIGHT),
    # siblings
    "a byte order mark in JSON lines": ({"d.jsonl": b"\xef\xbb\xbf" + lines(ROWS)}, RIGHT),
    "a byte order mark before an array": ({"d.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode()}, RIGHT),
    "numbers as they are written": ({"d.jsonl": raw(NUMBERS, 12)}, WITH_NONE),
    "numbers as they are written in an array": (
        {"d.json": b"[" + raw(NUMBERS, 12).strip().replace(b"\n", b",") + b"]"},
        WITH_NONE,
    ),
    "numbers as they are written in CSV": (
        {
            "d.csv": table(
                [{"instruction": "x", "output": v} for v in ["007", "1.50", "1e3", "NA", "null", "None", "1,5"]]
            )
        },
        ["007", "1.50", "1e3", "NA", "null", "None", "1,5"],
    ),
    "times and dates with times": (
        {"d.csv": table([{"instruction": "x", "output": v} for v in ["12:30", "2024-05-02T10:00:00Z", "01/02/2024"]])},
        ["12:30", "2024-05-02T10:00:00Z", "01/02/2024"],
    ),
    "another type behind the first ten thousand rows": ({"d.jsonl": lines([*MANY, LATE])}, ["text"] * 30_000 + ["1.5"]),
    "null in the output of the first file": (
        {
            "a.jsonl": lines([{"instruction": "x", "output": None}]),
            "b.jsonl": lines([{"instruction": "x", "output": 3}]),
        },
        ["", "3"],
    ),
    "columns in another order": (
        {"a.csv": table(ROWS[:12]), "b.csv": table([dict(reversed(r.items())) for r in ROWS[12:]])},
        RIGHT,
    ),
    "lists in a column that nobody needs, text there in the second file": (
        {
            "a.jsonl": lines([r | {"tags": ["x"]} for r in ROWS[:12]]),
            "b.jsonl": lines([r | {"tags": "x"} for r in ROWS[12:]]),
        },
        RIGHT,
    ),
    "colons, stars, percent signs and blanks in the path": ({"a::b *?/c d%20é#x.jsonl": lines(ROWS)}, RIGHT),
    "hidden folders, and what tells of a data set": (
        {
            "data/train.jsonl": lines(ROWS),
            ".git/x.jsonl": b"{",
            ".cache/h/y.json": b"{",
            "README.md": b"# x",
            "dataset_infos.json": b"{}",
            "data/.hidden.jsonl": b"{",
        },
        RIGHT,
    ),
    "sub-folders": ({"a/b/1.jsonl": lines(ROWS[:12]), "a/c/2.jsonl": lines(ROWS[12:])}, RIGHT),
    "semicolons": ({"d.csv": table(ROWS, ";")}, RIGHT),
    "tabs": ({"d.tsv": table(ROWS, "\t")}, RIGHT),
    "a single column with commas in a file called tsv": ({"d.tsv": b"text\na, b; c\n"}, ["a, b; c"]),
    "tabs in a file called csv": ({"d.csv": table(ROWS, "\t")}, RIGHT),
    "Excel's line about the delimiter": ({"d.csv": b"sep=;\r\n" + table(ROWS, ";")}, RIGHT),
    "the index that pandas writes": ({"d.csv": table(INDEXED)}, RIGHT),
    "blanks in the header": ({"d.csv": table(ROWS, header=[" instruction", "input ", " output ", "category"])}, RIGHT),
    "a header that ends with a comma, as the rows do": ({"d.csv": table([r | {"": ""} for r in ROWS])}, RIGHT),
    "quotes, commas and line breaks": (
        {"d.csv": table([{"instruction": "x", "output": 'He said "a, b;\r\n\nc"\t'}] * 2)},
        ['He said "a, b;\r\n\nc"\t'] * 2,
    ),
    "blanks around a cell": ({"d.csv": b"instruction,output\n a , b \n"}, [" b "]),
    "a field of a megabyte": ({"d.csv": table([{"instruction": "y" * 10**6, "output": "x"}])}, ["x"]),
    "no line break at the end": ({"d.csv": table(ROWS).rstrip()}, RIGHT),
    "line feeds only": ({"d.csv": table(ROWS, end="\n")}, RIGHT),
    "blank lines": ({"d.csv": table(ROWS, end="\n\n")}, RIGHT),
    "blank lines and CRLF in JSON lines": ({"d.jsonl": b"\r\n" + lines(ROWS).replace(b"\n", b"\r\n\r\n")}, RIGHT),
    "an array": ({"d.json": json.dumps(ROWS).encode()}, RIGHT),
    "an array over many lines": ({"d.json": json.dumps(ROWS, indent=4).encode()}, RIGHT),
    "an array in a file called jsonl": ({"d.jsonl": json.dumps(ROWS).encode()}, RIGHT),
    "lines in a file called json": ({"d.json": lines(ROWS)}, RIGHT),
    "objects over many lines, one behind the other": (
        {"d.jsonl": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode()},
        RIGHT,
    ),
    "a single object": ({"d.json": json.dumps(ROWS[0], indent=1).encode()}, RIGHT[:1]),
    "rows in a field": ({"d.json": json.dumps({"version": "1", "data": ROWS}).encode()}, RIGHT),
    "rows in a field, over many lines": ({"d.json": json.dumps({"data": ROWS}, indent=2).encode()}, RIGHT),
    "splits in fields": ({"d.json": json.dumps({"test": ROWS[:1], "train": ROWS}).encode()}, RIGHT),
    "gzip": ({"d.jsonl.gz": gzip.compress(lines(ROWS))}, RIGHT),
    "gzip in parts": ({"d.csv.gz": gzip.compress(table(ROWS)[:100]) + gzip.compress(table(ROWS)[100:])}, RIGHT),
    "Zstandard": ({"d.jsonl.zst": zstd(lines(ROWS))}, RIGHT),
    "Zstandard in parts": ({"d.json.zst": zstd(lines(ROWS)[:100]) + zstd(lines(ROWS)[100:])}, RIGHT),
    "gzip that is not called so": ({"d.jsonl": gzip.compress(lines(ROWS))}, RIGHT),
    "capital letters": ({"D.JSONL": lines(ROWS)}, RIGHT),
    "capital letters and gzip": ({"D.CSV.GZ": gzip.compress(table(ROWS))}, RIGHT),
    "ndjson": ({"d.ndjson": lines(ROWS)}, RIGHT),
    "characters that some take for line ends": (
        {"d.jsonl": json.dumps({"instruction": "x", "output": "a\u2028b\x85c\x0bd"}, ensure_ascii=False).encode()},
        ["a\u2028b\x85c\x0bd"],
    ),
    "floats of 32 and 16 bits": (
        {"d.parquet": parquet({"instruction": ["x"] * 3, "output": pa.array([0.1, 1.0, 3.4e38], pa.float32())})},
        ["0.1", "1.0", "3.4e+38"],
    ),
    "whole numbers beside nothing": (
        {"d.parquet": parquet({"instruction": ["x"] * 2, "output": pa.array([2**64 - 1, None], pa.uint64())})},
        [str(2**64 - 1), ""],
    ),
    "floats of 32 bits in messages": (
        {
            "d.parquet": parquet(
                {
                    "messages": pa.array(
                        [[{"role": "user", "content": 0.1}, {"role": "assistant", "content": 0.2}]],
                        pa.list_(pa.struct({"role": pa.string(), "content": pa.float32()})),
                    )
                }
            )
        },
        ["0.2"],
    ),
    "decimals": (
        {
            "d.parquet": parquet(
                {
                    "instruction": ["x"] * 3,
                    "output": pa.array([Decimal("0"), Decimal("0.00000012"), Decimal("1.5")], pa.decimal128(20, 8)),
                }
            )
        },
        ["0.00000000", "0.00000012", "1.50000000"],
    ),
    "no numbers that JSON knows, in messages": (
        {"d.jsonl": b"".join(chat(("user", {}), ("assistant", {"content": v})) for v in (np.nan, -np.inf))},
        ["NaN", "-Infinity"],
    ),
    "bytes in a column that nobody needs": (
        {"d.parquet": parquet({"instruction": ["x"], "output": ["y"], "images": [[{"bytes": b"PNG"}]]})},
        ["y"],
    ),
    "lines that end with two carriage returns and a line feed": ({"d.csv": table(ROWS, end="\r\r\n")}, RIGHT),
    "what opens a conversation answers nothing": (
        {"d.jsonl": chat(("assistant", {"content": "Hello"}), ("user", {}), ("assistant", {"content": "y"}))},
        ["y"],
    ),
    "dates of a typed file": (
        {"d.parquet": parquet({"instruction": ["x"], "output": pa.array([19845], pa.date32())})},
        ["2024-05-02"],
    ),
    "splits by their names": (
        {"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS[:1]), "validation.jsonl": lines(ROWS[:2])},
        RIGHT,
    ),
    "splits by their folders": ({"train/a.csv": table(ROWS), "test/a.csv": table(ROWS[:1])}, RIGHT),
    "a repository of the Hub": (
        {
            "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/x-*\n"
            b"  - split: test\n    path: data/y.jsonl\n---\n# x",
            "data/x-1.jsonl": lines(ROWS),
            "data/y.jsonl": lines(ROWS[:1]),
            "extra.csv": b"a,b\n",
        },
        RIGHT,
    ),
}


@pytest.mark.parametrize("what", GOOD)
def test_what_stands_in_a_file_is_what_is_trained(what, tmp_path):
    files, expected = GOOD[what]
    path = written(tmp_path / "rows", files)
    rows = dataset.load_rows(config_of(path))
    assert [row.turns[-1]["content"] for row in rows] == expected
    if len(expected) < 100:
        assert trained(path) == expected


def config_of(path, *overrides: str):
    from settings.compose import compose

    return compose([f'dataset.name="{path}"', *overrides]).dataset


BAD = {  # what: files, what is said
    "a comma more in each row than in the header": (
        {"d.csv": b"instruction,input,output\nSay 0.,ctx 0,It is 0.,\nSay 1.,ctx 1,It is 1.,\n"},
        "d.csv line 2 has 4 fields, the header 3",
    ),
    "a broken array": (
        {"d.json": json.dumps(ROWS, indent=1).replace('"",\n  "output": "It is 4."', '""\n  "output": 4').encode()},
        "d.json line 29 is not JSON",
    ),
    "a field too many behind a line break in quotes": (
        {"d.csv": b'instruction,output\n"a\nb",c\nd,e,f\n'},
        "d.csv line 4 has 3 fields, the header 2",
    ),
    "a row index without a name in the header": ({"d.csv": b"instruction,output\n0,a,b\n"}, "line 2 has 3 fields"),
    "a quote that does not close": ({"d.csv": b'instruction,output\na,b\nc,"d\ne,f\n'}, "d.csv line 3 is not CSV"),
    "a column twice": ({"d.csv": b"instruction,output,output\na,b,c\n"}, "line 1 names the column output twice"),
    "a field twice": ({"d.jsonl": b'{"instruction": "x", "output": "y", "output": "z"}'}, "'output' is named twice"),
    "a broken line": ({"d.jsonl": lines(ROWS[:2]) + b'{"instruction": "x\n' + lines(ROWS[2:])}, "line 3 is not JSON"),
    "a broken first line": ({"d.jsonl": b'{"instruction": \n' + lines(ROWS)}, "d.jsonl line 1 is not JSON"),
    "a line that is no object": ({"d.jsonl": lines(ROWS[:2]) + b"7\n"}, "line 3 is not an object"),
    "an array that ends early": ({"d.json": json.dumps(ROWS, indent=1).encode()[:-3]}, "d.json line 145 is not JSON"),
    "something behind an array": ({"d.json": json.dumps(ROWS).encode() + b"\n\n{}"}, "d.json line 3 is not JSON"),
    "a comma behind the last entry": ({"d.json": b'[{"instruction": "x", "output": "y"},\n]'}, "line 2 is not JSON"),
    "text that is not UTF-8": (
        {"d.csv": "instruction,output\né,x\nx,ü\n".encode("latin-1")},
        "d.csv line 2 is not UTF-8",
    ),
    "text that is not UTF-8 in an array": ({"d.json": b'[\n{"instruction": "\xe9"}]'}, "d.json line 2 is not UTF-8"),
    "UTF-16 without its mark": ({"d.csv": "instruction,output\na,b\n".encode("utf-16-le")}, "with a NUL character"),
    "a NUL in a name": (
        {"d.jsonl": lines(ROWS[:2]) + b'{"a\\u0000b": "x"}'},
        "d.jsonl line 3 names a column with a NUL",
    ),
    "carriage returns alone": (
        {"d.csv": table(ROWS, end="\r")},
        "d.csv has lines that end with a carriage return alone",
    ),
    "half a character in the first of two files": (
        {"a.jsonl": b'\n{"instruction": "x", "output": "\\ud83d"}', "b.jsonl": lines(ROWS)},
        "a.jsonl line 2 holds half a character (\\ud83d in the column output)",
    ),
    "lists in lists without end": (
        {"d.jsonl": b'{"instruction": "x", "output": "y", "z": ' + b"[" * 900 + b"]" * 900 + b"}"},
        "d.jsonl line 1",
    ),
    "a column twice in a typed file": (
        {"d.parquet": parquet(pa.Table.from_arrays([pa.array(["x"])] * 3, ["instruction", "output", "output"]))},
        "d.parquet names the column output twice",
    ),
    "bytes in a message": (
        {"d.parquet": parquet({"messages": [[{"role": "user", "content": b"x"}]]})},
        "row 1 has a message whose content is an object with bytes; use text",
    ),
    "a weight that is neither 0 nor 1": (
        {"d.jsonl": chat(("user", {}), ("assistant", {})) + chat(("user", {}), ("assistant", {"weight": 0.5}))},
        "row 2 has a message of the weight 0.5; use 0 or 1",
    ),
    "a weight that is a list": ({"d.jsonl": chat(("assistant", {"weight": [1]}))}, "of the weight [1]; use 0 or 1"),
    "columns of messages that do not fit": (
        {"d.jsonl": lines([{"messages": {"role": ["user", "assistant"], "content": ["x"]}}])},
        "row 1 has lists of different lengths in role, content",
    ),
    "a message of nobody in the second file": (
        {"a/x.jsonl": chat(("user", {})) * 3, "b/x.jsonl": chat(("user", {})) + chat(("nobody", {}))},
        "row 2 of b/x.jsonl has a message of the role 'nobody'",
    ),
    "a broken line in one of two files of the same name": (
        {"a/x.jsonl": lines(ROWS), "b/x.jsonl": b"\n\n{"},
        "b/x.jsonl line 3 is not JSON",
    ),
    "an object in the history": (
        {"d.jsonl": lines([ROWS[0] | {"history": [["x", {"a": 1}]]}])},
        "row 1 has a message whose content is an object with a; use text",
    ),
    "a completion that holds the prompt once more": (
        {
            "d.jsonl": lines(
                [{"prompt": "x", "completion": [{"role": r, "content": "x"} for r in ("user", "assistant")]}]
            )
        },
        "row 1 has a completion that begins with the prompt; use its column alone: dataset.columns={messages: COLUMN}",
    ),
    "UTF-16": ({"d.csv": "instruction,output\n".encode("utf-16")}, "is text in UTF-16"),
    "half a character": ({"d.jsonl": b'{"instruction": "x", "output": "\\ud83d"}'}, "half a character"),
    "gzip that ends early": ({"d.jsonl.gz": gzip.compress(lines(ROWS))[:-20]}, "d.jsonl.gz cannot be read"),
    "Zstandard that is broken": ({"d.jsonl.zst": zstd(lines(ROWS))[:30]}, "d.jsonl.zst"),
    "a Git LFS pointer": ({"d.parquet": b"version https://git-lfs.github.com/spec/v1\noid"}, "run `git lfs pull`"),
    "a saved data set's list of files that is nested too deeply": (
        {"dataset_info.json": b"{}", "state.json": b"[" * 10**5},
        "cannot be read (maximum recursion depth exceeded",
    ),
    "a list where text is needed": (
        {"a.jsonl": lines(ROWS), "b.jsonl": lines([*ROWS[:2], ROWS[0] | {"output": ["x"]}])},
        "column output holds lists (b.jsonl line 3); text is needed",
    ),
    "several shapes": (
        {"d.jsonl": lines([{"instruction": "x", "output": "y", "messages": []}])},
        "can be read as Alpaca (instruction, output) and as chat (messages); choose one with its column, such as "
        "dataset.columns={instruction: instruction}",
    ),
    "two columns for one thing": (
        {"d.jsonl": lines([{"instruction": "x", "output": "y", "response": "z"}])},
        "has the columns output and response, which mean the same; choose one with dataset.columns={output: output}",
    ),
    "other columns": ({"d.jsonl": lines([{"q": "x", "a": "y"}])}, "has no columns that make a row (it has q, a)"),
    "nothing": ({"d.jsonl": b"\n"}, "has no rows"),
    "files of two kinds": ({"a.csv": table(ROWS), "b.jsonl": lines(ROWS)}, "a folder of files of one kind"),
    "nothing but other splits": (
        {"test.jsonl": lines(ROWS), "dev.jsonl": lines(ROWS)},
        "dataset.split=train: it has files of test, validation; choose one of them",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read_is_refused_with_its_place(what, tmp_path):
    files, expected = BAD[what]
    path = written(tmp_path / "rows", files)
    with pytest.raises(SettingsError) as raised:
        list(dataset.load_rows(config_of(path)))
    assert str(raised.value).startswith(f"dataset.name={path}: ")
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.name='  '"], "dataset.name= : needs a file, a folder or the id of a Hub data set"),
        (["dataset.name="], "dataset.name=: needs a file, a folder or the id of a Hub data set"),
        (["dataset.name=~/no such/[x].jsonl"], "dataset.name=~/no such/[x].jsonl: there is no such file or folder"),
        (["dataset.split='train[a:b]'"], "dataset.split=train[a:b]: Unrecognized instruction format: train[a:b]"),
        (
            ["dataset.columns={input: category, context: input}"],
            "dataset.columns.context=input: category already is for",
        ),
    ],
)
def test_settings_that_cannot_be_meant_get_one_line(overrides, message, tmp_path):
    file = written(tmp_path, {"d.jsonl": lines(ROWS)})
    with pytest.raises(SettingsError) as raised:
        list(dataset.load_rows(config_of(file, *overrides)))
    assert message in str(raised.value)


def test_parts_and_sums_of_splits_are_read_as_datasets_writes_them(tmp_path):
    folder = written(tmp_path / "rows", {"train.jsonl": lines(ROWS), "test.jsonl": lines(ROWS[:2])})
    for split, expected in (
        ("train[:25%]", RIGHT[:6]),
        ("train[-2:] + test", RIGHT[-2:] + RIGHT[:2]),
        ("test[1:]+train[:1]", RIGHT[1:2] + RIGHT[:1]),
    ):
        cfg = DatasetConfig(
            name=str(folder), split=split, subset=None
        )  # as test.py has it, without what it does not need
        assert dataset.load_rows(cfg).column("output") == expected


def test_linked_folders_are_read_once_and_a_link_to_nothing_is_refused(tmp_path):
    written(tmp_path, {"elsewhere/a.jsonl": lines(ROWS[:12]), "rows/b.jsonl": lines(ROWS[12:])})
    (tmp_path / "rows" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "rows" / "around").symlink_to(tmp_path / "rows")
    assert dataset.load_rows(config_of(tmp_path / "rows")).column("output") == RIGHT
    (tmp_path / "rows" / "c.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(SettingsError, match="rows: c.jsonl is a link to a file that is not there"):
        dataset.load_rows(config_of(tmp_path / "rows"))


def test_a_row_that_cannot_be_written_is_counted_though_others_have_its_roles(tmp_path):
    call = {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    spoken, called = (chat(("user", {}), ("assistant", more), ("tool", {}), ("assistant", {})) for more in ({}, call))
    rows = dataset.load_rows(config_of(written(tmp_path, {"d.jsonl": spoken + called + spoken})))
    found = dataset.survey(rows, lambda row: "with calls" if any("tool_calls" in turn for turn in row.turns) else None)
    assert found.left_out == {"with calls": 1}


def test_fingerprint_tells_every_row_that_is_read(tmp_path):
    rows = [ROWS[0] | {"output": str(number)} for number in range(2500)]
    found = set()
    for number in (None, 0, 1001, 1251, 2499):  # not every second or third row only
        changed = [row | ({"output": "other"} if at == number else {}) for at, row in enumerate(rows)]
        found.add(
            dataset.data_facts(dataset.load_rows(config_of(written(tmp_path, {"d.jsonl": lines(changed)}))))["sha256"]
        )
    assert len(found) == 5
    changed = [row | {"category": "nobody needs it"} for row in rows]
    written(tmp_path, {"d.jsonl": lines(rows)})
    facts = dataset.data_facts(dataset.load_rows(config_of(tmp_path / "d.jsonl")))
    assert facts["sha256"] in found
    written(tmp_path, {"d.jsonl": lines(changed)})
    assert facts == dataset.data_facts(dataset.load_rows(config_of(tmp_path / "d.jsonl")))


@pytest.mark.parametrize(
    "name", ["data[1].jsonl", "a::b, {c}.jsonl", "$x 'y'.jsonl", '"q".jsonl', "1e3", "null", "a\\.jsonl"]
)
def test_path_needs_no_quotes_for_hydra(name, tmp_path):
    file = tmp_path / name
    file.mkdir()
    (file / "d.jsonl").write_bytes(lines(ROWS))
    from settings.compose import compose

    config = compose([f"dataset.name={file}", f"dataset.eval_name={file}"]).dataset
    assert (config.name, config.eval_name) == (str(file), str(file))
    assert dataset.load_rows(config).column("output") == RIGHT


def test_labels_are_read_by_their_names(tmp_path):
    features = datasets.Features(
        {"instruction": datasets.Value("string"), "output": datasets.ClassLabel(names=["ham", "spam"]),
         "turns": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"instruction": ["x"] * 3, "output": [1, 0, None], "turns": [[1]] * 3}, features)
    rows.to_parquet(tmp_path / "d.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "both")
    for name in ("d.parquet", "saved", "both"):
        loaded = dataset.load_rows(config_of(tmp_path / name))
        assert loaded.column("output") == ["spam", "ham", ""]
        assert loaded.column("turns") == ['["b"]'] * 3
    with pytest.raises(SettingsError, match="dataset.split=dev: it has train, test"):
        dataset.load_rows(config_of(tmp_path / "both", "dataset.split=dev"))


def test_a_changed_file_is_read_again_whatever_its_time_stamp(tmp_path):
    import os

    file = tmp_path / "d.jsonl"
    for value in ("first", "other"):
        file.write_bytes(lines([{"instruction": "x", "output": value}]))
        os.utime(file, (10**9, 10**9))
        assert dataset.load_rows(config_of(file)).column("output") == [value]


def test_local_files_need_no_folder_that_can_be_written(tmp_path, monkeypatch):
    import tempfile

    from data import table as kept

    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(ROWS))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nowhere")
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
    monkeypatch.setattr(kept, "KEPT_BYTES", 10)
    assert dataset.load_rows(config_of(file)).column("output") == RIGHT


def test_rows_that_lie_in_a_file_are_those_that_were_read(tmp_path, monkeypatch):
    from data import table as kept

    monkeypatch.setattr(kept, "KEPT_BYTES", 1000)
    monkeypatch.setattr(kept, "BATCH_ROWS", 5)
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines([row | {f"more {n // 7}": n} for n, row in enumerate(ROWS)]))
    rows = dataset.load_rows(config_of(file))
    assert rows.column("output") == RIGHT
    assert rows.column("more 1") == [str(n) if n // 7 == 1 else "" for n in range(24)]
    assert [row.turns[-1]["content"] for row in rows.select([20, 3])] == [RIGHT[20], RIGHT[3]]


def test_held_out_rows_may_have_another_shape_than_those_that_are_trained(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"question": "x", "answer": "y"}]))
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    columns = "dataset.columns={instruction: question, output: answer}"
    rows = dataset.load_eval_rows(config_of(tmp_path / "a.jsonl", columns, f"dataset.eval_name={tmp_path / 'b.jsonl'}"))
    assert [row.turns[-1]["content"] for row in rows] == RIGHT


def test_arguments_that_cannot_be_read_get_one_line():
    for arguments, message in (
        (["--rows=x"], "--rows: invalid int value: 'x'; `python dataset.py --help` lists all arguments"),
        (["--rows=-1"], "--rows=-1: use a number of at least 0"),
        (["--jsn"], "unrecognized arguments: --jsn"),
    ):
        with pytest.raises(SettingsError) as raised:
            dataset.parse(arguments)
        assert message in str(raised.value)
