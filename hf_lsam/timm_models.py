"""Importing this module registers the networks of `hf_lsam.vision` with timm, as `hf_lsam_resnet20` and so on, so that
timm's tools and transformers' TimmWrapper can use them."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import nn

from .vision import NETWORKS

PREFIX = "hf_lsam_"
__all__: list[str] = []  # timm appends the names that it registers

# timm's register_model looks for a variable of this name. Mean and standard deviation are those of CIFAR-10.
default_cfgs = {
    f"{PREFIX}{name}": {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "min_input_size": (3, 16, 16),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "features.0",
        "classifier": "head",
    }
    for name in NETWORKS
}


def _register(name: str) -> None:
    """Makes `timm.create_model("hf_lsam_" + name)` build the network called `name`."""

    def entry(
        pretrained: bool = False, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None, **options: Any
    ) -> nn.Module:
        source = resolve_pretrained_cfg(
            entry.__name__, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay
        )
        if pretrained and not (source.has_weights or source.state_dict):
            raise ValueError(
                f"There are no pretrained weights for {entry.__name__}, and random ones must not be taken for "
                "them. Leave out pretrained=True, or name a file: pretrained_cfg_overlay={'file': PATH}."
            )
        return build_model_with_cfg(NETWORKS[name], entry.__name__, pretrained, source, **options)

    entry.__name__ = entry.__qualname__ = f"{PREFIX}{name}"
    globals()[entry.__name__] = register_model(entry)


for _name in NETWORKS:
    _register(_name)
