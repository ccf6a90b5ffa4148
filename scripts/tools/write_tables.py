"""Writes the measured tables of README.md, benchmarks/README.md and the recipes from the JSON they come from.

python scripts/tools/write_tables.py
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.common import recipe
from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.results import load_results
from scripts.experiments.compare_text import text
from scripts.tools.summarize_results import table, write_between

SENTENCES = REPOSITORY / "recipes/text_classification/results"
COMPARISONS = {
    "trec_full": "TREC questions, all parameters",
    "trec_lora": "TREC, LoRA",
    "sst2_full": "SST-2 sentences, all parameters",
    "sst2_lora": "SST-2, LoRA",
}
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
    """The tables of reproduce.py and simulate_images.py between the markers of the recipe's README."""
    for path in sorted(folder.glob("results/*/*.json")):
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


def write_recipes(recipes: Path) -> None:
    """The tables of summarize_results.py, compare_text.py and measure_recipe.py."""
    sentences = recipes / "text_classification"
    for name in ("short", "quickstart"):
        write_between(sentences / "README.md", name, table(load_results(sentences / f"results/{name}.json")))
    for name in COMPARISONS:
        write_between(sentences / "README.md", name, text(load_results(sentences / f"results/{name}.json")))
    for path in sorted(recipes.glob("*/results/methods.json")):
        write_between(path.parents[1] / "README.md", "methods", table(load_results(path)))


def final(runs: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    """The last points of a method's runs on the test images, by simulate_images.py."""
    own = [run for run in runs if run["run"]["method"] == method and not run["run"]["validation"]]
    return [run["points"][-1] for run in own]


def summary() -> str:
    """The table of README.md: a line a claim."""
    quickstart = load_results(SENTENCES / "quickstart.json")
    lsam = next(row for row in quickstart if row["method"] == "lsam")
    reports = {name: load_results(REPOSITORY / f"benchmarks/{name}.json") for name in BENCHMARKS}
    slowed = {(row["method"], row["worker_1"]): row for row in reports["async"]["results"]}
    steps = {row["variant"]: row for row in reports["step"]["results"]}
    pushes = {(row["megabytes"], row["senders"], row["mode"]): row for row in reports["server"]["results"]}
    accuracy, seeds = lsam["eval_accuracy"], [run["seed"] for run in lsam["runs"]]
    moved = sum(run["bytes_data_parallel"] for run in lsam["runs"]) / len(lsam["runs"])
    rows = [
        (
            f"MiniLM with LoRA, {lsam['num_workers']} workers of {lsam['runs'][0]['steps_per_worker'][0]} steps: "
            f"held-out accuracy of the anchor on {lsam['eval_examples']:,} sentences (coupling_strength="
            f"{lsam['configuration']['coupling_strength']:g}, pulled at every step)",
            f"{accuracy['mean']:.3f} ± {accuracy['std']:.3f}",
            f"seeds {', '.join(map(str, seeds))}",
        ),
        (
            "bytes it exchanged, of what data-parallel training would have for the same steps",
            f"{lsam['bytes_exchanged'] / moved:.3f}",
            f"sync_steps={lsam['configuration']['sync_steps']}",
        ),
    ]
    simulated = load_results(REPOSITORY / "recipes/cifar10_resnet20/results/simulated/methods.json")["runs"]
    parallel = final(simulated, "data-parallel SAM")
    for method in ("data-parallel SAM", "LSAM", "LSAM, 4 bits", "local SGD", "EASGD", "LSAM as in the paper"):
        points = final(simulated, method)
        errors, sent = [point["error"] for point in points], points[0]["bytes"] / parallel[0]["bytes"]
        rows.append(
            (
                f"simulated: 4 workers train a small ResNet-20 on CIFAR-10 from scratch, 480 steps each; test error of "
                f"{method}, and its bytes",
                f"{mean_and_spread(errors, 1)} %, {sent:.2f} of data-parallel SAM's",
                f"{len(points)} seeds",
            )
        )
    for method, label in (
        ("lsam", "a worker's step while the other pauses for 1.5 steps at each of its own: LSAM"),
        ("ddp", "the same: DDP"),
    ):
        row = slowed[method, "busy"]
        rows.append((label, f"{row['worker_0_ratio']:.2f} x its step without", f"n = {row['worker_0_n']}"))
    for variant, label in (
        ("lsam", "an LSAM step, of a plain Trainer step (MiniLM, all parameters, one worker, CPU)"),
        ("lsam quarter", "the same with sam_ascent_fraction=0.25"),
        ("lsam momentum", "the same with one pass, along the momentum (sam_direction)"),
        ("pytorch_optimizer", "the same with pytorch_optimizer's SAM"),
        ("davda54", "the same with a SAM of two optimizer steps, as in davda54/sam"),
    ):
        if variant in steps:
            rows.append((label, f"{steps[variant]['ratio']:.2f} x", f"n = {steps[variant]['n']}"))
    rows.append(
        (
            "time of the training thread that goes into the exchange, of a step (sync_steps=16)",
            f"{steps['lsam server']['exchange_share']:.2%}",
            f"n = {steps['lsam server']['exchange_n']}",
        )
    )
    images, batch = reports["images"]["results"], reports["images"]["parameters"]["batch"]
    loops, (_, ours, _) = images["step"], images["throughput"]
    rows.append(
        (
            "an image loop's LSAM step, of two forward-backward passes of a plain PyTorch loop (ResNet-20, "
            f"batch {batch}, CPU): glibc's malloc as it comes, and told to keep memory",
            ", ".join(f"{loop['ratio']:.3f} x" for loop in loops),
            f"n = {loops[0]['n']} each",
        )
    )
    rows.append(
        (
            "images a second of two workers of one run, of two processes that share nothing",
            f"{ours['ratio']:.3f} x",
            f"n = {ours['n']}",
        )
    )
    absorbed = [pushes[90.0, senders, "absorb"]["ratio"] for senders in (1, 4, 16)]
    rows.append(
        (
            "pushes of 90 MB that a server absorbs from 1, 4, 16 workers, of a plain memory copy",
            ", ".join(f"{ratio:.2f}" for ratio in absorbed),
            f"n = {pushes[90.0, 1, 'absorb']['n']} each",
        )
    )
    return markdown_table(("what", "measured", "n"), rows) + "\n\n" + f"On {origin(reports['step'])}"


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
    write_recipes(REPOSITORY / "recipes")
    write_between(REPOSITORY / "README.md", "results", summary())


if __name__ == "__main__":
    main()
