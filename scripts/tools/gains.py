"""What LSAM gains and costs compared with data-parallel training: the tables of README.md and docs/results.md, and the
figure.

All from published results; `write_tables.py` puts them where they belong.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.results import load_results, of_runs, origin
from scripts.experiments.simulate_images import CLOCKED, CLUSTERS, is_level, machines_of, time_and_error
from scripts.tools.summarize_results import method_label

Runs = list[dict[str, Any]]
# What was measured, then with LSAM and with data-parallel training: what differs from PLAIN there, and the figure.
Compared = tuple[str, dict[str, str], dict[str, str]]
PLAIN, SAM = "", "with SAM"  # the gradient; the optimizer is the one that the row is of
HEADER = ("", "LSAM", "data-parallel training")
IMAGES = {
    "epochs": "CIFAR-10 at 16x16, a small ResNet-20, 30 epochs, 4 workers",
    "long": "the same, 7,680 images, 1,440 steps",
    "methods": "the same, 480 steps",
}
RECIPES = {  # folder: (what is measured, digits, scale)
    "causal_lm": ("loss, a Llama from scratch on bytes, 2 workers", 3, 1),
    "sft": ("loss, chats, a small Llama from scratch, 2 workers", 4, 1),
    "seq2seq": ("chrF, pairs of texts, a small T5 from scratch, 2 workers", 1, 1),
    "token_classification": ("F1, %, tags, MiniLM, 2 workers", 1, 100),
    "image_classification": ("accuracy, %, a small ViT, half an epoch of CIFAR-10, 2 workers", 1, 100),
}
SENTENCES = "TREC, 1,000 questions, MiniLM with LoRA, 2 workers"
WRONG_LABELS = "the same, 40 % of the labels wrong"
STEPS = {
    "lsam": "a step with SAM's two passes, in plain steps of Trainer",
    "lsam quarter": "the same with `sam_ascent_fraction=0.25`",
    "lsam momentum": 'with one pass, `sam_direction="momentum"`',
}


class Gains:
    """The published results, as lines of a table."""

    @cached_property
    def _questions(self) -> dict[str, Runs]:
        return {name: simulated("text_classification", name) for name in ("trec", "trec_wrong_labels")}

    @cached_property
    def _images(self) -> dict[str, Runs]:
        return {name: simulated("cifar10_resnet20", name) for name in (*IMAGES, "clock")}

    @cached_property
    def _benchmarks(self) -> dict[str, Any]:
        return {name: load_results(REPOSITORY / f"benchmarks/{name}.json") for name in ("async", "step")}

    def bytes_exchanged(self) -> tuple[str, ...]:
        sentences, images = self._questions["trec"], [run["points"][-1] | run for run in self._images["methods"]]
        ratios = [
            of_method(runs, "data-parallel SAM")[0]["bytes"] / of_method(runs, "LSAM")[0]["bytes"]
            for runs in (sentences, images)
        ]
        return "bytes between machines of one worker each, 2; 4", "; ".join(f"1/{round(each)}" for each in ratios), "1"

    def clocked(self) -> Iterable[tuple[str, ...]]:
        """One line per cluster: the time until both are level, and the error at that point."""
        for cluster in CLUSTERS:
            lsam, data_parallel = (self._until_level(method, cluster) for method in CLOCKED[:2])
            reached = "" if is_level(lsam, data_parallel) else ", not level"
            yield cluster, f"{time_and_error(lsam)}{reached}", time_and_error(data_parallel)

    def sentences(self, name: str, what: str, figure: Callable[[dict[str, Any]], float]) -> Compared:
        return self._compared(what, self._questions[name], figure, "AdamW")

    def images(self, name: str) -> Compared:
        runs = self._images[name]
        steps = max(run["run"]["steps"] for run in runs)
        whole = [run for run in runs if run["run"]["steps"] == steps]
        return self._compared(f"error, %, {IMAGES[name]}", whole, lambda run: run["points"][-1]["error"])

    def recipe(self, folder: str) -> Compared:
        """The results of a recipe, from real processes."""
        what, digits, scale = RECIPES[folder]
        of = {
            method_label(row): mean_and_spread([run[f"eval_{row['metric']}"] for run in row["runs"]], digits, scale)
            for row in measured(folder)
        }
        lsam = {PLAIN: "lsam without SAM", SAM: "lsam", "with NesterovAdamW": "lsam without SAM, NesterovAdamW"}
        plain = {PLAIN: "ddp", SAM: "ddp_sam", "with NesterovAdamW": "ddp, NesterovAdamW"}
        return what, *({how: of[label] for how, label in labels.items() if label in of} for labels in (lsam, plain))

    def straggler(self) -> tuple[str, ...]:
        slowed = {(row["method"], row["worker_1"]): row for row in self._benchmarks["async"]["results"]}
        times = (f"{slowed[method, 'busy']['worker_0_ratio']:.2f}" for method in ("lsam", "ddp"))
        return "a step while the other of two processes does 2.5 times the work, in steps while it does not", *times

    def steps(self) -> Iterable[tuple[str, ...]]:
        ratios = {row["variant"]: row["ratio"] for row in self._benchmarks["step"]["results"]}
        for variant, what in STEPS.items():
            plain = f"1; {SAM} {ratios['davda54']:.2f}" if variant == "lsam" else ""
            yield what, f"{ratios[variant]:.2f}", plain

    def short(self) -> str:
        """The table of README.md: what a user gains, one line each, with the plain gradient and with SAM's."""
        compared = (
            self.sentences("trec", f"accuracy, %, {SENTENCES}", lambda run: run["accuracy"]),
            self.sentences("trec_wrong_labels", WRONG_LABELS, lambda run: run["accuracy"]),
            *map(self.images, ("epochs", "long")),
            *map(self.recipe, RECIPES),
        )
        rows = [
            self.bytes_exchanged(),
            *((f"time until level, {what}", *times) for what, *times in self.clocked()),
            *(
                (what, *(in_one_cell({how: of[how] for how in (PLAIN, SAM) if how in of}) for of in both))
                for what, *both in compared
            ),
            *self.steps(),
        ]
        return markdown_table(HEADER, rows)

    def whole(self) -> str:
        """The whole table, and where its figures come from."""
        compared = (
            self.sentences("trec", f"accuracy, %, {SENTENCES}", lambda run: run["accuracy"]),
            self.sentences("trec", "the same, weights in 4 bits", lambda run: run["accuracy_in_few_bits"]["4"]),
            self.sentences("trec_wrong_labels", WRONG_LABELS, lambda run: run["accuracy"]),
            self.sentences(
                "trec_wrong_labels", "these, weights in 4 bits", lambda run: run["accuracy_in_few_bits"]["4"]
            ),
            *map(self.images, IMAGES),
            *map(self.recipe, RECIPES),
        )
        rows = [
            self.bytes_exchanged(),
            *((what, *map(in_one_cell, both)) for what, *both in compared),
            *((f"time until level, {what}", *times) for what, *times in self.clocked()),
            self.straggler(),
            *self.steps(),
        ]
        seeds = {
            "sentences": self._questions["trec"],
            "sentences with wrong labels": self._questions["trec_wrong_labels"],
            "30 epochs": self._images["epochs"],
            "1,440 steps": self._images["long"],
            "480 steps": self._images["methods"],
            "the clock": self._images["clock"],
        }
        counted = ", ".join(f"{len({run['run']['seed'] for run in runs})} of {what}" for what, runs in seeds.items())
        of_recipes = sorted({len(row["runs"]) for folder in RECIPES for row in measured(folder)})
        counted += f", {' or '.join(map(str, of_recipes))} of the recipes, whose READMEs say where they ran"
        runs = [run for each in (*self._questions.values(), *self._images.values()) for run in each]
        return (
            f"{markdown_table(HEADER, rows)}\n\nSeeds: {counted}. "
            f"Simulated (images, TREC, the clock): {of_runs(runs)} Steps: on {origin(self._benchmarks['step'])}"
        )

    def draw(self, path: Path) -> None:
        """Draws bars of the seconds until level, as an SVG file that is identical each time."""
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axis = figure.subplots()
        for offset, method in zip((-0.2, 0.2), CLOCKED, strict=False):
            found = [(self._until_level(method, each), self._until_level(CLOCKED[1], each)) for each in CLUSTERS]
            seconds = [statistics.fmean(run["points"][-1]["virtual_seconds"] for run in own) for own, _ in found]
            reached = ["" if is_level(*each) else ", not level" for each in found]
            places = [place + offset for place in range(len(CLUSTERS))]
            bars = axis.barh(places, seconds, 0.36, label=method.removesuffix(" without SAM"))
            labels = [f"{each:,.0f} s{level}" for each, level in zip(seconds, reached, strict=True)]
            axis.bar_label(bars, labels, padding=3, fontsize="small")
        axis.set(xscale="log", xlim=(20, 20_000), xlabel="seconds until the same error, virtual clock")
        axis.set_yticks(range(len(CLUSTERS)), CLUSTERS)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper right")
        with matplotlib.rc_context({"svg.hashsalt": "clock", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None})

    def _until_level(self, method: str, cluster: str) -> Runs:
        """A method's longest runs on a cluster, one per seed. Once it was level, no longer runs were made."""
        own = [
            run
            for run in of_method(self._images["clock"], method)
            if run["run"]["machines"] == machines_of(cluster, method)
        ]
        longest = max(run["run"]["steps"] for run in own)
        return [run for run in own if run["run"]["steps"] == longest]

    @staticmethod
    def _compared(what: str, runs: Runs, figure: Callable[[dict[str, Any]], float], plain: str = "SGD") -> Compared:
        def of(method: str) -> str:
            return mean_and_spread([figure(run) for run in of_method(runs, method)], 1)

        lsam = {PLAIN: of("LSAM without SAM"), SAM: of("LSAM")}
        data_parallel = {PLAIN: of(f"data-parallel {plain}"), SAM: of("data-parallel SAM")}
        # Nesterov's rule, which LSAM's anchor has: in data-parallel training, and at LSAM's workers.
        for row, method, optimizer in (
            (lsam, "LSAM without SAM, NesterovAdamW", "NesterovAdamW"),
            (data_parallel, "data-parallel NesterovAdamW", "NesterovAdamW"),
            (data_parallel, "data-parallel Nesterov SGD", "Nesterov"),
        ):
            if of_method(runs, method):
                row[f"with {optimizer}"] = of(method)
        return what, lsam, data_parallel


def measured(folder: str) -> Runs:
    """A recipe's methods, from measure_recipe.py: with the rates that trials chose, if they were made afterwards."""
    results = REPOSITORY / f"recipes/{folder}/results"
    tuned = results / "tuned_methods.json"
    return load_results(tuned if tuned.exists() else results / "methods.json")


def simulated(folder: str, name: str) -> Runs:
    """The runs, except for trials, of an experiment of simulate_images.py or simulate_text.py."""
    report = load_results(REPOSITORY / f"recipes/{folder}/results/simulated/{name}.json")
    return [run for run in report["runs"] if not run["run"]["validation"]]


def in_one_cell(methods: dict[str, str]) -> str:
    return "; ".join(f"{how} {figure}".strip() for how, figure in methods.items())


def of_method(runs: Runs, method: str) -> Runs:
    return [run for run in runs if run["run"]["method"] == method]
