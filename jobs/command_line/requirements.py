"""requirements.txt against what is installed, by the metadata of packages: nothing is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "requirements.txt"
FOR_TESTS = "# Tests and style"  # the line of requirements.txt behind which nothing is needed to run a job
Installed = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A line of requirements.txt and the version that is there, None where the package is not installed."""

    name: str
    range: str
    found: str | None
    is_met: bool
    is_required: bool

    @property
    def problem(self) -> str | None:
        """What is wrong, or None."""
        if self.is_met:
            return None
        return f"not installed; wanted is {self.range}" if self.found is None else f"wanted is {self.range}"


def installed_version(name: str) -> str | None:
    """The version of an installed package, None without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def check_requirements(file: Path = FILE, installed: Installed = installed_version) -> tuple[Finding, ...]:
    """Every line of a requirements file, in its order.

    Args:
        file: lines such as ``numpy>=2.4,<3``; comments are passed over, but for ``FOR_TESTS``.
        installed: name of a package -> its version.
    """
    return tuple(_findings(file, installed))


def _findings(file: Path, installed: Installed) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    is_required = True
    for line in file.read_text(encoding="utf-8").splitlines():
        is_required = is_required and not line.startswith(FOR_TESTS)
        text = line.partition("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        found = installed(wanted.name)
        met = found is not None and wanted.specifier.contains(found, prereleases=True)
        yield Finding(name=wanted.name, range=str(wanted.specifier), found=found, is_met=met, is_required=is_required)
