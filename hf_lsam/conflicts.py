"""Combinations of configuration fields that are not possible although each field is in range, with the remedy.

`args` is an `LSAMArguments`; it is typed as Any because that class lives in a layer above this one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import torch

from .coupling import anchor_lr_bound
from .identity import SERVER_ADDRESS, WORKER
from .optimizers import momentum_of
from .transport.ownership import missing_here

_SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_SHARDING_FIELDS = ("fsdp", "deepspeed", "parallelism_config")  # of TrainingArguments


def refuse_first(conflicts: Iterator[str]) -> None:
    """
    Raises:
        ValueError: for the first conflict, if there is one.
    """
    if (conflict := next(conflicts, None)) is not None:
        raise ValueError(conflict)


def of_fields(args: Any, sync_steps: int) -> Iterator[str]:
    """Conflicts among LSAM's own fields, with this launcher and on this machine.

    Args:
        sync_steps: the smallest tau that a run with these fields may use, for which the bounds are the lowest.
    """
    launched = args.identity.meets_others and args.server_address is None
    if args.identity.comes_and_goes and args.server_address is None:
        yield (
            f"{WORKER} says that this is one of {args.identity.num_workers} workers that are started one by one, "
            f"and there is no server that they could meet at. Set {SERVER_ADDRESS} or `server_address`, "
            f"or unset {WORKER}."
        )
    scheme = (args.server_address or "").rpartition("://")[0]
    if (launched or (args.server_address is not None and scheme in ("", "file"))) and (missing := missing_here()):
        yield missing
    folder = args.shared_memory_dir  # not every system has the default: it is checked only where it is used
    writable = os.path.isdir(folder) and os.access(folder, os.W_OK)
    if (launched or folder != type(args).shared_memory_dir) and not writable:
        yield (
            f"`shared_memory_dir` must be a folder this process may write to, got {folder!r}. Use a folder on a "
            "local disk where there is no /dev/shm."
        )
    if args.sam_direction != "gradient" and args.sam_ascent_fraction != 1:
        yield (
            f"`sam_ascent_fraction` must be 1 with sam_direction={args.sam_direction!r}, which has no pass for the "
            f"ascent, got {args.sam_ascent_fraction!r}. Use sam_direction='gradient' to make that pass cheaper."
        )
    if args.momentum_at == "anchor":
        yield from of_momentum_at_the_anchor(args)
    at_once = args.worker_half.moves_at_once
    if at_once and args.coupling_strength > 1:
        yield (
            "`coupling_strength` must be at most 1 where it is a worker's whole move at an exchange "
            f"(coupling='merge', algorithm='easgd'), got {args.coupling_strength!r}. Beyond, it would move past "
            "the anchor. EASGD's paper uses 0.9 / n."
        )
    if not at_once and args.coupling_strength > sync_steps / 2:
        yield (
            f"`coupling_strength` must be at most half of sync_steps ({sync_steps}), got "
            f"{args.coupling_strength!r}. Beyond, a step takes more than half of a worker's distance to the anchor "
            "away, and nothing that it learns lasts. Use a smaller one, or raise sync_steps."
        )
    # Merging workers push how far they have moved, which does not include their offset from the anchor, and Adam's step
    # does not scale with the distance. In neither case can distances feed on themselves.
    if args.worker_half.brakes and args.anchor_optimizer != "adam":
        momentum = args.anchor_momentum if args.anchor_optimizer == "nesterov" else 0.0
        bound = anchor_lr_bound(args.coupling_strength, sync_steps, args.anchor_momentum_correction, momentum)
        if args.anchor_lr >= bound:
            yield (
                f"anchor_lr={args.anchor_lr} with coupling_strength={args.coupling_strength}, "
                f"sync_steps={sync_steps}, anchor_momentum_correction={args.anchor_momentum_correction} and "
                f"anchor_optimizer={args.anchor_optimizer!r} is outside the stability region (anchor_lr < "
                f"{bound:.4g}): the distance between workers and anchor would grow from period to period until it "
                f"is NaN. Use anchor_lr={math.floor(0.8 * bound * 1000) / 1000:g}, or a smaller "
                "anchor_momentum_correction."
            )
    if not args.server_half.adds_up and args.identity.num_machines > 1:
        yield (
            f"algorithm={args.algorithm!r} works on one machine only: between machines sums of differences cross, "
            "and that is no exchange of this algorithm. Use algorithm='lsam', or one machine."
        )
    sharding = [name for key, name in _SHARDING_VARIABLES.items() if os.environ.get(key, "").lower() == "true"]
    for asked in sharding + [name for name in _SHARDING_FIELDS if getattr(args, name, None)]:
        yield (
            f"LSAM cannot be combined with {asked} yet: a worker must hold whole parameters, or its norm, its "
            "perturbation and its differences would be those of a shard. Launch without it (`--multi_gpu`); to "
            "save memory train a LoRA adapter, or use gradient checkpointing and gradient accumulation."
        )


def of_momentum_at_the_anchor(args: Any) -> Iterator[str]:
    """Conflicts with momentum_at='anchor'."""
    if not args.worker_half.pushes_movement:
        yield (
            f"momentum_at='anchor' needs workers that hand in what they have moved: algorithm='lsam' with "
            f"coupling='merge', got algorithm={args.algorithm!r} and coupling={args.coupling!r}. Use those, or "
            "momentum_at='worker'."
        )
    if args.anchor_optimizer != "sgd":
        yield (
            f"momentum_at='anchor' gives the anchor its momentum, got anchor_optimizer={args.anchor_optimizer!r} "
            "beside it. Leave that out, or use momentum_at='worker'."
        )
    if args.sam_rho and args.sam_direction == "momentum":
        yield (
            "sam_direction='momentum' perturbs along the worker's momentum, and with momentum_at='anchor' it has "
            "none. Use sam_direction='gradient' or 'anchor', or momentum_at='worker'."
        )


def with_optimizer(args: Any, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Conflicts with the workers' optimizer."""
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if any(group["lr"] is None for group in optimizer.param_groups):
        yield (
            f"{kind} chooses its learning rate by itself (lr=None), and a worker couples, scales and logs by it. Give "
            "it one: Adafactor(..., lr=1e-3, relative_step=False)."
        )
    sgd = "nesterov" in optimizer.param_groups[0]
    if args.sam_rho and args.sam_direction == "momentum" and sgd and not optimizer.param_groups[0]["momentum"]:
        yield (
            "sam_direction='momentum' perturbs along the optimizer's momentum, and SGD keeps none: every step "
            "would be a plain one. Give it a momentum (optim_args='momentum=0.9'), or use sam_direction='gradient'."
        )
    if args.momentum_at == "anchor" and not momentum_of(optimizer):
        yield (
            f"momentum_at='anchor' takes the momentum from the workers' optimizer, and {kind} has none that could be "
            "taken from it. Use SGD with momentum (optim_args='momentum=0.9') and no dampening, Adam or AdamW, the "
            "same in all parameter groups, or momentum_at='worker'."
        )
    if args.worker_half.brakes and args.coupling == "score" and not sgd:
        yield (
            f"coupling='score' puts the coupling inside the gradient, and {kind} would rescale it per coordinate: the "
            "kernel would no longer be Gaussian. Use coupling='merge' or 'decoupled', or SGD (optim='sgd')."
        )


def with_trainer(args: Any) -> Iterator[str]:
    """Conflicts of TrainingArguments' fields with LSAM."""
    from transformers.trainer_pt_utils import AcceleratorConfig
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    optim, schedule = OptimizerNames(args.optim).value, SchedulerType(args.lr_scheduler_type).value
    assert isinstance(args.accelerator_config, AcceleratorConfig)  # whatever form it was given in
    several = args.identity.num_workers > 1
    if args.landscape_points and args.identity.comes_and_goes:
        yield (
            f"`landscape_points` must be 0 where workers come and go ({WORKER} is set), got "
            f"{args.landscape_points}: worker 0 would have to wait for what each of them has found. Measure the "
            "landscape in a launch."
        )
    if "layerwise" in optim or "lomo" in optim:
        yield (
            f"optim={optim!r} steps inside the backward pass, where SAM's first gradient is not yet "
            "known: pass 1 would already change the weights. Use an optimizer that steps after the backward pass, "
            "for example optim='adamw_torch'."
        )
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        yield (
            f"lr_scheduler_type={schedule!r} follows evaluation results, which only worker 0 "
            "has: the workers' learning rates would drift apart. Use a schedule of the step, for example 'linear' "
            "or 'cosine'."
        )
    if args.auto_find_batch_size and several:
        yield (
            "auto_find_batch_size starts training over in the worker that ran out of memory, while the others go "
            "on: the run would lose it. Set per_device_train_batch_size to a size that fits."
        )
    if not args.accelerator_config.use_seedable_sampler and several:
        yield (
            "accelerator_config.use_seedable_sampler=False lets each worker shuffle from a generator of its own, "
            "without a process group to agree on one: their shares of an epoch would overlap. Leave it True."
        )
