"""One run of the model without values: what it computes, and labels for every axis of every tensor. Rules and moves say how labels pass an operation."""
