"""A small residual network for images of 8 to 32 pixels: 73 thousand parameters at ten classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NAMES", "SmallCNN"]

NAMES = ("small_cnn", "small_cnn_gn")

_WIDTHS = (16, 32, 64)
_LARGEST_FIRST_MAP = 16  # pixels a side in the first stage; larger images begin with a stride
_CHANNELS_PER_GROUP = 8  # of group norm


class _ConvNorm(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int, *, group_norm: bool) -> None:
        norm = (
            nn.GroupNorm(outputs // _CHANNELS_PER_GROUP, outputs)
            if group_norm
            else nn.BatchNorm2d(outputs)
        )
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm)


class _Stage(nn.Module):
    """A convolution that may shrink the map, then one round a shortcut that may be dropped."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, group_norm: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.enter = _ConvNorm(inputs, outputs, stride, group_norm=group_norm)
        self.stay = _ConvNorm(outputs, outputs, 1, group_norm=group_norm)
        self.drop_path = drop_path

    def forward(self, features: Tensor) -> Tensor:
        entered = torch.relu(self.enter(features))
        branch: Tensor = self.stay(entered)
        if self.training and self.drop_path > 0.0:
            keep = 1.0 - self.drop_path
            mask = torch.rand(branch.shape[0], 1, 1, 1, device=branch.device) < keep
            branch = branch * (mask.to(branch.dtype) / keep)
        return torch.relu(entered + branch)


class SmallCNN(nn.Module):
    """Three stages of 16, 32 and 64 channels, average pooling, dropout and a linear head.

    Args:
        classes: How many logits.
        channels: Of the images.
        image_size: Height and width in pixels, at least 8: sets the first stride, so that the first
            stage's map has at most 16 pixels a side.
        group_norm: Group norm for batch norm.
        drop_rate: Dropout before the head.
        drop_path_rate: Probability of dropping the last stage's branch for a sample; it rises
            linearly from 0 (Huang et al., "Deep Networks with Stochastic Depth", 2016).

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        *,
        classes: int,
        channels: int,
        image_size: int,
        group_norm: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        if image_size < 8 or classes < 1 or channels < 1:
            raise ValueError(
                "SmallCNN needs images of at least 8 pixels, a class and a channel,"
                f" got {image_size}, {classes} and {channels}."
            )
        super().__init__()
        self.name = NAMES[group_norm]
        self.num_classes = classes
        stride = 1
        while -(-image_size // stride) > _LARGEST_FIRST_MAP:
            stride *= 2
        stages = []
        for number, width in enumerate(_WIDTHS):
            stages.append(
                _Stage(
                    _WIDTHS[number - 1] if number else channels,
                    width,
                    2 if number else stride,
                    group_norm=group_norm,
                    drop_path=drop_path_rate * number / (len(_WIDTHS) - 1),
                )
            )
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(drop_rate)
        self.head = nn.Linear(_WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits, ``(rows, classes)``, of images ``(rows, channels, height, width)``."""
        features: Tensor = self.stages(images)
        logits: Tensor = self.head(self.dropout(features.mean(dim=(2, 3))))
        return logits

    def get_classifier(self) -> nn.Module:
        """The head, by timm's name for it."""
        return self.head
