"""What a step learns from: one file per advantage estimator, one per policy loss."""
