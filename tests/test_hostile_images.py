"""Damaged and hostile images and archives: each is refused by name, and nothing is started."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

import mslib as ms

from .bounds import bounded

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n"


def encoded(image, kind="PNG", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def noise(seed=0, size=8):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


GOOD = encoded(Image.fromarray(noise()))
JPEG = encoded(Image.fromarray(noise(size=64)), "JPEG")


def chunk(kind, content, checksum=None):
    check = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width, height, rows=b"", **change):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows), **change)
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def animated(kind):
    frames = [Image.fromarray(noise(i)) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


IMAGES = {  # name of a file -> its content, and what the error says
    "postscript.png": (POSTSCRIPT, "its content is none of BMP, GIF"),
    "postscript.tif": (POSTSCRIPT, "its content is none of"),
    "empty.png": (b"", "its content is none of"),
    "text.jpg": (b"these are no pixels", "its content is none of"),
    "page.gif": (b"<html>not found</html>", "its content is none of"),
    "icon.png": (encoded(Image.fromarray(noise(size=16)), "ICO"), "its content is none of"),
    "pdf.jpg": (b"%PDF-1.4\n" + bytes(99), "its content is none of"),
    "cut.png": (GOOD[:60], ""),
    "head.png": (GOOD[:33], ""),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "head.jpg": (JPEG[:30], ""),
    "cut.bmp": (encoded(Image.fromarray(noise()), "BMP")[:100], "truncated"),
    "cut.gif": (encoded(Image.fromarray(noise(size=64)), "GIF")[:900], ""),
    "cut.webp": (encoded(Image.fromarray(noise()), "WEBP")[:50], ""),
    "cut.tif": (encoded(Image.fromarray(noise()), "TIFF")[:60], ""),
    "cut.ppm": (encoded(Image.fromarray(noise()), "PPM")[:60], "truncated"),
    "checksum.png": (png(2, 2, bytes(14), checksum=1), "broken PNG file"),
    "middle.png": (flipped(GOOD, 100), ""),
    "bomb.png": (png(30_000, 30_000), "pixels"),
    "huge.png": (png(8000, 8000), "8000×8000 pixels; at most 40,000,000"),
    "flat.png": (png(0, 8), ""),
    "float.tif": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "of 32 bits"),
    "whole.tif": (encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "of 32 bits"),
    "frames.gif": (animated("GIF"), "several frames"),
    "frames.png": (animated("PNG"), "several frames"),
    "frames.webp": (animated("WEBP"), "several frames"),
    "pages.tif": (animated("TIFF"), "several frames"),
    "sizes.ppm": (b"P6 99999999 99999999 255\n", "pixels"),
    "header.ppm": (b"P6 8 eight 255\n", ""),
    "long.bmp": (bytes(2**26 + 1), "more than 64 MiB"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A good set in tmp_path / "set", its cache beside, and a `gs` that leaves a trace."""
    monkeypatch.setattr("mslib.data.sources.data_folder", lambda: tmp_path / "data")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    for name, content in good_files().items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(content)
    yield tmp_path / "set"
    assert not (tmp_path / "started").exists()


def good_files(top=""):
    files = {}
    for i, name in enumerate(("cat", "dog")):
        for k in range(5):
            image = Image.fromarray(noise(10 * i + k))
            files[f"{top}{'train' if k else 'test'}/{name}/{k}.png"] = encoded(image)
    return files


def zipped(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path, files, *members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return path


@pytest.mark.parametrize("name", IMAGES)
def test_a_bad_image_is_named_wherever_it_lies(folder, name):
    content, message = IMAGES[name]
    bad = f"train/cat/{name}"
    packed = zipped(folder.parent / "set.zip", good_files() | {bad: content})
    (folder / bad).write_bytes(content)
    for path in (folder, packed):
        with (
            bounded(),
            pytest.raises(ValueError, match=f"(?s){bad} is not a readable image .*{message}"),
        ):
            ms.load_data(path)
    loaded = ms.load_folder(folder, size=8, batch_size=8, val=0.2, workers=0)
    named = pytest.raises(ValueError, match=f"(?s){bad} is not a readable image .*{message}")
    with bounded(), named:
        for part in (loaded.train, loaded.val):
            list(part)


def test_a_bad_image_is_named_by_a_worker_too(folder):
    (folder / "test" / "cat" / "bad.png").write_bytes(GOOD[:60])
    with pytest.raises(ValueError, match="test/cat/bad.png is not a readable image"):
        list(ms.load_folder(folder, size=8, batch_size=8, val=0.2, workers=1).test)


# ---- archives: the path of one that is made in the folder `p` ----


def two_sets(p):
    return tarred(p / "a.tar.gz", good_files("a/") | good_files("b/"))


def too_deep(p):
    files = {n.replace("/cat/", "/animals/cat/"): c for n, c in good_files().items()}
    return zipped(p / "a.zip", files)


def no_layout(p):
    return zipped(p / "a.zip", {n.split("/", 1)[1]: c for n, c in good_files().items()})


def link_outside(p):
    link = tarfile.TarInfo("train/cat/9.png")
    link.type, link.linkname = tarfile.SYMTYPE, "../../../../etc/passwd"
    return tarred(p / "a.tar.gz", good_files(), link)


def hard_link_outside(p):
    link = tarfile.TarInfo("train/cat/9.png")
    link.type, link.linkname = tarfile.LNKTYPE, "/etc/passwd"
    return tarred(p / "a.tar.gz", good_files(), link)


def links_in_a_circle(p):
    links = [tarfile.TarInfo(f"train/cat/{name}.png") for name in "xy"]
    for link, target in zip(links, "yx"):
        link.type, link.linkname = tarfile.SYMTYPE, f"{target}.png"
    return tarred(p / "a.tar.gz", good_files(), *links)


def zip_link(p):
    info = zipfile.ZipInfo("train/cat/9.png")
    info.external_attr = 0o120777 << 16
    zipped(p / "a.zip", good_files())
    with zipfile.ZipFile(p / "a.zip", "a") as archive:
        archive.writestr(info, "/etc/passwd")
    return p / "a.zip"


def endless_member(p):
    info = tarfile.TarInfo("readme.txt")
    info.size = 10**12
    with tarfile.open(tarred(p / "a.tar", {}), "w") as archive:
        archive.fileobj.write(info.tobuf())
    return p / "a.tar"


def zip_bomb(p):
    files = {"train/cat/9.png": bytes(7 * 10**7)}
    return zipped(p / "a.zip", files | good_files(), compression=zipfile.ZIP_DEFLATED)


def tar_bomb(p):
    return tarred(p / "a.tar.gz", {"train/cat/9.png": bytes(7 * 10**7)} | good_files())


def headers(p, kind, size, content=b"", more=()):
    """A tar that begins with headers of this kind, each followed by `size` bytes of `content`."""
    info = tarfile.TarInfo("more")
    info.type, info.size = kind, size
    tail = tarred(p / "good.tar.gz", good_files())
    with gzip.open(p / "a.tar.gz", "wb", compresslevel=1) as archive:
        archive.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(0, size, 2**20):
            archive.write((content or bytes(1)) * (2**20 // max(1, len(content))))
        archive.write(gzip.decompress(tail.read_bytes()))
    return p / "a.tar.gz"


def huge_pax(p):
    return headers(p, tarfile.XHDTYPE, 2**26)


def huge_global_pax(p):
    return headers(p, tarfile.XGLTYPE, 2**26, b"20 comment=all bytes\n"[:16])


def huge_name(p):
    return headers(p, tarfile.GNUTYPE_LONGNAME, 2**26, b"long")


def negative_pax(p):
    return headers(p, tarfile.XHDTYPE, -(2**20))


def many_globals(p):
    """Each file would carry a copy of them all."""
    known = {f"key{i}": "x" * 20 for i in range(3000)}
    with tarfile.open(p / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT, pax_headers=known) as tar:
        for i in range(1000):
            tar.addfile(tarfile.TarInfo(f"train/cat/{i}.png"))
    return p / "a.tar.gz"


def negative_size(p):
    """The next header would be the one before it, for ever."""
    info = tarfile.TarInfo("train/cat/9.png")
    info.size = -1024
    with gzip.open(tarred(p / "a.tar.gz", {}), "wb") as archive:
        archive.write(info.tobuf(tarfile.GNU_FORMAT))
    return p / "a.tar.gz"


def negative_size_in_pax(p):
    info = tarfile.TarInfo("train/cat/9.png")
    info.pax_headers = {"size": "-4096"}
    with gzip.open(tarred(p / "a.tar.gz", {}), "wb") as archive:
        archive.write(info.tobuf(tarfile.PAX_FORMAT) + bytes(2**20))
    return p / "a.tar.gz"


def headers_without_end(p):
    """A chain of extended headers, each of which is small."""
    info = tarfile.TarInfo("more")
    info.type, info.size = tarfile.XHDTYPE, 0
    with gzip.open(p / "a.tar.gz", "wb", compresslevel=1) as archive:
        for _ in range(2**4):
            archive.write(info.tobuf(tarfile.GNU_FORMAT) * 2**10)
    return p / "a.tar.gz"


def sparse_without_end(p):
    """A sparse file whose map goes on and on, first in the old form, then in that of PAX."""
    info = tarfile.TarInfo("train/cat/9.png")
    info.type = tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1  # it goes on in the next block
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    block = bytearray((b"%011o\0" % 512) * 42 + bytes(8))
    block[504] = 1
    with gzip.open(p / "a.tar.gz", "wb", compresslevel=1) as archive:
        archive.write(head)
        for _ in range(2**5):
            archive.write(bytes(block) * 2**11)
    return p / "a.tar.gz"


def sparse_in_pax(p):
    info = tarfile.TarInfo("train/cat/9.png")
    info.size = 2**25
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with gzip.open(p / "a.tar.gz", "wb", compresslevel=1) as archive:
        archive.write(info.tobuf(tarfile.PAX_FORMAT) + b"99999999\n")
        for _ in range(2**5):
            archive.write(b"0\n" * 2**19)
    return p / "a.tar.gz"


def many_empty_files(p):
    block = tarfile.TarInfo("train/cat/1.png").tobuf()
    with gzip.open(p / "a.tar.gz", "wb", compresslevel=1) as archive:
        for _ in range(40):
            archive.write(block * 2**11)
    return p / "a.tar.gz"


def lying_size(p):
    content = bytearray(zipped(p / "a.zip", good_files()).read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 20)
    (p / "a.zip").write_bytes(content)
    return p / "a.zip"


def cut(path, share=0.7):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def garbage(p, start=b"\x1f\x8b\x08\x00"):
    (p / "a.tar.gz").write_bytes(start + bytes(range(256)) * 20)
    return p / "a.tar.gz"


def otherwise_packed(p, module):
    content = gzip.decompress(tarred(p / "a.tar.gz", good_files()).read_bytes())
    (p / "a.tar").write_bytes(module.compress(content))
    return p / "a.tar"


def empty_gzip(p):
    (p / "a.tar.gz").write_bytes(b"")
    return p / "a.tar.gz"


def damaged_gzip(p):
    path = tarred(p / "a.tar.gz", good_files())
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))
    return path


def damaged_member(p):
    path = zipped(p / "a.zip", good_files())
    path.write_bytes(flipped(path.read_bytes(), 100))
    return path


def encrypted(p):
    content = bytearray(zipped(p / "a.zip", good_files()).read_bytes())
    for sign, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag in both headers
        at = content.find(sign)
        while at >= 0:
            content[at + place] |= 1
            at = content.find(sign, at + 4)
    (p / "a.zip").write_bytes(content)
    return p / "a.zip"


def one_class(p):
    return zipped(p / "a.zip", {n: c for n, c in good_files().items() if "cat" in n})


def class_in_test_only(p):
    return zipped(p / "a.zip", good_files() | {"test/bird/1.png": GOOD})


ARCHIVES = {
    two_sets: r"a.tar.gz holds several sets, in \['a', 'b'\]",
    too_deep: "test/animals/cat/0.png lies too deep, not in train/<class>/",
    no_layout: "a.zip holds no train images; expected files like train/<class>",
    link_outside: "a.tar.gz cannot be read .*passwd.* not found",
    hard_link_outside: "a.tar.gz cannot be read .*passwd.* not found",
    links_in_a_circle: "a.tar.gz cannot be read .*recursion",
    zip_link: "train/cat/9.png is not a readable image",
    endless_member: "a.tar: readme.txt has 1,000,000,000,000 bytes; remove it",
    zip_bomb: "train/cat/9.png is not a readable image .more than 64 MiB",
    tar_bomb: "train/cat/9.png is not a readable image .more than 64 MiB",
    huge_pax: "a.tar.gz cannot be read .*bytes about one file",
    huge_global_pax: "a.tar.gz cannot be read .*bytes about one file",
    huge_name: "a.tar.gz cannot be read .*bytes about one file",
    negative_pax: "a.tar.gz cannot be read",
    many_globals: "a.tar.gz cannot be read .*bytes about one file",
    negative_size: "train/cat/9.png has -1,024 bytes; remove it",
    negative_size_in_pax: "train/cat/9.png has -4,096 bytes; remove it",
    headers_without_end: "a.tar.gz cannot be read",
    sparse_without_end: "a.tar.gz cannot be read .*bytes about one file",
    sparse_in_pax: "a.tar.gz cannot be read .*bytes about one file",
    many_empty_files: "a.tar.gz holds over .* files in .* bytes; pack images only",
    lying_size: "train/dog/4.png is not a readable image",
    garbage: "a.tar.gz cannot be read as a folder, .tar.gz or .zip of images: .*; pack it anew",
    empty_gzip: "a.tar.gz cannot be read",
    damaged_gzip: "a.tar.gz cannot be read|is not a readable image",
    damaged_member: "a.zip cannot be read .*CRC|is not a readable image",
    encrypted: "a.zip cannot be read .* encrypted, password required",
    one_class: "one class, 'cat'",
    class_in_test_only: "class 'bird' is in test/ but has no image in train/",
    lambda p: cut(zipped(p / "a.zip", good_files())): "a.zip cannot be read",
    lambda p: cut(tarred(p / "a.tar.gz", good_files())): "a.tar.gz cannot be read",
    lambda p: cut(tarred(p / "a.tar.gz", good_files()), 0.1): "a.tar.gz cannot be read",
    lambda p: garbage(p, b"PK\x03\x04"): "a.tar.gz cannot be read",
    lambda p: otherwise_packed(p, bz2): "a.tar cannot be read as a folder, .tar.gz or .zip",
    lambda p: otherwise_packed(p, lzma): "a.tar cannot be read as a folder, .tar.gz or .zip",
}


@pytest.mark.parametrize("make", ARCHIVES)
def test_a_bad_archive_is_named_and_read_within_bounds(folder, make):
    path = make(folder.parent)
    with bounded(), pytest.raises(ValueError, match=ARCHIVES[make]):
        ms.load_data(path)
    assert not (folder.parent / "data").exists()  # nothing goes to the cache


def test_only_what_is_asked_for_is_read(folder, monkeypatch):
    asked = []
    files = good_files() | {"movie.mp4": bytes(999), "train/cat/readme.txt": b"about cats"}
    path = zipped(folder.parent / "a.zip", files)
    original = zipfile.ZipFile.open

    def noted(self, name, *args):
        if self.filename == str(path):  # and not the cache
            asked.append(getattr(name, "filename", name))
        return original(self, name, *args)

    monkeypatch.setattr(zipfile.ZipFile, "open", noted)
    ms.load_data(path)
    assert set(asked) == set(good_files())


def test_what_is_passed_over_is_said_in_one_line(folder, caplog):
    junk = (".DS_Store", "train/Thumbs.db", "train/cat/desktop.ini", "readme.txt", "1.png")
    more = ("__MACOSX/train/cat/._1.png", ".git/train/cat/1.png", "train/cat/.hidden.png")
    files = good_files() | dict.fromkeys((*junk, *more, "val/cat/1.png"), b"junk")
    path = zipped(folder.parent / "a.zip", files)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for start in (lambda: ms.load_data(path), lambda: ms.load_data(path)):  # read, then cached
        caplog.clear()
        assert len(start().test) == 2
        (line,) = caplog.messages
        assert "a.zip: 9 files passed over, such as " in line
    for start in (ms.load_data, lambda p: ms.load_folder(p, 8, 2, workers=0)):
        caplog.clear()
        assert start(folder).classes == ("cat", "dog")
        assert len(caplog.messages) == 1 and "files passed over" in caplog.text


def test_links_are_followed_in_folders_and_inside_archives(folder):
    (folder / "train" / "cat").rename(folder.parent / "pool")
    (folder / "train" / "cat").symlink_to(folder.parent / "pool")
    assert len(ms.load_data(folder).train) == 7
    assert len(ms.load_folder(folder, 8, 2, workers=0).train.dataset) == 7
    link = tarfile.TarInfo("train/cat/9.png")
    link.type, link.linkname = tarfile.SYMTYPE, "1.png"
    assert len(ms.load_data(tarred(folder.parent / "a.tar.gz", good_files(), link)).train) == 8
    (folder / "train" / "dog" / "up").symlink_to(folder.parent)  # and would have no end
    with pytest.raises(ValueError, match="lies too deep|several sets"):
        ms.load_data(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_broken_link_and_a_pipe_are_named(folder):
    (folder / "train" / "cat" / "9.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match="train/cat/9.png is a broken link or no file"):
        ms.load_data(folder)
    (folder / "train" / "cat" / "9.png").unlink()
    os.mkfifo(folder / "train" / "cat" / "8.png")
    with pytest.raises(ValueError, match="train/cat/8.png is a broken link or no file"):
        ms.load_data(folder)


def test_backslashes_and_folders_in_a_zip(folder):
    names = {name.replace("/", "\\"): content for name, content in good_files("top/").items()}
    path = zipped(folder.parent / "a.zip", {"top/train/": b""} | names)
    assert ms.load_data(path).classes == ("cat", "dog")


@pytest.mark.parametrize("pack, kind", [(zipped, "zip"), (tarred, "tar.gz")])
def test_a_file_of_two_names_counts_once_as_the_last_of_them(folder, pack, kind):
    other = encoded(Image.new("RGB", (8, 8), (1, 2, 3)))
    files = good_files() | {"./test/cat/0.png": other, "train//dog/1.png": other}
    data = ms.load_data(pack(folder.parent / f"a.{kind}", files))
    assert len(data.train) + len(data.val) == 8 and len(data.test) == 2
    assert data.test.images[0, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_cache_is_named_and_made_anew(folder, caplog, damage):
    import torch

    path = zipped(folder.parent / "a.zip", good_files())
    want = ms.load_data(path).fingerprint
    (cache,) = (folder.parent / "data" / "cache").iterdir()
    if damage is None:  # a whole file with something else in it
        torch.save({"classes": ["cat"], "note": ""}, cache)
    else:
        cache.write_bytes(damage)
    before = cache.read_bytes()
    assert ms.load_data(path).fingerprint == want
    assert f"{cache} is damaged and made anew" in caplog.text and cache.read_bytes() != before


def test_an_archive_replaced_by_one_of_the_same_size_and_time_is_noticed(folder):
    files = good_files()
    path = zipped(folder.parent / "a.zip", files)
    stat, first = path.stat(), ms.load_data(path)
    swapped = {"train/cat/1.png": "train/dog/1.png", "train/dog/1.png": "train/cat/1.png"}
    content = {name: files[swapped.get(name, name)] for name in files}
    zipped(path, content)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert ms.load_data(path).fingerprint != first.fingerprint


def test_a_cache_that_cannot_be_written_is_no_error(folder, monkeypatch):
    path = zipped(folder.parent / "a.zip", good_files())
    (folder.parent / "file").write_text("no folder")
    monkeypatch.setattr("mslib.data.sources.data_folder", lambda: folder.parent / "file")
    assert len(ms.load_data(path).test) == 2
