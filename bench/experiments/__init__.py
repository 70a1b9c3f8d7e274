"""Small experiments, minutes each on a CPU, that look for the papers' effects on tiny models.

Training is plain torch, written from the papers' equations, and knows nothing of the server; it
writes the adapters in the files that the server reads. See docs/experiments.md.
"""
