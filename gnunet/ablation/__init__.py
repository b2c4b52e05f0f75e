"""Ablation studies of variants, settings and seeds, and what they measured."""
