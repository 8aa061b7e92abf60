"""Two runs and one output in an object store, with a local directory in the store's place."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from batch.errors import JobError, OutputError
from batch.lease import LeaseLostError, LeaseTakenError, lease
from batch.output import Output, Run, now
from batch.publish import committed_parts

BEAT_S = 0.1
STORE = fs.LocalFileSystem()


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with lease(STORE, str(tmp_path), beat_s=BEAT_S) as check:
        with pytest.raises(LeaseTakenError), lease(STORE, str(tmp_path), beat_s=BEAT_S):
            pass
        check()
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_is_outlived(tmp_path: Path) -> None:
    (tmp_path / "_writer-0123456789abcdef").write_text("once")
    started = time.monotonic()
    with lease(STORE, str(tmp_path), beat_s=BEAT_S) as check:
        check()
        assert len(list(tmp_path.iterdir())) == 1
    assert time.monotonic() - started >= 3 * BEAT_S


def test_a_run_that_was_taken_for_dead_notices(tmp_path: Path) -> None:
    with lease(STORE, str(tmp_path), beat_s=BEAT_S) as check:
        (lost,) = tmp_path.iterdir()
        lost.unlink()
        time.sleep(3 * BEAT_S)
        assert not lost.exists()  # and does not come back
        with pytest.raises(LeaseLostError):
            check()


def test_a_run_whose_write_came_too_late_notices(tmp_path: Path) -> None:
    """The successor has deleted the object of the first, whose write is still under way and brings it back."""
    stalled, over = threading.Event(), threading.Event()

    class Store(fs.LocalFileSystem):  # type: ignore[misc]
        written = 0

        def open_output_stream(self, path: str, **options: object) -> Any:
            self.written += 1
            if self.written > 1:
                stalled.set()
                over.wait(10)
            return super().open_output_stream(path, **options)

    with lease(Store(), str(tmp_path), beat_s=BEAT_S) as first:
        stalled.wait(10)
        with lease(STORE, str(tmp_path), beat_s=BEAT_S) as second:
            over.set()
            time.sleep(5 * BEAT_S)
            with pytest.raises(LeaseLostError):
                first()
            second()
            assert len(list(tmp_path.iterdir())) == 1


def test_a_run_goes_on_when_its_store_was_away_and_nobody_came(tmp_path: Path) -> None:
    class Store(fs.LocalFileSystem):  # type: ignore[misc]
        away = False

        def open_output_stream(self, path: str, **options: object) -> Any:
            if self.away:
                raise OSError("the store is away")
            return super().open_output_stream(path, **options)

    store = Store()
    with lease(store, str(tmp_path), beat_s=BEAT_S) as check:
        store.away = True
        time.sleep(5 * BEAT_S)
        store.away = False
        time.sleep(3 * BEAT_S)
        check()
        with pytest.raises(LeaseTakenError), lease(STORE, str(tmp_path), beat_s=BEAT_S):
            pass


def test_an_output_says_it_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batch.lease._BEAT_S", BEAT_S)
    out = Output(str(tmp_path))
    out.is_local = False
    with pytest.raises(JobError, match="took over"), out.locked():  # noqa: PT012
        next(tmp_path.iterdir()).unlink()
        out.clear()
    with out.locked(), pytest.raises(OutputError, match="another run is writing"), out.locked():
        pass
    out.clear()
    out.check_ours()


def test_a_run_that_cannot_be_asked_is_not_taken_for_dead(tmp_path: Path) -> None:
    class Store(fs.LocalFileSystem):  # type: ignore[misc]
        def open_input_stream(self, *_: object, **__: object) -> None:
            raise OSError("the store is away")

    other = tmp_path / "_writer-0123456789abcdef"
    other.write_text("once")
    with pytest.raises(OSError, match="is away"), lease(Store(), str(tmp_path), beat_s=BEAT_S):
        pass
    assert other.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda out, _: out.clear(),
        lambda out, _: out.clear_run(),
        lambda out, run: out.begin(run),
        lambda out, _: out.reopen(),
        lambda out, _: out.finish({}),
        lambda out, run: committed_parts(out, run),
    ],
    ids=["clear", "clear_run", "begin", "reopen", "finish", "committed_parts"],
)
def test_a_run_that_was_taken_for_dead_changes_nothing(
    change: Callable[[Output, Run], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.lease._BEAT_S", BEAT_S)
    out = Output(str(tmp_path))
    out.is_local = False
    run = Run("0" * 8, now(), "1", {}, {}, ["photos"], 1, 1)
    for name in ("_SUCCESS", "_summary.json", "_run/run.json", f"_run/{run.id}/parts/orphan-0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of the other run")
    with pytest.raises(JobError, match="took over"), out.locked():  # noqa: PT012
        for lease_file in tmp_path.glob("_writer-*"):
            lease_file.unlink()
        before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
        change(out, run)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
