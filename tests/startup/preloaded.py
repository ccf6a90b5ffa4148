"""What the fork server of the tests imports, so that what it forks need not."""

# ruff: noqa: F401
import gc

import accelerate.commands.launch
import torch.distributed.run

import hf_lsam.trainer

# Else the collector would write to every page of theirs in each fork, which copies it.
gc.freeze()
