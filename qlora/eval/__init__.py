"""Loss, completions and scores on the eval data."""
