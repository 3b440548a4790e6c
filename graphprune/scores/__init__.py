"""What matters: scores, and the data they run on."""
