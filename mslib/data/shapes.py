"""The embedded task: ten kinds of drawn shapes, made from a seed, to run the course offline."""

import math
from collections.abc import Callable

import torch

FIRST = ("disc", "ring", "square", "frame", "triangle")
CLASSES = (*FIRST, "star", "cross", "crescent", "bar", "half disc")


def draw_shapes(n: int, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` images of one shape each, uint8 [n, 3, size, size], and their labels, int64 [n].

    There are as many of each class. Position, scale, rotation, colours, ground, stray spots and
    noise vary from image to image; the same arguments give the same images. They are as hard as
    they have to be for channels to matter: at 16 pixels a narrow ResNet-56 knows nine in ten, and
    of two networks with half of the channels the one that keeps the wrong ones knows far fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    images = [_draw(part, size, generator) for part in labels.split(500)]
    return torch.cat(images), labels


def _draw(labels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    # twice the pixels, averaged at the end: soft edges
    axis = (torch.arange(2 * size) + 0.5) / size - 1
    y, x = axis[:, None].expand(2 * size, 2 * size), axis.expand(2 * size, 2 * size)

    angle, scale = uniform(-1.2, 1.2), uniform(0.4, 0.8)
    dx, dy = x - uniform(-0.25, 0.25), y - uniform(-0.25, 0.25)
    u = (angle.cos() * dx + angle.sin() * dy) / scale
    v = (angle.cos() * dy - angle.sin() * dx) / scale
    shape = torch.stack(_inside(u, v))[labels, torch.arange(n)].unsqueeze(1).float()

    ground, ink = uniform(0.05, 0.55, 3), uniform(0.35, 0.95, 3)  # mostly, ink is lighter
    picture = ground + uniform(-0.2, 0.2, 3) * x + uniform(-0.2, 0.2, 3) * y
    picture = _spot(picture, uniform, x, y)  # one spot under the shape, a second one on top of it
    picture = torch.lerp(picture, ink + uniform(-0.15, 0.15, 3) * x, shape)
    picture = _spot(picture, uniform, x, y)
    picture = torch.nn.functional.avg_pool2d(picture, 2)
    noise = torch.randn(picture.shape, generator=generator) * uniform(0.02, 0.12, 1)
    return ((picture + noise) * 255).clamp(0, 255).to(torch.uint8)


def _spot(
    picture: torch.Tensor, uniform: Callable, x: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    radius, cx, cy = uniform(0.05, 0.25, 1), uniform(-1, 1, 1), uniform(-1, 1, 1)
    inside = ((x - cx) ** 2 + (y - cy) ** 2 < radius**2).float()
    return torch.lerp(picture, uniform(0.1, 0.9, 3), inside)


def _inside(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each class a map [n, H, W] of what is inside the shape, whose radius is about one."""
    r, theta = torch.hypot(u, v), torch.atan2(v, u)
    largest, smallest = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    third = torch.remainder(theta, 2 * math.pi / 3) - math.pi / 3
    return (
        r < 0.9,
        (r < 0.95) & (r > 0.5),
        largest < 0.8,
        (largest < 0.85) & (largest > 0.45),
        r * third.cos() < 0.55,
        r < 0.62 + 0.38 * (5 * theta).cos(),
        (smallest < 0.28) & (largest < 1),
        (r < 1) & (torch.hypot(u - 0.5, v) > 0.8),
        (u.abs() < 1) & (v.abs() < 0.3),
        (r < 1) & (v > 0),
    )
