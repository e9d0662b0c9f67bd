"""The budgets of size and the rules of style, over the whole tree; each rule is also shown what it has to find."""

from collections import Counter
from statistics import median, quantiles

import pytest

from tests.support import house_rules
from tests.support.house_rules import OF_SOURCE, OF_TESTS, Rule, function_lines, functions
from tests.support.source_tree import ROOT, SOURCE, TESTS, files, modules, parsed

MEDIAN_FILE_LINES = 120
FUNCTION_LINES_90TH = 40
FILES_A_FOLDER = 12
LONG = "\n".join(["def f():", *(f"    x = {number}" for number in range(61))])

OFFENCES = [
    ("long_file", "jobs/a.py", "x = 1\n" * 401),
    ("long_function", "jobs/a.py", LONG),
    ("long_function", "tests/unit/test_a.py", f"class C:\n{LONG.replace('def f', '    def f').replace('    x', '        x')}"),
    ("forbidden_name", "jobs/model_helpers.py", ""),
    ("forbidden_name", "algorithms/utils/linear.py", ""),
    ("bare_argument", "jobs/a.py", "def f(a: int, *, b=1): return a"),
    ("bare_argument", "jobs/a.py", "def f(*rest): return rest"),
    ("missing_docstring", "jobs/a.py", "class A:\n    x = 1"),
    ("missing_docstring", "jobs/a.py", "class _A:\n    def f(self): return 1"),
    ("forbidden_call", "jobs/a.py", "print(1)"),
    ("forbidden_call", "jobs/a.py", "def f(): return eval('1')"),
    ("forbidden_call", "main.py", "exec('1')"),
    ("forbidden_call", "jobs/a.py", "import os\nos.system('ls')"),
    ("pickled", "jobs/a.py", "def f():\n    import pickle"),
    ("pickled", "jobs/a.py", "from pickle import UnpicklingError, loads"),
    ("unsafe_load", "jobs/a.py", "torch.load(path)"),
    ("unsafe_load", "jobs/a.py", "torch.load(path, weights_only=False)"),
    ("unsafe_load", "jobs/a.py", "torch.load(path, weights_only=safe)"),
    ("unsafe_load", "jobs/a.py", "np.load(path, allow_pickle=True)"),
    ("broad_except", "jobs/a.py", "try:\n    x = 1\nexcept:\n    x = 2"),
    ("broad_except", "jobs/a.py", "try:\n    x = 1\nexcept (OSError, Exception):\n    x = 2"),
    ("broad_except", "jobs/a.py", "with contextlib.suppress(BaseException):\n    x = 1"),
    ("stub", "jobs/a.py", "def f(): pass"),
    ("stub", "jobs/a.py", "def f():\n    'What it will do.'\n    raise NotImplementedError('later')"),
    ("stub", "jobs/a.py", "class A:\n    def f(self): ..."),
    ("empty_test", "tests/unit/test_a.py", "def test_f():\n    f()"),
    ("empty_test", "tests/unit/test_a.py", "class TestF:\n    def test_f(self):\n        check(f())"),
]

INNOCENCE = [
    ("forbidden_name", "jobs/command_line/commands.py", ""),
    ("bare_argument", "jobs/a.py", "class A:\n    def f(self, a: int, **rest: int): return a"),
    ("missing_docstring", "jobs/a.py", "def _f(): return 1"),
    ("forbidden_call", "jobs/a.py", "model.eval()\nconsole.print(1)\nre.compile('a')"),
    ("pickled", "jobs/a.py", "from pickle import UnpicklingError"),
    ("unsafe_load", "jobs/a.py", "torch.load(path, weights_only=True)\njson.load(path)"),
    ("broad_except", "main.py", "try:\n    x = 1\nexcept Exception:\n    x = 2"),
    ("stub", "jobs/a.py", "class A(Protocol):\n    def f(self):\n        ..."),
    ("stub", "jobs/a.py", "class A:\n    @abstractmethod\n    def f(self): ..."),
    ("stub", "jobs/a.py", "def f():\n    'Nothing to do here, for a reason.'"),
    ("empty_test", "tests/unit/test_a.py", "def test_f():\n    with pytest.raises(OSError):\n        f()"),
    ("empty_test", "tests/unit/test_a.py", "def test_f():\n    torch.testing.assert_close(a, b)"),
]


@pytest.mark.parametrize("rule", OF_SOURCE, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule: Rule):
    assert [found for module in modules() for found in rule(module)] == []


@pytest.mark.parametrize("rule", OF_TESTS, ids=lambda rule: rule.__name__)
def test_the_tests_keep_the_rule(rule: Rule):
    assert [found for module in modules(*TESTS) for found in rule(module)] == []


@pytest.mark.parametrize(("rule", "path", "text"), OFFENCES)
def test_an_offence_is_seen(rule, path, text):
    assert len(list(vars(house_rules)[rule](parsed(path, text)))) == 1


@pytest.mark.parametrize(("rule", "path", "text"), INNOCENCE)
def test_innocent_code_is_left_alone(rule, path, text):
    assert list(vars(house_rules)[rule](parsed(path, text))) == []


def test_every_rule_is_shown_an_offence():
    assert {name for name, _, _ in OFFENCES} == {rule.__name__ for rule in (*OF_SOURCE, *OF_TESTS)}


def test_files_are_short_as_a_rule():
    lengths = [module.text.count("\n") for module in modules(*SOURCE, *TESTS) if not module.path.endswith("__init__.py")]
    assert median(lengths) <= MEDIAN_FILE_LINES


def test_functions_are_short_as_a_rule():
    lengths = [function_lines(function) for module in modules(*SOURCE, *TESTS) for function in functions(module)]
    assert quantiles(lengths, n=10)[-1] <= FUNCTION_LINES_90TH


def test_no_folder_holds_more_than_a_dozen_files():
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in files(*SOURCE, *TESTS, "examples"))
    assert {folder: count for folder, count in counts.items() if count > FILES_A_FOLDER} == {}
    assert counts["configs"] > 1
