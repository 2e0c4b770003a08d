"""Networks: weights of strangers, our own architectures, runs of a part of them."""
