"""Shows the rhythm of a model: what its attention says about each token and each head (the paper's section 4)."""
