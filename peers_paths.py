"""Peers of the path operations, each as a small function: same input, same result as ours. For notebook 22_speed.

Needs scipy, rustworkx, algovision, pyepo; numba (with llvmlite) for the compiled single-map solver.
"""
import heapq

import numba
import numpy as np
import rustworkx
import scipy.sparse
import torch
from algovision import Algorithm, For, Input, Let, Output, Var, While
from algovision.conditions import LEq
from pyepo.func import perturbedFenchelYoung
from pyepo.model.opt import optModel
from scipy.sparse.csgraph import dijkstra

W8 = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)


def grid_edges(H, W):
    "Edges of a grid of eight neighbours in CSR form: where each row starts, ends of the edges, starts of the edges"
    cells, u, v = np.arange(H*W).reshape(H, W), [], []
    for i, j in W8:
        a = cells[max(-i, 0):H - max(i, 0), max(-j, 0):W - max(j, 0)].ravel()
        u.append(a); v.append(a + i*W + j)
    u, v = np.concatenate(u), np.concatenate(v)
    order = np.lexsort((v, u))
    u, v = u[order].astype(np.int32), v[order].astype(np.int32)
    return np.searchsorted(u, np.arange(H*W + 1)).astype(np.int32), v, u


def _walk_back(before, n):
    path, at = np.zeros(n), n - 1
    while at >= 0: path[at], at = 1, before[at]
    return path


def scipy_paths(cost):
    "csgraph.dijkstra map by map: the graph rebuilt from COO for each map, and the walk back; `(B, H, W)` tensor to the same"
    B, H, W = cost.shape
    _, v, u = grid_edges(H, W)
    out = np.empty((B, H*W))
    for k, c in enumerate(cost.numpy().reshape(B, H*W)):
        graph = scipy.sparse.csr_array((c[v], (u, v)), shape=(H*W, H*W))
        before = dijkstra(graph, indices=0, return_predecessors=True)[1]
        out[k] = _walk_back(before, H*W)
    return torch.from_numpy(out).to(cost.dtype).reshape(cost.shape)


def scipy_paths_csr(cost):
    "The same, the structure of the graph computed once: only a csr_array from (data, indices, indptr) is built for each map"
    B, H, W = cost.shape
    ptr, v, _ = grid_edges(H, W)
    out = np.empty((B, H*W))
    for k, c in enumerate(cost.numpy().reshape(B, H*W)):
        graph = scipy.sparse.csr_array((c[v], v, ptr), shape=(H*W, H*W))
        before = dijkstra(graph, indices=0, return_predecessors=True)[1]
        out[k] = _walk_back(before, H*W)
    return torch.from_numpy(out).to(cost.dtype).reshape(cost.shape)


class ScipyDijkstraOnly:
    "csgraph.dijkstra alone on graphs that are built beforehand, without the walk back: `solver = ScipyDijkstraOnly(cost); solver()`"
    def __init__(self, cost):
        B, H, W = cost.shape
        ptr, v, _ = grid_edges(H, W)
        self.graphs = [scipy.sparse.csr_array((c[v].astype(np.float64), v, ptr), shape=(H*W, H*W)) for c in cost.numpy().reshape(B, H*W)]
    def __call__(self): return [dijkstra(g, indices=0, return_predecessors=True)[1] for g in self.graphs]

def scipy_dijkstra_only(cost): return ScipyDijkstraOnly(cost)


class RustworkxPaths:
    "rustworkx.dijkstra_shortest_paths on one graph whose weights are looked up in the map"
    def __init__(self, H, W):
        _, v, u = grid_edges(H, W)
        self.graph = rustworkx.PyDiGraph()
        self.graph.add_nodes_from(range(H*W))
        self.graph.add_edges_from([(int(a), int(b), int(b)) for a, b in zip(u, v)])
    def __call__(self, cost):
        B, H, W = cost.shape
        out = torch.zeros(B, H*W, dtype=cost.dtype)
        for k, c in enumerate(cost.flatten(1).tolist()):
            path = rustworkx.dijkstra_shortest_paths(self.graph, 0, target=H*W - 1, weight_fn=c.__getitem__)[H*W - 1]
            out[k, list(path)] = 1
        return out.reshape(cost.shape)

def rustworkx_paths(cost): return RustworkxPaths(*cost.shape[1:])(cost)


def heap_paths(cost):
    "Dijkstra with a heap in plain Python, map by map, as in the original repositories"
    B, H, W = cost.shape
    out = torch.zeros_like(cost)
    near = [[(a, b) for a in range(max(i - 1, 0), min(i + 2, H)) for b in range(max(j - 1, 0), min(j + 2, W)) if (a, b) != (i, j)]
            for i in range(H) for j in range(W)]
    for k, c in enumerate(cost.tolist()):
        done, queue = {}, [(c[0][0], 0, 0, None)]
        while queue:
            d, i, j, before = heapq.heappop(queue)
            if (i, j) in done: continue
            done[i, j] = before
            if (i, j) == (H - 1, W - 1): break
            for a, b in near[i*W + j]:
                if (a, b) not in done: heapq.heappush(queue, (d + c[a][b], a, b, (i, j)))
        at = (H - 1, W - 1)
        while at is not None: out[k, at[0], at[1]] = 1; at = done[at]
    return out


@numba.njit(cache=False)
def numba_solve(cost, path):
    "One map: Gauss-Seidel sweeps in four directions until nothing changes, walk back to the first nearest neighbour"
    H, W = cost.shape
    d = np.full((H + 2, W + 2), np.inf, cost.dtype)
    d[1, 1] = cost[0, 0]
    moved, turn = True, 0
    while moved or turn % 2:
        moved = False
        for a in range(H):
            i = a if turn % 2 == 0 else H - 1 - a
            for b in range(W):
                j = b if turn % 2 == 0 else W - 1 - b
                if i == 0 and j == 0: continue
                m = min(min(min(d[i, j], d[i, j+1]), min(d[i, j+2], d[i+1, j])), min(min(d[i+1, j+2], d[i+2, j]), min(d[i+2, j+1], d[i+2, j+2])))
                m += cost[i, j]
                if m < d[i+1, j+1]: d[i+1, j+1] = m; moved = True
        turn += 1
    path[:] = 0
    i, j = H - 1, W - 1
    path[i*W + j] = 1
    for _ in range(H*W):
        if i == 0 and j == 0: break
        best, p, q = np.inf, 0, 0
        for a in range(-1, 2):
            for b in range(-1, 2):
                if (a or b) and d[i+1+a, j+1+b] < best: best, p, q = d[i+1+a, j+1+b], a, b
        i += p; j += q
        path[i*W + j] = 1


@numba.njit(cache=False)
def numba_dijkstra(cost, path):
    "One map: Dijkstra with a binary heap, compiled"
    H, W = cost.shape
    d = np.full(H*W, np.inf); before = np.full(H*W, -1); done = np.zeros(H*W, np.bool_)
    d[0] = cost[0, 0]
    heap = [(d[0], 0)]
    while len(heap):
        x, u = heapq.heappop(heap)
        if done[u]: continue
        done[u] = True
        if u == H*W - 1: break
        i, j = u//W, u % W
        for a in range(max(i - 1, 0), min(i + 2, H)):
            for b in range(max(j - 1, 0), min(j + 2, W)):
                v = a*W + b
                if not done[v] and x + cost[a, b] < d[v]:
                    d[v] = x + cost[a, b]; before[v] = u
                    heapq.heappush(heap, (d[v], v))
    path[:] = 0
    u = H*W - 1
    while u >= 0: path[u] = 1; u = before[u]


@numba.njit
def _numba_batch(cost, out):
    for k in range(len(cost)): numba_solve(cost[k], out[k])

def numba_paths(cost):
    "The compiled single-map solver in a compiled loop over maps: no overhead of Python at all"
    B, H, W = cost.shape
    out = np.empty((B, H*W), cost.numpy().dtype)
    _numba_batch(cost.numpy(), out)
    return torch.from_numpy(out).reshape(cost.shape)


class CompiledGrid(optModel):
    "The compiled single-map solver behind PyEPO's interface; costs below 1e-3 are raised to it"
    def __init__(self, H=12, W=12, heap=False):
        self.shape, self.path, self.heap = (H, W), np.zeros(H*W), heap
        super().__init__()
    num_cost = property(lambda self: self.shape[0]*self.shape[1])
    def _getModel(self): return None, list(range(self.shape[0]*self.shape[1]))
    def setObj(self, c): self.c = np.maximum(np.asarray(c), 1e-3)
    def solve(self):
        path = np.empty(self.c.size, self.c.dtype)
        (numba_dijkstra if self.heap else numba_solve)(self.c.reshape(self.shape), path)
        return path, float(path @ self.c)


class PyepoFenchelYoung:
    "PyEPO's perturbed Fenchel-Young loss with the compiled solver; the noise is fixed by its seed, `noise(y)` gives it to ours"
    def __init__(self, n_samples, sigma=1., grid=(12, 12), seed=135, heap=False):
        self.n_samples, self.seed = n_samples, seed
        self.model = CompiledGrid(*grid, heap=heap)
        self.sigma = sigma
        self.loss = perturbedFenchelYoung(self.model, n_samples, sigma, seed=seed, reduction="none")
    def noise(self, y):
        return torch.randn(len(y), self.n_samples, y.shape[1], dtype=y.dtype, generator=torch.Generator().manual_seed(self.seed))
    def __call__(self, y, w_true): return self.loss(y, w_true)
    def fresh(self):
        "The same with its generator at the start, for comparing results"
        return PyepoFenchelYoung(self.n_samples, self.sigma, self.model.shape, self.seed, self.model.heap)


def algovision_paths(beta, n_iter, loop="for", t_conorm="probabilistic", q=5., **kwargs):
    "Relaxed Bellman-Ford as a program for the algovision package; made under the default dtype it is to run with"
    INF = 1e12
    def sweep(d, cost):
        H, W = cost.shape[1:]
        u = torch.stack([d[:, 1+i:1+i+H, 1+j:1+j+W] for i, j in W8], -1)
        pi = (-beta*u).softmax(-1)
        return torch.nn.functional.pad((pi*u).sum(-1) + cost, (1, 1, 1, 1), value=INF), pi
    def flow(at, pi):
        moved, new = at[..., None]*pi, torch.zeros_like(torch.nn.functional.pad(at, (1, 1, 1, 1)))
        for k, (i, j) in enumerate(W8): new = new + torch.nn.functional.pad(moved[..., k], (1 + j, 1 - j, 1 + i, 1 - i))
        return new[:, 1:-1, 1:-1]
    joins = {"probabilistic": lambda tracked, at: tracked + at - tracked*at,
             "hamacher": lambda tracked, at: (tracked + at + (q - 2)*tracked*at)/(1 + (q - 1)*tracked*at),
             "yager": lambda tracked, at: (tracked + at).clamp(max=1)}
    body = Let("tracked", joins[t_conorm]), Let("at", flow)
    end = For("k", n_iter, *body) if loop == "for" else While(LEq(lambda tracked: tracked[:, 0, 0], 1.), *body)
    return Algorithm(
        Input("cost"),
        Var("d", lambda cost: torch.full((cost.shape[1] + 2, cost.shape[2] + 2), INF)), Var("pi", lambda cost: torch.zeros(*cost.shape[1:], 8)),
        Var("at", lambda cost: torch.zeros(cost.shape[1:])), Var("tracked", lambda cost: torch.zeros(cost.shape[1:])),
        Let("d", [1, 1], 0.), Let("at", [-1, -1], 1.),
        For("i", n_iter, Let(["d", "pi"], sweep), Let("d", [1, 1], 0.)), end,
        Output("tracked"), beta=beta, **kwargs)
