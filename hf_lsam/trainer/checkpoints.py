"""Checkpoints: the model is the anchor; saved with it are the server's state and each worker's own."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from ..checkpoint import WORKER_STATE, is_sealed, numbered, seal
from .base import TrainerPart

logger = logging.getLogger(__name__)


class Checkpoints(TrainerPart):
    """The part of `LSAMTrainerMixin` that saves checkpoints and resumes from them.

    `_common_checkpoint`, from which a run is resumed, is worker 0's: it holds the weights and the server's state.

    Attributes:
        sealed_step: the step of the checkpoint that this `train()` has completed last, or None.
    """

    _common_checkpoint: Path | None
    sealed_step: int | None

    def _refuse_unwritable(self) -> None:
        """Raises OSError before training, instead of at the first save, if checkpoints cannot be written."""
        folder = self._output_folder.absolute()
        existing = next(path for path in (folder, *folder.parents) if path.exists())  # the folder may not exist yet
        if self.args.save_strategy != "no" and not os.access(existing, os.W_OK):
            raise OSError(
                errno.EROFS,
                f"Nothing can be written to output_dir={folder}, and checkpoints are to be saved there: the first one "
                'would end the training. Set output_dir to a folder that can be written to, or save_strategy="no".',
            )

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        rank = self.args.identity.rank
        return folder if rank == 0 else str(Path(folder) / "workers" / str(rank))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, limit = Path(self._get_output_dir(trial)), self.args.save_total_limit
        self.args.save_total_limit = None  # the old ones are kept until the new one is on the disk
        try:
            with self.args.saving_own_state():
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        seal(folder / f"checkpoint-{self.state.global_step}")
        self.sealed_step = self.state.global_step
        if self.args.identity.rank == 0:
            rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=True)
        elif limit:
            self._rotate_own(folder, limit)

    def _rotate_own(self, folder: Path, limit: int) -> None:
        """Deletes this worker's checkpoints, except for the newest `limit` and those from which it would continue if
        the run resumed from one of worker 0's.

        Workers are not equally fast: when this one saves, worker 0 may not have reached its previous checkpoint yet.
        """
        mine = [number for number, path in numbered(folder).items() if is_sealed(path)]
        common = numbered(folder.parent.parent)
        needed = {max(reached) for at in common if (reached := [number for number in mine if number <= at])}
        kept = {folder / f"checkpoint-{number}" for number in needed}
        for path in map(Path, sort_checkpoints(str(folder), use_mtime=True)[:-limit]):
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        missing = None
        try:
            if not self.session.save_anchor(Path(output_dir)):
                missing = "There is no server now."
        except OSError as error:  # no room where vectors are exchanged, and training itself needs no more room there
            missing = str(error)
        if missing:
            logger.warning("%s %s holds the last anchor as a model, but not the server's state.", missing, output_dir)
        self.session.save_worker(Path(output_dir))

    def _own_checkpoint(self, common: Path) -> Path:
        """This worker's newest checkpoint that is not ahead of worker 0's; worker 0's if there is none."""
        rank, number = self.args.identity.rank, common.name.rpartition("-")[2]
        if rank == 0 or not number.isdigit():
            return common
        candidates = [
            (at, path)
            for at, path in numbered(common.parent / "workers" / str(rank)).items()
            if (path / WORKER_STATE).exists()
            and (path / "trainer_state.json").exists()
            and (is_sealed(path) or not is_sealed(common))  # a power cut may have damaged only this one
        ]
        reached = [(at, path) for at, path in candidates if at <= int(number)]
        return max(reached)[1] if reached else common

    def _say_who_resumes(self, common: Path) -> None:
        """Warns if the run resumes with another number of workers, and says what becomes of the previous ones."""
        before = 1 + sum(any(folder.glob("checkpoint-*")) for folder in (common.parent / "workers").glob("*"))
        now = self.args.identity.num_workers
        if self.args.identity.rank == 0 and before != now:
            logger.warning(
                f"{common} was written by {before} workers, and {now} resume it. The anchor now moves after {now} "
                "x sync_steps steps. A worker without a saved state starts at the anchor; the saved states of "
                "workers that no longer exist are left alone."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The weights are in worker 0's checkpoint; x is loaded later, from the worker's own state.
        super()._load_from_checkpoint(str(self._common_checkpoint or resume_from_checkpoint), model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.args.identity.rank == 0 or checkpoint is None or Path(checkpoint) != self._common_checkpoint:
            super()._load_rng_state(checkpoint)

    def _join(self, server_state: Path | None, checkpoint: Path | None, max_steps: int) -> None:
        """Joins the run, with x from the worker's own checkpoint, or else from the anchor."""
        rank = self.args.identity.rank
        own = checkpoint if rank == 0 or checkpoint != self._common_checkpoint else None
        if self.session.join(server_state, None if own is None else own / WORKER_STATE, max_steps) is not None:
            return
        if checkpoint is not None:
            logger.warning(
                "Worker %d has no state of its own for %s: it starts at the anchor, with the optimizer state of "
                "worker 0.",
                rank,
                self._common_checkpoint,
            )
        if number := self.session.number:
            # Same seed everywhere until here, for the same initial model and the same shards; from here on each
            # worker draws its own dropout masks and noise.
            set_seed(self.args.seed + number)
