"""`LSAMTrainer`, and the mixin that makes a worker of any Trainer."""

from .wiring import LSAMTrainer, LSAMTrainerMixin

__all__ = ["LSAMTrainer", "LSAMTrainerMixin"]
