"""What trains and serves a model: the interface, and one folder per implementation."""
