"""The configuration of an LSAM run: `LSAMArguments`, to be mixed into any TrainingArguments, and `LSAMConfig`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import strtobool

from .algorithms import ALGORITHMS, ServerSettings, WorkerSettings
from .anchor import OPTIMIZERS
from .batchnorm import STATISTICS
from .coupling import anchor_lr_bound, drift_slowdown
from .identity import Identity, pin
from .joining import Timeouts
from .server.service import ServiceSettings
from .transport.peer import HEARTBEAT

EXCHANGES = 60  # that a run has where `sync_steps` follows from its length ...
SYNC_STEPS = (4, 16)  # ... as long as they are this many steps apart

_SHARDING_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


@dataclass
class LSAMArguments:
    """LSAM's own fields, to be mixed in before a subclass of `TrainingArguments`.

    ```python
    @dataclass
    class LSAMSFTConfig(LSAMArguments, SFTConfig):
        pass
    ```

    Parameters that control the sampler (each worker's gradient):
        sam_rho (`float`, defaults to 0.05): L2 radius of the perturbation; 0 switches SAM off. Denoted rho in the
            paper. It acts on the worker's own batch: smaller batches want a smaller radius.
        sam_eps (`float`, defaults to 1e-12): stabiliser in the denominator. Denoted gamma in the paper.
        sam_adaptive (`bool`, defaults to False): measure the radius in units of each weight (ASAM). Useful radii are
            then 10 to 40 times larger.
        sam_interval (`int`, defaults to 1): perturb at every k-th optimizer step only, step plainly between.
        sam_direction (`str`, defaults to "gradient"): along what the step perturbs. "gradient": the batch's own, which
            costs a second pass. With one pass: "momentum", the optimizer's, against its sign, as in MSAM; "anchor", the
            way the anchor came in its last move, as in FedLESAM (several workers; plain until it has moved). The
            reported loss is then that of the one pass, and there is no lsam/sharpness.
        sam_ascent_fraction (`float`, defaults to 1.0): the share of each batch that pass 1 sees. At 0.25 a step costs
            1.25 forward-backward passes instead of 2. The reported loss is then that of pass 2, and lsam/sharpness
            compares it with the loss of that share. Each row of a batch must stand alone: trl's DPOTrainer and
            others whose batches stack pairs are refused.
        langevin_temperature (`float`, defaults to 0.0): temperature of the noise added to each step; 0 adds none, 1
            is exact stochastic gradient Langevin dynamics. Denoted T.

    Parameters that control the coupling and the exchange:
        algorithm (`str`, defaults to "lsam"): what a worker hands in and what the server does with it (see
            `hf_lsam.algorithms`). The baselines, with sam_rho=0: "easgd", coupling_strength its alpha; "lsgd".
        sync_steps (`int`, *optional*): local steps between two pushes. Denoted tau in the paper, where it is 16. Left
            out, it follows from the length of the run: about 60 exchanges, between 4 and 16 steps apart; 16 where the
            length is not known.
        coupling (`str`, defaults to "merge"): how a worker is held near the anchor. "merge": at once, when a new anchor
            comes, measured from what it has handed in; it brakes nobody. "decoupled": at every step, after the
            optimizer's, as weight decay is in AdamW. "score": at every step, inside the gradient, as in the paper; for
            SGD, whose momentum m makes 1 / (1 - m) of a pull.
        coupling_strength (`float`, defaults to 1.0): the share of its distance to the anchor that a worker gives up in
            a period of sync_steps. Denoted lambda0 in the paper, which uses 0.1 and 0.9 with coupling="score".
        compensate_coupling (`bool`, defaults to True): "decoupled" and "score" slow workers and anchor down (see
            `hf_lsam.coupling.drift_slowdown`); the optimizer steps with its learning rate multiplied by as much, and a
            learning rate means what it means without LSAM. Both rates are logged.
        num_workers (`int`, *optional*): how many workers the run is meant to have. Set, it makes a launch that starts
            another number an error.
        shared_memory_dir (`str`, defaults to "/dev/shm"): where workers and server of a machine exchange vectors. Needs
            room for num_workers + 2 of them.
        server_address (`str`, *optional*): the folder of a running server (`python -m hf_lsam.server --run_dir DIR`)
            to join as an external worker, and to leave when this launch has done its steps; n counts the workers that
            are there. Each launch evaluates and saves by itself: give each its own output_dir, seed and data_seed.
            max_steps is the budget of each worker. "scheme://..." joins by a transport of your own.
        server_timeout (`float`, defaults to 120.0): seconds that a worker whose server has died goes on alone, around
            the last anchor. If none has come back by then, it saves a checkpoint and ends with an error. An external
            worker waits as long for a server that has not started yet.
        worker_timeout (`float`, defaults to 600.0): seconds after which a worker that is not heard of is dropped.
            Longer than the longest evaluation. When it wakes, it begins again at the anchor.
        machine_timeout (`float`, defaults to 30.0): seconds without a sign of life after which another machine is
            lost, and its workers leave n. A lost machine goes on alone for server_timeout, and connects again by
            itself.
        snapshot_seconds (`float`, defaults to 30.0): seconds between two saves of the server's state, which a restarted
            server takes up; 0 saves none. Needs room for 6 more vectors where vectors are exchanged.
        max_bad_pushes (`int`, defaults to 3): refused pushes (NaN, infinity) in a row after which a worker begins again
            at the anchor, with a fresh optimizer state.
        data_distribution (`str`, defaults to "sharded"): "sharded" shares each epoch among the workers and reshuffles
            it, as DDP does; "independent" lets each worker draw from all the data in its own order, as in the paper (an
            IterableDataset is then read whole by every worker: shuffle it with a seed of the worker's own).

    Parameters that control the anchor (the server):
        anchor_lr (`float`, defaults to 1.0): step size of the anchor. Denoted eta' in the paper.
        anchor_momentum_correction (`float`, defaults to 0.0): weight of the change between two mean differences.
            Denoted beta in the paper.
        anchor_optimizer (`str`, defaults to "sgd"): "sgd", "nesterov" or "adam".
        anchor_momentum (`float`, defaults to 0.9): momentum of "nesterov", first decay rate of "adam".
        batchnorm_statistics (`str`, defaults to "reestimate"): where the anchor has BatchNorm's running statistics
            from, whenever it is evaluated or saved. "reestimate" takes them from training batches, at its weights;
            "average" lets the workers exchange theirs like parameters (0.1 % more traffic, no batch at evaluation);
            "worker" leaves those of the worker, which belong to other weights. Without BatchNorm it does nothing.
        batchnorm_batches (`int`, defaults to 32): how many training batches "reestimate" takes.

    Parameters that control what is measured when training ends:
        landscape_points (`int`, defaults to 0): points of a line from the anchor to each worker, and of each side of a
            grid on the plane through the anchor and two workers, at which worker 0 evaluates the loss for `hf-lsam
            report`. 4 k + 1, such as 17, so that anchor and workers are among them; 0 measures nothing.
        landscape_batches (`int`, defaults to 4): how many training batches, always the same, each of these takes.

    Raises:
        ValueError: for a value out of range, for a configuration in which the distance between workers and anchor
            would grow without bound, and for what LSAM cannot be combined with.
    """

    sam_rho: float = field(default=0.05, metadata={"help": "L2 radius of the SAM perturbation; 0 switches SAM off."})
    sam_eps: float = field(default=1e-12, metadata={"help": "Stabiliser in the denominator of the perturbation."})
    sam_adaptive: bool = field(default=False, metadata={"help": "Measure the radius in units of each weight (ASAM)."})
    sam_interval: int = field(default=1, metadata={"help": "Perturb at every k-th optimizer step only."})
    sam_direction: str = field(default="gradient", metadata={"help": "'gradient', 'momentum' or 'anchor' (one pass)."})
    sam_ascent_fraction: float = field(default=1.0, metadata={"help": "Share of each batch that pass 1 sees."})
    langevin_temperature: float = field(default=0.0, metadata={"help": "Temperature of the noise added to each step."})

    algorithm: str = field(default="lsam", metadata={"help": "'lsam', 'easgd' or 'lsgd'."})
    sync_steps: int | None = field(default=None, metadata={"help": "Local steps between two pushes (tau)."})
    coupling: str = field(default="merge", metadata={"help": "How workers are held: 'merge', 'decoupled' or 'score'."})
    coupling_strength: float = field(default=1.0, metadata={"help": "Share of the distance given up in a period."})
    compensate_coupling: bool = field(default=True, metadata={"help": "Undo the brake of a coupling at every step."})
    num_workers: int | None = field(default=None, metadata={"help": "Number of workers the run is meant to have."})
    shared_memory_dir: str = field(default="/dev/shm", metadata={"help": "Where workers and server exchange vectors."})
    server_address: str | None = field(default=None, metadata={"help": "Folder of a running server to join."})
    server_timeout: float = field(default=120.0, metadata={"help": "Seconds to go on alone when the server has died."})
    worker_timeout: float = field(default=600.0, metadata={"help": "Seconds of silence until a worker is dropped."})
    machine_timeout: float = field(default=30.0, metadata={"help": "Seconds of silence until a machine is lost."})
    snapshot_seconds: float = field(default=30.0, metadata={"help": "Seconds between saves of the server's state."})
    max_bad_pushes: int = field(default=3, metadata={"help": "Refused pushes in a row until x is the anchor again."})
    data_distribution: str = field(default="sharded", metadata={"help": "'sharded' or 'independent'."})

    anchor_lr: float = field(default=1.0, metadata={"help": "Step size of the anchor."})
    anchor_momentum_correction: float = field(
        default=0.0, metadata={"help": "Momentum correction of the anchor (beta)."}
    )
    anchor_optimizer: str = field(default="sgd", metadata={"help": "'sgd', 'nesterov' or 'adam'."})
    anchor_momentum: float = field(default=0.9, metadata={"help": "Momentum of 'nesterov', beta1 of 'adam'."})
    batchnorm_statistics: str = field(
        default="reestimate", metadata={"help": "The anchor's BatchNorm statistics: 'reestimate', 'average', 'worker'."}
    )
    batchnorm_batches: int = field(default=32, metadata={"help": "Training batches to re-estimate them from."})
    landscape_points: int = field(default=0, metadata={"help": "Points a line of the loss landscape, 4 k + 1; or 0."})
    landscape_batches: int = field(default=4, metadata={"help": "Training batches that each of them takes."})

    def __post_init__(self):
        self._saving_own_state = False
        self.validate()
        super().__post_init__()
        self._refuse_incompatible()
        if not self.accelerator_config.use_seedable_sampler and self.identity.num_workers > 1:
            raise ValueError(
                "accelerator_config.use_seedable_sampler=False lets each worker shuffle from a generator of its own, "
                "without a process group to agree on one: their shares of an epoch would overlap. Leave it True."
            )
        # A dispatcher would read on process 0 and broadcast; every worker reads its own share instead.
        self.accelerator_config.dispatch_batches = False

    # --- who this process is; TrainingArguments asks for it at construction ---

    @cached_property
    def identity(self) -> Identity:
        """This process among the workers.

        Raises:
            ValueError: if the launcher started another number of workers than `num_workers`, or fewer than it was
                asked for.
        """
        identity = Identity.from_environment()
        if self.num_workers is not None and identity.num_workers != self.num_workers:
            raise ValueError(
                f"num_workers={self.num_workers}, but {identity.num_workers} were started: the run would not be the "
                f"one that was configured. Launch with `accelerate launch --multi_gpu --num_processes "
                f"{self.num_workers}` (on CPU too, with use_cpu=True: without --multi_gpu only one process starts "
                "there), or set num_workers to what you want."
            )
        return identity

    @cached_property
    def _setup_devices(self) -> torch.device:
        use_cpu = self.use_cpu or bool(strtobool(os.environ.get("ACCELERATE_USE_CPU", "False")))
        return self.pin_process(use_cpu)

    def pin_process(self, use_cpu: bool) -> torch.device:
        """Tells Accelerate that this worker is a job of its own (see `identity.pin`); returns its device."""
        from accelerate.state import PartialState

        device = pin(self.identity, use_cpu)
        self.distributed_state = PartialState()
        self._n_gpu = 0 if device.type == "cpu" else 1
        return device

    @property
    def should_save(self) -> bool:
        """Process 0 saves the model; every worker saves its own training state, and only inside `saving_own_state`."""
        return self._saving_own_state or super().should_save

    @contextmanager
    def saving_own_state(self) -> Iterator[None]:
        """Inside, Trainer writes optimizer, scheduler and trainer state of this worker, whatever its rank."""
        self._saving_own_state = True
        try:
            yield
        finally:
            self._saving_own_state = False

    # --- what the rooms below need, without a config object ---

    def steps_between_pushes(self, run_steps: int | None = None) -> int:
        """tau: `sync_steps`, or what follows from the length of the run.

        Args:
            run_steps: optimizer steps of a worker in the whole run, where known.
        """
        if self.sync_steps is not None:
            return self.sync_steps
        shortest, longest = SYNC_STEPS
        if run_steps is None or self.server_address is not None:  # external workers need not know each other's length
            return longest
        return min(longest, max(shortest, round(run_steps / EXCHANGES)))

    def server_settings(self, sync_steps: int) -> ServerSettings:
        return ServerSettings(
            sync_steps=sync_steps,
            anchor_lr=self.anchor_lr,
            anchor_momentum_correction=self.anchor_momentum_correction,
            anchor_optimizer=self.anchor_optimizer,
            anchor_momentum=self.anchor_momentum,
            algorithm=self.algorithm,
            moving_rate=self.coupling_strength if self.algorithm == "easgd" else 0.0,
        )

    def worker_settings(self, sync_steps: int) -> WorkerSettings:
        return WorkerSettings(
            sync_steps=sync_steps,
            coupling_strength=self.coupling_strength,
            coupling=self.coupling,
            langevin_temperature=self.langevin_temperature,
            algorithm=self.algorithm,
            max_bad_pushes=self.max_bad_pushes,
            keeps_anchor_move=self.sam_rho > 0 and self.sam_direction == "anchor",
        )

    @property
    def has_stepwise_coupling(self) -> bool:
        """Whether LSAM's workers are pulled at every step, as in the paper's Algorithm 2."""
        return self.algorithm == "lsam" and self.coupling != "merge"

    def learning_rate_factor(self, sync_steps: int, momentum: float = 0.0) -> float:
        """What the optimizer's learning rate is multiplied with, so that the coupling brakes nothing.

        Args:
            sync_steps: tau of the run.
            momentum: of SGD.
        """
        if not (self.has_stepwise_coupling and self.compensate_coupling):
            return 1.0
        in_score = self.coupling == "score"
        return drift_slowdown(self.coupling_strength, sync_steps, self.anchor_lr, in_score, momentum)

    def timeouts(self) -> Timeouts:
        service = ServiceSettings(self.worker_timeout, self.snapshot_seconds)
        return Timeouts(service, self.server_timeout, self.machine_timeout)

    def kernel_precision(self, sync_steps: int) -> float:
        """lambda = lambda0 / (eta tau), with the configured learning rate; 0 where there is no kernel."""
        if self.algorithm != "lsam" or not self.learning_rate:
            return 0.0
        return self.coupling_strength / (self.learning_rate * sync_steps)

    def lsam_fields(self) -> dict[str, Any]:
        """LSAM's own fields by name, without those of the Trainer they are mixed into."""
        return {each.name: getattr(self, each.name) for each in fields(LSAMArguments)}

    # --- validation ---

    def validate(self):
        """Checks LSAM's own fields, alone and together."""
        self._validate_ranges()
        self._validate_stability()
        self._refuse_sharding()

    def refuse_optimizer(self, optimizer: torch.optim.Optimizer):
        """Raises ValueError where the optimizer does not go with `coupling` or `sam_direction`."""
        sgd = "nesterov" in optimizer.param_groups[0]
        if self.sam_rho and self.sam_direction == "momentum" and sgd and not optimizer.param_groups[0]["momentum"]:
            raise ValueError(
                "sam_direction='momentum' perturbs along the optimizer's momentum, and SGD keeps none: every step "
                "would be a plain one. Give it a momentum (optim_args='momentum=0.9'), or use sam_direction='gradient'."
            )
        if self.has_stepwise_coupling and self.coupling == "score" and not sgd:
            raise ValueError(
                f"coupling='score' puts the pull inside the gradient, and "
                f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__} would rescale it per coordinate: the "
                "kernel would no longer be Gaussian. Use coupling='merge' or 'decoupled', or SGD (optim='sgd')."
            )

    def _validate_ranges(self):
        def require(ok: bool, name: str, rule: str, remedy: str):
            if not ok:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}. {remedy}")

        def number(name: str) -> float:
            value = getattr(self, name)
            return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan

        def whole(name: str) -> bool:
            return isinstance(getattr(self, name), int) and not isinstance(getattr(self, name), bool)

        require(0 <= number("sam_rho") < math.inf, "sam_rho", "finite and >= 0", "Use 0 to train without SAM.")
        require(0 <= number("sam_eps") < math.inf, "sam_eps", "finite and >= 0", "The default is 1e-12.")
        require(
            whole("sam_interval") and self.sam_interval >= 1,
            "sam_interval",
            "an integer >= 1",
            "Use 1 to perturb at every step.",
        )
        require(
            self.sam_direction in ("gradient", "momentum", "anchor"),
            "sam_direction",
            "'gradient', 'momentum' or 'anchor'",
            "'gradient' is SAM's own.",
        )
        require(
            self.sam_direction == "gradient" or number("sam_ascent_fraction") == 1,
            "sam_ascent_fraction",
            f"1 with sam_direction={self.sam_direction!r}, which has no pass for the ascent",
            "Use sam_direction='gradient' to make that pass cheaper.",
        )
        require(
            0 < number("sam_ascent_fraction") <= 1, "sam_ascent_fraction", "in (0, 1]", "Use 1.0 for the whole batch."
        )
        require(
            0 <= number("langevin_temperature") < math.inf,
            "langevin_temperature",
            "finite and >= 0",
            "Use 0 for no noise.",
        )
        require(
            self.sync_steps is None or (whole("sync_steps") and self.sync_steps >= 1),
            "sync_steps",
            "an integer >= 1 or None",
            "Use 1 to exchange after every step, or leave it out.",
        )
        require(self.algorithm in ALGORITHMS, "algorithm", f"one of {', '.join(ALGORITHMS)}", "The default is 'lsam'.")
        require(
            self.coupling in ("merge", "decoupled", "score"),
            "coupling",
            "'merge', 'decoupled' or 'score'",
            "'merge' brakes nobody; the paper couples in the 'score'.",
        )
        require(
            0 <= number("coupling_strength") < math.inf,
            "coupling_strength",
            "finite and >= 0",
            "The default is 1.0; the paper uses 0.1 and 0.9 with coupling='score'.",
        )
        at_once = self.algorithm == "easgd" or (self.algorithm == "lsam" and self.coupling == "merge")
        require(
            not at_once or self.coupling_strength <= 1,
            "coupling_strength",
            "at most 1 where it is a worker's whole move at an exchange (coupling='merge', algorithm='easgd')",
            "Beyond, it would move past the anchor. EASGD's paper uses 0.9 / n.",
        )
        shortest = self.sync_steps or SYNC_STEPS[0]
        require(
            at_once or self.coupling_strength <= shortest / 2,
            "coupling_strength",
            f"at most half of sync_steps ({shortest})",
            "Beyond, a step takes more than half of a worker's distance to the anchor away, and nothing that it learns "
            "lasts. Use a smaller one, or raise sync_steps.",
        )
        require(
            self.num_workers is None or (whole("num_workers") and self.num_workers >= 1),
            "num_workers",
            "an integer >= 1 or None",
            "Leave it out to take as many as the launcher starts.",
        )
        require(
            self.server_address is None or "://" in str(self.server_address) or os.path.isdir(self.server_address),
            "server_address",
            "the folder of a running server",
            "Start one first: python -m hf_lsam.server --run_dir DIR",
        )
        for name, remedy in {
            "server_timeout": "120 leaves time to start a server again by hand.",
            "worker_timeout": "It must be longer than the longest evaluation.",
        }.items():
            require(0 < number(name) < math.inf, name, "finite and > 0", remedy)
        require(
            4 * HEARTBEAT <= number("machine_timeout") < math.inf,
            "machine_timeout",
            f"finite and >= {4 * HEARTBEAT:g}",
            "A few late heartbeats must not end a link.",
        )
        require(
            0 <= number("snapshot_seconds") < math.inf, "snapshot_seconds", "finite and >= 0", "Use 0 to save none."
        )
        require(
            whole("max_bad_pushes") and self.max_bad_pushes >= 1,
            "max_bad_pushes",
            "an integer >= 1",
            "The default is 3.",
        )
        require(
            self.data_distribution in ("sharded", "independent"),
            "data_distribution",
            "'sharded' or 'independent'",
            "'sharded' is what DDP does.",
        )
        require(
            0 < number("anchor_lr") < math.inf,
            "anchor_lr",
            "finite and > 0",
            "1.0 moves the anchor to the mean of the samples.",
        )
        require(
            0 <= number("anchor_momentum_correction") < math.inf,
            "anchor_momentum_correction",
            "finite and >= 0",
            "Use 0 for none.",
        )
        require(
            self.anchor_optimizer in OPTIMIZERS, "anchor_optimizer", f"one of {OPTIMIZERS}", "'sgd' is the paper's."
        )
        require(0 <= number("anchor_momentum") < 1, "anchor_momentum", "in [0, 1)", "The default is 0.9.")
        require(
            self.batchnorm_statistics in STATISTICS,
            "batchnorm_statistics",
            f"one of {STATISTICS}",
            "'reestimate' is right for every model.",
        )
        require(
            whole("batchnorm_batches") and self.batchnorm_batches >= 1,
            "batchnorm_batches",
            "an integer >= 1",
            "batchnorm_statistics='worker' keeps the worker's own.",
        )
        require(
            whole("landscape_points")
            and (self.landscape_points == 0 or (self.landscape_points >= 5 and self.landscape_points % 4 == 1)),
            "landscape_points",
            "0 or 4 k + 1 (5, 9, 13, 17, ...)",
            "So anchor and workers are among the points.",
        )
        require(
            whole("landscape_batches") and self.landscape_batches >= 1,
            "landscape_batches",
            "an integer >= 1",
            "landscape_points=0 measures nothing.",
        )
        require(
            os.path.isdir(self.shared_memory_dir) and os.access(self.shared_memory_dir, os.W_OK),
            "shared_memory_dir",
            "a folder this process may write to",
            "Use a folder on a local disk where there is no /dev/shm.",
        )

    def _validate_stability(self):
        if not self.has_stepwise_coupling:
            return  # merging workers hand in what they have moved, which an offset from the anchor is no part of
        if self.anchor_optimizer == "adam":
            return  # its step does not scale with the distance, so distances cannot feed on themselves
        momentum = self.anchor_momentum if self.anchor_optimizer == "nesterov" else 0.0
        sync_steps = self.sync_steps or SYNC_STEPS[0]  # where the bound is lowest
        bound = anchor_lr_bound(self.coupling_strength, sync_steps, self.anchor_momentum_correction, momentum)
        if self.anchor_lr >= bound:
            raise ValueError(
                f"anchor_lr={self.anchor_lr} with coupling_strength={self.coupling_strength}, "
                f"sync_steps={sync_steps}, anchor_momentum_correction={self.anchor_momentum_correction} and "
                f"anchor_optimizer={self.anchor_optimizer!r} is outside the stability region (anchor_lr < "
                f"{bound:.4g}): the distance between workers and anchor would grow from period to period until it is "
                f"NaN. Use anchor_lr={math.floor(0.8 * bound * 1000) / 1000:g}, or a smaller "
                "anchor_momentum_correction."
            )

    def _refuse_sharding(self):
        asked = [
            name for variable, name in _SHARDING_VARIABLES.items() if os.environ.get(variable, "").lower() == "true"
        ]
        asked += [name for name in ("fsdp", "deepspeed", "parallelism_config") if getattr(self, name, None)]
        if asked:
            raise ValueError(
                f"LSAM cannot be combined with {asked[0]} yet: a worker must hold whole parameters, or its norm, its "
                "perturbation and its differences would be those of a shard. Launch without it (`--multi_gpu`); to "
                "save memory train a LoRA adapter, or use gradient checkpointing and gradient accumulation."
            )

    def _refuse_incompatible(self):
        if "layerwise" in self.optim.value or "lomo" in self.optim.value:
            raise ValueError(
                f"optim={self.optim.value!r} steps inside the backward pass, where SAM's first gradient is not yet "
                "known: pass 1 would already change the weights. Use an optimizer that steps after the backward pass, "
                "for example optim='adamw_torch'."
            )
        if self.lr_scheduler_type.value in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type.value!r} follows evaluation results, which only worker 0 "
                "has: the workers' learning rates would drift apart. Use a schedule of the step, for example 'linear' "
                "or 'cosine'."
            )
        if self.algorithm != "lsam" and self.identity.num_machines > 1:
            raise ValueError(
                f"algorithm={self.algorithm!r} works on one machine only: between machines sums of differences cross, "
                "and that is no exchange of this algorithm. Use algorithm='lsam', or one machine."
            )
        if self.auto_find_batch_size and self.identity.num_workers > 1:
            raise ValueError(
                "auto_find_batch_size starts training over in the worker that ran out of memory, while the others go "
                "on: the run would lose it. Set per_device_train_batch_size to a size that fits."
            )


@dataclass
class LSAMConfig(LSAMArguments, TrainingArguments):
    """Every field of `TrainingArguments`, and LSAM's own (see `LSAMArguments`)."""
