"""Operations on grey levels that keep every pixel in its place, each over a batch, by Kornia.

Images are float32 ``(rows, channels, height, width)`` and hold whole grey levels, 0 to 255; so do
the results. Rounding passes gradients on as if it were not there. Sums of levels are exact, so that
a row's bits can't depend on its neighbours in the batch. Arguments are one number a row.
Definitions are torchvision's for uint8 images, to one level: it cuts off where this rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["POINT_OPERATIONS", "whole"]

LEVELS = 256


def whole(images: Tensor) -> Tensor:
    """The nearest whole levels from 0 to 255."""
    return _straight(images, images.detach().round().clamp_(0.0, 255.0))


def _straight(images: Tensor, values: Tensor) -> Tensor:
    """``values``, with the gradient of ``images`` where there is one."""
    if not images.requires_grad:
        return values
    return images + (values - images.detach())


def _column(argument: Tensor) -> Tensor:
    return argument.view(-1, 1, 1, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Levels times ``factor``."""
    from kornia.enhance import adjust_brightness_accumulative

    result: Tensor = adjust_brightness_accumulative(images, factor, clip_output=False)
    return whole(result)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards grey by ``factor``; the identity for one channel."""
    if images.shape[1] == 1:
        return images
    from kornia.enhance import adjust_saturation_with_gray_subtraction

    # Kornia clips to [0, 1], so levels are scaled there and back.
    result: Tensor = adjust_saturation_with_gray_subtraction(images / 255.0, factor)
    return whole(result * 255.0)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue by a part of a whole turn; the identity for one channel."""
    if images.shape[1] == 1:
        return images
    from kornia.enhance import adjust_hue

    result: Tensor = adjust_hue(images / 255.0, turn * (2.0 * math.pi))
    return whole(result * 255.0)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the mean grey level by ``factor``."""
    mean = _grey(images).double().mean(dim=(1, 2, 3)).float()
    blend = _column(mean * (1.0 - factor))
    return whole(images * _column(factor) + blend)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts levels from ``threshold`` up."""
    return torch.where(images >= _column(threshold), 255.0 - images, images)


def invert(images: Tensor, _: Tensor) -> Tensor:
    """Inverts all levels."""
    return 255.0 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the highest ``bits`` bits of each level."""
    step = _column(torch.exp2(8.0 - bits))
    return _straight(images, torch.floor(images.detach() / step) * step)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a channel of one level is left as it is."""
    low = images.amin(dim=(2, 3), keepdim=True)
    span = images.amax(dim=(2, 3), keepdim=True) - low
    stretched = whole((images - low) * (255.0 / span.clamp(min=1.0)))
    return torch.where(span > 0, stretched, images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Flattens each channel's histogram, by Pillow's integer arithmetic.

    A channel with fewer than 255 pixels outside its highest level is left as it is: so is all of an
    8x8 image.
    """
    rows, channels, height, width = images.shape
    if height * width < LEVELS - 1:
        return images
    planes = rows * channels
    levels = images.detach().reshape(planes, height * width).long()
    base = torch.arange(planes, device=images.device).unsqueeze(1) * LEVELS
    histogram = torch.zeros(planes * LEVELS, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(0, (levels + base).reshape(-1), torch.ones_like(levels).reshape(-1))
    histogram = histogram.view(planes, LEVELS)
    highest = levels.amax(dim=1, keepdim=True)
    step = (height * width - histogram.gather(1, highest)) // (LEVELS - 1)
    below = histogram.cumsum(dim=1) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=LEVELS - 1)
    flat = table.gather(1, levels).to(images.dtype).view_as(images)
    flat = torch.where(step.view(rows, channels, 1, 1) > 0, flat, images.detach())
    return _straight(images, flat)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards a 3x3 smoothing by ``factor``; the border is copied."""
    if min(images.shape[2:]) < 3:
        return images
    rows_sum = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    box = rows_sum[..., :-2] + rows_sum[..., 1:-1] + rows_sum[..., 2:]
    inner = images[:, :, 1:-1, 1:-1]
    smooth = whole((box + 4.0 * inner) / 13.0)
    result = images.clone()
    weight = _column(factor)
    result[:, :, 1:-1, 1:-1] = whole(inner * weight + smooth * (1.0 - weight))
    return result


def _grey(images: Tensor) -> Tensor:
    """Luma in whole levels, ``(rows, 1, height, width)``; ITU-R BT.601's weights."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    luma = red * 0.2989 + green * 0.587 + blue * 0.114
    return _straight(luma, luma.detach().floor()).unsqueeze(1)


POINT_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autocontrast": autocontrast,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "equalize": equalize,
    "hue": hue,
    "invert": invert,
    "posterize": posterize,
    "sharpness": sharpness,
    "solarize": solarize,
}
