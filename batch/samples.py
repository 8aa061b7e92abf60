"""Sample photographs that installed packages carry, and two files that show how bad input is reported."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

__all__ = ["package_file", "write_samples"]

# Both public domain (NASA; US Navy).
_PHOTOGRAPHS: Final = (("skimage", "data/astronaut.png"), ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"))


def write_samples(folder: Path) -> None:
    """Writes two photographs, a broken one and a text file, each where there is no file of its name yet.

    Raises:
        ModuleNotFoundError: a package that carries a photograph is not installed.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = {Path(name).name: package_file(package, name).read_bytes() for package, name in _PHOTOGRAPHS}
    grace_hopper = samples["grace_hopper.jpg"]
    samples["broken.jpg"] = grace_hopper[: len(grace_hopper) // 2]
    samples["notes.txt"] = b"This is no photograph. It shows how other files are reported.\n"
    for name, data in samples.items():
        if not (folder / name).exists():
            (folder / name).write_bytes(data)


def package_file(package: str, name: str) -> Path:
    """A file that an installed package carries, found without importing it, which takes longer than the job's listing.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the samples need the package {package}; install agegender[batch]")
    return Path(spec.submodule_search_locations[0]) / name
