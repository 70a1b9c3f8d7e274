"""A private mark per user: codes, triggers, training, reading and tracing. Knows no server."""
