"""Means over runs that differ only in their seed, as JSON and as a Markdown table in a README.

    python scripts/tools/summarize_results.py RUN_DIR... --output FILE.json --readme README.md --marker NAME

The table replaces the text between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lsam.files import write_atomically
from hf_lsam.spread import mean_and_deviation
from recipes.common.card import exchanged_bytes
from recipes.common.results import write_json
from recipes.common.tables import markdown_table, mean_and_spread

OWN_TO_A_RUN = ("seed", "output_dir")
DEFAULT_BETA2 = 0.999  # of TrainingArguments
# Where these lie is one machine's affair; their names are kept.
PLACES = ("train_file", "validation_file", "eval_file", "data_dir", "shared_memory_dir")
KEPT = (
    "seed",
    "eval_{metric}",
    "eval_loss",
    "eval_{metric}_before",
    "eval_{metric}_workers",
    "steps_per_worker",
    "median_step_s",
    "train_runtime_s",
    "anchor_version",
    "pushes_per_worker",
    "bytes_pushed",
    "bytes_pulled",
    "bytes_data_parallel",
    "staleness",
    "commit",
    "date",
)
HEADER = ("method", "workers", "seeds", "held-out {metric}", "at the workers", "training", "median step",
          "staleness", "exchanged", "data-parallel SAM, same steps")  # fmt: skip


def summarize(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One summary per configuration, in the order given. Runs that differ only in seed and folder have the same one.

    Raises:
        ValueError: if a configuration has a seed twice, or runs with different hardware or versions.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        configuration = {key: value for key, value in result["configuration"].items() if key not in OWN_TO_A_RUN}
        groups.setdefault(json.dumps([configuration, result["num_workers"]], sort_keys=True), []).append(result)
    summaries = []
    for runs in groups.values():
        seeds = [run["seed"] for run in runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"Seed {max(seeds, key=seeds.count)} stands twice for one configuration. Drop a run.")
        for key in ("hardware", "versions"):
            if any(run[key] != runs[0][key] for run in runs):
                raise ValueError(f"The runs of one configuration had different {key}: their mean would mix them.")
        first, metric = runs[0], runs[0]["metric"]
        kept = [key.format(metric=metric) for key in KEPT]
        configuration = {key: value for key, value in first["configuration"].items() if key not in OWN_TO_A_RUN}
        summaries.append(
            {
                "method": first["method"],
                "num_workers": first["num_workers"],
                "eval_examples": first["eval_examples"],
                "trainable_parameters": first["trainable_parameters"],
                "metric": metric,
                f"eval_{metric}": _spread([run[f"eval_{metric}"] for run in runs]),
                "train_runtime_s": _spread([run["train_runtime_s"] for run in runs]),
                "bytes_exchanged": statistics.fmean(exchanged_bytes(run) for run in runs),
                "hardware": first["hardware"],
                "versions": first["versions"],
                "runs": [{key: run[key] for key in kept} for run in runs],
                "configuration": {
                    key: Path(value).name if key in PLACES and not value.startswith("package://") else value
                    for key, value in configuration.items()
                    if value is not None
                },
            }
        )
    return summaries


def method_label(summary: dict[str, Any]) -> str:
    """The name of a summary's method in a table."""
    settings = summary["configuration"]
    without = " without SAM" * (summary["method"] == "lsam" and settings.get("sam_rho") == 0)
    beta2 = settings.get("adam_beta2", DEFAULT_BETA2)
    decay = f", adam_beta2={beta2:g}" * (beta2 != DEFAULT_BETA2)
    return f"{summary['method']}{without}{', NesterovAdamW' * settings.get('nesterov', False)}{decay}"


def labels(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The label of each summary in a table: its method, what sets it apart from other summaries of this method, and the
    learning rate that trials chose."""
    names = [method_label(summary) for summary in summaries]
    settings = [summary["configuration"] for summary in summaries]
    differing = {
        key
        for name, own in zip(names, settings, strict=True)
        for other_name, other in zip(names, settings, strict=True)
        for key in own
        if (name == other_name or key == "learning_rate") and own[key] != other.get(key)
    }
    return [
        ", ".join([name, *(f"{key}={own[key]}" for key in sorted(differing) if key in own)])
        for name, own in zip(names, settings, strict=True)
    ]


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """The summaries as Markdown, with the hardware and versions they were measured with."""
    rows = []
    for label, summary in zip(labels(summaries), summaries, strict=True):
        runs, metric = summary["runs"], summary["metric"]
        asynchronous = summary["method"] == "lsam"
        at_workers = [value for run in runs for value in run[f"eval_{metric}_workers"] or ()]
        seconds = summary["train_runtime_s"]
        data_parallel = statistics.fmean(run["bytes_data_parallel"] for run in runs)
        rows.append(
            (
                label,
                str(summary["num_workers"]),
                ", ".join(str(run["seed"]) for run in runs),
                mean_and_spread([run[f"eval_{metric}"] for run in runs], 4),
                f"{statistics.fmean(at_workers):.4f}" if asynchronous else "-",
                f"{seconds['mean']:.0f} s",
                f"{statistics.fmean(step for run in runs for step in run['median_step_s']):.2f} s",
                f"{statistics.fmean(run['staleness']['mean'] for run in runs):.2f}" if asynchronous else "-",
                f"{summary['bytes_exchanged'] / 1e6:,.0f} MB",
                f"{data_parallel / 1e6:,.0f} MB",
            )
        )
    first = summaries[0]
    hardware = ", ".join([first["hardware"]["cpu"], f"{first['hardware']['cores']} cores", *first["hardware"]["gpus"]])
    versions = ", ".join(f"{package} {number}" for package, number in first["versions"].items())
    header = [title.format(metric=first["metric"].replace("_", " ")) for title in HEADER]
    return f"{markdown_table(header, rows)}\n\nMeasured on {hardware}, with {versions}."


def write_between(readme: Path, marker: str, text: str) -> None:
    """Replaces the text between the two markers; see `around`."""
    head, tail = around(readme, marker)
    write_atomically(readme, f"{head}\n{text}\n{tail}")


def around(readme: Path, marker: str) -> tuple[str, str]:
    """The parts of a file before and after the text between two markers, including the markers.

    Raises:
        ValueError: if the file does not have both, in this order.
    """
    content = readme.read_text()
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    head, found_begin, rest = content.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{readme} has no {begin} followed by {end}. Add both lines where the table belongs.")
    return head + begin, end + tail


def _spread(values: Sequence[float]) -> dict[str, float]:
    mean, deviation = mean_and_deviation(values)
    return {"mean": mean, "std": deviation}


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="output_dir of a run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--readme", type=Path, help="file to write the table into")
    parser.add_argument("--marker", help="name of the markers in it")
    args = parser.parse_args(arguments)
    if (args.readme is None) != (args.marker is None):
        parser.error("--readme and --marker go together")
    summaries = summarize([json.loads((folder / "results.json").read_text()) for folder in args.runs])
    write_json(args.output, summaries, indent=2)
    if args.readme is not None:
        write_between(args.readme, args.marker, table(summaries))
    print(table(summaries))


if __name__ == "__main__":
    main(sys.argv[1:])
