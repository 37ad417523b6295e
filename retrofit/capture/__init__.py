"""Records real calls of attention-owning modules and turns each module into a graph."""
