"""The configuration of an LSAM run: `LSAMArguments`, to be mixed into any TrainingArguments.

A new field is a line with its default and what it may hold, and a paragraph of the docstring, which is its help on the
command line as well. A worker or server that is to know of it has a field of the same name in its settings.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from accelerate.utils import parse_flag_from_env

from . import conflicts
from .algorithms import ALGORITHMS, ServerHalf, ServerSettings, WorkerHalf, WorkerSettings
from .anchor import OPTIMIZERS
from .batchnorm import STATISTICS
from .compression import BITS
from .coupling import drift_slowdown
from .fields import Rule, by_name, check_fields, help_from_docstring, number, one_of, whole
from .identity import SERVER_ADDRESS as SERVER_ADDRESS_VARIABLE
from .identity import Identity, pin
from .joining import Timeouts
from .optimizers import momentum_of, normalises_steps
from .server.service import ServiceSettings
from .transport.peer import HEARTBEAT

if TYPE_CHECKING:
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

SYNC_STEPS = (4, 2)  # of up to two workers, and of more, where `sync_steps` is left out

if TYPE_CHECKING:

    class _MixedIn:
        """What is used of TrainingArguments."""

        accelerator_config: dict[str, Any] | str | None
        auto_find_batch_size: bool
        learning_rate: float
        eval_on_start: bool
        lr_scheduler_type: SchedulerType | str
        optim: OptimizerNames | str
        output_dir: str | None
        use_cpu: bool

        def __post_init__(self) -> None: ...
        @property
        def device(self) -> torch.device: ...
        @property
        def should_save(self) -> bool: ...

else:
    _MixedIn = object

SERVER_ADDRESS = Rule(
    "the folder of a running server",
    "Start one first: python -m hf_lsam.server --run_dir DIR",
    lambda address: "://" in str(address) or os.path.isdir(str(address)),  # a transport of the caller's own
)
PORT = Rule("an integer in [0, 65535]", "0 lets the system choose.", lambda n: type(n) is int and 0 <= n < 2**16)
LANDSCAPE_POINTS = Rule(
    "0 or 4 k + 1 (5, 9, 13, 17, ...)",
    "So anchor and workers are among the points.",
    lambda points: type(points) is int and (points == 0 or (points >= 5 and points % 4 == 1)),
)
TRAINER_ONLY = "a field that needs Trainer's data loader or its loss"
# What fields were called, and what they are called now.
FORMER_NAMES = {"server_rule": "algorithm, with 'lsam', 'easgd' and 'lsgd' for 'smoothed', 'elastic' and 'leader'"}


def refuse_former_names(names: Iterable[str]) -> None:
    """
    Raises:
        TypeError: for the name that a field had before.
    """
    for name in names:
        if name in FORMER_NAMES:
            raise TypeError(f"`{name}` is now {FORMER_NAMES[name]}.")


@dataclass
@help_from_docstring
class LSAMArguments(_MixedIn):
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
            out, 4 for one or two workers and 2 for more: the more there are, the more of the noise their mean takes
            away, and the less each may stray from it. A push that the server cannot take yet goes out with the next, so
            a slow link lengthens it by itself.
        coupling (`str`, defaults to "merge"): how a worker is held near the anchor. "merge": at once, when a new anchor
            comes, measured from what it has handed in; it brakes nobody. "decoupled": at every step, after the
            optimizer's, as weight decay is in AdamW. "score": at every step, inside the gradient, as in the paper; for
            SGD, whose momentum m multiplies it by 1 / (1 - m).
        coupling_strength (`float`, defaults to 1.0): the share of its distance to the anchor that a worker gives up in
            a period of sync_steps. Denoted lambda0 in the paper, which uses 0.1 and 0.9 with coupling="score".
        compensate_coupling (`bool`, defaults to True): "decoupled" and "score" slow workers and anchor down (see
            `hf_lsam.coupling.drift_slowdown`); the optimizer steps with its learning rate multiplied by as much, and a
            learning rate means what it means without LSAM. Both rates are logged.
        scale_learning_rate (`bool`, *optional*): the optimizer steps with its learning rate multiplied by the square
            root of the number of workers of the launch. Left out, it does so with optimizers that normalise their
            steps, Adam and its kind, with LSAM's own algorithm: the noise of its own batch shortens each worker's way,
            and it takes so much more for n of them to move as data-parallel training does with the learning rate as it
            is (measured: docs/scaling.md). False where the learning rate was found with these workers, or is near the
            largest that one of them bears. Both rates are logged.
        share_steps (`bool`, defaults to False): the workers share the steps of the run: max_steps, or the steps of
            num_train_epochs, count once for each worker of the launch, and whoever is faster makes more of them, going
            on through its share of the data. The run then does not wait for the slowest worker. Learning rates follow
            the run. With server_address max_steps is the run's, whoever joins.
        num_workers (`int`, *optional*): how many workers the run is meant to have. Set, it makes a launch that starts
            another number an error.
        shared_memory_dir (`str`, defaults to "/dev/shm"): where workers and server of a machine exchange vectors. Needs
            room for num_workers + 2 of them.
        server_address (`str`, *optional*): the folder of a running server (`python -m hf_lsam.server --run_dir DIR`)
            to join as an external worker, and to leave when this launch has done its steps; n counts the workers that
            are there. Each launch evaluates and saves by itself: give each its own output_dir, seed and data_seed.
            max_steps is the budget of each worker, or with share_steps of all together. "scheme://..." joins by a
            transport of your own. Left out, it is the environment's HF_LSAM_SERVER_ADDRESS, if that is set;
            HF_LSAM_WORKER and HF_LSAM_NUM_WORKERS then make worker k of n of a process that is started by itself:
            it shares data, output_dir and seed with the others as in a launch of n.
        server_port (`int`, defaults to 0): where the first machine's server listens to those of the others, with
            MASTER_ADDR (--main_process_ip) as its host: the port that its firewall has to let them reach, and the only
            one that a server opens. 0 lets the system choose.
        server_timeout (`float`, defaults to 120.0): seconds that a worker whose server has died goes on alone, around
            the last anchor. If none has come back by then, it saves a checkpoint and ends with an error. An external
            worker waits as long for a server that has not started yet.
        worker_timeout (`float`, defaults to 600.0): seconds after which a worker whose process is frozen is dropped;
            one that evaluates, saves or compiles is not. When it wakes, it begins again at the anchor; the end of the
            run waits for it as long again.
        machine_timeout (`float`, defaults to 30.0): seconds without a sign of life after which another machine is
            lost, and its workers leave n. A lost machine goes on alone for server_timeout, and connects again by
            itself.
        snapshot_seconds (`float`, defaults to 30.0): seconds between two saves of the server's state, which a restarted
            server takes up; 0 saves none. Needs room for 6 more vectors where vectors are exchanged.
        max_bad_pushes (`int`, defaults to 3): refused pushes (NaN, infinity) in a row after which a worker begins again
            at the anchor, with a fresh optimizer state.
        exchange_bits (`int`, defaults to 8): of a value that crosses between machines: 32 (float32), or 8 or 4 with a
            scale for each block of 64. What rounding leaves behind goes with the next exchange; the final anchor is
            sent exactly. Within a machine vectors are float32.
        data_distribution (`str`, defaults to "sharded"): "sharded" shares each epoch among the workers and reshuffles
            it, as DDP does; "independent" lets each worker draw from all the data in its own order, as in the paper (an
            IterableDataset is then read whole by every worker: shuffle it with a seed of the worker's own).

    Parameters that control the anchor (the server):
        momentum_at (`str`, *optional*): whose the optimizer's momentum is, SGD's or the first decay rate of Adam and
            AdamW. "anchor": several workers step without any, and the anchor moves with momentum ** sync_steps by
            Nesterov's rule, so that it gathers their mean direction and not the noise of each one's batches. The
            optimizer steps with its learning rate multiplied by what the anchor's momentum lacks, and a learning rate
            means what it did; both are logged. "worker": each keeps its own, as a lone one always does. Left out,
            "anchor" wherever it goes: with these optimizers, algorithm="lsam", coupling="merge", the anchor's "sgd"
            and no sam_direction="momentum".
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

    sam_rho: Annotated[float, number("[0, inf)", "Use 0 to train without SAM.")] = 0.05
    sam_eps: Annotated[float, number("[0, inf)", "The default is 1e-12.")] = 1e-12
    sam_adaptive: bool = False
    sam_interval: Annotated[int, whole(1, "Use 1 to perturb at every step.")] = 1
    sam_direction: Annotated[str, one_of(("gradient", "momentum", "anchor"), "'gradient' is SAM's own.")] = "gradient"
    sam_ascent_fraction: Annotated[float, number("(0, 1]", "Use 1.0 for the whole batch."), TRAINER_ONLY] = 1.0
    langevin_temperature: Annotated[float, number("[0, inf)", "Use 0 for no noise.")] = 0.0

    algorithm: Annotated[str, one_of(tuple(ALGORITHMS), "The default is 'lsam'.")] = "lsam"
    sync_steps: Annotated[int | None, whole(1, "Use 1 to exchange after every step, or leave it out.")] = None
    coupling: Annotated[
        str, one_of(("merge", "decoupled", "score"), "'merge' brakes nobody; the paper couples in the 'score'.")
    ] = "merge"
    coupling_strength: Annotated[
        float, number("[0, inf)", "The default is 1.0; the paper uses 0.1 and 0.9 with coupling='score'.")
    ] = 1.0
    compensate_coupling: bool = True
    scale_learning_rate: bool | None = None
    share_steps: bool = False
    num_workers: Annotated[int | None, whole(1, "Leave it out to take as many as the launcher starts.")] = None
    shared_memory_dir: str = "/dev/shm"
    server_address: Annotated[str | None, SERVER_ADDRESS] = None
    server_port: Annotated[int, PORT] = 0
    server_timeout: Annotated[float, number("(0, inf)", "120 leaves time to start a server again by hand.")] = 120.0
    worker_timeout: Annotated[float, number("(0, inf)", "600 outlasts a host that swaps.")] = 600.0
    machine_timeout: Annotated[
        float, number(f"[{4 * HEARTBEAT:g}, inf)", "A few late heartbeats must not end a link.")
    ] = 30.0
    snapshot_seconds: Annotated[float, number("[0, inf)", "Use 0 to save none.")] = 30.0
    max_bad_pushes: Annotated[int, whole(1, "The default is 3.")] = 3
    exchange_bits: Annotated[int, one_of(BITS, "8 is a quarter of float32.")] = 8
    data_distribution: Annotated[
        str, one_of(("sharded", "independent"), "'sharded' is what DDP does."), TRAINER_ONLY
    ] = "sharded"

    momentum_at: Annotated[str | None, one_of(("anchor", "worker"), "Leave it out for whichever goes.")] = None
    anchor_lr: Annotated[float, number("(0, inf)", "1.0 moves the anchor to the mean of the samples.")] = 1.0
    anchor_momentum_correction: Annotated[float, number("[0, inf)", "Use 0 for none.")] = 0.0
    anchor_optimizer: Annotated[str, one_of(OPTIMIZERS, "'sgd' is the paper's.")] = "sgd"
    anchor_momentum: Annotated[float, number("[0, 1)", "The default is 0.9.")] = 0.9
    batchnorm_statistics: Annotated[str, one_of(STATISTICS, "'reestimate' is right for every model.")] = "reestimate"
    batchnorm_batches: Annotated[int, whole(1, "batchnorm_statistics='worker' keeps the worker's own.")] = 32
    landscape_points: Annotated[int, LANDSCAPE_POINTS, TRAINER_ONLY] = 0
    landscape_batches: Annotated[int, whole(1, "landscape_points=0 measures nothing."), TRAINER_ONLY] = 4

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        refuse_former_names(fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._saving_own_state = False
        self.validate()
        super().__post_init__()
        conflicts.refuse_first(conflicts.with_trainer(self))
        from transformers.trainer_pt_utils import AcceleratorConfig

        assert isinstance(self.accelerator_config, AcceleratorConfig)  # whatever form it was given in
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
        identity.require_workers(self.num_workers)
        return identity

    @cached_property
    def _setup_devices(self) -> torch.device:
        return self.pin_process(self.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))

    def pin_process(self, use_cpu: bool) -> torch.device:
        """Tells Accelerate that this worker is a job of its own (see `identity.pin`); returns its device."""
        from accelerate.state import PartialState

        device = pin(self.identity, use_cpu)
        self.distributed_state = PartialState()
        self._n_gpu = 0 if device.type == "cpu" else 1
        if device.type == "cpu":
            self.dataloader_pin_memory = False  # as with use_cpu: torch warns of it at every loader
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

    def steps_between_pushes(self, num_workers: int) -> int:
        """tau: `sync_steps`, or what serves as many workers."""
        if self.sync_steps is not None:
            return self.sync_steps
        few, many = SYNC_STEPS
        # Behind a server of its own, workers come and go, and all must agree on one tau.
        return few if num_workers <= 2 and self.server_address is None else many

    def shared_momentum(self, optimizer: torch.optim.Optimizer, workers: int = 1) -> float:
        """The momentum a step that the workers' optimizer leaves to the anchor; 0 where it keeps its own.

        Args:
            optimizer: of a worker.
            workers: n of the launch.
        """
        alone = workers == 1 and self.server_address is None
        kept = self.momentum_at == "worker" or any(conflicts.of_momentum_at_the_anchor(self))
        return 0.0 if alone or kept else momentum_of(optimizer)

    def server_settings(self, sync_steps: int, shared_momentum: float = 0.0) -> ServerSettings:
        """What the server needs to know of these fields, with tau as the run has it.

        Args:
            shared_momentum: see the method of that name.
        """
        moving_rate = self.coupling_strength if self.server_half.moves_elastically else 0.0
        settings = by_name(ServerSettings, self, sync_steps=sync_steps, moving_rate=moving_rate)
        if shared_momentum:
            settings = replace(settings, anchor_optimizer="nesterov", anchor_momentum=shared_momentum**sync_steps)
        return settings

    def worker_settings(self, sync_steps: int) -> WorkerSettings:
        """What a worker needs to know of these fields, with tau as the run has it."""
        keeps_anchor_move = self.sam_rho > 0 and self.sam_direction == "anchor"
        return by_name(WorkerSettings, self, sync_steps=sync_steps, keeps_anchor_move=keeps_anchor_move)

    @property
    def worker_half(self) -> type[WorkerHalf]:
        """What these fields make a worker do."""
        return ALGORITHMS[self.algorithm].worker_half(self.coupling)

    @property
    def server_half(self) -> type[ServerHalf]:
        """What these fields make the server do."""
        return ALGORITHMS[self.algorithm].server_half

    def learning_rate_factor(self, sync_steps: int, optimizer: torch.optim.Optimizer, workers: int = 1) -> float:
        """What the optimizer's learning rate is multiplied with: `compensate_coupling`, `scale_learning_rate` and
        `momentum_at`.

        A gradient moves SGD with momentum m by eta / (1 - m) in all, Adam's mean by eta; with m^tau at the anchor by
        1 / (1 - m^tau) of the worker's step.

        Args:
            sync_steps: tau of the run.
            optimizer: whose learning rate it is.
            workers: n of the launch.
        """
        scaled = self.scale_learning_rate
        if scaled is None:
            scaled = self.server_half.adds_up and normalises_steps(optimizer)
        factor = math.sqrt(workers) if scaled else 1.0
        if self.worker_half.brakes and self.compensate_coupling:
            in_score, own = self.coupling == "score", momentum_of(optimizer)
            factor *= drift_slowdown(self.coupling_strength, sync_steps, self.anchor_lr, in_score, own)
        momentum = self.shared_momentum(optimizer, workers)
        factor *= (1 - momentum**sync_steps) / (1 if normalises_steps(optimizer) else 1 - momentum)
        return factor

    def timeouts(self) -> Timeouts:
        """How long the run waits for processes that do not answer, in seconds."""
        return by_name(Timeouts, self, service=by_name(ServiceSettings, self))

    def kernel_precision(self, sync_steps: int) -> float:
        """lambda = lambda0 / (eta tau), with the configured learning rate; 0 where there is no kernel."""
        if not self.server_half.adds_up or not self.learning_rate:
            return 0.0
        return self.coupling_strength / (self.learning_rate * sync_steps)

    def lsam_fields(self) -> dict[str, Any]:
        """LSAM's own fields by name, without those of the Trainer they are mixed into."""
        return {each.name: getattr(self, each.name) for each in fields(LSAMArguments)}

    # --- validation ---

    def validate(self) -> None:
        """Checks LSAM's own fields, alone and together; what the environment says of the server is taken up first."""
        if self.server_address is None:
            self.server_address = os.environ.get(SERVER_ADDRESS_VARIABLE)
        check_fields(LSAMArguments, self)
        conflicts.refuse_first(conflicts.of_fields(self, self.sync_steps or min(SYNC_STEPS)))
