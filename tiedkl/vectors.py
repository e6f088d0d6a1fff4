"""Readers of embedding files for `tiedkl.embeddings`: each yields the key of every row, and wanted vectors."""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

log = logging.getLogger("tiedkl")

Row = tuple[str | int, Tensor | None]  # the word, or the row's number where rows have no words; (D',), or None
Wanted = Callable[[str | int], bool]
Progress = Callable[[int, int], None]
EVERY = 1 << 16  # rows between two calls of a progress function, and rows of a matrix that are read at a time
ARCHIVES = {b"PK\x03\x04": "a zip archive: unpack it first", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@contextmanager
def _opened(path: Path, progress: Progress | None) -> Iterator[tuple[IO[bytes], Callable[[int], None]]]:
    """The file, unzipped on the way where it is gzip, and what tells how far a row is. ValueError where it is empty."""
    size = path.stat().st_size
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        start = raw.read(4)
        raw.seek(0)
        for magic, what in ARCHIVES.items():
            if start.startswith(magic):
                advice = "" if ":" in what else ", which cannot be read: convert it to UTF-8"
                raise ValueError(f"{path} is {what}{advice}")
        zipped = start.startswith(b"\x1f\x8b")
        file = cast(IO[bytes], stack.enter_context(gzip.GzipFile(fileobj=raw)) if zipped else raw)

        def tell(row: int) -> None:
            if progress is not None and row % EVERY == 0:
                progress(raw.tell(), size)

        try:
            yield file, tell
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or truncated gzip file: {error}") from error
        if progress is not None:
            progress(size, size)


def read_text(
    path: Path, wanted: Wanted, encoding: str, errors: str, header: bool | None, progress: Progress | None = None
) -> Iterator[Row]:
    """A word and its numbers on each line, one space between them. The word itself may contain spaces."""
    width, announced, rows = 0, 0, 0
    with _opened(path, progress) as (file, tell):
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # UTF-8's byte order mark
            line = line.rstrip(b" \t\r\n").replace(b"\t", b" ")
            where = f"{path}, line {number}"
            if number == 1 and header is not False:
                first = line.split()
                if len(first) == 2 and all(x.isdigit() for x in first):
                    announced, width = int(first[0]), int(first[1])
                    if width == 0:
                        raise ValueError(f"{where}: the header says that vectors have 0 numbers")
                    continue
                if header:
                    raise ValueError(f"{where}: expected a header 'rows width', got {_shown(line)}")
            width = width or _trailing_numbers(line)
            spaces = line.count(b" ")
            if width == 0 or spaces < width:
                expected = f"{width} numbers" if width else "numbers"
                raise ValueError(f"{where}: expected a word and {expected}, got {_shown(line)}")
            word, *numbers = line.rsplit(b" ", width) if spaces > width else line.split(b" ", 1)
            if spaces > width and all(_is_number(x) for x in word.split(b" ")[1:]):
                raise ValueError(f"{where}: {spaces} numbers where other lines have {width}: {_shown(line)}")
            try:
                text = word.decode(encoding, errors)
            except UnicodeDecodeError as error:
                advice = "give its encoding=, or errors='replace' to go on"
                raise ValueError(f"{where}: the word {word!r} is not {encoding}: {advice}") from error
            rows += 1
            tell(rows)
            yield text, _parsed(b" ".join(numbers).split(b" "), where) if wanted(text) else None
    if rows == 0:
        raise ValueError(f"{path} is empty" if not announced else f"{path} has a header and no rows")
    _compare(path, announced, rows)


def _compare(path: Path, announced: int, rows: int) -> None:
    if announced and announced != rows:
        log.warning("%s: the header announces %d rows, there are %d; is the file complete?", path, announced, rows)


def _is_number(x: bytes) -> bool:
    try:
        float(x)
    except ValueError:
        return False
    return True


def _trailing_numbers(line: bytes) -> int:
    """How many numbers the line ends in, its first word aside."""
    count = 0
    for x in reversed(line.split(b" ")[1:]):
        if not _is_number(x):
            break
        count += 1
    return count


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "backslashreplace")) + "..." * (len(line) > 60)


def _parsed(numbers: Sequence[bytes], where: str) -> Tensor:
    values = []
    for x in numbers:
        try:
            values.append(float(x))
        except ValueError:
            raise ValueError(f"{where}: {_shown(x)} is not a number") from None
        if not math.isfinite(values[-1]):
            raise ValueError(f"{where}: {_shown(x)} is not a finite number")
    return torch.tensor(values, dtype=torch.float64)


def read_binary(
    path: Path, wanted: Wanted, encoding: str, errors: str, progress: Progress | None = None
) -> Iterator[Row]:
    """word2vec's binary format: a line "rows width", then each word, a space, and its numbers as float32."""
    with _opened(path, progress) as (file, tell):
        first = file.readline(100).split()
        if len(first) != 2 or not all(x.isdigit() for x in first):
            raise ValueError(f"{path} does not start with 'rows width': is it word2vec's binary format?")
        rows, size = int(first[0]), 4 * int(first[1])
        rest, at = b"", 0  # what was read, and where the next row starts in it
        for number in range(1, rows + 1):
            while (end := rest.find(b" ", at)) < 0 or len(rest) < end + 1 + size:
                more = file.read(1 << 20)
                if not more:
                    raise ValueError(f"{path} ends within row {number} of {rows}")
                rest, at = rest[at:] + more, 0
            word, vector = rest[at:end], rest[end + 1 : end + 1 + size]
            at = end + 1 + size
            try:
                text = word.lstrip(b"\n").decode(encoding, errors)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, row {number}: the word {word!r} is not {encoding}") from error
            tell(number)
            yield text, torch.frombuffer(bytearray(vector), dtype=torch.float32) if wanted(text) else None


def read_safetensors(
    path: Path, name: str | None, words: Sequence[str] | None, wanted: Wanted, progress: Progress | None = None
) -> Iterator[Row]:
    """The rows of matrix `name`, by their words, or by number where there are none."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs the safetensors package: pip install safetensors") from error
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dictionary
        matrices = [key for key, shape in shapes.items() if len(shape) == 2]
        if name is None and len(matrices) != 1:
            raise ValueError(f"{path} has {len(matrices)} matrices, name= one of them: {', '.join(matrices)}")
        name = matrices[0] if name is None else name
        if name not in matrices:
            raise ValueError(f"{path} has no matrix {name!r}, only {', '.join(matrices) or 'none'}")
        rows = shapes[name][0]
        if words is not None and len(words) != rows:
            raise ValueError(f"{path}: {len(words)} words for the {rows} rows of {name!r}")
        for start in range(0, rows, EVERY):
            block = file.get_slice(name)[start : start + EVERY]
            if not block.is_floating_point():
                raise ValueError(f"{path}: {name!r} is {block.dtype}, not a floating dtype")
            for i, row in enumerate(block, start):
                key = i if words is None else words[i]
                yield key, row if wanted(key) else None
            if progress is not None:
                progress(min(start + EVERY, rows), rows)
