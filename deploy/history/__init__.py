"""The log as history: read ranges of it, save and load captures, rebuild past states."""
