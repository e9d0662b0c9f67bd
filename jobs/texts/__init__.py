"""From what a recipe names as its text to token sequences: where it lies, its documents, its windows, the token cache."""
