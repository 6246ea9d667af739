"""The frozen backbone: which families, how a checkpoint is loaded, and its forward pass."""

from engine.backbone.decoder import Backbone
from engine.backbone.families import BackboneConfig
from engine.backbone.loader import load_backbone

__all__ = ["Backbone", "BackboneConfig", "load_backbone"]
