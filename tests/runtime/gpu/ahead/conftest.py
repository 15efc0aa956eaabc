"""The interpreter that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.runtime.gpu.ahead.interpreted import Interpret, interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpret]:
    """Runs jobs in a process whose Triton interprets."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'taskgraph-gpu[kernels]'")
    with interpreter() as run:
        yield run
