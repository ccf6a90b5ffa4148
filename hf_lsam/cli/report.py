"""`hf-lsam report`: one or more runs as an HTML page that needs no network."""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import click

from ..card import without_folder
from ..files import write_atomically
from ..record import BYTES, FOLDER, Record, is_metric, read_record, worker_state
from ..spread import mean_and_deviation
from .charts import Series, absent, line_chart, map_chart, number, table

# What may differ between two runs of the same experiment.
_NOT_COMPARED = {
    "seed",
    "data_seed",
    "shared_memory_dir",
    "server_address",
    "server_port",
    "num_workers",
    "landscape_points",
    "landscape_batches",
}
_OF_A_LANDSCAPE = {"batches", "batchnorm", "distances", "fractions", "lines", "plane", "strength"}
_MIB = 2**20

Points = list[tuple[float, float]]


@click.command()
@click.argument(
    "run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path, file_okay=False)
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    help="The page; one that is there is replaced.",
)
def report(run_dirs: tuple[Path, ...], output: Path) -> None:
    """Writes a report of one or more runs as a single HTML page, which opens anywhere, even without a network.

    RUN_DIR is a run's output_dir. Several runs are compared; those that differ only in the seed, as mean and spread.
    """
    try:
        page = render([read_run(run_dir) for run_dir in run_dirs])
        write_atomically(output, page)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: {len(run_dirs)} run{'' if len(run_dirs) == 1 else 's'}, {len(page) / 1000:,.0f} kB")


# --- reading ---


@dataclass(frozen=True)
class RunFacts:
    """What the page says about a run.

    Args:
        name: its folder, as it was given.
        record: see `hf_lsam.record`; evaluations and log points that a resumed run has repeated are in it only once.
        landscape: the contents of landscape.json, or None.
        results: the contents of results.json, or None.
        notes: what is missing or went wrong, in sentences.
    """

    name: str
    record: Record
    landscape: dict[str, Any] | None
    results: dict[str, Any] | None
    notes: list[str]

    @property
    def configuration(self) -> dict[str, Any]:
        """What the run was configured with, by the names of the arguments."""
        return self.record.run["configuration"]

    def metrics(self) -> list[str]:
        """The names of what evaluations measure, eval_loss first."""
        names = {key for entry in self.record.evaluations() for key, value in entry.items() if is_metric(key, value)}
        return sorted(names, key=lambda name: (name != "eval_loss", name))

    def seconds(self, entry: dict[str, Any]) -> float:
        """Seconds between the beginning of the run and `entry`; 0 for an evaluation that was made before."""
        return max(0.0, entry["time"] - self.record.run["started"])

    def mebibytes(self, entry: dict[str, Any]) -> float:
        """MiB that all workers had pushed and pulled by the time of `entry`, as far as they have logged it."""
        total = 0.0
        for times, exchanged in self._traffic:
            before = bisect_right(times, entry["time"])
            total += exchanged[before - 1] if before else 0
        return total / _MIB

    @cached_property
    def _traffic(self) -> list[tuple[list[float], list[float]]]:
        """For each worker, the times of its log points, and the bytes that it had pushed and pulled by then."""
        every = [self.record.points(rank) for rank in self.record.workers]
        return [
            ([point["time"] for point in points], [sum(point.get(name, 0) for name in BYTES) for point in points])
            for points in every
        ]


def read_run(run_dir: Path) -> RunFacts:
    """Reads everything that is known about a run.

    Raises:
        FileNotFoundError: if the folder holds no record of a run.
        ValueError: if run.json is damaged.
    """
    record = read_record(run_dir).made_once()
    notes = []
    for rank in range(record.run["num_workers"]):
        entries = record.workers.get(rank, [])
        if not entries:
            notes.append(
                f"Worker {rank} has written nothing here: it never joined, or wrote to another machine's disk."
            )
        elif (state := worker_state(entries)) != "finished":
            error = next((entry["error"] for entry in reversed(entries) if entry.get("end")), None)
            notes.append(f"Worker {rank} is {state}, not finished" + (f": {error}." if error else "."))
    landscape = _optional(run_dir / FOLDER / "landscape.json", notes)
    if landscape is not None and landscape.get("run_id") != record.run["run_id"]:
        landscape = None  # it is of an earlier run in this folder
    if landscape is not None and (lacking := sorted(_OF_A_LANDSCAPE - landscape.keys())):
        notes.append(f"landscape.json lacks {', '.join(lacking)} and was left out.")
        landscape = None
    return RunFacts(str(run_dir), record, landscape, _optional(run_dir / "results.json", notes), notes)


def _optional(path: Path, notes: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        notes.append(f"{path.name} is no JSON object and was left out.")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read and was left out ({error}).")
    return None


# --- comparing ---


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    Args:
        label: what distinguishes this group from the others.
        runs: at least one.
    """

    label: str
    runs: list[RunFacts]


def grouped(runs: Sequence[RunFacts]) -> list[Group]:
    """Groups runs by configuration, except for the seed, in the order in which they were given.

    A group is named by what differs between the groups, and a run that is alone in its group by its folder as well.
    """
    by_key: dict[str, list[RunFacts]] = {}
    for run in runs:
        by_key.setdefault(json.dumps(_compared(run), sort_keys=True, default=str), []).append(run)
    contents = [_compared(members[0]) for members in by_key.values()]
    keys = list(dict.fromkeys(key for content in contents for key in content))
    differing = [key for key in keys if len({str(content.get(key)) for content in contents}) > 1]
    groups = []
    for content, members in zip(contents, by_key.values(), strict=True):
        differences = ", ".join(f"{key}={content.get(key)}" for key in differing)
        name = members[0].name
        groups.append(Group(f"{name}: {differences}" if len(members) == 1 else differences or name, members))
    return groups


def _compared(run: RunFacts) -> dict[str, Any]:
    kept = {key: value for key, value in run.configuration.items() if key not in _NOT_COMPARED}
    model = run.record.run.get("model") or {}
    described = {"model": model.get("name") or model.get("class"), "workers": run.record.run["num_workers"]}
    return {**described, **kept}


def mean_and_spread(curves: Sequence[Points]) -> tuple[Points, list[float]]:
    """Mean and standard deviation (n - 1) at the steps that all curves have in common; no spread for a single curve."""
    values = [dict(curve) for curve in curves]
    common = sorted(set.intersection(*(set(value) for value in values)))
    spreads = [mean_and_deviation([value[step] for value in values]) for step in common]
    means = [(step, mean) for step, (mean, _) in zip(common, spreads, strict=True)]
    return means, [deviation for _, deviation in spreads] if len(curves) > 1 else []


def loss_of_workers(run: RunFacts) -> Points:
    """The mean of the workers' losses at the steps that all of them have logged."""
    curves = [
        [(point["step"], point["loss"]) for point in run.record.points(rank) if "loss" in point]
        for rank in run.record.workers
    ]
    return mean_and_spread(curves)[0] if curves else []


def _metric_curve(run: RunFacts, metric: str) -> Points:
    return [(entry["step"], entry[metric]) for entry in run.record.evaluations() if metric in entry]


# --- the page ---


def render(runs: Sequence[RunFacts]) -> str:
    """The page, for at least one run."""
    title = f"LSAM: {Path(runs[0].name).name}" if len(runs) == 1 else f"LSAM: {len(runs)} runs"
    parts = [f"<header><h1>{escape(title)}</h1>{_contents(runs)}</header><main>"]
    if len(runs) > 1:
        parts.append(_comparison(grouped(runs)))
    parts += [_run_section(index, run, len(runs) == 1) for index, run in enumerate(runs)]
    template = Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="".join(parts) + "</main>")


def _contents(runs: Sequence[RunFacts]) -> str:
    if len(runs) == 1:
        return ""
    links = [f'<li><a href="#run{index}">{escape(run.name)}</a></li>' for index, run in enumerate(runs)]
    return f'<nav aria-label="Runs"><ul><li><a href="#compared">Compared</a></li>{"".join(links)}</ul></nav>'


def _comparison(groups: Sequence[Group]) -> str:
    metrics = list(dict.fromkeys(metric for group in groups for run in group.runs for metric in run.metrics()))
    measured: list[tuple[str, Callable[[RunFacts], Points]]] = [("loss of the workers", loss_of_workers)]
    measured += [(metric, partial(_metric_curve, metric=metric)) for metric in metrics]
    figures = []
    for index, (what, curve) in enumerate(measured):
        series = []
        for style, group in enumerate(groups):
            curves = list(filter(None, map(curve, group.runs)))
            if curves:
                points, spread = mean_and_spread(curves)
                series.append(Series(f"{group.label} (n = {len(curves)})", points, style, spread))
        figures.append(line_chart(f"compared-{index}", f"{what}, mean over seeds", "step", what, series))
    head = ["runs", "n", "seeds", *(f"{what}, last" for what, _ in measured), "drift, last", "MiB, all workers"]
    rows = []
    for group in groups:
        lasts = [[points[-1][1] for run in group.runs if (points := curve(run))] for _, curve in measured]
        of_workers = [
            [point["lsam/drift"] for point in _last_points(run) if "lsam/drift" in point] for run in group.runs
        ]
        drifts = [statistics.mean(values) for values in of_workers if values]
        traffic = [max(map(run.mebibytes, last)) for run in group.runs if (last := _last_points(run))]
        seeds = ", ".join(str(run.configuration.get("seed", "not recorded")) for run in group.runs)
        cells = [_spread(values) for values in [*lasts, drifts, traffic]]
        rows.append([group.label, str(len(group.runs)), seeds, *cells])
    return (
        '<section id="compared"><h2>Compared</h2><p>Runs that differ in the seed alone are one group. Lines are means '
        "at the steps that all runs of a group have, bands and ± one standard deviation (n - 1) on each side; a group "
        f'of one run has none.</p>{table(head, rows, "Groups compared")}<div class="figures">{"".join(figures)}</div>'
        "</section>"
    )


def _last_points(run: RunFacts) -> list[dict[str, Any]]:
    return [points[-1] for rank in run.record.workers if (points := run.record.points(rank))]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    mean, deviation = map(number, mean_and_deviation(values))
    return f"{mean}\u00a0±\u00a0{deviation}" if len(values) > 1 else mean


def _run_section(index: int, run: RunFacts, alone: bool) -> str:
    about, name = run.record.run, f"run{index}"
    model = about.get("model") or {}
    began = datetime.fromtimestamp(about["started"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    size = f" ({model['trainable_parameters']:,} trainable parameters)" if "trainable_parameters" in model else ""
    workers = f"{about['num_workers']} worker{'' if about['num_workers'] == 1 else 's'}"
    head = f"{without_folder(model.get('name')) or model.get('class') or 'A model'}{size}, {workers}, begun {began}."
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in run.notes)
    return (
        f'<section id="{name}"><h2>{escape(run.name)}</h2><p>{escape(head)}</p>{notes}'
        f'<h3>Curves</h3><div class="figures">{"".join(_curves(name, run))}</div>'
        f'<h3>Workers and anchor</h3><div class="figures">{"".join(_coupling(name, run))}</div>'
        f"<h3>The loss around the anchor</h3>{_landscape(name, run)}"
        f"<h3>Configuration and provenance</h3>{_provenance(run, alone)}</section>"
    )


def _curves(name: str, run: RunFacts) -> list[str]:
    """The loss of each worker and the evaluations of the anchor, over steps, time and bytes."""
    axes: list[tuple[str, str, Callable[[dict[str, Any]], float]]] = [
        ("steps", "step", lambda entry: entry["step"]),
        ("time", "seconds", run.seconds),
        ("bytes", "MiB exchanged, all workers", run.mebibytes),
    ]
    figures = []
    for slug, label, x in axes:
        series = _of_workers(run, "loss", x)
        anchor = [(x(entry), entry["eval_loss"]) for entry in run.record.evaluations() if "eval_loss" in entry]
        series += [Series("anchor (eval_loss)", anchor, None)] if anchor else []
        figures.append(line_chart(f"{name}-loss-{slug}", f"Loss against {slug}", label, "loss", series))
    for index, metric in enumerate(metric for metric in run.metrics() if metric != "eval_loss"):
        for slug, label, x in axes:
            points = [(x(entry), entry[metric]) for entry in run.record.evaluations() if metric in entry]
            series = [Series("anchor", points, None)]
            figures.append(
                line_chart(f"{name}-metric{index}-{slug}", f"{metric} against {slug}", label, metric, series)
            )
    if not run.record.evaluations():
        figures.append(absent("Evaluations of the anchor", "There are none: the run has logged no evaluation."))
    return figures


def _coupling(name: str, run: RunFacts) -> list[str]:
    shown = [
        ("lsam/drift", "Drift: distance to the anchor", "‖x-y‖ / ‖y‖", "seconds"),
        ("lsam/staleness", "Staleness of what is handed in", "anchor versions", "seconds"),
        ("lsam/sharpness", "Sharpness: SAM's loss minus the loss", "pass 2 - pass 1", "step"),
    ]
    return [
        line_chart(
            f"{name}-{key.rpartition('/')[2]}",
            title,
            x_label,
            y_label,
            _of_workers(run, key, run.seconds if x_label == "seconds" else lambda entry: entry["step"]),
        )
        for key, title, y_label, x_label in shown
    ]


def _of_workers(run: RunFacts, key: str, x: Callable[[dict[str, Any]], float]) -> list[Series]:
    curves = [
        (rank, [(x(point), point[key]) for point in run.record.points(rank) if key in point])
        for rank in sorted(run.record.workers)
    ]
    return [Series(f"worker {rank}", points, rank) for rank, points in curves if points]


def _landscape(name: str, run: RunFacts) -> str:
    measured = run.landscape
    if measured is None:
        return (
            '<p class="absent">It was not measured. Train with landscape_points=17 (LSAMTrainer) to have the loss '
            "along the lines to the workers and on the plane through two of them.</p>"
        )
    series = [
        Series(f"to worker {rank}", list(zip(measured["fractions"], losses, strict=True)), int(rank))
        for rank, losses in measured["lines"].items()
    ]
    lines = line_chart(
        f"{name}-lines", "Loss from the anchor to each worker", "t: 0 is the anchor, 1 the worker", "loss", series
    )
    distances = ", ".join(f"{number(value)} to worker {rank}" for rank, value in measured["distances"].items())
    batchnorm = " BatchNorm normalises by the batch there." if measured["batchnorm"] else ""
    said = (
        f"Measured by worker 0 when training had ended, on the same training batches ({measured['batches']}) at every "
        f"point, in evaluation mode.{batchnorm} Distances from the anchor: {distances}."
    )
    missing = run.record.run["num_workers"] - len(measured["lines"])
    if missing:
        said += f" {missing} of the workers left their parameters where worker 0 could not read them."
    return f'<p>{escape(said)}</p><div class="figures">{lines}{_plane(name, measured)}</div>'


def _plane(name: str, measured: dict[str, Any]) -> str:
    plane = measured["plane"]
    if plane is None:
        reason = "There is none: it takes two workers that do not lie on one line with the anchor."
        return absent("Loss on the plane of two workers", reason)
    marks: list[tuple[str, float, float, int | None]] = [("anchor", 0.0, 0.0, None)]
    marks += [
        (f"worker {rank}", a, b, style)
        for style, (rank, (a, b)) in enumerate(zip(plane["workers"], plane["positions"], strict=True))
    ]
    title = "Loss on the plane of two workers"
    charts = map_chart(f"{name}-plane", title, plane["coordinates"], plane["losses"], marks)
    title = "The same plane, as LSAM smooths it"
    if plane["smoothed"] is None:
        return charts + absent(title, "There is no kernel: the coupling strength is 0, or the rule is not LSAM's.")
    width, half = 1 / math.sqrt(measured["strength"]), plane["coordinates"][-1]
    note = (
        f"f(y) = -log ∫ exp(-f(x)) N(x; y, 1/λ) dx over the part of the plane that is shown, with λ = λ₀/(ητ) = "
        f"{number(measured['strength'])}, η the configured learning rate: a kernel of standard deviation "
        f"{number(width)}, beside a map that reaches {number(half)} from the anchor."
    )
    if width > half / 2:
        note += " The kernel is wide for this map: much of it lies outside, and the edges shape the picture."
    smooth = map_chart(f"{name}-smooth", title, plane["coordinates"], plane["smoothed"], marks)
    return charts + smooth.replace("</figure>", f'<p class="note">{escape(note)}</p></figure>')


def _provenance(run: RunFacts, alone: bool) -> str:
    about = run.record.run
    facts = {key: about.get(key) for key in ("run_id", "started", "host", "num_workers")}
    facts["started"] = datetime.fromtimestamp(about["started"], UTC).isoformat(timespec="seconds")
    for key in ("model", "versions", "hardware"):
        facts |= {f"{key}: {name}": value for name, value in (about.get(key) or {}).items()}
    tables = table(["provenance", "value"], _rows(facts), f"Provenance of {run.name}")
    configuration = table(["field", "value"], _rows(run.configuration), f"Configuration of {run.name}")
    shown = "open" if alone else ""
    tables += f"<details {shown}><summary>Configuration</summary>{configuration}</details>"
    if run.results is not None:
        plain = {key: value for key, value in run.results.items() if not isinstance(value, dict)}
        content = table(["result", "value"], _rows(plain), f"Results of {run.name}")
        tables += f"<details {shown}><summary>results.json</summary>{content}</details>"
    return tables


def _rows(facts: dict[str, Any]) -> list[list[str]]:
    return [[key, _cell(without_folder(value))] for key, value in facts.items()]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    return number(value) if value is None or type(value) is float else str(value)
