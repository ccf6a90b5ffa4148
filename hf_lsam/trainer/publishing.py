"""What leaves for the Hub, of `LSAMTrainerMixin`: the anchor, and a card made from the run's record."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from huggingface_hub import CommitInfo

from ..card import facts_of_record, model_card
from ..files import write_atomically
from ..record import FOLDER, read_record
from .base import TrainerPart

logger = logging.getLogger(__name__)

PRIVATE = ("workers/", f"{FOLDER}/", "server.log")  # in `output_dir`: not for the Hub


class Publishing(TrainerPart):
    """The part of `LSAMTrainerMixin` that writes the model card and uploads."""

    def push_to_hub(self, *positional: Any, **keywords: Any) -> CommitInfo:
        """Trainer's method, for the anchor. The workers' own states, the record and the server's log stay here."""
        self._keep_private_files()
        with self.anchor():
            return super().push_to_hub(*positional, **keywords)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._keep_private_files()
        super()._push_from_checkpoint(checkpoint_folder)

    def _keep_private_files(self) -> None:
        """Names what must not be uploaded in .gitignore, which the Hub obeys when it is among the files of a commit."""
        if not self.is_world_process_zero():
            return
        path = self._output_folder / ".gitignore"
        lines = path.read_text().splitlines() if path.exists() else []
        if missing := [line for line in PRIVATE if line not in lines]:
            write_atomically(path, "\n".join([*lines, *missing]) + "\n")

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """At worker 0, writes to `output_dir` the card that `hf-lsam card` would write from this run's record.

        Args: those of Trainer's and trl's methods of this name; `dataset_args` is ignored.
        """
        if not self.is_world_process_zero():
            return
        folder = self._output_folder
        try:
            facts = facts_of_record(folder, read_record(folder))
        except (OSError, ValueError) as error:  # this process has not trained, or could not keep a record
            logger.warning("No model card is written: %s", error)
            return
        names = _listed(dataset_tags)
        facts = replace(
            facts,
            name=model_name or facts.name,
            base=finetuned_from or facts.base,
            data=next(iter([*names, *_listed(dataset), *_listed(dataset_name)]), None),
            task=next(iter(_listed(tasks)), facts.task),
        )
        kinds = [*_listed(tags), *getattr(self, "_tag_names", []), *_listed(getattr(self.model, "model_tags", None))]
        card = model_card(facts, language=language, license=license, tags=kinds, datasets=names or None)
        write_atomically(folder / "README.md", str(card))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
