"""What a run does to its output directory, with an engine of this process in Ray's place."""

import contextlib
import errno
import fcntl
import inspect
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO
from unittest.mock import MagicMock, patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.data import DataContext

import batch.engine
import batch.job
import batch.progress
import batch.report
import batch.scorer
from agegender import Predictor
from batch.__main__ import _address, main
from batch.engine import quiet
from batch.errors import BatchError, IncompleteError, JobError, OutputError, RequestError, SourceError, TooManyBadError
from batch.listing import Input, blocks_of
from batch.output import Output, Run
from batch.preview import _draw
from batch.progress import BlockReport, Progress, Tally, bad_count, tell
from batch.publish import Part, check_counted, committed_parts, publish
from batch.report import write_report
from batch.request import Mode, Request, Resources, ScoreOptions
from batch.run import _code_digest, _exceeds, _Watch, run_batch
from batch.samples import write_samples
from batch.scorer import BLOCK_SCHEMA, Scorer, score
from batch.summary import Counts

WHOLE = ScoreOptions(faces="whole")


class Engine:
    """Does what Ray does, block by block in this process, and can stop after some.

    Attributes:
        stop_after: blocks to do before it fails; None does all.
        calls: how often it ran.
        blocks: the blocks that it did, in order.
    """

    def __init__(self) -> None:
        self.stop_after: int | None = None
        self.calls = 0
        self.blocks: list[int] = []

    def __call__(
        self,
        output: Output,
        run: Run,
        options: ScoreOptions,
        model: bytes,
        _: Any,
        on_progress: Callable[[BlockReport], None],
    ) -> None:
        self.calls += 1
        tally = Tally()
        scorer = Scorer(options, model, tally)
        done = {block for part in committed_parts(output, run)[0] for block in part.blocks}
        left = [row for row in pq.read_table(output.manifest(run)).to_pylist() if row["block"] not in done]
        parts, checkpoint = output.parts(run), output.checkpoint(run)
        for folder in (parts, checkpoint):
            os.makedirs(folder, exist_ok=True)
        for number, row in enumerate(left):
            if number == self.stop_after:
                raise JobError("the engine stopped")
            table = scorer(pa.Table.from_pylist([row]))
            stem = f"{self.calls}_{row['block']:06}"
            pq.write_table(table, f"{parts}/{stem}-0.parquet")
            pq.write_table(table.select(["block"]), f"{checkpoint}/{stem}.parquet")
            self.blocks.append(row["block"])
            on_progress(tally.total())


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(batch.job, "score_manifest", engine)
    monkeypatch.setattr(batch.engine, "running_engine", lambda _: contextlib.nullcontext())
    return engine


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty chips and ten files that are no images."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(50):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (5 * number, 100, 200)).save(buffer, "PNG")
        (folder / f"{number:02}.png").write_bytes(b"words" if number % 5 == 0 else buffer.getvalue())
    return folder


@pytest.fixture
def request_(source: Path, tmp_path: Path, model_path: Path) -> Request:
    return Request((str(source),), str(tmp_path / "out"), str(model_path), WHOLE)


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_run_goes_from_nothing_to_finished(request_: Request, engine: Engine, said: list[str]) -> None:
    run_batch(request_, said.append)
    out = Path(request_.out)
    assert sorted(path.name.split("-")[0] for path in out.iterdir()) == ["_SUCCESS", "_summary.json", "faces"]
    summary = json.loads((out / "_summary.json").read_text())
    assert summary["statuses"] == {"ok": 40, "not_image": 10}
    assert summary["inputs"] == 50 == len(pd.read_parquet(out))
    assert set(summary["stages_s"]) >= {"read", "decode", "predict"}
    assert len(summary["slowest"]) == 20
    assert "50 files, 40 faces" in said[-1]


def test_a_finished_run_is_left_alone(request_: Request, engine: Engine, said: list[str]) -> None:
    run_batch(request_, said.append)
    run_batch(request_, said.append)
    assert engine.calls == 1
    assert "Nothing to do" in said[-1]


def test_an_interrupted_run_does_only_the_rest(request_: Request, engine: Engine, said: list[str]) -> None:
    whole = replace(request_, out=f"{request_.out}-whole")
    run_batch(whole, said.append)
    engine.blocks.clear()
    interrupt(request_, engine, said, after=2)
    assert Output(request_.out).finished() is None
    run_batch(request_, said.append)
    assert sorted(engine.blocks) == list(range(4))
    assert pq.read_table(request_.out).equals(pq.read_table(whole.out))
    assert any("16 of 50 files were done before" in text for text in said)


def test_an_interrupted_listing_begins_anew(request_: Request, engine: Engine, said: list[str]) -> None:
    manifest = Path(request_.out) / "_run" / "manifest"
    manifest.mkdir(parents=True)
    (manifest / "blocks-00007.parquet").write_bytes(b"PAR")
    run_batch(request_, said.append)
    assert len(pd.read_parquet(request_.out)) == 50


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": ScoreOptions()}, "--faces was whole and is now detect"),
        ({"options": replace(WHOLE, max_bytes=7)}, "--max-bytes was 512000000 and is now 7"),
        ({"sources": ("tests",)}, "its inputs were .*source and are now .*tests"),
        ({"follow_links": True}, "--follow-links was not given and is now given"),
        ({"resources": Resources(gpus=1, device="cpu")}, "--gpus was not given and is now cpu"),
    ],
)
def test_another_run_is_refused_with_the_reason(
    request_: Request, engine: Engine, said: list[str], change: dict[str, Any], reason: str, finished: bool
) -> None:
    if finished:
        run_batch(request_, said.append)
    else:
        interrupt(request_, engine, said, after=1)
    with pytest.raises(OutputError, match=reason):
        run_batch(replace(request_, **change), said.append)


def test_what_a_detector_would_do_does_not_matter_where_each_image_is_a_face(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    run_batch(request_, said.append)
    run_batch(replace(request_, options=replace(WHOLE, min_score=0.9, max_faces=1)), said.append)
    assert "Nothing to do" in said[-1]


def test_a_run_without_its_manifest_is_none(request_: Request, engine: Engine, said: list[str]) -> None:
    """As one is that woke up after its successor had finished."""
    run_batch(request_, said.append)
    output = Output(request_.out)
    output.write("_run/run.json", json.dumps(output.summary()["run"]))
    run_batch(request_, said.append)
    assert "Nothing to do" in said[-1]
    assert output.finished()
    assert not (Path(request_.out) / "_run").exists()


def test_a_call_that_is_refused_leaves_no_directory_behind(request_: Request, said: list[str]) -> None:
    with pytest.raises(RequestError, match=r"gone\.pt"):
        run_batch(replace(request_, model="gone.pt"), said.append)
    assert not Path(request_.out).exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("refusal", [RequestError("no such cluster"), JobError("no cluster answers")])
def test_what_the_engine_refuses_leaves_only_what_was_there(
    request_: Request,
    engine: Engine,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: BatchError,
    there: bool,
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "empty" / "new" / "out"
    if there:
        out.mkdir(parents=True)
    monkeypatch.setattr(batch.engine, "running_engine", failing(refusal))
    with pytest.raises(type(refusal)):
        run_batch(replace(request_, out=str(out)), said.append)
    assert list((tmp_path / "empty").rglob("*")) == ([out.parent, out] if there else [])


def test_an_output_that_another_run_has_deleted_as_empty_is_not_used(tmp_path: Path) -> None:
    """Between the moment when it is opened and the one when it is locked."""
    out = tmp_path / "out"
    out.mkdir()
    output, lock = Output(str(out)), fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        out.rmdir()
        out.mkdir()
        lock(descriptor, operation)

    with (
        patch("batch.output.fcntl.flock", late),
        pytest.raises(OutputError, match="another run"),
        output.locked(),
    ):
        pass


def test_a_run_that_lost_its_output_deletes_no_listing_there(tmp_path: Path) -> None:
    output, run = Output(str(tmp_path)), Run("0" * 8, "", "", {}, {}, [], 0, 0)
    manifest = Path(output.manifest(run))
    manifest.mkdir(parents=True)
    output.check_held = failing(JobError("taken over"))
    with pytest.raises(JobError, match="taken over"):
        output.drop(run)
    assert manifest.exists()


def test_the_version_tells_of_the_code_that_outcomes_come_from_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("agegender", "batch"):
        shutil.copytree(package, tmp_path / package)
    monkeypatch.setattr("batch.run.files", lambda package: tmp_path / package)
    digests = [_code_digest()]
    for name in ("agegender/draw.py", "agegender/client.py", "agegender/__main__.py", "batch/run.py"):
        (tmp_path / name).write_text("")
        digests.append(_code_digest())
    assert len(set(digests)) == 1
    (tmp_path / "agegender" / "chips.py").write_text("")
    assert _code_digest() != digests[0]


def test_blocks_that_a_worker_committed_and_lost_are_done_in_a_second_round(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does that outlives a killed driver while the next run deletes what it is writing."""
    rounds: list[int] = []

    def losing_one_at_first(output: Output, run: Run) -> tuple[list[Part], Counts]:
        rounds.append(len(rounds))
        if len(rounds) == 2:
            next(path for path in Path(output.parts(run)).iterdir()).unlink()
        return committed_parts(output, run)

    monkeypatch.setattr("batch.publish.committed_parts", losing_one_at_first)
    run_batch(request_, said.append)
    assert rounds == [0, 1, 2]
    assert len(pd.read_parquet(request_.out)) == 50
    summary = Output(request_.out).summary()
    assert len(summary["slowest"]) == 20  # of both rounds, as are the times
    assert summary["images_per_s"] > 0


def test_another_model_is_refused(request_: Request, engine: Engine, said: list[str], tmp_path: Path) -> None:
    run_batch(request_, said.append)
    path = Path(request_.out) / "_summary.json"
    summary = json.loads(path.read_text())
    summary["run"]["model"]["sha256"] = "0" * 64
    path.write_text(json.dumps(summary))
    with pytest.raises(OutputError, match=r"its model was .*00000000"):
        run_batch(request_, said.append)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("version", "0.1.0+00000000", r"written by version 0\.1\.0\+00000000 and this is 0\.1\.0\+[0-9a-f]{8}"),
        ("libraries", {"torch": "1.0"}, r"written with \S+ \S+ and this is"),
    ],
)
def test_another_code_is_refused(
    request_: Request, engine: Engine, said: list[str], name: str, value: Any, reason: str
) -> None:
    run_batch(request_, said.append)
    path = Path(request_.out) / "_summary.json"
    summary = json.loads(path.read_text())
    summary["run"][name] = value
    path.write_text(json.dumps(summary))
    with pytest.raises(OutputError, match=reason):
        run_batch(request_, said.append)


def interrupt(request: Request, engine: Engine, said: list[str], *, after: int) -> None:
    """A run that ends after so many blocks; the next one does not."""
    engine.stop_after = after
    with pytest.raises(JobError):
        run_batch(request, said.append)
    engine.stop_after = None


def interrupted(request: Request, engine: Engine, said: list[str]) -> tuple[Output, Run]:
    """An output with three blocks of a run."""
    interrupt(request, engine, said, after=3)
    output = Output(request.out)
    run = output.run()
    assert run
    return output, run


def begin_to_append(request: Request, engine: Engine, said: list[str], source: Path) -> Request:
    """One more file, and a run that adds it to a finished output and ends before its first block."""
    (source / "late.png").write_bytes(b"words")
    again = replace(request, mode="append")
    interrupt(again, engine, said, after=0)
    return again


def test_append_adds_what_is_new_and_nothing_twice(
    request_: Request, engine: Engine, said: list[str], source: Path
) -> None:
    run_batch(request_, said.append)
    run_batch(replace(request_, mode="append"), said.append)
    assert "Nothing to add" in said[-1]
    assert Output(request_.out).finished()
    again = begin_to_append(request_, engine, said, source)
    assert Output(request_.out).finished() is None
    run_batch(again, said.append)
    table = pd.read_parquet(request_.out)
    assert len(table) == table["path"].nunique() == table["id"].nunique() == 51
    assert json.loads((Path(request_.out) / "_summary.json").read_text())["inputs"] == 51


def test_append_gives_no_number_twice_when_files_of_the_output_are_gone(
    request_: Request, engine: Engine, said: list[str], source: Path
) -> None:
    run_batch(request_, said.append)
    for path in Path(request_.out).glob("*.parquet"):
        path.unlink()
    again = replace(request_, mode="append")
    run_batch(again, said.append)
    (source / "late.png").write_bytes(b"words")
    run_batch(again, said.append)
    table = pd.read_parquet(request_.out)
    assert len(table) == table["path"].nunique() == table["id"].nunique() == 51


@pytest.mark.parametrize("appended", [False, True])
def test_a_file_that_comes_back_into_the_output_doubles_nothing(
    request_: Request,
    engine: Engine,
    said: list[str],
    source: Path,
    group_jpeg: bytes,
    monkeypatch: pytest.MonkeyPatch,
    appended: bool,
) -> None:
    """With several faces in an image, which is one input."""
    (source / "group.jpg").write_bytes(group_jpeg)
    request = replace(request_, options=ScoreOptions())
    if appended:
        run_batch(request, said.append)
        (source / "late.png").write_bytes(b"words")
        request = replace(request, mode="append")
    stray, inputs = Path(request_.out) / f"faces-{'0' * 8}-00000.parquet", 51 + appended

    def publish_beside_stray(output: Output, run: Run, parts: list[Part]) -> None:
        publish(output, run, parts)
        shutil.copy(output.files()[0], stray)

    with monkeypatch.context() as patch:
        patch.setattr("batch.publish.publish", publish_beside_stray)
        told = rf"holds \d+ inputs, though only {inputs} were scored; take out .* begin with faces-[0-9a-f]{{8}}-\)"
        with pytest.raises(IncompleteError, match=told):
            run_batch(request, said.append)
    assert not (Path(request_.out) / "_SUCCESS").exists()
    stray.unlink()
    run_batch(request, said.append)
    table = pd.read_parquet(request_.out)
    assert len(table) > table["path"].nunique() == table["id"].nunique() == inputs
    assert Output(request_.out).summary()["inputs"] == inputs


def test_only_what_a_run_adds_to_may_have_lost_inputs(tmp_path: Path) -> None:
    output, run = Output(str(tmp_path)), Run("0" * 8, "", "", {}, {}, [], 50, 4)
    with pytest.raises(IncompleteError, match=r"holds only 49 of 50 inputs; .* puts back the others"):
        check_counted(output, run, 49)
    for inputs in (50, 80, 130):
        check_counted(output, replace(run, first_id=80), inputs)
    with pytest.raises(IncompleteError, match="holds 131 inputs, though only 130 were scored"):
        check_counted(output, replace(run, first_id=80), 131)


def test_an_append_keeps_what_was_left_out_before_unless_it_counts_that_again(
    request_: Request, engine: Engine, said: list[str], source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for folder in (source, other):
        (folder / "link").symlink_to(tmp_path)
    first = replace(request_, sources=(str(source), str(source / "01.png")))
    run_batch(first, said.append)
    assert Output(request_.out).summary()["run"]["excluded"] == {"link to a directory": 1, "named twice": 1}
    (source / "late.png").write_bytes(b"words")
    run_batch(replace(first, mode="append"), said.append)
    assert Output(request_.out).summary()["run"]["excluded"] == {"link to a directory": 1, "named twice": 1}
    assert "Found 1 files; 50 others are in the output already." in said
    assert "left out  1 link to a directory, 1 named twice" in said[-1]
    (other / "later.png").write_bytes(b"words")
    run_batch(replace(first, sources=(str(other), str(other / "later.png")), mode="append"), said.append)
    assert Output(request_.out).summary()["run"]["excluded"] == {"link to a directory": 2, "named twice": 2}
    assert "Found 1 files." in said


def test_what_replacing_an_unfinished_append_would_cost_is_told(
    request_: Request, engine: Engine, said: list[str], source: Path, tmp_path: Path
) -> None:
    run_batch(request_, said.append)
    again = begin_to_append(request_, engine, said, source)
    with pytest.raises(OutputError, match="to replace it and all that it was to be added to"):
        run_batch(replace(again, sources=(str(tmp_path),)), said.append)


def test_an_append_to_nothing_goes_on_by_the_same_command(
    request_: Request, engine: Engine, said: list[str], tmp_path: Path
) -> None:
    again = replace(request_, mode="append")
    engine.stop_after = 1
    with pytest.raises(JobError, match="the same command goes on"):
        run_batch(again, said.append)
    with pytest.raises(OutputError, match="unfinished run of another kind: its inputs were"):
        run_batch(replace(again, sources=(str(tmp_path),)), said.append)
    engine.stop_after = None
    run_batch(again, said.append)
    assert len(pd.read_parquet(request_.out)) == 50


@pytest.mark.parametrize("pages", [True, False])
def test_an_append_tells_which_file_of_the_output_is_damaged(
    request_: Request, engine: Engine, said: list[str], pages: bool
) -> None:
    run_batch(request_, said.append)
    (damaged,) = Path(request_.out).glob("*.parquet")
    content = damaged.read_bytes()
    damaged.write_bytes(content[:200] + bytes(1000) + content[1200:] if pages else b"PAR1")
    for call in (
        lambda: run_batch(replace(request_, mode="append"), said.append),
        lambda: write_report(Output(request_.out)),
    ):
        with pytest.raises(OutputError, match=f"{damaged} cannot be read: .*if it is damaged"):
            call()


def test_append_tells_of_a_list_that_cannot_be_read(
    request_: Request, engine: Engine, said: list[str], tmp_path: Path
) -> None:
    run_batch(request_, said.append)
    damaged = tmp_path / "list.parquet"
    damaged.write_bytes(b"PAR1")
    for mode in ("append", "overwrite"):
        with pytest.raises(SourceError, match="cannot be read"):
            run_batch(replace(request_, sources=(*request_.sources, str(damaged)), mode=mode), said.append)  # type: ignore[arg-type]
    assert len(pd.read_parquet(request_.out)) == 50


def test_an_append_that_ended_while_it_began_goes_on(
    request_: Request, engine: Engine, said: list[str], source: Path
) -> None:
    run_batch(request_, said.append)
    begin_to_append(request_, engine, said, source)
    (Path(request_.out) / "_SUCCESS").touch()  # it goes after run.json has come
    interrupt(request_, engine, said, after=0)
    assert Output(request_.out).finished() is None
    run_batch(request_, said.append)
    assert engine.calls == 4
    assert len(pd.read_parquet(request_.out)) == 51


def test_an_append_takes_nothing_from_a_run_that_ended_while_it_tidied_up(
    request_: Request, engine: Engine, said: list[str], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts have the numbers of the new run's blocks."""
    with monkeypatch.context() as patch:
        run_file = Path(request_.out) / "_run" / "run.json"
        patch.setattr(Output, "clear_run", lambda *_, **__: run_file.unlink(missing_ok=True))
        run_batch(request_, said.append)
    assert Output(request_.out).finished()
    assert list((Path(request_.out) / "_run").glob("*/parts/*"))
    late = [source / f"late{number:02}.png" for number in range(50)]
    for path in late:
        path.write_bytes(b"words")
    run_batch(replace(request_, mode="append"), said.append)
    table = pd.read_parquet(request_.out)
    assert len(table) == table["path"].nunique() == table["id"].nunique() == 100
    assert set(map(str, late)) <= set(table["path"])


def test_outcomes_of_another_run_are_not_published(request_: Request, engine: Engine, said: list[str]) -> None:
    output, run = interrupted(request_, engine, said)
    for other in (replace(run, first_id=8), replace(run, inputs=16)):
        with pytest.raises(IncompleteError, match="of another run"):
            publish(output, other, committed_parts(output, run)[0])


def test_results_that_have_lost_their_run_are_not_deleted_without_a_word(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    run_batch(request_, said.append)
    for name in ("_SUCCESS", "_summary.json"):
        (Path(request_.out) / name).unlink()
    with pytest.raises(OutputError, match="or --overwrite to replace them"):
        run_batch(request_, said.append)
    assert len(pd.read_parquet(request_.out)) == 50
    run_batch(replace(request_, mode="overwrite"), said.append)
    assert Output(request_.out).finished()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff"])
def test_a_run_that_a_power_cut_left_in_pieces_begins_anew(
    request_: Request, engine: Engine, said: list[str], content: bytes
) -> None:
    interrupt(request_, engine, said, after=1)
    (Path(request_.out) / "_run" / "run.json").write_bytes(content)
    run_batch(request_, said.append)
    assert len(pd.read_parquet(request_.out)) == 50


def test_overwrite_starts_anew(request_: Request, engine: Engine, said: list[str], source: Path) -> None:
    run_batch(request_, said.append)
    (source / "00.png").unlink()
    run_batch(replace(request_, mode="overwrite", options=replace(WHOLE, max_bytes=10**6)), said.append)
    assert len(pd.read_parquet(request_.out)) == 49
    assert len(list(Path(request_.out).glob("faces-*"))) == 1


def test_overwrite_deletes_nothing_for_a_name_without_files(request_: Request, engine: Engine, said: list[str]) -> None:
    run_batch(request_, said.append)
    mistyped = (f"{request_.sources[0]}/*.pgn",)
    with pytest.raises(SourceError, match="found no files"):
        run_batch(replace(request_, sources=mistyped, mode="overwrite"), said.append)
    assert len(pd.read_parquet(request_.out)) == 50


@pytest.mark.parametrize("unfinished", [False, True])
def test_overwrite_deletes_nothing_before_all_is_listed(
    request_: Request, engine: Engine, said: list[str], tmp_path: Path, unfinished: bool
) -> None:
    if unfinished:
        interrupt(request_, engine, said, after=3)
    else:
        run_batch(request_, said.append)
    before = contents(Path(request_.out))
    (tmp_path / "late.txt").write_text("words", encoding="utf-16")
    with pytest.raises(SourceError, match="is UTF-16"):
        run_batch(
            replace(request_, sources=(*request_.sources, str(tmp_path / "late.txt")), mode="overwrite"), said.append
        )
    assert contents(Path(request_.out)) == before
    run_batch(request_, said.append)
    assert len(pd.read_parquet(request_.out)) == 50
    assert not (Path(request_.out) / "_run").exists()


def test_a_run_that_lost_its_output_while_it_listed_deletes_nothing_there(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run, which took this one for dead, has finished there."""
    run_batch(request_, said.append)
    before = contents(Path(request_.out))

    @contextlib.contextmanager
    def lost(output: Output) -> Iterator[None]:
        def check() -> None:
            if list(Path(output.base).glob("_run/*/manifest/*")):
                raise JobError("another run took over")

        output.check_held = check
        yield

    monkeypatch.setattr(Output, "locked", lost)
    with pytest.raises(JobError, match="took over"):
        run_batch(replace(request_, mode="overwrite"), said.append)
    after = contents(Path(request_.out))
    assert {path: after[path] for path in before} == before


def contents(folder: Path) -> dict[Path, bytes]:
    """The files below a directory."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_overwrite_that_was_killed_while_it_deleted_leaves_no_run(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(request_, engine, said, after=1)
    deleted: list[str] = []

    def killed(_: Output, info: Any) -> None:
        deleted.append(info.base_name)
        raise KeyboardInterrupt

    monkeypatch.setattr(Output, "remove", killed)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run_batch(replace(request_, mode="overwrite"), said.append)
    assert deleted == ["run.json"]


def test_a_second_interrupt_changes_no_advice(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ctrl-C comes again while the engine ends."""

    @contextlib.contextmanager
    def ends_badly(_: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise KeyboardInterrupt

    monkeypatch.setattr(batch.engine, "running_engine", ends_badly)
    monkeypatch.setattr(batch.job, "score_manifest", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match="the same command without --overwrite goes on"):
        run_batch(replace(request_, mode="overwrite"), said.append)


def test_an_overwrite_that_has_begun_goes_on_without_the_option(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(batch.job, "score_manifest", failing(KeyboardInterrupt()))
    arguments = [*request_.sources, request_.out, "--model", request_.model, "--faces", "whole", "--overwrite"]
    assert main(arguments) == 130
    assert "interrupted; the same command without --overwrite goes on from here" in capsys.readouterr().err


def test_a_disk_that_fills_up_beside_the_engine_is_told_like_one_inside(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "finish", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(JobError, match=r"the disk is full; .* the same command goes on"):
        run_batch(request_, said.append)


@pytest.mark.parametrize("content", [b"{}", b"{", b'{"run": {}}', b"[]", b"\xff\xfe"])
def test_a_damaged_summary_is_told_of(request_: Request, engine: Engine, said: list[str], content: bytes) -> None:
    run_batch(request_, said.append)
    (Path(request_.out) / "_summary.json").write_bytes(content)
    for call in (lambda: run_batch(request_, said.append), lambda: write_report(Output(request_.out))):
        with pytest.raises(OutputError, match=r"_summary\.json is damaged"):
            call()


@pytest.mark.parametrize("mode", ["resume", "append", "overwrite"])
def test_files_of_others_are_never_touched(request_: Request, engine: Engine, said: list[str], mode: str) -> None:
    diary = Path(request_.out) / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear diary")
    with pytest.raises(OutputError, match=r"diary\.txt"):
        run_batch(replace(request_, mode=mode), said.append)  # type: ignore[arg-type]
    assert [path.name for path in diary.parent.iterdir()] == ["diary.txt"]


def test_what_is_wrong_is_said_before_anything_begins(
    request_: Request, engine: Engine, said: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        run_batch(replace(request_, sources=(str(tmp_path / "gone"),)), said.append)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        run_batch(replace(request_, out=str(tmp_path / "file")), said.append)
    with pytest.raises(OutputError, match="cannot write to"):
        run_batch(replace(request_, out="/proc/out"), said.append)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"found no files in .*empty; check the name"):
        run_batch(replace(request_, sources=(str(tmp_path / "empty"),)), said.append)
    (tmp_path / "empty" / "link").symlink_to(request_.sources[0])
    with pytest.raises(SourceError, match=r"found no files in .*; left out were 1 \(link to a directory\)"):
        run_batch(replace(request_, sources=(str(tmp_path / "empty"),)), said.append)
    assert not Path(request_.out).exists()
    Path(request_.out).mkdir()
    Path(request_.out, os.fsdecode(b"caf\xe9")).touch()
    with pytest.raises(OutputError, match="whose name is not UTF-8"):
        run_batch(request_, said.append)
    assert not engine.calls


def test_an_output_is_no_source_of_itself(request_: Request, engine: Engine, said: list[str]) -> None:
    run_batch(request_, said.append)
    for source in (request_.out, str(next(Path(request_.out).glob("*.parquet")))):
        with pytest.raises(SourceError, match="lies in the output"):
            run_batch(replace(request_, sources=(source,), mode="overwrite"), said.append)
    assert len(pd.read_parquet(request_.out)) == 50


def test_what_ended_the_engine_is_told_without_its_advice() -> None:
    began = "(pid=1)\n  File 'a.py'\nArrowInvalid: too large\n\n"
    advice = (
        "The above exception was the direct cause of the following exception:\n\nTo change retry attempts, configure"
    )
    assert batch.job._explain(RuntimeError(began + advice)) == "the engine stopped: ArrowInvalid: too large"
    assert batch.job._explain(RuntimeError("one\ntwo")) == "the engine stopped: two"


def test_an_output_whose_name_is_not_utf_8_is_refused(request_: Request, engine: Engine, said: list[str]) -> None:
    with pytest.raises(OutputError, match="no name in UTF-8"):
        run_batch(replace(request_, out=f"{request_.out}\udcff"), said.append)


@pytest.mark.parametrize("name", ["a?b", "a\tb", "a\nb", "a\rb"])
def test_an_output_whose_name_ray_would_change_is_refused(
    request_: Request, engine: Engine, said: list[str], name: str
) -> None:
    with pytest.raises(OutputError, match="a question mark, a tab or a line break"):
        run_batch(replace(request_, out=f"{request_.out}/{name}"), said.append)
    assert not Path(request_.out).exists()


def test_an_engine_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    patience = batch.job._Patience()
    for minutes in range(0, 100, 20):  # a file is read now and then
        now[0] = 60.0 * minutes
        patience.look(BlockReport(stages_s={"read": float(minutes)}))
    now[0] += 60 * 59
    patience.look(BlockReport(stages_s={"read": 80.0}))
    now[0] += 60 * 2
    with pytest.raises(JobError, match="no input was read or done for 60 minutes"):
        patience.look(BlockReport(stages_s={"read": 80.0}))


def test_the_tally_is_asked_once_a_second_from_the_first_result_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question costs a small machine something; the first result is shown at once."""
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 5

    ended = SimpleNamespace(wait=wait)
    pipeline = SimpleNamespace(start=lambda: None, stop=lambda: None, ended=ended, error=None)
    totals = iter([BlockReport(), BlockReport(stages_s={"read": 1.0}), *[BlockReport(Counter(ok=1))] * 3])
    monkeypatch.setattr(batch.job, "_Pipeline", lambda *_: pipeline)
    monkeypatch.setattr(batch.job, "_RemoteTally", lambda _: SimpleNamespace(total=lambda: next(totals)))
    for name in ("ray", "NodeAffinitySchedulingStrategy"):
        monkeypatch.setattr(batch.job, name, MagicMock())
    batch.job.score_manifest(*[MagicMock()] * 6)
    assert waits == [0.25, 0.25, 0.25, 1.0, 1.0]


def test_two_runs_do_not_share_an_output(request_: Request, engine: Engine, said: list[str]) -> None:
    Path(request_.out).mkdir()
    with Output(request_.out).locked(), pytest.raises(OutputError, match="another run is writing"):
        run_batch(request_, said.append)


def test_too_many_bad_inputs_end_the_run_until_more_are_allowed(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    for _ in range(2):  # also when all is done already
        with pytest.raises(TooManyBadError, match=r"10 of 50 inputs .*10 not_image.*--max-bad 19%"):
            run_batch(replace(request_, max_bad="19%"), said.append)
    assert not (Path(request_.out) / "_SUCCESS").exists()
    run_batch(replace(request_, max_bad="10"), said.append)
    assert engine.calls == 1
    assert (Path(request_.out) / "_SUCCESS").exists()


def test_too_many_bad_inputs_end_the_run_before_all_are_done(
    request_: Request, engine: Engine, said: list[str], tmp_path: Path
) -> None:
    """At the first block with which the limit cannot be met any more."""
    (tmp_path / "words").mkdir()
    for number in range(200):
        (tmp_path / "words" / str(number)).write_bytes(b"words")
    request = replace(request_, sources=(str(tmp_path / "words"),), max_bad="5%")
    with pytest.raises(TooManyBadError, match="stopped after 16 inputs: 16 of 200 inputs"):
        run_batch(request, said.append)
    with pytest.raises(TooManyBadError, match="stopped after 112 inputs: 112 of 200 inputs"):
        run_batch(replace(request, max_bad="100"), said.append)
    run_batch(replace(request, max_bad=None), said.append)
    assert engine.blocks == list(range(8))


def test_a_share_is_one_of_all_inputs_and_not_of_those_that_come_first(request_: Request) -> None:
    """As the files in `.git` do, which are no images."""
    request = replace(request_, mode="overwrite", max_bad="5%")
    watch = _Watch(Run("0" * 8, "", "", {}, {}, [], 65_000, 100), Counter(), request)
    for bad in (150, 3250):
        watch.see(BlockReport(Counter(not_image=bad)))
        watch.see(BlockReport(Counter(not_image=bad, ok=100)))
    told = r"stopped after 3,351 inputs: 3,251 of 65,000 inputs .*\(3,251 not_image\), more than --max-bad 5% allows; "
    with pytest.raises(TooManyBadError, match=told):
        watch.see(BlockReport(Counter(not_image=3251, ok=100)))


@pytest.mark.parametrize(
    ("limit", "bad", "exceeded"),
    [("29%", 2900, False), ("0.57%", 57, False), ("0.57%", 58, True), ("5", 5, False), ("5", 6, True)],
)
def test_what_a_limit_allows_is_exact(limit: str, bad: int, exceeded: bool) -> None:
    assert _exceeds(limit, bad, 10_000) is exceeded


def test_a_block_that_was_written_twice_counts_once_and_a_lost_one_is_missed(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, run = interrupted(request_, engine, said)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "read_bytes", failing(OSError("the store is away")))
        with pytest.raises(OSError, match="away"):
            committed_parts(output, run)
    parts_folder, checkpoint = Path(output.parts(run)), Path(output.checkpoint(run))
    part, check = sorted(parts_folder.iterdir())[0], sorted(checkpoint.iterdir())[0]
    (parts_folder / "9_000000-0.parquet").write_bytes(part.read_bytes())
    (checkpoint / "9_000000.parquet").write_bytes(check.read_bytes())
    (checkpoint / "8_000000.pending.parquet").write_bytes(check.read_bytes())
    parts, counts = committed_parts(output, run)
    assert counts.inputs == 32
    assert sorted(block for part in parts for block in part.blocks) == [0, 1, 2]
    monkeypatch.setattr(batch.job, "score_manifest", lambda *_: None)
    with pytest.raises(IncompleteError, match="18 of 50"):
        run_batch(request_, said.append)


def test_a_part_that_is_not_its_checkpoints_is_done_again(request_: Request, engine: Engine, said: list[str]) -> None:
    output, run = interrupted(request_, engine, said)
    first, second, _ = sorted(Path(output.checkpoint(run)).iterdir())
    second.write_bytes(first.read_bytes())
    parts, counts = committed_parts(output, run)
    assert [sorted(part.blocks) for part in parts] == [[0], [2]]
    assert counts.inputs == 24
    assert len(list(Path(output.parts(run)).iterdir())) == 2
    run_batch(request_, said.append)
    assert pd.read_parquet(request_.out)["id"].tolist() == list(range(50))


def test_files_follow_one_another_by_number_whatever_the_order_of_their_parts(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch.publish._ROWS_PER_FILE", 10)
    output, run = interrupted(request_, engine, said)
    parts, counts = committed_parts(output, run)
    publish(output, replace(run, inputs=counts.inputs), parts[::-1])
    numbers = [pq.read_table(path)["id"].to_pylist() for path in output.files()]
    assert numbers == [list(range(16)), list(range(16, 32))]


def test_what_a_call_left_that_ended_while_it_published_goes(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    """Aside or in place already; files of the run that it adds to stay."""
    output, run = interrupted(request_, engine, said)
    older, stale, aside = (
        Path(folder) / f"faces-{run_id}-00007.parquet"
        for folder, run_id in ((output.base, "0" * 8), (output.base, run.id), (output.new_staging(), run.id))
    )
    for path in (older, stale, aside):
        path.write_bytes(b"PAR1")
    parts, counts = committed_parts(output, run)
    publish(output, replace(run, inputs=counts.inputs), parts)
    assert output.files() == sorted([str(older), output.path(f"faces-{run.id}-00000.parquet")])


def test_a_run_that_was_taken_over_while_it_published_moves_nothing(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    output, run = interrupted(request_, engine, said)
    parts, counts = committed_parts(output, run)
    others = Path(request_.out) / f"faces-{run.id}-00000.parquet"
    others.touch()
    held, output.check_held = output.check_held, failing(JobError("taken over"))
    with pytest.raises(JobError, match="taken over"):
        publish(output, replace(run, inputs=counts.inputs), parts)
    output.check_held = held
    assert others.stat().st_size == 0
    publish(output, replace(run, inputs=counts.inputs), parts)
    assert len(pd.read_parquet(others)) == counts.inputs


def test_what_a_replaced_run_writes_late_is_none_of_its_successors(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    """As a node of a cluster does that was cut off."""
    output, replaced = interrupted(request_, engine, said)
    part, check = (next(Path(folder(replaced)).iterdir()) for folder in (output.parts, output.checkpoint))
    late = {path: path.read_bytes() for path in (part, check)}
    interrupt(replace(request_, mode="overwrite"), engine, said, after=0)
    for path, content in late.items():
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    engine.blocks.clear()
    run_batch(request_, said.append)
    assert engine.blocks == [0, 1, 2, 3]
    assert output.finished()
    assert not (Path(request_.out) / "_run").exists()


def test_ray_cuts_no_block_in_two(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, run = interrupted(request_, engine, said)
    context = SimpleNamespace(target_max_block_size=DataContext.target_max_block_size)
    monkeypatch.setattr(DataContext, "get_current", lambda: context)
    batch.job._configure(output, run)
    assert context.target_max_block_size is None


def test_dry_run_counts_and_writes_nothing(request_: Request, engine: Engine, said: list[str]) -> None:
    run_batch(replace(request_, dry_run=True), said.append)
    assert not Path(request_.out).exists()
    text = "\n".join(said)
    assert "50 files" in text
    assert ".png" in text
    assert "not_image" in text
    assert "about" in text


@pytest.mark.parametrize(
    ("workers", "told"), [(5, "about 10.0 minutes with 5 processes"), (0, "about 25.0 minutes with 2 processes")]
)
def test_a_dry_run_tells_how_long_all_files_take_all_processes(
    request_: Request, said: list[str], monkeypatch: pytest.MonkeyPatch, workers: int, told: str
) -> None:
    """Fifty files, of which 24 were tried, at a minute each."""
    monkeypatch.setattr("batch.preview._try", lambda *_: (Counter(ok=24), 24 * 60.0))
    monkeypatch.setattr("batch.preview.core_count", lambda: 2)
    run_batch(replace(request_, dry_run=True, resources=Resources(workers=workers)), said.append)
    assert said[-1] == f"{told}, after about 9 s to start"


@pytest.mark.parametrize(("names", "sample", "draws"), [(3, 1, 3000), (1000, 24, 100)])
def test_a_dry_run_tries_early_and_late_files_alike(
    monkeypatch: pytest.MonkeyPatch, names: int, sample: int, draws: int
) -> None:
    monkeypatch.setattr("batch.preview._SAMPLE", sample)
    inputs, generator, thirds = [Input(f"/{number}") for number in range(names)], random.Random(1), Counter[int]()
    for _ in range(draws):
        drawn, suffixes = _draw(inputs, generator)
        assert len(set(drawn)) == sample
        assert suffixes == {"": names}
        thirds.update(3 * int(each.path[1:]) // names for each in drawn)
    assert [count / thirds.total() for _, count in sorted(thirds.items())] == pytest.approx([1 / 3] * 3, abs=0.04)


@pytest.mark.parametrize(
    "wrong", [{"model": "README.md"}, {"options": ScoreOptions(min_score=2.0)}], ids=["model", "option"]
)
def test_a_dry_run_tells_of_wrong_options_before_it_lists(
    request_: Request, said: list[str], monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    monkeypatch.setattr("batch.listing.Listing.inputs", lambda *_: pytest.fail("it was listed"))
    with pytest.raises(RequestError):
        run_batch(replace(request_, dry_run=True, **wrong), said.append)


def test_a_dry_run_of_an_append_counts_what_is_new(
    request_: Request, engine: Engine, said: list[str], source: Path
) -> None:
    run_batch(request_, said.append)
    (source / "late.png").write_bytes(b"words")
    run_batch(replace(request_, mode="append", dry_run=True), said.append)
    assert any(text.startswith("1 files in ") for text in said)


@pytest.mark.parametrize("mode", ["append", "resume"])
def test_a_dry_run_of_an_unfinished_append_counts_what_is_new(
    request_: Request, engine: Engine, said: list[str], source: Path, mode: Mode
) -> None:
    run_batch(request_, said.append)
    again = begin_to_append(request_, engine, said, source)
    run_batch(replace(again, mode=mode, dry_run=True), said.append)
    assert any(text.startswith("1 files in ") for text in said)


def test_a_dry_run_of_a_finished_run_says_that_nothing_is_left_to_do(
    request_: Request, engine: Engine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch(request_, said.append)
    before = contents(Path(request_.out))
    monkeypatch.setattr("batch.listing.Listing.inputs", lambda *_: pytest.fail("it was listed"))
    run_batch(replace(request_, dry_run=True), said.append)
    assert "Nothing to do" in said[-1]
    assert contents(Path(request_.out)) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("mode", ["resume", "append"])
def test_a_dry_run_refuses_another_run_as_the_call_would(
    request_: Request, engine: Engine, said: list[str], mode: Mode, finished: bool
) -> None:
    if finished:
        run_batch(request_, said.append)
    else:
        interrupt(request_, engine, said, after=1)
    before = contents(Path(request_.out))
    other = replace(request_, options=replace(WHOLE, max_bytes=7), dry_run=True)
    with pytest.raises(OutputError, match="--max-bytes was 512000000 and is now 7"):
        run_batch(replace(other, mode=mode), said.append)
    run_batch(replace(other, mode="overwrite"), said.append)
    assert contents(Path(request_.out)) == before


def test_a_dry_run_of_an_unfinished_run_says_that_the_call_goes_on_with_it(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    output, run = interrupted(request_, engine, said)
    Path(output.parts(run), "unfinished-0.parquet").touch()
    before = contents(Path(request_.out))
    run_batch(replace(request_, dry_run=True), said.append)
    told = f"The call would go on with the run of {run.created} (50 files); what is done of it is not taken off"
    assert any(text.startswith(told) for text in said)
    assert any(text.startswith("50 files in ") for text in said)
    assert contents(Path(request_.out)) == before


def test_no_report_of_an_output_that_changed_meanwhile(
    request_: Request, engine: Engine, said: list[str], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_batch(request_, said.append)
    page_of = batch.report._page

    def page_and_append(*arguments: Any) -> str:
        (source / "late.png").write_bytes(b"words")
        run_batch(replace(request_, mode="append"), said.append)
        return page_of(*arguments)

    monkeypatch.setattr("batch.report._page", page_and_append)
    with pytest.raises(OutputError, match="changed while it was read"):
        write_report(Output(request_.out))
    assert not (Path(request_.out) / "_report.html").exists()


def test_no_report_of_an_output_that_is_being_added_to(
    request_: Request, engine: Engine, said: list[str], source: Path
) -> None:
    run_batch(request_, said.append)
    page = Path(write_report(Output(request_.out)))
    begin_to_append(request_, engine, said, source)
    with pytest.raises(OutputError, match="a run is adding to it"):
        write_report(Output(request_.out))
    assert not page.exists()  # it told of fewer inputs


def test_the_report_is_one_page_that_escapes_what_it_shows(
    request_: Request, engine: Engine, said: list[str], source: Path, group_jpeg: bytes
) -> None:
    (source / "!<script>alert(1)<script>.png").write_bytes(b"words")
    (source / "group.jpg").write_bytes(group_jpeg)
    run_batch(replace(request_, options=ScoreOptions()), said.append)
    page = Path(write_report(Output(request_.out))).read_text()
    assert main(["report", request_.out]) == 0
    assert not (Path(request_.out) / "_run").exists()
    assert "&lt;script&gt;alert" in page
    assert "<script" not in page
    assert "http" not in page
    assert page.count("data:image/jpeg;base64,") == 2
    for title in ("Status", "Perceived age", "Perceived gender", "Width of the 90% interval", "Slowest", "least sure"):
        assert title in page
    run_batch(replace(request_, options=ScoreOptions()), said.append)
    assert "Nothing to do" in said[-1]


def test_the_report_shows_the_least_sure_faces_first_and_how_wide_intervals_are(
    request_: Request, engine: Engine, said: list[str]
) -> None:
    """Of one face and thirteen in two files, the two surest are left out."""
    run_batch(request_, said.append)
    (path,) = Path(request_.out).glob("*.parquet")
    scores = [0.99, 0.61, 0.9, 0.72, 0.95, 0.64, 0.83, 0.7, 0.67, 0.88, 0.75, 0.79, 0.62, 0.86]
    widths = [4.5, 5.0, 9.5, 12.0, *[30.0] * 10]
    ok = pd.read_parquet(path).query("status == 'ok'")[:14]
    rows = ok.assign(score=scores, age_low=20.0, age_high=[20 + width for width in widths])
    table = pa.Table.from_pandas(rows, schema=pq.read_schema(path), preserve_index=False)
    pq.write_table(table.slice(0, 1), path)
    pq.write_table(table.slice(1), path.with_name(path.name.replace("00000", "00001")))
    page = Path(write_report(Output(request_.out))).read_text()
    assert re.findall(r"<td class=n>(\d\.\d\d)<td>", page) == [f"{score:.2f}" for score in sorted(scores)[:12]]
    assert re.findall(r"<td>(\d+-\d+)<td class=n>(\d+)<", page.partition("Width of the")[2]) == [
        *(("0-5", "1"), ("5-10", "2"), ("10-15", "1"), ("30-35", "10"))
    ]


def test_the_report_shows_no_face_of_another_picture(
    request_: Request, engine: Engine, said: list[str], source: Path, group_jpeg: bytes
) -> None:
    (source / "group.jpg").write_bytes(group_jpeg)
    run_batch(replace(request_, options=ScoreOptions()), said.append)
    Image.new("RGB", (640, 480)).save(source / "group.jpg")
    page = Path(write_report(Output(request_.out))).read_text()
    assert "data:image" not in page
    assert "cannot be shown" in page


def read_pandas(out: str) -> tuple[int, int, float]:
    table = pd.read_parquet(out)
    return table["path"].nunique(), table["age"].count(), table["age"].max()


def read_duckdb(out: str) -> tuple[int, int, float]:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"select count(distinct path), count(age), max(age) from '{out}/*.parquet'").fetchall()[0]


def read_polars(out: str) -> tuple[int, int, float]:
    polars = pytest.importorskip("polars")
    columns = [polars.col("path").n_unique(), polars.col("age").count(), polars.col("age").max().alias("max")]
    return polars.scan_parquet(f"{out}/*.parquet").select(columns).collect().row(0)


@pytest.mark.parametrize("read", [read_pandas, read_duckdb, read_polars])
def test_readers_of_other_libraries_see_the_same(
    request_: Request, engine: Engine, said: list[str], read: Callable[[str], tuple[int, int, float]]
) -> None:
    run_batch(request_, said.append)
    write_report(Output(request_.out))
    ages = pq.read_table(request_.out)["age"].drop_null().to_numpy()
    paths, count, oldest = read(request_.out)
    assert (paths, count, oldest) == (50, 40, pytest.approx(ages.max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "out"], "gone does not exist; check the name"),
        (["tests", "out", "--model", "gone.pt"], "cannot read the model gone.pt"),
        (["tests", "out", "--min-score", "7"], "min_score"),
        (["report", "gone"], "has no _summary.json; score it with `python -m batch SOURCE DIR`, or finish the run"),
        (["tests", "out", "--overwrite", "--model", "gone.pt"], "cannot read the model gone.pt"),
    ],
)
def test_a_wrong_call_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [str(tmp_path / "out") if argument == "out" else argument for argument in arguments]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "_run").exists()


def test_options_may_stand_between_the_sources_and_the_output(
    source: Path,
    tmp_path: Path,
    model_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(tmp_path / "out")
    assert main([str(source), str(source / "01.png"), "--dry-run", "--model", str(model_path), out]) == 0
    assert "twice" in capsys.readouterr().out
    odd = source.rename(tmp_path / "-a")
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--model", str(model_path), "--", odd.name, out]) == 0


def test_names_are_told_in_any_encoding(
    source: Path, tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = source.rename(tmp_path / "\u65e5\u672c")
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, "latin-1"))
    assert main([str(named), str(tmp_path / "out"), "--dry-run", "--model", str(model_path)]) == 0
    sys.stdout.flush()
    assert rb"\u65e5\u672c" in told.getvalue()


def test_the_defaults_are_the_predictors() -> None:
    of_predictor = {name: each.default for name, each in inspect.signature(Predictor).parameters.items()}
    options = asdict(ScoreOptions())
    assert {name: of_predictor[name] for name in options if name != "max_bytes"} == {
        name: value for name, value in options.items() if name != "max_bytes"
    }


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--workers", -1, 1), ("--workers", 0, 1), ("--gpus", -1, 0), ("--max-bytes", -1, 0)],
)
def test_numbers_too_small_are_refused(option: str, value: int, told: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gone", "out", f"{option}={value}"])
    assert f"'{value}' is not a number from {told} on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "set_", "address"),
    [(None, None, None), (None, " ", None), (None, " local", None), (None, " a:1 ", "a:1"), ("auto", "a:1", "auto")],
)
def test_the_cluster_is_that_of_the_option_or_the_environment(
    given: str | None, set_: str | None, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if set_ is not None:
        monkeypatch.setenv("RAY_ADDRESS", set_)
    assert _address(given) == address


def test_what_the_libraries_use_that_is_deprecated_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here or in Ray's processes, where a caller has made errors of it."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    assert main(["report", "gone"]) == 2
    assert "PYTHONWARNINGS" not in os.environ
    warnings.warn("as in Ray", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("value", ["5", "0", "2.5%"])
def test_max_bad_takes_numbers_and_shares(value: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "gone"), str(tmp_path / "out"), "--max-bad", value]) == 2
    with pytest.raises(SystemExit):
        main(["gone", "out", "--max-bad", f"x{value}"])
    assert "neither a number of inputs" in capsys.readouterr().err


def test_samples_are_two_photographs_and_two_files_that_are_none(tmp_path: Path, predictor: Predictor) -> None:
    write_samples(tmp_path)
    paths = sorted(map(str, tmp_path.iterdir()))
    results = score(predictor, paths, [None] * len(paths), lambda path: Path(path).read_bytes())
    assert sorted(result.status for result in results) == ["not_image", "ok", "ok", "unreadable"]


def test_samples_replace_no_file_and_stay_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_samples(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    assert main(["--samples", "s3://bucket/in", "out"]) == 2
    assert "a directory of this machine" in capsys.readouterr().err
    uri = f"file://{tmp_path}/by%20uri"
    assert main(["--samples", uri, "out", "--model", "gone.pt"]) == 2
    assert len(list((tmp_path / "by uri").iterdir())) == 4
    assert not Path("s3:").exists()
    assert main(["--samples", "new", "out", "--dry-run"]) == 2
    assert not Path("new").exists()


def test_scoring_keeps_order_and_puts_each_failure_in_its_place(predictor: Predictor, group_jpeg: bytes) -> None:
    def read(path: str) -> bytes:
        if path == "gone":
            raise FileNotFoundError(2, "No such file or directory")
        if path == "nul":
            raise ValueError("embedded null byte")
        if path == "large":
            raise MemoryError
        return group_jpeg

    paths = ["a", "gone", "b", "listed", "nul", "large", "c"]
    errors = [None, None, None, "cannot be listed", None, None, None]
    results = list(score(predictor, paths, errors, read))
    assert [result.path for result in results] == paths
    assert [result.status for result in results] == [
        *("ok", "unreadable", "ok", "unreadable", "unreadable"),
        *("failed", "ok"),  # a lack of memory says nothing of the file
    ]
    assert results[1].error == "cannot be read: No such file or directory"
    assert results[3].error == "cannot be read: cannot be listed"


def test_a_file_that_kills_its_process_is_given_up(model_path: Path, tmp_path: Path) -> None:
    class Died(BaseException):
        """Stands for the end of the process."""

    class Mortal(Scorer):
        def _read(self, block: int, path: str, careful: bool) -> bytes:
            data = super()._read(block, path, careful)
            if path.endswith("3.png"):
                raise Died
            return data

    for number in range(6):
        Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    (table,) = blocks_of(Input(str(tmp_path / f"{number}.png")) for number in range(6))
    tally = Tally()
    for _ in range(3):
        with pytest.raises(Died):
            Mortal(WHOLE, model_path.read_bytes(), tally)(table)
    rows = Mortal(WHOLE, model_path.read_bytes(), tally)(table)
    assert rows.schema.equals(BLOCK_SCHEMA)
    assert rows["status"].to_pylist() == ["ok", "ok", "ok", "failed", "ok", "ok"]
    assert "died" in rows["error"].to_pylist()[3]
    assert bad_count(tally.total().statuses) == 1


def test_an_input_on_which_processes_stand_still_is_given_up_before_the_job_is() -> None:
    deaths = 1 + batch.progress._FATAL_DEATHS  # of the first it is not known which input was in hand
    assert 1.5 * deaths * batch.scorer._STUCK_S <= batch.job._STUCK_S


STANDING_STILL = """
import sys, time
from pathlib import Path
import batch.scorer
from batch.listing import Input, blocks_of
from batch.progress import Tally
from batch.request import ScoreOptions

class Stalled(batch.scorer.Scorer):
    def _read(self, block, path, careful):
        data = super()._read(block, path, careful)
        while path.endswith("stalled.png"):
            time.sleep(60)
        return data

scorer = Stalled(ScoreOptions(faces="whole"), Path(sys.argv[1]).read_bytes(), Tally())
batch.scorer._STUCK_S = 1
for path in sys.argv[2:]:
    print(*(scorer(table)["status"][0] for table in blocks_of([Input(path)])), flush=True)
    time.sleep(2)
"""


def test_a_process_that_stands_still_on_an_input_ends_itself(model_path: Path, tmp_path: Path) -> None:
    """And at no other time."""
    paths = [tmp_path / "good.png", tmp_path / "stalled.png"]
    for path in paths:
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(path)
    command = [sys.executable, "-c", STANDING_STILL, *map(str, (model_path, *paths))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "ok\n"), ended.stderr
    assert "Timeout" in ended.stderr


def test_reading_is_told_of_before_there_is_a_result(
    source: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a block of slow images would pass for an engine that stands still."""
    told: list[tuple[int, float]] = []

    class Listening(Tally):
        def report(self, block: int, report: BlockReport, done: bool = False) -> None:
            told.append((report.statuses.total(), report.stages_s.get("read", 0.0)))

    monkeypatch.setattr("batch.scorer._REPORT_EVERY_S", -1.0)
    paths = sorted(str(path) for path in source.iterdir())
    block = {"block": 0, "first_id": 0, "paths": paths, "errors": [None] * len(paths)}
    Scorer(WHOLE, model_path.read_bytes(), Listening())(pa.Table.from_pylist([block]))
    before = [read for results, read in told if not results]
    assert len(before) >= 16
    assert before == sorted(set(before))
    assert told[-1][0] == len(paths)


def test_a_file_on_which_no_process_died_is_not_given_up() -> None:
    """Its block is done again and again, as when nodes are lost that held the outcomes."""
    tally = Tally()
    for _ in range(5):
        _, fatal = tally.begin(1)
        assert fatal == []
        tally.take(1, "/a/last.jpg")
        tally.report(1, BlockReport(), done=True)


def test_the_slowest_files_are_so_without_the_network(source: Path, model_path: Path) -> None:
    """It takes a thousand seconds here, for all faces together."""

    class Slow(Scorer):
        def _on_stage(self, stage: str, seconds: float) -> None:
            super()._on_stage(stage, seconds + 1000 * (stage == "predict"))

    tally = Tally()
    paths = [str(source / f"{number:02}.png") for number in range(8)]
    block = {"block": 0, "first_id": 0, "paths": paths, "errors": [None] * len(paths)}
    Slow(WHOLE, model_path.read_bytes(), tally)(pa.Table.from_pylist([block]))
    report = tally.total()
    assert report.stages_s.pop("predict") >= 1000
    assert sorted(path for _, path in report.slowest) == paths
    assert sum(seconds for seconds, _ in report.slowest) == pytest.approx(sum(report.stages_s.values()))


def test_the_speed_is_that_after_the_first_results(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten of sixty inputs, after ten seconds in which the workers started; what was done before counts nowhere."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watch = _Watch(Run("0" * 8, "", "", {}, {}, [], 100, 8), Counter(ok=40), request_)
    assert (watch.startup_s(0.0), watch.images_per_s(0, 5.0)) == (0.0, 0.0)
    for clock[0], done in ((5.0, 0), (10.0, 10), (15.0, 40), (20.0, 60)):
        watch.see(BlockReport(Counter(ok=done) if done else Counter()))
    assert (watch.startup_s(0.0), watch.images_per_s(60, 20.0)) == (10.0, 5.0)


def test_the_steady_speed_is_that_of_the_middle(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """From six of sixty inputs to 54; what was done before counts nowhere."""
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watch = _Watch(Run("0" * 8, "", "", {}, {}, [], 100, 8), Counter(ok=40), request_)
    for clock[0], done in ((5.0, 1), (9.0, 6), (10.0, 20), (11.0, 53)):
        watch.see(BlockReport(Counter(ok=done)))
        assert watch.steady_images_per_s() == 0.0
    for clock[0], done in ((13.0, 54), (30.0, 60)):
        watch.see(BlockReport(Counter(ok=done)))
    assert watch.steady_images_per_s() == 12.0


def test_a_block_that_is_done_again_is_counted_once() -> None:
    tally = Tally()
    tally.report(0, BlockReport(statuses={"ok": 5}))  # type: ignore[arg-type]
    for _ in range(2):
        tally.report(0, BlockReport(statuses={"ok": 8}), done=True)  # type: ignore[arg-type]
    tally.report(1, BlockReport(statuses={"failed": 1}))  # type: ignore[arg-type]
    assert tally.total().statuses == {"ok": 8, "failed": 1}


def test_progress_in_a_log_is_few_plain_lines() -> None:
    stream = io.StringIO()
    progress = Progress(1000, before=100, stream=stream)
    for done in range(100, 1000):
        progress.show(done, 3)
    progress.close(1000, 3)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "\r" not in stream.getvalue()
    assert "1000/1000" in lines[-1]
    assert "3 bad" in lines[-1]


def test_progress_has_a_bar_in_any_encoding() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, "latin-1")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    progress = Progress(1000, stream=stream)
    progress.show(1, 0)
    progress.close(500, 0)
    assert b"###" in written.getvalue()


@pytest.mark.parametrize("columns", [60, 0])  # some terminals do not know
def test_progress_fits_into_a_narrow_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    stream.fileno = lambda: 0  # type: ignore[method-assign]
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    progress = Progress(1000, stream=stream)
    progress.show(1, 0)
    progress.close(500, 30)
    assert "30 bad" in stream.getvalue()
    assert all(len(line) < (columns or 101) for line in re.split(r"\r|\x1b\[K|\n", stream.getvalue()))


def full_log() -> TextIO:
    return open("/dev/full", "w")


def closed_terminal() -> TextIO:
    master, slave = os.openpty()
    os.close(master)
    return open(slave, "w")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no disk that is always full")
@pytest.mark.parametrize("broken", [full_log, closed_terminal])
def test_work_goes_on_when_nothing_can_be_shown(broken: Callable[[], TextIO]) -> None:
    with broken() as stream:
        with pytest.raises(OSError, match=r"No space left|Input/output error"):
            os.write(stream.fileno(), b"it is broken")
        progress = Progress(1000, stream=stream)
        progress.show(1, 0)
        progress.close(1000, 0)
        tell(stream, "done\n")


def test_what_the_engine_prints_goes_to_its_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log, kept = tmp_path / "engine.log", sys.stdout
    with quiet(str(log)):
        print("a remark of the engine")
        os.write(2, b"a remark beside Python\n")
        print("what we say", file=kept)
        print("our progress", file=sys.stderr)
    assert capfd.readouterr() == ("what we say\n", "our progress\n")
    assert set(log.read_text().splitlines()) == {"a remark of the engine", "a remark beside Python"}
