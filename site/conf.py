"""How Sphinx makes the site. `make site` puts together what it reads (tools/pages.py)."""

import hashlib
import inspect
import json
import re
from base64 import b64decode
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

import mslib as ms
from tools.stamp import GITHUB, address

project = "mslib"
author = "the mslib authors"
project_copyright = f"{author}, MIT licence"
version = release = ms.__version__
owner, repository = address().split("/")

extensions = ["myst_nb", "sphinx.ext.autodoc"]
exclude_patterns = ["README.md"]  # index.md takes it in
nb_execution_mode = "off"  # the outputs are the stored ones
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

html_theme = "sphinx_book_theme"
html_title = "mslib"
html_baseurl = f"https://{owner}.github.io/{repository}/"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "repository_url": GITHUB + address(),
    "repository_branch": "main",
    "path_to_docs": "",
    "use_repository_button": True,
    "use_download_button": False,
    "launch_buttons": {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
        "notebook_interface": "jupyterlab",
    },
    "home_page_in_toc": True,
    "navbar_persistent": [],  # search stands in the sidebar
    "show_toc_level": 2,
    # both pass WCAG's contrast for text
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

autodoc_typehints_format = "short"
# what other packages define has no page here, and without a network no list of theirs is at hand
nitpick_ignore_regex = [
    ("py:.*", r"(?:torch|nn|np|numpy|pd|pandas|matplotlib|collections|pathlib|typing)\..*"),
    ("py:.*", r"(?:Path|Tensor|Module|DataFrame|Series|Axes|Figure|Any|Callable|optional)"),
    ("py:.*", r"mslib\.(?:\w+\.)+\w+"),  # a type that is no name of `ms`
]


# ---- docstrings: plain text, with names in single backticks --------------------------------------

SPECIAL = re.compile(r"([\\*_|])")
HANGING = re.compile(r"^\S.*\n[ ]+\S", re.M)


def _escaped(text: str) -> str:
    """One paragraph of plain text as reStructuredText."""
    parts = re.split(r"(`[^`]+`)", text)
    for i, part in enumerate(parts):
        if not part.startswith("`"):
            parts[i] = SPECIAL.sub(r"\\\1", part.replace("->", "→"))
        elif part[1:-1] in ms.__all__ and part != "`plots`":
            parts[i] = f"\\ :py:obj:`~mslib.{part[1:-1]}`\\ "
        else:
            parts[i] = f"\\ `{part}`\\ "
    return "".join(parts)


def _paragraph(text: str, names: list[str]) -> str:
    """A paragraph keeps its form: code as code, lists as lists, anything else flows.

    Each argument in `names` that is explained ("name: what it means") begins a line of its own.
    """
    if all(line.startswith("    ") for line in text.splitlines()):
        return f"::\n\n{text}"
    if text.startswith("- "):
        return _escaped(text)
    if HANGING.search(text):  # the further lines of an argument are indented
        lines = re.split(r"\n(?=\S)", text)
    else:
        name = rf"`?(?:{'|'.join(names) or '(?!)'})`?"
        explained = rf"{name}(?:, {name})*(?: \([^)]*\))?: "
        lines = re.split(rf"(?<=[.;])\s(?={explained}|Raises )", " ".join(text.split()))
        if not re.match(explained, lines[0]):
            return "\n\n".join(_escaped(line) for line in lines)
    return "\n".join(f"| {_escaped(' '.join(line.split()))}" for line in lines)


def plain(app, what, name, found, options, lines):
    """Docstrings were written to be read as they are: show them so, with their names linked."""
    try:
        names = [re.escape(n) for n in inspect.signature(found).parameters]
    except (TypeError, ValueError):
        names = []
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).rstrip())
    made = [_paragraph(p.rstrip(), names) for p in paragraphs]
    lines[:] = [*"\n\n".join(made).splitlines(), ""]


# ---- figures: the words that a lesson keeps beside each picture ----------------------------------


def _words(folder: Path) -> dict[str, str]:
    """SHA-256 of each picture in the lessons, by which MyST-NB names its file -> its alt text."""
    words = {}
    for path in sorted(folder.glob("*.ipynb")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                alt = output.get("metadata", {}).get("image/png", {}).get("alt")
                if alt:
                    picture = b64decode("".join(output["data"]["image/png"]))
                    words[hashlib.sha256(picture).hexdigest()] = alt
    return words


def describe(app, doctree):
    """Give every figure its title as alt text; one without a title, that of its section."""
    for image in doctree.findall(nodes.image):
        if image.get("alt"):
            continue
        above = image.parent
        while above is not None and not isinstance(above, nodes.section):
            above = above.parent
        section = above.next_node(nodes.title).astext() if above is not None else project
        image["alt"] = app.words.get(Path(image["uri"]).stem, f"Figure: {section}")


# ---- formulas: MathML, which browsers show by themselves -----------------------------------------


def inline_math(self, node):
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(self, node):
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app):
    app.words = _words(Path(app.srcdir) / "notebooks")
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-docstring", plain)
    app.connect("doctree-read", describe)
