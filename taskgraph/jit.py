"""One typed door to numba: functions are compiled on first call, and what was compiled is kept between processes.

numba's own cache needs a writable folder beside the source or in the home, believes damaged files, keeps code whose
callees in other files have changed, and mixes up signatures that two processes store at once. Here each compiled
signature is one file in the cache folder, named by all that it was made from and checked when it is read.
"""

import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache as memo
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler, CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps
from numba.core.types.containers import BaseTuple

from taskgraph import cache, compiling

P = ParamSpec("P")
R = TypeVar("R")

ZERO = cast(int, np.int64(0))
"""0 for a counter that is passed on: a literal would have numba compile what takes it once more."""
_DIGEST = 32
_UNUSED_S = 60 * 86400.0
_TOUCH_S = 86400.0
_CONSTANTS = (bool, int, float, complex, str, bytes, tuple, frozenset, type(None), np.generic, np.dtype)


def njit(function: Callable[P, R]) -> Callable[P, R]:
    """numba.njit without the interpreter, releasing the GIL, kept on disk; keeps the signature for type checkers. A
    division by zero gives what it gives in NumPy."""
    return compiled(function, error_model="numpy", no_cfunc_wrapper=True)


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """`njit` for what makes no array, text or list: it works on arrays that its caller holds, and counts no references
    to them. That saves a third of its compilation, and the atomic instructions of counting. Its loops are short or
    branch, as those of schedulers do: LLVM neither unrolls nor vectorises them, and takes its first level: a search
    took 0.8 s of CPU time with that and 1.0 s with the third, and compiling it 0.5 s less (measured on an AMD EPYC)."""
    return compiled(function, error_model="numpy", no_cfunc_wrapper=True, _nrt=False, pipeline_class=_KernelCompiler)


def inner(function: Callable[P, R]) -> Callable[P, R]:
    """`kernel` for what only kernels call: it is optimised and made machine code within each of them, so it has no door
    from Python (a call from there is a TypeError) and is not kept by itself."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    made: Any = numba.njit(nogil=True, error_model="numpy", pipeline_class=_InnerCompiler, **options)(function)
    if isinstance(made, Dispatcher):
        made.__class__ = _Inner
    result: Callable[P, R] = made
    return result


class _Inner(CPUDispatcher):  # type: ignore[misc]
    """A function without a door: numba's own call of one would end the process."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{self.py_func.__qualname__} is called by compiled functions only; use its .py_func.")

    def add_overload(self, made: Any) -> None:
        self.overloads[tuple(made.signature.args)] = made


class _KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A function that LLVM optimises once, with all that it calls."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        tuning = llvm.create_pipeline_tuning_options(1)
        tuning.loop_unrolling = tuning.loop_vectorization = tuning.slp_vectorization = False
        passes = llvm.create_pass_builder(self._codegen._tm, tuning)
        passes.getModulePassManager().run(self._final_module, passes)


class _InnerLibrary(_KernelLibrary):
    """A function that is only linked into others."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


class _KernelCompiler(Compiler):  # type: ignore[misc]
    library = _KernelLibrary

    def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
        library = self.library(target.codegen(), "kernel")
        library.enable_object_caching()
        super().__init__(typing, target, library, *rest)


class _InnerCompiler(_KernelCompiler):
    library = _InnerLibrary

    def _compile_core(self) -> Any:
        self.state.flags.no_compile = True
        made = super()._compile_core()._replace(entry_point=object())  # no door, but the name that callers link it by
        self.state.targetctx.insert_user_function(made.entry_point, made.fndesc, [made.library])
        return made


def plain(array: npt.ArrayLike, dtype: npt.DTypeLike) -> np.ndarray:
    """`array` as compiled functions take it: contiguous, writeable and of one dtype, so that each is compiled once."""
    made: np.ndarray = np.require(array, dtype, ("C", "W"))
    return made


def compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    """`njit` with more of numba's options."""
    made: Any = numba.njit(nogil=True, **options)(function)
    if isinstance(made, Dispatcher):
        setattr(made, "_cache", _Kept(made.py_func, options.get("_nrt", True)))  # noqa: B010 - no public way in
    result: Callable[P, R] = made
    return result


class _Kept(NullCache):  # type: ignore[misc]
    """numba's protocol of a cache, for one function; one file a signature."""

    def __init__(self, function: Any, counts: bool) -> None:
        self._function, self._on = function, True
        self._counts = counts  # references: it calls numba's runtime

    @property
    def cache_path(self) -> str:
        return str(_folder() or cache.user_folder() / "compiled")

    def enable(self) -> None:
        self._on = True

    def disable(self) -> None:
        self._on = False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled signature, None where it is not kept, or its file is damaged."""
        if self._counts:
            target_context.refresh()  # it imports all that compiling needs; a kernel that is read needs none of it
        if self._on:
            key = self._key(sig, target_context.codegen())
            payload = _read(self._place(key), key)
            if payload is not None:
                return CompileResult._rebuild(target_context, *payload)
        compiling.begin(self._function.__qualname__.rpartition(".")[2])
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled signature, unless it holds addresses of this process."""
        if not self._on or data.library.has_dynamic_globals or any(not part.can_cache for part in data.lifted):
            return
        key = self._key(sig, data.codegen)
        path = self._place(key)
        body = dumps((key, data._reduce()))
        with cache.keeping("compiled functions", path):
            cache.write_atomically(path, hashlib.blake2b(body, digest_size=_DIGEST).digest() + body)
            _prune(path.parent)

    def _key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        given = sig if isinstance(sig, tuple) else sig.args
        return (sig, codegen.magic_tuple(), (_made_from(self._function), *_field_names(given)))

    def _place(self, key: tuple[Any, ...]) -> Path:
        sig, target, sources = key
        digest = hashlib.blake2b(repr((str(sig), target, sources)).encode(), digest_size=12).hexdigest()
        module = self._function.__module__.rpartition(".")[2]
        name = f"{module}.{self._function.__name__}-{digest}.bin"
        return cache.place("compiled", name, root=_folder())


def _folder() -> Path | None:
    """The folder that numba's own setting asks for, if it is set."""
    return Path(numba.config.CACHE_DIR) / "taskgraph" if numba.config.CACHE_DIR else None


def _read(path: Path, key: tuple[Any, ...]) -> Any:
    """What is kept in `path` for `key`; None for no file, one that cannot be read, one that is damaged or foreign."""
    try:
        content = path.read_bytes()
        if time.time() - path.stat().st_mtime > _TOUCH_S:
            os.utime(path)
    except OSError:
        return None
    digest, body = content[:_DIGEST], content[_DIGEST:]
    if hashlib.blake2b(body, digest_size=_DIGEST).digest() != digest:
        return None
    try:
        found, payload = pickle.loads(body)
    except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, IndexError, TypeError, ValueError):
        return None  # whole, but of a program that has another shape by now
    return payload if found == key else None


@memo
def _prune(folder: Path) -> None:
    """Delete what nobody has used for long; once a process."""
    old = time.time() - _UNUSED_S
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < old:
                path.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was faster
            continue


# -- what a compiled function is made from ---------------------------------------------------------------------------


def _made_from(function: Any) -> str:
    """A digest of the versions, of the sources of `function` and all that it calls, and of the constants they read."""
    versions = (sys.version_info[:3], numba.__version__, llvmlite.__version__, np.__version__)
    digest = hashlib.blake2b(repr(versions).encode(), digest_size=16)
    modules = {__name__}  # how it is compiled
    constants: set[str] = set()
    seen: set[Any] = set()
    waiting = [function]
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        modules.add(each.__module__)
        for name, value in _reads(each):
            inner = getattr(value, "py_func", getattr(value, "_defn", None))  # a compiled function; an intrinsic
            if isinstance(inner, FunctionType):
                waiting.append(inner)
            elif isinstance(value, np.ndarray):
                constants.add(f"{name}={hashlib.sha256(value.tobytes()).hexdigest()}")
            elif isinstance(value, _CONSTANTS):
                constants.add(f"{each.__module__}.{name}={value!r}")
            elif isinstance(value, (FunctionType, type)):
                modules.add(value.__module__)
    packages = {function.__module__.partition(".")[0], __name__.partition(".")[0]}
    for module in sorted(name for name in modules if name.partition(".")[0] in packages):
        digest.update(_source(module))
    for text in sorted(constants):
        digest.update(text.encode())
    return digest.hexdigest()


def _field_names(given: Iterable[Any]) -> Iterator[str]:
    """The fields of named tuples among the types: numba calls such a type by its class and its fields' types alone."""
    for each in given:
        if isinstance(each, BaseTuple):
            yield from (f"{each.instance_class.__name__}.{name}" for name in getattr(each, "fields", ()))
            yield from _field_names(each.types)


def _reads(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The globals, the attributes of modules and the enclosed variables that a function may read, by name."""
    names = set(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            if value.__name__.partition(".")[0] == function.__module__.partition(".")[0]:
                yield from ((each, getattr(value, each)) for each in names if hasattr(value, each))
        elif value is not None:
            yield name, value
    cells = function.__closure__ or ()
    yield from zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


@memo
def _source(module: str) -> bytes:
    """A digest of a module's source, wherever its loader has it: in a folder or in an archive."""
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None) or ""
    read = getattr(getattr(found, "__loader__", None), "get_data", None)
    try:
        content: bytes = read(file) if read is not None else Path(file).read_bytes()
    except OSError:
        content = repr(time.time_ns()).encode()  # no source to tell versions apart: only this process believes it
    return hashlib.blake2b(content).digest()
