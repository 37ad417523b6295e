"""retrofit: rewrites a trained model's attention into hierarchical attention."""
