"""The Tinker service: what it is trained on, and an endpoint that makes it look like our server."""
