"""The client against a scripted HTTP server: what it repeats, what it does not, and what it says."""

import errno
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_ssl_devcert

from agegender import ImageResult, Item, Predictor, ServerError
from agegender.client import Client
from agegender.records import to_json

RESULT = ImageResult("", "no_face", None, 4, 3)
ANSWER = {**to_json(RESULT), "model": {"name": "m", "version": "1", "sha256": "0"}}
OLD_KEY = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}


@dataclass
class Script:
    """A server that gives the next of its answers to each request: status, JSON, headers; `close`, `break`, `silence`.

    An answer that is a function gives one, when the request has arrived.
    """

    answers: list[Any]
    requests: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    address: str = ""
    ended: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def scripted() -> Iterator[Callable[..., Script]]:
    servers: list[ThreadingHTTPServer] = []
    scripts: list[Script] = []

    def start(*answers: Any, tls: ssl.SSLContext | None = None) -> Script:
        script = Script(list(answers))
        scripts.append(script)
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(script))
        servers.append(server)
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        script.address = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        return script

    yield start
    for script in scripts:
        script.ended.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def _handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            script.requests.append((self.path, self.headers["Authorization"], body))
            script.connections.add(self.client_address)
            answer = script.answers.pop(0)
            answer = answer() if callable(answer) else answer
            if answer == "close":
                self.close_connection = True
                return
            if answer == "silence":
                script.ended.wait(timeout=60)
                self.close_connection = True
                return
            if answer == "break":
                self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"path"')
                self.close_connection = True
                return
            if isinstance(answer, bytes):
                self.wfile.write(answer)
                self.close_connection = True
                return
            status, document, *headers = answer
            text = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(script: Script, **options: Any) -> Client:
        clients.append(Client(script.address, **{"key": "k", "key_file": None, **options}))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_results_carry_the_paths_of_their_items_over_one_connection(scripted: Any, connect: Any) -> None:
    script = scripted((200, ANSWER), (200, ANSWER))
    client = connect(script)
    assert [result.path for result in client.predict([Item(b"1", "a"), b"2"])] == ["a", ""]
    assert [body for _, _, body in script.requests] == [b"1", b"2"]
    assert len(script.connections) == 1
    assert client.about["version"] == "1"


def test_an_error_on_the_way_loses_no_result_before_it(scripted: Any, connect: Any) -> None:
    results = connect(scripted((200, ANSWER), (500, {}))).stream([Item(b"1", "a"), b"2"])
    assert next(results).path == "a"
    with pytest.raises(ServerError, match="status 500"):
        next(results)


def test_a_with_statement_closes_the_connections(scripted: Any) -> None:
    script = scripted((200, ANSWER), (200, ANSWER))
    with Client(script.address, key="k") as client:
        client.predict([b"1"])
        assert len(client._pool.pools) == 1
    assert len(client._pool.pools) == 0


@pytest.mark.parametrize("items", [b"bytes of one image", memoryview(b"another"), "path.jpg", Item(b"x")])
@pytest.mark.parametrize("call", [Client.predict, Client.stream])
def test_a_single_item_is_no_list(items: Any, call: Any, scripted: Any, connect: Any) -> None:
    script = scripted()
    with pytest.raises(TypeError):
        call(connect(script), items)
    assert script.requests == []


def test_options_and_key_are_sent(scripted: Any, connect: Any) -> None:
    script = scripted((200, ANSWER))
    script.address += "/proxy/"
    connect(script, faces="whole", min_score=0.5, max_faces=7).predict([b"1"])
    path, key, _ = script.requests[0]
    assert path == "/proxy/models/agegender/invoke?faces=whole&min_score=0.5&max_faces=7"
    assert key == "Bearer k"


@pytest.mark.parametrize("failure", ["close", "break", (503, {"code": 503})], ids=["closed", "broken off", "busy"])
def test_what_was_not_answered_is_sent_again_as_a_whole(scripted: Any, connect: Any, failure: Any) -> None:
    script = scripted(failure, failure, (200, ANSWER))
    data = bytes(range(256)) * 4000  # of many blocks
    assert connect(script).predict([data]) == [RESULT]
    assert [body == data for _, _, body in script.requests] == [True] * 3


@pytest.mark.parametrize("retries", [0, 1])
def test_it_is_sent_again_as_often_as_was_asked_for(scripted: Any, connect: Any, retries: int) -> None:
    script = scripted(*["close"] * (retries + 1), (200, ANSWER))
    with pytest.raises(ServerError, match=r"does not answer \(the connection broke off\)"):
        connect(script, retries=retries).predict([b"1"])
    assert len(script.requests) == retries + 1


def test_what_speaks_another_protocol_is_told_of(scripted: Any, connect: Any) -> None:
    with pytest.raises(ServerError, match=r"does not answer \(what it says is no HTTP\)"):
        connect(scripted(b"SSH-2.0-OpenSSH\r\n"), retries=0).predict([b"1"])


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda data: memoryview(data).cast("I")])
def test_all_that_holds_bytes_is_sent(scripted: Any, connect: Any, kind: Any) -> None:
    script = scripted((200, ANSWER))
    assert connect(script).predict([kind(b"12345678")]) == [RESULT]
    assert script.requests[0][2] == b"12345678"


def test_the_connect_timeout_bounds_no_upload_that_goes_on(connect: Any) -> None:
    """The sockets' buffers hold a few of these 16 MB, and the others leave over more than the timeout."""
    size = 16_000_000
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        read = pool.submit(_read_slowly, server, bytes_per_s=5.5e6)
        client = connect(
            Script([], address=f"http://127.0.0.1:{server.getsockname()[1]}"), connect_timeout_s=1.5, retries=0
        )
        assert client.predict([bytes(size)]) == [RESULT]
        assert read.result() == size


def _read_slowly(server: socket.socket, *, bytes_per_s: float) -> int:
    """Answers one request; returns how long its body was."""
    connection, _ = server.accept()
    with connection, connection.makefile("rb") as file:
        head = b"".join(iter(file.readline, b"\r\n"))
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length
        left, started = int(length[1]), time.monotonic()
        while left and (part := file.read(min(left, 50_000))):
            left -= len(part)
            time.sleep(max(0, started + (int(length[1]) - left) / bytes_per_s - time.monotonic()))
        text = json.dumps(ANSWER).encode()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
        return int(length[1]) - left


def test_a_connection_is_given_up_after_its_own_timeout(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def wait(_: Any, timeout: float, **__: Any) -> Any:
        waited.append(timeout)
        raise TimeoutError

    monkeypatch.setattr("urllib3.util.connection.create_connection", wait)
    with pytest.raises(ServerError, match="does not answer"):
        connect(Script([], address="http://127.0.0.1:9"), connect_timeout_s=0.25, retries=0).predict([b"1"])
    assert waited == [0.25]


def test_an_image_and_its_key_go_to_no_other_address(scripted: Any, connect: Any) -> None:
    other = scripted((200, ANSWER))
    script = scripted((307, {}, ("Location", f"{other.address}/models/agegender/invoke")))
    with pytest.raises(ServerError, match="status 307"):
        connect(script, answer_timeout_s=5).predict([b"1"])
    assert (len(script.requests), other.requests) == (1, [])


def test_a_server_that_wants_to_be_asked_in_an_hour_is_not_waited_for(scripted: Any, connect: Any) -> None:
    later = ("Retry-After", "3600")
    script = scripted((503, {}, later), (200, ANSWER), (429, {}, later))
    client = connect(script)
    assert client.predict([b"1"]) == [RESULT]
    with pytest.raises(ServerError, match="status 429"):
        client.predict([b"1"])
    assert len(script.requests) == 3


def test_a_slow_answer_is_not_asked_for_again(scripted: Any, connect: Any) -> None:
    script = scripted("silence", (200, ANSWER))
    with pytest.raises(ServerError, match="no answer in time"):
        connect(script, answer_timeout_s=0.3).predict([b"1"])
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {"code": 500, "message": "Worker died."}), r"status 500: Worker died\."),
        ((400, {"error": {"code": "bad_option", "message": "option x"}}), "option x"),
        ((500, {"error": "model not found"}), "model not found"),
        ((500, {"error": None}), "status 500"),
        ((400, {"error": {"code": "not_image"}}), "status 400"),
        ((400, {"error": {"code": "not_image", "message": 5}}), "5"),
        ((400, OLD_KEY), "refuses the token"),
        ((404, b"<html>"), "status 404"),
        ((200, b"<html>"), "did not answer like an agegender server"),
        ((200, [1]), "did not answer like an agegender server"),
        ((200, b"[" * 100_000), "did not answer like an agegender server"),
        ((200, {**ANSWER, "model": None}), "did not answer like an agegender server"),
    ],
)
def test_other_failures_are_told_once(scripted: Any, connect: Any, answer: Any, message: str) -> None:
    script = scripted(answer)
    with pytest.raises(ServerError, match=message):
        connect(script).predict([b"1"])
    assert len(script.requests) == 1


def test_a_token_that_was_not_sent_is_told_of(scripted: Any, connect: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    script = scripted((400, OLD_KEY))
    with pytest.raises(ServerError, match="asks for a token"):
        connect(script, key=None).predict([b"1"])
    assert [key for _, key, _ in script.requests] == [None]


def test_an_old_key_is_read_anew_once(scripted: Any, connect: Any, tmp_path: Path) -> None:
    keys = tmp_path / "key_file.json"
    keys.write_text(json.dumps({"inference": {"key": "old"}}))
    script = scripted((200, ANSWER), (400, OLD_KEY), (200, ANSWER), (400, OLD_KEY))
    client = connect(script, key=None, key_file=keys)
    client.predict([b"1"])
    keys.write_text(json.dumps({"inference": {"key": "new"}}))
    assert client.predict([b"2"]) == [RESULT]
    assert [key for _, key, _ in script.requests] == ["Bearer old", "Bearer old", "Bearer new"]
    with pytest.raises(ServerError, match="refuses the token"):
        client.predict([b"3"])


def test_threads_that_were_refused_at_once_all_take_the_new_key(scripted: Any, connect: Any, tmp_path: Path) -> None:
    keys = tmp_path / "key_file.json"
    keys.write_text(json.dumps({"inference": {"key": "new"}}))
    both = threading.Barrier(2, timeout=10)

    def refuse_both() -> Any:
        both.wait()
        return 400, OLD_KEY

    script = scripted(refuse_both, refuse_both, (200, ANSWER), (200, ANSWER))
    client = connect(script, key="old", key_file=keys)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda data: client.predict([data]), [b"1", b"2"])) == [[RESULT], [RESULT]]


def test_a_key_may_come_with_its_line_end(scripted: Any, connect: Any, tmp_path: Path) -> None:
    script = scripted((200, ANSWER), (200, ANSWER))
    connect(script, key="k\n").predict([b"1"])
    (keys := tmp_path / "keys").write_text(json.dumps({"inference": {"key": "k\n"}}))
    connect(script, key=None, key_file=keys).predict([b"1"])
    assert [key for _, key, _ in script.requests] == ["Bearer k", "Bearer k"]


@pytest.mark.parametrize("key", ["ключ-geheim", "ab\ncd-geheim"])
@pytest.mark.parametrize("in_file", [False, True], ids=["given", "in the file"])
def test_a_key_that_is_none_is_refused_and_not_told(connect: Any, tmp_path: Path, key: str, in_file: bool) -> None:
    keys = tmp_path / "key_file.json"
    keys.write_text(json.dumps({"inference": {"key": key}}))
    given = {"key": None, "key_file": keys} if in_file else {"key": key}
    with pytest.raises(ServerError, match="characters that no token has") as caught:
        connect(Script([], address="http://127.0.0.1:9"), **given).predict([b"1"])
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file or directory"), ("no JSON", "it is no JSON"), ("{}", "it holds no inference key")],
)
def test_a_key_file_that_was_given_must_hold_a_key(
    connect: Any, tmp_path: Path, content: str | None, reason: str
) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_text(content)
    with pytest.raises(ServerError, match=f"cannot read {keys}: {reason}"):
        connect(Script([], address="http://127.0.0.1:9"), key=None, key_file=keys).predict([b"1"])


def test_the_key_file_here_is_for_this_machine_alone(
    scripted: Any, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key_file.json").write_text(json.dumps({"inference": {"key": "here"}}))
    script = scripted((200, ANSWER), (200, ANSWER))
    connect(script, key=None).predict([b"1"])
    script.address = script.address.replace("127.0.0.1", "localhost.localdomain.")
    monkeypatch.setattr("socket.getaddrinfo", _everything_is_here(script))
    connect(script, key=None).predict([b"1"])
    assert [key for _, key, _ in script.requests] == ["Bearer here", None]


def test_a_name_that_only_looks_like_this_machine_is_told_no_key(
    scripted: Any, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key_file.json").write_text(json.dumps({"inference": {"key": "here"}}))
    script = scripted((200, ANSWER))
    monkeypatch.setattr("socket.getaddrinfo", _everything_is_here(script))
    script.address = script.address.replace("127.0.0.1", "127.0.0.1.other.example")
    connect(script, key=None).predict([b"1"])
    assert [key for _, key, _ in script.requests] == [None]


def _everything_is_here(script: Script) -> Callable[..., Any]:
    """A name service that knows every name as the scripted server."""
    port = int(script.address.rpartition(":")[2])
    return lambda *_, **__: [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]


def test_an_image_that_fails_carries_its_error(scripted: Any, connect: Any) -> None:
    refused = {"error": {"code": "not_image", "message": "no image"}}
    failed = {"error": {"code": "failed", "message": "no memory"}}
    script = scripted((400, refused), (413, b""), (500, failed), (200, ANSWER))
    results = connect(script).predict([Item(b"1", "a"), Item(b"22", "b"), Item(b"3", "c"), Item(b"4", "d")])
    assert [(result.path, result.status) for result in results] == [
        ("a", "not_image"),
        ("b", "too_large"),
        ("c", "failed"),
        ("d", "no_face"),
    ]


@pytest.mark.parametrize("item", ["two.jpg", None, Item("two.jpg", "a")])
def test_what_is_no_bytes_fails_as_in_the_predictor(
    scripted: Any, connect: Any, predictor: Predictor, item: Any
) -> None:
    script = scripted()
    assert connect(script).predict([item]) == predictor.predict([item])
    assert script.requests == []


def test_the_size_of_an_image_that_is_too_large_is_told(scripted: Any, connect: Any) -> None:
    script = scripted((413, {"error": {"code": "too_large", "message": "m", "width": 9000, "height": 8000}}))
    assert connect(script).predict([Item(b"1", "a")]) == [ImageResult("a", "too_large", "m", 9000, 8000)]


def test_a_host_that_nobody_knows(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    with pytest.raises(ServerError, match="unknown host"):
        connect(Script([], address="http://no-such-host.invalid:8080"), retries=1).predict([b"1"])


def test_a_server_that_is_not_there(scripted: Any, connect: Any, unused_address: str) -> None:
    with pytest.raises(ServerError, match="connection refused"):
        connect(Script([], address=unused_address), retries=1).predict([b"1"])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH)), "network is unreachable"),
        (OSError("the name has no address"), "no connection"),
        (TimeoutError(), "no connection in time"),
    ],
)
def test_why_there_is_no_connection(connect: Any, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("urllib3.util.connection.create_connection", fail)
    with pytest.raises(ServerError, match=rf"does not answer \({reason}\); is it running\?$"):
        connect(Script([], address="http://127.0.0.1:9"), retries=0).predict([b"1"])


def test_a_certificate_is_refused_until_it_is_trusted_and_for_its_own_name_alone(
    scripted: Any, connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_ssl_devcert(str(tmp_path / "own"), host="localhost")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    script = scripted((200, ANSWER), tls=tls)
    by_number, script.address = script.address, script.address.replace("127.0.0.1", "localhost")
    refused = rf"^the certificate of {script.address} is not accepted \(self.signed certificate\); .* SSL_CERT_FILE$"
    with pytest.raises(ServerError, match=refused):
        connect(script, retries=0).predict([b"1"])
    assert script.requests == []
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert connect(script).predict([b"1"]) == [RESULT]
    script.address = by_number
    with pytest.raises(ServerError, match=r"is not accepted \(IP address mismatch, .*; check the address"):
        connect(script, retries=0).predict([b"1"])


def test_a_server_without_tls_is_told_of(connect: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        pool.submit(_answer_without_tls, server)
        address = f"https://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ServerError, match=rf"^{address} does not answer by TLS \([a-z ]+\); check the address$"):
            connect(Script([], address=address), retries=0).predict([b"1"])


def _answer_without_tls(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@pytest.fixture
def unused_address() -> str:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    "options",
    [
        {"faces": "all"},
        {"min_score": 7},
        {"max_faces": 0},
        {"max_faces": 2.5},
        {"retries": -1},
        {"answer_timeout_s": 0},
    ],
    ids=str,
)
def test_an_option_out_of_range(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options)) if "answer_timeout_s" not in options else "timeout"):
        Client(**options)


def test_an_address_without_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="must begin with http"):
        Client("localhost:8080")


@pytest.mark.parametrize(
    "address",
    ["http://", "http://:80", "http://h:99999", "http://h:abc", "http://exa mple", "http://h?x=1", "http://h#f"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no address of a server"):
        Client(address)


@pytest.mark.parametrize(
    "address",
    ["http://user:secret@h", "http://user:secret@h:abc", r"http://h\@127.0.0.1", "http://127.0.0.1@other.example"],
)
def test_a_password_in_an_address_is_refused_and_not_told(address: str) -> None:
    with pytest.raises(ValueError, match="may hold no user and password") as refused:
        Client(address)
    assert "secret" not in str(refused.value)
