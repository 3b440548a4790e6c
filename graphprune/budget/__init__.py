"""Targets as limits on costs, and the widths that keep the most score within them."""
