"""A plan is frozen data; applying, undoing, composing, storing it, and the oracle that says what the cut model must compute."""
