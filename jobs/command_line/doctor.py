"""What this machine has: packages, cores, memory, devices, clients of the formats, and whether the hub answers.

Of tokens it says whether there is one, never what it is.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.command_line.requirements import Finding, check_requirements, installed_version
from jobs.reporting.secrets import has_wandb_key

OLDEST_PYTHON = (3, 11)
SECONDS_FOR_THE_HUB = 3.0
HUB = "https://huggingface.co"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
YES = ("1", "on", "yes", "true")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
GIB = 2**30

# What reads a format, or makes more of a job: label -> the packages that it takes.
CLIENTS: Mapping[str, tuple[str, ...]] = {
    "aqlm (8-bit codebooks on a CPU: with numba)": ("aqlm", "numba"),
    "compressed-tensors": ("compressed-tensors",),
    "gguf": ("gguf",),
    "auto-round": ("auto-round",),
    "gptq, awq: gptqmodel": ("gptqmodel",),
    "vllm": ("vllm",),
    "tasks: lm_eval": ("lm_eval",),
    "tracking: wandb": ("wandb",),
}

Lines = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Titled lists of labels and values, and what is wrong with what every job needs."""

    sections: Mapping[str, Sequence[tuple[str, str]]]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """As the terminal has it, values below each other."""
        width = max(len(label) for section in self.sections.values() for label, _ in section)
        written = []
        for title, section in self.sections.items():
            written += ["", title, *(f"  {label:<{width}}  {value}".rstrip() for label, value in section)]
        return written[1:]


def examine(folder: Path, environment: Mapping[str, str]) -> Examination:
    """Look at this machine.

    Args:
        folder: where jobs would be; its disk is looked at.
        environment: the variables of this process.
    """
    findings = check_requirements()
    required = [f"{f.name} {f.found or ''}".strip() + f": {f.problem}" for f in findings if f.is_required and f.problem]
    if sys.version_info < OLDEST_PYTHON:
        required.insert(0, f"Python {platform.python_version()}: wanted is {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    sections = {
        "machine": _machine(folder, environment),
        "devices": _devices(),
        "packages": _packages([f for f in findings if f.is_required]),
        "packages for the tests": _packages([f for f in findings if not f.is_required]),
        "clients": _clients(environment),
        "hub": _hub(environment),
        "tokens (values are never shown)": _tokens(environment),
    }
    return Examination(sections=sections, problems=tuple(required))


def _machine(folder: Path, environment: Mapping[str, str]) -> Lines:
    disk = shutil.disk_usage(folder)
    threads = environment.get("OMP_NUM_THREADS", "not set: as many as there are cores")
    return [
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()} ({platform.machine()})"),
        ("OMP_NUM_THREADS", threads),
        ("memory", _memory()),
        ("disk", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB, in {folder.absolute()}"),
    ]


def _memory(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> str:
    """Available and total memory, and the container's limit where it has one below that."""
    try:
        pairs = (line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        sizes = {name: int(rest.split()[0]) * 1024 for name, rest in pairs}
        total, available = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return "unknown"
    text = f"{available / GIB:.1f} GiB available of {total / GIB:.1f} GiB"
    try:
        most = int(limit.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return text
    return f"{text}, this process may have {most / GIB:.1f} GiB" if most < total else text


def _devices() -> Lines:
    if installed_version("torch") is None:
        return [("CUDA", "unknown: torch is not installed")]
    import torch

    threads = ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return [threads, ("CUDA", "none: jobs run on the CPU")]
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [threads, *((f"cuda:{number}", f"{one.name}, {one.total_memory / GIB:.1f} GiB") for number, one in enumerate(found))]


def _packages(findings: Sequence[Finding]) -> Lines:
    return [(f.name, f"{f.found or ''}  {f'<-- {f.problem}' if f.problem else ''}".strip()) for f in findings]


def _clients(environment: Mapping[str, str]) -> Lines:
    lines = [(label, _present(packages)) for label, packages in CLIENTS.items()]
    search = environment.get("PATH", os.defpath)
    builder = shutil.which("trtllm-build", path=search)
    return [
        *lines,
        ("tensorrt-llm: trtllm-build", builder or "none"),
        ("a browser, for the report's test", _browser(environment)),
    ]


def _present(packages: tuple[str, ...]) -> str:
    found = {name: installed_version(name) for name in packages}
    if not any(found.values()):
        return "none"
    return ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in found.items())


def _browser(environment: Mapping[str, str]) -> str:
    """A Chromium of the system, or one that Playwright has brought."""
    search = environment.get("PATH", os.defpath)
    own = environment.get("PLAYWRIGHT_BROWSERS_PATH")
    folder = Path(own) if own else Path("~/.cache/ms-playwright").expanduser()
    brought = sorted(str(path) for path in folder.glob("chromium*")) if folder.is_dir() else []
    found = [place for name in BROWSERS if (place := shutil.which(name, path=search))]
    return next(iter([*found, *brought]), "none")


def _hub(environment: Mapping[str, str]) -> Lines:
    endpoint = environment.get("HF_ENDPOINT") or HUB
    offline = [name for name in OFFLINE if environment.get(name, "").lower() in YES]
    if offline:
        return [(endpoint, f"not asked: {', '.join(offline)} is set, so nothing is downloaded")]
    return [(endpoint, _answer(endpoint))]


def _answer(address: str) -> str:
    """Whether a server answers, whatever it says."""
    if not address.startswith(("http://", "https://")):
        return "cannot be asked: HF_ENDPOINT has to begin with https://"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS_FOR_THE_HUB):
            return "answers"
    except urllib.error.HTTPError as error:
        return f"answers (HTTP {error.code})"
    except (OSError, ValueError) as error:
        return f"cannot be reached ({error}); models and data sets then have to be local"


def _tokens(environment: Mapping[str, str]) -> Lines:
    home = Path(environment.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    stored = Path(environment.get("HF_TOKEN_PATH") or home / "token").expanduser()
    hub = any(environment.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or stored.is_file()
    wandb = has_wandb_key(environment)
    return [("hub", "yes" if hub else "no"), ("wandb", "yes" if wandb else "no")]
