"""The benchmarks: their figures on made-up answers, and the page of scripts that end well and badly."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import benchmarks.__main__ as bench
from benchmarks import accuracy, plots
from benchmarks.accuracy import Answers
from benchmarks.environment import make_environment
from training.data import Labels, Sample

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
    assert f"**Not measured**: it ended with 1: accuracy: no usable picture in {empty}" in page
    assert "python -m benchmarks.chain --workloads whole" in page
    assert "python -m benchmarks.accuracy --data-dir path/to/empty" in page
    assert "| whole | 1.0 |" in page
    assert (tmp_path / "figures" / "chain.svg").read_text().count("<svg") == 1
    sections = {path.stem for path in (tmp_path / "keep").glob("*.section")}
    assert sections == {"chain", "accuracy"}


@pytest.mark.usefixtures("small")
def test_names_that_are_no_benchmark_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--only", "chain,rate"])
    assert "there is no 'rate'; choose from chain, accuracy" in capsys.readouterr().err


def test_every_script_exists_and_knows_what_it_is_given(repository: Path) -> None:
    for name, script in bench.SCRIPTS.items():
        text = (repository / "benchmarks" / f"{name}.py").read_text()
        text += (repository / "benchmarks" / "outputs.py").read_text()
        text += (repository / "benchmarks" / "images.py").read_text()
        options = [option for option in script.quick if option.startswith("--")]
        wanted = [*options, *(f"--{each.replace('_', '-')}" for each in (*script.takes, "markdown", "json"))]
        assert [option for option in wanted if f'"{option}"' not in text] == []
    assert set(plots.PLOTS) <= set(bench.SCRIPTS)


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
