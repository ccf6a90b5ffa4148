"""LSAM for Hugging Face: asynchronous distributed training with landscape-smoothed sharpness-aware minimization.

Paper: arXiv 2509.03110. Importing this module has no side effects and loads nothing until a name is used, so that the
server process needs only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .arguments import LSAMArguments
    from .loop import LSAM
    from .nesterov import NesterovAdamW
    from .trainer import LSAMConfig, LSAMTrainer, LSAMTrainerMixin

__all__ = ["LSAM", "LSAMArguments", "LSAMConfig", "LSAMTrainer", "LSAMTrainerMixin", "NesterovAdamW", "__version__"]

_HOME = {
    "LSAM": "loop",
    "LSAMArguments": "arguments",
    "LSAMConfig": "trainer",
    "LSAMTrainer": "trainer",
    "LSAMTrainerMixin": "trainer",
    "NesterovAdamW": "nesterov",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
