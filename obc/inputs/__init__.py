"""What comes from outside: weights, networks, images, files."""
