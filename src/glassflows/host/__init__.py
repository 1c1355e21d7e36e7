"""Somebody's pipeline, run with K rows a prompt; it knows no strategy and no reward."""
