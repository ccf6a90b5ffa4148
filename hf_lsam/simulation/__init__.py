"""n workers in one process, under a virtual clock: experiments on clusters that are not there.

The workers, the server and their arithmetic are the product's own (`worker.Worker`, `server.core.ServerCore`,
`algorithms`, `sam`); only the exchange is virtual. Each worker takes a time a step, each of its links has a latency and
a bandwidth; workers may be slow, pause, join and die. Events happen in the order of the clock, ties in the order of the
workers, so staleness is real and a run is a function of its seed alone. With equal speeds and links that take no time,
n workers are n processes in lock step, bit for bit.

`DataParallel` is the baseline: every step waits for the slowest worker and for an all-reduce.
"""

from .cluster import Cluster
from .data_parallel import DataParallel
from .gradient import Gradient
from .setting import Loss, Machine, Moment

__all__ = ["Cluster", "DataParallel", "Gradient", "Loss", "Machine", "Moment"]
