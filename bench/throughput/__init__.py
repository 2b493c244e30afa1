"""How fast a step is: who steps, on what, in which situation, and what the memory allows."""
