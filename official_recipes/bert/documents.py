"""Documents of raw text, one after the other, as lists of paragraphs.

Forms of text, compressed or not:

    plain           one paragraph or sentence a line, a blank line between documents
    wikiextractor   <doc ...> title, paragraphs </doc>, as WikiExtractor writes them
    gutenberg       Project Gutenberg's books, one for each file, in files or in a tar archive
    python          no files: the English text that ships with Python
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from official_recipes.common.data_format import DataFormatError

FORMS = ("plain", "wikiextractor", "gutenberg")

Document = list[str]
Progress = Callable[[int], None]
"""Receives the bytes of the sources that were read so far."""

_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_TAR = re.compile(r"\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2|txz)$", re.IGNORECASE)
_BOOK_BEGINS = re.compile(r"^\W*START OF (THE|THIS) PROJECT GUTENBERG", re.IGNORECASE)
_BOOK_ENDS = re.compile(r"^\W*END OF ((THE|THIS) )?PROJECT GUTENBERG", re.IGNORECASE)
_HAS_WORD = re.compile(r"\w")
_HEAD = 1 << 16


def find_files(source: str) -> list[Path]:
    """The files that a source names.

    Args:
        source: Files, folders (all files below them) and patterns, separated by commas.

    Raises:
        DataFormatError: One of them has no files.
    """
    found: list[Path] = []
    for part in (p.strip() for p in source.split(",")):
        if not part:
            continue
        path = Path(part)
        if path.is_dir():
            files = sorted(
                Path(folder) / name
                for folder, _, names in os.walk(path, followlinks=True)
                for name in names
                if not name.startswith(".")
            )
        elif path.is_file():
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(part)) if Path(name).is_file()]
        if not files:
            raise DataFormatError(f"{part!r} matches no file")
        found += files
    if not found:
        raise DataFormatError("no files are named")
    return found


def read_documents(
    files: Sequence[Path], form: str | None, progress: Progress
) -> Iterator[Document]:
    """Reads all documents, never more than one into memory.

    Args:
        files: Where they are.
        form: One of `FORMS`, or ``None`` to recognize each file's.
        progress: Called after each document and each file.

    Yields:
        The paragraphs of a document; documents without any are left out.

    Raises:
        DataFormatError: A file cannot be read as what it is.
    """
    done = 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as raw:
            try:
                for document in _read_file(path, raw, form):
                    progress(done + raw.tell())
                    if document:
                        yield document
            except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise DataFormatError(f"{path} is damaged: {error}") from error
            except UnicodeDecodeError as error:
                raise DataFormatError(f"{path} is not UTF-8 text: {error}") from error
        done += size
        progress(done)


def python_documents() -> Iterator[Document]:
    """The reference manual's topics that `help()` shows, which come with Python."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield _paragraphs(topics[name].splitlines())


def _read_file(path: Path, raw: IO[bytes], form: str | None) -> Iterator[Document]:
    if _TAR.search(path.name):
        if form not in (None, "gutenberg"):
            raise DataFormatError(f"{path}: archives are read as gutenberg only, not as {form}")
        yield from _read_archive(raw)
        return
    opener = _OPENERS.get(path.suffix.lower())
    stream = raw if opener is None else opener(raw)
    form = form or _recognize(stream)
    if form == "gutenberg":
        yield _book(stream.read())
    else:
        reader = _wikiextractor if form == "wikiextractor" else _plain
        yield from reader(path, (line.decode("utf-8-sig") for line in stream))


def _recognize(stream: Any) -> str:
    head = stream.read(_HEAD)
    stream.seek(0)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<doc "):
        return "wikiextractor"
    text = head.decode("latin-1")
    return "gutenberg" if any(map(_BOOK_BEGINS.search, text.splitlines())) else "plain"


def _plain(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    del path
    document: Document = []
    for line in lines:
        if line := line.strip():
            document.append(line)
        elif document:
            yield document
            document = []
    yield document


def _wikiextractor(path: Path, lines: Iterable[str]) -> Iterator[Document]:
    document: Document | None = None
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line.startswith("<doc "):
            if document is not None:
                raise DataFormatError(f"{path}, line {number}: <doc> within a document")
            document = []
        elif line == "</doc>":
            if document is None:
                raise DataFormatError(f"{path}, line {number}: </doc> without <doc>")
            yield document
            document = None
        elif line:
            if document is None:
                raise DataFormatError(f"{path}, line {number}: text outside <doc> ... </doc>")
            document.append(line)
    if document is not None:
        raise DataFormatError(f"{path} ends within a document")


def _read_archive(raw: IO[bytes]) -> Iterator[Document]:
    with tarfile.open(fileobj=raw, mode="r|*") as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith(".txt"):
                yield _book(cast(IO[bytes], archive.extractfile(member)).read())


def _book(content: bytes) -> Document:
    """A book without what Project Gutenberg says before and after it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")  # as older books are
    lines = text.splitlines()
    begin = next((i + 1 for i, line in enumerate(lines) if _BOOK_BEGINS.search(line)), 0)
    end = next((i for i in range(begin, len(lines)) if _BOOK_ENDS.search(lines[i])), len(lines))
    return _paragraphs(lines[begin:end])


def _paragraphs(lines: Iterable[str]) -> Document:
    """Joins the lines between blank lines; lines without a letter or digit are ornaments."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line := line.strip():
            if _HAS_WORD.search(line):
                paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return [" ".join(paragraph) for paragraph in paragraphs if paragraph]
