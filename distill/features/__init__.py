"""What else of a teacher a student learns from: hidden states, attention relations, routers."""

from distill.features.building import build_features
from distill.features.losses import FeatureLosses, Lesson

__all__ = ["FeatureLosses", "Lesson", "build_features"]
