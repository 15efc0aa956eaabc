"""What compiled modules hold is let go after each file: Dynamo keeps them, and with them lanes and packed weights."""

import gc
from collections.abc import Iterator

import pytest
import torch

from taskgraph.embed import dynamo


@pytest.fixture(scope="module", autouse=True)
def let_go() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    for compiled in list(dynamo.ALL):
        for variant in compiled.variants.values():
            for captured in (variant.captured, variant.rival):
                if captured is not None:
                    captured.close()
        compiled.variants.clear()
    dynamo.ALL.clear()
    gc.collect()
