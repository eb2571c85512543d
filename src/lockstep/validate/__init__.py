"""What shows that a model is supported: stages, their figures and limits, planted faults, reports."""
