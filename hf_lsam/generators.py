"""torch's random number generators: the CPU's, and that of the device a worker trains on, of whatever type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def state_of(device: torch.device) -> Tensor | None:
    """The state of the device's generator, uint8 on the CPU; None if the device is the CPU."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    # There is only one MPS device, so its module takes no device argument.
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_state(device: torch.device, state: Tensor) -> None:
    """Restores what `state_of` returned for a device of this type."""
    module = torch.get_device_module(device)
    if device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


@contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """On exit, the generators of the CPU and the device are reset, so that they draw again what they drew inside."""
    own = state_of(device)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if own is not None:
            set_state(device, own)
