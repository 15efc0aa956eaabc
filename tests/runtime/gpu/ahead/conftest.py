"""The interpreter that the tests of this folder share."""

from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest

from tests.runtime.gpu.ahead.interpreted import Interpret, interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Runs jobs in a process whose Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'taskgraph-gpu[kernels]'")
    if metadata.version("triton").startswith("3.9.") and np.lib.NumpyVersion(np.__version__) >= "2.5.0":
        pytest.skip("the interpreter of Triton 3.9 fails with numpy 2.5: pip install 'numpy<2.5'")
    with interpreter() as run:
        yield run
