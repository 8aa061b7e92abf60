"""What the README and the guides show is run, or looked up, as they show it."""

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import tyro

from agegender.records import FIELDS
from batch.publish import FINAL_SCHEMA
from batch.samples import write_samples
from handler.server import Server
from tests.serving import copy_settings
from training.evaluate import EvaluateOptions
from training.options import TrainOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PROGRAMS = ("agegender", "batch", "handler", "training")
NOT_OURS = (".git", ".venv", "config.properties", "examples", "key_file.json", "logs", "model_store", "out", "runs")

# Each block of commands is run by a test below, or there is a reason.
RUN = ("-m agegender examples", "make batch SRC=", "make app", "make serve")
NOT_RUN = {
    "make batch   #": "`.ci/run` runs it and `make test` from a clean clone",
    "make setup CPU=": "the index of CPU wheels is not to be reached from everywhere; its call is looked at",
    "make train": "it takes an hour; tests/test_training.py trains on a few faces, and its call is looked at",
    "make bench": "it takes an hour; tests/test_benchmarks.py runs the program on little",
    "make check": "`.ci/run` runs it and `make test`",
}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def block_with(part: str) -> str:
    (block,) = (block for block in blocks("sh") if part in block)
    return block


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository after `make batch`, with links to its files and an output of its own."""
    for path in ROOT.iterdir():
        if path.name not in NOT_OURS:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    write_samples(tmp_path / "examples" / "photos")
    (tmp_path / "model_store").mkdir()
    shutil.copy(ROOT / "model_store" / "agegender.pt", tmp_path / "model_store")
    return tmp_path


def run(call: list[str], folder: Path, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        call, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False
    )


def environment() -> dict[str, str]:
    """This process's, without what a `make test` that it runs in tells the makes below it."""
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return {**own, "PYTHONPATH": str(ROOT)}


def script(block: str) -> str:
    """A block's commands, for the environment that the tests run in: nothing is installed."""
    return block.replace("make ", "make -o .venv/.ready ")


def test_each_block_of_commands_is_run_or_has_a_reason() -> None:
    for block in (*blocks("sh"), *blocks("sh", CONTRIBUTING)):
        assert sum(part in block for part in (*RUN, *NOT_RUN)) == 1, block
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(f"\nmake {target}\n" in ci for target in ("check", "batch", "test"))


_NUMBER = r"\d+(?:\.\d+)?"


def test_the_six_lines_of_python(checkout: Path) -> None:
    (code,) = blocks("python")
    done = run([sys.executable, "-c", code], checkout)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {"astronaut.png", "grace_hopper.jpg", "broken.jpg", "notes.txt"}
    assert lines["notes.txt"] == "not_image []"
    assert re.fullmatch(r"ok \[\(\d+, '(fe)?male'\)\]", lines["grace_hopper.jpg"])


def test_the_object_of_a_photo_has_the_fields_of_a_record() -> None:
    (sample,) = (block for block in blocks("text") if block.startswith("{"))
    photo = json.loads(sample)
    assert [*photo, *photo["predictions"][0]] == [*_names(of_image=True), "predictions", *_names(of_image=False)]


def _names(*, of_image: bool) -> list[str]:
    return [field.name for field in FIELDS if bool(field.of_image) == of_image]


def test_the_table_of_columns_is_the_schema() -> None:
    page = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[`\w, ]+`) \| (\w+) \| .* \| .* \|$", page, re.MULTILINE)
    columns = [(name, type_) for names, type_ in rows for name in re.findall(r"\w+", names)]
    assert columns == [(field.name, "float32" if field.type == "float" else str(field.type)) for field in FINAL_SCHEMA]


def test_the_command_line_and_its_sample_output(checkout: Path) -> None:
    done = run(["bash", "-c", block_with("-m agegender examples")], checkout)
    (sample,) = blocks("text")[:1]
    assert done.returncode == 1  # one of the samples is broken
    table = [line for line in sample.splitlines() if not line.startswith("agegender:")]
    assert re.sub(_NUMBER, "0", done.stdout) == re.sub(_NUMBER, "0", "\n".join(table) + "\n")
    printed, shown = (list(map(float, re.findall(_NUMBER, text))) for text in (done.stdout, "\n".join(table)))
    assert printed == pytest.approx(shown, abs=2)  # CPUs with VNNI round 8 bits at other places than those without
    assert done.stderr.splitlines() == [line for line in sample.splitlines() if line.startswith("agegender:")]
    assert len(list((checkout / "examples" / "annotated").iterdir())) == 2


def test_whole_directories(checkout: Path) -> None:
    done = run(["bash", "-ec", script(block_with("make batch SRC="))], checkout, timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert (checkout / "examples" / "scores" / "_SUCCESS").exists()


def test_serving(checkout: Path) -> None:
    settings = copy_settings(ROOT / "config.properties", checkout)
    server = Server(settings, checkout)
    block = block_with("make serve").replace("http://127.0.0.1:8080", server.settings["inference_address"])
    try:
        done = run(["bash", "-ec", script(block)], checkout, timeout_s=400)
    finally:
        server.stop(drain_s=0)
    assert done.returncode == 0, done.stderr
    alone = run([sys.executable, "-m", "agegender", "examples/photos/astronaut.png"], checkout)
    assert (alone.returncode, len(alone.stdout.splitlines())) == (0, 2), alone.stderr
    assert alone.stdout in done.stdout


def test_the_app_opens(checkout: Path) -> None:
    pytest.importorskip("streamlit", reason="the app needs Python 3.11 or newer")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    headless = f'make app ARGS="--server.headless true --server.port {port}"'
    call = ["bash", "-ec", script(block_with("make app").replace("make app", headless))]
    app = subprocess.Popen(call, cwd=checkout, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        assert answers(f"http://127.0.0.1:{port}/_stcore/health", app) == "ok"
    finally:
        os.killpg(app.pid, signal.SIGTERM)
        app.wait(30)


def answers(address: str, process: "subprocess.Popen[bytes]", timeout_s: float = 120) -> str:
    """What an address says once it does."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(address, timeout=10) as response:
                return str(response.read().decode())
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"{address} does not answer")


def test_training_takes_the_options_that_are_shown() -> None:
    block = block_with("make train")
    (options,) = re.findall(r'ARGS="(.*)"', block)
    assert tyro.cli(TrainOptions, args=["--data-dir", "DIR", *options.split()]).out_dir == Path("runs/mine")
    (model,) = re.findall(r"MODEL=(\S+)", block)
    assert tyro.cli(EvaluateOptions, args=["--data-dir", "DIR", "--model", model]).model.parent == Path("runs/mine")


def test_setup_without_cuda_leaves_out_what_it_says(made: Path) -> None:
    done = run(["make", "-n", "setup", "CPU=1"], made)
    (grep,) = re.findall(r"grep -vE '(.*)'", done.stdout)
    names = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    left_out = [name for name in names if re.match(grep, name)]
    assert any(name.startswith("nvidia-") for name in left_out)
    assert "torch" not in left_out
    assert "-r .venv/requirements.txt" in done.stdout


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment that is set up, whose Python prints what it is given."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", "pyproject.toml", ".venv/.ready"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "examples" / "photos").mkdir(parents=True)
    program(tmp_path / ".venv" / "bin" / "python", """printf '%s\\n' "$@\"""")
    return tmp_path


def program(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


HOSTILE = """a  b"c'd$HOME$$`touch run`$(touch run)$(shell touch run)*?[a]#~;&|><\\ü"""


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("batch", "SRC OUT FACES MODEL"),
        ("report", "OUT"),
        ("train", "DATA"),
        ("evaluate", "DATA MODEL"),
        ("bench", "DATA"),
    ],
)
def test_make_hands_on_names_as_they_are(made: Path, target: str, names: str) -> None:
    given = {name: f"{name}{HOSTILE}" for name in names.split()}
    told = subprocess.run(["make", target], cwd=made, env={**environment(), **given}, capture_output=True, text=True)
    named = run(["make", target, *(f"{name}={value}" for name, value in given.items())], made)
    assert named.stdout == told.stdout, named.stderr
    assert set(given.values()) <= set(named.stdout.splitlines())
    assert not (made / "run").exists()


def test_what_is_shown_by_default_is_the_last_output(made: Path) -> None:
    assert run(["make", "report"], made).stdout.splitlines()[-1] == "examples/out"
    (made / "out").mkdir()
    assert run(["make", "report"], made).stdout.splitlines()[-1] == "examples/out"
    (made / "out" / "_SUCCESS").touch()
    assert run(["make", "report"], made).stdout.splitlines()[-1] == "out"
    (made / "model_store").mkdir()
    (made / "model_store" / "agegender.pt").touch()
    assert run(["make", "app"], made).stdout.splitlines()[-1] == "out"


def test_the_app_does_not_start_without_its_model(made: Path) -> None:
    done = run(["make", "app", "MODEL=absent.pt"], made)
    assert (done.returncode, done.stdout) == (2, "")
    assert "make app: there is no model absent.pt; train one with `make train`" in done.stderr


@pytest.mark.parametrize(("setting", "asked"), [("CPU=1", True), ("CPU=0", False), ("CPU=no", False), ("CPU=", False)])
def test_cpu_is_asked_for_or_not(made: Path, setting: str, asked: bool) -> None:
    (made / ".venv" / "requirements.txt").touch()  # as after CPU=1
    (made / ".venv" / ".ready").unlink()
    assert ("grep -vE" in run(["make", "-n", "setup", setting], made).stdout) == asked


def test_the_environment_is_made_once_and_its_python_stays(made: Path) -> None:
    shutil.rmtree(made / ".venv")
    (made / "elsewhere").mkdir()
    (made / ".venv").symlink_to("elsewhere")
    noted = 'echo "$0 $*" >> calls'
    without_pip = (
        noted,
        'test "$2" != pip || exit 1',
        'test "$2" != venv || { mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; }',
    )
    program(made / "bin" / "chosen", *without_pip)

    def calls(*arguments: str) -> tuple[int, list[str]]:
        (made / "calls").unlink(missing_ok=True)
        (made / ".venv" / ".ready").unlink(missing_ok=True)
        done = run(["make", "setup", *arguments], made)
        return done.returncode, [line for line in (made / "calls").read_text().splitlines() if "venv " in line]

    folder = (made / "elsewhere").resolve()
    assert calls("PYTHON=bin/chosen") == (2, [f"bin/chosen -m venv {folder}"])  # and is interrupted
    program(made / ".venv" / "bin" / "python", *without_pip[:2])
    assert calls() == (2, [f".venv/bin/python -m venv {folder}"])
    program(made / ".venv" / "bin" / "python", noted, "echo /bin/java")
    assert calls() == (0, [])
    assert calls("PYTHON=bin/chosen") == (0, [])


def test_what_is_installed_is_told_by_content_not_by_time(made: Path) -> None:
    program(made / ".venv" / "bin" / "python", "echo /bin/java")
    (made / "requirements.txt").touch()
    assert "pip install" not in run(["make", "-n", "setup"], made).stdout
    (made / "requirements.txt").write_text("numpy==1.0\n")
    assert "pip install" in run(["make", "-n", "setup"], made).stdout
    assert run(["make", "setup"], made).returncode == 0
    assert "pip install" not in run(["make", "-n", "setup"], made).stdout


def test_stop_installs_nothing(made: Path) -> None:
    """Neither under the server that runs, nor before one can be stopped."""
    (made / "requirements.txt").write_text("numpy==1.0\n")  # as `git pull` brings it
    assert run(["make", "stop", "ARGS=--help"], made).stdout.splitlines() == ["-m", "handler", "stop", "--help"]
    program(made / ".venv" / "bin" / "python", "exit 3")
    assert run(["make", "stop"], made).returncode == 2  # make's own, of any failure
    shutil.rmtree(made / ".venv")
    done = run(["make", "stop"], made)
    assert done.returncode == 2
    assert "there is no .venv/bin/python; if a server runs, call `make setup` first" in done.stderr
    assert not (made / ".venv").exists()


@pytest.mark.parametrize("call", [line for block in blocks("sh") for line in block.splitlines() if line[:5] == "make "])
def test_make_knows_each_target(call: str) -> None:
    arguments = call.split("#")[0].replace("path/to/UTKFace", str(ROOT / "tests")).strip()
    done = run(["bash", "-c", f"{arguments} --dry-run"], ROOT)
    assert done.returncode == 0, done.stderr


def test_help_lists_every_target() -> None:
    text = run(["make", "help"], ROOT).stdout
    named = set(re.findall(r"^  make (\S+)", text, re.MULTILINE))
    declared = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    assert named == set(declared)


def test_every_file_that_the_readme_names_exists() -> None:
    (tree,) = (block for block in blocks("text") if "the core: data" in block)
    names, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else name
        names.append(f"{folder}{name}" if line.startswith("  ") else name)
    assert [name for name in names if not (ROOT / name).exists()] == []


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in set(headings(target)), f"{page.name}: {link}#{anchor}"


def headings(page: Path) -> Iterator[str]:
    """Anchors of a page, as forges make them."""
    for title in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def test_troubleshooting_quotes_messages_that_are_printed() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [message for block in blocks("text", page) for message in block.splitlines()]
    pips = [message for message in quoted if message.startswith("ERROR: ")]
    known = [re.compile(template) for template in templates()]
    for message in (message.strip() for message in quoted if message not in pips):
        plain = re.sub(r"[<>]", "", message)
        assert any(template.fullmatch(plain) for template in known), f"nothing prints {message!r}"
    assert len(quoted) >= 10


def templates() -> Iterator[str]:
    """Every text of the programs, as an expression in which values match anything in a line."""
    for path in (path for program in PROGRAMS for path in (ROOT / program).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [str(part.value) if isinstance(part, ast.Constant) else "" for part in parts]
            if len("".join(texts)) > 12:
                yield "".join(re.escape(text) if text else ".*" for text in texts)
    yield from map(re.escape, re.findall(r'and "(.*?)"\)', (ROOT / "Makefile").read_text()))


def test_each_dependency_has_its_line_and_its_licence() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    declared = set(re.findall(r'^  "([\w-]+)(?:\[\w+\])?[=>]', project, re.MULTILINE))
    reasons = (ROOT / "docs" / "decisions" / "dependencies.md").read_text()
    assert declared == set(re.findall(r"^\| ([\w-]+) \| .+ \|$", reasons, re.MULTILINE)) - {"package"}
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    licences = dict(
        re.findall(r"^\| ([\w.-]+) \| [^|]+ \| (.+) \|$", (ROOT / "docs" / "licences.md").read_text(), re.M)
    )
    assert locked == set(licences) - {"package"}
    assert not {name for name, licence in licences.items() if licence.lower() == "unknown"}


def test_licences_that_are_not_looked_up_here_are_kept(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "licences.py", tmp_path / "docs")
    (tmp_path / "requirements.txt").write_text("absent==1.0\nchanged==2.0\nnumpy==0\n")
    page = tmp_path / "docs" / "licences.md"
    page.write_text("| absent | 1.0 | MIT |\n| changed | 1.0 | MIT |\n| numpy | 0 | MIT |\n")
    assert run([sys.executable, "docs/licences.py"], tmp_path).returncode == 0
    rows = [line.split(" | ") for line in page.read_text().splitlines()[-3:]]
    assert rows[0] == ["| absent", "1.0", "MIT |"]
    assert rows[1] == ["| changed", "2.0", "not installed here: for other platforms or Pythons |"]
    assert rows[2][1] != "0"
