"""Text and chats to token ids, exactly as the engine's own tokenizer makes them."""
