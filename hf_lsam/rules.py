"""What makes the asynchronous methods differ: when a worker is pulled, what it hands in, what the server does with it.

|                 | smoothed: LSAM             | elastic: EASGD           | leader: LSGD                |
| --------------- | -------------------------- | ------------------------ | --------------------------- |
| pull, each step | c (x - y), c = lambda0/tau | none                     | c (x - y), c = lambda0/tau  |
| at every tau-th | none besides               | alpha (x - y)            | none besides                |
| hands in        | sum of x - y over tau      | that x - y               | x, mean loss over tau steps |
| server          | once n tau steps are in:   | at every push:           | at a push with the lowest   |
|                 | y = Optimizer(y, g, eta')  | y = y + alpha (x - y)    | of all last losses: y = x   |
| paper           | arXiv 2509.03110, Alg. 2   | arXiv 1412.6651, Alg. 1  | arXiv 1905.10395, Alg. 1    |

The gradient is another choice: `sam_rho = 0` is SGD's, as in the papers of EASGD and LSGD. All three read y from
shared memory when it is there, and wait for nobody. LSGD has a leader a machine besides the global one; on one machine
they are the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .anchor import Anchor

RULES = ("smoothed", "elastic", "leader")


class Smoothed:
    """LSAM: sums the differences of all workers and moves the anchor once n * tau steps are in.

    Args:
        anchor: y, float32 [d].
        sync_steps: tau.

    State: the step count and sum of the period under way; at 0 steps the sum has no meaning.
    """

    def __init__(self, anchor: Anchor, sync_steps: int):
        self._anchor = anchor
        self._sync_steps = sync_steps
        self._pending = torch.zeros_like(anchor.vector)
        self.pending_steps = 0

    def push(self, differences: Tensor, steps: int, worker: int, loss: float, live: int) -> None:
        """Takes the sum of x - y over `steps` local steps."""
        if self.pending_steps:
            self._pending.add_(differences)
        else:
            self._pending.copy_(differences)  # a new period; what the last one left behind is written over
        self.pending_steps += steps
        self._update_if_complete(live)

    def leave(self, worker: int, live: int) -> None:
        """n shrinks, which can itself complete a period; what the worker pushed stays."""
        self._update_if_complete(live)

    def flush(self) -> None:
        """Ends the run: a last update from a period that was not completed.

        Its sum is divided by a whole period's tau, not by the few steps in it: y moves by the fraction of a period that
        was seen, instead of jumping to the mean of a handful of samples.
        """
        if self.pending_steps:
            self._update(max(self.pending_steps, self._sync_steps))

    def _update_if_complete(self, live: int) -> None:
        if self.pending_steps >= max(1, live) * self._sync_steps:
            self._update(self.pending_steps)

    def _update(self, steps: int) -> None:
        self._anchor.update(self._pending, steps)
        self.pending_steps = 0

    def state_tensors(self) -> dict[str, Tensor]:
        return {"pending": self._pending, "pending_steps": torch.tensor(self.pending_steps)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self._pending.copy_(state["pending"])
        self.pending_steps = int(state["pending_steps"])


class Elastic:
    """EASGD: every push moves the anchor by alpha of the difference that the worker has moved by the other way.

    Args:
        anchor: the centre variable, float32 [d].
        alpha: the moving rate; the paper's beta is n * alpha.
    """

    def __init__(self, anchor: Anchor, alpha: float):
        self._anchor = anchor
        self._alpha = alpha

    def push(self, differences: Tensor, steps: int, worker: int, loss: float, live: int) -> None:
        """Takes x - y of one worker at one step."""
        self._anchor.vector.add_(differences, alpha=self._alpha)
        self._anchor.version += 1

    def leave(self, worker: int, live: int) -> None: ...

    def flush(self) -> None: ...

    def state_tensors(self) -> dict[str, Tensor]:
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None: ...


class Leader:
    """LSGD: the anchor is the worker whose mean loss over its last tau steps was the lowest.

    Only what was pushed is known, so the lead changes when the new leader pushes, not when the old one gets worse.

    Args:
        anchor: the leader's parameters, float32 [d].

    State: the last loss of each worker.
    """

    def __init__(self, anchor: Anchor):
        self._anchor = anchor
        self._losses: dict[int, float] = {}

    def push(self, parameters: Tensor, steps: int, worker: int, loss: float, live: int) -> None:
        """Takes the parameters of one worker and its mean loss; NaN never leads."""
        self._losses[worker] = loss if math.isfinite(loss) else math.inf
        if math.isfinite(loss) and loss <= min(self._losses.values()):
            self._anchor.vector.copy_(parameters)
            self._anchor.version += 1

    def leave(self, worker: int, live: int) -> None:
        """A worker that is gone no longer leads; the anchor stays until another does."""
        self._losses.pop(worker, None)

    def flush(self) -> None: ...

    def state_tensors(self) -> dict[str, Tensor]:
        return {"losses": torch.tensor([*self._losses.items()], dtype=torch.float64).reshape(-1, 2)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        self._losses = {int(worker): loss for worker, loss in state["losses"].tolist()}
