"""The isolated server seen from our side: start it, talk to it, understand its end. Imports no
torch.
"""
