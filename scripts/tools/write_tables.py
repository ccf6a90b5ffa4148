"""Writes the measured tables of README.md, docs/, benchmarks/README.md and the recipes from the JSON they come from.

python scripts/tools/write_tables.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.common import recipe
from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.results import load_results
from scripts.experiments import estimate_scale, simulate_scale
from scripts.experiments.compare_text import text
from scripts.experiments.simulate_images import CLOCKED, CLUSTERS, time_and_error
from scripts.tools.summarize_results import table, write_between

SENTENCES = REPOSITORY / "recipes/text_classification/results"
BENCHMARKS = {
    import_module(f"scripts.benchmarks.{path.stem}").NAME: path
    for path in sorted((REPOSITORY / "scripts/benchmarks").glob("[!_]*.py"))
}


def machine_and_packages(origin: dict[str, Any]) -> str:
    """Hardware and versions, in one line."""
    hardware = origin["hardware"]
    machine = ", ".join([f"{hardware['cores']} cores of {hardware['cpu']}", *hardware["gpus"]])
    return f"{machine}; {', '.join(f'{name} {number}' for name, number in origin['versions'].items())}"


def origin(report: dict[str, Any]) -> str:
    """One line: hardware, versions, commit and date."""
    provenance = report["provenance"]
    commit, _, dirty = provenance["commit"].partition("-")
    state = f"{commit[:12]} with uncommitted changes" if dirty else commit[:12]
    return f"{machine_and_packages(provenance)}; commit {state}, {provenance['date'][:10]}."


def of_runs(runs: list[dict[str, Any]]) -> str:
    """One line: hardware, versions, commits and date of runs that each say where they come from."""
    commits = sorted({run["commit"][:12] for run in runs})
    dates = max(run["date"][:10] for run in runs)
    return f"On {machine_and_packages(runs[0])}; commit {', '.join(commits)}; {dates}."


def write_experiments(folder: Path) -> None:
    """The tables of reproduce.py and of the simulations between the markers of the recipe's README."""
    for path in sorted(folder.glob("results/*/*.json")):
        if path.stem == "scale":  # on a page of its own
            continue
        report = load_results(path)
        if path.parent.name == "simulated":
            measured = path.with_suffix(".md").read_text().strip()
            write_between(folder / "README.md", f"simulated-{path.stem}", f"{measured}\n\n{of_runs(report['runs'])}")
            continue
        first = report["runs"][0]
        described = (
            f"{path.with_suffix('.md').read_text().strip()}\n\n![{report['experiment']}]"
            f"(results/{report['budget']}/{path.stem}.png)\n\n{first['steps_per_worker']} steps a worker at most, "
            f"{first['train_images']:,} training images, evaluated on {first['eval_images']:,} of the "
            f"{first['evaluated_on']}. {of_runs(report['runs'])}"
        )
        write_between(folder / "README.md", f"{report['budget']}-{path.stem}", described)


def write_scaling(page: Path, results: Path) -> None:
    """What simulate_scale.py and estimate_scale.py found, and the figure beside the page."""
    write_between(page, "estimate", estimate_scale.tables(estimate_scale.Measured.load()))
    runs = load_results(results)["runs"]
    simulate_scale.draw(runs, page.with_name("scale.svg"))
    figure = "![Error against the number of workers](scale.svg)"
    write_between(page, "scale", f"{figure}\n\n{simulate_scale.tables(runs)}\n\n{of_runs(runs)}")


def write_recipes(recipes: Path) -> None:
    """The tables of summarize_results.py, compare_text.py and measure_recipe.py."""
    sentences = recipes / "text_classification"
    for name in ("short", "quickstart"):
        write_between(sentences / "README.md", name, table(load_results(sentences / f"results/{name}.json")))
    for path in sorted(sentences.glob("results/comparisons/*.json")):
        write_between(sentences / "README.md", path.stem, text(load_results(path)))
    for path in sorted(recipes.glob("*/results/methods.json")):
        write_between(path.parents[1] / "README.md", "methods", table(load_results(path)))


def simulated(folder: str, name: str) -> list[dict[str, Any]]:
    """The runs of an experiment of simulate_images.py or simulate_text.py that are not trials."""
    report = load_results(REPOSITORY / f"recipes/{folder}/results/simulated/{name}.json")
    return [run for run in report["runs"] if not run["run"]["validation"]]


def of_images(runs: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The last points of a method's runs on the test images."""
    return [run["points"][-1] for run in runs if run["run"]["method"] == method]


def of_sentences(runs: list[dict[str, Any]], method: str, wrong_labels: float) -> list[dict[str, Any]]:
    """A method's runs with this share of wrong labels."""
    return [run for run in runs if (run["run"]["method"], run["run"]["wrong_labels"]) == (method, wrong_labels)]


def until_level(runs: list[dict[str, Any]], method: str, cluster: str) -> list[dict[str, Any]]:
    """Of the experiment `clock`, a method's longest runs on a cluster, one a seed: it made none that are longer once it
    was level."""
    own = [run for run in runs if run["run"]["method"] == method and run["run"]["machines"] == CLUSTERS[cluster]]
    longest = max(run["run"]["steps"] for run in own)
    return [run for run in own if run["run"]["steps"] == longest]


def draw_clock(path: Path) -> None:
    """Bars of the seconds of `until_level`, as SVG that is the same whenever it is drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    runs = simulated("cifar10_resnet20", "clock")
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axis = figure.subplots()
    for offset, method in zip((-0.2, 0.2), CLOCKED, strict=False):
        seconds = [
            statistics.fmean(run["points"][-1]["virtual_seconds"] for run in until_level(runs, method, cluster))
            for cluster in CLUSTERS
        ]
        places = [place + offset for place in range(len(CLUSTERS))]
        bars = axis.barh(places, seconds, 0.36, label=method.removesuffix(" without SAM"))
        axis.bar_label(bars, [f"{each:,.0f} s" for each in seconds], padding=3, fontsize="small")
    axis.set(xscale="log", xlim=(20, 20_000), xlabel="seconds until the same error, virtual clock")
    axis.set_yticks(range(len(CLUSTERS)), CLUSTERS)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper right")
    with matplotlib.rc_context({"svg.hashsalt": "clock", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def summary() -> str:
    """The table of README.md: a line a claim, LSAM against data-parallel training."""
    reports = {name: load_results(REPOSITORY / f"benchmarks/{name}.json") for name in ("async", "step")}
    slowed = {(row["method"], row["worker_1"]): row for row in reports["async"]["results"]}
    steps = {row["variant"]: row for row in reports["step"]["results"]}
    right, questions = (simulated("text_classification", name) for name in ("trec", "trec_wrong_labels"))
    images, long, epochs, clocked = (
        simulated("cifar10_resnet20", name) for name in ("methods", "long", "epochs", "clock")
    )

    def accuracy(method: str, runs: list[dict[str, Any]], wrong: float, figure: Callable) -> str:
        return mean_and_spread([figure(run) for run in of_sentences(runs, method, wrong)], 1)

    def error(method: str, runs: list[dict[str, Any]]) -> str:
        return mean_and_spread([point["error"] for point in of_images(runs, method)], 1)

    def share(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
        return f"1/{round(others[0]['bytes'] / runs[0]['bytes'])}"

    rows = [
        (
            f"accuracy{what} (1,000 TREC questions, MiniLM with LoRA, 2 workers; simulated)",
            f"{accuracy('LSAM', *of)} %",
            f"{accuracy('data-parallel AdamW', *of)} %; with SAM {accuracy('data-parallel SAM', *of)} %",
        )
        for what, *of in (
            ("", right, 0.0, lambda run: run["accuracy"]),
            (", 40 % of the training labels wrong", questions, 0.4, lambda run: run["accuracy"]),
            (", the same, weights rounded to 4 bits", questions, 0.4, lambda run: run["accuracy_in_few_bits"]["4"]),
        )
    ]
    rows += [
        (
            f"error from scratch ({what}, 4 workers; simulated)",
            f"{error('LSAM', runs)} %; without SAM {error('LSAM without SAM', runs)} %",
            f"{error('data-parallel SGD', runs)} %; with SAM {error('data-parallel SAM', runs)} %",
        )
        for what, runs in (
            ("small ResNet-20, CIFAR-10 at 16x16, 30 epochs", epochs),
            ("the same, 7,680 images, 1,440 steps", long),
            ("the same, 480 steps", images),
        )
    ]
    for folder, what, digits, scale in (
        ("causal_lm", "loss (a Llama from scratch on bytes, 200 steps", 3, 1),
        ("token_classification", "F1, % (tags, MiniLM, 60 steps", 1, 100),
    ):
        measured = load_results(REPOSITORY / f"recipes/{folder}/results/methods.json")
        lsam, without, with_sam, plain = (
            mean_and_spread([run[f"eval_{row['metric']}"] for run in row["runs"]], digits, scale) for row in measured
        )
        rows.append(
            (
                f"{what}, 2 workers; processes)",
                f"{lsam}; without SAM {without}",
                f"{plain}; with SAM {with_sam}",
            )
        )
    rows.append(
        (
            "bytes sent and received in the simulated runs, n = 2 and n = 4",
            ", ".join(
                (
                    share(of_sentences(questions, "LSAM", 0.0), of_sentences(questions, "data-parallel SAM", 0.0)),
                    share(of_images(images, "LSAM"), of_images(images, "data-parallel SAM")),
                )
            ),
            "1",
        )
    )
    for cluster in CLUSTERS:
        rows.append(
            (
                f"time until the error of 480 steps of data-parallel SGD (images, 4 workers, virtual clock): {cluster}",
                *(time_and_error(until_level(clocked, method, cluster)) for method in CLOCKED[:2]),
            )
        )
    rows.append(
        (
            "a worker's step while the other pauses for 1.5 steps at each of its own (two processes)",
            *(f"{slowed[method, 'busy']['worker_0_ratio']:.2f} x its step without" for method in ("lsam", "ddp")),
        )
    )
    for variant, label in (
        ("lsam", "a step with SAM's two passes, of a plain Trainer step (CPU)"),
        ("lsam quarter", "the same with `sam_ascent_fraction=0.25`"),
        ("lsam momentum", 'the same with one pass (`sam_direction="momentum"`)'),
    ):
        if variant in steps:
            rows.append((label, f"{steps[variant]['ratio']:.2f} x", ""))
    clock_seeds, epoch_seeds = (len({run["run"]["seed"] for run in runs}) for runs in (clocked, epochs))
    return (
        markdown_table(("what", "LSAM", "data-parallel training"), rows)
        + f"\n\nSeeds: {len(of_sentences(questions, 'LSAM', 0.0))} of sentences, "
        f"{len(of_images(images, 'LSAM'))} of images, {epoch_seeds} of 30 epochs, {clock_seeds} of the clock. "
        f"Simulated: {of_runs([*right, *questions, *epochs, *long, *images, *clocked])} "
        f"Processes: on {origin(reports['step'])}"
    )


def write_benchmarks() -> None:
    """The tables of benchmarks/README.md."""
    for name, path in BENCHMARKS.items():
        report = load_results(REPOSITORY / f"benchmarks/{name}.json")
        measured = import_module(f"scripts.benchmarks.{path.stem}").table(report["results"])
        parameters = ", ".join(f"{key} {value}" for key, value in report["parameters"].items())
        # The script by its name of today, with the arguments that it had; images.py was a mode, --vision, of step.py.
        words = [word for word in report["command"].split()[2:] if word != "--vision"]
        command = " ".join(["python", str(path.relative_to(REPOSITORY)), *words])
        described = f"{measured}\n\n`{command}`: {parameters}.\n\nOn {origin(report)}"
        write_between(REPOSITORY / "benchmarks/README.md", name, described)


def write_lists() -> None:
    """The lists of recipes, from what each says of itself."""
    for page, folder in (("recipes/README.md", ""), ("docs/getting_started.md", "recipes/")):
        rows = []
        for name in recipe.names():
            summary, launch = recipe.described(name)
            # docs/ is a site of its own, which links to nothing outside.
            link = f"`{folder}{name}/README.md`" if folder else f"[{name}]({name}/README.md)"
            rows.append((link, summary, f"`{launch.partition('accelerate.yaml ')[2]}`"))
        write_between(REPOSITORY / page, "recipes", markdown_table(("recipe", "what it trains", "launched with"), rows))


def main() -> None:
    write_lists()
    write_benchmarks()
    write_experiments(REPOSITORY / "recipes/cifar10_resnet20")
    write_experiments(REPOSITORY / "recipes/text_classification")
    write_scaling(REPOSITORY / "docs/scaling.md", REPOSITORY / "recipes/cifar10_resnet20/results/simulated/scale.json")
    write_recipes(REPOSITORY / "recipes")
    write_between(REPOSITORY / "README.md", "results", summary())
    draw_clock(REPOSITORY / "recipes/cifar10_resnet20/results/simulated/clock.svg")


if __name__ == "__main__":
    main()
