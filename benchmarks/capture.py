"""What a CUDA graph captures of the solves that the core needs, each in a process of its own.

    python benchmarks/capture.py

A refused capture can spoil a process, so each operation has its own. One line each:
library, operation, dtype, "captured" (and replayed with new numbers: the same as without), or
why not.
"""
import subprocess
import sys

import torch

LIBRARIES = ("default", "cusolver", "magma")
OPERATIONS = {
    "eigh": lambda C, B: torch.linalg.eigh(C)[0],
    "qr": lambda C, B: torch.linalg.qr(C)[1].abs(),
    "cholesky_ex": lambda C, B: torch.linalg.cholesky_ex(C)[0],
    "solve_triangular": lambda C, B: torch.linalg.solve_triangular(C.triu(), B, upper=True),
    "solve_ex": lambda C, B: torch.linalg.solve_ex(C, B)[0]}

def numbers(m, dtype, device):
    "Eight positive matrices and right sides"
    C = torch.randn(8, m, m, device=device, dtype=dtype)
    return C @ C.mT + torch.eye(m, device=device, dtype=dtype), torch.randn(8, m, 50, device=device, dtype=dtype)

def captured(f, m, dtype):
    "Capture, replay with new numbers, compare"
    C, B = numbers(m, dtype, "cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream): [f(C, B) for _ in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream): out = f(C, B)
    for old, new in zip((C, B), numbers(m, dtype, "cuda")): old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, f(C, B), rtol=1e-3, atol=1e-3)

def one(library, name):
    torch.backends.cuda.preferred_linalg_library(library)
    for m, dtype in ((5, torch.float32), (5, torch.float64), (144, torch.float32)):
        try: captured(OPERATIONS[name], m, dtype)
        except Exception as e: said = f"refused: {str(e).splitlines()[0][:100]}"
        else: said = "captured"
        print(f"{library:9}{name:18}{m:4} {str(dtype):14} {said}", flush=True)
        if said != "captured": return

if __name__ == "__main__":
    if len(sys.argv) == 3: one(*sys.argv[1:])
    elif not torch.cuda.is_available(): sys.exit("capture.py: PyTorch finds no GPU")
    else:
        for library in LIBRARIES:
            for name in OPERATIONS: subprocess.run([sys.executable, __file__, library, name], timeout=60)
