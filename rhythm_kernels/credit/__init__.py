"""Selection of tokens and the factors of their advantages: C++/CUDA ops, or the same rules composed of torch ops."""
