"""The handler under a real TorchServe: every way in gives the predictor's numbers, and nothing gets past its guards."""

import importlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3
from PIL import Image

from agegender import ImageResult, Item, Predictor
from agegender.__main__ import main
from agegender.client import Client
from agegender.records import from_json
from handler.server import KEY_FILE, Server, ServingError
from handler.stubs import build_stubs
from tests.hostile import PREDICTIONS, Ask, assert_survives, hostile_requests, kserve

KSERVE = "/v1/models/agegender:predict"
INVOKE = "/models/agegender/invoke"
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def http() -> urllib3.PoolManager:
    return urllib3.PoolManager(retries=False, timeout=60)


@pytest.fixture
def grpc(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The gRPC API as its stubs give it, its requests, and the token that it asks for."""
    monkeypatch.syspath_prepend(str(build_stubs(tmp_path)))
    library, messages, services = map(importlib.import_module, ("grpc", "inference_pb2", "inference_pb2_grpc"))
    with library.insecure_channel(f"127.0.0.1:{server.settings['grpc_inference_port']}") as channel:
        yield SimpleNamespace(
            api=services.InferenceAPIsServiceStub(channel),
            request=lambda image: messages.PredictionsRequest(model_name="agegender", input={"data": image}),
            call={"metadata": (("authorization", f"Bearer {server.key('inference')}"),), "timeout": 60},
            library=library,
        )


def assert_same(actual: ImageResult, expected: ImageResult) -> None:
    """To 1e-5, as workers may be other processes on other processors."""
    assert (actual.status, actual.width, actual.height) == (expected.status, expected.width, expected.height)
    assert [face.gender for face in actual.faces] == [face.gender for face in expected.faces]
    assert _numbers(actual) == pytest.approx(_numbers(expected), rel=1e-5, abs=1e-5)


def _numbers(result: ImageResult) -> list[float]:
    return [
        number
        for face in result.faces
        for number in (*face.box, face.score or 0, face.age, face.age_low, face.age_high, face.gender_probability)
    ]


class TestParity:
    def test_raw_body(self, ask: Ask, predictor: Predictor, group_jpeg: bytes, blank_png: bytes) -> None:
        for image in (group_jpeg, blank_png):
            status, answer = ask(PREDICTIONS, body=image)
            assert status == 200
            assert_same(from_json(answer), predictor.predict([image])[0])

    def test_model_is_named(self, ask: Ask, predictor: Predictor, group_jpeg: bytes) -> None:
        model = ask(PREDICTIONS, body=group_jpeg)[1]["model"]
        assert model == predictor.model.spec.identity(predictor.model.sha256)

    def test_form_of_several_images(
        self, ask: Ask, predictor: Predictor, group_jpeg: bytes, grace_hopper: bytes
    ) -> None:
        fields = {"group": ("a.jpg", group_jpeg, "image/jpeg"), "grace": ("b.jpg", grace_hopper)}
        status, answers = ask(PREDICTIONS, fields=fields)
        assert status == 200
        assert [answer["path"] for answer in answers] == ["group", "grace"]
        for answer, expected in zip(answers, predictor.predict([group_jpeg, grace_hopper]), strict=True):
            assert_same(from_json(answer), expected)

    def test_form_with_options(self, ask: Ask, model_path: Path, group_jpeg: bytes) -> None:
        whole = Predictor(model_path, faces="whole", device="cpu").predict([group_jpeg])[0]
        status, answer = ask(PREDICTIONS, fields={"photo": ("a.jpg", group_jpeg), "faces": "whole"})
        assert status == 200
        assert_same(from_json(answer), whole)

    @pytest.mark.parametrize("path", [PREDICTIONS, KSERVE])
    def test_kserve(self, ask: Ask, predictor: Predictor, group_jpeg: bytes, astronaut: bytes, path: str) -> None:
        status, answer = ask(path, json=kserve(group_jpeg, astronaut))
        assert status == 200
        assert list(answer) == ["predictions"]
        for record, expected in zip(answer["predictions"], predictor.predict([group_jpeg, astronaut]), strict=True):
            assert_same(from_json(record), expected)

    def test_query_options(self, ask: Ask, model_path: Path, group_jpeg: bytes) -> None:
        one = Predictor(model_path, max_faces=1, min_score=0.8, device="cpu").predict([group_jpeg])[0]
        status, answer = ask(f"{INVOKE}?max_faces=1&min_score=0.8", body=group_jpeg)
        assert status == 200
        assert_same(from_json(answer), one)

    def test_client(self, server: Server, predictor: Predictor, group_jpeg: bytes, blank_png: bytes) -> None:
        client = Client(server.settings["inference_address"], key_file=server.directory / KEY_FILE)
        items = [Item(group_jpeg, "a"), Item(b"no image", "b"), Item(blank_png, "c")]
        for actual, expected in zip(client.predict(items), predictor.predict(items), strict=True):
            assert actual.path == expected.path
            assert_same(actual, expected)
        assert client.about["sha256"] == predictor.model.sha256
        client.close()

    def test_command_line(
        self,
        server: Server,
        predictor: Predictor,
        grace_hopper_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = ["--server", server.settings["inference_address"], "--key-file", str(server.directory / KEY_FILE)]
        assert main([str(grace_hopper_path), "--json", *options]) == 0
        actual = from_json(json.loads(capsys.readouterr().out))
        assert_same(actual, predictor.predict([grace_hopper_path.read_bytes()])[0])

    def test_grpc(self, grpc: SimpleNamespace, predictor: Predictor, group_jpeg: bytes) -> None:
        request = grpc.request(group_jpeg)
        answer = grpc.api.Predictions(request, **grpc.call)
        assert_same(from_json(json.loads(answer.prediction)), predictor.predict([group_jpeg])[0])
        with pytest.raises(grpc.library.RpcError) as refused:
            grpc.api.Predictions(request, timeout=60)
        assert refused.value.code() == grpc.library.StatusCode.PERMISSION_DENIED

    def test_a_stream_of_grpc_has_one_answer(
        self, grpc: SimpleNamespace, server: Server, predictor: Predictor, group_jpeg: bytes
    ) -> None:
        workers = server.process().children(recursive=True)
        (answer,) = grpc.api.StreamPredictions(grpc.request(group_jpeg), **grpc.call)
        assert_same(from_json(json.loads(answer.prediction)), predictor.predict([group_jpeg])[0])
        assert server.process().children(recursive=True) == workers


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "request_", "status", "code"),
        [
            (PREDICTIONS, {"body": b"hello"}, 400, "not_image"),
            (PREDICTIONS, {"body": b""}, 400, "not_image"),
            (PREDICTIONS, {"body": b"{", "headers": {"content-type": "application/json"}}, 400, "bad_json"),
            (KSERVE, {"json": {"instances": [{"data": "?"}]}}, 400, "bad_base64"),
            (KSERVE, {"json": kserve(b"hello")}, 400, "not_image"),
            (f"{INVOKE}?color=red", {"body": b"hello"}, 400, "unknown_option"),
            (f"{INVOKE}?faces=all", {"body": b"hello"}, 400, "bad_option"),
        ],
    )
    def test_bad_requests(self, ask: Ask, path: str, request_: dict[str, Any], status: int, code: str) -> None:
        actual, answer = ask(path, **request_)
        assert (actual, answer["error"]["code"]) == (status, code)
        assert "Traceback" not in answer["error"]["message"]

    def test_a_face_that_was_asked_for_is_missing(self, ask: Ask, blank_png: bytes) -> None:
        status, answer = ask(f"{INVOKE}?require_face=1", body=blank_png)
        assert (status, answer["error"]["code"]) == (422, "no_face")

    def test_too_many_pixels_and_too_many_bytes(self, ask: Ask, encode: Any) -> None:
        bomb = encode(Image.new("1", (20_000, 20_000)), "PNG")
        status, answer = ask(PREDICTIONS, body=bomb)
        assert (status, answer["error"]["width"], answer["error"]["height"]) == (413, 20_000, 20_000)
        status, answer = ask(PREDICTIONS, body=bytes(17 * 2**20))
        assert (status, answer["error"]["code"]) == (413, "too_large")
        assert ask(PREDICTIONS, body=bytes(25 * 2**20))[0] == 413

    def test_form_fields_of_one_name_are_refused_since_one_is_lost(self, ask: Ask, group_jpeg: bytes) -> None:
        status, answer = ask(PREDICTIONS, fields=[("a", ("a.jpg", group_jpeg)), ("a", ("b.jpg", group_jpeg))])
        assert (status, answer["error"]["code"]) == (400, "repeated_field")

    def test_an_option_that_is_misspelt_beside_a_form_is_no_image(self, ask: Ask, group_jpeg: bytes) -> None:
        status, answer = ask(f"{INVOKE}?max_face=5", fields={"photo": ("a.jpg", group_jpeg)})
        assert (status, answer["error"]["code"]) == (400, "unknown_option")

    def test_an_image_that_is_announced_as_a_web_form_is_not_logged(
        self, ask: Ask, server: Server, group_jpeg: bytes
    ) -> None:
        """As curl's --data-binary does; TorchServe takes the form apart by itself."""
        status, answer = ask(PREDICTIONS, body=group_jpeg, headers=URLENCODED)
        assert (status, answer["message"][:10]) == (500, "Bad string")
        log = (server.directory / "logs" / "torchserve.log").read_bytes()
        assert b"JFIF" not in log
        assert b"Bad string" not in log

    def test_json_that_is_announced_as_a_web_form_is_refused_as_such(self, ask: Ask, group_jpeg: bytes) -> None:
        body = json.dumps(kserve(group_jpeg, group_jpeg + b"1")).encode()
        status, answer = ask(PREDICTIONS, body=body, headers=URLENCODED)
        assert (status, answer["error"]["code"]) == (400, "bad_json")
        assert answer["error"]["message"].endswith("send it with Content-Type: application/json")

    def test_broken_forms_cost_no_memory_for_good(self, ask: Ask, group_jpeg: bytes) -> None:
        """TorchServe keeps the buffers of each, here of more bytes together than Java may have."""
        large = group_jpeg + bytes(7 * 2**20)
        body, content_type = urllib3.encode_multipart_formdata({"": ("nameless.jpg", large)})
        statuses = {ask(PREDICTIONS, body=body, headers={"content-type": content_type})[0] for _ in range(300)}
        assert statuses == {500}
        assert ask(PREDICTIONS, body=large)[0] == 200

    def test_good_and_bad_requests_at_once_get_their_own_answers(
        self, ask: Ask, predictor: Predictor, group_jpeg: bytes, blank_png: bytes
    ) -> None:
        kinds = {"good": group_jpeg, "blank": blank_png, "bad": b"no image", "cut": group_jpeg[:5000]}
        expected = {"good": 200, "blank": 200, "bad": 400, "cut": 400}
        answers: list[tuple[str, int, Any]] = []

        def send(kind: str) -> None:
            answers.extend((kind, *ask(PREDICTIONS, body=kinds[kind])) for _ in range(3))

        threads = [threading.Thread(target=send, args=(kind,)) for kind in kinds for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 36
        assert all(status == expected[kind] for kind, status, _ in answers)
        good = predictor.predict([group_jpeg])[0]
        for kind, _, answer in answers:
            if kind == "good":
                assert_same(from_json(answer), good)

    def test_hostile_bodies_leave_the_workers_alone(self, ask: Ask, server: Server, group_jpeg: bytes) -> None:
        assert_survives(hostile_requests(group_jpeg, 40, seed=1), ask, server)


class TestTokens:
    @pytest.mark.parametrize("key", [None, "wrong", "management"], ids=["none", "wrong", "of another API"])
    def test_inference_asks_for_its_token(self, server: Server, http: urllib3.PoolManager, key: str | None) -> None:
        key = server.key("management") if key == "management" else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for path in (PREDICTIONS, KSERVE, INVOKE, "/ping"):
            method = "GET" if path == "/ping" else "POST"
            response = http.request(method, server.settings["inference_address"] + path, body=b"", headers=headers)
            assert response.status == 400
            assert json.loads(response.data)["type"] == "InvalidKeyException"

    @pytest.mark.parametrize("key", ["", "inference"])
    def test_management_asks_for_its_token(self, server: Server, http: urllib3.PoolManager, key: str) -> None:
        headers = {"Authorization": f"Bearer {server.key(key)}"} if key else {}
        address = server.settings["management_address"]
        for method, path in (
            ("GET", "/models"),
            ("POST", "/models?url=agegender.mar"),
            ("DELETE", "/models/agegender"),
        ):
            assert http.request(method, address + path, headers=headers).status == 400
        assert server.ready()

    def test_a_management_key_that_is_refused_is_told(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        refused = "the server refuses the management key of"
        told = {"": "cannot read the management key in", "old": refused, server.key("inference"): refused}
        for key, sentence in told.items():
            monkeypatch.setattr(server, "key", lambda _, key=key: key)
            for ask in (server.ready, server.describe):
                with pytest.raises(ServingError, match=sentence):
                    ask()

    def test_keys_are_for_the_owner_alone(self, server: Server) -> None:
        assert (server.directory / KEY_FILE).stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize(
        "url",
        ["http://127.0.0.1:9/x.mar", "https://example.org/x.mar", "file:///etc/passwd", "../x.mar", "s3://b/x.mar"],
    )
    def test_models_from_elsewhere_are_refused(self, server: Server, http: urllib3.PoolManager, url: str) -> None:
        headers = {"Authorization": f"Bearer {server.key('management')}"}
        response = http.request("POST", f"{server.settings['management_address']}/models?url={url}", headers=headers)
        assert 400 <= response.status < 500, response.data

    def test_listens_on_loopback_alone(self, server: Server) -> None:
        process = server.process()
        addresses = {each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN"}
        assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_metrics_for_prometheus(server: Server, http: urllib3.PoolManager, ask: Ask, group_jpeg: bytes) -> None:
    ask(PREDICTIONS, body=group_jpeg)
    text = http.request("GET", server.settings["metrics_address"] + "/metrics").data.decode()
    for name in ("decode_seconds_bucket", "detect_seconds_bucket", "predict_seconds_bucket", "faces_per_image_bucket"):
        assert f'agegender_{name}{{Model="agegender"' in text
    assert 'agegender_answers{Model="agegender",Status="200"' in text
    assert 'agegender_faces{Model="agegender",Gender=' in text


@pytest.mark.parametrize("setting", ["metrics_address", "grpc_inference_port"])
def test_a_port_in_use_is_told(new_server: Callable[[], Server], setting: str) -> None:
    server = new_server()
    port = int(server.settings[setting].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ServingError, match=f"in use: {setting} {port};"):
        server.start(timeout_s=60)


def test_commands_tell_the_state(server: Server) -> None:
    def run(command: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", "handler", command, "--config", str(server.config)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        return subprocess.run(call, cwd=server.directory, env=environment, capture_output=True, text=True, timeout=60)

    assert (run("live").returncode, run("ready").returncode) == (0, 0)
    assert "READY" in run("status").stdout
    again = run("start")
    assert (again.returncode, again.stderr) == (2, "handler: the server runs already; `make stop` stops it\n")
