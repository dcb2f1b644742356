import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from d2ssl.data.datasets import ensure_registered, register_balloon, register_dataset
from d2ssl.data.datasets.subset import choose, stratify
from d2ssl.errors import D2SSLError


@pytest.fixture
def base(request):
    """A set of 20 entries; one name a test, since Detectron2's catalogs are global."""
    name = f"base_{request.node.originalname}"
    entries = [{"file_name": f"{i}.jpg", "image_id": i} for i in range(20)]
    register_dataset(name, lambda: entries, thing_classes=["a", "b"], evaluator_type="coco")
    return name


def ids(name):
    ensure_registered([name])
    return [d["image_id"] for d in DatasetCatalog.get(name)]


def test_first_entries(base):
    assert ids(f"{base}@16") == list(range(16))
    assert ids(base) == ids(f"{base}@20") == list(range(20))


def test_seeded_choices_nest_and_keep_the_order(base):
    choices = {n: ids(f"{base}@{n}#seed3") for n in (1, 4, 8, 16, 20)}
    for n, choice in choices.items():
        assert len(set(choice)) == n and choice == sorted(choice)
    for small, large in zip((1, 4, 8, 16), (4, 8, 16, 20)):
        assert set(choices[small]) < set(choices[large])
    assert choices[8] != list(range(8))


def test_seeds_differ_and_cover_the_set(base):
    drawn = [tuple(ids(f"{base}@5#seed{seed}")) for seed in range(60)]
    assert len(set(drawn)) > 50
    counts = [sum(i in choice for choice in drawn) for i in range(20)]
    assert min(counts) >= 4  # 15 expected, standard deviation 3.4


def test_a_choice_never_changes(base):
    assert ids(f"{base}@4#seed0") == [1, 8, 18, 19]


# 60 photos of a few classes: class 0 in nearly all, class 9 in one; every seventh without any.
MANY = [
    set() if i % 7 == 3 else {0} | {c for c in range(1, 9) if i % (2 * c + 1) == 1}
    for i in range(60)
]
MANY[40] = {9}


def proportions(entries):
    return np.array([np.mean([c in found for found in entries]) for c in range(10)])


def test_a_stratified_part_has_the_rarest_classes_first():
    total = proportions(MANY)
    for seed in range(5):
        chosen, previous = [], set()
        while len(chosen) < 10:
            now = stratify(MANY, len(chosen) + 1, seed)
            assert now == sorted(set(now)) and set(chosen) < set(now)
            (new,) = set(now) - set(chosen)
            absent = set(range(10)) - previous
            if absent:
                assert min(total[c] for c in MANY[new] & absent) == min(total[c] for c in absent)
            chosen, previous = now, previous | MANY[new]
        assert 40 in chosen and previous == set(range(10))


def test_a_stratified_part_keeps_the_proportions():
    total = proportions(MANY)
    errors = []
    for choice in (stratify, lambda classes, n, seed: choose(len(classes), n, seed)):
        parts = [[MANY[i] for i in choice(MANY, n, seed)] for n in (24, 40) for seed in range(20)]
        errors.append(np.mean([np.abs(proportions(part) - total).sum() for part in parts]))
        if choice is stratify:
            empty = [np.mean([not found for found in part]) for part in parts]
            assert np.abs(np.array(empty) - np.mean([not found for found in MANY])).max() < 0.05
    assert errors[0] < 0.75 * errors[1]
    # A photo without any class is the rarest here, but no part begins with it.
    assert all(stratify([{0}] * 30 + [set()], 1, seed) != [30] for seed in range(40))
    # One class a photo: exactly as many as the proportions say.
    single = [{0}] * 60 + [{1}] * 30 + [{2}] * 10
    for n in (10, 20, 50):
        part = [single[i] for i in stratify(single, n, 7)]
        assert [part.count({c}) for c in range(3)] == [6 * n // 10, 3 * n // 10, n // 10]


def test_seeds_of_a_stratified_part_are_as_different_as_chance_makes_them():
    classes = [{i % 30} for i in range(120)]  # 30 classes, none rarer than another
    parts = [stratify(classes, 10, seed) for seed in range(40)]
    seen = np.bincount(np.concatenate(parts), minlength=120)
    assert all(len({i % 30 for i in part}) == 10 for part in parts)
    assert seen.max() <= 12 and (seen > 0).mean() > 0.9  # 3.3 expected, standard deviation 1.8


@pytest.mark.parametrize("key", ["annotations", "category_id"])
def test_a_set_with_several_classes_is_stratified(key, request):
    def entry(i):
        own = {"annotations": [{"category_id": i // 15}] * 3, "category_id": i // 15}
        return {"file_name": f"{i}.jpg", "image_id": i, key: own[key]}

    name = f"many_{key}"
    names = {"annotations": "thing_classes", "category_id": "classes"}[key]
    register_dataset(name, lambda: [entry(i) for i in range(20)], **{names: ["a", "b"]})
    assert sum(i >= 15 for i in ids(f"{name}@4#seed1")) == 1
    assert set(ids(f"{name}@4#seed1")) < set(ids(f"{name}@8#seed1"))
    assert ids(f"{name}@4") == [0, 1, 2, 3]
    register_dataset(name, lambda: [entry(i) for i in range(20)], **{names: ["all"]})
    assert ids(f"{name}@4#seed0") == [1, 8, 18, 19]


def test_classes_that_come_with_decoding_are_decoded_once():
    decoded = []

    def decode(entry):
        decoded.append(entry["image_id"])
        return {**entry, "annotations": [{"category_id": int(entry["image_id"] == 7)}]}

    entries = [{"file_name": f"{i}.jpg", "image_id": i} for i in range(20)]
    register_dataset("masks", lambda: entries, decode, thing_classes=["a", "b"])
    ensure_registered(["masks@2", "masks@2#seed0", "masks@3#seed0"])
    assert len(DatasetCatalog.get("masks@2")) == len(decoded) == 2
    del decoded[:]
    for name in ("masks@2#seed0", "masks@3#seed0", "masks@2#seed0"):
        assert 7 in ids(name)
    assert len(decoded) == 20 + 2 + 3 + 2


def test_nothing_is_read_before_use(request):
    name = f"lazy_{request.node.name}"

    def fail():
        raise AssertionError("read too early")

    register_dataset(name, fail)
    ensure_registered([name, f"{name}@4", f"{name}@4#seed1"])
    with pytest.raises(AssertionError, match="read too early"):
        DatasetCatalog.get(f"{name}@4")


def test_metadata_is_copied(base):
    ensure_registered([f"{base}@3"])
    metadata = MetadataCatalog.get(f"{base}@3")
    assert metadata.thing_classes == ["a", "b"] and metadata.evaluator_type == "coco"
    assert metadata.name == f"{base}@3"


def test_part_of_a_coco_set(tmp_path):
    """COCO's loader fills its metadata late, and its JSON must not stand for the part."""
    Image.new("RGB", (8, 6)).save(tmp_path / "0.jpg")
    images = [{"id": i, "file_name": "0.jpg", "height": 6, "width": 8} for i in range(3)]
    content = {"images": images, "annotations": [], "categories": [{"id": 7, "name": "cat"}]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    register_coco_instances("test_coco", {}, str(tmp_path / "coco.json"), str(tmp_path))
    assert ids("test_coco@2") == [0, 1]
    metadata = MetadataCatalog.get("test_coco@2")
    assert metadata.thing_classes == ["cat"]
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0}
    assert not hasattr(metadata, "json_file")


@pytest.mark.parametrize("seed", ["", "#seed3"])
@pytest.mark.parametrize("classes", [["a"], ["a", "b", "c"]])
def test_the_last_entries_are_what_the_first_leave(seed, classes, request):
    name = f"tail_{request.node.name}"
    kinds = [{"category_id": i % 10 % len(classes)} for i in range(61)]
    entries = [{"file_name": f"{i}.jpg", "image_id": i, **kind} for i, kind in enumerate(kinds)]
    register_dataset(name, lambda: entries, classes=classes)
    for n in (1, 13, 48, 60):
        first, last = ids(f"{name}@{61 - n}{seed}"), ids(f"{name}@-{n}{seed}")
        assert len(last) == n and last == sorted(set(range(61)) - set(first))
    assert set(ids(f"{name}@-4{seed}")) < set(ids(f"{name}@-13{seed}"))
    assert ids(f"{name}@-61{seed}") == list(range(61))
    assert (ids(f"{name}@-13{seed}") == list(range(48, 61))) == (not seed)


def test_a_part_of_a_part(base):
    whole = ids(f"{base}@12#seed1")
    DatasetCatalog.remove(f"{base}@12#seed1")  # another process knows the name alone
    part, rest = ids(f"{base}@12#seed1@4#seed0"), ids(f"{base}@12#seed1@-8#seed0")
    assert len(part) == 4 and sorted(part + rest) == whole
    assert part != ids(f"{base}@4#seed0")
    assert MetadataCatalog.get(f"{base}@12#seed1@4#seed0").thing_classes == ["a", "b"]


def test_more_than_there_are(base):
    for name in (f"{base}@21", f"{base}@21#seed0", f"{base}@-21", f"{base}@-21#seed0"):
        ensure_registered([name])
        with pytest.raises(D2SSLError, match="has only 20 entries"):
            DatasetCatalog.get(name)


@pytest.mark.parametrize("part", ["@", "@0", "@-0", "@--3", "@x", "@4#3", "@4#seed", "@4 "])
def test_malformed_part(base, part):
    with pytest.raises(D2SSLError, match=rf"cannot tell which part.*{base}@16#seed3"):
        ensure_registered([base + part])


@pytest.mark.parametrize("part", ["", "@16", "@16#seed3"])
def test_unknown_name_gets_the_nearest(part):
    with pytest.raises(D2SSLError, match=f"did you mean 'balloon_train{part}'"):
        ensure_registered(["ballon_train" + part])
    with pytest.raises(D2SSLError, match="register it first"):
        ensure_registered(["zzzzqqqq" + part])


def test_first_sixteen_of_the_story(shared):
    register_balloon("balloon", shared / "data" / "balloon")
    ensure_registered(["balloon_train@16"])
    raw = json.loads((shared / "data/balloon/train/via_region_data.json").read_text())
    expected = [entry["filename"] for entry in raw.values()][:16]
    part = DatasetCatalog.get("balloon_train@16")
    assert [d["file_name"].rsplit("/", 1)[1] for d in part] == expected
    assert all(d["annotations"] for d in part)


def test_published_parts_never_change(shared):
    register_balloon("balloon", shared / "data" / "balloon")
    assert ids("balloon_train@16#seed3") == [
        4,
        6,
        9,
        12,
        13,
        18,
        23,
        25,
        28,
        31,
        33,
        35,
        37,
        44,
        47,
        58,
    ]


def test_a_set_whose_own_name_has_an_at_sign(base):
    register_dataset("my@set", lambda: [{"image_id": 5}, {"image_id": 6}])
    assert ids("my@set@1") == [5]
    with pytest.raises(D2SSLError, match=f"did you mean '{base}@2'"):
        ensure_registered([f"{base}@x@2"])
