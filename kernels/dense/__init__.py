"""Dense attention in position space."""
