"""What `before_after.py` computes, on the code before and after the redesign."""
