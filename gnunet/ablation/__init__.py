"""The normalization laboratory: studies of arms, points and seeds, and what they measured."""
