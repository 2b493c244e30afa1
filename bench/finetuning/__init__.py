"""What a step does to fine-tuning: tasks, what of a model is tuned, the comparison, its report."""
