"""What a reader meets before the first cell: README, environments, badges, the stored notebooks."""

import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

import mslib as ms
from mslib.course.cli import main
from mslib.course.stages import NEEDS, REFERENCE
from mslib.files import ROOT, read_json
from tools import stamp

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def requirements(path):
    listed = yaml.safe_load((ROOT / path).read_text())["dependencies"]
    pip = next((d["pip"] for d in listed if isinstance(d, dict)), [])
    return {
        re.split(r"[ <>=]", d)[0]: re.sub(r"^[\w-]+ ?", "", d) for d in listed if isinstance(d, str)
    }, pip


@pytest.mark.parametrize("path", ["environment.yml", "binder/environment.yml"])
def test_conda_environments_hold_what_pyproject_asks_for(path):
    conda, pip = requirements(path)
    conda = {
        {"pytorch": "torch", "pytorch-cpu": "torch"}.get(n, n) + version
        for n, version in conda.items()
    }
    if path == "environment.yml":
        wanted = {d for d in PROJECT["dependencies"] if d != "pandas"} | {
            *PROJECT["optional-dependencies"]["test"]
        }
        assert wanted <= conda | {*pip} and "-e ." in pip
    else:
        assert {*PROJECT["dependencies"]} <= conda
        assert any(re.fullmatch(r"python=3\.\d+", d) for d in conda), (
            "repo2docker understands no range of versions"
        )


def test_binder_installs_the_course():
    script = ROOT / "binder" / "postBuild"
    assert script.stat().st_mode & 0o111 and "-e ." in script.read_text()


def places(root):
    """(file, "owner/name") for every badge, clone command and link to the repository in README and lessons."""
    for path in (root / "README.md", *sorted((root / "notebooks").glob("*.ipynb"))):
        for found in re.finditer(stamp.PLACES, path.read_text()):
            yield path, found.group(0).removeprefix(found.group(1))


def test_every_badge_and_link_has_the_address_of_pyproject():
    found = list(places(ROOT))
    assert {path.name for path, _ in found} == {"README.md", *(p.name for p in LESSONS)}
    assert {where for _, where in found} == {stamp.address()}


@pytest.mark.parametrize("name", stamp.MADE)
def test_readme_shows_what_was_measured(name):
    shown = next(m.group(3) for m in stamp.SECTION.finditer(README) if m.group(2) == name)
    assert shown == stamp.MADE[name](), "run `python -m mslib stamp`"
    for link in re.findall(r"\]\(([^)]+)\)", shown):
        assert (ROOT / link).exists(), link


def test_readme_says_in_words_what_was_measured():
    """The points of "The result" follow from the reference run."""
    top = ms.scoreboard(ms.reference().values()).set_index("network")["top-1 %"]
    dense, scratch = top["dense, trained on as long"], top["scratch: same architecture"]

    def behind(control, *names):
        points = sorted(control - top[f"{name}: fine-tuned"] for name in names)
        return f"{points[0]:.2f} to {points[-1]:.2f}"

    cut = {
        name: top[f"{name}: before the cut"] - top[f"{name}: after the cut, folded"]
        for name in ("masked", "global")
    }
    flow = [
        n.removesuffix(": fine-tuned")
        for n in top.index
        if n.startswith("feature flow") and n.endswith("fine-tuned")
    ]
    for words in (
        f"costs {cut['masked']:.2f} points of test top-1 after the masked penalty, and {cut['global']:.0f} after the global one",
        f"{behind(dense, 'global', 'masked')} points behind the dense network trained on for as long, "
        f"{behind(scratch, 'global', 'masked')} behind the same small one trained from scratch",
        f"end {behind(dense, 'GReg-1', 'GReg-2')} points behind the dense network",
        f"ends {behind(dense, *flow)} points behind",
    ):
        assert words in README, words


def test_readme_says_in_words_how_the_methods_compare():
    table = pd.read_csv(REFERENCE / "comparison-cifar10.csv")
    top = (
        table.pivot(index=["reduction", "seed"], columns="method", values="top1")
        .groupby("reduction")
        .mean()
    )
    ahead = top.drop(columns="scratch").sub(top.scratch, axis=0)
    half, more, over_all = ahead.loc[0.5], ahead.loc[0.7], ["masked", "global", "l1-norm"]
    alike = ["uniform", "random", "greg-1", "greg-2", "flow"]
    lost = (
        table[table.reduction == 0.5]
        .assign(lost=lambda t: t.before - t.folded)
        .groupby("method")
        .lost.mean()
        .drop("scratch")
    )
    aimed = ["masked", "greg-1", "greg-2"]
    for words in (
        f"leads, by {-half.uniform:.2f} points over *uniform*",
        f"by {-half.drop('uniform').max():.2f} to {-half.min():.2f} over the others",
        f"{-more[alike].min():.2f} points behind to {more[alike].max():.2f} ahead",
        "*masked*, *global* and *l1-norm* end {:.2f}, {:.2f} and {:.2f} behind".format(
            *-more[over_all]
        ),
        f"they lose {lost[aimed].max():.1f} points at most, the others {lost.drop(aimed).min():.0f} to {lost.max():.0f}.",
    ):
        assert words in README, words
    assert more.nsmallest(3).index.tolist() == over_all[::-1]


def test_lesson_08_says_in_words_what_its_tables_say():
    """What the prose of lesson 08 adds to the tables printed in it."""
    text = "\n".join(
        c.source for c in nbformat.read(ROOT / "notebooks" / "08_method_comparison.ipynb", 4).cells
    )
    table = pd.read_csv(REFERENCE / "comparison-cifar10.csv")
    half, wide = (
        table[table.reduction == 0.5],
        table.pivot(index=["reduction", "seed"], columns="method", values="top1"),
    )
    kept = {row.method: [] for row in half.itertuples()}  # method -> a list of layers a seed
    for row in half.sort_values("seed").itertuples():
        kept[row.method].append([np.array(list(layer)) == "1" for layer in row.kept.split()])

    def above_chance(a, b):
        """How much more the masks of two methods share than lots of the same share of each layer would."""
        gaps = []
        for one, other in zip(kept[a], kept[b]):
            x, y, by_lot = (
                np.concatenate(one),
                np.concatenate(other),
                sum(len(p) * p.mean() * q.mean() for p, q in zip(one, other)),
            )
            gaps.append((x & y).sum() / (x | y).sum() - by_lot / (x.sum() + y.sum() - by_lot))
        return np.mean(gaps)

    pairs = [
        above_chance(a, b)
        for a, b in itertools.combinations(("uniform", "flow", "global", "l1-norm"), 2)
    ]
    same = [
        (np.concatenate(g) & np.concatenate(u)).sum() / np.concatenate(u).sum()
        for g, u in zip(kept["greg-2"], kept["uniform"])
    ]
    grown, aimed = (
        wide[a].sub(wide[b]).groupby("reduction").agg(["mean", "std"])
        for a, b in (("uniform", "greg-1"), ("masked", "global"))
    )
    p = [
        stats.ttest_1samp((wide[m] - wide.uniform).loc[0.7], 0).pvalue
        for m in ("global", "l1-norm")
    ]
    final = table[~table.method.isin(["scratch", "l1-norm"])].groupby("reduction").final
    lead = (
        wide.scratch.loc[0.5]
        - pd.read_csv(REFERENCE / "learning-rate-cifar10.csv")
        .query("finetune_lr == 0.05")
        .set_index("seed")
        .top1
    )
    uniform, control = wide.uniform.loc[0.7], pd.read_csv(REFERENCE / "control-cifar10.csv").top1
    level, gap = (
        f"{control.mean():.2f} ± {control.std():.2f} %",
        f"{control.mean() - uniform.mean():.2f} points ahead of *uniform*",
    )
    assert control.min() > wide.loc[0.7].max(axis=None) and f"{level}, {gap}" in README
    assert round(control.mean() - wide.scratch.loc[0.7].mean()) == 2
    for words in (
        f"{level}, two points above the first control, {gap}, whose architecture it is (Welch's p = {stats.ttest_ind(control, uniform, equal_var=False).pvalue:.3f})",
        f"share {min(pairs):.2f} to {max(pairs):.2f} more than lots",
        f"keeps {np.mean(same):.0%} of what".replace("%", " %"),
        "Growing L2 ends {:.2f} ± {:.2f} and {:.2f} ± {:.2f} points behind".format(
            *grown.to_numpy().ravel()
        ),
        "is worth {:+.2f} ± {:.2f} and {:+.2f} ± {:.2f} points in the end".format(
            *aimed.to_numpy().ravel()
        ),
        f"paired p = {p[0]:.3f} and {p[1]:.3f}, uncorrected",
        "stand within {:.1f} points (at 70 % less, {:.1f})".format(*(final.max() - final.min())),
        f"lead of {lead.mean():.2f} ± {lead.std():.2f} has p = {stats.ttest_1samp(lead, 0).pvalue:.3f}",
    ):
        assert words in text, words
    assert (wide.uniform > wide["greg-1"]).all() and wide[["global", "masked"]].lt(
        wide.scratch, axis=0
    ).all(axis=None)


def test_readme_and_lesson_04_say_in_words_what_was_timed():
    rows = read_json(REFERENCE / "bench.json")["rows"]
    ours = {row["what"]: row["ours"] for row in rows}
    share = {row["what"]: row["ratio"] for row in rows}
    pruned = "pruned ResNet-{} ({}), compiled, batch 128".format
    inner, both, eights = (
        pruned(56, cut)
        for cut in (
            "inner channels",
            "inner and residual channels",
            "inner and residual channels in multiples of 8",
        )
    )
    wide = [v for k, v in share.items() if k.startswith("pruned ResNet-50")]
    assert (
        abs(ours[inner] / ours[both] - 1) < 0.03
        and round(share[eights] / share[both] - 1, 1) == 0.1
    )
    assert len(wide) == 2 and all(round(v, 1) == 0.8 for v in wide)
    lesson = (ROOT / "notebooks" / "04_pruning.ipynb").read_text(encoding="utf-8")
    for text, words in (
        (README, "multiples of eight is worth a tenth"),
        (README, "comes to four fifths of the promise"),
        (lesson, "the two networks are level, and multiples of eight are worth a tenth"),
        (lesson, "comes to four fifths of the promise"),
    ):
        assert words in text, words


def test_stamp_changes_the_address_everywhere(tmp_path, monkeypatch):
    for path in (ROOT / "README.md", ROOT / "pyproject.toml", *LESSONS):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        target.write_text(
            path.read_text().replace(
                'Repository = "https://github.com/' + stamp.address(),
                'Repository = "https://github.com/me/my.course',
            )
        )
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    before = len(list(places(tmp_path)))
    assert len(stamp.stamp()) == 1 + len(LESSONS) and stamp.stamp() == []
    after = list(places(tmp_path))
    assert len(after) == before and {where for _, where in after} == {"me/my.course"}
    for path in (tmp_path / "notebooks").iterdir():
        nbformat.validate(nbformat.read(path, 4))


def test_links_in_readme_and_lessons_lead_somewhere():
    texts = [(ROOT / "README.md", README)]
    texts += [
        (p, "\n".join(c.source for c in nbformat.read(p, 4).cells if c.cell_type == "markdown"))
        for p in LESSONS
    ]
    for path, text in texts:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_readme_names_only_make_targets_and_commands_that_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    code = "\n".join(
        re.findall(r"```bash\n(.*?)```", README, re.S) + re.findall(r"`([^`\n]+)`", README)
    )
    assert (
        {"run", "test", "lab", "bench"} <= set(re.findall(r"^make ([a-z]+)", code, re.M)) <= targets
    )
    commands = set(re.findall(r"python -m mslib (\w+)", code))
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    assert {"run", "sweep", "reference"} <= commands
    for name in re.findall(r"ms\.(\w+)", README):
        assert hasattr(ms, name), name
    for module in re.findall(r"^\| (`\w+`(?: · `\w+`)+) \|", README, re.M):
        for name in re.findall(r"`(\w+)`", module):
            assert (ROOT / "mslib" / f"{name}.py").exists(), name


def test_readme_recipe_runs(tmp_path, monkeypatch):
    """The ten lines of the README, as they stand, on a small archive."""
    import shutil

    from PIL import Image

    from mslib.data.shapes import CLASSES, draw_shapes

    for split, n, seed in (("train", 600, 1), ("test", 40, 2)):
        for i, (image, label) in enumerate(zip(*draw_shapes(n, 16, seed))):
            folder = tmp_path / "images" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    shutil.make_archive(str(tmp_path / "my_images"), "zip", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mslib.data.sources.ROOT", tmp_path)
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "my_images.zip" in c)
    exec(compile(code, "README.md", "exec"), found := {})
    assert (tmp_path / "small.pt").exists() and (tmp_path / "small.onnx").exists()
    assert (
        ms.cost(found["small"], found["data"].example).macs
        <= 0.5 * ms.cost(found["model"], found["data"].example).macs
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_stored_lessons(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), (
        "executed in order, from a fresh kernel"
    )
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    ignored = [c for c in code if "NBVAL_IGNORE_OUTPUT" in c.source]
    assert len(ignored) <= len(code) / 2
    assert path.stat().st_size < 1_000_000
    assert sum(len(c.source.splitlines()) for c in code) <= 120
    words = sum(len(c.source.split()) for c in notebook.cells if c.cell_type == "markdown")
    assert 600 <= words <= 1800
    assert sum("image/png" in o.get("data", {}) for c in code for o in c.outputs) >= 2
    text = "\n".join(c.source for c in notebook.cells)
    for part in ("Predict first", "## Exercises", "## To take away", "**Sources:**"):
        assert part in text, part
    assert text.count("<details>") == 2
    assert not any("\\n" in o.get("text", "") for c in code for o in c.outputs), (
        "a line break that was printed as two letters"
    )


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
    for reference in REFERENCE.glob("*"):
        assert sum(f.stat().st_size for f in reference.rglob("*") if f.is_file()) < 8_000_000
