"""From a checkpoint to a causal language model that attends through the paged cache."""
