"""The Faust application: group membership, assignment, agents; the only package that imports faust."""
