"""The methods, one file each: what a worker does between its steps, and what the server does with a push.

|                   | lsam                              | easgd                    | lsgd                        |
| ----------------- | --------------------------------- | ------------------------ | --------------------------- |
| after each step   | nothing, or x = x - c (x - y)     | nothing                  | x = x - c (x - y)           |
| pushes            | its movement, or sum of x - y     | x - y                    | x, mean loss over tau steps |
| with a new anchor | merges, or nothing                | nothing                  | nothing                     |
| server            | once n tau steps are in:          | at every push:           | at a push with the lowest   |
|                   | y = Optimizer(y, g, eta')         | y = y + alpha (x - y)    | of all last losses: y = x   |
| paper             | arXiv 2509.03110                  | arXiv 1412.6651          | arXiv 1905.10395            |

The gradient is a separate choice: `sam_rho = 0` gives that of SGD, as in the papers of EASGD and LSGD. All methods read
the newest y that is available, and wait for nobody. The halves themselves declare what a method cannot do, such as run
on several machines. A new method is a file with a `worker_half` and a `server_half` (see `base`), and its name in
`ALGORITHMS`.

Local SGD and DiLoCo, without their barriers, are special cases of LSAM's merge (see `lsam`): they are settings and need
no files.
"""

from . import easgd, lsam, lsgd
from .base import Algorithm, ServerHalf, ServerSettings, WorkerHalf, WorkerSettings

ALGORITHMS: dict[str, Algorithm] = {"lsam": lsam, "easgd": easgd, "lsgd": lsgd}

__all__ = ["ALGORITHMS", "Algorithm", "ServerHalf", "ServerSettings", "WorkerHalf", "WorkerSettings"]
