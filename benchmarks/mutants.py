"""Mutants: one-place changes of the source that the tests of a file must notice. `python -m benchmarks.mutants --json`.

cosmic-ray's operators say what can change: a comparison, an operator, a sign, a constant, a boolean word, a branch, a
loop. `mutants.toml` says which files, and which tests are their own. Of each file a seeded sample of places is
changed, one at a time, in a copy of the tree, and its tests run there until one fails. A place's turn depends on its
own line and function only, so that an edit elsewhere in a file leaves its sample nearly as it was.

Left out are places that nothing runs (annotations, `if TYPE_CHECKING`) and changes whose effect is an accident of the
interpreter (`==` into `is`). Changes that no test can notice are listed in `mutants.toml` with the reason, and others
take their places. Exit 1 when a file's tests notice less than `least` of its mutants.
"""

import argparse
import difflib
import hashlib
import importlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numba
from rich.console import Console
from rich.table import Table

from benchmarks import count, machine, one_line, print_json, whole
from taskgraph.errors import ConfigError

ROOT = Path(__file__).parents[1]
LARGE = ("torch", "networkx", "pytest", "hypothesis", "fastapi", "tokenizers", "prometheus_client", "jinja2", "httpx")
"""Imported once, not by every run of the tests."""
TREES = ("taskgraph", "models", "serving", "cuda", "tests", "benchmarks", "examples", "docs")
ARITHMETIC = (("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"), ("RShift", "LShift", "BitOr", "BitAnd", "BitXor"))
COMPARISONS = (("Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"), ("Is", "IsNot"))
OPERATORS = (
    *(f"ReplaceBinaryOperator_{a}_{b}" for family in ARITHMETIC for a, b in permutations(family, 2)),
    *(f"ReplaceComparisonOperator_{a}_{b}" for family in COMPARISONS for a, b in permutations(family, 2)),
    "ReplaceUnaryOperator_USub_UAdd", "ReplaceUnaryOperator_Delete_Not", "ReplaceUnaryOperator_Delete_Invert",
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "NumberReplacer", "ZeroIterationForLoop",
)  # fmt: skip
LONGEST_S = 600.0


@dataclass(frozen=True, slots=True)
class Mutant:
    """A changed source: the function, its line before and after, the number of the line, and the whole text."""

    where: str
    before: str
    after: str
    line: int
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.where, self.before, self.after


@dataclass(frozen=True, slots=True)
class Target:
    """A file, its own tests (narrowest first), and the changes that none can notice: (function, before, after).
    `jit=False` runs numba's functions as Python, so that a change costs no compilation."""

    path: str
    tests: tuple[str, ...]
    jit: bool
    equivalents: frozenset[tuple[str, str, str]]


def targets(config: dict[str, Any]) -> list[Target]:
    """The files of `mutants.toml`."""
    return [
        Target(
            each["path"],
            tuple(each["tests"]),
            each.get("jit", True),
            frozenset((e["where"], e["before"], e["after"]) for e in each.get("equivalent", ())),
        )
        for each in config["file"]
    ]


def mutants(source: str, seed: int) -> Iterator[Mutant]:
    """One change for every place of `source`, in the order that `seed` gives the places."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    provider = OperatorProvider()
    operators = {name: provider[name]() for name in OPERATORS}
    nodes = list(ast_nodes(get_ast(source)))
    lines = source.splitlines()
    ways: dict[tuple[int, int], list[tuple[str, int, int]]] = defaultdict(list)
    where: dict[tuple[int, int], str] = {}
    for name, operator in operators.items():
        occurrence = 0
        for node in nodes:
            for start, _ in operator.mutation_positions(node):
                if not _never_runs(node, lines[start[0] - 1]):
                    ways[start].append((name, sum(way[0] == name for way in ways[start]), occurrence))
                    where[start] = _function(node)
                occurrence += 1
    seen: Counter[tuple[str, str]] = Counter()
    turns: dict[tuple[int, int], str] = {}
    for place in sorted(ways):
        line = (where[place], lines[place[0] - 1].strip())
        turns[place] = _digest(seed, *line, seen[line])
        seen[line] += 1
    for place in sorted(ways, key=turns.__getitem__):
        for name, _, occurrence in sorted(ways[place], key=lambda way: _digest(seed, turns[place], *way[:2])):
            text = mutate_code(source, operators[name], occurrence)
            if text is None or text == source:
                continue
            after = text.splitlines()
            at = next(i for i, (old, new) in enumerate(zip(lines, after, strict=False)) if old != new)
            yield Mutant(where[place], lines[at].strip(), after[at].strip(), at + 1, text)
            break


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _never_runs(node: Any, line: str) -> bool:
    """Whether a node is (in) an annotation, or tests for a type checker."""
    if "TYPE_CHECKING" in line:
        return True
    while node.parent is not None:
        parent = node.parent
        if parent.type == "funcdef" and node is parent.annotation:
            return True
        place = {"annassign": 1, "tfpdef": 2}.get(parent.type)
        if place is not None and node is parent.children[place]:
            return True
        node = parent
    return False


def _function(node: Any) -> str:
    """The names of the classes and functions around a node."""
    names: list[str] = []
    while node is not None:
        if node.type in ("funcdef", "classdef"):
            names.insert(0, node.name.value)
        node = node.parent
    return ".".join(names)


# ------------------------------------------------------------------------------------------ running


def run_tests(tree: Path, target: Target, cpu_s: float | None) -> tuple[str, float, str]:
    """Run the tests of `target` in `tree`: (passed, noticed or timeout; CPU seconds; what they said).

    In a fork of this process, which has imported the large libraries and no module of the tree.
    """
    shutil.rmtree(tree / ".hypothesis", ignore_errors=True)
    said = tree / "said.txt"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if not child:
        code = 4
        try:
            os.setsid()
            code = _in_child(tree, target, cpu_s, said)
        except BaseException:
            said.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    begin = time.monotonic()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - begin > LONGEST_S:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = os.waitstatus_to_exitcode(status)
    text = said.read_text(errors="replace")
    if code in (4, 5):
        raise ConfigError(f"{target.path}: its tests {' '.join(target.tests)} cannot be run: {text[-300:]}")
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout", used, text
    return "passed" if code == 0 else "noticed", used, text


def _in_child(tree: Path, target: Target, cpu_s: float | None, said: Path) -> int:
    """pytest's exit status for the tests of `target` on the sources in `tree`."""
    if cpu_s is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 2))
        sys.dont_write_bytecode = True
    with said.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["NUMBA_DISABLE_JIT"] = "0" if target.jit else "1"
    numba.config.DISABLE_JIT = int(not target.jit)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("taskgraph", "benchmarks", "tests")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() not in (ROOT, Path.cwd()))]
    import pytest

    options = [
        "-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning",
        "--hypothesis-profile=mutants", "--hypothesis-seed=0",
    ]  # fmt: skip
    code = int(pytest.main([*options, *target.tests]))
    file_of = sys.modules["taskgraph"].__file__ or ""
    if not Path(file_of).is_relative_to(tree.resolve()):
        print(f"taskgraph came from {file_of}, not from {tree}")
        return 4
    return code


def examine(target: Target, seed: int, per_file: int) -> dict[str, Any]:
    """What the tests of one file notice of `per_file` mutants."""
    source = (ROOT / target.path).read_text()
    for name in LARGE:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        for name in TREES:
            skip = shutil.ignore_patterns("__pycache__", "reports", "build")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
        for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"):
            shutil.copy(ROOT / name, tree / name)
        outcome, cpu_s, said = run_tests(tree, target, None)
        if outcome != "passed":
            raise ConfigError(f"{target.path}: its tests fail before anything is changed: {said[-600:]}")
        file = tree / target.path
        for stale in tree.rglob(f"__pycache__/{file.stem}.*.pyc"):
            stale.unlink()
        found: Counter[str] = Counter()
        survived: list[dict[str, Any]] = []
        skipped = 0
        for mutant in mutants(source, seed):
            if found.total() == per_file:
                break
            if mutant.key in target.equivalents:
                skipped += 1
                continue
            file.write_text(mutant.text)
            outcome, _, _ = run_tests(tree, target, 3 * cpu_s + 5)
            found[outcome] += 1
            if outcome == "passed":
                survived.append(
                    {"where": mutant.where, "line": mutant.line, "before": mutant.before, "after": mutant.after}
                )
            print(f"{outcome:8} {_diff(target.path, mutant)}", file=sys.stderr, flush=True)
    noticed = found["noticed"] + found["timeout"]
    return {
        "mutants": found.total(),
        "noticed": noticed,
        "timeouts": found["timeout"],
        "equivalents": skipped,
        "percent": round(100 * noticed / max(found.total(), 1), 1),
        "survived": survived,
    }


def _diff(path: str, mutant: Mutant) -> str:
    changed = difflib.ndiff([mutant.before], [mutant.after])
    lines = (line.rstrip() for line in changed if line[0] in "+-")
    return f"{path}:{mutant.line} {mutant.where}\n" + "\n".join(f"         {line}" for line in lines)


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    config = tomllib.loads((ROOT / "benchmarks/mutants.toml").read_text())
    parser = argparse.ArgumentParser(prog="benchmarks.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("--file", action="append", help="only this file of mutants.toml; may be given again")
    parser.add_argument("--seed", type=whole, default=config["seed"])
    parser.add_argument("--per-file", type=count, default=config["per_file"])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    options = parser.parse_args(argv)
    chosen = targets(config)
    for path in options.file or ():
        if path not in {target.path for target in chosen}:
            raise ConfigError(f"{path} is not in benchmarks/mutants.toml; it has {', '.join(t.path for t in chosen)}.")
    chosen = [target for target in chosen if not options.file or target.path in options.file]
    files = {target.path: examine(target, options.seed, options.per_file) for target in chosen}
    good = all(each["percent"] >= config["least"] for each in files.values())
    columns = ("mutants", "noticed", "timeouts", "equivalents", "percent")
    table = Table("file", *columns, title=f"What tests notice, seed {options.seed}")
    for path, result in files.items():
        table.add_row(path, *(str(result[column]) for column in columns))
    Console(width=max(Console().width, 100)).print(table)
    if options.json:
        print_json({"machine": machine(), "seed": options.seed, "least": config["least"], "files": files})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
