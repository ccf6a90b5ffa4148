"""`LSAMTrainer`, the mixin that turns any Trainer into a worker, and their configuration."""

from .config import LSAMConfig
from .wiring import LSAMTrainer, LSAMTrainerMixin

__all__ = ["LSAMConfig", "LSAMTrainer", "LSAMTrainerMixin"]
