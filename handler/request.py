"""What TorchServe hands over -> one request: its images, its options and the form of its answer."""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Final, Literal

from agegender import AgeGenderError, Item, NotAnImageError
from agegender.detector import DEFAULT_MAX_FACES, DEFAULT_MIN_SCORE
from agegender.image import read_header
from agegender.result import FacesMode

__all__ = [
    "MAX_FACES",
    "MAX_IMAGES",
    "MAX_IMAGE_BYTES",
    "MAX_PIXELS",
    "Options",
    "Request",
    "RequestError",
    "count_pixels",
    "parse_request",
]

# A request's limits. Together they bound the time that a worker spends on it and the length of its answer.
MAX_IMAGES: Final = 64
MAX_IMAGE_BYTES: Final = 16 * 2**20
MAX_PIXELS: Final = 50_000_000
MAX_FACES: Final = 1000
_MAX_FACES_OF_ALL: Final = 6400
_MAX_NAME: Final = 1024

_MAX_JSON_PARTS: Final = 10_000  # parsed, a body of small parts takes twenty times its size

_BODY: Final = "body"  # TorchServe's name for a body that is no form
_FORMS: Final = ("multipart/form-data", "application/x-www-form-urlencoded")
_MAX_OPTION_BYTES: Final = 64  # of a value that may have been meant for an option


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        code: what programs distinguish it by.
        message: one sentence for people: what was wrong and what to do.
        details: what else the answer says of it.
    """

    def __init__(self, status: int, code: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details


@dataclass(frozen=True)
class Options:
    """What a caller may ask for.

    Attributes:
        faces: `detect` finds the faces of each image, `whole` takes each image as one face.
        min_score: least detector score, 0 to 1.
        max_faces: most faces per image, the largest first.
        require_face: whether an image without a face is an error.
    """

    faces: FacesMode = "detect"
    min_score: float = DEFAULT_MIN_SCORE
    max_faces: int = DEFAULT_MAX_FACES
    require_face: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> "Options":
        """Reads options from their texts.

        Raises:
            RequestError: 400, an option is unknown or its value is none that it takes.
        """
        for name in values:
            if name not in _OPTIONS:
                raise RequestError(400, "unknown_option", f"unknown option {name[:40]!r}; {_HELP}")
        chosen: dict[str, Any] = {name: _OPTIONS[name](name, text) for name, text in values.items()}
        return cls(**chosen)


def _faces(name: str, text: str) -> str:
    if text not in ("detect", "whole"):
        raise _bad_option(name, text, "detect or whole")
    return text


def _score(name: str, text: str) -> float:
    try:
        value = -1.0 if "_" in text else float(text)  # Python's own 0_1 is no number to anyone else
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise _bad_option(name, text, "a number from 0 to 1")
    return abs(value)  # of -0, which would be answered as -0.0


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= MAX_FACES):
        raise _bad_option(name, text, f"a whole number from 1 to {MAX_FACES}")
    return int(text)


def _flag(name: str, text: str) -> bool:
    if text.lower() not in ("0", "1", "true", "false"):
        raise _bad_option(name, text, "1 or 0")
    return text.lower() in ("1", "true")


def _bad_option(name: str, text: str, expected: str) -> RequestError:
    return RequestError(400, "bad_option", f"option {name} must be {expected}, not {text[:40]!r}")


_OPTIONS: Final[Mapping[str, Callable[[str, str], object]]] = {
    "faces": _faces,
    "min_score": _score,
    "max_faces": _count,
    "require_face": _flag,
}
_MAX_MISSPELT: Final = 3 * max(map(len, _OPTIONS))  # difflib finds nothing longer alike
_HELP: Final = f"the options are {', '.join(_OPTIONS)}"
_JSON_HELP: Final = 'send {"instances": [{"data": "<base64>"}]}'
_UNTOLD_JSON: Final = "the request looks like JSON; send it with Content-Type: application/json"


@dataclass(frozen=True)
class Request:
    """One request, understood.

    Attributes:
        items: its images, at least one.
        options: what it asks for.
        form: of its answer: one `object`, a `list`, or KServe's `predictions`.
    """

    items: tuple[Item, ...]
    options: Options
    form: Literal["object", "list", "predictions"]


def parse_request(row: Mapping[str, Any], headers: Mapping[str, str]) -> Request:
    """Reads one row of what TorchServe passes to a handler.

    Under settings without our `decode_input_request=false`, JSON arrives parsed and text as `str`.

    Args:
        row: the fields of a form, or the body under `body` with the options of the query beside it.
        headers: of the request, under lower-case names.

    Raises:
        RequestError: 400 for a request that makes no sense, 413 for one that is too large.
    """
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if _BODY not in row or content_type in _FORMS:  # which may have a field of that name
        request = _from_form(row, headers)
    elif _is_json(row[_BODY], content_type):
        request = _from_json(row)
    else:
        request = _from_body(row)
    _check_pixels(request.items)
    _check_faces(len(request.items) * request.options.max_faces)
    return request


def _is_json(body: Any, content_type: str) -> bool:
    """Whether TorchServe decoded the body, or was told that it is JSON."""
    return isinstance(body, dict | list) or content_type == "application/json" or content_type.endswith("+json")


def _check_all_parts_arrived(row: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    """TorchServe keeps one field per name and drops the others silently; the length of the form tells.

    Beside its value a part takes its boundary, its name, 101 bytes (of curl, urllib3 and browsers) and the name of its
    file, which does not arrive: 180 bytes are allowed for it, 60 characters of Japanese, or those of the field's name.
    """
    values = [value.encode() if isinstance(value, str) else value for value in row.values()]
    if not all(isinstance(value, bytes | bytearray) for value in values):
        return  # how long they were is gone with TorchServe's parsing of JSON, and no field may be JSON
    boundary = headers.get("content-type", "").lower().partition("boundary=")[2]
    arrived = sum(map(len, values)) + sum(len(boundary) + 2 * len(name.encode()) + 281 for name in row)
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > arrived + 256:
        raise RequestError(
            400,
            "repeated_field",
            "fields of the form share a name, or file names are longer than 60 characters; "
            "give each image a short name of its own",
        )


def _from_form(row: Mapping[str, Any], headers: Mapping[str, str]) -> Request:
    """Every field that is no option is an image, named by its field."""
    images = {name: value for name, value in row.items() if name not in _OPTIONS}
    if not images:
        hint = "; JSON needs Content-Type: application/json" if _is_typed_form(headers) else ""
        raise RequestError(
            400, "no_image", f"the request holds no image; send it as the body or as a field of a form{hint}"
        )
    _check_count(len(images))  # first, since a form may have a million
    _check_all_parts_arrived(row, headers)
    _check_meant_as_images(images)
    options = Options.parse({name: _text(name, row[name]) for name in _OPTIONS if name in row})
    items = tuple(_image(value, name) for name, value in images.items())
    return Request(items, options, "object" if len(items) == 1 else "list")


def _is_typed_form(headers: Mapping[str, str]) -> bool:
    """As `curl -d` announces whatever it sends; of JSON that holds no equals sign, TorchServe makes no field at all."""
    return headers.get("content-type", "").lower().startswith("application/x-www-form-urlencoded")


def _check_meant_as_images(fields: Mapping[str, Any]) -> None:
    """A misspelt option would be a broken image among the others, and so would JSON that was announced as a form."""
    for name, value in fields.items():
        if name.startswith("{") and not _is_image(value):
            raise RequestError(400, "bad_json", _UNTOLD_JSON)
        if len(fields) > 1 and _may_be_option(name, value) and not _is_image(value):
            raise RequestError(400, "unknown_option", f"field {name!r} is neither option nor image; {_HELP}")


def _may_be_option(name: str, value: Any) -> bool:
    """Not where the value is a text: then a file was announced as one. Nor where it is empty, as a file may be."""
    is_short = isinstance(value, bytes | bytearray) and 0 < len(value) < _MAX_OPTION_BYTES
    return is_short and _is_like_an_option(name)


def _is_like_an_option(name: str) -> bool:
    """The length comes first: a key of a whole body's size would be compared for seconds, in a gigabyte."""
    return len(name) <= _MAX_MISSPELT and bool(get_close_matches(name.lower(), _OPTIONS))


def _is_image(value: Any) -> bool:
    """Also a damaged one."""
    try:
        read_header(value)
    except (NotAnImageError, TypeError):
        return False
    except AgeGenderError:
        return True
    return True


def _from_body(row: Mapping[str, Any]) -> Request:
    body = row[_BODY]
    if isinstance(body, bytes | bytearray | str) and body[:1] in (b"{", "{"):
        raise RequestError(400, "bad_json", _UNTOLD_JSON)
    return Request((_image(body, ""),), _options(row), "object")


def _from_json(row: Mapping[str, Any]) -> Request:
    document = _document(row[_BODY])
    options = _options({**row, **_parameters(document)})
    _check_keys(document, "the body")
    if "instances" not in document:
        return Request((_instance(document, "the body"),), options, "object")
    instances = document["instances"]
    if not isinstance(instances, list) or not instances:
        raise RequestError(400, "bad_json", f"instances must be a list that is not empty; {_JSON_HELP}")
    _check_count(len(instances))
    items = tuple(_instance(each, f"instance {index}") for index, each in enumerate(instances))
    return Request(items, options, "predictions")


def _document(body: Any) -> dict[str, Any]:
    if isinstance(body, bytes | bytearray | str):
        _check_parts(body.encode(errors="replace") if isinstance(body, str) else body)
        try:
            body = json.loads(body, strict=False)  # a shell puts wrapped base64 in as it is, with its line ends
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            raise RequestError(400, "bad_json", f"the body is not JSON ({reason}); {_JSON_HELP}") from error
    if not isinstance(body, dict):
        raise RequestError(400, "bad_json", f"the JSON body must be an object; {_JSON_HELP}")
    return body


def _check_parts(body: bytes | bytearray) -> None:
    """Base64 has none of these signs."""
    if sum(map(body.count, (b"{", b"[", b","))) > _MAX_JSON_PARTS:
        raise RequestError(413, "too_large", f"the JSON body has over {_MAX_JSON_PARTS} parts; send several requests")


def _parameters(document: Mapping[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError(400, "bad_json", f"parameters must be an object; {_HELP}")
    return {name: str(value) for name, value in parameters.items() if name != _BODY}


def _check_keys(document: Mapping[str, Any], where: str) -> None:
    """Options have one place; other keys may be KServe's."""
    for name in document:
        if _is_like_an_option(name):
            raise RequestError(
                400,
                "unknown_option",
                f"{where} has a key {name[:40]!r}; options go under `parameters`, beside data or instances; {_HELP}",
            )


def _instance(instance: Any, where: str) -> Item:
    """One `{"data": base64, "path": optional name}`."""
    data = instance.get("data") if isinstance(instance, dict) else None
    if not isinstance(data, str):
        raise RequestError(400, "bad_json", f"{where} has no image under the key data; {_JSON_HELP}")
    _check_keys(instance, where)
    path = instance.get("path", "")
    if not isinstance(path, str) or len(path) > _MAX_NAME:
        raise RequestError(400, "bad_json", f"the path of {where} must be a text of at most {_MAX_NAME} characters")
    try:
        decoded = base64.b64decode(data.encode().translate(None, b" \t\r\n\v\f"), validate=True)  # it may be wrapped
    except (binascii.Error, ValueError) as error:
        reason = "send only what follows the comma" if data.startswith("data:") else error
        raise RequestError(400, "bad_base64", f"the data of {where} is not base64: {reason}") from error
    return _image(decoded, path)


def _options(row: Mapping[str, Any]) -> Options:
    return Options.parse({name: _text(name, value) for name, value in row.items() if name != _BODY})


def _text(name: str, value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return value.decode("utf-8", "replace").strip()
    if not isinstance(value, str):
        raise _bad_option(name, str(value), "a text")
    return value.strip()


def _image(value: Any, name: str) -> Item:
    if isinstance(value, str):
        value = value.encode()  # a text/* type was announced; whatever it is, the predictor will say
    if not isinstance(value, bytes | bytearray):
        raise RequestError(400, "bad_json", f"field {name[:40]!r} is JSON; {_JSON_HELP} as the whole body")
    if len(value) > MAX_IMAGE_BYTES:
        raise RequestError(
            413, "too_large", f"an image of {len(value)} bytes is over the limit of {MAX_IMAGE_BYTES}; shrink it"
        )
    return Item(bytes(value), name[:_MAX_NAME])


def _check_count(count: int) -> None:
    if count > MAX_IMAGES:
        raise RequestError(
            413, "too_large", f"{count} images are over the limit of {MAX_IMAGES}; send several requests"
        )


def _check_pixels(items: tuple[Item, ...]) -> None:
    """Bounds the pixels of all images together; one image alone is left to the predictor's own check."""
    if len(items) > 1 and (pixels := sum(map(count_pixels, items))) > MAX_PIXELS:
        raise RequestError(
            413,
            "too_large",
            f"{pixels / 1e6:.1f} megapixels in one request are over the limit of {MAX_PIXELS / 1e6:g}; "
            "send several requests",
        )


def _check_faces(count: int) -> None:
    if count > _MAX_FACES_OF_ALL:
        raise RequestError(
            413,
            "too_large",
            f"images times max_faces are {count}, over the limit of {_MAX_FACES_OF_ALL}; "
            "lower max_faces, or send several requests",
        )


def count_pixels(item: Item) -> int:
    """Of an image, as its header announces them; none of one that the predictor will refuse."""
    try:
        header = read_header(item.data, max_pixels=MAX_PIXELS)
    except AgeGenderError:
        return 0
    return header.width * header.height
