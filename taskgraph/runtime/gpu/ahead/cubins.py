"""Triton functions as cubins: compiled for an architecture without a GPU, kept on disk, with what a launch must know.

A cubin that is kept needs no Triton. PTX is never kept: that of a newer Triton is refused by an older driver.
"""

import hashlib
import json
import re
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, Final

import numpy as np

from taskgraph import cache, compiling
from taskgraph.errors import BackendUnavailable

Constant = int | float | bool | str | None
ITEMSIZE: Final[Mapping[str, int]] = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}
"""Bytes of what is passed by value, by Triton's names."""
_OWN_PARAMETERS = 2
"""Pointers that Triton appends to the parameters of every kernel: global scratch and profile scratch."""
_OLDEST = 80
"""Triton compiles for compute capability 8.0 and later (README of triton-lang/triton, "Compatibility")."""
_JIT = Path(__file__).parent / "jit"
_compiling = threading.RLock()


@dataclass(frozen=True, slots=True)
class Specialisation:
    """A Triton function for certain types and constants: what one cubin is made of.

    `function` is "module:name". `types` are its parameters that a launch passes, in order, each with Triton's name of
    its type: "i32", "fp32", "*bf16"; a pointer to memory that is known to begin at a multiple of 16 bytes is
    "*bf16:16". `constants` are its other parameters. A block has 32 * `warps` threads; loops that load are pipelined
    over `stages`. `scratch_bytes` is what a launch gives every block of it for tensor descriptors."""

    function: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...] = ()
    warps: int = 4
    stages: int = 3
    scratch_bytes: int = 0

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return self.function.partition(":")[2]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each parameter that a launch passes."""
        return tuple(8 if kind.startswith("*") else ITEMSIZE[kind] for _, kind in self.types)

    def describe(self) -> str:
        """One line for people."""
        constants = ", ".join(f"{name}={value}" for name, value in self.constants if value is not None)
        return f"{self.name}({constants})"


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled kernel: its code and what a launch of it must know. `shared_bytes` is dynamic shared memory a block;
    `stack_bytes` of a thread are where registers are spilled to; `parameters` are the bytes of each. `dependent`: it
    waits for the kernel before it, before it touches memory (`waits_first`)."""

    name: str
    arch: str
    triton: str
    warps: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    scratch_bytes: int
    parameters: tuple[int, ...]
    dependent: bool
    code: bytes


def architecture(name: str) -> int:
    """The number of "sm_90"; BackendUnavailable for what Triton does not compile for."""
    found = re.fullmatch(r"sm_(\d{2,3})a?", name)
    if found is None or int(found[1]) < _OLDEST:
        raise BackendUnavailable(f"{name!r} is no architecture that Triton compiles for; give sm_80, sm_90 or sm_100.")
    return int(found[1])


@lru_cache(maxsize=1)
def triton_version() -> str:
    """The installed Triton's version, "" without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def obtainable(spec: Specialisation, arch: str) -> bool:
    """Whether there is a cubin, or a Triton that makes it."""
    return bool(triton_version()) or _kept_before(spec, arch, str(cache.user_folder()))


@lru_cache(maxsize=4096)
def _kept_before(spec: Specialisation, arch: str, folder: str) -> bool:
    """Whether the cubin was kept in `folder` when this process first asked."""
    return kept(spec, arch) is not None


def obtain(spec: Specialisation, arch: str) -> Cubin:
    """The cubin of `spec` for "sm_90", say: the one that is kept, or else compiled now, which takes a second or so.

    BackendUnavailable where it is neither kept nor Triton installed, and for what Triton cannot compile."""
    with _compiling:
        found = kept(spec, arch)
        if found is None:
            compiling.begin(spec.name)
            found = _compiled(spec, arch)
            _keep(spec, found)
        return found


def place(spec: Specialisation, arch: str, version: str) -> Path:
    """Where the record of a cubin is kept; the code lies beside it."""
    digest = hashlib.blake2b(repr((spec, arch)).encode(), digest_size=12)
    digest.update(_sources(spec.function.partition(":")[0]))
    return cache.place("cubin", f"{spec.name}-{digest.hexdigest()}.{arch}.triton-{version}.json")


def kept(spec: Specialisation, arch: str) -> Cubin | None:
    """The cubin from the cache, None if there is none or it is damaged. Without Triton that of any version will do."""
    version = triton_version()
    record = place(spec, arch, version or "none")
    if version:
        return _read(record)
    others = sorted(record.parent.glob(record.name.replace("triton-none", "triton-*")))
    return next((found for path in reversed(others) if (found := _read(path)) is not None), None)


@lru_cache(maxsize=64)
def _sources(module: str) -> bytes:
    """A digest of the module's file and of all of our own functions, which it may call."""
    found = util.find_spec(module)
    if found is None or found.origin is None:
        raise BackendUnavailable(f"the module {module!r} of a Triton kernel does not exist.")
    digest = hashlib.blake2b(digest_size=16)
    for path in (Path(found.origin), *sorted(_JIT.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.digest()


def _read(record: Path) -> Cubin | None:
    try:
        told = json.loads(record.read_text())
        code = record.with_suffix(".cubin").read_bytes()
        if told.pop("digest") != _digest(code):
            return None
        return Cubin(**{**told, "parameters": tuple(told["parameters"])}, code=code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(spec: Specialisation, made: Cubin) -> None:
    record = place(spec, made.arch, made.triton)
    told = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "code"} | {"digest": _digest(made.code)}
    with cache.keeping("compiled kernels", record):
        cache.write_atomically(record.with_suffix(".cubin"), made.code)
        cache.write_atomically(record, json.dumps(told))


def _digest(code: bytes) -> str:
    return hashlib.blake2b(code, digest_size=16).hexdigest()


# ---------------------------------------------------------------------------------------------- compilation


def _compiled(spec: Specialisation, arch: str) -> Cubin:
    number = architecture(arch)
    if not triton_version():
        raise BackendUnavailable(
            f"the kernel {spec.describe()} is not compiled for {arch} yet and Triton is not installed; "
            "pip install 'taskgraph-gpu[kernels]'."
        )
    made = assembled(spec, number)
    told, code = made.metadata, made.asm["cubin"]
    if told.profile_scratch_size or told.num_ctas != 1:
        raise BackendUnavailable(f"the kernel {spec.describe()} is one for Triton's profiler or of clusters.")
    registers, stack = _resources(code)
    return Cubin(
        name=told.name,
        arch=arch,
        triton=triton_version(),
        warps=told.num_warps,
        shared_bytes=told.shared,
        registers=registers,
        stack_bytes=stack,
        scratch_bytes=told.global_scratch_size,
        parameters=_parameters(made.asm["ptx"]),
        dependent=waits_first(made.asm["ptx"]),
        code=code,
    )


def assembled(spec: Specialisation, arch: int) -> Any:
    """What Triton makes of `spec`, with all stages as text in `asm`; nothing is read from a cache or kept.
    BackendUnavailable with Triton's words where it cannot."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = _function(spec)
    types, constants = dict(spec.types), dict(spec.constants)
    if set(function.arg_names) != {*types, *constants} or [n for n in function.arg_names if n in types] != [*types]:
        raise BackendUnavailable(
            f"the parameters of {spec.function} are {', '.join(function.arg_names)}; the launch has "
            f"{', '.join((*types, *constants))}."
        )
    signature = {name: types.get(name, "constexpr").partition(":")[0] for name in function.arg_names}
    aligned = [function.arg_names.index(name) for name, kind in types.items() if kind.endswith(":16")]
    source = ASTSource(function, signature, constants, {(place,): [["tt.divisibility", 16]] for place in aligned})
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True}
    target = import_module("taskgraph.runtime.gpu.ahead.jit.dependent").target
    with _compiling, _no_cache(), warnings.catch_warnings():
        before = target.set(arch)
        warnings.simplefilter("ignore")
        try:
            return compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        except Exception as error:  # Triton has no base of its errors
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise BackendUnavailable(f"Triton cannot compile {spec.describe()} for sm_{arch}: {told}") from error
        finally:
            target.reset(before)


def _function(spec: Specialisation) -> Any:
    module, _, name = spec.function.partition(":")
    function = getattr(import_module(module), name, None)
    if not hasattr(function, "arg_names"):
        raise BackendUnavailable(f"{spec.function} is no function of triton.jit.")
    return function


@contextmanager
def _no_cache() -> Iterator[None]:
    """Triton's own cache, which would hold everything twice, in a folder that goes."""
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="taskgraph-triton-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def _parameters(ptx: str) -> tuple[int, ...]:
    """Bytes of the parameters of the entry of a PTX text."""
    head = ptx[ptx.index(".entry") :].partition(")")[0]
    return tuple(int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head))


_NOT_BEFORE = re.compile(
    r"^\s*(@!?%\w+\s+)?(bra|brx|call|ret|exit|ldu?|st|atom|red|cp|prefetchu?|tensormap|tex|suld|sust|multimem)\b"
    r"(?!(\.volatile|\.relaxed)?\.(param|shared|local))",
    re.MULTILINE,
)
"""Instructions that branch, end a thread, or may touch memory that other blocks see (PTX ISA)."""


def waits_first(ptx: str) -> bool:
    """Whether every thread of the entry of a PTX text waits for the kernel before it (griddepcontrol.wait) before it
    touches memory that others see: then it may be launched while that kernel runs."""
    body = ptx[ptx.index(".entry") :].partition("{")[2]
    before, waits, _ = body.partition("griddepcontrol.wait")
    return bool(waits) and not _NOT_BEFORE.search(before)


def _resources(code: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as cuobjdump, which Triton brings, reads them from a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise BackendUnavailable(f"cuobjdump says nothing of registers: {text!r}")
    return int(found[1]), int(found[2])


# ------------------------------------------------------------------------------------------------ checking


def check_arguments(spec: Specialisation, cubin: Cubin, args: Sequence[Any]) -> None:
    """BackendUnavailable unless the arguments are those that the cubin was compiled for, in number and size."""
    given = tuple(int(a.dtype.itemsize) if isinstance(a, np.generic) else 8 for a in args)
    wanted = cubin.parameters[:-_OWN_PARAMETERS]
    if not given == wanted == spec.sizes or cubin.warps != spec.warps:
        raise BackendUnavailable(
            f"the kernel {spec.describe()} takes parameters of {wanted} bytes and {cubin.warps} warps; the launch "
            f"gives {given} and {spec.warps}. This is a bug of its rule."
        )
    if cubin.scratch_bytes > spec.scratch_bytes:
        raise BackendUnavailable(
            f"the kernel {spec.describe()} needs {cubin.scratch_bytes} bytes of scratch a block; the launch gives "
            f"{spec.scratch_bytes}. This is a bug of its rule."
        )


def as_json(cubin: Cubin) -> dict[str, Any]:
    """Everything but the code, for reports."""
    told = asdict(cubin)
    del told["code"]
    return told
