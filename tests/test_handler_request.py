"""What TorchServe hands over -> one request."""

import base64
import json
from typing import Any

import pytest
import urllib3
from PIL import Image

from handler.request import MAX_FACES, MAX_IMAGE_BYTES, MAX_IMAGES, Options, RequestError, parse_request

JSON = {"content-type": "application/json"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
IMAGE = bytes(64)  # longer than what may be meant for an option


def as_json(document: Any) -> dict[str, Any]:
    return {"body": json.dumps(document).encode()}


def instance(data: bytes, **more: Any) -> dict[str, Any]:
    return {"data": base64.b64encode(data).decode(), **more}


def test_a_raw_body_is_one_image() -> None:
    request = parse_request({"body": bytearray(b"image")}, {})
    assert [item.data for item in request.items] == [b"image"]
    assert request.form == "object"
    assert request.options == Options()


def test_options_come_beside_the_body_in_the_form_or_in_the_document() -> None:
    expected = Options("whole", 0.25, 3, True)
    texts = {"faces": "whole", "min_score": "0.25", "max_faces": "3", "require_face": "1"}
    assert parse_request({"body": b"image", **texts}, {}).options == expected
    assert parse_request({"photo": b"image", **{k: v.encode() for k, v in texts.items()}}, {}).options == expected
    document = {**instance(b"image"), "parameters": {**texts, "min_score": 0.25, "max_faces": 3}}
    assert parse_request(as_json(document), JSON).options == expected


def test_a_score_of_minus_zero_is_zero() -> None:
    assert str(parse_request({"body": b"image", "min_score": "-0"}, {}).options.min_score) == "0.0"


def test_form_fields_are_images_named_by_their_field_and_in_order() -> None:
    request = parse_request({"b": IMAGE, "a": b"2" + IMAGE, "faces": b"whole"}, {})
    assert [(item.path, item.data) for item in request.items] == [("b", IMAGE), ("a", b"2" + IMAGE)]
    assert request.form == "list"


def test_a_long_name_of_a_field_is_cut() -> None:
    assert parse_request({"a" * 5000: IMAGE}, {}).items[0].path == "a" * 1024


@pytest.mark.parametrize("decoded", [False, True], ids=["text", "decoded by TorchServe"])
def test_instances_are_images_in_order_with_their_paths(decoded: bool) -> None:
    document = {"instances": [instance(b"1", path="one"), instance(b"2")]}
    request = parse_request({"body": document} if decoded else as_json(document), JSON)
    assert [(item.path, item.data) for item in request.items] == [("one", b"1"), ("", b"2")]
    assert request.form == "predictions"


@pytest.mark.parametrize("raw", [False, True], ids=["escaped", "as a shell puts them in"])
def test_base64_may_be_wrapped(raw: bool) -> None:
    """As `base64` and MIME write it."""
    wrapped = base64.encodebytes(bytes(range(256))).replace(b"\n", b"\r\n").decode() + " \t\v\f"
    body = json.dumps({"instances": [{"data": wrapped}]})
    for escape, sign in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t")):
        body = body.replace(escape, sign) if raw else body
    assert parse_request({"body": body.encode()}, JSON).items[0].data == bytes(range(256))


def test_a_data_url_is_refused_with_what_to_send() -> None:
    with pytest.raises(RequestError, match="is not base64: send only what follows the comma") as caught:
        parse_request(as_json({"data": "data:image/jpeg;base64,AAAA"}), JSON)
    assert caught.value.code == "bad_base64"


@pytest.mark.parametrize("name", ["faces", "min_score", "max_face", "Faces", "require-face"])
@pytest.mark.parametrize("place", ["body", "body with instances", "instance"])
def test_options_of_json_are_taken_in_one_place_alone(name: str, place: str) -> None:
    """Elsewhere they would have no effect."""
    document = {
        "body": {**instance(b"1"), name: "whole"},
        "body with instances": {"instances": [instance(b"1")], name: "whole"},
        "instance": {"instances": [instance(b"1"), instance(b"2", **{name: "whole"})]},
    }[place]
    where = "instance 1" if place == "instance" else "the body"
    with pytest.raises(RequestError, match=f"{where} has a key '{name}'; options go under `parameters`") as caught:
        parse_request(as_json(document), JSON)
    assert (caught.value.status, caught.value.code) == (400, "unknown_option")


def test_other_keys_of_json_are_none_of_ours() -> None:
    """KServe's, and what clients add."""
    names = ("id", "name", "inputs", "outputs", "signature_name", "model", "shape", "datatype", "b64", "nonsense")
    more = dict.fromkeys(names, "1")
    parse_request(as_json({"instances": [instance(b"1", path="a", **more)], "parameters": {}, **more}), JSON)


def test_a_long_key_of_json_is_compared_with_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take seconds and a gigabyte where it is as long as a body may be."""
    compared: list[str] = []
    monkeypatch.setattr("handler.request.get_close_matches", lambda name, _: compared.append(name))
    long = {"max_faces" * 1000: "1"}
    parse_request(as_json({"instances": [instance(b"1", **long)], **long}), JSON)
    assert compared == ["instances", "data"]


@pytest.mark.parametrize("content_type", ["Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_json_is_known_by_its_type_whatever_the_spelling(content_type: str) -> None:
    request = parse_request(as_json(instance(b"1")), {"content-type": content_type})
    assert request.items[0].data == b"1"


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": bytearray(b'{"instances": []}')}, {}),
        ({"body": '{"instances": []}'}, {"content-type": "text/plain"}),
        ({'{"data": "AAAA"}': b""}, URLENCODED),
        ({'{"instances":[{"data":"AAAA': b'="},{"data":"' + b"A" * 999 + b'"}]}'}, URLENCODED),
        ({'{"instances":[{"path":"a': b"", 'b","data":"AAAA"}]}': b""}, URLENCODED),
    ],
    ids=["raw", "text", "urlencoded", "with an =", "with an &"],
)
def test_json_that_is_not_announced_is_refused_with_what_to_announce(row: Any, headers: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="send it with Content-Type: application/json") as caught:
        parse_request(row, headers)
    assert (caught.value.status, caught.value.code) == (400, "bad_json")


@pytest.mark.parametrize("name", ["max_face", "Faces", "minscore", "max-faces"])
def test_a_misspelt_option_of_a_form_is_no_image(name: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' is neither option nor image; the options are faces") as caught:
        parse_request({"photo": IMAGE, name: b"5"}, {})
    assert (caught.value.status, caught.value.code) == (400, "unknown_option")


def test_what_may_be_a_file_is_an_image_however_small(encode: Any) -> None:
    pixel = Image.new("RGB", (1, 1))
    smallest = encode(pixel, "WEBP", lossless=True)
    assert len(smallest) < 64
    images = {
        "words": b"hello",
        "max_fac": smallest,
        "min_scor": encode(pixel, "JPEG")[:10],
        "face": "5",
        "max_face": b"",
    }
    assert [item.path for item in parse_request(images, {}).items] == list(images)
    assert parse_request({"max_face": b"5"}, {}).items[0].data == b"5"  # alone it is what the request is about


@pytest.mark.parametrize(
    ("row", "headers", "status", "code"),
    [
        ({"body": b'{"instances": ['}, JSON, 400, "bad_json"),
        ({"body": b"\xff\xfe\x00"}, JSON, 400, "bad_json"),
        ({"body": b"[" * 9_000}, JSON, 400, "bad_json"),
        ({"body": b'{"instances":[' + b"{}," * 10_000 + b"{}]}"}, JSON, 413, "too_large"),
        ({"body": "[" * 100_000}, JSON, 413, "too_large"),
        ({"body": b"9" * 10_000}, JSON, 400, "bad_json"),
        ({"body": b""}, JSON, 400, "bad_json"),
        (as_json([1]), JSON, 400, "bad_json"),
        (as_json({"instances": []}), JSON, 400, "bad_json"),
        (as_json({"instances": {"data": ""}}), JSON, 400, "bad_json"),
        (as_json({"instances": ["text"]}), JSON, 400, "bad_json"),
        (as_json({"instances": [{"data": 5}]}), JSON, 400, "bad_json"),
        (as_json({"instances": [instance(b"1", path=7)]}), JSON, 400, "bad_json"),
        (as_json({"instances": [instance(b"1", path="x" * 5000)]}), JSON, 400, "bad_json"),
        (as_json({**instance(b"1"), "parameters": 5}), JSON, 400, "bad_json"),
        (as_json({"data": "no base64!"}), JSON, 400, "bad_base64"),
        (as_json({"data": "abc"}), JSON, 400, "bad_base64"),
        (as_json({"data": "ü"}), JSON, 400, "bad_base64"),
        (as_json({"instances": [instance(b"1")] * (MAX_IMAGES + 1)}), JSON, 413, "too_large"),
        ({**{str(index): IMAGE for index in range(64)}, "max_faces": b"101"}, {}, 413, "too_large"),
        ({str(index): b"1" for index in range(65)}, {}, 413, "too_large"),
        ({"body": b"1", "nonsense": "1"}, {}, 400, "unknown_option"),
        ({"body": b"1", "faces": "all"}, {}, 400, "bad_option"),
        ({"body": b"1", "min_score": "nan"}, {}, 400, "bad_option"),
        ({"body": b"1", "min_score": "1.5"}, {}, 400, "bad_option"),
        ({"body": b"1", "min_score": "0_1"}, {}, 400, "bad_option"),
        ({"body": b"1", "max_faces": "0"}, {}, 400, "bad_option"),
        ({"body": b"1", "max_faces": str(MAX_FACES + 1)}, {}, 400, "bad_option"),
        ({"body": b"1", "max_faces": "²"}, {}, 400, "bad_option"),
        ({"body": b"1", "max_faces": "9" * 5000}, {}, 400, "bad_option"),
        ({"body": b"1", "require_face": "maybe"}, {}, 400, "bad_option"),
        ({"body": b"1", "faces": {"nested": 1}}, {}, 400, "bad_option"),
        ({"body": bytes(MAX_IMAGE_BYTES + 1)}, {}, 413, "too_large"),
        ({"photo": {"nested": 1}}, {}, 400, "bad_json"),
        ({"faces": b"whole"}, {}, 400, "no_image"),
        ({}, {}, 400, "no_image"),
    ],
)
def test_nonsense_is_refused_with_a_reason(row: Any, headers: Any, status: int, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(row, headers)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert 10 < len(caught.value.message) < 400


def form(parts: list[tuple[str, Any]]) -> dict[str, str]:
    """The headers of a form as urllib3 sends it."""
    body, content_type = urllib3.encode_multipart_formdata(parts)
    return {"content-type": content_type, "content-length": str(len(body))}


def test_a_field_of_a_form_may_be_called_body() -> None:
    parts = {"body": ("1.jpg", IMAGE), "b": ("2.jpg", IMAGE)}
    row = {name: data for name, (_, data) in parts.items()}
    for headers in (form(list(parts.items())), URLENCODED):
        assert [item.path for item in parse_request(row, headers).items] == ["body", "b"]


def test_a_form_of_a_million_fields_is_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.request._image", None)
    monkeypatch.setattr("handler.request._check_all_parts_arrived", None)
    with pytest.raises(RequestError, match="1000000 images are over the limit of 64"):
        parse_request(dict.fromkeys(map(str, range(1_000_000)), b"1"), URLENCODED)


def test_a_form_that_lost_an_image_is_refused() -> None:
    parts = [(f"field{index}", (f"{index}.jpg", bytes(5000))) for index in range(10)]
    headers = form([*parts, ("field9", ("10.jpg", bytes(2500)))])
    with pytest.raises(RequestError, match="fields of the form share a name"):
        parse_request({name: data for name, (_, data) in parts}, headers)


@pytest.mark.parametrize("name", ["é", "a" * 64, "写" * 55], ids=["short", "SHA-256", "60 characters of Japanese"])
def test_a_whole_form_is_not_taken_for_one_that_lost_a_part(name: str) -> None:
    parts = {f"{index}": (f"{name}.webp", IMAGE, "application/octet-stream") for index in range(64)}
    assert len(parse_request(dict.fromkeys(parts, IMAGE), form(list(parts.items()))).items) == 64
    named_alike = {f"{name}{index}.webp": (f"{name}{index}.webp", IMAGE) for index in range(64)}
    assert len(parse_request(dict.fromkeys(named_alike, IMAGE), form(list(named_alike.items()))).items) == 64


@pytest.mark.parametrize("value", [5, None, [1], {"data": "x" * 900}], ids=["number", "null", "list", "object"])
def test_a_json_field_of_a_form_is_refused_as_such(value: Any) -> None:
    with pytest.raises(RequestError, match="is JSON") as caught:
        parse_request({"a": value, "b": IMAGE}, form([("a", ("1.json", b"0" * 2000)), ("b", ("2.jpg", IMAGE))]))
    assert caught.value.status == 400


def test_a_text_part_counts_by_its_bytes() -> None:
    text = "é" * 900
    request = parse_request({"a": text}, form([("a", ("a.txt", text.encode()))]))
    assert request.items[0].data == text.encode()


def test_the_faces_of_all_images_together_are_bounded() -> None:
    most: dict[str, Any] = {"instances": [instance(b"1")] * 6, "parameters": {"max_faces": MAX_FACES}}
    assert len(parse_request(as_json(most), JSON).items) == 6
    with pytest.raises(RequestError, match="7000, over the limit of 6400; lower max_faces"):
        parse_request(as_json({**most, "instances": most["instances"] + [instance(b"1")]}), JSON)
    assert len(parse_request(as_json({"instances": [instance(b"1")] * MAX_IMAGES}), JSON).items) == MAX_IMAGES


def test_the_pixels_of_all_images_together_are_bounded(encode: Any) -> None:
    large = encode(Image.new("L", (6000, 5000)), "PNG")
    with pytest.raises(RequestError, match=r"60\.0 megapixels in one request"):
        parse_request({"a": large, "b": large}, {})
    assert len(parse_request({"a": large}, {}).items) == 1


def test_the_pixels_of_one_image_are_left_to_the_predictor(encode: Any) -> None:
    """Which tells its size as well."""
    too_large = encode(Image.new("1", (7200, 7200)), "PNG")
    assert len(parse_request({"a": too_large}, {}).items) == 1


def test_an_image_that_is_too_large_is_refused_by_itself_among_others(encode: Any) -> None:
    """Sending several requests would not help it, and the others need none."""
    too_large, small = encode(Image.new("1", (7200, 7200)), "PNG"), encode(Image.new("L", (9, 9)), "PNG")
    assert len(parse_request({"a": too_large, "b": small}, {}).items) == 2


def test_json_of_which_torchserve_made_no_field_is_told_its_type() -> None:
    with pytest.raises(RequestError, match=r"holds no image.*; JSON needs Content-Type: application/json"):
        parse_request({}, {"content-type": "application/x-www-form-urlencoded"})
    with pytest.raises(RequestError, match=r"as a field of a form$"):
        parse_request({}, {"content-type": "multipart/form-data; boundary=x"})
