"""One thread: the tensors of the tests are small, and threads that wait for each other are slow on a busy machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

TOGETHER = ("lab/13_cli",)


def pytest_collection_modifyitems(items):
    "With several workers: a notebook goes to whoever is free, a file of tests to one worker, and all that starts processes to the same one"
    for item in items:
        file = item.path.stem
        if file == "test_notebooks": group = "processes" if any(o in item.name for o in TOGETHER) else item.name
        else: group = "processes" if file in ("test_processes", "test_core_processes", "test_distributed_loss", "test_frameworks") else file
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def default_dtype():
    "Notebooks share the process; each starts from PyTorch's defaults"
    yield
    import torch
    torch.set_default_dtype(torch.float32)
