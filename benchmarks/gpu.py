"""One run on a GPU: is it right, how fast are its kernels, do products follow their SMs, what does the engine reach."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import gpu_sections, machine, one_line, positive, print_json
from benchmarks.gpu_sections import SECTIONS, Asked
from taskgraph.runtime.gpu.driver import probe

VIRTUAL = "virtual:h100_sxm"
CHILD = (sys.executable, "-m", "benchmarks.gpu_sections")
GRACE_S = 10.0
"""Seconds beyond its time after which a section's process is ended."""
EPILOG = f"""\
Sections, each within its time and, on a real GPU, in a process of its own; what fails or is cut off is told in
"sections", and the others go on:

  checks        every op kind against the cpu backend on this device, by gpu-check's own checks
  kernels       every kernel of a step: seconds, rate, share of what the published rates allow, and what ran it
  products      the four products of an 8B layer by SMs: cuBLAS's ("library") and our own persistent ones ("own");
                "of_full" is speed over that of the whole device by the library; the aim on 96 of 132 SMs is 0.70
  gaps          small kernels in a chain: begun at the end of the one before, or while it runs (dependent launches)
  tiles         our own products on 96 SMs by every tile shape that fits (real GPUs)
  engine        Llama-3.2-1B shapes with random weights: 256 sequences of 256 tokens in and 64 out; step_s is the
                median decode step, replay_s the graph alone
  transformers  generate() on the same model and lengths, on this device
  vllm          the same, where vLLM is installed

Without a GPU it runs on the virtual driver ({VIRTUAL}) and says "simulated": then times are those of the cost model,
kernels of much memory are left out, the engine serves a tiny model, and transformers runs that on the CPU, which is
measured and no comparison.

examples:
  python -m benchmarks.gpu --json
  python -m benchmarks.gpu --minutes 4 --out gpu.json         # a real GPU: all sections, result kept
  python -m benchmarks.gpu --only kernels products
"""


def in_process(name: str, asked: Asked, keep: Callable[[Mapping[str, Any]], None]) -> str:
    """Run a section here; what it found so far goes to `keep`. How it ended."""
    try:
        for found in SECTIONS[name].run(asked):
            keep(found)
    except Exception as error:  # a section that breaks must not take the others with it
        return " ".join(f"failed: {type(error).__name__}: {error}".split())[:500]
    return "done"


def in_child(name: str, asked: Asked, keep: Callable[[Mapping[str, Any]], None]) -> str:
    """The same in a process of its own, which is ended when its time is over. Its last whole line is what it found."""
    command = [*CHILD, name, "--seconds", f"{asked.seconds:g}"]
    command += ["--device", asked.device] if asked.device else []
    with tempfile.TemporaryFile("w+") as out:
        try:
            code = subprocess.run(command, check=False, stdout=out, timeout=asked.seconds + GRACE_S).returncode
            ended = "done" if code == 0 else f"failed: exit {code}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {asked.seconds:.0f} s"
        out.seek(0)
        for line in out.read().split("\n")[:-1]:
            said = json.loads(line)
            ended = said.get("failed", ended)
            keep(said.get("found", {}))
    return ended


def measure(asked: Asked, names: Sequence[str], minutes: float, say: Callable[[str], None]) -> dict[str, Any]:
    """All sections one after another; what one leaves of its time goes to those behind it."""
    begin, end = time.monotonic(), time.monotonic() + 60.0 * minutes
    found: dict[str, Any] = {
        "kind": "simulated" if asked.virtual else "measured", **gpu_sections.about(asked), "machine": machine(),
        "kernels": {}, "products": {}, "gaps": {}, "engine": dict.fromkeys(gpu_sections.ENGINE_KEYS), "sections": {},
    }  # fmt: skip
    for i, name in enumerate(names):
        left = max(end - time.monotonic(), 1.0)
        share = SECTIONS[name].weight / sum(SECTIONS[other].weight for other in names[i:])
        given = asked.within(left * share)
        say(f"{name} ({given.seconds:.0f} s)")

        def keep(made: Mapping[str, Any]) -> None:
            for key, value in made.items():
                found[key] = {**found.get(key, {}), **value}

        ended = (in_process if asked.virtual else in_child)(name, given, keep)
        found["sections"][name] = ended
        say(f"{name}: {ended}")
    found["seconds"] = round(time.monotonic() - begin, 1)
    return found


def table(found: Mapping[str, Any]) -> Table:
    """For people."""
    made = Table("what", "value", "by", title=f"{found['device']} ({found['kind']})")
    for name, row in found["kernels"].items():
        made.add_row(
            name,
            f"{row['seconds'] * 1e6:.1f} us, {row['rate']}, {row['share']:.2f} of what {row['limit']} allows",
            row["by"],
        )
    for name, choices in found["products"].items():
        for choice, row in choices.items():
            speeds = ", ".join(f"{sms}: {share:.2f}" for sms, share in row["of_full"].items())
            made.add_row(name, f"speed of the whole device's by SMs: {speeds}", choice)
    for name, row in found["gaps"].items():
        both = f"{row['after_end_s'] * 1e6:.2f} us after the end, {row['dependent_s'] * 1e6:.2f} us dependent"
        made.add_row(f"chain of {name}", f"{both}: {row['saved_s'] * 1e6:.2f} us less", "")
    for name, value in found["engine"].items():
        made.add_row(f"engine {name}", f"{value:.5g}" if isinstance(value, float) else str(value), "")
    for name, ended in found["sections"].items():
        made.add_row(f"section {name}", ended, "")
    return made


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=positive, default=4.0, help="the whole run takes at most about so long")
    parser.add_argument(
        "--only", nargs="+", choices=[*SECTIONS], metavar="SECTION", help=f"some of {', '.join(SECTIONS)}"
    )
    parser.add_argument("--device", help=f"a virtual device, {VIRTUAL} say (default: the GPU here, else that)")
    parser.add_argument("--out", type=argparse.FileType("w"), help="also write the JSON to this file")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on the last line")
    args = parser.parse_args(argv)
    device = args.device or (None if probe().available else VIRTUAL)
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {text}", file=sys.stderr, flush=True)

    found = measure(Asked(device, 60.0 * args.minutes), args.only or [*SECTIONS], args.minutes, say)
    Console(width=max(Console().width, 110)).print(table(found))
    if args.out:
        args.out.write(json.dumps(found, indent=1) + "\n")
        args.out.close()
    if args.json:
        print_json(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
