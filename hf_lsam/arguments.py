"""The configuration of an LSAM run: `LSAMArguments`, to be mixed into any TrainingArguments.

A new field takes one line, with its default and what it may hold, and one paragraph of the docstring, which is also its
help on the command line. If a worker or the server needs it, its settings have a field of the same name.
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

SYNC_STEPS = (4, 2)  # for up to two workers, and for more, if `sync_steps` is not set

if TYPE_CHECKING:

    class _MixedIn:
        """The parts of TrainingArguments that are used."""

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
    "the folder of a server",
    "Start one (python -m hf_lsam.server --run_dir DIR), or create the folder first, and workers wait for it.",
    lambda address: "://" in str(address) or os.path.isdir(str(address)),  # "://": the caller's own transport
)
PORT = Rule("an integer in [0, 65535]", "0 lets the system choose.", lambda n: type(n) is int and 0 <= n < 2**16)
LANDSCAPE_POINTS = Rule(
    "0 or 4 k + 1 (5, 9, 13, 17, ...)",
    "So anchor and workers are among the points.",
    lambda points: type(points) is int and (points == 0 or (points >= 5 and points % 4 == 1)),
)
TRAINER_ONLY = "a field that needs Trainer's data loader or its loss"
# Former names of fields, and what replaced them.
FORMER_NAMES = {"server_rule": "algorithm, with 'lsam', 'easgd' and 'lsgd' for 'smoothed', 'elastic' and 'leader'"}


def refuse_former_names(names: Iterable[str]) -> None:
    """
    Raises:
        TypeError: for a former name of a field.
    """
    for name in names:
        if name in FORMER_NAMES:
            raise TypeError(f"`{name}` is now {FORMER_NAMES[name]}.")


@dataclass
@help_from_docstring
class LSAMArguments(_MixedIn):
    """LSAM's own fields, to be mixed in ahead of `TrainingArguments` or a subclass of it.

    ```python
    @dataclass
    class LSAMSFTConfig(LSAMArguments, SFTConfig):
        pass
    ```

    Parameters that control the sampler (each worker's gradient):
        sam_rho (`float`, defaults to 0.05): L2 radius of the perturbation; 0 switches SAM off. Denoted rho in the
            paper. It applies to each worker's own batch, so smaller batches call for a smaller radius.
        sam_eps (`float`, defaults to 1e-12): stabiliser in the denominator. Denoted gamma in the paper.
        sam_adaptive (`bool`, defaults to False): measure the radius in units of each weight (ASAM). Useful radii are
            then 10 to 40 times larger.
        sam_interval (`int`, defaults to 1): perturb only at every k-th optimizer step; the steps in between use the
            plain gradient.
        sam_direction (`str`, defaults to "gradient"): the direction in which a step perturbs. "gradient" is that of the
            batch and costs a second pass. The other two need one pass: "momentum" perturbs against the optimizer's
            momentum, as in MSAM; "anchor" perturbs back along the anchor's last move, as in FedLESAM (it needs several
            workers, and steps are plain until the anchor has moved). The reported loss is then that of the single pass,
            and there is no lsam/sharpness.
        sam_ascent_fraction (`float`, defaults to 1.0): the share of each batch that pass 1 sees. At 0.25 a step costs
            1.25 forward-backward passes instead of 2. The reported loss is then that of pass 2, and lsam/sharpness
            compares it with the loss on that share. The rows of a batch must be independent: trl's DPOTrainer and
            others whose batches stack pairs are refused.
        langevin_temperature (`float`, defaults to 0.0): temperature of the noise added at each step; 0 adds none, 1
            is exact stochastic gradient Langevin dynamics. Denoted T.

    Parameters that control the coupling and the exchange:
        algorithm (`str`, defaults to "lsam"): what a worker pushes and what the server does with it (see
            `hf_lsam.algorithms`). "easgd", with coupling_strength as its alpha, and "lsgd" are baselines, for which the
            papers use sam_rho=0.
        sync_steps (`int`, *optional*): local steps between two pushes. Denoted tau in the paper, which uses 16. If not
            set, 4 for one or two workers, and 2 for more or with server_address: the more workers there are, the more
            noise their mean averages out, and the less each of them may stray from it. A push that the server cannot
            take yet is sent with the next one, so a slow link lengthens the interval automatically. Set sync_steps to
            that interval then, which the log tells: the anchor's momentum depends on it.
        coupling (`str`, defaults to "merge"): how a worker is held near the anchor. "merge": all at once when a new
            anchor arrives, with the distance measured from what the worker has pushed; this does not slow the worker
            down. "decoupled": at every step, after the optimizer's, like the weight decay of AdamW. "score": at every
            step, inside the gradient, as in the paper; only for SGD, whose momentum m multiplies it by 1 / (1 - m).
        coupling_strength (`float`, defaults to 1.0): the share of its distance to the anchor that a worker gives up in
            a period of sync_steps. Denoted lambda0 in the paper, which uses 0.1 and 0.9 with coupling="score".
        compensate_coupling (`bool`, defaults to True): "decoupled" and "score" slow workers and anchor down (see
            `hf_lsam.coupling.drift_slowdown`). The optimizer steps with its learning rate multiplied by the same
            factor, so that a learning rate means what it means without LSAM. Both rates are logged.
        scale_learning_rate (`bool`, *optional*): multiply the learning rate that the optimizer steps with by the square
            root of the number of workers in the launch. If not set, this is done with LSAM's own algorithm for
            optimizers that normalise their steps, Adam and its kind: the noise in its own batch shortens a worker's
            steps, and n workers need this factor to move as data-parallel training does with the learning rate as it is
            (measured: docs/scaling.md). Set it to False if the learning rate was tuned with these workers, or is close
            to the largest that a single worker tolerates. Both rates are logged.
        share_steps (`bool`, defaults to False): share the steps of the run among the workers. max_steps, or the steps
            of num_train_epochs, count once for each worker of the launch, and faster workers take more of them,
            continuing through their share of the data. The run then does not wait for the slowest worker, and learning
            rates follow the run. With server_address, max_steps is the budget of the whole run, whoever joins; with
            HF_LSAM_NUM_WORKERS=n, it counts n times.
        num_workers (`int`, *optional*): how many workers the run is meant to have. If set, it is an error to launch any
            other number.
        shared_memory_dir (`str`, defaults to "/dev/shm"): where the workers and the server of a machine exchange
            vectors. Needs room for num_workers + 2 vectors, and for 6 more with snapshots.
        server_address (`str`, *optional*): the folder of a running server (`python -m hf_lsam.server --run_dir DIR`)
            to join as an external worker; the worker leaves when this launch has taken its steps. n counts the workers
            that are present. Each launch evaluates and saves on its own, so give each its own output_dir, seed and
            data_seed. max_steps is the budget of each worker or, with share_steps, of all together. "scheme://..."
            joins through a transport of your own. If not set, the environment's HF_LSAM_SERVER_ADDRESS is used, if
            there is one; HF_LSAM_WORKER=k and HF_LSAM_NUM_WORKERS=n then make a process that is started individually
            worker k of n, which shares data, output_dir and seed with the others, as in a launch of n.
        server_port (`int`, defaults to 0): the port on which the first machine's server listens for the servers of the
            others, with MASTER_ADDR (--main_process_ip) as its host. It is the only port that a server opens, and that
            machine's firewall must let the others reach it. 0 lets the system choose.
        server_timeout (`float`, defaults to 120.0): seconds for which a worker whose server has died continues alone,
            around the last anchor. If no server has come back by then, it saves a checkpoint and ends with an error. An
            external worker also waits this long for a server that has not started yet, if its folder is there.
        worker_timeout (`float`, defaults to 600.0): seconds after which a worker whose process is frozen is dropped;
            one that evaluates, saves or compiles is not. When it wakes up, it starts again at the anchor; the end of
            the run waits this long again for it.
        machine_timeout (`float`, defaults to 30.0): seconds without a heartbeat after which another machine is
            considered lost and its workers no longer count towards n. A lost machine continues alone for
            server_timeout, and reconnects automatically.
        snapshot_seconds (`float`, defaults to 30.0): seconds between two snapshots of the server's state, from which a
            restarted server continues; 0 takes none. Needs room for 6 more vectors in the folder where vectors are
            exchanged.
        max_bad_pushes (`int`, defaults to 3): number of refused pushes (NaN, infinity) in a row after which a worker
            starts again at the anchor, with a fresh optimizer state.
        exchange_bits (`int`, defaults to 8): bits per value sent between machines: 32 (float32), or 8 or 4 with one
            scale for each block of 64 values. The rounding error is carried over to the next exchange, and the final
            anchor is sent exactly. Within a machine vectors are float32.
        data_distribution (`str`, defaults to "sharded"): "sharded" shares each epoch among the workers and reshuffles
            it, as DDP does; "independent" lets each worker draw from all the data in its own order, as in the paper
            (every worker then reads all of an IterableDataset: shuffle it with a different seed in each worker).

    Parameters that control the anchor (the server):
        momentum_at (`str`, *optional*): where the optimizer's momentum (of SGD, or the first decay rate of Adam and
            AdamW) is applied. "anchor": several workers step without momentum, and the anchor moves by Nesterov's rule
            with momentum ** sync_steps, so that it accumulates their mean direction and not the noise of each worker's
            batches. The learning rate that the optimizer steps with is multiplied by a factor that makes up for the
            difference, so that a learning rate means what it did before; both are logged. "worker": each worker keeps
            its own momentum, as a worker that trains alone always does. If not set, "anchor" wherever possible: with
            these optimizers, algorithm="lsam", coupling="merge", anchor_optimizer="sgd", and any sam_direction except
            "momentum".
        anchor_lr (`float`, defaults to 1.0): step size of the anchor. Denoted eta' in the paper.
        anchor_momentum_correction (`float`, defaults to 0.0): weight of the change between two mean differences.
            Denoted beta in the paper.
        anchor_optimizer (`str`, defaults to "sgd"): "sgd", "nesterov" or "adam".
        anchor_momentum (`float`, defaults to 0.9): momentum of "nesterov", first decay rate of "adam".
        batchnorm_statistics (`str`, defaults to "reestimate"): where the anchor's BatchNorm running statistics come
            from whenever it is evaluated or saved. "reestimate" computes them from training batches at the anchor's
            weights; "average" lets the workers exchange theirs like parameters (0.1 % more traffic, and no batches at
            evaluation); "worker" keeps those of the worker, which belong to other weights. Has no effect on models
            without BatchNorm.
        batchnorm_batches (`int`, defaults to 32): how many training batches "reestimate" uses.

    Parameters that control what is measured when training ends:
        landscape_points (`int`, defaults to 0): the number of points on a line from the anchor to each worker, and on
            each side of a grid in the plane through the anchor and two workers, at which worker 0 evaluates the loss
            for `hf-lsam report`. Must be 4 k + 1, such as 17, so that anchor and workers are among the points; 0
            measures nothing.
        landscape_batches (`int`, defaults to 4): how many training batches, always the same ones, are evaluated at each
            of these points.

    Raises:
        ValueError: for a value out of range, for a configuration in which the distance between workers and anchor
            would grow without bound, or for a combination that LSAM does not support.
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
        # A dispatcher would read on process 0 and broadcast; here every worker reads its own share instead.
        self.accelerator_config.dispatch_batches = False

    # --- who this process is; TrainingArguments asks for this at construction ---

    @cached_property
    def identity(self) -> Identity:
        """This process among the workers.

        Raises:
            ValueError: if the launcher started a different number of workers from `num_workers`, or fewer than it was
                asked for; see also `Identity.from_environment`.
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
            self.dataloader_pin_memory = False  # as Trainer does for use_cpu: torch would warn at every loader
        return device

    @property
    def should_save(self) -> bool:
        """Process 0 saves the model; every worker saves its own training state, and only inside `saving_own_state`."""
        return self._saving_own_state or super().should_save

    @contextmanager
    def saving_own_state(self) -> Iterator[None]:
        """Inside, Trainer writes this worker's optimizer, scheduler and trainer state, whatever its rank."""
        self._saving_own_state = True
        try:
            yield
        finally:
            self._saving_own_state = False

    # --- what the layers below need, without a config object ---

    def steps_between_pushes(self, num_workers: int) -> int:
        """tau: `sync_steps`, or the default for this many workers."""
        if self.sync_steps is not None:
            return self.sync_steps
        few, many = SYNC_STEPS
        # With `server_address`, workers come and go, and all must agree on one tau.
        return few if num_workers <= 2 and self.server_address is None else many

    def shared_momentum(self, optimizer: torch.optim.Optimizer, workers: int = 1) -> float:
        """The momentum, per step, that the workers' optimizer leaves to the anchor; 0 if it keeps its own.

        Args:
            optimizer: a worker's optimizer.
            workers: n, the number of workers of the launch.
        """
        alone = workers == 1 and self.server_address is None
        kept = self.momentum_at == "worker" or any(conflicts.of_momentum_at_the_anchor(self))
        return 0.0 if alone or kept else momentum_of(optimizer)

    def server_settings(self, sync_steps: int, shared_momentum: float = 0.0) -> ServerSettings:
        """What the server needs to know of these fields.

        Args:
            sync_steps: tau of the run.
            shared_momentum: see the method of that name.
        """
        moving_rate = self.coupling_strength if self.server_half.moves_elastically else 0.0
        of_movement = self.worker_half.pushes_movement
        settings = by_name(
            ServerSettings, self, sync_steps=sync_steps, moving_rate=moving_rate, pushes_movement=of_movement
        )
        if shared_momentum:
            settings = replace(settings, anchor_optimizer="nesterov", anchor_momentum=shared_momentum**sync_steps)
        return settings

    def worker_settings(self, sync_steps: int, weight: int = 1) -> WorkerSettings:
        """What a worker needs to know of these fields.

        Args:
            sync_steps: tau of the run.
            weight: see `WorkerSettings`.
        """
        keeps_anchor_move = self.sam_rho > 0 and self.sam_direction == "anchor"
        return by_name(WorkerSettings, self, sync_steps=sync_steps, keeps_anchor_move=keeps_anchor_move, weight=weight)

    @property
    def worker_half(self) -> type[WorkerHalf]:
        """The worker's half of the configured algorithm and coupling."""
        return ALGORITHMS[self.algorithm].worker_half(self.coupling)

    @property
    def server_half(self) -> type[ServerHalf]:
        """The server's half of the configured algorithm."""
        return ALGORITHMS[self.algorithm].server_half

    def learning_rate_factor(self, sync_steps: int, optimizer: torch.optim.Optimizer, workers: int = 1) -> float:
        """The factor by which the optimizer's learning rate is multiplied, because of `compensate_coupling`,
        `scale_learning_rate` and `momentum_at`.

        In total, one gradient moves x by eta / (1 - m) with SGD and momentum m, and by eta with Adam's mean; with m^tau
        at the anchor, by the worker's step times 1 / (1 - m^tau).

        Args:
            sync_steps: tau of the run.
            optimizer: the optimizer whose learning rate it is.
            workers: n, the number of workers of the launch.
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
        """lambda = lambda0 / (eta tau), with the configured learning rate; 0 if there is no kernel."""
        if not self.server_half.adds_up or not self.learning_rate:
            return 0.0
        return self.coupling_strength / (self.learning_rate * sync_steps)

    def lsam_fields(self) -> dict[str, Any]:
        """LSAM's own fields by name, without those of the TrainingArguments they are mixed into."""
        return {each.name: getattr(self, each.name) for each in fields(LSAMArguments)}

    # --- validation ---

    def validate(self) -> None:
        """Checks LSAM's own fields, each and in combination, after filling in the server's address from the
        environment."""
        if self.server_address is None:
            self.server_address = os.environ.get(SERVER_ADDRESS_VARIABLE)
        check_fields(LSAMArguments, self)
        conflicts.refuse_first(conflicts.of_fields(self, self.sync_steps or min(SYNC_STEPS)))
