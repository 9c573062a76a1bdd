"""The engines' side: addresses, discovery, ZMQ subscription, replay requests, and a publisher like theirs."""
