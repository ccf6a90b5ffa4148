"""`LSAMTrainer`, the mixin that makes a worker of any Trainer, and their configuration."""

from .config import LSAMConfig
from .wiring import LSAMTrainer, LSAMTrainerMixin

__all__ = ["LSAMConfig", "LSAMTrainer", "LSAMTrainerMixin"]
