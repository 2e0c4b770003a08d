"""Networks that are no image classifiers, through the toolkit: see README.md here."""
