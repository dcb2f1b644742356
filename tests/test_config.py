import pytest

from d2ssl.config import finetune_cfg, load_cfg, pretrain_cfg, stock_cfg
from d2ssl.errors import D2SSLError
from tests.conftest import CONFIGS

PHOTOS = ["SSL.DATASETS", "('photos',)"]


def test_stages_share_the_network():
    cfg = load_cfg(opts=[*PHOTOS, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"])
    pretrain, finetune = pretrain_cfg(cfg), finetune_cfg(cfg)
    assert pretrain.MODEL.RESNETS.NORM == "BN" and pretrain.MODEL.BACKBONE.FREEZE_AT == 0
    assert finetune.MODEL.RESNETS.NORM == "FrozenBN" and finetune.MODEL.BACKBONE.FREEZE_AT == 2
    assert pretrain.MODEL.PIXEL_MEAN == finetune.MODEL.PIXEL_MEAN
    assert pretrain.INPUT == finetune.INPUT
    assert pretrain.SOLVER == cfg.SSL.SOLVER and finetune.SOLVER == cfg.SOLVER
    assert pretrain.DATASETS.TRAIN == ("photos",)
    assert finetune.MODEL.WEIGHTS.endswith("pretrain/model_pretrained.pth")


def test_processes_share_statistics_by_the_trainer_alone():
    norms = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NORM"]
    model = pretrain_cfg(load_cfg(opts=[*PHOTOS, *norms, "naiveSyncBN"])).MODEL
    assert [model.RESNETS.NORM, model.FPN.NORM, model.ROI_BOX_HEAD.NORM] == ["BN"] * 3
    model = pretrain_cfg(load_cfg(opts=[*PHOTOS, "MODEL.FPN.NORM", "GN"])).MODEL
    assert model.FPN.NORM == "GN" and model.ROI_BOX_HEAD.NORM == ""


def test_without_ssl_finetuning_starts_from_the_users_weights():
    cfg = load_cfg(opts=["SSL.ENABLED", "False", "MODEL.WEIGHTS", "a.pkl"])
    assert finetune_cfg(cfg).MODEL.WEIGHTS == "a.pkl"


def test_stock_config_is_plain_detectron2():
    from detectron2.config import get_cfg

    stock = get_cfg()
    stock.merge_from_other_cfg(stock_cfg(load_cfg(opts=PHOTOS)))
    assert "SSL" not in stock


def test_what_is_only_d2ssls_stays_out_of_the_stock_config():
    theirs = "RepeatFactorTrainingSampler"
    for sampler, expected in (("ClassBalancedSampler", "TrainingSampler"), (theirs, theirs)):
        opts = ["DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", "0.1"]
        cfg = stock_cfg(load_cfg(opts=[*PHOTOS, *opts]))
        assert cfg.DATALOADER.SAMPLER_TRAIN == expected


@pytest.mark.parametrize("value", ["coco", "('cat', 'dog')", "['cat']", ""])
def test_classes_of_weights_are_a_name_or_names(value, tmp_path):
    cfg = load_cfg(opts=[*PHOTOS, "SSL.FINETUNE.WEIGHTS_CLASSES", value])
    (tmp_path / "again.yaml").write_text(cfg.dump())
    names = cfg.SSL.FINETUNE.WEIGHTS_CLASSES
    assert names == (value if value in ("coco", "") else eval(value))
    assert [*load_cfg(str(tmp_path / "again.yaml")).SSL.FINETUNE.WEIGHTS_CLASSES] == [*names]


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SSL.METOD", "SoCo"], "SSL.METOD does not exist; the nearest is SSL.METHOD"),
        (["SSL.SOLVER.BASE_RL", "1"], "nearest is SSL.SOLVER.BASE_LR"),
        (["SSL.INPUT.VIEW_SIZE", "200"], "multiple of 32, e.g. 192"),
        (["SSL.TRAIN", "['neck']"], "SSL.TRAIN neck: choose from bottom_up, fpn, box_head"),
        (["SSL.FPN_NORM", "GN"], 'SSL.FPN_NORM GN: choose from "", BN'),
        (
            ["SSL.PROPOSALS.SOURCE", "selectivesearch"],
            "SSL.PROPOSALS.SOURCE selectivesearch: choose from selective_search, .* a .json file",
        ),
        (["SSL.REGIONS.SOURCE", "slic"], "SSL.REGIONS.SOURCE slic: choose from superpixels"),
        (["SSL.REGIONS.NUM", "257"], "SSL.REGIONS.NUM 257: give 1 to 256"),
        (["TEST.PRECISE_BN.ENABLED", "True"], "TEST.PRECISE_BN is not supported"),
        (["MODEL.LOAD_PROPOSALS", "True"], "MODEL.LOAD_PROPOSALS is not supported"),
        (["SSL.DATASETS", "()"], "SSL.DATASETS is empty"),
        (["SSL.PRECISION", "fp16"], "choose from bf16, fp32"),
        (["SOLVER.MAX_ITER", "many"], "Type mismatch"),
        (["SSL.FINETUNE.FROZEN_PARTS", "('RES2',)"], "needs UNFREEZE_ITER"),
        (
            ["SSL.FINETUNE.FROZEN_PARTS", "('RES2',)", "SSL.FINETUNE.UNFREEZE_ITER", "5"],
            "needs MODEL.BACKBONE.FREEZE_AT 0",
        ),
        (["SSL.INPUT.CROP_SCALE", "(0.0, 1.0)"], "SSL.INPUT.CROP_SCALE .0.0, 1.0.: give the"),
        (["SSL.INPUT.CROP_SCALE", "(0.5,)"], "SSL.INPUT.CROP_SCALE .0.5,.: give the least"),
        (["SSL.INPUT.CROP_SCALE", "('a', 'b')"], "SSL.INPUT.CROP_SCALE .'a', 'b'.: give"),
        (["SSL.INPUT.COLOR_JITTER", "(0.4,)"], "COLOR_JITTER .0.4,.: give brightness, contrast"),
        (["SSL.INPUT.COLOR_JITTER", "(1, 1, 1, 1)"], "COLOR_JITTER .*hue, up to 0.5"),
        (["SOLVER.STEPS", "(3, 2)"], "SOLVER.STEPS .3, 2.: give rising iterations"),
        (["SSL.SOLVER.STEPS", "(0,)"], "SSL.SOLVER.STEPS .0,.: give rising iterations above 0"),
        (["SOLVER.WARMUP_METHOD", "foo"], "WARMUP_METHOD foo: choose from linear, constant"),
        (["SOLVER.LR_SCHEDULER_NAME", "foo"], "LR_SCHEDULER_NAME foo: choose from Warmup"),
        (["SOLVER.MAX_ITER", "0"], "^SOLVER.MAX_ITER 0: give 1 or more"),
        (["SSL.SOLVER.MAX_ITER", "0"], "^SSL.SOLVER.MAX_ITER 0: give 1 or more"),
        (["SOLVER.MAX_ITER", "None"], "SOLVER.MAX_ITER None: give 1 or more"),
        (["SOLVER.BASE_LR", "-1.0"], "SOLVER.BASE_LR -1.0: give a number above 0"),
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE gpu: give cpu or cuda"),
        (["INPUT.RANDOM_FLIP", "diagonal"], "choose from horizontal, vertical, none"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], "INPUT.MIN_SIZE_TRAIN ..: give short sides in pixels"),
        (["INPUT.MIN_SIZE_TRAIN", "(0,)"], "MIN_SIZE_TRAIN .0,.: pretraining needs the short side"),
        (["SSL.DATASETS", "('a', 3)"], "SSL.DATASETS .'a', 3.: give names"),
        (["SSL.FINETUNE.EMA_DECAY", "2.0"], "EMA_DECAY 2.0: give 0 to 1"),
        (["SSL.HOLES.SHARE", "2.0"], "HOLES.SHARE 2.0: give a share of the view"),
        (["SSL.HOLES.SIZE", "0.0"], "HOLES.SIZE 0.0: give a share of the view"),
        (["SSL.SOCO.NUM_BOXES", "0"], "NUM_BOXES 0: give 1 or more"),
        (["SSL.PROPOSALS.MIN_SCALE", "0.9"], "MIN_SCALE 0.9 and MAX_SCALE 0.8: give"),
        (["SEED.X", "1"], "SEED.X does not exist; the nearest is SEED"),
        (["SSL.CALIBRATION_PHOTOS", "0"], "give 2 or more"),
        (["INPUT.FORMAT", "L"], "choose from BGR, RGB"),
        (["SOLVER.BIAS_LR_FACTOR", "2.0"], "not supported"),
        (["DATALOADER.SAMPLER_TRAIN", "ClassSampler"], "SAMPLER_TRAIN ClassSampler: choose from"),
        (
            ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"],
            "name a part of the set in DATASETS.TRAIN instead, e.g. my_train@16#seed3",
        ),
        (
            ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
            "DATALOADER.REPEAT_THRESHOLD 0.0: give the share",
        ),
        (["SSL.FINETUNE.FIT_PREDICTORS", "always"], "choose from auto, never"),
        (["SSL.FINETUNE.WEIGHTS_CLASSES", "lvis"], "WEIGHTS_CLASSES lvis: give .coco., or the"),
        (["SSL.FINETUNE.WEIGHTS_CLASSES", "('a','a')"], "give .coco., or the names"),
        (["SSL.FINETUNE.SCALE_JITTER", "(2.0,0.1)"], "SCALE_JITTER .2.0, 0.1.: give the range"),
        (["SSL.FINETUNE.SCALE_JITTER", "(0.5,)"], "SCALE_JITTER .0.5,.: give the range"),
        (["SSL.FINETUNE.SCALE_JITTER", "('a','b')"], "SCALE_JITTER .'a', 'b'.: give the range"),
        (["SSL.FINETUNE.COPY_PASTE", "1.5"], "COPY_PASTE 1.5: give a share of photos, 0 to 1"),
        (
            ["SSL.FINETUNE.COPY_PASTE", "0.5"],
            "by their masks: set it to 0.0, or MODEL.MASK_ON True",
        ),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD 0: give 1 or more"),
        (["SSL.SOLVER.CHECKPOINT_PERIOD", "0"], "CHECKPOINT_PERIOD 0: give 1 or more"),
        (["SSL.INPUT.GRAY_PROB", "20.0"], "GRAY_PROB 20.0: give a probability, 0 to 1"),
        (["SSL.TEMPERATURE", "0.0"], "TEMPERATURE 0.0: give a number above 0"),
        (["SSL.QUEUE.KEYS_PER_PHOTO", "0"], "KEYS_PER_PHOTO 0: give 1 or more"),
    ],
)
def test_bad_options_are_one_line(opts, message):
    with pytest.raises(D2SSLError, match=message) as error:
        load_cfg(opts=[*PHOTOS, *opts])
    assert "\n" not in str(error.value)


def test_missing_file_and_unknown_key_in_file(tmp_path):
    with pytest.raises(D2SSLError, match="no such file"):
        load_cfg(str(tmp_path / "absent.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("SSL:\n  METOD: SoCo\n")
    with pytest.raises(D2SSLError, match="nearest is SSL.METHOD"):
        load_cfg(str(bad))
    for text in ("", "- a\n- b\n", "hello", "_BASE_: 5\n"):
        bad.write_text(text)
        with pytest.raises(D2SSLError, match="bad.yaml: cannot be read as a config"):
            load_cfg(str(bad), PHOTOS)
    bad.write_text("SSL.REGISTER: ['my_photos:register_all']\n")
    with pytest.raises(D2SSLError, match="SSL.REGISTER: in a yaml .* SSL: {REGISTER: ..."):
        load_cfg(str(bad))


def test_stock_detectron2_gets_an_lr_for_its_own_optimizer():
    opts = ["SOLVER.BASE_LR", "0.0001", "SOLVER.WEIGHT_DECAY", "0.05", "SOLVER.IMS_PER_BATCH", "4"]
    opts += ["SSL.FINETUNE.OPTIMIZER"]
    adamw, sgd = (stock_cfg(load_cfg(opts=[*PHOTOS, *opts, name])) for name in ("AdamW", "SGD"))
    assert (adamw.SOLVER.BASE_LR, adamw.SOLVER.WEIGHT_DECAY) == (0.005, 1e-4)
    assert (sgd.SOLVER.BASE_LR, sgd.SOLVER.WEIGHT_DECAY) == (0.0001, 0.05)


def test_a_study_is_sent_to_its_tool():
    with pytest.raises(D2SSLError, match="CONFIG is a study's: give this file to tools/study.py"):
        load_cfg(str(CONFIGS / "study" / "demo.yaml"))


def test_negative_seed_becomes_zero():
    assert load_cfg(opts=PHOTOS).SEED == 0


def test_a_name_where_a_list_is_wanted():
    with pytest.raises(D2SSLError) as error:
        load_cfg(opts=["SSL.DATASETS", "my_photos"])
    wanted = """SSL.DATASETS my_photos: is a list; write "('my_photos',)", with the comma"""
    assert str(error.value) == wanted
