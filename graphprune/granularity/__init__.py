"""What goes if not channels: heads, whole blocks, kernels and their positions, vectors, single weights, N:M."""
