"""Images as tensors in memory or in batches from elsewhere: splits, augmentation, batches."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Split:
    """`images`: uint8 [N, 3, H, W]. `labels`: int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))

    def subset(self, index):
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """Training, validation (held out of training) and test images of one task.

    Each is a `Split`, or, for images that do not fit into memory, an iterable of (float images, labels) batches with a
    length, such as a DataLoader (see `load_folder`).
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple

    @property
    def input_shape(self):
        """(channels, height, width)"""
        return tuple(self.example.shape[1:])

    @cached_property
    def example(self):
        """A float batch of one image, [1, C, H, W]: what `cost`, `prune` and `latency` take."""
        return (
            normalize(self.train.images[:1])
            if isinstance(self.train, Split)
            else next(iter(self.test))[0][:1]
        )

    @cached_property
    def fingerprint(self):
        """Twelve hex digits that tell these images, labels and split from any others."""
        digest = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            if isinstance(split, Split):
                digest.update(split.images.numpy())
                digest.update(split.labels.numpy())
            else:  # batches from elsewhere: as far as one can tell without reading them all
                images = len(getattr(split, "dataset", split))
                digest.update(f"{self.name} {self.classes} {images} {self.input_shape}".encode())
        return digest.hexdigest()[:12]

    def __repr__(self):
        shape = "×".join(map(str, self.input_shape))
        splits = {name: getattr(self, name) for name in ("train", "val", "test")}
        sizes = ", ".join(
            f"{len(s):,} {name}{'' if isinstance(s, Split) else ' batches'}"
            for name, s in splits.items()
        )
        return f"Data({self.name}: {len(self.classes)} classes, {shape}, {sizes})"


def normalize(images):
    """uint8 [N, C, H, W] to float with mean about 0 and deviation about 1, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(120.0).div_(64.0)


def augment(images, draws):
    """Random crop after padding by an eighth of the side (4 pixels for 32×32), random mirror.

    `images`: uint8 [N, C, H, W]. `draws`: int64 [3, N] on their device, from `draw`.
    """
    n, c, h, w = images.shape
    pad = _pad(h)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    top, left, mirror = draws[:, :, None]
    rows = top + torch.arange(h, device=images.device)  # [N, H]
    columns = torch.arange(w, device=images.device).expand(n, w)
    columns = left + torch.where(mirror > 0, w - 1 - columns, columns)  # [N, W]
    batch = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def draw(n, height, generator):
    """What `augment` needs for `n` images of `height` pixels: offset from the top, from the left, mirrored; int64 [3, n].

    From a CPU generator, so that every device sees the same images.
    """
    offsets = torch.randint(2 * _pad(height) + 1, (2, n, 1), generator=generator)
    return torch.cat([offsets[..., 0], (torch.rand(1, n, generator=generator) < 0.5).long()])


def _pad(height):
    return max(1, height // 8)


def batches(split, size, generator=None, share=(0, 1)):
    """Yield (float images, labels) of `size`: shuffled, augmented and even with a generator, in order without.

    `split`: or an iterable of such batches, a DataLoader, which is then taken as it is. `share`: (i, n) for every n-th
    image of each batch from the i-th on.
    """
    if not isinstance(split, Split):
        yield from split
        return
    if generator is None:
        for i in range(0, len(split), size):
            yield normalize(split.images[i : i + size]), split.labels[i : i + size]
        return
    device, mine = split.labels.device, slice(share[0], None, share[1])
    order, steps = (
        torch.randperm(len(split), generator=generator).to(device),
        range(steps_per_epoch(split, size)),
    )
    # an epoch's draws go to the device at once: nothing waits for it between the batches
    draws = torch.stack(
        [draw(min(size, len(split)), split.images.shape[2], generator) for _ in steps]
    ).to(device)
    for i in steps:
        index = order[i * size : (i + 1) * size]
        yield normalize(augment(split.images[index], draws[i])[mine]), split.labels[index][mine]


def steps_per_epoch(split, size):
    return max(1, len(split) // size) if isinstance(split, Split) else len(split)
