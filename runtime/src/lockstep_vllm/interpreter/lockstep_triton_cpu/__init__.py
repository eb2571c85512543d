"""Lets vLLM's second model runner start on a CPU, where its kernels run in Triton's own
interpreter.

vLLM 0.32 returns routed experts from that runner only. The runner asks for a Triton with a `cpu`
backend, which the package index does not have. This is one in name: it claims to be active and
compiles nothing, since with `TRITON_INTERPRET=1` nothing is compiled. Slow (tens of tokens per
second): meant for tests and small models.

Its folder, with the entry point beside this package, is on the server's path only when routed
experts are captured on a CPU. vLLM takes the mere presence of a `cpu` backend for a working Triton.
"""
