"""A host of the cluster, as the supervisor sees it, which never waits for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, ActorUnschedulableError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .cluster import HOST_ENVIRONMENT, Needs


class HostDied(Exception):
    """The actor is gone; the message says why."""


class Remote:
    """A host, as the supervisor sees it: one question at a time is under way, and nobody waits for its answer.

    Args:
        kind: class of the host.
        arguments: of its constructor.
        node: Ray's id of the node where it must be; None leaves that to Ray.
        needs: the resources that it takes there; None for none.

    Attributes:
        node, address: where it is, once that is known; empty before.
    """

    def __init__(self, kind: type, arguments: Sequence[Any], node: str | None = None, needs: Needs | None = None):
        needs = needs or Needs(0, 0)
        placement = {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        actor: ActorClass[Any] = ray.remote(kind).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, runtime_env={"env_vars": HOST_ENVIRONMENT}, **placement
        )
        # Ray's types allow for a class here.
        self._actor: ActorHandle[Any] = actor.remote(*arguments)  # type: ignore[assignment]
        self._question: tuple[Any, ...] = ()
        self._asked: ray.ObjectRef[Any] | None = None
        self.node = self.address = ""
        self.ask("where")

    @property
    def is_asked(self) -> bool:
        """Whether a question has been asked whose answer has not been taken yet."""
        return self._asked is not None

    def ask(self, method: str, *arguments: Any) -> None:
        """Calls a method of the host, whose result `answer` will return. The method must be idempotent, because the
        call is repeated if the actor was unavailable."""
        self._question = (method, *arguments)
        self._asked = self.tell(method, *arguments)

    def tell(self, method: str, *arguments: Any) -> ray.ObjectRef[Any]:
        """Calls a method of the host whose result `answer` does not return."""
        return getattr(self._actor, method).remote(*arguments)

    def answer(self) -> Any:
        """The answer to the last question; None if it has not arrived, or is None.

        The first question is where the host is: its answer sets `node` and `address`, and None is returned.

        Raises:
            HostDied: if the host died before it answered.
            RuntimeError: if the method raised an error; has its message.
        """
        if self._asked is None or not ray.wait([self._asked], timeout=0)[0]:
            return None
        asked, self._asked = self._asked, None
        try:
            value = ray.get(asked)
        except ActorUnavailableError:  # it may be back in a moment
            self.ask(*self._question)
            return None
        except (ActorDiedError, ActorUnschedulableError) as error:
            raise HostDied(str(error).strip().splitlines()[-1]) from error
        except RayTaskError as error:
            raise RuntimeError(str(error.cause)) from error
        if not self.node:
            self.node, self.address = value
            return None
        return value

    def kill(self) -> None:
        """Ends the actor; a worker that it manages continues without it."""
        ray.kill(self._actor)
