"""The website: what its pages hold, read as HTML, and how it behaves in a browser.

Skipped where the extra `site` is not installed, and the browser's part where there is no Chromium.
"""

import functools
import http.server
import json
import re
import shutil
import threading
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest

import mslib as ms
from mslib.files import ROOT
from tools import pages, stamp

NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "latex2mathml", "bs4")
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSON_PAGES = [f"notebooks/{path.stem}.html" for path in LESSONS]
BESIDE = ["results.html", "own_network.html", "settings.html", "api.html"]
BASE = "http://site/"  # stands for the folder of the site while links are followed


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built once, without a warning."""
    for name in NEEDED:
        pytest.importorskip(name, reason="the site needs `pip install -e .[site]`, as `make site`")
    folder = tmp_path_factory.mktemp("site")
    pages.build(folder / "html", folder / "work")
    return folder / "html"


@pytest.fixture(scope="module")
def read(site):
    """Path of a page -> its HTML, parsed."""
    from bs4 import BeautifulSoup

    found = {
        path.relative_to(site).as_posix(): BeautifulSoup(path.read_text("utf-8"), "html.parser")
        for path in site.rglob("*.html")
    }
    return {name: page for name, page in found.items() if not name.startswith("_static/")}


def shown(path):
    """The cells of a lesson that readers see: without those that speak to the tests alone."""
    cells = nbformat.read(path, 4).cells
    return [c for c in cells if "check" not in c.metadata.get("tags", [])]


# ---- the pages as HTML ---------------------------------------------------------------------------


def test_next_leads_through_all_lessons_in_order_and_then_through_the_other_pages(read):
    way, here = [], "index.html"
    while (button := read[here].select_one("a.right-next")) and len(way) < len(read):
        before, here = here, urljoin(BASE + here, button["href"]).removeprefix(BASE)
        back = read[here].select_one("a.left-prev")["href"]
        assert urljoin(BASE + here, back) == BASE + before
        way.append(here)
    assert way == LESSON_PAGES + BESIDE


def test_every_lesson_is_in_the_sidebar_and_in_the_list_of_the_front_page(read):
    for part in ("nav.bd-links", "article table"):
        links = {a["href"] for a in read["index.html"].select(f"{part} a[href]")}
        assert links >= set(LESSON_PAGES), part


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_opens_on_binder_and_colab(path, read):
    links = [unquote(a["href"]) for a in read[f"notebooks/{path.stem}.html"].select("a[href]")]
    where = f"notebooks/{path.name}"
    for start in (f"https://mybinder.org/v2/gh/{stamp.address()}/main?",):
        assert any(link.startswith(start) and link.endswith(where) for link in links)
    assert f"https://colab.research.google.com/github/{stamp.address()}/blob/main/{where}" in links


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_shows_its_stored_cells_but_not_the_checks(path, read):
    page, cells = read[f"notebooks/{path.stem}.html"], shown(path)
    code = [c for c in cells if c.cell_type == "code"]
    sources = [found.get_text().strip() for found in page.select("div.cell_input pre")]
    assert sources == [c.source.strip() for c in code]
    printed = page.select_one("article").get_text()
    for output in (output for c in code for output in c.outputs):
        if output.output_type == "stream":
            assert output.text.strip().splitlines()[-1] in printed
    folded = sum(c.source.count("<details>") for c in cells if c.cell_type == "markdown")
    assert len(page.select("article details:has(> summary)")) >= folded
    fenced = r"<details>(?:(?!</details>).)*```python"
    solutions = sum(len(re.findall(fenced, c.source, re.S)) for c in cells)
    assert len(page.select("article details:has(div.highlight-python)")) >= solutions


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_every_figure_has_its_title_as_words(path, read):
    outputs = [o for c in shown(path) if c.cell_type == "code" for o in c.outputs]
    stored = [o.metadata.get("image/png", {}) for o in outputs if "image/png" in o.get("data", {})]
    figures = read[f"notebooks/{path.stem}.html"].select("div.cell_output img")
    assert len(figures) == len(stored)
    for image, words in zip(figures, stored):
        assert image["alt"] == words["alt"] if "alt" in words else image["alt"]


def test_every_image_has_words(read):
    images = [(name, image) for name, page in read.items() for image in page.select("img")]
    words = [image.get("alt", "").strip() for _, image in images]
    assert all(words) and not [w for w in words if w.endswith((".png", ".svg"))]  # no file's name
    assert any(name == "index.html" for name, _ in images)


def test_links_inside_lead_somewhere_and_links_outside_are_well_formed(site, read):
    broken, places = (
        [],
        {name: {t["id"] for t in page.select("[id]")} for name, page in read.items()},
    )
    for name, page in read.items():
        for tag in page.select("a[href], link[href], img[src], script[src]"):
            link = tag.get("href") or tag.get("src")
            target = urlsplit(urljoin(BASE + name, link))
            path = unquote(target.path).removeprefix("/") or "index.html"
            if target.netloc != "site":
                form = target.scheme == "https" and "." in target.netloc and " " not in link
                good = form or target.scheme in ("data", "mailto")
                good = good and (tag.name == "a" or target.scheme == "data" or "rel" in tag.attrs)
            else:
                good = (site / path).is_file()
                if target.fragment and path in places:
                    good = good and unquote(target.fragment) in places[path] | {"", "#"}
            if not good:
                broken.append(f"{name}: {link}")
    assert not broken


def test_links_to_github_name_files_of_the_repository(read):
    start = f"{stamp.GITHUB}{stamp.address()}/blob/main/"
    links = {a["href"] for page in read.values() for a in page.select(f"a[href^='{start}']")}
    named = [ROOT / urlsplit(link.removeprefix(start)).path for link in links]
    assert len(named) > len(LESSONS) and all(path.exists() for path in named)


def test_the_reference_holds_every_public_name_with_its_docstring(read):
    page = read["api.html"]
    for name in ms.__all__:
        entry = page.find(id=f"mslib.{name}")
        entry = entry or page.find(id=f"module-mslib.{name}")
        assert entry, name
        words = re.findall(r"[a-z]{4,}", (getattr(ms, name).__doc__ or "").split("\n\n")[0])
        text = (entry.parent if entry.name == "dt" else page).get_text()
        assert not [word for word in words if word not in text], name


def test_the_search_index_knows_lessons_and_their_words(site):
    text = (site / "searchindex.js").read_text("utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    assert {f"{name}.html" for name in index["docnames"]} == {"index.html", *LESSON_PAGES, *BESIDE}
    found = index["terms"]["momentum"]
    found = [found] if isinstance(found, int) else found
    assert any(index["docnames"][i].startswith("notebooks/") for i in found)


# ---- links from the repository to the site -------------------------------------------------------


@pytest.mark.parametrize(
    "link, there",
    [
        ("site/results.md#how-fast", "results.md#how-fast"),
        ("README.md", "index.md"),
        ("notebooks/01_baseline.ipynb", "notebooks/01_baseline.ipynb"),
        ("LICENSE", f"{stamp.GITHUB}{stamp.address()}/blob/main/LICENSE"),
        ("no/such/file.md", "no/such/file.md"),
        ("https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_are_moved_with_the_page(link, there):
    assert pages._moved(ROOT / "README.md", f"[text]({link})") == f"[text]({there})"


# ---- in a browser --------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Handler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium(address):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `site`")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium here: the site is not tried in a browser")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium, address):
    """Opens a tab; at the end no page may have asked another host for anything."""
    asked, contexts = [], []

    def opened(width=1400, **kwargs):
        size = {"width": width, "height": 900}
        # no transitions: half-way between two themes a colour has the contrast of neither
        contexts.append(chromium.new_context(viewport=size, reduced_motion="reduce", **kwargs))
        contexts[-1].set_default_timeout(60_000)  # of a busy machine
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert asked and all(url.startswith((address, "data:")) for url in asked)


def theme(page):
    return page.evaluate("document.documentElement.dataset.theme")


def test_search_theme_and_navigation_work(tab, address):
    page = tab(color_scheme="light")
    page.goto(address)
    page.keyboard.press("Control+K")
    page.keyboard.type("momentum")
    page.keyboard.press("Enter")
    found = page.locator("#search-results a[href*='notebooks/']")
    found.first.wait_for()
    found.first.click()
    page.wait_for_url("**/notebooks/*")
    assert "momentum" in page.inner_text("article")

    page.goto(address + LESSON_PAGES[0])
    page.locator(".theme-switch-button:visible").first.click()
    page.locator(".theme-change-button[data-mode='dark']:visible").first.click()
    assert theme(page) == "dark"
    page.locator("a.right-next").click()
    page.wait_for_url(f"**/{LESSON_PAGES[1]}")
    assert page.url == address + LESSON_PAGES[1] and theme(page) == "dark"

    solution = page.locator("article details:has(.highlight)").first
    assert not solution.locator(".highlight").first.is_visible()
    solution.locator("> summary").click()
    assert solution.locator(".highlight").first.is_visible()


@pytest.mark.parametrize("name", ["index.html", LESSON_PAGES[2], "results.html", "api.html"])
def test_a_page_fits_a_phone(name, tab, address):
    page = tab(400, has_touch=True)
    page.goto(address + name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    menu = page.locator("nav.bd-links").first
    assert not menu.is_visible()
    page.locator(".primary-toggle:visible").first.click()
    menu.wait_for(state="visible")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", LESSON_PAGES[2], "api.html"])
def test_a_page_can_be_used_by_everybody(name, scheme, tab, address):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `site`")
    page = tab(color_scheme=scheme)
    page.goto(address + name)
    assert theme(page) == scheme
    faults = [
        (fault["id"], [node["target"] for node in fault["nodes"]][:5])
        for fault in axe.Axe().run(page).response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert not faults
