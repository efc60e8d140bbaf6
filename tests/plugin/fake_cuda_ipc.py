"""cuda_ipc over the stand-in for CUDA: a child process that is asked to serve it has the stand-in in place of a GPU.

In the test's own process nothing is replaced by the import; a fixture does it for as long as the test runs.
"""

from __future__ import annotations

import multiprocessing

import fake_cuda
from specd.transports.cuda_ipc import CudaIpc, CudaIpcClient

if multiprocessing.parent_process() is not None:
    fake_cuda.install()


class FakeCudaIpc(CudaIpc):
    """Its client reads with the first device into tensors that lie in host memory, as all do there."""

    @staticmethod
    def client(device: str) -> CudaIpcClient:
        return CudaIpc.client("cuda:0")


class FakePeerIpc(CudaIpc):
    """The same with the second device, which does not hold the ring."""

    @staticmethod
    def client(device: str) -> CudaIpcClient:
        return CudaIpc.client("cuda:1")
