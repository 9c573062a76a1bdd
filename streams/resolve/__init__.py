"""Resolution, pure: a kv-events message becomes changes of engine blocks and block updates."""
