"""Settings for a TorchServe of one's own, for tests and benchmarks, which leave the machine's real server alone."""

import re
import socket
from pathlib import Path

__all__ = ["copy_settings"]


def copy_settings(config: Path, directory: Path) -> Path:
    """Writes a copy of settings for a server of its own, in another directory and on ports that nobody listens on.

    Returns:
        The copy.
    """
    text = config.read_text()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    for standard, free in zip(("8080", "8081", "8082", "7070", "7071"), sockets, strict=True):
        text = re.sub(rf"(?<=[:=]){standard}$", str(free.getsockname()[1]), text, flags=re.MULTILINE)
        free.close()
    here = config.resolve().parent.as_uri()  # as a URI, in which no space splits the arguments of Java
    text = text.replace("configurationFile=", f"configurationFile={here}/")
    target = directory / config.name
    target.write_text(text)
    return target
