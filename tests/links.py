"""Links that do what a real server does only now and then."""

from __future__ import annotations

from dataclasses import replace

from hf_lsam.transport.base import LinkStatus
from hf_lsam.transport.in_process import InProcessLink


class SlowServerLink(InProcessLink):
    """While it is `busy`, its server has not taken the last push. `counted_late_at` makes its status report that the
    last push was counted at that anchor version."""

    busy = False
    counted_late_at: int | None = None

    @property
    def can_push(self) -> bool:
        return not self.busy

    @property
    def status(self) -> LinkStatus:
        if self.counted_late_at is None:
            return super().status
        return replace(super().status, counted_at=self.counted_late_at)
