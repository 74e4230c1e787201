"usage: bench_paths.py [exact] [relaxed] [fy]: ratios peer/ours, one thread, float32"
import sys, warnings; warnings.filterwarnings("ignore")
exec(open('/tmp/sp/base.py').read())
from newton_losses_nb.shortest_path import *
from newton_losses_nb.smoothing import *
from peers_paths import *
what = sys.argv[1:] or ["exact", "relaxed", "fy"]
torch.manual_seed(0)
if "exact" in what:
    for B in (200, 2100):
        c = torch.rand(B,12,12)*9+1
        few = c[:200]; n=B/200
        ours = shortest_path(c)
        for f in (scipy_paths, scipy_paths_csr, heap_paths, rustworkx_paths): assert torch.equal(f(few), ours[:200]), f
        assert torch.equal(numba_paths(c), ours)
        only = scipy_dijkstra_only(few); rx = RustworkxPaths(12,12)
        for name, f, k in (("scipy rebuilt", lambda: scipy_paths(few), n), ("scipy csr", lambda: scipy_paths_csr(few), n), ("scipy dijkstra only", only, n),
                        ("rustworkx", lambda: rx(few), n), ("numba batch", lambda: numba_paths(c), 1)):
            a = ratio(lambda: shortest_path(c), f)
            print(f"exact {B} vs {name:22} ours {a[0]:8.3f} peer {a[1]*k:8.3f} ratio {a[2]*k:6.2f}", flush=True)
if "relaxed" in what:
    c = torch.rand(70,12,12)+0.2
    w = torch.randn(70,12,12)
    for loop in ("for", "while"):
        peer = algovision_paths(10., 24, loop)
        ours = lambda c: relaxed_bellman_ford(c, 10., 24, loop)
        cs=[c.clone().requires_grad_() for _ in range(2)]
        o=[f(x) for f,x in zip((ours,peer),cs)]; [(a*w).sum().backward() for a in o]
        print("  diff", float((o[0]-o[1]).abs().max()), float((cs[0].grad-cs[1].grad).abs().max()), float(cs[0].grad.abs().max()))
        show(f"relaxed {loop} fwd", lambda: ours(c), lambda: peer(c), 9, 1.)
        show(f"relaxed {loop} f+b", fb(ours, c), fb(peer, c), 9, 1.)
if "fy" in what:
    y = torch.rand(70,144)*4+0.5; t = shortest_path(torch.rand(70,12,12)+.1).flatten(1)
    solver = lambda c: shortest_path(c.unflatten(-1,(12,12))).flatten(1)
    for S in (3,10,30):
        peer = PyepoFenchelYoung(S); noise = peer.noise(y)
        ys=[y.clone().requires_grad_() for _ in range(2)]
        a = FenchelYoungLoss(lambda c: solver(c.clamp(min=1e-3)), S, noise=noise)(ys[0], t); b = peer(ys[1], t); a.sum().backward(); b.sum().backward()
        print("  grad diff", float((ys[0].grad-ys[1].grad).abs().max()))
        ours = FenchelYoungLoss(solver, S, floor=1e-3)
        show(f"FY S={S} f+b", fb(lambda y: ours(y,t), y), fb(lambda y: peer(y,t), y), 9, .5)
        show(f"FY S={S} derivatives", lambda: ours.derivatives(y,t,hessian=False), fb(lambda y: peer(y,t), y), 9, .5)
