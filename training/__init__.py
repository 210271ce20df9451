"""Learning: from rendered scenes or LLaVA data to a trained model, and its measured accuracy.

Enters: images with questions and answers (`data/`), a YAML configuration (`configs/`). Leaves: a
model folder that stock transformers loads. May import every other part of planner except the CLI.
"""
