"""The page is a process of its own."""

from pathlib import Path

import pytest

import label_page
from tests.test_imports import imports

FILES = sorted(Path(label_page.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_page_imports_nothing_of_the_learner(file):
    tops = {name.split(".")[0] for name in imports(file.read_text())}
    assert not tops & {"sea_jax", "gpu_bridge", "jax", "numpy", "configs", "tests"}
