"""The batch job through real Ray: a hostile directory, the predictor's numbers, and what a second call does."""

import fcntl
import json
import logging
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from agegender import Item, Predictor
from agegender.records import arrow_table
from agegender.spec import SPEC_FILE, read_artifact
from batch.__main__ import main
from batch.location import decode_path, encode_path
from batch.publish import FINAL_SCHEMA

TIMEOUT_S = 280

# Announces 2**32 - 5 pixels a row.
WIDE_BMP = b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiIHHIIiiII", 40, -5, 5, 1, 24, *[0] * 6)


def run_batch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m batch ARGUMENTS` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "batch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, **environment},
    )


class Mean(torch.nn.Module):
    """A network whose answer has another form than an artifact's."""

    def forward(self, chips: torch.Tensor) -> torch.Tensor:
        return chips.float().mean()


@dataclass(frozen=True)
class Hostile:
    """A directory of everything that a directory may hold.

    Attributes:
        root: the directory.
        statuses: expected status by name of the input.
    """

    root: Path
    statuses: dict[str, str]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, astronaut: bytes, group_jpeg: bytes, blank_png: bytes) -> Hostile:
    root = tmp_path_factory.mktemp("hostile")
    contents = {
        b"astronaut.png": (astronaut, "ok"),
        b"group.jpg": (group_jpeg, "ok"),
        b"sub/.hidden/no extension": (group_jpeg, "ok"),
        b"blank.png": (blank_png, "no_face"),
        b"truncated.jpg": (group_jpeg[: len(group_jpeg) // 2], "unreadable"),
        b"empty.jpg": (b"", "not_image"),
        b"words.jpg": (b"This is no image.", "not_image"),
        b"caf\xe9.png": (astronaut, "ok"),
        b"line\nbreak.png": (blank_png, "no_face"),
        b"percent%20 \\ quote'.png": (blank_png, "no_face"),
        "пример 😀.png".encode(): (blank_png, "no_face"),
        b"-rf": (b"-rf", "not_image"),
        b"wide.bmp": (WIDE_BMP, "too_large"),
    }
    contents |= {b"/".join([b"deep"] * 30) + b"/down.png": (blank_png, "no_face")}
    statuses = {}
    for name, (data, status) in contents.items():
        path = os.path.join(os.fsencode(root), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        statuses[encode_path(path)] = status
    (root / "huge.bmp").touch()
    os.truncate(root / "huge.bmp", 2_000_000)
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "s"))
    (root / "link.png").symlink_to(root / "astronaut.png")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "ring.png").symlink_to(root / "ring.png")
    (root / "sub" / "loop").symlink_to(root)
    (root / "only directories" / "empty").mkdir(parents=True)
    statuses |= {
        str(root / "huge.bmp"): "too_large",
        str(root / "pipe.jpg"): "unreadable",
        str(root / "s"): "unreadable",
        str(root / "link.png"): "ok",
        str(root / "dangling.png"): "unreadable",
        str(root / "ring.png"): "unreadable",
    }
    return Hostile(root, statuses)


@pytest.fixture(scope="module")
def scored(hostile: Hostile) -> subprocess.CompletedProcess[str]:
    """The hostile directory, scored into a directory inside it."""
    return run_batch(hostile.root, hostile.root / "out", "--max-bytes", 1_000_000)


@pytest.fixture(scope="module")
def records(hostile: Hostile, scored: subprocess.CompletedProcess[str]) -> pd.DataFrame:
    assert scored.returncode == 0, scored.stderr
    return pd.read_parquet(hostile.root / "out")


def test_every_input_has_its_outcome_once(hostile: Hostile, records: pd.DataFrame) -> None:
    by_path = records.drop_duplicates(["path", "status"]).set_index("path")["status"]
    assert by_path.to_dict() == hostile.statuses
    assert len(by_path) == len(hostile.statuses)
    assert sorted(records["id"].unique()) == list(range(len(hostile.statuses)))


def test_failures_have_a_reason_and_others_have_none(records: pd.DataFrame) -> None:
    failed = ~records["status"].isin(["ok", "no_face"])
    assert records.loc[failed, "error"].str.len().min() > 10
    assert records.loc[~failed, "error"].isna().all()
    assert not records["error"].str.contains("Traceback", na=False).any()


def test_records_are_those_of_the_predictor(hostile: Hostile, records: pd.DataFrame, predictor: Predictor) -> None:
    paths = [path for path, status in hostile.statuses.items() if status in ("ok", "no_face")]
    items = [Item(Path(os.fsdecode(decode_path(path))).read_bytes(), path) for path in paths]
    expected = arrow_table(predictor.predict(items)).to_pandas()
    got = records[records["path"].isin(paths)].drop(columns="id")
    key = ["path", "face"]
    pd.testing.assert_frame_equal(
        got.sort_values(key).reset_index(drop=True),
        expected.sort_values(key).reset_index(drop=True),
        check_dtype=False,
        rtol=1e-4,
    )


def test_models_in_processes_of_their_own_give_the_same(
    hostile: Hostile, records: pd.DataFrame, tmp_path: Path
) -> None:
    """The two stages of a GPU cluster, with the second one on the CPU."""
    sources = [hostile.root / name for name in ("astronaut.png", "group.jpg", "blank.png", "truncated.jpg")]
    done = run_batch(*sources, tmp_path / "out", "--gpus", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    got = pd.read_parquet(tmp_path / "out").drop(columns="id")
    expected = records[records["path"].isin(map(str, sources))].drop(columns="id")
    key = ["path", "face"]
    pd.testing.assert_frame_equal(
        got.sort_values(key).reset_index(drop=True), expected.sort_values(key).reset_index(drop=True), rtol=1e-5
    )


def test_gpus_that_are_not_there_are_missed_in_a_sentence(hostile: Hostile, tmp_path: Path) -> None:
    """Before anything is listed, so that the same call without them is no other run."""
    done = run_batch(hostile.root / "blank.png", tmp_path / "out", "--gpus", 99)
    assert done.returncode == 2
    assert done.stderr.count("\n") <= 2
    assert "--gpus 99 was asked for, but Ray finds" in done.stderr
    assert not (tmp_path / "out").exists()


def test_nobody_has_to_listen(hostile: Hostile, tmp_path: Path) -> None:
    """Standard error is closed, as by daemons, and standard output is after its first line."""
    call = [sys.executable, "-m", "batch", str(hostile.root / "blank.png"), str(tmp_path / "out")]
    shell = f"set -o pipefail; {shlex.join(call)} 2>&- </dev/null | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0
    assert done.stdout == f"Listing {hostile.root / 'blank.png'}\n"
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_files_are_sorted_compressed_and_say_where_they_come_from(hostile: Hostile, records: pd.DataFrame) -> None:
    (path,) = (hostile.root / "out").glob("*.parquet")
    file = pq.ParquetFile(path)
    assert file.schema_arrow.equals(FINAL_SCHEMA)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    rows = list(zip(records["id"], records["face"].fillna(-1), strict=True))
    assert rows == sorted(rows)
    metadata = file.schema_arrow.metadata
    assert json.loads(metadata[b"agegender.options"])["max_bytes"] == 1_000_000
    assert len(json.loads(metadata[b"agegender.model"])["sha256"]) == 64


def test_the_summary_counts_what_is_there(
    hostile: Hostile, scored: subprocess.CompletedProcess[str], records: pd.DataFrame
) -> None:
    out = hostile.root / "out"
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".parquet") == ["_SUCCESS", "_summary.json"]
    summary = json.loads((out / "_summary.json").read_text())
    assert summary["inputs"] == len(hostile.statuses)
    assert summary["faces"] == records["age"].notna().sum() == sum(summary["ages"].values())
    assert summary["statuses"] == pd.Series(hostile.statuses).value_counts().to_dict()
    assert summary["run"]["excluded"] == {
        "link to a directory": 1,
        "directory that was reached before, or the output itself": 1,
    }
    assert f"{len(hostile.statuses)} files" in scored.stdout
    assert str(out) in scored.stdout


def test_a_second_call_says_so_and_does_nothing(
    hostile: Hostile, scored: subprocess.CompletedProcess[str], tree: Callable[[Path], Any]
) -> None:
    before = tree(hostile.root / "out")
    again = run_batch(hostile.root, hostile.root / "out", "--max-bytes", 1_000_000)
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout
    assert tree(hostile.root / "out") == before


@pytest.fixture
def tree() -> Callable[[Path], Any]:
    """What lies below a directory: sizes and times of change."""

    def describe(root: Path) -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in root.rglob("*")}

    return describe


def test_append_adds_what_is_new(hostile: Hostile, scored: subprocess.CompletedProcess[str], blank_png: bytes) -> None:
    late = hostile.root / "late.png"
    late.write_bytes(blank_png)
    try:
        added = run_batch(hostile.root, hostile.root / "out", "--max-bytes", 1_000_000, "--append")
    finally:
        late.unlink()
    assert added.returncode == 0, added.stderr
    records = pd.read_parquet(hostile.root / "out")
    assert records["path"].nunique() == records["id"].nunique() == len(hostile.statuses) + 1
    assert records.loc[records["id"] == len(hostile.statuses), "path"].tolist() == [str(late)]


def test_inputs_of_many_shards_have_their_outcome_once(tmp_path: Path, blank_png: bytes) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_bytes(blank_png)
    small = "import sys, batch.listing, batch.__main__ as m; batch.listing._SHARD_INPUTS = 5; sys.exit(m.main())"
    call = [sys.executable, "-c", small, str(tmp_path / "*.png"), str(tmp_path / "out")]
    run = subprocess.run(call, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert run.returncode == 0, run.stderr
    records = pd.read_parquet(tmp_path / "out")
    assert records["id"].tolist() == list(range(12))
    assert sorted(Path(path).name for path in records["path"]) == [f"{number:02}.png" for number in range(12)]


def test_a_run_that_is_told_to_end_says_how_to_go_on(tmp_path: Path, group_jpeg: bytes) -> None:
    """In a directory whose name would mean something to Ray: a partition, a pattern, a parameter."""
    (tmp_path / "photos").mkdir()
    for number in range(300):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(group_jpeg)
    out = tmp_path / "block=7" / "*;a#b%20" / "out"
    arguments = [sys.executable, "-m", "batch", str(tmp_path / "photos"), str(out)]
    before = engine_folders()
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(out.glob("_run/*/checkpoint/*")):  # of a block, so that more are being scored
            assert process.poll() is None
            time.sleep(0.05)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGINT):  # as people do who are in haste
            process.send_signal(number)
            time.sleep(0.2)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert engine_folders() <= before
    done = run_batch(tmp_path / "photos", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Going on")
    assert pd.read_parquet(list(out.glob("*.parquet")))["path"].nunique() == 300


def test_a_run_whose_terminal_is_closed_tidies_up(tmp_path: Path, group_jpeg: bytes) -> None:
    """That tells all processes of it, those of Ray too."""
    (tmp_path / "photos").mkdir()
    for number in range(300):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(group_jpeg)
    out = tmp_path / "out"
    before = engine_folders()
    master, slave = os.openpty()
    ends, alive = os.pipe()
    shell = ["/bin/sh", "-c", '"$@"; true', "sh", sys.executable, "-m", "batch", str(tmp_path / "photos"), str(out)]
    with subprocess.Popen(
        shell,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        pass_fds=[alive],
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(slave)
        os.close(alive)
        while not list(out.glob("_run/*/checkpoint/*")):  # of a block, so that more are being scored
            assert process.poll() is None
            time.sleep(0.05)
        os.close(master)
        assert select.select([ends], [], [], 60)[0]  # until the shell and the job, which have its other end, are gone
    os.close(ends)
    assert engine_folders() <= before
    done = run_batch(tmp_path / "photos", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Going on")


def test_a_terminal_that_closes_is_no_interrupt_behind_nohup() -> None:
    code = (
        "import os, signal, sys\n"
        "import batch.__main__ as job\n"
        "job._run = lambda *_: os.kill(os.getpid(), signal.SIGHUP) or 0\n"
        "sys.exit(job.main(['photos', 'out']))\n"
    )
    call = [sys.executable, "-c", code]
    for before, expected in (([], (130, "\nbatch: interrupted\n")), (["nohup"], (0, ""))):
        done = subprocess.run([*before, *call], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr.replace("nohup: ignoring input\n", "")) == expected


def engine_folders() -> set[str]:
    """Where Ray keeps its sockets and logs: a private one, and one that began by itself."""
    return {path for pattern in ("agegender-ray-*", "ray/session_2*") for path in glob(f"{gettempdir()}/{pattern}")}


def test_a_model_that_does_not_run_is_told_of_in_a_sentence(model_path: Path, tmp_path: Path) -> None:
    """Its file is sound and its description fits, so that only those who load it find out."""
    spec, _ = read_artifact(model_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.script(Mean()), str(tmp_path / "mean.pt"), _extra_files={SPEC_FILE: spec.to_json()})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("a")
    done = run_batch(tmp_path / "photos", tmp_path / "out", "--model", tmp_path / "mean.pt")
    assert done.returncode == 1
    assert "does not run on cpu" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_device_without_processes_to_predict_there_is_refused(
    device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["gone", "out", "--device", device])
    assert "--device is for the processes of --gpus N" in capsys.readouterr().err


def test_a_dry_run_of_samples_that_are_not_there_says_so(tmp_path: Path) -> None:
    done = run_batch("--samples", tmp_path / "photos", tmp_path / "out", "--dry-run")
    assert done.returncode == 2
    assert "has no samples yet, and a dry run writes nothing" in done.stderr
    assert not list(tmp_path.iterdir())


@contextmanager
def aside(call: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive its test."""
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as started:
        try:
            yield started
        finally:
            started.kill()


def test_a_run_is_told_to_end_while_a_store_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
        call = [sys.executable, "-m", "batch", "s3://bucket/photos", str(tmp_path / "out")]
        environment = {**os.environ, **keys, "AWS_ENDPOINT_URL": address}
        with aside(call, env=environment) as started:
            silent.settimeout(60)
            with silent.accept()[0]:
                started.send_signal(signal.SIGTERM)
                _, told = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "batch: interrupted" in told


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_an_interrupt_that_python_drops_ends_the_run_all_the_same(name: str) -> None:
    """As one does that is raised inside a destructor; and a second one need not wait."""
    code = (
        "import os, signal, sys, time\n"
        "import batch.__main__ as job, batch.interrupts as limits\n"
        "class Drops:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.Signals[sys.argv[3]])\n"
        "def run(*_):\n"
        "    with limits.told_if_killed():\n"
        "        Drops()\n"
        "        print('goes on', flush=True)\n"
        "        time.sleep(60)\n"
        "job._run = run\n"
        "limits._ENDED_S, limits._IMPATIENT_S = map(float, sys.argv[1:3])\n"
        "sys.exit(job.main(['photos', 'out']))\n"
    )
    for limits, again in ((("1", "60"), False), (("60", "0"), True)):
        call = [sys.executable, "-c", code, *limits, name]
        with aside(call) as started:
            assert started.stdout is not None
            assert started.stdout.readline() == "goes on\n"
            if again:
                time.sleep(1)
                started.send_signal(signal.Signals[name])
            _, told = started.communicate(timeout=30)
        assert started.returncode == 130
        assert "batch: interrupted, and ended without tidying up; what is done stays done" in told
        assert "killed" not in told


def test_an_interrupt_inside_of_an_import_is_one() -> None:
    """A library in C makes an ImportError of it."""
    code = (
        "import os, signal, sys\n"
        "import batch.__main__ as job\n"
        "def run(*_):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt as interrupt: raise ImportError('initialization failed') from interrupt\n"
        "job._run = run\n"
        "sys.exit(job.main(['photos', 'out']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "\nbatch: interrupted\n")


@pytest.mark.parametrize(
    ("hook", "does"),
    [
        pytest.param(
            "_releaseLock",
            "os.fork() or os._exit(0)",
            marks=pytest.mark.skipif(not hasattr(logging, "_releaseLock"), reason="Python 3.13 has no such hook"),
        ),
        ("cb", "import this"),
    ],
)
def test_an_interrupt_inside_a_hook_comes_after_it(hook: str, does: str) -> None:
    """What is raised inside, Python drops; and that of a fork would keep the lock of `logging`."""
    code = (
        "import logging, os, signal, sys, threading, time\n"
        "import batch.__main__ as job\n"
        "def interrupt(frame, event, _):\n"
        "    if event == 'call' and frame.f_code.co_name == sys.argv[1]:\n"
        "        sys.setprofile(None)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "def run(*_):\n"
        "    os.register_at_fork(before=lambda: sys.setprofile(interrupt))\n"
        "    sys.setprofile(interrupt)\n"
        "    exec(sys.argv[2])\n"
        "    time.sleep(20)\n"
        "job._run = run\n"
        "code = job.main(['photos', 'out'])\n"
        "other = threading.Thread(target=logging.getLogger('other').warning, args=['free'], daemon=True)\n"
        "other.start(), other.join(5)\n"
        "os._exit(code)\n"
    )
    call = [sys.executable, "-c", code, hook, does]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "\nbatch: interrupted\nfree\n")


def test_a_python_without_docstrings_is_told_of(tmp_path: Path) -> None:
    done = run_batch(tmp_path, tmp_path / "out", PYTHONOPTIMIZE="2")
    assert done.returncode == 2
    assert done.stderr == "batch: Ray does not work without docstrings; unset PYTHONOPTIMIZE, or leave -OO out\n"


def test_little_is_imported_before_an_interrupt_is_heeded() -> None:
    """Or one would end in a traceback."""
    code = "import sys, batch.__main__; sys.exit(sorted({'tqdm', 'subprocess', 'pyarrow', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "[]"
