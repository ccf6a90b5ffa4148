"""After training: scans the landscape around the anchor (see `landscape`), with the run's own loss and batches."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed import DistError
from tqdm.auto import tqdm

from ..batchnorm import frozen_statistics, normalising_by_the_batch
from ..checkpoint import load_tensors, save_tensors
from ..files import write_atomically
from ..generators import forked
from ..landscape import scan
from ..record import FOLDER, read_record
from .base import TrainerPart
from .trl import kept_counters

logger = logging.getLogger(__name__)


class LandscapeScan(TrainerPart):
    """The part of `LSAMTrainerMixin` that measures the landscape."""

    def _scan_landscape(self) -> None:
        """Worker 0 measures the loss around the anchor (see `landscape`) on the first training batches.

        The model is in evaluation mode, except that BatchNorm normalises by the batch, because running statistics
        belong to one point. Whatever fails causes a warning only, because the run already has its model, and no worker
        waits for one that could not save its parameters.
        """
        assert self._own is not None  # training has ended
        args, folder = self.args, self._output_folder / FOLDER
        files = [folder / f"landscape-{rank}.safetensors" for rank in range(args.identity.num_workers)]
        try:
            save_tensors(files[args.identity.rank], {"x": self._own})
        except (OSError, RuntimeError) as error:
            logger.warning(f"The landscape will be without worker {args.identity.rank}: {error}")
        try:
            if self.gather_from_workers("landscape", None) is None:
                return
            # Files of workers on another machine are not here unless output_dir is shared.
            there = {rank: file for rank, file in enumerate(files) if file.exists()}
            try:
                workers = {rank: load_tensors(file)["x"].to(args.device) for rank, file in there.items()}
            finally:
                for file in there.values():
                    file.unlink()
            measured = {
                "run_id": read_record(self._output_folder).run["run_id"],
                "batches": args.landscape_batches,
                "batchnorm": bool(self.session.batchnorm),
                **self._scanned(workers, args.kernel_precision(self.session.sync_steps)),
            }
            write_atomically(folder / "landscape.json", json.dumps(measured))
        except DistError as error:
            files[args.identity.rank].unlink(missing_ok=True)
            logger.warning(
                f"The workers cannot meet in the launcher's store any more ({error}), so the landscape is not in the "
                "record. The model is complete without it. Keep the launcher alive until all workers have ended, or "
                "set landscape_points=0."
            )
        except (OSError, ValueError, RuntimeError) as error:  # among them, those of a device that is out of memory
            logger.warning(
                f"The landscape is not in the record ({error}). The model is complete without it. The scan needs room "
                f"on {args.device} for the parameters of {args.identity.num_workers} workers and three vectors more; "
                "set landscape_points=0 where there is none."
            )

    def _scanned(self, workers: dict[int, Tensor], strength: float) -> dict[str, Any]:
        args, worker = self.args, self.session.joined_worker
        shown = worker.own_parameters
        with forked(args.device), kept_counters(self):
            batches = list(self._first_batches(args.landscape_batches))

            points = args.landscape_points * (len(workers) + (args.landscape_points if len(workers) > 1 else 0))
            bar = tqdm(total=points, desc="Landscape", unit="point", disable=args.disable_tqdm)

            def loss(x: Tensor) -> float:
                worker.layout.write(x, worker.parameters)
                with torch.no_grad(), self.compute_loss_context_manager():
                    losses: list[Any] = [
                        self.compute_loss(self.model, self._prepare_inputs(batch)) for batch in batches
                    ]
                bar.update()
                return float(torch.stack(losses).mean())

            try:
                with normalising_by_the_batch(self.model) as layers, frozen_statistics(layers):
                    return scan(loss, shown, workers, args.landscape_points, strength)
            finally:
                bar.close()
                worker.layout.write(shown, worker.parameters)
