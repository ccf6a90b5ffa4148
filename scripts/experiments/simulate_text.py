"""Fine-tuning with LSAM and with data-parallel training, simulated on sentences: see `hf_lsam.simulation`.

    python scripts/experiments/simulate_text.py EXPERIMENT --train_file train.csv --validation_file test.csv

    level     every method with the same trials, 2 and 4 workers
    noise     the same where a share of the training labels is wrong, and the weights rounded to few bits afterwards

MiniLM with AdamW. Trials are judged on a tenth of the training sentences, held out for them; the tables are of the
validation file. Runs are kept in `--runs_dir`, and one that has finished is not made again. `--output_dir` receives
NAME.json and NAME.md; keys of recipes/text_classification/sentences.py and of LoRA choose data and adapter.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from hf_lsam.loop import LoopArguments
from hf_lsam.simulation import Cluster, DataParallel, Gradient, Machine
from recipes.common.arguments import pick
from recipes.common.configuration import resolve
from recipes.common.results import provenance
from recipes.text_classification.sentences import DataArguments, load_examples
from recipes.text_classification.train import ModelArguments, load_model, tokenize

Collate = Callable[[list], dict[str, torch.Tensor]]

METHODS: dict[str, dict[str, bool]] = {
    "LSAM": {"sam": True},
    "LSAM without SAM": {},
    "data-parallel SAM": {"sam": True, "data_parallel": True},
    "data-parallel AdamW": {"data_parallel": True},
}


@dataclass(frozen=True)
class Run:
    """One simulated run.

    Args:
        method: a key of `METHODS`.
        workers: how many.
        steps: of each worker.
        learning_rate: the highest, after a warm-up of a tenth of the run; then linear to zero.
        sam_rho: radius of the methods with SAM's gradient.
        wrong_labels: share of the training sentences whose label is replaced by another.
        batch_size: of one worker.
        seed: of the head's weights, order and dropout.
        validation: judge on a tenth of the training sentences, which is not trained on.
    """

    method: str
    workers: int = 2
    steps: int = 80
    learning_rate: float = 1e-4
    sam_rho: float = 0.02
    wrong_labels: float = 0.0
    batch_size: int = 16
    seed: int = 0
    validation: bool = False


@lru_cache(maxsize=4)
def sentences_of(
    data: str, validation: bool, wrong_labels: float
) -> tuple[list, list, list[str], DataCollatorWithPadding]:
    """Training and held-out sentences as token ids and labels, the labels' names, what makes a batch of them."""
    values = json.loads(data)
    if validation:
        values |= {"validation_file": None, "eval_size": 0.1}
    train, held_out, names = load_examples(pick(DataArguments, values))
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
    """Epoch after epoch, each in an order of its own, of which this worker has every `workers`-th batch.

    Sentences of like length share a batch: the order is sorted in pieces of 16 batches, whose order is drawn again.
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
    """Accuracy of the model that a run ends with, also with its matrices rounded to 8 and 4 bits; its bytes.

    Args:
        data: the fields of `DataArguments` and `ModelArguments`, as JSON.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    train, held_out, names, collate = sentences_of(data, run.validation, run.wrong_labels)
    method = METHODS[run.method]
    torch.manual_seed(run.seed)
    model, _ = load_model(pick(ModelArguments, json.loads(data)), names)
    model.train()
    streams = [batches(train, collate, run.batch_size, run.seed, rank, run.workers) for rank in range(run.workers)]

    def loss(model, rank):
        batch = next(streams[rank])
        return lambda: model(**batch).loss

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, run.learning_rate, weight_decay=0.0)

    def share(step: int) -> float:
        warm = max(1, run.steps // 10)
        return min((step + 1) / warm, (run.steps - step) / (run.steps - warm))

    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    machines = [Machine()] * run.workers
    gradient = Gradient(run.sam_rho if method.get("sam") else 0.0, max_grad_norm=1.0)
    sync_steps = None
    if method.get("data_parallel"):
        made = DataParallel(model, optimizer, loss, machines, gradient, scheduler, run.seed)
    else:
        arguments = LoopArguments()
        sync_steps = arguments.steps_between_pushes(run.workers)
        made = Cluster(
            model,
            optimizer,
            loss,
            machines,
            arguments.worker_settings(sync_steps),
            arguments.server_settings(sync_steps),
            gradient,
            scheduler,
            seed=run.seed,
        )
    begin = time.perf_counter()
    (end,) = made.run(run.steps)
    made.layout.write(end.anchor, [parameter for parameter in model.parameters() if parameter.requires_grad])
    return {
        "run": asdict(run),
        "sync_steps": sync_steps,
        "accuracy": accuracy(model, held_out, collate),
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
    """In per cent, without dropout."""
    model.eval()
    right = 0
    for begin in range(0, len(examples), 100):
        batch = collate(examples[begin : begin + 100])
        right += (model(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return 100 * right / len(examples)


@torch.no_grad()
def in_few_bits(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """A copy, with each row of its matrices rounded to 2^bits - 1 evenly spaced values around zero; adapters merged."""
    model = copy.deepcopy(model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            step = parameter.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            parameter.copy_((parameter / step).round() * step)
    return model
