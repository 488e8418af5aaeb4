"""For all tests: one BLAS thread, the markers `slow` and `gpu`, deterministic hypothesis."""
import os
import sys
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")            # small products: threads only cost time
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest                                   # noqa: E402
from hypothesis import settings                 # noqa: E402

settings.register_profile("tinyddpm", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("tinyddpm")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")
    config.addinivalue_line("markers", "gpu: needs CuPy and a GPU")


def pytest_collection_modifyitems(config, items):
    import tinyddpm
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
        if "gpu" in item.keywords and tinyddpm.xp.__name__ != "cupy":
            item.add_marker(pytest.mark.skip(reason="CuPy found no usable GPU here"))
