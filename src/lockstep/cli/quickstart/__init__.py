"""`lockstep quickstart`: the examples that come with the package."""
