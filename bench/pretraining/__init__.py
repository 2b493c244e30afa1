"""Whether training from scratch in fewer bytes reaches the same loss: the runs, and their page."""
