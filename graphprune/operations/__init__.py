"""What is true of each operation, said once: its rule, what it moves, what it multiplies, the sizes that follow."""
