"""What metrics mean and how they are computed."""
