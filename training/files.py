"""Files that are there whole or not at all, whenever the process ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Lets a file be written beside `path` and renames it into place, so that a kill leaves the old one or the new one.

    Yields:
        Where to write; what was written there goes if the context ends in an error.

    Raises:
        OSError: it cannot be renamed.
    """
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
