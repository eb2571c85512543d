"""The asynchronous loop: rollouts go on while the trainer works."""
