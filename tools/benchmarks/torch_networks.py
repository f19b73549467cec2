"""Networks of `models` in PyTorch, layer for layer, to time its training step beside ours."""

from collections.abc import Callable

import torch
from torch import nn


class _Residual(nn.Module):
    """Add a shortcut to a branch, then rectify."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def _conv_bn(inputs: int, filters: int, size: int, strides: int = 1, relu: bool = True) -> nn.Sequential:
    conv = nn.Conv2d(inputs, filters, size, strides, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), *([nn.ReLU()] if relu else []))


def resnet18(num_classes: int) -> nn.Module:
    """Return `models.resnet.resnet18`."""
    layers: list[nn.Module] = [_conv_bn(3, 64, 3)]
    inputs = 64
    for stage, filters in enumerate((64, 128, 256, 512)):
        for block in range(2):
            strides = 2 if stage and not block else 1
            branch = nn.Sequential(_conv_bn(inputs, filters, 3, strides), _conv_bn(filters, filters, 3, relu=False))
            shortcut = _conv_bn(inputs, filters, 1, strides, relu=False) if strides == 2 else nn.Identity()
            layers.append(_Residual(branch, shortcut))
            inputs = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


def resnet50(num_classes: int) -> nn.Module:
    """Return `models.resnet.resnet50`."""
    layers: list[nn.Module] = [_conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for stage, (filters, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            strides = 2 if stage and not block else 1
            branch = nn.Sequential(
                _conv_bn(inputs, filters, 1),
                _conv_bn(filters, filters, 3, strides),
                _conv_bn(filters, 4 * filters, 1, relu=False),
            )
            shortcut = nn.Identity() if block else _conv_bn(inputs, 4 * filters, 1, strides, relu=False)
            layers.append(_Residual(branch, shortcut))
            inputs = 4 * filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


def alexnet_bn(num_classes: int) -> nn.Module:
    """Return `models.alexnet.alexnet` with batch normalization, for images of 227 pixels."""
    layers: list[nn.Module] = []
    convs = (
        (3, 96, 11, 4, 0, 1),
        (96, 256, 5, 1, 2, 2),
        (256, 384, 3, 1, 1, 1),
        (384, 384, 3, 1, 1, 2),
        (384, 256, 3, 1, 1, 2),
    )
    for i, (inputs, filters, size, strides, padding, groups) in enumerate(convs, start=1):
        layers += [
            nn.Conv2d(inputs, filters, size, strides, padding, groups=groups, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
        ]
        if i in (1, 2, 5):
            layers.append(nn.MaxPool2d(3, 2))
    layers.append(nn.Flatten())
    for inputs in (9216, 4096):
        layers += [nn.Linear(inputs, 4096), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(4096, num_classes))


class _NoScale(nn.BatchNorm2d):
    """Batch normalization with a shift and no scale."""

    def __init__(self, filters: int):
        super().__init__(filters)
        del self.weight
        self.register_parameter("weight", None)


def fast_cifar(num_classes: int, widths: tuple[int, int, int] = (64, 256, 256)) -> nn.Module:
    """Return `models.fast_cifar.fast_cifar`."""
    whiten = nn.Conv2d(3, 24, 2, bias=False)
    whiten.requires_grad_(False)
    layers: list[nn.Module] = [whiten, nn.ReLU()]
    inputs = 24
    for width in widths:
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.MaxPool2d(2), _NoScale(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), _NoScale(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes, bias=False))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "alexnet_bn": alexnet_bn,
    "fast_cifar": fast_cifar,
}
