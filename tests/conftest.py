"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from taskgraph.models.hub import smollm2_path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of the cached SmolLM2 GGUF, fetched on first use (marker `model`)."""
    return smollm2_path()
