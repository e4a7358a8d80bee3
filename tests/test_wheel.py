"""The wheel in an environment of its own: README's example and the tables work."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import mslib as ms
from mslib.data.shapes import CLASSES, draw_shapes
from mslib.files import ROOT

EXAMPLE = re.search(
    r"```python\n((?:(?!```).)*my_images\.zip.*?)```", (ROOT / "README.md").read_text(), re.S
).group(1)

SHIPPED = ("small.safetensors", "small.onnx", "small-int8.onnx")

TABLES = """
import json, sys
import mslib as ms

stages = ms.reference("resnet56-cifar10")
found = {
    "mslib": ms.__file__,
    "published": len(ms.published("ResNet-56")),
    "baseline": ms.scoreboard(stages.values())["top-1 %"][0],
    "parameters": sum(p.numel() for p in stages["01_baseline"].model("baseline").parameters()),
}
try:
    ms.require("01_baseline", ms.config("quick"))
except Exception as error:
    found["lessons"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network from a copy, so that nothing is left in this checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mslib", "data/reference"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    shutil.copy(ROOT / "data" / "published.csv", source / "data")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", source / "dist", source], check=True)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def home(wheel, tmp_path_factory):
    """A folder with the unpacked wheel in site/, a user's home/, and an empty folder, work/."""
    home = tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(home / "site")
    (home / "home").mkdir()
    (home / "work").mkdir()
    return home


def run(home, program):
    """Run `program` in work/ with the unpacked wheel alone; returns what it prints."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MSLIB", "XDG"))}
    own = {"PYTHONPATH": home / "site", "HOME": home / "home", "PYTHONDONTWRITEBYTECODE": 1}
    environment = inherited | {key: str(value) for key, value in own.items()}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(
        command, cwd=home / "work", env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def draw_archive(path, train=64, test=20, side=16):
    """A .zip of drawn images as PNG, in train/<class>/ and test/<class>/."""
    folder = path.with_suffix("")
    for split, n, seed in (("train", train, 1), ("test", test, 2)):
        for i, (image, label) in enumerate(zip(*draw_shapes(n, side, seed))):
            into = folder / split / CLASSES[label]
            into.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(into / f"{i}.png")
    shutil.make_archive(str(folder), "zip", folder)
    shutil.rmtree(folder)


def test_the_wheel_holds_all_code_and_all_tables_and_no_notebook(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    code = {f"mslib/{name}" for name in files(ROOT / "mslib") if name.endswith((".py", ".typed"))}
    assert code <= held
    data = ROOT / "data"
    tables = {"published.csv"} | {f"reference/{name}" for name in files(data / "reference")}
    tables = {name for name in tables if not name.endswith((".ipynb", ".png"))}
    assert {f"mslib/course/tables/{name}" for name in tables} <= held
    assert not any(name.endswith((".ipynb", ".png")) for name in held)
    assert wheel.stat().st_size < 10_000_000


def test_the_example_of_the_readme_runs_twice_and_the_second_time_takes_up_its_runs(home):
    draw_archive(home / "work" / "my_images.zip")
    before = files(home / "site")
    first = run(home, EXAMPLE)
    weights = home / "work" / "small.safetensors"
    small = ms.load(weights).state_dict()
    runs = {
        path: path.stat().st_mtime_ns for path in (home / "work" / "runs").rglob("history.json")
    }
    assert len(runs) == 2
    assert run(home, EXAMPLE) == first
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    again = ms.load(weights).state_dict()
    # the trained weights are the same bits; what is folded depends on the layout of the sums
    assert all(torch.allclose(small[name], again[name], atol=1e-6) for name in small)

    macs = [float(number) for number in re.findall(r"([\d.,]+) M MACs", first)]
    assert len(macs) == 2 and macs[1] <= macs[0] / 2
    made = {name.split("/")[0] for name in files(home / "work")}
    assert made == {"my_images.zip", "runs", *SHIPPED}
    assert files(home / "site") == before
    assert {name.split("/")[0] for name in files(home / "home")} <= {".cache"}


def test_measured_and_published_results_are_there_and_lessons_are_not(home):
    before = files(home / "site"), files(home / "work")
    found = json.loads(run(home, TABLES))
    assert Path(found["mslib"]).is_relative_to(home / "site")
    assert found["published"] == len(ms.published("ResNet-56")) > 0
    assert found["baseline"] == ms.scoreboard(ms.reference().values())["top-1 %"][0]
    assert found["parameters"] == 853_018
    assert "git clone" in found["lessons"]
    assert (files(home / "site"), files(home / "work")) == before
    assert {name.split("/")[0] for name in files(home / "home")} <= {".cache"}
