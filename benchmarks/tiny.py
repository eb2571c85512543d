"""The option `--tiny` of every benchmark: sizes that a CPU has done in a minute or two, to show that the program runs."""

from __future__ import annotations

import argparse
from typing import Any


def tiny_option(parser: argparse.ArgumentParser, **sizes: Any) -> None:
    """Add `--tiny`, which sets these options; whatever comes after it on the command line wins."""

    class Tiny(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
            vars(namespace).update(sizes)

    text = ", ".join(f"{name} {value}" for name, value in sizes.items())
    parser.add_argument("--tiny", action=Tiny, nargs=0, help=f"to see it run on a CPU: {text}")
