"""One partition of one agent, from source records to a commit."""
