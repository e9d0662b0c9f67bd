"""What a model is scored on, by whom, and what comes out."""
