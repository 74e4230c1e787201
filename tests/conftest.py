"""One thread: the tensors of the tests are small, and threads that wait for each other are slow on a busy machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def default_dtype():
    "Notebooks share the process; each starts from PyTorch's defaults"
    yield
    import torch
    torch.set_default_dtype(torch.float32)
