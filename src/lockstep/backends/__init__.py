"""The backends that train and serve a model: the interface, and one folder per implementation."""
