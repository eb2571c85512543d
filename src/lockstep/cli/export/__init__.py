"""A run's step as a folder that other programs load: `lockstep export`."""
