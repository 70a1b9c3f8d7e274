"""Workflows: named ways of making one answer out of many generations, one kind a file."""
