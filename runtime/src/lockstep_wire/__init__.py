"""The shared agreements of trainer and server, each defined once. Imports neither Lockstep nor
vLLM.
"""
