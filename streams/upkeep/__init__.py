"""Periodic work beside the streams: sweeps, counts, idle changelogs, gauges."""
