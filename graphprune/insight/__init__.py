"""What a person wants to see: which layers hurt, what a cut costs and saves, pictures, and a report in one file."""
