"""Ways of computing the same training run, held to each other and to stored trajectories."""
