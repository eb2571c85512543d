"""The stages of validation, one module each."""
