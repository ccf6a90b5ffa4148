"""hf-lsam on a Ray cluster: Ray places processes and reports their deaths; what they exchange never passes through it.

    driver      the supervisor: decides how many workers run, and where the servers are (`supervisor`)
    actors      hosts: each manages one process on the node that Ray has given it (`hosts`, `servers`)
    processes   the root server, one relay per node, and the user's script as external workers: the same as without Ray

`python -m hf_lsam.ray --help` says how it is started; `launch` is the same as a function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError(
        "hf_lsam.ray needs Ray, which is not installed here: pip install ray, or in a checkout of hf-lsam "
        "pip install -e '.[ray]'."
    ) from error

if TYPE_CHECKING:
    from .supervisor import launch

__all__ = ["launch"]


def __getattr__(name: str) -> Any:
    if name == "launch":  # imported on first use, because the host of a worker need not load torch
        return import_module(".supervisor", __name__).launch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
