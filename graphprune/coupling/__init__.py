"""Labels to units and groups: what must go together, who makes and who uses it, and how long every axis is for given widths."""
