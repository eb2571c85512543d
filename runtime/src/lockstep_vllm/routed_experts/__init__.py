"""The experts that routers chose, from the model to the reply."""
