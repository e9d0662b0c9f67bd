"""The project's own source as syntax trees, for the tests of its architecture."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ("main.py", "configs", "algorithms", "jobs")
TESTS = ("tests",)
PLUGIN_FAMILIES = ("algorithms.quantization", "algorithms.pruning", "algorithms.engines")


@dataclass(frozen=True, kw_only=True)
class Module:
    """One Python file: its path below the root, its dotted name, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        parts = PurePosixPath(self.path).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    def place(self, node: ast.AST) -> str:
        return f"{self.path}:{node.lineno}"


def parsed(path: str, text: str) -> Module:
    return Module(path=path, text=text, tree=ast.parse(text))


@cache
def modules(*roots: str) -> tuple[Module, ...]:
    """Every Python file below ``roots``, those of ``SOURCE`` by default."""
    python = (path for path in files(*(roots or SOURCE)) if path.suffix == ".py")
    return tuple(parsed(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in python)


def files(*roots: str) -> list[Path]:
    """Every file below ``roots`` but what Python and the tools leave there."""
    below = (path for root in roots for path in ((ROOT / root).rglob("*") if (ROOT / root).is_dir() else [ROOT / root]))
    return sorted(path for path in below if path.is_file() and not _is_left_over(path.relative_to(ROOT)))


def shipped_recipes() -> list[Path]:
    """The recipes that the project shows; YAML files in a folder ``tasks`` are lm-eval's."""
    return [path for path in files("examples", "configs") if path.suffix in (".yaml", ".yml") and path.parent.name != "tasks"]


def _is_left_over(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(module: Module) -> Iterator[tuple[str, int]]:
    """Every import as (dotted name, line); ``from a import b`` gives ``a.b``, which may be a module or a name in one."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module.place(node)}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def package(name: str) -> str:
    """The unit of the import rules that a dotted name belongs to: configs, jobs, algorithms.base, one plugin."""
    parts = name.split(".")
    if parts[0] != "algorithms":
        return parts[0]
    if ".".join(parts[:2]) in PLUGIN_FAMILIES:
        return "algorithms" if len(parts) == 2 else ".".join(parts[:3])
    return ".".join(parts[:2])


def is_plugin(unit: str) -> bool:
    return any(unit.startswith(f"{family}.") for family in PLUGIN_FAMILIES)
