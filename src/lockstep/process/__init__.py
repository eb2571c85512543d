"""Child processes that cannot outlive their parent, and what the machine has free. Standard library
only.
"""
