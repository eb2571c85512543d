"""Process groups, the device, and what ranks tell each other."""
