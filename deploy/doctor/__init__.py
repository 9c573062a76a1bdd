"""Doctor: checks of engines, Kafka, workers and scorer, each with a sentence and the fix."""
