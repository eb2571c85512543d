"""Python's time between two steps for the routed experts of all requests that decode: vLLM's own
way, and the pool that replaces it. No GPU.

    python benchmarks/routed_experts_capture.py --requests 64 256

The routed experts come from nowhere; what is done with them in the engine's process is the real
code, vLLM's on its side. A second thread of vLLM's, which works beside, is not counted.
Milliseconds per step: median and 99th percentile.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tiny import tiny_option

from lockstep.inference.environment.install import find_runtime
from lockstep.inference.environment.locate import default_kind
from lockstep.testing.programs import probed

PROGRAM = Path(__file__).with_name("routed_experts_steps.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 256], help="that decode at a time (64 256)")
    parser.add_argument("--layers", type=int, default=48, help="with experts, of which 8 are picked (48)")
    tiny_option(parser, requests=[8], layers=4)
    options = parser.parse_args()
    runtime = find_runtime(default_kind())
    env = {"PYTHONPATH": str(runtime.plugin_path), "VLLM_PLUGINS": ""}
    print(f"{'requests':>10}{'vLLM, ms':>16}{'pool, ms':>16}")
    for requests in options.requests:
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch, "log")
            [ways] = probed(runtime, PROGRAM, str(requests), str(options.layers), env=env, log=log)
        shown = f"{requests:>10}"
        for seconds in ways.values():
            ordered = sorted(seconds)
            shown += f"{1e3 * ordered[len(ordered) // 2]:8.3f}{1e3 * ordered[len(ordered) * 99 // 100]:8.3f}"
        print(shown, flush=True)


if __name__ == "__main__":
    main()
