"""Networks from the literature for 32x32 images: ResNet-20, VGG-16, WRN-16-8, WRN-28-10.

`create` builds them by name. `hf_lsam.timm_models` registers them with timm.

All end in global average pooling, so they accept any image of at least 16x16 pixels. `width` is the number of channels
after the first convolution; every other layer scales with it.
"""

from __future__ import annotations

from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NETWORKS", "ImageClassifier", "create", "resnet20", "vgg16", "wrn_16_8", "wrn_28_10"]


class ImageClassifier(nn.Module):
    """A stack of convolutions, global average pooling and one linear layer, with the methods of timm's models.

    Args:
        features: maps images, float [B, in_chans, H, W], to feature maps, float [B, num_features, H', W'].
        num_features: channels of the feature maps.
        num_classes: outputs of the linear layer; 0 leaves it out.
        drop_rate: dropout before the linear layer.
        global_pool: "avg", or "" to output feature maps, which requires `num_classes=0`.
    """

    def __init__(
        self, features: nn.Module, num_features: int, num_classes: int, drop_rate: float = 0.0, global_pool: str = "avg"
    ):
        super().__init__()
        self.features = features
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = num_features
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the convolutions from N(0, 2 / (k^2 out_channels)) (He et al. 2015, arXiv 1502.01852, eq. 14)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps, float [B, num_features, H', W'], before pooling."""
        features: Tensor = self.features(x)
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits, float [B, num_classes], from feature maps; with `pre_logits` pooled features, [B, num_features]."""
        if self.global_pool:
            x = F.dropout(x.mean(dim=(2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float [B, num_classes], from images, float [B, in_chans, H, W]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer, or an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the linear layer by a new one for `num_classes` classes; 0 for none.

        Raises:
            ValueError: for a pooling that these networks do not support, or for a linear layer without pooling.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool={pool!r} is not a pooling of these networks. Use 'avg', or '' for none.")
        if num_classes and not pool:
            raise ValueError(
                f"global_pool='' gives feature maps, which the linear layer of num_classes={num_classes} cannot take. "
                "Use num_classes=0 with it, or global_pool='avg'."
            )
        self.num_classes, self.global_pool = num_classes, pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution without a bias, which would be redundant, as BatchNorm comes before or after each of them."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut, with ReLU after the sum (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(out + shortcut)


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, dropout between them (Zagoruyko and Komodakis 2016).

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, drop_rate: float):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), _conv(outputs, outputs)
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, kernel=1, stride=stride)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = F.relu(self.bn2(self.conv1(active)))
        out = self.conv2(F.dropout(out, self.drop_rate, self.training))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        return out + shortcut


def _stages(block: type[nn.Module], channels: list[int], depth: int, **options: Any) -> nn.Sequential:
    """One stage of `depth` blocks for each entry of `channels` after the first, which is the input's; all stages except
    the first halve the image."""
    return nn.Sequential(
        *(
            nn.Sequential(
                block(inputs, outputs, 1 if stage == 0 else 2, **options),
                *(block(outputs, outputs, 1, **options) for _ in range(depth - 1)),
            )
            for stage, (inputs, outputs) in enumerate(pairwise(channels))
        )
    )


def resnet20(
    num_classes: int = 10, in_chans: int = 3, width: int = 16, drop_rate: float = 0.0, global_pool: str = "avg"
) -> ImageClassifier:
    """ResNet-20 for CIFAR: 0.27 million parameters (He et al. 2015, arXiv 1512.03385, section 4.2)."""
    features = nn.Sequential(
        _conv(in_chans, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _stages(BasicBlock, [width, width, 2 * width, 4 * width], depth=3),
    )
    return ImageClassifier(features, 4 * width, num_classes, drop_rate, global_pool)


def vgg16(
    num_classes: int = 10, in_chans: int = 3, width: int = 64, drop_rate: float = 0.0, global_pool: str = "avg"
) -> ImageClassifier:
    """The 13 convolutions of VGG-16 with BatchNorm and one linear layer: 14.7 million parameters.

    Simonyan and Zisserman 2014, arXiv 1409.1556, table 1, column D. The paper's three linear layers are for 224x224
    images.
    """
    layers: list[nn.Module] = []
    inputs = in_chans
    for outputs, depth in ((width, 2), (2 * width, 2), (4 * width, 3), (8 * width, 3), (8 * width, 3)):
        for _ in range(depth):
            layers += [_conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=True))  # a 16x16 image is down to one pixel before the last pooling
    return ImageClassifier(nn.Sequential(*layers), 8 * width, num_classes, drop_rate, global_pool)


def _wide_resnet(
    depth: int, factor: int, num_classes: int, in_chans: int, width: int, drop_rate: float, global_pool: str
) -> ImageClassifier:
    wide = factor * width
    features = nn.Sequential(
        _conv(in_chans, width),
        _stages(PreActivationBlock, [width, wide, 2 * wide, 4 * wide], depth=(depth - 4) // 6, drop_rate=drop_rate),
        nn.BatchNorm2d(4 * wide),
        nn.ReLU(),
    )
    return ImageClassifier(features, 4 * wide, num_classes, global_pool=global_pool)


def wrn_16_8(
    num_classes: int = 10, in_chans: int = 3, width: int = 16, drop_rate: float = 0.0, global_pool: str = "avg"
) -> ImageClassifier:
    """WRN-16-8: 11.0 million parameters, dropout in the blocks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return _wide_resnet(16, 8, num_classes, in_chans, width, drop_rate, global_pool)


def wrn_28_10(
    num_classes: int = 10, in_chans: int = 3, width: int = 16, drop_rate: float = 0.0, global_pool: str = "avg"
) -> ImageClassifier:
    """WRN-28-10: 36.5 million parameters, dropout in the blocks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""
    return _wide_resnet(28, 10, num_classes, in_chans, width, drop_rate, global_pool)


NETWORKS = {builder.__name__: builder for builder in (resnet20, vgg16, wrn_16_8, wrn_28_10)}


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Builds the network called `name`, with random weights unless `options` say otherwise.

    Args:
        name: one of `NETWORKS`, which take precedence over timm's models of the same name, or any timm model.
        num_classes: number of classes.
        options: options of the builder or of `timm.create_model`, for example `width=8`.

    Raises:
        ValueError: if there is no such network, or if `name` is not one of `NETWORKS` and timm is not installed.
    """
    if name in NETWORKS:
        return NETWORKS[name](num_classes, **options)
    known = ", ".join(NETWORKS)
    try:
        import timm  # takes longer to import than everything else here
    except ImportError:
        raise ValueError(
            f"There is no network {name!r} here, only {known}. If it is a model of timm, install timm: "
            "pip install timm, or in a checkout of hf-lsam pip install -e '.[vision]'."
        ) from None
    if not timm.is_model(name):
        close = ", ".join(get_close_matches(name, timm.list_models(), n=5)) or "nothing like it"
        raise ValueError(
            f"There is no network {name!r}: neither here ({known}) nor in timm {timm.__version__}, which has {close}. "
            "timm.list_models() lists all."
        )
    return timm.create_model(name, num_classes=num_classes, **options)
