"""Writes the measured tables of README.md, docs/, benchmarks/README.md and the recipes from their JSON.

python scripts/tools/write_tables.py
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from recipes.common import recipe
from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table
from scripts.common.results import load_results, of_runs, origin
from scripts.experiments import estimate_scale, simulate_scale
from scripts.tools.gains import Gains
from scripts.tools.summarize_results import table, write_between

BENCHMARKS = {
    import_module(f"scripts.benchmarks.{path.stem}").NAME: path
    for path in sorted((REPOSITORY / "scripts/benchmarks").glob("[!_]*.py"))
}


def write_simulations(folder: Path) -> None:
    """Writes the tables of the simulations between the markers of the recipe's README."""
    for path in sorted(folder.glob("results/simulated/*.json")):
        if path.stem != "scale":  # on a page of its own
            described = f"{path.with_suffix('.md').read_text().strip()}\n\n{of_runs(load_results(path)['runs'])}"
            write_between(folder / "README.md", f"simulated-{path.stem}", described)


def write_scaling(page: Path, results: Path) -> None:
    """Writes what simulate_scale.py and estimate_scale.py found, and the figure next to the page."""
    write_between(page, "estimate", estimate_scale.tables(estimate_scale.Measured.load()))
    runs = load_results(results)["runs"]
    simulate_scale.draw(runs, page.with_name("scale.svg"))
    figure = "![Error against the number of workers](scale.svg)"
    write_between(page, "scale", f"{figure}\n\n{simulate_scale.tables(runs)}\n\n{of_runs(runs)}")


def write_recipes(recipes: Path) -> None:
    """Writes the tables of summarize_results.py and measure_recipe.py."""
    for path in sorted(recipes.glob("*/results/*.json")):
        write_between(path.parents[1] / "README.md", path.stem, table(load_results(path)))


def write_benchmarks() -> None:
    """Writes the tables of benchmarks/README.md."""
    for name, path in BENCHMARKS.items():
        report = load_results(REPOSITORY / f"benchmarks/{name}.json")
        measured = import_module(f"scripts.benchmarks.{path.stem}").table(report["results"])
        parameters = ", ".join(f"{key} {value}" for key, value in report["parameters"].items())
        # The script and its options under their current names; images.py used to be a mode of step.py, --vision.
        words = [word for word in report["command"].split()[2:] if word != "--vision"]
        words = ["--timeout" if word == "--patience" else word for word in words]
        command = " ".join(["python", str(path.relative_to(REPOSITORY)), *words])
        described = f"{measured}\n\n`{command}`: {parameters}.\n\nOn {origin(report)}"
        write_between(REPOSITORY / "benchmarks/README.md", name, described)


def write_lists() -> None:
    """Writes the lists of recipes, from how each describes itself."""
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
    write_simulations(REPOSITORY / "recipes/cifar10_resnet20")
    write_simulations(REPOSITORY / "recipes/text_classification")
    write_scaling(REPOSITORY / "docs/scaling.md", REPOSITORY / "recipes/cifar10_resnet20/results/simulated/scale.json")
    write_recipes(REPOSITORY / "recipes")
    gains = Gains()
    write_between(REPOSITORY / "README.md", "results", gains.short())
    write_between(REPOSITORY / "docs/results.md", "results", gains.whole())
    gains.draw(REPOSITORY / "docs/clock.svg")


if __name__ == "__main__":
    main()
