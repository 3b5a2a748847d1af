from __future__ import annotations

import re

import pytest

from edgekd import plugins, schemes
from edgekd.errors import UsageError

GRAMMAR = re.compile(r"(fp|bf)(?P<f>8|16|32)(_(?P<when>static))?|w(?P<w>\d+)(a(?P<a>\d+))?_(?P<how>static|dynamic|weight_only|qat)")


@pytest.mark.parametrize("name", schemes.names())
def test_a_name_says_what_the_scheme_is(name):
    scheme, match = schemes.get(name), GRAMMAR.fullmatch(name)
    assert match, name
    if match["w"]:
        assert scheme.weight_bits == int(match["w"]) and scheme.ranges == {"weight_only": "float", "qat": "trained"}.get(match["how"], match["how"]) and not scheme.is_float
        assert scheme.activation_bits == (int(match["a"]) if match["a"] else 32)
    else:
        assert scheme.weight_bits == scheme.activation_bits == int(match["f"]) and scheme.is_float == (match["when"] is None)


@pytest.mark.parametrize("name", schemes.names())
def test_only_static_schemes_need_calibration(name):
    assert schemes.get(name).needs_calibration == name.endswith("_static")


def test_every_scheme_has_a_format_and_every_exporter_names_known_schemes():
    assert all(schemes.get(name).formats for name in schemes.names())
    for exporter in plugins.exporters().values():
        assert set(exporter.schemes) <= set(schemes.names()), exporter.format


def test_fp32_comes_first():
    assert schemes.names()[0] == "fp32"


@pytest.mark.parametrize(("wrong", "near"), [("w8a8_statc", "w8a8_static"), ("fp23", "fp32"), ("bf-16", "bf16"), ("int8", None)])
def test_unknown_schemes_get_the_nearest_name(wrong, near):
    with pytest.raises(UsageError) as e:
        schemes.get(wrong)
    assert "fp32" in (e.value.hint or "")
    assert near is None or f"did you mean '{near}'" in (e.value.hint or "")
