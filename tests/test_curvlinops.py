"""Curvature against curvlinops, which builds it as a linear operator over a model's parameters."""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from newton_losses_nb.core.derivatives import derivatives

curvlinops = pytest.importorskip("curvlinops")

class Outputs(nn.Module):
    "A model whose only parameters are the outputs of one sample: its parameter Hessian is the output Hessian"
    def __init__(self, y):
        super().__init__()
        self.y = nn.Parameter(y.clone())
    def forward(self, x): return x @ torch.ones(1, 1, dtype=x.dtype)*0 + self.y

def test_mean_hessian_and_fisher():
    torch.manual_seed(0)
    y, t = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    loss_fn = lambda y, t: nn.functional.cross_entropy(y, t, reduction="none")
    H, F, eye = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    for yi, ti in zip(y, t):
        model, data = Outputs(yi), [(torch.ones(1, 1, dtype=torch.float64), ti[None])]
        args = model, nn.CrossEntropyLoss(), list(model.parameters()), data
        H += curvlinops.HessianLinearOperator(*args, check_deterministic=False) @ eye / 6
        F += curvlinops.EFLinearOperator(*args, check_deterministic=False) @ eye / 6
    _, ours, second = derivatives(loss_fn, y, t, second="full")
    assert_close(second.mean(0), H)
    assert_close(ours.T @ ours/6, F)
