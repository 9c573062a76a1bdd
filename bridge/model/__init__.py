"""Vocabulary of the system, pure: engine events, block keys, epochs, and the records of every topic."""
