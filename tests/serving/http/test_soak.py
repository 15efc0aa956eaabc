"""The soak, for a few seconds: hostile requests, clients that leave, pre-emptions; nothing lost, nothing left."""

import pytest

from benchmarks.soak import run


@pytest.mark.slow
def test_a_short_soak_loses_nothing_and_leaves_nothing() -> None:
    report = run(seconds=4.0, clients=8)
    assert report["wrong"] == [] and report["lost"] == 0
    assert report["engine"]["pages_left"] == 0 and report["engine"]["preemptions"] > 0
    assert (report["exit"], report["stderr"]) == (0, "")
    assert report["seen"]["whole"] and report["seen"]["streamed"] and report["seen"]["hostile 400"]
