"""What a file is, by its name and by its first bytes, and its bytes, unpacked if it is gzip or zstd."""

import gzip
import itertools
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast

from qlora.errors import DataError

Kind = Literal["json", "csv", "parquet", "arrow", "text"]
KINDS: dict[str, Kind] = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".text": "text",
}  # fmt: skip
PACKED = (".gz", ".zst")
READ = f"{', '.join(KINDS)}, each also with {' or '.join(PACKED)}"  # for messages
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
HEAD_BYTES = 4096
COPIED_BYTES = 1 << 20  # at a time


class Signature(NamedTuple):
    """How a file begins that is not read, or only under another name."""

    begin: bytes  # a regular expression
    what: str
    hint: str
    kind: Kind | None = None  # a file that is named as one of these may begin so


UNPACK = "Unpack it, or pack it with gzip or zstd."
AS_CSV = "Save the sheet as CSV."
AS_TEXT = "Save it as JSONL, CSV or Parquet."
# With a byte-order mark, or with a zero in every other byte of its first two characters.
UTF_16 = rb"\xff\xfe|\xfe\xff|[\t\n\r -~]\0[\t\n\r -~]\0|\0[\t\n\r -~]\0[\t\n\r -~]"
MAY_RUN = "holds serialized Python objects, which may run code when they are read"
SIGNATURES = (
    Signature(UTF_16, "is UTF-16", "Save it as UTF-8."),
    Signature(rb"PAR1", "is Parquet", "Let its name end in .parquet.", "parquet"),
    Signature(rb"ARROW1|\xff\xff\xff\xff", "is Arrow", "Let its name end in .arrow.", "arrow"),
    Signature(rb"FEA1", "is Feather of version 1", "Save it as Feather of version 2, or as Parquet."),
    Signature(rb"PK\x03\x04.{26}(\[Content_Types\]|_rels/|docProps/|xl/)", "is an Excel workbook or alike", AS_CSV),
    Signature(rb"\xd0\xcf\x11\xe0", "is an Excel workbook of the old kind", AS_CSV),
    Signature(rb"PK\x03\x04.{26}[\w-]{1,60}\.npy|\x93NUMPY", "holds NumPy arrays", AS_TEXT),
    Signature(rb"PK(\x03\x04|\x05\x06)", "is a zip archive", UNPACK),
    Signature(rb".{257}ustar", "is a tar archive", UNPACK),
    Signature(rb"\xfd7zXZ\0", "is packed with xz", UNPACK),
    Signature(rb"BZh[1-9]1AY", "is packed with bzip2", UNPACK),
    Signature(rb"7z\xbc\xaf\x27\x1c", "is a 7z archive", UNPACK),
    Signature(rb"\x04\x22\x4d\x18", "is packed with lz4", UNPACK),
    Signature(rb"\x80[\x02-\x05][\x95c}\](]", MAY_RUN, AS_TEXT),
    Signature(rb"SQLite format 3\0", "is an SQLite database", "Export the table as CSV."),
    Signature(rb"Obj\x01", "is an AVRO file", AS_TEXT),
    Signature(rb"\x89HDF", "is HDF5", AS_TEXT),
    Signature(rb"%PDF-", "is a PDF", AS_TEXT),
    Signature(rb"version https://git-lfs", "is a Git LFS pointer and not the data", "Fetch the data: git lfs pull."),
    Signature(rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html)", "is HTML, as of a download that failed", "Download it again."),
    Signature(rb"(?i)(\xef\xbb\xbf)?\s*<\?xml", "is XML", AS_TEXT),
    Signature(rb"%YAML|---\r?\n", "is YAML", "Save it as JSONL.", "text"),
)  # fmt: skip


def kind_of(path: Path) -> Kind | None:
    """What a file is by its name; None if the name does not say."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def refuse_foreign(head: bytes, kind: Kind, path: Path) -> None:
    """Refuse a file that begins as one of another kind does.

    Args:
        head: its first bytes, unpacked.
        kind: that it is read as.
        path: of the file, for the message.

    Raises:
        DataError: saying what the file is, and what to do.
    """
    for signature in SIGNATURES:
        if kind != signature.kind and re.match(signature.begin, head, re.DOTALL):
            raise DataError(f"{path}:1: the file {signature.what}.", hint=signature.hint)


def unpacked(path: Path) -> tuple[BinaryIO, str]:
    """A file, open for reading, and what it is packed with: gzip, zstd or nothing, by its first bytes.

    Raises:
        OSError: if it cannot be opened.
    """
    file = path.open("rb")
    head = file.peek(len(ZSTD))
    if head.startswith(GZIP):
        file.close()
        return cast(BinaryIO, gzip.open(path)), "gzip"
    if head.startswith(ZSTD):
        import pyarrow

        return BufferedReader(pyarrow.CompressedInputStream(file, "zstd")), "zstd"
    return file, ""


def first_bytes(path: Path) -> bytes:
    """The first few thousand bytes of a file, unpacked; fewer if its first block is smaller.

    Raises:
        DataError: if what it is packed with is damaged.
        OSError: if it cannot be read.
    """
    file, packing = unpacked(path)
    with file:
        try:
            return cast(BufferedReader, file).read1(HEAD_BYTES)
        except (EOFError, zlib.error, OSError) as error:
            raise _damaged(f"{path}:1", packing, error) from None


def raw_lines(path: Path, longest: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line, unpacked; of one that is longer than `longest`, the first `longest` + 1 bytes.

    Raises:
        DataError: if what the file is packed with is damaged, naming the line reached.
        OSError: if the file cannot be read.
    """
    # Lines end at \n alone (U+2028 may stand inside a string), so they are split as bytes and decoded one by one.
    file, packing = unpacked(path)
    size, line = -1 if longest is None else longest + 1, 1
    with file:
        try:
            for line in itertools.count(1):
                raw = file.readline(size)
                if not raw:
                    return
                yield line, raw
        except (EOFError, zlib.error, OSError) as error:
            raise _damaged(f"{path}:{line}", packing, error) from None


def unpack(path: Path, to: BinaryIO) -> bool:
    """Write what a packed file holds to another; False, and nothing is written, if the file is not packed.

    Raises:
        DataError: if what it is packed with is damaged.
        OSError: if one of the files cannot be read or written.
    """
    file, packing = unpacked(path)
    with file:
        while packing:
            try:
                chunk = file.read(COPIED_BYTES)
            except (EOFError, zlib.error, OSError) as error:
                raise _damaged(str(path), packing, error) from None
            if not chunk:
                break
            to.write(chunk)
    return bool(packing)


def _damaged(where: str, packing: str, error: Exception) -> Exception:
    if not packing:
        return error
    reason = " ".join(str(error).split()).rstrip(".")
    return DataError(f"{where}: the {packing} data is cut off or damaged: {reason}.", hint="Download or pack it again.")
