"""The course's drawn images, or any others, as a folder of files."""

from pathlib import Path
from typing import Any

from ..data.sources import KNOWN, dataset_identity, find_dataset, load_data
from ..files import read_json, replacing, write_json


def image_folder(
    dataset: str, path: str | Path, size: int = 32, sizes: tuple[int, int] = (1000, 400)
) -> Path:
    """`dataset` (as in `load_data`) as a folder of images for `load_folder`; returns its path.

    A folder stays where it is; anything else is written to `path` as PNG files, once. What they
    are is told by a file beside it: ValueError for a `path` of other images.
    `size`, `sizes`: of the images and how many, for shapes.
    """
    if dataset not in KNOWN and find_dataset(dataset).is_dir():
        return find_dataset(dataset)
    path = Path(path)
    beside_it = path.with_name(f".{path.name}.json")  # in it, it would be passed over with a line
    wanted: dict[str, Any] = {"dataset": Path(dataset).name, "images": dataset_identity(dataset)}
    if dataset == "shapes":
        wanted = {"dataset": dataset, "size": str(size), "sizes": ", ".join(map(str, sizes))}
    if path.exists():
        found = read_json(beside_it) if beside_it.exists() else "images of which nothing is known"
        if found != wanted:
            raise ValueError(
                f"{path} holds {found}, asked for are {wanted}; choose another path, or remove it. "
                "To take it as it is, give it as the dataset"
            )
    else:
        data = load_data(dataset, image_size=size if dataset == "shapes" else None, sizes=sizes)
        with replacing(path) as beside:
            numbered = _write(beside / "train", data.train, data.classes, 0)
            _write(beside / "train", data.val, data.classes, numbered)
            _write(beside / "test", data.test, data.classes, 0)
            write_json(beside_it, wanted)
    return path


def _write(folder: Path, split: Any, classes: tuple[str, ...], start: int) -> int:
    """Write the images, numbered from `start` on; the number after the last one."""
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(split.images, split.labels), start):
        pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
        Image.fromarray(pixels).save(folder / classes[label] / f"{i:05}.png")
    return start + len(split)
