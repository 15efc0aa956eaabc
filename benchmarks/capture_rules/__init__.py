"""Rules of CUDA that the virtual driver enforces: a table of checks, each with the source of its rule.

Every check makes calls of the driver API by cuda.bindings and looks at what comes back. The table runs in a process
whose driver is the virtual one: `python -m benchmarks.capture --json`.
"""

from benchmarks.capture_rules import capture, dependent, graphs, partitions, work
from benchmarks.capture_rules.world import RULES, Rule, World
from taskgraph.runtime.gpu import driver, virtual

__all__ = ["RULES", "Rule", "World", "capture", "check_rules", "dependent", "graphs", "partitions", "work"]


def check_rules(control: virtual.Control) -> dict[str, str]:
    """Run the table; rule -> "" or what went wrong."""
    gpu = driver.Gpu.open()
    gpu.kernel("add_f32", "elementwise")  # compiled before any capture
    results: dict[str, str] = {}
    for each in RULES:
        control.clear_log()
        world = World(gpu, control)
        try:
            each.check(world)
            results[each.name] = ""
        except Exception as error:  # any failure of a check is a result
            results[each.name] = f"{type(error).__name__}: {error}"
        finally:
            world.close()
    return results
