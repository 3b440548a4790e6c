"""A request in, a plan and its notes out."""
