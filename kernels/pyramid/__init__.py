"""Pooling levels over the tokens of each row: x [B,H,N,D]  →  levels [[B,H,N/r0,D], [B,H,N/(r0·r1),D], …]."""
