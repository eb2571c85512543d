"""The compiler half: none of it is called when kernels are interpreted."""

# pyright: reportMissingImports=false

from __future__ import annotations

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpreterBackend(BaseBackend):
    """A backend that compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError("kernels are interpreted here, not compiled")

    def add_stages(self, stages: dict, options: object, language: object = None) -> None:
        raise NotImplementedError("kernels are interpreted here, not compiled")

    def load_dialects(self, context: object) -> None:
        """Nothing is compiled."""

    def get_module_map(self) -> dict:
        return {}


InterpreterBackend.__abstractmethods__ = frozenset()  # Triton skips classes with abstract methods left; none is called
