"""explain_tuned(): what autotune tried and why it chose, as text for a terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from taskgraph.errors import PlanError
from taskgraph.observe.explain import measured_seconds, remark, text_console
from taskgraph.record import instance
from taskgraph.tune.autotune import Trial, Tuned
from taskgraph.units import format_seconds

_WIDTH = 120


def explain_tuned(tuned: Tuned, color: bool = False) -> str:
    """Every candidate with its predicted time and the time it took, then the choice and its reason."""
    instance("tuned", tuned, Tuned, PlanError, "Take what taskgraph.autotune returned.")
    console, text = text_console(_WIDTH, color)
    console.print(Text(f"graph {tuned.plan.graph_name}, device {tuned.plan.device.name}", style="bold"))
    console.print(Text(f"times {tuned.kind}: {tuned.origin or tuned.plan.timeline.origin}", style="dim"))
    console.print(_table(tuned))
    style = "green" if tuned.verdict.choice == "packed" else "yellow"
    console.print(Text(tuned.reason, style=style))
    took_s = measured_seconds(tuned.plan)
    if took_s is not None and (said := remark(tuned.plan, took_s)):
        console.print(Text(f"note: {said}", style="yellow"))
    console.print(Text(_ending(tuned), style="dim"))
    return text()


def _table(tuned: Tuned) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("candidate", overflow="fold")
    for name in ("lanes", "SMs", "predicted", tuned.kind, "sequential", "gain", "noise", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in tuned.trials:
        table.add_row(*_row(trial), style="bold" if trial.wins else "")
    return table


def _row(trial: Trial) -> tuple[str, ...]:
    name = trial.made_by if trial.session.startswith("pass") else f"{trial.made_by} ({trial.session})"
    sizes = "+".join(map(str, trial.partitions))
    head = (name, str(trial.lanes), sizes, format_seconds(trial.predicted_s))
    if trial.measured_s is None or trial.sequential_s is None:
        return (*head, "not run", "", "", "", "")
    gain = f"{trial.sequential_s / trial.measured_s:.2f}x"
    times = (format_seconds(trial.measured_s), format_seconds(trial.sequential_s))
    return (*head, *times, gain, f"{trial.noise:.1%}", str(trial.repeats))


def _ending(tuned: Tuned) -> str:
    if tuned.remembered:
        return "remembered from an earlier run on this machine; fresh=True measures anew"
    return f"{tuned.op_times} op times recorded; {format_seconds(tuned.seconds)} in all"
