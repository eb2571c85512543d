"""Hugging Face and PEFT folders: read, loaded into Megatron's parameters, and written."""
