"""adapter_config.json: plain LoRA is understood as PEFT does; all else is refused, and quickly."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import signal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sksoup import CheckpointError
from sksoup.checkpoints.peft_config import CONFIG, LIMIT, PeftConfig
from sksoup.checkpoints.peft_patterns import MOST_PATTERNS

peft = pytest.importorskip("peft")
get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key

# fields of LoraConfig that are understood, or that say how it was trained: another value of each
UNDERSTOOD = {
    "task_type": "SEQ_CLS", "auto_mapping": {"base_model_class": "Net"}, "peft_version": "0.1",
    "base_model_name_or_path": "some/base", "revision": "main", "inference_mode": True, "r": 3,
    "target_modules": ["lin"], "exclude_modules": ["emb"], "lora_alpha": 5, "lora_dropout": 0.5,
    "fan_in_fan_out": True, "bias": "all", "use_rslora": True, "modules_to_save": ["head"],
    "init_lora_weights": False, "layers_to_transform": [1], "layers_pattern": "layers",
    "rank_pattern": {"lin": 2}, "alpha_pattern": {"lin": 2}, "megatron_core": "other.core",
    "eva_config": {"rho": 2.0}, "qalora_group_size": 8,
    "runtime_config": {"ephemeral_gpu_offload": True},
}  # fmt: skip


@pytest.fixture
def alarm():
    """Ends a test that waits."""

    def ring(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def defaults() -> dict:
    """What peft writes for a configuration with default values."""
    return {**peft.LoraConfig().to_dict(), "peft_type": "LORA"}


def checked(**changes) -> PeftConfig:
    return PeftConfig("'an/adapter'", {**defaults(), **changes}).checked()


def refused(match: str, **changes) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        checked(**changes)
    assert str(caught.value).startswith("'an/adapter' can't be opened as a LoRA adapter: ")
    assert len(str(caught.value)) < 1000


def test_what_peft_writes_is_taken(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lin"])
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.read(tmp_path).scaling("lin", 4) == 1.5
    assert checked().scaling("lin", 8) == 1.0


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(peft.LoraConfig)])
def test_every_field_is_understood_or_refused_by_name(field):
    """So that a field of a later PEFT, which nobody has looked at, is refused."""
    if field == "peft_type":
        return
    if field in UNDERSTOOD:
        assert UNDERSTOOD[field] != defaults().get(field)
        checked(**{field: UNDERSTOOD[field]})
        return
    for value in (True, 1, 0.5, "on", ["lin"], {"lin": 1}):
        refused(f"it was trained with {field}=.*, which is not supported.*merge_and_unload", **{
            field: value
        })  # fmt: skip


def test_every_field_that_is_understood_is_one_of_peft():
    assert UNDERSTOOD.keys() <= {f.name for f in dataclasses.fields(peft.LoraConfig)}


def test_a_field_that_is_not_of_this_peft_is_refused_unless_it_is_off():
    for off in (None, False, 0, [], {}, ""):
        checked(brand_new=off)
    refused("trained with brand_new='fancy'", brand_new="fancy")
    refused(r"trained with brand_new='x+\.\.\.", brand_new="x" * 10_000)


def test_every_start_that_changes_the_base_is_refused():
    field = next(f for f in dataclasses.fields(peft.LoraConfig) if f.name == "init_lora_weights")
    named = set(re.findall(r"'(\w+)'", str(field.type)))
    assert {"pissa", "olora", "gaussian"} <= named
    for start in [*named, "pissa_niter_4", "lora_ga", "new", "", 2, ["gaussian"], {}]:
        if start in ("gaussian", "eva", "orthogonal"):
            checked(init_lora_weights=start)
        else:
            refused("trained with init_lora_weights=.*, which changes", init_lora_weights=start)
    for start in (True, False, None):
        checked(init_lora_weights=start)


def test_every_other_type_of_peft_is_refused():
    for kind in peft.PeftType:
        if kind.value != "LORA":
            refused(f"its 'peft_type' is '{kind.value}', expected 'LORA'", peft_type=kind.value)
    for kind in ("lora", None, 1, ["LORA"], {}):
        refused("its 'peft_type' is", peft_type=kind)
    without = {name: value for name, value in defaults().items() if name != "peft_type"}
    with pytest.raises(CheckpointError, match="'peft_type' is None"):
        PeftConfig("'x'", without).checked()


# ---------------------------------------------------------------- ranks and scales, by pattern

PARTS = st.sampled_from(["lin", "lin2", "x", "layers", "0", "1", "10", "q_proj", "in"])
MODULES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    MODULES,
    MODULES.map(lambda name: f"^{name}"),
    MODULES.map(lambda name: name.replace(".", r"\.")),
    st.tuples(PARTS, PARTS).map("|".join),
    st.tuples(PARTS, PARTS).map(lambda pair: f"({pair[0]}|{pair[1]}).{pair[0]}"),
    PARTS.map(lambda part: f".*{part}"),
    PARTS.map(lambda part: f"{part}\\d+"),
    PARTS.map(lambda part: f"{part}?"),
    st.just(r"[a-z]+_proj"),
    st.just(r"layers\.[01]\.(?:q_proj|lin)"),
)


@given(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4), MODULES, st.booleans())
@example({"lin": 3, "x.lin": 5}, "x.lin", False)
@example({"^lin": 3}, "x.lin", False)
def test_patterns_are_matched_by_the_rule_of_peft(patterns, module, use_rslora):
    rank = patterns.get(get_pattern_key(patterns.keys(), module), 8)
    alphas = {pattern: 100.0 + k for k, pattern in enumerate(patterns)}
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), 16)
    config = checked(
        rank_pattern=patterns, alpha_pattern=alphas, lora_alpha=16, use_rslora=use_rslora
    )
    expected = alpha / (math.sqrt(rank) if use_rslora else rank)
    assert config.scaling(module, rank) == expected
    with pytest.raises(CheckpointError, match=f"have rank {rank + 1}, expected {rank}"):
        config.scaling(module, rank + 1)


def test_a_pattern_for_each_layer_is_matched_in_no_time():
    names = [f"model.layers.{k}.self_attn.{which}" for k in range(150) for which in "qkvogud"]
    config = checked(rank_pattern={f"^{name}": 1 + k % 60 for k, name in enumerate(names)})
    for k, name in enumerate(names):
        assert config.scaling(name, 1 + k % 60) == 8 / (1 + k % 60)
    assert all(e.pattern.startswith(r"(.*\.)?(^model") for e, _ in config._patterns["rank_pattern"])


HOSTILE = {
    "nested repeats": "(a+)+b", "a group of a group": "((a|b)*)*c", "many repeats": ".*.*.*.*z",
    "a long chain": "a*" * 5000, "repeats in braces": ".{1,50}.{1,50}.{1,50}z",
    "a group in braces": "(a|aa){2,90}z", "optional parts": ".?" * 60 + "z",
    "optional groups": "(.)?" * 60 + "z", "alternatives": "(.|.)" * 40 + "z",
    "alternatives without groups to keep": "(?:.|..)" * 40 + "z",
    "nested alternatives": "(" * 30 + "a" + "|b)" * 30 + "(.|.)" * 30 + "z",
    "no pattern": "lin(", "no set": "[a-", "a reference to nothing": r"(a)\9",
    "flags": "(?i)lin", "huge repeat": "x{99999999999}", "look behind": "(?<=a*)b",
    "deep groups": "(" * 5000, "ends in an escape": "lin\\",
}  # fmt: skip


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_patterns_are_refused_before_they_are_matched(field, what):
    with pytest.raises(CheckpointError, match=r"not a valid pattern|may take too long"):
        checked(**{field: {HOSTILE[what]: 2}}).scaling("encoder.layer.11.attention.self.query", 8)
    refused(f"its '{field}' holds .*", **{field: {HOSTILE[what]: 2}})


def test_many_patterns_are_refused_and_many_alternatives_are_not():
    many = {f"m{k}": 2 for k in range(MOST_PATTERNS + 1)}
    refused("holds 10,001 patterns, more than a network needs", rank_pattern=many)
    refused("may take too long", rank_pattern={f".*{k}.*z": 2 for k in range(101)})
    refused("expected strings", rank_pattern={5: 2})
    layers = "|".join(map(str, range(80)))
    usual = rf"model\.layers\.({layers})\.(self_attn|mlp)\.(q_proj|k_proj|up_proj)"
    config = checked(rank_pattern={usual: 4, r".*\.(1[0-9]|2[0-9])\..*(q|v)_proj": 2})
    assert config.scaling("model.layers.79.mlp.up_proj", 4) == 2.0


# ---------------------------------------------------------------- values of a wrong kind


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [0, -1, 2.5, "8", True, None, [8], 10**10, math.nan]),
        ("lora_alpha", [0, -1, "8", True, None, [8], {}, 1e300, math.inf, math.nan]),
        ("bias", ["some", None, True, 1, ["all"]]),
        ("rank_pattern", [["lin"], "lin", 5, {"lin": 0}, {"lin": 2.5}, {"lin": None}, {"lin": {}}]),
        ("alpha_pattern", [["lin"], "lin", 5, {"lin": 0}, {"lin": math.nan}, {"lin": "8"}]),
    ],
)
def test_wrong_kinds_are_refused_by_name(field, values):
    for value in values:
        refused(f"its ['\"]?{field}", **{field: value})


@given(
    st.dictionaries(
        st.sampled_from([f.name for f in dataclasses.fields(peft.LoraConfig)]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_no_value_does_more_than_be_refused(changes):
    try:
        config = PeftConfig("'x'", {**copy.deepcopy(defaults()), **changes}).checked()
    except CheckpointError:
        return
    assert isinstance(config.base_model, str)
    assert config.is_of_quantized_base in (True, False)
    with_rank = config.fields.get("r", 8)
    if not config.fields.get("rank_pattern"):
        assert config.scaling("x.lin", with_rank) > 0


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", True), ("TheBloke/Llama-2-7B-GPTQ", True),
        ("someone/model-AWQ", True), ("m-int8", True), ("m-nf4", True), ("org/model-FP8", True),
        ("bert-base-uncased", False), ("/home/me/print4you", False), ("", False), (None, False),
        (["bnb"], False),
    ],
)  # fmt: skip
def test_packed_bases_are_recognised_by_their_names(name, packed):
    assert checked(base_model_name_or_path=name).is_of_quantized_base is packed


# ---------------------------------------------------------------- files


def written(folder, text) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / CONFIG).write_bytes(data)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "can't be read"),
        ("", "can't be read"),
        ("[" * 100_000, "can't be read"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "can't be read"),
        ('{"r": ' + "9" * 10_000 + "}", "can't be read"),
        ("[]", "holds a list, expected an object"),
        ('"LORA"', "holds a str, expected an object"),
        ("null", "holds a NoneType, expected an object"),
        ("{}", "'peft_type' is None"),
        (b"\xff\xfe{}", "can't be read"),
        (b"\x00" * 10, "can't be read"),
        (" " * (LIMIT + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_texts_that_are_no_configuration(text, match, tmp_path):
    written(tmp_path, text)
    with pytest.raises(CheckpointError, match=match) as caught:
        PeftConfig.read(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_name_of_half_a_character_does_no_harm(tmp_path):
    fields = {**defaults(), "base_model_name_or_path": "\ud800"}
    fields = {n: v for n, v in fields.items() if not isinstance(v, set)}
    written(tmp_path, json.dumps(fields, default=str))
    assert PeftConfig.read(tmp_path).base_model == "\ud800"


@pytest.mark.usefixtures("alarm")
def test_pipes_and_endless_files_are_refused_at_once(tmp_path):
    pipe, endless = tmp_path / "pipe", tmp_path / "endless"
    pipe.mkdir()
    os.mkfifo(pipe / CONFIG)
    endless.mkdir()
    (endless / CONFIG).symlink_to("/dev/zero")
    for folder in (pipe, endless):
        with pytest.raises(CheckpointError, match="it is a pipe, a device or a folder"):
            PeftConfig.read(folder)
    (tmp_path / CONFIG).mkdir()
    with pytest.raises(CheckpointError, match="a pipe, a device or a folder"):
        PeftConfig.read(tmp_path)
    huge = tmp_path / "huge"
    huge.mkdir()
    with open(huge / CONFIG, "wb") as file:
        file.truncate(1 << 40)  # bytes that take no room
    with pytest.raises(CheckpointError, match="larger than"):
        PeftConfig.read(huge)
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / CONFIG).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="can't be opened: No such file"):
        PeftConfig.read(tmp_path / "dangling")
