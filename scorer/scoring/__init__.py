"""Scoring, pure: from the holders of a prompt's blocks to matches, scores and a choice of pod."""
