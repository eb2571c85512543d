"""What a model needs on GPUs that are not at hand: memory and time of a step and a sync, per layout."""
