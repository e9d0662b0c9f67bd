"""Who may import whom. The table is the one of the design; a new edge is a decision, made here."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from algorithms.registry import REGISTRY
from tests.support.source_tree import PLUGIN_FAMILIES, ROOT, Module, imported, is_plugin, modules, package, parsed

OURS = {"main", "configs", "algorithms", "jobs", "tests", "examples"}
ALLOWED = {
    "main": {"jobs", "configs"},
    "jobs": {f"algorithms.{unit}" for unit in ("base", "registry", "workload", "modeling", "formats", "parallel")}
    | {"configs"},
    "algorithms": set(),
    "algorithms.registry": {"configs"},
    "algorithms.base": {"algorithms.modeling", "algorithms.parallel", "algorithms.workload"},
    "algorithms.workload": {"algorithms.modeling"},
    "algorithms.blockwise": {
        f"algorithms.{unit}" for unit in ("base", "finetuning", "formats", "modeling", "numerics", "parallel", "workload")
    }
    | {"configs"},
    "algorithms.finetuning": {f"algorithms.{unit}" for unit in ("base", "modeling", "numerics", "parallel")} | {"configs"},
    "algorithms.formats": {"algorithms.numerics", "algorithms.modeling"},
    "algorithms.modeling": {"algorithms.numerics", "algorithms.parallel"},
    "algorithms.numerics": set(),
    "algorithms.parallel": set(),
    "configs": set(),
}
PLUGIN_MAY = {"configs"} | {
    f"algorithms.{unit}"
    for unit in ("base", "blockwise", "numerics", "modeling", "formats", "finetuning", "parallel", "workload")
}
LIBRARIES = {"configs": {"pydantic", "pydantic_core", "omegaconf", "yaml"}, "algorithms.numerics": {"torch"}}


def forbidden_edges(module: Module) -> Iterator[str]:
    """Imports of our own packages that the table does not have."""
    here = package(module.name)
    may = {here} | (PLUGIN_MAY if is_plugin(here) else ALLOWED[here])
    for name, line in imported(module):
        if name.split(".")[0] in OURS and package(name) not in may:
            yield f"{module.path}:{line} imports {name}; {here} may import {sorted(may - {here}) or 'nothing of ours'}"


def foreign_libraries(module: Module) -> Iterator[str]:
    """Imports of libraries by the packages that keep to a few."""
    may = LIBRARIES.get(package(module.name))
    for name, line in imported(module) if may is not None else ():
        top = name.split(".")[0]
        if top not in may | OURS | set(sys.stdlib_module_names):
            yield f"{module.path}:{line} imports {top}; {package(module.name)} keeps to {sorted(may)}"


def cycle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """The names along one cycle, or nothing."""
    sorter = TopologicalSorter()
    for source, target in edges:
        if source != target:
            sorter.add(source, target)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def module_edges(tree: Iterable[Module]) -> Iterator[tuple[str, str]]:
    """Which module imports which of those in ``tree``."""
    known = {module.name for module in tree}
    for module in tree:
        for name, _ in imported(module):
            target = name if name in known else name.rpartition(".")[0]
            if target in known:
                yield module.name, target


def findings(rule, tree: Iterable[Module]) -> list[str]:
    return [found for module in tree for found in rule(module)]


def test_only_the_edges_of_the_design_exist():
    assert findings(forbidden_edges, modules()) == []


def test_configs_and_numerics_keep_to_their_libraries():
    assert findings(foreign_libraries, modules()) == []


def test_no_module_imports_itself_in_a_circle():
    assert cycle(module_edges(modules())) == []


def test_no_package_imports_itself_in_a_circle():
    assert cycle((package(source), package(target)) for source, target in module_edges(modules())) == []


def test_every_plugin_of_the_registry_is_held_to_the_rules_of_plugins():
    for row in REGISTRY:
        for path in (row.config_path, row.class_path):
            assert package(path.partition(":")[0]).rpartition(".")[0] in PLUGIN_FAMILIES


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("configs/loader.py", "from algorithms.registry import find"),
        ("algorithms/modeling/source.py", "from jobs import models"),
        ("algorithms/base.py", "import jobs.runner"),
        ("algorithms/numerics/codebooks/kmeans.py", "from algorithms.modeling.files import file_digest"),
        ("algorithms/quantization/gptq/calibration.py", "from algorithms.quantization.aqlm.weight import anything"),
        ("algorithms/quantization/gptq/calibration.py", "import jobs.manifest"),
        ("algorithms/modeling/block_loop.py", "from algorithms.quantization import aqlm"),
        ("jobs/runner.py", "from algorithms.quantization.aqlm.algorithm import Aqlm"),
        ("jobs/runner.py", "from algorithms.numerics.codebooks.kmeans import anything"),
        ("jobs/runner.py", "def late():\n    from tests.support import models"),
        ("main.py", "from algorithms.registry import find"),
    ],
)
def test_a_forbidden_edge_is_seen(path, line):
    assert len(list(forbidden_edges(parsed(path, line)))) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [("configs/values.py", "import torch"), ("configs/new.py", "def f():\n    from transformers import AutoConfig"),
     ("algorithms/numerics/new.py", "import numpy as np")],
)  # fmt: skip
def test_a_foreign_library_is_seen(path, line):
    assert len(list(foreign_libraries(parsed(path, line)))) == 1


def test_a_circle_is_seen():
    tree = [
        parsed("jobs/a.py", "from jobs.b import x"),
        parsed("jobs/b.py", "from jobs import c"),
        parsed("jobs/c.py", "def late():\n    import jobs.a"),
    ]
    assert set(cycle(module_edges(tree))) == {"jobs.a", "jobs.b", "jobs.c"}
    assert cycle(module_edges(tree[:2])) == []


def test_main_configs_and_the_registry_import_without_torch():
    """A typing error in a recipe should answer at once: no torch, no transformers, and no OmegaConf before it is needed."""
    names = sorted(module.name for module in modules("configs"))
    configs = sorted(row.config_path.partition(":")[0] for row in REGISTRY)
    program = (
        f"import sys, importlib\n"
        f"for name in {['main', 'algorithms.registry', *names, *configs]}: importlib.import_module(name)\n"
        f"sys.stdout.write(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()) & {"torch", "transformers", "numpy", "omegaconf", "datasets"} == set()
    assert "pydantic" in loaded.split()
