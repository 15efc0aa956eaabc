"""Places that cannot be written, files that are damaged: work goes on, with one warning."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import taskgraph as tg
from taskgraph import cache, compiling, jit
from taskgraph.runtime.gpu import virtual

ROOT = Path(__file__).resolve().parent.parent
PLAN = """
import taskgraph as tg
b = tg.GraphBuilder("g")
x, w = b.input("x", (64, 128), "f32"), b.weight("w", (128, 128), "f32")
b.output(tg.ops.gemm(x, w, name="y"))
print("planned", len(tg.plan(b.build(), "h100_sxm", "list").steps))
"""


@pytest.fixture(autouse=True)
def homes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Homes and a temporary folder of the test's own, and a process that has not warned."""
    for name, folder in (("XDG_CACHE_HOME", "cache"), ("XDG_DATA_HOME", "data"), ("TMPDIR", "tmp")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(cache, "_usable", {})
    return tmp_path


@pytest.fixture
def heard() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings that are given."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def barred(homes: Path, *names: str) -> None:
    """Put files where folders belong: nobody can write below them, not even root."""
    for name in names:
        (homes / name).write_text("no folder")


def test_files_are_kept_in_the_users_folder(homes: Path) -> None:
    path = cache.place("kind", "a.bin")
    assert path == homes / "cache" / "taskgraph" / "kind" / "a.bin" and path.parent.is_dir()
    cache.write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01" and [p.name for p in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("data", [False, True])
def test_a_folder_that_cannot_be_written_is_replaced_with_one_warning(
    homes: Path, heard: list[warnings.WarningMessage], data: bool
) -> None:
    barred(homes, "cache", "data")
    paths = [cache.place("kind", name, data=data) for name in ("a", "b")]
    for path in paths:
        assert path.is_relative_to(homes / "tmp" / f"taskgraph-{os.geteuid()}")
        cache.write_atomically(path, "kept")
        assert path.read_text() == "kept"
    assert cache.place("kind", "a", data=data) == paths[0]
    (warning,) = heard
    assert warning.category is tg.CacheWarning
    text = str(warning.message)
    assert str(homes / ("data" if data else "cache")) in text and "\n" not in text
    assert ("XDG_DATA_HOME" if data else "XDG_CACHE_HOME") in text


def test_nothing_that_can_be_written_is_no_error(
    homes: Path, heard: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    barred(homes, "cache")

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    path = cache.place("kind", "a")
    with cache.keeping("a thing", path):
        cache.write_atomically(path, "lost")
    assert not path.exists() and len(heard) == 1 and "nothing is kept" in str(heard[0].message)


def test_what_a_read_only_folder_holds_is_read(
    homes: Path, heard: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.place("kind", "a")
    path.write_text("shipped with the image")
    monkeypatch.setattr(cache, "_usable", {})
    monkeypatch.setattr(cache, "_tried", lambda folder: "Read-only file system" if folder == path.parent else "")
    monkeypatch.setattr(cache, "_readable", lambda file: file == path)
    assert cache.place("kind", "a") == path and not heard
    assert cache.place("kind", "a", change=True) != path and len(heard) == 1


@pytest.mark.parametrize("home", ["~/.cache", "relative/place"])
def test_a_home_that_is_no_absolute_path_leaves_no_folder_where_the_process_stands(
    homes: Path, heard: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.chdir(homes)
    monkeypatch.setattr(cache.platformdirs, "user_cache_path", lambda *_, **__: Path(home))
    path = cache.place("kind", "a")
    assert path.is_absolute() and "no home folder" in str(heard[0].message)
    assert {p.name for p in homes.iterdir()} == {"tmp"}


def test_a_full_disk_is_one_warning(homes: Path, heard: list[warnings.WarningMessage]) -> None:
    for _ in range(2):
        with cache.keeping("the probe", cache.place("devices", "cpu.json")):
            raise OSError(28, "No space left on device")
    (warning,) = heard
    assert "the probe cannot be kept" in str(warning.message) and "No space left" in str(warning.message)


def test_a_temporary_folder_that_others_could_have_filled_is_not_believed(
    homes: Path, heard: list[warnings.WarningMessage]
) -> None:
    barred(homes, "cache")
    planted = homes / "tmp" / f"taskgraph-{os.geteuid()}"
    planted.mkdir(mode=0o777)
    planted.chmod(0o777)
    (planted / "cache").mkdir()
    path = cache.place("kind", "a")
    assert not path.is_relative_to(planted) and path.is_relative_to(homes / "tmp")


def test_many_writers_leave_one_whole_file(homes: Path) -> None:
    path = cache.place("kind", "a")
    bodies = [bytes([i]) * 200_000 for i in range(8)]
    threads = [
        threading.Thread(target=lambda b=body: [cache.write_atomically(path, b) for _ in range(5)]) for body in bodies
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in bodies
    assert path.read_bytes() in bodies and [p.name for p in path.parent.iterdir()] == ["a"]


def test_the_profile_database_works_where_the_data_folder_cannot_be_written(
    homes: Path, heard: list[warnings.WarningMessage]
) -> None:
    from taskgraph.cost.profiles import OpKey, OpTime, Platform, ProfileDB

    barred(homes, "data")
    platform, row = Platform("cpu", "m", "none", "v", "cpu"), OpTime(OpKey("gemm", "4x4", "f32"), 1, 1e-6, 1e-8, 9)
    assert ProfileDB().record(platform, [row]) == 1
    assert ProfileDB().table(platform)[row.key] == ((1, 1e-6, 1e-8),)
    assert len(heard) == 1
    with pytest.raises(tg.ProfileError, match="another path"):
        ProfileDB(homes / "data" / "mine.sqlite3").platforms()  # a path that was asked for is not replaced


def test_the_profile_database_is_in_memory_where_nothing_can_be_written(
    homes: Path, heard: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskgraph.cost.profiles import OpKey, OpTime, Platform, ProfileDB

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    barred(homes, "data", "cache")
    monkeypatch.setattr(tempfile, "gettempdir", none)
    platform, key = Platform("cpu", "m", "none", "v", "cpu"), OpKey("gemm", "4x4", "f32")
    store, other = ProfileDB(), ProfileDB()
    write = threading.Thread(target=store.record, args=(platform, [OpTime(key, 1, 1e-6, 1e-8, 9)]))
    write.start()
    write.join()
    assert store.table(platform)[key] == ((1, 1e-6, 1e-8),) and store.platforms() == (platform,)
    assert other.platforms() == ()
    (warning,) = heard
    assert "nothing is kept" in str(warning.message) and str(homes / "data") in str(warning.message)


def test_the_virtual_driver_says_what_it_needs_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "loaded", lambda: None)
    monkeypatch.setattr(virtual, "_driver_is_mapped", lambda: False)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(tg.BackendUnavailable, match=r"temporary folder .*set TMPDIR"):
        virtual.load("virtual:h100_sxm")


# -- compiled functions -----------------------------------------------------------------------------------------------

CALLEE = "from taskgraph import jit\nFACTOR = {factor}\n@jit.{callee}\ndef scaled(x):\n    return x * FACTOR\n"
CALLER = (
    "from taskgraph import jit\nfrom kept_a import scaled\n"
    "@jit.{caller}\ndef answer(x):\n    return scaled(x) + 1\n"
    "@jit.{caller}\ndef twice(x):\n    return scaled(x) + answer(x)\n"
)


@pytest.fixture
def modules(homes: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write two modules, the second calling the first, and import them as if the process were new."""
    source = homes / "source"
    source.mkdir()
    monkeypatch.syspath_prepend(str(source))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(factor: int = 3, callee: str = "njit", caller: str = "njit") -> ModuleType:
        (source / "kept_a.py").write_text(CALLEE.format(factor=factor, callee=callee))
        (source / "kept_b.py").write_text(CALLER.format(caller=caller))
        for name in ("kept_a", "kept_b"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        jit._source.cache_clear()
        return importlib.import_module("kept_b")

    yield load
    for name in ("kept_a", "kept_b"):
        sys.modules.pop(name, None)


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The functions that were compiled, not read."""
    names: list[str] = []
    before = compiling.listen(lambda name, count: names.append(name))
    yield names
    compiling.listen(before)


def test_a_compiled_function_is_read_by_the_next_process(modules: Any, compilations: list[str]) -> None:
    assert modules().answer(2) == 7 and "answer" in compilations
    compilations.clear()
    assert modules().answer(2) == 7 and not compilations


@pytest.mark.parametrize("kinds", [("njit", "njit"), ("kernel", "kernel"), ("inner", "kernel")])
def test_a_change_in_a_callee_of_another_file_compiles_again(
    modules: Any, compilations: list[str], kinds: tuple[str, str]
) -> None:
    assert modules(3, *kinds).answer(2) == 7
    compilations.clear()
    assert modules(5, *kinds).answer(2) == 11 and "answer" in compilations


def test_inner_functions_are_kept_in_their_callers(homes: Path, modules: Any, compilations: list[str]) -> None:
    module = modules(3, "inner", "kernel")
    assert module.answer(2) == 7 and compilations == ["answer"]
    with pytest.raises(TypeError, match=r"scaled is called by compiled functions only; use its \.py_func"):
        module.scaled(2)
    assert module.scaled.py_func(2) == 6
    module = modules(3, "inner", "kernel")
    assert module.twice(2) == 13 and module.answer(2) == 7  # one read, and one compiled against it
    assert compilations == ["answer", "twice"]
    assert modules(3, "inner", "kernel").twice(2) == 13 and compilations == ["answer", "twice"]
    files = (homes / "cache" / "taskgraph" / "compiled").glob("*.bin")
    assert sorted(path.name.rpartition("-")[0] for path in files) == ["kept_b.answer", "kept_b.twice"]


SUM = """
import sys
import numpy as np
from taskgraph import jit
@jit.kernel
def total(x):
    sum = 0.0
    for each in x:
        sum += each
    return sum
print(total(np.arange(4.0)), "numba.np.arraymath" in sys.modules)
"""


def test_a_kept_kernel_is_read_without_what_only_compiling_needs(homes: Path) -> None:
    (homes / "kept_sum.py").write_text(SUM)
    for said in ("6.0 True", "6.0 False"):
        here = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, homes / "kept_sum.py"]
        done = subprocess.run(command, capture_output=True, text=True, env=here, check=False)
        assert done.stdout.strip() == said, done.stderr


PAIR = "from typing import NamedTuple\nclass Pair(NamedTuple):\n    {first}: int\n    {second}: int\n"
APART = "from taskgraph.jit import njit\n@njit\ndef apart(pair):\n    return pair.high - pair.low\n"


def test_fields_in_another_order_compile_again(
    homes: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    """The function's own source stays; numba's name of the type tells only the fields' types."""
    monkeypatch.syspath_prepend(str(homes))
    (homes / "kept_apart.py").write_text(APART)
    for first, second in (("low", "high"), ("high", "low"), ("low", "high")):
        made: dict[str, Any] = {"__name__": "kept_pair"}
        exec(PAIR.format(first=first, second=second), made)
        module = ModuleType("kept_pair")
        module.Pair = made["Pair"]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kept_pair", module)
        sys.modules.pop("kept_apart", None)
        apart = importlib.import_module("kept_apart").apart
        assert apart(module.Pair(**{"low": 1, "high": 5})) == 4
    sys.modules.pop("kept_apart", None)
    assert compilations == ["apart", "apart"]


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "random", "folder"])
def test_a_damaged_file_is_compiled_again(homes: Path, modules: Any, compilations: list[str], damage: str) -> None:
    assert modules().answer(2) == 7
    files = sorted((homes / "cache" / "taskgraph" / "compiled").glob("*.bin"))
    assert len(files) == 2
    for path in files:
        body = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
            continue
        middle = len(body) // 2
        changed = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        made = {"empty": b"", "short": body[:middle], "flipped": changed, "random": os.urandom(4096)}
        path.write_bytes(made[damage])
    compilations.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tg.CacheWarning)  # a folder in a file's place cannot be replaced
        assert modules().answer(2) == 7
    assert "answer" in compilations


def test_compiled_functions_need_no_place(
    homes: Path, modules: Any, heard: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    barred(homes, "cache")
    monkeypatch.setattr(cache, "temporary_folder", lambda: None)
    assert modules().answer(2) == 7
    assert [w.category for w in heard] == [tg.CacheWarning]


def test_the_driver_that_cannot_be_built_says_where(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskgraph.runtime.gpu import virtual

    barred(homes, "cache")
    monkeypatch.setattr(cache, "temporary_folder", lambda: None)
    monkeypatch.setattr(cache, "_warned", True)
    with pytest.raises(tg.BackendUnavailable, match="XDG_CACHE_HOME"):
        virtual.driver_library()


@pytest.mark.slow
@pytest.mark.timeout(600)  # it compiles the planner from nothing, however busy the machine is
def test_a_user_who_can_write_neither_package_nor_home_plans_with_one_warning() -> None:
    """A real process, of another user where this one is root."""
    other = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"] if os.geteuid() == 0 else []
    if other and shutil.which("setpriv") is None:
        other = []
    folder = Path(tempfile.mkdtemp(prefix="cache-", dir="/tmp"))
    folder.chmod(0o777)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "TMPDIR"))}
    environment |= {
        "HOME": "/nonexistent",
        "XDG_CACHE_HOME": "/proc/nope/cache",
        "TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    try:
        command = [*other, sys.executable, "-c", PLAN]
        for _ in range(2):  # the second reads what the first compiled
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout == "planned 1\n" and done.stderr.count("CacheWarning") == 1
        assert any((folder / f"taskgraph-{65534 if other else os.geteuid()}").rglob("*.bin"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
