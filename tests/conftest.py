"""For all tests: one BLAS thread, warnings are errors, the markers `slow` and `gpu`."""
import os
import sys
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")            # small products: threads only cost time
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import pytest                                   # noqa: E402
from hypothesis import settings                 # noqa: E402

settings.register_profile("default", deadline=None, derandomize=True, max_examples=30)
settings.register_profile("slow", deadline=None, max_examples=100)      # drawn anew every time


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true",
                     help="run the tests marked slow as well, and draw all examples anew")
    parser.addoption("--backwards", action="store_true", help="run the tests in reverse order")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # An older matplotlib beside a newer pyparsing warns, of nothing that is ours.
    config.addinivalue_line("filterwarnings", "ignore:.*deprecated.{1,3}use .*:DeprecationWarning")
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")
    config.addinivalue_line("markers", "gpu: needs CuPy and a GPU")
    settings.load_profile("slow" if config.getoption("--slow") else "default")


def pytest_collection_modifyitems(config, items):
    import tinyddpm
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
        if "gpu" in item.keywords and tinyddpm.xp.__name__ != "cupy":
            item.add_marker(pytest.mark.skip(reason="CuPy found no usable GPU here"))
    if config.getoption("--backwards"):
        items.reverse()
