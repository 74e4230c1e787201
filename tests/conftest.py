"""One thread: the tensors of the tests are small, and threads that wait for each other are slow on a busy machine."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
