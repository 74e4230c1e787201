"""The relaxed bubble sort against AlgoVision, the original, which interprets the program line by line."""
import pytest
import torch
from torch.testing import assert_close

from newton_losses_nb.sorting.more import bubble_sort, swap_loss
from newton_losses_nb.sorting.losses import true_permutation

algovision = pytest.importorskip("algovision")

def exchange(array, i):
    order = list(range(array.shape[1]))
    order[i], order[i+1] = order[i+1], order[i]
    return array[:, order]

def original(n, beta, loop):
    "Bubble sort of AlgoVision's README, with the permutation matrix carried along and the swaps counted"
    from algovision import GT, Algorithm, For, If, Input, IsTrue, Let, LetInt, Output, Var, VarInt, While
    inner = For("i", "m",
        Let("a", lambda array, i: array[:, i]),
        Let("b", lambda array, i: array[:, i+1]),
        If(GT("a", "b"), if_true=[
            Let("array", lambda array, i: exchange(array, i)),
            Let("P", lambda P, i: exchange(P, i)),
            Let("swapped", 1.),
            Let("swaps", lambda swaps: swaps + 1.)]))
    shorter = LetInt("m", lambda m: m - 1)
    if loop == "while": outer = While(IsTrue("swapped"), Let("swapped", 0), inner, shorter)
    else: outer = For("k", n - 1, inner, shorter)
    zero = torch.tensor(0., dtype=torch.float64)
    return Algorithm(
        Input("array"), Var("a", zero), Var("b", zero), Var("swapped", zero + 1), Var("swaps", zero),
        Var("P", torch.eye(n, dtype=torch.float64)), VarInt("m", n - 1), outer,
        Output("array"), Output("P"), Output("swaps"), beta=beta, epsilon=0.)

@pytest.mark.parametrize("loop", ["for", "while"])
@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("beta", [0.7, 5., 30.])
def test_values_and_gradients(n, beta, loop):
    torch.manual_seed(n)
    s = torch.randn(8, n, dtype=torch.float64, requires_grad=True)
    array, P, swaps = original(n, beta, loop)(s)
    ours, eye = bubble_sort(s, beta, loop), torch.eye(n, dtype=torch.float64).expand(8, n, n)
    assert_close(ours, P, atol=1e-10, rtol=1e-10)
    assert_close(swap_loss(s, eye, beta, loop), swaps, atol=1e-10, rtol=1e-10)
    assert_close((ours @ s[..., None])[..., 0], array, atol=1e-10, rtol=1e-10)
    grad = lambda f: torch.autograd.grad(f, s, retain_graph=True)[0]
    w = torch.randn(8, n, n, dtype=torch.float64)
    assert_close(grad((w*ours).sum()), grad((w*P).sum()), atol=1e-9, rtol=1e-9)
    assert_close(grad(swap_loss(s, eye, beta, loop).sum()), grad(swaps.sum()), atol=1e-9, rtol=1e-9)

def test_supervision_by_the_number_of_swaps():
    "AlgoVision's training script hands over the scores in the order of their labels"
    torch.manual_seed(0)
    s, labels = torch.randn(2, 8, 5, dtype=torch.float64)
    ordered = s.gather(-1, labels.argsort(-1))
    for loop in ("for", "while"):
        swaps = original(5, 8., loop)(ordered)[2]
        assert_close(swap_loss(s, true_permutation(labels), 8., loop), swaps, atol=1e-10, rtol=1e-10)
