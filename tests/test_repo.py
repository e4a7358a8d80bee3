"""What a reader meets before the first cell: README, environments, badges, the stored notebooks."""

import importlib.util
import re
import subprocess
import sys
import tomllib

import nbformat
import pandas as pd
import pytest
import yaml

import mslib as ms
from mslib.course.cli import main
from mslib.course.stages import NEEDS
from mslib.files import ROOT
from tools import stamp

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


EXTRAS = PROJECT["optional-dependencies"]
COURSE = [name for name in EXTRAS if name not in ("all", "site")]  # what `all` stands for
PAGES = {path: path.read_text(encoding="utf-8") for path in stamp.pages()}


def requirements(path):
    """What a conda environment lists, written as pip would, and what it has pip install."""
    listed = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    pip = next((entry["pip"] for entry in listed if isinstance(entry, dict)), [])
    conda = {entry.replace(" ", "") for entry in listed if isinstance(entry, str)}
    return {re.sub(r"^pytorch(-cpu)?(?=>|$)", "torch", entry) for entry in conda}, pip


def test_a_conda_environment_holds_all_extras():
    conda, pip = requirements("environment.yml")
    wanted = {*PROJECT["dependencies"]}.union(*(EXTRAS[name] for name in COURSE))
    assert wanted - {"pandas"} <= conda | {*pip}  # pandas: the tests' narrower range
    assert "-e ." in pip


def test_binder_holds_the_course_without_the_tests():
    conda, _ = requirements("binder/environment.yml")
    wanted = {*PROJECT["dependencies"], *EXTRAS["course"], *EXTRAS["export"], *EXTRAS["sweep"]}
    assert wanted <= conda
    # repo2docker understands no range of versions
    assert any(re.fullmatch(r"python=3\.\d+", entry) for entry in conda)


def test_make_and_all_take_every_extra_but_the_site():
    assert EXTRAS["all"] == [f"mslib[{','.join(COURSE)}]"]
    makefile = (ROOT / "Makefile").read_text()
    assert '-e ".[all]"' in makefile and '-e ".[site]"' in makefile


def test_the_workflow_runs_both_commands_on_the_oldest_and_the_newest_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    (job,) = workflow["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == PROJECT["requires-python"] and len(versions) == 2
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make run", "make test"]


def test_the_workflow_of_the_site_tests_what_it_publishes():
    workflow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())
    build, deploy = workflow["jobs"]["build"], workflow["jobs"]["deploy"]
    runs = [step["run"] for step in build["steps"] if "run" in step]
    assert runs[0] == "make site" and "tests/test_site.py" in runs[1]
    uploads = [step["with"]["path"] for step in build["steps"] if "upload" in step.get("uses", "")]
    assert uploads == ["build/site"]
    assert deploy["needs"] == "build" and "refs/heads/main" in deploy["if"]
    assert deploy["permissions"] == {"pages": "write", "id-token": "write"}


def test_the_citation_file_says_what_version_1_2_of_the_format_requires():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    for entry in (cited, *cited["references"]):
        assert entry["title"] and all(author for author in entry["authors"])
        assert entry is cited or entry["type"] in ("article", "conference-paper")
    assert cited["message"] and cited["repository-code"].endswith(stamp.address())


CHECKS = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


@pytest.mark.parametrize("command", CHECKS, ids=" ".join)
def test_the_code_is_clean(command):
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]


def test_binder_installs_the_course():
    script = ROOT / "binder" / "postBuild"
    assert script.stat().st_mode & 0o111 and "-e ." in script.read_text()


def places(root):
    """(file, "owner/name") of every badge, clone command and link in README, pages and lessons."""
    files = [
        root / "README.md",
        *(root / "site").glob("*.md"),
        *(root / "notebooks").glob("*.ipynb"),
    ]
    for path in files:
        for found in re.finditer(stamp.PLACES, path.read_text()):
            yield path, found.group(0).removeprefix(found.group(1))


def test_every_badge_and_link_has_the_address_of_pyproject():
    found = list(places(ROOT))
    assert {path.name for path, _ in found} >= {"README.md", *(p.name for p in LESSONS)}
    assert {where for _, where in found} == {stamp.address()}


def test_readme_pages_and_lessons_are_stamped():
    """Their numbers come out of data/reference: `python -m mslib stamp` writes them."""
    sections = [found.group(2) for text in PAGES.values() for found in stamp.SECTION.finditer(text)]
    assert sorted(sections) == sorted(stamp.MADE)
    for path in (*PAGES, *LESSONS):
        text, up = path.read_text(encoding="utf-8"), "" if path.parent == ROOT else "../"
        assert stamp.stamped(text, up) == text, f"{path.name}: run `python -m mslib stamp`"


def test_readme_is_short():
    prose = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", "", README, flags=re.S)
    assert len(re.findall(r"\w[\w.'’%-]*", prose)) <= 700  # what is longer has a page in site/


def test_the_recipe_of_lesson_09_is_the_example_of_the_readme():
    """One recipe, run by tests/test_wheel.py."""
    recipe = re.search(r"```python\n.*?```", README, re.S).group(0)
    (lesson,) = (path for path in LESSONS if path.name.startswith("09"))
    cells = nbformat.read(lesson, 4).cells
    assert any(recipe in c.source for c in cells if c.cell_type == "markdown")
    calls = {*re.findall(r"ms\.(\w+)", recipe)} - {"load_data"}  # images from a folder, there
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    assert len(calls) > 8 and calls <= {*re.findall(r"ms\.(\w+)", code)}


def test_stamping_replaces_what_stands_between_the_markers(monkeypatch):
    monkeypatch.setitem(stamp.MADE, "bench", lambda: "new\n")
    text = "before <!-- bench -->\nold\n<!-- /bench --> after, <!-- other -->\nkept\n"
    assert stamp.stamped(text) == text.replace("old", "new")
    monkeypatch.setitem(stamp.MADE, "bench", lambda: "[new](data/new.csv)\n")
    linked = text.replace("old", "[new](../data/new.csv)")  # from a page in a folder below
    assert stamp.stamped(text, up="../") == linked


def test_stamp_changes_the_address_everywhere(tmp_path, monkeypatch):
    ours = f'Repository = "https://github.com/{stamp.address()}"'
    for path in (*PAGES, ROOT / "pyproject.toml", *LESSONS):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        other = 'Repository = "https://github.com/me/my.course"'
        target.write_text(path.read_text().replace(ours, other))
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    before = len(list(places(tmp_path)))
    named = {path for path, _ in places(tmp_path)}
    assert set(stamp.stamp()) == {path.relative_to(tmp_path) for path in named}
    assert stamp.stamp() == []
    after = list(places(tmp_path))
    assert len(after) == before and {where for _, where in after} == {"me/my.course"}
    for path in (tmp_path / "notebooks").iterdir():
        nbformat.validate(nbformat.read(path, 4))


def section(name):
    return stamp.stamped(f"<!-- {name} -->\n<!-- /{name} -->")


@pytest.mark.parametrize("name, station", [("findings", "folded"), ("few", "4")])
def test_a_section_in_which_a_measurement_is_missing_is_refused(
    name, station, tmp_path, monkeypatch
):
    table = pd.read_csv(stamp.REFERENCE / "recovery-cifar10.csv")
    lacking = table[(table.method != "masked") | (table.station != station)]
    lacking.to_csv(tmp_path / "recovery-cifar10.csv", index=False)
    monkeypatch.setattr(stamp, "REFERENCE", tmp_path)
    with pytest.raises(ValueError, match=f"'{name}', made from .*recovery-cifar10.csv: a measur"):
        section(name)


def test_means_over_other_seeds_are_refused(tmp_path, monkeypatch):
    names = ("comparison-cifar10.csv", "control-cifar10.csv")
    tables = {name: pd.read_csv(stamp.REFERENCE / name) for name in names}
    monkeypatch.setattr(stamp, "REFERENCE", tmp_path)
    for name, made in zip(names, ("comparison", "methods")):
        for other in names:
            tables[other][int(name == other) :].to_csv(tmp_path / other, index=False)
        with pytest.raises(ValueError, match=rf"section '{made}'.* has seeds \(1, 2\), others"):
            section(made)


def test_a_table_that_grows_shows_the_seeds_that_all_its_cells_have(monkeypatch):
    curves = stamp.recovery_curves()
    before = section("recovery")
    more = curves[:1].assign(seed=7, test=0.0)
    other = more.assign(method="masked", station="28")  # a cell that the first seed lacks
    grown = pd.concat([curves, more, other])
    monkeypatch.setattr(stamp, "recovery_curves", lambda: grown)
    assert section("recovery") == before
    whole = pd.concat([curves, curves.assign(seed=7)])
    monkeypatch.setattr(stamp, "recovery_curves", lambda: whole)
    assert "seed 0, 7;" in section("recovery")


@pytest.mark.parametrize(
    "file, content, name",
    [
        ("bench.json", "{}", "bench"),
        ("bench.json", "{", "bench"),
        ("comparison-cifar10.csv", "", "comparison"),
        ("comparison-cifar10.csv", "method,top1\n", "methods"),
        ("networks.csv", "network\nx\n", "networks"),
        ("recovery-cifar10.csv", "", "few"),
    ],
)
def test_what_a_section_cannot_be_made_from_is_named(tmp_path, monkeypatch, file, content, name):
    (tmp_path / file).write_text(content)
    monkeypatch.setattr(stamp, "REFERENCE", tmp_path)
    with pytest.raises(ValueError, match=f"section '{name}', made from .*{file}"):
        section(name)


def test_a_damaged_lesson_is_named_and_nothing_is_stamped(tmp_path, monkeypatch):
    for path in (*PAGES, ROOT / "pyproject.toml", *LESSONS):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text().replace(stamp.address(), "me/other"))
    last = tmp_path / "notebooks" / LESSONS[-1].name
    last.write_text(last.read_text()[:-20])
    before = {path: path.read_text() for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{last}: ")):
        stamp.stamp()
    assert {path: path.read_text() for path in tmp_path.rglob("*.*")} == before


def test_links_in_readme_pages_and_lessons_lead_somewhere():
    texts = list(PAGES.items())
    texts += [
        (p, "\n".join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "markdown"))
        for p in LESSONS
    ]
    for path, text in texts:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_readme_and_pages_name_only_what_exists():
    text = "\n".join(PAGES.values())
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    blocks, inline = (
        re.findall(r"```bash\n(.*?)```", text, re.S),
        re.findall(r"`([^`\n]+)`", text),
    )
    code = "\n".join(blocks + inline)
    named = set(re.findall(r"^make ([a-z]+)", code, re.M))
    assert {"run", "test", "lab", "bench"} <= named <= targets
    commands = set(re.findall(r"python -m mslib (\w+)", code))
    assert {"run", "sweep", "reference"} <= commands
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    for name in re.findall(r"ms\.(\w+)", text):
        assert hasattr(ms, name), name
    for extra in re.findall(r"mslib\[(\w+)\]", text):
        assert extra in EXTRAS
    floors = re.findall(r"^\| `mslib/(\w+)/` \|", text, re.M)
    assert {"pruning", "penalties", "training", "data", "course"} == {*floors}
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (ROOT / "mslib" / name).exists(), name


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_stored_lesson_was_executed_whole_and_holds_what_each_should(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    # in order, from a fresh kernel
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [output for c in code for output in c.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    ignored = [c for c in code if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(ignored) <= len(code) / 2
    assert path.stat().st_size < 1_000_000
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = "\n".join(c.source for c in notebook.cells)
    for part in ("Predict first", "## Exercises", "## To take away", "**Sources:**", "<details>"):
        assert part in text, part
    # a line break that was printed as two letters
    assert not any("\\n" in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_on_colab_the_course_is_fetched_only_where_it_is_not(path, monkeypatch):
    from IPython.core.inputtransformer2 import TransformerManager

    cell = next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    fetched = []
    shell = type("Shell", (), {"system": fetched.append, "run_line_magic": lambda *_: None})
    for there in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda *_, there=there: there or None)
        with monkeypatch.context() as m:
            m.setattr(sys, "path", [*sys.path])
            exec(TransformerManager().transform_cell(cell), {"get_ipython": lambda: shell})
        assert len(fetched) == (not there)
    assert stamp.address() in fetched[0]


def test_all_lessons_are_there():
    assert [p.stem for p in LESSONS] == list(NEEDS)


def test_the_repository_is_small_and_holds_no_images_of_a_data_set():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / f for f in listed.stdout.splitlines() if (ROOT / f).is_file()]
    assert max(f.stat().st_size for f in files) < 5_000_000
    assert not any(f.suffix in (".jpg", ".gz", ".zip") for f in files)
    for reference in stamp.REFERENCE.glob("*"):
        assert sum(f.stat().st_size for f in reference.rglob("*") if f.is_file()) < 8_000_000
