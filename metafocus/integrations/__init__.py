"""Where metafocus meets other people's training loops: Hugging Face's Trainer, TRL, accelerate."""
