"""Polyadapt serves many fine-tuned variants of one resident model from one machine."""

__version__ = "0.1.0"
