"""The app in a process of its own and a real Chromium that looks at it, for tests and benchmarks."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Browser, FilePayload, Locator, Page, sync_playwright

REPOSITORY: Final = Path(__file__).resolve().parent.parent
NO_CHROMIUM: Final = (
    "no Chromium: `apt-get install chromium`, or set CHROMIUM to its path, then run `pytest tests/test_app_browser.py`"
)
_PATIENCE_S: Final = 120


@dataclass(frozen=True)
class App:
    """A running app.

    Attributes:
        address: where it answers.
        log: what it has printed so far.
    """

    address: str
    log: Path

    def warnings(self) -> list[str]:
        """Lines of the log that tell of something wrong."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if any(word in line for word in ("Warning", "WARN", "Error", "Traceback"))]


def chromium_path() -> str | None:
    """Chromium's program, if there is one."""
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def running_app(log: Path, *arguments: str) -> Iterator[App]:
    """Starts the app on a free port, as `make app` does, and stops it in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    streamlit = ["streamlit", "run", "app/streamlit_app.py", "--server.headless", "true", "--server.port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *streamlit, "--", *arguments], cwd=REPOSITORY, stdout=output, stderr=output
        )
    try:
        app = App(f"http://127.0.0.1:{port}", log)
        _wait_until_healthy(app, process)
        yield app
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_healthy(app: App, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urlopen(f"{app.address}/_stcore/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the app did not start: {app.log.read_text()}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium whose camera shows a test picture."""
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=[*camera, *sandbox, "--disable-gpu"])
        yield browser
        browser.close()


def open_page(browser: Browser, address: str, *, width_px: int = 1440, dark: bool = False) -> Page:
    """A page in a session of its own, ready to be used."""
    context = browser.new_context(
        viewport={"width": width_px, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True
    )
    context.set_default_timeout(1000 * _PATIENCE_S)
    page = context.new_page()
    page.goto(address)
    settle(page)
    return page


def settle(page: Page) -> None:
    """Waits until the app has done what it was asked and the page shows it."""
    page.get_by_role("heading", level=1).wait_for()
    page.wait_for_timeout(300)  # the browser has told the server
    page.wait_for_function(
        "!document.querySelector('[data-testid=stStatusWidget], [data-testid=stSkeleton], [data-stale=true]')"
        " && document.fonts.status === 'loaded'"
        " && [...document.querySelectorAll('[data-testid=stMain] img')].every(image => image.complete)"
    )


def upload(page: Page, *files: tuple[str, bytes]) -> None:
    """Gives photographs to the page, as names and contents."""
    payloads = [FilePayload(name=name, mimeType="application/octet-stream", buffer=data) for name, data in files]
    page.locator("[data-testid=stFileUploader] input[type=file]").set_input_files(payloads)


def alerts(page: Page) -> Locator:
    """The page's errors, warnings and remarks."""
    return page.get_by_test_id("stAlert")
