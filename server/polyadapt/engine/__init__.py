"""Time: requests, scheduling, KV memory and the step loop."""
