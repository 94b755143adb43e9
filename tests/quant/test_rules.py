"""Rules: which one holds, and what is refused."""

import pytest

from ehap_jax.quant import HAWQ, INT4_WEIGHTS, INT8, QuantRule, match_rules

PATHS = ("params/conv1/kernel", "params/layer1_0/conv1/kernel", "params/linear/kernel")


def test_the_first_match_holds_and_skipping_leaves_out():
    rules = (QuantRule("params/conv1/*", weight_bits=4), QuantRule("*linear*", skip=True), QuantRule())
    matched = match_rules(rules, PATHS)
    assert {path: rule.weight_bits for path, rule in matched.items()} == {PATHS[0]: 4, PATHS[1]: 8}


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"'\*conv9\*' matches no kernel.*params/linear/kernel"):
        match_rules((QuantRule("*conv9*"), *INT8), PATHS)


def test_a_rule_that_never_holds_is_an_error():
    with pytest.raises(ValueError, match=r"'\*/conv1/\*' never holds.*as '\*conv1\*' does params/conv1/kernel"):
        match_rules((QuantRule("*conv1*", skip=True), QuantRule("*/conv1/*"), *INT8), PATHS)
    with pytest.raises(ValueError, match=r"'\*' never holds"):
        match_rules((QuantRule(weight_bits=4), *INT8), PATHS)
    every = (QuantRule("*conv1*"), QuantRule("params/l*"))  # a part of what the second one matches
    assert match_rules(every, PATHS) == {PATHS[0]: every[0], PATHS[1]: every[0], PATHS[2]: every[1]}


def test_patterns_are_case_sensitive():
    with pytest.raises(ValueError, match="matches no kernel"):
        match_rules((QuantRule("PARAMS/*"),), PATHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "weight_bits must be between 2 and 8, got 1"),
        ({"weight_bits": 9}, "weight_bits must be between 2 and 8"),
        ({"activation_bits": 16}, "activation_bits must be between 2 and 8"),
        ({"residual_bits": 17}, "residual_bits must be between 2 and 16"),
        ({"decay": 1.0}, "decay must be in"),
        ({"percentile": 50.0}, "percentile must be above 50"),
        ({"observer": "magic"}, "observer must be one of ema"),
        ({"activations": "odd"}, "activations must be one of asymmetric"),
    ],
)
def test_impossible_rules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QuantRule("*conv*", **options)


def test_presets():
    assert (INT8[0].weight_bits, INT8[0].residual_bits, INT8[0].activations, INT8[0].decay) == (
        8,
        8,
        "asymmetric",
        0.99,
    )
    assert (INT4_WEIGHTS[0].weight_bits, INT4_WEIGHTS[0].activation_bits) == (4, 8)
    assert (HAWQ[0].activations, HAWQ[0].residual_bits) == ("unsigned", 16)
