"""The output directory: what state it is in, and how it changes from one state to the next.

    empty -> listing -> resumable -> finished

While a run goes on, everything lies in `_run/`, which readers of Parquet directories skip: `run.json` (its presence
says that the run's manifest is complete), and under the run's id the manifest, Ray's checkpoint and the parts that it
speaks of: what a node of a run that was replaced still writes is none of its successor's. At the end the parts become
`faces-*.parquet`, then `_summary.json` and `_SUCCESS` appear, and `_run/` goes.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from batch.errors import JobError, OutputError, first_line
from batch.lease import LeaseLostError, LeaseTakenError, lease
from batch.location import filesystem_of, is_remote

__all__ = ["REPORT_FILE", "Output", "Run", "now"]

_RUN: Final = "_run"
_RUN_FILE: Final = "_run/run.json"
_STAGING: Final = "staging-"
_SUCCESS: Final = "_SUCCESS"
_SUMMARY_FILE: Final = "_summary.json"
REPORT_FILE: Final = "_report.html"
_OURS: Final = re.compile(r"_run|_SUCCESS|_summary\.json|_report\.html|faces-[0-9a-f]{8}-\d{5}\.parquet")
_SUMMARY: Final[dict[str, type | tuple[type, ...]]] = {
    "inputs": int,
    "faces": int,
    "statuses": dict,
    "genders": dict,
    "ages": dict,
    "seconds": (int, float),
    "images_per_s": (int, float),
    "startup_s": (int, float),
    "slowest": list,
    "finished": str,
}
_LEASE: Final = re.compile(r"_writer-[0-9a-f]{16}")


@dataclass(frozen=True)
class Run:
    """What a run is: as long as nothing of this changes, its outcomes are the same.

    Attributes:
        id: eight hexadecimal digits.
        created: when it began, ISO 8601.
        version: of this package, with a digest of the code that shapes the outcomes.
        model: `ModelSpec.identity` of the model.
        options: everything else that the values depend on.
        sources: names of the sources.
        inputs: how many inputs the manifest holds.
        blocks: how many blocks.
        first_id: number of the first input; above 0 when the run adds to an older one.
        excluded: what the listing left out, by reason; with what those of the runs before left out that it adds to.
        libraries: versions of the libraries that shape the outcomes.
    """

    id: str
    created: str
    version: str
    model: dict[str, Any]
    options: dict[str, Any]
    sources: list[str]
    inputs: int
    blocks: int
    first_id: int = 0
    excluded: dict[str, int] | None = None
    libraries: dict[str, str] = field(default_factory=dict)

    def difference(self, other: "Run") -> str | None:
        """Why `other` would not give the same outcomes; None if it would."""
        if self.model["sha256"] != other.model["sha256"]:
            return f"its model was {_model_text(self.model)} and is now {_model_text(other.model)}"
        if self.version != other.version:
            return f"it was written by version {self.version} and this is {other.version}"
        for name, value in other.libraries.items():
            if self.libraries.get(name) != value:
                return f"it was written with {name} {self.libraries.get(name)} and this is {name} {value}"
        for name, value in other.options.items():
            if (old := self.options.get(name)) != value:
                return f"its --{name.replace('_', '-')} was {_option_text(old)} and is now {_option_text(value)}"
        added = [source for source in other.sources if source not in self.sources]
        dropped = [source for source in self.sources if source not in other.sources]
        if added or (dropped and not self.first_id):  # what was appended need not be named again
            return f"its inputs were {', '.join(self.sources)} and are now {', '.join(other.sources)}"
        return None


class Output:
    """One output directory, local or in an object store."""

    def __init__(self, name: str) -> None:
        """Takes the directory's name, see `batch.location`; touches nothing."""
        self.name = name
        self.filesystem, self.base = filesystem_of(name)
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)
        self.check_held = _always_held  # see `locked`
        self._created: list[str] = []  # directories that `check_writable` has made, innermost first

    def path(self, *parts: str) -> str:
        """A path on `filesystem` below the directory."""
        return "/".join((self.base, *parts))

    def manifest(self, run: Run) -> str:
        """Directory of the manifest's shards."""
        return self.path(_RUN, run.id, "manifest")

    def parts(self, run: Run) -> str:
        """Directory of what Ray writes."""
        return self.path(_RUN, run.id, "parts")

    def checkpoint(self, run: Run) -> str:
        """Directory of Ray's checkpoint."""
        return self.path(_RUN, run.id, "checkpoint")

    def new_staging(self) -> str:
        """Creates a directory where final files are written before they appear; those of calls that were killed go."""
        for info in self.list(self.path(_RUN)):
            if info.base_name.startswith(_STAGING):
                self.remove(info)
        staging = self.path(_RUN, f"{_STAGING}{secrets.token_hex(4)}")
        self.filesystem.create_dir(staging, recursive=True)
        return staging

    def begun(self) -> bool:
        """Whether a run goes on or was stopped there, if only while it listed its inputs."""
        return self.filesystem.get_file_info(self.path(_RUN)).type is fs.FileType.Directory

    def run(self) -> Run | None:
        """The run that can be resumed, if there is one."""
        try:
            text = self._read(_RUN_FILE)
            run = None if text is None else _run_from(json.loads(text))
            # Without its manifest, run.json was written back by a run that had been replaced.
            return run if run and self.list(self.manifest(run)) else None
        except (ValueError, KeyError, TypeError):
            return None  # a power cut left a piece of it, and whatever stands beside it may be no better

    def finished(self) -> Run | None:
        """The run that is finished, if there is one."""
        if self._read(_SUCCESS) is None:
            return None
        return _run_from(self.summary()["run"])

    def summary(self) -> dict[str, Any]:
        """What `_summary.json` says.

        Raises:
            OutputError: there is none, or it is damaged.
        """
        try:
            if (text := self._read(_SUMMARY_FILE)) is None:
                raise OutputError(
                    f"{self.name} is not a finished output: it has no {_SUMMARY_FILE}; score it with "
                    "`python -m batch SOURCE DIR`, or finish the run"
                )
            summary = dict(json.loads(text))
            _model_text(_run_from(summary["run"]).model)
            wrong = [name for name, kinds in _SUMMARY.items() if not isinstance(summary[name], kinds)]
            if wrong:
                raise TypeError(f"{wrong[0]} is of another type")
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{self.name}: {_SUMMARY_FILE} is damaged; --overwrite starts anew") from error
        return summary

    def files(self) -> list[str]:
        """Paths of the final Parquet files."""
        return [info.path for info in self.list() if re.fullmatch(r"faces-.*\.parquet", info.base_name)]

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of all final files, a few rows at a time.

        Raises:
            OutputError: a file is damaged, or cannot be read.
        """
        for path in self.files():
            try:
                with self.filesystem.open_input_file(path) as file:
                    yield from pq.ParquetFile(file).iter_batches(columns=columns)
            except (OSError, pa.ArrowException) as error:
                reason = f"{path} cannot be read: {first_line(error)}"
                raise OutputError(f"{reason}; if it is damaged, --overwrite starts anew") from error

    def list(self, folder: str | None = None) -> list[fs.FileInfo]:
        """Entries of this directory or another one on `filesystem`, sorted by path; empty if it is not there."""
        selector = fs.FileSelector(folder or self.base, allow_not_found=True)
        return sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)

    def check_ours(self) -> None:
        """Makes sure that nothing lies there that this program did not write.

        Raises:
            OutputError: something does.
        """
        if not is_remote(self.name) and not self.name.startswith("/"):
            raise OutputError(f"{self.name} is no name in UTF-8; give another directory for the output")
        if re.search(r"[?\t\r\n]", self.name):  # Ray takes what follows the first for no part of it, and drops the rest
            raise OutputError(
                f"{self.name!r} has a question mark, a tab or a line break in its name; give another directory"
            )
        try:
            if self.filesystem.get_file_info(self.base).type is fs.FileType.File:
                raise OutputError(f"{self.name} is a file; give a directory for the output")
            names = [info.base_name for info in self.list()]
        except OSError as error:
            raise OutputError(f"{self.name} cannot be looked at: {_reason(error)}") from error
        except UnicodeDecodeError as error:
            raise OutputError(
                f"{self.name} holds a file whose name is not UTF-8, which is none of this program's; "
                "give an empty or new directory"
            ) from error
        foreign = [name for name in names if not _OURS.fullmatch(name) and not _LEASE.fullmatch(name)]
        if foreign:
            raise OutputError(
                f"{self.name} holds files that are not an output of this program, such as {foreign[0]}; "
                "give an empty or new directory"
            )

    def check_writable(self) -> None:
        """Creates the directory and a file there. `locked` deletes it at its end, if nothing has come into it.

        Raises:
            OutputError: that fails.
        """
        self._created = _missing_folders(self.base) if self.is_local else []
        probe = f"{_RUN}/probe-{secrets.token_hex(4)}"
        try:
            self.write(probe, "")
            self.filesystem.delete_file(self.path(probe))
        except OSError as error:
            self._drop_created()
            raise OutputError(f"cannot write to {self.name}: {_reason(error)}") from error

    def _drop_created(self) -> None:
        self.drop_empty_run()
        with contextlib.suppress(OSError):  # the first that holds something
            for folder in self._created:
                os.rmdir(folder)

    def clear(self, *, but: Run | None = None) -> None:
        """Deletes what this program wrote there, and nothing else; what a new run has listed stays."""
        self.clear_run(but=but)
        for info in self.list():
            if _OURS.fullmatch(info.base_name) and info.base_name != _RUN:
                self.remove(info)

    def clear_run(self, *, but: Run | None = None) -> None:
        """Empties `_run/`, but for what a new run has listed; `run.json` first, without which the rest is nothing.

        It goes itself when nothing is in it, and not with what a successor may have put there meanwhile.
        """
        entries = self.list(self.path(_RUN))
        for info in sorted(entries, key=lambda info: info.path != self.path(_RUN_FILE)):
            if but is None or info.base_name != but.id:
                self.remove(info)
        if but is None:
            self._remove_empty_run()

    def drop(self, run: Run) -> None:
        """Deletes what a run has listed, and nothing else."""
        self.remove(self.filesystem.get_file_info(self.path(_RUN, run.id)))
        self._remove_empty_run()

    def _remove_empty_run(self) -> None:
        folder = self.filesystem.get_file_info(self.path(_RUN))
        if folder.type is fs.FileType.Directory and not self.list(folder.path):
            self.remove(folder)

    def drop_empty_run(self) -> None:
        """Deletes `_run/` where nothing is in it, as a message that was written through it leaves it."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(_RUN))

    def begin(self, run: Run) -> None:
        """The manifest is complete: from here on the run can be resumed."""
        self.check_held()
        self.write(_RUN_FILE, json.dumps(asdict(run), indent=1))
        self.reopen()

    def reopen(self) -> None:
        """No longer says that all is there, as a finished output does that a run adds to, nor shows a page about it."""
        for name in (_SUCCESS, REPORT_FILE):
            info = self.filesystem.get_file_info(self.path(name))
            if info.type is fs.FileType.File:
                self.remove(info)

    def finish(self, summary: dict[str, Any]) -> None:
        """All final files are there: says so, and tidies up."""
        self.check_held()
        self.write(_SUMMARY_FILE, json.dumps(summary, indent=1))
        self.check_held()
        self.write(_SUCCESS, "")
        self.clear_run()

    def remove(self, info: fs.FileInfo) -> None:
        """Deletes a file or a directory, if this run still holds the output; one that is gone already is no error."""
        self.check_held()
        with contextlib.suppress(FileNotFoundError):
            if info.type is fs.FileType.Directory:
                self.filesystem.delete_dir(info.path)
            else:
                self.filesystem.delete_file(info.path)

    def write(self, name: str, text: str) -> None:
        """Writes a small file; a reader sees all of it or nothing."""
        target = self.path(name)
        # An object store shows an object when it is complete; a local file is renamed into place.
        written = f"{self.path(_RUN)}/writing-{os.getpid()}" if self.is_local else target
        self.filesystem.create_dir(self.path(_RUN) if self.is_local else self.base, recursive=True)
        with self.filesystem.open_output_stream(written) as stream:
            stream.write(text.encode())
        self.sync(written)
        if written != target:
            self.filesystem.move(written, target)
            self.sync(os.path.dirname(target))

    def sync(self, path: str) -> None:
        """Waits until a file or directory would survive a power cut. An object store has seen to that already."""
        if self.is_local:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second run off the directory.

        Inside this context `check_held` raises when another run has taken over, which an object store cannot rule out.
        It is asked before each file is deleted, moved or replaced; the context makes a JobError of what it raises.

        Raises:
            OutputError: another run holds it.
            JobError: another run has taken over.
        """
        guard = self._local_lock() if self.is_local else self._lease()
        with guard as self.check_held:
            try:
                yield
            except OSError:
                self.check_held()  # a successor that tidied up may be the reason
                raise
            finally:
                self.check_held = _always_held
                self._drop_created()

    @contextlib.contextmanager
    def _local_lock(self) -> Iterator[Callable[[], None]]:
        descriptor = os.open(self.base, os.O_RDONLY)
        try:
            self._lock(descriptor)
            yield _always_held
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._in_use() from None
        if not os.path.samefile(descriptor, self.base):  # another run has just ended, and deleted it as empty
            raise self._in_use()

    @contextlib.contextmanager
    def _lease(self) -> Iterator[Callable[[], None]]:
        try:
            with lease(self.filesystem, self.base) as check:
                yield check
        except LeaseTakenError:
            raise self._in_use() from None
        except LeaseLostError:
            raise JobError(
                f"another run took over {self.name}, since this one had stood still; that one goes on"
            ) from None

    def _in_use(self) -> OutputError:
        return OutputError(f"another run is writing to {self.name}; wait for it or stop it")

    def read_bytes(self, path: str) -> bytes:
        """All of a file, by its path on `filesystem`."""
        with self.filesystem.open_input_file(path) as file:
            return bytes(file.read())

    def _read(self, name: str) -> str | None:
        path = self.path(name)
        if self.filesystem.get_file_info(path).type is not fs.FileType.File:
            return None
        return self.read_bytes(path).decode()


def _always_held() -> None:
    """Stands for the question whether a run still holds a directory that none can take over."""


def _missing_folders(path: str) -> list[str]:
    """Those of a directory and the ones around it that are not there, innermost first."""
    missing: list[str] = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


def _reason(error: OSError) -> str:
    """What the system says, without the path, which is named already."""
    return os.strerror(error.errno) if error.errno else first_line(error)


def now() -> str:
    """This moment, ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _run_from(values: dict[str, Any]) -> Run:
    return Run(**{each.name: values[each.name] for each in fields(Run) if each.name in values})


def _option_text(value: Any) -> str:
    return "not given" if value is None or value is False else "given" if value is True else str(value)


def _model_text(model: dict[str, Any]) -> str:
    return f"{model['name']} {model['version']} ({model['sha256'][:8]})"
