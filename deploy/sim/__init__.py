"""The simulated fleet: pods with a real paged prefix cache that publish real engine events and know the truth.

It is the oracle of the tests: what a score must be is computed here from the contents of the caches, never from
the events or from the index.
"""
