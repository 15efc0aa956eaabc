"""Models as task graphs: configurations, checkpoints, tokenizers, and the graphs of the families."""
