"""Throwaway environments for packages that the project is compared with, and does not need."""

import subprocess
import sysconfig
import venv
from pathlib import Path

__all__ = ["make_environment"]


def make_environment(folder: Path, *packages: str, with_ours: bool = False) -> Path | str:
    """An interpreter that has some packages, or why there is none.

    Args:
        folder: where the environment is made.
        packages: as pip takes them.
        with_ours: whether it sees the packages of this process's environment too.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    if with_ours:
        site_packages = next(folder.glob("lib/python*/site-packages"))
        ours = sysconfig.get_path("purelib")
        (site_packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode == 0:
        return python
    reason = (done.stderr.strip().splitlines() or ["pip gives no reason"])[-1]
    return f"{' '.join(packages)} cannot be installed: {reason}"
