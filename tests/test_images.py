"""One image file to RGB: what a viewer would show, whatever the format."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from mslib.data.images import decode, read_image

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def decoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    image = decode(file, "image")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_kept(kind):
    wide = np.array([[0, 255, 256, 511], [0x8040, 0xFF00, 0xFFFF, 4095]], np.uint16)
    found = decoded(Image.fromarray(wide), kind)
    assert (found == (wide // 256)[..., None]).all()


def test_a_tiff_whose_zero_is_white():
    wide = np.array([[0, 0x1234, 0xFFFF]], np.uint16)
    found = decoded(Image.fromarray(wide), "TIFF", tiffinfo={262: 0})
    assert found[0, :, 0].tolist() == [255, 255 - 0x12, 0]


def test_12_bits_that_a_header_tells_of():
    content = b"P5 2 2 4095\n" + struct.pack(">4H", 4095, 2048, 0, 16)
    found = np.asarray(decode(io.BytesIO(content), "grey.pgm"))[..., 0]
    assert found.tolist() == [[255, 128], [0, 1]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(kind):
    turned = {
        1: RAMP,
        2: RAMP[:, ::-1],
        3: RAMP[::-1, ::-1],
        4: RAMP[::-1],
        5: RAMP.T,
        6: np.rot90(RAMP, -1),
        7: RAMP[::-1, ::-1].T,
        8: np.rot90(RAMP),
    }
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    for number, want in turned.items():
        exif = Image.Exif()
        exif[0x0112] = number
        found = decoded(Image.fromarray(RAMP), kind, exif=exif, **options)[..., 0]
        assert found.shape == want.shape and abs(found - want.astype(int)).max() < 6, number


def test_what_is_transparent_shows_white():
    hidden = (200, 10, 10)
    assert (decoded(Image.new("RGBA", (4, 4), (*hidden, 0))) == 255).all()
    half = decoded(Image.new("RGBA", (4, 4), (*hidden, 128)))
    assert abs(half - (np.array(hidden) + 255.0) / 2).max() < 2
    assert (decoded(Image.new("LA", (4, 4), (7, 0))) == 255).all()
    palette = Image.new("P", (4, 4))
    palette.putpalette([9, 8, 7] * 256)
    assert (decoded(palette) == [9, 8, 7]).all()
    assert (decoded(palette, transparency=0) == 255).all()
    assert (decoded(palette, "GIF", transparency=0) == 255).all()
    assert (decoded(Image.new("RGB", (4, 4), hidden), transparency=hidden) == 255).all()
    assert (decoded(Image.new("L", (4, 4), 9), transparency=9) == 255).all()
    wide = Image.fromarray(np.full((4, 4), 300, np.uint16))
    assert (decoded(wide, transparency=300) == 255).all()


def test_other_colours():
    assert (decoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG") == [255, 0, 0]).all()
    assert (decoded(Image.new("CMYK", (4, 4), (0, 0, 0, 255)), "TIFF") == 0).all()
    assert (decoded(Image.new("1", (4, 4), 1)) == 255).all()
    assert (decoded(Image.new("L", (4, 4), 77), "BMP") == 77).all()
    assert (decoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PPM") == [1, 2, 3]).all()


def test_the_photo_of_a_camera_that_adds_a_preview(tmp_path):
    photo, preview = Image.new("RGB", (8, 8), (10, 200, 10)), Image.new("RGB", (8, 8))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    found = np.asarray(read_image(tmp_path / "a.jpg")).astype(int)
    assert abs(found - [10, 200, 10]).max() < 6
