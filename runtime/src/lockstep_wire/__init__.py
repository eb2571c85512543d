"""What trainer and server must agree on, once for both. Imports neither Lockstep nor vLLM."""
