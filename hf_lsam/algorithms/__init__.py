"""The methods, a file each: what a worker does between its steps, and what the server does with what is handed in.

|                   | lsam                              | easgd                    | lsgd                        |
| ----------------- | --------------------------------- | ------------------------ | --------------------------- |
| after each step   | nothing, or x = x - c (x - y)     | nothing                  | x = x - c (x - y)           |
| hands in          | its movement, or sum of x - y     | x - y                    | x, mean loss over tau steps |
| with a new anchor | merges, or nothing                | nothing                  | nothing                     |
| server            | once n tau steps are in:          | at every push:           | at a push with the lowest   |
|                   | y = Optimizer(y, g, eta')         | y = y + alpha (x - y)    | of all last losses: y = x   |
| paper             | arXiv 2509.03110                  | arXiv 1412.6651          | arXiv 1905.10395            |

The gradient is another choice: `sam_rho = 0` is SGD's, as in the papers of EASGD and LSGD. All read y from shared
memory when it is there, and wait for nobody. A new method is a file with a `worker_half` and a `server_half` (see
`base`), and its name in `ALGORITHMS`.
"""

from . import easgd, lsam, lsgd
from .base import ServerHalf, ServerSettings, WorkerHalf, WorkerSettings

ALGORITHMS = {"lsam": lsam, "easgd": easgd, "lsgd": lsgd}

__all__ = ["ALGORITHMS", "ServerHalf", "ServerSettings", "WorkerHalf", "WorkerSettings"]
