"""`hf-lsam monitor`: shows a run in the terminal, during or after it, from the run's record and nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..record import BYTES, Record, RecordReader, worker_state

RATE_POINTS = 6  # log points over which a rate is taken
PIPE_WIDTH = 120  # columns, if there is no terminal to ask
# A live process that has not logged for this many of its usual intervals, and seconds, is shown as silent.
SILENT_INTERVALS, SILENT_SECONDS = 10, 60.0

GOES_ON = ("training", "waiting", "away")
STYLES = {"training": "green", "finished": "cyan", "failed": "red", "dead": "red", "silent": "yellow"}


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--once", is_flag=True, help="Print one plain snapshot and end.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between looks."
)
def monitor(run_dir: Path, once: bool, interval: float) -> None:
    """Shows a run: its workers, its anchor, its latest evaluation. Ends with the run, or with Ctrl-C.

    RUN_DIR is the run's output_dir. The monitor only reads files: it writes nothing, and contacts no process.
    """
    reader = RecordReader(run_dir)
    try:
        if once or not Console().is_terminal:
            console = Console(color_system=None, width=None if Console().is_terminal else PIPE_WIDTH)
            shown, _ = look(reader)
            console.print(shown)
            return
        with Live(auto_refresh=False) as live:
            while True:
                shown, state = look(reader)
                live.update(shown, refresh=True)
                if state not in GOES_ON:
                    return
                time.sleep(interval)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        pass  # the run goes on


def look(reader: RecordReader) -> tuple[Group, str]:
    """What is shown of the run as it is now, and its state; the processes are asked once, so that all of it agrees."""
    record = reader.read()
    states = worker_states(record)
    return render(record, states, time.time()), run_state(record, states)


def worker_states(record: Record) -> dict[int, str]:
    """The state of each worker that has begun (see `record.worker_state`), by rank."""
    return {rank: worker_state(entries) for rank, entries in record.workers.items()}


def run_state(record: Record, states: Mapping[int, str]) -> str:
    """The state of the run as a whole: "waiting" (not all workers have joined), or the most telling one of a worker."""
    for state in ("training", "dead", "failed", "away"):
        if state in states.values():
            return state
    return "finished" if len(states) == record.run["num_workers"] else "waiting"


def render(record: Record, states: Mapping[int, str], now: float) -> Group:
    """Renders what is shown.

    Args:
        states: the workers' states (see `worker_states`).
        now: the present time, in Unix seconds.
    """
    run, state = record.run, run_state(record, states)
    points = [point for rank in record.workers for point in record.points(rank, since_it_joined=True)]
    last = max((entries[-1]["time"] for entries in record.workers.values()), default=run["started"])
    ended = state not in GOES_ON
    head = Text.assemble(
        f"run {run['run_id']}: ",
        (_sentence(state, list(states.values())), f"bold {STYLES.get(state, '')}"),
        f" {'after' if ended else 'for'} {_duration((last if ended else now) - run['started'])}",
        _remaining(record) if state == "training" else "",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("worker")
    table.add_column("state")
    for name in ("step", "loss", "steps/s", "drift", "stale", "seen", "skipped", "refused", "MB out", "MB in"):
        table.add_column(name, justify="right")
    exchanged = _exchanged(record)
    for rank in range(run["num_workers"]):
        table.add_row(*_row(record, rank, states, now, exchanged.get(rank)))
    begun = datetime.fromtimestamp(run["started"])
    total = sum(map(sum, exchanged.values()))
    version = max((point["lsam/anchor_version"] for point in points), default=0)
    lines = [f"{_count(run['num_workers'], 'worker')} on {run['host']}, begun {begun:%Y-%m-%d %H:%M:%S}"]
    lines += [f"anchor: version {version:,.0f}, {_update_rate(record)} updates/s, {total / 1e6:,.1f} MB exchanged"]
    step, measured = record.latest_evaluation()
    if measured:
        figures = [f"{name} {value:.4g}" for name, value in measured.items()]
        lines.append(f"latest evaluation of the anchor, at step {step:,}: {', '.join(figures)}")
    for rank, entries in record.workers.items():
        if entries[-1].get("error"):
            lines.append(f"worker {rank} left with {entries[-1]['error']}")
    return Group(head, table, *lines)


def _exchanged(record: Record) -> dict[int, list[float]]:
    """The bytes that each worker that has logged has sent and received in the whole run, however often resumed."""
    once = record.made_once()
    lasts = {rank: points[-1] for rank in once.workers if (points := once.points(rank))}
    return {rank: [last[name] for name in BYTES] for rank, last in lasts.items()}


def _row(
    record: Record, rank: int, states: Mapping[int, str], now: float, exchanged: Sequence[float] | None
) -> list[str | Text]:
    entries = record.workers.get(rank)
    if entries is None:
        return [str(rank), "waiting", *["-"] * 10]
    points = record.points(rank, since_it_joined=True)
    state = states[rank]
    seen = now - entries[-1]["time"]
    if state == "training" and len(points) > 1 and seen > max(SILENT_SECONDS, SILENT_INTERVALS * _interval(points)):
        state = "silent"
    point = points[-1] if points else {}
    loss, stale = point.get("loss"), point.get("lsam/staleness")
    drift = next((each["lsam/drift"] for each in reversed(points) if "lsam/drift" in each), None)
    return [
        str(rank),
        Text(state, STYLES.get(state, "")),
        f"{entries[-1]['step']:,}",
        _number(loss, ".4f"),
        _number(_rate([(each["time"], each["step"]) for each in points]), ".2f"),
        _number(drift, ".4f"),
        _number(stale, ".2f"),
        f"{_duration(seen)} ago",
        _number(point.get("lsam/skipped_pushes"), ",.0f"),
        _number(point.get("lsam/refused_pushes"), ",.0f"),
        *(_number(count / 1e6, ",.1f") for count in exchanged or []),
    ]


def _sentence(state: str, states: Sequence[str]) -> str:
    if state == "away":
        state = "on another machine, whose processes cannot be seen from here"
    gone = [f"{_count(states.count(word), 'worker')} {word}" for word in ("dead", "failed") if word in states]
    finished = states.count("finished")
    if finished and state != "finished":
        gone.append(f"{_count(finished, 'worker')} finished")
    return f"{state} ({', '.join(gone)})" if gone else state


def _remaining(record: Record) -> str:
    configuration = record.run["configuration"]
    steps = configuration.get("max_steps") or -1
    shared = configuration.get("share_steps")  # then all workers end together, and each logs the steps of all
    seconds = []
    if shared:
        steps *= record.run["num_workers"]
    for rank in record.workers:
        points = record.points(rank, since_it_joined=True)
        series = [(point["time"], point["lsam/steps_of_all" if shared else "step"]) for point in points]
        rate = _rate(series)
        if rate and steps > 0:
            seconds.append((steps - series[-1][1]) / rate)
    together = " of all workers" if shared else ""
    return f", about {_duration(max(seconds))} to go of {steps:,} steps{together}" if seconds else ""


def _update_rate(record: Record) -> str:
    rates = [
        _rate([(point["time"], point["lsam/anchor_version"]) for point in record.points(rank, since_it_joined=True)])
        for rank in record.workers
    ]
    return _number(max((rate for rate in rates if rate is not None), default=None), ".2f")


def _rate(series: Sequence[tuple[float, float]]) -> float | None:
    """How much the value grows per second over the last few of the (time, value) pairs; None if there are too few."""
    (first, low), (last, high) = (series[-RATE_POINTS:][0], series[-1]) if len(series) > 1 else ((0, 0), (0, 0))
    return (high - low) / (last - first) if last > first else None


def _interval(points: Sequence[dict[str, Any]]) -> float:
    recent = points[-RATE_POINTS:]
    return median(later["time"] - earlier["time"] for earlier, later in pairwise(recent))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
