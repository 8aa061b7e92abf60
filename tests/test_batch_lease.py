"""Two runs and one output in an object store, with a local directory in the store's place."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

import batch.publish
from batch.errors import IncompleteError, JobError, OutputError
from batch.lease import LeaseLostError, LeaseTakenError, lease
from batch.output import Output, Run, now
from batch.publish import Part, committed_parts, publish
from batch.scorer import BLOCK_SCHEMA

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


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    """One that is kept by a lease, of short beats."""
    monkeypatch.setattr("batch.lease._BEAT_S", BEAT_S)
    output = Output(str(tmp_path))
    output.is_local = False
    return output


def test_an_output_says_it_in_a_sentence(out: Output, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="took over"), out.locked():  # noqa: PT012
        next(tmp_path.iterdir()).unlink()
        out.check_held()
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
    change: Callable[[Output, Run], object], out: Output, tmp_path: Path
) -> None:
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


def test_what_a_successor_took_away_is_told_as_that(out: Output, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="took over"), out.locked():  # noqa: PT012
        next(tmp_path.iterdir()).unlink()
        out.filesystem.delete_file(out.path("gone"))


@pytest.mark.parametrize("held", [1, 2, 3])
def test_an_output_that_is_lost_while_it_is_cleared_keeps_the_rest(held: int, tmp_path: Path) -> None:
    out = Output(str(tmp_path))
    for name in ("_run/run.json", "_SUCCESS", "_summary.json", "faces-00000000-00000.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    asked = itertools.count()
    out.check_held = lambda: lost() if next(asked) == held else None
    with pytest.raises(JobError, match="took over"):
        out.clear()
    assert len(list(tmp_path.rglob("*"))) == 5 - held


class Waiting(fs.SubTreeFileSystem):
    """A filesystem that stands still in its third move until it is let go."""

    def __init__(self) -> None:
        super().__init__("/", fs.LocalFileSystem())
        self.stands, self.goes = threading.Event(), threading.Event()
        self.moves = 0

    def move(self, source: str, target: str) -> None:
        self.moves += 1
        if self.moves == 3:
            self.stands.set()
            assert self.goes.wait(30)
        super().move(source, target)


def test_a_run_that_wakes_up_while_its_successor_publishes_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.publish._ROWS_PER_FILE", 1)
    stage = batch.publish._stage
    run = Run("0" * 8, now(), "1", {}, {}, ["photos"], 6, 6)
    sleeper, successor = Output(str(tmp_path)), Output(str(tmp_path))
    sleeper.filesystem = waiting = Waiting()
    parts = [part(sleeper, run, block) for block in range(run.blocks)]
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(publish, sleeper, run, parts)
        assert waiting.stands.wait(30)

        def stage_and_wake_it_up(*args: Any) -> dict[str, int]:
            sizes = stage(*args)
            monkeypatch.setattr(sleeper, "check_held", lost)
            waiting.goes.set()
            with pytest.raises(JobError, match="took over"):
                asleep.result()
            return sizes

        monkeypatch.setattr("batch.output._STAGING", "other-")  # as if the sleeper had begun a moment later
        monkeypatch.setattr("batch.publish._stage", stage_and_wake_it_up)
        publish(successor, run, parts)
    ids = [pq.read_table(path)["id"].to_pylist() for path in successor.files()]
    assert ids == [[0], [1], [2], [3], [4], [5]]


def lost() -> None:
    raise JobError("another run took over")


def part(output: Output, run: Run, block: int) -> Part:
    """One input's outcome, as Ray writes it."""
    path = f"{output.parts(run)}/{block}-0.parquet"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    row = {"block": block, "id": block, "path": f"/{block}.jpg", "status": "no_face"}
    pq.write_table(pa.Table.from_pylist([row], schema=BLOCK_SCHEMA), path)
    return Part(path, frozenset([block]))


def test_files_that_vanish_from_an_output_while_it_is_published_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("0" * 8, now(), "1", {}, {}, ["photos"], 1, 1)
    out = Output(str(tmp_path))
    parts = [part(out, run, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(out, "sync", lambda path: [file.unlink() for file in tmp_path.glob("faces-*")])
        with pytest.raises(IncompleteError, match="the same command without --overwrite puts them back"):
            publish(out, run, parts)
    publish(out, run, parts)
    assert len(pq.read_table(out.files()[0])) == 1
