"""One thread: the tensors of the tests are small, and threads that wait for each other are slow on a busy machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

PROCESSES = ("test_processes", "test_core_processes", "test_distributed_loss", "test_frameworks")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "With several workers: a notebook goes to whoever is free, a file of tests to one worker, and all that starts processes to the same one"
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = Path(nodeid.partition("::")[0]).stem
            if file in PROCESSES or "test_nb[lab/13_cli]" in nodeid: return "processes"
            return nodeid if file == "test_notebooks" else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def default_dtype():
    "Notebooks share the process; each starts from PyTorch's defaults"
    yield
    import torch
    torch.set_default_dtype(torch.float32)
