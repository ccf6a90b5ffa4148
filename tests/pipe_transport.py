"""A separate transport, for tests: workers and their server talk over the pipes of `multiprocessing.connection`.

As a script (`pipe_transport.py ADDRESS WORKERS SETTINGS`) it is the server: it accepts that many workers and serves
them until all have left. A frame is a fixed header, followed by a vector if there is one; nothing is pickled.
"""

from __future__ import annotations

import json
import struct
import sys
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

import torch
from torch import Tensor

from hf_lsam.algorithms import ServerSettings
from hf_lsam.server.core import ServerCore
from hf_lsam.transport.base import FinalAnchor, JoinRequest, Link, LinkStatus, ServerGone, Transport

HEADER = struct.Struct("<cqqd")  # what, two integers, loss
# From workers: B(egin) with a weight and the first anchor, S(tep) begun, P(ush) of steps, F(inish). From the server:
# W(elcome), worker; A(nchor), version; T(otal) of the steps begun, and how many of them by this worker; C(ounted) at a
# version, and whether it was accepted, with the anchor that it has moved; E(nd), version of the final anchor. A worker
# that has read that its push is counted also has the anchor that the push completed, and the other way round.


def send(connection: Connection, what: bytes, first: int = 0, second: int = 0, loss: float = 0.0, vector=None) -> None:
    body = b"" if vector is None else vector.detach().numpy().tobytes()
    connection.send_bytes(HEADER.pack(what, first, second, loss) + body)


def receive(connection: Connection) -> tuple[bytes, int, int, float, Tensor | None]:
    frame = connection.recv_bytes()
    body = bytearray(frame[HEADER.size :])
    return *HEADER.unpack(frame[: HEADER.size]), torch.frombuffer(body, dtype=torch.float32) if body else None


class PipeLink(Link):
    """A worker's end, for vectors that are small enough for the pipe to take at once."""

    def __init__(self, address: str, request: JoinRequest):
        self._connection = Client(address, "AF_UNIX")
        self._status = LinkStatus()
        self._newest: tuple[int, Tensor] | None = None
        self._finished = False
        self._pushed_version = 0
        self._steps = self._steps_of_all = self._steps_counted = 0
        send(self._connection, b"B", request.weight, vector=request.first_anchor(torch.device("cpu")))
        _, self._worker, _, _, _ = receive(self._connection)

    @property
    def can_push(self) -> bool:
        return self._status.counted_at is not None

    @property
    def steps_begun(self) -> int:
        return self._steps_of_all + self._steps - self._steps_counted

    def begin_step(self) -> None:
        self._steps += 1
        send(self._connection, b"S")

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        self._status, self._pushed_version = self._status.after_push(total.nbytes), version
        send(self._connection, b"P", steps, loss=loss, vector=total)

    def poll(self, held: int, incoming: Tensor) -> int | None:
        while self._connection.poll():
            self._take()
        if self._newest is None or self._newest[0] == held:
            return None
        version, vector = self._newest
        incoming.copy_(vector)
        return version

    def settle(self) -> None:
        while not self.can_push:
            self._take()

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> FinalAnchor:
        with suppress(BrokenPipeError):  # reading will raise ServerGone
            send(self._connection, b"F")
        while not self._finished:
            self._take()
        version, vector = self._newest
        incoming.copy_(vector)
        self._status = replace(self._status, finished=True)
        return FinalAnchor(version, best_step)

    def snapshot(self, path: Path, manifest=None) -> bool:
        return False

    def close(self, failed: bool = False) -> None:
        self._connection.close()

    def _take(self) -> None:
        try:
            what, version, accepted, _, vector = receive(self._connection)
        except (EOFError, OSError):
            raise ServerGone("The server at the other end of the pipe has ended.") from None
        if what == b"T":
            self._steps_of_all, self._steps_counted = version, accepted
        if what == b"C":
            self._status = self._status.after_answer(bool(accepted), version, version - self._pushed_version)
            version += 1
        if vector is not None:
            self._status = self._status.after_pull(vector.nbytes)
            self._newest = (version, vector)
        self._finished = what == b"E"


class PipeTransport(Transport):
    """Joins the server that listens at the path in `pipe://PATH`."""

    def __init__(self, address: str, _):
        self._address = address

    def join(self, request: JoinRequest) -> PipeLink:
        return PipeLink(self._address, request)

    def leave(self, finished: bool) -> None:
        pass


def serve(address: str, workers: int, settings: ServerSettings) -> None:
    with Listener(address, "AF_UNIX", backlog=workers) as listener:
        print("listening", flush=True)
        connections = {listener.accept(): number for number in range(workers)}
    firsts = [receive(connection) for connection in connections]
    core = ServerCore(firsts[0][4], settings)
    for (connection, number), (_, weight, *_) in zip(connections.items(), firsts, strict=True):
        core.join(number, weight)
        send(connection, b"W", number)
        send(connection, b"A", 0, vector=core.anchor.vector)
    begun = [0] * workers
    while connections:
        for connection in wait(list(connections)):
            number, version = connections[connection], core.anchor.version
            try:
                what, steps, _, loss, vector = receive(connection)
            except EOFError:
                core.leave(number)
                del connections[connection]
                connection.close()
                continue
            if what == b"S":
                begun[number] += 1
                for other, theirs in connections.items():
                    send(other, b"T", sum(begun), begun[theirs])
                continue
            if what == b"P":
                accepted = core.push(vector, steps, number, loss)
            else:
                core.leave(number)
                if not core.live_workers:
                    core.flush()
            moved = core.anchor.vector if core.anchor.version > version else None
            for other in connections:
                if moved is not None and other is not connection:
                    send(other, b"A", core.anchor.version, vector=moved)
            if what == b"P":
                send(connection, b"C", version, accepted, vector=moved)
            else:
                send(connection, b"E", core.anchor.version, vector=core.anchor.vector)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(sys.argv[1], int(sys.argv[2]), ServerSettings(**json.loads(sys.argv[3])))
