"""Fixtures that several test files share."""

import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from taskgraph.models.hub import smollm2_path

Call = Callable[..., Any]

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(  # for `make mutants`: to know that a test fails is enough
    "mutants", settings.get_profile("any machine"), phases=(Phase.explicit, Phase.generate), database=None
)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of the cached SmolLM2 GGUF, fetched on first use (marker `model`)."""
    return smollm2_path()


@contextmanager
def virtual_process(device: Any = "virtual:h100_sxm", **changes: Any) -> Iterator[Call]:
    """A process whose CUDA driver is the virtual one: call(function, *args) runs there and gives result or error."""
    from taskgraph.runtime.gpu import virtual

    virtual.driver_library(), virtual.kernel_library()  # built here, so that a missing compiler says so
    context = multiprocessing.get_context("forkserver")  # imports once, before any driver is loaded
    context.set_forkserver_preload(
        ["torch", "pytest", "taskgraph.runtime.gpu.executable", "cuda.core", "benchmarks.capture_rules"]
    )
    with ProcessPoolExecutor(1, context, initializer=_load, initargs=(device, changes)) as pool:
        yield lambda function, *args: pool.submit(_called, function, *args).result()


def _called(function: Call, *args: Any) -> Any:
    """The result; what pytest raises in the child goes back as an AssertionError, which can be pickled."""
    try:
        return function(*args)
    except pytest.fail.Exception as error:
        raise AssertionError(str(error)) from None


def _load(device: Any, changes: dict[str, Any]) -> None:
    from taskgraph.runtime.gpu import virtual

    virtual.load(device, **changes)


@pytest.fixture(scope="session")
def on_virtual() -> Iterator[Call]:
    """One process on the virtual H100 for all tests that leave it as they found it."""
    with virtual_process() as call:
        yield call


@pytest.fixture(scope="module", autouse=True)
def compiled_modules_are_let_go() -> Iterator[None]:
    """After each file, what torch.compile made for it: Dynamo keeps it, and with it lanes and packed weights."""
    yield
    dynamo = sys.modules.get("taskgraph.embed.dynamo")
    if dynamo is None:
        return
    import torch

    torch._dynamo.reset()
    for compiled in list(dynamo.ALL):
        for variant in compiled.variants.values():
            for captured in (variant.captured, variant.rival):
                if captured is not None:
                    captured.close()
        compiled.variants.clear()
    dynamo.ALL.clear()
    gc.collect()
