"""The wheel and the editable install hold everything, and `import taskgraph` is light."""

import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from taskgraph.cli.main import app

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """What `code` prints in a fresh interpreter in `cwd`, with `path` in front of sys.path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def isolation() -> list[str]:
    """No build environment of its own where setuptools is installed already."""
    return ["--no-build-isolation"] if find_spec("setuptools") else []


def wheel_of(source: Path, folder: Path) -> Path:
    """The wheel that pip builds from a tree or an sdist."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(folder),
        *isolation(),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("taskgraph_gpu-*.whl")
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that a build leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "taskgraph", "models", "cuda"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(folder / name)], check=True)
    return folder


@pytest.fixture(scope="module", params=["tree", "sdist"])
def wheel(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, and one of the sdist of the tree."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tree":
        return wheel_of(source, folder)
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(source)]
    command += ["--no-isolation"] if isolation() else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("taskgraph_gpu-*.tar.gz")
    return wheel_of(sdist, folder)


@pytest.mark.slow
def test_wheel_holds_every_source_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    own = ROOT / "taskgraph"
    wanted = {str(p.relative_to(ROOT)) for end in ("*.py", "*.json", "*.toml", "*.css", "*.js") for p in own.rglob(end)}
    for part in ("models", "cuda"):
        files = [*(ROOT / part).rglob("*.py"), *(ROOT / part).rglob("*.json"), *(ROOT / part).rglob("*.cu")]
        files += [*(ROOT / part).rglob("*.html"), *(ROOT / part).rglob("*.toml")]
        wanted |= {f"taskgraph/{p.relative_to(ROOT)}" for p in files}
    wanted |= {f"taskgraph/{p.relative_to(ROOT)}" for p in (ROOT / "cuda").glob("virtual/*") if p.is_file()}
    assert not {name for name in wanted if "__pycache__" not in name} - names
    assert "taskgraph/py.typed" in names
    stray = {name.split("/")[0] for name in names} - {"taskgraph"}
    assert all(name.endswith(".dist-info") for name in stray), stray


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    code = """
import json, taskgraph, taskgraph.models.config as config
shapes = {name: config.load_config(name).layers for name in config.known()}
print(json.dumps([taskgraph.__file__, config.__file__, shapes]))
"""
    package, config, shapes = json.loads(python(code, cwd=tmp_path, path=target))
    for file in (package, config):
        assert Path(file).is_relative_to(target)
        assert not Path(file).is_relative_to(ROOT)
    assert set(shapes) == {path.stem for path in (ROOT / "models" / "configs").glob("*.json")}
    assert shapes["llama-3-70b"] == 80


def test_editable_install_sees_models_through_the_package(tmp_path: Path) -> None:
    code = "import taskgraph.models.config as c; print(c.__name__, c.load_config('llama-3-8b').layers)"
    assert python(code, cwd=tmp_path) == "taskgraph.models.config 32\n"


def test_the_root_does_not_shadow_the_cuda_namespace() -> None:
    """`cuda/` at the root holds no __init__.py and no core, bindings or pathfinder (they are NVIDIA's names)."""
    assert not {"__init__.py", "core", "bindings", "pathfinder"} & {path.name for path in (ROOT / "cuda").iterdir()}


def test_import_loads_neither_torch_nor_numba(tmp_path: Path) -> None:
    code = "import sys, taskgraph; print(sorted({'torch', 'numba', 'networkx', 'numpy'} & set(sys.modules)))"
    assert python(code, cwd=tmp_path) == "[]\n"


def test_import_takes_at_most_300_ms_over_nothing(tmp_path: Path) -> None:
    def seconds(code: str) -> float:
        begin = time.perf_counter()
        python(code, cwd=tmp_path)
        return time.perf_counter() - begin

    pairs = [(seconds("pass"), seconds("import taskgraph")) for _ in range(5)]
    nothing, package = (statistics.median(column) for column in zip(*pairs, strict=True))
    assert package - nothing <= 0.3


# -- what the base install can do ------------------------------------------------------------------------------------


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(extra: str) -> list[str]:
    """What pyproject.toml asks for, with one of its extras."""
    return [*PROJECT["dependencies"], *PROJECT["optional-dependencies"].get(extra, [])]


def required(extra: str = "") -> set[str]:
    """The distributions that the package needs, directly or not, without its extras or with one of them."""
    found: set[str] = set()
    waiting = [("taskgraph-gpu", extra)]
    seen = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        found.add(canonicalize_name(name))
        try:
            lines = declared(wanted) if name == "taskgraph-gpu" else metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, lines):
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in {"", wanted}):
                waiting += [(need.name, ""), *((need.name, part) for part in need.extras)]
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which a process finds no more than the base install brings."""
    kept = required()
    foreign = sorted(
        module
        for module, names in metadata.packages_distributions().items()
        if not {canonicalize_name(name) for name in names} & kept and module not in ("_distutils_hack", "pkg_resources")
    )
    assert {"ray", "fastapi", "ortools", "pytest"} & set(foreign) and not {"torch", "numba", "typer"} & set(foreign)
    folder = tmp_path_factory.mktemp("base")
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        f"FOREIGN = frozenset({foreign!r})\n"
        "class Without:\n"
        "    def __init__(self, finder):\n"
        "        self.finder = finder\n"
        "    def __getattr__(self, name):\n"
        "        return getattr(self.finder, name)\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return None if name in FOREIGN else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = map(Without, sys.meta_path)\n"
    )
    return folder


def command(base: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`taskgraph ARGUMENTS` with what the base install brings."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(base), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", "taskgraph.cli", *arguments], cwd=base, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def commands() -> list[str]:
    """Every command there is."""
    names = (info.name or (info.callback.__name__ if info.callback else "") for info in app.registered_commands)
    return sorted(name.replace("_", "-") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", commands())
def test_every_command_helps_in_a_base_install(base: Path, name: str) -> None:
    done = command(base, name, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["devices"], ["doctor"], ["plan", "llama-3-8b", "--scheduler", "list"], ["plan", "smollm2", "--device", "cpu"]],
    ids=" ".join,
)
def test_a_base_install_plans_and_looks_around(base: Path, arguments: list[str]) -> None:
    done = command(base, *arguments)
    assert done.returncode == 0 and done.stdout and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.model
def test_a_base_install_runs_a_model(base: Path, smollm2_gguf: Path) -> None:
    done = command(base, "run", str(smollm2_gguf), "--max-new-tokens", "4")
    assert done.returncode == 0 and "tokens/s" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["serve", "smollm2"], "serve"),
        (["plan", "smollm2", "--scheduler", "exact"], "exact"),
        (["run", "smollm2", "--backend", "cuda"], "cuda"),
        (["calibrate", "--device", "h100_sxm", "--out", "c.json", "x.parquet"], "calibrate"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_missing_extra_is_one_line_that_names_it(base: Path, arguments: list[str], extra: str) -> None:
    (base / "x.parquet").write_bytes(b"PAR1")
    done = command(base, *arguments)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"taskgraph-gpu[{extra}]" in done.stderr, done.stderr


# -- the install lines of the README -----------------------------------------------------------------------------------


def install_lines() -> list[list[str]]:
    """Every `pip install` that the README shows as a command."""
    lines = (line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in lines if "pip install" in line]


@pytest.mark.slow
@pytest.mark.parametrize("line", install_lines(), ids=" ".join)
def test_the_install_line_of_the_readme_works_in_a_checkout(line: list[str], source: Path) -> None:
    shutil.copy(ROOT / "constraints.txt", source)
    assert line[:4] == ["python", "-m", "pip", "install"] and "." in line
    options = ["--dry-run", "--no-deps", "--quiet", *isolation()]
    done = subprocess.run(
        [sys.executable, *line[1:], *options], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_and_the_makefile_install_from_the_checkout() -> None:
    assert install_lines()
    extras = set(PROJECT["optional-dependencies"])
    made = re.findall(r"-e '\.\[([\w,]+)\]'", (ROOT / "Makefile").read_text())
    shown = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "README.md").read_text())
    assert made and {extra for text in [*made, *shown] for extra in text.split(",")} <= extras
    to_run = set(made[0].split(","))
    assert "test" not in to_run and "test" in made[1].split(",")


def test_what_running_needs_leaves_out_what_only_tests_need() -> None:
    to_run = set().union(*(required(extra) for extra in ("hub", "serve", "guided")))
    assert not to_run & {"ray", "dask", "ortools", "mypy", "pytest", "transformers", "scipy", "pyarrow"}
    assert {"torch", "numba", "fastapi", "uvicorn"} <= to_run
