"""Where and how long a model runs: measurements, tables of single operations, and the search that meets a time."""
