"""The endpoint picker's process: where pods serve, their load, the decision within a deadline, and what came of it."""
