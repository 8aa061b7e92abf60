"""Sample photographs that installed packages carry, and two files that show how bad input is reported."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

__all__ = ["write_samples"]

# Both public domain (NASA; US Navy).
_PHOTOGRAPHS: Final = (("skimage", "data/astronaut.png"), ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))


def write_samples(folder: Path) -> None:
    """Writes two photographs, a broken one and a text file.

    Raises:
        ModuleNotFoundError: a package that carries a photograph is not installed.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = b""
    for package, name in _PHOTOGRAPHS:
        data = _package_file(package, name).read_bytes()
        (folder / Path(name).name).write_bytes(data)
    (folder / "broken.jpg").write_bytes(data[: len(data) // 2])
    (folder / "notes.txt").write_text("This is no photograph. It shows how other files are reported.\n")


def _package_file(package: str, name: str) -> Path:
    """Found without importing the package, which takes longer than the job's listing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the samples need the package {package}; install agegender[batch]")
    return Path(spec.submodule_search_locations[0]) / name
