"""The first plan of a fresh environment: what is compiled, for how long; and what the same command takes when warm."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from benchmarks import count, machine, measured_main, one_line, seconds_of

EPILOG = """\
Every process runs apart, with a cache folder that is empty at first: the cold plan fills it, and the command
`taskgraph plan` is timed on what it left. A function's seconds are CPU seconds without those of what it calls.

example:
  python -m benchmarks.cold_start --model llama-3-8b --batch 64 --json
"""
INSIDE = "--inside"
_UNUSUAL = ("NUMBA_CACHE_DIR", "PYTHONDONTWRITEBYTECODE")
"""Settings that would keep the processes from keeping what a user's do."""


class Compilations:
    """CPU seconds of each function that numba compiles from now on, without those that it waits for."""

    def __init__(self) -> None:
        from numba.core import event

        self.seconds: dict[str, float] = {}
        self.number = 0
        self._running = threading.local()
        listener = type("Listener", (event.Listener,), {"on_start": self._start, "on_end": self._end})
        event.register("numba:compile", listener())

    def _start(self, _: Any) -> None:
        stack = self._running.__dict__.setdefault("stack", [])
        stack.append((time.thread_time(), 0.0))

    def _end(self, ended: Any) -> None:
        stack = self._running.stack
        begin, within = stack.pop()
        took = time.thread_time() - begin
        if stack:
            stack[-1] = (stack[-1][0], stack[-1][1] + took)
        function = ended.data["dispatcher"].py_func
        name = f"{function.__module__.removeprefix('taskgraph.')}.{function.__name__}"
        self.seconds[name] = self.seconds.get(name, 0.0) + took - within
        self.number += 1


def inside(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: import and plan once."""
    begin = time.perf_counter()
    import taskgraph as tg
    from taskgraph.models.config import load_config
    from taskgraph.models.llama import step_graph

    import_s = time.perf_counter() - begin
    compiled = Compilations()
    graph = step_graph(load_config(args.model), batch=args.batch, tokens=1, cache=args.context)
    busy = time.process_time()
    plan_s = seconds_of(lambda: tg.plan(graph, args.device))
    return {
        "import_seconds": import_s,
        "plan_seconds": plan_s,
        "plan_cpu_seconds": time.process_time() - busy,
        "compilations": compiled.number,
        "compile_cpu_seconds": sum(compiled.seconds.values()),
        "by_function": dict(sorted(compiled.seconds.items(), key=lambda pair: -pair[1])),
    }


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of one model, in seconds."""
    asked = ["--model", args.model, "--device", args.device, "--batch", str(args.batch), "--context", str(args.context)]
    with tempfile.TemporaryDirectory() as folder:
        here = {name: value for name, value in os.environ.items() if name not in _UNUSUAL}
        here |= {"XDG_CACHE_HOME": folder}

        def output(*command: str) -> str:
            ran = subprocess.run([sys.executable, *command], env=here, check=True, capture_output=True, text=True)
            return ran.stdout

        say("the first plan, with an empty cache")
        result: dict[str, Any] = json.loads(output("-m", "benchmarks.cold_start", INSIDE, *asked).splitlines()[-1])
        say("warm")
        command = ("-m", "taskgraph.cli", "plan", args.model, *asked[2:])
        output(*command)
        warm = [seconds_of(lambda: output(*command)) for _ in range(args.rounds)]
        clock = "import time; t = time.perf_counter(); import taskgraph; print(time.perf_counter() - t)"
        imports = [float(output("-c", clock)) for _ in range(args.rounds)]
    result |= {"warm_command_seconds": statistics.median(warm), "import_taskgraph_seconds": statistics.median(imports)}
    return result | {"model": args.model, "device": args.device, "machine": machine()}


def table_of(result: dict[str, Any]) -> Table:
    """The longest compilations, and the sums."""
    table = Table(title=f"first plan of {result['model']} for {result['device']} (measured)", caption=result["machine"])
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_row("import of all that planning needs", f"{result['import_seconds']:.2f}")
    table.add_row("tg.plan, cold", f"{result['plan_seconds']:.2f}")
    table.add_row(f"of it CPU in {result['compilations']} compilations", f"{result['compile_cpu_seconds']:.2f}")
    for name, seconds in list(result["by_function"].items())[:12]:
        table.add_row(f"  {name}", f"{seconds:.2f}")
    table.add_row("taskgraph plan, warm, whole process", f"{result['warm_command_seconds']:.2f}")
    table.add_row("import taskgraph", f"{result['import_taskgraph_seconds']:.4f}")
    return table


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        "benchmarks.cold_start",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="llama-3-8b", help="a known size (default llama-3-8b)")
    parser.add_argument("--device", default="h100_sxm", help="device to plan for (default h100_sxm)")
    parser.add_argument("--batch", type=count, default=64, help="sequences (default 64)")
    parser.add_argument("--context", type=count, default=1024, help="tokens of each in its cache (default 1024)")
    parser.add_argument("--rounds", type=count, default=3, help="warm processes (default 3)")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    if INSIDE in (sys.argv if argv is None else argv):
        print(json.dumps(inside(parser.parse_args(argv))))
        return 0
    return measured_main(parser, argv, measure, table_of, 100)


if __name__ == "__main__":
    sys.exit(main())
