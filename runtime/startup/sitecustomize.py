"""Runs at the start of every Python process of the server, since its folder is on their PYTHONPATH.

Qwen3.5 models import torchvision. Its build on the package index is the CUDA one, which can't load its operators
beside a CPU build of torch, and then fails because two operators it describes don't exist. They are declared here (and
never called) just before torchvision is imported.
"""

import sys


class _DeclareOperators:
    """A finder that finds nothing: it acts when torchvision is first asked for, and leaves."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing_operators()


def _declare_missing_operators():
    import importlib.metadata

    import torch

    # Either build beside a CUDA torch, and the CPU build anywhere, bring their operators along.
    if torch.version.cuda is not None or "+cpu" in importlib.metadata.version("torchvision"):
        return
    global _library
    _library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        _library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
