"""The messages between processes: each is a class with named fields, and all frames of a protocol have the same size.

Workers and the server of their machine talk in `WORKER_MESSAGES`, servers of different machines in `MACHINE_MESSAGES`.
A frame holds numbers and fingerprints only; nothing is ever unpickled. Vectors travel separately: through shared
memory, or between the frames of a link.
"""

from __future__ import annotations

import struct
from dataclasses import astuple, dataclass, fields
from enum import IntEnum

ELSEWHERE = -1  # stands for the number of a worker on another machine
ANY_NUMBER = -1  # in the join of a worker or machine that belongs to no launch: asks for a number


class Refusal(IntEnum):
    """Why a worker, or a machine, may not take part."""

    SECRET = 1  # one side does not know the other's
    RUN = 2  # another run
    FINGERPRINT = 3  # other trainable parameters
    LENGTH = 4  # another number of trainable values
    SETTINGS = 5  # the server settings of the two machines differ
    TAKEN = 6  # the number is in use
    TIMEOUT = 7  # other workers never came
    NO_ROOM = 8  # for a mailbox
    ENDED = 9  # the run has ended


@dataclass(frozen=True)
class Message:
    """What one process sends to another. Fields are int, bool, float, `Refusal`, or 32 bytes."""


# --- in both protocols ---


@dataclass(frozen=True)
class Refused(Message):
    """Answers a worker or a machine that wants to join and may not."""

    reason: Refusal


@dataclass(frozen=True)
class Failed(Message):
    """A worker ends with an error; if it belongs to a launch, the launch ends with it."""


# --- from a worker ---


@dataclass(frozen=True)
class Join(Message):
    """The first message of a connection."""

    worker: int  # or ANY_NUMBER
    numel: int  # vector length d
    process: int  # a random number by which a server recognises whose pushes it has counted
    fingerprint: bytes  # of the trainable parameters
    weight: int = 1  # in the mean


@dataclass(frozen=True)
class Push(Message):
    """The mailbox holds a push."""

    number: int  # which push of this process it is, from 1
    steps: int  # local steps that it counts as
    loss: float  # their mean
    finite: bool  # what the worker found while it wrote the mailbox


@dataclass(frozen=True)
class Finish(Message):
    """All local steps are done."""

    stop_all: bool  # the others are to stop (early stopping)
    best_step: int  # or -1


@dataclass(frozen=True)
class Snapshot(Message):
    """Asks the server to write its state into the run folder."""


@dataclass(frozen=True)
class Heartbeat(Message):
    """The worker's process is alive, even if its step takes long."""


# --- to a worker ---


@dataclass(frozen=True)
class Welcome(Message):
    """The worker takes part."""

    worker: int  # the number that it was given
    last_counted: int  # number of the last push of this process that was counted
    mailbox: int  # number of its mailbox; each join has one of its own


@dataclass(frozen=True)
class Answer(Message):
    """Answers a push."""

    accepted: bool  # False: NaN or infinity
    version: int  # of the anchor when the push arrived


@dataclass(frozen=True)
class Stop(Message):
    """The run ends early."""

    save: bool  # by a signal: a checkpoint is to be saved


@dataclass(frozen=True)
class Finished(Message):
    """All have finished, and the shared anchor is final."""

    best_step: int  # or -1


@dataclass(frozen=True)
class SnapshotDone(Message):
    """Answers `Snapshot`."""

    written: bool


@dataclass(frozen=True)
class Evicted(Message):
    """Nothing was heard from the worker for `worker_timeout`; it may join again."""


@dataclass(frozen=True)
class RootLost(Message):
    """This machine's server has lost the root, or was refused by it: from here on there is no server."""


@dataclass(frozen=True)
class WorkerFailed(Message):
    """A worker of the launch ended with an error: from here on there is no server."""

    worker: int  # or ELSEWHERE


# --- from a machine, to the root ---


@dataclass(frozen=True)
class OpenLink(Message):
    """The first frame of a connection: what both sides must agree on before anything else is sent."""

    run: bytes  # SHA-256 of its id
    fingerprint: bytes  # of the trainable parameters
    numel: int  # vector length d


@dataclass(frozen=True)
class JoinMachine(Message):
    """The first message of a machine's link."""

    machine: int  # or ANY_NUMBER
    process: int  # a random number of the relay
    live: int  # workers on the machine
    settings: bytes  # SHA-256 of the server settings
    weight: int  # of them together


@dataclass(frozen=True)
class Live(Message):
    """How many workers are live on the machine."""

    workers: int
    weight: int = 0  # of them together


@dataclass(frozen=True)
class Sum(Message):
    """With a vector: the sum of what the machine's workers have pushed."""

    number: int  # which sum of this relay it is, from 1
    steps: int  # local steps that it counts as
    begun: int = 0  # steps that the machine's workers have begun since the last sum


@dataclass(frozen=True)
class StopAll(Message):
    """A worker asks all workers to stop."""


@dataclass(frozen=True)
class FinishMachine(Message):
    """All workers of the machine have finished."""

    nobody_waits: bool  # no worker of the machine waits for the final anchor
    best_step: int  # or -1


# --- from the root, to a machine ---


@dataclass(frozen=True)
class LinkOpened(Message):
    """Answers `OpenLink`, unless it is refused."""


@dataclass(frozen=True)
class WelcomeMachine(Message):
    """With a vector: the anchor."""

    version: int
    last_counted: int  # number of the last sum of this relay that was counted
    begun: int = 0  # steps that all workers have begun; this machine's as far as it has reported them


@dataclass(frozen=True)
class NewAnchor(Message):
    """With a vector: the newest anchor."""

    version: int
    begun: int = 0  # as in `WelcomeMachine`


@dataclass(frozen=True)
class AnchorChange(Message):
    """With a vector: what to add to the anchor that was last sent to the machine, to get (nearly) the newest."""

    version: int
    begun: int = 0  # as in `WelcomeMachine`


@dataclass(frozen=True)
class SumAnswer(Message):
    """Answers a sum."""

    number: int
    accepted: bool  # False: NaN or infinity, or too late


@dataclass(frozen=True)
class StopMachine(Message):
    """The run ends early."""

    save: bool  # a checkpoint is to be saved
    failed: bool  # a worker of the launch ended with an error


@dataclass(frozen=True)
class FinishedAnchor(Message):
    """With a vector: the final anchor."""

    version: int
    best_step: int  # or -1


_CODES = {"int": "q", "bool": "?", "float": "d", "bytes": "32s", "Refusal": "q"}
_HEAD = struct.Struct("<IH")  # the protocol, the kind of the message


class Vocabulary:
    """The messages of one protocol, as frames of one size.

    Args:
        magic: begins every frame; 32 bits.
        kinds: classes; their order is part of the protocol.
    """

    def __init__(self, magic: int, *kinds: type[Message]):
        self._magic = magic
        self._kinds = dict(enumerate(kinds, 1))
        self._numbers = {kind: number for number, kind in self._kinds.items()}
        self._bodies = {
            kind: struct.Struct("<" + "".join(_CODES[str(field.type)] for field in fields(kind))) for kind in kinds
        }
        self.size = _HEAD.size + max(body.size for body in self._bodies.values())  # bytes

    def pack(self, message: Message) -> bytes:
        """One frame."""
        kind = type(message)
        frame = _HEAD.pack(self._magic, self._numbers[kind]) + self._bodies[kind].pack(*astuple(message))
        return frame.ljust(self.size, b"\0")

    def unpack(self, frame: bytes) -> Message:
        """The message in one frame.

        Raises:
            ValueError: if it is not a frame of this protocol.
        """
        magic, number = _HEAD.unpack_from(frame)
        if magic != self._magic or number not in self._kinds:
            raise ValueError("not a frame of this protocol")
        kind = self._kinds[number]
        values = self._bodies[kind].unpack_from(frame, _HEAD.size)
        if kind is Refused:
            return Refused(Refusal(values[0]))
        return kind(*values)


WORKER_MESSAGES = Vocabulary(
    0x4C53414D,  # "LSAM"
    *(Join, Push, Finish, Snapshot, Heartbeat, Failed),
    *(Welcome, Refused, Answer, Stop, Finished, SnapshotDone, Evicted, RootLost, WorkerFailed),
)
MACHINE_MESSAGES = Vocabulary(
    0x4C53414F,
    *(OpenLink, JoinMachine, Live, Sum, StopAll, FinishMachine, Failed),
    *(LinkOpened, WelcomeMachine, Refused, NewAnchor, AnchorChange, SumAnswer, StopMachine, FinishedAnchor),
)
