"""Training objectives, and one step of training.  The door is `losses`.

- `levels`: noise levels that networks are trained at
- `objectives`: score matching, noisy classification
- `weightings`: weights of the loss at each time
- `steps`: one step of training or evaluation
- `optimization`: optimiser, warm-up and clipping
"""
