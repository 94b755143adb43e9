"""EHAP and HAP in PyTorch, written from the papers: what the JAX side is compared with. One idea per file."""
