"""Everything that reaches into a Hugging Face model: heads, layers, checkpointing, sharing."""
