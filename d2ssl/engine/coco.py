"""COCO AP with Detectron2's own evaluator, and for Open Images its challenge's AP beside it."""

import os
from typing import Dict

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from d2ssl.engine.open_images_ap import OpenImagesEvaluator

CONVERTED = "_coco_format.json"  # how Detectron2 names the ground truth that it converts


def build_evaluator(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """The official pycocotools evaluation; predictions are kept in ``output_dir``.

    Sets with a hierarchy of classes (Open Images) get the AP of its challenge as well.
    Ground truth that Detectron2 converts to a COCO file is converted anew: it would otherwise
    reuse the file of an earlier run by name, even after labels were corrected.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if getattr(metadata, "json_file", "").endswith(CONVERTED):
        del metadata.json_file
    if not hasattr(metadata, "json_file"):
        stale = os.path.join(output_dir, dataset_name + CONVERTED)
        if comm.is_main_process() and os.path.exists(stale):
            os.remove(stale)
        comm.synchronize()
    coco = COCOEvaluator(dataset_name, output_dir=output_dir, use_fast_impl=False)
    if not hasattr(metadata, "hierarchy_file"):
        return coco
    return DatasetEvaluators([coco, OpenImagesEvaluator(dataset_name)])


def flatten(results: Dict[str, Dict[str, float]]) -> Dict[str, float]:
    """{"segm": {"AP": 40.0}} -> {"segm/AP": 40.0}; NaN (no such objects) is left out."""
    return {
        f"{task}/{metric}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if value == value
    }
