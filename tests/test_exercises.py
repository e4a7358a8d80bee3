"""Exercises: the folded solutions are right, empty and wrong functions are told so."""

import json
import re

import pytest

from mslib.course import exercises
from mslib.files import ROOT

LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def solutions(path):
    """Functions in the folded solutions of a lesson: name -> source."""
    found = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "markdown" or "<details>" not in text:
            continue
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            found |= {name: block for name in re.findall(r"^def (\w+)\(", block, re.M)}
    return found


def asked(path):
    """Names of the functions that a lesson's cells check."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return re.findall(r"ms\.exercises\.check\((\w+)\)", code)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_folded_solution_passes_the_check(path):
    known = solutions(path)
    for name in asked(path):
        space = {}
        exec("import torch\nimport mslib as ms\n" + known[name], space)
        assert exercises.verdict(space[name]).startswith("Right")


def test_every_exercise_is_asked_in_one_lesson():
    assert sorted(name for path in LESSONS for name in asked(path)) == sorted(exercises._SOLUTIONS)


@pytest.mark.parametrize("name", exercises._SOLUTIONS)
def test_empty_and_wrong_functions_are_told_so(name):
    solution, cases = exercises._SOLUTIONS[name]

    def named(function):
        function.__name__ = name
        return exercises.verdict(function)

    assert named(lambda *_: None).startswith("Not yet")
    assert "raises ZeroDivisionError" in named(lambda *_: 1 / 0)
    assert named(lambda *_: "nonsense").startswith("Not quite")
    first = solution(*cases[0])
    assert named(lambda *_: first).startswith("Not quite")  # right in one case only
    with pytest.raises(ValueError, match="no exercise is called 'other'"):
        exercises.verdict(type("x", (), {"__name__": "other"})())
