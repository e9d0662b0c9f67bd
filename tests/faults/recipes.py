"""Shipped recipes, damaged: whatever stands in a recipe, the answer is an exit code of 0 or 2 and words that help.

python -m tests.faults.recipes --cases 5000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import main

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [path for path in sorted((ROOT / "examples").rglob("*.yaml")) if "ALGORITHM" in path.read_text(encoding="utf-8")]
REFERRED = {"TEXT_COLUMN", "ALGORITHM"}  # what is wrong may be what another key makes of these
SECONDS = 10
MOST_BYTES = 10_000_000
Path_ = tuple[str | int, ...]

HOSTILE = [
    "../../etc/passwd", "/", "~", "~root/x", "a/../../b", "..", "\\..\\x", "job://", "job://../x", "JOB://a/b/c/d",
    "${oc.env:HOME}", "${oc.env:HOME,${oc.env:PATH}}", "${MODEL}", "${", "${}", "${a.b.c}", "${oc.decode:x}",
    "${oc.create:x}", "$", "???", "{x.__class__}", "{", "{0}", "{text!r:>{width}}",
    "!!python/object/apply:os.system [id]", "\u001b[31mred\u001b[0m", "\u0000", "\u202e", "\ud7ff", "\U0001f600",
    "é" * 300, "1e400", "-1e400", ".nan", "0x" + "f" * 20, "9" * 400, "1_000", "1:30:00", "2024-01-01", "=", "<<", "*a",
    "&a", "%", "@", "`", "- a", ": ", " ", "", "\n", "\t", "#", "null", "yes", "[", "]", "a" * 100_000,
    "gsm8k:" + "9" * 50, "name:-1", ":", "::", "a:b:c",
]  # fmt: skip

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**300]),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(HOSTILE),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.text(max_size=20) | st.sampled_from(
    [*HOSTILE, "__class__", "model_config", "llm", "MODEL", "a.b", "a..b", ".", "0", "None"]
)


@dataclass(frozen=True)
class Case:
    """A damaged recipe: its bytes, overrides for the command line, and the key whose value or name was changed, if one was."""

    content: bytes
    overrides: tuple[str, ...] = ()
    changed: Path_ | None = None
    kind: str = ""


def paths(value: object, here: Path_ = ()) -> Iterator[Path_]:
    """The path of every value in a tree."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*here, key)
        yield from paths(inner, (*here, key))


@st.composite
def changed_trees(draw: st.DrawFn) -> Case:
    """One value exchanged, one key renamed, removed or added."""
    tree = yaml.safe_load(draw(st.sampled_from(RECIPES)).read_text(encoding="utf-8"))
    path = draw(st.sampled_from(list(paths(tree))))
    block = tree
    for part in path[:-1]:
        block = block[part]
    kind = draw(st.sampled_from(["value", "value", "value", "rename", "remove", "add", "deep"]))
    if kind == "remove":
        del block[path[-1]]
        return Case(_written(tree), kind=kind)
    if kind in ("rename", "add") and isinstance(block, dict):
        name = draw(names)
        block[name] = block.pop(path[-1]) if kind == "rename" else draw(values)
        return Case(_written(tree), changed=(*path[:-1], name), kind=kind)
    if kind == "deep":
        value: object = draw(scalars)
        for _ in range(draw(st.integers(1, 200))):
            value = [value] if draw(st.booleans()) else {"a": value}
        block[path[-1]] = value
        return Case(_written(tree), changed=path, kind=kind)
    block[path[-1]] = draw(values)
    return Case(_written(tree), changed=path, kind="value")


def _written(tree: object) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


@st.composite
def damaged_texts(draw: st.DrawFn) -> Case:
    """Characters, lines or bytes put in, left out or doubled."""
    text = draw(st.sampled_from(RECIPES)).read_bytes()
    lines = text.split(b"\n")
    at = draw(st.integers(0, len(text)))
    kind = draw(st.sampled_from(["insert", "bytes", "cut", "line twice", "line gone", "indent", "tail", "tag"]))
    if kind == "insert":
        text = text[:at] + draw(st.text() | st.sampled_from(HOSTILE)).encode("utf-8", "surrogatepass") + text[at:]
    elif kind == "bytes":
        text = text[:at] + draw(st.binary(min_size=1, max_size=20)) + text[at:]
    elif kind == "cut":
        text = text[:at]
    elif kind == "tail":
        text += draw(
            st.sampled_from(
                [b"\n---\na: b", b"\n...\n", b"\n? [a]: b", b"\n<<: *x", b"\n<<: [1]", b"\n? !!set {a}\n: b", b"\xff\xfe"]
            )
        )
    else:
        line = draw(st.integers(0, len(lines) - 1))
        changes = {"line twice": [lines[line]] * 2, "line gone": [], "indent": [b" " * draw(st.integers(1, 9)) + lines[line]]}
        tagged = lines[line].replace(
            b": ", b": " + draw(st.sampled_from([b"!!python/name:os.system ", b"!x ", b"!!binary ", b"!!float "]))
        )
        lines[line : line + 1] = changes.get(kind, [tagged])
        text = b"\n".join(lines)
    return Case(text, kind=kind)


@st.composite
def bombs(draw: st.DrawFn) -> Case:
    """Files that grow when they are read, or are large to begin with."""
    text = draw(st.sampled_from(RECIPES)).read_bytes()
    kind = draw(
        st.sampled_from(["laughs", "references", "brackets", "blocks", "size", "keys", "loop", "merges", "environment"])
    )
    width, depth = draw(st.integers(2, 12)), draw(st.integers(2, 40))
    levels = range(1, depth)
    bomb = {
        "laughs": "x0: &x0 [lol]\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * width)}]\n" for n in levels),
        "references": "x0: lol\n" + "".join(f"x{n}: '{f'${{x{n - 1}}}' * width}'\n" for n in levels),
        "merges": "x0: &x0 {a: 1}\n" + "".join(f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * width)}]}}\n" for n in levels),
        "brackets": "x: " + draw(st.sampled_from(["[", "{a: ", "- "])) * draw(st.sampled_from([33, 1000, 100_000])),
        "blocks": "".join(f"{' ' * n}a:\n" for n in range(draw(st.sampled_from([33, 1000])))),
        "size": draw(st.sampled_from(["#", "a", " ", "\n", "x: y\n"])) * draw(st.sampled_from([1_000_000, MOST_BYTES])),
        "keys": "".join(f"k{n}: {n}\n" for n in range(draw(st.sampled_from([300, 30_000])))),
        "loop": "x: &x [*x]\ny: ${z}\nz: ${y}\n",
        "environment": "x: " + "${oc.env:HOME}" * draw(st.sampled_from([1, 300, 3000])) + "\n",
    }[kind]
    return Case(text + b"\n" + bomb.encode()[:MOST_BYTES], kind=kind)


@st.composite
def overridden(draw: st.DrawFn) -> Case:
    """A sound recipe with overrides that nobody checked."""
    file = draw(st.sampled_from(RECIPES))
    known = [".".join(map(str, path)) for path in paths(yaml.safe_load(file.read_text(encoding="utf-8")))]
    key = draw(st.sampled_from(known) | names)
    text = draw(st.text(max_size=20) | st.sampled_from(HOSTILE) | values.map(repr))
    words = [f"{key}={text}", *draw(st.lists(st.sampled_from([f"{name}=null" for name in known]), max_size=2))]
    return Case(file.read_bytes(), tuple(words), kind="override")


cases = st.one_of(changed_trees(), changed_trees(), changed_trees(), damaged_texts(), damaged_texts(), overridden(), bombs())


def check(case: Case) -> int:
    """Have a case validated as a user would; its exit code.

    Raises:
        AssertionError: another exit code than 0 and 2, a traceback, no words, or words that do not name the key.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(case.content)
        said = io.StringIO()
        with _alarm(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                code = main.main(["validate", "--yaml_path", str(file), *case.overrides])
            except SystemExit as end:  # argparse: what was meant as an override has no such form
                return end.code
    text = said.getvalue()
    assert code in (0, 2), f"exit code {code}: {text[:2000]}"
    assert "Traceback" not in text
    if code == 2:
        assert text.strip(), "refused without a word"
        assert len(text) < 100_000, "more words than anybody reads"
        assert all(letter.isprintable() or letter in "\n\t" for letter in text), f"steers the terminal: {text!r:.2000}"
        assert case.changed is None or names_key(text, case.changed), f"{case.changed} is not named in: {text[:2000]}"
    return code


def names_key(text: str, path: Path_) -> bool:
    """Whether a message names a key; where it is no plain name, or the file cannot be read that far, the block or the line."""
    if re.search(r"recipe\.yaml(:\d+)?\n  (found .*\n  )?expected", text):
        return True
    plain = [str(part) for part in path if isinstance(part, int) or re.fullmatch(r"[\w ./:-]{1,60}", part)]
    keys = [part for part in plain if not part.isdecimal()]
    return not keys or keys[-1] in text or path[0] in REFERRED


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise AssertionError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_cases(number: int, number_seed: int | None) -> Counter:
    """Check so many cases, derandomized without a seed; how many of each kind had which answer."""
    found: Counter = Counter()

    @settings(
        max_examples=number,
        deadline=None,
        derandomize=number_seed is None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def sweep(case: Case) -> None:
        found[case.kind, check(case)] += 1

    (sweep if number_seed is None else seed(number_seed)(sweep))()
    return found


def _main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.recipes", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(argv)
    number_seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    os.chdir(ROOT)
    found = run_cases(options.cases, number_seed)
    refused = sum(count for (_, code), count in found.items() if code == 2)
    sys.stdout.write(f"seed {number_seed}: {found.total()} recipes answered, {refused} of them refused\n")
    for kind in sorted({kind for kind, _ in found}):
        sys.stdout.write(f"  {kind:12} {found[kind, 0]:5d} valid {found[kind, 2]:5d} refused\n")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
