"""Every setting a user can make: frozen, documented with its unit, and refused when unknown, out of
range, or without effect.
"""
