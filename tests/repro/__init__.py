"""Published claims, each with its paper, its number and ours."""
