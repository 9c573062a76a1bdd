"""From a prompt to a score per pod."""
