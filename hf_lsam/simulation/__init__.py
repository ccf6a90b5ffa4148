"""n workers in one process, under a virtual clock: experiments on clusters that one does not have.

The workers, the server and their arithmetic are those of real runs (`worker.Worker`, `server.core.ServerCore`,
`algorithms`, `sam`); only the exchange is virtual. Each worker has a time per step and a link with a latency and a
bandwidth; workers may be slow, pause, join and die. Events happen in the order of the clock, and ties in the order of
the workers, so staleness is real and a run depends on its seed alone. With equal speeds and links that take no time, n
simulated workers do, bit for bit, what n processes in lock step do.

`DataParallel` is the baseline: every step waits for the slowest worker and for an all-reduce.
"""

from .cluster import Cluster
from .data_parallel import DataParallel
from .gradient import Gradient
from .setting import Loss, Machine, Moment

__all__ = ["Cluster", "DataParallel", "Gradient", "Loss", "Machine", "Moment"]
