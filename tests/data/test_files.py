"""Files of every kind: each is read as the JSONL file that says the same, and each mistake is told with file and line."""

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import random
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy
import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from rich.console import Console

from qlora.config import TrainConfig, parse
from qlora.data.dataset import check_files, encode_all, encode_files, kept_examples
from qlora.data.formats import ColumnOptions, check_source, read_examples, read_prompts
from qlora.data.kinds import SIGNATURES
from qlora.data.sources import Source, is_local
from qlora.data.template import encode, encode_prompt, load_template
from qlora.errors import DataError, ExitCode, UserError
from qlora.run import explain
from qlora.run.guards import check_finite
from tests.data.chat_templates import with_template

ROWS = [{"instruction": f"q{n}", "response": f'a, "{n}"\nand \u2028 caf\xe9'} for n in range(3)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out := io.BytesIO(), row_group_size=2)
    return out.getvalue()


def as_arrow(rows, new=pyarrow.ipc.new_file) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    with new(out := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def as_feather(rows) -> bytes:
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(rows), out := io.BytesIO(), compression="lz4")
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    with pyarrow.CompressedOutputStream(out := pyarrow.BufferOutputStream(), "zstd") as packed:
        packed.write(content)
    return out.getvalue().to_pybytes()


PACKERS = {"": bytes, ".gz": lambda content: gzip.compress(content, mtime=0), ".zst": zstd}
WRITERS = {
    "rows.jsonl": jsonl,
    "rows.ndjson": jsonl,
    "jsonl.json": jsonl,
    "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "array.jsonl": lambda rows: b"\xef\xbb\xbf" + json.dumps(rows).encode(),
    "data.json": lambda rows: json.dumps({"version": [1], "data": rows}).encode(),
    "spread.json": lambda rows: json.dumps({"about": {"data": []}, "data": rows, "n": 3}, indent=2).encode(),
    "first.json": lambda rows: json.dumps({"data": rows, "n": 3}).encode(),
    "rows.csv": as_csv,
    "bom.csv": lambda rows: b"\xef\xbb\xbf\r\n" + as_csv(rows) + b"\r\n",
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "rows.parquet": as_parquet,
    "rows.arrow": as_arrow,
    "stream.arrow": lambda rows: as_arrow(rows, pyarrow.ipc.new_stream),
    "rows.feather": as_feather,
}


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def unnumbered(source) -> list:
    return [example._replace(line=0) for example in read_examples(source, "train")]


def refused(source, *words: str) -> str:
    """What check_source says; reading says the same."""
    with pytest.raises(DataError) as caught:
        check_source(source, "train")
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.isprintable() and len(text) < 700 and caught.value.exit_code == ExitCode.DATA
    return text


# -- each kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_of_any_kind_is_read_as_jsonl_is(tmp_path, name, packing):
    path = write(tmp_path / (name + packing), PACKERS[packing](WRITERS[name](ROWS)))
    found = list(read_examples(path, "train"))
    assert unnumbered(path) == unnumbered(write(tmp_path / "twin" / "rows.jsonl", jsonl(ROWS)))
    assert len({example.line for example in found}) == 3 and kept_examples(found, found, 2) == found[:2]
    assert str(check_source(path, "train")) == "instruction/response"
    unnamed = write(tmp_path / "packed" / name, path.read_bytes())  # packed, and not named so
    assert unnumbered(unnamed) == unnumbered(path)


def test_one_object_spread_over_lines_is_one_row(tmp_path):
    path = write(tmp_path / "row.jsonl", json.dumps(ROWS[0], indent=1))
    assert unnumbered(path) == unnumbered(write(tmp_path / "twin.jsonl", jsonl(ROWS[:1])))
    one = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    beside = {**ROWS[0], "response": "a", "tags": ["x"], "scores": [1]}
    for name, text in (
        ("one.json", json.dumps(one)),
        ("two.json", json.dumps(one, indent=2)),
        ("three.json", json.dumps(beside)),
    ):
        assert [example.response for example in read_examples(write(tmp_path / name, text), "train")] == ["a"]


def test_lines_of_a_text_are_rows_or_prompts(tmp_path):
    path = write(tmp_path / "texts.txt.gz", gzip.compress(b"\n once upon \r\n\na time\n"))
    assert [(row.line, row.messages[0].content) for row in read_examples(path, "train")] == [(2, " once upon"), (4, "a time")]
    assert str(check_source(path, "train")) == "text"
    assert [(p.messages[0].content, p.where) for p in read_prompts(path)] == [
        (" once upon", f"{path}:2"),
        ("a time", f"{path}:4"),
    ]
    braces = write(tmp_path / "prompts.txt", '{"a": 1}\n')
    refused(braces, "prompts.txt:1: the text looks like JSON. Let its name end in .jsonl")
    assert read_prompts(braces)[0].messages[0].content == '{"a": 1}'


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.arrow", "array.json"])
def test_prompts_are_read_from_any_kind(tmp_path, name):
    path = write(tmp_path / name, WRITERS[name]([{"instruction": row["instruction"]} for row in ROWS]))
    assert [prompt.messages[-1].content for prompt in read_prompts(path)] == ["q0", "q1", "q2"]
    assert read_prompts(path)[0].where.startswith(f"{path}:")
    strings = write(tmp_path / "strings.json", '["a",\n"b"]')
    assert [(p.messages[0].content, p.where) for p in read_prompts(strings)] == [("a", f"{strings}:1"), ("b", f"{strings}:2")]


def test_messages_and_tools_are_json_text_in_csv(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, "tools": [{"name": "f"}]}]
    texts = [{name: json.dumps(value) for name, value in row.items()} for row in rows]
    path = write(tmp_path / "rows.csv", as_csv(texts))
    assert unnumbered(path) == unnumbered(write(tmp_path / "rows.jsonl", jsonl(rows)))
    write(path, as_csv([{"messages": str(turns)}]))  # as Python writes it
    refused(path, "rows.csv:2: messages: must be a list, or the text of a JSON array")


# -- errors with file and line ---------------------------------------------------------------------------------------

GOOD = '{"instruction": "q", "response": "a"}'
WRONG = [
    ("a.json", f'[{GOOD},\n{GOOD},\n{{"instruction": "q",}}]', ["a.json:3:", "not JSON", "near"]),
    ("a.json", f"[{GOOD}\n{GOOD}]", ["a.json:2:1: not JSON: Expecting ',' delimiter"]),
    ("a.json", f"[{GOOD},\n]", ["a.json:2:1: not JSON: Expecting value"]),
    ("a.json", f"[{GOOD},\n", ["a.json:2:1: not JSON: Expecting value"]),
    ("a.json", f"[{GOOD}\n]\n[]", ["a.json:3:1: not JSON: Extra data", "jq -c"]),
    ("a.json", "[\n{}, []]", ["a.json:2: no known column among none"]),
    ("a.json", "[]", ["a.json holds no example"]),
    ("a.json", '{"data": []}', ["a.json holds no example"]),
    ("a.json", f"[{GOOD},\n7]", ["a.json:2: each line must be a JSON object, not int"]),
    ("a.json", '["once", "twice"]', ["a.json:1: each line must be a JSON object, not str", 'Write texts as {"text": ...}']),
    ("a.json", f'[{GOOD},\n{{"instruction": "q", "response": "a", "response": "b"}}]', ["a.json:2: duplicate key 'response'"]),
    ("a.json", f'[{GOOD},\n\n{{"instruction": NaN}}]', ["a.json:3: NaN is no JSON"]),
    ("a.json", f'[{GOOD},\n{{"id": {"9" * 5000}}}]', ["a.json:2: an integer has too many digits"]),
    ("a.json", f"[{GOOD},\n{'[' * 100_000}", ["a.json:2: the JSON is nested too deeply"]),
    ("a.json", f'[{GOOD},\n{{"instruction": "caf'.encode() + b'\xe9"}]', ["a.json:2: byte 21 of the line is not UTF-8"]),
    ("a.json", f'{{\n"data": [{GOOD},\n{{"prompt": "q"}}]}}', ["a.json:3: column 'instruction' is missing"]),
    ("a.json", f"{GOOD}\n{GOOD[:-1]}\n{GOOD}", ["a.json:2:37: not JSON"]),
    ("a.json", '{"a":\n1}\n{"a":\n1}', ["a.json:3:1: not JSON: Extra data", "jq -c . FILE"]),
    (
        "a.jsonl",
        '{"instruction": ["a", "b"], "response": ["c", "d"]}',
        ["a.jsonl:1: the file is one object of columns", "orient"],
    ),
    ("a.json", '{"instruction": {"0": "a"},\n "response": {"0": "c"}}', ["a.json:1: the file is one object of columns"]),
    ("a.json", json.dumps({"train": ROWS, "test": ROWS}), ["one object of splits, train, test", "Save each split"]),
    ("a.json", json.dumps({"rows": ROWS, "n": 3}, indent=1), ["one object with an array in 'rows'", "Save that array alone"]),
    ("a.csv", "instruction,response\nq,a\nq\n", ["a.csv:3: the row has 1 cells, and the header names 2", "Quote cells"]),
    ("a.csv", 'instruction,response\n"q\nq",a\n\nq,a,b\n', ["a.csv:5: the row has 3 cells"]),
    ("a.csv", "instruction,response\nq,a\n,b\n", ["a.csv:3: instruction: is empty"]),
    ("a.csv", 'instruction,response\nq,a\nq,"a\nb\n', ["a.csv:3: not CSV: unexpected end of data", "A quote is not closed"]),
    ("a.csv", 'instruction,response\nq,"a"b\n', ["a.csv:2: not CSV: ',' expected after '\"'", "written twice"]),
    ("a.csv", b"instruction,response\nq,a\nq,caf\xe9\n", ["a.csv:3: byte 6 of the line is not UTF-8"]),
    ("a.csv", "prompt,prompt\nq,a\n", ["a.csv:1: there are two columns 'prompt'"]),
    ("a.csv", ",prompt,completion\n0,q,a\n", ["a.csv:1: column 1 has no name", "to_csv(path, index=False)"]),
    ("a.csv", "prompt;completion\nq;a\n", ["a.csv:1: the only column is 'prompt;completion'", "';'", "Save it with commas"]),
    ("a.csv", "prompt\tcompletion\nq\ta\n", ["a.csv:1: the only column is", "Let its name end in .tsv"]),
    ("a.tsv", "prompt,completion\nq,a\n", ["a.tsv:1: the only column is", "Let its name end in .csv"]),
    ("a.csv", GOOD, ["a.csv:1: the file looks like JSON. Let its name end in .jsonl"]),
    ("a.csv", "instruction,response\n", ["a.csv holds no example"]),
    ("a.csv", "", ["a.csv holds no example"]),
    ("a.parquet", as_parquet([*ROWS, {"instruction": "q", "response": None}]), ["a.parquet:4: response: Input should be"]),
    ("a.arrow", as_arrow([*ROWS, {"instruction": "q", "response": None}]), ["a.arrow:4: response: Input should be"]),
    ("a.parquet", as_parquet(ROWS)[:-20], ["a.parquet is not a Parquet file, or a broken one"]),
    ("a.arrow", as_arrow(ROWS)[:-20], ["a.arrow is not an Arrow file, or a broken one"]),
    ("a.arrow", as_arrow(ROWS, pyarrow.ipc.new_stream)[:-200], ["a.arrow", "is not an Arrow file, or a broken one"]),
    ("a.arrow", "x", ["a.arrow is not an Arrow file"]),
    ("a.txt", b"once\ncaf\xe9", ["a.txt:2: byte 4 of the line is not UTF-8"]),
    ("a.txt", "\n", ["a.txt holds no example"]),
]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, name, content, words, packing):
    content = content.encode() if isinstance(content, str) else content
    path = write(tmp_path / (name + packing), PACKERS[packing](content))
    assert refused(path, *(word.replace(name, name + packing) for word in words))


def test_a_cell_is_not_longer_than_a_line_may_be(tmp_path):
    quoted = 'text\n"' + ("x" * 9_999_998 + "\n") * 2 + '"\n'
    assert refused(
        write(tmp_path / "a.csv", quoted), "a.csv:2: not CSV: field larger than field limit (10000000)", "quote is not closed"
    )
    refused(write(tmp_path / "a.csv", "text\n" + "x" * 10_000_001), "a.csv:2: the line is longer than 10,000,000 bytes")


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "array.json", "rows.csv", "rows.parquet", "stream.arrow"])
def test_packed_data_that_is_cut_off_or_damaged_is_told(tmp_path, name, packing):
    draw = random.Random(0)
    rows = [{"instruction": draw.randbytes(30).hex(), "response": "a"} for _ in range(5000)]
    content = PACKERS[packing](WRITERS[name](rows))
    middle = len(content) // 2
    for cut in (content[:-9], content[:middle]):
        refused(write(tmp_path / (name + packing), cut), name + packing, "cut off or damaged")
    if packing == ".gz":  # which has a checksum
        refused(write(tmp_path / (name + packing), content[:middle] + b"\0" * 64 + content[middle + 64 :]), name + packing)
    if name == "rows.jsonl":
        text = refused(write(tmp_path / (name + packing), content[:middle]), "cut off or damaged")
        assert int(text.split(":")[1]) > 500  # the line that was reached


# -- what is not read ------------------------------------------------------------------------------------------------


def zipped(*names: str) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for name in names:
            archive.writestr(name, GOOD)
    return out.getvalue()


def tarred() -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as archive:
        archive.addfile(member := tarfile.TarInfo("rows.jsonl"), io.BytesIO(b""))
        assert member.size == 0
    return out.getvalue()


def npy(save) -> bytes:
    save(out := io.BytesIO(), numpy.zeros(3))
    return out.getvalue()


def sqlite(path: Path) -> bytes:
    with sqlite3.connect(path) as database:
        database.execute("create table t (x)")
    return path.read_bytes()


FOREIGN = {
    "rows.zip": (zipped("rows.jsonl"), "is a zip archive. Unpack it"),
    "rows.xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "is an Excel workbook or alike. Save the sheet as CSV"),
    "rows.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an Excel workbook of the old kind. Save the sheet as CSV"),
    "rows.npz": (npy(numpy.savez), "holds NumPy arrays. Save it as JSONL"),
    "rows.npy": (npy(numpy.save), "holds NumPy arrays. Save it as JSONL"),
    "rows.tar": (tarred(), "is a tar archive. Unpack it"),
    "rows.tar.gz": (gzip.compress(tarred()), "is a tar archive. Unpack it"),
    "rows.xz": (lzma.compress(b"x"), "is packed with xz. Unpack it, or pack it with gzip"),
    "rows.jsonl.bz2": (bz2.compress(b"x"), "is packed with bzip2. Unpack it"),
    "rows.7z": (b"7z\xbc\xaf\x27\x1c", "is a 7z archive"),
    "rows.lz4": (b"\x04\x22\x4d\x18", "is packed with lz4"),
    "rows.pkl": (b"\x80\x04\x95\x10\0\0\0", "holds serialized Python objects, which may run code when they are read"),
    "rows.avro": (b"Obj\x01", "is an AVRO file"),
    "rows.h5": (b"\x89HDF\r\n", "is HDF5"),
    "rows.pdf": (b"%PDF-1.7", "is a PDF"),
    "rows.yaml": (b"---\n- instruction: q\n", "is YAML. Save it as JSONL"),
    "rows.xml": (b"<?xml version", "is XML"),
    "rows.jsonl": (b"\n<!DOCTYPE html>", "is HTML, as of a download that failed. Download it again"),
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer and not the data. .* git lfs pull"),
    "b.parquet": (as_arrow(ROWS), "is Arrow. Let its name end in .arrow"),
    "c.parquet": (as_arrow(ROWS, pyarrow.ipc.new_stream), "is Arrow. Let its name end in .arrow"),
    "a.arrow": (as_parquet(ROWS), "is Parquet. Let its name end in .parquet"),
    "a.json": (as_parquet(ROWS), "is Parquet. Let its name end in .parquet"),
    "a.feather": (b"FEA1", "is Feather of version 1"),
    "a.csv": ("a,b".encode("utf-16"), "is UTF-16. Save it as UTF-8"),
    "b.csv": ("a,b\n".encode("utf-16-le"), "is UTF-16. Save it as UTF-8"),
    "c.csv": ("a,b\n".encode("utf-16-be"), "is UTF-16. Save it as UTF-8"),
}


@pytest.mark.parametrize("name", [*FOREIGN, "rows.db"])
def test_what_is_not_read_is_told_by_its_first_bytes(tmp_path, name):
    content, words = FOREIGN.get(name) or (sqlite(tmp_path / "x.db"), "is an SQLite database. Export the table as CSV")
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"{name}:1: the file {words}"):
        check_source(path, "train")
    if name != "rows.yaml":  # as a text of prompts may begin
        with pytest.raises(DataError, match=f"{name}:1: the file {words}"):
            read_prompts(path)


def test_each_signature_is_tried():
    words = " ".join([*(words for _, words in FOREIGN.values()), "is an SQLite database"])
    assert not [signature.what for signature in SIGNATURES if signature.what.split(",")[0] not in words]


# -- several files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path, monkeypatch) -> list[str]:
    """Three files of nine, two and three rows, of which the first has blank lines too; the working directory is theirs."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.jsonl", b"\n\n" + jsonl({"prompt": f"b{n}", "completion": "x"} for n in range(9)))
    write(tmp_path / "a.csv", as_csv([{"prompt": f"a{n}", "completion": "y"} for n in range(2)]))
    write(tmp_path / "c.parquet", as_parquet([{"prompt": f"c{n}", "completion": "z"} for n in range(3)]))
    return ["b.jsonl", "a.csv", "c.parquet"]


def asked(source) -> list[str]:
    return [example.prompt[0].content for example in read_examples(source, "train")]


def test_several_files_are_read_in_the_order_given_and_rows_keep_their_lines(three):
    wanted = [f"b{n}" for n in range(9)] + ["a0", "a1", "c0", "c1", "c2"]
    source = Source(three, "train")
    found = list(read_examples(source, "train"))
    assert [example.prompt[0].content for example in found] == wanted
    assert asked(three[::-1]) == wanted[11:] + wanted[9:11] + wanted[:9]
    numbers = [example.line for example in found]
    assert numbers == [*range(3, 12), 11 + 2, 11 + 3, 14 + 1, 14 + 2, 14 + 3]
    places = [f"b.jsonl:{n}" for n in range(3, 12)] + ["a.csv:2", "a.csv:3"] + [f"c.parquet:{n}" for n in (1, 2, 3)]
    for fresh in (source, Source(three, "train")):  # also one that has read nothing yet
        assert [fresh.where(number) for number in numbers] == places
        assert [fresh.line(number) for number in numbers] == places
    assert source.lines(numbers[8:10]) == "b.jsonl:11, a.csv:2" and source.lines(numbers).endswith("c.parquet:1, ...") is False
    assert source.lines(numbers).endswith("a.csv:2, ...") and str(source) == "b.jsonl, a.csv, c.parquet"
    single = Source("b.jsonl", "train")
    assert (single.where(5), single.line(5), single.lines([5, 6])) == ("b.jsonl:5", "5", "lines 5, 6")


def test_an_error_names_the_file_in_which_it_is(three, template):
    with Path("c.parquet").open("wb") as file:
        file.write(as_parquet([{"prompt": "c", "completion": "d"}, {"prompt": "e" * 999, "completion": "f" * 999}]))
    source = Source(three, "train")
    config = TrainConfig(max_length=60, on_long="error")
    with pytest.raises(DataError, match=r"^c.parquet:2: \d+ tokens, more than --max-length 60"):
        encode_all(read_examples(source, "train"), source, template, config)
    _, notes = encode_all(read_examples(source, "train"), source, template, dataclasses.replace(config, on_long="drop"))
    assert "1 dropped as longer than 60 (c.parquet:2)" in notes
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, keys in (("e.jsonl", {}), ("f.jsonl", {"id": 1})):
        write(Path(name), jsonl([{"messages": turns}, {"messages": [turns[0], {**turns[1], **keys}]}]))
    pair = Source(["e.jsonl", "f.jsonl"], "train")
    with pytest.raises(UserError, match=r"^f.jsonl:2: the plain prompt format does not render id"):
        encode_all(read_examples(pair, "train"), pair, template, config)
    write(Path("d.jsonl"), '{"question": "q", "answer": "a"}\n')
    refused([*three, "d.jsonl"], "d.jsonl:1: column 'prompt' is missing; the row has question, answer")
    write(Path("empty.jsonl"), "\n")
    refused(["b.jsonl", "empty.jsonl"], "empty.jsonl holds no row")
    refused(["b.jsonl", "none.csv"], "none.csv does not exist")


@pytest.mark.parametrize(
    "names", [["a.csv", "b.jsonl", "a.csv"], ["a.csv", "./a.csv"], ["a.csv", "a.c*"], ["link.csv", "a.csv"]]
)
def test_a_file_that_is_given_twice_is_refused(three, names):
    Path("link.csv").symlink_to("a.csv")
    assert refused(names, "a.csv is given twice. Give each file once.")


def test_patterns_are_expanded_in_order(three):
    assert asked("*.*") == asked(["a.csv", "b.jsonl", "c.parquet"])
    assert asked(["c.parquet", "[ab].*"]) == asked(["c.parquet", "a.csv", "b.jsonl"])
    refused("*.nothing", "*.nothing matches no file")
    refused("[xyz].jsonl", "[xyz].jsonl does not exist")
    write(Path("odd[1].jsonl"), jsonl([{"prompt": "odd", "completion": "x"}]))
    assert asked("odd[1].jsonl") == ["odd"]


def test_a_folder_is_all_its_files_in_order(three, tmp_path):
    write(tmp_path / ".hidden.jsonl", "broken")
    write(tmp_path / "README.md", "About")
    write(tmp_path / "more" / "x.jsonl", "broken")
    source = Source(str(tmp_path), "train")
    assert [part.path.name for part in source.parts] == ["a.csv", "b.jsonl", "c.parquet"]
    assert source.count == f"; 3 files; {tmp_path}: left out README.md, more"
    assert asked(".") == asked(["a.csv", "b.jsonl", "c.parquet"]) and Source(".", "train").where(1) == "a.csv:1"
    outer = tmp_path / "outer"
    for name in ("x", "y"):
        write(outer / name / "rows.jsonl.gz", gzip.compress(jsonl([{"prompt": name, "completion": "z"}])))
    write(outer / ".git" / "rows.jsonl", "broken")
    assert asked("outer") == ["x", "y"] and Source("outer", "train").where(2) == "outer/y/rows.jsonl.gz:1"


def test_a_folder_without_data_or_with_several_splits_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is a folder without a file that can be read. It is empty.", ".jsonl")
    write(tmp_path / "other" / "rows.xlsx", "x")
    refused(tmp_path / "other", "It holds rows.xlsx. Files that are read: .jsonl")
    write(tmp_path / "both" / "train-0001.jsonl", jsonl(ROWS))
    write(tmp_path / "both" / "train-0002.jsonl", jsonl(ROWS))
    assert len(asked(tmp_path / "both")) == 6
    write(tmp_path / "both" / "test.jsonl", jsonl(ROWS))
    refused(tmp_path / "both", "holds files of several splits: test.jsonl, train-0001.jsonl", "Name the files")


def test_a_folder_that_datasets_saved_is_read_by_its_split(tmp_path):
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    train.save_to_disk(tmp_path / "one")
    assert unnumbered(tmp_path / "one") == unnumbered(write(tmp_path / "rows.jsonl", jsonl(ROWS)))
    datasets.DatasetDict({"train": train, "test": test, "extra": test}).save_to_disk(tmp_path / "several")
    assert len(unnumbered(tmp_path / "several")) == 3 and len(list(read_examples(tmp_path / "several", "test"))) == 1
    assert len(unnumbered(f"{tmp_path}/several:extra")) == 1
    assert len(unnumbered([f"{tmp_path}/several:extra", f"{tmp_path}/several:test"])) == 2
    with pytest.raises(
        DataError, match=r"several holds the splits train, test, extra, and not 'dev'. Name one: .*several:train"
    ):
        Source(tmp_path / "several", "dev")
    refused(f"{tmp_path}/several:dev", "several:dev is not a data set that save_to_disk wrote")
    (tmp_path / "one" / "state.json").write_text("{}")
    refused(tmp_path / "one", "is not a data set that save_to_disk wrote, or a broken one")


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_a_hub_data_set_is_read_by_name_configuration_and_split(monkeypatch):
    asked_for = []

    def load_dataset(*names, split):
        asked_for.append((*names, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("org/set", "org/set:small", "org/set:en:small", "org/set:en:"):
        assert unnumbered(name) and Source(name, "train").where(2) == f"{name}:2"
    assert asked_for == [("org/set", "train"), ("org/set", "small"), ("org/set", "en", "small"), ("org/set", "en", "train")]
    refused("org/set:a:b:c", "org/set:a:b:c names no data set of the hub. Give NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    assert len(unnumbered(["org/set:en:a", "org/set:de:a"])) == 6
    refused(["org/set", "org/set:train"], "org/set:train is given twice")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "org/set",
            "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\nExample of usage: ...",
            ["org/set: the hub data set 'org/set' needs a configuration. It has en, de.", "split: org/set:en:train"],
        ),
        (
            "org/set:fr:test",
            "BuilderConfig 'fr' not found. Available: ['en', 'de']",
            ["'org/set' has no configuration 'fr'. It has en, de.", "org/set:en:test"],
        ),
        (
            "org/set:en",
            "Unknown split \"en\". Should be one of ['train'].",
            ["split 'en' failed", "write org/set:CONFIG:SPLIT"],
        ),
        ("org/set:en:tst", 'Unknown split "tst".', ["configuration 'en', split 'tst' failed: Unknown split"]),
    ],
)
def test_a_configuration_that_is_missing_or_wrong_is_told_with_those_that_there_are(monkeypatch, name, error, words):
    def load_dataset(*_, split):
        raise ValueError(error)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refused(name, *words)


# -- nulls that Arrow fills in ---------------------------------------------------------------------------------------


def calling(name: str, arguments: dict, parameters: dict) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    return {"messages": turns, "tools": [{"type": "function", "function": {"name": name, "parameters": parameters}}]}


CALLS = [
    calling("f", {"city": "Rome"}, {"type": "object", "properties": {"city": {"type": "string"}}}),
    calling(
        "g", {"n": 3, "deep": {"x": [1]}}, {"type": "object", "properties": {"n": {"type": "integer"}, "deep": {"enum": ["a"]}}}
    ),
    calling("h", {}, {"type": "object", "required": []}),
]
RENDERS_ALL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ message.content or '' }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "stream.arrow", "saved"])
def test_keys_that_arrow_fills_with_null_do_not_reach_the_template(tmp_path, tokenizer, name):
    own = with_template(tokenizer, "chatml")
    own.chat_template = RENDERS_ALL
    template = load_template(own, "chat")
    if name == "saved":
        datasets.Dataset.from_list(CALLS).save_to_disk(tmp_path / name)
    else:
        write(tmp_path / name, WRITERS[name](CALLS))
    twin = write(tmp_path / "rows.jsonl", jsonl(CALLS))
    pairs = list(zip(unnumbered(tmp_path / name), unnumbered(twin), strict=True))
    assert len(pairs) == 3
    for arrow, written in pairs:
        assert json.loads(json.dumps(arrow.tools)) == json.loads(json.dumps(written.tools))
        assert encode(arrow, template, "response")[:2] == encode(written, template, "response")[:2]
        prompts = [encode_prompt(example.prompt, template, example.tools) for example in (arrow, written)]
        assert prompts[0] == prompts[1]


def test_a_null_that_a_user_wrote_in_json_stays(tmp_path):
    row = calling("f", {"city": None}, {"default": None})
    (example,) = read_examples(write(tmp_path / "rows.jsonl", jsonl([row])), "train")
    assert example.messages[1].keys["tool_calls"][0]["function"]["arguments"] == {"city": None}
    assert example.tools[0]["function"]["parameters"] == {"default": None}


# -- flags -----------------------------------------------------------------------------------------------------------


def test_flags_and_yaml_take_one_name_or_several(three, tmp_path):
    assert parse(["--train-file", *three, "--eval-file", "None"]).train_file == tuple(three)
    write(tmp_path / "one.yaml", "train_file: a.csv\neval_file: null\n")
    write(tmp_path / "many.yaml", "train_file: [a.csv, b.jsonl]\neval_file:\n- c.parquet\n")
    one, many = (parse(["--config", str(tmp_path / name)]) for name in ("one.yaml", "many.yaml"))
    assert (one.train_file, one.eval_file) == (("a.csv",), None)
    assert (many.train_file, many.eval_file) == (("a.csv", "b.jsonl"), ("c.parquet",))
    again = write(tmp_path / "again.yaml", many.to_yaml())
    assert parse(["--config", str(again)]) == many
    assert str(many.resolved(on_gpu=False)[0].output_dir) == "runs/demo-a-and-1-more"
    with pytest.raises(UserError, match="--train-file"):
        parse(["--train-file"])


def test_the_log_counts_files_and_the_data_are_those_of_one_file(three, template, tmp_path):
    console = Console(file=io.StringIO(), width=1000)
    config = parse(["--train-file", *three, "--eval-file", "a.csv"])
    samples, eval_set = encode_files(config, check_files(config), template, console)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("Data: 14 examples") and lines[0].endswith("; form prompt/completion; 3 files")
    assert lines[1].startswith("Eval: 2 examples") and lines[1].endswith("; form prompt/completion")
    rows = [json.loads(line) for line in Path("b.jsonl").read_text().splitlines() if line]
    rows += [{"prompt": f"a{n}", "completion": "y"} for n in range(2)] + [
        {"prompt": f"c{n}", "completion": "z"} for n in range(3)
    ]
    whole = write(tmp_path / "whole" / "rows.jsonl", jsonl(rows))
    twin, _ = encode_all(read_examples(whole, "train"), whole, template, config)
    assert samples.sha256 == twin.sha256 and samples.source.where(samples[9].line) == "a.csv:2"
    assert eval_set.source.line(eval_set[0].line) == "2"


def test_names_of_files_and_of_the_hub_are_told_apart(tmp_path):
    for name in ("rows.csv", "rows.jsonl.gz", "~/rows", "./x", "data/*", "folder/", str(tmp_path)):
        assert is_local(name), name
    for name in ("org/set", "org/set:train", "org/set:en:train", "set"):
        assert not is_local(name), name


def test_columns_have_other_names_in_csv_too(tmp_path):
    path = write(tmp_path / "rows.csv", "question,passage,answer\nq,more,a\n")
    options = ColumnOptions.parse(["instruction=question", "input=passage", "response=answer"], [])
    (example,) = read_examples(path, "train", options)
    assert (example.prompt[0].content, example.response, example.line) == ("q\n\nmore", "a", 2)


def test_a_step_that_is_not_finite_names_the_files_of_its_lines(three):
    row = {"step": 3, "loss": float("nan"), "grad_norm": 1.0, "learning_rate": 0.1, "lines": [3, 13]}
    said: list[str] = []
    steps = SimpleNamespace(rows=[row], before=[], tracker=SimpleNamespace(say=said.append))
    assert check_finite(steps, 0, TrainConfig(skip_nonfinite=1), str, Source(three, "train")) == 1
    assert "lines b.jsonl:3, a.csv:2 of the training data" in said[0]


def test_the_sample_that_is_explained_is_named_with_its_file(three, template, monkeypatch):
    shown: list[int | str] = []
    config = parse(["--train-file", *three, "--eval-file", "None", "--explain"])
    samples, _ = encode_files(config, check_files(config), template, Console(file=io.StringIO()))
    monkeypatch.setattr(explain, "parameter_counts", lambda model: (1, 1))
    monkeypatch.setattr(explain, "token_table", lambda rows, line: shown.append(line))
    explain.explain_start(config, None, samples, template.tokenizer, Console(file=io.StringIO()))
    assert shown == ["b.jsonl:3"]


def test_lists_of_messages_as_text_in_two_columns_are_no_texts(tmp_path):
    prompt, completion = ([{"role": role, "content": "x"}] for role in ("user", "assistant"))
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion"], [json.dumps(prompt), json.dumps(completion)]])
    with pytest.raises(
        DataError, match=r"rows.csv:2: prompt and completion are lists of messages as JSON text.*JSONL or Parquet"
    ):
        list(read_examples(path, "train"))
    for row in ({"prompt": json.dumps(prompt), "completion": "It is a list."}, {"prompt": "[{]", "completion": "[{]"}):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        assert [example.response for example in read_examples(path, "train")] == [row["completion"]]
