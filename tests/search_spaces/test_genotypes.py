"""Genotype text: what the field prints is read, nothing is run, and errors name the place."""

from __future__ import annotations

import pytest

from search_spaces.genotypes import GENOTYPES, Genotype, GenotypeError, get_genotype, swap_inputs

V2 = """
DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
    ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
    reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
    ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])
"""


@pytest.mark.parametrize("name", sorted(GENOTYPES))
def test_text_and_json_round_trips_give_an_equal_value(name: str) -> None:
    genotype = GENOTYPES[name]
    assert Genotype.parse(str(genotype)) == genotype
    assert Genotype.parse(genotype.to_json()) == genotype
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert hash(Genotype.parse(str(genotype))) == hash(genotype)
    assert Genotype.parse(name) == genotype == get_genotype(name)
    assert swap_inputs(swap_inputs(genotype)) == genotype


def test_the_published_text_is_read() -> None:
    assert Genotype.parse(V2) == GENOTYPES["DARTS_V2"]
    assert str(Genotype.parse(V2)) == " ".join(V2.split()).removeprefix("DARTS_V2 = ")


def edit(old: str, new: str) -> str:
    assert old in V2
    return V2.replace(old, new)


@pytest.mark.parametrize(
    "text",
    [
        edit("_concat=[2, 3, 4, 5]", "_concat=range(2, 6)"),
        edit("_concat=[2, 3, 4, 5]", "_concat=list(range(2, 6))"),
        edit("_concat=[2, 3, 4, 5]", "_concat=(2, 3, 4, 5)"),
        edit("DARTS_V2 = Genotype(", "genotypes.Genotype("),
        edit("normal=", "").replace("normal_concat=", "").replace("reduce=", "").replace("reduce_concat=", ""),
        edit("('sep_conv_3x3', 0), ('sep_conv_3x3', 1)", "(('sep_conv_3x3', 0), ('sep_conv_3x3', 1))"),
        edit("('dil_conv_3x3', 2)", "('dil_conv_3x3', 2, 0.1358)"),
        edit("'dil_conv_3x3'", "'dil_sepc_3x3'"),
        "# found by a search\n" + V2,
    ],
)
def test_other_spellings_of_the_field_mean_the_same(text: str) -> None:
    assert Genotype.parse(text) == GENOTYPES["DARTS_V2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (edit("reduce_concat=[2, 3, 4, 5]", ""), "missing reduce_concat"),
        (edit("normal_concat", "concat"), r"line 2 column \d+: unknown field concat; expected normal"),
        (
            edit("'dil_conv_3x3'", "'dil_conv_3x4'"),
            'line 1 column 28: normal, pair 7: unknown operation "dil_conv_3x4"; did',
        ),
        (edit("('dil_conv_3x3', 2)", "('dil_conv_3x3', 5)"), "pair 7 .*node 3 can read the states 0 to 4, got 5"),
        (edit("('dil_conv_3x3', 2)", "('dil_conv_3x3', -1)"), "pair 7 .*can read the states 0 to 4, got -1"),
        (edit("('dil_conv_3x3', 2)", "('dil_conv_3x3', '2')"), "expected the number of a state, got '2'"),
        (edit("('dil_conv_3x3', 2)", "('dil_conv_3x3', True)"), "expected the number of a state, got True"),
        (edit("('dil_conv_3x3', 2)", "'dil_conv_3x3'"), r"expected \(operation, state\) pairs .*got 'dil_conv_3x3'"),
        (edit(", ('dil_conv_3x3', 2)", ""), "two .* pairs for each node, got 7"),
        (edit("normal_concat=[2, 3, 4, 5]", "normal_concat=[2, 6]"), "different states among 0 to 5.*got \\[2, 6\\]"),
        (edit("normal_concat=[2, 3, 4, 5]", "normal_concat=[2, 2]"), "different states"),
        (edit("normal_concat=[2, 3, 4, 5]", "normal_concat=[]"), "at least one"),
        (edit("normal_concat=[2, 3, 4, 5]", "normal_concat=5"), "line 2 column .*normal_concat: .*not iterable"),
        (edit("('dil_conv_3x3', 2)", "(__import__('os').abort(), 2)"), "line 2 column .*normal: expected literals"),
        (edit("normal_concat=[2, 3, 4, 5]", "normal_concat=range(10**9)"), "normal_concat: expected literals"),
        (edit("('dil_conv_3x3', 2)", "('dil_conv_3x3', 2"), r"line \d column \d+: "),
        ("DARTS_V3", 'unknown genotype "DARTS_V3"; did you mean "DARTS_V[12]"'),
        ("", "expected Genotype"),
        ("[1, 2]", "expected Genotype"),
        ("x = 1; y = 2", "expected Genotype"),
        ('{"normal": [', "line 1 column 13: no JSON"),
        ('{"normal": [["conv_1x1", 0]]}', "missing normal_concat, reduce, reduce_concat"),
    ],
)
def test_what_is_no_genotype_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(GenotypeError, match=message):
        Genotype.parse(text)


def test_values_are_checked_when_made() -> None:
    with pytest.raises(GenotypeError, match="node 0 can read the states 0 to 1, got 2"):
        Genotype((("conv_1x1", 0), ("conv_1x1", 2)), (2,), (("conv_1x1", 0), ("conv_1x1", 1)), (2,))


def test_nodes_come_in_pairs_in_order() -> None:
    assert GENOTYPES["DARTS_V2"].nodes("normal")[3] == (("skip_connect", 0), ("dil_conv_3x3", 2))
    assert GENOTYPES["AmoebaNet"].concat("reduce") == (3, 4, 6)
