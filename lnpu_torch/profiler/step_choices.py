"""What a training step may be made of, by name."""

from typing import Literal

Loss = Literal["cross-entropy", "mse", "mean"]
OptimizerName = Literal["sgd", "adam", "adamw", "none"]
