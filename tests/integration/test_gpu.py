"""What can only be shown on a GPU: the checks of scripts/stress/gpu_check.py."""

from __future__ import annotations

import pytest
import torch

from scripts.stress.gpu_check import CHECKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    """It raises AssertionError where the check does not hold."""
    assert CHECKS[name]()
