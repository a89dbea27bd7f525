"""Small drafters, cut out of a model and trained on a target's answers (edgellm draft make)."""
