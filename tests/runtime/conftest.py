"""Makes the plugin's parts that need no vLLM importable here, as vLLM sees them through PYTHONPATH."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runtime" / "src"))
