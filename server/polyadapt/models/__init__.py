"""Load a transformers model and wrap it from outside. Knows no adapter family and no request."""
