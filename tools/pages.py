"""The site: README, the stored lessons, longer pages and the reference of `ms`, as HTML.

`python -m tools.pages` builds build/site. Lessons are shown as they are stored: nothing is trained.
Sphinx reads a folder that is put together here, so that every page can live where it belongs in
the repository and its links lead to the right place both there and on the site.
"""

import inspect
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mslib as ms
from mslib.files import ROOT
from tools.stamp import GITHUB, address

BUILD = ROOT / "build"
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=[)#\s])")
# the site has launch buttons of its own: a line of badges says them twice
BADGES = re.compile(r"^(?:\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)[ \t]*)+\n?", re.M)

# module below mslib -> (heading, what it is for), in the order of `ms.__all__`
GROUPS = {
    "pruning": ("Pruning", "How a network is cut."),
    "penalties": ("Penalties", "The methods. Penalties add up: `a + b` is a penalty too."),
    "training": ("Training", "How a network is trained and evaluated."),
    "recipes": ("Recipes", "Pruning, training and evaluating in a loop."),
    "data": ("Data", "Where images come from."),
    "networks": ("Networks", "Networks of any width: made, saved and loaded."),
    "costs": ("Costs", "What a network costs in MACs and in time."),
    "exports": ("Exports", "Networks for use without `mslib`."),
    "course": ("Course", "What the lessons use. These need the extra `course`."),
}
# module -> the group in which readers look for it
MEMBERS = {"architectures": "networks", "quantization": "exports"}


def assemble(source: Path) -> None:
    """Put together in the folder `source`, anew, what Sphinx reads."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "notebooks").mkdir(parents=True)
    for path in sorted((ROOT / "site").iterdir()):
        if path.suffix == ".md":
            (source / path.name).write_text(_moved(path, path.read_text("utf-8")), "utf-8")
        elif path.is_dir() and path.name != "__pycache__":
            shutil.copytree(path, source / path.name)
    shutil.copy(ROOT / "site" / "conf.py", source)
    readme = ROOT / "README.md"
    text = BADGES.sub("", _moved(readme, readme.read_text("utf-8")))
    (source / "README.md").write_text(text, "utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        (source / "notebooks" / path.name).write_text(_lesson(path), "utf-8")
    for path in (ROOT / "data" / "reference").glob("*/*.png"):
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (source / "api.md").write_text(api(), "utf-8")


def _lesson(path: Path) -> str:
    """A stored lesson without the cells that speak to the tests alone, its links leading on."""
    notebook = json.loads(path.read_text("utf-8"))
    cells = [c for c in notebook["cells"] if "check" not in c["metadata"].get("tags", [])]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            text = _moved(path, "".join(cell["source"]), "notebooks")
            cell["source"] = BADGES.sub("", text)
    return json.dumps(notebook | {"cells": cells})


def _moved(path: Path, text: str, folder: str = "") -> str:
    """`text` of the file `path` as a page in `folder` of the site: what is not there, on GitHub."""

    def moved(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(path.parent / found[1]))
        if "://" in found[1] or not target.exists() or not target.is_relative_to(ROOT):
            return found[1]
        place = target.relative_to(ROOT)
        if place.suffix == ".md" and place.parent == Path("site"):
            return posixpath.relpath(place.name, folder or ".")
        if place == Path("README.md"):
            return posixpath.relpath("index.md", folder or ".")
        if place.suffix == ".png" or (place.suffix, place.parts[0]) == (".ipynb", "notebooks"):
            return posixpath.relpath(place.as_posix(), folder or ".")
        return f"{GITHUB}{address()}/blob/main/{place.as_posix()}"

    return LINK.sub(moved, text)


def api() -> str:
    """The reference as a page: every name of `ms.__all__`, in groups, its docstring in full."""
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in ms.__all__:
        found = getattr(ms, name)
        module = found.__name__ if inspect.ismodule(found) else found.__module__
        part = module.split(".")[1]
        groups[MEMBERS.get(part, part)].append(_entry(name, found))
    lines = ["# Reference", "", "All of these are names of `mslib`: `import mslib as ms`.", ""]
    for group, (heading, text) in GROUPS.items():
        lines += [f"## {heading}", "", text, "", "```{eval-rst}"]
        lines += [*groups[group], "```", ""]
    return "\n".join(lines)


def _entry(name: str, found: object) -> str:
    """What autodoc is asked for `ms.<name>`; of a module, its functions as they are called."""
    if inspect.ismodule(found):
        text = (inspect.getdoc(found) or "").replace("`", "``")
        functions = [
            f".. autofunction:: mslib::{name}.{key}\n"
            for key, value in vars(found).items()
            if inspect.isfunction(value) and value.__module__ == found.__name__ and key[0] != "_"
        ]
        return "\n".join((f".. py:module:: mslib.{name}\n", text, "", *functions))
    if inspect.isclass(found):
        return f".. autoclass:: mslib.{name}\n   :members:\n   :member-order: bysource\n"
    return f".. autofunction:: mslib.{name}\n"


def build(output: Path = BUILD / "site", work: Path = BUILD / "site-work") -> None:
    """Build the site into `output`. Raises CalledProcessError for an error or any warning."""
    assemble(work / "source")
    shutil.rmtree(output, ignore_errors=True)
    options = ["-W", "--keep-going", "-n", "-q", "-b", "html", "-d", str(work / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(work / "source"), str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


if __name__ == "__main__":
    try:
        build()
    except subprocess.CalledProcessError:
        sys.exit("the site was not built without warnings: see the lines above")
    print(f"built {BUILD / 'site' / 'index.html'}")
