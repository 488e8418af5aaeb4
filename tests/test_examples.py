"""The gallery: each example names its source, is on the gallery's page, and has tests of what
it claims, in test_example_NAME.py."""
import ast
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "gallery")


@pytest.mark.parametrize("name", NAMES)
def test_an_example_has_a_source_a_place_in_the_gallery_and_tests(name):
    doc = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    assert re.search(r"\d{4}\.\d{5}", doc) or name == "data_parallel"       # an arXiv number
    assert f"({name}.py)" in (EXAMPLES / "README.md").read_text()
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_example_*.py")]
    assert any(re.search(rf"^(import|from) {name}\b", text, re.M) for text in tests)
