"""The rhythm of a model, to look at: what its attention says of each token and each head (the paper's section 4)."""
