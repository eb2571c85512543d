"""What leaves the device while others use it, and what the backward pass computes again."""
