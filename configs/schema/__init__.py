"""The JSON schema of recipes, for editors: made from the same classes that read recipes, so that the two cannot disagree."""
