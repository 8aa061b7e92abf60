"""`python -m agegender` as people and programs call it: in a process of its own, by its output and exit code."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

from agegender import Client, ImageResult
from agegender.__main__ import main
from agegender.spec import SPEC_FILE


@pytest.fixture(autouse=True)
def freed_memory(monkeypatch):
    """`main` would change how this process, which runs other tests too, handles freed memory."""
    monkeypatch.setattr("agegender.__main__.keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def run(repository):
    """run(arguments...) -> the finished process; no call may end in a traceback or take over four minutes."""

    def run_(*arguments, **options):
        done = subprocess.run(
            [sys.executable, "-m", "agegender", *map(str, arguments)],
            **{"capture_output": True, "text": True, "timeout": 240, "cwd": repository, **options},
        )
        assert "Traceback" not in str(done.stderr)
        return done

    return run_


@pytest.fixture
def call(model_path, capsys):
    """call(arguments...) -> exit code, output and error lines: the same `main`, without a process of its own."""

    def call_(*arguments):
        try:
            code = main(["--model", str(model_path), "--device", "cpu", *map(str, arguments)])
        except SystemExit as exit_:
            code = exit_.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out.splitlines(), printed.err.splitlines()

    return call_


@pytest.fixture
def folder(tmp_path, astronaut, grace_hopper, blank_png):
    """Photos, one without a face, a text and a broken image."""
    (tmp_path / "astronaut.png").write_bytes(astronaut)
    (tmp_path / "hopper.jpg").write_bytes(grace_hopper)
    (tmp_path / "blank.png").write_bytes(blank_png)
    (tmp_path / "notes.txt").write_text("some notes")
    (tmp_path / "broken.jpg").write_bytes(grace_hopper[:9000])
    return tmp_path


# --- as a process ----------------------------------------------------------------------------------------------------


def test_a_table_for_people(run, folder):
    done = run(folder / "astronaut.png", folder / "blank.png", folder / "broken.jpg")
    assert done.returncode == 1
    heading, astronaut, blank = done.stdout.splitlines()
    assert heading.split()[:3] == ["photo", "face", "age"]
    assert astronaut.split()[0].endswith("astronaut.png")
    assert astronaut.split()[1] == "0"
    assert "no face" in blank
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"agegender: {folder / 'broken.jpg'}: damaged JPEG image: ")


def test_json_for_programs(run, folder):
    paths = [folder / "hopper.jpg", folder / "notes.txt", folder / "none.jpg", folder / "blank.png"]
    done = run("--json", *paths)
    assert done.returncode == 1
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in paths]
    assert [record["status"] for record in records] == ["ok", "not_image", "unreadable", "no_face"]
    assert [len(record["predictions"]) for record in records] == [1, 0, 0, 0]
    assert "No such file" in records[2]["error"]
    assert len(done.stderr.splitlines()) == 2


def test_a_closed_pipe_is_no_error(run, repository, folder):
    """As with `| head -1`: the reader leaves after the first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "agegender", "--json", *[str(folder / "blank.png")] * 50],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=repository,
    )
    assert json.loads(process.stdout.readline())["status"] == "no_face"
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(120) == 0


def test_a_missing_model(run, folder):
    done = run("--model", folder / "none.pt", folder / "hopper.jpg")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.endswith("none.pt: No such file or directory; give the path of one, or train one with `make train`")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text(run, tmp_path, blank_png):
    """Bytes that are no UTF-8, a line break and a terminal's escape code reach neither the table nor the terminal."""
    name = os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m.png"
    with open(name, "wb") as file:
        file.write(blank_png)
    done = run(os.fsdecode(name))
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[0].endswith(r"caf\udce9\n\x1b[31m.png")


# --- within this process ---------------------------------------------------------------------------------------------


def test_an_interrupt_while_the_model_loads(call, folder, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("agegender.Predictor", interrupt)
    assert call(folder / "hopper.jpg") == (130, [], [])


def test_help_tells_every_option(call):
    code, out, _ = call("--help")
    text = "\n".join(out)
    assert code == 0
    for option in ("PHOTO", "--json", "--draw", "--faces", "--min-score", "--max-faces", "--model", "--device", "Exit"):
        assert option in text


def test_exit_code_0_when_all_were_looked_at(call, folder):
    code, out, err = call(folder / "astronaut.png", folder / "blank.png", folder / "hopper.jpg")
    assert (code, len(out), err) == (0, 4, [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "not an image of a known format"),
        ("broken.jpg", "damaged JPEG image"),
        ("none.jpg", "cannot be read: No such file or directory"),
        (".", "cannot be read: it is a directory; give its files, or"),
        ("empty", "the file is empty"),
    ],
)
def test_exit_code_1_and_one_line_for_a_bad_photo(name, message, call, folder):
    (folder / "empty").touch()
    code, out, err = call(folder / name, folder / "blank.png")
    assert code == 1
    assert len(out) == 2, "the other photo is looked at all the same"
    assert len(err) == 1
    assert err[0].startswith(f"agegender: {folder / name}: ")
    assert message in err[0]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_photo_that_may_not_be_read(call, folder):
    (folder / "hopper.jpg").chmod(0)
    assert "Permission denied" in call(folder / "hopper.jpg")[2][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PHOTO"),
        (["--min-score", "2", "a.jpg"], "min_score must lie between 0 and 1, not 2.0"),
        (["--min-score", "high", "a.jpg"], "invalid float value"),
        (["--max-faces", "0", "a.jpg"], "max_faces must be a whole number of at least 1, not 0"),
        (["--faces", "some", "a.jpg"], "invalid choice"),
        (["--device", "gpu", "a.jpg"], "unknown device 'gpu'; take auto, cpu, cuda or cuda:N"),
        (["--model", ".", "a.jpg"], "cannot read the model"),
        (["--colour", "a.jpg"], "unrecognized arguments"),
        (["--key-file", "keys", "a.jpg"], "--key-file: not allowed without argument --server"),
    ],
)
def test_exit_code_2_for_a_wrong_call(arguments, message, call):
    code, out, err = call(*arguments)
    assert (code, out) == (2, [])
    assert message in err[-1]


def test_a_server_has_a_device_of_its_own(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--server", "http://127.0.0.1:9", "--device", "cpu", "a.jpg"])
    assert "--device: not allowed with argument --server" in capsys.readouterr().err


def test_whole_takes_each_photo_as_a_face(call, folder):
    code, out, _ = call("--faces", "whole", "--json", folder / "blank.png")
    record = json.loads(out[0])
    assert (code, record["faces"], record["predictions"][0]["score"]) == (0, 1, None)


# --- the heading of the intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("coverage", "heading"), [(0.9, "90% from"), (0.8, "80% from"), (0.925, "92.5% from")])
def test_the_heading_has_the_models_own_coverage(coverage, heading, call, folder, model_path, tmp_path):
    model = tmp_path / "model.pt"
    with zipfile.ZipFile(model_path) as source, zipfile.ZipFile(model, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith(f"extra/{SPEC_FILE}"):
                data = json.dumps({**json.loads(data), "coverage": coverage})
            target.writestr(name, data)
    _, (first, _), _ = call("--model", model, "--faces", "whole", folder / "blank.png")
    assert heading in first


@pytest.mark.parametrize(
    ("about", "heading"),
    [({"coverage": 0.8}, "80% from"), ({"name": "of an older server"}, "interval"), ({}, "interval")],
)
def test_the_heading_has_the_coverage_that_a_server_tells(about, heading, folder, monkeypatch, capsys):
    def predict(client, items):
        client.about = about
        return [ImageResult("", "no_face")]

    monkeypatch.setattr(Client, "predict", predict)
    assert main(["--server", "http://127.0.0.1:9", str(folder / "blank.png")]) == 0
    assert heading in capsys.readouterr().out.splitlines()[0]


# --- annotated copies ------------------------------------------------------------------------------------------------


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_draw_writes_copies_of_photos_with_faces(call, folder):
    target = folder / "new" / "directory"
    assert call("--draw", target, folder / "astronaut.png", folder / "blank.png", folder / "broken.jpg")[0] == 1
    assert [path.name for path in target.iterdir()] == ["astronaut-faces.png"]
    assert size_of(target / "astronaut-faces.png") == (512, 512)


def test_draw_leaves_the_photos_as_they_are(call, folder, astronaut):
    """Also into their own directory, where a.png lies beside a.jpg."""
    shutil.copy(folder / "hopper.jpg", folder / "astronaut.jpg")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert call("--draw", folder, folder / "astronaut.jpg", folder / "astronaut.png")[0] == 0
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(folder.iterdir())) == len(before) + 2


def test_a_link_that_leads_to_itself_is_one_photo_that_cannot_be_read(call, folder):
    (folder / "loop.jpg").symlink_to("loop.jpg")
    code, out, err = call(folder / "loop.jpg", folder / "blank.png")
    assert (code, len(out), len(err)) == (1, 2, 1)
    assert "cannot be read" in err[0]


def test_draw_takes_no_photos_place(call, folder, grace_hopper):
    (folder / "astronaut-faces.png").write_bytes(grace_hopper)
    assert call("--draw", folder, folder / "astronaut.png", folder / "astronaut-faces.png")[0] == 0
    assert (folder / "astronaut-faces.png").read_bytes() == grace_hopper
    assert size_of(folder / "astronaut-faces-2.png") == (512, 512)


def test_names_are_told_in_any_encoding(folder, model_path, monkeypatch):
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, "ascii"))
    photo = (folder / "blank.png").rename(folder / "\u00e9.png")
    assert main(["--model", str(model_path), str(photo)]) == 0
    sys.stdout.flush()
    assert b"\\xe9.png" in told.getvalue()


def test_draw_keeps_photos_of_one_name_apart(call, folder, tmp_path_factory, grace_hopper):
    other = tmp_path_factory.mktemp("other")
    (other / "astronaut.png").write_bytes(grace_hopper)
    (other / "astronaut.jpg").write_bytes(grace_hopper)
    target = other / "drawn"
    photos = [folder / "astronaut.png", other / "astronaut.png", other / "astronaut.jpg"]
    for _ in range(2):  # a second run writes the same files anew
        assert call("--draw", target, *photos)[0] == 0
        sizes = {path.name: size_of(path) for path in target.iterdir()}
        assert sizes == {
            "astronaut-faces.png": (512, 512),
            "astronaut-faces-2.png": (512, 600),
            "astronaut-faces-3.png": (512, 600),
        }


def test_draw_where_nothing_can_be_written(call, folder):
    code, _, err = call("--draw", folder / "notes.txt", folder / "astronaut.png")
    assert code == 2
    assert err == [f"agegender: {folder / 'notes.txt'} is a file; give --draw a directory"]
    (folder / "drawn" / "astronaut-faces.png").mkdir(parents=True)
    code, out, err = call("--draw", folder / "drawn", folder / "astronaut.png", folder / "blank.png")
    assert (code, len(out), len(err)) == (1, 3, 1)
    assert "no annotated copy: " in err[0]


def test_where_nothing_could_be_looked_at_there_is_no_table(call, folder):
    assert call(folder)[:2] == (1, [])


def test_names_are_whole_where_a_program_reads(call, folder):
    photo = folder / f"{'long' * 20}.png"
    photo.write_bytes((folder / "astronaut.png").read_bytes())
    code, out, _ = call(photo)
    assert (code, out[1].split()[0]) == (0, str(photo))


def test_an_address_is_told_not_to_be_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["https://example.org/photo.jpg"]) == 1
    assert "no photo is fetched from an address; download it first" in capsys.readouterr().err
