"""Names of inputs, and names -> data: how a path becomes text, and text becomes bytes again.

The `path` of a record is the absolute local path, or `s3://bucket/key` and its like. A local path that is not UTF-8 is
written as its `file://` URI (RFC 8089, percent-encoded bytes). Since an absolute path begins with a slash, no two
inputs share a name, and `decode_path` gives back the very bytes.
"""

import errno
import functools
import glob
import io
import os
import stat
import urllib.parse
from typing import Final

from pyarrow import fs

__all__ = [
    "FileTooLargeError",
    "decode_path",
    "encode_path",
    "filesystem_of",
    "is_pattern",
    "is_remote",
    "normalize",
    "read_bytes",
]

_FILE_SCHEME: Final = "file://"
_RETRY_S: Final = 20
_READ_BYTES: Final = 1 << 20
_KINDS: Final = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "named pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)


class FileTooLargeError(ValueError):
    """The file holds more bytes than the job may read."""


def encode_path(path: bytes) -> str:
    """The name of a local file, see the module's docstring."""
    try:
        return path.decode("utf-8")
    except UnicodeDecodeError:
        return _FILE_SCHEME + urllib.parse.quote_from_bytes(path)


def decode_path(text: str) -> bytes:
    """The local path behind a name or a `file://` URI."""
    return _path_of(text.encode("utf-8", "surrogateescape"))


def _path_of(name: bytes) -> bytes:
    scheme = _FILE_SCHEME.encode()
    if not name.startswith(scheme):
        return name
    host, slash, path = name.removeprefix(scheme).partition(b"/")
    if host not in (b"", b"localhost"):
        raise ValueError(f"{os.fsdecode(name)} names a file of another machine; a path here has three slashes")
    return urllib.parse.unquote_to_bytes(slash + path)


def is_pattern(path: bytes) -> bool:
    """Whether it is a glob, and no file's own name."""
    return glob.has_magic(path) and not os.path.lexists(path)


def is_remote(text: str) -> bool:
    """Whether a name is a URI of an object store."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.isalnum() and scheme != "file"


def normalize(text: str, *, may_match: bool = False) -> str:
    """The name of what a user calls `text`: a URI as it is, a local path made absolute.

    Args:
        text: a path in the encoding of the locale, or a URI.
        may_match: it may be a glob, below the present directory whatever characters the name of that has.

    Raises:
        ValueError: it is empty, as a variable of the shell may be, or a URI that names no bucket.
    """
    if not text:
        raise ValueError("a source or the output has an empty name")
    if is_remote(text):
        if not text.partition("://")[2].partition("/")[0]:
            raise ValueError(f"{text} names no bucket")
        return text.rstrip("/")
    base, rest = _based(_path_of(os.fsencode(text)))
    if may_match and not os.path.lexists(os.path.join(base, rest)):
        base = glob.escape(base)
    path = os.path.abspath(os.path.join(base, rest))
    return encode_path(b"/" + path.lstrip(b"/"))  # POSIX leaves two slashes at the beginning as they are


def _based(path: bytes) -> tuple[bytes, bytes]:
    """The directory that a path counts from, and the rest of it.

    Resolves `..` as the system does: behind a link to a directory it is the parent of what the link leads to.
    """
    names = path.split(b"/")
    if b".." not in names or b"\0" in path:
        return (b"/" if path.startswith(b"/") else os.getcwdb()), path
    last = len(names) - names[::-1].index(b"..")
    return os.path.realpath(b"/".join(names[:last])), b"/".join(names[last:])


def filesystem_of(name: str) -> tuple[fs.FileSystem, str]:
    """The filesystem that holds a name, and the path there.

    Raises:
        OSError: no such filesystem, or it cannot be reached.
        ValueError: the scheme is unknown.
    """
    if not is_remote(name):
        return fs.LocalFileSystem(), os.fsdecode(decode_path(name))
    scheme, _, path = name.partition("://")
    return _object_store(scheme, path.partition("/")[0]), path


@functools.lru_cache
def _object_store(scheme: str, bucket: str) -> fs.FileSystem:
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}{_settings(scheme)}")[0]


def _settings(scheme: str) -> str:
    if scheme in ("gs", "gcs"):
        return f"?retry_limit_seconds={_RETRY_S}"  # by default a quarter of an hour, without a word
    if scheme == "s3" and "AWS_ENDPOINT_URL" in os.environ:
        # A private endpoint has no region to look up, and the look-up would ask the public one.
        return f"?region={os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION') or 'us-east-1'}"
    return ""


def read_bytes(name: str, *, max_bytes: int) -> bytes:
    """Reads one input.

    Raises:
        OSError: it cannot be read, or is no regular file.
        FileTooLargeError: it holds more than `max_bytes`.
    """
    if is_remote(name):
        filesystem, path = filesystem_of(name)
        with filesystem.open_input_file(path) as file:
            _check_size(file.size(), max_bytes)
            return file.read()
    local = decode_path(name)
    _check_regular(os.stat(local).st_mode)  # opening would release a pipe's writer into nothing, or rewind a tape
    # It may be another one by now, and opening a named pipe waits for a writer that may never come.
    descriptor = os.open(local, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        _check_regular(status.st_mode)
        _check_size(status.st_size, max_bytes)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return _read_at_most(file, max_bytes)
    finally:
        os.close(descriptor)


def _read_at_most(file: io.FileIO, max_bytes: int) -> bytes:
    """Reads to the end, which some files (of /proc) do not announce."""
    parts: list[bytes] = []
    total = 0
    while part := file.read(_READ_BYTES):
        parts.append(part)
        total += len(part)
        _check_size(total, max_bytes)
    return b"".join(parts)


def _check_regular(mode: int) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise OSError(errno.EINVAL, f"it is a {kind}, not a file")


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise FileTooLargeError(f"the file has {size / 1e6:.1f} MB, over the limit of {max_bytes / 1e6:g}")
