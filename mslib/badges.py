"""The repository's address stands in pyproject.toml; here it is written wherever else it must appear."""

import json
import re
import tomllib

from .files import ROOT, replacing

PLACES = r"(github\.com/|/github/|/v2/gh/)[\w.-]+/[\w.-]+?(?=(\.git)?[/\s\"')\]\\]|$)"


def address():
    """ "owner/name" of the repository, from [project.urls] in pyproject.toml."""
    url = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    return url.removeprefix("https://github.com/").rstrip("/")


def places():
    """(file, "owner/name") for every badge, clone command and link to the repository in README and lessons."""
    for path in _files():
        for line in _lines(path):
            for found in re.finditer(PLACES, line):
                yield path, found.group(0).removeprefix(found.group(1))


def stamp():
    """Write the address of pyproject.toml everywhere; returns the files that changed."""
    changed = []
    for path in _files():
        text = path.read_text()
        new = re.sub(PLACES, lambda m: m.group(1) + address(), text)
        if new != text:
            with replacing(path) as beside:
                beside.write_text(new)
            changed.append(path.relative_to(ROOT))
    return changed


def _files():
    return [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def _lines(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        return ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    return [text]
