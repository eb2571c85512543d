"""Helpers of tests and benchmarks: requests in flight, programs in other processes, planted faults."""
