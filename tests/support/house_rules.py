"""The rules of style that a syntax tree can show, one function a rule: module in, places that break it out."""

import ast
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

from tests.support.source_tree import Module, dotted

Rule = Callable[[Module], Iterator[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef

FILE_LINES = 400
FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "factory"}
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "__import__", "os.system", "os.popen"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"pickle.UnpicklingError"}  # what torch.load raises where it refuses a pickle
BROAD = {"Exception", "BaseException"}


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def function_lines(function: Function) -> int:
    """Lines of the body, its docstring not counted."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return body[-1].end_lineno - body[0].lineno + 1


def long_file(module: Module) -> Iterator[str]:
    count = module.text.count("\n")
    if count > FILE_LINES:
        yield f"{module.path} has {count} lines"


def long_function(module: Module) -> Iterator[str]:
    for function in functions(module):
        if function_lines(function) > FUNCTION_LINES:
            yield f"{module.place(function)} {function.name} has {function_lines(function)} lines"


def forbidden_name(module: Module) -> Iterator[str]:
    for part in PurePosixPath(module.path).with_suffix("").parts:
        if set(part.lower().split("_")) & FORBIDDEN_NAMES:
            yield f"{module.path}: {part} says nothing about what is in it"


def bare_argument(module: Module) -> Iterator[str]:
    for function in functions(module):
        given = function.args
        named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        for argument in named:
            if argument.annotation is None and argument.arg not in ("self", "cls"):
                yield f"{module.place(argument)} {function.name}({argument.arg}) has no annotation"


def missing_docstring(module: Module) -> Iterator[str]:
    """Public classes, and public functions wherever they stand."""
    for node in ast.walk(module.tree):
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield f"{module.place(node)} {node.name} has no docstring"


def forbidden_call(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            yield f"{module.place(node)} calls {dotted(node.func)}"


def pickled(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (f"{module.place(node)} imports {n}" for n in names if n.split(".")[0] in PICKLES and n not in HARMLESS)


def unsafe_load(module: Module) -> Iterator[str]:
    """``torch.load`` without ``weights_only=True`` runs whatever code a file holds; so does numpy's with allow_pickle."""
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if dotted(node.func) == "torch.load" and not _is_true(given.get("weights_only")):
            yield f"{module.place(node)} loads without weights_only=True"
        if "allow_pickle" in given and not _is_false(given["allow_pickle"]):
            yield f"{module.place(node)} allows pickles"


def _is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def _is_false(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def broad_except(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree) if module.path != "main.py" else ():
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or dotted(kind) in BROAD for kind in caught):
                yield f"{module.place(node)} catches everything"
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress") and BROAD & set(map(dotted, node.args)):
            yield f"{module.place(node)} suppresses everything"


def stub(module: Module) -> Iterator[str]:
    """Functions without work in them, but for those that only a Protocol or an abstract class declares."""
    declared = {id(member) for node in ast.walk(module.tree) if _is_protocol(node) for member in node.body}
    for function in functions(module):
        marks = [dotted(mark.func if isinstance(mark, ast.Call) else mark) for mark in function.decorator_list]
        only_declared = id(function) in declared or any("abstract" in mark or "overload" in mark for mark in marks)
        if not only_declared and _has_no_work(function):
            yield f"{module.place(function)} {function.name} is a stub"


def _is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(dotted(base).endswith("Protocol") for base in node.bases)


def _has_no_work(function: Function) -> bool:
    work = [statement for statement in function.body if not _is_words(statement)]
    if not work:
        return not (ast.get_docstring(function) and len(function.body) == 1)  # words alone: a hook with nothing to do
    return all(isinstance(statement, ast.Pass) or _raises_not_implemented(statement) for statement in work)


def _is_words(statement: ast.stmt) -> bool:
    """A docstring or ``...``."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _raises_not_implemented(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Raise) and "NotImplemented" in ast.unparse(statement)


def empty_test(module: Module) -> Iterator[str]:
    for function in functions(module):
        if function.name.startswith("test_") and not any(_asserts(node) for node in ast.walk(function)):
            yield f"{module.place(function)} {function.name} asserts nothing"


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    name = dotted(node.func) if isinstance(node, ast.Call) else ""
    return name.endswith(("pytest.raises", "pytest.warns", "pytest.fail")) or "assert" in name.rpartition(".")[2]


OF_SOURCE: tuple[Rule, ...] = (
    long_file,
    long_function,
    forbidden_name,
    bare_argument,
    missing_docstring,
    forbidden_call,
    pickled,
    unsafe_load,
    broad_except,
    stub,
)
OF_TESTS: tuple[Rule, ...] = (long_file, long_function, forbidden_name, empty_test)
