"""What docs/operations.md shows, run as it shows it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import urllib3

from agegender import Predictor
from agegender.records import from_json
from handler.server import Server


@pytest.fixture(scope="module")
def guide(repository: Path) -> str:
    return (repository / "docs" / "operations.md").read_text()


def block(guide: str, language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


@pytest.fixture
def proxy(guide: str, server: Server, tmp_path: Path) -> Iterator[str]:
    """nginx with the guide's configuration, on a port and with a certificate of its own; its address."""
    if not (shutil.which("nginx") and shutil.which("openssl")):
        pytest.skip("nginx or openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    call = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*call, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    site = block(guide, "nginx")
    for shown, own in (
        ("127.0.0.1:8080", server.settings["inference_address"].removeprefix("http://")),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/faces.example.org.pem", str(certificate)),
        ("/etc/ssl/private/faces.example.org.key", str(key)),
    ):
        assert shown in site
        site = site.replace(shown, own)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};\n" for kind in kinds)
    user = "user root;" if os.geteuid() == 0 else ""  # the test's folder is open to its owner alone
    settings = f"daemon off; {user} pid {tmp_path}/pid; events {{}}\nhttp {{ access_log off; {folders}{site}\n}}"
    (tmp_path / "nginx.conf").write_text(settings)
    process = subprocess.Popen(["nginx", "-p", tmp_path, "-e", tmp_path / "log", "-c", tmp_path / "nginx.conf"])
    try:
        _wait_for(lambda: socket.create_connection(("127.0.0.1", port)).close(), tmp_path / "log")
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(attempt: Callable[[], None], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return attempt()
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def test_the_proxy_passes_predictions_with_their_options_and_nothing_else(
    proxy: str, server: Server, model_path: Path, group_jpeg: bytes
) -> None:
    http = urllib3.PoolManager(maxsize=32, cert_reqs="CERT_NONE", assert_hostname=False, retries=False)
    urllib3.disable_warnings()
    headers = {"Authorization": f"Bearer {server.key('inference')}"}
    one = Predictor(model_path, max_faces=1, device="cpu").predict([group_jpeg])[0]
    for path in ("/predictions/agegender", "/models/agegender/invoke", "/v1/models/agegender:predict"):
        response = http.request("POST", f"{proxy}{path}?max_faces=1", body=group_jpeg, headers=headers)
        assert response.status == 200
        assert [face.age for face in from_json(json.loads(response.data)).faces] == pytest.approx([one.faces[0].age])
    assert http.request("POST", f"{proxy}/predictions/agegender", body=group_jpeg).status == 400
    assert http.request("POST", f"{proxy}/predictions/agegender", body=bytes(25 * 2**20), headers=headers).status == 413
    web_form = {**headers, "Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
    assert http.request("POST", f"{proxy}/predictions/agegender", body=b"a=1", headers=web_form).status == 415
    for path in ("/models", "/ping", "/metrics", "/", "/api-description", "/predictions/other"):
        assert http.request("GET", proxy + path, headers=headers).status == 404
    with ThreadPoolExecutor(32) as pool:
        url = f"{proxy}/predictions/agegender"
        burst = pool.map(lambda _: http.request("POST", url, body=group_jpeg, headers=headers).status, range(64))
        assert 429 in set(burst)


def test_both_keys_are_renewed_as_the_guide_shows(guide: str, server: Server) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    names = ("inference", "management")
    old = {server.key(name) for name in names}
    renewal = block(guide[guide.index("\n## Tokens") :], "sh")
    assert "http://127.0.0.1:8081" in renewal
    program = renewal.replace("http://127.0.0.1:8081", server.address("management"))
    subprocess.run(["sh", "-ec", program], env={**os.environ, "API_KEY": server.key("API")}, check=True)
    assert old.isdisjoint({server.key(name) for name in names})
    assert server.ready()
    assert server.live()


@pytest.mark.slow
def test_run_serves_until_it_is_told_to_stop(
    new_server: Callable[[], Server], repository: Path, group_jpeg: bytes
) -> None:
    server = new_server()
    command = [sys.executable, "-m", "handler", "run", "--config", str(server.config), "--timeout", "300"]
    # The environment may name other settings, which TorchServe would take.
    environment = {**os.environ, "PYTHONPATH": str(repository), "TS_CONFIG_FILE": "other.properties"}
    process = subprocess.Popen(command, cwd=server.directory, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert "READY" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    assert server.process() is None


@pytest.mark.slow
def test_run_ends_with_an_error_where_the_server_does(new_server: Callable[[], Server], repository: Path) -> None:
    server = new_server()
    command = [sys.executable, "-m", "handler", "run", "--config", str(server.config), "--timeout", "300"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.Popen(command, cwd=server.directory, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    java = server.process()
    assert java
    java.kill()
    assert process.wait(timeout=60) == 2
    process.stdout.close()


def test_the_unit_is_one_that_systemd_takes(guide: str, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "agegender.service"
    text = block(guide, "ini").replace("/opt/agegender/.venv/bin/python", sys.executable)
    unit.write_text(text.replace("WorkingDirectory=/opt/agegender", "WorkingDirectory=/"))
    output = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert "agegender.service" not in output.stderr, output.stderr
