"""What is done to a network after it was compressed: statistics, and training."""
