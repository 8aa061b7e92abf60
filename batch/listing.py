"""Sources -> manifest: what there is to do, in numbered blocks that any later run finds again.

The listing is streamed: it holds one shard of names, the directories still to visit and, where sources can overlap, a
digest of every name; see docs/batch.md for the figures.
"""

import codecs
import errno
import fnmatch
import functools
import glob
import hashlib
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from batch.errors import SourceError, first_line
from batch.location import decode_path, encode_path, filesystem_of, is_pattern, is_remote, normalize

__all__ = ["KNOWN", "MANIFEST_SCHEMA", "Input", "Listing", "block_size", "blocks_of", "digest", "shard_count"]

# One shard is held in memory and sorted by name.
_SHARD_INPUTS: Final = 65_536

# A list is read in pieces of this size, and no path is as long.
_LIST_BYTES: Final = 1 << 20

# Why a glob passes a directory without a word: it is none, or cannot hold that name.
_PASSED: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)

_REACHED: Final = "directory that was reached before, or the output itself"
KNOWN: Final = "already in the output"

MANIFEST_SCHEMA: Final = pa.schema(
    [
        ("block", pa.int64()),
        ("first_id", pa.int64()),
        ("paths", pa.list_(pa.string())),
        ("errors", pa.list_(pa.string())),
    ]
)


class Input(NamedTuple):
    """One input: its name, and what already the listing found wrong with it."""

    path: str
    error: str | None = None


class Listing:
    """Finds the inputs of some sources, each once.

    A source is a directory (walked recursively), a quoted glob, a `.txt` list with a path in each line, a `.parquet`
    list with a column `path`, a single file, or any of these but a glob behind a URI such as `s3://bucket/prefix`.

    Attributes:
        sources: names, see `batch.location`.
        excluded: how many the last call of `inputs` has left out, by reason; complete when that is exhausted.
    """

    def __init__(self, sources: Sequence[str], skip: str | None = None, follow_links: bool = False) -> None:
        """Takes the names; touches nothing.

        Args:
            sources: names, see `batch.location`.
            skip: a directory that is not entered, for an output that lies inside a source.
            follow_links: enters links to directories, each directory once.
        """
        self.sources = sources
        self.excluded: Counter[str] = Counter()
        self._skip = skip
        self._follow_links = follow_links
        self._visited: set[tuple[int, int]] = set()

    def check(self) -> None:
        """Looks whether each source is there, and will stay there.

        Raises:
            SourceError: one is not, or lies in the output.
        """
        for source in self.sources:
            try:
                there = _exists(source)
            except (OSError, ValueError) as error:
                raise SourceError(f"{source} cannot be reached: {first_line(error)}") from error
            if not there and is_remote(source) and glob.has_magic(source):
                raise SourceError(f"{source} does not exist, and globs are for local files; give the prefix, or a list")
            if not there and not _is_glob(source):
                raise SourceError(f"{source} does not exist; check the name, or give another source")
            if _is_glob(source) and any(b"**" in part != b"**" for part in decode_path(source).split(b"/")):
                raise SourceError(f"{source} is no pattern: ** stands for directories, and for no part of a name")
            if self._is_skipped(source):
                raise SourceError(
                    f"{source} lies in the output, where it may be deleted; "
                    "score a copy of it, or give another output directory"
                )
            if source.endswith(".parquet") and (is_remote(source) or os.path.isfile(decode_path(source))):
                # So that a list without paths is told of before anything is deleted.
                next(_read_list(source, Counter()), None)

    def inputs(self, known: set[bytes] | None = None) -> Iterator[Input]:
        """Lists the sources.

        Args:
            known: digests of names to leave out, see `digest`; what is found is added to them.

        Raises:
            SourceError: a list cannot be read.
            OSError: an object store does not answer.
        """
        self.excluded.clear()
        self._visited = set()
        if known is None and len(self.sources) == 1 and not _may_repeat(self.sources[0]):
            return self._all()
        return self._once(set() if known is None else known)

    def _once(self, known: set[bytes]) -> Iterator[Input]:
        found = set[bytes]() if known else known  # one set holds all names where nothing is known
        for each in self._all():
            key = digest(each.path)
            if key in found:
                self.excluded["named twice"] += 1
            elif key in known:
                self.excluded[KNOWN] += 1
                found.add(key)
            else:
                found.add(key)
                yield each
        known |= found

    def _is_skipped(self, name: str) -> bool:
        """Whether it is the output or lies there, by whatever name."""
        if self._skip is None or is_remote(name) != is_remote(self._skip):
            return False
        if is_remote(name):
            return f"{name}/".startswith(f"{self._skip}/")
        return (os.path.realpath(decode_path(name)) + b"/").startswith(_real_path(self._skip) + b"/")

    def _all(self) -> Iterator[Input]:
        for source in self.sources:
            if is_remote(source):
                yield from self._remote(source)
            elif _is_glob(source):
                yield from self._matches(source)
            else:
                yield from self._local(decode_path(source))

    def _local(self, path: bytes) -> Iterator[Input]:
        if os.path.isdir(path):
            yield from self._walk(path)
        elif _is_list(encode_path(path)) and os.path.isfile(path):
            yield from _read_list(encode_path(path), self.excluded)
        else:
            yield Input(encode_path(path))

    def _matches(self, pattern: str) -> Iterator[Input]:
        for path, error in _expand(decode_path(pattern)):
            yield from self._match(path) if error is None else [_unlisted(path, error)]

    def _match(self, path: bytes) -> Iterator[Input]:
        inside = self._is_skipped(encode_path(path))
        if not os.path.isdir(path):
            if not inside:
                yield Input(encode_path(path))
        elif os.path.islink(path) and not self._follow_links:
            self.excluded["link to a directory"] += 1
        elif inside:
            self.excluded[_REACHED] += 1
        else:
            yield from self._walk(path)

    def _walk(self, root: bytes) -> Iterator[Input]:
        """All files below a directory; hidden ones too."""
        visited = self._visited if self._follow_links else set[tuple[int, int]]()
        if self._skip is not None and os.path.isdir(decode_path(self._skip)):
            visited.add(_identity(decode_path(self._skip)))
        folders, linked = [root], list[bytes]()
        while folders or linked:  # links last, so that in one source a directory has its own name
            folder = folders.pop() if folders else linked.pop()
            try:
                if (identity := _identity(folder)) in visited:
                    self.excluded[_REACHED] += 1
                    continue
                visited.add(identity)
                with os.scandir(folder) as entries:
                    for entry in entries:
                        yield from self._entry(entry, folders, linked)
            except OSError as error:
                yield _unlisted(folder, error)

    def _entry(self, entry: "os.DirEntry[bytes]", folders: list[bytes], linked: list[bytes]) -> Iterator[Input]:
        if not _is_directory(entry):
            yield Input(encode_path(entry.path))
        elif not entry.is_symlink():
            folders.append(entry.path)
        elif self._follow_links:
            linked.append(entry.path)
        else:
            self.excluded["link to a directory"] += 1

    def _remote(self, source: str) -> Iterator[Input]:
        filesystem, root = filesystem_of(source)
        scheme = source.partition("://")[0]
        if _is_list(source):
            yield from _read_list(source, self.excluded)
            return
        is_key = filesystem.get_file_info(root).type is fs.FileType.File
        if is_key:
            yield Input(source)  # beside which others may begin with its name and a slash
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
            except OSError:
                if is_key:
                    return  # who may read a key may not always list
                raise
            for info in entries:
                name = f"{scheme}://{info.path}"
                if info.type is not fs.FileType.Directory:
                    yield Input(name)
                elif name == self._skip:
                    self.excluded[_REACHED] += 1
                elif info.path.rstrip("/") == folder.rstrip("/"):  # what pyarrow makes of two slashes in a row
                    yield Input(f"{name}//", "the directory cannot be listed: it has no name between two slashes")
                else:
                    folders.append(info.path)


def _unlisted(folder: bytes, error: OSError) -> Input:
    path = os.path.abspath(folder)  # without the slash of `**`
    return Input(encode_path(path), f"the directory cannot be listed: {error.strerror}")


def _expand(pattern: bytes) -> Iterator[tuple[bytes, OSError | None]]:
    """What an absolute glob matches, hidden names too, and the directories that cannot be listed.

    `**` follows no links, which might lead round in circles. Not by pathlib, which calls itself for each level of
    directories, and ends where one goes while it looks.
    """
    pending = [(b"/", [part for part in pattern.split(b"/") if part])]
    deep = set[tuple[bytes, int]]()  # two `**` may lead to a directory in several ways
    unlisted = set[bytes]()
    while pending:
        folder, parts = pending.pop()
        try:
            if parts[0] == b"**":
                if (folder, len(parts)) in deep or not stat.S_ISDIR(os.stat(folder).st_mode):
                    continue
                deep.add((folder, len(parts)))
                if len(parts) == 1:  # what is found is walked, with all directories in it
                    yield folder + b"/", None  # by that slash, a link to a directory is one
                    continue
                pending.append((folder, parts[1:]))
            for path, rest in _next(folder, parts):
                if rest:
                    pending.append((path, rest))
                else:
                    yield path, None
        except OSError as error:
            if error.errno not in _PASSED and folder not in unlisted:
                unlisted.add(folder)
                yield folder, error


def _next(folder: bytes, parts: list[bytes]) -> Iterator[tuple[bytes, list[bytes]]]:
    """What in a directory matches the first part, and the parts still to match there."""
    if not glob.has_magic(parts[0]):
        path = os.path.join(folder, parts[0])
        os.lstat(path)
        yield path, parts[1:]
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if (rest := _left_of(parts, entry)) is not None:
                yield entry.path, rest


def _left_of(parts: list[bytes], entry: "os.DirEntry[bytes]") -> list[bytes] | None:
    """The parts still to match below this entry; None if the entry does not match the first part."""
    if parts[0] == b"**":
        return parts if _is_directory(entry) and not entry.is_symlink() else None
    # As text: in bytes, a `?` would stand for a part of a letter.
    return parts[1:] if fnmatch.fnmatchcase(os.fsdecode(entry.name), os.fsdecode(parts[0])) else None


def digest(name: str) -> bytes:
    """16 bytes that stand for a name; two names share them with odds below 1 in 10^18 among a billion."""
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def block_size(first_id: int) -> int:
    """How many inputs form the block that starts at `first_id`.

    A block is the unit of work, of a checkpoint and of what a crash repeats. Small ones first, so that a dozen
    photographs still spread over the cores; larger ones later, so that the engine's cost per block vanishes. That cost
    falls with the size of the blocks, the wait for the last block grows with it, and their sum is least where blocks
    grow as the root of the number of inputs.
    """
    return min(1024, max(8, 4 * math.isqrt(first_id)))


def shard_count(inputs: int) -> int:
    """How many shards `blocks_of` makes of so many inputs."""
    return math.ceil(inputs / _SHARD_INPUTS)


def blocks_of(inputs: Iterable[Input], *, first_id: int = 0) -> Iterator[pa.Table]:
    """Cuts inputs into shards of the manifest, one row a block.

    Args:
        inputs: what to number.
        first_id: the first number.

    Yields:
        Tables of `MANIFEST_SCHEMA`, sorted by name within each.
    """
    shard: list[Input] = []
    next_block, next_id = 0, first_id
    for each in inputs:
        shard.append(each)
        if len(shard) == _SHARD_INPUTS:
            table = _shard_table(shard, next_block, next_id, first_id)
            yield table
            next_block, next_id, shard = next_block + table.num_rows, next_id + len(shard), []
    if shard:
        yield _shard_table(shard, next_block, next_id, first_id)


def _shard_table(shard: list[Input], block: int, next_id: int, first_id: int) -> pa.Table:
    shard.sort(key=lambda each: each.path)
    rows: list[dict[str, Any]] = []
    start = 0
    while start < len(shard):
        stop = min(len(shard), start + block_size(next_id + start - first_id))
        part = shard[start:stop]
        rows.append(
            {
                "block": block + len(rows),
                "first_id": next_id + start,
                "paths": [each.path for each in part],
                "errors": [each.error for each in part],
            }
        )
        start = stop
    return pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)


def _read_list(name: str, excluded: Counter[str]) -> Iterator[Input]:
    try:
        with _open(name) as file:
            if name.endswith(".parquet"):
                yield from _read_parquet_list(file, name, excluded)
            else:
                yield from _read_text_list(file, name)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"the list {name} cannot be read: {first_line(error)}") from error


def _open(name: str) -> pa.NativeFile:
    if not is_remote(name):  # pyarrow's own filesystem takes no names but UTF-8
        return pa.PythonFile(open(decode_path(name), "rb"), mode="r")
    filesystem, path = filesystem_of(name)
    return filesystem.open_input_file(path)


def _read_parquet_list(file: pa.NativeFile, name: str, excluded: Counter[str]) -> Iterator[Input]:
    table = pq.ParquetFile(file)
    if table.schema_arrow.names.count("path") != 1:
        raise SourceError(f"the list {name} must have one column `path`; it has {', '.join(table.schema_arrow.names)}")
    kind = table.schema_arrow.field("path").type
    if not (_is_text(kind) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))):
        raise SourceError(f"the column `path` of the list {name} holds {kind}; it must hold text")
    for batch in table.iter_batches(columns=["path"]):
        column = batch.column(0)
        texts = column.dictionary_decode() if pa.types.is_dictionary(kind) else column
        for value in texts.cast(pa.large_binary()).to_pylist():  # as bytes, which not every writer has made UTF-8
            if value:
                yield _listed(value)
            else:
                excluded["no path in a list"] += 1


def _is_text(kind: pa.DataType) -> bool:
    return any(each(kind) for each in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))


def _read_text_list(file: pa.NativeFile, name: str) -> Iterator[Input]:
    pending = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    if pending.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise SourceError(f"the list {name} is UTF-16; save it as UTF-8")
    while chunk := file.read(_LIST_BYTES):
        *lines, pending = (pending + chunk).split(b"\n")
        yield from _parse_lines(lines)
        if len(pending) > _LIST_BYTES:
            raise SourceError(f"the list {name} has a line of more than {_LIST_BYTES:,} bytes; give one path a line")
    yield from _parse_lines([pending])


def _parse_lines(lines: Iterable[bytes]) -> Iterator[Input]:
    yield from (_listed(line) for line in (line.rstrip(b"\r") for line in lines) if line)


def _listed(name: bytes) -> Input:
    told = name.decode("utf-8", "backslashreplace")
    if is_remote(told) and told.encode() != name:
        return Input(told, "the URI is not UTF-8")
    try:
        return Input(normalize(told if is_remote(told) else os.fsdecode(name)))
    except ValueError as error:
        return Input(told, str(error))


def _exists(source: str) -> bool:
    if not is_remote(source):
        try:
            os.stat(decode_path(source))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True
    filesystem, path = filesystem_of(source)
    return filesystem.get_file_info(path).type is not fs.FileType.NotFound


def _may_repeat(source: str) -> bool:
    """Whether a single source can name a file twice."""
    return _is_list(source) or _is_glob(source)


def _is_list(source: str) -> bool:
    return source.endswith((".txt", ".parquet"))


def _is_glob(source: str) -> bool:
    return not is_remote(source) and is_pattern(decode_path(source))


@functools.lru_cache(maxsize=1)  # of the output, asked for with each match of a glob
def _real_path(name: str) -> bytes:
    return os.path.realpath(decode_path(name))


def _is_directory(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a loop of links, or a name that is too long: reading it will say so


def _identity(path: bytes) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
