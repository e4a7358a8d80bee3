"""Images as tensors in memory or in batches from elsewhere: splits, augmentation, batches."""

import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import DataLoader

from .identity import digest


@dataclass(frozen=True)
class Split:
    """`images`: uint8 [N, C, H, W]. `labels`: int64 [N]. Others raise ValueError."""

    images: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        dtypes = (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        if not dtypes or (images.dim(), labels.dim(), len(images)) != (4, 1, len(labels)):
            raise ValueError(
                "a Split takes images uint8 [N, C, H, W] and labels int64 [N]; got images "
                f"{images.dtype} {list(images.shape)}, labels {labels.dtype} {list(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, index: torch.Tensor | range) -> "Split":
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """Training, validation (held out of training) and test images of one task.

    Each is a `Split`, or, for images that do not fit into memory, an iterable of (float images,
    labels) batches with a length, such as a DataLoader (see `load_folder`).
    Raises ValueError for anything else, for an empty split and for labels that have no class.
    """

    name: str
    train: Split | DataLoader
    val: Split | DataLoader
    test: Split | DataLoader
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            if not hasattr(part, "__len__") or not len(part):
                raise ValueError(
                    f"{name} of Data: expected a Split, or batches with a length, such as a "
                    f"DataLoader, that are not empty; got {part!r:.80}"
                )
            if isinstance(part, Split):
                low, high = (int(label) for label in part.labels.aminmax())
                if low < 0 or high >= len(self.classes):
                    raise ValueError(
                        f"{name} of Data: labels {low} to {high}, for {len(self.classes)} classes"
                    )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width)"""
        return tuple(self.example.shape[1:])

    @cached_property
    def example(self) -> torch.Tensor:
        """A float batch of one image, [1, C, H, W]: what `cost`, `prune` and `latency` take."""
        part = self.train if isinstance(self.train, Split) else self.test
        with own_draws():  # a DataLoader draws a number for its workers
            images, _ = next(batches(part, 1))
        if not images.is_floating_point() or images.dim() != 4:
            raise ValueError(
                f"batches of {self.name}: expected float images [N, C, H, W], "
                f"got {images.dtype} {list(images.shape)}"
            )
        return images[:1]

    @property  # anew each time, as tensors may be changed in place: 0.1 s for CIFAR-10
    def fingerprint(self) -> str | None:
        """Twelve hex digits that tell images, labels, their order and split, and what loads them.

        None where a DataLoader has what cannot be identified, as `digest` says.
        """
        return digest(self.classes, self.train, self.val, self.test)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.input_shape))
        sizes = []
        for name in ("train", "val", "test"):
            part = getattr(self, name)
            sizes.append(f"{len(part):,} {name}{'' if isinstance(part, Split) else ' batches'}")
        return f"Data({self.name}: {len(self.classes)} classes, {shape}, {', '.join(sizes)})"


@contextmanager
def own_draws(devices: Iterable[int] = (), seed: int | None = None) -> Iterator[None]:
    """Inside, torch, numpy and `random` may draw, from `seed` on; the caller's state comes back."""
    with torch.random.fork_rng(devices), ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        if seed is not None:
            seed_draws(seed)
        yield


def seed_draws(seed: int) -> None:
    """For what transforms draw; not by torch.manual_seed, which seeds every GPU."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, C, H, W] to float with mean about 0 and deviation about 1, channels last."""
    if images.dtype != torch.uint8:
        raise ValueError(f"the images are {images.dtype}; expected uint8, values from 0 to 255")
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(120.0).div_(64.0)


def augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Random crop after padding by an eighth of the side (4 pixels for 32×32), random mirror.

    `images`: uint8 [N, C, H, W]. `draws`: int64 [3, N] on their device, from `draw`.
    """
    n, _, h, w = images.shape
    pad = _pad(h)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    top, left, mirror = draws[:, :, None]  # [N, 1] each
    rows = top + torch.arange(h, device=images.device)  # [N, H]
    columns = torch.arange(w, device=images.device).expand(n, w)
    columns = left + torch.where(mirror > 0, w - 1 - columns, columns)  # [N, W]
    batch = torch.arange(n, device=images.device)[:, None, None]
    chosen = padded[batch, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return chosen.permute(0, 3, 1, 2)


def draw(n: int, height: int, generator: torch.Generator) -> torch.Tensor:
    """What `augment` needs for `n` images: offset from top, from left, mirrored; int64 [3, n].

    From a CPU generator, so that every device sees the same images.
    """
    offsets = torch.randint(2 * _pad(height) + 1, (2, n, 1), generator=generator)
    return torch.cat([offsets[..., 0], (torch.rand(1, n, generator=generator) < 0.5).long()])


def _pad(height: int) -> int:
    return max(1, height // 8)


def batches(
    split: Split | DataLoader,
    size: int,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(float images, labels) of `size`: with a generator shuffled, augmented and even.

    `split`: or an iterable of such batches, a DataLoader, which is then taken as it is.
    `share`: (i, n) for every n-th image of each batch from the i-th on.
    """
    if not isinstance(split, Split):
        yield from split
        return
    steps = range(steps_per_epoch(split, size))  # refuses a bad size
    if generator is None:
        for i in range(0, len(split), size):
            yield normalize(split.images[i : i + size]), split.labels[i : i + size]
        return
    device, mine = split.labels.device, slice(share[0], None, share[1])
    order = torch.randperm(len(split), generator=generator).to(device)
    height, n = split.images.shape[2], min(size, len(split))
    # an epoch's draws go to the device at once: nothing waits for it between the batches
    draws = torch.stack([draw(n, height, generator) for _ in steps]).to(device)  # [steps, 3, n]
    for i in steps:
        index = order[i * size : (i + 1) * size]
        yield normalize(augment(split.images[index], draws[i])[mine]), split.labels[index][mine]


def steps_per_epoch(split: Split | DataLoader, size: int) -> int:
    """An epoch's steps in batches of `size` images; a DataLoader has batches of its own."""
    if isinstance(split, Split) and (not size >= 1 or size % 1):
        raise ValueError(f"batch_size={size}: a batch holds at least one image; 100 are usual")
    return max(1, len(split) // size) if isinstance(split, Split) else len(split)


def sample(
    split: Split | Iterable, images: int, size: int = 100, seed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(float images, labels) in batches of `size`: `images` of a split drawn by `seed`, unchanged.

    split: of a DataLoader, or an iterable of such batches, the first `images` are taken, in the
    batches that it makes. Raises ValueError for a number below 1, or where there is no image.
    """
    if images < 1:
        raise ValueError(f"images={images}: at least one is needed; a few hundred are usual")
    if isinstance(split, Split):
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        split = batches(split.subset(order[:images].to(split.labels.device)), size)
    seen = 0
    with own_draws(seed=seed):  # a DataLoader shuffles by the caller's generator
        for x, y in split:
            yield x[: images - seen], y[: images - seen]
            seen += len(y)
            if seen >= images:
                return
    if not seen:
        raise ValueError("no image to look at: the split or DataLoader is empty")
