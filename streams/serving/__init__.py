"""What a worker offers to others: the lookup service and its announcement on kv-workers."""
