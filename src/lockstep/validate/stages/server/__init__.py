"""Stages that start the server."""
