"""Other people's models: modules of torch as graphs, and taskgraph as a backend of torch.compile."""
