"""Methods that make a model narrower: fewer heads, fewer neurons."""
