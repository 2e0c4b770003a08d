"""Pure mathematics: tensors and plain values in, tensors out."""
