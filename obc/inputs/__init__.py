"""Input from outside: weights, networks, images, files."""
