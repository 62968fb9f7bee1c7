"""Patterns: text there and back, legality on every kind of layer, and messages that name the cure."""

from __future__ import annotations

import itertools

import pytest

from ops.patterns import NM, Block, Channel, PatternError, Unstructured, check_pattern, parse_pattern

ALL = [
    Unstructured(),
    NM(2, 4),
    NM(1, 4),
    NM(1, 16),
    NM(4, 4),
    Block(4, 1),
    Block(1, 4),
    Block(2, 3),
    Block(1, 1),
    Channel(),
]


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_text_and_pattern_go_there_and_back(pattern):
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(pattern) is pattern
    assert hash(parse_pattern(str(pattern))) == hash(pattern)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (" 2:4 ", NM(2, 4)),
        ("2 : 4", NM(2, 4)),
        ("4X1", Block(4, 1)),
        ("Unstructured", Unstructured()),
        ("CHANNEL", Channel()),
    ],
)
def test_case_and_spaces_do_not_matter(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("unstructred", 'did you mean "unstructured"'),
        ("channels", 'did you mean "channel"'),
        ("2/4", 'did you mean "2:4" or "2x4"?'),
        ("4*1", 'did you mean "4:1" or "4x1"?'),
        ("banana", "; known:"),
        ("", "; known:"),
    ],
)
def test_an_unknown_pattern_names_the_nearest_and_all_known(text, hint):
    with pytest.raises(PatternError, match=f'unknown pattern "{text}"'.replace("*", r"\*")) as caught:
        parse_pattern(text)
    assert hint in str(caught.value)
    assert '"ROWSxCOLS"' in str(caught.value)


@pytest.mark.parametrize("text", ["0:4", "5:4", "1:1", "0x4", "4x0", "2:0"])
def test_impossible_sizes_are_refused_at_construction(text):
    with pytest.raises(PatternError, match="needs whole numbers"):
        parse_pattern(text)


def test_sizes_that_are_not_whole_numbers_are_refused():
    for make in (lambda: NM(2.0, 4), lambda: NM(True, 4), lambda: Block("4", 1)):
        with pytest.raises(PatternError):
            make()


def test_something_that_is_no_text_is_a_type_error():
    with pytest.raises(TypeError, match="got 4"):
        parse_pattern(4)  # type: ignore[arg-type]


def test_only_nm_has_a_fixed_density():
    assert {str(p): p.fixed_density for p in ALL if p.fixed_density is not None} == {
        "2:4": 0.5, "1:4": 0.25, "1:16": 0.0625, "4:4": 1.0,
    }  # fmt: skip


# weight shape, groups -> which patterns are legal. By hand.
HAND = [
    ((64, 32, 3, 3), 1, {"unstructured", "2:4", "1:4", "1:16", "4:4", "4x1", "1x4", "1x1", "channel"}),
    ((64, 30, 3, 3), 1, {"unstructured", "4x1", "2x3", "1x1", "channel"}),
    ((6, 3), 1, {"unstructured", "2x3", "1x1", "channel"}),
    ((10, 64), 1, {"unstructured", "2:4", "1:4", "1:16", "4:4", "1x4", "1x1", "channel"}),
    ((1, 16), 1, {"unstructured", "2:4", "1:4", "1:16", "4:4", "1x4", "1x1"}),
    ((32, 1, 3, 3), 32, {"unstructured", "channel"}),  # depthwise
    ((32, 1, 3, 3), 1, {"unstructured", "4x1", "1x1", "channel"}),  # one input channel, but not depthwise
    ((16, 4, 3, 3), 2, {"unstructured", "2:4", "1:4", "4:4", "4x1", "1x4", "1x1", "channel"}),
    ((12, 4, 1, 1), 2, {"unstructured", "2:4", "1:4", "4:4", "1x4", "1x1", "channel"}),  # 4x1 would cross the groups
]


@pytest.mark.parametrize(("shape", "groups", "legal"), HAND, ids=[f"{s}-groups{g}" for s, g, _ in HAND])
def test_legality_by_hand(shape, groups, legal):
    assert {str(p) for p in ALL if p.illegal(shape, groups) is None} == legal


def test_nm_legality_is_divisibility_for_every_width():
    for width, m in itertools.product(range(1, 70), (2, 4, 8, 16)):
        expected = width % m == 0
        assert (NM(1, m).illegal((8, width, 3, 3)) is None) == expected


def test_block_legality_is_divisibility_of_both_axes_within_a_group():
    for out, width, rows, cols, groups in itertools.product((4, 6, 8, 12), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3), (1, 2)):
        expected = (out // groups) % rows == 0 and width % cols == 0
        assert (Block(rows, cols).illegal((out, width, 1, 1), groups) is None) == expected


def test_a_message_names_layer_axis_length_group_and_cure():
    with pytest.raises(PatternError) as caught:
        check_pattern("2:4", (64, 30, 3, 3), 1, "stage2.conv1")
    assert str(caught.value) == (
        "stage2.conv1: 2:4 sparsity needs the reduction axis divisible by 4, got weight [64, 30, 3, 3] (axis 1 has length 30). "
        'Use 28 or 32 input channels, or pattern "unstructured" for this layer.'
    )


@pytest.mark.parametrize(
    ("pattern", "shape", "groups", "fragments"),
    [
        ("2:4", (64, 3, 7, 7), 1, ["divisible by 4", "length 3", "Use 4 input channels"]),
        ("2:4", (64, 6, 3, 3), 2, ["length 6", "Use 8 or 16 input channels"]),
        ("2:4", (32, 1, 3, 3), 32, ["axis 1 has length 1", "depthwise", "leave this layer dense"]),
        ("4x1", (30, 8), 1, ["axis 0 has length 30", "divisible by 4", "Use 28 or 32 output channels"]),
        ("4x1", (12, 8, 1, 1), 2, ["6 per group", "Use 8 or 16 output channels"]),
        ("1x4", (8, 6), 1, ["axis 1 has length 6", "Use 4 or 8 input channels"]),
        ("4x1", (32, 1, 3, 3), 32, ["depthwise"]),
        ("channel", (1, 8), 1, ["at least 2 output channels", "[1, 8]"]),
        ("2:4", (8,), 1, ["at least 2 axes", "[8]"]),
        ("4x1", (8, 4, 3, 3), 3, ["3 groups do not divide the 8 output channels"]),
        ("unstructured", (0, 4), 1, ["no empty one"]),
    ],
)
def test_every_message_says_what_was_found_and_what_would_do(pattern, shape, groups, fragments):
    with pytest.raises(PatternError) as caught:
        check_pattern(pattern, shape, groups, "layer7")
    message = str(caught.value)
    assert message.startswith("layer7: ")
    for fragment in fragments:
        assert fragment in message


def test_the_widths_a_message_proposes_are_legal():
    for width, groups in itertools.product(range(1, 40), (1, 2, 4)):
        reason = NM(2, 8).illegal((16 * groups, width, 3, 3), groups)
        if reason is None or "leave this layer dense" in reason:
            continue
        words = reason.split("Use ")[1].split(" input")[0].split(" or ")
        for total in map(int, words):
            assert total % groups == 0
            assert NM(2, 8).illegal((16 * groups, total // groups, 3, 3), groups) is None


def test_a_legal_pattern_is_returned_parsed():
    assert check_pattern("4x1", (8, 3)) == Block(4, 1)
