"""The driver half: one CPU, no streams, nothing to launch."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    """The driver interface of Triton's interpreter."""

    @classmethod
    def is_active(cls) -> bool:
        return os.environ.get("TRITON_INTERPRET") == "1"

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("kernels are interpreted here, not compiled")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_benchmarker(self):
        raise NotImplementedError("interpreted kernels are not tuned")


InterpreterDriver.__abstractmethods__ = frozenset()  # Triton skips classes with abstract methods left; none is called
