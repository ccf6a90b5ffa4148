"""Published results, as the tables and the model cards read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What results call the methods that were measured before these names.
FORMER = {"sam": "ddp_sam", "sgd": "ddp"}


def load_results(path: Path) -> Any:
    """A file of results, its methods called by their names of today."""
    return json.loads(path.read_text(encoding="utf-8"), object_hook=_renamed)


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    named = {" - ".join(FORMER.get(word, word) for word in key.split(" - ")): value for key, value in fields.items()}
    return {**named, "method": FORMER.get(named["method"], named["method"])} if "method" in named else named
