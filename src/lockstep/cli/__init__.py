"""The command line: one module per command. Everything it does is in the library below."""
