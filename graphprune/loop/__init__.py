"""Around training: rounds with checkpoints, optimizer state, distillation, regularisers."""
