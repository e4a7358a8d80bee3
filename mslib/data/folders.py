"""Images of a folder, read while training, by torchvision's ImageFolder (its import takes time)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from .archives import parts_of
from .images import read_image


class ClassFolder(ImageFolder):
    """An ImageFolder of the files that `layout` has found: hidden folders are no classes."""

    def __init__(
        self, path: Path, classes: list[str], names: list[str], transform: Callable
    ) -> None:
        self.found = classes, names
        super().__init__(path, transform, loader=read_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        return self.found[0], {name: i for i, name in enumerate(self.found[0])}

    def make_dataset(  # type: ignore[override]
        self, directory: str, class_to_idx: dict[str, int], **_: Any
    ) -> list[tuple[str, int]]:
        return [(f"{directory}/{name}", class_to_idx[parts_of(name)[-2]]) for name in self.found[1]]
