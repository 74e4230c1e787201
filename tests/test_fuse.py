"""Derivatives fused by torch.compile are the plain ones."""
import shutil
import sys

import pytest
import torch
from torch.testing import assert_close

from newton_losses_nb.core.derivatives import derivatives
from newton_losses_nb.sorting.relaxations import true_permutation
from newton_losses_nb.sorting.losses import SortingLoss

compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")

@pytest.mark.skipif(compiler is None or sys.platform == "win32", reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("relaxation, kind, n", [("neural_sort", "bce", 5), ("soft_sort", "cross_entropy", 12)])
def test_fused(relaxation, kind, n):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(20, n, dtype=torch.float64, generator=generator)
    s, T = draw(), true_permutation(draw(), torch.float64)
    s[0] = 0; s[1, 0] = 1e4                                     # ties, and a score far off
    plain, fused = (derivatives(SortingLoss(relaxation, kind, tau=0.8, fuse=f), s, T, second="full") for f in (False, True))
    for a, b in zip(plain, fused): assert_close(a, b, rtol=1e-10, atol=1e-10)
