"""What the README shows is run as it shows it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batch.samples import write_samples

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the repository after `make batch`."""
    write_samples(tmp_path / "examples" / "photos")
    (tmp_path / "model_store").mkdir()
    shutil.copy(ROOT / "model_store" / "agegender.pt", tmp_path / "model_store")
    return tmp_path


def run(call: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False)


def test_the_six_lines_of_python(checkout: Path) -> None:
    (code,) = blocks("python")
    done = run([sys.executable, "-c", code], checkout)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {"astronaut.png", "grace_hopper.jpg", "broken.jpg", "notes.txt"}
    assert lines["notes.txt"] == "not_image []"
    assert re.fullmatch(r"ok \[\(\d+, '(fe)?male'\)\]", lines["grace_hopper.jpg"])


def test_the_command_line_and_its_sample_output(checkout: Path) -> None:
    (call,) = (block for block in blocks("sh") if "-m agegender" in block)
    done = run(["bash", "-c", call.replace(".venv/bin/python", sys.executable)], checkout)
    (sample,) = blocks("text")[:1]
    assert done.returncode == 1  # one of the samples is broken
    assert done.stdout.splitlines() == [line for line in sample.splitlines() if not line.startswith("agegender:")]
    assert done.stderr.splitlines() == [line for line in sample.splitlines() if line.startswith("agegender:")]
    assert len(list((checkout / "examples" / "annotated").iterdir())) == 2


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
    names = [line.split()[0] for line in tree.splitlines()]
    core = [
        f"agegender/{name}" if line.startswith("  ") else name
        for line, name in zip(tree.splitlines(), names, strict=True)
    ]
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert [name for name in (*core, *links) if not (ROOT / name).exists()] == []
