"""What if requests had been routed by another policy: a paged-cache model of a fleet and a few policies."""
