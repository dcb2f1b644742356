import copy
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from d2ssl.data.datasets import ensure_registered
from d2ssl.data.datasets.coco import register_coco
from d2ssl.data.masks import annotation_mask, encode
from d2ssl.engine.coco import build_evaluator
from d2ssl.errors import D2SSLError

WIDTH, HEIGHT = 60, 40
NAME = "test_coco_json"


def annotation(number, image_id, category_id, segmentation, bbox, iscrowd=0):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "bbox": bbox,
        "area": bbox[2] * bbox[3],
        "iscrowd": iscrowd,
    }


def rle(top, left, bottom, right, listed=False):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    if not listed:
        return {"size": [HEIGHT, WIDTH], "counts": encode(mask)["counts"].decode()}
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, flat.size]).tolist()}


# Categories and images neither in order nor without gaps; image 7 has no annotation. One has the
# id 0: where pycocotools reads it from the file, nothing matches it.
CONTENT = {
    "images": [
        {"id": 31, "file_name": "b/1.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 7, "file_name": "0.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 12, "file_name": "2.jpg", "height": HEIGHT, "width": WIDTH},
    ],
    "categories": [
        {"id": 90, "name": "dog"},
        {"id": 3, "name": "person"},
        {"id": 17, "name": "cat"},
    ],
    "annotations": [
        annotation(5, 31, 90, [[5, 5, 25, 5, 25, 20, 5, 20]], [5, 5, 20, 15]),
        annotation(0, 12, 17, rle(2, 3, 22, 33), [3, 2, 30, 20]),
        annotation(3, 31, 3, [[30, 4, 50, 4, 50, 14], [30, 20, 39, 20, 39, 29]], [30, 4, 20, 25]),
        annotation(9, 31, 3, rle(30, 0, 40, 60, listed=True), [0, 30, 60, 10], iscrowd=1),
    ],
}


@pytest.fixture
def register(tmp_path):
    """Writes photos and annotations, and registers them as NAME; gives the JSON's path."""
    (tmp_path / "b").mkdir()
    for name in ("0.jpg", "b/1.jpg", "2.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)

    def run(content=CONTENT, **kwargs):
        (tmp_path / "annotations.json").write_text(json.dumps(content))
        register_coco(NAME, tmp_path, **kwargs)
        return str(tmp_path / "annotations.json")

    return run


def test_as_detectron2_reads_it(register, tmp_path):
    file = register()
    assert not hasattr(MetadataCatalog.get(NAME), "thing_classes")  # nothing is read yet
    dicts = DatasetCatalog.get(NAME)
    assert dicts == load_coco_json(file, str(tmp_path), "test_coco_stock")
    metadata, stock = MetadataCatalog.get(NAME), MetadataCatalog.get("test_coco_stock")
    assert metadata.thing_classes == stock.thing_classes == ["person", "cat", "dog"]
    ids = metadata.thing_dataset_id_to_contiguous_id
    assert ids == stock.thing_dataset_id_to_contiguous_id == {3: 0, 17: 1, 90: 2}
    assert metadata.evaluator_type == "coco"
    assert [(d["image_id"], len(d["annotations"])) for d in dicts] == [(7, 0), (12, 1), (31, 3)]
    assert dicts[2]["annotations"][0]["segmentation"] == [[5, 5, 25, 5, 25, 20, 5, 20]]  # unmoved
    DatasetCatalog.get(NAME)  # once more: the metadata stay as they are


def test_chosen_classes(register):
    register(classes=["dog", "person"])
    assert MetadataCatalog.get(NAME).thing_classes == ["dog", "person"]
    dicts = DatasetCatalog.get(NAME)
    assert MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id == {90: 0, 3: 1}
    assert [[a["category_id"] for a in d["annotations"]] for d in dicts] == [[], [], [0, 1, 1]]
    register(classes=["persn"])
    with pytest.raises(D2SSLError, match="no category 'persn' in it; did you mean 'person'"):
        DatasetCatalog.get(NAME)


def test_photos_in_another_folder(register, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train.json").write_text(json.dumps(CONTENT))
    register(json_file="labels/train.json", images="b/..")
    assert len(DatasetCatalog.get(NAME)) == 3
    register(json_file="labels/train.json")
    with pytest.raises(D2SSLError, match="3 of 3 photos are missing, the first is .*labels/b/1"):
        DatasetCatalog.get(NAME)


def test_part_of_a_set_knows_the_categories(register):
    register()
    ensure_registered([f"{NAME}@2"])
    assert len(DatasetCatalog.get(f"{NAME}@2")) == 2
    metadata = MetadataCatalog.get(f"{NAME}@2")
    assert metadata.thing_classes == ["person", "cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 17: 1, 90: 2}


def truth_as_prediction(record):
    objects = [a for a in record["annotations"] if not a.get("iscrowd")]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    masks = [annotation_mask(a, HEIGHT, WIDTH) for a in objects]
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, HEIGHT, WIDTH))
    instances.scores = torch.ones(len(objects))
    instances.pred_classes = torch.tensor([a["category_id"] for a in objects], dtype=torch.long)
    return {"instances": instances}


@pytest.mark.parametrize("classes", [None, ["dog", "cat"]])
@pytest.mark.parametrize("left_out", [[], ["area", "iscrowd"]])
def test_evaluator_scores_the_truth_as_perfect(register, tmp_path, classes, left_out):
    content = copy.deepcopy(CONTENT)
    content["annotations"] = [
        {k: v for k, v in a.items() if k not in left_out}
        for a in content["annotations"]
        if not (left_out and a["iscrowd"])
    ]
    register(content, classes=classes)
    evaluator = build_evaluator(NAME, str(tmp_path / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [truth_as_prediction(record)])
    results = evaluator.evaluate()
    for task in ("bbox", "segm"):
        for metric in ("AP", *(f"AP-{name}" for name in classes or ("person", "cat", "dog"))):
            assert results[task][metric] == pytest.approx(100), (task, metric)
    rows = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {row["category_id"] for row in rows} == ({3, 17, 90} if classes is None else {90, 17})


def test_boxes_without_masks(register):
    content = copy.deepcopy(CONTENT)
    for entry in content["annotations"]:
        del entry["segmentation"]
    register(content)
    assert "segmentation" not in DatasetCatalog.get(NAME)[2]["annotations"][0]


ABSENT = object()


def changed(path, value):
    content = copy.deepcopy(CONTENT)
    target = content
    for key in path[:-1]:
        target = target[key]
    if value is ABSENT:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return content


def test_backslashes_of_windows(register, tmp_path):
    register(changed(("images", 0, "file_name"), "b\\1.jpg"))
    assert DatasetCatalog.get(NAME)[2]["file_name"] == str(tmp_path / "b" / "1.jpg")


FIRST = ("annotations", 0)
MASK = (*FIRST, "segmentation")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("images",), ABSENT, "has no list of images; is it in COCO's"),
        (("annotations",), {}, "has no list of annotations"),
        (("categories",), ABSENT, "has no list of categories"),
        (("categories",), [], "has no categories"),
        (("images",), [], "has no images"),
        (("images", 1), "0.jpg", "number 1 of images is no entry"),
        (("images", 1, "id"), ABSENT, "number 1 of images has no id"),
        (("images", 1, "file_name"), ABSENT, "number 1 of images has no file_name"),
        (("images", 1, "width"), ABSENT, "number 1 of images has no width"),
        (("images", 1, "height"), 0, "image 7 has no proper height and width"),
        (("images", 1, "id"), "7", "id '7' in images is no whole number"),
        (("images", 1, "id"), 31, "id 31 is there twice in images"),
        (("images", 1, "file_name"), "2.jpg", "2.jpg is listed twice"),
        (("images", 1, "file_name"), "../0.jpg", "'../0.jpg' lies outside"),
        (("images", 1, "file_name"), "gone.jpg", "1 of 3 photos are missing.*gone.jpg"),
        (("images", 1, "height"), 60, "0.jpg is 60x40, but its labels are for 60x60"),
        (("categories", 0, "name"), ABSENT, "number 0 of categories has no name"),
        (("categories", 0, "name"), "cat", "a category has no name or that of another"),
        (("categories", 0, "id"), 3, "id 3 is there twice in categories"),
        ((*FIRST, "id"), 3, "id 3 is there twice in annotations"),
        ((*FIRST, "id"), ABSENT, "number 0 of annotations has no id"),
        ((*FIRST, "bbox"), ABSENT, "number 0 of annotations has no bbox"),
        ((*FIRST, "image_id"), ABSENT, "number 0 of annotations has no image_id"),
        ((*FIRST, "image_id"), 8, "annotation 5 has the image_id 8, which is not in"),
        ((*FIRST, "category_id"), 1, "annotation 5 has the category_id 1, which is not in"),
        ((*FIRST, "category_id"), [3], r"annotation 5 has the category_id \[3\]"),
        ((*FIRST, "bbox"), [1, 2, 3], "annotation 5 has the bbox"),
        ((*FIRST, "bbox"), [1, 2, -3, 4], "annotation 5 has the bbox"),
        ((*FIRST, "bbox"), [1, 2, "3", 4], "annotation 5 has the bbox"),
        ((*FIRST, "bbox"), [1, 2, float("nan"), 4], "annotation 5 has the bbox"),
        ((*FIRST, "iscrowd"), 2, "annotation 5 has iscrowd 2"),
        ((*FIRST, "ignore"), 1, "annotation 5 is marked 'ignore'"),
        (MASK, [], "annotation 5 has no outline or mask"),
        (MASK, ABSENT, "annotation 5 has no outline or mask"),  # the others have
        (MASK, [[1, 2, 3, 4]], "annotation 5 has a polygon"),
        (MASK, [[1, 2, 9, 2, 9, 9, 1]], "annotation 5 has a polygon"),
        (MASK, [1, 2, 9, 2, 9, 9], "annotation 5 has a polygon"),
        (MASK, [[1, 2, 9, 2, 9, None]], "annotation 5 has a polygon"),
        (MASK, [[1, 2, 9, 2, -1e9, 9]], "annotation 5 has a point 100000 pixels away"),
        (MASK, {"size": [60, 40], "counts": [2400]}, "annotation 5 has a run-length mask of size"),
        (MASK, {"counts": [2400]}, "annotation 5 has a run-length mask of size None"),
        (MASK, {"size": [40, 60]}, "annotation 5 has a run-length mask without counts"),
        (MASK, {"size": [40, 60], "counts": ""}, "annotation 5 has a run-length mask without"),
        (MASK, {"size": [40, 60], "counts": [99, 1]}, "mask of 100 pixels on a photo of 2400"),
        (MASK, {"size": [40, 60], "counts": "1" * 4000}, "b/1.jpg has a damaged mask"),
    ],
)
def test_what_is_wrong_is_refused(register, path, value, message):
    file = register(changed(path, value))
    with pytest.raises(D2SSLError, match=f"^{file}: .*{message}") as caught:
        DatasetCatalog.get(NAME)
    assert "\n" not in str(caught.value)
    assert not hasattr(MetadataCatalog.get(NAME), "thing_classes")
    register()
    assert len(DatasetCatalog.get(NAME)) == 3


@pytest.mark.parametrize(
    "content, message",
    [("[]", "has no list of images"), (json.dumps(CONTENT)[:-40], "not valid JSON.*cut short")],
)
def test_bad_json_is_refused(tmp_path, content, message):
    (tmp_path / "annotations.json").write_text(content)
    register_coco(NAME, tmp_path)
    with pytest.raises(D2SSLError, match=f"annotations.json: {message}"):
        DatasetCatalog.get(NAME)


def test_missing_folder_and_file(tmp_path):
    register_coco(NAME, tmp_path / "gone")
    with pytest.raises(D2SSLError, match="gone: no such folder"):
        DatasetCatalog.get(NAME)
    register_coco(NAME, tmp_path)
    with pytest.raises(D2SSLError, match="annotations.json: no such file"):
        DatasetCatalog.get(NAME)


def test_photo_rotated_by_exif(register, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # 60x40 is shown as 40x60
    register()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "2.jpg", exif=exif)
    with pytest.raises(D2SSLError, match=r"annotations.json: .*2.jpg is 40x60, .*rotated by EXIF"):
        DatasetCatalog.get(NAME)


def test_real_file(shared):
    register_coco(NAME, shared / "data" / "voc_labelme_instance" / "data_dataset_coco")
    dicts = DatasetCatalog.get(NAME)
    assert [len(d["annotations"]) for d in dicts] == [3, 3, 6]
    classes = MetadataCatalog.get(NAME).thing_classes
    labels = [classes[a["category_id"]] for a in dicts[0]["annotations"]]
    assert labels == ["person", "person", "bottle"]
