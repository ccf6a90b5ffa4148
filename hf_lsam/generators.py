"""torch's random number generators: the CPU's, and that of the device a worker trains on, whatever kind it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def state_of(device: torch.device) -> Tensor | None:
    """The state of the device's generator, uint8 on the CPU; None of the CPU itself."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    # There is one MPS device.
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_state(device: torch.device, state: Tensor) -> None:
    """Takes over what `state_of` gave of a device of this type."""
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Inside, the CPU and the device draw what they will draw again after it."""
    own = state_of(device)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if own is not None:
            set_state(device, own)
