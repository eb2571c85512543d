"""Second implementations to measure the engine against: Hugging Face's models, and unpacked rows."""
