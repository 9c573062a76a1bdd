"""What every process has: settings, logs, telemetry, background tasks, interpreter tuning."""
