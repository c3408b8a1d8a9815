"""Options as command lines give them: strings, 0 and 1. What spells nothing is refused, never taken for true."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, differences, siblings, train, weights

import emonavi

NAMES = emonavi.available()
# Option, how it may be spelled, what is meant.
NUMBERS = [
    ("lr", ["1e-3", " 0.001 ", ".001"], 1e-3),
    ("eps", ["1e-6", "0.000001"], 1e-6),
    ("weight_decay", ["0", "0.0", "-0.0"], 0.0),
    ("max_norm", ["0", "0.0"], 0.0),
    ("max_norm", ["None", "none", None], 1.0),
    ("min_lr", ["1e-7"], 1e-7),
    ("min_lr", ["None", None], 1e-6),
    ("max_lr", ["0.5", "5e-1"], 0.5),
    ("max_lr", ["None", "none", None], None),
    # As numpy's arrays and torch's tensors hold them.
    ("lr", [np.float32(0.5), np.float64(0.5)], 0.5),
    ("weight_decay", [np.float32(0)], 0.0),
    ("max_lr", [np.float16(0.5)], 0.5),
    ("betas", [np.array([0.5, 0.75], dtype=np.float32), torch.tensor([0.5, 0.75])], (0.5, 0.75)),
    ("betas", ["0.8,0.95", "0.8, 0.95", "(0.8, 0.95)", "(0.8,0.95,)", "[0.8, 0.95]", [0.8, 0.95]], (0.8, 0.95)),
]
TRUE, FALSE = ["True", "true", "TRUE", "1", 1, True, np.True_], ["False", "false", " False ", "0", 0, False, np.False_]
FLAGS = ["use_shadow", "use_trust", "maximize", "capturable", "foreach", "decoupled_weight_decay"]
GROUP_KEYS = {"min_lr": "lr_floor", "max_lr": "lr_ceiling"}


def group_of(name="emonavi", **options):
    return emonavi.create(name, weights(), capture=False, **options).param_groups[0]


def names_of(option):
    return ["emolynx"] if option == "decoupled_weight_decay" else NAMES


@pytest.mark.parametrize(
    ("option", "spelled", "meant"), [(o, s, m) for o, spellings, m in NUMBERS for s in spellings], ids=str
)
def test_numbers(option, spelled, meant):
    for name in NAMES:
        got = group_of(name, **{option: spelled})[GROUP_KEYS.get(option, option)]
        assert tuple(got) == meant if option == "betas" else got == meant
        assert type(got) in (float, tuple, list, type(None))


@pytest.mark.parametrize(
    ("option", "spelled", "meant"),
    [(o, s, m) for o in FLAGS for spellings, m in ((TRUE, True), (FALSE, False)) for s in spellings],
    ids=str,
)
def test_flags(option, spelled, meant):
    for name in names_of(option):
        assert group_of(name, **{option: spelled})[option] is meant


@pytest.mark.parametrize("option", ["use_shadow", "use_trust", "foreach", "fused"])
@pytest.mark.parametrize("spelled", ["None", "none", None])
def test_flags_that_may_be_left_open(option, spelled):
    assert group_of(**{option: spelled})[option] is group_of()[option]


def test_fused_may_be_declined():
    assert group_of(fused="False")["fused"] is False


@pytest.mark.parametrize(
    ("spelled", "hears"), [("auto", True), ("Auto", True), *((s, True) for s in TRUE), *((s, False) for s in FALSE)]
)
def test_capture(spelled, hears):
    params = weights()
    optimizer = emonavi.create("emonavi", params, capture=spelled, on_missing_loss="ignore")
    sum(p.sum() for p in params).backward()
    assert (optimizer.step() is not None) is hears


@pytest.mark.parametrize("spelled", ["auto", "None", None])
def test_process_group(spelled):
    optimizer = emonavi.create("emonavi", weights(), process_group=spelled)
    assert optimizer._process_group == ("auto" if spelled == "auto" else None)


@pytest.mark.parametrize("spelled", ["adaptive", "v1", "v3", "v4"])
def test_emotion(spelled):
    for case in CASES:
        if spelled in ("adaptive", *case.generations):
            assert emonavi.create(case.name, weights(), emotion=spelled)._emotion.name == spelled


@pytest.mark.parametrize("kind", [str, Path])
def test_a_writers_directory(kind, tmp_path):
    pytest.importorskip("tensorboard")
    params = weights()
    optimizer = emonavi.create("emonavi", params, writer=kind(tmp_path / "logs"))
    train(optimizer, params, 2)
    optimizer.writer.close()
    assert list((tmp_path / "logs").glob("events.*"))
    assert emonavi.create("emonavi", weights(), writer="None").writer is None


@pytest.mark.parametrize("given", [{"start": 1e-3}, " {'start': 1e-3}", '{"start": 1e-3}'], ids=["dict", "sd", "json"])
def test_constants_of_the_emotion_as_a_command_line_has_them(given):
    assert emonavi.EmoNavi(weights(), emotion=given)._emotion == emonavi.Emotion(start=1e-3)
    assert emonavi.Emotional(torch.optim.AdamW(weights()), emotion=given)._emotion == emonavi.Emotion(start=1e-3)


def test_the_model_itself_is_no_list_of_parameters():
    with pytest.raises(TypeError, match=r"pass model\.parameters\(\)"):
        emonavi.EmoNavi(torch.nn.Linear(2, 1))


NONSENSE = [
    *((o, s, rf"{o}='?{s}'?: give True or False") for o in FLAGS for s in ("yes", "off", "", "2", "truee", 2, 0.5)),
    *((o, None, rf"{o}=None: give True or False") for o in ("maximize", "capturable", "decoupled_weight_decay")),
    *(
        (o, s, rf"{o}={s!r}: give a finite number of at least 0")
        for o in ("lr", "eps", "weight_decay", "max_norm", "min_lr", "max_lr")
        for s in ("fast", "", "1e-3,", "nan", "inf", "-1", True, False)
        if s not in ("nan", "inf", "-1")
    ),
    *((o, s, rf"{o}=.*: give a finite number") for o in ("lr", "max_norm", "max_lr") for s in ("nan", "inf", "-1")),
    *((o, "None", rf"{o}='None'") for o in ("lr", "eps", "weight_decay")),
    *(("betas", b, "betas=.*: give two numbers") for b in ("00", "0.9", "0.9;0.99", "0.9,1", "a,b", "", "0.9,,0.9")),
    *(("betas", b, "betas=.*: give two numbers") for b in (("a", "b"), (False, False), None, {0.9, 0.99})),
    *(("capture", s, "capture=.*choose 'auto'") for s in ("yes", "", "None", None, 2, "1.0")),
    *(("process_group", s, "process_group=.*choose 'auto'") for s in ("world", "", True, False, 0, object)),
    *(("emotion", s, "unknown emotion") for s in ("", "V5", "none", True)),
    *(("on_missing_loss", s, "on_missing_loss=") for s in ("", "False", None, True)),
    *(("writer", s, "writer=.*log directory") for s in ("", "  ", "True", "0", "false")),
    *(("writer", s, "writer=.*add_scalar") for s in (True, False, 1, ["logs"])),
]


@pytest.mark.parametrize(("option", "value", "words"), NONSENSE, ids=str)
def test_nonsense_is_refused_with_the_value_and_the_remedy(option, value, words):
    for name in names_of(option):
        with pytest.raises((ValueError, TypeError), match=words):
            emonavi.create(name, weights(), capture=value if option == "capture" else False, **(
                {} if option == "capture" else {option: value}
            ))  # fmt: skip


def test_a_group_may_be_spelled_out_too():
    params = weights()
    optimizer = emonavi.create("emolynx", params[:1])
    group = {"params": params[1:], "lr": "1e-2", "maximize": "False", "decoupled_weight_decay": "False"}
    optimizer.add_param_group(group)
    assert optimizer.param_groups[1] is group
    assert [group[k] for k in ("lr", "maximize", "decoupled_weight_decay")] == [1e-2, False, False]
    with pytest.raises(ValueError, match="maximize='no'"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "maximize": "no"})
    assert len(optimizer.param_groups) == 2


@siblings
def test_a_run_from_strings_is_the_run_from_values(case):
    spelled = {"lr": "1e-2", "betas": "0.8,0.9", "use_shadow": "True", "foreach": "0", "max_norm": "0.0"}
    plain = {"lr": 1e-2, "betas": (0.8, 0.9), "use_shadow": True, "foreach": False, "max_norm": 0.0}
    runs = []
    for options in (spelled, plain):
        params = weights()
        optimizer = case.cls(params, **options)
        train(optimizer, params, 5)
        runs.append({"emotion": optimizer.param_groups[0]["emotion"], **{str(i): p for i, p in enumerate(params)}})
    assert differences(*runs) == []


def test_no_name_of_an_optimizer():
    for name in ("adam", "", None, 3):
        with pytest.raises(ValueError, match=r"no optimizer .*: choose from emonavi"):
            emonavi.create(name, weights())
    assert math.isclose(group_of("EMONAVI")["lr"], 1e-3)
