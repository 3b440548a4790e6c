"""Where a result lives: a folder of graphprune's own."""
