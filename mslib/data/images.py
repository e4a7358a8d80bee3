"""One image file to RGB pixels, by the same rules wherever images are read."""

import io
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # for others it starts programs
SUFFIXES = (".bmp", ".gif", ".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".tif", ".tiff", ".webp")
MAX_BYTES, MAX_PIXELS = 2**26, 40_000_000  # of one image; Pillow takes four bytes a pixel


class DataError(ValueError):
    """An image, folder or archive that cannot be used; the message names the file."""


def decode(file: IO[bytes], name: str) -> Image.Image:
    """The RGB image in an open file; `name` is what an error calls it.

    EXIF's orientation is applied, and what is transparent shows white. Of 16 bits a channel the
    upper 8 are kept. CMYK becomes RGB without its colour profile. PNG files are held against their
    checksums. Other formats have none: bytes damaged in the middle, of a JPEG for example, often
    come out as wrong colours, unnoticed.

    Raises DataError for every other file: of another format, damaged, with several frames, with
    float or 32-bit pixels, of more than MAX_PIXELS pixels or MAX_BYTES bytes.
    """
    try:
        content = file.read(MAX_BYTES + 1)  # never more, whatever a header says
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB; save it smaller")
        return _rgb(_open(content))
    except UnidentifiedImageError:
        reason = f"its content is none of {', '.join(FORMATS)}"
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = str(error) or type(error).__name__
    raise DataError(f"{name} is not a readable image ({reason}); remove it or replace it")


def open_file(path: str | Path) -> IO[bytes]:
    if not Path(path).is_file():  # reading a pipe would wait for ever
        raise DataError(f"{path} is a broken link or no file; remove it or replace it")
    return open(path, "rb")


def read_image(path: str | Path) -> Image.Image:
    """The RGB image in the file `path`, as `decode` says."""
    with open_file(path) as file:
        return decode(file, str(path))


def _open(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=FORMATS)  # reads the header only
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width}×{height} pixels; at most {MAX_PIXELS:,} are read: shrink it")
    if image.format == "PNG":
        image.verify()  # the checksums; an image is of no use after that
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a photo and its preview
        raise ValueError("it has several frames; save one of them")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.array(image)  # [H, W], 0 to 65535
        if "transparency" in image.info:
            wide[wide == image.info["transparency"]] = 65535
        if getattr(image, "tag_v2", {}).get(262) == 0:  # of a TIFF: 0 is white
            wide = 65535 - wide  # as Pillow does where there are 8 bits
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        seen = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", seen.size, "white")
        image.paste(seen, mask=seen)
    return image if image.mode == "RGB" else image.convert("RGB")
