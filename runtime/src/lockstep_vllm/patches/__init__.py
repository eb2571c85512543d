"""Changes to vLLM's own code, one module each."""
