"""The time of a step on a GPU, modelled from its operations: no GPU is needed."""
