"""Images: files of strangers, batches of them."""
