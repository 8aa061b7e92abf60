"""The chain at a distance: a `Predictor` whose work is done by a server.

Images go one per request, as they are: the server collects what arrives together into batches by itself.
"""

import io
import json
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from http.client import BadStatusLine
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

import urllib3
from urllib3.connectionpool import ConnectionPool

from agegender.detector import DEFAULT_MAX_FACES, DEFAULT_MIN_SCORE, check_options
from agegender.errors import ServerError
from agegender.image import check_bytes
from agegender.records import from_json
from agegender.result import FacesMode, ImageResult, Item, as_items

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DEFAULT_KEY_FILE", "DEFAULT_SERVER", "Client"]

DEFAULT_SERVER: Final = "http://127.0.0.1:8080"
DEFAULT_KEY_FILE: Final = Path("key_file.json")

# What the server says of one image; everything else is about the server or the call.
_IMAGE_ERRORS: Final = ("not_image", "unreadable", "too_large", "failed")


class Client:
    """Predicts by a server. Keeps its connections open until `close`, or the end of a `with`; threads may share it.

    Attributes:
        about: `ModelSpec.identity` of the model that gave the last answer; empty before the first.
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        faces: FacesMode = "detect",
        min_score: float = DEFAULT_MIN_SCORE,
        max_faces: int = DEFAULT_MAX_FACES,
        key: str | None = None,
        key_file: Path | None = None,
        connect_timeout_s: float = 3.0,
        answer_timeout_s: float = 120.0,
        retries: int = 3,
    ) -> None:
        """Connects at the first prediction.

        Args:
            server: its address, such as http://127.0.0.1:8080.
            faces: see `Predictor`, as for the next two.
            min_score: least detector score, 0 to 1.
            max_faces: most faces per image, the largest first.
            key: the server's inference token, where there is no file of them.
            key_file: TorchServe's file of tokens. It is read anew when the server says that a token is old. Default,
                where no key is given: `key_file.json` in the working directory, if the server runs on this machine; it
                is sent to no other host.
            connect_timeout_s: how long it may take to make a connection, and to send each block (16 KiB) of an image.
            answer_timeout_s: how long the server may be silent: until its answer begins, and between two parts of it.
            retries: how often a request is repeated that was not answered: the server could not be reached, closed the
                connection before its answer or in the middle of it, or was too busy. Others are not repeated.

        Raises:
            ValueError: the address is none, or an option is out of its range.
        """
        check_options(min_score, max_faces, faces)
        if retries < 0:
            raise ValueError(f"retries must be at least 0, not {retries}")
        self.server = _address(server)
        self.about: dict[str, Any] = {}
        self._options = urlencode({"faces": faces, "min_score": min_score, "max_faces": max_faces})
        self._key = key and key.strip()
        self._key_file = DEFAULT_KEY_FILE if key is None and key_file is None and _is_here(server) else key_file
        self._key_file_is_given = key_file is not None
        self._retries = retries
        self._timeout = urllib3.Timeout(connect=connect_timeout_s, read=answer_timeout_s)
        self._pool = urllib3.PoolManager(maxsize=16)

    def predict(self, items: Iterable[Item | bytes]) -> list[ImageResult]:
        """Predicts every face of every item; an item that fails carries its error, the others their faces.

        Args:
            items: encoded images; bare bytes are an item without a path.

        Returns:
            One result per item, in order.

        Raises:
            TypeError: one item was given instead of several.
            ServerError: the server cannot be reached, refuses the token, or is out of order; or the token or the given
                file of tokens is none.
        """
        return list(self.stream(items))

    def stream(self, items: Iterable[Item | bytes]) -> Iterator[ImageResult]:
        """Like `predict`, but yields each result when it has come, so that a later error loses none of them."""
        return (self._predict(item) for item in as_items(items))

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._pool.clear()

    def _predict(self, item: Item) -> ImageResult:
        try:
            check_bytes(item.data)
        except TypeError as wrong:  # the result that the predictor has for it
            return ImageResult.from_error(item.path, wrong)
        key = self._key or self._read_key()
        status, answer = self._post(item.data, key)
        # Compared with the key that was sent: another thread may have read the file already.
        if _says_old_key(answer) and (newer := self._read_key()) and newer != key:
            status, answer = self._post(item.data, newer)
        if status == 200:
            return self._result(item, answer)
        error = _error(answer)
        if error.get("code") in _IMAGE_ERRORS and isinstance(error.get("message"), str):
            return ImageResult(item.path, error["code"], error["message"], error.get("width"), error.get("height"))
        if status == 413:
            return ImageResult(
                item.path, "too_large", f"the server takes no {memoryview(item.data).nbytes} bytes; shrink the image"
            )
        if key is None and _says_old_key(answer):
            raise ServerError(
                f"{self.server} asks for a token; give the key_file.json that the server wrote at its start"
            )
        raise ServerError(_explain(self.server, status, answer))

    def _result(self, item: Item, answer: Mapping[str, Any]) -> ImageResult:
        try:
            self.about = dict(answer["model"])
            return replace(from_json(answer), path=item.path)
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.server} did not answer like an agegender server; check the address") from error

    def _post(self, data: bytes, key: str | None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one request."""
        # TorchServe passes the query to the model on this path alone.
        url = f"{self.server}/models/agegender/invoke?{self._options}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(memoryview(data).nbytes)}
        if key:
            headers["Authorization"] = f"Bearer {_checked(key)}"
        body = io.BytesIO(data)  # of which urllib3 sends block by block: the connect timeout bounds each, not the whole
        try:
            response = self._pool.request(
                "POST", url, body=body, headers=headers, timeout=self._timeout, retries=self._retry()
            )
        except urllib3.exceptions.HTTPError as error:
            raise ServerError(_why_no_answer(self.server, getattr(error, "reason", None) or error)) from error
        try:
            answer = json.loads(response.data)
        except (ValueError, RecursionError):
            answer = {}
        return response.status, answer if isinstance(answer, dict) else {}

    def _retry(self) -> urllib3.Retry:
        """A prediction changes nothing, so what was not answered may be asked again; a slow answer is not hurried."""
        return _NoSecondWait(
            total=self._retries,
            status_forcelist=(503,),
            allowed_methods=None,
            backoff_factor=0.2,
            respect_retry_after_header=False,  # it may ask for hours, and makes urllib3 repeat other answers than 503
            raise_on_status=False,
            redirect=False,
        )

    def _read_key(self) -> str | None:
        """The file's key, which is the one in use from now on; None where there is none.

        Raises:
            ServerError: the caller named a file that holds none.
        """
        if self._key_file is None:
            return None
        try:
            self._key = key = str(json.loads(self._key_file.read_text())["inference"]["key"]).strip()
        except (OSError, ValueError, KeyError, TypeError) as error:
            if self._key_file_is_given:
                raise ServerError(f"cannot read {self._key_file}: {_why_no_key(error)}") from error
            return None
        return key


class _NoSecondWait(urllib3.Retry):
    """Repeats a request whose connection broke, but none whose answer took too long: the server may be at it still."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: urllib3.BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: ConnectionPool | None = None,
        _stacktrace: TracebackType | None = None,
    ) -> "Self":
        if isinstance(error, urllib3.exceptions.ReadTimeoutError):
            raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


def _is_here(server: str) -> bool:
    host = (urllib3.util.parse_url(server).host or "").strip("[]")  # as the request will read it
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(key: str) -> str:
    """Returns the key, checked here since HTTP's own error would print it."""
    if not (key.isascii() and key.isprintable()):
        raise ServerError("the token holds characters that no token has; give the inference key of key_file.json")
    return key


def _address(server: str) -> str:
    if not server.startswith(("http://", "https://")):
        raise ValueError(f"the server's address must begin with http:// or https://, not {server!r}")
    if "@" in server.split("/")[2]:  # which errors would show
        raise ValueError("the server's address may hold no user and password; the token is a key or in a key file")
    with suppress(urllib3.exceptions.LocationParseError):
        url = urllib3.util.parse_url(server)
        if url.host and url.query is None and url.fragment is None:
            return server.rstrip("/")
    raise ValueError(f"{server!r} is no address of a server; it should be like {DEFAULT_SERVER}")


def _why_no_key(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is no JSON" if isinstance(error, ValueError) else "it holds no inference key"


def _says_old_key(answer: Mapping[str, Any]) -> bool:
    return answer.get("type") in ("InvalidKeyException", "TokenAuthorizationException")


def _error(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Empty where there is none; KServe and proxies give it as a text."""
    error = answer.get("error") or {}
    return error if isinstance(error, dict) else {"message": str(error)[:200]}


def _why_no_answer(server: str, cause: Exception) -> str:
    if not isinstance(cause, urllib3.exceptions.SSLError):
        return f"{server} does not answer ({_reason(cause)}); is it running?"
    error = cause.args[0]
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {server} is not accepted ({error.verify_message.rstrip('.')}); check the address, or "
            "name the file of its authority in SSL_CERT_FILE"
        )
    reason = (getattr(error, "reason", None) or str(error)).replace("_", " ").lower()  # OpenSSL's are in capitals
    return f"{server} does not answer by TLS ({reason}); check the address"


def _reason(cause: Exception) -> str:
    if isinstance(cause, urllib3.exceptions.ReadTimeoutError):
        return "no answer in time"
    # Each of these three is one of the next, too.
    if isinstance(cause, urllib3.exceptions.NameResolutionError):
        return "unknown host"
    if isinstance(cause, urllib3.exceptions.NewConnectionError):
        return (getattr(cause.__cause__, "strerror", None) or "no connection").lower()
    if isinstance(cause, urllib3.exceptions.ConnectTimeoutError):
        return "no connection in time"
    if isinstance(cause, urllib3.exceptions.ProtocolError):
        if type(cause.args[-1]) is BadStatusLine:  # a subclass of it stands for no answer at all
            return "what it says is no HTTP"
        return "the connection broke off"
    return type(cause).__name__


def _explain(server: str, status: int, answer: Mapping[str, Any]) -> str:
    if _says_old_key(answer):
        return f"{server} refuses the token; give the inference key of its key_file.json"
    if message := _error(answer).get("message"):
        return f"{server}: {message}"
    if status == 503:
        return f"{server} is too busy or being stopped; try again later"
    return f"{server} answers with status {status}: {str(answer.get('message', 'no reason given'))[:200]}"
