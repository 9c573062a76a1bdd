"""A new index version beside the live one: its topics, its progress, a comparison, and the move to it."""
