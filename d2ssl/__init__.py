"""d2ssl: self-supervised pretraining of Detectron2's ResNet + FPN, for people with few labels.

Importing this package is cheap: it imports neither torch nor Detectron2.
"""

__version__ = "0.1.0"
