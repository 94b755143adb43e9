"""EHAP in PyTorch, written from the papers: what the JAX side is compared with."""
