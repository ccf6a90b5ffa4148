"""The protocol of the shared anchor on processors that let loads and stores of different words pass each other.

The accesses of one reader and of a writer that publishes three versions are recorded from `RunFolder` itself, and then
carried out in every order in which aarch64 may make them seen: within a process any two accesses between the same two
barriers may change places unless they are stores to one word; memory is the same for all.
"""

from __future__ import annotations

import itertools

import pytest

from hf_lsam.transport import mailbox
from hf_lsam.transport.mailbox import RunFolder

WORDS = 2  # of a vector: enough to be torn
BARRIER = None
COMPLETE, BEGUN = ("version", 0), ("version", 1)


class Recorded(RunFolder):
    """A run folder in no memory: what is stored and loaded is written down."""

    def __init__(self):
        self.accesses = []
        self._version = _Version(self.accesses)
        self._slots = [_Slot(self.accesses, number) for number in (0, 1)]


class _Version(list):
    def __init__(self, accesses: list):
        super().__init__([0, 0])
        self._accesses = accesses

    def __setitem__(self, index, value):
        self._accesses.append((("version", index), value))
        super().__setitem__(index, value)

    def __getitem__(self, index):
        self._accesses.append(("version", index))
        return super().__getitem__(index)


class _Slot:
    def __init__(self, accesses: list, number: int):
        self._accesses, self._number = accesses, number

    def copy_(self, vector: int) -> None:
        self._accesses += [((self._number, word), vector) for word in range(WORDS)]

    def load(self) -> None:
        self._accesses += [("slot", word) for word in range(WORDS)]  # which slot is decided by what was loaded before


@pytest.fixture
def recorded(monkeypatch) -> tuple[list, list]:
    """(stores of the writer, loads of the reader), with barriers in between."""
    writer, reader = Recorded(), Recorded()
    monkeypatch.setattr(mailbox, "_barrier", lambda: writer.accesses.append(BARRIER))
    for version in (1, 2, 3):
        begin = len(writer.accesses)
        writer.publish(version, version)
        kept = [
            a for a in writer.accesses[begin:] if a is BARRIER or isinstance(a[0], tuple)
        ]  # its own loads say nothing
        writer.accesses[begin:] = kept[1:]  # and the barrier that goes with them
    monkeypatch.setattr(mailbox, "_barrier", lambda: reader.accesses.append(BARRIER))
    version = reader.version
    reader.slot(version).load()
    reader.is_whole(version)
    return writer.accesses, reader.accesses


def torn_and_whole(stores: list, loads: list, in_order: bool = False) -> tuple[int, int]:
    """How many of the copies that count as whole are mixtures, and how many are not, over all orders."""
    stores, before_store = _must_precede(stores, in_order)
    loads, before_load = _must_precede(loads, in_order)
    torn = whole = 0
    seen, waiting = set(), [((), ())]
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        done, loaded = set(state[0]), dict(state[1])
        memory = {COMPLETE: 0, BEGUN: 0} | {(slot, word): -slot for slot in (0, 1) for word in range(WORDS)}
        for index in sorted(done):  # stores of one word keep their order
            memory[stores[index][0]] = stores[index][1]
        if len(loaded) == len(loads):
            values = {word: loaded[index] for index, word in enumerate(loads)}
            version, copies = values[COMPLETE], [values["slot", word] for word in range(WORDS)]
            if values[BEGUN] < version + 2 and all(slot == version % 2 for slot, _ in copies):
                is_torn = any(copy != version for _, copy in copies)
                torn, whole = torn + is_torn, whole + (not is_torn)
            continue
        for index in range(len(stores)):
            if index not in done and before_store[index] <= done:
                waiting.append((tuple(sorted({*done, index})), state[1]))
        for index, word in enumerate(loads):
            if index in loaded or not before_load[index] <= loaded.keys():
                continue
            of_slots = [(slot, memory[slot, word[1]]) for slot in (0, 1)]
            values = of_slots if word[0] == "slot" else [memory[word]]  # which slot may be guessed before it is known
            waiting += [(state[0], tuple(sorted({**loaded, index: value}.items()))) for value in values]
    return torn, whole


def _must_precede(accesses: list, in_order: bool) -> tuple[list, list[set[int]]]:
    """The accesses without barriers, and of each those that are seen before it."""
    parts = [list(part) for is_one, part in itertools.groupby(accesses, lambda a: a is BARRIER) if not is_one]
    flat, before = [], []
    for part in parts:
        begin = len(flat)
        for access in part:
            same = {i for i in range(begin, len(flat)) if in_order or flat[i][0] == access[0]}
            before.append({*range(begin), *same})
            flat.append(access)
    return flat, before


def without(accesses: list, which: int, period: int) -> list:
    """All but the barriers number `which`, `which + period`, ..."""
    barriers = [index for index, access in enumerate(accesses) if access is BARRIER][which::period]
    return [access for index, access in enumerate(accesses) if index not in barriers]


def test_a_copy_that_counts_as_whole_is_one_in_every_order(recorded):
    torn, whole = torn_and_whole(*recorded)
    assert torn == 0
    assert whole > 0


@pytest.mark.parametrize("which", [0, 1])
def test_none_of_the_barriers_can_be_left_out(recorded, which):
    stores, loads = recorded
    assert torn_and_whole(without(stores, which, 2), loads)[0] > 0
    assert torn_and_whole(stores, without(loads, which, 2))[0] > 0


def test_a_processor_that_keeps_stores_and_loads_in_order_needs_none(recorded):
    stores, loads = recorded
    assert torn_and_whole(without(stores, 0, 1), without(loads, 0, 1), in_order=True)[0] == 0
