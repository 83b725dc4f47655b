"""Training objectives, and one step of training.  The door is `losses`.

- `noise_levels`: the levels that are drawn
- `noisy`: the interface of a loss; `denoising`: score matching; `classifier`: noisy classification
- `steps`: one step of training or evaluation
- `optimization`: optimiser, warm-up and clipping
"""
