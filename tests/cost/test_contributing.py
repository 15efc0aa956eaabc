"""CONTRIBUTING's "How to add a device" and "How to add a cost family" are true: what they show is run."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import taskgraph as tg
from taskgraph.cost import families
from taskgraph.cost.calibrate import calibrate
from taskgraph.cost.fitted import Calibration, model_of, model_with
from taskgraph.cost.measurements import read
from taskgraph.cost.model import op_table, predict
from taskgraph.errors import CalibrationError
from taskgraph.graph import device as devices
from tests.test_docs import fenced

ROOT = Path(__file__).parents[2]
H100 = tg.devices.get("h100_sxm")


def section(title: str) -> str:
    found = (ROOT / "CONTRIBUTING.md").read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    for path in re.findall(r"`((?:taskgraph|tests)/[\w/.]+)`", found):
        assert (ROOT / path).exists() or path == "taskgraph/cost/families/norm.py", path
    return found


def test_a_device_is_one_entry() -> None:
    sheets = (ROOT / "taskgraph" / "graph" / "datasheets.toml").read_text()
    known = devices.read_datasheets(sheets)
    assert list(known.values()) == list(devices.iter_specs())
    entry = fenced(section("How to add a device"), "toml")
    made = devices.read_datasheets(sheets + entry)
    assert made.keys() - known.keys() == {"h100_pcie"}
    new = made["h100_pcie"]
    assert (new.sm_count, new.rate("bf16"), new.l2_bytes) == (114, 756e12, 50_000_000)
    assert new.partition_sizes() == (*range(8, 114, 8), 114)
    assert dict(new.sources)["hbm_bytes_per_s"] == "NVIDIA H100 datasheet, PCIe"
    assert dict(new.sources).keys() == dict(H100.sources).keys()
    x = normed(64, 256)
    assert op_table(x, new, (114,)).sources == ("formula, not calibrated",)


def normed(rows: int, features: int) -> tg.Graph:
    b = tg.GraphBuilder("normed")
    x, w = b.input("x", (rows, features), "bf16"), b.weight("w", (features,), "bf16")
    b.output(tg.ops.rmsnorm(x, w, name="norm"))
    return b.build()


@pytest.fixture
def norms() -> Iterator[None]:
    """The family of the section, and after the test no others than before."""
    before, rules = dict(families.FAMILIES), dict(families._RULES)
    exec(compile(fenced(section("How to add a cost family"), "python"), "CONTRIBUTING.md", "exec"), {})
    yield
    for table, kept in ((families.FAMILIES, before), (families._RULES, rules)):
        table.clear()
        table.update(kept)
    model_of.cache_clear()


def test_a_family_prices_the_ops_of_its_kinds(norms: None) -> None:
    graph, plain = normed(4096, 512), H100.launch_seconds
    kernel = families.kernel_of(graph.ops[0], graph.tensor)
    assert kernel == ("norm", "bf16", (4096, 512, 2))
    whole = predict(graph.ops[0], graph, H100)
    busy, moved = 32 * 2e-7, 2 * 4096 * 512 * 2 / (H100.hbm_bytes_per_s * 0.85)  # 32 waves of 132 rows
    launch = model_of(H100).launch_s
    assert whole.seconds - plain == pytest.approx(2.6e-6 + (busy**4 + moved**4) ** 0.25 - launch)
    times = op_table(graph, H100, range(1, 133)).seconds[0]
    assert (np.diff(times) <= 1e-9 * times[:-1]).all()
    with pytest.raises(CalibrationError, match="'norm': another family has this"):
        families.register(families.FAMILIES["norm"])


def test_a_family_is_fitted_to_a_table_of_its_columns(norms: None, tmp_path: Path) -> None:
    """Times of coefficients that we chose, with noise: calibration finds them, and a file keeps them."""
    draw = np.random.default_rng(5)
    family, spec = families.FAMILIES["norm"], model_of(H100).spec()
    shapes = np.column_stack([*np.floor(2.0 ** draw.uniform(6, 14, (2, 300))), np.full(300, 2.0)])
    truth = family.coefficients.of([4e-6, 5e-7, 0.7, 2.0])
    seconds = family.seconds(shapes, spec, truth, np.array([132.0]))[:, 0] * np.exp(0.01 * draw.standard_normal(300))
    lines = [f"h100_sxm,{r:.0f},{f:.0f},{1e3 * t:.9f}" for (r, f, _), t in zip(shapes, seconds, strict=True)]
    (tmp_path / "norms.csv").write_text("\n".join(["system,rows,features,milliseconds", *lines]) + "\n")
    (table,) = read(tmp_path / "norms.csv")
    assert table.family is family
    made = calibrate([table], H100, {"data": "made up"})
    assert made.families["norm"].coefficients == pytest.approx(
        dict(zip(truth.names(), truth.values(), strict=True)), rel=0.1
    )
    assert made.families["norm"].held_out["median"] < 0.02
    made.save(tmp_path / "norms.json")
    assert Calibration.load(tmp_path / "norms.json") == made
    part = model_with(made, H100).family("norm")
    assert part.source == "calibrated h100_sxm v1"
    np.testing.assert_allclose(part.seconds(shapes, spec, np.array([132.0]))[:, 0], seconds, rtol=0.06)
