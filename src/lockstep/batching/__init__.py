"""Rollouts to training tokens: sequences, advantages, prefix trees, packed rows. numpy only, no
framework.
"""
